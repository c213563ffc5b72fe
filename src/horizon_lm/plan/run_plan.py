"""The plan of a run: machine, choices with reasons, prediction. `horizon plan` prints it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from horizon_lm.config import TrainConfig, check_max_length
from horizon_lm.config.dataset_info import is_stdlib
from horizon_lm.data.detect import with_method
from horizon_lm.errors import ConfigError, DoesNotFitError, HorizonError
from horizon_lm.machine.heap import rare_collections
from horizon_lm.machine.memory import lockable_bytes
from horizon_lm.machine.profile import ASSUMED_LINKS, FALLBACK, Profile, load_profile
from horizon_lm.memory.ways import written
from horizon_lm.plan.busy import BUSY, busy_from, compute_share
from horizon_lm.plan.choose import Choice, Planner
from horizon_lm.plan.explain import explain
from horizon_lm.plan.fit import Limits
from horizon_lm.plan.fleet import ONE, Fleet, Network
from horizon_lm.plan.fleet_plan import FleetPlan, smallest
from horizon_lm.plan.largest import Largest
from horizon_lm.plan.outline import Outline, model_config
from horizon_lm.plan.outline_cache import OutlineCache
from horizon_lm.plan.predict import Prediction
from horizon_lm.plan.step_size import assumed_tokens
from horizon_lm.words import count, size


@dataclass
class Planners:
    """Planners of one model on fleets of one kind of machine. stated: host bytes of each node that the
    configuration names."""

    outline: Outline
    profile: Profile
    limits: Limits
    pinned: frozenset[str]
    stated: int | None
    _made: dict[Fleet, Planner] = field(default_factory=dict)

    def __call__(self, fleet: Fleet) -> Planner:
        if fleet not in self._made:
            self._made[fleet] = self._make(fleet)
        return self._made[fleet]

    def _make(self, fleet: Fleet) -> Planner:
        if fleet == ONE:
            return Planner(self.outline, self.profile, self.limits, self.pinned)
        network = Network.of(fleet, self.profile)
        limits = self.limits.of_fleet(fleet, self.profile, self.stated)
        profile = self.profile.of_rank(fleet.gpus_per_node)
        return Planner(self.outline, profile, limits, self.pinned, network=network)


@dataclass(frozen=True)
class RunPlan:
    """config: with the choices resolved. notes: caveats about the figures. machine: what the plan is for, and
    how reliable its figures are, in words. of_fleet: what only a plan for several ranks has."""

    config: TrainConfig
    planner: Planner
    prediction: Prediction
    choices: list[Choice]
    notes: list[str]
    machine: str
    of_fleet: FleetPlan | None = None

    @property
    def profile(self) -> Profile:
        return self.planner.profile

    def largest(self) -> dict[str, int]:
        """The largest micro-batch, sequence and number of layers that would still fit, one at a time."""
        return Largest(self.config, self.planner).sizes()

    def most_layers(self) -> int:
        """The largest number of layers that would still fit; 0 if not even one does."""
        return Largest(self.config, self.planner).layers()

    def search_ends(self) -> dict[str, int]:
        """The largest numbers that `largest` tries: a result as large may not be the last that fits."""
        return Largest(self.config, self.planner).ends()

    def all_notes(self) -> list[str]:
        """`notes`, and the advice that needs another prediction."""
        advice = self._advice()
        of_fleet = self.of_fleet.notes() if self.of_fleet is not None else []
        return [*self.notes, *of_fleet, *([advice] if advice else [])]

    @cached_property
    def busy(self) -> Prediction | None:
        """Prediction for the smallest step found of which the GPU computes nearly all the time; see
        `busy_from`."""
        opened = {choice.key for choice in self.choices if not choice.pinned}
        settings = busy_from(self.planner, self.config, opened)
        return None if settings is None else self.planner.predict(settings)

    def busy_line(self) -> str | None:
        """`busy` in words."""
        busy = self.busy
        if busy is None:
            return None
        leaner = "" if busy.settings.activations == self.config.activations else ", recomputing all layers"
        why = "; each step moves all experts" if self.planner.outline.facts.experts else ""
        tokens = count(busy.tokens, "token")
        return f"the GPU computes for {BUSY:.0%} of a step of {tokens} or more{leaner}{why}"

    def _advice(self) -> str | None:
        return self._advice_on_update() or self._advice_on_bus()

    def _advice_on_bus(self) -> str | None:
        """Advise more tokens per step if the GPU waits for what takes as long for any number."""
        found, busy = self.prediction, self.busy
        if busy is None or compute_share(found) >= BUSY or busy.tokens <= found.tokens:
            return None
        gain = busy.tokens_per_second / found.tokens_per_second - 1
        if gain < 0.05:
            return None
        return (
            f"the GPU waits for {1 - compute_share(found):.0%} of a step: {self._written(busy)} "
            f"({count(busy.tokens, 'token')} a step) would give {busy.tokens_per_second:,.0f} tokens/s, "
            f"{gain:.0%} more"
        )

    def _written(self, more: Prediction) -> str:
        """The settings of a step with more tokens."""
        if self.config.tokens_per_step is not None:
            return written({"tokens_per_step": more.tokens})
        return written({"gradient_accumulation_steps": more.micro_batches})

    def _advice_on_update(self) -> str | None:
        """Advise more tokens per step if the update limits it, which takes as long for any number."""
        found, config = self.prediction, self.config
        batches = config.gradient_accumulation_steps
        lanes = found.lanes()
        update = max(lanes.pop("update"), lanes.pop("device_update", 0.0))
        rest = max(lanes.values())
        if update <= rest:
            return None
        times = min(64, 2 ** math.ceil(math.log2(update / rest))) if rest else 2
        changes = {"gradient_accumulation_steps": batches * times}
        adds = config.round_sums == "add" and config.rounds != 1
        rounds = {"rounds": batches * times} if adds else {}  # one for each micro-batch
        more = self.planner.predict(config.replace(**changes, **rounds))
        gain = more.tokens_per_second / found.tokens_per_second - 1
        if gain < 0.05:
            return None
        if config.tokens_per_step is not None:
            changes = {"tokens_per_step": more.tokens}
        if "rounds" not in self.planner.opened:
            changes |= rounds
        return (
            f"the update takes {update / found.seconds:.0%} of a step, regardless of its tokens: "
            f"{written(changes)} ({count(more.tokens, 'token')} a step) would "
            f"give {more.tokens_per_second:,.0f} tokens/s, {gain:.0%} more"
        )

    @property
    def has_longest(self) -> bool:
        """Whether the model limits its positions."""
        return self.planner.outline.facts.positions is not None

    def _figures(self) -> str:
        if self.planner.limits.here and not self.profile.measured:
            return f"memory of this machine, times of {self.profile.name}"
        return self.profile.kind

    def _forward_passes(self) -> dict[str, float]:
        """Those of a preference method besides training's own, by key of `to_dict`."""
        found, config = self.prediction, self.config
        passes: dict[str, float] = {}
        if config.uses_kl:
            passes["kl_seconds"] = found.kl_seconds
        if config.uses_reference:
            passes["reference_seconds_per_step"] = found.reference_seconds
            passes["reference_tokens_per_second"] = found.reference_tokens_per_second
        return passes

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found, outline = self.prediction, self.planner.outline
        return {
            "hardware": {
                "name": self.profile.name,
                "title": self.profile.title,
                "figures": self._figures(),
            },
            "model": {
                "type": outline.facts.model_type,
                "parameters": outline.num_parameters,
                "trained_parameters": outline.num_trained,
                "layers": outline.num_layers,
                **({"experts": outline.facts.experts} if outline.facts.experts else {}),
            },
            "choices": [vars(choice) for choice in self.choices],
            "host_bytes": found.host,
            "device_bytes": found.device,
            "host_total": found.host_bytes,
            "device_total": found.device_bytes,
            "step_seconds": found.seconds,
            "lane_seconds": found.lanes(),
            "tokens_per_step": found.tokens,
            "tokens_per_second": found.tokens_per_second,
            **self._forward_passes(),
            "limited_by": found.limit(),
            **({"busy_tokens_per_step": self.busy.tokens} if self.busy is not None else {}),
            **({"fleet": self.of_fleet.to_dict()} if self.of_fleet is not None else {}),
            "notes": self.all_notes(),
        }


