"""Whole runs as systems of the protocol: `horizon train`, our trainers, and TRL's, on the same rows.

A run goes through its own loop, in a thread, and stops at the end of each step until the next one is asked
for. A step is thus timed from the end of the one before: data, logging and callbacks included.
"""

from __future__ import annotations

import json
import math
import queue
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from horizon_lm.bench.models import source_model
from horizon_lm.bench.protocol import Case

_LONGER = 8  # tokens that truncation cuts off, so that every document has the case's length


def make_folder(case: Case, folder: Path) -> None:
    """Write the case's model, a tokenizer whose words are its token ids, and rows longer than max_length."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = int(case.model["vocab_size"])
    words = {name: i for i, name in enumerate(["<unk>", "<pad>", "</s>"])}
    words |= {f"w{i}": i for i in range(len(words), vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    source_model(case.replace(dtype="float32")).save_pretrained(folder)
    generator = torch.Generator().manual_seed(case.seed)

    def text(tokens: int) -> str:
        ids = torch.randint(3, vocabulary, (tokens,), generator=generator).tolist()
        return " ".join(f"w{i}" for i in ids)

    texts, pairs = [], []
    prompt, rest = case.length // 4, case.length - case.length // 4 + _LONGER
    for _ in range(steps_of(case) * case.sequences):
        texts.append({"text": text(case.length + _LONGER)})
        pairs.append({"prompt": text(prompt), "chosen": " " + text(rest), "rejected": " " + text(rest)})
    for name, rows in (("texts", texts), ("pairs", pairs)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def steps_of(case: Case) -> int:
    """The steps of a run: those of the protocol, and one more that is never asked for."""
    return case.warmup + case.steps + 2


class Gate:
    """Callback of our runs and of a Trainer: reports the end of a step, then waits."""

    def __init__(self) -> None:
        self.loss, self.stops = math.nan, False
        self.go = threading.Semaphore(0)
        self.done: queue.Queue[BaseException | None] = queue.Queue()

    def on_step_end(self, state: Any, control: Any) -> None:
        self.loss = float(state.metrics.get("loss", math.nan))
        self.wait(control)

    def wait(self, control: Any) -> None:
        self.done.put(None)
        self.go.acquire()
        if self.stops:
            control.should_training_stop = True

    def of_trainer(self) -> Any:
        from transformers import TrainerCallback

        gate = self

        class Callback(TrainerCallback):
            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
                gate.loss = float((logs or {}).get("loss", gate.loss))

            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                if not gate.stops:
                    gate.wait(control)

        return Callback()


class GatedRun:
    """A run under test. Built up to the end of its first step. run: called with the gate and a folder."""

    def __init__(self, case: Case, run: Callable[[Case, Gate, Path], None]) -> None:
        self._case, self._gate, self._run = case, Gate(), run
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        self._wait()

    def _main(self) -> None:
        if self._case.threads:
            torch.set_num_threads(self._case.threads)  # of this thread
        end: BaseException = RuntimeError("the run ended before its last step")
        try:
            with tempfile.TemporaryDirectory() as folder:
                self._run(self._case, self._gate, Path(folder))
        except BaseException as error:
            end = error
        self._gate.done.put(end)

    def _wait(self) -> None:
        end = self._gate.done.get()
        if end is not None:
            raise end

    def step(self, micro_batches: list[torch.Tensor]) -> float:
        """Run a step on the run's own rows; `micro_batches` only have the same sizes."""
        self._gate.go.release()
        self._wait()
        return self._gate.loss

    def close(self) -> None:
        self._gate.stops = True
        self._gate.go.release()
        self._thread.join()


def _data(case: Case) -> Path:
    kind = "pairs" if case.extra["method"] == "dpo" else "texts"
    return Path(case.extra["folder"]) / f"{kind}.jsonl"


def _rows(case: Case) -> int:
    """Rows of a micro-batch: sequences, or pairs of two."""
    return case.sequences // (2 if case.extra["method"] == "dpo" else 1)


def horizon_train(case: Case) -> GatedRun:
    def run(case: Case, gate: Gate, folder: Path) -> None:
        from horizon_lm import train

        settings: dict[str, Any] = {"model_name_or_path": case.extra["folder"], "device": case.device}
        settings |= {"method": case.extra["method"], "datasets": [str(_data(case))], "dtype": case.dtype}
        settings |= {"max_length": case.length, "packing": False, "truncation": "keep_start"}
        settings |= {"per_device_train_batch_size": _rows(case), "max_steps": steps_of(case)}
        settings |= {"learning_rate": case.lr, "lr_scheduler_type": "constant", "warmup_steps": 0}
        settings |= {"max_grad_norm": case.clip, "activations": "recompute", "seed": case.seed}
        settings |= {"output_dir": str(folder / "run"), "save_strategy": "no", "progress": "off"}
        train(settings, callbacks=[gate], plot_loss=False, sample_max_new_tokens=1)

    return GatedRun(case, run)


def trainer_arguments(case: Case, folder: Path) -> dict[str, Any]:
    """Return the keywords of SFTConfig and DPOConfig."""
    return {
        "output_dir": str(folder),
        "use_cpu": case.device == "cpu",
        "bf16": case.dtype == "bfloat16",
        "gradient_checkpointing": True,
        "max_length": case.length,
        "per_device_train_batch_size": _rows(case),
        "max_steps": steps_of(case),
        "learning_rate": case.lr,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "max_grad_norm": case.clip or 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": case.seed,
    }


def _trainer(case: Case, classes: Callable[[], tuple[Any, Any]]) -> GatedRun:
    """classes: returns those of the arguments and of the trainer."""

    def run(case: Case, gate: Gate, folder: Path) -> None:
        from datasets import Dataset
        from transformers import AutoTokenizer

        arguments, trainer = classes()
        rows = [json.loads(line) for line in _data(case).read_text(encoding="utf-8").splitlines()]
        made = trainer(
            model=case.extra["folder"],
            args=arguments(**trainer_arguments(case, folder)),
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(case.extra["folder"]),
            callbacks=[gate.of_trainer()],
        )
        made.train()

    return GatedRun(case, run)


def ours(case: Case) -> GatedRun:
    """HorizonSFTTrainer or HorizonDPOTrainer."""

    def classes() -> tuple[Any, Any]:
        import trl

        from horizon_lm import trainers

        if case.extra["method"] == "dpo":
            return trl.DPOConfig, trainers.HorizonDPOTrainer
        return trl.SFTConfig, trainers.HorizonSFTTrainer

    return _trainer(case, classes)


def theirs(case: Case) -> GatedRun:
    """TRL's SFTTrainer or DPOTrainer, the latter with its reference model in memory."""

    def classes() -> tuple[Any, Any]:
        import trl

        if case.extra["method"] == "dpo":
            return trl.DPOConfig, trl.DPOTrainer
        return trl.SFTConfig, trl.SFTTrainer

    return _trainer(case, classes)
