"""The Python face: what it shows, what it takes, and what it says to the rest."""

from __future__ import annotations

import gc
import itertools
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

import horizon_lm as hz
import zoo
from horizon_lm.config_python import as_train_config
from horizon_lm.data.tokenizer import train_tokenizer
from horizon_lm.errors import ConfigError, DataError
from small_runs import values, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

SOURCE = str(Path(hz.__file__).parent.parent)


def host(name: str = "llama", **settings: Any) -> hz.HostModel:
    return hz.HostModel.from_pretrained(zoo.build(name), **{"device": "cpu", "dtype": "float32", **settings})


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": SOURCE, "COLUMNS": "100", "PAGER": "cat"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


# ---- what the package shows -----------------------------------------------------------------


def test_dir_shows_what_there_is_without_importing_it() -> None:
    done = python("-c", "import sys, horizon_lm as h; print(*dir(h)); print('torch' in sys.modules)")
    names, imported = done.stdout.splitlines()
    public = [name for name in names.split() if not name.startswith("_")]
    assert public == ["HostModel", "ModelSettings", "TrainConfig", "TrainResult", "errors", "train"]
    assert imported == "False" and not done.stderr
    assert set(public) <= set(hz.__all__) and all(getattr(hz, name) for name in hz.__all__)
    with pytest.raises(AttributeError, match="no attribute 'HostModle'"):
        _ = hz.HostModle


def test_help_lists_classes_and_functions() -> None:
    text = python("-c", "import horizon_lm; help(horizon_lm)").stdout
    for wanted in ("class HostModel", "class TrainConfig", "train(config", "save_pretrained(self, folder"):
        assert wanted in text, wanted


def test_the_package_runs_as_the_command_does(tmp_path: Path) -> None:
    helped = python("-m", "horizon_lm", "train", "--help")
    assert helped.returncode == 0 and helped.stdout.startswith("Usage: python -m horizon_lm train")
    bad = python("-m", "horizon_lm", "train", str(tmp_path / "none.yaml"))
    assert bad.returncode == 2 and "no such file" in bad.stderr
    data = python("-m", "horizon_lm", "train", "init_model={model_type: llama}", "datasets=none.jsonl")
    assert data.returncode == 4, data.stderr
    assert python("-m", "horizon_lm", "version").stdout.strip() == hz.__version__


def test_repr_says_what_the_model_is() -> None:
    text = repr(host(max_grad_norm=None))
    for wanted in (
        *(
            "LlamaForCausalLM (llama), 4 layers, 37,152 parameters",
            "float32 on cpu",
            "host memory: 532 kB (weights 152 kB",
        ),
        *("updates: adamw, eager, no clipping; 0 steps done", "device memory"),
    ):
        assert wanted in text, text
    assert max(map(len, text.splitlines())) < 120
    source = zoo.build("llama").requires_grad_(False)
    source.lm_head.requires_grad_(True)
    frozen = hz.HostModel.from_pretrained(source, device="cpu", lanes="adversarial", dtype=torch.bfloat16)
    assert "37,152 parameters (3,072 trainable)" in repr(frozen) and "bfloat16 on cpu" in repr(frozen)
    assert "deferred, max_grad_norm 1;" in repr(frozen) and "in slots" in repr(frozen)


def test_outputs_are_readable() -> None:
    model = host()
    one = zoo.batch("llama")
    out = model.train_step(one, lr=1e-3)
    assert repr(out) == (
        f"TrainStepOutput(loss={out.loss:.6g}, num_tokens={out.num_tokens}, grad_norm={out.grad_norm:.6g})"
    )
    own = model.train_step(one, lr=1e-3, loss_fn=lambda p, b: (-p.mean(), {"seen": p.numel()}))
    assert "metrics=[{'seen': " in repr(own)
    found = model.evaluate(one, return_log_probs=True)
    assert f"perplexity={found.perplexity:.6g}" in repr(found)
    assert "log_probs=<1 of shape [2, 19]>" in repr(found)


# ---- micro-batches of every usual form ------------------------------------------------------


ROWS = zoo.batch("llama", batch_size=4)
HALVES = [{name: value[i : i + 2] for name, value in ROWS.items()} for i in (0, 2)]


