"""The device update: bit for bit the C++ kernel's, by Triton's interpreter.

`make gpu-check` compares them on a GPU.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import horizon_lm as hz
import interpreted
import zoo
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.errors import ConfigError
from horizon_lm.memory.layout import ALIGN_ELEMENTS, UnitLayout
from horizon_lm.memory.master import split_master
from horizon_lm.memory.regions import StoreSpec
from horizon_lm.memory.shards import UnitShard
from horizon_lm.optim import kernel, optimizer, reference
from horizon_lm.optim.optimizer import Group, Optimizer, Segment, UpdateSettings
from horizon_lm.optim.progress import Progress
from horizon_lm.optim.rules import RULES, Hyper, Numbers, Tensors
from optimizer_runs import BF16, FP32, Run, make_run

pytestmark = [interpreted.needs_triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DTYPES = list(itertools.product((BF16, FP32), (BF16, FP32), (BF16, FP32)))
HYPER = Hyper(lr=1e-3, weight_decay=0.1, momentum=0.9, epsilon=1e-8)


@pytest.fixture(scope="module")
def device_kernel() -> ModuleType:
    return interpreted.device_kernel()


def differing(one: Run, other: Run) -> int:
    """Elements whose bits differ in one of the five buffers."""
    pairs = zip(one.bits(), other.bits(), strict=True)
    return int(torch.stack([a != b for a, b in pairs]).any(0).sum())


def spread(n: int, **kinds) -> Run:
    """Values over 20 orders of magnitude, and every kind of bit pattern among them."""
    run, wild = make_run(n, **kinds), make_run(n, **kinds, seed=1, wild=True)
    generator = torch.Generator().manual_seed(2)
    for mine, strange in zip(run.tensors(), wild.tensors(), strict=True):
        if mine is None or mine.dtype == torch.int16:
            continue
        mine.mul_(10 ** (torch.rand(n, generator=generator) * 20 - 12))
        chosen = torch.arange(n) % 3 == 0
        mine[chosen] = strange[chosen]
    if run.residual is not None:  # the halves of a master belong together
        run.weights.copy_(wild.weights)
        run.residual.copy_(wild.residual)
        tame = make_run(n, **kinds, seed=3)
        half = torch.arange(n) % 2 == 0
        run.weights[half], run.residual[half] = tame.weights[half], tame.residual[half]
    return run


def by_both(start: Run, rule: str, update, steps: int = 1, **numbers) -> tuple[Run, Run]:
    """After some steps by the host kernel and by `update`."""
    host, device = start.clone(), start.clone()
    for step in range(1, steps + 1):
        place = {"hyper": HYPER, "step": step, "seed": 7, "grad_scale": 0.3} | numbers
        host.update(rule, by=kernel.update_run, **place)
        device.update(rule, by=update, **place)
    return host, device


# ---- the bits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
def test_bits_of_the_host_kernel_for_every_dtype_and_size(rule: str, device_kernel: ModuleType) -> None:
    """Several steps, and sizes around the block of a program."""
    block = device_kernel.BLOCK
    for weights, grads, moments in DTYPES:
        start = spread(3 * block + 17, rule=rule, weights=weights, grads=grads, moments=moments)
        kinds = [start.weights.float(), start.grads.float(), start.exp_avg.float()]
        for values in kinds:
            assert values.isnan().any() and values.isinf().any() and (values == 0).any()
            assert ((values != 0) & (values.abs() < torch.finfo(FP32).tiny)).any()  # denormal
        for n in (0, 1, block - 1, block, block + 1, start.weights.numel()):
            host, device = by_both(start.part(0, n), rule, device_kernel.update, steps=1 if n < block else 3)
            assert differing(host, device) == 0, (weights, grads, moments, n)
        assert differing(host, start) > start.weights.numel() // 2


@pytest.mark.parametrize("lr", [0.0, 1e-5, 1.0])
@pytest.mark.parametrize("grad_scale", [0.0, 1e-30, 1e30])
def test_bits_for_any_coefficients(lr: float, grad_scale: float, device_kernel: ModuleType) -> None:
    """Also betas of 0 and above a half (the two ends of lerp), and a late step."""
    for rule, beta1, step in itertools.product(RULES, (0.0, 0.4, 0.95), (1, 10**7)):
        start = spread(1000, rule=rule, moments=BF16)
        hyper = replace(HYPER, lr=lr, beta1=beta1)
        host, device = by_both(
            start, rule, device_kernel.update, hyper=hyper, grad_scale=grad_scale, step=step
        )
        assert differing(host, device) == 0, (rule, beta1, step)


@pytest.mark.parametrize("offset", [0, 1, 3 << 32, (1 << 32) - 1, (5 << 32) - 3000, (1 << 63) - 3000])
def test_random_numbers_by_the_element_of_the_store(offset: int, device_kernel: ModuleType) -> None:
    """Also where their keys change, in the middle of a program and at its end."""
    start = spread(6001, moments=BF16)
    host, device = by_both(start, "adamw", device_kernel.update, element_offset=offset)
    assert differing(host, device) == 0
    other, _ = by_both(start, "adamw", device_kernel.update, element_offset=offset + 1)
    assert differing(host, other) > 0


def test_pieces_end_where_the_keys_change(device_kernel: ModuleType) -> None:
    block = 1 << 32
    assert device_kernel._pieces(0, 5) == []
    assert device_kernel._pieces(7, block) == [(0, 7)]
    assert device_kernel._pieces(7, block - 7) == [(0, 7)]
    assert device_kernel._pieces(3 * block, 5) == [
        (0, block - 5),
        (block - 5, 2 * block - 5),
        (2 * block - 5, 3 * block - 5),
        (3 * block - 5, 3 * block),
    ]


def test_segments_of_any_start(device_kernel: ModuleType) -> None:
    start = spread(9000, moments=BF16)
    numbers = {"hyper": HYPER, "seed": 7, "element_offset": 0}
    whole = start.clone().update("adamw", by=device_kernel.update, **numbers)
    parts = start.clone()
    for a, b in itertools.pairwise([0, 1, 18, 2049, 2050, 6145, 9000]):
        parts.part(a, b).update("adamw", by=device_kernel.update, **numbers | {"element_offset": a})
    assert differing(whole, parts) == 0


def test_every_stored_master_is_read_and_written_alike(device_kernel: ModuleType) -> None:
    """Learning rate 0 over all lower halves beside even and odd weights changes no bit."""
    uppers = torch.tensor([0x0000, 0x3F80, 0x3F81, 0x7F7F, -0x8000, -0x407F], dtype=torch.int32)
    lower = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32)
    master = ((uppers[:, None] << 16) + lower).flatten().view(FP32)
    master = torch.where(master.isfinite(), master, 0)
    weight, residual = torch.empty(len(master), dtype=BF16), torch.empty(len(master), dtype=torch.int16)
    split_master(master, weight, residual)
    start = Run(weight, residual, torch.zeros(len(master)), torch.zeros(len(master)), None)
    run = start.clone().update("sgd", by=device_kernel.update, hyper=Hyper(lr=0.0))
    assert differing(run, start) == 0


CHANGES = {
    "the product in another order": ("(grad * take2) * grad", "(grad * grad) * take2"),
    "lerp from the start only": (
        "tl.where(near_start, start, end) + (end - start) * tl.where(near_start, weight, weight - 1.0)",
        "start + (end - start) * weight",
    ),
    "a reciprocal": (
        "tl.div_rn(m * step_size, root + epsilon)",
        "(m * step_size) * (1.0 / (root + epsilon))",
    ),
    "no rule for the residual": ("bits - ((low == 0x7FFF) | (low == 0x8000)).to(tl.uint32)", "bits"),
    "no upper tie": (
        "(residual == 0x7FFF) & ((weight & 1) == 0)",
        "(residual == 0x7FFF) & (weight != weight)",
    ),
    "denormal moments": ("tl.where((bits & 0x7F800000) == 0, 0, bits)", "bits"),
    "any NaN": ("tl.where((bits & 0x7FFFFFFF) > 0x7F800000, _NAN, bits)", "bits"),
    "the other half of the random number": ("random >> 16, BF16_MOMENTS", "random, BF16_MOMENTS"),
    "a key of another step": ("numbers.step, element)", "numbers.step + 1, element)"),
    "a fused multiply-add": (
        "* beta2 + (grad * take2) * grad",
        ".to(tl.float64) * beta2 + (grad * take2) * grad\n            v = v.to(tl.float32)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_operation_is_found(change: str, tmp_path: Path) -> None:
    """The negative controls: the comparison above sees each of these."""
    before, after = CHANGES[change]
    source = interpreted.FILE.read_text()
    assert source.count(before) == 1
    changed = interpreted.load(source.replace(before, after), "changed", tmp_path / "changed.py")
    found = 0
    for weights, moments in itertools.product((BF16, FP32), repeat=2):
        start = spread(5000, weights=weights, moments=moments)
        if start.residual is not None:  # no rare case
            start.residual[::5] = 0x7FFF
            start.residual[1::5] = -0x8000
        for lr, beta1 in ((1e-3, 0.4), (0.0, 0.9)):
            hyper = replace(HYPER, lr=lr, beta1=beta1)
            host, device = by_both(start, "adamw", changed.update, steps=2, hyper=hyper)
            found += differing(host, device)
    assert found > 0


# ---- launched twice -------------------------------------------------------------------------------------


def test_a_repeated_launch_changes_nothing(device_kernel: ModuleType) -> None:
    """An interrupt after the launch and before its entry; also between two launches of one piece."""
    start = spread(6001, moments=BF16)
    numbers = Numbers("adamw", HYPER, 3, element_offset=(1 << 32) - 3000)
    once = start.clone()
    device_kernel.update(Tensors(*once.tensors()), numbers)
    run, progress = start.clone(), Progress()
    tensors = Tensors(*run.tensors())
    device_kernel.update(tensors, numbers, progress=progress)
    for _ in range(2):
        assert progress.ended == [0] and progress.is_done
        progress.ended.clear()  # as if the entry had not been made
        device_kernel.update(tensors, numbers, progress=progress)
        assert differing(run, once) == 0
    assert progress.on_device is not None
    progress.on_device[1][1:].zero_()  # as if only the first program had been launched
    expected = start.clone()
    device_kernel.update(Tensors(*expected.tensors()), numbers)
    half = device_kernel.BLOCK
    rest = Tensors(*(None if t is None else t[half:] for t in run.tensors()))
    for mine, first in zip(rest.written(), Tensors(*start.part(half, 6001).tensors()).written(), strict=True):
        mine.copy_(first)
    progress.ended.clear()
    device_kernel.update(tensors, numbers, progress=progress)
    assert differing(run, expected) == 0


def test_the_next_piece_and_the_next_update_are_made(device_kernel: ModuleType) -> None:
    """The control: marks of another piece or update do not count."""
    start = spread(3000)
    numbers = Numbers("adamw", HYPER, 3)
    run, progress = start.clone(), Progress(pieces=2)
    for _ in range(2):
        device_kernel.update(Tensors(*run.tensors()), numbers, progress=progress)
    assert progress.is_done
    twice = start.clone()
    for _ in range(2):
        device_kernel.update(Tensors(*twice.tensors()), numbers)
    once = start.clone()
    device_kernel.update(Tensors(*once.tensors()), numbers)
    assert differing(run, twice) == 0 and differing(run, once) > 0


class OneUnit:
    """A store of one unit without parameters before the trainable ones."""

    def __init__(self, run: Run) -> None:
        numel = run.weights.numel()
        self.buffers = {"weights": run.weights, "residual": run.residual}
        self.buffers |= {"exp_avg": run.exp_avg, "exp_avg_sq": run.exp_avg_sq}
        self.units = [UnitLayout("unit", (), numel, 0, 0, 0)]
        self.shards = [UnitShard(self.units[0])]

    def has(self, region: str) -> bool:
        return self.buffers[region] is not None

    def run(self, region: str, unit: int) -> torch.Tensor:
        return self.buffers[region]


def test_a_unit_of_several_groups_after_an_interrupt_anywhere(
    device_kernel: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Optimizer.update_unit` by the device kernel, interrupted before and after each launch."""
    start = spread(5 * ALIGN_ELEMENTS + 5000)
    ends = [0, ALIGN_ELEMENTS, 4 * ALIGN_ELEMENTS, start.weights.numel()]
    groups = [Group(), Group(decays=False), Group(lr_factor=0.5)]
    cut = tuple(Segment(*ab, group) for ab, group in zip(itertools.pairwise(ends), groups, strict=True))
    optimizer = Optimizer(segments=(cut,))
    settings = UpdateSettings(step=2, lr=1e-3, max_grad_norm=None, weight_decay=0.1)

    def update(run: Run, progress: Progress) -> None:
        optimizer.update_unit(OneUnit(run), 0, run.grads, settings, 0.5, progress)

    expected = start.clone()
    update(expected, Progress())

    calls = {"left": 0}

    def interrupted(tensors: Tensors, numbers: Numbers, *, threads=None, progress: Progress) -> None:
        calls["left"] -= 1
        if calls["left"] == 0:
            raise KeyboardInterrupt
        device_kernel.update(tensors, numbers, progress=progress)
        calls["left"] -= 1
        if calls["left"] == 0:
            progress.ended.pop()
            raise KeyboardInterrupt

    monkeypatch.setattr("horizon_lm.optim.optimizer.update_run", interrupted)
    for at in range(1, 7):
        run, progress = start.clone(), Progress()
        calls["left"] = at
        with pytest.raises(KeyboardInterrupt):
            update(run, progress)
        update(run, progress)
        assert progress.is_done and differing(run, expected) == 0, at


