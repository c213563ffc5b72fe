"""Adapters of PEFT under the trainers: TRL's own parameters, logs and references, and PEFT's own files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed

import horizon_lm as hz
import zoo
from horizon_lm.errors import CheckpointError, ConfigError
from horizon_lm.preference.reference import weights_hash
from horizon_lm.trainers import resident
from horizon_lm.trainers.resumed import load_weights
from sizes import SOAK
from trainer_pairs import Trained, assert_equal, build, parameters_of, rows, small_model
from trainer_runs import digests, history

pytestmark = pytest.mark.usefixtures("one_thread")

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
STEPS = {"gradient_accumulation_steps": 2}
RUNS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("sft", "qwen3", {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}, STEPS),
    ("dpo", "llama", {}, {**STEPS, "eval_strategy": "steps", "eval_steps": 5}),
    ("kto", "qwen3", {"rank_pattern": {"v_proj": 2}}, STEPS),
]
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
if SOAK:
    RUNS += [
        ("sft", "llama", {}, {"weight_decay": 0.1, "eval_strategy": "steps", "eval_steps": 5}),
        ("sft", "mixtral", {}, STEPS),
        ("plain", "gemma", ATTENTION, STEPS),
        ("dpo", "mixtral", {**ATTENTION, "modules_to_save": ["lm_head"]}, STEPS),
    ]


def adapted(kind: str, seed: int = 1, **changes: Any) -> Any:
    """A PeftModel whose adapter has been trained, so to say: its matrices B are not 0."""
    model = small_model(kind)
    torch.manual_seed(seed)
    model = get_peft_model(model, LoraConfig(**{**LORA, **changes}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def given(method: str, kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """The trainer's arguments: `peft_config`, or for transformers' Trainer a PeftModel."""
    peft_config = LoraConfig(**{**LORA, **config})
    found: dict[str, Any] = {"peft_config": peft_config}
    if method == "plain":
        set_seed(42)
        found = {"model": get_peft_model(small_model(kind), peft_config)}
    if method in ("dpo", "kto"):
        found["ref_model"] = None
    return found


@pytest.mark.parametrize(
    ("method", "kind", "config", "changes"), RUNS, ids=[f"{method}-{kind}" for method, kind, _, _ in RUNS]
)
def test_ten_steps(
    method: str, kind: str, config: dict[str, Any], changes: dict[str, Any], tmp_path: Path
) -> None:
    """A new adapter by peft_config, whose base is the reference."""
    trainers = [
        build(method, kind, tmp_path, ours=ours, trainer=given(method, kind, config), **changes)
        for ours in (True, False)
    ]
    before = [parameters_of(trainer) for trainer in trainers]
    assert before[0].keys() == before[1].keys()
    assert all(before[0][name].equal(value) for name, value in before[1].items())
    ours, theirs = (Trained.by(trainer) for trainer in trainers)
    assert_equal(ours, theirs)
    trained = {name for name, p in trainers[1].model.named_parameters() if p.requires_grad}
    trained = {name.removeprefix("base_model.model.") for name in trained}
    assert {name for name, value in ours.moved.items() if value.any()} == trained
    assert {p.name for unit in trainers[0].host.skeleton.units for p in unit.trainable} == trained


def pair(method: str, kind: str, folder: Path, trainer: Any, **changes: Any) -> list[Any]:
    """Our trainer and TRL's. trainer: makes their arguments."""
    return [build(method, kind, folder, ours=ours, trainer=trainer(), **changes) for ours in (True, False)]


@pytest.mark.parametrize("method", ["dpo", "kto"] if SOAK else ["dpo"])
def test_an_adapter_that_was_trained_is_its_own_reference(method: str, tmp_path: Path) -> None:
    """As TRL has it: a copy of the adapter of a PeftModel, not the base."""
    ours, theirs = pair(method, "llama", tmp_path, lambda: {"model": adapted("llama"), "ref_model": None})
    assert "ref" in theirs.model.peft_config
    mine, wanted = Trained.by(ours), Trained.by(theirs)
    for found in (wanted.parameters, wanted.moved):
        for name in [name for name in found if ".ref." in name]:
            del found[name]
    assert_equal(mine, wanted)
    assert wanted.log[0]["rewards/chosen"] == 0


def test_a_new_adapter_that_adds_something_has_its_base_as_the_reference(tmp_path: Path) -> None:
    """And it can be asked for at any time: TRL's evaluate() of other rows, after training."""
    config = LoraConfig(**LORA, init_lora_weights=False)
    ours, theirs = pair("dpo", "llama", tmp_path, lambda: {"peft_config": config, "ref_model": None}, **STEPS)
    mine, wanted = Trained.by(ours), Trained.by(theirs)
    assert_equal(mine, wanted)
    assert abs(wanted.log[0]["rewards/margins"]) > 1e-4
    found, expected = (trainer.evaluate(rows("dpo", 6, 5)) for trainer in (ours, theirs))
    for name in ("eval_loss", "eval_rewards/margins", "eval_logps/chosen"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6)


