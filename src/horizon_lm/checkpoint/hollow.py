"""A model built from a checkpoint's own files: its configuration, and, where wanted, its weights."""

from __future__ import annotations

import json
from typing import Any

import torch

from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.checkpoint.reader import read_small
from horizon_lm.engine.policies import DTYPES
from horizon_lm.errors import CheckpointError, ConfigError, HorizonError
from horizon_lm.io import files
from horizon_lm.io.leftovers import temporary_folder
from horizon_lm.model.configuration import read_configuration, reason_of

CONFIGURATIONS = ("config.json", "generation_config.json")


def hollow_model(
    checkpoint: Checkpoint, *, trust_remote_code: bool, attn_implementation: str | None = None
) -> Any:
    """Build the transformers model of a checkpoint without its weights.

    Parameters are on `meta`, in the dtypes that the run computes with; buffers are those of a new model.
    Raises CheckpointError for a damaged configuration, ConfigError for one that transformers refuses and for
    a model with code of its own, unless that is trusted.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, GenerationConfig

    with temporary_folder("horizon-files-") as folder:
        for file in CONFIGURATIONS:
            if file in checkpoint.manifest.files:
                files.write_file(folder / file, read_small(checkpoint, file))
        if not (folder / "config.json").exists():
            raise CheckpointError(f"{checkpoint.path / 'config.json'}: is not part of the checkpoint")
        if has_own_code(checkpoint) and not trust_remote_code:
            raise ConfigError(
                f"{checkpoint.path}: the model comes with code of its own, which is not run",
                hint="--trust-remote-code, if you have read it",
            )
        try:
            config = read_configuration(
                str(folder),
                trust_remote_code=trust_remote_code,
                attn_implementation=attn_implementation,
                where=str(checkpoint.path / "config.json"),
                local_files_only=True,
            )
            dtype = DTYPES[str(checkpoint.manifest.config.get("dtype", "bfloat16"))]
            with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=trust_remote_code
                )
            model.tie_weights()
            if (folder / CONFIGURATIONS[1]).exists():
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except HorizonError:
            raise
        except Exception as error:  # whatever an odd configuration leads to in there
            raise ConfigError(
                f"{checkpoint.path / 'config.json'} is refused by transformers: {reason_of(error)}",
                hint="use the versions that the checkpoint was written with; manifest.json names them",
            ) from error
    wide = frozenset(checkpoint.manifest.state.get("kept_in_fp32", ()))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name in wide else dtype)
    return model


def has_own_code(checkpoint: Checkpoint) -> bool:
    """Whether the model comes with code of its own, which a checkpoint does not hold."""
    data = read_small(checkpoint, "config.json")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise CheckpointError(f"{checkpoint.path / 'config.json'}: is not a JSON object")
    return bool(values.get("auto_map"))
