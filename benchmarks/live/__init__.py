"""Live benchmark: agent sessions replayed over HTTP against a real `vllm serve`, one arm after the other."""
