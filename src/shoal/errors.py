"""The exception tree: everything Shoal raises on purpose derives from `ShoalError`.

A message says what is wrong (with the value seen), why it cannot work, and what to do.
"""

from __future__ import annotations

from collections.abc import Mapping


class ShoalError(Exception):
    """Base of every error that Shoal raises on purpose."""


class ConfigError(ShoalError, ValueError):
    """A setting, or a combination of settings, that cannot work. Raised before anything starts."""


class DatasetError(ShoalError, ValueError):
    """A dataset that cannot be trained on: empty, without prompts, or with prompts that do not fit."""


class PlacementError(ConfigError):
    """Devices that do not exist, or a division of them that does not come out."""


class RewardError(ShoalError):
    """A reward function raised, timed out, or returned something that is not one number per completion."""


class RewardTimeoutError(RewardError):
    """A reward function did not answer in time."""


class RolloutFlowError(ShoalError):
    """A `RolloutFlow` did what a conversation does not allow: too many tokens, or none of the policy's."""


class EngineError(ShoalError):
    """An engine did not do what it was asked. The message names the engine and its log file."""


class EngineStartError(EngineError):
    """An engine process ended, or did not become ready in time, while it was being started."""


class NoEngineError(EngineError):
    """No engine is left, and none is on its way back. The message says of each why, and where its log is."""


class EngineRequestError(EngineError):
    """An engine answered a request with an error, with something malformed, or not at all."""


class EngineFaultError(EngineRequestError):
    """The engine itself is at fault: gone, silent, broken or talking nonsense. Another may well do what was asked.

    Args:
        message: What happened.
        partial: The `Rollout` that was received until then, if the engine was writing one and sends as it writes.
    """

    def __init__(self, message: str, *, partial: object = None) -> None:
        super().__init__(message)
        self.partial = partial


class WeightSyncError(ShoalError):
    """A publish of weights failed or timed out. The message names the engine and the step of the publish."""


class EnginesLostError(WeightSyncError):
    """A publish has lost every engine that it was for.

    Attributes:
        lost: Why, by name.
    """

    def __init__(self, message: str, lost: Mapping[str, str]) -> None:
        super().__init__(message)
        self.lost = dict(lost)


class WeightProofError(WeightSyncError):
    """An engine holds other weights than the trainer sent. The message names the parameter and the worker."""
