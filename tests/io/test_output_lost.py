"""Output that fails while a command works: closed streams, broken pipes, full disks, failing loggers.

What a command has on disk is what it has with good streams; what it prints goes where it still can.
"""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from horizon_lm import cli
from horizon_lm.cli import command
from horizon_lm.config import TrainConfig
from horizon_lm.errors import OutputLostError
from horizon_lm.io.output import Output, command_output, lasting_output
from horizon_lm.report import loggers, metrics
from horizon_lm.report.display import RichProgress, choose_progress
from horizon_lm.report.loggers import Loggers
from horizon_lm.report.metrics import Metrics, MetricsFile, read_lines, read_steps
from horizon_lm.report.records import StepRecord
from horizon_lm.training import finish, sample
from horizon_lm.training import train as run_train
from horizon_lm.training.describe import TrainResult
from horizon_lm.training.signals import watched
from small_runs import losses_of, settings, tensors_of, values, write_text

pytestmark = pytest.mark.usefixtures("one_thread")


class Failing(io.StringIO):
    """A stream whose first `good` lines arrive, and that then answers as the system does."""

    def __init__(self, code: int = errno.ENOSPC, good: int = 0, *, is_terminal: bool = False) -> None:
        super().__init__()
        self.code, self.good, self.is_terminal = code, good, is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        if self.getvalue().count("\n") >= self.good:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(text)


def metrics_of(step: int) -> Metrics:
    return Metrics(step, 0.1, 2.0, 0.5, 1e-3, 1234.5, 0.42, 100, 90, 1.0, 0, 2_000_000_000, 5_000_000)


# Processes.


def horizon(line: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a shell's command line, in which $H is the command, and whose exit code is that of $H."""
    command = f'set -o pipefail; H="{sys.executable} -m horizon_lm"; {line}'
    return subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False, **options
    )


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **changes}


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("$H version >/dev/full", 3, "error: writing to standard output failed: No space left on device"),
        ("$H version >&-", 2, "error: writing to standard output failed: it is closed"),
        ("$H --help >/dev/full", 3, "No space left on device"),
        ("$H config docs | true", 1, ""),
        ("$H version 2>&-", 0, ""),
        ("$H config show nowhere.yaml 2>&-", 2, ""),
        ("$H config show nowhere.yaml 2>/dev/full", 2, ""),
        ("$H config show nowhere.yaml >&- 2>&-", 2, ""),
        ("$H version", 0, ""),
    ],
)
def test_a_command_that_prints_its_result_ends_with_one_line_or_none(
    line: str, code: int, said: str, tmp_path: Path
) -> None:
    done = horizon(line, cwd=tmp_path, env=environment())
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("error: ") if said else done.stderr == ""
    assert said in done.stderr and "bug" not in done.stderr and "Traceback" not in done.stderr
    if line == "$H version":  # the control
        assert done.stdout


def test_a_command_whose_encoding_lacks_characters_replaces_them(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model_name_or_path: a/b\ndatasets: d.jsonl\nrun_name: größe\n")
    env = environment(PYTHONIOENCODING="ascii:strict")
    done = horizon("$H config show run.yaml", cwd=tmp_path, env=env)
    assert done.returncode == 0 and "run_name: gr??e" in done.stdout


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="module")
def straight(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose streams are good."""
    folder = tmp_path_factory.mktemp("runs") / "straight"
    with redirect_stdout(io.StringIO()):
        run_train.train(settings(text, folder, max_steps=4))
    return folder


def assert_same_run(found: Path, expected: Path) -> None:
    assert losses_of(found) == losses_of(expected)
    assert json.loads((found / "metrics.jsonl").read_text().splitlines()[-1])["status"] == "finished"
    for step in (1, 2, 3, 4):
        assert tensors_of(found / f"checkpoint-{step}") == tensors_of(expected / f"checkpoint-{step}")
    name = "model/model.safetensors"
    assert (found / name).read_bytes() == (expected / name).read_bytes()


def test_training_goes_on_when_its_reader_has_gone(text: Path, tmp_path: Path, straight: Path) -> None:
    """`| head -1` leaves before the first step: the run is whole, and standard error tells of it."""
    config = TrainConfig.from_dict(values(text, tmp_path / "run", max_steps=4))
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    done = horizon("$H train run.yaml | head -1", cwd=tmp_path, env=environment())
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr.startswith("warning: standard output: Broken pipe; the rest is printed here\n")
    assert (
        "step 4/4" in done.stderr and "checkpoint-4 saved" in done.stderr and "trained 4 steps" in done.stderr
    )
    assert "Exception ignored" not in done.stderr
    assert_same_run(tmp_path / "run", straight)


def test_training_goes_on_when_nobody_can_hear_it(text: Path, tmp_path: Path, straight: Path) -> None:
    """The log's disk is full and standard error is closed: metrics.jsonl tells the whole run."""
    config = TrainConfig.from_dict(values(text, tmp_path / "run", max_steps=4))
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    done = horizon("$H train run.yaml >/dev/full 2>&-", cwd=tmp_path, env=environment())
    assert done.returncode == 0
    assert_same_run(tmp_path / "run", straight)


# In one process.


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EPIPE])
def test_work_that_is_on_disk_is_done_whatever_becomes_of_its_text(
    straight: Path, tmp_path: Path, code: int
) -> None:
    run, out = str(straight), str(tmp_path / "model")
    for arguments in (["verify", run], ["export", run, out], ["report", run]):
        error = io.StringIO()
        with redirect_stdout(Failing(code)), redirect_stderr(error):
            assert cli.main(arguments) == 0, arguments
        told = error.getvalue()
        assert "bug" not in told
        assert (f"standard output: {os.strerror(code)}; the rest" in told) == (code != errno.EPIPE), told
    assert (tmp_path / "model" / "model.safetensors").is_file() and (straight / "report.html").is_file()
    with redirect_stdout(Failing(code)), redirect_stderr(io.StringIO()):  # whose text is all there is
        assert cli.main(["config", "schema"]) == {errno.ENOSPC: 3, errno.EIO: 2, errno.EPIPE: 1}[code]


