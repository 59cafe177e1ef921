"""The pipeline: equal to a plain reference, incremental, resumable after kill -9, and honest about what failed."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from helpers import many_scans, on_a_full_disk
from PIL import Image

from protoprune import files
from protoprune.embedding import engine, pipeline
from protoprune.embedding.pipeline import embed, resolve_precision
from protoprune.encoders import Encoder, load_encoder
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features import featurefile as feature_file
from protoprune.features.featurefile import FeatureFile, partial_path
from protoprune.features.opening import open_features
from protoprune.images import decode
from protoprune.images.decode import Preprocess, Status
from protoprune.images.listing import list_folder, list_paths

SIDE = 32


class CountingModel:
    """Mean colour of the four quadrants, and a count of the images that were really computed."""

    def __init__(self):
        self.batches = []

    def __call__(self, x):
        self.batches.append(len(x))
        return torch.nn.functional.avg_pool2d(x.float(), SIDE // 2).flatten(1)


def fake_encoder(name="fake", digest="0" * 64) -> Encoder:
    return Encoder(name, CountingModel(), 12, Preprocess(SIDE, SIDE), digest)


def make_images(folder, count, start=0):
    rng = np.random.default_rng(start)
    for i in range(start, start + count):
        path = folder / f"c{i % 3}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (SIDE + i % 5, SIDE, 3), np.uint8)).save(path)
    return folder


def make_other(folder):
    """Other images under the same names."""
    for number, path in enumerate(sorted(folder.rglob("*.png"))):
        pixels = np.random.default_rng(900 + number).integers(0, 256, (SIDE + 7, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images", 21)


def run(images, out, encoder=None, **options):
    options = {"device": "cpu", "precision": "fp32", "batch_size": 4, "workers": 2, **options}
    return embed(list_folder(images), encoder or fake_encoder(), out, **options)


def stored(out):
    with FeatureFile(out) as file:
        return dict(zip(file.paths, file.features[:], strict=True))


def test_features_are_those_of_the_encoder(images, tmp_path):
    encoder = fake_encoder()
    report = run(images, tmp_path / "f.h5", encoder)
    assert (report.n, report.embedded, report.unchanged, report.failed) == (21, 21, 0, 0)
    for path, row in stored(tmp_path / "f.h5").items():
        pixels = encoder.preprocess.apply(np.array(Image.open(images / path)))
        expected = CountingModel()(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255)[0]
        np.testing.assert_allclose(row, expected, atol=1e-3)


@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet"])
def test_equals_timms_own_transform_and_forward_one_image_at_a_time(architecture, tmp_path):
    """Cosine >= 0.9999 in fp32 against timm's create_transform + eager forward."""
    import timm

    model = timm.create_model(architecture, num_classes=0).eval()
    weights = tmp_path / "w.pth"
    torch.save(model.state_dict(), weights)
    encoder = load_encoder(f"timm:{architecture}", weights=weights)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i, (w, h) in enumerate([(500, 375), (375, 500), (64, 64), (1200, 801), (33, 190)]):
        smooth = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
        smooth.save(folder / f"{i}.jpg", quality=90, subsampling=i % 3)
    run(folder, tmp_path / "f.h5", encoder, store="float32")
    for path, row in stored(tmp_path / "f.h5").items():
        with torch.inference_mode():
            expected = model(transform(Image.open(folder / path).convert("RGB"))[None])[0]
        cosine = torch.nn.functional.cosine_similarity(torch.from_numpy(row), expected, dim=0)
        assert cosine >= 0.9999, (path, float(cosine))


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 7, "workers": 5}, {"batch_size": 64}])
def test_batch_size_and_workers_do_not_change_the_features(options, images, tmp_path):
    run(images, tmp_path / "a.h5")
    run(images, tmp_path / "b.h5", **options)
    a, b = stored(tmp_path / "a.h5"), stored(tmp_path / "b.h5")
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[path], b[path]) for path in a)


@pytest.mark.parametrize(("batch_size", "cores"), [(1, 2), (3, 1), (32, 3)])
def test_features_of_a_real_model_have_the_same_bits_at_any_batch_size(
    batch_size, cores, images, tmp_path, monkeypatch
):
    encoder = load_encoder("mini")
    run(images, tmp_path / "a.h5", encoder, batch_size=8, store="float32")
    monkeypatch.setattr("protoprune.embedding.pipeline.cores", lambda: cores)
    run(images, tmp_path / "b.h5", encoder, batch_size=batch_size, workers=1, store="float32")
    a, b = stored(tmp_path / "a.h5"), stored(tmp_path / "b.h5")
    assert all(np.array_equal(a[path], b[path]) for path in a)


def test_second_run_computes_nothing(images, tmp_path):
    run(images, tmp_path / "f.h5")
    before = (tmp_path / "f.h5").stat()
    encoder = fake_encoder()
    report = run(images, tmp_path / "f.h5", encoder)
    after = (tmp_path / "f.h5").stat()
    assert encoder.model.batches == []
    assert (report.embedded, report.unchanged) == (0, 21)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_only_new_and_changed_images_are_computed_and_gone_ones_dropped(images, tmp_path):
    run(images, tmp_path / "f.h5")
    old = stored(tmp_path / "f.h5")
    (images / "c0" / "0000.png").unlink()
    Image.new("RGB", (SIDE, SIDE), "red").save(images / "c1" / "0001.png")
    make_images(images, 2, start=100)
    encoder = fake_encoder()
    report = run(images, tmp_path / "f.h5", encoder)
    new = stored(tmp_path / "f.h5")
    assert (report.embedded, report.unchanged, report.dropped) == (3, 19, 1)
    assert len(encoder.model.batches) == 1
    assert "c0/0000.png" not in new
    assert len(new) == 22
    assert all(np.array_equal(old[path], new[path]) for path in old if path in new and path != "c1/0001.png")
    assert not np.array_equal(old["c1/0001.png"], new["c1/0001.png"])


