"""The C++ update: near torch.optim, bit for bit its torch reference, and what bf16 alone would lose."""

from __future__ import annotations

import itertools
import logging
import shutil
from dataclasses import dataclass, fields, replace
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from horizon_lm.memory.master import join_master, split_master
from horizon_lm.optim import kernel, reference
from horizon_lm.optim.rules import RULES, Hyper

BF16, FP32 = torch.bfloat16, torch.float32
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.int16: torch.int16}
HYPER = Hyper(lr=1e-3, weight_decay=0.1, momentum=0.9)
NAN_BITS = 0x7FC00000

needs_kernel = pytest.mark.skipif(kernel.library() is None, reason="no C++ compiler here")


@dataclass
class Run:
    """The five runs of an update, each 1-D [n]."""

    weights: torch.Tensor
    residual: torch.Tensor | None
    grads: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor | None

    def tensors(self) -> list[torch.Tensor | None]:
        return [getattr(self, field.name) for field in fields(self)]

    def clone(self) -> Run:
        return Run(*(None if t is None else t.clone() for t in self.tensors()))

    def part(self, start: int, end: int) -> Run:
        return Run(*(None if t is None else t[start:end] for t in self.tensors()))

    def master(self) -> torch.Tensor:
        if self.residual is None:
            return self.weights.to(FP32, copy=True)
        return join_master(self.weights, self.residual)

    def bits(self) -> list[torch.Tensor]:
        return [t.view(BITS[t.dtype]) for t in self.tensors() if t is not None]

    def update(self, rule: str, by=kernel.update, **settings) -> Run:
        """Update in place; `by` is a function of kernel or reference."""
        by(rule, *self.tensors(), **{"hyper": HYPER, "step": 3, **settings})
        return self


def same_bits(one: Run, other: Run) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.bits(), other.bits(), strict=True))


def make_run(
    n: int, *, rule: str = "adamw", weights=BF16, grads=BF16, moments=FP32, seed: int = 0, wild: bool = False
) -> Run:
    """Values like those of training; `wild`: any bit pattern; half are zeros, denormals, NaNs, infinities."""
    generator = torch.Generator().manual_seed(seed)

    def values(dtype: torch.dtype, scale: float) -> torch.Tensor:
        if not wild:
            return (torch.randn(n, generator=generator) * scale).to(dtype)
        bits = torch.randint(-(1 << 31), 1 << 31, (n,), generator=generator).to(torch.int32)
        kind = torch.randint(0, 8, (n,), generator=generator)
        bits = torch.where(kind == 0, bits & -0x7F800001, bits)  # zeros and denormals
        bits = torch.where(kind == 1, bits & -0x80000000, bits)  # zeros
        bits = torch.where(kind == 2, bits | 0x7F800000, bits)  # NaN
        bits = torch.where(kind == 3, bits & -0x80000000 | 0x7F800000, bits)  # infinities
        bits = torch.where(kind == 4, bits & -0x7F800000 | 0x3F800000, bits)  # near 1
        return bits.view(FP32) if dtype == FP32 else (bits >> 16).to(torch.int16).view(BF16)

    residual = torch.zeros(n, dtype=torch.int16) if weights == BF16 else None
    weight = torch.empty(n, dtype=BF16) if weights == BF16 else values(FP32, 0.02)
    if residual is not None:
        split_master(values(FP32, 0.02), weight, residual)
    square = values(moments, 1e-3).square() if rule in ("adamw", "adam") else None
    return Run(weight, residual, values(grads, 1e-2), values(moments, 1e-2), square)


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


# ---- torch.optim is the authority -----------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m, (b1, b2) = self.state[p].setdefault("m", torch.zeros_like(p)), group["betas"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(torch.sign(b1 * m + (1 - b1) * p.grad) * group["lr"])
                m.mul_(b2).add_(p.grad * (1 - b2))


def authority(rule: str, parameter: torch.Tensor, h: Hyper) -> torch.optim.Optimizer:
    betas = (h.beta1, h.beta2)
    if rule == "sgd":
        return torch.optim.SGD([parameter], h.lr, momentum=h.momentum, weight_decay=h.weight_decay)
    if rule == "lion":
        return Lion([parameter], h.lr, betas, h.weight_decay)
    kind = torch.optim.AdamW if rule == "adamw" else torch.optim.Adam
    return kind([parameter], h.lr, betas, h.epsilon, h.weight_decay)


