"""Tiny datasets, laid out as the real ones, for the stock dataset classes to read.

``python tests/tiny_datasets.py data`` makes all of them. The files have the names, the formats and
the oddities of the real ones, so that a config reads them as it stands: gray and CMYK pictures,
crowds, people without key points, images that belong to no split. Only the content is drawn: every
class has a color, every joint a dot, each the same in all images.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torchvision
from PIL import Image

SEED = 0
COLORS = np.random.default_rng(SEED).integers(0, 256, (256, 3))  # of the labels
# Height and width of the images of a split, in turn: smaller than any crop, odd, high, wide.
SIZES = ((41, 53), (120, 151), (97, 73), (64, 128))


def save(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    """Write an image, in another color mode of Pillow if one is given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


def write(path: Path, text: str) -> None:
    """Write a text file in a folder that need not exist yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def add_noise(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Return the pixels with some noise, as uint8."""
    return np.clip(pixels + rng.normal(0, 10, pixels.shape), 0, 255).astype(np.uint8)


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Draw a smooth random image; (H, W, 3) uint8."""
    coarse = rng.integers(0, 256, (4, 5, 3)).astype(np.float32)
    return add_noise(rng, cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR))


# ---------------------------------------------------------------- classification

# Three of the classes, and which ones of the 1000 they are.
CLASSES = {'n01440764': 0, 'n02099601': 207, 'n15075141': 999}
PICTURES = {  # with the color modes that occur among the real ones, too
    'train': {
        'n01440764/n01440764_10026': None,
        'n01440764/n01440764_10027': 'L',
        'n02099601/n02099601_100': 'CMYK',
        'n15075141/n15075141_10': None,
    },
    'val': {
        'n01440764/ILSVRC2012_val_00000293': None,
        'n02099601/ILSVRC2012_val_00000109': 'L',
        'n15075141/ILSVRC2012_val_00000204': None,
    },
}


def class_folders() -> list[str]:
    """Name 1000 folders: the stock class wants them all, and counts them to find the labels.

    Returns:
        list[str]: Real names at the indices of ``CLASSES``, stand-ins that sort between them.
    """
    known = [int(name[1:]) for name in CLASSES]
    return [f'n{n:08.0f}' for n in np.interp(range(1000), list(CLASSES.values()), known).round()]


def make_imagenet(root: Path) -> None:
    """Write ``{train,val}/<class>/*.JPEG``; most classes have no image."""
    rng = np.random.default_rng(SEED)
    for split, pictures in PICTURES.items():
        for folder in class_folders():
            (root / split / folder).mkdir(parents=True, exist_ok=True)
        for (name, mode), size in zip(pictures.items(), SIZES):
            save(root / split / f'{name}.JPEG', draw_background(rng, *size), mode)


# ---------------------------------------------------------------- pose

# Image numbers, and the people in them. The real files list images without people, too.
PEOPLE = {
    'train2017': {
        9: ('top left', 'bottom right'),
        25: ('inside', 'crowd'),
        30: ('inside', 'without key points'),
        34: (),
    },
    'val2017': {
        139: ('inside', 'bottom right'),
        285: ('inside', 'crowd'),
        632: ('top left', 'without key points'),
    },
    'test2017': {1: ('inside',), 16: ('inside', 'inside'), 19: ()},
}
PERSON_SIZES = ((240, 320), (213, 320), (320, 181), (160, 120))
# The annotation file of each split, and the file of the boxes that a detector found.
COCO_FILES = {
    'train2017': ('person_keypoints_train2017', None),
    'val2017': ('person_keypoints_val2017', 'COCO_val2017_detections_AP_H_56_person'),
    'test2017': ('image_info_test-dev2017', 'COCO_test-dev2017_detections_AP_H_609_person'),
}
PERSON = {'supercategory': 'person', 'id': 1, 'name': 'person'}
OBJECTS = torchvision.models.detection.RetinaNet_ResNet50_FPN_Weights.COCO_V1.meta['categories']
BICYCLE = {'supercategory': 'vehicle', 'id': 2, 'name': 'bicycle'}


def place_box(rng: np.random.Generator, size: tuple[int, int], kind: str) -> np.ndarray:
    """Draw x, y, width and height of a person in an image of ``size`` (height, width)."""
    image = np.array(size[::-1], float)
    extent = image * rng.uniform(0.4, 0.7, 2)
    corners = {'top left': 0.0, 'bottom right': 1.0}
    start = (image - extent) * corners.get(kind, rng.uniform(0.2, 0.8, 2))
    return np.concatenate([start, extent]).round(2)


def place_joints(rng: np.random.Generator, box: np.ndarray) -> np.ndarray:
    """Draw (17, 3) x, y and visibility in a box; the coordinates of unlabelled joints are 0."""
    seen = rng.choice(3, 17, p=(0.2, 0.2, 0.6))
    seen[:2] = 2
    points = np.floor(box[:2] + rng.uniform(0, 1, (17, 2)) * (box[2:] - 1))
    return np.c_[points * (seen > 0)[:, None], seen].astype(int)


def annotate(rng: np.random.Generator, size: tuple[int, int], kind: str) -> dict:
    """Draw the annotation of one person or crowd, without the numbers of it and of its image."""
    box = place_box(rng, size, kind)
    (x, y), (right, bottom) = box[:2].tolist(), (box[:2] + box[2:]).tolist()
    joints = np.zeros((17, 3), int)
    if kind not in ('crowd', 'without key points'):
        joints = place_joints(rng, box)
    outline = [[x, y, right, y, right, bottom, x, bottom]]
    mask = {'counts': [0, size[0] * size[1]], 'size': list(size)}  # run lengths: all of the image
    return {
        'category_id': PERSON['id'],
        'iscrowd': int(kind == 'crowd'),
        'segmentation': mask if kind == 'crowd' else outline,
        'area': float(0.6 * box[2] * box[3]),
        'bbox': box.tolist(),
        'keypoints': joints.ravel().tolist(),
        'num_keypoints': int((joints[:, 2] > 0).sum()),
    }


def draw_people(rng: np.random.Generator, size: tuple[int, int], people: list[dict]) -> np.ndarray:
    """Draw dark boxes for people and dots for their joints; (H, W, 3) uint8."""
    image = draw_background(rng, *size)
    for person in people:
        x, y, width, height = (int(number) for number in person['bbox'])
        image[y : y + height, x : x + width] //= 2
    for person in people:
        for joint, (x, y, seen) in enumerate(np.reshape(person['keypoints'], (17, 3)).tolist()):
            if seen:
                cv2.circle(image, (x, y), 4, COLORS[joint].tolist(), -1)
    return image


def detect(rng: np.random.Generator, number: int, size: tuple[int, int], people: list) -> list:
    """Imitate a detector: every person, not quite in place, and two false boxes of low score."""
    found = [person['bbox'] + rng.normal(0, 3, 4) for person in people]
    found += [place_box(rng, size, 'inside') for _ in range(2)]
    scores = [*rng.uniform(0.6, 1, len(people)), *rng.uniform(0, 0.3, 2)]
    return [
        {'bbox': box.tolist(), 'category_id': 1, 'image_id': number, 'score': float(score)}
        for box, score in zip(found, scores)
    ]


def make_people(rng: np.random.Generator, root: Path, split: str) -> tuple[dict, list]:
    """Write the images of a split.

    Args:
        rng (np.random.Generator): Source of randomness.
        root (Path): Folder of the dataset.
        split (str): ``'train2017'``, ``'val2017'`` or ``'test2017'``.

    Returns:
        tuple: Content of the annotation file, and what the detector found.
    """
    images, annotations, detections = [], [], []
    for (number, kinds), size in zip(PEOPLE[split].items(), PERSON_SIZES):
        people = [annotate(rng, size, kind) for kind in kinds]
        name = f'{number:012d}.jpg'
        save(root / split / name, draw_people(rng, size, people))
        images.append({'id': number, 'file_name': name, 'height': size[0], 'width': size[1]})
        for person in people:
            annotations.append({'id': len(annotations) + 1, 'image_id': number, **person})
        detections += detect(rng, number, size, people)
    content = {'info': {}, 'licenses': [], 'images': images}
    if split == 'test2017':  # nothing is annotated, and the objects of COCO are listed, too
        return {**content, 'categories': [PERSON, BICYCLE]}, detections
    return {**content, 'categories': [PERSON], 'annotations': annotations}, detections


def make_coco(root: Path) -> None:
    """Write images, key points, objects, and the boxes of a detector for val and test."""
    categories = [
        {'id': number, 'name': name}
        for number, name in enumerate(OBJECTS)
        if name not in ('__background__', 'N/A')
    ]
    rng = np.random.default_rng(SEED)
    for split, (labels, detector) in COCO_FILES.items():
        content, boxes = make_people(rng, root, split)
        write(root / f'annotations/{labels}.json', json.dumps(content))
        if 'annotations' in content:  # people are the only objects, with boxes and outlines
            objects = json.dumps({**content, 'categories': categories})
            write(root / f'annotations/instances_{split}.json', objects)
        if detector:
            write(root / f'person_detection_results/{detector}.json', json.dumps(boxes))


# ---------------------------------------------------------------- segmentation


@dataclass(frozen=True)
class LabelMaps:
    """Layout of a segmentation dataset on disk.

    Args:
        splits (dict): The names of the images of each split.
        image (str): Path of an image, with ``{split}`` and ``{name}`` to fill in.
        labels (str): Path of its label map, likewise.
        classes (range): The labels of the classes, as they are stored.
        ignored (int): The label of pixels that belong to no class.
        lists (str): Path of the file that lists a split, or nothing.
        unlisted (tuple): Names of images without label map and in no split.
        sizes (tuple): Height and width of the images, in turn.
    """

    splits: dict[str, tuple[str, ...]]
    image: str
    labels: str
    classes: range
    ignored: int
    lists: str = ''
    unlisted: tuple[str, ...] = ()
    sizes: tuple[tuple[int, int], ...] = SIZES


CITYSCAPES = LabelMaps(
    splits={
        'train': (
            'aachen/aachen_000000_000019', 'aachen/aachen_000001_000019',
            'bochum/bochum_000000_000313', 'zurich/zurich_000000_000019',
        ),
        'val': (
            'frankfurt/frankfurt_000000_000294', 'lindau/lindau_000000_000019',
        ),
    },
    image='leftImg8bit/{split}/{name}_leftImg8bit.png',
    labels='gtFine/{split}/{name}_gtFine_labelTrainIds.png',
    classes=range(19),
    ignored=255,
    sizes=((96, 96),) * 4,  # all of one size, as the real ones; half as wide, for speed
)  # fmt: skip
PASCAL_CONTEXT = LabelMaps(
    splits={
        'train': ('2008_000002', '2008_000003', '2008_000007', '2010_006086'),
        'val': ('2008_000006', '2008_000026'),
    },
    image='JPEGImages/{name}.jpg',
    labels='SegmentationClassContext/{name}.png',
    classes=range(1, 60),
    ignored=0,
    lists='ImageSets/SegmentationContext/{split}.txt',
    unlisted=('2007_000027',),
)
COCO_STUFF = LabelMaps(
    splits={
        'train': tuple(f'COCO_train2014_{n:012d}' for n in (77, 149, 194, 349)),
        'test': tuple(f'COCO_train2014_{n:012d}' for n in (368, 431)),
    },
    image='images/{split}2014/{name}.jpg',
    labels='annotations/{split}2014/{name}_labelTrainIds.png',
    classes=range(1, 172),
    ignored=0,
    lists='imageLists/{split}.txt',
)
ADE20K = LabelMaps(
    splits={
        'training': tuple(f'ADE_train_{n:08d}' for n in (1, 2, 3, 4)),
        'validation': tuple(f'ADE_val_{n:08d}' for n in (1, 2)),
    },
    image='images/{split}/{name}.jpg',
    labels='annotations/{split}/{name}.png',
    classes=range(1, 151),
    ignored=0,
)


def draw_labels(
    rng: np.random.Generator, size: tuple[int, int], kind: LabelMaps
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene of colored rectangles.

    Args:
        rng (np.random.Generator): Source of randomness.
        size (tuple): Height and width.
        kind (LabelMaps): Which labels there are; the first, the last and the ignored one occur.

    Returns:
        tuple: (H, W, 3) uint8 image, (H, W) uint8 labels.
    """
    coarse = rng.choice(kind.classes, (4, 5)).astype(np.uint8)
    coarse.flat[[0, 7, 19]] = kind.classes[0], kind.ignored, kind.classes[-1]
    labels = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)
    return add_noise(rng, COLORS[labels]), labels


def make_label_maps(root: Path, kind: LabelMaps) -> None:
    """Write images, label maps and lists of a segmentation dataset.

    Args:
        root (Path): Folder of the dataset.
        kind (LabelMaps): What it looks like.
    """
    rng = np.random.default_rng(SEED)
    for split, names in kind.splits.items():
        for name, size in zip(names, kind.sizes):
            image, labels = draw_labels(rng, size, kind)
            save(root / kind.image.format(split=split, name=name), image)
            save(root / kind.labels.format(split=split, name=name), labels)
        if kind.lists:
            write(root / kind.lists.format(split=split), '\n'.join(names) + '\n')
    for name in kind.unlisted:
        save(root / kind.image.format(name=name), draw_background(rng, *SIZES[0]))


# ---------------------------------------------------------------- all

# Name -> its folder in the folder of all datasets, and what writes it.
DATASETS: dict[str, tuple[str, Callable[[Path], None]]] = {
    'imagenet': ('imagenet', make_imagenet),
    'coco': ('coco', make_coco),
    'cityscapes': ('cityscapes', partial(make_label_maps, kind=CITYSCAPES)),
    'pascal_context': ('VOCdevkit/VOC2010', partial(make_label_maps, kind=PASCAL_CONTEXT)),
    'coco_stuff10k': ('coco_stuff10k', partial(make_label_maps, kind=COCO_STUFF)),
    'ade20k': ('ade/ADEChallengeData2016', partial(make_label_maps, kind=ADE20K)),
}


def make(name: str, data: Path) -> Path:
    """Write a tiny dataset.

    Args:
        name (str): A key of ``DATASETS``.
        data (Path): Folder of all datasets, ``data`` for our configs.

    Returns:
        Path: Folder of this one, what the configs call ``data_root``.
    """
    folder, write_to = DATASETS[name]
    write_to(Path(data) / folder)
    return Path(data) / folder


if __name__ == '__main__':
    if len(sys.argv) != 2:
        sys.exit('usage: tiny_datasets.py FOLDER')
    for dataset in DATASETS:
        print(make(dataset, Path(sys.argv[1])))
