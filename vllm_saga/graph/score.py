"""How well graphs predict sessions they have not seen, with tools and without."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from vllm_saga.graph.fit import class_of, steps
from vllm_saga.policy.gaps import GapModel
from vllm_saga.policy.graph import AgentClasses
from vllm_saga.simulator.trace import Session

_P95 = 0.95


@dataclass
class Score:
    """Sums over the calls of sessions; lists hold one value for each gap or call, in their order.

    log_loss: nats for the bin (33 % wide) of a gap. pinball: quantile loss of the gap's predicted
    median and p95, in log10 seconds. covered: whether a gap ended within its predicted p95.
    growth: squared error of the predicted growth, tokens². hit: whether the likeliest node came.
    """

    log_loss: list[float] = field(default_factory=list)
    pinball: list[float] = field(default_factory=list)
    covered: list[float] = field(default_factory=list)
    growth: list[float] = field(default_factory=list)
    hit: list[float] = field(default_factory=list)

    def observe_gap(self, gaps: GapModel, gap_s: float) -> None:
        self.log_loss.append(-math.log(max(gaps.probability(gap_s), 1e-9)))
        p95 = gaps.quantile_s(_P95)
        self.pinball.append(_pinball(gaps.quantile_s(0.5), gap_s, 0.5) + _pinball(p95, gap_s, _P95))
        self.covered.append(float(gap_s <= p95))

    def means(self) -> dict[str, float]:
        """Mean of each; growth as its root, in tokens. NaN where there is nothing."""
        out = {name: fmean(values) if values else math.nan for name, values in vars(self).items()}
        return {**out, "growth": math.sqrt(out["growth"])}


def _pinball(predicted_s: float, seen_s: float, share: float) -> float:
    error = math.log10(max(seen_s, 0.01) / max(predicted_s, 0.01))
    return max(share * error, (share - 1.0) * error)


def score(classes: AgentClasses, sessions: Sequence[Session]) -> tuple[Score, Score]:
    """(by tool, by class only): predictions for `sessions`; nothing is learned from them."""
    by_tool, by_class = Score(), Score()
    for session in sessions:
        agent = class_of(classes, session)
        for step in steps(session):
            for scored, node in ((by_tool, step.before), (by_class, None)):
                if step.gap_s is not None:
                    scored.observe_gap(agent.gaps_after(node), step.gap_s)
                error = step.growth_tokens - agent.growth_after(node).mean
                scored.growth.append(error * error)
                following = agent.next_tools(node)
                if step.tool is not None and following:
                    best = max(following, key=lambda name: following[name])
                    scored.hit.append(float(best == step.tool))
    return by_tool, by_class
