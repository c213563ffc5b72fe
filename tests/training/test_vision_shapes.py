"""The shipped example of pictures: what it draws, and what its configuration learns (all of it in soak)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from horizon_lm.config import TrainConfig
from horizon_lm.training.train import train
from sizes import SOAK

ROOT = Path(__file__).parents[2]
TRAIN, EVAL, STEPS = (3000, 200, 700) if SOAK else (64, 8, 2)


def example() -> Any:
    spec = importlib.util.spec_from_file_location("vision_shapes", ROOT / "examples/vision_shapes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def captions(path: Path) -> list[str]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["messages"][-1]["content"] for row in rows]


@pytest.mark.timeout(3000 if SOAK else 300)
def test_a_model_names_shapes_it_has_not_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = example()
    folder = tmp_path / "shapes"
    shapes.draw(folder, TRAIN, EVAL, 0)
    seen, held_out = (captions(folder / f"{name}.jsonl") for name in ("train", "eval"))
    assert len(seen) == TRAIN and len(held_out) == EVAL
    pairs = [
        {caption.replace("above", "-").replace("left of", "-") for caption in own} for own in (seen, held_out)
    ]
    assert not pairs[0] & pairs[1], "pairs of training are not evaluated on"
    config = TrainConfig.from_yaml(
        ROOT / "configs/vision_sft.yaml",
        [
            f"datasets={folder / 'train.jsonl'}",
            f"eval_datasets={folder / 'eval.jsonl'}",
            f"tokenizer_name_or_path={folder / 'processor'}",
            f"output_dir={tmp_path / 'run'}",
            f"dataset_cache_dir={tmp_path / 'cache'}",
            f"max_steps={STEPS}",
            "device=cpu",
        ],
    )
    result = train(config)
    capsys.readouterr()
    share = shapes.score(str(result.output_dir), folder, EVAL)
    said = capsys.readouterr().out
    assert f"exact captions {share:.1%} ({round(share * EVAL)} of {EVAL} pictures" in said
    assert share >= 0.85 if SOAK else share < 0.5, "two steps teach nothing"
