"""Run a model on images and videos: classes, poses or segmentation, drawn and as JSON.

    python -m mmhrformer demo data/demo/digits/val/3/0003.png --task cls
    python -m mmhrformer demo street.mp4 --model ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024
    python -m mmhrformer demo people.jpg --task pose --boxes 10,20,110,320 130,15,240,310

INPUT is an image, a video, a folder of images, the URL of an image or video, or a stream
(rtsp://...); --webcam 0 reads from a camera. Without --model, the task's small model trained by
"make demo" is used, which needs no network access.
--show-features and --show-attention visualize the inside of the model.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import cv2
import numpy as np
from mmengine.runner import find_latest_checkpoint

from mmhrformer.analysis.feature_maps import draw_attention, draw_features, find_attention
from mmhrformer.inferencers import Inferencer, get_inferencer
from mmhrformer.inferencers.arguments import DTYPES
from mmhrformer.inferencers.media import Picture, open_media
from mmhrformer.utils.addresses import repository

# The configs of the demos by task.
DEMOS = {
    'cls': 'hrformer-demo_1xb64-6e_digits',
    'pose': 'td-hm_hrformer-demo_1xb16-2e_figures-96x128',
    'seg': 'ocrnet_hrformer-demo_1xb16-100_scenes-96x96',
}
DEMO_OUTPUT = Path('demo_output')  # output of "make demo", in the current folder
QUERY = '0.5,0.5'  # the center
DIGIT_SIDE = 256  # pixels; the digits have only 32


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'inputs',
        metavar='INPUT',
        nargs='?',
        help='image, video, folder, URL or stream',
    )
    parser.add_argument(
        '--webcam', type=int, metavar='N', help='read from a camera instead of INPUT, until Ctrl-C'
    )
    parser.add_argument('--task', choices=DEMOS, help='the task (that of --model)')
    parser.add_argument('--model', help='name of a model of the zoo, or path of a config')
    parser.add_argument(
        '--checkpoint', help='weights of the model: a file, or a name of the zoo (published ones)'
    )
    parser.add_argument('--out', default='demo_output/pictures', help='output folder (%(default)s)')
    parser.add_argument('--device', help="device, such as 'cpu' or 'cuda:0' (best available)")
    parser.add_argument(
        '--dtype', choices=DTYPES, default='float32', help='precision (%(default)s)'
    )
    parser.add_argument('--batch-size', type=int, default=1, help='images per batch (%(default)s)')
    parser.add_argument(
        '--boxes', nargs='+', metavar='L,T,R,B', help='boxes of people, in pixels (whole image)'
    )
    parser.add_argument(
        '--detector',
        nargs='?',
        const=True,
        help="detect people with mmdet: mmpose's default detector, or this model or config",
    )
    parser.add_argument('--detector-weights', help='checkpoint of the detector')
    add_inside_options(parser)
    return parser.parse_args()


def add_inside_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that visualize the inside of the model."""
    parser.add_argument(
        '--show-features', action='store_true', help='draw the four streams for the first image'
    )
    parser.add_argument(
        '--show-attention',
        action='store_true',
        help='draw attention weights for the first image',
    )
    parser.add_argument(
        '--query',
        default=QUERY,
        metavar='X,Y',
        help="position of the query, as fractions of the model's input (%(default)s)",
    )
    parser.add_argument(
        '--block',
        metavar='NAME',
        help='block to show, such as stage3.0.branches.1.0 (the last one of each stream)',
    )


def numbers(text: str, count: int, option: str) -> list[float]:
    """Parse ``count`` numbers, separated by commas."""
    try:
        values = [float(part) for part in text.split(',')]
    except ValueError:
        values = []
    if len(values) != count:
        raise ValueError(f'{option} {text}: expected {count} numbers, separated by commas')
    return values


def choose_model(args: argparse.Namespace) -> tuple[str, str | bool]:
    """Model and checkpoint of the command line, or by default those of the task's demo.

    Args:
        args (argparse.Namespace): The command line.

    Returns:
        tuple[str, str | bool]: Model and checkpoint, as arguments of :func:`get_inferencer`.

    Raises:
        FileNotFoundError: If the demo has no checkpoint.
        ValueError: If neither a model nor a task is given.
    """
    if args.model:
        return args.model, args.checkpoint or True
    if not args.task:
        raise ValueError(f'set --task, one of {", ".join(DEMOS)}, or --model')
    model = DEMOS[args.task]
    if args.checkpoint:
        return model, args.checkpoint
    folder = DEMO_OUTPUT / args.task / 'train'
    if not (folder / 'last_checkpoint').is_file():
        raise FileNotFoundError(
            f'there is no checkpoint in {folder.resolve()}: set --checkpoint, or --model to a '
            f'name of the zoo; or train one in a clone of {repository() or "the repository"}: '
            f'"make demo", or "python demo/run_demo.py --tasks {args.task}"'
        )
    noted = Path(find_latest_checkpoint(folder))
    return model, str(noted if noted.is_file() else folder / noted.name)  # in a moved folder


