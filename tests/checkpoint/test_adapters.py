"""Checkpoints of runs with an adapter hold the adapter alone, and a fingerprint of the base."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapter_runs import adapter_settings, by_peft, changed_copy, make_base, manifest_of, state_of
from adapter_runs import base as base
from adapter_runs import run as run
from adapter_runs import text as text
from horizon_lm import cli
from horizon_lm.checkpoint import manifest as manifests
from horizon_lm.checkpoint.folder import open_checkpoint
from horizon_lm.checkpoint.identify import identify
from horizon_lm.errors import CheckpointError, ConfigError, OtherBaseError
from horizon_lm.host_model import HostModel
from horizon_lm.model.fingerprint import Fingerprinter, differing
from horizon_lm.training.checkpoint_series import checkpoint_bytes
from horizon_lm.training.resume import load_checkpoint
from horizon_lm.training.train import train
from saved_models import resealed
from small_runs import losses_of, settings
from threaded_ranks import ThreadedRanks, on_ranks

pytestmark = pytest.mark.usefixtures("one_thread", "no_samples")

REGIONS = {"weights", "exp_avg", "exp_avg_sq"}


def model_of(base: Path, **changes: Any) -> HostModel:
    asked = {"adapter": "lora", "lora_r": 4, "skip_memory_check": True, "dtype": "float32", **changes}
    return HostModel.from_pretrained(base, device="cpu", **asked)


def plain_model(base: Path) -> HostModel:
    return HostModel.from_pretrained(base, device="cpu", dtype="float32", skip_memory_check=True)


def test_a_checkpoint_holds_the_adapter_alone(run: Path, base: Path, text: Path, tmp_path: Path) -> None:
    place = run / "checkpoint-6"
    found = {key: t for file in sorted(place.glob("unit-*")) for key, t in load_file(file).items()}
    model = model_of(base)
    trained = {p.name for unit in model.skeleton.units for p in unit.trainable}
    assert {key.partition(".")[0] for key in found} == REGIONS
    assert {key.partition(".")[2] for key in found} == trained and all(".lora_" in name for name in trained)
    assert manifest_of(place)["version"] == 3
    assert sorted(manifest_of(place)["base"]) == ["embedding", "head", "layer 0", "layer 1"]
    written = sum(tensor.nbytes for tensor in found.values())
    assert (
        written
        == checkpoint_bytes(model)
        < 0.5 * sum(t.nbytes for t in load_file(base / "model.safetensors").values())
    )
    assert cli.main(["verify", str(run)]) == 0
    # The control: the run of a whole model, also with frozen parameters, has what it had.
    for number, more in enumerate(({}, {"freeze": ["mlp"]})):
        place = tmp_path / f"whole-{number}" / "checkpoint-1"
        train(settings(text, place.parent, max_steps=1, **more))
        values = manifest_of(place)
        assert values["version"] == 1 and "base" not in values and "adapter" not in values["state"]
        keys = load_file(place / "unit-00001.safetensors")
        assert "weights.model.layers.0.mlp.up_proj.weight" in keys


def test_a_fingerprint_tells_bases_apart_and_nothing_else(base: Path, tmp_path: Path) -> None:
    """Neither the run's dtype, nor its adapter, nor the number of ranks that read the base matters."""
    expected = model_of(base).base_fingerprint()
    assert expected is not None
    for more in ({"dtype": "bfloat16"}, {"lora_r": 2, "target_modules": ["q_proj"]}, {"adapter": "dora"}):
        assert model_of(base, **more).base_fingerprint() == expected
    assert model_of(shutil.copytree(base, tmp_path / "copy")).base_fingerprint() == expected
    other = model_of(changed_copy(base, tmp_path / "other")).base_fingerprint()
    assert other is not None and differing(expected, other) == ["layer 1"]
    rounded = model_of(make_base(tmp_path / "rounded", dtype=torch.bfloat16)).base_fingerprint()
    assert rounded is not None and differing(expected, rounded) == list(expected)
    assert plain_model(base).base_fingerprint() is None
    saved = model_of(base, modules_to_save=["lm_head"]).base_fingerprint()
    assert saved == expected  # its first values are the base's too

    units = [(0, "a", [1.0]), (1, "b", [2.0, 3.0]), (1, "b", [4.0]), (2, "c", [])]

    def of_ranks(world: int) -> list[Any]:
        found = []

        def work(ranks: ThreadedRanks) -> None:
            print_of = Fingerprinter(ranks.rank, ranks.world)
            for number, (unit, name, value) in enumerate(units):
                print_of.add(unit, name, f"{name}.{number}", torch.tensor(value))
            found.append(print_of.of_all(ranks))

        on_ranks(world, work)
        return found

    (alone,) = of_ranks(1)
    assert list(alone) == ["a", "b", "c"] and of_ranks(2) == [alone] * 2 and of_ranks(4) == [alone] * 4


