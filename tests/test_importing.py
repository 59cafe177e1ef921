"""Vectors from elsewhere: every form gives the same feature file, and what does not fit is refused by name."""

import base64
import io
import json
import os
import warnings
import zlib

import numpy as np
import pytest
from helpers import write_image
from typer.testing import CliRunner

import protoprune
from protoprune.cli import app
from protoprune.embedding import importing
from protoprune.embedding.importing import import_features
from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.features.featurefile import IMPORTED, KEY, FeatureFile, create_partial
from protoprune.images.listing import ImageList

N, DIM = 12, 5
NAMES = [f"{'cat' if i % 2 else 'dog'}/{i}.png" for i in range(N)]  # not sorted
VECTORS = np.random.default_rng(0).normal(size=(N, DIM)).astype(np.float32)


def packed(vector) -> str:
    buffer = io.BytesIO()
    np.save(buffer, vector)
    return base64.b64encode(zlib.compress(buffer.getvalue())).decode()


def write(kind, folder):
    """(what to import, further options) of the same vectors in one of the forms."""
    if kind == "npy and list":
        np.save(folder / "v.npy", VECTORS)
        (folder / "names.txt").write_text("\n".join(NAMES))
        return folder / "v.npy", {"paths": folder / "names.txt"}
    if kind == "npz":
        np.savez(folder / "v.npz", embeddings=VECTORS, paths=np.array(NAMES), other=np.arange(3))
        return folder / "v.npz", {}
    if kind == "samples.json":
        samples = [{"filepath": name, "tags": [], "emb": {"$binary": {"base64": packed(vector), "subType": "00"}}}
                   for name, vector in zip(NAMES, VECTORS, strict=True)]  # fmt: skip
        (folder / "samples.json").write_text(json.dumps({"samples": samples}))
        return folder / "samples.json", {}
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = pyarrow.array(NAMES)
    if kind == "clip-retrieval":
        (folder / "out/img_emb").mkdir(parents=True)
        (folder / "out/metadata").mkdir()
        for number in range(12):  # img_emb_10 comes after img_emb_9
            np.save(folder / f"out/img_emb/img_emb_{number}.npy", VECTORS[number : number + 1])
            table = pyarrow.table({"image_path": names[number : number + 1], "caption": ["x"]})
            parquet.write_table(table, folder / f"out/metadata/metadata_{number}.parquet")
        return folder / "out", {}
    if kind == "npy and parquet":
        (folder / "out").mkdir()
        for number in range(2):
            part = slice(6 * number, 6 * number + 6)
            np.save(folder / f"out/{number}.npy", VECTORS[part])
            parquet.write_table(pyarrow.table({"key": names[part]}), folder / f"out/{number}.parquet")
        return folder / "out", {}
    fixed = kind == "parquet of fixed lists"
    flat = pyarrow.array(VECTORS.reshape(-1))
    column = pyarrow.array(VECTORS.tolist(), pyarrow.list_(pyarrow.float32()))
    if fixed:
        column = pyarrow.FixedSizeListArray.from_arrays(flat, DIM)
    table = pyarrow.table({"url": names, "embedding": column, "width": [1] * N})
    if kind == "folder of parquet":
        (folder / "out").mkdir()
        for number in range(3):
            parquet.write_table(table.slice(4 * number, 4), folder / f"out/part-{number}.parquet")
        return folder / "out", {}
    parquet.write_table(table, folder / "v.parquet", row_group_size=5)
    return folder / "v.parquet", {}


