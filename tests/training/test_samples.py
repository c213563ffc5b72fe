"""A sample at the end of a run is the greedy completion of the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from horizon_lm.training import sample
from horizon_lm.training.generate import Sampling
from tiny_runs import Run
from tiny_runs import run as run
from tiny_runs import text as text

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_sample_is_skipped_where_it_would_not_fit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sample.reason_to_skip(run.folder / "model") is None
    monkeypatch.setattr(
        sample, "available_host_bytes", lambda _: 3 * sample.weight_bytes(run.folder / "model")
    )
    reason = sample.reason_to_skip(run.folder / "model")
    assert reason is not None and "are free" in reason


def test_a_sample_is_the_greedy_completion(run: Run) -> None:
    options: dict[str, Any] = {"device": torch.device("cpu"), "trust_remote_code": False}
    made = sample.complete(run.folder / "model", "the store", Sampling(6, temperature=0), **options)
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model").eval()
    ids = tokenizer("the store").input_ids
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert made.prompt == "the store"
    assert "the store" + made.completion == tokenizer.decode(ids, skip_special_tokens=True)
    empty = sample.complete(run.folder / "model", "", Sampling(2, temperature=0), **options)
    assert empty.prompt == ""


def test_a_sample_is_drawn_with_a_fixed_seed(run: Run) -> None:
    options: dict[str, Any] = {"device": torch.device("cpu"), "trust_remote_code": False}
    made = [
        sample.complete(run.folder / "model", "the store", Sampling(12, temperature=t), **options)
        for t in (2.0, 2.0, 0.0)
    ]
    assert made[0] == made[1] != made[2]
