"""Preferences and evaluations on several ranks: the numbers of one, reference values included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapter_runs import make_base
from preference_runs import settings, write_labelled, write_pairs
from rank_runs import lines_of, write_settings
from rank_server import RankServer
from rank_states import logical_state
from sizes import SOAK

TIMES = ("seconds", "tokens_per_second", "mfu", "host_rss_bytes", "device_bytes", "lanes", "time", "ranks")
TIMES += ("eval_seconds",)
BITS: dict[str, Any] = {"gradient_accumulation_steps": 4, "reduction": "exact"}


def numbers_of(run: Path) -> list[dict[str, Any]]:
    lines = [*lines_of(run), *lines_of(run, "eval")]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.mark.parametrize("method", ["dpo", "kto", "simpo"] if SOAK else ["dpo", "kto"])
def test_preferences_on_any_number_of_ranks(method: str, server: RankServer, tmp_path: Path) -> None:
    write = write_labelled if method == "kto" else write_pairs
    data = write(tmp_path)
    held_out = {"eval_datasets": str(data), "eval_strategy": "steps", "eval_steps": 2}
    found, states, references = {}, {}, {}
    for world in (1, 2, 4):
        run = tmp_path / f"on-{world}" / "run"
        run.parent.mkdir()
        config = settings(data, run, method=method, save_steps=4, **BITS, **held_out)
        file = write_settings(config, run.parent / "run.yaml")
        ended = server.run(world, ["train", str(file)])
        assert ended.codes == [0] * world, ended.said()
        assert not any(ended.outputs[1:]) and not any(ended.errors[1:]), ended.said()
        found[world] = numbers_of(run)
        states[world] = logical_state(run / "checkpoint-4")
        reference = run / "checkpoint-4" / "reference.safetensors"
        references[world] = reference.read_bytes() if method != "simpo" else None
        kept = list((run.parent / "cache").glob("reference-*/*.part"))
        assert bool(kept) is (method != "simpo")
    assert len(found[1]) == 6
    for world in (2, 4):
        assert found[world] == found[1]
        assert states[world] == states[1]
        assert references[world] == references[1]


def test_values_kept_by_one_rank_serve_several(server: RankServer, tmp_path: Path) -> None:
    """The key of what is kept is that of the whole model, however it is shared out."""
    data = write_pairs(tmp_path)
    for world, is_kept in ((1, False), (4, True)):
        config = settings(data, tmp_path / f"run-{world}", method="dpo", **BITS)
        file = write_settings(config, tmp_path / f"{world}.yaml")
        ended = server.run(world, ["train", str(file)])
        assert ended.codes == [0] * world, ended.said()
        assert ("reference log-probabilities: 24 samples, from the cache" in ended.outputs[0]) is is_kept


def test_the_base_of_an_adapter_on_two_ranks(server: RankServer, tmp_path: Path) -> None:
    """The same reference, found again by its key, and the same numbers."""
    data, base = write_pairs(tmp_path), make_base(tmp_path / "base")
    own = {"init_model": None, "train_tokenizer_vocab_size": None, "model_name_or_path": str(base)}
    found = []
    for world in (1, 2):
        run = tmp_path / f"run-{world}"
        adapter = {"adapter": "lora", "lora_r": 64}
        config = settings(data, run, method="dpo", save_steps=4, **BITS, **own, **adapter)
        ended = server.run(world, ["train", str(write_settings(config, tmp_path / f"{world}.yaml"))])
        assert ended.codes == [0] * world, ended.said()
        assert ("samples, from the cache" in ended.outputs[0]) is (world == 2)
        found.append((numbers_of(run), (run / "checkpoint-4" / "reference.safetensors").read_bytes()))
    assert found[0] == found[1]


def test_evaluations_on_any_number_of_ranks(server: RankServer, text: Path, tmp_path: Path) -> None:
    import small_runs

    config = small_runs.settings(text, tmp_path / "run", save_strategy="no", max_steps=2)
    assert server.run(1, ["train", str(write_settings(config, tmp_path / "run.yaml"))]).codes == [0]
    found = []
    for world in (1, 2, 4):
        data = f"eval_datasets={text}"
        ended = server.run(world, ["eval", str(tmp_path / "run"), data, "dtype=float32", "--json"])
        assert ended.codes == [0] * world, ended.said()
        assert not any(ended.outputs[1:]) and not any(ended.errors[1:]), ended.said()
        line = json.loads(ended.outputs[0])
        del line["eval_seconds"]
        found.append(line)
    assert found[0] == found[1] == found[2]
