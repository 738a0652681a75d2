"""The start of ``python -m mmhrformer``, before anything slow is imported."""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = __name__.partition('.')[0]


def is_starting() -> bool:
    """Whether this process is our command line, of which no command has begun yet.

    Python imports the package before ``__main__.py``. Help and ``env`` do without torch: they
    answer in a moment, and where torch cannot be imported.

    Returns:
        bool: Whether ``import mmhrformer`` may wait until something is asked of it.
    """
    if f'{PACKAGE}.cli' in sys.modules:
        return False
    script = getattr(sys.modules['__main__'], '__file__', None) or ''
    frame = sys._getframe()
    while frame.f_back:
        frame = frame.f_back
    return Path(script).name == PACKAGE or (
        frame.f_code.co_name == '_run_module_as_main' and frame.f_locals.get('mod_name') == PACKAGE
    )
