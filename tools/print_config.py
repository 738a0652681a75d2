"""Print a config with everything that it inherits.

Example:
  python -m mmhrformer print_config hrformer-tiny_8xb128_in1k --cfg-options train_cfg.max_epochs=100
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmengine.config import DictAction

from mmhrformer.configs import find_config, read_config
from mmhrformer.engine.dead_options import merge_options


def main() -> None:
    """Run the command line; exit with a message on failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='path of a config, or name of a shipped one')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='config overrides')
    parser.add_argument('--out', type=Path, help='write the config to this file instead')
    args = parser.parse_args()
    try:
        cfg = read_config(find_config(args.config))
        merge_options(cfg, args.cfg_options)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            cfg.dump(args.out)
        else:
            print(cfg.pretty_text)
    except (ImportError, KeyError, OSError, TypeError, ValueError) as err:
        sys.exit(f'print_config.py: {err}')


if __name__ == '__main__':
    main()
