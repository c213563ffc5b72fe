"""The tensors and numbers of an update, shared by the kernel and its torch reference, and their checks.

adamw   decoupled weight decay (Loshchilov and Hutter 2019), as torch.optim.AdamW
adam    weight decay added to the gradient (Kingma and Ba 2015), as torch.optim.Adam
sgd     with momentum and weight decay in the gradient, as torch.optim.SGD
lion    sign of an interpolated momentum, decoupled weight decay (Chen et al. 2023, arXiv:2302.06675)
"""

from __future__ import annotations

import ctypes
import math
import numbers as number_kinds
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from horizon_lm.errors import ConfigError

RULES = ("adamw", "adam", "sgd", "lion")
ADAPTIVE_RULES = ("adamw", "adam")  # those with a second moment
_FLOATS = (torch.float32, torch.bfloat16)
_UINT64 = 1 << 64
_HOST = torch.device("cpu")
# What stands for a number in a call: of Python, numpy or torch (one element).
Number = float | np.number[Any] | torch.Tensor


@dataclass(frozen=True)
class Hyper:
    """Hyperparameters of one step; each rule uses those it knows.

    lr: learning rate. beta1, beta2, epsilon: adamw and adam; lion uses the two betas (0.9 and 0.99 in the
    paper). weight_decay: per unit of lr, decoupled in adamw and lion. momentum: sgd.
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
class Tensors:
    """The tensors of an update, each 1-D [n], contiguous, all in host memory or all on one device.

    weights: bf16 with residual int16 (memory/master.py), or fp32 and residual None. grads: bf16 or fp32.
    exp_avg, exp_avg_sq: fp32, or bf16 with stochastic rounding; exp_avg_sq None for sgd and lion.
    """

    weights: torch.Tensor
    residual: torch.Tensor | None
    grads: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor | None

    @property
    def numel(self) -> int:
        return self.weights.numel()

    def part(self, start: int, stop: int) -> Tensors:
        """Views of the elements [start, stop)."""
        residual = None if self.residual is None else self.residual[start:stop]
        square = None if self.exp_avg_sq is None else self.exp_avg_sq[start:stop]
        return Tensors(
            self.weights[start:stop], residual, self.grads[start:stop], self.exp_avg[start:stop], square
        )

    def written(self) -> list[torch.Tensor]:
        """Those that an update writes."""
        found = (self.weights, self.residual, self.exp_avg, self.exp_avg_sq)
        return [tensor for tensor in found if tensor is not None]

    def copied(self) -> Tensors:
        """The same with copies of those that an update writes."""
        residual = None if self.residual is None else self.residual.clone()
        square = None if self.exp_avg_sq is None else self.exp_avg_sq.clone()
        return Tensors(self.weights.clone(), residual, self.grads, self.exp_avg.clone(), square)


@dataclass(frozen=True)
class Numbers:
    """The numbers of an update.

    rule: one of RULES. step: 1 for the first update. grad_scale: the clipping factor. element_offset: the
    number of element 0 in the whole store; it, `seed` and `step` decide the random rounding.
    """

    rule: str
    hyper: Hyper
    step: int
    grad_scale: float = 1.0
    element_offset: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Coefficients:
    """Numbers that are the same for all elements: computed in double, rounded to fp32 once.

    Names and order are those of `Update` in csrc/optimizer.cpp.
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


def coefficients(numbers: Numbers) -> Coefficients:
    """Compute the coefficients of one update."""
    hyper, step, adaptive = numbers.hyper, numbers.step, numbers.rule in ADAPTIVE_RULES
    exact = Coefficients(
        grad_scale=numbers.grad_scale,
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


def check_update(tensors: Tensors, numbers: Numbers, device: torch.device = _HOST) -> None:
    """Raise ValueError for what an update on `device` cannot use: the kernels work on bare addresses."""
    rule = numbers.rule
    _require(rule in RULES, f"rule={rule!r}", " | ".join(RULES))
    split = tensors.weights.dtype == torch.bfloat16
    _require(
        split == (tensors.residual is not None),
        f"residual with {tensors.weights.dtype} weights",
        "bf16 has one, fp32 none",
    )
    _require(
        (rule in ADAPTIVE_RULES) == (tensors.exp_avg_sq is not None),
        f"exp_avg_sq with rule={rule!r}",
        "adam and adamw only",
    )
    allowed: dict[str, tuple[torch.dtype, ...]] = {
        "weights": _FLOATS,
        "residual": (torch.int16,),
        "grads": _FLOATS,
        "exp_avg": _FLOATS,
        "exp_avg_sq": (tensors.exp_avg.dtype,),
    }
    for name, dtypes in allowed.items():
        run: torch.Tensor | None = getattr(tensors, name)
        if run is None:
            continue
        place = "in host memory" if device == _HOST else f"on {device}"
        _require(run.device == device, f"{name} on {run.device}", f"a tensor {place}")
        _require(run.dtype in dtypes, f"{name} of {run.dtype}", " or ".join(map(str, dtypes)))
        _require(
            run.dim() == 1 and run.is_contiguous(), f"{name} of shape {tuple(run.shape)}", "1-D, contiguous"
        )
        _require(
            run.numel() == tensors.numel,
            f"{name} of {run.numel()} elements",
            f"{tensors.numel} as weights",
        )
    step, offset, seed = numbers.step, numbers.element_offset, numbers.seed
    _require(step >= 1, f"step={step}", "1 for the first update")
    _require(0 <= offset < _UINT64 - tensors.numel, f"element_offset={offset}", "0 or more")
    _require(0 <= seed < _UINT64, f"seed={seed}", "0 or more, and below 2**64")


def _require(holds: bool, what: str, hint: str) -> None:
    if not holds:
        raise ValueError(f"the optimizer cannot use {what}; hint: {hint}")


def finite_number(where: str, name: str, value: Any, *, hint: str) -> float:
    """Convert a number that a caller passes to a float: finite and at least 0.

    Takes Python's and numpy's numbers and tensors of one element. where: the call, as in "step()"; hint:
    a good value, as in "lr=1e-5". Raises ConfigError for text, booleans, several numbers, NaN, infinities
    and negative numbers.
    """

    def refused(problem: str, way_out: str = hint) -> ConfigError:
        return ConfigError(f"{where}: {name}={_shown(value)} {problem}", hint=way_out)

    if isinstance(value, (str, bytes)):
        raise refused("is text, not a number", _as_number(name, value) or hint)
    one = value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        if math.prod(value.shape) != 1:
            by_name = "; lr_factors scales the rate by parameter name" if name == "lr" else ""
            raise refused("is not one number", hint + by_name)
        if isinstance(value, torch.Tensor) and value.is_meta:
            raise refused("is a meta tensor, without values")
        one = value.item()
    if isinstance(one, (bool, np.bool_)):
        raise refused("is a boolean, not a number")
    if not isinstance(one, number_kinds.Real):
        raise refused("is not a number")
    try:
        number = float(one)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise refused("is not finite")
    if number < 0:
        raise refused("is negative")
    return number


def _shown(value: Any) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray)) and math.prod(value.shape) != 1:
        return f"<{type(value).__name__} of shape {tuple(value.shape)}>"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _as_number(name: str, text: str | bytes) -> str | None:
    """How to pass the number in a text; None if there is none."""
    try:
        return f"{name}={float(text):g}, without quotes"
    except ValueError:
        return None
