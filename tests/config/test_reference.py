"""Every setting is documented, and the reference is up to date."""

from __future__ import annotations

from pathlib import Path

from horizon_lm.config import SCHEDULER_KWARGS, TrainConfig
from horizon_lm.config.base import GROUPS
from horizon_lm.config.reference import markdown, rows, settings_help

DOCS = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_every_setting_is_documented() -> None:
    listed = settings_help()
    for row in rows(TrainConfig):
        assert f"\n  {row.key} = {row.default}\n" in listed
        assert row.meaning.endswith(".") and row.expects
    for info in TrainConfig.model_fields.values():
        assert isinstance(info.json_schema_extra, dict) and info.json_schema_extra["group"] in GROUPS


def test_the_reference_is_up_to_date() -> None:
    assert DOCS.read_text(encoding="utf-8") == markdown(), "run: horizon config docs > docs/configuration.md"


def test_scheduler_names_are_those_of_transformers() -> None:
    source = (
        Path(__import__("importlib.util").util.find_spec("transformers").origin).parent / "trainer_utils.py"
    )
    names = source.read_text(encoding="utf-8")
    for name in SCHEDULER_KWARGS:
        assert f'= "{name}"\n' in names
