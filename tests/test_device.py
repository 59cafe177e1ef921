"""Arithmetic that the hardware imitates is said, in every command that computes in it."""

import os

import pytest
import torch
from helpers import write_image
from torch._dynamo.exc import TorchDynamoException
from training_helpers import pixels

from protoprune import memory
from protoprune.device import cores, warn_if_emulated
from protoprune.embedding.pipeline import embed
from protoprune.encoders import Encoder
from protoprune.errors import ProtopruneError, ProtopruneWarning
from protoprune.evaluation import runs
from protoprune.images.decode import Preprocess
from protoprune.images.listing import list_folder
from protoprune.training import recording
from protoprune.training.loop import Recipe, fit

CPU = torch.device("cpu")


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="no Linux")
@pytest.mark.parametrize(
    ("own", "files", "count", "free"),
    [
        ("0::/", {"cpu.max": "150000 100000", "memory.max": "9000", "memory.current": "5000",
                  "memory.stat": "anon 1\nfile 3000\ninactive_file 2000"}, 2, 6000),
        ("0::/job/step", {"job/cpu.max": "100000 100000", "job/step/cpu.max": "max 100000", "job/memory.max": "9000",
                          "job/memory.current": "9500", "job/step/memory.max": "max"}, 1, 0),
        ("4:memory:/a\n3:cpuset:/\n2:cpu,cpuacct:/a", {
            "cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000", "cpu/a/cpu.cfs_quota_us": "-1",
            "cpu/a/cpu.cfs_period_us": "100000", "memory/memory.limit_in_bytes": "9000",
            "memory/memory.usage_in_bytes": "1000"}, 3, 8000),
        ("0::/", {}, 64, None), ("", {}, 64, None), ("0::/", {"cpu.max": "garbage", "memory.max": "max"}, 64, None),
    ],
)  # fmt: skip
def test_a_container_has_what_it_may_use(own, files, count, free, tmp_path, monkeypatch):
    """On a server of 64 cores a container of two had 64 decoding threads, and batches of 2,048 images in memory."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(memory, "_GROUPS", str(tmp_path))
    monkeypatch.setattr(memory, "_OWN", str(tmp_path / "own"))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    assert cores() == count
    assert memory.free_memory() == free if free is not None else memory.free_memory() > 9000
    monkeypatch.setattr(memory, "_OWN", str(tmp_path / "none"))
    assert (cores(), memory.free_memory() > 9000) == (64, True)


@pytest.fixture(params=[True, False], ids=["native", "emulated"])
def native(request, monkeypatch):
    for check in ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_amx_fp16_supported"):
        monkeypatch.setattr(torch.cpu, check, lambda: request.param, raising=False)
    return request.param


def said(caught) -> list[str]:
    return [str(one.message) for one in caught if one.category is ProtopruneWarning]


def test_a_precision_is_warned_of_where_it_is_imitated(native, recwarn):
    for precision in ("fp32", "bf16", "fp16"):
        warn_if_emulated(precision, CPU)
    found = said(recwarn)
    assert [text.split(":")[0] for text in found] == ([] if native else ["--precision bf16", "--precision fp16"])
    assert native or "this cpu has no bf16 arithmetic and imitates it, many times slower than fp32" in found[0]
    assert not native or not found


def test_embedding_says_it_once_and_only_when_it_embeds(native, tmp_path, recwarn):
    for seed in range(5):
        write_image(tmp_path / "images" / f"{seed}.png", seed)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 4))
    encoder = Encoder("linear", model, 4, Preprocess(8, 8), "0")
    for expected in (1, 0):  # the second time nothing has changed
        options = {"device": "cpu", "precision": "bf16", "batch_size": 2, "workers": 1}
        embed(list_folder(tmp_path / "images"), encoder, tmp_path / "f.h5", **options)
        assert len(said(recwarn)) == (0 if native else expected)
        recwarn.clear()


@pytest.mark.parametrize("when", ["when it is asked", "at the first batch"])
def test_what_torch_cannot_compile_is_one_line(when, tmp_path, monkeypatch):
    def compile(model):
        if when == "when it is asked":
            raise RuntimeError("Dynamo is not supported on Python 9")

        def fails(*_):
            raise TorchDynamoException("InvalidCxxCompiler: No working C++ compiler found\n\nSet TORCH_LOGS for more")

        return fails

    monkeypatch.setattr(torch, "compile", compile)
    write_image(tmp_path / "images" / "a.png")
    encoder = Encoder(
        "linear", torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)), 4, Preprocess(8, 8), "0"
    )
    recipe = Recipe.for_model("cnn", epochs=1, width=4, compile=True)
    for call in (
        lambda: embed(list_folder(tmp_path / "images"), encoder, tmp_path / "f.h5", device="cpu", compile=True),
        lambda: fit(pixels(12), None, recipe, device="cpu"),
    ):
        with pytest.raises(ProtopruneError, match=r"^--compile: .*(Python 9|compiler found)\); leave --compile out$"):
            call()


def test_recording_says_it_once_and_only_when_it_records(native, tmp_path, recwarn):
    data, recipe = pixels(12), Recipe.for_model("cnn", epochs=1, width=4, precision="bf16")
    for expected in (1, 0):
        plan = recording.plan(data, None, recipe, models=2)
        recording.record(data, None, recipe, tmp_path / "r.h5", plan, device="cpu")
        assert len(said(recwarn)) == (0 if native else expected)
        recwarn.clear()


def test_training_says_it_once_and_only_when_it_trains(native, tmp_path, recwarn):
    data = pixels(12)
    recipe = Recipe.for_model("cnn", epochs=1, width=4, precision="bf16")
    planned = [runs.Run("all", seed, None) for seed in (0, 1)]
    for expected in (1, 0):  # the second time everything is kept
        runs.run_all(planned, data, data, recipe, folder=tmp_path, device="cpu")
        assert len(said(recwarn)) == (0 if native else expected)
        recwarn.clear()
