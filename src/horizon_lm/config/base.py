"""What the settings classes of `config` share: strict validation, readable faults, reading and writing."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.config import JsonDict
from pydantic_core import PydanticCustomError

from horizon_lm.config.aliases import canonicalise
from horizon_lm.config.faults import explain
from horizon_lm.config.merge import REPLACES, Keys, collect, plain
from horizon_lm.config.yaml import Document, dump
from horizon_lm.text import redacted

GROUPS = (
    *("Model", "Data", "Batch and schedule", "Optimizer", "Evaluation", "Memory and device"),
    *("Checkpoints and faults", "Output"),
)


def setting(
    default: Any,
    description: str,
    *,
    group: str,
    unit: str | None = None,
    expects: str | None = None,
    **limits: Any,
) -> Any:
    """A field with its documentation; `expects` replaces the words made from the type."""
    extra: JsonDict = {"group": group}
    if unit:
        extra["unit"] = unit
    if expects:
        extra["expects"] = expects
    return Field(default, description=description, json_schema_extra=extra, **limits)


def fault(text: str, *, key: str, hint: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("setting", "{text}", {"text": text, "key": key, "hint": hint})


def _together(faults: list[PydanticCustomError]) -> PydanticCustomError:
    """Several faults as the one error that a validator may raise."""
    return PydanticCustomError("settings", "{count} faults", {"count": len(faults), "faults": faults})


STRICT = ConfigDict(
    frozen=True,
    extra="forbid",
    strict=True,
    allow_inf_nan=False,
    protected_namespaces=(),
    use_attribute_docstrings=False,
)


class Settings(BaseModel):
    """A frozen set of settings. Every way to make one ends in `_fill`, so every fault is a `ConfigError`."""

    model_config = STRICT

    _source: ClassVar[str] = "settings"  # the origin of values in errors, when it is no file

    def faults(self) -> Iterator[PydanticCustomError]:
        """Settings that are right one by one and do not go together; all of them are reported at once."""
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

    def _fill(self, document: Document) -> None:
        error: ValidationError | None = None
        # No setting needs a secret, and all are kept in files.
        document = Document(redacted(document.values), document.where, document.faults)
        try:
            self.__pydantic_validator__.validate_python(document.values, self_instance=self)
        except ValidationError as found:
            error = found
        if error is not None or document.faults:
            raise explain(type(self), error, document, _settings_of_subclasses(type(self)))

    @classmethod
    def from_document(cls, document: Document) -> Self:
        self = cls.__new__(cls)
        self._fill(document)
        return self

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "settings") -> Self:
        """Settings from a mapping (aliases allowed); `source` says in errors where it came from."""
        document, _ = canonicalise(Document(plain(values, source), {(): source}))
        return cls.from_document(document)

    def to_dict(self) -> dict[str, Any]:
        """Plain values of every setting, defaults included."""
        return self.model_dump(mode="python")

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed, validated again. What was named (`model_fields_set`) stays so,
        and what is changed here is not named by the user."""
        copy = self.from_dict({**self.to_dict(), **changes})
        copy.__pydantic_fields_set__.intersection_update(self.model_fields_set)
        return copy

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Self:
        """Settings of a YAML file, with `key=value` overrides on top."""
        return cls.from_document(collect(path, overrides, keys_of(cls))[0])

    def to_yaml(self) -> str:
        """Every setting, grouped, as YAML that the strict reader turns back into an equal configuration.

        What another setting leaves to the planner, and the user did not name, is left out: written down it
        would count as named (tokens_per_step and the cut of a step).
        """
        values = self.to_dict()
        for key, others in REPLACES.items():
            if values.get(key) is not None:
                values = {k: v for k, v in values.items() if k not in others or k in self.model_fields_set}
        parts = []
        for group, keys in grouped_keys(type(self)).items():
            parts.append(f"# {group}\n" + dump({key: values[key] for key in keys if key in values}))
        return "\n".join(parts)


def _settings_of_subclasses(cls: type[Settings]) -> set[str]:
    """Return the settings that only wider classes have, as TrainConfig beside ModelSettings."""
    return {key for wider in cls.__subclasses__() for key in wider.model_fields} - cls.model_fields.keys()


def grouped_keys(cls: type[Settings]) -> dict[str, list[str]]:
    """Group -> keys; within a group a class's own keys stand before the inherited ones."""
    result: dict[str, list[str]] = {group: [] for group in GROUPS}
    own = cls.__annotations__
    for key in sorted(cls.model_fields, key=lambda key: key not in own):
        extra = cls.model_fields[key].json_schema_extra
        assert isinstance(extra, dict), key
        result[str(extra["group"])].append(key)
    return {group: keys for group, keys in result.items() if keys}


def keys_of(cls: type[Settings]) -> Keys:
    fields = cls.model_fields
    text = frozenset(key for key, info in fields.items() if info.annotation in (str, str | None))
    nullable = frozenset(key for key, info in fields.items() if type(None) in get_args(info.annotation))
    required = frozenset(key for key, info in fields.items() if info.is_required())
    return Keys(frozenset(fields), text, nullable | required)
