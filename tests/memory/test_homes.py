"""Homes of units: host memory, or the device. An emulated device refuses to be read as host memory."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import zoo
from emulated_cuda import CUDA, EmulatedCuda
from emulated_cuda import emulated_cuda as emulated_cuda
from fake_cuda import fake_cuda as fake_cuda
from horizon_lm import host_model
from horizon_lm.checkpoint import sources, units
from horizon_lm.checkpoint.disk import Disk, HashedFile, checksum
from horizon_lm.checkpoint.folder import Checkpoint
from horizon_lm.checkpoint.manifest import Manifest
from horizon_lm.checkpoint.reader import load_units
from horizon_lm.config import ModelSettings, TrainConfig
from horizon_lm.engine import policies
from horizon_lm.engine.homes import resident_order, resident_units
from horizon_lm.engine.policies import Policies, store_spec
from horizon_lm.errors import ConfigError, DoesNotFitError
from horizon_lm.host_model import HostModel
from horizon_lm.memory import preflight
from horizon_lm.memory.layout import UnitLayout, lay_out
from horizon_lm.memory.preflight import check_memory
from horizon_lm.memory.regions import GradientSlabs, StoreSpec, predict_bytes, predict_device_bytes
from horizon_lm.memory.slots import WeightSlots, gradient_slot_numels, weight_slot_numels
from horizon_lm.memory.store import HostStore
from horizon_lm.preference.reference import weights_hash

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")
GB = 10**9
PLACEMENTS = [frozenset({0}), frozenset({1, 3}), frozenset({0, 1, 2, 3})]

pytestmark = pytest.mark.usefixtures("one_thread")


def layouts(dtype: torch.dtype) -> list[UnitLayout]:
    """Units with frozen, wide and trainable parameters, with padding between them."""
    return [
        lay_out(
            f"u{i}",
            [
                (f"u{i}.frozen", (3, size), False, dtype),
                (f"u{i}.wide", (size,), True, FP32),
                (f"u{i}.weight", (size, 5), True, dtype),
            ],
            dtype,
        )
        for i, size in enumerate((40, 33, 7, 128))
    ]


def filled(spec: StoreSpec, device: torch.device = CPU) -> HostStore:
    store = HostStore(layouts(spec.dtype), spec, pin_for=device, device=device)
    draw = torch.Generator().manual_seed(0)
    for name in store.names():
        unit, parameter = store.locate(name)
        store.adopt(name, torch.randn(parameter.shape, generator=draw))
        for region in ("exp_avg", "exp_avg_sq", "grads") if parameter.trainable else ():
            view = store.units[unit].trainable_view(store.run(region, unit), parameter)
            view.copy_(torch.randn(parameter.shape, generator=draw))
    return store


def written(store: HostStore, folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    for unit in range(len(store.units)):
        file = HashedFile(Disk(), folder / units.file_name(unit))
        units.write(file, units.entries(store, unit), lambda: True)
        file.close()
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def read(store: HostStore, folder: Path) -> None:
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    files = {name: (len(data), checksum(data)) for name, data in content.items()}
    load_units(Checkpoint(folder, Manifest(0, 0, files, {}, {})), store)


@pytest.mark.parametrize("resident", PLACEMENTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("slabs", [None, GradientSlabs(2, frozenset({2, 3}))])
def test_bytes_per_home_are_the_predicted_ones(
    resident: frozenset[int], dtype: torch.dtype, slabs: GradientSlabs | None, emulated_cuda: EmulatedCuda
) -> None:
    spec = StoreSpec(dtype, slabs=slabs, resident=resident, sums=frozenset({0, 1}), sum_slabs=2)
    rows = layouts(dtype)
    store = HostStore(rows, spec, pin_for=CUDA, device=CUDA)
    assert store.num_bytes == predict_bytes(rows, spec)
    assert store.device_bytes == predict_device_bytes(rows, spec)
    for region in ("weights", "exp_avg", "exp_avg_sq", *(["grads"] if slabs is None else [])):
        for unit in range(len(rows)):
            run = store.run(region, unit)
            assert emulated_cuda.is_on_device(run) == (unit in resident) == store.is_resident(unit)
            assert not run.any()
            if region in ("weights", "grads"):
                assert emulated_cuda.is_pinned(run) == (unit not in resident)
    for unit in (0, 1):  # sums wait in host memory wherever the unit lives
        assert not emulated_cuda.is_on_device(store.sum_run(unit)) and store.sum_run(unit).dtype == FP32
        assert store.sum_run(unit).numel() == rows[unit].trainable_numel <= store.sum_slab(1).numel()
    # A unit takes as many bytes in one home as in the other.
    plain = StoreSpec(dtype, slabs=slabs)
    here, there = (sum(predict_bytes(rows, StoreSpec(dtype, resident=r)).values()) for r in ((), resident))
    on_device = predict_device_bytes(rows, StoreSpec(dtype, resident=resident))
    assert here == there + sum(on_device.values())
    assert predict_device_bytes(rows, plain) == {}
    if slabs is not None and len(resident) == len(rows):
        assert store.num_bytes["grad_slabs"] == 0


@pytest.mark.parametrize("resident", PLACEMENTS)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_every_home_gives_the_same_host_tensors(
    resident: frozenset[int], dtype: torch.dtype, emulated_cuda: EmulatedCuda
) -> None:
    plain, placed = filled(StoreSpec(dtype)), filled(StoreSpec(dtype, resident=resident), CUDA)
    for name in plain.names():
        for reader in (HostStore.weight, HostStore.master):
            one, other = reader(plain, name), reader(placed, name)
            assert torch.equal(one, other) and not emulated_cuda.is_on_device(other)
    for unit in range(len(plain.units)):
        copy = placed.host_copy("exp_avg", unit)
        assert torch.equal(plain.host_copy("exp_avg", unit), copy)
        assert not emulated_cuda.is_on_device(copy)
        # A unit of the host is not copied.
        assert (copy.data_ptr() == placed.run("exp_avg", unit).data_ptr()) == (unit not in resident)
    assert not emulated_cuda.mixed


@pytest.mark.parametrize("resident", PLACEMENTS)
def test_unit_files_are_equal_and_read_into_any_home(
    resident: frozenset[int], emulated_cuda: EmulatedCuda, tmp_path: Path
) -> None:
    spec, placed_spec = StoreSpec(BF16), StoreSpec(BF16, resident=resident)
    plain, placed = filled(spec), filled(placed_spec, CUDA)
    expected = written(plain, tmp_path / "plain")
    assert written(placed, tmp_path / "placed") == expected
    empty = HostStore(layouts(BF16), placed_spec, pin_for=CUDA, device=CUDA)
    read(empty, tmp_path / "plain")
    assert written(empty, tmp_path / "again") == expected
    back = HostStore(layouts(BF16), spec)
    read(back, tmp_path / "placed")
    assert written(back, tmp_path / "back") == expected
    # Negative control: the emulated device refuses to be read as host memory.
    unit = min(resident)
    with pytest.raises(TypeError, match="device type tensor"):
        units.as_bytes(units.entries(placed, unit)[0][1])


def test_residents_are_copied_piece_by_piece(
    emulated_cuda: EmulatedCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled(StoreSpec(BF16, resident=frozenset({0, 1, 2, 3})), CUDA)
    copies: list[weakref.ref[torch.Tensor]] = []
    real = units.as_bytes

    def counted(tensor: torch.Tensor) -> memoryview:
        assert not [held for held in copies if held() is not None]
        copies.append(weakref.ref(tensor.untyped_storage()))
        assert tensor.untyped_storage().nbytes() <= 300
        return real(tensor)

    for module in (units, sources):
        monkeypatch.setattr(module, "as_bytes", counted)
        monkeypatch.setattr(module, "PIECE_BYTES", 300)
    written(store, tmp_path / "files")
    entries = [t for unit in range(len(store.units)) for _, t in units.entries(store, unit)]
    count = sum(max(1, math.ceil(t.nbytes / 300)) for t in entries)
    assert len(copies) == count > 2 * len(entries)
    read(store, tmp_path / "files")
    assert len(copies) == 2 * count
    # Negative control: two that are held at once are found.
    held = [tensor.cpu() for _, tensor in units.entries(store, 2)[:2]]
    counted(held[0])
    with pytest.raises(AssertionError):
        counted(held[1])


def test_a_resident_needs_no_slot(emulated_cuda: EmulatedCuda) -> None:
    store = filled(StoreSpec(BF16, resident=frozenset({1})), CUDA)
    slots = WeightSlots(store, [store.units[0].slot_numel], CUDA, alias=False)
    slots.upload(-1, 1)
    found = slots.unit(-1, 1)
    assert found.weights.data_ptr() == store.run("weights", 1).data_ptr()
    assert torch.equal(found.wide_residual, store.run("residual", 1)[: store.units[1].wide_numel])
    slots.upload(0, 0)
    assert slots.unit(0, 0).weights.data_ptr() != store.run("weights", 0).data_ptr()


# Models.


def model(device: str = "cuda", **settings: Any) -> HostModel:
    source = zoo._from_config(zoo.CASES["llama"].config(), FP32, seed=0, attn="sdpa")
    return HostModel.from_pretrained(source, device=device, skip_memory_check=True, **settings)


@pytest.mark.parametrize("resident", [1, 3, ["head", "layer 1"]])
def test_a_model_is_read_and_exported_the_same_from_every_home(
    resident: Any, emulated_cuda: EmulatedCuda, tmp_path: Path
) -> None:
    plain, placed = model("cpu"), model(resident=resident)
    count = resident if isinstance(resident, int) else len(resident)
    assert len(placed.store.spec.resident) == count
    found = placed.memory_bytes()
    assert found["resident_weights"] > 0 and "resident_weights" not in plain.memory_bytes()
    expected = dict(plain.named_parameters())
    for name, value in placed.named_parameters():
        assert torch.equal(value, expected[name]) and not emulated_cuda.is_on_device(value)
    assert weights_hash(placed) == weights_hash(plain)
    for dtype in ("bfloat16", "float32"):
        for which, one in (("plain", plain), ("placed", placed)):
            one.save_pretrained(tmp_path / dtype / which, dtype=dtype)
        left, right = ((tmp_path / dtype / n / "model.safetensors").read_bytes() for n in ("plain", "placed"))
        assert left == right
        assert load_file(tmp_path / dtype / "placed" / "model.safetensors")
    assert not emulated_cuda.mixed


def test_edited_gradients_count_wherever_a_unit_lives(emulated_cuda: EmulatedCuda) -> None:
    for resident in (0, 2, 4):
        source = zoo._from_config(zoo.CASES["llama"].config(), FP32, seed=0, attn="sdpa")
        model = HostModel.from_pretrained(source, device="cuda", lanes="inline", resident=resident)
        before = dict(model.named_parameters())
        model.forward_backward([zoo.batch("llama", length=8)])
        for _, gradient in model.named_gradients():
            gradient.zero_()
        model.step(lr=1e-2, weight_decay=0.0)
        assert all(torch.equal(before[name], value) for name, value in model.named_parameters())
    # Negative control: gradients as they are.
    model.train_step([zoo.batch("llama", length=8)], lr=1e-2)
    assert not any(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_generation_copies_no_resident_unit(emulated_cuda: EmulatedCuda) -> None:
    from horizon_lm.trainers.generation import copy_bytes, named_weights, resident

    plain, placed = model(), model(resident=2)
    lying = sum(placed.store.units[u].slot_numel for u in placed.store.spec.resident)
    assert copy_bytes(plain) - copy_bytes(placed) == lying * 2 > 0
    weights = dict(named_weights(plain))
    for name, value in named_weights(placed):
        assert emulated_cuda.is_on_device(value) and torch.equal(value, weights[name])
        own = placed.store.weight_view(name)
        assert value.data_ptr() != own.data_ptr(), "the caller keeps it"
    unit = min(placed.store.spec.resident)
    with resident(placed) as whole:
        parameter = dict(whole.named_parameters())[placed.store.units[unit].parameters[0].name]
        assert (
            parameter.data_ptr()
            == placed.store.weight_view(placed.store.units[unit].parameters[0].name).data_ptr()
        )


# Settings.


def resolve(model: HostModel, **settings: Any) -> list[str]:
    found = resident_units(ModelSettings(**settings), model.skeleton)
    return [model.store.units[u].name for u in resident_order(model.skeleton) if u in found]


@pytest.fixture(scope="module")
def shape() -> HostModel:
    return model("cpu")


def test_residents_by_number_and_name(shape: HostModel) -> None:
    order = [shape.store.units[u].name for u in resident_order(shape.skeleton)]
    layers = [f"layer {i}" for i in range(shape.skeleton.num_layers)]
    assert order == (["head"] if shape.skeleton.anatomy.tied else ["embedding", "head"]) + layers
    assert resolve(shape) == resolve(shape, resident=0) == resolve(shape, resident=[]) == []
    assert resolve(shape, resident=2) == order[:2]
    assert resolve(shape, resident=["layer 1"]) == ["layer 1"]
    policies = Policies.of(ModelSettings(resident=2), shape.skeleton)
    assert policies.resident and not policies.resident & policies.uploaded
    assert policies.resident | policies.uploaded == Policies.of(ModelSettings(), shape.skeleton).uploaded


@pytest.mark.parametrize(
    ("value", "message", "hint"),
    [
        (99, "resident=99, but the model has", "resident=0"),
        (["layer 9"], "'layer 9', which is not a unit", "layer 0 to layer"),
        (["idle"], "'idle', which is not a unit", "head"),
        (["layer1"], "'layer1', which is not a unit", "did you mean 'layer 1'?"),
        (["head", "heads"], "'heads', which is not a unit", "did you mean 'head'?"),
        (["layer9"], "'layer9', which is not a unit", "layer 0 to layer"),
        (["head", "head"], "'head' twice", "once"),
        (-1, "resident", None),
        ("all", "resident", None),
        (True, "resident", None),
    ],
)
def test_residents_that_the_model_lacks_are_refused(
    value: Any, message: str, hint: str | None, shape: HostModel
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        resolve(shape, resident=value)
    if hint is not None:
        assert caught.value.hint is not None and hint in caught.value.hint


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_tied_embedding_table_is_a_name_of_the_head(is_tied: bool) -> None:
    config = zoo.CASES["llama"].config()
    config.tie_word_embeddings = is_tied
    source = zoo._from_config(config, FP32, seed=0, attn="sdpa")
    host = HostModel.from_pretrained(source, device="cpu", skip_memory_check=True)
    assert host.skeleton.anatomy.tied == is_tied
    assert resolve(host, resident=["embedding"]) == ["head" if is_tied else "embedding"]
    both = ["head"] if is_tied else ["embedding", "head"]
    assert resolve(host, resident=["embedding", "head"]) == both
    assert resolve(host, resident=["embedding", "layer 0"]) == [both[0], "layer 0"]
    with pytest.raises(ConfigError, match="'embeddings', which is not a unit") as caught:
        resolve(host, resident=["embeddings"])
    assert caught.value.hint == "did you mean 'embedding'?"


def train_config(**settings: Any) -> TrainConfig:
    return TrainConfig(model_name_or_path="m", datasets=["d.jsonl"], **settings)


def test_rounds_that_do_not_divide_are_refused() -> None:
    assert train_config(rounds=3, gradient_accumulation_steps=6).rounds == 3
    with pytest.raises(ConfigError, match="rounds: 4 does not divide") as caught:
        train_config(rounds=4, gradient_accumulation_steps=6)
    assert caught.value.hint == "set rounds=3, or gradient_accumulation_steps=8"
    with pytest.raises(ConfigError, match="does not divide"):
        train_config(rounds=2)
    assert train_config(rounds=4, tokens_per_step=4096).rounds == 4  # the planner cuts the step
    with pytest.raises(ConfigError, match="needs one micro-batch per round"):
        train_config(rounds=3, gradient_accumulation_steps=6, round_sums="add")
    assert train_config(rounds=6, gradient_accumulation_steps=6, round_sums="add").round_sums == "add"
    with pytest.raises(ConfigError):
        train_config(rounds=0)


def test_rounds_of_a_step(shape: HostModel) -> None:
    of = Policies.of(ModelSettings(rounds=4, device="cpu"), shape.skeleton)
    rounds = {count: of.step_spec(count).rounds for count in (1, 3, 4, 5, 8)}
    assert rounds == {1: 1, 3: 3, 4: 4, 5: 3, 8: 4}
    assert of.step_spec(8, evaluate=True).rounds == 1
    spec = of.step_spec(4)
    numels = gradient_slot_numels(shape.store.units, spec)
    own = [shape.store.units[u].trainable_numel for u in spec.own_grad_slots]
    assert len(own) == shape.skeleton.num_layers and numels[spec.grad_slots + 1 :] == own
    assert set(numels[: spec.grad_slots]) == {0}, "no unit uses the ring"
    assert of.step_spec(1).own_grad_slots == spec.own_grad_slots, "nor does a step of one round"
    plain = Policies.of(ModelSettings(device="cpu"), shape.skeleton).step_spec(1)
    assert gradient_slot_numels(shape.store.units, plain)[:-1] == [max(own)] * plain.grad_slots
    adds = Policies.of(ModelSettings(rounds=4, round_sums="add"), shape.skeleton)
    with pytest.raises(ConfigError, match="needs one micro-batch per round"):
        adds.step_spec(8)
    assert adds.step_spec(4).own_grad_slots == ()


def test_sums_take_memory_only_on_the_host(shape: HostModel) -> None:
    def sums(**settings: Any) -> tuple[int, int]:
        spec = store_spec(ModelSettings(**settings), shape.skeleton)
        parts = predict_bytes(shape.store.units, spec)
        return parts.get("sums", 0), parts.get("sum_slabs", 0)

    layers = [shape.store.units[i + 1].trainable_numel for i in range(shape.skeleton.num_layers)]
    assert sums() == sums(rounds=4, device="cpu") == sums(round_sums="host") == (0, 0)
    assert sums(rounds=4, device="cuda") == sums(rounds=4, round_sums="host") == (4 * sum(layers), 0)
    assert sums(rounds=4, round_sums="add") == (4 * sum(layers), 2 * 4 * max(layers))


# The check before a run.


def check(free_gb: tuple[float, float], device: torch.device = CUDA, **settings: Any) -> None:
    """Four layers of 14 GB each, and slots of 1 GB in device memory."""
    rows = [lay_out(f"layer {i}", [(f"w{i}", (GB,), True, BF16)], BF16) for i in range(4)]

    def spec_of(settings: ModelSettings) -> StoreSpec:
        number = 0 if settings.resident == "auto" else settings.resident
        assert isinstance(number, int)
        if number > 4:
            raise ConfigError("too many")
        return StoreSpec(BF16, resident=frozenset(range(number)))

    check_memory(
        rows,
        ModelSettings(reserve_host_gb=0.0, **settings),
        spec_of,
        device=device,
        slots_of=lambda settings: {"weight_slots": GB if device == CUDA else 0},
        available={"host": int(free_gb[0] * GB), "device": int(free_gb[1] * GB)},
    )


def test_pooled_memory_holds_what_neither_home_would() -> None:
    check((28, 29), resident=2)
    with pytest.raises(DoesNotFitError, match=r"56.0 GB of host memory .* short by 28.0 GB") as caught:
        check((28, 29))
    assert caught.value.hint is not None and caught.value.hint.startswith("resident=2 fits; ")
    with pytest.raises(DoesNotFitError, match=r"of device memory \(resident_weights 6.00 GB.*") as caught:
        check((28, 29), resident=3)
    assert "weight_slots 1.00 GB" in caught.value.message and "short by 14.0 GB" in caught.value.message
    assert caught.value.hint is not None and caught.value.hint.startswith("resident=2 fits; ")
    with pytest.raises(DoesNotFitError) as caught:
        check((27, 29), resident=2)
    assert caught.value.hint is not None and "fits" not in caught.value.hint


@pytest.mark.parametrize(
    ("device", "share", "settings", "is_refused"),
    [
        ("cuda", 0.5, {"resident": 1}, True),  # host and device together would hold it
        ("cuda", 0.5, {"resident": 4}, False),
        ("cpu", 1.1, {"rounds": 2, "round_sums": "host"}, True),  # sums are not known until layers are
        ("cpu", 2.0, {"rounds": 2, "round_sums": "host"}, False),
    ],
)
def test_a_model_made_by_its_configuration_needs_room_for_all_of_it(
    device: str,
    share: float,
    settings: dict[str, Any],
    is_refused: bool,
    emulated_cuda: EmulatedCuda,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = zoo.CASES["llama"].config()
    plain = HostModel.from_config(config, device="cpu", skip_memory_check=True)
    host = int(share * sum(plain.store.num_bytes.values()))
    for module in (preflight, host_model):
        monkeypatch.setattr(module, "available_host_bytes", lambda stated=None, **_: host)
    monkeypatch.setattr(policies, "free_memory_bytes", lambda device: 1 << 30)

    def make() -> HostModel:
        return HostModel.from_config(config, device=device, reserve_host_gb=0.0, **settings)

    if not is_refused:
        assert sum(make().store.num_bytes.values()) <= host
        return
    with pytest.raises(DoesNotFitError, match="of host memory"):
        make()


def test_on_the_cpu_both_homes_are_host_memory() -> None:
    check((56, 0), CPU, resident=2)
    with pytest.raises(DoesNotFitError, match=r"resident_weights .* short by 1.00 GB"):
        check((55, 100), CPU, resident=2)


@pytest.mark.parametrize("free", [0, 10**4])
def test_a_model_whose_slots_exceed_the_device_is_refused(
    free: int, emulated_cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (free, 1 << 40))
    source = zoo._from_config(zoo.CASES["llama"].config(), FP32, seed=0, attn="sdpa")
    with pytest.raises(DoesNotFitError, match="of device memory"):
        HostModel.from_pretrained(source, device="cuda")


def test_weight_slots_fit_streamed_units_only(shape: HostModel) -> None:
    def numels(resident: int) -> list[int]:
        policies = Policies.of(ModelSettings(resident=resident), shape.skeleton)
        return weight_slot_numels(shape.store.units, policies.step_spec(1))

    assert min(numels(0)) > 0
    assert set(numels(len(resident_order(shape.skeleton)))) == {0}
