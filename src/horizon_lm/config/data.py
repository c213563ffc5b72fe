"""The settings of data: what is read, how it becomes sequences, and what is evaluated on, and when."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from horizon_lm.config import aliases as config_aliases
from horizon_lm.config.base import STRICT, Settings, fault, setting

# The words of LLaMA-Factory's `tags`: two keys of a message, and the roles it may have.
TAGS = (
    *("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag"),
    "system_tag",
)

IGNORED = -100  # label of a token that is not trained on, as in transformers
MOST = 10**12  # rows, documents or steps: far more than there are, and NumPy can count them


class DatasetConfig(BaseModel):
    """One source of training text; an entry of `datasets`."""

    model_config = STRICT

    path: str = Field(
        min_length=1,
        description="A file, folder or glob of .jsonl, .json, .csv, .parquet, .txt, .md or .py files (all "
        "but parquet also as .gz); a folder that `datasets` has saved; a name on the Hugging Face Hub; or "
        "python-stdlib (the source of Python's own standard library).",
    )
    format: Literal["auto", "text", "messages", "prompt_completion", "alpaca", "sharegpt"] = Field(
        default="auto", description="How rows are read; auto looks at the columns of the first."
    )
    columns: dict[str, str | None] = Field(
        default_factory=dict,
        description="Columns to rename, old name to new name; null leaves one out.",
    )
    tags: dict[str, str] = Field(
        default_factory=dict,
        description="Keys and roles of messages that have other names, as in LLaMA-Factory: role_tag and "
        "content_tag are keys, user_tag, assistant_tag and so on are roles.",
        json_schema_extra={"expects": f"a mapping with some of {', '.join(TAGS)}"},
    )
    max_samples: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="Read at most so many rows, the first ones; null means the setting max_samples.",
    )
    split: str = Field(
        default="train",
        min_length=1,
        description="The split to read; in a folder, known by the files' names.",
    )
    name: str | None = Field(default=None, description="The configuration of a dataset on the Hub.")
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a dataset on the Hub; a commit is reproducible."
    )
    text_column: str = Field(
        default="text", min_length=1, description="The column that holds the text of a row of plain text."
    )
    follow_links: bool = Field(
        default=False,
        description="Read also what lies outside a folder of data, where links in it or its lists of files "
        "(dataset_info.json, state.json) lead there.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="How often each of its documents comes in an epoch; 0.25 takes a seeded quarter of them.",
    )

    @field_validator("tags")
    @classmethod
    def _check_tags(cls, value: dict[str, str]) -> dict[str, str]:
        if not value.keys() <= set(TAGS):
            raise ValueError("an unknown tag")  # reported with the field's `expects`
        return value

    @model_validator(mode="before")
    @classmethod
    def _read_aliases(cls, values: Any) -> Any:
        try:
            return config_aliases.canonical_entry(values)
        except ValueError as error:
            raise fault(str(error), key="datasets", hint="keep one of them") from None


class DataSettings(Settings):
    """Part of `TrainConfig`."""

    datasets: list[DatasetConfig] = setting(
        ...,
        "What to train on: files, folders, globs, Hub names or python-stdlib; an entry may be a mapping.",
        group="Data",
        min_length=1,
        expects="a path, or a list of paths or of mappings with a path",
    )
    dataset_dir: str | None = setting(
        None,
        "Folder of LLaMA-Factory's dataset_info.json: names in datasets and eval_datasets, also several "
        "divided by commas, are looked up in it. The saved configuration holds what was found instead.",
        group="Data",
        min_length=1,
    )
    max_samples: int | None = setting(
        None,
        "Read at most so many rows of each dataset, the first ones; null reads all.",
        group="Data",
        unit="rows",
        ge=1,
        le=MOST,
    )
    max_train_bytes: int | None = setting(
        None, "Read at most so much text; null reads all.", group="Data", unit="bytes", ge=1, le=10**18
    )
    max_length: int = setting(
        1024, "Length of a training sequence.", group="Data", unit="tokens", ge=2, le=10**9
    )
    truncation: Literal["auto", "drop", "keep_start", "keep_end", "split"] = setting(
        "auto",
        "What becomes of a document longer than max_length; auto splits text and drops others. Not for "
        "wrapped packing, which cuts everything.",
        group="Data",
    )
    packing: bool = setting(
        True,
        "Fill sequences with several documents; false gives each document its own and pads to the batch.",
        group="Data",
    )
    packing_strategy: Literal["auto", "wrapped", "bfd"] = setting(
        "auto",
        "bfd (best fit decreasing) keeps documents whole and apart: positions from 0, no attention across. "
        "wrapped joins them and cuts every max_length tokens. auto is wrapped for text, bfd for others.",
        group="Data",
    )
    loss_on: Literal["auto", "all", "completion", "assistant", "last_assistant"] = setting(
        "auto",
        "Which tokens are trained on; auto: all of a text, the completion of a prompt, every turn of the "
        "assistant in a conversation.",
        group="Data",
    )
    chat_template: str | None = setting(
        None,
        "A .jinja file, or the built-in chatml, plain or alpaca; null means the tokenizer's own. It is saved "
        "with the trained model.",
        group="Data",
        min_length=1,
    )
    chat_template_kwargs: dict[str, Any] = setting(
        {}, "Further variables for the chat template, such as enable_thinking.", group="Data"
    )
    on_bad_row: Literal["raise", "skip"] = setting(
        "raise", "What a row that cannot be used does: end the run, or be counted and left out.", group="Data"
    )
    streaming: bool = setting(
        False,
        "Tokenise while training, for data too large to tokenise first; needs max_steps.",
        group="Data",
    )
    buffer_size: int = setting(
        2000,
        "Documents of a stream that are packed and shuffled together.",
        group="Data",
        unit="documents",
        ge=1,
        le=MOST,
    )
    dataset_num_proc: int | None = setting(
        None,
        "Processes that tokenise; null means one for each core. The tokens do not depend on it.",
        group="Data",
        unit="processes",
        ge=1,
        le=1024,
    )
    dataset_cache_dir: str | None = setting(
        "auto",
        "Where tokens are kept for the next run, by content and settings; auto is the user's cache folder, "
        "null keeps none.",
        group="Data",
        min_length=1,
    )
    dataloader_num_workers: int = setting(
        1,
        "Threads that make the next steps ready; 0 makes each when it is needed. The order is the same.",
        group="Data",
        unit="threads",
        ge=0,
        le=64,
    )
    data_seed: int | None = setting(
        None,
        "Seed of the data order; null means seed.",
        group="Data",
        ge=0,
        lt=2**63,
        expects="a whole number >= 0, or null",
    )
    eval_datasets: list[DatasetConfig] = setting(
        [],
        "What to evaluate on, as in datasets.",
        group="Evaluation",
        expects="a path, or a list of paths or of mappings with a path",
    )
    val_size: int | float = setting(
        0,
        "Documents of datasets to hold out for evaluation instead: a share below 1, or a count.",
        group="Evaluation",
        unit="documents",
        expects=f"a whole number >= 0 and <= {MOST}, or a share below 1",
    )
    eval_strategy: Literal["no", "steps", "epoch"] = setting(
        "no",
        "When to evaluate; the end of the run always, where there is something to evaluate on.",
        group="Evaluation",
    )
    eval_steps: int = setting(
        100, "Steps between evaluations, with eval_strategy: steps.", group="Evaluation", unit="steps", ge=1
    )
    eval_on_start: bool = setting(False, "Evaluate before the first step too.", group="Evaluation")
    per_device_eval_batch_size: int | None = setting(
        None,
        "Sequences in a micro-batch of evaluation; null means per_device_train_batch_size.",
        group="Evaluation",
        unit="sequences",
        ge=1,
        le=MOST,
    )

    @model_validator(mode="before")
    @classmethod
    def _look_names_up(cls, values: Any) -> Any:
        """Entries in place of names of `dataset_dir`, which is then as if it had not been given."""
        if not isinstance(values, dict) or not isinstance(values.get("dataset_dir"), str):
            return values
        from horizon_lm.config import dataset_info  # read by few

        result = {**values, "dataset_dir": None}
        for key in ("datasets", "eval_datasets"):
            try:
                if result.get(key) is not None:
                    result[key] = dataset_info.resolved(result[key], values["dataset_dir"])
            except dataset_info.InfoError as error:
                raise fault(error.message, key=key, hint=error.hint) from None
        return result

    @field_validator("datasets", "eval_datasets", mode="before")
    @classmethod
    def _list_datasets(cls, value: Any) -> Any:
        entries = value if isinstance(value, list) else [] if value is None else [value]
        return [{"path": entry} if isinstance(entry, str) else entry for entry in entries]

    @field_validator("val_size")
    @classmethod
    def _check_val_size(cls, value: int | float) -> int | float:
        if not 0 <= value <= MOST or isinstance(value, float) and value >= 1:
            raise ValueError("neither a count nor a share")  # reported with the field's `expects`
        return value
