"""vllm-saga: workflow-atomic scheduling for AI agents on stock vLLM."""

from typing import TYPE_CHECKING, Any

from vllm_saga.config import SagaConfig

if TYPE_CHECKING:
    from vllm_saga.engine.scheduler import SagaScheduler

__version__ = "0.1.0"
__all__ = ["SagaConfig", "SagaScheduler", "__version__"]


def __getattr__(name: str) -> Any:
    # vLLM is imported only where its scheduler is really wanted.
    if name == "SagaScheduler":
        from vllm_saga.engine.scheduler import SagaScheduler

        return SagaScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
