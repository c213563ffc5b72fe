"""The C++ update: bit for bit its torch reference; what it refuses, and where it runs."""

from __future__ import annotations

import itertools
import logging
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from horizon_lm.memory.master import split_master
from horizon_lm.optim import kernel, reference
from horizon_lm.optim.rules import RULES, Hyper
from optimizer_runs import BF16, FP32, HYPER, Run, make_run, needs_kernel
from optimizer_runs import no_library as no_library

NAN_BITS = 0x7FC00000


def same_bits(one: Run, other: Run) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.bits(), other.bits(), strict=True))


CASES = [
    pytest.param(rule, *dtypes, id="-".join([rule, *(str(d).removeprefix("torch.") for d in dtypes)]))
    for rule in RULES
    for dtypes in itertools.product((BF16, FP32), (BF16, FP32), (BF16, FP32))
]


def test_the_library_is_built_where_there_is_a_compiler():
    if kernel.library() is None:
        assert shutil.which("g++") is None and shutil.which("clang++") is None, (
            "a compiler but no library; hint: python -m horizon_lm.optim.kernel --build"
        )
    else:
        assert kernel.describe().startswith("C++ (")
        assert {"plain", "baseline"} <= set(kernel.available_isas())


# ---- the bits -------------------------------------------------------------------------------------------


@needs_kernel
@pytest.mark.parametrize(("rule", "weights", "grads", "moments"), CASES)
def test_same_bits_for_every_isa_thread_count_and_segmentation(rule, weights, grads, moments):
    """And 0 ulp from the torch reference. The run crosses a multiple of 2**32 elements of the store."""
    start = make_run(3001, rule=rule, weights=weights, grads=grads, moments=moments)
    place = {"seed": 7, "grad_scale": 0.3}
    offset = (5 << 32) - 1234
    expected = start.clone().update(rule, by=reference.update, element_offset=offset, **place)
    assert not same_bits(start, expected)
    for isa, threads in itertools.product((*kernel.available_isas(), "auto"), (1, 2, 4)):
        run = start.clone().update(rule, isa=isa, threads=threads, element_offset=offset, **place)
        assert same_bits(run, expected), (isa, threads)
    run = start.clone()
    cuts = [0, 0, 1, 17, 1233, 1235, 1300, 3001]
    for a, b in itertools.pairwise(cuts):
        run.part(a, b).update(rule, element_offset=offset + a, **place)
    assert same_bits(run, expected)


@needs_kernel
def test_same_bits_whichever_thread_takes_a_piece():
    """Many pieces, random numbers by element, and an offset that cuts the first piece short."""
    start = make_run(300_001, moments=BF16)
    expected = start.clone().update("adamw", by=reference.update, element_offset=777)
    for threads in (1, 2, 3, 16):
        assert same_bits(start.clone().update("adamw", threads=threads, element_offset=777), expected)
    assert not same_bits(start.clone().update("adamw", threads=3, element_offset=778), expected)


SIZES = [0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257, 1000]


@needs_kernel
@settings(max_examples=150, deadline=None)
@given(
    n=st.sampled_from(SIZES) | st.integers(0, 300),
    rule=st.sampled_from(RULES),
    dtypes=st.tuples(*[st.sampled_from((BF16, FP32))] * 3),
    seed=st.integers(0, 1 << 32),
    grad_scale=st.sampled_from((1.0, 0.5, 1e-30, 1e30, 0.0)),
    step=st.sampled_from((1, 2, 100, 10**7)),
    lr=st.sampled_from((0.0, 1e-5, 1.0)),
)
@example(n=1000, rule="adamw", dtypes=(BF16, BF16, BF16), seed=0, grad_scale=1.0, step=1, lr=1e-5)
def test_any_bit_pattern_gives_the_bits_of_the_reference(n, rule, dtypes, seed, grad_scale, step, lr):
    """Denormals, zeros, huge values, infinities and NaNs in every run, at sizes that fill no vector."""
    weights, grads, moments = dtypes
    start = make_run(n, rule=rule, weights=weights, grads=grads, moments=moments, seed=seed, wild=True)
    place = {"hyper": replace(HYPER, lr=lr), "step": step, "seed": seed, "grad_scale": grad_scale}
    expected = start.clone().update(rule, by=reference.update, **place)
    for isa in kernel.available_isas():
        assert same_bits(start.clone().update(rule, isa=isa, threads=2, **place), expected), isa


@needs_kernel
@pytest.mark.parametrize("by", [*kernel.available_isas(), "reference"])
def test_every_stored_master_is_read_and_written_alike(by):
    """A step that changes nothing (learning rate 0) over all lower halves beside even and odd weights: what
    memory/master.py stores is read and written back by every instruction set."""
    uppers = torch.tensor([0x0000, 0x0001, 0x3F80, 0x3F81, 0x7F7E, 0x7F7F, -0x8000, -0x407F, -0x81])
    lower = torch.arange(-(1 << 15), 1 << 15)
    master = ((uppers[:, None] << 16) + lower).flatten().to(torch.int32).view(FP32)
    master = torch.where(master.isfinite(), master, 0)
    weight, residual = torch.empty(len(master), dtype=BF16), torch.empty(len(master), dtype=torch.int16)
    split_master(master, weight, residual)
    assert (residual == 0x7FFF).any()
    run = Run(weight, residual, torch.zeros(len(master)), torch.zeros(len(master)), None)
    start = run.clone()
    update = reference.update if by == "reference" else partial(kernel.update, isa=by)
    run.update("sgd", by=update, hyper=Hyper(lr=0.0))
    assert same_bits(run, start)


