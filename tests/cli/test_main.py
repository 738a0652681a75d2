"""``python -m mmhrformer COMMAND``: what one needs without mim."""

from __future__ import annotations

import sys

import pytest
from places import ROOT, Place, run

from mmhrformer.checkpoints import list_models, read_zoo
from mmhrformer.cli.main import COMMANDS, OTHER_TASK, TASKS, TOOLS, main
from mmhrformer.version import __version__

TINY = 'hrformer-tiny_8xb128_in1k'


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('MMHRFORMER_CACHE', str(tmp_path / 'cache'))
    (tmp_path / 'cache').mkdir()
    return tmp_path / 'cache'


@pytest.mark.parametrize(('args', 'status'), [([], 2), (['--help'], 0)])
def test_the_help_lists_the_commands(capsys, args, status):
    assert main(args) == status
    said = capsys.readouterr().out
    for name in ('train', 'test', 'download', 'list', 'demo', 'env'):
        assert f'\n  {name} ' in said


def test_the_version(capsys):
    assert main(['--version']) == main(['-V']) == 0
    assert capsys.readouterr().out == f'mmhrformer {__version__}\n' * 2


def test_an_unknown_command_is_an_error_that_lists_them(capsys):
    assert main(['trian']) == 2
    said = capsys.readouterr().err
    assert "'trian'" in said
    for name in COMMANDS:
        assert name in said


def test_the_list_has_every_model_and_says_who_reported_the_numbers(capsys):
    assert main(['list']) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert 'reported, not measured here' in head
    names = [row.split()[0] for row in rows if row]
    models, ablations = (names[: names.index('ablations')], names[names.index('ablations') + 1 :])
    assert sorted(models + ablations) == list_models()
    for part in (models, ablations):
        assert part == sorted(part)
    assert {read_zoo()[name].config.parent.name for name in ablations} == {'ablations'}
    assert not any(read_zoo()[name].is_ablation for name in models)
    (tiny,) = [row for row in rows if row.startswith(TINY)]
    assert 'Image Classification' in tiny
    assert '8.0 M' in tiny
    assert 'Top 1 Accuracy 78.6 reported by official repository' in tiny
    (pose,) = [
        row for row in rows if row.startswith('td-hm_hrformer-small_8xb32-210e_coco-256x192')
    ]
    assert 'AP 74.0 reported by official repository' in pose


def test_tasks_have_one_name_each(capsys):
    """The task is that of the metafiles, even for models without results."""
    assert main(['list']) == 0
    rows = [row for row in capsys.readouterr().out.splitlines() if '_' in row]
    tasks = {row.split()[0]: row[row.index('  ') :].strip().split('  ')[0] for row in rows}
    for name, model in read_zoo().items():
        assert tasks[name] in [*TASKS.values(), OTHER_TASK]
        assert {result['Task'] for result in model.results} <= {tasks[name]}
        scope = model.config.read_text() + name
        assert ('td-hm' in scope) == (tasks[name] == TASKS['td-hm'])


def test_the_list_can_be_narrowed(capsys):
    assert main(['list', 'ocrnet*']) == 0
    rows = [row for row in capsys.readouterr().out.splitlines()[1:] if '_' in row]
    assert rows
    assert all(row.startswith('ocrnet') for row in rows)
    assert any('mIoU 80.0 reported by official repository' in row for row in rows)
    assert main(['list', 'nothing*']) == 1
    assert "'nothing*'" in capsys.readouterr().err


def test_a_checkpoint_in_the_cache_is_found_and_copied(cache, tmp_path, capsys):
    source = read_zoo()[TINY].sources[0]
    file = cache / source.path(TINY).name
    file.write_bytes(b'weights')
    assert main(['download', TINY]) == 0
    assert capsys.readouterr().out.strip() == str(file)
    copy = tmp_path / 'new/folder' / file.name
    assert main(['download', TINY, '--dest', str(copy.parent)]) == 0
    assert capsys.readouterr().out.strip() == str(copy)
    assert copy.read_bytes() == b'weights'
    assert list(copy.parent.iterdir()) == [copy]


def test_a_download_that_cannot_be_done_tells_how(cache, capsys):
    assert main(['download', TINY]) == 1
    assert 'in a browser' in capsys.readouterr().err
    assert main(['download', 'hrformer-tny']) == 1
    assert "no model 'hrformer-tny'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ('name', 'options'),
    [('train', ['--resume', '--amp', '--cfg-options']), ('test', ['--out', '--cfg-options'])],
)
def test_training_and_testing_are_those_of_the_framework(capsys, name, options):
    path, argv = list(sys.path), list(sys.argv)
    assert main([name, '--help']) == 0
    sys.path[:], sys.argv[:] = path, argv
    said = capsys.readouterr().out
    assert f'Runs {name}.py of the framework that CONFIG is for' in said
    assert all(f'  {option} ' in said for option in ['--work-dir', '--launcher', *options])
    with pytest.raises(SystemExit, match="there is no config 'hrformer-tny'"):
        main([name, 'hrformer-tny'])


@pytest.mark.parametrize('name', TOOLS)
def test_tools_are_those_beside_the_configs(monkeypatch, name):
    ran = []
    monkeypatch.setattr('mmhrformer.cli.launch.run_script', lambda *call: ran.append(call))
    assert main([name, '--help']) == 0
    assert ran == [(ROOT / f'tools/{name}.py', ['--help'])]
    assert ran[0][0].is_file()


@pytest.mark.parametrize('command', ['list', 'download', 'env'])
def test_each_command_has_an_example(capsys, command):
    with pytest.raises(SystemExit) as exit:
        main([command, '--help'])
    assert exit.value.code == 0
    assert f'Example: python -m mmhrformer {command} ' in capsys.readouterr().out


@pytest.mark.e2e
@pytest.mark.slow
def test_a_run_without_mim(tmp_path):
    """Train and test, as ``python -m`` does it, where mim cannot be imported."""
    (tmp_path / 'mim.py').write_text('raise ImportError')
    data = ['--task', 'cls', '--out', str(tmp_path / 'data/demo')]
    run([sys.executable, 'demo/demo_data.py', *data], ROOT)
    place = Place(sys.executable, tmp_path)
    name = 'hrformer-demo_1xb64-6e_digits'
    few = ['train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=64']
    val = ['val_dataloader.dataset.indices=32', 'test_dataloader.dataset.indices=32']
    command = ['-m', 'mmhrformer', 'train', name, '--work-dir', 'work']
    place.run(*command, '--cfg-options', *few, *val)
    checkpoint = (tmp_path / 'work/last_checkpoint').read_text().strip()
    command = ['-m', 'mmhrformer', 'test', name, checkpoint, '--cfg-options', *val]
    assert 'accuracy/top1' in place.run(*command)
