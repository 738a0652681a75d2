"""Export a trained model to an ONNX file, and compare it with torch.

    python -m mmhrformer export_onnx hrformer-demo_1xb64-6e_digits epoch_6.pth --out digits.onnx
    python -m mmhrformer export_onnx td-hm_hrformer-small_8xb32-210e_coco-256x192 hrt_small_coco.pth
    python -m mmhrformer export_onnx ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024 seg.pth

By default, the files take batches of any size; those for segmentation also images of any size of at
least 32x32 pixels. The checkpoint may be in any supported format.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from mmengine.config import DictAction
from mmengine.logging import print_log
from rich.filesize import decimal

from mmhrformer.apis import get_model
from mmhrformer.configs import find_config, read_config
from mmhrformer.datasets.meta import default_size, flip_indices_of_outputs, names_of_outputs
from mmhrformer.deploy.onnx import (
    HEADER,
    INPUT,
    OPSETS,
    OUTPUTS,
    channel_order,
    export_onnx,
    number_of_outputs,
    refuse_tta,
    require_packages,
    task_of,
)
from mmhrformer.utils.addresses import find_page

HELP = f'{__doc__}\nSee {find_page("docs/export.md")}.'


def batch_size(text: str) -> int | None:
    """Parse the argument of --batch."""
    return None if text == 'dynamic' else int(text)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', metavar='CONFIG', help='path, or name of a shipped config')
    parser.add_argument(
        'checkpoint', metavar='CHECKPOINT', help='file, or mmhrformer://NAME for a model of the zoo'
    )
    parser.add_argument('--out', metavar='FILE', help='file to write (CONFIG.onnx)')
    parser.add_argument(
        '--size', type=int, nargs='+', metavar='N', help="H W, or one number for both (config's)"
    )
    parser.add_argument(
        '--dynamic-size',
        action=argparse.BooleanOptionalAction,
        help='take images of any size (only for segmentation)',
    )
    parser.add_argument(
        '--batch', type=batch_size, metavar='N', help='batch size, or dynamic (dynamic)'
    )
    parser.add_argument(
        '--opset',
        type=int,
        default=OPSETS[-1],
        metavar='N',
        help=f'operator set version, {OPSETS[0]} to {OPSETS[-1]} (%(default)s)',
    )
    parser.add_argument(
        '--with-normalization',
        action='store_true',
        help='take pixels from 0 to 255, and normalize them in the graph',
    )
    parser.add_argument('--no-simplify', action='store_true', help='do not simplify the graph')
    parser.add_argument('--no-verify', action='store_true', help='do not compare with torch')
    parser.add_argument('--overwrite', action='store_true', help='replace FILE if it exists')
    parser.add_argument(
        '--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='config overrides'
    )
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Export a model and print a summary.

    Args:
        args (argparse.Namespace): The command line.
    """
    start = time.perf_counter()
    require_packages(not args.no_simplify, not args.no_verify)
    path = find_config(args.config)
    refuse_tta(read_config(path))
    print_log(f'Building {path.stem} ...', 'current')
    model = get_model(str(path), args.checkpoint, cfg_options=args.cfg_options)
    size = args.size or default_size(model.cfg)
    size = size * 2 if len(size) == 1 else size
    known = model.cfg, model.dataset_meta, number_of_outputs(model)
    file = Path(args.out or f'{path.stem}.onnx')
    rows = export_onnx(
        model,
        file,
        size=size,
        batch=args.batch,
        dynamic_size=args.dynamic_size,
        opset=args.opset,
        with_normalization=args.with_normalization,
        simplify=not args.no_simplify,
        verify=not args.no_verify,
        names=names_of_outputs(*known),
        flip_indices=flip_indices_of_outputs(*known),
        overwrite=args.overwrite,
    )
    pixels = 'pixels from 0 to 255' if args.with_normalization else 'normalized'
    print(f'input    {INPUT}: {channel_order(model)}, {pixels}')
    print(f'output   {OUTPUTS[task_of(model)][0]}')
    if rows:
        print('\nonnxruntime compared with torch')
        print(HEADER, *rows, sep='\n', end='\n\n')
    seconds = time.perf_counter() - start
    print(f'written  {file}: opset {args.opset}, {decimal(file.stat().st_size)}, {seconds:.1f} s')


def main() -> None:
    """Run the command line; exit with a message on failure."""
    try:
        run(parse_args())
    except (ImportError, KeyError, OSError, RuntimeError, TypeError, ValueError) as err:
        sys.exit(f'export_onnx.py: {err}')


if __name__ == '__main__':
    main()
