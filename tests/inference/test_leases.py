"""Leases: one worker per part, silent ones are replaced, and clocks need not agree."""

import threading

from featdistill.inference.leases import Leases


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def take(leases, part):
    return leases.take(part, leases.held().get(part))


def test_of_many_that_try_at_once_one_gets_the_part(tmp_path):
    workers = [Leases(tmp_path, 60) for _ in range(8)]
    start, taken = threading.Barrier(8), []

    def run(worker):
        start.wait()
        for part in map(str, range(20)):
            taken.extend([part] if worker.take(part, None) else [])

    threads = [threading.Thread(target=run, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == sorted(map(str, range(20)))


def test_a_silent_worker_is_replaced_by_one_other(tmp_path):
    clock = Clock()
    first, second, third = (Leases(tmp_path, 10, clock) for _ in range(3))
    assert take(first, "a") == "a.0"
    assert [take(worker, "a") for worker in (second, third)] == [None, None]
    clock.now = 9.9
    assert take(second, "a") is None
    clock.now = 10
    held = second.held(), third.held()
    assert second.take("a", held[0]["a"]) == "a.1"
    assert third.take("a", held[1]["a"]) is None
    assert second.held() == {"a": "a.1"}


def test_a_worker_that_gives_signs_of_life_keeps_its_part(tmp_path):
    clock = Clock()
    first, second = Leases(tmp_path, 10, clock), Leases(tmp_path, 10, clock)
    lease = take(first, "a")
    for beat in range(1, 6):
        assert take(second, "a") is None
        first.folder.write(lease, first._content(beat))
        clock.now += 9


def test_a_lease_is_renewed_while_its_part_is_scored_and_gone_afterwards(tmp_path):
    first, second = Leases(tmp_path, 0.2), Leases(tmp_path, 0.2)
    lease = take(first, "a")
    before = first.folder.read(lease)
    with first.kept(lease):
        waited = threading.Event()
        while first.folder.read(lease) == before:
            waited.wait(0.01)
        assert second.holder(lease) == first.worker
    assert first.held() == {}
    assert take(second, "a") == "a.0"


def test_a_lease_that_vanishes_is_not_an_expired_one(tmp_path):
    clock = Clock()
    first, second = Leases(tmp_path, 10, clock), Leases(tmp_path, 10, clock)
    lease = take(first, "a")
    assert second.take("a", lease) is None
    first.folder.remove(lease)
    clock.now = 11
    assert second.take("a", lease) is None
