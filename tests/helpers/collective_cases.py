"""Cases that all ranks of a pool run together."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch

from horizon_lm.distributed.ranks import Channel
from rank_pool import ranks

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int16,
    torch.int64,
    torch.uint8,
    torch.bool,
)


def content(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Random bits of a rank."""
    bits = torch.randint(0, 256, (numel, dtype.itemsize), generator=torch.Generator().manual_seed(rank))
    return (bits % 2 if dtype == torch.bool else bits).to(torch.uint8).view(-1).view(dtype)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def tensors(numel: int) -> list[torch.dtype]:
    """Return the dtypes that arrived unchanged."""
    this = ranks()
    for dtype in DTYPES:
        all_of = [content(rank, numel, dtype) for rank in range(this.world)]
        out = torch.empty(numel * this.world, dtype=dtype)
        this.all_gather(all_of[this.rank], out)
        assert same(out, torch.cat(all_of)), dtype

        given = [content(rank, numel * this.world, dtype) for rank in range(this.world)]
        this.all_to_all(given[this.rank], out)
        assert same(out, torch.cat([each.view(this.world, -1)[this.rank] for each in given])), dtype

        gathered, everywhere = this.gather(all_of[this.rank]), this.gather_all(all_of[this.rank])
        assert (gathered is None) == (this.rank > 0)
        for found in (gathered, everywhere):
            assert found is None or all(same(a, b) for a, b in zip(found, all_of, strict=True)), dtype
    return list(DTYPES)


def reduction(numel: int) -> bytes:
    """Sums are those of additions in rank order; returns this rank's."""
    this = ranks()
    given = [
        torch.randn(numel * this.world, generator=torch.Generator().manual_seed(r)) for r in range(this.world)
    ]
    out = torch.empty(numel)
    this.reduce_scatter(given[this.rank], out)
    wanted = torch.zeros(numel)
    for each in given:
        wanted += each.view(this.world, -1)[this.rank]
    assert torch.equal(out, wanted)
    return out.numpy().tobytes()


def values(channel: str) -> list[Any]:
    """Values of all sizes, different on each rank; floats keep their bits."""
    this, on = ranks(), Channel(channel)
    short = {"rank": this.rank, "text": "ä€\n"}
    assert this.exchange(short, on) == [{"rank": rank, "text": "ä€\n"} for rank in range(this.world)]
    for size in (0, 240, 245, 246, 247, 300, 100_000):
        assert this.exchange("x" * (size + this.rank), on) == ["x" * (size + r) for r in range(this.world)]
    assert this.exchange("y" * 1000 if this.rank == this.world - 1 else None, on)[-1] == "y" * 1000
    numbers = [0.1, -0.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, 2.0**60 + 1, this.rank / 3]
    back = this.exchange(numbers, on)[this.rank]
    assert struct.pack("8d", *back) == struct.pack("8d", *numbers)
    assert math.isnan(this.exchange(math.nan, on)[0])
    assert this.from_first({"a": [1, None]} if this.rank == 0 else "ignored", on) == {"a": [1, None]}
    assert this.from_first("z" * 5000 if this.rank == 0 else None, on) == "z" * 5000
    this.barrier(on)
    return this.from_first([this.rank], on)


def passed_on(terms: list[list[float]]) -> list[float]:
    """Sum terms[rank] one after the other to two running sums."""
    this = ranks()

    def add(sums: list[float]) -> list[float]:
        for term in terms[this.rank]:
            sums = [sums[0] + term, sums[1] - term]
        return sums

    return this.pass_on([0.5, 0.0], add)


def counters() -> list[tuple[int, bool, list[str]]]:
    """What each kind of collective adds: bytes, whether time on the network, channels with time."""
    this, found = ranks(), []
    own, whole = torch.ones(1000), torch.ones(1000 * this.world)
    for call in (
        lambda: this.all_gather(own, whole),
        lambda: this.all_to_all(whole.bfloat16(), whole.bfloat16()),
        lambda: this.reduce_scatter(whole, own),
        lambda: this.exchange(1, Channel.DISK),
        lambda: this.gather_all(own),
    ):
        before = this.bytes_sent, this.network_seconds, dict(this.wait_seconds)
        call()
        sent, waited = (
            this.bytes_sent - before[0],
            {c for c in Channel if this.wait_seconds[c] > before[2][c]},
        )
        on_network = this.network_seconds > before[1]
        found.append((sent, on_network, sorted(waited)))
    return found


def place() -> tuple[int, ...]:
    this = ranks()
    return this.rank, this.world, this.local_rank, this.local_world, this.core_sharers
