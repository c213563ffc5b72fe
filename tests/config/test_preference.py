"""Settings of preference methods: what each method takes, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from horizon_lm.config import TrainConfig
from horizon_lm.config.preference import LOSS_TYPES
from horizon_lm.errors import ConfigError
from horizon_lm.preference.losses import AGAINST_REFERENCE, WITHOUT_REFERENCE


def config(**settings: Any) -> TrainConfig:
    return TrainConfig.from_dict({"model_name_or_path": "m", "datasets": "d.jsonl", **settings})


@pytest.mark.parametrize(
    ("settings", "losses", "kind", "sides", "reference"),
    [
        ({}, [("auto", 1.0)], "documents", 1, False),
        ({"method": "sft"}, [("sft", 1.0)], "documents", 1, False),
        ({"method": "dpo"}, [("sigmoid", 1.0)], "pairs", 2, True),
        ({"method": "ipo"}, [("ipo", 1.0)], "pairs", 2, True),
        ({"method": "apo"}, [("apo_zero", 1.0)], "pairs", 2, True),
        ({"method": "kto"}, [("kto", 1.0)], "labelled", 1, True),
        ({"method": "orpo"}, [("orpo", 1.0)], "pairs", 2, False),
        ({"method": "simpo"}, [("simpo", 1.0)], "pairs", 2, False),
        ({"method": "cpo"}, [("sigmoid", 1.0)], "pairs", 2, False),
        ({"method": "dpo", "rpo_alpha": 0.5}, [("sigmoid", 1.0), ("sft", 0.5)], "pairs", 2, True),
        ({"method": "dpo", "loss_type": "orpo"}, [("orpo", 1.0)], "pairs", 2, False),
        ({"stage": "dpo", "pref_loss": "simpo"}, [("simpo", 1.0)], "pairs", 2, False),
        ({"rl": "ipo", "rl_beta": 0.2}, [("ipo", 1.0)], "pairs", 2, True),
    ],
)
def test_what_a_method_is(
    settings: dict[str, Any], losses: list[tuple[str, float]], kind: str, sides: int, reference: bool
) -> None:
    found = config(**settings)
    assert found.losses == losses and found.data_kind == kind
    assert found.sides == sides and found.uses_reference == reference
    assert TrainConfig.from_dict(found.to_dict()) == found


def test_loss_types_are_those_of_trl_and_all_have_a_formula() -> None:
    from trl.experimental.cpo import CPOConfig
    from trl.trainer.kto_config import KTOConfig

    assert set(LOSS_TYPES["dpo"]) == {*AGAINST_REFERENCE, "sft"} and len(LOSS_TYPES["dpo"]) == 15
    assert set(LOSS_TYPES["kto"]) == set(KTOConfig.__dataclass_fields__["loss_type"].metadata["choices"])
    theirs = set(CPOConfig.__dataclass_fields__["loss_type"].metadata["choices"]) - {"alphapo"}
    assert set(LOSS_TYPES["cpo"]) == theirs == WITHOUT_REFERENCE.keys() - {"orpo"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "sft", "beta": 0.2}, "beta has no effect with method: sft"),
        ({"method": "dpo", "simpo_gamma": 1.0}, "simpo_gamma has no effect with method: dpo"),
        ({"method": "dpo", "desirable_weight": 2.0}, "desirable_weight has no effect with method: dpo"),
        ({"method": "orpo", "ref_model_name_or_path": "r"}, "ref_model_name_or_path has no effect"),
        ({"method": "orpo", "loss_type": "sigmoid"}, "loss_type sigmoid is not one of method: orpo"),
        ({"method": "ipo", "loss_type": "hinge"}, "loss_type hinge is not one of method: ipo"),
        ({"method": "cpo", "loss_type": ["sigmoid", "hinge"]}, "method: cpo takes one loss_type"),
        ({"method": "dpo", "loss_weights": [1.0, 2.0]}, "loss_weights has 2 numbers for 1 loss type"),
        ({"method": "dpo", "label_smoothing": 0.1}, "label_smoothing has no effect with loss_type: sigmoid"),
        ({"method": "dpo", "loss_type": "exo_pair"}, "exo_pair needs label_smoothing above 0"),
        (
            {"method": "dpo", "loss_type": "robust", "label_smoothing": 0.5},
            "robust needs label_smoothing below 0.5",
        ),
        (
            {"method": "dpo", "loss_type": "aot", "f_divergence_type": "forward_kl"},
            "f_divergence_type: forward_kl is not defined for loss_type: aot",
        ),
        ({"method": "dpo", "f_alpha_divergence_coef": 0.7}, "f_alpha_divergence_coef has no effect"),
        ({"method": "dpo", "discopop_tau": 0.1}, "discopop_tau has no effect with loss_type: sigmoid"),
        ({"method": "cpo", "simpo_gamma": 0.1}, "simpo_gamma has no effect with loss_type: sigmoid"),
        ({"method": "dpo", "use_weighting": True, "rpo_alpha": 1.0}, "use_weighting weights pairs"),
        ({"method": "dpo", "streaming": True, "max_steps": 3}, "streaming: true is for method: sft"),
        ({"method": "kto", "label_smoothing_factor": 0.1}, "label_smoothing_factor has no effect"),
        ({"method": "dpo", "metric_for_best_model": "perplexity"}, "has no perplexity"),
        ({"method": "kto", "metric_for_best_model": "rewards/accuracies"}, "method: kto has no pairs"),
        ({"method": "dpo", "loss_type": "kto_pair"}, "loss_type is kto_pair, expected one or a list of"),
        ({"stage": "ppo"}, "does not train reward models or with rollouts"),
        ({"method": "dpo", "sync_ref_model": True}, "sync_ref_model"),
        ({"method": "dpo", "max_prompt_length": 512}, "max_prompt_length"),
    ],
    ids=lambda one: "-".join(map(str, one)) if isinstance(one, dict) else "",
)
def test_what_cannot_work_is_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")) as caught:
        config(**settings)
    assert caught.value.hint


def test_what_auto_may_mean_is_checked_once_it_is_known() -> None:
    found = config(beta=0.2, simpo_gamma=1.0)
    with pytest.raises(ConfigError, match="simpo_gamma has no effect with method: dpo"):
        found.replace(method="dpo")
    assert found.replace(method="simpo").beta == 0.2
