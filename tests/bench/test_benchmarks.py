"""The repository's benchmarks: peers are there or say why not, every part runs at a tiny size and resumes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import __main__ as runner
from benchmarks import cpu, gpu, gpu_goals, gpu_parts, gpu_runner, micro, peers, remedies, report, suite
from benchmarks.jobs import InlineWorker, Ledger, curve_difference
from benchmarks.peers import PEERS

from horizon_lm.bench import jobs
from horizon_lm.bench.figures import Row
from horizon_lm.bench.jobs import OURS, measure
from horizon_lm.bench.models import shape
from horizon_lm.bench.protocol import AbsentError, Case

ROOT = Path(__file__).parents[2]
TINY = Case(shape("tiny"), length=32, sequences=4, rows=2, dtype="float32", warmup=0, steps=6, threads=1)
TOY = "bench_systems:Toy"
GPU_ONLY = [name for name, peer in PEERS.items() if peer.gpu]


@pytest.fixture(autouse=True)
def no_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def new_report() -> report.Report:
    return report.Report("test", "about", command="none")


# ---- jobs -----------------------------------------------------------------------------------


def test_a_ledger_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    ledger = Ledger(path, "commit a")
    ledger.add("one", {"status": "done"})
    ledger.add("two", {"status": "no time"})
    path.write_text(path.read_text() + '{"job": "three", "sta')
    again = Ledger(path, "commit a")
    assert again.get("one") and again.get("two") is None and again.get("three") is None
    assert Ledger(path, "commit b").get("one") is None


# ---- peers ----------------------------------------------------------------------------------


def test_peers_of_the_cpu_train_as_ours_does() -> None:
    """The Trainer and plain torch, in fp32, clipping: our curve. The control has another clipping."""
    case = TINY.replace(lr=1e-3, distinct=2, clip=0.3)
    systems = [(OURS, case), *((PEERS[name].target, case) for name in ("torch", "hf-trainer"))]
    ours, *others = measure([*systems, (OURS, case.replace(clip=0.01, eps=1e-3))], kind=InlineWorker)
    *others, wrong = others
    for row in others:
        assert row["status"] == "done", row
        assert curve_difference(ours["losses"], row["losses"]) < 1e-5
    assert curve_difference(ours["losses"], wrong["losses"]) > 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="they may run here")
@pytest.mark.parametrize("name", GPU_ONLY)
def test_a_peer_that_needs_a_gpu_says_so(name: str) -> None:
    row = measure([(PEERS[name].target, TINY)], kind=InlineWorker)[0]
    assert row["status"] == "absent" and "needs a CUDA device" in row["why"]


def test_missing_packages_and_checkouts_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match="no_such_package is not installed"):
        peers.installed("no_such_package")
    monkeypatch.delenv("SOME_CHECKOUT", raising=False)
    with pytest.raises(AbsentError, match="SOME_CHECKOUT names no checkout"):
        peers.from_checkout("SOME_CHECKOUT", "a_peer")
    monkeypatch.setenv("SOME_CHECKOUT", str(tmp_path / "away"))
    with pytest.raises(AbsentError, match="is not a folder"):
        peers.from_checkout("SOME_CHECKOUT", "a_peer")
    (tmp_path / "broken_peer.py").write_text("raise RuntimeError('no nvcc')")
    (tmp_path / "whole_peer.py").write_text("value = 7")
    monkeypatch.setenv("SOME_CHECKOUT", str(tmp_path))
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(AbsentError, match="no nvcc"):
        peers.from_checkout("SOME_CHECKOUT", "broken_peer")
    assert peers.from_checkout("SOME_CHECKOUT", "whole_peer").value == 7  # the control


def test_adapters_are_small_and_import_nothing_of_a_peer() -> None:
    files = sorted((ROOT / "benchmarks" / "peers").glob("*.py"))
    # Each also checks its settings against the installed package.
    lines = {f.name: len(f.read_text().splitlines()) for f in files}
    assert lines.pop("__init__.py") <= 180  # the list of all
    assert len(lines) >= 8 and max(lines.values()) <= 150
    modules = sorted({peer.target.partition(":")[0] for peer in PEERS.values()})
    theirs = ("deepspeed", "torchao", "trainstream", "offload_adam", "infinity", "accelerate")
    check = f"import sys, importlib; [importlib.import_module(m) for m in {modules}]; "
    check += f"print([m for m in {theirs} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n", done.stderr


def test_settings_of_deepspeed_leave_nothing_to_its_defaults() -> None:
    from benchmarks.peers.deepspeed_zero import ZERO3, settings_of

    for clip, written in ((None, 0.0), (1.0, 1.0)):
        found = settings_of(TINY.replace(clip=clip), ZERO3)
        assert found["gradient_clipping"] == written and found["gradient_accumulation_steps"] == 2


# ---- the CPU part ---------------------------------------------------------------------------


def cpu_options(tmp_path: Path, *more: str) -> Any:
    options = ["--sizes", "tiny", "--length", "16", "--threads", "1", "--clips", "1.0", "0"]
    arguments = cpu.options([*options, *more])
    arguments.work, arguments.inline = tmp_path, True
    return arguments


def test_the_cpu_part_runs_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = new_report()
    rows = cpu.fill(found, cpu_options(tmp_path))
    assert [(row[1], row[2]) for row in rows] == [(p, c) for p in cpu.PAIRS for c in ("1.0", "off")]
    assert all(float(row[9]) > 0.2 and float(row[10]) < 1e-2 for row in rows)
    text = "\n".join(found.parts)
    assert "| tiny |" in text and text.count("| yes |") == 1
    assert "| tiny, torch-keep, clipping off: theirs |" in text and "hidden under compute" in text

    def never(*_: Any) -> Row:
        raise AssertionError("has been done")

    monkeypatch.setattr(cpu, "pair", never)
    assert cpu.fill(new_report(), cpu_options(tmp_path)) == rows
    with pytest.raises(AssertionError, match="has been done"):
        cpu.fill(new_report(), cpu_options(tmp_path, "--fresh"))


def test_a_curve_of_another_training_is_seen(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "x.jsonl", "")
    done = {"status": "done"}
    theirs = {**done, "losses": [5.0, 4.0, 3.0]}
    wrong = {**done, "losses": [5.0, 4.1, 3.2]}
    for ours, verdict in (([5.0, 4.001, 3.001], "yes"), ([5.0, 4.1, 3.1], "NO")):
        ledger.add("tiny/torch-keep/1.0", {**done, "ours": {**done, "losses": ours}, "theirs": theirs})
        ledger.add("tiny/control", {**done, "ours": wrong})
        line = cpu.curves("tiny", ledger)
        assert line is not None and line[-1] == verdict


# ---- the GPU part ---------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_the_suite_says_so(no_results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.main(["gpu"]) == 0
    assert "the GPU part has not run" in capsys.readouterr().out
    (file,) = no_results.glob("*-gpu.md")
    assert "## Result\n\nthe GPU part has not run" in file.read_text()
    assert gpu.main(["--out", str(no_results / "elsewhere")]) == 0
    assert list((no_results / "elsewhere").glob("*-gpu.md"))


def test_jobs_of_the_gpu_suite_are_what_the_issue_asks_for() -> None:
    jobs = [(part, job) for part, make in gpu_parts.PARTS.items() for job in make()]
    names = [f"{part}: {job.group}: {job.name}" for part, job in jobs]
    assert len(set(names)) == len(names)
    settings = {(job.case.tokens, job.case.length) for part, job in jobs if part.startswith("sweep")}
    assert settings == {(t, n) for t in (4096, 16384, 65536, 151552) for n in (1024, 4096)}
    assert {job.name for part, job in jobs if part == "peers-4b"} == {"ours", *PEERS}
    assert {job.case.model["num_hidden_layers"] for part, job in jobs if part == "depth"} >= {28, 180}
    assert all(job.case.device == "cuda" and job.case.attention == "sdpa" for _, job in jobs)


def test_the_largest_model_is_the_planners_and_shrinks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (job, *_) = gpu_parts.PARTS["largest"]()
    wide = gpu_parts.dry(job)
    layers: list[int] = []

    class Plan:
        def most_layers(self) -> int:
            return 100

    def run(systems: Any, *, seconds: float, kind: Any) -> list[Row]:
        ((_, case),) = systems
        layers.append(case.model["num_hidden_layers"])
        return [{"status": "done" if layers[-1] < 95 else "out of memory", "case": case.to_json()}]

    monkeypatch.setattr(gpu_runner, "plan_run", lambda config: Plan())
    monkeypatch.setattr(jobs, "measure", run)
    row = gpu_runner.run_job(wide, 100.0, gpu_runner.Call(tmp_path, 0.0))
    assert row["status"] == "done" and layers == [100, 95, 90]
    assert row["retried"].startswith("retried at 90 layers") and "at 100 layers" in row["retried"]


def test_the_largest_model_of_a_small_machine_has_few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As shaped, it would not fit; and the plan of all that is largest says so too, without an error."""
    from horizon_lm.plan import fit

    (job, *_) = gpu_parts.PARTS["largest"]()
    job = gpu_parts.dry(job)
    wide = shape("tiny", hidden_size=512, intermediate_size=1024, num_hidden_layers=16)
    monkeypatch.setattr(fit, "available_host_bytes", lambda stated: 700_000_000)
    found = gpu_runner.with_largest_model(gpu_parts.Job("", "", job.case.replace(model=wide), ""))
    assert 1 <= found.case.model["num_hidden_layers"] < 16
    monkeypatch.setattr(fit, "available_host_bytes", lambda stated: 1)
    config = gpu_runner.train_config(job.case).replace(skip_memory_check=True)
    assert set(gpu_runner.plan_run(config).largest().values()) == {0}


