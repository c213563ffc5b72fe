"""Pipes and devices in place of files: nothing hangs."""

from __future__ import annotations

import json
import os
import threading
from functools import partial
from pathlib import Path

import pytest

from horizon_lm import cli
from horizon_lm.config import DatasetConfig
from horizon_lm.config import yaml as config_yaml
from horizon_lm.data import Documents
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.io import files
from horizon_lm.training.generate import prompts_of
from planted_links import base as base
from planted_links import run as run
from planted_links import soon as soon
from planted_links import text as text

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


def fifo(path: Path) -> Path:
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def test_a_configuration_may_come_through_a_pipe_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in `horizon train <(sed ... base.yaml)`; nobody writes, or without end: one clear error."""
    path = fifo(tmp_path / "a.yaml")
    writer = threading.Thread(target=lambda: path.write_text("max_steps: 7\nseed: 3\n"))
    writer.start()
    assert config_yaml.read_file(path).values == {"max_steps": 7, "seed": 3}
    writer.join()
    monkeypatch.setattr(files, "PATIENCE_SECONDS", 0.2)
    for verb in ("train", "plan"):
        assert cli.main([verb, str(path)]) == 2
        assert f"error: {path}: cannot be read: it did not end within 0.2 s" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="larger than"):
        config_yaml.read_file("/dev/zero")
    held = os.open(path, os.O_RDWR)  # a writer that says nothing
    with pytest.raises(ConfigError, match="did not end"):
        prompts_of([f"@{path}"])
    os.close(held)


def test_pipes_in_a_run_s_folder_are_refused_at_once(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases: dict[str, dict[str, int]] = {
        "metrics.jsonl": {"report": 4, "resume": 2, "verify": 0},
        "config.resolved.yaml": {"report": 0, "resume": 5, "verify": 0},
        "checkpoint-2/manifest.json": {"verify": 5, "resume": 0},
        "checkpoint-2/unit-00001.safetensors": {"verify": 5},
        "checkpoint-2/buffers.safetensors": {"verify": 5},
    }
    for name, verbs in cases.items():
        (run / name).rename(run / "aside")
        fifo(run / name)
        for verb, code in verbs.items():
            more = ["max_steps=3"] if verb == "resume" else []
            assert cli.main([verb, str(run), *more]) == code, (name, verb)
            shown = capsys.readouterr()
            assert "Traceback" not in shown.err and (not code or "error: " in shown.err)
        (run / name).unlink()
        (run / "aside").rename(run / name)


def test_pipes_and_devices_are_no_data(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("text")
    path = folder / "b.jsonl"
    for make in (fifo, lambda path: path.symlink_to("/dev/zero")):
        path.unlink(missing_ok=True)
        make(path)
        for name in (folder, path, folder / "*"):
            documents = Documents([DatasetConfig(path=str(name))])
            for read in (partial(list, documents), documents.fingerprint):
                with pytest.raises(DataError, match="a named pipe|a pipe or device|leads out of"):
                    read()


def test_a_saved_dataset_names_files_of_its_own_folder(tmp_path: Path) -> None:
    import datasets

    saved = tmp_path / "saved"
    one = datasets.Dataset.from_list([{"text": "a"}])
    datasets.DatasetDict(train=one, test=one).save_to_disk(saved)
    path = saved / "train" / "state.json"
    content = path.read_text()
    assert len(list(Documents([DatasetConfig(path=str(saved))]))) == 1  # the control
    for place, name in ((saved / "train", "../test/data-00000-of-00001.arrow"), (saved, "/etc/passwd")):
        path.write_text(json.dumps({**json.loads(content), "_data_files": [{"filename": name}]}))
        with pytest.raises(DataError, match="leads out of"):
            list(Documents([DatasetConfig(path=str(place))]))
    for damaged in ("{", "[]", json.dumps({"_data_files": 5})):
        path.write_text(damaged)
        with pytest.raises(DataError):
            list(Documents([DatasetConfig(path=str(saved))]))
