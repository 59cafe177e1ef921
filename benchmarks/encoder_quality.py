"""How good are an encoder's features? k-NN accuracy and centroid purity, without any training of a classifier.

python benchmarks/encoder_quality.py mini random raw hog --cifar10 DIR --photos DIR --json results.json

- CIFAR-10 (DIR/train, DIR/test, class folders): k-NN from the test images to the training images, and the purity of
  spherical k-means clusters of the training images: the percentage of images in the majority class of their cluster.
- Photographs: a folder of class folders, of which `mini` saw the first 150 (sorted) in training and this benchmark uses
  the others; of each class every second image is gallery, the rest are queries.
- k-NN is the weighted kind of the DINO paper: 20 neighbours by cosine, one of similarity s votes with exp(s / 0.07).
- `random` is mini's architecture with random weights, `raw` the pixels at 32 x 32, `hog` a colour histogram and
  histograms of oriented gradients at 32 x 32. Any other name is given to protoprune.encoders.load_encoder.
Decoding is timed apart from encoding; `images/s` is encoding alone, on --threads threads, batches of 32.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np
import torch

from protoprune.embedding.pipeline import embed
from protoprune.encoders import load_encoder
from protoprune.features.featurefile import FeatureFile
from protoprune.images.decode import Preprocess, decode
from protoprune.images.listing import list_paths

BATCH = 32


class Contender(NamedTuple):
    preprocess: Preprocess
    encode: Callable  # normalised float32 (B, 3, size, size) -> (B, d)


# --- encoders


def contender(name: str) -> Contender:
    if name == "raw":
        return Contender(Preprocess(32, 32, mean=(0.5,) * 3, std=(0.5,) * 3), lambda batch: batch.flatten(1))
    if name == "hog":
        return Contender(
            Preprocess(32, 32), lambda batch: torch.from_numpy(np.stack([describe(i) for i in batch.numpy()]))
        )
    encoder = load_encoder("mini" if name == "random" else name)
    return Contender(encoder.preprocess, random_mini() if name == "random" else encoder)


def random_mini() -> torch.nn.Module:
    from protoprune.encoders.mini import MiniEncoder

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return MiniEncoder().eval()


def describe(image: np.ndarray) -> np.ndarray:
    """0..1 (3, 32, 32) -> colour histogram (8 bins a channel) and HOG (9 directions, 8-pixel cells), length 1 each."""
    from skimage.feature import hog

    colours = np.concatenate([np.histogram(channel, 8, (0, 1))[0] for channel in image])
    colours = np.sqrt(colours / colours.sum())
    gradients = hog(image, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=0)
    return np.concatenate([colours, gradients / max(np.linalg.norm(gradients), 1e-6)]).astype(np.float32)


# --- data


def class_folders(root: Path, start: int = 0, per_class: int | None = None) -> tuple[list[Path], np.ndarray]:
    """The first per_class images of each class folder but the first `start`, and the number of each one's folder."""
    folders = sorted(folder for folder in root.iterdir() if folder.is_dir())[start:]
    pairs = [(file, label) for label, folder in enumerate(folders) for file in sorted(folder.iterdir())[:per_class]]
    if not pairs:
        raise SystemExit(f"{root}: no class folders with images (after the first {start})")
    return [file for file, _ in pairs], np.array([label for _, label in pairs])


@torch.inference_mode()
def features(files: list[Path], encoder: Contender, pool: ThreadPoolExecutor) -> tuple[np.ndarray, float]:
    """(n, d) features of length 1 and the seconds spent encoding."""
    own = encoder.preprocess
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (own.mean, own.std))
    rows, seconds = [], 0.0
    for start in range(0, len(files), BATCH):
        batch = np.stack(
            list(pool.map(lambda file: own.apply(decode(file.read_bytes())), files[start : start + BATCH]))
        )
        batch = (torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255 - mean) / std
        begin = time.perf_counter()
        rows.append(torch.as_tensor(encoder.encode(batch)).float())
        seconds += time.perf_counter() - begin
    return torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy(), seconds


# --- measures


def knn(gallery: np.ndarray, gallery_labels: np.ndarray, queries: np.ndarray, labels: np.ndarray, k: int = 20) -> float:
    """Percent of queries named rightly by k neighbours with votes exp(cosine / 0.07)."""
    gallery, neighbour_labels, right = torch.from_numpy(gallery).T, torch.from_numpy(gallery_labels), 0
    for start in range(0, len(queries), 500):
        similarity, index = (torch.from_numpy(queries[start : start + 500]) @ gallery).topk(k, dim=1)
        neighbours = neighbour_labels[index]
        votes = torch.zeros(len(index), int(gallery_labels.max()) + 1).scatter_add_(
            1, neighbours, (similarity / 0.07).exp()
        )
        right += int((votes.argmax(1).numpy() == labels[start : start + 500]).sum())
    return 100 * right / len(queries)


