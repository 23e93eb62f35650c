"""Compare what the engines' workers hold with what the trainer sent."""

from __future__ import annotations

from collections.abc import Sequence

from shoal.errors import WeightProofError
from shoal.wire.plan import SlicePlan

_WHAT_TO_DO = "The engine must not serve; this is a fault of the transfer or of memory, please report it with the log."


def prove(plan: SlicePlan, digests: Sequence[int], expected: Sequence[int], version: int) -> int:
    """Compare what one worker holds with what was sent; return how many digests that were.

    Args:
        plan: The worker's.
        digests: Of each of its slices, as the worker holds it.
        expected: Of each of its slices, as the trainer has it.
        version: Of the weights.

    Raises:
        WeightProofError: They differ; it names the worker and the parameter.
    """
    if len(digests) != len(plan.slices):
        raise WeightProofError(f"{plan.worker} sent {len(digests)} digests for {len(plan.slices)} slices")
    for piece, held, sent in zip(plan.slices, digests, expected, strict=True):
        if held != sent:
            raise WeightProofError(
                f"{plan.worker} holds other values in {piece.target} than the trainer has in {piece.source} "
                f"(version {version}: digest {held:016x}, expected {sent:016x}). {_WHAT_TO_DO}"
            )
    return len(digests)


def mismatch(engine: str, sources: Sequence[str], version: int) -> WeightProofError:
    """Return the error for parameters of which an engine sent back other bits than it was sent."""
    names = ", ".join(dict.fromkeys(sources))
    return WeightProofError(
        f"{engine} holds other bits than the trainer sent of {names} (version {version}). {_WHAT_TO_DO}"
    )
