"""Processors of vision-language models, so small that a picture is a few tokens; and pictures for them.

Their templates are those that TRL ships, or are written here in the manner of the family. Processors of Qwen,
Mistral and InternVL need torchvision for videos, which is not installed: they are made without that part.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, ProcessorMixin

CORPUS = ["What is in the picture? A red circle above a blue square, and a cat.\nuser assistant USER: "] * 20

LLAVA = """{% for message in messages %}{{ message['role'].upper() + ': ' }}
{%- for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}
{%- for part in message['content'] if part['type'] == 'text' %}
{%- if message['role'] == 'assistant' %}{% generation %}{{ part['text'] + eos_token }}{% endgeneration %}
{%- else %}{{ part['text'] + '\n' }}{% endif %}{% endfor %}{% endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"""

# As Mistral's: no marks, so that the mask comes from the differences between turns.
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'user' %}{{ '[INST]' }}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '[IMG]' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}
{{- '[/INST]' }}
{%- else %}{{ message['content'][0]['text'] + eos_token }}{% endif %}{% endfor %}"""

INTERN = """{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def trl_template(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


def small_tokenizer(*special: str, **named: str) -> Any:
    """A byte-level tokenizer; named: further attributes, as image_token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", "<pad>", *special]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=tokens, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=named or list(special),
    )


def llava(image: int = 32) -> Any:
    size = {"height": image, "width": image}
    images = transformers.CLIPImageProcessorPil(size={"shortest_edge": image}, crop_size=size)
    tokenizer = small_tokenizer("<image>")
    return transformers.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="full", chat_template=LLAVA
    )


def gemma3() -> Any:
    size = {"height": 32, "width": 32}
    images = transformers.Gemma3ImageProcessorPil(size=size)
    names = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = small_tokenizer("<start_of_turn>", "<end_of_turn>", *names.values(), **names)
    return transformers.Gemma3Processor(
        images, tokenizer, image_seq_length=16, chat_template=trl_template("gemma3")
    )


def _without_video(kind: Any, *parts: Any, **options: Any) -> Any:
    """Make a processor whose video part is missing, and is not checked."""
    made = type(kind.__name__, (kind,), {})
    check = ProcessorMixin.check_argument_for_proper_class

    def checked(self: Any, name: str, value: Any) -> Any:
        return None if name == "video_processor" else check(self, name, value)

    made.check_argument_for_proper_class = checked
    made.to_dict = lambda self: {"type": kind.__name__, "images": self.image_processor.to_dict()}
    return made(*parts, **options)


def _qwen(kind: Any, template: str, patch: int) -> Any:
    images = transformers.Qwen2VLImageProcessorPil(
        patch_size=patch, size={"shortest_edge": (2 * patch) ** 2, "longest_edge": (6 * patch) ** 2}
    )
    special = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = small_tokenizer(*special, "<|image_pad|>", "<|video_pad|>")
    return _without_video(kind, images, tokenizer, None, chat_template=template)


def qwen2_5_vl() -> Any:
    return _qwen(transformers.Qwen2_5_VLProcessor, trl_template("qwen2_5_vl"), 14)


def qwen3_vl() -> Any:
    return _qwen(transformers.Qwen3VLProcessor, trl_template("qwen3_vl"), 16)


def pixtral() -> Any:
    module = "transformers.models.pixtral.processing_pixtral_here"
    if module not in sys.modules:  # its own module shows a placeholder unless torchvision is installed
        path = Path(transformers.__file__).parent / "models" / "pixtral" / "processing_pixtral.py"
        spec = importlib.util.spec_from_file_location(module, path)
        assert spec is not None and spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        sys.modules[module] = found
        # What it needs of this module counts tokens before pictures are there.
        absent = "transformers.models.pixtral.image_processing_pixtral"
        sys.modules[absent] = types.ModuleType(absent)
        sys.modules[absent].get_resize_output_image_size = None  # type: ignore[attr-defined]
        spec.loader.exec_module(found)
        del sys.modules[absent]
    images = transformers.PixtralImageProcessorPil(
        size={"longest_edge": 48}, patch_size={"height": 8, "width": 8}
    )
    tokenizer = small_tokenizer("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    kind = sys.modules[module].PixtralProcessor
    return kind(images, tokenizer, patch_size=8, spatial_merge_size=2, chat_template=MISTRAL)


def internvl() -> Any:
    size = {"height": 32, "width": 32}
    images = transformers.GotOcr2ImageProcessorPil(size=size, max_patches=4, min_patches=1)
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = small_tokenizer("<|im_start|>", "<|im_end|>", *names.values(), **names)
    return _without_video(
        transformers.InternVLProcessor, images, tokenizer, None, image_seq_length=4, chat_template=INTERN
    )


PROCESSORS: dict[str, Callable[[], Any]] = {
    "llava": llava,
    "gemma3": gemma3,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "mistral3": pixtral,
    "internvl": internvl,
}


def pictures(number: int, sizes: Sequence[tuple[int, int]] = ((40, 32), (24, 60), (64, 64))) -> list[Any]:
    """Pictures of noise, of several shapes."""
    made = []
    for i in range(number):
        width, height = sizes[i % len(sizes)]
        noise = np.random.default_rng(i).integers(0, 256, (height, width, 3), dtype=np.uint8)
        made.append(Image.fromarray(noise))
    return made
