"""The C++ update stays near torch.optim, with moments in fp32 and bf16."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from horizon_lm.optim import kernel, reference
from horizon_lm.optim.rules import RULES, Hyper
from optimizer_runs import BF16, FP32, Lion, Run, make_run, needs_kernel


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
