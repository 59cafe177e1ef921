"""Kept lists in data loaders: they give exactly the listed images, or refuse."""

from __future__ import annotations

import io
import os
import tarfile

import numpy as np
import pytest
from helpers import encoded, picture

from protoprune.errors import ProtopruneError, UsageError
from protoprune.loaders import keep_only, weights_of

KEPT = ["cat/001.png", "dog/000.png", "dog/003.png"]


@pytest.fixture
def image_folder(image_tree):
    return pytest.importorskip("torchvision.datasets").ImageFolder(image_tree())


def sample_ids(subset) -> list[str]:
    return [os.path.relpath(subset.dataset.samples[i][0], subset.dataset.root) for i in subset.indices]


@pytest.mark.parametrize("form", [list, tuple, set, iter, "file"])
def test_image_folder(image_folder, tmp_path, form):
    if form == "file":
        kept = tmp_path / "kept.txt"
        kept.write_text("\n".join(KEPT))
    else:
        kept = form(KEPT)
    subset = keep_only(image_folder, kept)
    assert sample_ids(subset) == KEPT
    assert [label for _, label in subset] == [0, 1, 1]  # eel has lost all, and cat and dog keep their numbers


def test_image_folder_takes_absolute_lists(image_folder):
    assert sample_ids(keep_only(image_folder, [os.path.join(image_folder.root, one) for one in KEPT])) == KEPT


def test_image_folder_with_another_root(image_folder):
    above = os.path.dirname(image_folder.root)
    assert sample_ids(keep_only(image_folder, [f"images/{one}" for one in KEPT], root=above)) == KEPT


def test_image_folder_that_lacks_listed_images(image_folder):
    with pytest.raises(ProtopruneError, match=r"2 of 4 listed images are not in the data set .*first: ape/1\.png"):
        keep_only(image_folder, [*KEPT[:2], "cat/9.png", "ape/1.png"])
    with pytest.raises(ProtopruneError, match="3 of 3"):
        keep_only(image_folder, KEPT, root="/elsewhere")


def test_row_indices_are_refused(image_folder, tmp_path):
    np.save(tmp_path / "kept.npy", np.array([0, 1]))
    for kept in (np.array([0, 1]), [0, 1], tmp_path / "kept.npy"):
        with pytest.raises(UsageError, match="keep_only takes paths"):
            keep_only(image_folder, kept)


BY_PATH = {"dog/003.png": 2.5, "cat/001.png": 1.0, "dog/000.png": 4.0}


def test_weights_in_the_order_of_the_data_set(image_folder):
    kept = keep_only(image_folder, KEPT)
    assert weights_of(kept, BY_PATH).tolist() == [1, 4, 2.5]
    assert weights_of(kept, BY_PATH).dtype == np.float32
    whole = weights_of(image_folder, BY_PATH)
    assert len(whole) == len(image_folder)
    assert [whole[index] for index in kept.indices] == [1, 4, 2.5]
    assert whole.sum() == 7.5  # 0 for what is not listed
    absolute = {os.path.join(image_folder.root, path): weight for path, weight in BY_PATH.items()}
    assert weights_of(kept, absolute).tolist() == [1, 4, 2.5]


def test_weights_of_a_part_of_a_part(image_folder):
    from torch.utils.data import Subset

    backwards = Subset(keep_only(image_folder, KEPT), [2, 0, 1])
    assert weights_of(backwards, BY_PATH).tolist() == [2.5, 1, 4]
    with pytest.raises(ProtopruneError, match="1 of 3 listed images are not in the data set"):
        weights_of(Subset(backwards, [0, 1]), BY_PATH)


def test_weights_of_what_has_no_paths(image_folder):
    with pytest.raises(UsageError, match=r"list: expected \.samples"):
        weights_of([1, 2], BY_PATH)
    with pytest.raises(UsageError, match="only csv and jsonl"):
        weights_of(image_folder, __file__)


