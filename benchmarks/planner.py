"""Predicted and measured on the CPU: peak host memory of a run, and step time.

Each case is a process that trains a model from a configuration and loads everything that a run loads.
Memory is the process's high-water mark (VmHWM), median of three processes: placement in the C library's
heap is random, and the same run varies by up to 10 %. Time is the fastest step after the first, on the same
random tokens. `plan.calibrate` measures the profile before, between and after groups of four cases, and
each case is predicted with the median of each rate just before and after its group, so minutes of slowness
affect both. Times are CPU seconds of one thread, for the profile and the cases, since this machine has
other users; on a dedicated machine they equal wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from horizon_lm.config import TrainConfig
from horizon_lm.machine.profile import Profile
from horizon_lm.plan import calibrate
from horizon_lm.plan.outline import Outline, model_config
from horizon_lm.plan.predict import predict

from .report import Report

LLAMA = {"model_type": "llama", "max_position_embeddings": 4096}
SMALL = LLAMA | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "vocab_size": 16384}
SMALL |= {"num_attention_heads": 8, "num_key_value_heads": 8}
WIDE = LLAMA | {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 6, "vocab_size": 16384}
WIDE |= {"num_attention_heads": 16, "num_key_value_heads": 4}
DEEP = SMALL | {"num_hidden_layers": 20, "tie_word_embeddings": True}
QWEN = SMALL | {
    "model_type": "qwen3",
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
QWEN |= {"intermediate_size": 2048, "head_dim": 64}

# name: model, settings
CASES: dict[str, tuple[dict, dict]] = {
    "small, recompute": (SMALL, {"max_length": 512, "activations": "recompute"}),
    "small, keep": (SMALL, {"max_length": 512, "activations": "keep"}),
    "small, fp32": (SMALL, {"max_length": 256, "activations": "recompute", "dtype": "float32"}),
    "small, fp32, keep": (SMALL, {"max_length": 512, "activations": "keep", "dtype": "float32"}),
    "small, 4 micro-batches": (
        SMALL,
        {"max_length": 256, "gradient_accumulation_steps": 4, "activations": "recompute"},
    ),
    "small, batch of 4": (
        SMALL,
        {"max_length": 256, "per_device_train_batch_size": 4, "activations": "keep"},
    ),
    "small, long": (SMALL, {"max_length": 2048, "activations": "recompute"}),
    "small, eager": (
        SMALL,
        {"max_length": 512, "max_grad_norm": None, "update": "eager", "activations": "recompute"},
    ),
    "small, sync, blocks of 2": (SMALL, {"max_length": 512, "update": "sync", "checkpoint_interval": 2}),
    "wide, recompute": (WIDE, {"max_length": 256, "activations": "recompute"}),
    "wide, keep, 2 micro-batches": (
        WIDE,
        {"max_length": 128, "gradient_accumulation_steps": 2, "activations": "keep"},
    ),
    "wide, bf16 moments": (WIDE, {"max_length": 256, "moment_dtype": "bfloat16", "activations": "recompute"}),
    "deep, tied": (DEEP, {"max_length": 256, "activations": "recompute"}),
    "deep, half kept": (DEEP, {"max_length": 256, "activations": ["recompute*10", "keep*10"]}),
    "small, dpo": (SMALL, {"max_length": 512, "method": "dpo", "activations": "recompute"}),
    "small, dpo, keep": (SMALL, {"max_length": 256, "method": "dpo", "activations": "keep"}),
    "qwen3": (QWEN, {"max_length": 384, "activations": "recompute"}),
    "qwen3, fp32, 2 micro-batches": (
        QWEN,
        {"max_length": 256, "gradient_accumulation_steps": 2, "dtype": "float32", "activations": "recompute"},
    ),
}

_GROUP = 4  # cases between two measurements of the profile


def config_of(name: str) -> TrainConfig:
    model, settings = CASES[name]
    common = {"datasets": ["none.txt"], "device": "cpu", "optimizer_threads": 1, "skip_memory_check": True}
    return TrainConfig(init_model=model, **common, **settings)


def run_case(name: str, steps: int) -> None:
    """Train in this process and print the measurements."""
    torch.set_num_threads(1)
    from horizon_lm import HostModel
    from horizon_lm.config import model_settings_of
    from horizon_lm.preference.method import Method

    from .preferences import pairs_of

    config = config_of(name)
    settings = model_settings_of(config)
    model = HostModel.from_config(dict(config.init_model or {}), settings)
    generator = torch.Generator().manual_seed(0)
    shape = config.sides * config.per_device_train_batch_size, config.max_length
    ids = [
        torch.randint(0, 16384, shape, generator=generator) for _ in range(config.gradient_accumulation_steps)
    ]
    found = []
    for _ in range(steps + 1):
        start = time.process_time()
        if config.is_preference:
            reference = torch.zeros(len(ids) * shape[0], 2)
            batches, loss = Method(config).step(model, [pairs_of(i) for i in ids], reference)
            model.train_step(batches, lr=1e-5, loss_fn=loss)
        else:
            model.train_step([{"input_ids": i, "labels": i} for i in ids], lr=1e-5)
        found.append(time.process_time() - start)
    # Not ru_maxrss, which starts at the parent process's memory.
    lines = dict(
        line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line
    )
    peak = int(lines["VmHWM"].split()[0]) * 1024
    print(json.dumps({"bytes": peak, "seconds": min(found[1:])}))


def _in_a_process(name: str, steps: int) -> dict:
    command = [sys.executable, "-m", "benchmarks.planner", f"--case={name}", f"--steps={steps}"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def between(profiles: list[Profile]) -> Profile:
    """Return the median of each rate."""

    def middle(values: list) -> object:
        if isinstance(values[0], dict):
            return {key: middle([v[key] for v in values]) for key in values[0]}
        return statistics.median(values) if isinstance(values[0], float) else values[0]

    dumped = [profile.model_dump() for profile in profiles]
    return Profile.model_validate(
        {k: v if k == "sources" else middle([d[k] for d in dumped]) for k, v in dumped[0].items()}
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--profile-only", default="", help="write the measured profile to this file")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    if arguments.case:
        return run_case(arguments.case, arguments.steps)
    profiles = [calibrate.measure("cpu", time.process_time, threads=1, repeats=2)]
    measured: dict[str, dict] = {}
    for i, name in enumerate(CASES):
        runs = [_in_a_process(name, steps) for steps in (arguments.steps, 2, 2)]
        measured[name] = runs[0] | {"bytes": statistics.median(run["bytes"] for run in runs)}
        print(name, measured[name], flush=True)
        if (i + 1) % _GROUP == 0:
            profiles.append(calibrate.measure("cpu", time.process_time, threads=1, repeats=2))
    profile = between(profiles)
    if arguments.profile_only:
        with open(arguments.profile_only, "w", encoding="utf-8") as file:
            file.write(profile.to_yaml())
    rows, errors = [], []
    for i, name in enumerate(CASES):
        config = config_of(name)
        at_the_time = between(profiles[i // _GROUP : i // _GROUP + 2])
        at_the_time = at_the_time.model_copy(
            update={"process_bytes": profile.process_bytes, "heap_share": profile.heap_share}
        )
        found = predict(
            Outline(model_config(config), config),
            config,
            at_the_time,
            batch=config.sides * config.per_device_train_batch_size,
            tokens=config.max_length,
            micro_batches=config.gradient_accumulation_steps,
        )
        real = measured[name]
        memory, seconds = found.host_bytes / real["bytes"] - 1, found.seconds / real["seconds"] - 1
        errors.append((abs(memory), abs(seconds)))
        rows.append(
            [
                name,
                f"{real['bytes'] / 1e6:,.0f}",
                f"{found.host_bytes / 1e6:,.0f}",
                f"{memory:+.1%}",
                f"{real['seconds']:.3f}",
                f"{found.seconds:.3f}",
                f"{seconds:+.1%}",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    report = Report("planner-cpu", __doc__ or "")
    report.table(
        ["case", "host MB, measured", "predicted", "error", "s a step, measured", "predicted", "error"],
        rows,
        note=f"Within 3 % of memory: {sum(m <= 0.03 for m, _ in errors)} of {len(errors)}; within 15 % of "
        f"time: {sum(s <= 0.15 for _, s in errors)} of {len(errors)}. Largest errors "
        f"{max(m for m, _ in errors):.1%} and {max(s for _, s in errors):.1%}. "
        f"{arguments.steps} steps after the first.",
    )
    report.parts.append("The profile:\n\n```yaml\n" + profile.to_yaml().partition("sources:")[0] + "```")
    report.write()


if __name__ == "__main__":
    main()
