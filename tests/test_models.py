"""Models: their inputs, their classifiers, the weights they start from."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from torch import nn
from training_helpers import cloned, pixels, vectors

from protoprune.errors import ProtopruneError, UsageError
from protoprune.training import loop, models
from protoprune.training.loop import Recipe

SAMPLE = pixels(12, size=16).inputs


def built(name: str, classes: int = 3, sample=SAMPLE, seed: int = 0, **how):
    with loop._seeded([seed]):
        return models.build(name, classes, sample, **how)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "timm:test_vit", "timm:test_resnet", "timm:resnetv2_50"])
def test_pixels_in_logits_out(name):
    assert built(name, 7, width=4).eval()(SAMPLE).shape == (12, 7)


def test_inputs_are_normalised_by_the_sample():
    model = built("cnn", width=4)
    normal = (SAMPLE.float() - model.mean) * model.scale
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    black = built("cnn", width=4, sample=torch.zeros_like(SAMPLE))
    assert torch.isfinite(black.eval()(torch.zeros_like(SAMPLE))).all()


def test_vectors_are_of_length_one_whatever_their_scale():
    data = vectors(500, dim=40).inputs * 1000 + 5
    mean, std = models.head_scale(data)
    assert ((data - mean) / std).norm(dim=1).mean().item() == pytest.approx(1, abs=0.02)
    assert torch.isfinite(built("head", sample=torch.ones(4, 3))(torch.ones(4, 3))).all()  # no deviation at all
    assert torch.isfinite(built("head", sample=torch.ones(1, 3))(torch.ones(1, 3))).all()


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:levit_128s", "timm:crossvit_9_240"])
def test_timm_models_that_know_no_image_size_or_insist_on_one_are_trained(name):
    assert built(name, sample=pixels(4, size=32).inputs).training


def test_timm_says_what_it_cannot_do():
    with pytest.raises(UsageError, match="timm:no_such: timm has no such model; see timm"):
        built("timm:no_such")
    with pytest.raises(UsageError, match="--image-size 40: patches of 16 pixels leave out the last 8; give 32 or 48"):
        built("timm:vit_tiny_patch16_224", sample=pixels(4, size=40).inputs)
    with pytest.raises(UsageError, match=r"takes no images of 8 x 8 pixels \(.+\); give another --image-size"):
        built("timm:test_vit", sample=pixels(4, size=8).inputs)


def test_timm_normalises_by_the_models_own_configuration():
    model = built("timm:test_vit")
    mean = torch.tensor(model.network.pretrained_cfg["mean"])
    torch.testing.assert_close(model.mean.flatten(), 255 * mean)


@pytest.mark.parametrize(("name", "sample"), [("head", SAMPLE), ("cnn", torch.ones(3, 4)), ("lenet", SAMPLE)])
def test_models_and_inputs_that_do_not_go_together(name, sample):
    with pytest.raises(UsageError, match=f"--model {name}"):
        built(name, sample=sample)


@pytest.mark.parametrize("name", ["cnn", "resnet18", "timm:test_vit", "timm:test_resnet"])
def test_our_own_weights_are_a_start_for_other_classes(name, tmp_path):
    old = built(name, 5, seed=1, width=4)
    torch.save(old.state_dict(), tmp_path / "w.pt")
    new = built(name, 3, seed=2, width=4, weights=str(tmp_path / "w.pt"))
    before, after = old.state_dict(), new.state_dict()
    last = models._classifier(new)
    for key, value in after.items():
        if not key.startswith(last) and key not in ("mean", "scale"):
            assert torch.equal(value, before[key]), key
    fresh = built(name, 3, seed=2, width=4).state_dict()
    assert any(key.startswith(last) for key in after)
    assert any(not torch.equal(fresh[key], after[key]) for key in after)
    assert after[last[0] + "weight"].shape[0] == 3


def test_timms_own_weight_file_is_a_start(tmp_path):
    import timm

    network = timm.create_model("test_vit", pretrained=False, img_size=16, num_classes=1000)
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    model = built("timm:test_vit", seed=3, weights=str(tmp_path / "timm.pth"))
    assert torch.equal(model.network.patch_embed.proj.weight, network.patch_embed.proj.weight)
    assert model.network.head.weight.shape[0] == 3


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "args": Namespace(lr=1)},
        lambda s: {k.removeprefix("network."): v for k, v in s.items()},
    ],
)
def test_other_peoples_checkpoints_of_a_resnet18_are_a_start(wrap, tmp_path):
    old = built("resnet18", 5, seed=1)
    torch.save(wrap(old.state_dict()), tmp_path / "w.pt")
    new = built("resnet18", 3, seed=2, weights=str(tmp_path / "w.pt"))
    assert torch.equal(new.network.layer4[1].conv2.weight, old.network.layer4[1].conv2.weight)


def test_a_head_with_a_hidden_layer_starts_from_weights_and_a_linear_one_cannot(tmp_path):
    data = vectors(20).inputs
    old = built("head", 3, data, hidden=6)
    torch.save(old.state_dict(), tmp_path / "w.pt")
    new = built("head", 4, data, seed=1, hidden=6, weights=str(tmp_path / "w.pt"))
    assert torch.equal(new.network[0].weight, old.network[0].weight)
    assert new.network[2].weight.shape == (4, 6)
    with pytest.raises(UsageError, match="a linear head is all classifier"):
        built("head", 3, data, weights=str(tmp_path / "w.pt"))


def test_wrong_weights_are_one_clear_line(tmp_path):
    torch.save(built("cnn", width=8).state_dict(), tmp_path / "wide.pt")
    (tmp_path / "text.pt").write_text("not weights")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {}, "epoch": 3}, tmp_path / "nested.pt")
    for name, model, words in [
        ("wide.pt", "cnn", "tensors fit the model .*network.2.0.weight"),
        ("text.pt", "cnn", r"not readable(;| \(Unsupported operand 110\);) give a .pth"),
        ("list.pt", "cnn", "a list instead of a state dict"),
        ("nested.pt", "cnn", "no tensors in it"),
        ("none.pt", "cnn", "no such file"),
        ("wide.pt", "timm:test_vit", "wide.pt"),
    ]:
        with pytest.raises(ProtopruneError, match=words) as caught:
            built(model, width=4, weights=str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_start_from_leaves_the_normalisation_to_the_new_data():
    data, other = pixels(12, seed=1), pixels(12, seed=5)
    recipe = Recipe.for_model("cnn", width=4)
    old = cloned(loop.make_model(data, recipe, 0))
    new = loop.make_model(other, recipe, 1, start=old)
    assert not torch.equal(new.mean, old["mean"])
    assert torch.equal(new.network[2][0].weight, old["network.2.0.weight"])


@pytest.mark.parametrize("size", [8, 9, 31, 64])
def test_the_small_network_takes_images_of_any_size_from_8(size):
    sample = pixels(6, size=size).inputs
    assert built("cnn", 7, sample, width=4).eval()(sample).shape == (6, 7)


def test_the_small_network_begins_with_whitened_patches_and_identities():
    rng = torch.Generator().manual_seed(0)
    smooth = nn.functional.avg_pool2d(torch.rand(64, 3, 24, 24, generator=rng), 3, 1)  # neighbours are alike
    model = built("cnn", sample=(255 * smooth).to(torch.uint8), width=32)
    first, group = model.network[0], model.network[2]
    assert not first.weight.requires_grad
    with torch.no_grad():
        normal = (255 * smooth - model.mean) * model.scale
        out = nn.functional.conv2d(normal, first.weight).transpose(0, 1).flatten(1)
        torch.testing.assert_close(out[:12] @ out[:12].T / out.shape[1], torch.eye(12), atol=0.05, rtol=0)
        torch.testing.assert_close(out[:12], -out[12:])
        inside = torch.rand(2, 24, 8, 8, generator=rng)
        torch.testing.assert_close(group[0](inside)[:, :24], inside)


def test_what_is_frozen_is_not_trained_and_biases_have_a_rate_of_their_own():
    model = built("cnn", width=4)
    groups = models.parameter_groups(model, 0.1, 64)
    trained = [id(p) for group in groups for p in group["params"]]
    frozen = [name for name, p in model.named_parameters() if id(p) not in trained]
    assert frozen[0] == "network.0.weight"
    assert len(frozen) == 7
    assert all(not dict(model.named_parameters())[name].requires_grad for name in frozen)
    assert [group["times"] for group in groups] == [1, 64]


def test_weight_decay_is_for_matrices():
    groups = models.parameter_groups(built("resnet18"), 0.1)
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert groups[0]["weight_decay"] == 0.1
    assert all(p.ndim == 1 for p in groups[1]["params"])
    assert groups[1]["weight_decay"] == 0
    assert sum(len(group["params"]) for group in groups) == len(list(built("resnet18").parameters()))
