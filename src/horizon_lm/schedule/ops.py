"""A training step as plain data: ops on lanes that read and write named buffers.

An op is printed and parsed as its kind, unit and micro-batch: `U3` uploads unit 3, `B3.1` is the backward
pass of unit 3 on micro-batch 1. Independent of torch, streams and threads.

Kinds, in the order of a step (u: unit, m: micro-batch):

    Uu     upload    weights of unit u into a device slot                      upload
    Ju     join      gather unit u's weights from all ranks into the slot       network
    Qu     unpack    the packed weights of unit u from a staging slot into one   compute
    Fu.m   forward   look-up and prologue (u = 0), or a decoder layer            compute
    Xu.m   spill     the layer's input to host memory                           download
    Lu.m   loss      head: final norm, logits and loss by chunks, their gradients compute
    Eu.m   evaluate  head: the loss, and each token's log-probability            compute
    Ru.m   restore   the layer's input back into a device slot                  upload
    Cu.m   recompute a layer of a block, for the inputs of the layers above it   compute
    Bu.m   backward  recompute what was not kept, then the gradients of unit u
                     (u = 0: of the embedding table's rows as well)              compute
    Tu.m   total     add up gradients of unit u over ranks, each its share      network
    V0.m   rows      the same for the embedding table's rows                    network
    Pu.m   park      the gradient of unit u that later rounds add to, to host memory download
    Su.m   sum       add that of one micro-batch to the sum in host memory        update
    Gu.m   get back  that sum into a gradient slot                               upload
    Du     download  gradient slot to the unit's home, squared norm on the way  download
    N      norm      global gradient norm and the clipping factor               update
    Ou     optimize  optimizer step of unit u on the host                       update
    Au     apply     optimizer step of unit u on the device, where it lives      device_update
    Wu     write     weights and optimizer state of unit u to a checkpoint      disk

A step of several rounds repeats U to V for the micro-batches of each; P, S and G carry the gradients from one
round to the next. A resident unit has no U, and A instead of O; a split one has U for its frozen part.
Where units are packed, U fills a staging slot, and Q the weight slot.

J, T and V are collectives: all ranks run them in the same order. They occur in shared steps only
(`StepSpec.is_shared`), where a rank holds a share of every unit: U brings it to the device, and P, G, D, O
and A work on the rank's share of the gradient.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class Lane(StrEnum):
    """Execution queue of an op. Ops of one lane run in program order; lanes run concurrently."""

    UPLOAD = "upload"
    COMPUTE = "compute"
    DOWNLOAD = "download"
    UPDATE = "update"
    DEVICE_UPDATE = "device_update"
    DISK = "disk"
    NETWORK = "network"


LANE_OF_KIND = {
    "U": Lane.UPLOAD,
    "Q": Lane.COMPUTE,
    "F": Lane.COMPUTE,
    "L": Lane.COMPUTE,
    "E": Lane.COMPUTE,
    "C": Lane.COMPUTE,
    "B": Lane.COMPUTE,
    "R": Lane.UPLOAD,
    "X": Lane.DOWNLOAD,
    "D": Lane.DOWNLOAD,
    "P": Lane.DOWNLOAD,
    "S": Lane.UPDATE,
    "G": Lane.UPLOAD,
    "N": Lane.UPDATE,
    "O": Lane.UPDATE,
    "A": Lane.DEVICE_UPDATE,
    "W": Lane.DISK,
    "J": Lane.NETWORK,
    "T": Lane.NETWORK,
    "V": Lane.NETWORK,
}


class Buffer(NamedTuple):
    """A named region of memory: `weights.3`, `slot.0`, `input.3.1` (input of unit 3, micro-batch 1)."""

    region: str
    index: int = -1  # type: ignore[assignment]  # hides tuple.index, which is not needed
    micro_batch: int = -1

    def __str__(self) -> str:
        parts = [self.region]
        if self.index >= 0:
            parts.append(str(self.index))
        if self.micro_batch >= 0:
            parts.append(str(self.micro_batch) if self.index >= 0 else f"m{self.micro_batch}")
        return ".".join(parts)


@dataclass(frozen=True)
class Op:
    """A scheduled action.

    slot: weight slot (U, Q, F, L, E, C, B); none of a resident unit. staging: slot of packed weights (U, Q).
    grad_slot: gradient slot (L, B, P, G, D, eager A). slab: host buffer of an eager unit's gradient (D, O).
    sum_slab: host buffer of a gradient to be added on the host (P, S). boundary_slot: device slot of a stored
    input (R, C, B). table, table_grad: weight slot (F0) and gradient slot (the last B0) of the embedding
    table.
    first: overwrites the gradient or the sum; later ops add to it. policy: what F and C leave for the
    backward pass (`StepSpec.policy`). step: the step whose data or gradients the op works on.

    In a shared step, U fills `shard`, a device buffer of the rank's share, and J gathers shares from it
    (residents: from their home) into `slot`. T takes gradients from `grad_slot` (L, B, T) and adds the
    rank's share to `grad_shard`, on which the last V, P, G, D and eager A work too.
    """

    kind: str
    unit: int = -1
    micro_batch: int = -1
    reads: frozenset[Buffer] = frozenset()
    writes: frozenset[Buffer] = frozenset()
    slot: int = -1
    grad_slot: int = -1
    slab: int = -1
    sum_slab: int = -1
    boundary_slot: int = -1
    table: int = -1
    table_grad: int = -1
    first: bool = False
    policy: str = ""
    step: int = 0
    shard: int = -1
    grad_shard: int = -1
    staging: int = -1

    @property
    def lane(self) -> Lane:
        return LANE_OF_KIND[self.kind]

    def at(self, step: int) -> Op:
        """Return the op of another step. Plans take thousands; `dataclasses.replace` is five times slower."""
        if self.step == step:
            return self
        made = object.__new__(Op)
        made.__dict__.update(self.__dict__, step=step)
        return made

    def __str__(self) -> str:
        unit = str(self.unit) if self.unit >= 0 else ""
        micro_batch = f".{self.micro_batch}" if self.micro_batch >= 0 else ""
        return f"{self.kind}{unit}{micro_batch}"


_OP_TEXT = re.compile(r"([A-Z])([0-9]*)(?:\.([0-9]+))?")


def parse_op(text: str) -> tuple[str, int, int]:
    """Parse `"B3.1"` to `("B", 3, 1)`; absent numbers are -1. Raises ValueError on anything else."""
    match = _OP_TEXT.fullmatch(text)
    if match is None or match[1] not in LANE_OF_KIND:
        raise ValueError(
            f"not an op: {text!r}; hint: write a kind of {''.join(LANE_OF_KIND)}, like U3 or B3.1"
        )
    return match[1], int(match[2] or -1), int(match[3]) if match[3] is not None else -1
