"""Training data: where rows come from, how they become tokens and sequences, in which order they are seen."""

from horizon_lm.data.documents import Documents
from horizon_lm.data.loader import Loader, TokenLoader
from horizon_lm.data.streaming import StreamLoader
from horizon_lm.data.tokenizer import load_tokenizer, train_tokenizer
from horizon_lm.data.training_data import TrainingData, load_training_data

__all__ = [
    "Documents",
    "Loader",
    "StreamLoader",
    "TokenLoader",
    "TrainingData",
    "load_tokenizer",
    "load_training_data",
    "train_tokenizer",
]