def test_goals_say_by_how_much_they_are_missed() -> None:
    lanes = {"compute": {"busy_seconds": 1.0, "share": 0.6}, "update": {"busy_seconds": 1.5, "share": 0.9}}

    def row(name: str, rate: float) -> Row:
        group = "qwen3-4b, 16k tokens, 1024 a sequence"
        found = {"group": group, "name": name, "status": "done", "tokens_per_second": [rate, rate, rate]}
        return found | {"breakdown": {"lanes": lanes}}

    missed = gpu_goals.goals([row("ours", 88.2), row("torch", 100.0)], 1e15)[0]
    assert missed[2:] == ["0.882", "no, 10.0% short", "update (90%)"]
    assert gpu_goals.goals([row("ours", 98.0), row("torch", 100.0)], 1e15)[0][3] == "yes"
    assert gpu_goals.goals([row("ours", 98.0)], 1e15)[0][2] == "not measured"
    without = gpu_goals.goals([row("ours", 98.0), row("ours, streamed", 80.0)], 1e15)[1]
    assert without[0] == "the same / without residents and rounds, 16k" and without[2:4] == ["1.225", "yes"]


def test_remedies_are_simulated_against_the_run_as_it_was() -> None:
    model = shape("qwen3-4b", num_hidden_layers=4)
    case = Case(model, length=1024, sequences=4, rows=0, device="cuda", activations="recompute")
    as_it_was, moments, tokens = remedies.rows("4b", case, "h200-1.5tb")
    assert as_it_was[-1] == "1.000" and float(moments[-1]) >= 1.0 and float(tokens[-1]) > 1.0


