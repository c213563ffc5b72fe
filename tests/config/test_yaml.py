"""Strict YAML: scalars are those of YAML 1.2, and faults name file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config_files import message_of, write
from horizon_lm.config import DatasetConfig, load_config
from horizon_lm.config import yaml as config_yaml
from horizon_lm.errors import ConfigError


def read(content: str) -> Any:
    return config_yaml.read_value(content, "test")


@pytest.mark.parametrize(
    ("written", "value"),
    [
        *[("1e-5", 1e-5), ("1.e3", 1000.0), (".5", 0.5), ("-1E+2", -100.0), ("1.0e-5", 1e-5)],
        *[("010", 10), ("0x1F", 31), ("0o17", 15), ("-3", -3), ("1_000", "1_000")],
        *[("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("=", "="), ("inf", "inf")],
        *[
            ("true", True),
            ("False", False),
            ("yes", "yes"),
            ("no", "no"),
            ("on", "on"),
            ("off", "off"),
            ("y", "y"),
        ],
        *[("null", None), ("~", None), ("", None), ("'1'", "1"), ('"true"', "true"), ("${HOME}", "${HOME}")],
        *[("[1, a]", [1, "a"]), ("{a: 1, 2: b}", {"a": 1, "2": "b"})],
    ],
)
def test_scalars_are_those_of_yaml_1_2(written: str, value: Any) -> None:
    result = read(written)
    assert result == value and type(result) is type(value)


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ("seed: 1\nslots: 2\nseed: 2\n", 3, "duplicate key 'seed'"),
        ("seed: 1\ninit_model:\n  a: 1\n  a: 2\n", 4, "duplicate key 'a'"),
        ("seed: !!int '1'\n", 1, "the tag 'tag:yaml.org,2002:int' is not allowed"),
        ("seed: !!python/object/apply:os.system [ls]\n", 1, "is not allowed"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", 3, "merge keys"),
        ("seed:\n\t- 1\n", 2, "cannot start any token"),
        ("seed: 1\n  slots: 2\n", 2, "mapping values are not allowed"),
        ("a: [1, 2\n", 2, "expected ',' or ']'"),
        ("seed: 1\n---\nseed: 2\n", 2, "another document"),
        ("learning_rate: .nan\n", 1, "not a finite number"),
        ("\nlearning_rate: -.inf\n", 2, "not a finite number"),
        ("learning_rate: 1e999\n", 1, "not a finite number"),
        (f"seed: {'9' * 5000}\n", 1, "too large"),
        ("seed: 1\nname: a\x07b\n", 2, "U+0007 is not allowed"),
        ("? [a]\n: 1\n", 1, "a key must be text"),
        ("a: &x [*x]\n", 1, "to themselves"),
        ("a: *nowhere\n", 1, "undefined alias"),
        ("a: " + "[" * 200, 1, "nested deeper"),
    ],
)
def test_faults_of_yaml_name_file_and_line(content: str, line: int, problem: str, tmp_path: Path) -> None:
    message, _ = message_of(content, tmp_path)
    assert message.startswith(f"run.yaml:{line}: ") and problem in message and "\n" not in message


def test_aliases_cannot_explode(tmp_path: Path) -> None:
    levels = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    assert "expand to too many values" in message_of("\n".join(levels), tmp_path)[0]


def test_files_that_are_no_configuration(tmp_path: Path) -> None:
    assert (
        message_of("- 1\n", tmp_path)[0] == "run.yaml: expected lines of the form 'key: value', found a list"
    )
    assert "found text" in message_of("hello\n", tmp_path)[0]
    assert "no model" in message_of("datasets: a\n", tmp_path)[0]
    assert message_of("", tmp_path)[0] == "run.yaml: the key 'datasets' is missing"
    assert "larger than" in message_of("#" * (1 << 20) + "#", tmp_path)[0]
    with pytest.raises(ConfigError, match="run.yaml:2: not UTF-8 text"):
        load_config(write(tmp_path, b"seed: 1\nrun_name: \xff\n"))
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    with_mark = write(tmp_path, b"\xef\xbb\xbfmodel_name_or_path: m\r\ndatasets: d\r\n")
    assert load_config(with_mark)[0].datasets == [DatasetConfig(path="d")]
