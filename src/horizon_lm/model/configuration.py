"""Model configurations: permitted values, and keys that are ignored.

A config.json is untrusted. It describes the model but does not choose the code that runs it: attention and
expert kernels, some of which transformers fetches from the Hub, are the user's choice. Its numbers are
checked
before anything is built: transformers builds 10^9 layers if told to.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from horizon_lm.errors import ConfigError, HorizonError
from horizon_lm.text import one_line, redacted

_log = logging.getLogger(__name__)

# Keys by which a configuration would choose code. transformers reads the first in any of its forms.
_ATTENTION = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")
_EXPERTS = ("_experts_implementation", "experts_implementation", "_experts_implementation_internal")
CHOOSES_CODE = frozenset({*_ATTENTION, *_EXPERTS, "use_kernels", "kernel_config"})

MOST_MODULES = 2_048  # per kind: built in seconds; the deepest published model has 1,000 layers
MOST_LABELS = 1_000_000  # each gets a name
LARGEST = 2**32  # any other size; larger ones overflow in products
_DEEPEST = 64  # nesting of lists and mappings
_MOST_VALUES = 1_000_000  # vocabularies and label names are the long ones
# Keys that count modules, which are built one by one; keys that are sizes.
_COUNTS = re.compile(r"^(n|num)_(\w+_)?(layers?|blocks?|experts|groups|stages|codebooks)$|^depth$")
_SIZES = re.compile(r"(_size|_dim|_rank|_embd|_inner|_positions|_embeddings|_heads?)$|^(d_model|dim|n_ctx)$")
_WHOLE = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("n_embd", "n_layer", "n_head", "d_model", "num_layers", "num_key_value_heads", "head_dim"),
    }
)
_POSITIVE = frozenset({"vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads"})
_said: set[tuple[str, str]] = set()


def read_configuration(
    name: str,
    *,
    trust_remote_code: bool,
    attn_implementation: str | None,
    where: str | None = None,
    **options: Any,
) -> Any:
    """Read and check the transformers configuration of a folder or Hub name; set the user's attention.

    where: location for messages. options: for transformers' `from_pretrained` (revision, local_files_only).
    Raises ConfigError for invalid values, and whatever transformers raises.
    """
    from transformers import AutoConfig, PreTrainedConfig

    where = where or f"{name}/config.json"
    with _refused(where):
        values, _ = PreTrainedConfig.get_config_dict(name, **options)
        check_values(values, where)
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
        return by_the_user(config, attn_implementation, where)


def configuration_of(
    values: dict[str, Any], attn_implementation: str | None, where: str = "init_model"
) -> Any:
    """Build the transformers configuration of a mapping with model_type, as `read_configuration`."""
    from transformers import AutoConfig

    check_values(values, where)
    rest = dict(redacted(values))  # it is exported as config.json
    kind = rest.pop("model_type", None)
    with _refused(where):
        return by_the_user(AutoConfig.for_model(kind, **rest), attn_implementation, where)


def check_folder(folder: Path) -> None:
    """Check the values of a folder's config.json, if present. Raises ConfigError, also for invalid JSON."""
    from transformers import PreTrainedConfig

    if (folder / "config.json").is_file():
        where = str(folder / "config.json")
        try:
            values, _ = PreTrainedConfig.get_config_dict(str(folder), local_files_only=True)
        except RecursionError as error:
            raise _nested(where) from error
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{where} cannot be read: {reason_of(error)}", hint="download or export the model again"
            ) from error
        check_values(values, where)


@contextmanager
def _refused(where: str) -> Iterator[None]:
    """Turn errors of a configuration's own code into ConfigError. Errors that mean a missing (OSError) or
    unknown configuration (ValueError, KeyError, ImportError) pass."""
    try:
        yield
    except (HorizonError, MemoryError, OSError, ValueError, KeyError, ImportError):
        raise
    except RecursionError as error:
        raise _nested(where) from error
    except Exception as error:  # TypeError, ZeroDivisionError, and a class of huggingface_hub's own
        raise ConfigError(
            f"{where} is refused by transformers: {reason_of(error)}",
            hint="correct the value, or download or export the model again",
        ) from error


def reason_of(error: BaseException) -> str:
    """First line of an error's message, with the next one if the first only announces it."""
    if isinstance(error, KeyError) and error.args and " " not in str(error.args[0]):
        return f"unknown name {error}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    told = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return told if len(told) <= 300 else told[:297] + "..."