def test_the_hash_of_a_base(tmp_path: Path) -> None:
    """It is that of the base's values, whatever the adapter and its training; caches are kept by it."""

    def host(model: Any, **settings: Any) -> hz.HostModel:
        return hz.HostModel.from_pretrained(model, device="cpu", dtype="float32", **settings)

    def train(model: hz.HostModel) -> None:
        ids = torch.arange(4, 12)[None]
        for _ in range(2):
            model.train_step([{"input_ids": ids, "labels": ids}], lr=1e-2)

    with host(adapted("llama")) as one, host(adapted("llama", seed=2)) as other:
        before = weights_hash(one, adapter=False), weights_hash(one)
        assert weights_hash(other, adapter=False) == before[0] and weights_hash(other) != before[1]
        assert before[0] != before[1]
        train(one)
        assert weights_hash(one, adapter=False) == before[0] and weights_hash(one) != before[1]
    with torch.no_grad():
        changed = adapted("llama")
        changed.get_base_model().model.norm.weight[0] += 1
    with host(changed) as other:
        assert weights_hash(other, adapter=False) != before[0]


def test_the_hash_of_a_base_with_parts_in_fp32() -> None:
    """In a bf16 store the base's and the adapter's fp32 parameters lie in the same regions."""
    hashes = []
    for seed, added in ((1, 0.0), (2, 0.0), (1, 2**-20)):
        model = zoo.build("hunyuan_v1_moe").to(torch.bfloat16)
        wide = model.model.layers[0].mlp.gate.wg
        wide.float()
        with torch.no_grad():
            wide.weight[0, 0] = 0.5 + added
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
        with hz.HostModel.from_pretrained(get_peft_model(model, config), device="cpu") as host:
            assert {".lora_" in name for name in host.kept_in_fp32} == {True, False}
            hashes.append((weights_hash(host, adapter=False), weights_hash(host)))
    assert hashes[0][0] == hashes[1][0] != hashes[2][0]
    assert len({one for _, one in hashes}) == 3


def test_a_host_model_with_an_adapter_of_its_settings(tmp_path: Path) -> None:
    """It begins at its base, and is refused another adapter."""
    model = hz.HostModel.from_pretrained(
        small_model("llama"), device="cpu", dtype="float32", adapter="lora", lora_r=4
    )
    with model:
        trainer = build("dpo", "llama", tmp_path, ours=True, trainer={"model": model}, max_steps=2)
        assert trainer.begins_adapter and trainer.ref_model is not None
        trainer.train()
        assert model.steps_done == 2
        with pytest.raises(ConfigError, match="peft_config with a HostModel"):
            build("dpo", "llama", tmp_path, ours=True, trainer={"model": model, "peft_config": LoraConfig()})


# Files.


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(4, 12)[None]).logits
        return found


def test_save_model_writes_what_peft_loads(tmp_path: Path) -> None:
    """In place of a whole model that was there, and back."""
    folder = tmp_path / "out"
    small_model("llama").save_pretrained(folder)
    peft_config = LoraConfig(**LORA, modules_to_save=["lm_head"])
    trainer = build("sft", "llama", tmp_path / "run", ours=True, trainer={"peft_config": peft_config})
    trainer.train()
    trainer.save_model(str(folder))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("model*.safetensors"))
    loaded = PeftModel.from_pretrained(small_model("llama"), folder)
    with resident(trainer.host) as model:
        assert logits(loaded.eval()).equal(logits(model))
    assert not logits(small_model("llama").eval()).equal(logits(loaded.eval()))  # the control
    whole = build("sft", "llama", tmp_path / "run", ours=True)
    whole.save_model(str(folder))
    assert not list(folder.glob("adapter_*"))
    assert logits(AutoModelForCausalLM.from_pretrained(folder)).equal(logits(small_model("llama").eval()))


# Checkpoints.


EVERY = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}


