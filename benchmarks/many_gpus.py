"""Many GPUs, simulated: dense models of 8 B to 1 T parameters on nodes of eight GPUs.

Every figure is **simulated**, not measured: the engine's schedule of one of the ranks, with the rates of the
shipped profiles `h100-sxm` and `h200-1.5tb` and of their nodes, whose sources say which rates are
measurements by others, which are data-sheet peaks, and what is assumed. NCCL has not run, nor has any of this
on GPUs. Kernel launches, contention for host memory between lanes, congestion of the network and
fragmentation are ignored, so times are lower bounds.

Models are known by their configuration alone: the shapes of Llama 3.1 (8 B, 70 B, 405 B) and Mistral Large
(123 B) as published, and two dense models of 1 T parameters that nobody has published: 312 layers of the
405 B model, or 192 layers of width 20480. bf16, fp32 masters and moments, clipping at 1.0, deferred updates,
sequences of 4096 tokens without padding, one rank per GPU.

| rates | matrix products | attention and elementwise operations | PCIe up / down | choices |
| --- | --- | --- | --- | --- |
| calculated | 560 TFLOP/s | take no time | 55 / 50 GB/s | recompute all layers, no residents, one round |
| 560 TFLOP/s | 560 TFLOP/s | by the profile | 55 / 50 GB/s | the same |
| shipped | 794.5 TFLOP/s | by the profile | 54.8 / 46.8 GB/s | the planner's |

The first row has the assumptions of a calculation on paper, whose results the last columns of the first table
repeat. N: all parameters. 8 N T: the time of the products of a step of T tokens that recomputes all layers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

from horizon_lm.config import TrainConfig
from horizon_lm.errors import DoesNotFitError
from horizon_lm.machine.profile import Profile, Rates, load_profile
from horizon_lm.plan.choose import Planner
from horizon_lm.plan.fit import Limits, shortfalls
from horizon_lm.plan.fleet import Fleet
from horizon_lm.plan.fleet_plan import FleetPlan, break_even, smallest
from horizon_lm.plan.outline import Outline, model_config
from horizon_lm.plan.outline_cache import OutlineCache
from horizon_lm.plan.run_plan import Planners

from .placement import layers_in_words, residents_in_words, step_in_words
from .report import Report

HARDWARE, OTHER = "h100-sxm", "h200-1.5tb"
LENGTH, GPUS = 4096, 8
_PAPER_RATE, _NO_TIME = 560e12, 1e21


def llama(width: int, mlp: int, layers: int, heads: int, vocabulary: int = 128256, **more: Any) -> dict:
    values = {"model_type": "llama", "hidden_size": width, "intermediate_size": mlp, "rms_norm_eps": 1e-5}
    values |= {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": 8}
    values |= {"vocab_size": vocabulary, "max_position_embeddings": 131072, "tie_word_embeddings": False}
    return values | more


class Setting(NamedTuple):
    """tokens: of a step. paper: tokens/s per GPU and TB of host memory in each node, as calculated."""

    name: str
    model: dict[str, Any]
    nodes: int
    tokens: int
    paper: tuple[int, float]


SETTINGS = (
    Setting("8B", llama(4096, 14336, 32, 32), 1, 1 << 17, (8890, 0.15)),
    Setting("70B", llama(8192, 28672, 80, 64), 1, 1 << 18, (1009, 1.35)),
    Setting("123B", llama(12288, 28672, 88, 96, 32768), 2, 1 << 18, (573, 1.16)),
    Setting("405B", llama(16384, 53248, 126, 128), 4, 1 << 18, (173, 1.72)),
    Setting("1T dense", llama(16384, 53248, 312, 128), 16, 1 << 20, (70, 1.30)),
    Setting("1T dense, wider", llama(20480, 69632, 192, 160), 16, 1 << 20, (70, 1.30)),
)
AS_CALCULATED = {"resident": 0, "rounds": 1, "activations": "recompute", "reduction": "exact"}
HEAD = [
    "model",
    "B parameters",
    "nodes x 8",
    "tokens/step",
    "rates",
    "tok/s per GPU",
    "of the 8 N T roofline",
]
HEAD += [
    "host TB per node",
    "device GB",
    "exact / fast, time",
    "network",
    "limited by",
    "calculated: tok/s per GPU",
]
HEAD += ["calculated: TB per node"]
CHOICES = ["model", "micro-batches of a rank", "layers", "residents", "host TB per node", "seconds to plan"]
SIZES = ["model", "tokens/step", "smallest fleet, H100", "all in device memory, H100", "the same, H200"]
EVEN = ["model", "nodes x 8", "update: tokens/step", "network: tokens per GPU", "upload: tokens per GPU"]
STEPS = ["tokens/step", "streamed: tok/s", "limited by", "planner's: tok/s", "residents", "limited by"]


def profiles() -> dict[str, Profile]:
    """The rates by name; see the table above."""
    shipped = load_profile(HARDWARE)
    rates = Rates(bfloat16=_PAPER_RATE, float32=_PAPER_RATE / 2)
    paper = shipped.model_copy(update={"matmul": rates, "h2d": 55e9, "d2h": 50e9})
    free = dict.fromkeys(("attention", "attention_backward"), Rates(bfloat16=_NO_TIME, float32=_NO_TIME))
    # Additions of gradients on the owner are elementwise too.
    calculated = paper.model_copy(update=free | {"elementwise": Rates(bfloat16=_NO_TIME, float32=_NO_TIME)})
    return {"calculated": calculated, "560 TFLOP/s": paper, "shipped": shipped}


def config_of(model: dict[str, Any], tokens: int, **values: Any) -> TrainConfig:
    return TrainConfig(
        init_model=model,
        datasets=["none"],
        max_length=LENGTH,
        tokens_per_step=tokens,
        update="deferred",
        attn_implementation="sdpa",
        device="cuda",
        **values,
    )


@dataclass(frozen=True)
class Planned:
    """A setting planned with some rates. seconds: that planning took."""

    setting: Setting
    rates: str
    plan: FleetPlan
    planner: Planner
    seconds: float

    @property
    def roofline(self) -> float:
        """Tokens per second and GPU of the products alone, recomputing all layers."""
        return self.planner.profile.matmul.bfloat16 / (8 * self.planner.outline.num_parameters)

    @cached_property
    def shortfall(self) -> str:
        short = shortfalls(self.plan.chosen, self.plan.prediction, self.planner.limits)
        return (
            f"; does not fit: {short[0].memory} memory short by {short[0].bytes / 1e9:,.0f} GB"
            if short
            else ""
        )

    def cells(self) -> list[str]:
        plan, found = self.plan, self.plan.prediction
        exact, fast = plan.seconds_by_reduction
        calculated = [f"{self.setting.paper[0]:,}", f"{self.setting.paper[1]:.2f}"]
        return [
            self.setting.name,
            f"{self.planner.outline.num_parameters / 1e9:,.1f}",
            str(plan.fleet.nodes),
            f"{found.tokens:,}",
            self.rates,
            f"{plan.rate_of_each:,.0f}",
            f"{plan.rate_of_each / self.roofline:.1%}",
            f"{plan.node_bytes / 1e12:.2f}",
            f"{found.device_bytes / 1e9:.0f}",
            f"{exact / fast:.3f}",
            f"{found.lanes()['network'] / found.seconds:.1%}",
            found.limit() + self.shortfall,
            *(calculated if self.rates == "calculated" else ["", ""]),
        ]

    def choices(self) -> list[str]:
        found = self.plan.prediction
        return [
            self.setting.name,
            step_in_words(found),
            layers_in_words(found),
            residents_in_words(found),
            f"{self.plan.node_bytes / 1e12:.2f}",
            f"{self.seconds:.0f}",
        ]


def planned(setting: Setting, rates: str, profile: Profile, cache: OutlineCache) -> Planned:
    values = {} if rates == "shipped" else AS_CALCULATED
    config = config_of(setting.model, setting.tokens, **values)
    began = time.process_time()
    planners = planners_of(config, profile, cache)
    fleet = Fleet(setting.nodes, GPUS)
    planner = planners(fleet)
    try:
        chosen = planner.choose(config)
    except DoesNotFitError:
        chosen = planner.choose(config.replace(skip_memory_check=True))
    plan = FleetPlan(config, chosen, planners, fleet)
    return Planned(setting, rates, plan, planner, time.process_time() - began)


def planners_of(config: TrainConfig, profile: Profile, cache: OutlineCache) -> Planners:
    outline = Outline(partial(model_config, config), config, cache)
    return Planners(outline, profile, Limits.of_profile(profile), frozenset(config.model_fields_set), None)


def sizes(setting: Setting, cache: OutlineCache) -> list[str]:
    """The smallest fleets for a setting."""
    config = config_of(setting.model, setting.tokens)
    cells = [setting.name, f"{setting.tokens:,}"]
    for hardware in (HARDWARE, OTHER):
        planners = planners_of(config, load_profile(hardware), cache)
        plan = FleetPlan(config, config, planners, Fleet(setting.nodes, GPUS))
        if hardware == HARDWARE:
            cells.append(str(smallest(config, planners, GPUS) or "none"))
        cells.append(str(plan.in_memory or "none"))
    return cells


def even(found: Planned) -> list[str]:
    """Break-even of the plan that streams all units."""
    figures = break_even(found.plan.prediction.costs)
    return [found.setting.name, str(found.plan.fleet.nodes), *(f"{number:,}" for number in figures)]


def steps(setting: Setting, cache: OutlineCache) -> Iterator[list[str]]:
    """Steps of fewer and more tokens: streamed as calculated, and by the planner's choices."""
    fleet = Fleet(setting.nodes, GPUS)
    for tokens in (1 << 15, 1 << 16, 1 << 17, 1 << 18, 1 << 19):
        cells = [f"{tokens:,}"]
        for values in (AS_CALCULATED, {}):
            config = config_of(setting.model, tokens, **values)
            planner = planners_of(config, load_profile(HARDWARE), cache)(fleet)
            found = planner.predict(planner.choose(config))
            cells.append(f"{found.tokens_per_second:,.0f}")
            cells += [] if values else [residents_in_words(found)]
            cells.append(found.limit())
        yield cells


