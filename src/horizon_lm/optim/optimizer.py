"""The update of a unit in the host store, by the C++ kernel or the torch reference (same bits)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from horizon_lm.errors import ConfigError
from horizon_lm.machine.cores import choose_threads
from horizon_lm.memory.store import HostStore
from horizon_lm.optim.groups import Group, Segment
from horizon_lm.optim.kernel import longest_piece, update_run
from horizon_lm.optim.progress import Progress
from horizon_lm.optim.rules import ADAPTIVE_RULES, Hyper, coefficients

# Below this, to wake another thread takes longer than what it would do.
_ELEMENTS_OF_A_THREAD = 1 << 16

Part = tuple[int, int, float, float]  # start, stop, learning rate, weight decay


@dataclass(frozen=True)
class UpdateSettings:
    """What a call of `step` asks for. step: number of this update, from 1."""

    step: int
    lr: float
    max_grad_norm: float | None
    weight_decay: float


@dataclass(frozen=True)
class Optimizer:
    """A rule with the settings that hold for a whole run; the others come with each step.

    rule: adamw, adam, sgd or lion. segments: per unit, the parts that are treated alike. threads: None
    takes all usable cores (the bits do not depend on it).
    """

    rule: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    momentum: float = 0.0
    seed: int = 0
    segments: tuple[tuple[Segment, ...], ...] = ()
    threads: int | None = None

    @property
    def second_moment(self) -> bool:
        return self.rule in ADAPTIVE_RULES

    @cached_property
    def _threads(self) -> int:
        return choose_threads(self.threads)  # which reads files, too slow for every unit of every step

    @cached_property
    def _groups(self) -> frozenset[Group]:
        return frozenset(s.group for unit in self.segments for s in unit) or frozenset({Group()})

    def check(self, settings: UpdateSettings) -> None:
        """Raise ConfigError unless fp32 holds every coefficient of this update, in every group.

        An update may be put off until the next step, so what it cannot compute with is refused before.
        """
        for group in self._groups:
            lr = settings.lr * group.lr_factor
            weight_decay = settings.weight_decay if group.decays else 0.0
            try:
                found = coefficients(self.rule, self._hyper(lr, weight_decay), settings.step, 1.0)
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
        """Update the unit's trainable part in place from `grads * grad_scale`, from where `progress` is on.

        grads: 1-D [trainable_numel], in host memory. grad_scale: the clipping factor.
        """
        layout = store.units[unit]
        before = sum(u.trainable_numel for u in store.units[:unit])
        runs, threads = self._runs(store, unit), self._threads
        pieces = _cut(self._parts(unit, layout.trainable_numel, settings), longest_piece())
        progress.pieces = len(pieces)
        progress.end_copies()
        for start, stop, lr, weight_decay in pieces[len(progress.ended) :]:
            weights, residual, exp_avg, exp_avg_sq = (None if r is None else r[start:stop] for r in runs)
            assert weights is not None and exp_avg is not None
            update_run(
                self.rule,
                weights,
                residual,
                grads[start:stop],
                exp_avg,
                exp_avg_sq,
                hyper=self._hyper(lr, weight_decay),
                step=settings.step,
                grad_scale=grad_scale,
                element_offset=before + start,
                seed=self.seed,
                threads=max(1, min(threads, (stop - start) // _ELEMENTS_OF_A_THREAD)),
                progress=progress,
            )

    def _runs(self, store: HostStore, unit: int) -> tuple[torch.Tensor | None, ...]:
        """Weights, residual and moments of the trainable part."""
        layout = store.units[unit]
        residual = None
        if store.has("residual"):  # which also covers frozen parameters before the trainable ones
            residual = store.run("residual", unit)[layout.trainable_offset - layout.wide_offset :]
        exp_avg_sq = store.run("exp_avg_sq", unit) if self.second_moment else None
        return (
            store.run("weights", unit)[layout.trainable_offset :],
            residual,
            store.run("exp_avg", unit),
            exp_avg_sq,
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


def _cut(parts: list[Part], longest: int | None) -> list[Part]:
    """The parts, none longer than `longest` elements."""
    if longest is None:
        return parts
    return [
        (begin, min(begin + longest, stop), lr, weight_decay)
        for start, stop, lr, weight_decay in parts
        for begin in range(start, max(stop, start + 1), longest)
    ]
