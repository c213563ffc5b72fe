"""Vision-language models of six families: loss and every gradient equal plain transformers' own, bit for bit,
without pictures, with one, with several in a row, padded, and in two micro-batches."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch

import horizon_lm as hz
import vision_zoo as vision
from horizon_lm.model.attention import attention_by_intervals
from plain_gradients import plain, relative, stream

pytestmark = pytest.mark.usefixtures("one_thread")

# Rows of image numbers: pictures come in several sizes where the model takes them.
ROWS: dict[str, list[list[int]]] = {"none": [[], []], "one": [[0]], "several": [[1], [0, 2, 3], []]}
PROJECTED = [name for name in vision.FAMILIES if name != "qwen3_vl"]  # whose towers have one projector


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return vision.build(name, dtype=dtype)


@cache
def host_of(name: str, **settings: Any) -> hz.HostModel:
    return stream(model_of(name), **settings)


def inputs(name: str, rows: list[list[int]], **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(token tensors, the processor's tensors for the pictures) of a micro-batch."""
    numbers = [number for row in rows for number in row]
    return vision.batch(name, rows, **more), vision.pixels(name, numbers) if numbers else {}


def differing(host: hz.HostModel, wanted: dict[str, torch.Tensor]) -> list[str]:
    found = dict(host.named_gradients())
    assert found.keys() <= wanted.keys()
    return [name for name, gradient in found.items() if not torch.equal(gradient, wanted[name])]


@pytest.mark.parametrize("activations", ["recompute", "keep"])
@pytest.mark.parametrize("name", vision.FAMILIES)
def test_bitwise_equal_to_plain_transformers(name: str, activations: str) -> None:
    model, host = model_of(name), host_of(name, activations=activations)
    trained = [parameter.name for unit in host.skeleton.units for parameter in unit.trainable]
    assert trained and not any(map(host.skeleton.pictures.is_vision, trained))
    assert len(trained) == sum(
        "language_model" in n or "lm_head" in n for n, _ in model.named_parameters()
    ), "every language parameter is trained"
    for kind, rows in ROWS.items():
        for padded in (False, True) if activations == "recompute" else (True,):
            tokens, pixels = inputs(name, rows, padded=padded)
            with attention_by_intervals():
                loss, gradients = plain(model, tokens | pixels)
            assert host.forward_backward([tokens | pixels]).loss == loss
            assert not differing(host, gradients), (kind, padded)


@pytest.mark.parametrize("name", vision.FAMILIES)
def test_features_are_the_models_own_and_train_as_pixels_do(name: str) -> None:
    model, host = model_of(name), host_of(name, activations="recompute")
    tokens, pixels = inputs(name, ROWS["several"])
    features = host.encode_images(pixels)
    output = model.get_image_features(**pixels, return_dict=True)
    assert len(features) == len(output.pooler_output) == 4
    for number, (found, wanted) in enumerate(zip(features, output.pooler_output, strict=True)):
        assert torch.equal(found["features"], wanted.detach())
        assert found["features"].shape == (vision.tokens(name, [1, 0, 2, 3][number]), vision.WIDTH)
    loss = host.forward_backward([tokens | pixels]).loss
    gradients = {n: g.clone() for n, g in host.named_gradients()}
    sizes = {key: value for key, value in pixels.items() if key != "pixel_values"}
    given = tokens | sizes | {"image_features": features}
    assert host.forward_backward([given]).loss == loss
    assert not differing(host, gradients)
    # Negative control: the same pictures in another order.
    if len({len(image["features"]) for image in features}) == 1:
        other = tokens | sizes | {"image_features": features[::-1]}
        assert host.forward_backward([other]).loss != loss
        assert differing(host, gradients)


@pytest.mark.parametrize("name", vision.FAMILIES)
def test_two_micro_batches(name: str) -> None:
    """Rows with and without pictures in one micro-batch and in different ones."""
    model, host = model_of(name), host_of(name, activations="recompute")
    parts = [inputs(name, rows, seed=i) for i, rows in enumerate(([[0, 1], []], [[], []], [[2]]))]
    batches = [tokens | pixels for tokens, pixels in parts]
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    total = dict.fromkeys(dict(model.named_parameters()), torch.zeros(()))
    for batch, count in zip(batches, counts, strict=True):
        with attention_by_intervals():
            for key, gradient in plain(model, batch)[1].items():
                total[key] = total[key] + gradient.double() * (count / sum(counts))
    host.forward_backward(batches)
    for key, gradient in host.named_gradients():
        if total[key].abs().max() > 1e-7:  # a gradient that only rounding reaches has no direction
            assert relative(gradient, total[key]) < 2e-6, key


