"""Token cache: all documents tokenised on all cores, written once and memory-mapped.

    tokens.bin    ids of all documents, uint16 or uint32
    trained.bin   one byte per token, whether it is trained on; absent if all are
    documents.bin int64 [documents, 2]: length, number of the dataset
    labels.bin    one byte per labelled sample
    pictures.bin, shown.bin, sources.jsonl, embedded.bin: see `data.picture_table`
    meta.json     counts, size and xxh3 hash of each file, and a hash of meta.json itself; the kind and the
                  documents of a sample, unless samples are documents

The folder is staged and renamed, so it is written atomically; hashes are checked on opening, since a flipped
bit would silently train on another token.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import xxhash

from horizon_lm.config.preference import DataKind
from horizon_lm.data.documents import Documents, Placed
from horizon_lm.data.encode import Encoded, Encoder
from horizon_lm.data.examples import Chat, texts
from horizon_lm.data.mismatched import with_mismatched
from horizon_lm.data.picture_table import Pictures, PictureWriter
from horizon_lm.data.pictures import stamp
from horizon_lm.data.processor import Processor
from horizon_lm.errors import DataError, DoesNotFitError
from horizon_lm.io.files import create, open_file, put_folder, read_text, write_file
from horizon_lm.io.leftovers import OwnedFolder
from horizon_lm.machine.cores import usable_cores

_BATCH_CHARACTERS = 1 << 19  # per task of a worker
_PICTURE_CHARACTERS = 1 << 14  # about as many take as long as a picture
_SMALL_BATCHES = 8  # fewer are done in this process: starting workers takes longer
# Increment when the same samples of preferences give other tokens, masks or documents.
_SAMPLES = 1
_NOUNS = {"documents": "document", "pairs": "pair", "labelled": "sample"}
_META = "meta.json"
_STAGED = ".horizon-tokens-"  # one prefix for all staged folders, so that any training run sweeps them
_EARLIER = re.compile(r"\.[0-9a-f]{32}\.[a-z0-9_]{8}")  # names of staged folders in earlier versions

Result = list[Encoded | DataError]


class Skipped(NamedTuple):
    """Rows skipped for their pictures: how many, the first messages, and the pictures, with size and time of
    each (None for a missing one)."""

    rows: int
    messages: list[str]
    files: Mapping[str, list[int] | None]


@dataclass(frozen=True)
class Counts:
    """Counts of tokenised data. is_text: every document is plain text."""

    num_documents: int
    num_tokens: int
    num_trained: int
    num_empty: int
    num_bad: int
    bad_rows: list[str]
    formats: list[str | None]
    is_text: bool
    num_bad_pictures: int = 0
    bad_pictures: list[str] = field(default_factory=list)


class TokenStore:
    """ids [tokens]; trained [tokens] of bool, or None; lengths, datasets [documents]; fingerprint of all.

    A sample is `sides` adjacent documents: of the kind "pairs" 2, chosen and rejected, each with the prompt;
    of "labelled" 1 or, for the KL term, 2, its own and its prompt with the completion of another sample.
    labels: [samples] of bool, of labelled ones. pictures: those that documents show, if any does.
    """

    def __init__(self, folder: Path, keep_alive: Any = None) -> None:
        """Raises DataError if the folder is damaged. keep_alive: released with this object."""
        self._keep_alive = keep_alive
        meta = json.loads(read_text(folder / _META))
        if meta.pop("hash", None) != _meta_hash(meta):
            raise DataError(f"{folder / _META} is damaged", hint=f"remove {folder}; it will be rebuilt")
        for name, expected in meta["files"].items():
            if _hash(folder / name) != expected:
                raise DataError(f"{folder / name} is damaged", hint=f"remove {folder}; it will be rebuilt")
        self.counts = Counts(**meta["counts"])
        self.kind: DataKind = meta.get("kind", "documents")
        self.sides: int = meta.get("sides", 1)
        self.hashes: dict[str, Any] = meta["files"]
        self.fingerprint = xxhash.xxh3_128(json.dumps(meta["files"], sort_keys=True).encode()).hexdigest()
        self.folder = folder
        self.ids = _mapped(folder / "tokens.bin", np.dtype(meta["dtype"]))
        has_mask = "trained.bin" in meta["files"]
        self.trained = _mapped(folder / "trained.bin", np.dtype(bool)) if has_mask else None
        documents = np.fromfile(folder / "documents.bin", np.int64).reshape(-1, 2)
        self.lengths = documents[:, 0]
        self.datasets = documents[:, 1]
        self.starts = np.concatenate([[0], np.cumsum(self.lengths)])[:-1]
        about = meta.get("pictures")
        self.pictures = None if about is None else Pictures(folder, about, len(self.lengths))
        self._skipped_files: dict[str, list[int] | None] = meta.get("skipped_files", {})
        has_labels = "labels.bin" in meta["files"]
        self.labels = np.fromfile(folder / "labels.bin", bool) if has_labels else None

    @property
    def num_samples(self) -> int:
        return len(self.lengths) // self.sides

    @property
    def trained_lengths(self) -> np.ndarray:
        """Tokens of each document but those of the KL term."""
        return self.lengths[:: self.sides] if self.kind == "labelled" else self.lengths

    @property
    def noun(self) -> str:
        """Word for a sample."""
        return _NOUNS[self.kind]

    def is_current(self) -> bool:
        """Tell whether all pictures are as they were, those of skipped rows included."""
        if any(stamp(path) != then for path, then in self._skipped_files.items()):
            return False
        return self.pictures is None or self.pictures.is_current()

    @cached_property
    def prompt_lengths(self) -> np.ndarray:
        """Tokens before the completion, of each document of a sample."""
        assert self.trained is not None
        return self.lengths - np.add.reduceat(self.trained, self.starts, dtype=np.int64)


def _mapped(path: Path, dtype: np.dtype[Any]) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _meta_hash(meta: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> list[Any]:
    digest = xxhash.xxh3_128()
    size = 0
    try:
        with open_file(path) as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}", hint="check its permissions"
        ) from error
    return [size, digest.hexdigest()]


class TokenWriter:
    """Writer of encoded documents to a folder staged beside `place`, or to a temporary one.

    kind, sides: see `TokenStore`. processor: of data with pictures.
    """

    def __init__(
        self,
        place: Path | None,
        dtype: np.dtype[Any],
        kind: DataKind = "documents",
        sides: int = 1,
        processor: Processor | None = None,
    ) -> None:
        self._place, self._dtype = place, dtype
        self._kind, self._sides = kind, sides
        self._temporary: OwnedFolder
        try:
            if place is None:
                self._temporary = OwnedFolder("horizon-tokens-")
                self._folder = self._temporary.path
            else:
                place.parent.mkdir(parents=True, exist_ok=True)
                self._temporary = OwnedFolder(_STAGED, place.parent, relatives=_EARLIER)
                self._folder = self._temporary.path
        except OSError as error:
            raise DataError(
                f"tokens cannot be written to {place}: {error.strerror or error}",
                hint="set dataset_cache_dir to another folder, or to null",
            ) from error
        self._tokens: BinaryIO = create(self._folder / "tokens.bin")
        self._trained: BinaryIO | None = None
        self._pictures = None if processor is None else PictureWriter(self._folder, processor)
        self._documents: list[tuple[int, int]] = []
        self._labels: list[bool] = []
        self._num_tokens = self._num_trained = 0
        self._is_text = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        for file in (self._tokens, self._trained):
            if file is not None:
                file.close()
        if kind is not None:
            self._temporary.release()

    def add(self, documents: Sequence[Encoded]) -> None:
        """Append documents. Raises DoesNotFitError when the disk is full."""
        try:
            for document in documents:
                self._add(document)
        except OSError as error:
            raise DoesNotFitError(
                f"writing {self._folder} failed: {error.strerror or error}",
                hint="free disk space, or set dataset_cache_dir to a folder on a larger disk",
            ) from error

    def _add(self, document: Encoded) -> None:
        self._tokens.write(np.ascontiguousarray(document.ids).data)
        if document.trained is not None and self._trained is None:
            self._trained = create(self._folder / "trained.bin")
            self._trained.write(b"\x01" * self._num_tokens)
        if self._trained is not None:
            trained = document.trained
            self._trained.write(b"\x01" * len(document.ids) if trained is None else trained.tobytes())
        if document.pictures and self._pictures is not None:
            self._pictures.add(len(self._documents), document.pictures)
        self._documents.append((len(document.ids), document.dataset))
        if document.label is not None:
            self._labels.append(document.label)
        self._num_tokens += len(document.ids)
        self._num_trained += len(document.ids) if document.trained is None else int(document.trained.sum())
        self._is_text &= document.is_text

    def finish(
        self,
        *,
        num_empty: int,
        num_bad: int,
        bad_rows: list[str],
        formats: list[Any],
        skipped: Skipped | None = None,
        is_kept: bool = False,
    ) -> TokenStore:
        """Rename the folder into place (is_kept) and open it, or the one another process put there first.

        skipped: rows skipped for their pictures.
        """
        skipped = skipped or Skipped(0, [], {})
        documents = np.asarray(self._documents, np.int64).reshape(-1, 2)
        write_file(self._folder / "documents.bin", lambda file: file.write(documents.data))
        if self._kind == "labelled":
            write_file(self._folder / "labels.bin", bytes(self._labels))
        for file in (self._tokens, self._trained):
            if file is not None:
                file.close()
        counts = Counts(
            num_documents=len(self._documents),
            num_tokens=self._num_tokens,
            num_trained=self._num_trained,
            num_empty=num_empty,
            num_bad=num_bad,
            bad_rows=bad_rows,
            formats=formats,
            is_text=self._is_text,
            num_bad_pictures=skipped.rows,
            bad_pictures=skipped.messages,
        )
        pictures = None if self._pictures is None else self._pictures.finish()
        hashes = {path.name: _hash(path) for path in sorted(self._folder.glob("*.bin"))}
        meta: dict[str, Any] = {"dtype": self._dtype.name, "counts": asdict(counts), "files": hashes}
        if self._kind != "documents":
            meta |= {"kind": self._kind, "sides": self._sides}
        if pictures is not None:
            meta["pictures"] = pictures
        if skipped.files:
            meta["skipped_files"] = dict(skipped.files)
        meta["hash"] = _meta_hash(meta)
        write_file(self._folder / _META, json.dumps(meta))
        if self._place is None or not is_kept:
            return TokenStore(self._folder, keep_alive=self._temporary)
        self._temporary.disown()
        try:
            put_folder(self._folder, self._place)
        except OSError:  # another process was first
            shutil.rmtree(self._folder, ignore_errors=True)
        return TokenStore(self._place)


def open_cached(place: Path) -> TokenStore | None:
    """Open the tokens of an earlier run; remove damaged ones."""
    if not place.exists():
        return None
    try:
        store = TokenStore(place)
        if store.is_current():
            return store
        shutil.rmtree(place, ignore_errors=True)
        return None
    except (DataError, ValueError, KeyError, TypeError, AttributeError, OSError):
        shutil.rmtree(place, ignore_errors=True)
        return None


def tokenise(
    documents: Documents,
    encoder: Encoder,
    *,
    cache_dir: str | None,
    num_proc: int | None = None,
    kl_block: int = 0,
) -> tuple[TokenStore, bool]:
    """Tokenise all documents; return the tokens, and whether they were cached.

    cache_dir: folder of the cache, keyed by content and settings; None: no cache. Data that changes while it
    is read is not cached. num_proc: worker processes, default one per core; tokens do not depend on it.
    kl_block: if positive, add the documents of the KL term to labelled samples (see `data.mismatched`).
    Raises DataError for the first unusable row, unless such rows are skipped.
    """
    place = kept = None
    content = ""
    kind, sides = _shape(documents, kl_block)
    if cache_dir is not None:
        kept = Path(cache_dir).expanduser()
        content = documents.fingerprint(kept)
        how = "" if kind == "documents" else repr((kind, sides, kl_block, _SAMPLES))
        how += "" if encoder.processor is None else repr(documents.picture_folders)
        place = kept / xxhash.xxh3_128((content + encoder.key() + how).encode()).hexdigest()
        found = open_cached(place)
        if found is not None:
            return found, True
    with TokenWriter(place, encoder.dtype, kind, sides, encoder.processor) as writer:
        num_documents = 0
        usable = _usable(documents, _encoded(documents, encoder, num_proc or usable_cores()))
        for encoded in with_mismatched(usable, kl_block) if kl_block else usable:
            num_documents += len(encoded)
            writer.add(encoded)
        if not num_documents:
            bad = documents.bad_rows + documents.bad_pictures
            reason = f"every row is bad; the first: {bad[0]}" if bad else "it is empty"
            raise DataError(
                f"the data holds no document to train on: {reason}",
                hint="correct the rows, or change format, columns or loss_on",
            )
        store = writer.finish(
            num_empty=documents.num_empty,
            num_bad=documents.num_bad,
            bad_rows=documents.bad_rows,
            formats=documents.formats,
            skipped=Skipped(documents.num_bad_pictures, documents.bad_pictures, documents.skipped_files),
            is_kept=kept is not None and documents.fingerprint(kept) == content,
        )
    return store, False


def _shape(documents: Documents, kl_block: int) -> tuple[DataKind, int]:
    """Return (kind, documents of a sample)."""
    if documents.kind is None:
        next(iter(documents))
    kind: DataKind = documents.kind or "documents"
    return kind, 2 if kind == "pairs" or kl_block else 1


def _usable(documents: Documents, results: Iterable[Result]) -> Iterator[list[Encoded]]:
    """Yield the documents of each batch; skip errors, or raise the first."""
    for result in results:
        usable = []
        for encoded in result:
            if isinstance(encoded, DataError):
                documents.skip(encoded)
            else:
                usable.append(encoded)
        yield usable


def batches(documents: Iterable[Placed], size: int | None = None) -> Iterator[list[Placed]]:
    """Group examples, in order, into lists of about `size` characters."""
    size = size or _BATCH_CHARACTERS
    batch: list[Placed] = []
    characters = 0
    for placed in documents:
        batch.append(placed)
        characters += sum(len(text) for text in texts(placed.example))
        if isinstance(placed.example, Chat):
            characters += _PICTURE_CHARACTERS * len(placed.example.pictures)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encoded(documents: Documents, encoder: Encoder, num_proc: int) -> Iterator[Result]:
    """Yield the result of each batch, in order."""
    todo = batches(documents)
    first = list(islice(todo, _SMALL_BATCHES))
    if num_proc == 1 or len(first) < _SMALL_BATCHES:
        yield from (encoder.encode(batch) for batch in chain(first, todo))
        return
    for batch in first:
        encoder.get_ready(batch)  # once, before the fork
    yield from _in_workers(chain(first, todo), encoder, num_proc)


_worker_encoder: Encoder | None = None


def _start_worker(encoder: Encoder) -> None:
    """Initialise a worker. It has one core, for which the tokenizer's threads would compete."""
    global _worker_encoder
    _worker_encoder = encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End an orphaned worker, which would wait for work indefinitely."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(batch: list[Placed]) -> Result:
    assert _worker_encoder is not None
    return _worker_encoder.encode(batch)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C until a worker is forked: in a new worker it would run the parent's handler, which waits
    indefinitely for workers that are not its children."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield  # Ctrl-C is not handled by Python, or not in this thread
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
    """Encode batches in forked workers, in order.

    Forking needs no `if __name__ == "__main__"` in training scripts, and sends nothing twice. The model is
    not loaded yet, so there is little to fork; workers use neither torch nor a GPU.
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
            "a tokenising worker was killed, probably for lack of memory",
            hint="lower dataset_num_proc, or free memory",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
