"""Device memory that another process of the same host can open, through the CUDA driver itself.

Torch's own way (`_share_cuda_`) ties the memory to its caching allocator and keeps it for as long as a receiver has not
said that it let go: each engine that is killed would cost the trainer its staging buffer for good.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, Protocol, TypeAlias

import torch

from shoal.errors import ConfigError

HANDLE_BYTES = 64
"""Of what names an allocation to other processes."""

_ENABLE_PEER_ACCESS = 1
_BUFFER_ID = 7  # CU_POINTER_ATTRIBUTE_BUFFER_ID: no two allocations of a process have the same, in all its life
_MOST_EXPORTS = 4096
_GRANULE = 2 << 20  # the driver shares out less than this among allocations, and exports whole granules


Copy: TypeAlias = tuple[int, int, int]
"""Bytes to be copied: target and source, addresses as the device knows them, and how many. There are thousands."""


class Moment(Protocol):
    """A point in the order of a device's work, such as a `torch.cuda.Event`."""

    def query(self) -> bool:
        """Whether all before it is done."""
        ...


class SharedMemory(Protocol):
    """Memory in which two processes meet: a GPU's, or (in tests) the host's."""

    @property
    def name(self) -> str:
        """Of the device, the same in all processes."""
        ...

    def check_reach(self, name: str) -> None:
        """Raise if memory of another device, of that name, cannot be opened here."""
        ...

    def allocate(self, num_bytes: int) -> tuple[int, bytes]:
        """Return the address of new memory, and a handle by which another process can open it."""
        ...

    def release(self, address: int) -> None:
        """Give back what `allocate` returned."""
        ...

    def export(self, address: int) -> tuple[bytes, int] | None:
        """Find the allocation of this process that an address lies in.

        Returns:
            A handle by which another process can open the allocation, and how far into it the address is; None if no
            other process can reach it.
        """
        ...

    def open_handle(self, handle: bytes) -> int:
        """Return where an allocation that another process has a handle of begins here."""
        ...

    def shut(self, address: int) -> None:
        """Let go of what `open_handle` returned."""
        ...

    def mark(self) -> Moment:
        """Return the point that the caller's own work has come to."""
        ...

    def copy(self, copies: Sequence[Copy], after: Sequence[Moment]) -> Moment:
        """Start copying, after some moments, and return the moment at which the copies are done."""
        ...


class _Done:
    """A moment that is past."""

    def query(self) -> bool:
        """Whether all before it is done: it is."""
        return True


_DONE = _Done()


