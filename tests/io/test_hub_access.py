"""A name that is no local path and cannot be looked up: one line, at once, whatever the command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from horizon_lm import cli
from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError
from horizon_lm.io import hub as hub_access
from horizon_lm.io.hub import require_reachable
from small_runs import values, write_text


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No variable forbids requests, and the caches are empty. Afterwards all is as it was."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_ETAG_TIMEOUT", "HF_DATASETS_CACHE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub_access, "_gone", set())
    monkeypatch.setattr(hub_access, "_said", set())
    probe = hub_access._probe
    probe.cache_clear()
    yield
    probe.cache_clear()


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> str:
    """An endpoint on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    return endpoint


def test_every_command_says_so_at_once(
    closed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = write_text(tmp_path / "text.txt")
    plain = TrainConfig(init_model=values(text, tmp_path)["init_model"], datasets=[str(text)], max_length=16)
    (tmp_path / "plain.yaml").write_text(plain.to_yaml())
    model = ["model_name_or_path=nope", f"datasets={text}"]
    cases = [
        (["train", *model], 2, "model_name_or_path"),
        (["plan", *model], 2, "model_name_or_path"),
        (["eval", "model_name_or_path=nope", f"datasets={text}", f"eval_datasets={text}"], 2, "model_name"),
        (["generate", "nope", "--prompt", "a"], 2, "model"),
        (["data", "preview", *model], 2, "model_name_or_path"),
        (["train", "plain.yaml", "tokenizer_name_or_path=who/nope"], 2, "tokenizer_name_or_path"),
        (["train", "plain.yaml", "train_tokenizer_vocab_size=300", "datasets=who/nope"], 4, "datasets"),
    ]
    for arguments, code, key in cases:
        started = time.monotonic()
        assert cli.main(arguments) == code, (arguments, capsys.readouterr())
        error, hint = capsys.readouterr().err.strip().splitlines()
        assert key in error and "nope' is neither a" in error and closed in error, arguments
        assert hint.startswith("hint: check the path; looked in ") and "network" in hint
        assert time.monotonic() - started < 30  # seconds of retries were 27 for each request


@pytest.mark.parametrize("is_offline", [False, True])
def test_a_model_that_is_nowhere_is_said_before_anything_is_imported(
    tmp_path: Path, is_offline: bool
) -> None:
    """Six commands in one process of its own: one line and a hint each, no file written, no torch imported.
    The negative control: a model's folder is looked at (and found empty) by libraries."""
    write_text(tmp_path / "text.txt")
    (tmp_path / "empty").mkdir()
    data, model = "datasets=text.txt", "model_name_or_path=nope"
    commands = [
        ["init", "--model", "nope", "--dataset", "text.txt"],
        ["chat", "nope"],
        ["generate", "nope", "--prompt", "a"],
        ["eval", "nope", "eval_datasets=text.txt"],
        ["eval", model, "eval_datasets=text.txt"],
        ["plan", model, data],
        ["data", "preview", model, data],
        ["train", model, data],
    ]
    script = (
        "import sys; from horizon_lm import cli\n"
        f"codes = [cli.main(command) for command in {commands!r}]\n"
        "assert codes == [2] * len(codes), codes\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
        "assert cli.main(['plan', 'model_name_or_path=./empty', 'datasets=text.txt']) == 2\n"
        "assert 'transformers' in sys.modules\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": str(int(is_offline)), "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()[: 2 * len(commands)]
    assert all("nope' is neither a folder here" in line for line in lines[::2])
    assert all(line.startswith("hint: check the path; looked in ") for line in lines[1::2])
    assert {path.name for path in tmp_path.iterdir()} <= {"text.txt", "empty", "home"}


class _KnowsNothing(BaseHTTPRequestHandler):
    """A Hub without that model; or one that asks for a login."""

    code = "RepoNotFound"

    def do_GET(self) -> None:
        self.send_response(401 if self.code == "GatedRepo" else 404)
        self.send_header("X-Error-Code", self.code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("code", ["RepoNotFound", "GatedRepo"])
def test_init_writes_nothing_for_a_name_that_the_hub_does_not_know(tmp_path: Path, code: str) -> None:
    """The negative control: a model that asks for a login is there, and is written down."""
    write_text(tmp_path / "text.txt")
    handler = type("Handler", (_KnowsNothing,), {"code": code})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"}
        environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path)}
        script = "import sys; from horizon_lm import cli; sys.exit(cli.main(sys.argv[1:]))"
        command = [sys.executable, "-c", script, "init", "--model", "who/nope", "--dataset", "text.txt"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        server.shutdown()
    if code == "GatedRepo":
        assert done.returncode == 0 and (tmp_path / "horizon.yaml").exists(), done.stderr
        return
    assert done.returncode == 2 and not (tmp_path / "horizon.yaml").exists(), done.stderr
    assert done.stderr.splitlines()[0] == (
        "error: --model='who/nope' is neither a folder here nor a model of the Hub"
    )


def test_offline_by_choice_is_said_and_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub_access, "_probe", lambda endpoint: pytest.fail("asked"))
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set") as caught:
        require_reachable("nope", "model_name_or_path")
    assert "unset HF_HUB_OFFLINE" in (caught.value.hint or "")


def test_a_cached_model_is_taken_without_a_network(
    closed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Said once; from then on no library tries the network. The negative control: another name."""
    (tmp_path / "hub" / "models--who--there" / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / "home" / "datasets" / "Who___some_data").mkdir(parents=True)
    for _ in range(2):
        require_reachable("who/there", "model_name_or_path")
    assert len(caplog.records) == 1 and "reading 'who/there' from the local cache" in caplog.text
    assert constants.HF_HUB_OFFLINE and hub_access.is_offline()
    require_reachable("Who/SomeData", "datasets", kind="dataset")
    with pytest.raises(ConfigError, match=f"{closed} cannot be reached"):
        require_reachable("who/else", "model_name_or_path")


def test_a_network_that_works_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One connection for all names, through the proxy where there is one."""
    for variable in (None, "HTTP_PROXY"):
        hub_access._probe.cache_clear()
        with socket.create_server(("127.0.0.1", 0)) as server:
            place = f"127.0.0.1:{server.getsockname()[1]}"
            if variable is None:
                monkeypatch.setattr(constants, "ENDPOINT", f"http://{place}")
            else:
                monkeypatch.setattr(constants, "ENDPOINT", "http://nobody.invalid")
                monkeypatch.setenv("http_proxy", f"http://{place}")
            require_reachable("nope", "model_name_or_path")
            require_reachable("who/nope", "datasets", kind="dataset")
            assert not constants.HF_HUB_OFFLINE
            server.settimeout(5)
            server.accept()[0].close()
            server.settimeout(0.1)
            with pytest.raises(TimeoutError):
                server.accept()


def test_a_network_that_does_not_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: released.wait(60))
    monkeypatch.setattr(hub_access, "_PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(ConfigError, match=r"no answer in 0.2 s"):
        require_reachable("nope", "model_name_or_path")
    assert time.monotonic() - started < 10
    released.set()


def test_paths_are_no_business_of_the_hub(closed: str, tmp_path: Path) -> None:
    for name in (str(tmp_path), "/not/here", "./nope", "data/train/a.jsonl"):
        require_reachable(name, "datasets", kind="dataset")
    with pytest.raises(ConfigError, match="cannot be reached"):  # the control: a name is looked up there
        require_reachable("nope", "datasets", kind="dataset")
