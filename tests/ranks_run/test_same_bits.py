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


@pytest.mark.parametrize("case", CASES)
def test_runs_on_any_number_of_ranks_leave_the_same_bits(
    case: str, server: RankServer, text: Path, tmp_path: Path
) -> None:
    found = {}
    for world in (1, *WORLDS):
        run = tmp_path / f"run-{world}"
        changes = {"gradient_accumulation_steps": 4, "save_steps": 4, "max_steps": STEPS, **CASES[case]}
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
