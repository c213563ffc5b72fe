"""The runner of the GPU suite: order, time, resumption, killed jobs, out of memory, kernel; the wheels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import gpu, gpu_runner, report, wheels
from benchmarks.gpu_evidence import EVIDENCE
from benchmarks.gpu_parts import PARTS, Command, Job, group_of
from benchmarks.gpu_runner import Call, run_stages, waiting
from benchmarks.jobs import InlineWorker, Ledger
from benchmarks.placement import CHOICES
from packaging.requirements import Requirement

from horizon_lm.bench import ours
from horizon_lm.bench.figures import Row
from horizon_lm.bench.jobs import environment_of, measure, measure_fitting, smaller_micro_batch
from horizon_lm.bench.models import shape
from horizon_lm.bench.protocol import Case
from horizon_lm.errors import ConfigError
from horizon_lm.optim import kernel
from horizon_lm.plan import calibrate

TINY = Case(shape("tiny"), length=32, sequences=4, rows=2, dtype="float32", warmup=0, steps=2, threads=1)
TOY = "bench_systems:Toy"
HOUR = 3600.0


@pytest.fixture(autouse=True)
def no_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.delenv("OUT", raising=False)
    return tmp_path / "results"


def call_of(folder: Path, seconds: float = HOUR, **changes: Any) -> Call:
    return Call(folder, time.monotonic() + seconds, **changes)


def stage(*jobs: Job | Command) -> Any:
    return lambda: iter(jobs)


# ---- the stages -----------------------------------------------------------------------------


def test_the_stages_are_in_the_order_of_proof_and_fit_their_limits() -> None:
    assert list(EVIDENCE)[:5] == ["machine", "calibration", "first-checks", "4b-16k", "4b-64k"]
    for name, jobs in EVIDENCE.items():
        found = list(jobs())
        assert all(job.seconds < job.limit < 540 for job in found), name
        absent = [job for job in found if isinstance(job, Job) and name == "peers"]
        assert sum(job.seconds for job in found if job not in absent) < 540, name
    names = list(EVIDENCE)
    first = names[: names.index("largest-exact") + 1]
    assert 20 * 60 < sum(job.seconds for name in first for job in EVIDENCE[name]()) <= 31 * 60
    total = sum(job.seconds for name, jobs in EVIDENCE.items() if name != "peers" for job in jobs())
    assert 45 * 60 < total < 55 * 60
    keys = [job.key for jobs in EVIDENCE.values() for job in jobs()]
    assert len(set(keys)) == len(keys)
    of_16k = {job.name for job in EVIDENCE["4b-16k"]()}
    assert of_16k == {"torch", "ours", "ours, cuDNN attention off", "ours, compiled"}


def test_residents_and_rounds_are_measured_alone_and_together() -> None:
    """`ours` leaves both to the planner; the others of its group fix one or both."""
    rows = {
        (job.group, job.name): job.case
        for jobs in EVIDENCE.values()
        for job in jobs()
        if isinstance(job, Job)
    }
    for sequences, names in (
        (4, {"streamed"}),
        (16, {"streamed", "residents"}),
        (64, {"streamed", "rounds"}),
    ):
        group = group_of("qwen3-4b", sequences)
        assert {"torch", "ours", *(f"ours, {name}" for name in names)} <= {n for g, n in rows if g == group}
        both = rows[group, "ours"]
        for name in names:
            assert rows[group, f"ours, {name}"] == both.replace(extra=CHOICES[name])
    assert not rows[group_of("qwen2.5-7b", 512), "ours"].extra
    pooled, alone = (job.case.extra for job in EVIDENCE["largest-exact"]())
    assert (pooled, alone) == ({}, {"resident": 0})


def test_what_the_evidence_measured_the_whole_suite_does_not_repeat() -> None:
    """One ledger, and equal keys for equal jobs; the profiled step is one more, after the timed ones."""
    long = {job.key: job for jobs in PARTS.values() for job in jobs()}
    shared = [job for jobs in EVIDENCE.values() for job in jobs() if job.key in long]
    assert {job.key for job in shared} >= {
        "qwen3-4b, 16k tokens, 1024 a sequence: ours",
        "qwen2.5-7b, 148 x 1024: ours",
        "largest: ours, exact, clip 1.0",
    }
    assert all(job.case == long[job.key].case for job in shared)


def test_a_setting_that_does_not_exist_is_a_row_that_says_so(tmp_path: Path) -> None:
    job = Job("ours, new", TOY, TINY, "group", needs="no_such_setting")
    row = gpu_runner.run_job(job, 10.0, call_of(tmp_path))
    assert row["status"] == "absent" and row["why"] == "this version has no setting no_such_setting"
    known = gpu_runner.run_job(replace(job, needs="slots"), 60.0, call_of(tmp_path, dry=True))
    assert known["status"] == "done"


# ---- time, death, resumption ----------------------------------------------------------------

SLEEPER = Command("sleeps", "bench_commands", ("sleep", "60"), "toys", seconds=1, limit=1)
KILLED = Command("killed", "bench_commands", ("kill",), "toys", seconds=1)
FAILS = Command("fails", "bench_commands", ("fail",), "toys", seconds=1)
WRITES = Command("writes", "bench_commands", ("write", "{json}"), "toys", seconds=1)
TOYS = {"toys": stage(SLEEPER, KILLED, FAILS, WRITES)}


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> None:
    helpers = str(Path(__file__).parents[1] / "helpers")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([helpers, os.environ.get("PYTHONPATH", "")]))


def test_killed_and_failed_jobs_are_rows_that_are_not_run_again_unless_asked(
    tmp_path: Path, commands: None, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger, after = Ledger(tmp_path / "rows.jsonl", "a"), []
    run_stages(TOYS, ledger, call_of(tmp_path), lambda: after.append(len(ledger.rows)))
    rows = {row["name"]: row for row in Ledger(tmp_path / "rows.jsonl", "a").rows.values()}
    assert rows["sleeps"]["status"] == "killed" and "longer than 1 s" in rows["sleeps"]["why"]
    assert rows["killed"]["why"] == "killed by signal 9"
    assert rows["fails"]["why"] == "exit code 3: the reason" and rows["fails"]["log"] == [
        "words",
        "the reason",
    ]
    assert rows["writes"]["status"] == "done" and rows["writes"]["result"] == {"parts": ["a table"]}
    assert after == [4] and not waiting(TOYS, ledger)
    capsys.readouterr()
    run_stages(TOYS, ledger, call_of(tmp_path))
    assert capsys.readouterr().out == ""
    run_stages(TOYS, ledger, call_of(tmp_path, again=True))
    out = capsys.readouterr().out
    assert out.count("toys: ") == 3 and "toys: writes" not in out


def test_a_job_whose_runner_was_killed_counts_as_interrupted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Ledger(path, "a").begin(FAILS.key)
    ledger = Ledger(path, "a")
    assert ledger.rows[FAILS.key]["status"] == "interrupted" and waiting(TOYS, ledger) == {"toys": 3}
    assert waiting(TOYS, ledger, again=True) == {"toys": 4}


def test_the_end_of_a_call_leaves_the_rest_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that jobs move. A job that the call cut short runs again; cut twice, it was killed."""
    now, lasts, ran = [0.0], {"a": 40.0, "b": 40.0, "c": 200.0, "d": 10.0}, []
    monkeypatch.setattr(gpu_runner.time, "monotonic", lambda: now[0])

    def run(job: Command, seconds: float, call: Call) -> Row:
        ran.append(job.name)
        now[0] += min(seconds, lasts[job.name])
        return {"status": "done" if lasts[job.name] <= seconds else "no time", "why": ""}

    monkeypatch.setattr(gpu_runner, "run_command", run)
    jobs = [Command(name, "", (), "toys", seconds=50, limit=300) for name in lasts]
    stages = {"one": stage(*jobs[:2]), "two": stage(*jobs[2:])}
    ledger = Ledger(tmp_path / "rows.jsonl", "a")
    left = []
    for _ in range(4):
        run_stages(stages, ledger, Call(tmp_path, now[0] + 100.0))
        left.append(sum(waiting(stages, ledger).values()))
    assert ran == ["a", "b", "c", "c", "d"] and left == [2, 2, 1, 0]
    row = ledger.rows["toys: c"]
    assert row["status"] == "killed" and row["why"] == "ran longer than 100 s, and was killed"


