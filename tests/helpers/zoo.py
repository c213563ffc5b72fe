"""Tiny causal language models of many architectures, for tests that compare gradients.

Every model is a few layers wide enough to exercise what is particular to its architecture: both kinds of
layer where kinds alternate (sliding and full attention, linear and full attention, dense and mixture of
experts), a sliding window shorter than the default batch, grouped key/value heads, experts that are routed.
All dropouts and router noises are 0, so that two runs of one model give the same bits.

``CASES`` holds the architectures in which nothing but hidden states goes from one decoder layer to the next.
``SHARED_STATE`` holds those that pass something else to a later layer (keys and values of an earlier layer,
one block used at several depths, top-k indices, ...). Both are read from zoo.yaml.
``build`` and ``batch`` take the names of both.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_DATA = yaml.safe_load(Path(__file__).with_name("zoo.yaml").read_text("utf-8"))
_SIZES: dict[str, Any] = _DATA["sizes"]
VOCAB: int = _SIZES["vocab_size"]
WINDOW: int = _SIZES["sliding_window"]
LENGTH = 20
TAGS = frozenset(
    {
        "dense",  # dense feed-forward in every layer, attention in every layer
        "moe",
        "hybrid",  # some layers without attention
        "gqa",  # fewer key/value heads than query heads
        "sliding",  # some layers attend within a window shorter than LENGTH
        "softcap",
        "parallel",  # attention and feed-forward side by side
        "learned-positions",
        "alibi",
        "tied",
        "untied",
        "aux",  # the loss holds the routers' load balancing loss
    }
)
KINDS = ("plain", "padded", "packed")


@dataclass(frozen=True)
class Case:
    """One architecture at its tiny size.

    ``attn`` is the attention implementation the class can run ("eager" where it has no sdpa).
    ``kinds`` are the kinds of batch its forward heeds: "packed" needs ``position_ids``.
    """

    name: str
    config: Callable[[], PreTrainedConfig]
    tags: frozenset[str]
    attn: str = "sdpa"
    kinds: frozenset[str] = frozenset(KINDS)


CASES: dict[str, Case] = {}
SHARED_STATE: dict[str, Case] = {}


def missing(what: str) -> str:
    """Why the installed transformers lacks ``what``, a case or something about it; empty if it does not."""
    version = ".".join(transformers.__version__.split(".")[:2])
    reason = _DATA["missing"].get(version, {}).get(what, "")
    return reason and f"transformers {version}: {what}: {reason}"


def need(what: str) -> None:
    """Skip the test, with the reason, where the installed transformers lacks ``what``."""
    if reason := missing(what):
        import pytest  # `make gpu-check` needs none

        pytest.skip(reason)


def _config(name: str, model_type: str, overrides: dict[str, Any], extra: dict[str, Any]) -> PreTrainedConfig:
    """``extra`` is for what the class takes without declaring a field of that name."""
    need(name)
    cls = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(cls)}

    def field(name: str) -> str:
        alias = cls.attribute_map.get(name, name)
        return alias if alias in fields else name

    values = {field(name): value for name, value in _SIZES.items() if field(name) in fields}
    overrides = {field(name): value for name, value in overrides.items()}
    if not set(overrides) <= fields:
        raise ValueError(f"{cls.__name__} has no {sorted(set(overrides) - fields)}")
    return cls(**(values | overrides | extra))


def _read(entries: list[dict[str, Any]], into: dict[str, Case]) -> None:
    for entry in entries:
        name, tags, overrides = entry["name"], frozenset(entry["tags"].split()), dict(entry.get("config", {}))
        if name in CASES or name in SHARED_STATE:
            raise ValueError(f"two cases named {name}")
        if not tags <= TAGS:
            raise ValueError(f"{name}: {sorted(tags - TAGS)} is not a tag")
        for tied in tags & {"tied", "untied"}:
            overrides["tie_word_embeddings"] = tied == "tied"
        config = partial(_config, name, entry.get("model_type", name), overrides, entry.get("extra", {}))
        kinds = frozenset(entry["kinds"].split()) if "kinds" in entry else frozenset(KINDS)
        into[name] = Case(name, config, tags, entry.get("attn", "sdpa"), kinds)


_read(_DATA["cases"], CASES)
_read(_DATA["shared_state"], SHARED_STATE)


def _find(name: str) -> Case:
    return CASES[name] if name in CASES else SHARED_STATE[name]


def _perturb(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Moves every weight a little, those that start as constants (norms, biases, sinks, ...) further.

    So do the saved buffers that start as constants, such as the routers' correction biases.
    """
    saved = model.state_dict().keys()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            constant = tensor.numel() == 1 or bool((tensor == tensor.flatten()[0]).all())
            if isinstance(tensor, torch.nn.Parameter):
                scale = 0.1 if constant else 0.001
            elif constant and tensor.is_floating_point() and name in saved:
                scale = 0.1
            else:
                continue
            tensor.add_(scale * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))


