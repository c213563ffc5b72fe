"""The optimizer: the update of a unit in the host store, and parameter groups.

A unit is one flat buffer, so a parameter group (which parameters decay, and by what factor their learning
rate differs) becomes segments of it; neighbours that are treated alike are one segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from horizon_lm.config.patterns import compiled
from horizon_lm.errors import ConfigError
from horizon_lm.machine.cores import choose_threads
from horizon_lm.memory.layout import Parameter, UnitLayout
from horizon_lm.memory.store import HostStore
from horizon_lm.optim.kernel import longest_piece, update_run
from horizon_lm.optim.progress import Progress
from horizon_lm.optim.rules import ADAPTIVE_RULES, Hyper, Numbers, Tensors, coefficients

# Below this, waking another thread takes longer than its work.
_ELEMENTS_OF_A_THREAD = 1 << 16

Part = tuple[int, int, float, float]  # start, stop, learning rate, weight decay


@dataclass(frozen=True)
class Group:
    """decays: whether weight decay applies. lr_factor: times the learning rate of the step."""

    decays: bool = True
    lr_factor: float = 1.0


@dataclass(frozen=True)
class Segment:
    """Elements [start, stop) of a unit's trainable part that belong to one group."""

    start: int
    stop: int
    group: Group


def group_rule(
    lr_factors: Mapping[str, float],
    *,
    decay_embeddings: bool,
    is_embedding: Callable[[str], bool],
    is_norm: Callable[[str], bool],
) -> Callable[[Parameter], Group]:
    """Return the function that assigns a parameter to its group.

    Decay spares biases, norms (of any shape: Cohere's have a row for each head) and other parameters with one
    dimension (gates), as is usual for AdamW, and embedding tables on request. lr_factors: regular expression
    -> factor; the first that matches anywhere in the parameter's name counts (`re.search`).
    """
    patterns = [(compiled(pattern, "lr_factors"), factor) for pattern, factor in lr_factors.items()]

    def group(parameter: Parameter) -> Group:
        name = parameter.name
        decays = len(parameter.shape) > 1 and not name.endswith("bias") and not is_norm(name)
        if not decay_embeddings and is_embedding(name):
            decays = False
        factor = next((f for pattern, f in patterns if pattern.search(name)), 1.0)
        return Group(decays, factor)

    return group


def segments(layout: UnitLayout, group: Callable[[Parameter], Group]) -> tuple[Segment, ...]:
    """Cut the unit's trainable part where the group changes. A gap belongs to the segment before it."""
    found: list[Segment] = []
    for parameter in layout.trainable:
        start = parameter.offset - layout.trainable_offset
        mine = group(parameter)
        if found and found[-1].group == mine:
            continue
        if found:
            found[-1] = Segment(found[-1].start, start, found[-1].group)
        found.append(Segment(start, layout.trainable_numel, mine))
    return tuple(found)


def check_patterns(lr_factors: Mapping[str, float], names: Iterable[str]) -> None:
    """Raise ConfigError for an invalid regular expression, or one that matches no trainable parameter."""
    names = list(names)
    for pattern in lr_factors:
        expression = compiled(pattern, "lr_factors")
        if not any(expression.search(name) for name in names):
            raise ConfigError(
                f"lr_factors: {pattern!r} matches no trainable parameter",
                hint=f"names look like {_examples(names)}",
            )


