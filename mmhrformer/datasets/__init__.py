"""Data transforms of the official codes that the frameworks lack; importing registers them."""

from .transforms import PlaceRandomly, RandomBrightness, RandomScaleAspect, RandomScaleRotation

__all__ = ['PlaceRandomly', 'RandomBrightness', 'RandomScaleAspect', 'RandomScaleRotation']
