"""Losses of preference optimisation, on log-probabilities of whole completions.

Each takes what is known of the pairs of a micro-batch and the settings of the run, and returns a loss per
pair [pairs], fp32. Constants are those of TRL.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid, relu

from horizon_lm.config.preference import PreferenceSettings

_NEAR_ONE = 1e-6  # alpha for which the alpha-divergence is taken as its limit, the reverse KL
_LARGEST_EXPONENT = 80.0  # exp of more is infinite in fp32


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of pairs of completions, fp32 [pairs].

    chosen, rejected: by the model; ratios: minus those by the reference; scores: ratios through the
    derivative of the f-divergence. tokens: of the completions.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    chosen_ratio: torch.Tensor
    rejected_ratio: torch.Tensor
    chosen_score: torch.Tensor
    rejected_score: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor

    @property
    def delta(self) -> torch.Tensor:
        return self.chosen_score - self.rejected_score

    @property
    def mean_delta(self) -> torch.Tensor:
        """Difference of the scores per token."""
        chosen = self.chosen_score / self.chosen_tokens.clamp(min=1)
        return chosen - self.rejected_score / self.rejected_tokens.clamp(min=1)


PairLoss = Callable[[Pairs, PreferenceSettings], torch.Tensor]


def make_pairs(
    log_probs: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor, settings: PreferenceSettings
) -> Pairs:
    """Arrange values per document [2 * pairs], all chosen ones first."""
    ratios = log_probs - reference
    scores = divergence_score(ratios, settings)
    return Pairs(*log_probs.chunk(2), *ratios.chunk(2), *scores.chunk(2), *tokens.chunk(2))


def divergence_score(ratios: torch.Tensor, settings: PreferenceSettings) -> torch.Tensor:
    """Return f'(exp(ratio)) of the f-divergence (f-DPO, https://huggingface.co/papers/2309.16240)."""
    kind, alpha = settings.f_divergence_type, settings.f_alpha_divergence_coef
    if kind == "forward_kl":
        return 1 - torch.exp(-ratios)
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(ratios)
    if kind == "alpha_divergence" and abs(alpha - 1) >= _NEAR_ONE:
        return (torch.exp(((alpha - 1) * ratios).clamp(max=_LARGEST_EXPONENT)) - 1) / (alpha - 1)
    return ratios


# Against a reference. Names are those of TRL's DPOConfig.loss_type.


