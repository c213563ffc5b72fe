"""Hardware profiles: rates and sizes of a machine with their sources, for the planner.

Shipped files describe common machines; `horizon doctor` measures this one and writes the same format.
"""

from __future__ import annotations

import os
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError

from horizon_lm.config.base import STRICT
from horizon_lm.errors import ConfigError

_FOLDER = "horizon_lm.machine.profiles"
# Serves until `horizon doctor` has measured this machine: the smallest shipped profile.
FALLBACK = "cpu-2core"
HERE = "here"  # the name of this machine's own profile

# Assumed for nodes without figures of their own, in bytes per second and seconds.
ASSUMED_LINKS = "PCIe between GPUs and 100 Gb/s for each node are assumed, on the CPU Gloo"
_ETHERNET = 12e9  # 100 Gb/s per node, of which NCCL reaches 12 GB/s (NVIDIA/nccl-tests issue 29)
_COLLECTIVE_SECONDS = 25e-6  # NCCL's own estimate of a small ring on H100 (NVIDIA/nccl issue 1453)
_GLOO, _GLOO_SECONDS = 0.5e9, 0.5e-3  # 2 and 4 ranks on 127.0.0.1, torch 2.13, 2 cores, 2026-11-29
_MESSAGE_SECONDS = 1e-4  # a small message by Gloo: 0.2 ms for both directions, the same machine


class Rates(BaseModel):
    """Rates per second by number format."""

    model_config = STRICT

    bfloat16: float = Field(gt=0)
    float32: float = Field(gt=0)

    def of(self, dtype: str) -> float:
        return self.float32 if dtype == "float32" else self.bfloat16


class Node(BaseModel):
    """A node whose GPUs all belong to one run: its figures replace the profile's for runs of several ranks.
    Every key has an entry in `sources`.

    gpus: in the node. cores, host_bytes, optimizer: of the whole node. peer: bytes per second that each GPU
    receives, and sends at the same time, in collectives between the node's GPUs. network: the same between
    nodes. peer_seconds, network_seconds: the least that a collective takes within a node, and across nodes.
    message_seconds: for a small message between the host processes of two ranks.
    """

    model_config = STRICT

    gpus: int = Field(ge=1)
    cores: int = Field(ge=1)
    host_bytes: float = Field(gt=0)
    optimizer: float = Field(gt=0)
    peer: float = Field(gt=0)
    network: float = Field(gt=0)
    peer_seconds: float = Field(ge=0)
    network_seconds: float = Field(ge=0)
    message_seconds: float = Field(ge=0)
    sources: dict[str, str]


class Profile(BaseModel):
    """Sizes in bytes, rates per second. Every key has an entry in `sources`.

    matmul, attention, attention_backward: FLOPs as torch counts them (attention ignoring causality).
    elementwise: bytes read and written. operation_seconds: the least that any operation takes. h2d, d2h: with
    both directions busy. optimizer: bytes that the update on the host reads and writes. host: bytes that a
    copy in host memory reads and writes. process_bytes: a process with torch and transformers before it has a
    model. heap_share: overhead of the C library's heap as a share of what is alive in it (if the device is
    the CPU). context_bytes: taken by the device's driver and libraries. update_threads: the fewest threads
    with which updates are about as fast as with any number; None if not measured. node: the machine as a
    node of a run of several ranks; None if not known (`as_node`).
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
    node: Node | None = None
    sources: dict[str, str]

    def to_yaml(self) -> str:
        values = self.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(values, sort_keys=False, width=100)

    def rates(self, kind: str) -> Rates:
        """Rates of a kind of operation; see `plan.work`."""
        found: Rates = getattr(self, kind)
        return found

    def as_node(self, ranks: int) -> Node:
        """The node in which `ranks` ranks run. Without figures of its own it is this machine, and links are
        assumed: PCIe between GPUs and 100 Gb/s per node; on the CPU Gloo."""
        if self.node is not None:
            return self.node
        is_cpu = self.device == "cpu"
        return Node(
            gpus=ranks,
            cores=self.cores,
            host_bytes=self.host_bytes,
            optimizer=self.optimizer,
            peer=_GLOO if is_cpu else min(self.h2d, self.d2h),
            network=min(_GLOO, _ETHERNET / ranks) if is_cpu else _ETHERNET / ranks,
            peer_seconds=_GLOO_SECONDS if is_cpu else _COLLECTIVE_SECONDS,
            network_seconds=_GLOO_SECONDS if is_cpu else 2 * _COLLECTIVE_SECONDS,
            message_seconds=_MESSAGE_SECONDS,
            sources={},
        )

    def of_rank(self, ranks: int) -> Profile:
        """The share that each of `ranks` ranks has of the node: its cores and its update rate. On the CPU
        also of its arithmetic and memory rates."""
        node = self.as_node(ranks)
        changes: dict[str, Any] = {
            "cores": max(1, node.cores // ranks),
            "optimizer": node.optimizer / ranks,
            "update_threads": self.update_threads and max(1, self.update_threads // ranks),
        }
        if self.device == "cpu":
            changes["host"] = self.host / ranks
            for kind in ("matmul", "attention", "attention_backward", "elementwise"):
                rates = self.rates(kind)
                changes[kind] = Rates(bfloat16=rates.bfloat16 / ranks, float32=rates.float32 / ranks)
        return self.model_copy(update=changes)

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
    missing = sorted(
        named - {"sources", "name", "title", "measured", "device", "node"} - set(profile.sources)
    )
    if profile.node is not None:
        of_node = set(Node.model_fields) - {"sources"} - set(profile.node.sources)
        missing += [f"node.{name}" for name in sorted(of_node)]
    if missing:
        raise ConfigError(f"hardware: {where} gives no source for {missing[0]}", hint="add it under sources")
    return profile
