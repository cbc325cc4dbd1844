"""The SHA-256 of a file or a picture, by which its content is recognised."""

import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dinoreg.runtime.regular_files import open_regular


def blocks(path: Path, start: int = 0, size: int = sys.maxsize) -> Iterator[bytes]:
    """At most `size` bytes of a file from `start` on, a MiB at a time; OSError where it cannot be read."""
    with open_regular(path) as file:
        file.seek(start)
        while block := file.read(min(size, 1 << 20)):
            yield block
            size -= len(block)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits; raises OSError where it cannot be read."""
    running = hashlib.sha256()  # hashlib.file_digest comes with Python 3.11
    for block in blocks(path):
        running.update(block)
    return running.hexdigest()


def content_digest(data: Any) -> bytes:
    """SHA-256 of a file's bytes, or of an array's or of what has `tobytes` like one, 32 bytes."""
    return hashlib.sha256(data if isinstance(data, bytes) else data.tobytes()).digest()
