"""Features of the pictures of a run: computed before its first step, each picture once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from horizon_lm.config import TrainConfig
from horizon_lm.data.feature_cache import FeatureCache, Features, FeaturesOf
from horizon_lm.data.picture_table import Pictures
from horizon_lm.data.pictures import LEAVE_OUT
from horizon_lm.data.processor import Processor
from horizon_lm.data.rows import Rows
from horizon_lm.data.training_data import cache_dir
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.host_model import HostModel
from horizon_lm.report.display import clock
from horizon_lm.training.together import Together
from horizon_lm.words import count

_TOGETHER = 32  # pictures per call of the tower, at most
_PIXELS_TOGETHER = 1 << 24  # numbers of their pixels, at most
_TOKENS_TOGETHER = 1 << 24  # of text, searched for placeholders
_SAY_SECONDS = 10.0

Say = Callable[[str], None]


def check_model_sees(model: HostModel, rows: Sequence[Rows | None]) -> None:
    """Raise ConfigError if there are pictures, and the model is one of text alone."""
    if model.skeleton.picture_inputs is None and _with_pictures(rows):
        raise ConfigError(
            f"the data has pictures, and a {model.config.model_type} model is text-only",
            hint=f"choose a vision-language model, or leave the pictures out with {LEAVE_OUT}",
        )


def check_texts(model: HostModel, rows: Sequence[Rows | None]) -> None:
    """Raise DataError if text without any picture has the token that stands for one, which no step takes."""
    inputs = model.skeleton.picture_inputs
    if inputs is None or inputs.placeholder is None:
        return
    for one in rows:
        if one is None or one.store.pictures is not None:
            continue
        for start in range(0, len(one.store.ids), _TOKENS_TOGETHER):
            places = np.flatnonzero(one.store.ids[start : start + _TOKENS_TOGETHER] == inputs.placeholder)
            if len(places):
                document = int(np.searchsorted(one.store.starts, start + places[0], side="right"))
                raise DataError(
                    f"document {document:,} of the data is text without pictures, and has the token that "
                    f"stands for one in {model.config.model_type} (number {inputs.placeholder})",
                    hint="take the token out of the text, or give the row its pictures",
                )


def _with_pictures(rows: Sequence[Rows | None]) -> list[tuple[Rows, Pictures]]:
    return [(one, one.store.pictures) for one in rows if one is not None and one.store.pictures is not None]


def encode_pictures(
    model: HostModel,
    rows: Sequence[Rows | None],
    processor: Processor | None,
    config: TrainConfig,
    together: Together,
    say: Say,
) -> None:
    """Compute the features of all pictures in `rows` that are not cached, so that micro-batches have them.

    All ranks call the model together; one of each node writes. Raises DataError, ConfigError and
    DoesNotFitError.
    """
    together.each("placeholders", lambda: check_texts(model, rows))
    found = _with_pictures(rows)
    if not found:
        return
    together.each("pictures", lambda: check_model_sees(model, rows))
    inputs = model.skeleton.picture_inputs
    assert processor is not None and inputs is not None
    wanted: dict[bytes, tuple[Pictures, int]] = {}
    for one, pictures in found:
        for number in np.unique(one.shown).tolist():
            wanted.setdefault(pictures.keys[number], (pictures, number))
    place = cache_dir(config.dataset_cache_dir)
    key = _key(model, processor)
    cache = together.in_order(
        "features", lambda: FeatureCache(None if place is None else Path(place).expanduser(), key)
    )
    for line in cache.damaged:
        say(f"removed damaged features: {line}")
    missing = together.exchange("features to compute", [k.hex() for k in wanted if k not in cache])
    todo = {k: wanted[k] for k in map(bytes.fromhex, dict.fromkeys(h for own in missing for h in own))}
    if todo:
        _Encoding(model, processor, cache, together, say).run(todo)
    say(
        f"pictures: features of {count(len(wanted), 'picture')}, {len(todo):,} of them computed now"
        + ("" if cache.is_temporary else f", in {cache.folder}")
    )
    for _, pictures in found:
        pictures.features = FeaturesOf(cache, pictures.keys, inputs.per_image)


def _key(model: HostModel, processor: Processor) -> str:
    """Identify what computes features: processor, weights of the vision part, dtype, versions, device."""
    unit = model.skeleton.vision
    assert unit is not None
    digest = xxhash.xxh3_128(processor.key.encode())
    for region in ("weights", "residual"):
        if region == "weights" or model.store.units[unit].wide_numel and model.store.has(region):
            whole = model.store.whole(region, unit, model.ranks, everywhere=True)
            assert whole is not None
            digest.update(whole.cpu().contiguous().view(torch.uint8).numpy().data)
    made_by = [str(model.store.dtype), model.skeleton.trains_projector, model.device.type, torch.__version__]
    values = model.config.to_dict()
    about = {key: value for key, value in values.items() if key not in ("text_config", "_name_or_path")}
    made_by += [model.settings.attn_implementation, sorted(map(str, about.items()))]
    digest.update(repr(made_by).encode())
    return digest.hexdigest()


class _Encoding:
    """Pictures through the processor and the tower, in batches of equal shape."""

    def __init__(
        self,
        model: HostModel,
        processor: Processor,
        cache: FeatureCache,
        together: Together,
        say: Say,
    ) -> None:
        self._model, self._processor, self._cache = model, processor, cache
        self._together, self._say = together, say
        self._writes = cache.is_temporary or together.ranks.local_rank == 0

    def run(self, todo: Mapping[bytes, tuple[Pictures, int]]) -> None:
        started = said = time.monotonic()
        self._say(f"pictures: computing the features of {count(len(todo), 'picture')}")
        total = sum(int(pictures.counts[number]) for pictures, number in todo.values())
        done = tokens = 0
        for keys, batch in self._batches(todo):
            found = _per_picture(self._model.encode_images(_joined(batch)), batch)
            for key, features in zip(keys, found, strict=True):
                pictures, number = todo[key]
                self._together.alike(partial(_check, features, pictures, number))
                tokens += int(pictures.counts[number])
                if self._writes:
                    self._cache.add(key, features)
            if not done:
                size_of = sum(t.nbytes for features in found for t in features.values()) / max(1, tokens)
                self._together.each("disk space", partial(self._cache.check_room, int(size_of * total)))
            done += len(keys)
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                left = (said - started) / done * (len(todo) - done)
                self._say(f"pictures: {done:,} of {len(todo):,} encoded, {clock(left)} left")
        self._together.each("features", self._cache.flush)
        if not self._writes:
            self._cache.refresh()

    def _batches(
        self, todo: Mapping[bytes, tuple[Pictures, int]]
    ) -> Iterator[tuple[list[bytes], list[dict[str, torch.Tensor]]]]:
        keys: list[bytes] = []
        batch: list[dict[str, torch.Tensor]] = []
        for key, (pictures, number) in todo.items():
            own = self._together.each("picture", partial(self._inputs, pictures, number))
            if batch and not _fits(batch, own):
                yield keys, batch
                keys, batch = [], []
            keys.append(key)
            batch.append(own)
        yield keys, batch

    def _inputs(self, pictures: Pictures, number: int) -> dict[str, torch.Tensor]:
        return self._processor.inputs(pictures.load(number))


def _check(features: Features, pictures: Pictures, number: int) -> None:
    """Raise DataError unless there is a feature for each placeholder."""
    found = len(features["order"] if "order" in features else features["features"])
    expected = int(pictures.counts[number])
    if found != expected:
        raise DataError(
            f"the model gives {found:,} features for a picture that the processor writes {expected:,} "
            "placeholders for",
            hint="use the model's own processor, with the patch size of its config.json",
        )


def _fits(batch: Sequence[Mapping[str, torch.Tensor]], own: Mapping[str, torch.Tensor]) -> bool:
    """Tell whether a picture can join a batch: as many inputs, of the same shape, not too many."""
    if len(batch) == _TOGETHER or batch[0].keys() != own.keys():
        return False
    numbers = sum(value.numel() for one in (*batch, own) for value in one.values())
    return numbers <= _PIXELS_TOGETHER and all(
        batch[0][name].shape[1:] == value.shape[1:] for name, value in own.items()
    )


def _joined(batch: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([one[name] for one in batch]) for name in batch[0]}


def _per_picture(found: list[Features], batch: Sequence[Mapping[str, Any]]) -> list[Features]:
    """Join the features of the tiles that a picture was cut into, if the model gives those of each tile."""
    if len(found) == len(batch):
        return found
    tiles = [len(one["pixel_values"]) for one in batch]
    assert len(found) == sum(tiles), (len(found), tiles)
    parts = iter(found)
    joined = []
    for number in tiles:
        own = [next(parts) for _ in range(number)]
        begins = np.cumsum([0, *(len(one.get("order", ())) for one in own)]).tolist()
        merged = {name: torch.cat([one[name] for one in own]) for name in own[0]}
        if "order" in merged:
            merged["order"] = torch.cat([one["order"] + b for one, b in zip(own, begins, strict=False)])
        joined.append(merged)
    return joined
