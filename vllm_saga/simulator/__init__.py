"""Workloads and, later, the virtual-clock simulator. Importing this package imports no vLLM."""
