"""User mistakes: each is an error that names argument, value and remedy.

``BAD`` lists the mistakes, ``GOOD`` what looks like one and has to work.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import places
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from needs import may_need
from torch import Tensor, nn

import mmhrformer
from mmhrformer import (
    MODELS,
    HRFormer,
    HRFormerBlock,
    HRFormerFusion,
    OHEMCrossEntropyLoss,
    WeightedCrossEntropyLoss,
    get_model,
    load_checkpoint,
)
from mmhrformer.datasets import transforms
from mmhrformer.engine.config_check import ConfigCheckVisBackend

pytestmark = may_need('mmpose', 'mmseg')

MICRO = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)
OURS = 'hrformer-tiny_8xb128_in1k'
CONFIG = "default_scope = 'mmengine'\nmodel = dict(type='mmhrformer.HRFormer', arch={})\n"


class Bad(NamedTuple):
    """A mistake: what does it, given a folder, and what has to be said about it."""

    name: str
    call: Callable[[Path], object]
    error: type[BaseException]
    words: list[str]


class Good(NamedTuple):
    """A valid call, which returns tensors and their shapes."""

    name: str
    call: Callable[[Path], object]
    shapes: list[tuple[int, ...]]


# Configs


def micro(**options) -> HRFormer:
    return HRFormer(**{'arch': MICRO, **options})


def option(words: str, **options) -> Bad:
    """A mistake in an argument of the backbone; ``words`` are parted by ``|``."""
    [(name, value)] = options.items()
    return Bad(
        f'{name}={value!r}', lambda _: micro(**options), ValueError, [name, *words.split('|')]
    )


def field(words: str, **fields) -> Bad:
    """A mistake in a field of an architecture."""
    [(name, value)] = fields.items()
    words = [f'arch[{name!r}]', *words.split('|')]
    return Bad(f'{name}={value!r}', lambda _: micro(arch={**MICRO, **fields}), ValueError, words)


ATTENTION = 'mmhrformer.LocalWindowSelfAttention'
ONE_OR_FOUR = 'expected a positive integer|4 streams'
CONFIGS = [
    option("'smal'|choose one of|'tiny', 'small', 'base'", arch='smal'),
    option("3|choose one of|'small'", arch=3),
    *(
        option("'no'|expected True or False", **{name: 'no'})
        for name in ('with_rpe', 'pad_mask', 'norm_eval', 'with_cp')
    ),
    option("None|choose one of|'small'", arch=None),
    option("unknown fields ['depth']|'num_blocks'", arch={**MICRO, 'depth': 2}),
    option(
        "missing fields ['num_heads']", arch=dict(channels=(8, 16, 24, 32), num_modules=[1] * 3)
    ),
    field('(8, 16, 24)|expected 4 positive integers', channels=(8, 16, 24)),
    field("'abcd'|expected 4 positive integers", channels='abcd'),
    field('(8.0, 16, 24, 32)|expected 4 positive integers', channels=(8.0, 16, 24, 32)),
    field("(8, 16, 24, 'x')|expected 4 positive integers", channels=(8, 16, 24, 'x')),
    field('(8, 16, 24, -32)|expected 4 positive integers', channels=(8, 16, 24, -32)),
    field('(1, 2, 5, 4)|24 channels cannot be split into 5 heads', num_heads=(1, 2, 5, 4)),
    field('None|expected 4 positive integers', num_heads=None),
    field('(1, 2, 2, 4, 4)|expected 4 positive integers', num_heads=(1, 2, 2, 4, 4)),
    field('(1, 0, 1)|expected 3 positive integers', num_modules=(1, 0, 1)),
    field('3|expected 3 positive integers', num_modules=3),
    field('(1, 1, 1, 1)|expected 3 positive integers', num_modules=(1, 1, 1, 1)),
    field('0|expected a positive integer', num_blocks=0),
    field('1.5|expected a positive integer', num_blocks=1.5),
    field("'2'|expected a positive integer", num_blocks='2'),
    field('-1|expected a positive number', mlp_ratio=-1),
    field('0.01|expected a positive number|such as 4', mlp_ratio=0.01),
    field('inf|expected a positive number', mlp_ratio=float('inf')),
    field("'4'|expected a positive number", mlp_ratio='4'),
    option(f'(7, 7, 7)|{ONE_OR_FOUR}', window_size=(7, 7, 7)),
    option(f'0|{ONE_OR_FOUR}', window_size=0),
    option(f'(7, 7, 0, 7)|{ONE_OR_FOUR}', window_size=(7, 7, 0, 7)),
    option(f"[7, 7, 7, '7']|{ONE_OR_FOUR}", window_size=[7, 7, 7, '7']),
    option(f'7.5|{ONE_OR_FOUR}', window_size=7.5),
    option(f"'7777'|{ONE_OR_FOUR}", window_size='7777'),
    option(f'None|{ONE_OR_FOUR}', window_size=None),
    option('-0.1|expected a number in [0, 1)', drop_path_rate=-0.1),
    option('1.0|expected a number in [0, 1)', drop_path_rate=1.0),
    option('nan|expected a number in [0, 1)', drop_path_rate=float('nan')),
    option("'0.1'|expected a number in [0, 1)", drop_path_rate='0.1'),
    option('(4,)|expected distinct streams of (0, 1, 2, 3)', out_indices=(4,)),
    option('(-5,)|expected distinct streams of (0, 1, 2, 3)', out_indices=(-5,)),
    option('(0, 0)|expected distinct streams of (0, 1, 2, 3)', out_indices=(0, 0)),
    option('()|expected distinct streams of (0, 1, 2, 3)', out_indices=()),
    option('(1.0,)|expected distinct streams of (0, 1, 2, 3)', out_indices=(1.0,)),
    option('4|expected distinct streams of (0, 1, 2, 3)', out_indices=4),
    option("'0'|expected distinct streams of (0, 1, 2, 3)", out_indices='0'),
    option('None|expected distinct streams of (0, 1, 2, 3)', out_indices=None),
    option('5|expected an integer from -1 to 4', frozen_stages=5),
    option('-2|expected an integer from -1 to 4', frozen_stages=-2),
    option("'1'|expected an integer from -1 to 4", frozen_stages='1'),
    option('1.5|expected an integer from -1 to 4', frozen_stages=1.5),
    option('0|expected a positive integer', in_channels=0),
    option("'3'|expected a positive integer", in_channels='3'),
    option("'cubic'|expected 'nearest' or 'bilinear'", upsample='cubic'),
    option("None|dict(type='BN')", norm_cfg=None),
    option("{'typ': 'BN'}|dict(type='BN')", norm_cfg=dict(typ='BN')),
    option('(B, 8, H, W)|mmpretrain.LN2d|expected input with shape', norm_cfg=dict(type='LN')),
    option(
        "'num_groups': 5|(B, 8, H, W)|divides all channels, [8, 16, 24, 32, 64, 256]",
        norm_cfg=dict(type='GN', num_groups=5),
    ),
    option("{'type': 'GN'}|an option is missing, such as num_groups", norm_cfg=dict(type='GN')),
    option("'BatchNorm'|dict(type='BN')", norm_cfg=dict(type='BatchNorm')),
    option("'epsilon'|dict(type='BN')", norm_cfg=dict(type='BN', epsilon=1e-3)),
    option("'BN'|dict(type='BN')", norm_cfg='BN'),
    option("None|dict(type='mmhrformer.NAME'", attn_cfg=None),
    option(
        'window_size|remove it and set the argument', attn_cfg=dict(type=ATTENTION, window_size=3)
    ),
    option("{'hidden': 3}|dict(type='mmhrformer.NAME'", ffn_cfg=dict(hidden=3)),
    Bad(
        'attention that is not registered',
        lambda _: micro(attn_cfg=dict(type='mmhrformer.Attn')),
        KeyError,
        ['mmhrformer.Attn', 'not in the mmhrformer::model registry', 'check'],
    ),
    Bad(
        'backbone that is not registered',
        lambda _: MODELS.build(dict(type='mmhrformer.HRFromer')),
        KeyError,
        ['mmhrformer.HRFromer', 'check'],
    ),
    Bad(
        'argument that does not exist',
        lambda _: micro(windows=7),
        TypeError,
        ["unexpected keyword argument 'windows'"],
    ),
    Bad(
        'heads of a block',
        lambda _: HRFormerBlock(8, 3),
        ValueError,
        ['num_heads=3', 'embed_dims=8', 'choose'],
    ),
    Bad(
        'drop path rate of a block',
        lambda _: HRFormerBlock(8, 2, drop_path_rate=1.5),
        ValueError,
        ['drop_path_rate=1.5', 'expected a number in [0, 1)'],
    ),
    Bad(
        'no hidden channels in a block',
        lambda _: HRFormerBlock(8, 2, mlp_ratio=0),
        ValueError,
        ['mlp_ratio=0', 'embed_dims=8', 'use a larger number'],
    ),
]


# Neck, head and losses


@cache
def backbone() -> HRFormer:
    torch.manual_seed(0)
    return micro().eval()


def streams() -> tuple[Tensor, ...]:
    return tuple(torch.rand(1, c, 16 // 2**i, 16 // 2**i) for i, c in enumerate(MICRO['channels']))


def neck(in_channels=(8, 16, 24, 32), mid_channels=(4, 4, 4, 4), out_channels=16) -> HRFormerFusion:
    return HRFormerFusion(in_channels, mid_channels, out_channels).eval()


def head(name: str = 'OCRHead', **options) -> nn.Module:
    """A head on all four streams."""
    common = dict(in_index=(0, 1, 2, 3), input_transform='resize_concat', channels=16)
    common.update(in_channels=(8, 16, 24, 32), num_classes=5, **options)
    return getattr(mmhrformer, name)(**common).eval()


def head_with(in_channels: tuple[int, ...], name: str) -> nn.Module:
    made = head(name)
    made.in_channels = sum(in_channels)
    return made


def head_forward(made: nn.Module, xs: tuple[Tensor, ...]) -> Tensor:
    previous = [] if type(made).__name__ == 'OCRAuxHead' else [torch.rand(1, 5, 16, 16)]
    return made(xs, *previous)


def loss(labels, kind: type = WeightedCrossEntropyLoss, dtype=torch.long, **options) -> Tensor:
    """The loss of three classes on an image of one row."""
    label = torch.tensor([[labels]], dtype=dtype)
    return kind(**options)(torch.zeros(1, 3, 1, 4), label)


HEADS = [
    Bad(
        'neck for other channels',
        lambda _: neck((8, 16, 24, 48))(streams()),
        ValueError,
        ['(8, 16, 24, 32)', 'in_channels is (8, 16, 24, 48)', "channels of the backbone's arch"],
    ),
    Bad(
        'neck with the streams in the other order',
        lambda _: neck()(streams()[::-1]),
        ValueError,
        ['(32, 24, 16, 8)', 'in_channels is (8, 16, 24, 32)', 'set in_channels'],
    ),
    Bad(
        'neck with three streams',
        lambda _: neck()(streams()[:3]),
        ValueError,
        ['got 3 streams', 'expects 4', 'out_indices'],
    ),
    Bad('neck for one number', lambda _: neck(8), ValueError, ['in_channels=8', 'one per stream']),
    Bad(
        'neck with no channels',
        lambda _: neck((8, 16, 24, 0)),
        ValueError,
        ['in_channels=(8, 16, 24, 0)', 'expected positive integers'],
    ),
    Bad('neck with no output', lambda _: neck(out_channels=0), ValueError, ['out_channels=0']),
    Bad(
        'neck with lists of different lengths',
        lambda _: neck(mid_channels=(4, 4)),
        ValueError,
        ['in_channels=(8, 16, 24, 32)', 'mid_channels=(4, 4)', 'must have the same length'],
    ),
    *(
        Bad(
            f'{name} for other channels',
            lambda _, name=name: head_forward(head_with((8, 16, 24, 48), name), streams()),
            ValueError,
            [name, '[8, 16, 24, 32]', 'in_channels is 96', 'set in_channels'],
        )
        for name in ('OCRHead', 'OCRAuxHead')
    ),
    Bad(
        'head for a stream that is not there',
        lambda _: head_forward(head(), streams()[:2]),
        ValueError,
        ['OCRHead got 2 streams', 'in_index is (0, 1, 2, 3)', 'out_indices'],
    ),
    Bad(
        'head without attention channels',
        lambda _: head(ocr_channels=0),
        ValueError,
        ['ocr_channels=0', 'expected a positive integer'],
    ),
    Bad(
        'head with a negative dropout',
        lambda _: head(dropout_ratio=-0.5),
        ValueError,
        ['dropout_ratio=-0.5', 'expected a number in [0, 1)'],
    ),
    *(
        Bad(
            f'{kind.__name__}: label {label}',
            lambda _, kind=kind, label=label: loss([0, 255, label, 1], kind),
            ValueError,
            [kind.__name__, f'[{label}]', '0 to 2', 'num_classes=3', 'ignore_index=255', 'correct'],
        )
        for kind in (WeightedCrossEntropyLoss, OHEMCrossEntropyLoss)
        for label in (3, -1)
    ),
    Bad(
        'labels of another size',
        lambda _: loss([0, 1]),
        ValueError,
        ['(1, 1, 2)', '(1, 3, 1, 4)', 'expected class indices of shape (1, 1, 4)'],
    ),
    Bad(
        'labels of another type',
        lambda _: loss([0, 1, 2, 0], dtype=torch.uint8),
        ValueError,
        ['torch.uint8', 'torch.int64'],
    ),
    Bad(
        'class weights of another number',
        lambda _: loss([0, 1, 2, 0], class_weight=[1.0, 2.0]),
        ValueError,
        ['class_weight has 2 numbers', '3 classes'],
    ),
    Bad(
        'class weights that are a name',
        lambda _: loss([0, 1, 2, 0], class_weight='cityscapes'),
        ValueError,
        ["class_weight='cityscapes'", 'per class'],
    ),
    Bad(
        'negative class weight',
        lambda _: loss([0, 1, 2, 0], class_weight=[1, 1, -1]),
        ValueError,
        ['class_weight=[1, 1, -1]', 'non-negative'],
    ),
    Bad(
        'negative loss weight',
        lambda _: loss([0, 1, 2, 0], loss_weight=-1),
        ValueError,
        ['loss_weight=-1', 'non-negative'],
    ),
    Bad(
        'threshold of OHEM',
        lambda _: OHEMCrossEntropyLoss(thresh=70),
        ValueError,
        ['thresh=70', 'probability in (0, 1]'],
    ),
]


# Tensors


def image(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape or (1, 3, 64, 64), dtype=dtype)


def tensor(name: str, make: Callable[[], object], error: type, *words: str) -> Bad:
    return Bad(name, lambda _: backbone()(make()), error, ['HRFormer got', *words])


TO_FLOAT = ('its weights are torch.float32', 'normalize', '.to(torch.float32)')
TENSORS = [
    tensor('3-D', lambda: image(3, 64, 64), ValueError, '(3, 64, 64)', '(B, 3, H, W)'),
    tensor('5-D', lambda: image(1, 1, 3, 64, 64), ValueError, '(1, 1, 3, 64, 64)', '(B, 3, H, W)'),
    tensor('gray', lambda: image(1, 1, 64, 64), ValueError, '(1, 1, 64, 64)', 'set in_channels'),
    tensor('last', lambda: image(1, 64, 64, 3), ValueError, '(1, 64, 64, 3)', '(B, 3, H, W)'),
    tensor('1x1', lambda: image(1, 3, 1, 1), ValueError, '1x1', 'resize or pad', '32x32'),
    tensor('31x64', lambda: image(1, 3, 31, 64), ValueError, '31x64', 'resize or pad', '32x32'),
    tensor('64x16', lambda: image(1, 3, 64, 16), ValueError, '64x16', 'resize or pad', '32x32'),
    tensor('0x0', lambda: image(1, 3, 0, 0), ValueError, '0x0', 'resize or pad', '32x32'),
    *(
        tensor(str(dtype), lambda dtype=dtype: image(dtype=dtype), TypeError, str(dtype), *TO_FLOAT)
        for dtype in (torch.float64, torch.float16, torch.int64, torch.uint8, torch.complex64)
    ),
    tensor('numpy', lambda: image().numpy(), TypeError, 'ndarray', 'expected a tensor'),
    tensor('list', lambda: [image()], TypeError, 'list', 'expected a tensor'),
    # torch's own words: how much was wanted. More than a process can address, so that no machine
    # tries to find the memory.
    Bad(
        'huge',
        lambda _: backbone()(torch.zeros(1).expand(1, 3, 2**24, 2**24)),
        RuntimeError,
        ['you tried to allocate'],
    ),
]


# Checkpoints


class Classifier(nn.Module):
    """A minimal whole model for load_checkpoint: a backbone and a classification head."""

    def __init__(self, classes: int = 10, **options) -> None:
        super().__init__()
        self.backbone = micro(**options)
        self.head = nn.Module()
        self.head.fc = nn.Linear(32, classes)


class Code:
    """A malicious object: unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def weights(**options) -> dict[str, Tensor]:
    return Classifier(**options).state_dict()


