"""Strict loading of checkpoints through transformers' own loader.

transformers fills missing weights with random values, skips unknown ones, and prints a table. Here missing,
unknown and misshapen weights are errors with their names, unless allowed.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from horizon_lm.config.patterns import compiled
from horizon_lm.errors import DataError, UnsupportedModelError
from horizon_lm.model.configuration import read_configuration
from horizon_lm.model.folder import check_model_folder
from horizon_lm.words import parameters, size

_log = logging.getLogger(__name__)
_SHOWN = 4  # names in a message
# Constants in old checkpoints that transformers does not always skip.
_OLD_CONSTANTS = re.compile(r"\.(attn|attention)\.masked_bias$")
# Maximum parameters per byte of weight files: two at four bits, with room for missing ones; and a number that
# is always accepted.
_MOST_PER_BYTE, _ALWAYS = 16, 100_000_000
_ANSI = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Allowed:
    """Regular expressions, found anywhere in a name (`re.search`).

    missing: weights that may be absent or of another shape; transformers initialises them.
    unexpected: weights of the checkpoint that the model may lack. by_settings: the user can change these.
    """

    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    by_settings: bool = True


# For generation: weights that the model does not use do no harm.
TO_GENERATE = Allowed(unexpected=("",), by_settings=False)


def model_class(config: Any) -> Any:
    """The class of transformers (`AutoModelForCausalLM`, ...) that makes the model of a configuration.

    Vision-language models that are no causal language models have a class of their own.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    has_own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    is_text = has_own or type(config) in AutoModelForCausalLM._model_mapping
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    return AutoModelForImageTextToText if sees and not is_text else AutoModelForCausalLM


def read_pretrained(name: str, allowed: Allowed, *, seed: int = 0, **options: Any) -> nn.Module:
    """Load the language model, or vision-language model, of a folder or Hub name.

    seed: for allowed missing weights. options: for transformers' `from_pretrained`. Raises DataError, with
    names, if checkpoint and model do not fit, UnsupportedModelError for quantised weights, and whatever
    transformers raises.
    """
    check_model_folder(name)
    given = {key: options[key] for key in ("revision", "local_files_only") if key in options}
    config = read_configuration(
        name,
        trust_remote_code=bool(options.get("trust_remote_code")),
        attn_implementation=options.pop("attn_implementation", None),
        **given,
    )
    missing = [compiled(pattern, "allow_missing") for pattern in allowed.missing]
    unexpected = [compiled(pattern, "allow_unexpected") for pattern in allowed.unexpected]
    method = _quantisation(name, config)
    _check_size(name, config, options)
    with without_messages("LOAD REPORT") as reports, seeded(seed):
        try:
            loaded: Any = model_class(config).from_pretrained(
                name,
                config=config,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **_dequantised(method),
                **options,
            )
            model, info = loaded
        except Exception as error:
            broken = _not_converted(reports)
            if broken:
                raise DataError(
                    f"the weights in {name!r} are incomplete: {_some(broken)} cannot be put together from "
                    "what the files hold",
                    hint="download or export it again; an expert or a part of a fused weight is missing",
                ) from error
            raise
    _check_quantised(model, name)
    shapes = {key: (tuple(found), tuple(wanted)) for key, found, wanted in info["mismatched_keys"]}
    lacking = sorted(set(info["missing_keys"]) | set(shapes), key=_natural)
    strange = sorted(info["unexpected_keys"], key=_natural)
    _check_fit(
        name,
        [key for key in lacking if not _fits(missing, key) and key not in shapes],
        [key for key in strange if not _fits(unexpected, key) and not _OLD_CONSTANTS.search(key)],
        {key: shapes[key] for key in lacking if key in shapes and not _fits(missing, key)},
        by_settings=allowed.by_settings,
    )
    if lacking:
        _log.warning("%s: random values (allow_missing) for %s: %s", name, _count(lacking), _some(lacking))
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """While open, torch draws from `seed` on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def check_has_weights(model: nn.Module) -> None:
    """Raise DataError for a model object with parameters or buffers without values."""
    named = [*model.named_parameters(), *model.named_buffers()]
    hollow = [name for name, tensor in named if nn.parameter.is_lazy(tensor) or tensor.is_meta]
    if hollow:
        raise DataError(
            f"{type(model).__name__} has no values for {len(hollow)} of its {len(named)} tensors: "
            f"{_some(hollow)}",
            hint="load it with from_pretrained and without a device_map, or fill it before",
        )
    _check_quantised(model, type(model).__name__)


def _check_fit(
    name: str,
    missing: list[str],
    unexpected: list[str],
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]],
    *,
    by_settings: bool,
) -> None:
    parts, ways = [], []
    if missing:
        parts.append(f"{_count(missing)} missing: {_some(missing)}")
    if shapes:
        shown = [
            f"{key} is {_by(found)}, the model's {_by(wanted)}" for key, (found, wanted) in shapes.items()
        ]
        parts.append(f"{_count(shapes)} of another shape: {_some(shown)}")
    if missing or shapes:
        ways.append(f"allow_missing: [{_as_pattern([*missing, *shapes])}] trains them from random values")
    if unexpected:
        parts.append(f"{_count(unexpected)} unknown to the model: {_some(unexpected)}")
        ways.append(f"allow_unexpected: [{_as_pattern(unexpected)}] leaves them out")
    if parts:
        hint = "check config.json and the weight files"
        raise DataError(
            f"the checkpoint {name!r} does not fit its model: {'; '.join(parts)}",
            hint=f"{hint}, or {', and '.join(ways)}" if by_settings else hint,
        )


def _as_pattern(keys: Iterable[str]) -> str:
    """A pattern for the first name: its module, with any layer number."""
    first = next(iter(keys))
    parts = (first.rpartition(".")[0] or first).split(".")
    return "'" + r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in parts) + "'"


def _count(keys: Iterable[str]) -> str:
    number = len(list(keys))
    return f"{number:,} weight{'s' * (number != 1)}"


def _some(keys: Sequence[str]) -> str:
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more:,} more" if more > 0 else "")


def _by(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def _natural(key: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in key.split(".")]


def _fits(patterns: Sequence[re.Pattern[str]], key: str) -> bool:
    return any(pattern.search(key) for pattern in patterns)


class _Withheld(logging.Filter):
    """Withholds transformers' messages that contain any of `words`."""

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__()
        self.words = words
        self.texts: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        text = _ANSI.sub("", str(record.msg))
        if not any(word in text for word in self.words):
            return True
        self.texts.append(text)
        return False


