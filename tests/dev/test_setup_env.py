"""dev/setup_env.py: what it decides, without network, compiler or real environment."""

import ast
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / 'dev' / 'setup_env.py'
SPEC = importlib.util.spec_from_file_location('setup_env', SCRIPT)
env = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(env)

FILES = {
    'requirements/classic.txt': 'torch==2.1.2\nopencv-python-headless==4.11.0.86 ; x\n',
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
def setup(tmp_path, monkeypatch):
    """A set-up in a checkout with the files that it looks at, on a machine with all it needs."""
    for name, text in FILES.items():
        write(tmp_path / name, text)
    monkeypatch.setattr(env.shutil, 'which', lambda name: f'/usr/bin/{name}')
    monkeypatch.setattr(env.sysconfig, 'get_path', lambda name: str(tmp_path))
    write(tmp_path / 'Python.h')
    monkeypatch.setattr(env.shutil, 'disk_usage', lambda path: SimpleNamespace(free=20e9))
    setup = env.Setup(tmp_path, str(tmp_path / '.venv'), tmp_path / 'cache')
    setup.version = '3.11'
    return setup


@pytest.fixture
def commands(setup, monkeypatch):
    """What the set-up would run; nothing of it is run."""
    commands = []

    def call(what, command, cwd=None, **environ):
        commands.append(' '.join(map(str, command)))
        setup.venv.mkdir(exist_ok=True)
        write(setup.python)

    write(setup.wheels / KEY / WHEEL)
    monkeypatch.setattr(setup, 'call', call)
    monkeypatch.setattr(setup, 'uv_install', lambda what, *args: call(what, ['install', *args]))
    monkeypatch.setattr(setup, 'last_output', lambda: 'a warning\ncpu\n')
    return commands


def test_old_pythons_can_read_the_script():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


class TestChecks:
    def test_python(self):
        env.check_python((3, 10, 13))
        env.check_python((3, 11, 0, 'final', 0))
        for version in ((2, 7, 18), (3, 9, 18), (3, 12, 1)):
            with pytest.raises(env.SetupError, match=r'3\.10 or 3\.11; this is Python'):
                env.check_python(version)

    def test_nothing_is_missing(self, setup):
        assert setup.problems() == []

    def test_everything_missing_is_told_at_once(self, setup, monkeypatch):
        monkeypatch.setattr(env.importlib.util, 'find_spec', lambda name: None)
        monkeypatch.setattr(env.shutil, 'which', lambda name: None)
        monkeypatch.setattr(env.shutil, 'disk_usage', lambda path: SimpleNamespace(free=3.21e9))
        (setup.root / 'Python.h').unlink()
        monkeypatch.setattr(env.os, 'geteuid', lambda: 1000)
        (_, venv), (what, compiler), (disk, _) = setup.problems()
        assert venv == 'sudo apt-get install python3.11-venv'
        assert 'C++ compiler (g++), no Python.h' in what
        assert compiler == 'sudo apt-get install build-essential python3.11-dev'
        assert '3.2 GB free, 8 GB needed' in disk
        with pytest.raises(env.SetupError, match='disk space'):
            setup.run()
        assert not setup.venv.exists()

    def test_a_cached_wheel_needs_no_compiler_and_less_disk(self, setup, monkeypatch):
        monkeypatch.setattr(env.shutil, 'which', lambda name: None)
        monkeypatch.setattr(env.shutil, 'disk_usage', lambda path: SimpleNamespace(free=3e9))
        write(setup.wheels / 'mmcv2.1.0-torch2.0.1-cp311-cpu' / WHEEL)
        assert len(setup.problems()) == 2
        write(setup.wheels / KEY / WHEEL)
        assert setup.problems() == []

    def test_a_folder_that_is_no_environment_is_kept(self, setup, commands):
        write(setup.venv / 'thesis.tex')
        with pytest.raises(env.SetupError, match='no virtual environment'):
            setup.run()
        assert (setup.venv / 'thesis.tex').exists()
        assert commands == []


@pytest.mark.parametrize(
    ('text', 'word'),
    [
        ('  Caused by: dns error\n', 'network'),
        ("connection broken by 'NewConnectionError(...)'", 'network'),
        ('Could not find a version (from versions: none)', 'network'),
        ('No space left on device\nninja: build stopped: subcommand failed.', 'disk is full'),
        ("error: command '/usr/bin/g++' failed with exit code 1", 'build-essential'),
        ('c++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
        ('invalid peer certificate: UnknownIssuer', 'SSL_CERT_FILE'),
        ('PermissionError: [Errno 13] Permission denied', 'cannot be written'),
        ('something nobody foresaw', 'Read the end of the log'),
    ],
)
def test_remedy(text, word):
    assert word in env.remedy_for(text)


def test_progress():
    compiling = '  [1/77] c++ a\n warning\n  [12/77] c++ b\n'
    assert env.progress_of(compiling) == ', 12 of 77 files compiled'
    text = 'Downloading torch (640.0MiB)\nDownloading numpy (17.0MiB)\n Downloaded numpy\n'
    assert env.progress_of(text) == ', 1 of 2 large downloads done'
    assert env.progress_of('Resolved 100 packages') == ''


def test_duration():
    texts = ['0 s', '1 min 00 s', '7 min 14 s']
    assert [env.duration(seconds) for seconds in (0.4, 59.9, 434)] == texts


def test_jobs():
    assert env.compile_jobs({}, cores=4, memory_gb=64) == 4
    assert env.compile_jobs({}, cores=16, memory_gb=8) == 5
    assert env.compile_jobs({}, cores=4, memory_gb=1) == 1
    assert env.compile_jobs({'MAX_JOBS': '3'}, cores=16, memory_gb=64) == 3


def test_uv_gets_pips_index():
    links = env.index_env({}, '', '/a\n/b\n')
    assert links == {'UV_FIND_LINKS': '/a,/b'}
    assert env.index_env({'PIP_FIND_LINKS': '/c'}, '', '/a') == {'UV_FIND_LINKS': '/c'}
    assert env.index_env({'UV_FIND_LINKS': '/d'}, '', '/a') == {}
    assert env.index_env({}, 'https://a/simple\n') == {'UV_DEFAULT_INDEX': 'https://a/simple'}
    assert env.index_env({'PIP_INDEX_URL': 'b'}, 'a') == {'UV_DEFAULT_INDEX': 'b'}
    assert env.index_env({'UV_INDEX_URL': 'c', 'PIP_INDEX_URL': 'b'}, 'a') == {}
    assert env.index_env({}, '') == {}


class TestBuild:
    def build(self, setup, monkeypatch, name):
        """Build with a stand-in for the compiler; returns its command and environment."""
        calls = []

        def call(what, command, **environ):
            calls.append((command, environ))
            write(Path(environ['TMPDIR']) / name)

        setup.wheels.mkdir(parents=True)
        write(setup.log, '')
        monkeypatch.setattr(setup, 'uv_install', lambda *_: None)
        monkeypatch.setattr(setup, 'call', call)
        setup.build_mmcv(setup.wheel_folder('cpu'))
        return calls[0]

    def test_wheel_goes_to_the_cache(self, setup, monkeypatch):
        command, environ = self.build(setup, monkeypatch, WHEEL)
        assert [path.name for path in setup.wheels.rglob('*')] == [KEY, WHEEL]
        assert command[-1] == 'mmcv==2.1.0'
        assert '--no-cache-dir' in command
        assert environ['MMCV_WITH_OPS'] == '1'
        assert environ['CUDA_VISIBLE_DEVICES'] == ''

    def test_wheel_without_operators_is_refused(self, setup, monkeypatch):
        with pytest.raises(env.SetupError, match='without its operators'):
            self.build(setup, monkeypatch, 'mmcv-2.1.0-py2.py3-none-any.whl')
        assert list(setup.wheels.iterdir()) == []


class TestRun:
    def test_all_steps_then_nothing(self, setup, commands):
        setup.run()
        text = '\n'.join(commands)
        steps = ('-m venv', 'classic.txt', 'headless==4.11.0.86\n', '.whl', '-e .', 'mmpretrain')
        places = [text.index(step) for step in steps]
        assert places == sorted(places)
        commands.clear()
        setup.run()
        assert commands == []

    def test_modern_stack_compiles_nothing(self, setup, commands):
        setup.stack = env.STACKS['modern']
        write(setup.root / 'requirements/modern.txt', 'opencv-python-headless==5.0\n')
        assert not setup.must_compile()
        setup.run()
        text = '\n'.join(commands)
        steps = ('-m venv', 'modern.txt', 'headless==5.0\n', 'import torchvision', '-e .')
        places = [text.index(step) for step in steps]
        assert places == sorted(places)
        assert '.whl' not in text

    @pytest.mark.parametrize('name', env.STACKS)
    def test_stacks_are_pinned(self, name):
        stack = env.STACKS[name]
        path = SCRIPT.parents[1] / stack.requirements
        assert path.with_suffix('.in').name in path.read_text().splitlines()[1]
        lines = [line for line in path.read_text().splitlines() if line and line[0] not in '#-']
        assert all('==' in line for line in lines)
        names = {line.split('==')[0] for line in lines}
        assert {'torch', 'numpy', 'pytest', 'opencv-python-headless'} <= names
        # The wheel of mmcv that an index has knows no operators, or those of another torch.
        assert ('mmcv' in names) is False
        assert stack.has_operators == ('mmpose' in names)

    def test_operators_of_torchvision_are_declared_if_missing(self, setup, commands, monkeypatch):
        name = 'requirements/torchvision_operators.py'
        write(setup.root / name, (SCRIPT.parents[1] / name).read_text())
        folder = setup.venv / 'lib/python3.11/site-packages'
        folder.mkdir(parents=True)

        def call(what, command, cwd=None):
            if not (folder / 'torchvision_operators.pth').exists():
                problem = (what, 'read the log')
                raise env.SetupError([problem], 'operator torchvision::nms does not exist')

        monkeypatch.setattr(setup, 'call', call)
        setup.declare_operators()
        assert (folder / 'torchvision_operators.py').exists()

    @pytest.mark.parametrize(
        ('name', 'work'),
        [
            ('requirements/classic.txt', 'all'),
            ('dev/setup_env.py', 'all'),
            ('configs/a.py', 'copies'),
            ('configs/new/b.py', 'copies'),
            ('tools/other.py', 'copies'),
            ('mmhrformer/models.py', 'nothing'),
            ('tools/__pycache__/other.pyc', 'nothing'),
        ],
    )
    def test_changes(self, setup, commands, name, work):
        setup.run()
        write(setup.root / name, FILES['requirements/classic.txt'] + '# changed\n')
        assert setup.work() == work

    def test_changed_config_only_reinstalls_the_project(self, setup, commands):
        setup.run()
        commands.clear()
        (setup.root / 'configs/a.py').rename(setup.root / 'configs/b.py')
        setup.run()
        assert len(commands) == 1
        assert commands[0].endswith('-e .')
        assert setup.work() == 'nothing'

    @pytest.mark.parametrize('stamp', ['', 'half a st', '[]', '{}', 'moved', 'no python'])
    def test_environment_that_is_not_whole_is_made_anew(self, setup, commands, stamp):
        setup.run()
        package = write(setup.venv / 'lib/package.py')
        if stamp == 'no python':
            setup.python.unlink()
        elif stamp == 'moved':
            have = json.loads(setup.stamp.read_text())
            setup.stamp.write_text(json.dumps({**have, 'places': ['/old', '/old/.venv']}))
        else:
            setup.stamp.write_text(stamp)
        setup.run()
        assert not package.exists()
        assert setup.work() == 'nothing'


class TestFailures:
    def test_failed_command(self, setup, capsys):
        write(setup.log, '\n$ earlier\nNo space left on device\n')
        setup.line = env.Line('')
        with pytest.raises(env.SetupError) as caught:
            setup.call('The step', [sys.executable, '-c', "print('dns error'); 1 / 0"])
        env.report(caught.value, '.venv/setup.log')
        text = capsys.readouterr().err
        assert 'error: The step failed.' in text
        assert '| dns error' in text
        assert '| ZeroDivisionError' in text
        assert 'log:    .venv/setup.log' in text
        assert 'network' in text

    def test_message(self, monkeypatch, capsys):
        def fail(version, fitting):
            raise OSError(28, 'No space left on device')

        monkeypatch.setattr(env, 'check_python', fail)
        assert env.main([]) == 1
        assert 'disk is full' in capsys.readouterr().err
