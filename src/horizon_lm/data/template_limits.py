"""Limits for chat templates: on loop turns, on time, and on text sizes.

A template comes with a tokenizer, from anywhere. Jinja's sandbox protects the machine, but not from endless
rendering: two nested loops of 10^4 take minutes per conversation, and doubling a text 40 times takes all
memory. transformers compiles each template once and caches it; `limit` makes it compile in an environment
that counts loop turns and macro calls.

This patches private parts of transformers, which offers no public choice of environment: rendering by an own
environment would repeat its filters, extensions and globals, and leave TRL's renderings unlimited.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import wraps
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MOST_TURNS = 1_000_000  # of loops and macros per conversation: about a second
MOST_SECONDS = 10  # of this thread's CPU time per conversation
MOST_CHARACTERS = 1 << 26  # of any text within a template, and of its output


class TemplateLimitError(Exception):
    """A template that runs or writes beyond the limits."""


def limit(template: str) -> None:
    """Make transformers render `template` within limits, beyond which it raises TemplateLimitError.

    Raises Jinja's errors for an invalid template.
    """
    from transformers.utils import chat_template_utils as theirs

    plain, limited = ImmutableSandboxedEnvironment, LimitedEnvironment
    for _ in range(2):
        theirs.ImmutableSandboxedEnvironment = limited  # type: ignore[misc]
        try:
            if isinstance(theirs._compile_jinja_template(template).environment, limited):
                return
        finally:
            theirs.ImmutableSandboxedEnvironment = plain  # type: ignore[misc]
        theirs._compile_jinja_template.cache_clear()  # drop it, compiled without limits
    raise AssertionError("transformers compiles chat templates in an unknown way")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox for one template, with limits on loop turns and text lengths."""

    intercepted_binops = frozenset({"*", "**", "%"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.turns, self.until = 0, math.inf
        self.filters |= {"_horizon_turn": self._turn, "_horizon_text": _bounded}  # cheaper than calls
        for name in ("center", "indent"):
            self.filters[name] = _narrow(self.filters[name])

    def from_string(self, *args: Any, **kwargs: Any) -> Any:
        """Compile a template whose counts restart at each rendering."""
        template = super().from_string(*args, **kwargs)
        render = template.root_render_func

        def limited(*given: Any, **named: Any) -> Iterator[str]:
            self.turns = written = 0
            self.until = time.thread_time() + MOST_SECONDS
            for piece in render(*given, **named):
                written += len(piece)
                if written > MOST_CHARACTERS:
                    raise TemplateLimitError(f"it writes more than {MOST_CHARACTERS:,} characters")
                yield piece

        template.root_render_func = limited
        return template

    def _generate(self, source: Any, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_counted(source), *args, **kwargs)

    @pass_context  # keeps Jinja from counting at compile time
    def _turn(self, context: Any, value: Any) -> Any:
        self.turns += 1
        if self.turns > MOST_TURNS:
            raise TemplateLimitError(f"its loops take more than {MOST_TURNS:,} turns")
        if time.thread_time() > self.until:
            raise TemplateLimitError(f"it takes more than {MOST_SECONDS} s")
        return value

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Check the widths given to methods of texts (ljust, zfill)."""
        if isinstance(getattr(function, "__self__", None), str):
            _check_widths(*args, *kwargs.values())
        return super().call(context, function, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Check the size of a product before computing it."""
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if (
                    hasattr(text, "__len__")
                    and isinstance(times, int)
                    and len(text) * times > MOST_CHARACTERS
                ):
                    raise _too_long()
        if operator == "**" and (abs(left) > 1 << 16 or abs(right) > 64):
            raise TemplateLimitError("it computes a power larger than any text needs")
        if operator == "%" and isinstance(left, str) and any(map(_is_wide, left.split("%")[1:])):
            raise _too_long()
        return _bounded(super().call_binop(context, operator, left, right))


def _narrow(function: Any) -> Any:
    """Make a filter reject widths beyond the limit on characters."""

    @wraps(function)
    def narrow(*args: Any, **kwargs: Any) -> Any:
        _check_widths(*args, *kwargs.values())
        return function(*args, **kwargs)

    return narrow


def _check_widths(*values: Any) -> None:
    if any(isinstance(value, int) and value > MOST_CHARACTERS for value in values):
        raise _too_long()


def _is_wide(part: str) -> bool:
    """Return whether a % format has a width of many digits, or takes it from the values."""
    width = part.lstrip("#0- +")[:8]
    return width.startswith("*") or len(width) - len(width.lstrip("0123456789.")) > 5


def _bounded(value: Any) -> Any:
    if hasattr(value, "__len__") and len(value) > MOST_CHARACTERS:
        raise _too_long()
    return value


def _too_long() -> TemplateLimitError:
    return TemplateLimitError(f"it makes a text of more than {MOST_CHARACTERS:,} characters")


def _counted(tree: Any) -> Any:
    """Add a count to each loop and macro, and a check to each operator that joins texts."""

    def passed(node: Any, name: str, line: int) -> Any:
        return nodes.Filter(node, name, [], [], None, None, lineno=line)

    class Counter(NodeTransformer):
        def _turned(self, node: Any) -> Any:
            self.generic_visit(node)
            count = passed(nodes.Const(0), "_horizon_turn", node.lineno)
            node.body.insert(0, nodes.ExprStmt(count, lineno=node.lineno))
            return node

        def _joined(self, node: Any) -> Any:
            return passed(self.generic_visit(node), "_horizon_text", node.lineno)

        visit_For = visit_Macro = _turned
        visit_Add = visit_Concat = _joined

    return Counter().visit(tree).set_environment(tree.environment)
