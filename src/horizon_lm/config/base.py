"""The base of all settings classes: declaration, strict validation, reading and writing."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from horizon_lm.config.adapter_names import JOINED, TAKEN_BACK, expanded, joined
from horizon_lm.config.aliases import (
    DROPPED,
    canonical_name,
    canonical_value,
    canonicalise,
    conflict,
    drop_or_note,
)
from horizon_lm.config.faults import explain
from horizon_lm.config.shipped import located
from horizon_lm.config.yaml import Document, KeyPath, dump, read_file, read_value, split_override
from horizon_lm.errors import ConfigError
from horizon_lm.text import redacted

GROUPS = (
    *("Model", "Adapters", "Data", "Preferences", "Batch and schedule", "Optimizer", "Evaluation"),
    "Memory and device",
    *("Checkpoints and faults", "Output"),
)
# Whether a resumed run may change a setting:
# free    yes: it changes no bit of the result (tests/engine/test_lanes.py, tests/training/test_resume.py), or
#         only decides what an error leads to
# length  yes, and the run says what it does: how long the run is
# ask     only with allow_changed_settings: it alters results
# fixed   never: the bytes of a checkpoint depend on it
ResumeRule = Literal["free", "length", "ask", "fixed"]

# A setting on the command line that replaces others, which a file may name.
REPLACES = {"tokens_per_step": ("per_device_train_batch_size", "gradient_accumulation_steps")}

STRICT = ConfigDict(
    frozen=True,
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    protected_namespaces=(),
    use_attribute_docstrings=False,
)


def setting(
    default: Any,
    description: str,
    *,
    group: str,
    resume: ResumeRule,
    unit: str | None = None,
    expects: str | None = None,
    **limits: Any,
) -> Any:
    """Declare a setting with its documentation; `expects` replaces the words made from the type."""
    extra: JsonDict = {"group": group, "resume": resume}
    if unit:
        extra["unit"] = unit
    if expects:
        extra["expects"] = expects
    return Field(default, description=description, json_schema_extra=extra, **limits)


def fault(text: str, *, key: str, hint: str) -> PydanticCustomError:
    """Build the error of a validator, reported at the place of `key`."""
    return PydanticCustomError("setting", "{text}", {"text": text, "key": key, "hint": hint})


def _together(faults: list[PydanticCustomError]) -> PydanticCustomError:
    """Combine several errors into the one that a validator may raise."""
    return PydanticCustomError("settings", "{count} faults", {"count": len(faults), "faults": faults})


class Settings(BaseModel):
    """A frozen set of settings. All constructors end in `_fill`; every error is a `ConfigError`."""

    model_config = STRICT

    _source: ClassVar[str] = "settings"  # names the origin of values in errors, unless it is a file

    def faults(self) -> Iterator[PydanticCustomError]:
        """Yield an error for each combination of valid settings that cannot work."""
        yield from ()

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        found = list(self.faults())
        if found:
            raise found[0] if len(found) == 1 else _together(found)
        return self

    if not TYPE_CHECKING:  # keeps the signature that type checkers derive from the fields

        def __init__(self, **values: Any) -> None:
            self._fill(Document(plain(values, self._source), {(): self._source}))

    def _fill(self, document: Document, redacted_keys: Collection[str] = ()) -> None:
        """Validate. redacted_keys: settings whose values another object has already."""
        error: ValidationError | None = None
        # No setting needs a secret, and all are written to files.
        known = {key: value for key, value in document.values.items() if key in redacted_keys}
        new = {key: value for key, value in document.values.items() if key not in redacted_keys}
        document = Document(known | redacted(new), document.where, document.faults)
        try:
            self.__pydantic_validator__.validate_python(document.values, self_instance=self)
        except ValidationError as found:
            error = found
        if error is not None or document.faults:
            raise explain(type(self), error, document, _settings_of_subclasses(type(self)))

    @classmethod
    def from_document(cls, document: Document) -> Self:
        """Build settings from a document with canonical names. Raises ConfigError."""
        self = cls.__new__(cls)
        self._fill(document)
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "settings") -> Self:
        """Build settings from a mapping (aliases allowed); `source` names it in errors."""
        document, _ = canonicalise(Document(plain(values, source), {(): source}))
        return cls.from_document(document)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Self:
        """Read settings from a YAML file, with `key=value` overrides on top."""
        return cls.from_document(collect(path, overrides, keys_of(cls))[0])

    def to_dict(self) -> dict[str, Any]:
        """Return plain values of all settings, defaults included."""
        return self.model_dump(mode="python")

    def to_yaml(self) -> str:
        """Write all settings, grouped, as YAML that the strict reader turns back into an equal configuration.

        Omits settings that tokens_per_step leaves to the planner unless the user set them: in a file they
        would count as set.
        """
        values = self.to_dict()
        for key, others in REPLACES.items():
            if values.get(key) is not None:
                values = {k: v for k, v in values.items() if k not in others or k in self.model_fields_set}
        parts = []
        for group, keys in grouped_keys(type(self)).items():
            parts.append(f"# {group}\n" + dump({key: values[key] for key in keys if key in values}))
        return "\n".join(parts)

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with some settings changed.

        `model_fields_set` stays what the user set: changes made here do not count.
        """
        own = self.to_dict()
        document, _ = canonicalise(Document(plain(changes, self._source), {(): self._source}))
        document = Document(own | document.values, document.where, document.faults)
        copy = type(self).__new__(type(self))
        copy._fill(document, redacted_keys=own.keys() - map(canonical_name, changes))
        copy.__pydantic_fields_set__.intersection_update(self.model_fields_set)
        return copy