KINDS = ["npy and list", "npz", "samples.json", "parquet of lists", "parquet of fixed lists", "folder of parquet",
         "clip-retrieval", "npy and parquet"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_gives_the_same_file(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(importing, "_ROWS", 5)
    source, options = write(kind, tmp_path)
    if kind == "samples.json":
        options["vector_column"] = "emb"
    report = import_features(source, tmp_path / "f.h5", encoder="CLIP ViT-B/32", **options)
    assert (report.n, report.dim, report.store, report.unusable) == (N, DIM, "float32", 0)
    order = sorted(range(N), key=NAMES.__getitem__)
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.paths == [NAMES[i] for i in order]
        assert np.array_equal(file.features[:], VECTORS[order])
        assert (file.classes, file.usable.all()) == (["cat", "dog"], True)
        assert file.provenance["encoder"] == "imported: CLIP ViT-B/32"
        assert file.provenance["imported_from"] == str(source)
        assert len(file.provenance["weights_sha256"]) == 64
    assert len(protoprune.select(tmp_path / "f.h5", 0.5, k=2).kept_paths) == N // 2


# --- whole folders as the tools write them


def same_vectors(path, names=NAMES):
    order = sorted(range(len(names)), key=names.__getitem__)
    with FeatureFile(path) as file:
        assert file.paths == [names[i] for i in order]
        assert np.array_equal(file.features[:], VECTORS[order])


def test_an_export_of_fiftyone(tmp_path):
    """`dataset.export(export_dir=…, dataset_type=fo.types.FiftyOneDataset)`: metadata.json, samples.json, data/."""
    (tmp_path / "export/data/cat").mkdir(parents=True)
    (tmp_path / "export/metadata.json").write_text(json.dumps({"name": "d", "media_type": "image", "version": "1.0"}))
    samples = [
        {"_id": {"$oid": f"{i:024x}"}, "filepath": f"data/{name}", "tags": ["validation"], "_media_type": "image",
         "_rand": 0.5, "metadata": {"_cls": "ImageMetadata", "size_bytes": 5, "width": 2, "height": 2},
         "ground_truth": {"_id": {"$oid": f"{i:024x}"}, "_cls": "Classification", "tags": [], "label": "cat"},
         "uniqueness": 0.25, "clip": {"$binary": {"base64": packed(VECTORS[i]), "subType": "00"}}}
        for i, name in enumerate(NAMES)
    ]  # fmt: skip
    (tmp_path / "export/samples.json").write_text(json.dumps({"samples": samples}))
    import_features(tmp_path / "export", tmp_path / "f.h5")  # the only field that can be a vector
    same_vectors(tmp_path / "f.h5", [f"data/{name}" for name in NAMES])
    for one, vector in zip(samples, VECTORS, strict=True):
        one["dino"] = vector.tolist()
    (tmp_path / "export/samples.json").write_text(json.dumps({"samples": samples}))
    with pytest.raises(UsageError, match=r"which of clip, dino is it\? give --vector-column"):
        import_features(tmp_path / "export", tmp_path / "g.h5")
    import_features(tmp_path / "export", tmp_path / "g.h5", vector_column="dino")
    same_vectors(tmp_path / "g.h5", [f"data/{name}" for name in NAMES])


def test_what_clip_retrieval_makes_of_img2dataset(tmp_path):
    """`clip-retrieval inference`: img_emb, text_emb and metadata by partition; img2dataset's keys and columns."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    keys = [f"{number:05d}{row:04d}" for number in range(3) for row in range(4)]
    for name in ("img_emb", "text_emb", "metadata"):
        (tmp_path / "out" / name).mkdir(parents=True)
    for number in range(3):
        part = slice(4 * number, 4 * number + 4)
        np.save(tmp_path / f"out/img_emb/img_emb_{number:02d}.npy", VECTORS[part])
        np.save(tmp_path / f"out/text_emb/text_emb_{number:02d}.npy", VECTORS[part] + 1)
        parquet.write_table(
            pyarrow.table({"image_path": keys[part], "caption": ["a cat"] * 4, "url": ["https://x/y.jpg"] * 4,
                           "key": keys[part], "status": ["success"] * 4, "error_message": [None] * 4,
                           "width": [256] * 4}),
            tmp_path / f"out/metadata/metadata_{number:02d}.parquet",
        )  # fmt: skip
    import_features(tmp_path / "out", tmp_path / "f.h5", encoder="open_clip ViT-B-32")
    same_vectors(tmp_path / "f.h5", keys)


@pytest.mark.parametrize("beside", [True, False])
def test_parts_of_other_numbers_are_not_paired(beside, tmp_path):
    """A copy that lacks one file of vectors and another one of names: as many of both, of other images."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "out/img_emb").mkdir(parents=True)
    names = tmp_path / ("out/metadata" if beside else "names")
    names.mkdir()
    for number in range(3):
        np.save(tmp_path / f"out/img_emb/img_emb_{number}.npy", VECTORS[:4] + number)
        parquet.write_table(
            pyarrow.table({"key": [f"{number}/{row}" for row in range(4)]}), names / f"metadata_{number:02d}.parquet"
        )
    options = {} if beside else {"paths": names}
    (tmp_path / "out/img_emb/img_emb_1.npy").unlink()
    (names / "metadata_02.parquet").unlink()
    with pytest.raises(ProtopruneError, match=r"img_emb_2\.npy: metadata_01\.parquet has the next names, of another"):
        import_features(tmp_path / "out", tmp_path / "f.h5", **options)
    (tmp_path / "out/img_emb/img_emb_2.npy").rename(tmp_path / "out/img_emb/img_emb_1.npy")
    assert import_features(tmp_path / "out", tmp_path / "f.h5", **options).n == 8


def test_img2datasets_metadata_as_names(tmp_path):
    """NNNNN.parquet beside its tars lists the images that could not be downloaded too; those have no vector."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    keys = [f"{number:05d}{row:04d}" for number in range(2) for row in range(8)]
    there = [row % 4 != 3 for row in range(16)]
    for number in range(2):
        part = slice(8 * number, 8 * number + 8)
        status = ["success" if one else "failed_to_download" for one in there[part]]
        parquet.write_table(
            pyarrow.table({"url": [f"https://x/{key}.jpg" for key in keys[part]], "caption": ["x"] * 8,
                           "key": keys[part], "status": status,
                           "error_message": [None if one else "timed out" for one in there[part]]}),
            tmp_path / f"{number:05d}.parquet",
        )  # fmt: skip
        (tmp_path / f"{number:05d}_stats.json").write_text("{}")
    (tmp_path / "vectors").mkdir()
    np.save(tmp_path / "vectors/v.npy", VECTORS)
    import_features(tmp_path / "vectors/v.npy", tmp_path / "f.h5", paths=tmp_path)
    same_vectors(tmp_path / "f.h5", [key for key, one in zip(keys, there, strict=True) if one])


@pytest.mark.parametrize("layout", ["npy", "parquet", "npy_parquet"])
def test_what_embedding_reader_reads(layout, tmp_path):
    """Its three formats: folders of npy; of parquet with the vectors in a column; of npy with metadata elsewhere."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "emb").mkdir()
    (tmp_path / "meta").mkdir()
    for number in range(11):  # 10 comes after 9; the last part holds two
        part = slice(number, number + (2 if number == 10 else 1))
        names = pyarrow.table({"id": NAMES[part], "price": [1.5] * len(NAMES[part])})
        if layout == "parquet":
            vectors = pyarrow.array(VECTORS[part].tolist(), pyarrow.list_(pyarrow.float32()))
            parquet.write_table(names.append_column("embedding", vectors), tmp_path / f"emb/part_{number}.parquet")
        else:
            np.save(tmp_path / f"emb/emb_{number}.npy", VECTORS[part])
            parquet.write_table(names, tmp_path / f"meta/meta_{number}.parquet")
    options = {"paths": tmp_path / "meta"} if layout == "npy_parquet" else {}
    if layout == "npy":
        options = {"paths": NAMES}
    import_features(tmp_path / "emb", tmp_path / "f.h5", **options)
    same_vectors(tmp_path / "f.h5")


def test_half_precision_stays_and_double_becomes_single(tmp_path):
    for dtype, store in ((np.float16, "float16"), (np.float64, "float32")):
        np.save(tmp_path / "v.npy", VECTORS.astype(dtype))
        import_features(tmp_path / "v.npy", tmp_path / "f.h5", paths=NAMES, overwrite=True)
        with FeatureFile(tmp_path / "f.h5") as file:
            assert file.features.dtype == store
    np.save(tmp_path / "v.npy", VECTORS * 1e30)
    with pytest.raises(ProtopruneError, match="overflow float16; import them with --store float32"):
        import_features(tmp_path / "v.npy", tmp_path / "g.h5", paths=NAMES, store="float16")
    assert [path.name for path in tmp_path.iterdir() if "g.h5" in path.name] == []


def test_vectors_that_are_not_finite_are_images_that_failed(tmp_path):
    bad = VECTORS.copy()
    bad[3, 1], bad[7, 0] = np.nan, np.inf
    np.save(tmp_path / "v.npy", bad)
    assert import_features(tmp_path / "v.npy", tmp_path / "f.h5", paths=NAMES).unusable == 2
    with FeatureFile(tmp_path / "f.h5") as file:
        assert [(path, status.label) for path, status, _ in file.failures()] == [
            (name, "corrupt") for name in sorted((NAMES[3], NAMES[7]))
        ]
        assert not file.features[:][~file.usable].any()
    np.save(tmp_path / "v.npy", np.full((N, DIM), np.nan, np.float32))
    with pytest.raises(ProtopruneError, match="all 12 vectors hold NaN"):
        import_features(tmp_path / "v.npy", tmp_path / "g.h5", paths=NAMES)
    assert not os.path.exists(tmp_path / "g.h5.partial")


def test_without_names_rows_have_numbers(tmp_path):
    np.save(tmp_path / "v.npy", VECTORS)
    with pytest.warns(ProtopruneWarning, match="row numbers stand for them; give --paths"):
        import_features(tmp_path / "v.npy", tmp_path / "f.h5")
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.paths == [f"{i:06d}" for i in range(N)]
        assert np.array_equal(file.features[:], VECTORS)


def test_names_that_are_no_text_stand_where_a_list_of_images_has_them(tmp_path):
    """`scaling` and `tune --model` match the rows of images and vectors by their order: text is not sorted as bytes."""
    names = [os.fsdecode(name) for name in ("é.png".encode(), b"\x80.png", "中.png".encode(), b"z.png")]
    for name in names:
        write_image(tmp_path / "images" / name)
    np.save(tmp_path / "v.npy", VECTORS[:4])
    import_features(tmp_path / "v.npy", tmp_path / "f.h5", paths=names, root=tmp_path / "images")
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.paths == list(protoprune.list_folder(tmp_path / "images").paths)
        assert np.array_equal(file.features[:], VECTORS[[names.index(name) for name in file.paths]])


def test_names_that_are_files_have_size_and_time(tmp_path):
    for name in NAMES[:-1]:
        write_image(tmp_path / "images" / name)
    np.save(tmp_path / "v.npy", VECTORS)
    absolute = [str(tmp_path / "images" / name) for name in NAMES]
    with pytest.warns(ProtopruneWarning, match=rf"--root .*/images: 1 of {N} names is no file below it \(first: "):
        import_features(tmp_path / "v.npy", tmp_path / "f.h5", paths=absolute, root=tmp_path / "images")
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.paths == sorted(NAMES)
        assert file.provenance["root"] == str(tmp_path / "images")
        assert (file.size > 0).sum() == N - 1
        assert file.usable.all()  # the vector is there, wherever the image is
    import_features(tmp_path / "v.npy", tmp_path / "g.h5", paths=absolute)
    with FeatureFile(tmp_path / "g.h5") as file:
        assert file.paths == sorted(NAMES)
    with pytest.raises(UsageError, match="outside the root"):
        import_features(tmp_path / "v.npy", tmp_path / "h.h5", paths=absolute, root=tmp_path / "other")


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda f: np.save(f / "v.npy", VECTORS), {"paths": NAMES[:5]}, "12 vectors and 5 names"),
        (lambda f: np.save(f / "v.npy", VECTORS), {"paths": [*NAMES[:11], NAMES[0]]}, r"1 name has two vectors"),
        (lambda f: np.save(f / "v.npy", VECTORS[0]), {"paths": NAMES}, r"shape \(5,\), expected"),
        (lambda f: np.save(f / "v.npy", np.arange(24).reshape(12, 2)), {"paths": NAMES}, "numbers of type int64"),
        (lambda f: (f / "v.npy").write_bytes(b"junk"), {}, "cannot be read"),
        (lambda f: np.save(f / "v.npy", VECTORS[:0]), {}, "holds no vectors"),
        (lambda f: np.save(f / "v.npy", np.array([None])), {}, "cannot be read"),
        (lambda f: None, {}, "no such file or folder"),
        (lambda f: (f / "v.npy").mkdir(), {}, r"no \.npy or \.parquet in it"),
    ],
)
def test_what_does_not_fit(make, options, message, tmp_path):
    make(tmp_path)
    with pytest.raises(ProtopruneError, match=message):
        import_features(tmp_path / "v.npy", tmp_path / "f.h5", **options)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("f.h5")]


