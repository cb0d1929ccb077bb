"""Agent Fair Share: whose workflow goes next while workflows of several tenants wait."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

#: The account of the tenants that find no room in the table.
OTHER = "\0other"

# An answer holds for so long if nothing happens, seconds (the paper's epoch), and so many of a
# tenant's workflows make up its urgency: those that have waited longest.
_EPOCH_S = 0.1
_MOST_URGENT = 64


class Place(NamedTuple):
    """Where a tenant stands among those that wait: the least goes first.

    lead_s: virtual service beyond that of the least served, engine seconds; 0 within the window.
    calm: the less urgent, the larger; at most 0, as for a tenant of whose work nothing is known.
    """

    lead_s: float
    calm: float


#: Everybody's place while at most one tenant waits: then the order is not ours to choose.
NEUTRAL = Place(0.0, 0.0)


class _Wait(NamedTuple):
    """A workflow in line; `turn` and `order` as in policy/residency.py, work and deadline in s."""

    priority: int
    new: bool
    turn: float
    order: int
    workflow: Any
    work_s: float
    due_s: float


_Rank = tuple[int, float, bool, float, float, int]


def _rank(wait: _Wait, place: Place) -> _Rank:
    """Whose turn it is: the least, of workflows whose tenants stand at their `place`."""
    return (wait.priority, place.lead_s, wait.new, place.calm, wait.turn, wait.order)


@dataclass(eq=False, slots=True)
class _Account:
    """What one tenant has had, engine seconds, and its workflows that wait: a heap of waits."""

    name: str
    weight: float
    virtual_s: float
    gpu_s: float = 0.0
    pool_s: float = 0.0
    touched_at: float = 0.0
    waiting: dict[Hashable, _Wait] = field(default_factory=dict)
    line: list[_Wait] = field(default_factory=list)
    listed: bool = False
    urgency: float = 0.0
    look_at: float = 0.0

    def head(self) -> _Wait:
        """Who is first of this tenant; it has somebody waiting."""
        while self.waiting.get(self.line[0].workflow) is not self.line[0]:
            heapq.heappop(self.line)
        return self.line[0]

    def urgency_at(self, now: float) -> float:
        if now >= self.look_at:
            self.look_at = now + _EPOCH_S
            waits = itertools.islice(self.waiting.values(), _MOST_URGENT)
            known = ((w.work_s, w.due_s) for w in waits if w.work_s > 0.0)
            self.urgency = sum(work_s / max(due_s - now, work_s) for work_s, due_s in known)
        return self.urgency


class FairShare:
    """The line of those who wait for residency, fair to their tenants.

    A tenant is charged, over its weight, the GPU seconds of what it computes and the *pool seconds*
    of what it holds (the whole KV pool for one second is 1), and that only while another tenant
    waits: nobody pays for what nobody else wanted. The sum is its virtual service. Sub-agents and
    more workflows add to a tenant's bill, not to its share.

    Tenants that lead the least served of those waiting by half of `window_s` go behind all others,
    the most served last. Within the window the more urgent goes first (Eqs 8 and 9 of the SAGA
    paper, arXiv 2605.00528): urgency is the sum over a tenant's waiting workflows of remaining
    work / time to the deadline. A term is at most 1: who is late is no more urgent than who has no
    second to lose; and whatever the urgency, a lead ends at the window. Then `turn` decides. While
    one tenant waits, nothing but `turn` does.

    A tenant that begins to wait starts at most half a window behind the virtual time, the most that
    the least served tenant has ever had while it waited: nothing more is saved up, however long it
    was away. The half window is for those who need little and rarely wait: they go before who
    always waits (sparse flows in FQ-CoDel, RFC 8290).

    Bound: with D = `window_s`, at any time, of any two waiting tenants i and j of one priority,
    v_i - v_j <= D + u_i / w_i, where u_i is what i was charged since a workflow of it was last let
    in as `first`, or since it was first seen. Proof: let V be the virtual time. Then min v <= V,
    and the least served has no lead, so i was let in at v_i <= min v + D/2 <= V + D/2 (or was
    first seen at v_i = V); since then V has not fallen, and v_i has risen by u_i / w_i. Tenant j
    began to wait at v_j >= V - D/2; while it waits V does not pass v_j, so v_j >= V - D/2 now.
    Hence over any time in which both wait, what they are charged differs by at most twice that, per
    weight. u_i is work of i in flight, which the caller limits by whom it lets in.

    Nobody starves: charges to others bring a tenant's turn nearer, only its own put it off. (And
    every hold ends after `max_hold_s`, see policy/residency.py.)

    Args:
        weights: share of a tenant relative to others' 1, above 0; these always have an account.
        window_s: D in engine seconds per unit of weight; 0 = always the least served.
        slo_factor: the deadline of workflows that declare none, in multiples of the seconds they
            would take alone on an idle engine; None = they have none, and no urgency.
        limit: accounts at most beside those of `weights`; further tenants share one.
        expiry_s: an account unused for so long makes room for another.

    Times are seconds of one monotonic clock. Events are O(log n); `first` looks at each waiting
    tenant once after an event or 0.1 s, and is O(1) otherwise.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        window_s: float = 60.0,
        slo_factor: float | None = None,
        limit: int = 256,
        expiry_s: float = 1800.0,
    ) -> None:
        self._kept: dict[str, _Account] = {}
        for tenant, weight in {OTHER: 1.0, **(weights or {})}.items():
            if not 0.0 < weight < math.inf:
                raise ValueError(f"weights[{tenant!r}]: {weight} is not a number above 0")
            self._kept[tenant] = _Account(tenant, weight, 0.0)
        self._accounts: OrderedDict[str, _Account] = OrderedDict()
        self._half_s = window_s / 2.0
        self.slo_factor = slo_factor
        self._limit = limit
        self._expiry_s = expiry_s
        self._order = itertools.count()
        self._virtual_s = 0.0
        self._where: dict[Hashable, _Account] = {}
        self._competing: dict[_Account, None] = {}
        self._least: list[tuple[float, int, _Account]] = []
        self._first: Any = None
        self._first_until = -math.inf

    # -- events ---------------------------------------------------------------------------------

    def arrive(
        self,
        tenant: str,
        workflow: Hashable,
        now: float,
        turn: float = 0.0,
        *,
        priority: int = 0,
        new: bool = True,
        work_s: float = 0.0,
        due_s: float = math.inf,
    ) -> None:
        """A workflow of `tenant` begins to wait; told again, it is put where it belongs by now.

        turn: the least goes first within a tenant, `priority` (the least first) and those not `new`
        before it. work_s: seconds it still needs, 0 if unknown. due_s: its deadline.
        """
        account = self._where.get(workflow)
        if account is None:
            account = self._where[workflow] = self._account(tenant, now)
            if not account.waiting:
                self._advance()
                account.virtual_s = max(account.virtual_s, self._virtual_s - self._half_s)
                self._competing[account] = None
                self._list(account)
        wait = _Wait(priority, new, turn, next(self._order), workflow, work_s, due_s)
        account.waiting[workflow] = wait
        heapq.heappush(account.line, wait)
        if len(account.line) > 2 * len(account.waiting) + 16:
            account.line = list(account.waiting.values())
            heapq.heapify(account.line)
        self._changed(account)

    def leave(self, workflow: Hashable) -> None:
        """A workflow has been let in, or waits no longer; others are passed over."""
        account = self._where.pop(workflow, None)
        if account is None:
            return
        self._advance()
        del account.waiting[workflow]
        if not account.waiting:
            del self._competing[account]
            account.line.clear()
        self._changed(account)

    def charge(self, tenant: str, gpu_s: float, pool_s: float, now: float) -> None:
        """`tenant` has used so many GPU seconds and pool seconds; told when it is known."""
        account = self._account(tenant, now)
        account.gpu_s += gpu_s
        account.pool_s += pool_s
        if len(self._competing) > (account in self._competing):
            account.virtual_s += max(gpu_s + pool_s, 0.0) / account.weight
            self._first_until = -math.inf

    # -- questions ------------------------------------------------------------------------------

    def first(self, now: float) -> Any:
        """The workflow whose turn it is; None if nobody waits."""
        if now >= self._first_until:
            self._first_until = now + _EPOCH_S
            lines = self._competing
            best = min(lines, key=lambda a: _rank(a.head(), self._place(a, now)), default=None)
            self._first = None if best is None else best.head().workflow
        return self._first

    def line(self, now: float) -> list[Any]:
        """The workflows that wait, in the order in which they would be let in, were it all now."""
        ranked: list[tuple[_Rank, Any]] = []
        for account in self._competing:
            place = self._place(account, now)
            ranked += ((_rank(wait, place), wait.workflow) for wait in account.waiting.values())
        return [workflow for _, workflow in sorted(ranked, key=lambda entry: entry[0])]

    def place(self, tenant: str, now: float) -> Place:
        """Where `tenant` stands among those that wait, or would if it did."""
        account = self._kept.get(tenant) or self._accounts.get(tenant) or self._kept[OTHER]
        return self._place(account, now)

    def state(self) -> dict[str, dict[str, float]]:
        """Per tenant: its weight, seconds used since its account was opened, workflows waiting."""
        return {
            account.name: {
                "weight": account.weight,
                "gpu_s": account.gpu_s,
                "pool_s": account.pool_s,
                "virtual_s": account.virtual_s,
                "waiting": float(len(account.waiting)),
            }
            for account in self._everybody()
            if account.gpu_s + account.pool_s > 0.0 or account.waiting
        }

    def jain(self) -> float:
        """Jain's index of service over weight: 1 = all alike, 1/n = one of n has had it all."""
        served = [(a.gpu_s + a.pool_s) / a.weight for a in self._everybody()]
        served = [value for value in served if value > 0.0]
        squares = len(served) * sum(value * value for value in served)
        return sum(served) ** 2 / squares if squares else 1.0

    # -- inside ---------------------------------------------------------------------------------

    def _everybody(self) -> Iterator[_Account]:
        return itertools.chain(self._kept.values(), self._accounts.values())

    def _place(self, account: _Account, now: float) -> Place:
        if len(self._competing) <= (account in self._competing):
            return NEUTRAL
        lead_s = account.virtual_s - self._least_s()
        return Place(lead_s if lead_s >= self._half_s else 0.0, -account.urgency_at(now))

    def _changed(self, account: _Account) -> None:
        account.look_at = self._first_until = -math.inf

    def _account(self, tenant: str, now: float) -> _Account:
        """The tenant's account, opened on first sight; the common one if there is no room."""
        if tenant in self._kept:
            return self._kept[tenant]
        account = self._accounts.get(tenant)
        if account is None:
            if len(self._accounts) >= self._limit and not self._close_oldest(now):
                return self._kept[OTHER]
            account = self._accounts[tenant] = _Account(tenant, 1.0, self._virtual_s)
        account.touched_at = now
        self._accounts.move_to_end(tenant)
        return account

    def _close_oldest(self, now: float) -> bool:
        """Make room in the table, if the account that was touched longest ago may go."""
        oldest = next(iter(self._accounts.values()), None)
        if oldest is None:
            return False
        if oldest.waiting:
            self._accounts.move_to_end(oldest.name)
            return False
        if now - oldest.touched_at < self._expiry_s:
            return False
        del self._accounts[oldest.name]
        return True

    def _list(self, account: _Account) -> None:
        if not account.listed:
            account.listed = True
            heapq.heappush(self._least, (account.virtual_s, next(self._order), account))

    def _least_s(self) -> float:
        """Virtual service of the least served that waits; at least one does."""
        while True:
            virtual_s, _, account = self._least[0]
            if account.waiting and account.virtual_s == virtual_s:
                return virtual_s
            # Service only grows, so an entry comes up no later than it should.
            heapq.heappop(self._least)
            account.listed = False
            if account.waiting:
                self._list(account)

    def _advance(self) -> None:
        if self._competing:
            self._virtual_s = max(self._virtual_s, self._least_s())
