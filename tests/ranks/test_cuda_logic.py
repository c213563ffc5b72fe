"""Several ranks on CUDA lanes, with an emulated device: one thread per lane, streams, device kernels.

Ranks are threads of this process. They compute the bits of one rank on such a device, and their network lanes
never wait for it.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

import placements
from emulated_cuda import EmulatedCuda, watch_ops
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.config.python import model_settings
from horizon_lm.distributed.ranks import ALONE, Ranks
from horizon_lm.engine.lanes import CudaLanes
from horizon_lm.host_model import HostModel
from horizon_lm.optim import optimizer
from horizon_lm.schedule import Lane
from placements import Source
from threaded_ranks import on_ranks

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCES = {"tied": Source("qwen2", is_large=True), "untied": Source("llama", is_large=True)}


def trained(source: Source, ranks: Ranks, cuda: EmulatedCuda, settings: dict[str, Any]) -> list[Any]:
    with cuda.modes() if ranks.world > 1 else nullcontext():  # the fixture's are of the calling thread
        resolved = model_settings("test", "cuda", "bfloat16", {"skip_memory_check": True, **settings})
        host = HostModel(placements.built(source), resolved, ranks=ranks)
        watch_ops(host.engine, cuda)
        assert isinstance(host.engine.lanes, CudaLanes)
        found: list[Any] = []
        for step, count in enumerate((3, 4)):
            out = host.train_step(placements.batches(source, step, count), lr=1e-2, weight_decay=0.1)
            found += [out.loss, out.grad_norm]
        return [*found, *(placements.bits(value).tolist() for _, value in host.named_parameters())]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("tied", {"update": "deferred"}),
        ("untied", {"update": "eager", "resident": 3, "max_grad_norm": None}),
        ("tied", {"update": "sync", "rounds": 2, "round_sums": "host", "boundaries": "host", "resident": 1}),
    ],
    ids=["deferred", "eager", "rounds"],
)
def test_cuda_lanes_compute_the_bits_of_one_rank(
    kind: str, settings: dict[str, Any], emulated_cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = optimizer.update_run

    def update_run(*args: Any, **kwargs: Any) -> None:  # the host's kernel stands for the device's
        with torch._C.DisableTorchFunction():
            real(*args, **kwargs)

    monkeypatch.setattr(optimizer, "update_run", update_run)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
    expected = trained(SOURCES[kind], ALONE, emulated_cuda, settings)
    emulated_cuda.waits.clear()
    for found in on_ranks(2, lambda ranks: trained(SOURCES[kind], ranks, emulated_cuda, settings)):
        assert found == expected
    waits = [(str(op), why) for op, why in emulated_cuda.waits if op is not None and op.lane is Lane.NETWORK]
    assert not waits
