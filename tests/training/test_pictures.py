"""Runs on pictures, end to end: the model that is saved, its processor, and a resumed run's bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import get_training_chat_template
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from data_helpers import write_rows
from horizon_lm import cli
from horizon_lm.config import TrainConfig
from horizon_lm.data import picture_checks
from horizon_lm.data.processor import Processor
from horizon_lm.errors import ConfigError, DataError
from horizon_lm.training import finish
from horizon_lm.training.train import train
from picture_runs import rows, settings
from small_runs import tensors_of
from tiny_processors import INTERN, LLAVA, MISTRAL, PROCESSORS, pictures

pytestmark = pytest.mark.usefixtures("one_thread")


class Trained(NamedTuple):
    folder: Path
    config: TrainConfig
    printed: str


def lines(folder: Path, key: str) -> list[Any]:
    found = map(json.loads, (folder / "run/metrics.jsonl").read_text().splitlines())
    return [line[key] for line in found if line.get(key) is not None]


@pytest.fixture(scope="module", params=["llava", "gemma3"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    config = settings(folder, request.param, save_steps=2, learning_rate=3e-2)
    train(config)
    return Trained(folder, config, "")


def loss_of_transformers(folder: Path, processor: Any = None) -> float:
    """The loss of a saved model in plain transformers, with pixels, over TRL's batches of all rows."""
    processor = processor or AutoProcessor.from_pretrained(folder / "run/model")
    model = AutoModelForImageTextToText.from_pretrained(folder / "run/model", dtype=torch.float32)
    has_marks = "generation %}" in processor.chat_template
    template = processor.chat_template
    if not has_marks:
        template = MARKED.get(type(processor).__name__) or get_training_chat_template(processor)
    collate = DataCollatorForVisionLanguageModeling(
        processor, assistant_only_loss=True, chat_template=template
    )
    total, tokens = 0.0, 0
    made = pictures(8)
    for i, row in enumerate(rows(folder, "again.jsonl")):
        shown = [made[int(Path(name).stem)] for name in row["images"]]
        batch = collate([{"images": shown, "messages": row["messages"]}])
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits
        kept = labels[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(logits[:, :-1][kept], labels[:, 1:][kept], reduction="sum")
        total, tokens = total + float(loss), tokens + int(kept.sum())
        assert bool(shown) == (i % 3 != 2)
    return total / tokens


MARKED = {
    "PixtralProcessor": MISTRAL.replace(
        "{{ message['content'][0]['text'] + eos_token }}",
        "{% generation %}{{ message['content'][0]['text'] + eos_token }}{% endgeneration %}",
    ),
    "InternVLProcessor": INTERN.replace(
        "{%- for part in message['content'] %}",
        "{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'][0]['text'] }}"
        "{{- '<|im_end|>\n' }}{% endgeneration %}{% continue %}{% endif %}"
        "{%- for part in message['content'] %}",
    ),
}


@pytest.mark.parametrize(
    ("name", "projector"),
    [("mistral3", True), ("qwen2_5_vl", True), ("qwen3_vl", False), ("internvl", True), ("internvl", False)],
)
def test_families_whose_processors_need_torchvision(
    name: str, projector: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pictures of several sizes, tokens of several kinds, features between layers: the loss is that of
    transformers with pixels. The processor is made without its part for videos."""
    own = PROCESSORS[name]()
    monkeypatch.setattr(own, "save_pretrained", own.tokenizer.save_pretrained)
    monkeypatch.setattr(
        picture_checks, "load_processor", lambda name, tokenizer, **_: Processor(own, tokenizer)
    )
    monkeypatch.setattr(finish, "_sample", lambda ready: "")
    config = settings(tmp_path, name, train_projector=projector, max_steps=2)
    train(config)
    evaluated = lines(tmp_path, "eval_loss")[-1]
    assert loss_of_transformers(tmp_path, own) == pytest.approx(evaluated, rel=2e-6)


def test_the_saved_folder_is_the_model_with_its_processor(trained: Trained) -> None:
    evaluated = lines(trained.folder, "eval_loss")[-1]
    assert loss_of_transformers(trained.folder) == pytest.approx(evaluated, rel=2e-6)


def test_a_model_that_does_not_see_has_another_loss(trained: Trained) -> None:
    """The negative control of the test above: the loss depends on the pictures."""
    evaluated = lines(trained.folder, "eval_loss")[-1]
    for picture in pictures(8):
        picture.save(trained.folder / "kept.png")
    dark = trained.folder / "dark"
    shutil.copytree(trained.folder, dark, ignore=shutil.ignore_patterns("cache", "run"), dirs_exist_ok=True)
    for path in dark.glob("?.png"):
        pictures(1)[0].point(lambda _: 0).save(path)
    found = evaluate(trained, datasets=str(dark / "a.jsonl"), eval_datasets=str(dark / "a.jsonl"))
    assert abs(found["eval_loss"] / evaluated - 1) > 2e-5
    again = evaluate(trained)
    assert again["eval_loss"] == pytest.approx(evaluated, rel=1e-6)


def evaluate(trained: Trained, **changes: Any) -> dict[str, Any]:
    from horizon_lm.training.eval_command import evaluate_target, target_of

    run = trained.folder / "run"
    target, _ = target_of(str(run), [f"{key}={value}" for key, value in changes.items()])
    return evaluate_target(target)


def test_a_resumed_run_ends_with_the_same_bits(trained: Trained, capfd: pytest.CaptureFixture[str]) -> None:
    """From a checkpoint, also without the processor's folder, and without cached features."""
    expected = tensors_of(trained.folder / "run/checkpoint-3")
    for changes in ({}, {"dataset_cache_dir": None}):
        again = trained.folder / f"again-{len(changes)}"
        moved = trained.folder / "moved"
        (trained.folder / "processor").rename(moved)
        try:
            train(
                trained.config.replace(
                    output_dir=str(again),
                    resume_from_checkpoint=str(trained.folder / "run/checkpoint-2"),
                    **changes,
                )
            )
        finally:
            moved.rename(trained.folder / "processor")
        assert tensors_of(again / "checkpoint-3") == expected
        assert (again / "model/processor_config.json").is_file()
        printed = "".join(capfd.readouterr())
        computed = 8 if changes else 0
        assert f"features of 8 pictures, {computed} of them computed now" in printed


def test_the_projector_is_trained_and_the_tower_is_not(trained: Trained) -> None:
    """Also: frozen by default."""
    config = trained.config.replace(output_dir=str(trained.folder / "still"), train_projector=False)
    train(config)
    after, still = (load_file(trained.folder / name / "model/model.safetensors") for name in ("run", "still"))
    projector = [name for name in after if "multi_modal_projector" in name]
    tower = [name for name in after if "vision" in name and name not in projector]
    assert projector and tower
    assert any(not torch.equal(after[name], still[name]) for name in projector)
    assert all(torch.equal(after[name], still[name]) for name in tower)


def test_generate_takes_pictures(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, image = str(trained.folder / "run"), str(trained.folder / "0.png")
    given = ["generate", run, "--max-new-tokens", "3", "--temperature", "0", "--json", "--prompt"]
    answers = []
    two = ["<image><image>What?", "--image", image, "--image", image]
    for more in (["What?", "--chat", "--image", image], two):
        assert cli.main([*given, *more]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert all(isinstance(answer["completion"], str) for answer in answers)
    assert cli.main([*given, "What?", "--image", image + "x"]) == 4
    assert "does not exist" in capsys.readouterr().err
    said = iter([f"/image {image}", "/image none.png", "What?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(said))
    assert cli.main(["chat", run, "--max-new-tokens", "3", "--image", image]) == 0
    assert "none.png does not exist" in capsys.readouterr().err


def test_generate_sees_the_picture(trained: Trained) -> None:
    """Its first logits are those of transformers' own processor and model on the same chat."""
    from horizon_lm.training.generate import Chat, Generator, Sampling

    generator = Generator.load(str(trained.folder / "run"))
    seen: dict[str, Any] = {}
    honest = generator._model.generate

    def generate(**inputs: Any) -> Any:
        seen.update(inputs)
        return honest(**inputs)

    generator._model.generate = generate
    question = "What is in the picture?"
    files = [str(trained.folder / f"{i}.png") for i in (0, 1)]
    Chat(generator).say(question, Sampling(max_new_tokens=1, temperature=0), images=files)
    processor = AutoProcessor.from_pretrained(trained.folder / "run/model")
    content = [{"type": "image", "path": file} for file in files] + [{"type": "text", "text": question}]
    theirs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    for name, value in theirs.items():
        assert np.array_equal(np.asarray(seen[name]), np.asarray(value)), name


def test_damaged_features_are_computed_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path, max_steps=1, eval_datasets=[])
    train(config)
    (shard,) = (tmp_path / "cache/pictures").rglob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    capfd.readouterr()
    train(config.replace(overwrite_output_dir=True))
    printed = "".join(capfd.readouterr())
    assert "removed damaged features" in printed
    assert "features of 8 pictures, 8 of them computed now" in printed


def test_a_text_model_is_refused_by_name(tmp_path: Path) -> None:
    from tiny_runs import LLAMA

    with pytest.raises(ConfigError, match="a llama model is text-only"):
        train(settings(tmp_path, init_model=LLAMA, train_projector=False, max_length=64))


def test_a_processor_of_another_patch_size_is_refused(tmp_path: Path) -> None:
    from tiny_processors import llava

    config = settings(tmp_path)
    own = llava()
    own.patch_size = 16
    own.save_pretrained(tmp_path / "processor")
    with pytest.raises(DataError, match="gives 16 features for a picture that the processor writes 4"):
        train(config)


def test_text_rows_of_a_vision_model_train_and_keep_its_processor(tmp_path: Path) -> None:
    config = settings(tmp_path)
    text = tmp_path / "text.jsonl"
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]}
    text.write_text((json.dumps(row) + "\n") * 8)
    template = tmp_path / "template.jinja"
    template.write_text(LLAVA.replace("message['content'] if", "[] if").replace("part['text']", "''"))
    changes = {"datasets": str(text), "eval_datasets": [], "chat_template": "plain", "max_length": 64}
    result = train(config.replace(**changes))
    assert result.num_steps == 3 and AutoProcessor.from_pretrained(result.model_dir).image_processor


def test_the_token_of_a_picture_in_text_is_refused_before_the_first_step(tmp_path: Path) -> None:
    config = settings(tmp_path, train_projector=False)
    said = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]
    marked = [{"role": "user", "content": "Is <image> a mark?"}, said[1]]
    path = write_rows(tmp_path / "text.jsonl", [{"messages": said}] * 20 + [{"messages": marked}])
    config = config.replace(datasets=str(path), eval_datasets=[], chat_template="plain", packing=False)
    with pytest.raises(DataError, match="document 21 of the data is text without pictures") as caught:
        train(config)
    assert caught.value.hint and not (tmp_path / "run").exists()


def test_a_checkpoint_is_exported_with_the_processor(trained: Trained) -> None:
    out = trained.folder / "exported"
    assert cli.main(["export", str(trained.folder / "run/checkpoint-3"), str(out)]) == 0
    own, exported = (load_file(path / "model.safetensors") for path in (trained.folder / "run/model", out))
    assert own.keys() == exported.keys() and all(torch.equal(exported[name], own[name]) for name in own)
    assert AutoProcessor.from_pretrained(out).image_processor is not None


def test_a_folder_named_as_tokenizer_gives_its_processor(trained: Trained, tmp_path: Path) -> None:
    from horizon_lm.checkpoint.export import tokenizer_saver

    tokenizer_saver(str(trained.folder / "run/model"), False)(tmp_path)
    assert AutoProcessor.from_pretrained(tmp_path).image_processor is not None


def test_a_processor_that_cannot_be_loaded_is_no_obstacle_to_text(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of Qwen without torchvision: only pictures need it, and the error names what is missing."""
    from horizon_lm.training.generate import Generator, Sampling

    def from_pretrained(*args: Any, **others: Any) -> Any:
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library: pip install torchvision")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", from_pretrained)
    generator = Generator.load(str(trained.folder / "run"))
    assert isinstance(generator.complete("a", Sampling(max_new_tokens=2, temperature=0)), str)
    with pytest.raises(ConfigError, match="the processor of .* needs torchvision"):
        generator.pictures([str(trained.folder / "0.png")])
    with pytest.raises(ConfigError, match="needs torchvision"):
        train(trained.config.replace(output_dir=str(trained.folder / "none")))
