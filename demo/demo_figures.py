"""Draw people with known joints, as images with COCO keypoint annotations."""

from __future__ import annotations

from itertools import chain

import cv2
import numpy as np
from demo_drawing import ellipse, expose, fill_polygon, hsv, hull, shade, smooth_noise

HEIGHT, WIDTH = FIGURE_SHAPE = (160, 200)  # pixels
KEYPOINT_NAMES = (
    'nose', 'left_eye', 'right_eye', 'left_ear', 'right_ear',
    'left_shoulder', 'right_shoulder', 'left_elbow', 'right_elbow',
    'left_wrist', 'right_wrist', 'left_hip', 'right_hip',
    'left_knee', 'right_knee', 'left_ankle', 'right_ankle',
)  # fmt: skip
SKELETON = (
    (16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9),
    (8, 10), (9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7),
)  # fmt: skip
NOSE, EYES, EARS, SHOULDERS, HIPS = 0, slice(1, 3), slice(3, 5), slice(5, 7), slice(11, 13)
HEAD_RADIUS = 0.104  # in body heights
MIN_VISIBLE = 11  # joints that must lie inside the image
MAX_OVERLAP = 0.05  # box IoU of two figures in one image


# ---------------------------------------------------------------- pose


def direction(angle: float, side: int) -> np.ndarray:
    """Return the unit vector of a limb.

    Args:
        angle (float): Degrees from straight down, positive away from the body.
        side (int): +1 for the person's left, which is on the right of the image since
            all figures face the viewer; -1 for the right.
    """
    return np.array([side * np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))])


def rotate(points: np.ndarray, degrees: float) -> np.ndarray:
    """Rotate (N, 2) points around the origin."""
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return points @ np.array([[cos, sin], [-sin, cos]])


def arm_angles(rng: np.random.Generator) -> tuple[float, float]:
    """Draw the outward angles of upper arm and forearm, within the limits of an elbow."""
    kind = rng.random()
    if kind < 0.5:  # hanging, or the hand on the belly
        upper = rng.uniform(5, 40)
        return upper, upper + rng.uniform(-45, 60)
    if kind < 0.75:  # out to the side, the forearm up or on the hip
        upper = rng.uniform(35, 85)
        return upper, upper + rng.choice([rng.uniform(-110, -60), rng.uniform(20, 110)])
    upper = rng.uniform(105, 160)  # raised
    return upper, upper + rng.uniform(-20, 35)


def leg_angles(rng: np.random.Generator) -> tuple[float, float]:
    """Draw the outward angles of thigh and shin; a knee bends inwards and down only."""
    thigh = rng.uniform(20, 65) if rng.random() < 0.2 else rng.uniform(-2, 18)
    return thigh, thigh - rng.uniform(0, thigh + 12)


def sample_pose(rng: np.random.Generator) -> np.ndarray:
    """Draw the joints of a figure that faces the viewer.

    Args:
        rng (np.random.Generator): Source of randomness.

    Returns:
        np.ndarray: (17, 2) x, y in units of about one body height; the origin is
        the middle of the hips, y points down.
    """
    yaw, lean, build = rng.uniform(-14, 14), rng.normal(0, 6), rng.uniform(0.94, 1.08, 4)
    width = np.cos(np.deg2rad(yaw))
    joints = np.zeros((17, 2))
    neck = np.array([0, -0.28 * build[0]])
    # The head is a ball that turns by `yaw`: angles and heights of nose, eyes and ears on it.
    angles = np.deg2rad(np.array([0, 28, -28, 90, -90]) + yaw)
    heights = np.array([0.18, -0.14, -0.14, 0.02, 0.02])
    face = HEAD_RADIUS * np.stack([np.sin(angles), heights], 1)
    joints[:5] = neck + [0, -0.048 - HEAD_RADIUS] + rotate(face, rng.normal(0, 4))
    for side, first in ((1, 5), (-1, 6)):
        upper, fore = arm_angles(rng)
        joints[first] = neck + [side * 0.108 * build[1] * width, rng.uniform(-0.008, 0.008)]
        joints[first + 2] = joints[first] + 0.158 * build[2] * direction(upper, side)
        joints[first + 4] = joints[first + 2] + 0.145 * build[2] * direction(fore, side)
    joints[:11] = rotate(joints[:11], lean)
    for side, first in ((1, 11), (-1, 12)):
        thigh, shin = leg_angles(rng)
        joints[first] = [side * 0.066 * width, 0]
        joints[first + 2] = joints[first] + 0.215 * build[3] * direction(thigh, side)
        joints[first + 4] = joints[first + 2] + 0.205 * build[3] * direction(shin, side)
    return joints


