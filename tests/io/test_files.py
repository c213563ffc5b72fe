"""Links, second names and pipes in a run's folder: nothing outside changes, nothing hangs."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import horizon_lm
from horizon_lm import cli, config_yaml, files
from horizon_lm.checkpoint.folder import list_checkpoints
from horizon_lm.config import DatasetConfig
from horizon_lm.data import Documents
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.leftovers import sweep_files
from horizon_lm.run import loggers, plot
from horizon_lm.run.export import write_folder
from horizon_lm.run.folder import RunFolder, claim
from horizon_lm.run.generate import prompts_of
from horizon_lm.run.metrics import read_steps
from horizon_lm.run.places import look
from horizon_lm.run.report import write_report
from horizon_lm.run.train import train
from small_runs import settings, write_text

SOURCE = Path(horizon_lm.__file__).parent
pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


@pytest.fixture(scope="module")
def base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps with everything that a run's folder holds."""
    run = tmp_path_factory.mktemp("runs") / "run"
    train(settings(text, run, max_steps=2, plot_loss=True))
    write_report(run)
    return run


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """What waits for a pipe fails, and does not stop the suite."""

    def late(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# What a run writes as a whole; what lies beside it meanwhile; what it goes on with.
RESULTS = ("loss.png", "report.html", "trace.json", "model")
SETTINGS = "config.resolved.yaml"
STAGED = tuple(f".{name}.tmp" for name in (SETTINGS, "loss.png", "report.html", "trace.json"))
CHECKPOINTS = ("checkpoint-3", ".tmp-checkpoint-3", ".del-checkpoint-1")
GOES_ON = ("metrics.jsonl", "tensorboard", "wandb")
KINDS = ("file", "folder", "nothing", "second name")


class Outside:
    """Files and folders outside of a run, which links in it point to."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        self._before = self._now()

    def plant(self, at: Path, kind: str) -> None:
        """Put a link to a file, to a folder or to nothing in place of `at`, or a second name of a file."""
        content = at.read_bytes() if at.is_file() else b"kept\nlast line, cut o"
        target = self.place / f"{at.name}-{kind}"
        files.remove(at)
        if kind == "folder":
            target.mkdir()
            (target / "keep").write_bytes(content)
        elif kind != "nothing":
            target.write_bytes(content)
        if kind == "second name":
            os.link(target, at)
        else:
            at.symlink_to(target)
        self._before = self._now()

    def _now(self) -> list[Any]:
        found = [self.place, *sorted(self.place.rglob("*"))]
        stats = [path.stat() for path in found]
        content = [path.read_bytes() if path.is_file() else None for path in found]
        return [(p, s.st_ino, s.st_mtime_ns, c) for p, s, c in zip(found, stats, content, strict=True)]

    @property
    def is_untouched(self) -> bool:
        return self._now() == self._before


@pytest.fixture
def outside(tmp_path: Path) -> Outside:
    return Outside(tmp_path / "outside")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "run")


def plant_all(run: Path, outside: Outside, kind: str) -> None:
    names = [*RESULTS, *STAGED, *CHECKPOINTS]
    if kind == "second name":
        names.remove("model")  # a file there is refused at the start, see below
    if kind in ("file", "second name"):
        names.append(SETTINGS)  # a run's folder has one that can be read
    for name in names:
        outside.plant(run / name, kind)


def go_on(run: Path) -> int:
    return cli.main(["resume", str(run), "max_steps=3", "plot_loss=true", "save_total_limit=2"])


@pytest.mark.parametrize("kind", KINDS)
def test_links_at_all_names_are_replaced_and_never_followed(kind: str, run: Path, outside: Outside) -> None:
    """A run goes on to its end and is reported. `checkpoint-3` is taken: the checkpoint has another name."""
    plant_all(run, outside, kind)
    assert go_on(run) == 0
    write_report(run)
    assert outside.is_untouched
    for name in (*RESULTS, SETTINGS, "metrics.jsonl"):
        assert (run / name).exists() and not (run / name).is_symlink(), name
        assert (run / name).is_dir() or (run / name).stat().st_nlink == 1, name
    assert look(run).is_finished and look(run).step == 3
    assert [line["step"] for line in read_steps(run / "metrics.jsonl")] == [1, 2, 3]
    assert [c.manifest.step for c in list_checkpoints(run)[0]] == [3, 2]
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []


class _Plants:
    """A callback: plants while the run goes on."""

    def __init__(self, run: Path, outside: Outside) -> None:
        self.run, self.outside = run, outside

    def on_step_end(self, state: Any, control: Any) -> None:
        if state.step == 1:
            for name in (*RESULTS, *STAGED, ".tmp-checkpoint-2"):
                self.outside.plant(self.run / name, "file")


def test_links_that_come_while_a_run_goes_on_do_not_end_it(
    text: Path, tmp_path: Path, outside: Outside
) -> None:
    run = tmp_path / "run"
    train(settings(text, run, max_steps=2, plot_loss=True), callbacks=[_Plants(run, outside)])
    write_report(run)
    assert outside.is_untouched and look(run).is_finished and look(run).model == run / "model"


def test_a_new_run_in_the_place_of_another_removes_links_alone(
    text: Path, run: Path, outside: Outside
) -> None:
    for name in (*RESULTS, *STAGED, *GOES_ON[:2]):
        outside.plant(run / name, "folder")
    train(settings(text, run, max_steps=1, plot_loss=True, overwrite_output_dir=True))
    assert outside.is_untouched and look(run).is_finished and not (run / "tensorboard").is_symlink()


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_run_goes_on_with_is_no_link(
    kind: str, run: Path, outside: Outside, capsys: pytest.CaptureFixture[str]
) -> None:
    """Refused before anything is read. A second name is harmless: the run goes on with a copy."""
    if kind == "second name":
        before = (run / "metrics.jsonl").read_text()
        with (run / "metrics.jsonl").open("a") as file:
            file.write('{"event": "st')  # what a killed run was writing
        outside.plant(run / "metrics.jsonl", kind)
        assert go_on(run) == 0 and outside.is_untouched
        after = (run / "metrics.jsonl").read_text()
        assert after.startswith(before)
        added = [json.loads(line)["event"] for line in after.removeprefix(before).splitlines()]
        assert added[:2] == ["start", "resume"] and added[-1] == "end"
        return
    for name in GOES_ON:
        content = (run / name).read_bytes() if (run / name).is_file() else None
        outside.plant(run / name, kind)
        assert go_on(run) == 2
        shown = capsys.readouterr().err
        assert f"error: {run / name} is a link to {outside.place}" in shown and "hint: " in shown
        assert "reading the data" not in shown
        files.remove(run / name)
        if content is not None:
            (run / name).write_bytes(content)
    assert outside.is_untouched
    if kind == "nothing":
        assert go_on(run) == 0  # the control


def test_a_file_where_the_model_goes_is_refused_before_the_run(run: Path, outside: Outside) -> None:
    outside.plant(run / "model", "second name")
    with pytest.raises(ConfigError, match="model is a file"), claim(str(run), overwrite=False, resume=True):
        pass
    assert outside.is_untouched


@pytest.mark.parametrize("kind", ["file", "nothing", "second name"])
def test_the_look_at_what_is_outside_sees_what_follows_links(
    kind: str, run: Path, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the tests above, for each writer: with plain calls in place of ours all of them fail."""

    def write(path: Path, content: Any, *, below: Path | None = None) -> None:
        with path.open("wb") as file:
            content(file) if callable(content) else file.write(content.encode())

    monkeypatch.setattr(files, "write_file", write)
    monkeypatch.setattr(files, "open_log", lambda path, goes_on: path.open("a"))
    folder = RunFolder(run)
    acts: dict[str, Callable[[], object]] = {
        "loss.png": lambda: plot.plot_loss(folder.metrics, folder.picture, title="a"),
        "report.html": lambda: write_report(run),
        "trace.json": lambda: write_report(run),
        SETTINGS: lambda: folder.write_settings("max_steps: 3"),
        "metrics.jsonl": lambda: files.open_log(folder.metrics, goes_on=True).write("line\n"),
    }
    for name, act in acts.items():
        outside.plant(run / name, kind)
        act()
        assert not outside.is_untouched, name
        files.remove(run / name)


# The functions themselves.


def test_folders_below_are_made_and_never_links(tmp_path: Path, outside: Outside) -> None:
    """The control: without `below` the parent is the user's, who may have linked it."""
    run = tmp_path / "run"
    run.mkdir()
    files.write_file(run / "a" / "b" / "c.txt", "text", below=run)
    assert (run / "a" / "b" / "c.txt").read_text() == "text"
    outside.plant(run / "link", "folder")
    for act in (
        lambda: files.write_file(run / "link" / "c.txt", "text", below=run),
        lambda: files.write_file(run / "link" / "more" / "c.txt", "text", below=run),
        lambda: files.make_folder(run / "link", below=run),
    ):
        with pytest.raises(
            ConfigError, match=r"link is a link to .*: a run writes only inside its own folder"
        ):
            act()
    with pytest.raises(AssertionError):
        files.write_file(run / "a" / ".." / ".." / "c.txt", "text", below=run)
    assert outside.is_untouched
    files.write_file(run / "link" / "c.txt", "text")
    assert not outside.is_untouched


def test_files_are_whole_or_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    old = os.umask(0o027)
    try:
        files.write_file(path, "before")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640

    def fails(file: Any) -> None:
        file.write(b"half")
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        files.write_file(path, fails)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        files.write_file(tmp_path / "folder", b"")
    assert path.read_text() == "before" and sorted(os.listdir(tmp_path)) == ["a.txt", "folder"]
    with pytest.raises(FileExistsError):
        files.create(path)
    with files.create(tmp_path / "new") as file:
        file.write(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError):
        files.create(tmp_path / "link")
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("end", ["", "cut o"])
def test_a_log_goes_on_after_its_whole_lines(is_shared: bool, end: str, tmp_path: Path) -> None:
    log, other = tmp_path / "log", tmp_path / "other"
    log.write_text("one\ntwo\n" + end)
    if is_shared:
        os.link(log, other)
    with files.open_log(log, goes_on=True) as file:
        file.write("three\n")
    assert log.read_text() == "one\ntwo\nthree\n"
    assert not is_shared or other.read_text() == "one\ntwo\n" + end
    with files.open_log(log, goes_on=False) as file:
        file.write("new\n")
    assert log.read_text() == "new\n"


def test_what_killed_processes_were_writing_is_swept_and_no_more(tmp_path: Path, outside: Outside) -> None:
    """In use, of other names, a link: left. Files of earlier versions go when they are old."""
    dead, link = (tmp_path / f".horizon-{digit * 16}.tmp" for digit in "ab")
    dead.write_text("half")
    outside.plant(link, "file")
    other = tmp_path / ".horizon-notes.tmp"
    other.write_text("mine")

    def meanwhile(file: Any) -> None:
        """Another file is put into the folder while this one is being written."""
        assert not dead.exists()
        files.write_file(tmp_path / "b.txt", "b")
        file.write(b"a")

    files.write_file(tmp_path / "a.txt", meanwhile)
    assert (tmp_path / "a.txt").read_text() == "a" and (tmp_path / "b.txt").read_text() == "b"
    assert other.exists() and link.is_symlink() and outside.is_untouched
    young, old, own = (tmp_path / name for name in ("tmpabcdefgh", "tmp12345678", "tmp1234567.txt"))
    for path in (young, old, own):
        path.touch()
    os.utime(old, (0, time.time() - 2 * 86_400))
    os.utime(own, (0, 0))
    from horizon_lm.plan.doctor import _EARLIER

    sweep_files(_EARLIER, tmp_path)
    assert young.exists() and own.exists() and not old.exists()


@pytest.mark.parametrize("moment", ["before", "while"])
def test_a_file_that_is_swept_before_it_is_locked_is_made_again(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has removed it, or holds its lock to do so, when its owner comes to lock it."""
    flock, swept, held = files.fcntl.flock, [], []

    def late(file: int, how: int) -> None:
        if not swept:
            swept.append(next(path for path in tmp_path.iterdir()))
            if moment == "before":
                swept[0].unlink()
            else:
                held.append(swept[0].open("rb+"))
                flock(held[0], how)
        flock(file, how)

    monkeypatch.setattr(files.fcntl, "flock", late)
    files.write_file(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").read_text() == "text" and swept[0].exists() == (moment == "while")
    for file in held:
        file.close()


def test_a_run_sweeps_what_earlier_versions_left(run: Path) -> None:
    for name in STAGED:
        (run / name).write_text("half")
    with claim(str(run), overwrite=True):
        assert not [name for name in STAGED if (run / name).exists()]
    for name in (f".{SETTINGS}.tmp", f".horizon-{'0' * 16}.tmp"):  # killed as it wrote its first file
        new = run.parent / f"new{name}"
        new.mkdir()
        (new / name).touch()
        with claim(str(new), overwrite=False):
            pass


def test_an_exported_folder_takes_the_place_of_a_link(tmp_path: Path, outside: Outside) -> None:
    """What a killed export left aside is put back, unless somebody else's link pretends to be that."""
    for kind in ("file", "folder", "nothing"):
        outside.plant(tmp_path / "model", kind)
        write_folder(tmp_path / "model", lambda place: files.write_file(place / "a", kind))  # noqa: B023
        assert (tmp_path / "model" / "a").read_text() == kind and not (tmp_path / "model").is_symlink()
    (outside.place / "old").mkdir()
    (tmp_path / ".new.horizon-old-x").symlink_to(outside.place)
    before = outside._now()
    write_folder(tmp_path / "new", lambda place: files.write_file(place / "a", "b"))
    assert outside._now() == before and (tmp_path / "new" / "a").read_text() == "b"


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_loggers_do_not_follow_links(
    name: str, module: str, text: Path, tmp_path: Path, outside: Outside, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def open_writer(*place: Any, **settings: Any) -> Any:
        opened.append(place or settings["dir"])
        return SimpleNamespace(add_text=lambda *_: None)

    fake = SimpleNamespace(SummaryWriter=open_writer, init=open_writer)
    monkeypatch.setitem(sys.modules, module, fake)
    run = tmp_path / "run"
    run.mkdir()
    config = settings(text, run)
    outside.plant(run / name, "folder")
    with pytest.raises(ConfigError, match="is a link to"):
        loggers._KINDS[name].open(config, run)
    assert not opened and outside.is_untouched
    (run / name).unlink()
    loggers._KINDS[name].open(config, run)
    assert opened and (run / name).is_dir()


def test_an_output_that_the_user_names_is_written_as_the_user_has_it(
    tmp_path: Path, outside: Outside
) -> None:
    outside.plant(tmp_path / "link.yaml", "file")
    files.write_output(tmp_path / "link.yaml", "max_steps: 1")
    assert (tmp_path / "link.yaml").is_symlink() and (tmp_path / "link.yaml").read_text() == "max_steps: 1"


# Pipes and devices.


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
                with pytest.raises(DataError, match="a named pipe|a pipe or a device|leads out of"):
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


# Nothing writes but by these functions.

_PLAIN_FLAGS = {"O_RDONLY", "O_DIRECTORY", "O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK"}
_WRITERS = {
    *("write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "tofile", "savefig"),
    *("save_pretrained", "mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryFile", "TemporaryDirectory"),
    *("SummaryWriter", "save_to_disk", "memmap", "export_chrome_trace"),
}
_OF_OS = {"replace", "rename", "renames", "link", "symlink", "truncate", "mkfifo", "mknod"}
_OF_SHUTIL = {"copy", "copy2", "copyfile", "copytree", "move"}
_STAGED_FOLDER = "fills a folder that was staged, and is renamed"
_OWN_FOLDER = "makes a new file or folder, of a name that nobody knows"
# (module, call) -> why it may write by itself.
ALLOWED = {
    ("files.py", "*"): "the functions",
    ("checkpoint/disk.py", "os.open"): "new files in a new folder, O_EXCL and O_NOFOLLOW",
    ("leftovers.py", "mkdtemp"): _OWN_FOLDER,
    ("leftovers.py", "os.open"): "the lock file in such a folder; O_NOFOLLOW where it is another's",
    ("run/export.py", "mkdtemp"): _OWN_FOLDER,
    ("run/export.py", "save_pretrained"): _STAGED_FOLDER,
    ("run/train.py", "save_pretrained"): _STAGED_FOLDER + ", or is written by such a function",
    ("run/saver.py", "save_pretrained"): "fills a temporary folder",
    ("run/plot.py", "savefig"): "writes into a file that `files` opened",
    ("run/loggers.py", "SummaryWriter"): "in a folder that `files` looked at",
    ("data/tokens.py", "memmap"): "mode r",
    ("plan/calibrate.py", "TemporaryFile"): "has no name",
    ("output.py", "os.open"): "/dev/null",
    ("data/encode.py", "save_pretrained"): "fills a temporary folder",
    ("bench/worker.py", "fdopen"): "standard output",
    ("bench/jobs.py", "TemporaryFile"): "has no name",
    ("bench/memory.py", "write_text"): "a switch of the kernel, /proc/self/clear_refs",
    ("bench/jobs.py", "open"): "the results of benchmarks, in a file that the user names",
}


def writes_of(source: str) -> set[str]:
    """The calls in a module that may write a file, by name."""
    found = set()
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        is_method = isinstance(call.func, ast.Attribute)
        name = _last(call.func)
        base = _last(call.func.value) if isinstance(call.func, ast.Attribute) else ""
        if (base, name) == ("os", "open"):
            flags = {
                _last(node) for node in ast.walk(call.args[1]) if isinstance(node, ast.Name | ast.Attribute)
            }
            if flags - _PLAIN_FLAGS - {"os"}:
                found.add("os.open")
        elif name in ("open", "fdopen") and base not in ("gzip", "self"):
            if _may_write(call, 0 if is_method and base not in ("os", "io") else 1):
                found.add(name)
        elif base == "os" and name in _OF_OS or base == "shutil" and name in _OF_SHUTIL:
            found.add(f"{base}.{name}")
        elif name in _WRITERS or name == "rename" and "disk" not in base:
            found.add(name)
    return found


def _last(node: ast.expr) -> str:
    """The last part of a name with dots."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _may_write(call: ast.Call, place: int) -> bool:
    """Whether the mode of an `open` is none that reads alone. place: of the mode among the arguments."""
    modes: Sequence[ast.expr] = [k.value for k in call.keywords if k.arg == "mode"] or call.args[
        place : place + 1
    ]
    if not modes:
        return False
    return not isinstance(modes[0], ast.Constant) or bool(set("wax+") & set(str(modes[0].value)))


def test_nothing_writes_by_itself() -> None:
    found = {
        (str(path.relative_to(SOURCE)), name)
        for path in SOURCE.rglob("*.py")
        for name in writes_of(path.read_text())
    }
    found = {("files.py", "*") if module == "files.py" else (module, name) for module, name in found}
    assert found - ALLOWED.keys() == set(), "write by horizon_lm.files, or say here why not"
    assert ALLOWED.keys() - found == set(), "these are gone"


@pytest.mark.parametrize(
    "line",
    [
        "open(path, 'w')",
        "open(path, mode='ab')",
        "path.open('rb+')",
        "path.open(mode)",
        "os.fdopen(file, 'w')",
        "os.open(path, os.O_RDONLY | os.O_CREAT)",
        "os.open(path, flags)",
        "path.write_text('a')",
        "os.replace(a, b)",
        "path.rename(b)",
        "shutil.copy(a, b)",
        "tempfile.NamedTemporaryFile()",
        "array.tofile(path)",
        "figure.savefig(path)",
        "tokenizer.save_pretrained(folder)",
    ],
)
def test_the_look_at_the_source_sees_writes(line: str) -> None:
    assert len(writes_of(line)) == 1


@pytest.mark.parametrize(
    "line",
    ["open(path)", "path.open('rb')", "text.replace('a', 'b')", "os.open(path, os.O_RDONLY | os.O_CLOEXEC)"],
)
def test_the_look_at_the_source_passes_what_reads(line: str) -> None:
    assert not writes_of(line)
