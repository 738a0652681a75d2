"""The registries of mmhrformer: children of mmengine's, with the scope ``mmhrformer``.

Configs always spell out the scope, ``type='mmhrformer.HRFormer'``: mmpose has a class of its own
named ``HRFormer`` and would silently build that one.
"""

from __future__ import annotations

from importlib import import_module

from mmengine import registry
from mmengine.registry import Registry

from .utils.install_hints import explain

# Classes that depend on a framework: name -> (module that defines it, framework, our extra).
# They are imported on demand, so that everything else works without the framework.
FRAMEWORK_CLASSES = {
    'OCRHead': ('mmhrformer.models.ocr_head', 'mmsegmentation', 'seg'),
    'OCRAuxHead': ('mmhrformer.models.ocr_head', 'mmsegmentation', 'seg'),
    'SwinTransformer': ('mmhrformer.models.ablations.swin', 'mmpretrain', 'cls'),
    'PoseVisualizer': ('mmhrformer.engine.pose_visualizer', 'mmpose', 'pose'),
    'SumLogitsTTAModel': ('mmhrformer.models.seg_tta', 'mmsegmentation', 'seg'),
}


def import_framework_class(name: str) -> type:
    """Import a class of :data:`FRAMEWORK_CLASSES`.

    Args:
        name (str): A key of :data:`FRAMEWORK_CLASSES`.

    Returns:
        type: The class.

    Raises:
        ImportError: If the framework is missing or incompatible with the other installed packages.
    """
    module, framework, extra = FRAMEWORK_CLASSES[name]
    try:
        return getattr(import_module(module), name)
    except (ImportError, AssertionError) as err:  # mmseg asserts mmcv's version
        fix = explain(err) or f"pip install 'mmhrformer[{extra}]'"
        raise ImportError(
            f"'mmhrformer.{name}' needs {framework}, which could not be imported ({err}). "
            f'Fix: {fix}'
        ) from err


class FrameworkRegistry(Registry):
    """A registry that imports the classes of :data:`FRAMEWORK_CLASSES` on demand."""

    def get(self, key: str) -> type | None:
        """Get a class by name, see :meth:`mmengine.registry.Registry.get`."""
        name = key.removeprefix(f'{self.scope}.')
        if name in FRAMEWORK_CLASSES:
            return import_framework_class(name)
        return super().get(key)


MODELS = FrameworkRegistry(
    'model', parent=registry.MODELS, scope='mmhrformer', locations=['mmhrformer.models']
)
TRANSFORMS = Registry(
    'transform', parent=registry.TRANSFORMS, scope='mmhrformer', locations=['mmhrformer.datasets']
)
_ENGINE = dict(scope='mmhrformer', locations=['mmhrformer.engine'])
HOOKS = Registry('hook', parent=registry.HOOKS, **_ENGINE)
MODEL_WRAPPERS = Registry('model_wrapper', parent=registry.MODEL_WRAPPERS, **_ENGINE)
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor', parent=registry.OPTIM_WRAPPER_CONSTRUCTORS, **_ENGINE
)
PARAM_SCHEDULERS = Registry('parameter scheduler', parent=registry.PARAM_SCHEDULERS, **_ENGINE)
VISBACKENDS = Registry('vis_backend', parent=registry.VISBACKENDS, **_ENGINE)
VISUALIZERS = FrameworkRegistry('visualizer', parent=registry.VISUALIZERS, **_ENGINE)
