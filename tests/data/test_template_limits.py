"""Chat templates without end, or of endless output, are stopped; limits change no text."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_helpers import write_rows
from horizon_lm.data import load_training_data, template_limits
from horizon_lm.data.chat import ChatTemplate, read_template
from horizon_lm.data.examples import Chat
from horizon_lm.errors import ConfigError, DataError
from model_on_disk import model as model
from small_runs import settings

CHAT = Chat([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}])
LOOPS = "{% for a in range(9999) %}{% for b in range(9999) %}x{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}"


@pytest.mark.parametrize(
    "tail",
    [
        LOOPS,
        "{% set x %}" + LOOPS + "{% endset %}",
        "{% generation %}" + LOOPS + "{% endgeneration %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
        DOUBLING,
        DOUBLING.replace("+", "~"),
        "{{ 'x' * 10 ** 10 }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ 'x'.ljust(9999999999) }}",
        "{{ 'x'|center(9999999999) }}",
        "{% for a in range(9000) %}{{ 'x' * 99999 }}{% endfor %}",
    ],
)
def test_templates_end(tail: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MOST_TURNS", 20_000)
    from horizon_lm.data import load_tokenizer

    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = read_template("chatml") + tail
    with pytest.raises(ConfigError) as caught:
        ChatTemplate(tokenizer).render(CHAT, "row 1")
    assert str(model) in caught.value.message and "row 1" in caught.value.message
    assert len(caught.value.message) < 400


def test_limits_change_no_text(model: Path) -> None:
    """Loops, macros, `~`, `+`, `*`, `%` and spans of `{% generation %}` are what they are without limits."""
    from transformers.utils import chat_template_utils as theirs

    template = (
        "{% macro say(m) %}{{ m.role ~ ': ' + m.content|trim }}{% endmacro %}"
        "{% for m in messages %}{% if loop.first %}{{ '=' * 7 }}{% endif %}{% if m.role == 'assistant' %}"
        "{% generation %}{{ say(m) }}{% endgeneration %}{% else %}{{ '%s|' % say(m) }}{% endif %}"
        "{{ loop.length - loop.revindex }}{% if not loop.last %}\n{% endif %}{% endfor %}"
    )
    given = {
        "conversations": [CHAT.messages],
        "chat_template": template,
        "return_assistant_tokens_mask": True,
    }
    theirs._compile_jinja_template.cache_clear()
    plain = theirs.render_jinja_template(**given)
    template_limits.limit(template)
    assert theirs.render_jinja_template(**given) == plain and "say" not in plain[0][0] and plain[1][0]


def test_a_template_without_end_is_no_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MOST_TURNS", 20_000)
    (tmp_path / "t.jinja").write_text(
        read_template("chatml") + "{% if messages|length > 4 %}" + LOOPS + "{% endif %}"
    )
    rows = [{"messages": CHAT.messages * n} for n in (1, 2, 3)]
    write_rows(tmp_path / "rows.jsonl", rows)
    given = settings(
        tmp_path / "rows.jsonl",
        tmp_path / "run",
        chat_template=str(tmp_path / "t.jinja"),
        on_bad_row="skip",
        max_length=128,
    )
    with pytest.raises((ConfigError, DataError), match="turns") as caught:
        load_training_data(given)
    assert isinstance(caught.value, ConfigError) and "chat_template" in caught.value.message
