"""Invariant 4 at the router: whatever fails in placement, at any call of it, costs no call."""

from __future__ import annotations

import asyncio
import logging

import pytest
from engines import Engine, fleet, until

from vllm_saga.router import guard
from vllm_saga.router.placement import make_placer

STATE = {
    "started": "1", "kv_tokens": 1000, "used_tokens": 0, "running": 0, "waiting": 0,
    "resident": 1, "prefill_tokens_per_s": 1.0, "held_calls": [], "sessions": [], "saga": {},
}  # fmt: skip
METHODS = [
    "place", "on_first_byte", "on_finish", "on_report", "end", "epoch", "set_accepting",
    "set_draining",
]  # fmt: skip


class Fault(Exception):
    pass


@pytest.mark.parametrize("nth", [1, 3])
@pytest.mark.parametrize("method", METHODS)
async def test_a_fault_in_any_method_costs_no_call(method, nth, caplog):
    placer = make_placer("saga")
    count = 0

    def fail(*args, **kwargs):
        nonlocal count
        count += 1
        if count == nth:
            raise Fault
        return getattr(type(placer), method)(placer, *args, **kwargs)

    caplog.set_level(logging.ERROR, guard.__name__)
    engines = Engine(state=STATE), Engine(state=STATE)
    async with fleet(*engines, placer=placer) as client:
        setattr(placer, method, fail)

        async def agent(number: int) -> list[int]:
            name = f"s{number}"
            replies = [(await client.chat(X_Session_ID=name)).status for _ in range(4)]
            drained = f"/v1/saga/backends/{engines[number % 2].name}"
            await client.post(f"{drained}/drain", b"")
            await client.post(f"{drained}/undrain", b"")
            ended = await client.post(f"/v1/saga/sessions/{name}/end", b"")
            return [*replies, ended.status]

        answers = await asyncio.gather(*(agent(number) for number in range(6)))
        if method == "set_accepting":
            engines[0].healthy = False
            await client.until_up(engines[1])
            engines[0].healthy = True
            await client.until_up(*engines)
            engines[0].healthy = False
            await client.until_up(engines[1])
        await until(lambda: count >= nth)
        answers.append([(await client.chat(X_Session_ID="later")).status])
        metrics = (await client.get("/metrics")).body.decode()
    assert {status for statuses in answers for status in statuses} == {200}
    assert "saga_router_policy_errors_total 1.0" in metrics
    told = [record for record in caplog.records if record.exc_info]
    assert [record.exc_info[0] for record in told] == [Fault]
