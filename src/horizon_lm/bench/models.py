"""The model of a case, the same for every system; and its size, from the configuration alone."""

from __future__ import annotations

import json
import math
from functools import lru_cache

import torch
from torch import nn

from horizon_lm.bench.figures import Work
from horizon_lm.bench.protocol import Case
from horizon_lm.config import ModelSettings
from horizon_lm.model.loading import create_model
from horizon_lm.plan.outline import Outline
from horizon_lm.report.flops import UNKNOWN, forward_of_layers, model_flops

_POOL = 1 << 20


def source_model(case: Case) -> nn.Module:
    """A transformers model on the CPU with random weights of the case's seed.

    With init=transformers its parameters are fp32. With init=quick they are views of the case's dtype into
    one small pool of random numbers (overlapping rows), so that a model of any size takes neither time nor
    memory before a system copies them: `own` gives a parameter memory of its own.
    """
    if case.init == "transformers":
        return create_model(
            case.model, dtype=case.torch_dtype, seed=case.seed, attn_implementation=case.attention
        )
    model = _hollow(case)
    generator = torch.Generator().manual_seed(case.seed)
    std = float(getattr(model.config, "initializer_range", 0.02) or 0.02)
    pool = (torch.randn(_POOL, generator=generator) * std).to(case.torch_dtype)
    for name, parameter in model.named_parameters():
        parameter.data = _view(pool, name, parameter.shape)
    return model


def _hollow(case: Case) -> nn.Module:
    """A model whose parameters have addresses and no pages yet; its buffers are real."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    values = dict(case.model)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(
            config, dtype=case.torch_dtype, attn_implementation=case.attention
        )
    model.tie_weights()
    return model


def _view(pool: torch.Tensor, name: str, shape: torch.Size) -> torch.Tensor:
    """Ones for the scales of norms, zeros for biases, else rows that begin at other places of the pool."""
    if len(shape) == 1:
        value = torch.zeros if name.endswith("bias") else torch.ones
        return value(tuple(shape), dtype=pool.dtype)
    begin = sum(name.encode()) * 7919 % 4096
    apart = max(0, (len(pool) - begin - shape[-1]) // math.prod(shape[:-1]))
    strides = [apart * math.prod(shape[i + 1 : -1]) for i in range(len(shape) - 1)]
    return pool.as_strided(tuple(shape), (*strides, 1), begin)


def own(model: nn.Module, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """Give each parameter contiguous memory of its own, in `dtype` and on `device`; buffers follow."""
    for parameter in model.parameters():
        kind = dtype or parameter.dtype
        parameter.data = torch.empty(parameter.shape, dtype=kind, device=device).copy_(parameter.data)
    return model.to(device)


@lru_cache(maxsize=64)
def _work(model_json: str) -> tuple[Work, int]:
    from transformers import AutoConfig

    values = json.loads(model_json)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    outline = Outline(config, ModelSettings(device="cpu"))
    counted = outline.count()
    if counted is None:
        return Work(UNKNOWN, UNKNOWN), outline.num_parameters
    model = model_flops(outline.units, counted, embedding_trainable=True)
    return Work(model, forward_of_layers(outline.units, counted)), outline.num_parameters


def work_of(case: Case) -> tuple[Work, int]:
    """(FLOPs of a case's model, its parameters); nothing is allocated."""
    return _work(json.dumps(case.model, sort_keys=True))
