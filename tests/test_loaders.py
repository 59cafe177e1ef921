"""Kept lists in data loaders: they give exactly the listed images, or refuse."""

from __future__ import annotations

import io
import json
import os
import tarfile
import types
import warnings
from collections import UserList
from pathlib import Path

import numpy as np
import pytest
from helpers import encoded, format_list, picture
from shard_helpers import write_tar
from typer.testing import CliRunner

import protoprune
from protoprune import loaders
from protoprune.cli import app
from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.loaders import keep_only, table_rows, weights_of

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


def test_a_list_of_shards_is_none_of_their_unpacked_folder(image_folder):
    """Keys may repeat across shards: which one was unpacked last nobody knows."""
    with pytest.raises(ProtopruneError, match=r"the list names images in shards; filter what reads those"):
        keep_only(image_folder, ["0000.tar/cat/001.png"])


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


@pytest.mark.parametrize("weight", [float("nan"), -1.0, 0, float("inf"), "2"])
def test_weights_that_are_none_are_refused(image_folder, weight):
    with pytest.raises(UsageError, match=r"the weight of cat/000.png .*: expected a number above 0"):
        weights_of(image_folder, {"cat/000.png": weight, "cat/001.png": 1.0})


def test_paths_may_be_objects(image_folder):
    assert len(keep_only(image_folder, [Path("cat/000.png"), Path("dog/001.png")])) == 2


def test_weights_of_a_part_of_a_part(image_folder):
    from torch.utils.data import Subset

    backwards = Subset(keep_only(image_folder, KEPT), [2, 0, 1])
    assert weights_of(backwards, BY_PATH).tolist() == [2.5, 1, 4]
    assert weights_of(Subset(backwards, [0, 1]), BY_PATH).tolist() == [2.5, 1]
    with pytest.warns(ProtopruneWarning, match=r"1 of the 3 images .* has no weight in the list"):
        other = weights_of(backwards, {path: weight for path, weight in BY_PATH.items() if path != "cat/001.png"})
    assert other.tolist() == [2.5, 0, 4]
    with pytest.raises(ProtopruneError, match="1 of 4 listed images is not in the data set"):
        weights_of(backwards, {**BY_PATH, "cat/9.png": 1})


def test_weights_of_what_has_no_paths(image_folder):
    with pytest.raises(UsageError, match=r"list: expected \.samples"):
        weights_of([1, 2], BY_PATH)
    with pytest.raises(UsageError, match="only csv and jsonl"):
        weights_of(image_folder, __file__)


def test_data_sets_of_another_kind_are_refused():
    for dataset, what in ((3, "int"), (np.array(3), "ndarray")):
        with pytest.raises(UsageError, match=f"{what}: expected"):
            keep_only(dataset, KEPT)
        with pytest.raises(UsageError, match=f"{what}: expected"):
            weights_of(dataset, {"a.png": 1.0})


def test_hugging_face(image_tree):
    datasets = pytest.importorskip("datasets")
    root = image_tree()
    full = datasets.load_dataset("imagefolder", data_dir=str(root), split="train", cache_dir=str(root.parent / "cache"))
    kept = keep_only(full, KEPT, root=root)
    assert len(kept) == 3
    assert [kept.features["label"].int2str(label) for label in kept["label"]] == ["cat", "dog", "dog"]
    assert keep_only(full, KEPT)["label"] == kept["label"]  # the root is the images' common folder
    with pytest.raises(ProtopruneError, match="1 of 4 listed images is not in the data set"):
        keep_only(full, [*KEPT, "cat/999.png"], root=root)
    assert weights_of(kept, BY_PATH, root=root).tolist() == [1, 4, 2.5]
    with pytest.raises(UsageError, match="weights_of needs root="):
        weights_of(kept, BY_PATH)
    drawn = full.with_transform(lambda batch: pytest.fail("transformed"))
    for formatted in (drawn, full.with_format("numpy", columns=["label"]), full.with_format("torch")):
        some = keep_only(formatted, KEPT, root=root)
        assert weights_of(some, BY_PATH, root=root).tolist() == [1, 4, 2.5]
        assert some.format == formatted.format
        assert some.with_format(None)["label"] == kept["label"]


def test_what_hugging_face_took_for_another_split_is_not_said_to_be_a_part(image_tree):
    """load_dataset("imagefolder") leaves a class `test`, and images called val_1.jpg, out of the split `train`."""
    datasets = pytest.importorskip("datasets")
    root = image_tree()
    paths = [str(path) for path in sorted(root.rglob("*.png")) if path.parent.name == "dog"]
    dogs = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    with pytest.raises(
        ProtopruneError, match=r"load_dataset makes splits .* data_files={'train': 'FOLDER/\*\*'} takes"
    ):
        keep_only(dogs, KEPT, root=root)
    with pytest.raises(ProtopruneError, match=r"in the data set under \S+ \(first: cat/999.png\); give the root"):
        keep_only(dogs, [*(one for one in KEPT if one.startswith("dog")), "cat/999.png"], root=root)


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


