"""What makes a row of an earlier file an image's: name, size and times, and its content where these may lie."""

from __future__ import annotations

import os
import shutil
import warnings

import numpy as np
import pytest
import torch
from shard_helpers import write_tar
from typer.testing import CliRunner

from protoprune.cli import app
from protoprune.embedding.pipeline import embed
from protoprune.encoders import Encoder
from protoprune.errors import ProtopruneError
from protoprune.features.featurefile import FeatureFile, partial_path
from protoprune.features.opening import open_features
from protoprune.images.decode import Preprocess, Status
from protoprune.images.listing import list_folder, list_paths
from protoprune.shards.sharding import embed_shards
from protoprune.sources import find_shards

N = 8


def means(x):
    return torch.nn.functional.avg_pool2d(x.float(), 8).flatten(1)


def bitmap(colour: int) -> bytes:
    """16 x 16 pixels: all files have one size."""
    pixels = np.random.default_rng(colour).integers(0, 256, (16, 16, 3), np.uint8)
    return b"P6\n16 16\n255\n" + pixels.tobytes()


def tree(folder, colours):
    """Images that differ in nothing but their pixels."""
    folder.mkdir(parents=True)
    for number, colour in enumerate(colours):
        (folder / f"{number}.ppm").write_bytes(bitmap(colour))
        os.utime(folder / f"{number}.ppm", ns=(10**18, 10**18 + number))
    return folder


@pytest.fixture
def run(tmp_path):
    """run(images) -> (report, how many images were compared) of embedding a folder or a list into f.h5."""
    encoder = Encoder("fake", means, 12, Preprocess(16, 16), "0" * 64)

    def go(images, **options):
        compared = []
        images = list_folder(images) if isinstance(images, os.PathLike) else images
        settings = {"device": "cpu", "precision": "fp32", "workers": 2, "store": "float32", **options}
        report = embed(images, encoder, tmp_path / "f.h5", on_compare=compared.append, **settings)
        return report, sum(compared)

    return go


def stored(path) -> dict[str, bytes]:
    with FeatureFile(path) as file:
        return {name: row.tobytes() for name, row in zip(file.paths, file.features[:], strict=True)}


def identity(path) -> str:
    with FeatureFile(path) as file:
        return file.provenance["uuid"]


@pytest.fixture
def fresh(tmp_path, run):
    """What a first run makes of a folder, elsewhere."""

    def go(images) -> dict[str, bytes]:
        keep = tmp_path / "f.h5"
        if keep.exists():
            keep.rename(tmp_path / "kept")
        run(images)
        answer = stored(keep)
        keep.unlink()
        if (tmp_path / "kept").exists():
            (tmp_path / "kept").rename(keep)
        return answer

    return go


@pytest.mark.parametrize("as_list", [False, True])
def test_another_set_of_the_same_names_sizes_and_times_does_not_get_the_features_of_the_first(tmp_path, run, as_list):
    a, b = tree(tmp_path / "a", range(N)), tree(tmp_path / "b", range(50, 50 + N))
    run(a)
    before = (tmp_path / "f.h5").read_bytes()
    second = list_paths([f"{number}.ppm" for number in range(N)], b) if as_list else b
    with pytest.raises(
        ProtopruneError, match=r"is for images below .*/a, not .*/b: 8 of its 8 features would be lost; write "
    ):
        run(second)
    assert (tmp_path / "f.h5").read_bytes() == before
    report, _ = run(second, overwrite=True)
    assert report.embedded == N


def test_of_a_copy_what_has_other_pixels_is_embedded_again(tmp_path, run, fresh):
    a = tree(tmp_path / "a", range(N))
    b = tree(tmp_path / "b", [50, 51, *range(2, N)])
    run(a)
    report, compared = run(b)
    assert (report.embedded, report.unchanged, report.compared, report.other, compared) == (2, N - 2, N, 2, N)
    assert report.moved_from == str(a)
    assert stored(tmp_path / "f.h5") == fresh(b)
    report, compared = run(b)
    assert (report.embedded, report.moved_from, compared) == (0, "", 0)


