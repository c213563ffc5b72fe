"""Choose the parameters to train, by the settings `freeze` and `train`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from horizon_lm.config import ModelSettings
from horizon_lm.config.patterns import compiled, nearest
from horizon_lm.errors import ConfigError
from horizon_lm.model.experts import WORD, experts_of

Named = dict[str, nn.Parameter]


def choose_trained(
    model: nn.Module, settings: ModelSettings, is_adapters: Callable[[str], bool] | None = None
) -> None:
    """Freeze the parameters whose names contain a match of a pattern of `freeze`, and with `train` those
    without a match of its patterns. The pattern `experts` stands for all experts (`experts_of`).

    Every name of a tied weight counts. is_adapters: whether a name is the adapter's; the base is frozen
    then. Raises ConfigError for a pattern that matches no parameter, or with an adapter none of its own, for
    two patterns that contradict each other, and if nothing would be left to train.
    """
    if not settings.freeze and not settings.train:
        return
    named = dict(model.named_parameters(remove_duplicate=False))
    words = {WORD: list(experts_of(model))} if WORD in (*settings.freeze, *settings.train) else {}
    frozen = _matched(named, settings.freeze, "freeze", words, is_adapters)
    trained = _matched(named, settings.train, "train", words, is_adapters)
    at = {id(named[name]): name for name in frozen}
    both = next((name for name in trained if id(named[name]) in at), None)
    if both is not None:
        raise ConfigError(
            f"freeze: {frozen[at[id(named[both])]]!r} and train: {trained[both]!r} both match {both}",
            hint="let 'train' list what is trained, and leave 'freeze' out",
        )
    kept = {id(named[name]) for name in trained}
    for name, parameter in named.items():
        if name in frozen or (settings.train and id(parameter) not in kept):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in named.values()):
        key, patterns = ("train", settings.train) if settings.train else ("freeze", settings.freeze)
        raise ConfigError(
            f"{key} leaves no parameter to train: {', '.join(map(repr, patterns))}",
            hint="train: ['^lm_head'] trains only the parameters whose names begin with lm_head",
        )


def _matched(
    named: Named,
    patterns: Sequence[str],
    key: str,
    words: Mapping[str, list[str]],
    is_adapters: Callable[[str], bool] | None,
) -> dict[str, str]:
    """Names that a pattern matches -> the first such pattern. words: names that a word stands for."""
    found: dict[str, str] = {}
    for pattern in patterns:
        expression = compiled(pattern, key)
        names = words.get(pattern) or [name for name in named if expression.search(name)]
        if not names:
            raise ConfigError(
                f"{key}: {pattern!r} is found in the name of no parameter",
                hint=f"the nearest names are {', '.join(nearest(pattern, list(named)))}",
            )
        if is_adapters is not None and not any(map(is_adapters, names)):
            raise ConfigError(
                f"{key}: {pattern!r} matches only the base, which is frozen under an adapter",
                hint="modules_to_save: [NAME] trains a module of the base, and saves it with the adapter",
            )
        for name in names:
            found.setdefault(name, pattern)
    return found
