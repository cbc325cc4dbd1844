"""Work on many items: in threads, ahead of who asks for the results, and shown as it goes on."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from typing import TypeVar

from dinoreg.runtime.environment import usable_cores
from dinoreg.runtime.printable import in_markup, print_status

T = TypeVar("T")
READERS = "dinoreg-reader"  # with which the names of the threads begin
SHOW_SECONDS = 5.0  # between lines of progress where there is no terminal


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


def show_progress(items: Iterable[T], total: int, what: str, unit: str = "it") -> Iterator[T]:
    """The items, with a bar on a terminal; elsewhere a line every SHOW_SECONDS with count, rate and time left.

    total  number of items, 0 if unknown
    what   description of the work
    unit   of the rate, "it" per second by default
    """
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    if console.is_terminal:
        yield from track(items, in_markup(what), total, console=console, transient=True)
        return
    started = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown >= SHOW_SECONDS:
            shown, rate = now, done / (now - started)
            left = timedelta(seconds=int((total - done) / rate)) if total else "?"
            pace = f"{rate:,.1f} {unit}/s" if rate >= 0.1 else f"{1 / rate:,.0f} s/{unit}"
            print_status(f"{what}: {done:,}/{total:,} · {pace} · {left} left")
