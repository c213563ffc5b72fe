"""Features of pictures: given to a model's forward, computed by its vision part, added between its layers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from horizon_lm.errors import DataError
from horizon_lm.model.head import forward_replaced
from horizon_lm.model.pictures import image_features_are, refuse
from horizon_lm.model.skeleton import Skeleton
from horizon_lm.picture_batches import Pictures
from horizon_lm.words import count


class Added(NamedTuple):
    """What a model's forward adds to the output of a layer.

    rows: [n], of the output as [batch * tokens, width]. values: [n, width].
    """

    rows: torch.Tensor
    values: torch.Tensor

    @classmethod
    def of(cls, value: torch.Tensor) -> Added:
        """value: [batch, tokens, width], zeros where nothing is added."""
        flat = value.flatten(0, -2)
        rows = (flat != 0).any(dim=-1).nonzero().view(-1)
        return cls(rows, flat.index_select(0, rows))

    def to(self, output: torch.Tensor) -> torch.Tensor:
        """The output [batch, tokens, width] with the values added; other rows keep their bits."""
        flat = output.flatten(0, -2)
        added = flat.index_select(0, self.rows) + self.values
        return flat.index_copy(0, self.rows, added).view(output.shape)


class _PerImage(tuple):
    """Features per image [tokens, width], which some models concatenate and others convert as one tensor."""

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.cat(self).to(*args, **kwargs)


@contextmanager
def features_given(
    skeleton: Skeleton, pictures: Pictures | None, inputs: Mapping[str, torch.Tensor]
) -> Iterator[list[int]]:
    """While open, the model's forward uses these features in place of those it would compute. Yields a list
    with an entry per use.

    inputs: the micro-batch's others, some of which a projector takes. The prologue must be bound.
    """
    if pictures is None:
        yield []
        return
    assert skeleton.pictures is not None, "a micro-batch of a model of text alone was checked"
    rows = pictures.features
    if skeleton.trains_projector:
        rows = _projected(skeleton, rows.to(skeleton.dtype), inputs)
        rows = rows if pictures.order is None else rows[pictures.order]
    given = SimpleNamespace(
        pooler_output=_PerImage(rows.split(pictures.sizes)),
        deepstack_features=[_PerImage(layer.split(pictures.sizes)) for layer in pictures.deepstack],
    )
    with image_features_are(skeleton.pictures.base, given) as uses:
        yield uses


def _projected(
    skeleton: Skeleton, features: torch.Tensor, inputs: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The projector's output [rows, width] for what a tower gave."""
    assert skeleton.pictures is not None
    projector = skeleton.model.get_submodule(skeleton.pictures.projector)
    wrapped = getattr(projector, "original_module", projector)  # PEFT's copies take any arguments
    _, _, *others = inspect.signature(type(wrapped).forward).parameters
    more = {name: inputs[name] for name in others if name in inputs}
    output: torch.Tensor = projector(features, **more)
    return output.reshape(-1, output.shape[-1])


def encode(skeleton: Skeleton, inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Compute the features of each image by the model's own `get_image_features`; the vision unit must be
    bound.

    inputs: a processor's outputs for n images, on the device. Returns per image "features" [tokens, width]
    and, if the model has them, "deepstack_0", ...; with a projector that is trained the tower's output
    instead, and "order" [tokens]. Raises UnsupportedModelError for a tower that draws random numbers.
    """
    parts = skeleton.pictures
    assert parts is not None
    before = [generator.get_state() for generator in _generators(parts.inputs, inputs)]
    if skeleton.trains_projector:
        found = _before_projector(skeleton, inputs)
    else:
        found = _images(parts.base.get_image_features(**inputs, return_dict=True))
    after = [generator.get_state() for generator in _generators(parts.inputs, inputs)]
    if not all(map(torch.equal, before, after)):
        raise refuse(skeleton.model_type, "its vision tower draws random numbers (dropout)")
    return found


def _generators(names: Any, inputs: Mapping[str, torch.Tensor]) -> list[torch.Generator]:
    device = inputs[names.pixels[0]].device
    found = [torch.default_generator]
    if device.type == "cuda":
        found.append(torch.cuda.default_generators[device.index or 0])
    return found


def _images(output: Any) -> list[dict[str, torch.Tensor]]:
    """Features of each image from what `get_image_features` returns."""
    found = [{"features": rows.flatten(0, -2)} for rows in output.pooler_output]
    for number, layer in enumerate(getattr(output, "deepstack_features", None) or ()):
        if isinstance(layer, torch.Tensor):  # as transformers 5.17 returns them
            layer = layer.split([len(image["features"]) for image in found])
        for image, rows in zip(found, layer, strict=True):
            image[f"deepstack_{number}"] = rows
    return found


def _before_projector(skeleton: Skeleton, inputs: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """What the projector receives for each image, and the rows of its output that are the image's tokens.

    The projector is replaced by one that returns the numbers of its rows, so that what the model does with
    its output is seen in its features.
    """
    parts = skeleton.pictures
    assert parts is not None
    projector = skeleton.model.get_submodule(parts.projector)
    received: list[torch.Tensor] = []

    def numbered(features: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        received.append(features)
        with torch.device("meta"):  # the projector's own parameters are there: it gives the shape
            shape = type(projector).forward(projector, features.to("meta"), *args, **kwargs).shape
        rows = torch.arange(shape[:-1].numel(), device=features.device, dtype=torch.float64)
        return rows.view(*shape[:-1], 1).expand(shape)

    with forward_replaced(projector, numbered):
        output = parts.base.get_image_features(**inputs, return_dict=True)
    if getattr(output, "deepstack_features", None):
        raise refuse(skeleton.model_type, "train_projector: its tower has several projectors (deepstack)")
    orders = [image["features"][:, 0].long() for image in _images(output)]
    features, sizes = received[0], [len(order) for order in orders]
    begins = [sum(sizes[:i]) for i in range(len(sizes))]
    orders = [order - begin for order, begin in zip(orders, begins, strict=True)]
    if len(received) != 1 or any(
        not torch.equal(order.sort().values, torch.arange(len(order), device=order.device))
        for order in orders
    ):
        raise refuse(skeleton.model_type, "train_projector: its projector mixes the tokens of images")
    return [
        {"features": part, "order": order}
        for part, order in zip(_parts(skeleton, features, sizes), orders, strict=True)
    ]


def _parts(skeleton: Skeleton, features: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Split a projector's input into those of images of these numbers of tokens."""
    if features.dim() == 3 and len(features) == len(sizes):
        return list(features.split(1))
    each, rest = divmod(len(features), sum(sizes))
    if features.dim() != 2 or rest:
        raise DataError(
            f"the pictures' {count(len(features), 'patch', 'patches')} are not a whole number for each of "
            f"{count(sum(sizes), 'token')}",
            hint="encode pictures of other sizes apart",
        )
    return list(features.split([size * each for size in sizes]))
