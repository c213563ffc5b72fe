"""Resume from a checkpoint: choose it, compare its settings, load its state."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from horizon_lm.checkpoint import folder as checkpoints
from horizon_lm.checkpoint.adapted import check_base
from horizon_lm.checkpoint.disk import checksum, damaged
from horizon_lm.checkpoint.folder import Checkpoint, Rejected, RunFolder
from horizon_lm.checkpoint.identify import identify, no_checkpoint, refuse_trainer
from horizon_lm.checkpoint.reader import load_buffers, load_units, read_small
from horizon_lm.config import DatasetConfig, TrainConfig
from horizon_lm.config.base import resumable
from horizon_lm.errors import CheckpointError, ConfigError, DataError, OtherBaseError
from horizon_lm.host_model import HostModel
from horizon_lm.plan.step_size import CUT
from horizon_lm.training.run_settings import AUTO, LATEST, is_template_file, places_of
from horizon_lm.training.state import RunState
from horizon_lm.training.together import Together, shared
from horizon_lm.words import count

FREE = resumable(TrainConfig, "free")
FIXED = resumable(TrainConfig, "fixed")
LENGTH = resumable(TrainConfig, "length")


@dataclass(frozen=True)
class Resume:
    """checkpoints: candidates, best first. in_place: they lie in the run's own folder."""

    checkpoints: tuple[Checkpoint, ...]
    in_place: bool


def wants_own_folder(config: TrainConfig) -> bool:
    """Tell whether the run may continue in an output_dir that holds it already."""
    source = config.resume_from_checkpoint
    if source in (LATEST, AUTO):
        return True
    return source is not None and _lies_in(Path(source).expanduser(), Path(config.output_dir).expanduser())


def find(
    config: TrainConfig, folder: RunFolder, warn: Callable[[str], None], together: Together
) -> Resume | None:
    """Find the checkpoints to resume from, as rank 0 sees them; None for a new run.

    Raises CheckpointError, ConfigError.
    """

    def look() -> tuple[list[str], bool] | None:
        found = _find(config, folder, warn)
        return None if found is None else ([str(one.path) for one in found.checkpoints], found.in_place)

    told = together.first("checkpoints to resume from", look)
    return None if told is None else Resume(tuple(_opened(told[0], together)), bool(told[1]))


def list_together(run: Path, together: Together) -> tuple[list[Checkpoint], list[Rejected]]:
    """Return the checkpoints of a run, latest first, and the invalid ones, as rank 0 sees them."""

    def look() -> tuple[list[str], list[tuple[str, str]]]:
        found, rejected = checkpoints.list_checkpoints(run)
        return [str(one.path) for one in found], [(str(one.path), one.reason) for one in rejected]

    paths, rejected = together.first("checkpoints of the run", look)
    return _opened(paths, together), [Rejected(Path(path), reason) for path, reason in rejected]


def _opened(paths: Sequence[str], together: Together) -> list[Checkpoint]:
    """Open checkpoints that rank 0 has found. Raises CheckpointError if another rank cannot."""
    return together.each("open checkpoints", lambda: [checkpoints.open_checkpoint(Path(p)) for p in paths])


def _find(config: TrainConfig, folder: RunFolder, warn: Callable[[str], None]) -> Resume | None:
    source = config.resume_from_checkpoint
    if source is None:
        return None
    place = folder.path if source in (LATEST, AUTO) else Path(source).expanduser()
    if source == AUTO:
        found, rejected = checkpoints.list_checkpoints(place)
        if not found and not rejected:
            return None
    looked = identify(place)
    if not looked.checkpoints and not looked.rejected:
        error = no_checkpoint(looked, "resume")
        if source == LATEST:
            error.hint = f"{error.hint}; resume_from_checkpoint=auto starts a new run if there is none"
        raise error
    found = checkpoints.candidates(place, warn)
    refuse_trainer(found)
    check_settings(config, found[0])
    if config.max_steps > 0:
        _check_length(config, found[0], config.max_steps, found[0].manifest.step)
    return Resume(tuple(found), _lies_in(place, folder.path))


def _lies_in(place: Path, run: Path) -> bool:
    return place.resolve() in (run.resolve(), *(p.resolve() for p in run.glob("checkpoint-*")))


def check_settings(config: TrainConfig, checkpoint: Checkpoint) -> None:
    """Raise ConfigError for changed settings that alter results, with their names."""
    changed = changed_settings(config, checkpoint)
    for title, keys, hint in (
        (
            "cannot be changed in a run",
            FIXED,
            "start a new run: model_name_or_path=RUN/model, another output_dir",
        ),
        (
            "alter the results of the run that is resumed",
            changed.keys() - FREE - FIXED - LENGTH,
            "allow_changed_settings=true resumes with the new values",
        ),
    ):
        named = [key for key in changed if key in keys]
        if named and not (config.allow_changed_settings and keys != FIXED):
            parts = [f"{key} was {_short(changed[key][0])}, is {_short(changed[key][1])}" for key in named]
            raise ConfigError(f"settings that {title}: {'; '.join(parts)}", hint=hint)


