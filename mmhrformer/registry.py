"""The registries of mmhrformer: children of mmengine's, scope ``mmhrformer``.

Configs always write the scope, ``type='mmhrformer.HRFormer'``: mmpose owns a class of the bare
name ``HRFormer`` and would silently build that one.
"""

from __future__ import annotations

from importlib import import_module

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODEL_WRAPPERS as MMENGINE_MODEL_WRAPPERS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import PARAM_SCHEDULERS as MMENGINE_PARAM_SCHEDULERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import VISBACKENDS as MMENGINE_VISBACKENDS
from mmengine.registry import Registry

from .utils.install_hints import explain

# Classes that are built on a framework: name -> (module that defines it, framework, our extra).
# They are imported when somebody asks for them, so that the rest works without the framework.
FRAMEWORK_CLASSES = {
    'OCRHead': ('mmhrformer.models.ocr_head', 'mmsegmentation', 'seg'),
    'OCRAuxHead': ('mmhrformer.models.ocr_head', 'mmsegmentation', 'seg'),
    'SwinTransformer': ('mmhrformer.models.ablations.swin', 'mmpretrain', 'cls'),
    'SumLogitsTTAModel': ('mmhrformer.models.seg_tta', 'mmsegmentation', 'seg'),
}


def import_framework_class(name: str) -> type:
    """Import a class of :data:`FRAMEWORK_CLASSES`.

    Args:
        name (str): A key of :data:`FRAMEWORK_CLASSES`.

    Returns:
        type: The class.

    Raises:
        ImportError: If the framework that the class is built on is missing or does not fit the
            other installed packages.
    """
    module, framework, extra = FRAMEWORK_CLASSES[name]
    try:
        return getattr(import_module(module), name)
    except (ImportError, AssertionError) as err:  # mmseg asserts the version of mmcv
        cure = explain(err) or f"pip install 'mmhrformer[{extra}]'"
        raise ImportError(
            f"'mmhrformer.{name}' needs {framework}, which could not be imported ({err}). "
            f'To mend it: {cure}'
        ) from err


class ModelRegistry(Registry):
    """A registry that imports the classes of :data:`FRAMEWORK_CLASSES` on demand."""

    def get(self, key: str) -> type | None:
        """Get a class by name, see :meth:`mmengine.registry.Registry.get`."""
        name = key.removeprefix(f'{self.scope}.')
        if name in FRAMEWORK_CLASSES:
            return import_framework_class(name)
        return super().get(key)


MODELS = ModelRegistry(
    'model', parent=MMENGINE_MODELS, scope='mmhrformer', locations=['mmhrformer.models']
)
MODEL_WRAPPERS = Registry(
    'model_wrapper',
    parent=MMENGINE_MODEL_WRAPPERS,
    scope='mmhrformer',
    locations=['mmhrformer.engine'],
)
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmhrformer', locations=['mmhrformer.engine'])
PARAM_SCHEDULERS = Registry(
    'parameter scheduler',
    parent=MMENGINE_PARAM_SCHEDULERS,
    scope='mmhrformer',
    locations=['mmhrformer.engine'],
)
TRANSFORMS = Registry(
    'transform',
    parent=MMENGINE_TRANSFORMS,
    scope='mmhrformer',
    locations=['mmhrformer.datasets'],
)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmhrformer',
    locations=['mmhrformer.engine'],
)
VISBACKENDS = Registry(
    'vis_backend',
    parent=MMENGINE_VISBACKENDS,
    scope='mmhrformer',
    locations=['mmhrformer.engine'],
)
