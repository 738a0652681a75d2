"""tools/benchmark.py: its statistics, counters and checks, and runs on a small model."""

import doctest
import importlib
import importlib.util
import json
import math
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from needs import needs
from torch import nn

from mmhrformer.models import hrformer

QUICK = ('--arch', 'tiny', '--size', '64x64', '--rounds', '2', '--warmup', '1', '--min-time', '0')


@pytest.fixture(scope='module')
def tool():
    """The modules of the tool; each holds what its name says."""
    names = ('benchmark', 'benchmark_measure', 'benchmark_peers', 'benchmark_steps')
    tool, measure, peers, steps = map(importlib.import_module, names)
    report = importlib.import_module('benchmark_report')
    return SimpleNamespace(main=tool, measure=measure, peers=peers, steps=steps, report=report)


@pytest.fixture
def shallow(tool, monkeypatch):
    """The tiny architecture with a block a stream and a module a stage, for speed."""
    arch = {**hrformer.ARCHS['tiny'], 'num_modules': (1, 1, 1), 'num_blocks': 1}
    monkeypatch.setitem(hrformer.ARCHS, 'tiny', arch)
    tool.peers.make_weights.cache_clear()
    yield
    tool.peers.make_weights.cache_clear()


@pytest.fixture
def clock(tool, monkeypatch):
    """A clock that only steps set on."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(tool.measure, 'timer', lambda: clock.now)
    return clock


# ------------------------------------------------------------------ statistics


def test_quartiles(tool):
    assert tool.measure.quartiles([7.0]) == [7.0, 7.0, 7.0]
    assert tool.measure.quartiles([4.0, 1.0, 3.0, 2.0]) == [1.75, 2.5, 3.25]


def test_ratio_of_medians_and_median_of_ratios(tool):
    found = tool.measure.summarize([1.0, 1.0, 4.0], baseline=[2.0, 3.0, 4.0])
    assert found['median'] == 1.0
    assert (found['q1'], found['q3']) == (1.0, 2.5)
    assert found['speedup'] == 3.0
    assert found['round_speedup'] == 2.0
    assert (found['round_speedup_q1'], found['round_speedup_q3']) == (1.5, 2.5)


def test_rounds_take_turns(tool, clock):
    log = []

    def step(name, seconds):
        def run():
            log.append(name)
            clock.now += seconds

        return run

    steps = {'a': step('a', 0.3), 'b': step('b', 2.0)}
    told = []
    found = tool.measure.time_rounds(steps, 3, 2, 1.0, lambda *turn: told.append(turn))
    assert ''.join(log) == 'aabb' + 'aaab' + 'baaa' + 'aaab'
    assert [found[name].number_per_run for name in 'ab'] == [3, 1]
    assert found['a'].times == pytest.approx([0.3] * 3)
    assert found['b'].times == pytest.approx([2.0] * 3)
    assert found['b'].metadata['first_call'] == pytest.approx(2.0)
    assert [(name, len(seconds)) for name, seconds in told] == [
        *(('a', 1), ('b', 1), ('b', 2), ('a', 2), ('a', 3), ('b', 3))
    ]


def test_growth_is_time_per_pixel(tool):
    small, large = tool.steps.Case((64, 64), 1), tool.steps.Case((128, 64), 2)
    spec, first = tool.measure.TaskSpec('', ''), dict(first_call=3.0)
    times = {
        (small, 'ours'): tool.measure.Measurement(1, [1.0, 2.0, 1.0], spec, first),
        (large, 'ours'): tool.measure.Measurement(2, [12.0, 24.0, 2.0], spec, first),
    }
    args = SimpleNamespace(cases=[small, large], baseline='ours')
    row = tool.main.describe(large, 'ours', times, args)
    assert row['growth'] == 1.5
    assert row['images_per_second'] == pytest.approx(2 / 6)
    assert row['case'] == '128x64 b2'
    assert (row['calls'], row['seconds'], row['first_call']) == (2, [6.0, 12.0, 1.0], 3.0)


# ------------------------------------------------------------------ counters


def test_saved_bytes(tool):
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    # The input, the input of GELU and its output, in floats of 4 bytes.
    expected = 4 * 5 * (8 + 16 + 16)
    assert tool.measure.saved_bytes(lambda: net(x), net.parameters()) == expected
    weights = 4 * (16 * 4)  # of the second layer: the first one's input needs no gradient
    assert tool.measure.saved_bytes(lambda: net(x)) == expected + weights


def test_saved_bytes_counts_a_storage_once(tool):
    x = torch.randn(10, 10, requires_grad=True)
    y = torch.randn(10, 10)
    assert tool.measure.saved_bytes(lambda: (x * y) + (x * y.T) + (x[0] * y[0])) == 400


def test_recomputed_blocks_save_only_their_input(tool):
    net = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    x = torch.randn(5, 8, requires_grad=True)

    def forward():
        return torch.utils.checkpoint.checkpoint(net, x, use_reentrant=False)

    assert tool.measure.saved_bytes(forward, net.parameters()) == 4 * 5 * 8


def test_profile(tool):
    conv, x = nn.Conv2d(3, 8, 3), torch.randn(1, 3, 8, 8)

    def step():
        with torch.no_grad():
            return conv(x).view(8, -1).relu().t().contiguous()

    found = tool.measure.profile(step, 'cpu')
    assert found['operators'] == 5
    assert found['kernels'] == 3  # convolution, ReLU, and the copy
    assert found['launches'] is None
    assert found['allocated'] >= 3 * 4 * 8 * 36
    assert sum(top['share'] for top in found['top']) <= 1 + 1e-9


def test_own_times_leave_out_what_is_called(tool):
    def node(name, duration, *children):
        return SimpleNamespace(name=name, duration_time_ns=duration, children=children)

    tree = node('outer', 100, node('middle', 70, node('inner', 30)), node('inner', 20))
    times = [(node.name, tool.measure._own_time(node)) for node in tool.measure._walk([tree])]
    assert times == [('outer', 10), ('middle', 40), ('inner', 30), ('inner', 20)]
    first, second = tool.measure._top(times, 2)
    assert first == dict(name='inner', share=0.5, calls=2)
    assert (second['name'], second['share']) == ('middle', 0.4)


def test_peak_memory(tool):
    def step():
        x = torch.ones(1000)
        y = x + 1
        del x
        return y * 2

    found = tool.measure.peak_memory(step, 'cpu')
    assert 2 * 4000 <= found < 2 * 4000 + 100  # numbers are tensors, too


def test_snippets_are_timed_in_turn(tool):
    late = 'clock = time.perf_counter; time.perf_counter = lambda: clock() + 1000'
    snippets = {'short': 'pass', 'long': late}
    found = tool.measure.time_snippets(snippets, rounds=2, threads=1)
    assert [len(seconds) for seconds in found.values()] == [2, 2]
    assert min(found['long']) >= 1000 > max(found['short'])
    with pytest.raises(RuntimeError, match=r'startup of wrong failed[\s\S]*ZeroDivisionError'):
        tool.measure.time_snippets({'wrong': '1 / 0'}, rounds=1, threads=1)


# ------------------------------------------------------------------ peers


@needs('mmpose')
@pytest.mark.parametrize('arch', ['small', 'base'])
def test_mmpose_backbone_is_the_one_of_its_config(tool, arch):
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    spec = tool.peers.parse_spec('mmpose')
    path = tool.peers.stock_path('mmpose', tool.peers.HRFORMER.format(arch))
    stock = plain(Config.fromfile(path).model.backbone.to_dict())
    made = tool.peers.model_config(spec, 'pose', arch, (256, 192), None, drop=True)
    made = plain(made.model.backbone.to_dict())
    assert made['extra']['stage4'].pop('multiscale_output') is False  # mmpose's default
    assert made['extra'].pop('upsample') == dict(mode='bilinear', align_corners=False)
    for backbone in (made, stock):
        assert backbone['extra'].pop('stage1')['num_channels'] == [64]  # it has no attention
    assert made['extra'] == stock['extra']


def test_names_of_candidates(tool):
    spec = tool.peers.parse_spec('ours-fused-compiled-nchw')
    assert spec.base == 'ours'
    assert spec.suffixes == {'fused', 'compiled', 'nchw'}
    assert tool.peers.parse_spec('hrnet-w32').suffixes == frozenset()
    assert tool.peers.parse_spec('ours-with-cp').suffixes == {'with-cp'}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('--candidates theirs', "no candidate 'theirs': choose one of ours, mmpose"),
        ('--candidates ours-fast', "no candidate 'ours-fast'"),
        ('--candidates mmpose-fused', 'only ours can be fused'),
        ('--candidates ours-padded', "'ours-padded': only fused models can be padded"),
        ('--candidates ours-cudagraph', 'ours-cudagraph: CUDA graphs need --device cuda'),
        ('--candidates ours-onnx --mode train', 'ours-onnx: exported files are measured with'),
        ('--candidates ours-onnx --dtype bf16', 'ours-onnx: exported files are measured with'),
        ('--candidates ours-fused-onnx', 'onnx cannot be combined with other suffixes'),
        ('--candidates ours-openvino-nchw', 'openvino cannot be combined with other suffixes'),
        ('--candidates ours-openvino --mode train', 'exported files are measured with'),
        ('--candidates ours-fused --mode train', 'ours-fused: fused models cannot be trained'),
        ('--candidates ours --baseline mmpose', '--baseline mmpose is not measured'),
        ('--candidates ours vit-s --task seg', 'no such model for task seg; choose from hrnet-w48'),
        ('--size 256', 'expected height x width'),
        ('--size 100x64', 'candidate mmpose needs multiples of 32'),
        ('--size 24x64 --candidates ours', 'at least 32x32'),
        ('--size 72x64 --candidates vit-b', 'vit-b needs multiples of 16'),
        ('--batch-size 0', "'0': expected a positive integer"),
        ('--threads two', "'two': expected a positive integer"),
        ('--dtype fp16', '--dtype fp16 needs --device cuda'),
        pytest.param(
            *('--task seg --arch tiny', 'no shipped config for task seg, arch tiny'),
            marks=needs('mmpose', 'mmseg'),
        ),
        pytest.param(
            *('--startup --arch tiny', '--startup compares only ours and mmpose'),
            marks=needs('mmpose'),
        ),
        ('--json /nowhere/a.json', 'there is no such folder'),
    ],
)
def test_argument_errors(tool, capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        tool.main.main(arguments.split())
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@needs('mmpose')
def test_odd_sizes_of_ours_alone(tool):
    args = tool.main.read_arguments(['--size', '97x161', '--candidates', 'ours'])
    assert args.cases == [tool.steps.Case((97, 161), 1, None)]
    assert args.baseline == 'ours'


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
def test_cuda_is_absent(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main.main(['--device', 'cuda'])
    assert 'torch sees no CUDA device' in capsys.readouterr().err


def test_framework_is_absent(tool, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        tool.peers.importlib.util,
        'find_spec',
        lambda name: None if name == 'mmpose' else find(name),
    )
    with pytest.raises(SystemExit):
        tool.main.main(['--task', 'cls', '--candidates', 'ours', 'mmpose'])
    assert 'candidate mmpose needs mmpose, which is not installed' in capsys.readouterr().err


def test_help_has_an_example(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main.main(['--help'])
    text = capsys.readouterr().out
    assert 'python -m mmhrformer benchmark --mode train' in text
    assert 'median over the rounds' in text


# ------------------------------------------------------------------ runs


@needs('mmpose')
def test_inference(tool, tmp_path, capsys):
    file = tmp_path / 'found.json'
    threads = torch.get_num_threads()
    options = ('--candidates', 'ours', 'mmpose', '--profile')
    assert tool.main.main([*QUICK, *options, '--json', str(file), '--table', '--memory']) == 0
    assert torch.get_num_threads() == threads
    text = capsys.readouterr().out
    for word in (
        'hardware',
        'load',
        '| case',
        '| 64x64 b1 |',
        'aten::',
    ):
        assert word in text
    found = json.loads(file.read_text())
    assert [row['candidate'] for row in found['results']] == ['ours', 'mmpose']
    version = found['environment']['versions']['torch']
    assert version.partition('+')[0] == torch.__version__.partition('+')[0]
    assert len(found['checks']) == 2
    assert all(check['equal'] and check['outputs'] < 1e-5 for check in found['checks'])
    for row in found['results']:
        assert len(row['seconds']) == 2
        assert 0 < row['q1'] <= row['median'] <= row['q3']
        assert row['profile']['kernels'] > 500
        assert 0 < row['peak'] < row['profile']['allocated']
    assert found['results'][-1]['speedup'] == found['results'][-1]['round_speedup'] == 1.0


@needs('mmpose')
@pytest.mark.usefixtures('shallow')
def test_training(tool, tmp_path, capsys):
    file = tmp_path / 'found.json'
    options = ('--mode', 'train', '--batch-size', '2', '--memory')
    assert tool.main.main([*QUICK, *options, '--json', str(file)]) == 0
    text = capsys.readouterr().out
    assert 'gradients by' in text
    assert 'saved MB' in text
    found = json.loads(file.read_text())
    assert all(check['gradients'] < 1e-3 for check in found['checks'])
    ours, mmpose = found['results']
    assert 0.1 * mmpose['saved'] < ours['saved'] < 0.85 * mmpose['saved']


@needs('mmpose')
def test_bytes_kept_for_the_backward_pass(tool):
    """HRFormer-S at the size of the paper, compared with mmpose's."""
    kept, images = {}, torch.rand(1, 3, 256, 192).to(memory_format=torch.channels_last)
    for name in ('ours', 'ours-with-cp', 'mmpose'):
        spec = tool.peers.parse_spec(name)
        network = tool.peers.build_network(spec, 'pose', 'small', (256, 192), None, True).train()
        weights = [*network.parameters(), *network.buffers()]
        kept[name] = tool.measure.saved_bytes(lambda: network(images), weights)  # noqa: B023
    assert kept['ours'] < 0.60 * kept['mmpose']
    assert kept['ours-with-cp'] < 0.15 * kept['mmpose']


