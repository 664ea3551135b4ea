"""Work over processes: in order, each thing once, and an end that is told."""

import os
import signal
import time

import pytest

from data.processes import in_order


def halved(by: int):
    """What a process makes of its work."""

    def work(item):
        if item == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if item == "fail":
            raise ValueError("this one fails")
        time.sleep(item % 3 / 1000)
        return item / by, os.getpid()

    return work


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_work(workers):
    taken = []

    def items():
        for item in range(40):
            taken.append(item)
            yield item

    done = []
    for item, (half, process) in in_order(items(), workers, halved, 2):
        done.append((item, half))
        assert len(taken) - len(done) <= 2 * workers + 1  # no more than a few are under way
        assert (process == os.getpid()) == (workers == 1)
    assert done == [(item, item / 2) for item in range(40)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_mistake_in_the_work_is_the_callers(workers):
    with pytest.raises(ValueError, match="this one fails"):
        list(in_order([3, "fail", 4], workers, halved, 2))


def test_a_killed_worker_is_told():
    with pytest.raises(ValueError, match="a worker was killed"):
        list(in_order([3, "die", *range(9)], 2, halved, 2))
