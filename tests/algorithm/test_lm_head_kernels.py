"""The LM head's CUDA kernels without a GPU: Triton's interpreter runs them on the CPU's memory.

Run with Triton installed: `TRITON_INTERPRET=1 pytest tests/algorithm/test_lm_head_kernels.py`.
The compiled kernels are tested on a GPU, in tests/gpu/test_logprobs_on_gpu.py.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

from shoal.algorithm import lm_head
from shoal.algorithm.lm_head import PLAIN, HeadForm, head_logprobs
from shoal.algorithm.truncation import Truncation

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton, which comes with torch for CUDA, is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="set TRITON_INTERPRET=1 to run the kernels"),
]

NUM_ROWS, WIDTH, VOCABULARY = 37, 16, 5000
FORMS = {"plain": PLAIN, "scaled": HeadForm(scale=0.3), "capped": HeadForm(softcap=3.0)}
TRUNCATIONS = {"whole": None, "truncated": Truncation(top_k=6, top_p=0.9, min_p=0.01)}


@pytest.mark.parametrize("tile", [1 << 8, 1 << 24], ids=["small tiles", "one tile"])
@pytest.mark.parametrize("truncation", TRUNCATIONS)
@pytest.mark.parametrize("form", FORMS)
def test_the_kernels_give_what_the_torch_operations_give(
    form: str, truncation: str, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shoal.algorithm import lm_head_cuda

    plain = _run(FORMS[form], TRUNCATIONS[truncation], tile)
    monkeypatch.setattr(lm_head, "find_kernels", lambda device, dtype: lm_head_cuda)
    found = _run(FORMS[form], TRUNCATIONS[truncation], tile)
    for name, expected in plain.items():
        assert expected.abs().max() > 1e-3, name
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


def _run(form: HeadForm, truncation: Truncation | None, tile: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(NUM_ROWS, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_()
    bias = torch.randn(VOCABULARY, generator=generator).requires_grad_()
    target = torch.randint(VOCABULARY, (NUM_ROWS,), generator=generator)
    found = head_logprobs(
        hidden, weight, bias, target, 0.7, form=form, truncation=truncation, max_tile_elements=tile * 64
    )
    (found.logprobs * torch.randn(NUM_ROWS, generator=generator)).sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None and weight.grad is not None and bias.grad is not None
    return {
        "logprobs": found.logprobs.detach(),
        "entropy": found.entropy,
        "hidden": hidden.grad,
        "weight": weight.grad,
        "bias": bias.grad,
    }
