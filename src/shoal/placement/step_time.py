"""How long a step takes, from what the devices can do and what was measured of how much of it is reached."""

from __future__ import annotations

import math
from dataclasses import dataclass

from shoal.placement.architecture import Architecture
from shoal.placement.gpu_kinds import GpuKind
from shoal.placement.trainer_memory import TrainerSetup

# Of one H200 (benchmarks/results/2026-11-29-one-h200-training, decision 18): matrix products run at 710 TFLOP/s.
_PRODUCT_EFFICIENCY = 0.72
# FlashAttention-2's kernels there; they were made for GPUs before Hopper, of which they take as large a share as
# products do (Dao 2023, FlashAttention-2, section 4.1).
_ATTENTION_FLOPS_PER_S = 210e12
# Operations over the float32 residual stream of a block, each read and written once; computing a block again repeats a
# quarter of them. 37 is what four steps with compiled blocks take beside products and attention, at widths of 2048 and
# 4096; compiling fuses 96 more (decision 18).
_FUSED_OPERATIONS = 37
_UNFUSED_OPERATIONS = 96
_OPERATION_BYTES = 2 * 4
_FORWARD_SHARE = 0.25
# AdamW reads and writes weights and two moments and reads gradients, all of one type.
_ADAM_TRAFFIC = 3 * 2 + 1
# Of a decode step on an H100 with 1.7B (docs/decisions/0008): 4 ms of which 1.45 are reading the weights at 70 % of the
# memory's rate, and 0.049 us a token of context, 70 % again. With 4.2 us a sequence, 256 samples of 512 tokens come out
# at the 34,372 tokens/s of an H200 with 1.7B (benchmarks/results/2026-11-29-one-h200-pool-and-weights).
_MEMORY_EFFICIENCY = 0.70
_STEP_S = 2.55e-3
_SEQUENCE_S = 4.2e-6
_PREFILL_EFFICIENCY = 0.50  # 8.5 us a prompt token at 1.7B are 41 % of an H100's peak; larger models come nearer to it
# The same: 1.19 GB in 17.8 ms and 16.4 GB in 60.2 ms over CUDA IPC.
_PUBLISH_S = 14.5e-3
_IPC_BYTES_PER_S = 358e9
# Grouped NCCL send/recv between two H100s moved 364 GB/s of 450.
_LINK_EFFICIENCY = 0.80
ENOUGH_TOKENS = 16_384  # a pass of so many runs at full speed; memory beyond is better spent on keeping activations
MAX_NUM_SEQS = 256  # vLLM's default, and Shoal's bound on what one engine is asked for at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What one optimizer step is about.

    Attributes:
        num_prompts: Prompts of a step.
        num_generations: Completions of each.
        prompt_tokens: Of a prompt.
        completion_tokens: Of the longest completion.
        mean_completion_tokens: Of a completion on average.
    """

    num_prompts: int
    num_generations: int
    prompt_tokens: int
    completion_tokens: int
    mean_completion_tokens: float

    @property
    def num_samples(self) -> int:
        """Completions of a step."""
        return self.num_prompts * self.num_generations

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def num_tokens(self) -> float:
        """Tokens that are trained on in a step, prompts included."""
        return self.num_samples * (self.prompt_tokens + self.mean_completion_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a synchronous step.

    Attributes:
        generate: Until the last completion.
        train: Forward, backward, optimizer.
        publish: Until every engine holds the new weights.
        flops: Operations of the training, recomputation not counted.
    """

    generate: float
    train: float
    publish: float
    flops: float

    @property
    def total(self) -> float:
        """One after the other."""
        return self.generate + self.train + self.publish


def training_seconds(model: Architecture, gpu: GpuKind, setup: TrainerSetup, work: Workload) -> tuple[float, float]:
    """Return the seconds of the training part on all ranks, and the operations that count in MFU."""
    length = work.prompt_tokens + work.mean_completion_tokens
    products = model.product_flops(work.num_tokens, trains_matrices=setup.method == "full")
    attention = model.attention_flops(work.num_tokens, length)
    compute = _compute_seconds(model, gpu, setup, work.num_tokens, products, attention) / setup.num_ranks
    num_micro_batches = max(1, math.ceil(work.num_tokens / setup.num_ranks / setup.micro_batch_tokens))
    wire = _wire_bytes(model, setup, num_micro_batches) / (gpu.link_bytes_per_s * _LINK_EFFICIENCY)
    shards = 1 if setup.sharding == "ddp" else setup.num_ranks
    if shards == 1:
        passes = max(compute, wire)
    else:  # little is hidden: what copies takes from what computes
        copying = _shard_traffic(model, setup) * num_micro_batches / (gpu.memory_bytes_per_s * _MEMORY_EFFICIENCY)
        passes = compute + wire + copying
    adam_bytes = _ADAM_TRAFFIC * (2 if setup.dtype == "bfloat16" else 4) * setup.trainable(model) / shards
    adam = adam_bytes / (gpu.memory_bytes_per_s * _MEMORY_EFFICIENCY)
    return passes + adam, products + attention


