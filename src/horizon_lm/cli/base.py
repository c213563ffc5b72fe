"""What the verbs of the command line share: a configuration file and `key=value` after them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from horizon_lm.errors import ConfigError

if TYPE_CHECKING:
    from horizon_lm.config import TrainConfig

HELP = {"help_option_names": ["-h", "--help"]}
PASS_OPTIONS = {**HELP, "ignore_unknown_options": True}

SettingsArguments = Annotated[list[str] | None, typer.Argument(hidden=True)]


class SettingsCommand(TyperCommand):
    """A verb that takes a configuration file and overrides."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[CONFIG.yaml]", "[KEY=VALUE | --KEY VALUE]..."]


def split_arguments(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """What follows a verb -> (configuration file, overrides as `key=value`)."""
    config: str | None = None
    overrides: list[str] = []
    rest = iter(_with_resume(arguments))
    for argument in rest:
        name = argument.partition("=")[0]
        if argument.startswith("--") and "=" not in argument:
            value = next(rest, None)
            if value is None:
                raise ConfigError(f"command line: '{argument}' has no value", f"write {argument}=VALUE")
            overrides.append(f"{argument}={value}")
        elif argument.startswith("--") or "=" in argument and "/" not in name and os.sep not in name:
            overrides.append(argument)
        elif argument.startswith("-") and argument != "-":
            raise ConfigError(
                f"command line: '{argument}' is no option", "settings are key=value or --key value"
            )
        elif config is not None:
            hint = "settings are key=value; text with spaces needs quotes"
            raise ConfigError(f"command line: '{argument}' is neither key=value nor the only file", hint)
        else:
            config = argument
    return config, overrides


def _with_resume(arguments: Sequence[str]) -> list[str]:
    """`--resume` may stand alone: it means the latest checkpoint of output_dir."""
    found = list(arguments)
    for i, argument in enumerate(found):
        if argument != "--resume":
            continue
        following = found[i + 1] if i + 1 < len(found) else "--"
        is_value = not following.startswith("-") and "=" not in following
        if not is_value or following.endswith((".yaml", ".yml")):
            found[i] = "--resume=latest"
    return found


def load_settings(arguments: Sequence[str] | None) -> tuple[TrainConfig, list[str]]:
    from horizon_lm.config import load_config

    place, overrides = split_arguments(arguments or ())
    if place is not None and os.path.isdir(place):
        from horizon_lm.checkpoint.identify import no_settings

        raise no_settings(place)
    config, notes = load_config(place, overrides)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return config, notes


def require_named_model(config: TrainConfig) -> None:
    """Raises ConfigError, before a library is imported, for a model that can be had nowhere."""
    from horizon_lm.io.hub import require_model

    if config.init_model is None and config.model_name_or_path is not None:
        require_model(config.model_name_or_path, "model_name_or_path")
