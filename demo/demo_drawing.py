"""Colours, noise and anti-aliased shapes, for what ``demo_data.py`` draws."""

from __future__ import annotations

import colorsys

import cv2
import numpy as np

Colour = tuple[float, float, float]  # BGR, 0..255, as cv2 wants it


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """Convert a colour to BGR; the hue in degrees, the others 0 to 1 and clipped."""
    saturation, value = np.clip([saturation, value], 0, 1)
    return tuple(255 * c for c in colorsys.hsv_to_rgb(hue / 360, saturation, value)[::-1])


def shade(colour: Colour, factor: float) -> Colour:
    """Make a colour darker (``factor`` below 1) or lighter."""
    return tuple(np.clip(np.multiply(colour, factor), 0, 255).tolist())


def smooth_noise(rng: np.random.Generator, shape: tuple, cells: tuple) -> np.ndarray:
    """Draw noise that is smooth over a given scale.

    Args:
        rng (np.random.Generator): Source of randomness.
        shape (tuple): Height, width of the result in pixels.
        cells (tuple): Rows, columns of the grid that is interpolated.

    Returns:
        np.ndarray: (height, width, 1) float32, about -1 to 1.
    """
    grid = rng.uniform(-1, 1, cells).astype(np.float32)
    return cv2.resize(grid, shape[::-1], interpolation=cv2.INTER_CUBIC)[..., None]


def fill_polygon(canvas: np.ndarray, points: np.ndarray, colour, outline: bool = False) -> None:
    """Fill an anti-aliased polygon in place.

    Args:
        canvas (np.ndarray): (H, W) or (H, W, 3) uint8.
        points (np.ndarray): (N, 2) x, y in pixels; pixel centres are integers.
        colour (tuple | int): Of the polygon.
        outline (bool): Also draw a thin darker line around it.
    """
    # cv2 takes fractions of a pixel as fixed-point integers: here 1/16.
    fixed = [np.rint(np.asarray(points) * 16).astype(np.int32)]
    cv2.fillPoly(canvas, fixed, colour, cv2.LINE_AA, 4)
    if outline:
        cv2.polylines(canvas, fixed, True, shade(colour, 0.6), 1, cv2.LINE_AA, 4)


def ellipse(centre, radius_x: float, radius_y: float, first=0.0, last=360.0) -> np.ndarray:
    """Return (25, 2) points of an elliptic arc; angles in degrees, 0 = right, 90 = down."""
    angle = np.deg2rad(np.linspace(first, last, 25))
    return np.asarray(centre) + np.stack([radius_x * np.cos(angle), radius_y * np.sin(angle)], 1)


def hull(*circles) -> np.ndarray:
    """Return the convex outline around circles.

    Args:
        circles: Pairs of centre (x, y) and radius, in pixels.

    Returns:
        np.ndarray: (N, 2) float32 points; two circles give a limb with round ends.
    """
    points = np.concatenate([ellipse(centre, r, r) for centre, r in circles])
    return cv2.convexHull(points.astype(np.float32))[:, 0]


def expose(image: np.ndarray, light: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Apply light and camera noise to a drawn image; returns (H, W, 3) uint8."""
    return np.clip(image * light + noise, 0, 255).astype(np.uint8)
