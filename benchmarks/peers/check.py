"""`python -m benchmarks.peers.check`: what each adapter uses of its package, compared with the package.

A row per peer: checked, absent (its package or checkout is missing), or wrong. Nothing is trained, no GPU is
needed. Exit code 1 if an adapter is wrong.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys

from horizon_lm.bench.protocol import AbsentError

from . import PEERS


def version_of(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package}, a checkout"


PACKAGES = {
    "hf_trainer": "transformers",
    "fsdp2": "torch",
    "deepspeed_zero": "deepspeed",
    "torchao_offload": "torchao",
    "trainstream_wrap": "trainstream",
    "llmq": "pyllmq",
}


def row_of(module: str) -> tuple[str, str]:
    """Return (state, text) of an adapter; the state is checked, absent or wrong."""
    try:
        checked = importlib.import_module(module).check()
    except AbsentError as error:
        return "absent", error.message
    except Exception as error:  # whatever a package raises is what the row must tell
        return "wrong", f"{type(error).__name__}: {error}"
    name = module.rpartition(".")[2]
    return "checked", f"{version_of(PACKAGES.get(name, name))}: {checked}"


def main() -> int:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed looks for a device as it is imported
    modules: dict[str, list[str]] = {}
    for name, peer in PEERS.items():
        if peer.target.startswith("horizon_lm."):
            continue  # plain torch, which every test of the benchmarks runs
        modules.setdefault(peer.target.partition(":")[0], []).append(name)
    rows = [(", ".join(names), *row_of(module)) for module, names in modules.items()]
    for names, state, text in rows:
        print(f"{state:<8}{names}: {text}", flush=True)
    return int(any(state == "wrong" for _, state, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
