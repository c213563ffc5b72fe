"""Numbers that callers pass: checked before anything is computed or put off."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import torch

from horizon_lm.errors import ConfigError

# What stands for a number in a call: of Python, numpy or torch (one element).
Number = float | np.number[Any] | torch.Tensor


def finite_number(where: str, name: str, value: Any, *, hint: str) -> float:
    """`value` as a float: finite and at least 0.

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
            raise refused("is a tensor without content (meta)")
        one = value.item()
    if isinstance(one, (bool, np.bool_)):
        raise refused("is a boolean, not a number")
    if not isinstance(one, numbers.Real):
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
    """How to pass what the text says; None for text that says no number."""
    try:
        return f"{name}={float(text):g}, without quotes"
    except ValueError:
        return None