def check_values(values: Any, where: str) -> None:
    """Raise ConfigError for values that no model has, or that would exhaust time or memory."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is not a mapping of settings", hint="download or export the model again")
    for number, (path, key, value) in enumerate(_walk(values, where)):
        if number >= _MOST_VALUES:
            raise ConfigError(f"{where} has more than {_MOST_VALUES:,} values", hint="check the file")
        _check_value(path, key, value, where)
    if not isinstance(values.get("model_type", ""), str):
        raise _wrong(where, "model_type", _short(values["model_type"]), "the name of an architecture")
    for key in ("dtype", "torch_dtype"):
        if not isinstance(values.get(key), (str, dict, type(None))):
            raise _wrong(where, key, _short(values[key]), "the name of a dtype")
    file = values.get("transformers_weights")
    if file is not None and (not isinstance(file, str) or Path(file).name != file):
        raise _wrong(where, "transformers_weights", _short(file), "the name of a file in the model's folder")


def _walk(values: dict[str, Any], where: str) -> Iterator[tuple[str, str, Any]]:
    """Yield (path, key, value) of everything in a configuration; lists count as their entries."""
    waiting: list[tuple[str, str, Any, int]] = [
        (str(key), str(key), value, 1) for key, value in values.items()
    ]
    while waiting:
        path, key, value, depth = waiting.pop()
        yield path, key, value
        if depth > _DEEPEST:
            raise _nested(where)
        if isinstance(value, dict):
            waiting += [(f"{path}.{k}", str(k), v, depth + 1) for k, v in value.items()]
        elif isinstance(value, list):
            waiting += [(path, key, v, depth + 1) for v in value if not isinstance(v, (str, float, bool))]


def _check_value(path: str, key: str, value: Any, where: str) -> None:
    is_count = bool(_COUNTS.search(key))
    if isinstance(value, bool) or not (is_count or key == "num_labels" or _SIZES.search(key)):
        return
    if isinstance(value, (str, float)) and key in _WHOLE:
        raise _wrong(where, path, _short(value), "a whole number")
    if not isinstance(value, int):
        return
    if key in _WHOLE and value < (key in _POSITIVE):
        raise _wrong(where, path, _short(value), "a positive number")
    most = MOST_MODULES if is_count else MOST_LABELS if key == "num_labels" else LARGEST
    if value > most:
        raise _wrong(where, path, _short(value), f"at most {most:,}")


def _wrong(where: str, path: str, found: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"{where}: {one_line(path)} is {found}, expected {wanted}",
        hint="correct the value, or download or export the model again",
    )


def _nested(where: str) -> ConfigError:
    return ConfigError(
        f"{where} is nested more than {_DEEPEST} levels deep", hint="download or export the model again"
    )


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) < 10**24 else "a number of more than 24 digits"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def by_the_user(config: Any, attn_implementation: str | None, where: str) -> Any:
    """Set the user's attention in the configuration, and remove every other key that chooses code.

    attn_implementation: None leaves the choice to transformers. Logs a difference once.
    """
    named: set[tuple[str, str]] = set()
    parts = list(_parts(config))
    for part in parts:
        named |= _named(vars(part))
        for key in CHOOSES_CODE & vars(part).keys():
            delattr(part, key)
    for part in parts:
        part._attn_implementation, part._experts_implementation = attn_implementation, None
    used = attn_implementation or "transformers' default"
    for key, value in sorted(named - {(_ATTENTION[1], attn_implementation or "sdpa")}):
        if (where, value) not in _said:
            _said.add((where, value))
            ours = used if key == _ATTENTION[1] else "by the setting of that name"
            _log.warning(
                "note: %s sets %s to %s, which is ignored: it is %s", where, key, one_line(value), ours
            )
    return config


def _parts(config: Any) -> Iterator[Any]:
    """Yield the configuration and nested ones, such as the text model's of a multimodal model."""
    from transformers import PreTrainedConfig

    yield config
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _named(values: dict[str, Any]) -> set[tuple[str, str]]:
    """(key, value) of CHOOSES_CODE; also in nested mappings, from which they are removed."""
    found: set[tuple[str, str]] = set()
    for key in CHOOSES_CODE & values.keys():
        public = next((keys[1] for keys in (_ATTENTION, _EXPERTS) if key in keys), key)
        if values[key]:
            found.add((public, str(values[key])))
    for value in values.values():
        if isinstance(value, dict):
            found |= _named(value)
            for key in CHOOSES_CODE & value.keys():
                del value[key]
    return found
