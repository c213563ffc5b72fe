"""`push_to_hub`: upload the finished model to the Hugging Face Hub, through huggingface_hub.

huggingface_hub finds the token (HF_TOKEN, or what `hf auth login` stored); it is not kept here. Whatever can
fail for lack of rights or a network is tried before training begins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError, UploadError

_LATER = "push_to_hub=false trains without an upload; `hf upload OWNER/NAME FOLDER` uploads later"


@dataclass(frozen=True)
class Upload:
    """A repository that exists and may be written to. repo_id: OWNER/NAME."""

    repo_id: str
    url: str

    def upload(self, folder: Path) -> str:
        """Upload the content of `folder`; return the repository's address. Raises UploadError."""
        from huggingface_hub import HfApi

        try:
            with _quiet():
                HfApi().upload_folder(
                    repo_id=self.repo_id,
                    folder_path=folder,
                    commit_message="Upload a model trained with horizon-lm",
                )
        except Exception as error:  # of any kind; the model is on the disk
            raise UploadError(
                f"the model is in {folder}, but uploading it to {self.url} failed: {_reason(error)}",
                hint=f"run hf upload {self.repo_id} {folder}",
            ) from error
        return self.url


def prepare_upload(config: TrainConfig, warn: Callable[[str], None]) -> Upload:
    """Check the token, create the repository unless it exists, and check that it can be written to.

    Raises ConfigError for all that would make the upload fail after hours of training.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.constants import is_offline_mode

    if is_offline_mode():
        raise ConfigError(
            "push_to_hub is true, but HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids the network",
            hint=f"unset it; or {_LATER}",
        )
    if get_token() is None:
        raise ConfigError(
            "push_to_hub is true, but there is no token for the Hugging Face Hub",
            hint=f"set HF_TOKEN or run `hf auth login`; or {_LATER}",
        )
    api = HfApi()
    write: dict[str, Any] = {"write": True} if "write" in signature(api.auth_check).parameters else {}
    name = config.hub_model_id or Path(config.output_dir).expanduser().resolve().name
    with _refused(
        "the Hub does not accept the token", "set HF_TOKEN to a valid token, or run `hf auth login`"
    ):
        owner = api.whoami()
    _check_role(owner)
    with _refused(
        f"hub_model_id: {name} cannot be created",
        "set hub_model_id=OWNER/NAME, with an owner you may write to",
    ):
        repo = api.create_repo(name, private=config.hub_private_repo, exist_ok=True)
    with _refused(
        f"hub_model_id: {repo.repo_id} cannot be written to",
        "use a token with write access, or another hub_model_id",
    ):
        api.auth_check(repo.repo_id, **write)
        is_private = api.model_info(repo.repo_id).private
    if config.has_adapter and Path(str(config.model_name_or_path)).expanduser().is_dir():
        warn(
            f"the adapter names its base by a path on this machine, {config.model_name_or_path}; to load it "
            "elsewhere, set base_model_name_or_path in adapter_config.json to that model"
        )
    if config.hub_private_repo and not is_private:
        warn(f"{repo} exists and is public; hub_private_repo has no effect on a repository that exists")
    return Upload(repo.repo_id, str(repo))


def _check_role(owner: dict[str, Any]) -> None:
    role = owner.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ConfigError(
            "push_to_hub is true, but the token is read-only",
            hint=f"create a token with write access; or {_LATER}",
        )


@contextmanager
def _refused(what: str, hint: str) -> Iterator[None]:
    """Turn errors of the Hub and the network into ConfigError."""
    try:
        yield
    except Exception as error:  # of httpx, huggingface_hub or the system
        raise ConfigError(f"push_to_hub: {what}: {_reason(error)}", hint=f"{hint}; or {_LATER}") from error


def _reason(error: Exception) -> str:
    """Return the first line that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Show progress bars of the upload only on a terminal."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
