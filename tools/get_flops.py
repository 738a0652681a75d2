"""Count parameters and operations of a config's model, at any size of the image.

Example:
  python tools/get_flops.py hrformer-tiny_8xb128_in1k --shape 256 192

Operations are counted by two rules, since publications use both. Multiply-accumulates (MACs) are
those of convolutions, linear layers and matrix products, nothing else, and are counted twice: by
mmengine's analysis of the traced graph, and module by module. The rule of the official code, whose
results the paper calls FLOPs, adds biases, normalization, softmax and element-wise operations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mmengine.registry import MODELS, DefaultScope

from mmhrformer.complexity import analyzed_macs, complexity
from mmhrformer.launch import find_config, read_config


def count(config: str, shape: Sequence[int]) -> dict[str, int]:
    """Build the model of a config and count.

    Args:
        config (str): Path of a config, or name of one of ours.
        shape (Sequence[int]): Height and width of the image in pixels.

    Returns:
        dict[str, int]: As :func:`mmhrformer.complexity.complexity` returns it, and ``analyzed``,
        the multiply-accumulates by mmengine's analysis.

    Raises:
        ValueError: If the config has no model, or the image is too small for it.
    """
    if min(shape) < 1:
        raise ValueError(f'--shape {shape[0]} {shape[1]}: give height and width in pixels')
    cfg = read_config(find_config(config))
    if 'model' not in cfg:
        raise ValueError(f'the config {config!r} has no model: give a config that can be trained')
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        model = MODELS.build(cfg.model)
    size = (1, 3, *shape)
    return {**complexity(model, size), 'analyzed': analyzed_macs(model, size)}


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
        counts = count(args.config, args.shape)
    except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as err:
        sys.exit(f'get_flops.py: {err}')
    height, width = args.shape
    print(f'\n{args.config} at {height}x{width}')
    print(f'  parameters                          {counts["parameters"]:>13,}')
    print(f"  MACs by mmengine's analysis         {counts['analyzed'] / 1e9:>13.4f} G")
    print(f'  MACs, counted module by module      {counts["macs"] / 1e9:>13.4f} G')
    print(f"  FLOPs by the official code's rule   {counts['flops_official'] / 1e9:>13.4f} G")


if __name__ == '__main__':
    main()
