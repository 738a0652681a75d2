"""Exported models give, in other runtimes and at other sizes, what they give in torch."""

from __future__ import annotations

import copy
import io
import json
import sys
import warnings

import golden
import onnx
import onnxruntime
import onnxslim
import pytest
import torch
from inference_samples import CONFIGS, make_model
from mmengine.config import Config
from needs import may_need
from torch import nn

import mmhrformer
from mmhrformer import HRFormer, fuse_for_inference
from mmhrformer.configs import find_config, read_config
from mmhrformer.datasets.meta import names_of_outputs
from mmhrformer.deploy import onnx as export
from mmhrformer.deploy.aligned_conv import AlignedConv, align_channels
from mmhrformer.deploy.map_attention import (
    MapAttention,
    SingleHeadAttention,
    shifted_norm,
    use_map_attention,
    window_places,
    window_tokens,
)
from mmhrformer.deploy.onnx import DeployedModel, ExportError, export_onnx
from mmhrformer.models import (
    DWConvFFN,
    HRFormerBlock,
    HRFormerFusion,
    LocalWindowSelfAttention,
    ShiftedWindowSelfAttention,
)

pytestmark = may_need('mmpose', 'mmseg')

TINY = dict(channels=(8, 16, 24, 32), num_heads=(1, 2, 2, 4), num_modules=(1, 1, 1), num_blocks=1)


def session(file) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])


def relative(out, wanted: torch.Tensor) -> float:
    out = torch.as_tensor(out)
    assert out.shape == wanted.shape
    return ((out - wanted).abs().max() / (wanted.max() - wanted.min())).item()


@pytest.mark.parametrize(
    ('task', 'shapes'),
    [
        ('cls', [(1, 32, 32), (5, 32, 32)]),
        ('pose', [(2, 128, 96), (7, 128, 96)]),
        ('seg', [(1, 32, 32), (4, 96, 96), (2, 77, 131), (1, 224, 56)]),
    ],
)
def test_onnxruntime_gives_what_torch_gives(task, shapes, models, exported):
    run = session(exported[task])
    deployed = DeployedModel(models[task], with_normalization=task == 'pose')
    for batch, *size in shapes:
        image = golden.image((batch, 3, *size))
        with torch.no_grad():
            wanted = deployed(image)
        (out,) = run.run(None, {'image': image.numpy()})
        assert relative(out, wanted) <= 1e-4


def test_deployed_models_predict_what_the_frameworks_do(models):
    image = golden.image((2, 3, 96, 128))
    with torch.no_grad():
        scores = DeployedModel(models['cls'])(image)
        samples = models['cls'].predict(image)
        torch.testing.assert_close(scores, torch.stack([s.pred_score for s in samples]))
        heatmaps = DeployedModel(models['pose'])(image)
        torch.testing.assert_close(heatmaps, models['pose'](image, None, mode='tensor'))
        logits = DeployedModel(models['seg'])(image)
        meta = dict(img_shape=(96, 128), ori_shape=(96, 128), pad_shape=(96, 128))
        whole = models['seg'].encode_decode(image, [meta] * 2)
        torch.testing.assert_close(logits, whole)


def test_pixels_are_normalized_as_by_the_data_preprocessor(models):
    model = models['pose']
    pixels = 255 * torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    prepared = (pixels - model.data_preprocessor.mean) / model.data_preprocessor.std
    with torch.no_grad():
        wanted = DeployedModel(model)(prepared)
        deployed = DeployedModel(model, with_normalization=True)
        torch.testing.assert_close(deployed(pixels), wanted)