def trained(method: str, folder: Path, *, resume: str | None = None, **changes: Any) -> Any:
    """Our trainer after training with a new adapter, whose layers have dropout."""
    config = LoraConfig(**LORA, lora_dropout=0.1, modules_to_save=["lm_head"])
    changes = {**EVERY, **changes}
    trainer = build(method, "llama", folder, ours=True, trainer={"peft_config": config}, **changes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("method", ["sft", "dpo"] if SOAK else ["dpo"])
def test_a_checkpoint_holds_the_adapter_and_resumes_bit_for_bit(method: str, tmp_path: Path) -> None:
    straight = trained(method, tmp_path / "straight")
    checkpoint = tmp_path / "straight" / "checkpoint-4"
    keys = {key.partition(".")[2] for file in checkpoint.glob("unit-*") for key in load_file(file)}
    assert keys == {p.name for unit in straight.host.skeleton.units for p in unit.trainable}
    resumed = trained(method, tmp_path / "resumed", resume=str(checkpoint))
    assert digests(resumed.host) == digests(straight.host)
    assert history(resumed)[-2:] == history(straight)[-2:]


def test_a_checkpoint_of_another_adapter_or_base_is_refused(tmp_path: Path) -> None:
    trained("sft", tmp_path, max_steps=2)
    checkpoint, same = str(tmp_path / "checkpoint-2"), {**LORA, "modules_to_save": ["lm_head"]}
    for arguments, said in (
        ({"peft_config": LoraConfig(**{**same, "r": 2})}, r"expected F32 \[2, 32\]"),
        ({"peft_config": LoraConfig(**same), "model": changed_base()}, "adapter of another base"),
        ({}, "holds an adapter, and a model without"),
    ):
        trainer = build("sft", "llama", tmp_path / "new", ours=True, trainer=arguments, **EVERY)
        with pytest.raises(CheckpointError, match=said):
            trainer.train(resume_from_checkpoint=checkpoint)


def test_a_foreign_checkpoint_of_an_adapter_is_refused_by_name(tmp_path: Path) -> None:
    """As transformers' own Trainer leaves it, and a folder of PEFT alone; both are the way on."""
    folder = tmp_path / "run" / "checkpoint-3"
    adapted("llama").save_pretrained(folder)
    trainer = build("sft", "llama", tmp_path / "new", ours=True, trainer={"peft_config": LoraConfig(**LORA)})
    with pytest.raises(CheckpointError, match="holds an adapter without the optimizer's state") as caught:
        trainer.train(resume_from_checkpoint=str(folder))
    assert caught.value.hint and f"pass {folder} as the trainer's model" in caught.value.hint
    (folder / "optimizer.pt").write_bytes(b"0")
    for place in (folder, folder.parent):
        with pytest.raises(CheckpointError, match=r"whose optimizer\.pt is a pickle"):
            trainer.train(resume_from_checkpoint=str(place))


def changed_base() -> Any:
    model = small_model("llama")
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    return model


def test_the_best_adapter_is_loaded_at_the_end(tmp_path: Path) -> None:
    """From a checkpoint of ours, and from the folder of PEFT that save_only_model leaves."""
    found = []
    for only_model in (False, True):
        changes = {
            "learning_rate": 0.5,
            "eval_strategy": "steps",
            "eval_steps": 2,
            "load_best_model_at_end": True,
        }
        trainer = trained("sft", tmp_path / str(only_model), save_only_model=only_model, **changes)
        best = Path(trainer.state.best_model_checkpoint)
        assert best.name == "checkpoint-2"  # with such a learning rate
        assert (best / "adapter_model.safetensors").exists() == only_model
        found.append(parameters_of(trainer))
    assert all(found[0][name].equal(value) for name, value in found[1].items())
    last = parameters_of(trained("sft", tmp_path / "last", learning_rate=0.5))
    assert any(not last[name].equal(value) for name, value in found[0].items())  # the control


def test_an_adapter_of_another_rank_is_not_spread_over_the_model(tmp_path: Path) -> None:
    """Of rank 1, its matrices could be broadcast. The control is the same rank."""
    settings = hz.ModelSettings(device="cpu", skip_memory_check=True)

    def of_rank(rank: int) -> Any:
        return get_peft_model(small_model("llama"), LoraConfig(**LORA | {"r": rank}))

    of_rank(1).save_pretrained(tmp_path)
    load_weights(tmp_path, hz.HostModel(of_rank(1), settings))
    other = hz.HostModel(of_rank(4), settings)
    before = digests(other)
    with pytest.raises(CheckpointError, match=r"in the shape \[1, \d+\], and the model has it as \[4, \d+\]"):
        load_weights(tmp_path, other)
    assert digests(other) == before


def test_the_folder_of_an_adapter_is_trained_further(tmp_path: Path) -> None:
    """As the PeftModel that is loaded from it; the base is the one that it names."""
    folder, base = tmp_path / "adapter", tmp_path / "base"
    small_model("llama").save_pretrained(base)
    loaded = AutoModelForCausalLM.from_pretrained(base)
    peft = get_peft_model(loaded, LoraConfig(**LORA, init_lora_weights=False))
    peft.save_pretrained(folder)
    results = []
    loaded = AutoModelForCausalLM.from_pretrained(base)
    for model in (str(folder), PeftModel.from_pretrained(loaded, folder, is_trainable=True)):
        changes = {"max_steps": 3, "model_init_kwargs": {"dtype": "auto"} if model == str(folder) else None}
        trainer = build("dpo", "llama", tmp_path / "run", ours=True, trainer={"model": model}, **changes)
        assert not trainer.begins_adapter
        trainer.train()
        results.append(digests(trainer.host))
        assert abs(trainer.state.log_history[0]["rewards/chosen"]) < 1e-6
    assert results[0] == results[1]
