"""The router: agent sessions over many vLLM engines, with affinity and work stealing."""
