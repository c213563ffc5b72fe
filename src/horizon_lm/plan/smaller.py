"""The next smaller choice after a device has run out of memory: what costs least comes first."""

from __future__ import annotations

from horizon_lm.config import TrainConfig


def next_smaller(config: TrainConfig) -> str:
    """Settings, as one would write them, that need less device memory than these.

    Recomputing and spilling cost time and change no result; a smaller micro-batch with more of them changes
    none but by the order of sums; a shorter sequence changes what is learned, and so comes last.
    """
    if config.activations not in ("auto", "recompute"):
        return "activations=recompute"
    if config.boundaries not in ("host",):
        return "boundaries=host"
    if config.checkpoint_interval > 1:
        return "checkpoint_interval=1"
    if config.slots > 2:
        return "slots=2"
    if config.per_device_train_batch_size > 1:
        size = (config.per_device_train_batch_size + 1) // 2
        micro_batches = config.gradient_accumulation_steps * config.per_device_train_batch_size
        return f"per_device_train_batch_size={size} gradient_accumulation_steps={-(-micro_batches // size)}"
    if config.loss_chunk_tokens == "auto" or config.loss_chunk_tokens > 256:
        tokens = 1024 if config.loss_chunk_tokens == "auto" else config.loss_chunk_tokens // 2
        return f"loss_chunk_tokens={tokens}"
    if config.mlp_tile_tokens is None and config.max_length > 2048:
        return "mlp_tile_tokens=2048"
    if config.grad_slots > 1:
        return "grad_slots=1"
    return f"max_length={max(2, config.max_length // 2)}"
