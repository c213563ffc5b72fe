"""GRPO with TRL's trainer, with the weights in host memory. Rows have a `prompt` and an `answer`.

    python examples/grpo_trl.py --model_name_or_path Qwen/Qwen3-8B --dataset_name FOLDER \\
        --num_generations 8 --max_completion_length 256 --output_dir runs/grpo

All arguments are TRL's; docs/guides/trl.md lists those that are refused. With TRL the two lines that name the
trainer would be `from trl import GRPOTrainer` and `trainer = GRPOTrainer(`.
"""

from typing import Any

from datasets import load_dataset
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from horizon_lm.trainers import HorizonGRPOTrainer


def ends_with_answer(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(text.strip().endswith(right)) for text, right in zip(completions, answer, strict=True)]


def main() -> None:
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
    script, args, model = parser.parse_args_and_config()
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    data = load_dataset(script.dataset_name, name=script.dataset_config)
    trainer = HorizonGRPOTrainer(
        model=model.model_name_or_path,
        reward_funcs=ends_with_answer,
        args=args,
        train_dataset=data[script.dataset_train_split],
        eval_dataset=data[script.dataset_test_split] if args.eval_strategy != "no" else None,
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)


if __name__ == "__main__":
    main()
