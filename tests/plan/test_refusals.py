"""What cannot work is refused before anything is allocated: with the reason, the figures, and ways out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

import horizon_lm
from horizon_lm.config import TrainConfig
from horizon_lm.errors import ConfigError, DoesNotFitError, HorizonError
from horizon_lm.machine import memory as hardware
from horizon_lm.machine.profile import load_profile
from horizon_lm.plan import run_plan
from horizon_lm.plan.fit import Limits, check, shortfalls
from horizon_lm.plan.outline_cache import outline_cache
from horizon_lm.plan.run_plan import plan_run

GB = 10**9
BASE = {"model_type": "qwen2", "max_position_embeddings": 131072, "vocab_size": 152064}
B7 = BASE | {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
B7 |= {"num_attention_heads": 28, "num_key_value_heads": 4}
B72 = BASE | {"hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80}
B72 |= {"num_attention_heads": 64, "num_key_value_heads": 8}
TINY = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
TINY |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 256,
}
OSS = {"model_type": "gpt_oss"}
STREAMED = {"resident": 0, "rounds": 1}
EAGER = {"attn_implementation": "eager"}

# name: model, settings, host GB, device GB, disk GB, what the refusal is about
REFUSALS: dict[str, tuple[dict, dict[str, Any], float, float, float, str]] = {
    "7B on 64 GB": (B7, STREAMED, 64, 80, 500, "host memory"),
    "7B just short": (B7, STREAMED, 109, 80, 500, "host memory"),
    "7B in fp32 on 128 GB": (B7, STREAMED | {"dtype": "float32"}, 117, 80, 500, "host memory"),
    "72B on 512 GB": (B72, {}, 512, 80, 500, "host memory"),
    "120B on 1 TB": (OSS, EAGER, 1000, 141, 500, "host memory"),
    "120B without clipping on 1 TB": (OSS, EAGER | {"max_grad_norm": None}, 1000, 141, 500, "host memory"),
    "7B on 64 GB and a small card": (B7, {}, 64, 36, 500, "host memory"),
    "a large reserve": (B7, STREAMED | {"reserve_host_gb": 300.0}, 400, 80, 500, "host memory"),
    "spilled inputs of a long sequence": (
        B7,
        STREAMED | {"boundaries": "host", "max_length": 131072, "gradient_accumulation_steps": 16},
        400,
        80,
        500,
        "host memory",
    ),
    "slots on a small card": (B72, {}, 2000, 8, 500, "device memory"),
    "many slots": (B72, {"slots": 8}, 2000, 24, 500, "device memory"),
    "many gradient slots": (B72, {"grad_slots": 6}, 2000, 24, 500, "device memory"),
    "a long sequence": (B7, {"max_length": 131072, "boundaries": "device"}, 400, 24, 500, "device memory"),
    "a large micro-batch": (B7, {"per_device_train_batch_size": 256}, 400, 24, 500, "device memory"),
    "keep pinned": (
        B7,
        {"activations": "keep", "per_device_train_batch_size": 16},
        400,
        24,
        500,
        "device memory",
    ),
    "boundaries pinned": (
        B7,
        {
            "rounds": 1,
            "boundaries": "device",
            "gradient_accumulation_steps": 96,
            "max_length": 4096,
            "activations": "recompute",
        },
        400,
        48,
        500,
        "device memory",
    ),
    "a large loss chunk": (
        B7,
        {"loss_chunk_tokens": 65536, "max_length": 65536},
        400,
        48,
        500,
        "device memory",
    ),
    "120B on a 24 GB card": (OSS, EAGER, 2000, 24, 500, "device memory"),
    "a block of layers": (
        B72,
        {"checkpoint_interval": 8, "activations": "recompute"},
        2000,
        48,
        500,
        "device memory",
    ),
    "no disk for 7B": (B7, {}, 400, 80, 10, "disk"),
    "no disk in fp32": (B7, {"save_dtype": "float32"}, 400, 80, 20, "disk"),
}


def place(monkeypatch: pytest.MonkeyPatch, host: float, device: float, disk: float) -> None:
    """Plan for a card in a machine with these sizes."""
    values = load_profile("h100-sxm").model_dump() | {"host_bytes": host * GB, "device_bytes": device * GB}
    profile = type(load_profile("h100-sxm")).model_validate(values)
    found = Limits(int(host * GB), int(device * GB), None, int(disk * GB))
    monkeypatch.setattr(run_plan, "machine", lambda config, hardware: (profile, found, []))


def config_of(model: dict, **values: Any) -> TrainConfig:
    return TrainConfig(init_model=model, datasets=["none.txt"], **values)


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_work_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In CPU seconds, since the machine may have other users; memory beyond what the process held."""
    model, values, host, device, disk, about = REFUSALS[name]
    place(monkeypatch, host, device, disk)
    config = config_of(model, **values)
    before, start = psutil.Process().memory_info().rss, time.process_time()
    with pytest.raises(DoesNotFitError) as caught, outline_cache(config) as cache:
        plan_run(config, cache=cache)
    # Two to five seconds on a machine that has nothing else to do, and three times as many beside others.
    assert time.process_time() - start < 30
    assert psutil.Process().memory_info().rss - before < 500e6
    error = caught.value
    assert error.exit_code == 3 and error.message.startswith(about)
    short = re.search(r"short by ([0-9.]+) [kMGT]B", error.message)
    assert short is not None and float(short[1]) > 0
    assert error.hint is not None and error.hint.count(";") <= 2 and re.search(r"[0-9.]+ [kMGT]B", error.hint)


