"""Calibration of a real `vllm serve`: a tiny model on this machine's CPU."""

import time

from vllm_saga.simulator import calibrate
from vllm_saga.simulator.hardware import Batch, call_alone_s


async def test_a_tiny_server_is_measured(serve):
    async with serve("stock") as client:
        began = time.monotonic()
        machine, report = await calibrate.calibrate(
            client.server.url, max_num_batched_tokens=512, max_num_seqs=16, rounds=2
        )
        took = time.monotonic() - began
        print(f"{took:.0f} s", report, machine.cost)
        # A call it has not seen, against the client's own clock.
        prompt = [7 + n * n % 400 for n in range(1000)]
        began = time.monotonic()
        await client.generate(prompt, 100)
        whole = time.monotonic() - began
        print(f"{whole:.3f} s, priced at {call_alone_s(machine, 1000, 0, 100):.3f} s")
    assert took < 60
    assert machine.kv_tokens == 299 * 32
    # About 0.10 on two cores shared with others, of which the fit itself is the smaller part.
    assert report.median_relative_error < 0.25
    assert machine.step_s(Batch.of([(512, 0)])) > machine.step_s(Batch.of([(1, 0)])) > 0
    assert 0.4 < call_alone_s(machine, len(prompt), 0, 100) / whole < 2.5
