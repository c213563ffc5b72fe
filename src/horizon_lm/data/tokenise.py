"""All documents through the encoder, on all cores, into a `TokenStore` that is kept for the next run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path

import xxhash

from horizon_lm.data.documents import Documents, Placed
from horizon_lm.data.encode import Encoded, Encoder
from horizon_lm.data.formats import texts
from horizon_lm.data.tokens import TokenStore, TokenWriter, open_cached
from horizon_lm.errors import DataError
from horizon_lm.machine.cores import usable_cores

_BATCH_CHARACTERS = 1 << 19  # what a worker gets at a time
_SMALL_BATCHES = 8  # no more than this is done here: starting workers takes longer

Result = list[Encoded | DataError]


def tokenise(
    documents: Documents, encoder: Encoder, *, cache_dir: str | None, num_proc: int | None = None
) -> tuple[TokenStore, bool]:
    """The tokens of all documents, and whether an earlier run had made them.

    cache_dir: the place for tokens by content and settings; None: nothing is kept, nor is what changed while
    it was read. num_proc: worker processes, None for as many as there are cores; the tokens are the same.
    Raises DataError for the first row in order that cannot be used, unless such rows are skipped.
    """
    place = kept = None
    content = ""
    if cache_dir is not None:
        kept = Path(cache_dir).expanduser()
        content = documents.fingerprint(kept)
        place = kept / xxhash.xxh3_128((content + encoder.key()).encode()).hexdigest()
        found = open_cached(place)
        if found is not None:
            return found, True
    with TokenWriter(place, encoder.dtype) as writer:
        num_documents = 0
        for result in _encoded(documents, encoder, num_proc or usable_cores()):
            usable = []
            for encoded in result:
                if isinstance(encoded, DataError):
                    documents.skip(encoded)
                else:
                    usable.append(encoded)
            num_documents += len(usable)
            writer.add(usable)
        if not num_documents:
            reason = documents.bad_rows[0] if documents.bad_rows else "it is empty"
            raise DataError("the data holds no document to train on", hint=f"the first bad row: {reason}")
        store = writer.finish(
            num_empty=documents.num_empty,
            num_bad=documents.num_bad,
            bad_rows=documents.bad_rows,
            formats=documents.formats,
            is_kept=kept is not None and documents.fingerprint(kept) == content,
        )
    return store, False


def batches(documents: Iterable[Placed], size: int | None = None) -> Iterator[list[Placed]]:
    """The examples in order, in lists of about `size` characters."""
    size = size or _BATCH_CHARACTERS
    batch: list[Placed] = []
    characters = 0
    for placed in documents:
        batch.append(placed)
        characters += sum(len(text) for text in texts(placed.example))
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(documents: Documents, encoder: Encoder, num_proc: int) -> Iterator[Result]:
    """The result of each batch, in order."""
    todo = batches(documents)
    first = list(islice(todo, _SMALL_BATCHES))
    if num_proc == 1 or len(first) < _SMALL_BATCHES:
        yield from (encoder.encode(batch) for batch in chain(first, todo))
        return
    for batch in first:
        encoder.get_ready(batch)  # once, before the workers are forked
    yield from _in_workers(chain(first, todo), encoder, num_proc)


_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    """A worker has one core; the tokenizer's own threads would only fight over it."""
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer, with one line
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends a worker whose parent was killed, and which would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(batch: list[Placed]) -> Result:
    assert _worker_encoder is not None
    return _worker_encoder.encode(batch)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C comes after the block, in which a worker may be forked. In a worker that has just begun it would
    run what this process does on Ctrl-C, and wait for ever for the workers, which are not its own."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield  # Ctrl-C is not Python's, or does not reach this thread
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


def _in_workers(todo: Iterator[list[Placed]], encoder: Encoder, num_proc: int) -> Iterator[Result]:
    """Forked workers: a script that trains needs no `if __name__ == "__main__"`, and nothing is sent twice.

    The model is not there yet when data is read, so that there is little to fork; workers use neither
    torch nor a GPU. Results come in the order of the batches, however long each takes.
    """
    pool = ProcessPoolExecutor(
        num_proc, multiprocessing.get_context("fork"), initializer=_start_worker, initargs=(encoder,)
    )
    waiting: deque[Future[Result]] = deque()
    try:
        for batch in todo:
            with _interrupts_held():
                waiting.append(pool.submit(_work, batch))
            if len(waiting) > 2 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker that tokenises was killed, most likely for want of memory",
            hint="lower dataset_num_proc, or free memory",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