def test_a_machine_that_is_large_enough_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the same models pass with room."""
    for name in ("7B just short", "many slots", "no disk for 7B"):
        model, values, *_ = REFUSALS[name]
        place(monkeypatch, 3000, 200, 2000)
        assert plan_run(config_of(model, **values)).prediction.seconds > 0


def test_120b_with_fp32_masters_fits_1500_gb() -> None:
    """Without clipping, and so without stored gradients; with it, where the moments are bf16."""
    config = config_of(OSS, **EAGER, **STREAMED, max_grad_norm=None)
    plan = plan_run(config, "h200-1.5tb")
    assert plan.planner.outline.num_parameters > 116e9
    assert plan.prediction.host["weights"] + plan.prediction.host["residual"] > 4 * 116e9
    assert plan.prediction.host_bytes < 1.5e12 and plan.prediction.device_bytes < 141e9
    clipped = config_of(OSS, **EAGER, **STREAMED)
    assert plan.planner.fits(clipped.replace(moment_dtype="bfloat16", update="deferred", boundaries="host"))
    assert not plan.planner.fits(
        clipped.replace(update="deferred", boundaries="host")
    )  # 14 bytes a parameter


def test_host_and_device_memory_bound_a_model_together() -> None:
    """128 GiB of RAM beside an H200: 18 B parameters with fp32 moments and clipping, 25 B with bf16 moments.
    What is larger is refused with the figures, and so is, as the control, half of it without residents."""
    shape = {"model_type": "llama", "hidden_size": 6144, "intermediate_size": 16384, "vocab_size": 128256}
    shape |= {"num_attention_heads": 48, "num_key_value_heads": 8, "max_position_embeddings": 4096}
    for layers, values in ((42, {}), (61, {"moment_dtype": "bfloat16"})):
        config = config_of(shape | {"num_hidden_layers": layers}, max_length=1024, host_memory_gb=137.4)
        plan = plan_run(config.replace(**values), "h200-1.5tb")
        size = 14 if not values else 10
        homes = (
            plan.prediction.store_bytes,
            sum(part for name, part in plan.prediction.device.items() if name.startswith("resident_")),
        )
        assert sum(homes) >= size * plan.planner.outline.num_parameters > 1.8 * homes[0]
        assert sum(homes) < 1.001 * size * plan.planner.outline.num_parameters
        larger = config.replace(init_model=shape | {"num_hidden_layers": int(layers * 1.15)}, **values)
        with pytest.raises(DoesNotFitError, match=r"host memory: .* short by [0-9.]+ GB") as caught:
            plan_run(larger, "h200-1.5tb")
        assert "max_grad_norm=null" in (caught.value.hint or "")
    streamed = config_of(shape | {"num_hidden_layers": 24}, max_length=1024, host_memory_gb=137.4, resident=0)
    with pytest.raises(DoesNotFitError, match="host memory"):
        plan_run(streamed, "h200-1.5tb")


@pytest.mark.parametrize("resident", [32, 500])
def test_too_many_residents_are_refused_with_the_way_out(resident: int) -> None:
    """More bytes than the device has; more units than the model has."""
    config = config_of(B72, max_length=1024, resident=resident)
    error = DoesNotFitError if resident < 80 else ConfigError
    with pytest.raises(error, match="device memory" if resident < 80 else "500") as caught:
        plan_run(config, "h200-1.5tb")
    assert "resident=" in (caught.value.hint or "")


# About 118 B parameters; 1.65 TB with clipping, 1.42 TB without.
B118 = {"model_type": "llama", "hidden_size": 12288, "intermediate_size": 32768, "num_hidden_layers": 63}
B118 |= {"num_attention_heads": 96, "num_key_value_heads": 96, "vocab_size": 128256}


def test_118b_refused_on_1500_gb_is_told_that_it_fits_without_clipping() -> None:
    """14 bytes a parameter do not fit and 12 do: `max_grad_norm: null` alone is enough, and stands first."""
    config = config_of(B118, max_length=512, **STREAMED)
    with pytest.raises(DoesNotFitError, match=r"host memory: a step needs 1\.6\d TB") as caught:
        plan_run(config, "h200-1.5tb")
    hints = (caught.value.hint or "").split("; ")
    assert re.fullmatch(r"max_grad_norm=null saves 2\d\d GB", hints[0]), hints
    assert not any("not enough alone" in text for text in hints)  # bf16 moments, or none squared, are too
    plan = plan_run(config.replace(max_grad_norm=None), "h200-1.5tb")  # it does
    assert 117e9 < plan.planner.outline.num_parameters < 119e9
    assert plan.config.update == "eager" and plan.prediction.host_bytes < 1.5e12
    half = load_profile("h200-1.5tb").model_copy(update={"host_bytes": 7.5e11})
    with pytest.raises(DoesNotFitError) as caught:  # the control: where 12 bytes do not fit either
        check(config, plan.planner.predict(config), Limits.of_profile(half), plan.planner.predict)
    hints = (caught.value.hint or "").split("; ")
    assert hints[0].startswith("max_grad_norm=null moment_dtype=bfloat16 optim=lion together save")
    assert all("not enough alone" in text for text in hints[1:])


@pytest.mark.parametrize("name", ["7B on 64 GB", "a large micro-batch", "no disk in fp32"])
def test_ways_out_save_what_they_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, values, host, device, disk, _ = REFUSALS[name]
    place(monkeypatch, host, device, disk)
    config = config_of(model, **values).replace(activations="recompute")
    with pytest.raises(DoesNotFitError) as caught:
        plan_run(config)
    hint = caught.value.hint or ""
    ways = re.findall(r"((?:[a-z_]+=\S+ )+)saves ([0-9.]+) GB( \(not enough alone\))?", hint)
    ways += re.findall(r"((?:[a-z_]+=\S+ )+)together save ([0-9.]+) GB()", hint)
    assert ways
    monkeypatch.undo()
    place(monkeypatch, 5000, 500, 5000)
    base = plan_run(config)
    limits = Limits(int(host * GB), int(device * GB), None, int(disk * GB))
    planner = replace(base.planner, limits=limits)
    for text, _, not_enough in ways:
        changes = dict(pair.split("=", 1) for pair in text.split())
        changed = config.replace(**{k: _value(v) for k, v in changes.items()})
        changed = planner.pooled(changed) if changed.resident == "auto" else changed
        remaining = shortfalls(changed, planner.predict(changed), limits)
        assert bool(remaining) == bool(not_enough), (text, remaining)


def _value(text: str) -> Any:
    return None if text == "null" else int(text) if text.isdigit() else text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"activations": ["keep*5"]}, "activations names 5 layers, the model has 4"),
        ({"boundaries": ["host*3"]}, "boundaries names 3 layers, the model has 4"),
        ({"max_length": 512}, "max_length=512 is more than the model's max_position_embeddings=256"),
        ({"tokens_per_step": 640, "gradient_accumulation_steps": 4, "max_length": 64}, "tokens_per_step=640"),
    ],
)
def test_impossible_pins_are_refused(values: dict[str, Any], expected: str) -> None:
    values = {"max_length": 64} | values
    with pytest.raises(ConfigError, match=re.escape(expected)):
        plan_run(config_of(TINY, **values), "rtx3090")


def test_a_model_that_cannot_be_streamed_is_refused_by_name() -> None:
    with pytest.raises(HorizonError, match="gemma3n"):
        plan_run(config_of({"model_type": "gemma3n_text"}, max_length=64), "rtx3090")


def test_exactly_what_is_needed_is_enough() -> None:
    plan = plan_run(config_of(TINY, max_length=64, device="cpu"), "cpu-2core")
    needed = plan.prediction.host_bytes + int(plan.config.reserve_host_gb * 1e9)
    check(plan.config, plan.prediction, Limits(needed), plan.planner.predict)
    with pytest.raises(DoesNotFitError, match="short by 1 byte\\b"):
        check(plan.config, plan.prediction, Limits(needed - 1), plan.planner.predict)


_UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
from horizon_lm.cli import main
import torch, transformers
lines = dict(l.split(":", 1) for l in Path("/proc/self/status").read_text().splitlines() if ":" in l)
used = int(lines["VmData"].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 3 * 10**9, used + 3 * 10**9))
assert main([*sys.argv[1:], "--dry-run"]) == 3
print("and without --dry-run", file=sys.stderr, flush=True)
sys.exit(main(sys.argv[1:]))
"""


