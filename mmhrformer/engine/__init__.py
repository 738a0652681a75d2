"""What training needs beside the models; importing this registers it."""

from .optim import DecayGroupsConstructor
from .preflight import PreflightChecks
from .schedulers import WarmupCosineLR

__all__ = ['DecayGroupsConstructor', 'PreflightChecks', 'WarmupCosineLR']
