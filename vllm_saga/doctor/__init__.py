"""`vllm-saga doctor`: what of an installation, a settings file or a server needs attention."""
