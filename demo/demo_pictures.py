"""Draw what the demo models see, with the visualizers of the frameworks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import cv2
import numpy as np

from mmhrformer.configs import find_config

ENLARGE = 2  # the demo images are small


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


def draw_digits(config: str, checkpoint: Path, data: Path) -> np.ndarray:
    """Draw digits with the three likeliest labels; returns an RGB image."""
    from mmpretrain import ImageClassificationInferencer

    paths = [sorted((data / 'val' / str(digit)).glob('*.png'))[0] for digit in range(10)]
    model = ImageClassificationInferencer(config, pretrained=str(checkpoint), device='cpu')
    images = [cv2.resize(cv2.imread(str(path)), (128, 128)) for path in paths]
    results = model([cv2.imread(str(path)) for path in paths])
    for image, result in zip(images, results):
        scores = np.asarray(result['pred_scores'])
        for row, label in enumerate(scores.argsort()[::-1][:3]):
            text = f'{label}: {100 * scores[label]:.0f}%'
            colour = (255, 255, 0) if row == 0 else (200, 200, 200)
            cv2.putText(
                image, text, (3, 14 + 14 * row), cv2.FONT_HERSHEY_SIMPLEX, 0.42, colour, 1,
                cv2.LINE_AA,
            )  # fmt: skip
    return tile(images, 5)


def draw_figures(config: str, checkpoint: Path, data: Path) -> np.ndarray:
    """Draw the skeletons that the model finds; returns an RGB image."""
    from mmpose.apis import inference_topdown, init_model
    from mmpose.structures import merge_data_samples
    from mmpose.visualization import PoseLocalVisualizer

    model = init_model(config, str(checkpoint), device='cpu')
    visualizer = PoseLocalVisualizer(radius=3, line_width=2)
    visualizer.set_dataset_meta(model.dataset_meta)
    annotations = json.loads((data / 'annotations/person_keypoints_val.json').read_text())
    drawn = []
    for record in annotations['images'][:8]:
        image = cv2.imread(str(data / 'val' / record['file_name']))
        boxes = np.array(
            [a['bbox'] for a in annotations['annotations'] if a['image_id'] == record['id']]
        )
        results = inference_topdown(model, image, boxes, bbox_format='xywh')
        sample = merge_data_samples(results)
        for key in ('keypoints', 'bboxes'):
            sample.pred_instances[key] = sample.pred_instances[key] * ENLARGE
        image = cv2.resize(image, None, fx=ENLARGE, fy=ENLARGE, interpolation=cv2.INTER_CUBIC)
        drawn.append(
            visualizer.add_datasample(
                'pose', cv2.cvtColor(image, cv2.COLOR_BGR2RGB), sample, draw_gt=False, show=False
            )
        )
    return tile([cv2.resize(image, (320, 256)) for image in drawn], 4)


def draw_scenes(config: str, checkpoint: Path, data: Path) -> np.ndarray:
    """Draw scenes, the predicted classes below each; returns an RGB image."""
    from mmseg.apis import inference_model, init_model, show_result_pyplot

    model = init_model(config, str(checkpoint), device='cpu')
    images, masks = [], []
    for path in sorted((data / 'img_dir/val').glob('*.jpg'))[:6]:
        image = cv2.imread(str(path))
        result = inference_model(model, image)
        rgb = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
        mask = show_result_pyplot(
            model, rgb, result, opacity=0.8, draw_gt=False, show=False, with_labels=False
        )
        for drawn, one in ((images, rgb), (masks, mask)):
            drawn.append(cv2.resize(one, (192, 192), interpolation=cv2.INTER_NEAREST))
    return tile(images + masks, 6)


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


PAINTERS = dict(cls=draw_digits, pose=draw_figures, seg=draw_scenes)


def draw(name: str, config: str, checkpoint: Path, data: Path, out: Path) -> None:
    """Draw predictions and training curves of a demo.

    Args:
        name (str): ``'cls'``, ``'pose'`` or ``'seg'``.
        config (str): Name of the config.
        checkpoint (Path): The trained model.
        data (Path): Folder of the data set.
        out (Path): Folder of the demo: trained in ``train``, pictures go beside it.
    """
    sheet = PAINTERS[name](str(find_config(config)), checkpoint, data)
    cv2.imwrite(str(out / 'predictions.png'), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    draw_curves(out / 'train', out / 'curves.png')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('name', choices=PAINTERS, help='which demo')
    parser.add_argument('config', help='name or path of its config')
    parser.add_argument('checkpoint', type=Path, help='the trained model')
    parser.add_argument('data', type=Path, help='folder of its data set')
    parser.add_argument('out', type=Path, help='folder of the demo, with the training in train/')
    draw(**vars(parser.parse_args()))
