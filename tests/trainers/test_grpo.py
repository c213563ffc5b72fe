"""GRPO and RLOO on the streamed engine: TRL's own parameters and logs, refusals, a task learned."""

from __future__ import annotations

import difflib
import json
import runpy
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from benchmarks import grpo_toy
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer, RLOOTrainer
from trl.generation import vllm_generation

import horizon_lm as hz
from horizon_lm.errors import ConfigError
from horizon_lm.trainers import HorizonGRPOTrainer, HorizonRLOOTrainer
from rollout_runs import OURS, PROMPTS, TINY, differences, moved, trained, variety, vowels
from sizes import SOAK, times

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo_trl.py"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a llama and of a qwen3 with tied embeddings."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    models = {
        "llama": LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=False)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**TINY, tie_word_embeddings=True)),
    }
    for name, model in models.items():
        model.save_pretrained(place / name)
    return {name: place / name for name in models}


@pytest.mark.parametrize(
    ("kind", "model", "accumulation"),
    [
        (GRPOTrainer, "llama", 4),
        (GRPOTrainer, "qwen3", 1),
        *([(GRPOTrainer, "llama", 1), (GRPOTrainer, "qwen3", 4)] if SOAK else []),
        (RLOOTrainer, "llama", 4),
        (RLOOTrainer, "qwen3", 1),
    ],
)
def test_ten_steps_as_trl(
    kind: Any, model: str, accumulation: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    changes = {"max_steps": 10, "num_iterations": 2, "gradient_accumulation_steps": accumulation}
    theirs = trained(kind, folders[model], tmp_path, **changes)
    ours = trained(OURS[kind], folders[model], tmp_path, **changes)
    assert differences(theirs, ours) == []
    assert moved(theirs, folders[model]) > 1e-3
    assert any(line.get("clip_ratio/region_mean") for line in theirs.log)  # some ratios were clipped
    if (model, accumulation) == ("qwen3", 1):  # the control
        other = trained(OURS[kind], folders[model], tmp_path, **changes | {"epsilon": 0.022})
        assert differences(theirs, other)


GRPO_OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"loss_type": name} for name in ("grpo", "bnpo", "dr_grpo", "dapo", "sapo", "vespo")},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "clipped on both sides": {"delta": 1.05, "epsilon_high": 0.03},
    "scaled by batch": {"scale_rewards": "batch", "temperature": 0.7},
    "not scaled": {"scale_rewards": "none", "shuffle_dataset": False, "top_k": 5},
    "truncated ones masked": {"mask_truncated_completions": True},
    "all truncated": {"mask_truncated_completions": True, "max_completion_length": 1, "max_steps": 2},
    "surprising tokens": {"top_entropy_quantile": 0.5},
    "off policy": {"off_policy_mask_threshold": 0.001},
    "two rewards": {"rewards": [variety, vowels], "reward_weights": [0.3, 0.7]},
    "normalized rewards": {"rewards": [variety, vowels], "multi_objective_aggregation": "normalize_then_sum"},
    "longer rollouts": {"steps_per_generation": 4, "per_device_train_batch_size": 2},
    "evaluated": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "trainer": {"eval_dataset": PROMPTS.select([0, 1])},
    },
    "completions logged": {"log_completions": True, "num_completions_to_print": 1},
}


@pytest.mark.parametrize("option", GRPO_OPTIONS)
def test_options_of_grpo(option: str, folders: dict[str, Path], tmp_path: Path) -> None:
    changes = {"num_iterations": 2, "gradient_accumulation_steps": 2, **GRPO_OPTIONS[option]}
    theirs = trained(GRPOTrainer, folders["llama"], tmp_path, **changes)
    ours = trained(HorizonGRPOTrainer, folders["llama"], tmp_path, **changes)
    assert differences(theirs, ours) == []


