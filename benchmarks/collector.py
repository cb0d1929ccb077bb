"""An OTLP collector that counts: prints its port, and, once its input ends, the spans it got."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service


class Collector(service.TraceServiceServicer):
    """Counts spans. For one thread."""

    spans = 0

    def Export(self, request: Any, context: Any) -> Any:
        for group in request.resource_spans:
            self.spans += sum(len(scope.spans) for scope in group.scope_spans)
        return messages.ExportTraceServiceResponse()


def main() -> None:
    collector = Collector()
    server = grpc.server(ThreadPoolExecutor(1))
    service.add_TraceServiceServicer_to_server(collector, server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    sys.stdin.read()
    server.stop(1.0).wait()
    print(collector.spans)


if __name__ == "__main__":
    main()
