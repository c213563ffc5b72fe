"""A cache of outlines on disk: a model's units, and the traces of its parts.

Most of a plan's time goes into importing transformers' model code and running a layer on fake tensors. The
results depend on configuration, settings and versions alone; all of these make up the file's name.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import platform
import re
import sys
import zlib
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from horizon_lm import plan as package
from horizon_lm.config import TrainConfig
from horizon_lm.config.adapters import AdapterSettings
from horizon_lm.io import files
from horizon_lm.io.leftovers import sweep_files
from horizon_lm.machine.profile import cache_path
from horizon_lm.memory.layout import Parameter, UnitLayout
from horizon_lm.plan.model_flops import Counted
from horizon_lm.plan.work import Trace, replay

_FORMAT = 1
_MOST_TRACES, _MOST_FILES = 400, 64
_EARLIER = re.compile(r"\.[a-z0-9_]{8}")  # names of unfinished files, by earlier versions
# Prefixes of environment variables that change what torch and transformers do.
_VARIABLES = ("TORCH", "PYTORCH", "TRANSFORMERS", "ATEN", "USE_", "DISABLE_")
# A part of the model, and the shape [batch, tokens] that it ran on.
TraceKey = tuple[Hashable, int, int]


@dataclass(frozen=True)
class Facts:
    """What a plan needs of a model besides its traces.

    kinds: the first layer of each kind. kind_of: the kind of each layer. rows, width: the embedding table's.
    vocabulary: the head's outputs. positions: max_position_embeddings, if the model has it. experts: the
    implementation of its experts, if it has any.
    """

    model_type: str
    units: tuple[UnitLayout, ...]
    kinds: tuple[int, ...]
    kind_of: tuple[int, ...]
    tied: bool
    embedding_trainable: bool
    rows: int
    width: int
    vocabulary: int
    max_head_tokens: int
    positions: int | None
    experts: str | None = None

    @property
    def embedding_unit(self) -> int:
        head = len(self.kind_of) + 1
        return head if self.tied else head + 1


@dataclass
class OutlineCache:
    """Findings on one model under one set of settings. facts, counted: None until known."""

    facts: Facts | None = None
    counted: Counted | None = None
    traces: dict[TraceKey, Trace] = field(default_factory=dict)

    @property
    def known(self) -> tuple:
        """A value that changes with each finding."""
        return len(self.traces), self.facts, self.counted

    def to_bytes(self) -> bytes:
        assert self.facts is not None
        kept = list(self.traces.items())[-_MOST_TRACES:]
        values = {
            "facts": asdict(self.facts),
            "counted": asdict(self.counted) if self.counted is not None else None,
            "traces": [[*key, trace.events, trace.numbers] for key, trace in kept],
        }
        return gzip.compress(json.dumps(values, default=str).encode(), compresslevel=1)

    @classmethod
    def from_bytes(cls, data: bytes) -> OutlineCache:
        values = json.loads(gzip.decompress(data))
        facts = values["facts"]
        facts["units"] = tuple(_unit(row) for row in facts["units"])
        facts |= {name: tuple(facts[name]) for name in ("kinds", "kind_of")}
        counted = values["counted"]
        cache = cls(Facts(**facts), Counted.from_json(counted) if counted is not None else None)
        for part, batch, tokens, events, numbers in values["traces"]:
            found = [tuple(event) for event in events]
            trace = Trace(found, numbers, replay(found, numbers))
            cache.traces[tuple(part) if isinstance(part, list) else part, batch, tokens] = trace
        return cache


def _unit(row: dict[str, Any]) -> UnitLayout:
    parameters = []
    for values in row.pop("parameters"):
        compute = getattr(torch, str(values.pop("compute_dtype")).removeprefix("torch."))
        shape = tuple(values.pop("shape"))
        parameters.append(Parameter(shape=shape, compute_dtype=compute, **values))
    return UnitLayout(parameters=tuple(parameters), **row)


@contextmanager
def outline_cache(config: TrainConfig) -> Iterator[OutlineCache]:
    """Load the cache of the run's model, and save new findings at the end.

    It is empty and not saved in a program other than `horizon`, for a model that files alone do not determine
    (custom code, tokens to be added, a saved adapter), and if the file cannot be read or written.
    """
    key = _key(config) if package.models_are_stock else None
    path = None if key is None else cache_folder() / f"{key}.json.gz"
    cache = _read(path)
    known = cache.known
    try:
        yield cache
    finally:
        if path is not None and cache.facts is not None and known != cache.known:
            with suppress(OSError):
                _write(path, cache.to_bytes())


def cache_folder() -> Path:
    return cache_path().parent / "outlines"


def _read(path: Path | None) -> OutlineCache:
    """Read a file; an empty cache if it is missing or damaged."""
    if path is not None:
        with suppress(OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError):
            return OutlineCache.from_bytes(files.read_bytes(path))
    return OutlineCache()


def _write(path: Path, data: bytes) -> None:
    """Write atomically, and delete the oldest of many files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep_files(_EARLIER, path.parent)
    files.write_file(path, data)
    kept = sorted(path.parent.glob("*.json.gz"), key=lambda p: p.lstat().st_mtime_ns)
    for old in kept[:-_MOST_FILES]:
        old.unlink(missing_ok=True)


def _key(config: TrainConfig) -> str | None:
    """Hash of everything that an outline depends on; None if files do not tell."""
    if config.trust_remote_code or config.new_tokens or config.adapter_name_or_path:
        return None
    if config.init_model is not None:
        model: Any = [config.init_model, config.train_tokenizer_vocab_size]
    else:
        text = _config_json(str(config.model_name_or_path), config.model_revision)
        if text is None:
            return None
        model = hashlib.sha256(text).hexdigest()
    decides = {
        "format": _FORMAT,
        "model": model,
        "settings": [config.dtype, config.attn_implementation, config.experts_implementation],
        "tiles": config.mlp_tile_tokens,
        "trained": [[key, getattr(config, key)] for key in AdapterSettings.__annotations__],
        "machine": [sys.version, platform.machine(), torch.__version__],
        "environment": sorted(item for item in os.environ.items() if item[0].startswith(_VARIABLES)),
        "installed": _installed(),
        "code": _code(),
    }
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _config_json(name: str, revision: str | None) -> bytes | None:
    """Read config.json of a folder or of the Hub; None if there is none."""
    folder = Path(name).expanduser()
    with suppress(Exception):  # the plan itself reports the error
        if folder.is_dir():
            return files.read_bytes(folder / "config.json")
        from huggingface_hub import hf_hub_download

        from horizon_lm.io.hub import require_reachable

        require_reachable(name, "model_name_or_path")
        return Path(hf_hub_download(name, "config.json", revision=revision)).read_bytes()
    return None


def _installed() -> list[str]:
    """List all installed distributions with their versions."""
    found: list[str] = []
    for place in sys.path:
        with suppress(OSError):
            found += [name for name in os.listdir(place or ".") if name.endswith((".dist-info", ".egg-info"))]
    return sorted(found)


def _code() -> Sequence[tuple[str, int, int]]:
    """List this package's own files, with size and time."""
    root = Path(__file__).parents[1]
    stats = ((str(path.relative_to(root)), path.stat()) for path in sorted(root.rglob("*.py")))
    return [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
