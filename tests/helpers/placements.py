"""Random placements: homes of units, rounds, sums, update modes, activation policies; and what is trained."""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

import horizon_lm as hz
import zoo
from adversarial import from_pretrained
from horizon_lm.memory.store import HostStore

Bits = dict[str, torch.Tensor]
MICRO_BATCHES = (5, 3, 4, 1, 5, 2, 5, 4, 3, 5)  # of each of the ten steps
LR, WEIGHT_DECAY, CLIPPED_AT = 1e-2, 0.1, 2.0


@dataclass(frozen=True)
class Source:
    """name: of zoo.yaml. frozen: parts of the names of frozen parameters. dropout: of each dropout module.
    is_large: tables of many blocks, whose ranges of several ranks begin within a row."""

    name: str
    frozen: tuple[str, ...] = ()
    dropout: float = 0.0
    loss_chunk_tokens: int = 64
    is_large: bool = False


SOURCES: dict[str, Source] = {
    "untied": Source("llama", loss_chunk_tokens=4),
    "tied": Source("qwen2"),
    "learned positions, dropout": Source("gpt2", dropout=0.1),
    "prologue frozen, untied": Source("gpt2-untied", frozen=("wpe",)),
    "experts, router's loss": Source("mixtral-aux"),
    "experts, shared": Source("deepseek_v3"),
    "Gemma": Source("gemma3_text", loss_chunk_tokens=4),
    "linear attention": Source("qwen3_next"),
    "state space": Source("mamba2"),
    "wide fp32 parameters": Source("flint"),
    "frozen parts": Source("qwen3", frozen=("layers.0", "layers.2.mlp", "embed_tokens")),
    "frozen table, untied": Source("phi3", frozen=("embed", "layers.0", "layers.1")),
}


@dataclass(frozen=True)
class Numbers:
    """What a result depends on: all else may change no bit."""

    dtype: str = "float32"
    moment_dtype: str = "float32"
    clips: bool = True
    optim: str = "adamw"


NUMBERS = [
    Numbers(),
    Numbers("bfloat16"),
    Numbers("bfloat16", "bfloat16"),
    Numbers(moment_dtype="bfloat16", clips=False),
    Numbers("bfloat16", clips=False),
]


_LARGE = {
    "vocab_size": 700,
    "hidden_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 14,
    "intermediate_size": 300,
}


@cache
def _built(name: str, is_large: bool) -> Any:
    if not is_large:
        return zoo.build(name)
    config = zoo.CASES[name].config()
    for key, value in _LARGE.items():
        setattr(config, key, value)
    made = zoo._from_config(config, torch.float32, seed=0, attn="sdpa")
    zoo._perturb(made, torch.Generator().manual_seed(1))
    return made.train()


def built(source: Source) -> Any:
    return copy.deepcopy(_built(source.name, source.is_large))


def model(source: Source, numbers: Numbers, seed: int = 0, **settings: Any) -> hz.HostModel:
    """seed: of the order of ops, if lanes are adversarial."""
    made = built(source)
    for key, parameter in made.named_parameters():
        parameter.requires_grad_(not any(part in key for part in source.frozen))
    for module in made.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = source.dropout
    host = from_pretrained(
        made,
        device="cpu",
        dtype=numbers.dtype,
        moment_dtype=numbers.moment_dtype,
        optim=numbers.optim,
        skip_memory_check=True,
        loss_chunk_tokens=source.loss_chunk_tokens,
        **({"max_grad_norm": CLIPPED_AT if numbers.clips else None} | settings),
    )
    if settings.get("lanes") == "adversarial":
        host.engine.lanes.random.seed(seed)
    return host


def batches(source: Source, step: int, count: int) -> list[dict[str, torch.Tensor]]:
    made = [zoo.batch(source.name, batch_size=1, length=7, seed=100 * step + m + 1) for m in range(count)]
    if source.is_large:  # ids of the whole vocabulary
        for batch in made:
            for name in ("input_ids", "labels"):
                ids = batch[name]
                batch[name] = torch.where(ids < 0, ids, ids * 37 % _LARGE["vocab_size"])
    return made


