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


def watch() -> None:
    """Start watching, from a thread of its own; the main thread calls it, once."""
    received, noted = os.pipe()
    os.set_blocking(noted, False)
    signal.set_wakeup_fd(noted, warn_on_full_buffer=False)  # written at once, whatever the main thread is in
    threading.Thread(target=_watch, args=(received, threading.get_ident()), name="watch", daemon=True).start()


def _watch(received: int, main: int) -> None:
    said: dict[str, float] = {}  # file -> seconds after which it was named
    while True:
        if select.select([received], [], [], 1.0)[0]:
            number, before = os.read(received, 1)[0], being_read()
            time.sleep(_ANSWER)
            for _, path, _ in (each for each in being_read() if each in before and each[2] == main):
                print_status(f"dinoreg: stopped by {signal.Signals(number).name} while {path} was being read")
                os._exit(128 + number)
        # A batch that is waited for names the file itself.
        others = {each.ident for each in threading.enumerate() if not each.name.startswith(DATA_THREADS)}
        for since, path, thread in being_read():
            seconds = time.monotonic() - since if thread in others else 0.0
            if seconds > max(PATIENCE, 3 * said.get(path, 0.0)):
                said[path] = seconds
                print_status(f"{path}: is being read since {seconds:.0f} s")
