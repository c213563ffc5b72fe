"""State of a Trainer besides the model, as files of a checkpoint: JSON and safetensors, no pickle.

trainer_state.json   transformers' TrainerState: steps, log history, best metric, callbacks
trainer.json         scheduler, optimizer groups, random states, sums of the log; tensors by key
trainer.safetensors  those tensors
training_args.json   the arguments, without tokens
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.torch
import torch
from transformers import TrainerState
from transformers.trainer_callback import ExportableState

from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.checkpoint.model import TRAINER_FILES
from horizon_lm.checkpoint.reader import read_small
from horizon_lm.errors import ConfigError

TRAINER_STATE, TRAINER, TENSORS, ARGUMENTS = TRAINER_FILES

# Attributes of TRL's trainers that carry over from step to step.
CARRIED = ("_total_train_tokens", "_metrics", "_step", "_buffered_inputs")


def files_of(trainer: Any) -> dict[str, bytes]:
    """Return the state of a trainer as files. Raises ConfigError for state that JSON cannot hold."""
    tensors: dict[str, torch.Tensor] = {}
    values = {
        "scheduler": _of_scheduler(trainer.lr_scheduler),
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in trainer.optimizer.param_groups],
        "random": _random_states(trainer.host.device),
        "logged": {"step": trainer._globalstep_last_logged, "loss": trainer._tr_loss.item()},
        "carried": {name: getattr(trainer, name) for name in CARRIED if hasattr(trainer, name)},
    }
    packed = {name: _pack(value, name, tensors) for name, value in values.items()}
    return {
        TRAINER_STATE: state_file(trainer),
        TRAINER: (json.dumps(packed) + "\n").encode(),
        TENSORS: safetensors.torch.save(tensors),
        ARGUMENTS: arguments_file(trainer),
    }


def state_file(trainer: Any) -> bytes:
    """Return trainer_state.json, with the callbacks' state of now."""
    found = (*trainer.callback_handler.callbacks, trainer.control)
    callbacks: Any = [callback for callback in found if isinstance(callback, ExportableState)]
    trainer.state.stateful_callbacks = TrainerState(stateful_callbacks=callbacks).stateful_callbacks
    text = json.dumps(dataclasses.asdict(trainer.state), indent=2, sort_keys=True)
    return (text + "\n").encode()


def arguments_file(trainer: Any) -> bytes:
    text: str = trainer.args.to_json_string()
    return (text + "\n").encode()


def load_state(checkpoint: Checkpoint, device: torch.device) -> dict[str, Any]:
    """Return what `files_of` packed into trainer.json, with the batches of GRPO on the device.

    Raises CheckpointError, ValueError, KeyError.
    """
    loaded = safetensors.torch.load(read_small(checkpoint, TENSORS))
    tensors = {k: v.to(device) if k.startswith("carried.") else v for k, v in loaded.items()}
    state = _unpack(json.loads(read_small(checkpoint, TRAINER)), tensors)
    for name in ("scheduler", "groups", "random", "logged", "carried"):
        state[name]
    return dict(state)


def restore_schedule(trainer: Any, state: Mapping[str, Any]) -> None:
    """Restore scheduler and learning rates."""
    trainer.lr_scheduler.load_state_dict(state["scheduler"])
    for group, saved in zip(trainer.optimizer.param_groups, state["groups"], strict=True):
        group.update(saved)


def restore_progress(trainer: Any, state: Mapping[str, Any]) -> None:
    """Restore random states, and what the next lines of the log sum up."""
    _restore_random(state["random"], trainer.host.device)
    logged = state["logged"]
    trainer._tr_loss += logged["loss"]
    trainer._total_loss_scalar -= logged["loss"]  # of steps before this call of train()
    trainer._globalstep_last_logged = logged["step"]
    for name, value in state["carried"].items():
        present = getattr(trainer, name, None)
        if name == "_metrics" and isinstance(present, dict):  # of defaultdicts
            for mode, sums in value.items():
                present[mode].update(sums)
        elif hasattr(trainer, name):
            setattr(trainer, name, value)


def _of_scheduler(scheduler: Any) -> dict[str, Any]:
    state: dict[str, Any] = scheduler.state_dict()
    return state


def _random_states(device: torch.device) -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "cpu": torch.random.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _restore_random(states: Mapping[str, Any], device: torch.device) -> None:
    version, words, gauss = states["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.random.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _pack(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return a value as JSON; tensors go into `tensors` under their place."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, torch.Tensor):
        tensors[place] = value.detach().cpu().contiguous().clone()
        return {"tensor": place}
    if isinstance(value, Mapping):
        return {"items": [[str(k), _pack(v, f"{place}.{k}", tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple | deque):
        return [_pack(v, f"{place}.{i}", tensors) for i, v in enumerate(value)]
    raise ConfigError(
        f"{place} is a {type(value).__name__}, which a checkpoint cannot hold",
        hint="save_only_model=True saves the model alone; save_strategy='no' nothing",
    )


def _unpack(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict) and "items" in value:
        return {k: _unpack(v, tensors) for k, v in value["items"]}
    if isinstance(value, dict):
        return {k: _unpack(v, tensors) for k, v in value.items()}
    return value
