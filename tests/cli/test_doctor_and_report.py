"""`horizon doctor`, `horizon report`, and `horizon plan` from the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from horizon_lm import cli
from horizon_lm.config import TrainConfig
from horizon_lm.machine.profile import Profile, load_profile
from horizon_lm.plan import calibrate, doctor, rates
from horizon_lm.training.loop import recorded_step
from horizon_lm.training.train import train

GB = 10**9
TINY = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Measuring is replaced; the list grows with each call."""
    calls: list[str] = []

    def measure(device: str, **_: Any) -> Profile:
        calls.append(device)
        values = load_profile("cpu-2core").model_dump() | {"name": "here", "measured": True}
        return Profile.model_validate(values)

    monkeypatch.setattr(calibrate, "measure", measure)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return calls


def test_doctor_measures_once(measured: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) in (0, 3)
    first = capsys.readouterr().out
    assert re.search(r"^(PASS|WARN|FAIL)  host memory", first, re.M) and "measured now" in first
    assert cli.main(["doctor", "--json"]) in (0, 3)
    found = json.loads(capsys.readouterr().out)
    assert found["cached"] and len(measured) == 1
    assert {"status", "what", "found", "fix"} == set(found["findings"][0])
    assert load_profile("auto").measured  # what `plan` and `train` use from now on
    cli.main(["doctor", "--fresh"])
    assert len(measured) == 2


