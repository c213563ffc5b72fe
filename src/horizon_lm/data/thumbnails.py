"""A sheet of the pictures that a run trains on, as a PNG, for a look at them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from horizon_lm.config.data import IGNORED
from horizon_lm.data.rows import Row, Rows
from horizon_lm.words import count

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerBase

MOST = 24  # pictures on a sheet
_COLUMNS, _SIDE, _MARGIN, _LINE = 6, 160, 12, 13  # pixels
_CHARACTERS = 26  # of a line below a picture
_LINES = 4


def sheet(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> bytes:
    """Draw pictures of sequences spread over the data, each with its size, tokens and trained words."""
    import PIL.Image

    cells = list(_cells(rows, tokenizer))
    height = _SIDE + _LINES * _LINE + 2 * _MARGIN
    columns = min(_COLUMNS, len(cells))
    size = (columns * (_SIDE + 2 * _MARGIN), -(-len(cells) // columns) * height)
    canvas = PIL.Image.new("RGB", size, "white")
    for i, (picture, lines) in enumerate(cells):
        at = (i % columns * (_SIDE + 2 * _MARGIN) + _MARGIN, i // columns * height + _MARGIN)
        _draw(canvas, picture, lines, at)
    file = io.BytesIO()
    canvas.save(file, "PNG")
    return file.getvalue()


def _cells(rows: Rows, tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[Image, list[str]]]:
    """Yield (picture, lines below it) for up to `MOST` pictures."""
    pictures = rows.store.pictures
    assert pictures is not None
    shown = np.flatnonzero(pictures.of_documents[rows.samples])
    step = max(1, len(shown) // MOST)
    left = MOST
    for number in shown[::step].tolist():
        row = rows.row(number)
        words = _words(row, tokenizer)
        for picture in row.shown[:left]:
            source = pictures.sources[picture]
            about = f"{source['pixels'][0]} x {source['pixels'][1]}, {count(source['count'], 'token')}"
            yield pictures.load(picture).image, [about, *_wrapped(words)]
            left -= 1
        if not left:
            return


def _words(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    trained = row.ids[row.labels != IGNORED][: 4 * _CHARACTERS]
    return str(tokenizer.decode(trained.tolist(), skip_special_tokens=True)).strip()


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, _CHARACTERS, max_lines=_LINES - 1, placeholder="...")


def _draw(canvas: Image, picture: Image, lines: list[str], at: tuple[int, int]) -> None:
    import PIL.Image
    import PIL.ImageDraw

    small = picture.copy()
    if max(small.size) < _SIDE:  # small ones in whole steps, so that their pixels stay visible
        scale = max(1, _SIDE // max(small.size))
        small = small.resize((small.width * scale, small.height * scale), PIL.Image.Resampling.NEAREST)
    small.thumbnail((_SIDE, _SIDE))
    left = at[0] + (_SIDE - small.width) // 2
    canvas.paste(small, (left, at[1] + (_SIDE - small.height) // 2))
    pen = PIL.ImageDraw.Draw(canvas)
    for i, line in enumerate(lines):
        known = line.encode("latin-1", "replace").decode("latin-1")  # the built-in font has no more
        pen.text((at[0], at[1] + _SIDE + 4 + i * _LINE), known, fill="black")
