"""Trainers on the streamed engine: which model they take, how they drive it, what they save."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from accelerate.state import AcceleratorState
from datasets import IterableDataset
from tests.rooms import PACKAGE
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback
from trl import DPOTrainer

from horizon_lm.engine.engine import Engine
from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.trainers import HorizonDPOTrainer, HorizonSFTTrainer, base
from horizon_lm.trainers.settings import decayed_otherwise
from trainer_pairs import SIZES, TRAINERS, Trained, arguments, assert_equal, build, rows, small_model
from trainer_runs import tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with its tokenizer, and another one of other weights."""
    found = []
    for scale in (1.0, 0.9):
        found.append(tmp_path_factory.mktemp("model"))
        model = small_model("llama")
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        model.save_pretrained(found[-1])
        tokenizer().save_pretrained(found[-1])
    return found[0], found[1]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the engine was called, and with how many micro-batches in all."""
    found: Counter[str] = Counter()

    def count(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            found[name] += 1
            if args and isinstance(args[0], list):
                found[f"{name} of"] += len(args[0])
            return real(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    for name in ("forward_backward", "evaluate", "step"):
        count(HostModel, name)
    count(Engine, "_execute_alone")
    return found


def trained(method: str, model: Any, folder: Path, **changes: Any) -> Any:
    trainer = TRAINERS[method][0](
        model=model, args=arguments(method, folder, max_steps=3, **changes), train_dataset=rows(method, 40, 1)
    )
    trainer.train()
    return trainer


# Models.


def test_a_folder_an_object_and_a_host_model_train_alike(folders: tuple[Path, Path], tmp_path: Path) -> None:
    path = str(folders[0])
    models: list[Any] = [
        path,
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        HostModel.from_pretrained(path, device="cpu", dtype="float32"),
    ]
    after = [dict(trained("sft", model, tmp_path).host.named_parameters()) for model in models]
    for name, value in after[0].items():
        assert torch.equal(value, after[1][name]) and torch.equal(value, after[2][name]), name


def test_a_launcher_of_one_process(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torchrun sets it up; its process group is made, and wraps nothing. The device is `cpu:0` then."""
    alone = trained("sft", str(folders[0]), tmp_path)
    launched = {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}
    launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    try:
        trainer = trained("sft", str(folders[0]), tmp_path)
        assert str(trainer.args.device) == "cpu:0" and torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
    wanted = dict(alone.host.named_parameters())
    assert all(torch.equal(value, wanted[name]) for name, value in trainer.host.named_parameters())


