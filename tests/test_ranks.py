"""The launcher of several ranks: whatever goes wrong on one of them fails the test and says so."""

import os
import time

import pytest
from ranks import RankError, Ranks


@pytest.fixture(scope="module")
def two():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


def test_every_rank_answers_and_the_processes_stay(two):
    assert two.call("rank_faults:answer", 5) == [(0, 2, 5), (1, 2, 5)]
    processes = list(two._processes)
    assert two.call("rank_faults:answer", 6) == [(0, 2, 6), (1, 2, 6)]
    assert two._processes == processes


def test_an_error_comes_with_its_traceback_and_where_the_others_were(two):
    with pytest.raises(RankError) as caught:
        two.call("rank_faults:raise_on", 1)
    text = str(caught.value)
    assert text.index("rank 1 of 2 failed") < text.index("rank 0 of 2 was still waiting")
    assert "ValueError: a fault on rank 1" in text
    assert 'rank_faults.py", line' in text
    assert "in wait_for_ever" in text.partition("was still waiting")[2]


@pytest.mark.parametrize(
    ("fault", "messages"),
    [
        ("exit_on", ["it ended with code 7"]),
        ("crash_on", ["it ended with signal SIGSEGV", "in read_nowhere"]),
    ],
)
def test_a_rank_that_dies_is_named(two, fault, messages):
    with pytest.raises(RankError) as caught:
        two.call(f"rank_faults:{fault}", 0)
    assert "rank 0 of 2 failed" in str(caught.value)
    for message in messages:
        assert message in str(caught.value)
    assert "rank 1 of 2" not in str(caught.value)


def test_a_rank_that_hangs_is_shown_and_ended(two):
    started = time.monotonic()
    two.call("rank_faults:answer", 0)
    processes = list(two._processes)
    with pytest.raises(RankError) as caught:
        two.call("rank_faults:hang_on", 1, timeout=0.5)
    assert "rank 1 of 2 did not answer within 0.5 s" in str(caught.value)
    assert "in wait_for_ever" in str(caught.value)
    assert time.monotonic() - started < 30
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)


def test_after_a_fault_others_are_started(two):
    with pytest.raises(RankError, match="a fault on rank 0"):
        two.call("rank_faults:raise_on", 0)
    assert two.call("rank_faults:answer", 1) == [(0, 2, 1), (1, 2, 1)]


def test_a_function_that_is_not_there_fails_on_every_rank(two):
    with pytest.raises(RankError, match=r"rank 0 of 2 failed(.|\n)*rank 1 of 2 failed"):
        two.call("rank_faults:nothing")
