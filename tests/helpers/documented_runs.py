"""Run the commands and code of a page of the documentation in a folder of its own."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from data_helpers import examples, write_rows
from documented import Block, alternatives, rows
from documented_world import ELSEWHERE, FILLED_IN, ROOT, SMALLER, STAND_INS, World, names
from horizon_lm import cli
from horizon_lm.cli.run import split_arguments
from horizon_lm.config import load_config

MODEL = "PATH"  # the folder of the model that commands and code name


def is_elsewhere(command: str) -> bool:
    return any(re.fullmatch(pattern, plain(command)) for pattern in ELSEWHERE)


def plain(command: str) -> str:
    """The command without its comment."""
    return re.split(r"\s+#", command)[0].strip()


def is_run(word: str) -> bool:
    return re.fullmatch(r"runs/[\w-]+", word) is not None


class Page:
    """Runs the blocks of one page in order; `patch` makes the folder the current one."""

    def __init__(self, page: str, folder: Path, world: World, patch: pytest.MonkeyPatch) -> None:
        self.world, self.patch, self.page = world, patch, page
        self.last_run, self.steps = "runs/finished", 2
        self.ran: dict[str, float] = {}  # seconds
        world.fill(folder, page)
        patch.chdir(folder)
        self.names: dict[str, Any] | None = None

    def run(self, block: Block) -> None:
        """Raises AssertionError, or what the code raised, if the block does not work as written."""
        getattr(self, f"_{block.kind}")(block)

    def _text(self, block: Block) -> None:
        """Output, or a table: nothing to run."""

    def _rows(self, block: Block) -> None:
        for row in rows(block):
            assert examples(write_rows(Path("shown.jsonl"), [row])), f"{block}: cannot be read"

    def _yaml(self, block: Block) -> None:
        Path("block.yaml").write_text(block.text)
        given = set(re.findall(r"^(\w+):", block.text, re.M))
        needed = {"model_name_or_path": MODEL, "datasets": "chats.jsonl"}
        load_config("block.yaml", [f"{key}={value}" for key, value in needed.items() if key not in given])

    def _diff(self, block: Block) -> None:
        """Run the new code; of an excerpt, check that it is in the file that the page names above it."""
        lines = block.text.splitlines()
        new = [line[1:] for line in lines if line[:1] in "+ "]
        if "..." not in lines:
            return self._exec("\n".join(new), str(block))
        file = (ROOT / re.findall(r"`([\w/.-]+\.py)`", block.before)[-1]).read_text().splitlines()
        assert all(line in file for line in new), f"{block}: not in the file"
        assert not any(line[1:] in file for line in lines if line.startswith("-")), (
            f"{block}: still in the file"
        )

    def _python(self, block: Block) -> None:
        self._exec(block.text, str(block))

    def _exec(self, code: str, name: str) -> None:
        if self.names is None:
            self.names = names(self.world, self.page)
        for pattern, value in FILLED_IN:
            code = re.sub(pattern, value, code)
        exec(compile(self._stand_in(code), name, "exec"), self.names)

    def _command(self, block: Block) -> None:
        if is_elsewhere(block.text):
            return
        for command in alternatives(plain(block.text)):
            self._call(shlex.split(self._stand_in(command)), str(block))

    def _call(self, words: list[str], where: str) -> None:
        assert words[0] == "horizon", f"{where}: neither run nor listed in ELSEWHERE"
        if words[1] == "init":  # which replaces no file
            Path(words[words.index("-o") + 1]).unlink(missing_ok=True)
        if words[1] == "doctor":  # other tests plan without the profile that it keeps
            self.patch.setenv("XDG_CACHE_HOME", str(self.world.folder / "cache"))
        if words[1] == "export":
            shutil.rmtree("OUT", ignore_errors=True)
        words = [self.last_run if is_run(word) and not Path(word).exists() else word for word in words]
        words = self._smaller(words)
        self.patch.setattr("sys.stdin", io.StringIO("Hello\n"))
        began = time.monotonic()
        code = cli.main(words[1:])
        self.ran[f"{where}: {' '.join(words)}"] = time.monotonic() - began
        assert code == 0, f"{where}: exit code {code} of {' '.join(words)}"
        if words[1] == "train" and "--dry-run" not in words and "--help" not in words:
            file, *settings = [word for word in words[2:] if "=" in word or word.endswith(".yaml")]
            self.last_run = load_config(*split_arguments([file, *settings]))[0].output_dir

    def _smaller(self, words: list[str]) -> list[str]:
        """Add the arguments of SMALLER, in place of options and of max_steps."""
        self.steps += words[1] == "resume"
        more = [
            argument.format(steps=self.steps) if argument.startswith("max_steps") else argument
            for start, arguments in SMALLER.items()
            if words[: len(start.split())] == start.split() and "--help" not in words
            for argument in arguments
        ]
        words = [word for word in words if not word.startswith("max_steps=")]
        for option in [word for word in words if word.startswith("--") and word in more]:
            at = words.index(option)
            del words[at : at + 2]
        given = {word.partition("=")[0] for word in words if "=" in word}
        given |= {"overwrite_output_dir"} if "--resume" in words else set()
        return words + [word for word in more if "=" not in word or word.partition("=")[0] not in given]

    def _stand_in(self, text: str) -> str:
        checkpoints = sorted(Path(self.last_run).glob("checkpoint-*"), key=lambda path: path.stat().st_mtime)
        known = {"run": self.last_run, "model": MODEL, "checkpoint": str(checkpoints[-1])}
        for pattern, value in STAND_INS:
            text = re.sub(pattern, value.format(**known), text)
        return text

    def close(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run_page(page: str, found: list[Block], folder: Path, world: World) -> tuple[Page, str]:
    """Run all blocks; return the page and what its commands printed."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        here = Page(page, folder, world, patch)
        try:
            for block in found:
                here.run(block)
        finally:
            here.close()
    return here, output.getvalue()
