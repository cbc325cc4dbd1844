"""Lists and tables of images as files: text with a path a line, CSV, TSV and parquet; and which paths they may name."""

import csv
import os
from collections.abc import Iterator
from typing import Any

from dinoreg.runtime.dependencies import install
from dinoreg.runtime.errors import UserError


def rows_of(file: str | os.PathLike[str], title: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every line of a text file that is not empty; of a .csv or .tsv its cells, else the line.

    title  what messages call the file
    Raises UserError, in one line, for a file that cannot be read.
    """
    suffix = os.path.splitext(file)[1].lower()
    try:
        with open(file, encoding="utf-8-sig", newline="") as opened:
            if suffix not in (".csv", ".tsv"):
                for number, line in enumerate(opened, 1):
                    if line.strip():
                        yield number, [line.rstrip("\r\n")]
                return
            rows = csv.reader(opened, delimiter="\t" if suffix == ".tsv" else ",")
            for row in rows:
                if any(cell.strip() for cell in row):
                    yield rows.line_num, row
    except OSError as error:
        raise UserError(f"{title} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{title} is not UTF-8 text") from None
    except csv.Error as error:
        raise UserError(f"{title} is not a valid table ({error})") from None


def parquet_table(file: str | os.PathLike[str], title: str, column: str | None = None) -> Any:
    """A parquet file as a `pyarrow.Table`: all of it, or one column, which is the first where there is none so called.

    Raises UserError, in one line, for a file that cannot be read and where pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{title} needs pyarrow: {install('pyarrow')}") from None
    try:
        opened = pyarrow.parquet.ParquetFile(file)
        names = opened.schema_arrow.names
        if column is None:
            return opened.read()
        return opened.read(columns=[column if column in names else names[0]])
    except (pyarrow.ArrowException, OSError, IndexError) as error:
        raise UserError(f"{title} is not a readable parquet file ({str(error).splitlines()[0]})") from None


def inside(root: str, entry: str, where: str, option: str) -> str:
    """A listed path relative to the absolute folder `root`; UserError, naming the option that allows it."""
    path = os.path.normpath(os.path.join(root, entry))
    if "\0" in entry or not path.startswith(os.path.join(root, "")):
        raise UserError(f"{where}: {entry!r} leaves {root}; allow it with {option}=FOLDER")
    return os.path.relpath(path, root)