def test_another_base_is_refused_by_name(run: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    copy = shutil.copytree(run, tmp_path / "run")
    before = {p.name: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    other = changed_copy(base, tmp_path / "other")
    assert cli.main(["resume", str(copy), f"model_name_or_path={other}", "max_steps=8"]) == 5
    shown = capsys.readouterr().err
    assert (
        f"checkpoint-6 holds an adapter of another base than {other}: other weights in layer 1 (1 of 4"
        in shown
    )
    assert "hint: set model_name_or_path to the model that the run began with" in shown
    assert {p.name: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before
    # The control: the same model at another place is the base.
    moved = shutil.copytree(base, tmp_path / "moved")
    assert cli.main(["resume", str(copy), f"model_name_or_path={moved}", "max_steps=8"]) == 0
    assert [step for step, _ in losses_of(copy)] == list(range(1, 9))


def test_a_base_that_is_gone_is_named(run: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    """The checkpoint of a whole model replaces the model's folder; that of an adapter cannot."""
    copy, moved = shutil.copytree(run, tmp_path / "run"), tmp_path / "moved"
    settings_file = copy / "config.resolved.yaml"
    settings_file.write_text(settings_file.read_text().replace(str(base), str(tmp_path / "gone")))
    assert cli.main(["resume", str(copy), "max_steps=8"]) == 2
    shown = capsys.readouterr().err
    assert (
        f"model_name_or_path='{tmp_path / 'gone'}' does not exist, and {copy / 'checkpoint-6'} holds" in shown
    )
    assert "holds an adapter" in shown and "hint: model_name_or_path=NEW" in shown
    shutil.copytree(base, moved)
    assert cli.main(["resume", str(copy), f"model_name_or_path={moved}", "max_steps=7"]) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lora_r": 2}, "lora_r was 4, is 2"),
        ({"target_modules": ["q_proj"]}, "target_modules was 'all-linear', is ['q_proj']"),
        ({"adapter": "dora"}, "adapter was 'lora', is 'dora'"),
    ],
)
def test_another_adapter_is_refused_by_its_settings(
    change: dict[str, Any], said: str, run: Path, base: Path, text: Path, tmp_path: Path
) -> None:
    source = str(run / "checkpoint-6")
    with pytest.raises(ConfigError) as error:
        train(
            adapter_settings(
                text, tmp_path / "new", base, resume_from_checkpoint=source, max_steps=8, **change
            )
        )
    assert "cannot be changed in a run" in error.value.message and said in error.value.message
    assert not (tmp_path / "new").exists()


def test_another_adapter_is_refused_by_its_tensors(run: Path, base: Path, tmp_path: Path) -> None:
    """As a model has it that was built in Python, without the run's settings."""
    checkpoint = open_checkpoint(run / "checkpoint-6")
    for change, said in (
        ({"lora_r": 2}, r"lora_A.default.weight is F32 \[4, 32\], expected F32 \[2, 32\]"),
        ({"target_modules": ["q_proj"]}, "which the model does not have"),
        ({"target_modules": "all-linear", "adapter": "dora"}, "has no tensor .*lora_magnitude_vector"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load_checkpoint(checkpoint, model_of(base, **change))
    with pytest.raises(CheckpointError, match="holds an adapter, and a model without adapter is trained"):
        load_checkpoint(checkpoint, plain_model(base))
    with pytest.raises(OtherBaseError, match="layer 1"):
        load_checkpoint(checkpoint, model_of(changed_copy(base, tmp_path / "other")))
    load_checkpoint(checkpoint, model_of(base))  # the control


def test_a_whole_model_is_not_the_checkpoint_of_an_adapter(base: Path, text: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    train(adapter_settings(text, whole, base, adapter=None, max_steps=1))
    with pytest.raises(CheckpointError, match="holds a whole model, and an adapter is trained"):
        load_checkpoint(open_checkpoint(whole / "checkpoint-1"), model_of(base))


def test_a_torn_checkpoint_is_skipped(run: Path, tmp_path: Path, capsys: Any) -> None:
    """A file cut short, one with a flipped bit, one that is missing: the checkpoint before is taken."""
    for number, tear in enumerate(("cut", "flip", "remove", "config")):
        copy = shutil.copytree(run, tmp_path / str(number))
        file = (
            copy / "checkpoint-6" / ("adapter_config.json" if tear == "config" else "unit-00002.safetensors")
        )
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.unlink()
        if tear != "remove":
            file.write_bytes(data[: len(data) // 2] if tear == "cut" else data)
        assert cli.main(["verify", str(copy)]) == 5
        capsys.readouterr()
        assert cli.main(["export", str(copy), str(tmp_path / f"out-{number}")]) == 0
        said = capsys.readouterr()
        assert "checkpoint-4 (step 4) to" in said.out and str(file) in said.err, tear
        if tear != "config":
            assert cli.main(["resume", str(copy), "max_steps=7"]) == 0
            assert state_of(copy / "checkpoint-4") == state_of(run / "checkpoint-4")


def test_a_manifest_of_an_adapter_is_checked(run: Path, tmp_path: Path) -> None:
    """Every value of the new part; and readers that do not know the format say so."""
    for number, (change, said) in enumerate(
        (
            ({"base": None}, "base is None"),
            ({"base": {}}, "base is {}"),
            ({"base": {"layer 0": "x"}}, "base.layer 0 is 'x'"),
            ({"base": {"layer 0": 7}}, "base.layer 0 is 7"),
            ({"version": 5}, "has format version 5, expected 1 to 4"),
        )
    ):
        copy = shutil.copytree(run / "checkpoint-6", tmp_path / f"checkpoint-{number}")
        resealed(copy, lambda values, change=change: values.update(change))
        with pytest.raises(CheckpointError) as error:
            open_checkpoint(copy)
        assert said in error.value.message
    found = open_checkpoint(run / "checkpoint-6").manifest
    assert manifests.parse(found.to_bytes(), "here") == found
    assert found.base is not None and found.ranks == 1


def test_a_run_and_a_folder_with_an_adapter_are_identified(run: Path, base: Path, tmp_path: Path) -> None:
    looked = identify(run)
    assert looked.is_finished and looked.is_adapter and looked.model == run / "model"
    assert looked.what == f"this run is finished (6 of 6 steps); its adapter is in {run / 'model'}"
    folder = identify(run / "model")
    assert folder.kind == "model" and folder.what == "it is an adapter in Hugging Face format"
    assert identify(base).what == "it is a model in Hugging Face format" and not identify(base).is_adapter
    (tmp_path / "half").mkdir()
    shutil.copy(run / "model" / "adapter_config.json", tmp_path / "half")
    assert identify(tmp_path / "half").kind == "folder"  # no weights


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_packed_bases_resume_and_merge_as_they_were(
    kind: str, base: Path, text: Path, tmp_path: Path
) -> None:
    """The base is packed again from the model; merging reads it in its own precision."""
    common = {"base_dtype": kind, "dtype": "bfloat16", "save_steps": 2, "lr_scheduler_type": "constant"}
    common["save_dtype"] = "float32"
    straight, place = tmp_path / "straight", tmp_path / "run"
    train(adapter_settings(text, straight, base, max_steps=4, **common))
    train(adapter_settings(text, place, base, max_steps=2, **common))
    assert cli.main(["resume", str(place), "max_steps=4"]) == 0
    assert state_of(place / "checkpoint-4") == state_of(straight / "checkpoint-4")
    assert losses_of(place) == losses_of(straight)
    names = {key for file in (place / "checkpoint-4").glob("unit-*") for key in load_file(file)}
    assert names and all(".lora_" in name for name in names)
    plain = model_of(base).base_fingerprint()
    assert manifest_of(place / "checkpoint-4")["base"] == plain
    assert cli.main(["export", str(place), str(tmp_path / "out"), "--merge", "--dtype", "float32"]) == 0
    expected = dict(by_peft(place / "model", base).merge_and_unload().named_parameters())
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    other = changed_copy(base, tmp_path / "other")
    assert cli.main(["resume", str(place), "max_steps=5", f"model_name_or_path={other}"]) == 5


def test_packed_weights_need_an_adapter(base: Path, text: Path, tmp_path: Path) -> None:
    """They are not those of the model any more: nothing could be saved at the end of a run. A model in
    Python trains, and its checkpoint leaves the packed weights out."""
    packed = {"freeze": ["mlp"], "base_dtype": "int8"}
    with pytest.raises(ConfigError) as error:
        train(adapter_settings(text, tmp_path / "run", base, adapter=None, **packed))
    assert "base_dtype" in error.value.message and "adapter: lora" in str(error.value.hint)
    assert not (tmp_path / "run").exists()
    common = {"device": "cpu", "dtype": "float32", "skip_memory_check": True}
    model = HostModel.from_pretrained(base, **common, **packed)
    saved, fingerprint = model.store.spec.saved, model.base_fingerprint()
    assert saved is not None and fingerprint is not None and list(fingerprint) == ["layer 0", "layer 1"]
    assert not any("mlp" in name for name in saved) and "lm_head.weight" in saved
