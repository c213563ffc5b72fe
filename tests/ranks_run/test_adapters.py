"""Runs with an adapter on 1 and 2 ranks: the same bits, and checkpoints that any number of ranks reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from adapter_runs import adapter_settings, changed_copy, manifest_of
from adapter_runs import base as base
from horizon_lm import cli
from rank_runs import lines_of, write_settings
from rank_server import RankServer
from rank_states import exported, logical_state
from sizes import SOAK
from small_runs import losses_of

# Ranks that are large enough for both of two ranks to hold elements of an adapter.
CASES: dict[str, dict[str, Any]] = {
    "dora and a module, bf16": {"adapter": "dora", "modules_to_save": ["lm_head"], "dtype": "bfloat16"},
    "lora": {},
}
FEW = list(CASES)[:1]
COMMON = {"gradient_accumulation_steps": 4, "save_steps": 3, "reduction": "exact", "lora_r": 64}
COMMON |= {"lora_dropout": 0.1}


@pytest.mark.parametrize("case", CASES if SOAK else FEW)
def test_any_number_of_ranks_trains_the_same_adapter(
    case: str, server: RankServer, text: Path, base: Path, tmp_path: Path
) -> None:
    """Also resumed on another number of ranks, and from a checkpoint of the other format."""
    found = {}
    for world in (1, 2, 4) if SOAK else (1, 2):
        run = tmp_path / f"run-{world}"
        config = adapter_settings(text, run, base, max_steps=6, **COMMON, **CASES[case])
        ended = server.run(world, ["train", str(write_settings(config, tmp_path / f"{world}.yaml"))])
        assert ended.codes == [0] * world, ended.said()
        found[world] = (exported(run / "model"), logical_state(run / "checkpoint-6"), losses_of(run))
        manifest = manifest_of(run / "checkpoint-6")
        assert manifest["version"] == (3 if world == 1 else 4)
        assert manifest["base"] == manifest_of(tmp_path / "run-1" / "checkpoint-6")["base"]
    assert all(one == found[1] for one in found.values())
    for source, world in ((2, 1), (1, 2)):
        run = tmp_path / f"resumed-{world}"
        asked = {"resume_from_checkpoint": str(tmp_path / f"run-{source}" / "checkpoint-3"), "max_steps": 6}
        config = adapter_settings(text, run, base, **COMMON, **CASES[case], **asked)
        ended = server.run(world, ["train", str(write_settings(config, run.with_suffix(".yaml")))])
        assert ended.codes == [0] * world, ended.said()
        assert logical_state(run / "checkpoint-6") == found[1][1] and exported(run / "model") == found[1][0]
    earlier = logical_state(tmp_path / "run-2" / "checkpoint-3")
    assert earlier != found[1][1] and earlier.keys() == found[1][1].keys()  # the control


def test_a_checkpoint_of_two_ranks_is_exported_merged_and_verified(
    server: RankServer, text: Path, base: Path, tmp_path: Path, capsys: Any
) -> None:
    run = tmp_path / "run"
    config = adapter_settings(text, run, base, max_steps=2, **COMMON, save_last=True)
    ended = server.run(2, ["train", str(write_settings(config, tmp_path / "run.yaml"))])
    assert ended.codes == [0, 0], ended.said()
    assert "adapter lora r=64, 59,392 of 94,112 parameters trained (63 %)" in ended.outputs[0]
    assert not any(ended.outputs[1:]) and lines_of(run, "start")[0]["adapter"] == "lora r=64"
    assert cli.main(["verify", str(run)]) == 0
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    assert exported(tmp_path / "out") == exported(run / "model")
    for source, out in ((run, "one"), (run / "model", "two")):
        assert cli.main(["export", str(source), str(tmp_path / out), "--merge", "--dtype", "float32"]) == 0
    assert exported(tmp_path / "one") == exported(tmp_path / "two")
    # One element of one rank's file is changed.
    file = next((run / "checkpoint-2" / "rank-00001").glob("unit-*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert cli.main(["verify", str(run)]) == 5 and str(file) in capsys.readouterr().err
    assert cli.main(["export", str(run), str(tmp_path / "torn"), "--merge"]) == 5
    assert not (tmp_path / "torn").exists()


def test_another_base_is_refused_on_all_ranks(
    server: RankServer, text: Path, base: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = adapter_settings(text, run, base, max_steps=1, **COMMON, save_last=True)
    assert server.run(2, ["train", str(write_settings(config, tmp_path / "run.yaml"))]).codes == [0, 0]
    other = changed_copy(base, tmp_path / "other")
    ended = server.run(2, ["resume", str(run), f"model_name_or_path={other}", "max_steps=2"])
    assert ended.codes == [5, 5], ended.said()
    assert (
        "holds an adapter of another base than" in ended.errors[0] and "in layer 1 (1 of 4" in ended.errors[0]
    )
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["status"] == "finished"
