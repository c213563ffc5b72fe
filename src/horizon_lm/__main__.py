"""`python -m horizon_lm`: the command `horizon` if its script is not in the PATH."""

import sys

from horizon_lm.cli import main

if __name__ == "__main__":
    sys.exit(main(prog_name="python -m horizon_lm"))
