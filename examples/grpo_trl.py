"""GRPO with TRL's trainer on the streamed engine. Rows have a `prompt` and the `answer` to end with.

    python examples/grpo_trl.py --model_name_or_path Qwen/Qwen3-8B --dataset_name FOLDER \
        --output_dir runs/grpo --dtype bfloat16 --num_generations 8 --max_completion_length 256

Plain TRL: `from trl import GRPOTrainer`, and `trainer = GRPOTrainer(`.
"""

from datasets import load_dataset
from trl import GRPOConfig, ModelConfig, ScriptArguments, TrlParser

from horizon_lm.trainers import HorizonGRPOTrainer


def correct(completions, answer, **_):
    return [float(text.strip().endswith(right)) for text, right in zip(completions, answer, strict=True)]


if __name__ == "__main__":
    parser = TrlParser((ScriptArguments, GRPOConfig, ModelConfig))
    script_args, training_args, model_args = parser.parse_args_and_config()
    training_args.model_init_kwargs = {"dtype": model_args.dtype}
    dataset = load_dataset(script_args.dataset_name, split=script_args.dataset_train_split)

    trainer = HorizonGRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=correct,
        args=training_args,
        train_dataset=dataset,
    )
    trainer.train()
    trainer.save_model(training_args.output_dir)
