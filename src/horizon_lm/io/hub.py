"""A quick check that a name without a local path is in the local cache or that the Hub is reachable.

Without a network the Hub's client retries for half a minute; one connection tells the same in 2.5 seconds. If
it succeeds, nothing differs from a plain call of the client.
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
_PATIENCE_SECONDS = 2.5  # for one connection, unless HF_HUB_ETAG_TIMEOUT is set
REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # a name on the Hub: owner/name, or name alone
_said: set[str] = set()


def require_reachable(
    name: str, key: str, *, kind: str = "model", error: type[HorizonError] = ConfigError
) -> None:
    """Raise `error` at once for a name that is neither here nor on a reachable Hub.

    key: the setting, for the message. kind: `model` (tokenizers too) or `dataset`. Accepts existing paths and
    names that cannot be a repository's. Without a network, a cached repository is used with a warning, and
    the process stays offline.
    """
    if Path(name).expanduser().exists() or not REPOSITORY.fullmatch(name):
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
                _log.warning("%s: %s; reading %r from the local cache", key, reason, name)
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
    """Check the name of a model before slow libraries are imported; accept names that look like files."""
    if not name.endswith((".yaml", ".yml", ".json", ".jsonl")):
        require_reachable(name, key)


def is_offline() -> bool:
    """Return whether the environment forbids requests to the Hub."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def unreachable(endpoint: str) -> str | None:
    """Return why the Hub is unreachable; None if it is reachable or must not be asked."""
    if is_offline() and endpoint not in _gone:
        return None
    return _probe(endpoint)


_gone: set[str] = set()


@lru_cache(maxsize=8)
def _probe(endpoint: str) -> str | None:
    """Connect once to the Hub, or to its proxy, in a thread: without a network a resolver may take long."""
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
    """Make the libraries use only their caches for the rest of the process."""
    from huggingface_hub import constants

    _gone.add(constants.ENDPOINT)
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _is_cached(name: str, kind: str) -> bool:
    """Return whether the local cache holds a snapshot of a repository, or the copy that `datasets` made."""
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
    """Reduce a name to letters: the library writes OwnerName/DataSet as OwnerName___data_set."""
    return re.sub(r"[\W_]", "", name).lower()


def _has_entries(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
