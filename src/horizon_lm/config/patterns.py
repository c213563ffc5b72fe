"""Regular expressions over parameter names, as `lr_factors`, `freeze` and `allow_missing` take them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from horizon_lm.errors import ConfigError


def compiled(pattern: str, key: str) -> re.Pattern[str]:
    """Raises ConfigError, which names the setting `key`, for what is not a regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{key}: {pattern!r} is no regular expression: {error}", hint=r"for example 'lm_head|norm'"
        ) from None


def nearest(pattern: str, names: Sequence[str], count: int = 3) -> list[str]:
    """The names that look most like `pattern`: the part of each that does, if one does at all."""
    parts = {part: name for name in reversed(names) for part in (name, *name.split("."))}
    words = [word for word in re.split(r"[^\w]+", pattern) if word]
    close = [match for word in (pattern, *words) for match in difflib.get_close_matches(word, parts, count)]
    found = list(dict.fromkeys(parts[part] for part in close))[:count]
    return found or list(names[:: max(1, len(names) // count)][:count])
