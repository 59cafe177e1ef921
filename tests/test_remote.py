"""Shards by URL: the same features as from the disk, and every kind of trouble in one line without secrets."""

import contextlib
import errno
import http.server
import os
import socket
import threading
import time
import types
import urllib.request

import numpy as np
import pytest
from shard_helpers import image_folder, members, write_parquet, write_tar, write_tars
from typer.testing import CliRunner

import protoprune
from protoprune import stores
from protoprune.cli import app
from protoprune.embedding.pipeline import embed
from protoprune.encoders import load_encoder
from protoprune.errors import ProtopruneError, ProtopruneWarning, UsageError
from protoprune.evaluation import runs
from protoprune.features.featureset import FeatureSet, read_plan
from protoprune.features.opening import open_features
from protoprune.images.decode import ImageError, Status
from protoprune.images.listing import list_folder
from protoprune.shards.resharding import reshard
from protoprune.shards.sharding import embed_shards
from protoprune.sources import ShardError, find_shards, list_shards
from protoprune.sources.finding import Shard
from protoprune.sources.reader import ImageReader

fsspec = pytest.importorskip("fsspec", reason="needs protoprune[remote]")
from protoprune.sources import remote  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("remote") / "images", {"ant": 6, "bee": 6})


@pytest.fixture(scope="module")
def mini():
    return load_encoder("mini")


@pytest.fixture
def memory(folder, tmp_path):
    """memory://set/tars/0000.tar …0002.tar"""
    store = fsspec.filesystem("memory")
    store.store.clear()
    for path in write_tars(tmp_path / "tars", members(folder), 3).iterdir():
        store.pipe(f"/set/tars/{path.name}", path.read_bytes())
    yield store
    store.store.clear()


@pytest.fixture(scope="module")
def s3(bucket, folder, tmp_path_factory):
    """The bucket with tars in it."""
    packed = tmp_path_factory.mktemp("packed")
    for path in write_tars(packed / "tars", members(folder), 3).iterdir():
        bucket.put_file(str(path), f"images-bucket/set/tars/{path.name}")
    return bucket


def run(url, out, encoder):
    return embed_shards(find_shards(url), encoder, out, device="cpu")


def same(out, folder, encoder, tmp_path):
    """The set `out` holds the folder's features and gives its kept set."""
    embed(list_folder(folder), encoder, tmp_path / "reference.h5", device="cpu")
    with open_features(out) as one, open_features(tmp_path / "reference.h5") as other:
        assert np.array_equal(one.features[:], other.features[:])
        assert np.array_equal(one.labels, other.labels)
    keeps = [protoprune.select(path, 0.5).keep.tolist() for path in (out, tmp_path / "reference.h5")]
    assert keeps[0] == keeps[1]


@pytest.mark.parametrize("url", ["memory://set/tars", "memory://set/tars/*.tar", "memory://set/tars/{0000..0002}.tar"])
def test_memory_gives_the_folders_features(url, memory, folder, mini, tmp_path):
    report = run(url, tmp_path / "f", mini)
    assert (report.states, report.n, report.finished) == ({"embedded": 3}, 12, True)
    same(tmp_path / "f", folder, mini, tmp_path)
    with FeatureSet(tmp_path / "f") as whole:
        assert (whole.paths[0], whole.provenance["root"]) == ("0000.tar/ant/000.png", "memory://set/tars")
    assert run(url, tmp_path / "f", mini).states == {"unchanged": 3}
    memory.pipe("/set/tars/0001.tar", memory.cat("/set/tars/0000.tar"))
    assert run(url, tmp_path / "f", mini).states == {"unchanged": 2, "embedded": 1}


