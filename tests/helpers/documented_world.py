"""What the documentation's commands and code meet when tests run them: tiny models, data and runs.

For a new placeholder add a line to STAND_INS, for a new file or folder one to `World.fill`, for a name that
Python code takes as given an entry to `names`, for a command that tests do not run a line to ELSEWHERE.
"""

from __future__ import annotations

import json
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

import picture_runs
from data_helpers import write_rows
from horizon_lm import cli
from preference_runs import write_pairs
from sizes import SOAK
from small_runs import write_text
from tiny_processors import PROCESSORS, small_tokenizer

ROOT = Path(__file__).parents[2]

# (pattern, what stands in its place), in this order, in commands and in Python. {run}: the run that the page
# trained last, or a finished one, which also stands in for folders in runs/ that do not exist;
# {checkpoint}: its latest checkpoint; {model}: the tiny model.
STAND_INS = [
    (r"\b(?:RUN|runs/(?:run|NAME))(?= OUT --merge)", "runs/finished-adapter"),
    (r"\bADAPTER(?= OUT --merge)", "runs/finished-adapter/model"),
    (r"\bCHECKPOINT(?= OUT --merge)", "runs/finished-adapter/checkpoint-2"),
    (r"\bRUN/checkpoint-\d+|\bCHECKPOINT\b|(?<=--resume )PATH\b", "{checkpoint}"),
    (r"\bruns/NAME(?= --image)", "VISION"),
    (r"\b(?:NAME|PATH)-tuned\b", "{model}-tuned"),
    (r"\bRUN\b", "{run}"),
    (r"\bCONFIG\b(?!\.yaml)", "CONFIG.yaml"),
    (r"(?<=horizon bench )(?:100m|qwen3-4b)\b", "{model}"),
    (r"\bpath/to/model\b|\bMODEL\b|\bPATH\b|\bQwen/Qwen3-8B\b", "{model}"),
    (r"=FILE\b", "=held_out.jsonl"),
    (r"=FOLDER\b", "=texts"),
]

# The same for Python alone: what a reader would fill in.
FILLED_IN = [
    (r'"cuda"', '"cpu"'),
    (r"max_steps=\d+", "max_steps=2, overwrite_output_dir=True"),
    (r"callbacks=\[\.\.\.\]", "callbacks=[]"),
    (r'init_process_group\("nccl"\)', 'init_process_group("gloo", store=store, rank=0, world_size=1)'),
    (r'DPOConfig\("runs/dpo"\)', 'DPOConfig("runs/dpo", **tiny)'),
    (r"(RLOOTrainer\(.*)args=args", r"\1args=rloo_args"),
    (r"DPOConfig\(\.\.\.\)", 'DPOConfig("runs/dpo", **tiny)'),
]

_TINY_LLAMA = "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, " + (
    "num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 256}"
)
_FROM_NOTHING = [f"init_model={_TINY_LLAMA}", "train_tokenizer_vocab_size=300", "max_length=64"]
_FROM_NOTHING += ["max_train_bytes=100000"]

_TINY_BENCH = ["--layers", "1", "--length", "16", "--sequences", "2", "--steps", "1", "--warmup", "0"]

# Arguments that make a command small, by its beginning. Settings that the page gives stay, except max_steps.
# What measures this machine does so in soak, else its options are read (tests/cli, tests/bench run it).
SMALLER: dict[str, list[str]] = {
    "horizon train": ["max_steps=2", "device=cpu", "sample_max_new_tokens=2", "overwrite_output_dir=true"],
    "horizon train configs/quickstart.yaml": _FROM_NOTHING,
    "horizon train configs/pretrain.yaml": [*_FROM_NOTHING, "tokens_per_step=256"],
    "horizon resume": ["max_steps={steps}"],
    "horizon generate": ["--max-new-tokens", "2"],
    "horizon chat": ["--max-new-tokens", "2"],
    "horizon doctor": ["--seconds", "1"] if SOAK else ["--help"],
    "horizon bench": _TINY_BENCH if SOAK else ["--help"],
}

# Commands that are not run here, by pattern, with the reason. A test holds that each occurs on some page.
_SHAPES = "tests/training/test_vision_shapes.py draws, trains and scores"
_RANKS = "tests/project/test_many_gpus.py, with stand-ins for the programs"
ELSEWHERE = {
    r"make [a-z-]+.*": "test_shipped_files.py checks that the target exists",
    r"\. \.venv/bin/activate": "installation",
    r"pip install \.": "installation; tests/project/test_package.py checks what is installed",
    r"python examples/\w+_trl\.py .*": "tests/trainers/test_trl_examples.py",
    r"python examples/vision_shapes\.py .*": _SHAPES,
    r"horizon train configs/vision_sft\.yaml": _SHAPES,
    r"torchrun .*": "tests/project/test_many_gpus.py the settings, tests/ranks_run/test_restarts.py torchrun",
    r"NODES=2 .*": _RANKS,
    r"sbatch .*": _RANKS,
    r"sky .*": _RANKS,
    r"python examples/many-gpus/.*": _RANKS,
}


