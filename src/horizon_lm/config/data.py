"""Settings of training and evaluation data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field, field_validator, model_validator

from horizon_lm.config.aliases import canonical_entry
from horizon_lm.config.base import STRICT, Settings, fault, setting

# LLaMA-Factory's `tags`: two keys of a message, then its roles.
TAGS = (
    *("role_tag", "content_tag", "user_tag", "assistant_tag", "observation_tag", "function_tag"),
    "system_tag",
)

IGNORED = -100  # label of a token that is not trained on, as in transformers
MOST = 10**12  # rows, documents or steps: beyond any real number, within NumPy's integers


class DatasetConfig(BaseModel):
    """An entry of `datasets`: one source of training data."""

    model_config = STRICT

    path: str = Field(
        min_length=1,
        description="A file, folder or glob of .jsonl, .json, .csv, .parquet, .txt, .md or .py files (all "
        "but parquet also as .gz); a folder saved by `datasets`; a Hub name; or python-stdlib (the source of "
        "Python's standard library).",
    )
    format: Literal[
        "auto", "text", "messages", "prompt_completion", "alpaca", "sharegpt", "preference", "labelled"
    ] = Field(
        default="auto", description="How rows are read; auto detects it from the columns of the first row."
    )
    columns: dict[str, str | None] = Field(
        default_factory=dict,
        description="Columns to rename, old name to new; null omits one.",
    )
    tags: dict[str, str] = Field(
        default_factory=dict,
        description="Other names for keys and roles of messages, as in LLaMA-Factory: role_tag and "
        "content_tag are keys; user_tag, assistant_tag and so on are roles.",
        json_schema_extra={"expects": f"a mapping with some of {', '.join(TAGS)}"},
    )
    max_samples: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="Read at most this many rows, from the first; null uses the setting max_samples.",
    )
    split: str = Field(
        default="train",
        min_length=1,
        description="Split to read; in a folder, detected from file names.",
    )
    name: str | None = Field(default=None, description="Configuration of a Hub dataset.")
    revision: str | None = Field(
        default=None, description="Branch, tag or commit of a Hub dataset; a commit is reproducible."
    )
    text_column: str = Field(
        default="text", min_length=1, description="Column that holds the text of plain-text rows."
    )
    image_dir: str | None = Field(
        default=None,
        min_length=1,
        description="Folder for relative paths of pictures; null is the folder of the data.",
    )
    follow_links: bool = Field(
        default=False,
        description="Also read files outside a data folder to which its links or file lists "
        "(dataset_info.json, state.json) lead.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="How often each document appears per epoch; 0.25 takes a seeded quarter of them.",
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
            return canonical_entry(values)
        except ValueError as error:
            raise fault(str(error), key="datasets", hint="keep one of them") from None


class DataSettings(Settings):
    """The data settings of `TrainConfig`."""

    datasets: list[DatasetConfig] = setting(
        ...,
        "Training data: files, folders, globs, Hub names or python-stdlib; an entry may be a mapping.",
        group="Data",
        resume="ask",
        min_length=1,
        expects="a path, or a list of paths or of mappings with a path",
    )
    dataset_dir: str | None = setting(
        None,
        "Folder of LLaMA-Factory's dataset_info.json, which resolves names in datasets and eval_datasets, "
        "also several separated by commas. The saved configuration holds the resolved entries.",
        group="Data",
        resume="ask",
        min_length=1,
    )
    max_samples: int | None = setting(
        None,
        "Read at most this many rows of each dataset, from the first; null reads all.",
        group="Data",
        resume="ask",
        unit="rows",
        ge=1,
        le=MOST,
    )
    max_train_bytes: int | None = setting(
        None,
        "Read at most this much text; null reads all.",
        group="Data",
        resume="ask",
        unit="bytes",
        ge=1,
        le=10**18,
    )
    max_length: int = setting(
        1024,
        "Length of a training sequence, and of each document of a pair.",
        group="Data",
        resume="ask",
        unit="tokens",
        ge=2,
        le=10**9,
    )
    truncation: Literal["auto", "drop", "keep_start", "keep_end", "split"] = setting(
        "auto",
        "Treatment of documents longer than max_length; auto splits text and drops others. Wrapped packing "
        "ignores it and cuts everything.",
        group="Data",
        resume="ask",
    )
    packing: bool = setting(
        True,
        "Fill sequences with several documents; false gives each document its own, padded to the batch.",
        group="Data",
        resume="ask",
    )
    packing_strategy: Literal["auto", "wrapped", "bfd"] = setting(
        "auto",
        "bfd (best fit decreasing) keeps documents whole and separate: positions start at 0, no attention "
        "across. wrapped joins them and cuts every max_length tokens. auto is wrapped for text, bfd for "
        "others.",
        group="Data",
        resume="ask",
    )
    loss_on: Literal["auto", "all", "completion", "assistant", "last_assistant"] = setting(
        "auto",
        "Tokens to train on; auto: all of a text, the completion of a prompt, every assistant turn of a "
        "conversation.",
        group="Data",
        resume="ask",
    )
    chat_template: str | None = setting(
        None,
        "A .jinja file, or the built-in chatml, plain or alpaca; null uses the tokenizer's own. The trained"
        " model is saved with it.",
        group="Data",
        resume="ask",
        min_length=1,
    )
    chat_template_kwargs: dict[str, Any] = setting(
        {}, "Additional variables for the chat template, such as enable_thinking.", group="Data", resume="ask"
    )
    on_bad_row: Literal["raise", "skip"] = setting(
        "raise",
        "Response to an unusable row: end the run, or skip and count it.",
        group="Data",
        resume="ask",
    )
    on_bad_image: Literal["raise", "skip"] = setting(
        "raise",
        "Response to a picture that is missing, damaged or too large: end the run, or skip its row and count "
        "it.",
        group="Data",
        resume="ask",
    )
    streaming: bool = setting(
        False,
        "Tokenise while training, for data too large to tokenise first; needs max_steps.",
        group="Data",
        resume="ask",
    )
    buffer_size: int = setting(
        2000,
        "Documents of a stream that are packed and shuffled together.",
        group="Data",
        resume="ask",
        unit="documents",
        ge=1,
        le=MOST,
    )
    dataset_num_proc: int | None = setting(
        None,
        "Processes that tokenise; null uses one per core. Tokens do not depend on it.",
        group="Data",
        resume="free",
        unit="processes",
        ge=1,
        le=1024,
    )
    dataset_cache_dir: str | None = setting(
        "auto",
        "Folder that caches tokens for later runs, by content and settings; auto is the user's cache "
        "folder, null caches nothing.",
        group="Data",
        resume="free",
        min_length=1,
    )
    dataloader_num_workers: int = setting(
        1,
        "Threads that prepare the next steps; 0 prepares each on demand. The order is the same.",
        group="Data",
        resume="free",
        unit="threads",
        ge=0,
        le=64,
    )
    data_seed: int | None = setting(
        None,
        "Seed of the data order; null uses seed.",
        group="Data",
        resume="ask",
        ge=0,
        lt=2**63,
        expects="a whole number >= 0, or null",
    )
    eval_datasets: list[DatasetConfig] = setting(
        [],
        "Evaluation data, as in datasets.",
        group="Evaluation",
        resume="free",
        expects="a path, or a list of paths or of mappings with a path",
    )
    val_size: int | float = setting(
        0,
        "Documents of datasets to hold out for evaluation instead: a share below 1, or a count.",
        group="Evaluation",
        resume="ask",
        unit="documents",
        expects=f"a whole number >= 0 and <= {MOST}, or a share below 1",
    )
    eval_strategy: Literal["no", "steps", "epoch"] = setting(
        "no",
        "When to evaluate; the end of the run always is, if there is evaluation data.",
        group="Evaluation",
        resume="free",
    )
    eval_steps: int = setting(
        100,
        "Steps between evaluations, with eval_strategy: steps.",
        group="Evaluation",
        resume="free",
        unit="steps",
        ge=1,
    )
    eval_on_start: bool = setting(
        False, "Also evaluate before the first step.", group="Evaluation", resume="free"
    )
    per_device_eval_batch_size: int | None = setting(
        None,
        "Sequences in an evaluation micro-batch; null uses per_device_train_batch_size.",
        group="Evaluation",
        resume="free",
        unit="sequences",
        ge=1,
        le=MOST,
    )

    @model_validator(mode="before")
    @classmethod
    def _look_names_up(cls, values: Any) -> Any:
        """Replace names by the entries that `dataset_dir` has for them, and unset it."""
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
