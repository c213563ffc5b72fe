"""Damaged or forged run folders: `report`, `export` and `resume` answer with one line that says where.

A checksum that is right proves nothing about who wrote a manifest: every value is checked before it is used.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from horizon_lm import cli
from horizon_lm.checkpoint import manifest as manifests
from horizon_lm.checkpoint.disk import checksum
from horizon_lm.checkpoint.exported import Form, export_checkpoint
from horizon_lm.checkpoint.folder import RunFolder
from horizon_lm.errors import CheckpointError, HorizonError
from horizon_lm.report import figures
from horizon_lm.report import html as report
from horizon_lm.report.history import History
from horizon_lm.report.plot import draw_loss
from horizon_lm.schedule.draw import chrome_trace
from horizon_lm.training.resume import check_settings
from horizon_lm.training.state import Best
from horizon_lm.training.train import train
from sizes import times
from small_runs import settings, write_text

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

ODD: list[Any] = [
    *(None, True, "abc", "", -5, 0, 1.5, 1e308, -1e308, 5e-324, 10**30, 10**400, 2**63),
    *(float("nan"), float("inf"), [], {}, [1, "a"], {"a": None}, "é" * 300, "../x", "9" * 5000),
]
Lines = list[dict[str, Any]]
Path_ = tuple[Any, ...]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    text = write_text(place / "text.txt", sentences=60)
    with redirect_stdout(io.StringIO()):
        train(
            settings(
                text,
                place / "run",
                max_steps=4,
                save_steps=2,
                eval_datasets=str(text),
                eval_strategy="steps",
                eval_steps=2,
            )
        )
    return place / "run"


def paths_in(value: Any, start: Path_ = ()) -> Iterator[Path_]:
    """Where something stands in nested values; of long lists the first three."""
    yield start
    if isinstance(value, dict):
        for key in value:
            yield from paths_in(value[key], (*start, key))
    elif isinstance(value, list):
        for i in range(min(3, len(value))):
            yield from paths_in(value[i], (*start, i))


def put(values: Any, path: Path_, value: Any) -> None:
    """value: ... removes what is there. Another change may have taken the place away."""
    try:
        for key in path[:-1]:
            values = values[key]
        if value is ...:
            del values[path[-1]]
        else:
            values[path[-1]] = value
    except (KeyError, IndexError, TypeError):
        pass


# metrics.jsonl.


def lines_of(run: Path) -> Lines:
    """A run's lines, with one of every kind among them."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    more = {
        "fault": {"loss": 3.1, "done": "not updated", "reason": "a spike"},
        "note": {"text": "kept no more"},
        "stopped": {"num_steps": 9, "by": "somebody"},
        "best": {"metric": "eval_loss", "value": 2.0},
        "of a later version": {"value": 2.0},
        "resume": {},
    }
    lines[3:3] = [{"event": event, "step": 1, **values} for event, values in more.items()]
    return lines


def folder_with(lines: Lines, place: Path, run: Path) -> RunFolder:
    place.mkdir(exist_ok=True)
    shutil.copy(run / "config.resolved.yaml", place)
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunFolder(place)


def show(folder: RunFolder) -> None:
    """All that `horizon report` works out, without the page's template, which takes most of the time."""
    history = History.read(folder)
    for part in (figures.head, figures.curves, figures.memory, figures.lanes):
        part(history)
    report.tables(history, folder)
    report._timeline(history)
    report._in_words(folder, history)
    if history.timeline is not None:
        chrome_trace(history.spans)