def fill(report: Report, most: int | None = None) -> list[Planned]:
    """Simulate, and add the tables to a report. most: number of settings, all by default."""
    settings = list(islice(SETTINGS, most))
    caches = {setting.name: OutlineCache() for setting in settings}
    found: list[Planned] = []
    for setting in settings:
        for rates, profile in profiles().items():
            found.append(planned(setting, rates, profile, caches[setting.name]))
            print(" | ".join(found[-1].cells()), f"({found[-1].seconds:.0f} s)", flush=True)
    report.table(
        HEAD, [one.cells() for one in found], note="Simulated; nothing in this table was run on a GPU."
    )
    report.section("Choices of the planner, with the shipped rates", CHOSEN)
    report.table(CHOICES, [one.choices() for one in found if one.rates == "shipped"])
    report.section("Break-even", BROKEN_EVEN)
    report.table(EVEN, [even(one) for one in found if one.rates == "calculated"])
    report.section("How small a fleet may be", SMALLEST)
    rows = []
    for setting in settings:
        rows.append(sizes(setting, caches[setting.name]))
        print(" | ".join(rows[-1]), flush=True)
    report.table(SIZES, rows)
    if len(settings) > 1:
        setting = settings[1]
        report.section(f"Tokens of a step: {setting.name} on {Fleet(setting.nodes, GPUS)}", TOKENS)
        report.table(STEPS, list(steps(setting, caches[setting.name])))
    return found


CHOSEN = "Seconds of CPU time, one thread; the shapes of the model were measured before."
BROKEN_EVEN = """Tokens from which on the forward pass takes as long as what runs beside it, with the rates
of the calculation: the update on the host, by the tokens of a step of all ranks; gathering and uploading
weights, by the tokens of each GPU and round. The number of nodes does not change that of the update, since
each node updates its share."""
SMALLEST = """The smallest fleet on which the setting's step fits at all, of one node or of whole nodes of
eight GPUs; and the smallest with all units resident, so that nothing crosses PCIe: 14 bytes per parameter,
slots, and activations, recomputing all layers. Other in-memory training needs more: with fp32 gradients 18
bytes per parameter. H200: nodes of eight with 2 TB. None: no number of nodes suffices, since each GPU needs
slots for two layers and the head."""
TOKENS = "Streamed: no residents, one round, recomputing all layers. Both with the shipped rates."
