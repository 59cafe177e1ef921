"""The papers' experiments: configurations, verdicts on planted numbers, toy runs from end to end, and errors."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import tomllib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from protoprune.evaluation import runs, statistics
from protoprune.evaluation.fits import fit_laws
from protoprune.training import heads
from protoprune.training.examples import Examples
from protoprune.training.loop import Recipe

sys.path.insert(0, str(REPOSITORY / "scripts" / "reproduce"))

import claims as verdict
import experiment_balance as balance
import experiment_cifar10 as cifar10
import experiment_imagenet as imagenet
import experiment_k as clusters
import experiment_metrics as metrics
import experiment_svhn as svhn
import experiment_theory as theory
import lab as framework

EXPERIMENTS = {
    "theory": theory, "cifar10": cifar10, "svhn": svhn, "balance": balance, "imagenet": imagenet, "k": clusters,
    "metrics": metrics,
}  # fmt: skip
HEAD = {"model": "head", "hidden": 8, "epochs": 2, "batch_size": 64}
TOY = {  # what takes the place of the small configuration's values
    "theory": {"dimension": 20, "seeds": 2, "dots": 1, "envelope": 1, "crossings": 1, "gains": 2},
    "cifar10": {
        "sizes": [60, 240],
        "keeps": [1, 0.5],
        "seeds": 2,
        "bootstrap": 2,
        "probe_models": 2,
        "probe_epochs": 1,
    },
    "svhn": {"kept": 60, "keeps": [1, 0.5], "seeds": 2, "probe_epochs": [1, 2]},
    "balance": {"images": 120, "ratios": [1, 4], "keeps": [0.5], "seeds": 2},
    "imagenet": {"seeds": 2, "keeps": [0.8, 0.3]},
    "k": {"seeds": 2, "k": [1, 3, 10]},
    "metrics": {
        "seeds": 2,
        "keep": [0.5],
        "dynamics": HEAD | {"models": 2},
        "subsets": HEAD | {"models": 4, "subset": 0.7},
    },
}


class Watched(dict):
    """Settings that know which of them were read."""

    def __init__(self, *given):
        super().__init__(*given)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)


@pytest.fixture(scope="module")
def numbers():
    """What the claims on the theory rest on: three seconds of solving, once."""
    return theory.theory_numbers()


def configuration(name: str) -> dict:
    """The settings of both sizes, each with its first part."""
    config = tomllib.loads((REPOSITORY / "configs" / f"{name}.toml").read_text())
    return {size: settings | settings.pop("part", [{}])[0] for size, settings in config.items()}


@pytest.fixture
def toy_lab(tmp_path, feature_file, monkeypatch):
    """toy_lab("svhn") -> a Lab at a toy size, on 240 + 60 vectors of three classes that overlap."""
    rng = np.random.default_rng(0)
    files = {}
    for split, each in (("train", 80), ("test", 20)):
        centres = np.repeat(np.eye(3, 6), each, axis=0)
        paths = [f"{name}/{number:03d}.png" for name in "abc" for number in range(each)]
        files[split] = feature_file(tmp_path / f"{split}.h5", centres + rng.normal(0, 0.5, (3 * each, 6)), paths=paths)

    def features(self, name: str, split: str):
        assert self.settings.get("encoder")
        assert name == self.settings["data"]
        return files[split]

    monkeypatch.setattr(framework.Lab, "feature_file", features)

    def make(name: str, **changes) -> framework.Lab:
        settings = configuration(name)["small"] | TOY[name] | changes
        for part, toy in (("recipe", {"model": "head"}), ("probe", HEAD)):
            if part in settings:
                settings[part] = toy
        folder = tmp_path / "results" / name
        folder.mkdir(parents=True, exist_ok=True)
        return framework.Lab(name, "small", Watched(settings), tmp_path, folder, "cpu")

    return make


# --- configurations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_configurations_have_both_sizes_and_recipes_that_exist(name):
    config = configuration(name)
    assert set(config) == {"small", "full"}
    for settings in config.values():
        assert settings["seeds"] >= 3
        if "recipe" in settings:
            Recipe.for_model(**settings["recipe"])


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("metrics", "theory"))) for name in EXPERIMENTS]
)
def test_an_experiment_runs_uses_every_key_and_resumes_without_training(name, toy_lab, numbers, monkeypatch, capsys):
    monkeypatch.setattr(theory, "theory_numbers", lambda: numbers)
    monkeypatch.setattr(theory, "worker_pool", contextlib.nullcontext)  # starting processes takes seconds
    for points in ("LINE", "REFERENCE", "THETAS"):
        monkeypatch.setattr(theory, points, getattr(theory, points)[:2])
    lab = toy_lab(name)
    claims = EXPERIMENTS[name].run(lab)
    framework.report(lab, claims)
    config = configuration(name)
    assert set(config["small"]) | set(config["full"]) <= lab.settings.read
    kept = json.loads((lab.folder / "results.json").read_text())
    assert [one["verdict"] for one in kept["claims"]] == [one.verdict for one in claims]
    assert all(one.found and one.source for one in claims)
    assert list(lab.folder.glob("*.csv"))
    assert list(lab.folder.glob("*.png"))
    assert capsys.readouterr().out.count("found:") == len(claims) > 1
    if name == "theory":  # nothing is trained
        return

    def trained(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(runs, "_train", trained)
    monkeypatch.setattr(heads, "epochs", trained)
    draw_nothing(monkeypatch)
    again = toy_lab(name)
    assert EXPERIMENTS[name].run(again) == claims


def draw_nothing(monkeypatch):
    """A figure takes seconds; what begins like a picture may take the place of one."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda _, file, **__: file.write(b"\x89PNG"))