@pytest.mark.parametrize(
    ('task', 'output', 'open_axes'),
    [
        ('cls', 'scores', {'batch'}),
        ('pose', 'heatmaps', {'batch'}),
        ('seg', 'logits', {'batch', 'height', 'width'}),
    ],
)
def test_files_say_what_they_take_and_give(task, output, open_axes, models, exported):
    graph = onnx.load(exported[task])
    (given,), (returned,) = graph.graph.input, graph.graph.output
    axes = {d.dim_param for d in given.type.tensor_type.shape.dim if d.dim_param}
    assert (given.name, returned.name, axes) == ('image', output, open_axes)
    assert [entry.version for entry in graph.opset_import if not entry.domain] == [17]
    meta = {entry.key: entry.value for entry in graph.metadata_props}
    assert meta['mmhrformer_version'] == mmhrformer.__version__
    assert meta['task'] == export.task_of(models[task])
    assert meta['normalization'] == ('included' if task == 'pose' else 'expected')
    assert meta.get('decoder') == ('UDPHeatmap' if task == 'pose' else None)
    assert meta['channel_order'] == ('BGR' if task == 'seg' else 'RGB')
    assert json.loads(meta['names']) == names_of_outputs(read_config(find_config(CONFIGS[task])))
    mean, std = models[task].data_preprocessor.mean, models[task].data_preprocessor.std
    assert json.loads(meta['input_mean']) == pytest.approx(mean.flatten().tolist())
    assert json.loads(meta['input_std']) == pytest.approx(std.flatten().tolist())


@pytest.mark.parametrize('task', CONFIGS)
def test_batch_normalization_is_folded(task, exported):
    kinds = {node.op_type for node in onnx.load(exported[task]).graph.node}
    assert 'LayerNormalization' in kinds
    assert 'BatchNormalization' not in kinds


def test_backbones_of_one_size_compute_no_shapes(models, tmp_path):
    export_onnx(models['cls'], tmp_path / 'cls.onnx', (64, 96), verify=False)
    nodes = onnx.load(tmp_path / 'cls.onnx').graph.node
    assert not [node.name for node in nodes if node.op_type == 'Shape' and 'backbone' in node.name]


def norm_and_attention(*args, **options) -> nn.Sequential:
    model = nn.Sequential(nn.LayerNorm(args[0]), LocalWindowSelfAttention(*args, **options)).eval()
    golden.recipe.fill_module(model)
    return model


def for_export(model: nn.Sequential, kind: type, **options) -> nn.Sequential:
    norm, attn = model
    return nn.Sequential(shifted_norm(norm), kind(attn, norm, **options))


@pytest.mark.parametrize('window', [1, 7, pytest.param(13, marks=pytest.mark.slow), 15])
@pytest.mark.parametrize('options', [dict(), dict(with_rpe=False), dict(pad_mask=True)], ids=str)
@pytest.mark.parametrize('opset', [pytest.param(14, marks=pytest.mark.slow), 17])
@pytest.mark.parametrize(
    ('kind', 'heads'),
    [(None, 2), (MapAttention, 2), (SingleHeadAttention, 1)],
    ids=['plain', 'map', 'single'],
)
def test_padding_follows_the_size_of_the_map(window, options, opset, kind, heads):
    """At sizes that windows divide, too; zeros have other places at each size."""
    model = norm_and_attention(12, heads, window, **options)
    exported = for_export(model, kind) if kind else model
    content = io.BytesIO()
    axes = dict(x={0: 'batch', 1: 'height', 2: 'width'})
    kwargs = dict(opset_version=opset, input_names=['x'], dynamic_axes=axes, **export.EXPORTER)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.onnx.export(exported, torch.rand(2, 17, 9, 12), content, **kwargs)
        run = session(content.getvalue())
        for shape in ((2, 17, 9), (1, 17, 9), (3, window, 2 * window), (1, 20, 26), (2, 3, 1)):
            x = torch.rand(*shape, 12)
            assert relative(run.run(None, {'x': x.numpy()})[0], model(x)) < 1e-5


