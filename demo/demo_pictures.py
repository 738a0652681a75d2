"""Draw the predictions of the demo models and their training curves."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from mmhrformer import get_inferencer

FONT = cv2.FONT_HERSHEY_SIMPLEX


def tile(images: list[np.ndarray], columns: int, gap: int = 6) -> np.ndarray:
    """Put images of one size side by side.

    Args:
        images (list[np.ndarray]): Images of shape (H, W, 3).
        columns (int): Images in a row.
        gap (int): White pixels between them. Defaults to 6.

    Returns:
        np.ndarray: One image.
    """
    height, width = images[0].shape[:2]
    rows = -(-len(images) // columns)
    shape = (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    sheet = np.full(shape, 255, np.uint8)
    for i, image in enumerate(images):
        y, x = (height + gap) * (i // columns), (width + gap) * (i % columns)
        sheet[y : y + height, x : x + width] = image
    return sheet


def enlarge(images: list[np.ndarray]) -> list[np.ndarray]:
    """Double the size of images, since those of the demos are small."""
    return [cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC) for image in images]


def draw_predictions(name: str, config: str, checkpoint: Path, data: Path) -> np.ndarray:
    """Draw the predictions of a model for some validation images.

    Args:
        name (str): ``'cls'``, ``'pose'`` or ``'seg'``.
        config (str): Name or path of the config.
        checkpoint (Path): The trained model.
        data (Path): Folder of the dataset.

    Returns:
        np.ndarray: A sheet of pictures, (H, W, 3) uint8, RGB.
    """
    find = get_inferencer(config, str(checkpoint), name, device='cpu', show_progress=False)
    if name == 'cls':
        digits = [sorted((data / 'val' / str(digit)).glob('*.png'))[0] for digit in range(10)]
        images = [cv2.resize(cv2.imread(str(path)), (128, 128)) for path in digits]
        for image, found in zip(images, find(digits)['predictions']):
            scores = np.asarray(found['pred_scores'])
            for row, label in enumerate(scores.argsort()[::-1][:3]):
                text, place = f'{label}: {scores[label]:.0%}', (3, 14 + 14 * row)
                color = (255, 255, 0) if row == 0 else (200, 200, 200)
                cv2.putText(image, text, place, FONT, 0.42, color, lineType=cv2.LINE_AA)
        return tile(images, 5)
    if name == 'pose':
        found = json.loads((data / 'annotations/person_keypoints_val.json').read_text())
        images, boxes = found['images'][:8], []
        for image in images:
            people = [a['bbox'] for a in found['annotations'] if a['image_id'] == image['id']]
            boxes.append([(x, y, x + w, y + h) for x, y, w, h in people])
        paths = [data / 'val' / image['file_name'] for image in images]
        found = find(paths, boxes=boxes, return_vis=True, radius=2)
        return tile(enlarge(found['visualization']), 4)
    paths = sorted((data / 'img_dir/val').glob('*.jpg'))[:6]
    masks = find(paths, with_labels=False, opacity=0.8, return_vis=True)['visualization']
    images = [cv2.imread(str(path))[..., ::-1] for path in paths]
    return tile(enlarge(images + masks), 6)


def draw_curves(work_dir: Path, out: Path) -> None:
    """Draw the training loss and the validation metric of a run.

    Args:
        work_dir (Path): Work folder of the training.
        out (Path): The picture to write.
    """
    import matplotlib

    matplotlib.use('Agg')
    from matplotlib import pyplot as plt

    log = max(work_dir.glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime)
    records = [json.loads(line) for line in log.read_text().splitlines()]
    losses = [(r['step'], r['loss']) for r in records if 'loss' in r]
    metrics = ('accuracy/top1', 'coco/AP', 'mIoU')
    scores = [(i, name, r[name]) for i, r in enumerate(records) for name in metrics if name in r]
    steps_at = np.maximum.accumulate([r['step'] if 'loss' in r else 0 for r in records])
    figure, axis = plt.subplots(figsize=(5, 3), layout='constrained')
    axis.plot(*zip(*losses), color='tab:blue')
    axis.set(xlabel='iteration', yscale='log')
    axis.set_ylabel('training loss', color='tab:blue')
    if scores:
        right = axis.twinx()
        right.plot([steps_at[i] for i, _, _ in scores], [v for *_, v in scores], 'o-', color='C1')
        right.set_ylabel(f'validation {scores[0][1]}', color='C1')
    figure.savefig(out, dpi=110)
    plt.close(figure)


def main() -> None:
    """Draw predictions and training curves of a demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('name', choices=['cls', 'pose', 'seg'], help='which demo')
    parser.add_argument('config', help='name or path of its config')
    parser.add_argument('checkpoint', type=Path, help='the trained model')
    parser.add_argument('data', type=Path, help='folder of its dataset')
    parser.add_argument('out', type=Path, help='folder of the demo, with the training in train/')
    args = parser.parse_args()
    sheet = draw_predictions(args.name, args.config, args.checkpoint, args.data)
    cv2.imwrite(str(args.out / 'predictions.png'), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    draw_curves(args.out / 'train', args.out / 'curves.png')


if __name__ == '__main__':
    main()
