"""The device update without a device: by Triton's interpreter, on tensors in host memory."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from horizon_lm.optim import kernel

FILE = Path(kernel.__file__).with_name("device_kernel.py")
has_triton = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not has_triton, reason="triton is not installed")


def load(source: str | None = None, name: str = "interpreted_device_kernel", path: Path = FILE) -> ModuleType:
    """A second copy of optim/device_kernel.py whose kernels the interpreter runs; only this copy.

    source: other text in place of the file's, for a control, which is written to `path`.
    """
    from triton import knobs

    if source is not None:
        path.write_text(source)  # the interpreter reads the source of a function from its file
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with knobs.runtime.scope():
        knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module


@cache
def device_kernel() -> ModuleType:
    return load()
