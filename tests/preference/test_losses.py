"""Losses of preferences beside TRL's own methods: value, gradient and logged metrics."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import trl_losses
from horizon_lm.config import TrainConfig
from horizon_lm.engine.loss import TokenValues
from horizon_lm.micro_batches import MicroBatch
from horizon_lm.preference.documents import INDEX, MASK, TOKENS, by_document, sums
from horizon_lm.preference.losses import divergence_score
from horizon_lm.preference.method import KL, Method, means

_PAIRS, _TOKENS = 5, 12
_BOTH = ("sigmoid", "hinge", "ipo", "discopop", "sigmoid_norm")
_DIVERGENCES: list[dict[str, Any]] = [
    {"f_divergence_type": "forward_kl"},
    {"f_divergence_type": "js_divergence"},
    {"f_divergence_type": "alpha_divergence"},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.7},
    {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
]
_DPO: list[dict[str, Any]] = [
    *[
        {"loss_type": name, **more}
        for name in (*_BOTH, "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "sft")
        for more in ({}, {"ld_alpha": 0.3})
    ],
    *[{"loss_type": name, **more} for name in _BOTH for more in _DIVERGENCES],
    *[
        {"loss_type": name, "label_smoothing": epsilon, **more}
        for name in ("exo_pair", "robust", "aot", "aot_unpaired")
        for epsilon in (0.1, 0.3)
        for more in ({}, {"ld_alpha": 0.5}, {"use_weighting": True})
    ],
    *[
        {"loss_type": name, "label_smoothing": 0.2, **more}
        for name in ("exo_pair", "robust")
        for more in _DIVERGENCES
    ],
    # TRL's own hinge with weights has no gradient: it multiplies the result of relu in place.
    *[
        {"loss_type": name, "use_weighting": True}
        for name in (*_BOTH, "apo_zero", "sppo_hard")
        if name != "hinge"
    ],
    {"loss_type": "discopop", "discopop_tau": 0.2},
    {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
    {"rpo_alpha": 0.7},
    {"method": "ipo", "beta": 0.4},
    {"method": "apo", "rpo_alpha": 0.2},
    {"method": "apo", "loss_type": "apo_down"},
]


def _config(**settings: Any) -> TrainConfig:
    return TrainConfig.from_dict(
        {"model_name_or_path": "m", "datasets": "d.jsonl", "method": "dpo", **settings}
    )


def _batch(seed: int, rows: int = 2 * _PAIRS) -> MicroBatch:
    """A padded batch: prompts of one to three tokens, completions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, _TOKENS + 1, (rows,), generator=generator)
    lengths[0] = _TOKENS
    prompts = torch.randint(1, 4, (rows,), generator=generator)
    places = torch.arange(_TOKENS)
    mask = (places[None] < lengths[:, None]).long()
    ids = torch.randint(3, 50, (rows, _TOKENS), generator=generator)
    completion = mask * (places[None] >= prompts[:, None])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.where(completion > 0, ids, -100),
        "documents": torch.stack([torch.arange(rows), torch.zeros_like(lengths), lengths], dim=1),
        "samples": torch.arange(rows // 2),
        "completion_mask": completion,
    }


def _values(batch: MicroBatch, seed: int, trained: torch.Tensor | None = None) -> TokenValues:
    """Token values of a made-up model; log_probs is a leaf."""
    generator = torch.Generator().manual_seed(seed)
    labels = batch["labels"] if trained is None else trained
    mask = labels[:, 1:] != -100

    def drawn(scale: float) -> torch.Tensor:
        return torch.where(mask, -scale * torch.rand(mask.shape, generator=generator), 0.0)

    log_probs = drawn(2.0).requires_grad_()
    return TokenValues(log_probs, -drawn(3.0), drawn(1.0), drawn(2.0), mask & (drawn(1.0) < -0.5))


def _reference(num: int, seed: int) -> torch.Tensor:
    return -8 * torch.rand(num, 2, generator=torch.Generator().manual_seed(seed)) - 2