def _examples(names: Sequence[str]) -> str:
    return ", ".join(names[:: max(1, len(names) // 3)][:3]) or "nothing: all parameters are frozen"


@dataclass(frozen=True)
class UpdateSettings:
    """The settings of one update. step: its number, from 1."""

    step: int
    lr: float
    max_grad_norm: float | None
    weight_decay: float


@dataclass(frozen=True)
class Optimizer:
    """A rule with the settings of a whole run; the others come with each step.

    rule: adamw, adam, sgd or lion. segments: per unit, the parts that are treated alike. threads: None
    uses all usable cores but `spare_cores` (results do not depend on it). core_sharers: processes that share
    the cores equally.
    """

    rule: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.0
    seed: int = 0
    segments: tuple[tuple[Segment, ...], ...] = ()
    threads: int | None = None
    spare_cores: int = 0
    core_sharers: int = 1

    @property
    def second_moment(self) -> bool:
        return self.rule in ADAPTIVE_RULES

    @cached_property
    def _threads(self) -> int:
        # choose_threads reads files: too slow for every unit of every step.
        return choose_threads(self.threads, spare=self.spare_cores, sharers=self.core_sharers)

    @cached_property
    def _groups(self) -> frozenset[Group]:
        return frozenset(s.group for unit in self.segments for s in unit) or frozenset({Group()})

    def check(self, settings: UpdateSettings) -> None:
        """Raise ConfigError unless fp32 holds every coefficient of this update, in every group.

        An update may be deferred to the next step, so unusable numbers are rejected before.
        """
        for group in self._groups:
            lr = settings.lr * group.lr_factor
            weight_decay = settings.weight_decay if group.decays else 0.0
            try:
                found = coefficients(Numbers(self.rule, self._hyper(lr, weight_decay), settings.step))
            except (ValueError, ArithmeticError) as error:
                raise self._unusable(settings, group, str(error).partition("; hint:")[0]) from None
            for name, value in vars(found).items():
                if not math.isfinite(value):
                    raise self._unusable(settings, group, f"its {name} overflows float32")

    def _unusable(self, settings: UpdateSettings, group: Group, reason: str) -> ConfigError:
        factor = f" (lr_factors={group.lr_factor:g})" if group.lr_factor != 1.0 else ""
        return ConfigError(
            f"{self.rule} cannot update with lr={settings.lr:g}{factor}, "
            f"weight_decay={settings.weight_decay:g}, adam_epsilon={self.epsilon:g}: {reason}",
            hint="usual values are lr=1e-5, weight_decay=0.1, adam_epsilon=1e-8",
        )

    def _hyper(self, lr: float, weight_decay: float) -> Hyper:
        return Hyper(lr, self.beta1, self.beta2, self.epsilon, weight_decay, self.momentum)

    def update_unit(
        self,
        store: HostStore,
        unit: int,
        grads: torch.Tensor,
        settings: UpdateSettings,
        grad_scale: float,
        progress: Progress,
    ) -> None:
        """Update what the rank holds of the unit's trainable part from `grads * grad_scale`, continuing at
        `progress`.

        grads: 1-D [trainable_share], in the memory that the unit lives in. On a device the update is launched
        on the current stream. grad_scale: the clipping factor.
        """
        first, stop = store.shards[unit].trainable_range
        before = sum(u.trainable_numel for u in store.units[:unit]) + first
        tensors = self._tensors(store, unit, grads)
        parts = _within(self._parts(unit, store.units[unit].trainable_numel, settings), first, stop)
        pieces = _cut(parts, longest_piece(tensors.weights.device))
        progress.pieces = len(pieces)
        progress.end_copies()
        for start, stop, lr, weight_decay in pieces[len(progress.ended) :]:
            hyper = self._hyper(lr, weight_decay)
            threads = max(1, min(self._threads, (stop - start) // _ELEMENTS_OF_A_THREAD))
            numbers = Numbers(self.rule, hyper, settings.step, grad_scale, before + start, self.seed)
            update_run(tensors.part(start, stop), numbers, threads=threads, progress=progress)

    def _tensors(self, store: HostStore, unit: int, grads: torch.Tensor) -> Tensors:
        """What the rank holds of a unit's trainable part, padding included."""
        residual, shard = None, store.shards[unit]
        if store.has("residual"):  # which also covers frozen parameters before the trainable ones
            residual = store.run("residual", unit)[shard.frozen_wide_share :]
        return Tensors(
            store.run("weights", unit)[shard.frozen_share :],
            residual,
            grads,
            store.run("exp_avg", unit),
            store.run("exp_avg_sq", unit) if self.second_moment else None,
        )

    def _parts(self, unit: int, numel: int, settings: UpdateSettings) -> list[Part]:
        """(start, stop, learning rate, weight decay), as few as these settings allow."""
        parts: list[Part] = []
        for segment in self.segments[unit] if self.segments else ():
            lr = settings.lr * segment.group.lr_factor
            weight_decay = settings.weight_decay if segment.group.decays else 0.0
            if parts and parts[-1][2:] == (lr, weight_decay):
                parts[-1] = (parts[-1][0], segment.stop, lr, weight_decay)
            else:
                parts.append((segment.start, segment.stop, lr, weight_decay))
        return parts or [(0, numel, settings.lr, settings.weight_decay)]


def _within(parts: list[Part], first: int, stop: int) -> list[Part]:
    """The parts of the elements [first, stop) of a unit, counted from there; if none, an empty one."""
    found = [
        (max(start, first) - first, min(end, stop) - first, lr, weight_decay)
        for start, end, lr, weight_decay in parts
        if max(start, first) < min(end, stop)
    ]
    return found or [(0, 0, *parts[0][2:])]


def _cut(parts: list[Part], longest: int | None) -> list[Part]:
    """The parts, none longer than `longest` elements."""
    if longest is None:
        return parts
    return [
        (begin, min(begin + longest, stop), lr, weight_decay)
        for start, stop, lr, weight_decay in parts
        for begin in range(start, max(stop, start + 1), longest)
    ]
