"""Regular expressions over parameter names, for `lr_factors`, `freeze` and `allow_missing`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from horizon_lm.errors import ConfigError


def compiled(pattern: str, key: str) -> re.Pattern[str]:
    """Compile a regular expression of the setting `key`. Raises ConfigError if it is invalid."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"{key}: {pattern!r} is not a regular expression: {error}", hint=r"for example 'lm_head|norm'"
        ) from None


def nearest(pattern: str, names: Sequence[str], count: int = 3) -> list[str]:
    """Return the names with a part most like `pattern`, or a sample of all names if none is."""
    parts = {part: name for name in reversed(names) for part in (name, *name.split("."))}
    words = [word for word in re.split(r"[^\w]+", pattern) if word]
    close = [match for word in (pattern, *words) for match in difflib.get_close_matches(word, parts, count)]
    found = list(dict.fromkeys(parts[part] for part in close))[:count]
    return found or list(names[:: max(1, len(names) // count)][:count])