class _Other:
    """Samples of another data set than the list's."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self):
        return ({"__key__": f"ant/{i}", "png": b""} for i in range(self.count))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_lengths_that_were_said_before_are_of_more_images(image_tree, tmp_path):
    """`with_epoch` repeats what is kept until it has as many, and a schedule believes `with_length`."""
    wds = pytest.importorskip("webdataset")
    dataset = wds.WebDataset(shards(image_tree(), tmp_path), shardshuffle=False)
    with pytest.warns(ProtopruneWarning, match=r"with_epoch\(12\) was called before keep_only, which keeps 3 images"):
        keep_only(dataset.compose().with_epoch(12), KEPT)
    with pytest.warns(ProtopruneWarning, match=r"with_length\(12\) was called before"):
        keep_only(dataset.compose().with_length(12, silent=True), KEPT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ProtopruneWarning)
        assert len(keep_only(dataset, KEPT).with_length(3, silent=True)) == 3


def test_a_worker_that_keeps_nothing_says_so(monkeypatch):
    from torch.utils.data import DataLoader, IterableDataset

    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # or torch waits 5 s for the worker

    class Kept(IterableDataset):
        def __init__(self):
            self.samples = keep_only(_Other(5), KEPT)

        def __iter__(self):
            return iter(self.samples)

    loader = iter(DataLoader(Kept(), batch_size=None, num_workers=1))  # which sees all of it
    with pytest.raises(ProtopruneError, match="3 of 3 listed images are not in the data set"):
        next(loader)
    assert not list(loader)  # until it knows that, torch would wait 5 s for the worker


def test_of_several_workers_each_says_when_none_of_its_samples_is_listed(monkeypatch):
    import torch.utils.data

    info = types.SimpleNamespace(num_workers=2)
    workers = [info]
    monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda: workers[0])
    with pytest.warns(ProtopruneWarning, match="none of the 5 samples that this process saw is in the list"):
        assert not list(keep_only(_Other(5), KEPT))
    info.num_workers = 1
    monkeypatch.setenv("WORLD_SIZE", "2")  # each process has one worker
    for workers[0] in (info, None):  # or loads by itself
        with pytest.warns(ProtopruneWarning, match="none of the 5 samples"):
            assert not list(keep_only(_Other(5), KEPT))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(keep_only(_Other(5), ["ant/3.png", "ant/9.png"]))) == 1
        assert not list(keep_only(_Other(0), KEPT))  # more workers than shards


def test_an_endless_stream_of_another_data_set_says_so():
    with (
        pytest.warns(ProtopruneWarning, match="none of the first 10,000 samples is in the list"),
        pytest.raises(ProtopruneError, match="3 of 3 listed"),
    ):
        list(keep_only(_Other(10_001), KEPT))


def test_a_part_of_which_nothing_is_listed(image_folder):
    """All of the list's images are elsewhere in the data set: an empty training set would be no error of torch."""
    from torch.utils.data import Subset

    rest = [row for row, (path, _) in enumerate(image_folder.samples)
            if os.path.relpath(path, image_folder.root) not in KEPT]  # fmt: skip
    part = Subset(image_folder, rest)
    for call in (lambda: keep_only(part, KEPT), lambda: weights_of(part, dict.fromkeys(KEPT, 1.0))):
        with pytest.raises(ProtopruneError, match=rf"none of the {len(rest)} images of this part of the data set"):
            call()
    assert len(keep_only(Subset(image_folder, [*rest, 1]), KEPT)) == 1  # cat/001.png


def test_samples_of_any_iterable_pass_after_pass():
    samples = [{"__key__": name, "n": i} for i, name in enumerate(("a", "b", "c"))]
    kept = keep_only(samples, ["c.png", "a.png"])
    assert [s["n"] for s in kept] == [s["n"] for s in kept] == [0, 2]
    with pytest.raises(UsageError, match="no __key__, only x; call keep_only before to_tuple, or give paths="):
        list(keep_only([{"x": 1}], ["c.png"]))


def test_keys_are_paths_up_to_the_first_dot_of_the_name():
    samples = [{"__key__": "v1.0/a"}, {"__key__": "b"}, {"__key__": "c"}]
    assert list(keep_only(samples, ["v1.0/a.tar.png", "b.png"])) == samples[:2]


# --- standard output


# --- the list's side: manifests, other spellings, nothing


@pytest.mark.parametrize("form", ["manifest", "dots", "backslashes", "absolute"])
def test_lists_in_any_form(image_folder, tmp_path, form):
    every = [os.path.relpath(path, image_folder.root) for path, _ in image_folder.samples]
    lines = {
        "manifest": ["path,score,keep", *(f"{path},1,{int(path in KEPT)}" for path in every)],
        "dots": [f"./{path}" for path in KEPT],
        "backslashes": [path.replace("/", "\\") for path in KEPT],
        "absolute": [os.path.join(image_folder.root, "cat", "..", path) for path in KEPT],
    }[form]
    (tmp_path / "kept.txt").write_text("\n".join(lines))
    assert sample_ids(keep_only(image_folder, tmp_path / "kept.txt")) == KEPT
    if form != "manifest":
        assert weights_of(image_folder, dict.fromkeys(lines, 2.0)).sum() == 6
        samples = [{"__key__": path.removesuffix(".png"), "png": b""} for path in every]
        if form != "absolute":
            assert [sample["__key__"] + ".png" for sample in keep_only(samples, lines)] == KEPT


def test_weights_of_a_manifest(image_folder, tmp_path):
    lines = ["path,keep,weight", *(f"{path},1,{weight}" for path, weight in BY_PATH.items()), "cat/000.png,0,", ""]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    assert weights_of(keep_only(image_folder, tmp_path / "all.csv"), tmp_path / "all.csv").tolist() == [1, 4, 2.5]


def test_nothing_to_keep(image_folder, tmp_path):
    (tmp_path / "kept.txt").touch()
    (tmp_path / "all.csv").write_text("path,keep\ncat/000.png,0\n")
    for kept in ([], tmp_path / "kept.txt", tmp_path / "all.csv"):
        with pytest.raises(UsageError, match="lists no image, so that nothing would be left"):
            keep_only(image_folder, kept)
    with pytest.raises(UsageError, match="no image with a weight"):
        weights_of(image_folder, {})


