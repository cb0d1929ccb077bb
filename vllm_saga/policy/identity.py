"""Whose call is this? Explicit id, then parent link, then lineage, then a workflow of its own."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable

from vllm_saga.policy.graph import AgentClass
from vllm_saga.policy.workflow import Arrival, Context, Session, SessionKey, WorkflowTable

_MAX_ID_CHARS = 256
# A chat template may re-render the end of the generation prompt (`<think>` and the like).
_RERENDERED_TOKENS = 4
# Nobody's prompts by chance go on from one another so often.
_NO_CHANCE_CALLS = 4
_ANONYMOUS = "\0"
_SALT = "salt:"


def session_key(tenant: str, session_id: str) -> SessionKey:
    """Key of a session within its tenant; a huge id is kept as its digest."""
    return (tenant, short_id(session_id))


def short_id(name: str) -> str:
    """An id as it is kept: itself, or the digest of a huge one."""
    return digest_id(name) if len(name) > _MAX_ID_CHARS else name


def digest_id(name: str) -> str:
    """What stands for an id that cannot be kept as it is: plain text, and the same everywhere."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=20)
    return f"blake2b:{digest.hexdigest()}"


def salt_tenant(salt: str) -> str:
    """What others know a tenant by whose cache salt, a secret, names it, huge or not."""
    digest = hashlib.blake2b(short_id(salt).encode("utf-8", "surrogatepass"), digest_size=16)
    return f"{_SALT}{digest.hexdigest()}"


def anonymous_id(call_id: str) -> str:
    """What stands for the id of a session that no client named: its first call's."""
    return _ANONYMOUS + call_id


def is_anonymous(key: SessionKey) -> bool:
    """Whether a session is known by its content only: no client ever named it."""
    return key[1].startswith(_ANONYMOUS)


class LineageIndex:
    """Finds the context that a prompt continues, by the block hashes it shares with it.

    Indexed are the last full block of each context's last prompt (a template may re-render the
    assistant turn, so the prompt must match on its own) and of its prompt with output. Block hashes
    are chained, so one hit proves the whole prefix; the few prompt tokens behind the last full
    block are compared as they are. A prompt that two sessions could claim belongs to neither.
    Hashes of two tenants are equal where no cache salt tells them apart: whose they are is asked.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._owners: dict[Hashable, list[Context]] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def add(self, context: Context) -> None:
        """Index `context` at its present length, replacing its older entries."""
        self.remove(context)
        prompt_blocks, blocks = context.prompt_blocks, len(context.chain)
        ends = {n for n in (prompt_blocks, blocks) if n}
        context.anchors = tuple(context.chain[n - 1] for n in sorted(ends))
        for anchor in context.anchors:
            self._owners.setdefault(anchor, []).append(context)

    def remove(self, context: Context) -> None:
        for anchor in context.anchors:
            owners = self._owners.get(anchor)
            if owners is not None:
                owners[:] = [owner for owner in owners if owner is not context]
                if not owners:
                    del self._owners[anchor]
        context.anchors = ()

    def find(self, arrival: Arrival) -> Context | None:
        """The context whose last prompt is the longest proper prefix of the arrival's prompt."""
        owners_of = self._owners
        for index in range(min(len(arrival.chain), self._prompt_blocks(arrival)) - 1, -1, -1):
            owners = owners_of.get(arrival.chain[index])
            if owners is None:
                continue
            heirs = [owner for owner in owners if self._continues(arrival, owner)]
            if len({id(heir.session) for heir in heirs}) == 1:
                return heirs[0]
        return None

    def _prompt_blocks(self, arrival: Arrival) -> int:
        return arrival.prompt_tokens // self._block_size

    def _continues(self, arrival: Arrival, context: Context) -> bool:
        if arrival.prompt_tokens <= context.prompt_tokens:
            return False
        if context.session.key[0] != arrival.tenant:
            return False
        tail = context.prompt_tail[: max(len(context.prompt_tail) - _RERENDERED_TOKENS, 0)]
        if arrival.tokens is None:
            return not context.prompt_tail
        start = context.prompt_blocks * self._block_size
        return tuple(arrival.tokens[start : start + len(tail)]) == tail


class Identity:
    """Resolves an arrival to its session, creating sessions and workflows as needed."""

    def __init__(self, table: WorkflowTable, lineage: LineageIndex | None) -> None:
        self._table = table
        self._lineage = lineage

    def resolve(self, arrival: Arrival, agent: AgentClass) -> Session:
        """The session of `arrival`: by id, by parent, by lineage, or a new one."""
        table = self._table
        if arrival.session_id:
            key = session_key(arrival.tenant, arrival.session_id)
            session = table.sessions.get(key)
            if session is not None:
                return session
            parent = self._parent(arrival, agent)
            if parent is not None:
                return table.join(key, parent.workflow)
            return table.create(key, agent, known=True)
        if self._lineage is not None:
            context = self._lineage.find(arrival)
            if context is not None:
                self._recognize(context, arrival, agent)
                return context.session
        agent.observe_anonymous_first()
        key = (arrival.tenant, anonymous_id(arrival.call_id))
        return table.create(key, agent, known=agent.agentic)

    def _recognize(self, context: Context, arrival: Arrival, agent: AgentClass) -> None:
        """A context is continued: by its agent, or does a prompt by chance begin as its prompt?

        An answer that is sent back is no chance; templates that render it anew leave it open.
        """
        session = context.session
        if is_anonymous(session.key) and not session.continued:
            session.continued = True
            agent.observe_anonymous_continued()
        workflow = session.workflow
        if not workflow.known:
            workflow.known = (
                _sends_back(arrival, context)
                or agent.continues
                or workflow.calls_done >= _NO_CHANCE_CALLS
            )

    def _parent(self, arrival: Arrival, agent: AgentClass) -> Session | None:
        """The parent's session; made if its own first call has not been seen yet."""
        if not arrival.parent_id or arrival.parent_id == arrival.session_id:
            return None
        key = session_key(arrival.tenant, arrival.parent_id)
        return self._table.sessions.get(key) or self._table.create(key, agent, known=True)


def _sends_back(arrival: Arrival, context: Context) -> bool:
    """Whether the prompt has the answer to the context's last one, as far as it fills blocks."""
    blocks = len(context.chain)
    if not context.prompt_blocks < blocks <= len(arrival.chain):
        return False
    same: bool = arrival.chain[blocks - 1] == context.chain[blocks - 1]
    return same
