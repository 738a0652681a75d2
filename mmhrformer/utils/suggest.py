"""Suggestions for misspelled names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str], start: str = 'did') -> str:
    """Suggest names that are similar to a wrong one.

    Args:
        name (str): The misspelled name.
        names (Iterable[str]): The valid names.
        start (str): First word of the question. Defaults to ``'did'``.

    Returns:
        str: A question, or an empty string if none is similar.

    Examples:
        >>> did_you_mean('hrformer-tny', ['hrformer-tiny', 'other'])
        'did you mean hrformer-tiny?'
    """
    similar = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f'{start} you mean {" or ".join(similar)}?' if similar else ''
