"""Fleets: the nodes and GPUs of a run of several ranks, and the time of its collectives."""

from __future__ import annotations

from dataclasses import dataclass

from horizon_lm.distributed.ranks import Ranks
from horizon_lm.machine.profile import Node, Profile
from horizon_lm.words import count


@dataclass(frozen=True)
class Fleet:
    """nodes, gpus_per_node: one rank per GPU. On the CPU, ranks per node."""

    nodes: int = 1
    gpus_per_node: int = 1

    @classmethod
    def of_ranks(cls, ranks: Ranks) -> Fleet:
        """That of a run, by the number of ranks on this node."""
        return cls(-(-ranks.world // ranks.local_world), ranks.local_world)

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def arguments(self) -> str:
        """As arguments of `horizon plan`."""
        return f"nodes={self.nodes} gpus_per_node={self.gpus_per_node}"

    def __str__(self) -> str:
        if self.nodes == 1:
            return count(self.gpus_per_node, "GPU")
        return f"{count(self.nodes, 'node')} x {count(self.gpus_per_node, 'GPU')}"


ONE = Fleet()


@dataclass(frozen=True)
class Network:
    """Seconds of collectives of a fleet, by the rates of its nodes.

    A node's GPUs receive each byte from other nodes once, share it over their links, and use all network
    adapters together: all-gathers and reduce-scatters run at the slower of both. What all-to-all sends to
    another rank, only that rank can use.
    """

    fleet: Fleet
    node: Node

    @classmethod
    def of(cls, fleet: Fleet, profile: Profile) -> Network:
        return cls(fleet, profile.as_node(fleet.gpus_per_node))

    def gather_seconds(self, num_bytes: float) -> float:
        """An all-gather to `num_bytes` on each rank, or a reduce-scatter of as many."""
        world, rate = self.fleet.world, self.node.peer
        if self.fleet.nodes > 1:
            across = self.node.network * self.fleet.gpus_per_node
            rate = min(rate, across) if self.fleet.gpus_per_node > 1 else across
        return (world - 1) / world * num_bytes / rate + self.least_seconds

    def all_to_all_seconds(self, num_bytes: float) -> float:
        """An all-to-all of `num_bytes` on each rank, within the node and between nodes at the same time."""
        local, nodes = self.fleet.gpus_per_node, self.fleet.nodes
        within = (local - 1) / self.fleet.world * num_bytes / self.node.peer
        across = (nodes - 1) / nodes * num_bytes / self.node.network
        return max(within, across) + self.least_seconds

    @property
    def least_seconds(self) -> float:
        """What a collective of any size takes."""
        if self.fleet.world == 1:
            return 0.0
        return self.node.network_seconds if self.fleet.nodes > 1 else self.node.peer_seconds

    @property
    def pass_on_seconds(self) -> float:
        """Numbers from rank to rank, and the last one's to all."""
        return self.fleet.world * self.node.message_seconds

    @property
    def exchange_seconds(self) -> float:
        """Small values of all ranks, to all."""
        return 2 * self.node.message_seconds * max(0, self.fleet.world - 1).bit_length()
