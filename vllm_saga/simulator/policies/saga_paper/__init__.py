"""SAGA as its paper describes it (arXiv 2605.00528), rebuilt from the published formulas."""

from vllm_saga.simulator.policies.saga_paper.policy import SagaPaper

__all__ = ["SagaPaper"]
