"""Rollouts that are more than a prompt and its completion: tools, environments, functions, experts, errors.

All with the parameters and logs of TRL's own trainers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from trl import GRPOTrainer, RLOOTrainer
from trl.chat_template_utils import qwen3_chat_template

from horizon_lm.trainers import HorizonDPOTrainer, HorizonGRPOTrainer
from rollout_runs import OURS, TINY, built, differences, moved, result, trained, variety
from trainer_pairs import arguments, rows
from trainer_runs import tokenizer as pair_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a llama, of one with room for a tool's description, and of a mixture of experts."""
    place = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1}
    roomy = TINY | {"vocab_size": 259, "max_position_embeddings": 1024}
    made: dict[str, Any] = {
        "llama": LlamaForCausalLM(LlamaConfig(**TINY)),
        "roomy": LlamaForCausalLM(LlamaConfig(**roomy)),
        "mixtral": MixtralForCausalLM(MixtralConfig(**TINY, **experts)),
    }
    for name, model in made.items():
        model.save_pretrained(place / name)
    return {name: place / name for name in made}


# Tools.


def bytewise() -> PreTrainedTokenizerFast:
    """A token for each byte, and the template of Qwen3."""
    special = ["<pad>", "<|im_end|>", "<|im_start|>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token=special[0],
        eos_token=special[1],
        additional_special_tokens=special[2:],
        padding_side="left",
        chat_template=qwen3_chat_template,
    )


def tenfold(number: int) -> int:
    """Return ten times a number.

    Args:
        number: The number.
    """
    if number == 2:
        raise ValueError("no twos")
    return 10 * number


def eightfold(number: int) -> int:
    """Return ten times a number.

    Args:
        number: The number.
    """
    return 8 * number


eightfold.__name__ = "tenfold"


class Counter:
    """An environment that scores a rollout by what was added."""

    def reset(self, **_: Any) -> str:
        self.sum = 0
        return "!"

    def tenfold(self, number: int) -> int:
        """Add ten times a number.

        Args:
            number: The number.
        """
        self.sum += tenfold(number)
        return self.sum

    def get_reward(self) -> float:
        return float(self.sum)


@pytest.fixture
def calling(monkeypatch: pytest.MonkeyPatch) -> None:
    """A llama that first calls `tenfold` with 1, 2 and 3 and no tool, and goes on by itself."""
    words, inner = bytewise(), LlamaForCausalLM.generate
    said = [
        f'<tool_call>\n{{"name": "tenfold", "arguments": {{"number": {number}}}}}\n</tool_call><|im_end|>'
        for number in (1, 2, 3)
    ]
    said.append("no tool<|im_end|>")

    def generate(self: Any, input_ids: torch.Tensor, **more: Any) -> torch.Tensor:
        assert not any(parameter.is_meta for parameter in self.parameters())
        if "tool_response" in words.decode(input_ids[0]):
            return inner(self, input_ids=input_ids, **more, max_new_tokens=6)
        texts = [said[i % 4] for i in range(len(input_ids))]
        new = words(texts, return_tensors="pt", padding=True, padding_side="right")["input_ids"]
        return torch.cat([input_ids, new], dim=1)

    monkeypatch.setattr(LlamaForCausalLM, "generate", generate)


