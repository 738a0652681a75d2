"""Our numbers are the official code's numbers: outputs, losses, gradients, statistics."""

from __future__ import annotations

import golden
import pytest
import torch
from needs import may_need, needs

from mmhrformer import load_checkpoint

pytestmark = may_need('mmpose', 'mmseg')

TRAIN_TOLERANCE = 3e-4
GRADIENT_TOLERANCE = 1e-6  # relative, float64


# tests/gpu runs the tests of this file with other ones.
@pytest.fixture
def device() -> str:
    return 'cpu'


@pytest.fixture
def tolerance() -> float:
    return 1e-4


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


@pytest.mark.once
@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_classification_outputs(arch, device, tolerance):
    goldens = golden.load(f'cls_{arch}.npz')
    model = golden.build(golden.CLS_CONFIGS[arch], device).eval()
    report = load_checkpoint(model, golden.official_checkpoint('cls', f'keys_cls_{arch}.json'))
    assert not report.missing
    assert not report.unused
    seen = golden.capture(model.backbone)
    fusion, pooling = model.neck
    with torch.no_grad():
        xs = model.backbone(golden.image((2, 3, 224, 224), device=device))
        (pre_pool,) = fusion(xs)
        (pooled,) = pooling((pre_pool,))
        seen.update({f'branch{i}': x for i, x in enumerate(xs)})
        seen['head.incre0'] = fusion.incre_modules[0](xs[0])
        seen['head.down0'] = fusion.downsamp_modules[0](seen['head.incre0'])
        seen.update(pre_pool=pre_pool, pooled=pooled, logits=model.head((pooled,)))
    check(f'cls {arch}', goldens, covered(goldens, seen), tolerance)


@pytest.mark.parametrize('mode', ['norpe', 'rpe'])
@pytest.mark.parametrize('arch', ['tiny', 'small', 'base'])
def test_pose_outputs(arch, mode, device, tolerance):
    goldens = golden.load(f'pose_{arch}.npz')
    options = {'model.backbone.with_rpe': mode == 'rpe'}
    model = golden.build(golden.POSE_CONFIGS[arch], device, **options).eval()
    report = load_checkpoint(model, golden.official_checkpoint('pose', f'keys_pose_{arch}.json'))
    assert not report.missing
    assert not report.unused
    for size in ((256, 192), (200, 136)):
        prefix = f'{mode}.{size[0]}x{size[1]}.'
        seen = golden.capture(model.backbone, prefix)
        with torch.no_grad():
            (x,) = model.backbone(golden.image((1, 3, *size), device=device))
            seen[prefix + 'branch0'] = x
            seen[prefix + 'heatmap'] = model.head((x,))
        check(f'pose {arch} {prefix}', goldens, covered(goldens, seen, prefix), tolerance)


@pytest.mark.parametrize(
    ('arch', 'window', 'sizes'),
    [
        ('small', 7, [(128, 160), (97, 161)]),
        ('base', 7, [(128, 160)]),
        pytest.param('base', 13, [(128, 160)], marks=pytest.mark.slow),  # between the other two
        ('base-w15', 15, [(128, 160)]),
    ],
)
def test_segmentation_outputs(arch, window, sizes, device, tolerance):
    name = f'seg_{arch.split("-")[0]}_w{window}'
    goldens = golden.load(f'{name}.npz')
    options = {'model.backbone.window_size': 13} if window == 13 else {}
    model = golden.build(golden.SEG_CONFIGS[arch], device, **options).eval()
    report = load_checkpoint(model, golden.official_checkpoint('seg', f'keys_{name}.json'))
    assert not report.missing
    assert not report.unused
    aux, ocr = model.decode_head
    for size in sizes:
        prefix = f'{size[0]}x{size[1]}.'
        seen = golden.capture(model.backbone, prefix)
        with torch.no_grad():
            xs = model.backbone(golden.image((1, 3, *size), device=device))
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
            tolerance,
        )


ZERO_GRADIENT = 1e-9  # norm of analytically zero gradients: biases in front of BN and the like


def check_training(goldens, prefix, model, official, out, loss) -> None:
    """Outputs, loss, gradients and statistics of one float64 training step."""
    print(f'loss differs by {abs(loss.item() - goldens[f"{prefix}loss_fp64"]):.2e}')
    assert loss.item() == pytest.approx(float(goldens[f'{prefix}loss_fp64']), rel=1e-9)
    check(f'train {prefix}', goldens, {f'{prefix}out.{k}': v for k, v in out.items()}, 3e-4)
    state = golden.by_official_name(model.state_dict(), official)
    statistics = {
        name: state[name.removeprefix(f'{prefix}bn.')]
        for name in golden.recipe.names(goldens)
        if name.startswith(f'{prefix}bn.')
    }
    assert statistics
    check('BN statistics', goldens, statistics, TRAIN_TOLERANCE)
    grads = {name: p.grad for name, p in model.named_parameters()}
    check_gradients(goldens, prefix, golden.by_official_name(grads, official))


