"""vLLM entry point: teaches `--scheduler-cls` the name "saga"; nothing else."""

from __future__ import annotations

from functools import wraps
from typing import Any

SCHEDULER_NAME = "saga"
SCHEDULER_PATH = "vllm_saga.SagaScheduler"


def register() -> None:
    """Wrap `SchedulerConfig.get_scheduler_cls` (vllm/config/scheduler.py) once per process.

    vLLM calls this in every process that loads general plugins; only a server started with
    `--scheduler-cls saga` behaves differently afterwards. A vLLM that reads our entry point in
    `vllm.scheduler_plugins` (patches/) needs no help.
    """
    import vllm.plugins
    from vllm.config.scheduler import SchedulerConfig

    if hasattr(vllm.plugins, "SCHEDULER_PLUGINS_GROUP"):
        return

    upstream = SchedulerConfig.get_scheduler_cls
    if getattr(upstream, "__saga__", False):
        return

    @wraps(upstream)
    def get_scheduler_cls(self: SchedulerConfig) -> Any:
        if self.scheduler_cls == SCHEDULER_NAME:
            self.scheduler_cls = SCHEDULER_PATH
        return upstream(self)

    get_scheduler_cls.__saga__ = True  # type: ignore[attr-defined]
    SchedulerConfig.get_scheduler_cls = get_scheduler_cls
