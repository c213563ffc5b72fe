"""The NUMA node next to a device, in trees made for the purpose, and the system calls that prefer it."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fake_pinning import CUDA, Runtime
from fake_pinning import pinning as pinning
from horizon_lm.machine import numa
from horizon_lm.memory import arena, registration

UUID = "6d5b1c2e-0000-4000-8000-0123456789ab"
BY_NUMBER = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
BY_UUID = SimpleNamespace(uuid=UUID)


@pytest.fixture
def machine(tmp_path: Path) -> dict[str, Path]:
    """A machine with two nodes; the device is next to the second."""
    sys, proc = tmp_path / "sys", tmp_path / "proc"
    for node in range(2):
        (sys / f"devices/system/node/node{node}").mkdir(parents=True)
    card = sys / "bus/pci/devices/0000:1b:00.0"
    card.mkdir(parents=True)
    (card / "numa_node").write_text("1\n")
    known = proc / "driver/nvidia/gpus/0000:1B:00.0"
    known.mkdir(parents=True)
    (known / "information").write_text(f"Model: \t\t A card\nGPU UUID: \t GPU-{UUID}\n")
    return {"sys": sys, "proc": proc}


@pytest.fixture
def is_card(monkeypatch: pytest.MonkeyPatch) -> Any:
    def be(properties: Any) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)

    return be


@pytest.mark.parametrize("properties", [BY_NUMBER, BY_UUID], ids=["by number", "by uuid"])
def test_the_node_next_to_a_device(properties: Any, machine: dict[str, Path], is_card: Any) -> None:
    is_card(properties)
    assert numa.node_of(CUDA, **machine) == 1
    assert numa.node_of(torch.device("cpu"), **machine) is None


@pytest.mark.parametrize("text", ["-1\n", "", "none\n"])
def test_a_node_that_is_not_told(text: str, machine: dict[str, Path], is_card: Any) -> None:
    is_card(BY_NUMBER)
    (machine["sys"] / "bus/pci/devices/0000:1b:00.0/numa_node").write_text(text)
    assert numa.node_of(CUDA, **machine) is None


def test_a_device_that_is_not_found(machine: dict[str, Path], is_card: Any, tmp_path: Path) -> None:
    for properties in (SimpleNamespace(), SimpleNamespace(uuid="other"), SimpleNamespace(pci_bus_id=1)):
        is_card(properties)
        assert numa.node_of(CUDA, **machine) is None
    is_card(BY_NUMBER)
    assert numa.node_of(CUDA, sys=tmp_path / "none", proc=tmp_path / "none") is None


def test_one_node_needs_no_choice(machine: dict[str, Path], is_card: Any) -> None:
    (machine["sys"] / "devices/system/node/node1").rmdir()
    is_card(None)  # is not asked
    assert numa.node_of(CUDA, **machine) is None


class Kernel:
    """Records mbind; answers get_mempolicy."""

    def __init__(self, policy: int = 0, answer: int = 0) -> None:
        self.policy, self.answer = policy, answer
        self.calls: list[tuple[Any, ...]] = []

    def __call__(self, number: int, *arguments: int) -> int:
        if number in (239, 236):
            ctypes.c_int.from_address(arguments[0]).value = self.policy
            return 0
        assert number in (237, 235)
        address, num_bytes, mode, mask, told, flags = arguments
        words = (ctypes.c_uint64 * (told // 64)).from_address(mask)
        nodes = [64 * w + b for w, word in enumerate(words) for b in range(64) if word >> b & 1]
        self.calls.append((address, num_bytes, mode, nodes, told, flags))
        return self.answer


@pytest.fixture
def linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa.platform, "system", lambda: "Linux")
    monkeypatch.setattr(numa.platform, "machine", lambda: "x86_64")


@pytest.mark.usefixtures("linux")
@pytest.mark.parametrize(("node", "told"), [(0, 65), (1, 65), (63, 65), (64, 129), (130, 193)])
def test_a_node_is_preferred(node: int, told: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    monkeypatch.setattr(numa, "syscall", kernel)
    assert numa.prefer(node, 1 << 40, 8192)
    assert kernel.calls == [(1 << 40, 8192, 1, [node], told, 0)]


@pytest.mark.usefixtures("linux")
def test_a_refusal_is_one_debug_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(numa, "syscall", Kernel(answer=-1))
    with caplog.at_level(logging.DEBUG, "horizon_lm"):
        assert not numa.prefer(1, 1 << 40, 8192)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


@pytest.mark.usefixtures("linux")
def test_the_users_own_policy_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """numactl --interleave=all, say: no mbind."""
    kernel = Kernel(policy=3)
    monkeypatch.setattr(numa, "syscall", kernel)
    assert not numa.prefer(1, 1 << 40, 8192) and not kernel.calls


def test_other_systems_are_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numa, "syscall", lambda *_: pytest.fail("called"))
    for system, machine in (("Linux", "riscv64"), ("Darwin", "x86_64")):
        monkeypatch.setattr(numa.platform, "system", lambda system=system: system)
        monkeypatch.setattr(numa.platform, "machine", lambda machine=machine: machine)
        assert not numa.prefer(0, 1 << 40, 8192)


def test_pages_are_preferred_before_they_are_touched(
    pinning: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(numa, "node_of", lambda device: 1)
    monkeypatch.setattr(numa, "prefer", lambda node, *_: order.append(f"prefer {node}") or True)
    touch = registration._touch
    monkeypatch.setattr(registration, "_touch", lambda *a: (order.append("touch"), touch(*a)))
    arena.allocate(8192)
    assert not order  # the control: memory that is not pinned stays where its first writer is
    arena.allocate(8192, pin_for=CUDA)
    assert order == ["prefer 1", "touch"]
