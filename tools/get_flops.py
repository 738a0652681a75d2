"""Count parameters and operations of a config's model, at its training size or another.

Example:
  python -m mmhrformer get_flops hrformer-tiny_8xb128_in1k --shape 256 192

Operations are counted by two rules, since publications use both. Multiply-accumulates (MACs) count
only convolutions, linear layers and matrix products. The rule of the official code, whose results
the paper calls FLOPs, adds biases, normalization, softmax and element-wise operations.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mmengine.config import DictAction
from mmengine.registry import MODELS, DefaultScope

from mmhrformer.analysis.complexity import complexity, input_shape
from mmhrformer.configs import find_config, read_config
from mmhrformer.datasets.meta import default_size
from mmhrformer.engine.dead_options import merge_options


def count(
    config: str, shape: Sequence[int] | None = None, cfg_options: dict | None = None
) -> dict[str, int]:
    """Build the model of a config and count its operations.

    Args:
        config (str): Path of a config, or name of a shipped one.
        shape (Sequence[int], optional): Height and width of the image in pixels, or the side of a
            square. Defaults to None: the training size of the config.
        cfg_options (dict, optional): Options of the config to override, by dotted name.

    Returns:
        dict[str, int]: As :func:`mmhrformer.analysis.complexity.complexity` returns it, and the
        ``height`` and ``width`` of the image.

    Raises:
        ValueError: If the config has no model, or the image is too small for it.
    """
    if shape and (len(shape) > 2 or min(shape) < 1):
        text = ' '.join(map(str, shape))
        raise ValueError(f'--shape {text}: expected height and width, or one number for both')
    cfg = read_config(find_config(config))
    merge_options(cfg, cfg_options)
    if 'model' not in cfg:
        raise ValueError(f'the config {config!r} has no model: use a config that can be trained')
    height, width = (shape[0], shape[-1]) if shape else default_size(cfg)
    # Not needed here, and the stock ones assert that images have one or three channels.
    options = {k: v for k, v in cfg.model.items() if k != 'data_preprocessor'}
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        model = MODELS.build(options)
    counts = complexity(model, input_shape(model, height, width))
    return dict(counts, height=height, width=width)


def main() -> None:
    """Run the command line; exit with a message on failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='path of a config, or name of a shipped one')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        help="height and width, or one number for both (config's)",
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='config overrides')
    args = parser.parse_args()
    try:
        counts = count(args.config, args.shape, args.cfg_options)
    except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as err:
        sys.exit(f'get_flops.py: {err}')
    print(f'\n{args.config} at {counts["height"]}x{counts["width"]}')
    print(f'  parameters                          {counts["parameters"]:>13,}')
    print(f'  multiply-accumulates (MACs)         {counts["macs"] / 1e9:>13.4f} G')
    print(f"  FLOPs by the official code's rule   {counts['flops_official'] / 1e9:>13.4f} G")


if __name__ == '__main__':
    main()
