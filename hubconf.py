"""Entry points for ``torch.hub.load``, from a clone (``source='local'``) or from GitHub."""

from mmhrformer import HRFormer as _HRFormer
from mmhrformer import get_model  # noqa: F401 - any model of the zoo, by name
from mmhrformer import load_checkpoint as _load_checkpoint

dependencies = ['torch', 'numpy', 'mmengine', 'mmcv', 'filelock']


def hrformer_tiny(pretrained=False, **kwargs):
    """The backbone HRFormer-T; ``pretrained``: True for ImageNet weights, or a checkpoint."""
    return _backbone('tiny', pretrained, kwargs)


def hrformer_small(pretrained=False, **kwargs):
    """The backbone HRFormer-S; ``pretrained``: True for ImageNet weights, or a checkpoint."""
    return _backbone('small', pretrained, kwargs)


def hrformer_base(pretrained=False, **kwargs):
    """The backbone HRFormer-B; ``pretrained``: True for ImageNet weights, or a checkpoint."""
    return _backbone('base', pretrained, kwargs)


def _backbone(arch, pretrained, kwargs):
    model = _HRFormer(arch=arch, **kwargs)
    if pretrained:
        zoo = f'hrformer-{arch}_8xb128_in1k'
        _load_checkpoint(model, zoo if pretrained is True else pretrained)
    return model
