"""Settings from Python: a file, a mapping, a `TrainConfig`, keyword arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from horizon_lm.config.aliases import canonical_name, canonicalise
from horizon_lm.config.base import REPLACES, collect, keys_of, plain
from horizon_lm.config.train import ModelSettings, TrainConfig
from horizon_lm.config.yaml import Document
from horizon_lm.errors import ConfigError

# What `train` accepts as its configuration.
ConfigSource = TrainConfig | Mapping[str, Any] | str | os.PathLike[str] | None


def as_train_config(
    source: ConfigSource, changes: Mapping[str, Any], *, caller: str = "train()"
) -> tuple[TrainConfig, list[str]]:
    """Combine `source` with `changes` on top; return settings and one-line notes about aliases.

    source: a YAML file, a mapping, a TrainConfig, or None for `changes` alone. Keys named in either count as
    set by the user, and the planner never changes those. Raises ConfigError.
    """
    if isinstance(source, TrainConfig) and not changes:
        return source, []
    notes: list[str] = []
    if isinstance(source, (str, os.PathLike)):
        path = os.path.expanduser(os.fspath(source))
        if os.path.isdir(path):
            raise ConfigError(
                f"{caller}: {path} is a directory, not a YAML file",
                hint="name the file; resume_from_checkpoint='auto' resumes a run in output_dir",
            )
        document, notes = collect(path, (), keys_of(TrainConfig))
    else:
        document, notes = _document(_values(source, caller), caller)
    mine, more = _document(changes, f"{caller} arguments")
    for key, others in REPLACES.items():
        if mine.values.get(key) is not None:
            for other in others:
                document.values.pop(other, None)
    values = {**document.values, **mine.values}
    where = {path: at for path, at in document.where.items() if not path or path[0] not in mine.values}
    where.update({(key,): mine.where[()] for key in mine.values})
    return TrainConfig.from_document(Document(values, where, [*document.faults, *mine.faults])), notes + more


def model_settings(caller: str, device: Any, dtype: Any, more: Mapping[str, Any]) -> ModelSettings:
    """Build settings from the arguments of a call; an alias (torch_dtype) may replace `dtype`."""
    values = {"device": device, "dtype": dtype, **more}
    if dtype == "bfloat16" and any(canonical_name(key) == "dtype" for key in more):
        del values["dtype"]  # the caller's default
    return ModelSettings.from_dict(values, source=caller)


def model_settings_of(config: TrainConfig) -> ModelSettings:
    """Return the part of a configuration that `HostModel` takes."""
    return ModelSettings(**{key: getattr(config, key) for key in ModelSettings.model_fields})


def check_max_length(config: TrainConfig, positions: Any) -> None:
    """Raise ConfigError if max_length exceeds a model's max_position_embeddings (None or 0: unlimited)."""
    if isinstance(positions, int) and 0 < positions < config.max_length:
        raise ConfigError(
            f"max_length={config.max_length} is more than the model's max_position_embeddings={positions}",
            hint=f"max_length={positions}",
        )


def _document(values: Mapping[str, Any], place: str) -> tuple[Document, list[str]]:
    return canonicalise(Document(plain(values, place), {(): place}))


def _values(source: Any, caller: str) -> Mapping[str, Any]:
    if source is None:
        return {}
    if isinstance(source, TrainConfig):
        named = source.to_dict()
        return {key: named[key] for key in named if key in source.model_fields_set}
    if isinstance(source, Mapping):
        return source
    name = type(source).__name__
    raise ConfigError(
        f"{caller}: {'an' if name[0] in 'aeiou' else 'a'} {name} is not a configuration",
        hint="pass the path of a YAML file, a dict of settings, or a TrainConfig",
    )
