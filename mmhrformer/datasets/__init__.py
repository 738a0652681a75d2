"""Data transforms of the official codes that the frameworks lack; importing registers them."""

from .transforms import (
    PlaceRandomly,
    RandomBoxShift,
    RandomBrightness,
    RandomScaleAspect,
    RandomScaleRotation,
)

__all__ = [
    'PlaceRandomly',
    'RandomBoxShift',
    'RandomBrightness',
    'RandomScaleAspect',
    'RandomScaleRotation',
]
