"""Calling a function for many numbers in threads, ahead of who asks for the results."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from dinoreg.runtime.environment import usable_cores

T = TypeVar("T")
READERS = "dinoreg-reader"  # with which the names of the threads begin


def parallel(function: Callable[[int], T], indices: Iterable[int], workers: int | None = None) -> Iterator[T]:
    """function(index) for each index in order, computed ahead in `workers` threads; 0: in the calling one.

    None: in `default_workers()`

    What the function raises is raised when its turn comes, and what was not begun is cancelled. Who stops asking does
    not wait for what was begun: it may be a read that never ends.
    """
    workers = default_workers() if workers is None else workers
    if workers <= 0:
        yield from map(function, indices)
        return
    ahead: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(workers, READERS)
    try:
        for index in indices:
            ahead.append(pool.submit(function, index))
            if len(ahead) >= 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def default_workers() -> int:
    """Threads that decode: one for every core but one, at most 16."""
    return min(max(usable_cores() - 1, 1), 16)
