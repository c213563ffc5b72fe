"""Trainers on a device, which is emulated on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from transformers import TrainingArguments

from emulated_cuda import CUDA, EmulatedCuda, watch_ops
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.host_model import HostModel
from trainer_pairs import build

pytestmark = pytest.mark.usefixtures("one_thread")

# Waits of a micro-batch for the device by our own code: the guard that compares a call's labels with those of
# the batch, which DPO makes anew. All others are TRL's, which reads each metric.
WAITS = {"plain": {}, "dpo": {"aten::equal: a value is read": 1}}
_OF_TRL = {"aten::_local_scalar_dense: a value is read", "aten::index: by booleans"}
_STEPS = {"max_steps": 2, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1}


@pytest.mark.parametrize("method", WAITS)
def test_steps_and_evaluations_on_a_device(
    method: str, emulated_cuda: EmulatedCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_cpu = build(method, "llama", tmp_path, ours=True, **_STEPS)
    on_cpu.train()
    real = HostModel.__init__

    def watched(self: Any, *args: Any) -> None:
        real(self, *args)
        watch_ops(self.engine, emulated_cuda)

    monkeypatch.setattr(HostModel, "__init__", watched)
    monkeypatch.setattr(TrainingArguments, "device", property(lambda args: (args._setup_devices, CUDA)[1]))
    monkeypatch.setattr(accelerate.Accelerator, "device", property(lambda self: CUDA))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "emulated")
    trainer = build(method, "llama", tmp_path, ours=True, **_STEPS)
    assert trainer.host.device.type == "cuda"
    emulated_cuda.waits.clear()
    trainer.train()
    ours = emulated_cuda.on_compute_lane()
    if method != "plain":
        ours = {what: times for what, times in ours.items() if what not in _OF_TRL}
    assert ours == {k: 4 * v for k, v in WAITS[method].items()}
    assert not emulated_cuda.mixed
    names = ("loss", "grad_norm", "eval_loss")
    mine, wanted = (
        [line[name] for line in one.state.log_history for name in names if name in line]
        for one in (trainer, on_cpu)
    )
    # A CPU uses the weights in place; MKL may multiply copies of them in another way: 1 ulp on an EPYC.
    assert mine == pytest.approx(wanted, rel=3e-7) and len(mine) == 6
