"""Checks of a run before it starts: of what can be told without its data or weights, and of them together."""

from __future__ import annotations

from pathlib import Path

from horizon_lm.checkpoint.run_folder import RunFolder
from horizon_lm.config import TrainConfig
from horizon_lm.data import TrainingData
from horizon_lm.data.sources import check_exists
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.host_model import HostModel
from horizon_lm.machine.device import resolve_device
from horizon_lm.report.loggers import check_installed
from horizon_lm.training.stand_in import explain_missing


def check_sources(config: TrainConfig, folder: RunFolder) -> None:
    """What can be told without reading data or weights. Raises ConfigError and DataError."""
    resolve_device(config.device)
    for key in ("model_name_or_path", "tokenizer_name_or_path"):
        name = getattr(config, key)
        if name is None:
            continue
        path = Path(name).expanduser()
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
        if looks_local and not path.is_dir():
            raise ConfigError(
                f"{key}={name!r} is not a folder", hint=f"check the path; looked in {Path.cwd()}"
            )
        if path.is_dir() and path.resolve().is_relative_to(folder.model.resolve()):
            raise ConfigError(
                f"{key}={name!r} lies in output_dir={str(folder.path)!r}, whose model this run replaces",
                hint="choose another output_dir",
            )
    check_installed(config.report_to)
    for key in ("datasets", "eval_datasets"):
        for dataset in getattr(config, key):
            with explain_missing(config, key):
                check_exists(dataset)


def check_together(config: TrainConfig, data: TrainingData, model: HostModel) -> None:
    """Whether data and model fit each other. Raises DataError and ConfigError."""
    vocabulary, highest = int(model.config.get_text_config().vocab_size), int(data.store.ids.max())
    if highest >= vocabulary:
        raise DataError(
            f"the data holds token {highest}, outside the model's vocabulary of {vocabulary}",
            hint="use the model's own tokenizer, leave vocab_size out of init_model, or name the tokens in "
            "new_tokens, for which the embeddings grow",
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < config.max_length:
        raise ConfigError(
            f"max_length={config.max_length} is more than the model's max_position_embeddings={longest}",
            hint=f"max_length={longest}",
        )
