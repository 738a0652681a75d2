"""dev/setup_env.py: what it decides, without network, compiler or real environment."""

import ast
import sys
from pathlib import Path

import pytest
import setup_env as env

SCRIPT = Path(env.__file__)
FILES = {
    'requirements/classic.txt': 'torch==2.1.2\nopencv-python-headless==4.11.0.86 ; x\n',
    'requirements/modern.txt': 'torch==2.13.0\nopencv-python-headless==5.0\n',
    'pyproject.toml': '[project]\n',
    'dev/setup_env.py': '# set-up\n',
    'configs/a.py': 'a = 1\n',
}
KEY = 'mmcv2.1.0-torch2.1.2-cp311-cpu'
WHEEL = 'mmcv-2.1.0-cp311-cp311-linux_x86_64.whl'


def write(path, text='x'):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with the files that the set-up looks at, on a machine with all that it needs."""
    for name, text in FILES.items():
        write(tmp_path / name, text)
    write(tmp_path / 'Python.h')
    monkeypatch.setattr(env, 'ROOT', tmp_path)
    monkeypatch.setattr(env.shutil, 'which', lambda name: f'/usr/bin/{name}')
    monkeypatch.setattr(env.sysconfig, 'get_path', lambda name: str(tmp_path))
    return tmp_path


@pytest.fixture
def make(checkout, monkeypatch):
    """Makes a set-up that runs nothing, but lists in ``commands`` what it would run."""

    def make(stack='classic', answer=('cpu', '')):
        setup = env.Setup(checkout / '.venv', checkout / 'cache', stack)
        setup.version, setup.commands = '3.11', []

        def call(*command, cwd=None, **environ):
            setup.commands.append(' '.join(map(str, command)))
            write(setup.python)
            write(setup.venv / 'pyvenv.cfg')
            if 'TMPDIR' in environ:
                assert environ['MMCV_WITH_OPS'] == '1'
                assert environ['CUDA_VISIBLE_DEVICES'] == ''
                write(Path(environ['TMPDIR']) / setup.built)

        monkeypatch.setattr(setup, 'call', call)
        monkeypatch.setattr(setup, 'ask', lambda *arguments: answer)
        return setup

    return make


@pytest.fixture
def setup(make):
    """A set-up of the classic stack, with a compiled mmcv in the cache."""
    setup = make()
    write(setup.wheels / KEY / WHEEL)
    return setup


def assert_order(commands, *steps):
    text = '\n'.join(commands)
    places = [text.index(step) for step in steps]
    assert places == sorted(places)


# ------------------------------------------------------------------ checks


def test_old_pythons_can_read_the_script():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


def test_python():
    env.check_python('3.10', 'classic')
    env.check_python('3.13', 'modern')
    for version in ('2.7', '3.9', '3.12'):
        with pytest.raises(SystemExit, match=r'3\.10 or 3\.11; this is Python'):
            env.check_python(version, 'classic')


def test_what_a_build_needs(checkout, make, monkeypatch):
    setup = make()
    setup.check()
    (checkout / 'Python.h').unlink()
    monkeypatch.setattr(env.os, 'geteuid', lambda: 1000)
    remedy = r'needs g\+\+ and .*Python\.h[^$]*sudo apt-get install build-essential python3\.11-dev'
    with pytest.raises(SystemExit, match=remedy):
        setup.run()
    assert not setup.venv.exists()
    write(setup.wheels / 'mmcv2.1.0-torch2.0.1-cp311-cpu' / WHEEL)  # for another torch
    with pytest.raises(SystemExit, match='must be compiled'):
        setup.check()
    write(setup.wheels / KEY / WHEEL)
    setup.check()


def test_a_folder_that_is_no_environment_is_kept(setup):
    write(setup.venv / 'thesis.tex')
    with pytest.raises(SystemExit, match='is not a virtual environment'):
        setup.run()
    assert (setup.venv / 'thesis.tex').exists()
    assert setup.commands == []


@pytest.mark.parametrize(
    ('environ', 'cores', 'memory_gb', 'jobs'),
    [({}, 4, 64, '4'), ({}, 16, 8, '5'), ({}, 4, 1, '1'), ({'MAX_JOBS': '3'}, 16, 64, '3')],
)
def test_jobs(environ, cores, memory_gb, jobs):
    assert env.compile_jobs(environ, cores, memory_gb) == jobs


def test_uv_gets_pips_index(make, monkeypatch):
    setup = make(answer=('/a\n/b', ''))
    setup.env = {'UV_FIND_LINKS': '/c'}  # of the user
    monkeypatch.delenv('PIP_INDEX_URL', raising=False)
    setup.point_uv_to_index()
    assert setup.env == {'UV_FIND_LINKS': '/c', 'UV_DEFAULT_INDEX': '/a,/b'}
    setup.env = {}
    monkeypatch.setenv('PIP_INDEX_URL', 'd')
    monkeypatch.setenv('PIP_FIND_LINKS', '/e /f')
    setup.point_uv_to_index()
    assert setup.env == {'UV_FIND_LINKS': '/e,/f', 'UV_DEFAULT_INDEX': 'd'}


# ------------------------------------------------------------------ runs


def test_all_steps_then_nothing(setup):
    setup.run()
    steps = ('-m venv', 'classic.txt', 'headless==4.11.0.86\n', '.whl', '-e ', 'mmpretrain')
    assert_order(setup.commands, *steps)
    setup.commands.clear()
    setup.run()
    assert setup.commands == []


def test_mmcv_is_compiled_into_the_cache(make):
    setup = make()
    setup.built = 'mmcv-2.1.0-py2.py3-none-any.whl'
    with pytest.raises(SystemExit, match='without its operators'):
        setup.run()
    assert not list(setup.wheels.rglob('*.whl'))
    setup.built = WHEEL
    setup.run()
    assert_order(setup.commands, '--no-cache-dir', f'{KEY}/{WHEEL}')
    assert sorted(path.name for path in setup.wheels.iterdir()) == ['.lock', KEY]


def test_modern_stack_and_operators_of_torchvision(make):
    name = 'requirements/torchvision_operators.py'
    setup = make('modern', answer=('', 'operator torchvision::nms does not exist'))
    write(env.ROOT / name, (SCRIPT.parents[1] / name).read_text())
    folder = setup.venv / 'lib/python3.11/site-packages'
    folder.mkdir(parents=True)
    write(setup.venv / 'pyvenv.cfg')
    setup.run()
    assert_order(setup.commands, '-m venv', 'modern.txt', 'headless==5.0\n', '-e ')
    assert 'wheel' not in '\n'.join(setup.commands)  # mmcv is not compiled
    assert (folder / 'torchvision_operators.pth').read_text() == 'import torchvision_operators\n'
    assert (folder / 'torchvision_operators.py').exists()


@pytest.mark.parametrize('stack', env.STACKS)
def test_stacks_are_pinned(stack):
    path = SCRIPT.parents[1] / f'requirements/{stack}.txt'
    assert f'{stack}.in' in path.read_text().splitlines()[1]
    lines = [line for line in path.read_text().splitlines() if line and line[0] not in '#-']
    assert all('==' in line for line in lines)
    names = {line.split('==')[0] for line in lines}
    assert {'torch', 'numpy', 'pytest', 'opencv-python-headless'} <= names
    # The wheel of mmcv that an index has knows no operators, or those of another torch.
    assert ('mmcv' in names) is False
    assert ('mmcv.ops' in env.STACKS[stack][1]) == ('mmpose' in names)


@pytest.mark.parametrize(
    ('name', 'commands'),
    [
        ('requirements/classic.txt', '-m venv'),
        ('dev/setup_env.py', '-m venv'),
        ('configs/a.py', '-e '),
        ('tools/new/b.py', '-e '),
        ('mmhrformer/models.py', ''),
        ('tools/__pycache__/other.pyc', ''),
    ],
)
def test_changes(setup, name, commands):
    setup.run()
    setup.commands.clear()
    write(env.ROOT / name, FILES['requirements/classic.txt'] + '# changed\n')
    setup.run()
    assert bool(setup.commands) == bool(commands)
    assert commands in '\n'.join(setup.commands[:1])
    assert setup.have_stamp() == setup.wanted_stamp()


@pytest.mark.parametrize('stamp', ['', 'half a st', None])
def test_environment_that_is_not_whole_is_made_anew(setup, stamp):
    setup.run()
    setup.commands.clear()
    if stamp is None:
        setup.python.unlink()
    else:
        setup.stamp.write_text(stamp)
    setup.run()
    assert '-m venv --clear' in setup.commands[0]


def test_failed_command(tmp_path, capfd):
    setup = env.Setup(tmp_path)
    with pytest.raises(SystemExit, match=r'exited with code 1\.\n  Fix: see the output above'):
        setup.call(sys.executable, '-c', "print('dns error', flush=True); 1 / 0")
    shown = capfd.readouterr()
    assert 'dns error' in shown.out
    assert 'ZeroDivisionError' in shown.err


def test_message(monkeypatch):
    def fail(version, stack):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(env, 'check_python', fail)
    with pytest.raises(SystemExit, match='No space left on device\n  Fix: free some disk space'):
        env.main([])
