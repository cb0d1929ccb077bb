"""Workflows, calls and holds as OpenTelemetry spans. Needs its SDK: imported where traces are on.

A trace's id is the digest of the tenant (by the name that others know), the root session's id and
the UTC day on which the engine saw the workflow begin. So engines that share a workflow, behind a
router or one for each of its models, need no word between them to write one trace; each adds a
span "workflow" for its part. Its price: a session id that is used again on the same day continues
its trace, and a workflow that moves to another engine across midnight has two. Span ids hold what
only this run of the engine knows, so no two are alike.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from vllm_saga.policy.identity import anonymous_id
from vllm_saga.policy.timeline import Event, PastCall, PastWorkflow
from vllm_saga.policy.workflow import SessionKey

WORKFLOW, CALL, HELD = "workflow", "call", "held"

_PROTOCOL_VARIABLE = "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
_DAY_S = 86_400
_SAMPLED = trace.TraceFlags(trace.TraceFlags.SAMPLED)

Attributes = dict[str, str | int | float | bool]


def make_exporter(endpoint: str) -> SpanExporter:
    """An exporter over the protocol that vLLM's own traces take (vllm/tracing/otel.py).

    Raises:
        ValueError: OTEL_EXPORTER_OTLP_TRACES_PROTOCOL is neither grpc nor http/protobuf.
    """
    protocol = os.environ.get(_PROTOCOL_VARIABLE, "grpc")
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (
            OTLPSpanExporter as GrpcExporter,
        )

        return GrpcExporter(endpoint=endpoint, insecure=not endpoint.startswith("https://"))
    if protocol == "http/protobuf":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (
            OTLPSpanExporter as HttpExporter,
        )

        return HttpExporter(endpoint=endpoint)
    raise ValueError(f"{_PROTOCOL_VARIABLE}={protocol}: neither grpc nor http/protobuf")


class SpanMaker:
    """Makes the spans of events. For one thread.

    Args:
        run: names this run of the engine.
        public: a session's key without secrets.
        resource: attributes of the engine, beside those of OTEL_RESOURCE_ATTRIBUTES and
            OTEL_SERVICE_NAME. OTEL_TRACES_SAMPLER decides for whole workflows, on all engines
            alike where it goes by trace ids.
    """

    def __init__(
        self, run: str, public: Callable[[SessionKey], SessionKey], resource: Mapping[str, Any]
    ) -> None:
        self._run = run
        self._public = public
        self._ids = _ChosenIds()
        self._ended = _Ended()
        merged = Resource.create(dict(resource))
        if SERVICE_INSTANCE_ID not in merged.attributes:
            merged = merged.merge(Resource({SERVICE_INSTANCE_ID: run}))
        provider = TracerProvider(resource=merged, id_generator=self._ids, shutdown_on_exit=False)
        provider.add_span_processor(self._ended)
        self._sampler = provider.sampler
        self._tracer = provider.get_tracer("vllm_saga")

    def make(
        self, event: Event, offset_s: float, headers: Mapping[str, str] | None
    ) -> list[ReadableSpan]:
        """The spans of one event; none where its workflow is not sampled.

        offset_s: the wall clock minus the policy's clock. headers: `traceparent` and `tracestate`
        of the request behind a call.
        """
        tenant, root = self._names(event.root)
        began_at = event.began_at if isinstance(event, PastWorkflow) else event.workflow_began_at
        day = int((began_at + offset_s) // _DAY_S)
        trace_id = _digest(16, tenant, root, str(day))
        if not self._sampler.should_sample(None, trace_id, WORKFLOW).decision.is_sampled():
            return []
        self._ids.trace_id = trace_id
        about: Attributes = {"saga.workflow": root}
        if tenant:
            about["saga.tenant"] = tenant
        if isinstance(event, PastWorkflow):
            self._workflow(event, offset_s, about)
        else:
            self._call(event, offset_s, about, _links(headers))
        return self._ended.take()

    def _workflow(self, event: PastWorkflow, offset_s: float, about: Attributes) -> None:
        about |= {
            "gen_ai.operation.name": "invoke_workflow",
            "gen_ai.conversation.id": about["saga.workflow"],
            "saga.calls": event.calls,
            "saga.lost_tokens": event.lost_tokens,
            "saga.open": event.open,
        }
        self._ids.span_id = self._workflow_id(event.workflow)
        self._span(WORKFLOW, Context(), event.began_at, event.ended_at, offset_s, about)

    def _call(
        self, event: PastCall, offset_s: float, about: Attributes, links: list[trace.Link]
    ) -> None:
        let_in_at = event.ended_at if event.begun_at is None else event.begun_at
        held_s = let_in_at - event.arrived_at
        about |= {
            "gen_ai.conversation.id": self._names(event.session)[1],
            "gen_ai.usage.input_tokens": event.prompt_tokens,
            "gen_ai.usage.output_tokens": event.total_tokens - event.prompt_tokens,
            "gen_ai.usage.cache_read.input_tokens": event.cached_tokens,
            "saga.call": _text(event.call_id),
            "saga.sub_agent": event.session != event.root,
            "saga.held_s": round(held_s, 6),
            "saga.withdrawn": event.begun_at is None,
        }
        if event.tool is not None:
            about["saga.tool"] = _text(event.tool)
        workflow = self._inside(self._workflow_id(event.workflow))
        name = (self._run, event.call_id, repr(event.arrived_at))
        self._ids.span_id = call_id = _digest(8, *name)
        self._span(CALL, workflow, event.arrived_at, event.ended_at, offset_s, about, links)
        if held_s > 0.0:
            self._ids.span_id = _digest(8, *name, HELD)
            self._span(HELD, self._inside(call_id), event.arrived_at, let_in_at, offset_s, {})

    def _span(
        self,
        name: str,
        parent: Context,
        start_s: float,
        end_s: float,
        offset_s: float,
        about: Attributes,
        links: list[trace.Link] | None = None,
    ) -> None:
        span = self._tracer.start_span(
            name,
            parent,
            attributes=about,
            links=links,
            start_time=_nanoseconds(start_s + offset_s),
        )
        span.end(_nanoseconds(end_s + offset_s))

    def _workflow_id(self, seq: int) -> int:
        return _digest(8, self._run, str(seq))

    def _inside(self, span_id: int) -> Context:
        parent = trace.SpanContext(self._ids.trace_id, span_id, False, _SAMPLED)
        return trace.set_span_in_context(trace.NonRecordingSpan(parent), Context())

    def _names(self, key: SessionKey) -> SessionKey:
        tenant, name = self._public(key)
        return _text(tenant), _text(name.removeprefix(anonymous_id("")))


class _ChosenIds(IdGenerator):
    """Gives a span the ids that were chosen for it."""

    trace_id = span_id = 0

    def generate_trace_id(self) -> int:
        return self.trace_id

    def generate_span_id(self) -> int:
        return self.span_id


class _Ended(SpanProcessor):
    """Collects spans as they end."""

    def __init__(self) -> None:
        self._spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self._spans.append(span)

    def take(self) -> list[ReadableSpan]:
        taken, self._spans = self._spans, []
        return taken


def _links(headers: Mapping[str, str] | None) -> list[trace.Link]:
    """To the span of the client from which a call came."""
    if not headers:
        return []
    context = TraceContextTextMapPropagator().extract(headers, Context())
    sender = trace.get_current_span(context).get_span_context()
    return [trace.Link(sender)] if sender.is_valid else []


def _digest(size: int, *names: str) -> int:
    named = "\0".join(names).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(named, digest_size=size, person=b"vllm-saga").digest())


def _text(name: str) -> str:
    """Text that protobuf takes: clients may send halves of a surrogate pair."""
    return name.encode("utf-8", "replace").decode()


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
