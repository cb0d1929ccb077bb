"""One OpenTelemetry trace for each workflow, sent where vLLM's --otlp-traces-endpoint says.

The engine's thread only hands over what has ended (policy/timeline.py). A thread of its own makes
spans of it (engine/spans.py), encodes and sends them: the SDK's BatchSpanProcessor would have them
made on the engine's thread, where one takes ten times as long as handing its event over, and would
not tell what it drops.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from vllm.logger import init_logger
from vllm.v1.request import Request

from vllm_saga.policy.report import public_key
from vllm_saga.policy.saga import SagaPolicy
from vllm_saga.policy.timeline import Event, PastCall, PastWorkflow, Timeline, past_workflow

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

    from vllm_saga.engine.spans import SpanMaker

logger = init_logger("vllm.saga")

#: So many events wait to be sent, the last ones: those of minutes without a collector.
MAX_QUEUED = 4096
MAX_SENT = 256
INTERVAL_S = 1.0
FLUSH_S = 5.0
_EXPORTERS = "opentelemetry.exporter."
# Two readings of two clocks differ by what happens between them.
_STEADY_S = 1e-3


class _Entry(NamedTuple):
    """What `SpanMaker.make` takes."""

    event: Event
    offset_s: float
    headers: Mapping[str, str] | None


def start(vllm_config: Any, saga: SagaPolicy, run: str) -> Traces | None:
    """Begin to send traces; None where no endpoint is configured, or where none can be sent.

    run: names this run of the engine.
    """
    endpoint = vllm_config.observability_config.otlp_traces_endpoint
    if not endpoint or not saga.config.traces:
        return None
    try:
        from vllm_saga.engine.spans import SpanMaker, make_exporter

        exporter = make_exporter(endpoint)
        resource = {
            "saga.engine": vllm_config.parallel_config.data_parallel_index,
            "saga.model": str(vllm_config.model_config.served_model_name),
        }
        maker = SpanMaker(run, partial(public_key, saga), resource)
    except ImportError as error:
        logger.warning("saga: no traces: %s. Run: pip install 'vllm-saga[otel]'", error)
    except Exception as error:
        logger.warning("saga: no traces: %s", error)
    else:
        logger.info("saga: traces of workflows go to %s", endpoint)
        return Traces(endpoint, maker, exporter)
    return None


class Traces:
    """Follows a timeline. Nothing here raises, or waits for the collector but `close`.

    While the collector does not answer, one event at a time is tried, the last `MAX_QUEUED` wait,
    and what is lost is counted; the log is told when that begins and when it ends. A fault ends
    the traces.
    """

    def __init__(self, endpoint: str, maker: SpanMaker, exporter: SpanExporter) -> None:
        self._endpoint = endpoint
        self._maker = maker
        self._exporter = exporter
        self._queue: deque[_Entry] = deque(maxlen=MAX_QUEUED)
        self._seen = 0
        self._offset_s = 0.0
        self._dropped = 0
        self._refused = 0
        self._failing = False
        self._broken = False
        self._closing = False
        self._wake = threading.Event()
        self._quiet = _Quiet()
        self._thread = threading.Thread(target=self._run, name="saga-traces", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> int:
        """Calls and workflows that are not known to have arrived, and are not sent again."""
        return self._dropped + self._refused

    def follow(
        self, timeline: Timeline, now: float, request: Request | None = None, idle: bool = False
    ) -> None:
        """Hand over what has ended since the last time.

        now: the policy's clock. request: the one that has just ended, if one has. idle: the engine
        has nothing to do; what there is goes at once then, for an engine that is stopped may be
        killed at any time from here on.
        """
        if timeline.count != self._seen and not self._broken:
            with self._guard():
                events = timeline.since(self._seen)
                self._dropped += timeline.count - self._seen - len(events)
                self._seen = timeline.count
                self._hand_over(events, now, request)
                if idle:
                    self._wake.set()

    def close(self, saga: SagaPolicy | None, now: float) -> None:
        """Send the rest, with the workflows that are still open; takes `FLUSH_S` at most.

        vLLM calls it late, and kills an engine that stops slowly: then they are lost.
        """
        with self._guard():
            if saga is not None and not self._broken:
                self.follow(saga.timeline, now)
                self._hand_over(_still_open(saga, now), now)
            self._closing = True
            self._wake.set()
            self._thread.join(0.0 if self._failing else FLUSH_S)
            self._exporter.shutdown()
            lost = self.lost + len(self._queue)
            if lost:
                logger.warning("saga: %d calls and workflows are missing in the traces", lost)

    def _hand_over(
        self, events: Sequence[Event], now: float, request: Request | None = None
    ) -> None:
        offset_s = time.time() - now
        if abs(offset_s - self._offset_s) > _STEADY_S:
            self._offset_s = offset_s
        for event in events:
            headers = None
            if request is not None and isinstance(event, PastCall):
                ended = event.call_id == request.request_id
                headers = getattr(request, "trace_headers", None) if ended else None
            self._dropped += len(self._queue) == MAX_QUEUED
            self._queue.append(_Entry(event, self._offset_s, headers))

    @contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            if not self._broken:
                logger.exception("saga: no traces from here on. Please report this.")
            self._broken = True
            self._queue.clear()

    # -- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        with self._guard(), self._quiet.here():
            while not self._closing:
                self._wake.wait(INTERVAL_S)
                self._wake.clear()
                self._send()
            self._send()

    def _send(self) -> None:
        """Send what there is, until something does not arrive."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        while self._queue:
            entries = self._take(1 if self._failing else MAX_SENT)
            spans: list[ReadableSpan] = []
            for entry in entries:
                spans += self._maker.make(*entry)
            if not spans:
                continue
            arrived = self._exporter.export(spans) is SpanExportResult.SUCCESS
            if not arrived:
                self._put_back(entries)
            self._note(arrived)
            if not arrived:
                return

    def _put_back(self, entries: list[_Entry]) -> None:
        """Keep what did not arrive; but not what was tried alone, lest it is that which fails."""
        for entry in reversed(entries):
            if self._failing or len(self._queue) == MAX_QUEUED:
                self._refused += 1
            else:
                self._queue.appendleft(entry)

    def _take(self, most: int) -> list[_Entry]:
        return [self._queue.popleft() for _ in range(min(most, len(self._queue)))]

    def _note(self, arrived: bool) -> None:
        if not arrived and not self._failing:
            logger.warning(
                "saga: traces do not reach %s: %s. The last %d calls and workflows are kept, and "
                "tried again.", self._endpoint, self._quiet.last, MAX_QUEUED,
            )  # fmt: skip
        elif arrived and self._failing:
            logger.warning(
                "saga: traces reach %s again; %d calls and workflows are lost",
                self._endpoint,
                self.lost,
            )
        self._failing = not arrived


def _still_open(saga: SagaPolicy, now: float) -> list[PastWorkflow]:
    workflows = {session.workflow: None for session in saga.table.sessions.values()}
    return [
        past_workflow(each, now if each.calls else each.idle_since, open=True)
        for each in workflows
        if each.known and each.calls_done
    ]


class _Quiet(logging.Filter):
    """Keeps to itself what exporters log in our thread, with every failure and each attempt."""

    def __init__(self) -> None:
        super().__init__()
        self.last = "no answer"
        self._thread_id: int | None = None

    @contextmanager
    def here(self) -> Iterator[None]:
        """For the thread that calls it."""
        self._thread_id = threading.get_ident()
        names = [n for n in logging.root.manager.loggerDict if n.startswith(_EXPORTERS)]
        for name in names:
            logging.getLogger(name).addFilter(self)
        try:
            yield
        finally:
            # Another thread may be given the number of one that has ended.
            for name in names:
                logging.getLogger(name).removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread_id:
            return True
        self.last = record.getMessage()
        return False
