"""What the device update is compiled to. Triton compiles for a GPU without one."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import pytest
import torch

import interpreted
from horizon_lm.optim.rules import RULES, Hyper, Numbers, coefficients
from optimizer_runs import BF16, FP32

pytestmark = interpreted.needs_triton

DTYPES = list(itertools.product((BF16, FP32), (BF16, FP32), (BF16, FP32)))


@pytest.fixture(scope="module")
def compile_for(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Compile the kernel for an architecture (80: sm_80) without a device: PTX and a cubin."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from horizon_lm.optim import device_kernel as module

    numbers = vars(coefficients(Numbers("adamw", Hyper(1e-3), 1)))

    def compile_(arch: int, rule: str, dtypes: tuple[torch.dtype, ...], aligned: bool = True, **options):
        weights, grads, moments = ("*i16" if dtype == BF16 else "*fp32" for dtype in dtypes)
        split, adaptive = dtypes[0] == BF16, rule in ("adamw", "adam")
        signature = {"weights": weights, "residual": "*i16" if split else "constexpr", "grads": grads}
        signature |= {"exp_avg": moments, "exp_avg_sq": moments if adaptive else "constexpr"}
        signature |= {"marks": "*i32", "count": "i64"}
        signature |= dict.fromkeys(("first_key", "second_key", "low"), "i32") | dict.fromkeys(numbers, "fp32")
        constants = {"RULE": RULES.index(rule), "SPLIT": split, "BF16_GRADS": dtypes[1] == BF16}
        constants |= {"BF16_MOMENTS": dtypes[2] == BF16, "BLOCK": module.BLOCK}
        signature |= dict.fromkeys(constants, "constexpr")
        assert list(signature) == module.update_kernel.arg_names
        constants |= {name: None for name in ("residual", "exp_avg_sq") if signature[name] == "constexpr"}
        divisible = [i for i, (k, t) in enumerate(signature.items()) if t[0] == "*" or k == "count"]
        hints = {(i,): [["tt.divisibility", 16]] for i in divisible} if aligned else {}
        source = ASTSource(module.update_kernel, signature, constants, hints)
        target = GPUTarget("cuda", arch, 32)
        return triton.compile(source, target=target, options=module.OPTIONS | options).asm

    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))
        yield compile_


# Each rounds once, to nearest, and keeps denormals; comparisons, copies and signs are exact.
EXACT = re.compile(r"(add|sub|mul)\.rn\.f32(x2)?|(div|sqrt)\.rn\.f32|setp\.\w+\.f32|(selp|mov|abs)\.f32")


def operations(ptx: str) -> set[str]:
    """All instructions that name a floating-point type."""
    return {word for word in re.findall(r"\b[a-z]\w*(?:\.\w+)+", ptx) if re.search(r"\.b?f(16|32|64)", word)}


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_each_operation_rounds_once_on_every_architecture(arch: int, compile_for) -> None:
    every = DTYPES if arch == 90 else [(BF16, BF16, BF16), (BF16, FP32, FP32), (FP32, BF16, BF16)]
    for rule, dtypes in itertools.product(RULES, every):
        asm = compile_for(arch, rule, dtypes)
        found = {o for o in operations(asm["ptx"]) if not o.startswith(("ld.param", "st.param"))}
        assert {o for o in found if not EXACT.fullmatch(o)} == set(), (rule, dtypes)
        adaptive = rule in ("adamw", "adam")
        assert adaptive == ("div.rn.f32" in found) == ("sqrt.rn.f32" in found) and asm["cubin"]
        assert "ftz" not in asm["ptx"]


def test_with_fusion_it_would_not(compile_for) -> None:
    """The negative control."""
    found = operations(compile_for(90, "adamw", (BF16, BF16, FP32), enable_fp_fusion=True)["ptx"])
    assert "fma.rn.f32" in {o for o in found if not EXACT.fullmatch(o)}


def test_runs_are_read_and_written_16_bytes_at_a_time(compile_for) -> None:
    """Aligned ones, as those of a store are; others work, element by element."""
    ptx = compile_for(90, "adamw", (BF16, BF16, FP32))["ptx"]
    assert set(re.findall(r"(?:ld|st)\.global\.(v4\.b32|b\d+)", ptx)) == {"v4.b32", "b32"}  # b32: marks
    odd = compile_for(90, "adamw", (BF16, BF16, FP32), aligned=False)["ptx"]
    assert "v4" not in "".join(re.findall(r"(?:ld|st)\.global\.[\w.]+", odd))


def test_marks_are_written_after_all_threads_have_read_them(compile_for) -> None:
    """Otherwise a slow warp would find the mark of its own program, and leave its elements out."""
    ptx = compile_for(90, "adamw", (BF16, BF16, BF16))["ptx"]
    order = re.findall(r"(ld\.global|st\.global|bar\.sync)", ptx)
    assert order[0] == "ld.global" and order[-2:] == ["bar.sync", "st.global"]
