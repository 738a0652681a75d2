"""``python -m mmhrformer COMMAND``."""

from __future__ import annotations

import sys

from mmhrformer.cli.main import main

if __name__ == '__main__':
    sys.exit(main())