def of_vectors(folder, vectors, **columns):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"embedding": pyarrow.array(vectors, pyarrow.list_(pyarrow.float32())), **columns})
    pyarrow.parquet.write_table(table, folder / "v.parquet")
    return folder / "v.parquet"


def in_parts(folder, rows, count=1):
    """`count` files of 6 vectors, with one of `rows` names beside them."""
    for number in range(count):
        np.save(folder / f"{number}.npy", VECTORS[:6])
    of_vectors(folder, [[1.0]] * rows, key=NAMES[:rows])
    return folder


def of_samples(folder, samples):
    (folder / "samples.json").write_text(json.dumps({"samples": samples}))
    return folder / "samples.json"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda f: in_parts(f, 6, count=2), {}, "2 files of vectors and 1 of metadata"),
        (lambda f: in_parts(f, 5), {}, r"v\.parquet: 5 names for 6 vectors"),
        (lambda f: of_vectors(f, [[1.0]]), {"vector_column": "x"}, "no x that could be it, only embedding"),
        (lambda f: of_vectors(f, [[1.0], None]), {"paths": ["a", "b"]}, "1 row has no vector; leave them out"),
        (lambda f: of_vectors(f, [[1.0] * 2, [1.0] * 3]), {"paths": ["a", "b"]}, "not all of one length"),
        (lambda f: of_vectors(f, [[1.0] * 1, [1.0] * 3]), {"paths": ["a", "b"]}, "not all of one length"),
        (lambda f: of_vectors(f, [*[[1.0]] * 4, *[[1.0] * 2] * 4]), {"paths": list("abcdefgh")}, "of 1 and of 2 dimen"),
        (lambda f: of_vectors(f, [[1.0], [2.0]], key=["a", None]), {}, "1 row has no name"),
        (lambda f: of_vectors(f, [[1.0], [2.0]], key=["a", "./"]), {}, "'': an image needs a name"),
        (lambda f: of_vectors(f, [[1.0], [2.0]]), {"paths": "nowhere"}, "--paths nowhere: no such file"),
        (lambda f: of_vectors(f, [[1.0]]), {"store": "float8"}, "--store float8: expected auto, float16 or float32"),
        (lambda f: of_samples(f, []), {}, "no samples in it"),
        (lambda f: of_samples(f, [{"emb": [1.0], "filepath": "a"}, {"emb": [1.0]}]), {}, "1 of 2 samples have no emb"),
    ],
)
def test_tables_and_folders_that_do_not_fit(make, options, message, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(importing, "_ROWS", 4)
    with pytest.raises(ProtopruneError, match=message):
        import_features(make(tmp_path), tmp_path / "f.h5", **options)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("f.h5")]


