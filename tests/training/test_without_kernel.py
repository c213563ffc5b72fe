"""Without the compiled kernel a run trains to the same bits, and says once that it is slower."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import rank_runs
from horizon_lm.optim import kernel
from horizon_lm.plan import doctor
from horizon_lm.training.train import train
from optimizer_runs import needs_kernel
from optimizer_runs import no_library as no_library
from rank_runs import Ended, lines_of, write_settings
from small_runs import settings, tensors_of, write_text

SLOWER = "no C++ update kernel"

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


def package_without_kernel(folder: Path) -> str:
    """Copy the package as a wheel that was built without a compiler holds it."""
    source = Path(kernel.__file__).parents[1]
    shutil.copytree(source, folder / "horizon_lm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return str(folder)


def ranks(world: int, text: Path, run: Path, **variables: str) -> Ended:
    cut = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    config = settings(text, run, max_steps=3, save_steps=3, **cut)
    ended = rank_runs.train(world, write_settings(config, run.with_suffix(".yaml")), **variables).wait()
    assert ended.codes == [0] * world, ended.said()
    return ended


def test_a_run_says_so_first_and_keeps_it(
    no_library: None, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each run of a process, in its output and in metrics.jsonl; the log does not repeat it."""
    for name in ("one", "two"):
        train(settings(text, tmp_path / name, max_steps=2))
        said = capfd.readouterr()
        lines = (said.out + said.err).splitlines()
        found = [i for i, line in enumerate(lines) if SLOWER in line]
        assert len(found) == 1 and lines[found[0]].startswith("warning: "), lines
        assert found[0] < next(i for i, line in enumerate(lines) if line.startswith("step 1/"))
        assert kernel.way_to_build() in lines[found[0]]
        notes = lines_of(tmp_path / name, "start")[0]["notes"]
        assert sum(SLOWER in note for note in notes) == 1


@needs_kernel
def test_a_run_with_the_kernel_says_nothing(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(settings(text, tmp_path / "run", max_steps=2))
    said = capfd.readouterr()
    assert "step 2/2" in said.out and SLOWER not in said.out + said.err
    assert not any(SLOWER in note for note in lines_of(tmp_path / "run", "start")[0]["notes"])


@needs_kernel
def test_two_ranks_have_the_bits_of_the_kernel_and_one_of_them_speaks(text: Path, tmp_path: Path) -> None:
    slow = ranks(2, text, tmp_path / "slow", PYTHONPATH=package_without_kernel(tmp_path / "package"))
    fast = ranks(2, text, tmp_path / "fast")
    assert slow.said().count(SLOWER) == 1 and SLOWER in slow.outputs[0], slow.said()
    assert SLOWER not in fast.said()
    left = [saved(tmp_path / name / "checkpoint-3") for name in ("slow", "fast")]
    assert left[0] == left[1]


def saved(checkpoint: Path) -> dict[str, bytes]:
    """Return the tensors of a checkpoint; each rank has a folder of its own."""
    folders = sorted(checkpoint.glob("rank-*"))
    assert len(folders) == 2
    return {f"{folder.name}/{name}": data for folder in folders for name, data in tensors_of(folder).items()}


def test_doctor_says_so_with_the_way_out(no_library: None) -> None:
    found = next(finding for finding in doctor._processor() if finding.what == "update kernel")
    assert found.status == doctor.WARN and SLOWER in found.found and found.fix == kernel.way_to_build()
    assert found.fix not in found.found


@needs_kernel
def test_doctor_passes_the_kernel() -> None:
    found = next(finding for finding in doctor._processor() if finding.what == "update kernel")
    assert found.status == doctor.PASS and found.found.startswith("C++ (") and not found.fix
