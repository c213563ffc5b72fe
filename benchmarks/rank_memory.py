"""Host memory of ranks: the peak of their processes, and the planner's prediction.

As `plan.calibrate.process_memory`, which finds what a process takes before it has a model. Each rank loads
what a run loads, and nothing of the benchmark.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from typing import Any

from horizon_lm.bench.jobs import environment_of
from horizon_lm.bench.ours import train_config
from horizon_lm.bench.protocol import Case
from horizon_lm.config import ModelSettings, model_settings_of
from horizon_lm.machine.profile import Profile, load_profile
from horizon_lm.plan.fleet import Fleet, Network
from horizon_lm.plan.outline import Outline, model_config
from horizon_lm.plan.predict import Sizes, costs_of, prediction_of

from .rank_group import free_port, variables

_RUN = """
import torch, json, sys
from horizon_lm import HostModel
from horizon_lm.config import ModelSettings
from horizon_lm.memory.arena import keep_freed_memory
values, settings, shape, count = json.loads(sys.argv[1])
torch.set_num_threads(1)
model = HostModel.from_config(values, ModelSettings(**settings))
keep_freed_memory()  # as `train` does
for step in range(3):
    torch.manual_seed(step)
    ids = [torch.randint(0, values["vocab_size"], shape) for _ in range(count)]
    model.train_step([dict(input_ids=i, labels=i) for i in ids], lr=1e-5)
lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(int(lines["VmHWM"].split()[0]) * 1024)
"""


def settings_of(case: Case) -> dict[str, Any]:
    """Return the keyword settings of a case that are not the defaults."""
    settings, usual = model_settings_of(train_config(case)).model_dump(), ModelSettings().model_dump()
    return {key: value for key, value in settings.items() if value != usual[key]}


def measured(case: Case, world: int, runs: int = 3) -> list[int]:
    """Return the peak bytes of each rank, medians of several runs, since the heap's layout is random."""
    shape, count = [case.rows, case.length], case.sequences // case.rows
    given = json.dumps([dict(case.model), settings_of(case), shape, count])
    found = []
    for _ in range(runs):
        port = free_port()
        processes = []
        for rank in range(world):
            environment = environment_of(case) | (variables(rank, world, port) if world > 1 else {})
            command = [sys.executable, "-c", _RUN, given]
            processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
        found.append([int(process.communicate()[0].split()[-1]) for process in processes])
    return [int(statistics.median(of_rank)) for of_rank in zip(*found, strict=True)]


def predicted(case: Case, world: int, process_bytes: float, heap_share: float) -> int:
    """Return the host bytes of a rank by the planner."""
    profile: Profile = load_profile("cpu-2core")
    profile = profile.model_copy(update={"process_bytes": process_bytes, "heap_share": heap_share})
    network = Network.of(Fleet(1, world), profile) if world > 1 else None
    sizes = Sizes(case.rows, case.length, case.sequences // case.rows)
    config = train_config(case)
    outline = Outline(model_config(config), config)
    return prediction_of(costs_of(outline, config, profile.of_rank(world), sizes, network)).host_bytes
