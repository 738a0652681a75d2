"""Entry points for ``torch.hub.load``, from a clone (``source='local'``) or from GitHub."""

from mmhrformer import HRFormer as _HRFormer
from mmhrformer import get_model  # noqa: F401 - any model of the zoo, by name
from mmhrformer import load_checkpoint as _load_checkpoint

dependencies = ['torch', 'numpy', 'mmengine', 'mmcv', 'filelock']


def hrformer_tiny(pretrained=False, **kwargs):
    """The backbone HRFormer-T; with ImageNet weights if ``pretrained``."""
    return _backbone('tiny', pretrained, kwargs)


def hrformer_small(pretrained=False, **kwargs):
    """The backbone HRFormer-S; with ImageNet weights if ``pretrained``."""
    return _backbone('small', pretrained, kwargs)


def hrformer_base(pretrained=False, **kwargs):
    """The backbone HRFormer-B; with ImageNet weights if ``pretrained``."""
    return _backbone('base', pretrained, kwargs)


def _backbone(arch, pretrained, kwargs):
    model = _HRFormer(arch=arch, **kwargs)
    if pretrained:
        _load_checkpoint(model, f'hrformer-{arch}_8xb128_in1k')
    return model
