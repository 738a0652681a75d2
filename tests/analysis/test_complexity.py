"""Parameters and operations equal what the official counter found."""

from __future__ import annotations

import golden
import pytest
import torch
from torch import nn

from mmhrformer import HRFormer, HRFormerFusion
from mmhrformer.analysis.complexity import analyzed_macs, complexity

TABLE = golden.read_json('params_flops.json')
CASES = [
    (golden.CLS_CONFIGS[arch], row)
    for row, arch in zip(TABLE['classification'], ('tiny', 'small', 'base'))
] + [(golden.POSE_CONFIGS[row['model'].split()[1]], row) for row in TABLE['pose']]
CASES += [
    (golden.SEG_CONFIGS[row['model'].split()[1]], row)
    for row in TABLE['segmentation']['results']
    if row['input_shape'] == [1, 3, 512, 512] and ' w7 ' in row['model']
]


@pytest.mark.parametrize(('config', 'row'), CASES)
def test_operations_equal_the_official_count(config, row):
    # The official pose code has the bias tables and does not add them.
    options = {'model.backbone.with_rpe': False} if 'pose' in config else {}
    with torch.device('meta'):  # only shapes are counted
        parameters = sum(p.numel() for p in golden.build(config, 'meta').parameters())
        counts = complexity(golden.build(config, 'meta', **options), tuple(row['input_shape']))
    assert parameters == row['params']
    assert counts['macs'] / 1e9 == pytest.approx(row['macs_G'], abs=1e-5)
    # The stored numbers are rounded, and the official tool counts a few scalar operations.
    assert counts['flops_official'] / 1e9 == pytest.approx(row['official_tool_G'], abs=2e-5)


# What the paper and the official repository publish, in G: multiply-accumulates, and their FLOPs.
PUBLISHED = {'tiny': (1.71, 1.83), 'small': (3.36, 3.56), 'base': (13.31, 13.71)}


@pytest.mark.parametrize('arch', PUBLISHED)
def test_both_rules_give_the_published_numbers(arch):
    macs, flops = PUBLISHED[arch]
    model = golden.build(golden.CLS_CONFIGS[arch])
    counts = complexity(model)
    assert counts['macs'] == pytest.approx(macs * 1e9, rel=0.01)
    assert analyzed_macs(model) == pytest.approx(macs * 1e9, rel=0.01)
    assert round(counts['flops_official'] / 1e9, 2) == flops


def test_images_have_the_channels_of_the_model():
    arch = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1))
    by_channels = [HRFormer(arch, in_channels=channels) for channels in (1, 4)]
    first, other = map(complexity, by_channels)
    assert other['macs'] - first['macs'] == 3 * 9 * 64 * 112 * 112  # of the first convolution
    assert other['macs'] == analyzed_macs(by_channels[1])


def test_other_normalizations_change_no_product():
    arch = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1))
    macs = set()
    for norm_cfg in (dict(type='BN'), dict(type='GN', num_groups=2), dict(type='IN')):
        neck = HRFormerFusion(arch['channels'], norm_cfg=norm_cfg)
        backbone = HRFormer(arch, norm_cfg=norm_cfg)
        macs.add(complexity(nn.Sequential(backbone, neck), (1, 3, 64, 64))['macs'])
    assert len(macs) == 1
