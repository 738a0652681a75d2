"""The command-line tools: the help of each has examples, and they run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import cv2
import pytest
from needs import needs

from mmhrformer.configs import find_config

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    path.stem: path for folder in ('tools', 'dev', 'demo') for path in (ROOT / folder).glob('*.py')
}
SCRIPTS['benchmark'] = ROOT / 'benchmarks/benchmark.py'
TOOLS = ROOT / 'tools'
ELSEWHERE = {'demo', 'export_onnx', 'onnx_pose'}  # have tests of their own
COMMANDS = sorted(
    name
    for name, path in SCRIPTS.items()
    if "if __name__ == '__main__':" in path.read_text() and name not in ELSEWHERE
)
# make and run_demo.py call these.
WITHOUT_EXAMPLE = {'demo_data', 'demo_pictures', 'setup_env'}
DIGITS = 'hrformer-demo_1xb64-6e_digits'
DEMOS = {
    'digits': DIGITS,
    'figures': 'td-hm_hrformer-demo_1xb16-2e_figures-96x128',
    'scenes': 'ocrnet_hrformer-demo_1xb16-100_scenes-96x96',
}


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Runs a tool in this process and in an empty folder; returns what it prints."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'path', [*{str(path.parent) for path in SCRIPTS.values()}, *sys.path])

    def call(name: str, *args: str) -> str:
        monkeypatch.setattr(sys, 'argv', [f'{name}.py', *map(str, args)])
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            try:
                runpy.run_path(str(SCRIPTS[name]), run_name='__main__')
            except SystemExit as exit:
                if exit.code:
                    raise
        return said.getvalue()

    return call


def examples(text: str, name: str) -> list[list[str]]:
    """The arguments of the examples in a help text."""
    lines = re.findall(rf'python3? (?:-m mmhrformer {name}|(?:dev|demo)/{name}\.py) *(.*)', text)
    return [shlex.split(line, comments=True) for line in lines]


def write_logs(folder: Path, lines: list[dict]) -> None:
    file = folder / '20260101_000000/vis_data/scalars.json'
    file.parent.mkdir(parents=True)
    file.write_text('\n'.join(map(json.dumps, lines)))


def epochs() -> list[dict]:
    """A log of mmengine for an epoch-based run."""
    lines = []
    for step in range(1, 9):
        epoch = (step + 3) // 4
        lines.append(dict(lr=1e-3, loss=8.0 / step, time=0.5, epoch=epoch, iter=step, step=step))
        if step % 4 == 0:
            lines.append({'coco/AP': 0.1 * step, 'time': 0.1, 'step': epoch})
    return lines


@pytest.fixture
def runs(tmp_path):
    for name in ('RUN', 'A', 'B'):
        write_logs(tmp_path / 'work_dirs' / name, epochs())


@pytest.mark.parametrize('name', COMMANDS)
def test_the_help_of_a_command_has_an_example(tool, name):
    said = tool(name, '--help')
    assert 'usage: ' in said
    assert examples(said, name) or name in WITHOUT_EXAMPLE


class TestGetFlops:
    def test_the_example_says_by_which_rule_it_counts(self, tool):
        (example,) = examples(tool('get_flops', '--help'), 'get_flops')
        said = tool('get_flops', *example)
        assert 'hrformer-tiny_8xb128_in1k at 256x192' in said
        counts = dict(re.findall(r'^  (.*\S) +([\d.,]+)(?: G)?$', said, flags=re.MULTILINE))
        assert list(counts) == [
            'parameters',
            'multiply-accumulates (MACs)',
            "FLOPs by the official code's rule",
        ]
        parameters, macs, flops = counts.values()
        assert parameters == '8,035,820'
        assert float(macs) < float(flops)

    def test_options_are_changed_as_in_the_stock_tools(self, tool):
        options = ['--cfg-options', 'model.head.num_classes=10', '--shape', '64']
        assert '6,007,310' in tool('get_flops', 'hrformer-tiny_8xb128_in1k', *options)

    @pytest.mark.parametrize('name', ['get_flops', 'print_config', 'browse_dataset'])
    def test_options_without_effect_are_refused(self, tool, name):
        with pytest.raises(SystemExit, match=r'backbone\.arch has no effect'):
            tool(name, 'hrformer-tiny_8xb128_in1k', '--cfg-options', 'backbone.arch=base')

    def test_a_size_that_cannot_be(self, tool):
        with pytest.raises(SystemExit, match='--shape 0 192'):
            tool('get_flops', 'hrformer-tiny_8xb128_in1k', '--shape', '0', '192')
        with pytest.raises(SystemExit, match='--shape 64 64 3: expected height and width'):
            tool('get_flops', 'hrformer-tiny_8xb128_in1k', '--shape', '64', '64', '3')

    @pytest.mark.parametrize(
        ('name', 'size'),
        [
            ('digits', '32x32'),
            pytest.param('figures', '128x96', marks=needs('mmpose')),
            pytest.param('scenes', '96x96', marks=needs('mmseg')),
        ],
    )
    def test_the_size_is_that_of_the_config(self, tool, name, size):
        assert f'{DEMOS[name]} at {size}\n' in tool('get_flops', DEMOS[name])

    @pytest.mark.parametrize(
        ('name', 'channels'),
        [
            ('digits', 1),
            pytest.param('figures', 4, marks=needs('mmpose')),
            pytest.param('scenes', 2, marks=needs('mmseg')),
        ],
    )
    def test_images_of_other_channels(self, tool, tmp_path, name, channels):
        """Some stock data preprocessors refuse such images."""
        means = dict(mean=[0.0] * channels, std=[1.0] * channels)
        changed = dict(backbone=dict(in_channels=channels), data_preprocessor=means)
        file = tmp_path / 'a.py'
        file.write_text(f'_base_ = {str(find_config(DEMOS[name]))!r}\nmodel = {changed!r}\n')
        counts = []
        for config in (DEMOS[name], file):
            said = tool('get_flops', config, '--shape', '64')
            assert ' at 64x64\n' in said
            counts.append(int(re.search(r'parameters +([\d,]+)', said)[1].replace(',', '')))
        assert counts[1] - counts[0] == (channels - 3) * 64 * 9  # of the first convolution


class TestPrintConfig:
    def test_the_example(self, tool):
        (example,) = examples(tool('print_config', '--help'), 'print_config')
        said = tool('print_config', *example)
        assert 'max_epochs=100' in said
        assert "type='mmhrformer.HRFormer'" in said  # inherited

    def test_the_file_is_a_config(self, tool, tmp_path):
        assert tool('print_config', DIGITS, '--out', 'new/whole.py') == ''
        assert '_base_' not in (tmp_path / 'new/whole.py').read_text()
        assert 'hrformer-demo' not in tool('print_config', 'new/whole.py')

    def test_an_unknown_config(self, tool):
        with pytest.raises(SystemExit, match='did you mean hrformer-tiny'):
            tool('print_config', 'hrformer-tny_8xb128_in1k')


class TestAnalyzeLogs:
    @pytest.mark.usefixtures('runs')
    def test_the_examples(self, tool):
        for example in examples(tool('analyze_logs', '--help'), 'analyze_logs'):
            said = tool('analyze_logs', *example)
            if '--out' in example:
                picture = cv2.imread(example[-1])
                assert picture.std() > 1  # something is drawn
            else:
                assert 'average iter time: 0.5000 s/iter' in said

    @pytest.mark.usefixtures('runs')
    def test_curves_have_the_names_of_the_runs(self, tool):
        namespace = runpy.run_path(str(TOOLS / 'analyze_logs.py'))
        logs = namespace['find_logs'](['work_dirs/A', 'work_dirs/B'])
        names = namespace['legends'](logs, ['loss', 'coco/AP'])
        assert names == ['A loss', 'A coco/AP', 'B loss', 'B coco/AP']
        again = namespace['legends']([logs[0], logs[0]], ['loss'])
        assert again[0] == 'A/20260101_000000 loss'

    @pytest.mark.usefixtures('runs')
    def test_an_unknown_key_is_answered_with_those_there_are(self, tool):
        with pytest.raises(SystemExit, match=r'Invalid key "AP".*coco/AP'):
            tool('analyze_logs', 'plot_curve', 'work_dirs/A', '--keys', 'AP')

    def test_a_folder_without_logs(self, tool, tmp_path):
        (tmp_path / 'empty').mkdir()
        with pytest.raises(SystemExit, match="there is no log in 'empty'"):
            tool('analyze_logs', 'plot_curve', 'empty')
        (tmp_path / 'run.log').write_text('no JSON')
        with pytest.raises(SystemExit, match=r"there is no log in 'run\.log'"):
            tool('analyze_logs', 'plot_curve', 'run.log')

    @needs('mmpose', 'mmseg')
    def test_what_to_install_where_no_script_can_draw(self, tool, monkeypatch):
        choose = runpy.run_path(str(TOOLS / 'analyze_logs.py'))['choose_script']
        monkeypatch.setitem(sys.modules, 'mmpretrain', None)
        monkeypatch.setitem(sys.modules, 'seaborn', None)
        with pytest.raises(ImportError, match='pip install seaborn'):
            choose('plot_curve')
        monkeypatch.setitem(sys.modules, 'mmpose', None)
        monkeypatch.setitem(sys.modules, 'mmseg', None)
        with pytest.raises(ImportError, match='pip install mmpretrain'):
            choose('plot_curve')


class TestBrowseDataset:
    @pytest.fixture
    def data(self, tool, tmp_path):
        """A little of each of the demo's datasets."""
        from demo_data import make_figures, make_scenes

        root = tmp_path / 'data/demo'
        make_figures(root, train=3, val=2)
        make_scenes(root, train=3, val=2)

    def pictures(self, folder: Path) -> list:
        return [cv2.imread(str(path)) for path in sorted(folder.iterdir())]

    def test_the_example(self, tool, tmp_path):
        tool('demo_data', '--task', 'cls', '--out', 'data/demo')
        (example,) = examples(tool('browse_dataset', '--help'), 'browse_dataset')
        said = tool('browse_dataset', *example)
        assert '4 of 1397 images of the train split drawn in digits' in said
        pictures = self.pictures(tmp_path / 'digits')
        assert [picture.shape for picture in pictures] == [(224, 224, 3)] * 4
        assert all(picture.std() > 10 for picture in pictures)

    @pytest.mark.e2e
    @pytest.mark.usefixtures('data')
    @pytest.mark.parametrize('name', ['figures', 'scenes'])
    def test_poses_and_scenes(self, tool, tmp_path, name):
        """The drawing has the colors of the labels, and is not the bare image."""
        tool('browse_dataset', DEMOS[name], '--split', 'val', '--number', '2')
        pictures = self.pictures(tmp_path / 'work_dirs/browse' / DEMOS[name])
        assert len(pictures) == 2
        images = tmp_path / 'data/demo' / name
        for picture in pictures:
            assert picture.std() > 10
            assert all(
                other.shape != picture.shape or (other != picture).any()
                for other in map(cv2.imread, map(str, images.rglob('*.jpg')))
            )

    @needs('mmpose', 'mmseg')
    @pytest.mark.usefixtures('data')
    def test_colors_are_those_of_the_data(self, tool, tmp_path):
        """Left limbs green and right ones orange, as COCO says; the classes of scenes likewise."""
        for name, colors in (
            ('figures', ([0, 255, 0], [255, 128, 0])),
            ('scenes', ([135, 190, 235],)),  # sky
        ):
            tool('browse_dataset', DEMOS[name], '--split', 'val', '--number', '1')
            (picture,) = self.pictures(tmp_path / 'work_dirs/browse' / DEMOS[name])
            (bare,) = list((tmp_path / 'data/demo' / name).rglob('val/*1.jpg'))[:1]
            for color in colors:
                near = [self.count(image, color) for image in (picture, cv2.imread(str(bare)))]
                assert near[0] > near[1] + 20, (name, color)

    def count(self, image, rgb) -> int:
        return (abs(image[..., ::-1].astype(int) - rgb) < 60).all(-1).sum()

    @pytest.mark.usefixtures('data')
    @needs('mmpose')
    def test_one_image_that_cannot_be_read(self, tool, tmp_path, capsys):
        images = sorted((tmp_path / 'data/demo/figures/val').glob('*.jpg'))
        images[0].write_text('this is text')
        said = tool('browse_dataset', DEMOS['figures'], '--split', 'val', '--number', '99')
        assert len(list((tmp_path / 'work_dirs/browse' / DEMOS['figures']).iterdir())) > 0
        assert 'images of the val split drawn' in said
        assert f'{images[0].name}' in capsys.readouterr().err
        for image in images:
            image.write_text('this is text')
        with pytest.raises(SystemExit, match=r'none of \d+ images could be drawn, image 0: '):
            tool('browse_dataset', DEMOS['figures'], '--split', 'val')

    def test_missing_data_are_named(self, tool):
        with pytest.raises(SystemExit, match=r'train_dataloader\.dataset\.data_root'):
            tool('browse_dataset', DIGITS)

    def test_a_number_that_cannot_be(self, tool):
        with pytest.raises(SystemExit, match='--number 0'):
            tool('browse_dataset', DIGITS, '--number', '0')