@rare_collections()
def plan_run(
    config: TrainConfig,
    hardware: str = "auto",
    pinned: frozenset[str] | None = None,
    cache: OutlineCache | None = None,
    fleet: Fleet = ONE,
) -> RunPlan:
    """Plan a run for this machine (`auto`), a shipped profile, or a profile in a file.

    pinned: the keys that the user named; by default those given to `config`. cache: earlier findings. fleet:
    how many of these machines, and ranks of each. Raises ConfigError, UnsupportedModelError, and
    DoesNotFitError if nothing fits.
    """
    pinned = frozenset(config.model_fields_set) if pinned is None else pinned
    profile, limits, notes = machine(config, hardware)
    if config.tokens_per_step == "auto":
        tokens, note = assumed_tokens(config)
        config = config.replace(tokens_per_step=tokens)
        notes.append(note)
    outline = Outline(partial(model_config, config), config, cache)
    check_max_length(config, outline.facts.positions)
    planners = Planners(outline, profile, limits, pinned, config.host_memory_bytes)
    planner = planners(fleet)
    try:
        chosen = planner.choose(config)
    except DoesNotFitError as error:
        if fleet != ONE or hardware != "auto":
            _add_smallest(error, config, planners, fleet)
        raise
    prediction = planner.predict(chosen)
    lockable = lockable_bytes() if limits.here else None
    if lockable is not None and lockable < prediction.pinned_bytes:
        notes.append(
            f"ulimit -l is {size(lockable)} and the run pins {size(prediction.pinned_bytes)}: "
            "CUDA goes beyond the limit here; hint: ulimit -l unlimited if it refuses"
        )
    if config.ref_model_name_or_path is not None:
        notes.append("the reference's pass is planned as if it had the model's size")
    title = _machine(profile, limits, prediction)
    if fleet != ONE:
        title = f"{fleet}: {title}"
        if profile.node is None:
            notes.append(f"{profile.name} has no figures of links between GPUs and nodes: {ASSUMED_LINKS}")
    of_fleet = None if fleet == ONE else FleetPlan(config, chosen, planners, fleet)
    return RunPlan(chosen, planner, prediction, explain(config, chosen, planner), notes, title, of_fleet)


