from __future__ import annotations

import functools
import re
from collections import Counter

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import zoo

ALL = zoo.CASES | zoo.SHARED_STATE
# Parameters that no gradient reaches in transformers itself: biases that only choose experts, indexers that
# only choose positions, and the first state of a recurrence whose first steps run without gradients.
NO_GRADIENT = re.compile(r"e_score_correction_bias|expert_bias|\.indexer\.|^model\.z_L_init$")
# At jitter 0 the sparse mixer of phimoe keeps one expert at a time, with weight 1 whatever the logits.
ZERO_GRADIENT = re.compile(r"^model\.layers\.\d+\.mlp\.router\.weight$")
# The kept-in-float32 parameters of these reach their matmuls uncast: they do not run in plain bfloat16.
NO_PLAIN_BF16 = {"inkling2_text"}


pytestmark = pytest.mark.usefixtures("one_thread")


@functools.cache
def _model(name: str) -> PreTrainedModel:
    return zoo.build(name)


def _run(model: PreTrainedModel, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def _assert_finite(loss: torch.Tensor, gradients: dict[str, torch.Tensor | None]) -> None:
    assert torch.isfinite(loss)
    for name, gradient in gradients.items():
        assert gradient is None or torch.isfinite(gradient).all(), name


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).contiguous().view(torch.uint8)


@pytest.mark.parametrize("name", ALL)
def test_runs_the_same_twice(name: str) -> None:
    model = _model(name)
    rng = torch.get_rng_state()
    again = zoo.build(name)
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training
    for (key, one), (_, two) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(one, two), key

    loss, gradients = _run(model, zoo.batch(name))
    _assert_finite(loss, gradients)
    for key, gradient in gradients.items():
        if gradient is None:
            assert NO_GRADIENT.search(key), f"no gradient for {key}"
        elif not gradient.any():
            assert name == "phimoe" and ZERO_GRADIENT.search(key), f"zero gradient for {key}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # the random draws of a case that makes any must not matter
        loss_again, gradients_again = _run(model, zoo.batch(name))
    assert torch.equal(_bits(loss), _bits(loss_again))
    for key, gradient in gradients.items():
        other = gradients_again[key]
        assert (gradient is None) == (other is None), key
        assert gradient is None or torch.equal(_bits(gradient), _bits(other)), key


@pytest.mark.parametrize("name", ALL)
def test_other_kinds_of_batch(name: str) -> None:
    model = _model(name)
    for kind in ALL[name].kinds - {"plain"}:
        loss, gradients = _run(model, zoo.batch(name, kind=kind))
        _assert_finite(loss, gradients)
        if kind == "packed":
            with torch.no_grad():
                plain = model(**zoo.batch(name)).loss
            assert not torch.equal(loss, plain), "position_ids change nothing"


@pytest.mark.parametrize("name", ALL)
def test_bfloat16(name: str) -> None:
    exact = zoo.build(name)
    with torch.no_grad():
        loss = exact(**zoo.batch(name)).loss
    model = zoo.build(name, dtype=torch.bfloat16)
    dtypes = Counter(parameter.dtype for parameter in model.parameters())
    assert set(dtypes) <= {torch.bfloat16, torch.float32}
    assert dtypes[torch.bfloat16] > 0
    low, gradients = _run(model, zoo.batch(name))
    _assert_finite(low, gradients)
    assert abs(low - loss) < 0.1
    if name not in NO_PLAIN_BF16:
        _assert_finite(*_run(exact.to(torch.bfloat16), zoo.batch(name)))


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "flint", "ernie4_5_moe", "olmo_hybrid", "gpt_oss"])
def test_bfloat16_is_what_from_pretrained_gives(name: str, tmp_path) -> None:
    zoo.build(name).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, attn_implementation=ALL[name].attn
    )
    built = zoo.build(name, dtype=torch.bfloat16)
    for (key, one), (_, two) in zip(loaded.state_dict().items(), built.state_dict().items(), strict=True):
        assert one.dtype == two.dtype, key
        assert torch.equal(one, two), key


@pytest.mark.parametrize("name", ALL)
def test_case_says_what_the_model_is(name: str) -> None:
    case = ALL[name]
    config = case.config()
    assert case.name == name
    assert case.tags <= zoo.TAGS
    assert case.kinds <= set(zoo.KINDS)
    cls = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])
    attn = "sdpa" if cls._supports_sdpa else "eager"
    assert case.attn == ("eager" if zoo.missing(f"{name} under sdpa") else attn)
    assert getattr(config, "output_router_logits", False) == ("aux" in case.tags)
    for field, value in vars(config).items():
        if "jitter" in field or "drop" in field or field.endswith("_pdrop"):
            # Heads that a causal language model has not.
            assert not value or field in ("classifier_dropout", "summary_first_dropout"), field

    model = _model(name)
    assert model.config._attn_implementation in (case.attn, attn)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is getattr(embedding, "weight", None)
    assert tied == ("tied" in case.tags)
    assert case.tags & {"dense", "moe", "hybrid", "tied", "untied"}
    # A weight left at its constant start would hide errors in its use.
    for key, parameter in model.named_parameters():
        assert parameter.numel() == 1 or parameter.unique().numel() > 1, key


def test_the_zoo_is_wide_enough() -> None:
    architectures = {case.config().model_type for case in zoo.CASES.values()}
    assert len(architectures) >= 56
    tags = Counter(tag for case in zoo.CASES.values() for tag in case.tags)
    assert set(tags) == zoo.TAGS
    assert tags["tied"] >= 6
    assert tags["untied"] >= 6
    assert not set(zoo.CASES) & set(zoo.SHARED_STATE)


def test_plain_batch() -> None:
    batch = zoo.batch("llama", batch_size=3, length=16)
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (3, 16)
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert torch.equal(batch["input_ids"], zoo.batch("llama", batch_size=3, length=16)["input_ids"])
    other = zoo.batch("llama", batch_size=3, length=16, seed=2)
    assert not torch.equal(batch["input_ids"], other["input_ids"])
    from_config = zoo.batch(zoo.CASES["llama"].config(), batch_size=3, length=16)
    assert torch.equal(batch["input_ids"], from_config["input_ids"])


def test_padded_batch() -> None:
    batch = zoo.batch("llama", batch_size=4, kind="padded")
    mask = batch["attention_mask"]
    lengths = mask.sum(1).tolist()
    assert lengths[0] == zoo.LENGTH
    assert len(set(lengths)) == 4
    for row, length in enumerate(lengths):
        assert mask[row, :length].all()
        assert (batch["input_ids"][row, length:] == 0).all()
    assert ((batch["labels"] == -100) == (mask == 0)).all()


@pytest.mark.parametrize("length", [3, 5, 16, zoo.LENGTH, 33])
def test_packed_batch(length: int) -> None:
    batch = zoo.batch("llama", batch_size=4, length=length, kind="packed")
    assert "attention_mask" not in batch
    positions = batch["position_ids"]
    assert positions.shape == (4, length)
    steps = positions[:, 1:] - positions[:, :-1]
    assert (positions[:, 0] == 0).all()
    assert ((steps == 1) | (positions[:, 1:] == 0)).all()
    assert ((positions == 0).sum(1) >= 2).all()


def test_batch_refuses_what_the_model_does_not_take() -> None:
    with pytest.raises(ValueError, match="bloom takes no packed batch"):
        zoo.batch("bloom", kind="packed")
    with pytest.raises(ValueError, match="kind is one of"):
        zoo.batch("llama", kind="left-padded")
    with pytest.raises(KeyError):
        zoo.batch("no-such-case")
