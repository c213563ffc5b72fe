"""Imports of PEFT and bitsandbytes."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


def load_peft() -> Any:
    """Import PEFT, which imports bitsandbytes if that is installed."""
    before_peft()
    return importlib.import_module("peft")


def before_peft() -> None:
    """Load bitsandbytes, if installed, before another library imports PEFT: TRL, or transformers' schedules
    and trainer."""
    if "peft" not in sys.modules:
        with suppress(ImportError):
            load_bitsandbytes()


def load_bitsandbytes() -> Any:
    """Import bitsandbytes without its kernel for some CPUs, for which it would download code from the Hub and
    run it. Raises ImportError."""
    if "bitsandbytes" in sys.modules:
        return sys.modules["bitsandbytes"]
    with _without("kernels"), _silent("bitsandbytes"):
        return importlib.import_module("bitsandbytes")


@contextmanager
def _without(name: str) -> Iterator[None]:
    """While open, importing the module fails."""
    modules: dict[str, Any] = sys.modules
    missing = object()
    before = modules.get(name, missing)
    modules[name] = None
    try:
        yield
    finally:
        if before is missing:
            modules.pop(name, None)
        else:
            modules[name] = before


@contextmanager
def _silent(name: str) -> Iterator[None]:
    """While open, loggers below `name` emit errors only."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
