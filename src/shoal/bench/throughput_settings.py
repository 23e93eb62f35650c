"""What the benchmark of rollouts with real engines writes, and by which engines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

from shoal.bench.settings import BenchSettings
from shoal.bench.shapes import SHAPES
from shoal.errors import ConfigError
from shoal.types import RolloutRequest, SamplingSettings

_FIRST_TOKEN = 3  # after <pad>, <s> and </s>


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputSettings:
    """What is measured.

    Attributes:
        model_shape: One of `SHAPES`.
        device: Of the engines.
        num_samples: Completions that one engine writes in one go; two engines write twice as many.
        num_generations: Of them, those of one prompt.
        tokens: Of each completion, exactly.
        prompt_tokens: Of each prompt.
        repeats: Goes behind each median.
        gpu_memory_utilization: vLLM's.
        enforce_eager: vLLM's.
    """

    model_shape: str
    device: Literal["cpu", "cuda"]
    num_samples: int
    num_generations: int
    tokens: int
    prompt_tokens: int
    repeats: int
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False

    def engines(self, num_engines: int) -> BenchSettings:
        """Return the layout with so many engines, each with GPUs of its own."""
        return BenchSettings(
            model_shape=self.model_shape,
            device=self.device,
            engine_devices=tuple(range(num_engines)) if self.device == "cuda" else (),
            num_engines=num_engines,
            running_requests=self.num_samples * num_engines,
            gpu_memory_utilization=self.gpu_memory_utilization,
            enforce_eager=self.enforce_eager,
        )

    def to_json(self) -> str:
        """Serialise; `from_json` is the inverse."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ThroughputSettings:
        """Parse what `to_json` wrote."""
        return cls(**json.loads(text))


def check_throughput(settings: ThroughputSettings, num_gpus: int) -> None:
    """Refuse what cannot be measured.

    Raises:
        ConfigError: A value leaves nothing to measure, or is too large for the model or the machine.
    """
    for name in ("num_samples", "num_generations", "tokens", "prompt_tokens", "repeats"):
        if getattr(settings, name) < 1:
            raise ConfigError(f"{name}={getattr(settings, name)} leaves nothing to measure. Give at least 1.")
    if settings.num_samples % settings.num_generations:
        raise ConfigError(
            f"{settings.num_samples} samples are not whole prompts of {settings.num_generations} each. Make --samples "
            "a multiple of --group."
        )
    longest = SHAPES[settings.model_shape].max_tokens
    if settings.prompt_tokens + settings.tokens > longest:
        raise ConfigError(
            f"prompts of {settings.prompt_tokens} and completions of {settings.tokens} tokens are longer than the "
            f"{longest} that {settings.model_shape} engines are started for. Lower --tokens or --prompt-tokens."
        )
    if settings.device == "cuda" and num_gpus < 1:
        raise ConfigError("--device cuda needs a GPU, and this process sees none. Use --device cpu.")


def draw_groups(settings: ThroughputSettings, *, go: int, num_engines: int) -> list[list[RolloutRequest]]:
    """Return the requests of one go, prompt by prompt; no two goes share a prompt, so nothing is found in a cache."""
    sampling = SamplingSettings(temperature=1.0, max_tokens=settings.tokens, stop_token_ids=())
    vocabulary = SHAPES[settings.model_shape].vocabulary - _FIRST_TOKEN
    num_prompts = num_engines * settings.num_samples // settings.num_generations
    groups = []
    for place in range(num_prompts):
        number = go * num_prompts + place
        prompt = tuple(
            _FIRST_TOKEN + (31 * number + 7 * (number // vocabulary) + (3 + number) * position) % vocabulary
            for position in range(settings.prompt_tokens)
        )
        first_seed = number * settings.num_generations
        groups.append(
            [
                RolloutRequest(prompt_token_ids=prompt, seed=first_seed + sample, sampling=sampling)
                for sample in range(settings.num_generations)
            ]
        )
    return groups
