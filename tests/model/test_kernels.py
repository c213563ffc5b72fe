"""Kernels from other packages: refused by name where they cannot run, and out of everyone else's way.

Neither liger-kernel nor kernels is installed here: stand-ins do what they do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.integrations import hub_kernels
from transformers.modeling_flash_attention_utils import _is_packed_sequence
from transformers.models.llama import modeling_llama

import horizon_lm as hz
from horizon_lm import host_model
from horizon_lm.config.model import ModelSettings
from horizon_lm.errors import ConfigError, DataError, HorizonError, UnsupportedModelError
from horizon_lm.micro_batches import check_micro_batches
from horizon_lm.model import kernels, loading
from policy_models import batches, gradients, host, same, source

pytestmark = pytest.mark.usefixtures("one_thread")

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NORM = {"RMSNorm": f"kernels-community/norms@{COMMIT}:FastNorm"}
FLASH = "kernels-community/flash-attn2"


def settings(**values: Any) -> ModelSettings:
    return ModelSettings.from_dict(values, source="test")


@pytest.mark.parametrize(
    ("values", "package"),
    [
        ({"attn_implementation": "flash_attention_2"}, "flash-attn"),
        ({"attn_implementation": "flash_attention_3"}, "flash-attn-3"),
        ({"attn_implementation": FLASH}, "kernels"),
        ({"kernels": "liger"}, "liger-kernel"),
        ({"kernels": "hub", "hub_kernels": NORM}, "kernels"),
    ],
)
def test_what_cannot_run_is_refused_by_name(
    values: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the model is loaded; sdpa needs nothing."""
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs a GPU, and device is cpu\n  hint: set "):
        kernels.check_kernels(settings(**values), CPU)
    with pytest.raises(
        ConfigError, match=f"needs the package {package}, which is not installed\n  hint: pip"
    ):
        kernels.check_kernels(settings(**values), CUDA)
    with pytest.raises(ConfigError, match="needs a GPU"):
        hz.HostModel.from_pretrained("no-such-folder", device="cpu", **values)
    kernels.check_kernels(settings(), CPU)


def test_attention_of_the_hub_that_cannot_be_fetched_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(name: str) -> None:
        asked.append(name)
        raise OSError("there is no network")

    monkeypatch.setattr(kernels, "find_spec", lambda name: object())
    monkeypatch.setattr(hub_kernels, "load_and_register_attn_kernel", fetch)
    kernels.check_kernels(settings(attn_implementation="flash_attention_2"), CUDA)  # fetches nothing
    with pytest.raises(ConfigError, match="could not be loaded: there is no network\n  hint: connect to"):
        kernels.check_kernels(settings(attn_implementation=f"{FLASH}@{COMMIT}"), CUDA)
    assert asked == [f"{FLASH}@{COMMIT}"]


@pytest.mark.parametrize(
    "values",
    [
        {"attn_implementation": "someone/flash"},
        {"attn_implementation": "flash"},
        {"kernels": "hub"},
        {"hub_kernels": NORM},
        {"kernels": "hub", "hub_kernels": {"RMSNorm": "kernels-community/norms@main:FastNorm"}},
        {"kernels": "hub", "hub_kernels": {"RMSNorm": f"someone/norms@{COMMIT}:FastNorm"}},
        {"compile": "fast"},
        {"deterministic": True, "compile": "max-autotune"},
        {"deterministic": True, "kernels": "liger"},
    ],
)
def test_settings_that_name_no_sound_kernel(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        settings(**values)


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (host_model, loading):
        monkeypatch.setattr(module, "check_kernels", lambda *given: None)


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch, on_the_cpu: None) -> list[str]:
    """A stand-in for liger-kernel, which patches as it does; the calls of its functions."""
    called: list[str] = []
    rope = modeling_llama.apply_rotary_pos_emb

    def fast_rope(*args: Any, **kwargs: Any) -> Any:
        called.append("rope")
        return rope(*args, **kwargs)

    def fast_norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
        called.append("norm")
        return type(norm).forward(norm, x)

    def patch(model: Any, *, cross_entropy: bool, fused_linear_cross_entropy: bool) -> None:
        assert not cross_entropy and not fused_linear_cross_entropy
        modeling_llama.apply_rotary_pos_emb = fast_rope
        modeling_llama.LlamaMLP = type("LigerSwiGLUMLP", (), {})  # type: ignore[misc, assignment]
        for layer in model.model.layers:
            layer.input_layernorm.__dict__["forward"] = fast_norm.__get__(layer.input_layernorm)

    module: Any = ModuleType("liger_kernel.transformers.monkey_patch")
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": patch}
    module._apply_liger_kernel_to_instance = patch
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return called


def test_liger_serves_this_model_only(liger: list[str]) -> None:
    """Its functions run in this model's layers; other models in the process keep transformers' own."""
    own = dict(vars(modeling_llama))
    model, data = host("llama", kernels="liger"), batches("llama", 1)
    assert vars(modeling_llama) == own
    model.forward_backward(data)
    assert liger.count("rope") >= model.skeleton.num_layers <= liger.count("norm")
    assert vars(modeling_llama) == own
    found = gradients(model)
    liger.clear()
    plain = host("llama")
    plain.forward_backward(data)
    assert not liger and same(gradients(plain), found)


