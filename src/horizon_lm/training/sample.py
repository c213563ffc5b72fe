"""The sample completion at the end of a run: shows what was learned, and that the exported folder loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from horizon_lm.checkpoint.adapted import base_of
from horizon_lm.checkpoint.identify import has_adapter
from horizon_lm.config import TrainConfig
from horizon_lm.config.data import IGNORED
from horizon_lm.data import TrainingData
from horizon_lm.data.rows import Row
from horizon_lm.machine.memory import available_host_bytes
from horizon_lm.training.generate import Generator, Sampling
from horizon_lm.words import size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TOKENS = 16
TEMPERATURE = 0.8  # at 0 a little trained model repeats itself endlessly
LARGEST_SHARE = 0.25  # of the free memory; a sample is not worth more


@dataclass(frozen=True)
class Sample:
    """A prompt and the trained model's completion."""

    prompt: str
    completion: str


def piece_of_data(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, bool]:
    """Return (a prompt from the beginning of a sequence, whether a chat template wrote it).

    If the sequence begins with tokens that are not trained on, they are the prompt, with special tokens; else
    its first tokens, at most half the sequence.
    """
    first = int(np.argmax(row.labels != IGNORED))
    if first > 0:
        return str(tokenizer.decode(row.ids[:first].tolist(), skip_special_tokens=False)), True
    ids = row.ids[: min(PROMPT_TOKENS, len(row.ids) // 2)]
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True)), False


def reason_to_skip(folder: Path, stated: int | None = None) -> str | None:
    """Say why a second copy of the weights does not fit besides the run's own; None if it does.

    stated: host bytes of the machine, if the system reports too little.
    """
    needed, available = weight_bytes(folder), available_host_bytes(stated)
    if needed > LARGEST_SHARE * available:
        return f"a copy of the weights takes {size(needed)}, and {size(available)} are free"
    return None


def weight_bytes(folder: Path) -> int:
    """Return the bytes of the weights in a folder; those of an adapter with its base."""
    own = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not has_adapter(folder):
        return own
    from huggingface_hub import try_to_load_from_cache

    base = base_of(folder)
    if not Path(base).is_dir():
        found = try_to_load_from_cache(base, "config.json")
        if not isinstance(found, str):  # nothing of it is here
            return own
        base = str(Path(found).parent)
    return own + sum(file.stat().st_size for file in Path(base).glob("*.safetensors"))


def complete(
    folder: Path,
    prompt: str,
    sampling: Sampling,
    *,
    device: torch.device,
    trust_remote_code: bool,
    special_tokens: bool = True,
) -> Sample:
    """Load an exported folder and complete `prompt`; the same completion each time.

    device: where the model runs if it fits there easily, else the CPU.
    """
    generator = Generator.load(folder, device=device, trust_remote_code=trust_remote_code)
    return Sample(prompt, generator.complete(prompt, sampling, special_tokens=special_tokens))


def sample_of_run(config: TrainConfig, folder: Path, data: TrainingData, device: torch.device) -> str:
    """Return a completion by the exported model in `folder`, or why there is none, in words."""
    reason = reason_to_skip(folder, config.host_memory_bytes)
    if reason is not None:
        return f"no sample completion: {reason}"
    prompt, is_chat = config.sample_prompt, False
    if prompt is None and data.rows.store.pictures is not None:
        return _of_row(config, folder, data, device)
    if prompt is None:
        prompt, is_chat = piece_of_data(data.rows.row(0), data.tokenizer)
    made = complete(
        folder,
        prompt,
        Sampling(max_new_tokens=config.sample_max_new_tokens, temperature=TEMPERATURE),
        device=device,
        trust_remote_code=config.trust_remote_code,
        special_tokens=not is_chat,
    )
    return f"{_quoted('sample prompt', made.prompt)}\n{_quoted('completion', made.completion)}"


def _of_row(config: TrainConfig, folder: Path, data: TrainingData, device: torch.device) -> str:
    """Return a completion of the first sequence's prompt, with its pictures, in words."""
    row = data.rows.row(0)
    assert row.pictures is not None and data.processor is not None
    first = max(1, int(np.argmax(row.labels != IGNORED)))
    shown = row.shown if first > 1 else ()
    ids = row.ids[: first if first > 1 else min(PROMPT_TOKENS, len(row.ids) // 2)].tolist()
    generator = Generator.load(folder, device=device, trust_remote_code=config.trust_remote_code)
    said = generator.complete_tokens(
        ids,
        Sampling(max_new_tokens=config.sample_max_new_tokens, temperature=TEMPERATURE),
        pictures=[row.pictures.load(number) for number in shown],
    )
    prompt = data.processor.collapsed(str(data.tokenizer.decode(ids, skip_special_tokens=False)))
    return f"{_quoted('sample prompt', prompt)}\n{_quoted('completion', said)}"


def _quoted(title: str, text: str) -> str:
    return "\n".join([title, *(f"  | {line}" for line in text.splitlines() or [""])])
