"""Stock entry points train and test our configs from a wheel; the checkout: test_journeys.py."""

from __future__ import annotations

import json
import re

import pytest
from pages import OWN_DATA, commands_of, configs_of
from photographs import make_flowers
from places import Place

from mmhrformer.cli.main import TOOLS

pytestmark = pytest.mark.e2e

CONFIGS = {
    'mmpretrain': 'hrformer-demo_1xb64-6e_digits',
    'mmpose': 'td-hm_hrformer-demo_1xb16-2e_figures-96x128',
    'mmsegmentation': 'ocrnet_hrformer-demo_1xb16-100_scenes-96x96',
}
METRICS = {'mmpretrain': 'accuracy/top1', 'mmpose': 'coco/AP', 'mmsegmentation': 'mIoU'}
# A run of a few iterations; what is learned is tested by the demo.
SHORT = {
    'mmpretrain': ['train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=128'],
    'mmpose': ['train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=32'],
    'mmsegmentation': [
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'train_dataloader.batch_size=4',
    ],
}
SHORTER_TEST = [
    'val_dataloader.dataset.indices=8',
    'test_dataloader.dataset.indices=8',
]


def options(framework: str) -> list[str]:
    return ['--cfg-options', *SHORT[framework], *SHORTER_TEST]


def checkpoint_of(folder) -> str:
    return (folder / 'last_checkpoint').read_text().strip()


@pytest.fixture(scope='module')
def found(wheel) -> dict[str, str]:
    """Framework -> its config, and the address of a page; by one process, as imports take long."""
    code = f"""
import json
from mmhrformer.configs import find_config
from mmhrformer.utils.addresses import find_page
configs = {{scope: str(find_config(name)) for scope, name in {CONFIGS}.items()}}
print(json.dumps(configs | dict(page=find_page('docs/datasets.md'))))
"""
    return json.loads(wheel.run('-c', code))


@pytest.mark.parametrize(
    'framework',
    [
        pytest.param('mmpretrain', marks=pytest.mark.slow),
        pytest.param('mmpose', marks=pytest.mark.slow),
        'mmsegmentation',
    ],
)
def test_mim_from_a_wheel(wheel, found, framework):
    """`mim train FRAMEWORK CONFIG` and `mim test`, with the config inside the wheel."""
    config = found[framework]
    assert '.mim/configs' in config
    work = wheel.cwd / 'work' / framework
    args = [framework, config, '--gpus', '0', '--work-dir', str(work), *options(framework)]
    wheel.run('-m', 'mim', 'train', *args)
    args = [framework, config, '--checkpoint', checkpoint_of(work), '--gpus', '0']
    out = wheel.run('-m', 'mim', 'test', *args, '--cfg-options', *SHORTER_TEST)
    assert METRICS[framework] in out


@pytest.mark.parametrize('framework', ['mmpretrain'])
def test_mim_finds_our_configs_by_name(wheel, framework):
    """`mim train mmhrformer NAME.py` runs our dispatcher, which runs the stock tool."""
    work = wheel.cwd / 'work' / 'dispatched'
    name = CONFIGS[framework] + '.py'
    args = ['mmhrformer', name, '--gpus', '0', '--work-dir', str(work), *options(framework)]
    wheel.run('-m', 'mim', 'train', *args)
    args = ['mmhrformer', name, '--checkpoint', checkpoint_of(work), '--gpus', '0']
    out = wheel.run('-m', 'mim', 'test', *args, '--cfg-options', *SHORTER_TEST)
    assert METRICS[framework] in out


def test_the_wheel_has_what_users_run_and_no_more(wheel, found):
    (folder,) = wheel.cwd.glob('env/lib/python*/site-packages/mmhrformer/.mim')
    names = sorted(path.name for path in folder.iterdir())
    assert names == ['benchmarks', 'configs', 'model-index.yml', 'tools']
    assert {file.stem for file in folder.glob('tools/*.py')} == {'train', 'test', *TOOLS}
    assert all(file.stem.startswith('benchmark') for file in folder.glob('benchmarks/*.*'))
    assert found['page'].startswith('https://')  # the wheel has no docs
    assert '--candidates' in wheel.run('-m', 'mmhrformer', 'benchmark', '--help')


def test_own_photographs_without_a_clone(wheel, tmp_path):
    """The commands of docs/own_data.md, for the smallest base and one epoch."""
    place, name = Place(wheel.python, tmp_path), 'my_flowers'
    make_flowers(tmp_path / 'data/flowers')
    commands = commands_of(OWN_DATA)
    write, train = (words for words in commands if words[1:3] == ['-m', 'mmhrformer'])
    (on_cpu,) = (words[3:] for words in commands if words[-1] == 'load_from=None')
    write = [word.replace('small', 'tiny') for word in write]
    place.run(*write[1:])
    text = configs_of(OWN_DATA)[f'configs/my/{name}.py']
    text = re.sub(r'^_base_ = .*', f'_base_ = [{write[-1]!r}]', text, flags=re.M)
    (tmp_path / f'{name}.py').write_text(text)
    place.run(*train[1:], *on_cpu, 'train_cfg.max_epochs=1')
    weights = f'work_dirs/{name}/epoch_1.pth'
    assert METRICS['mmpretrain'] in place.run('-m', 'mmhrformer', 'test', train[-1], weights)


def test_mim_search_from_a_wheel(wheel):
    assert 'mmhrformer' in wheel.run('-m', 'mim', 'list')
