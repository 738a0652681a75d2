"""Folded models give the results of the models they were made from."""

from __future__ import annotations

import copy
from itertools import permutations

import golden
import pytest
import torch
from mmcv.cnn import ConvModule
from needs import may_need
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmhrformer import HRFormer, fuse_for_inference, load_checkpoint, ops
from mmhrformer.deploy.fuse import FusedBlock, FusedWindowAttention, PointwiseConv, fold_batch_norm
from mmhrformer.models import HRFormerBlock

pytestmark = may_need('mmpose', 'mmseg')

TINY = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
SIZES = [(64, 64), (97, 161), (224, 224)]


def make_backbone(**options) -> HRFormer:
    """A backbone whose normalizations have learned something."""
    model = HRFormer(**{'arch': TINY, **options})
    golden.recipe.fill_module(model)
    return model.eval()


def difference(model: nn.Module, fused: nn.Module, size: tuple[int, int]) -> float:
    image = golden.image((2, 3, *size))
    with torch.no_grad():
        pairs = zip(model(image), fused(image))
        return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


@pytest.mark.once
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize(
    'options',
    [
        dict(),
        dict(window_size=5),
        dict(with_rpe=False),
        dict(pad_mask=True),
        dict(upsample='bilinear', out_indices=(0, 2)),
        dict(arch=dict(TINY, channels=(39, 39, 78, 78), num_heads=(1, 1, 2, 2))),
    ],
    ids=str,
)
def test_backbones_stay_equal(options, size):
    model = make_backbone(**options)
    fused = fuse_for_inference(model)
    assert difference(model, fused, size) < 1e-5
    assert not any(isinstance(module, _BatchNorm) for module in fused.modules())
    attentions = [m for m in fused.modules() if isinstance(m, FusedWindowAttention)]
    blocks = [m for m in model.modules() if isinstance(m, HRFormerBlock)]
    folded = [m for m in fused.modules() if isinstance(m, FusedBlock)]
    kept = options.get('pad_mask')
    assert len(attentions) == len(folded) == (0 if kept else len(blocks))


@pytest.mark.parametrize(
    ('config', 'keys', 'task', 'goldens', 'shape', 'output'),
    [
        (golden.CLS_CONFIGS['tiny'], 'keys_cls_tiny.json', 'cls', 'cls_tiny.npz',
         (2, 3, 224, 224), 'logits'),
        (golden.POSE_CONFIGS['small'], 'keys_pose_small.json', 'pose', 'pose_small.npz',
         (1, 3, 200, 136), 'rpe.200x136.heatmap'),
        (golden.SEG_CONFIGS['small'], 'keys_seg_small_w7.json', 'seg', 'seg_small_w7.npz',
         (1, 3, 128, 160), '128x160.logits'),
    ],
    ids=['cls', 'pose', 'seg'],
)  # fmt: skip
def test_whole_models_give_the_golden_outputs(config, keys, task, goldens, shape, output):
    model = golden.build(config)
    load_checkpoint(model, golden.official_checkpoint(task, keys), strict=True)
    fused = fuse_for_inference(model)
    assert not any(isinstance(module, _BatchNorm) for module in fused.modules())
    with torch.no_grad():
        out = fused(golden.image(shape), None, mode='tensor')
    assert golden.difference(golden.load(goldens), output, out) < 1e-4


def test_the_model_itself_is_left_alone():
    model = make_backbone()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    fused = fuse_for_inference(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in fused.parameters())
    assert not any(module.training for module in fused.modules())


@pytest.mark.filterwarnings('ignore:There is a performance drop')
def test_images_can_be_mapped_over():
    """At a size at which windows are padded, with what the normalization makes zero."""
    fused, x = fuse_for_inference(make_backbone()), golden.image((3, 3, 97, 161))
    outs = torch.func.vmap(lambda image: fused(image[None])[0][0])(x)
    torch.testing.assert_close(outs, fused(x)[0], atol=1e-4, rtol=1e-4)


def test_training_is_refused():
    fused = fuse_for_inference(make_backbone())
    assert fused.eval() is fused
    for module in (fused, fused.stage2, nn.Sequential(fused)):
        with pytest.raises(RuntimeError, match='cannot be trained: train the model it was made'):
            module.train()


def test_scales_near_zero_are_not_divided_by():
    model = make_backbone()
    block = next(module for module in model.modules() if isinstance(module, HRFormerBlock))
    with torch.no_grad():
        block.norm1.weight[0] = 0
    fused = fuse_for_inference(model)
    kept = [
        m for m in fused.modules() if isinstance(m, HRFormerBlock) and m.norm1.weight is not None
    ]
    assert len(kept) == 1
    assert difference(model, fused, (97, 161)) < 1e-5


def make_block(**options) -> HRFormerBlock:
    block = HRFormerBlock(8, 2, window_size=3, **options)
    golden.recipe.fill_module(block)
    return block.eval()


def test_blocks_are_folded_whole():
    """Both normalizations have neither scale nor shift left, nor is there one in the FFN."""
    block, x = make_block(drop_path_rate=0.3, with_cp=True), torch.randn(2, 5, 4, 8)
    folded = fuse_for_inference(block)
    assert type(folded) is FusedBlock
    assert folded.is_intact()
    assert folded.norm1.weight is folded.norm2.weight is None
    torch.testing.assert_close(folded(x), block(x), atol=1e-5, rtol=1e-5)
    assert not hasattr(folded.ffn, 'norm1')


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, out: 2 * out)


