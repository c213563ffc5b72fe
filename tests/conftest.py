"""What all tests share."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from rank_pool import four_ranks, two_ranks  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tokens that tests keep lie in a place of their own, and go with it. What plans find out about models is
    kept there as the command keeps it: many tests train the same few models."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    from horizon_lm import plan

    plan.models_are_stock = True


@pytest.fixture(scope="session", autouse=True)
def heard_interrupts() -> None:
    """Ctrl-C is tested also where a shell that starts tests in the background has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def quick_to_freeze() -> None:
    """Runs freeze Python's heap without a look through it: it holds all that the tests have imported, and the
    look takes as long as ten of their steps."""
    from horizon_lm.machine import heap

    heap.gc = SimpleNamespace(collect=lambda: 0, freeze=gc.freeze, unfreeze=gc.unfreeze)  # type: ignore[assignment]


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The models of tests are so small that more threads only wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def no_samples() -> Iterator[None]:
    """Runs end without writing a text, for which the model would be loaded once more."""
    from horizon_lm.training import sample

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "reason_to_skip", lambda *_: "tests")
        yield