def test_names_that_are_given_are_looked_for_nowhere_else(tmp_path):
    np.savez(tmp_path / "v.npz", features=VECTORS, one=np.array(NAMES), other=np.array(NAMES))
    import_features(tmp_path / "v.npz", tmp_path / "f.h5", paths=NAMES)
    same_vectors(tmp_path / "f.h5")
    pytest.importorskip("pyarrow")
    names = of_vectors(tmp_path, VECTORS.tolist(), one=NAMES, other=NAMES[::-1])
    import_features(tmp_path / "v.npz", tmp_path / "g.h5", paths=names, path_column="one")
    same_vectors(tmp_path / "g.h5")


def test_a_list_of_nothing_is_no_vector(tmp_path):
    samples = [{"filepath": name, "tags": [], "clip": row.tolist()} for name, row in zip(NAMES, VECTORS, strict=True)]
    import_features(of_samples(tmp_path, samples), tmp_path / "f.h5")
    same_vectors(tmp_path / "f.h5")


@pytest.mark.parametrize("data", [b"PAR1 and no table", b"no table"])
def test_files_that_are_no_vectors(data, tmp_path):
    for name, said in (
        ("v.parquet", "cannot be read"),
        ("v.bin", r"expected \.npy, \.npz, \.parquet, a samples\.json"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ProtopruneError, match=said):
            import_features(tmp_path / name, tmp_path / "f.h5", paths=["a"])


@pytest.mark.parametrize("reordered", [True, False])
def test_row_indices_of_vectors_in_another_order_are_warned_of(tmp_path, monkeypatch, reordered):
    monkeypatch.chdir(tmp_path)
    np.save("v.npy", VECTORS)
    names = sorted(NAMES, reverse=reordered)
    import_features("v.npy", "f.h5", paths=names)
    for options in (["-o", "k.npy"], ["-o", "k.txt", "--removed", "r.npy"]):
        result = CliRunner().invoke(app, ["select", "f.h5", "--keep", "0.5", *options])
        assert result.exit_code == 0, result.output
        assert ("warning: row indices count the rows of f.h5, which are sorted" in result.stderr) == reordered
    assert "row indices" not in CliRunner().invoke(app, ["select", "f.h5", "--keep", "0.5", "-o", "k.txt"]).stderr
    with warnings.catch_warnings(record=True) as caught:  # as the command does
        warnings.simplefilter("always")
        chosen = protoprune.select("f.h5", keep=0.5)
        chosen.write("k.txt")
        assert not caught
        chosen.write("k.npy")
    assert [str(one.message).startswith("row indices count the rows of f.h5") for one in caught] == [True] * reordered


def test_several_arrays_ask_which(tmp_path):
    np.savez(tmp_path / "v.npz", a=VECTORS, b=VECTORS + 1)
    with pytest.raises(UsageError, match="which of a, b is it? give --vector-column NAME".replace("?", r"\?")):
        import_features(tmp_path / "v.npz", tmp_path / "f.h5", paths=NAMES)
    import_features(tmp_path / "v.npz", tmp_path / "f.h5", paths=NAMES, vector_column="b")
    with FeatureFile(tmp_path / "f.h5") as file:
        assert np.array_equal(file.features[:], (VECTORS + 1)[sorted(range(N), key=NAMES.__getitem__)])


def test_what_holds_no_vectors_says_what_would(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"path": NAMES, "0": VECTORS[:, 0], "1": VECTORS[:, 1]}), tmp_path / "wide.parquet")
    np.savez(tmp_path / "v.npz", labels=np.arange(N))
    for name in ("wide.parquet", "v.npz"):
        for column in (None, "0"):
            with pytest.raises(
                UsageError, match=f"{name}: holds no vectors; expected an array .* in each row, not a col"
            ):
                import_features(tmp_path / name, tmp_path / "f.h5", paths=NAMES, vector_column=column)
    (tmp_path / "image.index").write_bytes(b"IxFI")
    with pytest.raises(
        UsageError, match=r"image.index: expected .npy, .* an index of faiss\) by numpy.save, .* --paths"
    ):
        import_features(tmp_path / "image.index", tmp_path / "f.h5", paths=NAMES)


