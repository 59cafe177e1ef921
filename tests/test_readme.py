"""Every example of the README and of docs/ runs: each fenced block after a `<!-- run: name -->` marker, with images."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from helpers import format_list
from PIL import Image

import protoprune
from protoprune.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = "\n".join([README, *(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))])
FOUND = re.findall(r"<!-- run: (\w+) -->\n```\w+\n(.*?)```", PAGES, re.DOTALL)
BLOCKS = dict(FOUND)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """(a folder, its copy): images/ with two classes, features.h5 and kept.txt as the README's first two commands leave
    them. The file of features knows where the images lie, so that every test has its turn in the first."""
    folder = tmp_path_factory.mktemp("readme") / "here"
    rng = np.random.default_rng(0)
    for i in range(20):
        path = folder / "images" / f"c{i % 2}" / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (24, 24, 3), np.uint8)).save(path)
    encoder = protoprune.load_encoder("mini")
    protoprune.embed(protoprune.list_folder(folder / "images"), encoder, folder / "features.h5", device="cpu")
    kept = protoprune.select(folder / "features.h5", keep=0.7).kept_paths
    (folder / "kept.txt").write_text("".join(f"{path}\n" for path in kept))
    return folder, shutil.copytree(folder, folder.with_name("copy"))


@pytest.fixture
def here(embedded, monkeypatch):
    """The list of the kept images, in the folder as it was embedded."""
    folder, copy = embedded
    shutil.rmtree(folder)
    monkeypatch.chdir(shutil.copytree(copy, folder))
    return Path("kept.txt").read_text().splitlines()


def run_block(name, **given):
    exec(compile(BLOCKS[name], f"README: {name}", "exec"), given)
    return given


def in_shell(name, replace=()):
    commands = [line[2:] for line in BLOCKS[name].splitlines() if line.startswith("$ ")]
    script = "\n".join(commands)
    for old, new in replace:
        script = script.replace(old, new)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], check=True, env={**os.environ, "PATH": path})


def test_torchvision(here):
    given = run_block("torchvision")
    assert sorted(f"c{label}" for _, label in given["kept"]) == sorted(path.partition("/")[0] for path in here)


def test_bar(here, capsys):
    os.unlink("features.h5")
    given = run_block("bar")
    assert (given["bar"].n, given["bar"].total) == (given["report"].n,) * 2
    assert "100%" in capsys.readouterr().err


def test_evaluate_python(here, capsys):
    shutil.copy("features.h5", "test.h5")
    given = run_block("evaluate_python")
    method = given["result"].method("kept.txt")
    assert (method.kept, len(given["result"].seeds)) == (len(here), 5)
    assert capsys.readouterr().out == method.verdict + "\n"
    assert "random" in method.verdict


def test_reshard(here):
    in_shell("reshard")
    names = []
    for path in sorted(Path("pruned").glob("*.tar")):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    assert names == sorted(here)


def test_tables(here):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    Path("data").mkdir()
    for part in range(2):
        table = pyarrow.table({"value": [10 * part + row for row in range(4)]})
        parquet.write_table(table, f"data/train-{part}.parquet")
    Path("kept-rows.txt").write_text("train-0.parquet/000003\ntrain-1.parquet/000000\n")
    assert list(run_block("tables")["kept"]["value"]) == [3, 10]


def test_any_data_set(here):
    names = sorted((str(path) for path in Path("images").rglob("*.png")), key=lambda path: path[::-1])
    given = run_block("any_data_set", my_dataset=[*map(str.upper, names)], my_paths=names)
    assert sorted(item.lower() for item in given["kept"]) == [f"images/{path}" for path in here]


def test_coco(here):
    paths = sorted(str(path.relative_to("images")) for path in Path("images").rglob("*.png"))
    coco = {
        "images": [{"id": 7 * place, "file_name": path} for place, path in enumerate(paths)],
        "annotations": [{"id": place, "image_id": 7 * (place % 20)} for place in range(60)],
        "categories": [{"id": 1, "name": "thing"}],
    }
    Path("annotations.json").write_text(json.dumps(coco))
    run_block("coco")
    kept = json.loads(Path("kept.json").read_text())
    assert [one["file_name"] for one in kept["images"]] == here
    assert kept["categories"] == coco["categories"]
    wanted = [7 * paths.index(path) for path in here]
    assert sorted(one["image_id"] for one in kept["annotations"]) == sorted(3 * wanted)


def test_subset(here):
    result = protoprune.select(keep=0.7)
    np.save("kept.npy", np.flatnonzero(result.keep))
    given = run_block("subset", my_dataset=sorted(str(p.relative_to("images")) for p in Path("images").rglob("*.png")))
    assert list(given["kept"]) == here


def test_subset_of_image_folder(here):
    """Also where class names sort otherwise than paths do."""
    os.rename("images/c0", "images/car")
    os.rename("images/c1", "images/car-toy")
    protoprune.embed(protoprune.list_folder("images"), protoprune.load_encoder("mini"), "cars.h5", device="cpu")
    result = protoprune.select("cars.h5", keep=0.7)
    np.save("kept.npy", np.flatnonzero(result.keep))
    given = run_block("subset_of_image_folder")
    samples = [given["dataset"].samples[index][0] for index in given["kept"].indices]
    assert sorted(os.path.relpath(path, "images") for path in samples) == result.kept_paths


def test_weights(here):
    """Every kept image comes with its own weight, and the weighted mean of the loss is that over all images."""
    import torch

    chosen = protoprune.select(keep=0.7, calibrate=0.5)
    rows = np.flatnonzero(chosen.keep)
    Path("kept.csv").write_bytes(
        format_list(chosen.kept_paths, rows, chosen.ranking.scores[rows], "csv", weights=chosen.weights[rows])
    )
    given = run_block("weights")
    assert sorted(given["weights"].tolist()) == pytest.approx([1.0] * 7 + [13 / 7] * 7)
    by_path = dict(zip(chosen.kept_paths, chosen.weights[rows], strict=True))
    samples = [given["kept"].dataset.samples[index][0] for index in given["kept"].indices]
    paired = [
        (os.path.relpath(path, "images"), weight) for path, (_, weight) in zip(samples, given["weighted"], strict=True)
    ]
    assert dict(paired) == pytest.approx(by_path)
    torch.manual_seed(0)
    sampler = given["drawn"].sampler
    sampler.num_samples = 4000
    counts = np.bincount(list(sampler), minlength=14) / 4000
    assert counts == pytest.approx(given["weights"] / 20, abs=0.02)


def test_own_encoder(here):
    report = run_block("own_encoder")["report"]
    assert (report.n, report.embedded, report.failed) == (20, 20, 0)
    with protoprune.FeatureFile("colours.h5") as file:
        features = file.features[:].astype(np.float32)
    path = "images/c0/00.png"
    pixels = np.asarray(Image.open(path).resize((36, 36), Image.Resampling.BICUBIC), np.float32)[2:34, 2:34] / 255
    parts = pixels.reshape(2, 16, 2, 16, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    np.testing.assert_allclose(features[0], parts.ravel(), atol=0.01)


def test_timm(here):
    """Through the links timm's own folder reader finds the kept images and the same classes."""
    from timm.data import create_dataset

    in_shell("timm", [("python train.py", "true python train.py")])
    root, *words = BLOCKS["timm"].partition("train.py")[2].split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    dataset = create_dataset("", root=root, split=options["--train-split"], class_map=options["--class-map"])
    assert dataset.reader.class_to_idx == {"c0": 0, "c1": 1}
    assert (
        sorted(os.path.relpath(name, os.path.abspath("kept-images")) for name in dataset.filenames(absolute=True))
        == here
    )
    assert dataset[0][0].size == (24, 24)