@pytest.mark.parametrize("source", ["tools", "environment_factory"])
@pytest.mark.usefixtures("calling")
def test_tools(source: str, folders: dict[str, Path], tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(completions: list[Any], **_: Any) -> list[float]:
        seen.append(completions)
        return [len(c) + len(set(c[-1].get("content", ""))) / 10 for c in completions]

    chats = Dataset.from_dict({"prompt": [[{"role": "user", "content": letter}] for letter in "abcd"]})
    trainer = {"train_dataset": chats, "processing_class": bytewise()}
    trainer[source] = [tenfold] if source == "tools" else Counter
    changes = {"trainer": trainer, "max_steps": 2, "max_completion_length": 160}
    theirs = trained(GRPOTrainer, folders["roomy"], tmp_path, reward, **changes)
    ours = trained(HorizonGRPOTrainer, folders["roomy"], tmp_path, reward, **changes)
    assert differences(theirs, ours) == []
    assert len(seen) == 4 and seen[:2] == seen[2:]  # the same rollouts
    assert [message["role"] for message in seen[0][0]] == ["assistant", "tool", "assistant"]
    assert [c[1]["content"] for c in seen[0][:3]] == ["10", "{'error': 'no twos'}", "30"]
    assert ours.log[0]["tools/call_frequency"] == 0.75
    assert moved(ours, folders["roomy"]) > 5e-4
    if source == "tools":  # the control: another answer
        trainer["tools"] = [eightfold]
        other = trained(HorizonGRPOTrainer, folders["roomy"], tmp_path, reward, **changes)
        assert differences(theirs, other)


# A function of the user's.


def by_the_wrapped_model(trainer: Any, ids: torch.Tensor) -> torch.Tensor:
    return trainer.model_wrapped.generate(input_ids=ids, generation_config=trainer.generation_config)


def by_the_model(trainer: Any, ids: torch.Tensor) -> torch.Tensor:
    return trainer.model.generate(input_ids=ids, generation_config=trainer.generation_config)


@pytest.mark.parametrize("generate", [by_the_wrapped_model, by_the_model])
def test_rollout_func(
    generate: Callable[..., torch.Tensor], folders: dict[str, Path], tmp_path: Path
) -> None:
    def roll_out(prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = trainer.processing_class(prompts)["input_ids"]
        found = [generate(trainer, torch.tensor([one]))[0, len(one) :].tolist() for one in ids]
        # The last token counts as the environment's.
        masks = [[1] * (len(one) - 1) + [0] for one in found]
        return {"prompt_ids": ids, "completion_ids": found, "logprobs": None, "env_mask": masks, "bonus": 0.5}

    def reward(completions: list[str], bonus: list[float], **_: Any) -> list[float]:
        return [one + more for one, more in zip(variety(completions), bonus, strict=True)]

    changes = {"max_steps": 2, "num_iterations": 2, "trainer": {"rollout_func": roll_out}}
    theirs = trained(GRPOTrainer, folders["llama"], tmp_path, reward, **changes)
    ours = trained(HorizonGRPOTrainer, folders["llama"], tmp_path, reward, **changes)
    assert differences(theirs, ours) == []
    assert moved(ours, folders["llama"]) > 5e-4
    assert all(parameter.is_meta for parameter in ours.trainer.host.skeleton.model.parameters())
    assert not ours.trainer.model.whole


def test_a_trainer_without_rollouts_generates_too(folders: dict[str, Path], tmp_path: Path) -> None:
    """As TRL's callbacks that log completions do."""
    args = arguments("dpo", tmp_path, max_steps=1)
    trainer = HorizonDPOTrainer(
        str(folders["roomy"]), args=args, train_dataset=rows("dpo", 8, 1), processing_class=pair_tokenizer()
    )
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    ids = torch.tensor([[5, 6, 7]])
    plain = LlamaForCausalLM.from_pretrained(folders["roomy"], dtype=torch.float32)
    assert torch.equal(trainer.model.generate(ids, **options), plain.generate(ids, **options))
    trainer.train()
    assert trainer.model.generate(ids, **options).shape == (1, 7)


# Experts.


@pytest.mark.parametrize("kind", OURS)
def test_experts(kind: Any, folders: dict[str, Path], tmp_path: Path) -> None:
    """The routers' loss is that of TRL; generating asks routers for none."""
    changes = {"max_steps": 2, "num_iterations": 2, "gradient_accumulation_steps": 2}
    theirs = trained(kind, folders["mixtral"], tmp_path, **changes)
    ours = trained(OURS[kind], folders["mixtral"], tmp_path, **changes)
    assert differences(theirs, ours) == []
    assert ours.log[0]["aux_loss"] > 1 and ours.trainer.host.config.output_router_logits
    if kind is RLOOTrainer:  # the control
        other = trained(OURS[kind], folders["mixtral"], tmp_path, **changes, router_aux_loss_coef=0.11)
        assert differences(theirs, other)


# Errors.


@pytest.mark.parametrize("steps", [1, 2])
def test_a_reward_that_fails_leaves_the_trainer_usable(
    steps: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    """It fails in the second step, with one of its two micro-batches kept if `steps` is 1."""
    runs = []
    for kind in (GRPOTrainer, HorizonGRPOTrainer):
        calls = iter(range(99))
        fatal = 3 if steps == 1 else 1

        def reward(completions: list[str], calls: Any = calls, fatal: int = fatal, **_: Any) -> list[float]:
            if next(calls) == fatal:
                raise ZeroDivisionError
            return variety(completions)

        changes = {"gradient_accumulation_steps": 2, "steps_per_generation": steps, "max_steps": 3}
        trainer = built(kind, folders["llama"], tmp_path, reward, **changes)
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        trainer.train()
        runs.append(result(trainer))
    assert differences(*runs) == []
    assert runs[1].trainer.host.steps_done == 4
    whole = trained(HorizonGRPOTrainer, folders["llama"], tmp_path, **changes)
    assert differences(runs[0], whole)  # the control: the first step counted
