"""Our numbers are the official code's numbers: outputs, losses, gradients, statistics."""

from __future__ import annotations

import golden
import numpy as np
import pytest
import torch

from mmhrformer import load_checkpoint

EVAL_TOLERANCE = 1e-4
TRAIN_TOLERANCE = 3e-4
GRADIENT_TOLERANCE = 1e-6  # relative, float64


def check(name: str, goldens: dict, ours: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare tensors, and keep the worst difference for the report of the test run."""
    worst = {key: golden.difference(goldens, key, tensor) for key, tensor in ours.items()}
    print(f'{name}: {len(worst)} tensors, max abs difference {max(worst.values()):.2e}')
    assert max(worst.values()) <= tolerance, {k: v for k, v in worst.items() if v > tolerance}


def covered(goldens: dict, ours: dict, prefix: str = '') -> dict:
    """The tensors to compare; all that the golden file holds under the prefix are there."""
    names = {n for n in golden.recipe.names(goldens) if n.startswith(prefix)}
    assert names <= set(ours), names - set(ours)
    return {name: ours[name] for name in names}


@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_classification_outputs(arch):
    goldens = golden.load(f'cls_{arch}.npz')
    model = golden.build(golden.CLS_CONFIGS[arch]).eval()
    report = load_checkpoint(model, golden.official_checkpoint('cls', f'keys_cls_{arch}.json'))
    assert not report.missing
    assert not report.unused
    seen = golden.capture(model.backbone)
    fusion, pooling = model.neck
    with torch.no_grad():
        xs = model.backbone(golden.image((2, 3, 224, 224)))
        (pre_pool,) = fusion(xs)
        (pooled,) = pooling((pre_pool,))
        seen.update({f'branch{i}': x for i, x in enumerate(xs)})
        seen['head.incre0'] = fusion.incre_modules[0](xs[0])
        seen['head.down0'] = fusion.downsamp_modules[0](seen['head.incre0'])
        seen.update(pre_pool=pre_pool, pooled=pooled, logits=model.head((pooled,)))
    check(f'cls {arch}', goldens, covered(goldens, seen), EVAL_TOLERANCE)


@pytest.mark.parametrize('mode', ['norpe', 'rpe'])
@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_pose_outputs(arch, mode):
    goldens = golden.load(f'pose_{arch}.npz')
    options = {'model.backbone.with_rpe': mode == 'rpe'}
    model = golden.build(golden.POSE_CONFIGS[arch], **options).eval()
    report = load_checkpoint(model, golden.official_checkpoint('pose', f'keys_pose_{arch}.json'))
    assert not report.missing
    assert not report.unused
    for size in ((256, 192), (200, 136)):
        prefix = f'{mode}.{size[0]}x{size[1]}.'
        seen = golden.capture(model.backbone, prefix)
        with torch.no_grad():
            (x,) = model.backbone(golden.image((1, 3, *size)))
            seen[prefix + 'branch0'] = x
            seen[prefix + 'heatmap'] = model.head((x,))
        check(f'pose {arch} {prefix}', goldens, covered(goldens, seen, prefix), EVAL_TOLERANCE)


@pytest.mark.parametrize(
    ('arch', 'window', 'sizes'),
    [
        ('small', 7, [(128, 160), (97, 161)]),
        ('base', 7, [(128, 160)]),
        ('base', 13, [(128, 160)]),
        ('base-w15', 15, [(128, 160)]),
    ],
)
def test_segmentation_outputs(arch, window, sizes):
    name = f'seg_{arch.split("-")[0]}_w{window}'
    goldens = golden.load(f'{name}.npz')
    options = {'model.backbone.window_size': 13} if window == 13 else {}
    model = golden.build(golden.SEG_CONFIGS[arch], **options).eval()
    report = load_checkpoint(model, golden.official_checkpoint('seg', f'keys_{name}.json'))
    assert not report.missing
    assert not report.unused
    aux, ocr = model.decode_head
    for size in sizes:
        prefix = f'{size[0]}x{size[1]}.'
        seen = golden.capture(model.backbone, prefix)
        with torch.no_grad():
            xs = model.backbone(golden.image((1, 3, *size)))
            seen.update({f'{prefix}branch{i}': x for i, x in enumerate(xs)})
            aux_logits = aux(xs)
            logits = ocr(xs, aux_logits)
            feats = ocr.bottleneck(ocr._transform_inputs(xs))
            regions = ocr.gather_regions(feats, aux_logits)
            context = ocr.object_attention(feats, regions)
            ours = {
                'aux_logits': aux_logits,
                'logits': logits,
                'aux_logits_up': ocr.predict_by_feat(aux_logits, [dict(img_shape=size)]),
                'logits_up': ocr.predict_by_feat(logits, [dict(img_shape=size)]),
                'ocr.feats': feats,
                'ocr.regions': regions,
                'ocr.context': context,
                'ocr.out': ocr.fuse(torch.cat([context, feats], 1)),
            }
            seen.update({prefix + key: value for key, value in ours.items()})
        check(
            f'seg {arch} w{window} {prefix}',
            goldens,
            covered(goldens, seen, prefix),
            EVAL_TOLERANCE,
        )
