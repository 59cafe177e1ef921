"""Choosing a recipe with proof: planted cases that each must win, null cases that must not, splits, log, sentences."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from training_helpers import pixels

from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.evaluation.statistics import Interval
from protoprune.training.loop import Recipe
from protoprune.tuning import halving, judging, report, running, unlabelled
from protoprune.tuning import recipes as recipes_module
from protoprune.tuning.recipes import BALANCED, RANDOM, Candidate, Part, Pool, candidates
from protoprune.tuning.running import Log, tune

COVER = Candidate("cover", by="class")


def pool_of(vectors, labels, **tables) -> Pool:
    labels = np.asarray(labels)
    classes = [chr(97 + one) for one in range(labels.max() + 1)]
    paths = [f"{classes[label]}/{i:05d}.png" for i, label in enumerate(labels)]
    return Pool(paths, labels, classes, np.asarray(vectors, np.float32), tables)


class Ridge:
    """A judge in closed form: least squares on one-hot labels, which trains in a millisecond."""

    name = "ridge"

    def __init__(self, pool: Pool, test: Pool | None = None):
        self.pool, self.test, self.asked = pool, test, []

    def answers(self, rows, held_out, seed):
        self.asked.append((tuple(rows), None if held_out is None else tuple(held_out)))
        x = np.append(self.pool.vectors, np.ones((len(self.pool), 1)), axis=1)
        targets = np.eye(len(self.pool.classes))[self.pool.labels[rows]]
        inside = x[rows]
        weight = np.linalg.solve(inside.T @ inside + 1e-2 * np.eye(x.shape[1]), inside.T @ targets)
        if held_out is None:
            x, labels = np.append(self.test.vectors, np.ones((len(self.test), 1)), axis=1), self.test.labels
        else:
            x, labels = x[held_out], self.pool.labels[held_out]
        return (x @ weight).argmax(1) == labels


class Nearest(Ridge):
    """The label of the nearest kept image: right on a tight mode as soon as one image of it is kept."""

    name = "nearest"

    def answers(self, rows, held_out, seed):
        self.asked.append((tuple(rows), None if held_out is None else tuple(held_out)))
        pool, x = (self.test, self.test.vectors) if held_out is None else (self.pool, self.pool.vectors[held_out])
        labels = pool.labels if held_out is None else pool.labels[held_out]
        known = self.pool.vectors[rows]
        near = (2 * x @ known.T - (known**2).sum(1)).argmax(1)
        return self.pool.labels[rows][near] == labels


def test_all_lists_are_of_one_size_where_a_table_lacks_images():
    rng = np.random.default_rng(0)
    pool = pool_of(rng.normal(size=(150, 4)), np.arange(150) % 3, **{"few.csv": rng.random(150)})
    pool.tables["few.csv"][::5] = np.nan
    judge = Ridge(pool)
    with pytest.warns(ProtopruneWarning, match="few.csv lacks 30 of 150 images: recipes are compared on those that it"):
        result = tune(pool, 0.25, recipes=[COVER, Candidate(scores="few.csv")], rounds=(2,), seeds=2, heads=judge)
    assert result.images == 120
    used = np.concatenate([np.concatenate(pair) for pair in judge.asked]).astype(int)
    assert not (used % 5 == 0).any()
    assert {len(rows) for rows, held in judge.asked if held[0] != judge.asked[-1][1][0]} == {19}  # .25 * 4/5 * 96
    pool.tables["few.csv"][:] = np.nan
    with pytest.raises(UsageError, match=r"--scores few\.csv: gives none of the images a score"):
        tune(pool, 0.25, heads=judge)


# --- splits and halving ----------------------------------------------------------------------------------------------


def test_folds_divide_each_class_evenly_and_five_of_them_are_all():
    labels = np.repeat([0, 1, 2], [50, 23, 7])
    folds = np.array([halving.fold_of(labels, split) for split in range(10)])
    for five in (folds[:5], folds[5:]):
        assert (five.sum(axis=0) == 1).all()
    for fold in folds:
        assert (np.abs(np.bincount(labels[fold], minlength=3) - np.array([10, 4.6, 1.4])) <= 1).all()
    assert not np.array_equal(folds[0], folds[5])
    np.testing.assert_array_equal(folds[7], halving.fold_of(labels, 7))


@pytest.mark.parametrize("best", range(2, 12))
def test_every_planted_candidate_wins_when_it_is_the_best(best):
    rng, asked = np.random.default_rng(best), []

    def measure(number: int, split: int) -> float:
        asked.append((number, split))
        return 0.5 + 0.1 * (number == best) + 0.01 * rng.standard_normal()

    standings = halving.halve(12, measure, references=(0, 1), rounds=(1, 2, 4))
    assert standings[0].number == best
    assert len(set(asked)) == len(asked)  # nothing twice
    splits = {one.number: len(one.accuracies) for one in standings}
    assert splits[0] == splits[1] == splits[best] == 4
    assert sorted(splits.values()) == [1] * 5 + [2] * 2 + [4] * 5  # 10, then 5, then 3 beside the references
    assert {one.rounds for one in standings} == {1, 2, 3}


# --- the verdict -----------------------------------------------------------------------------------------------------


def answers(rng, seeds: int, images: int, accuracy: float, luck: float, skill: np.ndarray, one: bool) -> np.ndarray:
    """(seeds, images) bool of lists whose accuracy varies by `luck`; one list has the same luck at every seed."""
    shift = luck * (np.full(seeds, rng.standard_normal()) if one else rng.standard_normal(seeds))
    return rng.random((seeds, images)) < np.clip(accuracy + shift[:, None] + skill, 0, 1)


def verdicts(gain: float, runs: int, luck: float = 0.01) -> tuple[int, int]:
    """How often of `runs` a list that is better by `gain` is called better, and worse."""
    better = worse = 0
    for run in range(runs):
        rng = np.random.default_rng([run, 5])
        skill = 0.2 * rng.standard_normal(400)  # some images are easier than others, for all
        right = {
            name: answers(rng, 6, 400, 0.6 + gain * (name == "list"), luck, skill, name == "list")
            for name in ("list", "random", "balanced", "everything")
        }
        found = judging.judge(right)
        better, worse = better + found.better, worse + found.worse
    return better, worse


def test_a_list_that_is_as_good_as_a_random_one_is_not_called_better():
    """Stated: at most 2.5 % (5 % on both sides). Of 200 runs 5 are expected; more than 12 happen once in 1,000."""
    better, worse = verdicts(0.0, 200)
    assert better <= 12
    assert worse <= 24  # worse than one of the two is enough


def test_a_list_that_is_better_is_called_so():
    assert verdicts(0.15, 20)[0] == 20
    assert verdicts(-0.15, 20) == (0, 20)


def test_both_random_and_random_by_class_have_to_be_beaten():
    rng = np.random.default_rng(0)
    one, other = rng.random((2, 8, 500)) < np.array([0.8, 0.6])[:, None, None]
    right = {"list": one, "random": other, "balanced": one, "everything": one}
    found = judging.judge(right)
    assert found.to_random.verdict == "better"
    assert not found.better
    assert not found.worse


def test_the_corrected_resampled_t():
    one = judging.resampled(np.array([0.01, 0.02, 0.03, 0.02]))
    half = 3.182446 * np.sqrt((1 / 4 + 1 / 4) * np.var([0.01, 0.02, 0.03, 0.02], ddof=1))
    assert (one.mean, one.high - one.mean) == (pytest.approx(0.02), pytest.approx(half, rel=1e-5))
    assert judging.resampled(np.array([0.5])) == Interval(0.5, None, None, 1)


# --- planted data: each recipe where it must win ----------------------------------------------------------------------


def noisy_where(hard: bool, seed: int = 0) -> Pool:
    """Five classes in 30 dimensions; some images lie far from the rest in 4 more. 60 % of the labels are noise: those
    of the far images, or of the others."""
    rng = np.random.default_rng(seed)
    far = np.arange(4000) % 10 < (6 if hard else 4)
    kind = rng.integers(0, 5, 4000)
    signal = rng.standard_normal((5, 30))[kind] + rng.standard_normal((4000, 30))
    apart = rng.standard_normal((4000, 4)) * np.where(far, 4.0, 0.1)[:, None]
    noise = far if hard else ~far
    labels = np.where(noise, rng.integers(0, 5, 4000), kind)
    x = np.concatenate([signal, apart, np.full((4000, 1), 6.0)], axis=1)
    order = np.argsort(labels, kind="stable")
    return pool_of(x[order], labels[order], **{"t.csv": noise[order].astype(float)})


def modes(seed: int = 0) -> Pool:
    """Two classes of 100 tight modes each, all over the sphere: few random images miss many of them."""
    rng = np.random.default_rng(seed)
    which = np.repeat(np.arange(200), 10)
    return pool_of(3 * rng.standard_normal((200, 200))[which] + 0.3 * rng.standard_normal((2000, 200)), which // 100)


BY_PROTOTYPES = [Candidate(order, by=by, balance=balance) for order in ("hard", "easy", "middle")
                 for by, balance in ((None, 0.0), ("class", 0.5))]  # fmt: skip
RECIPES = [COVER, Candidate("cover", by="cluster"), Candidate("facility", by="class"), *BY_PROTOTYPES]
BY_TABLE = [Candidate(order, scores="t.csv") for order in ("hard", "easy")]


@pytest.mark.parametrize(
    ("make", "keep", "recipes", "wanted"),
    [
        (modes, 0.1, RECIPES, {"cover by class", "cover by cluster", "facility by class"}),
        (lambda: noisy_where(True), 0.05, RECIPES, {"easy", "easy, balance 0.5"}),
        (lambda: noisy_where(False), 0.05, RECIPES, {"hard", "hard, balance 0.5"}),
        (lambda: noisy_where(True), 0.05, BY_TABLE, {"easy, by t.csv"}),
    ],
    ids=["cover", "easy", "hard", "table"],
)
def test_a_planted_recipe_is_found_and_shown_to_be_better(make, keep, recipes, wanted):
    pool = make()
    result = tune(pool, keep, recipes=recipes, rounds=(1, 2, 4), heads=Ridge(pool))
    assert result.best.name in wanted
    assert result.judgement.better, report.sentence(result)
    assert result.winner == result.best
    assert report.sentence(result).startswith(f"keep {keep:.0%}: {result.best.name}; +")


def tight(sizes, seed: int = 0, classes: int = 2, tables=lambda mode, rng: {}) -> Pool:
    """Tight modes of so many images each, all over the sphere; those of a class are every so manyth."""
    rng = np.random.default_rng(seed)
    mode = np.repeat(np.arange(len(sizes)), sizes)
    order = np.argsort(mode % classes, kind="stable")
    mode = mode[order]
    x = 3 * rng.standard_normal((len(sizes), 60))[mode] + 0.02 * rng.standard_normal((len(mode), 60))
    return pool_of(x, mode % classes, **tables(mode, rng))


def scattered() -> Pool:
    """Twelve modes, three a class; what lies farther off its mode has any label. Four clusters know nothing of that."""
    rng = np.random.default_rng(1)
    mode, off = np.repeat(np.arange(12), 250), np.tile(np.arange(250) < 150, 12)
    centre = rng.standard_normal((12, 40))
    centre *= 18 / np.linalg.norm(centre, axis=1, keepdims=True)
    x = centre[mode] + rng.standard_normal((3000, 40)) * np.where(off, 0.36, 0.3)[:, None]
    labels = np.where(off, rng.integers(0, 4, 3000), mode % 4)
    order = np.argsort(labels, kind="stable")
    return pool_of(x[order], labels[order])


def wrong_at_both_ends() -> Pool:
    """A table whose lowest and highest thirds have any label."""
    rng = np.random.default_rng(2)
    kind, score = rng.integers(0, 5, 3000), rng.random(3000)
    labels = np.where(np.abs(score - 0.5) > 0.2, rng.integers(0, 5, 3000), kind)
    x = 0.7 * rng.standard_normal((5, 30))[kind] + rng.standard_normal((3000, 30))
    order = np.argsort(labels, kind="stable")
    return pool_of(x[order], labels[order], **{"t.csv": score[order]})


TABLE_ORDERS = [Candidate(order, scores="t.csv") for order in ("hard", "easy", "middle", "stratified")]


@pytest.mark.parametrize(
    ("make", "keep", "recipes", "wanted", "judge"),
    [
        # Ten modes of 150 images and a hundred of 5: herding takes them in proportion, facility location each once.
        (lambda: tight([150] * 10 + [5] * 100), 0.08, RECIPES, "facility by class", Nearest),
        (
            lambda: tight([10] * 200), 0.125, [Candidate("cover", by="cluster"), *BY_PROTOTYPES],
            "cover by cluster", Nearest,
        ),
        (wrong_at_both_ends, 0.05, TABLE_ORDERS, "middle, by t.csv", Ridge),
        # The table is the mode's number: every stratum is one mode, which random lists miss by chance.
        (
            lambda: tight([40] * 50, tables=lambda mode, rng: {"t.csv": mode + 0.5 * rng.random(len(mode))}),
            0.05, TABLE_ORDERS, "stratified, by t.csv", Nearest,
        ),
        (scattered, 0.08, [Candidate("hard"), Candidate("easy"), Candidate("easy", k=12)], "easy, k 12", Nearest),
    ],
    ids=["facility", "cover by cluster", "middle", "stratified", "k"],
)  # fmt: skip
def test_every_other_recipe_has_a_world_in_which_it_wins(make, keep, recipes, wanted, judge):
    pool = make()
    result = tune(pool, keep, recipes=recipes, rounds=(1, 2, 4), heads=judge(pool))
    assert result.best.name == wanted, [result.candidates[one.number].name for one in result.standings]
    assert result.judgement.better, report.sentence(result)


def test_even_classes_are_written_where_they_alone_beat_random():
    """A class of 24 images in 2,000 makes half of what is asked: few random images hold none of it."""
    rng = np.random.default_rng(3)
    labels = np.repeat([0, 1, 2], [960, 960, 80])
    x = 4 * np.eye(3, 10)[labels] + rng.standard_normal((2000, 10))
    pool = pool_of(x, labels)

    class Even(Ridge):
        """Classes count alike: of the large ones so few images are asked."""

        def answers(self, rows, held_out, seed):
            held = np.concatenate([held_out[self.pool.labels[held_out] == label][:16] for label in range(3)])
            return super().answers(rows, held, seed)

    result = tune(pool, 0.02, recipes=[Candidate(), Candidate("easy")], rounds=(1, 2), heads=Even(pool))
    assert not result.judgement.better
    assert result.judgement.even_better
    assert result.winner == BALANCED
    text = report.sentence(result)
    assert text.startswith("keep 2%: nothing beats random by class here, which is +")
    assert "such a list is written (the best recipe, " in text


def test_balance_wins_where_an_order_starves_classes():
    """The table knows the wrong labels, but puts two classes behind the others."""
    pool = noisy_where(True)
    pool.tables["t.csv"] = pool.tables["t.csv"] + 2.0 * (pool.labels >= 3)
    recipes = [Candidate("easy", scores="t.csv"), Candidate("easy", by="class", balance=1.0, scores="t.csv")]
    result = tune(pool, 0.05, recipes=recipes, rounds=(1, 2), heads=Ridge(pool))
    assert result.best == recipes[1]
    assert result.judgement.to_random.difference > 0.08


def test_dropping_the_hardest_wins_where_they_are_wrong():
    pool = noisy_where(True)
    recipes = [Candidate("hard", scores="t.csv"), Candidate("hard", scores="t.csv", drop_hardest=0.65)]
    result = tune(pool, 0.05, recipes=recipes, rounds=(1, 2), heads=Ridge(pool))
    assert result.best == recipes[1]
    assert result.judgement.better


def null_runs(runs: int) -> tuple[int, int]:
    """How often the whole of it calls a recipe, or even classes, better where labels are nothing to the features."""
    better = even = 0
    for run in range(runs):
        rng = np.random.default_rng([run, 99])
        labels = np.sort(rng.integers(0, 2, 120))
        pool = pool_of(rng.standard_normal((120, 4)), labels)
        result = tune(
            pool, 0.3, recipes=[COVER, Candidate("easy")], rounds=(1, 2), seeds=5, seed=run, heads=Ridge(pool)
        )
        better += result.judgement.better
        even += result.winner == BALANCED
        assert (result.winner in (RANDOM, BALANCED)) == (not result.judgement.better)
    return better, even


def test_random_data_have_no_winner():
    better, even = null_runs(25)
    assert better <= 3
    assert even <= 3


@pytest.mark.slow
def test_random_data_have_no_winner_more_often_than_stated():
    better, even = null_runs(200)
    assert better <= 12
    assert even <= 12


# --- what may look at what -------------------------------------------------------------------------------------------


def test_what_judges_chooses_nothing():
    pool = modes()
    judge = Ridge(pool)
    tune(pool, 0.1, recipes=[COVER, Candidate()], rounds=(1, 2), seeds=2, heads=judge)
    held = set(np.flatnonzero(halving.fold_of(pool.labels, 0, 977)).tolist())
    final = [one for one in judge.asked if set(one[1]) == held]
    others = [one for one in judge.asked if set(one[1]) != held]
    assert len(final) == 2 * 3 + 2  # the list, random and random by class for each seed; everything for two
    assert judge.asked[-len(final) :] == final  # after all choosing
    for trained, tested in others:
        assert not held & (set(trained) | set(tested))
        assert not set(trained) & set(tested)
    assert all(not held & set(trained) for trained, _ in final)


def test_what_is_judged_is_the_list_of_this_seed():
    whole = modes()
    pool = Pool(whole.paths[::5], whole.labels[::5], whole.classes, whole.vectors[::5])
    judge = Ridge(pool, pool)
    result = tune(pool, 0.1, test=pool, recipes=[Candidate("stratified")], rounds=(1,), seeds=2, heads=judge, seed=3)
    expected = Part(pool, np.arange(len(pool)), 3).select(result.best, 0.1)
    assert list(judge.asked[-8][0]) == expected.tolist()


def test_a_test_set_judges_once_and_never_chooses():
    pool, test = modes(), modes(1)
    test.vectors = pool.vectors[:200] + 0.01
    test = Pool(test.paths[:200], pool.labels[:200], pool.classes, test.vectors)
    judge = Ridge(pool, test)
    result = tune(pool, 0.1, test=test, recipes=[COVER, Candidate()], rounds=(1, 2), seeds=2, heads=judge)
    assert [one[1] is None for one in judge.asked].count(True) == 8
    assert all(one[1] is None for one in judge.asked[-8:])
    assert result.judgement.images == 200
    everything = [one for one in judge.asked if len(one[0]) == len(pool)]
    assert len(everything) == 2  # all images choose, and only then train together
    scrambled = Pool(test.paths, 1 - test.labels, test.classes, test.vectors)
    again = tune(pool, 0.1, test=scrambled, recipes=[COVER, Candidate()], rounds=(1, 2), seeds=2,
                 heads=Ridge(pool, scrambled))  # fmt: skip
    assert again.best == result.best
    assert [one.accuracies for one in again.standings] == [one.accuracies for one in result.standings]


def test_what_was_trained_is_not_trained_again(tmp_path):
    pool = modes()
    options = {"recipes": [COVER, Candidate()], "rounds": (1, 2), "seeds": 2, "folder": tmp_path}
    first = Ridge(pool)
    result = tune(pool, 0.1, heads=first, **options)
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert len(lines) == len(first.asked)
    (tmp_path / "runs.jsonl").write_text("\n".join(lines[:5]) + "\n" + lines[5][:20])  # killed while writing the sixth
    second = Ridge(pool)
    again = tune(pool, 0.1, heads=second, **options)
    assert len(second.asked) == len(first.asked) - 5
    assert report.sentence(again) == report.sentence(result)
    assert report.rows(again) == report.rows(result)
    third = Ridge(pool)
    tune(pool, 0.1, heads=third, **options)
    assert not third.asked
    pool.vectors[0] += 1  # another set: nothing of it counts
    fourth = Ridge(pool)
    tune(pool, 0.1, heads=fourth, **options)
    assert len(fourth.asked) == len(first.asked)


def test_answers_of_networks_are_those_of_their_pixels_and_weights(tmp_path):
    """The log knew the names of both alone, and gave answers of images and weights that had been replaced."""
    weights, train, test = tmp_path / "w.pt", pixels(6), pixels(6, seed=1)
    weights.write_bytes(b"one")
    recipe = Recipe.for_model("cnn", weights=str(weights))
    names = [running.Networks(train, test, recipe, "cpu").name]
    train.inputs[0, 0, 0, 0] ^= 1
    names.append(running.Networks(train, test, recipe, "cpu").name)
    weights.write_bytes(b"two")
    names += [running.Networks(train, one, recipe, "cpu").name for one in (test, None)]
    assert len(set(names)) == 4
    assert running.Networks(train, None, recipe, "cpu").name == names[-1]


def test_the_log_tells_lengths_and_damage_apart(tmp_path):
    log = Log(tmp_path, modes())
    for key, right in (("a", [True, False, True]), ("b", [True] * 9)):
        assert log.answers(key, lambda r=right: np.array(r)).tolist() == right
    (tmp_path / "runs.jsonl").open("a").write('{"key": 3}\nnot json\n[]\n')
    fresh = Log(tmp_path, modes())
    assert fresh.answers("b", lambda: pytest.fail("kept")).tolist() == [True] * 9


def test_a_flipped_bit_of_the_log_is_asked_again(tmp_path):
    """Of the answers' base64 every letter is an answer too: a digest in each line tells what was written."""
    log = Log(tmp_path, modes())
    right = np.arange(40) % 3 == 0
    log.answers("a", lambda: right)
    path = tmp_path / "runs.jsonl"
    whole = path.read_bytes()
    for place in range(len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert Log(tmp_path, modes()).answers("a", lambda: right).tolist() == right.tolist()
    line = json.loads(whole)
    for other in ({"key": 3}, {"right": 3}, {"digest": None}, {"right": line["right"].replace("4", "8", 1)}):
        path.write_text(json.dumps(line | other) + "\n")
        assert Log(tmp_path, modes()).answers("a", lambda: right).tolist() == right.tolist()


# --- keep auto -------------------------------------------------------------------------------------------------------


def test_auto_finds_how_much_can_be_left_out():
    """Two hundred modes of ten images: one image a mode is enough for cover, so all but a few per cent can go."""
    pool = modes()
    result = tune(pool, None, recipes=[COVER], rounds=(1,), seeds=2, heads=Ridge(pool), tolerance=0.02)
    assert result.best == COVER
    assert result.keep <= 0.5
    keeps = [one.keep for one in result.curve]
    assert keeps == sorted(keeps, reverse=True)
    good = {one.keep: one.cost.high < 0.02 for one in result.curve}
    assert all(good[keep] for keep in keeps if keep >= result.keep)
    assert not any(good[keep] for keep in keeps if keep < result.keep)
    assert report.sentence(result).startswith(f"you can leave out {1 - result.keep:.0%}: cover by class; ")
    assert "asked for" not in report.sentence(result)
    result.tolerance = -1.0  # what the images that judge say may be more
    assert "below), more than the -100.0 asked for: the images that judge find it harder; +" in report.sentence(result)


def test_auto_orders_each_split_once_for_all_fractions(monkeypatch):
    """A clustering of 40,000 images takes longer than their heads."""
    pool, calls, cluster = modes(), [], recipes_module.prototypes.cluster
    monkeypatch.setattr(recipes_module.prototypes, "cluster", lambda *a, **k: calls.append(1) or cluster(*a, **k))
    result = tune(pool, None, recipes=[Candidate()], rounds=(1,), seeds=2, heads=Ridge(pool), tolerance=0.05)
    assert len(result.curve) >= 2
    judged = 1 if result.best == Candidate() else 0
    assert len(calls) == 1 + running.AUTO_SPLITS + judged  # the first to choose finalists


def test_auto_finds_the_fraction_that_is_known():
    """A hundred tight modes of ten images: of the eight tenths of four fifths that train, facility location needs one
    a mode, 100 of 640 or 15.6 %, and each mode that it has not costs a hundredth. Random lists need far more: they miss
    a mode of 6.4 images with probability (1 - keep)^6.4, 2 % at 46 % kept."""
    pool = tight([10] * 100)
    result = tune(
        pool, None, recipes=[Candidate("facility", by="class")], rounds=(1,), heads=Nearest(pool), tolerance=0.02
    )
    assert result.best.order == "facility"
    assert 0.14 <= result.keep <= 0.18
    assert report.sentence(result).startswith(f"you can leave out {1 - result.keep:.0%}: facility by class; ")
    plain = next(one.keep for one in result.random_curve[::-1] if one.cost.high < 0.02)
    assert 0.4 <= plain <= 0.75
    assert report.sentence(result).endswith(f"; with random lists you could leave out {1 - plain:.0%}")
    assert all(one.cost.low <= one.cost.mean <= one.cost.high for one in result.curve)


def test_auto_ends_where_too_few_images_would_be_kept():
    """Where every fraction will do: few images have no 2 %, which ended it after all the training."""
    labels = np.arange(100) % 2
    pool = pool_of(9 * np.eye(2, 4)[labels] + np.random.default_rng(0).normal(size=(100, 4)), labels)
    result = tune(pool, None, recipes=[RANDOM], rounds=(1,), seeds=2, heads=Ridge(pool), tolerance=0.5)
    assert [one.keep for one in result.curve] == [0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2]
    assert result.keep == 0.2  # 13 images of a split of 64


def test_auto_gives_a_random_list_its_own_fraction():
    """Orders that take one mode after another need all of them: random is better, and what it costs is said of it."""
    pool = tight([10] * 100, tables=lambda mode, rng: {"t.csv": mode.astype(float)})
    recipes = [Candidate("hard", scores="t.csv")]
    result = tune(pool, None, recipes=recipes, rounds=(1,), heads=Nearest(pool), tolerance=0.02)
    assert result.winner in (RANDOM, BALANCED)
    assert 0.4 <= result.keep <= 0.75
    text = report.sentence(result)
    assert text.startswith(f"you can leave out {1 - result.keep:.0%}: random")
    assert f"; {abs(100 * result.judgement.to_everything.mean):.1f} below everything (" in text
    assert text.endswith("; no recipe tried allows a smaller list")


def test_auto_keeps_everything_where_all_images_count():
    rng = np.random.default_rng(0)
    labels = np.sort(rng.integers(0, 2, 200))
    pool = pool_of(rng.standard_normal((200, 60)) + 0.25 * labels[:, None], labels)
    result = tune(pool, None, recipes=[COVER, Candidate()], rounds=(1,), heads=Ridge(pool), tolerance=0.0)
    assert (result.keep, result.judgement, result.winner) == (1.0, None, RANDOM)
    assert report.sentence(result).startswith("keep everything: at 95% kept already the cost may be")


# --- what is written -------------------------------------------------------------------------------------------------


def test_the_files_hold_what_was_found(tmp_path):
    pool = modes()
    result = tune(pool, 0.1, recipes=[COVER, Candidate()], rounds=(1, 2), seeds=3, heads=Ridge(pool))
    written = report.save(tmp_path, result, "protoprune select …", {"device": "cpu"})
    assert sorted(written) == [str(tmp_path / name) for name in ("figure.png", "results.json", "table.csv")]
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["answer"] == report.sentence(result)
    assert content["judgement"]["to_random"]["difference"] == result.judgement.to_random.difference
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert len(table) == 5
    assert (tmp_path / "figure.png").stat().st_size > 5000
    random = next(row for row in report.rows(result) if row["recipe"] == "random")
    assert (random["to_random"], random["low"]) == (0.0, None)


def test_two_equal_differences_are_no_interval():
    gaps = [[0.5, 0.5], [0.75, 0.75], [0.75, 0.5]]  # random, and two recipes
    result = running.Tuned(
        0.5, [RANDOM, COVER, Candidate()], [halving.Standing(n, own, 2) for n, own in enumerate(gaps)],
        COVER, None, 10, "linear heads",
    )  # fmt: skip
    same, other = report.rows(result)[1:]
    assert (same["to_random"], same["low"], same["high"]) == (0.25, None, None)
    assert other["low"] < 0.125 < other["high"]


def test_nothing_beats_random_is_said_with_numbers():
    rng = np.random.default_rng(1)
    pool = pool_of(rng.standard_normal((200, 5)), np.sort(rng.integers(0, 2, 200)))
    result = tune(pool, 0.315, recipes=[Candidate()], rounds=(1,), seeds=4, heads=Ridge(pool))
    text = report.sentence(result)
    gap = 100 * result.judgement.random_to_everything.mean
    assert text.startswith(
        f"keep 31.5%: nothing beats random here, which is {abs(gap):.1f} {'below' if gap <= 0 else 'above'} "
        "everything; a random list is written (the best recipe, hard, is "
    )
    assert "points over random (" in text


def test_shapes_and_fractions_that_are_none():
    for labels, vectors, message in (
        ([0, 1], np.ones((3, 2)), r"shape \(2,\) and \(3, 2\) for 3 paths"),
        ([0, 1, 0], np.ones(3), r"and \(3,\) for 3 paths"),
        ([0, 1, 2], np.ones((3, 2)), "labels from 0 to 2: expected numbers of classes"),
    ):
        with pytest.raises(UsageError, match=message):
            Pool(["a", "b", "c"], np.array(labels), ["x", "y"], vectors)
    pool = pool_of(np.ones((40, 5)), np.arange(40) % 2)
    for keep in (float("nan"), float("inf"), 2):
        with pytest.raises(UsageError, match=f"--keep {keep}: expected the fraction to keep"):
            tune(pool, keep)
    with pytest.raises(UsageError, match="vectors of 5 numbers, and 4 of the test set"):
        tune(pool, 0.5, test=pool_of(np.ones((40, 4)), np.arange(40) % 2))


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        ({"keep": 0.01}, np.repeat([0, 1], 50), "--keep 0.01: a split of 100 images would keep 1, too few"),
        ({"keep": 0.5, "seeds": 1}, np.repeat([0, 1], 50), "--seeds 1: expected at least 2"),
        ({"keep": 0.5}, np.repeat([0, 1], [99, 1]), "two classes with two images or more"),
    ],
)
def test_what_cannot_be_compared_is_said(options, labels, message):
    pool = pool_of(np.random.default_rng(0).standard_normal((100, 3)), labels)
    with pytest.raises((UsageError, ProtopruneError), match=message):
        tune(pool, **options)


