"""`make compat`: the package under the oldest transformers it supports, and adapters against their packages.

Environments are made on top of the one that runs this, in build/: `compat` with constraints-oldest.txt, and
`peers` with the packages of peers that install without compiling. Stages, `--only` chooses:

    imports   every module, in both environments
    tests     a choice of the tests, under the oldest transformers (`make test` has the pinned one)
    gpu       the dry runs of the GPU checks and of the GPU suite, on the CPU, in both environments
    train     `horizon train` for a few steps, in both environments
    peers     a row for each peer
    syntax    all files compiled by the Python of the GPU machines, if it is there

Exit code 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = ROOT / "constraints-oldest.txt"
OUT = ROOT / "build" / "compat-out"
# What of each peer installs without compiling, and what its import needs. Without --no-deps, some bring a
# torch of their own.
PEER_PACKAGES = ("torchao==0.18.0", "trainstream==0.4.1", "roundpipe==0.1.1", "deepspeed==0.19.8")
PEER_NEEDS = ("hjson", "py-cpuinfo", "einops", "msgpack")
TESTS = (
    "tests/model",
    "tests/engine/test_gradients.py",
    "tests/engine/test_losses.py",
    "tests/plan/test_plan_zoo.py",
    "tests/host_model/test_host_model.py",
    "tests/data/test_chat.py",
    "tests/data/test_packing.py",
    "tests/checkpoint/test_export.py",
    "tests/training/test_train.py",
    "tests/bench/test_peers.py",
)
IMPORTS = """
import importlib, pkgutil, sys
import accelerate, benchmarks, horizon_lm, huggingface_hub, torch, transformers
for package in (horizon_lm, benchmarks):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(("__main__", "._optimizer")):  # the extension has no module function
            importlib.import_module(module.name)
for module in (torch, transformers, accelerate, huggingface_hub):
    print(module.__name__, module.__version__, end=", ")
print("Python", sys.version.split()[0])
"""
TINY = """
model_type: llama, vocab_size: 512, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64, bos_token_id: 0, eos_token_id: 0
"""


@dataclass(frozen=True)
class Job:
    """A command of a stage and the environment that runs it. ledger: where the GPU suite writes its rows."""

    stage: str
    environment: str
    command: list[str]
    ledger: Path | None = None

    def run(self, environment: dict[str, str]) -> bool:
        """Return whether the command succeeded; the suite's does with failed rows, so they are read."""
        if subprocess.run(self.command, cwd=ROOT, env=environment).returncode:
            return False
        if self.ledger is None:
            return True
        lines = [json.loads(line) for line in self.ledger.read_text("utf-8").splitlines()]
        rows = {row["job"]: row for row in lines}  # the last one of each counts
        failed = {job: row for job, row in rows.items() if row["status"] not in ("done", "absent", "skipped")}
        for job, row in failed.items():
            print(f"  {job}: {row['status']}: {row.get('why')}")
        return bool(rows) and not failed


def make_environment(folder: Path, packages: list[str], *options: str) -> str:
    """Make `folder` an environment on top of this one, with `packages` before its own; return its Python."""
    python = folder / "bin" / "python"
    stamp = folder / ".stamp"
    wanted = "\n".join([sys.executable, *options, *packages])
    if python.exists() and stamp.exists() and stamp.read_text("utf-8") == wanted:
        return str(python)
    venv.create(folder, clear=True, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "lib" / version / "site-packages"
    # addsitedir follows the .pth files there too, so that an editable install is found.
    below = sysconfig.get_path("purelib")
    (site / "_below.pth").write_text(f"import site; site.addsitedir({below!r})\n", "utf-8")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, "--disable-pip-version-check", *options, *packages], cwd=ROOT, check=True)
    stamp.write_text(wanted, "utf-8")
    return str(python)


