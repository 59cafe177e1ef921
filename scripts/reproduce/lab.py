"""What the experiments share: settings, data sets, features, results, claims."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from protoprune.errors import ProtopruneError, UsageError
from protoprune.evaluation import report as reports
from protoprune.files import table_csv, write_file
from protoprune.training.examples import Examples, load_examples, subset
from protoprune.training.loop import Recipe

__all__ = ["Claim", "Lab", "held_out", "interval_text", "report", "stratified_rows", "subset"]
VERDICTS = ("holds", "does not hold", "undecided")


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what was found here."""

    claim: str  # as one sentence
    source: str  # paper and figure or section
    found: str  # numbers, with intervals and n
    verdict: str  # one of VERDICTS

    def __post_init__(self):
        assert self.verdict in VERDICTS, self.verdict


@dataclass
class Lab:
    """One experiment: its settings and where it finds and leaves things."""

    name: str
    size: str
    settings: dict  # of configs/NAME.toml, the part for this size
    data: Path
    folder: Path  # results/NAME
    device: str
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def open(
        cls, name: str, size: str, data: Path, results: Path, configs: Path, device: str, dataset: str | None = None
    ) -> Lab:
        """The experiment as its configuration has it; `dataset` takes the place of its `data`, in a folder of its own.

        Raises ProtopruneError for a configuration that is not there, cannot be read, or has no data set to replace.
        """
        path = configs / f"{name}.toml"
        try:
            settings = tomllib.loads(path.read_text())[size]
        except FileNotFoundError:
            raise UsageError(f"{path}: no such configuration") from None
        except (tomllib.TOMLDecodeError, KeyError) as error:
            raise ProtopruneError(f"{path}: cannot be read as a configuration with [{size}] ({error})") from None
        folder = results / (name if size == "small" else f"{name}-{size}")
        if dataset is not None and "data" not in settings:
            raise UsageError(f"--dataset {dataset}: the experiment {name} has no data set that could be replaced")
        if dataset is not None and dataset != settings["data"]:
            settings, folder = {**settings, "data": dataset}, folder.with_name(f"{folder.name}-{dataset}")
        folder.mkdir(parents=True, exist_ok=True)
        return cls(name, size, settings, data, folder, device)

    @property
    def runs(self) -> Path:
        """Where single training runs are kept, so that a second call resumes."""
        return self.folder / "runs"

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
        kept = self.folder.parent / "pixels"
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
        from protoprune.images import list_folder, list_paths

        if not self.unsplit(name):
            return list_folder(self.splits(name)[split != "train"])
        whole = list_folder(self.folder_of(name))
        test = held_out(whole.labels)
        rows = np.flatnonzero(test if split != "train" else ~test)
        return list_paths([whole.paths[row] for row in rows], whole.root)

    def feature_file(self, name: str, split: str) -> Path:
        """The feature file of one split, made where it is not there yet."""
        from protoprune.embedding import embed
        from protoprune.encoders import load_encoder

        encoder = self.settings.get("encoder", "mini")
        out = self.folder.parent / "features" / f"{name}-{split}-{encoder}.h5"
        out.parent.mkdir(parents=True, exist_ok=True)
        images = self.image_list(name, split)
        shown = time.monotonic()

        def progress(done: int, failed: int) -> None:
            nonlocal shown
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                self.say(f"embed {name}/{split}: {done:,} of {len(images):,}")

        embed(images, load_encoder(encoder), out, device=self.device, on_progress=progress)
        return out

    def save_table(self, rows: Sequence[dict], name: str = "table") -> None:
        """results/NAME/<name>.csv from dicts of plain values."""
        write_file(self.folder / f"{name}.csv", table_csv(rows))

    def save_figure(self, figure, name: str = "figure") -> None:
        """results/NAME/<name>.png from a matplotlib figure."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
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


def interval_text(mean: float, low: float | None, high: float | None, unit: float = 100) -> str:
    """'+1.20 (+0.40 to +2.00)', a difference of accuracies in points; with one seed the mean alone."""
    span = "" if low is None or high is None else f" ({unit * low:+.2f} to {unit * high:+.2f})"
    return f"{unit * mean:+.2f}{span}"


def report(lab: Lab, claims: Sequence[Claim]) -> None:
    """results.json, and the claims on stdout."""
    result = {
        "experiment": lab.name, "size": lab.size, "settings": lab.settings,
        "environment": reports.environment(lab.device), "seconds": round(time.perf_counter() - lab.started, 1),
        "claims": [asdict(claim) for claim in claims],
    }  # fmt: skip
    write_file(lab.folder / "results.json", (json.dumps(result, indent=1) + "\n").encode())
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
