"""A fault on the wire: one bit of what a publish sends is flipped on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from shoal.protocols import Parcel, Pending, WeightTransport
from shoal.weights.publisher import WeightPublisher


class FlippingTransport:
    """Hands on to a transport, with one bit flipped of every tensor that `flips` picks.

    Args:
        inner: The transport.
    """

    def __init__(self, inner: WeightTransport) -> None:
        self._inner = inner
        self._kept: list[torch.Tensor] = []
        self.flips: Callable[[torch.Tensor], bool] = lambda tensor: False

    @property
    def num_flips(self) -> int:
        """Bits flipped so far."""
        return len(self._kept)

    def send(self, parcels: Sequence[Parcel]) -> Pending:
        """Start sending."""
        return self._inner.send([self._changed(parcel) for parcel in parcels])

    def receive(self, parcels: Sequence[Parcel]) -> Pending:
        """Start receiving."""
        return self._inner.receive(parcels)

    def finish(self, timeout_s: float) -> None:
        """Block until all is done."""
        self._inner.finish(timeout_s)

    def close(self) -> None:
        """Leave."""
        self._inner.close()

    def flip_first(self) -> None:
        """Flip one bit of the next parcel, and of no other."""
        before = self.num_flips
        self.flips = lambda tensor: self.num_flips == before and tensor.numel() > 0

    def flip_views_of(self, parameter: torch.Tensor) -> None:
        """Flip one bit of every parcel that lies in this parameter."""
        address = parameter.untyped_storage().data_ptr()
        self.flips = lambda tensor: tensor.untyped_storage().data_ptr() == address

    def _changed(self, parcel: Parcel) -> Parcel:
        if not self.flips(parcel.tensor):
            return parcel
        value = parcel.tensor.clone()
        value.view(-1).view(torch.uint8)[0] ^= 1
        self._kept.append(value)  # it must stay as it is until it was sent
        return Parcel(value, parcel.peer)


def make_flipping(publisher: WeightPublisher, engine: int) -> FlippingTransport:
    """Put a transport that can flip bits on a connected publisher's line to one engine, and return it."""
    line = publisher.group.lines[engine]
    if not isinstance(line._transport, FlippingTransport):
        line._transport = cast(Any, FlippingTransport(line.transport))
    return cast(FlippingTransport, line._transport)
