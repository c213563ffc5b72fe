"""Part `ranks`: several ranks give the bits of one, each rank in a process of its own.

1. NCCL with a world of one: its collectives on a stream of their own, beside those of a rank alone, and steps
   with `reduction: exact`, whose ops are those of several ranks.
2. Two ranks that share one GPU: everything of several ranks but NCCL, which refuses a second rank on a GPU.
   Collectives pass through host memory over Gloo.
3. One rank per GPU over NCCL, if the machine has several GPUs.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import horizon_lm as hz
from gpu.common import Part, Place, deterministic, free, llama, random_batches, same
from horizon_lm.config import ModelSettings
from horizon_lm.distributed.ranks import ALONE, Ranks
from horizon_lm.model.loading import create_model

SECONDS = 240.0  # of all ranks of one world
STEPS = 3
REGIONS = ("weights", "residual", "exp_avg", "exp_avg_sq")
SETTINGS: dict[str, dict[str, Any]] = {
    "deferred": {"update": "deferred"},
    "eager": {"update": "eager", "max_grad_norm": None},
    "residents, 2 rounds": {"resident": 2, "rounds": 2, "round_sums": "host"},
}
# Of a run: losses, norms, a digest of each region of the state.
Found = dict[str, Any]


def check_ranks(place: Place) -> Part:
    part = Part("ranks")
    found, why = _run(place, "collectives", 1)
    for name, passed in (found[0] if found else {"collectives": False}).items():
        part.add(f"{_backend(place)}, world of one: {name}", passed, why)
    wanted = _states(place, ALONE, dict(_cases(place)))
    _compare(part, place, "one", 1, wanted)
    _compare(part, place, "shared", 2, wanted)
    gpus = 2 if place.dry else torch.cuda.device_count()
    if gpus > 1:
        _compare(part, place, "own", gpus, wanted)
    else:
        part.add("NCCL, a GPU for each rank", None, "this machine has one GPU")
    free()
    return part


def _backend(place: Place) -> str:
    return "gloo" if place.device.type == "cpu" else "nccl"


def _compare(part: Part, place: Place, mode: str, world: int, wanted: dict[str, Found]) -> None:
    backend = _backend(place)
    who = {
        "one": f"1 rank over {backend}",
        "shared": f"{world} ranks share a device, gloo",
        "own": f"{world} ranks have one each, {backend}",
    }[mode]
    found, why = _run(place, mode, world)
    for name, one in wanted.items():
        apart = [key for key in one if any(rank.get(name, {}).get(key) != one[key] for rank in found)]
        passed = bool(found) and not apart
        part.add(f"{who}: {name}", passed, why or ", ".join(apart), steps=STEPS)


def _cases(place: Place) -> list[tuple[str, dict[str, Any]]]:
    """Return (name, values of the model's configuration and settings) of each run."""
    size = (3, 64, 128, 256) if place.dry else (8, 1024, 2816, 32000)
    modes = {"tied": ["deferred"], "untied": [*SETTINGS][-1:] if place.dry else [*SETTINGS]}
    return [
        (f"{name}, {mode}", {"values": llama(*size, tied=name == "tied"), "settings": SETTINGS[mode]})
        for name, chosen in modes.items()
        for mode in chosen
    ]


def _states(place: Place, ranks: Ranks, cases: dict[str, dict[str, Any]]) -> dict[str, Found]:
    """Train a few steps in each case; return what all ranks agree on. ALONE adds gradients in place."""
    found: dict[str, Found] = {}
    with deterministic():
        for name, case in cases.items():
            found[name] = _state(place, ranks, case["values"], case["settings"])
            free()
    return found


def _state(place: Place, ranks: Ranks, values: dict[str, Any], settings: dict[str, Any]) -> Found:
    given = {"max_grad_norm": 0.5, "slots": 2, "skip_memory_check": True, "deterministic": True} | settings
    if ranks is not ALONE:
        given["reduction"] = "exact"
    source = create_model(values, dtype=torch.bfloat16, seed=0, attn_implementation="sdpa")
    settings_of_all = ModelSettings(device=place.device.type, dtype="bfloat16", **given)
    model = hz.HostModel(source, settings_of_all, ranks=ranks)
    rows, tokens = (1, 32) if place.dry else (2, 512)
    losses, norms = [], []
    for step in range(STEPS):
        out = model.train_step(random_batches(values["vocab_size"], 5, rows, tokens, seed=step), lr=1e-3)
        losses.append(out.loss)
        norms.append(out.grad_norm)
    model.flush()
    assert ranks is ALONE or ranks.network_seconds > 0
    found: Found = {"losses": losses, "norms": norms}
    for region in filter(model.store.has, REGIONS):
        digest = hashlib.sha256()
        for unit in range(len(model.store.units)):
            run = model.store.whole(region, unit, ranks, everywhere=True)
            assert run is not None
            digest.update(run.contiguous().view(torch.uint8).numpy().tobytes())
        found[region] = digest.hexdigest()
    model.close()
    return found


# ---- processes ------------------------------------------------------------------------------


def _run(place: Place, mode: str, world: int) -> tuple[list[Any], str]:
    """Run `mode` in a process for each rank; return the result of each, or none and the reason."""
    with socket.socket() as held, tempfile.TemporaryDirectory() as folder:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        held.close()
        processes = []
        for rank in range(world):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            environment = os.environ | {key: str(value) for key, value in numbers.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
            given = {"mode": mode, "dry": place.dry, "out": str(Path(folder) / str(rank))}
            check = Path(__file__).with_name("check.py")
            command = [sys.executable, str(check), "--rank-child", json.dumps(given)]
            log = open(Path(folder) / f"log-{rank}", "wb")  # noqa: SIM115  # read below
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            log.close()
        why = _wait(processes)
        if why:
            rank = next((r for r, p in enumerate(processes) if p.returncode), 0)
            lines = (Path(folder) / f"log-{rank}").read_text(errors="replace").strip().splitlines()
            return [], f"{why}: {lines[-1] if lines else 'no output'}"
        return [json.loads((Path(folder) / str(rank)).read_text()) for rank in range(world)], ""


def _wait(processes: list[subprocess.Popen[bytes]]) -> str:
    """Wait for all; end the others if one fails or time is out. Return the reason, empty if all succeeded."""
    end = time.monotonic() + SECONDS
    try:
        while any(process.poll() is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.returncode]
            if failed or time.monotonic() > end:
                return f"rank {failed[0]} failed" if failed else f"not done after {SECONDS:.0f} s"
            time.sleep(0.05)
        failed = [rank for rank, process in enumerate(processes) if process.returncode]
        return f"rank {failed[0]} failed" if failed else ""
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run_child(text: str) -> None:
    """What a process of `_run` does."""
    given = json.loads(text)
    if given["dry"]:
        torch.set_num_threads(1)
    place = Place(torch.device("cpu") if given["dry"] else torch.device("cuda", 0), given["dry"])
    found: Any
    if given["mode"] == "collectives":
        found = _collectives(place)
    else:
        found = _states(place, _ranks_of(given["mode"], place), dict(_cases(place)))
    Path(given["out"]).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # what was checked has been: no exit handler of a library may wait


def _ranks_of(mode: str, place: Place) -> Ranks:
    """Return the ranks of this process's world: one, several with a device each, or all on the first one."""
    from gpu.staged import Staged, world_of_one
    from horizon_lm.distributed.start import join

    kinds = {
        "one": lambda: world_of_one(_backend(place)),
        "own": lambda: join(place.device.type),
        "shared": Staged.of_this_process,
    }
    return kinds[mode]()


def _collectives(place: Place) -> dict[str, bool]:
    """Compare collectives of a world of one, on a stream of their own, with those of a rank alone."""
    from gpu.staged import world_of_one

    ranks = world_of_one(_backend(place))
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int16):
        values = torch.arange(8191, device=place.device).mul(37).remainder(997).to(dtype)
        names = ("all_gather", "all_to_all", *(("reduce_scatter",) * (dtype == torch.float32)))
        for name in names:
            out, wanted = torch.empty_like(values), torch.empty_like(values)
            _on_own_stream(place, getattr(ranks, name), values, out)
            getattr(ALONE, name)(values, wanted)
            is_right = same(out.cpu(), wanted.cpu()) and bool(wanted.any())
            found[f"{name}, {str(dtype).removeprefix('torch.')}"] = is_right
    return found


def _on_own_stream(place: Place, collective: Any, values: torch.Tensor, out: torch.Tensor) -> None:
    """Run a collective as the network lane does: on its stream, between events of others."""
    if place.device.type == "cpu":
        collective(values, out)
        return
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    doubled = values.clone()
    for _ in range(50):  # work that the collective must wait for
        doubled.add_(values).sub_(values)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        collective(doubled, out)
    torch.cuda.current_stream().wait_stream(stream)