def check_gradients(goldens, prefix, ours) -> None:
    """Norms of all gradients, and some whole gradients."""
    worst, zeros = 0.0, 0
    for name, norm in zip(goldens[f'{prefix}grad_names'], goldens[f'{prefix}grad_l2_fp64']):
        mine = ours[str(name)].norm().item()
        if norm < ZERO_GRADIENT:
            zeros += 1
            assert mine < ZERO_GRADIENT, name
        else:
            worst = max(worst, abs(mine - norm) / norm)
    count = len(goldens[f'{prefix}grad_names'])
    print(f'{count} gradients ({zeros} of them zero): worst relative difference {worst:.2e}')
    assert worst <= GRADIENT_TOLERANCE
    for key in golden.recipe.names(goldens):
        if key.startswith(f'{prefix}grad64.'):  # stored in float32
            scale = goldens[f'{key}.stats'][2]
            grad = ours[key.removeprefix(f'{prefix}grad64.')]
            assert golden.difference(goldens, key, grad) <= 1e-6 * scale, key


def prepare(config: str, device, task: str, keys: str, **options):
    """A float64 model in training mode without stochastic parts, and its official weights."""
    model = golden.build(config, device, **{'model.backbone.drop_path_rate': 0.0, **options})
    report = load_checkpoint(model, golden.official_checkpoint(task, keys))
    assert not report.missing
    assert not report.unused
    return model.double().train(), golden.official_state_dict(keys)


@pytest.mark.once
def test_classification_training(device):
    goldens = golden.load('train_cls.npz')
    keys = 'keys_cls_tiny.json'
    model, official = prepare(golden.CLS_CONFIGS['tiny'], device, 'cls', keys)
    target = torch.from_numpy(golden.recipe.make_class_targets(2, 1000, 0)).to(device)
    logits = model(
        golden.image((2, 3, 224, 224), dtype=torch.float64, device=device), mode='tensor'
    )
    loss = torch.nn.functional.cross_entropy(logits, target)
    loss.backward()
    check_training(goldens, '', model, official, {'logits': logits}, loss)


@pytest.mark.parametrize('mode', [pytest.param('norpe', marks=pytest.mark.slow), 'rpe'])
def test_pose_training(mode, device):
    goldens = golden.load('train_pose.npz')
    keys = 'keys_pose_small.json'
    options = {'model.backbone.with_rpe': mode == 'rpe'}
    model, official = prepare(golden.POSE_CONFIGS['small'], device, 'pose', keys, **options)
    heatmaps = model(
        golden.image((2, 3, 128, 96), dtype=torch.float64, device=device), None, mode='tensor'
    )
    target, weight = map(torch.from_numpy, golden.recipe.make_heatmap_targets(heatmaps.shape, 0))
    # mmpose's own loss, as the config sets it.
    target, weight = target.to(heatmaps), weight.squeeze(-1).to(heatmaps)
    loss = model.head.loss_module(heatmaps, target, weight)
    loss.backward()
    check_training(goldens, f'{mode}.', model, official, {'heatmap': heatmaps}, loss)
    without_gradient = {str(name) for name in goldens[f'{mode}.no_grad_names']}
    assert all(name.endswith('bias_table') for name in without_gradient)


@needs('mmseg')
def test_segmentation_training(device):
    """One step through CascadeEncoderDecoder.loss: the auxiliary head runs once."""
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    goldens = golden.load('train_seg.npz')
    keys = 'keys_seg_small_w7.json'
    model, official = prepare(golden.SEG_CONFIGS['small'], device, 'seg', keys)
    aux, ocr = model.decode_head
    ocr.dropout = None
    label = golden.recipe.make_label_map((2, 64, 64), 19, 0, ignore_index=255, ignore_ratio=0.1)
    samples = [
        SegDataSample(gt_sem_seg=PixelData(data=one[None]))
        for one in torch.from_numpy(label).to(device)
    ]
    outputs = {}
    aux.conv_seg.register_forward_hook(lambda m, args, out: outputs.update(aux_logits=out))
    ocr.conv_seg.register_forward_hook(lambda m, args, out: outputs.update(logits=out))
    losses = model.loss(golden.image((2, 3, 64, 64), dtype=torch.float64, device=device), samples)
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert losses['decode_1.loss_ohem'].item() == pytest.approx(goldens['loss.seg_ohem_fp64'])
    assert losses['decode_0.loss_ce'].item() == pytest.approx(0.4 * goldens['loss.aux_ce_fp64'])
    meta = [dict(img_shape=(64, 64))]
    out = {
        'logits_up': ocr.predict_by_feat(outputs['logits'], meta),
        'aux_logits_up': ocr.predict_by_feat(outputs['aux_logits'], meta),
    }
    check_training(goldens, '', model, official, out, loss)
