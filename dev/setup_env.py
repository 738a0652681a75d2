#!/usr/bin/env python3
"""Make the Python environment of this checkout, or bring it up to date.

    python3 dev/setup_env.py [--stack classic] [--venv .venv] [--cache DIR]

It installs the pinned packages of requirements/classic.txt, mmcv with its compiled operators
(built once per user, then taken from the cache folder) and this project as an editable install.
The other stacks have current torch and NumPy: "modern" the core and classification, without mmcv's
operators; "modern-all" all three tasks; "forks" the maintained forks of the OpenMMLab packages.
A stamp notes what the environment was made from: if nothing changed, nothing is done; if only
configs/ or tools/ did, their installed copies are renewed; else the environment is made anew,
which is cheap because uv keeps what it downloaded. So an interrupted call is repaired by the next.

Only the standard library is used, and no syntax newer than Python 3.6, so that an old Python
gets as far as the sentence that says which Python is needed.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Stack = namedtuple('Stack', 'requirements pythons imports has_operators')
STACKS = {
    'classic': Stack(
        'requirements/classic.txt',
        ((3, 10), (3, 11)),
        ('torch', 'mmcv.ops', 'mmpretrain', 'mmpose.models', 'mmseg.models', 'mmhrformer'),
        True,
    ),
    'modern': Stack(
        'requirements/modern.txt',
        ((3, 11), (3, 12), (3, 13)),
        ('torch', 'mmcv', 'mmpretrain.models', 'mmpretrain.datasets', 'mmhrformer'),
        False,
    ),
    'modern-all': Stack(
        'requirements/modern-all.txt',
        ((3, 11),),
        ('torch', 'mmcv.ops', 'mmpretrain.models', 'mmpose.models', 'mmseg.models', 'mmhrformer'),
        True,
    ),
    'forks': Stack(
        'requirements/forks.txt',
        ((3, 11),),
        ('torch', 'mmcv', 'mmpretrain.models', 'mmseg.models', 'mmhrformer'),
        False,
    ),
}
MMCV = '2.1.0'
UV = 'uv>=0.13.8,<1'
NEW_GB = 8  # 5.3 GB of packages, the mmcv build, and what the demo and the tests write
AGAIN_GB = 2  # uv's cache has the packages and shares their files
COMPILE_MINUTES = 16  # mmcv's operators for the CPU, on one core
COMPILE_JOB_GB = 1.5  # memory of one compiler process on torch's headers
CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmhrformer'

# Run by the environment's Python. To compile for a GPU takes a CUDA compiler that torch accepts.
PRINT_ACCELERATOR = """
import subprocess, torch
from torch.utils.cpp_extension import CUDA_HOME
tag, cuda = 'cpu', torch.version.cuda or ''
if torch.cuda.is_available() and CUDA_HOME:
    nvcc = subprocess.check_output([CUDA_HOME + '/bin/nvcc', '--version'], text=True)
    if f'release {cuda.split(".")[0]}.' in nvcc:
        tag = 'cu' + cuda.replace('.', '')
print('\\n' + tag)
"""
CHECK_IMPORTS = """
import importlib, sys
for name in sys.argv[1:]:
    print('importing', name, flush=True)
    importlib.import_module(name)