def test_s3_gives_the_folders_features(s3, folder, mini, tmp_path):
    report = run("s3://images-bucket/set/tars/{0000..0003}.tar", tmp_path / "f", mini)
    assert (report.states, report.n) == ({"embedded": 3, "failed": 1}, 12)
    assert report.failed_shards == [("0003.tar", "missing", "no such file")]
    assert run("s3://images-bucket/set/tars", tmp_path / "g", mini).finished
    same(tmp_path / "g", folder, mini, tmp_path)
    assert run("s3://images-bucket/set/tars/*.tar", tmp_path / "g", mini).states == {"unchanged": 3}
    for path in (tmp_path / "g").rglob("*"):
        assert b"secret" not in (path.read_bytes() if path.is_file() else b"")


def test_parquet_on_s3(s3, folder, mini, tmp_path):
    pytest.importorskip("pyarrow")
    s3.put_file(str(write_parquet(tmp_path / "p.parquet", members(folder))), "images-bucket/p/part-0.parquet")
    report = run("s3://images-bucket/p/part-0.parquet", tmp_path / "f", mini)
    assert (report.n, report.finished) == (12, True)
    same(tmp_path / "f", folder, mini, tmp_path)


def test_at_the_command_line(s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["embed", "s3://images-bucket/set/tars/*.tar", "--encoder", "mini", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "3 shards (.tar 3)" in result.stderr
    assert "under s3://images-bucket/set/tars" in result.stderr
    assert read_plan("features")[0]["root"] == "s3://images-bucket/set/tars"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://images-bucket/nothing/*.tar", "matches no shard"),
        ("s3://images-bucket/nothing/{0..3}.tar", "none of the 4 shards is there"),
        ("s3://no-such-bucket/x/*.tar", "no such bucket|matches no shard"),
        ("memory://nothing/*.tar", "matches no shard"),
        ("nonsense://x/*.tar", "no file system for nonsense://"),
    ],
)
def test_what_is_not_there(url, message, s3):
    with pytest.raises(ProtopruneError, match=message):
        find_shards(url)


def test_an_endpoint_that_cannot_be_reached_is_said_within_seconds(s3, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    started = time.monotonic()
    with pytest.raises(ProtopruneError, match=r"cannot be reached .*AWS_ENDPOINT_URL|no answer within"):
        find_shards("s3://images-bucket/set/tars/*.tar")
    assert time.monotonic() - started < 40
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def test_a_store_that_does_not_answer(memory, monkeypatch):
    monkeypatch.setattr(stores, "_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(remote, "_find", lambda *_: time.sleep(5))
    with pytest.raises(ProtopruneError, match=r"no answer within 0\.2 seconds; check the network"):
        find_shards("memory://set/tars")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError("Access Denied"), "permission denied"),
        (OSError("An error occurred (ExpiredToken): The provided token has expired."), "credentials have expired"),
        (OSError("Request had invalid authentication credentials. Expected OAuth 2 access token, 401"), "not accepted"),
        (FileNotFoundError("x"), "no such bucket, folder or file"),
        (ConnectionError("refused"), "cannot be reached"),
        (
            OSError(errno.EBUSY, "Please reduce your request rate."),
            "no answer now (Please reduce your request rate.); run",
        ),
        (
            OSError(121, "We encountered an internal error."),
            "no answer now (We encountered an internal error.); run the",
        ),
        (type("TooManyRedirects", (Exception,), {"status": 0})("0, message=''"), "redirects without end"),
        (type("NoCredentialsError", (Exception,), {})("Unable to locate credentials"), "FSSPEC_S3_ANON=true"),
        (ValueError("bad http://me:pa55@host/x?X-Amz-Signature=abc"), "bad http://host/x"),
    ],
)
def test_trouble_in_words_without_secrets(error, said):
    text = stores.trouble(error)
    assert said in text
    assert "pa55" not in text
    assert "Signature" not in text