def _ours(
    config: TrainConfig, batches: list[MicroBatch], values: list[TokenValues], reference: torch.Tensor | None
) -> tuple[float, dict[str, float], list[torch.Tensor]]:
    """Return loss, metrics and gradients of a step over micro-batches."""
    method = Method(config)
    prepared, loss = method.step(None, batches, reference)  # type: ignore[arg-type]
    found = [loss.function(one, batch) for one, batch in zip(values, prepared, strict=True)]
    total = sum(part for part, _ in found)
    gradients = torch.autograd.grad(total, [one.log_probs for one in values])
    metrics = means(method.counted([more for _, more in found], prepared))
    return float(total), metrics, list(gradients)


def _check(
    ours: tuple[float, dict[str, float], list[torch.Tensor]],
    theirs: torch.Tensor,
    logged: dict[str, float],
    leaf: torch.Tensor,
) -> None:
    """Ignored targets are constants, whose gradient TRL leaves as it comes."""
    (gradient,) = torch.autograd.grad(theirs, leaf)
    gradient = gradient * (leaf != 0)
    loss, metrics, (found,) = ours
    assert loss == pytest.approx(float(theirs), rel=1e-6, abs=1e-6)
    assert (found - gradient).norm() <= 1e-6 * gradient.norm() + 1e-12
    wanted = {name: value for name, value in logged.items() if name not in ("num_tokens", "aux_loss")}
    assert metrics == pytest.approx(wanted, rel=2e-6, abs=1e-6)


@pytest.mark.parametrize("settings", _DPO, ids=lambda one: "-".join(f"{k}={v}" for k, v in one.items()))
def test_losses_against_a_reference_are_those_of_trl(settings: dict[str, Any]) -> None:
    config, batch, reference = _config(**settings), _batch(1), _reference(_PAIRS, 2)
    values = _values(batch, 3)
    inputs = {
        **{name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")},
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }
    theirs, logged = trl_losses.dpo(config, values, inputs)
    _check(_ours(config, [batch], [values], reference), theirs, logged, values.log_probs)


def test_a_beta_ten_percent_off_is_seen() -> None:
    batch, reference = _batch(1), _reference(_PAIRS, 2)
    values = _values(batch, 3)
    inputs = {
        **{name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask")},
        "ref_chosen_logps": reference[:, 0],
        "ref_rejected_logps": reference[:, 1],
    }
    theirs, logged = trl_losses.dpo(_config(beta=0.11), values, inputs)
    with pytest.raises(AssertionError):
        _check(_ours(_config(), [batch], [values], reference), theirs, logged, values.log_probs)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"desirable_weight": 0.7, "undesirable_weight": 1.3, "beta": 0.3},
        {"loss_type": "apo_zero_unpaired"},
    ],
)
@pytest.mark.parametrize("shift", [-4.0, 4.0], ids=["clamped", "positive"])
def test_kto_is_that_of_trl(settings: dict[str, Any], shift: float) -> None:
    config = _config(method="kto", **settings)
    batch, reference = _batch(4, rows=6), _reference(6, 5)
    label = torch.tensor([True, False, True, True, False, False])
    batch |= {"label": label, "samples": torch.arange(6)}
    values = _values(batch, 6)
    logps = reference[:, 1] + shift + torch.linspace(-0.1, 0.2, 6)
    inputs = {
        **{name: batch[name] for name in ("input_ids", "attention_mask", "completion_mask", "label")},
        "ref_logps": reference[:, 0],
        "ref_KL_logps": reference[:, 1],
    }
    theirs, logged = trl_losses.kto(config, values, inputs, logps)
    method = Method(config)
    kl = (logps - reference[:, 1]).mean().clamp(min=0) if config.uses_kl else None
    method.estimate_kl = lambda *_: kl  # type: ignore[method-assign]
    prepared, loss = method.step(None, [batch], reference)  # type: ignore[arg-type]
    total, metrics = loss.function(values, prepared[0])
    (gradient,) = torch.autograd.grad(total, values.log_probs)
    found = means(method.counted([metrics], prepared))
    _check((float(total), found, [gradient]), theirs, logged, values.log_probs)
    assert (found[KL] > 0) == (config.uses_kl and shift > 0)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "orpo"},
        {"method": "orpo", "beta": 0.5},
        {"method": "simpo", "simpo_gamma": 0.3, "beta": 2.0},
        {"method": "simpo", "cpo_alpha": 0.5, "label_smoothing": 0.1},
        {"method": "cpo"},
        {"method": "cpo", "label_smoothing": 0.2, "cpo_alpha": 0.0},
        {"method": "cpo", "loss_type": "hinge"},
        {"method": "cpo", "loss_type": "ipo"},
        {"method": "cpo", "loss_type": "simpo"},
    ],
)
def test_losses_without_a_reference_are_those_of_trl(settings: dict[str, Any]) -> None:
    config, batch = _config(**settings), _batch(7)
    method = Method(config)
    prepared, loss = method.step(None, [batch], None)  # type: ignore[arg-type]
    values = _values(batch, 8, trained=prepared[0]["labels"])
    mask = batch["completion_mask"][:, 1:]
    found = (values.log_probs * mask).sum(dim=1)
    if config.losses[0][0] in ("ipo", "simpo", "orpo"):
        found = found / mask.sum(dim=1)
    nll_mask = prepared[0]["labels"][:_PAIRS, 1:] != -100
    if config.method == "orpo":  # over prompt and completion
        assert bool((nll_mask == (batch["attention_mask"][:_PAIRS, 1:] > 0)).all())
    nll = -values.log_probs[:_PAIRS][nll_mask].mean()
    theirs, logged = trl_losses.without_reference(config, *found.chunk(2), nll)
    total, metrics = loss.function(values, prepared[0])
    (gradient,) = torch.autograd.grad(total, values.log_probs, retain_graph=True)
    ours = means(method.counted([metrics], prepared))
    _check((float(total), {k: ours[k] for k in logged}, [gradient]), theirs, logged, values.log_probs)
    assert ours["logps/chosen"] == pytest.approx(float(found[:_PAIRS].mean()), rel=1e-6)


