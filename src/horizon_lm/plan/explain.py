"""The choices of a plan with their reasons."""

from __future__ import annotations

from horizon_lm.config import TrainConfig
from horizon_lm.engine.policies import Policies
from horizon_lm.machine.cores import lane_cores
from horizon_lm.machine.profile import Profile
from horizon_lm.plan import fit
from horizon_lm.plan.choose import Choice, Planner
from horizon_lm.schedule.step_spec import EXACT, FAST, KEEP
from horizon_lm.words import count, size

# On a CPU layers are computed in place: there is nothing to choose.
_OF_DEVICE_MEMORY = frozenset(
    {"boundaries", "slots", "grad_slots", "loss_chunk_tokens", "resident", "rounds", "round_sums"}
)
_SUMS_REASONS = {
    "auto": "as the device has room",
    "device": "gradients wait for the next round in device memory",
    "host": "gradients wait for the next round in host memory, and are brought back",
    "add": "the host adds up the gradients of the rounds",
}


def explain(config: TrainConfig, chosen: TrainConfig, planner: Planner) -> list[Choice]:
    """Each choice with its reason: what the next choice would have meant."""
    layers, is_cpu = planner.outline.num_layers, planner.profile.device == "cpu"
    reasons = {
        "per_device_train_batch_size": _cut_reason(config, planner),
        "gradient_accumulation_steps": "a layer is visited once for all micro-batches of a step"
        if is_cpu
        else "weights cross the bus once for all micro-batches of a step",
        "rounds": _rounds_reason(chosen),
        "round_sums": _SUMS_REASONS[chosen.round_sums],
        "resident": _resident_reason(chosen, planner),
        "activations": _activation_reason(config, chosen, planner),
        "boundaries": "device memory is enough"
        if not _count(chosen.boundaries, "host", layers)
        else "spilling these inputs to host memory leaves device memory for activations",
        "update": _update_reason(chosen),
        "slots": "the next layer arrives while one is computed"
        if chosen.slots == 2
        else "with two, uploads are late",
        "grad_slots": "unused: each layer has a gradient slot of its own"
        if chosen.rounds != 1 and chosen.round_sums == "device"
        else "one gradient leaves while the next is computed",
        "loss_chunk_tokens": _chunk_reason(chosen, planner),
        "optimizer_threads": _threads_reason(chosen, planner.profile),
    }
    if planner.world > 1 or chosen.reduction == EXACT:
        reasons["reduction"] = _reduction_reason(chosen, planner)
    open_when_auto = {"activations", "boundaries", "update", "loss_chunk_tokens", "optimizer_threads"}
    open_when_auto |= {"resident", "rounds", "round_sums", "reduction"}
    rows = []
    for key, reason in reasons.items():
        if is_cpu and key in _OF_DEVICE_MEMORY and key not in planner.pinned:
            continue
        if key == "round_sums" and chosen.rounds == 1:
            continue
        named = key in planner.pinned and not (key in open_when_auto and getattr(config, key) == "auto")
        value = getattr(chosen, key)
        if key == "optimizer_threads" and value == "auto":
            value = max(1, planner.profile.cores - lane_cores(planner.profile.device, chosen.update))
        rows.append(Choice(key, value, "as configured" if named else reason, named))
    return rows


def _reduction_reason(chosen: TrainConfig, planner: Planner) -> str:
    exact, fast = planner.seconds_by_reduction(chosen)
    more = exact / fast - 1
    if chosen.reduction == FAST:
        return f"exact would be {more:.0%} slower"
    cost = f"; fast would be {1 - fast / exact:.1%} faster" if more >= 0.001 else ", as fast as fast"
    return f"bitwise identical for any number of ranks{cost}"


def _rounds_reason(chosen: TrainConfig) -> str:
    if chosen.rounds == 1:
        return "activations of all micro-batches fit, or rounds would cost more than they save"
    return "activations of fewer micro-batches at a time, so that layers keep more of them"


def _resident_reason(chosen: TrainConfig, planner: Planner) -> str:
    """Which units live on the device, in words."""
    policies = Policies.of(chosen, planner.outline)
    head = planner.outline.num_layers + 1
    whole = policies.resident - policies.uploaded
    layers = len([unit for unit in whole if 0 < unit < head])
    names = ["trainable parts"] if policies.uploaded & policies.resident else []
    names += [
        word
        for word, unit in (("embedding", planner.outline.embedding_unit), ("head", head))
        if unit in whole and (word == "embedding" or unit != planner.outline.embedding_unit)
    ]
    if layers:
        names.append(f"{layers} of {count(planner.outline.num_layers, 'layer')}")
    if not names:
        return "all units stream: the device has no room, or would gain nothing"
    verb = "lives" if len(names) == 1 and layers <= 1 and names[0] != "trainable parts" else "live"
    return f"{' and '.join([', '.join(names[:-1])] * (len(names) > 1) + names[-1:])} {verb} on the device"


def _threads_reason(chosen: TrainConfig, profile: Profile) -> str:
    if chosen.optimizer_threads != "auto":
        return "the fewest that update about as fast as any, by horizon doctor"
    left = lane_cores(profile.device, chosen.update)
    return f"{profile.cores} usable cores" + (f", {left} of them left to the lanes" if left else "")


def _cut_reason(config: TrainConfig, planner: Planner) -> str:
    if config.tokens_per_step is None:
        return "the default; tokens_per_step leaves it to the planner"
    return f"the fastest cut of {config.tokens_per_step} tokens a step that fits"


def _activation_reason(config: TrainConfig, chosen: TrainConfig, planner: Planner) -> str:
    layers = planner.outline.num_layers
    if _count(chosen.activations, KEEP, layers) == layers:
        return "all layers fit"
    more = planner.with_more(config, chosen)
    short = fit.shortfalls(chosen, planner.predict(more[1]), planner.limits) if more is not None else []
    if more is None or not short:
        return "keeping more would not shorten the step"
    policy, number = more[0], _count(more[1].activations, more[0], layers)
    what = f"keeping {count(number, 'layer')}" if policy == KEEP else f"{policy} in {count(number, 'layer')}"
    return f"{what} would need {size(short[0].bytes)} of {short[0].memory} memory more than is available"


def _chunk_reason(chosen: TrainConfig, planner: Planner) -> str:
    if not planner.chooses_chunk:
        return "as in the resumed run"
    larger = planner.chunks(chosen.replace(loss_chunk_tokens="auto"))
    if chosen.loss_chunk_tokens in larger[:1]:
        return "the largest chunk considered"
    return "a larger one would not fit"


def _update_reason(chosen: TrainConfig) -> str:
    return {
        "eager": "without clipping, each layer is updated as its gradient arrives; no gradients are stored",
        "deferred": "clips exactly, and overlaps with the next forward pass",
        "sync": "nothing can overlap, so the simple order is equally fast",
    }[chosen.update]


def _count(value: str | list[str], word: str, layers: int) -> int:
    from horizon_lm.config.memory import ACTIVATIONS, BOUNDARIES, per_layer

    listed = per_layer(value, ACTIVATIONS if word in ACTIVATIONS else BOUNDARIES)
    return (layers if value == word else 0) if listed is None else listed.count(word)
