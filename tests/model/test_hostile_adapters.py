"""Damaged and hostile adapters are refused in words: no pickle is opened, no code imported, no base read."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import horizon_lm as hz
import zoo
from adapter_runs import make_base
from horizon_lm.errors import ConfigError, DataError, HorizonError, UnsupportedModelError
from horizon_lm.training.generate import Generator
from sizes import times

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter as PEFT saves it."""
    folder = tmp_path_factory.mktemp("source") / "adapter"
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(zoo.build("llama"), config).save_pretrained(folder)
    return folder


def load(folder: Path | str) -> list[str]:
    """Names of the adapter's parameters in the model."""
    with hz.HostModel.from_pretrained(
        zoo.build("llama"), device="cpu", dtype="float32", adapter_name_or_path=str(folder)
    ) as model:
        return [name for name in model.store.names() if ".lora_" in name]


def refused(source: Path, place: Path, change: Change) -> HorizonError:
    folder = shutil.copytree(source, place / "adapter")
    change(folder)
    with pytest.raises((ConfigError, DataError, UnsupportedModelError)) as caught:
        load(folder)
    shutil.rmtree(folder)
    assert caught.value.hint
    return caught.value


def configured(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, **changes}))

    return change


class Bomb:
    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.canary,))


def test_the_control_is_read(source: Path) -> None:
    found = load(source)
    assert len(found) == 4 * zoo.build("llama").config.num_hidden_layers, found


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, PICKLED])
def test_a_pickle_is_never_opened(name: str, source: Path, tmp_path: Path) -> None:
    """Nor one without the weights beside it, which PEFT itself would load."""
    canary = tmp_path / "canary"
    bomb = pickle.dumps(Bomb(canary))

    def change(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(bomb)

    error = refused(source, tmp_path, change)
    assert not canary.exists()
    if name == PICKLED:
        assert f"holds no {WEIGHTS}" in error.message and "never loaded" in str(error.hint)
    pickle.loads(bomb)  # the control
    assert canary.exists()


def test_a_configuration_imports_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modules that it names, in every place that PEFT or transformers know, lie ready to be imported."""
    package = tmp_path / "path"
    (package / "megatron").mkdir(parents=True)
    canary = tmp_path / "canary"
    text = f"import os\nos.mkdir({str(canary)!r})\n"
    for name in ("trap.py", "megatron/__init__.py", "megatron/trap.py"):
        (package / name).write_text(text)
    monkeypatch.syspath_prepend(str(package))
    names = {
        "auto_mapping": {"base_model_class": "Trap", "parent_library": "trap"},
        "auto_map": {"AutoModelForCausalLM": "trap.Trap", "AutoConfig": "trap.Trap"},
        "runtime_config": {"trap": "trap"},
        "custom_modules": {"trap": "trap"},
    }
    for key, value in names.items():
        folder = shutil.copytree(source, tmp_path / key)
        (folder / "trap.py").write_text(text)
        configured(**{key: value})(folder)
        load(folder)
    error = refused(source, tmp_path, configured(megatron_config={"a": 1}, megatron_core="megatron.trap"))
    assert "megatron_config" in error.message
    assert not canary.exists() and not {"trap", "megatron"} & sys.modules.keys()
    __import__("trap")  # the control
    assert canary.exists()


def test_the_base_that_an_adapter_names_is_not_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a model and adapter_name_or_path, it is a text."""
    opened: list[str] = []
    folder = shutil.copytree(source, tmp_path / "adapter")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    configured(base_model_name_or_path=str(base))(folder)
    honest = open

    def noted(path: Any, *args: Any, **named: Any) -> Any:
        opened.append(str(path))
        return honest(path, *args, **named)

    monkeypatch.setattr("builtins.open", noted)
    load(folder)
    assert any(str(folder) in path for path in opened)
    assert not [path for path in opened if str(base) in path]


def test_code_of_the_base_that_an_adapter_names_is_not_run(source: Path, tmp_path: Path) -> None:
    """Its folder alone says which model is loaded, and no setting trusts that one."""
    base, folder, canary = tmp_path / "base", tmp_path / "adapter", tmp_path / "canary"
    zoo.build("llama").save_pretrained(base)
    shutil.copytree(source, folder)
    configured(base_model_name_or_path=str(base))(folder)
    hz.HostModel.from_pretrained(folder, device="cpu").close()  # the control
    values = json.loads((base / "config.json").read_text())
    code = {"AutoConfig": "trap.Trap", "AutoModelForCausalLM": "trap.Trap"}
    (base / "config.json").write_text(json.dumps({**values, "model_type": "trap", "auto_map": code}))
    (base / "trap.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    for run in (
        lambda: hz.HostModel.from_pretrained(folder, device="cpu"),
        lambda: Generator.load(folder, device="cpu"),
    ):
        with pytest.raises(ConfigError) as caught:
            run()
        assert caught.value.hint and not canary.exists()
    with pytest.raises(Exception):  # noqa: B017  (the control: the code is no model)
        hz.HostModel.from_pretrained(folder, device="cpu", trust_remote_code=True)
    assert canary.exists()


def test_an_adapter_that_is_run_reads_nothing_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kinds of PEFT that load further adapters, vectors or modules, which it looks for itself."""
    base, folder, canary = make_base(tmp_path / "base"), tmp_path / "adapter", tmp_path / "canary"
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    honest = (folder / CONFIG).read_text()
    Generator.load(folder, device="cpu")  # the control
    (tmp_path / "path" / "megatron").mkdir(parents=True)
    for name in ("__init__.py", "trap.py"):
        text = f"import os\nos.mkdir({str(canary)!r})\n"
        (tmp_path / "path" / "megatron" / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "path"))
    for changes, said in (
        ({"megatron_config": {"a": 1}, "megatron_core": "megatron.trap"}, "megatron_config"),
        ({"peft_type": "XLORA", "hidden_size": 8, "adapters": {"a": str(source)}}, "XLORA"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}, "PROMPT_TUNING"),
    ):
        configured(**changes)(folder)
        with pytest.raises(UnsupportedModelError, match=said) as caught:
            Generator.load(folder, device="cpu")
        assert caught.value.hint and not canary.exists()
        (folder / CONFIG).write_text(honest)


def test_an_adapter_that_is_run_is_whole(tmp_path: Path) -> None:
    """PEFT would go on without the missing weights."""
    base, folder = make_base(tmp_path / "base"), tmp_path / "adapter"
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    save_file({name: w for name, w in weights.items() if "v_proj" not in name}, folder / WEIGHTS)
    with pytest.raises(HorizonError, match="missing adapter keys"):
        Generator.load(folder, device="cpu")


REFUSED: dict[str, tuple[Change, str]] = {
    "no configuration": (lambda folder: (folder / CONFIG).unlink(), f"holds no {CONFIG}"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
    "an array": (lambda folder: (folder / CONFIG).write_text("[]") and None, "is damaged"),
    "nesting": (lambda folder: (folder / CONFIG).write_text("[" * 100_000) and None, "is damaged"),
    "unknown kind": (configured(peft_type="NONE"), "is damaged"),
    "kind as a list": (configured(peft_type=["LORA"]), "is damaged"),
    "base as a list": (configured(base_model_name_or_path=["a"]), "is damaged"),
    "prompts": (configured(peft_type="PROMPT_TUNING", num_virtual_tokens=4), "PROMPT_TUNING"),
    "rank of a giant": (configured(r=1 << 40), "says rank 1,099,511,627,776"),
    "rank pattern of a giant": (configured(rank_pattern={"q_proj": 1 << 40}), "says rank 1,099,511,627,776"),
    "another rank": (configured(r=3), "does not fit"),
    "rank as text": (configured(r="2"), "PEFT refuses"),
    "no rank": (configured(r=0), "PEFT refuses"),
    "other modules": (configured(target_modules=["k_proj"]), "does not fit"),
    "no such modules": (configured(target_modules=["nothing"]), "PEFT refuses"),
    "a bad pattern": (configured(target_modules="(("), "PEFT refuses"),
    "the base changes": (configured(init_lora_weights="pissa_niter_4"), "init_lora_weights"),
    "biases": (configured(bias="all"), "bias="),
    "tokens": (configured(trainable_token_indices=[1, 2]), "trainable_token_indices"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_is_refused(case: str, source: Path, tmp_path: Path) -> None:
    change, named = REFUSED[case]
    assert named in refused(source, tmp_path, change).message


def test_weights_of_another_base(source: Path, tmp_path: Path) -> None:
    def wider(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        save_file({name: torch.cat([w, w], -1) for name, w in weights.items()}, folder / WEIGHTS)

    def renamed(folder: Path) -> None:
        weights = load_file(folder / WEIGHTS)
        save_file({name.replace("self_attn", "attn"): w for name, w in weights.items()}, folder / WEIGHTS)

    for change in (wider, renamed):
        assert "does not fit the model" in refused(source, tmp_path, change).message


def test_damaged_weights(source: Path, tmp_path: Path) -> None:
    """Cut, noise, or with another header."""
    rng = random.Random(3)

    def cut(folder: Path) -> None:
        os.truncate(folder / WEIGHTS, rng.randrange((folder / WEIGHTS).stat().st_size))

    def noise(folder: Path) -> None:
        (folder / WEIGHTS).write_bytes(rng.randbytes(rng.randrange(1, 3000)))

    def header(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes((1 << 40).to_bytes(8, "little") + data[8:])

    for change in (cut, noise, header):
        for _ in range(times(3, 100)):
            assert WEIGHTS in refused(source, tmp_path, change).message


def test_a_pipe_is_not_waited_for(source: Path, tmp_path: Path) -> None:
    for name in (CONFIG, WEIGHTS):

        def change(folder: Path, name: str = name) -> None:
            (folder / name).unlink()
            os.mkfifo(folder / name)

        assert name in refused(source, tmp_path, change).message


def test_a_folder_that_is_not_there_is_no_name_of_the_hub(tmp_path: Path) -> None:
    for place in (str(tmp_path / "none"), "./none", "~/none-of-these"):
        with pytest.raises(ConfigError, match="is not a folder"):
            load(place)