def test_liger_without_kernels_for_a_model_is_an_error(liger: list[str]) -> None:
    with pytest.raises(
        UnsupportedModelError, match="no kernels for gpt2; it has some for llama\n  hint: set"
    ):
        host("gpt2", kernels="liger")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, on_the_cpu: None) -> dict[str, Any]:
    """A stand-in for the package kernels; what it was asked for."""
    asked: dict[str, Any] = {}
    module: Any = ModuleType("kernels")
    module.LayerRepository = lambda name, **more: (name, more)
    module.Mode = SimpleNamespace(TRAINING=1, TORCH_COMPILE=2)

    @contextmanager
    def use_kernel_mapping(mapping: Any, *, inherit_mapping: bool) -> Iterator[None]:
        asked.update(mapping=mapping, inherits=inherit_mapping)
        yield

    def kernelize(model: Any, *, mode: int, device: str) -> None:
        asked.update(mode=mode, device=device)
        if "error" in asked:
            raise asked["error"]

    module.use_kernel_mapping, module.kernelize = use_kernel_mapping, kernelize
    monkeypatch.setitem(sys.modules, "kernels", module)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "kernel_layer_name", "RMSNorm", raising=False)
    return asked


def test_kernels_of_the_hub_are_those_named_at_their_commit(hub: dict[str, Any]) -> None:
    model = source("llama", layers=1)
    assert kernels.apply_kernels(model, settings(kernels="hub", hub_kernels=NORM)) == []
    repository = ("kernels-community/norms", {"layer_name": "FastNorm", "revision": COMMIT})
    assert hub == {
        "mapping": {"RMSNorm": {"cuda": repository}},
        "inherits": False,
        "mode": 1,
        "device": "cuda",
    }
    kernels.apply_kernels(model, settings(kernels="hub", hub_kernels=NORM, compile=True))
    assert hub["mode"] == 3


@pytest.mark.parametrize(
    ("named", "error", "kind", "message"),
    [
        ({"Rope": NORM["RMSNorm"]}, None, UnsupportedModelError, "hub_kernels names Rope, .* are RMSNorm\n"),
        (NORM, OSError("no network"), ConfigError, "could not be loaded: no network\n  hint: connect"),
    ],
)
def test_kernels_of_the_hub_that_cannot_be_used(
    hub: dict[str, Any], named: dict[str, str], error: Any, kind: type[HorizonError], message: str
) -> None:
    if error is not None:
        hub["error"] = error
    with pytest.raises(kind, match=message):
        kernels.apply_kernels(source("llama", layers=1), settings(kernels="hub", hub_kernels=named))


def test_a_kernel_in_place_of_layers_with_an_adapter_is_refused(
    hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of a whole MLP reads its weights itself. Norms beside the adapter are served."""
    monkeypatch.setattr(modeling_llama.LlamaMLP, "kernel_layer_name", "MLP", raising=False)
    chosen = {**NORM, "MLP": f"kernels-community/mlp@{COMMIT}:FastMLP"}
    adapter = LoraConfig(target_modules=["gate_proj"])
    model = get_peft_model(source("llama", layers=1), adapter).get_base_model()
    with pytest.raises(ConfigError, match="hub_kernels: MLP computes a whole LlamaMLP.*\n  hint: leave MLP"):
        kernels.apply_kernels(model, settings(kernels="hub", hub_kernels=chosen))
    assert not hub
    kernels.apply_kernels(model, settings(kernels="hub", hub_kernels=NORM))
    outside = get_peft_model(source("llama", layers=1), LoraConfig(target_modules=["q_proj"]))
    kernels.apply_kernels(outside.get_base_model(), settings(kernels="hub", hub_kernels=chosen))
    assert hub["mapping"].keys() == chosen.keys()


def test_documents_in_several_rows_are_refused_under_flash_attention() -> None:
    """transformers looks for them in one row only, so they would see each other without a word."""
    model = host("llama")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    assert _is_packed_sequence(positions, 1) and not _is_packed_sequence(positions.repeat(2, 1), 2)
    ids = torch.ones(2, 6, dtype=torch.long)
    packed = {"input_ids": ids, "labels": ids, "position_ids": positions.repeat(2, 1)}
    one_row = {name: value[:1] for name, value in packed.items()}
    single = packed | {"position_ids": torch.arange(6).repeat(2, 1)}
    check_micro_batches([packed], model.skeleton)
    for name in ("flash_attention_2", "flash_attention_3", FLASH):
        model.config._attn_implementation = name
        check_micro_batches([one_row, single], model.skeleton)
        with pytest.raises(DataError, match="packs documents into 2 rows.*\n  hint: set per_device_train"):
            check_micro_batches([packed], model.skeleton)