def purity(points: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Percent of points in the majority class of their cluster; spherical k-means, 20 iterations, seed 0."""
    clustering = faiss.Kmeans(points.shape[1], k, niter=20, spherical=True, seed=0, max_points_per_centroid=len(points))
    clustering.train(points)
    cluster = (clustering.centroids @ points.T).argmax(0)
    counts = np.zeros((k, labels.max() + 1), int)
    np.add.at(counts, (cluster, labels), 1)
    return 100 * counts.max(1).sum() / len(points)


def measure_cifar10(encoder: Contender, root: Path, per_class: int | None, pool: ThreadPoolExecutor) -> dict:
    train_files, train_labels = class_folders(root / "train", 0, per_class)
    test_files, test_labels = class_folders(root / "test", 0, per_class)
    train, seconds = features(train_files, encoder, pool)
    test, _ = features(test_files, encoder, pool)
    accuracy = knn(train, train_labels, test, test_labels)
    result = {"dim": train.shape[1], "images/s": len(train) / seconds}
    result |= {f"CIFAR-10 k-NN ({len(train)} / {len(test)})": accuracy}
    return result | {f"purity k={k}": purity(train, train_labels, k) for k in (10, 100, 1000)}


def measure_photos(encoder: Contender, root: Path, skip: int, pool: ThreadPoolExecutor) -> dict:
    files, labels = class_folders(root, skip)
    points, seconds = features(files, encoder, pool)
    accuracy = knn(points[::2], labels[::2], points[1::2], labels[1::2])
    result = {"dim": points.shape[1], "images/s": len(points) / seconds}
    return result | {f"photos k-NN ({len(points)} of {labels.max() + 1} classes)": accuracy}


def measure_pair(name: str, gallery: Path, queries: Path, counts: tuple[int, int]) -> dict:
    """k-NN of one folder's images among another's (or, for the same folder, of the images after the gallery's), as
    `protoprune embed` gives their features: its precision on this machine, stored as float16."""
    first, second = class_folders(gallery, 0, counts[0] or None), class_folders(queries, 0, counts[1] or None)
    if gallery == queries:
        files, labels = class_folders(gallery, 0, sum(counts))
        place = np.concatenate([np.arange(count) for count in np.bincount(labels)])
        first, second = (
            ([files[i] for i in np.flatnonzero(mask)], labels[mask]) for mask in (place < counts[0], place >= counts[0])
        )
    encoder = load_encoder(name)
    with tempfile.TemporaryDirectory() as scratch:
        points = []
        for files, _ in (first, second):
            images = list_paths([str(file.resolve()) for file in files])
            embed(images, encoder, f"{scratch}/{len(points)}.h5")
            with FeatureFile(f"{scratch}/{len(points)}.h5") as file:
                row = {path: i for i, path in enumerate(file.paths)}
                order = [row[os.path.relpath(f.resolve(), images.root)] for f in files]
                rows = file.features[:].astype(np.float32)[order]
            points.append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    accuracy = knn(points[0], first[1], points[1], second[1])
    error = (accuracy * (100 - accuracy) / len(points[1])) ** 0.5
    return {"dim": encoder.dim, "gallery": len(points[0]), "queries": len(points[1]), "k-NN %": accuracy, "se": error}


def table(results: list[dict]) -> str:
    columns = list(results[0])
    rows = [[format(row[c], ".1f") if isinstance(row[c], float) else str(row[c]) for c in columns] for row in results]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [columns, ["---"] * len(columns), *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoders", nargs="+")
    parser.add_argument("--cifar10", type=Path, help="folder with train/ and test/")
    parser.add_argument("--photos", type=Path, help="folder of class folders")
    parser.add_argument("--skip-classes", type=int, default=150, help="class folders mini was trained on")
    parser.add_argument("--per-class", type=int, help="at most this many CIFAR-10 images a class, for a quick look")
    parser.add_argument(
        "--pair", nargs=3, action="append", default=[], metavar=("GALLERY", "QUERIES", "COUNTS"),
        help="two folders of class folders and the images a class of each, as 800,200; 0 for all",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    if not (options.cifar10 or options.photos or options.pair):
        parser.error("give --cifar10, --photos or --pair")
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    results = []
    with ThreadPoolExecutor(options.threads) as pool:
        for name in options.encoders:
            for gallery, queries, counts in options.pair:
                one = measure_pair(name, Path(gallery), Path(queries), tuple(map(int, counts.split(","))))
                print(table([{"encoder": name, "set": gallery} | one]), flush=True)
            if not (options.cifar10 or options.photos):
                continue
            encoder, result = contender(name), {"encoder": name}
            if options.cifar10:
                result |= measure_cifar10(encoder, options.cifar10, options.per_class, pool)
            if options.photos:
                result |= measure_photos(encoder, options.photos, options.skip_classes, pool)
            results.append(result)
    if results:
        print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
