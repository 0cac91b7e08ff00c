"""Who is lost, who says so and who writes it down: several watches of one process over one store."""

import datetime
import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed import HashStore

from warpline.parallel import watch
from warpline.parallel.watch import FirstFailed, Loss, Watch

TIMEOUT = datetime.timedelta(seconds=1.0)


class Rank(Watch):
    """Leaving is noted, not done."""

    def __init__(self, rank: int, size: int, store: HashStore, timeout: datetime.timedelta = TIMEOUT):
        self.has_left, self.said = False, []
        super().__init__(rank, size, timeout, store, store)
        self.last_words = self.said.append

    def leave(self) -> None:
        self.has_left = True
        self.stopped.set()

    def die(self) -> None:
        """Beats no more, and says nothing."""
        self.stopped.set()
        self.thread.join()


@pytest.fixture
def ranks(monkeypatch):
    """Four ranks that beat fifty times a second."""
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.02)
    store = HashStore()
    ranks = [Rank(rank, 4, store) for rank in range(4)]
    for rank in ranks:
        rank.where = f"sft step {rank.rank}"
    yield ranks
    for rank in ranks:
        rank.stop()


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_silent_rank_is_named_once_and_every_other_rank_ends(ranks, capsys):
    time.sleep(0.1)
    ranks[2].die()
    living = [rank for rank in ranks if rank.rank != 2]
    wait_for(lambda: all(rank.has_left for rank in living))
    said = [line for line in capsys.readouterr().err.splitlines() if "rank 2" in line]
    assert len(said) == 1 and said[0].endswith(
        "is gone or stopped, last seen in sft step 2; start it again to go on from the last checkpoint"
    )
    assert [rank.said for rank in living] == [["rank 2 was lost"], [], []], "the first that is left writes"


def test_the_second_writes_where_the_first_is_lost(ranks):
    time.sleep(0.1)
    ranks[0].die()
    wait_for(lambda: all(rank.has_left for rank in ranks[1:]))
    assert [rank.said for rank in ranks[1:]] == [["rank 0 was lost"], [], []]


def test_a_rank_whose_collective_failed_finds_who_is_lost_before_the_timeout(ranks):
    """Long before: the timeout is a second, three beats are 0.06 s. The others are told the same."""
    time.sleep(0.1)
    ranks[1].die()
    began = time.monotonic()
    found = [ranks[rank].lost() for rank in (3, 0)]
    assert time.monotonic() - began < 0.8
    assert found[0] == found[1] and found[0].ranks == (1,) and found[0].reason == "rank 1 was lost"


def test_nobody_is_lost_where_all_beat_or_have_ended(ranks):
    ranks[1].stop()
    assert [ranks[rank].lost() for rank in (2, 3)] == [None, None]


def test_several_silent_ranks_are_named_together(ranks):
    time.sleep(0.1)
    ranks[1].die()
    ranks[3].die()
    loss = ranks[0].lost()
    assert loss.ranks == (1, 3) and loss.reason == "rank 1, rank 3 were lost" and " are gone or stopped" in loss.line


def test_a_rank_that_fails_by_itself_ends_the_others_without_being_lost(ranks, capsys):
    time.sleep(0.1)
    line = "rank 3 failed in sft step 3"
    assert ranks[3].fail("rank 3 failed: ZeroDivisionError", line)
    ranks[3].stop()
    wait_for(lambda: all(rank.has_left for rank in ranks[:3]))
    assert ranks[0].said == ["rank 3 failed: ZeroDivisionError"] and not ranks[1].said
    assert "gone or stopped" not in capsys.readouterr().err


def test_what_every_rank_fails_by_is_told_once(ranks):
    assert [ranks[rank].fail("bad input", "no such file") for rank in (1, 0, 2)] == [True, False, False]
    assert ranks[3].fail("bad input", "another line")