# ---------------------------------------------------------------- look


def sample_look(rng: np.random.Generator) -> dict:
    """Draw the colors and clothes of a figure; left and right sleeves and legs differ."""
    side = rng.choice([-1, 1]) * rng.uniform(0.13, 0.25)
    shirt = hsv(rng.uniform(0, 360), rng.uniform(0.35, 0.9), rng.uniform(0.45, 0.9))
    trousers = hsv(rng.uniform(0, 360), rng.uniform(0.2, 0.8), rng.uniform(0.25, 0.7))
    return {
        'skin': hsv(rng.uniform(14, 30), rng.uniform(0.28, 0.6), rng.uniform(0.5, 0.97)),
        'hair': hsv(rng.uniform(15, 45), rng.uniform(0.2, 0.7), rng.uniform(0.1, 0.6)),
        'shirt': shirt,
        # The lighter side is drawn at random: if it were always the left one, horizontal flips
        # in the training pipeline would contradict their labels.
        'sleeves': (shade(shirt, 1 + side), shade(shirt, 1 - side)),
        'trousers': trousers,
        'legs': (shade(trousers, 1 + side), shade(trousers, 1 - side)),
        'shoes': hsv(rng.uniform(0, 360), rng.uniform(0, 0.7), rng.uniform(0.12, 0.85)),
        'long_sleeves': rng.random() < 0.35,
        'long_trousers': rng.random() < 0.6,
        'long_hair': rng.random() < 0.4,
        'stout': rng.uniform(1.02, 1.3),
    }


def leg_shapes(joints: np.ndarray, side: int, unit: float, look: dict) -> list:
    """Return (polygon, color) pairs of one leg; ``side`` 0 is the person's left."""
    hip, knee, ankle = joints[11 + side], joints[13 + side], joints[15 + side]
    thick, trousers = unit * look['stout'], look['legs'][side]
    heel, toe = ankle + [0, 0.018 * unit], ankle + np.array([0.035 - 0.07 * side, 0.03]) * unit
    return [
        (hull((heel, 0.028 * unit), (toe, 0.022 * unit)), look['shoes']),
        (
            hull((knee, 0.036 * thick), (ankle, 0.025 * thick)),
            trousers if look['long_trousers'] else look['skin'],
        ),
        (hull((hip, 0.052 * thick), (knee, 0.039 * thick)), trousers),
    ]


def arm_shapes(joints: np.ndarray, side: int, unit: float, look: dict) -> list:
    """Return (polygon, color) pairs of one arm; ``side`` 0 is the person's left."""
    shoulder, elbow, wrist = joints[5 + side], joints[7 + side], joints[9 + side]
    thick, sleeve = unit * look['stout'], look['sleeves'][side]
    hand = wrist + 0.06 * (wrist - elbow)
    return [
        (hull((wrist, 0.034 * unit), (hand, 0.036 * unit)), shade(look['skin'], 1.12)),
        (
            hull((elbow, 0.029 * thick), (wrist, 0.022 * thick)),
            sleeve if look['long_sleeves'] else look['skin'],
        ),
        (hull((shoulder, 0.039 * thick), (elbow, 0.031 * thick)), sleeve),
    ]


def torso_shapes(joints: np.ndarray, unit: float, look: dict) -> list:
    """Return (polygon, color) pairs of the top of the trousers, neck and shirt."""
    thick, shoulders, hips = unit * look['stout'], joints[SHOULDERS], joints[HIPS]
    waist = hips + 0.2 * (shoulders - hips)
    neck = (shoulders.mean(0), joints[EARS].mean(0))
    return [
        (hull(*((point, 0.047 * thick) for point in (*hips, *waist))), look['trousers']),
        (hull(*((point, 0.036 * unit) for point in neck)), shade(look['skin'], 0.85)),
        (hull(*((point, 0.036 * thick) for point in (*shoulders, *waist))), look['shirt']),
    ]


