"""Parameters and operations equal what the official counter found."""

from __future__ import annotations

import golden
import pytest
import torch
from mmengine.analysis import FlopAnalyzer
from needs import may_need
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mmhrformer import HRFormer, HRFormerFusion, ops
from mmhrformer.analysis.complexity import FORMULAS, complexity

pytestmark = may_need('mmpose', 'mmseg')

ARCH = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1))
TABLE = golden.read_json('params_flops.json')
# The others have as many kinds of operators, and take as long together as the rest of this file.
QUICK = {'cls tiny', 'pose small', 'seg small w7 ocr_v2 19cls'}
CASES = [
    (golden.CLS_CONFIGS[arch], row)
    for row, arch in zip(TABLE['classification'], ('tiny', 'small', 'base'))
] + [(golden.POSE_CONFIGS[row['model'].split()[1]], row) for row in TABLE['pose']]
CASES += [
    (golden.SEG_CONFIGS[row['model'].split()[1]], row)
    for row in TABLE['segmentation']['results']
    if row['input_shape'] == [1, 3, 512, 512] and ' w7 ' in row['model']
]


CASES = [
    pytest.param(*case, marks=[] if case[1]['model'] in QUICK else pytest.mark.slow)
    for case in CASES
]


def count(model: nn.Module, *shape) -> dict[str, int]:
    """Count with shapes only, without data."""
    with torch.device('meta'):
        return complexity(model.to('meta'), *shape)


@pytest.mark.parametrize(('config', 'row'), CASES)
def test_operations_equal_the_official_count(config, row):
    # The official pose code has the bias tables and does not add them.
    options = {'model.backbone.with_rpe': False} if 'pose' in config else {}
    assert sum(p.numel() for p in golden.build(config, 'meta').parameters()) == row['params']
    counts = count(golden.build(config, 'meta', **options), tuple(row['input_shape']))
    assert counts['macs'] / 1e9 == pytest.approx(row['macs_G'], abs=1e-5)
    # The stored numbers are rounded, and the official tool counts a few scalar operations.
    assert counts['flops_official'] / 1e9 == pytest.approx(row['official_tool_G'], abs=2e-5)


# What the paper and the official repository publish, in G: multiply-accumulates, and their FLOPs.
PUBLISHED = {'tiny': (1.71, 1.83), 'small': (3.36, 3.56), 'base': (13.31, 13.71)}


@pytest.mark.parametrize('arch', PUBLISHED)
def test_both_rules_give_the_published_numbers(arch):
    macs, flops = PUBLISHED[arch]
    counts = count(golden.build(golden.CLS_CONFIGS[arch], 'meta'))
    assert counts['macs'] == pytest.approx(macs * 1e9, rel=0.01)
    assert round(counts['flops_official'] / 1e9, 2) == flops


# The operators that multiply and accumulate, as mmengine's analysis calls them.
PRODUCTS = ('conv', 'linear', 'addmm', 'mm', 'matmul', 'bmm', 'einsum')


def test_the_analysis_of_mmengine_counts_the_same():
    """mmengine's analysis also works as documented, on any of our models."""
    arch = dict(ARCH, num_blocks=1)
    model = nn.Sequential(HRFormer(arch), HRFormerFusion(arch['channels'])).eval()
    with ops.use('reference'):
        counts = FlopAnalyzer(model, torch.zeros(1, 3, 64, 64)).by_operator()
    macs = sum(counts[name] for name in PRODUCTS)
    assert macs == complexity(model, (1, 3, 64, 64))['macs']


@pytest.mark.parametrize('device', ['cpu', 'meta'])
def test_fused_attention_is_counted(device):
    """Including attention on CPUs, which torch's counter lacks."""
    query, key = torch.zeros(2, 3, 5, 8, device=device), torch.zeros(2, 3, 7, 8, device=device)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter, torch.no_grad():
        nn.functional.scaled_dot_product_attention(query, key, key)
    assert counter.get_total_flops() == 2 * 2 * (2 * 3 * 5 * 7 * 8)


def test_images_have_the_channels_of_the_model():
    by_channels = [HRFormer(ARCH, in_channels=channels) for channels in (1, 4)]
    first, other = map(complexity, by_channels)
    assert other['macs'] - first['macs'] == 3 * 9 * 64 * 112 * 112  # of the first convolution


def test_other_normalizations_change_no_product():
    macs = set()
    for norm_cfg in (dict(type='BN'), dict(type='GN', num_groups=2), dict(type='IN')):
        neck = HRFormerFusion(ARCH['channels'], norm_cfg=norm_cfg)
        backbone = HRFormer(ARCH, norm_cfg=norm_cfg)
        macs.add(complexity(nn.Sequential(backbone, neck), (1, 3, 64, 64))['macs'])
    assert len(macs) == 1