"""


class SetupError(Exception):
    """Foreseeable problems: what is wrong and what to do, and the output of a failed command."""

    def __init__(self, problems, output=''):
        super().__init__('; '.join(what for what, _ in problems))
        self.problems, self.output = problems, output


def apt_install(packages):
    """The command that installs Debian packages, for the user who is asking."""
    return '{}apt-get install {}'.format('' if os.geteuid() == 0 else 'sudo ', packages)


def check_python(version_info, fitting=STACKS['classic'].pythons):
    """Refuse a Python that the stack has no packages for."""
    if tuple(version_info[:2]) not in fitting:
        found = '.'.join(str(part) for part in version_info[:3])
        fitting = ' or '.join('{}.{}'.format(*version) for version in fitting)
        remedy = (
            'Name a fitting one: make PYTHON=/path/to/python3.11. If there is none: '
            + apt_install('python3.11-venv python3.11-dev')
            + ' (Debian 12; python3.10-... on Ubuntu 22.04), or on newer systems '
            '"uv python install 3.11" and make PYTHON="$(uv python find 3.11)".'
        )
        raise SetupError([(f'This needs Python {fitting}; this is Python {found}.', remedy)])


REMEDIES = {  # by what a failing command printed; the first that fits counts
    'No space left on device|Disk quota exceeded': (
        f'The disk is full. Free some space (a new environment takes about {NEW_GB} GB).'
    ),
    'Killed signal terminated program|virtual memory exhausted|Cannot allocate memory': (
        'The memory was not enough. Close programs, or compile one by one: MAX_JOBS=1 make env.'
    ),
    'CERTIFICATE_VERIFY_FAILED|invalid peer certificate|SSLCertVerificationError': (
        "The package index's certificate was not accepted. Behind a proxy with an own "
        'certificate, name its file: SSL_CERT_FILE=/path/to/ca.crt (uv) and PIP_CERT (pip).'
    ),
    'name resolution|dns error|error sending request|Connection ?(Error|refused|reset|timed)|'
    'connection broken by|TimeoutError|operation timed out|unreachable|network was disabled|'
    'from versions: none': (
        'The package index could not be reached. Check the network; behind a proxy set '
        'HTTPS_PROXY, with a mirror set UV_DEFAULT_INDEX and PIP_INDEX_URL to it. What was '
        'downloaded so far is kept.'
    ),
    'Permission denied|Read-only file system': (
        'A folder cannot be written. The environment goes to VENV (.venv), the compiled mmcv to '
        '${XDG_CACHE_HOME:-~/.cache}/mmhrformer, downloads to UV_CACHE_DIR.'
    ),
    "command '[^']+' failed|ninja: build stopped|fatal error:": (
        'The compiler failed; the first line with "error:" in the log tells why. If a program or '
        'header is missing: ' + apt_install('build-essential python3-dev')
    ),
    '': 'Read the end of the log, then run the same command again.',
}


def remedy_for(text):
    """What to do about a failure, judged from what the failing command printed."""
    return next(remedy for signs, remedy in REMEDIES.items() if re.search(signs, text))


def index_env(environ, pip_index, pip_links=''):
    """Hand uv the places that pip was told to use; uv does not read pip's settings."""
    result = {}
    index = environ.get('PIP_INDEX_URL') or pip_index.strip()
    known = any(name in environ for name in ('UV_DEFAULT_INDEX', 'UV_INDEX_URL', 'UV_INDEX'))
    if index and not known:
        result['UV_DEFAULT_INDEX'] = index
    links = environ.get('PIP_FIND_LINKS') or pip_links
    if links.split() and 'UV_FIND_LINKS' not in environ:
        result['UV_FIND_LINKS'] = ','.join(links.split())
    return result


def compile_jobs(environ, cores, memory_gb):
    """One compiler per core, unless the user says otherwise or the memory is small."""
    if environ.get('MAX_JOBS', '').isdigit():
        return max(1, int(environ['MAX_JOBS']))
    return max(1, min(cores, int(memory_gb / COMPILE_JOB_GB)))


def digest(root, names):
    """One hash over names and contents of files."""
    result = hashlib.sha256()
    for name in sorted(names):
        content = (root / name).read_bytes()
        result.update(f'{name}\0{len(content)}\0'.encode() + content)
    return result.hexdigest()


def wanted_stamp(root, venv, requirements):
    """What an up-to-date environment was made from."""
    paths = [path for top in ('configs', 'tools') for path in (root / top).rglob('*')]
    copied = [path for path in paths if path.is_file() and path.suffix != '.pyc']
    return {
        'places': [str(root), str(venv)],  # the installed scripts hold them
        'packages': digest(root, [requirements, 'pyproject.toml', 'dev/setup_env.py']),
        'copies': digest(root, [str(path.relative_to(root)) for path in copied]),
    }


