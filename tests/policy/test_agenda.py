"""What is due comes in order, what was called off never, and the agenda stays small."""

from hypothesis import given
from hypothesis import strategies as st

from vllm_saga.policy.agenda import Agenda

ITEMS = st.lists(st.tuples(st.integers(0, 20), st.booleans()), max_size=200)


@given(ITEMS, st.integers(0, 20))
def test_takes_what_stands_in_order(items: list[tuple[int, bool]], now: int) -> None:
    standing = {index for index, (_, stands) in enumerate(items) if stands}
    agenda = Agenda(standing.__contains__)
    for index, (when, _) in enumerate(items):
        agenda.add(when, index, len(standing))
    taken = []
    while (entry := agenda.take(now)) is not None:
        assert agenda.due(now) is None or agenda.due(now) >= entry
        taken.append(entry)
    due = [(when, index) for index, (when, stands) in enumerate(items) if stands and when <= now]
    assert taken == sorted(due)


def test_what_was_called_off_does_not_pile_up() -> None:
    agenda = Agenda(lambda item: item % 1000 == 0)
    for item in range(10_000):
        agenda.add(10_000 - item, item, 10)
    assert len(agenda) <= 4 * 10 + 64
    assert agenda.take(20_000) == (1_000, 9_000)