def write_inside(
    args: argparse.Namespace,
    inferencer: Inferencer,
    picture: Picture,
    boxes: np.ndarray | None,
    query: tuple[float, ...],
) -> list[str]:
    """Draw features and attention as requested; return the files."""
    drawn = {}
    if args.show_features:
        drawn['features'] = draw_features(inferencer, picture, boxes)
    if args.show_attention:
        drawn['attention'] = draw_attention(inferencer, picture, query, args.block, boxes)
    files = []
    for name, pixels in drawn.items():
        path = Path(args.out, name, f'{picture.stem}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), np.ascontiguousarray(pixels[..., ::-1])):
            raise OSError(f'--out {args.out}: cannot write {path}')
        files.append(str(path))
    return files


def summary(prediction: dict) -> str:
    """One-line summary of a prediction."""
    if 'error' in prediction:
        return prediction['error']
    if 'instances' in prediction:
        scores = [np.mean(one['keypoint_scores']) for one in prediction['instances']]
        people = ', '.join(f'{score:.2f}' for score in scores)
        count = '1 person' if len(scores) == 1 else f'{len(scores)} people'
        return f'{count}, mean keypoint scores: {people or "-"}'
    if 'areas' in prediction:
        areas = list(prediction['areas'].items())[:5]
        return ', '.join(f'{name} {share:.0%}' for name, share in areas)
    name = prediction.get('pred_class', f'class {prediction["pred_label"]}')
    return f'{name} ({prediction["pred_score"]:.1%})'


def run(args: argparse.Namespace) -> None:
    """Run the command line.

    Args:
        args (argparse.Namespace): The command line.
    """
    if (args.inputs is None) == (args.webcam is None):
        raise ValueError('expected either INPUT or --webcam N')
    if (args.block or args.query != QUERY) and not args.show_attention:
        raise ValueError('--query and --block need --show-attention: add it')
    # Check inputs and arguments before building the model.
    media = open_media(f'webcam:{args.webcam}' if args.inputs is None else args.inputs)
    boxes = None
    if args.boxes:
        boxes = np.array([numbers(text, 4, '--boxes') for text in args.boxes])
    query = tuple(numbers(args.query, 2, '--query'))
    model, checkpoint = choose_model(args)
    options = {}
    if args.detector or args.detector_weights:
        options = dict(detector=args.detector or False, detector_weights=args.detector_weights)
    inferencer = get_inferencer(
        model, checkpoint, args.task, device=args.device, dtype=args.dtype, **options
    )
    if args.show_attention:
        find_attention(inferencer, query, args.block)  # to fail before inference
    draw = dict(resize=DIGIT_SIDE) if args.task == 'cls' and not args.model else {}
    result = inferencer(media, batch_size=args.batch_size, boxes=boxes, out_dir=args.out, **draw)
    for prediction in result['predictions'][:10]:
        print(f'{prediction["input"]}: {summary(prediction)}')
    if len(result['predictions']) > 10:
        print(f'... and {len(result["predictions"]) - 10} more')
    files = result['files']
    if args.show_features or args.show_attention:
        found = zip(media, result['predictions'])
        first = next(picture for picture, prediction in found if 'error' not in prediction)
        files = files + write_inside(args, inferencer, first, boxes, query)
    print('\nwritten:')
    for path in files:
        print(f'  {path}')


def main() -> None:
    """Run the command line; exit with a message on failure."""
    # Internal warnings of the frameworks are of no use here.
    warnings.filterwarnings('ignore', module=r'mm(cv|engine|pose|pretrain|seg)\b')
    try:
        run(parse_args())
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as err:
        sys.exit(f'demo.py: {err}')
    except KeyboardInterrupt:  # the way to stop a camera; finished frames have been written
        sys.exit('demo.py: stopped')


if __name__ == '__main__':
    main()