def read_stamp(path):
    """The stamp of an environment; an empty one if it is missing or broken."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def duration(seconds):
    """Say a time: '12 s', '7 min 05 s'."""
    minutes, seconds = divmod(round(seconds), 60)
    return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'


def progress_of(text):
    """How far a command is, from what it printed so far: ninja's [12/77] or uv's downloads."""
    compiled = re.findall(r'^\s*\[(\d+)/(\d+)\]', text, flags=re.MULTILINE)
    if compiled:
        return ', {} of {} files compiled'.format(*compiled[-1])
    started = len(re.findall(r'^\s*Downloading \S+ \(', text, flags=re.MULTILINE))
    finished = len(re.findall(r'^\s*Downloaded \S+', text, flags=re.MULTILINE))
    return f', {finished} of {started} large downloads done' if started > finished else ''


class Line:
    """The line of one step: what is done, for how long, how far it is."""

    def __init__(self, title):
        self.title, self.start = title, time.time()
        self.told = self.start
        print(f'{title} ... ', end='', flush=True)

    def beat(self, progress):
        """Tell that it goes on: every second on a terminal, every minute in a file."""
        now = time.time()
        spent = duration(now - self.start) + progress
        if sys.stdout.isatty():
            # A line that wraps cannot be rewritten: cut the title.
            width = shutil.get_terminal_size().columns - len(spent) - 6
            print(f'\r\033[K{self.title[:width]} ... {spent}', end='', flush=True)
        elif now - self.told >= 60:
            self.told = now
            print(f'{spent} ... ', end='', flush=True)

    def end(self, word=''):
        """Complete the line."""
        again = f'\r\033[K{self.title} ... ' if sys.stdout.isatty() else ''
        print(f'{again}{word}{duration(time.time() - self.start)}', flush=True)


class Setup:
    """The environment folder, the cache folder and the steps between them."""

    def __init__(self, root, venv, cache, stack='classic'):
        self.stack = STACKS[stack]
        self.root, self.shown, self.venv = root, venv, Path(os.path.abspath(venv))
        self.wheels = Path(os.path.abspath(cache)) / 'wheels'
        self.python, self.uv = self.venv / 'bin/python', self.venv / 'bin/uv'
        self.stamp, self.log = self.venv / '.mmhrformer-ready', self.venv / 'setup.log'
        self.version = '{}.{}'.format(*sys.version_info)
        memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9
        self.jobs = compile_jobs(os.environ, len(os.sched_getaffinity(0)), memory)
        self.line, self.done, self.steps = None, 0, 1

    def wanted_stamp(self):
        """What an up-to-date environment was made from."""
        return wanted_stamp(self.root, self.venv, self.stack.requirements)

    def work(self):
        """What is to be done: 'nothing', 'copies' (only renew these) or 'all'."""
        have, wanted = read_stamp(self.stamp), self.wanted_stamp()
        if not self.python.exists() or dict(have, copies='') != dict(wanted, copies=''):
            return 'all'
        return 'nothing' if have == wanted else 'copies'

    def pinned(self, name):
        """The version that the requirements ask for."""
        text = (self.root / self.stack.requirements).read_text()
        return re.search(rf'^{re.escape(name)}==([^\s;]+)', text, flags=re.MULTILINE).group(1)

    def wheel_folder(self, accelerator):
        """Where a compiled mmcv is kept; it only fits the torch it was built with."""
        torch, python = self.pinned('torch'), self.version.replace('.', '')
        return self.wheels / f'mmcv{MMCV}-torch{torch}-cp{python}-{accelerator}'

    def must_compile(self):
        """Whether mmcv is needed and the cache has none for this Python and torch."""
        return self.stack.has_operators and not any(
            self.wheels.glob(self.wheel_folder('*').name + '/*.whl')
        )

    def problems(self):
        """Everything that is missing, at once, so that the user need not come back for each."""
        found, version, compiling = [], self.version, self.must_compile()
        ours = any((self.venv / sign).exists() for sign in ('pyvenv.cfg', 'setup.log'))
        if self.venv.exists() and os.listdir(self.venv) and not ours:
            what = f'{self.venv} exists and is no virtual environment; it is left as it is.'
            found.append((what, 'Name another folder: make VENV=/path/to/venv.'))
        # Debian packages them apart.
        if not (importlib.util.find_spec('venv') and importlib.util.find_spec('ensurepip')):
            what = f"Python {version}'s venv module is not installed."
            found.append((what, apt_install(f'python{version}-venv')))
        compiler = (os.environ.get('CXX') or 'g++').split()[0]
        header = os.path.join(sysconfig.get_path('include'), 'Python.h')
        missing = [] if shutil.which(compiler) else [f'no C++ compiler ({compiler})']
        missing += [] if os.path.exists(header) else [f'no Python.h of Python {version}']
        if compiling and missing:
            what = "mmcv's operators must be compiled, but there is {}.".format(', '.join(missing))
            found.append((what, apt_install(f'build-essential python{version}-dev')))
        disk = next(path for path in (self.venv, *self.venv.parents) if path.exists())
        free, needed = shutil.disk_usage(disk).free / 1e9, NEW_GB if compiling else AGAIN_GB
        if free < needed:
            what = f'Too little disk space at {disk}: {free:.1f} GB free, {needed} GB needed.'
            remedy = 'Free some space, or use another disk: make VENV=/other/disk/venv; uv keeps '
            found.append((what, remedy + 'its downloads in UV_CACHE_DIR.'))
        return found

    @contextlib.contextmanager
    def step(self, title):
        """Show a line while a step runs."""
        self.done += 1
        self.line = Line(f'[{self.done}/{self.steps}] {title}')
        try:
            yield
        except BaseException:
            self.line.end('stopped after ')
            raise
        self.line.end()

    def last_output(self):
        """What the last command printed so far."""
        return self.log.read_text(errors='replace').rsplit('\n$ ', 1)[-1]

    def call(self, what, command, cwd=None, **env):
        """Run a command with its output in the log; raise what went wrong if it fails."""
        command = [str(part) for part in command]
        env['PATH'] = f'{self.venv}/bin:{os.environ.get("PATH", os.defpath)}'
        with self.log.open('a') as log:
            log.write('\n$ {}\n'.format(' '.join(command)))
            log.flush()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd or self.root,
                env=dict(os.environ, **env),
            )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
                self.line.beat(progress_of(self.last_output()))
        finally:
            if process.poll() is None:  # interrupted
                process.terminate()
                process.wait()
        if process.returncode != 0:
            output = self.last_output()
            raise SetupError([(f'{what} failed.', remedy_for(output))], output)

    def uv_install(self, what, *arguments):
        """Install packages, from where pip would take them."""
        command = [self.python, '-m', 'pip', 'config', 'get']
        settings = [
            subprocess.run([*command, f'global.{name}'], capture_output=True, text=True).stdout
            for name in ('index-url', 'find-links')
        ]
        command = [self.uv, 'pip', 'install', '--python', self.python, *arguments]
        self.call(what, command, **index_env(os.environ, *settings))

    @contextlib.contextmanager
    def locked(self):
        """Let only one set-up of a user run at a time: they share the cache."""
        import fcntl

        self.wheels.mkdir(parents=True, exist_ok=True)
        with (self.wheels / '.lock').open('w') as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print('(waiting for another set-up to finish)', flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def run(self):
        """Do what is to be done."""
        work = self.work()
        problems = self.problems() if work == 'all' else []
        if problems:
            raise SetupError(problems)
        if work != 'nothing':
            with self.locked():
                self.update(self.work())  # a set-up that was waited for may have done it all
        print(f'The environment {self.shown} is ready.')

    def update(self, work):
        """Bring the environment up to date and note what it was made from."""
        wanted = self.wanted_stamp()
        if work == 'copies':
            with self.step('Renewing the installed copies of configs and tools'):
                self.log.write_text('')
                self.install_project()
        elif work == 'all':
            self.make()
        self.stamp.write_text(json.dumps(wanted, indent=1) + '\n')

    def make(self):
        """Make the environment anew."""
        self.steps = 5 if self.stack.has_operators else 4
        minutes = -(-COMPILE_MINUTES // self.jobs)
        compiling = f' and {minutes} min to compile mmcv' if self.must_compile() else ''
        print(
            f'Setting up {self.shown} with Python {self.version}: 1 min; the first time up to 10 '
            f'(up to 3 GB of downloads){compiling}. Output: {self.shown}/setup.log'
        )
        with self.step('Environment folder and installer (10 s)'):
            self.make_folder()
        with self.step('torch and OpenMMLab packages (10 s; the first time minutes)'):
            self.install_packages()
            self.declare_operators()
            self.call('Importing torch', [self.python, '-c', PRINT_ACCELERATOR], self.venv)
        if self.stack.has_operators:
            self.install_mmcv(self.last_output().split()[-1], minutes)
        with self.step('This project, editable (5 s)'):
            self.install_project()
        with self.step('Checking that everything imports (20 s)'):
            # From another folder, or the checkout itself would be found instead of the install.
            self.call(
                'The check', [self.python, '-c', CHECK_IMPORTS, *self.stack.imports], self.venv
            )

    def make_folder(self):
        """Make an empty environment with uv in it; the log stays to show whose folder it is."""
        self.venv.mkdir(parents=True, exist_ok=True)
        self.log.write_text('')
        for path in self.venv.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != self.log:
                path.unlink()
        # The Python below an activated environment, which may be the one to make anew.
        python = getattr(sys, '_base_executable', sys.executable)
        self.call('Making the environment folder', [python, '-m', 'venv', self.venv])
        self.call('Installing uv', [self.python, '-m', 'pip', 'install', UV])

    def install_packages(self):
        """Install the pinned packages."""
        self.uv_install('Installing the packages', '-r', self.stack.requirements)
        # Both OpenCV packages are required by name and own the same files. The one that is
        # installed last wins: the headless one needs no graphics libraries of the system. (uv's
        # own --reinstall would download it again.)
        name = 'opencv-python-headless'
        command = [self.uv, 'pip', 'uninstall', '--python', self.python, name]
        self.call('Installing OpenCV', command)
        self.uv_install('Installing OpenCV', '--no-deps', f'{name}=={self.pinned(name)}')

    def install_mmcv(self, accelerator, minutes):
        """Install mmcv with its operators, which may have to be compiled first."""
        folder = self.wheel_folder(accelerator)
        cached = any(folder.glob('*.whl'))
        how = 'from the cache (5 s)' if cached else f'compiled once (CPU: {minutes} min)'
        with self.step(f'mmcv {MMCV} with operators for {accelerator}, {how}'):
            if not cached:
                self.build_mmcv(folder)
            self.uv_install('Installing mmcv', '--no-deps', *folder.glob('*.whl'))

    def declare_operators(self):
        """Make torchvision importable where its library does not fit torch."""
        command = [self.python, '-c', 'import torchvision']
        try:
            self.call('Importing torchvision', command, self.venv)
        except SetupError as error:
            if 'operator torchvision::nms does not exist' not in error.output:
                raise
            source = self.root / 'requirements/torchvision_operators.py'
            folder = next(self.venv.glob('lib/python3*/site-packages'))
            shutil.copy(str(source), str(folder))
            (folder / 'torchvision_operators.pth').write_text('import torchvision_operators\n')
            self.call('Importing torchvision', command, self.venv)

    def build_mmcv(self, folder):
        """Compile mmcv next to its place in the cache, then move it there in one go."""
        # classic.txt has setuptools; these are needed by the build alone.
        self.uv_install('Installing the build tools', 'wheel', 'ninja', 'psutil')
        env = {'MMCV_WITH_OPS': '1', 'MAX_JOBS': str(self.jobs)}
        if folder.name.endswith('-cpu'):
            env.update(CUDA_VISIBLE_DEVICES='', FORCE_CUDA='0')
        with tempfile.TemporaryDirectory(prefix='.build-', dir=self.wheels) as work:
            # Never pip's own wheel cache: it hands an mmcv built for one torch to every other.
            # -v lets the compiler's progress through to the log.
            command = [self.python, '-m', 'pip', 'wheel', '-v', '--no-deps', '--no-cache-dir']
            command += ['--no-build-isolation', '--no-binary', 'mmcv', '-w', work, f'mmcv=={MMCV}']
            self.call('Compiling mmcv', command, TMPDIR=work, **env)
            wheels = list(Path(work).glob('mmcv-*-cp*.whl'))  # else it is pure Python
            if not wheels:
                problem = ('mmcv was built without its operators.', 'The log tells why.')
                raise SetupError([problem], self.last_output())
            folder.mkdir(parents=True, exist_ok=True)
            wheels[0].replace(folder / wheels[0].name)

    def install_project(self):
        """Install this project; the reinstall renews the copies that `mim` reads."""
        options = ('--no-deps', '--no-build-isolation', '--reinstall-package', 'mmhrformer')
        self.uv_install('Installing this project', *options, '-e', '.')


def report(error, log=''):
    """Tell what went wrong, the end of the output if there is any, and what to do."""
    for what, remedy in error.problems:
        print(f'\nerror: {what}', file=sys.stderr)
        for line in error.output.rstrip().splitlines()[-15:]:
            print(f'    | {line[:200]}', file=sys.stderr)
        if error.output:
            print(f'  log:    {log}', file=sys.stderr)
        print(f'  remedy: {remedy}', file=sys.stderr)


def main(argv=None):
    """Run the command line; tell foreseeable failures in words instead of a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--stack', choices=sorted(STACKS), default='classic', help='which packages (%(default)s)'
    )
    parser.add_argument('--venv', default='.venv', help='environment folder (%(default)s)')
    parser.add_argument('--cache', default=CACHE, help='for the compiled mmcv (%(default)s)')
    args = parser.parse_args(argv)
    try:
        check_python(sys.version_info, STACKS[args.stack].pythons)
        Setup(ROOT, args.venv, args.cache, args.stack).run()
        return 0
    except SetupError as error:
        report(error, f'{args.venv}/setup.log')
    except KeyboardInterrupt:
        print('\nstopped; run the same command again', file=sys.stderr)
    except OSError as error:  # the disk is full, or a folder cannot be written
        report(SetupError([(str(error), remedy_for(str(error)))]))
    return 1


if __name__ == '__main__':
    sys.exit(main())
