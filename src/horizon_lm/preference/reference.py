"""Log-probabilities of all samples by the reference, from one streamed pass before the first step.

They are kept in the folder of the token cache under a key of all that changes them, and go along in each
checkpoint, so that a resumed run needs neither the pass nor the reference.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load, save

from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.config.adapters import AdapterSettings
from horizon_lm.data.collate import collate
from horizon_lm.data.rows import Rows
from horizon_lm.host_model import HostModel
from horizon_lm.memory.whole import Whole
from horizon_lm.micro_batches import MicroBatch
from horizon_lm.model.adapters import base_name
from horizon_lm.preference.documents import sums, with_places
from horizon_lm.preference.kept import Kept
from horizon_lm.preference.method import kl_batch
from horizon_lm.words import count

_FORMAT = 1  # increment when the same inputs give other values
TOGETHER = 16  # micro-batches per visit of a layer, as in evaluation
_SECONDS = 30.0  # between two lines about a long pass

Say = Callable[[str], None]


def reference_settings(settings: ModelSettings) -> ModelSettings:
    """Settings of a model that is not trained and may have other layers, beside one that is. It is stored
    whole, without adapter and unpacked."""
    of_layers = {"activations": "recompute", "boundaries": "device", "resident": 0, "rounds": 1}
    of_adapters = {key: AdapterSettings.model_fields[key].default for key in AdapterSettings.__annotations__}
    return settings.replace(**of_adapters, lr_factors={}, model_revision=None, **of_layers)


@dataclass(frozen=True)
class Reference:
    """Values of the parts of a run's data, "train" and "eval": fp32 [samples of the store, 2], of a pair's
    chosen and rejected documents, or of a labelled sample and its KL document. NaN where a sample is in no
    row. made_of: fingerprint of each part's rows."""

    values: dict[str, torch.Tensor] = field(default_factory=dict)
    made_of: dict[str, str] = field(default_factory=dict)

    def has(self, part: str, rows: Rows) -> bool:
        return self.made_of.get(part) == rows.fingerprint

    def add(self, part: str, rows: Rows, values: torch.Tensor) -> None:
        self.values[part], self.made_of[part] = values, rows.fingerprint

    def to_bytes(self) -> bytes:
        """Return the content of a safetensors file."""
        # One entry: safetensors writes several in any order.
        return save(self.values, metadata={"made_of": json.dumps(self.made_of, sort_keys=True)})

    @classmethod
    def from_bytes(cls, content: bytes) -> Reference:
        """Raises ValueError for content that is no such file."""
        try:
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            return cls(load(content), dict(json.loads(header["__metadata__"]["made_of"])))
        except Exception as error:
            raise ValueError(f"no reference log-probabilities: {error}") from error


def weights_hash(model: HostModel, *, adapter: bool = True) -> str:
    """Hash what the model computes with: its parameters in the precision of their computation, buffers and
    configuration. The same on any number of ranks.

    adapter: False for the base of a model with an adapter, which has the hash of the same model without one,
    unless parts of it are computed in fp32 in a bf16 model.
    """
    digest = xxhash.xxh3_128()
    model.flush()
    store, ranks = model.store, model.ranks
    whole = Whole(store, ranks, everywhere=False)
    off = None if adapter else model.skeleton.adapter
    for name in store.names():
        if off is None or not off.is_part(name):
            digest.update((name if off is None else base_name(name)).encode())
            digest.update(_bytes(whole.weight(name)))
    for unit, layout in enumerate(store.units):
        residual = whole.wide_residual(unit)
        if off is None:
            digest.update(_bytes(residual))
            continue
        for parameter in layout.parameters:
            if parameter.compute_dtype != store.dtype and not off.is_part(parameter.name):
                digest.update(_bytes(layout.residual_view(residual, parameter)))
    for name, buffer in model.skeleton.model.named_buffers():
        if not buffer.is_meta:
            digest.update((name if off is None else base_name(name)).encode())
            digest.update(_bytes(buffer))
    unimportant = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
    values = {k: v for k, v in model.config.to_dict().items() if k not in unimportant}
    digest.update(json.dumps(values, sort_keys=True, default=str).encode())
    return str(ranks.from_first(str(digest.hexdigest())))


def _bytes(tensor: torch.Tensor) -> memoryview | bytes:
    if tensor.is_meta:  # another rank has the values, and hashes them
        return b""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def key_of(rows: Rows, config: TrainConfig, weights: str) -> str:
    """Return the name under which values are kept: a hash of all that changes them."""
    parts = {
        "format": _FORMAT,
        "rows": rows.fingerprint,
        "weights": weights,
        "dtype": config.dtype,
        "attention": config.attn_implementation,
        "kernels": config.kernels,
        "ld_alpha": config.ld_alpha,
    }
    return str(xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode()))


