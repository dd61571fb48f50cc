import gc
import threading
import time

import pytest

from maxlm.data.prefetch import Prefetcher


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


def wait_until(condition, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_results_come_in_order_and_end(depth: int):
    with Prefetcher(lambda n: n * n, start=3, stop=40, depth=depth) as squares:
        assert list(squares) == [n * n for n in range(3, 40)]
        with pytest.raises(StopIteration):
            next(squares)
    assert not prefetch_threads()


@pytest.mark.parametrize("depth", [0, 2])
def test_nothing_to_do_ends_at_once(depth: int):
    with Prefetcher(lambda n: n, start=5, stop=5, depth=depth) as none:
        assert list(none) == []


def test_it_works_ahead_as_far_as_the_depth_and_no_further():
    made: list[int] = []
    with Prefetcher(made.append, start=0, stop=100, depth=3) as items:
        assert wait_until(lambda: len(made) == 3)
        next(items)
        assert wait_until(lambda: len(made) == 4)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]


def test_depth_zero_computes_when_asked():
    made: list[int] = []
    items = Prefetcher(made.append, start=0, stop=100, depth=0)
    assert made == [] and not prefetch_threads()
    next(items)
    assert made == [0]


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_an_error_comes_in_its_place_and_stays(depth: int):
    def fails(number: int) -> int:
        if number == 2:
            raise KeyError("row 2")
        return number

    with Prefetcher(fails, start=0, stop=10, depth=depth) as items:
        assert [next(items), next(items)] == [0, 1]
        for _ in range(2):
            with pytest.raises(KeyError, match="row 2"):
                next(items)


def test_close_ends_a_thread_that_waits_for_room():
    made: list[int] = []
    items = Prefetcher(made.append, start=0, stop=1000, depth=2)
    assert wait_until(lambda: len(made) == 2)
    items.close()
    assert not prefetch_threads() and len(made) == 2
    with pytest.raises(StopIteration):
        next(items)
    items.close()


def test_close_from_another_thread_wakes_the_caller():
    release = threading.Event()
    items = Prefetcher(lambda n: release.wait(10), start=0, stop=1000, depth=2)
    ended: list[bool] = []
    caller = threading.Thread(target=lambda: ended.append(next(items, None) is None))
    caller.start()
    items._shelf.close()
    caller.join(5)
    release.set()
    assert ended == [True]
    items.close()


def test_an_abandoned_one_leaves_no_thread():
    items = Prefetcher(lambda n: n, start=0, stop=10**9, depth=2)
    next(items)
    (thread,) = prefetch_threads()
    assert thread.daemon
    del items
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_the_wait_is_the_time_of_next():
    with Prefetcher(lambda n: time.sleep(0.05), start=0, stop=3, depth=1) as items:
        begin = time.monotonic()
        next(items)
        assert time.monotonic() - begin > 0.03