# --- the data set's side: parts, splits, suffixes, orders


def test_a_random_split_keeps_its_part_of_the_list(image_folder):
    import torch

    parts = torch.utils.data.random_split(image_folder, [7, 5], torch.Generator().manual_seed(1))
    found = []
    for part in parts:
        kept = keep_only(part, KEPT)
        own = [part.indices[place] for place in kept.indices]
        found += [os.path.relpath(image_folder.samples[index][0], image_folder.root) for index in own]
        assert [label for _, label in kept] == [image_folder.samples[index][1] for index in own]
        assert set(weights_of(kept, BY_PATH).tolist()) <= {1, 4, 2.5}
    assert sorted(found) == KEPT
    with pytest.raises(ProtopruneError, match="1 of 4 listed images"):
        keep_only(parts[0], [*KEPT, "cat/9.png"])


def test_splits_and_streams_are_refused(image_tree):
    datasets = pytest.importorskip("datasets")
    root = image_tree()
    whole = datasets.load_dataset("imagefolder", data_dir=str(root), cache_dir=str(root.parent / "cache"))
    with pytest.raises(UsageError, match=r"a DatasetDict of splits train; give one: \['train'\]"):
        keep_only(whole, KEPT)
    with pytest.raises(UsageError, match=r"stream what is kept: keep_only\(…\)\.to_iterable_dataset\(\)"):
        keep_only(whole["train"].to_iterable_dataset(), KEPT)
    kept = keep_only(whole["train"], KEPT, root=root).to_iterable_dataset(num_shards=2)
    names = [row["image"]["path"] for row in kept.cast_column("image", datasets.Image(decode=False))]
    assert sorted(os.path.relpath(name, root) for name in names) == KEPT
    split = whole["train"].train_test_split(0.5, shuffle=False)
    with pytest.raises(ProtopruneError, match=r"listed images (is|are) not in the data set .*, or part=True"):
        keep_only(split["train"], KEPT, root=root)
    both = [keep_only(split[name], KEPT, root=root, part=True) for name in split]
    assert [0 < len(one) < len(KEPT) for one in both] == [True, True]
    weights = [weights_of(one, BY_PATH, root=root, part=True) for one in both]
    assert sorted(np.concatenate(weights).tolist()) == [1, 2.5, 4]
    with pytest.raises(ProtopruneError, match="none of the"):
        keep_only(split["train"], ["eel/0.png"], root=root, part=True)


