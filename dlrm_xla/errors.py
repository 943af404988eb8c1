"""What goes wrong for a user, told apart from what goes wrong in our own code."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """The user can mend this: the message says what was wrong, what was expected and what to do."""


class Refusal(UserError):
    """A plugin does not take a table at these options: its ValueError, told with both."""


def choices(name: str, known: Iterable[str]) -> str:
    """Says which names there are, the nearest one first: ``did you mean 'a'? known are: a, b``."""
    names = sorted(known)
    near = get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known are: {', '.join(names) or 'none'}"
