"""`mim search`, `mim download` and `mim test` on a zoo that a server on this machine keeps."""

from __future__ import annotations

import contextlib
import hashlib
import io
import shutil
import sysconfig
import venv
from pathlib import Path

import golden
import pytest
import torch
import yaml
from http_server import Answer, Server
from places import ENV, ROOT, Place, run
from tiny_datasets import make

pytestmark = pytest.mark.e2e

CONFIG = 'hrformer-tiny_8xb128_in1k'
OPTIONS = [
    '--cfg-options',
    'test_dataloader.num_workers=0',
    'test_dataloader.persistent_workers=False',
    'test_dataloader.batch_size=3',
]


@pytest.fixture(scope='module')
def checkpoint() -> bytes:
    """An official checkpoint with numbers made from names."""
    buffer = io.BytesIO()
    torch.save(golden.official_checkpoint('cls', 'keys_cls_tiny.json'), buffer)
    return buffer.getvalue()


@pytest.fixture(scope='module')
def name(checkpoint) -> str:
    return f'hrt_tiny-{hashlib.sha256(checkpoint).hexdigest()[:8]}.pth'


@pytest.fixture(scope='module')
def server(checkpoint, name):
    with Server({f'/{name}': checkpoint}) as server:
        yield server


@pytest.fixture(scope='module')
def wheel(server, name, tmp_path_factory) -> Place:
    return install('wheel', server.url(name), tmp_path_factory.mktemp('wheel'))


@pytest.fixture(scope='module')
def editable(server, name, tmp_path_factory) -> Place:
    return install('editable', server.url(name), tmp_path_factory.mktemp('editable'))


@pytest.fixture
def place(request) -> Place:
    return request.getfixturevalue(request.param)


both = pytest.mark.parametrize(
    'place', ['wheel', pytest.param('editable', marks=pytest.mark.slow)], indirect=True
)


def redirect(metafile: Path, link: str) -> None:
    """Let the zoo's one link that programs can follow lead somewhere else."""
    content = yaml.safe_load(metafile.read_text())
    (entry,) = (entry for entry in content['Models'] if entry['Name'] == CONFIG)
    entry['Weights'] = link
    entry['Sources'][0].update(Link=link, Kind='file')
    metafile.write_text(yaml.safe_dump(content))


def install(kind: str, link: str, folder: Path) -> Place:
    """Install a copy of the project whose zoo has one link that works."""
    copy = folder / 'source'
    ignore = shutil.ignore_patterns('.venv*', '.git', 'data', 'demo_output', 'work_dirs', 'tests')
    shutil.copytree(ROOT, copy, ignore=ignore)
    redirect(copy / 'configs/hrformer_cls/metafile.yml', link)
    venv.create(folder / 'env', with_pip=True)
    python = str(folder / 'env/bin/python')
    (site,) = (folder / 'env').glob('lib/python*/site-packages')
    (site / 'base.pth').write_text(sysconfig.get_path('purelib'))
    command = ['install', '--no-deps', '--no-build-isolation', '-q']
    editable = ['-e'] if kind == 'editable' else []
    run([python, '-m', 'pip', *command, *editable, str(copy)], folder)
    make('imagenet', folder / 'data')
    place = Place(python, folder)
    where = place.where('mmhrformer')
    assert str(copy if editable else site) in where
    return place


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch, tmp_path):
    monkeypatch.setitem(ENV, 'no_proxy', '*')
    monkeypatch.setitem(ENV, 'MMHRFORMER_CACHE', str(tmp_path / 'cache'))


def fails(place: Place, *args: str) -> str:
    """Run a command that has to fail; return what it said."""
    with pytest.raises(AssertionError) as info:
        place.run(*args)
    return str(info.value)


@both
def test_search_lists_the_zoo(place):
    found = place.run('-m', 'mim', 'search', 'mmhrformer', '--model', 'hrformer-classification')
    assert CONFIG in found
    found = place.run('-m', 'mim', 'search', 'mmhrformer', '--config', CONFIG)
    assert 'hrt_tiny-' in found  # the link


@both
def test_download_and_test(place, name):
    place.run('-m', 'mim', 'download', 'mmhrformer', '--config', CONFIG, '--dest', 'zoo')
    config, weights = place.cwd / 'zoo' / f'{CONFIG}.py', place.cwd / 'zoo' / name
    assert config.is_file()
    assert weights.is_file()
    # By the framework, translated on the way in; and by our dispatcher, which sees to it itself.
    stock = ['mmpretrain', str(config), '--checkpoint', f'mmhrformer://{weights}']
    ours = ['mmhrformer', f'{CONFIG}.py', '--checkpoint', str(weights)]
    accuracies = set()
    for args in (stock, ours):
        out = place.run('-m', 'mim', 'test', *args, '--gpus', '0', *OPTIONS)
        (line,) = [line for line in out.splitlines() if 'accuracy/top1' in line]
        accuracies.add(line.split('accuracy/top1:')[1].split('data_time')[0].strip())
        assert 'do not match exactly' not in out
    assert len(accuracies) == 1


def test_by_name(wheel, server):
    """Without mim: downloaded by mmhrformer:// on the way."""
    before = len(server.requests)
    args = [CONFIG, f'mmhrformer://{CONFIG}', *OPTIONS]
    tool = wheel.cwd / 'source/tools/test.py'
    assert 'accuracy/top1' in wheel.run(str(tool), *args)
    assert len(server.requests) == before + 1


@pytest.mark.parametrize(
    'answer',
    [
        Answer(body=b'<!DOCTYPE html><html>please log in</html>'),
        pytest.param(Answer(status=404, body=b'<html>gone</html>'), marks=pytest.mark.slow),
        pytest.param(Answer(cut=100_000), marks=pytest.mark.slow),
        pytest.param(Answer(body=b'PK but something else'), marks=pytest.mark.slow),
    ],
    ids=['page', '404', 'cut off', 'wrong content'],
)
def test_what_mim_saved_unchecked_is_refused(wheel, server, name, answer, tmp_path):
    """mim keeps whatever came, under the right name; the dispatcher does not use it."""
    server.finally_ = answer
    try:
        download = ['mim', 'download', 'mmhrformer', '--config', CONFIG, '--dest', str(tmp_path)]
        # Now and then it does say that something went wrong.
        with contextlib.suppress(AssertionError):
            wheel.run('-m', *download)
    finally:
        server.finally_ = Answer()
    weights = tmp_path / name
    if weights.is_file():
        args = ['mmhrformer', f'{CONFIG}.py', '--checkpoint', str(weights), '--gpus', '0']
        assert 'is not what its name says' in fails(wheel, '-m', 'mim', 'test', *args)


def test_spoiled_downloads_by_name_say_why(wheel, server):
    tool = str(wheel.cwd / 'source/tools/test.py')
    try:
        server.finally_ = Answer(status=404)
        said = fails(wheel, tool, CONFIG, f'mmhrformer://{CONFIG}')
        assert 'the link is dead' in said
        assert 'Traceback' not in said
        server.finally_ = Answer(body=b'<!DOCTYPE html>')
        assert 'sent a web page' in fails(wheel, tool, CONFIG, f'mmhrformer://{CONFIG}')
    finally:
        server.finally_ = Answer()