def _settings_of_subclasses(cls: type[Settings]) -> set[str]:
    """Return the settings that only subclasses have: those of a run, for ModelSettings."""
    return {key for wider in cls.__subclasses__() for key in wider.model_fields} - cls.model_fields.keys()


def _declared(cls: type[Settings], key: str) -> JsonDict:
    extra = cls.model_fields[key].json_schema_extra
    assert isinstance(extra, dict), key
    return extra


def grouped_keys(cls: type[Settings]) -> dict[str, list[str]]:
    """Return group -> keys; within a group, a class's own keys precede inherited ones."""
    result: dict[str, list[str]] = {group: [] for group in GROUPS}
    own = cls.__annotations__
    for key in sorted(cls.model_fields, key=lambda key: key not in own):
        result[str(_declared(cls, key)["group"])].append(key)
    return {group: keys for group, keys in result.items() if keys}


def resumable(cls: type[Settings], rule: ResumeRule) -> frozenset[str]:
    """Return the settings declared with `resume=rule`."""
    return frozenset(key for key in cls.model_fields if _declared(cls, key)["resume"] == rule)


@dataclass(frozen=True)
class Keys:
    """text: settings whose value is any text or null. nullable: settings that accept null or are required."""

    text: frozenset[str]
    nullable: frozenset[str]


def keys_of(cls: type[Settings]) -> Keys:
    fields = cls.model_fields
    text = frozenset(key for key, info in fields.items() if info.annotation in (str, str | None))
    nullable = frozenset(key for key, info in fields.items() if type(None) in get_args(info.annotation))
    required = frozenset(key for key, info in fields.items() if info.is_required())
    return Keys(text, nullable | required)