def head_shapes(joints: np.ndarray, unit: float, look: dict) -> tuple[list, list, list]:
    """Return (polygon, color) pairs of the hair behind the neck, the head and the face."""
    skin, hair, radius = look['skin'], look['hair'], HEAD_RADIUS * unit
    nose, center = joints[NOSE], joints[EARS].mean(0)
    across = (joints[3] - joints[4]) / np.linalg.norm(joints[3] - joints[4])
    down, tilt = np.array([-across[1], across[0]]), np.rad2deg(np.arctan2(across[1], across[0]))

    def part(at, x, y, first=0.0, last=360.0):
        return ellipse(at, x * radius, y * radius, first, last)

    behind = [(hull((center, 1.14 * radius), (center + 1.3 * radius * down, radius)), hair)]
    head = [(part(ear, 0.22, 0.27), shade(skin, 0.92)) for ear in joints[EARS]]
    head.append((part(center, 0.97, 1.05), skin))
    head.append((part(center, 1.02, 1.1, 200 + tilt, 340 + tilt), hair))
    face = []
    for eye in joints[EYES]:
        face += [(part(eye, 0.22, 0.2), (245.0,) * 3), (part(eye, 0.12, 0.14), (35.0, 20.0, 20.0))]
    face.append((part(nose, 0.11, 0.15), shade(skin, 0.68)))
    mouth = part(nose + 0.33 * radius * down, 0.32, 0.18, tilt, 180 + tilt)
    face.append((mouth, (70.0, 60.0, 160.0)))
    return behind if look['long_hair'] else [], head, face


def figure_shapes(joints: np.ndarray, unit: float, look: dict) -> list:
    """Turn joints into polygons, from back to front.

    Args:
        joints (np.ndarray): (17, 2) x, y in pixels.
        unit (float): Body height in pixels.
        look (dict): From :func:`sample_look`.

    Returns:
        list: (polygon, color, outline) of each shape; a face is too small for outlines.
    """
    legs, arms = (
        [shape for side in (0, 1) for shape in limb(joints, side, unit, look)]
        for limb in (leg_shapes, arm_shapes)
    )
    hair, head, face = head_shapes(joints, unit, look)
    layers = (hair, legs, torso_shapes(joints, unit, look), head, face, arms)
    return [(*shape, layer is not face) for layer in layers for shape in layer]


# ---------------------------------------------------------------- image


def draw_background(rng: np.random.Generator) -> np.ndarray:
    """Draw a wall, a floor, noise and a few faint shapes; (H, W, 3) uint8."""
    wall, floor = (
        np.array(hsv(rng.uniform(0, 360), rng.uniform(0.05, 0.4), rng.uniform(*value)))
        for value in ((0.45, 0.95), (0.3, 0.75))
    )
    ramp = np.linspace(0, 1, HEIGHT)[:, None, None]
    image = wall * (1 - 0.3 * ramp) + 18 * smooth_noise(rng, FIGURE_SHAPE, (4, 5))
    edge = int(rng.uniform(0.55, 0.85) * HEIGHT)
    ground = floor * (0.7 + 0.4 * ramp) + 14 * smooth_noise(rng, FIGURE_SHAPE, (12, 5))
    image[edge:] = ground[edge:]
    image = np.clip(image, 0, 255).astype(np.uint8)
    clutter = image.copy()
    for _ in range(rng.integers(2, 8)):
        color = hsv(rng.uniform(0, 360), rng.uniform(0.1, 0.6), rng.uniform(0.2, 0.9))
        center = rng.uniform(0, 1, 2) * (WIDTH, HEIGHT)
        size, kind = rng.uniform(6, 32, 2), rng.integers(3)
        if kind == 0:
            points = ellipse(center, *size)
        else:  # a rectangle or a triangle
            corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)])[: 5 - kind]
            points = center + rotate(corners * size, rng.uniform(-25, 25))
        fill_polygon(clutter, points, color)
    return cv2.addWeighted(image, 0.5, clutter, 0.5, 0)