# --- without labels --------------------------------------------------------------------------------------------------


def brute(x: np.ndarray) -> np.ndarray:
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return x @ x.T


def test_coverage_duplicates_and_stability_are_those_of_brute_force():
    pool = modes()
    pool.vectors[7] = pool.vectors[1500]
    result = unlabelled.describe(pool, 0.1)
    cosine = brute(pool.vectors.astype(np.float64))
    np.fill_diagonal(cosine, -1)
    assert result.duplicates == pytest.approx((cosine.max(axis=1) > 0.95).mean())
    assert result.chance < 0.1 < result.consistency
    rows = {one.name: one for one in result.rows}
    assert rows["cover by cluster"].farness < rows["random"].farness < rows["hard"].farness
    for one in result.rows:
        assert 0 <= one.stability <= 1
        assert one.farthest >= one.farness
    blind = Pool(pool.paths, 1 - pool.labels, pool.classes, pool.vectors)
    assert unlabelled.describe(blind, 0.1) == result  # labels are not looked at
    assert rows["random"].stability < 0.25


def test_without_labels_images_of_zeros_are_left_out():
    """They have no cluster; `select` keeps none of them."""
    pool = modes()
    others = np.setdiff1d(np.arange(len(pool)), (3, 900))
    pool.vectors[[3, 900]] = 0
    part = Pool([pool.paths[row] for row in others], pool.labels[others], pool.classes, pool.vectors[others])
    assert unlabelled.describe(pool, 0.1) == unlabelled.describe(part, 0.1)
    with pytest.raises(UsageError, match="0 of 0 images"):
        unlabelled.describe(Pool(["a", "b"], np.full(2, -1), [], np.zeros((2, 3))), 0.5)


def test_every_recipe_has_a_place_among_the_candidates():
    found = candidates(50_000, 10, ["t.csv"])
    parts = itertools.product(("hard", "stratified"), (0.0, 0.5), (0.0, 0.1), (None, 40))
    for order, balance, dropped, k in parts:
        by = "class" if balance else None
        assert Candidate(order, by=by, balance=balance, drop_hardest=dropped, k=k) in found
    assert not {RANDOM, BALANCED} & set(found)
    assert list(running.FRACTIONS) == sorted(running.FRACTIONS, reverse=True)
