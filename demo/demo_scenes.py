"""Draw landscapes as images with label maps."""

from __future__ import annotations

import cv2
import numpy as np
from demo_drawing import Color, ellipse, expose, fill_polygon, hsv, hull, shade, smooth_noise

SCENE_SIZE = 128  # pixels, height and width
SCENE_CLASSES = ('sky', 'mountain', 'water', 'grass', 'road', 'tree', 'house', 'car')
SCENE_IGNORE = 255  # the border between two classes, as in PASCAL VOC
SKY, MOUNTAIN, WATER, GRASS, ROAD, TREE, HOUSE, CAR = range(len(SCENE_CLASSES))


class Scene:
    """An image and its label map that are painted together.

    Args:
        rng (np.random.Generator): Source of randomness.
    """

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.size = size = SCENE_SIZE
        self.image = np.zeros((size, size, 3), np.float32)
        self.labels = np.zeros((size, size), np.uint8)
        self.horizon = rng.uniform(0.3, 0.46) * size

    def color(self, hue: tuple, saturation: tuple, value: tuple) -> Color:
        """Draw a BGR color from ranges of hue (degrees), saturation and value (0..1)."""
        return hsv(*(self.rng.uniform(*ends) for ends in (hue, saturation, value)))

    def texture(self, color: Color, cells: tuple, amount: float) -> np.ndarray:
        """Return a (size, size, 3) texture: a color whose light varies by ``amount``."""
        shape = self.labels.shape
        light = smooth_noise(self.rng, shape, cells) + 0.6 * smooth_noise(self.rng, shape, (3, 3))
        return (np.array(color) * (1 + amount * light)).astype(np.float32)

    def fill(self, points, paint, label: int) -> None:
        """Paint a polygon with a color or a texture and label its pixels."""
        cover = np.zeros(self.labels.shape, np.uint8)
        fill_polygon(cover, points, 255)
        alpha = cover[..., None].astype(np.float32) / 255
        self.image += alpha * (np.asarray(paint, np.float32) - self.image)
        self.labels[cover > 127] = label

    def box(self, left, top, right, bottom, paint, label: int) -> None:
        """Fill an upright rectangle."""
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
        self.fill(points, paint, label)

    def ridge(self, top: float, bottom: float, rough: float, cells: int) -> np.ndarray:
        """Return the polygon between a wavy line around y = top and y = bottom."""
        wave = smooth_noise(self.rng, (1, self.size), (1, cells))[0, :, 0]
        xs = np.arange(self.size)
        line = np.stack([xs, top + rough * wave], 1)
        return np.concatenate([line, [(self.size, bottom), (-1, bottom)]])


def draw_sky(scene: Scene) -> None:
    """Draw a sky, blue, at sunset or overcast, with clouds and sometimes a sun."""
    rng, size = scene.rng, scene.size
    hue, saturation = [
        ((200, 225), (0.35, 0.65)),
        ((18, 40), (0.3, 0.6)),
        ((210, 240), (0.05, 0.15)),
    ][rng.choice(3, p=(0.6, 0.2, 0.2))]
    top = np.array(scene.color(hue, saturation, (0.75, 1)))
    low = 0.4 * top + 0.6 * np.array(scene.color((30, 60), (0.0, 0.2), (0.85, 1)))
    ramp = np.clip(np.arange(size) / scene.horizon, 0, 1)[:, None, None]
    scene.box(-1, -1, size, size, top + (low - top) * ramp, SKY)
    if rng.random() < 0.5:
        sun = rng.uniform(0, 1, 2) * (size, 0.6 * scene.horizon)
        scene.fill(hull((sun, rng.uniform(5, 8))), scene.color((45, 58), (0.2, 0.6), (1, 1)), SKY)
    for _ in range(rng.integers(0, 4)):
        center = rng.uniform(0, 1, 2) * (size, 0.7 * scene.horizon)
        for _ in range(4):
            puff = center + rng.normal(0, 1, 2) * (8, 2)
            scene.fill(ellipse(puff, *rng.uniform((6, 3), (12, 5))), (248.0, 244.0, 242.0), SKY)


def draw_mountains(scene: Scene) -> None:
    """Draw one or two ridges, gray-blue to brown, the nearer one darker."""
    hue, value = scene.rng.choice([(235, 275), (15, 35)]), scene.rng.uniform(0.45, 0.65)
    for height, depth in ((0.26, 1.0), (0.14, 0.8))[: scene.rng.integers(1, 3)]:
        color = scene.color(hue, (0.15, 0.35), (value * depth, value * depth))
        ridge = scene.ridge(scene.horizon - height * scene.size * 0.6, scene.horizon + 3, 13, 9)
        scene.fill(ridge, scene.texture(color, (12, 20), 0.16), MOUNTAIN)


