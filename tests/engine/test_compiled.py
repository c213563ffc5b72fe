"""Compiled layers: the gradients of uncompiled ones, one graph for all that are alike, under any policy.

Most cases use the backend `aot_eager`, which generates no code, but traces, partitions and saves as inductor
does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import horizon_lm as hz
import zoo
from horizon_lm.engine.policies import Policies
from horizon_lm.model.compiled import CompiledLayers
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.report.metrics import read_lines
from horizon_lm.training.train import train
from policy_models import Gradients, batches, gradients, host, same
from small_runs import LLAMA, settings, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

MIXED = ["keep", "recompute", "recompute", "keep"]
POLICIES: dict[str, dict[str, Any]] = {
    "keep": {"activations": "keep"},
    "recompute": {"activations": "recompute"},
    "mixed": {"activations": MIXED},
    "spilled": {"activations": MIXED, "boundaries": "host"},
    "blocks": {"activations": "recompute", "checkpoint_interval": 2},
}


def compiled(name: str, backend: str = "aot_eager", **changes: Any) -> hz.HostModel:
    model = host(name, **changes)
    model.skeleton.compile_layers(True, model.engine.ops, backend)
    return model


def graphs(model: hz.HostModel) -> int:
    assert model.skeleton.compiled is not None
    return sum(kind.graphs for kind in model.skeleton.compiled.kinds)


def gradients_of(model: hz.HostModel, data: Any) -> Gradients:
    model.forward_backward(data)
    return gradients(model)


def distance(one: Gradients, two: Gradients) -> float:
    """The largest difference of a gradient, relative to its own norm."""
    assert one.keys() == two.keys()
    return max(float((g - two[n]).norm() / (two[n].norm() + 1e-12)) for n, g in one.items())


def rows(name: str, *lengths: int) -> list[dict[str, torch.Tensor]]:
    return [zoo.batch(name, batch_size=1, length=length, seed=length) for length in lengths]


@pytest.fixture(scope="module")
def llama() -> hz.HostModel:
    return compiled("llama", slots=3, grad_slots=2)


@pytest.mark.parametrize("policy", POLICIES)
def test_one_graph_serves_all_layers_under_any_policy(llama: hz.HostModel, policy: str) -> None:
    """The bits of uncompiled layers. Nothing is compiled after the first pass; layers that keep go on."""
    ops, changes = llama.engine.ops, POLICIES[policy]
    data, plain = batches("llama", 2), host("llama", slots=3, **changes)
    ops.policies = Policies.of(plain.settings, llama.skeleton)
    kept = ops.policies.kept
    for _ in range(2):
        assert same(gradients_of(llama, data), gradients_of(plain, data))
    assert graphs(llama) == 1
    assert ops.policies.kept == kept and not ops.reruns and not ops.notes


def test_a_new_length_compiles_once_more_and_further_ones_do_not(llama: hz.HostModel) -> None:
    """Also when it comes between a micro-batch's forward pass and its backward pass."""
    llama.engine.ops.policies = Policies.of(llama.settings.replace(activations=MIXED), llama.skeleton)
    plain = host("llama", activations=MIXED)
    llama.forward_backward(batches("llama", 1))
    before = graphs(llama)
    for lengths in ((9, 12), (15, 9, 7)):
        data = rows("llama", *lengths)
        assert same(gradients_of(llama, data), gradients_of(plain, data))
    assert graphs(llama) == before + 1 and not llama.engine.ops.notes


def test_evaluation_runs_compiled(llama: hz.HostModel) -> None:
    data = batches("llama", 1)
    ours, theirs = (m.evaluate(data, return_log_probs=True).log_probs for m in (llama, host("llama")))
    assert ours is not None and theirs is not None and torch.equal(ours[0], theirs[0])
    before = graphs(llama)
    llama.evaluate(data)
    assert graphs(llama) == before


def packed(cuts: list[int], tokens: int) -> dict[str, torch.Tensor]:
    batch = zoo.batch("llama", batch_size=1, length=tokens, seed=sum(cuts))
    bounds = zip([0, *cuts], [*cuts, tokens], strict=True)
    positions = torch.cat([torch.arange(end - begin) for begin, end in bounds])[None]
    return batch | {"position_ids": positions}


def test_packed_rows_attend_outside_of_graphs() -> None:
    """Other documents in as many tokens compile nothing. The control: documents change gradients."""
    model, plain = compiled("llama", activations=MIXED), host("llama", activations=MIXED)
    for documents in ([[4], [3, 7]], [[5, 6], [2]]):
        data = [packed(cuts, 12) for cuts in documents]
        expected = gradients_of(plain, data)
        assert (
            distance(gradients_of(model, data), expected) < 5e-6
        )  # sums over parts of a layer in another order
        whole = [{k: v for k, v in batch.items() if k != "position_ids"} for batch in data]
        assert distance(gradients_of(plain, whole), expected) > 1e-2
    assert graphs(model) == 4 and not model.engine.ops.notes  # norm; projections; output and MLP


