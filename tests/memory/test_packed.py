"""Packed weights: the format, their bytes, loading, the cache, reading, and what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional

import horizon_lm as hz
from emulated_cuda import EmulatedCuda
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm.checkpoint import units
from horizon_lm.engine.policies import slots_of, store_spec
from horizon_lm.errors import ConfigError
from horizon_lm.memory import packed
from horizon_lm.memory.layout import lay_out
from horizon_lm.memory.regions import StoreSpec, predict_bytes, predict_device_bytes
from horizon_lm.memory.store import HostStore
from parts import LORA, batches, bits, dequantised, host, source

pytestmark = pytest.mark.usefixtures("one_thread")

BF16, FP32, CPU = torch.bfloat16, torch.float32, torch.device("cpu")
NUMEL = 3 * 16_384 + 128


def values(dtype: torch.dtype = BF16, numel: int = NUMEL) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)


def packed_and_back(given: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    stored = torch.zeros(packed.packed_bytes(given.numel(), kind), dtype=torch.uint8)
    packed.pack(given, stored, kind, CPU)
    found = torch.full_like(given, torch.nan)
    packed.unpack(stored, given.numel(), kind, found)
    return stored, found


def theirs(given: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "nf4":
        state = functional.quantize_4bit(given, blocksize=64, compress_statistics=True, quant_type="nf4")
        return functional.dequantize_4bit(*state).view(-1)
    return functional.dequantize_blockwise(*functional.quantize_blockwise(given, blocksize=64)).view(-1)


# The format.


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", packed.FORMATS)
def test_values_are_those_of_bitsandbytes(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is packed and unpacked at once; a chunk by itself, with a mean of its own."""
    given = values(dtype)
    stored, found = packed_and_back(given, kind)
    assert torch.equal(found, theirs(given, kind))
    assert 0 < (found - given).abs().max() < (0.02 if kind == "nf4" else 0.002)
    monkeypatch.setattr(packed, "_PIECE", 1024)
    again, same = packed_and_back(given, kind)
    assert torch.equal(again, stored) and torch.equal(same, found)
    monkeypatch.setattr(packed, "CHUNK", 16_384)
    _, cut = packed_and_back(given, kind)
    assert torch.equal(cut, torch.cat([theirs(chunk, kind) for chunk in given.split(16_384)]))
    assert torch.equal(cut, found) == (kind == "int8")  # one mean for all chunks is another


@pytest.mark.parametrize("chunk", [1 << 26, 16_384])
@pytest.mark.parametrize("kind", packed.FORMATS)
def test_any_part_is_unpacked_alike(kind: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "CHUNK", chunk)
    stored, whole = packed_and_back(values(), kind)
    for begin, numel in (
        (0, 1),
        (64, 200),
        (128, 37),
        (16_320, 130),
        (32_768, NUMEL - 32_768),
        (640, 40_000),
    ):
        part = torch.full((numel,), torch.nan, dtype=BF16)
        packed.unpack(stored, NUMEL, kind, part, begin)
        assert torch.equal(part, whole[begin : begin + numel]), (begin, numel)


def test_bytes_of_a_parameter() -> None:
    """As the documentation has them, for a layer of an 8 B model."""
    numel = 218_103_808
    found = {kind: packed.packed_bytes(numel, kind) / numel for kind in packed.FORMATS}
    assert found == {"int8": pytest.approx(1.0625, rel=1e-5), "nf4": pytest.approx(0.51587, rel=1e-4)}
    for kind in packed.FORMATS:
        assert packed.packed_bytes(0, kind) == 0 and packed.packed_bytes(128, kind) % packed.ALIGN_BYTES == 0


def test_70b_takes_40_gb_of_host_memory() -> None:
    """Llama 3.1 70B with adapters of rank 16 on a GPU; scaled down, `test_memory_is_as_predicted`."""
    width, inner, keys, rank = 8192, 28_672, 1024, 16
    shapes = [(width, width)] * 2 + [(keys, width)] * 2 + [(inner, width)] * 2 + [(width, inner)]
    rows = [(f"w{i}", shape, False, BF16) for i, shape in enumerate(shapes)]
    rows += [(f"norm{i}", (width,), False, BF16) for i in range(2)]
    rows += [(f"a{i}", (rank, inside), True, BF16) for i, (_, inside) in enumerate(shapes)]
    rows += [(f"b{i}", (outside, rank), True, BF16) for i, (outside, _) in enumerate(shapes)]
    names = [f"w{i}" for i in range(len(shapes))]
    layers = [lay_out(f"layer {i}", rows, BF16, names) for i in range(80)]
    tables = [lay_out(name, [(name, (128_256, width), False, BF16)], BF16) for name in ("head", "embedding")]
    parts = frozenset(range(80))
    spec = StoreSpec(BF16, resident=parts, split=parts, packing="nf4")
    host_bytes = predict_bytes([*layers, *tables], spec)
    assert host_bytes["packed"] == pytest.approx(35.3e9, rel=0.002)
    assert sum(host_bytes.values()) < 40e9
    assert sum(predict_device_bytes([*layers, *tables], spec).values()) < 3e9
    plain = [lay_out(unit.name, rows, BF16) for unit in layers]
    assert predict_bytes([*plain, *tables], StoreSpec(BF16))["weights"] > 140e9  # without packing


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise ImportError("bitsandbytes")

    packed._functions.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(packed, "load_bitsandbytes", refused)
        with pytest.raises(ConfigError, match="base_dtype=nf4 needs the package bitsandbytes") as caught:
            packed.check_installed("nf4")
    assert caught.value.hint == "pip install bitsandbytes"
    packed.check_installed("nf4")


