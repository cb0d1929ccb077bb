"""SagaRequestRouter: our placement as a request router class of Ray Serve (Ray 2.60 or later)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from vllm_saga.policy.clients import Rules
from vllm_saga.ray.dispatch import Dispatch, Placed
from vllm_saga.ray.requests import read, tell
from vllm_saga.router.edge import Edge
from vllm_saga.router.placement import Settings, make_placer
from vllm_saga.router.settings import RouterSettings

# Ray Serve configures this one.
logger = logging.getLogger("ray.serve")

DEFAULTS = RouterSettings()
_DIRECT = "RAY_SERVE_LLM_ENABLE_DIRECT_STREAMING"


class SagaRequestRouter(RequestRouter):
    """Sessions stay on the replica that holds their KV; new ones go where they fit best.

    `RequestRouterConfig(request_router_class="vllm_saga.ray.request_router.SagaRequestRouter")` in
    the `deployment_config` of an `LLMConfig`, `server_cls="vllm_saga.ray.server.SagaLLMServer"`
    beside it: then it knows what each engine holds, and how much it can. Whose a call is follows
    the rules of `vllm-saga router`, which it tells the engine, too.

    What it does not do, as Ray has no way for it:

    - Calls that an engine holds back are not moved to another one: Ray does not take a call back
      from its replica. A full replica keeps its sessions; only new ones go elsewhere.
    - No draining of its own: replicas that Ray stops leave at once for new calls, and their
      sessions are computed again elsewhere.
    - It does not see answers. A context is as long as its last prompt until the next one comes.
    - Each handle (each replica of Ray's ingress) has a router of its own, and they do not talk.
      They agree by rendezvous hashing and by the engines' reports, which are as old as
      `request_routing_stats_period_s`: a session whose first calls come to several ingress
      replicas within that time may be placed twice.
    - Locality and multiplexed models are not looked at: an adapter is loaded where its session is.
    - With direct streaming the router sees bodies and Ray's own session header, no other headers,
      and no ends of calls: load is then what sessions hold, and what engines report.
    """

    def initialize_state(
        self,
        policy: str = DEFAULTS.policy,
        session_headers: Sequence[str] = (),
        tenant_header: str = DEFAULTS.tenant_header,
        max_sessions: int = DEFAULTS.max_sessions,
        session_idle_s: float = DEFAULTS.session_idle,
        patience_s: float = 2.0,
    ) -> None:
        """Take `request_router_kwargs`; what they mean: `vllm-saga router --help`.

        patience_s: so long a call is meant for its session's replica although that one does not
        answer, or has `max_ongoing_requests`.

        Raises:
            ValueError: there is no such policy.
        """
        rules = Rules(tuple(header.lower() for header in session_headers), tenant_header.lower())
        limits = Settings(max_idle_sessions=max_sessions, session_idle_s=session_idle_s)
        self._dispatch = Dispatch(
            make_placer(policy, limits),
            Edge(rules, max_sessions, session_idle_s),
            patience_s,
            told_of_ends=os.environ.get(_DIRECT, "0") != "1",
        )
        self._bug_logged = False

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        # Or Ray asks again at once, and again, while the replica takes no call.
        pending_request.routing_context.should_backoff = True
        placed = self._try(self._place, pending_request)
        for replica in candidate_replicas:
            if placed is not None and replica.replica_id.unique_id == placed.replica:
                return [[replica]]
        return [candidate_replicas]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        stats = {replica.replica_id.unique_id: replica.routing_stats for replica in replicas}
        self._try(self._dispatch.update, stats, time.monotonic())
        super().update_replicas(replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._try(self._dispatch.remove, replica_id.unique_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._try(
            self._dispatch.finished, internal_request_id, replica_id.unique_id, time.monotonic()
        )

    def _place(self, pending: PendingRequest) -> Placed | None:
        metadata, now = pending.metadata, time.monotonic()
        call_id = metadata.internal_request_id
        asked = read(metadata.call_method, pending.args, getattr(metadata, "session_id", ""))
        placed = self._dispatch.place(call_id, asked, now)
        if placed is not None and placed.fresh:
            tell(pending.args, placed.recognised)
            pending.future.add_done_callback(partial(self._if_given_up, call_id))
        return placed

    def _if_given_up(self, call_id: str, future: Any) -> None:
        if future.cancelled():
            self._try(self._dispatch.given_up, call_id, time.monotonic())

    def _try(self, act: Callable[..., Any], *args: Any) -> Any:
        """A bug of ours costs affinity, never a call: the first one is logged."""
        try:
            return act(*args)
        except Exception:
            if not self._bug_logged:
                self._bug_logged = True
                logger.exception("saga: a bug in placement; Ray chooses where it shows")
            return None
