"""Host memory of a process, and device memory, are what was predicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zoo
from adversarial import from_pretrained

BF16, FP32 = torch.bfloat16, torch.float32

pytestmark = pytest.mark.usefixtures("one_thread")

# Host memory of a process: what Linux counts against what the layout predicts.

SIZE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 30,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 8192,
    "tie_word_embeddings": False,
}

_MEASURE = """
import json, resource, sys

def memory():
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(rows[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS")}

import torch
torch.set_num_threads(1)
found = {"torch": memory()["VmRSS"]}
import transformers.models.llama.modeling_llama
found["transformers"] = memory()["VmRSS"]
from horizon_lm.config import ModelSettings
from horizon_lm.host_model import HostModel
found["imported"] = memory()["VmRSS"]

kind, source, update = sys.argv[1:]
if kind == "folder":
    limit = None if update == "eager" else 1.0
    settings = {"update": update, "max_grad_norm": limit}
    model = HostModel.from_pretrained(source, device="cpu", dtype="bfloat16", **settings)
else:
    model = HostModel.from_config(json.loads(source), ModelSettings(device="cpu", dtype="bfloat16"))
found["loaded"], found["loading peak"] = memory()["VmRSS"], memory()["VmHWM"]
found["slabs"] = model.store.num_bytes.get("grad_slabs", 0)
found["parameters"], found["predicted"] = model.num_parameters, sum(model.store.num_bytes.values())
if kind == "folder":
    ids = torch.arange(16)[None]
    model.train_step([{"input_ids": ids, "labels": ids}], lr=1e-4)
    model.flush()
    found["trained"] = memory()["VmRSS"]
found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps(found))
"""


def measure(kind: str, source: str, update: str = "deferred") -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, kind, source, update],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint of more than 300 M parameters. Its values do not matter, so they are not drawn."""
    path = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZE)).to(BF16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.01)
    model.save_pretrained(path)
    yield str(path)
    for file in path.iterdir():
        file.unlink()


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


@needs_linux
@pytest.mark.parametrize("update", ["deferred", "eager"])
def test_host_memory_is_what_the_layout_predicts(folder: str, update: str) -> None:
    """With eager updates: 12 bytes a parameter, and slabs of a layer or of the head."""
    found = measure("folder", folder, update)
    predicted, slabs = found["predicted"], found["slabs"]
    assert found["parameters"] > 300e6
    assert predicted == (14 if update == "deferred" else 12) * found["parameters"] + slabs
    assert (slabs > 0) == (update == "eager") and slabs < 0.1 * predicted
    print(f"\n{found['parameters'] / 1e6:.1f} M parameters in bf16; MB")
    print(
        f"{'above a process that has imported':36}{'predicted':>10}{'loading':>9}{'training':>10}{'ratio':>8}"
    )
    for base in ("torch", "imported"):
        loading, training = (found[key] - found[base] for key in ("loading peak", "peak"))
        name = {"torch": "torch", "imported": "torch, transformers, horizon_lm"}[base]
        figures = (
            f"{predicted / 1e6:10.0f}{loading / 1e6:9.0f}{training / 1e6:10.0f}{training / predicted:8.4f}"
        )
        print(f"{name:36}{figures}")
    assert 1.0 < (found["peak"] - found["imported"]) / predicted < 1.03
    # transformers takes 130 to 200 MB; our own modules and pydantic take the rest.
    assert found["imported"] - found["transformers"] < 30e6
    # While loading: file, weights and residuals, 6 of 14 bytes a parameter; then the file is gone.
    assert found["loading peak"] < found["imported"] + 0.5 * predicted
    assert found["loaded"] - found["imported"] < 4 * found["parameters"] + 50e6


@needs_linux
def test_random_weights_need_less_memory_than_training() -> None:
    """They are drawn in fp32 (4 bytes a parameter) and given back unit by unit as the store takes them."""
    values = SIZE | {"model_type": "llama", "num_hidden_layers": 12}
    found = measure("values", json.dumps(values))
    peak, kept = found["loading peak"] - found["imported"], found["loaded"] - found["imported"]
    p = found["parameters"]
    print(f"\n{p / 1e6:.1f} M random parameters: peak {peak / p:.2f}, kept {kept / p:.2f} bytes a parameter")
    assert peak < 0.6 * found["predicted"]
    assert kept < 4 * p + 60e6, "the source is still there"


# Device memory.


def slot_bytes(layers: int, hidden: int = 32) -> dict[str, int]:
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    model = from_pretrained(LlamaForCausalLM(config), device="cpu", dtype="bfloat16", lanes="adversarial")
    batches = [zoo.batch(config, batch_size=1, length=4, seed=m) for m in range(2)]
    model.forward_backward(batches)
    model.step(lr=1e-3)
    sizes = model.memory_bytes()
    numels = [unit.numel for unit in model.store.units]
    inner, outer = max(numels[: layers + 1]), max(numels[layers + 1 :])
    assert sizes["weight_slots"] == 2 * (2 * inner + outer), "3 slots of bf16"
    assert sizes["gradient_slots"] == 4 * (2 * inner + outer), "3 slots of fp32"
    return {name: sizes[name] for name in ("weight_slots", "gradient_slots", "weights")}


def test_device_slots_do_not_grow_with_depth() -> None:
    shallow, deep = slot_bytes(layers=4), slot_bytes(layers=40)
    assert shallow["weight_slots"] == deep["weight_slots"] > 0
    assert shallow["gradient_slots"] == deep["gradient_slots"] > 0
    assert deep["weights"] > 7 * shallow["weights"]  # the models do differ
    wide = slot_bytes(layers=4, hidden=64)  # the negative control
    assert wide["weight_slots"] > 2 * shallow["weight_slots"]
    assert wide["gradient_slots"] > 2 * shallow["gradient_slots"]