def spoil(key: str, value: float) -> dict[str, Tensor]:
    tensors = weights()
    tensors[key].view(-1)[-1] = value
    return tensors


def half(tensors: dict) -> dict:
    return {key: tensors[key] for key in list(tensors)[: len(tensors) // 2]}


def truncated(folder: Path) -> bytes:
    torch.save(weights(), folder / 'whole.pth')
    content = (folder / 'whole.pth').read_bytes()
    return content[: len(content) // 2]


def checkpoint(name: str, content: Callable[[Path], object], error: type, *words: str, **options):
    """A mistake in a file of weights; bytes are written as they are."""

    def call(folder: Path) -> object:
        file, made = folder / 'a.pth', content(folder)
        file.write_bytes(made) if isinstance(made, bytes) else torch.save(made, file)
        return load_checkpoint(Classifier(), file, strict=True, **options)

    return Bad(name, call, error, list(words))


PAGE = b'<!DOCTYPE html><html>Sign in</html>'
WIDE = {**MICRO, 'channels': (16, 32, 48, 64)}
CHECKPOINTS = [
    checkpoint('empty file', lambda _: b'', ValueError, 'a.pth', 'empty', 'download it again'),
    checkpoint('text', lambda _: b'notes', ValueError, 'a.pth', 'text', 'check the path'),
    checkpoint('web page', lambda _: PAGE, ValueError, 'a.pth', 'web page', 'download the file'),
    checkpoint('truncated', truncated, ValueError, 'a.pth', 'truncated', 'download it again'),
    checkpoint(
        'code for a weight',
        lambda folder: {**weights(), 'backbone.conv1.weight': Code(folder / 'made')},
        ValueError,
        *(
            'a.pth',
            "'backbone.conv1.weight' is stored as posix.mkdir",
            'convert such weights to ordinary tensors',
        ),
    ),
    checkpoint(
        'NumPy weights',
        lambda _: dict(state_dict={key: tensor.numpy() for key, tensor in weights().items()}),
        ValueError,
        *(
            'a.pth',
            "'backbone.conv1.weight' is stored as numpy.",
            'convert such weights to ordinary tensors',
        ),
    ),
    checkpoint(
        'quantized weights',
        lambda _: {key: tensor.to(torch.int8) for key, tensor in weights().items()},
        RuntimeError,
        *('a.pth', 'torch.int8', 'quantized', 'before quantization'),
    ),
    checkpoint(
        'a whole model',
        lambda _: Classifier(),
        ValueError,
        *('a.pth', 'test_bad_input.Classifier', 'trust its source', '.state_dict(), NEW_FILE)'),
    ),
    checkpoint(
        'other arch',
        lambda _: weights(arch=WIDE),
        RuntimeError,
        *('backbone.stage2.0.branches.0.0.attn.qkv.weight', '(48, 16)', '(24, 8)', 'the arch'),
    ),
    checkpoint(
        'other heads',
        lambda _: weights(arch={**MICRO, 'num_heads': (2, 2, 2, 4)}),
        RuntimeError,
        *('relative_position_bias_table', '(169, 2)', '(169, 1)', 'the arch'),
    ),
    checkpoint(
        'window that is not square',
        lambda _: {
            key: tensor[:-1] if key.endswith('bias_table') else tensor
            for key, tensor in weights().items()
        },
        ValueError,
        *('168 rows', 'does not match any square window'),
    ),
    checkpoint(
        'other classes',
        lambda _: weights(classes=7),
        RuntimeError,
        *('head.fc.weight', '(7, 32)', '(10, 32)', 'num_classes', 'new_classes=True'),
    ),
    checkpoint(
        'half the keys',
        lambda _: half(weights()),
        RuntimeError,
        *('does not match the model', 'missing in the checkpoint: head.fc.weight'),
    ),
    checkpoint(
        'a key too many',
        lambda _: {**weights(), 'head.fc2.weight': torch.ones(1)},
        RuntimeError,
        *('does not match the model', 'not used by the model: head.fc2.weight'),
    ),
    checkpoint(
        'NaN',
        lambda _: spoil('backbone.stage2.0.branches.0.0.ffn.fc1.bias', float('nan')),
        ValueError,
        *('NaN or infinite', 'ffn.fc1.bias', 'Use an earlier checkpoint'),
    ),
    checkpoint(
        'infinity',
        lambda _: {k: v.half() for k, v in spoil('head.fc.bias', float('inf')).items()},
        ValueError,
        *('NaN or infinite', 'head.fc.bias', 'Use an earlier checkpoint'),
    ),
    checkpoint(
        'nested in an unknown key',
        lambda _: dict(net=weights(), epoch=3),
        ValueError,
        *("['net', 'epoch']", "'state_dict' or 'model'", "key='net'", '--key net'),
    ),
    checkpoint(
        'nested where nothing is known of it',
        lambda _: dict(net=dict(tensors={'fc.weight': torch.ones(1)}), epoch=3),
        ValueError,
        *("['net', 'epoch']", "'state_dict' or 'model'", "['net']['tensors'], NEW_FILE)"),
    ),
    checkpoint(
        'two models',
        lambda _: {f'{who}.{k}': v for who in ('student', 'teacher') for k, v in weights().items()},
        ValueError,
        *('a.pth', "['student.', 'teacher.']", "key='student'", '--key student'),
    ),
    checkpoint(
        'another network',
        lambda _: nn.Conv2d(1, 1, 1).state_dict(),
        ValueError,
        *('not an HRFormer checkpoint', "['weight', 'bias']", 'Check that it is the intended file'),
    ),
    checkpoint('a list', lambda _: [torch.ones(1)], ValueError, 'a.pth', 'list', 'tensors by name'),
    Bad(
        'no file',
        lambda _: load_checkpoint(Classifier(), 'no/such.pth'),
        FileNotFoundError,
        ['no/such.pth', 'list_models()'],
    ),
    Bad(
        'file that is not what its name says',
        lambda folder: load_checkpoint(Classifier(), written(folder / 'a-0123abcd.pth', 'x')),
        RuntimeError,
        ['a-0123abcd.pth', 'SHA-256', 'download it again'],
    ),
]


# Data


def written(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def sample(height: int = 20, width: int = 30, channels: int = 3) -> dict:
    labels = np.zeros((height, width), np.uint8)
    image = np.zeros((height, width, channels), np.uint8)
    return dict(img=image, gt_seg_map=labels, seg_fields=['gt_seg_map'], img_path='a/b.jpg')


def boxes(*sizes: float) -> dict:
    return dict(bbox_scale=np.array([sizes], np.float32), img_path='a/b.jpg')


def read_image(path: Path, content: bytes) -> object:
    path.write_bytes(content)
    return LoadImageFromFile()(dict(img_path=str(path)))


PLACE = transforms.PlaceRandomly((32, 32), (0, 0, 0))
SCALE = transforms.RandomScaleAspect()
BRIGHT = transforms.RandomBrightness()
TURN = transforms.RandomScaleRotation()


def transform(name: str, call: Callable[[], object], *words: str) -> Bad:
    return Bad(name, lambda _: call(), ValueError, list(words))


NO_PIXELS = ('a/b.jpg', 'expected a non-empty array', 'remove damaged files')
DATA = [
    # The loaders are the frameworks': a missing or broken file is at least named.
    Bad(
        'missing image',
        lambda folder: LoadImageFromFile()(dict(img_path=str(folder / 'no.jpg'))),
        FileNotFoundError,
        ['no.jpg'],
    ),
    Bad(
        'broken jpeg',
        lambda folder: read_image(folder / 'broken.jpg', b'\xff\xd8\xff\xe0junk'),
        AssertionError,
        ['failed to load image', 'broken.jpg'],
    ),
    *(
        transform(
            f'{type(t).__name__}: {what}',
            lambda t=t, given=given: t({**sample(), **given}),
            *(type(t).__name__, said, *NO_PIXELS),
        )
        for t in (PLACE, SCALE, BRIGHT)
        for what, given, said in (
            ('no pixels', sample(0, 30), '(0, 30, 3)'),
            ('not decoded', dict(img=None), 'None'),
        )
    ),
    *(
        transform(
            f'{type(t).__name__}: label map of another size',
            lambda t=t: t({**sample(), 'gt_seg_map': np.zeros((20, 31), np.uint8)}),
            *(type(t).__name__, 'gt_seg_map', '(20, 31)', '(20, 30)', 'a/b.jpg', 'as large as'),
        )
        for t in (PLACE, SCALE)
    ),
    transform(
        'color around an image of another number of channels',
        lambda: PLACE(sample(channels=1)),
        *('pad_val=(0, 0, 0)', '1 channels', 'one number per channel'),
    ),
    transform(
        'brightness of floats',
        lambda: BRIGHT({**sample(), 'img': np.zeros((2, 2, 3), np.float32), 'seg_fields': []}),
        *('RandomBrightness', 'float32', 'uint8', 'before'),
    ),
    *(
        transform(
            f'box of {size}',
            lambda size=size: TURN(boxes(100, size)),
            *('RandomScaleRotation', 'bbox_scale', str(size), 'a/b.jpg', 'Correct or remove'),
        )
        for size in (0.0, -5.0, float('nan'))
    ),
    *(
        transform(
            f'{kind.__name__}({options})',
            lambda kind=kind, options=options: kind(**options),
            '{}={!r}'.format(*next(iter(options.items()))),
            remedy,
        )
        for kind, options, remedy in (
            (transforms.RandomScaleAspect, dict(scale_range=(2, 1)), 'two numbers, 0 < lowest'),
            (transforms.RandomScaleAspect, dict(aspect_range=1.1), 'two numbers, 0 < lowest'),
            (transforms.RandomBrightness, dict(shift=-3), 'expected an integer from 0 to 255'),
            (transforms.RandomBrightness, dict(shift='3'), 'expected an integer from 0 to 255'),
            (transforms.PlaceRandomly, dict(size=32, pad_val=(0, 0, 0)), 'height and width'),
            (transforms.PlaceRandomly, dict(pad_val=0, size=(9, 9)), 'one number per channel'),
            (
                transforms.PlaceRandomly,
                dict(pad_val=(0, float('nan')), size=(9, 9)),
                'one number per channel',
            ),
            (
                transforms.PlaceRandomly,
                dict(seg_pad_val=0.5, pad_val=(0,), size=(9, 9)),
                'expected an integer',
            ),
            (transforms.RandomScaleRotation, dict(rotation_prob=-0.1), 'from 0 to 1'),
            (transforms.RandomScaleRotation, dict(scale_std='x'), 'from 0 to below 1'),
            (transforms.RandomBoxShift, dict(shift=1.5), 'from 0 to 1'),
            (transforms.RandomBoxShift, dict(prob='x'), 'from 0 to 1'),
        )
    ),
    Bad(
        'missing dataset',
        lambda folder: check_config(dict(train_dataloader=data_of(folder / 'coco'))),
        FileNotFoundError,
        ['train_dataloader.dataset.data_root', 'coco', 'docs/datasets.md#coco-keypoints'],
    ),
    Bad(
        'missing annotations',
        lambda folder: check_config(dict(train_dataloader=data_of(folder, ann_file='a.json'))),
        FileNotFoundError,
        ['train_dataloader.dataset.ann_file', 'a.json', 'docs/datasets.md'],
    ),
    Bad(
        'dead option',
        lambda _: check_config(dict(fp16=dict(loss_scale=512))),
        ValueError,
        ['fp16', 'no effect', "optim_wrapper.type='AmpOptimWrapper'"],
    ),
]


def data_of(folder: Path, **options) -> dict:
    return dict(dataset=dict(type='CocoDataset', data_root=str(folder), **options))


def check_config(config: dict) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, 'argv', ['train.py'])
        ConfigCheckVisBackend(save_dir='').add_config(Config(config))


# Command lines


def tool(name: str, *args: str | Path) -> None:
    """Run one of our tools; what it says when it exits becomes the message of the exit."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(said):
        patch.setattr(sys, 'argv', [f'{name}.py', *map(str, args)])
        try:
            runpy.run_path(str(places.ROOT / 'tools' / f'{name}.py'), run_name='__main__')
        except SystemExit as exit:
            raise SystemExit(f'{exit} {said.getvalue()}') from exit


def command(*args: str, words: list[str], files: dict[str, str] | None = None) -> Bad:
    """A mistake on a command line; arguments that begin with ``./`` are in the folder."""

    def call(folder: Path) -> None:
        for name, content in (files or {}).items():
            written(folder / name, content)
        tool(*(folder / arg[2:] if arg.startswith('./') else arg for arg in args))

    return Bad(' '.join(args), call, SystemExit, [args[0], *words])


def built(folder: Path, content: str = CONFIG.format(MICRO), **options) -> nn.Module:
    return get_model(str(written(folder / 'a.py', content)), **options)


BROKEN = {'broken.py': 'model = dict(\n'}
TO = ('convert_checkpoint', 'no.pth')
COMMANDS = [
    command(
        'train', 'hrformer-tny_8xb128_in1k', words=["'hrformer-tny_8xb128_in1k'", 'did you mean']
    ),
    command('train', './broken.py', words=['broken.py', 'line 1', 'Correct'], files=BROKEN),
    command(
        'train',
        './other.py',
        words=["default_scope='mmrotate'", 'choose one of', 'mmpose'],
        files={'other.py': "default_scope = 'mmrotate'\n"},
    ),
    command('test', OURS, 'no.pth', words=["'no.pth'", 'list_models()']),
    command('test', OURS, './a.pth', words=['a.pth', 'web page'], files={'a.pth': PAGE.decode()}),
    command('get_flops', 'nothing', words=["'nothing'", 'ours are in']),
    command('get_flops', './broken.py', words=['broken.py', 'line 1', 'Correct'], files=BROKEN),
    command(
        'get_flops',
        './a.py',
        words=['a.py', 'no model', 'use a config'],
        files={'a.py': 'a = 1\n'},
    ),
    command(
        *('get_flops', './a.py', '--shape', '16', '16'),
        words=['16x16', 'at least 32x32'],
        files={'a.py': CONFIG.format(MICRO)},
    ),
    command('get_flops', OURS, '--shape', '-1', '64', words=['--shape -1 64', 'height and width']),
    command('get_flops', OURS, '--shape', 'a', 'b', words=['--shape', "'a'", 'usage']),
    command('get_flops', './b.py', words=["arch='smal'"], files={'b.py': CONFIG.format("'smal'")}),
    command(*TO, './b.pth', words=["'no.pth'", 'list_models()']),
    command(*TO, './no/b.pth', words=['no folder', 'create it first']),
    command(*TO, './c.pth', words=['c.pth', 'exists', '--overwrite'], files={'c.pth': ''}),
    command(*TO, './b.pth', '--to', 'timm', words=['--to', "'timm'", 'choose from', 'mmpose']),
    command(
        'convert_checkpoint',
        *('./a.pth', './b.pth'),
        words=['a.pth', 'is a text file', 'check the path'],
        files={'a.pth': 'notes'},
    ),
    Bad(
        'get_model: unknown name',
        lambda _: get_model('hrformer-smal_8xb128_in1k'),
        FileNotFoundError,
        ["'hrformer-smal_8xb128_in1k'", 'did you mean hrformer-small_8xb128_in1k'],
    ),
    Bad(
        'get_model: config without a model',
        lambda folder: built(folder, 'a = 1\n'),
        ValueError,
        ['a.py', 'no default_scope', 'list_models()'],
    ),
    Bad(
        'get_model: unknown checkpoint',
        lambda folder: built(folder, pretrained='no.pth'),
        FileNotFoundError,
        ["'no.pth'", 'list_models()'],
    ),
    Bad(
        'get_model: wrong option',
        lambda folder: built(folder, cfg_options={'model.frozen_stages': 9}),
        ValueError,
        ['frozen_stages=9', 'expected an integer from -1 to 4'],
    ),
    Bad(
        'get_model: unknown device',
        lambda folder: built(folder, device='tpu'),
        RuntimeError,
        ['cpu, cuda', 'tpu'],
    ),
]

BAD = [*CONFIGS, *HEADS, *TENSORS, *CHECKPOINTS, *DATA, *COMMANDS]


@pytest.mark.parametrize('case', BAD, ids=lambda case: case.name)
def test_mistake_is_an_error_that_names_what_is_wrong_and_what_to_do(case: Bad, tmp_path):
    with pytest.raises(case.error) as error:
        case.call(tmp_path)
    said = str(error.value)
    missing = [word for word in case.words if word not in said]
    assert not missing, f'{type(error.value).__name__}: {said}'
    assert not (tmp_path / 'made').exists()  # by code in a checkpoint


def test_the_table_has_every_case_once():
    names = [case.name for case in BAD]
    assert len(names) >= 60
    assert len(names) == len(set(names))


def heatmaps_without_positions(_: Path) -> list[Tensor]:
    """Targets as in the pose configs, for keypoints that cannot be predicted."""
    from mmpose.codecs import UDPHeatmap

    codec = UDPHeatmap(input_size=(64, 64), heatmap_size=(16, 16))
    with np.errstate(invalid='ignore'):
        made = codec.encode(np.full((1, 3, 2), np.nan, np.float32), np.ones((1, 3), np.float32))
    assert not made['keypoint_weights'].any()
    return [torch.from_numpy(made['heatmaps'])]


def outside(_: Path) -> list[Tensor]:
    """For a person who left the image, only the center is outside; the size is unchanged."""
    results = TURN({**boxes(100, 200), 'bbox_center': np.array([[-50.0, 900.0]])})
    return [torch.from_numpy(results['bbox_scale']), torch.from_numpy(results['bbox_center'])]


def other_window(folder: Path) -> list[Tensor]:
    torch.save(weights(window_size=5), folder / 'a.pth')
    model = Classifier()
    load_checkpoint(model, folder / 'a.pth', strict=True)
    return [model.backbone.stage2[0].branches[0][0].attn.relative_position_bias_table.detach()]


def code_beside(folder: Path) -> list[Tensor]:
    torch.save(dict(state_dict=weights(), meta=Code(folder / 'made')), folder / 'a.pth')
    model = Classifier()
    load_checkpoint(model, folder / 'a.pth', strict=True)
    assert not (folder / 'made').exists()
    return [model.backbone.conv1.weight]


def same_as_contiguous(x: Tensor) -> tuple[Tensor, ...]:
    assert not x.is_contiguous()
    outs = backbone()(x)
    for out, expected in zip(outs, backbone()(x.contiguous())):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    return outs


def four(batch: int, size: int) -> list[tuple[int, ...]]:
    return [
        (batch, c, size // 4 // 2**i, size // 4 // 2**i) for i, c in enumerate(MICRO['channels'])
    ]


GOOD = [
    Good(
        'channels-last',
        lambda _: same_as_contiguous(torch.rand(2, 64, 64, 3).permute(0, 3, 1, 2)),
        four(2, 64),
    ),
    Good(
        'every second pixel',
        lambda _: same_as_contiguous(torch.rand(1, 3, 128, 128)[..., ::2, ::2]),
        four(1, 64),
    ),
    Good(
        'one image, expanded',
        lambda _: same_as_contiguous(torch.rand(1, 3, 64, 64).expand(2, -1, -1, -1)),
        four(2, 64),
    ),
    Good('empty batch', lambda _: backbone()(image(0, 3, 64, 64)), four(0, 64)),
    Good('smallest image', lambda _: backbone()(image(1, 3, 32, 32)), four(1, 32)),
    Good('checkpoint of another window', other_window, [(169, 1)]),
    Good('checkpoint with code beside the weights', code_beside, [(64, 3, 3, 3)]),
    *(
        Good(f'{kind.__name__}: only ignored', lambda _, k=kind: [loss([255] * 4, k)], [()])
        for kind in (WeightedCrossEntropyLoss, OHEMCrossEntropyLoss)
    ),
    Good('one pixel', lambda _: [torch.from_numpy(PLACE(sample(1, 1))['img'])], [(32, 32, 3)]),
    Good('box outside the image', outside, [(1, 2), (1, 2)]),
    Good('keypoints that are NaN', heatmaps_without_positions, [(3, 16, 16)]),
]


@pytest.mark.parametrize('case', GOOD, ids=lambda case: case.name)
def test_what_looks_like_a_mistake_works(case: Good, tmp_path):
    with torch.no_grad():
        results = case.call(tmp_path)
    assert [tuple(result.shape) for result in results] == case.shapes
    assert all(result.isfinite().all() for result in results)
