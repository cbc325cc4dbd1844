"""Which files `data=` means by a pattern, and which of them are shards: tar archives, or parquet with pictures inside.

`shards-{0000..0099}.tar`, `train-*.parquet`, a folder of these or one of them, as paths or as URLs.
"""

import glob
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from dinoreg.data.folder_index import EXTENSIONS
from dinoreg.data.split_names import split_of
from dinoreg.data.tables import LISTS, TABLES
from dinoreg.runtime.errors import UserError, readable
from dinoreg.runtime.parallel import parallel
from dinoreg.runtime.places import ending_of, is_url, names_below, state

SHARDS = (".tar", ".parquet")
MOST = 1_000_000  # files that a pattern may name
_THREADS = 8  # files that are looked at together; the time goes into waiting
_PACKED = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst|zip|7z|rar)$", re.IGNORECASE)
_NAMED = re.compile(r"\w+:\w+=")  # imagenet22k:root=FOLDER
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d{1,18})\.\.(\d{1,18})")


class Shards(NamedTuple):
    """Files that hold pictures.

    root    the folder that all lie below: an absolute path, or a URL
    names   relative to it, in order
    ending  of all of them: ".tar" or ".parquet"; ".jpg" for pictures of any kind
    """

    root: str
    names: list[str]
    ending: str


def find_shards(spec: str) -> Shards | None:
    """The shards that a path, a URL or a pattern names, or the pictures that a pattern does; None for anything else.

    raises  UserError for a pattern without a file, and for packed archives or both kinds of shards together
    """
    root, patterns = _parted(spec)
    names = list(dict.fromkeys(name for pattern in patterns for name in _matching(root, pattern)))
    if packed := [name for name in names if _PACKED.search(name)]:
        raise UserError(
            f"data: {packed[0]} is packed, so that nothing in it can be read by its place; unpack it to .tar"
        )
    if not names and has_pattern(spec):
        raise UserError(f"data: {spec} matches no file")
    kinds = {".jpg" if ending_of(name) in EXTENSIONS else ending_of(name) for name in names}
    if len(kinds) > 1 and (has_pattern(spec) or is_folder(spec)):
        raise UserError(f"data: {spec} names files of several kinds ({', '.join(sorted(kinds))}); say which, as *.tar")
    kind = next(iter(kinds), "")
    return Shards(root, names, kind) if kind in SHARDS or (kind == ".jpg" and has_pattern(spec)) else None


def is_place(spec: str) -> bool:
    """Whether a spec is a path that exists, a pattern or a URL, and no name."""
    return is_url(spec) or has_pattern(spec) or os.path.exists(spec)


def has_pattern(spec: str) -> bool:
    """Whether a spec is a pattern, with `*`, `[…]`, `{…}` or in a path `?`, and no file of that very name."""
    if _magic(spec).search(spec) is None or _NAMED.match(spec):
        return False
    return is_url(spec) or not os.path.exists(spec)


def is_folder(spec: str) -> bool:
    """Whether a path is a folder; a URL is taken for one where it does not end as files that are read do."""
    files = (*SHARDS, *LISTS, *TABLES, *EXTENSIONS)
    is_file = ending_of(spec) in files or _PACKED.search(spec) is not None
    return not has_pattern(spec) and (not is_file if is_url(spec) else os.path.isdir(spec))


def split_of_shard(name: str) -> str | None:
    """ "train", "val" or "test" where a shard's name has one of them as a part: `data/train-00000-of-00003.parquet`."""
    found = {split for part in re.split(r"[-_./]", name) if (split := split_of(part))}
    return found.pop() if len(found) == 1 else None


def states_of(places: Sequence[str]) -> list[tuple[str, int, str]]:
    """(place, size, what changes with the content) of files; UserError for one that is not there."""

    def about(number: int) -> tuple[str, int, str]:
        with readable(f"data: {places[number]}"):
            return (places[number], *state(places[number]))

    return list(parallel(about, range(len(places)), _THREADS))


def _magic(root: str) -> re.Pattern[str]:
    """What makes a pattern below a folder; at a URL `?` begins what is asked of the server."""
    return re.compile(r"[*\[{]" if is_url(root) else r"[*?\[{]")


def _parted(spec: str) -> tuple[str, list[str]]:
    """The folder before the first part with a pattern, and the patterns below it, without braces."""
    if is_folder(spec) and is_url(spec):
        return spec, [name for name in names_below(spec) if ending_of(name) in SHARDS]
    if is_folder(spec):
        return os.path.abspath(spec), [f"**/*{ending}" for ending in SHARDS]
    folder, slash, _ = (_magic(spec).split(spec, 1)[0] if has_pattern(spec) else spec).rpartition("/")
    name = spec[len(folder + slash) :]
    patterns = _without_braces(name) if has_pattern(spec) else [name]
    return (folder if is_url(spec) else os.path.abspath(folder + slash)), patterns


def _matching(root: str, pattern: str) -> list[str]:
    if not _magic(root).search(pattern) or (not is_url(root) and os.path.exists(os.path.join(root, pattern))):
        return [pattern]
    if is_url(root):
        return names_below(root, pattern)
    with readable(f"data: the folder {root}"):
        names = sorted(glob.glob(pattern, root_dir=root, recursive=True))
    if "**" in pattern:  # goes through links, so that it meets files, or a whole tree, again
        names.sort(key=len, reverse=True)  # the shortest of a file's names stays
        names = sorted({os.path.realpath(os.path.join(root, name)): name for name in names}.values())
    return names


def _without_braces(text: str) -> list[str]:
    """What a text with `{a,b}` and `{000..099}` stands for."""
    match = _BRACES.search(text)
    if match is None:
        return [text]
    choices, numbers = match[1].split(","), _NUMBERS.fullmatch(match[1])
    first, last = map(int, numbers.groups()) if numbers else (1, len(choices))
    ends = _without_braces(text[match.end() :])
    if (count := (last - first + 1) * len(ends)) > MOST:
        raise UserError(f"data: {text} names {count:,} files, expected at most {MOST:,}")
    if numbers:
        choices = [f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)]
    return [text[: match.start()] + choice + end for choice in choices for end in ends]
