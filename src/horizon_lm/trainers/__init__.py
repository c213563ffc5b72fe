"""TRL's trainers, and the Trainer of transformers, on the streamed engine.

Importing this package imports trl, which takes seconds; `import horizon_lm` does not.
"""

from horizon_lm.machine.libraries import load_peft

load_peft()  # before trl does

from horizon_lm.trainers.base import HorizonSFTTrainer, HorizonTrainer  # noqa: E402
from horizon_lm.trainers.generation import resident  # noqa: E402
from horizon_lm.trainers.grpo import HorizonGRPOTrainer, HorizonRLOOTrainer  # noqa: E402
from horizon_lm.trainers.preferences import HorizonDPOTrainer, HorizonKTOTrainer  # noqa: E402

__all__ = [
    "HorizonDPOTrainer",
    "HorizonGRPOTrainer",
    "HorizonKTOTrainer",
    "HorizonRLOOTrainer",
    "HorizonSFTTrainer",
    "HorizonTrainer",
    "resident",
]