def test_every_measurement_has_a_line_and_ctrl_c_prints_what_is_known(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 130, with the figures so far; nothing is kept. The negative control keeps its profile."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(calibrate, "copy_rate", lambda clock: 4e9)
    monkeypatch.setattr(calibrate, "disk_rate", lambda: 1e9)
    monkeypatch.setattr(calibrate, "process_memory", lambda device, runs, until: (4 * 10**8, 0.1))
    monkeypatch.setattr(
        calibrate, "fit_rates", lambda samples: (dict.fromkeys(calibrate._COLUMNS, 1e-9), 0.0)
    )
    sample = calibrate.Sample(calibrate.Work(), 0.002)
    monkeypatch.setattr(calibrate, "_measure", lambda *_: [sample])

    def interrupted(*_: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "optimizer_rate", interrupted)
    assert cli.main(["doctor"]) == 130
    out, err = capsys.readouterr()
    assert "measuring  copies in host memory ... 4 GB/s" in err and "nothing was saved" in err
    assert re.search(r"^PASS  copies in host memory 4 GB/s$", out, re.M) and "host memory" in out
    assert not list(tmp_path.rglob("*.yaml"))
    monkeypatch.setattr(calibrate, "optimizer_rate", lambda *_: 5e9)
    assert cli.main(["doctor", "--json"]) in (0, 3)
    out, err = capsys.readouterr()
    assert err.count("measuring  ") == err.count(" ... ") == len(err.splitlines()) == 4 + 24
    assert "layers 1 of 24: width 128, 64 tokens, float32, recompute ... 2.00 ms" in err
    assert json.loads(out)["profile"]["measured"] and list(tmp_path.rglob("hardware.yaml"))


def test_a_busy_machine_is_measured_within_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that is up ends repeating, then leaves models out, which is said; a process that does not end
    in time gives the fallback's memory. The negative control has time."""
    ends: list[float] = []

    def slow(*arguments: Any) -> list[calibrate.Sample]:
        ends.append(arguments[-2])
        clock[0] += 5.0
        return [calibrate.Sample(calibrate.Work(), 1.0)]

    clock = [0.0]
    monkeypatch.setattr(calibrate.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(calibrate, "_measure", slow)
    budget, cases = calibrate.Budget(30.0), calibrate.cases_of("cpu")
    assert len(calibrate.measure_layers(cases, budget=budget, until=budget.share(1.0))) == 6
    assert budget.missing == ["18 of 24 models of layers"] and ends[0] == pytest.approx(30 / 24)
    assert len(calibrate.measure_layers(cases, budget=budget, until=budget.share(1.0))) == 4  # the fewest
    assert len(calibrate.measure_layers(cases)) == 24


def test_what_is_not_well_comes_with_a_way_to_mend_it() -> None:
    well = doctor.judge_memory(64 * GB, 60 * GB)
    assert (well.status, well.fix) == (doctor.PASS, "")
    assert doctor.judge_memory(64 * GB, 20 * GB).status == doctor.WARN
    assert doctor.judge_memory(64 * GB, 10**8).status == doctor.FAIL
    assert doctor.judge_memlock(8 << 20, "cuda").status == doctor.WARN
    assert (
        doctor.judge_memlock(8 << 20, "cpu").status
        == doctor.judge_memlock(None, "cuda").status
        == doctor.PASS
    )
    for finding in (doctor.judge_memory(64 * GB, 20 * GB), doctor.judge_memlock(8 << 20, "cuda")):
        assert finding.fix


def test_rates_in_host_memory_are_measured() -> None:
    assert rates.copy_rate(num_bytes=1 << 22) > 1e7
    assert rates.optimizer_rate(1, numel=1 << 16) > 1e6
    assert rates.disk_rate(1 << 20) > 1e4


def config_of(tmp_path: Path, **values: Any) -> TrainConfig:
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    return TrainConfig(
        init_model=TINY,
        train_tokenizer_vocab_size=300,
        datasets=[str(tmp_path / "text.txt")],
        output_dir=str(tmp_path / "run"),
        device="cpu",
        max_length=32,
        tokens_per_step=128,
        max_steps=4,
        plot_loss=False,
        progress="off",
        sample_max_new_tokens=1,
        **values,
    )


def test_a_run_is_planned_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    config = config_of(tmp_path, run_name="<script>alert(1)</script>")
    train(config)
    torch.set_num_threads(threads)
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    plan = lines[0]["plan"]
    assert plan["tokens_per_step"] == 128 and plan["choices"]
    timeline = next(line for line in lines if line["event"] == "timeline")
    assert timeline["step"] == recorded_step(4) == 3
    kinds = {name[0] for name, *_ in timeline["spans"]}
    assert {"F", "B", "L", "O"} <= kinds
    # What the folder keeps is what was asked for, so that another machine plans for itself.
    assert "activations: auto" in (run / "config.resolved.yaml").read_text()

    capsys.readouterr()
    assert cli.main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page  # nothing runs, nothing is fetched
    assert not re.search(r"(src|href)\s*=|https?://|@import|url\(", page)
    assert "Memory, predicted and measured" in page
    trace = json.loads((run / "trace.json").read_text())["traceEvents"]
    assert len([e for e in trace if e["ph"] == "X"]) == len(timeline["spans"])


def test_a_folder_without_a_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 4
    assert "is not a run" in capsys.readouterr().err


def test_plan_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = load_profile("gh200").model_dump() | {"host_bytes": 3e9, "device_bytes": 7e8}  # a short search
    (tmp_path / "small.yaml").write_text(Profile.model_validate(small).to_yaml())
    values = [f"init_model={json.dumps(TINY | {'vocab_size': 4096})}", "datasets=none.txt", "max_length=32"]
    values.append(f"hardware={tmp_path / 'small.yaml'}")
    assert cli.main(["plan", *values]) == 0
    text = capsys.readouterr().out
    for word in ("host ", "weights", "choices", "limited by", "tokens/s", "largest that fits", "simulated"):
        assert word in text
    assert cli.main(["plan", *values, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["hardware"]["name"] == "gh200" and found["largest"]["layers"] > 3
    assert cli.main(["plan", *values[:3], "hardware=gh300"]) == 2
    assert "gh200" in capsys.readouterr().err


def test_a_dry_run_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    before = sorted(p.name for p in tmp_path.iterdir())
    values = [f"init_model={json.dumps(TINY)}", f"datasets={tmp_path / 'text.txt'}", "max_length=32"]
    values += ["train_tokenizer_vocab_size=300", "device=cpu", f"output_dir={tmp_path / 'run'}"]
    assert cli.main(["train", *values, "--dry-run"]) == 0
    assert "were checked; nothing was trained" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_doctor_says_how_experts_run(
    measured: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """On this machine, of a model's folder, and of a run's settings."""
    import zoo

    def line(*arguments: str) -> str:
        assert cli.main(["doctor", *arguments]) in (0, 3)
        return str(re.search(r"^PASS  experts +(.*)$", capsys.readouterr().out, re.M)[1])  # type: ignore[index]

    assert line().startswith("grouped_mm (")
    for name, words in (("mixtral", "grouped_mm ("), ("dbrx", "eager ("), ("llama", "llama has none")):
        zoo.build(name).config.save_pretrained(tmp_path / name)
        assert line(str(tmp_path / name), "device=cpu").startswith(words)
    assert line(str(tmp_path / "mixtral"), "experts_implementation=eager") == "eager (a loop over experts)"
    run = tmp_path / "run.yaml"
    run.write_text(f"model_name_or_path: {tmp_path / 'dbrx'}\ndatasets: none.txt\n")
    assert line(str(run)) == "eager (transformers computes DbrxExperts in no other way)"
    assert cli.main(["doctor", str(run), "experts_implementation=grouped_mm"]) == 2
    assert "its experts run only as eager" in capsys.readouterr().err
