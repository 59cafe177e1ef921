"""Arithmetic that the hardware imitates is said, in every command that computes in it."""

import pytest
import torch
from helpers import write_image
from torch._dynamo.exc import TorchDynamoException
from training_helpers import pixels

from protoprune.device import warn_if_emulated
from protoprune.embedding.pipeline import embed
from protoprune.encoders import Encoder
from protoprune.errors import ProtopruneError, ProtopruneWarning
from protoprune.evaluation import runs
from protoprune.images.decode import Preprocess
from protoprune.images.listing import list_folder
from protoprune.training import recording
from protoprune.training.loop import Recipe, fit

CPU = torch.device("cpu")


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
