"""Models for ``torch.hub.load``, from a clone (``source='local'``) or from GitHub."""

from mmhrformer import HRFormer as _HRFormer
from mmhrformer import get_model  # noqa: F401 - any model of the zoo, by its name
from mmhrformer import load_checkpoint as _load_checkpoint

dependencies = ['torch', 'numpy', 'mmengine', 'mmcv', 'filelock']


def hrformer_tiny(pretrained=False, **kwargs):
    """HRFormer-T, the backbone; with weights of ImageNet if ``pretrained``."""
    return _backbone('tiny', pretrained, kwargs)


def hrformer_small(pretrained=False, **kwargs):
    """HRFormer-S, likewise."""
    return _backbone('small', pretrained, kwargs)


def hrformer_base(pretrained=False, **kwargs):
    """HRFormer-B, likewise."""
    return _backbone('base', pretrained, kwargs)


def _backbone(arch, pretrained, kwargs):
    model = _HRFormer(arch=arch, **kwargs)
    if pretrained:
        _load_checkpoint(model, f'hrformer-{arch}_8xb128_in1k')
    return model