def test_a_stage_has_its_own_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a call without one, a stage that takes too long leaves its rest, and the next stage begins."""
    now, ran = [0.0], []
    monkeypatch.setattr(gpu_runner.time, "monotonic", lambda: now[0])

    def run(job: Command, seconds: float, call: Call) -> Row:
        ran.append(job.name)
        now[0] += 400.0
        return {"status": "done"}

    monkeypatch.setattr(gpu_runner, "run_command", run)
    jobs = [Command(name, "", (), "toys", seconds=400) for name in ("a", "b", "c")]
    stages = {"one": stage(*jobs[:2]), "two": stage(jobs[2])}
    run_stages(stages, Ledger(tmp_path / "rows.jsonl", "a"), Call(tmp_path, float("inf")))
    assert ran == ["a", "c"]


def test_ctrl_c_leaves_the_job_to_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any) -> Row:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_runner, "run_command", run)
    ledger = Ledger(tmp_path / "rows.jsonl", "a")
    with pytest.raises(KeyboardInterrupt):
        run_stages(TOYS, ledger, call_of(tmp_path))
    assert waiting(TOYS, Ledger(tmp_path / "rows.jsonl", "a")) == {"toys": 4}


def test_rows_of_another_commit_are_kept_only_if_asked(tmp_path: Path) -> None:
    Ledger(tmp_path / "rows.jsonl", "commit a").add("one", {"status": "done"})
    assert Ledger(tmp_path / "rows.jsonl", "commit b").get("one") is None
    assert Ledger(tmp_path / "rows.jsonl", "commit b", any_stamp=True).get("one")


# ---- out of memory --------------------------------------------------------------------------


def test_out_of_memory_is_retried_one_size_smaller_and_says_so() -> None:
    case = TINY.replace(rows=4, extra={"most_rows": 1})
    row = measure_fitting(TOY, case, seconds=60, kind=InlineWorker)
    assert row["status"] == "done" and row["case"]["rows"] == 1 and len(row["tried"]) == 2
    assert row["retried"].startswith("retried at 2 layers, 1 x 32 tokens a micro-batch")
    assert "after out of memory at 2 layers, 4 x 32 tokens" in row["retried"]
    row = measure_fitting(TOY, TINY.replace(extra={"most_rows": 0}), seconds=60, kind=InlineWorker)
    assert row["status"] == "out of memory" and len(row["tried"]) == 1
    fits = measure_fitting(TOY, TINY, seconds=60, kind=InlineWorker)
    assert "retried" not in fits and fits["tried"] == []


def test_the_planners_choice_gives_way_before_micro_batches_do() -> None:
    case = TINY.replace(rows=0, activations="auto", sequences=16)
    kept = {"info": {"rows": 8, "recomputed": 0.25}}
    first = smaller_micro_batch(case, kept)
    assert first is not None and (first.rows, first.activations) == (8, "recompute")
    second = smaller_micro_batch(first, {})
    assert second is not None and second.rows == 4
    lean = smaller_micro_batch(case, {"info": {"rows": 8, "recomputed": 1.0}})
    assert lean is not None and (lean.rows, lean.activations) == (4, "recompute")
    resident = smaller_micro_batch(case, {"info": {"rows": 8, "recomputed": 1.0, "resident": 9}})
    assert resident is not None and (resident.rows, resident.extra) == (8, {"resident": 4})
    unknown = smaller_micro_batch(case, {})  # it ran out while it was built
    assert unknown is not None and (unknown.rows, unknown.activations, unknown.extra) == (
        0,
        "recompute",
        {"resident": 0},
    )
    assert smaller_micro_batch(TINY.replace(rows=1), {}) is None
    least = gpu_runner.fewer_layers(TINY.replace(model=shape("tiny", num_hidden_layers=1)), {})
    assert least is None


def test_workers_on_cuda_can_grow_their_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    on_cuda = environment_of(TINY.replace(device="cuda"))
    assert on_cuda["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    assert "PYTORCH_ALLOC_CONF" not in environment_of(TINY)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "backend:native")
    assert environment_of(TINY.replace(device="cuda"))["PYTORCH_ALLOC_CONF"] == "backend:native"


def test_cudnn_attention_can_be_kept_out() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        measure([(TOY, TINY)], kind=InlineWorker)
        assert torch.backends.cuda.cudnn_sdp_enabled() == before
        measure([(TOY, TINY.replace(cudnn_attention=False))], kind=InlineWorker)
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# ---- the kernel -----------------------------------------------------------------------------


def test_a_gpu_benchmark_refuses_the_torch_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "library", lambda: None)
    with pytest.raises(ConfigError, match="not built") as error:
        ours.build(TINY.replace(device="cuda"))
    assert "--build" in str(error.value.hint)
    ours.need_kernel("cpu")  # the control


def test_a_kernel_that_does_not_build_stops_the_suite(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "build_kernel", lambda: (False, ["optimizer.cpp:1: error: no such thing"]))
    monkeypatch.setattr(gpu, "run", lambda arguments: pytest.fail("it ran"))
    assert gpu.main(["--evidence", "--out", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "optimizer.cpp:1: error" in out and "hint: install a C++ compiler" in out


# ---- what a machine lacks -------------------------------------------------------------------

_WITHOUT = """
import io, json, sys
from importlib.machinery import PathFinder
ABSENT = {"datasets", "trl", "accelerate", "peft", "deepspeed", "torchao", "multiprocess", "dill", "pandas"}
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)
    find_distributions = PathFinder.find_distributions
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
try:
    import datasets