def plain(value: Any, place: str) -> Any:
    """Convert Python values to plain data: paths, torch dtypes and devices to text, tuples to lists."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ConfigError(f"{place}: {value} is not a finite number", hint="pass a number, or None")
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(entry, f"{place}: {key}") for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, place) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if hasattr(value, "model_dump"):  # one of our own settings objects
        return value.model_dump(mode="python")
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # a number of numpy or torch
        return plain(value.item(), place)
    if type(value).__module__ == "torch" and not hasattr(value, "ndim"):  # a dtype or a device
        return str(value).removeprefix("torch.")
    raise ConfigError(
        f"{place}: a {type(value).__name__} is no setting's value",
        hint="pass text, numbers, booleans, None, paths, torch dtypes or devices, or lists and dicts of them",
    )


def collect(
    path: str | os.PathLike[str] | None, overrides: Iterable[str], keys: Keys
) -> tuple[Document, list[str]]:
    """Read the settings of a file (or of none), put overrides on top; return them and one-line notes."""
    document = Document({}, {(): "command line"}) if path is None else read_file(located(path))
    empty = _drop_empty(document, keys) if path is not None else []
    document, notes = canonicalise(document)
    if empty:
        notes.append(f"{path}: keys without a value are as if not written: {', '.join(empty)}")
    written: dict[str, str] = {}
    for text in overrides:
        _override(document, text, keys.text, written, notes)
    for key, others in REPLACES.items():
        if key in written and document.values[key] is not None:
            for other in others:
                if other not in written and document.values.pop(other, None) is not None:
                    notes.append(f"command line: '{key}' stands in place of the file's '{other}'")
    return document, notes


def _drop_empty(document: Document, keys: Keys) -> list[str]:
    """Remove keys without a value, as in files written for Axolotl, unless null is one of their values.

    Returns their names.
    """
    empty = [
        key
        for key, value in document.values.items()
        if value is None and key not in DROPPED and canonical_name(key) not in keys.nullable
    ]
    for key in empty:
        del document.values[key]
    return empty


def _override(
    document: Document, text: str, text_keys: frozenset[str], written: dict[str, str], notes: list[str]
) -> None:
    """Put one `key=value` into `document`. A later one of the same key wins."""
    place = "command line"
    (key, *inner), raw = split_override(text)
    dropped, note = drop_or_note(key, place, _off(raw))
    name = canonical_name(key)
    if dropped and not inner and key in TAKEN_BACK:
        values, off = TAKEN_BACK[key]
        if document.values.get(name) in values:
            document.values[name], note = off, f"{place}: '{key}' is off, so {name} is {off}"
            document.where[(name,)] = place
    if note and note not in notes:
        notes.append(note)
    if dropped:
        return
    is_second = written.setdefault(name, key) != key
    if is_second and name not in JOINED:
        raise conflict(written[name], key, place)
    target, leaf = document.values, name
    for part in inner:
        if target.get(leaf) is None:
            target[leaf] = {}
            document.where.setdefault((name,), place)
        target, leaf = target[leaf], part
        if not isinstance(target, dict):
            raise ConfigError(f"{place}: '{text}': {key} is not a mapping", f"write {key}=VALUE")
    if inner:
        value = read_value(raw, f"{place}: {text}")
    else:
        value = canonical_value(key, _value_of(name, raw, text_keys), place)
        if is_second and (value := joined(name, target[name], value)) is None:
            raise conflict(written[name], key, place)
        both = expanded({name: value}) if name == "adapter" else {name: value}
        value = both.pop(name)
        for other, more in both.items():
            document.values.setdefault(other, more)
    target[leaf] = value
    written_path: KeyPath = (name, *inner)
    for old in [old for old in document.where if old[: len(written_path)] == written_path]:
        del document.where[old]
    document.where[written_path] = place


def _off(raw: str) -> Any:
    """Return None or False for text that means null or false, other text unchanged."""
    return {"": None, "null": None, "~": None, "false": False}.get(raw.strip(), raw)


def _value_of(name: str, raw: str, text_keys: frozenset[str]) -> Any:
    """Read the value of an override. Text is verbatim: `sample_prompt=def f(x):` is not a mapping."""
    stripped = raw.strip()
    if name in ("datasets", "eval_datasets"):
        verbatim = not stripped.startswith(("[", "{", '"', "'"))
    else:
        verbatim = name in text_keys and not stripped.startswith(('"', "'"))
    if verbatim and stripped not in ("", "null", "~"):
        return raw
    return read_value(raw, f"command line: {name}={raw}")