def test_a_broken_pipe_of_something_else_is_no_lost_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """typer ends silently with 1 for any EPIPE, a connection's included."""

    def fail(_: str) -> str:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(command, "_installed", fail)
    with redirect_stderr(io.StringIO()) as error:
        assert cli.main(["env"]) == 1
    assert "BrokenPipeError" in error.getvalue()


def test_streams_answer_for_each_other_and_are_put_back() -> None:
    out, error = Failing(good=1), io.StringIO()
    with redirect_stdout(out), redirect_stderr(error):
        with lasting_output(after_pipe=True):
            for line in ("one", "two", "three"):
                print(line)
        assert sys.stdout is out and sys.stderr is error
    assert out.getvalue() == "one\n"
    full = os.strerror(errno.ENOSPC)
    assert error.getvalue() == f"warning: standard output: {full}; the rest is printed here\ntwo\nthree\n"
    out, bad = io.StringIO(), Failing()
    with redirect_stdout(out), redirect_stderr(bad), lasting_output():
        print("to standard error", file=sys.stderr)
    assert out.getvalue().endswith("the rest is printed here\nto standard error\n")
    with redirect_stdout(Failing()), redirect_stderr(Failing()), lasting_output():
        print("to nobody")
    with redirect_stdout(None), redirect_stderr(None), lasting_output():  # type: ignore[type-var]
        print("nor here")
    with redirect_stdout(Failing()), command_output(), pytest.raises(OutputLostError):
        print("a result")
    with redirect_stdout(Failing()), command_output():
        with lasting_output():
            print("a remark")
        print("and what follows it")  # it is known to be lost


def test_a_stream_refuses_bytes_and_knows_its_terminal() -> None:
    stream = Output(Failing(is_terminal=True), "standard output")
    with pytest.raises(TypeError):
        stream.write(b"bytes")  # type: ignore[arg-type]
    assert stream.isatty() and stream.encoding == "utf-8"
    closed = Output(None, "standard output")
    assert not closed.isatty() and closed.write("text") == 4
    with pytest.raises(io.UnsupportedOperation):
        closed.fileno()
    gone = io.StringIO()
    gone.close()
    closed = Output(gone, "standard output")
    assert not closed.isatty() and closed.write("text") == 4 and closed.fault == "it is closed"


def test_a_display_becomes_plain_lines_when_its_terminal_goes() -> None:
    terminal, error = Failing(errno.EIO, good=1, is_terminal=True), io.StringIO()
    with redirect_stdout(terminal), redirect_stderr(error), lasting_output(after_pipe=True):
        progress = choose_progress("rich")
        assert isinstance(progress, RichProgress)
        with progress:
            progress.stage("on the terminal")
            progress.start(2)
            print("a callback's words")
            for step in (1, 2):
                record = StepRecord(step, 0.1, 2.0, 0.5, 1e-3, 100, 0.01, False)
                progress.step(record, metrics_of(step))
            progress.warn("careful")
    told = error.getvalue()
    assert "on the terminal" in terminal.getvalue()
    assert "step 2/2" in told and "warning: careful" in told and "\x1b" not in told


# metrics.jsonl.


def metrics_file(path: Path, said: list[str]) -> MetricsFile:
    return MetricsFile(path, begin=lambda: None, header={"run_name": None}, warn=said.append)