def test_a_table_of_names_has_other_columns(tmp_path, recwarn):
    """They are of images that vectors were made of, not a list of what to keep: nothing is to be said of that."""
    np.save(tmp_path / "v.npy", VECTORS)
    rows = "".join(f"{name},{640 + i},{i % 2}\n" for i, name in enumerate(NAMES))
    for column in ("height", "keep"):
        (tmp_path / "names.csv").write_text(f"path,width,{column}\n{rows}")
        import_features(tmp_path / "v.npy", tmp_path / f"{column}.h5", paths=tmp_path / "names.csv")
        same_vectors(tmp_path / f"{column}.h5", NAMES)
    assert not recwarn.list


def test_at_the_command_line_and_never_over_another_file(tmp_path):
    np.save(tmp_path / "v.npy", VECTORS)
    (tmp_path / "names.csv").write_text("path\n" + "\n".join(NAMES) + "\n")
    (tmp_path / "y.csv").write_text("path,label\n" + "".join(f"{name},{i % 3}\n" for i, name in enumerate(NAMES)))
    arguments = [
        "import",
        str(tmp_path / "v.npy"),
        "--paths",
        str(tmp_path / "names.csv"),
        "-o",
        str(tmp_path / "f.h5"),
    ]
    result = CliRunner().invoke(app, [*arguments, "--labels", str(tmp_path / "y.csv")])
    assert result.exit_code == 0, result.stderr
    assert "12 vectors x 5 (float32), names: names.csv, 3 classes: y.csv, sha256" in result.stderr
    with FeatureFile(tmp_path / "f.h5") as file:
        assert file.classes == ["0", "1", "2"]
    before = (tmp_path / "f.h5").read_bytes()
    assert CliRunner().invoke(app, arguments).exit_code == 2
    assert (tmp_path / "f.h5").read_bytes() == before
    assert CliRunner().invoke(app, [*arguments, "--overwrite"]).exit_code == 0
    assert CliRunner().invoke(app, [*arguments[:-1], str(tmp_path / "v.npy"), "--overwrite"]).exit_code == 2
    np.testing.assert_array_equal(np.load(tmp_path / "v.npy"), VECTORS)
    said = CliRunner().invoke(app, ["info", str(tmp_path / "f.h5")]).stdout
    assert "imported: v.npy" in said