@pytest.mark.parametrize("name", vision.FAMILIES)
def test_bitwise_in_bfloat16(name: str) -> None:
    model = model_of(name, torch.bfloat16)
    host = stream(model, dtype="bfloat16")
    tokens, pixels = inputs(name, ROWS["several"], padded=True)
    pixels["pixel_values"] = pixels["pixel_values"].bfloat16()
    loss, gradients = plain(model, tokens | pixels)
    assert host.forward_backward([tokens | pixels]).loss == pytest.approx(loss, rel=2e-3)
    assert not differing(host, gradients)


@pytest.mark.parametrize("name", vision.FAMILIES)
def test_evaluation_and_log_probabilities(name: str) -> None:
    model, host = model_of(name).eval(), host_of(name, activations="recompute")
    tokens, pixels = inputs(name, ROWS["several"], padded=True)
    found = host.evaluate([tokens | pixels], return_log_probs=True)
    with torch.no_grad():
        output = model(**tokens, **pixels, use_cache=False)
    model.train()
    assert found.loss == pytest.approx(output.loss.item(), rel=1e-6)
    labels = tokens["labels"][:, 1:]
    wanted = output.logits[:, :-1].log_softmax(-1).gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    assert found.log_probs is not None
    difference = (found.log_probs[0] - wanted.masked_fill(labels == -100, 0)).abs().max()
    assert difference < 1e-5


def test_qwen3_vl_without_its_additions_trains_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the features that Qwen3-VL adds between layers: text alone has none."""
    model, host = model_of("qwen3_vl"), host_of("qwen3_vl", activations="recompute")
    monkeypatch.setattr("horizon_lm.model.prologue._find_added", lambda *args: {})
    for rows, is_wrong in ((ROWS["several"], True), (ROWS["none"], False)):
        tokens, pixels = inputs("qwen3_vl", rows)
        _, gradients = plain(model, tokens | pixels)
        host.forward_backward([tokens | pixels])
        errors = [relative(found, gradients[n]) for n, found in host.named_gradients()]
        assert (max(errors) > 0.1) == is_wrong and (min(errors) < 1e-6) == (not is_wrong)


@pytest.mark.parametrize("name", PROJECTED)
def test_a_projector_is_trained_exactly(name: str) -> None:
    model, host = model_of(name), stream(model_of(name), train_projector=True)
    parts = host.skeleton.pictures
    projector = {p.name for p in host.skeleton.units[0].trainable}
    assert projector == {n for n, _ in model.named_parameters() if parts.is_projector(n)} and projector
    for rows in (ROWS["several"], ROWS["one"]):
        tokens, pixels = inputs(name, rows, padded=True)
        loss, gradients = plain(model, tokens | pixels)
        assert host.forward_backward([tokens | pixels]).loss == loss
        assert not differing(host, gradients)
        assert any(gradients[n].abs().max() > 1e-4 for n in projector)
    features = host.encode_images(pixels)
    sizes = {key: value for key, value in pixels.items() if key != "pixel_values"}
    assert host.forward_backward([tokens | sizes | {"image_features": features}]).loss == loss
    assert not differing(host, gradients)
    tokens, _ = inputs(name, ROWS["none"])
    host.forward_backward([tokens])
    assert all(not gradient.any() for n, gradient in host.named_gradients() if n in projector)


@pytest.mark.parametrize(
    "settings",
    [
        {"activations": "products"},
        {"activations": "attention"},
        {"boundaries": "host", "checkpoint_interval": 2},
    ],
    ids=["products", "attention", "blocks"],
)
def test_additions_under_other_policies(settings: dict[str, Any]) -> None:
    host = stream(model_of("qwen3_vl"), **settings)
    tokens, pixels = inputs("qwen3_vl", ROWS["several"], padded=True)
    loss, gradients = plain(model_of("qwen3_vl"), tokens | pixels)
    assert host.forward_backward([tokens | pixels]).loss == loss
    assert not differing(host, gradients)


def test_the_routers_of_a_mixture_of_experts_see_pictures() -> None:
    """qwen3_vl_moe with the routers' auxiliary loss, which runs the forward once more."""
    import transformers

    config = vision.FAMILIES["qwen3_vl"].config()
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    text = config.text_config.to_dict() | experts | {"decoder_sparse_step": 1, "output_router_logits": True}
    parts = {"text_config": text, "vision_config": config.vision_config.to_dict()}
    for part in parts.values():
        del part["model_type"]
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(
        transformers.Qwen3VLMoeConfig(**parts, image_token_id=vision.PICTURE)
    ).train()
    tokens, pixels = inputs("qwen3_vl", ROWS["several"])
    loss, gradients = plain(model, tokens | pixels | {"output_router_logits": True})
    host = stream(model)
    found = host.forward_backward([tokens | pixels])
    assert found.loss == pytest.approx(loss, rel=1e-6) and found.router_losses[0] > 0
    assert not differing(host, gradients)


