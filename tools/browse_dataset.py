"""Draw samples of a dataset as the model gets them: images and labels after augmentation.

Example:
  python -m mmhrformer browse_dataset hrformer-demo_1xb64-6e_digits --number 4 --out digits

The dataset of any of the three frameworks is built as for training, and drawn by the framework's
own visualizer. The images are evenly spaced over the whole dataset. This tool replaces the
browse_dataset.py of mmpretrain and mmsegmentation, which fail with current versions of matplotlib
and OpenCV.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mmengine.config import Config, DictAction
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, VISUALIZERS, DefaultScope
from mmengine.visualization import Visualizer

from mmhrformer.configs import find_config, name_of_type, read_config
from mmhrformer.engine.config_check import missing_data
from mmhrformer.engine.dead_options import merge_options
from mmhrformer.inferencers.image_loading import displayable
from mmhrformer.inferencers.media import reason

MIN_SIDE = 224  # smaller images are enlarged to make the class name legible


def build(cfg: Config, loader: str) -> tuple[BaseDataset, Visualizer]:
    """Build a dataset and the visualizer of a config.

    Args:
        cfg (Config): The config.
        loader (str): Data loader of the dataset, such as ``'train_dataloader'``.

    Returns:
        tuple[BaseDataset, Visualizer]: The dataset and the visualizer.

    Raises:
        ValueError: If the config has no such data loader or no visualizer.
        FileNotFoundError: If files of the dataset are missing.
    """
    for option in ('default_scope', loader, 'visualizer'):
        if not cfg.get(option):
            raise ValueError(f'the config has no {option}: use one that can be trained')
    if missing := missing_data(cfg, [loader]):
        raise FileNotFoundError('files of the dataset are missing\n  ' + '\n  '.join(missing))
    for pipeline in pipelines(cfg[loader].dataset):
        if name_of_type(pipeline[-1]) == 'PackPoseInputs':
            pipeline[-1].pack_transformed = True  # otherwise keypoints are in original coordinates
    dataset = DATASETS.build(cfg[loader].dataset)
    # Images are written to --out, not to the config's backends.
    visualizer = VISUALIZERS.build({**cfg.visualizer, 'name': 'browse', 'vis_backends': None})
    visualizer.dataset_meta = dataset.metainfo
    if hasattr(visualizer, 'skeleton'):  # mmpose sets links and colors only by this call
        visualizer.set_dataset_meta(dataset.metainfo)
    return dataset, visualizer


def pipelines(dataset: dict) -> Iterator[list]:
    """The pipelines of a dataset and of those that it wraps or concatenates."""
    if dataset.get('pipeline'):
        yield dataset['pipeline']
    for inner in filter(None, [dataset.get('dataset'), *dataset.get('datasets', [])]):
        yield from pipelines(inner)


def draw(visualizer: Visualizer, sample: dict, file: Path) -> None:
    """Draw a sample of a dataset.

    Args:
        visualizer (Visualizer): The visualizer of its framework.
        sample (dict): Output of the pipeline: ``inputs``, and ``data_samples`` with the labels.
        file (Path): Image file to write.
    """
    bgr = displayable(sample['inputs'].permute(1, 2, 0).numpy())
    image = np.ascontiguousarray(bgr[..., ::-1])
    labels = sample['data_samples']
    if hasattr(visualizer, 'visualize_cls'):
        side = max(MIN_SIDE, *image.shape[:2])
        visualizer.visualize_cls(image, labels, resize=side, draw_pred=False, out_file=str(file))
    else:
        visualizer.add_datasample(file.stem, image, labels, draw_pred=False, out_file=str(file))


def browse(args: argparse.Namespace) -> None:
    """Draw the samples that the command line selects.

    Args:
        args (argparse.Namespace): The command line.
    """
    if args.number < 1:
        raise ValueError(f'--number {args.number}: expected a positive number of images')
    config = find_config(args.config)
    cfg = read_config(config)
    merge_options(cfg, args.cfg_options)
    out = args.out or Path('work_dirs/browse') / config.stem
    out.mkdir(parents=True, exist_ok=True)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        dataset, visualizer = build(cfg, f'{args.split}_dataloader')
        number, failed = min(args.number, len(dataset)), []
        for index in np.linspace(0, len(dataset) - 1, number).round().astype(int):
            try:
                sample = dataset[index]
                source = Path(sample['data_samples'].get('img_path') or 'image').stem
                draw(visualizer, sample, out / f'{index:06d}_{source}.jpg')
            except Exception as err:  # a single image must not stop the others
                failed.append(f'image {index}: {reason(err)}')
                print(f'{failed[-1]}; skipped', file=sys.stderr)
    if len(failed) == number:
        raise ValueError(f'none of {number} images could be drawn, {failed[0]}')
    drawn = number - len(failed)
    print(f'{drawn} of {len(dataset)} images of the {args.split} split drawn in {out}')


def main() -> None:
    """Run the command line; exit with a message on failure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='path of a config, or name of a shipped one')
    parser.add_argument(
        '--split',
        choices=('train', 'val', 'test'),
        default='train',
        help='split of the dataset (%(default)s)',
    )
    parser.add_argument('--number', type=int, default=16, help='number of images (%(default)s)')
    parser.add_argument('--out', type=Path, help='output folder (work_dirs/browse/NAME_OF_CONFIG)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='config overrides')
    try:
        browse(parser.parse_args())
    except (ImportError, KeyError, OSError, TypeError, ValueError) as err:
        sys.exit(f'browse_dataset.py: {err}')


if __name__ == '__main__':
    main()
