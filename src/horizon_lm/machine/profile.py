"""Hardware profiles: rates and sizes of a machine with their sources, for the planner.

Shipped files describe common machines; `horizon doctor` measures this one and writes the same format.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from horizon_lm.config.base import STRICT
from horizon_lm.errors import ConfigError

_FOLDER = "horizon_lm.machine.profiles"
# Serves until `horizon doctor` has measured this machine: the smallest shipped profile.
FALLBACK = "cpu-2core"
HERE = "here"  # the name of this machine's own profile


class Rates(BaseModel):
    """Rates per second by number format."""

    model_config = STRICT

    bfloat16: float = Field(gt=0)
    float32: float = Field(gt=0)

    def of(self, dtype: str) -> float:
        return self.float32 if dtype == "float32" else self.bfloat16


class Profile(BaseModel):
    """Sizes in bytes, rates per second. Every key has an entry in `sources`.

    matmul, attention, attention_backward: FLOPs as torch counts them (attention ignoring causality).
    elementwise: bytes read and written. operation_seconds: the least that any operation takes. h2d, d2h: with
    both directions busy. optimizer: bytes that the update on the host reads and writes. host: bytes that a
    copy in host memory reads and writes. process_bytes: a process with torch and transformers before it has a
    model. heap_share: overhead of the C library's heap as a share of what is alive in it (if the device is
    the CPU). context_bytes: taken by the device's driver and libraries. update_threads: the fewest threads
    with which updates are about as fast as with any number; None if not measured.
    """

    model_config = STRICT

    name: str
    title: str
    device: Literal["cpu", "cuda"]
    measured: bool
    cores: int = Field(ge=1)
    host_bytes: float = Field(gt=0)
    device_bytes: float = Field(ge=0)
    process_bytes: float = Field(ge=0)
    heap_share: float = Field(ge=0)
    context_bytes: float = Field(ge=0)
    matmul: Rates
    attention: Rates
    attention_backward: Rates
    elementwise: Rates
    operation_seconds: float = Field(ge=0)
    h2d: float = Field(gt=0)
    d2h: float = Field(gt=0)
    host: float = Field(gt=0)
    optimizer: float = Field(gt=0)
    disk: float = Field(gt=0)
    update_threads: int | None = Field(None, ge=1)
    sources: dict[str, str]

    def to_yaml(self) -> str:
        values = self.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(values, sort_keys=False, width=100)

    def rates(self, kind: str) -> Rates:
        """Rates of a kind of operation; see `plan.work`."""
        found: Rates = getattr(self, kind)
        return found

    @property
    def kind(self) -> str:
        """How reliable its figures are, in words."""
        if not self.measured:
            return "simulated: not measured here"
        return "measured on this machine" if self.name == HERE else "measured on the machine it names"


def shipped() -> list[str]:
    """List the profiles that come with the package."""
    files = resources.files(_FOLDER).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def cache_path() -> Path:
    """Return the path to which `horizon doctor` writes the profile of this machine."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "horizon-lm" / "hardware.yaml"


def load_profile(name: str) -> Profile:
    """Load a shipped profile, a file, or `auto`: the profile measured by doctor, else the fallback.

    Raises ConfigError for a name that is neither, and for an invalid file.
    """
    if name == "auto":
        return read_profile(cache_path()) if cache_path().is_file() else load_profile(FALLBACK)
    if name in shipped():
        text = (resources.files(_FOLDER) / f"{name}.yaml").read_text(encoding="utf-8")
        return _parse(text, name)
    if Path(name).expanduser().is_file():
        return read_profile(Path(name).expanduser())
    raise ConfigError(
        f"hardware={name!r} is neither a profile nor a file",
        hint=f"use one of {', '.join(shipped())}, or a file",
    )


def read_profile(path: Path) -> Profile:
    try:
        return _parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise ConfigError(
            f"hardware: {path} cannot be read: {error.strerror}", hint="check the path"
        ) from error


@lru_cache(maxsize=16)  # YAML takes longer than all else that a small run plans
def _parse(text: str, where: str) -> Profile:
    try:
        profile = Profile.model_validate(yaml.safe_load(text))
    except (ValidationError, yaml.YAMLError) as error:
        first = str(error).splitlines()[1:3] or [str(error)]
        raise ConfigError(
            f"hardware: {where} is not a profile: {' '.join(line.strip() for line in first)}",
            hint="`horizon doctor --fresh` writes a new one; docs/planning.md has the format",
        ) from error
    named = {name for name in Profile.model_fields if getattr(profile, name) is not None}
    missing = sorted(named - {"sources", "name", "title", "measured", "device"} - set(profile.sources))
    if missing:
        raise ConfigError(f"hardware: {where} gives no source for {missing[0]}", hint="add it under sources")
    return profile
