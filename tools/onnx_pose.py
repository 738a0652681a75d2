"""Pose estimation with an exported model, using only NumPy, OpenCV and onnxruntime.

    python tools/onnx_pose.py pose.onnx people.jpg --box 50 20 250 420 --out joints.jpg

This file is self-contained and may be copied: it imports neither torch nor OpenMMLab packages nor
mmhrformer. It reads its settings from the metadata of a file written by tools/export_onnx.py, and
works like our configs in mmpose: the box is extended to the aspect ratio of the input and by a
quarter; the heatmaps of the image and of its mirror image are averaged; peaks are shifted by a
quarter pixel toward the higher neighbor.
"""

from __future__ import annotations

import argparse
import json
import sys

import cv2
import numpy as np
import onnxruntime

MARGIN = 1.25  # as in mmpose's GetBBoxCenterScale


class PoseModel:
    """An exported pose model.

    Args:
        file (str): The ONNX file, with a fixed input size.
        flip (bool): Whether to average with the mirror image, which takes twice as long, if the
            file says which keypoints swap sides. Defaults to True.
    """

    def __init__(self, file: str, flip: bool = True) -> None:
        self.session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
        self.meta = self.session.get_modelmeta().custom_metadata_map
        if self.meta.get('task') != 'pose':
            raise ValueError(f'{file} is not a pose model exported by tools/export_onnx.py')
        if self.meta.get('decoder') != 'MSRAHeatmap':
            decoder = self.meta.get('decoder')
            raise ValueError(f'{file} needs the decoder {decoder}, only MSRAHeatmap is supported')
        self.height, self.width = self.session.get_inputs()[0].shape[2:]
        if not isinstance(self.height, int):
            raise ValueError(f'{file} has a dynamic input size: export it without --dynamic-size')
        self.names = json.loads(self.meta['names'])
        if 'flip_indices' not in self.meta:
            raise ValueError(f'{file} was exported by an old version: export it again')
        self.swap = json.loads(self.meta['flip_indices']) if flip else []
        self.shift = json.loads(self.meta['shift_heatmap'])

    def __call__(self, image: np.ndarray, box: list[float]) -> tuple[np.ndarray, np.ndarray]:
        """Estimate the pose of one person.

        Args:
            image (np.ndarray): Image of shape (H, W, 3), uint8, BGR.
            box (list[float]): Left, top, right and bottom of the person, in pixels.

        Returns:
            tuple[np.ndarray, np.ndarray]: Positions (keypoints, 2) as x and y in the image, and
            scores (keypoints,).

        Raises:
            ValueError: If the box has no area.
        """
        left, top, right, bottom = box
        if not (left < right and top < bottom):
            raise ValueError(f'box={list(box)}: expected left < right and top < bottom')
        # Image pixels per input pixel.
        scale = max((right - left) / self.width, (bottom - top) / self.height) * MARGIN
        corner = np.array([left + right - scale * self.width, top + bottom - scale * self.height])
        corner /= 2
        matrix = np.float32(
            [[1 / scale, 0, -corner[0] / scale], [0, 1 / scale, -corner[1] / scale]]
        )
        person = cv2.warpAffine(image, matrix, (self.width, self.height), flags=cv2.INTER_LINEAR)
        heatmaps = self.heatmaps(self.prepare(person))
        places, scores = decode(heatmaps)
        stride = self.height / heatmaps.shape[1]
        return places * stride * scale + corner, scores

    def prepare(self, person: np.ndarray) -> np.ndarray:
        """Convert an image (H, W, 3) to a batch (1, 3, H, W)."""
        if self.meta['channel_order'] == 'RGB':
            person = person[..., ::-1]
        person = person.astype(np.float32)
        if self.meta['normalization'] == 'expected':
            mean, std = (json.loads(self.meta[key]) for key in ('input_mean', 'input_std'))
            person = (person - np.float32(mean)) / np.float32(std)
        return np.ascontiguousarray(person.transpose(2, 0, 1)[None])

    def heatmaps(self, batch: np.ndarray) -> np.ndarray:
        """Compute the heatmaps (keypoints, H / 4, W / 4) of a batch of one image."""
        ((heatmaps,),) = self.session.run(None, {'image': batch})
        if not self.swap:
            return heatmaps
        ((mirrored,),) = self.session.run(None, {'image': batch[..., ::-1].copy()})
        mirrored = mirrored[self.swap, :, ::-1].copy()
        if self.shift:  # to align both, as shift_heatmap does in the configs
            mirrored[..., 1:] = mirrored[..., :-1].copy()
        return (heatmaps + mirrored) / 2


def decode(heatmaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the peaks of heatmaps, like mmpose's MSRAHeatmap.

    Args:
        heatmaps (np.ndarray): Heatmaps of shape (keypoints, H, W).

    Returns:
        tuple[np.ndarray, np.ndarray]: Positions (keypoints, 2), x and y, and scores (keypoints,).
    """
    rows, cols = heatmaps.shape[1:]
    scores = heatmaps.max((1, 2))
    places = np.stack(np.unravel_index(heatmaps.reshape(len(heatmaps), -1).argmax(1), (rows, cols)))
    found = places[::-1].T.astype(np.float64)
    found[scores <= 0] = -1
    for heatmap, place in zip(heatmaps, found):
        x, y = place.astype(int)
        if 1 < x < cols - 1 and 0 < y < rows:
            place[0] += 0.25 * np.sign(heatmap[y, x + 1] - heatmap[y, x - 1])
        if 1 < y < rows - 1 and 0 < x < cols:
            place[1] += 0.25 * np.sign(heatmap[y + 1, x] - heatmap[y - 1, x])
    return found, scores


def main() -> None:
    """Estimate, print and draw the keypoints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('model', metavar='MODEL', help='ONNX file of a pose model')
    add('image', metavar='IMAGE', help='image file')
    add('--box', type=float, nargs=4, metavar='N', help='left top right bottom (whole image)')
    add('--out', default='joints.jpg', metavar='FILE', help='image file to write (%(default)s)')
    add(
        '--threshold',
        type=float,
        default=0.3,
        metavar='X',
        help='minimum score to draw (%(default)s)',
    )
    add('--no-flip', action='store_true', help='skip the mirror image, in half the time')
    args = parser.parse_args()
    image = cv2.imread(args.image)
    if image is None:
        sys.exit(f'onnx_pose.py: OpenCV cannot read {args.image}')
    try:
        model = PoseModel(args.model, flip=not args.no_flip)
        places, scores = model(image, args.box or [0, 0, image.shape[1], image.shape[0]])
    except Exception as err:  # onnxruntime has many error classes
        sys.exit(f'onnx_pose.py: {err}')
    names = model.names or [f'keypoint {i}' for i in range(len(places))]
    for name, (x, y), score in zip(names, places, scores):
        print(f'{name:<16} {x:8.2f} {y:8.2f}  {score:.3f}')
        if score >= args.threshold:
            cv2.circle(image, (round(x), round(y)), 4, (0, 255, 0), -1)
    if not cv2.imwrite(args.out, image):
        sys.exit(f'onnx_pose.py: cannot write {args.out}')
    drawn = int(np.sum(scores >= args.threshold))
    print(f'{args.out}: {drawn} of {len(names)} keypoints drawn, with scores from {args.threshold}')


if __name__ == '__main__':
    main()
