"""Mixtures of experts: which parameters `experts` stands for, and which implementation computes them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import moe

import horizon_lm as hz
import zoo
from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.errors import ConfigError, UnsupportedModelError
from horizon_lm.model import experts
from horizon_lm.model.experts import experts_in_use, experts_of, implementation_of

CPU = torch.device("cpu")
ALONE = ("dbrx", "doge-moe", "jetmoe", "llama4_text", "longcat_flash")  # families without the interface
# What is an expert's besides names with `.experts.` or of shared experts, and what only looks like it.
BY_CLASS = {"jetmoe": r"\.mlp\.(in|out)put_linear", "doge-moe": r"\.(up|down)_embed"}
ROUTERS = re.compile(r"router|[._]gate\.|expert_bias|wg\.|classifier")
ONLY_PLACES = re.compile(r"\.(experts|shared_experts?|shared_mlp)\.")


def of_meta(name: str) -> Any:
    case = {**zoo.CASES, **zoo.SHARED_STATE}[name]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(case.config(), attn_implementation=case.attn)


def host(name: str, **settings: Any) -> hz.HostModel:
    given = {"device": "cpu", "dtype": "float32", "skip_memory_check": True, **settings}
    return hz.HostModel.from_pretrained(zoo.build(name), **given)


def names_of_mixtures() -> list[str]:
    cases = {**zoo.CASES, **zoo.SHARED_STATE}
    return sorted({name for name, case in cases.items() if "moe" in case.tags and not zoo.missing(name)})


def test_experts_of_every_family_without_its_routers() -> None:
    """In all mixtures of the zoo; dense models have none."""
    for name in names_of_mixtures():
        model = of_meta(name)
        found, family = set(experts_of(model)), name.removesuffix("-aux")
        assert found, name
        for key, _ in model.named_parameters():
            is_router = bool(ROUTERS.search(key))
            places = BY_CLASS.get(family)
            is_expert = bool(ONLY_PLACES.search(key) or (places and re.search(places, key)))
            assert (key in found) == (is_expert and not is_router), f"{name}: {key}"
        for key in found:  # one matrix for each expert, or an expert that all tokens visit
            assert key in dict(model.named_parameters()), key
    for name in ("llama", "gpt2", "gemma3n_text", "bloom"):
        if name in zoo.CASES or name in zoo.SHARED_STATE:
            assert not experts_of(of_meta(name)), name
            assert implementation_of(of_meta(name)) is None


def test_experts_in_a_list_of_modules() -> None:
    """As in models with code of their own; layers without experts keep theirs."""

    class Block(torch.nn.Module):
        def __init__(self, experts: int) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(4, experts)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(experts))
            self.shared_expert, self.shared_expert_gate = torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)

    found = experts_of(torch.nn.Sequential(Block(2), torch.nn.Linear(4, 4)))
    wanted = {f"0.{place}.{kind}" for place in ("experts.0", "experts.1") for kind in ("weight", "bias")}
    assert found.keys() == wanted | {"0.shared_expert.weight", "0.shared_expert.bias"}


@pytest.mark.parametrize(
    "name", ["mixtral-aux", "qwen2_moe-sliding-aux", "jetmoe-aux", "dbrx", "deepseek_v3"]
)
def test_frozen_experts_leave_all_other_gradients_as_they_are(name: str) -> None:
    """Bitwise those of autograd with the experts frozen, routers and their losses included."""
    model, batch = zoo.build(name), zoo.batch(name)
    streamed = host(name, freeze=["experts"], max_grad_norm=None, update="sync")
    for parameter in experts_of(model).values():
        parameter.requires_grad_(False)
    found = model(**batch, use_cache=False)
    found.loss.backward()
    out = streamed.forward_backward([batch])
    assert out.loss == found.loss.item()
    gradients = dict(streamed.named_gradients())
    wanted = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert gradients.keys() == wanted.keys()
    for key, parameter in wanted.items():
        other = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.equal(gradients[key], other), key
    routers = [key for key in wanted if ROUTERS.search(key)]
    assert any(gradients[key].any() for key in routers)
    aux = getattr(found, "aux_loss", None)
    if aux is not None:
        evaluated = streamed.evaluate([batch], return_router_losses=True)
        config = model.config
        weight = getattr(config, "router_aux_loss_coef", None) or config.aux_loss_coef
        assert evaluated.router_losses[0] == pytest.approx(weight * aux.item(), rel=1e-6)


def test_experts_are_no_word_for_a_dense_model() -> None:
    with pytest.raises(ConfigError, match="'experts' is found in the name of no parameter"):
        host("llama", freeze=["experts"])
    trained = host("mixtral", train=["experts", "lm_head"])
    names = {p.name for unit in trained.store.units for p in unit.trainable}
    assert names == {n for n, _ in zoo.build("mixtral").named_parameters() if re.search("experts|lm_head", n)}


@pytest.mark.parametrize("name", ["phimoe", "llama4_text", "deepseek_v4"])
def test_routers_and_grouped_products_are_not_taken_for_linear_layers(name: str) -> None:
    """PEFT's all-linear wraps every subclass of nn.Linear, and its forward then fails."""
    with pytest.raises(UnsupportedModelError, match="which is not linear"):
        host(name, adapter="lora")
    host(name, adapter="lora", target_modules=["down_proj"] if name != "phimoe" else ["q_proj"])
    assert host("falcon", adapter="lora", lora_r=2).num_parameters  # its own subclass is linear


