"""What an engine answers to `POST /shoal/generate`: frames, each with some tokens of one completion or its end.

A frame is a head of 16 bytes, all little-endian, and what it announces:

    offset  size  what
    0       4     b"SHF1"
    4       4     uint32: which sample, by its place in the order
    8       4     uint32: the kind, see `Kind`
    12      4     uint32: number of tokens; of bytes for `REFUSED` and `FAILED`
    16      4n    int32: token ids
    16+4n   4n    float32: logprobs of these tokens

Frames of a sample follow one another; those of several samples alternate as they come. Nothing is pickled, and a reader
knows how much a frame may hold before it reads it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

_MAGIC = b"SHF1"
_HEAD = struct.Struct("<4sIII")
_TOKEN_BYTES = 8
_MOST_MESSAGE_BYTES = 4096


class Kind(IntEnum):
    """What a frame is to its sample; all but `MORE` end it."""

    MORE = 0
    STOP = 1
    LENGTH = 2
    ABORT = 3
    REFUSED = 4
    FAILED = 5


_MESSAGES = (Kind.REFUSED, Kind.FAILED)


class FrameError(ValueError):
    """Bytes that are not frames, or not those that were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame.

    Attributes:
        sample: Which sample.
        kind: What it is to it.
        token_ids: `[tokens]` int32.
        logprobs: `[tokens]` float32.
        message: Why it was refused or failed, empty otherwise.
    """

    sample: int
    kind: Kind
    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    message: str = ""


def tokens_frame(sample: int, kind: Kind, token_ids: Sequence[int], logprobs: Sequence[float]) -> bytes:
    """Return the bytes of a frame with tokens."""
    head = _HEAD.pack(_MAGIC, sample, kind, len(token_ids))
    return head + np.array(token_ids, dtype="<i4").tobytes() + np.array(logprobs, dtype="<f4").tobytes()


def message_frame(sample: int, kind: Kind, message: str) -> bytes:
    """Return the bytes of a frame that says why a sample was refused or failed."""
    text = message.encode(errors="replace")[:_MOST_MESSAGE_BYTES]
    return _HEAD.pack(_MAGIC, sample, kind, len(text)) + text


class FrameReader:
    """Turns bytes, however they are cut, into frames.

    Args:
        most_tokens: For each sample that was asked for, how many tokens it may have.
    """

    def __init__(self, most_tokens: Sequence[int]) -> None:
        self._left = list(most_tokens)
        self._has_ended = [False] * len(self._left)
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that these bytes complete.

        Raises:
            FrameError: They are not what was asked for.
        """
        self._buffer += data
        frames: list[Frame] = []
        start = 0
        while len(self._buffer) - start >= _HEAD.size:
            sample, kind, count = self._head(start)
            begin = start + _HEAD.size
            end = begin + count * (1 if kind in _MESSAGES else _TOKEN_BYTES)
            if len(self._buffer) < end:
                break
            frames.append(self._frame(sample, kind, bytes(self._buffer[begin:end])))
            start = end
        del self._buffer[:start]
        return frames

    def _head(self, start: int) -> tuple[int, Kind, int]:
        """Read and check a head; `_left` and `_has_ended` are as the frames before it left them."""
        magic, sample, number, count = _HEAD.unpack_from(self._buffer, start)
        if magic != _MAGIC or number not in Kind.__members__.values():
            raise FrameError(f"a frame begins with {bytes(self._buffer[start : start + _HEAD.size])!r}")
        kind = Kind(number)
        if sample >= len(self._left) or self._has_ended[sample]:
            raise FrameError(f"a frame for sample {sample}, which is not under way")
        most = _MOST_MESSAGE_BYTES if kind in _MESSAGES else self._left[sample]
        # The last token that a sample may have ends it.
        if count > most or (kind is Kind.MORE and count == most):
            raise FrameError(f"a frame of {count} {'bytes' if kind in _MESSAGES else 'tokens'} where {most} are left")
        return sample, kind, count

    def _frame(self, sample: int, kind: Kind, body: bytes) -> Frame:
        self._has_ended[sample] = kind is not Kind.MORE
        if kind in _MESSAGES:
            none = np.empty(0, np.int32)
            text = body.decode(errors="replace")
            return Frame(sample=sample, kind=kind, token_ids=none, logprobs=none.view(np.float32), message=text)
        count = len(body) // _TOKEN_BYTES
        self._left[sample] -= count
        token_ids = np.frombuffer(body, "<i4", count).astype(np.int32, copy=False)
        if count and token_ids.min() < 0:
            raise FrameError(f"sample {sample} has a negative token id")
        logprobs = np.frombuffer(body, "<f4", count, offset=4 * count).astype(np.float32, copy=False)
        return Frame(sample=sample, kind=kind, token_ids=token_ids, logprobs=logprobs)
