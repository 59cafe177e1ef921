"""Where the published weights of an encoder are: timm's hub, the authors' site, or an installed package.

Without a network each answer comes within a few seconds, in one line that names the ways on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from importlib.util import find_spec
from typing import Any

from protoprune.encoders.catalogue import EncoderInfo
from protoprune.errors import ProtopruneError
from protoprune.files import sha256_of


def hub_overlay(name: str, hub_id: str) -> dict[str, Any] | None:
    """How timm shall find its weights: None for its own download, a cached file when the hub is out of reach.

    The hub's client retries for most of a minute without a network; one quick look first keeps the answer short.
    """
    try:
        from huggingface_hub import constants, try_to_load_from_cache
    except ImportError:  # it comes with timm, whose absence is reported on its own
        return None
    error = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)
    if error is None:
        return None
    for file in ("model.safetensors", "pytorch_model.bin"):
        cached = try_to_load_from_cache(hub_id, file)
        if isinstance(cached, str):
            return {"file": cached}
    raise ProtopruneError(cannot_download(name, "model.safetensors", f"{constants.ENDPOINT}/{hub_id}", error))


def _unreachable(url: str) -> str | None:
    """Why `url` cannot be reached, None when something answers."""
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=4.0).close()
    except urllib.error.HTTPError:
        return None  # it answered
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return None


def download(info: EncoderInfo) -> str:
    """The authors' weight file in torch.hub's cache.

    We know of no published checksums, so the digest of the first complete download is kept beside the file and every
    later use is checked against it.
    """
    import torch

    url = info.url or ""  # who has none has a package
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")
    path = os.path.join(folder, os.path.basename(url))
    record = path + ".sha256"
    if not os.path.exists(path):
        error = _unreachable(url)
        if error is None:
            try:
                os.makedirs(folder, exist_ok=True)
                torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
            except OSError as failure:
                error = str(failure)
        if error is not None:
            raise ProtopruneError(cannot_download(info.name, os.path.basename(path), url, error))
    actual = sha256_of(path)
    try:
        with open(record) as file:
            expected = file.read().strip()
    except FileNotFoundError:
        expected = actual
        with contextlib.suppress(OSError), open(record, "w") as file:  # a shared cache may be read-only
            file.write(actual)
    if actual != expected:
        raise ProtopruneError(f"{path}: damaged (sha256 {actual[:12]}…, not {expected[:12]}…); delete it and run again")
    return path


def packaged(info: EncoderInfo) -> str:
    """The weight file inside an installed package, its digest checked. The package is found, not imported."""
    file = info.package
    assert file is not None, info.name
    folder, _, inner = file.path.partition("/")
    spec = find_spec(folder)
    if spec is None:
        raise ProtopruneError(
            f"{info.name}: its weights come with the package {file.distribution}, which is not installed; "
            f"run: {file.install}"
        )
    path = os.path.join(*(spec.submodule_search_locations or [folder])[:1], *inner.split("/"))
    try:
        actual = sha256_of(path)
    except OSError as error:
        raise ProtopruneError(f"{path}: {error.strerror}; run: {file.install} --force-reinstall") from None
    if actual != file.sha256:
        raise ProtopruneError(
            f"{path}: not the published weights (sha256 {actual[:12]}…, not {file.sha256[:12]}…); "
            f"run: {file.install} --force-reinstall"
        )
    return path


def cannot_download(name: str, file: str, source: str, error: object) -> str:
    return (
        f"{name}: cannot download {file} from {source} ({error}); give a local copy with --weights FILE, or use an "
        "encoder that needs no download: --encoder lite0 (supervised; pip install 'protoprune[lite]') or the bundled "
        "--encoder mini"
    )
