"""Where the responses are that the Responses API keeps: only the engine that made one has it."""

from __future__ import annotations

from collections import OrderedDict


class StoredResponses:
    """Which backend keeps a response of the Responses API; the oldest are forgotten first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._backends: OrderedDict[str, str] = OrderedDict()

    def add(self, response_id: str, backend: str) -> None:
        self._backends[response_id] = backend
        if len(self._backends) > self._most:
            self._backends.popitem(last=False)

    def where(self, response_id: str) -> str | None:
        return self._backends.get(response_id)
