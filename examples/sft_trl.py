"""Supervised fine-tuning with TRL's trainer, with the weights in host memory.

    python examples/sft_trl.py --model_name_or_path Qwen/Qwen3-8B-Base \\
        --dataset_name trl-lib/Capybara --output_dir runs/sft

All arguments are TRL's; docs/guides/trl.md lists those that are refused. With TRL the two lines that name the
trainer would be `from trl import SFTTrainer` and `trainer = SFTTrainer(`.
"""

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser

from horizon_lm.trainers import HorizonSFTTrainer


def main() -> None:
    parser = TrlParser((ScriptArguments, SFTConfig, ModelConfig))
    script, args, model = parser.parse_args_and_config()
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    data = load_dataset(script.dataset_name, name=script.dataset_config)
    trainer = HorizonSFTTrainer(
        model=model.model_name_or_path,
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