def draw_grass(scene: Scene) -> None:
    """Draw a meadow from the horizon down, fresh green to dry yellow."""
    color = scene.color((62, 112), (0.4, 0.75), (0.5, 0.85))
    ground = scene.ridge(scene.horizon, scene.size, 2, 4)
    scene.fill(ground, scene.texture(color, (64, 64), 0.16), GRASS)


def draw_water(scene: Scene) -> None:
    """Draw a sea along the horizon or a pond in the foreground, with streaks of light."""
    rng, size = scene.rng, scene.size
    water = scene.texture(scene.color((188, 222), (0.5, 0.85), (0.4, 0.8)), (56, 6), 0.22)
    if rng.random() < 0.6:
        shore = scene.ridge(scene.horizon + rng.uniform(11, 18), scene.horizon, 4, 5)
        scene.fill(shore, water, WATER)
        return
    center = (rng.uniform(0, size), rng.uniform(0.86, 0.97) * size)
    scene.fill(ellipse(center, rng.uniform(32, 52), rng.uniform(11, 17)), water, WATER)


def draw_crossing_road(scene: Scene, asphalt: np.ndarray, line: Color) -> list:
    """Draw a road from left to right with a dashed line and two lanes."""
    rng, size = scene.rng, scene.size
    left, right = rng.uniform(0.66, 0.78) * size + rng.uniform(-6, 6, 2)
    half, ends = rng.uniform(11, 15), np.array([(-1, left), (size, right)])
    scene.fill(np.concatenate([ends - (0, half), ends[::-1] + (0, half)]), asphalt, ROAD)
    for start in np.arange(0, 1, 0.16):
        dash = ends[0] + np.array([[start], [start + 0.08]]) * (ends[1] - ends[0])
        scene.fill(np.concatenate([dash - (0, 0.8), dash[::-1] + (0, 0.8)]), line, ROAD)
    spots = []
    for lane, center in zip((-0.1, 0.75), rng.permutation([0.27, 0.73]), strict=True):
        x = center + rng.uniform(-0.1, 0.1)
        spots.append((x * size, left + x * (right - left) + lane * half, rng.uniform(32, 44)))
    return spots


def draw_receding_road(scene: Scene, asphalt: np.ndarray, line: Color) -> list:
    """Draw a road from the viewer to the horizon."""
    rng, size, top = scene.rng, scene.size, scene.horizon + 2
    far, near = rng.uniform(0.3, 0.7, 2) * size
    far_half, near_half = rng.uniform(4, 8), rng.uniform(34, 48)
    corners = [(far - far_half, top), (far + far_half, top)]
    corners += [(near + near_half, size), (near - near_half, size)]
    scene.fill(corners, asphalt, ROAD)
    scene.fill([(far, top), (near + 2, size), (near - 2, size)], line, ROAD)
    spots = []
    for depth in (rng.uniform(0.4, 0.5), rng.uniform(0.75, 0.85)):
        x = far + depth * (near - far) + rng.choice([-0.45, 0.45]) * depth * near_half
        spots.append((x, top + depth * (size - top), 22 + 20 * depth))
    return spots


def draw_road(scene: Scene) -> list[tuple[float, float, float]]:
    """Draw a road across the scene or into it.

    Returns:
        list: Positions for cars: x, y of the wheels and length in pixels, far to near.
    """
    asphalt = scene.texture(scene.color((0, 360), (0, 0.1), (0.28, 0.55)), (64, 64), 0.1)
    line = scene.color((40, 55), (0, 0.5), (0.85, 1))
    draw = draw_crossing_road if scene.rng.random() < 0.6 else draw_receding_road
    return draw(scene, asphalt, line)


def draw_house(scene: Scene, x: float, base: float, width: float) -> None:
    """Draw a house with gable roof, door and windows; ``x``, ``base`` is its bottom center."""
    rng, half = scene.rng, width / 2
    wall = scene.color((10, 50), (0.1, 0.55), (0.7, 1))
    roof = scene.color((0, 25), (0.45, 0.85), (0.35, 0.7))
    dark = scene.color((200, 230), (0.2, 0.5), (0.2, 0.4))
    eaves = base - width * rng.uniform(0.5, 0.7)
    top = eaves - width * rng.uniform(0.3, 0.45)

    scene.box(x - half, eaves, x + half, base, scene.texture(wall, (32, 10), 0.07), HOUSE)
    gable = [(x - half - 2, eaves), (x - 0.4 * half, top)]
    gable += [(x + 0.4 * half, top), (x + half + 2, eaves)]
    scene.fill(gable, scene.texture(roof, (48, 16), 0.12), HOUSE)
    pane, middle = 0.11 * width, (eaves + base) / 2
    for at in (x - 0.55 * half, x + 0.55 * half):
        scene.box(at - pane, middle - 1.5 * pane, at + pane, middle + 0.5 * pane, dark, HOUSE)
    door = 0.9 * pane
    scene.box(x - door, base - 3.4 * pane, x + door, base, shade(roof, 0.7), HOUSE)