@needs('mmpose')
@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize(
    'options',
    [
        pytest.param(
            ('--mode', 'train', '--batch-size', '2', '--dtype', 'bf16', '--no-drop'),
            marks=pytest.mark.slow,
        ),
        ('--dtype', 'bf16', '--channels-last'),
        pytest.param(('--window', '5', '7', '--threads', '2'), marks=pytest.mark.slow),
        ('--task', 'cls'),
    ],
)
def test_other_runs(tool, monkeypatch, capsys, options):
    threads = []  # asked for, not really used: the cores may be busy
    monkeypatch.setattr(torch, 'set_num_threads', threads.append)
    assert tool.main.main([*QUICK, *options, '--rounds', '1']) == 0
    if '--threads' in options:
        assert threads == [2, torch.get_num_threads()]
    text = capsys.readouterr().out
    assert text.count('equal ') >= 2
    assert 'DIFFERENT' not in text
    assert ('growth' in text) == ('--window' in options)


@needs('mmpose')
@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize('name', ['ours-onnx', pytest.param('mmpose-onnx', marks=pytest.mark.slow)])
def test_exported_files(tool, capsys, name):
    pytest.importorskip('onnxslim')
    options = ('--candidates', 'ours', name, '--baseline', 'ours', '--memory', '--rounds', '1')
    assert tool.main.main([*QUICK, *options]) == 0
    assert f'equal     {name}' in capsys.readouterr().out


