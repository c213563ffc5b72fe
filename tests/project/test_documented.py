"""Every command, code block and configuration of README, guides and docs works as written.

`documented.py` finds them, `documented_runs.py` runs them page by page, in order, in a folder of tiny things
that `documented_world.py` lists.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from documented import Block, alternatives, blocks
from documented_runs import is_elsewhere, plain, run_page
from documented_world import ELSEWHERE, ROOT, World

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

# Their commands record or repeat measurements, or are generated; test_shipped_files.py reads them.
NOT_RUN = {"docs/lab.md", "docs/benchmarking.md", "docs/configuration.md"}


def pages() -> dict[str, list[Block]]:
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    named = {str(path.relative_to(ROOT)): path.read_text() for path in paths}
    run = {name: text for name, text in named.items() if name not in NOT_RUN and "/reference/" not in name}
    return {name: found for name, text in run.items() if (found := blocks(name, text))}


PAGES = pages()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_a_page_works_as_written(page: str, world: World, tmp_path: Path) -> None:
    here, _ = run_page(page, PAGES[page], tmp_path, world)
    here_too = [block for block in PAGES[page] if block.kind == "command" and not is_elsewhere(block.text)]
    assert len(here.ran) == sum(len(alternatives(plain(block.text))) for block in here_too)


def test_what_is_run_elsewhere_is_on_some_page() -> None:
    commands = [plain(block.text) for found in PAGES.values() for block in found if block.kind == "command"]
    for pattern in ELSEWHERE:
        assert any(re.fullmatch(pattern, command) for command in commands), pattern


def test_there_are_pages_of_every_kind() -> None:
    kinds = [block.kind for found in PAGES.values() for block in found]
    assert {"command", "python", "yaml", "diff", "rows", "text"} == set(kinds)
    assert "README.md" in PAGES and sum("guides/" in page for page in PAGES) == len(
        list((ROOT / "docs" / "guides").glob("*.md"))
    )
    verbs = {
        block.text.split()[1] for found in PAGES.values() for block in found if block.text[:8] == "horizon "
    }
    assert verbs >= {"train", "data", "init", "chat", "generate", "eval", "resume", "verify", "export"}
    assert verbs >= {"plan", "doctor", "report", "bench"}


# ---- negative controls ----------------------------------------------------------------------

BROKEN = {
    "an option of a command that only soak runs": ("    horizon bench 100m --agianst torch\n", "exit code 2"),
    "an unknown setting": ("    horizon train run.yaml no_such_setting=1\n", "exit code 2"),
    "an unknown option": ("```bash\nhorizon export RUN OUT --mrege\n```\n", "exit code 2"),
    "a run that is not there": ("    horizon verify nowhere/run\n", "exit code"),
    "a program that nobody runs": ("    git clone https://example.org/x\n", "neither run nor listed"),
    "a name that does not exist": ("```python\nhz.HostModel.from_pretraned('x')\n```\n", "from_pretraned"),
    "Python that does not parse": ("    trainer = HorizonSFTTrainer(\n", "never closed"),
    "a key of a configuration": ("```yaml\nadapter: lora\nlora_rang: 8\n```\n", "lora_rang"),
    "a row in no format": ('    {"question": "2 + 2?"}\n', "question"),
    "an excerpt that is not in its file": (
        "`examples/sft_trl.py`:\n\n    -from trl import SFTTrainer\n    +from nowhere import X\n    ...\n",
        "not in the file",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_page_is_found(case: str, world: World, tmp_path: Path) -> None:
    text, message = BROKEN[case]
    with pytest.raises(Exception) as error:
        run_page("docs/broken.md", blocks("docs/broken.md", text), tmp_path, world)
    assert message in str(error.value) + str(getattr(error.value, "hint", ""))


def test_blocks_of_every_form_are_found() -> None:
    text = (
        "# A page\n\n    horizon train run.yaml \\\n        max_steps=3   # all\n    make test\n\n"
        "- A list\n\n      with a paragraph of its own\n\n```python\nx = 1\n```\n\n"
        "    loss 2.31 after step 4\n"
    )
    found = [(block.kind, block.text) for block in blocks("page.md", text)]
    assert found == [
        ("command", "horizon train run.yaml max_steps=3   # all"),
        ("command", "make test"),
        ("python", "x = 1\n"),
        ("text", "loss 2.31 after step 4\n"),
    ]


def test_a_synopsis_is_written_out() -> None:
    assert alternatives("horizon verify RUN|CHECKPOINT") == [
        "horizon verify RUN",
        "horizon verify CHECKPOINT",
    ]
    assert alternatives("horizon resume RUN [key=value ...]") == ["horizon resume RUN"]
    assert alternatives("horizon export RUN OUT [--dtype float32]") == [
        "horizon export RUN OUT --dtype float32"
    ]
    assert alternatives("horizon train x.yaml loss_type=[a,b]") == ["horizon train x.yaml loss_type=[a,b]"]
