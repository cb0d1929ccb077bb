"""SagaScheduler: the policy joined to vLLM's own scheduler by a few small overrides."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from vllm_saga.config import SagaConfig, load_config
from vllm_saga.engine import compat, control, traces
from vllm_saga.engine.blocks import RetentionQueue
from vllm_saga.engine.hints import read_arrival
from vllm_saga.engine.memory import GraphFile, of_rank
from vllm_saga.engine.pacing import Pacer
from vllm_saga.engine.queue import WorkflowQueue
from vllm_saga.engine.stats import Reporter, is_heard, put
from vllm_saga.engine.timing import StepTimer
from vllm_saga.engine.tools import ToolReader
from vllm_saga.policy.hints import HintLimits, no_counts
from vllm_saga.policy.report import end_session, report, stock_report
from vllm_saga.policy.retention import UNOWNED, KeepRank
from vllm_saga.policy.saga import SagaPolicy
from vllm_saga.policy.workflow import Arrival

logger = init_logger("vllm.saga")

T = TypeVar("T")
# A mixin's `super()` is one of vLLM's schedulers, which only the subclasses below know.
_Upstream: Any = object


class SagaMixin(_Upstream):
    """Overrides for `Scheduler` and `AsyncScheduler` (vllm/v1/core/sched/scheduler.py).

    What must hold (CONTRIBUTING.md): nothing known or no pressure means stock's decisions; an
    exception in the policy is logged once and from then on the engine runs as stock.
    """

    # None while, or where, the engine schedules as stock does.
    saga: SagaPolicy | None = None
    waiting: RequestQueue

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        compat.check_classes()
        self._config = load_config(vllm_config.additional_config)
        super().__init__(vllm_config, *args, **kwargs)
        control.install()
        # Names this run of the engine with this KV: another value means that its KV was lost.
        self.started = uuid.uuid4().hex
        self.saga_failures = 0
        self._free_queue: RetentionQueue | None = None
        self._next_log = 0.0
        self._rank_epoch: tuple[int, int] | None = None
        self.hint_counts = no_counts()
        self._hint_limits = HintLimits(
            enabled=self._config.hints,
            max_ttl_s=self._config.max_hint_s,
            max_gap_s=self._config.max_hint_s,
        )
        self._timer = StepTimer()
        self._pacer = Pacer(self)
        self._reporter = Reporter() if is_heard() else None
        self._graph_file: GraphFile | None = None
        self._traces: traces.Traces | None = None
        if not self.cache_config.enable_prefix_caching:
            logger.warning(
                "saga: prefix caching is off, so there is no KV to keep between calls: "
                "scheduling as stock vLLM does. Remove --no-enable-prefix-caching to use saga."
            )
            return
        compat.check_instance(self)
        self._install(self._config)

    def _install(self, config: SagaConfig) -> None:
        pool = self.kv_cache_manager.block_pool
        usable = self._usable_blocks()
        saga = SagaPolicy(config, usable, self.hash_block_size)
        self._tool_reader = ToolReader(self.vllm_config.model_config, config.tool_patterns)
        if config.graph_path is not None:
            rank = self.vllm_config.parallel_config.data_parallel_index
            self._graph_file = GraphFile(of_rank(config.graph_path, rank), config.graph_save_s)
            self._graph_file.load(saga.classes)
        self._traces = traces.start(self.vllm_config, saga, self.started)
        self.saga = saga
        if not isinstance(self.waiting, WorkflowQueue):
            self.waiting = WorkflowQueue(self.policy, self._is_held)
        self._held_queue = self.waiting
        if hasattr(self, "skipped_waiting"):  # vLLM <= 0.28
            self.skipped_waiting = WorkflowQueue(self.policy, lambda request: False)
        if config.retention != "stock":
            if not isinstance(pool.free_block_queue, RetentionQueue):
                pool.free_block_queue = RetentionQueue(pool.free_block_queue, self._keep_ranks)
            self._free_queue = pool.free_block_queue
        hooks = f", hooks: {', '.join(sorted(compat.HOOKS))}" if compat.HOOKS else ""
        logger.info("saga: on, %d KV blocks of %d tokens%s", usable, self.hash_block_size, hooks)

    def _usable_blocks(self) -> int:
        return int((self.kv_cache_manager.block_pool.num_gpu_blocks - 1) / self._blocks_per_hash())

    def _blocks_per_hash(self) -> float:
        """Pool blocks behind one block hash: one for each group of layers that keeps all KV."""
        parallel = getattr(self, "dcp_world_size", 1) * getattr(self, "pcp_world_size", 1)
        sizes = [g.kv_cache_spec.block_size for g in self.kv_cache_config.kv_cache_groups]
        return max(sum(self.hash_block_size / (size * parallel) for size in sizes), 1e-6)

    # -- vLLM's hooks ---------------------------------------------------------------------------

    # The first three are called only by a vLLM with patches/, the fourth by others through us.

    def _create_waiting_queue(self) -> RequestQueue:
        if not self.cache_config.enable_prefix_caching:
            return super()._create_waiting_queue()
        return WorkflowQueue(self.policy, self._is_held)

    def _create_free_block_queue(self, default: FreeKVCacheBlockQueue) -> FreeKVCacheBlockQueue:
        if not self.cache_config.enable_prefix_caching or self._config.retention == "stock":
            return super()._create_free_block_queue(default)
        return RetentionQueue(default, self._keep_ranks)

    def _select_preemption_victim(self, request: Request) -> Request:
        victim = None
        if self.policy is SchedulingPolicy.FCFS:
            victim = self._guarded(self._least_wanted)
        return super()._select_preemption_victim(request) if victim is None else victim

    def on_request_finished(self, request: Request) -> None:
        if self.saga is None:
            return
        self._guarded(
            lambda saga: saga.on_finish(
                request.request_id, request.num_tokens, self._now(), self._tools_of(request)
            )
        )
        self._trace(request)
        if not self.requests:
            self._save_graph(self._now(), idle=True)

    def add_request(self, request: Request) -> None:
        if self.saga is not None and self._is_plain(request):
            self._guarded(lambda saga: saga.on_arrival(self._arrival(saga, request), self._now()))
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self.saga is not None:
            self._before_step()
        elif self.saga_failures:
            # Not at the failure: the head of the queue must not change within a step.
            self._held_queue.release_all()
        limits = self._guarded(self._pacer.limits)
        if limits is not None and self.policy is SchedulingPolicy.FCFS and not self._is_tight():
            self._pacer.shortest_first()
        with self._pacer.within(limits):
            output = super().schedule(*args, **kwargs)
        if self.saga is not None:
            self._guarded(lambda saga: self._note_scheduled(saga, output))
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, *args: Any, **kw: Any) -> Any:
        if self.saga is not None:
            now = self._now()
            self._guarded(lambda saga: self._timer.finished(scheduler_output, now, saga.cost))
        return super().update_from_output(scheduler_output, *args, **kw)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        result = super()._free_request(request, *args, **kwargs)
        if "on_request_finished" not in compat.HOOKS:
            self.on_request_finished(request)
        return result

    def _free_request_blocks(self, request: Request) -> Any:
        if self._free_queue is not None and self.saga is not None:
            self._guarded(lambda saga: self._claim_blocks(saga, request))
        return super()._free_request_blocks(request)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        done = super().reset_prefix_cache(*args, **kwargs)
        if done:
            self.started = uuid.uuid4().hex
        if done and self.saga is not None:
            if self._free_queue is not None:
                self._free_queue.disown_all()
            self._guarded(lambda saga: saga.reset(self._now()))
        return done

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self._reporter is not None:
            self._report(self._reporter, stats)
        return stats

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        file = self._graph_file
        if file is not None:
            self._guarded(lambda saga: file.save_now(saga.classes))
        if self._traces is not None:
            self._traces.close(self.saga, self._now())
        super().shutdown(*args, **kwargs)

    def _select_waiting_queue_for_scheduling(self) -> RequestQueue | None:
        # vLLM <= 0.28 only: there the emptiness of a queue is asked by its length.
        for queue in (self.skipped_waiting, self.waiting):
            if queue:
                return queue
        return None

    # -- asked from outside ---------------------------------------------------------------------

    def saga_control(self, op: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Answer a message (engine/control.py)."""
        now = self._now()
        if op == control.STATE:
            running, waiting = self.get_request_counts()
            counts = {"started": self.started, "running": running, "waiting": waiting}
            told = self._guarded(lambda saga: report(saga, now))
            return counts | (self._stock_report() if told is None else told)
        if op in (control.WORKFLOWS, control.WORKFLOW, control.PAST):
            return self._explain(op, payload, now)
        tenant, session = control.read_end(op, payload)
        ended = self._guarded(lambda saga: end_session(saga, tenant, session, now))
        self._trace()
        return {"ended": bool(ended)}

    def _explain(self, op: str, payload: Mapping[str, Any], now: float) -> dict[str, Any]:
        """Not guarded: it changes nothing, so a fault in it ends the question, not the policy."""
        running = {request.request_id for request in self.running}
        return control.explain(self.saga, op, payload, now, running, len(self.waiting))

    def _stock_report(self) -> dict[str, Any]:
        kv_tokens = self._usable_blocks() * self.hash_block_size
        return stock_report(kv_tokens, int(kv_tokens * self.kv_cache_manager.usage))

    # -- inside ---------------------------------------------------------------------------------

    def _is_plain(self, request: Request) -> bool:
        """Not a chunk of a streaming input, nor a hand-over of KV that another engine waits for."""
        new = request.request_id not in self.requests and not request.resumable
        return new and not request.kv_transfer_params

    def _arrival(self, saga: SagaPolicy, request: Request) -> Arrival:
        by_priority = self.policy is SchedulingPolicy.PRIORITY
        source = saga.config.tenant_source
        return read_arrival(request, by_priority, self.hint_counts, self._hint_limits, source)

    def _note_scheduled(self, saga: SagaPolicy, output: SchedulerOutput) -> None:
        for new in output.scheduled_new_reqs:
            saga.on_scheduled(new.req_id, new.num_computed_tokens)
        self._timer.scheduled(output, self.requests, self._now())

    def _tools_of(self, request: Request) -> Sequence[str] | None:
        """The tools that a finished call's output calls; None where that cannot be known."""
        if request.status is RequestStatus.FINISHED_ABORTED:
            return None
        return self._tool_reader.names(request.output_token_ids)

    def _before_step(self) -> None:
        now = self._now()
        self._guarded(lambda saga: self._held_queue.release(saga.on_step(now)))
        if self._free_queue is not None:
            epoch = self._guarded(lambda saga: saga.rank_epoch(now))
            if epoch != self._rank_epoch:
                self._rank_epoch = epoch
                self._free_queue.new_epoch()
        if "_select_preemption_victim" not in compat.HOOKS:
            self._order_victims()
        if now >= self._next_log:
            self._guarded(lambda saga: self._log_state(saga, now))
        self._trace()
        self._save_graph(now, idle=False)

    def _save_graph(self, now: float, idle: bool) -> None:
        file = self._graph_file
        if file is not None:
            self._guarded(lambda saga: file.maybe_save(saga.classes, now, idle))

    def _report(self, reporter: Reporter, stats: Any) -> None:
        now = self._now()
        if not reporter.is_due(now, idle=not self.requests):
            return
        try:
            put(reporter.make(self.saga, self.hint_counts, self.saga_failures, now), stats)
        except Exception:
            self._reporter = None
            logger.exception("saga: no metrics from here on. Please report this.")

    def _trace(self, request: Request | None = None) -> None:
        """request: the one that has just ended, if one has."""
        if self._traces is not None and self.saga is not None:
            idle = not self.requests
            self._traces.follow(self.saga.timeline, self._now(), request, idle)

    def _is_tight(self) -> bool:
        """Whether this step may have to preempt: about one new block per running call."""
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return free < 2 * len(self.running)

    def _order_victims(self) -> None:
        if self.policy is SchedulingPolicy.FCFS and self._is_tight():
            self._guarded(self._sort_victims)

    def _sort_victims(self, saga: SagaPolicy) -> None:
        # Stock preempts the tail of the list.
        if saga.residency.residents:
            self.running.sort(key=lambda request: saga.running_rank(request.request_id))

    def _least_wanted(self, saga: SagaPolicy) -> Request | None:
        """The tail of the running calls, if they were in the order of `_sort_victims`."""
        if not saga.residency.residents:
            return None
        calls = reversed(self.running)
        return max(calls, key=lambda request: saga.running_rank(request.request_id))

    def _claim_blocks(self, saga: SagaPolicy, request: Request) -> None:
        owner = saga.owner(request.request_id)
        groups = self.kv_cache_manager.get_blocks(request.request_id).blocks
        if owner is not None and self._free_queue is not None and any(groups):
            self._free_queue.claim(itertools.chain.from_iterable(groups), owner)

    def _is_held(self, request: Request) -> bool:
        return bool(self._guarded(lambda saga: saga.is_held(request.request_id)))

    def _keep_ranks(self, owners: Sequence[Any]) -> Sequence[KeepRank]:
        ranks = self._guarded(lambda saga: self._ranks_of(saga, owners))
        return [UNOWNED] * len(owners) if ranks is None else ranks

    def _ranks_of(self, saga: SagaPolicy, owners: Sequence[Any]) -> Sequence[KeepRank]:
        ranks = saga.keep_ranks(owners, self._now())
        if len(ranks) != len(owners):
            # Told here, where it is guarded: who asks is in the middle of an eviction.
            raise ValueError(f"{len(ranks)} keep ranks for {len(owners)} owners")
        return ranks

    def _guarded(self, action: Callable[[SagaPolicy], T]) -> T | None:
        """Run policy code; if it fails, log once and let stock take over (invariant 4)."""
        if self.saga is None:
            return None
        try:
            return action(self.saga)
        except Exception:
            self.saga_failures += 1
            self.saga = None
            logger.exception(
                "saga: the policy failed; this engine now schedules as stock vLLM does until it "
                "is restarted. Please report this."
            )
            if self._free_queue is not None:
                self._free_queue.disown_all()
            return None

    def _log_state(self, saga: SagaPolicy, now: float) -> None:
        interval = saga.config.log_interval_s
        if interval and self.requests:
            hints = {f"hints_{name}": count for name, count in self.hint_counts.items() if count}
            state = {**saga.state(), **hints}
            logger.info("saga: %s", " ".join(f"{k}={v}" for k, v in state.items()))
        self._next_log = now + (interval or float("inf"))

    def _now(self) -> float:
        return time.monotonic()


class SagaSyncScheduler(SagaMixin, Scheduler):
    """Saga over vLLM's synchronous scheduler."""


class SagaAsyncScheduler(SagaMixin, AsyncScheduler):
    """Saga over vLLM's asynchronous (overlapping) scheduler."""


class SagaScheduler:
    """What `--scheduler-cls` names: makes the scheduler that fits vLLM's `async_scheduling`."""

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        overlapping = vllm_config.scheduler_config.async_scheduling
        chosen: type = SagaAsyncScheduler if overlapping else SagaSyncScheduler
        return chosen(vllm_config, *args, **kwargs)
