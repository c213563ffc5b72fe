"""Parameter groups: which parameters decay, and by what factor their learning rate differs.

A unit is one run in memory, so a group becomes segments of it; neighbours that are treated alike are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from horizon_lm.config.patterns import compiled
from horizon_lm.errors import ConfigError
from horizon_lm.memory.layout import Parameter, UnitLayout


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
    """The group of a parameter.

    Decay spares biases, norms (of any shape: Cohere's have a row for each head) and whatever else has one
    dimension (gates), as is usual for AdamW, and embedding tables on demand. lr_factors: regular
    expression -> factor; the first that is found anywhere in the parameter's name counts (`re.search`).
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
    """The unit's trainable part, cut where the group changes. Gaps go with what stands before them."""
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
    """Raises ConfigError for a pattern that is no regular expression or that no trainable parameter has."""
    names = list(names)
    for pattern in lr_factors:
        expression = compiled(pattern, "lr_factors")
        if not any(expression.search(name) for name in names):
            raise ConfigError(
                f"lr_factors: {pattern!r} is found in the name of no trainable parameter",
                hint=f"names look like {_examples(names)}",
            )


def _examples(names: Sequence[str]) -> str:
    return ", ".join(names[:: max(1, len(names) // 3)][:3]) or "nothing: all parameters are frozen"
