"""Signs of life between processes: here threads with one store; real ones are among the tests of training."""

import threading
import time

import pytest
import torch.distributed as dist

from modelwright.training.heartbeat import Heartbeat, connection_lost


class Member:
    """One of the processes."""

    def __init__(self, store, rank, world=2):
        self.said = []
        self.over = threading.Event()
        keys = {"patience": 1.0, "interval": 0.02, "grace": 0.1}
        self.beat = Heartbeat(**keys, lost=self.lost, member=(store, rank, world))

    def lost(self, message):
        self.said.append(message)
        self.over.set()


@pytest.fixture
def pair():
    store = dist.HashStore()
    return Member(store, 0), Member(store, 1)


def test_the_living_are_left_alone_and_may_leave_at_any_time(pair):
    a, b = pair
    with a.beat:
        with b.beat:
            time.sleep(1.5)
        time.sleep(1.5)  # b is done
    assert (a.said, b.said) == ([], [])
    assert a.beat._store.get("1") == b"done"


def test_one_that_stands_still_is_noticed(pair):
    a, b = pair
    b.beat._store = a.beat.member[0]
    a.beat.member[0].set("1", "7")
    with a.beat:
        assert a.over.wait(60)
    [message] = a.said
    assert message.startswith("Process 1 of 2 has given no sign of life for 1 s: stopping.")


def test_a_machine_that_stood_still_as_a_whole_has_killed_nobody(pair, monkeypatch):
    a, _ = pair
    store, waits, wait = a.beat.member[0], [], a.beat._stop.wait
    store.set("1", "7")

    def stopped_once(seconds):
        waits.append(seconds)
        if len(waits) == 2:
            time.sleep(1.5)  # here, and there: what the other has counted is as before
        if len(waits) == 3:
            store.set("1", "8")
        return wait(seconds)

    monkeypatch.setattr(a.beat._stop, "wait", stopped_once)
    with a.beat:
        while len(waits) < 6:
            time.sleep(0.01)
    assert a.said == []


def test_one_that_never_comes_is_noticed(pair):
    with pair[0].beat:
        assert pair[0].over.wait(60)


def test_one_that_fails_tells_the_others(pair):
    a, b = pair
    with a.beat:
        with pytest.raises(ZeroDivisionError), b.beat:
            raise ZeroDivisionError
        assert a.over.wait(60)
    assert "Process 1 of 2 stopped with an error" in a.said[0]
    assert b.said == []


def test_the_main_thread_has_a_moment_to_say_something_better(pair):
    a, b = pair
    a.beat.grace = 2.0
    with a.beat, pytest.raises(ZeroDivisionError), b.beat:
        time.sleep(0.1)
        raise ZeroDivisionError
    assert a.said == []


class Gone:
    """A store whose keeper has ended."""

    def __init__(self):
        self.alive = True

    def set(self, *args):
        if not self.alive:
            raise dist.DistNetworkError("Broken pipe")

    def check(self, keys):
        return False


def test_the_end_of_the_store_is_noticed_too():
    store = Gone()
    member = Member(store, 0)
    with member.beat:
        store.alive = False
        assert member.over.wait(60)
    assert "find each other is gone" in member.said[0]


def test_alone_there_is_nothing_to_watch():
    with Heartbeat(interval=0.01) as beat:
        assert beat._thread is None


def test_errors_that_mean_a_lost_process():
    assert connection_lost(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:3"))
    assert connection_lost(dist.DistBackendError("NCCL"))
    assert not connection_lost(RuntimeError("The size of tensor a (3) must match"))
    assert not connection_lost(ValueError("Connection closed by peer"))
