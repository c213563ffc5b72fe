"""What makes a plan quick changes none of its figures."""

from __future__ import annotations

import pytest

from horizon_lm.config import TrainConfig
from horizon_lm.machine.profile import load_profile
from horizon_lm.plan import steps, working_set
from horizon_lm.plan.outline import Outline, model_config
from horizon_lm.plan.predict import Sizes, costs_of, predict, prediction_of
from horizon_lm.plan.work import Law, Line, Trace
from horizon_lm.schedule import derive_waits, simulate

TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}


def outline_of(**values: object) -> tuple[TrainConfig, Outline]:
    config = TrainConfig(init_model=TINY, datasets=["none.txt"], device="cpu", max_length=32, **values)
    return config, Outline(model_config(config), config)


def test_ops_one_by_one_need_no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction for the CPU has the figures that it has with the waits derived."""
    config, outline = outline_of(activations="keep")
    sizes = {"batch": 2, "tokens": 32, "micro_batches": 2}
    quick = predict(outline, config, load_profile("cpu-2core"), **sizes)

    def with_waits(ops, seconds, *, waits, **rest):
        assert waits is None
        return simulate(ops, seconds, waits=derive_waits(ops), **rest)

    monkeypatch.setattr(steps, "simulate", with_waits)
    slow = predict(outline, config, load_profile("cpu-2core"), **sizes)
    assert (quick.host, quick.simulation.spans) == (slow.host, slow.simulation.spans)


@pytest.mark.parametrize("sums", ["host", "device", "add"])
def test_a_short_step_stands_for_a_long_one(sums: str) -> None:
    """Seconds, busy lanes and bytes of 24 rounds, from three of them; and the control: they take longer."""
    count = 24 if sums == "add" else 48
    values = {"rounds": 24, "round_sums": sums, "resident": 2, "activations": "keep"}
    config, outline = outline_of(gradient_accumulation_steps=count, **values)
    costs = costs_of(outline, config, load_profile("rtx3090"), Sizes(2, 32, count))
    short, whole = (prediction_of(costs, most_visits) for most_visits in (20, 10**6))
    assert len(short.simulation.spans) < len(whole.simulation.spans) / 4
    # With `add` the last round alone brings the sums back, behind the host's additions of all others.
    assert short.seconds == pytest.approx(whole.seconds, rel=1e-2 if sums == "add" else 2e-3)
    assert short.seconds > 4 * short.simulation.seconds
    assert short.lanes() == pytest.approx(whole.lanes(), rel=1e-2)
    assert (short.host_bytes, short.device_bytes) == pytest.approx(
        (whole.host_bytes, whole.device_bytes), rel=1e-2
    )


def test_keeping_is_measured_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for each shape, with the figures that it has when it is measured first."""
    run, policies = working_set._run_layer, []

    def counted(*arguments):
        policies.append(arguments[-1])
        run(*arguments)

    monkeypatch.setattr(working_set, "_run_layer", counted)
    config, outline = outline_of()
    layer = outline.measures(2, 32, 64).layers[0]
    assert policies == ["recompute"]
    found = [layer.under(policy) for policy in ("keep", "products", "attention", "keep")]
    assert policies == ["recompute", "keep", "products", "attention"] and found[0] == found[-1]
    assert found[0].held > found[1].held > found[2].held > layer.under("recompute").held
    _, other = outline_of()
    again = other.measures(2, 32, 64).layers[0]
    assert [again.measure(policy) for policy in ("keep", "products", "attention")] == found[:-1]


LINES = [Line("batch", 32, 2, 63), Line("tokens", 1, 8, 63)]


@pytest.mark.parametrize("line", LINES, ids=["batch", "tokens"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_sizes_between_two_measured_ones_follow_exactly(line: Line, attention: str) -> None:
    """Every figure, bytes and work, is the one that a measurement of the size itself has."""
    config, quick = outline_of(attn_implementation=attention)
    quick.expect(line)
    _, plain = outline_of(attn_implementation=attention)
    for number in (line.low, line.low + 3, 37, line.high + 1):
        assert figures(quick, *line.shape(number)) == figures(plain, *line.shape(number)), number
    shapes = {(batch, tokens) for part, batch, tokens in quick._traces if part[0] != "head"}
    assert shapes == {line.shape(line.low), line.shape(line.high)}


def figures(outline: Outline, batch: int, tokens: int) -> tuple:
    found = outline.measures(batch, tokens, 16)
    layer = found.layers[0]
    return found.ends, layer, *(layer.under(policy) for policy in ("attention", "products", "keep"))


def test_nothing_is_concluded_where_the_ends_differ() -> None:
    """A padded size, another branch, and a size beyond the line are measured."""
    line = Line("batch", 1, 2, 63)
    low, high = Trace(), Trace()
    low.note(("alloc", 1), 8)
    high.note(("alloc", 1), 252)
    assert Law.of(line, low, high) is not None
    assert line.number(65, 1) is None and line.number(64, 1) == 64 and line.number(5, 2) is None
    padded, branched = Trace(), Trace()
    padded.note(("alloc", 1), 256)
    assert Law.of(line, low, padded) is None
    branched.note(("alloc", 1), 252)
    branched.note(("free", 1))
    assert Law.of(line, low, branched) is None
