"""Linear + cross-entropy by chunks of tokens, so that the logits of all tokens never exist.

Each chunk runs forward and backward before the next one starts, and its logits are freed. The
loss is computed from fp32 logits, as transformers' `ForCausalLMLoss` does.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ..model.capture import run_head
from ..model.skeleton import Skeleton

IGNORE_INDEX = -100
# Elements of fp32 logits alive at once when `loss_chunk_tokens` is auto: 512 MB, and about three
# times that with their gradient and bf16 copy.
_AUTO_LOGITS = 1 << 27


def shifted_targets(labels: torch.Tensor) -> torch.Tensor:
    """Next-token targets of labels [batch, tokens] that are aligned with the inputs (int64)."""
    return F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:].contiguous()


def chunk_tokens(setting: int | str, vocabulary: int) -> int:
    """Tokens in a chunk of the loss."""
    return max(128, _AUTO_LOGITS // vocabulary) if setting == "auto" else int(setting)


def head_loss(
    skeleton: Skeleton, hidden: torch.Tensor, targets: torch.Tensor, num_tokens: int, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy / num_tokens, and the gradient with respect to `hidden`.

    hidden: [n, width] (or [n, streams, width]); targets: [n] on the host, -100 ignored. The gradients
    of the head's parameters go to the leaves that are bound. Chunks without a target are skipped.
    Returns (fp32 scalar on the device, [n, width] in the dtype of hidden).
    """
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    # A tensor, since CUDA divides by a number as it multiplies by the reciprocal: other bits.
    divisor = torch.full((), num_tokens, dtype=torch.float32, device=hidden.device)
    gradient = torch.zeros_like(hidden)
    for start in range(0, hidden.shape[0], chunk):
        wanted = targets[start : start + chunk]
        if not bool((wanted != IGNORE_INDEX).any()):
            continue
        piece = hidden[start : start + chunk].detach().requires_grad_()
        logits = run_head(skeleton, piece).float()
        loss = F.cross_entropy(
            logits, wanted.to(logits.device, non_blocking=True), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        loss = loss / divisor
        loss.backward()
        total += loss.detach()
        assert piece.grad is not None
        gradient[start : start + chunk] = piece.grad
    return total, gradient
