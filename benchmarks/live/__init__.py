"""Live benchmark: agent sessions replayed over HTTP against a real `vllm serve`, arm after arm."""
