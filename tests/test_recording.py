"""Training runs -> training record: what is written, and that a run which is killed ends in the same record."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from helpers import on_a_full_disk
from scipy.special import softmax
from torch import nn
from training_helpers import pixels, vectors

from protoprune import files, records
from protoprune.errors import ProtopruneError, UsageError
from protoprune.training import heads, loop, models, recording
from protoprune.training.loop import Recipe

HEAD = Recipe.for_model("head", epochs=3, batch_size=8, lr=0.5)
CNN = Recipe.for_model("cnn", epochs=3, batch_size=8, width=4, image_size=8, precision="fp32")


def run(train, test, recipe, out, *, overwrite=False, on_start=None, on_progress=None, seed=0, **layout):
    written = {name: layout.get(name, False) for name in ("gradients", "probabilities")}
    plan = recording.plan(train, test, recipe, seed=seed, **layout)
    recording.record(
        train, test, recipe, out, plan, **written, seed=seed, device="cpu", overwrite=overwrite,
        on_start=on_start, on_progress=on_progress,
    )  # fmt: skip
    return plan


def stored(path) -> dict[str, bytes]:
    """Every dataset, and the attributes that are not of the moment."""
    with h5py.File(path) as file:
        data = {name: file[name][:].tobytes() for name in file}
        moment = {"uuid", "created", "overwrite"}
        return data | {f"@{name}": str(value).encode() for name, value in file.attrs.items() if name not in moment}


# --- what is written --------------------------------------------------------------------------------------------------


def literal_gradient_norms(model, data) -> list[float]:
    model.eval()
    norms = []
    for one, label in zip(data.inputs, data.labels, strict=True):
        loss = nn.functional.cross_entropy(model(one[None]), torch.tensor([label]))
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        norms.append(torch.cat([g.flatten() for g in gradients]).norm().item())
    return norms


@pytest.mark.parametrize(
    ("name", "size"), [("cnn", 8), ("resnet18", 8), ("timm:test_vit", 16), ("timm:test_resnet", 32)]
)
def test_gradient_norms_of_networks_are_those_of_autograd(name, size):
    data = pixels(5, size=size)
    recipe = Recipe.for_model(name, epochs=1, batch_size=5, width=4, lr=0.01)
    model = loop.fit(data, None, recipe, device="cpu").model
    before = model.training
    found = recording.gradient_norms(model, data.inputs, torch.from_numpy(data.labels))
    assert model.training == before
    np.testing.assert_allclose(found, literal_gradient_norms(model, data), rtol=2e-3)
    if name == "timm:test_vit":
        assert any(isinstance(module, nn.LayerNorm) for module in model.modules())


def test_gradients_are_held_a_few_at_a_time(monkeypatch):
    data = pixels(7)
    model = loop.make_model(data, CNN, 0)
    labels = torch.from_numpy(data.labels)
    whole = recording.gradient_norms(model, data.inputs, labels)
    monkeypatch.setattr(recording, "_GRADIENT_BYTES", 1)
    torch.testing.assert_close(recording.gradient_norms(model, data.inputs, labels), whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("every", [1, 2])
def test_a_record_of_a_network_is_what_the_loop_goes_through(tmp_path, every, monkeypatch):
    monkeypatch.setattr(recording, "_LOGITS_ROWS", 7)
    train, test = pixels(20), pixels(6, seed=9)
    plan = run(
        train, test, CNN, tmp_path / "r.h5", models=2, subset_fraction=0.6, every=every, initial=True, gradients=True
    )
    numbers = [0, 1, 2, 3] if every == 1 else [0, 2, 3]
    assert plan.epoch_numbers == numbers
    with records.Record(tmp_path / "r.h5") as record:
        assert (record.models, record.epochs, record.n) == (2, len(numbers), 20)
        assert record.epoch_numbers.tolist() == numbers
        assert record.paths == train.paths
        assert record.classes == train.classes
        assert record.labels.tolist() == train.labels.tolist()
        assert record.test_paths == test.paths
        assert record.subset.sum(1).tolist() == [12, 12]
        assert not (record.subset[0] == record.subset[1]).all()
        for m in range(2):
            seed = recording.model_seed(0, m)
            moments = {0: loop.make_model(train, CNN, seed)}
            previous, at = None, 0
            runs = loop.epochs(train, CNN, rows=np.flatnonzero(record.subset[m]), seed=seed, device="cpu")
            for epoch in range(4):
                model = moments.pop(0) if epoch == 0 else next(runs).model
                if epoch not in numbers:
                    continue
                logits = loop.logits(model, train.inputs, precision="fp32").double().numpy()
                p = softmax(logits, axis=1)
                p_true = p[np.arange(20), train.labels]
                close = {"rtol": 5e-3, "atol": 2e-3}
                np.testing.assert_allclose(record.at("true_probability", at)[m], p_true, **close)
                np.testing.assert_allclose(record.at("loss", at)[m], -np.log(p_true), **close)
                np.testing.assert_allclose(
                    record.at("error_norm", at)[m], np.linalg.norm(p - np.eye(3)[train.labels], axis=1), **close
                )
                assert (record.at("prediction", at)[m] == logits.argmax(1)).all()
                change = np.zeros(20) if previous is None else (p * np.log(p / previous)).sum(1)
                np.testing.assert_allclose(record.at("change", at)[m], change, **close)
                np.testing.assert_allclose(
                    record.at("gradient_norm", at)[m], literal_gradient_norms(model, train), rtol=1e-2, atol=1e-6
                )
                seen = softmax(loop.logits(model, test.inputs, precision="fp32").numpy(), axis=1)
                assert (record.test_at("test_prediction", at)[m] == seen.argmax(1)).all()
                np.testing.assert_allclose(
                    record.test_at("test_true_probability", at)[m], seen[np.arange(6), test.labels], **close
                )
                previous, at = p, at + 1
            assert record.last("change")[m].max() > 0
        assert (record.test_prediction == record.test_at("test_prediction", -1)).all()


@pytest.mark.parametrize("hidden", [0, 5])
def test_a_record_of_heads_is_what_the_ensemble_goes_through(tmp_path, hidden, monkeypatch):
    train, test = vectors(30), vectors(7, seed=0)
    recipe = Recipe.for_model("head", epochs=2, batch_size=8, lr=0.5, hidden=hidden)
    run(train, test, recipe, tmp_path / "r.h5", models=3, subset_fraction=0.7, initial=True, gradients=True)
    with records.Record(tmp_path / "r.h5") as record:
        seeds = [recording.model_seed(0, m) for m in range(3)]
        previous = ensemble = heads.Ensemble(train, recipe, seeds, torch.device("cpu"))
        previous = previous.copy()
        runs = heads.epochs(train, recipe, record.subset, seeds, 0, torch.device("cpu"))
        for at in range(3):
            if at:
                ensemble = next(runs)[1]
            expected = heads.measure(ensemble, train, gradients=True, previous=previous if at else None)
            for name, value in expected.items():
                np.testing.assert_allclose(record.at(name, at), value, rtol=2e-3, atol=1e-4, err_msg=name)
                assert record.read(name, 1, slice(3, 9))[at].tolist() == record.at(name, at)[1, 3:9].tolist()
            seen = heads.measure(ensemble, test, gradients=False)
            assert (record.test_at("test_prediction", at) == seen["prediction"]).all()
            previous = ensemble.copy()
    whole = stored(tmp_path / "r.h5")
    monkeypatch.setattr(heads, "_STEP_BYTES", 1)  # one model after another
    run(train, test, recipe, tmp_path / "one.h5", models=3, subset_fraction=0.7, initial=True, gradients=True)
    with records.Record(tmp_path / "r.h5") as a, records.Record(tmp_path / "one.h5") as b:
        for name in a.statistics:
            np.testing.assert_allclose(a.last(name), b.last(name), rtol=5e-3, atol=1e-3)
    assert whole.keys() == stored(tmp_path / "one.h5").keys()


def test_mislabelled_examples_look_hard(tmp_path):
    """Planted: 10 of 100 labels of a separable set are wrong; every statistic that means difficulty must say so."""
    data = vectors(100, dim=8, apart=4, seed=3)
    wrong = np.arange(0, 100, 10)
    data.labels[wrong] = (data.labels[wrong] + 1) % 3
    run(data, None, HEAD, tmp_path / "r.h5", models=5, subset_fraction=0.7, gradients=True)
    with records.Record(tmp_path / "r.h5") as record:
        clean = np.setdiff1d(np.arange(100), wrong)
        for name, sign in [
            ("error_norm", 1),
            ("loss", 1),
            ("gradient_norm", 1),
            ("true_probability", -1),
            ("margin", -1),
        ]:
            score = sign * record.last(name).mean(0)
            assert score[wrong].min() > np.quantile(score[clean], 0.9), name
        correct = (record.last("prediction") == record.labels).mean(0)
        assert correct[wrong].mean() < 0.3
        assert correct[clean].mean() > 0.95


@pytest.mark.parametrize("kind", ["head", "cnn"])
def test_class_probabilities_are_those_of_the_last_epoch(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(recording, "_LOGITS_ROWS", 7)
    monkeypatch.setattr(heads, "_rows_at_once", lambda ensemble: 7)
    train, recipe = (vectors(20), HEAD) if kind == "head" else (pixels(20), CNN)
    out = tmp_path / "r.h5"
    run(train, None, recipe, out, models=2, subset_fraction=0.6, probabilities=True)
    with records.Record(out) as record:
        assert "probability" in record.statistics
        for model in range(2):
            seen = record.probabilities(model)
            assert (seen.shape, seen.dtype) == ((20, 3), np.float32)
            np.testing.assert_allclose(seen.sum(axis=1), 1, atol=2e-3)
            own = seen[np.arange(20), train.labels]
            np.testing.assert_allclose(own, record.last("true_probability")[model], atol=2e-3)
            assert seen.argmax(axis=1).tolist() == record.last("prediction")[model].tolist()
            np.testing.assert_array_equal(record.probabilities(model, slice(3, 9)), seen[3:9])
    with h5py.File(out) as file:
        place = file["probability"].id.get_offset()
    whole = out.read_bytes()
    out.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with records.Record(out) as record, pytest.raises(ProtopruneError, match="its probability is not what was written"):
        record.probabilities(1)
    with pytest.raises(ProtopruneError, match=r"its probability is not what was written.*--overwrite"):
        run(train, None, recipe, out, models=2, subset_fraction=0.6)  # it is there, and not whole
    with h5py.File(out) as file:
        place = file["error_norm"].id.get_offset()
    out.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with records.Record(out) as record, pytest.raises(ProtopruneError, match="its error_norm of model 0 at epoch 1 is"):
        record.at("error_norm", 0)
    out.write_bytes(whole)
    before = stored(out)
    run(train, None, recipe, out, models=2, subset_fraction=0.6)  # it holds all that this asks for
    assert stored(out) == before
    run(train, None, recipe, tmp_path / "plain.h5", models=2, subset_fraction=0.6)
    with records.Record(tmp_path / "plain.h5") as record, pytest.raises(ProtopruneError, match="with --probabilities"):
        record.probabilities(0)
    with pytest.raises(ProtopruneError, match="with and without --probabilities"):
        run(train, None, recipe, tmp_path / "plain.h5", models=2, subset_fraction=0.6, probabilities=True)


@pytest.mark.parametrize("more", [{}, {"gradients": True}, {"probabilities": True}])
@pytest.mark.parametrize("test", [None, vectors(50)])
@pytest.mark.parametrize("n", [3, 1000])
def test_the_announced_size_is_that_of_the_file(tmp_path, more, test, n):
    recipe = Recipe.for_model("head", epochs=4, batch_size=100)
    plan = run(vectors(n), test, recipe, tmp_path / "r.h5", models=3, **more)
    real = os.path.getsize(tmp_path / "r.h5")
    assert plan.bytes - records._OVERHEAD <= real <= plan.bytes


def test_imagenet_fits_into_a_plan():
    """1.28 million examples and 90 epochs of one model: 14 bytes an example and epoch."""
    assert records.size(1, 90, 1_281_167, 50_000) == pytest.approx(1.65e9, rel=0.02)


@pytest.mark.parametrize(
    ("every", "initial", "numbers"), [(1, False, [1, 2, 3, 4, 5]), (2, True, [0, 2, 4, 5]), (9, False, [5])]
)
def test_the_last_epoch_is_always_recorded(every, initial, numbers):
    recipe = Recipe.for_model("head", epochs=5)
    assert recording.plan(vectors(), None, recipe, every=every, initial=initial).epoch_numbers == numbers


@pytest.mark.parametrize(("fraction", "size"), [(1.0, 60), (0.7, 42), (0.501, 30), (0.001, 1)])
def test_subsets_have_exactly_their_size_and_are_of_the_seed(fraction, size):
    plans = [
        recording.plan(vectors(), None, HEAD, models=4, subset_fraction=fraction, seed=s).subset for s in (0, 0, 1)
    ]
    assert plans[0].sum(1).tolist() == [size] * 4
    assert (plans[0] == plans[1]).all()
    more = recording.plan(vectors(), None, HEAD, models=6, subset_fraction=fraction).subset
    assert (more[:4] == plans[0]).all()
    if fraction < 1:
        assert not (plans[0] == plans[2]).all()
        assert len({row.tobytes() for row in plans[0]}) > 1


def test_plans_out_of_range_are_refused():
    for layout, words in [
        ({"models": 0}, "--models 0"), ({"every": 0}, "--every 0"), ({"subset_fraction": 0.0}, "--subset 0:"),
        ({"subset_fraction": 1.5}, "--subset 1.5"), ({"subset_fraction": float("nan")}, "--subset nan"),
    ]:  # fmt: skip
        with pytest.raises(UsageError, match=words):
            recording.plan(vectors(), None, HEAD, **layout)


# --- going on ---------------------------------------------------------------------------------------------------------

KINDS = {
    "head": (vectors(30), vectors(6), HEAD, {"models": 3, "subset_fraction": 0.7}),
    "cnn": (pixels(20), pixels(5), CNN, {"models": 2, "subset_fraction": 0.7, "every": 2, "initial": True}),
}


def killed(kind: str, out: Path, prepare, after: float | None = None, **how) -> bool:
    """Record in a process of its own, which `prepare` makes kill itself, or which is killed `after` seconds."""
    train, test, recipe, layout = KINDS[kind]
    pid = os.fork()
    if pid == 0:
        try:
            prepare()
            run(train, test, recipe, out, **layout, **how)
        finally:
            os._exit(0)
    if after is not None:
        time.sleep(after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def dying(step: int):
    """A `prepare` that ends the process just before the step-th of the calls that change files, or right after it."""

    def prepare() -> None:
        calls = [0]

        def counted(function):
            def call(*arguments, **options):
                calls[0] += 1
                if calls[0] == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        os.replace, os.unlink, torch.save = map(counted, (os.replace, os.unlink, torch.save))
        for name in ("write", "commit", "finish"):
            setattr(records.PartialRecord, name, counted(getattr(records.PartialRecord, name)))

    return prepare


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        ("head", (1, 2, 4, 5, 8)),
        ("cnn", (2, 6, 9, 17, 26)),
        pytest.param("head", range(1, 10), marks=pytest.mark.slow),
        pytest.param("cnn", range(1, 27), marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else str(len(value)),
)
def test_a_killed_run_ends_in_the_same_record(kind, steps, tmp_path):
    """Killed before steps that change a file, then run again; and at random moments, several times."""
    train, test, recipe, layout = KINDS[kind]
    run(train, test, recipe, tmp_path / "whole.h5", **layout)
    expected = stored(tmp_path / "whole.h5")
    out, kills = tmp_path / "r.h5", 0
    for step in steps:
        if not killed(kind, out, dying(step)):
            break
        kills += 1
        if step % 2 == 0:  # and once more
            killed(kind, out, dying(2))
        run(train, test, recipe, out, **layout)
        assert stored(out) == expected, step
        assert not list(tmp_path.glob("*.partial*"))
        out.unlink()
    assert kills >= 4
    out.unlink(missing_ok=True)
    moments = random.Random(0)
    for _ in range(3):
        killed(kind, out, lambda: None, after=moments.uniform(0, 0.15))
    run(train, test, recipe, out, **layout)
    assert stored(out) == expected
    assert not Path(f"{out}.state").exists()


def test_a_run_that_goes_on_does_the_rest_only(tmp_path, monkeypatch):
    train, test, recipe, layout = KINDS["cnn"]

    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        if done == 5:  # the second epoch of the second model
            raise Stop

    with pytest.raises(Stop):
        run(train, test, recipe, tmp_path / "r.h5", on_progress=stop, **layout)
    with pytest.raises(
        ProtopruneError, match=r"not finished, 5 of 6 epochs are recorded; run the same `protoprune record`"
    ):
        records.Record(tmp_path / "r.h5")
    started, done = [], []
    run(
        train, test, recipe, tmp_path / "r.h5", on_start=lambda *s: started.append(s), on_progress=done.append, **layout
    )
    assert started == [(6, 5)]
    assert done == [1]
    before = os.stat(tmp_path / "r.h5").st_mtime_ns
    monkeypatch.setattr(loop, "epochs", None)
    run(train, test, recipe, tmp_path / "r.h5", on_start=lambda *s: started.append(s), **layout)
    assert started[1:] == [(6, 6)]
    assert os.stat(tmp_path / "r.h5").st_mtime_ns == before


def test_checkpoints_that_cannot_be_read_or_are_gone_cost_only_time(tmp_path):
    train, test, recipe, layout = KINDS["cnn"]
    run(train, test, recipe, tmp_path / "whole.h5", **layout)
    for how in ("damaged", "gone"):
        assert killed("cnn", tmp_path / "r.h5", dying(9))
        (state,) = (tmp_path / "r.h5.state").glob("*.pt")
        if how == "gone":
            shutil.rmtree(tmp_path / "r.h5.state")
        else:
            state.write_bytes(state.read_bytes()[:500])
        run(train, test, recipe, tmp_path / "r.h5", **layout)
        assert stored(tmp_path / "r.h5") == stored(tmp_path / "whole.h5")
        (tmp_path / "r.h5").unlink()


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_checkpoint_after_damaged_rows_is_never_used(tmp_path, epoch):
    """A network goes on from its checkpoint only where all that it recorded before is there."""
    train, test, recipe, layout = KINDS["cnn"]
    run(train, test, recipe, tmp_path / "whole.h5", **layout)

    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        if done == 2:  # epochs 0 and 2 are recorded, 3 is not
            raise Stop

    for how in ("damaged", "uncommitted"):
        with pytest.raises(Stop):
            run(train, test, recipe, tmp_path / "r.h5", on_progress=stop, **layout)
        assert list((tmp_path / "r.h5.state").glob("*.pt"))
        with h5py.File(tmp_path / "r.h5.partial", "r+") as file:
            assert file["committed"][0] == 2
            file["loss"][0, epoch, 3] += 1
            if how == "uncommitted":  # killed right after the damage was found
                file["committed"][0] = 0
        if how == "damaged":
            with pytest.warns(UserWarning, match="r.h5: what was recorded of 1 model is damaged and trained"):
                run(train, test, recipe, tmp_path / "r.h5", **layout)
        else:
            run(train, test, recipe, tmp_path / "r.h5", **layout)
        assert stored(tmp_path / "r.h5") == stored(tmp_path / "whole.h5")
        (tmp_path / "r.h5").unlink()


@pytest.mark.parametrize("overwrite", [False, True])
def test_checkpoints_of_another_run_are_never_used(tmp_path, overwrite):
    train, test, _, layout = KINDS["cnn"]
    other = Recipe.for_model("cnn", epochs=3, batch_size=8, width=4, image_size=8, lr=0.05, precision="fp32")
    run(train, test, other, tmp_path / "whole.h5", **layout)
    assert killed("cnn", tmp_path / "r.h5", dying(9))
    assert list((tmp_path / "r.h5.state").glob("*.pt"))
    if not overwrite:
        os.unlink(tmp_path / "r.h5.partial")
    run(train, test, other, tmp_path / "r.h5", overwrite=overwrite, **layout)
    assert stored(tmp_path / "r.h5") == stored(tmp_path / "whole.h5")


def test_a_record_of_another_run_is_refused_and_told_apart(tmp_path):
    train, test = vectors(30), vectors(6)
    out = tmp_path / "r.h5"
    run(train, test, HEAD, out, models=2)
    before = out.read_bytes()
    other = vectors(30, seed=5)
    for words, arguments, layout in [
        ("lr 0.5, now 0.25", (train, test, Recipe.for_model("head", epochs=3, batch_size=8, lr=0.25)), {"models": 2}),
        ("models 2, now 3", (train, test, HEAD), {"models": 3}),
        ("seed 0, now 7", (train, test, HEAD), {"models": 2, "seed": 7}),
        (r"subset fraction 1.0, now 0.5", (train, test, HEAD), {"models": 2, "subset_fraction": 0.5}),
        ("other recorded epochs", (train, test, HEAD), {"models": 2, "every": 2}),
        ("with and without --gradients", (train, test, HEAD), {"models": 2, "gradients": True}),
        ("other training examples", (other, test, HEAD), {"models": 2}),
        ("other test examples", (train, None, HEAD), {"models": 2}),
    ]:
        with pytest.raises(
            ProtopruneError, match=rf"r.h5 is of another run \({words}\); write to .* --overwrite"
        ) as caught:
            run(*arguments, out, **layout)
        assert "\n" not in str(caught.value)
    assert out.read_bytes() == before
    train.root = "/moved"
    run(train, test, HEAD, out, models=2)
    assert out.read_bytes() == before
    run(train, test, HEAD, out, models=3, overwrite=True)
    with records.Record(out) as record:
        assert record.models == 3


def test_weights_are_known_by_their_content(tmp_path):
    data, paths = pixels(), [tmp_path / "a.pt", tmp_path / "b.pt"]
    torch.save(loop.make_model(data, CNN, 5).state_dict(), paths[0])
    shutil.copy(*paths)
    recipe = [Recipe.for_model("cnn", epochs=1, width=4, weights=str(path)) for path in paths]
    run(data, None, recipe[0], tmp_path / "r.h5")
    run(data, None, recipe[1], tmp_path / "r.h5")
    torch.save(loop.make_model(data, CNN, 6).state_dict(), paths[0])
    with pytest.raises(ProtopruneError, match="other --weights"):
        run(data, None, recipe[0], tmp_path / "r.h5")
    with pytest.raises(UsageError, match=r"none.pt: cannot be read \(No such file"):
        run(data, None, Recipe.for_model("cnn", epochs=1, width=4, weights="none.pt"), tmp_path / "s.h5")


@pytest.mark.parametrize("again", [False, True])
def test_an_interrupted_overwrite_goes_on(tmp_path, again):
    """Also without --overwrite: that is how the program says to go on."""
    train, test, recipe, layout = KINDS["cnn"]
    run(train, test, recipe, tmp_path / "whole.h5", **layout)
    run(train, None, recipe, tmp_path / "r.h5", **layout)
    old = stored(tmp_path / "r.h5")
    assert killed("cnn", tmp_path / "r.h5", dying(9), overwrite=True)
    assert stored(tmp_path / "r.h5") == old
    started = []
    run(train, test, recipe, tmp_path / "r.h5", overwrite=again, on_start=lambda *s: started.append(s), **layout)
    assert 0 < started[0][1] < 6
    assert stored(tmp_path / "r.h5") == stored(tmp_path / "whole.h5")


def test_a_damaged_record_is_refused_or_overwritten(tmp_path):
    run(vectors(), None, HEAD, tmp_path / "r.h5")
    (tmp_path / "r.h5").write_bytes((tmp_path / "r.h5").read_bytes()[:3000])
    with pytest.raises(ProtopruneError, match=r"damaged \(it is cut short: 3,000 of .* again with --overwrite"):
        run(vectors(), None, HEAD, tmp_path / "r.h5")
    run(vectors(), None, HEAD, tmp_path / "r.h5", overwrite=True)
    assert records.Record(tmp_path / "r.h5").n == 60


def test_one_process_writes_a_record(tmp_path):
    with files.lock(str(tmp_path / "r.h5")), pytest.raises(ProtopruneError, match="another protoprune is writing it"):
        run(vectors(), None, HEAD, tmp_path / "r.h5")


def test_a_record_that_does_not_fit_is_one_clear_line_before_the_training(tmp_path):

    def began(*_: int) -> None:
        raise ProtopruneError("training began")

    said = on_a_full_disk(20_000, lambda: run(vectors(), None, HEAD, tmp_path / "r.h5", on_start=began))
    assert "cannot write (File too large)" in said
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_checkpoint_that_does_not_fit_is_one_clear_line_and_can_go_on(tmp_path, monkeypatch):
    train, test, recipe, layout = KINDS["cnn"]

    def full(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0\nframe 0: c10")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(
            ProtopruneError, match=r"model-0000.pt: cannot write \(.*; make room and run again"
        ) as caught:
            run(train, test, recipe, tmp_path / "r.h5", **layout)
        assert "\n" not in str(caught.value)
    (tmp_path / "r.h5.state").rmdir() if not list((tmp_path / "r.h5.state").iterdir()) else None
    run(train, test, recipe, tmp_path / "r.h5", **layout)
    run(train, test, recipe, tmp_path / "whole.h5", **layout)
    assert stored(tmp_path / "r.h5") == stored(tmp_path / "whole.h5")


@pytest.mark.parametrize("kind", ["cnn", "head"])
def test_what_else_lies_in_the_folder_of_checkpoints_stays(kind, tmp_path):
    (tmp_path / "r.h5.state").mkdir()
    (tmp_path / "r.h5.state" / "notes.txt").write_text("mine")
    train, test, recipe, layout = KINDS[kind]
    run(train, test, recipe, tmp_path / "r.h5", **layout)
    assert [path.name for path in (tmp_path / "r.h5.state").iterdir()] == ["notes.txt"]


def test_what_is_in_the_way_of_checkpoints_is_named(tmp_path):
    (tmp_path / "r.h5.state").write_text("a file")
    with pytest.raises(ProtopruneError, match=r"r.h5.state: cannot make this folder \(File exists\); checkpoints"):
        run(pixels(), None, CNN, tmp_path / "r.h5")


def test_tiny_sets_are_recorded(tmp_path):
    for number, data in enumerate([vectors(2, classes=2), vectors(3, classes=3), pixels(2, classes=2)]):
        recipe = HEAD if data.vectors else CNN
        run(data, data, recipe, tmp_path / f"{number}.h5", models=2, gradients=True, initial=True)
        with records.Record(tmp_path / f"{number}.h5") as record:
            assert all(np.isfinite(record.last(name)).all() for name in record.statistics)


def test_two_models_of_a_record_differ(tmp_path):
    run(pixels(), None, CNN, tmp_path / "r.h5", models=2)
    with records.Record(tmp_path / "r.h5") as record:
        assert not (record.last("margin")[0] == record.last("margin")[1]).all()
    assert recording.model_seed(0, 0) != recording.model_seed(0, 1) != recording.model_seed(1, 0)


def test_the_models_named_in_help_can_be_built():
    assert set(models.MODELS) == {"head", "cnn", "resnet18"}


def test_a_record_goes_on_in_the_precision_that_it_began_in(tmp_path, monkeypatch):
    """`--precision auto` is bf16 on one machine and fp32 on another: a record must not mix them."""
    data, recipe = pixels(12), Recipe.for_model("cnn", epochs=1, width=4)
    monkeypatch.setattr(loop, "native_bf16", lambda device: False)
    run(data, None, recipe, tmp_path / "r.h5")
    monkeypatch.setattr(loop, "native_bf16", lambda device: True)
    with pytest.raises(ProtopruneError, match="computes in fp32, now bf16"):
        run(data, None, recipe, tmp_path / "r.h5")