def write_run(path: Path, said: list[str], before_step: Callable[[int], None]) -> list[str]:
    with metrics_file(path, said) as file:
        for step in range(1, 7):
            before_step(step)
            file.step = step
            file.write_step(metrics_of(step))
    return [line["event"] for line in read_lines(path)]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_lines_wait_for_a_disk_that_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """It takes a part of a line, then none for some steps: all lines arrive, each once and whole."""
    said: list[str] = []
    write, bad = os.write, [False]

    def partial(file: int, data: bytes) -> int:
        if not bad[0]:
            return write(file, data)
        if len(data) > 700:  # several lines wait: some of them fit
            return write(file, data[:100])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(metrics.os, "write", partial)
    events = write_run(tmp_path / "m.jsonl", said, lambda step: bad.__setitem__(0, 2 <= step <= 5))
    assert events == ["start", *6 * ["step"], "end"]
    assert [line["step"] for line in read_steps(tmp_path / "m.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert said == [f"{tmp_path / 'm.jsonl'}: {os.strerror(code)}; its lines wait, the run continues"]


def test_lines_that_never_fit_are_counted_at_the_end(tmp_path: Path) -> None:
    """The system's own limit on a file, in the middle of a line."""
    said: list[str] = []
    path = tmp_path / "m.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(step: int) -> None:
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 50, before[1]))

    try:
        events = write_run(path, said, limit)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert events == ["start", "step", "step"]  # and a line that is cut off, as a killed run leaves it
    why = os.strerror(errno.EFBIG)
    assert said == [f"{path}: {why}; its lines wait, the run continues", f"{path} lacks 5 lines: {why}"]


def test_what_waits_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(metrics, "_MOST_UNWRITTEN", 1000)
    monkeypatch.setattr(metrics.os, "write", full)
    said: list[str] = []
    with metrics_file(tmp_path / "m.jsonl", said) as file:
        for step in range(1, 101):
            file.write_step(metrics_of(step))
        assert len(file._unwritten) <= 1000
    assert said[1].endswith("lacks 102 lines: full")


# Loggers, and what comes after the run.


class Flaky:
    """A logger that fails for its first lines, and as it is closed."""

    bad = 2

    def __init__(self, config: TrainConfig, folder: Path) -> None:
        self.got: list[int] = []
        if not made:
            made.append(None)
            raise RuntimeError("no network")
        made.append(self)

    def log(self, values: Mapping[str, float], step: int) -> None:
        if step <= self.bad:
            raise OSError(errno.ENOSPC, "full")
        self.got.append(step)

    def close(self, status: str) -> None:
        raise RuntimeError("cannot say goodbye")


made: list[Flaky | None] = []


def test_a_logger_that_fails_loses_its_lines_not_the_run(
    monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    made.clear()
    monkeypatch.setitem(loggers._KINDS, "tensorboard", loggers._Kind("json", Flaky))
    monkeypatch.setattr(loggers, "_LEAST_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(loggers, "_PAUSE_FACTOR", 0.0)
    said: list[str] = []
    with Loggers(settings(text, tmp_path, report_to=["tensorboard"]), tmp_path, said.append) as all_of_them:
        for step in (1, 2, 3, 4):
            all_of_them.step(metrics_of(step))
    assert made[1] is not None and made[1].got == [3, 4]
    assert said == [
        "tensorboard failed at step 1 (RuntimeError: no network); the run continues",
        "tensorboard missed 2 of 4 records",
        "tensorboard could not be closed (RuntimeError: cannot say goodbye)",
    ]


def test_a_logger_that_fails_is_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    made.clear()
    monkeypatch.setitem(loggers._KINDS, "tensorboard", loggers._Kind("json", Flaky))
    with Loggers(
        settings(text, tmp_path, report_to=["tensorboard"]), tmp_path, lambda t: None
    ) as all_of_them:
        for step in range(1, 100):
            all_of_them.step(metrics_of(step))
    assert made == [None]  # opening it was tried once


def test_a_run_that_is_saved_does_not_fail_for_its_extras(
    monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path, straight: Path
) -> None:
    """Sample, picture, a callback that prints to a stream that fails, and a disk that takes no metrics."""

    def fail(*_: Any, **__: Any) -> Any:
        raise ValueError("no such device")

    class Prints:
        def on_step_end(self, state: Any, control: Any) -> None:
            print("a callback's words", state.step)

    write = os.write

    def full(file: int, data: bytes) -> int:
        if b'"event"' in bytes(data[:200]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data)

    monkeypatch.setattr(sample, "complete", fail)
    monkeypatch.setattr(finish, "plot_loss", fail)
    monkeypatch.setattr(metrics.os, "write", full)
    error = io.StringIO()
    config = settings(text, tmp_path / "run", max_steps=4, plot_loss=True)
    with redirect_stdout(Failing(errno.EIO, good=2)), redirect_stderr(error):
        result = run_train.train(config, callbacks=[Prints()])
    assert isinstance(result, TrainResult) and result.num_steps == 4
    told = error.getvalue()
    for part in (
        *("a callback's words 4", "warning: no sample completion: ValueError: no such device"),
        *(
            "warning: loss.png is not drawn: ValueError: no such device",
            "metrics.jsonl lacks ",
            "trained 4 steps",
        ),
    ):
        assert part in told
    name = "model/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (straight / name).read_bytes()
    assert tensors_of(tmp_path / "run" / "checkpoint-4") == tensors_of(straight / "checkpoint-4")


# A terminal that is closed.


def test_a_hangup_stops_a_run_once_and_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with watched() as request:
            for _ in range(2):  # by the system and by the shell
                os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal is signal.SIGHUP and request.exit_code == 75
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with watched() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)
