"""A run in words: its data, its model, its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.config import TrainConfig
from horizon_lm.data import StreamLoader, TrainingData
from horizon_lm.data.preview import remarks, used
from horizon_lm.errors import DataError
from horizon_lm.host_model import HostModel
from horizon_lm.machine.identity import commit, machine
from horizon_lm.model.experts import InUse, experts_in_use
from horizon_lm.report.display import clock, number
from horizon_lm.report.flops import FORMULA
from horizon_lm.report.metrics import Metrics, mean_of_tail, read_evaluations, read_steps, versions
from horizon_lm.report.notebook import table_html
from horizon_lm.report.plot import draw_loss
from horizon_lm.text import redact
from horizon_lm.training.ready import Ready
from horizon_lm.words import count, parameters, size

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class TrainResult:
    """Result of a run.

    Attributes:
        final_loss: of the last line of metrics_path.
        tail_loss: mean over the last tenth of its lines, since single steps are noisy.
        eval_loss: of the exported model; None without evaluation data.
        num_steps: optimizer steps done.
        num_tokens: real tokens, without padding.
        seconds: in steps, without loading, evaluation and export.
        output_dir: folder of the run.
        model_dir: the trained model and its tokenizer in Hugging Face format.
        metrics_path: metrics.jsonl of the run.
        exported_step: step of the exported model; with load_best_model_at_end that of the best evaluation.
        stopped_by: what ended the run before its last step, in words; None if it was not stopped.
    """

    final_loss: float
    tail_loss: float
    eval_loss: float | None
    num_steps: int
    num_tokens: int
    seconds: float
    output_dir: Path
    model_dir: Path
    metrics_path: Path
    exported_step: int
    stopped_by: str | None = None

    def plot_loss(self, title: str | None = None) -> Figure:
        """Draw training loss, held-out loss and learning rate over the steps; Jupyter shows the figure.

        Returns a matplotlib Figure, which `savefig` writes. title: by default the name of output_dir.
        """
        return draw_loss(self.metrics_path, title=self.output_dir.name if title is None else title)

    def _repr_html_(self) -> str:
        """Return a table, for Jupyter."""
        values = {
            "steps": f"{self.num_steps:,}",
            "loss (last tenth)": number(self.tail_loss),
            **({} if self.eval_loss is None else {"held-out loss": number(self.eval_loss)}),
            "tokens": f"{self.num_tokens:,}",
            "time": clock(self.seconds),
            "model": str(self.model_dir),
        }
        stopped = f"<div>{escape(self.stopped_by)}</div>" if self.stopped_by else ""
        return table_html(values) + stopped


def about_data(data: TrainingData) -> str:
    """Describe the training data; `left_out` has what is not trained on."""
    counts, rows = data.store.counts, data.rows
    formats = ", ".join(sorted({str(f) for f in counts.formats if f is not None}))
    inside = used(rows)
    what = (
        f"data: {count(sum(inside.documents), data.store.noun)} ({formats}), {count(inside.tokens, 'token')}"
    )
    if inside.trained < inside.tokens:
        what += f", {inside.trained:,} of them trained on"
    if isinstance(data.loader, StreamLoader):
        return f"{what} in the first window of the stream"
    what += " (from the cache)" if data.was_cached else ""
    lines = [
        f"{what}, {count(len(rows), 'sequence')} of {'2 x ' * (rows.sides - 1)}{rows.max_length}, "
        f"{rows.fill:.1%} full ({rows.strategy})"
    ]
    held = data.eval_rows
    if held is not None:
        lines.append(f"evaluation: {count(len(held), 'sequence')}, {count(held.num_tokens, 'token')}")
    return "\n".join(lines)


def left_out(data: TrainingData) -> list[tuple[str, bool]]:
    """Return (what is not trained or evaluated on, whether it is enough for a warning)."""
    found = [(f"data: {remark}", remark.is_warning) for remark in remarks(data.rows)]
    rows = data.eval_rows
    if rows is not None:
        with_bad_rows = rows.store is not data.rows.store
        more = remarks(rows, with_bad_rows=with_bad_rows)
        found += [(f"evaluation: {remark}", remark.is_warning) for remark in more]
    return found


def about_model(model: HostModel) -> str:
    store, resident = (sum(part.values()) for part in (model.store.num_bytes, model.store.device_bytes))
    return (
        f"model: {model.config.model_type}, {parameters(model.num_parameters)}, "
        + "".join(f"{words}, " for words in [about_trained(model)] if words)
        + f"{model.settings.dtype} on {model.device}, {size(store)} in host memory"
        + (f", {size(resident)} in device memory" if resident else "")
        + (f"\nexperts: {experts}" if (experts := _experts(model)) else "")
    )


def about_trained(model: HostModel) -> str:
    """Say what is trained, as in "adapter lora r=16, 1.2 M of 110 M parameters trained (1.1 %)"; empty if all
    parameters are."""
    trained, total = model.num_trained, model.num_parameters
    adapter = model.skeleton.adapter
    if adapter is None and trained == total:
        return ""
    kind = "" if adapter is None else f"adapter {adapter.words}, "
    few = parameters(trained).removesuffix(" parameters").removesuffix(" parameter")
    return f"{kind}{few} of {parameters(total)} trained ({100 * trained / total:.2g} %)"


def _experts(model: HostModel) -> InUse | None:
    return experts_in_use(model.skeleton.model, model.settings, model.device)


def header(ready: Ready, notes: Sequence[str], num_steps: int, peak: float) -> dict[str, Any]:
    """Return the first line of metrics.jsonl. peak: FLOP/s of one device."""
    config, data, model, asked = ready.config, ready.data, ready.model, ready.asked
    is_cuda = model.device.type == "cuda"
    world = asked.together.ranks.world
    return {
        "run_name": config.run_name,
        "versions": versions(),
        "commit": commit(),
        "machine": machine(),
        "device": torch.cuda.get_device_name(model.device) if is_cuda else "cpu",
        "num_threads": torch.get_num_threads(),
        "model_type": model.config.model_type,
        "num_parameters": model.num_parameters,
        **({"num_trained": trained} if (trained := model.num_trained) != model.num_parameters else {}),
        **({"adapter": adapter.words} if (adapter := model.skeleton.adapter) is not None else {}),
        **({"experts": str(experts)} if (experts := _experts(model)) else {}),
        "num_sequences": len(data.rows),
        "max_length": data.rows.max_length,
        "packing": data.rows.strategy,
        "fill": data.rows.fill,
        "peak_flops": peak,
        "peak_from": "a matrix product" if config.peak_tflops is None else "peak_tflops",
        "mfu_formula": FORMULA,
        "num_steps": num_steps,
        "notes": [redact(note) for note in notes],
        "data": data_record(config, data),
        "settings": config.to_dict(),
        "named": sorted(config.model_fields_set),
        **({"plan": ready.plan.to_dict()} if ready.plan is not None else {}),
        **({"world": world} if world > 1 else {}),
        **({"launched_by": asked.launchers} if asked.launchers else {}),
    }


def share_of_ranks(micro_batches: int, world: int) -> str:
    """Say how the micro-batches of a step are shared out."""
    each, rest = -(-micro_batches // world), micro_batches % world
    return (
        f"{count(micro_batches, 'micro-batch', 'micro-batches')} a step, {'up to ' if rest else ''}{each} on "
        f"each of {world} ranks"
    )


def data_record(config: TrainConfig, data: TrainingData) -> dict[str, Any]:
    """Return what was read and left out, for the report; of a stream its first window."""
    counts, rows, held_out = data.store.counts, data.rows, data.eval_rows
    return {
        "is_stream": isinstance(data.loader, StreamLoader),
        "files": [
            {"path": d.path, "split": d.split, "format": str(f) if f else None, "weight": d.weight}
            for d, f in zip(config.datasets, counts.formats, strict=True)
        ],
        "documents": data.store.num_samples,
        "tokens": counts.num_tokens,
        "trained_tokens": counts.num_trained,
        "sequences": len(rows),
        "left_out": rows.left.documents,
        "truncated": rows.left.truncated,
        "empty": counts.num_empty,
        "bad": counts.num_bad,
        "bad_rows": list(counts.bad_rows),
        "eval_files": [d.path for d in config.eval_datasets],
        "eval_sequences": len(held_out) if held_out is not None else 0,
        "eval_tokens": held_out.num_tokens if held_out is not None else 0,
    }


def tail_loss(metrics: Path) -> float:
    """Return the mean loss over the last tenth of the recorded finite steps; NaN if none can be read."""
    return mean_of_tail(_readable(read_steps, metrics))


def _readable(read: Callable[[Path], list[dict[str, Any]]], metrics: Path) -> list[dict[str, Any]]:
    """Return the records; none if the file is lost or damaged, which must not fail the run."""
    try:
        return read(metrics)
    except (DataError, OSError):
        return []


def eval_loss(metrics: Path, step: int) -> float | None:
    """Return the loss of the latest evaluation after `step`, else of the latest of all, if any."""
    found = _readable(read_evaluations, metrics)
    chosen = [line for line in found if line["step"] == step] or found
    return chosen[-1].get("eval_loss") if chosen else None


def title(config: TrainConfig, model: HostModel, last: Metrics, metrics: Path) -> str:
    name = config.run_name or Path(config.output_dir).name
    what = f"{model.config.model_type}, {parameters(model.num_parameters)}"
    found = f"{name}: {what}, {count(last.num_tokens, 'token')}, loss {number(tail_loss(metrics))}"
    evaluations = _readable(read_evaluations, metrics)
    held_out = [e["eval_loss"] for e in evaluations if e.get("eval_loss") is not None]
    return found + (f", held-out {number(held_out[-1])}" if held_out else "")


def summary(config: TrainConfig, folder: RunFolder, result: TrainResult, remarks: Sequence[str] = ()) -> str:
    """Describe the finished run. remarks: how it ended."""
    speed = result.num_tokens / result.seconds
    lines = [
        f"trained {count(result.num_steps, 'step')} on {count(result.num_tokens, 'token')} in "
        f"{clock(result.seconds)} ({speed:,.0f} tokens/s), loss {number(result.tail_loss)} "
        "(mean of the last tenth)",
        *remarks,
        *([f"evaluation loss {number(result.eval_loss)}"] if result.eval_loss is not None else []),
        f"  model       {folder.model}",
        f"  metrics     {folder.metrics}",
        f"  settings    {folder.settings}",
    ]
    if config.plot_loss:
        lines.append(f"  loss curve  {folder.picture}")
    lines.append(f"  report      horizon report {folder.path}")
    is_chat = (folder.model / "chat_template.jinja").exists()
    use = f"chat {folder.path}" if is_chat else f"generate {folder.path} --prompt TEXT"
    lines.append(f"  try it      horizon {use}")
    return "\n".join(lines)
