"""Skeleton: a transformers model with `meta` parameters, which binds weights from slots to run.

Units are numbered as in the schedule: 0 prologue, 1 .. layers, the head, then the embedding table if untied,
then parameters that no forward pass uses, then those that see pictures (`engine.encode`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import nn

from horizon_lm.errors import ConfigError, UnsupportedModelError
from horizon_lm.memory.layout import Parameter, UnitLayout, lay_out
from horizon_lm.memory.master import join_master
from horizon_lm.memory.slots import UnitWeights
from horizon_lm.model.adapters import Adapter, base_name
from horizon_lm.model.anatomy import Anatomy, analyse
from horizon_lm.model.compiled import CompiledLayers, Listener, Mode
from horizon_lm.model.head import OwnHead, find_head
from horizon_lm.model.kernels import Patch, packs_one_row_only, patched
from horizon_lm.model.pictures import picture_parts
from horizon_lm.model.rope import separate_documents
from horizon_lm.model.tiling import tile_mlps
from horizon_lm.picture_batches import PictureInputs

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
# transformers writes most norms itself: CohereLayerNorm, LlamaRMSNorm, MambaRMSNormGated, NemotronLayerNorm1P
_NORM_NAME = re.compile(r"(?i)norm(gated|1p|[123]d)?$")

_UNTRAINED = frozenset({"idle", "vision"})  # units that no step uses

Owner = tuple[nn.Module, str]
Router = tuple[nn.Module, int]  # a router and the index of its logits in its output


class Skeleton:
    """A model cut into units.

    model: the transformers model. `take` replaces its parameters by `meta` ones, unit by unit; its buffers
    stay (they are small, and shared if identical). dtype: compute dtype, bf16 or fp32. Raises
    UnsupportedModelError if the model cannot be streamed. is_new: whether `model` was just created from its
    configuration in `dtype`. adapter: the adapter whose layers it has. packs: whether frozen linear weights
    and fused experts of layers are stored in few bits.
    """

    def __init__(
        self,
        model: Any,
        dtype: torch.dtype,
        *,
        is_new: bool = False,
        adapter: Adapter | None = None,
        packs: bool = False,
    ) -> None:
        self.adapter, self._packs = adapter, packs
        self.model = model.train()
        self._is_new = is_new
        self.config = model.config
        self.pictures = picture_parts(model)
        self.dtype = dtype
        self.neftune_noise_alpha: float | None = None
        self.compiled: CompiledLayers | None = None
        self.patches: list[Patch] = []  # applied while layers run
        of_text = vars(self.text_config).items()
        if any("layerdrop" in name and value for name, value in of_text):
            raise UnsupportedModelError(
                f"{self.model_type} skips layers at random (layerdrop)",
                hint="set layerdrop: 0 in the model's configuration",
            )
        for module in model.modules():  # recomputing layers is up to the engine
            if getattr(module, "gradient_checkpointing", False):
                module.gradient_checkpointing = False
        separate_documents(model)
        with torch.random.fork_rng(devices=[]):  # its trial runs may draw noise
            self.anatomy: Anatomy = analyse(model, self.pictures, None if adapter is None else adapter.off)
        self.own_head: OwnHead | None = find_head(model, self.anatomy)
        layers: nn.ModuleList = model.get_submodule(self.anatomy.layers_path)
        self.layers: list[nn.Module] = list(layers)
        self.embedding: nn.Embedding = model.get_input_embeddings()
        # Gathered rows are renumbered, so the module must not know a padding row.
        self.padding_row: int | None = self.embedding.padding_idx
        self.embedding.padding_idx = None
        # Routers matter only for the auxiliary loss.
        listen = self.has_router_loss
        self.routers: list[list[Router]] = [_routers(model, layer) if listen else [] for layer in self.layers]
        if self.has_router_loss and not any(self.routers):
            raise UnsupportedModelError(
                f"{self.model_type} asks for the router's auxiliary loss, but does not say where its "
                "router logits are",
                hint="set output_router_logits: false in the model's configuration",
            )
        self._rewritten = frozenset[int]() if adapter is None else adapter.rewritten
        self._owners, self.aliases = _owners(model)
        self.units: tuple[UnitLayout, ...] = self._lay_out()
        self._bound_at: dict[int, list[tuple[Parameter, list[Owner]]]] = {
            u: [(p, self._owners[p.name]) for p in unit.parameters] for u, unit in enumerate(self.units)
        }

    def tile_mlps(self, tile_tokens: int) -> None:
        """Compute MLPs in tiles of N tokens. Raises UnsupportedModelError if no layer has a suitable one."""
        if not tile_mlps(self.layers, tile_tokens):
            raise UnsupportedModelError(
                f"{self.model_type} has no MLP that could be computed in tiles",
                hint="leave mlp_tile_tokens out; experts and recurrent layers are computed at once",
            )

    def compile_layers(self, mode: Mode, listener: Listener, backend: str = "inductor") -> None:
        """Have layers compiled when they first run. Arguments: as for `CompiledLayers`."""
        self.compiled = CompiledLayers(
            self.layers, [bool(routers) for routers in self.routers], mode, listener, backend
        )

    def is_compiled(self, layer: int) -> bool:
        """Whether decoder layer `layer` (0-based) runs compiled, as far as is known."""
        return self.compiled is not None and self.compiled.is_compiled(layer)

    def run(self, layer: int, *args: Any, **kwargs: Any) -> Any:
        """Call decoder layer `layer` (0-based), compiled or not."""
        call = self.layers[layer] if self.compiled is None else partial(self.compiled.run, layer)
        with patched(self.patches):
            return call(*args, **kwargs)

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """While open, the base model runs alone. Raises ConfigError if there is no adapter."""
        if self.adapter is None:
            raise ConfigError("the model has no adapter to switch off", hint="leave adapter=False out")
        with self.adapter.off():
            yield

    @property
    def text_config(self) -> Any:
        """The configuration of the language model."""
        return self.config if self.pictures is None else self.config.get_text_config()

    @property
    def picture_inputs(self) -> PictureInputs | None:
        """The inputs that carry pictures; None for a model of text alone."""
        return None if self.pictures is None else self.pictures.inputs

    @property
    def vision(self) -> int | None:
        """The unit of the vision tower and projector, if there is one."""
        return len(self.units) - 1 if self.anatomy.vision else None

    @property
    def trains_projector(self) -> bool:
        """Whether the projector is part of the prologue, so that features are those before it."""
        parts = self.pictures
        return parts is not None and any(parts.is_projector(p.name) for p in self.units[0].parameters)

    def table_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows of the embedding table for token ids: a placeholder of pictures beyond the table has row 0,
        whose embedding is replaced by a feature."""
        token = None if self.pictures is None else self.pictures.inputs.placeholder
        if token is None or token < self.embedding.num_embeddings:
            return ids
        return ids.masked_fill(ids == token, 0)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def head(self) -> int:
        return self.num_layers + 1

    @property
    def vocabulary(self) -> int:
        """Number of logits per token."""
        output = self.model.get_output_embeddings()
        return int(output.weight.shape[0]) if output is not None else self.embedding.num_embeddings

    @property
    def max_head_tokens(self) -> int:
        """Maximum tokens per run of the head. It is limited only if the whole forward runs and its dummy
        input must be as long as the hidden states, and so within the model's positions."""
        if self.own_head is not None or self.anatomy.head_takes_one_token:
            return 1 << 62
        return int(getattr(self.text_config, "max_position_embeddings", 1024))

    @cached_property
    def max_positions(self) -> int | None:
        """Rows of the table of positions; None without one (rotary, alibi)."""
        tables = [(p.name, len(p.shape)) for p in self.units[0].parameters]
        buffers = self.model.named_buffers()
        parts = self.pictures
        tables += [(n, b.dim()) for n, b in buffers if parts is None or not parts.is_vision(n)]
        words = ("wpe", "position", "pos_encoding")
        has_table = any(dim == 2 and any(word in name for word in words) for name, dim in tables)
        end = getattr(self.text_config, "max_position_embeddings", None)
        return end if has_table and isinstance(end, int) else None

    @cached_property
    def extends_positions(self) -> bool:
        """Whether that table grows with the sequence (sinusoids, as in fairseq)."""
        return any(hasattr(module, "make_weights") for module in self.model.modules())

    @property
    def packs_one_row_only(self) -> bool:
        """Whether packed documents are kept apart only in micro-batches of one row."""
        return packs_one_row_only(self.text_config)

    @property
    def has_router_loss(self) -> bool:
        """Whether the configuration enables the mixture-of-experts auxiliary loss."""
        return bool(getattr(self.text_config, "output_router_logits", False))

    @property
    def embedding_unit(self) -> int:
        """The unit that owns the embedding table: the head if tied, else the one after it."""
        return self.head if self.anatomy.tied else self.head + 1

    @property
    def embedding_trainable(self) -> bool:
        """Whether the embedding table has a gradient."""
        return any(p.name == self.anatomy.embedding for p in self.units[self.embedding_unit].trainable)

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, on a frozen model."""
        return self.adapter is not None

    def name_of(self, module: nn.Module, local: str) -> str:
        """Return the full name of a module's parameter (the first, if tied); empty if there is none."""
        owned = ((name, o, at) for name, owners in self._owners.items() for o, at in owners)
        return next((name for name, owner, at in owned if owner is module and at == local), "")

    def is_embedding(self, name: str) -> bool:
        """Whether the parameter is the table of an embedding module (tokens or positions)."""
        return any(isinstance(owner, nn.Embedding) for owner, _ in self._owners[name])

    def is_norm(self, name: str) -> bool:
        """Whether the parameter is the scale or shift of a normalisation, whatever its shape."""
        return any(_is_norm(owner) for owner, _ in self._owners[name])

    @property
    def model_type(self) -> str:
        return str(getattr(self.config, "model_type", type(self.model).__name__))

    def _lay_out(self) -> tuple[UnitLayout, ...]:
        cut = self.anatomy
        groups = [("prologue", cut.prologue)]
        groups += [(f"layer {i}", names) for i, names in enumerate(cut.layers)]
        groups += [("head", cut.head)]
        if not cut.tied:
            groups.append(("embedding", (cut.embedding,)))
        if cut.idle:
            groups.append(("idle", cut.idle))
        if cut.vision:
            groups.append(("vision", cut.vision))
        kept = self._kept_in_fp32()
        units = []
        for unit, names in groups:
            rows = []
            for name in names:
                parameter = self._parameter(name)
                compute = torch.float32 if kept(name, parameter) else self.dtype
                rows.append(
                    (
                        name,
                        tuple(parameter.shape),
                        parameter.requires_grad and unit not in _UNTRAINED,
                        compute,
                    )
                )
            packs = self._packs and unit.startswith("layer ")
            packed = {row[0] for row in rows if packs and self._is_matrix(row[0])}
            units.append(lay_out(unit, rows, self.dtype, packed))
        return tuple(units)

    def _is_matrix(self, name: str) -> bool:
        """Whether a parameter is the weight of a linear map, or of several in one tensor (fused experts)."""
        shape, (owner, local) = self._parameter(name).shape, self._owners[name][0]
        if self.adapter is not None and self.adapter.is_part(name):  # frozen by `train` or `freeze`
            return False
        if len(shape) == 3:
            return not isinstance(owner, _CONVOLUTIONS)
        linear = isinstance(owner, nn.Linear) or type(owner).__name__ == "Conv1D"  # of GPT-2
        return len(shape) == 2 and linear and local == "weight"

    @cached_property
    def _created(self) -> dict[str, torch.dtype]:
        created = self.model if self._is_new else _created(self.model, self.dtype)
        named = [*created.named_parameters(remove_duplicate=False), *created.named_buffers()]
        return {name: tensor.dtype for name, tensor in named if tensor.is_floating_point()}

    def _kept_in_fp32(self) -> Callable[[str, torch.Tensor], bool]:
        """Return a predicate for wide parameters: in a bf16 model, those that transformers' loader keeps in
        fp32 (`_keep_in_fp32_modules_strict`, and what the class creates in fp32), whatever the dtype of the
        files.

        A bf16 model object with some fp32 parameters has its compute dtypes already. In an fp16 one fp32
        parameters mean nothing: `_keep_in_fp32_modules` applies to fp16 only.
        """
        if self.dtype == torch.float32:
            return lambda name, parameter: True
        adapter = self.adapter  # one of the settings follows the model's dtype, whatever that of its files
        theirs = adapter.is_part if adapter is not None and not adapter.keeps_dtypes else lambda name: False
        dtypes = {p.dtype for name, p in self.model.named_parameters() if not theirs(name)}
        if torch.bfloat16 in dtypes and len(dtypes) > 1:
            return lambda name, parameter: parameter.dtype == torch.float32 and not theirs(name)
        globs = getattr(self.model, "_keep_in_fp32_modules_strict", None) or ()
        words = [glob.replace("*", ".*") for glob in globs]  # expressions, as to the loader
        strict = re.compile("|".join(words) or "(?!)")
        created = {name for name, dtype in self._created.items() if dtype == torch.float32}
        return lambda name, parameter: (
            not theirs(name) and (base_name(name) in created or strict.search(name) is not None)
        )

    def _parameter(self, name: str) -> nn.Parameter:
        owner, local = self._owners[name][0]
        return owner._parameters[local]  # type: ignore[return-value]

    def take(self, unit: int) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the unit's parameters one at a time, replacing each by a `meta` tensor."""
        for parameter, owners in self._bound_at[unit]:
            value = self._parameter(parameter.name).detach()
            hollow = torch.empty(parameter.shape, dtype=parameter.compute_dtype, device="meta")
            for owner, local in owners:
                owner._parameters[local] = nn.Parameter(hollow, requires_grad=parameter.trainable)
            yield parameter.name, value

    def place_buffers(self, device: torch.device) -> None:
        """Move buffers to `device` in the dtype the model would have.

        Equal buffers of the same name and module class share memory (a mask in every layer). Others do not:
        rotary embeddings overwrite the frequencies of short texts by those of long ones, and keep the former
        in a second buffer that is equal at first.
        """
        seen: dict[tuple[type, str], list[torch.Tensor]] = {}
        for path, module in self.model.named_modules():
            for local, buffer in module._buffers.items():
                if buffer is None:
                    continue
                dtype = self._created.get(base_name(f"{path}.{local}" if path else local), buffer.dtype)
                value = buffer.to(device=device, dtype=dtype)
                alike = seen.setdefault((type(module), local), [])
                twin = next((t for t in alike if t.dtype == dtype and torch.equal(t, value)), None)
                if twin is None:
                    alike.append(value)
                module._buffers[local] = value if twin is None else twin

    @contextmanager
    def holding(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """While open, the modules hold these tensors, by the names of their parameters."""
        placed = [(*owner, tensor) for name, tensor in tensors.items() for owner in self._owners[name]]
        hollow = [owner._parameters[local] for owner, local, _ in placed]
        try:
            for owner, local, tensor in placed:
                owner._parameters[local] = tensor  # type: ignore[assignment]
            yield
        finally:
            for (owner, local, _), was in zip(placed, hollow, strict=True):
                owner._parameters[local] = was

    def restorer(self) -> Callable[[], None]:
        """Return a function that restores the modules' current state after an interrupt."""
        kept = [(m, dict(m._parameters), m.__dict__.get("forward")) for m in self.model.modules()]

        def restore() -> None:
            if self.pictures is not None:
                self.pictures.base.__dict__.pop("get_image_features", None)
            for module, parameters, forward in kept:
                module._parameters.update(parameters)
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.forward = forward

        return restore

    @contextmanager
    def bound(
        self, unit: int, source: UnitWeights | None, *, grad: bool, aliased: bool = False
    ) -> Iterator[dict[str, torch.Tensor]]:
        """While open, bind the weights of `source` (on the device) to the unit's modules.

        grad: trainable parameters become leaves that require a gradient. aliased: modules get views of them,
        so that a surviving view reveals a module that stored it. Yields the bound tensors by name; afterwards
        the modules hold nothing.
        """
        placed = self._bound_at[unit]
        tensors: dict[str, torch.Tensor] = {}
        hollow = [[owner._parameters[local] for owner, local in owners] for _, owners in placed]
        try:
            for parameter, owners in placed:
                assert source is not None, f"unit {unit} has weights but no slot"
                layout = self.units[unit]
                value = source.view(layout, parameter).detach()
                if parameter.compute_dtype != self.dtype:
                    value = join_master(value, layout.residual_view(source.wide_residual, parameter))
                if grad and parameter.trainable:
                    value.requires_grad_()
                tensors[parameter.name] = value
                if any(id(owner) in self._rewritten for owner, _ in owners):
                    value = nn.Parameter(value, value.requires_grad)  # which PEFT puts back as it was
                elif aliased:
                    value = value.view_as(value)
                for owner, local in owners:
                    owner._parameters[local] = value  # type: ignore[assignment]
            value = None  # type: ignore[assignment]
            yield tensors
        finally:
            for (_, owners), old in zip(placed, hollow, strict=True):
                for (owner, local), was in zip(owners, old, strict=True):
                    owner._parameters[local] = was

    @contextmanager
    def requiring_grad(self, unit: int) -> Iterator[None]:
        """While open, the bound trainable parameters of the unit require a gradient."""
        bound = [
            owner._parameters[local]
            for parameter, owners in self._bound_at[unit]
            for owner, local in owners
            if parameter.trainable
        ]
        changed = [tensor for tensor in bound if tensor is not None and not tensor.requires_grad]
        try:
            for tensor in changed:
                tensor.requires_grad_()
            yield
        finally:
            for tensor in changed:
                tensor.requires_grad_(False)


def _is_norm(module: nn.Module) -> bool:
    """Decide by class, as names mislead: `norm_attn_norm` contains projections (dbrx), and NormedEmbedding is
    an embedding (inkling)."""
    return isinstance(module, _NORMS) or _NORM_NAME.search(type(module).__name__) is not None


def _owners(model: Any) -> tuple[dict[str, list[Owner]], dict[str, list[str]]]:
    """Each parameter's modules (several if tied) by its first name, and its other names."""
    first: dict[int, str] = {}
    owners: dict[str, list[Owner]] = {}
    aliases: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        for local, parameter in module._parameters.items():
            if parameter is None:
                continue
            full = f"{path}.{local}" if path else local
            name = first.setdefault(id(parameter), full)
            owners.setdefault(name, []).append((module, local))
            if name != full:
                aliases.setdefault(name, []).append(full)
    return owners, aliases


def _created(model: Any, dtype: torch.dtype) -> Any:
    """Create a model without values from the configuration of `model`, in `dtype`."""
    try:
        with torch.device("meta"):
            return type(model)._from_config(model.config, dtype=dtype)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} could not be created from its configuration: {error}",
            hint="check config.json in the model folder",
        ) from error


def _routers(model: Any, layer: nn.Module) -> list[Router]:
    """The layer's routers, according to the model's output recorders (`_can_record_outputs`)."""
    specs: list[Any] = []
    for module in model.modules():
        recorded = getattr(module, "_can_record_outputs", None) or {}
        spec = recorded.get("router_logits", [])
        specs += [s for s in (spec if isinstance(spec, list) else [spec]) if s not in specs]
    found: list[Router] = []
    for path, module in layer.named_modules():
        for spec in specs:
            kind = getattr(spec, "target_class", spec)
            inside = getattr(spec, "layer_name", None)
            if isinstance(kind, type) and isinstance(module, kind) and (inside is None or inside in path):
                found.append((cast(nn.Module, module), getattr(spec, "index", 1)))
    return found
