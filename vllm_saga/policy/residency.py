"""Which workflows may hold KV now: the working-set budget, its entry, its exit, its deadlines."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable

from vllm_saga.policy.agenda import Agenda
from vllm_saga.policy.chain import Chain
from vllm_saga.policy.fairness import FairShare
from vllm_saga.policy.outlook import NONE, Growth, Outlook
from vllm_saga.policy.workflow import Context, Workflow

# Share of the pool in use below which it is not tight any more.
_SLACK = 0.8
# Standard deviations above the forecast for which there has to be room, at full patience.
_MOST_Z = 2.0
# So much of a forecast counts before any workflow of the kind has ended: it may be a short kind.
_UNKNOWN = 0.5
# Before the pool is tight, only what is foreseen with so many standard deviations counts, of
# classes known so well.
_FORESIGHT_Z = 1.0
_FORESEEN = 0.8
# With fewer calls running than this, one more goes nearly for nothing, and room is not kept.
_BUSY = 2


class BlockLedger:
    """The distinct KV blocks that the resident workflows' contexts are made of.

    Blocks are counted by hash, so a prefix shared by many workflows counts once. What is counted of
    a context is always a leading part of its chain; hence `missing` needs only O(log n).
    """

    def __init__(self) -> None:
        self._holders: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def missing(self, chain: Chain) -> int:
        """How many blocks of `chain` no resident context has."""
        holders = self._holders
        low, high = 0, len(chain)
        while low < high:
            middle = (low + high) // 2
            if chain[middle] in holders:
                low = middle + 1
            else:
                high = middle
        return len(chain) - low

    def count(self, context: Context) -> None:
        """Bring the ledger up to the context's present chain (it only grew)."""
        holders = self._holders
        chain = context.chain
        length = len(chain)
        for index in range(context.counted, length):
            block_hash = chain[index]
            holders[block_hash] = holders.get(block_hash, 0) + 1
        context.counted = length

    def part_of(self, context: Context) -> float:
        """Blocks counted for the context, each divided by the number of contexts that have it."""
        holders, chain, end = self._holders, context.chain, context.counted
        part, start = 0.0, 0
        while start < end:
            # Who has a block has all before it: the further on, the fewer.
            many = holders[chain[start]]
            if holders[chain[end - 1]] == many:
                return part + (end - start) / many
            low, high = start + 1, end - 1
            while low < high:
                middle = (low + high) // 2
                if holders[chain[middle]] == many:
                    low = middle + 1
                else:
                    high = middle
            part += (low - start) / many
            start = low
        return part

    def uncount(self, context: Context, keep: int = 0) -> None:
        """Give back what is counted of the context beyond its first `keep` blocks."""
        holders = self._holders
        chain = context.chain
        for index in range(keep, context.counted):
            block_hash = chain[index]
            left = holders[block_hash] - 1
            if left:
                holders[block_hash] = left
            else:
                del holders[block_hash]
        context.counted = min(context.counted, keep)


