"""A model known by its configuration alone: its units, and the memory and work of each part.

The transformers model is built of fake tensors and cut by the `Skeleton` that training uses. A model of 10^12
parameters takes seconds and a few hundred megabytes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.config.adapters import AdapterSettings
from horizon_lm.data.training_data import tokenizer_of
from horizon_lm.engine.homes import packing_of
from horizon_lm.engine.policies import DTYPES
from horizon_lm.errors import ConfigError, HorizonError, UnsupportedModelError
from horizon_lm.io.hub import require_reachable
from horizon_lm.memory.layout import UnitLayout
from horizon_lm.model.adapters import prepare
from horizon_lm.model.configuration import configuration_of, read_configuration, reason_of
from horizon_lm.model.experts import choose_experts, implementation_of
from horizon_lm.model.folder import check_is_model, check_model_folder
from horizon_lm.model.pretrained import model_class
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.plan.model_flops import Counted, count_layers, kinds_of_layers
from horizon_lm.plan.outline_cache import Facts, OutlineCache, TraceKey
from horizon_lm.plan.work import Law, Line, Trace
from horizon_lm.plan.working_set import (
    Built,
    Ends,
    Loss,
    Measure,
    WorkingSet,
    ends_working_set,
    layer_working_set,
)


@dataclass(frozen=True)
class Measures:
    """Measurements of one micro-batch [batch, tokens]. layers: by kind of layer."""

    batch: int
    tokens: int
    ends: Ends
    layers: tuple[WorkingSet, ...]


class Outline:
    """Outline of a model. Raises UnsupportedModelError for a model that cannot be streamed.

    config: a transformers configuration, or a function that returns it. settings: dtype, attention and tiles
    matter. cache: earlier findings on this model, extended by new ones; the model is built only for what the
    cache lacks.
    """

    def __init__(
        self, config: Any | Callable[[], Any], settings: ModelSettings, cache: OutlineCache | None = None
    ) -> None:
        self._config, self._settings = config, settings
        self.dtype = DTYPES[settings.dtype]
        self.mlp_tile_tokens, self.structure = settings.mlp_tile_tokens, structure_of(settings)
        self.has_adapter = settings.has_adapter
        self._cache = cache = cache or OutlineCache()
        if cache.facts is None:
            cache.facts = _facts(self.config, self.built.skeleton)
        self.facts: Facts = cache.facts
        self.units: tuple[UnitLayout, ...] = self.facts.units
        self.kind_of: Sequence[int] = self.facts.kind_of
        self._measured: dict[tuple[int, int, int, str], Measures] = {}
        self._traces: dict[TraceKey, Trace] = cache.traces
        self._lines: list[Line] = []
        self._laws: dict[tuple[Hashable, Line], Law | None] = {}

    @cached_property
    def config(self) -> Any:
        """The transformers configuration."""
        return self._config() if callable(self._config) else self._config

    @cached_property
    def built(self) -> Built:
        """The model of fake tensors."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            model = _build(self.config, self.dtype, self._settings)
            choose_experts(model, self._settings)
            model, adapter = prepare(model, self._settings, has_values=False)
            packs = bool(packing_of(self._settings))
            skeleton = Skeleton(model, self.dtype, is_new=True, adapter=adapter, packs=packs)
            if self.mlp_tile_tokens is not None:
                skeleton.tile_mlps(self.mlp_tile_tokens)
            for unit in range(len(skeleton.units)):
                for _ in skeleton.take(unit):
                    pass
        return Built(skeleton, mode)

    @property
    def counted(self) -> Counted | None:
        """The result of `count`."""
        return self._cache.counted

    def count(self) -> Counted | None:
        """Count how often parameters multiply a token, and other products; None for a model that cannot run
        without its weights. Counted once."""
        if self._cache.counted is None:
            with suppress(Exception):  # a model's code may do anything on fake tensors
                self._cache.counted = count_layers(self.built, self.facts.kind_of)
        return self._cache.counted

    @property
    def num_layers(self) -> int:
        return len(self.kind_of)

    @property
    def head(self) -> int:
        return self.num_layers + 1

    @cached_property
    def embedding_unit(self) -> int:
        return self.head if self.facts.tied else self.head + 1

    @property
    def embedding_trainable(self) -> bool:
        return self.facts.embedding_trainable

    @property
    def vocabulary(self) -> int:
        return self.facts.vocabulary

    @property
    def max_head_tokens(self) -> int:
        return self.facts.max_head_tokens

    @property
    def num_parameters(self) -> int:
        return sum(p.numel for unit in self.units for p in unit.parameters)

    @property
    def num_trained(self) -> int:
        return sum(p.numel for unit in self.units for p in unit.trainable)

    @property
    def width(self) -> int:
        return self.facts.width

    def with_layers(self, count: int) -> Outline:
        """The same model with `count` layers, whose kinds repeat in their order."""
        other = object.__new__(Outline)
        other.__dict__.update(self.__dict__)
        other.__dict__.pop("embedding_unit", None)
        layers = [self.units[1 + i % self.num_layers] for i in range(count)]
        other.units = (self.units[0], *layers, *self.units[self.head :])
        other.kind_of = [self.kind_of[i % self.num_layers] for i in range(count)]
        return other

    def measures(
        self,
        batch: int,
        tokens: int,
        loss_chunk: int,
        label_smoothing: float = 0.0,
        values: tuple[str, ...] | None = None,
    ) -> Measures:
        """Measure the parts on a micro-batch, once for each shape. values: see `Loss`."""
        loss = Loss(loss_chunk, label_smoothing, values)
        key = batch, tokens, loss_chunk, loss.kind
        if key not in self._measured:
            try:
                ends = ends_working_set(
                    lambda: self.built,
                    batch,
                    tokens,
                    loss,
                    has_backward=self._ends_have_backward,
                    source=self._readings,
                )
                layers = tuple(
                    layer_working_set(lambda: self.built, layer, batch, tokens, source=self._readings)
                    for layer in self.facts.kinds
                )
            except HorizonError:
                raise
            except Exception as error:
                raise UnsupportedModelError(
                    f"{self.facts.model_type} cannot be run without its weights, which a plan needs: "
                    f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                    hint="train it with skip_memory_check: true; the plan is then left out",
                ) from error
            self._measured[key] = Measures(batch, tokens, ends, layers)
        return self._measured[key]

    @property
    def _ends_have_backward(self) -> bool:
        """Whether anything before the layers is trained."""
        return any(self.facts.units[u].trainable_numel for u in (0, self.facts.embedding_unit))

    def expect(self, line: Line) -> None:
        """Prepare for many shapes of `line`: its ends are measured, and those between follow."""
        if line.high - line.low > 1 and line not in self._lines and self.mlp_tile_tokens is None:
            self._lines.append(line)

    def _readings(self, part: Hashable, batch: int, tokens: int, measure: Measure) -> Sequence[Any]:
        """Readings of a part of the model: measured, or derived from two that were."""
        if (part, batch, tokens) not in self._traces and batch:  # the head has rows alone
            for line in self._lines:
                number = line.number(batch, tokens)
                if number is None or number in (line.low, line.high):
                    continue
                law = self._law(part, line, measure)
                if law is not None:
                    return law.at(number)
        return self._trace(part, batch, tokens, measure).readings

    def _trace(self, part: Hashable, batch: int, tokens: int, measure: Measure) -> Trace:
        key = part, batch, tokens
        if key not in self._traces:
            self._traces[key] = measure(batch, tokens)
        return self._traces[key]

    def _law(self, part: Hashable, line: Line, measure: Measure) -> Law | None:
        if (part, line) not in self._laws:
            self._laws[part, line] = None
            with suppress(Exception):  # an end that cannot run says nothing about the shapes between
                low, high = (self._trace(part, *line.shape(n), measure) for n in (line.low, line.high))
                self._laws[part, line] = Law.of(line, low, high)
        return self._laws[part, line]


