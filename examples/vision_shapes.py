"""Pictures of one or two shapes with captions, and the share of captions that a trained model gets right.

    python examples/vision_shapes.py draw          # runs/shapes: pictures, rows, tokenizer and processor
    horizon train configs/vision_sft.yaml
    python examples/vision_shapes.py score runs/vision_sft

A fifth of all pairs of shapes is held out: the model has seen both shapes in training, never in one picture
in this order. A caption counts if every word is right: "a red circle above a blue square".
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIZE = 32  # pixels of a side: 16 patches of 8 x 8
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 220),
    "yellow": (240, 200, 20),
    "purple": (148, 60, 189),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = ("above", "left of")
QUESTION = "What is in the picture?"
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ '\n' if message['role'] == 'user' else eos_token }}{% endfor %}"
)
Thing = tuple[str, str]  # colour, shape


def is_held_out(first: Thing, second: Thing) -> bool:
    return zlib.crc32(f"{first} {second}".encode()) % 5 == 0


def caption(things: Sequence[Thing], relation: str) -> str:
    return f" {relation} ".join(f"a {colour} {shape}" for colour, shape in things)


def picture(things: Sequence[Thing], relation: str, rng: random.Random) -> Image.Image:
    """Draw shapes of varied place, size and shade, the first above or left of the second, if there is one."""
    image = Image.new("RGB", (SIZE, SIZE), (245, 245, 245))
    pen = ImageDraw.Draw(image)
    for half, (colour, shape) in enumerate(things):
        side = rng.randint(10, 14)
        half = half if len(things) > 1 else rng.randint(0, 1)
        along = SIZE // 2 * half + rng.randint(0, SIZE // 2 - side - 1)
        across = (SIZE - side) // 2 + rng.randint(-3, 3)
        x, y = (across, along) if relation == "above" else (along, across)
        shade = tuple(max(0, min(255, value + rng.randint(-15, 15))) for value in COLOURS[colour])
        _draw(pen, shape, (x, y, x + side, y + side), shade)
    return image


def _draw(pen: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int], colour: Any) -> None:
    left, top, right, bottom = box
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([((left + right) / 2, top), (right, bottom), (left, bottom)], fill=colour)
    else:
        third = (right - left) // 3
        pen.rectangle((left + third, top, right - third, bottom), fill=colour)
        pen.rectangle((left, top + third, right, bottom - third), fill=colour)


def draw(folder: Path, num_train: int, num_eval: int, seed: int) -> None:
    """Write pictures, rows of training and evaluation, and the processor."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    things = list(product(COLOURS, SHAPES))
    for name, number, held_out in (("train", num_train, False), ("eval", num_eval, True)):
        pairs = [p for p in product(things, things) if p[0] != p[1] and is_held_out(*p) == held_out]
        rows = []
        for i in range(number):
            drawn: Sequence[Thing] = rng.choice(pairs)
            if not held_out and i % 3 == 0:
                drawn = drawn[:1]
            relation = rng.choice(RELATIONS)
            file = f"pictures/{name}-{i:05}.png"
            picture(drawn, relation, rng).save(folder / file)
            question = [{"type": "image"}, {"type": "text", "text": QUESTION}]
            answer = caption(drawn, relation)
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append(json.dumps({"images": [file], "messages": messages}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(rows))
        print(f"{folder / name}.jsonl: {number:,} pictures, {len(pairs)} pairs of shapes")
    processor().save_pretrained(folder / "processor")


def processor() -> Any:
    """Make a LLaVA processor with a small tokenizer; <image> is token 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    words = [caption([(c, s)] * 2, r) for c, s, r in product(COLOURS, SHAPES, RELATIONS)]
    special = ["<|endoftext|>", "<image>", "<|pad|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([QUESTION, *words], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<image>"],
    )
    images = CLIPImageProcessor(do_resize=False, do_center_crop=False)
    return LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="full", chat_template=TEMPLATE
    )


def score(run: str, folder: Path, number: int) -> float:
    """Print and return the share of held-out pictures whose caption is exact."""
    from horizon_lm.training.generate import Chat, Generator, Sampling

    generator = Generator.load(run)
    rows = [json.loads(line) for line in (folder / "eval.jsonl").read_text().splitlines()[:number]]
    right = 0
    for row in rows:
        expected = row["messages"][-1]["content"]
        files = [str(folder / file) for file in row["images"]]
        said = Chat(generator).say(QUESTION, Sampling(max_new_tokens=24, temperature=0), images=files)
        right += said == expected
        if said != expected:
            print(f"{row['images'][0]}: {expected}; said: {said}")
    print(
        f"exact captions {right / len(rows):.1%} ({right} of {len(rows)} pictures, of pairs of shapes that "
        "are not in the training data)"
    )
    return right / len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Shapes and their captions.")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("draw", help="write pictures, rows and processor")
    one.add_argument("--train", type=int, default=3000)
    one.add_argument("--eval", type=int, default=200)
    one.add_argument("--seed", type=int, default=0)
    two = commands.add_parser("score", help="print the share of exact captions")
    two.add_argument("run")
    two.add_argument("--number", type=int, default=200)
    for command in (one, two):
        command.add_argument("--folder", type=Path, default=Path("runs/shapes"))
    given = parser.parse_args()
    if given.command == "draw":
        draw(given.folder, given.train, given.eval, given.seed)
    else:
        score(given.run, given.folder, given.number)


if __name__ == "__main__":
    main()
