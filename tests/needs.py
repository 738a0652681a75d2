"""Requirements of tests: frameworks that an environment may lack, such as that of test-modern."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable

import pytest

FRAMEWORKS = ('mmpretrain', 'mmpose', 'mmseg', 'mmdet')
# Import name -> what errors call the package.
ABSENT = {
    name: name.replace('mmseg', 'mmsegmentation')
    for name in FRAMEWORKS
    if importlib.util.find_spec(name) is None
}


class Made(dict):
    """Values that are made when they are first asked for: not every framework is everywhere."""

    def __init__(self, make: Callable):
        self.make = make

    def __missing__(self, task: str):
        self[task] = self.make(task)
        return self[task]


def needs(*names: str) -> pytest.MarkDecorator:
    """Mark a test that can only be run beside frameworks."""
    absent = [name for name in names if name in ABSENT]
    return pytest.mark.skipif(bool(absent), reason=f'needs {" and ".join(absent)}')


def may_need(*names: str) -> pytest.MarkDecorator:
    """Mark a module of which some tests need frameworks: errors that say so skip them."""
    return pytest.mark.may_need(*names)


def needed_by(err: BaseException | None, declared: set[str], ours: set[str]) -> str:
    """The missing framework behind an error; empty if there is none.

    Args:
        err (BaseException, optional): The error; those that it comes from are looked at, too.
        declared (set[str]): Import names of the frameworks that may be needed.
        ours (set[str]): Registered names that belong to no framework.

    Returns:
        str: A framework that is not installed, or a registered name that only such ones can have.
    """
    absent = {name: package for name, package in ABSENT.items() if name in declared}
    while err is not None and absent:
        asked = re.match(r'(\w+) is not installed, please install', str(err))
        name = asked[1] if asked else str(getattr(err, 'name', None)).split('.')[0]
        if isinstance(err, ModuleNotFoundError) and name in (*absent, *absent.values()):
            return name
        unknown = re.match(r"'(\w+) is not in the mmengine::", str(err))
        if isinstance(err, KeyError) and unknown and unknown[1] not in ours:
            return f'the framework of {unknown[1]}'
        err = err.__cause__ or err.__context__
    return ''
