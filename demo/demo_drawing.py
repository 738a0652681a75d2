"""Colors, noise and anti-aliased shapes for the drawings of ``demo_data.py``."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np

Color = tuple[float, float, float]  # BGR, 0..255, as in cv2


def hsv(hue: float, saturation: float, value: float) -> Color:
    """Convert a color to BGR; hue in degrees, saturation and value clipped to 0..1."""
    saturation, value = np.clip([saturation, value], 0, 1)
    return tuple(255 * c for c in colorsys.hsv_to_rgb(hue / 360, saturation, value)[::-1])


def shade(color: Color, factor: float) -> Color:
    """Make a color darker (``factor`` below 1) or lighter."""
    return tuple(np.clip(np.multiply(color, factor), 0, 255).tolist())


def smooth_noise(rng: np.random.Generator, shape: tuple, cells: tuple) -> np.ndarray:
    """Draw smooth noise of a given scale.

    Args:
        rng (np.random.Generator): Source of randomness.
        shape (tuple): Height, width of the result in pixels.
        cells (tuple): Rows, columns of the grid that is interpolated.

    Returns:
        np.ndarray: (height, width, 1) float32, about -1 to 1.
    """
    grid = rng.uniform(-1, 1, cells).astype(np.float32)
    return cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC)[..., None]


def fill_polygon(canvas: np.ndarray, points: np.ndarray, color, outline: bool = False) -> None:
    """Fill an anti-aliased polygon in place.

    Args:
        canvas (np.ndarray): (H, W) or (H, W, 3) uint8.
        points (np.ndarray): (N, 2) x, y in pixels; pixel centers are integers.
        color (tuple | int): Color of the polygon.
        outline (bool): Whether to draw a thin darker line around it.
    """
    # cv2 takes fractions of a pixel as fixed-point integers: here 1/16.
    fixed = [np.rint(np.asarray(points) * 16).astype(np.int32)]
    cv2.fillPoly(canvas, fixed, color, cv2.LINE_AA, 4)
    if outline:
        cv2.polylines(canvas, fixed, True, shade(color, 0.6), 1, cv2.LINE_AA, 4)


def ellipse(center, radius_x: float, radius_y: float, first=0.0, last=360.0) -> np.ndarray:
    """Return (25, 2) points of an elliptic arc; angles in degrees, 0 = right, 90 = down."""
    angle = np.deg2rad(np.linspace(first, last, 25))
    return np.asarray(center) + np.stack([radius_x * np.cos(angle), radius_y * np.sin(angle)], 1)


def hull(*circles) -> np.ndarray:
    """Return the convex outline around circles.

    Args:
        *circles: Pairs of center (x, y) and radius, in pixels.

    Returns:
        np.ndarray: (N, 2) float32 points; two circles give a limb with round ends.
    """
    points = np.concatenate([ellipse(center, r, r) for center, r in circles])
    return cv2.convexHull(points.astype(np.float32))[:, 0]


def expose(image: np.ndarray, light: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Apply light and camera noise to a drawn image; returns (H, W, 3) uint8."""
    return np.clip(image * light + noise, 0, 255).astype(np.uint8)
