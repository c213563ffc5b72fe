"""The largest sizes of a run that would still fit, one at a time, recomputing all layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from horizon_lm.config import TrainConfig
from horizon_lm.config.memory import BOUNDARIES, TRAINABLE, per_layer
from horizon_lm.engine.homes import resident_order
from horizon_lm.memory.regions import predict_bytes
from horizon_lm.plan import fit
from horizon_lm.plan.bounds import unit_bytes
from horizon_lm.plan.choose import Planner
from horizon_lm.plan.fit import largest_that_fits
from horizon_lm.plan.predict import Prediction
from horizon_lm.plan.space import Space, listed, splits_units
from horizon_lm.plan.work import Line

# The search stops at these.
_MOST_ROWS, _MOST_TOKENS, _MOST_LAYERS = 4096, 1 << 20, 1024


@dataclass(frozen=True)
class Largest:
    """chosen: the planned configuration. A size fits if it does with the plan's choices or with leaner ones
    where `planner` was free to choose; so none found is below the plan's own."""

    chosen: TrainConfig
    planner: Planner

    def sizes(self) -> dict[str, int]:
        """The largest micro-batch, sequence, and number of layers with their parameters."""
        # One below the maximum is odd, as a rule: sizes that are rounded up show there. One sequence is a
        # special case, whose tensors need fewer copies.
        outline, chosen = self.planner.outline, self.chosen
        rows, tokens, sides = chosen.per_device_train_batch_size, chosen.max_length, chosen.sides
        outline.expect(Line("batch", tokens, max(2, sides * rows), sides * _MOST_ROWS - 1))
        outline.expect(Line("tokens", sides, tokens, self._longest - 1))
        layers = self.layers()
        return {
            "per_device_train_batch_size": largest_that_fits(self._room_of_rows, rows, _MOST_ROWS),
            "max_length": largest_that_fits(self._room_of_tokens, tokens, self._longest),
            "layers": layers,
            "parameters": outline.with_layers(layers).num_parameters if layers else 0,
        }

    def ends(self) -> dict[str, int]:
        """The largest numbers tried: a result as large may not be the last that fits."""
        return {
            "per_device_train_batch_size": _MOST_ROWS,
            "max_length": self._longest,
            "layers": _MOST_LAYERS,
        }

    def layers(self) -> int:
        """The largest number of layers; 0 if not even one fits."""
        return largest_that_fits(self._room_of_layers, self.planner.outline.num_layers, _MOST_LAYERS)

    @property
    def _longest(self) -> int:
        return self.planner.outline.facts.positions or _MOST_TOKENS

    def _room_of_rows(self, rows: int) -> int:
        return self._room(self.planner, self._base.replace(per_device_train_batch_size=rows))

    def _room_of_tokens(self, tokens: int) -> int:
        if tokens < 2:
            return -1
        return self._room(self.planner, self._base.replace(max_length=tokens, per_device_train_batch_size=1))

    def _room_of_layers(self, count: int) -> int:
        outline = self.planner.outline.with_layers(count)
        return self._room(replace(self.planner, outline=outline, _seen={}, _outlines={}), self._base)

    def _room(self, planner: Planner, base: TrainConfig) -> int:
        """Bytes left with the plan's rounds, with one, or else with all choices of the plan; negative if none
        fits. Between rounds gradients take memory, and within a round activations of its micro-batches."""
        room = self._with_rounds(planner, base)
        if room < 0 and "rounds" in self.planner.opened and base.rounds != 1:
            room = max(room, self._with_rounds(planner, base.replace(rounds=1)))
        if room < 0 and self._is_planned(planner, base):
            room = max(room, planner.room_bytes(base))
        return room

    def _is_planned(self, planner: Planner, base: TrainConfig) -> bool:
        """Whether a size is at most the plan's."""
        keys = ("per_device_train_batch_size", "max_length")
        is_within = all(getattr(base, key) <= getattr(self.chosen, key) for key in keys)
        return is_within and planner.outline.num_layers == self.planner.outline.num_layers

    @cached_property
    def _base(self) -> TrainConfig:
        chunk = "auto" if self.planner.chooses_chunk else self.chosen.loss_chunk_tokens
        return self.chosen.replace(activations="recompute", loss_chunk_tokens=chunk)

    def _with_rounds(self, planner: Planner, config: TrainConfig) -> int:
        """Bytes left with the inputs of all layers on the host or, if they are too large for it, as the plan
        has them."""
        config = config.replace(resident=self._residents(planner))
        if self.planner.profile.device == "cpu":
            return planner.room_bytes(config.replace(boundaries="auto"))
        room, rest = self._left(planner, config.replace(boundaries="host"))
        if room >= 0 or rest["host"] >= 0 or self.chosen.boundaries == "host":
            return room
        return max(room, self._left(planner, config.replace(boundaries=self._boundaries(planner)))[0])

    def _left(self, planner: Planner, config: TrainConfig) -> tuple[int, dict[str, int]]:
        """(bytes left of the memory that has least left, bytes left of each)."""
        if "resident" not in self.planner.opened:
            rest = fit.rest_bytes(config, planner.quickly(config), planner.limits)
            return min(rest.values()), rest
        rest = Pooled(planner, config).rest()
        # More residents would give the host what the device has left: a growing size takes of both, and the
        # bytes left fall along a line.
        shared = min((rest | {"host": (rest["host"] + rest["device"]) // 2}).values())
        return shared if min(rest.values()) >= 0 else min(shared, -1), rest

    def _residents(self, planner: Planner) -> int | str | list[str]:
        """As chosen, without units that the model does not have."""
        units = [planner.outline.units[unit].name for unit in resident_order(planner.outline)]
        asked = self.chosen.resident
        if isinstance(asked, list):
            return [name for name in asked if name == TRAINABLE or name in units]
        return min(asked, len(units)) if isinstance(asked, int) else asked

    def _boundaries(self, planner: Planner) -> str | list[str]:
        """As chosen, in proportion to the layers."""
        words, layers = per_layer(self.chosen.boundaries, BOUNDARIES), planner.outline.num_layers
        spilled = 0 if words is None else round(words.count("host") / len(words) * layers)
        return listed(("host", "device"), (spilled, layers - spilled))


@dataclass(frozen=True)
class Pooled:
    """A run with as few units resident as a whole as host memory allows; trainable parts are resident if they
    are in `config`. One step, without such units, is simulated: what they change of memory are the store and
    the slots."""

    planner: Planner
    config: TrainConfig

    def rest(self) -> dict[str, int]:
        """Bytes left of each memory; negative if it is too small."""
        rest = self._rest(0)
        for number in self._numbers(rest["host"]):
            rest = self._rest(number)
            if rest["host"] >= 0:
                break
        return rest

    def _numbers(self, left: int) -> Iterator[int]:
        """Numbers to try if `left` of host memory is negative: slabs of eager updates may take one more."""
        if left >= 0:
            return
        costs = self._streamed.costs
        sizes = list(accumulate(unit_bytes(costs, unit) for unit in self._space.order()))
        first = next((n for n, size in enumerate(sizes, 1) if left + size >= 0), len(sizes))
        yield from range(first, min(first + 2, len(sizes) + 1))

    @cached_property
    def _streamed(self) -> Prediction:
        return self.planner.quickly(self.config.replace(resident=self._placed(0)))

    @cached_property
    def _space(self) -> Space:
        return self.planner.space_of(self.config)

    def _placed(self, residents: int) -> int | str | list[str]:
        return self._space.placed(residents, splits_units(self.config))

    def _rest(self, residents: int) -> dict[str, int]:
        config, found = self.config.replace(resident=self._placed(residents)), self._streamed
        if residents:
            costs = self.planner.costs(config)
            stored, fixed = predict_bytes(costs.outline.units, costs.spec), found.costs.fixed_bytes()
            host = {name: stored.get(name, size) for name, size in found.host.items()}
            device = {name: size for name, size in found.device.items() if name not in fixed}
            found = replace(found, costs=costs, host=host, device=device | costs.fixed_bytes())
        return fit.rest_bytes(config, found, self.planner.limits)