# ---- where it runs --------------------------------------------------------------------------------------


def test_updates_go_to_the_memory_they_are_in(device_kernel: ModuleType) -> None:
    run = make_run(64)
    mixed = replace(run, grads=run.grads.to("meta"))
    with pytest.raises(ValueError, match=r"grads on meta; hint: .*in host memory"):
        mixed.update("adamw", by=device_kernel.update)
    on_device = Run(*(None if t is None else t.to("meta") for t in run.tensors()))
    for update in (kernel.update, reference.update):
        with pytest.raises(ValueError, match="weights on meta"):
            on_device.update("adamw", by=update)


def test_on_an_emulated_device_the_host_kernel_stands_in(fake_cuda, emulated_cuda) -> None:
    start = make_run(100, moments=BF16)
    expected = start.clone().update("adamw")
    run = Run(*(None if t is None else t.to("cuda") for t in start.tensors()))
    assert run.weights.device.type == "cuda"
    progress = Progress()
    run.update("adamw", by=kernel.update_run, progress=progress)
    assert progress.is_done and differing(run, expected) == 0


def test_without_triton_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    kernel.check_available(torch.device("cpu"), "adamw", StoreSpec(BF16))
    monkeypatch.setattr(kernel.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="triton package") as caught:
        kernel.check_available(cuda, "adamw", StoreSpec(BF16))
    assert "resident=0" in str(caught.value.hint)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_cannot_be_updated_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match="units cannot live on cuda:0: the update fails there") as caught:
        kernel.check_available(torch.device("cuda", 0), "adamw", StoreSpec(BF16))
    assert "resident=0" in str(caught.value.hint)


