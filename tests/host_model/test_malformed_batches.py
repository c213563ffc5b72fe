"""A malformed micro-batch gets one clear error and changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode

import horizon_lm as hz
import zoo
from bad_calls import Call, digest, host, train
from horizon_lm.errors import DataError

pytestmark = pytest.mark.usefixtures("one_thread")

GOOD = zoo.batch("llama", length=8) | {
    "attention_mask": torch.ones(2, 8).long(),
    "position_ids": torch.arange(8).expand(2, 8).contiguous(),
}
RAGGED = [torch.ones(8).long(), torch.ones(6).long()]
with FakeTensorMode():
    FAKE = torch.ones(2, 8).long()


def one_is(key: str, value: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """The good tensor with another value in row 1, token 3."""
    changed = GOOD[key].to(dtype, copy=True)
    changed[1, 3] = value
    return changed


# What each key refuses whatever it means: (value, what the message says of it).
ANYWHERE: dict[str, tuple[Any, str]] = {
    "text": ("abc", "is 'abc'"),
    "a number": (3, "is 3"),
    "a dict": ({"ids": 1}, "is a dict"),
    "a set": ({1, 2}, "is a set"),
    "a meta tensor": (torch.ones(2, 8, device="meta"), "is a meta tensor"),
    "a fake tensor": (FAKE, "is a fake tensor"),
    "sparse": (GOOD["input_ids"].to_sparse(), "is a torch.sparse_coo tensor"),
    "compressed": (GOOD["input_ids"].to_sparse_csr(), "is a torch.sparse_csr tensor"),
    "quantized": (torch.quantize_per_tensor(torch.ones(2, 8), 1.0, 0, torch.quint8), "is a quantized tensor"),
    "nested": (torch.nested.nested_tensor(RAGGED), "is a nested tensor"),
    "jagged": (torch.nested.nested_tensor(RAGGED, layout=torch.jagged), "is a nested tensor"),
    "sparse rows": ([torch.ones(8).to_sparse()] * 2, "is a torch.sparse_coo tensor"),
    "meta rows": ([[1] * 8, torch.ones(8, device="meta")], "is a meta tensor"),
    "ragged rows": ([[1] * 8, [1] * 7], "has rows of 7, 8 tokens"),
    "ragged tensors": (RAGGED, "has rows of 6, 8 tokens"),
    "None inside": ([[1] * 8, [1] * 7 + [None]], "it holds None"),
    "words inside": ([[1] * 7 + ["cat"]] * 2, "it holds 'cat'"),
    "an array of objects": (np.array([[1, None, 2]] * 2, dtype=object), "it holds None"),
    "an array of text": (np.array([["7"] * 8] * 2), "it holds '7'"),
    "a masked array": (np.ma.masked_equal(np.ones((2, 8), int), 1), "is a masked array"),
    "beyond int64": ([[1 << 70] * 8] * 2, "an integer of 71 bits, beyond int64"),
    "complex": (torch.ones(2, 8, dtype=torch.complex64), "complex64"),
    "no dimension": (torch.tensor(1), r"of shape \(\)"),
    "one dimension": (torch.ones(8).long(), r"of shape \(8,\)"),
    "three dimensions": (torch.ones(1, 2, 8).long(), r"of shape \(1, 2, 8\)"),
    "no rows": (torch.ones(0, 8).long(), r"of shape \(0, 8\)"),
    "no tokens": (torch.ones(2, 0).long(), r"of shape \(2, 0\)"),
    "another length": (torch.ones(2, 7).long(), r"of \(?.*2, 7\)"),
}
# What only some keys refuse: (key, value, what the message says).
BY_KEY: dict[str, tuple[str, Any, str]] = {
    **{
        f"{key} are {kind}": (key, GOOD[key].to(kind), f"are {kind}")
        for key in ("input_ids", "labels", "position_ids")
        for kind in (torch.float32, torch.bfloat16, torch.bool)
    },
    **{
        f"{key} wrap around": (
            key,
            torch.full((2, 8), (1 << 64) - 100, dtype=torch.uint64),
            "hold 18446744073709551516, beyond int64",
        )
        for key in ("input_ids", "labels", "position_ids")
    },
    "ids of None": ("input_ids", None, "no input_ids: it is None"),
    "labels of None": ("labels", None, "no labels: it is None"),
    "an id of -1": ("input_ids", one_is("input_ids", -1), "hold -1, outside the vocabulary of 96"),
    "an id of -100": ("input_ids", one_is("input_ids", -100), "hold -100"),
    "an id too large": ("input_ids", one_is("input_ids", 96), "hold 96"),
    "a huge id": ("input_ids", one_is("input_ids", 1 << 62), "hold 4611686018427387904"),
    "a label of -1": ("labels", one_is("labels", -1), "hold -1, outside the vocabulary of 96"),
    "a label of -101": ("labels", one_is("labels", -101, torch.int8), "hold -101"),
    "a label too large": ("labels", one_is("labels", 96), "hold 96"),
    "a label of NaN": ("labels", one_is("labels", math.nan, torch.float32), "are torch.float32"),
    "a position of -1": ("position_ids", one_is("position_ids", -1), "hold -1"),
    "a huge position": ("position_ids", one_is("position_ids", 1 << 62), "hold 4611686018427387904"),
    "a position that fp32 rounds": ("position_ids", one_is("position_ids", 1 << 24), "hold 16777216"),
    **{
        f"a mask of {value} ({dtype})": (
            "attention_mask",
            one_is("attention_mask", value, dtype),
            f"0 and 1: {value} in row 1, token 3",
        )
        for value, dtype in (
            (2, torch.int64),
            (7, torch.uint8),
            (3, torch.uint16),
            (-1, torch.int8),
            (1 << 31, torch.int64),
            (0.5, torch.float32),
            (-8192.0, torch.bfloat16),
            (math.nan, torch.float32),
            (math.inf, torch.float64),
            (2.0, torch.float8_e4m3fn),
        )
    },
    "a mask of halves, as lists": ("attention_mask", [[0.5] * 8] * 2, "0 and 1: 0.5 in row 0, token 0"),
    "a mask of documents": ("attention_mask", [[1] * 4 + [2] * 4] * 2, "0 and 1: 2 in row 0, token 4"),
    "a mask that hides a row": ("attention_mask", [[1] * 8, [0] * 8], "hides every token of row 1"),
    "a mask that hides all": ("attention_mask", torch.zeros(2, 8), "hides every token of row 0"),
    "a mask of scores": ("attention_mask", torch.ones(2, 1, 8, 8), r"of shape \(2, 1, 8, 8\)"),
}
# Whole micro-batches: (micro-batches, what the message says).
WHOLE: dict[str, tuple[Any, str]] = {
    "no dict": ([GOOD, 3], "micro-batch 1 is 3"),
    "a dict of dicts": ({"batch": GOOD}, "micro-batch 0 has no input_ids"),
    "an empty dict": ([{}], "micro-batch 0 has no input_ids"),
    "no labels": ([GOOD, {"input_ids": GOOD["input_ids"]}], "micro-batch 1 has no labels"),
    "no rows at all": (
        [GOOD, {key: value[:0] for key, value in GOOD.items()}],
        r"micro-batch 1: input_ids of shape \(0, 8\)",
    ),
    "one token a row": (
        [{key: value[:, :1] for key, value in GOOD.items()}],
        r"micro-batch 0: input_ids of shape \(2, 1\)",
    ),
    "nothing to learn": (GOOD | {"labels": torch.full((2, 8), -100)}, "every label is -100"),
}
MALFORMED: dict[str, tuple[Any, str]] = {
    **{
        f"{key}: {what}": (
            [GOOD, GOOD | {key: value}],
            f"micro-batch 1.*{key}.*{message}",
        )
        for key in GOOD
        for what, (value, message) in ANYWHERE.items()
    },
    **{
        what: ([GOOD, GOOD | {key: value}], f"micro-batch 1.*{key}.*{message}|micro-batch 1 has {message}")
        for what, (key, value, message) in BY_KEY.items()
    },
    **WHOLE,
}


def mean_of_all(log_probs: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return -log_probs.mean()


def state_of(model: hz.HostModel) -> tuple[Any, ...]:
    engine, generator = model.engine, bytes(torch.get_rng_state().numpy())
    return digest(model), engine.gradients is not None, engine.has_pending, generator


@pytest.fixture(scope="module")
def trained() -> hz.HostModel:
    """With an update that is still to come, and gradients of a step after it."""
    model = host()
    train(model, 0)
    model.forward_backward(GOOD)
    train(model, 1)
    return model


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_micro_batch_gets_one_clear_error(case: str, trained: hz.HostModel) -> None:
    """From every call, naming micro-batch, key and value; nothing has changed afterwards."""
    given, message = MALFORMED[case]
    calls: list[Call] = [
        lambda model: model.forward_backward(given),
        lambda model: model.train_step(given, lr=1e-3),
        lambda model: model.evaluate(given),
        lambda model: model.train_step(given, lr=1e-3, loss_fn=mean_of_all),
    ]
    before, said = state_of(trained), set()
    for call in calls:
        with pytest.raises(DataError, match=message) as caught:
            call(trained)
        assert caught.value.hint and "\n" not in caught.value.message and len(caught.value.message) < 200
        said.add(caught.value.message)
    assert len(said) == 1 and state_of(trained) == before


def test_there_are_enough_malformed_micro_batches() -> None:
    """The issue asks for 56; that a good one passes shows that the table refuses what is wrong, not all."""
    assert len(MALFORMED) >= 56 and len({message for _, message in MALFORMED.values()}) >= 56
    assert host().forward_backward([GOOD, GOOD]).num_tokens == 28


FORMS_OF_A_MASK: dict[str, Callable[[torch.Tensor], Any]] = {
    **{str(kind): lambda mask, kind=kind: mask.to(kind) for kind in (torch.bool, torch.uint8, torch.int32)},
    **{str(kind): lambda mask, kind=kind: mask.to(kind) for kind in (torch.uint16, torch.uint64)},
    **{str(kind): lambda mask, kind=kind: mask.to(kind) for kind in (torch.bfloat16, torch.float64)},
    "float8": lambda mask: mask.float().to(torch.float8_e4m3fn),
    "lists": torch.Tensor.tolist,
    "lists of floats": lambda mask: mask.float().tolist(),
    "an array of the other byte order": lambda mask: mask.numpy().astype(">i4"),
    "rows of lists and tensors": lambda mask: [mask[0].tolist(), *mask[1:]],
    "a tensor with a gradient": lambda mask: mask.float().requires_grad_(),
    "a subclass": lambda mask: mask.as_subclass(torch.nn.Parameter),
}


@pytest.mark.parametrize("where", ["left", "right", "middle", "nowhere"])
def test_masks_of_every_form_hide_the_same(where: str) -> None:
    """Also of 16 bits, where OPT's count of tokens, the sum of its mask, would end at 256."""
    mask = torch.ones(2, 320).long()
    hole = {"left": slice(0, 9), "right": slice(300, 320), "middle": slice(100, 109), "nowhere": slice(0)}
    mask[1, hole[where]] = 0
    model = zoo._from_config(long_opt(), torch.float32, 0, "sdpa")
    model = hz.HostModel.from_pretrained(model, device="cpu", dtype="float32", skip_memory_check=True)
    one = zoo.batch("opt", length=320)
    plain = model.evaluate(one | {"attention_mask": mask}).loss
    for form, convert in FORMS_OF_A_MASK.items():
        assert model.evaluate(one | {"attention_mask": convert(mask)}).loss == plain, form
    assert (model.evaluate(one).loss == plain) == (where == "nowhere"), "the mask matters"