def test_trouble_with_credentials_names_the_tools_of_the_store(monkeypatch):
    error = OSError("Your default credentials were not found")
    assert "GOOGLE_APPLICATION_CREDENTIALS" in stores.trouble(error, "gs://bucket/x")
    assert "HF_TOKEN" in stores.trouble(error, "hf://datasets/x")
    assert "AWS_PROFILE" in stores.trouble(error, "s3://bucket/x")
    monkeypatch.setattr(stores, "_ANSWER_SECONDS", 0.01)
    with pytest.raises(ProtopruneError, match=r"no answer within .* check the network .* FSSPEC_GS_TOKEN=anon"):
        stores.answered("gs://bucket/x", lambda: time.sleep(1))


@pytest.mark.parametrize("list_of", [False, True])
def test_a_version_of_an_object_is_not_taken_for_the_newest(list_of):
    """s3fs passes over it, unless it is told to be aware of versions."""
    one = "s3://bucket/a/0001.tar?versionId=3HL4kqtJvjVBH40Nrjfkd"
    with pytest.raises(UsageError, match=r"0001\.tar\?versionId=.*: one version of an object is not read; leave"):
        list_shards(["s3://bucket/a/0000.tar", one]) if list_of else find_shards(one)


def test_urls_are_shown_without_secrets(monkeypatch):
    with pytest.raises(UsageError) as error:
        find_shards("nonsense://me:pa55@host/x.tar?token=abc")
    assert "pa55" not in str(error.value)
    assert "abc" not in str(error.value)


def test_a_store_that_shows_what_has_not_arrived_yet_gets_it_under_another_name_first(tmp_path, monkeypatch):
    """All but object stores. Of two writers of a new file the second is refused; a cut connection leaves nothing."""
    url = f"local://{tmp_path}/set/a.json"
    stores.write(url, b"one", new=True)
    with pytest.raises(FileExistsError):
        stores.write(url, b"two", new=True)
    stores.write(url, b"three")
    local = fsspec.get_filesystem_class("local")

    def cut(self, path, data, **_):
        with open(path, "wb") as file:
            file.write(data[:2])
        raise ConnectionError("the connection was lost")

    with monkeypatch.context() as patch:
        patch.setattr(local, "pipe_file", cut)
        with pytest.raises(ProtopruneError, match=r"a\.json: cannot be reached .* what was written before is kept"):
            stores.write(url, b"four")
    assert (stores.read(url), os.listdir(tmp_path / "set")) == (b"three", ["a.json"])
    with pytest.raises(ProtopruneError, match=r"b\.json: no such bucket, folder or file"):
        stores.get(f"local://{tmp_path}/set/b.json", str(tmp_path / "got"))


def test_a_path_is_no_url(tmp_path):
    assert stores.given(f"file:/{tmp_path}") == str(tmp_path)
    with pytest.raises(UsageError, match=rf"-o file://{tmp_path}/x: give the path itself, {tmp_path}/x$"):
        stores.refuse_url(f"file://{tmp_path}/x", "-o ")


def test_what_arrives_short_or_is_gone_meanwhile(memory, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with pytest.raises(ShardError) as error, remote.fetched(Shard("0000.tar", "memory://set/tars/0000.tar", 5, 1)):
        pass
    assert error.value.status == Status.TRUNCATED
    with pytest.raises(ShardError) as error, remote.fetched(Shard("x.tar", "memory://set/tars/x.tar", 5, 1)):
        pass
    assert error.value.status == Status.MISSING


def test_a_full_folder_of_temporary_files_ends_the_run(memory, mini, tmp_path, monkeypatch):
    """Each shard had failed then, one after the other, and the set was finished without them."""
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "get_file", full)
        said = rf"no room for it in {tmp_path} \(No space left on device\); TMPDIR names another place"
        with pytest.raises(ProtopruneError, match=rf"^0000\.tar: {said}$"):
            embed_shards(find_shards("memory://set/tars"), mini, tmp_path / "f", device="cpu")
        with pytest.raises(ProtopruneError, match=rf"^0000\.tar: {said}$"):
            reshard(["0000.tar/ant/000.png"], tmp_path / "out", root="memory://set/tars")
        with ImageReader("memory://set/tars") as read, pytest.raises(ImageError, match=f"0000.tar: {said}"):
            read("0000.tar/ant/000.png")
    report = embed_shards(find_shards("memory://set/tars"), mini, tmp_path / "f", device="cpu")
    assert (report.states, report.finished) == ({"embedded": 3}, True)


