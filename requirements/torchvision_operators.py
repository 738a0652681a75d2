"""Declares two operators of torchvision in an environment where its library cannot be loaded.

Some package indexes have torch for CPUs and torchvision for CUDA. Then torchvision cannot even be
imported, for it describes operators that are not there. To declare them is enough for all that
needs none of them; who calls one gets an error. dev/setup_env.py puts this file into the
environment of the modern stack if it is needed, and nothing else does.
"""

import sys


class Finder:
    """Declares the operators when torchvision is about to be imported."""

    library = None

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        """Find nothing, but notice what is looked for."""
        if name == 'torchvision':
            sys.meta_path.remove(cls)
            import torch

            cls.library = torch.library.Library(name, 'DEF')
            for operator in ('nms', 'qnms'):
                cls.library.define(operator + '(Tensor boxes, Tensor scores, float iou) -> Tensor')


sys.meta_path.insert(0, Finder)
