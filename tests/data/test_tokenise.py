"""Tokenising: the same on any number of processes, kept by content and settings, checked when opened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from data_helpers import config, dataset, read, write_rows
from horizon_lm.data import Documents, encode, load_training_data, tokens, train_tokenizer
from horizon_lm.data.encode import Encoder
from horizon_lm.data.tokens import TokenStore
from horizon_lm.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["def return import for while in class the of and"] * 20, 320)


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, chat_template="plain")


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that a few kilobytes are work for several processes."""
    monkeypatch.setattr(tokens, "_BATCH_CHARACTERS", 200)
    monkeypatch.setattr(tokens, "_SMALL_BATCHES", 2)
    return iter(())


def many(folder: Path, count: int = 300) -> Path:
    rows: list[Any] = [
        {"prompt": f"question {n}", "completion": f" answer {n} " * (n % 7 + 1)} for n in range(count)
    ]
    return write_rows(folder / "rows.jsonl", rows)


def arrays(store: TokenStore) -> list[Any]:
    trained = None if store.trained is None else store.trained.tolist()
    return [store.ids.tolist(), trained, store.lengths.tolist(), store.datasets.tolist()]


def run(path: Path, encoder: Encoder, **options: Any) -> tuple[TokenStore, bool]:
    values: dict[str, Any] = {"cache_dir": None, "num_proc": 1, **options}
    return tokens.tokenise(Documents([dataset(path)]), encoder, **values)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("num_proc", [2, 3])
def test_processes_give_the_tokens_of_one(num_proc: int, encoder: Encoder, tmp_path: Path) -> None:
    path = many(tmp_path)
    one, _ = run(path, encoder)
    several, _ = run(path, encoder, num_proc=num_proc)
    assert arrays(several) == arrays(one) and several.fingerprint == one.fingerprint
    assert one.counts.num_documents == 300