@pytest.mark.parametrize("settings", [{}, {"update": "eager", "max_grad_norm": None}], ids=["", "eager"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("moments", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_variants_that_are_tried_are_those_that_run(
    dtype: str, moments: str, rule: str, settings: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one micro-batch a gradient has the store's dtype; with several it is summed in fp32."""
    model = hz.HostModel.from_pretrained(
        zoo.build("llama"), "cpu", dtype, moment_dtype=moments, optim=rule, resident=4, **settings
    )
    ran: set[tuple] = set()
    update = optimizer.update_run

    def kinds(tensors: Tensors) -> tuple:
        return tuple(None if t is None else t.dtype for t in vars(tensors).values())

    def recorded(tensors: Tensors, *args: Any, **kwargs: Any) -> None:
        ran.add(kinds(tensors))
        update(tensors, *args, **kwargs)

    monkeypatch.setattr(optimizer, "update_run", recorded)
    for count in (1, 2):
        model.train_step([zoo.batch("llama", length=8, seed=m) for m in range(count)], lr=1e-3)
        model.flush()
    tried = {kinds(t) for t in kernel._variants(model.store.spec, torch.device("cpu"))}
    assert ran == tried


def test_importing_the_package_imports_no_triton() -> None:
    """It is needed where units live on a GPU, and takes a second."""
    import_ = re.compile(r"^(import|from) .*(triton|device_kernel)", re.MULTILINE)
    sources = Path(hz.__file__).parent.rglob("*.py")
    assert [path.name for path in sources if import_.search(path.read_text())] == ["device_kernel.py"]
