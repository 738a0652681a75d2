"""Convert a checkpoint to the format of another code, or to safetensors.

    python -m mmhrformer convert_checkpoint hrt_small.pth hrformer-small.pth
    python -m mmhrformer convert_checkpoint epoch_210.pth hrt_small_coco.pth --to official
    python -m mmhrformer convert_checkpoint epoch_300.pth backbone.pth --to mmpose --backbone-only
    python -m mmhrformer convert_checkpoint trained.pth averaged.pth --key state_dict_ema

Only the weights are converted; other content, such as the state of the optimizer, is dropped. A DST
that ends in .safetensors is written in that format. The file is read without running code from it,
and written completely or not at all.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.filesize import decimal

from mmhrformer.checkpoints.contents import describe_other_weights, find_weights
from mmhrformer.checkpoints.dialects import BIAS_TABLE, convert, detect_dialect
from mmhrformer.checkpoints.loading import name_file_in_errors, read
from mmhrformer.checkpoints.writing import (
    TARGETS,
    check_destination,
    to_dialect,
    wrap,
    write_checkpoint,
)
from mmhrformer.version import __version__

OFFICIAL_POSE_NOTE = (
    'note: the official pose code, as published, does not add the relative position bias; a model '
    'trained with it gives different results there'
)
MMPOSE_NOTE = "note: there is no relative position bias; mmpose's config needs with_rpe=False"


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'src', metavar='SRC', help='file to read, or mmhrformer://NAME for a model of the zoo'
    )
    parser.add_argument('dst', metavar='DST', help='file to write')
    parser.add_argument(
        '--to',
        choices=TARGETS,
        default='mmhrformer',
        help='target format; for official, the head determines which code (%(default)s)',
    )
    parser.add_argument(
        '--backbone-only',
        action='store_true',
        help='drop neck and head, for use as pretrained weights',
    )
    parser.add_argument(
        '--key', help='key of the weights, if the file has several, such as state_dict_ema'
    )
    parser.add_argument('--overwrite', action='store_true', help='replace DST if it exists')
    return parser.parse_args()


def run(args: argparse.Namespace) -> None:
    """Convert a checkpoint and print a summary.

    Args:
        args (argparse.Namespace): The command line.
    """
    start = time.perf_counter()
    check_destination(args.dst, args.overwrite)
    path, content = read(args.src)
    with name_file_in_errors(path):
        contents = find_weights(content, args.key)
        ours, report = convert(contents.tensors)
    theirs = to_dialect(ours, args.to, args.backbone_only)
    meta = dict(mmhrformer=__version__, source=path.name, source_dialect=report.dialect)
    write_checkpoint(wrap(theirs, meta), args.dst, args.overwrite)
    dialect, seconds = detect_dialect(theirs), time.perf_counter() - start
    print(
        f'read     {path}: {report.dialect}, {len(contents.tensors)} tensors, '
        f'{decimal(path.stat().st_size)}\n'
        f'         {len(report.renamed)} renamed, {len(report.joined)} joined from query, key and '
        f'value, {len(report.dropped)} computed ones dropped\n'
        f'written  {args.dst}: {dialect}, {len(theirs)} tensors, '
        f'{decimal(Path(args.dst).stat().st_size)}, {seconds:.1f} s'
    )
    for name in contents.outside:
        print(f'dropped  {name}: outside of the model')
    for line in describe_other_weights(contents.key, contents.others):
        print(line.strip())
    if dialect == 'official-pose' != report.dialect:
        print(OFFICIAL_POSE_NOTE)
    if dialect == 'mmpose' and not any(key.endswith(BIAS_TABLE) for key in theirs):
        print(MMPOSE_NOTE)


def main() -> None:
    """Run the command line; exit with a message on failure."""
    try:
        run(parse_args())
    except (OSError, ValueError, ImportError, RuntimeError) as err:
        sys.exit(f'convert_checkpoint.py: {err}')


if __name__ == '__main__':
    main()