def _add_smallest(error: DoesNotFitError, config: TrainConfig, planners: Planners, fleet: Fleet) -> None:
    """Add to the hint on which fleet the run would fit."""
    node = planners.profile.node
    gpus = fleet.gpus_per_node if fleet != ONE or node is None else node.gpus
    found = smallest(config, planners, gpus)
    if found is not None:
        error.hint = f"{error.hint}; the smallest fleet that trains it is {found}: {found.arguments}"


def fleet_of(nodes: str, gpus_per_node: str, hardware: str) -> Fleet:
    """Return the fleet that arguments of `horizon plan` name, "" those that are not given: one node; if there
    are several, all GPUs of the machine. Raises ConfigError."""
    values: dict[str, int] = {}
    for key, text in (("nodes", nodes), ("gpus_per_node", gpus_per_node)):
        if text:
            if not text.isdecimal() or not int(text):
                raise ConfigError(f"{key}={text!r} is not a number of at least 1", hint=f"set {key}=8")
            values[key] = int(text)
    if "nodes" in values and "gpus_per_node" not in values:
        node = load_profile(hardware).node
        values["gpus_per_node"] = 1 if node is None else node.gpus
    return Fleet(**values)


def with_method_of_data(config: TrainConfig) -> tuple[TrainConfig, list[str]]:
    """Resolve `method: auto` by the first row of each dataset, as `train` does; return notes about it.

    What is not on this machine is not read: nothing then tells it from data for sft, and the note says so.
    """
    if config.method != "auto":
        return config, []
    try:
        absent = next((d.path for d in config.datasets if not _is_here(d.path)), None)
        if absent is None:
            return with_method(config), []
        why = f"{absent} is not on this machine"
    except HorizonError as error:
        why = error.message
    return config, [f"method=auto: the data was not read ({why}); method=sft is assumed"]


def _is_here(path: str) -> bool:
    return is_stdlib(path) or Path(path).expanduser().exists()


def _machine(profile: Profile, limits: Limits, prediction: Prediction) -> str:
    if not limits.here or profile.measured:
        return f"{profile.title} ({profile.kind})"
    memory = f"{size(limits.host)} of memory to take"
    if limits.device is not None:
        memory += f" and {size(limits.device)} on the device"
    return f"this one, {memory}; times are those of {profile.name} until `horizon doctor` measures it"


def machine(config: TrainConfig, hardware: str) -> tuple[Profile, Limits, list[str]]:
    """Return the profile, its limits, and notes about them."""
    if hardware != "auto":
        profile, stated = load_profile(hardware), config.host_memory_bytes
        notes = [f"{profile.name}: {profile.kind}"]
        if stated is not None:
            notes.append(
                f"{size(stated)} of host memory as host_memory_gb states, whatever {profile.name} has"
            )
        return profile, Limits.of_profile(profile, stated), notes
    import torch

    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(
            f"device={device!r}, but torch sees no CUDA device",
            hint="set device=cpu, or hardware=NAME to plan for another machine",
        )
    limits = Limits.of_this_machine(device, config.output_dir, config.host_memory_bytes)
    profile = load_profile("auto")
    if profile.device != device.partition(":")[0]:
        profile = load_profile(FALLBACK if device == "cpu" else "h100-sxm")
    return profile, limits, []
