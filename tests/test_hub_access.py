"""A name that is no local path and cannot be looked up: one line, at once, whatever the command."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from horizon_lm import cli, hub_access
from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError
from horizon_lm.hub_access import require_reachable
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
    assert len(caplog.records) == 1 and "read from the local cache" in caplog.text
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
