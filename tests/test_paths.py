"""Names that stay on the disk are the same names: as sequence, as bytes, hashed, and written to lists and manifests."""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import threading

import numpy as np
import pytest
from helpers import format_list
from hypothesis import given, settings
from hypothesis import strategies as st

from protoprune import lists, paths
from protoprune.errors import ProtopruneError
from protoprune.features import featureset, hdf5
from protoprune.features.featurefile import FeatureFile
from protoprune.files import leads_out
from protoprune.ids import Known, hashes_of
from protoprune.paths import Paths, encoded, picked

NAMES = st.lists(
    st.sampled_from(["../x", "a/..", "/etc", "a..b", "..", "a/b.png"])
    | st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), min_size=1, max_size=8)
    | st.binary(min_size=1, max_size=6).filter(lambda raw: b"\0" not in raw).map(os.fsdecode),
    max_size=60,
)


def kept_elsewhere(names: list[str]) -> Paths:
    raw = [os.fsencode(name) for name in names]
    return Paths(len(raw), lambda first, last: raw[first:last])


@pytest.fixture(params=[1, 3, 1000])
def small_steps(request, monkeypatch):
    """So small that every border is met."""
    monkeypatch.setattr(paths, "BATCH", 2 * request.param)
    monkeypatch.setattr(paths, "_NEAR", request.param)
    monkeypatch.setattr(paths, "_GAP", request.param)
    for module in (paths, hdf5, featureset):
        monkeypatch.setattr(module, "STEP", request.param)
    monkeypatch.setattr(hdf5, "_PIECE", 5 * request.param)


@given(NAMES, st.data())
def test_a_sequence_of_names(small_steps, names, data):
    kept = kept_elsewhere(names)
    assert list(kept) == names == kept[:]
    assert kept == names
    assert len(kept) == len(names)
    assert kept != [*names, "more"]
    some = data.draw(st.slices(len(names)))
    assert kept[some] == names[some]
    for row in data.draw(st.lists(st.integers(-len(names), len(names) - 1), max_size=9)) if names else ():
        assert kept[row] == names[row]
    with pytest.raises(IndexError):
        kept[len(names)]
    rows = np.array(data.draw(st.lists(st.integers(0, len(names) - 1), max_size=20)) if names else [], int)
    for one in (rows, np.sort(rows), np.unique(rows)):
        assert picked(kept, one) == [names[row] for row in one] == picked(names, one)
        assert [name for part in encoded(kept, one) for name in part] == [os.fsencode(names[row]) for row in one]


@settings(max_examples=12)
@given(NAMES, st.data())
def test_names_of_a_feature_file(small_steps, tmp_path_factory, names, data):
    if data.draw(st.booleans()):
        names = [name for name in names if not leads_out(name)]
    outside = next(filter(leads_out, names), None)
    path = tmp_path_factory.mktemp("f") / "f.h5"
    kind = hdf5.Kind("names", 1, "file of names", "x", {"path": hdf5.Column(("uint8",), ("*",))}, ())
    with hdf5.create(path, kind) as file:
        hdf5.dataset(file, "path", data=hdf5.block(names))
    hdf5.seal(path, kind, ())
    reader = hdf5.Reader(str(path), kind)
    if outside is not None:
        with pytest.raises(ProtopruneError, match="leads out of the folder"):
            reader.paths("path", len(names))
        reader.close()
        return
    assert list(reader.paths("path", len(names))) == names == reader.names("path")
    with hdf5.create(more := f"{path}.more", kind) as file:  # one name more, which has no end
        hdf5.dataset(file, "path", data=np.append(hdf5.block(names), np.uint8(ord("x"))))
    hdf5.seal(more, kind, ())
    cut = hdf5.Reader(more, kind)
    with pytest.raises(ProtopruneError, match=f"its path is no list of {len(names)} names"):
        cut.paths("path", len(names))
    cut.close()
    kept, raw = reader.paths("path", len(names)), [os.fsencode(name) for name in names]
    for first, last in data.draw(st.lists(st.tuples(*[st.integers(0, len(names))] * 2), min_size=1, max_size=9)):
        assert kept.read(first, last) == raw[first:last]
    for wrong in {len(names) + 1, max(len(names) - 1, 0)} - {len(names)}:
        with pytest.raises(ProtopruneError, match="its path is no list of"):
            reader.paths("path", wrong)
    reader.close()


def test_names_reach_another_process_as_a_list(feature_file, tmp_path):
    with FeatureFile(feature_file(tmp_path / "f.h5", np.ones((3, 2), np.float32), paths=["a", "b", "é"])) as file:
        assert pickle.loads(pickle.dumps(file.paths)) == ["a", "b", "é"]