def place_figure(rng: np.random.Generator, left: float, right: float, tallest: float) -> dict:
    """Draw one figure and its ground truth.

    Args:
        rng (np.random.Generator): Source of randomness.
        left (float): Left end of the figure's part of the image, in pixels.
        right (float): Right end of that part.
        tallest (float): Upper limit of the body height, in pixels.

    Returns:
        dict: ``shapes`` (polygons), ``keypoints`` (17, 3), ``box`` (x0, y0, x1, y1) in
        pixels and ``area``, the number of its pixels inside the image.
    """
    pose, unit = sample_pose(rng), rng.uniform(0.62, 1) * tallest
    # Most figures lie inside the image; the others may be cropped by up to a third.
    beyond = rng.uniform(0, 0.3) * unit if rng.random() < 0.15 else -0.06 * unit
    low, high = pose.min(0) * unit, pose.max(0) * unit
    x_range = (left - beyond - low[0], right + beyond - high[0])
    y_range = (0.1 * unit - low[1], HEIGHT - 1 + beyond - high[1])
    joints = pose * unit + [rng.uniform(*sorted(ends)) for ends in (x_range, y_range)]
    shapes = figure_shapes(joints, unit, sample_look(rng))
    mask = np.zeros(FIGURE_SHAPE, np.uint8)
    for points, _, _ in shapes:
        fill_polygon(mask, points, 255)
    inside = ((joints >= 0) & (joints <= [WIDTH - 1, HEIGHT - 1])).all(1)
    keypoints = np.where(inside[:, None], np.c_[joints.round(2), np.full(17, 2)], 0)
    ys, xs = np.nonzero(mask > 127)
    box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) if len(xs) else (0, 0, 0, 0)
    return {'shapes': shapes, 'keypoints': keypoints, 'box': np.array(box), 'area': len(xs)}


def box_iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two (x0, y0, x1, y1) boxes."""
    overlap = np.prod(np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None))
    return float(overlap / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - overlap))


def sample_figures(rng: np.random.Generator) -> list[dict]:
    """Draw one figure, or in a quarter of the images two that do not overlap."""
    while True:
        if rng.random() < 0.25:
            slots, tallest = [(0, WIDTH / 2), (WIDTH / 2, WIDTH - 1)], 0.75 * HEIGHT
        else:
            slots, tallest = [(0, WIDTH - 1)], 0.95 * HEIGHT
        figures = [place_figure(rng, *slot, tallest) for slot in slots]
        seen = all((f['keypoints'][:, 2] > 0).sum() >= MIN_VISIBLE for f in figures)
        if seen and (len(figures) == 1 or box_iou(*(f['box'] for f in figures)) < MAX_OVERLAP):
            return figures


def draw_figures(rng: np.random.Generator) -> tuple[np.ndarray, list[dict]]:
    """Draw an image of one or two people.

    Args:
        rng (np.random.Generator): Source of randomness.

    Returns:
        tuple: Image, (160, 200, 3) uint8 BGR, and its COCO annotations without ids.
    """
    figures, image, annotations = sample_figures(rng), draw_background(rng), []
    for figure in figures:
        for points, color, outline in figure['shapes']:
            fill_polygon(image, points, color, outline)
        x0, y0, x1, y1 = figure['box'].tolist()
        keypoints = [(x, y, int(seen)) for x, y, seen in figure['keypoints'].tolist()]
        annotations.append(
            {
                'category_id': 1,
                'iscrowd': 0,
                'area': float(figure['area']),
                'bbox': [x0, y0, x1 - x0, y1 - y0],
                'keypoints': [*chain(*keypoints)],
                'num_keypoints': sum(seen > 0 for _, _, seen in keypoints),
            }
        )
    light = rng.uniform(0.8, 1.15) + 0.12 * smooth_noise(rng, FIGURE_SHAPE, (2, 2))
    return expose(image, light, rng.normal(0, rng.uniform(2, 5), image.shape)), annotations
