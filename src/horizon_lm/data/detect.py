"""The kind of a run's data, and the method that `auto` stands for."""

from __future__ import annotations

from horizon_lm.config import TrainConfig
from horizon_lm.config.preference import DataKind
from horizon_lm.data.documents import METHODS, Documents, two_kinds
from horizon_lm.data.formats import KIND_WORDS, kind_of
from horizon_lm.errors import ConfigError


def data_kind(config: TrainConfig) -> DataKind:
    """Return what a sample is: decided by the method, or by the first usable row of each dataset if that is
    `auto`. Raises DataError if datasets differ, or one has no usable row."""
    if config.method != "auto":
        return config.data_kind
    found: list[DataKind] = []
    for dataset in config.datasets:
        documents = Documents([dataset], on_bad_row=config.on_bad_row)
        next(iter(documents))
        found.append(kind_of(str(documents.formats[0])))
        if found[-1] != found[0]:
            raise two_kinds(config.datasets[0].path, found[0], dataset.path, found[-1])
    return found[0]


def with_method(config: TrainConfig) -> TrainConfig:
    """Return the settings with the method that `auto` stands for. Raises ConfigError."""
    if config.method != "auto":
        return config
    return config.replace(method=METHODS[data_kind(config)])


def require_suitable(config: TrainConfig, kind: DataKind) -> None:
    """Raise ConfigError for a data setting that samples of preferences do not allow."""
    if kind == "documents":
        return
    what = KIND_WORDS[kind]
    if config.streaming:
        raise ConfigError(
            f"streaming: true with {what}, whose reference log-probabilities need all rows before the first "
            "step",
            hint="set streaming=false",
        )
    if config.loss_on not in ("auto", "completion"):
        raise ConfigError(
            f"loss_on: {config.loss_on} with {what}, which are trained on by their completions",
            hint="set loss_on=auto",
        )
    if config.truncation == "split":
        raise ConfigError(
            f"truncation: split with {what} would separate completions from their prompts",
            hint="set truncation=drop, keep_start or keep_end",
        )
    if config.packing and config.packing_strategy == "wrapped":
        raise ConfigError(
            f"packing_strategy: wrapped with {what} would cut them",
            hint="set packing_strategy=auto, or packing=false",
        )
    if config.packing and config.packing_strategy == "bfd" and kind == "labelled":
        raise ConfigError(
            f"packing_strategy: bfd with {what}, which are not packed",
            hint="set packing_strategy=auto, or packing=false",
        )
