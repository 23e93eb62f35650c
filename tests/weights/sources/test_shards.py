"""What is refused of ZeRO-3; what is held is tested on real ranks in `test_sharded.py`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from shoal.errors import ConfigError
from shoal.weights.sources.shards import value_of


def partitioned(**attributes: object) -> torch.nn.Parameter:
    partition = torch.zeros(4)
    for name, value in attributes.items():
        setattr(partition, name, value)
    parameter = torch.nn.Parameter(torch.empty(0))
    for name, value in {"ds_id": 1, "ds_shape": (2, 4), "ds_numel": 8, "ds_tensor": partition}.items():
        setattr(parameter, name, value)
    return parameter


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"status": SimpleNamespace(name="NOT_AVAILABLE")}, "NVMe"),
        ({"ds_quant_scale": torch.ones(1)}, "zero_quantized_weights"),
    ],
)
def test_a_partition_that_is_not_in_memory_as_it_is_is_refused(attributes: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        value_of("model.norm.weight", partitioned(**attributes))
