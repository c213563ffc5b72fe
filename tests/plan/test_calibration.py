"""Calibration: on CUDA layers of real models, from which rates can be told; repeats until its time is up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from horizon_lm import cli
from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError
from horizon_lm.machine.profile import load_profile, read_profile
from horizon_lm.plan import calibrate, rates
from horizon_lm.plan.outline import Outline, model_config
from horizon_lm.plan.run_plan import plan_run
from horizon_lm.plan.working_set import layer_working_set

TRUE = {"matmul": 6e14, "attention": 4e14, "attention_backward": 3e14, "elementwise": 3e12}
LAUNCH_SECONDS = 6e-6
TINY = calibrate.Shape(64, 128, 4, 2, 16, rows=2, head_dim=32)


def samples_of(cases: Sequence[calibrate.Case], noise: float) -> list[calibrate.Sample]:
    """Samples of a made-up GPU: a pass costs its launches or its work, whichever takes longer, and noise.

    On a real one a kernel is launched while another runs, so small layers show launches alone.
    """
    rng, found = random.Random(0), []
    for case in cases:
        settings = calibrate._settings_of(case, "cpu")
        config = model_config(TrainConfig(init_model=case.shape.values(), datasets=["none"]))
        built = Outline(config, settings).built
        layer = layer_working_set(lambda built=built: built, 0, case.shape.rows, case.shape.tokens)
        for work in (layer.recomputed.forward.work, layer.recomputed.backward.work):
            busy = sum(n * k.amount / TRUE[k.kind] for k, n in work.items())
            launches = LAUNCH_SECONDS * sum(work.values())
            found.append(calibrate.Sample(work, max(busy, launches) * rng.uniform(1 - noise, 1 + noise)))
    return found


def test_shapes_of_cuda_are_those_of_real_models() -> None:
    cases = calibrate.cases_of("cuda")
    filling = [c.shape for c in cases if c.shape.rows * c.shape.tokens >= 8192]
    assert {shape.width for shape in filling} == {2560, 4096}
    assert {c.dtype for c in cases} == {"float32", "bfloat16"} and cases[0].shape in filling
    assert all(c.shape.width < 2560 for c in calibrate.cases_of("cpu"))


def test_the_matrix_rate_is_found_from_cuda_shapes_and_not_from_small_ones() -> None:
    """The negative control is what was measured before: the shapes of the CPU, bound by launches.

    0.2: the fit adds what a launch costs to the work, while the device hides one behind the other.
    """
    errors = {}
    for device in ("cuda", "cpu"):
        cases = [c for c in calibrate.cases_of(device) if c.dtype == "bfloat16" and c.activations != "keep"]
        found, _ = calibrate.fit_rates(samples_of(cases[:4], 0.02))
        errors[device] = abs(1 / max(found["matmul", "bfloat16"], 1e-20) / TRUE["matmul"] - 1)
    assert errors["cuda"] < 0.2 and errors["cpu"] > 0.5, errors


def test_a_model_is_repeated_until_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    real = calibrate.HostModel.forward_backward

    def counted(self: Any, *arguments: Any, **values: Any) -> Any:
        steps.append(1)
        return real(self, *arguments, **values)

    monkeypatch.setattr(calibrate.HostModel, "forward_backward", counted)
    case, outlines = calibrate.Case(TINY, "float32"), {}
    for end, repeats in ((float("inf"), 5), (time.monotonic() - 1, 1)):
        steps.clear()
        assert calibrate._measure(case, "cpu", time.perf_counter, 5, end, outlines)
        assert len(steps) == 1 + repeats
    keep = calibrate._measure(replace(case, activations="keep"), "cpu", time.perf_counter, 1, 0.0, outlines)
    assert keep and len(outlines) == 1


def test_link_rates_are_taken_alone_and_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for events: a copy takes 1 ms, and 4 ms beside another."""
    active: list[int] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            pass

        def record(self) -> None:
            active.append(1)

        def elapsed_time(self, other: Any) -> float:
            return 4.0 if len(active) > 2 else 1.0

    class Stream:
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    copies = []
    real = torch.empty
    monkeypatch.setattr(
        rates.arena, "allocate", lambda n, pin_for: arena_block(n, pin_for is not None, copies)
    )
    monkeypatch.setattr(torch, "empty", lambda n, dtype, device: real(n, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    synchronised = []

    def synchronize() -> None:
        synchronised.append(len(active))
        if len(synchronised) % 2:
            active.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    found = rates.link_rates(1 << 20)
    assert copies == [True, True]  # registered memory
    assert found.up == found.down == pytest.approx((1 << 20) / 4e-3)
    assert found.up_alone == found.down_alone == pytest.approx((1 << 20) / 1e-3)


def arena_block(num_bytes: int, pin: bool, copies: list[bool]) -> torch.Tensor:
    copies.append(pin)
    return torch.zeros(num_bytes, dtype=torch.uint8)


def test_a_measured_profile_serves_the_planner_of_another_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = load_profile("gh200").model_copy(
        update={"name": "here", "title": "this machine, NVIDIA H200", "measured": True}
    )
    given: list[float | None] = []

    def measure(device: str, *, budget: calibrate.Budget, **_: Any) -> Any:
        given.append(round(budget.left()))
        return profile

    monkeypatch.setattr(calibrate, "measure", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "results" / "h200.yaml"
    assert cli.main(["doctor", "--out", str(out), "--seconds", "7"]) in (0, 3)
    assert given == [7] and load_profile("auto").name == "here"
    written = read_profile(out)
    assert (written.name, written.matmul) == ("h200", profile.matmul)
    assert written.title.startswith("NVIDIA H200, ")
    assert "this machine" not in out.read_text() and "this machine" not in written.kind
    values = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "vocab_size": 256}
    plan = plan_run(TrainConfig(init_model=values, datasets=["none"], max_length=32), str(out))
    assert plan.profile.name == "h200"
    assert str(out) in capsys.readouterr().out


# Threads of the update.


def rated(monkeypatch: pytest.MonkeyPatch, rate: Callable[[int], float], cores: int) -> int:
    monkeypatch.setattr(calibrate, "optimizer_rate", lambda threads, clock: rate(threads))
    return calibrate.measure_update_threads(cores, time.perf_counter, calibrate.Budget())


def test_the_fewest_threads_that_update_as_fast_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    assert rated(monkeypatch, lambda n: tried.append(n) or 1e9 * min(n, 13), 16) == 13  # type: ignore[func-returns-value]
    assert tried == [8, 12, 13, 14, 15, 16]
    assert rated(monkeypatch, lambda n: 1e9 * min(n, 6), 16) == 8  # memory is saturated by half of them
    assert rated(monkeypatch, lambda n: 1e9 * n, 16) == 15  # one is the compute lane's, whatever it costs
    assert rated(monkeypatch, lambda n: 1e9 * n, 1) == 1


def test_a_profile_may_name_the_threads_of_the_update(tmp_path: Path) -> None:
    """One without them loads as before, and is written as before; the planner takes them where it may."""
    old = load_profile("h100-sxm")
    assert old.update_threads is None and "update_threads" not in old.to_yaml()
    named = old.model_copy(
        update={"update_threads": 11, "sources": old.sources | {"update_threads": "measured"}}
    )
    (tmp_path / "named.yaml").write_text(named.to_yaml())
    assert read_profile(tmp_path / "named.yaml") == named
    unsourced = named.model_copy(update={"sources": old.sources})
    (tmp_path / "bad.yaml").write_text(unsourced.to_yaml())
    with pytest.raises(ConfigError, match="no source for update_threads"):
        read_profile(tmp_path / "bad.yaml")
    config = TrainConfig(init_model=TINY.values(), datasets=["none"])
    for changes, expected in [({}, 11), ({"optimizer_threads": 4}, 4)]:
        plan = plan_run(config.replace(**changes), str(tmp_path / "named.yaml"), frozenset(changes))
        row = next(choice for choice in plan.choices if choice.key == "optimizer_threads")
        assert (plan.config.optimizer_threads, row.value, row.pinned) == (expected, expected, bool(changes))
    between = config.replace(update="sync")  # takes all cores, whatever was measured beside the lanes
    assert plan_run(between, str(tmp_path / "named.yaml"), frozenset()).config.optimizer_threads == "auto"
    plain = plan_run(config, "h100-sxm", frozenset())
    row = next(choice for choice in plain.choices if choice.key == "optimizer_threads")
    left = 0 if plain.config.update == "sync" else 3
    assert plain.config.optimizer_threads == "auto" and row.value == old.cores - left
