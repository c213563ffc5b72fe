"""`horizon train` with an adapter: what it says, leaves and continues, and what other commands make of it."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from adapter_runs import adapter_settings, adapter_values, changed_copy, manifest_of, state_of
from adapter_runs import base as base
from adapter_runs import run as run
from adapter_runs import text as text
from faulty_runs import events
from faulty_runs import losses as losses
from horizon_lm import cli
from horizon_lm.checkpoint.exported import Form, Merge, merge_folder
from horizon_lm.checkpoint.folder import list_checkpoints
from horizon_lm.checkpoint.units import as_bytes
from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.errors import ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.model import loading
from horizon_lm.model.loading import base_of
from horizon_lm.training import generate
from horizon_lm.training.eval_command import target_of
from horizon_lm.training.generate import Generator, Sampling
from horizon_lm.training.sample import weight_bytes
from horizon_lm.training.train import train
from killed_runs import killed_runs
from sizes import SOAK, times
from small_runs import losses_of, write_text

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    tensors = load_file(folder / "adapter_model.safetensors")
    return {name: bytes(as_bytes(tensor)) for name, tensor in sorted(tensors.items())}


def asked(capsys: Any, *arguments: object) -> tuple[dict[str, Any], str]:
    capsys.readouterr()
    assert cli.main(["eval", *map(str, arguments), "--json"]) == 0
    shown = capsys.readouterr()
    return json.loads(shown.out), shown.err


# ---- a run ------------------------------------------------------------------------------------


def test_a_run_says_what_it_trains(text: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    train(adapter_settings(text, tmp_path / "run", base, max_steps=1))
    said = "llama, 38,432 parameters, adapter lora r=4, 3,712 of 38,432 parameters trained (9.7 %), float32"
    assert said in capsys.readouterr().out
    (start,) = events(tmp_path / "run", "start")
    assert (start["num_parameters"], start["num_trained"], start["adapter"]) == (38432, 3712, "lora r=4")
    frozen = adapter_settings(text, tmp_path / "frozen", base, adapter=None, freeze=["layers"], max_steps=1)
    train(frozen)
    assert "34,720 parameters, 19,232 of 34,720 parameters trained (55 %)" in capsys.readouterr().out
    train(adapter_settings(text, tmp_path / "whole", base, adapter=None, max_steps=1))  # the control
    assert "llama, 34,720 parameters, float32 on cpu" in capsys.readouterr().out
    (start,) = events(tmp_path / "whole", "start")
    assert "num_trained" not in start and "adapter" not in start


def test_the_usual_learning_rate_of_adapters_is_named(text: Path, base: Path, tmp_path: Path) -> None:
    said = []
    for number, changes in enumerate(({}, {"learning_rate": 1e-5}, {"adapter": None})):
        values = adapter_values(text, tmp_path / str(number), base, max_steps=1, **changes)
        if "learning_rate" not in changes:
            values.pop("learning_rate", None)
        train(TrainConfig.from_dict(values))
        (start,) = events(tmp_path / str(number), "start")
        said.append("adapters are usually trained with more" in " ".join(start["notes"]))
    assert said == [True, False, False]


def test_an_adapter_needs_a_model_that_exists(text: Path, base: Path, tmp_path: Path) -> None:
    values = adapter_values(text, tmp_path / "run", base, init_model={"model_type": "llama"})
    for change, said in (
        ({"model_name_or_path": None, "init_model": {"model_type": "llama"}}, "init_model"),
        ({"new_tokens": ["<a>"]}, "new_tokens"),
    ):
        values = {**adapter_values(text, tmp_path / "run", base), **change}
        with pytest.raises(ConfigError) as error:
            train(values)
        assert said in error.value.message and error.value.hint
    assert not (tmp_path / "run").exists()


def test_the_best_adapter_is_exported(text: Path, base: Path, tmp_path: Path) -> None:
    """Not the last one: the highest loss counts as the best."""
    held_out = write_text(tmp_path / "held-out.txt", sentences=12)
    more = {**EVALUATED, "eval_datasets": str(held_out), "load_best_model_at_end": True, "save_steps": 2}
    more |= {"max_steps": 6, "greater_is_better": True}
    result = train(adapter_settings(text, tmp_path / "run", base, **more))
    best = max(events(tmp_path / "run", "eval"), key=lambda line: line["eval_loss"])
    assert result.exported_step == best["step"] < 6
    chosen = tmp_path / "run" / f"checkpoint-{best['step']}"
    for source, out in ((chosen, "best"), (tmp_path / "run" / "checkpoint-6", "last")):
        assert cli.main(["export", str(source), str(tmp_path / out)]) == 0
    assert adapter_bytes(tmp_path / "run" / "model") == adapter_bytes(tmp_path / "best")
    assert adapter_bytes(tmp_path / "best") != adapter_bytes(tmp_path / "last")


def test_a_rollback_returns_to_the_adapter_of_a_checkpoint(
    text: Path, base: Path, tmp_path: Path, losses: Any
) -> None:
    losses({4: float("nan")})
    train(adapter_settings(text, tmp_path / "run", base, nonfinite="rollback", max_steps=6, save_steps=2))
    (back,) = events(tmp_path / "run", "rollback")
    assert back["step"] == 2 and [step for step, _ in losses_of(tmp_path / "run")][-1] == 6


# ---- killed, resumed, continued ---------------------------------------------------------------


@pytest.mark.timeout(times(300, 1800))
def test_killed_at_random_moments_an_adapter_resumes_with_the_same_bits(
    text: Path, base: Path, tmp_path: Path
) -> None:
    """200 steps and 20 kills in `make soak`."""
    steps = times(12, 200)
    asked = {"max_steps": steps, "save_steps": times(2, 10), "save_total_limit": 2, "lora_dropout": 0.1}
    kills, _, _ = killed_runs(
        lambda run: adapter_values(text, run, base, **asked),
        *(tmp_path, times(2, 20), random.randrange(1 << 30) if SOAK else 3),
        state=state_of,
        longest=times(1, 10) * 0.3,
        more="import peft",
    )
    assert kills >= times(2, 20)


@pytest.mark.parametrize("update", ["sync", "deferred", "eager"])
def test_a_stopped_run_with_an_adapter_equals_a_straight_one(
    update: str, text: Path, base: Path, tmp_path: Path
) -> None:
    """DoRA and a whole module in bf16 as well; resumed in another update mode and from another place."""
    common = {"adapter": "dora", "modules_to_save": ["lm_head"], "dtype": "bfloat16", "max_grad_norm": None}
    common |= {"lr_scheduler_type": "constant", "save_steps": 3}
    train(adapter_settings(text, tmp_path / "one", base, max_steps=6, update="sync", **common))
    train(adapter_settings(text, tmp_path / "two", base, max_steps=3, update=update, **common))
    moved = shutil.move(tmp_path / "two", tmp_path / "moved")
    assert cli.main(["resume", str(moved), "max_steps=6", "update=sync"]) == 0
    for name in ("checkpoint-3", "checkpoint-6"):
        assert state_of(tmp_path / "one" / name) == state_of(moved / name)
    assert adapter_bytes(tmp_path / "one" / "model") == adapter_bytes(moved / "model")
    assert losses_of(tmp_path / "one") == losses_of(moved)
    assert state_of(moved / "checkpoint-3") != state_of(moved / "checkpoint-6")  # the control


def test_a_saved_adapter_is_trained_further(
    run: Path, text: Path, base: Path, tmp_path: Path, capsys: Any
) -> None:
    """Its first loss is that of the adapter; when its folder is gone, the run says how to get it back."""
    further, folder = tmp_path / "further", shutil.copytree(run / "model", tmp_path / "adapter")
    values = adapter_values(text, further, base, adapter_name_or_path=str(folder), max_steps=3, seed=7)
    values = {k: v for k, v in values.items() if k not in ("adapter", "lora_r")}
    train({**values, "save_steps": 1})
    merged = tmp_path / "merged"
    assert cli.main(["export", str(run), str(merged), "--merge"]) == 0
    plain = adapter_values(text, tmp_path / "plain", merged, adapter=None, max_steps=1, seed=7)
    train(plain)
    first, control = losses_of(further)[0][1], losses_of(run)[0][1]
    assert first == pytest.approx(losses_of(tmp_path / "plain")[0][1], rel=1e-5) and first < control
    shutil.move(folder, tmp_path / "gone")
    capsys.readouterr()
    assert cli.main(["resume", str(further), "max_steps=4"]) == 2
    shown = capsys.readouterr().err
    hint = f"hint: horizon export {further / 'checkpoint-3'} OUT, then adapter_name_or_path=OUT"
    assert f"adapter_name_or_path='{folder}' does not exist" in shown and hint in shown
    out = tmp_path / "out"
    assert cli.main(["export", str(further / "checkpoint-3"), str(out)]) == 0
    assert cli.main(["resume", str(further), "max_steps=4", f"adapter_name_or_path={out}"]) == 0
    assert [step for step, _ in losses_of(further)] == [1, 2, 3, 4]


def test_a_saved_adapter_of_other_settings_does_not_go_on(
    run: Path, text: Path, base: Path, tmp_path: Path, capsys: Any
) -> None:
    """Its tensors fit, and it would compute something else."""
    further, folder = tmp_path / "further", shutil.copytree(run / "model", tmp_path / "adapter")
    values = adapter_values(text, further, base, adapter_name_or_path=str(folder), max_steps=1)
    train({k: v for k, v in values.items() if k not in ("adapter", "lora_r")})
    config = json.loads((folder / "adapter_config.json").read_text())
    changed = {**config, "lora_alpha": 1, "a_new_key": 1, "peft_version": "9"}
    (folder / "adapter_config.json").write_text(json.dumps(changed))
    capsys.readouterr()
    assert cli.main(["resume", str(further), "max_steps=2"]) == 2
    shown = capsys.readouterr().err
    assert f"adapter_name_or_path='{folder}' is not the adapter of" in shown
    assert "lora_alpha was 32, is 1" in shown and "hint: horizon export" in shown
    (folder / "adapter_config.json").write_text(json.dumps({**changed, "lora_alpha": 32}))
    assert cli.main(["resume", str(further), "max_steps=2"]) == 0  # the control


def test_the_revision_of_a_base_is_kept(
    run: Path, text: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the adapter's folder, as PEFT has it, and whoever loads the base by its name asks for it."""
    place, commit = tmp_path / "run", "a" * 40
    train(adapter_settings(text, place, base, max_steps=1, model_revision=commit))
    folder = place / "model"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["revision"] == commit
    assert target_of(str(place), [])[0].config.model_revision == commit
    assert target_of(str(place / "checkpoint-1"), [])[0].config.model_revision == commit
    assert base_of(folder, ModelSettings())[1].model_revision == commit
    config["base_model_name_or_path"] = "owner/base"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found: list[Any] = []

    def stop(*_: Any, **options: Any) -> None:
        found.append(options.get("revision"))
        raise ConfigError("stopped", hint="none")

    monkeypatch.setattr(generate, "base_here", lambda _: "owner/base")
    monkeypatch.setattr(generate, "read_pretrained", stop)
    monkeypatch.setattr(loading, "read_pretrained", stop)
    monkeypatch.setattr(loading, "require_reachable", lambda *_: None)
    for load in (
        lambda: Generator.load(folder, device="cpu"),
        lambda: HostModel.from_pretrained(folder, device="cpu"),
        lambda: merge_folder(folder, tmp_path / "out", Form(merge=Merge())),
        lambda: merge_folder(folder, tmp_path / "out", Form(merge=Merge("other/base"))),  # the control
    ):
        with pytest.raises(ConfigError, match="stopped"):
            load()
    assert found == [commit, commit, commit, None]


