"""The ways to save memory are one table, from which every hint is made."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import horizon_lm
from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError
from horizon_lm.memory.ways import WAYS, Results, Suggestion, Way, hint, next_smaller, suggest

# Settings to which each way applies.
LAVISH: dict[str, Any] = {
    "slots": 3,
    "grad_slots": 3,
    "checkpoint_interval": 2,
    "activations": "keep",
    "boundaries": ["host*2", "device*2"],
    "per_device_train_batch_size": 9,
    "gradient_accumulation_steps": 4,
    "dtype": "float32",
    "max_length": 4096,
    "resident": 5,
    "rounds": 2,
}


def settings(**values: Any) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", datasets=["d"], **values)


def weights(of: Mapping[str, int]) -> Any:
    """A model whose bytes are the sum of those of its settings, of which 10 are there."""
    return lambda config: {"host": sum(of.get(f"{k}={getattr(config, k)}", 0) for k in keys(of)) - 10}


def keys(of: Mapping[str, int]) -> set[str]:
    return {name.partition("=")[0] for name in of}


def texts(found: list[Suggestion]) -> list[str]:
    return [str(one) for one in found]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.changes.__name__)
def test_each_way_applies_and_then_no_more(way: Way) -> None:
    """What it changes is valid; applied until it ends, it ends."""
    others = settings(max_grad_norm=None, grad_slabs=3, boundaries="host"), settings(adapter="lora")
    for lavish in (settings(**LAVISH), *others):
        steps = 0
        while changes := way.changes(lavish):
            lavish, steps = lavish.replace(**changes), steps + 1
            assert steps < 20
        if steps:
            return
    raise AssertionError("never applies")


def test_ways_that_keep_the_results_come_first() -> None:
    assert [way.results for way in WAYS] == sorted(way.results for way in WAYS)
    assert {way.results for way in WAYS} == set(Results)


def test_a_smaller_micro_batch_keeps_the_sequences_of_a_step() -> None:
    config = settings(**LAVISH)
    way = next(way for way in WAYS if "per_device_train_batch_size" in way.changes(config))
    assert way.changes(config) == {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 12}


def test_what_suffices_alone_comes_first_and_what_saves_nothing_is_not_offered() -> None:
    of = {"moment_dtype=float32": 8, "optim=adamw": 3, "max_grad_norm=1.0": 5}
    found = suggest(settings(), weights(of))
    assert texts(found) == [
        "moment_dtype=bfloat16 saves 8 bytes",
        "max_grad_norm=null saves 5 bytes (not enough alone)",
        "optim=lion saves 3 bytes (not enough alone)",
    ]
    assert hint(settings(), weights(of), "or less").count(";") == 2
    # The negative control: a table of bytes in which nothing but one setting weighs.
    alone = hint(settings(), weights({"optim=adamw": 30}), "or less")
    assert alone == "optim=lion saves 30 bytes; or less"


def test_where_none_suffices_several_do_together_and_no_more_than_needed() -> None:
    of = {"slots=3": 1, "moment_dtype=float32": 8, "optim=adamw": 3, "max_grad_norm=1.0": 11}
    found = suggest(settings(slots=3), weights(of))
    assert str(found[0]) == "max_grad_norm=null moment_dtype=bfloat16 together save 19 bytes"
    assert found[0].is_enough and not any(one.is_enough for one in found[1:])
    lost = suggest(settings(slots=3), weights(of | {"dtype=bfloat16": 40}))
    assert not any(one.together or one.is_enough for one in lost)


def test_a_way_that_makes_another_memory_short_is_not_offered() -> None:
    def shortages(config: TrainConfig) -> dict[str, int]:
        spilled = config.boundaries == "host"
        return {"host": 5 if spilled else -20, "device": 20 if not spilled and config.slots > 2 else -1}

    assert suggest(settings(boundaries="host", slots=3), shortages) == []
    # The control: with fewer slots the device has room for the inputs.
    assert texts(suggest(settings(boundaries="host"), shortages)) == ["boundaries=device saves 25 bytes"]


@pytest.mark.parametrize("asked", [0, 8, ["head"]])
def test_residents_are_left_to_the_planner_before_the_results_change(asked: int | list[str]) -> None:
    """The planner chooses 4, with which all fits; every other way saves some of the host memory too."""

    def shortages(config: TrainConfig) -> dict[str, int]:
        number = config.resident
        number = 4 if number == "auto" else len(number) if isinstance(number, list) else number
        host = 3 - number - (config.optim == "lion") - 3 * (config.moment_dtype == "bfloat16")
        return {"host": host, "device": number - 5}

    found = texts(suggest(settings(resident=asked), shortages))
    assert found[0].startswith("resident=auto saves") and "not enough" not in found[0]
    assert not any("optim" in text or "moment_dtype" in text for text in found)
    # The controls: on a CPU there is one memory, and a run that the planner has planned needs a number.
    assert not any("auto" in text for text in texts(suggest(settings(resident=2, device="cpu"), shortages)))
    assert next_smaller(settings(resident=8)) == "resident=4"
    assert "auto" not in next_smaller(settings(resident=0))


def test_settings_that_do_not_suit_the_model_are_skipped() -> None:
    def shortages(config: TrainConfig) -> dict[str, int]:
        if config.mlp_tile_tokens is not None:
            raise ConfigError("no tiles")
        return {"device": config.max_length}

    assert all("mlp_tile_tokens" not in one.changes for one in suggest(settings(max_length=4096), shortages))


def test_eager_updates_take_what_they_need() -> None:
    (way,) = (way for way in WAYS if way.changes(settings()).keys() == {"max_grad_norm"})
    assert way.changes(settings(max_grad_norm=None)) == {}
    assert way.changes(settings(nonfinite="skip", update="sync")) == {
        "max_grad_norm": None,
        "nonfinite": "raise",
        "update": "eager",
    }


def test_an_adapter_and_a_base_in_few_bits_are_offered_once() -> None:
    """Not what the settings have already; and few bits only where something is frozen."""

    def host(config: TrainConfig) -> dict[str, int]:
        base = {"auto": 20, "bfloat16": 20, "int8": 11, "nf4": 6}[config.base_dtype]
        return {"host": base - 10 + (0 if config.adapter != "none" or config.freeze else 120)}

    full = texts(suggest(settings(), host))
    assert full[0] == "adapter=lora base_dtype=nf4 saves 134 bytes"
    assert full[1] == "adapter=lora saves 120 bytes (not enough alone)" and len(full) == 2
    adapted = texts(suggest(settings(adapter="lora"), host))
    assert adapted == ["base_dtype=nf4 saves 14 bytes", "base_dtype=int8 saves 9 bytes (not enough alone)"]
    assert texts(suggest(settings(freeze=["mlp"]), host)) == adapted
    assert texts(suggest(settings(adapter="lora", base_dtype="int8"), host)) == [
        "base_dtype=nf4 saves 5 bytes"
    ]
    assert suggest(settings(adapter="lora", base_dtype="nf4"), lambda config: {"host": 1}) == []


def test_the_next_smaller_choice_is_of_the_table() -> None:
    first = next(way for way in WAYS if "device" in way.memory)
    assert first.changes(settings(**LAVISH)) == {"slots": 2, "grad_slots": 2}
    assert next_smaller(settings(**LAVISH)) == "slots=2 grad_slots=2"


def test_no_other_module_lists_ways() -> None:
    """Preflight, planner and training take their hints from the table: no text of theirs names a setting
    with a smaller value."""
    package = Path(horizon_lm.__file__).parent
    listed = [f"{key}={value}" for key, value in (("moment_dtype", "bfloat16"), ("activations", "recompute"))]
    listed += ["boundaries=host", "optim=lion", "max_grad_norm=null", "slots=2"]
    paths = [path for path in package.rglob("*.py") if path.parent.name != "config"]  # conflicts of settings
    assert len(paths) > 100
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not any(word in node.value for word in listed), (path, node.value)
    for user in ("memory/preflight.py", "plan/fit.py", "training/memory_faults.py"):
        assert "from horizon_lm.memory.ways import" in (package / user).read_text(encoding="utf-8")
