from __future__ import annotations

from nightshift.providers.window import START, Window


def test_a_server_that_keeps_up_gets_one_more_per_round_of_answers():
    window = Window(most=100)
    for _ in range(int(START)):
        window = window.answered(0.1)
    assert START < window.size <= START + 1
    for _ in range(10_000):
        window = window.answered(0.1)
    assert window.slots == 100


def test_an_overload_halves_the_window_once_for_all_that_were_in_flight():
    window = Window(most=100, size=64.0)
    for _ in range(20):
        window = window.refused(now=10.0, seconds=1.0)
    assert (window.slots, window.held_until) == (32, 11.0)
    assert window.refused(now=11.0, seconds=1.0).slots == 16


def test_one_request_is_always_let_through():
    window = Window(most=100, size=1.0)
    assert window.refused(now=0.5, seconds=1.0).slots == 1


def test_a_server_that_only_queues_gets_no_more():
    window = Window(most=100).answered(0.1)
    assert window.answered(0.5).size == window.size
    assert window.answered(0.15).size > window.size