@pytest.mark.parametrize('window', [1, 7, 13])
@pytest.mark.parametrize('options', [dict(), dict(with_rpe=False), dict(pad_mask=True)], ids=str)
# Of the windows of 7, all, none, or some are padded (as in the finest stream at 256x192).
@pytest.mark.parametrize('size', [(17, 9), (14, 7), (17, 17), (3, 1)], ids=str)
@torch.no_grad()
def test_files_of_one_size_gather_windows(window, options, size):
    model = norm_and_attention(12, 2, window, **options)  # 6 channels a head, padded to 8
    x = torch.rand(3, *size, 12)
    assert relative(for_export(model, MapAttention, fixed_size=True)(x), model(x)) < 1e-5


@pytest.mark.parametrize(
    ('size', 'queries', 'keys'),
    [((16, 12), 42, 43), ((8, 6), 24, 25), ((15, 14), 49, 49), ((14, 14), 49, 49)],
    ids=str,
)
def test_one_key_stands_for_the_padding_if_no_window_is_full(size, queries, keys):
    tokens, _ = window_tokens(size, window=7)
    (q, k, v), back = window_places(tokens, heads=2)
    assert [places.shape[1:] for places in (q, k, v)] == [(2, queries), (2, keys), (2, keys)]
    wanted = torch.arange(1, size[0] * size[1] + 1)[:, None] * 6 + torch.arange(2)
    assert (torch.from_numpy(q.ravel()[back]) == wanted).all()


@torch.no_grad()
def test_gathered_windows_take_any_batch():
    model, content = norm_and_attention(8, 2), io.BytesIO()
    options = dict(input_names=['x'], dynamic_axes=dict(x={0: 'batch'}), **export.EXPORTER)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        exported = for_export(model, MapAttention, fixed_size=True)
        torch.onnx.export(exported, torch.rand(2, 17, 9, 8), content, opset_version=17, **options)
    kinds = [node.op_type for node in onnx.load_from_string(content.getvalue()).graph.node]
    assert 'Split' not in kinds
    run = session(content.getvalue())
    for batch in (1, 5):
        x = torch.rand(batch, 17, 9, 8)
        assert relative(run.run(None, {'x': x.numpy()})[0], model(x)) < 1e-5


@torch.no_grad()
def test_channels_are_padded_to_a_multiple_of_4():
    ffns = [DWConvFFN(channels, 72).eval() for channels in (18, 20)]
    head = nn.Sequential(nn.Conv2d(3, 18, 3), nn.Conv2d(18, 5, 3, stride=2, padding=1))
    for module in (*ffns, head):
        golden.recipe.fill_module(module)
    x, image = torch.rand(2, 5, 7, 18), torch.rand(2, 3, 9, 8)
    wanted = ffns[0](x), head(image)
    align_channels(nn.Sequential(*ffns, head))
    assert [type(ffn.fc1) for ffn in ffns] == [AlignedConv, nn.Conv2d]
    assert [type(conv) for conv in head] == [nn.Conv2d, AlignedConv]
    assert ffns[0].fc1.in_channels == head[1].in_channels == 20
    assert relative(ffns[0](x), wanted[0]) < 1e-6
    assert relative(head(image), wanted[1]) < 1e-6


def test_other_attentions_are_left_alone():
    wrapped, shifted, unbiased, *others = (HRFormerBlock(8, heads) for heads in (2, 2, 2, 2, 1))
    wrapped.attn.qkv = nn.Sequential(wrapped.attn.qkv)  # as LoRA and quantization wrap layers
    shifted.attn = ShiftedWindowSelfAttention(8, 2)
    unbiased.norm1 = nn.LayerNorm(8, elementwise_affine=False)
    model = use_map_attention(nn.Sequential(wrapped, shifted, unbiased, *others))
    left = [LocalWindowSelfAttention, ShiftedWindowSelfAttention, LocalWindowSelfAttention]
    assert [type(block.attn) for block in model] == [*left, MapAttention, SingleHeadAttention]


