"""Adapters of peers against stand-ins with the peers' documented calls, and FSDP2 itself, all on the CPU.

A stand-in shows that an adapter makes the calls that the peer documents, in their order and with the settings
of the case; not that the peer answers as documented. That takes a GPU.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import peers
from benchmarks.peers import check, hf_trainer
from torch import nn

from horizon_lm.bench.models import shape
from horizon_lm.bench.plain import Plain
from horizon_lm.bench.protocol import AbsentError, Case, tokens_of

CASE = Case(shape("tiny"), length=32, sequences=4, rows=2, dtype="float32", lr=1e-3, clip=0.5, threads=1)
SEEN: dict[str, Any] = {}


class Clipping(torch.optim.AdamW):
    """AdamW that clips by itself, as offloading optimizers do."""

    limit: float | None = None

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        held = [p for group in self.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(held, self.limit or float("inf"))
        SEEN.setdefault("norms", []).append(float(norm))
        super().step()


class CpuAdam(Clipping):
    def __init__(self, groups: Any, *, adamw_mode: bool, **options: Any) -> None:
        assert adamw_mode
        super().__init__(groups, **options)


class Engine:
    """DeepSpeed's: divides by the number of micro-batches, acts at the last of them."""

    def __init__(self, model: nn.Module, optimizer: Clipping, config: dict[str, Any]) -> None:
        self.model, self.optimizer, self.config, self.count = model, optimizer, config, 0
        self.optimizer.limit = config["gradient_clipping"]

    def __call__(self, **inputs: torch.Tensor) -> Any:
        return self.model(**inputs)

    def backward(self, loss: torch.Tensor) -> None:
        (loss / self.config["gradient_accumulation_steps"]).backward()

    def step(self) -> None:
        self.count += 1
        if self.count % self.config["gradient_accumulation_steps"] == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def destroy(self) -> None:
        SEEN["destroyed"] = True


def initialize(
    *,
    model: nn.Module,
    config: dict[str, Any],
    optimizer: Clipping | None = None,
    model_parameters: Any = None,
) -> tuple[Any, ...]:
    """With what DeepSpeed 0.18.8 was found to refuse."""
    SEEN["config"] = config
    zero = config["zero_optimization"]
    if "zenflow" in zero:
        assert config["zero_allow_untested_optimizer"] and optimizer is None
        optimizer = Clipping(model_parameters, **config["optimizer"]["params"])
    assert optimizer is not None and model_parameters is None or "zenflow" in zero
    if "super_offload" in zero["offload_optimizer"]:
        (group,) = optimizer.param_groups
        assert zero["sub_group_size"] < sum(p.numel() for p in group["params"])
    return Engine(model, optimizer, config), optimizer, None, None


def wrap(model: nn.Module, optimizer: Any, **options: Any) -> tuple[nn.Module, Any]:
    SEEN["wrap"] = options
    new = Clipping([dict(group) for group in optimizer.param_groups])
    new.limit = options["max_grad_norm"]
    return model, new


class OffloadAdam(Clipping):
    def __init__(self, model: nn.Module, lr: float, max_grad_norm: float | None = None, **rest: Any) -> None:
        SEEN["offload_adam"] = rest
        options = {k: v for k, v in rest.items() if k not in ("mode", "decoupled_weight_decay")}
        super().__init__(model.parameters(), lr=lr, **options)
        self.limit, self.ready_for_optimizer_step = max_grad_norm, False

    def step(self, closure: Any = None) -> None:
        assert self.ready_for_optimizer_step
        super().step()


def cpu_offload(groups: Any, kind: type, *, offload_gradients: bool, **options: Any) -> Any:
    assert offload_gradients
    return kind(groups, **options)


