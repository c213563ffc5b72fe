"""Settings of what is trained: all of a model, some of its parameters, or an adapter on a frozen base."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic_core import PydanticCustomError

from horizon_lm.config.base import fault, setting
from horizon_lm.config.memory import MemorySettings

OF_NEW = ("lora_r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "modules_to_save")


class AdapterSettings(MemorySettings):
    """The part of `ModelSettings` that says which parameters are trained, and how the others are stored."""

    adapter: Literal["none", "lora", "dora"] = setting(
        "none",
        "Train a PEFT adapter instead of the model: lora adds a product of two small matrices to each target "
        "module, dora also learns the magnitude of its weights. The model itself stays frozen. Adapters "
        "usually need a learning_rate of 1e-4 to 2e-4.",
        group="Adapters",
        resume="fixed",
    )
    adapter_name_or_path: str | None = setting(
        None,
        "Adapter to train further, a folder or a name on the Hub (adapter_config.json and "
        "adapter_model.safetensors); null starts a new one.",
        group="Adapters",
        resume="ask",
    )
    lora_r: int = setting(16, "Rank of the adapter's matrices.", group="Adapters", resume="fixed", ge=1)
    lora_alpha: float = setting(
        32.0, "The adapter's output is scaled by lora_alpha / lora_r.", group="Adapters", resume="fixed", gt=0
    )
    lora_dropout: float = setting(
        0.0,
        "Dropout on the adapter's input in training.",
        group="Adapters",
        resume="fixed",
        ge=0,
        lt=1,
    )
    use_rslora: bool = setting(
        False,
        "Scale the adapter's output by lora_alpha / sqrt(lora_r) instead.",
        group="Adapters",
        resume="fixed",
    )
    target_modules: str | list[str] = setting(
        "all-linear",
        "Modules that get an adapter: suffixes of their names, one regular expression for whole names, or "
        "all-linear for all linear layers except the output layer.",
        group="Adapters",
        resume="fixed",
        expects="all-linear, a list of names such as [q_proj, v_proj], or a regular expression",
    )
    modules_to_save: list[str] = setting(
        [],
        "Modules of the base to train in full and save with the adapter, such as lm_head.",
        group="Adapters",
        resume="fixed",
        expects="a list of names of modules",
    )
    freeze: list[str] = setting(
        [],
        "Parameters not to train, as regular expressions searched in their names; they need no memory for "
        "gradients or moments. experts means all experts of a mixture, including shared ones but not "
        "routers.",
        group="Adapters",
        resume="fixed",
        expects="a list of regular expressions",
    )
    train: list[str] = setting(
        [],
        "The only parameters to train, as regular expressions searched in their names; an empty list trains "
        "all that freeze does not match.",
        group="Adapters",
        resume="fixed",
        expects="a list of regular expressions",
    )
    train_projector: bool = setting(
        False,
        "Vision-language models: also train the projector between vision tower and language model; the tower "
        "stays frozen.",
        group="Adapters",
        resume="fixed",
    )
    base_dtype: Literal["auto", "bfloat16", "int8", "nf4"] = setting(
        "auto",
        "Storage format of the frozen linear weights of layers: auto is dtype; int8 and nf4 are blockwise "
        "formats of bitsandbytes, with about 1.06 and 0.52 bytes per parameter, which are unpacked on the "
        "device before a layer runs.",
        group="Adapters",
        resume="fixed",
    )
    base_cache_dir: str | None = setting(
        None,
        "Folder that keeps the weights packed by base_dtype, so the next run need not pack them again; null "
        "packs them in each run.",
        group="Adapters",
        resume="free",
    )

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is trained, new or saved."""
        return self.adapter != "none" or self.adapter_name_or_path is not None

    @property
    def begins_adapter(self) -> bool:
        """Whether a new adapter is trained, so that its base is the model before training."""
        return self.adapter != "none" and self.adapter_name_or_path is None

    def faults(self) -> Iterator[PydanticCustomError]:
        yield from super().faults()
        fields = type(self).model_fields
        for key in OF_NEW if not self.begins_adapter else ():
            if getattr(self, key) == fields[key].default:
                continue
            if self.has_adapter:
                why, way = "adapter_name_or_path, whose adapter_config.json sets it", "leave the key out"
            else:
                why, way = "adapter: none", "leave the key out, or set adapter=lora"
            yield fault(f"{key} has no effect with {why}", key=key, hint=way)
        if self.base_cache_dir is not None and self.base_dtype in ("auto", "bfloat16"):
            yield fault(
                f"base_cache_dir has no effect with base_dtype: {self.base_dtype}, which packs nothing",
                key="base_cache_dir",
                hint="leave the key out, or set base_dtype=int8 or nf4",
            )