def test_a_finished_run_names_the_way_on(run: Path, tmp_path: Path, capsys: Any) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    for checkpoint in copy.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    capsys.readouterr()
    assert cli.main(["resume", str(copy)]) == 0
    shown = capsys.readouterr().out
    assert f"adapter_name_or_path={copy / 'model'}" in shown
    command = shown[shown.index("horizon train ") : shown.index("; save_last")].split()[1:]
    assert "lora_r=16" in command  # which the run had set, and the adapter's folder says
    command = [text.replace("=NEW", f"={tmp_path / 'new'}") for text in command]
    assert cli.main([*command, "--dry-run"]) == 0
    assert (
        cli.main(["train", f"model_name_or_path={copy}", "datasets=a.jsonl", f"output_dir={tmp_path / 'a'}"])
        == 2
    )
    shown = capsys.readouterr().err
    assert "is not the folder of a model" in shown and f"horizon export {copy} OUT --merge" in shown


# ---- evaluated, asked for text ----------------------------------------------------------------


def test_eval_of_an_adapter_equals_the_run(text: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    """Of a finished run, its checkpoints, PEFT's folder and the merged model; the base is the control."""
    place = tmp_path / "run"
    held_out = write_text(tmp_path / "held-out.txt", sentences=12)
    more = {**EVALUATED, "eval_datasets": str(held_out), "save_steps": 2, "dtype": "bfloat16"}
    train(adapter_settings(text, place, base, max_steps=4, **more))
    lines = {line["step"]: line["eval_loss"] for line in events(place, "eval")}
    assert asked(capsys, place)[0]["eval_loss"] == pytest.approx(lines[4], abs=1e-3)  # of what was exported
    for step in (2, 4):
        values, said = asked(capsys, place / f"checkpoint-{step}")
        assert values["eval_loss"] == lines[step] and f"checkpoint-{step}, step {step}" in said
    own, _ = asked(capsys, place, f"model_name_or_path={base}")
    assert own["eval_loss"] > lines[2] > lines[4]
    # Unfinished, with a torn checkpoint at the end.
    (place / "metrics.jsonl").write_text("".join((place / "metrics.jsonl").read_text().splitlines(True)[:-1]))
    file = place / "checkpoint-4" / "unit-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    values, said = asked(capsys, place)
    assert values["eval_loss"] == lines[2] and "skipped" in said and str(file) in said
    # On another base.
    settings_file = place / "config.resolved.yaml"
    other = changed_copy(base, tmp_path / "other")
    settings_file.write_text(settings_file.read_text().replace(str(base), str(other)))
    assert cli.main(["eval", str(place)]) == 5
    assert "holds an adapter of another base than" in capsys.readouterr().err


def test_an_adapter_writes_text_on_its_base(run: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    assert cli.main(["export", str(run), str(tmp_path / "merged"), "--merge"]) == 0
    sampling = Sampling(max_new_tokens=12, temperature=0)

    def text_of(place: Path) -> str:
        return Generator.load(place, device="cpu").complete("the store", sampling)

    expected = text_of(tmp_path / "merged")
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        text_of(run)
    assert not [str(one.message) for one in shown if "checkpointing" in str(one.message)]
    assert text_of(run) == text_of(run / "model") == expected != text_of(base)
    assert weight_bytes(run / "model") > weight_bytes(base) > 0
    gone = shutil.copytree(run / "model", tmp_path / "gone")
    path = gone / "adapter_config.json"
    path.write_text(path.read_text().replace(str(base), str(tmp_path / "absent")))
    capsys.readouterr()
    assert cli.main(["generate", str(gone), "--prompt", "a"]) == 2
    shown = capsys.readouterr().err
    assert f"{gone} holds an adapter, and its base '{tmp_path / 'absent'}' is not a folder" in shown
    assert "hint: put the base back, or set base_model_name_or_path" in shown and "Traceback" not in shown
    path.write_text("{}")
    assert cli.main(["generate", str(gone), "--prompt", "a"]) == 2
    assert "names no base model" in capsys.readouterr().err
    torn = shutil.copytree(run / "model", tmp_path / "torn")
    weights = torn / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert cli.main(["generate", str(torn), "--prompt", "a"]) == 2
    assert "no model could be loaded from" in capsys.readouterr().err


def test_retention_and_sizes_are_those_of_adapters(text: Path, base: Path, tmp_path: Path) -> None:
    """The end is saved since it is small, and old checkpoints go."""
    train(adapter_settings(text, tmp_path / "run", base, max_steps=5, save_steps=2, save_total_limit=2))
    found, rejected = list_checkpoints(tmp_path / "run")
    assert [one.manifest.step for one in found] == [5, 4] and not rejected
    assert all(manifest_of(one.path)["base"] == found[0].manifest.base for one in found)