@dataclass(frozen=True, slots=True)
class _Export:
    """An allocation that other processes can open."""

    handle: bytes
    base: int
    num_bytes: int


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class CudaMemory:
    """Memory of one GPU, with a stream of its own for the copies.

    Args:
        device: The GPU on which this process has its tensors, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._exports: dict[int, _Export] = {}
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._copy_async = self._driver.cuMemcpyDtoDAsync_v2
        self._copy_async.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p)
        ordinal, self._context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(ordinal), ctypes.c_int(self._device.index))
        # Torch uses the primary context as well, and lives as long as the process: it is never given back.
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), ordinal)

    @property
    def name(self) -> str:
        """UUID of the GPU."""
        return _uuid(self._device.index)

    def check_reach(self, uuid: str) -> None:
        """Check that this GPU is the one of that UUID, or reaches it.

        Raises:
            ConfigError: That GPU is not visible here, or out of reach.
        """
        visible = {_uuid(index): index for index in range(torch.cuda.device_count())}
        own = f"GPU {_uuid(self._device.index)} (cuda:{self._device.index})"
        if uuid not in visible:
            raise ConfigError(
                f"weights cannot be received on {own} from GPU {uuid}: this process does not see that GPU. CUDA lets a "
                "process open another's memory only on GPUs in its CUDA_VISIBLE_DEVICES; use NCCL between these two."
            )
        sender = visible[uuid]
        if sender != self._device.index and not torch.cuda.can_device_access_peer(self._device.index, sender):
            raise ConfigError(
                f"weights cannot be received on {own} from GPU {uuid} (cuda:{sender}): neither NVLink nor PCIe lets "
                "one reach the other's memory. Use NCCL between these two."
            )

    def allocate(self, num_bytes: int) -> tuple[int, bytes]:
        """Allocate memory of this GPU."""
        address, handle = ctypes.c_uint64(), _Handle()
        with self._current():
            self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(-(-num_bytes // _GRANULE) * _GRANULE))
            try:
                self._call("cuIpcGetMemHandle", ctypes.byref(handle), address)
            except RuntimeError:
                self._call("cuMemFree_v2", address)
                raise
        return int(address.value), bytes(handle)

    def release(self, address: int) -> None:
        """Free memory that this process allocated."""
        with self._current():
            self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def export(self, address: int) -> tuple[bytes, int] | None:
        """Find the allocation that an address lies in; None if it is of mapped or pooled memory.

        Torch has such memory with `expandable_segments:True` or `backend:cudaMallocAsync`, and vLLM where it can sleep.
        """
        number = ctypes.c_uint64()
        with self._current():
            known = self._driver.cuPointerGetAttribute(ctypes.byref(number), _BUFFER_ID, ctypes.c_uint64(address)) == 0
            export = self._exports.get(number.value) if known else None
            if export is not None and 0 <= address - export.base < export.num_bytes:
                return export.handle, address - export.base
            base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
            find, describe = self._driver.cuMemGetAddressRange_v2, self._driver.cuIpcGetMemHandle
            if find(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(address)) != 0:
                return None
            if describe(ctypes.byref(handle), base) != 0:
                return None
        export = _Export(bytes(handle), int(base.value), int(size.value))
        if known:
            if len(self._exports) >= _MOST_EXPORTS:
                self._exports.clear()  # most are of allocations that are gone
            self._exports[number.value] = export
        return export.handle, address - export.base

    def open_handle(self, handle: bytes) -> int:
        """Map an allocation that another process has exported."""
        address = ctypes.c_uint64()
        with self._current():
            self._call(
                "cuIpcOpenMemHandle_v2",
                ctypes.byref(address),
                _Handle.from_buffer_copy(handle),
                ctypes.c_uint(_ENABLE_PEER_ACCESS),
            )
        return int(address.value)

    def shut(self, address: int) -> None:
        """Unmap memory of another process."""
        with self._current():
            self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def mark(self) -> Moment:
        """Record an event on the caller's current stream, if that has anything to do.

        An event is the GPU's to pass, which costs a turn where two processes share it.
        """
        stream = torch.cuda.current_stream(self._device)
        if stream.query():
            return _DONE
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(stream)
        return event

    def copy(self, copies: Sequence[Copy], after: Sequence[Moment]) -> Moment:
        """Queue copies on this object's stream."""
        pending = [moment for moment in after if not moment.query()]
        if not copies and not pending:
            return _DONE
        for moment in pending:
            assert isinstance(moment, torch.cuda.Event)
            self._stream.wait_event(moment)
        stream = self._stream.cuda_stream
        with self._current():
            for target, source, num_bytes in copies:
                code = self._copy_async(target, source, num_bytes, stream)
                if code != 0:
                    self._fail("cuMemcpyDtoDAsync_v2", code)
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(self._stream)
        return done

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make the GPU's context the calling thread's, whatever that had."""
        self._call("cuCtxPushCurrent_v2", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._driver, name)(*arguments)
        if code != 0:
            self._fail(name, code)

    def _fail(self, name: str, code: int) -> NoReturn:
        text = ctypes.c_char_p()
        self._driver.cuGetErrorString(code, ctypes.byref(text))
        raise RuntimeError(f"{name} failed on {self._device}: {(text.value or b'unknown error').decode()} ({code})")


def can_open(receivers: Iterable[int], senders: Sequence[int]) -> bool:
    """Whether processes on some GPUs can open what this process's torch has on others; by torch's numbers.

    Not so if a GPU is out of reach, or if torch takes memory that no other process can open: all would then go through
    staging memory.
    """
    pairs = [(own, other) for own in receivers for other in senders if own != other]
    return (
        torch.cuda.is_available()
        and not _has_expandable_segments()
        and all(torch.cuda.can_device_access_peer(own, other) for own, other in pairs)
    )


def _has_expandable_segments() -> bool:
    settings = (os.environ.get(name, "") for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"))
    return any("expandable_segments:true" in text.lower().replace(" ", "") for text in settings)


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
