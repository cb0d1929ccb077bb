"""One engine on the virtual clock: a real vLLM scheduler, its model replaced by a cost model."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_saga.simulator import lookups
from vllm_saga.simulator.content import CallContent
from vllm_saga.simulator.cruise import Cruise, plan
from vllm_saga.simulator.hardware import Batch, Hardware
from vllm_saga.simulator.identity import name_session
from vllm_saga.simulator.records import LiveCall

# How often an engine with nothing but held calls looks again; vLLM's own loop never rests.
_POLL_S = 0.02


@dataclass(slots=True)
class KVTime:
    """Integrals of the KV pool's use, in token-seconds.

    running: blocks of calls in flight. cached: free blocks whose content is still known. held_hit:
    the part of `cached` that a later call found.
    """

    running: float = 0.0
    cached: float = 0.0
    held_hit: float = 0.0


@dataclass(slots=True)
class _Step:
    """A step the model works on: what was scheduled, and when it will be ready."""

    output: Any
    samples: list[tuple[str, bool]]
    end_s: float


@dataclass(slots=True)
class _InFlight:
    call: LiveCall
    request: Request
    content: CallContent
    made: int = 0


class PolicyFailed(RuntimeError):
    """A run would be stock's from here on, under saga's name."""


class Replica:
    """Runs calls through one scheduler; `due_s` says when `advance` wants to be called next.

    An asynchronous scheduler works one step ahead of the model, as vLLM's engine core does: step
    k+1 is scheduled while step k computes, and sees the outputs of step k-1. With `cruises`,
    stretches of pure decode are scheduled at once (cruise.py).
    """

    def __init__(
        self,
        scheduler: Any,
        hardware: Hardware,
        *,
        overlapping: bool,
        cruises: bool,
        on_finish: Callable[[LiveCall], None],
        before_step: Callable[[], None],
        acts_at: Callable[[], float],
    ) -> None:
        self.scheduler = scheduler
        self.hardware = hardware
        self.due_s = math.inf
        self.kv_time = KVTime()
        self.steps = 0
        self.schedulings = 0
        self.preemptions = 0
        self.scheduler_wall_s = 0.0
        self._depth = 2 if overlapping else 1
        self._cruises = cruises
        self._cruise: Cruise | None = None
        self._on_finish = on_finish
        self._before_step = before_step
        self._acts_at = acts_at
        # Whether the last step let nobody in of those who wait, and nothing has changed since.
        self._refuses = False
        self._now = 0.0
        self._steps: deque[_Step] = deque()
        self._calls: dict[str, _InFlight] = {}
        self._lookups = lookups.install(scheduler)
        # SagaScheduler's clock.
        scheduler._now = lambda: self._now

    @property
    def calls_in_flight(self) -> int:
        return len(self._calls)

    def submit(
        self,
        call: LiveCall,
        content: CallContent,
        now: float,
        extra_args: dict[str, Any] | None = None,
        session_id: str | None = None,
        **options: Any,
    ) -> None:
        """A call reaches the engine. options: `cache_salt`, `priority`."""
        named, extra_args = name_session(session_id, extra_args)
        self.settle(now)
        self._account(now)
        request = Request(
            request_id=call.id,
            prompt_token_ids=content.prompt,
            sampling_params=SamplingParams(
                max_tokens=len(content.output), ignore_eos=True, extra_args=extra_args
            ),
            pooling_params=None,
            arrival_time=now,
            block_hasher=content.block_hasher,
            **named,
            **options,
        )
        self._calls[call.id] = _InFlight(call, request, content)
        self.scheduler.add_request(request)
        self._refuses = False
        if not self._steps:
            self.due_s = now

    def withdraw(self, call: LiveCall) -> CallContent:
        """Take back a call that was never scheduled; its content can be submitted elsewhere."""
        content = self._calls.pop(call.id).content
        self.scheduler.finish_requests(call.id, RequestStatus.FINISHED_ABORTED)
        self._refuses = False
        return content

    def advance(self, now: float) -> None:
        """Take the results of steps that are ready, and schedule the next ones."""
        self.settle(now)
        if getattr(self.scheduler, "saga_failures", 0):
            raise PolicyFailed("saga's policy failed: its error is above; stock would go on alone")
        self._account(now)
        while self._steps and self._steps[0].end_s <= now:
            self._collect(self._steps.popleft())
        while len(self._steps) < self._depth and self.scheduler.has_unfinished_requests():
            if not self._schedule(now):
                break
        if self._steps:
            if self._cruises and len(self._steps) == self._depth:
                self._cruise = plan(
                    self.scheduler,
                    self.hardware,
                    [step.end_s for step in self._steps],
                    self._left(),
                    self._lookups if self._refuses else None,
                    self._acts_at(),
                )
            self.due_s = self._cruise.due_s if self._cruise else self._steps[0].end_s
        else:
            waiting = self.scheduler.has_unfinished_requests()
            self.due_s = now + _POLL_S if waiting else math.inf

    def settle(self, now: float) -> None:
        """Schedule what went by without it: be where stepwise scheduling would be before `now`."""
        cruise, self._cruise = self._cruise, None
        if cruise is None:
            return
        done, depth, ends = cruise.finished_before(now), cruise.in_flight, cruise.ends
        for _ in range(min(done, depth)):
            self._account(self._steps[0].end_s)
            self._collect(self._steps.popleft())
        if done > depth:
            self._jump(done - depth, ends[done - 1])
        for index in range(max(done, depth), done + depth):
            self._schedule(ends[index - 1])
        self.due_s = self._steps[0].end_s

    def kv_tokens(self) -> tuple[int, int]:
        """Tokens of KV now: (of calls in flight, free but still known)."""
        pool = self.scheduler.kv_cache_manager.block_pool
        in_use = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
        # Of a running call all blocks but the last are known.
        known = max(len(pool.cached_block_hash_to_block) - max(in_use - len(self._calls), 0), 0)
        size = self.hardware.block_size
        return in_use * size, min(known, pool.get_num_free_blocks()) * size

    # -- inside ---------------------------------------------------------------------------------

    def _schedule(self, now: float) -> bool:
        """Schedule one step; returns whether the model has something to do."""
        self._before_step()
        output = self._timed(self.scheduler.schedule)
        for new in output.scheduled_new_reqs:
            self._note_hit(self._calls[new.req_id].call, new.num_computed_tokens, now)
        self._refuses = _let_nobody_in(output)
        requests = self.scheduler.requests
        samples = [(rid, not requests[rid].is_prefill_chunk) for rid in output.num_scheduled_tokens]
        start = self._steps[-1].end_s if self._steps else now
        if output.total_num_scheduled_tokens:
            self.steps += 1
            end = start + self.hardware.step_s(self._batch(output))
            self._steps.append(_Step(output, samples, end))
            return True
        step = _Step(output, samples, start)
        if self._steps:
            self._steps.append(step)
        else:
            self._collect(step)
        return False

    def _timed(self, schedule: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        output = schedule()
        self.scheduler_wall_s += time.perf_counter() - began
        self.schedulings += 1
        return output

    def _left(self) -> dict[str, int]:
        """Output tokens that calls in flight lack once the steps in flight are done."""
        left = {
            request.request_id: len(flight.content.output) - flight.made
            for request in self.scheduler.running
            if (flight := self._calls.get(request.request_id)) is not None
        }
        for step in self._steps:
            for request_id, due in step.samples:
                if due and request_id in left:
                    left[request_id] -= 1
        return left

    def _jump(self, count: int, end_s: float) -> None:
        """Schedule `count` decode steps at once, the last of which ended at `end_s`."""
        before = self.kv_tokens()
        for request in self.scheduler.running:
            request.spec_token_ids = [0] * (count - 1)
        # vLLM's own, and nobody waits: none is let in before the stretch is over.
        waiting, self.scheduler.waiting = self.scheduler.waiting, FCFSRequestQueue()
        output = self._timed(lambda: Scheduler.schedule(self.scheduler))
        self.scheduler.waiting = waiting
        scheduled = output.num_scheduled_tokens
        if any(tokens != count for tokens in scheduled.values()):
            raise RuntimeError(f"not {count} decode steps: {scheduled}")
        self.steps += count
        after = self.kv_tokens()
        passed = end_s - self._now
        self.kv_time.running += passed * (before[0] + after[0]) / 2
        self.kv_time.cached += passed * (before[1] + after[1]) / 2
        self._collect(_Step(output, [(request_id, True) for request_id in scheduled], end_s), count)

    def _batch(self, output: Any) -> Batch:
        requests = self.scheduler.requests
        new = pairs = kv = 0
        scheduled = output.num_scheduled_tokens
        for request_id, count in scheduled.items():
            # Counted as computed as soon as it is scheduled.
            after = requests[request_id].num_computed_tokens
            new += count
            kv += after
            pairs += count * after - count * (count - 1) // 2
        return Batch(new, len(scheduled), pairs, kv)

    def _collect(self, step: _Step, tokens: int = 1) -> None:
        """Hand the step's tokens, so many a call, to the scheduler, as the model runner would."""
        self._now = max(self._now, step.end_s)
        runner = ModelRunnerOutput(
            req_ids=[request_id for request_id, _ in step.samples],
            req_id_to_index={rid: index for index, (rid, _) in enumerate(step.samples)},
            sampled_token_ids=[
                self._sample(rid, tokens) if due else [] for rid, due in step.samples
            ],
        )
        began = time.perf_counter()
        results = self.scheduler.update_from_output(step.output, runner)
        self.scheduler_wall_s += time.perf_counter() - began
        for result in results.values():
            for item in result.outputs:
                self._deliver(item, step.end_s)

    def _sample(self, request_id: str, count: int) -> list[int]:
        flight = self._calls.get(request_id)
        if flight is None:
            return [0] * count
        first = min(flight.made, len(flight.content.output) - count)
        return flight.content.output[first : first + count]

    def _deliver(self, item: Any, now: float) -> None:
        flight = self._calls[item.request_id]
        if item.new_token_ids and not flight.made:
            flight.call.first_token_s = now
        flight.made += len(item.new_token_ids)
        if item.finish_reason is not None:
            del self._calls[item.request_id]
            self._refuses = False
            self.preemptions += flight.request.num_preemptions
            flight.call.finished_s = now
            self._on_finish(flight.call)

    def _note_hit(self, call: LiveCall, tokens: int, now: float) -> None:
        if call.cached_tokens < 0:
            call.cached_tokens = tokens
            if call.thread.last is not None:
                self.kv_time.held_hit += tokens * (now - call.thread.idle_since)

    def _account(self, now: float) -> None:
        """Bring the integrals up to `now`; nothing has changed since the last time."""
        if now > self._now:
            running, cached = self.kv_tokens()
            self.kv_time.running += running * (now - self._now)
            self.kv_time.cached += cached * (now - self._now)
            self._now = now


def _let_nobody_in(output: Any) -> bool:
    """Whether a step took nobody in and threw nobody out, though it had tokens left."""
    only_decodes = output.total_num_scheduled_tokens == len(output.num_scheduled_tokens)
    return only_decodes and not (
        output.scheduled_new_reqs
        or output.scheduled_cached_reqs.resumed_req_ids
        or output.preempted_req_ids
    )
