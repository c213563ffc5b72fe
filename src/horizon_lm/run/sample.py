"""A short completion by the exported model: shows what was learned, and that the folder loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..plan.hardware import available_host_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_TOKENS = 16
LARGEST_SHARE = 0.25  # of the free memory; a sample is not worth more


@dataclass(frozen=True)
class Sample:
    """What the trained model made of a prompt."""

    prompt: str
    completion: str


def piece_of_data(blocks: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of the first block [n, T] as text: some tokens, at most half the block."""
    ids = blocks[0, : min(PROMPT_TOKENS, blocks.shape[1] // 2)]
    return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))


def reason_to_skip(folder: Path) -> str | None:
    """Why a second copy of the weights in `folder` is not loaded beside the run's own; None if it may be."""
    size, available = weight_bytes(folder), available_host_bytes()
    if size > LARGEST_SHARE * available:
        return f"a copy of the weights takes {size / 1e9:.1f} GB, and {available / 1e9:.1f} GB are free"
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
) -> Sample:
    """Load an exported folder and let it go on from `prompt`; the same completion each time.

    temperature: of the draw, with a fixed seed; 0 takes the likeliest token always, which a little
    trained model answers with endless repetition. device: where it runs if it fits there easily,
    else the CPU. Whatever transformers raises while loading or generating is passed on.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: Any = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True, **options)
    device = device if _fits(device, weight_bytes(folder)) else torch.device("cpu")
    model = model.to(device).eval()
    ids = tokenizer(prompt).input_ids or [tokenizer.eos_token_id]  # an empty prompt: a new document
    inputs = torch.tensor([ids], device=device)
    draw: Any = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    with torch.inference_mode(), torch.random.fork_rng():
        torch.manual_seed(0)
        output = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            **draw,
            pad_token_id=tokenizer.eos_token_id,
        )
    new = output[0, inputs.shape[1] :].tolist()
    return Sample(prompt, str(tokenizer.decode(new, skip_special_tokens=True)))


def _fits(device: torch.device, num_bytes: int) -> bool:
    return device.type == "cuda" and 2 * num_bytes < torch.cuda.mem_get_info(device)[0]