class Master:
    """MegaTrain's model in host memory."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model, SEEN["megatrain"] = model, config

    def get_parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def forward_and_backward(self, ids: Any, mask: Any, labels: Any) -> tuple[float, int, dict]:
        loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        return float(loss.detach()), ids.numel(), {}

    def _sync_params_to_gpu(self) -> None:
        SEEN["synced"] = True

    def zero_grad(self) -> None:
        pass

    def cleanup(self) -> None:
        SEEN["destroyed"] = True


class Llmq(types.SimpleNamespace):
    """`pyllmq`: one call a micro-batch; masters, AdamW and clipping inside."""

    def __init__(self) -> None:
        super().__init__(
            Config=self.keep("config"), LLamaOptions=self.keep("options"), LLMQTrainer=LlmqTrainer
        )

    @staticmethod
    def keep(name: str) -> Callable[..., Any]:
        return lambda **values: SEEN.setdefault("llmq", {}).update({name: values})


class LlmqTrainer:
    def __init__(self, **values: Any) -> None:
        SEEN["llmq"]["trainer"] = values
        self.shape, self.count = (values["batch_size"], values["seq_len"]), values["grad_accum"]

    def init_weights(self) -> None:
        self.plain = Plain(CASE.replace(model=QWEN2, lr=1e-2))
        self.losses: list[torch.Tensor] = []

    def step(self, inputs: Any, targets: Any) -> None:
        assert inputs.shape == targets.shape == self.shape
        assert inputs.dtype == targets.dtype == "int32"
        logits = self.plain.model(input_ids=torch.from_numpy(inputs).long()).logits.flatten(0, 1)
        loss = nn.functional.cross_entropy(
            logits, torch.from_numpy(targets).long().flatten(), reduction="sum"
        )
        (loss / (self.count * inputs.size)).backward()
        self.losses.append(loss.detach())

    def update(self, **values: float) -> dict[str, float]:
        SEEN["llmq"].setdefault("steps", []).append(values["step"])
        assert len(self.losses) == self.count
        named = self.plain.model.parameters()
        nn.utils.clip_grad_norm_(named, values["grad_clip"])
        self.plain.optimizer.step()
        self.plain.optimizer.zero_grad()
        mean = sum(self.losses) / (self.count * self.shape[0] * self.shape[1])
        self.losses = []
        return {"loss": float(mean), "norm": 0.0}


class RoundPiped:
    """RoundPipe's model: cuts the batch itself, updates copies of the weights."""

    def __init__(self, model: nn.Module, optim_dtype: Any, model_run_config: Any, pin_model: str) -> None:
        self.model, self.count = model, model_run_config["num_microbatch"]
        self.masters = {n: nn.Parameter(p.detach().to(optim_dtype)) for n, p in model.named_parameters()}

    def optim_named_parameters(self) -> Any:
        return iter(self.masters.items())

    def optim_parameters(self) -> Any:
        return iter(self.masters.values())

    def forward_backward(self, *, input_kwargs: dict[str, torch.Tensor], loss_fn: Any) -> torch.Tensor:
        total = torch.zeros(())
        for ids in input_kwargs["input_ids"].chunk(self.count):
            loss = loss_fn(self.model(input_ids=ids, labels=ids), None)
            loss.backward()
            total += loss.detach()
        return total

    def step(self, update: Callable[[], None], is_async: bool) -> None:
        SEEN["stale"] = is_async
        for name, parameter in self.model.named_parameters():
            self.masters[name].grad, parameter.grad = parameter.grad.float(), None
        update()
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(self.masters[name].data)

    def synchronize(self) -> None:
        SEEN["destroyed"] = True


def round_adam(groups: Any, *, decoupled_weight_decay: bool, **options: Any) -> torch.optim.Optimizer:
    assert decoupled_weight_decay
    return torch.optim.AdamW(groups, **options)


ROUNDPIPE = {
    "wrap_model_to_roundpipe": RoundPiped,
    "RoundPipeRunConfig": dict,
    "optim": types.SimpleNamespace(Adam=round_adam),
}
QWEN2 = shape("tiny", model_type="qwen2")