def command(*arguments: str, code: str = _UNDER_A_LIMIT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(horizon_lm.__file__).parent.parent)}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, timeout=120
    )


def test_train_refuses_under_a_limit_of_the_process_and_writes_nothing(tmp_path: Path) -> None:
    """The limit is set by the test; the data does not even exist, so that nothing was read."""
    small = TINY | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "vocab_size": 32000,
    }
    (tmp_path / "data.txt").write_text("text")
    target = tmp_path / "run"
    arguments = [
        "train",
        f"init_model={json.dumps(small)}",
        f"datasets={tmp_path / 'data.txt'}",
        "tokenizer_name_or_path=none",
        "max_length=128",
        "device=cpu",
        f"output_dir={target}",
    ]
    found = command(*arguments)
    assert found.returncode == 3, found.stderr
    said = found.stderr.split("and without --dry-run")
    assert len(said) == 2
    for text in said:
        assert "error: host memory: a step needs" in text and "hint: " in text
    assert not target.exists()


def test_limits_of_this_machine_name_disk_and_memory(tmp_path: Path) -> None:
    found = Limits.of_this_machine("cpu", str(tmp_path / "not" / "there"))
    assert found.here and found.host > 0 and found.disk is not None and found.disk > 0
    assert found.device is None and found.pinned is None
    assert hardware.lockable_bytes() is None or hardware.lockable_bytes() >= 0


