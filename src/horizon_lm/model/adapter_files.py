"""Files of a saved adapter: its configuration, which is only data, and its weights, never from pickles."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from horizon_lm.errors import ConfigError, DataError, HorizonError
from horizon_lm.io.files import read_bytes, write_file
from horizon_lm.io.hub import require_reachable
from horizon_lm.machine.libraries import load_peft
from horizon_lm.model.configuration import reason_of
from horizon_lm.model.folder import check_model_folder

CONFIG, WEIGHTS, _PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_KEY = "adapter_name_or_path"


def read_adapter_config(name: str) -> Any:
    """Read adapter_config.json of a folder or Hub name as PEFT's configuration.

    No entry makes anything else be read, imported or downloaded. Raises ConfigError for a place without an
    adapter, DataError for a damaged file.
    """
    peft = load_peft()
    path = _file(name, CONFIG)
    try:
        values = json.loads(read_bytes(path))
        texts = (values.get("base_model_name_or_path"), values.get("revision"))
        if not isinstance(values["peft_type"], str) or not all(isinstance(t, str | None) for t in texts):
            raise TypeError("an entry has another type than text")
        return peft.PeftConfig.from_pretrained(str(path.parent))
    except Exception as error:
        raise DataError(
            f"{path} is damaged: {type(error).__name__}: {reason_of(error)}",
            hint="save the adapter again with the installed version of PEFT",
        ) from error


def read_adapter_weights(name: str, config: Any) -> dict[str, torch.Tensor]:
    """Read adapter_model.safetensors of a folder or Hub name.

    config: of the same adapter; its ranks must be those of the weights, as they decide how much memory the
    adapter takes. Raises ConfigError for a folder without the file, DataError for a damaged one.
    """
    from safetensors.torch import load_file

    path = _file(name, WEIGHTS)
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors raises its own type
        raise DataError(
            f"the weights of the adapter in {path} are damaged: {type(error).__name__}: {error}",
            hint="download or save the adapter again",
        ) from error
    ranks = [getattr(config, "r", 0), *(getattr(config, "rank_pattern", None) or {}).values()]
    most = max((length for weight in weights.values() for length in weight.shape), default=0)
    strange = next((r for r in ranks if isinstance(r, int) and r > most), None)
    if strange is not None:
        raise DataError(
            f"{path.parent / CONFIG} says rank {strange:,}, and the weights are at most {most:,} long",
            hint="download or save the adapter again",
        )
    return weights


def tidy_config(folder: Path) -> None:
    """Give the modules in adapter_config.json an order, which PEFT leaves to chance, and the base a path that
    is valid anywhere."""
    path = folder / CONFIG
    values = json.loads(read_bytes(path))
    for key in ("target_modules", "exclude_modules", "target_parameters"):
        if isinstance(values.get(key), list):
            values[key] = sorted(values[key])
    base = values.get("base_model_name_or_path")
    if isinstance(base, str) and Path(base).is_dir():
        values["base_model_name_or_path"] = os.path.abspath(base)
    write_file(path, json.dumps(values, indent=2, sort_keys=True))


def _file(name: str, file: str) -> Path:
    """The path of a file of an adapter, downloaded from the Hub if `name` is no folder."""
    folder = Path(name).expanduser()
    if name.startswith((".", "/", "~")) or folder.exists():
        if not folder.is_dir():
            raise ConfigError(
                f"{_KEY}={name!r} is not a folder", hint="check the path; it is taken from where you are"
            )
        check_model_folder(folder)
        if (folder / file).is_file():
            return folder / file
        pickled = file == WEIGHTS and (folder / _PICKLED).is_file()
        raise ConfigError(
            f"{_KEY}={name!r} holds no {file}",
            hint=f"pickled weights ({_PICKLED}) are never loaded; PEFT's save_pretrained converts them"
            if pickled
            else f"name a folder with {CONFIG} and {WEIGHTS}",
        )
    require_reachable(name, _KEY)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, file))
    except HorizonError:
        raise
    except Exception as error:
        raise ConfigError(
            f"{_KEY}={name!r} holds no {file} that could be downloaded: {reason_of(error)}",
            hint=f"name a folder or a repository with {CONFIG} and {WEIGHTS}",
        ) from error
