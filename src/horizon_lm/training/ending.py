"""The end of a run's steps: why they ended, and which model is exported."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from horizon_lm.checkpoint.folder import open_checkpoint
from horizon_lm.checkpoint.reader import verify
from horizon_lm.errors import CheckpointError
from horizon_lm.host_model import HostModel
from horizon_lm.report.display import number
from horizon_lm.report.metrics import Metrics
from horizon_lm.training.best import Best, Mark
from horizon_lm.training.resume import load_checkpoint
from horizon_lm.training.trainer import Trainer


@dataclass(frozen=True)
class RunEnd:
    """last: the metrics of the last step. exported_step, exported_tokens: of the model that is exported.
    stopped_by: who ended the run before num_steps. events: for metrics.jsonl. remarks: the same in words."""

    last: Metrics
    exported_step: int
    exported_tokens: int
    stopped_by: str | None
    events: tuple[tuple[str, dict[str, Any]], ...]
    remarks: tuple[str, ...]


def finish(
    best: Best,
    model: HostModel,
    trainer: Trainer,
    num_steps: int,
    stopped_by: str | None,
    warn: Callable[[str], None],
) -> RunEnd:
    """Leave `model` as it is to be exported: with load_best_model_at_end as of the best evaluation."""
    last = trainer.last
    assert last is not None, "a run has at least one step, and the last is recorded"
    step, tokens = last.step, last.num_tokens
    events: list[tuple[str, dict[str, Any]]] = []
    remarks: list[str] = []
    if stopped_by is not None:
        events.append(("stopped", {"step": step, "num_steps": num_steps, "by": stopped_by}))
        remarks.append(f"stopped at step {step} of {num_steps} by {stopped_by}")
    mark = best.to_export(trainer.loop.step)
    if mark is not None and mark.path is not None:
        found = _load(mark, model, warn)
        mark = None if found is None else mark
        step, tokens = (mark.step, found) if mark is not None and found is not None else (step, tokens)
    if mark is not None:
        events.append(("best", {"step": mark.step, "metric": best.metric, "value": mark.value}))
        remarks.append(_in_words(best, mark, num_steps))
    return RunEnd(last, step, tokens, stopped_by, tuple(events), tuple(remarks))


def _load(mark: Mark, model: HostModel, warn: Callable[[str], None]) -> int | None:
    """Put the model back to the checkpoint of `mark`; the tokens it was trained on. None where that fails,
    with the model as it was."""
    assert mark.path is not None
    try:
        checkpoint = open_checkpoint(mark.path)
        faults = verify(checkpoint).faults  # before the weights in memory are replaced
        if faults:
            raise CheckpointError(faults[0])
        load_checkpoint(checkpoint, model)
        return int(checkpoint.manifest.state["meter"]["sums"][0])
    except CheckpointError as error:
        warn(f"the best model (step {mark.step}) cannot be read: {error.message}; the last one is exported")
        return None


def _in_words(best: Best, mark: Mark, num_steps: int) -> str:
    def place(one: Mark) -> str:
        return f"{number(one.value)} was at step {one.step} of {num_steps}"

    kind = best.metric.removeprefix("eval_")
    if best.best is None or best.best.step == mark.step:
        return f"the best held-out {kind} {place(mark)}; that model is exported"
    return (
        f"the best held-out {kind} {place(best.best)}, of which there is no checkpoint; of the others the "
        f"best {place(mark)}; that model is exported"
    )