@needs_kernel
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weights", [BF16, FP32])
def test_the_master_follows_torch_optim_for_200_steps(rule, weights):
    """Within 1e-6 of the largest masters' size (and 1e-6 relative as a whole); gradients clipped and not,
    a learning rate that changes. The bf16 weights are the master's nearest-even rounding at every step."""
    n = 5003
    run = make_run(n, rule=rule, weights=weights, grads=FP32)
    run.exp_avg.zero_()
    if run.exp_avg_sq is not None:
        run.exp_avg_sq.zero_()
    parameter = run.master().requires_grad_()
    first = run.master()
    hyper = Hyper(lr=1e-3, weight_decay=0.1, momentum=0.9, beta2=0.99 if rule == "lion" else 0.999)
    optimizer = authority(rule, parameter, hyper)
    generator = torch.Generator().manual_seed(1)
    target = torch.randn(n, generator=generator) * 0.02
    for step in range(1, 201):
        noise = torch.randn(n, generator=generator) * 1e-2
        run.grads.copy_(run.master() - target + noise)
        scale = 1.0 if step % 3 else 0.25
        parameter.grad = run.grads * scale
        optimizer.param_groups[0]["lr"] = lr = 1e-3 * (1 - step / 400)
        optimizer.step()
        run.update(rule, hyper=replace(hyper, lr=lr), step=step, grad_scale=scale)
        if run.residual is not None:
            assert torch.equal(run.weights, run.master().to(BF16)), step
    expected, found = parameter.detach().double(), run.master().double()
    assert (found - first).norm() > 0.05 * first.norm()
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


BETAS1 = (0.0, 0.01, 0.1, 0.3, 0.5, 0.9)


@needs_kernel
@pytest.mark.parametrize("by", [kernel.update, reference.update])
@pytest.mark.parametrize("beta1", BETAS1)
@pytest.mark.parametrize("rule", ["adamw", "adam", "lion"])
def test_the_first_moment_is_torchs_lerp_for_any_beta1(rule, beta1, by):
    """Gradients that are up to 1e9 times smaller than the moment. torch's own lerp may fuse operations,
    hence the tolerance of some roundings. The control: the form for small weights alone."""
    hyper = Hyper(lr=1e-3, beta1=beta1, beta2=beta1 if rule == "lion" else 0.999)
    run = make_run(4000, rule=rule, weights=FP32, grads=FP32)
    generator = torch.Generator().manual_seed(1)
    run.exp_avg.copy_(torch.randn(4000, generator=generator))
    run.grads.mul_(10.0 ** (-9 * torch.rand(4000, generator=generator)))
    old, grads = run.exp_avg.clone(), run.grads.clone()
    before = run.weights.clone()
    run.update(rule, by=by, hyper=hyper, step=2)
    weight = 1 - beta1
    near = grads if weight >= 0.5 else old
    allowed = 2**-24 * (near.abs() + 3 * (grads - old).abs() * min(weight, beta1)).double()
    error = (run.exp_avg.double() - torch.lerp(old, grads, weight).double()).abs()
    assert (error <= 2 * allowed).all()
    one_form = old + (grads - old) * torch.tensor(weight)
    off = (one_form.double() - torch.lerp(old, grads, weight).double()).abs()
    assert bool((off > 2 * allowed).any()) == (beta1 <= 0.1)
    if beta1 == 0:
        assert torch.equal(run.exp_avg, grads)
    if rule == "lion":
        sign = (before - run.weights).sign()
        exact = (old.double() * beta1 + grads.double() * weight).sign().float()
        clear = (old.double() * beta1 + grads.double() * weight).abs() > 4 * allowed
        assert torch.equal(sign[clear], exact[clear]) and clear.float().mean() > 0.9


@needs_kernel
@pytest.mark.parametrize("beta1", BETAS1)
@pytest.mark.parametrize("rule", ["adamw", "adam", "lion"])
def test_the_master_follows_torch_optim_for_any_beta1(rule, beta1):
    """30 steps; one gradient of 1e6 is followed by ones of 1e-3."""
    run = make_run(500, rule=rule, weights=FP32, grads=FP32)
    for moment in (run.exp_avg, run.exp_avg_sq):
        if moment is not None:
            moment.zero_()
    hyper = Hyper(lr=1e-3, beta1=beta1, beta2=0.9, weight_decay=0.1)
    parameter = run.master().requires_grad_()
    optimizer = authority(rule, parameter, hyper)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 31):
        run.grads.copy_(torch.randn(500, generator=generator) * (1e6 if step == 3 else 1e-3))
        parameter.grad = run.grads.clone()
        optimizer.step()
        run.update(rule, hyper=hyper, step=step, threads=1)
    assert (run.master() - parameter.detach()).abs().max() <= 1e-6 * parameter.abs().max()


# ---- bf16 moments ---------------------------------------------------------------------------------------


