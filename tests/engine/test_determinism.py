"""`deterministic: true`: which of torch's switches it sets, when, and what it does to a CPU (nothing)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import horizon_lm as hz
import zoo
from emulated_cuda import EmulatedCuda, watch_ops
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError
from horizon_lm.machine import determinism
from horizon_lm.machine.determinism import DeterministicKernels, prepare
from horizon_lm.schedule import Lane, Op
from moments import Moments
from plain_gradients import stream

pytestmark = pytest.mark.usefixtures("one_thread")

CUDA = torch.device("cuda", 0)
Switches = tuple[bool, ...]


def switches() -> Switches:
    return tuple(determinism._Switches.now())


SET: Switches = (True, False, False, True, False)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = determinism._Switches.now()
    assert not before.algorithms
    yield
    assert determinism._Switches.now() == before
    assert not DeterministicKernels._inside


def forced(host: hz.HostModel) -> hz.HostModel:
    """As on CUDA."""
    host.engine._kernels = DeterministicKernels()
    return host


def spied(host: hz.HostModel) -> list[tuple[Op, Switches]]:
    """Each op that runs from now on, with the switches in its thread."""
    seen = []

    def watched(run: Callable[[Any, Op], None]) -> Callable[[Any, Op], None]:
        return lambda step, op: (seen.append((op, switches())), run(step, op))[1]

    functions = host.engine.ops.functions
    functions.update({kind: watched(run) for kind, run in functions.items()})
    return seen


def step(host: hz.HostModel, name: str, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    batches = [zoo.batch(name, kind=kind) for kind in sorted(zoo.CASES[name].kinds - {"padded"})]
    loss = host.forward_backward(batches, **options).loss
    return loss, {key: g.clone() for key, g in host.named_gradients()}


@pytest.mark.parametrize("name", ["llama-tied", "gemma3_text", "mixtral-aux", "gpt2"])
def test_a_cpu_computes_the_same_bits(name: str) -> None:
    """By default, with the setting, and with CUDA's switches set, which a CPU's kernels see as well."""
    model = zoo.build(name)
    host = stream(model)
    loss, gradients = step(host, name)
    asked = stream(model, deterministic=True)
    assert not asked.engine._kernels._is_on
    for other in (asked, forced(host)):
        found, theirs = step(other, name)
        assert found == loss
        assert theirs.keys() == gradients.keys()
        assert all(torch.equal(theirs[key], gradients[key]) for key in gradients)


def test_the_switches_are_set_in_ops_and_at_no_other_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward and backward pass and in updates, whatever happens there. A CPU leaves them alone."""
    host = forced(stream(zoo.build("llama")))
    seen = spied(host)
    before = switches()
    step(host, "llama")
    assert switches() == before
    host.step(lr=1e-3)
    host.flush()
    assert {"F", "B", "O"} <= {op.kind for op, _ in seen} and {now for _, now in seen} == {SET}
    assert switches() == before

    def fail(log_probs: torch.Tensor, batch: Any) -> torch.Tensor:
        raise OverflowError

    with pytest.raises(OverflowError):
        host.forward_backward([zoo.batch("llama")], loss_fn=fail)
    assert switches() == before

    quiet = stream(zoo.build("llama"), deterministic=True)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", None)
    step(quiet, "llama")


def test_a_model_on_cuda_has_them_in_all_lanes(
    emulated_cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's lanes and their threads, on the CPU; cuBLAS is prepared. Control: neither by default."""
    for wanted in (False, True):
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # what the test leaves is removed after it
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
        host = hz.HostModel.from_pretrained(
            zoo.build("llama"), device="cuda", skip_memory_check=True, deterministic=wanted
        )
        assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if wanted else None)
        watch_ops(host.engine, emulated_cuda)
        seen = spied(host)
        before = switches()
        host.train_step([zoo.batch("llama", kind="packed")], lr=1e-3)
        host.flush()
        assert {Lane.UPLOAD, Lane.COMPUTE, Lane.DOWNLOAD, Lane.UPDATE} <= {op.lane for op, _ in seen}
        assert {now for _, now in seen} == {SET if wanted else before}
        host.close()