@pytest.mark.parametrize(
    ("change", "named"),
    [({"encoder": fake_encoder("other")}, "encoder"), ({"encoder": fake_encoder(digest="1" * 64)}, "weights"),
     ({"store": "float32"}, "store")],
)  # fmt: skip
def test_other_features_are_refused_and_overwritten_on_request(change, named, images, tmp_path):
    run(images, tmp_path / "f.h5")
    before = stored(tmp_path / "f.h5")
    with pytest.raises(ProtopruneError, match=rf"{named}.*-o.*--overwrite"):
        run(images, tmp_path / "f.h5", **change)
    assert stored(tmp_path / "f.h5").keys() == before.keys()
    assert not os.path.exists(partial_path(str(tmp_path / "f.h5")))
    assert run(images, tmp_path / "f.h5", overwrite=True, **change).embedded == 21


def test_overwrite_replaces_feature_files_only(images, tmp_path):
    """Another HDF5 file, such as a training record that took hours, and a text stay as they are."""
    import h5py

    with h5py.File(tmp_path / "record.h5", "w") as file:
        file.attrs["format"] = "protoprune-record"
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("record.h5", "notes.txt"):
        before = (tmp_path / name).read_bytes()
        with pytest.raises(ProtopruneError, match="not a feature file, and --overwrite replaces nothing else"):
            run(images, tmp_path / name, overwrite=True)
        assert (tmp_path / name).read_bytes() == before


def test_an_interrupted_overwrite_goes_on_and_needs_no_second_consent(images, tmp_path):
    run(images, tmp_path / "f.h5", fake_encoder("old"))

    def stop(done, failed):
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "f.h5", fake_encoder("new"), overwrite=True, on_progress=stop)
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.provenance["encoder"] == "old"  # still whole
    again = fake_encoder("new")
    report = run(images, tmp_path / "f.h5", again)
    assert report.unchanged >= 8
    assert len(again.model.batches) <= 4  # of the six batches of 4
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.provenance["encoder"] == "new"


def test_an_unfinished_overwrite_does_not_bar_the_old_file(images, tmp_path):
    run(images, tmp_path / "f.h5", fake_encoder("old"))

    def stop(done, failed):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "f.h5", fake_encoder("new"), overwrite=True, on_progress=stop)
    assert run(images, tmp_path / "f.h5", fake_encoder("old")).unchanged == 21
    make_images(images, 1, start=50)
    with pytest.raises(ProtopruneError, match=r"unfinished run with other features.*delete .*partial"):
        run(images, tmp_path / "f.h5", fake_encoder("old"))
    os.unlink(partial_path(str(tmp_path / "f.h5")))
    assert run(images, tmp_path / "f.h5", fake_encoder("old")).embedded == 1


def test_overwrite_computes_everything_again(images, tmp_path):
    run(images, tmp_path / "f.h5")
    encoder = fake_encoder()
    assert run(images, tmp_path / "f.h5", encoder, overwrite=True).embedded == 21
    assert sum(encoder.model.batches) >= 21


def test_a_moved_folder_is_noticed_and_nothing_computed_again(images, tmp_path):
    run(images, tmp_path / "f.h5")
    images.rename(tmp_path / "moved")
    encoder = fake_encoder()
    report = run(tmp_path / "moved", tmp_path / "f.h5", encoder)
    assert (report.embedded, report.unchanged, encoder.model.batches) == (0, 21, [])
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.provenance["root"] == str(tmp_path / "moved")


def test_what_still_cannot_be_read_leaves_the_file_alone(images, tmp_path):
    """Its clusterings are cached under its id: a rewrite for nothing would cost them."""
    (images / "c2" / "gone.png").symlink_to("nowhere.png")
    run(images, tmp_path / "f.h5")
    with FeatureFile(tmp_path / "f.h5") as file:
        before = file.provenance["uuid"]
    report = run(images, tmp_path / "f.h5")
    assert (report.embedded, report.failures) == (0, {"missing": 1})
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.provenance["uuid"] == before


def test_a_damaged_unfinished_run_says_what_to_do(images, tmp_path):
    (tmp_path / "f.h5.partial").write_bytes(b"junk")
    with pytest.raises(ProtopruneError, match=r"f\.h5\.partial: a damaged unfinished run \(not a .*\); delete it"):
        run(images, tmp_path / "f.h5")
    assert run(images, tmp_path / "f.h5", overwrite=True).embedded == 21


def test_damaged_rows_are_embedded_again(images, tmp_path):
    run(images, tmp_path / "f.h5")
    before, data = stored(tmp_path / "f.h5"), bytearray((tmp_path / "f.h5").read_bytes())
    with FeatureFile(tmp_path / "f.h5") as file:
        place = file._reader.file["features"].id.get_offset() + 3 * file.dim * file.features.itemsize
        name = file.paths[3]
    data[place] ^= 1
    (tmp_path / "f.h5").write_bytes(data)
    with open_features(tmp_path / "f.h5") as file, pytest.raises(ProtopruneError, match=rf"its features of {name} are"):
        file.features[:]
    report = run(images, tmp_path / "f.h5")
    assert (report.embedded, report.unchanged) == (1, 20)
    after = stored(tmp_path / "f.h5")
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[path], before[path]) for path in before)