def test_what_a_killed_import_left_is_replaced_and_nothing_else(tmp_path):
    """An import starts again, and so does a merge; an unfinished run of `embed` may be hours of a GPU."""
    np.savez(tmp_path / "v.npz", features=np.eye(4, dtype=np.float32), paths=np.array(list("abcd")))
    partial, key = tmp_path / "f.h5.partial", dict.fromkeys(KEY, "x") | {"store": "float32"}
    images = ImageList("/", ["a"], np.zeros(1, np.int64), np.zeros(1, np.int64), np.full(1, -1, np.int32), [])
    for own in ({**key, "precision": IMPORTED}, {**key, "merged_from": "0" * 32}):
        create_partial(str(tmp_path / "f.h5"), images, 4, own)
        assert import_features(tmp_path / "v.npz", tmp_path / "f.h5").n == 4
        (tmp_path / "f.h5").unlink()
    create_partial(str(tmp_path / "f.h5"), images, 4, key)
    for before in (partial.read_bytes(), b"\x89HDF"):  # the second one may be anything
        partial.write_bytes(before)
        with pytest.raises(UsageError, match=r"f\.h5\.partial: an unfinished run of `protoprune embed`.* --overwrite"):
            import_features(tmp_path / "v.npz", tmp_path / "f.h5")
        assert partial.read_bytes() == before
    assert import_features(tmp_path / "v.npz", tmp_path / "f.h5", overwrite=True).n == 4
    assert not partial.exists()


