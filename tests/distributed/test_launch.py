"""Launchers' variables: who a process is, where ranks gather, and errors for variables that do not fit."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from horizon_lm.distributed.launch import Launch, find, first_node
from horizon_lm.distributed.ranks import Place
from horizon_lm.errors import ConfigError

TORCHRUN = {
    **{"WORLD_SIZE": "8", "RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
    **{"MASTER_ADDR": "node0", "MASTER_PORT": "29500"},
}
SRUN = {
    **{"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "4"},
    **{"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "1234567", "SLURM_STEP_NODELIST": "gpu[07-08]"},
}
PLACE = Place(5, 8, 1, 4)


@pytest.mark.parametrize(
    "environment",
    (
        {},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "SLURM_NTASKS": "8"},
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"},  # a batch script, not srun
        SRUN | {"SLURM_NTASKS": "1"},
        SRUN | {"SLURM_STEP_NUM_TASKS": "1"},  # one task of a job of eight
    ),
)
def test_one_rank(environment: dict[str, str]) -> None:
    assert find(environment) == Launch()


def test_torchrun() -> None:
    assert find(TORCHRUN) == Launch(PLACE, "node0", 29500)
    elastic = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert find(TORCHRUN | elastic) == Launch(PLACE, "node0", 29500, is_served=True, attempt=2)
    assert find(SRUN | TORCHRUN) == Launch(PLACE, "node0", 29500)  # srun started torchrun


def test_srun() -> None:
    assert find(SRUN) == Launch(PLACE, "gpu07", 15_000 + 1234567 % 15_000)
    assert find(SRUN | {"SLURM_NTASKS_PER_NODE": "99"}).place == Place(5, 8, 1, 8)  # of the job, not the step
    assert find(SRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "9"}) == Launch(PLACE, "a", 9)
    assert find(SRUN | {"SLURM_STEP_NUM_TASKS": "6"}).place == Place(5, 6, 1, 4)
    assert find(SRUN | {"SLURM_STEP_ID": "1"}).port == find(SRUN).port + 1  # another run of the same job


@pytest.mark.parametrize(
    ("nodes", "first"),
    (
        ("gpu07", "gpu07"),
        ("gpu07,login1", "gpu07"),
        ("gpu[003-007,012],login1", "gpu003"),
        ("gpu[5,7-9]", "gpu5"),
        ("r[1-2]n[05-07]", "r1n05"),
        ("r1-n[5-7]-ib.cluster.example,x", "r1-n5-ib.cluster.example"),
    ),
)
def test_first_node(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@pytest.mark.parametrize("nodes", ("", ",a", "gpu[", "gpu[1-2", "gpu[]x]", "$(touch x)"))
def test_unreadable_lists_of_nodes(nodes: str) -> None:
    with pytest.raises(ConfigError, match="cannot read the list of nodes"):
        first_node(nodes)


@pytest.mark.parametrize(
    ("environment", "missing"),
    [(TORCHRUN, name) for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")]
    + [(SRUN, name) for name in ("SLURM_LOCALID", "SLURM_NTASKS")],
)
def test_missing_variables_are_named(environment: dict[str, str], missing: str) -> None:
    for value in (None, ""):
        given = {name: text for name, text in environment.items() if name != missing}
        given |= {} if value is None else {missing: value}
        with pytest.raises(ConfigError, match=f"but {missing} is not set") as error:
            find(given)
        assert error.value.hint


def test_srun_without_nodes() -> None:
    given = {name: text for name, text in SRUN.items() if name != "SLURM_STEP_NODELIST"}
    assert find(given | {"SLURM_NODELIST": "a[1-3]"}).address == "a1"
    with pytest.raises(ConfigError, match="neither MASTER_ADDR nor SLURM_STEP_NODELIST"):
        find(given)


@pytest.mark.parametrize(
    ("change", "message"),
    (
        ({"RANK": "8"}, "rank 8 of 8"),
        ({"LOCAL_RANK": "4"}, "4 of 4 on its node"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a number"),
        ({"WORLD_SIZE": "-8"}, "WORLD_SIZE='-8' is not a number"),
        ({"WORLD_SIZE": "0"}, "rank 5 of 0"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT='http' is not a number"),
    ),
)
def test_contradictions(change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        find(TORCHRUN | change)


def test_no_subset_of_variables_has_another_error() -> None:
    """Whatever is set, there is a launch or a ConfigError with a hint."""
    for environment in (TORCHRUN, SRUN):
        for number in range(len(environment) + 1):
            for names in combinations(environment, number):
                try:
                    assert find({name: environment[name] for name in names}).place.world in (1, 8)
                except ConfigError as error:
                    assert error.hint
