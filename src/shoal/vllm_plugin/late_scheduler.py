"""A scheduler that learns of several tokens of a request at once.

Why, and what it saves: docs/decisions/0017.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shoal import vllm_compat
from shoal.vllm_plugin.steady import SteadyRequests
from shoal.vllm_plugin.untold import StepTokens, UntoldTokens


class LateScheduler:
    """Goes before vLLM's scheduler class where that `is_told_late`, after `HoldingScheduler`.

    It tells of a request's tokens what may end it, of all requests whatever is due to the front ends, and of all before
    anything else may happen to one.
    """

    _shoal_is_due = True  # until `HoldingScheduler` knows better

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._shoal_untold = UntoldTokens()
        self._shoal_last_step: tuple[Any, Any] = (None, None)
        self._shoal_unsent: list[dict[int, Any]] = []
        self._shoal_steady: SteadyRequests | None = None
        self._shoal_steps_of = vllm_compat.steady_steps(self)

    def add_request(self, request: Any) -> None:
        """Take a request in."""
        super().add_request(request)  # type: ignore[misc]
        stops = vllm_compat.stops_of(request) if vllm_compat.may_hold(request) else None
        if stops is not None:
            takes_logprobs = request.sampling_params.num_logprobs is not None
            self._shoal_untold.open(request.request_id, stops=stops, takes_logprobs=takes_logprobs)

    def finish_requests(self, *args: Any, **options: Any) -> Any:
        """End requests from outside: nobody hears of them any more."""
        ended = super().finish_requests(*args, **options)  # type: ignore[misc]
        alive = self.requests  # type: ignore[attr-defined]
        self._shoal_untold.forget(alive)
        for messages in self._shoal_unsent:
            for message in messages.values():
                message.outputs = [output for output in message.outputs if output.request_id in alive]
        return ended

    def schedule(self, *args: Any, **options: Any) -> Any:
        """Plan a step, of which vLLM looks only at requests that are not steady, where none waits or is in its way."""
        running = self.running  # type: ignore[has-type]
        is_alone = len(self.requests) == len(running)  # type: ignore[attr-defined]
        if not is_alone:
            self._shoal_tell_all()  # whoever waits may have been preempted, and goes on from what is known of it
        steady = self._shoal_steady if is_alone and not (any(args) or any(options.values())) else None
        if steady is None or len(steady) != len(running) or not vllm_compat.is_unpaused(self):
            output = super().schedule(*args, **options)  # type: ignore[misc]
            self._shoal_steady = self._shoal_find_steady(output) if is_alone else None
            return output
        looked_at = steady.begin_step()
        if vllm_compat.num_free_blocks(self) < len(looked_at):  # somebody may be preempted
            self._shoal_steady = None
            return super().schedule(*args, **options)  # type: ignore[misc]
        self.running = looked_at
        try:
            output = super().schedule(*args, **options)  # type: ignore[misc]
        finally:
            self.running = running
        vllm_compat.give_token_each(output, steady.steady)
        steady.end_step()
        return output

    def reset_prefix_cache(self, *args: Any, **options: Any) -> Any:
        """Empty the prefix cache, which may preempt all that run."""
        self._shoal_tell_all()
        return super().reset_prefix_cache(*args, **options)  # type: ignore[misc]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        """Return the messages to the front ends that a step brings about.

        A told output's `new_logprobs` is the `Untold` that it was.
        """
        urgent = self._shoal_take(scheduler_output, model_runner_output)
        if urgent is None:
            self._shoal_tell_all()
            messages: dict[int, Any] = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
            self._shoal_expect(scheduler_output.num_scheduled_tokens)
        else:
            self._shoal_last_step = scheduler_output, model_runner_output
            names = self._shoal_untold.names if self._shoal_is_due else urgent
            messages = self._shoal_tell(names, is_step=True)
        unsent, self._shoal_unsent = self._shoal_unsent, []
        for earlier in unsent:
            for client, message in earlier.items():
                if client in messages:
                    message.outputs += messages[client].outputs
                    messages[client].outputs = message.outputs
                else:
                    messages[client] = message
        return messages

    def _shoal_take(self, scheduler_output: Any, model_runner_output: Any) -> list[str] | None:
        """Keep what a step has brought, if that may be kept; return who has to be told of it at once."""
        if not vllm_compat.is_plain_decode(scheduler_output, model_runner_output):
            return None
        lists = model_runner_output.logprobs
        step = StepTokens(
            names=scheduler_output.num_scheduled_tokens,
            rows=model_runner_output.req_id_to_index,
            token_ids=model_runner_output.sampled_token_ids,
            logprobs=None if lists is None else lists.logprobs,
            ranks=None if lists is None else lists.ranks,
        )
        return self._shoal_untold.take(step, self.requests)  # type: ignore[attr-defined]

    def _shoal_find_steady(self, output: Any) -> SteadyRequests | None:
        """Return the requests that run by how long they are steady, once all of them have done their prompts.

        What is left of a prompt would be given all the room that a step has.
        """
        running = self.running
        if self._shoal_steps_of is None or vllm_compat.has_new(output) or not all(map(vllm_compat.writes, running)):
            return None
        return SteadyRequests(running, self._shoal_steps_of)

    def _shoal_tell_all(self) -> None:
        """Have nothing untold, between two steps."""
        if names := self._shoal_untold.names:
            self._shoal_unsent.append(self._shoal_tell(names, is_step=False))

    def _shoal_tell(self, names: Iterable[str], *, is_step: bool) -> dict[int, Any]:
        told = self._shoal_untold.tell(names)
        tokens = {name: untold.token_ids for name, untold in told.items()}
        messages: dict[int, Any] = super().update_from_output(  # type: ignore[misc]
            *vllm_compat.told_at_once(*self._shoal_last_step, tokens, is_step=is_step)
        )
        for message in messages.values():
            for output in message.outputs:
                untold = told.get(output.request_id)
                if untold is not None and untold.logprobs:
                    output.new_logprobs = untold
        self._shoal_expect(told)
        return messages

    def _shoal_expect(self, names: Iterable[str]) -> None:
        """After these were told of something: note when each will end, or that it has."""
        for name in names:
            request = self.requests.get(name)  # type: ignore[attr-defined]
            if request is None:
                self._shoal_untold.close(name)
                if self._shoal_steady is not None:
                    self._shoal_steady.drop(name)
            else:
                self._shoal_untold.expect(name, vllm_compat.tokens_left(self, request))

    def _update_request_with_output(self, request: Any, new_token_ids: list[int], **options: Any) -> Any:
        """Enter a request's tokens. Of those told at once only the last can end it."""
        *before, last = new_token_ids
        if before and not any(options.values()):  # `is_stale` (0.32): it was preempted, and waits for none of them
            vllm_compat.enter(request, before)
            entered, ends = super()._update_request_with_output(request, [last], **options)  # type: ignore[misc]
            return [*before, *entered], ends
        return super()._update_request_with_output(request, new_token_ids, **options)  # type: ignore[misc]