def test_an_interrupted_import_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    np.save("v.npy", VECTORS)
    monkeypatch.setattr(importing.PartialFile, "commit", interrupt)
    result = CliRunner().invoke(app, ["import", "v.npy"])
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (130, "interrupted")
    assert os.listdir() == ["v.npy"]


@pytest.mark.parametrize(
    ("vectors", "store", "way_on"),
    [
        (np.full((3, 4), 1e-9, np.float32), "float16", "import them with --store float32"),
        (np.full((3, 4), 1e-50), "auto", "scale them up"),
    ],
)
def test_vectors_that_a_type_has_no_digits_for_are_refused(vectors, store, way_on, tmp_path):
    """They all became zeros, of which no two images differ."""
    vectors = vectors * [[1], [0], [1]]  # a vector of zeros is one
    np.save(tmp_path / "v.npy", vectors)
    with pytest.raises(ProtopruneError, match=rf"2 vectors of a block \(first: c\) underflow float.*; {way_on}"):
        import_features(tmp_path / "v.npy", tmp_path / "f.h5", paths=["c", "d", "e"], store=store)
    assert os.listdir(tmp_path) == ["v.npy"]


def test_names_that_no_file_can_have_are_refused_and_others_sorted_as_files_are(tmp_path):
    samples = [{"filepath": name, "emb": [1.0, float(number)]} for number, name in enumerate(("a\ud800.jpg", "b.jpg"))]
    (tmp_path / "samples.json").write_text(json.dumps({"samples": samples}))
    with pytest.raises(UsageError, match=r"'a\\ud800.jpg': no file can have this name"):
        import_features(tmp_path / "samples.json", tmp_path / "f.h5")
    names = [os.fsdecode(name) for name in (b"\xff.jpg", "\uff21.jpg".encode(), "\U0001f600.jpg".encode())]
    np.save(tmp_path / "v.npy", np.eye(3, dtype=np.float32))
    import_features(tmp_path / "v.npy", tmp_path / "f.h5", paths=names)
    with FeatureFile(tmp_path / "f.h5") as file:
        assert list(file.paths) == sorted(names, key=os.fsencode) != sorted(names)


