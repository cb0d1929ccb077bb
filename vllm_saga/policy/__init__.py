"""The brain of vllm-saga: pure decisions, no vLLM, no torch, no I/O; time is always an argument."""