def test_the_other_ranking_of_cifar10_and_an_unknown_one(toy_lab, monkeypatch):
    draw_nothing(monkeypatch)
    claims = cifar10.run(toy_lab("cifar10", metric="prototypes"))
    assert len(claims) == 6
    with pytest.raises(framework.UsageError, match="metric = 'best': expected el2n or prototypes"):
        cifar10.run(toy_lab("cifar10", metric="best"))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("svhn", {"kept": 200}, "fewer; keep fewer"),
        ("svhn", {"probe_epochs": [1]}, "expected two, few and many"),
        ("balance", {"images": 2000}, "a class would have"),
        ("balance", {"balances": [0, 1]}, "expected 0, 0.5"),
    ],
)
def test_settings_that_cannot_be_are_one_line(name, changes, message, toy_lab):
    with pytest.raises(framework.UsageError, match=message) as caught:
        EXPERIMENTS[name].run(toy_lab(name, **changes))
    assert "\n" not in str(caught.value)


# --- the command -----------------------------------------------------------------------------------------------------


def command(monkeypatch, tmp_path, *arguments: str) -> int:
    """The exit code of scripts/reproduce."""
    path = REPOSITORY / "scripts" / "reproduce" / "__main__.py"
    spec = importlib.util.spec_from_file_location("reproduce_command", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    common = ["--data", tmp_path / "data", "--results", tmp_path / "results", "--configs", REPOSITORY / "configs"]
    monkeypatch.setattr(sys, "argv", ["reproduce", *map(str, [*arguments, *common, "--device", "cpu"])])
    return module.main()


@pytest.mark.parametrize("name", ["balance", "imagenet", "cifar10"])
def test_a_missing_data_set_is_one_line_and_exit_code_1(name, monkeypatch, tmp_path, capsys):
    assert command(monkeypatch, tmp_path, name, "--dataset", "nowhere") == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "nowhere: no such data set" in captured.err


def test_svhn_without_network_is_one_line_and_the_data_set_can_be_another(monkeypatch, tmp_path, capsys):
    import torchvision

    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "SVHN", unreachable)
    assert command(monkeypatch, tmp_path, "svhn", "--dataset", "svhn") == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert "svhn cannot be downloaded (no route to host)" in error[0]
    assert command(monkeypatch, tmp_path, "theory", "--dataset", "cifar10") == 2
    assert "no data set that could be replaced" in capsys.readouterr().err


def test_a_replaced_data_set_has_a_folder_of_its_own(tmp_path):
    where = (tmp_path, tmp_path / "results", REPOSITORY / "configs", "cpu")
    (plain,) = framework.Lab.open("svhn", "full", *where)
    (same,) = framework.Lab.open("svhn", "full", *where, dataset="svhn")
    (other,) = framework.Lab.open("svhn", "full", *where, dataset="cifar10")
    assert (plain.settings["data"], plain.folder.name) == ("svhn", "svhn-full")
    assert same.settings["data"] == "svhn"
    assert (other.settings["data"], other.folder) == ("cifar10", plain.folder / "cifar10-dino_vits16-resnet18")