@pytest.mark.usefixtures("small_batches")
def test_the_work_is_done_in_processes_and_is_used_from_all(
    encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    seen.mkdir()
    honest = Encoder.encode

    def note(self: Encoder, batch: Any) -> Any:
        (seen / str(os.getpid())).touch()
        return honest(self, batch)

    monkeypatch.setattr(Encoder, "encode", note)
    run(many(tmp_path), encoder, num_proc=2)
    workers = {int(path.name) for path in seen.iterdir()}
    assert len(workers) == 2 and os.getpid() not in workers


@pytest.mark.usefixtures("small_batches")
def test_the_first_bad_row_in_order_is_named_whichever_process_meets_it(
    encoder: Encoder, tmp_path: Path
) -> None:
    path = many(tmp_path)
    rows = path.read_text().splitlines()
    for line in (250, 120, 121):
        rows[line - 1] = '{"prompt": "q", "completion": ""}'
    path.write_text("\n".join(rows))
    for num_proc in (1, 3):
        with pytest.raises(DataError, match=rf"{path}:120: 'completion' is empty"):
            run(path, encoder, num_proc=num_proc)


def test_workers_end_with_a_run_that_is_killed(tmp_path: Path) -> None:
    path = many(tmp_path, 60_000)
    program = f"""
from horizon_lm.data import Documents, train_tokenizer
from horizon_lm.data.encode import Encoder
from horizon_lm.data import tokens
from horizon_lm.config import DatasetConfig
tokens._BATCH_CHARACTERS = 1000
documents = Documents([DatasetConfig(path={str(path)!r})])
tokens.tokenise(documents, Encoder(train_tokenizer([], 257)), cache_dir=None, num_proc=2)
"""
    run = subprocess.Popen([sys.executable, "-c", program])
    try:
        workers: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while len(workers) < 2 and run.poll() is None and time.monotonic() < deadline:
            workers = psutil.Process(run.pid).children()
            time.sleep(0.05)
        assert len(workers) == 2
        time.sleep(0.2)
    finally:
        run.kill()
        run.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_tokens_are_kept_by_content_and_settings(
    tokenizer: Any, encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = str(tmp_path / "cache")
    path = many(tmp_path, 20)
    first, was_cached = run(path, encoder, cache_dir=cache)
    assert not was_cached
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode", None)  # nothing is tokenised again
        again, was_cached = run(path, Encoder(tokenizer, chat_template="plain"), cache_dir=cache)
        moved = tmp_path / "elsewhere.jsonl"
        moved.write_bytes(path.read_bytes())
        os.utime(moved, (0, 0))
        same, moved_cached = run(moved, encoder, cache_dir=cache)
    assert was_cached and moved_cached
    assert arrays(again) == arrays(first) == arrays(same) and again.counts == first.counts

    others = {
        "loss": run(path, Encoder(tokenizer, loss_on="all"), cache_dir=cache)[1],
        "tokenizer": run(path, Encoder(train_tokenizer(["abc"], 300)), cache_dir=cache)[1],
        "template": run(path, Encoder(tokenizer, chat_template="alpaca"), cache_dir=cache)[1],
    }
    path.write_text(path.read_text().replace("answer 3", "answer 4", 1))
    others["content"] = run(path, encoder, cache_dir=cache)[1]
    limited = Documents([dataset(path)], 200)
    others["limit"] = tokens.tokenise(limited, encoder, cache_dir=cache, num_proc=1)[1]
    renamed = Documents([dataset(path, columns={"prompt": "completion", "completion": "prompt"})])
    others["columns"] = tokens.tokenise(renamed, encoder, cache_dir=cache, num_proc=1)[1]
    assert not any(others.values()), others


@pytest.mark.parametrize("name", ["tokens.bin", "trained.bin", "documents.bin", "meta.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damaged_tokens_are_made_again(name: str, damage: str, encoder: Encoder, tmp_path: Path) -> None:
    path, cache = many(tmp_path, 20), tmp_path / "cache"
    first, _ = run(path, encoder, cache_dir=str(cache))
    file = first.folder / name
    expected = arrays(first)
    del first
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(content[:-3])
    else:
        file.unlink()
    again, was_cached = run(path, encoder, cache_dir=str(cache))
    assert not was_cached
    assert arrays(again) == expected
    assert len(list(cache.iterdir())) == 1


def test_a_failed_run_leaves_nothing_in_the_cache(encoder: Encoder, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    with pytest.raises(DataError):
        run(tmp_path / "a.jsonl", encoder, cache_dir=str(cache))
    assert list(cache.iterdir()) == []


def test_what_a_killed_run_left_is_swept_after_a_day(encoder: Encoder, tmp_path: Path) -> None:
    path, cache = many(tmp_path, 5), tmp_path / "cache"
    first, _ = run(path, encoder, cache_dir=str(cache))
    old, young = (cache / f".{first.folder.name}.{name}" for name in ("old_left", "youngest"))
    for folder in (old, young):
        folder.mkdir()
    os.utime(old, (0, 0))
    (first.folder / "tokens.bin").unlink()
    run(path, encoder, cache_dir=str(cache))
    assert young.exists() and not old.exists()


AS_A_WORKER_IS_FORKED = """
import os, signal
fork, forks = os.fork, []
def forked():
    pid = fork()
    forks.append(pid)
    if len(forks) == 2:  # the second worker; Ctrl-C reaches parent and child
        os.kill(os.getpid(), signal.SIGINT)
    return pid
os.fork = forked
"""


@pytest.mark.parametrize("moment", ["", AS_A_WORKER_IS_FORKED], ids=["later", "as a worker is forked"])
def test_ctrl_c_ends_workers_without_a_word(moment: str, encoder: Encoder, tmp_path: Path) -> None:
    path = many(tmp_path, 300_000)
    program = f"""
import sys
from horizon_lm.data import tokens
from horizon_lm.cli import main
tokens._BATCH_CHARACTERS = 1000
print("begun", flush=True){moment}
sys.exit(main(["data", "preview", "datasets={path}", "init_model.model_type=llama", "dataset_num_proc=2",
               "tokenizer_name_or_path={tmp_path / "tokenizer"}", "dataset_cache_dir={tmp_path / "cache"}"]))
"""
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    run = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if not moment:
        deadline = time.monotonic() + 60
        # The second worker is started only when the first is busy as a batch comes.
        while not psutil.Process(run.pid).children() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    try:
        _, errors = run.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):  # nothing of it is left, as a rule
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 130 and "Traceback" not in errors
    assert not list((tmp_path / "cache").iterdir())  # nothing half made


def test_a_cache_that_cannot_be_written_is_one_line(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="tokens cannot be written to") as caught:
        run(many(tmp_path, 3), encoder, cache_dir=str(tmp_path / "file" / "cache"))
    assert "dataset_cache_dir" in (caught.value.hint or "")


def test_without_a_cache_nothing_stays(encoder: Encoder, tmp_path: Path) -> None:
    store, _ = run(many(tmp_path, 3), encoder)
    folder = store.folder
    assert folder.exists()
    del store
    assert not folder.exists()


def test_a_long_text_is_cut_at_a_line_s_end(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces' tokens are those of the lines, and offsets go on through them."""
    text = "def f(x):\n    return x\n" * 40
    whole = encode._tokenised(tokenizer, [text, "short"], with_offsets=True)
    monkeypatch.setattr(encode, "_PIECE_CHARACTERS", 50)
    pieces = encode._tokenised(tokenizer, [text, "short"], with_offsets=True)
    assert tokenizer.decode(pieces[0][0]) == text and pieces[1] == whole[1]
    assert pieces[0][1][0][0] == 0 and pieces[0][1][-1][1] == len(text)
    assert [a for a, _ in pieces[0][1]] == sorted(a for a, _ in pieces[0][1])


def test_text_is_the_tokenizer_s_own_tokens(tokenizer: Any, tmp_path: Path) -> None:
    documents = read("python-stdlib", max_bytes=100_000)
    path = write_rows(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    store, _ = run(path, Encoder(tokenizer))
    expected = [id for text in documents for id in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    assert store.ids.tolist() == expected and store.ids.dtype == np.uint16


def test_a_tokenizer_that_begins_texts_has_its_token_once_per_document(tmp_path: Path) -> None:
    from tokenizers import processors

    begins = train_tokenizer(["some text"], 300)
    begins.add_special_tokens({"bos_token": "<s>"})
    begin = begins.bos_token_id
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begin)]
    )
    rows = [{"text": "some text"}, {"prompt": "some", "completion": " text"}]
    for row in rows:
        store, _ = run(write_rows(tmp_path / "a.jsonl", [row] * 2), Encoder(begins))
        ids = store.ids.tolist()
        assert ids.count(begin) == 2 and ids[0] == begin
        assert ids[ids.index(begins.eos_token_id) + 1] == begin


def test_all_together_from_a_configuration(tmp_path: Path, tokenizer: Any) -> None:
    texts = [{"text": f"def f{n}():\n    return {n}\n"} for n in range(50)]
    path = str(write_rows(tmp_path / "a.jsonl", texts))
    trained = load_training_data(config(datasets=path, train_tokenizer_vocab_size=300))
    assert trained.store.counts.num_documents == 50 and trained.rows.strategy == "wrapped"
    assert int(trained.store.ids.max()) < len(trained.tokenizer) <= 300
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = load_training_data(config(datasets=path, tokenizer_name_or_path=str(tmp_path / "tokenizer")))
    given_one = load_training_data(config(datasets=path), tokenizer)
    assert loaded.rows.fingerprint == given_one.rows.fingerprint and given_one.was_cached
    with pytest.raises(ConfigError, match="no tokenizer given"):
        load_training_data(config(datasets=path))
    cut = load_training_data(config(datasets=path, max_train_bytes=500), tokenizer)
    assert cut.store.counts.num_documents < 50
    held = load_training_data(config(datasets=path, val_size=0.2, packing_strategy="bfd"), tokenizer)
    assert held.eval_rows is not None
    assert held.eval_rows.num_tokens + held.rows.num_tokens == held.store.counts.num_tokens


def test_the_training_loop_gets_what_the_settings_say(tmp_path: Path, tokenizer: Any) -> None:
    chats = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * n}]}
        for n in range(1, 30)
    ]
    path = str(write_rows(tmp_path / "a.jsonl", chats))
    options = {"datasets": path, "chat_template": "plain", "max_length": 48}
    packed = load_training_data(config(**options), tokenizer)
    assert packed.rows.strategy == "bfd" and packed.rows.left.documents > 0  # too long ones are dropped
    assert "position_ids" in next(packed.loader)[0]
    padded = load_training_data(config(**options, packing=False, truncation="keep_start"), tokenizer)
    assert padded.rows.strategy == "none" and padded.rows.left.truncated > 0 == padded.rows.left.documents
    assert "attention_mask" in next(padded.loader)[0]
    streamed = load_training_data(config(**options, streaming=True, max_steps=5), tokenizer)
    assert "position_ids" in next(streamed.loader)[0]
