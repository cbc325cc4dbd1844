"""The usual ways to write an option, and the corrected command where one was not understood."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from dinoreg.commands.arguments import Verb, is_key_value
from dinoreg.runtime.errors import one_line

VERB_NAMES = {"train": "pretrain", "evaluate": "eval", "plot": "view"}
_MAPPED = re.compile(r"(?:([\w.]+)=)?(.+\.(?:csv|tsv|parquet)):((?:path|label|split)=.+)", re.IGNORECASE)
_DASHES = re.compile(r"[-\u2013\u2014]+(?=[^\W\d])")  # a text processor makes one of two


def canonical(verb: Verb, arguments: Sequence[str]) -> list[str]:
    """The arguments of a verb in the one form that is parsed: words, flags, then key=value.

    Accepted are --key value, --key=value, --some-key, key = value, key= value, a yes-or-no key alone, a path behind
    the verb's words, which stands for its `path` key, and columns behind a table, as TABLE:path=NAME,label=NAME.
    """
    rest, switches = _with_columns(verb, arguments), {key for key, (hint, _) in verb.keys().items() if hint is bool}
    words: list[str] = []
    pairs: list[str] = []
    while rest:
        word = rest.pop(0)
        dashes = _DASHES.match(word)
        name, equals, value = word[dashes.end() :].partition("=") if dashes else word.partition("=")
        if word in verb.flags:
            pairs.append(word)
        elif dashes:
            name = name.replace("-", "_")
            is_switch = name in switches and not (rest and rest[0].lower() in ("true", "false"))
            has_value = rest and not is_switch and not is_key_value(rest[0]) and not _DASHES.match(rest[0])
            pairs.append(f"{name}={value if equals else rest.pop(0) if has_value else 'true'}")
        elif rest and rest[0].startswith("=") and not equals:
            value = rest.pop(0)[1:]
            pairs.append(f"{word}={value or (rest.pop(0) if rest else '')}")
        elif equals and not value and rest and not is_key_value(rest[0]):
            pairs.append(f"{word}{rest.pop(0)}")
        elif is_key_value(word):
            pairs.append(word)
        elif word in switches:
            pairs.append(f"{word}=true")
        else:
            words.append(word)
    return _with_paths(verb, words) + pairs


def _with_columns(verb: Verb, arguments: Sequence[str]) -> list[str]:
    """The arguments, columns that stand behind a table under the key that names them."""
    apart, keys = list(arguments), verb.keys()
    for place, argument in enumerate(arguments):
        if mapped := _MAPPED.fullmatch(argument):
            key, table, names = mapped.groups()
            section = (key or verb.path).rpartition(".")[0] or "data"
            columns = "columns" if "columns" in keys else f"{section}.columns"
            if columns in keys:
                apart[place] = f"{key}={table}" if key else table
                apart.append(f"{columns}=" + re.sub("(^|,)(path|label|split)=", r"\1\2:", names))
    return apart


def _with_paths(verb: Verb, words: list[str]) -> list[str]:
    """The words, those that are paths behind the verb's own as key=value."""
    own, paths = words[: verb.words], words[verb.words :]
    if not verb.path or not paths or own == ["crops"] or (own and not all(Path(path).exists() for path in paths)):
        return words
    return [*own, f"{verb.path}={','.join(paths)}"]


def corrected(error: BaseException, arguments: Sequence[str]) -> str:
    """The text of an error; where it asks "did you mean …?", with the whole command in which that stands instead."""
    text = one_line(error)
    meant = re.search(r"did you mean '?([^\s?']+)'?\?", text)
    if meant is None:
        return text
    before, found = text[: meant.start()], []
    for place, word in enumerate(arguments):
        for part in filter(None, re.split("[=,]", word)) if place or "unknown verb" in before else ():
            if stands := re.search(rf"(?<![\w./]){re.escape(part)}(?![\w./])", before):
                new = word.replace(part, meant[1], 1)
                found.append((stands.start(), [*arguments[:place], new, *arguments[place + 1 :]]))
    # A value stands behind its key.
    return f"{text} Write: {shlex.join(['dinoreg', *max(found)[1]])}" if found else text
