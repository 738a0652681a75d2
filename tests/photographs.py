"""Custom datasets, cut from two photographs of scikit-learn, as docs/own_data.md says."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import sklearn.datasets

# Left, top, width and height of a class in a photograph.
CLASSES = {
    'daisy': ('flower.jpg', (170, 85, 278, 275)),
    'rose': ('china.jpg', (60, 30, 290, 300)),
    'tulip': ('china.jpg', (370, 210, 260, 200)),
}
FLOWER = CLASSES['daisy'][1]
# Marked by hand in flower.jpg: its middle, two petals next to it, two at the rim.
KEYPOINTS = ((307, 222), (352, 236), (262, 236), (398, 122), (222, 122))
SHIFTS = {'train': ((0, 0), (-12, 9)), 'val': ((8, -6), (-9, -10))}  # of the crops, in pixels


def crop(photograph: str, box: tuple[int, ...], shift: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Cut a box out of a photograph; (height, width, 3) uint8 in the order of cv2.imwrite."""
    (left, top, width, height), (x, y) = box, shift
    pixels = sklearn.datasets.load_sample_image(photograph)[..., ::-1]
    return pixels[top + y : top + y + height, left + x : left + x + width]


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def make_flowers(root: Path) -> None:
    """A folder for each class."""
    for split, shifts in SHIFTS.items():
        for name, place in CLASSES.items():
            for number, shift in enumerate(shifts, 1):
                save(root / split / name / f'00{number}.jpg', crop(*place, shift))


def make_cats(root: Path) -> None:
    """Keypoints in COCO format, 20 pixels of the photograph around each box."""
    (root / 'annotations').mkdir(parents=True)
    left, top, width, height = FLOWER
    around = (left - 20, top - 20, width + 40, height + 40)
    for split, shifts in SHIFTS.items():
        images, annotations = [], []
        for number, shift in enumerate(shifts, 1):
            pixels = crop('flower.jpg', around, shift)
            save(root / split / f'000{number}.jpg', pixels)
            size = dict(zip(('height', 'width'), pixels.shape))
            images.append(dict(id=number, file_name=f'000{number}.jpg', **size))
            corner = np.add(around[:2], shift)
            annotations.append(
                dict(
                    id=number,
                    image_id=number,
                    category_id=1,
                    bbox=[*np.subtract((left, top), corner).tolist(), width, height],
                    area=width * height,
                    iscrowd=0,
                    num_keypoints=len(KEYPOINTS),
                    keypoints=np.c_[KEYPOINTS - corner, [2] * len(KEYPOINTS)].ravel().tolist(),
                )
            )
        content = dict(images=images, annotations=annotations, categories=[dict(id=1, name='cat')])
        (root / f'annotations/{split}.json').write_text(json.dumps(content))


def make_leaves(root: Path) -> None:
    """Label maps by color: 1 for green and blue, 2 for orange, 0 for the dark, 255 between."""
    for split, shifts in SHIFTS.items():
        for number, shift in enumerate(shifts, 1):
            pixels = crop('flower.jpg', (20, 60, 440, 350), shift)
            hue, _, value = cv2.split(cv2.cvtColor(pixels, cv2.COLOR_BGR2HSV))
            labels = np.where(hue < 30, 2, 1).astype(np.uint8)
            labels[value < 60], labels[value < 55] = 255, 0
            save(root / f'img_dir/{split}/00{number}.jpg', pixels)
            save(root / f'ann_dir/{split}/00{number}.png', labels)