class World:
    """Tiny models and runs, made once and copied into the folder of each page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def text_model(self) -> Path:
        tokenizer = small_tokenizer("<|im_start|>", "<|im_end|>")
        tokenizer.chat_template = (ROOT / "src/horizon_lm/data/templates/chatml.jinja").read_text()
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(
            **sizes,
            vocab_size=len(tokenizer),
            eos_token_id=tokenizer.eos_token_id,
            max_position_embeddings=4096,
        )
        LlamaForCausalLM(config).save_pretrained(self.folder / "text")
        tokenizer.save_pretrained(self.folder / "text")
        return self.folder / "text"

    @cached_property
    def vision_model(self) -> Path:
        from horizon_lm import HostModel

        processor = PROCESSORS["llava"]()
        config = AutoConfig.for_model(**picture_runs.model("llava", processor.tokenizer))
        model = HostModel.from_config(config, device="cpu", dtype="float32")
        model.save_pretrained(self.folder / "vision")
        processor.save_pretrained(self.folder / "vision")
        return self.folder / "vision"

    def finished(self, name: str, *settings: str) -> Path:
        """A run with two checkpoints, in {folder}/runs."""
        folder = self.folder / name
        if not folder.exists():
            data = _chats(self.folder / "chats.jsonl", 12)
            common = [f"model_name_or_path={self.text_model}", f"datasets={data}", f"eval_datasets={data}"]
            common += ["max_steps=2", "save_steps=1", "save_total_limit=null", "dtype=float32", "device=cpu"]
            code = cli.main(["train", f"output_dir={folder}", "max_length=64", *common, *settings])
            assert code == 0
        return folder

    def fill(self, folder: Path, page: str) -> None:
        """Write into `folder` what the commands of `page` refer to."""
        sees = page.endswith("pictures.md")
        picture_runs.rows(folder, "rows.jsonl")
        for name in ("cat", "a", "b"):
            shutil.copy(folder / "0.png", folder / f"{name}.png")
        for name in ("configs", "examples"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(self.vision_model if sees else self.text_model, folder / "PATH")
        (folder / "VISION").symlink_to(self.vision_model)
        for name in ("finished", "quickstart"):
            shutil.copytree(self.finished("finished"), folder / "runs" / name)
        (folder / "runs" / "quickstart" / "model" / "chat_template.jinja").unlink()
        adapter = self.finished("finished-adapter", "adapter=lora", "learning_rate=1e-3")
        shutil.copytree(adapter, folder / "runs" / "finished-adapter")
        (folder / "texts").mkdir()
        lines = write_text(folder / "texts" / "rows.jsonl").read_text().splitlines()
        write_rows(folder / "texts" / "rows.jsonl", [{"text": line} for line in lines])
        _chats(folder / "chats.jsonl", 60)
        _chats(folder / "held_out.jsonl", 8)
        write_pairs(folder, rows=8, seed=1).rename(folder / "other.jsonl")
        write_pairs(folder, rows=60)
        if sees:
            shutil.copy(folder / "rows.jsonl", folder / "held_out.jsonl")
        data = "pairs" if page.endswith("preferences.md") else "rows" if sees else "chats"
        settings = {
            "model_name_or_path": "PATH",
            "datasets": f"{data}.jsonl",
            "max_length": 64,
            "dtype": "float32",
            "output_dir": "runs/run",
            "overwrite_output_dir": True,
        }
        for name in ("run", "CONFIG"):
            (folder / f"{name}.yaml").write_text(json.dumps(settings))


def _chats(path: Path, number: int) -> Path:
    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    turns = [[said("user", f"say {n}"), said("assistant", f"{n}, the store")] for n in range(number)]
    return write_rows(path, [{"messages": messages} for messages in turns])


def names(world: World, page: str) -> dict[str, Any]:
    """What the Python of a page takes as given."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import horizon_lm as hz

    tokenizer = AutoTokenizer.from_pretrained(world.text_model)
    torch.manual_seed(0)
    ids = torch.randint(5, 200, (2, 12))
    batch = {"input_ids": ids, "labels": ids}
    extra = {"advantage": torch.ones(2)} if page.endswith("memory-and-overlap.md") else {}
    return {
        "torch": torch,
        "store": torch.distributed.HashStore(),
        "hz": hz,
        "horizon_lm": hz,
        "config": hz.TrainConfig.from_yaml("run.yaml").replace(max_steps=2),
        "loader": [[batch]],
        "micro_batches": [batch | extra],
        "model": hz.HostModel.from_pretrained(world.text_model, device="cpu", dtype="float32"),
        "held_out": batch,
        "tokenizer": tokenizer,
        "rows": [{"input_ids": row.tolist()} for row in ids],
        "base": AutoModelForCausalLM.from_pretrained(world.text_model, dtype=torch.float32),
        **(_of_trl(world) if page.endswith(("README.md", "trl.md")) else {}),
        "data": Dataset.from_list([_PREFERENCE] * 4),
    }


_PREFERENCE = {"prompt": "say", "completion": " yes", "chosen": " yes", "rejected": " no"}


def _of_trl(world: World) -> dict[str, Any]:
    from trl import DPOConfig, RLOOConfig, SFTConfig

    from horizon_lm import HostModel, trainers

    tiny = {"max_steps": 2, "save_steps": 1, "use_cpu": True, "bf16": False, "report_to": []}
    rollouts = {"max_completion_length": 4, "num_generations": 2, "per_device_train_batch_size": 2}
    return {
        **{name: getattr(trainers, name) for name in ("HorizonSFTTrainer", "HorizonRLOOTrainer")},
        "tiny": tiny,
        "DPOConfig": DPOConfig,
        "args": SFTConfig("runs/sft", **tiny),
        "rloo_args": RLOOConfig("runs/rloo", **tiny, **rollouts),
        "folder": str(world.text_model),
        "reward": lambda completions, **_: [float(len(text)) for text in completions],
        "host_model": HostModel.from_pretrained(world.text_model, device="cpu", dtype="float32"),
        "inputs": {"input_ids": torch.tensor([[5, 6, 7]])},
    }
