"""Text for terminals and logs: names of files hold any byte, and a terminal obeys some of them."""

import sys
import unicodedata
from collections.abc import Iterable, Sequence


def printable(text: str, keep: str = "") -> str:
    """Text in which nothing but itself reaches a terminal: other characters are written as Python's escapes.

    Those are control characters (ESC moves the cursor and paints, a line feed forges a line), invisible ones that turn
    the direction of text, halves of surrogate pairs (bytes of a name that is no UTF-8) and separators of lines.

    keep  characters to leave as they are, such as line feeds
    """
    if text.isprintable():
        return text
    return "".join(
        character if character in keep or unicodedata.category(character) not in _OBEYED else _escaped(character)
        for character in text
    )


def print_status(*lines: str) -> None:
    """Print lines to stderr, unbuffered; stdout is for results."""
    for line in lines:
        print(printable(line), file=sys.stderr, flush=True)


def shortened(text: object, width: int = 80) -> str:
    """A text of others within a message: at most `width` characters, an ellipsis for the rest."""
    return str(text) if len(str(text)) <= width else f"{str(text)[: width - 1]}…"


def listed(names: Iterable[object], most: int = 10) -> str:
    """Some names with commas between, each shortened, and how many more there are."""
    texts = [shortened(name, 40) for name in names]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most:,} more" if len(texts) > most else "")


def enumerated(words: Sequence[str], last: str = "and") -> str:
    """Words with commas between, and `last` before the last one: a, b or c."""
    return f" {last} ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def multiples(side: int, patch: int, model: str = "") -> str:
    """What a side, in pixels, that the patch size (of a model) does not divide should have been."""
    below = max(side // patch, 1) * patch
    return f"a multiple of the patch size {patch}{model and f' of {model}'}, as {below} or {below + patch}"


def in_markup(text: str) -> str:
    """Text for a table or bar of rich: `printable`, and no bracket in it is a style."""
    from rich.markup import escape  # not on every import of the errors

    return escape(printable(text, keep="\n"))


_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