@pytest.mark.skipif(find_spec("fastai") is None, reason="fastai is no part of the dev extra; run with 2.8.12")
def test_fastai(here):
    loaders = run_block("fastai")["loaders"]
    items = [*loaders.train.items, *loaders.valid.items]
    assert sorted(str(path.relative_to("images")) for path in items) == here
    assert list(loaders.vocab) == ["c0", "c1"]


@pytest.mark.skipif(find_spec("streaming") is None, reason="mosaicml-streaming is no part of dev; run with 0.10.0")
def test_mosaic(here):
    import streaming

    for path in Path("images").rglob("*.png"):  # "jpeg" takes files of that format
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    Path("kept.txt").write_text("".join(f"{path.replace('png', 'jpg')}\n" for path in here))
    run_block("mosaic")
    labels = [sample["label"] for sample in streaming.StreamingDataset(local="mds", batch_size=4)]
    assert sorted(labels) == sorted(int(path[1]) for path in here)


def test_data_frames(here):
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    result = protoprune.select(keep=0.7)
    distance = np.linspace(0, 1, 20)
    rows = zip(result.ranking.paths, result.keep.astype(int), distance, strict=True)
    Path("all.csv").write_text("path,keep,distance\n" + "".join(f"{path},{keep},{far}\n" for path, keep, far in rows))
    given = run_block("data_frames")
    kept = sorted(os.path.relpath(path, "images") for path, _ in given["kept"].samples)
    near = set(np.array(result.ranking.paths)[:18])
    assert kept == [path for path in here if path in near]