class Residency:
    """Workflow-atomic admission: a workflow is either resident or its calls are held.

    need(w) = its distinct blocks + what its present or next call adds. A workflow enters while all
    needs fit in `capacity` blocks, or when nobody is resident; whose turn it is `FairShare` says.
    It also has to leave room for growth, its own and the residents': at no time ahead may what they
    are expected to hold, less what ends until then, exceed the pool: mean + z standard deviations
    <= capacity (outlook.py), with z = 2 `patience`; z = 0 for one that has begun, which comes back
    without such room while the engine has next to nothing to run. All of this may exceed the pool
    by what is better computed twice than waited for (`overdraft`, Price.overdraft_tokens). A
    workflow stays until it ends, until it has been away for too long (policy/absence.py), or until
    the residents outgrow the pool: then the youngest idle one leaves. A hold longer than
    `max_hold_s` seconds ends whatever the budget says; of one that has begun, longer than
    `max_step_hold_s`.

    running: calls that are not held. overdraft: blocks by which the pool may be short with a
    workflow in it, while so many are held.

    The pool is tight from the first call that has to be held or workflow that has to leave until
    nothing is held and a fifth of the pool is spare. Before, nothing differs from stock, unless
    workflows like this one are known well and it is all but sure that they will not fit (z = -1).
    """

    def __init__(
        self,
        capacity: int,
        block_size: int,
        patience: float,
        max_hold_s: float,
        max_step_hold_s: float,
        share: FairShare,
        running: Callable[[], int],
        overdraft: Callable[[Workflow, int], int],
    ) -> None:
        self.capacity = capacity
        self.ledger = BlockLedger()
        self.residents: dict[Workflow, None] = {}
        self.loose_blocks = 0
        self._block_size = block_size
        self._z = _MOST_Z * patience
        self._max_hold_s = max_hold_s
        self._max_step_hold_s = max_step_hold_s
        self._share = share
        self._running = running
        self._overdraft = overdraft
        self.tight = False
        self.changes = 0
        self._next_total = 0
        self._outlook = Outlook()
        self._deadlines: Agenda[tuple[Workflow, float]] = Agenda(_is_held_until)
        self.held_workflows = 0
        self.held_calls = 0

    @property
    def used_blocks(self) -> int:
        """Blocks in use or about to be: residents' contexts and next calls, unknown calls."""
        return len(self.ledger) + self._next_total + self.loose_blocks

    def fits(self, workflow: Workflow) -> bool:
        """Whether a workflow that is not resident may enter now."""
        return not self.residents or self.shortfall(workflow) <= 0

    def shortfall(self, workflow: Workflow) -> int:
        """Blocks that would have to leave before a workflow that is not resident fits."""
        needed = self.needed_blocks(workflow)
        blocks = needed + self.growth_blocks(workflow, needed)
        return self.used_blocks + blocks - self.capacity - self.overdraft_blocks(workflow)

    def growth_blocks(self, workflow: Workflow, needed: int) -> int:
        """Room for growth that a workflow needing so many blocks has to leave when it enters."""
        z = self._deviations(workflow)
        if z is None:
            return 0
        weight = _UNKNOWN + (1.0 - _UNKNOWN) * workflow.agent.sure
        return int(weight * self._outlook.most(self._growth(workflow, needed), z))

    def overdraft_blocks(self, workflow: Workflow) -> int:
        """By how many blocks the pool may be short with `workflow` in it."""
        return self._overdraft(workflow, self.held_workflows)

    def needed_blocks(self, workflow: Workflow) -> int:
        """What a workflow that is not resident would add to `used_blocks`, later growth aside."""
        missing = sum(self.ledger.missing(context.chain) for context in workflow.wanted())
        return missing + self._next_blocks(workflow)

    def enter(self, workflow: Workflow) -> None:
        """Make `workflow` resident, whatever the budget says."""
        if workflow.resident:
            return
        workflow.resident = workflow.was_resident = True
        self.changes += 1
        self.residents[workflow] = None
        self.update(workflow)

    def leave(self, workflow: Workflow) -> None:
        """Take residency from `workflow`; its running calls are not touched."""
        if not workflow.resident:
            return
        workflow.resident = False
        self.changes += 1
        del self.residents[workflow]
        self._promise(workflow, 0, None)
        for context in workflow.contexts():
            self.ledger.uncount(context)

    def update(self, workflow: Workflow) -> None:
        """Recount a resident after its contexts grew or a call of it began or ended.

        Nothing is promised to one whose return is in doubt.
        """
        for context in workflow.wanted():
            self.ledger.count(context)
        if workflow.doubted:
            self._promise(workflow, 0, NONE)
            return
        blocks = self._next_blocks(workflow)
        # What it shares with others is not freed when it ends.
        own = max(workflow.counted_blocks + blocks - workflow.agent.shared_blocks, 1)
        self._promise(workflow, blocks, self._growth(workflow, own))

    def promised_blocks(self, workflow: Workflow) -> int:
        """What a resident's leaving frees, at most: some may be shared."""
        return workflow.counted_blocks + workflow.next_blocks

    def make_room(self, caller: Workflow) -> list[Workflow]:
        """The residents may have outgrown the pool: the youngest idle ones leave; returns them.

        Only what is held and the next calls count here, not later growth: otherwise a change of
        forecast would cost a workflow its place.
        """
        left: list[Workflow] = []
        while self.used_blocks > self.capacity:
            idle = [w for w in self.residents if not w.calls and w is not caller]
            if not idle:
                break
            youngest = max(idle, key=lambda w: (w.priority, w.seq))
            if self.used_blocks <= self.capacity + self.overdraft_blocks(youngest):
                break
            left.append(youngest)
            self.leave(youngest)
        self.tight |= bool(left)
        return left

    def hold(self, workflow: Workflow, call_id: str, now: float, turn: float) -> None:
        """Hold a call until its workflow is resident; the least `turn` enters first."""
        workflow.held[call_id] = None
        self.changes += 1
        self.held_calls += 1
        if len(workflow.held) > 1:
            return
        workflow.held_since = now
        workflow.turn = turn
        self.tight = True
        self.held_workflows += 1
        new = not workflow.was_resident
        work_s, due_s = self._deadline(workflow)
        self._share.arrive(
            workflow.tenant, workflow, now, turn,
            priority=workflow.priority, new=new, work_s=work_s, due_s=due_s,
        )  # fmt: skip
        limit_s = self._max_hold_s if new else min(self._max_step_hold_s, self._max_hold_s)
        workflow.held_until = now + limit_s
        deadline = (workflow, workflow.held_until)
        self._deadlines.add(workflow.held_until, deadline, self.held_workflows)

    def unhold(self, workflow: Workflow) -> list[str]:
        """End the hold of all the workflow's calls; returns them, first come first."""
        if not workflow.held:
            return []
        held, workflow.held = list(workflow.held), {}
        self.changes += 1
        self.held_workflows -= 1
        self._share.leave(workflow)
        self.held_calls -= len(held)
        return held

    def withdraw(self, workflow: Workflow, call_id: str) -> bool:
        """A call has ended; returns whether it was still held."""
        if call_id not in workflow.held:
            return False
        del workflow.held[call_id]
        self.held_calls -= 1
        if not workflow.held:
            self.held_workflows -= 1
            self._share.leave(workflow)
        return True

    def first_in_line(self, now: float) -> Workflow | None:
        """The held workflow that enters next, deadlines aside."""
        first: Workflow | None = self._share.first(now)
        return first

    def next_to_enter(self, now: float) -> Workflow | None:
        """The held workflow that may enter now: one whose deadline has passed, or the first in line
        if it fits. None if all have to wait.
        """
        if not self.held_workflows and self.used_blocks < _SLACK * self.capacity:
            self.tight = False
        overdue = self._deadlines.due(now)
        if overdue is not None:
            return overdue[1][0]
        first = self.first_in_line(now)
        return first if first is not None and self.fits(first) else None

    def _deadline(self, workflow: Workflow) -> tuple[float, float]:
        """(seconds the workflow still needs, when it is due); (0, never) without a deadline."""
        due_s = workflow.due_s
        if due_s is None:
            factor = workflow.hint.slo_factor if workflow.hint else None
            factor = factor or self._share.slo_factor
            if factor is None:
                return 0.0, math.inf
            calls = workflow.calls_done + workflow.remaining_calls()
            due_s = workflow.began_at + factor * calls * workflow.agent.cycle_s
        return workflow.remaining_s(), due_s

    def _deviations(self, workflow: Workflow) -> float | None:
        """The z of the forecast that has to fit, too, when the workflow enters; None = none."""
        if not self.tight:
            foreseen = not workflow.was_resident and workflow.agent.sure >= _FORESEEN
            return -_FORESIGHT_Z if foreseen else None
        if workflow.was_resident:
            return 0.0 if self._running() >= _BUSY else None
        return self._z

    def _promise(self, workflow: Workflow, next_blocks: int, growth: Growth | None) -> None:
        self._next_total += next_blocks - workflow.next_blocks
        self._outlook.replace(workflow.growth, growth)
        workflow.next_blocks = next_blocks
        workflow.growth = growth

    def _growth(self, workflow: Workflow, blocks: int) -> Growth:
        return workflow.outlook(blocks, self._block_size) if workflow.known else NONE

    def _next_blocks(self, workflow: Workflow) -> int:
        """Blocks that its present calls will still add, or else its next, partial ones included."""
        agent, calls = workflow.agent, len(workflow.calls)
        tokens = agent.output_tokens if calls else agent.growth_tokens
        return max(calls, 1) * (1 + int(tokens) // self._block_size)


def _is_held_until(deadline: tuple[Workflow, float]) -> bool:
    workflow, until = deadline
    return bool(workflow.held) and workflow.held_until == until
