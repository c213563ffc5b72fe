"""Sanitisers for text from outside: control characters, secrets, Markdown.

Files, data, model folders and servers may contain anything. Terminals obey control characters, Markdown obeys
brackets and pipes, and readers of a log read the secrets in it.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

# C0 except newline and tab, DEL, C1, line separators, bidirectional marks, surrogates.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LINES = re.compile("[\n\t]")
# Redraws by progress bars of other libraries: `\r` and its line, or cursor moves to other lines.
_REDRAWN = re.compile("\r(?=[^\r\n]*$)|(?:\x1b\\[A|\n|\r)*$")

_HIDDEN = "***"
_SECRETS = (
    (re.compile(r"(\b[A-Za-z][\w+.-]*:/?/)[^\s/?#'\"<>]+@"), r"\1" + _HIDDEN + "@"),
    (re.compile(r"\b(hf_|gh[opsu]_|github_pat_|sk-)[A-Za-z0-9]{16}[\w-]*"), r"\1" + _HIDDEN),
    (
        re.compile(
            r"(?i)([?&;](?:[\w.-]*[_-])?(?:token|key|apikey|password|pwd|secret|signature|sig|auth)"
            r"=)[^&;#\s'\"<>]+"
        ),
        r"\1" + _HIDDEN,
    ),
    (
        re.compile(r"(?i)(\bauthorization['\"]?\s*[:=]\s*['\"]?)(?:(bearer|basic|token)\s+)?[^\s'\",;]+"),
        r"\1" + _HIDDEN,
    ),
    (re.compile(r"(?i)(\b(?:bearer|basic)\s+)[\w.~+/=-]{16,}"), r"\1" + _HIDDEN),
)
_MAY_HOLD_SECRETS = re.compile(
    "@|hf_|gh[opsu]_|_pat_|sk-|=|uth|UTH|(?i:bearer|basic)"
)  # a quick test, as most texts hold none
# Names of environment variables whose values are secrets.
_SECRET_NAMES = re.compile(r"(?i)(?:TOKEN|API_?KEY|SECRET|SECRET_KEY|SECRET_ACCESS_KEY|PASSWORD|PASSWD)$")
_SHORTEST = 16  # characters of such a value; a shorter one may be a word

_MARKDOWN = re.compile(r"[\\`*{}\[\]<>()|~&$@]|(?<!\w)_|_(?!\w)|^[-+#]|(?<=^\d)\.(?=\s)|(?<=^\d\d)\.(?=\s)")


def printable(text: str) -> str:
    """Escape control characters, as in `\\x1b`; newlines and tabs stay."""
    return text if text.isprintable() else _CONTROLS.sub(_escaped, text)


def one_line(text: str) -> str:
    """Escape control characters, newlines and tabs: for a name within a line."""
    return _LINES.sub(_escaped, printable(text))


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def redact(text: str) -> str:
    """Replace secrets by `***`: user and password in an address, Hub tokens, parameters such as `?token=`,
    `Authorization`, and the values of environment variables such as HF_TOKEN."""
    return _redact(text, _environment())


def _redact(text: str, values: list[str]) -> str:
    for value in values:
        text = text.replace(value, _HIDDEN)
    if _MAY_HOLD_SECRETS.search(text):
        for pattern, shown in _SECRETS:
            text = pattern.sub(shown, text)
    return text


def redacted(value: Any) -> Any:
    """Redact all text in plain values, keys included; return the same object if it holds no secret."""
    return _redacted(value, _environment())


def _redacted(value: Any, values: list[str]) -> Any:
    if isinstance(value, str):
        found = _redact(value, values)
        return found if found != value else value
    if isinstance(value, dict):
        new = {_redacted(key, values): _redacted(entry, values) for key, entry in value.items()}
        return value if all(a is b for a, b in zip(_flat(new), _flat(value), strict=False)) else new
    if isinstance(value, (list, tuple)):
        entries = [_redacted(entry, values) for entry in value]
        return value if all(a is b for a, b in zip(entries, value, strict=True)) else type(value)(entries)
    return value


def _flat(values: dict[Any, Any]) -> list[Any]:
    return [*values.keys(), *values.values()]


def _environment() -> list[str]:
    """Return the secrets in the environment, the longest first."""
    found = (value for name, value in os.environ.items() if _SECRET_NAMES.search(name))
    return sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)


def markdown(text: str) -> str:
    """Escape text as one line of Markdown that shows it literally."""
    line = one_line(redact(text))
    return _MARKDOWN.sub(r"\\\g<0>", line).replace("://", ":&#47;&#47;").replace("www.", "www&#46;")


def code_span(text: str) -> str:
    """Quote text as Markdown code; a pipe in it cannot end a table cell."""
    line = one_line(redact(text)).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def json_text(value: Any) -> str:
    """Write JSON on one line, without escapes except for control characters."""
    text = json.dumps(value, ensure_ascii=False)
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def shown(text: str, encoding: str | None = None) -> str:
    """Make text safe to show: redacted, printable, `?` for characters that the encoding lacks."""
    encoding = encoding or "utf-8"
    return printable(redact(text)).encode(encoding, "replace").decode(encoding)


def shown_with_bars(text: str, encoding: str | None = None) -> str:
    """Make text safe to show, but keep the redraws of progress bars."""
    head = _REDRAWN.match(text)
    end = head.end() if head else 0
    return text[:end] + shown(text[end:], encoding)
