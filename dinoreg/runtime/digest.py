"""The SHA-256 of a file, by which its content is recognised."""

import hashlib
from pathlib import Path

from dinoreg.runtime.regular_files import open_regular


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits; raises OSError where it cannot be read."""
    running = hashlib.sha256()  # hashlib.file_digest comes with Python 3.11
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            running.update(block)
    return running.hexdigest()
