"""Settings: each declared once with type, default, unit and meaning; read from YAML, flags or Python."""

from horizon_lm.config.curves import SCHEDULER_KWARGS
from horizon_lm.config.python import check_max_length, model_settings_of
from horizon_lm.config.train import DatasetConfig, ModelSettings, TrainConfig, json_schema, load_config

__all__ = [
    "SCHEDULER_KWARGS",
    "DatasetConfig",
    "ModelSettings",
    "TrainConfig",
    "check_max_length",
    "json_schema",
    "load_config",
    "model_settings_of",
]