def test_what_training_code_asks_of_an_image_folder(image_folder):
    """torchvision's reference script counts `dataset.classes`, others weigh by `targets`."""
    import copy
    import pickle

    import torch

    kept = keep_only(image_folder, KEPT)
    for one in (kept, copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert (one.classes, one.class_to_idx) == (["cat", "dog", "eel"], {"cat": 0, "dog": 1, "eel": 2})
        assert one.targets == [0, 1, 1] == [label for _, label in one]
        assert one.samples == one.imgs == [(os.path.join(image_folder.root, KEPT[i]), (0, 1, 1)[i]) for i in range(3)]
    assert kept.targets is kept.targets  # made once: loops ask for targets[i] again and again
    kept.transform = lambda image: "transformed"
    assert kept[0] == ("transformed", 0)
    assert kept.transform is image_folder.transform
    with pytest.raises(AttributeError, match="'KeptSubset' object has no attribute 'labels'"):
        _ = kept.labels
    assert keep_only(kept, KEPT[:2], part=True).targets == [0, 1]
    split = torch.utils.data.Subset(image_folder, [6, 3, 0])  # as random_split makes them
    some = keep_only(split, KEPT)
    assert (some.classes, some.targets, len(some)) == (image_folder.classes, [1, 1], 2)
    some.transform = lambda image: "another"
    assert some[0] == ("another", 1)


def test_timm_data_sets_stay_what_they_are(image_folder, tmp_path):
    """timm's loaders set a transform on the data set, which a Subset would keep to itself."""
    data = pytest.importorskip("timm.data")
    import torch

    full = data.create_dataset("", root=image_folder.root)
    kept = keep_only(full, KEPT)
    assert (len(full), type(kept)) == (12, type(full))
    assert kept.filenames() == KEPT
    assert weights_of(kept, BY_PATH).tolist() == [1, 4, 2.5]
    loader = data.create_loader(
        kept, 8, 2, num_workers=0, use_prefetcher=False, device=torch.device("cpu"), persistent_workers=False
    )
    assert [label for images, labels in loader for label in labels.tolist()] == [0, 1, 1]
    assert sorted(keep_only(torch.utils.data.Subset(full, range(6)), KEPT).indices) == [1, 3]
    with tarfile.open(tmp_path / "cat.tar", "w") as tar:
        tar.add(image_folder.samples[0][0], "000.png")
    with pytest.raises(UsageError, match="`protoprune reshard`"):
        keep_only(data.create_dataset("", root=str(tmp_path / "cat.tar")), KEPT)
    with pytest.raises(UsageError, match="`protoprune reshard`"):
        keep_only(data.IterableImageDataset("", reader=[(0, 1)]), KEPT)


def test_timm_data_sets_of_hugging_face(image_folder, tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    data = pytest.importorskip("timm.data")
    full = data.create_dataset(f"hfds/{image_folder.root}", root=str(tmp_path / "cache"), split="train")
    kept = keep_only(full, KEPT, root=image_folder.root)
    assert (len(full), len(kept)) == (12, 3)
    assert [os.path.relpath(name, image_folder.root) for name in kept.filenames()] == KEPT
    assert weights_of(kept, BY_PATH, root=image_folder.root).tolist() == [1, 4, 2.5]
    assert [label for _, label in kept] == [0, 1, 1]


@pytest.mark.parametrize("root", ["images", "./images/", "images/.", "elsewhere/../images", "{absolute}"])
def test_roots_and_paths_that_are_spelt_otherwise(image_tree, tmp_path, monkeypatch, root):
    image_tree()
    monkeypatch.chdir(tmp_path)
    root = root.format(absolute=tmp_path / "images")
    for prefix in ("images/", "images//", "./images/./", f"{tmp_path}/images/", f"{tmp_path}/images/dog/../"):
        samples = [prefix + one for one in [*KEPT, "eel/.hidden.png", ".hidden/001.png", "cat/000.png"]]
        dataset = types.SimpleNamespace(samples=samples, root=root)
        for kept in (KEPT, ["eel/.hidden.png"], [".hidden/001.png"]):
            assert keep_only(dataset, kept).samples == [prefix + one for one in kept]


def test_lists_of_paths(image_folder, tmp_path, monkeypatch):
    """What data sets of one's own, and libraries that take file names, begin with."""
    paths = [path for path, _ in image_folder.samples]
    assert keep_only(paths, KEPT, root=image_folder.root) == [os.path.join(image_folder.root, one) for one in KEPT]
    assert keep_only(image_folder.samples, KEPT, root=image_folder.root) == keep_only(image_folder, KEPT).samples
    relative = [Path(os.path.relpath(path, image_folder.root)) for path in paths]
    assert keep_only(relative, KEPT) == [Path(one) for one in KEPT]
    assert weights_of(KEPT, BY_PATH).tolist() == [1, 4, 2.5]
    assert keep_only(np.array(relative, dtype=object), KEPT) == [Path(one) for one in KEPT]

    assert keep_only(UserList(relative), KEPT) == [Path(one) for one in KEPT]  # as fastai's L, which is no list either
    with pytest.raises(UsageError, match="images: a path; give the data set"):
        keep_only(image_folder.root, KEPT)
    with pytest.raises(ProtopruneError, match="3 of 3 listed images are not in the data set under"):
        keep_only(paths, KEPT)
    pandas = pytest.importorskip("pandas")
    with pytest.raises(UsageError, match="a DataFrame: give its column of paths, or paths="):
        keep_only(pandas.DataFrame({"path": KEPT}), KEPT)
    column = pandas.Series(paths, index=range(7, 7 + len(paths)))
    pyarrow = pytest.importorskip("pyarrow")
    for one in (column, pyarrow.array(paths), pyarrow.chunked_array([paths[:2], paths[2:]]), column.to_frame().values):
        assert keep_only(one, KEPT, root=image_folder.root) == keep_only(paths, KEPT, root=image_folder.root)
    assert weights_of(pandas.Series(KEPT), BY_PATH).tolist() == [1, 4, 2.5]
    with pytest.raises(UsageError, match="a Table: give its column of paths, or paths="):
        keep_only(pyarrow.table({"path": KEPT}), KEPT)


def test_loaders_and_batches_are_refused(image_folder):
    import torch

    with pytest.raises(UsageError, match="a DataLoader: give its data set"):
        keep_only(torch.utils.data.DataLoader(image_folder), KEPT)
    with pytest.raises(UsageError, match="the samples are batches; call keep_only before batched"):
        list(keep_only([{"__key__": ["cat/001"]}], KEPT))


def test_samples_that_are_no_files():
    from types import SimpleNamespace

    with pytest.raises(UsageError, match="its samples do not begin with the path of a file"):
        keep_only(SimpleNamespace(samples=[(np.zeros(3), 0)], root="."), KEPT)
    with pytest.raises(UsageError, match="has no root; give root="):
        keep_only(SimpleNamespace(samples=[("cat/001.png", 0)]), KEPT)


def test_images_that_image_folder_leaves_out_for_their_suffix(image_folder):
    from torchvision.datasets import ImageFolder

    for name in ("dog/odd.gif", "dog/odd.jfif"):
        picture().save(os.path.join(image_folder.root, name), "GIF" if name.endswith("gif") else "JPEG")
    kept = [*KEPT, "dog/odd.gif", "dog/odd.jfif"]
    plain = ImageFolder(image_folder.root)
    with pytest.raises(ProtopruneError, match=r"2 of 5 .*it leaves out \.gif 1, \.jfif 1: .*is_valid_file=lambda"):
        keep_only(plain, kept)
    every = ImageFolder(image_folder.root, is_valid_file=lambda path: True)
    assert sample_ids(keep_only(every, kept)) == sorted(kept)


def test_classes_whose_names_sort_otherwise_than_their_paths(image_tree):
    """`-` sorts before `/`, so `car-toy/000.png` comes before `car/000.png`, and the class `car` before `car-toy`."""
    from torchvision.datasets import ImageFolder

    from protoprune.images.listing import list_folder

    root = image_tree({"car": 3, "car-toy": 3})
    dataset, rows = ImageFolder(root), list_folder(root).paths
    assert rows[0] == "car-toy/000.png"
    assert os.path.relpath(dataset.samples[0][0], root) == "car/000.png"
    kept = ["car-toy/001.png", "car/002.png"]
    subset = keep_only(dataset, kept)
    assert sorted(sample_ids(subset)) == kept
    assert {os.path.relpath(dataset.samples[i][0], root): dataset.samples[i][1] for i in subset.indices} == {
        "car/002.png": 0, "car-toy/001.png": 1,
    }  # fmt: skip


# --- WebDataset: one key for several files


def webdataset_of(folder, names, prefix="") -> str:
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for name in names:
            info = tarfile.TarInfo(prefix + name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"0"))
    return str(folder / "shard.tar")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("names", "kept", "keys"),
    [
        (["ant/1.jpg", "ant/1.cls", "ant/2.jpg"], ["ant/1.jpg"], ["ant/1"]),
        (["ant/1.jpg", "ant/1.mask.png"], ["ant/1.jpg"], ["ant/1"]),  # an image and what belongs to it
        (["ant/1.png", "ant/2.png"], ["ant/2.jpg"], ["ant/2"]),  # stored as another format
        (["ant/1.0.jpg", "ant/1.5.jpg"], ["ant/1.0.jpg", "ant/1.5.jpg"], ["ant/1"]),  # one sample, all of it listed
        (["ant/1.0.jpg", "bee/1.jpg", "ant/1.5.jpg"], ["ant/1.0.jpg"], ["ant/1"]),  # two samples of one key
        (["ant/1.0.jpg", "ant/1.5.jpg"], ["ant/1.0.jpg"], None),
        (["ant/1.jpg", "ant/1.5.jpg"], ["ant/1.jpg"], None),
        (["ant/1.jpg", "ant/1.png"], ["ant/1.jpg"], None),
        (["ant/1.webp"], ["ant/1.jpg", "ant/1.png"], None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("prefix", ["", "./"])  # `tar -C images .` writes the latter
def test_webdataset_keys(tmp_path, names, kept, keys, prefix):
    webdataset = pytest.importorskip("webdataset")
    dataset = keep_only(webdataset.WebDataset(webdataset_of(tmp_path, names, prefix), shardshuffle=False), kept)
    if keys is None:
        with pytest.raises(ProtopruneError, match=r"the key \.?/?ant/1 is that of .* in the list: keys end at"):
            list(dataset)
    else:
        samples = list(dataset)
        assert [sample["__key__"].removeprefix("./") for sample in samples] == keys
        assert "5.jpg" not in samples[0] or len(kept) == 2


def test_two_names_that_webdataset_cannot_tell_apart():
    with pytest.raises(ProtopruneError, match=r"a\.JPG and a\.jpg: one key and suffix"):
        keep_only([{"__key__": "a"}], ["a.jpg", "a.JPG"])


def test_lists_of_shards_match_by_shard_and_key(tmp_path):
    """Two tars that share their keys: the list says which image of which shard."""
    samples = [{"__url__": f"/mnt/set/{shard}.tar", "__key__": f"cat/{key}", "png": b"", "id": (shard, key)}
               for shard in ("a/0", "a/1", "b/0") for key in (1, 2)]  # fmt: skip
    kept = ["a/0.tar/cat/1.png", "a/1.tar/cat/2.png", "b/0.tar/cat/2.png"]
    assert [one["id"] for one in keep_only(samples, kept)] == [("a/0", 1), ("a/1", 2), ("b/0", 2)]
    assert [one["id"] for one in keep_only(samples[:2], ["0.tar/cat/2.png"])] == [("a/0", 2)]
    with pytest.raises(ProtopruneError, match=r"0\.tar/cat/1 is in /mnt/set/a/0\.tar and in /mnt/set/b/0\.tar"):
        list(keep_only(samples, ["0.tar/cat/1.png"]))
    with pytest.raises(ProtopruneError, match=r"1 of 1 listed images is not in the data set"):
        list(keep_only(samples, ["c/0.tar/cat/1.png"]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "url",
    [
        "DIR/shard-{0..1}.tar",
        "shard-{0..1}.tar",
        "file:DIR/shard-{0..1}.tar",
        "pipe:cat DIR/shard-{0..1}.tar",
        "pipe:cat 'DIR/shard-{0..1}.tar' || true",
        "pipe:cat shard-{0..1}.tar | cat",
        "pipe:cat shard-{0..1}.tar # it's",
    ],
)
@pytest.mark.filterwarnings("ignore")  # webdataset leaves its files to garbage collection
def test_lists_of_shards_by_every_kind_of_url(url, image_tree, tmp_path, monkeypatch):
    """The images that arrive, and not only their number: the shards have the same keys."""
    webdataset = pytest.importorskip("webdataset")
    for shard in range(2):
        write_tar(tmp_path / f"shard-{shard}.tar", [(f"{i:03d}.png", bytes([shard, i])) for i in range(4)])
    monkeypatch.chdir(tmp_path)
    url = url.replace("DIR", str(tmp_path))
    kept = ["shard-0.tar/000.png", "shard-1.tar/002.png"]
    for listed in (kept, [f"{tmp_path}/{one}" for one in kept], [f"./{one}" for one in kept]):
        samples = keep_only(webdataset.WebDataset(url, shardshuffle=False), listed)
        assert [sample["png"] for sample in samples] == [bytes([0, 0]), bytes([1, 2])]
    with pytest.raises(ProtopruneError, match=r"first sample is 000 in .*shard-0.tar.*; are these the shards"):
        list(keep_only(webdataset.WebDataset(url, shardshuffle=False), ["shard-7.tar/000.png"]))


@pytest.mark.parametrize(
    ("url", "names"),
    [
        ("https://user:pw@h.example/a%20b/0.tar?X-Sig=q/w#x", "a b/0.tar"),
        ("https://user:pw@h.example/a%20b/0.tar?X-Sig=q/w#x", "a%20b/0.tar"),
        ("pipe:curl -s -L https://h.example/d/0.tar -H 'Authorization:Bearer tok/en'", "d/0.tar"),
        ("pipe:aws s3 cp s3://bucket/d/0.tar -", "s3:/bucket/d/0.tar"),
        ("s3://bucket/d/0?.tar", "s3:/bucket/d/0?.tar"),
        ("hf://datasets/o/n/0.tar", "datasets/o/n/0.tar"),
    ],
)
def test_what_a_shard_may_be_called(url, names):
    found = loaders._shard_names(url)
    assert {names, names.rpartition("/")[2]} <= set(found)
    sample = {"__key__": "k", "__url__": url, "jpg": b""}
    assert list(keep_only([sample], [f"{names}/k.jpg"])) == [sample]
    with pytest.raises(ProtopruneError) as error:
        list(keep_only([sample], ["other.tar/k.jpg"]))
    assert "pw" not in str(error.value)
    assert "tok" not in str(error.value)
    assert "X-Sig" not in str(error.value)
    assert ".tar" in str(error.value).partition("first sample")[2]


def test_keys_as_tars_spell_them(tmp_path):
    """`tar -P`, `./` and doubled slashes: what the list has is the plain path."""
    for key in ("/data/a/1", "./data/a/1", "data//a/1", "data/b/../a/1"):
        sample = {"__key__": key, "__url__": "0.tar", "jpg": b""}
        for listed in ("0.tar/data/a/1.jpg", "data/a/1.jpg"):
            assert list(keep_only([sample], [listed])) == [sample]


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_from_tars(tmp_path, streaming):
    datasets = pytest.importorskip("datasets")
    for shard in range(2):
        files = [(f"{i}.jpg", encoded(picture(8, 8, 10 * shard + i), "JPEG")) for i in range(5)]
        both = [(name.split(".")[0] + ".json", json.dumps({"is": f"{shard}/{name}"}).encode()) for name, _ in files]
        write_tar(tmp_path / f"{shard}.tar", [one for pair in zip(files, both, strict=True) for one in pair])
    paths = [str(tmp_path / f"{shard}.tar") for shard in range(2)]
    whole = datasets.load_dataset(
        "webdataset", data_files=paths, split="train", cache_dir=str(tmp_path / "c"), streaming=streaming
    )
    kept = keep_only(whole, ["0.tar/1.jpg", "1.tar/0.jpg", "1.tar/4.jpg"])
    assert [one["json"]["is"] for one in kept] == ["0/1.jpg", "1/0.jpg", "1/4.jpg"]
    with pytest.raises(ProtopruneError, match="1 of 2 listed images is not in the data set"):
        list(keep_only(whole, ["0.tar/1.jpg", "2.tar/1.jpg"]))
    if streaming:
        from torch.utils.data import DataLoader

        loader = DataLoader(kept, batch_size=2, collate_fn=list)
        for _ in range(2):
            assert [one["json"]["is"] for batch in loader for one in batch] == ["0/1.jpg", "1/0.jpg", "1/4.jpg"]
        some = keep_only(whole, ["0.tar/1.jpg", "2.tar/1.jpg"], part=True)
        assert [one["json"]["is"] for one in some] == ["0/1.jpg"]
    else:
        assert len(keep_only(whole, ["0.tar/1.jpg", "2.tar/1.jpg"], part=True)) == 1
        part = keep_only(whole.select([9, 1]), ["0.tar/1.jpg"])
        assert [one["json"]["is"] for one in part] == ["0/1.jpg"]


def test_webdataset_by_the_list_of_a_feature_set(image_tree, tmp_path):
    webdataset = pytest.importorskip("webdataset")
    urls = shards(image_tree(), tmp_path)
    kept = ["shard-0.tar/cat/000.png", "shard-1.tar/cat/001.png"]
    dataset = webdataset.WebDataset(urls, shardshuffle=False)
    assert [one["__key__"] for one in keep_only(dataset, kept)] == ["cat/000", "cat/001"]
    with pytest.raises(ProtopruneError, match="1 of 1 listed images is not in the data set"):
        list(keep_only(webdataset.WebDataset(urls, shardshuffle=False), ["shard-1.tar/cat/000.png"]))


# --- rows of tables, uids --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id_column", [None, "name"])
def test_rows_of_parquet_files_for_hugging_face_and_pyarrow(tmp_path, id_column):
    pyarrow, datasets = pytest.importorskip("pyarrow"), pytest.importorskip("datasets")
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.dataset")
    files, number = [], 0
    for name, count in (("a/part-0", 5), ("a/part-1", 3), ("b/part-0", 4)):
        rows = range(number, number + count)
        table = pyarrow.table({"image": [f"{row}".encode() for row in rows], "name": [f"n{row}" for row in rows]})
        files.append(str(tmp_path / f"{name}.parquet"))
        os.makedirs(os.path.dirname(files[-1]), exist_ok=True)
        parquet.write_table(table, files[-1], row_group_size=2)
        number += count
    kept = {
        None: ["b/part-0.parquet/000003", "a/part-0.parquet/000000", "a/part-1.parquet/000002"],
        "name": ["b/part-0.parquet/n11", "a/part-0.parquet/n0", "a/part-1.parquet/n7"],
    }[id_column]
    rows = table_rows(kept, files, root=tmp_path, id_column=id_column)
    assert rows.tolist() == [0, 7, 11]
    assert table_rows(kept, files, id_column=id_column).tolist() == [0, 7, 11]  # their common folder
    absolute = [f"{tmp_path}/{one}" for one in kept]  # select --absolute
    assert table_rows(absolute, files, id_column=id_column).tolist() == [0, 7, 11]
    whole = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert whole.select(rows)["image"][:] == [b"0", b"7", b"11"]
    taken = arrow.dataset(files, format="parquet").take(rows)
    assert taken.column("image").to_pylist() == [b"0", b"7", b"11"]
    whole.save_to_disk(tmp_path / "saved")
    saved = sorted(str(path) for path in (tmp_path / "saved").glob("*.arrow"))
    listed = [f"{os.path.basename(saved[0])}/{row:06d}" for row in (3, 9)]
    rows = table_rows(listed, saved)
    assert datasets.load_from_disk(tmp_path / "saved").select(rows)["image"][:] == [b"3", b"9"]
    with pytest.raises(UsageError, match="no files: give the Parquet or Arrow files"):
        protoprune.table_rows(["a"], [])
    with pytest.raises(UsageError, match=r"part-0\.parquet is given twice"):
        table_rows(kept, [*files, files[0]], root=tmp_path, id_column=id_column)
    with pytest.raises(ProtopruneError, match=r"1 of 3 listed images is in none of the files \(first: b/part-0"):
        table_rows(kept, files[:2], root=tmp_path, id_column=id_column)
    assert table_rows(kept, files[:2], root=tmp_path, id_column=id_column, part=True).tolist() == [0, 7]
    with pytest.raises(ProtopruneError, match="1 of 1 listed images is in none of the files"):
        table_rows(kept[:1], files[:2], root=tmp_path, id_column=id_column, part=True)
    with pytest.raises(ProtopruneError, match="lists no image, so that"):
        table_rows([], files)
    with pytest.raises(ProtopruneError, match="has no column x, only image, name"):
        table_rows(kept, files, id_column="x")


def test_datacomp_takes_the_uids_sorted(feature_file, tmp_path):
    """What DataComp's resharder reads: (m,) "u8,u8" in lexicographic order, the halves of the hexadecimal uids."""
    rng = np.random.default_rng(0)
    uids = [rng.bytes(16).hex() for _ in range(40)]
    path = feature_file(tmp_path / "f.h5", rng.normal(size=(40, 3)), paths=[f"{uid[:2]}.tar/{uid}.jpg" for uid in uids])
    out = tmp_path / "subset.npy"
    command = ["select", path, "--keep", "0.5", "--k", "3", "--format", "datacomp", "-o", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr
    kept = protoprune.select(path, 0.5, k=3).kept_paths
    want = sorted((int(uid[:16], 16), int(uid[16:], 16)) for uid in (path[7:39] for path in kept))
    found = np.load(out)
    assert found.dtype == np.dtype("u8,u8")
    assert found.tolist() == want
    assert np.array_equal(found, np.sort(found))
    named = feature_file(tmp_path / "n.h5", rng.normal(size=(2, 3)), paths=["a.jpg", f"{uids[0]}.jpg"])
    command = ["select", named, "--keep", "1", "--k", "1", "--format", "datacomp", "-o", str(out)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert "'a.jpg' is not called by a uid of 32 hexadecimal digits" in result.stderr
    twice = feature_file(tmp_path / "t.h5", rng.normal(size=(2, 3)), paths=[f"{name}/{uids[0]}.jpg" for name in "ab"])
    with pytest.raises(UsageError, match=f"two images have the uid {uids[0]}"):
        format_list(protoprune.select(twice, 1.0, k=1).kept_paths, np.arange(2), np.zeros(2), "datacomp")
    assert np.load(out).tolist() == want  # the refused ones left the file


def test_hugging_face_rows_without_an_image_and_masks_before_the_images(image_tree):
    """One row of a table may lack its image, and the first column of images may hold masks."""
    datasets = pytest.importorskip("datasets")
    root = image_tree({"cat": 2, "dog": 3})
    paths = [str(path) for path in sorted(root.rglob("*.png"))]
    rows = {"mask": [paths[0]] * 6, "image": [None, *paths], "number": list(range(6))}
    data = datasets.Dataset.from_dict(rows)
    for column in ("mask", "image"):
        data = data.cast_column(column, datasets.Image())
    kept = ["cat/001.png", "dog/002.png"]
    assert keep_only(data, kept, root=root)["number"] == [2, 5]
    assert keep_only(data, kept)["number"] == [2, 5]
    assert weights_of(data, {"cat/001.png": 2.0}, root=root).tolist() == [0, 0, 2, 0, 0, 0]
    none = datasets.Dataset.from_dict({"image": [None, None]}).cast_column("image", datasets.Image())
    with pytest.raises(UsageError, match="does not know its files' paths"):
        keep_only(none, kept)


def test_a_table_is_no_list_of_paths(image_folder):
    """Gone through, it would be the names of its columns."""
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame({"path": KEPT})
    with pytest.raises(UsageError, match="kept of type DataFrame: expected a list of paths; give one"):
        keep_only(image_folder, table)
    assert sample_ids(keep_only(image_folder, table["path"])) == KEPT
    assert sample_ids(keep_only(image_folder, table.values)) == KEPT  # (3, 1)
    assert sample_ids(keep_only(image_folder, [(one,) for one in KEPT])) == KEPT  # a database's rows
    pyarrow = pytest.importorskip("pyarrow")
    assert sample_ids(keep_only(image_folder, pyarrow.chunked_array([KEPT[:1], KEPT[1:]]))) == KEPT
    assert sample_ids(keep_only(image_folder, np.array(KEPT))) == KEPT


def test_lists_whose_lines_are_in_quotes(image_folder, tmp_path):
    """Of `ls -Q`, and of tables that were written without a header and with all fields in quotes."""
    kept = tmp_path / "kept.txt"
    kept.write_text("".join(f'"{one}"\n' for one in KEPT))
    assert sample_ids(keep_only(image_folder, kept)) == KEPT
    odd = types.SimpleNamespace(samples=['"1.png"', '2"".png'], root=".")
    assert keep_only(odd, ['"1.png"']).samples == ['"1.png"']  # the image's own
    assert keep_only(odd, ['"2"""".png"']).samples == ['2"".png']


def test_samples_that_are_not_the_items_are_refused(image_folder):
    """One that repeats its samples would be trained on once each, and one that skips some on other images."""

    class Repeated(type(image_folder)):
        def __len__(self):
            return 2 * len(self.samples)

    repeated = Repeated(image_folder.root)
    for call in (lambda: keep_only(repeated, KEPT), lambda: weights_of(repeated, BY_PATH)):
        with pytest.raises(UsageError, match="Repeated: has 12 samples and 24 items"):
            call()


def test_data_sets_that_are_joined(image_tree, tmp_path):
    """Each image once, whichever part it is in, by paths below one root."""
    folder = pytest.importorskip("torchvision.datasets").ImageFolder
    from torch.utils.data import ConcatDataset, Subset

    one = folder(image_tree({"cat": 3, "dog": 2}, tmp_path / "all" / "one"))
    two = folder(image_tree({"cat": 2, "eel": 3}, tmp_path / "all" / "two"))
    kept = ["two/eel/001.png", "one/cat/002.png", "two/cat/000.png", "one/dog/001.png"]
    joined = ConcatDataset([Subset(one, [4, 3, 2]), two])  # dog/001, dog/000, cat/002, then all of two
    subset = keep_only(joined, kept, root=tmp_path / "all")
    assert subset.indices == [0, 2, 3, 6]
    assert [label for _, label in subset] == [1, 0, 0, 1]
    weights = {path: float(place) for place, path in enumerate(kept, 1)}
    assert weights_of(subset, weights, root=tmp_path / "all").tolist() == [4, 2, 3, 1]
    assert keep_only(ConcatDataset([one]), ["cat/001.png"]).indices == [1]
    with pytest.raises(UsageError, match=r"ConcatDataset has several roots .*; give root="):
        keep_only(joined, kept)
    with pytest.raises(ProtopruneError, match="1 of 5 listed images is not in the data set"):
        keep_only(joined, [*kept, "one/cat/000.png"], root=tmp_path / "all")
    with pytest.raises(UsageError, match="ConcatDataset: expected"):
        keep_only(ConcatDataset([one, [1, 2]]), kept)


class Detection:
    """What torchvision's CocoDetection has (looked at with 0.28 and pycocotools 2.0): numbers in place of samples."""

    def __init__(self, root, names):
        self.root, self.names = root, names

    def __len__(self):
        return len(self.names)

    def __getitem__(self, item):
        return self.names[item], []


def test_a_data_set_whose_items_somebody_else_names(image_folder, tmp_path, monkeypatch):
    """Below its root or relative to it, absolute or from where we are, an image once or several times."""
    names = ["dog/003.png", "cat/000.png", "cat/001.png", "dog/000.png", "cat/001.png"]
    dataset = Detection(image_folder.root, names)
    above = os.path.dirname(image_folder.root)
    monkeypatch.chdir(above)
    absolute = [os.path.join(image_folder.root, name) for name in names]
    for root, paths in (
        (None, names), (None, absolute), (None, [Path(name) for name in absolute]), (None, np.array(names)),
        (image_folder.root, [os.path.relpath(name) for name in absolute]), ("images", names), ("./images/", names),
    ):  # fmt: skip
        kept = keep_only(dataset, KEPT, root=root, paths=paths)
        assert [name for name, _ in kept] == ["dog/003.png", "cat/001.png", "dog/000.png", "cat/001.png"]
        assert weights_of(kept, BY_PATH, root=root, paths=paths).tolist() == [2.5, 1, 4, 1]
    assert keep_only(dataset, [f"images/{one}" for one in KEPT], root=above, paths=absolute).indices == [0, 2, 3, 4]
    assert keep_only(list(names), KEPT, paths=names).indices == [0, 2, 3, 4]  # no root: as they are
    with pytest.raises(ProtopruneError, match=r"1 of 4 listed images is not in the data set .*first: cat/9\.png"):
        keep_only(dataset, [*KEPT, "cat/9.png"], paths=names)
    with pytest.raises(UsageError, match="Detection: has 5 items, and paths= names 4; give the path of each item"):
        keep_only(dataset, KEPT, paths=names[1:])
    with pytest.raises(UsageError, match="generator: has no length, and paths= names 5"):
        keep_only((name for name in names), KEPT, paths=names)
    with pytest.raises(UsageError, match=r"paths 'cat/000\.png': expected a list"):
        keep_only(dataset, KEPT, paths="cat/000.png")
    for call in (lambda: keep_only(dataset, KEPT), lambda: weights_of(dataset, BY_PATH)):
        with pytest.raises(UsageError, match="of another, give paths=, the path of each of its items"):
            call()


def test_a_part_of_a_data_set_whose_items_somebody_else_names(image_folder):
    from torch.utils.data import Subset

    names = ["dog/003.png", "cat/000.png", "cat/001.png", "dog/000.png"]
    part = Subset(Detection(image_folder.root, names), [3, 1, 2])
    kept = keep_only(part, KEPT, paths=names)  # of the whole
    assert [name for name, _ in kept] == ["dog/000.png", "cat/001.png"]
    assert weights_of(kept, BY_PATH, paths=names).tolist() == [4, 1]


def test_a_table_of_paths_in_hugging_face(image_folder):
    datasets = pytest.importorskip("datasets")
    names = ["dog/003.png", "cat/000.png", "cat/001.png", "dog/000.png"]
    data = datasets.Dataset.from_dict({"file": names, "number": list(range(4))})
    assert keep_only(data, KEPT, paths=data["file"])["number"] == [0, 2, 3]
    assert weights_of(data, BY_PATH, paths=data["file"]).tolist() == [2.5, 0, 1, 4]