def test_captions(here):
    pytest.importorskip("pandas")
    lines = [f"images/{path}\ta photo, {path}\n" for path in protoprune.list_folder("images").paths]
    Path("captions.tsv").write_text("".join(["filepath\ttitle\n", *lines]))
    run_block("captions")
    _, *kept = Path("kept.tsv").read_text().splitlines(keepends=True)
    assert kept == [f"images/{path}\ta photo, {path}\n" for path in here]


def test_timm_python(here):
    pytest.importorskip("timm")
    given = run_block("timm_python")
    assert sorted(given["kept"].filenames()) == here
    assert given["kept"][0][0].shape == (3, 64, 64)


def test_datasets_split(here, monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    given = run_block("datasets_split")
    other = protoprune.keep_only(given["splits"]["test"], "kept.txt", root="images", part=True)
    assert 0 < len(other) < len(given["train"]) < len(given["train"]) + len(other) == len(here)


def test_datasets(here, monkeypatch, tmp_path):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    given = run_block("datasets")
    assert len(given["kept"]) == len(here)
    labels = given["kept"].features["label"].int2str(given["kept"]["label"])
    assert sorted(labels) == sorted(path.partition("/")[0] for path in here)


def test_webdataset(here):
    pytest.importorskip("webdataset")
    with tarfile.open("shard-000000.tar", "w") as tar:
        for path in sorted(Path("images").rglob("*.png")):
            tar.add(path, arcname=str(path.relative_to("images")))
    given = run_block("webdataset")
    assert [sample["__key__"] + ".png" for sample in given["kept"]] == here


def small_problem():
    """64 points of two classes, and a model that can tell them apart."""
    import torch

    points = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    model = torch.nn.Linear(5, 2)
    torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    return points, (points[:, 0] > 0).long(), model


def accuracy(model, points, labels) -> float:
    return (model(points).argmax(1) == labels).float().mean().item()


def test_plain_pytorch():
    import torch

    points, labels, model = small_problem()
    dataset = torch.utils.data.TensorDataset(points, labels)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    given = run_block("plain_pytorch", dataset=dataset, model=model, optimizer=optimizer, epochs=30)
    assert accuracy(model, points, labels) > 0.9
    assert given["sampler"].epoch == 29
    assert given["sampler"].counts.sum() == 30 * 19


def test_lightning(tmp_path, monkeypatch):
    pytest.importorskip("lightning")
    import torch

    monkeypatch.chdir(tmp_path)
    points, labels, model = small_problem()
    given = run_block("lightning", dataset=torch.utils.data.TensorDataset(points, labels), model=model)
    counts = given["sampler"].counts
    assert given["sampler"].epoch == 7
    assert counts.max() == 8
    assert counts.min() >= 2  # the first and the last epoch have all the data
    assert 2 * 64 < counts.sum() < 8 * 64
    assert given["sampler"].state_dict()["trained"] == 64  # so none of the last epoch was cut off
    assert accuracy(model.cpu(), points, labels) > 0.6
    state = torch.load(given["trainer"].checkpoint_callback.best_model_path, weights_only=True)["sampler"]
    assert (state["epoch"], state["trained"]) == (7, 64)


def test_trainer(tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from types import SimpleNamespace

    import torch

    monkeypatch.chdir(tmp_path)
    points, labels, linear = small_problem()

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = linear

        def forward(self, x):
            return SimpleNamespace(logits=self.linear(x))

    dataset = [{"x": x, "labels": int(y)} for x, y in zip(points, labels, strict=True)]
    given = run_block("trainer", dataset=dataset, model=Model())
    assert given["sampler"].epoch == 4
    assert given["sampler"].counts.sum() == 5 * 19
    assert given["sampler"].state_dict()["trained"] == 19
    assert linear.weight.abs().sum() > 0
    state = torch.load("checkpoints/checkpoint-15/sampler.pt", weights_only=True)
    assert (state["epoch"], state["trained"]) == (4, 19)


def test_shell(here):
    import shutil

    rsync = [] if shutil.which("rsync") else [("rsync -a --files-from=kept.txt images/ kept-copy/", "true")]
    in_shell("shell", rsync)
    assert len(Path("listing.txt").read_text().splitlines()) == len(here)
    if not rsync:
        assert sorted(str(p.relative_to("kept-copy")) for p in Path("kept-copy").rglob("*.png")) == here
    assert Path("labelled.txt").read_text().splitlines() == [f"{path} {path[1]}" for path in here]


def test_python(here, capsys):
    run_block("python")
    assert capsys.readouterr().out == "14 of 20\n"


def test_own_scores(here):
    with protoprune.FeatureFile("features.h5") as file:
        paths = list(file.paths)[::-1]
    given = run_block("own_scores", paths=paths, losses=np.arange(20.0))
    assert given["table"].scores.tolist() == list(range(20))[::-1]
    assert given["result"].kept_paths == sorted(paths[14:])


def test_own_record(here):
    logits = np.random.default_rng(0).normal(size=(20, 2))
    given = run_block(
        "own_record", epochs=3, train_one_epoch=lambda model: None, predict=lambda model: logits, model=None,
        paths=[f"{i}.png" for i in range(20)], labels=np.arange(20) % 2,
    )  # fmt: skip
    assert given["el2n"].shape == (20,)


def test_report(here):
    given = run_block("report")
    assert given["told"]["thumbnails"] == 20


def test_h5py(here):
    given = run_block("h5py")
    assert len(given["paths"]) == len(given["features"]) == given["usable"].sum() == 20


def test_every_marked_block_has_a_test_and_every_command_is_in_the_docs():
    assert len(FOUND) == len(BLOCKS)
    assert set(BLOCKS) == {name.removeprefix("test_") for name in globals() if name.startswith("test_")} & set(BLOCKS)
    for name in BLOCKS:
        assert f"test_{name}" in globals()
    commands = [command.name or command.callback.__name__ for command in app.registered_commands]
    commands += [group.name for group in app.registered_groups]
    missing = [name for name in commands if f"protoprune {name}" not in PAGES]
    assert missing == []


def test_links_lead_somewhere():
    """Files beside the page they stand on, and headings of the pages."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)]+))?\)", page.read_text()):
            found = page.parent / target if target else page
            assert found.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)", found.read_text(), re.MULTILINE)
                anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                assert anchor in anchors, f"{page.name}: {target}#{anchor}"