@pytest.mark.once
@pytest.mark.filterwarnings('ignore')
def test_other_exporters_may_write_an_older_opset():
    """The exporter of mmdeploy writes opset 11."""
    content = io.BytesIO()
    deployed = HRFormer(arch=TINY, out_indices=(0,)).eval()
    image = torch.rand(1, 3, 64, 64)
    torch.onnx.export(deployed, image, content, opset_version=11, **export.EXPORTER)
    assert len(content.getvalue()) > 4 * sum(p.numel() for p in deployed.parameters())


def trace(model: nn.Module) -> torch.jit.ScriptModule:
    """Trace as TorchScript with an image whose streams need no correction; save and load it."""
    content = io.BytesIO()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        traced = torch.jit.trace(model, torch.rand(1, 3, 64, 96), check_trace=False)
    torch.jit.save(traced, content)
    content.seek(0)
    return torch.jit.load(content)


@pytest.mark.once
@pytest.mark.parametrize(
    ('fuse', 'options'),
    [(True, dict()), (False, dict(pad_mask=True, upsample='bilinear'))],
    ids=['fused', 'pad_mask'],
)
def test_torchscript_takes_any_size(fuse, options):
    model = HRFormer(arch=TINY, window_size=5, **options).eval()
    golden.recipe.fill_module(model)
    traced = trace(fuse_for_inference(model) if fuse else model)
    for shape in ((1, 3, 32, 32), (3, 3, 97, 161), (1, 3, 160, 80)):
        image = golden.image(shape)
        with torch.no_grad():
            for out, wanted in zip(traced(image), model(image)):
                assert relative(out, wanted) < 1e-5


def test_torchscript_of_a_whole_model(models):
    deployed = DeployedModel(models['seg']).eval()
    traced = trace(deployed)
    for shape in ((1, 3, 64, 96), (3, 3, 45, 77)):
        image = golden.image(shape)
        with torch.no_grad():
            assert relative(traced(image), deployed(image)) < 1e-5


@pytest.mark.skipif(not hasattr(torch.export, 'Dim'), reason='torch.export without open sizes')
@pytest.mark.parametrize(
    ('fuse', 'options'),
    [
        (False, {}),
        pytest.param(False, dict(with_rpe=False), marks=pytest.mark.slow),
        pytest.param(False, dict(pad_mask=True), marks=pytest.mark.slow),
        (True, {}),
    ],
    ids=str,
)
def test_exported_programs_take_any_batch(fuse, options):
    model = HRFormer(arch=TINY, window_size=5, **options)
    model = nn.Sequential(model, HRFormerFusion(TINY['channels'], (8, 8, 8, 8), 16)).eval()
    golden.recipe.fill_module(model)
    model = fuse_for_inference(model) if fuse else model
    axes = {0: torch.export.Dim('batch', min=1, max=512)}
    with torch.no_grad():
        example = (torch.rand(2, 3, 97, 160),)
        program = torch.export.export(model, example, dynamic_shapes=(axes,)).module()
        for batch in (1, 2, 5):
            image = golden.image((batch, 3, 97, 160))
            assert relative(program(image)[0], model(image)[0]) < 1e-5


def test_the_model_is_left_as_it_is(models, exported):
    before = make_model('pose').state_dict()
    after = models['pose'].state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(parameter.requires_grad for parameter in models['pose'].parameters())


def test_wrong_results_leave_no_file(models, exported, monkeypatch, tmp_path):
    """The recorded graph is one of other weights."""
    wrong = onnx.load(exported['cls'])
    monkeypatch.setattr(export, 'trace', lambda *args: wrong)
    model = make_model('cls')
    with torch.no_grad():
        model.head.fc.weight.mul_(2)
    with pytest.raises(ExportError, match=r'(?s)differs from torch .* 3 .*32x32.*--no-verify'):
        export_onnx(model, tmp_path / 'wrong.onnx', (32, 32), simplify=False)
    assert not list(tmp_path.iterdir())
    assert export_onnx(model, tmp_path / 'a.onnx', (32, 32), simplify=False, verify=False) == []