def _whole(entries: Any) -> Any:
    """Complete entries of datasets with defaults of settings that are newer than they are."""
    if not isinstance(entries, list):
        return entries
    defaults = DatasetConfig(path="a").model_dump()
    return [{**defaults, **entry} if isinstance(entry, dict) else entry for entry in entries]


def cut_of(resume: Resume | None, config: TrainConfig) -> dict[str, int]:
    """Return batch size and accumulation of the resumed run, if `tokens_per_step` left them to the planner;
    empty for a new run, and if the settings now ask for another step."""
    return _cut_in(resume.checkpoints[0], config) if resume is not None else {}


def _cut_in(checkpoint: Checkpoint, config: TrainConfig) -> dict[str, int]:
    saved, tokens = checkpoint.manifest.config, config.tokens_per_step
    same = ("tokens_per_step", "max_length")
    if tokens is None or any(saved.get(key) != getattr(config, key) for key in same):
        return {}
    cut = {key: int(saved[key]) for key in CUT}
    given = {key: getattr(config, key) for key in CUT}
    # Both set, and to another product: files of earlier versions, which set what was open.
    both = config.model_fields_set.issuperset(CUT)
    is_odd = both and tokens != "auto" and math.prod(given.values()) != max(1, tokens // config.row_tokens)
    for key in CUT:
        is_open = key not in config.model_fields_set or is_odd and given[key] == _default(key)
        if not is_open and given[key] != cut[key]:
            return {}
    return cut


def with_chunk_of(resume: Resume | None, config: TrainConfig) -> TrainConfig:
    """Keep the loss chunk that was chosen for the resumed run, since results depend on it bitwise."""
    if resume is None or config.loss_chunk_tokens != "auto":
        return config
    saved = resume.checkpoints[0].manifest.config.get("loss_chunk_tokens", "auto")
    return config.replace(loss_chunk_tokens=saved)


def with_reduction_of(resume: Resume | None, config: TrainConfig, world: int) -> TrainConfig:
    """Keep the reduction that was chosen for the resumed run; a run of one rank goes on with its bits."""
    if resume is None or config.reduction != "auto" or world == 1:
        return config
    return config.replace(reduction=_reduction_of(resume.checkpoints[0].manifest.config))


def _reduction_of(saved: Mapping[str, Any]) -> str:
    """Return the reduction of a saved run: one rank has none, and its bits are those of exact."""
    found = str(saved.get("reduction", "auto"))
    return "exact" if found == "auto" else found


def _default(key: str) -> Any:
    return TrainConfig.model_fields[key].default


def changed_settings(config: TrainConfig, checkpoint: Checkpoint) -> dict[str, tuple[Any, Any]]:
    """Return setting -> (value then, value now) of changed settings.

    A setting that is newer than the checkpoint had its default then. Files whose content is compared later
    may be at another path.
    """
    # Before there were methods, all was supervised tuning.
    saved = {"method": "sft", **checkpoint.manifest.config}
    now = {**config.to_dict(), **_cut_in(checkpoint, config)}
    if config.method == "auto":  # as the data say, which are compared later
        now["method"] = saved["method"]
    if config.tokens_per_step is not None:  # what is open is not changed
        now |= {key: saved[key] for key in CUT if key not in config.model_fields_set}
    if config.loss_chunk_tokens == "auto":
        now["loss_chunk_tokens"] = saved.get("loss_chunk_tokens", "auto")
    saved["reduction"] = _reduction_of(saved)
    if config.reduction == "auto":
        now["reduction"] = saved["reduction"]
    fields = TrainConfig.model_fields.items()
    newer: dict[str, Any] = {
        k: field.get_default(call_default_factory=True)
        for k, field in fields
        if k not in saved and not field.is_required()
    }
    lists: dict[str, Any] = {key: _whole(saved[key]) for key in ("datasets", "eval_datasets") if key in saved}
    then: dict[str, Any] = {**newer, **saved, **lists}
    changed = {key: (then[key], now[key]) for key in now if key in then and then[key] != now[key]}
    return {key: pair for key, pair in changed.items() if not _is_other_path(key, *pair, checkpoint, config)}


def _is_other_path(key: str, then: Any, now: Any, checkpoint: Checkpoint, config: TrainConfig) -> bool:
    """Tell whether only the path differs, of something that is compared by content: tokens and their marks by
    fingerprint, a tokenizer by its file, a model by its configuration, under an adapter by fingerprint."""
    if key == "datasets":
        if len(then) != len(now):
            return False
        pairs = list(zip(then, now, strict=True))
        kept = DatasetConfig.model_fields.keys() - {"path", "follow_links"}
        same = all(old[k] == new[k] for old, new in pairs for k in kept if k in old)
        moved = [(old["path"], new["path"]) for old, new in pairs]
        return same and (not config.streaming or all(_is_same_path(*pair, checkpoint) for pair in moved))
    if not isinstance(then, str) or not isinstance(now, str):
        return False
    if key == "tokenizer_name_or_path":
        return "tokenizer.json" in checkpoint.manifest.files or _is_same_path(then, now, checkpoint)
    if key == "chat_template":
        return is_template_file(then) and is_template_file(now)
    return key in ("model_name_or_path", "adapter_name_or_path")


def _is_same_path(then: str, now: str, checkpoint: Checkpoint) -> bool:
    """Tell whether both name one file or folder, or one name on the Hub; `then` may be relative."""
    output_dir = Path(str(checkpoint.manifest.config.get("output_dir", "."))).expanduser()
    bases = places_of(output_dir, checkpoint.path.resolve().parent)
    place = Path(now).expanduser().resolve()
    return then == now or any((base / Path(then).expanduser()).resolve() == place for base in bases)


def _check_model(checkpoint: Checkpoint, small_files: Mapping[str, bytes], config: TrainConfig) -> None:
    """Reject a model at another path whose configuration differs; its weights do not matter."""
    then, now = checkpoint.manifest.config.get("model_name_or_path"), config.model_name_or_path
    if then == now or config.allow_changed_settings or "config.json" not in small_files:
        return
    old, new = (
        json.loads(data) for data in (read_small(checkpoint, "config.json"), small_files["config.json"])
    )
    unimportant = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
    keys = sorted(k for k in old.keys() | new.keys() if k not in unimportant and old.get(k) != new.get(k))
    if keys:
        what = "; ".join(f"{key} was {_short(old.get(key))}, is {_short(new.get(key))}" for key in keys)
        raise ConfigError(
            f"model_name_or_path={now!r} is not the model of {checkpoint.path}: {what}",
            hint=f"set model_name_or_path={then} or a copy of it; allow_changed_settings=true resumes anyway",
        )


def _check_adapter(checkpoint: Checkpoint, small_files: Mapping[str, bytes], config: TrainConfig) -> None:
    """Reject a saved adapter whose configuration differs; its weights do not matter."""
    name = checkpoints.ADAPTER_CONFIG
    if config.adapter_name_or_path is None or config.allow_changed_settings:
        return
    if name not in small_files or name not in checkpoint.manifest.files:
        return
    old, new = json.loads(read_small(checkpoint, name)), json.loads(small_files[name])
    unimportant = ("base_model_name_or_path", "peft_version", "revision", "inference_mode", "auto_mapping")
    # Each version of PEFT has keys of its own.
    keys = sorted(k for k in old.keys() & new.keys() if k not in unimportant and old[k] != new[k])
    if keys:
        what = "; ".join(f"{key} was {_short(old[key])}, is {_short(new[key])}" for key in keys)
        raise ConfigError(
            f"adapter_name_or_path={config.adapter_name_or_path!r} is not the adapter of {checkpoint.path}: "
            f"{what}",
            hint=f"horizon export {checkpoint.path} OUT, then adapter_name_or_path=OUT; "
            "allow_changed_settings=true resumes anyway",
        )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def restore(
    resume: Resume,
    state: RunState,
    small_files: Mapping[str, bytes],
    asked: TrainConfig,
    warn: Callable[[str], None],
    together: Together,
) -> Checkpoint:
    """Load the best checkpoint whose content is right into the model and the state of the run.

    small_files: configuration and tokenizer of now. asked: the settings as given. Raises CheckpointError if
    no content is right, DataError if data or tokenizer have changed, ConfigError if the model has. A
    checkpoint that one rank cannot read is skipped by all.
    """
    rejected = []
    state.model.base_fingerprint()  # all ranks together
    for checkpoint in resume.checkpoints:
        try:
            together.each(
                f"load {checkpoint.path.name}", partial(_load_all, checkpoint, state, small_files, asked)
            )
            break
        except OtherBaseError:
            raise  # an earlier checkpoint has the same base
        except CheckpointError as error:
            warn(f"skipped {error.message}")
            rejected.append(Rejected(checkpoint.path, error.message))
    else:
        raise shared(checkpoints.none_valid(resume.checkpoints[0].path.parent, rejected))
    state.best.restore(checkpoint)
    return checkpoint


def _load_all(
    checkpoint: Checkpoint, state: RunState, small_files: Mapping[str, bytes], asked: TrainConfig
) -> None:
    """Load a checkpoint on this rank; raises as `restore`."""
    _check_model(checkpoint, small_files, asked)
    _check_adapter(checkpoint, small_files, asked)
    load_checkpoint(checkpoint, state.model)
    _check_tokenizer(checkpoint, small_files)
    try:
        state.load(checkpoint.manifest)
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise damaged(checkpoint.path, f"its state cannot be read: {error!r}") from error


def _check_tokenizer(checkpoint: Checkpoint, small_files: Mapping[str, bytes]) -> None:
    """Raise DataError for another tokenizer: token ids alone would not show the difference."""
    name = "tokenizer.json"
    _, then = checkpoint.manifest.files.get(name, (0, None))
    if then is not None and name in small_files and checksum(small_files[name]) != then:
        raise DataError(
            f"the tokenizer is not the one that {checkpoint.path} was trained with",
            hint="restore the data, the tokenizer and the settings of the group Data, or start a new run",
        )


def load_checkpoint(checkpoint: Checkpoint, model: HostModel) -> None:
    """Fill the model's store and buffers. Raises CheckpointError; OtherBaseError, before anything is changed,
    for an adapter of another model."""
    _check_part(checkpoint, model)
    model.state_is_being_replaced()
    load_units(checkpoint, model.store)
    load_buffers(checkpoint, model.skeleton.model)
    try:
        steps_done = int(checkpoint.manifest.state["steps_done"])
    except (KeyError, TypeError, ValueError):
        raise damaged(checkpoint.path, "its state has no steps_done") from None
    model.state_was_replaced(steps_done)


def _check_part(checkpoint: Checkpoint, model: HostModel) -> None:
    """Raise CheckpointError unless the checkpoint holds what the model trains, on the same base."""
    has_part = checkpoint.manifest.base is not None
    has_adapter = "adapter" in checkpoint.manifest.state
    trains_adapter = model.skeleton.adapter is not None
    if has_part != (model.store.spec.saved is not None) or has_adapter != trains_adapter:
        trained = "an adapter" if trains_adapter else "a model without adapter"
        raise CheckpointError(
            f"{checkpoint.path} holds {checkpoint.manifest.holds}, and {trained} is trained",
            hint="resume with the settings of the run; horizon export writes what it holds",
        )
    if has_part:
        name = getattr(model.config, "_name_or_path", None)
        check_base(checkpoint, model.base_fingerprint(), name or None)


# In words.


def about(
    checkpoint: Checkpoint,
    config: TrainConfig,
    folder: RunFolder,
    step: int,
    num_steps: int,
    learning_rate: Callable[[int], float],
) -> list[str]:
    """Describe how the run continues. step: the last one done. Raises ConfigError for a run that would be
    shorter than it is already."""
    _check_length(config, checkpoint, num_steps, step)
    changed = {key: pair for key, pair in changed_settings(config, checkpoint).items() if key in LENGTH}
    first = f"resumed from {checkpoint.path}, after step {step}"
    looked = identify(folder.path)
    is_own = checkpoint.path.resolve().parent == folder.path.resolve()
    if is_own and looked.step > step:
        again = f"steps {step + 1}-{looked.step} are" if looked.step > step + 1 else f"step {looked.step} is"
        first += f"; {again} done again"
    lines = [first]
    if changed and num_steps > step:
        was = ", ".join(f"{key} was {old}, is {new}" for key, (old, new) in changed.items())
        last = checkpoint.manifest.state.get("last") or {}
        before = last.get("learning_rate")
        rate = f" (after {before:.2e} at step {last['step']})" if before is not None else ""
        lines.append(
            f"{was}: the learning rate follows the curve of {count(num_steps, 'step')} and goes on at "
            f"{learning_rate(step):.2e}{rate}"
        )
    if num_steps == step:
        lines.append(
            f"all {count(num_steps, 'step')} are done: the model is written again; max_steps=N trains further"
        )
    return lines


def _check_length(config: TrainConfig, checkpoint: Checkpoint, num_steps: int, step: int) -> None:
    """Raise ConfigError for a run that would be shorter than it is already."""
    if num_steps < step:
        key = "max_steps" if config.max_steps > 0 else "num_train_epochs"
        raise ConfigError(
            f"{key}={getattr(config, key)}: the run would have {count(num_steps, 'step')}, and "
            f"{checkpoint.path} is after step {step:,}",
            hint=f"max_steps={step + max(1, step // 10)} trains further; or name an earlier checkpoint",
        )