@contextmanager
def without_messages(*words: str) -> Iterator[list[str]]:
    """While open, divert messages of transformers' loader that contain any of `words` to the yielded list."""
    logger, withheld = logging.getLogger("transformers.modeling_utils"), _Withheld(words)
    logger.addFilter(withheld)
    try:
        yield withheld.texts
    finally:
        logger.removeFilter(withheld)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """While open, hide transformers' progress bars, which would garble ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _not_converted(reports: Sequence[str]) -> list[str]:
    """Weights that transformers could not convert from the checkpoint's."""
    return [key for text in reports for key in re.findall(r"^(\S+) +\| CONVERSION", text, re.MULTILINE)]


def _check_quantised(model: Any, name: str) -> None:
    found = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if not _is_plain(p)})
    config = getattr(getattr(model, "config", None), "quantization_config", None)  # gone once dequantised
    if found or config or getattr(model, "is_quantized", False):
        method = config.get("quant_method") if isinstance(config, dict) else None
        method = method or getattr(config, "quant_method", getattr(model, "quantization_method", None))
        raise _refuse_quantised(name, method, ", ".join(found))


def _is_plain(parameter: torch.Tensor) -> bool:
    return parameter.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _quantisation(name: str, config: Any) -> Any:
    """The quantisation method named in a checkpoint's configuration, or None.

    Raises UnsupportedModelError for one that is not dequantised: its code never runs.
    """
    found = getattr(config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    if found and not _dequantised(method):
        raise _refuse_quantised(name, method, "")
    return method


def _check_size(name: str, config: Any, options: dict[str, Any]) -> None:
    """Raise DataError for a folder whose files hold almost nothing of what its configuration describes, which
    transformers would fill with random values."""
    from transformers.initialization import no_init_weights

    held = sum(file.stat().st_size for file in Path(name).glob("*.safetensors"))
    if not held or options.get("trust_remote_code"):
        return
    with torch.device("meta"), no_init_weights():
        model = model_class(config).from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    number = sum(p.numel() for p in model.parameters())
    if number > _MOST_PER_BYTE * held + _ALWAYS:
        raise DataError(
            f"the checkpoint {name!r} does not fit its model: config.json describes {parameters(number)}, "
            f"and the weight files hold {size(held)}",
            hint="check config.json and the weight files",
        )


def _dequantised(method: Any) -> dict[str, Any]:
    """Options by which transformers dequantises weights, if it can on any device."""
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    kinds: dict[Any, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
    kind = kinds.get(method)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def _refuse_quantised(name: str, method: Any, dtypes: str) -> UnsupportedModelError:
    kind = getattr(method, "value", method)
    what = f"quantised ({kind})" if kind else "quantised"
    what += f", stored in {dtypes}" if dtypes else ""
    return UnsupportedModelError(
        f"the weights of {name!r} are {what}: they cannot be trained",
        hint="name the model that it was made from, in bfloat16 or float32",
    )
