"""The gradient that the optimizer sees is the formula's, however a step is cut and however many processes there are."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

CLIP = 1.15  # So low that some sequences of a step are beyond it.
CORRECTED = {"vllm_importance_sampling_clip_max": CLIP}
FEATURES: dict[str, dict[str, Any]] = {
    "corrected": {},
    "uncorrected": {"vllm_importance_sampling_correction": False},
    "corrected by token": {"vllm_importance_sampling_mode": "token_truncate"},
    "without cut completions": {"mask_truncated_completions": True},
    "with KL": {"beta": 0.3},
    "with plain KL": {"beta": 0.3, "use_bias_correction_kl": False},
    "at another temperature": {"temperature": 0.7},
    "with everything": {"beta": 0.3, "mask_truncated_completions": True, "gradient_checkpointing": True},
}


def logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float) -> torch.Tensor:
    """The completion's logprobs from a forward pass over this sequence alone."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1)[range(len(completion)), completion]


def formula_gradient(script: Any, step: dict[str, Any], *, moved: bool = False, **settings: Any) -> dict[str, Any]:
    """GRPO and DAPO as the papers write them, one sequence at a time, in float64."""
    model, reference = script.make_model(), script.make_model()
    if moved:
        script.move(model)
    masked, beta = settings.get("mask_truncated_completions", False), settings.get("beta", 0.0)
    groups = step["groups"]
    num_sequences = sum(len(group["completions"]) for group in groups)
    num_tokens = sum(
        len(ids)
        for g in groups
        for ids, cut in zip(g["completions"], g["was_cut"], strict=True)
        if not (cut and masked)
    )
    loss = torch.zeros((), dtype=torch.float64)
    for group in groups:
        rewards = torch.tensor(group["rewards"], dtype=torch.float64)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for row, ids in enumerate(group["completions"]):
            if group["was_cut"][row] and masked:
                continue
            policy = logprobs(model, group["prompt"], ids, settings.get("temperature", 1.0))
            ref = logprobs(reference, group["prompt"], ids, settings.get("temperature", 1.0)).detach()
            ratio = (policy - policy.detach()).exp()  # The policy is the old one too: 1, with a gradient.
            if settings.get("old_logprobs") == "rollout":
                ratio = (policy - group["rollout_logprobs"][row]).exp()
            gap = policy.detach() - group["rollout_logprobs"][row]
            correction = torch.ones_like(gap)
            if settings.get("vllm_importance_sampling_mode") == "token_truncate":
                correction = gap.exp().clamp(max=CLIP)
            elif settings.get("vllm_importance_sampling_correction", True):
                correction = gap.sum().exp() * (gap.sum().exp() <= CLIP)
            kl = (ref - policy).exp() - (ref - policy) - 1
            kl = kl * ratio if settings.get("use_bias_correction_kl", True) else kl
            # Clipping stops the gradient only: at ratio 1 it does nothing.
            stops = (ratio > 1.2) if advantages[row] > 0 else (ratio < 0.8)
            surrogate = torch.where(stops, ratio.detach(), ratio) * advantages[row]
            token_loss = -surrogate * correction + beta * kl
            if settings.get("loss_type", "dapo") == "dapo":
                loss = loss + token_loss.sum() / num_tokens
            else:
                loss = loss + token_loss.mean() / num_sequences
    loss.backward()
    return {name: value.grad for name, value in model.named_parameters()}


