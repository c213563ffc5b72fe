"""Pictures of rows: where they are, and reading them.

A picture is a file, or bytes that the dataset holds (columns of `datasets.Image`). Nothing is downloaded.
It is opened as transformers' `load_image` does: turned by its EXIF orientation, converted to RGB.
"""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from horizon_lm.data.readers import Media, kind
from horizon_lm.errors import DataError
from horizon_lm.io import files
from horizon_lm.words import size as in_bytes

if TYPE_CHECKING:
    from PIL.Image import Image

# PIL's names of those that are read. Not EPS above all, for which PIL runs Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO", "JPEG2000", "AVIF")
LARGEST_FILE = 1 << 28  # bytes
LEAVE_OUT = "columns: {images: null}, or {image: null} if that is the column"
SKIP = "correct or remove it, or set on_bad_image: skip"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_LONGEST_PATH = 4096


class BadPictureError(DataError):
    """A picture that cannot be used; `on_bad_image` decides what follows. files: of its row's pictures."""

    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A picture of a row. path: its file. content: its bytes, if the dataset holds them."""

    path: str | None
    content: bytes | None = None

    @property
    def name(self) -> str:
        return self.path if self.path is not None else f"of {in_bytes(len(self.content or b''))}"


@dataclass(frozen=True)
class Opened:
    """A picture in memory. image: RGB, upright. key: hash of its bytes. modified: of its file, in ns."""

    image: Image
    key: bytes
    num_bytes: int
    modified: int


def picture_of(value: Any, folder: Path, place: str) -> Picture:
    """Return the picture that a value of a row stands for: a path, bytes, or an object with either.

    folder: where relative paths start. Raises DataError, also for URLs and base64.
    """
    if isinstance(value, Media):
        value = value.value
    if isinstance(value, (bytes, bytearray)):
        return Picture(None, bytes(value))
    if isinstance(value, Mapping):
        if value.get("bytes") is not None:
            return picture_of(value["bytes"], folder, place)
        value = next((value[key] for key in ("path", "url", "file_name") if value.get(key)), value)
    if not isinstance(value, str) or not value:
        raise DataError(
            f"{place}: a picture is {kind(value)}, expected a path, or an object with bytes or path",
            hint="write the path of its file",
        )
    if value.startswith("data:") or len(value) > _LONGEST_PATH:
        raise DataError(f"{place}: a picture is written as base64 text", hint="save it as a file")
    if _URL.match(value):
        raise DataError(
            f"{place}: the picture {value[:120]!r} is a URL, and nothing is downloaded",
            hint="download the pictures, and set image_dir of this dataset to their folder",
        )
    return Picture(str(folder / Path(value).expanduser()))


def open_picture(picture: Picture, place: str) -> Opened:
    """Read and decode a picture. Raises BadPictureError with its file, `place` and the reason."""
    content, modified = _content(picture, place)
    with _faults(picture, place):
        return Opened(decoded(content), xxhash.xxh3_128(content).digest(), len(content), modified)


def _content(picture: Picture, place: str) -> tuple[bytes, int]:
    if picture.content is not None:
        return picture.content, 0
    assert picture.path is not None
    try:
        with files.open_file(Path(picture.path)) as file:
            content = file.read(LARGEST_FILE + 1)
            modified = os.fstat(file.fileno()).st_mtime_ns
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        raise BadPictureError(
            f"{place}: the picture {picture.path} "
            + ("does not exist" if missing else f"cannot be read: {error.strerror or error}"),
            hint="set image_dir of this dataset to the folder of its pictures" if missing else SKIP,
        ) from error
    if len(content) > LARGEST_FILE:
        raise BadPictureError(
            f"{place}: the picture {picture.path} is larger than {in_bytes(LARGEST_FILE)}", hint=SKIP
        )
    return content, modified


def decoded(content: bytes) -> Image:
    """Decode a picture to upright RGB. Raises what PIL raises, and ValueError for one that is too large."""
    import PIL.Image
    import PIL.ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
        PIL.Image.init()
        formats = [name for name in FORMATS if name in PIL.Image.OPEN]  # some builds lack one
        with PIL.Image.open(io.BytesIO(content), formats=formats) as image:
            most = PIL.Image.MAX_IMAGE_PIXELS
            width, height = image.size
            if most is not None and width * height > most:
                raise ValueError(f"{width} x {height} pixels, and PIL's limit is {most:,}")
            image.load()
            upright = PIL.ImageOps.exif_transpose(image)
            return upright.convert("RGB")


@contextmanager
def _faults(picture: Picture, place: str) -> Iterator[None]:
    """Turn any error of decoding into one line: PIL's formats raise many kinds."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        import PIL

        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        if isinstance(error, PIL.UnidentifiedImageError):
            reason = f"not a picture in one of the formats {', '.join(FORMATS)}"
        elif type(error).__name__ == "DecompressionBombError":
            reason = "too many pixels (a decompression bomb)"
        raise BadPictureError(
            f"{place}: the picture {picture.name} cannot be used: {reason}", hint=SKIP
        ) from error


def folder_of(path: str, image_dir: str | None) -> Path:
    """Return the folder that relative paths of pictures start at: image_dir, or that of the data."""
    if image_dir is not None:
        return Path(image_dir).expanduser().resolve()
    place = Path(path).expanduser()
    parts: list[str] = []
    for part in place.parts:
        if any(mark in part for mark in "*?["):
            return Path(*parts).resolve()
        parts.append(part)
    return (place if place.is_dir() else place.parent).resolve()


def stamp(path: str) -> list[int] | None:
    """Return size and time of a file; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def pictures_of(row: Mapping[str, Any]) -> list[Any]:
    """Return the values in the columns `images` and `image` of a row."""
    found: list[Any] = []
    for name in ("images", "image"):
        value = row.get(name)
        value = value.value if isinstance(value, Media) else value
        if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
            found += value
        elif value not in (None, "", b""):
            found.append(value)
    return found
