"""Preview of training data: counts, omissions, lengths, packing, and some of it as text."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from horizon_lm.config.data import IGNORED
from horizon_lm.data.collate import documents_of
from horizon_lm.data.formats import CHAT_FORMATS
from horizon_lm.data.rows import Row, Rows
from horizon_lm.data.streaming import StreamLoader
from horizon_lm.data.tokens import TokenStore
from horizon_lm.io.output import raw_stream
from horizon_lm.text import printable, shown
from horizon_lm.words import count

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from horizon_lm.data.training_data import TrainingData


WARN_ABOVE = 0.05  # share of the documents
_BARS = 12
_BAR_WIDTH = 40
_FIRST_FIVE = "correct them; horizon data preview shows the first five"
_SAMPLE_TOKENS = 400  # longer sequences are cut

Piece = tuple[str, bool, int]  # text, whether it is trained on, number of its document


@dataclass(frozen=True)
class Used:
    """Content of the sequences. documents: documents, or samples, of each dataset, each once; tokens,
    trained: per epoch."""

    documents: list[int]
    tokens: int
    trained: int


@dataclass(frozen=True)
class Remark:
    """A note about data left out or cut. is_warning: more than `WARN_ABOVE` of the documents."""

    text: str
    hint: str
    is_warning: bool

    def __str__(self) -> str:
        return f"{self.text}; {self.hint}"


def used(rows: Rows) -> Used:
    """Count what the sequences hold."""
    store = rows.store
    datasets = store.datasets[np.unique(rows.samples) * store.sides]
    documents = np.bincount(datasets, minlength=len(store.counts.formats))
    trained = rows.num_tokens
    if store.trained is not None:
        ends = rows.starts + rows.segment_lengths
        trained = sum(
            int(np.count_nonzero(store.trained[begin:end]))
            for begin, end in zip(rows.starts.tolist(), ends.tolist(), strict=True)
        )
    return Used(documents.tolist(), rows.num_tokens, trained)


def remarks(rows: Rows, *, with_bad_rows: bool = True) -> list[Remark]:
    """List notes about data that is not in `rows`. with_bad_rows: include unreadable rows, which all rows of
    one store share."""
    left, counts, noun = rows.left, rows.store.counts, rows.store.noun
    all_documents = len(rows.samples) + left.documents
    longest = int(rows.store.trained_lengths.max())
    to_keep = f"set max_length={1 << (longest - 1).bit_length()} to keep them"
    reasons = [
        (
            left.too_long,
            f"longer than max_length={rows.max_length} (the longest: {count(longest, 'token')})",
            f"{to_keep}, or truncation=keep_start to cut them",
        ),
        (left.full, f"their prompt or completion fills max_length={rows.max_length}", to_keep),
        (left.equal, f"their completions are equal within max_length={rows.max_length}", to_keep),
        (
            left.documents - left.too_long - left.full - left.equal,
            f"nothing to train on in their first {rows.max_length} tokens"
            if left.truncated
            else "nothing to train on",
            "raise max_length, or change loss_on" if left.truncated else "change loss_on, or remove them",
        ),
    ]
    found = [
        _remark(number, all_documents, reason, hint, f"{noun}s") for number, reason, hint in reasons if number
    ]
    if left.truncated:
        verb = "was" if left.truncated == 1 else "were"
        text = f"{count(left.truncated, noun)} longer than max_length={rows.max_length} {verb} cut"
        found.append(Remark(text, f"{count(left.tokens, 'token')} are left out", False))
    if counts.num_bad and with_bad_rows:
        all_rows = rows.store.num_samples + counts.num_empty + counts.num_bad
        hint = _FIRST_FIVE
        reason = f"bad rows, the first: {counts.bad_rows[0]}"
        found.append(_remark(counts.num_bad, all_rows, reason, hint, "rows"))
    if counts.num_bad_pictures and with_bad_rows:
        all_rows = rows.store.num_samples + counts.num_bad_pictures
        reason = f"bad pictures, the first: {counts.bad_pictures[0]}"
        found.append(_remark(counts.num_bad_pictures, all_rows, reason, _FIRST_FIVE, "rows"))
    return found


def _remark(count: int, of: int, reason: str, hint: str, what: str) -> Remark:
    share = count / of
    text = f"{count:,} of {of:,} {what} ({share:.1%}) left out: {reason}"
    return Remark(text, hint, share > WARN_ABOVE)


def summary(data: TrainingData) -> dict[str, Any]:
    """Summarise as JSON-ready values. documents, tokens, trained_tokens: trained on, per epoch;
    documents_read: including those held out or left out; of preferences, both are samples. Lengths cover all
    documents. Only of preferences: kind, and chosen and rejected (lengths) or desirable (of all samples);
    only of data with pictures: pictures, see `_of_pictures`."""
    counts, rows = data.store.counts, data.rows
    lengths = data.store.trained_lengths
    inside = used(rows)
    found = remarks(rows)
    return {
        "datasets": [
            {"documents": number, "format": format}
            for number, format in zip(inside.documents, counts.formats, strict=True)
        ],
        "documents": sum(inside.documents),
        "documents_read": data.store.num_samples,
        "tokens": inside.tokens,
        "trained_tokens": inside.trained,
        "empty_texts": counts.num_empty,
        "bad_rows": counts.num_bad,
        "bad_row_messages": counts.bad_rows,
        **_of_pictures(rows),
        **{f"length_{name}": value for name, value in _spread(lengths).items()},
        "max_length": rows.max_length,
        "packing": rows.strategy,
        "sequences": len(rows),
        "fill": rows.fill,
        "padding_without_packing": _padding(lengths, rows.max_length),
        "documents_left_out": rows.left.documents,
        "documents_too_long": rows.left.too_long,
        "documents_cut": rows.left.truncated,
        "tokens_left_out": rows.left.tokens,
        "remarks": [{"text": r.text, "hint": r.hint, "is_warning": r.is_warning} for r in found],
        "eval_sequences": len(data.eval_rows) if data.eval_rows is not None else 0,
        "sequences_per_step": data.loader.rows_per_step,
        "is_stream": isinstance(data.loader, StreamLoader),
        "mask_from": data.encoder.chat.source if CHAT_FORMATS & set(counts.formats) else None,
        **_of_preferences(data.store),
    }


def _spread(lengths: np.ndarray) -> dict[str, float]:
    return {"min": int(lengths.min()), "median": float(np.median(lengths)), "max": int(lengths.max())}


def _of_pictures(rows: Rows) -> dict[str, Any]:
    """Summarise the pictures that are trained on: shown (with repetitions) and distinct, rows (documents with
    some), tokens in all and of one, width and height; and those skipped."""
    pictures, counts = rows.store.pictures, rows.store.counts
    if pictures is None:
        return {}
    shown = rows.shown
    used = np.unique(shown)
    pixels = np.array([pictures.sources[number]["pixels"] for number in used.tolist()]).reshape(-1, 2)
    found: dict[str, Any] = {
        "shown": len(shown),
        "distinct": len(used),
        "documents": int((pictures.of_documents[rows.samples] > 0).sum()),
        "tokens": int(pictures.counts[shown].sum()),
        "skipped": counts.num_bad_pictures,
        "skipped_messages": counts.bad_pictures,
    }
    if len(used):
        spreads = {"tokens_each": pictures.counts[used], "width": pixels[:, 0], "height": pixels[:, 1]}
        found |= {name: _spread(values) for name, values in spreads.items()}
    return {"pictures": found}


def _of_preferences(store: TokenStore) -> dict[str, Any]:
    if store.kind == "pairs":
        sides = zip(("chosen", "rejected"), store.lengths.reshape(-1, 2).T, strict=True)
        return {"kind": store.kind, **{name: _spread(lengths) for name, lengths in sides}}
    if store.labels is None:
        return {}
    return {"kind": store.kind, "desirable": int(store.labels.sum())}


def summary_json(data: TrainingData) -> str:
    return json.dumps(summary(data))


def _padding(lengths: np.ndarray, max_length: int) -> float:
    """Share of padding with one document per sequence, padded to max_length."""
    kept = np.minimum(lengths, max_length)
    return float(1 - kept.sum() / (len(kept) * max_length))


def print_preview(data: TrainingData, samples: int, stream: TextIO) -> None:
    """Print a preview. Trained tokens are green on a terminal, between guillemets elsewhere."""
    from rich.console import Console

    console = Console(file=raw_stream(stream), highlight=False, markup=False, emoji=False, soft_wrap=True)
    found = summary(data)
    for line in _figures(found):
        console.print(shown(line), style="yellow" if line.startswith("warning") else None)
    console.print("\ndocuments by length in tokens")
    for line in histogram(data.store.trained_lengths, data.rows.max_length):
        console.print(line)
    collapsed = data.processor.collapsed if data.rows.store.pictures is not None and data.processor else str
    step = max(1, len(data.rows) // max(1, samples))
    for number in range(0, min(samples * step, len(data.rows)), step):
        row = data.rows.row(number)
        if row.samples is not None:
            _print_sample(row, data.tokenizer, console)
            continue
        trained = int((row.labels[1:] != IGNORED).sum())
        title = f"\nsequence {number}: {len(row.ids)} tokens, {trained} trained on"
        if data.rows.is_separate:
            title += f", {len(row.lengths)} documents" if len(row.lengths) > 1 else ", 1 document"
        if row.shown:
            title += f", {count(len(row.shown), 'picture')}"
        console.print(title, style="bold")
        shortened = row if row.shown else _cut(row)
        console.print(_coloured(shortened, data.tokenizer, collapsed, is_terminal=console.is_terminal))
    if not console.is_terminal and samples:
        console.print("\n«marks tokens that are trained on»")


def _cut(row: Row) -> Row:
    if len(row.ids) <= _SAMPLE_TOKENS:
        return row
    ends = np.minimum(np.cumsum(row.lengths), _SAMPLE_TOKENS)
    lengths = np.diff(np.concatenate([[0], ends]))
    return Row(row.ids[:_SAMPLE_TOKENS], row.labels[:_SAMPLE_TOKENS], lengths[lengths > 0])


def _print_sample(row: Row, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print the first sample of a row: its prompt once, then each completion."""
    assert row.samples is not None
    names = ["completion" if row.label is not None else "chosen", "rejected"]
    documents = documents_of(row)[: 1 if row.label is not None else 2]
    borders = [int(np.argmax(document.labels != IGNORED)) for document in documents]
    sizes = [
        f"{name} {len(document.ids) - border}"
        for name, document, border in zip(names, documents, borders, strict=False)
    ]
    noun = "pair" if row.label is None else f"sample labelled {str(row.label).lower()}"
    title = f"\n{noun}, number {int(row.samples[0])}: prompt {count(borders[0], 'token')}, {', '.join(sizes)}"
    console.print(title, style="bold")
    prompt = Row(documents[0].ids[: borders[0]], documents[0].labels[: borders[0]], np.array([borders[0]]))
    console.print(_coloured(_cut(prompt), tokenizer, str, is_terminal=console.is_terminal))
    for name, document, border in zip(names, documents, borders, strict=False):
        console.print(f"---- {name}", style="dim")
        ids = document.ids[border : border + _SAMPLE_TOKENS].tolist()
        text = printable(str(tokenizer.decode(ids, skip_special_tokens=False)))
        console.print(text if console.is_terminal else f"«{text}»", style="green")


