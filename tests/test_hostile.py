"""Files from elsewhere: names that lead out of their folder, code in weights, numbers that are none."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import encoded, format_list, picture, write_image
from typer.testing import CliRunner

from protoprune import pruning, scores
from protoprune.cli import app
from protoprune.embedding import importing
from protoprune.encoders.checkpoints import read_state
from protoprune.errors import ProtopruneError, UsageError
from protoprune.features import featureset, hdf5, seals
from protoprune.features.opening import open_features
from protoprune.files import leads_out, write_links
from protoprune.images.decode import ImageError
from protoprune.records import Record
from protoprune.report.sheet import contact_sheet
from protoprune.sources.finding import Shard
from protoprune.sources.reader import ImageReader
from protoprune.sources.reading import open_shard
from protoprune.sources.shard import ShardOptions

OUTSIDE = ["../x.png", "a/../../x.png", "/etc/x.png", "..", "a/..", "", "a\0b.png"]
INSIDE = ["x.png", "a/x.png", "..a/x.png", "a/..x", "a..b/x..png", "a/.../x.png", "a//b.png", "./a.png"]
NAMES = [f"{name}/{i}.png" for name in "ab" for i in range(6)]


def invoke(line: str):
    return CliRunner().invoke(app, line.split())


def refused(line: str, message: str, code: int = 1) -> str:
    """The one line of an error."""
    result = invoke(line)
    assert result.exit_code == code, result.output
    errors = [one for one in result.stderr.splitlines() if one.startswith("error:")]
    assert len(errors) == 1, result.stderr
    assert message in errors[0]
    return errors[0]


# --- names -----------------------------------------------------------------------------------------------------------


def test_which_names_lead_out():
    assert all(map(leads_out, OUTSIDE))
    assert not any(map(leads_out, INSIDE))


@pytest.mark.parametrize("name", [name for name in OUTSIDE if name and "\0" not in name])  # no block holds those
def test_a_feature_file_with_such_a_name_is_refused_wherever_names_are_used(name, tmp_path, monkeypatch, feature_file):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "images/x.png")
    write_image(tmp_path / "x.png")
    feature_file("f.h5", np.eye(3), paths=["x.png", "y.png", name])
    for line in (
        "select f.h5 --keep 1 --k 1 --links farm", "select f.h5 --keep 1 --k 1 --manifest m.csv",
        "select f.h5 --keep 1 --k 1 --absolute", "sheet f.h5 --k 1 -o s.png", "report f.h5 --k 1 -o r.html",
        "score random --features f.h5 -o s.csv",
    ):  # fmt: skip
        refused(line, f"its path holds {name!r}, which leads out of the folder of the images")
    assert {one.name for one in tmp_path.iterdir()} == {"images", "x.png", "f.h5"}
    with open_features("f.h5") as file, pytest.raises(ProtopruneError, match="leads out"):
        _ = file.paths


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_link_farm_never_leaves_its_folder(name, tmp_path):
    write_image(tmp_path / "images/x.png")
    write_image(tmp_path / "x.png")
    with pytest.raises(ProtopruneError, match="leads out of the folder; links are made below it only"):
        write_links(tmp_path / "farm", str(tmp_path / "images"), ["x.png", name])
    assert {one.name for one in tmp_path.iterdir()} == {"images", "x.png"}


def test_links_lead_to_files_only(tmp_path):
    write_image(tmp_path / "images/a/x.png")
    with pytest.raises(ProtopruneError, match="does not exist"):
        write_links(tmp_path / "farm", str(tmp_path / "images"), ["a"])
    write_links(tmp_path / "farm", str(tmp_path / "images"), ["a/x.png"])
    assert os.readlink(tmp_path / "farm/a/x.png") == str(tmp_path / "images/a/x.png")


def test_a_record_with_such_a_name(tmp_path):
    from protoprune import records

    records.create(
        str(tmp_path / "r.h5"), {}, paths=["../a.png", "b.png"], labels=np.arange(2), classes=["a", "b"],
        subset=np.ones((1, 2), bool), epoch_numbers=[1],
    )  # fmt: skip
    with (
        Record(tmp_path / "r.h5.partial", unfinished=True) as record,
        pytest.raises(ProtopruneError, match="leads out"),
    ):
        _ = record.paths


@pytest.mark.parametrize("name", [*OUTSIDE, "../../etc/passwd"])
def test_a_read_never_leaves_the_root(name, tmp_path):
    """Score tables name images too: `compare --sheet` reads what they say."""
    write_image(tmp_path / "x.png")
    (tmp_path / "root").mkdir()
    with pytest.raises(ImageError, match="leads out of the folder"):
        ImageReader(tmp_path / "root")(name)
    with pytest.raises(ProtopruneError, match="none of the 1 images of the sheet could be read"):
        contact_sheet([("t", [name], [])], str(tmp_path / "root"))


def test_the_shards_of_a_set_lie_in_it(tmp_path):
    for name in ("../x.tar", "/x.tar", "", 5, None):
        plan = {"format": "protoprune-feature-set", "format_version": 1, "root": "/", "shards": [
            {"name": name, "size": 1, "version": 1}]}  # fmt: skip
        (tmp_path / "set.json").write_text(json.dumps(plan))
        with pytest.raises(ProtopruneError, match=r"set\.json: damaged"):
            featureset.read_plan(tmp_path)
    (tmp_path / "set.json").write_text("[" * 99_999)
    with pytest.raises(ProtopruneError, match=r"set\.json: damaged \(nested too deeply\)"):
        featureset.read_plan(tmp_path)


def test_members_of_archives_stay_below_their_shard(tmp_path):
    """Their names are ids, and links are made of ids."""
    data = encoded(picture(), "PNG")
    with tarfile.open(tmp_path / "s.tar", "w") as tar, zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for name in ("../../up.png", "/abs.png", "a/../b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            archive.writestr(name, data)
    for name in ("s.tar", "s.zip"):
        where = str(tmp_path / name)
        with open_shard(Shard(name, where, 0, 0), where, ShardOptions(), str(tmp_path)) as images:
            assert images.paths == [f"{name}/abs.png", f"{name}/b.png", f"{name}/up.png"]


def test_imported_names_stay_below_one_folder(tmp_path):
    np.save(tmp_path / "v.npy", np.eye(2, dtype=np.float32))
    for names in (["../a.png", "b.png"], ["/data/a.png", "b.png"], ["a.png", "x/../../b.png"]):
        with pytest.raises(UsageError, match="give --root a folder that holds every image"):
            importing.import_features(tmp_path / "v.npy", tmp_path / "f.h5", paths=names)
    assert not (tmp_path / "f.h5").exists()
    importing.import_features(tmp_path / "v.npy", tmp_path / "f.h5", paths=["/data/a.png", "/data/x/b.png"])
    with open_features(tmp_path / "f.h5") as file:
        assert file.paths == ["a.png", "x/b.png"]


# --- weights ---------------------------------------------------------------------------------------------------------


class Runs:
    def __init__(self, what: Path):
        self.what = what

    def __reduce__(self):
        return os.system, (f"touch {self.what}",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_holds_code_is_named_and_not_run(protocol, tmp_path):
    """One that pickle wrote, whose protocol torch may not even know."""
    (tmp_path / "w.pth").write_bytes(pickle.dumps({"state_dict": Runs(tmp_path / "ran")}, protocol))
    with pytest.raises(ProtopruneError, match=r"holds (posix|nt)\.system, and reading such an object would run code"):
        read_state(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()


def other_files(folder: Path) -> dict[str, str]:
    """name -> what the error says of it"""
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    torch.save({"a": torch.zeros(3)}, folder / "cut.pth")
    (folder / "cut.pth").write_bytes((folder / "cut.pth").read_bytes()[:200])
    torch.save({1: torch.zeros(2), "b": torch.zeros(2)}, folder / "numbered.pth")
    np.save(folder / "a.npy", np.zeros(3))
    (folder / "photo.pth").write_bytes(encoded(picture(), "PNG"))
    for name, data in {"empty.pth": b"", "text.pth": b"hello\n", "a.safetensors": b"\xff" * 100}.items():
        (folder / name).write_bytes(data)
    return {
        "a.zip": "a zip archive that torch.save did not write", "cut.pth": "a damaged zip archive", "a.npy": "an array",
        "numbered.pth": "a tensor has the key 1 where a name is expected", "photo.pth": "an image",
        "empty.pth": "an empty file", "text.pth": "not readable;", "a.safetensors": "not readable (",
    }  # fmt: skip


def test_what_is_no_checkpoint_is_called_by_its_name(tmp_path):
    for name, said in other_files(tmp_path).items():
        with pytest.raises(ProtopruneError) as error:
            read_state(tmp_path / name)
        text = str(error.value)
        assert text.startswith(f"--weights {tmp_path / name}: {said}"), text
        assert len(text) < 300 + len(str(tmp_path))
        assert "\n" not in text


# --- score tables and arrays -----------------------------------------------------------------------------------------


def table_files(folder: Path) -> dict[str, str]:
    rows = "".join(f"{path},{place}\n" for place, path in enumerate(NAMES))
    texts = {
        "list.csv": '# protoprune-scores: {"higher": ["harder"]}\npath,score\n' + rows,
        "dict.csv": '# protoprune-scores: {"higher": {"a": 1}}\npath,score\n' + rows,
        "cut.csv": '# protoprune-scores: {"higher": "har\npath,score\n' + rows,
        "deep.csv": "# protoprune-scores: " + "[" * 99_999 + "\npath,score\n" + rows,
        "from.csv": '# protoprune-scores: {"provenance": 5}\npath,score\n' + rows,
        "inf.csv": "path,score\n" + rows.replace(",3\n", ",inf\n").replace(",4\n", ",-inf\n"),
        "huge.csv": "path,score\n" + rows.replace(",3\n", ",1e999\n"),
        "nested.jsonl": "".join(json.dumps({"path": path, "score": {"a": 1}}) + "\n" for path in NAMES),
        "lists.jsonl": "".join(json.dumps({"path": path, "score": [1, 2]}) + "\n" for path in NAMES),
        "broken.jsonl": "".join(json.dumps({"path": path, "score": 1}) + "\n" for path in NAMES)[:-5],
        "null.jsonl": json.dumps({"path": NAMES[0], "score": 1}) + "\nnull\n",
        "deep.jsonl": '{"path":' * 99_999,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    np.save(folder / "complex.npy", np.arange(12) * 1j)
    np.save(folder / "objects.npy", np.array([{}] * 12, object), allow_pickle=True)
    np.savez(folder / "inf.npz", path=np.array(NAMES), score=np.r_[np.inf, np.zeros(11)])
    return {
        "list.csv": "its header says higher is ['harder']", "dict.csv": "its header says higher is {'a': 1}",
        "cut.csv": "is not valid JSON", "deep.csv": "is not valid JSON", "from.csv": "is not valid JSON",
        "inf.csv": "2 scores are infinite (first: a/3.png)", "huge.csv": "1 score is infinite (first: a/3.png)",
        "nested.jsonl": "row 1 has no number as its score: {'a': 1}", "lists.jsonl": "row 1 has no number as its score",
        "broken.jsonl": "not a table in the form .jsonl", "null.jsonl": "expected one object with path and score",
        "deep.jsonl": "nested too deeply", "complex.npy": "holds complex128, expected numbers",
        "objects.npy": "pickled Python objects, which are never read",
        "inf.npz": "1 score is infinite (first: a/0.png)",
    }  # fmt: skip


def test_score_tables_that_are_none_end_in_one_line(tmp_path, monkeypatch, feature_file):
    monkeypatch.chdir(tmp_path)
    feature_file("f.h5", np.random.default_rng(0).normal(size=(12, 3)), paths=NAMES)
    for name, said in table_files(tmp_path).items():
        refused(f"select f.h5 --keep 0.5 --scores {name}{' --by-place' if name.endswith('.npy') else ''}", said)
        with pytest.raises(ProtopruneError) as error:
            scores.read_table(name)
        assert "allow_pickle" not in str(error.value)
        assert name in str(error.value)


def test_an_array_of_json_is_a_table_and_a_list(tmp_path, monkeypatch, feature_file):
    from protoprune.lists import read_list

    monkeypatch.chdir(tmp_path)
    entries = [{"path": path, "score": place} for place, path in enumerate(NAMES)]
    Path("a.json").write_text(json.dumps(entries, indent=1))
    Path("names.json").write_text(json.dumps(NAMES))
    Path("plain.txt").write_text("[1]/a.png\n[2]/b.png\n")
    Path("bracket.txt").write_text(json.dumps(entries[:5]))
    assert scores.read_scores("a.json", NAMES).scores.tolist() == list(range(12))
    assert read_list("a.json") == read_list("names.json") == NAMES
    assert read_list("bracket.txt") == NAMES[:5]
    assert read_list("plain.txt") == ["[1]/a.png", "[2]/b.png"]


def test_infinite_scores_are_neither_written_nor_ranked(tmp_path, feature_file):
    values = np.r_[np.inf, np.zeros(11)].astype(np.float32)
    with pytest.raises(ProtopruneError, match=r"1 score is infinite \(first: a/0.png\)"):
        scores.write_scores(tmp_path / "s.csv", NAMES, values, metric="m")
    assert not (tmp_path / "s.csv").exists()
    ranking = pruning.rank(feature_file(tmp_path / "f.h5", np.random.default_rng(0).normal(size=(12, 3)), paths=NAMES))
    ranking.scores[3] = -np.inf
    with pytest.raises(UsageError, match="1 score is infinite"):
        pruning.prune(ranking, 0.5)


def test_arrays_to_import_that_are_none(tmp_path):
    np.save(tmp_path / "objects.npy", np.array([[{}]], object), allow_pickle=True)
    whole = io.BytesIO()
    np.save(whole, np.eye(3))
    (tmp_path / "header.npy").write_bytes(whole.getvalue().replace(b"(3, 3)", b"((((((", 1))
    with zipfile.ZipFile(tmp_path / "foreign.npz", "w") as archive:
        archive.writestr("a.txt", "hello")
    np.savez(tmp_path / "objects.npz", features=np.array([[{}]], object))
    (tmp_path / "samples.json").write_text("[" * 99_999)
    for name, said in {
        "objects.npy": "pickled Python objects, which are never read",
        "objects.npz": "pickled Python objects, which are never read", "header.npy": "cannot be read",
        "foreign.npz": "holds no vectors; expected an array (images, dimensions)", "samples.json": "nested too deeply",
    }.items():  # fmt: skip
        with pytest.raises(ProtopruneError) as error:
            importing.import_features(tmp_path / name, tmp_path / "f.h5")
        assert said in str(error.value)
        assert "allow_pickle" not in str(error.value)
        assert not (tmp_path / "f.h5").exists()


def test_numbers_of_thousands_of_digits_are_no_class_numbers(tmp_path):
    from protoprune.images.labels import LabelFile, read_labels

    (tmp_path / "l.csv").write_text("path,label\n" + "".join(f"{path},{'9' * 5000}\n" for path in NAMES))
    assert read_labels(LabelFile(tmp_path / "l.csv"), NAMES, str(tmp_path))[1] == ["9" * 5000]
    with pytest.raises(UsageError, match="--class-names goes with class numbers"):
        read_labels(LabelFile(tmp_path / "l.csv", None, tmp_path / "l.csv"), NAMES, str(tmp_path))


def test_lists_hold_no_infinite_scores_and_null_for_none(tmp_path):
    rows, scores = np.arange(2), np.array([1.5, np.nan])
    second = json.loads(format_list(["a", "b"], rows, scores, "jsonl").splitlines()[1])
    assert second == {"path": "b", "index": 1, "score": None}
    assert format_list(["a", "b"], rows, scores, "csv").splitlines()[2] == b"b,1,"
    for format in ("csv", "jsonl", "txt"):
        with pytest.raises(UsageError, match="1 score is infinite; give numbers, or NaN for none"):
            format_list(["a", "b"], rows, np.array([-np.inf, 0]), format)


@pytest.mark.parametrize(
    "command", ["select x --keep 0.5", "info x", "score el2n --record x", "score random --record x"]
)
def test_a_pipe_for_a_feature_file_is_no_endless_wait(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("x")
    for module in (hdf5, seals):  # whoever opens it waits for somebody who writes
        monkeypatch.setattr(module, "open", lambda *_: pytest.fail("opened"), raising=False)
    result = CliRunner().invoke(app, command.split())
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "x: a pipe or a device, which can be read only once; give a " in result.stderr
