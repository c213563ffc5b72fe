"""Training data: where text comes from, how it is tokenised and packed, in which order it is seen."""

from horizon_lm.data.loader import TokenLoader
from horizon_lm.data.sources import Documents
from horizon_lm.data.tokenizer import load_tokenizer, train_tokenizer
from horizon_lm.data.training_data import TrainingData, load_training_data

__all__ = [
    "Documents",
    "TokenLoader",
    "TrainingData",
    "load_tokenizer",
    "load_training_data",
    "train_tokenizer",
]
