"""examples/quickstart.ipynb runs as it is, and what it shows is so; how a run looks in Jupyter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

from sizes import SOAK

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
STEPS = ("max_steps=150,", "max_steps=25,")  # outside soak


def execute(notebook: Any, folder: Path) -> Any:
    client = nbclient.NotebookClient(
        notebook, timeout=280, coalesce_streams=True, resources={"metadata": {"path": str(folder)}}
    )
    client.execute()
    return notebook


def shown(notebook: Any) -> list[str]:
    """Return what each code cell shows as text."""
    return [
        "".join(out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def check_gradients(text: str) -> None:
    """Raise unless all gradients are bitwise equal, and losses to all digits shown."""
    equal, number = re.findall(r"gradients (\d+) of (\d+) bitwise equal", text)[0]
    theirs, ours = re.findall(r"loss +([\d.]+) \(transformers\) +([\d.]+) \(Horizon-LM\)", text)[0]
    assert equal == number and int(number) > 50 and theirs == ours


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    notebook = nbformat.read(NOTEBOOK, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    train = next(cell for cell in notebook.cells if "hz.train(" in cell.source)
    assert STEPS[0] in train.source
    if not SOAK:
        train.source = train.source.replace(*STEPS)
    return execute(notebook, tmp_path_factory.mktemp("notebook"))


@pytest.mark.timeout(900)
def test_the_notebook_shows_what_it_says(executed: Any) -> None:
    cells = shown(executed)
    text = "\n".join(cells)
    streams = [out.name for cell in executed.cells for out in cell.get("outputs", ()) if "name" in out]
    assert set(streams) == {"stdout"}  # nothing in red
    assert "8.03 B parameters" in text and "simulated: not measured here" in text
    check_gradients(text)
    before, after = re.findall(r"held-out loss ([\d.]+) before saving, ([\d.]+) in", text)[0]
    assert abs(float(before) - float(after)) < 2e-4
    losses = [float(loss) for loss in re.findall(r"step \d  loss ([\d.]+)", text)]
    assert len(losses) == 5 and all(loss < 9 for loss in losses)


def test_a_run_is_one_area_and_a_few_lines(executed: Any) -> None:
    train = next(cell for cell in executed.cells if "hz.train(" in cell.source)
    areas = [out for out in train.outputs if out.output_type == "display_data"]
    assert len(areas) == 1
    page, text = areas[0].data["text/html"], areas[0].data["text/plain"]
    steps = re.search(r"max_steps=(\d+)", train.source)[1]  # type: ignore[index]
    assert f"step {steps}/{steps}, epoch" in page and "left" not in page
    first, last = re.findall(r"loss from ([\d.]+) to ([\d.]+)", page)[0]
    assert float(last) < float(first) - 0.3 and f"loss {float(last):.1f}"[:7] in text
    lines = "".join(out.text for out in train.outputs if out.output_type == "stream").splitlines()
    assert len(lines) < 60 and not [line for line in lines if line.startswith("step ")]
    assert "<table>" in train.outputs[-1].data["text/html"]  # the result
    pictures = [
        out
        for cell in executed.cells
        for out in cell.get("outputs", ())
        if "image/png" in out.get("data", {})
    ]
    assert len(pictures) == 1 and pictures[0].metadata["image/png"]["width"] == 768


def test_what_is_committed_shows_the_run_and_nothing_of_the_machine() -> None:
    text = NOTEBOOK.read_text()
    assert not re.findall(r"/(?:home|root|tmp|work|usr|Users)/|/opt/|\.venv/lib|file://", text)
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    check_gradients("\n".join(shown(notebook)))
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    assert set(notebook.metadata) == {"kernelspec", "language_info"} and all(
        not cell.metadata for cell in code
    )
    assert len(text) < 400_000
    links = re.findall(r"\]\(([^)#]+)\)", json.dumps([cell.source for cell in notebook.cells]))
    assert links and all((NOTEBOOK.parent / link).exists() for link in links)


@pytest.mark.parametrize(
    "text",
    [
        "loss 6.1 (transformers)  6.1 (Horizon-LM)\ngradients 56 of 57 bitwise equal",
        "loss 6.1 (transformers)  6.2 (Horizon-LM)\ngradients 57 of 57 bitwise equal",
    ],
)
def test_a_gradient_that_differs_is_found(text: str) -> None:
    with pytest.raises(AssertionError):
        check_gradients(text)


OTHERS = """
import sys
import time
from horizon_lm.report.display import PlainProgress, choose_progress
from horizon_lm.report.notebook import in_notebook
import io
assert in_notebook(sys.stdout) and not in_notebook(io.StringIO())
assert type(choose_progress("auto", io.StringIO())) is PlainProgress
print(type(choose_progress("auto")).__name__, type(choose_progress("plain")).__name__)
"""
BELOW = """
import sys
python = sys.executable
code = "import sys; from horizon_lm.report.display import choose_progress as choose; "
code += "print(sys.stdout.isatty(), type(choose('auto')).__name__)"
!"{python}" -c "{code}"
"""


def test_a_kernel_redraws_and_a_process_that_it_starts_prints_lines(tmp_path: Path) -> None:
    """The process sees a terminal, on which `auto` would move the cursor."""
    notebook = execute(new_notebook(cells=[new_code_cell(OTHERS), new_code_cell(BELOW)]), tmp_path)
    assert [text.split() for text in shown(notebook)] == [
        ["NotebookProgress", "PlainProgress"],
        ["True", "PlainProgress"],
    ]


def test_a_cell_that_fails_is_found(tmp_path: Path) -> None:
    with pytest.raises(CellExecutionError, match="HorizonError|ConfigError"):
        execute(
            new_notebook(cells=[new_code_cell("import horizon_lm as hz\nhz.train(max_steps=1)")]), tmp_path
        )