def test_a_shaky_store_is_tried_again(memory, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    real, calls = type(memory).get_file, []

    def shaky(self, *arguments, **options):
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionError("reset")
        return real(self, *arguments, **options)

    monkeypatch.setattr(type(memory), "get_file", shaky)
    shard = find_shards("memory://set/tars/0000.tar").shards[0]
    with remote.fetched(shard) as path:
        assert os.path.getsize(path) == shard.size
    assert len(calls) == 3


def test_the_metadata_beside_a_tar_is_no_shard(memory):
    memory.pipe("/set/tars/0000.parquet", b"PAR1")
    memory.pipe("/set/tars/0000_stats.json", b"{}")
    source = find_shards("memory://set/tars")
    assert [shard.name for shard in source.shards] == ["0000.tar", "0001.tar", "0002.tar"]
    assert source.skipped == {".parquet": 1, ".json": 1}


# --- without rights, and without secrets in what is said


def fresh():
    """No store, and no client with its credentials, of an earlier test."""
    fsspec.get_filesystem_class("s3").clear_instance_cache()


def said_in_a_line(*arguments) -> str:
    """The one line of a command that fails, within seconds."""
    started = time.monotonic()
    result = CliRunner().invoke(app, [str(one) for one in arguments])
    assert time.monotonic() - started < 40
    assert result.exit_code in (1, 2), result.output
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_credentials_that_the_store_does_not_know(s3, mini, tmp_path, monkeypatch):
    """moto checks them when it is told to."""
    embed = ["embed", "s3://images-bucket/set/tars", "-o", tmp_path / "f", "--encoder", "mini", "--device", "cpu"]
    reset = f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset-auth"

    def checked_after(requests: bytes) -> None:
        urllib.request.urlopen(urllib.request.Request(reset, requests, {"Content-Type": "text/plain"})).close()
        fresh()

    checked_after(b"0")
    try:
        said = said_in_a_line(*embed)
        assert "s3://images-bucket/set/tars: permission denied" in said
        assert "check the credentials' rights to list, read and, for -o, write" in said
        folder = image_folder(tmp_path / "images", {"ant": 2})
        tars = write_tars(tmp_path / "tars", members(folder), 1)
        said = said_in_a_line("embed", tars, "-o", "s3://images-bucket/f", "--encoder", "mini", "--device", "cpu")
        assert "permission denied" in said
    finally:
        checked_after(b"inf")
    assert "very-secret-value" not in said
    assert not (tmp_path / "f").exists()
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "no credentials; set them as your store's tools expect" in said_in_a_line(*embed)
    fresh()


class Expired(http.server.BaseHTTPRequestHandler):
    """What S3 answers to a session token that has expired."""

    def do_GET(self) -> None:
        body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
        self.send_response(400)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.command == "GET" else b"")

    do_HEAD = do_PUT = do_GET

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def served():
    """served(handler) -> the URL of an HTTP server on 127.0.0.1 with it."""
    servers = []

    def start(handler) -> str:
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_token_that_has_expired(s3, served, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{served(Expired)}")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "a-secret-token")
    fresh()
    for url in ("s3://images-bucket/set/tars", "s3://images-bucket/set/tars/*.tar"):
        said = said_in_a_line("embed", url, "-o", tmp_path / "f", "--encoder", "mini")
        assert "the credentials have expired" in said
        assert "renew them and run it again" in said
        assert "a-secret-token" not in said
    said = said_in_a_line("select", "s3://images-bucket/f", "--keep", "0.5")
    assert "the credentials have expired" in said
    fresh()


def test_credentials_in_an_s3_url_are_refused_and_not_repeated(tmp_path):
    url = "s3://AKIAKEY:pa55word@bucket"
    for arguments in (["embed", f"{url}/*.tar"], ["select", f"{url}/f", "--keep", "0.5"], ["info", f"{url}/f"]):
        said = said_in_a_line(*arguments)
        assert "credentials in a URL would end up in histories and logs" in said
        assert "pa55word" not in said
        assert "AKIAKEY" not in said


@pytest.mark.parametrize("url", ["gs://bucket/x/*.tar", "gs://bucket/f"])
def test_a_store_whose_package_is_not_installed(url):
    try:
        import gcsfs  # noqa: F401

        pytest.skip("gcsfs is installed")
    except ImportError:
        pass
    said = said_in_a_line(*(["embed", url] if "*" in url else ["select", url, "--keep", "0.5"]))
    assert url in said
    assert "gcsfs" in said
    assert "pip install what gs:// needs" in said


def test_hugging_face_without_a_network_is_said_within_seconds(tmp_path):
    pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")
    said = said_in_a_line("embed", "hf://datasets/owner/name/data/train-*.parquet", "-o", tmp_path / "f")
    assert "hf://datasets/owner/name/data/train-*.parquet: cannot be reached" in said
    assert said.rstrip().endswith("check the network and the URL")


def test_secrets_are_in_no_file_and_no_output(s3, folder, served, tmp_path, monkeypatch, caplog, capfd):
    """User, password and signature of a URL, and the environment's keys: nothing of them in what is written."""
    secrets = ["pa55word", "SIGNATURE0123", "very-secret-value", "AKIATESTKEY"]
    serving = write_tars(tmp_path / "served", members(folder), 2)
    (serving / "0001.tar").write_bytes(b"<html>no</html>")
    (tmp_path / "run").mkdir()

    class Files(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=str(serving))

        def log_message(self, *_) -> None:
            pass

    host = served(Files)
    query = "?X-Amz-Signature=SIGNATURE0123"
    monkeypatch.setenv("PROTOPRUNE_CACHE", str(tmp_path / "run/cache"))
    monkeypatch.chdir(tmp_path / "run")
    said = b""
    for arguments in (
        ["embed", f"http://me:pa55word@{host}/0000.tar{query}", "-o", "http"],
        ["embed", f"http://me:pa55word@{host}/{{0000..0002}}.tar{query}", "-o", "http3", "--errors", "e.csv"],
        ["info", "http3"],
        ["merge", "http3", "-o", "m.h5"],
        ["select", "http3", "--keep", "0.5", "--manifest", "m.csv", "-o", "kept.txt"],
        ["embed", "s3://images-bucket/set/tars", "-o", "s3://images-bucket/secrets/f"],
        ["embed", "s3://images-bucket/set/tars", "-o", "s3"],
        ["embed", "s3://me:pa55word@images-bucket/set/tars", "-o", "s3b"],
        ["embed", f"http://me:pa55word@{host}/nothing/0000.tar{query}", "-o", "http4"],
    ):
        if arguments[0] == "embed":
            arguments += ["--encoder", "mini", "--device", "cpu"]
        result = CliRunner().invoke(app, arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        said += result.output.encode()
    said += "".join([*capfd.readouterr(), caplog.text]).encode()
    written = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for name in s3.find("images-bucket/secrets"):
        written[name] = s3.cat_file(name)
    assert {"set.json", "m.h5", "kept.txt", "e.csv"} <= {os.path.basename(name) for name in written}
    assert b"Traceback" not in said
    assert b"2 shards could not be used, first 0001.tar: corrupt" in said
    for secret in secrets:
        assert secret.encode() not in said, said.decode()
        assert [name for name, data in written.items() if secret.encode() in data] == []


# --- web servers ------------------------------------------------------------------------------------------------------


class Web:
    """Answers of a web server: path -> content, or the status that it answers; `asked` is what it was asked for."""

    def __init__(self, served):
        self.files: dict[str, bytes | int] = {}
        self.headers: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.together: threading.Barrier | None = None  # where only so many requests at once are answered
        self.url = f"http://{served(self._handler())}"

    def _handler(self):
        web = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                web.asked.append((self.command, self.path))
                found = web.files.get(self.path.partition("?")[0].lstrip("/"), 404)
                if web.together is not None and self.command == "HEAD":
                    web.together.wait(60)
                body = b"no" if isinstance(found, int) else found
                self.send_response(found if isinstance(found, int) else 200)
                for name, value in {**web.headers, "Content-Length": len(body)}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    with contextlib.suppress(OSError):  # who asked has hung up
                        self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_) -> None:
                pass

        return Handler


@pytest.fixture
def web(served, folder, tmp_path):
    """Four tars on a web server, and none of a store's clients of an earlier test."""
    pytest.importorskip("aiohttp")
    fsspec.get_filesystem_class("http").clear_instance_cache()
    web = Web(served)
    for path in write_tars(tmp_path / "tars", members(folder), 4).iterdir():
        web.files[path.name] = path.read_bytes()
    return web


def test_what_a_web_server_answers_for_some_of_many(web, mini, tmp_path, monkeypatch):
    """fsspec calls every answer but 200 a file that is not there."""
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    whole = dict(web.files)
    report = run(f"{web.url}/{{0000..0003}}.tar", tmp_path / "done", mini)
    assert report.n == 12
    web.files |= {"0000.tar": 403, "0001.tar": 429, "0002.tar": 404}
    report = run(f"{web.url}/{{0000..0003}}.tar", tmp_path / "f", mini)
    assert report.n == 3
    said = {name: (status, reason) for name, status, reason in report.failed_shards}
    assert said["0000.tar"][0] == said["0001.tar"][0] == "unreadable"
    assert "the server refuses it (403" in said["0000.tar"][1]
    assert "a signed URL may have expired" in said["0000.tar"][1]
    assert "the server has no answer now (429" in said["0001.tar"][1]
    assert said["0002.tar"] == ("missing", "no such file")
    with pytest.warns(ProtopruneWarning, match=r"0000.tar: the shard is gone, or cannot be read \(the server refuses"):
        report = run(f"{web.url}/{{0000..0003}}.tar", tmp_path / "done", mini)
    assert (report.n, report.states) == (12, {"unchanged": 1, "kept": 3})
    web.files = dict.fromkeys(whole, 503)
    with pytest.raises(ProtopruneError, match=r"none of the 4 shards can be read: the server has no answer now \(503"):
        find_shards(f"{web.url}/{{0000..0003}}.tar")
    with pytest.raises(ProtopruneError, match=r"0000.tar: cannot be read: the server has no answer now"):
        find_shards(f"{web.url}/0000.tar")
    with pytest.raises(ProtopruneError, match=r"nothing.tar: not there; check the URL"):
        find_shards(f"{web.url}/nothing.tar")


def test_a_server_that_recovers_is_asked_again(web, monkeypatch):
    whole = web.files["0001.tar"]
    web.files["0001.tar"] = 503
    monkeypatch.setattr(remote.time, "sleep", lambda _: web.files.update({"0001.tar": whole}))
    assert all(shard.size > 0 for shard in find_shards(f"{web.url}/{{0000..0003}}.tar").shards)


@pytest.mark.parametrize("mark", ["ETag", "Last-Modified", "Content-MD5"])
def test_a_shard_that_changed_on_a_web_server_is_embedded_again(mark, web, folder, mini, tmp_path):
    """Tars are padded to 10 kB: their size says little, and Python's own web server sends no ETag."""
    packed = [write_tar(tmp_path / "one.tar", [("1.png", data)]).read_bytes() for _, data in members(folder)[:2]]
    assert len(packed[0]) == len(packed[1])
    web.files["0000.tar"] = packed[0]
    web.headers = {mark: "Mon, 01 Jun 2026 10:00:00 GMT"}
    assert run(f"{web.url}/0000.tar", tmp_path / "f", mini).embedded == 1
    assert run(f"{web.url}/0000.tar", tmp_path / "f", mini).embedded == 0
    web.files["0000.tar"], web.headers = packed[1], {mark: "Tue, 02 Jun 2026 10:00:00 GMT"}
    assert run(f"{web.url}/0000.tar", tmp_path / "f", mini).embedded == 1


def test_what_hugging_face_calls_a_files_content_is_its_version():
    class Hub:
        def unstrip_protocol(self, path):
            return f"hf://{path}"

    facts = [{"name": "datasets/o/n/a.tar", "size": 10_240, "blob_id": blob} for blob in ("1a", "2b", "2b")]
    versions = [remote._shard(Hub(), one["name"], "datasets/o/n", one).version for one in facts]
    assert versions[0] != versions[1] == versions[2]


def test_signed_urls(web, mini, tmp_path):
    """The query is no part of a name, whatever is in it, and a shard is fetched once: looking whether it is a folder
    would fetch it too."""
    query = "?X-Amz-Credential=AKIA/2026/s3&X-Amz-Signature=abc"
    out = tmp_path / "f"
    source = find_shards(f"{web.url}/0001.tar{query}")
    assert ([shard.name for shard in source.shards], source.root) == (["0001.tar"], web.url)
    assert web.asked == [("HEAD", f"/0001.tar{query}")]
    assert run(f"{web.url}/{{0000..0001}}.tar{query}", out, mini).n == 6
    listed = tmp_path / "list.txt"
    listed.write_text("".join(f"{web.url}/{name}.tar{query}\n" for name in ("0000", "0001")))
    result = CliRunner().invoke(app, ["embed", str(listed), "-o", str(out), "--encoder", "mini", "--device", "cpu"])
    assert "2 shards (2 unchanged), 6 images" in result.stderr, result.stderr
    kept = list(protoprune.select(out, 1.0, k=2).kept_paths)
    web.asked.clear()
    protoprune.reshard(kept, tmp_path / "new", root=f"{web.url}/{query}", features=out)
    assert {path for _, path in web.asked} == {f"/000{n}.tar{query}" for n in (0, 1)}
    assert "Signature" not in (tmp_path / "new/reshard.json").read_text()
    web.files["0001.tar"] = 403
    with pytest.raises(ProtopruneError, match=r"0001.tar: the server refuses it \(403"):
        protoprune.reshard(kept, tmp_path / "newer", features=out)


def test_lists_of_urls(web, memory, tmp_path):
    source = list_shards([f"{web.url}/0001.tar?a=b/c", f"{web.url}/0000.tar"])
    assert ([shard.name for shard in source.shards], source.root) == (["0000.tar", "0001.tar"], web.url)
    source = list_shards(["memory://set/tars/0001.tar", "memory://set/tars/0002.tar"], "memory://set")
    assert [shard.name for shard in source.shards] == ["tars/0001.tar", "tars/0002.tar"]
    for urls, root, said in (
        (["memory://set/0.tar", "http://h/0.tar"], None, "http://h/0.tar: in one list with memory://set/0.tar"),
        (["memory://set/0.tar", "0.tar"], None, "0.tar: in one list with"),
        (["http://h1/0.tar", "http://h2/0.tar"], None, "several servers or buckets"),
        (["memory://set/tars/0000.tar"], "memory://set/t", "outside the root"),
    ):
        with pytest.raises(UsageError, match=said):
            list_shards(urls, root)


def test_many_shards_are_asked_for_at_once(web, monkeypatch):
    """One after the other, a thousand of them took longer than a server may take to answer at all."""
    monkeypatch.setattr(remote, "_AT_ONCE", 4)
    web.together = threading.Barrier(4)  # nobody is answered before four have asked
    web.files |= {f"{number:04d}.tar": web.files["0000.tar"] for number in range(4, 8)}
    assert len(find_shards(f"{web.url}/{{0000..0007}}.tar")) == 8


def test_a_shard_may_take_longer_than_five_minutes(web):
    """aiohttp's own limit is for the whole of a download, however fast it arrives."""
    times = stores.store(web.url).client_kwargs["timeout"]
    assert (times.total, times.sock_read) == (None, 60)


@pytest.mark.parametrize("key", ["a#1/q?0.tar", "br[1]/x.tar", "{a}/b.tar", "a b/x+y%20z.tar", "ünï/ö.tar"])
def test_names_that_urls_and_patterns_read_otherwise(key, memory, folder, mini, tmp_path):
    data = write_tars(tmp_path / "one", members(folder), 1).joinpath("0000.tar").read_bytes()
    memory.pipe(f"/odd/{key}", data)
    above = f"memory://odd/{key.partition('/')[0]}"
    for number, url in enumerate(
        ["memory://odd", above, f"memory://odd/{key}"] if "{" not in key else ["memory://odd"]
    ):
        out = tmp_path / f"f{number}"
        assert run(url, out, mini).n == 12
        kept = list(protoprune.select(out, 1.0, k=2).kept_paths)
        assert protoprune.reshard(kept, tmp_path / f"r{number}", features=out).images == 12


def test_absolute_lists_of_a_store_are_urls(memory, mini, tmp_path):
    """They were paths below the current folder, /here/memory:/set/tars/…, which nothing takes."""
    out = tmp_path / "f"
    run("memory://set/tars", out, mini)
    result = CliRunner().invoke(app, ["select", str(out), "--keep", "0.5", "--absolute", "--k", "2"])
    kept = result.stdout.split()
    plain = CliRunner().invoke(app, ["select", str(out), "--keep", "0.5", "--k", "2"]).stdout.split()
    assert kept == [f"memory://set/tars/{one}" for one in plain]
    written = [protoprune.reshard(kept, tmp_path / "a", root="memory://set/tars").images,
               protoprune.reshard(kept, tmp_path / "b").images]  # fmt: skip
    assert written == [6, 6]
    assert (tmp_path / "a/00000.tar").read_bytes() == (tmp_path / "b/00000.tar").read_bytes()
    samples = [{"__key__": name.partition(".tar/")[2][:-4], "__url__": f"memory://set/tars/{name[:8]}", "png": b""}
               for name in plain]  # fmt: skip
    assert list(protoprune.keep_only(samples, kept)) == samples
    examples = types.SimpleNamespace(root="memory://set/tars")
    assert runs._relative(kept, examples, set(plain)) == plain
    result = CliRunner().invoke(app, ["select", str(out), "--keep", "0.5", "--links", str(tmp_path / "links")])
    assert "the images are on a store (memory://set/tars), to which no link can lead" in result.stderr


def test_a_listing_is_as_new_as_the_call(s3, bucket):
    """s3fs keeps listings for the life of the process: in a notebook a changed shard was not seen."""
    url, key = "s3://images-bucket/listed/{0..1}.tar", "images-bucket/listed"
    for number in range(2):
        bucket.pipe_file(f"{key}/{number}.tar", b"1" * 1000)
    before = find_shards(url).shards
    other = fsspec.filesystem("s3", skip_instance_cache=True)
    other.pipe_file(f"{key}/0.tar", b"2" * 1000)
    other.rm_file(f"{key}/1.tar")
    after = find_shards(url).shards
    assert (after[0].size, after[1].size) == (1000, -1)
    assert after[0].version != before[0].version


def test_loose_images_on_a_store_are_said(memory):
    memory.pipe("/loose/a/1.jpg", b"x")
    memory.pipe("/loose/a/2.jpg", b"x")
    with pytest.raises(UsageError, match=r"memory://loose: holds images \(.jpg 2\) and no shard; images are read from"):
        find_shards("memory://loose")