def test_names_of_images_in_shards(tmp_path):
    """The shards are no classes, the folders in them are; and an image in a shard that is there is there."""
    names = [f"{shard:04d}.tar/{kind}/{i}.jpg" for shard in range(2) for kind in ("ant", "bee") for i in range(3)]
    (tmp_path / "0000.tar").write_bytes(b"")
    (tmp_path / "0001.tar").write_bytes(b"")
    np.save(tmp_path / "v.npy", np.eye(12, dtype=np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_features(tmp_path / "v.npy", tmp_path / "f.h5", paths=names, root=tmp_path)
    with FeatureFile(tmp_path / "f.h5") as file:
        assert (file.classes, file.labels.tolist()) == (["ant", "bee"], [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        import_features(tmp_path / "v.npy", tmp_path / "u.h5", paths=[f"s3://bucket/set/{one}" for one in names],
                        root="s3://bucket/set")  # fmt: skip
    with FeatureFile(tmp_path / "u.h5") as file:
        assert (file.provenance["root"], list(file.paths)) == ("s3://bucket/set", names)
    with pytest.raises(UsageError, match=r"s3://other/0000.tar/ant/0.jpg: outside the root s3://bucket/set"):
        import_features(tmp_path / "v.npy", tmp_path / "w.h5", paths=[f"s3://other/{one}" for one in names],
                        root="s3://bucket/set")  # fmt: skip
    import_features(tmp_path / "v.npy", tmp_path / "r.h5", paths=names, root="s3://bucket/set")
    with FeatureFile(tmp_path / "r.h5") as file:
        assert (file.provenance["root"], list(file.paths)) == ("s3://bucket/set", names)
    flat = [name.replace("/ant/", "/a").replace("/bee/", "/b") for name in names]
    (tmp_path / "0001.tar").unlink()
    with pytest.warns(ProtopruneWarning, match=r"6 of 12 names are no files below it \(first: 0001.tar/a0.jpg"):
        import_features(tmp_path / "v.npy", tmp_path / "g.h5", paths=flat, root=tmp_path)
    with FeatureFile(tmp_path / "g.h5") as file:
        assert file.classes == []


def test_arrays_that_unpack_to_more_than_fits_into_memory(tmp_path, monkeypatch):
    """Only those that are wanted count, and only they are read."""
    from protoprune import npy

    np.savez_compressed(tmp_path / "v.npz", features=np.eye(4, dtype=np.float32), other=np.zeros(100_000))
    monkeypatch.setattr(npy, "memory_share", lambda parts: 1000)
    assert import_features(tmp_path / "v.npz", tmp_path / "f.h5", paths=list("abcd")).n == 4
    np.savez_compressed(tmp_path / "v.npz", features=np.zeros((1000, 4), np.float32))
    with pytest.raises(ProtopruneError, match=r"v\.npz: cannot be read \(unpacks to 16\.1 kB, more than half"):
        import_features(tmp_path / "v.npz", tmp_path / "g.h5", paths=[f"{i}.png" for i in range(1000)])
    packed = base64.b64encode(zlib.compress(bytes(1 << 25))).decode()
    samples = {"samples": [{"filepath": "a.png", "embedding": {"$binary": {"base64": packed, "subType": "00"}}}]}
    (tmp_path / "samples.json").write_text(json.dumps(samples))
    with pytest.raises(ProtopruneError, match=r"samples\.json: cannot be read"):
        import_features(tmp_path / "samples.json", tmp_path / "g.h5")
    assert not (tmp_path / "g.h5").exists()