def test_damage_elsewhere_needs_an_overwrite(images, tmp_path):
    run(images, tmp_path / "f.h5")
    data = bytearray((tmp_path / "f.h5").read_bytes())
    with FeatureFile(tmp_path / "f.h5") as file:
        place = file._reader.file["size"].id.get_offset()
    data[place] ^= 1
    (tmp_path / "f.h5").write_bytes(data)
    with pytest.raises(
        ProtopruneError, match=r"damaged \(its size is not .* `protoprune embed` again with --overwrite"
    ):
        run(images, tmp_path / "f.h5")
    assert run(images, tmp_path / "f.h5", overwrite=True).embedded == 21


def test_a_list_with_few_of_the_old_files_images_borrows_them(images, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_file, "_COPY_ROWS", 4)
    run(images, tmp_path / "f.h5")
    old = stored(tmp_path / "f.h5")
    for path in sorted(images.rglob("*.png"))[1:-1:2]:
        path.unlink()
    encoder = fake_encoder()
    report = run(images, tmp_path / "f.h5", encoder)
    new = stored(tmp_path / "f.h5")
    assert (report.embedded, report.dropped, len(new)) == (0, 10, 11)
    assert all(np.array_equal(new[path], old[path]) for path in new)


def test_every_failure_has_a_status_and_a_reason(images, tmp_path):
    (images / "c0" / "empty.jpg").touch()
    (images / "c0" / "text.png").write_text("not pixels")
    good = (images / "c1" / "0001.png").read_bytes()
    (images / "c1" / "cut.png").write_bytes(good[: len(good) // 2])
    (images / "c2" / "gone.png").symlink_to("nowhere.png")
    report = run(images, tmp_path / "f.h5")
    assert report.failures == {"empty": 1, "not an image": 1, "truncated": 1, "missing": 1}
    with FeatureFile(tmp_path / "f.h5") as file:
        failures = {path: (status, bool(reason)) for path, status, reason in file.failures()}
        assert failures == {
            "c0/empty.jpg": (Status.EMPTY, True),
            "c0/text.png": (Status.NOT_AN_IMAGE, True),
            "c1/cut.png": (Status.TRUNCATED, True),
            "c2/gone.png": (Status.MISSING, True),
        }
        assert not file.features[:][~file.usable].any()


def test_damaged_images_are_not_tried_again_but_missing_ones_are(images, tmp_path):
    (images / "c0" / "empty.jpg").touch()
    (images / "c2" / "gone.png").symlink_to("later.bin")
    run(images, tmp_path / "f.h5")
    Image.new("RGB", (SIDE, SIDE)).save(images / "c2" / "later.bin", "PNG")
    report = run(images, tmp_path / "f.h5")
    assert (report.embedded, report.failures) == (1, {"empty": 1})


def test_a_file_that_changes_after_the_listing_is_marked(images, tmp_path):
    listed = list_folder(images)
    Image.new("RGB", (SIDE, SIDE)).save(images / "c0" / "0000.png")
    (images / "c1" / "0001.png").unlink()
    report = embed(listed, fake_encoder(), tmp_path / "f.h5", device="cpu", precision="fp32")
    assert report.failures == {"changed": 1, "missing": 1}
    assert run(images, tmp_path / "f.h5").failures == {}


@pytest.mark.parametrize(
    ("value", "advice"),
    [(1e6, "overflow float16.*--store float32"), (1e-5, "underflow float16.*--store float32"),
     (np.nan, "--precision fp32")],
)  # fmt: skip
def test_overflow_and_nan_are_errors_not_values(value, advice, images, tmp_path):
    encoder = fake_encoder()
    encoder.model = lambda x: torch.full((len(x), 12), value)
    with pytest.raises(ProtopruneError, match=advice):
        run(images, tmp_path / "f.h5", encoder)
    assert not (tmp_path / "f.h5").exists()
    if np.isfinite(value):
        assert run(images, tmp_path / "f.h5", encoder, store="float32", overwrite=True).failed == 0


def test_features_that_are_zeros_are_features(images, tmp_path):
    encoder = fake_encoder()
    encoder.model = lambda x: torch.zeros(len(x), 12)
    assert run(images, tmp_path / "f.h5", encoder).failed == 0


def test_a_second_process_on_the_same_file_is_refused(images, tmp_path):
    holding, release = threading.Event(), threading.Event()

    def hold():
        with files.lock(str(tmp_path / "f.h5")):
            holding.set()
            release.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait(10)
    try:
        with pytest.raises(ProtopruneError, match="another protoprune is writing it"):
            run(images, tmp_path / "f.h5")
    finally:
        release.set()
        thread.join()
    assert run(images, tmp_path / "f.h5").embedded == 21
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["f.h5"]


def test_an_interrupted_run_goes_on_where_it_stopped(images, tmp_path):
    encoder = fake_encoder()

    def stop(done, failed):
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "f.h5", encoder, on_progress=stop)
    assert not (tmp_path / "f.h5").exists()
    again = fake_encoder()
    report = run(images, tmp_path / "f.h5", again)
    assert report.unchanged in (4, 8)  # the writer may have been one batch behind
    assert len(again.model.batches) < 6
    run(images, tmp_path / "whole.h5")
    resumed, whole = stored(tmp_path / "f.h5"), stored(tmp_path / "whole.h5")
    assert all(np.array_equal(resumed[path], whole[path]) for path in whole)


def test_a_cut_run_is_carried_over_when_the_images_changed_meanwhile(images, tmp_path):
    def stop(done, failed):
        if done >= 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "f.h5", on_progress=stop)
    (images / "c0" / "0000.png").unlink()
    make_images(images, 3, start=200)
    report = run(images, tmp_path / "f.h5")
    assert report.n == 23
    assert report.unchanged >= 7


