"""`--scheduler-cls faulty_scheduler.FaultyScheduler`: saga with one fault, for a live server.

SAGA_FAULT names it: `on_step:50` raises at the 50th call of the policy's method `on_step`.
"""

from __future__ import annotations

import os
from typing import Any

from under_pressure import Faulty

from vllm_saga.engine.scheduler import SagaScheduler


class FaultyScheduler:
    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        scheduler = SagaScheduler(vllm_config, *args, **kwargs)
        method, _, nth = os.environ["SAGA_FAULT"].partition(":")
        setattr(scheduler.saga, method, Faulty(getattr(scheduler.saga, method), int(nth)))
        return scheduler
