"""What is kept of a model from one plan to the next: the same plan, and only for the very same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from horizon_lm import plan as package
from horizon_lm.config import TrainConfig
from horizon_lm.errors import DoesNotFitError
from horizon_lm.plan import largest
from horizon_lm.plan import outline as outline_module
from horizon_lm.plan import outline_cache as module
from horizon_lm.plan.outline_cache import OutlineCache, outline_cache
from horizon_lm.plan.run_plan import plan_run
from horizon_lm.plan.show import describe

TINY: dict[str, Any] = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64}
TINY |= {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
TINY |= {"max_position_embeddings": 64}  # which ends the search for the longest sequence


@pytest.fixture(autouse=True)
def own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of its own; searches end soon."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(largest, "_MOST_ROWS", 8)
    monkeypatch.setattr(largest, "_MOST_LAYERS", 16)


def config_of(**values: Any) -> TrainConfig:
    given = {"init_model": TINY, "datasets": ["none.txt"], "device": "cpu", "max_length": 32}
    return TrainConfig(**{**given, **values})


def planned(config: TrainConfig) -> str:
    with outline_cache(config) as cache:
        return describe(plan_run(config, "cpu-2core", cache=cache), largest=False)


def files() -> list[Path]:
    folder = module.cache_folder()
    return sorted(folder.iterdir()) if folder.exists() else []


MODELS: dict[str, dict[str, Any]] = {
    "kept": {"activations": "keep", "loss_chunk_tokens": 16},
    "experts, fp32 parts": {
        "init_model": {**TINY, "model_type": "mixtral", "num_local_experts": 4, "output_router_logits": True}
    },
    "two kinds": {"init_model": {**TINY, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 16}},
    "tied, frozen, tiles": {
        "init_model": TINY | {"tie_word_embeddings": True},
        "freeze": ["embed_tokens", "layers.0."],
        "mlp_tile_tokens": 16,
    },
}


@pytest.mark.parametrize("name", MODELS)
def test_a_second_plan_is_the_first_one_and_builds_no_model(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(**MODELS[name])
    plain = describe(plan_run(config, "cpu-2core"), largest=False)
    assert planned(config) == plain
    monkeypatch.setattr(outline_module, "_build", lambda *_: pytest.fail("the model was built"))
    assert planned(config) == plain
    with pytest.raises(pytest.fail.Exception):  # the control: without the cache it is built
        plan_run(config, "cpu-2core")


def test_what_the_file_says_is_what_is_planned() -> None:
    """The control of the others: a file with another width gives another plan."""
    config = config_of()
    plain = planned(config)
    with outline_cache(config) as cache:
        assert cache.facts is not None
        found = OutlineCache.from_bytes(cache.to_bytes())
    assert found == cache
    (path,) = files()
    changed = json.loads(module.gzip.decompress(path.read_bytes()))
    changed["facts"]["model_type"] = "another"
    path.write_bytes(module.gzip.compress(json.dumps(changed).encode()))
    assert planned(config) == plain.replace("llama", "another") != plain


def test_another_shape_is_added_to_the_file() -> None:
    planned(config_of())
    (path,) = files()
    before = path.stat().st_size
    other = config_of(max_length=48)
    assert planned(other) == describe(plan_run(other, "cpu-2core"), largest=False)
    assert files() == [path] and path.stat().st_size > before


def model_folder(path: Path, **values: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(TINY | {"architectures": ["LlamaForCausalLM"], **values}))
    return path


def test_whatever_decides_on_the_model_decides_on_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(model_folder(tmp_path / "model"))
    base = config_of(init_model=None, model_name_or_path=folder)
    keys = {"base": module._key(base), "again": module._key(base)}
    assert keys.pop("again") == keys["base"] is not None
    keys["data apart"] = module._key(base.replace(max_length=16, learning_rate=0.5))
    assert keys.pop("data apart") == keys["base"]
    for name, value in {
        "dtype": "float32",
        "attn_implementation": "eager",
        "freeze": ["norm"],
        "mlp_tile_tokens": 8,
    }.items():
        keys[name] = module._key(base.replace(**{name: value}))
    model_folder(tmp_path / "model", rope_theta=5e5)
    keys["config.json"] = module._key(base)
    model_folder(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setenv("TORCH_NNPACK", "0")
        keys["environment"] = module._key(base)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(tmp_path)])
        (tmp_path / "some_kernels-1.0.dist-info").mkdir()
        keys["a package"] = module._key(base)
    code = module._code()
    assert any(name == os.path.join("plan", "outline_cache.py") for name, *_ in code)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_code", lambda: [(name, size, time + 1) for name, size, time in code])
        keys["our code"] = module._key(base)
    assert module._key(base) == keys["base"]
    assert None not in keys.values() and len(set(keys.values())) == len(keys)
    assert module._key(base.replace(trust_remote_code=True)) is None
    assert module._key(base.replace(new_tokens=["<a>"])) is None
    assert module._key(base.replace(model_name_or_path=str(tmp_path / "nothing"))) is None


def test_a_damaged_file_is_as_none_and_is_written_anew() -> None:
    config = config_of()
    planned(config)
    (path,) = files()
    whole = path.read_bytes()
    found = OutlineCache.from_bytes(whole)
    empty = [b"", b"no gzip", module.gzip.compress(b"{}"), module.gzip.compress(b"[")]
    for data in (*empty, whole[: len(whole) // 2], whole[:-9] + b"123456789"):
        path.write_bytes(data)
        with outline_cache(config) as cache:
            assert cache == OutlineCache()
            cache.facts, cache.traces = found.facts, found.traces
        assert OutlineCache.from_bytes(path.read_bytes()) == found
    assert files() == [path]


def test_a_place_that_cannot_be_written_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    assert "limited by" in planned(config_of())


def test_of_many_files_the_oldest_go() -> None:
    folder = module.cache_folder()
    folder.mkdir(parents=True)
    for i in range(module._MOST_FILES + 5):
        (folder / f"{i:03d}.json.gz").write_bytes(b"")
        os.utime(folder / f"{i:03d}.json.gz", (i, i))
    planned(config_of())
    names = [path.name for path in files()]
    assert len(names) == module._MOST_FILES and not any(name.startswith(".") for name in names)
    assert "005.json.gz" not in names and "006.json.gz" in names


def test_the_command_imports_no_transformers_the_second_time(tmp_path: Path) -> None:
    code = """
import sys
from horizon_lm.cli import main
assert main() == 0
print("imported:", sorted({"transformers", "torch._dynamo"} & set(sys.modules)), file=sys.stderr)
"""
    folder = model_folder(tmp_path / "model")
    command = [sys.executable, "-c", code, "plan", f"model_name_or_path={folder}", "datasets=x.txt"]
    command += ["max_length=32", "hardware=cpu-2core"]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout and "largest that fits" in runs[1].stdout
    assert "imported: ['torch._dynamo', 'transformers']" in runs[0].stderr
    assert "imported: []" in runs[1].stderr


def test_only_the_command_keeps_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a user's own program the models may have been changed, which no file tells."""
    planned(config_of())
    (path,) = files()
    monkeypatch.setattr(package, "models_are_stock", False)
    with outline_cache(config_of()) as cache:
        assert cache == OutlineCache()
    path.unlink()
    planned(config_of())
    assert files() == []


def test_a_model_that_does_not_fit_is_kept_too() -> None:
    config = config_of(reserve_host_gb=1e6)
    with pytest.raises(DoesNotFitError):
        planned(config)
    (path,) = files()
    assert OutlineCache.from_bytes(path.read_bytes()).facts is not None
