"""How our docstrings become pages: lines of a name, two spaces and a meaning become a list; the rest is Markdown.

An extension of griffe, which mkdocstrings reads Python with; named in mkdocs.yml.
"""

import re

import griffe

ITEM = re.compile(r"(\S(?:.*?\S)?) {2,}(\S.*)")


def as_markdown(text: str) -> str:
    """A docstring with its tables of arguments as a Markdown list."""
    blocks = []
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if not ITEM.fullmatch(lines[0] if lines else ""):
            blocks.append(block)
            continue
        items: list[str] = []
        for line in lines:
            if match := ITEM.fullmatch(line):
                items.append(f"- `{match[1]}`: {match[2]}")
            elif items:
                items[-1] += f" {line.strip()}"
        blocks.append("\n".join(items))
    return "\n\n".join(blocks)


class PlainDocstrings(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: object) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