def _from_config(config: PreTrainedConfig, dtype: torch.dtype, seed: int, attn: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation=attn, dtype=dtype)


def build(
    name: str, dtype: torch.dtype = torch.float32, seed: int = 0, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """The model of case ``name`` with random weights, in training mode; the same bits for the same seed.

    A lower ``dtype`` gives the float32 weights rounded, except those that ``from_pretrained`` leaves in
    float32 as well (``_keep_in_fp32_modules_strict``, and what the class creates in float32): a few
    architectures then have parameters of two dtypes.
    """
    case = _find(name)
    attn = "eager" if case.attn == "eager" else attn_implementation
    if dtype == torch.bfloat16:
        need(f"{name} in bfloat16")
    model = _from_config(case.config(), torch.float32, seed, attn)
    _perturb(model, torch.Generator().manual_seed(seed + 1))
    if dtype != torch.float32:
        weights = model.state_dict()
        model = _from_config(case.config(), dtype, seed, attn)
        strict = [pattern.replace("*", ".*") for pattern in model._keep_in_fp32_modules_strict or ()]
        with torch.no_grad():
            for key, tensor in (*model.named_parameters(), *model.named_buffers()):
                if key in weights and tensor.is_floating_point():
                    keep = any(re.search(pattern, key) for pattern in strict)
                    tensor.data = weights[key].to(torch.float32 if keep else tensor.dtype)
    return model.train()


@cache
def _vocabulary(case: Case) -> int:
    return case.config().get_text_config().vocab_size


def batch(
    name_or_config: str | PreTrainedConfig,
    batch_size: int = 2,
    length: int = LENGTH,
    seed: int = 1,
    kind: str = "plain",
) -> dict[str, torch.Tensor]:
    """Random ``input_ids`` and ``labels``.

    "padded" rows (all but the first) end in padding of different lengths: ``attention_mask`` is 0 there
    and ``labels`` -100. "packed" rows hold several sequences each: ``position_ids`` start again at 0 inside
    the row and there is no ``attention_mask``.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is one of {KINDS}, not {kind!r}")
    if isinstance(name_or_config, str):
        case = _find(name_or_config)
        if kind not in case.kinds:
            raise ValueError(f"{case.name} takes no {kind} batch")
        vocab = _vocabulary(case)
    else:
        vocab = name_or_config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (batch_size, length), generator=generator)
    # The padding id as an ordinary token, inside the row: some embeddings give that row no gradient.
    ids[0, length // 2] = 0
    labels = ids.clone()
    out = {"input_ids": ids, "labels": labels}
    if kind == "padded":
        mask = torch.ones_like(ids)
        for row in range(1, batch_size):
            cut = max(2, length - 3 * row - 2)
            mask[row, cut:] = 0
        ids[mask == 0] = 0
        labels[mask == 0] = -100
        out["attention_mask"] = mask
    elif kind == "packed":
        positions = torch.empty_like(ids)
        for row in range(batch_size):
            first = max(1, length // 2 - 3 * (row % 3) - 1)
            second = max(1, (length - first) // 2)
            parts = [first, second, length - first - second]
            positions[row] = torch.cat([torch.arange(part) for part in parts])
        out["position_ids"] = positions
    return out