def test_parts_take_the_place_of_settings_and_share_their_runs(tmp_path):
    (tmp_path / "x.toml").write_text("""
        [small]
        seeds = 5
        data = "cifar10"
        recipe = { model = "head" }
        [[small.part]]
        encoder = "lite0"
        [[small.part]]
        data = "pets"
        seeds = 2
        recipe = { model = "cnn" }
    """)
    where = ("x", "small", tmp_path, tmp_path / "results", tmp_path, "cpu")
    first, second = framework.Lab.open(*where)
    assert first.settings == {"seeds": 5, "data": "cifar10", "recipe": {"model": "head"}, "encoder": "lite0"}
    assert (second.settings["data"], second.seeds) == ("pets", 2)
    assert [one.folder.name for one in (first, second)] == ["cifar10-lite0", "pets-mini-cnn"]
    assert first.folder != second.folder
    assert first.runs == second.runs == tmp_path / "results" / "x" / "runs"
    assert [one.settings["data"] for one in framework.Lab.open(*where, dataset="pets")] == ["pets"]
    assert [one.settings["data"] for one in framework.Lab.open(*where, encoder="lite0")] == ["cifar10"]
    (elsewhere,) = framework.Lab.open(*where, dataset="birds")
    assert (elsewhere.settings["data"], elsewhere.settings["encoder"]) == ("birds", "lite0")


def test_a_folder_without_train_is_split_by_the_last_fifth_of_each_class(tmp_path, image_tree):
    image_tree({"cat": 5, "dog": 10, "eel": 4}, tmp_path / "pets")
    lab = framework.Lab("imagenet", "small", {}, tmp_path, tmp_path, "cpu")
    train, test = (lab.image_list("pets", split) for split in ("train", "test"))
    assert test.paths == ["cat/004.png", "dog/008.png", "dog/009.png"]
    assert len(train) == 16
    assert not set(train.paths) & set(test.paths)
    pixels = lab.images("pets")
    assert [one.paths for one in pixels] == [train.paths, test.paths]
    assert pixels[0].classes == pixels[1].classes == ["cat", "dog", "eel"]


def test_held_out_takes_each_class_by_itself():
    labels = np.array([0, 1, 0, 1, 1, 0, 0, 0, 1, 1, 2])
    assert np.flatnonzero(framework.held_out(labels)).tolist() == [7, 9]


# --- verdicts on planted numbers -------------------------------------------------------------------------------------

SIZES = [1000, 2000, 5000, 10000, 20000, 50000]


def planted_errors(at_smallest: float, at_largest: float, noise: float = 0.005, easy: float = 1.0) -> dict:
    """Errors of 5 seeds: hard is `at_smallest` times the error of random at the smallest size, and so on."""
    rng = np.random.default_rng(3)
    sizes = np.array(SIZES, float)
    factor = np.exp(np.interp(np.log(sizes), np.log(sizes[[0, -1]]), np.log([at_smallest, at_largest])))

    def table(keep: float, times=1.0) -> np.ndarray:
        return 0.5 * (keep * sizes / 1000) ** -0.2 * times * np.exp(noise * rng.normal(size=(5, 6)))

    errors = {("all", 1.0): table(1.0)}
    for keep in (0.8, 0.6):
        errors |= {
            ("random", keep): table(keep),
            ("hard", keep): table(keep, factor),
            ("easy", keep): table(keep, easy),
        }
    return errors


def verdicts(claims) -> list[str]:
    return [one.verdict for one in claims]


def test_the_switch_holds_where_it_is_planted_and_not_where_its_opposite_is():
    assert verdicts(cifar10.judge(planted_errors(1.4, 0.7, easy=0.9), SIZES)) == ["holds"] * 5
    opposite = cifar10.judge(planted_errors(0.7, 1.4, easy=1.1), SIZES)
    assert verdicts(opposite) == ["does not hold"] * 5