def test_odd_metrics_are_shown_or_refused(run: Path, tmp_path: Path) -> None:
    """Random values, lost and doubled lines, other orders: a page or one DataError, never anything else."""
    source, rng, found = lines_of(run), random.Random(0), Counter[str]()
    show(folder_with(source, tmp_path / "run", run))  # the control
    paths = [path for path in paths_in(source) if path]
    near = [path for path in paths if len(path) <= 2 or path[1] == "plan"]
    for _ in range(times(120, 4000)):
        lines = copy.deepcopy(source)
        for _ in range(rng.choice((1, 1, 1, 3))):
            put(lines, rng.choice(rng.choice((paths, near))), rng.choice([..., *ODD]))
        if rng.random() < 0.1:
            rng.shuffle(lines)
        if rng.random() < 0.1:
            lines = lines + lines
        try:
            show(folder_with(lines, tmp_path / "run", run))
            found["shown"] += 1
        except HorizonError as error:
            assert error.exit_code == 4, error
            found["refused"] += 1
    assert min(found["shown"], found["refused"]) > 20, found


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ((1, "loss"), "abc", "metrics.jsonl:2 is damaged: loss is 'abc': input should be a valid number"),
        ((1, "loss"), [1.0], "loss is [1.0]"),
        ((1, "grad_norm"), {"a": 1}, "grad_norm is {'a': 1}"),
        ((1, "step"), -5, "step is -5: input should be greater than or equal to 0"),
        ((1, "step"), 1.5, "step is 1.5"),
        ((1, "step"), ..., "step is {"),
        ((1, "tokens_per_second"), 1e308, "tokens_per_second is 1e+308"),
        ((1, "mfu"), float("nan"), "metrics.jsonl:2 is damaged: NaN is not JSON"),
        ((1, "lanes", "compute"), None, "lanes.compute is None"),
        ((0, "num_parameters"), "many", "num_parameters is 'many'"),
        ((0, "settings"), [], "settings is []"),
        ((0, "data", "files"), 3, "data.files is 3"),
        ((1,), [1, 2], "metrics.jsonl:2 is damaged: the line is [1, 2]"),
    ],
)
def test_report_names_the_value_that_is_odd(
    run: Path, tmp_path: Path, path: Path_, value: Any, said: str
) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    put(lines, path, value)
    folder_with(lines, tmp_path / "run", run)
    with redirect_stderr(io.StringIO()) as told:
        assert cli.main(["report", str(tmp_path / "run")]) == 4
    assert said in told.getvalue() and "Traceback" not in told.getvalue()


def test_report_refuses_bytes_that_are_no_text(run: Path, tmp_path: Path) -> None:
    folder = folder_with(lines_of(run), tmp_path / "run", run)
    for junk in (b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"9" * 5000 + b"\n", b"\x00\n"):
        folder.metrics.write_bytes(junk + (run / "metrics.jsonl").read_bytes())
        with redirect_stderr(io.StringIO()) as told:
            assert cli.main(["report", str(folder.path)]) == 4
        assert "is damaged" in told.getvalue() and "bug" not in told.getvalue()


def test_a_picture_of_lines_without_numbers(run: Path, tmp_path: Path) -> None:
    lines = [{"event": "step", "step": 1}, {"event": "eval", "step": 1}]
    folder = folder_with(lines, tmp_path / "run", run)
    drawn = draw_loss(folder.metrics, title="nothing")
    values = [y for axes in drawn.axes for line in axes.lines for y in line.get_ydata()]
    assert values and all(math.isnan(y) for y in values)


# Manifests with a right checksum.


