"""What does not fit is refused with figures, before anything is allocated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import zoo
from horizon_lm.config import ModelSettings
from horizon_lm.engine.policies import DTYPES, store_spec
from horizon_lm.errors import ConfigError, DoesNotFitError
from horizon_lm.host_model import HostModel
from horizon_lm.machine import memory as hardware
from horizon_lm.machine.profile import load_profile
from horizon_lm.memory import arena
from horizon_lm.memory.layout import UnitLayout, lay_out
from horizon_lm.memory.preflight import check_memory
from horizon_lm.memory.regions import GradientSlabs, StoreSpec, predict_bytes
from horizon_lm.memory.shards import Shard
from horizon_lm.plan.fit import Limits
from horizon_lm.words import size
from planned_models import SMALL

GB = 10**9
BF16 = StoreSpec(torch.bfloat16)
NO_LIMIT_V1 = 9223372036854771712
STATE = "or state the machine's memory (host_memory_gb=NUMBER) if the system shows too little"


def units(parameters: int, dtype: torch.dtype = torch.bfloat16) -> list[UnitLayout]:
    return [lay_out("layer", [("weight", (parameters,), True, dtype)], dtype)]


# The refusal.


def check(parameters: int, available: int, **settings: Any) -> None:
    """The check for one layer, in the dtype of `settings`."""
    asked = ModelSettings(**{"reserve_host_gb": 0.0} | settings)
    of = partial(store_spec, shape=None)
    check_memory(units(parameters, DTYPES[asked.dtype]), asked, of, available={"host": available})


def test_what_fits_is_accepted_to_the_byte() -> None:
    parts = predict_bytes(units(10**9), BF16)
    assert sum(parts.values()) == 14 * GB
    check(10**9, 15 * GB, reserve_host_gb=1.0)
    with pytest.raises(DoesNotFitError):
        check(10**9, 15 * GB - 1, reserve_host_gb=1.0)


def test_refusal_gives_the_figures() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        check(10**9, 6 * GB, reserve_host_gb=2.0)
    error = caught.value
    assert error.exit_code == 3
    for figure in (
        "needs 14.0 GB",
        "weights 2.00 GB, residual 2.00 GB, exp_avg 4.00 GB, exp_avg_sq 4.00 GB, grads 2.00 GB",
        "2.00 GB are kept free (reserve_host_gb)",
        f"only 6.00 GB are available of the {size(hardware.total_host_bytes())} that the system shows",
        "short by 10.0 GB",
    ):
        assert figure in error.message
    assert error.hint is not None
    # 14 bytes a parameter less 4, 4 and 2: enough by none alone, nor by all together.
    assert error.hint.split("; ") == [
        "moment_dtype=bfloat16 saves 4.00 GB (not enough alone)",
        "optim=lion saves 4.00 GB (not enough alone)",
        "max_grad_norm=null saves 2.00 GB (not enough alone)",
        STATE,
    ]


def test_refusal_offers_less_when_less_applies() -> None:
    """The negative control: settings that are lean already leave memory to be freed, and a smaller model."""
    with pytest.raises(DoesNotFitError) as caught:
        check(10**9, GB, max_grad_norm=None, moment_dtype="bfloat16", optim="lion")
    assert caught.value.hint == f"free 5.00 GB of memory, or use a smaller model; {STATE}"


def test_refusal_in_fp32_names_what_bf16_saves() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        check(10**9, GB, dtype="float32")
    assert "needs 16.0 GB" in caught.value.message
    with pytest.raises(DoesNotFitError) as caught:
        check(10**9, 15 * GB, dtype="float32")
    assert caught.value.hint is not None and "dtype=bfloat16 saves 2.00 GB" in caught.value.hint


def test_every_rank_needs_its_share() -> None:
    """To the byte, padding included: 10**9 elements are 61,035.2 blocks for each of 4 ranks."""
    spec = StoreSpec(torch.bfloat16, shard=Shard(3, 4))
    needed = 14 * 61_036 * 4096
    assert sum(predict_bytes(units(10**9), spec).values()) == needed > 14 * 10**9 // 4

    def check_rank(available: int, **settings: Any) -> None:
        asked = ModelSettings(reserve_host_gb=0.0, **settings)
        of = partial(store_spec, shape=None, shard=Shard(3, 4))
        check_memory(units(10**9), asked, of, available={"host": available})

    check_rank(needed)
    with pytest.raises(DoesNotFitError, match=r"^each of 4 ranks needs 3.50 GB of host memory") as caught:
        check_rank(needed - 1)
    assert caught.value.hint is not None and "moment_dtype=bfloat16" in caught.value.hint
    with pytest.raises(DoesNotFitError) as caught:
        check_rank(10**9, max_grad_norm=None, moment_dtype="bfloat16", optim="lion")
    hint = "free 500 MB of memory, use more ranks, or use a smaller model; "
    assert caught.value.hint is not None and caught.value.hint.startswith(hint)


def test_eager_updates_need_slabs_in_place_of_gradients() -> None:
    layers = [u for _ in range(4) for u in units(10**8)]
    spec = StoreSpec(torch.bfloat16, slabs=GradientSlabs(2, frozenset({3})))
    parts = predict_bytes(layers, spec)
    assert "grads" not in parts and parts["grad_slabs"] == 3 * 2 * 10**8
    assert sum(parts.values()) == 12 * 4 * 10**8 + parts["grad_slabs"]


def test_nothing_is_measured_when_the_figure_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("horizon_lm.memory.preflight.available_host_bytes", lambda stated, **_: 0)
    check(100, GB)
    with pytest.raises(DoesNotFitError):
        check_memory(units(100), ModelSettings(), partial(store_spec, shape=None))


def test_available_is_the_least_of_all_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    free = hardware.psutil.virtual_memory().available
    assert 0 < hardware.available_host_bytes() <= free * 1.1
    monkeypatch.setattr(hardware, "_cgroup_headrooms", lambda: [5 * 10**6, 10**15])
    monkeypatch.setattr(hardware, "_process_limits", lambda: [10**15])
    assert hardware.available_host_bytes() == 5 * 10**6
    monkeypatch.setattr(hardware, "_process_limits", lambda: [-7])
    assert hardware.available_host_bytes() == 0


@pytest.mark.parametrize("made", ["from_config", "from_pretrained"])
@pytest.mark.parametrize("sums", ["device", "host"])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("update", ["deferred", "eager"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_step_takes_on_the_cpu_is_accepted_to_the_byte(
    dtype: str, update: str, rounds: int, sums: str, made: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = GB
    for module in ("memory.preflight", "host_model"):
        monkeypatch.setattr(f"horizon_lm.{module}.available_host_bytes", lambda stated, **_: free)
    limit = None if update == "eager" else 1.0
    settings = ModelSettings(
        device="cpu",
        dtype=dtype,
        update=update,
        max_grad_norm=limit,
        rounds=rounds,
        round_sums=sums,
        reserve_host_gb=0.0,
    )

    def make() -> HostModel:
        if made == "from_config":
            return HostModel.from_config(SMALL, settings)
        return HostModel(zoo.build("llama"), settings)

    model = make()
    ids = torch.arange(8).view(1, 8)
    model.train_step([{"input_ids": ids, "labels": ids}] * 4, lr=1e-3)
    parts = model.memory_bytes()
    assert (parts["gradient_slots"] == 0) == (dtype == "float32" and (update == "deferred" or rounds == 1))
    free = sum(parts.values())
    make()
    free -= 1
    with pytest.raises(DoesNotFitError, match="short by 1 byte"):
        make()


# The machine's memory, as stated.


@pytest.fixture
def little_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual machine that shows 1 GB of free memory, without further limits."""
    shown = type("Shown", (), {"available": GB, "total": 2 * GB})
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: shown)
    monkeypatch.setattr(hardware, "_cgroup_headrooms", lambda: [])
    monkeypatch.setattr(hardware, "_process_limits", lambda: [])