# What is packed, and its bytes.


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral-aux", "flint"])
def test_linear_weights_and_experts_of_layers_are_packed(name: str) -> None:
    model = host(name, base_dtype="int8")
    for number, unit in enumerate(model.store.units):
        inside = {p.name for p in unit.parameters if p.offset < unit.packed_numel}
        wanted = set()
        for p in unit.parameters if 0 < number < model.skeleton.head else ():
            is_weight = p.name.endswith(".base_layer.weight") or "experts." in p.name
            if is_weight and len(p.shape) > 1 and not p.trainable:
                wanted.add(p.name)
        assert inside == wanted, unit.name
        assert bool(wanted) == (0 < number < model.skeleton.head)
        offsets = [p.offset for p in unit.parameters]
        assert offsets == sorted(offsets) and unit.packed_numel <= unit.wide_offset <= unit.trainable_offset


@pytest.mark.parametrize("kind", ["auto", "int8", "nf4"])
@pytest.mark.parametrize("resident", [0, "trainable"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_is_as_predicted(device: str, resident: Any, kind: str, emulated_cuda: EmulatedCuda) -> None:
    model = host("gpt2", base_dtype=kind, resident=resident, device=device)
    settings, skeleton = model.settings, model.skeleton
    spec = store_spec(settings, skeleton)
    assert spec == replace(model.store.spec, saved=None)
    assert model.store.num_bytes == predict_bytes(skeleton.units, spec)
    assert model.store.device_bytes == predict_device_bytes(skeleton.units, spec)
    found, wanted = model.engine.ops.slot_bytes, slots_of(settings, skeleton, torch.device(device))
    if device == "cpu":  # gradient slots are allocated when they are needed
        found, wanted = ({**one, "gradient_slots": 0} for one in (found, wanted))
        wanted.setdefault("weight_slots", 0)
        wanted |= {"staging_slots": 0} if kind != "auto" else {}
    assert found == wanted
    keys = {"weights", "residual", "exp_avg", "exp_avg_sq", "grads"}
    keys |= {"packed"} if kind != "auto" else set()
    assert model.store.num_bytes.keys() == keys | ({"frozen"} if resident else set())
    if kind != "auto":
        sizes = [packed.packed_bytes(unit.packed_numel, kind) for unit in skeleton.units]
        assert model.store.num_bytes["packed"] == sum(sizes) > 0


# Reading, saving, generating.


def test_a_packed_weight_is_read_as_it_is_computed_with() -> None:
    model, plain = host("llama", base_dtype="nf4"), dict(source("llama").named_parameters())
    name = "model.layers.1.mlp.down_proj"
    store, layout = model.store, model.store.units[2]
    whole = torch.empty(layout.packed_numel, dtype=BF16)
    packed.unpack(store.run("packed", 2), layout.packed_numel, "nf4", whole)
    found = store.weight(f"{name}.base_layer.weight")
    assert torch.equal(found, layout.view(whole, store.locate(f"{name}.base_layer.weight")[1]))
    assert dict(model.named_parameters())[f"{name}.base_layer.weight"].equal(found.float())
    error = (found.float() - plain[f"{name}.weight"]).abs().max()
    assert 0 < error < 0.3 * plain[f"{name}.weight"].abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_dora_changes_nothing_at_first(dtype: str) -> None:
    """Its magnitudes are those of the packed weights: with those of the weights as they were, it would."""
    model = host("llama", adapter="dora", base_dtype="nf4", dtype=dtype)
    batch = batches("llama", 0, 1)
    with_adapter = model.evaluate(batch).loss
    assert with_adapter == model.evaluate(batch, adapter=False).loss
    before = host("llama", adapter="dora", dtype=dtype)
    masters = {name: value for name, value in before.named_parameters() if "magnitude" in name}
    assert masters
    for name, value in masters.items():
        model.store.adopt(name, value)
    assert model.evaluate(batch).loss != with_adapter


def test_an_adapter_is_saved_and_a_packed_model_is_not(tmp_path: Path) -> None:
    host("llama", base_dtype="nf4").save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    model = hz.HostModel.from_pretrained(
        source("llama"), "cpu", skip_memory_check=True, base_dtype="int8", freeze=["mlp"]
    )
    with pytest.raises(ConfigError, match="base_dtype=int8 packed the frozen weights") as caught:
        model.save_pretrained(tmp_path / "model")
    assert "adapter: lora" in str(caught.value.hint) and not (tmp_path / "model").exists()


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_files_of_units_are_equal_from_every_home(kind: str) -> None:
    """A checkpoint of one home is read into another; packed weights are in none."""
    homes = (0, "trainable", ["trainable", "head"])
    frozen = {"adapter": "none", "freeze": ["mlp"], "base_dtype": kind}
    models = [host("llama", resident=resident, **frozen) for resident in homes]
    for unit in range(len(models[0].store.units)):
        one, *others = ([(key, bits(t)) for key, t in units.entries(m.store, unit)] for m in models)
        for other in others:
            assert [key for key, _ in one] == [key for key, _ in other]
            assert all(torch.equal(a, b) for (_, a), (_, b) in zip(one, other, strict=True))
        keys = {key for key, _ in one}
        assert ("weights.model.layers.0.mlp.up_proj.weight" in keys) == (kind == "auto" and unit == 1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["auto", "nf4"])
def test_generation_from_parts(kind: str, device: str, emulated_cuda: EmulatedCuda) -> None:
    from horizon_lm.trainers.generation import named_weights, resident

    model = host("llama", base_dtype=kind, device=device, resident="trainable")
    wanted = None if kind == "auto" else dequantised("llama", kind, "bfloat16")
    plain = host("llama", wanted)
    with resident(model) as whole, resident(plain) as expected:
        found = dict(whole.named_parameters())
        for name, value in expected.named_parameters():
            assert torch.equal(found[name].cpu(), value), name
    assert {name: bits(v.cpu()).sum() for name, v in named_weights(model)} == {
        name: bits(v).sum() for name, v in named_weights(plain)
    }


# Loading.

_MEASURE = """
import json, sys
import torch
import bitsandbytes.functional, peft
torch.set_num_threads(1)
from horizon_lm.host_model import HostModel

def memory():
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(rows["RssAnon"].split()[0]) * 1024

highest, take = [0], None
from horizon_lm.memory.store import HostStore
honest = HostStore.pack
def pack(self, unit, values):
    highest[0] = max(highest[0], memory())
    honest(self, unit, values)
    highest[0] = max(highest[0], memory())
HostStore.pack = pack
HostModel.from_pretrained(sys.argv[1], "cpu", adapter="lora", lora_r=4, base_dtype="int8", resident=0).close()
before, highest[0] = memory(), 0
model = HostModel.from_pretrained(sys.argv[2], "cpu", adapter="lora", lora_r=4, base_dtype="nf4")
units = model.store.units
print(json.dumps({
    "grown": highest[0] - before,
    "store": sum(model.store.num_bytes.values()),
    "unit": 2 * max(unit.packed_numel for unit in units),
    "model": 2 * sum(unit.packed_numel for unit in units),
    "adapter": 4 * sum(unit.trainable_numel for unit in units),
}))
"""


def test_loading_takes_the_packed_size_and_one_unit(tmp_path: Path) -> None:
    """Never the whole model in bf16, which this one would take 126 MB for."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, layers in (("small", 1), ("large", 24)):
        config = LlamaConfig(
            vocab_size=256,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
        )
        LlamaForCausalLM(config).to(BF16).save_pretrained(tmp_path / name)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True,
        text=True,
        timeout=280,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["model"] > 120e6 and found["store"] < 0.4 * found["model"]
    # A piece of 2**18 values takes up to 60 bytes for each while it is packed. The adapter was made in fp32.
    bound = found["store"] + found["unit"] + found["adapter"] + 16e6
    assert found["grown"] < bound < 0.6 * found["model"], found


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The units that are packed from here on."""
    found: list[int] = []
    honest: Callable[..., None] = HostStore.pack

    def pack(self: HostStore, unit: int, given: torch.Tensor) -> None:
        found.append(unit)
        honest(self, unit, given)

    monkeypatch.setattr(HostStore, "pack", pack)
    return found


def stored(model: hz.HostModel) -> list[torch.Tensor]:
    return [model.store.run("packed", unit).clone() for unit in range(len(model.store.units))]


def equal(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_base_is_packed_once(tmp_path: Path, packs: list[int], caplog: pytest.LogCaptureFixture) -> None:
    """Another format or model in the same folder neither uses nor disturbs it."""
    folder = tmp_path / "new" / "cache"
    settings = {"base_dtype": "nf4", "base_cache_dir": str(folder)}
    first = stored(host("llama", **settings))
    assert packs == [1, 2, 3]
    assert equal(stored(host("llama", **settings)), first) and packs == [1, 2, 3]
    host("llama", **(settings | {"base_dtype": "int8"}))
    host("llama", **settings, dtype="float32")
    host("gpt2", **settings)
    assert packs == [1, 2, 3] * 4 and len(list(folder.iterdir())) == 12
    assert equal(stored(host("llama", **settings)), first) and packs == [1, 2, 3] * 4
    changed = source("llama")
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    hz.HostModel.from_pretrained(changed, "cpu", skip_memory_check=True, **LORA, **settings)
    assert packs == [*[1, 2, 3] * 4, 2]
    assert not [record for record in caplog.records if record.name.startswith("horizon_lm")]


def test_a_damaged_or_foreign_cache_is_made_again(
    tmp_path: Path, packs: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"base_dtype": "nf4", "base_cache_dir": str(tmp_path)}
    first = stored(host("llama", **settings))
    files = sorted(tmp_path.iterdir())
    flipped = bytearray(files[0].read_bytes())
    flipped[-100] ^= 1
    files[0].write_bytes(flipped)
    files[1].write_bytes(files[2].read_bytes())
    files[2].write_bytes(files[2].read_bytes()[:-10])
    packs.clear()
    assert equal(stored(host("llama", **settings)), first) and sorted(packs) == [1, 2, 3]
    told = sorted(record.getMessage().split(".safetensors ")[1] for record in caplog.records)
    assert told[0].startswith("cannot be read and will be replaced: ")
    assert told[1:] == [
        "is damaged (checksum mismatch) and will be replaced",
        "is not the layer that its name says and will be replaced",
    ]
    assert equal(stored(host("llama", **settings)), first) and len(packs) == 3


def test_a_folder_that_cannot_be_written_is_only_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    model = host("llama", base_dtype="int8", base_cache_dir=str(tmp_path / "file"))
    told = [record.getMessage() for record in caplog.records]
    assert model.store.num_bytes["packed"] and told
    assert sum("cannot be written, so the next run packs again" in text for text in told) == 3


# What is refused.


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        (
            {"adapter": "none", "base_dtype": "nf4"},
            "packs frozen linear weights of layers, and none are frozen",
            "set adapter=lora",
        ),
        (
            {"adapter": "none", "freeze": ["embed", "norm"], "base_dtype": "int8"},
            "packs frozen linear weights of layers, and none are frozen",
            "freeze",
        ),
        (
            {"base_dtype": "bfloat16", "dtype": "float32"},
            "base_dtype=bfloat16 is not supported with dtype=float32",
            "dtype=bfloat16",
        ),
        (
            {"base_dtype": "nf4", "reduction": "exact"},
            "base_dtype=nf4 is not supported with reduction=exact",
            "",
        ),
        (
            {"resident": "trainable", "reduction": "exact"},
            "resident=trainable is not supported with reduction=exact",
            "resident=0",
        ),
    ],
)
def test_refused_by_name(settings: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        host("llama", **settings)
    assert hint in str(caught.value.hint)


def test_a_run_without_an_adapter_is_refused_at_once(tmp_path: Path) -> None:
    from horizon_lm.checkpoint.folder import RunFolder
    from horizon_lm.config import TrainConfig
    from horizon_lm.training.checks import check_sources

    folder, run = tmp_path / "base", RunFolder(tmp_path / "run")
    folder.mkdir()
    config = TrainConfig(datasets=["python-stdlib"], model_name_or_path=str(folder), freeze=["mlp"])
    check_sources(config, run)
    with pytest.raises(ConfigError, match="base_dtype=nf4 without an adapter: the packed weights could not"):
        check_sources(config.replace(base_dtype="nf4"), run)
    check_sources(config.replace(base_dtype="nf4", adapter="lora", freeze=[]), run)


def test_ranks_are_refused_before_anything_is_loaded() -> None:
    model = host("llama")
    for settings in ({"base_dtype": "nf4"}, {"resident": "trainable"}):
        with pytest.raises(ConfigError, match="is not supported with 2 ranks"):
            store_spec(model.settings.replace(**settings), model.skeleton, hz_shard(2))
    assert not store_spec(model.settings, model.skeleton, hz_shard(2)).split


def hz_shard(world: int) -> Any:
    from horizon_lm.memory.shards import Shard

    return Shard(0, world)


def test_a_bf16_base_of_a_bf16_model_is_as_ever() -> None:
    one, two = (host("llama", base_dtype=word) for word in ("auto", "bfloat16"))
    assert one.memory_bytes() == two.memory_bytes() and not two.store.spec.packing
    out = [model.forward_backward(batches("llama", 0, 2)).loss for model in (one, two)]
    assert out[0] == out[1]