def sealed(source: Path, target: Path, change: Callable[[dict[str, Any]], None], **files: bytes) -> Path:
    """A copy of a checkpoint with another manifest and other files, and checksums that fit."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    values = json.loads((source / manifests.NAME).read_text())
    del values[manifests._SEAL]
    for name, data in files.items():
        (target / name).write_bytes(data)
        values["files"][name] = [len(data), checksum(data)]
    change(values)
    values[manifests._SEAL] = manifests._seal(values)
    (target / manifests.NAME).write_text(json.dumps(values))
    return target


def export(checkpoint: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    with redirect_stderr(io.StringIO()):
        export_checkpoint(checkpoint, target, Form())


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("state", "steps_done"), -5, "state.steps_done is -5: input should be greater than or equal to 0"),
        (("state", "steps_done"), 10**30, "state.steps_done is 1000000000000000000000000000000"),
        (("state", "steps_done"), 1.5, "state.steps_done is 1.5"),
        (("state", "steps_done"), "4", "state.steps_done is '4'"),
        (("state", "steps_done"), True, "state.steps_done is True"),
        (("state", "loop", "step"), -1, "state.loop.step is -1"),
        (("state", "loader", "epoch"), -1, "state.loader.epoch is -1"),
        (("state", "loader", "epoch"), 10**18, "state.loader.epoch is 1000000000000000000"),
        (("state", "loader", "position"), 10**6, "position 1000000 is beyond its"),
        (("state", "meter"), [], "state.meter is []"),
        (("state", "meter", "sums"), [], "state.meter.sums"),
        (("state", "kept_in_fp32"), 3, "state.kept_in_fp32 is 3"),
        (("state", "losses"), ["a"], "state.losses.0 is 'a'"),
        (("state", "best"), {"best": 3}, "state.best.best is 3"),
        (("config", "dtype"), "float13", "config.dtype is 'float13'"),
        (("config", "dtype"), [], "config.dtype is []"),
        (("step",), -1, "step, serial or parent is out of range"),
        (("files", "buffers.safetensors"), ..., "buffers.safetensors: is not part of the checkpoint"),
        (("files", "config.json"), ..., "config.json: is not part of the checkpoint"),
        (("files", "unit-00002.safetensors"), ..., "has no weights of "),
    ],
)
def test_an_absurd_manifest_is_no_checkpoint(
    run: Path, tmp_path: Path, path: Path_, value: Any, said: str
) -> None:
    made = sealed(run / "checkpoint-4", tmp_path / "checkpoint-4", lambda values: put(values, path, value))
    with pytest.raises(CheckpointError, match="checkpoint-4") as error:
        export(made, tmp_path / "model")
    assert said in error.value.message and not (tmp_path / "model").exists()


def test_a_manifest_without_what_earlier_versions_did_not_write(run: Path, tmp_path: Path) -> None:
    """The control: what may be missing is not missed."""
    for path in (
        ("parent",),
        ("state", "best"),
        ("state", "losses"),
        ("state", "meter"),
        ("config", "dtype"),
    ):
        made = sealed(
            run / "checkpoint-4", tmp_path / "checkpoint-4", lambda values, p=path: put(values, p, ...)
        )
        assert manifests.read(made).step == 4
    export(made, tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_settings_that_a_manifest_lacks_have_not_changed(run: Path, tmp_path: Path) -> None:
    from horizon_lm.checkpoint.folder import open_checkpoint

    made = sealed(run / "checkpoint-4", tmp_path / "checkpoint-4", lambda values: values["config"].clear())
    with pytest.raises(HorizonError) as error:
        check_settings(settings(run.parent / "text.txt", run), open_checkpoint(made))
    assert error.value.exit_code == 2


UNIT = "unit-00002.safetensors"


def altered(run: Path, change: Callable[[dict[str, torch.Tensor], str], None]) -> bytes:
    tensors = load_file(run / "checkpoint-4" / UNIT)
    change(tensors, min(key for key in tensors if key.startswith("weights.")))
    return save(tensors)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t, key: t.update({key: torch.zeros(3, 5)}), "is [3, 5], expected ["),
        (lambda t, key: t.update({key: t[key].unsqueeze(0)}), ", expected ["),
        (lambda t, key: t.update({key: t[key].to(torch.int32)}), "is I32, not a dtype of weights"),
        (lambda t, key: t.update({key: t[key].to(torch.bool)}), "is BOOL, not"),
        (lambda t, key: t.update({key: t[key].to(torch.float8_e4m3fn)}), "is F8_E4M3, not"),
        (lambda t, key: t.pop(key), "has no weights of "),
        (lambda t, key: t.clear(), "has no weights of "),
        (lambda t, key: t.update({"weights.a.b": torch.zeros(2)}), "a.b is of no part of the model"),
    ],
)
def test_weights_that_are_not_the_models(
    run: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor], str], None], said: str
) -> None:
    files = {UNIT: altered(run, change)}
    made = sealed(run / "checkpoint-4", tmp_path / "checkpoint-4", lambda values: None, **files)
    with pytest.raises(CheckpointError) as error:
        export(made, tmp_path / "model")
    assert said in error.value.message


@pytest.mark.parametrize(
    ("name", "data"),
    [
        (UNIT, b"no tensors"),
        (UNIT, b""),
        ("buffers.safetensors", b"\xff" * 9),
        ("unit-00099.safetensors", save({"weights.a": torch.zeros(2)})),
        *(("config.json", data) for data in (b"", b"[]", b"\xff", b"[" * 100_000, b'{"model_type": 5}')),
        ("generation_config.json", b"[]"),
    ],
)
def test_files_that_are_something_else(run: Path, tmp_path: Path, name: str, data: bytes) -> None:
    made = sealed(run / "checkpoint-4", tmp_path / "checkpoint-4", lambda values: None, **{name: data})
    with pytest.raises(HorizonError) as error:
        export(made, tmp_path / "model")
    assert error.value.exit_code in (2, 5) and "checkpoint-4" in error.value.message


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("num_attention_heads", 0, "num_attention_heads is 0, expected a positive number"),
        ("vocab_size", -1, "vocab_size is -1, expected a positive number"),
        ("hidden_act", "no", "is refused by transformers"),
    ],
)
def test_a_configuration_that_makes_no_model(
    run: Path, tmp_path: Path, key: str, value: Any, said: str
) -> None:
    data = json.dumps(json.loads((run / "checkpoint-4" / "config.json").read_text()) | {key: value}).encode()
    made = sealed(
        run / "checkpoint-4", tmp_path / "checkpoint-4", lambda values: None, **{"config.json": data}
    )
    with pytest.raises(HorizonError) as error:
        export(made, tmp_path / "model")
    assert error.value.exit_code == 2 and "config.json" in error.value.message and said in error.value.message


def test_random_values_in_a_manifest(run: Path, tmp_path: Path) -> None:
    """Read, and given to the best evaluation, as `resume` does, or refused: never anything else."""
    from horizon_lm.checkpoint.folder import open_checkpoint

    rng, found = random.Random(0), Counter[str]()
    mark = {"value": 1.0, "step": 2, "path": "checkpoint-2"}
    best = {"best": mark, "kept": mark, "asked": None, "evaluations": 2, "waited": 0}
    values = json.loads((run / "checkpoint-4" / manifests.NAME).read_text())
    values["state"]["best"] = best
    paths = [(key, *path) for key in ("state", "files") for path in paths_in(values[key])]
    paths += 5 * [("config",), ("config", "dtype"), ("step",), ("serial",), ("parent",), ("versions",)]
    config = settings(
        run.parent / "text.txt",
        run,
        eval_datasets=str(run.parent / "text.txt"),
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )

    def change(values: dict[str, Any]) -> None:
        values["state"]["best"] = copy.deepcopy(best)
        for _ in range(rng.choice((1, 1, 3))):
            put(values, rng.choice(paths), rng.choice([..., *ODD]))

    for _ in range(times(120, 4000)):
        made = sealed(run / "checkpoint-4", tmp_path / "checkpoint-4", change)
        try:
            checkpoint = open_checkpoint(made)
            Best(config, tmp_path, lambda text: None).restore(checkpoint)
            assert asdict(checkpoint.manifest)
            found["read"] += 1
        except CheckpointError as error:
            assert "checkpoint-4" in error.message
            found["refused"] += 1
    assert min(found["read"], found["refused"]) > 10, found