def fits(parameters: int, **values: Any) -> None:
    asked = ModelSettings(reserve_host_gb=0.0, **values)
    check_memory(units(parameters), asked, partial(store_spec, shape=None))


@pytest.mark.usefixtures("little_is_free")
def test_memory_that_is_stated_counts_in_place_of_what_is_shown(tmp_path: Path) -> None:
    held = hardware.psutil.Process().memory_info().rss
    with pytest.raises(DoesNotFitError, match=r"only 1\.00 GB are available of the 2\.00 GB that the system"):
        fits(10**8)
    fits(10**8, host_memory_gb=(14 * 10**8 + held) / GB + 0.2)
    with pytest.raises(DoesNotFitError, match=r"of the 1\.40 GB that host_memory_gb states") as caught:
        fits(10**8, host_memory_gb=1.4)
    assert caught.value.hint is not None and "host_memory_gb" not in caught.value.hint
    assert Limits.of_this_machine("cpu", str(tmp_path)).host == GB
    assert abs(Limits.of_this_machine("cpu", str(tmp_path), 100 * GB).host - (100 * GB - held)) < GB / 10


@pytest.mark.usefixtures("little_is_free")
def test_limits_hold_whatever_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a cgroup ends a process that takes more, whatever the machine has."""
    monkeypatch.setattr(hardware, "_cgroup_headrooms", lambda: [5 * 10**6])
    assert hardware.available_host_bytes(100 * GB) == 5 * 10**6


def test_stated_memory_of_another_machine_replaces_that_of_its_profile() -> None:
    profile = load_profile("h100-sxm")
    assert Limits.of_profile(profile).host == profile.host_bytes
    assert Limits.of_profile(profile, 7 * GB).host == 7 * GB


@pytest.mark.parametrize("value", [0, -1.0, "100 GB", True])
def test_stated_memory_is_a_number(value: Any) -> None:
    with pytest.raises(ConfigError, match="host_memory_gb"):
        ModelSettings(host_memory_gb=value)
    assert ModelSettings(host_memory_gb=100).host_memory_bytes == 100 * GB
    assert ModelSettings().host_memory_bytes is None


def test_a_mapping_that_the_system_refuses_is_one_line() -> None:
    with pytest.raises(DoesNotFitError, match=r"refused .* TB of host memory") as caught:
        arena.allocate(1 << 60)
    assert caught.value.exit_code == 3


# cgroups, in trees made for the purpose.


Tree = Callable[[dict[str, str], str], list[int]]


@pytest.fixture
def headrooms(tmp_path: Path) -> Tree:
    def measure(files: dict[str, str], listing: str) -> list[int]:
        root = tmp_path / "cgroup"
        for name, text in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        (tmp_path / "self").write_text(listing)
        return hardware._cgroup_headrooms(root, tmp_path / "self")

    return measure


def test_cgroup_v2(headrooms: Tree) -> None:
    files = {
        "job/memory.max": "1000",
        "job/memory.current": "400",
        "job/memory.stat": "anon 300\nfile 100\ninactive_file 60\nactive_file 40",
    }
    assert headrooms(files, "0::/job\n") == [660]


def test_cgroup_v2_the_tightest_ancestor_counts(headrooms: Tree) -> None:
    files = {
        "a/memory.max": "500",
        "a/memory.current": "450",
        "a/memory.stat": "inactive_file 0",
        "a/b/memory.max": "max",
        "a/b/memory.current": "400",
        "a/b/memory.stat": "inactive_file 0",
        "a/b/c/memory.max": "10000",
        "a/b/c/memory.current": "300",
        "a/b/c/memory.stat": "inactive_file 100",
    }
    assert min(headrooms(files, "0::/a/b/c\n")) == 50


def test_cgroup_v2_in_a_container_whose_path_is_the_hosts(headrooms: Tree) -> None:
    """Without a cgroup namespace the listing names a path that is not here; the limit is at the root."""
    files = {"memory.max": "1000", "memory.current": "400", "memory.stat": "inactive_file 10"}
    assert headrooms(files, "0::/system.slice/docker-1234.scope\n") == [610]
    assert headrooms(files, "0::/\n") == [610]
    assert headrooms(files, "0::/../other\n") == [610]


def test_cgroup_v1(headrooms: Tree) -> None:
    files = {
        "memory/docker/1234/memory.limit_in_bytes": "2000",
        "memory/docker/1234/memory.usage_in_bytes": "1500",
        "memory/docker/1234/memory.stat": "cache 10\ninactive_file 5\ntotal_inactive_file 300",
        "memory/memory.limit_in_bytes": str(NO_LIMIT_V1),
        "memory/memory.usage_in_bytes": "90000",
        "memory/memory.stat": "total_inactive_file 0",
    }
    listing = "12:pids:/docker/1234\n9:memory:/docker/1234\n4:cpu,cpuacct:/docker/1234\n0::/docker/1234\n"
    # Usage counts the children, and so must the cache that can be given back.
    assert headrooms(files, listing) == [800]


def test_cgroup_v1_with_memory_among_others(headrooms: Tree) -> None:
    files = {
        "memory/x/memory.limit_in_bytes": "2000",
        "memory/x/memory.usage_in_bytes": "500",
        "memory/x/memory.stat": "total_inactive_file 0",
    }
    assert headrooms(files, "3:cpu,memory:/x\n2:memoryless:/x\n") == [1500]


def test_cgroup_without_statistics_still_limits(headrooms: Tree) -> None:
    assert headrooms({"a/memory.max": "1000", "a/memory.current": "400"}, "0::/a\n") == [600]
    assert headrooms({"b/memory.max": "1000"}, "0::/b\n") == [1000]


@pytest.mark.parametrize("listing", ["", "nonsense\n", "0::\n", "a:b\n", "0::/a:b/c\n"])
def test_cgroup_listing_that_says_nothing(headrooms: Tree, listing: str) -> None:
    assert headrooms({}, listing) == []


def test_no_cgroups_at_all(tmp_path: Path) -> None:
    assert hardware._cgroup_headrooms(tmp_path, tmp_path / "missing") == []


@pytest.mark.parametrize("limit", ["max", str(NO_LIMIT_V1), str(1 << 62), "", "garbage", "-1"])
def test_cgroup_without_a_limit(headrooms: Tree, limit: str) -> None:
    files = {"a/memory.max": limit, "a/memory.current": "400", "a/memory.stat": "inactive_file 0"}
    assert headrooms(files, "0::/a\n") == []


def test_this_machine_can_be_read() -> None:
    assert all(isinstance(value, int) for value in hardware._cgroup_headrooms())


# Limits of the process, in one of its own.

_SCRIPT = """
import json, os, resource, sys, traceback
import torch
from horizon_lm.errors import HorizonError
from horizon_lm.config import ModelSettings
from horizon_lm.host_model import HostModel
import transformers.models.llama.modeling_llama

