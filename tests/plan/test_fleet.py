"""Plans for several ranks: costs, memory, the choice of the reduction, and the smallest fleet that does."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from horizon_lm import cli
from horizon_lm.config import TrainConfig
from horizon_lm.distributed.ranks import ALONE
from horizon_lm.errors import ConfigError, DoesNotFitError
from horizon_lm.machine.profile import Node, Profile, load_profile
from horizon_lm.memory.regions import predict_bytes
from horizon_lm.memory.shards import Shard, UnitShard
from horizon_lm.plan.costs import Costs
from horizon_lm.plan.fleet import ONE, Fleet, Network
from horizon_lm.plan.fleet_plan import break_even, smallest
from horizon_lm.plan.predict import Sizes, costs_of, prediction_of
from horizon_lm.plan.run_plan import RunPlan, fleet_of, plan_run
from horizon_lm.plan.show import describe
from horizon_lm.plan.space import Candidate, Cut
from horizon_lm.schedule import Op
from planned_models import SMALL, config_of, known, outline_of
from planned_ranks import node_of, planners_of, profile_of
from rank_pool import RankPool

pytestmark = pytest.mark.usefixtures("one_thread")

TWO_NODES = Fleet(2, 4)


def plan_of(config: TrainConfig, hardware: str, fleet: Fleet) -> RunPlan:
    return plan_run(config, hardware, cache=known(config), fleet=fleet)


def costs(profile: Profile, fleet: Fleet, count: int = 8, **values: Any) -> Costs:
    """Costs of a rank for a step of `count` micro-batches [1, 64]."""
    config, network = config_of(device="cuda", **values), Network.of(fleet, profile)
    rank = profile.of_rank(fleet.gpus_per_node)
    return costs_of(outline_of(config), config, rank, Sizes(1, 64, count), network)


# Costs


def test_collectives_take_the_time_of_the_slower_link() -> None:
    node = node_of()
    inside, across = Network(Fleet(1, 4), node), Network(TWO_NODES, node)
    # All-gathers receive the other ranks' shares: over four adapters of a node at once between nodes.
    assert inside.gather_seconds(4e9) == pytest.approx(3 / 4 * 4e9 / 1e10 + 1e-5)
    assert across.gather_seconds(4e9) == pytest.approx(7 / 8 * 4e9 / (4 * 1e9) + 3e-5)
    fast = Network(TWO_NODES, node_of(network=1e11))
    assert fast.gather_seconds(4e9) == pytest.approx(7 / 8 * 4e9 / 1e10 + 3e-5)
    alone = Network(Fleet(2, 1), node_of(network=1e11))
    assert alone.gather_seconds(4e9) == pytest.approx(1 / 2 * 4e9 / 1e11 + 3e-5)
    # All-to-all sends different bytes to every rank: half of them through the rank's own adapter.
    assert inside.all_to_all_seconds(4e9) == pytest.approx(3 / 4 * 4e9 / 1e10 + 1e-5)
    assert across.all_to_all_seconds(4e9) == pytest.approx(1 / 2 * 4e9 / 1e9 + 3e-5)
    assert across.pass_on_seconds == pytest.approx(8e-4)


@pytest.mark.parametrize("reduction", ["exact", "fast"])
def test_ops_cost_what_their_bytes_take(reduction: str) -> None:
    """By hand, for a layer of a model in bf16; and the control, one rank."""
    profile = profile_of()
    found = costs(profile, TWO_NODES, reduction=reduction)
    layout = found.outline.units[1]
    share = -(-layout.numel // (8 * 4096)) * 4096
    assert layout.numel == layout.trainable_numel and 8 * share > layout.numel
    network = Network(TWO_NODES, node_of())
    assert found.seconds(Op("U", 1)) == pytest.approx(share * 2 / 2e9)
    assert found.seconds(Op("J", 1)) == pytest.approx(network.gather_seconds(8 * share * 2))
    assert found.seconds(Op("D", 1)) == pytest.approx(share * 2 / 2e9)
    assert found.seconds(Op("O", 1)) == pytest.approx(share * 26 / (8e9 / 4))
    sent = network.all_to_all_seconds(8 * share * 2) if reduction == "exact" else None
    if sent is None:  # one sum over ranks, in fp32
        sent, added = network.gather_seconds(8 * share * 4), (0, 12)
    else:  # the owner reads eight gradients, and reads and writes the sum
        added = (8 * 10 - 4, 8 * 10)
    for first, each in ((True, added[0]), (False, added[1])):
        assert found.seconds(Op("T", 1, first=first)) == pytest.approx(sent + share * each / 1e11)
    assert found.seconds(Op("N")) == pytest.approx(8e-4)
    config = config_of(device="cuda")
    alone = costs_of(outline_of(config), config, profile, Sizes(1, 64, 8))
    assert alone.seconds(Op("O", 1)) == pytest.approx(layout.numel * 26 / 1e10)
    assert alone.seconds(Op("U", 1)) == pytest.approx(layout.numel * 2 / 2e9)


def test_eager_updates_wait_for_all_ranks() -> None:
    values: dict[str, Any] = {"update": "eager", "max_grad_norm": None}
    found, other = costs(profile_of(), TWO_NODES, **values), costs(profile_of(), TWO_NODES)
    more = found.seconds(Op("O", 1)) - other.seconds(Op("O", 1))
    assert more == pytest.approx(Network(TWO_NODES, node_of()).exchange_seconds) and more > 0


def test_a_step_adds_up_gradients_once_per_position_or_once() -> None:
    """Exact: a position of all ranks at a time. Stand-ins take the time of a micro-batch."""
    for reduction, totals in (("exact", 3), ("fast", 1)):
        found = prediction_of(costs(profile_of(), TWO_NODES, count=17, reduction=reduction))
        assert found.plan.micro_batches == 3 and found.tokens == 17 * 64
        kinds = [op.kind for op, _, _ in found.simulation.spans if op.unit == 2]
        assert kinds.count("T") == totals and kinds.count("J") == 2 and kinds.count("F") == 3
        assert found.lanes()["network"] > 0
    longer = prediction_of(costs(profile_of(), TWO_NODES, count=24))
    assert longer.seconds == pytest.approx(prediction_of(costs(profile_of(), TWO_NODES, count=17)).seconds)
    assert "network" not in prediction_of(costs_of_one(8)).lanes()


def costs_of_one(count: int, **values: Any) -> Costs:
    config = config_of(device="cuda", **values)
    return costs_of(outline_of(config), config, profile_of(), Sizes(1, 64, count))


def test_a_short_step_stands_for_a_long_one_of_many_ranks() -> None:
    for reduction in ("exact", "fast"):
        found = costs(profile_of(), TWO_NODES, 8 * 24, reduction=reduction, activations="keep")
        short, whole = (prediction_of(found, most) for most in (20, 10**6))
        assert len(short.simulation.spans) < len(whole.simulation.spans) / 2
        assert short.seconds == pytest.approx(whole.seconds, rel=2e-2)
        assert short.lanes() == pytest.approx(whole.lanes(), rel=5e-2)


# Memory


@pytest.mark.parametrize("fleet", [Fleet(1, 2), TWO_NODES, Fleet(3, 1)])
def test_a_node_holds_the_shares_of_its_ranks(fleet: Fleet) -> None:
    """To the byte, as the store allocates them; only padding is added to what one rank holds."""
    config = config_of(tokens_per_step=1024, max_length=64, device="cuda", resident=0, boundaries="device")
    planners = planners_of(config, profile_of())
    found = planners(fleet).predict(config.replace(gradient_accumulation_steps=8))
    stored = predict_bytes(found.costs.outline.units, found.costs.spec)
    assert found.costs.spec.shard == Shard(0, fleet.world)
    assert {name: found.host[name] for name in stored} == stored
    shards = [UnitShard(unit, Shard(0, fleet.world)) for unit in found.costs.outline.units]
    assert stored["exp_avg"] == 4 * sum(shard.trainable_share for shard in shards)
    whole = planners(ONE).predict(config.replace(gradient_accumulation_steps=8)).store_bytes
    padding = len(shards) * fleet.world * 4096 * 14
    assert 0 <= found.store_bytes * fleet.world - whole < padding
    limits = planners(fleet).limits
    assert (limits.host, limits.ranks) == (10**9, fleet.gpus_per_node)


CASES: dict[str, dict[str, Any]] = {
    "exact": {"reduction": "exact"},
    "fast": {"reduction": "fast", "update": "deferred"},
    "rounds": {"reduction": "exact", "rounds": 2, "round_sums": "device"},
    "rounds, fast": {"reduction": "fast", "rounds": 2, "round_sums": "host"},
    "fp32": {"reduction": "exact", "dtype": "float32"},
    "eager": {"reduction": "exact", "update": "eager", "max_grad_norm": None},
}


def test_what_a_rank_allocates_is_predicted_to_the_byte(two_ranks: RankPool) -> None:
    for name, values in CASES.items():
        found = two_ranks.run("planned_ranks:allocated", values, 4, 16)
        assert found[0] == found[1]
        config = config_of(gradient_accumulation_steps=4, device="cpu", max_length=16, **values)
        profile = load_profile("cpu-2core")
        network = Network.of(Fleet(1, 2), profile)
        planned = costs_of(outline_of(config), config, profile.of_rank(2), Sizes(1, 16, 4), network)
        parts = planned.fixed_bytes() | predict_bytes(planned.outline.units, planned.spec)
        shares = ("gradient_shards", "gradient_sums", "exchange")
        parts["shares"] = sum(parts.pop(part, 0) for part in shares)
        assert {key: size for key, size in found[0].items() if size} == parts, name


# Choices


def test_ranks_share_the_micro_batches_and_the_search_knows_it() -> None:
    """The choice is at most 5 % slower than the best of a space that can be searched through."""
    config = config_of(
        tokens_per_step=768, max_length=64, device="cuda", update="deferred", slots=2, boundaries="device"
    ).replace(reserve_host_gb=0.0)
    profile = profile_of(device_bytes=6e6)
    planner = planners_of(config, profile)(Fleet(1, 3))
    exact = config.replace(reduction="exact")
    fitting = [c for c in planner.space(exact) if planner.fits(c)]
    times = [planner.predict(c).seconds for c in fitting]
    search = planner._search(exact)
    for one, seconds in zip(fitting, times, strict=True):
        batch, count, rounds = one.per_device_train_batch_size, one.gradient_accumulation_steps, one.rounds
        assert isinstance(rounds, int) and isinstance(one.resident, int)
        cut = Cut(batch, count, rounds, "" if rounds == 1 else one.round_sums, world=3)
        bound = search._bounds(Candidate(cut, one.update, one.slots, 0))[one.resident]
        assert bound <= seconds * (1 + 1e-9)
    chosen = planner.choose(exact)
    assert planner.fits(chosen) and planner.predict(chosen).seconds <= 1.05 * min(times)
    assert min(times) < 0.9 * max(times)
    assert {c.rounds for c in fitting} == {1, 2, 4}  # of four positions, not of twelve micro-batches
    assert max(c.rounds for c in fitting if c.gradient_accumulation_steps == 12) == 4


def test_exact_is_chosen_unless_it_costs_much() -> None:
    config = config_of(
        gradient_accumulation_steps=32,
        per_device_train_batch_size=16,
        max_length=64,
        device="cuda",
        reserve_host_gb=0.0,
    )
    quick, slow = (profile_of(node_of(network=rate, peer=1e11)) for rate in (1e11, 2e7))
    found = {}
    for name, profile in (("quick", quick), ("slow", slow)):
        planner = planners_of(config, profile)(TWO_NODES)
        chosen = planner.choose(config)
        exact, fast = planner.seconds_by_reduction(chosen)
        found[name] = chosen.reduction, exact / fast
        assert planner.choose(config.replace(reduction="exact")).reduction == "exact"
    assert found["quick"][0] == "exact" and found["quick"][1] <= 1.15
    assert found["slow"][0] == "fast" and found["slow"][1] > 1.15
    # Assumed links, and those of another machine, do not decide which bits a run has.
    assumed = slow.model_copy(update={"node": slow.as_node(4).model_copy(update={"sources": {}})})
    assert planners_of(config, assumed)(TWO_NODES).choose(config).reduction == "exact"
    here = planners_of(config, slow)(TWO_NODES)
    here.limits = replace(here.limits, here=True)
    assert here.choose(config).reduction == "exact"
    here = planners_of(config, slow.model_copy(update={"measured": True}))(TWO_NODES)
    here.limits = replace(here.limits, here=True)
    assert here.choose(config).reduction == "fast"


# The smallest fleet


def tight(**values: Any) -> tuple[TrainConfig, Profile]:
    """A machine of which the small model needs several."""
    config = config_of(tokens_per_step=4096, max_length=64, device="cuda", reserve_host_gb=0.0, **values)
    return config, profile_of(node_of(host_bytes=2e6), device_bytes=4e6, host_bytes=2e6)


def test_the_smallest_fleet_fits_and_one_node_fewer_does_not() -> None:
    config, profile = tight(resident=0)
    planners = planners_of(config, profile)
    found = smallest(config, planners, 4)
    assert found is not None and found.nodes > 1 and found.gpus_per_node == 4
    planners(found).choose(config)
    with pytest.raises(DoesNotFitError, match="host memory: .* for each of 4 ranks"):
        planners(Fleet(found.nodes - 1, 4)).choose(config)


def test_a_node_that_suffices_is_given_with_its_fewest_gpus() -> None:
    """Device memory is what is short, of units that live there."""
    config, profile = tight(resident=6, activations="recompute")
    profile = profile.model_copy(update={"node": node_of()})
    planners = planners_of(config, profile)
    found = smallest(config, planners, 4)
    assert found is not None and found.nodes == 1 and 1 < found.gpus_per_node <= 4
    planners(found).choose(config)
    with pytest.raises(DoesNotFitError, match="device memory"):
        planners(Fleet(1, found.gpus_per_node - 1)).choose(config)
    nothing = profile.model_copy(update={"device_bytes": 1.0})
    assert smallest(config, planners_of(config, nothing), 4) is None


def file_of(profile: Profile, folder: Path) -> str:
    """Write a file with the profile of a tight machine."""
    sources = dict.fromkeys(Profile.model_fields, "test") | profile.sources
    node = node_of(host_bytes=2e6, sources=dict.fromkeys(Node.model_fields, "test"))
    file = folder / "machine.yaml"
    file.write_text(profile.model_copy(update={"sources": sources, "node": node}).to_yaml())
    return str(file)


def test_a_refusal_passes_by_fleets_among_which_rounds_cannot_be_divided(tmp_path: Path) -> None:
    """Each of two ranks would have two of the four micro-batches, and four rounds."""
    cut = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}
    config, profile = tight(resident=0, rounds=4, **cut)
    planners = planners_of(config, profile)
    with pytest.raises(ConfigError, match="rounds=4"):
        planners(Fleet(1, 2)).has_room(config)
    assert smallest(config, planners, 4) is None
    with pytest.raises(DoesNotFitError) as error:
        plan_of(config, file_of(profile, tmp_path), ONE)
    assert error.value.hint and "smallest fleet" not in error.value.hint


def test_a_refusal_names_the_smallest_fleet(tmp_path: Path) -> None:
    config, profile = tight(resident=0)
    found = smallest(config, planners_of(config, profile), 4)
    assert found is not None
    file = file_of(profile, tmp_path)
    with pytest.raises(DoesNotFitError) as error:
        plan_of(config, file, Fleet(1, 4))
    assert error.value.exit_code == 3
    assert f"smallest fleet that trains it is {found}: {found.arguments}" in (error.value.hint or "")
    plan = plan_of(config, file, found)
    assert plan.of_fleet is not None and plan.of_fleet.smallest == found


# What is shown


def llama(**values: Any) -> TrainConfig:
    return config_of(tokens_per_step=4096, max_length=64, device="cuda", **values)


def test_a_plan_shows_the_fleet_and_one_rank_shows_none() -> None:
    plan = plan_of(llama(), "h100-sxm", Fleet(2, 8))
    found, values = plan.prediction, plan.to_dict()
    fleet = values["fleet"]
    assert (fleet["nodes"], fleet["gpus_per_node"]) == (2, 8)
    assert fleet["host_bytes_per_node"] == 8 * values["host_total"] == 8 * sum(values["host_bytes"].values())
    assert fleet["tokens_per_second_per_gpu"] * 16 == pytest.approx(values["tokens_per_second"])
    assert values["lane_seconds"]["network"] > 0 and values["tokens_per_step"] == 4096
    assert fleet["reduction"]["chosen"] == plan.config.reduction in ("exact", "fast")
    assert plan.of_fleet is not None and plan.of_fleet.sizes() == {
        "smallest_fleet": {"nodes": 1, "gpus_per_node": 1},
        "smallest_fleet_in_device_memory": {"nodes": 1, "gpus_per_node": 1},
    }
    json.dumps(values | plan.of_fleet.sizes())
    text = describe(plan)
    assert "device memory: 1 GPU: in-memory training (FSDP2) may be as fast there" in text
    assert "machine    2 nodes x 8 GPUs: H100 SXM" in text and "tokens/s per GPU" in text
    assert "smallest that trains this model: 1 GPU" in text and "network" in text
    assert any(choice.key == "reduction" for choice in plan.choices)
    assert found.micro_batches == plan.config.gradient_accumulation_steps
    alone = plan_of(llama(), "h100-sxm", ONE)
    assert "fleet" not in alone.to_dict() and "network" not in alone.to_dict()["lane_seconds"]
    assert not any(choice.key == "reduction" for choice in alone.choices)
    assert "per GPU" not in describe(alone, largest=False)


def test_hints_say_when_fewer_gpus_or_device_memory_would_do() -> None:
    plan = plan_of(llama(), "h100-sxm", Fleet(2, 8))
    assert plan.of_fleet is not None
    assert any("hides the update from" in note for note in plan.of_fleet.notes())
    few = plan_of(llama(per_device_train_batch_size=16, resident=0), "h100-sxm", Fleet(2, 8))
    assert few.of_fleet is not None and few.of_fleet.idle_share == pytest.approx(1 - 4 / 16)
    assert any("75% of the ranks' time is idle" in note for note in few.of_fleet.notes())


def test_break_even_is_where_the_lanes_are_equal() -> None:
    """Of the update: tokens of a step, on any number of nodes; found again by simulation."""
    values: dict[str, Any] = {"resident": 0, "update": "deferred", "activations": "recompute"}
    fleets = Fleet(1, 2), Fleet(2, 2)
    one, more = (break_even(costs(profile_of(), fleet, **values)) for fleet in fleets)
    assert more.update == pytest.approx(one.update, rel=0.05)
    more = break_even(costs(profile_of(), TWO_NODES, **values))
    found = costs(profile_of(), TWO_NODES, **values)
    forward = sum(found.seconds(Op("F", unit, policy=found.plan.policy(unit))) for unit in range(1, 5))
    updates = sum(found.seconds(Op("O", unit)) for unit in found.plan.trainable)
    assert forward / 64 * more.update / 8 == pytest.approx(updates, rel=1e-2)


def test_a_machine_without_figures_says_what_is_assumed() -> None:
    plan = plan_of(llama(), "rtx4090", Fleet(1, 2))
    assert any("PCIe between GPUs" in note for note in plan.notes)
    node = load_profile("rtx4090").as_node(2)
    assert node.peer == 24.8e9 and node.network == 6e9 and node.host_bytes == 128e9
    assert not any("assumed" in note for note in plan_of(llama(), "h100-sxm", Fleet(1, 2)).notes)


def test_a_rank_has_its_share_of_the_node() -> None:
    whole = load_profile("h100-sxm")
    rank = whole.of_rank(8)
    assert rank.optimizer == 400e9 / 8 and rank.cores == 13 and rank.matmul == whole.matmul
    cpu = load_profile("cpu-2core")
    half = cpu.of_rank(2)
    assert half.matmul.float32 == cpu.matmul.float32 / 2 and half.optimizer == cpu.optimizer / 2


def test_arguments_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert fleet_of("", "", "h100-sxm") == ONE
    assert fleet_of("2", "", "h100-sxm") == Fleet(2, 8)
    assert fleet_of("2", "", "rtx4090") == Fleet(2, 1)
    assert fleet_of("", "4", "auto") == Fleet(1, 4)
    assert Fleet.of_ranks(ALONE) == ONE
    for wrong in ("0", "-1", "two", "1.5"):
        with pytest.raises(ConfigError, match="nodes='"):
            fleet_of(wrong, "", "h100-sxm")


def test_the_command_plans_fleets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = load_profile("h100-sxm").model_dump() | {"host_bytes": 3e9, "device_bytes": 7e8}  # a short search
    small["node"] |= {"gpus": 4, "host_bytes": 1.2e10}
    file = tmp_path / "small.yaml"
    file.write_text(Profile.model_validate(small).to_yaml())
    words = ["plan", f"init_model={json.dumps(SMALL)}", "datasets=none.txt", "max_length=64", "device=cuda"]
    words += ["tokens_per_step=4096", f"hardware={file}"]
    assert cli.main([*words, "nodes=2", "gpus_per_node=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fleet"]["nodes"], found["fleet"]["gpus_per_node"]) == (2, 2)
    assert found["smallest_fleet"] == {"nodes": 1, "gpus_per_node": 1}
    assert cli.main([*words, "nodes=2"]) == 0
    assert "2 nodes x 4 GPUs" in capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 0
    assert not {"fleet", "smallest_fleet"} & set(json.loads(capsys.readouterr().out))
    assert cli.main([*words, "nodes=2", "host_memory_gb=2.001"]) == 3
    assert "for each of 4 ranks" in capsys.readouterr().err
    assert cli.main([*words, "nodes=none"]) == 2
