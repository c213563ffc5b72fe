"""Settings of memory and device: where units live, what a step keeps, how much memory there is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import field_validator

from horizon_lm.config.base import Settings, setting

ACTIVATIONS = ("recompute", "attention", "products", "keep")
BOUNDARIES = ("device", "host")
TRAINABLE = "trainable"  # of `resident`: the trainable parts of all units


class MemorySettings(Settings):
    """The part of `ModelSettings` that says where a model and its activations lie."""

    device: str = setting(
        "auto",
        "Device that computes the layers; auto uses a GPU if available.",
        group="Memory and device",
        resume="ask",
        expects="auto, cpu, cuda or cuda:N",
        pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$",
    )
    deterministic: bool = setting(
        False,
        "Use only GPU kernels that give the same bits in each run, so that a resumed run equals an "
        "uninterrupted one bitwise. May be slower; an operation without such a kernel is an error. No effect "
        "on a CPU.",
        group="Memory and device",
        resume="ask",
    )
    reduction: Literal["auto", "exact", "fast"] = setting(
        "auto",
        "How gradients of several ranks are added. exact: in the order of the micro-batches, so that results "
        "are bitwise identical for any number of ranks. fast: one fp32 reduce-scatter per unit and step, "
        "whose last bits depend on the number of ranks. auto is exact, unless a plan finds it more than 15% "
        "slower. One rank adds up in place with auto and fast: the bits of several unless a micro-batch "
        "has several loss chunks. With exact it always has them, at the cost of copies of weights and "
        "gradients and of memory for a few more units.",
        group="Memory and device",
        resume="ask",
    )
    resident: int | Literal["auto", "trainable"] | list[str] = setting(
        "auto",
        "Units that live in device memory with their gradients and optimizer state, and are updated there; "
        "results are bitwise identical. N takes embedding table, head and prologue, then layers from the "
        'first one up; a list names them, as in [embedding, head, "layer 0"]. trainable, alone or in a list, '
        "means the trainable parts of all units; frozen parts are streamed. auto is trainable for an adapter "
        "on a GPU; otherwise it lets the planner choose, and is 0 without a plan.",
        group="Memory and device",
        resume="free",
        unit="units",
        expects="a whole number >= 0, auto, trainable, or a list of units such as [head, layer 0]",
    )
    rounds: int | Literal["auto"] = setting(
        "auto",
        "Groups into which a step's micro-batches are split; must divide their number. Each group runs "
        "forward and backward; one update follows the last. Activations need memory for one group. Results "
        "are bitwise identical. auto lets the planner choose; without a plan it is 1.",
        group="Memory and device",
        resume="free",
        expects="a whole number >= 1, or auto",
    )
    round_sums: Literal["auto", "device", "host", "add"] = setting(
        "auto",
        "Where gradients of layers wait between rounds, 4 bytes per parameter: in device memory, in host "
        "memory from which they return in the next round, or in host memory where the host adds to them "
        "(needs one micro-batch per round; on several ranks as host). auto lets the planner choose; without "
        "a plan it is device on a CPU and host on a GPU.",
        group="Memory and device",
        resume="free",
    )
    slots: int = setting(
        2,
        "Weight slots on the device; with two, the next layer uploads while one computes.",
        group="Memory and device",
        resume="free",
        unit="layers",
        ge=2,
    )
    grad_slots: int = setting(
        2,
        "Gradient slots on the device; with two, one layer's gradients download while the next are computed. "
        "With rounds and round_sums: device each layer has its own instead.",
        group="Memory and device",
        resume="free",
        unit="layers",
        ge=1,
    )
    loss_chunk_tokens: int | Literal["auto"] = setting(
        "auto",
        "Tokens whose logits exist at once in the loss; fewer need less memory. auto is about 2**27 logits, "
        "and up to 8,192 tokens on a GPU with enough memory. Other values change the last bits of results.",
        group="Memory and device",
        resume="ask",
        unit="tokens",
        expects="a whole number >= 1, or auto",
    )
    activations: Literal["auto", "recompute", "attention", "products", "keep"] | list[str] = setting(
        "auto",
        "What each layer keeps for its backward pass: recompute keeps only its input, attention also the "
        "output of the attention kernel, products those of all matrix products too, and keep everything "
        "the backward pass needs; the rest is computed again. A list sets each layer, as in "
        '["recompute*23", "keep*9"]. auto lets the planner choose, the most for the last layers; without a '
        "plan it is recompute.",
        group="Memory and device",
        resume="free",
        expects="auto, recompute, attention, products, keep, or a list such as [recompute*23, keep*9]",
    )
    boundaries: Literal["auto", "device", "host"] | list[str] = setting(
        "auto",
        "Where inputs of recomputed layers wait for the backward pass; a list sets each layer, as for "
        "activations. auto lets the planner choose; without a plan it is device.",
        group="Memory and device",
        resume="free",
        expects="auto, device, host, or a list such as [host*12, device*20]",
    )
    checkpoint_interval: int = setting(
        1,
        "Recomputed layers that share one stored input; they are recomputed together, which takes as many "
        "weight and gradient slots.",
        group="Memory and device",
        resume="free",
        unit="layers",
        ge=1,
    )
    boundary_slots: int = setting(
        2,
        "Device buffers through which spilled inputs return.",
        group="Memory and device",
        resume="free",
        unit="inputs",
        ge=1,
    )
    mlp_tile_tokens: int | None = setting(
        None,
        "Compute MLPs in tiles of this many tokens, for long sequences; null computes them at once.",
        group="Memory and device",
        resume="ask",
        unit="tokens",
        ge=1,
    )
    grad_slabs: int = setting(
        2,
        "Host buffers for gradients of layers, with eager updates.",
        group="Memory and device",
        resume="free",
        unit="layers",
        ge=1,
    )
    host_memory_gb: float | Literal["auto"] = setting(
        "auto",
        "Host memory of this machine, for the memory check and the planner; auto measures what is free. Set "
        "it if the system reports too little, as in a virtual machine whose memory grows with use. Limits of "
        "cgroups and of the process still apply.",
        group="Memory and device",
        resume="free",
        unit="GB",
        expects="a number above 0, or auto",
    )
    reserve_host_gb: float = setting(
        2.0,
        "Host memory that the check before the run leaves to other programs.",
        group="Memory and device",
        resume="free",
        unit="GB",
        ge=0,
    )
    lanes: Literal["auto", "inline", "cuda"] = setting(
        "auto",
        "Schedule executor: inline runs ops one by one, cuda uses streams; auto chooses by device.",
        group="Memory and device",
        resume="free",
    )
    skip_memory_check: bool = setting(
        False,
        "Start even if the check before the run finds too little memory.",
        group="Memory and device",
        resume="free",
    )

    @field_validator("loss_chunk_tokens", "rounds")
    @classmethod
    def _check_at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("below 1")  # reported with the field's `expects`
        return value

    @field_validator("resident")
    @classmethod
    def _check_resident(cls, value: int | str | list[str]) -> int | str | list[str]:
        if isinstance(value, int) and value < 0:
            raise ValueError("below 0")  # reported with the field's `expects`
        return value

    @field_validator("host_memory_gb")
    @classmethod
    def _check_host_memory(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value <= 0:
            raise ValueError("not above 0")  # reported with the field's `expects`
        return value

    @field_validator("activations")
    @classmethod
    def _check_activations(cls, value: str | list[str]) -> str | list[str]:
        per_layer(value, ACTIVATIONS)
        return value

    @field_validator("boundaries")
    @classmethod
    def _check_boundaries(cls, value: str | list[str]) -> str | list[str]:
        per_layer(value, BOUNDARIES)
        return value

    @property
    def host_memory_bytes(self) -> int | None:
        """Return the host memory that `host_memory_gb` states; None with auto."""
        return None if self.host_memory_gb == "auto" else int(self.host_memory_gb * 1e9)


def per_layer(value: str | list[str], words: Sequence[str]) -> list[str] | None:
    """Expand the repetitions of a list setting; return None if one word applies to all layers.

    Raises ValueError for an empty list or an entry that is neither one of `words` nor word*count.
    """
    if isinstance(value, str):
        return None
    found: list[str] = []
    if not value:
        raise ValueError("an empty list")
    for entry in value:
        word, star, count = entry.partition("*")
        if word not in words or (star and not (count.isascii() and count.isdigit() and int(count) > 0)):
            raise ValueError(f"{entry!r} is not a policy")
        found += [word] * (int(count) if star else 1)
    return found
