"""A run on preferences: the reference before the first step, the loss of each step, evaluation."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn

from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.checkpoint.reader import read_small
from horizon_lm.config import TrainConfig, model_settings_of
from horizon_lm.data import TrainingData
from horizon_lm.data.collate import in_order
from horizon_lm.data.rows import Rows
from horizon_lm.data.training_data import cache_dir, pad_id
from horizon_lm.distributed.ranks import ALONE, Ranks
from horizon_lm.engine.loss import TokenLoss
from horizon_lm.errors import CheckpointError, ConfigError
from horizon_lm.host_model import HostModel
from horizon_lm.micro_batches import MicroBatch
from horizon_lm.model.loading import grow_vocabulary, load_model_of
from horizon_lm.preference.method import KL, Method, added, means
from horizon_lm.preference.reference import Pass, Reference, Say, reference_settings
from horizon_lm.report.display import Progress
from horizon_lm.report.records import Evaluation
from horizon_lm.training.build import hosted
from horizon_lm.training.resume import Resume, changed_settings
from horizon_lm.training.together import Together
from horizon_lm.words import count

FILE = "reference.safetensors"  # of a checkpoint
_TOGETHER = 16  # micro-batches per visit of a layer in evaluation


@dataclass(frozen=True)
class Preferences:
    """Method and reference of a run. reference: None for a method without one."""

    method: Method
    reference: Reference | None

    def step(
        self, model: HostModel, micro_batches: Sequence[MicroBatch]
    ) -> tuple[list[MicroBatch], TokenLoss]:
        """Return what `train_step` takes for these micro-batches."""
        return self.method.step(model, micro_batches, self._values("train"))

    def _values(self, part: str) -> torch.Tensor | None:
        return None if self.reference is None else self.reference.values[part]

    def evaluate(
        self, model: HostModel, rows: Rows, *, micro_batch_size: int, pad_id: int, step: int = 0
    ) -> Evaluation:
        """Return loss and metrics over all samples of held-out rows, each counted once."""
        started = time.perf_counter()
        reference = self._values("eval")
        kl = self._kl(model, rows, reference, micro_batch_size, pad_id)
        samples = tokens = 0
        sample_loss = nll = nll_tokens = 0.0
        parts = []
        for group in _groups(in_order(rows, micro_batch_size, pad_id)):
            batches = self.method.prepare(group, reference)
            out = model.evaluate(batches, values=self.method.values, ignore_extra=True)
            assert out.values is not None
            found = []
            for values, one in zip(out.values, batches, strict=True):
                terms = self.method.terms(values, one if kl is None else {**one, KL: kl.reshape(1)})
                sample_loss, nll = sample_loss + float(terms.samples), nll + float(terms.nll)
                nll_tokens += self.method.nll_tokens(one)
                found.append({name: float(value) for name, value in terms.metrics.items()})
            parts.append(self.method.counted(found, batches))
            samples += sum(len(one["samples"]) for one in batches)
            tokens += out.num_tokens
        loss = self.method.whole_loss(sample_loss, samples, nll, nll_tokens)
        seconds = time.perf_counter() - started
        return Evaluation(step, loss, None, tokens, seconds, means(added(parts)))

    def _kl(
        self, model: HostModel, rows: Rows, reference: torch.Tensor | None, batch: int, pad: int
    ) -> torch.Tensor | None:
        """Estimate the KL divergence from all KL documents of rows."""
        total, num = torch.zeros(()), 0
        for group in _groups(in_order(rows, batch, pad)):
            batches = self.method.kl_batches(group)
            if not batches:
                return None
            assert reference is not None
            total += self.method.kl_sum(model, batches, reference)
            num += sum(len(one["samples"]) for one in batches)
        return (total / max(1, num)).clamp(min=0)


def _groups(batches: Iterator[MicroBatch]) -> Iterator[list[MicroBatch]]:
    while group := list(islice(batches, _TOGETHER)):
        yield group


def without_dropout(model: HostModel) -> None:
    """Switch dropout off, as TRL does for all its methods: the reference has none either."""
    for module in model.skeleton.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


# The reference.

# On its values, besides the data.
_DECIDING = frozenset({"ref_model_name_or_path", "adapter_name_or_path", "ld_alpha"})


@dataclass
class ReferenceOf:
    """The reference of a run: `before` runs a model of its own, `by` the one to train, whose new adapter is
    switched off."""

    config: TrainConfig
    data: TrainingData
    progress: Progress
    together: Together
    found: Reference

    @classmethod
    def begin(
        cls,
        config: TrainConfig,
        data: TrainingData,
        resume: Resume | None,
        progress: Progress,
        together: Together,
    ) -> ReferenceOf | None:
        """Take what a checkpoint has, unless a changed setting gives other values, or a rank cannot read it.
        None for a method without a reference."""
        if not config.uses_reference:
            return None
        found = Reference()
        for checkpoint in resume.checkpoints if resume is not None else ():
            if _DECIDING & changed_settings(config, checkpoint).keys():
                break
            with suppress(CheckpointError, ValueError, KeyError):
                found = Reference.from_bytes(read_small(checkpoint, FILE))
                break
        if not together.is_alone:
            content = xxhash.xxh3_128_hexdigest(found.to_bytes())
            if len(set(together.exchange("reference of the checkpoint", content))) > 1:
                found = Reference()
        return cls(config, data, progress, together, found)

    @property
    def missing(self) -> dict[str, Rows]:
        parts = {"train": self.data.rows, "eval": self.data.eval_rows}
        return {p: rows for p, rows in parts.items() if rows is not None and not self.found.has(p, rows)}

    def before(self) -> None:
        """Run the reference model, if it is not the one to train, and free it: only one is ever loaded."""
        name = self.config.ref_model_name_or_path
        if name is None or not self.missing:
            return
        self.progress.stage(f"loading the reference {name}")
        ranks = self.together.ranks
        with reference_model(self.config, len(self.data.tokenizer), self.data.rows, ranks) as model:
            self._run(model, adapter=True)

    def by(self, model: HostModel, source: Checkpoint | None) -> Reference:
        """Run the model to train, as it is before the first step. source: the checkpoint that replaces its
        files. Raises CheckpointError if those are needed."""
        if self.missing and source is not None:
            raise CheckpointError(
                f"{source.path} has no reference log-probabilities of this data, and the model that they are "
                "of is gone",
                hint="set model_name_or_path to the folder where the model before training is now",
            )
        if self.missing:
            self._run(model, adapter=not self.config.begins_adapter)
        return self.found

    def _run(self, model: HostModel, *, adapter: bool) -> None:
        passes = pass_of(self.config, pad_id(self.data.tokenizer), self.progress.stage, self.progress.warn)
        replace(passes, adapter=adapter).over(model, self.missing, self.found)


def pass_of(config: TrainConfig, pad: int, say: Say, warn: Say) -> Pass:
    """Return the pass of a reference, kept in the folder of the token cache."""
    folder = cache_dir(config.dataset_cache_dir)
    return Pass(config, None if folder is None else Path(folder).expanduser(), pad, say, warn)


def reference_model(
    config: TrainConfig, num_tokens: int, rows: Rows, ranks: Ranks = ALONE, *, adapter: str | None = None
) -> HostModel:
    """Load ref_model_name_or_path without gradients and moments.

    num_tokens: of the tokenizer. adapter: folder or Hub name of one to add. Raises ConfigError if the model
    lacks a token of `rows`.
    """
    name = config.ref_model_name_or_path
    assert name is not None
    settings = reference_settings(model_settings_of(config)).replace(adapter_name_or_path=adapter)
    return hosted(lambda: _loaded_reference(name, config, num_tokens, rows), settings, ranks)


def _loaded_reference(name: str, config: TrainConfig, num_tokens: int, rows: Rows) -> nn.Module:
    revision = config.model_revision if name == config.model_name_or_path else None
    settings = reference_settings(model_settings_of(config)).replace(model_revision=revision)
    loaded = load_model_of(name, settings)
    if config.new_tokens:
        grow_vocabulary(loaded, num_tokens, config.seed)
    of_model: Any = loaded.config
    vocabulary, highest = int(of_model.get_text_config().vocab_size), int(rows.store.ids.max())
    if highest >= vocabulary:
        raise ConfigError(
            f"ref_model_name_or_path={name!r} has a vocabulary of {count(vocabulary, 'token')}, and the data "
            f"holds token {highest}",
            hint="choose a reference with the tokenizer of the model to train",
        )
    return loaded.requires_grad_(False)


def small_files(reference: Reference | None) -> dict[str, bytes]:
    """Return the file that each checkpoint has."""
    return {} if reference is None else {FILE: reference.to_bytes()}