_LITTLE_LOCKED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_MEMLOCK, (8 << 20, 8 << 20))
from dataclasses import replace
from horizon_lm.config import TrainConfig
from horizon_lm.errors import DoesNotFitError
from horizon_lm.memory import arena
from horizon_lm.plan import run_plan
from horizon_lm.plan.fit import Limits
from horizon_lm.machine.profile import load_profile
arena.pins_beyond = lambda limit: True
profile = load_profile("h100-sxm")
limits = replace(Limits.of_profile(profile), pinned=arena.pinnable_bytes(), here=True)
run_plan.machine = lambda config, name: (profile, limits, [])
model = {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
config = TrainConfig(init_model=model, datasets=["none.txt"], max_length=64, resident=0)
plan = run_plan.plan_run(config)
print(*plan.notes, plan.prediction.pinned_bytes)
arena.pins_beyond = lambda limit: False
limits = replace(limits, pinned=arena.pinnable_bytes())
try:
    run_plan.plan_run(config, cache=plan.planner.outline._cache)
except DoesNotFitError as error:
    sys.exit(f"{error.message}\\nhint: {error.hint}")
"""


def test_too_little_locked_memory_is_refused_where_the_driver_heeds_it() -> None:
    """RLIMIT_MEMLOCK is set in a process of its own; what the driver does beyond it is given."""
    found = command(code=_LITTLE_LOCKED)
    # The control: a driver that pins beyond the limit.
    assert "ulimit -l is 8.39 MB and the run pins 173 MB" in found.stdout and "hint:" in found.stdout
    assert found.returncode == 1, found.stderr
    assert "locked memory: a run pins 173 MB" in found.stderr and "8.39 MB: short by" in found.stderr
    assert "hint: ulimit -l unlimited" in found.stderr


_IN_A_GROUP = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from horizon_lm.cli import main
code = main(sys.argv[2:])
print("outside", file=sys.stderr, flush=True)
Path(sys.argv[1]).parent.joinpath("cgroup.procs").write_text(str(os.getpid()))
main(sys.argv[2:])
sys.exit(code)
"""


@pytest.fixture
def group() -> Any:
    """A cgroup of 2 GB, where this machine lets a test make one."""
    root = Path("/sys/fs/cgroup")
    v2 = (root / "cgroup.controllers").is_file()
    folder = (root if v2 else root / "memory") / f"horizon-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(2 * GB))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no cgroup with a limit can be made here: {error}")
    yield folder
    folder.rmdir()


def test_train_refuses_under_a_limit_of_a_cgroup(group: Path, tmp_path: Path) -> None:
    small = TINY | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    (tmp_path / "data.txt").write_text("text")
    values = ["train", f"init_model={json.dumps(small)}", f"datasets={tmp_path / 'data.txt'}", "device=cpu"]
    values += ["tokenizer_name_or_path=none", "max_length=128", f"output_dir={tmp_path / 'run'}"]
    found = command(str(group), *values, "--dry-run", code=_IN_A_GROUP)
    assert found.returncode == 3, found.stderr
    pattern = r"error: host memory: a step needs .* and ([0-9.]+) ([a-zA-Z]+) are there"
    inside, outside = found.stderr.split("outside\n")
    there = re.search(pattern, inside)
    assert there is not None and (there[2] != "GB" or float(there[1]) < 2)
    if hardware.available_host_bytes() > 3 * GB:  # the control: outside of the group more is there
        seen = re.search(r"and ([0-9.]+) GB are there", outside)
        assert seen is None or float(seen[1]) > 2
