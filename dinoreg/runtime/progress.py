"""Progress of work on many items: a bar on a terminal, else a line now and then."""

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

from dinoreg.runtime.printable import in_markup, print_status

T = TypeVar("T")
SHOW_SECONDS = 5.0  # between lines of progress where there is no terminal


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