def long_opt() -> Any:
    settings = zoo.CASES["opt"].config()
    settings.max_position_embeddings, settings.num_hidden_layers = 320, 1
    return settings


@pytest.mark.parametrize("name", ["gptj", "codegen", "ctrl", "xglm", "opt"])
def test_positions_beyond_a_table_of_sinusoids_are_refused(name: str) -> None:
    """Tables that are buffers, in each layer or before them all; xglm makes its own longer as it needs to."""
    model = hz.HostModel.from_pretrained(
        zoo.build(name), device="cpu", dtype="float32", skip_memory_check=True
    )
    ids = torch.arange(70)[None] % zoo.VOCAB
    short = {"input_ids": ids[:, :8], "labels": ids[:, :8]}
    positions = torch.arange(8)[None] + 57
    with pytest.raises(DataError, match=r"reaches position 64, .*is 64 \(position_ids\)"):
        model.train_step(short | {"position_ids": positions}, lr=1e-3)
    assert model.train_step(short | {"position_ids": positions - 1}, lr=1e-3).num_tokens == 7
    if name == "xglm":
        assert model.train_step({"input_ids": ids, "labels": ids}, lr=1e-3).num_tokens == 69
        return
    with pytest.raises(DataError, match=r"reaches position 69, .*is 64\n"):
        model.train_step({"input_ids": ids, "labels": ids}, lr=1e-3)


def test_an_error_of_the_callers_own_data_is_theirs(trained: hz.HostModel) -> None:
    """With a note of how far it came; the step is not begun."""

    def source() -> Any:
        yield GOOD
        raise KeyError("row 7")

    before = state_of(trained)
    with pytest.raises(KeyError, match="row 7") as caught:
        trained.train_step(source(), lr=1e-3)
    (note,) = caught.value.__notes__
    assert "where micro-batch 1 was asked for" in note and state_of(trained) == before
