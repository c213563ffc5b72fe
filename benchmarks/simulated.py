"""The papers' settings, simulated: our schedule on their machines, next to their published figures.

Every figure of ours is **simulated**, not measured: the engine's schedule with the rates of a shipped
profile (`machine/profiles`), whose sources say which rates are measurements by others, which are data-sheet
peaks, and what is unknown. Kernel launches, memory contention between lanes and fragmentation are ignored,
so times are lower bounds. Published figures are those of Horizon-LM (arXiv:2602.04816, withdrawn) and
MegaTrain (arXiv:2604.05091), as others collected them from its tables and pictures; some contradict each
other.

TFLOPS is 6 N x tokens/s with all N parameters and all tokens, as in the papers. Ours are for rows of 1024
tokens in one micro-batch of the given batch size, with clipping and fp32 masters and moments. The planner
chooses what each layer keeps, except for the rows of depth and width, which recompute all layers as the
papers did. If a paper gives no batch size, the planner splits 98,304 tokens per step.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice

from horizon_lm.bench.models import shape
from horizon_lm.bench.protocol import Case
from horizon_lm.config import TrainConfig
from horizon_lm.errors import DoesNotFitError
from horizon_lm.plan.run_plan import plan_run

from . import many_gpus, placement, remedies
from .report import Report

QWEN = {"model_type": "qwen2", "vocab_size": 152064, "max_position_embeddings": 131072}
SHAPES = {
    "7B": (3584, 18944, 28, 28, 4),
    "14B": (5120, 13824, 48, 40, 8),
    "32B": (5120, 27648, 64, 40, 8),
    "72B": (8192, 29568, 80, 64, 8),
}


def qwen(name: str, **changes: int) -> dict:
    width, mlp, layers, heads, kv = SHAPES[name]
    found = QWEN | {"hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers}
    return found | {"num_attention_heads": heads, "num_key_value_heads": kv} | changes


def wider(factor: float) -> dict:
    """Return the 7B shape with more heads of 128."""
    heads = round(28 * factor)
    return qwen(
        "7B",
        hidden_size=128 * heads,
        intermediate_size=round(18944 * factor / 128) * 128,
        num_attention_heads=heads,
        num_key_value_heads=heads if heads % 4 else 4,
    )


# what, model, machine, batch (0: the planner's), published TFLOPS and a note
def cases() -> Iterator[tuple[str, dict, str, int, str]]:
    yield "7B", qwen("7B"), "gh200", 158, "284.7 (table 7)"
    yield "14B", qwen("14B"), "gh200", 96, "266.3 (table 4)"
    yield "32B", qwen("32B"), "gh200", 0, "> 250"
    yield "7B", qwen("7B"), "a100-pcie", 0, "128"
    yield "14B", qwen("14B"), "a100-pcie", 0, "122"
    yield "32B", qwen("32B"), "a100-pcie", 0, "114"
    yield "72B", qwen("72B"), "h200-1.5tb", 0, "no number found"
    for what in ("GPT-OSS-120B", "GPT-OSS-120B, no clipping"):
        yield what, {"model_type": "gpt_oss"}, "h200-1.5tb", 0, "no number found"
    for layers, said in ((28, 284), (42, 272), (56, 264), (84, 255), (132, 247), (180, 227)):
        yield f"7B width, {layers} layers", qwen("7B", num_hidden_layers=layers), "gh200", 96, str(said)
    for factor, number in ((1.0, "406"), (3.0, "264"), (3.5, "193"), (4.0, "136"), (5.0, "about 100")):
        yield f"28 layers, width {factor:g}x", wider(factor), "gh200", 16, number


# Shapes and tokens per step of the goals on a GPU.
GOALS = (("qwen3-4b", 16), ("qwen3-4b", 64), ("qwen2.5-7b", 148))


def row(what: str, model: dict, machine: str, batch: int, published: str) -> list[str]:
    clip = {"max_grad_norm": None} if "no clipping" in what else {}
    policy = "recompute" if "width" in what else "auto"
    size = {"per_device_train_batch_size": batch} if batch else {"tokens_per_step": 98304}
    attention = "eager" if model["model_type"] == "gpt_oss" else "sdpa"
    config = TrainConfig(
        init_model=model,
        datasets=["none"],
        max_length=1024,
        attn_implementation=attention,
        activations=policy,
        **size,
        **clip,
    )
    note = ""
    try:
        plan = plan_run(config, machine)
    except DoesNotFitError as error:
        note = (
            error.message.partition(":")[0]
            + " short by "
            + error.message.partition("short by ")[2].partition(";")[0]
        )
        plan = plan_run(config.replace(skip_memory_check=True, activations="recompute"), machine)
    found, parameters = plan.prediction, plan.planner.outline.num_parameters
    kept = len(found.plan.kept)
    return [
        what,
        machine,
        f"{parameters / 1e9:.2f}",
        f"{found.plan.micro_batches} x {found.batch}",
        f"{found.host_bytes / 1e9:,.0f}",
        f"{found.device_bytes / 1e9:.1f}",
        f"{kept} of {plan.planner.outline.num_layers}",
        f"{found.seconds:.1f}",
        f"{found.tokens_per_second:,.0f}",
        f"{6 * parameters * found.tokens_per_second / 1e12:.0f}",
        published,
        note or found.limit(),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="one results file each")
    for name in parser.parse_args(argv).part:
        module, title = PARTS[name]
        command = f"python -m benchmarks simulated --part {name}"
        report = Report(title, module.__doc__ or "", command=command)
        module.fill(report)
        report.write()


def fill(report: Report, most: int | None = None) -> None:
    """Simulate, and add the table to a report. most: number of cases, all by default."""
    head = ["model", "profile", "B parameters", "micro-batches", "host GB", "device GB", "layers kept"]
    head += [
        "s a step",
        "tokens/s",
        "TFLOPS, simulated",
        "TFLOPS, published",
        "limited by, or short of",
    ]
    rows = []
    for case in islice(cases(), most):
        rows.append(row(*case))
        print(" | ".join(rows[-1]), flush=True)
    report.table(
        head,
        rows,
        note="Simulated with the profiles named; nothing in this table was run on a GPU. GPT-OSS: N counts "
        "all experts, of which a token uses 4 of 128, so its 6 N is no measure of work. "
        "What they widened and from which shape is not said; here it is width and MLP of the 7B shape.",
    )
    report.section("Remedies", remedies.__doc__ or "")
    for name, sequences in islice(GOALS, most):
        case = Case(shape(name), length=1024, sequences=sequences, rows=0, device="cuda", activations="auto")
        found = remedies.rows(f"{name}, {sequences} x 1024 tokens", case, "h200-1.5tb")
        report.table(remedies.HEAD, found)


PARTS = {
    "papers": (sys.modules[__name__], "simulated"),
    "residents-and-rounds": (placement, "residents-and-rounds-simulated"),
    "many-gpus": (many_gpus, "many-gpus-simulated"),
}

if __name__ == "__main__":
    main()