def test_damaged_names_are_found_out(feature_file, tmp_path):
    path = feature_file(tmp_path / "f.h5", np.ones((50, 2)))
    with open(path, "r+b") as file:
        place = file.read().index(b"00007.png\0")
        file.seek(place)
        file.write(b"0000X.png")
    with FeatureFile(path) as file, pytest.raises(ProtopruneError, match="its path is not what was written"):
        file.paths  # noqa: B018


@given(NAMES, st.integers(0, 5), st.sampled_from([b"", b"calibrate"]), st.randoms(use_true_random=False))
def test_hashes_are_those_of_the_ids_one_by_one(small_steps, names, seed, purpose, random):
    rows = list(range(len(names)))
    random.shuffle(rows)
    key = seed.to_bytes(8, "little", signed=True)
    want = [
        int.from_bytes(
            hashlib.blake2b(os.fsencode(names[row]), digest_size=8, key=key, person=purpose).digest(), "little"
        )
        for row in rows
    ]
    for ids in (names, kept_elsewhere(names), Known(names)):
        assert hashes_of(np.array(rows, int), ids, seed, purpose).tolist() == want
        assert hashes_of(np.array(sorted(rows), int), ids, seed, purpose).tolist() == [
            want[rows.index(row)] for row in sorted(rows)
        ]


@given(NAMES, st.sampled_from(["txt", "csv", "jsonl", "npy"]), st.booleans(), st.data())
def test_lists_in_pieces_are_the_lists(small_steps, names, format, weighted, data):
    names = [name.replace("\n", "x").replace("\r", "y").replace("\ufeff", "z") for name in names]
    rows = np.flatnonzero(data.draw(st.lists(st.booleans(), min_size=len(names), max_size=len(names))))
    rng = np.random.default_rng(0)
    scores, weights = rng.random(len(names)).astype(np.float32), rng.random(len(names)) if weighted else None
    whole = format_list(
        [names[row] for row in rows], rows, scores[rows], format, weights=None if weights is None else weights[rows]
    )
    ids = kept_elsewhere(names)
    lists.check_list(ids, rows, format)
    assert b"".join(lists.list_chunks(ids, rows, scores, format, weights=weights)) == whole
    absolute = b"".join(lists.list_chunks(names, rows, scores, "txt", folder="/data"))
    assert absolute == b"".join(os.path.join(b"/data", os.fsencode(names[row])) + b"\n" for row in rows)
    pieces = lists.packed("a.txt.gz", lists.list_chunks(ids, rows, scores, format, weights=weights))
    assert gzip.decompress(b"".join(pieces)) == whole


def test_threads_may_read_the_parts_of_a_set_at_once(feature_file, tmp_path, monkeypatch):
    """A part that one thread reads must not be closed by another one that needs its place."""
    parts = []
    (tmp_path / "set").mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        name = f"{number}.tar"
        feature_file(
            tmp_path / "set" / f"{name}.h5", rng.normal(size=(40, 3)), paths=[f"{name}/{i:03d}.png" for i in range(40)]
        )
        with FeatureFile(tmp_path / "set" / f"{name}.h5") as file:
            parts.append(featureset.Part(name, 1, 1, 40, file.provenance["uuid"]))
    featureset.write_plan(str(tmp_path / "set"), {"root": "/data", "key": {}, "options": {}}, parts)
    monkeypatch.setattr(featureset, "_OPEN_FILES", 1)
    whole = featureset.FeatureSet(tmp_path / "set")
    names, features = list(whole.paths), whole.features[:]
    assert names == [f"{number}.tar/{i:03d}.png" for number in range(6) for i in range(40)]
    few = Paths(whole.n, whole._read_names)  # as where all parts can be open
    assert few == names
    assert picked(whole.paths, np.arange(whole.n)[::-7]) == names[::-7]
    wrong = []

    def look(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(3):
            rows = np.sort(rng.choice(whole.n, 5, replace=False))
            if picked(few, rows) != [names[row] for row in rows] or (whole.features[rows] != features[rows]).any():
                wrong.append(rows)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_names_in_a_block_are_those_that_were_given():
    names = [f"a/{i}é\udcff.jpg" for i in range(200)]
    block = paths.held(map(os.fsencode, names))
    assert (list(block), block, block[130], block[3:9]) == (names, names, names[130], names[3:9])
    assert list(paths.held([])) == []
    with pytest.raises(ValueError, match="NUL"):
        paths.held([b"a\0b"])


@pytest.mark.parametrize("rows", [[], [0], [3, 64, 65, 199], list(range(200))])
def test_chosen_names(rows):
    names = paths.held(f"{i:03d}".encode() for i in range(200))
    rows = np.array(rows, np.int64)
    assert list(paths.chosen(names, rows)) == [f"{i:03d}" for i in rows]
    assert list(paths.chosen(list(names), rows)) == [f"{i:03d}" for i in rows]


def test_names_that_occur_twice_are_found():
    assert paths.distinct(["a", "b", "ab"])
    assert not paths.distinct(["a", "b", "a"])
    assert paths.distinct([])