def test_the_language_model_is_streamed_even_if_the_tower_is_larger() -> None:
    config = vision.FAMILIES["llava"].config()
    config.vision_config.num_hidden_layers, config.vision_config.hidden_size = 6, 64
    config.vision_config.intermediate_size = 128
    model = hz.HostModel.from_config(config, device="cpu", dtype="float32", skip_memory_check=True)
    sizes = {unit.name: unit.numel for unit in model.skeleton.units}
    assert sizes["vision"] > 2 * sum(size for name, size in sizes.items() if name.startswith("layer"))
    assert model.skeleton.anatomy.layers_path == "model.language_model.layers"
    tokens, pixels = inputs("llava", ROWS["several"])
    before = {n: p.clone() for n, p in model.named_parameters()}
    model.train_step([tokens | pixels], lr=1e-2)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and not any(map(model.skeleton.pictures.is_vision, moved))


def test_a_model_object_is_left_as_it_was_after_a_failed_step() -> None:
    host = host_of("gemma3", activations="recompute")
    tokens, pixels = inputs("gemma3", ROWS["one"])
    loss = host.forward_backward([tokens | pixels]).loss

    def fails(*args: Any) -> Any:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        host.forward_backward([copy.copy(tokens) | pixels], loss_fn=fails)
    assert "get_image_features" not in vars(host.skeleton.pictures.base)
    assert host.forward_backward([tokens | pixels]).loss == loss


def test_an_interrupted_encoding_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    host = stream(model_of("qwen3_vl"))
    tokens, pixels = inputs("qwen3_vl", ROWS["one"])
    loss = host.forward_backward([tokens | pixels]).loss

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(host.skeleton.pictures.base.visual), "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            host.forward_backward([tokens | pixels])
    assert all(parameter.is_meta for parameter in host.skeleton.model.parameters())
    assert host.forward_backward([tokens | pixels]).loss == loss


@pytest.mark.parametrize("name", vision.FAMILIES)
def test_packed_documents_of_text_do_not_see_one_another(name: str) -> None:
    host, first = host_of(name, activations="recompute"), 10
    ids = torch.randint(3, 80, (1, 24), generator=torch.Generator().manual_seed(3))
    documents = [ids[:, :first], ids[:, first:]]
    alone = [host.evaluate([{"input_ids": d, "labels": d}], return_log_probs=True) for d in documents]
    labels = ids.clone()
    labels[:, first] = -100
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    packed = {"input_ids": ids, "labels": labels, "position_ids": positions}
    found = host.evaluate([packed], return_log_probs=True)
    assert found.log_probs is not None
    parts = found.log_probs[0][:, : first - 1], found.log_probs[0][:, first:]
    for part, own in zip(parts, alone, strict=True):
        assert own.log_probs is not None
        assert (part - own.log_probs[0]).abs().max() < 1e-5
    # Negative control: without positions the second document sees the first.
    whole = host.evaluate([{"input_ids": ids, "labels": labels}], return_log_probs=True)
    assert whole.log_probs is not None
    assert (whole.log_probs[0][:, first:] - parts[1]).abs().max() > 1e-3
