"""Contexts that a session has left take no room; those that it takes up again do."""

from __future__ import annotations

from helpers import BLOCK, arrival, check_integrity, make_policy, run_call


class Agents:
    """Contexts of sessions, each call one block longer than the last; alike by their names."""

    def __init__(self):
        self.policy = make_policy(pool_blocks=1000)
        self.contexts: dict[tuple[str, str], list[int]] = {}
        self.now = 0.0

    def call(self, session: str, name: str) -> None:
        self.now += 1.0
        first = [len(name)] * BLOCK + [hash((session, name)) + i for i in range(9 * BLOCK)]
        tokens = self.contexts.get((session, name), first)
        call = arrival(f"{session}-{name}-{self.now}", tokens, session)
        output = [int(self.now) * 100 + i for i in range(BLOCK)]
        self.contexts[session, name] = run_call(self.policy, call, output, self.now)
        check_integrity(self.policy)

    def counted(self, session: str) -> list[int]:
        contexts = self.policy.table.sessions["", session].contexts
        return [context.counted for context in contexts]


def test_a_helper_that_is_done_takes_no_room_after_eight_calls():
    agents = Agents()
    agents.call("s", "main")
    agents.call("s", "helper")
    for _ in range(7):
        agents.call("s", "main")
    assert all(agents.counted("s"))
    agents.call("s", "main")
    assert agents.counted("s") == [19, 0]


def test_a_class_whose_helpers_do_not_come_back_leaves_them_sooner():
    agents = Agents()
    for session in ("a", "b", "c"):
        agents.call(session, "main")
        agents.call(session, "helper")
        for _ in range(8):
            agents.call(session, "main")
    agents.call("d", "main")
    agents.call("d", "helper")
    agents.call("d", "main")
    # Who waits for a helper is skipped once, too.
    assert agents.counted("d") == [12, 11]
    agents.call("d", "main")
    assert agents.counted("d") == [13, 0]


def test_who_is_taken_up_again_has_room_again():
    agents = Agents()
    agents.call("s", "main")
    for _ in range(9):
        agents.call("s", "helper")
    assert agents.counted("s") == [0, 19]
    agents.call("s", "main")
    assert agents.counted("s") == [12, 19]


def test_agents_that_take_turns_under_one_id_keep_their_room():
    agents = Agents()
    for _ in range(20):
        for name in ("east", "south"):
            agents.call("s", name)
    assert agents.counted("s") == [30, 30]