def make_peers() -> str:
    """Make the peers' environment; one that cannot be installed is left out, and its row says so."""
    folder = ROOT / "build" / "peers"
    python = make_environment(folder, list(PEER_NEEDS), "--no-deps")
    for package in PEER_PACKAGES:
        if (folder / f".{package}").exists():
            continue
        command = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--no-build-isolation", package]
        environment = os.environ | {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            print(f"  {package} does not install: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
        else:
            (folder / f".{package}").touch()
    return python


def train_command(python: str, folder: Path) -> list[str]:
    shape = "{" + " ".join(TINY.split()) + "}"
    command = [python, "-m", "horizon_lm", "train", str(ROOT / "configs" / "quickstart.yaml")]
    command += [f"init_model={shape}", "train_tokenizer_vocab_size=512", "max_train_bytes=200000"]
    return [*command, "max_length=64", "max_steps=3", f"output_dir={folder}"]


def jobs(stages: list[str], workers: str, newer: str) -> Iterator[Job]:
    """Yield the jobs of the stages; environments are made when they are first needed."""
    oldest = make_environment(ROOT / "build" / "compat", ["transformers"], "-c", OLDEST.name)
    both = {"pinned": sys.executable, "oldest": oldest}
    shutil.rmtree(OUT, ignore_errors=True)
    for name, python in both.items():
        if "imports" in stages:
            yield Job("imports", name, [python, "-c", IMPORTS])
        if "train" in stages:
            yield Job("train", name, train_command(python, OUT / f"run-{name}"))
        if "gpu" in stages:
            yield Job("gpu", name, [python, "tests/gpu/check.py", "--dry-run"])
            folder = OUT / f"suite-{name}"
            suite = [python, "-m", "benchmarks", "gpu", "--evidence", "--dry-run", "--out", str(folder)]
            yield Job("gpu", name, suite, folder / "dry-run" / "rows.jsonl")
    if "tests" in stages:
        yield Job("tests", "oldest", [oldest, "-m", "pytest", "-q", "-rs", "-n", workers, *TESTS])
    if "peers" in stages:
        yield Job("peers", "peers", [make_peers(), "-m", "benchmarks.peers.check"])
    if "syntax" in stages:
        yield from _syntax(newer)


def _syntax(newer: str) -> Iterator[Job]:
    """Compile without writing beside the sources; warnings are errors."""
    if shutil.which(newer) is None or subprocess.run([newer, "-c", ""], capture_output=True).returncode:
        print(f"syntax: {newer} does not run; --newer-python names another")
        return
    code = "import pathlib, sys\nfor f in sys.argv[1:]: compile(pathlib.Path(f).read_bytes(), f, 'exec')"
    folders = (ROOT / name for name in ("src", "tests", "benchmarks", "examples"))
    files = [str(file) for folder in folders for file in sorted(folder.rglob("*.py"))]
    yield Job("syntax", newer, [newer, "-W", "error", "-c", code, *files])


STAGES = ("imports", "train", "gpu", "tests", "peers", "syntax")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STAGES, default=list(STAGES), help="all by default")
    parser.add_argument("--workers", default=str(min(8, os.cpu_count() or 2)), help="of the tests")
    parser.add_argument("--newer-python", default="python3.12", help="of the GPU machines")
    options = parser.parse_args(argv)
    paths = [str(ROOT / "src"), str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    environment["XDG_CACHE_HOME"] = str(OUT / "cache")
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    results = []
    for job in jobs(options.only, options.workers, options.newer_python):
        shown = " ".join(Path(word).name if "/" in word else word for word in job.command[1:6])
        print(f"== {job.stage}, {job.environment}: {shown.strip().splitlines()[0][:80]}", flush=True)
        begin = time.perf_counter()
        results.append((job, job.run(environment), time.perf_counter() - begin))
    print("== compat")
    for job, passed, seconds in results:
        print(f"{'passed' if passed else 'FAILED':<8}{job.stage}, {job.environment}: {seconds:.0f} s")
    return int(not all(passed for _, passed, _ in results))


if __name__ == "__main__":
    sys.exit(main())
