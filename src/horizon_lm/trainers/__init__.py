"""TRL's trainers, and the Trainer of transformers, on the streamed engine.

Importing this package imports trl, which takes seconds; `import horizon_lm` does not.
"""

from horizon_lm.trainers.base import HorizonSFTTrainer, HorizonTrainer
from horizon_lm.trainers.generation import resident
from horizon_lm.trainers.grpo import HorizonGRPOTrainer, HorizonRLOOTrainer
from horizon_lm.trainers.preferences import HorizonDPOTrainer, HorizonKTOTrainer

__all__ = [
    "HorizonDPOTrainer",
    "HorizonGRPOTrainer",
    "HorizonKTOTrainer",
    "HorizonRLOOTrainer",
    "HorizonSFTTrainer",
    "HorizonTrainer",
    "resident",
]
