"""Schedules of several ranks: do all run the same one, and can they end?"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import fields

from horizon_lm.schedule.ops import Lane, Op
from horizon_lm.schedule.waits import derive_waits

_DEFAULTS = {field.name: field.default for field in fields(Op)}
_ALL = -1  # in place of a rank, for an op that all ranks run together

Waits = Sequence[tuple[int, ...]]
# (rank, or _ALL; lane; text and step of the op; how often it occurred before)
_Node = tuple[int, Lane, str, int]


def digest(ops: Sequence[Op]) -> str:
    """Hash all fields of all ops, in order: the same on two ranks if, and only if, their schedules are."""
    found = hashlib.sha256()
    for op in ops:
        for name, default in _DEFAULTS.items():
            value = getattr(op, name)
            if value != default:
                text = ",".join(map(str, sorted(value))) if isinstance(value, frozenset) else str(value)
                found.update(f"{name}={text};".encode())
        found.update(b"\n")
    return found.hexdigest()


def is_collective(op: Op) -> bool:
    """Whether an op of a schedule of several ranks ends only once all ranks run it: they exchange weights and
    gradients (J, T, V), parts of the norm (N, unless the caller has asked for it), and of eager updates
    whether gradients are finite (O, A)."""
    eager = op.kind in "OA" and any(buffer.region == "sqnorm" for buffer in op.reads)
    return op.lane is Lane.NETWORK or op.kind == "N" or eager


def check_world(lists: Sequence[Sequence[Op]], waits: Sequence[Waits] | None = None) -> list[str]:
    """Return all errors in the schedules of all ranks (program order, by rank); empty if they end.

    Each lane must run the same collectives in the same order on all ranks; and no op may wait for itself
    when each collective is one op. waits: by rank, as `derive_waits` gives.
    """
    if waits is None:
        waits = [derive_waits(ops) for ops in lists]
    return [*_check_same(lists), *_check_ends(lists, waits)]


def _check_same(lists: Sequence[Sequence[Op]]) -> Iterator[str]:
    """Compare each rank's collectives with those of most ranks."""
    for lane in Lane:
        met = [tuple(map(_text, (o for o in ops if o.lane is lane and is_collective(o)))) for ops in lists]
        usual, number = Counter(met).most_common(1)[0] if met else ((), 0)
        for rank, mine in enumerate(met) if number < len(met) else ():
            if mine != usual:
                both = zip(mine, usual, strict=False)
                k = next((k for k, (a, b) in enumerate(both) if a != b), min(len(mine), len(usual)))
                one, other = (", ".join(found[k : k + 1]) or "nothing" for found in (mine, usual))
                yield (
                    f"rank {rank} runs {one} as collective {k} of lane {lane}, where rank {met.index(usual)} "
                    f"runs {other}"
                )


def _check_ends(lists: Sequence[Sequence[Op]], waits: Sequence[Waits]) -> list[str]:
    """Find ops that wait for each other, across ranks."""
    before: dict[_Node, set[_Node]] = defaultdict(set)
    for rank, (ops, mine) in enumerate(zip(lists, waits, strict=True)):
        nodes = _nodes(rank, ops)
        last: dict[Lane, _Node] = {}
        for op, node, targets in zip(ops, nodes, mine, strict=True):
            before[node] |= {nodes[j] for j in targets}
            if op.lane in last:
                before[node].add(last[op.lane])
            last[op.lane] = node
    left = _that_never_run(before)
    if not left:
        return []
    path = [min(left)]
    while path[-1] not in path[:-1]:
        path.append(min(before[path[-1]] & left))
    circle = [text if rank == _ALL else f"{text} of rank {rank}" for rank, _, text, _ in path]
    start = path.index(path[-1])
    return [f"no rank can go on: {', which waits for '.join(circle[start:])}"]


def _nodes(rank: int, ops: Sequence[Op]) -> list[_Node]:
    seen: Counter[_Node] = Counter()
    found = []
    for op in ops:
        node = (_ALL if is_collective(op) else rank, op.lane, _text(op), 0)
        found.append((*node[:3], seen[node]))
        seen[node] += 1
    return found


def _that_never_run(before: dict[_Node, set[_Node]]) -> set[_Node]:
    """Return the nodes that are in a circle, or after one."""
    after: dict[_Node, list[_Node]] = defaultdict(list)
    for node, earlier in before.items():
        for other in earlier:
            after[other].append(node)
    missing = {node: len(earlier) for node, earlier in before.items()}
    ready = [node for node, count in missing.items() if not count]
    while ready:
        for node in after[ready.pop()]:
            missing[node] -= 1
            if not missing[node]:
                ready.append(node)
    return {node for node, count in missing.items() if count}


def _text(op: Op) -> str:
    return f"{op} of step {op.step}"
