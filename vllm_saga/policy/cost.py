"""What the steps of this engine cost, learned from their timings; what more KV would be worth."""

from __future__ import annotations

from vllm_saga.policy.stepfit import Step, StepFit

_SOLVE_EVERY = 16
# An error so many times the usual one is an outlier (a pause of the process), and counts less.
_OUTLIER = 4.0
_WINDOW_S = 30.0
_SHORTEST_S = 1e-6


class CostModel:
    """What steps cost, outliers left aside, and how much of the time they leave.

    Attributes:
        fit: seconds of a step.
        spare: share of the time that lately passed in which the engine did nothing that grows with
            its work: it waited, or read weights that a larger batch would have read, too. So much
            engine time a full pool's worth of further workflows would gain.
        running: calls that a step was for, in the mean of the time that lately passed.
        known: whether enough steps were seen to speak of costs.
    """

    def __init__(self) -> None:
        self.fit = StepFit()
        self.spare = 1.0
        self.running = 0.0
        self._usual_error = 0.5
        self._steps = 0

    def observe(self, step: Step, seconds: float, stands_for_s: float) -> None:
        """A step took `seconds`; steps like it filled `stands_for_s` seconds."""
        if seconds < _SHORTEST_S:
            return
        error = abs(1.0 - self.fit.seconds(step) / seconds)
        trust = min(1.0, _OUTLIER * self._usual_error / error) if error else 1.0
        self._usual_error += 0.02 * (min(error, _OUTLIER * self._usual_error) - self._usual_error)
        self._usual_error = max(self._usual_error, 0.01)
        self.fit.observe(step, seconds, trust)
        self._steps += 1
        if self._steps % _SOLVE_EVERY == 0:
            self.fit.solve()
        growing_s = min(self.fit.growing_s(step), seconds)
        self._pass(stands_for_s, 1.0 - growing_s / seconds, step.calls)

    @property
    def known(self) -> bool:
        return self._steps >= 4 * _SOLVE_EVERY

    def observe_idle(self, seconds: float) -> None:
        """The engine computed nothing for so long, though calls were there."""
        if seconds > 0.0:
            self._pass(seconds, 1.0, 0)

    def work_s(self, step: Step) -> float:
        """Engine seconds of work that is spread over steps with much else to do."""
        fit = self.fit
        return fit.token_s * step.new + fit.pair_s * step.pairs + fit.kv_s * step.kv

    def prefill_s(self, tokens: int) -> float:
        """Engine seconds to compute a context of `tokens` tokens from nothing."""
        return self.work_s(Step(tokens, tokens * tokens // 2, 0))

    def _pass(self, seconds: float, spare: float, running: int) -> None:
        share = seconds / (seconds + _WINDOW_S)
        self.spare += share * (spare - self.spare)
        self.running += share * (running - self.running)
