"""Load a model from a Hugging Face folder, name, configuration or model object, and fill the host store.

Weights are read by transformers' own loader, so that its conversions apply, then adopted unit by unit while
the source is freed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from horizon_lm.config import ModelSettings
from horizon_lm.errors import ConfigError, DataError, DoesNotFitError, HorizonError, UnsupportedModelError
from horizon_lm.io.hub import require_reachable
from horizon_lm.machine.device import resolve_device
from horizon_lm.memory.arena import return_free_memory
from horizon_lm.memory.store import HostStore
from horizon_lm.model.adapter_files import CONFIG, read_adapter_config
from horizon_lm.model.adapters import prepare
from horizon_lm.model.base_cache import BaseCache
from horizon_lm.model.configuration import configuration_of, reason_of
from horizon_lm.model.fingerprint import Fingerprinter
from horizon_lm.model.folder import INDEX, check_is_model, names_in
from horizon_lm.model.kernels import check_kernels
from horizon_lm.model.pretrained import Allowed, model_class, read_pretrained, seeded, without_messages
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.words import count


def load_model(
    source: str | Path | nn.Module,
    *,
    trust_remote_code: bool,
    revision: str | None,
    attn_implementation: str,
    allowed: Allowed = Allowed(),  # noqa: B008
    seed: int = 0,
) -> nn.Module:
    """Load the transformers model of a folder or name in the dtype of its files; a model object is returned
    as is.

    allowed: permitted differences between checkpoint and model. seed: for missing weights. Reads only
    safetensors, never pickles. Raises ConfigError for a missing folder or one without a causal language
    model, DataError for weights that are damaged or do not fit the model.
    """
    if isinstance(source, nn.Module):
        return source
    name = str(source)
    looks_local = isinstance(source, Path) or name.startswith((".", "/", "~")) or Path(name).exists()
    if looks_local:
        _check_folder(Path(name).expanduser())
        name = str(Path(name).expanduser())
    else:
        require_reachable(name, "model_name_or_path")
    options: dict[str, Any] = {} if looks_local or revision is None else {"revision": revision}
    try:
        return read_pretrained(
            name,
            allowed,
            seed=seed,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            **options,
        )
    except HorizonError:
        raise
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        reason = reason_of(error)
        raise _no_memory(error) or ConfigError(
            f"model_name_or_path={name!r} could not be loaded: {reason}",
            hint="name a Hugging Face folder with config.json and *.safetensors, or a model on the Hub",
        ) from error
    except Exception as error:  # safetensors raises its own type for damaged files
        raise _no_memory(error) or DataError(
            f"the weights in {name!r} are damaged: {type(error).__name__}: {error}",
            hint="download or export it again",
        ) from error


def load_model_of(source: str | Path | nn.Module, settings: ModelSettings) -> nn.Module:
    """Load the transformers model that the settings describe; a model object is returned as it is."""
    check_kernels(settings, resolve_device(settings.device))
    return load_model(
        source,
        trust_remote_code=settings.trust_remote_code,
        revision=settings.model_revision,
        attn_implementation=settings.attn_implementation,
        allowed=Allowed(settings.allow_missing, settings.allow_unexpected),
        seed=settings.seed,
    )


def base_of(source: str | Path, settings: ModelSettings) -> tuple[str | Path, ModelSettings]:
    """Of the folder of an adapter, return the base that it names, and settings with the adapter.

    Returns any other source as it is. Raises ConfigError for a folder that names no base, and for settings
    with an adapter of their own.
    """
    folder = Path(source).expanduser()
    if not (folder / CONFIG).is_file() or (folder / "config.json").exists():
        return source, settings
    if settings.has_adapter:
        raise ConfigError(
            f"{str(folder)!r} holds an adapter, and the settings ask for another",
            hint="leave adapter and adapter_name_or_path out, or name the base model",
        )
    config = read_adapter_config(str(folder))
    base = config.base_model_name_or_path
    if not base:
        raise ConfigError(
            f"the adapter {str(folder)!r} names no base model",
            hint=f"HostModel.from_pretrained(BASE, adapter_name_or_path={str(folder)!r})",
        )
    revision = settings.model_revision or config.revision
    return str(base), settings.replace(adapter_name_or_path=str(folder), model_revision=revision)


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ConfigError(
            f"model_name_or_path={str(folder)!r} is not a folder",
            hint="check the path; it is taken from where you are",
        )
    check_is_model(folder)
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"model_name_or_path={str(folder)!r} holds no config.json",
            hint="name a Hugging Face model folder",
        )
    if not list(folder.glob("*.safetensors")):
        raise ConfigError(
            f"model_name_or_path={str(folder)!r} holds no *.safetensors",
            hint="pickled weights (*.bin) are never loaded; convert them with transformers' save_pretrained",
        )
    _check_index(folder)


def _check_index(folder: Path) -> None:
    """Raise DataError unless every file named in the weight index exists in its folder."""
    index = folder / INDEX
    if not index.is_file():
        return
    for name in sorted(names_in(index)):
        if not (folder / name).is_file():
            raise DataError(
                f"{folder / name} is missing, and {index.name} names it", hint="download it again"
            )


def count_parameters(values: dict[str, Any], settings: ModelSettings) -> tuple[int, int]:
    """Count (trained, frozen) parameters of a transformers configuration under the settings, without
    memory."""
    with torch.device("meta"):
        model = create_model(values, dtype=torch.float32, seed=0, attn_implementation="eager")
        model, _ = prepare(model, settings, has_values=False)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trained, sum(p.numel() for p in model.parameters()) - trained


def create_model(
    values: dict[str, Any], *, dtype: torch.dtype, seed: int, attn_implementation: str
) -> nn.Module:
    """Create a model with random weights from the values of a transformers configuration.

    Draws weights in fp32 whatever the compute dtype. Raises ConfigError for a configuration that transformers
    rejects, DoesNotFitError if memory does not suffice.
    """
    kind = values.get("model_type")
    try:
        config = configuration_of(values, attn_implementation)
        with seeded(seed):
            model = model_class(config).from_config(
                config, dtype=torch.float32, attn_implementation=attn_implementation
            )
    except HorizonError:
        raise
    except Exception as error:
        reason = reason_of(error)
        raise _no_memory(error) or ConfigError(
            f"init_model with model_type={kind!r} was refused by transformers: {reason}",
            hint="the keys are those of the model's config.json",
        ) from error
    config.dtype = dtype
    return model


def _no_memory(error: Exception) -> DoesNotFitError | None:
    """The error to raise instead if the system refused memory, which torch reports as a RuntimeError."""
    refused = "can't allocate memory", "Cannot allocate memory"
    if not isinstance(error, MemoryError) and not any(words in str(error) for words in refused):
        return None
    return DoesNotFitError(
        f"the system refused the host memory that the model's weights need: {error}",
        hint="free memory, raise the limit (ulimit -v, cgroup), or choose a smaller model",
    )


def grow_vocabulary(model: Any, tokens: int, seed: int) -> None:
    """Grow the embeddings to at least `tokens` rows, new ones drawn by transformers (seed).

    Raises UnsupportedModelError if transformers cannot.
    """
    if tokens <= model.get_input_embeddings().num_embeddings:
        return
    try:
        with (
            without_messages("new embeddings will be init", "new lm_head weights will be init"),
            seeded(seed),
        ):
            model.resize_token_embeddings(tokens)
    except (NotImplementedError, TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModelError(
            f"the embeddings of a {type(model).__name__} cannot grow to {count(tokens, 'row')}: {error}",
            hint="leave new_tokens out",
        ) from error


def fill_store(
    skeleton: Skeleton,
    store: HostStore,
    base: Fingerprinter | None = None,
    base_cache: BaseCache | None = None,
) -> None:
    """Adopt all parameters unit by unit, freeing the model object's own on the way. base: is told those that
    checkpoints leave out. base_cache: keeps packed units from run to run."""
    room = torch.empty(max(unit.packed_numel for unit in store.units), dtype=store.dtype)
    for unit, layout in enumerate(store.units):
        values = room[: layout.packed_numel].zero_()  # gaps are packed as well
        _adopt_unit(skeleton, store, unit, values, base)
        if layout.packed_numel:
            _pack(store, unit, values, base_cache)
            _adopt_magnitudes(skeleton, store, unit)
    return_free_memory()


def _adopt_unit(
    skeleton: Skeleton, store: HostStore, unit: int, values: torch.Tensor, base: Fingerprinter | None
) -> None:
    """Adopt a unit's parameters; those to be packed go to values [packed_numel]."""
    layout, saved = store.units[unit], store.spec.saved
    for name, value in skeleton.take(unit):
        if base is not None and saved is not None and name not in saved:
            base.add(unit, layout.name, name, value)
        parameter = store.locate(name)[1]
        if parameter.offset < layout.packed_numel:
            layout.view(values, parameter).copy_(value)
        else:
            store.adopt(name, value)


def _pack(store: HostStore, unit: int, values: torch.Tensor, base_cache: BaseCache | None) -> None:
    stored = store.run("packed", unit)
    if base_cache is not None and base_cache.read(values, stored):
        return
    store.pack(unit, values)
    return_free_memory()  # pieces of a unit would leave holes among those of the next
    if base_cache is not None:
        base_cache.write(values, stored)


def _adopt_magnitudes(skeleton: Skeleton, store: HostStore, unit: int) -> None:
    """Let a new DoRA begin with the magnitudes of the weights as they are packed, not as they were: only so
    does it change nothing at first."""
    adapter = skeleton.adapter
    if adapter is None:
        return
    for parameter in store.units[unit].trainable:
        value = adapter.magnitude(parameter.name, store.weight)
        if value is not None:
            store.adopt(parameter.name, value)
