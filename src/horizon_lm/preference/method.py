"""The method of a run on preferences: what a step or an evaluation computes from token values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch.nn.functional import logsigmoid

from horizon_lm.config.preference import PreferenceSettings
from horizon_lm.engine.loss import TokenLoss, TokenValues
from horizon_lm.host_model import HostModel
from horizon_lm.micro_batches import MicroBatch
from horizon_lm.preference.documents import MASK, TOKENS, by_document, sums, with_places
from horizon_lm.preference.losses import AGAINST_REFERENCE, WITHOUT_REFERENCE, kto, log_odds, make_pairs

REFERENCE, KL, KL_PREFIX = "reference", "kl", "KL_"
_NLL_MASK = "nll_mask"  # [documents, longest - 1]: targets of the negative log-likelihood, if it has its own
_OF_KL = ("input_ids", "labels", "attention_mask", "documents")

# Name -> [sum, count] of a metric.
Sums = dict[str, list[float]]


@dataclass(frozen=True)
class Terms:
    """What a micro-batch adds to the loss, on the device: of the samples, and of the chosen tokens."""

    samples: torch.Tensor
    nll: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


class Method:
    """A method of preference optimisation with the settings of a run.

    A step's loss is the mean over all its samples, and that of the negative log-likelihood over all its
    chosen tokens, however it is cut into micro-batches; aot and aot_unpaired compare the pairs of one
    micro-batch.
    """

    def __init__(self, settings: PreferenceSettings) -> None:
        self.settings = settings
        self.name = settings.method
        pairs = [(name, weight) for name, weight in settings.losses if name != "sft"]
        self._losses = pairs
        self._nll_weight = settings.nll_weight
        if settings.uses_reference:
            self._nll_weight = sum(weight for name, weight in settings.losses if name == "sft")
        self.values: tuple[str, ...] = ("entropy", "mean_logits", "is_top1")
        if settings.use_weighting:
            self.values += ("log_sum_sq_probs",)

    def prepare(
        self, micro_batches: Iterable[MicroBatch], reference: torch.Tensor | None
    ) -> list[MicroBatch]:
        """Add to micro-batches what the loss needs besides their tokens, on the host.

        reference: fp32 [samples, 2], the log-probabilities of each sample's documents.
        """
        return [self._prepared(batch, reference) for batch in micro_batches]

    def _prepared(self, batch: MicroBatch, reference: torch.Tensor | None) -> MicroBatch:
        found = with_places({k: v for k, v in batch.items() if not k.startswith(KL_PREFIX)})
        if self.settings.uses_reference:
            assert reference is not None, "the pass of the reference comes first"
            of_samples = reference[found["samples"]]
            found[REFERENCE] = of_samples[:, 0] if self.name == "kto" else of_samples.T.flatten()
        if self.name == "orpo":
            labels = _with_prompts(found)
            found |= {"labels": labels, _NLL_MASK: with_places({**batch, "labels": labels})[MASK]}
        return found

    # The KL term.

    def kl_batches(self, micro_batches: Iterable[MicroBatch]) -> list[MicroBatch]:
        """Return the documents from which the KL divergence is estimated; none for most methods."""
        if not self.settings.uses_kl:
            return []
        return [kl_batch(batch) for batch in micro_batches]

    def kl_sum(
        self, model: HostModel, batches: Sequence[MicroBatch], reference: torch.Tensor
    ) -> torch.Tensor:
        """Return the sum of the log-ratios of KL documents."""
        out = model.evaluate(batches, return_log_probs=True, ignore_extra=True)
        assert out.log_probs is not None
        total = torch.zeros(())
        for log_probs, batch in zip(out.log_probs, batches, strict=True):
            placed = with_places(batch)
            total += (sums(log_probs, placed) - reference[batch["samples"], 1]).sum()
        return total

    def estimate_kl(
        self, model: HostModel, micro_batches: Sequence[MicroBatch], reference: torch.Tensor | None
    ) -> torch.Tensor | None:
        """Estimate the KL divergence from all KL documents of a step, at least 0; None without that term."""
        batches = self.kl_batches(micro_batches)
        if not batches:
            return None
        assert reference is not None
        num = sum(len(batch["samples"]) for batch in batches)
        return (self.kl_sum(model, batches, reference) / num).clamp(min=0)

    # The loss.

    def step(
        self, model: HostModel, micro_batches: Sequence[MicroBatch], reference: torch.Tensor | None
    ) -> tuple[list[MicroBatch], TokenLoss]:
        """Return the micro-batches of a step and its loss function. Evaluates KL documents."""
        kl = self.estimate_kl(model, micro_batches, reference)
        batches = self.prepare(micro_batches, reference)
        samples = sum(len(batch["samples"]) for batch in batches)
        tokens = sum(self.nll_tokens(batch) for batch in batches)
        if kl is not None:
            batches = [{**batch, KL: kl.reshape(1)} for batch in batches]
        return batches, TokenLoss(partial(self._loss, samples=samples, tokens=tokens), self.values)

    def _loss(
        self, values: TokenValues, batch: Mapping[str, torch.Tensor], *, samples: int, tokens: float
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        terms = self.terms(values, batch)
        return terms.samples / samples + terms.nll * (self._nll_weight / max(tokens, 1)), terms.metrics

    def whole_loss(self, samples: float, num_samples: int, nll: float, tokens: float) -> float:
        """Return the loss of summed terms."""
        return samples / max(1, num_samples) + self._nll_weight * nll / max(tokens, 1)

    def nll_tokens(self, batch: Mapping[str, torch.Tensor]) -> float:
        """Count the tokens over which the negative log-likelihood is a mean."""
        if not self._nll_weight:
            return 0
        return float(_nll_mask(batch).sum())

    def terms(self, values: TokenValues, batch: Mapping[str, torch.Tensor]) -> Terms:
        """Compute the terms of a micro-batch and sums of its metrics, without waiting for the device."""
        batch = dict(batch)
        with torch.no_grad():
            common = self._token_metrics(values, batch)
        if self.name == "kto":
            found = self._kto(values, batch)
        elif self.settings.uses_reference:
            found = self._against_reference(values, batch)
        else:
            found = self._without_reference(values, batch)
        return Terms(found.samples, found.nll, {**found.metrics, **common})

    def _against_reference(self, values: TokenValues, batch: MicroBatch) -> Terms:
        s = self.settings
        log_probs = sums(values.log_probs, batch, s.ld_alpha)
        pairs = make_pairs(log_probs, batch[REFERENCE], batch[TOKENS], s)
        weights = self._weights(values, batch)
        total = log_probs.new_zeros(())
        for name, weight in self._losses:
            total = total + (AGAINST_REFERENCE[name](pairs, s) * weights).sum() * weight
        nll = -sums(values.log_probs, batch)[: len(pairs.chosen)].sum() if self._nll_weight else total * 0
        chosen, rejected = (s.beta * ratio.detach() for ratio in (pairs.chosen_ratio, pairs.rejected_ratio))
        return Terms(total, nll, _of_pairs(chosen, rejected, pairs.chosen, pairs.rejected))

    def _weights(self, values: TokenValues, batch: MicroBatch) -> torch.Tensor | float:
        """Weight pairs (WPO, https://huggingface.co/papers/2406.11827, Eq. 2)."""
        if not self.settings.use_weighting:
            return 1.0
        assert values.log_sum_sq_probs is not None
        aligned = (values.log_probs - values.log_sum_sq_probs).detach()
        means = (by_document(aligned, batch) * batch[MASK]).sum(dim=1) / batch[TOKENS].clamp(min=1)
        chosen, rejected = torch.exp(means).chunk(2)
        return chosen * rejected

    def _without_reference(self, values: TokenValues, batch: MicroBatch) -> Terms:
        s, (name, weight) = self.settings, self._losses[0]
        loss, takes_means = WITHOUT_REFERENCE[name]
        totals = sums(values.log_probs, batch)
        found = totals / batch[TOKENS].clamp(min=1) if takes_means else totals
        chosen, rejected = found.chunk(2)
        nll = -(by_document(values.log_probs, batch)[: len(chosen)] * _nll_mask(batch)).sum()
        metrics = _of_pairs(s.beta * chosen.detach(), s.beta * rejected.detach(), chosen, rejected)
        metrics["nll_loss"] = nll.detach()
        if name == "orpo":
            odds = log_odds(chosen.detach(), rejected.detach())
            metrics |= {"log_odds_chosen": odds.sum(), "log_odds_ratio": logsigmoid(odds).sum()}
        samples = loss(chosen, rejected, s).sum() * weight
        return Terms(samples, nll if self._nll_weight else nll * 0, metrics)

    def _kto(self, values: TokenValues, batch: MicroBatch) -> Terms:
        log_probs = sums(values.log_probs, batch)
        is_desirable = batch["label"].bool()
        ratios = log_probs - batch[REFERENCE]
        kl = batch[KL] if KL in batch else ratios.new_zeros(1)
        loss = kto(ratios, is_desirable, kl, self.settings)
        metrics = {KL: kl.sum()}
        for side, where in (("chosen", is_desirable), ("rejected", ~is_desirable)):
            metrics[f"rewards/{side}"] = (self.settings.beta * ratios.detach() * where).sum()
            metrics[f"logps/{side}"] = (log_probs.detach() * where).sum()
        return Terms(loss.sum(), loss.new_zeros(()), metrics)

    # Metrics.

    def _token_metrics(self, values: TokenValues, batch: MicroBatch) -> dict[str, torch.Tensor]:
        """Sum entropies, mean logits and hits over the targets of completions."""
        assert values.entropy is not None and values.mean_logits is not None and values.is_top1 is not None
        mask = batch[MASK]
        logits = (by_document(values.mean_logits, batch) * mask).sum(dim=1)
        found = {"entropy": (by_document(values.entropy, batch) * mask).sum()}
        if self.name == "kto":
            is_desirable = batch["label"].bool()
            return {
                **found,
                "logits/chosen": (logits * is_desirable).sum(),
                "logits/rejected": (logits * ~is_desirable).sum(),
            }
        chosen, rejected = logits.chunk(2)
        hits = (by_document(values.is_top1.float(), batch) * mask)[: len(chosen)].sum()
        return {
            **found,
            "logits/chosen": chosen.sum(),
            "logits/rejected": rejected.sum(),
            "mean_token_accuracy": hits,
        }

    def counted(self, metrics: Sequence[Mapping[str, float]], batches: Sequence[MicroBatch]) -> Sums:
        """Add up the metrics of prepared micro-batches, each with the count that its mean is over."""
        found: Sums = {}
        for one, batch in zip(metrics, batches, strict=True):
            counts = self._counts(batch)
            for name, value in one.items():
                total = found.setdefault(name, [0.0, 0.0])
                total[0] += float(value)
                total[1] += counts(name)
        return found

    def _counts(self, batch: MicroBatch) -> _Counts:
        tokens, samples = batch[TOKENS], len(batch["samples"])
        if self.name == "kto":
            label = batch["label"].bool()
            sides = {
                "chosen": (float(label.sum()), float(tokens[label].sum())),
                "rejected": (float((~label).sum()), float(tokens[~label].sum())),
            }
        else:
            sides = {
                "chosen": (float(samples), float(tokens[:samples].sum())),
                "rejected": (float(samples), float(tokens[samples:].sum())),
            }
        return _Counts(float(samples), float(tokens.sum()), float(_nll_mask(batch).sum()), sides)


@dataclass(frozen=True)
class _Counts:
    """What the metrics of a micro-batch are means over. sides: (samples, tokens) of each."""

    samples: float
    tokens: float
    nll_tokens: float
    sides: Mapping[str, tuple[float, float]]

    def __call__(self, name: str) -> float:
        kind, _, side = name.partition("/")
        if side in self.sides:
            return self.sides[side][kind == "logits"]
        tokens = {
            "entropy": self.tokens,
            "mean_token_accuracy": self.sides["chosen"][1],
            "nll_loss": self.nll_tokens,
            KL: 1.0,
        }
        return tokens.get(name, self.samples)


def _of_pairs(
    chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor, chosen: torch.Tensor, rejected: torch.Tensor
) -> dict[str, torch.Tensor]:
    return {
        "rewards/chosen": chosen_rewards.sum(),
        "rewards/rejected": rejected_rewards.sum(),
        "rewards/accuracies": (chosen_rewards > rejected_rewards).float().sum(),
        "rewards/margins": (chosen_rewards - rejected_rewards).sum(),
        "logps/chosen": chosen.detach().sum(),
        "logps/rejected": rejected.detach().sum(),
    }


def added(parts: Iterable[Mapping[str, Sequence[float]]]) -> Sums:
    """Add up sums and counts."""
    found: Sums = {}
    for part in parts:
        for name, (value, num) in part.items():
            total = found.setdefault(name, [0.0, 0.0])
            total[0] += value
            total[1] += num
    return found


def means(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the metrics of `Method.counted`. Margins of samples without pairs are those of the means."""
    result = {name: total / num for name, (total, num) in found.items() if num}
    if "rewards/margins" not in result and {"rewards/chosen", "rewards/rejected"} <= result.keys():
        result["rewards/margins"] = result["rewards/chosen"] - result["rewards/rejected"]
    return result


def kl_batch(batch: MicroBatch) -> MicroBatch:
    """Return the micro-batch of the KL documents of another one."""
    found = {name: batch[KL_PREFIX + name] for name in _OF_KL if KL_PREFIX + name in batch}
    return {**found, "samples": batch["samples"]}


def _nll_mask(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the targets of the chosen documents over which the negative log-likelihood is a mean."""
    return batch.get(_NLL_MASK, batch[MASK])[: len(batch["samples"])]


def _with_prompts(batch: MicroBatch) -> torch.Tensor:
    """Return labels with the prompts of the chosen documents, on which orpo trains too."""
    labels, ids = batch["labels"].clone(), batch["input_ids"]
    for row, start, length in batch["documents"][: len(batch["samples"])].tolist():
        labels[row, start + 1 : start + length] = ids[row, start + 1 : start + length]
    return labels