@dataclass(frozen=True)
class Pass:
    """How the reference runs over data. cache: folder of the token cache, or None. pad_id: of a batch.
    adapter: whether the model runs with its adapter; without it the base is the reference."""

    config: TrainConfig
    cache: Path | None
    pad_id: int
    say: Say
    warn: Say
    adapter: bool = True

    def over(self, model: HostModel, parts: Mapping[str, Rows], into: Reference) -> None:
        """Add the values of `parts` to `into`, kept ones first. Of several ranks rank 0 keeps them."""
        weights, ranks = weights_hash(model, adapter=self.adapter), model.ranks
        for part, rows in parts.items():
            folder = None
            if self.cache is not None and ranks.is_first:
                folder = self.cache / f"reference-{key_of(rows, self.config, weights)}"
            kept = Kept(folder, self.warn)
            values = np.full((rows.store.num_samples, 2), np.nan, np.float32)
            kept.load(values)
            if ranks.from_first(bool((~np.isnan(values)).any())):
                values = ranks.gather_all(torch.from_numpy(values))[0].numpy()
            self._fill(model, rows, values, kept, "" if part == "train" else " of evaluation data")
            into.add(part, rows, torch.from_numpy(values))

    def _fill(self, model: HostModel, rows: Rows, values: np.ndarray, kept: Kept, of: str) -> None:
        """Compute what is missing in values [samples, 2]."""
        todo = _missing(rows, values)
        samples = len(np.unique(rows.samples))
        if not len(todo):
            self.say(f"reference log-probabilities{of}: {count(samples, 'sample')}, from the cache")
            return
        self.say(
            f"reference log-probabilities{of}: {count(len(todo), 'sequence')} of {len(rows):,} to compute"
        )
        batches = self._batches(rows, todo)
        started = said = time.monotonic()
        done = 0
        while group := list(islice(batches, TOGETHER)):
            numbers = _evaluate(model, group, self.config.ld_alpha, values, self.adapter)
            kept.add(numbers, values)
            done += len(numbers)
            if time.monotonic() - said >= _SECONDS:
                said = time.monotonic()
                self.say(f"reference log-probabilities{of}: {done:,} of {count(samples, 'sample')}")
        kept.write(values)
        seconds = time.monotonic() - started
        self.say(f"reference log-probabilities{of}: {count(done, 'sample')} in {seconds:.1f} s")

    def _batches(self, rows: Rows, todo: np.ndarray) -> Iterator[MicroBatch]:
        """Yield micro-batches of rows: of about one length if they are padded, the longest first, so that a
        pass too large for the memory fails at once."""
        size = self.config.precompute_ref_batch_size
        most = self.config.per_device_train_batch_size if size is None else size
        padded = rows.strategy == "none"
        longest = _longest(rows) if padded else rows.lengths
        todo = todo[np.argsort(-longest[todo], kind="stable")]
        begin = 0
        while begin < len(todo):
            together = most
            if padded and size is None:
                together = max(1, most * rows.max_length // int(longest[todo[begin]]))
            numbers = todo[begin : begin + together]
            yield collate([rows.row(number) for number in numbers], rows.strategy, self.pad_id)[0]
            begin += together


def _longest(rows: Rows) -> np.ndarray:
    """Tokens of the longest document of each row of one sample."""
    found: np.ndarray = rows.segment_lengths.reshape(-1, rows.sides).max(axis=1)
    if rows.mismatched is not None:
        found = np.maximum(found, rows.mismatched.lengths)
    return found


def _missing(rows: Rows, values: np.ndarray) -> np.ndarray:
    """Return the rows that hold a sample without a value; of several with the same one the first."""
    has_value = ~np.isnan(values[:, 0])
    per_row = np.diff(rows.offsets) // rows.sides
    row_of = np.repeat(np.arange(len(rows)), per_row)
    _, first = np.unique(rows.samples, return_index=True)
    lacking = first[~has_value[rows.samples[first]]]
    return np.unique(row_of[lacking])


def _evaluate(
    model: HostModel, group: list[MicroBatch], ld_alpha: float | None, values: np.ndarray, adapter: bool
) -> np.ndarray:
    """Fill in the values of the samples of micro-batches; return their numbers."""
    others = [kl_batch(batch) for batch in group if "KL_input_ids" in batch]
    for batches, side in ((group, 0), (others, 1)):
        if not batches:
            continue
        plain = [{k: v for k, v in batch.items() if not k.startswith("KL_")} for batch in batches]
        out = model.evaluate(plain, return_log_probs=True, ignore_extra=True, adapter=adapter)
        assert out.log_probs is not None
        for log_probs, batch in zip(out.log_probs, plain, strict=True):
            found = sums(log_probs, with_places(batch), ld_alpha).numpy()
            numbers = batch["samples"].numpy()
            if len(found) == len(numbers):
                values[numbers, side] = found
            else:
                values[numbers] = found.reshape(2, -1).T
    numbers = np.unique(np.concatenate([batch["samples"].numpy() for batch in group]))
    if not others and len(group[0]["documents"]) == len(group[0]["samples"]):
        values[numbers, 1] = 0.0  # there is no KL term
    return numbers