def test_a_copy_of_the_same_pixels_keeps_everything_even_the_id(tmp_path, run):
    a = tree(tmp_path / "a", range(N))
    run(a)
    before = identity(tmp_path / "f.h5"), stored(tmp_path / "f.h5")
    shutil.copytree(a, tmp_path / "b")
    report, compared = run(tmp_path / "b")
    assert (report.embedded, report.unchanged, report.other, compared) == (0, N, 0, N)
    assert (identity(tmp_path / "f.h5"), stored(tmp_path / "f.h5")) == before
    assert run(tmp_path / "b")[1] == 0
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.damage() == []


def test_a_tree_restored_under_the_same_name_is_compared(tmp_path, run, fresh):
    a = tree(tmp_path / "a", range(N))
    run(a)
    before = identity(tmp_path / "f.h5")
    shutil.rmtree(a)
    tree(a, [*range(N - 1), 77])
    report, compared = run(a)
    assert (report.embedded, report.unchanged, report.moved_from, compared) == (1, N - 1, "", N)
    assert identity(tmp_path / "f.h5") != before
    assert stored(tmp_path / "f.h5") == fresh(a)


@pytest.mark.parametrize("elsewhere", [False, True])
def test_other_times_alone_cost_one_comparison(tmp_path, run, fresh, elsewhere):
    """`touch`, or `cp -r`, a checkout, an archive without times."""
    a = tree(tmp_path / "a", range(N))
    run(a)
    before = identity(tmp_path / "f.h5")
    b = tree(tmp_path / "b", range(N)) if elsewhere else a
    for number in range(N):
        os.utime(b / f"{number}.ppm", ns=(5, 5 + number))
    report, compared = run(b)
    assert (report.embedded, report.unchanged, report.other, compared) == (0, N, 0, N)
    assert (identity(tmp_path / "f.h5"), run(b)[1]) == (before, 0)
    (b / "3.ppm").write_bytes(bitmap(99))
    report, compared = run(b)
    assert (report.embedded, report.other, compared) == (1, 1, 1)
    assert stored(tmp_path / "f.h5") == fresh(b)


def test_other_times_are_another_image_where_nothing_can_be_compared(tmp_path, run):
    a = tree(tmp_path / "a", range(N))
    run(a)
    os.utime(a / "3.ppm", ns=(5, 5))
    report, compared = run(a, moved=True)
    assert (report.embedded, compared) == (1, 0)
    listed = list_folder(a)
    listed.mtime_ns[4] = 7  # not the file that is there: it cannot be read as the one that was listed
    report, compared = run(listed)
    assert (report.embedded, compared, dict(report.failures)) == (1, 1, {"changed": 1})


def test_moved_says_that_it_goes_by_times(tmp_path, run):
    run(tree(tmp_path / "a", range(N)))
    b = tree(tmp_path / "b", range(N))
    for number in range(N):
        os.utime(b / f"{number}.ppm", ns=(5, 5))
    with pytest.raises(ProtopruneError, match="8 of its 8 features would be lost; leave --moved out, and contents are"):
        run(b, moved=True)
    assert run(b)[0].unchanged == N


def test_rights_that_were_changed_cost_one_comparison(tmp_path, run):
    a = tree(tmp_path / "a", range(N))
    run(a)
    before = identity(tmp_path / "f.h5")
    (a / "3.ppm").chmod(0o640)
    report, compared = run(a)
    assert (report.embedded, compared, identity(tmp_path / "f.h5")) == (0, 1, before)
    assert run(a)[1] == 0


def test_moved_takes_names_sizes_and_times_for_enough(tmp_path, run):
    a, b = tree(tmp_path / "a", range(N)), tree(tmp_path / "b", [50, 51, *range(2, N)])
    run(a)
    before = stored(tmp_path / "f.h5")
    report, compared = run(b, moved=True)
    assert (report.embedded, report.unchanged, report.moved_from, compared) == (0, N, str(a), 0)
    assert stored(tmp_path / "f.h5") == before


def test_failures_have_a_content_too(tmp_path, run):
    a = tree(tmp_path / "a", range(N))
    (a / "x.ppm").write_bytes(b"P6\n16 16\n255\n" + bytes(50))
    run(a)
    a.rename(tmp_path / "b")
    report, compared = run(tmp_path / "b")
    assert (report.embedded, report.failures, compared) == (0, {Status.TRUNCATED.label: 1}, N + 1)


