"""Labelled examples: what is read, what is left out and said, and which pixels a cache stands for."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from helpers import on_a_full_disk
from training_helpers import write_folder

from protoprune import files
from protoprune.errors import ProtopruneError, UsageError
from protoprune.images.decode import Preprocess, Status, load
from protoprune.images.listing import list_folder
from protoprune.training import examples
from protoprune.training.examples import load_examples

COUNTS = {"cat": 3, "dog": 4, "eel": 2}


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "images", COUNTS, size=20)


def expected_pixels(folder, paths, size=8) -> np.ndarray:
    rows = []
    for path in paths:
        stat = os.stat(folder / path)
        rows.append(load(os.fspath(folder / path), stat.st_size, stat.st_mtime_ns, Preprocess(size, size)))
    return np.stack(rows).transpose(0, 3, 1, 2)


@pytest.mark.parametrize("cached", [False, True])
def test_a_folder_becomes_pixels_labels_and_sorted_paths(folder, tmp_path, cached):
    seen = []
    data = load_examples(folder, 8, cache=tmp_path / "p.npy" if cached else None, on_progress=lambda *s: seen.append(s))
    assert data.paths == sorted(data.paths)
    assert len(data) == 9
    assert not data.vectors
    assert data.classes == ["cat", "dog", "eel"]
    assert data.labels.tolist() == [0] * 3 + [1] * 4 + [2] * 2
    assert data.labels.dtype == np.int64
    assert data.inputs.dtype == torch.uint8
    assert data.root == str(folder)
    np.testing.assert_array_equal(data.inputs.numpy(), expected_pixels(folder, data.paths))
    assert seen[-1] == (9, 9)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


def test_photographs_are_cropped_as_for_evaluation(folder, monkeypatch):
    seen = []
    monkeypatch.setattr(examples, "load", lambda path, size, mtime, p: seen.append(p) or np.zeros((p.size,) * 2 + (3,)))
    load_examples(folder, 224)
    assert (seen[0].size, seen[0].resize, seen[0].interpolation) == (224, 256, "bicubic")


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("broken", [[0], [8], [0, 1, 4, 8], [3, 4, 5]])
def test_unreadable_images_are_left_out_and_reported(folder, tmp_path, cached, broken, monkeypatch):
    monkeypatch.setattr(examples, "_BLOCK", 2)  # several blocks to move together
    paths = load_examples(folder, 8).paths
    for row in broken:
        (folder / paths[row]).write_bytes(b"" if row else b"\x89PNG\r\n\x1a\n and no more")
    kept = [path for row, path in enumerate(paths) if row not in broken]
    for _ in range(1 + cached):  # a second time from the cache
        data = load_examples(folder, 8, cache=tmp_path / "p.npy" if cached else None)
        assert data.paths == kept
        assert len(data.inputs) == len(data.labels) == len(kept)
        np.testing.assert_array_equal(data.inputs.numpy(), expected_pixels(folder, kept))
        assert [path for path, _ in data.unreadable] == [paths[row] for row in broken]
        assert all(reason.split(":")[0] in {status.label for status in Status} for _, reason in data.unreadable)
    assert data.labels.tolist() == [data.classes.index(path.split("/")[0]) for path in kept]


def test_nothing_readable_is_an_error(folder):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ProtopruneError, match="none of its 9 labelled images can be read"):
        load_examples(folder, 8)


def test_without_classes_the_stray_image_is_named(folder, tmp_path):
    os.rename(folder / "cat" / "000.png", folder / "stray.png")
    with pytest.raises(ProtopruneError, match=r"no two classes were found; .*\(not so: stray.png\)"):
        load_examples(folder, 8)
    with pytest.raises(ProtopruneError, match="no two classes were found"):
        load_examples(write_folder(tmp_path / "one", {"cat": 2}), 8)
    with pytest.raises(UsageError, match="no such image folder or feature file"):
        load_examples(tmp_path / "none", 8)
    with pytest.raises(UsageError, match="--image-size 7: expected at least 8"):
        load_examples(folder, 7)


def test_a_test_set_gets_the_numbers_of_the_training_set(folder, tmp_path):
    test = write_folder(tmp_path / "test", {"dog": 1, "eel": 2})
    data = load_examples(test, 8, classes=["cat", "dog", "eel"])
    assert data.labels.tolist() == [1, 2, 2]
    assert data.classes == ["cat", "dog", "eel"]
    write_folder(test, {"fox": 1})
    with pytest.raises(ProtopruneError, match=r"1 of its classes is not in the training set \(first: fox\)"):
        load_examples(test, 8, classes=["cat", "dog", "eel"])


def test_features_become_vectors(feature_file, tmp_path, monkeypatch):
    monkeypatch.setattr(examples, "_READ_ROWS", 2)
    paths = [f"c{i % 2}/{i}.png" for i in range(7)]
    features = np.arange(21, dtype=np.float32).reshape(7, 3)
    file = feature_file(tmp_path / "f.h5", features, paths=paths, failed={3: Status.CORRUPT}, store="float16")
    data = load_examples(file)
    good = sorted(path for i, path in enumerate(paths) if i != 3)
    assert data.paths == good
    assert data.vectors
    assert data.inputs.dtype == torch.float32
    np.testing.assert_array_equal(data.inputs.numpy(), [features[paths.index(path)] for path in good])
    assert data.labels.tolist() == [int(path[1]) for path in good]
    assert data.unreadable == [("c1/3.png", "made up corrupt")]
    assert load_examples(file, classes=["c1", "c9", "c0"]).labels.tolist() == [2 * (path[1] == "0") for path in good]
    unlabelled = feature_file(tmp_path / "u.h5", features, paths=[path[3:] for path in paths])
    with pytest.raises(ProtopruneError, match="no two classes were found"):
        load_examples(unlabelled)


def test_listing_decodes_nothing(folder, monkeypatch):
    monkeypatch.setattr(examples, "load", None)
    data = load_examples(folder, 8, decode=False)
    assert len(data) == 9
    assert data.inputs.numel() == 0
    assert not data.vectors


def test_the_fingerprint_is_of_everything_that_training_sees(folder):
    first = load_examples(folder, 8)
    prints = {first.fingerprint()}
    assert load_examples(folder, 8).fingerprint() in prints
    for change in ("paths", "labels", "classes", "inputs"):
        data = load_examples(folder, 8)
        if change == "inputs":
            data.inputs[-1, 2, 7, 7] ^= 1
        elif change == "labels":
            data.labels[-1] = 0
        else:
            getattr(data, change)[-1] += "x"
        prints.add(data.fingerprint())
    assert len(prints) == 5


def test_decoding_leaves_torchs_threads_alone(folder):
    torch.set_num_threads(2)
    load_examples(folder, 8)
    assert torch.get_num_threads() == 2


# --- the pixel cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """Paths that were decoded, in a list."""
    seen = []
    monkeypatch.setattr(examples, "load", lambda path, *how: seen.append(os.path.basename(path)) or load(path, *how))
    return seen


def test_a_cache_is_used_for_the_same_images_only(folder, tmp_path, decoded):
    cache = tmp_path / "p.npy"
    first = load_examples(folder, 8, cache=cache)
    assert len(decoded) == 9
    again = load_examples(folder, 8, cache=cache)
    assert len(decoded) == 9
    assert again.fingerprint() == first.fingerprint()
    again.inputs[0, 0, 0, 0] ^= 1  # copy on write: a caller's accident stays its own
    assert load_examples(folder, 8, cache=cache).fingerprint() == first.fingerprint()
    os.utime(folder / "cat" / "000.png", ns=(1, 1))
    load_examples(folder, 8, cache=cache)
    assert len(decoded) == 18
    load_examples(folder, 9, cache=cache)
    assert len(decoded) == 27
    os.rename(folder / "cat" / "000.png", folder / "cat" / "009.png")
    load_examples(folder, 9, cache=cache)
    assert len(decoded) == 36
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "p.npy", "p.npy.failed.npz"]


@pytest.mark.parametrize("moment", range(4))
def test_an_interrupted_cache_is_never_used(folder, tmp_path, monkeypatch, moment):
    """A cache of the same shape exists; the run that replaces it ends at one of its steps."""
    cache = tmp_path / "p.npy"
    load_examples(folder, 8, cache=cache)
    write_folder(folder, COUNTS, size=20, seed=1000)  # other images under the same names
    calls = [0]

    def ends(function):
        def step(*arguments, **options):
            calls[0] += 1
            if calls[0] > moment:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return step

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patched.setattr(os, "unlink", ends(os.unlink))
        patched.setattr(os, "replace", ends(os.replace))
        patched.setattr(np, "savez", ends(np.savez))
        load_examples(folder, 8, cache=cache)
    data = load_examples(folder, 8, cache=cache)
    np.testing.assert_array_equal(data.inputs.numpy(), expected_pixels(folder, data.paths))


@pytest.mark.parametrize("name", ["p.npy", "p.npy.failed.npz"])
@pytest.mark.parametrize("left", [0, 1, 100])
def test_a_damaged_cache_is_never_used(folder, tmp_path, name, left):
    load_examples(folder, 8, cache=tmp_path / "p.npy")
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:left])
    data = load_examples(folder, 8, cache=tmp_path / "p.npy")
    np.testing.assert_array_equal(data.inputs.numpy(), expected_pixels(folder, data.paths))


def test_one_writes_a_cache_at_a_time(folder, tmp_path):
    with files.lock(str(tmp_path / "p.npy")), pytest.raises(ProtopruneError, match="another protoprune is writing it"):
        load_examples(folder, 8, cache=tmp_path / "p.npy")


def test_a_cache_that_does_not_fit_is_one_clear_line(folder, tmp_path):
    """Without asking first, a full disk ends the process by a signal."""
    said = on_a_full_disk(1000, lambda: load_examples(folder, 16, cache=tmp_path / "p.npy"))
    assert "p.npy: cannot write (File too large); make room" in said
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    with pytest.raises(ProtopruneError, match="No such file or directory"):
        load_examples(folder, 8, cache=tmp_path / "none" / "p.npy")


def test_pixels_that_do_not_fit_into_memory_are_refused(monkeypatch):
    monkeypatch.setattr(examples, "_MEMORY_SHARE", 1e-9)
    with pytest.raises(
        ProtopruneError, match=r"1,000 images of 224 x 224 pixels take 150.5 MB and .* give --pixels FILE"
    ):
        examples._check_memory((1000, 3, 224, 224))


def test_another_folder_with_the_same_names_sizes_and_times_has_pixels_of_its_own(tmp_path):
    """The cache of pixels is that of one folder."""
    for name, colours in (("a", (0, 9)), ("b", (255, 99))):
        for number, colour in enumerate(colours):
            path = tmp_path / name / f"c{number}" / "1.ppm"
            path.parent.mkdir(parents=True)
            path.write_bytes(b"P6\n8 8\n255\n" + bytes([colour]) * 192)
            os.utime(path, ns=(10**18, 10**18))
    values = []
    for name in "abab":
        pixels, failed = examples._pixels(list_folder(tmp_path / name), np.arange(2), 8, tmp_path / "cache", None)
        assert failed == {}
        values.append(pixels[:, 0, 0, 0].tolist())
    assert values == [[0, 9], [255, 99]] * 2


def test_decoding_that_is_interrupted_leaves_nothing_behind(folder, tmp_path):
    """It is begun anew, and what it reserves may be hundreds of gigabytes."""

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_examples(folder, 8, cache=tmp_path / "p.npy", on_progress=interrupt)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("p.npy")] in ([], ["p.npy.lock"])


def test_a_cache_with_another_pixel_is_decoded_again(folder, tmp_path):
    """A flipped bit of a pixel cannot be seen, and changes what is learned: the side file has a digest."""
    cache = tmp_path / "p.npy"
    load_examples(folder, 8, cache=cache)
    whole = cache.read_bytes()
    for place in (len(whole) // 2, len(whole) - 1):
        cache.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.warns(UserWarning, match=r"p.npy: damaged; the images are decoded again"):
            data = load_examples(folder, 8, cache=cache)
        np.testing.assert_array_equal(data.inputs.numpy(), expected_pixels(folder, data.paths))
        assert cache.read_bytes() == whole