def test_full_disk_is_one_clear_error_and_leaves_the_old_file(images, tmp_path):
    """The space is asked for before the first image is decoded."""
    run(images, tmp_path / "f.h5")
    before = stored(tmp_path / "f.h5")
    make_images(images, 3, start=300)
    assert "cannot write (File too large)" in on_a_full_disk(20_000, lambda: run(images, tmp_path / "f.h5"))
    assert stored(tmp_path / "f.h5").keys() == before.keys()
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["f.h5"]


def test_a_file_system_that_reserves_nothing_is_written_all_the_same(images, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert run(images, tmp_path / "f.h5").embedded == 21


def test_precision_auto_is_fp32_where_bf16_would_be_emulated(monkeypatch):
    device = torch.device("cpu")
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: False, raising=False)
    assert resolve_precision("auto", device, fake_encoder()) == "fp32"
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert resolve_precision("auto", device, fake_encoder()) == "bf16"
    assert resolve_precision("fp16", device, fake_encoder()) == "fp16"
    with pytest.raises(UsageError, match=r"fp8.*expected one of auto, fp32"):
        resolve_precision("fp8", device, fake_encoder())
    monkeypatch.setattr("protoprune.embedding.engine.native_bf16", lambda device: False)
    assert resolve_precision("auto", torch.device("cuda"), fake_encoder()) == "fp16"  # of before 2020


def test_more_than_the_device_can_hold_is_one_line_and_what_is_done_stays(images, tmp_path):
    class Full(CountingModel):
        def __call__(self, x):
            if len(self.batches) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore of it")
            return super().__call__(x)

    encoder = Encoder("fake", Full(), 12, Preprocess(SIDE, SIDE), "0" * 64)
    with pytest.raises(
        ProtopruneError, match=r"cpu ran out of memory \(CUDA .* 2 GiB\.\); what is done is kept: run it"
    ):
        run(images, tmp_path / "f.h5", encoder, batch_size=8)
    assert (tmp_path / "f.h5.partial").exists()


def test_half_precision_leaves_the_callers_encoder_alone(images, tmp_path):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIDE * SIDE, 12))
    encoder = Encoder("linear", model, 12, Preprocess(SIDE, SIDE), "0")
    before = model[1].weight.clone()
    run(images, tmp_path / "half.h5", encoder, precision="bf16")
    assert torch.equal(model[1].weight, before)
    assert model[1].weight.dtype == torch.float32
    run(images, tmp_path / "full.h5", encoder)
    half, full = stored(tmp_path / "half.h5"), stored(tmp_path / "full.h5")
    assert all(np.allclose(half[path], full[path], atol=0.05) for path in full)