def test_classes_of_a_list_that_does_not_say_where_they_are_from(tmp_path, run):
    for name in ("x", "y"):
        tree(tmp_path / "a" / name, range(3))
    first = list_folder(tmp_path / "a")
    first.labels_from = ""
    run(first)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(tmp_path / "a")
        assert not told
        (tmp_path / "a" / "0.ppm").write_bytes(bitmap(9))
        run(tmp_path / "a")
    assert "had 2 classes (of a list of your own), and has none now" in str(told[-1].message)


def test_an_interrupted_run_is_not_continued_with_other_images(tmp_path, run, fresh):
    a, b = tree(tmp_path / "a", range(N)), tree(tmp_path / "b", [50, *range(1, N)])

    def stop(done, failed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(a, batch_size=2, on_progress=stop)
    assert os.path.exists(partial_path(str(tmp_path / "f.h5")))
    report, compared = run(b)
    assert 2 <= compared < N
    assert report.unchanged == compared - 1
    assert stored(tmp_path / "f.h5") == fresh(b)


def test_the_command_line_says_what_moved(tmp_path):
    a = tree(tmp_path / "a", range(N))
    command = ["--encoder", "mini", "--device", "cpu", "-o", str(tmp_path / "f.h5")]
    assert CliRunner().invoke(app, ["embed", str(a), *command]).exit_code == 0
    shutil.copytree(a, tmp_path / "b")
    (tmp_path / "b" / "0.ppm").write_bytes(bitmap(99))
    os.utime(tmp_path / "b" / "0.ppm", ns=(10**18, 10**18))
    said = CliRunner().invoke(app, ["embed", str(tmp_path / "b"), *command]).stderr
    assert "comparing 8 images with what was embedded" in said
    assert f"the images were below {a} when they were embedded" in said
    assert "of 8 images compared 7 are the same, 1 has other content and is embedded again" in said
    said = CliRunner().invoke(app, ["embed", str(a), *command, "--moved"]).stderr
    assert "compar" not in said
    assert "8 of 8 images are done already, 0 to go" in said


# --- permissions


def test_a_class_folder_without_permission_loses_no_features(tmp_path, run, monkeypatch):
    """Whatever share of the images it holds: they are not gone."""
    for name, colours in (("ant", range(6)), ("bee", range(10, 12))):
        tree(tmp_path / "a" / name, colours)
    run(tmp_path / "a")
    before = (tmp_path / "f.h5").read_bytes()
    scandir = os.scandir

    def refuse(folder):
        if os.path.basename(folder) == "bee":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ProtopruneError, match=r"folder bee: Permission denied: its 2 features would be lost; make it"):
        run(tmp_path / "a")
    assert (tmp_path / "f.h5").read_bytes() == before
    assert run(tmp_path / "a", overwrite=True)[0].n == 6


def test_images_that_may_not_be_looked_at_are_not_gone_either(tmp_path, run, monkeypatch):
    a = tree(tmp_path / "a", range(N))
    run(a)
    before = (tmp_path / "f.h5").read_bytes()
    stat = os.stat

    def refuse(path, *rest, **more):
        if str(path).endswith("/2.ppm"):
            raise PermissionError(13, "Permission denied")
        return stat(path, *rest, **more)

    monkeypatch.setattr(os, "stat", refuse)
    with pytest.raises(
        ProtopruneError, match=r"1 of its features would be lost, .* first: 2\.ppm\); make them readable"
    ):
        run(a)
    assert (tmp_path / "f.h5").read_bytes() == before


