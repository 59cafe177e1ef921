"""Transfer: pruned fine-tuning of a pretrained model against training from scratch, and pruned pretraining.

(1) A model pretrained on one set is fine-tuned on hard or random parts of another, and the same model is trained on
them from scratch, at equal steps. (2) Pretraining on half of the first set, the half that is hardest by prototypes or a
random one, then fine-tuning on the whole of the other. Every seed has a pretraining, clusterings and draws of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from claims import Claim, bars, claim, fractions_axis, gap
from lab import Lab, accuracies, drawn, stratified_rows, subset, table_of, vectors_of

import protoprune
from protoprune import selection
from protoprune.clustering import prototypes
from protoprune.evaluation.runs import Run, steps_for
from protoprune.images.listing import list_paths
from protoprune.training import loop
from protoprune.training.examples import load_examples
from protoprune.training.loop import Recipe

STARTS = ("scratch", "pretrained")
HALVES = ("prototypes", "random")  # of the pretraining set
MARGIN = 0.01
SOURCE = "Sorscher et al. 2022"


def run(lab: Lab) -> list[Claim]:
    settings, recipe = lab.settings, lab.recipe()
    train, test = lab.some()
    vectors = lab.vectors(train)
    runs = [plan(lab, train, vectors, recipe, seed) for seed in range(lab.seeds)]
    found: dict[str, list] = {}
    for seed in range(lab.seeds):
        for start, path in {"scratch": None, **pretrained(lab, seed)}.items():
            mine = [one for one in runs[seed] if one.method.split(": ")[0] == start]
            how = recipe if path is None else lab.recipe(weights=str(path), **settings.get("fine_tune", {}))
            for method, outcomes in lab.outcomes(mine, train, test, how).items():
                found.setdefault(method, []).extend(outcomes)
    lab.save_table(table_of(found))
    draw(lab, accuracies(found))
    return claims(accuracies(found), settings["keep"])


def hard_rows(vectors: np.ndarray, classes: int, keep: float, paths, seed: int) -> np.ndarray:
    """The rows farthest from their prototypes."""
    score = prototypes.cluster(vectors, min(classes, len(vectors) // 10 or 1), seed=seed).distance
    return np.flatnonzero(selection.kept_mask(score, keep, ids=paths))


def plan(lab: Lab, train, vectors: np.ndarray, recipe: Recipe, seed: int) -> list[Run]:
    """The runs of a seed on the target set; methods are 'start: kind keep'."""
    n, steps = len(train), steps_for(len(train), recipe)
    runs = [Run(f"{start}: all 1", seed, None, None, steps) for start in (*STARTS, *HALVES)]
    for keep in lab.settings["keep"]:
        kinds = {
            "random": drawn(n, keep, seed),
            "hard": hard_rows(vectors, len(train.classes), keep, train.paths, seed),
        }
        for start in STARTS:
            runs += [Run(f"{start}: {kind} {keep:g}", seed, rows, None, steps) for kind, rows in kinds.items()]
    return runs


# --- pretraining -----------------------------------------------------------------------------------------------------


def pretrained(lab: Lab, seed: int) -> dict[str, Path]:
    """{'pretrained' (on all), 'prototypes', 'random'}: weights of this seed; what is there is not done again."""
    source, vectors = source_set(lab)
    settings = lab.settings
    recipe = Recipe.for_model(**settings["pretrain_recipe"])
    keep, n = settings["pretrain_keep"], len(source)
    kept = {
        "pretrained": None,
        "prototypes": hard_rows(vectors, len(source.classes), keep, source.paths, seed),
        "random": drawn(n, keep, seed),
    }
    return {name: weights_file(lab, source, recipe, rows, seed, name) for name, rows in kept.items()}


_sources: dict[str, tuple] = {}  # by folder: reading a set takes longer than anything else here


def source_set(lab: Lab):
    """The pretraining examples and their (n, d) embeddings."""
    settings = lab.settings
    folder = lab.folder_of(settings["pretrain_data"])
    folder = folder / "train" if (folder / "train").is_dir() else folder
    key = f"{folder} {settings['pretrain_images']} {lab.folder}"
    if key not in _sources:
        size = settings["pretrain_recipe"].get("image_size", 32)
        source = load_examples(folder, size)
        source = subset(source, stratified_rows(source.labels, min(settings["pretrain_images"], len(source)), 0))
        images = list_paths(source.paths, folder)
        features = load_examples(lab.embedded(images, f"{settings['pretrain_data']}-{len(source)}"))
        _sources[key] = source, vectors_of(features, source.paths)
    return _sources[key]


def weights_file(lab: Lab, source, recipe: Recipe, rows: np.ndarray | None, seed: int, name: str) -> Path:
    """Pretrain, with equal epochs: half of the images take half of the time."""
    kept = "" if rows is None else hashlib.sha256(np.ascontiguousarray(rows, np.int64).tobytes()).hexdigest()
    key = f"{source.fingerprint()} {recipe} {kept} {seed} {protoprune.__version__} {torch.__version__}"
    path = lab.shared / "weights" / f"{name}-{seed}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    if not path.exists():
        made = loop.fit(source, None, recipe, rows=rows, seed=seed, device=lab.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {tensor: value.cpu() for tensor, value in made.model.state_dict().items()}
        torch.save(state, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
        lab.say(f"pretrained on {name}, seed {seed}: {made.seconds:.0f} s")
    return path


# --- claims ----------------------------------------------------------------------------------------------------------


def loss(found: Mapping[str, Sequence[float]], start: str, kind: str, keep: float) -> np.ndarray:
    """Share of the accuracy on everything that pruning costs, (seeds,)."""
    return 1 - np.array(found[f"{start}: {kind} {keep:g}"]) / found[f"{start}: all 1"]


def claims(found: Mapping[str, Sequence[float]], keeps: list[float]) -> list[Claim]:
    """Verdicts from (seeds,) accuracies by 'start: kind keep'."""
    keep = 0.1 if 0.1 in keeps else min(keeps)
    made = []
    for kind in ("random", "hard"):
        losses = {start: loss(found, start, kind, keep) for start in STARTS}
        shown = ", ".join(f"{start} {100 * np.mean(values):.1f} %" for start, values in losses.items())
        text = f"A pretrained model loses less of its accuracy than one from scratch, {100 * keep:g} % kept ({kind})"
        smaller = {"": gap(losses["scratch"], losses["pretrained"])}
        made.append(claim(text, f"{SOURCE}, section 4", smaller, f"relative loss: {shown}; difference "))

    def between(one: str, other: str) -> dict:
        return {f"{one} less {other}": gap(found[f"{one}: all 1"], found[f"{other}: all 1"])}

    return [
        claim("Pretraining helps at all (the claims below need it to)", "check of the set-up",
              between("pretrained", "scratch")),
        *made,
        claim("Pretraining on the hardest 50 % by prototypes transfers as well as on all (margin 1 point)",
              f"{SOURCE}, section 5", between("prototypes", "pretrained"), margin=-MARGIN),
        claim("The 50 % chosen by prototypes pretrain better than a random 50 %", f"{SOURCE}, section 5",
              between("prototypes", "random")),
    ]  # fmt: skip


def draw(lab: Lab, found: dict[str, list[float]]) -> None:
    with lab.panels(8, 4, 2, width_ratios=(2, 1)) as (axes, right):
        keeps = sorted(lab.settings["keep"])
        for number, start in enumerate(STARTS):
            for kind, style in (("random", "-o"), ("hard", "--s")):
                values = [found[f"{start}: {kind} {keep:g}"] for keep in keeps] + [found[f"{start}: all 1"]]
                places = [100 * keep for keep in (*keeps, 1)]
                bars(axes, places, values, style, color=f"C{number}", label=f"{start}, {kind}")
        fractions_axis(
            axes, (*keeps, 1), xlabel="target images kept, %", ylabel=f"test accuracy, % ({lab.seeds} seeds)"
        )
        axes.legend(fontsize="x-small")
        names = ("scratch", "random", "prototypes", "pretrained")
        bars(right, range(4), [found[f"{name}: all 1"] for name in names], "o", color="C2")
        half = f"{100 * lab.settings['pretrain_keep']:g} %"
        right.set_xticks(range(4), ["nothing", f"{half}\nrandom", f"{half}\nhard", "all"])
        right.set(xlabel="pretrained on", title="all target images", xlim=(-0.5, 3.5))
