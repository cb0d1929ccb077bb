"""WorkflowQueue: vLLM's waiting queue, with a place for calls that must not run yet."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vllm.v1.core.sched.request_queue import RequestQueue, SchedulingPolicy
from vllm.v1.request import Request


class WorkflowQueue(RequestQueue):
    """Ready calls in exactly stock's order, held calls out of its sight.

    The contract is vllm/v1/core/sched/request_queue.py's. A call that `is_held` when it is added
    waits, invisible to `bool`, `peek` and `pop`, until `release`; it then takes the place its
    arrival gave it. `len` and iteration count both kinds, ready ones first. Requests put back by
    the scheduler (preempted, skipped) are never held. All operations are O(log n), `bool` O(1).
    """

    def __init__(self, policy: SchedulingPolicy, is_held: Callable[[Request], bool]) -> None:
        self._by_priority = policy is SchedulingPolicy.PRIORITY
        self._is_held = is_held
        self._heap: list[tuple[Any, Request]] = []
        self._ready: dict[str, Any] = {}
        self._held: dict[str, tuple[Any, Request]] = {}
        self._front = 0
        self._back = 0

    def add_request(self, request: Request) -> None:
        self._back += 1
        key = request if self._by_priority else self._back
        if self._is_held(request):
            self._held[request.request_id] = (key, request)
        else:
            self._push(key, request)

    def pop_request(self) -> Request:
        request = self.peek_request()
        heapq.heappop(self._heap)
        del self._ready[request.request_id]
        return request

    def peek_request(self) -> Request:
        if not self._ready:
            raise IndexError("peek from an empty queue")
        while not self._is_live(self._heap[0]):
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def prepend_request(self, request: Request) -> None:
        self._front -= 1
        self._push(request if self._by_priority else self._front, request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.prepend_request(request)

    def remove_request(self, request: Request) -> None:
        before = len(self)
        self.remove_requests((request,))
        if len(self) == before:
            raise ValueError(f"request {request.request_id} is not in the queue")

    def remove_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if self._ready.pop(request.request_id, None) is None:
                self._held.pop(request.request_id, None)
        self._trim()

    def release(self, request_ids: Iterable[str]) -> None:
        """Held calls may run from now on; ids that are not held here are passed over."""
        for request_id in request_ids:
            held = self._held.pop(request_id, None)
            if held is not None:
                self._push(*held)

    def release_all(self) -> None:
        """Hold nothing any more."""
        self._is_held = lambda request: False
        self.release(list(self._held))

    @property
    def ready(self) -> int:
        """How many calls may run."""
        return len(self._ready)

    def __bool__(self) -> bool:
        return bool(self._ready)

    def __len__(self) -> int:
        return len(self._ready) + len(self._held)

    def __iter__(self) -> Iterator[Request]:
        for entry in sorted(filter(self._is_live, self._heap)):
            yield entry[1]
        for _, request in self._held.values():
            yield request

    def __getitem__(self, index: int) -> Request:
        """Stock's FCFS queue is a deque, and vLLM's own tests index it. O(n log n)."""
        return list(self)[index]

    def _push(self, key: Any, request: Request) -> None:
        self._ready[request.request_id] = key
        heapq.heappush(self._heap, (key, request))

    def _is_live(self, entry: tuple[Any, Request]) -> bool:
        # Removal only forgets the key: a request added again has a new one.
        key, request = entry
        return self._ready.get(request.request_id) is key

    def _trim(self) -> None:
        """Keep removed entries below half of the heap."""
        if len(self._heap) > 2 * len(self._ready) + 64:
            self._heap = [entry for entry in self._heap if self._is_live(entry)]
            heapq.heapify(self._heap)