def draw_tree(scene: Scene, x: float, base: float, height: float) -> None:
    """Draw a fir or a round tree; ``x``, ``base`` is the foot of its trunk."""
    rng = scene.rng
    hue = (25, 50) if rng.random() < 0.15 else (100, 150)  # some in autumn
    leaves = scene.texture(scene.color(hue, (0.45, 0.8), (0.2, 0.42)), (42, 42), 0.3)
    bark, half = scene.color((18, 35), (0.35, 0.6), (0.2, 0.4)), 0.07 * height
    scene.box(x - half, base - 0.4 * height, x + half, base, bark, TREE)
    if rng.random() < 0.45:
        for low, width in ((0.2, 0.3), (0.42, 0.24), (0.62, 0.17)):
            foot, tip = base - low * height, base - (low + 0.38) * height
            corners = [(x - width * height, foot), (x, tip), (x + width * height, foot)]
            scene.fill(corners, leaves, TREE)
        return
    for _ in range(5):
        puff = (x, base - 0.68 * height) + rng.normal(0, 0.08, 2) * height
        scene.fill(hull((puff, rng.uniform(0.2, 0.27) * height)), leaves, TREE)


def draw_car(scene: Scene, x: float, base: float, length: float) -> None:
    """Draw a car from the side; ``x``, ``base`` is the point between its wheels."""
    rng = scene.rng
    body = scene.color((0, 360), (0.65, 1), (0.55, 1))
    glass = scene.color((190, 220), (0.15, 0.4), (0.2, 0.85))
    side = rng.choice([-1, 1])

    def place(points):
        return np.array([x, base]) + np.array(points) * (side * length, -length)

    cabin = [(-0.36, 0.24), (-0.25, 0.46), (0.12, 0.46), (0.28, 0.24)]
    window = [(-0.28, 0.26), (-0.21, 0.41), (0.09, 0.41), (0.2, 0.26)]
    chassis = [(-0.5, 0.1), (-0.5, 0.27), (-0.4, 0.3), (0.3, 0.29), (0.48, 0.24), (0.5, 0.1)]
    scene.fill(place(cabin), shade(body, 0.9), CAR)
    scene.fill(place(chassis), scene.texture(body, (24, 24), 0.06), CAR)
    scene.fill(place(window), glass, CAR)
    for wheel in (-0.29, 0.29):
        center = place([(wheel, 0.09)])[0]
        scene.fill(hull((center, 0.105 * length)), (25.0, 25.0, 25.0), CAR)
        scene.fill(hull((center, 0.045 * length)), (190.0, 190.0, 190.0), CAR)


def draw_buildings_and_trees(scene: Scene) -> None:
    """Draw houses and trees on the meadow, far ones first so that near ones cover them."""
    rng, size = scene.rng, scene.size
    columns = rng.permutation(5)[: rng.integers(3, 6)]
    things = []
    for i, column in enumerate(columns):
        x, base = (column + rng.uniform(0.2, 0.8)) * size / 5, scene.horizon + rng.uniform(8, 22)
        house = i == 0 or (i == 1 and rng.random() < 0.5)
        things.append((base, x, draw_house if house else draw_tree))
    for base, x, draw in sorted(things, key=lambda thing: thing[0]):
        draw(scene, x, base, rng.uniform(30, 42) if draw is draw_house else rng.uniform(34, 54))


def void_border(labels: np.ndarray) -> np.ndarray:
    """Set the pixels on both sides of a border between classes to ``SCENE_IGNORE``.

    Args:
        labels (np.ndarray): (H, W) uint8 class ids.

    Returns:
        np.ndarray: A copy with the two-pixel borders ignored.
    """
    kernel = np.ones((3, 3), np.uint8)
    mixed = cv2.dilate(labels, kernel) != cv2.erode(labels, kernel)
    return np.where(mixed, np.uint8(SCENE_IGNORE), labels)


def draw_scene(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw a landscape and its label map.

    Args:
        rng (np.random.Generator): Source of randomness.

    Returns:
        tuple: Image, (128, 128, 3) uint8 BGR, and labels, (128, 128) uint8 indices into
        ``SCENE_CLASSES`` or ``SCENE_IGNORE``.
    """
    scene = Scene(rng)
    draw_sky(scene)
    if rng.random() < 0.8:
        draw_mountains(scene)
    draw_grass(scene)
    if rng.random() < 0.8:
        draw_water(scene)
    spots = draw_road(scene)
    draw_buildings_and_trees(scene)
    for spot in spots[rng.integers(0, 2) :]:
        draw_car(scene, *spot)
    # Time of day: brightness, color of the light, a shadow, camera noise.
    light = rng.uniform(0.65, 1.1) * rng.uniform(0.9, 1.08, 3)
    shadow = 1 + 0.15 * smooth_noise(rng, scene.labels.shape, (3, 3))
    noise = rng.normal(0, rng.uniform(2, 8), scene.image.shape)
    return expose(scene.image * light, shadow, noise), void_border(scene.labels)
