"""What the kernel and its torch reference share: the settings, their fp32 coefficients, the checks.

adamw   decoupled weight decay (Loshchilov and Hutter 2019), as torch.optim.AdamW
adam    weight decay added to the gradient (Kingma and Ba 2015), as torch.optim.Adam
sgd     with momentum and weight decay in the gradient, as torch.optim.SGD
lion    sign of an interpolated momentum, decoupled weight decay (Chen et al. 2023, arXiv:2302.06675)
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import torch

RULES = ("adamw", "adam", "sgd", "lion")
ADAPTIVE_RULES = ("adamw", "adam")  # those with a second moment
_FLOATS = (torch.float32, torch.bfloat16)
_UINT64 = 1 << 64


@dataclass(frozen=True)
class Hyper:
    """Settings of one step; each rule uses those it knows.

    lr: learning rate. beta1, beta2, epsilon: of adamw and adam; lion uses its two betas (0.9 and 0.99 in
    the paper). weight_decay: per unit of lr, decoupled in adamw and lion. momentum: of sgd.
    Raises ValueError for a value out of range.
    """

    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay"):
            _require(
                math.isfinite(value := getattr(self, name)) and value >= 0, f"{name}={value}", "0 or more"
            )
        for name in ("beta1", "beta2", "momentum"):
            _require(0 <= (value := getattr(self, name)) < 1, f"{name}={value}", "0 or more, and below 1")
        # At least the smallest normal fp32, which keeps 0 / 0 away where no gradient ever came.
        _require(1.2e-38 < self.epsilon < math.inf, f"epsilon={self.epsilon}", "more than 1.2e-38")


@dataclass(frozen=True)
class Coefficients:
    """Numbers of one step that no element changes: computed in double, rounded to fp32 once.

    The names and their order are those of `Update` in csrc/optimizer.cpp.
    """

    grad_scale: float
    decay: float
    weight_decay: float
    take1: float
    take2: float
    beta2: float
    rescale2: float
    epsilon: float
    momentum: float
    step_size: float


def coefficients(rule: str, hyper: Hyper, step: int, grad_scale: float) -> Coefficients:
    """The coefficients of update number `step` (1 for the first) with gradients times `grad_scale`."""
    adaptive = rule in ADAPTIVE_RULES
    exact = Coefficients(
        grad_scale=grad_scale,
        decay=1 - hyper.lr * hyper.weight_decay,
        weight_decay=hyper.weight_decay,
        take1=1 - hyper.beta1,
        take2=1 - hyper.beta2,
        beta2=hyper.beta2,
        rescale2=(1 - hyper.beta2**step) ** -0.5 if adaptive else 1.0,
        epsilon=hyper.epsilon,
        momentum=hyper.momentum,
        step_size=hyper.lr / (1 - hyper.beta1**step) if adaptive else hyper.lr,
    )
    return Coefficients(**{name: ctypes.c_float(value).value for name, value in vars(exact).items()})


def check_run(
    rule: str,
    weights: torch.Tensor,
    residual: torch.Tensor | None,
    grads: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor | None,
    *,
    step: int,
    element_offset: int,
    seed: int,
) -> None:
    """Raise ValueError unless the update can use these runs: the kernel works on bare addresses."""
    _require(rule in RULES, f"rule={rule!r}", " | ".join(RULES))
    split = weights.dtype == torch.bfloat16
    _require(
        split == (residual is not None), f"residual with {weights.dtype} weights", "bf16 has one, fp32 none"
    )
    _require(
        (rule in ADAPTIVE_RULES) == (exp_avg_sq is not None),
        f"exp_avg_sq with rule={rule!r}",
        "adam and adamw only",
    )
    runs: dict[str, tuple[torch.Tensor | None, tuple[torch.dtype, ...]]] = {
        "weights": (weights, _FLOATS),
        "residual": (residual, (torch.int16,)),
        "grads": (grads, _FLOATS),
        "exp_avg": (exp_avg, _FLOATS),
        "exp_avg_sq": (exp_avg_sq, (exp_avg.dtype,)),
    }
    for name, (run, dtypes) in runs.items():
        if run is None:
            continue
        _require(run.device.type == "cpu", f"{name} on {run.device}", "a tensor in host memory")
        _require(run.dtype in dtypes, f"{name} of {run.dtype}", " or ".join(map(str, dtypes)))
        _require(
            run.dim() == 1 and run.is_contiguous(), f"{name} of shape {tuple(run.shape)}", "1-D, contiguous"
        )
        _require(
            run.numel() == weights.numel(),
            f"{name} of {run.numel()} elements",
            f"{weights.numel()} as weights",
        )
    _require(step >= 1, f"step={step}", "1 for the first update")
    _require(0 <= element_offset < _UINT64 - weights.numel(), f"element_offset={element_offset}", "0 or more")
    _require(0 <= seed < _UINT64, f"seed={seed}", "0 or more, and below 2**64")


def _require(holds: bool, what: str, hint: str) -> None:
    if not holds:
        raise ValueError(f"the optimizer cannot use {what}; hint: {hint}")