def _coloured(
    row: Row, tokenizer: PreTrainedTokenizerBase, collapsed: Callable[[str], str], *, is_terminal: bool
) -> Text:
    from rich.text import Text

    text, last = Text(), 0
    for found, trained, document in pieces(row, tokenizer):
        piece = printable(collapsed(found))
        if document != last:
            text.append("\n---- next document\n", style="dim")
            last = document
        if is_terminal:
            text.append(piece, style="green" if trained else "dim")
        else:
            text.append(f"«{piece}»" if trained else piece)
    return text


def pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> Iterator[Piece]:
    """Yield the text of a sequence, cut at borders of documents and of the loss mask."""
    document = np.repeat(np.arange(len(row.lengths)), row.lengths)
    trained = row.labels != IGNORED
    trained[np.cumsum(row.lengths) - row.lengths] = False  # the first token of a document is never a target
    changes = np.flatnonzero((np.diff(document) != 0) | (np.diff(trained.astype(int)) != 0)) + 1
    edges = [0, *changes.tolist(), len(row.ids)]
    for begin, end in zip(edges, edges[1:], strict=False):
        text = str(tokenizer.decode(row.ids[begin:end].tolist(), skip_special_tokens=False))
        yield text, bool(trained[begin]), int(document[begin])


def _figures(found: dict[str, Any]) -> Iterator[str]:
    if found["is_stream"]:
        yield "a stream: figures for its first window"
    noun = {"pairs": "pair", "labelled": "sample"}.get(found.get("kind", ""), "document")
    for number, dataset in enumerate(found["datasets"], start=1):
        yield f"dataset {number}    {count(dataset['documents'], noun)}, format {dataset['format']}"
    share = found["trained_tokens"] / found["tokens"]
    yield f"tokens       {found['tokens']:,}, {found['trained_tokens']:,} of them trained on ({share:.1%})"
    if found["mask_from"]:
        yield f"mask         by {found['mask_from']}"
    if "desirable" in found:
        read = count(found["documents_read"], "sample")
        yield f"labels       {found['desirable']:,} of {read} read are true"
    yield from _picture_figures(found.get("pictures"))
    spreads = {"lengths": {name: found[f"length_{name}"] for name in ("min", "median", "max")}}
    spreads |= {side: found[side] for side in ("chosen", "rejected") if side in found}
    for name, spread in spreads.items():
        upper = f"{count(spread['max'], 'token')}, half of them up to {spread['median']:,.0f}"
        yield f"{name:<12} {spread['min']:,} to {upper}"
    yield (
        f"sequences    {found['sequences']:,} of {'2 x ' if noun == 'pair' else ''}"
        f"{count(found['max_length'], 'token')} ({found['packing']}), "
        f"{found['fill']:.1%} full; one document each would be {found['padding_without_packing']:.1%} padding"
    )
    steps = -(-found["sequences"] // found["sequences_per_step"])
    if not found["is_stream"]:
        yield f"an epoch     {count(steps, 'step')} of {count(found['sequences_per_step'], 'sequence')}"
    if found["eval_sequences"]:
        yield f"evaluation   {count(found['eval_sequences'], 'sequence')}"
    if not found["remarks"]:
        yield "left out     nothing"
    if found["empty_texts"]:
        yield f"empty        {found['empty_texts']:,} texts, skipped"
    for remark in found["remarks"]:
        yield f"{'warning' if remark['is_warning'] else 'note':<12} {remark['text']}"
        yield f"{'':<12} {remark['hint']}"
    if found["bad_rows"] > 1:
        yield "bad rows     the first of them:"
        yield from (f"  {message}" for message in found["bad_row_messages"])
    skipped = found.get("pictures", {})
    if skipped.get("skipped", 0) > 1:
        yield "bad pictures the first of them:"
        yield from (f"  {message}" for message in skipped["skipped_messages"])


def _picture_figures(found: dict[str, Any] | None) -> Iterator[str]:
    if found is None:
        return
    line = f"{count(found['shown'], 'picture')} in {count(found['documents'], 'document')}"
    if found["distinct"] != found["shown"]:
        line += f", {found['distinct']:,} different"
    if "width" in found:
        width, height, each = found["width"], found["height"], found["tokens_each"]
        sides = [f"{width[end]:,} x {height[end]:,}" for end in ("min", "max")]
        tokens = [f"{each['min']:,}"] * (each["min"] < each["max"]) + [count(each["max"], "token")]
        line += f", {' to '.join(dict.fromkeys(sides))} pixels; {' to '.join(tokens)} each"
        line += f", {found['tokens']:,} in all"
    yield f"pictures     {line}"


def histogram(lengths: np.ndarray, max_length: int) -> Iterator[str]:
    """Yield a line per range of lengths; the last holds those beyond max_length, if any."""
    top = int(min(lengths.max(), max_length))
    edges = np.unique(np.linspace(0, top, _BARS + 1).round().astype(int))
    counts = [
        int(((lengths > low) & (lengths <= high)).sum()) for low, high in zip(edges, edges[1:], strict=False)
    ]
    labels = [f"{low + 1:,}-{high:,}" for low, high in zip(edges, edges[1:], strict=False)]
    if lengths.max() > max_length:
        counts.append(int((lengths > max_length).sum()))
        labels.append(f"over {max_length:,}")
    width, most = max(map(len, labels)), max(counts)
    for label, number in zip(labels, counts, strict=True):
        bar = "█" * max(1 if number else 0, round(_BAR_WIDTH * number / most))
        yield f"  {label:>{width}}  {bar} {number:,}"