def test_data_sets_of_another_kind_are_refused():
    with pytest.raises(UsageError, match="int: expected"):
        keep_only(3, KEPT)


def test_hugging_face(image_tree):
    datasets = pytest.importorskip("datasets")
    root = image_tree()
    full = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(root.parent / "cache"))
    kept = keep_only(full, KEPT, root=root)
    assert len(kept) == 3
    assert [kept.features["label"].int2str(label) for label in kept["label"]] == ["cat", "dog", "dog"]
    assert keep_only(full, KEPT)["label"] == kept["label"]  # the root is the images' common folder
    with pytest.raises(ProtopruneError, match="1 of 4 listed images are not in the data set"):
        keep_only(full, [*KEPT, "cat/999.png"], root=root)
    assert weights_of(kept, BY_PATH, root=root).tolist() == [1, 4, 2.5]
    with pytest.raises(UsageError, match="weights_of needs root="):
        weights_of(kept, BY_PATH)


def test_hugging_face_without_images_or_paths():
    datasets = pytest.importorskip("datasets")
    with pytest.raises(UsageError, match="no image column, only text"):
        keep_only(datasets.Dataset.from_dict({"text": ["a"]}), KEPT)
    unnamed = datasets.Dataset.from_dict({"image": [{"bytes": encoded(picture(), "PNG"), "path": None}]})
    with pytest.raises(UsageError, match="does not know its files' paths"):
        keep_only(unnamed.cast_column("image", datasets.Image()), KEPT)


def shards(root, folder) -> str:
    """Two tar shards of the images below root, with a .cls beside each image."""
    files = sorted(root.rglob("*.png"))
    for number in range(2):
        with tarfile.open(folder / f"shard-{number}.tar", "w") as tar:
            for file in files[number::2]:
                tar.add(file, str(file.relative_to(root)))
                info = tarfile.TarInfo(str(file.relative_to(root).with_suffix(".cls")))
                info.size = 1
                tar.addfile(info, io.BytesIO(b"0"))
    return str(folder / "shard-{0..1}.tar")


@pytest.mark.filterwarnings("ignore")
def test_webdataset(image_tree, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    urls = shards(image_tree(), tmp_path)
    kept = keep_only(webdataset.WebDataset(urls, shardshuffle=False), KEPT)
    for _ in range(2):  # every epoch
        samples = list(kept)
        assert sorted(sample["__key__"] for sample in samples) == ["cat/001", "dog/000", "dog/003"]
        assert all({"png", "cls"} <= set(sample) for sample in samples)
    with pytest.raises(ProtopruneError, match=r"1 of 4 listed images .*first: cat/999\.png"):
        list(keep_only(webdataset.WebDataset(urls, shardshuffle=False), [*KEPT, "cat/999.png"]))


def test_webdataset_keeps_its_pipeline_and_loads_with_workers(image_tree, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    from torch.utils.data import DataLoader

    urls = shards(image_tree(), tmp_path)
    kept = keep_only(webdataset.WebDataset(urls, shardshuffle=False), KEPT).to_tuple("__key__")
    keys = [one[0] for one in DataLoader(kept, batch_size=None, num_workers=2)]
    assert sorted(keys) == ["cat/001", "dog/000", "dog/003"]


def test_samples_of_any_iterable_pass_after_pass():
    samples = [{"__key__": name, "n": i} for i, name in enumerate(("a", "b", "c"))]
    kept = keep_only(samples, ["c.png", "a.png"])
    assert [s["n"] for s in kept] == [s["n"] for s in kept] == [0, 2]
    with pytest.raises(UsageError, match="no __key__, only x"):
        list(keep_only([{"x": 1}], ["c.png"]))


def test_keys_are_paths_up_to_the_first_dot_of_the_name():
    samples = [{"__key__": "v1.0/a"}, {"__key__": "b"}, {"__key__": "c"}]
    assert list(keep_only(samples, ["v1.0/a.tar.png", "b.png"])) == samples[:2]


# --- standard output
