"""Runs on 1, 2 and 4 ranks: the same metrics, checkpoints and exported model, bit by bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rank_runs import lines_of, write_settings
from rank_server import RankServer
from rank_states import exported, logical_state
from sizes import SOAK
from small_runs import GPT2_DROPOUT, place_of, settings

WORLDS = (2, 4)
STEPS = 8
# What the clock or the machine decides, or the number of ranks.
_TIMES = ("seconds", "tokens_per_second", "mfu", "host_rss_bytes", "device_bytes", "lanes", "time", "ranks")
_TIMES += ("eval_seconds",)

CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 eager": {"dtype": "bfloat16", "update": "eager", "max_grad_norm": 0},
    "dropout, 5 micro-batches": {"init_model": GPT2_DROPOUT, "gradient_accumulation_steps": 5},
    "streamed": {"streaming": True, "buffer_size": 50},
    "several loss chunks": {"reduction": "exact", "loss_chunk_tokens": 8},
    "by epochs, evaluated": {
        "max_steps": -1,
        "num_train_epochs": 0.5,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "save_steps": 3,
    },
}
FEW = ("bf16 eager", "dropout, 5 micro-batches", "by epochs, evaluated")  # the others in `make soak`


@dataclass(frozen=True)
class Left:
    """What a run left."""

    lines: list[dict[str, Any]]
    model: Mapping[str, bytes]
    states: Mapping[str, Any]


def left_by(run: Path) -> Left:
    kinds = ("step", "eval", "best")
    lines = [
        {key: value for key, value in line.items() if key not in _TIMES}
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if line["event"] in kinds
    ]
    states = {path.name: (logical_state(path), place_of(path)) for path in sorted(run.glob("checkpoint-*"))}
    return Left(lines, exported(run / "model"), states)


@pytest.mark.parametrize("case", CASES if SOAK else FEW)
def test_runs_on_any_number_of_ranks_leave_the_same_bits(
    case: str, server: RankServer, text: Path, tmp_path: Path
) -> None:
    found = {}
    for world in (1, *WORLDS):
        run = tmp_path / f"run-{world}"
        common = {"gradient_accumulation_steps": 4, "save_steps": 4, "max_steps": STEPS}
        changes = {**common, "reduction": "exact", **CASES[case]}
        if "eval_strategy" in changes:
            changes["eval_datasets"] = str(text)
        config = settings(text, run, dataset_cache_dir=str(tmp_path / "cache"), **changes)
        ended = server.run(world, ["train", str(write_settings(config, tmp_path / f"{world}.yaml"))])
        assert ended.codes == [0] * world, ended.said()
        assert not any(ended.outputs[1:]) and not any(ended.errors[1:]), ended.said()
        found[world] = left_by(run)
    assert len(found[1].states) >= 2 and len(found[1].lines) >= STEPS / 2
    for world in WORLDS:
        assert found[world].lines == found[1].lines
        assert found[world].model == found[1].model
        assert found[world].states == found[1].states


def test_rank_0_says_how_the_step_is_shared(server: RankServer, text: Path, tmp_path: Path) -> None:
    config = settings(text, tmp_path / "run", gradient_accumulation_steps=6, max_steps=2)
    ended = server.run(4, ["train", str(write_settings(config, tmp_path / "run.yaml"))])
    assert ended.codes == [0] * 4, ended.said()
    assert "6 micro-batches a step, up to 2 on each of 4 ranks" in ended.outputs[0].splitlines()
    (start,) = lines_of(tmp_path / "run", "start")
    assert start["world"] == 4
    for line in lines_of(tmp_path / "run"):
        ranks = line["ranks"]
        assert ranks["world"] == 4 and ranks["bytes_sent"] > 0 and ranks["slowest"] in range(4)
        assert all(len(ranks[key]) == 4 for key in ("network_seconds", "waiting_seconds", "host_rss_bytes"))
        assert ranks["tokens_per_second_each"] == pytest.approx(line["tokens_per_second"] / 4)


@pytest.mark.parametrize("world", [2, 4])
def test_the_planner_cuts_a_step_for_all_ranks(
    world: int, server: RankServer, text: Path, tmp_path: Path
) -> None:
    config = settings(text, tmp_path / "run", max_steps=2)
    file = tmp_path / "run.yaml"
    cut = ("per_device_train_batch_size", "gradient_accumulation_steps")
    lines = write_settings(config, file).read_text().splitlines()
    file.write_text("\n".join(line for line in lines if not line.startswith(cut)))
    ended = server.run(world, ["train", str(file), "tokens_per_step=128"])
    assert ended.codes == [0] * world, ended.said()
    assert f"{world} micro-batches a step, 1 on each of {world} ranks" in ended.outputs[0]
    ended = server.run(world, ["train", str(file), "tokens_per_step=16", "overwrite_output_dir=true"])
    assert ended.codes == [2] * world, ended.said()
    assert "hint: set a larger tokens_per_step; or start fewer ranks" in ended.errors[0]


def test_a_step_with_fewer_micro_batches_than_ranks_is_refused(
    server: RankServer, text: Path, tmp_path: Path
) -> None:
    config = settings(text, tmp_path / "run", gradient_accumulation_steps=2)
    ended = server.run(4, ["train", str(write_settings(config, tmp_path / "run.yaml"))])
    assert ended.codes == [2] * 4, ended.said()
    assert "error: a step has 2 micro-batches (gradient_accumulation_steps=2) for 4 ranks" in ended.errors[0]
    assert "gradient_accumulation_steps=4" in ended.errors[0]
    assert not any(ended.errors[1:]), ended.said()
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_reduction(server: RankServer, text: Path, tmp_path: Path) -> None:
    """What a planner chose for the first ranks, other ranks keep; what one rank began goes on exactly."""
    changes = {"gradient_accumulation_steps": 4, "save_steps": 4, "lr_scheduler_type": "constant"}
    straight = tmp_path / "straight"
    config = settings(text, straight, **changes)
    assert server.run(1, ["train", str(write_settings(config, tmp_path / "straight.yaml"))]).codes == [0]
    for name, reductions, worlds in (
        ("fast", {"reduction": "fast"}, (2, 4)),
        ("exact", {"reduction": "exact"}, (4, 2)),
        ("exact", {}, (1, 2)),
    ):
        run = tmp_path / f"{name}-{worlds[0]}"
        file = write_settings(settings(text, run, **changes), run.with_suffix(".yaml"))
        arguments = [f"{key}={value}" for key, value in reductions.items()]
        first, then = worlds
        ended = server.run(first, ["train", str(file), "max_steps=4", *arguments])
        assert ended.codes == [0] * first, ended.said()
        ended = server.run(then, ["train", str(file), "max_steps=8", "resume_from_checkpoint=latest"])
        assert ended.codes == [0] * then, ended.said()
        start = lines_of(run, "start")[-1]
        assert start["settings"]["reduction"] == name
        is_same = logical_state(run / "checkpoint-8") == logical_state(straight / "checkpoint-8")
        assert is_same or name == "fast"


def test_another_reduction_needs_to_be_asked_for(server: RankServer, text: Path, tmp_path: Path) -> None:
    run, changes = tmp_path / "run", {"gradient_accumulation_steps": 2, "save_steps": 1, "max_steps": 1}
    file = write_settings(settings(text, run, **changes), tmp_path / "run.yaml")
    assert server.run(2, ["train", str(file), "reduction=exact"]).codes == [0, 0]
    ended = server.run(2, ["resume", str(run), "max_steps=2", "reduction=fast"])
    assert ended.codes == [2, 2]
    assert "reduction was 'exact', is 'fast'" in ended.errors[0]