def test_dropout_draws_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the forward pass, when recomputed, and without torch.compile. The negative control: another seed."""
    case = zoo.CASES["gpt2"]

    def with_dropout() -> Any:
        config = case.config()
        config.resid_pdrop = config.attn_pdrop = 0.2
        return config

    monkeypatch.setitem(zoo.CASES, "gpt2", replace(case, config=with_dropout))
    data = batches("gpt2", 2)
    model = compiled("gpt2", activations=MIXED)
    found = gradients_of(model, data)
    assert same(found, gradients_of(host("gpt2", activations="keep"), data))
    assert distance(gradients_of(host("gpt2", seed=7), data), found) > 1e-2
    ours = compiled("gpt2", "inductor", activations=MIXED)
    assert distance(gradients_of(ours, data), found) < 1e-5  # fused sums and products round elsewhere
    assert graphs(ours) == 1 and not ours.engine.ops.notes and not ours.engine.ops.reruns


class Toy(nn.Module):
    def __init__(self, number: int, act: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.layer_idx, self.act = number, act
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self, self.linear(self.drop(x)))


def plainly(toy: Toy, x: torch.Tensor) -> torch.Tensor:
    return x.tanh()


def by_number(toy: Toy, x: torch.Tensor) -> torch.Tensor:
    return x * toy.layer_idx


def by_value(toy: Toy, x: torch.Tensor) -> torch.Tensor:
    return x.tanh() if float(x.detach().sum()) > 0 else x


def broken(toy: Toy, x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("the layer's own fault")


def run_toys(
    act: Callable[..., torch.Tensor], count: int = 4, **given: Any
) -> tuple[CompiledLayers, list[str]]:
    """Run each toy compiled; assert that it gives what it does uncompiled, with the same random numbers."""
    torch._dynamo.reset()
    toys, notes = [Toy(number, act) for number in range(count)], list[str]()
    listener = SimpleNamespace(tell=notes.append, remark=lambda text: None)
    layers = CompiledLayers(toys, given.get("hooked", [False] * count), True, listener, "aot_eager")
    for number, toy in enumerate(toys):
        torch.manual_seed(number)
        expected = toy(torch.ones(2, 4))
        torch.manual_seed(number)
        assert torch.equal(layers.run(number, torch.ones(2, 4)), expected)
    return layers, notes


def test_graphs_are_counted() -> None:
    """A layer that computes with its number needs a graph of its own."""
    (kind,) = run_toys(plainly, 3)[0].kinds
    assert kind.graphs == 1
    (kind,) = run_toys(by_number, 2)[0].kinds
    assert kind.graphs == 2


@pytest.mark.parametrize(
    ("act", "count", "given", "reason"),
    [
        (by_value, 2, {}, "torch.compile failed: UserError: .*"),
        (by_number, 12, {}, "torch.compile failed: FailOnRecompileLimitHit: .*"),
        (plainly, 2, {"hooked": [True, True]}, "its router logits are read by hooks, .*"),
    ],
)
def test_a_layer_that_cannot_be_compiled_runs_uncompiled_and_is_named(
    act: Callable[..., torch.Tensor], count: int, given: dict[str, Any], reason: str
) -> None:
    layers, notes = run_toys(act, count, **given)
    (note,) = notes
    assert re.fullmatch(rf"Toy \({count} layers\) runs uncompiled because {reason}", note)
    assert not layers.is_compiled(0)


def test_a_checkpoint_around_a_compiled_layer_would_fail() -> None:
    """The negative control of recomputing such layers as a whole: run again, a compiled layer can save other
    tensors than `checkpoint` counted."""
    torch._dynamo.reset()
    listener = SimpleNamespace(tell=pytest.fail, remark=lambda text: None)
    layers = CompiledLayers([Toy(0, plainly)], [False], True, listener, "aot_eager")

    def loss(tokens: int) -> torch.Tensor:
        x = torch.ones(1, tokens, 4, requires_grad=True)
        return checkpoint(layers.run, 0, x, use_reentrant=False).sum()

    lengths = loss(5), loss(7)
    with pytest.raises((AssertionError, CheckpointError)):
        for each in lengths:
            each.backward()


def test_an_error_of_the_layer_is_its_own() -> None:
    toy = Toy(0, broken)
    listener = SimpleNamespace(tell=pytest.fail, remark=pytest.fail)
    layers = CompiledLayers([toy], [False], True, listener, "aot_eager")
    with pytest.raises(RuntimeError, match="^the layer's own fault$"):
        layers.run(0, torch.ones(2, 4))


def test_kinds_differ_by_shape_and_settings() -> None:
    toys = [Toy(number, plainly) for number in range(3)]
    toys[1].drop.p = 0.25
    layers = CompiledLayers(toys, [False] * 3, True, SimpleNamespace(), "aot_eager")  # type: ignore[arg-type]
    assert [kind.layers for kind in layers.kinds] == [2, 1]


def test_what_compiling_took_is_shown_and_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], no_samples: None
) -> None:
    plain = Skeleton.compile_layers
    monkeypatch.setattr(Skeleton, "compile_layers", partialmethod(plain, backend="aot_eager"))
    train(settings(write_text(tmp_path / "text.txt"), tmp_path / "run", init_model=LLAMA, compile=True))
    lines = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line.get("event") == "note"]
    assert lines and lines[0]["step"] == 1 and lines[0]["text"].startswith("compiled LlamaDecoderLayer in ")
    shown = capsys.readouterr().out
    assert f"step 1: {lines[0]['text']}" in shown and "warning: step 1" not in shown
