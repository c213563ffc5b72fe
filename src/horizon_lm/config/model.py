"""Settings of a model in host memory: where it computes, what its layers keep, how it is updated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import field_validator
from pydantic_core import PydanticCustomError

from horizon_lm.config.base import Settings, fault, setting


class ModelSettings(Settings):
    """Settings that `HostModel.from_pretrained` takes as well."""

    device: str = setting(
        "auto",
        "Where layers are computed; auto takes a GPU where there is one.",
        group="Memory and device",
        resume="ask",
        expects="auto, cpu, cuda or cuda:N",
        pattern=r"^(auto|cpu|cuda(:[0-9]{1,3})?)$",
    )
    dtype: Literal["bfloat16", "float32"] = setting(
        "bfloat16",
        "Number format of weights and computation; the optimizer keeps float32 masters in either case.",
        group="Model",
        resume="fixed",
    )
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flex_attention"] = setting(
        "sdpa",
        "Attention kernel, by its transformers name; on a CPU only sdpa and eager work.",
        group="Model",
        resume="ask",
    )
    trust_remote_code: bool = setting(
        False,
        "Run Python code that comes with the model; leave it off for models you have not read.",
        group="Model",
        resume="free",
    )
    model_revision: str | None = setting(
        None,
        "Branch, tag or commit of a model on the Hub; a commit makes the run reproducible.",
        group="Model",
        resume="ask",
    )
    allow_missing: list[str] = setting(
        [],
        "Weights that the checkpoint may lack, or hold in another shape, by regular expressions that are "
        "found in their names: they begin with random values, as transformers initialises them.",
        group="Model",
        resume="free",
        expects="a list of regular expressions",
    )
    allow_unexpected: list[str] = setting(
        [],
        "Weights of the checkpoint that the model may not have, by regular expressions that are found in "
        "their names: they are left out.",
        group="Model",
        resume="free",
        expects="a list of regular expressions",
    )
    freeze: list[str] = setting(
        [],
        "Parameters that are not trained, by regular expressions that are found in their names; they need "
        "no memory for gradients and moments.",
        group="Optimizer",
        resume="fixed",
        expects="a list of regular expressions",
    )
    neftune_noise_alpha: float | None = setting(
        None,
        "Uniform noise on the embeddings in training (NEFTune), of magnitude alpha / sqrt(tokens * width), "
        "drawn anew for each micro-batch; null means none. Usual values are 5 to 15.",
        group="Optimizer",
        resume="ask",
        gt=0,
    )
    seed: int = setting(
        42,
        "Seed of weight initialisation, dropout and data order.",
        group="Batch and schedule",
        resume="ask",
        ge=0,
        lt=2**63,
        expects="a whole number >= 0",
    )
    slots: int = setting(
        2,
        "Weight slots on the device; two let the next layer arrive while one is computed.",
        group="Memory and device",
        resume="free",
        unit="layers",
        ge=2,
    )
    grad_slots: int = setting(
        2,
        "Gradient slots on the device; two let one layer's gradients leave while the next are computed.",
        group="Memory and device",
        resume="free",
        unit="layers",
        ge=1,
    )
    loss_chunk_tokens: int | Literal["auto"] = setting(
        "auto",
        "Tokens whose logits are alive at once in the loss; fewer need less memory.",
        group="Memory and device",
        resume="ask",
        unit="tokens",
        expects="a whole number >= 1, or auto",
    )
    label_smoothing_factor: float = setting(
        0.0,
        "Label smoothing of the training loss: this share of it is the mean of -log p over the vocabulary, "
        "as with transformers' LabelSmoother. Evaluation stays without it.",
        group="Optimizer",
        resume="ask",
        ge=0,
        lt=1,
    )
    optim: Literal["adamw", "adam", "sgd", "lion"] = setting(
        "adamw",
        "The update rule: decoupled (adamw, lion) or added weight decay (adam, sgd).",
        group="Optimizer",
        resume="fixed",
    )
    update: Literal["auto", "sync", "deferred", "eager"] = setting(
        "auto",
        "When the optimizer runs: sync after the backward pass, deferred during the next forward pass, eager "
        "during the backward pass. All give the same bits; eager cannot clip, and needs no memory for "
        "gradients. auto is deferred with clipping or nonfinite: skip, else eager.",
        group="Optimizer",
        resume="free",
    )
    moment_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Number format of the optimizer's moments; bfloat16 rounds stochastically and saves 4 bytes a "
        "parameter.",
        group="Optimizer",
        resume="fixed",
    )
    adam_beta1: float = setting(
        0.9,
        "Decay of the running mean of gradients (adamw, adam, lion).",
        group="Optimizer",
        resume="ask",
        ge=0,
        lt=1,
    )
    adam_beta2: float = setting(
        0.999,
        "Decay of the running mean of squared gradients (adamw, adam); of lion's momentum.",
        group="Optimizer",
        resume="ask",
        ge=0,
        lt=1,
    )
    adam_epsilon: float = setting(
        1e-8,
        "Added to the denominator of the update (adamw, adam).",
        group="Optimizer",
        resume="ask",
        gt=1.2e-38,
    )
    sgd_momentum: float = setting(0.0, "Momentum of sgd.", group="Optimizer", resume="ask", ge=0, lt=1)
    max_grad_norm: float | None = setting(
        1.0,
        "Clip gradients to this global norm; 0 or null switches clipping off.",
        group="Optimizer",
        resume="ask",
        ge=0,
    )
    nonfinite: Literal["raise", "skip", "rollback"] = setting(
        "raise",
        "What a NaN or infinite loss or gradient does: end the run, skip that step's update, or go back to "
        "the last checkpoint and on with the data after it.",
        group="Optimizer",
        resume="free",
    )
    decay_embeddings: bool = setting(
        True,
        "Whether weight decay applies to embedding tables; it never does to biases and norms.",
        group="Optimizer",
        resume="ask",
    )
    lr_factors: dict[str, float] = setting(
        {},
        "Factors of the learning rate by parameter name: regular expression to factor, the first that is "
        "found in a name counts.",
        group="Optimizer",
        resume="ask",
        expects="a mapping of regular expressions to numbers >= 0",
    )
    optimizer_threads: int | Literal["auto"] = setting(
        "auto",
        "Threads of the update on the host; auto takes the cores that this process may use, never more.",
        group="Optimizer",
        resume="free",
        unit="threads",
        expects="a whole number >= 1, or auto",
    )
    activations: Literal["auto", "recompute", "keep"] | list[str] = setting(
        "auto",
        "What a layer leaves for its backward pass: recompute its input alone, keep all that is needed. A "
        'list names the policy of each layer, as in ["recompute*23", "keep*9"]. auto lets the '
        "planner keep as many layers as fit, from the last one down; without a plan it is recompute.",
        group="Memory and device",
        resume="free",
        expects="auto, recompute, keep, or a list such as [recompute*23, keep*9]",
    )
    boundaries: Literal["auto", "device", "host"] | list[str] = setting(
        "auto",
        "Where the inputs of recomputed layers wait for the backward pass; a list as for activations. auto "
        "lets the planner choose; without a plan it is device.",
        group="Memory and device",
        resume="free",
        expects="auto, device, host, or a list such as [host*12, device*20]",
    )
    checkpoint_interval: int = setting(
        1,
        "Recomputed layers that share one stored input; they are computed again together, which takes that "
        "many weight and gradient slots.",
        group="Memory and device",
        resume="free",
        unit="layers",
        ge=1,
    )
    boundary_slots: int = setting(
        2,
        "Device buffers through which spilled inputs come back.",
        group="Memory and device",
        resume="free",
        unit="inputs",
        ge=1,
    )
    mlp_tile_tokens: int | None = setting(
        None,
        "Compute the MLP of a layer in tiles of so many tokens, for long sequences; null means at once.",
        group="Memory and device",
        resume="ask",
        unit="tokens",
        ge=1,
    )
    grad_slabs: int = setting(
        2,
        "With eager updates, host buffers through which the gradients of layers pass.",
        group="Memory and device",
        resume="free",
        unit="layers",
        ge=1,
    )
    reserve_host_gb: float = setting(
        2.0,
        "Host memory that the check before the run leaves to the rest of the machine.",
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
        "Start even when the check before the run says that memory will not suffice.",
        group="Memory and device",
        resume="free",
    )

    @field_validator("optim", mode="before")
    @classmethod
    def _name_optim(cls, value: Any) -> Any:
        """transformers names the implementation as well; here there is one."""
        return "adamw" if value in ("adamw_torch", "adamw_torch_fused", "adamw_hf") else value

    @field_validator("loss_chunk_tokens", "optimizer_threads")
    @classmethod
    def _check_count(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("below 1")  # reported with the field's `expects`
        return value

    @field_validator("lr_factors")
    @classmethod
    def _check_lr_factors(cls, value: dict[str, float]) -> dict[str, float]:
        if any(factor < 0 for factor in value.values()):
            raise ValueError("below 0")  # reported with the field's `expects`
        return value

    @field_validator("activations")
    @classmethod
    def _check_activations(cls, value: str | list[str]) -> str | list[str]:
        per_layer(value, ("recompute", "keep"))
        return value

    @field_validator("boundaries")
    @classmethod
    def _check_boundaries(cls, value: str | list[str]) -> str | list[str]:
        per_layer(value, ("device", "host"))
        return value

    def faults(self) -> Iterator[PydanticCustomError]:
        yield from super().faults()
        reason = "clips by the norm of all gradients" if self.max_grad_norm else None
        if self.nonfinite == "skip":
            reason = reason or "leaves a step out when any of its gradients is not finite"
        if self.update == "eager" and reason is not None:
            culprit = "max_grad_norm" if self.max_grad_norm else "nonfinite"
            yield fault(
                f"update: eager updates layers before all gradients are known, but {culprit}: "
                f"{getattr(self, culprit)} {reason}",
                key="update",
                hint="update: deferred does both, or "
                + ("max_grad_norm: null" if self.max_grad_norm else "nonfinite: raise"),
            )

    @property
    def update_mode(self) -> str:
        """`update` with auto resolved."""
        if self.update != "auto":
            return self.update
        return "deferred" if self.max_grad_norm or self.nonfinite == "skip" else "eager"


def per_layer(value: str | list[str], words: tuple[str, str]) -> list[str] | None:
    """A list setting with its repetitions written out; None where one word stands for all layers.

    Raises ValueError for an empty list and for an entry that is neither one of `words` nor word*count.
    """
    if isinstance(value, str):
        return None
    found: list[str] = []
    if not value:
        raise ValueError("an empty list")
    for entry in value:
        word, star, count = entry.partition("*")
        if word not in words or (star and not (count.isascii() and count.isdigit() and int(count) > 0)):
            raise ValueError(f"{entry!r} is no policy")
        found += [word] * (int(count) if star else 1)
    return found