def test_an_op_without_such_a_kernel_is_named() -> None:
    """The model trains on. torch's other errors stay what they are."""
    host = forced(stream(zoo.build("llama")))

    def scatters(log_probs: torch.Tensor, batch: Any) -> torch.Tensor:
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))
        return -log_probs.mean()

    with pytest.raises(ConfigError, match=r"torch .* has no deterministic kernel for put_\n") as caught:
        host.forward_backward([zoo.batch("llama")], loss_fn=scatters)
    assert caught.value.hint is not None and "deterministic=false" in caught.value.hint
    assert any(note.startswith("in op ") for note in caught.value.__notes__)

    def breaks(log_probs: torch.Tensor, batch: Any) -> torch.Tensor:
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        host.forward_backward([zoo.batch("llama")], loss_fn=breaks)
    step(host, "llama")


def test_models_in_threads_share_the_switches() -> None:
    """The last one out restores them; what was set before the first came in comes back."""
    one, two = DeterministicKernels(), DeterministicKernels()
    torch.use_deterministic_algorithms(True, warn_only=True)
    mine = switches()
    try:
        inside, leave = threading.Event(), threading.Event()

        def work() -> None:
            with two:
                inside.set()
                leave.wait(30)

        thread = threading.Thread(target=work)
        with one:
            thread.start()
            assert inside.wait(30)
        assert switches() == SET
        leave.set()
        thread.join(30)
        assert switches() == mine != SET
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_interrupt_leaves_nothing_switched() -> None:
    """At any line of the context; the engine's next call runs what restores it. Control: without that."""
    kernels, left = DeterministicKernels(), 0
    moments = Moments(lambda path: path.startswith("machine/determinism"))
    before = switches()

    def call() -> None:
        with kernels:
            assert switches() == SET

    moments.run(call)
    for at in range(moments.count):
        moments.run(call, at)
        left += switches() != before
        kernels.leave()
        assert switches() == before, moments.where
    assert left


def test_cublas_gets_its_workspace_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    environment: dict[str, str] = {}
    prepare(torch.device("cpu"), environment)
    assert environment == {}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    prepare(CUDA, environment)
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    prepare(CUDA, {"CUBLAS_WORKSPACE_CONFIG": ":16:8"})
    with pytest.raises(ConfigError, match="CUBLAS_WORKSPACE_CONFIG=:4096:2") as caught:
        prepare(CUDA, {"CUBLAS_WORKSPACE_CONFIG": ":4096:2"})
    assert caught.value.hint == "unset CUBLAS_WORKSPACE_CONFIG, or set it to :4096:8"


def test_cublas_that_started_without_it_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch answers a product then; the text is that of its Context.cpp."""
    seen = []

    def product(one: Any, two: Any) -> None:
        seen.append(switches())
        raise RuntimeError(
            "Deterministic behavior was enabled with either `torch.use_deterministic_algorithms(True)` or "
            "`at::Context::setDeterministicAlgorithms(true)`, but this operation is not deterministic "
            "because it uses CuBLAS and you have CUDA >= 10.2."
        )

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch, "ones", lambda *size, device: None)
    monkeypatch.setattr(torch, "mm", product)
    with pytest.raises(ConfigError, match="before CUBLAS_WORKSPACE_CONFIG was set") as caught:
        prepare(CUDA, {})
    assert caught.value.hint is not None and "CUBLAS_WORKSPACE_CONFIG=:4096:8" in caught.value.hint
    assert seen == [SET]


def test_kernels_that_promise_nothing_are_rejected() -> None:
    """And transformers' name for the setting is read."""
    values = {"model_name_or_path": "m", "datasets": "d", "full_determinism": True, "device": "cpu"}
    for attention in ("sdpa", "eager"):
        assert TrainConfig.from_dict({**values, "attn_implementation": attention}).deterministic
    rejected = [
        ("attn_implementation", "flash_attention_2", "sdpa"),
        ("attn_implementation", "flex_attention", "sdpa"),
        ("compile", True, "false"),
        ("compile", "max-autotune", "false"),
        ("kernels", "liger", "none"),
    ]
    for key, value, instead in rejected:
        with pytest.raises(
            ConfigError, match=f"{key}={str(value).replace('True', 'true')} may choose"
        ) as caught:
            TrainConfig.from_dict({**values, key: value})
        assert caught.value.hint == f"set {key}={instead} or deterministic=false"
