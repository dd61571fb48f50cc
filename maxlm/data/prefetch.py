"""Makes the next results ready on a thread while the caller works on the present one."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class _Shelf(Generic[T]):
    """What thread and caller share. The thread knows this and not the Prefetcher, so that the latter can be dropped."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.ready: deque[T] = deque()
        self.error: BaseException | None = None
        self.closed = False

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.ready.clear()
            self.changed.notify_all()


class Prefetcher(Iterator[T]):
    """function(start), function(start + 1), … function(stop - 1), in this order, each computed ahead of its use.

    How long the caller waits for data is the time that `next` takes. Ends with the thread when it is closed, left as a
    context manager, or no longer referred to.

    Args:
      function: What makes a result from its number; runs on the thread.
      start: First number.
      stop: One past the last.
      depth: Results that may lie ready; 0: no thread, `next` computes.

    Raises:
      BaseException: `next` raises what `function` raised, after the results before it, and again when asked again.
    """

    def __init__(self, function: Callable[[int], T], *, start: int, stop: int, depth: int):
        self._shelf: _Shelf[T] = _Shelf()
        self._next, self._stop = start, stop
        self._function = function
        self._thread: threading.Thread | None = None
        if depth > 0:
            arguments = (function, range(start, stop), depth, self._shelf)
            self._thread = threading.Thread(target=_work, args=arguments, name="prefetch", daemon=True)
            weakref.finalize(self, self._shelf.close)
            self._thread.start()

    def __next__(self) -> T:
        shelf = self._shelf
        if shelf.closed or self._next >= self._stop:
            raise StopIteration
        if self._thread is None:
            item = self._function(self._next)
        else:
            with shelf.changed:
                shelf.changed.wait_for(lambda: shelf.ready or shelf.error or shelf.closed)
                if not shelf.ready:
                    raise shelf.error or StopIteration
                item = shelf.ready.popleft()
                shelf.changed.notify_all()
        self._next += 1
        return item

    def close(self) -> None:
        """Ends the thread, waiting for the result it is at; drops what lies ready: `next` ends the iteration."""
        self._shelf.close()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _work(function: Callable[[int], T], numbers: range, depth: int, shelf: _Shelf[T]) -> None:
    try:
        for number in numbers:
            with shelf.changed:
                shelf.changed.wait_for(lambda: shelf.closed or len(shelf.ready) < depth)
                if shelf.closed:
                    return
            item = function(number)
            with shelf.changed:
                if shelf.closed:
                    return
                shelf.ready.append(item)
                shelf.changed.notify_all()
    except BaseException as error:  # whatever ends the thread has to reach the caller, who would wait for ever
        with shelf.changed:
            shelf.error = error
            shelf.changed.notify_all()