def generation_seconds(
    model: Architecture, gpu: GpuKind, work: Workload, *, num_engines: int, tensor_parallel_size: int, kv_tokens: float
) -> float:
    """Return the seconds until the last completion, samples spread evenly.

    Args:
        model: Served in bfloat16.
        gpu: Of the engines.
        work: The step.
        num_engines: All alike.
        tensor_parallel_size: Of each.
        kv_tokens: Tokens that fit into the KV cache of one engine.
    """
    samples, mean = work.num_samples / num_engines, work.mean_completion_tokens
    at_once = max(1.0, min(samples, MAX_NUM_SEQS, kv_tokens / (work.prompt_tokens + mean)))
    steps = max(work.completion_tokens, samples * mean / at_once)
    active = samples * mean / steps
    rate = gpu.memory_bytes_per_s * _MEMORY_EFFICIENCY * tensor_parallel_size
    context = active * (work.prompt_tokens + mean / 2)
    weights = 2 * min(model.num_parameters, _touched(model, active)) / rate
    step = _STEP_S + weights + active * _SEQUENCE_S + context * model.kv_bytes_per_token() / rate
    prompts = work.num_prompts / num_engines * work.prompt_tokens
    prefill = 2 * model.matmul_parameters * prompts / (gpu.flops * _PREFILL_EFFICIENCY * tensor_parallel_size)
    return prefill + steps * step


def publish_seconds(
    model: Architecture, gpu: GpuKind, *, num_ranks: int, num_engines: int, num_workers: int, is_colocated: bool
) -> float:
    """Return the seconds of a publish of all weights in bfloat16 to every engine.

    Args:
        model: What is published.
        gpu: Of both ends.
        num_ranks: Trainer processes, each of which sends.
        num_engines: Engines, each of which receives everything.
        num_workers: Workers of all engines.
        is_colocated: Over CUDA IPC, not over the link.
    """
    everything = 2 * model.num_parameters * num_engines
    if is_colocated:
        return _PUBLISH_S + everything / num_workers / _IPC_BYTES_PER_S
    return _PUBLISH_S + everything / min(num_ranks, num_workers) / (gpu.link_bytes_per_s * _LINK_EFFICIENCY)


def _compute_seconds(
    model: Architecture, gpu: GpuKind, setup: TrainerSetup, num_tokens: float, products: float, attention: float
) -> float:
    """Return the seconds of one GPU for all tokens: products, attention, and what is not fused with products.

    Args:
        model: The policy.
        gpu: Its kind.
        setup: Which blocks are computed again, and whether they are compiled.
        num_tokens: Of a step.
        products: Operations of matrix products, recomputation not counted.
        attention: Operations of attention, recomputation not counted.
    """
    again = setup.num_recomputed(model) / model.num_layers
    # Forward is 2 of 6 operations; the output's matrix is not computed again.
    products += again * 2 * (model.matmul_parameters - model.embedding_parameters) * num_tokens
    attention += again * attention / 3
    product_rate = gpu.flops * _PRODUCT_EFFICIENCY
    seconds = products / product_rate + attention / min(product_rate, _ATTENTION_FLOPS_PER_S)
    operations: float = _FUSED_OPERATIONS + (0 if setup.compiled else _UNFUSED_OPERATIONS)
    operations *= model.num_layers * (1 + _FORWARD_SHARE * again)
    traffic = operations * _OPERATION_BYTES * model.hidden * num_tokens
    return seconds + traffic / (gpu.memory_bytes_per_s * _MEMORY_EFFICIENCY)


def _wire_bytes(model: Architecture, setup: TrainerSetup, num_micro_batches: int) -> float:
    """Return what one rank sends in a step, at least: gradients once for DDP, weights and gradients for the sharded."""
    share = (setup.num_ranks - 1) / setup.num_ranks
    if setup.sharding == "ddp":
        return 2 * share * 4 * setup.trainable(model)
    # Gathered forward and backward, scattered once, for every micro-batch.
    gathered = (2 * model.num_parameters + setup.trainable(model)) * setup.compute_bytes
    return share * gathered * num_micro_batches


def _shard_traffic(model: Architecture, setup: TrainerSetup) -> float:
    """Return the bytes of its own memory that a rank reads and writes for a micro-batch's gathering and scattering.

    A gather casts the shard, and what arrives is written, read and written where it is used. A scatter lays gradients
    out, and adds what arrives to float32 ones. With two H200s that takes as long as the wire, and both together are
    what FSDP2's passes were measured to cost, whatever their length: 0.14 s each at 8B (decision 18).
    """
    shard = 1 / setup.num_ranks
    gathers = 2 * (shard * (setup.weight_bytes + setup.compute_bytes) + 3 * setup.compute_bytes)
    scatter = 2 * setup.compute_bytes + shard * (setup.compute_bytes + 2 * 4)
    return gathers * model.num_parameters + scatter * setup.trainable(model)


def _touched(model: Architecture, num_tokens: float) -> float:
    """Return the parameters that a decode step reads: of the experts those that some token was sent to."""
    if not model.num_moe_layers:
        return model.num_parameters
    expert = sum(linear.num_parameters for linear in model.expert)
    hit = 1 - math.pow(1 - model.experts_per_token / model.num_experts, num_tokens)
    return model.num_parameters - model.num_moe_layers * model.num_experts * expert * (1 - hit)
