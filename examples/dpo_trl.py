"""Preference training with TRL's DPO trainer, with the weights in host memory.

    python examples/dpo_trl.py --model_name_or_path Qwen/Qwen3-8B \\
        --dataset_name trl-lib/ultrafeedback_binarized --output_dir runs/dpo

All arguments are TRL's; docs/guides/trl.md lists those that are refused. With TRL the two lines that name the
trainer would be `from trl import DPOTrainer` and `trainer = DPOTrainer(`.
"""

from datasets import load_dataset
from trl import DPOConfig, ModelConfig, ScriptArguments, TrlParser

from horizon_lm.trainers import HorizonDPOTrainer


def main() -> None:
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
    script, args, model = parser.parse_args_and_config()
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
    }
    data = load_dataset(script.dataset_name, name=script.dataset_config)
    trainer = HorizonDPOTrainer(
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
