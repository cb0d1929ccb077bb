"""The HTTP edge inside vLLM's API server: identity from headers, and the /v1/saga endpoints."""

from vllm_saga.server.middleware import SessionHeaders

__all__ = ["SessionHeaders"]