@pytest.mark.parametrize("kind", OURS)
def test_a_reference_by_its_folder(kind: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    changes = {"beta": 0.5, "num_iterations": 2, "gradient_accumulation_steps": 2}
    if kind is RLOOTrainer:
        changes |= {"normalize_advantages": True, "reward_clip_range": (0.0, 0.9)}
    reference = {"trainer": {"ref_model": str(folders["llama"])}}
    theirs = trained(kind, folders["llama"], tmp_path, **changes)
    ours = trained(OURS[kind], folders["llama"], tmp_path, **changes, **reference)
    assert differences(theirs, ours) == []
    assert ours.trainer.args.beta == 0.5 and any(line.get("kl") for line in ours.log)
    parts = ours.trainer.ref_model.host.memory_bytes()
    assert parts["weights"] and not any(parts[name] for name in ("exp_avg", "exp_avg_sq", "grads"))
    other = trained(OURS[kind], folders["llama"], tmp_path, **{**changes, "beta": 0.55}, **reference)
    assert differences(theirs, other)  # the control


def test_a_step_is_one_call_of_the_engine(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    for name in ("forward_backward", "evaluate"):
        inner = getattr(hz.HostModel, name)

        def counted(
            self: Any, batches: Any, *args: Any, name: str = name, inner: Any = inner, **more: Any
        ) -> Any:
            calls.append((name, len(batches)))
            return inner(self, batches, *args, **more)

        monkeypatch.setattr(hz.HostModel, name, counted)
    changes = {"num_iterations": 2, "gradient_accumulation_steps": 4, "max_steps": 2}
    run = trained(HorizonGRPOTrainer, folders["llama"], tmp_path, **changes)
    # Log-probabilities of the policy that generated, then one rollout serves two steps.
    assert calls == [("evaluate", 4), ("forward_backward", 4), ("forward_backward", 4)]
    assert run.trainer._step == 8


def test_resumes_in_the_middle_of_a_rollout(folders: dict[str, Path], tmp_path: Path) -> None:
    changes = {
        "num_iterations": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = trained(HorizonGRPOTrainer, folders["llama"], tmp_path, **changes)
    for step in (1, 3):  # two steps share a rollout
        resumed = trained(
            HorizonGRPOTrainer,
            folders["llama"],
            tmp_path,
            resume=str(tmp_path / f"checkpoint-{step}"),
            **changes,
        )
        assert all(torch.equal(value, resumed.parameters[n]) for n, value in whole.parameters.items())


def test_continuous_batching(folders: dict[str, Path], tmp_path: Path) -> None:
    options = {"use_transformers_continuous_batching": True, "max_steps": 2}
    options |= {
        "transformers_continuous_batching_config": {"max_memory_percent": 0.02, "max_batch_tokens": 256}
    }
    run = trained(HorizonGRPOTrainer, folders["qwen3"], tmp_path, **options)
    assert [line["completions/mean_length"] > 0 for line in run.log if "reward" in line] == [True, True]
    assert all(parameter.is_meta for parameter in run.trainer.host.skeleton.model.parameters())


REFUSED: dict[str, tuple[type, dict[str, Any], str, str]] = {
    "beta": (HorizonGRPOTrainer, {"beta": 0.1}, "beta=0.1 needs a reference", "ref_model=FOLDER"),
    "RLOO's default": (HorizonRLOOTrainer, {"beta": 0.05}, "beta=0.05 needs a reference", "beta=0.0"),
    "ref_model": (HorizonGRPOTrainer, {"trainer": {"ref_model": "x"}}, "beta=0.0 uses none", "leave it out"),
    "bonus": (HorizonGRPOTrainer, {"entropy_coef": 0.01}, "entropy_coef=0.01 is not", "entropy_coef=0.0"),
    "adaptive": (
        HorizonGRPOTrainer,
        {"use_adaptive_entropy": True},
        "use_adaptive_entropy=True is not supported",
        "leave it out",
    ),
    "head": (HorizonGRPOTrainer, {"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32=True is", "float32"),
    "sync": (HorizonRLOOTrainer, {"sync_ref_model": True}, "sync_ref_model=True is not", "leave it out"),
    "liger": (HorizonGRPOTrainer, {"use_liger_kernel": True}, "use_liger_kernel=True is not", "liger"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_loaded(
    case: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("horizon_lm.trainers.base.host_of", lambda *_: pytest.fail("a model was loaded"))
    kind, changes, message, hint = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as caught:
        trained(kind, folders["llama"], tmp_path, **changes)
    assert hint in str(caught.value.hint)


class FakeEngine:
    """A vLLM server's client, or a colocated engine: notes the weights of each synchronisation."""

    def __init__(self, **_: Any) -> None:
        self.synced: list[dict[str, torch.Tensor]] = []
        self.most_alive = 0
        self.llm_engine = self.model_executor = self.driver_worker = self.model_runner = self.model = self

    def init_communicator(self, **_: Any) -> None: ...
    def reset_prefix_cache(self) -> None:
        self.synced.append({})

    def get_server_info(self) -> Any:
        return {"model_config": {"logprobs_mode": "processed_logprobs"}}

    def update_named_params(self, metadata: list[tuple], named: Any) -> None:
        told, alive = iter(metadata), []
        while (item := next(named, None)) is not None:
            name, weight = item
            del item
            assert next(told) == (name, str(weight.dtype).removeprefix("torch."), list(weight.shape))
            alive.append(weakref.ref(weight))
            self.most_alive = max(self.most_alive, sum(ref() is not None for ref in alive))
            self.load_weights([(name, weight)])
            del weight
        assert next(told, None) is None

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        if not self.synced:
            self.synced.append({})
        self.synced[-1] |= {name: weight.clone() for name, weight in named}

    def generate(self, prompts: list[Any], sampling_params: Any = None, n: int = 1, **_: Any) -> Any:
        ids = [prompt["prompt_token_ids"] if isinstance(prompt, dict) else prompt for prompt in prompts]
        drawn = [[3 + (len(ids[0]) + 5 * i) % 16, 4, 1] for i in range(n * len(ids))]
        if sampling_params is None:
            log_probs = [[[-2.0 - 0.1 * t] for t in range(3)] for _ in drawn]
            return {"prompt_ids": ids, "completion_ids": drawn, "logprobs": log_probs}
        scored = [{token: SimpleNamespace(logprob=-2.5, rank=1)} for token in drawn[0]]
        outputs = [SimpleNamespace(token_ids=tokens, logprobs=scored) for tokens in drawn]
        return [SimpleNamespace(prompt_token_ids=p, outputs=[o]) for p, o in zip(ids, outputs, strict=True)]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    made: list[FakeEngine] = []

    def make(**values: Any) -> FakeEngine:
        made.append(FakeEngine(**values))
        return made[-1]

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):  # TRL sets them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    for name, value in {"VLLMClient": make, "LLM": make, "SamplingParams": SimpleNamespace}.items():
        monkeypatch.setattr(vllm_generation, name, value, raising=False)
    return made


@pytest.mark.parametrize("mode", ["server", "colocate"])
@pytest.mark.parametrize("kind", OURS)
def test_vllm_is_fed_from_the_store(
    mode: str, kind: Any, engines: list[FakeEngine], folders: dict[str, Path], tmp_path: Path
) -> None:
    changes = {"use_vllm": True, "vllm_mode": mode, "max_steps": 2, "learning_rate": 1e-4}
    ours = trained(OURS[kind], folders["qwen3"], tmp_path, vowels, **changes)
    theirs = trained(kind, folders["qwen3"], tmp_path, vowels, **changes)
    assert differences(theirs, ours) == []
    mine, plain = engines
    if mode == "server":
        assert mine.most_alive == 1
    assert len(mine.synced) == len(plain.synced) == 3  # after the last sync: none yet
    for fed, wanted in zip(mine.synced, plain.synced, strict=True):
        assert fed.keys() == wanted.keys()
        for name, weight in fed.items():
            assert weight.dtype == wanted[name].dtype
            torch.testing.assert_close(weight, wanted[name], rtol=0, atol=3e-6)
    assert not torch.equal(mine.synced[0]["model.norm.weight"], mine.synced[1]["model.norm.weight"])


def test_vllm_is_fed_an_adapter_in_its_base(
    engines: list[FakeEngine], folders: dict[str, Path], tmp_path: Path
) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    changes = {"use_vllm": True, "vllm_mode": "server", "max_steps": 2, "trainer": {"peft_config": config}}
    for kind in (HorizonGRPOTrainer, GRPOTrainer):
        trained(kind, folders["llama"], tmp_path, vowels, **changes)
    mine, plain = engines
    assert mine.most_alive == 1
    for fed, wanted in zip(mine.synced, plain.synced, strict=True):
        assert fed.keys() == wanted.keys()
        for name, weight in fed.items():
            torch.testing.assert_close(weight, wanted[name], rtol=0, atol=3e-6)
    changed = {name for name, weight in mine.synced[0].items() if not weight.equal(mine.synced[1][name])}
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "down_proj"}


def test_the_example_differs_from_trl_by_two_lines(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = EXAMPLE.read_text("utf-8")
    plain = text.replace("from horizon_lm.trainers import HorizonGRPOTrainer", "from trl import GRPOTrainer")
    plain = plain.replace("trainer = HorizonGRPOTrainer(", "trainer = GRPOTrainer(")
    changed = [line for line in difflib.ndiff(plain.splitlines(), text.splitlines()) if line[0] == "+"]
    assert len(changed) == 2 and "Horizon" not in plain.partition('"""\n\n')[2]

    grpo_toy.tokenizer().save_pretrained(folders["qwen3"])
    rows = [json.dumps({"prompt": row["prompt"], "answer": row["prompt"][0]}) for row in PROMPTS]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(rows))
    values = {"model_name_or_path": folders["qwen3"], "dataset_name": tmp_path / "data"}
    values |= {"output_dir": tmp_path / "out", "max_steps": 2, "num_generations": 8, "report_to": "none"}
    values |= {"per_device_train_batch_size": 64, "max_completion_length": 2, "use_cpu": "true"}
    values |= {"bf16": "false", "disable_tqdm": "true", "save_strategy": "no", "learning_rate": 1e-3}
    arguments = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    tuned = dict(Qwen3ForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    before = Qwen3ForCausalLM.from_pretrained(folders["qwen3"]).named_parameters()
    assert any(not torch.equal(tuned[name], value) for name, value in before)


def test_learns_to_copy() -> None:
    curve = grpo_toy.learn(times(2, 200))
    assert curve.rewards[0] < 0.2
    if SOAK:
        assert sum(curve.rewards[-10:]) / 10 > 0.8