except ImportError:
    print("absent")  # the control
from horizon_lm.bench.worker import serve
case = json.loads(sys.argv[1])
for system in ("horizon_lm.bench.ours:build", "horizon_lm.bench.plain:build"):
    out = io.StringIO()
    serve(iter([{"system": system, "case": case}, {"step": 0}, {"end": 1}]), out)
    print([json.loads(line).get("status", "answered") for line in out.getvalue().splitlines()])
print(sorted(ABSENT & set(sys.modules)))
"""


def test_workers_need_neither_datasets_nor_trl_nor_accelerate() -> None:
    given = json.dumps(TINY.replace(init="quick").to_json())
    done = subprocess.run([sys.executable, "-c", _WITHOUT, given], capture_output=True, text=True)
    answers = ["ready", "answered", "answered"]
    assert done.stdout.splitlines() == ["absent", str(answers), str(answers), "[]"], done.stderr[-2000:]


def wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    folder.mkdir(exist_ok=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    text += "".join(f"Requires-Dist: {need}\n" for need in needs)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", text)


def test_wheels_are_checked_against_what_they_need(tmp_path: Path) -> None:
    wheel(
        tmp_path,
        "first",
        "1.0",
        "second>=2",
        "absent",
        "torch>=2.11",
        "colorama; sys_platform == 'win32'",
        "tomli; python_version < '3.11'",
        "test-only; extra == 'test'",
    )
    wheel(tmp_path, "second", "1.5", "typing-extensions>=4.99")
    found = {who: [] for who in ("horizon-lm", "first", "second")}
    for who, _, reason in wheels.unmet(wheels.gathered(tmp_path), [Requirement("third>=1")]):
        found[who].append(reason)
    assert found["horizon-lm"] == ["third>=1 is missing"]
    assert found["first"] == ["second>=2 is required, but second 1.5 is present", "absent is missing"]
    assert len(found["second"]) == 1 and "typing-extensions" in found["second"][0]
    asked = wheels.unmet(wheels.gathered(tmp_path), [Requirement("first[test]")])
    assert "test-only" in " ".join(reason for _, _, reason in asked)  # an extra that is asked for counts
    wheel(tmp_path, "second", "2.0")
    with pytest.raises(ValueError, match="two wheels of second; hint"):
        wheels.gathered(tmp_path)


def test_needs_of_what_was_gathered_follow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Downloading is replaced: each package has one version, one of them too old."""
    shop = {"datasets": ("5.2.0", ["dill<0.4.2"]), "dill": ("0.4.1", ["odd>=2"]), "odd": ("1.0", [])}
    wanted: list[str] = []

    def get(text: str, folder: Path) -> None:
        wanted.append(text)
        name = Requirement(text).name
        wheel(folder, name, shop[name][0], *shop[name][1])

    left = wheels.gather([Requirement("datasets>=5"), Requirement("numpy>=2")], tmp_path / "new", get)
    assert wanted == [f"datasets=={wheels.pins()['datasets']}", f"dill=={wheels.pins()['dill']}", "odd>=2"]
    assert [reason for _, _, reason in left] == ["odd>=2 is required, but odd 1.0 is present"]
    assert wheels.main([str(tmp_path / "new"), "--check"]) == 1
    assert "dill: odd>=2 is required" in capsys.readouterr().err


