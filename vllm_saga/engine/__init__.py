"""The adapter: the only room that touches vLLM's internals."""
