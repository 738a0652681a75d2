"""What training needs beside the models; importing this registers it."""

from .schedulers import WarmupCosineLR

__all__ = ['WarmupCosineLR']
