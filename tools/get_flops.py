"""Print parameters and operations of a config's model.

python tools/get_flops.py hrformer-tiny_8xb128_in1k --shape 224 224
"""

from __future__ import annotations

import argparse
import sys

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmhrformer.complexity import complexity
from mmhrformer.launch import find_config


def main() -> None:
    """Count what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='path of a config, or name of one of ours')
    parser.add_argument(
        '--shape', type=int, nargs=2, default=(224, 224), help='height and width in pixels'
    )
    args = parser.parse_args()
    try:
        cfg = Config.fromfile(find_config(args.config))
    except FileNotFoundError as err:
        sys.exit(f'get_flops.py: {err}')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    counts = complexity(model, (1, 3, *args.shape))
    height, width = args.shape
    print(f'\n{args.config} at {height}x{width}')
    print(f'  parameters                        {counts["parameters"]:>14,}')
    print(f'  multiply-accumulates              {counts["macs"] / 1e9:>12.4f} G')
    print(f"  FLOPs by the official code's rule {counts['flops_official'] / 1e9:>12.4f} G")


if __name__ == '__main__':
    main()