def test_the_projects_own_needs_are_known() -> None:
    missing = {need.name for _, need, _ in wheels.unmet({}, wheels.own_needs())}
    assert missing == {"datasets", "trl", "pydantic"}


# ---- a dry run ------------------------------------------------------------------------------


def test_everything_runs_dry_in_one_process(
    tmp_path: Path, no_results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All stages and all long parts at a tiny size. Measuring the machine is replaced; its tests are
    tests/plan/test_calibration.py and tests/cli/test_doctor_and_report.py."""
    from horizon_lm.machine.profile import load_profile

    profile = load_profile("cpu-2core").model_copy(update={"name": "here", "measured": True})
    monkeypatch.setattr(calibrate, "measure", lambda *_, **__: profile)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    threads = torch.get_num_threads()
    try:
        assert gpu.main(["--dry-run", "--out", str(tmp_path)]) == 0
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    assert capsys.readouterr().out.endswith("everything has run\n")
    folder = tmp_path / "dry-run"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    found = {row["job"]: row for row in rows if row["job"] != "machine"}
    assert set(found) == {job.key for jobs in gpu.STAGES.values() for job in jobs()}
    bad = {k: r.get("why") for k, r in found.items() if r["status"] not in ("done", "absent")}
    assert not bad
    for part in ("step", "lanes", "determinism", "gradients", "optimizer", "ranks", "sanitizer"):
        result = found[f"gpu-check: {part}"]["result"]
        assert result["dry_run"] and result["passed"], part
    assert json.loads((folder / "timeline.json").read_text())["traceEvents"]
    profiled = found["qwen3-4b, 16k tokens, 1024 a sequence: ours"]["breakdown"]["profile"]
    assert profiled["kernels"] and (folder / "trace.json.gz").stat().st_size > 1000
    assert found["qwen3-0.6b, 16k tokens, repeated: ours, default kernels, twice"]["same"]
    (file,) = folder.glob("*-gpu.md")
    text = file.read_text()
    assert "A dry run at a tiny size" in text and "## Goals" in text and "SIMULATED" in text
    assert "| zero3-offload | absent: needs a CUDA device" in text and "| update runs on |" in text
    assert not no_results.exists() and (folder / "hardware.yaml").is_file()


def test_the_ledger_alone_gives_the_results_file(
    tmp_path: Path, no_results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere, without a GPU: with the machine's own description, and what is still to run."""
    ledger = Ledger(tmp_path / "rows.jsonl", "abc, NVIDIA H200")
    about = {"status": "done", "text": "- CPU: another one", "peak": 989e12, "peak_source": "data sheet"}
    ledger.add("machine", about)
    part = {"name": "step", "rows": [{"name": "order", "passed": False}, {"name": "x", "passed": True}]}
    row = {"status": "failed", "name": "step", "group": "gpu-check", "took": 3.0, "log": ["last words"]}
    ledger.add("gpu-check: step", row | {"result": {"parts": [part]}, "why": "exit code 1"})
    monkeypatch.setenv("OUT", str(tmp_path / "outside"))
    (tmp_path / "outside").mkdir()
    assert gpu.main(["--evidence", "--report", "--out", str(tmp_path)]) == 0
    (file,) = no_results.glob("*-gpu-evidence.md")
    text = file.read_text()
    assert "- CPU: another one" in text and "Unfinished" in text and "first-checks (2)" in text
    assert "step: 1 of 2 passed, FAILED: order" in text and "last words" in text
    assert {p.suffix for p in (tmp_path / "outside").iterdir()} == {".md", ".jsonl"}
    capsys.readouterr()
    assert gpu.main(["--evidence", "--list", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "gpu-check: step: failed, exit code 1 (3 s)" in out and "no time here was measured" in out
