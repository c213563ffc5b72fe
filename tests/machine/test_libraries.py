"""bitsandbytes is imported without the code that it would download."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import horizon_lm

FAKE = """
import logging
try:
    import kernels
    downloads = True
except ImportError:
    downloads = False
    logging.getLogger("bitsandbytes.backends").warning("no kernels")
"""
OURS = """
from horizon_lm.machine.libraries import load_bitsandbytes
found = load_bitsandbytes()
assert load_bitsandbytes() is found
import kernels
print(found.downloads, kernels.here)
"""


def run(folder: Path, code: str) -> tuple[str, str]:
    source = Path(horizon_lm.__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(source)])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_bitsandbytes_never_sees_kernels_of_the_hub(tmp_path: Path) -> None:
    """Nor does it warn that they are missing; they can be imported afterwards."""
    (tmp_path / "bitsandbytes").mkdir()
    (tmp_path / "bitsandbytes" / "__init__.py").write_text(FAKE)
    (tmp_path / "kernels.py").write_text("here = True\n")
    assert run(tmp_path, OURS) == ("False True", "")
    assert (
        run(tmp_path, "import bitsandbytes; print(bitsandbytes.downloads)")[0] == "True"
    )  # by itself it does