def _sigmoid(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """DPO, https://huggingface.co/papers/2305.18290, Eq. 7."""
    return -logsigmoid(s.beta * pairs.delta)


def _sigmoid_norm(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """DPO of the scores per token (Tulu 3, https://huggingface.co/papers/2411.15124)."""
    return -logsigmoid(s.beta * pairs.mean_delta)


def _hinge(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """SLiC, https://huggingface.co/papers/2305.10425."""
    return relu(1 - s.beta * pairs.delta)


def _ipo(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """IPO, https://huggingface.co/papers/2310.12036, Eq. 17, per token."""
    return (pairs.mean_delta - 1 / (2 * s.beta)) ** 2


def _exo_pair(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """EXO, https://huggingface.co/papers/2402.00856, Eq. 16: KL from (1 - epsilon, epsilon)."""
    logits, epsilon = s.beta * pairs.delta, s.label_smoothing
    towards = torch.sigmoid(logits) * (logsigmoid(logits) - math.log1p(-epsilon))
    away = torch.sigmoid(-logits) * (logsigmoid(-logits) - math.log(epsilon))
    return towards + away


def _robust(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """Robust DPO, https://huggingface.co/papers/2403.00409, Eq. 12."""
    logits, epsilon = s.beta * pairs.delta, s.label_smoothing
    loss = -(1 - epsilon) * logsigmoid(logits) + epsilon * logsigmoid(-logits)
    return loss / (1 - 2 * epsilon)


def _discopop(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """DiscoPOP, https://huggingface.co/papers/2406.08414, Eq. 5."""
    logits = s.beta * pairs.delta
    share = torch.sigmoid(logits / s.discopop_tau)
    return -logsigmoid(logits) * (1 - share) + torch.exp(-logits) * share


def _nca_pair(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """NCA, https://huggingface.co/papers/2402.05369."""
    chosen, rejected = s.beta * pairs.chosen_ratio, s.beta * pairs.rejected_ratio
    return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


def _bco_pair(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """BCO, https://huggingface.co/papers/2404.04656, without a shift of the rewards."""
    return -logsigmoid(s.beta * pairs.chosen_ratio) - logsigmoid(-s.beta * pairs.rejected_ratio)


def _sppo_hard(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """SPPO, https://huggingface.co/papers/2405.00675, Eq. 4.7 with a probability of 1 for the chosen one."""
    return (pairs.chosen_ratio - 0.5 / s.beta) ** 2 + (pairs.rejected_ratio + 0.5 / s.beta) ** 2


def _smoothed(logits: torch.Tensor, epsilon: float) -> torch.Tensor:
    return -logsigmoid(logits) * (1 - epsilon) - logsigmoid(-logits) * epsilon


def _aot(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """AOT, https://huggingface.co/papers/2406.05882: margins of model and reference, each in order."""
    margins = (pairs.chosen - pairs.rejected).sort().values
    reference = (pairs.chosen - pairs.chosen_ratio) - (pairs.rejected - pairs.rejected_ratio)
    return _smoothed(s.beta * (margins - reference.detach().sort().values), s.label_smoothing)


def _aot_unpaired(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """AOT for rewards of chosen and rejected completions, each in order."""
    delta = pairs.chosen_ratio.sort().values - pairs.rejected_ratio.sort().values
    return _smoothed(s.beta * delta, s.label_smoothing)


def _apo_zero(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """APO-zero, https://huggingface.co/papers/2408.06266, Eq. 7."""
    return 1 - torch.sigmoid(s.beta * pairs.chosen_ratio) + torch.sigmoid(s.beta * pairs.rejected_ratio)


def _apo_down(pairs: Pairs, s: PreferenceSettings) -> torch.Tensor:
    """APO-down, https://huggingface.co/papers/2408.06266, Eq. 8."""
    margin = pairs.chosen_ratio - pairs.rejected_ratio
    return torch.sigmoid(s.beta * pairs.chosen_ratio) + 1 - torch.sigmoid(s.beta * margin)


AGAINST_REFERENCE: dict[str, PairLoss] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "discopop": _discopop,
    "sigmoid_norm": _sigmoid_norm,
}  # and "sft", a mean over tokens: `terms`


# Without a reference: of sums or of means per token, by method.


def log_odds(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """ORPO, https://huggingface.co/papers/2403.07691, Eq. 4: log of the ratio of the odds p / (1 - p)."""
    return (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))


def _log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) of x < 0, exact near 0 and far from it."""
    near = x > -0.6931472
    below = torch.where(near, x, -1.0)  # each branch sees only what it can differentiate
    far = torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(below)), torch.log1p(-torch.exp(far)))


def _contrastive(chosen: torch.Tensor, rejected: torch.Tensor, s: PreferenceSettings) -> torch.Tensor:
    """CPO, https://huggingface.co/papers/2401.08417, Eq. 3."""
    return _smoothed(s.beta * (chosen - rejected), s.label_smoothing)


def _simpo(chosen: torch.Tensor, rejected: torch.Tensor, s: PreferenceSettings) -> torch.Tensor:
    """SimPO, https://huggingface.co/papers/2405.14734, Eq. 6."""
    return _smoothed(s.beta * (chosen - rejected) - s.simpo_gamma, s.label_smoothing)


def _cpo_hinge(chosen: torch.Tensor, rejected: torch.Tensor, s: PreferenceSettings) -> torch.Tensor:
    return relu(1 - s.beta * (chosen - rejected))


def _cpo_ipo(chosen: torch.Tensor, rejected: torch.Tensor, s: PreferenceSettings) -> torch.Tensor:
    return (chosen - rejected - 1 / (2 * s.beta)) ** 2


def _orpo(chosen: torch.Tensor, rejected: torch.Tensor, s: PreferenceSettings) -> torch.Tensor:
    return -s.beta * logsigmoid(log_odds(chosen, rejected))


# Name -> (loss, whether it takes means per token in place of sums)
WITHOUT_REFERENCE: dict[
    str, tuple[Callable[[torch.Tensor, torch.Tensor, PreferenceSettings], torch.Tensor], bool]
] = {
    "sigmoid": (_contrastive, False),
    "hinge": (_cpo_hinge, False),
    "ipo": (_cpo_ipo, True),
    "simpo": (_simpo, True),
    "orpo": (_orpo, True),
}


def kto(
    ratios: torch.Tensor, is_desirable: torch.Tensor, kl: torch.Tensor, s: PreferenceSettings
) -> torch.Tensor:
    """KTO, https://huggingface.co/papers/2402.01306, Eq. 7, or APO-zero's unpaired form; per sample.

    ratios: log-probabilities minus the reference's. kl: estimate of the KL divergence, at least 0.
    """
    if s.losses[0][0] == "apo_zero_unpaired":
        kl = torch.zeros_like(kl)
    towards = torch.sigmoid(s.beta * (ratios - kl))
    away = torch.sigmoid(s.beta * (kl - ratios))
    return torch.where(is_desirable, s.desirable_weight * (1 - towards), s.undesirable_weight * (1 - away))
