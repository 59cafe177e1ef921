"""What the experiments share: settings, data sets, features, EL2N, training runs, results."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from claims import VERDICTS, Claim

from protoprune.errors import ProtopruneError, UsageError
from protoprune.evaluation import report as reports
from protoprune.evaluation.runs import Outcome, Run, kept_count, random_rows, run_all
from protoprune.evaluation.statistics import mean_interval
from protoprune.files import table_csv, write_file
from protoprune.metrics.catalogue import score
from protoprune.records import Record
from protoprune.training import recording
from protoprune.training.examples import Examples, load_examples, subset
from protoprune.training.loop import Recipe


@dataclass
class Lab:
    """One experiment on one set: its settings and where it finds and leaves things."""

    name: str
    size: str
    settings: dict  # of configs/NAME.toml, the part for this size and set
    data: Path
    folder: Path  # results/NAME, or a folder in it for each set
    device: str
    home: Path | None = None  # results/NAME, where sets share training runs; default: folder
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def open(
        cls,
        name: str,
        size: str,
        data: Path,
        results: Path,
        configs: Path,
        device: str,
        dataset: str | None = None,
        encoder: str | None = None,
    ) -> Iterator[Lab]:
        """The experiment as its configuration has it: once, or once for each of its parts, whose settings take the
        place of the others. `dataset` and `encoder` leave those with it, or put it into the first where there is none.

        Raises ProtopruneError for a configuration that is not there, cannot be read, or has no data set to replace.
        """
        path = configs / f"{name}.toml"
        try:
            settings = tomllib.loads(path.read_text())[size]
        except FileNotFoundError:
            raise UsageError(f"{path}: no such configuration") from None
        except (tomllib.TOMLDecodeError, KeyError) as error:
            raise ProtopruneError(f"{path}: cannot be read as a configuration with [{size}] ({error})") from None
        home = results / (name if size == "small" else f"{name}-{size}")
        several = settings.pop("part", [])
        parts = [settings | one for one in several or [{}]]
        if dataset is not None and "data" not in parts[0]:
            raise UsageError(f"--dataset {dataset}: the experiment {name} has no data set that could be replaced")
        for key, wanted in (("data", dataset), ("encoder", encoder)):
            if wanted is not None:
                parts = [one for one in parts if one.get(key) == wanted] or [parts[0] | {key: wanted}]
        split = bool(several or dataset or encoder)
        return (cls(name, size, one, data, home / set_name(one) if split else home, device, home) for one in parts)

    def __post_init__(self):
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def runs(self) -> Path:
        """Where single training runs are kept, so that a second call resumes."""
        return self.shared / "runs"

    @property
    def shared(self) -> Path:
        """results/NAME, of all parts of the experiment."""
        return self.home or self.folder

    @property
    def results(self) -> Path:
        """The folder of all experiments."""
        return self.shared.parent

    @property
    def seeds(self) -> int:
        return self.settings["seeds"]

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def progress(self, step) -> None:
        """For `on_run`: a line after each training run done here."""
        if not step.outcome.cached:
            left = f", {step.seconds_left / 60:.0f} min left" if step.seconds_left else ""
            accuracy = 100 * step.outcome.accuracy
            self.say(f"run {step.done}/{step.total}: {step.run.method}, seed {step.run.seed}: {accuracy:.2f} %{left}")

    def recipe(self, part: str = "recipe", **changes) -> Recipe:
        """The training recipe of the settings, with changes. `part = "probe"` is that of the models whose mistakes rank
        the images, where there is one of its own: a converged head has no course of training that could be read."""
        given = {**self.settings.get(part, self.settings.get("recipe", {})), **changes}
        return Recipe.for_model(given.pop("model"), **given)

    def sets(self) -> tuple[Examples, Examples]:
        """(training, test) examples of the settings' data set: vectors for a head, pixels for a network."""
        recipe, name = self.recipe(), self.settings["data"]
        return self.features(name) if recipe.model == "head" else self.images(name, image_size=recipe.image_size)

    def some(self) -> tuple[Examples, Examples]:
        """The same of as many images as the settings ask for, with the classes as even as they come."""
        counts = self.settings["images"], self.settings["test_images"]
        train, test = (
            subset(one, stratified_rows(one.labels, count, 0)) for one, count in zip(self.sets(), counts, strict=True)
        )
        return train, test

    def vectors(self, train: Examples) -> np.ndarray:
        """(n, d) float32 features of these training images by the encoder of the settings, in their order."""
        return vectors_of(train if train.vectors else self.features(self.settings["data"])[0], train.paths)

    def initial(self, n: int, seed: int) -> np.ndarray:
        """Rows before pruning, drawn for the seed: `images` of the settings, a number or, up to 1, a share."""
        images = self.settings.get("images", 1.0)
        return random_rows(n, round(images * n) if images <= 1 else images, seed)

    def el2n(
        self, train: Examples, test: Examples, *, epochs: int, models: int, seed: int = 0
    ) -> tuple[np.ndarray, float]:
        """((n,) scores of the training images, larger = harder; mean test accuracy) of models that are trained briefly
        by the `probe` recipe, on all images. Recorded once, then read.

        The epochs are few, as EL2N is a measure of early training (Paul et al. 2021).
        """
        recipe = self.recipe("probe", epochs=epochs)
        plan = recording.plan(train, test, recipe, models=models, every=epochs, seed=seed)
        made_by = repr((recipe, models, seed, train.fingerprint(), test.fingerprint()))
        out = self.shared / "el2n" / f"{hashlib.sha256(made_by.encode()).hexdigest()[:16]}.h5"
        out.parent.mkdir(parents=True, exist_ok=True)
        if not out.exists():
            self.say(f"EL2N of {models} models, {epochs} epochs of {len(train):,} images")
        recording.record(train, test, recipe, out, plan, seed=seed, device=self.device)
        with Record(out) as record:
            accuracy = float(np.mean(record.test_prediction == record.test_labels))
            return score("el2n", record, epoch=epochs, models="all").values.astype(np.float64), accuracy

    def outcomes(
        self, runs: Sequence[Run], train: Examples, test: Examples, recipe: Recipe, **options
    ) -> dict[str, list[Outcome]]:
        """{method: outcomes in the order of its seeds}; finished runs are not done again."""
        how = {"folder": self.runs, "device": self.device, "on_run": self.progress}
        found: dict[str, list[Outcome]] = {}
        for run, outcome in zip(runs, run_all(runs, train, test, recipe, **how, **options), strict=True):
            found.setdefault(run.method, []).append(outcome)
        return found

    def accuracies(
        self, runs: Sequence[Run], train: Examples, test: Examples, recipe: Recipe | None = None
    ) -> dict[str, np.ndarray]:
        """{method: (seeds,)} of runs, with their table."""
        found = self.outcomes(runs, train, test, recipe or self.recipe())
        self.save_table(table_of(found))
        return accuracies(found)

    def folder_of(self, name: str) -> Path:
        """The folder of a data set, downloaded where there is a network and torchvision has it.

        Raises ProtopruneError with one line when it is not there.
        """
        folder = self.data / name
        if not folder.is_dir():
            _download(name, self.data)
        return folder

    def images(self, name: str, *, image_size: int = 32) -> tuple[Examples, Examples]:
        """(training, test) pixels of a data set with folders train/ and test/ (or val/), or split by `held_out`."""
        if self.unsplit(name):
            whole = load_examples(self.folder_of(name), image_size)
            test = held_out(whole.labels)
            return subset(whole, np.flatnonzero(~test)), subset(whole, np.flatnonzero(test))
        train, test = self.splits(name)
        kept = self.results / "pixels"
        caches = [None, None]
        if image_size > 64:  # ImageNet at 224 is 193 GB: files that are mapped into memory
            kept.mkdir(parents=True, exist_ok=True)
            caches = [kept / f"{name}-{part}-{image_size}.npy" for part in ("train", "test")]
        first = load_examples(train, image_size, cache=caches[0])
        return first, load_examples(test, image_size, classes=first.classes, cache=caches[1])

    def features(self, name: str) -> tuple[Examples, Examples]:
        """(training, test) vectors of a data set, embedded by the encoder of the settings, once."""
        first = load_examples(self.feature_file(name, "train"))
        return first, load_examples(self.feature_file(name, "test"), classes=first.classes)

    def splits(self, name: str) -> tuple[Path, Path]:
        folder = self.folder_of(name)
        test = folder / "test" if (folder / "test").is_dir() else folder / "val"
        for part in (folder / "train", test):
            if not part.is_dir():
                raise ProtopruneError(f"{part}: no such folder; {name} needs train/ and test/ with a folder a class")
        return folder / "train", test

    def unsplit(self, name: str) -> bool:
        """Whether a data set is one folder of class folders, without train/."""
        folder = self.folder_of(name)
        return not (folder / "train").is_dir() and sum(one.is_dir() for one in folder.iterdir()) > 2

    def image_list(self, name: str, split: str):
        """The `ImageList` of one split."""
        from protoprune.images.listing import list_folder, list_paths

        if not self.unsplit(name):
            return list_folder(self.splits(name)[split != "train"])
        whole = list_folder(self.folder_of(name))
        test = held_out(whole.labels)
        rows = np.flatnonzero(test if split != "train" else ~test)
        return list_paths([whole.paths[row] for row in rows], whole.root)

    def feature_file(self, name: str, split: str) -> Path:
        """The feature file of one split, made where it is not there yet."""
        return self.embedded(self.image_list(name, split), f"{name}-{split}")

    def embedded(self, images, name: str) -> Path:
        """The feature file of these images, an `ImageList`, by the encoder of the settings."""
        from protoprune.embedding.pipeline import embed
        from protoprune.encoders import load_encoder

        encoder = self.settings.get("encoder", "mini")
        out = self.results / "features" / f"{name}-{encoder}.h5"
        out.parent.mkdir(parents=True, exist_ok=True)
        say = self.now_and_then(lambda done: f"embed {name}: {done:,} of {len(images):,}")
        embed(images, load_encoder(encoder), out, device=self.device, on_progress=lambda done, failed: say(done))
        return out

    def now_and_then(self, text: Callable[[int], str]) -> Callable[[int], None]:
        """For `on_progress`: says `text(done)` every ten seconds."""
        shown = time.monotonic()

        def progress(done: int) -> None:
            nonlocal shown
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                self.say(text(done))

        return progress

    def save_table(self, rows: Sequence[dict], name: str = "table") -> None:
        """results/NAME/<name>.csv from dicts of plain values."""
        write_file(self.folder / f"{name}.csv", table_csv(rows))

    @contextlib.contextmanager
    def panels(
        self, width: float, height: float, count: int = 1, *, across: int | None = None, name: str = "figure", **how
    ) -> Iterator:
        """(count,) axes, `across` side by side (default: all), of a figure that becomes results/NAME/<name>.png.

        `how` is for `subplots`.
        """
        from matplotlib.figure import Figure

        figure, buffer = Figure(figsize=(width, height), layout="constrained"), io.BytesIO()
        across = min(across or count, count)
        axes = figure.subplots(-(-count // across), across, squeeze=False, **how).ravel()
        for spare in axes[count:]:
            spare.set_visible(False)
        yield axes[:count]
        figure.savefig(buffer, format="png", dpi=120)
        write_file(self.folder / f"{name}.png", buffer.getvalue())


def held_out(labels: np.ndarray, share: float = 0.2) -> np.ndarray:
    """(n,) bool: the last `share` of each class in order of path, rounded down: the test split of a set without one."""
    labels = np.asarray(labels)
    test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        test[own[len(own) - int(share * len(own)) :]] = True
    return test


def stratified_rows(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count,) random rows, ascending, with the classes as even as they come: the first of one order a seed."""
    order = np.random.default_rng([seed, 77]).permutation(len(labels))
    place = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        own = order[labels[order] == label]
        place[own] = np.arange(len(own))
    return np.sort(order[np.argsort(place[order], kind="stable")][:count])


def vectors_of(source: Examples, paths: Sequence[str]) -> np.ndarray:
    """(n, d) float32 of examples that are vectors, those of these paths, in their order."""
    row_of = {path: row for row, path in enumerate(source.paths)}
    return source.inputs.numpy()[[row_of[path] for path in paths]]


def drawn(n: int, keep: float, seed: int) -> np.ndarray:
    """Rows of a random list of a fraction."""
    return random_rows(n, kept_count(keep, n), seed)


def accuracies(found: Mapping[str, Sequence[Outcome]]) -> dict[str, np.ndarray]:
    """{method: (seeds,)} of the outcomes of methods."""
    return {method: np.array([one.accuracy for one in outcomes]) for method, outcomes in found.items()}


def table_of(found: Mapping[str, Sequence[Outcome]]) -> list[dict]:
    """One row a method, for `Lab.save_table`."""
    table = []
    for method, outcomes in found.items():
        one = mean_interval([outcome.accuracy for outcome in outcomes])
        table.append({
            "method": method, "seeds": one.n, "steps": outcomes[0].steps, "accuracy": one.mean,
            "accuracy_low": one.low, "accuracy_high": one.high,
            "seconds": float(np.median([outcome.seconds for outcome in outcomes])),
        })  # fmt: skip
    return table


def set_name(settings: Mapping) -> str:
    """'cifar10-lite0', with the model where it is a network: the folder of a set's results."""
    model = settings.get("recipe", {}).get("model", "head")
    return "-".join([settings["data"], settings.get("encoder", "mini"), *([] if model == "head" else [model])])


def report(lab: Lab, claims: Sequence[Claim]) -> None:
    """results.json, and the claims on stdout."""
    result = {
        "experiment": lab.name, "size": lab.size, "settings": lab.settings,
        "environment": reports.environment(lab.device), "seconds": round(time.perf_counter() - lab.started, 1),
        "claims": [asdict(claim) for claim in claims],
    }  # fmt: skip
    write_file(lab.folder / "results.json", (json.dumps(result, indent=1) + "\n").encode())
    print(f"{lab.name}{'' if lab.shared == lab.folder else ', ' + lab.folder.name}:")
    for claim in claims:
        print(f"{claim.verdict.upper()}: {claim.claim} [{claim.source}]")
        print(f"    found: {claim.found}")
    counts = ", ".join(f"{sum(c.verdict == v for c in claims)} {v}" for v in VERDICTS)
    print(f"{lab.name} ({lab.size}): {counts}; {result['seconds']:.0f} s; see {lab.folder}{os.sep}")


def _download(name: str, data: Path) -> None:
    """CIFAR-10, CIFAR-100 or SVHN from torchvision's addresses, written out as PNG files in class folders."""
    kinds = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN"}
    hint = f"put its images there as {data / name}/train/<class>/… and {data / name}/test/<class>/…"
    if name not in kinds:
        raise ProtopruneError(f"{data / name}: no such data set; {hint}, or name its parent with DATA=folder")
    import torchvision

    downloaded = data / "downloads"
    print(f"{data / name}: not there; downloading {kinds[name]}", file=sys.stderr)
    try:
        kind = getattr(torchvision.datasets, kinds[name])
        splits = {"train": True, "test": False} if name != "svhn" else {"train": "train", "test": "test"}
        sets = {
            part: kind(downloaded, download=True, **({"split": value} if name == "svhn" else {"train": value}))
            for part, value in splits.items()
        }
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise ProtopruneError(f"{name} cannot be downloaded ({reason}); {hint}") from None
    building = data / f"{name}.partial"
    for part, images in sets.items():
        names = getattr(images, "classes", [str(number) for number in range(10)])
        for number, (image, label) in enumerate(images):
            path = building / part / str(names[label]) / f"{number:06d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    building.rename(data / name)