def test_the_callers_number_of_torch_threads_stays(images, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        run(images, tmp_path / "f.h5")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_bad_device_is_a_usage_error(images, tmp_path):
    with pytest.raises(UsageError, match="--device abacus"):
        run(images, tmp_path / "f.h5", device="abacus")


def _embed_in_child(images, out, weights):
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    encoder = load_encoder("timm:test_vit", weights=weights, image_size=32)
    run(images, out, encoder, batch_size=4)


@pytest.mark.timeout(300)  # a minute where three other programs share two cores
@pytest.mark.parametrize("most", [8, pytest.param(25, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_ends_in_the_same_bytes(most, tmp_path):
    """kill -9 at random moments, over several files; each run does only what is left."""
    import timm

    weights = tmp_path / "w.pth"
    torch.save(timm.create_model("test_vit", num_classes=0, img_size=32).state_dict(), weights)
    images = make_images(tmp_path / "images", 120)
    (images / "c0" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n garbage")
    context = multiprocessing.get_context("fork")  # torch takes seconds to import; both compute in one thread

    def child(out):
        process = context.Process(target=_embed_in_child, args=(images, out, weights))
        process.start()
        return process

    clock = time.monotonic()
    whole = child(tmp_path / "whole.h5")
    whole.join(100)
    assert whole.exitcode == 0
    length = time.monotonic() - clock
    rng = random.Random(0)
    kills = halfway = 0
    for number in range(40):
        out = tmp_path / f"{number}.h5"
        while True:
            started = time.monotonic()
            process = child(out)
            process.join(rng.uniform(0.02, length))
            if process.exitcode is not None:
                assert process.exitcode == 0
                length = min(length, time.monotonic() - started)  # the machine may be less busy than it was
                break
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:  # it ended by itself just now
                continue
            process.join()
            kills += 1
            length *= 1.2  # or it may be busier: a run that is always killed while it starts would never end
            if os.path.exists(partial_path(str(out))):
                with FeatureFile(partial_path(str(out))) as partial:
                    halfway += partial.finished().any()
        with FeatureFile(out) as a, FeatureFile(tmp_path / "whole.h5") as b:
            assert a.paths == b.paths
            assert a.features[:].tobytes() == b.features[:].tobytes()
            assert np.array_equal(a.status, b.status)
            assert a.failures() == b.failures()
        assert not out.with_name(out.name + ".partial").exists()
        if kills >= most:
            break
    assert kills >= most
    assert halfway >= 1, "no kill fell between the first and the last batch: this tested nothing"


def test_resuming_computes_only_what_is_left(images, tmp_path):
    """A partial file with 12 of 21 rows committed: the encoder sees the other 9 and no more."""

    def stop(done, failed):
        if done >= 12:
            time.sleep(0.2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(images, tmp_path / "f.h5", on_progress=stop)
    with FeatureFile(partial_path(str(tmp_path / "f.h5"))) as partial:
        left = int((~partial.finished()).sum())
    encoder = fake_encoder()
    assert run(images, tmp_path / "f.h5", encoder).embedded == left
    assert len(encoder.model.batches) == -(-left // 4)  # one piece for each batch of 4


@pytest.mark.gpu
def test_cuda_equals_cpu(images, tmp_path, cuda):
    run(images, tmp_path / "cpu.h5")
    run(images, tmp_path / "gpu.h5", device=cuda)
    cpu, gpu = stored(tmp_path / "cpu.h5"), stored(tmp_path / "gpu.h5")
    assert all(np.allclose(cpu[path], gpu[path], atol=1e-3) for path in cpu)


class Small(CountingModel):
    """As on a GPU with room for six images."""

    def __call__(self, x):
        if len(x) > 6:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return super().__call__(x)


@pytest.mark.gpu
def test_a_batch_that_does_not_fit_on_the_gpu_is_halved_unless_it_was_asked_for(images, tmp_path, cuda):
    run(images, tmp_path / "cpu.h5")
    encoder = Encoder("fake", Small(), 12, Preprocess(SIDE, SIDE), "0" * 64)
    assert run(images, tmp_path / "gpu.h5", encoder, device=cuda, batch_size=None).embedded == 21
    assert max(encoder.model.batches) == 4  # 256, 128, … 8, 4
    cpu, gpu = stored(tmp_path / "cpu.h5"), stored(tmp_path / "gpu.h5")
    assert all(np.allclose(cpu[path], gpu[path], atol=1e-3) for path in cpu)
    with pytest.raises(ProtopruneError, match="a batch of 16 images does not fit on cuda; use --batch-size 8"):
        run(images, tmp_path / "new.h5", encoder, device=cuda, batch_size=16)

    def full(batch):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    for size in (None, 1):
        with pytest.raises(ProtopruneError, match="not even one image fits on cuda; see what else runs there"):
            run(images, tmp_path / "full.h5", Encoder("fake", full, 12, Preprocess(SIDE, SIDE), "0"), device=cuda,
                batch_size=size)  # fmt: skip


def test_a_hook_that_holds_nothing_is_copied_with_its_network(images, tmp_path):
    def hook(module, arguments, output):
        return output.flatten(1)[:, :12] * 2

    network = torch.nn.Identity()
    network.register_forward_hook(hook)
    run(images, tmp_path / "f.h5", Encoder("fake", network, 12, Preprocess(SIDE, SIDE), "0" * 64))
    plain = Encoder("fake", lambda x: x.flatten(1)[:, :12] * 2, 12, Preprocess(SIDE, SIDE), "0" * 64)
    run(images, tmp_path / "g.h5", plain)
    one, other = stored(tmp_path / "f.h5"), stored(tmp_path / "g.h5")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_features_of_another_precision_say_how_to_go_on(images, tmp_path):
    run(images, tmp_path / "f.h5")
    with pytest.raises(ProtopruneError) as error:
        run(images, tmp_path / "f.h5", precision="bf16")
    assert str(error.value) == (
        f"{tmp_path / 'f.h5'} holds other features (precision: fp32, not bf16); go on with --precision fp32, write to "
        "another file with -o, or replace it with --overwrite"
    )


# --- a finished file is never replaced by less


def bytes_of(tmp_path):
    return (tmp_path / "f.h5").read_bytes()


def test_a_disk_that_is_away_leaves_the_file(images, tmp_path):
    listed = [f"c{i % 3}/{i:04d}.png" for i in range(21)]
    options = {"device": "cpu", "precision": "fp32"}
    embed(list_paths(listed, images), fake_encoder(), tmp_path / "f.h5", **options)
    before = bytes_of(tmp_path)
    images.rename(tmp_path / "unmounted")
    images.mkdir()
    for overwrite in (False, True):  # nothing is never better than something
        with pytest.raises(ProtopruneError, match=r"none of the 21 images can be found .*stays as it is.*disk"):
            embed(list_paths(listed, images), fake_encoder(), tmp_path / "f.h5", overwrite=overwrite, **options)
    assert bytes_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["f.h5"]


def test_a_disk_that_goes_away_during_the_run_leaves_the_file(images, tmp_path):
    run(images, tmp_path / "f.h5")
    before = bytes_of(tmp_path)
    make_other(images)  # all have to be embedded again
    listed = list_folder(images)
    images.rename(tmp_path / "unmounted")
    with pytest.raises(ProtopruneError, match=r"none of the 21 images could be used \(missing 21\).*stays as it is"):
        embed(listed, fake_encoder(), tmp_path / "f.h5", device="cpu", precision="fp32")
    assert bytes_of(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["f.h5"]


def test_what_was_computed_before_the_disk_went_away_is_kept_for_the_next_run(images, tmp_path):
    run(images, tmp_path / "f.h5")
    before = bytes_of(tmp_path)
    make_other(images)
    listed = list_folder(images)
    away = sorted(images.rglob("*.png"))[5:]
    moved = [path.rename(tmp_path / path.name) for path in away]
    with pytest.raises(ProtopruneError, match=r"only 5 of the 21 images could be used \(missing 16\).*--overwrite"):
        embed(listed, fake_encoder(), tmp_path / "f.h5", device="cpu", precision="fp32")
    assert bytes_of(tmp_path) == before
    for path, place in zip(moved, away, strict=True):
        path.rename(place)
    report = run(images, tmp_path / "f.h5")
    assert (report.embedded, report.unchanged, report.failed) == (16, 5, 0)


def test_another_folder_is_refused_and_overwritten_on_request(images, tmp_path):
    run(images, tmp_path / "f.h5")
    before = bytes_of(tmp_path)
    other = make_images(tmp_path / "other", 30, start=500)
    with pytest.raises(
        ProtopruneError, match=r"is for images below .*/images, not .*/other: 21 of its 21 .*--overwrite"
    ):
        run(other, tmp_path / "f.h5")
    assert bytes_of(tmp_path) == before
    assert run(other, tmp_path / "f.h5", overwrite=True).embedded == 30


def test_the_same_names_in_another_folder_are_other_images(images, tmp_path):
    run(images, tmp_path / "f.h5")
    other = make_other(make_images(tmp_path / "other", 21))
    with pytest.raises(ProtopruneError, match="21 of its 21 features would be lost"):
        run(other, tmp_path / "f.h5")


def test_losing_most_images_of_the_same_folder_is_refused(images, tmp_path):
    run(images, tmp_path / "f.h5")
    before = bytes_of(tmp_path)
    for path in sorted(images.rglob("*.png"))[:11]:
        path.unlink()
    with pytest.raises(ProtopruneError, match=r"f\.h5: is for other images: 11 of its 21 features would be lost"):
        run(images, tmp_path / "f.h5")
    assert bytes_of(tmp_path) == before
    assert run(images, tmp_path / "f.h5", overwrite=True).n == 10


def test_a_file_without_features_may_be_replaced(images, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.png").write_text("no")
    assert run(tmp_path / "bad", tmp_path / "f.h5").failed == 1
    assert run(images, tmp_path / "f.h5").embedded == 21


def test_out_is_a_folder(images, tmp_path):
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"a folder; name a file"):
            run(images, images, overwrite=overwrite)


def test_a_folder_that_vanishes_while_its_file_is_written(images, tmp_path):
    (tmp_path / "out").mkdir()

    def vanish(done, failed):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)

    with pytest.raises(ProtopruneError, match="its folder vanished while it was being written"):
        run(images, tmp_path / "out" / "f.h5", on_progress=vanish)


def test_a_folder_that_cannot_be_written(images, tmp_path, monkeypatch):
    real = open

    def refuse(path, *arguments, **options):
        if str(path).endswith(".lock"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(ProtopruneError, match="Permission denied; choose an output in a folder that can be written"):
        run(images, tmp_path / "f.h5")


# --- bounds


def test_a_file_that_is_too_large_and_one_that_is_too_slow_are_two_failures(images, tmp_path, monkeypatch):
    with open(images / "c0" / "sparse.jpg", "wb") as file:
        file.truncate(100_000_000_000)
    (images / "c1" / "slow.jpg").write_bytes(many_scans(2000, 99))
    (images / "c1" / "scans.jpg").write_bytes(many_scans(100, 101))
    monkeypatch.setattr("protoprune.images.crew.IMAGE_SECONDS", 0.15)
    report = run(images, tmp_path / "f.h5")
    assert (report.n, report.failures) == (24, {"too large": 1, "too slow": 2})
    with open_features(tmp_path / "f.h5") as file:
        assert {path: reason for path, _, reason in file.failures()} == {
            "c0/sparse.jpg": "more than 1 GB, which is as much as is read of an image",
            "c1/scans.jpg": "a JPEG of more than 100 scans, which takes long to decode",
            "c1/slow.jpg": "not decoded within 0.15 seconds of CPU time",
        }
        assert file.usable.sum() == 21
    assert run(images, tmp_path / "f.h5").embedded == 0  # it would be as slow again


@pytest.mark.parametrize(
    ("waited", "used", "starved"), [(4, 1, True), (4, 7, False), (1, 1, False), (1, 7, False), (2, 0, False)]
)
def test_threads_that_stepped_back_are_relieved_where_others_have_the_cores(waited, used, starved, monkeypatch):
    """Of 5 seconds on 2 cores: waiting most of them and having few of the cores."""
    clock = {"monotonic": 0.0, "process_time": 0.0}
    for name in clock:
        monkeypatch.setattr(pipeline.time, name, lambda name=name: clock[name])
    monkeypatch.setattr(pipeline, "cores", lambda: 2)
    hunger = pipeline._Hunger()
    with hunger:
        clock["monotonic"] += waited
    assert not hunger.starved()  # too early to say
    clock["monotonic"], clock["process_time"] = 5.0, used
    assert hunger.starved() is starved
    clock["monotonic"], clock["process_time"] = 10.0, used + 9  # the next seconds are judged by themselves
    assert not hunger.starved()


@pytest.mark.skipif(sys.platform != "linux", reason="only there has each thread a priority of its own")
@pytest.mark.parametrize("nice", [0, 19])
def test_a_run_that_is_nice_stays_so(nice, images, tmp_path, monkeypatch):
    """`nice -n 19 protoprune embed`: nobody but an administrator may step forward again, and nobody means to."""

    def step(which, thread, to):
        asked.append(to)
        if to < nice:
            raise PermissionError(errno.EACCES, "Permission denied")

    asked = []
    monkeypatch.setattr(pipeline.os, "getpriority", lambda which, thread: nice)
    monkeypatch.setattr(pipeline.os, "setpriority", step)
    assert run(images, tmp_path / "f.h5").embedded == 21
    assert set(asked) == {max(nice, 10)}


def test_a_run_that_is_starved_ends_in_the_same_features(images, tmp_path, monkeypatch):
    run(images, tmp_path / "a.h5")
    relieved = []
    monkeypatch.setattr(pipeline._Hunger, "starved", lambda self: True)
    relieve = pipeline.Crew.relieve
    monkeypatch.setattr(pipeline.Crew, "relieve", lambda *given: relieved.append(1) or relieve(*given))
    run(images, tmp_path / "b.h5")
    assert relieved == [1]
    assert stored(tmp_path / "a.h5").keys() == stored(tmp_path / "b.h5").keys()
    for path, row in stored(tmp_path / "a.h5").items():
        assert np.array_equal(row, stored(tmp_path / "b.h5")[path])


def test_vectors_of_another_length_are_other_features(images, tmp_path):
    """Of an encoder of one's own whose digest was not changed: nothing was embedded, or it ended in a traceback."""
    run(images, tmp_path / "f.h5")
    wider = Encoder("fake", lambda x: x.flatten(1)[:, :24], 24, Preprocess(SIDE, SIDE), "0" * 64)
    make_images(images, 1, start=30)
    with pytest.raises(ProtopruneError, match=r"holds other features \(dimensions: 12, not 24\); .* --overwrite"):
        run(images, tmp_path / "f.h5", wider)
    assert run(images, tmp_path / "f.h5", wider, overwrite=True).embedded == 22


def test_a_file_that_gives_less_than_it_says_has_changed(images, tmp_path, monkeypatch):
    """As some network file systems do: it was decoded as far as it went, and kept as cut off."""
    monkeypatch.setattr(decode, "read_bounded", lambda file, size: file.read(size - 1))
    assert run(images, tmp_path / "f.h5").failures == {"changed": 21}


def test_the_default_device_of_a_program_is_not_where_images_are_decoded(images, tmp_path):
    """torch.set_default_device("cuda"), as notebooks have it: meta is one that is everywhere."""
    run(images, tmp_path / "a.h5")
    torch.set_default_device("meta")
    try:
        run(images, tmp_path / "b.h5")
    finally:
        torch.set_default_device(None)
    for path, row in stored(tmp_path / "a.h5").items():
        assert np.array_equal(row, stored(tmp_path / "b.h5")[path])


def test_a_link_to_the_features_stays_one(images, tmp_path):
    """The link was replaced by a file, and who read what it led to read the old features."""
    (tmp_path / "disk").mkdir()
    link, there = tmp_path / "f.h5", tmp_path / "disk" / "features.h5"
    link.symlink_to("disk/features.h5")  # of which nothing is there yet
    run(images, link)
    make_images(images, 1, start=30)
    with files.lock(str(there)), pytest.raises(files.BusyError):
        run(images, link)
    assert run(images, link).embedded == 1
    assert link.is_symlink()
    assert stored(there).keys() == stored(link).keys()
    assert (len(stored(there)), sorted(os.listdir(tmp_path / "disk"))) == (22, ["features.h5"])
    assert sorted(os.listdir(tmp_path)) == ["disk", "f.h5", "images"]


class Forgetful(torch.nn.Module):
    """As it comes from its constructor: dropout and batch norm at work."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inside = torch.nn.Sequential(
            torch.nn.AvgPool2d(SIDE // 2), torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(12)
        )

    def forward(self, x):
        return self.inside(x)


def test_a_module_in_training_mode_gives_the_features_of_its_evaluation(tmp_path):
    images = list_folder(make_images(tmp_path / "images", 9))
    model = Forgetful()
    found = []
    for number, mode in enumerate((True, True, False)):
        model.train(mode)
        encoder = Encoder("own", model, 12, Preprocess(SIDE, SIDE), "0")
        embed(images, encoder, tmp_path / f"{number}.h5", device="cpu", precision="fp32", batch_size=1 + 2 * number)
        assert model.training == mode  # the caller's own stays as it was
        with FeatureFile(tmp_path / f"{number}.h5") as file:
            found.append(file.features[:])
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[1], found[2])


class Watched(torch.nn.Module):
    """Keeps what a layer gives, as forward hooks do, and comes back to it after a while."""

    def __init__(self, keep=None):
        super().__init__()
        self.layer, self.drop = torch.nn.AvgPool2d(SIDE // 2), torch.nn.Dropout(0.5)
        self.layer.register_forward_hook(keep or self.keep)

    def keep(self, layer, given, result):
        self.seen = result

    def forward(self, x):
        return self.features(x)

    def features(self, x):
        self.layer(x)
        time.sleep(0.002)
        return self.drop(self.seen.flatten(1))


def _of_a_function():
    seen = {}
    watched = Watched(lambda layer, given, result: seen.update(x=result)).eval()

    def model(x):
        watched.layer(x)
        time.sleep(0.002)
        return seen["x"].flatten(1)

    return model


def _of_a_module():
    seen = {}
    watched = Watched(lambda layer, given, result: seen.update(x=result))

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inside = watched

        def forward(self, x):
            self.inside.layer(x)
            time.sleep(0.002)
            return seen["x"].flatten(1)

    return Wrapped()


def _in_place():
    room = torch.empty(8, 12)
    return lambda x: room.copy_(torch.nn.functional.avg_pool2d(x, SIDE // 2).flatten(1))


@pytest.mark.parametrize("make", [_of_a_function, _of_a_module, _in_place, Watched, lambda: Watched().features])
def test_an_encoder_may_keep_what_it_sees(make, images, tmp_path, monkeypatch):
    """On a CPU several threads compute at once: they got the vectors of each other's images. A method of a network is
    one of its copy, in evaluation mode."""
    monkeypatch.setattr(engine, "cores", lambda: 3)
    encoder = Encoder("own", make(), 12, Preprocess(SIDE, SIDE), "0")
    run(images, tmp_path / "a.h5", encoder, batch_size=24)
    run(images, tmp_path / "b.h5", batch_size=24)
    expected = stored(tmp_path / "b.h5")
    assert all(np.array_equal(vector, expected[path]) for path, vector in stored(tmp_path / "a.h5").items())


def test_a_compiled_network_is_compiled_once(images, tmp_path, monkeypatch):
    """And not for each thread: that took minutes."""

    class Compiled(torch.nn.Module):  # as torch.compile makes one
        def __init__(self):
            super().__init__()
            self._orig_mod = torch.nn.Sequential(torch.nn.AvgPool2d(SIDE // 2), torch.nn.Flatten())

        def __deepcopy__(self, memo):
            threads.append("copied")
            return self

        def forward(self, x):
            threads.append(threading.get_ident())
            return self._orig_mod(x)

    threads = []
    monkeypatch.setattr(engine, "cores", lambda: 3)
    run(images, tmp_path / "f.h5", Encoder("own", Compiled(), 12, Preprocess(SIDE, SIDE), "0"), batch_size=24)
    assert threads == ["copied", *[threading.get_ident()] * 3]


def test_a_model_of_which_no_copy_can_be_made_is_said(images, tmp_path):
    class Own(Watched):
        def __init__(self):
            super().__init__(lambda layer, given, result: setattr(self, "seen", result))

    class Locked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lock = threading.Lock()

    for model, said in ((Own(), "writes into this Own, .* hook in a method"), (Locked(), "cannot be copied .*lock")):
        with pytest.raises(UsageError, match=said):
            run(images, tmp_path / "f.h5", Encoder("own", model, 12, Preprocess(SIDE, SIDE), "0"))


def test_fp32_is_what_it_says_whatever_the_program_asked_for(images, tmp_path):
    """torch.set_float32_matmul_precision and autocast are a program's; features are compared with those of others."""
    given, asked = [], torch.get_float32_matmul_precision()

    def precision():
        new = hasattr(torch.backends.mkldnn, "matmul")  # of torch 2.9
        return torch.backends.mkldnn.matmul.fp32_precision if new else torch.get_float32_matmul_precision()

    def model(x):
        given.append((precision(), torch.is_autocast_enabled("cpu")))
        return torch.nn.functional.avg_pool2d(x, SIDE // 2).flatten(1)

    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            run(images, tmp_path / "f.h5", Encoder("own", model, 12, Preprocess(SIDE, SIDE), "0"))
        assert (torch.get_float32_matmul_precision(), precision()) in (("medium", "bf16"), ("medium", "medium"))
    finally:
        torch.set_float32_matmul_precision(asked)
    assert set(given) in ({("ieee", False)}, {("highest", False)})


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (
            {"model": lambda x: x.flatten(1)[:, :11]},
            r"torch.float32 of shape \(8, 11\) for a batch of 8, .* \(8, 12\)",
        ),
        ({"model": lambda x: x.flatten(1)[:1, :12]}, r"of shape \(1, 12\) for a batch of 8"),
        ({"model": lambda x: x.flatten(1)[:, :12].mean(0)}, r"of shape \(12,\) for a batch of 8"),
        ({"model": lambda x: x[:, :, :2, :2]}, r"of shape \(8, 3, 2, 2\)"),
        ({"model": lambda x: x.flatten(1)[:, :12] + 0j}, "gave torch.complex64"),
        ({"model": lambda x: (x.flatten(1)[:, :12],)}, r"gave a tuple, expected a tensor .* let a function take"),
        ({"model": None}, "its model is None, expected a function"),
        ({"dim": "12"}, "its dim is '12', expected a number of 1 or more"),
        ({"digest": None}, "its digest is None, expected text"),
        ({"preprocess": {"size": 8}}, "its preprocess is {'size': 8}, expected a Preprocess"),
    ],
)
def test_an_encoder_that_gives_no_vector_an_image_is_told_so(tmp_path, broken, said):
    usual = {"name": "own", "model": CountingModel(), "dim": 12, "preprocess": Preprocess(SIDE, SIDE), "digest": "0"}
    encoder = types.SimpleNamespace(**{**usual, "pool": "", "fp32_only": False, **broken})
    images = list_folder(make_images(tmp_path / "images", 8))
    with pytest.raises(UsageError, match=said):
        embed(images, encoder, tmp_path / "f.h5", device="cpu", batch_size=8, precision="fp32")
    assert not (tmp_path / "f.h5").exists()