@needs('mmpretrain')
@pytest.mark.usefixtures('shallow')
def test_classification_without_mmpose(tool, capsys):
    options = ('--task', 'cls', '--candidates', 'ours', 'ours-fused', '--rounds', '1')
    assert tool.main.main([*QUICK, *options]) == 0
    assert 'equal     ours-fused' in capsys.readouterr().out


@needs('mmpose')
@pytest.mark.usefixtures('shallow')
@pytest.mark.parametrize('mode', [pytest.param('infer', marks=pytest.mark.slow), 'train'])
def test_unequal_models_are_refused(tool, monkeypatch, tmp_path, capsys, mode):
    right = tool.peers.to_dialect

    def wrong(*args, **kwargs):
        tensors = right(*args, **kwargs)
        name = 'stage4.0.branches.0.0.attn.attn.proj.weight'
        return {**tensors, name: 1.1 * tensors[name]}

    monkeypatch.setattr(tool.peers, 'to_dialect', wrong)
    file = tmp_path / 'found.json'
    command = [*QUICK, '--mode', mode, '--batch-size', '2', '--json', str(file)]
    assert tool.main.main(command) == 1
    output = capsys.readouterr()
    assert 'not timed, since these give other results than ours: mmpose (64x64 b2)' in output.err
    assert 'speed-up' not in output.out
    assert not file.exists()
    assert tool.main.main([*command, '--allow-different']) == 0
    checks = json.loads(file.read_text())['checks']
    assert [check['equal'] for check in checks] == [True, False]