def structure_of(settings: ModelSettings) -> str:
    """The settings that decide on a model's units and their work, as text."""
    trained = {key: getattr(settings, key) for key in AdapterSettings.__annotations__}
    return repr((settings.dtype, settings.attn_implementation, settings.mlp_tile_tokens, trained))


def model_config(config: TrainConfig) -> Any:
    """Return the transformers configuration of a run; weights are not read.

    Raises ConfigError if there is none, or if transformers rejects it.
    """
    try:
        if config.init_model is not None:
            values = dict(config.init_model)
            if config.train_tokenizer_vocab_size is not None:
                values.setdefault("vocab_size", config.train_tokenizer_vocab_size)
            found = configuration_of(values, config.attn_implementation)
        else:
            assert config.model_name_or_path is not None  # TrainConfig has seen to it
            name = str(Path(config.model_name_or_path).expanduser())
            require_reachable(name, "model_name_or_path")
            check_is_model(name)
            check_model_folder(name)
            options = {} if config.model_revision is None else {"revision": config.model_revision}
            found = read_configuration(
                name,
                trust_remote_code=config.trust_remote_code,
                attn_implementation=config.attn_implementation,
                **options,
            )
    except HorizonError:
        raise
    except Exception as error:
        key = "init_model" if config.init_model is not None else "model_name_or_path"
        raise ConfigError(
            f"{key}: transformers finds no configuration: {reason_of(error)}",
            hint="pass a folder with config.json, or init_model with its model_type",
        ) from error
    return _with_new_tokens(config, found)


def _with_new_tokens(config: TrainConfig, model: Any) -> Any:
    """Enlarge the model's vocabulary for `new_tokens`."""
    if not config.new_tokens:
        return model
    if config.train_tokenizer_vocab_size is not None:
        tokens = config.train_tokenizer_vocab_size + len(config.new_tokens)
    else:
        tokens = len(tokenizer_of(config))
    text = model.get_text_config()
    text.vocab_size = max(text.vocab_size, tokens)
    return model


def _build(config: Any, dtype: torch.dtype, settings: ModelSettings) -> nn.Module:
    from transformers.initialization import no_init_weights

    try:
        with no_init_weights():
            model = model_class(config).from_config(
                config,
                dtype=dtype,
                attn_implementation=settings.attn_implementation,
                trust_remote_code=settings.trust_remote_code,
            )
        model.tie_weights()  # which initialising the weights would do
        return model
    except Exception as error:
        raise ConfigError(
            f"transformers rejects the model's configuration: {reason_of(error)}",
            hint="check config.json or init_model, and attn_implementation",
        ) from error


def _facts(config: Any, skeleton: Skeleton) -> Facts:
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    kinds, kind_of = kinds_of_layers(skeleton)
    return Facts(
        model_type=skeleton.model_type,
        units=skeleton.units,
        kinds=tuple(kinds),
        kind_of=tuple(kind_of),
        tied=skeleton.anatomy.tied,
        embedding_trainable=skeleton.embedding_trainable,
        rows=skeleton.embedding.num_embeddings,
        width=skeleton.embedding.embedding_dim,
        vocabulary=skeleton.vocabulary,
        max_head_tokens=skeleton.max_head_tokens,
        positions=longest if isinstance(longest, int) and longest > 0 else None,
        experts=implementation_of(skeleton.model),
    )