@needs_kernel
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_gradient_spoils_its_own_element_only(rule, bad):
    start = make_run(50, rule=rule)
    clean = start.clone().update(rule)
    start.grads[17] = bad
    spoiled = start.clone().update(rule)
    others = torch.arange(50) != 17
    assert all(torch.equal(a[others], b[others]) for a, b in zip(clean.bits(), spoiled.bits(), strict=True))
    if bad != bad:
        assert spoiled.master().view(torch.int32)[17] == NAN_BITS
        assert spoiled.exp_avg.view(torch.int32)[17] == NAN_BITS
        assert spoiled.weights[17].isnan() and spoiled.residual[17] == 0
    else:
        assert spoiled.exp_avg[17] == bad


@needs_kernel
@pytest.mark.parametrize("by", [kernel.update, reference.update])
def test_moments_decay_to_zero_and_not_into_denormals(by):
    run = Run(torch.ones(40), None, torch.zeros(40), torch.full((40,), 2e-38), torch.full((40,), 1.18e-38))
    for step in range(1, 12):
        run.update("adamw", by=by, step=step)
    assert torch.equal(run.exp_avg, torch.zeros(40)) and torch.equal(run.exp_avg_sq, torch.zeros(40))


@needs_kernel
def test_the_callers_flush_to_zero_mode_changes_nothing():
    start = make_run(500, weights=FP32, grads=FP32, wild=True)
    expected = start.clone().update("adamw")
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU has no such mode")
    try:
        assert torch.tensor(1e-39) * 1 == 0  # the control: the mode is on, and stays on
        run = start.clone().update("adamw", threads=1)
        assert torch.tensor(1e-39) * 1 == 0
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(run, expected)


# ---- what is refused, and where it runs -------------------------------------------------------------------


@pytest.mark.parametrize("by", [kernel.update, reference.update])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": torch.zeros(8, dtype=torch.float16)}, "weights of torch.float16|residual"),
        ({"residual": None}, "residual with torch.bfloat16 weights"),
        ({"grads": torch.zeros(7, dtype=BF16)}, "grads of 7 elements"),
        ({"grads": torch.zeros(16, dtype=BF16)[::2]}, "contiguous"),
        ({"grads": torch.zeros(8, dtype=BF16, device="meta")}, "host memory"),
        ({"exp_avg": torch.zeros(8, dtype=BF16)}, "exp_avg_sq of torch.float32"),
        ({"exp_avg_sq": None}, "adam and adamw only"),
        ({"exp_avg": torch.zeros(2, 4)}, "1-D"),
    ],
)
def test_runs_that_do_not_fit_are_refused(by, change, message):
    run = replace(make_run(8), **change)
    with pytest.raises(ValueError, match=message):
        run.update("adamw", by=by)


def test_settings_out_of_range_are_refused():
    bad = ({"lr": -1.0}, {"lr": float("nan")}, {"lr": 1, "beta1": 1.0}, {"lr": 1, "epsilon": 0.0})
    for values in bad:
        with pytest.raises(ValueError, match="hint"):
            Hyper(**values)
    for call in ({"step": 0}, {"seed": -1}, {"element_offset": -1}):
        with pytest.raises(ValueError, match=next(iter(call))):
            make_run(8).update("adamw", by=kernel.update_run, **call)
    with pytest.raises(ValueError, match="adamw | adam"):
        make_run(8).update("adagrad", by=kernel.update_run)


@needs_kernel
def test_an_isa_that_is_not_here_is_refused(monkeypatch):
    for call in ({"isa": "avx1024"}, {"threads": 0}):
        with pytest.raises(ValueError, match="hint"):
            make_run(8).update("adamw", **call)
    missing = set(kernel.ISAS) - set(kernel.available_isas()) - {"auto"}
    for isa in missing:
        with pytest.raises(ValueError, match="not available here"):
            make_run(8).update("adamw", isa=isa)


def test_without_the_library_the_reference_serves_and_says_so_once(no_library, caplog):
    expected = make_run(100).update("adamw", by=reference.update)
    with caplog.at_level(logging.WARNING):
        runs = [make_run(100).update("adamw", by=kernel.update_run, threads=1) for _ in range(2)]
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "--build" in caplog.text and "\n" not in caplog.records[0].getMessage()
    assert all(same_bits(run, expected) for run in runs)
    assert kernel.describe() == "torch reference" and kernel.available_isas() == ()
    with pytest.raises(RuntimeError, match="hint"):
        make_run(8).update("adamw")


def test_a_caller_that_tells_the_user_keeps_the_log_silent(no_library, caplog):
    text = kernel.notice()
    assert text is not None and "ten times slower" in text and text.endswith(kernel.way_to_build())
    assert kernel.notice() == text  # for each run of a process
    with caplog.at_level(logging.WARNING):
        make_run(100).update("adamw", by=kernel.update_run, threads=1)
    assert not caplog.records


@needs_kernel
def test_with_the_library_there_is_nothing_to_tell(caplog):
    with caplog.at_level(logging.WARNING):
        make_run(100).update("adamw", by=kernel.update_run, threads=1)
    assert kernel.notice() is None and not caplog.records


def test_the_way_to_the_library_fits_the_place(monkeypatch, tmp_path):
    assert "--build" in kernel.way_to_build()  # in a checkout
    monkeypatch.setattr(kernel, "_ROOT", tmp_path)
    assert "--force-reinstall" in kernel.way_to_build() and "--build" not in kernel.way_to_build()


def test_what_is_not_the_library_is_an_error(tmp_path):
    other = tmp_path / "other.so"
    other.write_bytes(b"not a library")
    with pytest.raises(OSError):
        kernel.load(other)
