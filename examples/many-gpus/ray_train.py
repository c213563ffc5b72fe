"""Train on a Ray cluster, one worker per GPU.

    python examples/many-gpus/ray_train.py --workers 16 run.yaml [key=value ...]

Files and `output_dir` must lie on storage that all nodes share. After a failure Ray starts all workers again,
which go on from the last checkpoint.

TESTED with Ray 2.60: two workers on one machine's CPUs (`--cpu`). UNTESTED: GPUs (NCCL), several nodes.
"""

import argparse
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer


def work(given: dict[str, Any]) -> None:
    """Train as one of the workers, which Ray has connected."""
    from horizon_lm import TrainConfig, train

    train(TrainConfig.from_yaml(given["config"], given["settings"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, required=True, help="GPUs of all nodes")
    parser.add_argument("--cpu", action="store_true", help="workers without GPUs")
    parser.add_argument("--restarts", type=int, default=3, help="how often Ray starts the workers again")
    parser.add_argument("config", type=Path)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    options = parser.parse_args()
    trainer = TorchTrainer(
        work,
        train_loop_config={
            "config": str(options.config.resolve()),
            "settings": ["resume_from_checkpoint=auto", *options.settings],
        },
        scaling_config=ScalingConfig(num_workers=options.workers, use_gpu=not options.cpu),
        torch_config=TorchConfig(backend="gloo" if options.cpu else "nccl"),
        run_config=RunConfig(failure_config=FailureConfig(max_failures=options.restarts)),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
