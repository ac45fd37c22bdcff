"""What docstrings have beside Markdown: Sphinx's roles, ``:func:`name```, and doctests."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


class Roles(griffe.Extension):
    """Roles as links, resolved from where they stand (or as code), and doctests as code."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Rewrite the docstrings of the whole package, once all of it is loaded."""
        self._rewrite(pkg)

    def _rewrite(self, thing: griffe.Object) -> None:
        if thing.docstring:
            text = ROLE.sub(lambda role: _link(thing, role[1]), thing.docstring.value)
            thing.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", text)
        for member in thing.members.values():
            if isinstance(member, griffe.Object):
                self._rewrite(member)


def _link(thing: griffe.Object, name: str) -> str:
    absolute = name.startswith("ucvae.")
    shown = f"`{name.rpartition('.')[2] if absolute else name}`"
    try:
        found = thing.modules_collection[name if absolute else thing.resolve(name)]
    except (griffe.NameResolutionError, KeyError):
        return shown
    found = found.final_target if found.is_alias else found
    # Pages show what has a docstring.
    return f"[{shown}][{found.path}]" if found.has_docstring else shown
