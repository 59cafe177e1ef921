"""The public names stay what they say, whatever was imported before."""

import ast
import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest

import protoprune
from protoprune.errors import UsageError
from protoprune.images.listing import ImageList
from protoprune.training import recording


def test_no_submodule_hides_a_public_name():
    """Importing `protoprune.x` sets the attribute x of the package: a function of that name would be gone."""
    modules = {module.name for module in pkgutil.iter_modules(protoprune.__path__)}
    assert modules.isdisjoint(protoprune.__all__)


@pytest.mark.parametrize("name", [name for name in protoprune.__all__ if name != "__version__"])
def test_public_names_are_documented_callables(name):
    value = getattr(protoprune, name)
    assert callable(value)
    assert value.__doc__
    assert value.__module__.startswith("protoprune.")


def test_editors_and_type_checkers_see_what_there_is():
    """What is imported on first use stands once more for those who only read: without it all of it was Any."""
    tree = ast.parse(Path(protoprune.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    shown = {one.asname: node.module for node in block.body for one in node.names}
    assert shown.pop("samplers") == "protoprune"
    assert shown == {name: f"protoprune.{home}" for name, home in protoprune._HOME.items()}
    assert {*protoprune.__all__, "samplers"} <= set(dir(protoprune))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'prunes'"):
        protoprune.prunes  # noqa: B018


def test_samplers_need_no_import_of_their_own(monkeypatch):
    monkeypatch.delattr(protoprune, "samplers", raising=False)  # as before anything has imported it
    assert protoprune.samplers.RS2Sampler(10, 0.5).n == 10


NONE = ImageList("", [], np.empty(0), np.empty(0), np.empty(0), [])
MODULES = list(pkgutil.walk_packages(protoprune.__path__, "protoprune."))


@pytest.mark.parametrize("module", MODULES, ids=[module.name for module in MODULES])
def test_every_module_says_what_it_is(module):
    assert importlib.import_module(module.name).__doc__


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda file: protoprune.score("random", file, seed=-1), "--seed -1"),
        (lambda file: protoprune.score("k_center", file, seed=3_000_000_000), "--seed 3000000000"),
        (lambda file: protoprune.score("self_supervised_prototypes", file, k=0), "--k 0"),
        (lambda file: protoprune.rank(file, seed=-1), "--seed -1"),
        (lambda file: protoprune.compare({"a": [1, 2], "b": [2, 1]}, ["x", "y"], seed=-1), "--seed -1"),
        (lambda file: protoprune.compare({"a": [1, 2], "b": [2, 1]}, ["x", "y"], resamples=-1), "--bootstrap -1"),
        (lambda file: protoprune.embed(NONE, None, file + "2", batch_size=0), "--batch-size 0"),
        (lambda file: protoprune.embed(NONE, None, file + "2", workers=-1), "--workers -1"),
        (lambda file: protoprune.load_encoder("dino_vits16", image_size=4), "--image-size 4"),
        (lambda file: recording.plan(None, None, None, seed=-1), "--seed -1"),
        (lambda file: protoprune.scaling(None, None, None, sizes=[2], bootstrap=-1), "--bootstrap -1"),
    ],
)
def test_python_refuses_what_the_command_line_refuses(call, message, tmp_path, feature_file):
    with pytest.raises(UsageError, match=message):
        call(feature_file(tmp_path / "f.h5", np.eye(12)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: protoprune.embed("images", protoprune.load_encoder("mini")), r"'images': expected what list_folder"),
        (lambda: protoprune.select("f.h5", 0.5, scores=np.arange(3.0)), "ndarray: expected the path of a score table"),
    ],
)  # fmt: skip
def test_what_is_no_path_or_no_list_is_said_plainly(call, message):
    with pytest.raises(UsageError, match=message):
        call()


def test_what_a_notebook_shows_is_a_line(tmp_path, feature_file, image_tree):
    """A cell that ends in one of these objects; their fields may be millions of names."""
    feature_file(tmp_path / "f.h5", np.eye(30), paths=[f"{'ab'[i % 2]}/{i}.png" for i in range(30)])
    protoprune.write_record(tmp_path / "r.h5", ["a.png", "b.png"], np.array([0, 1]), 2 * np.eye(2)[None])
    with protoprune.FeatureFile(tmp_path / "f.h5") as file, protoprune.Record(tmp_path / "r.h5") as record:
        shown = {
            repr(file): f"FeatureFile({str(tmp_path / 'f.h5')!r}, 30 images x 30)",
            repr(file.features): "Features(30 x 30 float32, in the file; [:] reads them)",
            repr(record): f"Record({str(tmp_path / 'r.h5')!r}, models=1, epochs=1, n=2)",
            repr(protoprune.load_examples(file)): "Examples(30 of 2 classes, 30 torch.float32, of ",
            repr(
                protoprune.select(file, 0.5)
            ): f"Selected(15 images of Ranking(30 images of {file.path!r}), Rule(keep=0.5",
            repr(protoprune.list_folder(image_tree())): "ImageList(12 images in 3 classes below ",
            repr(protoprune.load_encoder("mini")): "Encoder('mini', dim=192, image_size=64, pool='avg')",
        }
    for text, start in shown.items():
        assert text.startswith(start)
        assert "\n" not in text
        assert len(text) < 400


@pytest.mark.parametrize(("opener", "what"), [("FeatureFile", "feature file"), ("Record", "training record")])
def test_a_folder_is_called_one(tmp_path, opener, what):
    with pytest.raises(protoprune.ProtopruneError, match=f"a folder, not a {what}; `protoprune .* IMAGES` makes one"):
        getattr(protoprune, opener)(tmp_path)
