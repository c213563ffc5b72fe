"""`train` called on several ranks: results, callbacks, a process group that exists already, policies."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from rank_runs import lines_of, train, write_settings
from rank_server import RankServer
from rank_states import logical_state
from small_runs import LLAMA, losses_of, settings

BITS: dict[str, Any] = {"gradient_accumulation_steps": 4, "reduction": "exact"}


def test_all_ranks_return_the_same_result(server: RankServer, text: Path, tmp_path: Path) -> None:
    config = settings(text, tmp_path / "run", eval_datasets=str(text), eval_strategy="epoch", **BITS)
    file = write_settings(config, tmp_path / "run.yaml")
    ended = server.run(2, ["call", "rank_calls:plain", str(file)])
    assert ended.codes == [0, 0], ended.said()
    first, second = (json.loads(out.splitlines()[-1]) for out in ended.outputs)
    assert first == second and first["num_steps"] == 8 and first["eval_loss"] > 0
    assert first["output_dir"] == str(tmp_path / "run")


def test_a_group_of_torch_is_used_and_left_alone(server: RankServer, text: Path, tmp_path: Path) -> None:
    file = write_settings(settings(text, tmp_path / "run", **BITS), tmp_path / "run.yaml")
    ended = server.run(2, ["call", "rank_calls:in_a_group_of_torch", str(file)])
    assert ended.codes == [0, 0], ended.said()
    assert lines_of(tmp_path / "run", "start")[0]["world"] == 2


def test_callbacks_run_on_rank_0_and_stop_all(server: RankServer, text: Path, tmp_path: Path) -> None:
    held_out = {"eval_datasets": str(text), "eval_strategy": "steps", "eval_steps": 2}
    found = []
    for world in (1, 2):
        run, seen = tmp_path / f"run-{world}", tmp_path / f"seen-{world}"
        file = write_settings(settings(text, run, save_steps=2, **held_out, **BITS), run.with_suffix(".yaml"))
        variables = {"RANK": "0"} if world == 1 else {}
        arguments = ["call", "rank_calls:watched", str(file), str(seen), "5", "0"]
        ended = server.run(world, arguments, variables=variables)
        assert ended.codes == [0] * world, ended.said()
        result = json.loads(ended.outputs[-1].splitlines()[-1])
        assert result["stopped_by"] == "the callback Watch.on_step_end" and result["num_steps"] == 5
        assert lines_of(run, "end")[0]["status"] == "finished"
        # A checkpoint in the background ends when it ends: sort what does not depend on it.
        found.append((sorted(seen.read_text().splitlines()), logical_state(run / "checkpoint-5")))
    assert found[0] == found[1]
    assert {line.split()[0] for line in found[1][0]} == {"0"}


def test_a_failing_callback_ends_all(server: RankServer, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    file = write_settings(settings(text, run, save_steps=100, **BITS), tmp_path / "run.yaml")
    ended = server.run(2, ["call", "rank_calls:watched", str(file), str(tmp_path / "seen"), "0", "3"])
    assert ended.codes == [1, 1], ended.said()
    for output in ended.outputs:
        told = json.loads(output.splitlines()[-1])
        assert told["error"] == "CallbackError"
        assert told["message"].startswith("the callback Watch.on_step_end failed after step 3: KeyError: 'a'")
        assert told["message"].endswith(f"saved {run / 'checkpoint-3'}")


@pytest.mark.parametrize("save_steps", [4, 100])
def test_a_callback_that_fails_at_a_checkpoint_ends_all(
    save_steps: int, server: RankServer, text: Path, tmp_path: Path
) -> None:
    """In the middle of the run, and at the checkpoint of its end."""
    file = write_settings(
        settings(text, tmp_path / "run", save_steps=save_steps, save_last=True, **BITS), tmp_path / "run.yaml"
    )
    ended = server.run(2, ["call", "rank_calls:fails_to_save", str(file), ""])
    assert ended.codes == [1, 1], ended.said()
    for output in ended.outputs:
        assert "Bad.on_save failed after step" in json.loads(output.splitlines()[-1])["message"]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_policy_for_nan_does_on_ranks_what_it_does_on_one(
    policy: str, server: RankServer, text: Path, tmp_path: Path
) -> None:
    found = []
    for world, rank in ((1, 0), (2, 1), (4, 2)):
        run = tmp_path / f"run-{world}"
        config = settings(text, run, save_steps=2, nonfinite=policy, **BITS)
        file = write_settings(config, run.with_suffix(".yaml"))
        ended = server.run(world, ["train", str(file)], faults={rank: {"kind": "nan", "step": 5}})
        assert ended.codes == [0] * world, ended.said()
        assert ("back to step 4" if policy == "rollback" else "not updated") in ended.outputs[0]
        found.append((losses_of(run), logical_state(run / "checkpoint-8")))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"init_model": {**LLAMA, "vocab_size": 50}}, 4, "outside the model's vocabulary of 50"),
        ({"lr_factors": {".*": 0.0}}, 2, "makes the learning rate of every parameter 0"),
        ({"max_length": 4096}, 2, "max_position_embeddings"),
        ({"datasets": "absent.txt"}, 4, "absent.txt"),
        ({"output_dir": "/proc/run"}, 2, "/proc/run"),
    ],
)
def test_a_fault_that_all_ranks_have_is_said_once(
    changes: dict[str, Any], code: int, message: str, server: RankServer, text: Path, tmp_path: Path
) -> None:
    config = settings(text, tmp_path / "run", **BITS).replace(**changes)
    ended = server.run(2, ["train", str(write_settings(config, tmp_path / "run.yaml"))])
    assert ended.codes == [code, code], ended.said()
    assert message in ended.errors[0] and not ended.errors[1], ended.said()
    assert ended.errors[0].count("error: ") == 1


def test_a_deadline_stops_all_with_a_checkpoint(server: RankServer, text: Path, tmp_path: Path) -> None:
    config = settings(text, tmp_path / "run", max_steps=100_000, save_steps=10_000, **BITS)
    file = write_settings(config, tmp_path / "run.yaml")
    ended = server.run(2, ["train", str(file), "deadline_minutes=0.08"])
    assert ended.codes == [75, 75], ended.said()
    assert "stopped by deadline_minutes after step" in ended.errors[0] and not ended.errors[1]
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def test_checkpoints_by_the_clock_are_those_of_all(server: RankServer, text: Path, tmp_path: Path) -> None:
    config = settings(text, tmp_path / "run", max_steps=60, save_strategy="time", save_minutes=0.01, **BITS)
    ended = server.run(4, ["train", str(write_settings(config, tmp_path / "run.yaml"))])
    assert ended.codes == [0] * 4, ended.said()
    saved = [line for line in lines_of(tmp_path / "run", "checkpoint") if "error" not in line]
    assert len(saved) >= 2
    for line in saved:
        assert logical_state(tmp_path / "run" / line["name"])


@pytest.mark.timeout(200)
def test_the_command_itself_and_a_second_signal(text: Path, tmp_path: Path) -> None:
    """Processes without any preparation. The first signal waits for the step, the second does not."""
    config = settings(text, tmp_path / "run", max_steps=1_000_000, save_strategy="no", **BITS)
    run = train(2, write_settings(config, tmp_path / "run.yaml"))
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert all(process.poll() is None for process in run.processes), run.wait().said()
    for process in run.processes:
        process.send_signal(signal.SIGSTOP)  # so that both signals come before the next step ends
    for number in (signal.SIGTERM, signal.SIGINT):
        run.signal(number, 1)
    for process in run.processes:
        process.send_signal(signal.SIGCONT)
    ended = run.wait(60)
    assert ended.codes[1] in (130, 143), ended.said()
    assert ended.codes[0] == ended.codes[1], ended.said()
    assert "TCPStore" not in "".join(ended.errors), ended.said()