@needs_kernel
def test_stochastic_rounding_is_unbiased_and_reproducible():
    """n draws of one value x between two bf16 numbers: the mean is x within 5 standard errors."""
    n = 200_000
    value = 1.0 + 0.3 / 128  # 30 % of the way from 1 to the next bf16 number
    hyper = Hyper(lr=0.0, momentum=0.0)

    def draw(**settings) -> torch.Tensor:
        run = Run(torch.ones(n), None, torch.full((n,), value), torch.zeros(n, dtype=BF16), None)
        return run.update("sgd", hyper=hyper, **settings).exp_avg.float()

    drawn = draw(seed=1)
    assert set(drawn.unique().tolist()) == {1.0, 1.0 + 1 / 128}
    error = (0.3 * 0.7 / n) ** 0.5 / 128
    assert abs(drawn.double().mean().item() - value) < 5 * error
    assert torch.equal(draw(seed=1), drawn)
    for other in ({"seed": 2}, {"seed": 1, "step": 4}, {"seed": 1, "element_offset": 1 << 32}):
        agreement = (draw(**other) == drawn).double().mean().item()  # independent: 0.3² + 0.7² = 0.58
        assert abs(agreement - 0.58) < 5 * (0.58 * 0.42 / n) ** 0.5, other
    assert torch.equal(draw(seed=1, element_offset=1)[:-1], drawn[1:])  # a function of the place in the store


def test_random_bits_are_even_and_independent():
    """Each bit is set half the time, no two bits or neighbours go together: within 5 standard errors."""
    n = 1 << 16
    bits = reference.random_bits(3, 5, 11 << 32, n)
    table = ((bits[:, None] >> torch.arange(32)) & 1).double() * 2 - 1  # ±1, [n, 32]
    bound = 5 / n**0.5
    assert table.mean(0).abs().max() < bound
    assert (table.T @ table / n - torch.eye(32)).abs().max() < bound
    assert (table[1:].T @ table[:-1] / n).abs().max() < bound


@needs_kernel
def test_bf16_moments_train_as_fp32_ones_do():
    """And moments rounded to nearest do not: 0.999 v rounds back to v in bf16, so v never falls."""
    runs = {dtype: make_run(4096, moments=dtype, grads=FP32) for dtype in (FP32, BF16)}
    generator = torch.Generator().manual_seed(2)
    frozen = torch.full((4096,), 1e-2, dtype=BF16)
    for run in runs.values():
        run.exp_avg.zero_(), run.exp_avg_sq.fill_(1e-2)
    starts = {dtype: run.master() for dtype, run in runs.items()}
    for step in range(1, 301):
        grads = torch.randn(4096, generator=generator) * 1e-3 + 1e-3
        frozen = (frozen.float() * 0.999 + 0.001 * grads.square()).to(BF16)
        for run in runs.values():
            run.grads.copy_(grads)
            run.update("adamw", step=step, hyper=Hyper(lr=1e-4))
    exact = runs[FP32].exp_avg_sq
    assert abs(runs[BF16].exp_avg_sq.float().mean() / exact.mean() - 1) < 0.01
    assert frozen.float().mean() > 1.2 * exact.mean()  # the negative control
    change = [(runs[d].master() - starts[d]).double() for d in (FP32, BF16)]
    assert torch.cosine_similarity(*change, dim=0) > 0.999


@needs_kernel
def test_split_master_learns_what_pure_bf16_loses():
    """Weights of scale 0.02, lr 1e-5, 200 Adam steps: a step is a fraction of a bf16 ulp."""
    n = 20_000
    generator = torch.Generator().manual_seed(0)
    run = make_run(n, rule="adam", grads=FP32)
    run.exp_avg.zero_(), run.exp_avg_sq.zero_()
    first = run.master()
    exact = first.clone().requires_grad_()
    coarse = run.weights.clone().requires_grad_()  # the negative control: the master is bf16 itself
    optimizers = [torch.optim.AdamW([p], lr=1e-5, weight_decay=0.0) for p in (exact, coarse)]
    direction = torch.randn(n, generator=generator)
    for step in range(1, 201):
        run.grads.copy_(direction + torch.randn(n, generator=generator))
        exact.grad, coarse.grad = run.grads.clone(), run.grads.to(BF16)
        for optimizer in optimizers:
            optimizer.step()
        run.update("adam", step=step, hyper=Hyper(lr=1e-5))
    change = (exact.detach() - first).double()
    assert torch.cosine_similarity((run.master() - first).double(), change, dim=0) > 0.9999
    moved = coarse.detach() != first.to(BF16)
    assert moved.double().mean() < 0.5
    lost = torch.cosine_similarity((coarse.detach().float() - first).double(), change, dim=0)
    assert lost < 0.9


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


def test_without_the_library_the_reference_serves_and_says_so_once(monkeypatch, caplog, tmp_path):
    expected = make_run(100).update("adamw", by=reference.update)
    monkeypatch.setattr(kernel, "EXTENSION_SUFFIXES", [])
    kernel.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            runs = [make_run(100).update("adamw", by=kernel.update_run, threads=1) for _ in range(2)]
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        assert "--build" in caplog.text and "\n" not in caplog.records[0].getMessage()
        assert all(same_bits(run, expected) for run in runs)
        assert kernel.describe() == "torch reference" and kernel.available_isas() == ()
        with pytest.raises(RuntimeError, match="hint"):
            make_run(8).update("adamw")
    finally:
        kernel.library.cache_clear()
    other = tmp_path / "other.so"
    other.write_bytes(b"not a library")
    with pytest.raises(OSError):
        kernel.load(other)