def test_how_to_load_is_not_said_to_be_ignored(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL warns so for model objects; the tokenizer has the revision, too."""
    warned: list[str] = []
    monkeypatch.setattr(trl.trainer.sft_trainer.logger, "warning", lambda text: warned.append(text))
    chosen = {"attn_implementation": "eager", "revision": "main"}
    trainer = trained("sft", str(folders[0]), tmp_path, model_init_kwargs=chosen)
    assert trainer.host.settings.attn_implementation == "eager"
    assert trainer.args.model_init_kwargs == chosen and not warned
    assert trainer.processing_class.pad_token == "<pad>"


def test_a_step_that_was_cut_short_is_not_taken_up(tmp_path: Path) -> None:
    trainer = build("sft", "llama", tmp_path, ours=True, gradient_accumulation_steps=3, max_steps=2)

    class Stop(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            trainer.pop_callback(Stop)
            raise KeyboardInterrupt

    trainer.add_callback(Stop)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    again = build("sft", "llama", tmp_path, ours=True, gradient_accumulation_steps=3, max_steps=2)
    again.train()
    assert trainer.state.log_history[0]["loss"] == again.state.log_history[0]["loss"]


def test_arguments_are_optional(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in TRL, where a default names its folder by the model."""
    made = []

    def config(output_dir: str) -> Any:
        made.append(output_dir)
        return arguments("sft", folders[0], max_steps=1)

    monkeypatch.setattr(HorizonSFTTrainer, "config_class", staticmethod(config))
    config.__name__ = "SFTConfig"
    HorizonSFTTrainer(str(folders[0]), train_dataset=rows("sft", 4, 1))
    assert made == [f"{folders[0].name}-SFT"]


def test_bf16_is_the_dtype(tmp_path: Path) -> None:
    trainer = build("sft", "llama", tmp_path, ours=True, bf16=True, max_steps=2)
    assert trainer.host.settings.dtype == "bfloat16"
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_neftune_is_the_engines(tmp_path: Path) -> None:
    noisy = build("sft", "llama", tmp_path, ours=True, neftune_noise_alpha=5.0, max_steps=1)
    assert noisy.host.settings.neftune_noise_alpha == 5.0
    noisy.train()
    plain = build("sft", "llama", tmp_path, ours=True, max_steps=1)
    plain.train()
    assert noisy.state.log_history[0]["loss"] != plain.state.log_history[0]["loss"]


# The reference.


def test_a_reference_of_its_own(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains as TRL does with that model, and is freed before the other one is loaded."""
    alive, most = [0], [0]
    real, real_close = HostModel.__init__, HostModel.close

    def init(self: Any, *args: Any) -> None:
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        real(self, *args)

    def close(self: Any) -> None:
        alive[0] -= 1
        real_close(self)

    monkeypatch.setattr(HostModel, "__init__", init)
    monkeypatch.setattr(HostModel, "close", close)
    args = arguments("dpo", tmp_path)
    common = {"args": args, "train_dataset": rows("dpo", 40, 1)}
    ours = HorizonDPOTrainer(str(folders[0]), str(folders[1]), **common)
    assert (alive[0], most[0]) == (1, 1) and ours.ref_model is None
    with pytest.raises(ConfigError, match="no column ref_chosen_logps"):
        ours.evaluate(rows("dpo", 4, 5))  # not by the model to train
    theirs = DPOTrainer(
        small_model("llama"),
        AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32),
        **common,
        processing_class=tokenizer(),
    )
    theirs.precompute_ref_logps = False
    mine = Trained.by(ours)
    wanted = Trained.by(theirs)
    assert_equal(mine, wanted)
    assert wanted.log[0]["rewards/margins"] != 0


def test_the_reference_is_one_pass(tmp_path: Path, calls: Counter[str]) -> None:
    build("dpo", "llama", tmp_path, ours=True)
    assert (calls["evaluate"], calls["evaluate of"]) == (2, 13)  # rows to train on, and to evaluate on
    build("kto", "llama", tmp_path, ours=True)
    assert (calls["evaluate"], calls["evaluate of"]) == (4, 39)  # each with another completion


def test_the_reference_is_found_again(
    folders: tuple[Path, Path], tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By weights, rows and lengths; no master is copied for it."""
    monkeypatch.setattr(HostModel, "named_parameters", None)
    data = rows("dpo", 12, 3)
    data.save_to_disk(tmp_path / "data")  # with a place for a cache
    data = data.load_from_disk(tmp_path / "data")

    def passes(model: Path, **changes: Any) -> int:
        calls.clear()
        HorizonDPOTrainer(str(model), args=arguments("dpo", tmp_path, **changes), train_dataset=data)
        return calls["evaluate"]

    assert [passes(folders[0]), passes(folders[0])] == [1, 0]
    assert [passes(folders[1]), passes(folders[0], max_length=9)] == [1, 1]


# Steps.


def test_micro_batches_of_a_step_go_together(tmp_path: Path, calls: Counter[str]) -> None:
    """Layer by layer, and updates run during the next step: none is flushed, though each step is logged."""
    trainer = build("kto", "llama", tmp_path, ours=True, gradient_accumulation_steps=3, max_steps=4)
    calls.clear()
    trainer.train()
    # An epoch has 10 batches: its last step has one.
    assert (calls["forward_backward"], calls["forward_backward of"], calls["step"]) == (4, 10, 4)
    assert (calls["evaluate"], calls["evaluate of"]) == (4, 10)  # KL terms, before each step
    calls.clear()
    trainer = build("dpo", "llama", tmp_path, ours=True, max_steps=4)
    calls.clear()
    trainer.train()
    assert calls["forward_backward"] == 4 and calls["_execute_alone"] == 0


def test_rows_of_a_stream(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(rows("sft", 10, 1)))
    args = arguments("sft", tmp_path, max_steps=4, gradient_accumulation_steps=2)
    common = {"args": args, "train_dataset": stream, "eval_dataset": stream, "processing_class": tokenizer()}
    ours, theirs = (kind(small_model("llama"), **common) for kind in TRAINERS["sft"][:2])
    for trainer in (ours, theirs):
        trainer.train()
    assert ours.state.log_history[3]["loss"] == pytest.approx(theirs.state.log_history[3]["loss"], rel=1e-5)
    assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)


class Callback(TrainerCallback):
    """Ends the schedule: the next steps have this rate."""

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
        assert sum(p.numel() for p in named["model"].parameters()) > 0
        named["optimizer"].param_groups[0]["lr"] = 0.0


def test_callbacks_and_schedules_see_the_optimizer(tmp_path: Path) -> None:
    trainer = build("sft", "llama", tmp_path, ours=True, max_steps=3, lr_scheduler_type="constant")
    trainer.add_callback(Callback)
    first: list[dict[str, torch.Tensor]] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            first.append(dict(trainer.host.named_parameters()))

    trainer.add_callback(Look())
    trainer.train()
    before = dict(small_model("llama").named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(first[0][name], before[name])
    assert torch.equal(first[0][name], first[2][name])


class OwnLoss(HorizonSFTTrainer):
    """number: of calls of the model."""

    number = 1

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = torch.zeros(())
        for _ in range(self.number):
            out = model(input_ids=inputs["input_ids"], labels=inputs["labels"], fused_lm_head=True)
            loss = loss - out.log_probs.sum() / num_items_in_batch
        return loss


def test_a_loss_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments("sft", tmp_path, max_steps=2)
    common = {"args": args, "train_dataset": rows("sft", 8, 1), "processing_class": tokenizer()}
    mine = OwnLoss(small_model("llama"), **common)
    usual = HorizonSFTTrainer(small_model("llama"), **common)
    for trainer in (mine, usual):
        trainer.train()
    found, wanted = (trainer.state.log_history[1]["loss"] for trainer in (mine, usual))
    assert found == pytest.approx(wanted, rel=1e-6)
    for number, said in ((2, "more than once"), (0, "did not call the model")):
        monkeypatch.setattr(OwnLoss, "number", number)
        own = OwnLoss(small_model("llama"), **common)
        with pytest.raises(ConfigError, match=said) as caught:
            own.train()
        assert caught.value.hint
        assert not own.model.answers  # which a later call might take for those of its own step


# Evaluation.


@pytest.mark.parametrize("method", ["plain", "sft", "dpo", "kto"])
def test_evaluation_is_one_pass(
    method: str, tmp_path: Path, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(method, "llama", tmp_path, ours=True)
    calls.clear()
    found = trainer.evaluate()
    assert calls["evaluate"] == 1
    monkeypatch.setattr(base, "_TOKENS_AHEAD", 1)  # batch by batch
    again = trainer.evaluate()
    assert calls["evaluate"] == 4
    assert {k: v for k, v in again.items() if "_per_" not in k and "time" not in k} == pytest.approx(
        {k: v for k, v in found.items() if "_per_" not in k and "time" not in k}, rel=1e-6
    )


def test_logits_are_refused(tmp_path: Path) -> None:
    trainer = build("sft", "llama", tmp_path, ours=True)
    batch = next(iter(trainer.get_train_dataloader()))
    for ask in (
        lambda: trainer.predict(trainer.eval_dataset),
        lambda: trainer.compute_loss(trainer.model, batch, return_outputs=True),
        lambda: trainer.model(input_ids=batch["input_ids"]),
        lambda: trainer.model(**batch, pixel_values=torch.zeros(1)),
        lambda: trainer.model.state_dict(),
    ):
        with pytest.raises(ConfigError) as caught:
            ask()
        assert caught.value.hint


# Weight decay, saving, imports.


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "mixtral", "gpt2", "cohere", "qwen2"])
def test_the_same_parameters_decay(kind: str) -> None:
    config = AutoConfig.for_model(
        kind, **{**SIZES, **({"head_dim": 8} if kind in ("qwen3", "gemma") else {})}
    )
    model = AutoModelForCausalLM.from_config(config)
    names = Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    host = HostModel.from_pretrained(model, device="cpu", dtype="float32")
    assert decayed_otherwise(host, names) == []
    assert decayed_otherwise(host, names[1:]) == [names[0]]  # the control


def test_the_saved_model_is_the_trained_one(tmp_path: Path) -> None:
    trainer = build("dpo", "qwen3", tmp_path / "run", ours=True, max_steps=2)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    wanted = dict(trainer.host.named_parameters())
    for name, value in again.named_parameters():
        assert torch.equal(value, wanted[name]), name
    assert "DPO" in (tmp_path / "run" / "README.md").read_text()
    assert again.config.pad_token_id == tokenizer().pad_token_id


def test_nothing_imports_the_trainers() -> None:
    """`import horizon_lm` must not import trl."""
    users = {
        path.relative_to(PACKAGE).parts[0]
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^\s*(from|import) (horizon_lm\.trainers|trl\.trainer)", path.read_text(), re.MULTILINE)
    }
    assert users == {"trainers"}
