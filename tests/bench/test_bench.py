"""The harness: formulas against torch's counter, one protocol for all, processes of their own, the verb."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.jobs import InlineWorker, curve_difference
from torch.utils.flop_counter import FlopCounterMode

import bench_systems
from horizon_lm import cli
from horizon_lm.bench import figures, jobs, user, worker
from horizon_lm.bench.jobs import OURS, TORCH, measure
from horizon_lm.bench.models import SHAPES, own, shape, source_model, work_of
from horizon_lm.bench.ours import Ours, hidden_share
from horizon_lm.bench.plain import Plain, backward
from horizon_lm.bench.protocol import Case, tokens_of
from horizon_lm.schedule.ops import Op

TINY = Case(shape("tiny"), length=32, sequences=4, rows=2, dtype="float32", warmup=1, steps=2, threads=1)
TOY = "bench_systems:Toy"
IN_WORKER = "tests.helpers.bench_systems:"


# ---- formulas -------------------------------------------------------------------------------


def counted(case: Case) -> int:
    """FLOPs of forward and backward of one step, as torch counts them: attention without causality."""
    model = Plain(case).model
    with FlopCounterMode(display=False) as counter:
        backward(model, tokens_of(case, 0, case.sequences), torch.device("cpu"))
    return counter.get_total_flops()


def test_flops_are_what_torch_counts() -> None:
    case = TINY.replace(activations="keep", attention="eager")
    values, work = case.model, work_of(case)[0]
    squares = values["num_hidden_layers"] * values["hidden_size"] * case.length**2 * case.sequences
    found = work.model_flops(case.sequences, case.length)
    # It counts the masked half of attention too, and no products with the scales of norms.
    norms = (2 * values["num_hidden_layers"] + 1) * values["hidden_size"]
    assert counted(case) == found + 6 * squares - 6 * norms * case.tokens
    table = 6 * values["vocab_size"] * values["hidden_size"] * case.tokens
    assert table > 0.1 * found  # so that counting the embedding table would show
    again = counted(case.replace(activations="recompute")) - counted(case)
    hardware = work.hardware_flops(case.sequences, case.length, recomputed=1.0)
    # Checkpointing stops computing again once it has what it needs: without each layer's last product.
    last = 2 * values["intermediate_size"] * values["hidden_size"] * values["num_hidden_layers"] * case.tokens
    norms -= values["hidden_size"]
    assert hardware - found + 2 * squares - 2 * norms * case.tokens == again + last
    assert work.hardware_flops(case.sequences, case.length, recomputed=0.0) == found


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen3-0.6b", 0.596), ("qwen3-4b", 4.022), ("qwen2.5-7b", 7.616), ("llama-3.1-8b", 8.030)],
)
def test_published_shapes_have_their_sizes(name: str, billions: float) -> None:
    assert work_of(Case(shape(name)))[1] / 1e9 == pytest.approx(billions, abs=0.001)


def test_small_figures() -> None:
    assert figures.spread([3.0, 1.0, 2.0]) == figures.Spread(2.0, 1.0, 3.0)
    assert curve_difference([1.0, 2.0, 9.0], [1.0, 2.5]) == pytest.approx(0.2)


def test_overlap_is_time_under_compute() -> None:
    compute, upload = Op("F", 1, 0), Op("U", 2)
    assert hidden_share([(compute, 0.0, 2.0), (upload, 1.0, 3.0)]) == 0.5
    assert hidden_share([(compute, 0.0, 2.0), (upload, 0.5, 1.5)]) == 1.0
    assert hidden_share([(compute, 0.0, 2.0), (upload, 2.0, 3.0)]) == 0.0


def test_breakdown_of_a_step_on_the_cpu() -> None:
    case = TINY.replace(dtype="bfloat16")
    system = Ours(case)
    system.step(tokens_of(case, 0, 2))
    found = system.breakdown(tokens_of(case, 1, 2))
    assert {"compute", "update"} <= set(found["lanes"]) and found["hidden"] == 0.0
    assert found["moved"]["to_device"] == found["moved"]["from_device"] == 0
    # AdamW in bf16 with fp32 masters and moments: 26 bytes a parameter; runs have gaps for alignment
    assert found["moved"]["update"] == 26 * sum(u.trainable_numel for u in system.model.store.units)


# ---- protocol -------------------------------------------------------------------------------


def test_tokens_do_not_depend_on_the_cut() -> None:
    whole = torch.cat(tokens_of(TINY, 3, 4))
    for rows in (1, 2, 3):
        assert torch.equal(torch.cat(tokens_of(TINY, 3, rows)), whole)
    assert not torch.equal(torch.cat(tokens_of(TINY, 4, 4)), whole)
    again = TINY.replace(distinct=2)
    assert torch.equal(tokens_of(again, 0, 4)[0], tokens_of(again, 2, 4)[0])
    assert not torch.equal(tokens_of(again, 0, 4)[0], tokens_of(again, 1, 4)[0])
    assert Case.from_json(json.loads(json.dumps(TINY.to_json()))) == TINY


def test_quick_weights_take_no_memory_and_are_the_same_for_all() -> None:
    case = Case(shape("100m"), init="quick")
    before = worker.resident_peak()
    model = source_model(case)
    assert worker.resident_peak() - before < 60e6  # 220 MB in bf16
    twin = dict(source_model(case).named_parameters())
    assert all(torch.equal(p, twin[name]) for name, p in model.named_parameters())
    small = own(source_model(TINY.replace(init="quick")), torch.float32)
    for name, parameter in small.named_parameters():
        assert parameter.is_contiguous() and (parameter.ndim == 1 or parameter.unique().numel() > 100), name


def test_ours_and_torch_train_alike_and_a_wrong_one_shows() -> None:
    """In fp32, 8 steps: the same curve; with a tenth more learning rate another one."""
    case = TINY.replace(lr=1e-3, steps=7, distinct=2, clip=0.3)
    ours, theirs, wrong = measure(
        [(OURS, case), (TORCH, case), (TORCH, case.replace(lr=1.1e-3))], kind=InlineWorker
    )
    assert ours["losses"][-1] < ours["losses"][1] - 0.01
    same = curve_difference(ours["losses"], theirs["losses"])
    other = curve_difference(wrong["losses"], theirs["losses"])
    assert same < 1e-5 and other > 20 * max(same, 1e-6)


# ---- processes ------------------------------------------------------------------------------


def test_steps_alternate() -> None:
    bench_systems.ORDER.clear()
    pair = [(TOY, TINY.replace(extra={"name": name})) for name in "AB"]
    measure(pair, kind=InlineWorker)
    assert "".join(bench_systems.ORDER) == "BA" + "AB" + "BA"


def test_each_system_has_a_process_of_its_own_and_a_fault_is_a_row() -> None:
    greedy = TINY.replace(extra={"allocate": 300_000_000})
    names = ("Toy", "Toy", "Talkative", "Killed", "absent", "broken")
    cases = [TINY, greedy, TINY, TINY, TINY, TINY]
    found = measure([(IN_WORKER + n, c) for n, c in zip(names, cases, strict=True)], seconds=100)
    modest, large, talkative, killed, absent, broken = found
    assert [row["status"] for row in found[:3]] == ["done"] * 3
    assert large["peaks"]["host"] - modest["peaks"]["host"] > 250e6
    assert talkative["losses"] == modest["losses"] == large["losses"]
    assert killed["status"] == "out of memory" and "signal 9" in killed["why"]
    assert (absent["status"], absent["why"]) == ("absent", "no such package")
    assert (broken["status"], broken["why"]) == ("failed", "ValueError: a fault")
    assert "bench_systems.py" in "\n".join(broken["log"])


def test_what_takes_too_long_is_stopped() -> None:
    start = time.monotonic()
    row = measure([(IN_WORKER + "Slow", TINY)], seconds=3)[0]
    assert row["status"] == "no time" and time.monotonic() - start < 30


# ---- the verb -------------------------------------------------------------------------------


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(systems: Any) -> list[figures.Row]:
        return measure(systems, kind=InlineWorker)

    monkeypatch.setattr(user, "measure", run)


SMALL = ["--length", "16", "--warmup", "1", "--steps", "1", "--threads", "1", "--device", "cpu"]


def test_bench_prints_figures_and_lanes(inline: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "tiny", *SMALL, "--activations", "recompute", "--against", "torch"]) == 0
    shown = capsys.readouterr().out
    for word in ("tokens/s", "MFU", "HFU", "speed / in-memory", "compute", "moved:", "no padding"):
        assert word in shown


def test_bench_takes_a_folder_and_prints_json(
    inline: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = shape("tiny") | {"architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    options = ["--json", "--clip", "0", "--layers", "1", "--rows", "1", "--activations", "keep"]
    assert cli.main(["bench", str(tmp_path), *SMALL, *options]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["status"] == "done" and row["case"]["clip"] is None and row["info"]["update"] == "eager"
    assert row["case"]["model"]["num_hidden_layers"] == 1 and row["tokens_per_second"][0] > 0


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["nothing"], "MODEL 'nothing' is neither a shape nor a model folder", "name a shape (tiny, "),
        (["--dtype", "int4"], "--dtype 'int4' is not known", "one of bfloat16, float32"),
        (["--activations", "no"], "--activations 'no' is not known", "one of auto, recompute, keep"),
        (["--device", "tpu"], "--device 'tpu' is not known", "one of auto, cpu, cuda"),
        (["--against", "x"], "--against 'x' is not known", "one of torch, torch-keep"),
        (["tiny", "--length", "999999"], "--length 999999 exceeds the model's 131072", "use --length 131072"),
        (["tiny", "--rows", "3", "--sequences", "2"], "--rows 3 exceeds --sequences 2", "use --sequences 3"),
        (["--steps", "0"], "invalid value for '--steps'", "'horizon --help' lists"),
    ],
)
def test_wrong_arguments_end_with_2(
    arguments: list[str], error: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert f"error: {error}" in said and f"hint: {hint}" in said and "Traceback" not in said


def test_a_broken_configuration_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    for text in ("{", "[]", '{"model_type": 3}', '{"model_type": "no-such-model", "vocab_size": 9}'):
        path.write_text(text)
        assert cli.main(["bench", str(path), "--device", "cpu"]) == 2, text
        said = capsys.readouterr().err
        assert said.startswith("error: ") and "hint: " in said


def test_a_model_that_does_not_fit_ends_with_3(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(systems: Any) -> list[figures.Row]:
        return [jobs.row_of(*systems[0]) | {"status": "out of memory", "why": "too large"}]

    monkeypatch.setattr(user, "measure", refuse)
    assert cli.main(["bench", "tiny", *SMALL]) == 3
    assert "out of memory: too large" in capsys.readouterr().out


def test_the_help_names_every_shape(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in SHAPES)
