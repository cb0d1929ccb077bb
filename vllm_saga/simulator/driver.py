"""Drives a real vLLM scheduler without a model: fabricated tokens, virtual clock."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from vllm_saga.simulator.identity import name_session
from vllm_saga.simulator.schedulers import BLOCK_SIZE

HASHER = get_request_block_hasher(BLOCK_SIZE, sha256)


def make_request(
    request_id: str,
    tokens: list[int],
    output: int,
    *,
    session_id: str | None = None,
    priority: int = 0,
    arrival_time: float = 0.0,
    stop_token_ids: list[int] | None = None,
    **extra: Any,
) -> Request:
    named, extra_args = name_session(session_id, extra)
    params = SamplingParams(
        max_tokens=output,
        ignore_eos=True,
        extra_args=extra_args,
        stop_token_ids=stop_token_ids or [],
    )
    return Request(
        request_id=request_id,
        prompt_token_ids=list(tokens),
        sampling_params=params,
        pooling_params=None,
        arrival_time=arrival_time,
        priority=priority,
        block_hasher=HASHER,
        **named,
    )


@dataclass
class Driver:
    """One engine: `step()` schedules, makes tokens by a rule, and hands them back.

    The token rule is a function of position, so that a request's output is the same under every
    scheduler. Overlapping schedulers run one step ahead, as vLLM's engine core does.
    """

    scheduler: Any
    now: float = 0.0
    outputs: dict[str, list[int]] = field(default_factory=dict)
    finished: list[str] = field(default_factory=list)
    steps: int = 0
    in_flight: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler._now = lambda: self.now

    def add(self, request: Request) -> None:
        self.outputs[request.request_id] = []
        self.scheduler.add_request(request)

    def abort(self, request_id: str) -> None:
        self.scheduler.finish_requests(request_id, RequestStatus.FINISHED_ABORTED)

    def step(self) -> Any:
        """One engine iteration; returns the SchedulerOutput."""
        depth = 2 if isinstance(self.scheduler, AsyncScheduler) else 1
        output = self.scheduler.schedule()
        self.steps += 1
        self.in_flight.append((output, self._rows(output)))
        keep = depth - 1 if output.num_scheduled_tokens else 0
        while len(self.in_flight) > keep:
            self._collect_oldest()
        return output

    def drain(self, max_steps: int, dt: float = 0.01) -> None:
        """Step until nothing is left; AssertionError if that takes more than `max_steps`."""
        for _ in range(max_steps):
            if not self.scheduler.has_unfinished_requests() and not self.in_flight:
                return
            self.step()
            self.now += dt
        raise AssertionError(f"not drained after {max_steps} steps")

    def _rows(self, output: Any) -> list[tuple[str, bool]]:
        requests = self.scheduler.requests
        return [(rid, not requests[rid].is_prefill_chunk) for rid in output.num_scheduled_tokens]

    def _collect_oldest(self) -> None:
        output, rows = self.in_flight.pop(0)
        runner = ModelRunnerOutput(
            req_ids=[rid for rid, _ in rows],
            req_id_to_index={rid: index for index, (rid, _) in enumerate(rows)},
            sampled_token_ids=[self._sample(rid) if samples else [] for rid, samples in rows],
        )
        for result in self.scheduler.update_from_output(output, runner).values():
            for item in result.outputs:
                self.outputs[item.request_id] += item.new_token_ids
                if item.finish_reason is not None:
                    self.finished.append(item.request_id)

    def _sample(self, request_id: str) -> list[int]:
        position = len(self.outputs[request_id])
        return [(hash(request_id) + 7 * position) % 400 + 50]
