"""Models of which vLLM keeps matrices computed from loaded weights are refused, as no publish would reach those."""

from __future__ import annotations

import pytest
from torch import nn

from shoal.vllm_compat import check_nothing_derived


class MLAAttention(nn.Module):
    """Bears the name of vLLM's."""


class SparseMLA(MLAAttention):
    """One of its kinds."""


@pytest.mark.parametrize("kind", [MLAAttention, SparseMLA])
def test_latent_attention_is_refused_by_the_name_of_its_layer(kind: type[nn.Module]) -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), kind()])})
    with pytest.raises(RuntimeError, match=r"^layers\.1 is multi-head latent attention"):
        check_nothing_derived(model)


def test_other_layers_pass() -> None:
    check_nothing_derived(nn.ModuleList([nn.Linear(2, 2), nn.MultiheadAttention(4, 2)]))


def test_vllms_own_layer_bears_this_name() -> None:
    attention = pytest.importorskip("vllm.model_executor.layers.attention")
    assert attention.MLAAttention.__name__ == MLAAttention.__name__
