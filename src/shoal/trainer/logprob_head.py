"""A stand-in for a model's LM head that can answer with logprobs and entropies in place of logits.

It is called by the model itself, as the head always is, so whatever wraps the model (DDP, FSDP2, ZeRO-3, autocast,
activation checkpointing of the blocks) finds the weight gathered and runs its hooks. Its parameters are the very ones
of the `nn.Linear` that it replaces, under their names. Unasked, it is that `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shoal.algorithm.exact_parts import NUM_PARTS, from_parts, to_parts
from shoal.algorithm.lm_head import PLAIN, HeadForm, head_logprobs
from shoal.algorithm.logprobs import TokenLogprobs
from shoal.algorithm.truncation import Truncation

# A soft cap is undone by its inverse, which is exact far below the cap only. A power of two costs no digit.
_SHRINK = 2.0**-10
_PROBED = (0.0625, 0.25, 1.0, -2.0, 5.0, -16.0, 64.0, 2.0**20)  # exact in every type


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadRequest:
    """What the head is to answer.

    Attributes:
        target_ids: `[N]` int64; None to have it return fixed values, for `form_of`.
        positions: `[N]` int64, where among the rows that it is given; None for all of them.
        temperature: Above 0.
        truncation: What the engines cut off.
    """

    target_ids: torch.Tensor | None
    positions: torch.Tensor | None = None
    temperature: float = 1.0
    truncation: Truncation | None = None


class HeadSwitch:
    """Asks the head, and all copies of it, of one model; a request counts for the thread that makes it."""

    def __init__(self) -> None:
        self._request: ContextVar[HeadRequest | None] = ContextVar("head request", default=None)
        self.form = PLAIN
        """What the model does to the head's output; see `form_of`."""

    @contextmanager
    def asking(self, request: HeadRequest) -> Iterator[None]:
        """Have the head answer `request` in the calls of the model made inside."""
        token = self._request.set(request)
        try:
            yield
        finally:
            self._request.reset(token)

    @property
    def request(self) -> HeadRequest | None:
        """What is asked now."""
        return self._request.get()

    def __deepcopy__(self, memo: Any) -> HeadSwitch:
        """Stay the same: a copy of the model is asked like the model."""
        return self

    def __reduce__(self) -> Any:
        """Pickle as a fresh one."""
        return (HeadSwitch, ())


class LogprobHead(nn.Linear):
    """The stand-in; made by `replace_head`."""

    switch: HeadSwitch

    @classmethod
    def standing_in_for(cls, linear: nn.Linear, switch: HeadSwitch) -> LogprobHead:
        """Make one that shares the parameters of `linear`."""
        head = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        head.weight, head.bias = linear.weight, linear.bias
        head.switch = switch
        return head.train(linear.training)

    # Compiled, the loop over tiles would be unrolled, and every request compiled anew.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits, or the answer to a request: `[1, N, 6]`, what `read_answer` takes."""
        request = self.switch.request
        if request is None:
            return super().forward(hidden)
        if request.target_ids is None:
            values = torch.tensor(_PROBED, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
            return values.expand(*hidden.shape[:-1], len(_PROBED))
        device_type = hidden.device.type
        rows = hidden[0] if request.positions is None else hidden[0, request.positions]
        found = head_logprobs(
            rows,
            self.weight,
            self.bias,
            request.target_ids,
            request.temperature,
            form=self.switch.form,
            truncation=request.truncation,
            dtype=torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None,
        )
        # Not a view: FSDP2 puts a hook on what it is given.
        parts = torch.cat([to_parts(found.logprobs[None]), to_parts(found.entropy[None])], dim=-1)
        return _before_model(parts, self.switch.form)


def replace_head(policy: nn.Module, switch: HeadSwitch | None = None) -> HeadSwitch | None:
    """Put the stand-in in place of the (unwrapped) model's LM head; None where that cannot work.

    It cannot where the head is not a plain `nn.Linear`: quantised, adapted by LoRA, or with hooks, which expect logits.
    A head that PEFT trains whole (`modules_to_save`) is replaced in each of PEFT's copies.

    Args:
        policy: The model.
        switch: That of another copy of the model, to have both asked alike; None for one of its own.
    """
    base: Any = policy.get_base_model() if hasattr(policy, "get_base_model") else policy  # type: ignore[operator]
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        return None
    copies = [head]
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        copies = [head.original_module, *head.modules_to_save.values()]
    if not all(map(_is_plain, copies)):
        return None
    switch = switch or HeadSwitch()
    owners = [(module, name, child) for module in base.modules() for name, child in module.named_children()]
    for module, name, child in owners:
        if any(child is copy for copy in copies):
            setattr(module, name, LogprobHead.standing_in_for(child, switch))
    return switch


def _is_plain(head: nn.Module) -> bool:
    """Whether a head is a linear layer, and nothing changes what it does."""
    has_hooks = bool(head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
    return type(head) is nn.Linear and "forward" not in vars(head) and not has_hooks


def form_of(output: torch.Tensor) -> HeadForm | None:
    """Tell from the model's output for the fixed values what it does to the head's output; None if nothing known.

    Args:
        output: `[..., len(fixed values)]`.
    """
    values = torch.tensor(_PROBED, dtype=torch.float64)
    if output.shape[-1] != len(values):
        return None
    found = output.reshape(-1, len(values))[-1].double().cpu()
    if torch.equal(found, values):
        return PLAIN
    if torch.finfo(output.dtype).bits < 32:
        return None  # the constant could not be read off with enough digits
    scale, cap = float(found[2]), float(found[-1])
    for form in (HeadForm(scale=scale), HeadForm(softcap=cap) if cap > 0 else None):
        if form is not None and torch.allclose(_after_model(values, form), found, rtol=1e-5, atol=1e-6):
            return form
    return None


def read_answer(output: torch.Tensor, form: HeadForm) -> TokenLogprobs:
    """Return what the head has answered, from the model's output `[N, 6]`."""
    parts = output if form.softcap is None else output / _SHRINK
    return TokenLogprobs(logprobs=from_parts(parts[:, :NUM_PARTS]), entropy=from_parts(parts[:, NUM_PARTS:].detach()))


def _after_model(values: torch.Tensor, form: HeadForm) -> torch.Tensor:
    """Do to values what the model does."""
    return values * form.scale if form.softcap is None else form.softcap * torch.tanh(values / form.softcap)


def _before_model(values: torch.Tensor, form: HeadForm) -> torch.Tensor:
    """Change values so that the model, which takes them for logits, gives them back (times `_SHRINK` if it caps)."""
    if form.softcap is not None:
        return form.softcap * torch.atanh(values * (_SHRINK / form.softcap))
    return values if form.scale == 1 else values / form.scale