# Documents: packed as padded, whole as cut.


def _packed(batch: MicroBatch, values: TokenValues) -> tuple[MicroBatch, TokenValues]:
    """Put each pair of a padded batch into one row, rejected first in every second one."""
    pairs = len(batch["samples"])
    lengths = batch["documents"][:, 2].tolist()
    width = max(lengths[i] + lengths[pairs + i] for i in range(pairs))
    ids, labels = torch.zeros(pairs, width, dtype=torch.long), torch.full((pairs, width), -100)
    places: dict[int, tuple[int, int, int]] = {}
    table = {name: torch.zeros(pairs, width - 1) for name, v in vars(values).items() if v is not None}
    for row in range(pairs):
        at = 0
        for document in (row, pairs + row) if row % 2 else (pairs + row, row):
            n = lengths[document]
            ids[row, at : at + n] = batch["input_ids"][document, :n]
            labels[row, at : at + n] = batch["labels"][document, :n]
            for name, made in table.items():
                made[row, at : at + n - 1] = getattr(values, name)[document, : n - 1].detach()
            places[document] = (row, at, n)
            at += n
    packed = {
        "input_ids": ids,
        "labels": labels,
        "documents": torch.tensor([places[document] for document in range(2 * pairs)]),
        "samples": batch["samples"],
    }
    table["log_probs"].requires_grad_()
    return packed, TokenValues(**{**table, "is_top1": table["is_top1"].bool()})


@pytest.mark.parametrize(
    "settings",
    [{"ld_alpha": 0.4, "rpo_alpha": 0.3}, {"use_weighting": True}, {"method": "orpo"}, {"method": "simpo"}],
)
def test_packed_pairs_have_the_loss_of_padded_ones(settings: dict[str, Any]) -> None:
    config, batch, reference = _config(**settings), _batch(9), _reference(_PAIRS, 10)
    trained = Method(config).prepare([batch], reference)[0]["labels"]
    values = _values(batch, 11, trained)
    packed, moved = _packed(batch, values)
    loss, metrics, (gradient,) = _ours(config, [batch], [values], reference)
    other, others, (there,) = _ours(config, [packed], [moved], reference)
    assert other == pytest.approx(loss, rel=1e-6) and others == pytest.approx(metrics, rel=1e-6)
    placed = Method(config).prepare([packed], reference)[0]
    width = int(packed["documents"][:, 2].max()) - 1
    assert torch.allclose(by_document(there, placed)[:, :width], gradient[:, :width], rtol=1e-5, atol=1e-9)
    places = placed[INDEX].flatten()
    assert len(places.unique()) == len(places)  # else the gradient adds up, one after the other on a GPU