def test_differences(tool):
    outs, same = [torch.tensor([0.0, 2.0])], [torch.tensor([0.0, 2.0])]
    assert tool.steps.output_difference(outs, same) == 0
    assert tool.steps.output_difference([torch.tensor([0.5, 2.0])], same) == 0.25
    assert tool.steps.output_difference([torch.zeros(3)], same) == math.inf
    assert math.isnan(tool.steps.output_difference([torch.tensor([0.0, math.nan])], same))
    grads = {'a': torch.tensor([3.0]), 'b': torch.tensor([4.0])}
    assert tool.steps.gradient_difference(grads, grads) == 0
    assert tool.steps.gradient_difference({**grads, 'a': torch.tensor([5.5])}, grads) == 0.5
    assert tool.steps.gradient_difference({'a': grads['a']}, grads) == math.inf


def test_examples(tool):
    for module in (tool.measure, tool.peers):
        found = doctest.testmod(module)
        assert found.attempted > found.failed == 0


@pytest.mark.slow
@needs('mmpose')
@pytest.mark.usefixtures('shallow')
def test_stock_peers(tool, capsys):
    options = ('--candidates', 'ours', 'hrnet-w32', 'vit-s', '--rounds', '1')
    assert tool.main.main([*QUICK, *options]) == 0
    text = capsys.readouterr().out
    assert 'hrnet-w32' in text
    assert 'vit-s' in text
    assert 'relative to ours' in text