@pytest.mark.parametrize('failure', ['raises', 'wrong'])
def test_a_bad_simplification_is_not_kept(failure, models, exported, monkeypatch, tmp_path):
    graph = onnx.load(exported['cls'])

    def slim(proto):
        if failure == 'raises':
            raise RuntimeError('not today')
        for tensor in proto.graph.initializer:
            if tensor.name.endswith('head.fc.bias'):
                tensor.raw_data = torch.arange(10, dtype=torch.float32).numpy().tobytes()
        return proto

    monkeypatch.setattr(export, 'trace', lambda *args: copy.deepcopy(graph))
    monkeypatch.setattr(onnxslim, 'slim', slim)
    file = tmp_path / 'a.onnx'
    message = 'not today' if failure == 'raises' else 'changed the results'
    with pytest.warns(UserWarning, match=f'not simplified, .*{message}'):
        rows = export_onnx(models['cls'], file, (32, 32))
    assert all(row.good for row in rows)
    assert len(onnx.load(file).graph.node) == len(graph.graph.node)


def training(model):
    model = copy.deepcopy(model)
    model.train()
    return model


def other_backbone(model: nn.Module) -> nn.Module:
    cfg = copy.deepcopy(model.cfg)
    cfg.model.backbone = dict(type='mmpose.ResNet', depth=18, out_indices=(0,))
    return mmhrformer.get_model(cfg)


