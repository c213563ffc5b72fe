"""The memory that an export takes, measured in a process of its own, of a checkpoint of several ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from horizon_lm.checkpoint.disk import Disk
from horizon_lm.checkpoint.writer import CheckpointWriter
from horizon_lm.host_model import HostModel
from horizon_lm.memory.shards import Shard
from rank_checkpoints import share, write
from rank_saves import snapshot_of
from threaded_ranks import ThreadedRanks, on_ranks

_MEMORY = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
import torch
torch.set_num_threads(1)
from horizon_lm.checkpoint import disk
from horizon_lm.checkpoint.exported import Form, Merge, export_checkpoint
import transformers.models.llama.modeling_llama, peft
def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
peak, start = 0, anonymous()
write = disk.HashedFile.write
def watched(self, data):
    global peak
    peak = max(peak, anonymous())
    write(self, data)
disk.HashedFile.write = watched
export_checkpoint(Path({source!r}), Path({target!r}), {form})
print(peak - start)
"""


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def save_on_ranks(model: HostModel, run: Path, world: int) -> None:
    """Write a checkpoint of a model of one rank, as `world` ranks that hold shares of it do."""
    run.mkdir()

    def save(ranks: ThreadedRanks) -> None:
        snapshot = snapshot_of(model, share(model.store, Shard(ranks.rank, world)))
        write(CheckpointWriter(run, snapshot, Disk(), ranks=ranks), len(model.store.units))

    on_ranks(world, save)


def measure_export(source: Path, target: Path, form: str) -> tuple[int, int]:
    """(bytes of the exported weights, growth of the process's own memory). form: an expression of `Form`."""
    script = _MEMORY.format(
        path=[str(Path(__file__).parent)], source=str(source), target=str(target), form=form
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    grown, total = int(done.stdout.split()[-1]), sum(value.nbytes for value in contents(target).values())
    print(f"{total / 1e6:.0f} MB exported with {grown / 1e6:.0f} MB of memory")
    return total, grown
