"""bitsandbytes is imported without the code that it would download."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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

FIRST = """
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes":
            print("kernels" in sys.modules and sys.modules["kernels"] is None, flush=True)
            os._exit(0)
sys.meta_path.insert(0, Finder())
"""
USES = {
    "the learning rate": """
from horizon_lm.config import TrainConfig
from horizon_lm.optim.curves import learning_rates
learning_rates(TrainConfig(model_name_or_path="m", datasets="d"), 9)
""",
    "transformers itself": "from transformers import get_scheduler",
}


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


@pytest.mark.parametrize("use", USES)
def test_a_library_that_imports_peft_finds_it_loaded(use: str, tmp_path: Path) -> None:
    """The last case is the control: by itself, transformers lets bitsandbytes see the kernels."""
    pytest.importorskip("bitsandbytes")
    assert run(tmp_path, FIRST + USES[use])[0] == str(use != "transformers itself")