FIELDS = """model_name dataset_name max_seq_len batch_size gradient_accumulation_steps learning_rate
weight_decay beta1 beta2 eps max_grad_norm attn_implementation checkpoint_interval num_grad_slabs device dtype
enable_timing"""
Config = dataclasses.make_dataclass("CPUMasterConfig", FIELDS.split())


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-ins, installed; the CPU stands for the device."""
    SEEN.clear()
    monkeypatch.setenv("LOCAL_RANK", "0")  # which adapters set for their process; taken back after the test
    contents: dict[str, dict[str, Any]] = {
        "deepspeed": {"initialize": initialize},
        "deepspeed.ops.adam": {"DeepSpeedCPUAdam": CpuAdam},
        "torchao.optim": {"CPUOffloadOptimizer": cpu_offload},
        "trainstream": {"wrap": wrap},
        "offload_adam": {"OffloadAdam": OffloadAdam},
        "infinity": {"CPUMasterModel": Master},
        "infinity.config": {"CPUMasterConfig": Config},
        "roundpipe": ROUNDPIPE,
    }
    modules = {name: types.SimpleNamespace(**members) for name, members in contents.items()}
    modules["pyllmq"] = Llmq()
    for peer in peers.PEERS.values():
        adapter = importlib.import_module(peer.target.partition(":")[0])
        stand_ins = {
            "need_cuda": lambda case: torch.device("cpu"),
            "device_of_rank": lambda case: torch.device("cpu"),
            "open_group": lambda backend: peers.open_group("gloo"),
            "installed": modules.__getitem__,
            "from_checkout": lambda variable, name, subfolder="": modules[name],
        }
        for name, stand_in in stand_ins.items():
            if hasattr(adapter, name):
                monkeypatch.setattr(adapter, name, stand_in)


def curve(system: Any, case: Case, steps: int = 3) -> list[float]:
    return [system.step(tokens_of(case, number, case.rows)) for number in range(steps)]


def build(name: str, case: Case) -> Any:
    module, _, function = peers.PEERS[name].target.partition(":")
    return getattr(importlib.import_module(module), function)(case)


NAMES = ["zero3-offload", "superoffload", "zenflow", "trainstream", "offload-adam", "megatrain", "roundpipe"]


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("clip", [0.5, None])
def test_an_adapter_trains_as_plain_torch_does(name: str, clip: float | None) -> None:
    """In bf16 where the adapter is (2 %), after updates; a control that learns nothing is further away."""
    case = CASE.replace(clip=clip, distinct=1, lr=1e-2)
    if name == "megatrain":  # it is given whole steps
        case = case.replace(rows=4)
    system = build(name, case)
    found, wanted = curve(system, case), curve(Plain(case), case)
    assert found == pytest.approx(wanted, rel=0.02)
    assert abs(found[-1] - found[0]) > 0.04 * found[0]  # a curve that stays where it began would not pass
    assert system.describe()["recomputed"] == 1.0
    system.close()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("packages")
def test_settings_reach_the_peers() -> None:
    build("superoffload", CASE)
    zero = SEEN["config"]["zero_optimization"]
    assert SEEN["config"]["gradient_clipping"] == 0.5 and zero["offload_optimizer"]["super_offload"]
    build("zenflow", CASE.replace(clip=None))
    assert SEEN["config"]["gradient_clipping"] == 0.0
    assert SEEN["config"]["zero_optimization"]["zenflow"]["update_interval"] == 4
    build("trainstream", CASE)
    assert SEEN["wrap"]["max_grad_norm"] == 0.5 and SEEN["wrap"]["accumulation_steps"] == 2
    build("offload-adam", CASE)
    assert SEEN["offload_adam"]["mode"] == "fp32_master" and SEEN["offload_adam"]["decoupled_weight_decay"]
    build("megatrain", CASE)
    assert SEEN["megatrain"].max_grad_norm == 0.5 and SEEN["megatrain"].checkpoint_interval == 4
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("packages")
def test_torchao_is_absent_where_it_cannot_do_what_is_asked() -> None:
    whole = CASE.replace(rows=4, distinct=1, lr=1e-2, clip=None)
    assert curve(build("torchao-offload", whole), whole) == pytest.approx(
        curve(Plain(whole), whole), rel=0.02
    )
    with pytest.raises(AbsentError, match="cannot clip"):
        build("torchao-offload", whole.replace(clip=1.0))
    with pytest.raises(AbsentError, match="one micro-batch"):
        build("torchao-offload", whole.replace(rows=2))


@pytest.mark.usefixtures("packages")
def test_fsdp2_itself_on_the_cpu() -> None:
    """Real FSDP2 with its offload policy, without pinning, which needs CUDA."""
    system = build("fsdp2-offload", CASE)
    try:
        assert curve(system, CASE) == pytest.approx(curve(Plain(CASE), CASE), rel=1e-6)
    finally:
        system.close()


@pytest.mark.usefixtures("packages")
@pytest.mark.parametrize("clip", [0.5, None])
def test_llmq_trains_as_plain_torch_does(clip: float | None) -> None:
    case = CASE.replace(model=QWEN2, clip=clip, distinct=1, lr=1e-2)
    system = build("llmq", case)
    assert curve(system, case) == pytest.approx(curve(Plain(case), case), rel=0.02)
    seen = SEEN["llmq"]
    assert seen["steps"] == [0, 1, 2] and seen["trainer"]["grad_accum"] == 2
    assert seen["config"]["architecture"] == "qwen2" and seen["config"]["hidden_size"] == 64
    assert seen["options"]["master_dtype"] == seen["options"]["momentum_type"] == "fp32"
    assert seen["options"]["recompute_block"] and seen["options"]["offload_master"]
    build("llmq", case.replace(extra={"states": "bf16", "recompute": "ffn"}))
    assert seen["options"]["variance_type"] == "bf16" and seen["options"]["recompute_ffn"]
    with pytest.raises(AbsentError, match="qwen2 models only, and this is llama"):
        build("llmq", CASE)
    with pytest.raises(AbsentError, match="equal size"):
        build("llmq", case.replace(rows=3))


@pytest.mark.usefixtures("packages")
def test_roundpipe_is_synchronous_unless_asked() -> None:
    for stale in (False, True):
        curve(build("roundpipe", CASE.replace(extra={"stale": stale})), CASE, steps=1)
        assert SEEN["stale"] is stale


# ---- without any package --------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name, peer in peers.PEERS.items() if peer.gpu])
def test_a_missing_device_is_a_row_with_the_reason(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(AbsentError, match="needs a CUDA device"):
        build(name, CASE.replace(device="cuda"))


PACKAGES = {
    "zero3-offload": "deepspeed is not installed",
    "superoffload": "deepspeed is not installed",
    "zenflow": "deepspeed is not installed",
    "torchao-offload": "torchao is not installed",
    "trainstream": "trainstream is not installed",
    "offload-adam": "not on PyPI, and OFFLOAD_ADAM names no checkout",
    "megatrain": "not on PyPI, and MEGATRAIN names no checkout",
    "llmq": "pyllmq is not installed",
    "roundpipe": "roundpipe is not installed",
}


@pytest.mark.parametrize("name", PACKAGES)
def test_a_missing_package_is_a_row_with_the_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("OFFLOAD_ADAM", "MEGATRAIN"):
        monkeypatch.delenv(variable, raising=False)
    for package in ("deepspeed", "deepspeed.ops.adam", "torchao.optim", "trainstream", "pyllmq", "roundpipe"):
        monkeypatch.setitem(sys.modules, package, None)
    adapter = importlib.import_module(peers.PEERS[name].target.partition(":")[0])
    for name_of_place in ("need_cuda", "device_of_rank"):
        monkeypatch.setattr(adapter, name_of_place, lambda case: torch.device("cpu"), raising=False)
    with pytest.raises(AbsentError, match=PACKAGES[name]):
        build(name, CASE.replace(model=QWEN2, rows=4, clip=None))


def test_what_adapters_use_is_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every peer has a row; those with an installed package are checked, and a wrong name is found."""
    assert check.main() == 0
    out = capsys.readouterr().out
    listed = {name for line in out.splitlines() for name in line[8:].partition(":")[0].split(", ")}
    assert listed == peers.PEERS.keys() - {"torch"}
    assert "checked hf-trainer: transformers" in out and "checked fsdp2-offload: torch" in out
    wrong = hf_trainer.arguments_of(CASE) | {"no_such_argument": 1}
    monkeypatch.setattr(hf_trainer, "arguments_of", lambda case: wrong)
    assert check.row_of("benchmarks.peers.hf_trainer") == (
        "wrong",
        "TypeError: TrainingArguments takes no no_such_argument",
    )


def test_a_package_is_read_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "needs_a_gpu"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('no GPU')")
    (package / "api.py").write_text("class A:\n    def f(self, one, *, two): ...\ndef g(three): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    peers.check_source_takes("needs_a_gpu", "api.py", "A.f", "one", "two")
    peers.check_source_takes("needs_a_gpu", "api.py", "g", "three")
    with pytest.raises(TypeError, match="A.f takes no four, three"):
        peers.check_source_takes("needs_a_gpu", "api.py", "A.f", "three", "four")
    with pytest.raises(AbsentError, match="not_there is not installed"):
        peers.check_source_takes("not_there", "api.py", "g")
