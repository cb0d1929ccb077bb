"""`vllm-saga top`: engines, the KV pool, and workflows, live in a terminal."""
