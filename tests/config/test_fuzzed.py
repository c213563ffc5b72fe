"""Configuration files and command lines that are wrong end with 2 and a clear line."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from horizon_lm import cli
from horizon_lm.config import TrainConfig
from sizes import times
from small_runs import values

FUZZED = times(360, 1050)


pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

_BITS = (
    "",
    "null",
    "true",
    "-1",
    "1e400",
    ".nan",
    ".inf",
    "[]",
    "{}",
    "[1, 2",
    "{a: b",
    "'x",
    '"\\ud800"',
    "!!python/object:os.system x",
)
_BITS += (
    "&a [*a]",
    "<<: *x",
    "0x",
    "1_000",
    "01",
    "yes",
    "~",
    "a: b: c",
    "\t",
    "x" * 5000,
    "- " * 200,
    "é\u202e",
    "%",
    "@",
    "`",
)


def fuzzed(rng: random.Random, base: str) -> str:
    """A configuration file with something wrong in it."""
    lines = base.splitlines()
    for _ in range(rng.randrange(1, 4)):
        i = rng.randrange(len(lines))
        kind = rng.randrange(9)
        key, _, value = lines[i].partition(":")
        if kind == 0:
            lines[i] = f"{key}: {rng.choice(_BITS)}"
        elif kind == 1 and len(key) > 2:
            j = rng.randrange(len(key) - 1)
            lines[i] = key[:j] + key[j + 1] + key[j] + key[j + 2 :] + ":" + value
        elif kind == 2:
            lines.insert(i, lines[i])
        elif kind == 3:
            lines[i] = " " * rng.randrange(1, 4) + lines[i]
        elif kind == 4:
            lines[i] = lines[i].replace(":", rng.choice(["", "=", "::", ": -", ": *"]), 1)
        elif kind == 5:
            lines[i] = f"{key}: {rng.uniform(-1e9, 1e9)}"
        elif kind == 6:
            lines[i] = "".join(chr(rng.randrange(1, 0x250)) for _ in range(rng.randrange(1, 30)))
        elif kind == 7:
            lines[i] = f"{key}: [{', '.join(rng.choice(_BITS) for _ in range(3))}]"
        else:
            lines[i] = f"{key}: {{{rng.choice(_BITS)}: {rng.choice(_BITS)}}}"
    return "\n".join(lines)


def test_fuzzed_configurations_end_with_2_and_a_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record_property: Any
) -> None:
    """Valid files and command lines pass, all others are refused in words, never with a traceback."""
    rng = random.Random(23)
    base = TrainConfig.from_dict(values(Path("t.txt"), Path("r"))).to_yaml()
    path = tmp_path / "run.yaml"
    refused = accepted = 0
    verbs = ["train", "resume", "verify", "export", "config", "data", "eval", "init", "generate", ""]
    for number in range(FUZZED):
        if number % 3:
            path.write_text(fuzzed(rng, base), encoding="utf-8", errors="surrogatepass")
            arguments = ["config", "validate", str(path)]
        elif number % 2:
            path.write_text(base)
            keys = list(TrainConfig.model_fields)
            words = [f"{rng.choice(keys)}={rng.choice(_BITS)}" for _ in range(rng.randrange(1, 3))]
            words += rng.sample(
                ["--", "-x", "=", "a.b=1", "--lr", "lr=1", "x.yaml", "--learning-rate=fast"], 2
            )
            arguments = ["config", "validate", str(path), *words]
        else:
            verb = rng.choice(verbs)
            words = [
                rng.choice([*_BITS, "--help-me", "-", "--dtype", str(tmp_path / "no"), "a=b"])
                for _ in range(2)
            ]
            arguments = [verb, *words] if verb not in ("train", "eval", "data") else [verb, "--x", *words]
        code = cli.main(arguments)
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err, (arguments, shown.err)
        assert code in (0, 2, 4, 5), (arguments, code, shown.err)
        if code == 0:
            accepted += 1
            continue
        refused += 1
        errors = [line for line in shown.err.splitlines() if line.startswith("error: ")]
        usage = shown.err.startswith("Usage: ")  # no verb at all: the help
        assert len(errors) == 1 and len(errors[0]) > 15 or usage, (arguments, shown.err)
        if arguments[:2] == ["config", "validate"]:
            assert code == 2
    assert refused > 0.6 * FUZZED and accepted > FUZZED / 100
    record_property("refused", refused)
    print(f"{FUZZED} configurations and command lines: {refused} refused in words, {accepted} valid")


def test_the_valid_configuration_is_accepted(tmp_path: Path) -> None:
    """The control."""
    path = tmp_path / "run.yaml"
    path.write_text(TrainConfig.from_dict(values(Path("t.txt"), Path("r"))).to_yaml())
    assert cli.main(["config", "validate", str(path)]) == 0
