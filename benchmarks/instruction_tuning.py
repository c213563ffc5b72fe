"""`configs/sft.yaml` unchanged: held-out loss and answers, before and after.

Uses the model of `make quickstart` in runs/quickstart, and trains it first if it is missing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from horizon_lm.config import TrainConfig
from horizon_lm.data.chat import ChatTemplate, read_template
from horizon_lm.report.metrics import read_evaluations, read_steps
from horizon_lm.training.generate import Generator, Sampling
from horizon_lm.training.train import train

from .report import Report

ROOT = Path(__file__).parent.parent
GREEDY = Sampling(max_new_tokens=32, temperature=0, repetition_penalty=1.2)


def answers(folder: Path, questions: list[str]) -> list[str]:
    """Return a model's answer to each question, in the tuned model's own template."""
    generator = Generator.load(folder, device="cpu")
    template = ChatTemplate(generator.tokenizer, read_template("plain"))
    prompts = [template.prompt([{"role": "user", "content": question}]) for question in questions]
    return [generator.complete(prompt, GREEDY, special_tokens=False) for prompt in prompts]


def shown(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "\\|").replace("`", "'")
    return f"{flat[:110]}{'...' if len(flat) > 110 else ''}" or "(nothing)"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=int, default=8)
    arguments = parser.parse_args(argv)
    report = Report("instruction-tuning-cpu", __doc__ or "")
    base = ROOT / "runs" / "quickstart" / "model"
    if not base.is_dir():
        train(TrainConfig.from_yaml(ROOT / "configs" / "quickstart.yaml"))
    with tempfile.TemporaryDirectory() as name:
        overrides = [f"output_dir={name}/sft", f"model_name_or_path={base}"]
        overrides += [f"{key}={ROOT / 'examples/instructions'}/{part}.jsonl" for key, part in PARTS.items()]
        started = time.perf_counter()
        result = train(TrainConfig.from_yaml(ROOT / "configs" / "sft.yaml", overrides))
        seconds = time.perf_counter() - started
        lines = (ROOT / "examples" / "instructions" / "eval.jsonl").read_text("utf-8").splitlines()
        held_out = [json.loads(line)["messages"] for line in lines]
        questions = [messages[0]["content"] for messages in held_out if len(messages) == 2]
        questions = questions[: arguments.questions]
        before, after = answers(base, questions), answers(result.model_dir, questions)
        evaluations, steps = read_evaluations(result.metrics_path), read_steps(result.metrics_path)
    rows = [
        [str(line["step"]), f"{line['eval_loss']:.4f}", f"{line['eval_perplexity']:.1f}"]
        for line in evaluations
    ]
    report.table(
        ["after step", "held-out loss", "perplexity"],
        rows,
        note=f"39 held-out conversations, {evaluations[0]['eval_tokens']} target tokens. {result.num_steps} "
        f"steps, {result.num_tokens:,} tokens ({steps[-1]['num_target_tokens']:,} trained on) in "
        f"{result.seconds:.0f} s of steps, {seconds:.0f} s in all, {torch.get_num_threads()} threads.",
    )
    table = [[shown(q), shown(a), shown(b)] for q, a, b in zip(questions, before, after, strict=True)]
    changed = sum(a != b for a, b in zip(before, after, strict=True))
    report.table(
        ["held-out question", "before", "after"],
        table,
        note=f"Greedy, repetition penalty 1.2, at most 32 tokens; {changed} of {len(questions)} differ. "
        "The model has 19 M parameters and two minutes of pretraining: it learns the form, not the facts.",
    )
    report.write()


PARTS = {"datasets": "train", "eval_datasets": "eval"}

if __name__ == "__main__":
    main()
