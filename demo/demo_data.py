"""Generate the three small datasets of the demo configs: digits, figures, scenes.

``digits``   real handwritten digits (scikit-learn), ImageNet folder layout
``figures``  drawn people, COCO keypoint layout
``scenes``   drawn landscapes, mmsegmentation layout

No download is needed, and a network of half a million parameters learns each set
in minutes on one CPU core, so the complete workflow from raw data to a metric can
be tried on any machine::

    python demo/demo_data.py --task all --out data/demo

The same seed gives the same bytes, as long as the versions of NumPy and OpenCV are
the same. A set is written to a temporary folder and renamed when it is complete, so
an interrupted run leaves no partial dataset behind; run the command again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from demo_figures import KEYPOINT_NAMES, SKELETON, draw_figures
from demo_scenes import draw_scene

META_FILE = 'meta.json'
GENERATOR = 'mmhrformer tools/demo_data.py'  # the former path, to recognize existing sets
GENERATOR_VERSION = 1  # increase it whenever the bytes of any set change
DIGIT_SIZE = 32  # pixels, upscaled from 8
DIGIT_TRAIN = 1397  # of 1797; the rest is val


def write_image(path: Path, image: np.ndarray) -> None:
    """Encode an image by its suffix and write it; unlike cv2.imwrite, raises on a full disk."""
    data = cv2.imencode(path.suffix, image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1]
    path.write_bytes(data.tobytes())


def write_set(folder: Path, meta: dict, draw: Callable[[Path], None]) -> Path:
    """Write a dataset atomically, unless an identical one exists.

    Args:
        folder (Path): Folder of the set.
        meta (dict): Everything that determines the content: seed and counts.
        draw (Callable): Function that writes the set's files into a given folder.

    Returns:
        Path: Folder of the set.

    Raises:
        ValueError: If the folder exists and is not a generated set.
    """
    meta = {'generator': GENERATOR, 'version': GENERATOR_VERSION, **meta}
    note = folder / META_FILE
    found = json.loads(note.read_text()) if note.exists() else {}
    if found == meta:
        print(f'{folder} is complete, kept')
        return folder
    if folder.exists() and found.get('generator') != GENERATOR:
        raise ValueError(
            f'{folder} exists but was not written by demo/demo_data.py; move it away or '
            'choose another folder with --out'
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{folder.name}-', dir=folder.parent) as work:
        new = Path(work) / folder.name
        new.mkdir()
        draw(new)
        (new / META_FILE).write_text(json.dumps(meta, indent=1) + '\n')
        if found:
            shutil.rmtree(folder)
        new.rename(folder)
    print(f'wrote {folder}')
    return folder


def splits(seed: int, train: int, val: int) -> Iterator[tuple[str, Iterator]]:
    """Yield each split's name and an iterator of (index, generator) per image.

    Every image has its own generator, so it does not depend on the others.
    """
    for split, (name, count) in enumerate((('train', train), ('val', val))):
        yield name, ((i, np.random.default_rng([seed, split, i])) for i in range(count))


def make_digits(root: str | os.PathLike, seed: int = 0) -> Path:
    """Write scikit-learn's 1,797 digits as ``{train,val}/{0..9}/*.png``.

    Args:
        root (str | PathLike): Folder of the demo sets; this one is ``root/digits``.
        seed (int): Seed of the split into 1,397 train and 400 val images.

    Returns:
        Path: Folder of the set; images are 32x32, three equal channels.

    Raises:
        ImportError: If scikit-learn is not installed.
    """

    def draw(folder: Path) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            remedy = 'the digits need scikit-learn: pip install "mmhrformer[demo]"'
            raise ImportError(remedy) from error
        digits = load_digits()  # (1797, 8, 8) with values 0 to 16
        order = np.random.default_rng(seed).permutation(len(digits.target))
        for split, indices in (('train', order[:DIGIT_TRAIN]), ('val', order[DIGIT_TRAIN:])):
            for digit in range(10):
                (folder / split / str(digit)).mkdir(parents=True)
            for i in indices.tolist():
                image = cv2.resize(
                    digits.images[i], (DIGIT_SIZE,) * 2, interpolation=cv2.INTER_CUBIC
                )
                image = np.clip(np.rint(image * 255 / 16), 0, 255).astype(np.uint8)
                path = folder / split / str(digits.target[i]) / f'{i:04d}.png'
                write_image(path, cv2.cvtColor(image, cv2.COLOR_GRAY2BGR))

    return write_set(Path(root) / 'digits', {'seed': seed}, draw)


def make_figures(root: str | os.PathLike, train: int = 1600, val: int = 200, seed: int = 0) -> Path:
    """Write drawn people as ``{train,val}/*.jpg`` and COCO keypoint annotations.

    Args:
        root (str | PathLike): Folder of the demo sets; this one is ``root/figures``.
        train (int): Number of training images.
        val (int): Number of validation images.
        seed (int): Random seed.

    Returns:
        Path: Folder of the set, with ``annotations/person_keypoints_{train,val}.json``.
    """
    category = {'id': 1, 'name': 'person', 'supercategory': 'person'}
    category.update(keypoints=KEYPOINT_NAMES, skeleton=SKELETON)

    def draw(folder: Path) -> None:
        (folder / 'annotations').mkdir()
        for split, images in splits(seed, train, val):
            (folder / split).mkdir()
            data = {'images': [], 'annotations': [], 'categories': [category]}
            for i, rng in images:
                image, people = draw_figures(rng)
                size = dict(height=image.shape[0], width=image.shape[1])
                name = f'{i + 1:06d}.jpg'
                data['images'].append(dict(id=i + 1, file_name=name, **size))
                for k, person in enumerate(people):
                    data['annotations'].append(dict(id=10 * (i + 1) + k, image_id=i + 1, **person))
                write_image(folder / split / name, image)
            file = folder / 'annotations' / f'person_keypoints_{split}.json'
            file.write_text(json.dumps(data))

    return write_set(Path(root) / 'figures', {'seed': seed, 'train': train, 'val': val}, draw)


def make_scenes(root: str | os.PathLike, train: int = 400, val: int = 60, seed: int = 0) -> Path:
    """Write drawn landscapes as ``img_dir/{train,val}/*.jpg`` and ``ann_dir/{train,val}/*.png``.

    Args:
        root (str | PathLike): Folder of the demo sets; this one is ``root/scenes``.
        train (int): Number of training images.
        val (int): Number of validation images.
        seed (int): Random seed.

    Returns:
        Path: Folder of the set; label maps hold indices into ``SCENE_CLASSES`` and
        ``SCENE_IGNORE`` of ``demo_scenes.py``.
    """

    def draw(folder: Path) -> None:
        for split, images in splits(seed, train, val):
            for kind in ('img_dir', 'ann_dir'):
                (folder / kind / split).mkdir(parents=True)
            for i, rng in images:
                image, labels = draw_scene(rng)
                write_image(folder / 'img_dir' / split / f'{i:04d}.jpg', image)
                write_image(folder / 'ann_dir' / split / f'{i:04d}.png', labels)

    return write_set(Path(root) / 'scenes', {'seed': seed, 'train': train, 'val': val}, draw)


TASKS = {'cls': make_digits, 'pose': make_figures, 'seg': make_scenes}


def main() -> None:
    """Write the sets that the command line selects."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--task', choices=(*TASKS, 'all'), default='all', help='which set')
    parser.add_argument('--out', type=Path, default=Path('data/demo'), help='folder of the sets')
    parser.add_argument('--seed', type=int, default=0, help='0 or more; same seed, same bytes')
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f'--seed {args.seed}: expected a non-negative integer')
    try:
        for task in TASKS if args.task == 'all' else [args.task]:
            TASKS[task](args.out, seed=args.seed)
    except OSError as error:
        parser.error(f'cannot write to --out {args.out}: {error}')
    except (ValueError, ImportError) as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