def loader() -> torch.utils.data.DataLoader:
    rows = [{name: value[i] for name, value in ROWS.items()} for i in range(4)]
    return torch.utils.data.DataLoader(rows, batch_size=2)  # type: ignore[arg-type]


def each(convert: Callable[[torch.Tensor], Any]) -> list[dict[str, Any]]:
    return [{name: convert(value) for name, value in half.items()} for half in HALVES]


FORMS: dict[str, Callable[[], Any]] = {
    "a tuple": lambda: tuple(HALVES),
    "a generator": lambda: (half for half in HALVES),
    "an iterator": lambda: iter(HALVES),
    "a DataLoader": loader,
    "BatchEncodings": lambda: [BatchEncoding(half) for half in HALVES],
    "BatchEncodings with lists": lambda: [BatchEncoding(half) for half in each(torch.Tensor.tolist)],
    "nested lists": lambda: each(torch.Tensor.tolist),
    "tuples": lambda: each(lambda value: tuple(map(tuple, value.tolist()))),
    "lists of rows": lambda: each(list),
    "lists of arrays": lambda: each(lambda value: [row.numpy() for row in value]),
    "arrays": lambda: each(torch.Tensor.numpy),
    "read-only arrays": lambda: each(lambda value: np.broadcast_to(value.numpy(), value.shape)),
    "int32": lambda: each(torch.Tensor.int),
    "int16 arrays": lambda: each(lambda value: value.numpy().astype(np.int16)),
    "no mask": lambda: [half | {"attention_mask": None, "position_ids": None} for half in HALVES],
    "a mask of int64": lambda: [half | {"attention_mask": torch.ones(2, 20).long()} for half in HALVES],
    "a mask of bool": lambda: [half | {"attention_mask": torch.ones(2, 20).bool()} for half in HALVES],
    "a mask of lists": lambda: [half | {"attention_mask": [[1] * 20] * 2} for half in HALVES],
    "not contiguous": lambda: each(lambda value: value.t().contiguous().t()),
    "a column nobody gave": lambda: [half | {"token_type_ids": None} for half in HALVES],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_bits(form: str) -> None:
    """Of training, of gradients and of an evaluation."""
    plain, model = host(), host()
    assert ROWS.keys() == {"input_ids", "labels"}
    assert model.forward_backward(FORMS[form]()) == plain.forward_backward(HALVES)
    gradients = dict(plain.named_gradients())
    assert gradients and all(torch.equal(g, gradients[name]) for name, g in model.named_gradients())
    assert model.train_step(FORMS[form](), lr=1e-3) == plain.train_step(HALVES, lr=1e-3)
    assert model.evaluate(FORMS[form]()) == plain.evaluate(HALVES)
    masters = dict(plain.named_parameters())
    assert all(torch.equal(value, masters[name]) for name, value in model.named_parameters())


def test_one_micro_batch_needs_no_list() -> None:
    plain, model = host(), host()
    for one in (ROWS, BatchEncoding(ROWS)):
        assert model.forward_backward(one) == plain.forward_backward([ROWS])
        assert model.train_step(one, lr=1e-3) == plain.train_step([ROWS], lr=1e-3)
        assert model.evaluate(one) == plain.evaluate([ROWS])
    assert model.evaluate(HALVES) != plain.evaluate([HALVES[0]]), "the forms are told apart"


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom", "gemma2", "mixtral", "falcon"])
def test_a_mask_of_booleans_is_one_of_numbers(name: str) -> None:
    """Padding on the left, in models that make something else of a mask."""
    mask, labels = torch.ones(2, 20).long(), HALVES[0]["labels"].clone()
    mask[1, :5], labels[1, :5] = 0, -100
    one = {"input_ids": HALVES[0]["input_ids"], "labels": labels, "attention_mask": mask}
    losses = [
        host(name).train_step(one | {"attention_mask": m}, lr=1e-3)
        for m in (mask, mask.bool(), mask.int(), mask.float())
    ]
    assert all(out == losses[0] for out in losses)
    assert host(name).train_step({n: v for n, v in one.items() if n[0] != "a"}, lr=1e-3) != losses[0]


def test_a_loss_function_gets_what_was_given() -> None:
    """Tensors of any name, made of lists and arrays; a mask keeps its type, as it may be an index."""
    seen: list[dict[str, torch.Tensor]] = []

    def loss_fn(log_probs: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
        seen.append(given)
        return -(log_probs * given["advantage"][:, None]).mean()

    extra = {
        "advantage": [0.5, 1.5],
        "flags": np.array([True, False]),
        "attention_mask": torch.ones(2, 20).bool(),
    }
    host().train_step([HALVES[0] | extra, HALVES[1] | extra], lr=1e-3, loss_fn=loss_fn)
    (given, _) = seen
    assert given["advantage"].dtype == torch.float32 and given["flags"].dtype == torch.bool
    assert given["attention_mask"].dtype == torch.bool


def bad(**changes: Any) -> list[dict[str, Any]]:
    return [HALVES[0] | changes]


REFUSED: dict[str, tuple[Any, str, str]] = {
    "nothing": (None, "micro_batches is None, not a list of dicts", "input_ids"),
    "text": ("batch", "micro_batches is 'batch'", "input_ids"),
    "a tensor": (ROWS["input_ids"], r"micro_batches is a Tensor of shape \(4, 20\)", "labels"),
    "a number": (3, "micro_batches is 3", "labels"),
    "an empty generator": (iter(()), "no micro-batch", "at least one"),
    "a list of tensors": (list(HALVES[0].values()), "micro-batch 0 is a Tensor of shape", "labels"),
    "pairs": ([(1, 2)], "micro-batch 0 is a tuple", "labels"),
    "a loader that never ends": (itertools.repeat(HALVES), "micro-batch 0 is a list", "labels"),
    "no dict": ([HALVES[0], None], "micro-batch 1 is None", "labels"),
    "no labels": ([{"input_ids": HALVES[0]["input_ids"]}], "micro-batch 0 has no labels", "mlm=False"),
    "labels of None": (bad(labels=None), "has no labels: it is None", "-100"),
    "no input_ids": ([{"labels": HALVES[0]["labels"]}], "has no input_ids", "token numbers"),
    "ragged lists": (bad(labels=[[1, 2, 3], [1, 2]]), "labels has rows of 2, 3 tokens", "pad the rows"),
    "ragged tensors": (bad(labels=[torch.ones(3), torch.ones(2)]), "rows of 2, 3 tokens", "pad the rows"),
    "one row": (
        [{name: value[0] for name, value in ROWS.items()}],
        r"input_ids of shape \(20,\)",
        r"input_ids\[None\]",
    ),
    "text for a tensor": (bad(labels="abc"), "labels is 'abc'", "nested lists"),
    "lists of text": (bad(labels=[["a", "b"]]), "labels is no array of numbers", "nested lists"),
    "objects": (bad(labels=np.array([[None]])), "labels is no array of numbers", "nested lists"),
    "float labels": (bad(labels=HALVES[0]["labels"].double()), "labels are torch.float64", "int64"),
    "boolean ids": (bad(input_ids=HALVES[0]["input_ids"].bool()), "input_ids are torch.bool", "int64"),
    "float positions": (bad(position_ids=torch.zeros(2, 20)), "position_ids are torch.float32", "int64"),
    "negative positions": (bad(position_ids=-torch.ones(2, 20).long()), "hold -1", "count from 0"),
    "an additive mask": (
        bad(attention_mask=torch.full((2, 20), -1e9)),
        "other values than 0 and 1",
        "padding",
    ),
    "a mask of halves": (
        bad(attention_mask=torch.full((2, 20), 0.5)),
        "other values than 0 and 1",
        "padding",
    ),
    "a meta tensor": (bad(labels=torch.ones(2, 20, device="meta")), "a meta tensor", "dense"),
    "a sparse tensor": (bad(labels=HALVES[0]["labels"].to_sparse()), "torch.sparse_coo tensor", "dense"),
    "an unknown key": (bad(advantage=[1.0, 2.0]), r"unknown keys \['advantage'\]", "loss_fn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_a_micro_batch_is_refused_by_all_calls(case: str) -> None:
    given, message, hint = REFUSED[case]
    model = MODEL[0] if MODEL else MODEL.append(host()) or MODEL[0]  # type: ignore[func-returns-value]
    calls: list[Callable[[], object]] = [
        lambda: model.forward_backward(given),
        lambda: model.train_step(given, lr=1e-3),
        lambda: model.evaluate(given),
    ]
    for call in calls:
        with pytest.raises(DataError, match=message) as caught:
            call()
        assert hint.replace("\\", "") in (caught.value.hint or "") and "hint:" not in caught.value.message
    assert model.steps_done == 0


MODEL: list[hz.HostModel] = []  # one for all cases


def test_positions_beyond_the_table_are_refused_where_there_is_one() -> None:
    """A GPU answers them with an error that ends the process. llama has no table: 70 tokens are no fault."""
    long = torch.arange(70)[None] % zoo.VOCAB
    one = {"input_ids": long, "labels": long}
    with pytest.raises(DataError, match="reaches position 69, .*max_position_embeddings is 64") as caught:
        host("gpt2").train_step(one, lr=1e-3)
    assert caught.value.hint == "cut the sequences to 64 tokens"
    short = {name: value[:, :64] for name, value in one.items()}
    assert host("gpt2").train_step(short, lr=1e-3).num_tokens == 63
    assert host("llama").train_step(one, lr=1e-3).num_tokens == 69


# ---- a model object that was handed over ----------------------------------------------------


USES: dict[str, tuple[Callable[[Any], object], str]] = {
    "called": (lambda m: m(**ROWS), "HostModel.evaluate"),
    "its body called": (lambda m: m.model(ROWS["input_ids"]), "HostModel.evaluate"),
    "generate": (lambda m: m.generate(ROWS["input_ids"]), "AutoModelForCausalLM"),
    "save_pretrained": (lambda m: m.save_pretrained("nowhere"), "HostModel.save_pretrained"),
    "state_dict": (lambda m: m.state_dict(), "named_parameters"),
    "load_state_dict": (lambda m: m.load_state_dict({}), "before"),
    "to": (lambda m: m.to("cpu"), "device"),
    "half": (lambda m: m.half(), "dtype"),
    "to_empty": (lambda m: m.to_empty(device="cpu"), "device"),
    "eval": (lambda m: m.eval(), "HostModel.evaluate"),
    "recomputation": (lambda m: m.gradient_checkpointing_enable(), "activations='recompute'"),
    "resizing": (lambda m: m.resize_token_embeddings(200), "before"),
    "handed over again": (lambda m: hz.HostModel.from_pretrained(m), "load the model again"),
}


def test_a_consumed_model_says_so() -> None:
    source = zoo.build("llama")
    before = source.training
    model = hz.HostModel.from_pretrained(source, device="cpu", dtype="float32")
    for name, (use, hint) in USES.items():
        with pytest.raises(ConfigError, match="was handed to HostModel") as caught:
            use(source)
        assert hint in (caught.value.hint or ""), name
        assert "LlamaForCausalLM" in caught.value.message or "LlamaModel" in caught.value.message
    assert source.training == before and source.config.model_type == "llama" and "Llama" in repr(source)
    # Ours is not disturbed: it trains as one whose object nobody has touched.
    plain = host()
    assert model.train_step(ROWS, lr=1e-3) == plain.train_step(ROWS, lr=1e-3)
    assert model.evaluate(ROWS) == plain.evaluate(ROWS)


def test_a_model_that_was_not_taken_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: an error before the first weight is moved leaves the caller's object alone."""
    from horizon_lm.errors import DoesNotFitError
    from horizon_lm.run import host_model

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise DoesNotFitError("too large", hint="smaller")

    source = zoo.build("llama")
    expected = source(**ROWS).loss
    with monkeypatch.context() as patch, pytest.raises(DoesNotFitError):
        patch.setattr(host_model, "check_host_memory", refuse)
        hz.HostModel.from_pretrained(source, device="cpu")
    assert torch.equal(source(**ROWS).loss, expected)
    assert hz.HostModel.from_pretrained(source, device="cpu").num_parameters == 37152


@pytest.mark.parametrize("source", [None, 3, {"model_type": "llama"}, ["folder"]])
def test_what_is_not_a_model_is_refused(source: Any) -> None:
    with pytest.raises(ConfigError, match=f"a {type(source).__name__} is not a model") as caught:
        hz.HostModel.from_pretrained(source)
    assert caught.value.hint


def test_a_module_without_a_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear is not a transformers model"):
        hz.HostModel.from_pretrained(torch.nn.Linear(2, 2))


# ---- settings from Python -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, "float32"])
@pytest.mark.parametrize("device", [torch.device("cpu"), "cpu"])
def test_torch_objects_are_settings(dtype: Any, device: Any, tmp_path: Path) -> None:
    model = hz.HostModel.from_pretrained(zoo.build("llama"), device, dtype, max_grad_norm=np.float32(0.5))
    assert (model.settings.dtype, model.settings.device, model.settings.max_grad_norm) == (
        "float32",
        "cpu",
        0.5,
    )
    model.save_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert saved.dtype == torch.bfloat16 and model.config.dtype == torch.float32
    again = hz.HostModel.from_pretrained(tmp_path / "out", device=device, torch_dtype=dtype)
    assert again.settings.dtype == "float32"


def test_a_configuration_object_makes_a_model() -> None:
    settings = hz.ModelSettings(device="cpu", dtype="float32")
    config = zoo.build("llama").config
    one = hz.HostModel.from_config(config, device=torch.device("cpu"), dtype=torch.float32, seed=7)
    two = hz.HostModel.from_config(config.to_dict(), settings.replace(seed=7))
    assert one.evaluate(ROWS) == two.evaluate(ROWS)
    assert one.evaluate(ROWS) != hz.HostModel.from_config(config, settings).evaluate(ROWS)
    with pytest.raises(ConfigError, match="a str is not a configuration"):
        hz.HostModel.from_config("folder")
    with pytest.raises(ConfigError, match="settings and seed are both given"):
        hz.HostModel.from_config(config, settings, seed=7)


def test_a_run_takes_a_path_a_dict_a_config_or_names(tmp_path: Path) -> None:
    given = values(tmp_path / "text.txt", tmp_path / "run")
    wanted = hz.TrainConfig.from_dict(given)
    file = tmp_path / "run.yaml"
    file.write_text(wanted.to_yaml())
    for source in (wanted, given, file, str(file), {**given, "output_dir": tmp_path / "run"}):
        assert as_train_config(source, {})[0] == wanted  # type: ignore[arg-type]
        changed = as_train_config(source, {"max_steps": 3, "dtype": torch.bfloat16})[0]  # type: ignore[arg-type]
        assert changed == wanted.replace(max_steps=3, dtype="bfloat16")
        assert {"max_steps", "dtype", "learning_rate"} <= changed.model_fields_set, "chosen, so not planned"
    assert as_train_config(None, given)[0] == wanted
    assert "slots" not in as_train_config(wanted, {"max_steps": 3})[0].model_fields_set
    config, notes = as_train_config(file, {"lr": 1e-2})
    assert config.learning_rate == 1e-2 and any("'lr' is read as 'learning_rate'" in note for note in notes)


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        (3, {}, "an int is not a configuration"),
        ("none.yaml", {}, "none.yaml: no such file"),
        (".", {}, "is a directory"),
        ({"model_name_or_path": "x"}, {"learning_rat": 1}, r"train\(\) arguments.*learning_rat"),
        ({"model_name_or_path": "x"}, {"learning_rate": "1e-3"}, r"train\(\) arguments.*learning_rate"),
        ({"model_name_or_path": "x", "max_steps": 1.5}, {}, r"train\(\).*max_steps"),
        (None, {}, "the key 'datasets' is missing"),
    ],
)
def test_what_is_no_configuration_is_refused(source: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        hz.train(source, **changes)


def test_a_run_from_a_file_and_names(tmp_path: Path, no_samples: None) -> None:
    text = write_text(tmp_path / "text.txt")
    file = tmp_path / "run.yaml"
    given = hz.TrainConfig.from_dict(values(text, tmp_path / "run", save_strategy="no"))
    file.write_text(given.to_yaml())
    result = hz.train(file, max_steps=2, progress="off")
    assert result.num_steps == 2 and result.output_dir == tmp_path / "run"
    assert hz.TrainConfig.from_yaml(result.output_dir / "config.resolved.yaml").max_steps == 2


# ---- saving, and giving back ----------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["one layer visits a device"] * 3, 260)


def test_the_tokenizer_is_saved_with_the_model(tokenizer: Any, tmp_path: Path) -> None:
    model = host()
    model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("a device").input_ids
    assert ids == tokenizer("a device").input_ids
    model.save_pretrained(str(tmp_path / "again"), tokenizer=tmp_path / "out")  # the folder of one
    assert (tmp_path / "again/tokenizer.json").read_bytes() == (tmp_path / "out/tokenizer.json").read_bytes()
    hz.HostModel.from_pretrained(tmp_path / "again", device="cpu").evaluate(ROWS)


def test_a_tokenizer_that_fails_leaves_the_old_folder(tokenizer: Any, tmp_path: Path) -> None:
    model = host()
    model.save_pretrained(tmp_path / "out", tokenizer=tokenizer)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            raise ZeroDivisionError

    model.train_step(ROWS, lr=1e-2)
    with pytest.raises(ZeroDivisionError):
        model.save_pretrained(tmp_path / "out", tokenizer=Broken())
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    model.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").read_bytes() != before["model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": 3}, "tokenizer is a int"),
        ({"tokenizer": "./nowhere"}, "nowhere is not a folder with a tokenizer"),
        ({"dtype": "float16"}, "dtype=float16 cannot be saved"),
        ({"dtype": torch.int8}, "dtype=int8 cannot be saved"),
        ({"max_shard_size": "many"}, "max_shard_size='many' is not a size"),
        ({"max_shard_size": 0}, "max_shard_size=0 is not a size"),
        ({"folder": 3}, "a int is not a folder"),
        ({"folder": "notes.txt"}, "notes.txt is a file"),
        ({"folder": "."}, "holds something other than a model"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(
    arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above all a folder with something else in it, which would be replaced with all that it holds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("precious")
    model = MODEL[0] if MODEL else host()
    with pytest.raises(ConfigError, match=message) as caught:
        model.save_pretrained(**{"folder": "out", **arguments})
    assert caught.value.hint and [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_closed_model_gives_its_memory_back_and_says_so() -> None:
    with host() as model:
        model.train_step(ROWS, lr=1e-3)
        memory = weakref.ref(model.store.run("weights", 1).untyped_storage())
        held = weakref.ref(model.store)
        assert memory is not None and held() is not None
    gc.collect()
    assert held() is None and repr(model) == "HostModel(llama, closed)"
    model.close()  # once more does nothing

    def uses() -> Iterator[Callable[[], object]]:
        yield lambda: model.train_step(ROWS, lr=1e-3)
        yield lambda: model.evaluate(ROWS)
        yield lambda: model.flush()
        yield lambda: list(model.named_parameters())
        yield lambda: model.num_parameters

    for use in uses():
        with pytest.raises(ConfigError, match="this HostModel is closed"):
            use()


# ---- docs/python.md -------------------------------------------------------------------------


def test_the_code_of_the_page_runs(
    tokenizer: Any, tmp_path: Path, no_samples: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[2] / "docs" / "python.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt")
    run = values(Path("text.txt"), Path("run"), save_strategy="no", progress="off")
    (tmp_path / "run.yaml").write_text(hz.TrainConfig.from_dict(run).to_yaml())
    host().save_pretrained(tmp_path / "path/to/model")
    tokenizer.pad_token = tokenizer.eos_token
    rows = [{"input_ids": ROWS["input_ids"][i].tolist()} for i in range(2)]
    names = {
        "hz": hz,
        "torch": torch,
        "loader": [HALVES],
        "held_out": ROWS,
        "tokenizer": tokenizer,
        "rows": rows,
    }
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 3 and (tmp_path / "tuned/tokenizer.json").exists()
    assert (tmp_path / "run/model/config.json").exists()
