"""A short completion by the exported model: shows what was learned, and that the folder loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from horizon_lm.config.data import IGNORED
from horizon_lm.data.packing import Row
from horizon_lm.machine.memory import available_host_bytes
from horizon_lm.training.generate import Generator, Sampling
from horizon_lm.words import size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TOKENS = 16
LARGEST_SHARE = 0.25  # of the free memory; a sample is not worth more


@dataclass(frozen=True)
class Sample:
    """What the trained model made of a prompt."""

    prompt: str
    completion: str


def piece_of_data(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """(a prompt from the beginning of a sequence, whether it is one that a chat template wrote).

    Where something stands before what is trained on, that is the prompt, with its special tokens; else
    some tokens, at most half the sequence.
    """
    first = int(np.argmax(row.labels != IGNORED))
    if first > 0:
        return str(tokenizer.decode(row.ids[:first].tolist(), skip_special_tokens=False)), True
    ids = row.ids[: min(PROMPT_TOKENS, len(row.ids) // 2)]
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)), False


def reason_to_skip(folder: Path) -> str | None:
    """Why a second copy of the weights in `folder` is not loaded beside the run's own; None if it may be."""
    needed, available = weight_bytes(folder), available_host_bytes()
    if needed > LARGEST_SHARE * available:
        return f"a copy of the weights takes {size(needed)}, and {size(available)} are free"
    return None


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def complete(
    folder: Path,
    prompt: str,
    *,
    max_new_tokens: int,
    device: torch.device,
    trust_remote_code: bool,
    temperature: float = 0.8,
    special_tokens: bool = True,
) -> Sample:
    """Load an exported folder and let it go on from `prompt`; the same completion each time.

    temperature: of the draw, with a fixed seed; 0 takes the likeliest token always, which a little
    trained model answers with endless repetition. device: where it runs if it fits there easily,
    else the CPU.
    """
    generator = Generator.load(folder, device=device, trust_remote_code=trust_remote_code)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    return Sample(prompt, generator.complete(prompt, sampling, special_tokens=special_tokens))