def bits(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone().contiguous().flatten().view(torch.uint8)


def state(host: hz.HostModel) -> Bits:
    """Every region that outlives a step, and the parameters by name, as bytes."""
    host.flush()
    store = host.store
    found = {
        f"{region}.{store.units[unit].name}": bits(_whole(store, region, unit))
        for region in ("weights", "residual", "exp_avg", "exp_avg_sq")
        if store.has(region)
        for unit in range(len(store.units))
    }
    return found | {name: bits(value) for name, value in host.named_parameters()}


def _whole(store: HostStore, region: str, unit: int) -> torch.Tensor:
    """A unit's flat buffer; of a split unit, both parts of its weights."""
    found = store.host_copy(region, unit)
    is_cut = region == "weights" and store.is_split(unit)
    return torch.cat([store.host_copy("frozen", unit), found]) if is_cut else found


@dataclass
class Outcome:
    """Losses, norms, router losses and an evaluation; the state at the end; gradients of one more step,
    unless updates are eager."""

    numbers: list[float]
    norms: list[float]
    state: Bits
    gradients: Bits

    def differences(self, other: Outcome) -> list[str]:
        pairs = zip(self.numbers, other.numbers, strict=True)
        found = [f"number {i}" for i, (one, two) in enumerate(pairs) if one != two]
        both = self.gradients and other.gradients
        for one, two in ((self.state, other.state), *([(self.gradients, other.gradients)] if both else [])):
            assert one.keys() == two.keys()
            found += [key for key, value in one.items() if not torch.equal(value, two[key])]
        return found


def trained(host: hz.HostModel, source: Source, steps: int = len(MICRO_BATCHES)) -> Outcome:
    found: list[float] = []
    norms: list[float] = []
    for step, count in enumerate(MICRO_BATCHES[:steps]):
        out = host.train_step(batches(source, step, count), lr=LR, weight_decay=WEIGHT_DECAY)
        found += [out.loss, out.grad_norm, *out.router_losses]
        norms.append(out.grad_norm)
        if step == steps // 2:
            found.append(host.evaluate(batches(source, 99, 2)).loss)
    end, gradients = state(host), {}
    if host.settings.update_mode != "eager":
        host.forward_backward(batches(source, 50, 5))
        gradients = {name: bits(value) for name, value in host.named_gradients()}
    return Outcome(found, norms, end, gradients)


@cache
def plain(key: str, numbers: Numbers) -> Outcome:
    """In place, nothing resident, one round."""
    source = SOURCES[key]
    return trained(model(source, numbers, update="deferred"), source)


@cache
def unit_names(name: str) -> tuple[str, ...]:
    """Names of the units with weights."""
    host = model(Source(name), Numbers())
    return tuple(unit.name for unit in host.store.units if unit.numel)


def sampled(rng: random.Random, source: Source, numbers: Numbers, *, parts: bool = False) -> dict[str, Any]:
    """Random settings that change no bit. parts: frozen parts may be streamed alone, as on one rank only."""
    names = unit_names(source.name)
    outer = [name for name in names if not name.startswith("layer ")]
    layers = len(names) - len(outer)
    resident = rng.choice(
        [
            0,
            outer,
            rng.randrange(len(names) + 1),
            len(names),
            rng.sample(names, rng.randint(1, len(names))),
            *(["trainable", ["trainable", *rng.sample(names, 1)]] if parts and source.frozen else []),
        ]
    )
    rounds = rng.choice([1, 2, 3, 5])
    words = ["recompute", "attention", "products", "keep"]
    policy = rng.choice([*words, [rng.choice(words) for _ in range(layers)]])
    spilled = rng.choice(["device", "host", [rng.choice(["device", "host"]) for _ in range(layers)]])
    modes = ["deferred", "sync"] if numbers.clips else ["eager", "eager", "deferred", "sync"]
    return {
        "resident": resident,
        "rounds": rounds,
        "round_sums": rng.choice(["device", "host", "add"] if rounds == 5 else ["device", "host"]),
        "update": rng.choice(modes),
        "activations": policy,
        "boundaries": spilled,
        "boundary_slots": rng.randint(1, 3),
        "checkpoint_interval": rng.choice([1, 1, 2, 3]),
        "slots": rng.randint(2, 4),
        "grad_slots": rng.randint(1, 3),
        "grad_slabs": rng.randint(1, 3),
        "lanes": rng.choice(["inline", "adversarial", "adversarial"]),
    }
