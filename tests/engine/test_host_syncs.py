"""Nothing in the compute lane waits for the device."""
from __future__ import annotations

import pytest

import horizon_lm as hz
import zoo
from emulated_cuda import emulated_cuda as emulated_cuda
from emulated_cuda import watch_ops
from fake_cuda import fake_cuda as fake_cuda


@pytest.mark.parametrize("name", ["llama"])
def test_a(name, emulated_cuda):
    cuda = emulated_cuda
    model = hz.HostModel.from_pretrained(zoo.build(name), device="cuda", dtype="bfloat16", skip_memory_check=True)
    watch_ops(model.engine, cuda)
    print(model.device, type(model.engine.lanes))
    for k in range(2):
        cuda.waits.clear()
        out = model.train_step([zoo.batch(name, kind="padded")], lr=1e-3)
        print(out.loss, cuda.on_compute_lane())
    assert 0