def largest_error(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest relative error over parameters."""
    assert gradients.keys() == expected.keys()
    return max(float((gradients[name] - expected[name]).norm() / expected[name].norm()) for name in expected)


@pytest.fixture(scope="module")
def script(load_script: Callable[[str], Any]) -> Any:
    return load_script("one_step")


@pytest.fixture
def take_step(script: Any, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    def take(
        *,
        moved: bool = False,
        ends: bool = True,
        equal: int | None = None,
        broken: str | None = None,
        **settings: Any,
    ) -> dict[str, Any]:
        case = script.Case(
            name="case", settings=CORRECTED | settings, moved=moved, ends=ends, equal=equal, broken=broken
        )
        result: dict[str, Any] = script.take_step(case, tmp_path)
        assert "error" not in result, result
        return result

    return take


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize(("max_tokens", "num_micro_batches"), [(1, 12), (40, 5), (80, 4), (100_000, 1)])
def test_the_gradient_is_the_formulas_however_the_step_is_cut(
    script: Any, take_step: Callable[..., Any], max_tokens: int, num_micro_batches: int, accumulation: int
) -> None:
    step = take_step(max_tokens_per_micro_batch=max_tokens, gradient_accumulation_steps=accumulation)
    assert step["num_micro_batches"] == num_micro_batches
    assert largest_error(step["gradients"], formula_gradient(script, step)) < 1e-6


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize("feature", FEATURES)
def test_the_gradient_is_the_formulas_for_every_loss_and_term(
    script: Any, take_step: Callable[..., Any], loss_type: str, feature: str
) -> None:
    settings = {"loss_type": loss_type, **FEATURES[feature]}
    step = take_step(moved=True, max_tokens_per_micro_batch=80, gradient_accumulation_steps=2, **settings)
    assert largest_error(step["gradients"], formula_gradient(script, step, moved=True, **settings)) < 1e-6


@pytest.mark.parametrize("skip", [None, False])
def test_completions_without_an_advantage_are_skipped_and_the_gradient_stays(
    script: Any, take_step: Callable[..., Any], skip: bool | None
) -> None:
    # The third prompt's completions all get the same reward.
    step = take_step(equal=2, max_tokens_per_micro_batch=1, skip_zero_advantages=skip)
    assert step["num_micro_batches"] == (9 if skip is None else 12)
    assert largest_error(step["gradients"], formula_gradient(script, step)) < 1e-6
    masked = [g for g in step["groups"] if len(set(g["rewards"])) > 1]
    assert len(masked) == 3
    # The control: without their tokens in the denominator the gradient is another one.
    assert largest_error(step["gradients"], formula_gradient(script, step | {"groups": masked})) > 1e-2


def test_the_engines_logprobs_can_be_the_old_ones(script: Any, take_step: Callable[..., Any]) -> None:
    settings = {"old_logprobs": "rollout", "vllm_importance_sampling_correction": False}
    step = take_step(moved=True, **settings)
    assert largest_error(step["gradients"], formula_gradient(script, step, moved=True, **settings)) < 1e-6
    # The control: against the policy's own logprobs it is another gradient.
    settings["old_logprobs"] = "policy"
    assert largest_error(step["gradients"], formula_gradient(script, step, moved=True, **settings)) > 1e-2
    assert step["log"]["sampling/sampling_logp_difference/mean"] > 0.1


@pytest.mark.parametrize("feature", ["uncorrected", "corrected by token", "without cut completions", "with KL"])
def test_without_its_term_the_formula_gives_another_gradient(
    script: Any, take_step: Callable[..., Any], feature: str
) -> None:
    step = take_step(moved=True, **FEATURES[feature])
    assert largest_error(step["gradients"], formula_gradient(script, step, moved=True)) > 1e-2


def test_the_two_losses_have_different_gradients(script: Any, take_step: Callable[..., Any]) -> None:
    step = take_step(loss_type="grpo")
    assert largest_error(step["gradients"], formula_gradient(script, step, loss_type="dapo")) > 1e-2


def test_the_kl_term_with_and_without_its_correction_have_different_gradients(
    script: Any, take_step: Callable[..., Any]
) -> None:
    step = take_step(moved=True, **FEATURES["with plain KL"])
    assert largest_error(step["gradients"], formula_gradient(script, step, moved=True, beta=0.3)) > 1e-2


def test_a_mean_over_each_micro_batch_would_give_another_gradient(script: Any, take_step: Callable[..., Any]) -> None:
    step = take_step(broken="micro_batch_mean", max_tokens_per_micro_batch=80)
    assert largest_error(step["gradients"], formula_gradient(script, step)) > 1e-2
    whole = take_step(broken="micro_batch_mean", max_tokens_per_micro_batch=100_000)
    assert largest_error(whole["gradients"], formula_gradient(script, whole)) < 1e-6


def test_the_optimizer_moves_the_weights_by_that_gradient(script: Any, take_step: Callable[..., Any]) -> None:
    step = take_step(max_tokens_per_micro_batch=40, gradient_accumulation_steps=4)
    expected = {name: -script.LEARNING_RATE * value for name, value in formula_gradient(script, step).items()}
    assert largest_error(step["changes"], expected) < 1e-6


def test_the_logged_loss_is_the_formulas_sum_over_the_whole_step(take_step: Callable[..., Any]) -> None:
    # On-policy every ratio is 1 and a group's advantages sum to 0, so only the KL term and lengths are left.
    losses = {
        max_tokens: take_step(moved=True, beta=0.3, max_tokens_per_micro_batch=max_tokens)["log"]["loss"]
        for max_tokens in (1, 80, 100_000)
    }
    assert losses[1] == pytest.approx(losses[100_000], rel=1e-5) and losses[80] == pytest.approx(losses[1], rel=1e-5)
    assert abs(losses[1]) > 1e-3


def test_a_step_whose_completions_were_all_cut_teaches_nothing_when_these_are_masked(
    take_step: Callable[..., Any],
) -> None:
    step = take_step(ends=False, mask_truncated_completions=True)
    assert all(was_cut for group in step["groups"] for was_cut in group["was_cut"])
    assert all(bool((value == 0).all()) for value in step["gradients"].values())
    unmasked = take_step(ends=False)
    assert all(bool(value.any()) for value in unmasked["gradients"].values())


# ---- samples that a reward function fails on ----

DROP = {"reward_on_error": "drop", "reward_preflight": False}


def without(step: dict[str, Any], *, samples: tuple[int, ...]) -> dict[str, Any]:
    """The step as if these samples of its second group had never been written."""
    groups = list(step["groups"])
    kept = [row for row in range(3) if row not in samples]
    groups[1] = {
        key: [value[row] for row in kept] if isinstance(value, list) and key != "prompt" else value
        for key, value in groups[1].items()
    }
    return step | {"groups": [group for group in groups if group["completions"]]}


def trained_as_zero(step: dict[str, Any], *, samples: tuple[int, ...]) -> dict[str, Any]:
    """The mistake: samples of the second group that have no reward have a reward of 0."""
    groups = list(step["groups"])
    groups[1] = groups[1] | {"rewards": [0.0 if row in samples else groups[1]["rewards"][row] for row in range(3)]}
    return step | {"groups": groups}


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.parametrize(("broken", "samples"), [("group", (0, 1, 2)), ("sample", (1,))])
def test_what_a_reward_failed_on_might_as_well_never_have_been_written(
    script: Any, take_step: Callable[..., Any], loss_type: str, broken: str, samples: tuple[int, ...]
) -> None:
    step = take_step(broken=broken, loss_type=loss_type, beta=0.3, max_tokens_per_micro_batch=40, moved=True, **DROP)
    settings: dict[str, Any] = {"loss_type": loss_type, "beta": 0.3, "moved": True}
    expected = formula_gradient(script, without(step, samples=samples), **settings)
    assert largest_error(step["gradients"], expected) < 1e-6
    zero = formula_gradient(script, trained_as_zero(step, samples=samples), **settings)
    assert largest_error(step["gradients"], zero) > 1e-2


def test_a_step_of_which_nothing_is_left_has_no_gradient_and_moves_nothing(take_step: Callable[..., Any]) -> None:
    step = take_step(broken="reward", beta=0.3, moved=True, **DROP)
    assert all(bool((value == 0).all()) for value in step["gradients"].values())
    assert all(bool((value == 0).all()) for value in step["changes"].values())
    assert step["num_micro_batches"] == 1 and step["log"]["rollout/dropped_groups"] == 4


# ---- two processes ----

ONE_PASS = {"max_tokens_per_micro_batch": 100_000}
TWO_PROCESS_CASES: dict[str, dict[str, Any]] = {
    "dapo": {"settings": CORRECTED | ONE_PASS},
    "one by one": {"settings": CORRECTED | {"max_tokens_per_micro_batch": 1, "gradient_accumulation_steps": 2}},
    "everything": {
        "settings": CORRECTED
        | FEATURES["with everything"]
        | {"loss_type": "grpo", "max_tokens_per_micro_batch": 80, "gradient_accumulation_steps": 3},
        "moved": True,
    },
    "mean over ranks": {"settings": CORRECTED | ONE_PASS, "broken": "rank_mean"},
    "failing reward": {"settings": CORRECTED | ONE_PASS, "broken": "reward"},
    "failing on a group": {"settings": CORRECTED | ONE_PASS | DROP, "broken": "group"},
    "nothing left": {"settings": CORRECTED | ONE_PASS | DROP, "broken": "reward"},
    # Last: the processes still work together after the failure.
    "after the failure": {"settings": CORRECTED | {"loss_type": "grpo"} | ONE_PASS},
}


@pytest.fixture(scope="module")
def on_two_processes(
    script: Any, run_script: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """For each case, what both processes saw."""
    folder = tmp_path_factory.mktemp("two processes")
    cases = [asdict(script.Case(name=name, **case)) for name, case in TWO_PROCESS_CASES.items()]
    (folder / "cases.json").write_text(json.dumps(cases))
    ended = run_script("one_step", folder / "cases.json", folder, num_processes=2)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(2)] for name in TWO_PROCESS_CASES}


@pytest.mark.parametrize("name", ["dapo", "one by one", "everything", "after the failure"])
def test_two_processes_have_the_formulas_gradient(script: Any, on_two_processes: Any, name: str) -> None:
    first, second = on_two_processes[name]
    case = TWO_PROCESS_CASES[name]
    expected = formula_gradient(script, first, moved=case.get("moved", False), **case["settings"])
    assert largest_error(first["gradients"], expected) < 1e-6
    assert largest_error(second["gradients"], first["gradients"]) == 0


def test_two_processes_leave_out_what_a_reward_failed_on(script: Any, on_two_processes: Any) -> None:
    first, second = on_two_processes["failing on a group"]
    expected = formula_gradient(script, without(first, samples=(0, 1, 2)))
    assert largest_error(first["gradients"], expected) < 1e-6
    assert largest_error(second["gradients"], first["gradients"]) == 0
    for process in on_two_processes["nothing left"]:
        assert all(bool((value == 0).all()) for value in process["changes"].values())


def test_only_one_process_writes_rollouts(on_two_processes: Any) -> None:
    first, second = on_two_processes["dapo"]
    assert len(first["groups"]) == 4 and second["groups"] == []


def test_processes_with_different_numbers_of_sequences_run_equally_many_passes(on_two_processes: Any) -> None:
    first, second = on_two_processes["one by one"]
    assert first["num_micro_batches"] == second["num_micro_batches"]
    # The long sequences fill one process's share, so it has fewer of them and repeats one that counts for nothing.
    assert first["num_fillers"] > 0 and second["num_fillers"] == 0


def test_without_the_number_of_processes_the_gradient_would_be_half(script: Any, on_two_processes: Any) -> None:
    step = on_two_processes["mean over ranks"][0]
    expected = formula_gradient(script, step)
    assert largest_error(step["gradients"], expected) == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("name", ["dapo", "everything"])
def test_two_processes_log_what_one_logs(take_step: Callable[..., Any], on_two_processes: Any, name: str) -> None:
    case = TWO_PROCESS_CASES[name]
    settings = case["settings"] | ({"gradient_accumulation_steps": 2} if name == "everything" else {})
    alone, together = take_step(moved=case.get("moved", False), **settings)["log"], on_two_processes[name][0]["log"]
    timed = ("seconds/", "rollout/")
    names = [key for key in alone if not key.startswith(timed)]
    assert names == [key for key in together if not key.startswith(timed)]
    assert {"loss", "entropy", "reward", "sampling/importance_sampling_ratio/mean"} <= set(names)
    for key in names:
        assert together[key] == pytest.approx(alone[key], rel=1e-5, abs=1e-7), key


def test_a_reward_that_fails_ends_both_processes_each_with_an_error(on_two_processes: Any) -> None:
    first, second = on_two_processes["failing reward"]
    assert first["error"] == "RewardError" and "this reward fails in training" in first["message"]
    assert second["error"] == "RankZeroFailedError" and "this reward fails in training" in second["message"]
