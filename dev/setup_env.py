#!/usr/bin/env python3
"""Create the Python environment of this checkout, or update it.

    python3 dev/setup_env.py [--stack classic] [--venv .venv] [--cache DIR]

It installs the pinned packages of requirements/STACK.txt, mmcv with its compiled operators (built
once per user, then taken from the cache folder) and this project as an editable install. If
nothing has changed, nothing is done; if only configs, tools or benchmarks have, their installed
copies are updated; otherwise, the environment is recreated, using uv's download cache.

Only the standard library is used, and no syntax newer than Python 3.6, so that an old Python
reaches the message about the required version.
"""

import argparse
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STACKS = {  # supported Python versions, and modules that must be importable
    'classic': (('3.10', '3.11'), 'mmcv.ops, mmpretrain.models, mmpose.models, mmseg.models'),
    'modern': (('3.11', '3.12', '3.13'), 'mmcv, mmpretrain.models'),
    'modern-all': (('3.11',), 'mmcv.ops, mmpretrain.models, mmpose.models, mmseg.models'),
    'forks': (('3.11',), 'mmcv, mmpretrain.models, mmseg.models'),
}
MMCV = '2.1.0'
UV = 'uv>=0.13.8,<1'
CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'mmhrformer'
COMPILE_JOB_GB = 1.5  # memory of one compiler process on torch's headers

# Compiling for a GPU requires a CUDA compiler that torch accepts.
PRINT_ACCELERATOR = """
import subprocess, torch
from torch.utils.cpp_extension import CUDA_HOME
tag, cuda = 'cpu', torch.version.cuda or ''
if torch.cuda.is_available() and CUDA_HOME:
    nvcc = subprocess.check_output([CUDA_HOME + '/bin/nvcc', '--version'], text=True)
    if f'release {cuda.split(".")[0]}.' in nvcc:
        tag = 'cu' + cuda.replace('.', '')
print(tag)
"""
FIX = (
    'see the output above. If the package index could not be reached, set HTTPS_PROXY (and '
    'SSL_CERT_FILE and PIP_CERT to its certificate) or PIP_INDEX_URL to a mirror. If the compiler '
    'was killed, it ran out of memory: set MAX_JOBS=1. Then run this again; downloads are kept.'
)


def fail(what, fix):
    """Exit with an error and its fix."""
    sys.exit(f'\nerror: {what}\n  Fix: {fix}')


def apt_install(packages):
    """The command that installs Debian packages, for the current user."""
    return f'{"" if os.geteuid() == 0 else "sudo "}apt-get install {packages}'


def check_python(version, stack):
    """Refuse a Python that the stack has no packages for."""
    fitting = STACKS[stack][0]
    if version not in fitting:
        fail(
            f'This needs Python {" or ".join(fitting)}; this is Python {version}.',
            'specify another one: make PYTHON=/path/to/python3.11. If there is none: '
            + apt_install('python3.11-venv python3.11-dev')
            + ' (Debian 12; python3.10-... on Ubuntu 22.04), or on newer systems '
            '"uv python install 3.11" and make PYTHON="$(uv python find 3.11)".',
        )


def compile_jobs(environ, cores, memory_gb):
    """Number of compilers: one per core, unless set by the user or limited by memory."""
    return environ.get('MAX_JOBS') or str(max(1, min(cores, int(memory_gb / COMPILE_JOB_GB))))


def digest(place, paths):
    """Hash of a folder's path, and of names and contents of files."""
    result = hashlib.sha256(str(place).encode())
    for path in sorted(paths):
        content = path.read_bytes()
        result.update(f'{path}\0{len(content)}\0'.encode() + content)
    return result.hexdigest()


