"""What a command says, and how it ends, while a file cannot be read: a mount that hangs blocks whoever waits for it."""

import os
import select
import signal
import threading
import time

from dinoreg.runtime.environment import DATA_THREADS
from dinoreg.runtime.printable import print_status
from dinoreg.runtime.regular_files import being_read

PATIENCE = 10.0  # seconds after which a file that is being read is named; then again after three times as long
_ANSWER = 1.5  # seconds that the main thread has to answer a signal, unless it is in a read
_LOOK = 1.0


def watch() -> None:
    """Start watching, from a thread of its own; the main thread calls it, once."""
    received, noted = os.pipe()
    os.set_blocking(noted, False)
    signal.set_wakeup_fd(noted, warn_on_full_buffer=False)  # written at once, whatever the main thread is in
    threading.Thread(target=_watch, args=(received,), name="watch", daemon=True).start()


def _watch(received: int) -> None:
    said: dict[str, float] = {}  # file -> seconds after which it was named
    main = threading.main_thread().ident
    while True:
        if select.select([received], [], [], _LOOK)[0]:
            number = os.read(received, 1)[0]
            held = being_read().get(main or 0)
            time.sleep(_ANSWER)
            if held is not None and being_read().get(main or 0) == held:
                print_status(f"dinoreg: stopped by {signal.Signals(number).name} while {held[0]} was being read")
                os._exit(128 + number)
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for thread, (path, since) in being_read().items():
            seconds = time.monotonic() - since
            # Of the files of batches the run's log has a line.
            if seconds > max(PATIENCE, 3 * said.get(path, 0.0)) and not names.get(thread, "").startswith(DATA_THREADS):
                said[path] = seconds
                print_status(f"{path}: is being read since {seconds:.0f} s")
