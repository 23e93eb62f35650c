"""Which part of a named tensor another one shows, through views, copies and views of copies."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shoal.wire.recorder import OriginRecorder

Code = Callable[[torch.Tensor], torch.Tensor]

PARTS: dict[str, Code] = {
    "view": lambda x: x[1, 2:5].t(),
    "copy": lambda x: x.transpose(0, 2).contiguous(),
    "cast": lambda x: x[:, ::2].to(torch.float64),
    "view of a copy": lambda x: x[:, 3:].contiguous()[2, 1:, ::2],
    "diagonal of a copy": lambda x: x.transpose(1, 2).contiguous()[1].diagonal(),
    "copy of a view of a copy": lambda x: x.chunk(2, dim=2)[1].contiguous().chunk(3)[1].squeeze(0).t().contiguous(),
    "rows of a transposed copy": lambda x: x.permute(2, 0, 1).clone(memory_format=torch.contiguous_format)[1:3],
}

COMPUTED: dict[str, Code] = {
    "sum": lambda x: x + 1,
    "concatenation": lambda x: torch.cat([x, x]),
    "changed copy": lambda x: x.clone().add_(1),
    "flattened copy": lambda x: x.transpose(0, 2).contiguous().view(-1)[2:9],
}


@pytest.mark.parametrize("code", PARTS.values(), ids=PARTS)
def test_the_region_of_the_source_holds_the_values(code: Code) -> None:
    value = torch.arange(3 * 6 * 4.0).view(3, 6, 4)
    meta = torch.empty(value.shape, device="meta")
    with OriginRecorder({"x": meta}) as recorder:
        origin = recorder.origin(code(meta))
    assert origin is not None and origin[0] == "x"
    assert torch.equal(origin[1].view(value), code(value).to(value.dtype))


@pytest.mark.parametrize("code", COMPUTED.values(), ids=COMPUTED)
def test_what_is_computed_has_no_origin(code: Code) -> None:
    meta = torch.empty((3, 6, 4), device="meta")
    with OriginRecorder({"x": meta}) as recorder:
        assert recorder.origin(code(meta)) is None
