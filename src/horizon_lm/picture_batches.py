"""Pictures in a micro-batch: a list of features per image, as flat tensors that travel like all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from horizon_lm.errors import DataError
from horizon_lm.words import count

FEATURES = "image_features"
# Keys of the flat form: the tensors of all images one after the other, the tokens of each image and, for a
# projector that is trained, the rows of its output in the order of the tokens (left out if they are in
# order).
_FLAT = f"{FEATURES}."
_SIZES, _ORDER = f"{_FLAT}sizes", f"{_FLAT}order"
_DEEPSTACK = "deepstack_"
# Of processors for videos and sound.
_OTHER_MEDIA = {
    "videos": ("pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "video_features"),
    "sound": ("input_features", "feature_attention_mask", "audio_values", "input_values", "audio_features"),
}


@dataclass(frozen=True)
class PictureInputs:
    """Names of a processor's outputs that a model takes.

    per_token: [batch, tokens]. per_image: [images, ...]. pixels: needed to compute features only.
    placeholder: the token that stands for one feature. makes_positions: the model computes positions from
    the pictures' sizes.
    """

    per_token: tuple[str, ...]
    per_image: tuple[str, ...]
    pixels: tuple[str, ...]
    placeholder: int | None
    makes_positions: bool = False

    @property
    def names(self) -> frozenset[str]:
        return frozenset((*self.per_token, *self.per_image, *self.pixels, FEATURES))


class Pictures(NamedTuple):
    """The pictures of a micro-batch, on the device.

    features: [all tokens, width], or a tower's outputs [..., width] if the projector is trained.
    sizes: tokens of each image. deepstack: further features, [all tokens, width] each. order: the row of the
    projector's output for each token.
    """

    features: torch.Tensor
    sizes: list[int]
    deepstack: tuple[torch.Tensor, ...]
    order: torch.Tensor | None


def is_flat(name: str) -> bool:
    """Whether a tensor of this name belongs to the flat form."""
    return name.startswith(_FLAT)


def pictures_of(inputs: Mapping[str, torch.Tensor]) -> tuple[Pictures | None, dict[str, torch.Tensor]]:
    """Split the inputs of a micro-batch into its pictures, if any, and the others."""
    others = {name: value for name, value in inputs.items() if not is_flat(name)}
    if f"{_FLAT}features" not in inputs:
        return None, others
    layers = sorted(
        (name for name in inputs if name.startswith(_FLAT + _DEEPSTACK)),
        key=lambda name: int(name.rpartition("_")[2]),
    )
    found = Pictures(
        inputs[f"{_FLAT}features"],
        inputs[_SIZES].tolist(),
        tuple(inputs[name] for name in layers),
        inputs.get(_ORDER),
    )
    return found, others


def refuse_other_media(where: str, names: Sequence[str]) -> None:
    """Raise DataError for inputs that hold videos or sound."""
    for kind, keys in _OTHER_MEDIA.items():
        odd = sorted(set(keys) & set(names))
        if odd:
            raise DataError(
                f"{where} holds {kind} ({', '.join(odd)}), which are not trained on",
                hint="pass text and pictures",
            )


def flattened(m: int, given: Any) -> dict[str, torch.Tensor]:
    """Convert the list of features per image of micro-batch `m` to its flat form; nothing for no image.

    given: per image a mapping of "features" [tokens, width], possibly "deepstack_0", ... of the same tokens,
    or what a tower gives and its "order" [tokens]. Raises DataError.
    """
    where = f"micro-batch {m}: {FEATURES}"
    if isinstance(given, (torch.Tensor, Mapping)) or not isinstance(given, Sequence):
        raise DataError(
            f"{where} is a {type(given).__name__}, not a list with an entry per image",
            hint="pass what HostModel.encode_images() returned, in the order of the images",
        )
    if not given:
        return {}
    for i, image in enumerate(given):
        _check_image(f"{where}[{i}]", image, given[0])
    sizes = [len(image.get("order", image["features"])) for image in given]
    flat = {
        f"{_FLAT}{name}": torch.cat([image[name].detach().cpu() for image in given])
        for name in given[0]
        if name != "order"
    }
    flat[_SIZES] = torch.tensor(sizes)
    if "order" in given[0]:
        begins = [sum(sizes[:i]) for i in range(len(sizes))]
        order = torch.cat([image["order"].cpu() + begin for image, begin in zip(given, begins, strict=True)])
        if not torch.equal(order, torch.arange(len(order))):
            flat[_ORDER] = order
    return flat


def _check_image(where: str, image: Any, first: Any) -> None:
    if not isinstance(image, Mapping) or "features" not in image:
        raise DataError(
            f"{where} has no features", hint="pass what HostModel.encode_images() returned for each image"
        )
    if image.keys() != first.keys():
        raise DataError(
            f"{where} holds {sorted(image)}, the first image {sorted(first)}",
            hint="encode all images with the same model",
        )
    for name, value in image.items():
        if not isinstance(value, torch.Tensor) or value.dim() < 1 or value.dtype != first[name].dtype:
            raise DataError(f"{where}: {name} is not a tensor like the first image's", hint="encode it again")
        if value.shape[-1:] != first[name].shape[-1:] and name != "order":
            raise DataError(
                f"{where}: {name} of shape {tuple(value.shape)}, the first image's of "
                f"{tuple(first[name].shape)}",
                hint="encode all images with the same model",
            )
        if name.startswith(_DEEPSTACK) and len(value) != len(image["features"]):
            raise DataError(f"{where}: {name} has a different number of tokens", hint="encode it again")


def check_pictures(m: int, batch: dict[str, torch.Tensor], inputs: PictureInputs) -> None:
    """Check that the pictures of a micro-batch in flat form fit its tokens; remove what goes with no picture.

    Raises DataError.
    """
    ids, sizes = batch["input_ids"], batch.get(_SIZES)
    places = 0 if inputs.placeholder is None else int((ids == inputs.placeholder).sum())
    if sizes is None:
        if places:
            raise DataError(
                f"micro-batch {m} has {count(places, 'placeholder')} of pictures (token "
                f"{inputs.placeholder}) and no {FEATURES}",
                hint=f"pass {FEATURES} or pixel_values for its pictures, or take the placeholders out",
            )
        for name in inputs.per_image:
            batch.pop(name, None)
        return
    if places != int(sizes.sum()):
        raise DataError(
            f"micro-batch {m} has {count(places, 'placeholder')} of pictures (token {inputs.placeholder}), "
            f"its {FEATURES} are of {count(int(sizes.sum()), 'token')} in {count(len(sizes), 'image')}",
            hint="pass the features of all its images, in the order of their placeholders, row by row",
        )
    needed = [*inputs.per_token, *(("image_grid_thw",) if inputs.makes_positions else ())]
    missing = [name for name in needed if name not in batch]
    if missing:
        raise DataError(
            f"micro-batch {m} has pictures and no {missing[0]}", hint="the model's processor returns it"
        )
    for name in inputs.per_image:
        if name in batch and len(batch[name]) != len(sizes):
            raise DataError(
                f"micro-batch {m}: {name} of {count(len(batch[name]), 'image')}, {FEATURES} of "
                f"{len(sizes):,}",
                hint="one row per image",
            )
    _check_positions(m, batch, inputs)


def _check_positions(m: int, batch: dict[str, torch.Tensor], inputs: PictureInputs) -> None:
    positions = batch.get("position_ids")
    if positions is None:
        return
    if bool((positions.diff(dim=1) < 0).any()):
        raise DataError(
            f"micro-batch {m} packs documents with pictures into one row (position_ids begin again)",
            hint="packing: false, or leave position_ids out; rows with pictures hold one document",
        )
    if inputs.makes_positions:
        raise DataError(
            f"micro-batch {m} has position_ids and pictures, whose positions the model computes itself",
            hint="leave position_ids out",
        )