def test_a_rank_that_is_asked_to_end_misses_a_silent_one_within_beats(monkeypatch):
    """As a launcher does that lost a rank: long before the timeout, after which nobody would be left to say so."""
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.02)
    store, long = HashStore(), datetime.timedelta(seconds=300)
    ranks = [Rank(rank, 3, store, long) for rank in range(3)]
    time.sleep(0.1)
    ranks[1].die()
    time.sleep(0.5)
    assert not ranks[0].has_left
    for rank in (ranks[0], ranks[2]):
        os.write(rank.wakeup, bytes([signal.SIGTERM]))
    wait_for(lambda: ranks[0].has_left and ranks[2].has_left)
    assert ranks[0].said == ["rank 1 was lost"]
    for rank in ranks:
        rank.stop()


class GoneStore(HashStore):
    """As a TCPStore whose server was killed."""

    is_gone = False

    def set(self, key, value):
        if self.is_gone:
            raise RuntimeError("Connection reset by peer")
        super().set(key, value)


def test_without_the_store_the_first_rank_or_its_torchrun_is_gone(monkeypatch, capsys):
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(watch, "STORE_SECONDS", 0.1)
    store = GoneStore()
    ranks = [Rank(rank, 3, store) for rank in (1, 2)]
    store.is_gone = True
    wait_for(lambda: all(rank.has_left for rank in ranks))
    assert [rank.said for rank in ranks] == [["rank 0 or its torchrun was lost"], []]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warpline: rank 0, or the torchrun of its node, is gone with their store; rank 1 is in start; ")


def test_a_rank_that_is_ending_does_not_miss_the_store(monkeypatch):
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.02)
    store = GoneStore()
    rank = Rank(1, 3, store)
    store.is_gone = True
    time.sleep(0.2)
    rank.stop()
    assert not rank.has_left and not rank.said


def test_a_rank_that_has_ended_is_not_missed(ranks):
    time.sleep(0.1)
    ranks[2].stop()
    time.sleep(1.3)
    assert not any(rank.has_left for rank in ranks)


def test_all_ranks_together_beat_a_thousand_times_a_second_at_most():
    lone = Rank(0, 16384, HashStore(), datetime.timedelta(seconds=300))
    assert lone.beat_seconds == pytest.approx(16.384)
    lone.stopped.set()


def test_a_turn_is_waited_for_and_its_failure_told():
    store = HashStore()
    first, second = Rank(0, 2, store), Rank(1, 2, store)
    turns = [(first.next_turn(), second.next_turn()) for _ in range(2)]
    assert all(mine == yours for mine, yours in turns)
    store.set(turns[0][0], "done")
    store.set(turns[1][0], "failed")
    second.wait_for(turns[0][1])
    with pytest.raises(FirstFailed):
        second.wait_for(turns[1][1])
    for rank in (first, second):
        rank.stop()


def test_a_stopped_process_of_the_same_launcher_is_killed_and_another_is_not(ranks):
    """This process stands for the launcher's child: its own child is a stranger, its sibling is not."""
    code = "import os, time; print(os.getppid(), flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert (
        int(child.stdout.readline()) == os.getpid() == watch._parent(child.pid) and watch._parent(os.getpid()) == os.getppid()
    )
    ranks[1].die()
    ranks[1].store.set("beat/1", f"7 {watch.socket.gethostname()} {child.pid} x")
    ranks[0].end(Loss((1,), "rank 1 was lost", ""))
    assert child.poll() is None, "not a sibling"
    child.kill()
    child.wait()
    child.stdout.close()


def test_the_process_ends_with_code_4_and_leaves_the_reason():
    code = """
import datetime, time
from torch.distributed import HashStore
from warpline.parallel import watch
watch.BEAT_SECONDS = 0.02
store = HashStore()
rank = watch.Watch(0, 2, datetime.timedelta(seconds=0.5), store, store)
rank.last_words = lambda reason: print(reason, flush=True)
time.sleep(60)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 4 and done.stdout == "rank 1 was lost\n" and "last seen in start" in done.stderr


def test_a_rank_that_says_why_it_failed_is_not_ended_by_its_own_words(monkeypatch):
    monkeypatch.setattr(watch, "BEAT_SECONDS", 0.001)
    for _ in range(20):
        rank = Rank(0, 2, HashStore(), datetime.timedelta(seconds=300))
        assert rank.fail("bad input", "no such file")
        time.sleep(0.01)
        assert not rank.has_left
        rank.stop()
