"""Settings: each declared once with type, default, unit and meaning; read from YAML, flags or Python."""

from horizon_lm.config.train import (
    SCHEDULER_KWARGS,
    DatasetConfig,
    ModelSettings,
    TrainConfig,
    json_schema,
    load_config,
)

__all__ = ["SCHEDULER_KWARGS", "DatasetConfig", "ModelSettings", "TrainConfig", "json_schema", "load_config"]
