"""However the model is divided among two processes, training is what one process does: gradients, weights, curves.

accelerate shards with FSDP2 on GPUs only; here its own code is told to do so on CPUs over gloo (`one_step.py`).
DeepSpeed is tried where it is installed. `--all-shardings` tries every combination, with QLoRA where bitsandbytes is.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shoal.testing import tiny_model

# The first test's set-up runs every case, with a time-out from their number; this one only has to be longer.
pytestmark = pytest.mark.timeout(3600)

EXACT = 1e-9  # relative, in float64; the slightest mistake in a weight or a scale is far beyond
IN_FLOAT32 = 1e-5  # the same in float32, in which DeepSpeed computes
CUT = {"max_tokens_per_micro_batch": 80, "vllm_importance_sampling_clip_max": 1.15, "gradient_accumulation_steps": 3}
ONE_CALL = CUT | {"gradient_accumulation_steps": 1}
FEW_AND_MANY = CUT | {"max_tokens_per_micro_batch": 1}
KL = {"beta": 0.3}
CURVE = {
    "max_steps": 20,
    "optim": "adamw_torch",
    "learning_rate": 3e-3,
    "max_grad_norm": 1.0,
    "beta": 0.1,
    "vllm_importance_sampling_mode": "token_truncate",
    "vllm_importance_sampling_clip_max": 3.0,
    "max_tokens_per_micro_batch": 80,
    "gradient_accumulation_steps": 3,
}
SAVED = CUT | {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 2}

# 4 prompts of 6 completions for two steps of 12, taken twice: a step's 3 calls are half of a generation's 6.
SEVERAL = CUT | {
    "num_generations": 6,
    "steps_per_generation": 6,
    "num_iterations": 2,
    "max_steps": 6,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
}

COMPILED_BLOCKS = {"regional_compilation": True, "gradient_checkpointing": True, "recompute_num_layers": 1}

FSDP2: dict[str, Any] = {"reshard_after_forward": True}
STEPS: dict[str, dict[str, Any]] = {
    "ddp": {"settings": CUT},
    "ddp, exchanged each time": {
        "settings": CUT | {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
    },
    "ddp, lora, kl": {"settings": CUT | KL, "lora": "lora"},
    "fsdp2": {"settings": CUT, "fsdp2": FSDP2},
    "fsdp2, one call": {"settings": ONE_CALL, "fsdp2": FSDP2},
    "fsdp2, few and many sequences": {"settings": FEW_AND_MANY, "fsdp2": FSDP2},
    "fsdp2, kept whole": {"settings": CUT, "fsdp2": {"reshard_after_forward": False}},
    "fsdp2, offloaded": {"settings": CUT, "fsdp2": FSDP2 | {"cpu_offload": True}},
    "fsdp2, clipped": {"settings": CUT | {"max_grad_norm": 0.1}, "fsdp2": FSDP2},
    "fsdp2, recomputed": {"settings": CUT, "fsdp2": FSDP2 | {"activation_checkpointing": True}},
    "fsdp2, recomputed by transformers": {"settings": CUT | {"gradient_checkpointing": True}, "fsdp2": FSDP2},
    "ddp, lora, kl, compiled blocks": {"settings": CUT | KL | COMPILED_BLOCKS, "lora": "lora"},
    "fsdp2, compiled blocks": {"settings": CUT | COMPILED_BLOCKS, "fsdp2": FSDP2},
    "fsdp2, loaded by one, kl": {
        "settings": CUT | KL,
        "moved": True,
        "fsdp2": FSDP2 | {"cpu_ram_efficient_loading": True},
    },
    "fsdp2, lora, kl": {"settings": CUT | KL, "lora": "lora", "fsdp2": {"reshard_after_forward": False}},
}
CONTROLS: dict[str, dict[str, Any]] = {
    "a micro-batch dropped": {"settings": CUT, "fsdp2": FSDP2, "broken": "drops_one"},
    "mean over ranks": {"settings": CUT, "fsdp2": FSDP2, "broken": "rank_mean"},
}
RUNS: dict[str, dict[str, Any]] = {
    "curve, ddp": {"settings": CURVE, "dtype": "float32"},
    "curve, fsdp2": {"settings": CURVE, "dtype": "float32", "fsdp2": FSDP2},
    "bf16, ddp": {"settings": CUT | KL | {"bf16": True}, "dtype": "float32"},
    "bf16, fsdp2": {"settings": CUT | KL | {"bf16": True}, "dtype": "float32", "fsdp2": FSDP2},
    "several steps, ddp": {"settings": SEVERAL},
    "several steps, fsdp2": {"settings": SEVERAL, "fsdp2": FSDP2},
    "saved whole": {"settings": SAVED, "fsdp2": FSDP2, "save": True},
    "saved whole, resumed": {"settings": SAVED, "fsdp2": FSDP2, "resume": "saved whole/checkpoint-2"},
    "saved in parts": {"settings": SAVED, "fsdp2": {"state_dict_type": "SHARDED_STATE_DICT"}, "save": True},
    "saved in parts, resumed": {
        "settings": SAVED,
        "fsdp2": {"state_dict_type": "SHARDED_STATE_DICT"},
        "resume": "saved in parts/checkpoint-2",
    },
}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    """A DeepSpeed configuration in which transformers fills in the rest.

    Its gradients are gone when they could be looked at, so the step is so long that float32 rounding does not matter.
    """
    auto = ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size", "gradient_clipping")
    return {
        "deepspeed": {
            "zero_optimization": {"stage": stage, **settings},
            "zero_force_ds_cpu_optimizer": False,
            **dict.fromkeys(auto, "auto"),
        },
        "learning_rate": 100.0,
    }


HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(
    not HAS_DEEPSPEED, reason="DeepSpeed is not installed (pip install 'shoal[deepspeed]')"
)
ZERO_STEPS: dict[str, dict[str, Any]] = {
    "zero-1": {"settings": CUT | zero(1), "dtype": "float32"},
    "zero-2": {"settings": CUT | zero(2), "dtype": "float32"},
    "zero-3": {"settings": CUT | zero(3), "dtype": "float32"},
    "zero-3, few and many sequences": {"settings": FEW_AND_MANY | zero(3), "dtype": "float32"},
    "zero-3, lora, kl": {"settings": CUT | KL | zero(3), "dtype": "float32", "lora": "lora"},
}
# One of these for each stage: DeepSpeed averages over ranks in three places.
ZERO_CONTROLS: dict[str, dict[str, Any]] = {
    f"{name}, a micro-batch dropped": case | {"broken": "drops_one"}
    for name, case in ZERO_STEPS.items()
    if name in ("zero-1", "zero-2", "zero-3")
}
ZERO_RUNS: dict[str, dict[str, Any]] = {
    **{f"curve, zero-{stage}": {"settings": zero(stage) | CURVE, "dtype": "float32"} for stage in (2, 3)},
    "saved, zero-3": {"settings": zero(3) | SAVED, "dtype": "float32", "save": True},
    "saved, zero-3, resumed": {
        "settings": zero(3) | SAVED,
        "dtype": "float32",
        "resume": "saved, zero-3/checkpoint-2",
    },
}


def every_sharding() -> dict[str, dict[str, Any]]:
    """Return all combinations."""
    found: dict[str, dict[str, Any]] = {}
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {"ddp": ({}, {})}
    for reshard, offload in itertools.product((True, False), repeat=2):
        name = f"fsdp2 reshard={reshard} offload={offload}"
        kinds[name] = ({}, {"fsdp2": {"reshard_after_forward": reshard, "cpu_offload": offload}})
    if HAS_DEEPSPEED:
        for stage, offload in itertools.product((1, 2, 3), (False, True)):
            part = {"offload_optimizer": {"device": "cpu"}} if offload else {}
            kinds[f"zero-{stage} offload={offload}"] = (zero(stage, **part), {"dtype": "float32"})
    adapters = [None, "lora", *(["qlora"] if importlib.util.find_spec("bitsandbytes") is not None else [])]
    for (kind, (settings, case)), recomputed, accumulation, lora in itertools.product(
        kinds.items(), (False, True), (1, 3), adapters
    ):
        name = f"{kind} recomputed={recomputed} accumulation={accumulation} {lora or 'full'}"
        changes = {"gradient_checkpointing": recomputed, "gradient_accumulation_steps": accumulation}
        more = {"dtype": "float32"} if lora == "qlora" else {}
        found[name] = {"settings": CUT | KL | settings | changes, "lora": lora, **case, **more}
    compiled = ONE_CALL | {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    found["ddp, compiled"] = {"settings": compiled}
    found["fsdp2, compiled"] = {"settings": compiled, "fsdp2": FSDP2}
    found["ddp, compiled by inductor"] = {"settings": ONE_CALL | {"torch_compile": True}, "dtype": "float32"}
    return found


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], Any]) -> Any:
    return load_script("one_step")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("every sharding")


@pytest.fixture(scope="module")
def cases(pytestconfig: pytest.Config) -> dict[str, dict[str, Any]]:
    more = every_sharding() if pytestconfig.getoption("--all-shardings") else {}
    with_deepspeed = ZERO_STEPS | ZERO_CONTROLS | ZERO_RUNS if HAS_DEEPSPEED else {}
    return STEPS | CONTROLS | RUNS | with_deepspeed | more


@pytest.fixture(scope="module")
def on_two_processes(script: Any, run_script: Callable[..., Any], folder: Path, cases: Any) -> Callable[[str], Any]:
    """Run all cases in two processes, and return a function that says what a case came to."""
    written = [asdict(script.Case(name=name, **case)) for name, case in cases.items()]
    (folder / "cases.json").write_text(json.dumps(written))
    ended = run_script("one_step", folder / "cases.json", folder, num_processes=2, timeout_s=60.0 + 15.0 * len(cases))
    assert ended.returncode == 0, ended.stderr[-4000:]

    def result(name: str, rank: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = torch.load(folder / f"{name}.{rank}.pt")
        assert "error" not in found, (name, found)
        return found

    return result


@pytest.fixture(scope="module")
def alone(script: Any, folder: Path, cases: Any) -> Callable[[str], dict[str, Any]]:
    """Return a function that says what the same case comes to in one process that shards nothing."""
    torch.set_num_threads(1)
    known: dict[str, dict[str, Any]] = {}
    written: dict[str, dict[Any, Any]] = {}

    def result(name: str) -> dict[str, Any]:
        case = dict(cases[name], fsdp2=None, resume=None)
        left_out = (
            "deepspeed", "torch_compile", "torch_compile_backend", "accelerator_config", "save_strategy",
            "regional_compilation",
        )  # fmt: skip
        case["settings"] = {key: value for key, value in case["settings"].items() if key not in left_out}
        key = repr(case)
        if key not in known:
            kind = repr([case.get("dtype"), case.get("lora"), case.get("moved")])
            known[key] = script.take_step(
                script.Case(name=name, **case), folder / "alone" / name, written.setdefault(kind, {})
            )
        return known[key]

    return result


def largest_error(values: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error over parameters."""
    assert values.keys() == expected.keys()
    return max(float((values[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_compute_the_gradient_of_one(on_two_processes: Any, alone: Any, name: str) -> None:
    divided, whole = on_two_processes(name), alone(name)
    # Norms compute in float32 whatever the weights are; the compiler rounds elsewhere.
    bound = IN_FLOAT32 if "compiled" in name else EXACT
    assert largest_error(divided["gradients"], whole["gradients"]) < bound
    assert largest_error(divided["changes"], whole["changes"]) < bound
    assert divided["log"]["grad_norm"] == pytest.approx(whole["log"]["grad_norm"], rel=1e-6)
    assert divided["log"]["loss"] == pytest.approx(whole["log"]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", CONTROLS)
def test_a_mistake_in_one_micro_batch_or_in_the_scale_shows(on_two_processes: Any, alone: Any, name: str) -> None:
    divided, whole = on_two_processes(name), alone("fsdp2")
    assert largest_error(divided["gradients"], whole["gradients"]) > 1e-2


def test_one_process_repeats_a_sequence_when_it_has_fewer(on_two_processes: Any) -> None:
    name = "fsdp2, few and many sequences"
    first, second = on_two_processes(name), on_two_processes(name, rank=1)
    assert first["num_micro_batches"] == second["num_micro_batches"] > 6
    assert first["num_fillers"] > 0 and second["num_fillers"] == 0


def test_clipping_takes_the_norm_of_the_whole_gradient(on_two_processes: Any) -> None:
    clipped, free = on_two_processes("fsdp2, clipped"), on_two_processes("fsdp2")
    norm = torch.linalg.vector_norm(torch.cat([value.flatten() for value in free["gradients"].values()]))
    assert clipped["log"]["grad_norm"] == pytest.approx(float(norm), rel=1e-6)
    expected = {name: value * 0.1 / (norm + 1e-6) for name, value in free["gradients"].items()}
    assert largest_error(clipped["gradients"], expected) < EXACT


@pytest.mark.parametrize("name", ["several steps, ddp", "several steps, fsdp2"])
def test_two_processes_take_the_steps_on_one_batch_that_one_takes(on_two_processes: Any, alone: Any, name: str) -> None:
    divided, whole = on_two_processes(name), alone(name)
    assert len(whole["all_groups"]) == 2
    assert largest_error(divided["weights"], whole["weights"]) < EXACT


@pytest.mark.parametrize("name", ["bf16, ddp", "bf16, fsdp2"])
def test_under_bf16_an_untrained_policy_is_at_no_distance_from_its_reference(on_two_processes: Any, name: str) -> None:
    assert on_two_processes(name)["log"]["kl"] == 0


@needs_deepspeed
@pytest.mark.parametrize("name", ZERO_STEPS)
def test_two_processes_under_deepspeed_take_the_step_of_one(on_two_processes: Any, alone: Any, name: str) -> None:
    divided, whole = on_two_processes(name), alone(name)
    assert f"zero-{divided['zero_stage']}" == name.partition(",")[0]
    assert largest_error(divided["changes"], whole["changes"]) < IN_FLOAT32
    assert divided["log"]["grad_norm"] == pytest.approx(whole["log"]["grad_norm"], rel=1e-5)
    assert divided["log"]["loss"] == pytest.approx(whole["log"]["loss"], rel=1e-5)


@needs_deepspeed
@pytest.mark.parametrize("name", ZERO_CONTROLS)
def test_a_mistake_in_one_micro_batch_shows_under_deepspeed(on_two_processes: Any, alone: Any, name: str) -> None:
    divided, whole = on_two_processes(name), alone(name.partition(",")[0])
    assert largest_error(divided["changes"], whole["changes"]) > 1e-2


# ---- saving and going on ----


@pytest.mark.parametrize("name", ["saved whole", "saved in parts"])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_interrupted(
    on_two_processes: Any, alone: Any, name: str
) -> None:
    straight, resumed = on_two_processes(name), on_two_processes(f"{name}, resumed")
    assert len(straight["all_groups"]) == 4 and len(resumed["all_groups"]) == 2
    assert largest_error(resumed["weights"], straight["weights"]) < 1e-12
    assert largest_error(straight["weights"], alone(name)["weights"]) < EXACT


@pytest.mark.parametrize("saved", ["saved whole/checkpoint-4", "saved whole/final", "saved in parts/final"])
def test_what_two_processes_saved_is_loaded_by_one(on_two_processes: Any, folder: Path, saved: str) -> None:
    trained = on_two_processes(saved.partition("/")[0])["weights"]
    loaded = AutoModelForCausalLM.from_pretrained(folder / "runs" / saved, dtype=torch.float64)
    assert largest_error(dict(loaded.named_parameters()), trained) == 0
    earlier = AutoModelForCausalLM.from_pretrained(
        folder / "runs" / "saved whole" / "checkpoint-2", dtype=torch.float64
    )
    assert largest_error(dict(earlier.named_parameters()), trained) > 1e-3


@needs_deepspeed
def test_a_run_under_zero3_is_saved_resumed_and_loaded_whole(on_two_processes: Any, alone: Any, folder: Path) -> None:
    straight, resumed = on_two_processes("saved, zero-3"), on_two_processes("saved, zero-3, resumed")
    assert len(straight["all_groups"]) == 4 and len(resumed["all_groups"]) == 2
    assert largest_error(resumed["weights"], straight["weights"]) < 1e-6
    assert largest_error(straight["weights"], alone("saved, zero-3")["weights"]) < 1e-4
    loaded = AutoModelForCausalLM.from_pretrained(folder / "runs" / "saved, zero-3" / "final", dtype=torch.float32)
    assert largest_error(dict(loaded.named_parameters()), straight["weights"]) == 0


# ---- curves ----


def padded_curve(steps: list[list[dict[str, Any]]], *, learning_rate: float) -> list[float]:
    """The losses of a training in plain torch: one padded batch a step, in float64, everything written out."""
    model = tiny_model(dtype=torch.float64)
    reference = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    losses = []
    for groups in steps:
        rows = [(g, row) for g in groups for row in range(len(g["completions"]))]
        length = max(len(g["prompt"]) + len(g["completions"][row]) for g, row in rows)
        ids, seen, in_loss, advantages, engine = (torch.zeros(len(rows), length, dtype=torch.float64) for _ in range(5))
        for index, (group, row) in enumerate(rows):
            tokens = group["prompt"] + group["completions"][row]
            begin, rewards = len(group["prompt"]), torch.tensor(group["rewards"], dtype=torch.float64)
            ids[index, : len(tokens)] = torch.tensor(tokens, dtype=torch.float64)
            seen[index, : len(tokens)] = 1
            in_loss[index, begin : len(tokens)] = 1
            advantages[index] = (rewards[row] - rewards.mean()) / (rewards.std() + 1e-4)
            engine[index, begin : len(tokens)] = group["rollout_logprobs"][row]
        policy, ref = (
            torch.log_softmax(m(input_ids=ids.long(), attention_mask=seen.long()).logits[:, :-1], -1)
            .gather(-1, ids[:, 1:, None].long())
            .squeeze(-1)
            for m in (model, reference)
        )
        ratio = (policy - policy.detach()).exp()
        correction = (policy.detach() - engine[:, 1:]).exp().clamp(max=CURVE["vllm_importance_sampling_clip_max"])
        kl = ((ref - policy).exp() - (ref - policy) - 1) * ratio
        token_loss = -advantages[:, 1:] * ratio * correction + CURVE["beta"] * kl
        loss = (token_loss * in_loss[:, 1:]).sum() / in_loss.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CURVE["max_grad_norm"])
        optimizer.step()
        losses.append(loss.item())
    return losses


def curve(run: dict[str, Any]) -> torch.Tensor:
    """The logged losses of a run."""
    return torch.tensor([line["loss"] for line in run["logs"] if "loss" in line], dtype=torch.float64)


@pytest.fixture(scope="module")
def padded(alone: Any) -> Callable[..., torch.Tensor]:
    """Return a function that trains on the same rollouts in plain torch."""

    def train(learning_rate: float = CURVE["learning_rate"]) -> torch.Tensor:
        return torch.tensor(
            padded_curve(alone("curve, ddp")["all_groups"], learning_rate=learning_rate), dtype=torch.float64
        )

    return train


def test_one_and_two_processes_train_the_curve_of_a_plain_padded_implementation(
    on_two_processes: Any, alone: Any, padded: Any
) -> None:
    expected = padded()
    assert len(expected) == 20 and expected.max() - expected.min() > 0.1
    for run in (alone("curve, ddp"), on_two_processes("curve, ddp"), on_two_processes("curve, fsdp2")):
        assert run["all_groups"] == [] or len(run["all_groups"]) == 20
        assert (curve(run) - expected).abs().max() < 1e-3


@needs_deepspeed
@pytest.mark.parametrize("name", ["curve, zero-2", "curve, zero-3"])
def test_deepspeed_trains_the_curve_of_a_plain_padded_implementation(
    on_two_processes: Any, padded: Any, name: str
) -> None:
    run = on_two_processes(name)
    assert f"curve, zero-{run['zero_stage']}" == name
    assert (curve(run) - padded()).abs().max() < 1e-3


def test_another_learning_rate_trains_another_curve(alone: Any, padded: Any) -> None:
    other = padded(learning_rate=CURVE["learning_rate"] * 1.1)
    assert (curve(alone("curve, ddp")) - other).abs().max() > 3e-3


# ---- every combination ----


def test_every_combination_has_the_weights_of_one_process(
    pytestconfig: pytest.Config, on_two_processes: Any, alone: Any
) -> None:
    if not pytestconfig.getoption("--all-shardings"):
        pytest.skip("tried with --all-shardings only: it takes ten minutes")
    errors = {}
    for name, case in every_sharding().items():
        exact = case.get("dtype", "float64") == "float64"
        error = largest_error(on_two_processes(name)["changes"], alone(name)["changes"])
        print(f"{error:.1e}  {name}")
        if error > (EXACT if exact else IN_FLOAT32):
            errors[name] = error
    assert not errors
