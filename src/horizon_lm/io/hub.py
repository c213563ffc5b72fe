"""Whether a name that is no local path can be looked up: the local cache first, then a quick look at the Hub.

The Hub's client tries again and again for half a minute where there is no network. One connection tells the
same within two and a half seconds. Where it succeeds nothing is different from a plain call of the client.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import threading
from functools import lru_cache
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from horizon_lm.errors import ConfigError, HorizonError
from horizon_lm.text import redact

_log = logging.getLogger(__name__)
_PATIENCE_SECONDS = 2.5  # for one connection; HF_HUB_ETAG_TIMEOUT, where it is set
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_said: set[str] = set()


def require_reachable(
    name: str, key: str, *, kind: str = "model", error: type[HorizonError] = ConfigError
) -> None:
    """Raise `error`, in one line and at once, for a name that can be had neither here nor from the Hub.

    key: the setting, for the message. kind: `model` (tokenizers too) or `dataset`. What exists here, and what
    cannot be a repository's name, is left to the caller. Without a network a repository in the local cache
    is taken from there, for the rest of the process, with a warning.
    """
    if Path(name).expanduser().exists() or not _REPOSITORY.fullmatch(name):
        return
    from huggingface_hub import constants

    is_cached = _is_cached(name, kind)
    reason = unreachable(constants.ENDPOINT)
    if reason is None and not (constants.HF_HUB_OFFLINE or is_offline()):
        return
    if is_cached:
        if reason is not None:
            _go_offline()
            if name not in _said:
                _said.add(name)
                _log.warning("%s: %s; %r is read from the local cache", key, reason, name)
        return
    what = "file or folder" if kind == "dataset" else "folder"
    why, way = reason, "check the network (HF_ENDPOINT, proxies)"
    if reason is None:
        why, way = "HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to download it"
    raise error(
        f"{key}={name!r} is neither a {what} here nor in the local cache, and {why}",
        hint=f"check the path; looked in {Path.cwd()}; for a name on the Hub {way}",
    )


def require_model(name: str, key: str) -> None:
    """`require_reachable` for the name of a model, for the commands: before a library is imported, which
    takes longer. What looks like a file is left to those who say what is there instead."""
    if not name.endswith((".yaml", ".yml", ".json", ".jsonl")):
        require_reachable(name, key)


def is_offline() -> bool:
    """Whether the environment forbids requests to the Hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def unreachable(endpoint: str) -> str | None:
    """Why the Hub cannot be reached, in words; None where it can be, or must not be asked."""
    if is_offline() and endpoint not in _gone:
        return None
    return _probe(endpoint)


_gone: set[str] = set()


@lru_cache(maxsize=8)
def _probe(endpoint: str) -> str | None:
    """One connection to the Hub, or to the proxy on the way to it. The name is resolved in a thread of its
    own: a resolver without a network may take longer than anybody waits."""
    url = urlsplit(endpoint)
    proxy = getproxies().get(url.scheme) or getproxies().get("all")
    if proxy and not proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = url.port or {"http": 80, "socks5": 1080, "socks5h": 1080}.get(url.scheme, 443)
    patience = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _PATIENCE_SECONDS)
    found: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((url.hostname or "", port), timeout=patience).close()
            found.append(None)
        except OSError as error:
            found.append(error.strerror or str(error) or type(error).__name__)

    thread = threading.Thread(target=connect, name="horizon-probe", daemon=True)
    thread.start()
    thread.join(patience)
    reason = found[0] if found else f"no answer in {patience:g} s"
    return None if reason is None else f"{redact(endpoint)} cannot be reached ({reason})"


def _go_offline() -> None:
    """For the rest of the process: the libraries look into their caches without trying the network."""
    from huggingface_hub import constants

    _gone.add(constants.ENDPOINT)
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _is_cached(name: str, kind: str) -> bool:
    """Whether the local cache holds a snapshot of a repository, or what `datasets` made of it."""
    from huggingface_hub import constants

    folder = f"{kind}s--{name.replace('/', '--')}"
    if _has_entries(Path(constants.HF_HUB_CACHE) / folder / "snapshots"):
        return True
    if kind != "dataset":
        return False
    home = Path(constants.HF_HOME) / "datasets"
    made = Path(os.environ.get("HF_DATASETS_CACHE") or home).expanduser()
    wanted = _letters(name)
    return made.is_dir() and any(_letters(path.name) == wanted for path in made.iterdir())


def _letters(name: str) -> str:
    """The library writes OwnerName/DataSet as OwnerName___data_set."""
    return re.sub(r"[\W_]", "", name).lower()


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
