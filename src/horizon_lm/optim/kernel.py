"""The update in one fused pass of C++ (csrc/optimizer.cpp), called through ctypes without the GIL.

setup.py builds the library when the package is installed. To build it in a source tree:

    python -m horizon_lm.optim.kernel --build

Without it `update_run` uses the torch reference: bitwise identical, more slowly. `notice` has what a user is
told: `horizon train` shows it at the start of a run and `horizon doctor` as a finding; for other callers the
first update logs it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch

from horizon_lm.errors import ConfigError
from horizon_lm.machine.cores import usable_cores
from horizon_lm.memory.layout import ALIGN_ELEMENTS
from horizon_lm.memory.regions import StoreSpec
from horizon_lm.optim import reference
from horizon_lm.optim.progress import Progress
from horizon_lm.optim.rules import RULES, Hyper, Numbers, Tensors, check_update, coefficients
from horizon_lm.text import one_line

ISAS = ("auto", "plain", "baseline", "avx2", "avx512")  # numbered as in csrc/optimizer.cpp
_DTYPES = (torch.float32, torch.bfloat16)
_VERSION = 4  # of the C interface
_REFERENCE_PIECE = 1 << 22  # elements: 50 MB and less, and few enough pieces
_BUILD = "python -m horizon_lm.optim.kernel --build"
_REINSTALL = "install the package again, with pip's --force-reinstall --no-deps --no-cache-dir"
_ROOT = Path(__file__).resolve().parents[3]  # of the sources, in a source tree
_log = logging.getLogger(__name__)


class _Update(ctypes.Structure):
    """Mirror of `Update` in csrc/optimizer.cpp."""

    _fields_ = [
        ("count", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weights", "residual", "grads", "exp_avg", "exp_avg_sq")),
        *((name, ctypes.c_uint64) for name in ("element_offset", "seed", "step")),
        *((name, ctypes.c_int32) for name in ("rule", "weight_dtype", "grad_dtype", "moment_dtype")),
        *((name, ctypes.c_int32) for name in ("isa", "threads")),
        *(
            (name, ctypes.c_float)
            for name in ("grad_scale", "decay", "weight_decay", "take1", "take2", "beta2")
        ),
        *((name, ctypes.c_float) for name in ("rescale2", "epsilon", "momentum", "step_size")),
    ]


def load(path: Path) -> ctypes.CDLL:
    """The library at `path`. Raises OSError when it is absent, unusable here, or of another version."""
    loaded = ctypes.CDLL(str(path))
    try:
        version = loaded.horizon_optimizer_version()
    except AttributeError as error:
        raise OSError(f"{path.name} is not the optimizer") from error
    if version != _VERSION:
        raise OSError(f"{path.name} has interface {version}, not {_VERSION}")
    loaded.horizon_update.argtypes = [ctypes.POINTER(_Update)]
    floats = [ctypes.c_void_p] * 3
    loaded.horizon_triad.argtypes = [*floats, ctypes.c_float, ctypes.c_int64, ctypes.c_int32]
    pointer, number = ctypes.c_void_p, ctypes.c_int32
    loaded.horizon_add_gradients.argtypes = [
        *(pointer, pointer, pointer, number, number),  # total and what is added
        *(ctypes.c_int64, number, number),
    ]
    loaded.horizon_move_gradient.argtypes = [
        *(pointer, number, pointer, number),  # source and target
        *(pointer, ctypes.c_int64, number, number),
    ]
    return loaded


def library() -> ctypes.CDLL | None:
    """The library built for this Python, or None."""
    return _found()[0]


@cache
def _found() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    package = Path(__file__).parent.parent
    reason = "it was not built"
    for suffix in EXTENSION_SUFFIXES:
        path = package / f"_optimizer{suffix}"
        if path.exists():
            try:
                return load(path), ""
            except OSError as error:
                reason = one_line(str(error))
    return None, reason


def way_to_build() -> str:
    """How to get the library, in one imperative line."""
    return "install g++, then " + (f"run {_BUILD}" if (_ROOT / "setup.py").exists() else _REINSTALL)


def notice() -> str | None:
    """What to tell a user if there is no library; the caller shows it, and the log does not repeat it."""
    global _is_told
    lib, reason = _found()
    if lib is not None:
        return None
    _is_told = True
    return (
        f"no C++ update kernel ({reason}): updates run in torch, about ten times slower, with the same bits; "
        + way_to_build()
    )


_is_told = False  # in this process


def _log_once() -> None:
    if not _is_told and (text := notice()) is not None:
        _log.warning(text)


def available_isas() -> tuple[str, ...]:
    """The instruction sets that this machine can run, `auto` left out; empty without the library."""
    lib = library()
    if lib is None:
        return ()
    return tuple(isa for number, isa in enumerate(ISAS) if number and lib.horizon_isa_available(number))


def auto_isa() -> str:
    """The instruction set that `auto` means here. Only with the library."""
    lib = library()
    assert lib is not None
    return ISAS[lib.horizon_isa_auto()]


def describe() -> str:
    """What updates run on, for reports: 'C++ (avx512, 16 threads)' or 'torch reference'."""
    lib = library()
    if lib is None:
        return "torch reference"
    threads = usable_cores() if lib.horizon_has_openmp() else 1
    return f"C++ ({auto_isa()}, {threads} thread{'s' * (threads > 1)})"


def update(
    tensors: Tensors,
    numbers: Numbers,
    *,
    threads: int | None = None,
    isa: str = "auto",
    progress: Progress | None = None,
) -> None:
    """Update n elements in place.

    threads: used as given, by default all usable cores (machine/cores.py limits a request). isa: one of ISAS,
    for tests. progress: the call is its next piece.

    The bits depend on neither threads nor isa nor on how n elements are cut into calls, and equal those of
    reference.update. Moments below 1.2e-38 are stored as zero. A NaN gradient makes master and moments
    of its element NaN (one bit pattern), an infinite one the first moment infinite and the rest what
    IEEE arithmetic says (with beta1 = 0 the moment is then NaN, as torch's); no other element changes by it.

    Raises ValueError for tensors or numbers that it cannot use; RuntimeError without the library.
    """
    check_update(tensors, numbers)
    residual, square = tensors.residual, tensors.exp_avg_sq
    call = _Update(
        count=tensors.numel,
        weights=tensors.weights.data_ptr(),
        residual=None if residual is None else residual.data_ptr(),
        grads=tensors.grads.data_ptr(),
        exp_avg=tensors.exp_avg.data_ptr(),
        exp_avg_sq=None if square is None else square.data_ptr(),
        element_offset=numbers.element_offset,
        seed=numbers.seed,
        step=numbers.step,
        rule=RULES.index(numbers.rule),
        weight_dtype=_DTYPES.index(tensors.weights.dtype),
        grad_dtype=_DTYPES.index(tensors.grads.dtype),
        moment_dtype=_DTYPES.index(tensors.exp_avg.dtype),
        **vars(coefficients(numbers)),
    )
    _run(call, threads, isa, progress or Progress())


def _run(call: _Update, threads: int | None, isa: str, progress: Progress) -> None:
    lib = library()
    if lib is None:
        raise RuntimeError(f"the C++ optimizer is not built; hint: {_BUILD}")
    if isa not in ISAS:
        raise ValueError(f"isa={isa!r}; hint: {' | '.join(ISAS)}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads={threads}; hint: 1 or more")
    call.isa, call.threads = ISAS.index(isa), threads or usable_cores()
    if progress.call(lib.horizon_update, ctypes.byref(call)) != 0:
        progress.ended.pop()  # nothing was updated
        raise ValueError(f"isa={isa!r} is not available here; hint: {' | '.join(available_isas())}")


def update_run(
    tensors: Tensors, numbers: Numbers, *, threads: int | None = None, progress: Progress | None = None
) -> None:
    """Update n elements where they are.

    In host memory by the kernel if it was built, else by the torch reference (on torch's own threads); on a
    CUDA device in its current stream, by the Triton kernel. All have the same bits.
    """
    if tensors.weights.device.type == "cuda":
        update_on_device(tensors, numbers, progress=progress)
        return
    if library() is not None:
        update(tensors, numbers, threads=threads, progress=progress)
        return
    _log_once()
    if progress is None:
        reference.update(tensors, numbers)
    else:
        new = tensors.copied()
        reference.update(new, numbers)
        progress.copy(list(zip(tensors.written(), new.written(), strict=True)))


def update_on_device(tensors: Tensors, numbers: Numbers, *, progress: Progress | None = None) -> None:
    """`device_kernel.update`, imported when it is needed: triton comes with torch for CUDA only."""
    from horizon_lm.optim import device_kernel

    device_kernel.update(tensors, numbers, progress=progress)


def longest_piece(device: torch.device) -> int | None:
    """Elements of a run that an update with `progress` may take at once: the reference computes beside it,
    which takes memory. None where there is no limit."""
    return None if device.type == "cuda" or library() is not None else _REFERENCE_PIECE


def check_available(device: torch.device, rule: str, spec: StoreSpec) -> None:
    """Raise ConfigError unless units of a store can be updated on this device.

    On CUDA the variants of the kernel that the store needs are tried on a few elements. Triton compiles them
    on the first use, with a C compiler for what launches them, and keeps them on the disk.
    """
    if device.type != "cuda":
        return
    way_out = "set resident=0 to keep all weights in host memory"
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"units cannot live on {device}: the triton package, which updates them there, is not installed",
            hint=f"pip install triton (torch for CUDA brings it along), or {way_out}",
        )
    try:
        for tensors in _variants(spec, device):
            update_on_device(tensors, Numbers(rule, Hyper(0.0), step=1))
        torch.cuda.synchronize(device)
    except Exception as error:  # of imports, compilers, the driver
        raise ConfigError(
            f"units cannot live on {device}: the update fails there ({type(error).__name__}: {error})",
            hint="give triton a C compiler (gcc) and a folder to write to (TRITON_CACHE_DIR), or " + way_out,
        ) from error


def _variants(spec: StoreSpec, device: torch.device) -> Iterator[Tensors]:
    """A few elements as units of a store have them: aligned, and as many as their runs are multiples of."""

    def few(dtype: torch.dtype, needed: bool = True) -> torch.Tensor | None:
        return torch.zeros(ALIGN_ELEMENTS, dtype=dtype, device=device) if needed else None

    # Eager updates read gradients where they accumulated, which is in fp32 unless they were written once.
    for dtype in {spec.dtype, torch.float32} if spec.slabs else {spec.dtype}:
        weights, grads, exp_avg = few(spec.dtype), few(dtype), few(spec.moment_dtype)
        assert weights is not None and grads is not None and exp_avg is not None
        residual = few(torch.int16, needed=spec.dtype == torch.bfloat16)
        yield Tensors(weights, residual, grads, exp_avg, few(spec.moment_dtype, spec.second_moment))


def _build() -> int:
    """Build the library beside the package, by the recipe in setup.py; the exit status."""
    if not (_ROOT / "setup.py").exists():
        print(f"no sources in {_ROOT}; hint: {way_to_build()}")
        return 1
    status = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=_ROOT
    ).returncode
    print(describe())
    return status or int(library() is None)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--build"]):
        sys.exit("usage: python -m horizon_lm.optim.kernel [--build]")
    if sys.argv[1:] == ["--build"]:
        sys.exit(_build())
    print(describe())
