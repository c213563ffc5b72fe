"""Agreement: all ranks go on with the same settings, data and plan, or all stop and say which one differs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from horizon_lm.distributed.ranks import Channel, Ranks
from horizon_lm.errors import ConfigError


def agree(ranks: Ranks, values: Mapping[str, Any], channel: Channel = Channel.MAIN) -> None:
    """Return if all ranks give the same values. Collective.

    values: JSON-ready, by name: `settings`, `data`, `plan`; compared by their hash first. Raises the same
    ConfigError on all ranks, with the numbers of those that differ and the first difference.
    """
    if ranks.world == 1:
        return
    content = json.dumps(values, sort_keys=True, default=str)
    digest = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    if len(set(ranks.exchange(digest, channel))) == 1:
        return
    found = difference(ranks.exchange(json.loads(content), channel))
    if found is None:  # not a difference of values: the hashes come from the same text
        raise AssertionError("hashes differ, values do not")
    error = ConfigError(found, hint="start all ranks with the same command, files, versions and machines")
    error.is_shared = True
    raise error


def difference(values: Sequence[Mapping[str, Any]]) -> str | None:
    """Say which ranks differ from the others, and in what first; None if they are all the same.

    The others are those that share the most frequent values, of several such groups the one with the lowest
    rank.
    """
    texts = [json.dumps(one, sort_keys=True) for one in values]
    common = Counter(texts).most_common(1)[0][0]  # in order of first appearance, for equal counts
    usual = texts.index(common)
    odd = [rank for rank, text in enumerate(texts) if text != common]
    if not odd:
        return None
    path, one, other = _first(values[odd[0]], values[usual], ())
    same = [rank for rank in odd if _at(values[rank], path) == one and path]
    who = "rank " + str(odd[0]) if len(same) < 2 else "ranks " + ", ".join(map(str, same))
    has = "differs" if len(same) < 2 else "differ"
    name, *keys = path
    where = ".".join(map(str, keys))
    where = f"{where}=" if where else ""
    return f"{who} {has} from rank {usual} in {name}: {where}{_short(one)} instead of {where}{_short(other)}"


_ABSENT = object()


def _first(one: Any, other: Any, path: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any, Any]:
    """Return the path to the first difference, and both values there."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in sorted({*one, *other}):
            if not _same(one.get(key, _ABSENT), other.get(key, _ABSENT)):
                return _first(one.get(key, _ABSENT), other.get(key, _ABSENT), (*path, key))
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            if not _same(left, right):
                return _first(left, right, (*path, index))
    return path, one, other


def _at(value: Any, path: Sequence[Any]) -> Any:
    for key in path:
        inside = isinstance(value, Mapping) and key in value
        inside = inside or (isinstance(value, list) and isinstance(key, int) and key < len(value))
        if not inside:
            return _ABSENT
        value = value[key]
    return value


def _same(one: Any, other: Any) -> bool:
    """Compare as text does: NaN is NaN, 1 is not 1.0."""
    if one is _ABSENT or other is _ABSENT:
        return one is other
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def _short(value: Any) -> str:
    text = "(absent)" if value is _ABSENT else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 100 else f"{text[:60]}...{text[-37:]}"