@pytest.mark.parametrize(
    ('change', 'options', 'message'),
    [
        (training, dict(), 'training mode: call model.train'),
        (fuse_for_inference, dict(), 'export the model it was made from'),
        (lambda m: copy.deepcopy(m).half(), dict(), r'torch.float16: call model.float'),
        (
            lambda m: m.backbone,
            dict(),
            'a HRFormer, whose task is not supported: expected a classifier',
        ),
        (other_backbone, dict(), 'backbone is a ResNet: only models with the backbone mmhrformer'),
        (None, dict(size=(31, 64)), r'size=\(31, 64\): .* at least 32 pixels'),
        (None, dict(size=(64,)), r'size=\(64,\): expected height and width'),
        (None, dict(batch=0), 'batch=0: expected a positive integer'),
        (None, dict(opset=11), 'opset=11: expected 14 to 17'),
        (None, dict(file='model.pt'), r"file='model.pt': .* ends in .onnx"),
        (
            None,
            dict(names=['nose', 'ear']),
            "names has 2 entries, such as 'nose', .* 17 classes or",
        ),
        (
            None,
            dict(flip_indices=[1, 0]),
            'flip_indices has 2 entries, such as 1, .* 17 classes or',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_what_is_refused(change, options, message, models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = change(models['pose']) if change else models['pose']
    with pytest.raises(ValueError, match=message):
        export_onnx(model, **{'file': 'a.onnx', 'size': (128, 96), **options})
    assert not list(tmp_path.iterdir())


def test_augmented_tests_are_refused(models):
    tta = mmhrformer.MODELS.build(
        dict(type='SumLogitsTTAModel', module=make_model('seg'), data_preprocessor=None)
    )
    with pytest.raises(ValueError, match=r'SumLogitsTTAModel: .* export its \.module instead'):
        export.task_of(tta)
    pipeline = [dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=[])]
    for cfg in (
        dict(test_dataloader=dict(dataset=dict(pipeline=pipeline))),
        dict(model=dict(type='mmhrformer.SumLogitsTTAModel')),
    ):
        with pytest.raises(ValueError, match='test-time augmentation runs a model several times'):
            export.refuse_tta(Config(cfg))
    # Every segmentation config names the model for --tta; without it nothing is augmented.
    export.refuse_tta(read_config(find_config(CONFIGS['seg'])))


def test_several_labels_per_image_are_refused(models, tmp_path):
    """Their probabilities are sigmoids, not a softmax."""
    cfg = copy.deepcopy(models['cls'].cfg)
    cfg.model.head.type = 'MultiLabelLinearClsHead'
    cfg.model.head.pop('topk')
    model = mmhrformer.get_model(cfg)
    with pytest.raises(ValueError, match='is a MultiLabelLinearClsHead: only classifiers with one'):
        export_onnx(model, tmp_path / 'a.onnx', (32, 32))


@pytest.mark.parametrize(
    ('task', 'head', 'kind', 'message'),
    [
        ('pose', 'SimCCHead', ValueError, 'is a SimCCHead, which returns several tensors'),
        ('pose', 'RegressionHead', ValueError, r'which returns shape \(2, 17, 2\), not heatmaps'),
        ('seg', 'PSPHead', ExportError, 'cannot export this model: .*adaptive_avg_pool2d'),
    ],
)
def test_heads_with_other_outputs_or_operators(task, head, kind, message, models, tmp_path):
    cfg = copy.deepcopy(models[task].cfg)
    size = dict(input_size=(96, 128))
    if task == 'seg':
        head = dict(cfg.model.decode_head[0], type=head, in_channels=64, in_index=3)
        for name in ('input_transform', 'loss_decode'):
            head.pop(name)
        cfg.model.update(type='EncoderDecoder', decode_head=head)
        cfg.model.pop('num_stages')
    elif head == 'SimCCHead':
        decoder = dict(type='SimCCLabel', **size)
        sizes = dict(size, in_featuremap_size=(24, 32), deconv_out_channels=None)
        cfg.model.head = dict(type=head, in_channels=16, out_channels=17, decoder=decoder, **sizes)
    else:
        cfg.model.neck = dict(type='GlobalAveragePooling')
        decoder = dict(type='RegressionLabel', **size)
        cfg.model.head = dict(type=head, in_channels=16, num_joints=17, decoder=decoder)
    with pytest.raises(kind, match=message):
        export_onnx(mmhrformer.get_model(cfg), tmp_path / 'a.onnx', (128, 96), verify=False)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_stays(models, tmp_path):
    file = tmp_path / 'a.onnx'
    file.write_bytes(b'mine')
    with pytest.raises(FileExistsError, match='choose another file'):
        export_onnx(models['pose'], file)
    assert file.read_bytes() == b'mine'


def test_missing_packages_are_named(models, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxslim', None)
    find_spec = export.importlib.util.find_spec
    gone = ('onnxruntime', 'onnxslim')
    monkeypatch.setattr(
        export.importlib.util, 'find_spec', lambda name: None if name in gone else find_spec(name)
    )
    message = 'needs onnxruntime, onnxslim: pip install onnx onnxruntime onnxslim'
    with pytest.raises(ImportError, match=message):
        export_onnx(models['pose'], tmp_path / 'a.onnx')
    export.require_packages(simplify=False, verify=False)


def test_binary_segmentation_with_one_channel(models, tmp_path):
    cfg = copy.deepcopy(models['seg'].cfg)
    head = cfg.model.decode_head[0]
    head.update(type='FCNHead', norm_cfg=dict(type='BN'), num_classes=2, out_channels=1)
    head.update(threshold=0.4)
    head.pop('loss_decode')
    cfg.model.update(type='EncoderDecoder', decode_head=head)
    cfg.model.pop('num_stages')
    cfg.dump(tmp_path / 'a.py')
    model = mmhrformer.get_model(str(tmp_path / 'a.py'))
    golden.recipe.fill_module(model)
    (row, *_) = export_onnx(model, tmp_path / 'a.onnx', (64, 64), simplify=False)
    assert row.good
    run, image = session(tmp_path / 'a.onnx'), golden.image((1, 3, 64, 96))
    (logits,) = run.run(None, {'image': image.numpy()})
    threshold = float(run.get_modelmeta().custom_metadata_map['threshold'])
    assert threshold == 0.4
    labels = torch.from_numpy(logits[0]).sigmoid() > threshold
    expected = model.predict(image)[0].pred_sem_seg.data
    assert labels.shape == expected.shape == (1, 64, 96)
    assert (labels == expected).float().mean() > 0.99  # some may be on the threshold
