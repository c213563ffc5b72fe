"""Runs on preferences never hold a second copy of the weights: of a process, what Linux counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

SIZE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 16384}
SIZE |= {"num_attention_heads": 12, "num_key_value_heads": 12, "tie_word_embeddings": False}

# One process trains the same model by several methods, and prints of each run its peak and that of the
# reference's pass, both over what the process held before it. `kept`: the reference stays in memory.
_RUNS = """
import gc, json, sys
from pathlib import Path
from unittest import mock
import torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
import horizon_lm as hz
from horizon_lm.bench.worker import resident_peak
from horizon_lm.host_model import HostModel
from horizon_lm.memory.arena import return_free_memory
from horizon_lm.preference.reference import Pass
from horizon_lm.training import train as running

folder, model = Path(sys.argv[1]), sys.argv[2]

def begin():
    gc.collect()
    return_free_memory()
    Path("/proc/self/clear_refs").write_text("5")
    return resident_peak()

found, original, alive = {}, Pass.over, []
running._sample = lambda ready: ""  # it loads the exported model

def over(self, *args):
    loading = resident_peak()
    begin()
    original(self, *args)
    found[name] |= {"loading": loading, "pass": resident_peak()}

class Last:
    def on_step_end(self, state, control):
        if state.step == state.num_steps:
            found[name]["peak"] = max(resident_peak(), *found[name].values())

common = dict(model_name_or_path=model, device="cpu", max_length=16, max_steps=2, packing=False)
common |= dict(save_strategy="no", progress="off", plot_loss=False, activations="recompute")
common |= dict(dataset_cache_dir=None, optimizer_threads=1, gradient_accumulation_steps=1)
common |= dict(per_device_train_batch_size=1, per_device_eval_batch_size=1)
# The first run imports the libraries.
runs = {"first": {}, "sft": {}, "dpo": {}, "other": {"ref_model_name_or_path": model}}
runs["kept"] = runs["other"]
Pass.over = over
for name, more in runs.items():
    method = "sft" if name == "sft" else "dpo"
    rows = str(folder / f"{method}.jsonl")
    base = begin()
    found[name] = {"base": base}
    stay = mock.patch.object(HostModel, "__exit__", lambda self, *a: alive.append(self))
    with stay if name == "kept" else mock.patch.object(HostModel, "unused", 0, create=True):
        hz.train(
            common, callbacks=[Last()], method=method, datasets=[rows], output_dir=str(folder / name), **more
        )
    found[name] = {k: v - base for k, v in found[name].items() if k != "base"}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 67 M parameters, whose values do not matter, and short rows."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    path = tmp_path_factory.mktemp("preferences")
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZE)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.01)
    model.save_pretrained(path / "model")
    words = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 100)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(path / "model")
    half = " ".join(f"w{i}" for i in range(2, 6))
    pair = {"prompt": half, "chosen": " w20 w21", "rejected": " w22"}
    (path / "dpo.jsonl").write_text(8 * (json.dumps(pair) + "\n"))
    (path / "sft.jsonl").write_text(8 * (json.dumps({"prompt": half, "completion": " w20"}) + "\n"))
    return path


def test_no_second_copy_of_the_weights_at_any_time(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _RUNS, str(folder), str(folder / "model")],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    copy = 2 * 67.6e6  # bytes of bf16 weights
    print({run: {k: f"{v / copy:.2f}" for k, v in values.items()} for run, values in found.items()}, "copies")
    sft = found["sft"]["peak"]
    assert sft > 6 * copy  # weights, residuals, gradients and moments: 7
    assert found["dpo"]["peak"] < sft + 0.3 * copy
    assert found["other"]["peak"] < sft + 0.3 * copy
    assert found["kept"]["peak"] > sft + 0.6 * copy  # so that a copy would be seen
    # In the pass: weights and residuals, or the weights of the reference alone.
    assert found["dpo"]["pass"] < 2.3 * copy
    assert found["other"]["pass"] < 1.3 * copy
    # While the reference loads: its file, and what has been taken from it.
    assert found["other"]["loading"] < 2.3 * copy