def test_noise_alone_decides_nothing():
    assert verdicts(cifar10.judge(planted_errors(1, 1, noise=0.05), SIZES))[:3] == ["undecided"] * 3
    assert verdicts(cifar10.judge(planted_errors(1, 1, noise=0.05), SIZES))[4] == "undecided"


def test_errors_between_sizes_lie_on_the_power_law():
    errors = np.array([0.5 * np.array([100.0, 400, 1600]) ** -0.5])
    found = cifar10.at_kept(errors, [100, 400, 1600], 0.5, [50, 100, 800])
    assert found[0] == pytest.approx(0.5 * np.array([100.0, 200, 1600]) ** -0.5)
    assert cifar10.common_grid([1, 0.5], [100, 1600], 2).tolist() == pytest.approx([100, 800])


def test_the_law_of_the_envelope():
    n = np.array(SIZES, float)
    noise = np.exp(0.01 * np.random.default_rng(0).normal(size=(5, 6)))
    laws = {"exponential": 0.5 * np.exp(-n / 20_000), "power": 3 * n**-0.3}
    found = {name: cifar10.judge_law(fit_laws(n, errors * noise, bootstrap=20)) for name, errors in laws.items()}
    assert found["exponential"].verdict == "holds"
    assert found["power"].verdict != "holds"
    assert cifar10.judge_law(None).verdict == "undecided"


def planted_probes(best_few: float, best_many: float, noise: float = 0.0005) -> tuple[np.ndarray, list[float]]:
    """(2, f, seeds) errors with a minimum at a fraction for each probe."""
    keeps = [0.25, 0.35, 0.5, 0.65, 0.8, 1.0]
    curves = [0.3 + 0.05 * np.log(np.array(keeps) / best) ** 2 for best in (best_few, best_many)]
    return np.array(curves)[:, :, None] + noise * np.random.default_rng(1).normal(size=(2, 6, 5)), keeps


def test_the_best_fraction_of_two_probes():
    names = ["few", "many"]
    assert verdicts(svhn.judge(*planted_probes(0.8, 0.5), names)) == ["holds", "holds"]
    assert verdicts(svhn.judge(*planted_probes(0.25, 0.8), names)) == ["does not hold", "does not hold"]
    assert verdicts(svhn.judge(*planted_probes(0.65, 0.65, noise=0.5), names)) == ["undecided", "undecided"]