@pytest.mark.parametrize(
    "settings",
    [{"rpo_alpha": 0.5}, {"method": "orpo"}, {"method": "cpo"}, {"loss_type": "ipo", "use_weighting": True}],
)
def test_a_step_cut_into_micro_batches_is_the_same_step(settings: dict[str, Any]) -> None:
    config, batch, reference = _config(**settings), _batch(12), _reference(_PAIRS, 13)
    trained = Method(config).prepare([batch], reference)[0]["labels"]
    values = _values(batch, 14, trained)
    loss, metrics, (gradient,) = _ours(config, [batch], [values], reference)
    cut, parts, where = [], [], []
    for numbers in ([0, 1, 2], [3], [4]):
        rows = torch.tensor([*numbers, *(_PAIRS + i for i in numbers)])
        documents = batch["documents"][rows].clone()
        documents[:, 0] = torch.arange(len(rows))
        cut.append(
            {
                **{name: batch[name][rows] for name in ("input_ids", "labels", "attention_mask")},
                "documents": documents,
                "samples": batch["samples"][numbers],
            }
        )
        table = {name: value[rows].detach() for name, value in vars(values).items() if value is not None}
        table["log_probs"].requires_grad_()
        parts.append(TokenValues(**table))
        where.append(rows)
    whole, others, found = _ours(config, cut, parts, reference)
    assert whole == pytest.approx(loss, rel=1e-6) and others == pytest.approx(metrics, rel=1e-6, abs=1e-7)
    for rows, part in zip(where, found, strict=True):
        assert torch.allclose(part, gradient[rows], rtol=1e-5, atol=1e-9)


def test_aot_sorts_within_a_micro_batch() -> None:
    """So its loss depends on the cut, as the documentation says."""
    config, batch, reference = _config(loss_type="aot"), _batch(12), _reference(_PAIRS, 13)
    values = _values(batch, 14)
    whole = _ours(config, [batch], [values], reference)[0]
    parts = []
    for pair in range(_PAIRS):
        rows = torch.tensor([pair, _PAIRS + pair])
        one = {name: batch[name][rows] for name in ("input_ids", "labels", "documents")}
        one["documents"] = one["documents"].clone()
        one["documents"][:, 0] = torch.arange(2)
        table = {name: value[rows].detach() for name, value in vars(values).items() if value is not None}
        table["log_probs"].requires_grad_()
        parts.append(({**one, "samples": batch["samples"][[pair]]}, TokenValues(**table)))
    cut = _ours(config, [one for one, _ in parts], [value for _, value in parts], reference)[0]
    assert abs(cut - whole) > 1e-3


def test_gradients_stay_finite_where_a_document_is_certain() -> None:
    for kind in ({"method": "orpo"}, {"f_divergence_type": "alpha_divergence"}):
        config, batch = _config(**kind), _batch(15)
        reference = torch.full((_PAIRS, 2), -400.0)
        trained = Method(config).prepare([batch], reference)[0]["labels"]
        values = _values(batch, 16, trained)
        certain = TokenValues(
            **{**vars(values), "log_probs": (values.log_probs.detach() * 1e-6).requires_grad_()}
        )
        _, _, (gradient,) = _ours(config, [batch], [certain], reference)
        assert bool(torch.isfinite(gradient).all())


def test_sums_and_masks_of_documents() -> None:
    batch = Method(_config()).prepare([_batch(17)], _reference(_PAIRS, 18))[0]
    assert torch.equal(batch[MASK].long(), batch["completion_mask"][:, 1:])
    assert torch.equal(batch[TOKENS], batch["completion_mask"].sum(dim=1).float())
    ones = torch.ones(batch[MASK].shape)
    assert torch.equal(sums(ones, batch), batch[TOKENS])
    chosen, rejected = batch[TOKENS].chunk(2)
    shorter = torch.minimum(chosen, rejected)
    assert torch.equal(sums(ones, batch, 0.0), torch.cat([shorter, shorter]))
    assert torch.equal(divergence_score(ones, _config()), ones)
