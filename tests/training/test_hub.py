"""push_to_hub against a stand-in for the Hub's API: what is uploaded, and what is refused before training."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from adapter_runs import adapter_settings, make_base
from horizon_lm import cli
from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError
from small_runs import settings, write_text

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

TOKEN = "hf_canaryCanaryCanary"  # noqa: S105


class Hub:
    """What the stand-in holds. role: of the token. fails: parts of paths that are answered with 403."""

    def __init__(self) -> None:
        self.address = ""
        self.role, self.fails = "write", ""
        self.repos: dict[str, bool] = {}  # name -> private
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[str] = []

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        self.asked.append(f"{method} {path}")
        if self.fails and self.fails in path:
            return 403, {"error": "forbidden by the test"}
        if path == "/api/whoami-v2":
            return 200, {"name": "ada", "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'ada'}/{asked['name']}"
            known = name in self.repos
            self.repos.setdefault(name, asked.get("visibility") == "private" or asked.get("private") is True)
            return (409 if known else 200), {"url": f"{self.address}/{name}"}
        if path.endswith("/auth-check/write") or path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if "/preupload/" in path:
            return 200, {"files": [self._mode(file) for file in json.loads(body)["files"]]}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {
                "transfer": "basic",
                "objects": [self._place(o) for o in json.loads(body)["objects"]],
            }
        if path.startswith("/blobs/"):
            self.blobs[path.removeprefix("/blobs/")] = body
            return 200, {}
        if "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
            name = path.removeprefix("/api/models/").split("/commit/")[0]
            return 200, {"commitUrl": f"{self.address}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}
        name = path.removeprefix("/api/models/").split("?")[0]
        if method == "GET" and name in self.repos:
            return 200, {"id": name, "modelId": name, "private": self.repos[name], "tags": [], "siblings": []}
        return 404, {"error": f"not known to the stand-in: {path}"}

    def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _place(self, blob: dict[str, Any]) -> dict[str, Any]:
        return {**blob, "actions": {"upload": {"href": f"{self.address}/blobs/{blob['oid']}", "header": {}}}}

    def _commit(self, operations: list[dict[str, Any]]) -> None:
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]
                assert hashlib.sha256(self.blobs[value["oid"]]).hexdigest() == value["oid"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    state = Hub()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path.startswith("/api/") and self.headers.get("authorization") != f"Bearer {TOKEN}":
                status, found = 401, {"error": "no such token"}
            else:
                status, found = state.answer(self.command, self.path, body)
            data = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = _serve  # noqa: N815

        def log_message(self, *_: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", state.address)  # HF_ENDPOINT, which is read at import
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stand-in has no xet storage
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.txt")


def run_yaml(text: Path, tmp_path: Path, **changes: Any) -> str:
    values = {"max_steps": 2, "push_to_hub": True, **changes}
    (tmp_path / "run.yaml").write_text(settings(text, tmp_path / "my-run", **values).to_yaml())
    return str(tmp_path / "run.yaml")


def no_trace_of_the_token(place: Path, shown: str) -> None:
    assert TOKEN not in shown
    files = [path for path in place.rglob("*") if path.is_file()]
    assert files and not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_the_model_folder_is_uploaded(
    hub: Hub, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", run_yaml(text, tmp_path)]) == 0
    model = tmp_path / "my-run" / "model"
    local = {str(p.relative_to(model)): p.read_bytes() for p in model.rglob("*") if p.is_file()}
    assert hub.files == local and {"model.safetensors", "README.md", "tokenizer.json"} <= local.keys()
    assert hub.repos == {"ada/my-run": True}  # private
    shown = capsys.readouterr()
    assert f"uploaded    {hub.address}/ada/my-run" in shown.out
    no_trace_of_the_token(tmp_path, shown.out + shown.err)
    checked = next(i for i, asked in enumerate(hub.asked) if "auth-check" in asked)
    assert checked < next(i for i, asked in enumerate(hub.asked) if "/commit/" in asked)


def test_an_adapter_is_uploaded_alone(
    hub: Hub, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a warning, since its base is a path that others do not have."""
    base = make_base(tmp_path / "base")
    config = adapter_settings(text, tmp_path / "my-run", base, max_steps=1, push_to_hub=True)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert cli.main(["train", str(tmp_path / "run.yaml")]) == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= hub.files.keys()
    assert "model.safetensors" not in hub.files and "config.json" not in hub.files
    shown = capsys.readouterr().out
    assert f"the adapter names its base by a path on this machine, {base}" in shown
    no_trace_of_the_token(tmp_path, shown)


def test_a_failed_upload_leaves_the_model_and_says_how_to_go_on(
    hub: Hub, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A repository that exists and is public is used, with a warning."""
    hub.repos["lab/other"], hub.fails = False, "/commit/"
    assert cli.main(["train", run_yaml(text, tmp_path, hub_model_id="lab/other")]) == 7
    shown = capsys.readouterr()
    model = tmp_path / "my-run" / "model"
    assert f"the model is in {model}, but uploading it to {hub.address}/lab/other failed" in shown.err
    assert f"hint: run hf upload lab/other {model}" in shown.err
    assert (model / "model.safetensors").exists() and not hub.files
    assert "exists and is public" in shown.out
    lines = [json.loads(line) for line in (tmp_path / "my-run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["status"] == "finished"
    no_trace_of_the_token(tmp_path, shown.out + shown.err)


def spoil_token(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("HF_TOKEN", "hf_another")


def spoil_role(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.role = "read"


def spoil_create(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.fails = "/repos/create"


def spoil_rights(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.fails = "/auth-check"


def spoil_network(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")


def spoil_offline(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def spoil_login(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.delenv("HF_TOKEN")
    patch.setattr(constants, "HF_TOKEN_PATH", "/nowhere/token")


REFUSED = [
    (spoil_token, "the Hub does not accept the token"),
    (spoil_role, "the token is read-only"),
    (spoil_create, "cannot be created"),
    (spoil_rights, "cannot be written to"),
    (spoil_network, "does not accept the token"),
    (spoil_offline, "HF_HUB_OFFLINE"),
    (spoil_login, "there is no token"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_what_would_fail_at_the_end_is_refused_at_the_start(
    spoil: Any,
    message: str,
    hub: Hub,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(hub, monkeypatch)
    assert cli.main(["train", run_yaml(text, tmp_path)]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "hint: " in shown.err and "hf upload" in shown.err
    assert len(shown.err.splitlines()) == 2 and TOKEN not in shown.out + shown.err
    assert not (tmp_path / "my-run").exists() and not hub.files


@pytest.mark.parametrize("key", ["hub_token", "push_to_hub_token", "hf_hub_token"])
def test_a_token_in_the_settings_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match=key) as caught:
        TrainConfig.from_dict({"model_name_or_path": "m", "datasets": "a", key: TOKEN})
    assert TOKEN not in str(caught.value) and "HF_TOKEN" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["a/b/c", "", "/x", "a b", "../x"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="hub_model_id"):
        TrainConfig.from_dict({"model_name_or_path": "m", "datasets": "a", "hub_model_id": name})