config = dict(model_type="llama", hidden_size=512, intermediate_size=1024, num_hidden_layers=8,
              num_attention_heads=8, num_key_value_heads=8, vocab_size=2048)  # 23 M parameters
torch.set_num_threads(1)

def build(kind, headroom_mb, skip):
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    used = int(fields[{"AS": "VmSize", "DATA": "VmData"}[kind]].split()[0]) * 1024
    limit = used + headroom_mb * 10**6
    resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (limit, limit))
    try:
        HostModel.from_config(config, ModelSettings(device="cpu", dtype="bfloat16", reserve_host_gb=0.0,
                                                    skip_memory_check=skip))
    except HorizonError as error:
        print(error)
        return error.exit_code
    print("built")
    return 0

found = []
for case in json.loads(sys.argv[1]):  # each in a child of its own: what is imported is imported once
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.dup2(writer, 1)
        code = 1
        try:
            code = build(*case)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as said:
        text = said.read()
    found.append([os.waitstatus_to_exitcode(os.wait()[1]), text])
print(json.dumps(found))
"""
# kind of limit, MB beyond what the process has taken, skip_memory_check
CASES = [
    *((kind, headroom_mb, False) for kind in ("AS", "DATA") for headroom_mb in (60, 250)),
    ("AS", 3000, False),
    ("AS", 250, True),
]

needs_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits of the process are Linux's"
)


@pytest.fixture(scope="module")
def limited() -> dict[tuple[str, int, bool], tuple[int, str]]:
    """Exit code and output of a process under each limit."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(CASES)],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return dict(zip(CASES, map(tuple, json.loads(done.stdout)), strict=True))


@needs_linux
@pytest.mark.parametrize("kind", ["AS", "DATA"])
@pytest.mark.parametrize("headroom_mb", [60, 250])
def test_a_limit_of_the_process_is_respected(kind: str, headroom_mb: int, limited: Any) -> None:
    """Less than the fp32 source needs, and enough for it but not for the store (328 MB)."""
    code, said = limited[kind, headroom_mb, False]
    assert code == 3 and "host memory" in said and "hint:" in said


@needs_linux
def test_with_enough_room_the_same_model_is_built(limited: Any) -> None:
    """The negative control."""
    assert limited["AS", 3000, False] == (0, "built\n")


@needs_linux
def test_a_skipped_check_is_still_no_crash(limited: Any) -> None:
    """skip_memory_check turns the forecast off; what the system then refuses is refused in one line too."""
    code, said = limited["AS", 250, True]
    assert code == 3 and "refused" in said and "hint:" in said
