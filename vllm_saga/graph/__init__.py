"""`vllm-saga graph`: agent execution graphs on the table, as a picture, and fitted to traces."""
