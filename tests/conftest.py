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
def no_thaw() -> Iterator[None]:
    """Runs leave the heap as `short_collections` made it."""
    from horizon_lm.machine import heap

    calls = {"collect": lambda: 0, "freeze": lambda: None, "unfreeze": lambda: None}
    limits = {"get_threshold": gc.get_threshold, "set_threshold": gc.set_threshold}
    heap.gc = SimpleNamespace(**calls, **limits)  # type: ignore[assignment]
    yield
    gc.unfreeze()  # some libraries complain of objects that outlive them


@pytest.fixture(scope="module", autouse=True)
def short_collections(no_thaw: None) -> None:
    """Leave out of garbage collection what tests have imported: a full collection took a third of a second,
    and every TRL trainer asks for one."""
    gc.collect()
    gc.freeze()


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