def test_an_image_that_may_not_be_read_any_more_keeps_its_features(tmp_path, run, monkeypatch):
    """Its rights were changed, and its size and time of modification were not."""
    a = tree(tmp_path / "a", range(N))
    run(a)
    before = stored(tmp_path / "f.h5")
    (a / "3.ppm").chmod(0)
    opened = os.open

    def refuse(path, *rest, **more):
        if str(path).endswith("/3.ppm"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    report, compared = run(a)
    assert (report.embedded, report.failures, compared) == (0, {}, 1)
    assert stored(tmp_path / "f.h5") == before


# --- shards


def shards(folder, colours) -> None:
    for number in range(2):
        part = colours[number * 4 : number * 4 + 4]
        path = write_tar(folder / f"{number}.tar", [(f"{i}.ppm", bitmap(colour)) for i, colour in enumerate(part)])
        os.utime(path, ns=(10**18, 10**18))


def embed_set(folder, out, **options):
    encoder = Encoder("fake", means, 12, Preprocess(16, 16), "0" * 64)
    return embed_shards(find_shards(folder), encoder, out, device="cpu", precision="fp32", **options)


def of_set(out) -> dict[str, bytes]:
    with open_features(out) as whole:
        return {name: row.tobytes() for name, row in zip(whole.paths, whole.features[:], strict=True)}


def test_a_shard_that_was_written_anew_is_compared_image_by_image(tmp_path):
    """Of a shard to which an image was added, or that was touched, all images were embedded again."""
    shards(tmp_path / "a", list(range(8)))
    embed_set(tmp_path / "a", tmp_path / "s")
    before = of_set(tmp_path / "s")
    colours = [4, 77, 6, 7, 8]  # one is another one, one is new
    write_tar(tmp_path / "a" / "1.tar", [(f"{i}.ppm", bitmap(colour)) for i, colour in enumerate(colours)])
    report = embed_set(tmp_path / "a", tmp_path / "s")
    assert (report.states, report.embedded, report.compared, report.other) == (
        {"embedded": 1, "unchanged": 1}, 2, 4, 1,
    )  # fmt: skip
    after = of_set(tmp_path / "s")
    assert {name for name in before if after[name] != before[name]} == {"1.tar/1.ppm"}
    write_tar(tmp_path / "a" / "1.tar", [("9.ppm", bitmap(9))])  # most are gone, which is no loss: the shard says so
    assert (embed_set(tmp_path / "a", tmp_path / "s").n, len(of_set(tmp_path / "s"))) == (5, 5)


def test_shards_below_another_root_are_compared(tmp_path):
    shards(tmp_path / "a", list(range(8)))
    embed_set(tmp_path / "a", tmp_path / "s")
    before = of_set(tmp_path / "s")
    shards(tmp_path / "same", list(range(8)))
    report = embed_set(tmp_path / "same", tmp_path / "s")
    assert (report.finished, report.embedded, report.n) == (True, 0, 8)
    assert of_set(tmp_path / "s") == before
    assert dict(embed_set(tmp_path / "same", tmp_path / "s").states) == {"unchanged": 2}
    for number in range(2):  # copied without its times, or touched
        os.utime(tmp_path / "same" / f"{number}.tar", ns=(5, 5))
    report = embed_set(tmp_path / "same", tmp_path / "s")
    assert (report.embedded, report.compared, report.other) == (0, 8, 0)
    shutil.copytree(tmp_path / "same", tmp_path / "copy")
    os.utime(tmp_path / "copy" / "0.tar", ns=(6, 6))
    os.utime(tmp_path / "copy" / "1.tar", ns=(6, 6))
    with pytest.raises(ProtopruneError, match="8 of its 8 features would be lost; leave --moved out, and contents are"):
        embed_set(tmp_path / "copy", tmp_path / "s", moved=True)
    assert embed_set(tmp_path / "copy", tmp_path / "s").embedded == 0
    assert embed_set(tmp_path / "same", tmp_path / "s").embedded == 0
    assert of_set(tmp_path / "s") == before
    shards(tmp_path / "other", list(range(50, 58)))
    with pytest.raises(
        ProtopruneError, match=r"is for shards below .*/same, not .*/other, and 0\.tar holds other images"
    ):
        embed_set(tmp_path / "other", tmp_path / "s")
    assert of_set(tmp_path / "s") == before
    shards(tmp_path / "half", [0, 1, 2, 3, 4, 5, 6, 99])
    report = embed_set(tmp_path / "half", tmp_path / "s")
    assert (report.finished, report.embedded) == (True, 1)
    after = of_set(tmp_path / "s")
    assert [name for name in before if before[name] != after[name]] == ["1.tar/3.ppm"]
    assert embed_set(tmp_path / "other", tmp_path / "s", moved=True).embedded == 0


def test_a_shard_restored_under_the_same_name_is_compared(tmp_path):
    shards(tmp_path / "a", list(range(8)))
    embed_set(tmp_path / "a", tmp_path / "s")
    shards(tmp_path / "a", [0, 1, 2, 3, 4, 5, 6, 99])
    assert embed_set(tmp_path / "a", tmp_path / "s").embedded == 1
    assert dict(embed_set(tmp_path / "a", tmp_path / "s").states) == {"unchanged": 2}
