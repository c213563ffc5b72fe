"""TRL's trainers, and the Trainer of transformers, on the streamed engine.

Importing this package imports trl, which takes seconds; `import horizon_lm` does not.
"""

from horizon_lm.trainers.base import HorizonSFTTrainer, HorizonTrainer
from horizon_lm.trainers.preferences import HorizonDPOTrainer, HorizonKTOTrainer

__all__ = ["HorizonDPOTrainer", "HorizonKTOTrainer", "HorizonSFTTrainer", "HorizonTrainer"]
