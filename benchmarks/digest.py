"""How fast a GPU digests a model's parameters in one launch, against the rate at which a plain copy reads memory.

`python benchmarks/digest.py` on a machine with an NVIDIA GPU (20 GB free for the larger model). It ends with one
JSON line.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import torch

from shoal.wire.digest import DigestPlan, Run, digests

REPEATS = 20
# layers, hidden, MLP, attention width of q, of k and v, head width, vocabulary, tied embeddings
MODELS = {
    "Qwen3-0.6B": (28, 1024, 3072, 2048, 1024, 128, 151936, True),
    "Qwen3-8B": (36, 4096, 12288, 4096, 1024, 128, 151936, False),
}


def shapes(
    layers: int, hidden: int, mlp: int, query: int, key: int, head: int, vocabulary: int, tied: bool
) -> list[tuple[int, ...]]:
    """Return the shapes of a Qwen3 checkpoint's parameters."""
    attention = [(query, hidden), (key, hidden), (key, hidden), (hidden, query), (head,), (head,)]
    block = [*attention, (mlp, hidden), (mlp, hidden), (hidden, mlp), (hidden,), (hidden,)]
    return [*block * layers, (hidden,), *[(vocabulary, hidden)] * (1 if tied else 2)]


def median_s(work: Callable[[], object]) -> float:
    """Return the median time on the device of one call."""
    for _ in range(3):
        work()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times)


def host_s(work: Callable[[], object]) -> float:
    """Return the median time that one call takes of the host."""
    times = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def cut(runs: list[Run], num_pieces: int, extra: int) -> list[Run]:
    """Cut runs into about `num_pieces`, each `extra` elements past a multiple of 16 from the one before."""
    total = sum(run.values.numel() for run in runs)
    size = total // num_pieces // 16 * 16 + extra
    return [
        Run(flat[low : low + size], low, run.slot)
        for run in runs
        for flat in (run.values.view(-1),)
        for low in range(0, flat.numel(), size)
    ]


def measure(name: str) -> dict[str, float]:
    """Measure one model; print and return GB/s read, and the host's milliseconds."""
    tensors = [torch.randn(shape, device="cuda").to(torch.bfloat16) for shape in shapes(*MODELS[name])]
    runs = [Run(tensor, 0, slot) for slot, tensor in enumerate(tensors)]
    num_bytes = sum(tensor.nbytes for tensor in tensors)
    cases = {"whole": runs, "20000_runs": cut(runs, 20000, 0), "20000_odd_runs": cut(runs, 20000, 1)}
    figures = {"tensors": float(len(tensors)), "gigabytes": num_bytes / 1e9}
    for case, pieces in cases.items():
        plan = DigestPlan(pieces, len(runs), "cuda")
        figures[f"{case}_gb_per_s"] = num_bytes / median_s(plan.compute) / 1e9
        figures[f"{case}_host_ms"] = 1e3 * host_s(plan.compute)
        figures[f"{case}_plan_and_compute_host_ms"] = 1e3 * host_s(lambda p=pieces: digests(p, len(runs), "cuda"))
    for case, value in figures.items():
        print(f"{name:12} {case:42} {value:10.2f}")
    return figures


def copy_gb_per_s() -> float:
    """Return the bytes per second that a device-to-device copy of 4 GB reads (it writes as many)."""
    source = torch.ones(1 << 30, device="cuda")
    target = torch.empty_like(source)
    return source.nbytes / median_s(lambda: target.copy_(source)) / 1e9


def main() -> None:
    """Measure both models and the copy."""
    copy = copy_gb_per_s()
    print(f"{'copy':12} {'reads_gb_per_s':42} {copy:10.2f}")
    torch.cuda.empty_cache()
    figures: dict[str, object] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_gb_per_s": copy,
    }
    for name in MODELS:
        figures[name] = measure(name)
        torch.cuda.empty_cache()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
