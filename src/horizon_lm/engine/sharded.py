"""Ops from a unit's gradient to its updated weights, with several ranks: T, V, and P, G, D, O, A on shards.

Each rank owns a shard of every gradient's sum. `exact` sends the gradients of the ranks' micro-batches at one
position to their owners, who add them in the order of the micro-batches, as one rank alone does. `fast` adds
those of a rank first, and then one sum over ranks.
"""

from __future__ import annotations

import torch

from horizon_lm.distributed.ranks import Channel, Ranks
from horizon_lm.engine.gradient import UnitGradient, download_gradient, round_gradient
from horizon_lm.engine.head_gradient import adds_in_fp32
from horizon_lm.engine.lanes import reads_on_this_lane
from horizon_lm.engine.policies import Policies
from horizon_lm.engine.step import Step
from horizon_lm.engine.updates import Updates
from horizon_lm.memory.layout import Parameter
from horizon_lm.memory.slots import GradientShards
from horizon_lm.memory.store import HostStore
from horizon_lm.optim.gradients import add_in_order, ordered_sum
from horizon_lm.optim.optimizer import Optimizer
from horizon_lm.schedule import Buffer, Op
from horizon_lm.schedule.step_spec import FAST


class ShardedUpdates(Updates):
    """`Updates` with several ranks. table: the unit of the embedding table and the table, if it has a
    gradient."""

    def __init__(
        self,
        store: HostStore,
        optimizer: Optimizer,
        policies: Policies,
        device: torch.device,
        ranks: Ranks,
        table: tuple[int, Parameter] | None,
    ) -> None:
        super().__init__(store, optimizer, policies, device, alias=False)
        self.ranks, self.device, self.table = ranks, device, table
        self.shards = GradientShards(store, policies.step_spec(policies.rounds), device)
        self.functions |= {"T": self._total, "V": self._total_rows}

    # Gradients of this rank

    def gradient(self, step: Step, op: Op) -> UnitGradient | None:
        if op.grad_slot < 0:
            return None
        place = op.unit, op.grad_slot
        if op.first:
            dtype = self.policies.contribution_dtype(
                op.unit,
                step.token_counts,
                self.store.dtype,
                adds_in_fp32=adds_in_fp32(self.device, self.store.dtype),
            )
            run = self.slots.run(op.grad_slot, op.unit, dtype)
            step.given[place] = UnitGradient(self.store.units[op.unit], run)
        return step.given[place]

    def end_micro_batch(self, step: Step, op: Op) -> None:
        """T completes what B and L leave."""

    # Sums over ranks

    def _total(self, step: Step, op: Op) -> None:
        """Add up a unit's gradients of all ranks; each gets its shard of the sum."""
        given = step.given.pop((op.unit, op.grad_slot))
        given.complete()
        run = self.slots.gathered(op.grad_slot, op.unit, given.run.dtype)
        run[given.run.numel() :].zero_()  # padding
        if op.first:
            step.totals[op.unit] = self.shards.run(op.grad_shard, op.unit)
        self._add_up(step, op, run, step.totals[op.unit], self.shards.received(op.unit, run.dtype))

    def _add_up(
        self, step: Step, op: Op, run: torch.Tensor, total: torch.Tensor, received: torch.Tensor
    ) -> None:
        """run: [world * n] of this rank. total: fp32 [n], overwritten by the first op. received: a buffer
        like `run`."""
        if step.spec.reduction == FAST:
            found = total if op.first else received[: total.numel()]
            self.ranks.reduce_scatter(run, found)
            if not op.first:
                total.add_(found)
            return
        self.ranks.all_to_all(run, received)
        parts = received.view(self.ranks.world, -1)[: step.positions.present(op.micro_batch)]
        add_in_order(total, parts.unbind(), begins=op.first)

    def _total_rows(self, step: Step, op: Op) -> None:
        """Add up the gradients of the embedding's rows; the last op adds the sums to the table's gradient."""
        assert step.rows is not None
        rows = step.tensor("row_grads", -1, -1)
        reads_on_this_lane(rows)
        dtype = torch.float32 if step.spec.reduction == FAST else rows.dtype
        share = -(-rows.numel() // self.ranks.world)
        run = torch.zeros(self.ranks.world * share, dtype=dtype, device=rows.device)
        run[: rows.numel()].copy_(rows.view(-1))
        if op.first:
            sums = torch.empty(share, dtype=torch.float32, device=rows.device)
            step.memory[Buffer("row_sums")] = sums
        sums = step.tensor("row_sums", -1, -1)
        self._add_up(step, op, run, sums, torch.empty_like(run))
        if op.grad_shard < 0:
            return
        whole = torch.empty(self.ranks.world * share, dtype=torch.float32, device=rows.device)
        self.ranks.all_gather(sums, whole)
        whole = whole[: rows.numel()].view(rows.shape)
        if step.rows.padding is not None:
            whole[step.rows.padding].zero_()
        self._add_rows(step, op, whole)

    def _add_rows(self, step: Step, op: Op, values: torch.Tensor) -> None:
        """Add values [r, width] to the rows of the table that this rank holds, as `UnitGradient.add_rows`."""
        assert step.rows is not None and self.table is not None
        unit, parameter = self.table
        is_tied = unit in step.totals  # the head's gradient is there
        total = step.totals.setdefault(unit, self.shards.run(op.grad_shard, unit))
        if not is_tied:
            total.zero_()
        piece = self.store.shards[unit].trainable_piece(parameter)
        if piece is None:
            return
        held = total[piece.offset : piece.offset + piece.numel]
        for rows, given, places in held_rows(held, piece.start, step.rows.numbers, values):
            if is_tied:
                given = rows.index_select(0, places).to(self.store.dtype) + given
            rows.index_copy_(0, places, given.to(self.store.dtype).to(rows.dtype))

    # Between rounds

    def _park(self, step: Step, op: Op) -> None:
        self.store.sum_run(op.unit).copy_(step.totals[op.unit], non_blocking=True)

    def _get_back(self, step: Step, op: Op) -> None:
        run = step.totals[op.unit] = self.shards.run(op.grad_shard, op.unit)
        run.copy_(self.store.sum_run(op.unit), non_blocking=True)

    # Complete gradients

    def _download(self, step: Step, op: Op) -> None:
        total = step.totals.pop(op.unit)
        if step.spec.update == "eager" and op.unit in step.spec.resident:
            step.square_norms[op.unit] = round_gradient(total, self.store.dtype)
            step.resident_gradients[op.unit] = total
            return
        step.square_norms[op.unit] = download_gradient(total, self.store.gradient_run(op.unit, op.slab))

    def norm_of(self, step: Step) -> float:
        """The global gradient norm; collective. Blocks are added in the order of ranks, as one rank does."""
        if step.norm_of_all is None:
            found = [step.square_norms[unit] for unit in sorted(step.square_norms)]

            def add(sums: list[float]) -> list[float]:
                return [ordered_sum(blocks, start) for blocks, start in zip(found, sums, strict=True)]

            step.norm_of_all = sum(self.ranks.pass_on([0.0] * len(found), add, Channel.UPDATE)) ** 0.5
        return step.norm_of_all

    def _may_update(self, step: Step, op: Op) -> bool:
        """Whether every rank finds its part of the gradient finite: collective, for each op, so that ops of
        two lanes need not agree on their order."""
        assert step.update is not None
        channel = Channel.UPDATE if op.kind == "O" else Channel.DEVICE_UPDATE
        may = step.update.stopped_at is None and step.is_finite(op.unit)
        if all(self.ranks.exchange(may, channel)):
            return True
        if step.update.stopped_at is None:
            step.update.stopped_at = op.unit
        return False


def held_rows(
    held: torch.Tensor, start: int, numbers: torch.Tensor, values: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Find the rows of a table in a rank's piece of it.

    held: elements [start, start + n) of the flattened table. numbers: of rows, ascending [r], on the host.
    values: of these rows [r, width]. Returns, for whole rows and for those cut at either end, the rows in
    `held` [k, columns], the columns of `values` that go there, and their places among the k.
    """
    width, stop = values.shape[1], start + held.numel()
    first, last = -(-start // width), stop // width  # whole rows
    cuts = [(first, last, 0, width)]
    if first > last:  # within one row
        cuts = [(last, first, start - last * width, stop - last * width)]
    else:
        cuts += [(first - 1, first, start % width, width)] * bool(start % width)
        cuts += [(last, last + 1, 0, stop % width)] * bool(stop % width)
    found = []
    for row, end, left, right in cuts:
        chosen = slice(*torch.searchsorted(numbers, torch.tensor([row, end])).tolist())
        if chosen.start < chosen.stop:
            begin = row * width + left - start
            rows = held[begin : begin + (end - row) * (right - left)].view(end - row, right - left)
            places = numbers[chosen].to(held.device, non_blocking=True) - row
            found.append((rows, values[chosen, left:right], places))
    return found