def balance_numbers(before: dict, kept: dict, gain: float, noise: float = 0.002) -> dict:
    """before, kept: {ratio: counts of three classes}; the floor adds `gain` to the accuracy."""
    rng = np.random.default_rng(2)

    def seeds(values) -> np.ndarray:
        return np.array(values) + rng.integers(0, 3, (5, 3))

    counts, accuracy = {}, {}
    for ratio in before:
        counts[ratio, 0.5, 0] = seeds(kept[ratio])
        counts[ratio, 0.5, 0.5] = seeds(np.array(kept[ratio]).mean() * np.ones(3, int))
        counts[ratio, 0.5, "random"] = seeds(np.array(before[ratio]) // 2)
        for balance_, more in ((0, 0.0), (0.5, gain)):
            accuracy[ratio, 0.5, balance_] = 0.7 + more + noise * rng.normal(size=5)
    initial = {ratio: seeds(counts_) for ratio, counts_ in before.items()}
    return {"initial": initial, "counts": counts, "accuracy": accuracy, "worst_class_accuracy": accuracy}


BEFORE = {1: [1000, 1000, 1000], 10: [2000, 600, 200]}


def test_classes_that_become_uneven_and_a_floor_that_helps():
    uneven = balance_numbers(BEFORE, {1: [700, 500, 300], 10: [1100, 250, 50]}, 0.02)
    assert verdicts(balance.judge(**uneven)) == ["holds"] * 4
    evened = balance_numbers(BEFORE, {1: [500, 500, 500], 10: [700, 400, 300]}, -0.02)
    assert verdicts(balance.judge(**evened))[1:] == ["does not hold"] * 3
    nothing = balance_numbers(BEFORE, {1: [500, 500, 500], 10: [1000, 300, 100]}, 0.0, noise=0.02)
    assert verdicts(balance.judge(**nothing)) == ["undecided"] * 4


def test_a_floor_that_binds_nowhere_decides_nothing():
    numbers = balance_numbers({1: [1000, 1000, 1000]}, {1: [700, 500, 300]}, 0.02)
    numbers["counts"][1, 0.5, 0.5] = numbers["counts"][1, 0.5, 0]
    claims = balance.judge(**numbers)
    assert verdicts(claims) == ["holds", "undecided", "undecided"]
    assert "in no situation" in claims[1].found


def test_the_hardest_of_the_initial_images_are_kept():
    paths = [f"{row:03d}" for row in range(100)]
    train = Examples("images", paths, np.arange(100) % 2, ["a", "b"], torch.zeros(100, 2))
    scores = np.arange(100.0)
    assert svhn.hardest(train, scores, 20, 0.2, seed=0).tolist() == list(range(80, 100))
    drawn = svhn.hardest(train, scores, 20, 0.5, seed=0)
    assert drawn.tolist() == runs.random_rows(100, 40, 0)[-20:].tolist()
    one_sided = np.where(train.labels == 0, 100.0, 0) + scores
    rows = np.arange(100)
    hard = imagenet.kept_by(one_sided, train, rows, 0.2, "hard", 0.0)
    assert np.bincount(train.labels[hard]).tolist() == [20]
    kept = imagenet.kept_by(one_sided, train, rows, 0.2, "hard", 0.5)
    assert np.bincount(train.labels[kept]).tolist() == [15, 5]
    assert kept[train.labels[kept] == 1].tolist() == [91, 93, 95, 97, 99]
    half = imagenet.kept_by(scores[50:], train, rows[50:], 0.2, "easy", 0.0)
    assert half.tolist() == list(range(50, 60))


def test_uneven_classes_have_the_ratio_and_the_number_asked_for():
    labels = np.repeat(np.arange(4), 1000)
    rows = balance.uneven_rows(labels, 1500, 10, seed=1)
    counts = np.bincount(labels[rows])
    assert len(np.unique(rows)) == len(rows)
    assert abs(len(rows) - 1500) <= 2
    assert counts.max() / counts.min() == pytest.approx(10, rel=0.02)
    assert not np.array_equal(rows, balance.uneven_rows(labels, 1500, 10, seed=2))


def list_numbers(hard: dict[float, float], easy: float) -> dict[str, np.ndarray]:
    """Accuracies of 5 seeds: everything is .8, random loses a point at every fraction, hard and easy as given to it."""
    rng = np.random.default_rng(0)

    def seeds(level: float) -> np.ndarray:
        return level + 0.001 * rng.normal(size=5)

    found = {"everything": seeds(0.8)}
    for keep, more in hard.items():
        found |= {f"random {keep:g}": seeds(0.79), f"hard {keep:g}": seeds(0.79 + more)}
        found[f"easy {keep:g}"] = seeds(0.79 + easy)
    return found


def test_the_claims_on_lists_of_prototypes():
    pays = imagenet.claims(list_numbers({0.8: 0.01, 0.3: 0.01}, -0.05), [0.8, 0.3], 0.005)
    assert verdicts(pays) == ["holds"] * 4
    costs = imagenet.claims(list_numbers({0.8: -0.05, 0.3: -0.05}, 0.05), [0.8, 0.3], 0.005)
    assert verdicts(costs) == ["does not hold"] * 4
    noise = imagenet.claims(list_numbers({0.3: 0.0}, 0.0), [0.3], 0.005)
    assert verdicts(noise) == ["undecided"] * 2
    assert "30% kept +0.9" in pays[2].found
    lucky = {name: values if name != "random 0.3" else values + np.array([0.02, -0.02, 0.01, -0.01, 0])
             for name, values in list_numbers({0.3: 0.01}, -0.05).items()}  # fmt: skip
    assert imagenet.claims(lucky, [0.3], 0.005, one_draw=True)[0].verdict == "undecided"


def test_networks_take_the_steps_of_everything_on_every_list(tmp_path):
    settings = {"images": 0.5, "keeps": [0.2], "balance": 0.5, "seeds": 1}
    settings["recipe"] = {"model": "cnn", "epochs": 3, "batch_size": 10}
    train = Examples(
        "images", [f"{row:03d}" for row in range(100)], np.arange(100) % 2, ["a", "b"], torch.zeros(100, 2)
    )
    vectors = np.random.default_rng(0).normal(size=(100, 4)).astype(np.float32)

    def plan(**changes):
        lab = framework.Lab("imagenet", "small", settings | changes, tmp_path, tmp_path, "cpu")
        return imagenet.plan(lab, train, vectors, 0)

    planned = plan()
    assert [(one.method, len(one.rows), one.steps) for one in planned] == [
        ("everything", 50, 15), ("hard 0.2", 10, 15), ("easy 0.2", 10, 15), ("random 0.2", 10, 15)
    ]  # fmt: skip
    assert all(set(one.rows) <= set(planned[0].rows) for one in planned)
    assert not set(planned[1].rows) & set(planned[2].rows)
    assert {one.steps for one in plan(recipe={"model": "head"})} == {None}


def test_the_number_of_clusters_matters_only_where_it_is_planted():
    rng = np.random.default_rng(0)

    def found(last: float, noise: float = 0.001) -> dict[str, np.ndarray]:
        levels = {"k = 1": 0.7, "k = 3": 0.7, "k = 10": 0.7, "k = 300": 0.2, "random": 0.7} | {"k = 30": last}
        return {name: level + noise * rng.normal(size=5) for name, level in levels.items()}

    ks = [1, 3, 10, 30, 300]  # 300 is out of the range that the claims are about
    assert verdicts(clusters.claims(found(0.7), ks, 10)) == ["holds"] * 2
    assert verdicts(clusters.claims(found(0.65), ks, 10)) == ["does not hold"] * 2
    assert verdicts(clusters.claims(found(0.75), ks, 10)) == ["does not hold", "holds"]
    assert verdicts(clusters.claims(found(0.7, noise=0.02), ks, 10)) == ["undecided"] * 2
    assert "against k = 10 k = 1 " in clusters.claims(found(0.7), ks, 10)[0].found


def test_metrics_that_pay_and_that_lose():
    rng = np.random.default_rng(0)

    def result(shift: dict[str, float]):
        methods = []
        for keep in (0.8, 0.1):
            random = 0.6 + 0.001 * rng.normal(size=5)
            for name in ("a", "b", "cover"):
                mine = random + shift.get(f"{name} {keep:g}", 0.1) + 0.001 * rng.normal(size=5)
                to_random = statistics.compare(mine, random, one_draw=True)
                methods.append(SimpleNamespace(name=f"{name} {keep:g}", kind="list", to_random=to_random))
        return SimpleNamespace(methods=methods, seeds=[0, 1, 2, 3, 4])

    usual = {"a 0.8": 0.0, "b 0.8": 0.01, "a 0.1": -0.1, "b 0.1": -0.2}
    claims = metrics.pays(result(usual), [0.8, 0.1])
    assert verdicts(claims) == ["holds", "holds"]
    assert "better: b +0.9" in claims[0].found
    assert "worse: a -10.0" in claims[1].found
    claims = metrics.pays(result({name: -shift for name, shift in usual.items()} | {"a 0.8": -0.05}), [0.8, 0.1])
    assert verdicts(claims) == ["does not hold", "does not hold"]


def theory_rows(deviation: float, standard_error: float) -> list[dict]:
    return [{"theta": 0, "theory": 0.1, "simulated": 0.1 * (1 + deviation), "standard_error": 0.1 * standard_error}] * 9


def test_theory_and_simulation_agree_disagree_or_cannot_be_told_apart():
    assert theory.agreement(theory_rows(0.01, 0.002)).verdict == "holds"
    assert theory.agreement(theory_rows(0.10, 0.002)).verdict == "does not hold"
    assert theory.agreement(theory_rows(0.02, 0.2)).verdict == "undecided"


def test_the_claims_on_the_theory_follow_its_numbers(numbers):
    claims = theory.judge(numbers)
    assert verdicts(claims) == ["holds"] * 8 + ["undecided"]
    turned = SimpleNamespace(**vars(numbers) | {"limit": 0.6, "falling": numbers.falling[::-1], "steep": numbers.plain})
    assert [verdicts(theory.judge(turned))[place] for place in (0, 2, 4)] == ["does not hold"] * 3


def test_no_verdict_but_the_three():
    with pytest.raises(AssertionError):
        verdict.Claim("a", "b", "c", "perhaps")
