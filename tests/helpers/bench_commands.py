"""Commands for tests of the GPU suite's runner: each does one thing that a real one may do."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path


def main(argv: list[str]) -> int:
    action, *rest = argv
    if action == "sleep":
        time.sleep(float(rest[0]))
    elif action == "kill":
        os.kill(os.getpid(), 9)
    elif action == "fail":
        print("words\nthe reason")
        return 3
    else:
        Path(rest[0]).write_text('{"parts": ["a table"]}')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
