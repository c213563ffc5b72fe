"""How other trainers name adapters, low-bit bases and frozen parameters: values that are read as ours."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any


def texts(value: Any) -> Any:
    """Convert to a list; LLaMA-Factory writes one comma-separated text."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [] if value is None else value


def prefixes(value: Any) -> Any:
    """Convert name prefixes, as in ms-swift, to patterns."""
    return [f"^{re.escape(text)}" for text in texts(value)]


def from_the_start(value: Any) -> Any:
    """Convert Axolotl's patterns, matched from the start of a name, to ours, which are searched in it."""
    patterns = texts(value)
    if not isinstance(patterns, list) or any(not isinstance(p, str) for p in patterns):
        raise ValueError("expected a list of regular expressions")
    if any(re.search(r"\[[0-9]*:[0-9]*\]$", p) for p in patterns):
        raise ValueError("parts of a parameter ([a:b]) cannot be trained alone")
    return [f"^(?:{p})" for p in patterns]


def kind(value: Any) -> Any:
    """Convert LLaMA-Factory's `finetuning_type`."""
    if value == "freeze":
        raise ValueError("write 'train: [patterns]' with the names of what is trained")
    if value == "oft":
        raise ValueError("only lora and dora are made from settings; train a PeftModel in Python")
    return {"full": "none", "lora": "lora"}.get(value, value)


def switched(on: str) -> Callable[[Any], str]:
    """Convert a switch that asks for the value `on`; without it the setting has its `none`."""

    def convert(value: Any) -> str:
        if not isinstance(value, bool):
            raise ValueError("expected true or false")
        return on if value else "none"

    return convert


def only_if_on(on: str) -> Callable[[Any], str]:
    """Convert a switch that asks for the value `on`; switched off it says nothing (`SILENT`)."""

    def convert(value: Any) -> str:
        if value is not True:
            raise ValueError("expected true or false")
        return on

    return convert


def bits(value: Any) -> Any:
    """Convert LLaMA-Factory's number of bits."""
    found = {4: "nf4", 8: "int8"}.get(value if type(value) is int else 0)
    if found is None:
        raise ValueError("expected 4 or 8")
    return found


def targets(value: Any) -> Any:
    """Convert target modules: `all` (LLaMA-Factory), names separated by commas, or a list."""
    if value in ("all", "all-linear", ["all"], ["all-linear"]):
        return "all-linear"
    if isinstance(value, str) and re.fullmatch(r"[\w\s,]*", value):
        return texts(value)
    return value


def expanded(values: dict[str, Any]) -> dict[str, Any]:
    """Write Axolotl's `adapter: qlora` as an adapter and a low-bit base, and no adapter as `none`."""
    if "adapter" not in values:
        return values
    name = values["adapter"]
    if name == "qlora":
        said = ("base_dtype", "load_in_4bit", "load_in_8bit", "quantization_bit")
        base = {} if any(values.get(key) for key in said) else {"base_dtype": "nf4"}
        return {**values, "adapter": "lora", **base}
    return {**values, "adapter": "none"} if name is None else values


# Switches that say nothing when they are off.
SILENT = frozenset(
    {*("use_dora", "peft_use_dora", "load_in_4bit", "load_in_8bit", "quantization_bit", "lora_target_linear")}
)

# Of these, the values that being off takes back on the command line -> what the setting is then.
TAKEN_BACK: dict[str, tuple[tuple[str, ...], str]] = {
    "use_dora": (("dora",), "lora"),
    "peft_use_dora": (("dora",), "lora"),
    "load_in_4bit": (("nf4",), "auto"),
    "load_in_8bit": (("int8",), "auto"),
    "quantization_bit": (("int8", "nf4"), "auto"),
}


# Settings that other trainers write as two keys.
JOINED = ("adapter", "base_dtype", "target_modules")


def joined(key: str, first: Any, second: Any) -> Any:
    """The value of two keys that are one of `JOINED`; None if they contradict each other."""
    pair = (first, second)
    if key == "adapter" and pair in (("lora", "dora"), ("dora", "lora")):
        return "dora"
    if key == "target_modules" and "all-linear" in pair:
        return "all-linear"
    return first if key in JOINED and first == second else None