# ---- implementations -------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls of transformers' implementations; those of a class's own loop are not counted."""
    counted: Counter[str] = Counter()

    def watched(name: str) -> Any:
        function = moe.ALL_EXPERTS_FUNCTIONS[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return function(*args, **kwargs)

        return call

    for name in ("grouped_mm", "batched_mm"):
        monkeypatch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, name, watched(name))
    return counted


@pytest.mark.parametrize("asked", ["auto", "grouped_mm", "eager", "batched_mm"])
def test_what_is_said_to_run_runs(asked: str, calls: Counter[str]) -> None:
    streamed = host("qwen3_moe", experts_implementation=asked)
    said = experts_in_use(streamed.skeleton.model, streamed.settings, CPU)
    assert said is not None and said.implementation == ("grouped_mm" if asked == "auto" else asked)
    loss = streamed.forward_backward([zoo.batch("qwen3_moe")]).loss
    assert set(calls) == {said.implementation} - {"eager"}
    if asked == "auto":
        assert loss == host("qwen3_moe").forward_backward([zoo.batch("qwen3_moe")]).loss
    plain = zoo.build("qwen3_moe")
    plain.set_experts_implementation("grouped_mm" if asked == "auto" else asked)
    assert loss == plain(**zoo.batch("qwen3_moe"), use_cache=False).loss.item()  # bitwise transformers'


@pytest.mark.parametrize("name", ALONE)
def test_a_silent_fallback_is_told(name: str, calls: Counter[str]) -> None:
    """Classes without transformers' interface run as eager, whatever is the default."""
    streamed = host(name)
    said = experts_in_use(streamed.skeleton.model, streamed.settings, CPU)
    assert said is not None and said.implementation == "eager" and "in no other way" in said.remark
    streamed.forward_backward([zoo.batch(name)])
    assert not calls
    assert experts_in_use(host(name, experts_implementation="eager").skeleton.model, ModelSettings(), CPU)
    for asked in ("grouped_mm", "batched_mm"):
        with pytest.raises(UnsupportedModelError, match="only as eager") as caught:
            host(name, experts_implementation=asked)
        assert caught.value.hint == "set experts_implementation=auto"


def test_a_class_whose_file_lacks_the_decorator_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers reads the class's source file, and takes eager if it finds nothing."""
    kind = type(zoo.build("mixtral"))
    monkeypatch.setattr(kind, "_can_set_experts_implementation", classmethod(lambda cls: False))
    model = zoo.build("mixtral")
    said = experts_in_use(model, ModelSettings(), CPU)
    assert said is not None and str(said) == "eager (transformers offers MixtralForCausalLM nothing else)"


def test_a_dense_model_has_no_experts_to_choose() -> None:
    for asked in ("grouped_mm", "eager"):
        with pytest.raises(UnsupportedModelError, match="llama: it has no experts"):
            host("llama", experts_implementation=asked)
    assert experts_in_use(zoo.build("llama"), ModelSettings(), CPU) is None


def test_how_grouped_products_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """By device, dtype and compilation; capabilities of GPUs are made up."""
    cuda, half, full = torch.device("cuda"), torch.bfloat16, torch.float32
    assert experts.grouped_kernel(CPU, half).startswith("one product per expert: torch has one kernel")
    assert "only in bfloat16" in experts.grouped_kernel(CPU, full, compiled=True)
    monkeypatch.setattr(moe, "_can_use_grouped_mm", lambda *args: False)
    assert "has no grouped product of float32 on this cpu" in experts.grouped_kernel(CPU, full)
    monkeypatch.setattr(experts, "_has_grouped_product", lambda *args: True)
    for major, has in ((8, False), (9, True), (10, True), (12, False)):
        monkeypatch.setattr(experts, "_major", lambda device, major=major: major)
        assert (experts.grouped_kernel(cuda, half) == "one kernel for all experts") == has
        assert experts.grouped_kernel(cuda, full) != "one kernel for all experts"


def test_the_setting_suits_deterministic_runs_and_is_asked_for_on_resume() -> None:
    for asked in ("auto", "grouped_mm", "eager", "batched_mm"):
        values = {"model_name_or_path": "m", "datasets": "d", "experts_implementation": asked}
        assert TrainConfig.from_dict({**values, "deterministic": True}).experts_implementation == asked
    extra: Any = TrainConfig.model_fields["experts_implementation"].json_schema_extra
    assert extra["resume"] == "ask"
    with pytest.raises(ConfigError, match="experts_implementation"):
        ModelSettings.from_dict({"experts_implementation": "sonicmoe"})


@pytest.mark.usefixtures("no_samples")
def test_the_run_says_which_one_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In its output and in the first line of metrics.jsonl; a dense model's has no such line."""
    import json

    from horizon_lm.training.train import train
    from small_runs import LLAMA, settings, write_text

    mixtral = LLAMA | {"model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}
    for values, words in ((mixtral, "eager (a loop over experts)"), (LLAMA, None)):
        folder = tmp_path / values["model_type"]
        given = settings(write_text(tmp_path / "t.txt"), folder, max_steps=1, init_model=values)
        asked = {"experts_implementation": "eager"} if words else {}
        result = train(given.replace(progress="plain", **asked))
        header = json.loads(result.metrics_path.read_text().splitlines()[0])
        said = capsys.readouterr()
        assert header.get("experts") == words
        assert ("experts: eager (a loop over experts)" in said.out + said.err) == bool(words)
