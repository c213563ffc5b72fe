"""What the commands answer when they are given a run, a checkpoint, a model, or something else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from horizon_lm import cli
from horizon_lm.checkpoint.identify import identify, may_be_on_hub

FIXTURE = Path(__file__).parents[1] / "fixtures" / "checkpoint-v1"
CHECKPOINT_VERBS, MODEL_VERBS = ("verify", "export", "resume"), ("eval", "generate", "chat")


def write_run(path: Path, step: int, num_steps: int, status: str | None, *, model: bool, saved: bool) -> None:
    """A run's folder as far as a look at it goes."""
    path.mkdir()
    (path / "config.resolved.yaml").write_text(f"init_model: {{model_type: llama}}\noutput_dir: {path}\n")
    lines = [{"event": "start", "num_steps": num_steps}, {"event": "step", "step": step}]
    lines += [{"event": "end", "status": status}] if status else []
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if model:
        (path / "model").mkdir()
        (path / "model" / "config.json").write_text("{}")
        (path / "model" / "model.safetensors").write_bytes(b"")
    if saved:
        shutil.copytree(FIXTURE, path / "checkpoint-2")


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("places")
    write_run(home / "finished", 8, 8, "finished", model=True, saved=False)
    write_run(home / "extended", 9, 12, "interrupted", model=True, saved=True)
    write_run(home / "interrupted", 3, 8, None, model=False, saved=True)
    write_run(home / "unsaved", 3, 8, "failed", model=False, saved=False)
    write_run(home / "damaged", 3, 8, None, model=False, saved=True)
    (home / "damaged" / "checkpoint-2" / "unit-00001.safetensors").write_bytes(b"x")
    shutil.copytree(home / "finished" / "model", home / "model")
    (home / "empty").mkdir()
    (home / "other").mkdir()
    (home / "other" / "notes.txt").write_text("mine")
    (home / "run.yaml").write_text(f"output_dir: {home / 'interrupted'}\n")
    return home


