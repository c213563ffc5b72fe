"""Private names of transformers and TRL that the trainers rely on: an upgrade that changes one fails here."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments, trainer_utils
from transformers.trainer_callback import CallbackHandler
from trl.generation.vllm_generation import VLLMGeneration

from horizon_lm import trainers
from horizon_lm.trainers import trainer_state
from horizon_lm.trainers.checkpoints import HorizonCheckpoints

PACKAGE = Path(trainers.__file__).parent

# Methods that are overridden or called, with the parameters they must have; further ones must have defaults.
# As in transformers 5.17 and 5.23, TRL 1.16.
SEAMS: dict[Any, dict[str, str]] = {
    Trainer: {
        # one step
        "_build_accelerator_args": "",
        "_clip_grad_norm": "model",
        "_get_grad_norm": "model grad_norm",
        "_move_model_to_device": "model device",
        "_prepare_inputs": "inputs",
        "compute_loss": "model inputs return_outputs num_items_in_batch",
        "create_accelerator_and_postprocess": "",
        "create_optimizer": "model",
        "evaluation_loop": "dataloader description prediction_loss_only ignore_keys metric_key_prefix",
        "floating_point_ops": "inputs",
        "log": "logs start_time",
        "get_batch_samples": "epoch_iterator num_batches device",
        "prediction_step": "model inputs prediction_loss_only ignore_keys",
        "training_step": "model inputs num_items_in_batch",
        # checkpoints
        "_finalize_training": "trial num_train_samples start_time",
        "_get_output_dir": "trial",
        "_load_best_model": "",
        "_load_from_checkpoint": "resume_from_checkpoint model",
        "_load_optimizer_and_scheduler": "checkpoint",
        "_load_rng_state": "checkpoint",
        "_push_from_checkpoint": "checkpoint_folder",
        "_save": "output_dir state_dict",
        "_save_checkpoint": "model trial",
        "save_model": "output_dir _internal_call",
        "store_flos": "",
        "train": "resume_from_checkpoint trial ignore_keys_for_eval",
    },
    trainer_utils: {
        "rotate_checkpoints": "output_dir save_total_limit best_model_checkpoint use_mtime",
    },
    CallbackHandler: {"on_push_begin": "args state control"},
    TrainerCallback: {"on_save": "args state control"},
    TrainingArguments: {"to_json_string": ""},
    VLLMGeneration: {"_iter_named_params": ""},
    **dict.fromkeys(
        (trl.GRPOTrainer, trl.RLOOTrainer),
        {
            "_generate": "prompts",
            "_prepare_inputs": "generation_batch",
            "_get_per_token_logps_and_entropies": "model input_ids attention_mask logits_to_keep batch_size "
            "compute_entropy compute_aux_loss",
        },
    ),
    trl.SFTTrainer: {"create_model_card": "model_name"},
    trl.DPOTrainer: {
        "compute_ref_log_probs": "model inputs",
        "_precompute_ref_logps": "dataset name batch_size",
    },
    trl.KTOTrainer: {
        "compute_ref_log_probs": "model inputs",
        "_precompute_ref_logps": "dataset name batch_size",
    },
}

# Attributes that Trainer or TRL set and we read or set.
ATTRIBUTES = {
    Trainer: (
        *("_globalstep_last_logged", "_tr_loss", "_total_loss_scalar", "current_gradient_accumulation_steps"),
        *("callback_handler", "control", "state", "lr_scheduler", "optimizer", "is_in_train"),
        *(
            "push_in_progress",
            "hub_model_id",
            "data_collator",
            "processing_class",
            "model_accepts_loss_kwargs",
        ),
    ),
    trl.SFTTrainer: ("_total_train_tokens", "_metrics"),
    trl.DPOTrainer: ("_total_train_tokens", "_metrics"),
    trl.KTOTrainer: ("_total_train_tokens", "_metrics", "calculate_KL"),
    **dict.fromkeys(
        (trl.GRPOTrainer, trl.RLOOTrainer),
        (
            *("_total_train_tokens", "_metrics", "_step", "_buffered_inputs", "_current_train_step_time"),
            *("beta", "ref_model", "temperature", "use_vllm", "vllm_generation", "model_wrapped"),
        ),
    ),
    VLLMGeneration: ("_weight_metadata",),
}


@functools.cache
def source(of: Any) -> ast.AST:
    return ast.parse(textwrap.dedent(inspect.getsource(of)))


def faults(seams: dict[Any, dict[str, str]]) -> list[str]:
    found = []
    for owner, methods in seams.items():
        for name, wanted in methods.items():
            function = getattr(owner, name, None)
            if function is None:
                found.append(f"{owner.__name__}.{name} is gone")
                continue
            parameters = inspect.signature(function).parameters
            named = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
            missing = [one for one in wanted.split() if one not in parameters]
            needed = [p.name for p in named if p.default is p.empty and p.name != "self"]
            unknown = [one for one in needed if one not in wanted.split()]
            if missing or unknown:
                found.append(f"{owner.__name__}.{name} has {list(parameters)}, not {wanted!r}")
    return found


def test_methods_are_there_with_their_parameters() -> None:
    assert not faults(SEAMS), transformers.__version__


def test_a_changed_method_is_found() -> None:
    changed = {Trainer: {"_save_checkpoint": "model", "_saves": "", "_save": "output_dir state_dict shards"}}
    assert [one.split()[0] for one in faults(changed)] == [
        "Trainer._save_checkpoint",
        "Trainer._saves",
        "Trainer._save",
    ]


@functools.cache
def stored(kind: type) -> frozenset[str]:
    """Names that the methods of a class assign to self."""
    return frozenset(
        node.attr
        for node in ast.walk(source(kind))
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    )


def assigned(owner: type) -> frozenset[str]:
    own = [kind for kind in owner.__mro__ if kind.__module__.startswith(("transformers.", "trl."))]
    return frozenset().union(*map(stored, own))


@pytest.mark.parametrize("owner", ATTRIBUTES, ids=lambda owner: str(owner.__name__))
def test_attributes_are_set(owner: type) -> None:
    assert not set(ATTRIBUTES[owner]) - assigned(owner)


def test_every_name_is_listed() -> None:
    """Overridden methods, and private attributes, in the sources of our trainers."""
    listed = {name for methods in SEAMS.values() for name in methods}
    listed |= {name for names in ATTRIBUTES.values() for name in names} | set(trainer_state.CARRIED)
    theirs = {name for owner in ATTRIBUTES for name in assigned(owner)}
    theirs |= {name for owner in ATTRIBUTES for kind in owner.__mro__[:-1] for name in vars(kind)}
    used: set[str] = set()
    for path in sorted(PACKAGE.glob("*.py")):
        tree = ast.parse(path.read_text())
        nodes = list(ast.walk(tree))
        used |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and n.attr.startswith("_")}
        classes = [n for n in nodes if isinstance(n, ast.ClassDef) and n.name.startswith("Horizon")]
        used |= {n.name for c in classes for n in c.body if isinstance(n, ast.FunctionDef)}
    assert not {n for n in used & theirs if not n.startswith("__")} - listed
    assert len(used & theirs) > 20


def test_what_trl_does_when_it_saves_is_done() -> None:
    """`_save_checkpoint` replaces TRL's, which writes the model card; GRPO's also the state of the entropy
    control, which is refused."""
    known = {"Path", "split", "create_model_card", "super", "_save_checkpoint"}
    grpo = known | {"_get_output_dir", "join", "open", "dump"}
    for owner in (trl.SFTTrainer, trl.DPOTrainer, trl.KTOTrainer, trl.GRPOTrainer, trl.RLOOTrainer):
        calls = {
            node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            for node in ast.walk(source(owner._save_checkpoint))
            if isinstance(node, ast.Call)
        }
        assert calls <= (grpo if owner is trl.GRPOTrainer else known), owner


def test_trainer_resumes_in_the_order_that_we_rely_on() -> None:
    """Weights, then scheduler, then the sums of the log are reset, then the random states."""
    text = inspect.getsource(Trainer.train) + inspect.getsource(Trainer._inner_training_loop)
    places = [
        text.index(one)
        for one in (
            "self._load_from_checkpoint(",
            "self._prepare_for_training(",
            "self._tr_loss = ",
            "self._globalstep_last_logged = ",
            "self._run_epoch(",
        )
    ]
    assert places == sorted(places)
    assert "self._load_optimizer_and_scheduler(" in inspect.getsource(Trainer._prepare_for_training)
    epoch = inspect.getsource(Trainer._run_epoch)
    assert epoch.count("self._load_rng_state(") == 2
    assert epoch.rindex("self._load_rng_state(") < epoch.index("self.training_step(")
    assert epoch.index("self.get_batch_samples(") < epoch.rindex("self._load_rng_state(")


def test_our_checkpoint_is_the_last_word_on_saving() -> None:
    """Nothing else of Trainer writes a pickle: what does is overridden."""
    ours = set(vars(HorizonCheckpoints))
    writers = {
        node.name
        for node in ast.walk(source(Trainer))
        if isinstance(node, ast.FunctionDef) and "torch.save(" in ast.unparse(node)
    }
    inside = {
        "_save_optimizer_and_scheduler",
        "_save_scaler",
        "_save_rng_state",
    }  # called by _save_checkpoint
    search = {"_tune_save_checkpoint"}  # of hyperparameters, which needs model_init
    assert writers - inside - search == {"_save", "_push_from_checkpoint"} <= ours
    callers = [
        node.name
        for node in ast.walk(source(Trainer))
        if isinstance(node, ast.FunctionDef) and any(f"self.{one}(" in ast.unparse(node) for one in inside)
    ]
    assert callers == ["_save_checkpoint"] and "_save_checkpoint" in ours


def test_the_state_file_is_that_of_transformers(tmp_path: Path) -> None:
    state = TrainerState(global_step=3, log_history=[{"loss": 0.1, "step": 3}])

    class Stub:
        callback_handler = type("Handler", (), {"callbacks": []})
        control = None

    stub: Any = Stub()
    stub.state = state
    (tmp_path / "ours.json").write_bytes(trainer_state.state_file(stub))
    state.save_to_json(str(tmp_path / "theirs.json"))
    assert (tmp_path / "ours.json").read_text() == (tmp_path / "theirs.json").read_text()
    assert TrainerState.load_from_json(str(tmp_path / "ours.json")) == state
    assert json.loads((tmp_path / "ours.json").read_text())["global_step"] == 3