@pytest.mark.parametrize('part', ['', 'norm1', 'attn', 'norm2', 'ffn', 'ffn.fc1', 'ffn.norm2'])
def test_blocks_that_are_more_than_that_are_kept(part):
    block, x = make_block(), torch.randn(2, 5, 4, 8)
    hook(block.get_submodule(part))
    folded = fuse_for_inference(block)
    assert type(folded) is HRFormerBlock
    torch.testing.assert_close(folded(x), block(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    'options', [dict(padding=1, padding_mode='reflect'), dict(padding='same')], ids=str
)
def test_convolutions_with_another_padding_are_kept(options):
    block, x = make_block(), torch.randn(2, 5, 4, 8)
    block.ffn.dw3x3 = nn.Conv2d(32, 32, 3, groups=32, **options)
    torch.testing.assert_close(fuse_for_inference(block)(x), block(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        ('dw3x3', dict(kernel_size=3, padding=2, dilation=2, groups=32)),
        ('dw3x3', dict(kernel_size=5, padding=2, groups=32)),
        ('dw3x3', dict(kernel_size=3, padding=1)),
        ('fc1', dict(kernel_size=3, padding=1)),
        ('fc2', dict(kernel_size=1, groups=2)),
    ],
    ids=str,
)
def test_convolutions_of_other_shapes_are_kept(name, options):
    block, x = make_block(), torch.randn(2, 5, 4, 8)
    old = getattr(block.ffn, name)
    setattr(block.ffn, name, nn.Conv2d(old.in_channels, old.out_channels, **options))
    folded = fuse_for_inference(block)
    assert type(folded) is HRFormerBlock
    torch.testing.assert_close(folded(x), block(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('part', ['norm1', 'attn', 'attn.proj', 'norm2', 'ffn', 'ffn.dw3x3'])
def test_what_is_done_to_a_folded_block_is_noticed(part):
    block, folded = make_block(), fuse_for_inference(make_block())
    hook(folded.get_submodule(part))
    assert not folded.is_intact()
    folded = fuse_for_inference(block)
    parent, _, name = part.rpartition('.')
    setattr(folded.get_submodule(parent), name, nn.Identity())
    assert not folded.is_intact()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('grad', [False, True])
def test_every_form_of_the_operators_gives_the_same(grad, dtype):
    model = fuse_for_inference(make_backbone()).to(dtype)
    x = golden.image((2, 3, 64, 96)).to(dtype).requires_grad_(grad)
    out = model(x)[0]
    if grad:
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert gradient.abs().sum() > 0
    for form in ('reference', 'cuda'):
        with ops.use(form):
            torch.testing.assert_close(model(x)[0], out, atol=1e-5, rtol=1e-5)


def test_heads_are_widened_for_the_device_they_are_folded_for():
    arch = dict(TINY, channels=(18, 36, 36, 36), num_heads=(1, 2, 2, 2))
    model = make_backbone(arch=arch)
    for form, head_dim in (('cpu', 18), ('cuda', 24)):
        with ops.use(form):
            folded = fuse_for_inference(model)
        heads = {m.head_dim for m in folded.modules() if isinstance(m, FusedWindowAttention)}
        assert heads == {head_dim}
        assert difference(model, folded, (97, 161)) < 1e-5


def test_pointwise_convolutions_are_linear_layers():
    """All normalizations of the backbone are folded, modified ones elsewhere are not."""
    model = HRFormer(arch='tiny').eval()
    model.layer1[0].conv1.register_forward_hook(lambda *_: None)
    fused = fuse_for_inference(model)
    left = [m for m in fused.modules() if type(m) is nn.Conv2d and m.kernel_size == (1, 1)]
    assert left == [fused.layer1[0].conv1]
    assert any(isinstance(module, PointwiseConv) for module in fused.modules())


@pytest.mark.parametrize('shared', ['convolution', 'normalization'])
def test_what_is_used_in_several_places_is_not_folded(shared):
    torch.manual_seed(0)
    pairs = [[nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)] for _ in range(2)]
    for _, norm in pairs:
        nn.init.uniform_(norm.running_mean)
    place = shared == 'normalization'
    pairs[1][place] = pairs[0][place]
    model = nn.Sequential(*(nn.Sequential(*pair) for pair in pairs)).eval()
    x = torch.rand(2, 4, 3, 5)
    with torch.no_grad():
        torch.testing.assert_close(fold_batch_norm(copy.deepcopy(model))(x), model(x))


@pytest.mark.parametrize('order', permutations(('conv', 'norm', 'act')), ids=' '.join)
def test_modules_of_mmcv_are_folded_if_the_normalization_comes_next(order):
    torch.manual_seed(0)
    module = ConvModule(3, 3, 1, norm_cfg=dict(type='BN'), order=order)
    nn.init.normal_(module.norm.weight)
    nn.init.normal_(module.norm.running_mean)
    x, folded = torch.randn(2, 3, 5, 5), fold_batch_norm(copy.deepcopy(module.eval()))
    torch.testing.assert_close(folded(x), module(x))
    assert isinstance(folded.norm, nn.Identity) == ('conv norm' in ' '.join(order))