def answer(verb: str, place: Path | str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """(exit code, error, hint)."""
    more = {"export": [f"{place}-out"], "generate": ["--prompt", "a"], "eval": ["eval_datasets=none.jsonl"]}
    code = cli.main([verb, str(place), *more.get(verb, [])])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: "), lines
    return code, lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")


FINISHED = "this run is finished (8 of 8 steps); its model is in {place}/model"
UNSAVED = "this run is not finished (step 3 of 8) and has no checkpoint"
AGAIN = "begin again: horizon train {place}/config.resolved.yaml overwrite_output_dir=true"
OTHER = "there is neither a run (config.resolved.yaml) nor a model (config.json) in it"
MODEL = "it is a model in Hugging Face format"
TAKE = "'horizon chat {place}' and 'horizon eval {place}' take {it} as it is"
ANY_RUN = "give a run's output_dir, or a checkpoint in it"
ANY_MODEL = "give a folder in Hugging Face format, a run's output_dir, or a name on the Hub"
CASES = {  # name of the place -> what it is, the hint to a verb of checkpoints, to a verb of models
    "finished": (FINISHED, TAKE.replace("{it}", "the model"), None),
    "unsaved": (UNSAVED, AGAIN, AGAIN),
    "model": (MODEL, TAKE.replace("{it}", "it"), None),
    "empty": ("the folder is empty", ANY_RUN, ANY_MODEL),
    "other": (OTHER, ANY_RUN, ANY_MODEL),
    "other/notes.txt": ("it is a file, not a folder", ANY_RUN, ANY_MODEL),
    "absent": ("it does not exist", ANY_RUN + "; looked in {here}", ANY_MODEL + "; looked in {here}"),
}


@pytest.mark.parametrize("name", CASES)
def test_each_command_says_what_is_there(name: str, places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    what, checkpoint_hint, model_hint = CASES[name]
    place = places / name
    for verb in CHECKPOINT_VERBS:
        if (verb, name) == ("resume", "finished"):
            continue  # below
        expected = f"{place} holds no checkpoint: {what}", checkpoint_hint
        found = answer(verb, place, capsys)
        assert found == (5, *(text.format(place=place, here=Path.cwd()) for text in expected))
    for verb in MODEL_VERBS if model_hint else ():
        if verb == "eval" and name == "other/notes.txt":
            continue  # taken for a configuration, which it is not
        expected = f"{place} holds no model: {what}", model_hint
        found = answer(verb, place, capsys)
        assert found == (2, *(text.format(place=place, here=Path.cwd()) for text in expected))
    assert not (places / f"{name}-out").exists()


def test_a_finished_run_without_a_checkpoint_begins_a_new_one(
    places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = places / "finished"
    assert cli.main(["resume", str(run)]) == 0
    said = capsys.readouterr().out
    assert FINISHED.format(place=run) in said and "it has no checkpoint to go on from" in said
    way = f"horizon train {run}/config.resolved.yaml model_name_or_path={run}/model init_model=null"
    assert way in said
    assert cli.main(["resume", str(run), "max_steps=20"]) == 5
    said = capsys.readouterr().err
    assert f"{run} holds no checkpoint: {FINISHED.format(place=run)}" in said and way in said


def test_a_model_is_asked_of_a_run_that_has_checkpoints(
    places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = places / "interrupted"
    what = f"this run is not finished (step 3 of 8); its latest checkpoint is {run / 'checkpoint-2'}"
    for verb in ("generate", "chat"):
        hint = f"horizon export {run} OUT, then horizon {verb} OUT; or finish the run: horizon resume {run}"
        assert answer(verb, run, capsys) == (2, f"{run} holds no model yet: {what}", hint)
        code, error, hint = answer(verb, run / "checkpoint-2", capsys)
        assert code == 2 and error.endswith("holds no model yet: it is a checkpoint of step 2")
        assert hint == f"horizon export {run / 'checkpoint-2'} OUT, then horizon {verb} OUT"
    assert cli.main(["verify", str(run)]) == 0  # the control: what needs a checkpoint finds it
    assert cli.main(["verify", str(run / "checkpoint-2")]) == 0


def test_a_configuration_names_the_folder_of_its_run(
    places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for verb in (*CHECKPOINT_VERBS, "generate", "chat"):
        code, error, hint = answer(verb, places / "run.yaml", capsys)
        assert code in (2, 5) and error.endswith(": it is a configuration file")
        assert hint == f"horizon {verb} {places / 'interrupted'}, the folder of its run"


def test_damaged_checkpoints_are_named(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, data = [str(places / "out")], ["eval_datasets=none.jsonl"]
    whole = ["model_name_or_path=none", "datasets=none.jsonl", "init_model=null"]  # settings that can be read
    more = {"export": out, "eval": data, "resume": whole}
    for verb in ("verify", "export", "resume", "chat", "eval"):
        for place in (places / "damaged", places / "damaged" / "checkpoint-2"):
            code = cli.main([verb, str(place), *more.get(verb, [])])
            assert code == (2 if verb in ("chat", "eval") else 5), (verb, place)
            assert "unit-00001.safetensors" in capsys.readouterr().err, (verb, place)


def test_a_look_at_a_run(places: Path) -> None:
    extended = identify(places / "extended")
    assert (
        extended.kind == "run"
        and not extended.is_finished
        and extended.model == places / "extended" / "model"
    )
    assert (extended.step, extended.num_steps, len(extended.checkpoints)) == (9, 12, 1)
    assert identify(places / "finished" / "model").kind == "model"
    weightless = shutil.copytree(places / "finished", places / "weightless")
    (weightless / "model" / "model.safetensors").unlink()
    found = identify(weightless)
    assert found.is_finished and found.model is None and "all steps of this run are done" in found.what
    (weightless / "metrics.jsonl").write_text('{"event": "start", "num_steps": 8}\n{"event": "end", "sta')
    assert not identify(weightless).is_finished and identify(weightless).num_steps == 8


def test_a_folder_in_place_of_settings_or_of_a_model(
    places: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = places / "finished"
    for arguments in (["train", str(run)], ["plan", str(run)], ["config", "validate", str(run)]):
        assert cli.main(arguments) == 2
        assert capsys.readouterr().err.splitlines() == [
            f"error: {run} is a folder, not a configuration file: {FINISHED.format(place=run)}",
            f"hint: horizon resume {run} trains further; its settings are {run / 'config.resolved.yaml'}",
        ]
    assert cli.main(["train", str(places / "model")]) == 2
    assert f"hint: model_name_or_path={places / 'model'}" in capsys.readouterr().err
    more = ["datasets=python-stdlib", f"output_dir={places / 'new'}", "device=cpu"]
    for name, way in (
        ("finished", f"model_name_or_path={run / 'model'}"),
        ("interrupted", f"horizon export {places / 'interrupted'} OUT, then model_name_or_path=OUT"),
        (
            "interrupted/checkpoint-2",
            f"{places / 'interrupted' / 'checkpoint-2'} OUT, then model_name_or_path=OUT",
        ),
    ):
        assert cli.main(["train", f"model_name_or_path={places / name}", *more]) == 2
        error, hint = capsys.readouterr().err.splitlines()
        assert "is not the folder of a model: " in error and way in hint
    data = places / "other" / "notes.txt"
    assert cli.main(["eval", str(data)]) == 2
    assert f"horizon eval MODEL eval_datasets={data}" in capsys.readouterr().err


def test_names_of_the_hub() -> None:
    assert may_be_on_hub("owner/name") and may_be_on_hub("gpt2")
    assert not any(may_be_on_hub(name) for name in ("./name", "a/b/c", "run.yaml", "/tmp", "~/x", ""))