class Setup:
    """The environment folder, the cache folder and the steps between them."""

    def __init__(self, venv, cache=CACHE, stack='classic'):
        self.venv, self.wheels = Path(os.path.abspath(venv)), Path(os.path.abspath(cache), 'wheels')
        self.requirements = ROOT / f'requirements/{stack}.txt'
        self.imports = STACKS[stack][1]
        self.has_operators = 'mmcv.ops' in self.imports
        self.python, self.stamp = self.venv / 'bin/python', self.venv / '.mmhrformer-ready'
        self.version = '{}.{}'.format(*sys.version_info)
        self.env = dict(os.environ, PATH=f'{self.venv}/bin:{os.environ.get("PATH", os.defpath)}')

    def wanted_stamp(self):
        """Hashes of the sources of an up-to-date environment, and of the files copied into it."""
        sources = [self.requirements, ROOT / 'pyproject.toml', ROOT / 'dev/setup_env.py']
        paths = [p for top in ('configs', 'tools', 'benchmarks') for p in (ROOT / top).rglob('*.*')]
        copied = [path for path in paths if path.is_file() and path.suffix != '.pyc']
        return [digest(self.venv, sources), digest(self.venv, copied)]

    def have_stamp(self):
        """The stamp of the environment; empty if it has no stamp or no Python."""
        whole = self.stamp.exists() and self.python.exists()
        return self.stamp.read_text().split() if whole else []

    def pinned(self, name):
        """The version pinned in the requirements."""
        text = self.requirements.read_text()
        return re.search(rf'^{name}==([^\s;]+)', text, flags=re.MULTILINE).group(1)

    def wheel_folder(self, accelerator):
        """Cache folder of a compiled mmcv, which works only with the torch it was built for."""
        torch, python = self.pinned('torch'), self.version.replace('.', '')
        return self.wheels / f'mmcv{MMCV}-torch{torch}-cp{python}-{accelerator}'

    def check(self):
        """Fail early if the set-up cannot be completed or would overwrite something."""
        if self.venv.exists() and os.listdir(self.venv) and not (self.venv / 'pyvenv.cfg').exists():
            what = f'{self.venv} exists and is not a virtual environment; it was not changed.'
            fail(what, 'specify another folder: make VENV=/path/to/venv')
        if self.has_operators and not any(self.wheels.glob(f'{self.wheel_folder("*").name}/*.whl')):
            compiler = (os.environ.get('CXX') or 'g++').split()[0]
            header = os.path.join(sysconfig.get_path('include'), 'Python.h')
            if not (shutil.which(compiler) and os.path.exists(header)):
                what = f"mmcv's operators must be compiled, which needs {compiler} and {header}."
                fail(what, apt_install(f'build-essential python{self.version}-dev'))

    def call(self, *command, cwd=ROOT, **env):
        """Run a command and show its output."""
        command = [str(part) for part in command]
        code = subprocess.run(command, cwd=cwd, env=dict(self.env, **env)).returncode
        if code:
            fail(f'"{" ".join(command)}" exited with code {code}.', FIX)

    def ask(self, *arguments):
        """Output and errors of the environment's Python."""
        command = [self.python, *arguments]
        done = subprocess.run(command, cwd=self.venv, capture_output=True, text=True)
        return done.stdout.strip(), done.stderr

    def install(self, *arguments):
        """Install packages by uv."""
        self.call('uv', 'pip', 'install', '--python', self.python, *arguments)

    def run(self):
        """Create or update the environment if needed, one set-up per user at a time."""
        if self.have_stamp() != self.wanted_stamp():
            self.wheels.mkdir(parents=True, exist_ok=True)
            with (self.wheels / '.lock').open('w') as lock:
                print(f'Setting up {self.venv}, as soon as no other set-up runs', flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
                self.update(self.have_stamp(), self.wanted_stamp())
        print(f'The environment {self.venv} is ready.')

    def update(self, have, wanted):
        """Update the environment, and record its sources."""
        if have == wanted:  # done by a concurrent set-up
            return
        if have[:1] != wanted[:1]:
            self.check()
            self.make()
        # Reinstall to update the copies that `mim` reads.
        options = ('--no-deps', '--no-build-isolation', '--reinstall-package', 'mmhrformer')
        self.install(*options, '-e', ROOT)
        # From another folder, to import the installed package instead of the checkout.
        self.call(self.python, '-c', f'import {self.imports}, mmhrformer', cwd=self.venv)
        self.stamp.write_text('\n'.join(wanted) + '\n')

    def make(self):
        """Recreate the environment, except for this project."""
        print(
            'This takes a minute; the first time up to 10, or 16 on one core, to compile mmcv',
            flush=True,
        )
        # The base Python of an activated environment, which may be the one to recreate.
        python = getattr(sys, '_base_executable', sys.executable)
        self.call(python, '-m', 'venv', '--clear', self.venv)
        self.call(self.python, '-m', 'pip', 'install', '--quiet', UV)
        self.point_uv_to_index()
        self.install('-r', self.requirements)
        # Both OpenCV packages are required by name and install the same files. Install the headless
        # one last: it needs no graphics libraries of the system. (uv's --reinstall would download
        # it again.)
        name = 'opencv-python-headless'
        self.call('uv', 'pip', 'uninstall', '--python', self.python, name)
        self.install('--no-deps', f'{name}=={self.pinned(name)}')
        self.call(self.python, '-c', 'import torch')
        self.declare_operators()
        if self.has_operators:
            folder = self.wheel_folder(self.ask('-c', PRINT_ACCELERATOR)[0])
            if not any(folder.glob('*.whl')):
                self.build_mmcv(folder)
            self.install('--no-deps', *folder.glob('*.whl'))

    def point_uv_to_index(self):
        """Use pip's package index, since uv does not read pip's settings."""
        for setting, name in (('index-url', 'DEFAULT_INDEX'), ('find-links', 'FIND_LINKS')):
            value = os.environ.get('PIP_' + setting.upper().replace('-', '_'))
            value = value or self.ask('-m', 'pip', 'config', 'get', f'global.{setting}')[0]
            if value:
                self.env.setdefault(f'UV_{name}', ','.join(value.split()))

    def declare_operators(self):
        """Make torchvision importable if its library does not match torch."""
        if 'operator torchvision::nms does not exist' in self.ask('-c', 'import torchvision')[1]:
            folder = next(self.venv.glob('lib/python3*/site-packages'))
            shutil.copy(ROOT / 'requirements/torchvision_operators.py', folder)
            (folder / 'torchvision_operators.pth').write_text('import torchvision_operators\n')

    def build_mmcv(self, folder):
        """Compile mmcv in a temporary folder of the cache, then move it atomically."""
        self.install('wheel', 'ninja', 'psutil')
        memory_gb = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9
        jobs = compile_jobs(os.environ, len(os.sched_getaffinity(0)), memory_gb)
        flags = os.environ.get('CFLAGS', '') + ' -g0'  # debug symbols take a third of the time
        env = {'MMCV_WITH_OPS': '1', 'MAX_JOBS': jobs, 'CFLAGS': flags}
        if folder.name.endswith('-cpu'):
            env.update(CUDA_VISIBLE_DEVICES='', FORCE_CUDA='0')
        with tempfile.TemporaryDirectory(prefix='.build-', dir=self.wheels) as work:
            # Without pip's wheel cache, which would reuse an mmcv built for another torch.
            options = ['--no-deps', '--no-cache-dir', '--no-build-isolation', '--no-binary', 'mmcv']
            command = [self.python, '-m', 'pip', 'wheel', *options, '-w', work, f'mmcv=={MMCV}']
            self.call(*command, TMPDIR=work, **env)
            wheels = list(Path(work).glob('mmcv-*-cp*.whl'))  # otherwise it is pure Python
            if not wheels:
                fail('mmcv was built without its operators.', FIX)
            folder.mkdir(parents=True, exist_ok=True)
            wheels[0].replace(folder / wheels[0].name)


def main(argv=None):
    """Run the command line; report foreseeable failures without a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        '--stack', choices=STACKS, default='classic', help='pinned packages (%(default)s)'
    )
    parser.add_argument('--venv', default='.venv', help='environment folder (%(default)s)')
    parser.add_argument('--cache', default=CACHE, help='for the compiled mmcv (%(default)s)')
    args = parser.parse_args(argv)
    try:
        check_python('{}.{}'.format(*sys.version_info), args.stack)
        Setup(args.venv, args.cache, args.stack).run()
    except OSError as error:
        fail(error, 'free some disk space, or make that folder writable')
    except KeyboardInterrupt:
        sys.exit('\nstopped; run the same command again')


if __name__ == '__main__':
    main()
