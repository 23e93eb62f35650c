"""Which allocation of a GPU a tensor is said to lie in; a stand-in plays the driver."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest

from shoal.wire.device_memory import CudaMemory


class Driver:
    """Allocations by where they begin: number, bytes, and whether others can open them."""

    def __init__(self) -> None:
        self.allocations: dict[int, tuple[int, int, bool]] = {}
        self.num_described = 0
        self.numbers_are_known = True

    def cuPointerGetAttribute(self, answer: Any, attribute: int, address: Any) -> int:
        assert attribute == 7
        answer._obj.value = self.allocations[self._base(address.value)][0]
        return 0 if self.numbers_are_known else 1

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, address: Any) -> int:
        base._obj.value = self._base(address.value)
        size._obj.value = self.allocations[base._obj.value][1]
        return 0

    def cuIpcGetMemHandle(self, handle: Any, base: Any) -> int:
        number, _, can_be_opened = self.allocations[base.value]
        handle._obj.reserved = b"allocation %d" % number
        self.num_described += 1
        return 0 if can_be_opened else 1

    def _base(self, address: int) -> int:
        return next(base for base, (_, size, _) in self.allocations.items() if base <= address < base + size)


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def memory(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> CudaMemory:
    memory = CudaMemory.__new__(CudaMemory)
    memory._driver, memory._exports = driver, {}  # type: ignore[assignment]
    monkeypatch.setattr(memory, "_current", nullcontext)
    return memory


def name(exported: tuple[bytes, int] | None) -> tuple[bytes, int]:
    assert exported is not None and len(exported[0]) == 64
    return exported[0].rstrip(b"\0"), exported[1]


def test_addresses_of_one_allocation_share_a_handle_that_is_asked_for_once(memory: CudaMemory, driver: Driver) -> None:
    driver.allocations = {1000: (1, 100, True), 5000: (2, 10, True)}
    assert [name(memory.export(address)) for address in (1000, 1042, 1099, 5009)] == [
        (b"allocation 1", 0),
        (b"allocation 1", 42),
        (b"allocation 1", 99),
        (b"allocation 2", 9),
    ]
    assert driver.num_described == 2


def test_what_is_allocated_where_something_else_was_has_another_handle(memory: CudaMemory, driver: Driver) -> None:
    driver.allocations = {1000: (1, 100, True)}
    assert name(memory.export(1010)) == (b"allocation 1", 10)
    driver.allocations = {1000: (2, 200, True)}
    assert name(memory.export(1010)) == (b"allocation 2", 10)


def test_memory_that_nobody_else_can_open_is_not_exported(memory: CudaMemory, driver: Driver) -> None:
    driver.allocations = {1000: (1, 100, False)}
    assert memory.export(1000) is None and memory.export(1000) is None


def test_without_numbers_every_address_is_looked_up(memory: CudaMemory, driver: Driver) -> None:
    driver.allocations, driver.numbers_are_known = {1000: (0, 100, True), 5000: (0, 10, True)}, False
    assert [name(memory.export(address))[1] for address in (1007, 1007, 5002)] == [7, 7, 2]
    assert driver.num_described == 3


def test_numbers_that_are_all_alike_do_not_mix_allocations_up(memory: CudaMemory, driver: Driver) -> None:
    driver.allocations = {1000: (0, 100, True), 5000: (0, 10, True)}
    assert [name(memory.export(address))[1] for address in (1007, 5002, 1008)] == [7, 2, 8]
