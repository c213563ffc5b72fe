"""GRPO and RLOO with adapters: TRL's own parameters and logs, generation, and the weights sent to vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer, RLOOTrainer

import horizon_lm as hz
import zoo
from horizon_lm.errors import ConfigError
from horizon_lm.trainers import HorizonGRPOTrainer, resident
from horizon_lm.trainers.generation import describe_weights, named_weights
from rollout_runs import OURS, TINY, differences, trained

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = {"num_iterations": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
LORA: dict[str, Any] = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a llama and of a qwen3 with tied embeddings, and of an adapter of the llama."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=False)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**TINY, tie_word_embeddings=True)),
    }
    for name, model in models.items():
        model.save_pretrained(place / name)
    source = AutoModelForCausalLM.from_pretrained(place / "llama")
    get_peft_model(source, LoraConfig(**LORA, init_lora_weights=False)).save_pretrained(place / "adapter")
    return {name: place / name for name in ("llama", "qwen3", "adapter")}


def adapted(folders: dict[str, Path]) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folders["llama"])
    return PeftModel.from_pretrained(model, folders["adapter"], is_trainable=True)


def lora_of(run: Any) -> list[torch.Tensor]:
    return [value for name, value in run.parameters.items() if ".lora_B." in name]


@pytest.mark.parametrize(
    ("kind", "model", "beta", "config"),
    [
        (GRPOTrainer, "llama", 0.5, {}),
        (RLOOTrainer, "qwen3", 0.05, {"use_dora": True}),
    ],
    ids=["grpo", "rloo"],
)
def test_a_new_adapter(
    kind: Any, model: str, beta: float, config: dict[str, Any], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Its base is the reference, which takes no second model."""

    def run(trainer: Any, beta: float) -> Any:
        given = {"trainer": {"peft_config": LoraConfig(**LORA, **config)}}
        return trained(trainer, folders[model], tmp_path, beta=beta, **STEPS, **given)

    theirs, ours = run(kind, beta), run(OURS[kind], beta)
    assert differences(theirs, ours) == []
    assert max(float(value.abs().max()) for value in lora_of(theirs)) > 2e-3
    assert ours.trainer.ref_model.host is ours.trainer.host and any(line.get("kl") for line in ours.log)
    assert differences(theirs, run(OURS[kind], 2 * beta))  # the control


def test_an_adapter_that_was_trained(folders: dict[str, Path], tmp_path: Path) -> None:
    """TRL's reference is a copy of it; ours is its folder."""

    def run(kind: Any, **more: Any) -> Any:
        given = {"trainer": {"model": adapted(folders), **more}}
        return trained(kind, folders["llama"], tmp_path, beta=0.5, **STEPS, **given)

    theirs, ours = run(GRPOTrainer), run(HorizonGRPOTrainer, ref_model=str(folders["adapter"]))
    for name in [name for name in theirs.parameters if ".ref." in name]:
        del theirs.parameters[name]
    assert differences(theirs, ours) == []
    with pytest.raises(ConfigError, match=r"beta=0.5 needs a reference model") as caught:
        run(HorizonGRPOTrainer)
    assert "ref_model=FOLDER" in str(caught.value.hint)
    other = run(HorizonGRPOTrainer, ref_model=str(folders["llama"]))
    assert differences(theirs, other)  # the control: its base


def test_the_resident_model_has_the_adapter(folders: dict[str, Path]) -> None:
    """It generates as PEFT's does, and not as the base does."""
    plain = adapted(folders).eval()
    ids = torch.tensor([[3, 4, 5], [6, 7, 8]])
    wanted = plain.generate(ids, max_new_tokens=6, do_sample=False)
    with hz.HostModel.from_pretrained(adapted(folders), device="cpu", dtype="float32") as host:
        for _ in range(2):
            with resident(host) as model:
                assert model.generate(ids, max_new_tokens=6, do_sample=False).equal(wanted)
    with plain.disable_adapter():
        assert not plain.generate(ids, max_new_tokens=6, do_sample=False).equal(wanted)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": "all-linear"}),
    "dora": ("llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "biases": ("qwen2", {"target_modules": ["q_proj"]}),
    "a module": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "experts": ("mixtral", {"target_modules": "all-linear"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("case", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_vllm_is_sent_is_the_merged_model(case: str, dtype: str) -> None:
    """Under the base's names, as PEFT merges it; the model trains on as before."""
    kind, config = KINDS[case]

    def make() -> Any:
        torch.manual_seed(1)
        model = get_peft_model(zoo.build(kind), LoraConfig(r=2, init_lora_weights=False, **config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name:
                    parameter.add_(0.1)
        return model

    merged = dict(make().merge_and_unload().named_parameters())
    bare = dict(zoo.build(kind).named_parameters())
    with hz.HostModel.from_pretrained(make(), device="cpu", dtype=dtype) as host:
        before = dict(host.named_parameters())
        sent = {name: value.clone() for name, value in named_weights(host)}
        described = describe_weights(host)
        after = dict(host.named_parameters())
    assert [name for name, _, _ in described] == list(sent) and sent.keys() == bare.keys()
    for name, kind_of, shape in described:
        assert list(sent[name].shape) == shape and str(sent[name].dtype) == f"torch.{kind_of}"
    bits = 2**-23 if dtype == "float32" else 2**-8
    for name, value in merged.items():
        assert float((sent[name].float() - value).abs().max()) <= 4 * bits * float(value.abs().max()), name
    assert any(not sent[name].equal(bare[name]) for name in sent)
    assert all(after[name].equal(value) for name, value in before.items())