# ---- all of it ------------------------------------------------------------------------------


def test_make_bench_leaves_one_file_and_a_failing_part_does_not_end_it(
    monkeypatch: pytest.MonkeyPatch, no_results: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(found: report.Report, small: bool) -> list[list[str]]:
        raise RuntimeError("no luck")

    monkeypatch.setitem(suite.PARTS, "cpu", fail)
    monkeypatch.setattr(micro, "fill", lambda found, arguments: [["a rate", "5 GB/s"]])
    for part in (suite.preferences, suite.adapters):
        monkeypatch.setattr(part, "fill", lambda found, arguments: [])
    for part in (suite.simulated, suite.placement):
        monkeypatch.setattr(part, "fill", lambda found, most=None: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert runner.main([]) == 1
    (file,) = no_results.glob("*-suite.md")
    text = file.read_text()
    assert "This part failed: RuntimeError: no luck" in text and "| this machine: a rate | 5 GB/s |" in text
    assert "the GPU part has not run" in text and "Nothing in this table was measured" in text
    assert "transformers " in text and "commit " in text


def test_simulated_tables_say_so_and_name_their_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remedies and placement are other tests' matter, and take as long again."""
    monkeypatch.setattr(suite.placement, "fill", lambda found, most=None: None)
    monkeypatch.setattr(
        remedies, "rows", lambda name, case, hardware: [[name, hardware, "none", "1", "1.000"]]
    )
    found = new_report()
    suite._simulated(found, small=True)
    text = "\n".join(found.parts)
    assert (
        "Nothing in this table was measured" in text and "| gh200 |" in text and "TFLOPS, simulated" in text
    )


def test_names_and_options_are_told_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.main(["nothing"]) == 2 and "hint: there are" in capsys.readouterr().err
    given: list[Any] = []
    monkeypatch.setattr(gpu, "main", lambda argv: given.append(argv))
    assert runner.main(["gpu", "--stage", "depth", "long"]) == 0 and given == [["--stage", "depth", "long"]]
    assert "peers" not in runner.NAMES and "report" not in runner.NAMES


def test_results_are_json_lines(tmp_path: Path) -> None:
    cpu.fill(new_report(), cpu_options(tmp_path, "--peers", "torch-keep", "--clips", "1.0"))
    rows = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [row["job"] for row in rows] == ["tiny/torch-keep/1.0", "tiny/control"]
