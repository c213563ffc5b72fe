"""Figures of the ranks of a run: time in collectives, bytes sent, the slowest rank and its busiest lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import psutil

from horizon_lm.distributed.ranks import Ranks
from horizon_lm.host_model import HostModel
from horizon_lm.schedule.draw import busy_seconds
from horizon_lm.schedule.ops import Lane


class OwnFigures:
    """Figures of this rank, from one logged step to the next."""

    def __init__(self, model: HostModel, ranks: Ranks) -> None:
        self._model, self._ranks = model, ranks
        self._last = self._totals()

    def take(self) -> dict[str, Any]:
        """Return what came since the last call, JSON-ready.

        network: seconds in collectives of the step; exchanges: seconds in those of small values; bytes: sent;
        lanes: busy seconds of each lane in the last step, if it was recorded; host: resident bytes.
        """
        totals = self._totals()
        network, exchanges, sent = (now - then for now, then in zip(totals, self._last, strict=True))
        self._last = totals
        return {
            "network": network,
            "exchanges": exchanges,
            "bytes": sent,
            "lanes": busy_seconds(self._model.timeline),
            "host": psutil.Process().memory_info().rss,
        }

    def _totals(self) -> tuple[float, float, int]:
        ranks = self._ranks
        return ranks.network_seconds, sum(ranks.wait_seconds.values()), ranks.bytes_sent


def figures_of_all(
    found: Sequence[Mapping[str, Any]], num_steps: int, tokens_per_second: float
) -> dict[str, Any]:
    """Return the entry `ranks` of a line of metrics.

    found: figures of each rank (`OwnFigures.take`) over `num_steps` steps. Returns, per step: bytes_sent by
    one rank (the most), and for each rank network_seconds in collectives and waiting_seconds: the part of
    them beyond the least of any rank, and all exchanges of small values. tokens_per_second_each: of one rank.
    slowest: the rank for which others waited most in the recorded step, and its busiest lane besides the
    network.
    """
    network = [one["network"] / num_steps for one in found]
    shortest = min(network)
    line = {
        "world": len(found),
        "tokens_per_second_each": tokens_per_second / len(found),
        "bytes_sent": max(one["bytes"] for one in found) / num_steps,
        "network_seconds": network,
        "waiting_seconds": [
            seconds - shortest + one["exchanges"] / num_steps
            for seconds, one in zip(network, found, strict=True)
        ],
        "host_rss_bytes": [one["host"] for one in found],
    }
    lanes = [dict(one["lanes"]) for one in found]
    if all(lanes):
        in_network = [own.pop(str(Lane.NETWORK), 0.0) for own in lanes]
        slowest = in_network.index(min(in_network))
        own = lanes[slowest]
        line |= {"slowest": slowest, "slowest_lane": max(own, key=lambda lane: own[lane]) if own else ""}
    return line
