"""Every command and Python block of the pages is run, or listed with the reason.

Python blocks are executed. The shell runs the commands, those within sentences and tables too, with
programs that only write down what they are called with; each call is then run in this process up to
the point where it would train, test or take its time: arguments are parsed by the tool itself,
configs are read and merged.
``>>>`` examples and complete configs are run in test_docs.py and test_own_data.py.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import setuptools  # noqa: F401  # cannot be imported once pip has been looked for
import torch
from mmengine.config import Config
from mmengine.runner import Runner
from needs import needs
from packaging.requirements import Requirement
from pages import DOCS, FENCE, OWN_DATA, PAGES, blocks, name_of, write_clone
from photographs import CLASSES, crop, save
from PIL import Image
from places import ROOT
from test_docs import WITH_BACKBONES
from tiny_datasets import make

from mmhrformer import HRFormer, get_model
from mmhrformer.cli.main import COMMANDS, main
from mmhrformer.configs import find_config, read_config
from mmhrformer.deploy.onnx import export_onnx
from mmhrformer.engine.dead_options import READ_ELSEWHERE
from mmhrformer.models import ARCHS

pytestmark = needs('mmpretrain', 'mmpose', 'mmseg', 'mmdet')

TEXTS = [*PAGES, *sorted(ROOT.glob('*.md')), *sorted(ROOT.glob('configs/*/README.md'))]
# Kinds of blocks that have nothing to run: output, folders, a citation, directives of Sphinx.
NOT_CODE = re.compile(r'|text|bibtex|\{.*')
# Beginnings of Python blocks that are not run -> reason.
NOT_RUN = {
    'fused = fuse_for_inference(model.cuda()': 'needs a GPU; tests/gpu captures such graphs',
    'program = torch.export.export(': 'needs torch 2.2; tests/deploy/test_onnx.py exports likewise',
    'import openvino': 'OpenVINO is not installed; its outputs and times are those of the page',
    'from peft import': 'peft is not installed; tried with peft 0.21 and torch 2.13',
}
# Replacements that save time or need no GPU.
SMALLER = {
    'torch.rand(1, 3, 512, 1024)': 'torch.rand(1, 3, 64, 128)',
    "device='cuda', dtype='float16'": "device='cpu', dtype='bfloat16'",
}
# Programs whose calls are not checked -> reason.
OTHERS = {
    'git': 'network',
    'tar': 'archives of the real datasets',
    'unzip': 'archives of the real datasets',
    'mv': 'archives of the real datasets',
    'rm': 'archives of the real datasets',
    'mkdir': 'folders for the real datasets',
    'ln': 'a folder with real data',
    'trtexec': "NVIDIA's",
}
# Commands within sentences and tables.
INLINE = re.compile(r'`((?:python|pip|mim|torchrun|make|mmhrformer) [^`]+)`')
# Those that are not run -> reason.
NOT_CALLED = {
    'mim download': 'any model',
    'mim train mmhrformer': 'any config',
    'pip install': 'any package',
    'python -m mmhrformer': 'any command',
    'python -m mmhrformer NAME': 'any command',
    'python -m mmhrformer onnx_pose': 'any model',
    'python -m mmhrformer print_config': 'any config',
    'python -m mmhrformer train': 'any config',
    'python benchmarks/triton_resources.py --capability 90': 'needs a newer Triton',
    'python benchmarks/triton_resources.py --capability 89 100 120': 'needs a newer Triton',
    'python -m torch.distributed.launch main.py --cfg configs/hrt/hrt_small.yaml': 'official code',
    'python tools/NAME.py': 'any tool',
}
# Placeholders in capitals -> values.
STANDS_FOR = {
    'CONFIG': 'td-hm_hrformer-tiny_8xb32-210e_coco-256x192',
    'CONFIG_PATH': 'configs/hrformer_pose/td-hm_hrformer-tiny_8xb32-210e_coco-256x192.py',
    'CHECKPOINT': 'weights.pth',
}
STANDS_FOR['NAME'] = STANDS_FOR['CONFIG']
STANDS_FOR['PATH'] = STANDS_FOR['CONFIG_PATH']
STANDS_FOR['CONFIG.py'] = STANDS_FOR['NAME.py'] = f'{STANDS_FOR["CONFIG"]}.py'
FOR_TTA = dict(STANDS_FOR, CONFIG='ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024')


def all_blocks() -> Iterator[tuple[Path, int, str, str]]:
    """Page, line, kind and code of every fenced block."""
    for page in TEXTS:
        text = page.read_text()
        for match in FENCE.finditer(text):
            line = text.count('\n', 0, match.start('code')) + 1
            yield page, line, match['kind'], match['code']


def is_config(code: str) -> bool:
    return re.match(r'# \S+\.py\n', code) is not None


def test_nothing_else_is_shown():
    """A new kind of block needs a test, and the lists above have no unused entries."""
    known = {'pycon', 'python', 'bash', 'shell'}
    for page, line, kind, code in all_blocks():
        assert kind in known or NOT_CODE.fullmatch(kind), f'{name_of(page)}:{line}: {kind!r}'
        if is_config(code):  # run in test_docs.py, test_own_data.py
            assert page == OWN_DATA or page.stem in ('README', *WITH_BACKBONES)
        elif kind == 'python':
            ast.parse('\n' * line + code, name_of(page))
    code = ''.join(code for *_, code in all_blocks())
    assert not [text for text in (*NOT_RUN, *SMALLER) if text not in code]
    called = set(re.findall(r'\b[a-z]+\b', code))
    assert called >= set(OTHERS)
    assert {command for page in TEXTS for command in inline(page)} >= set(NOT_CALLED)


# ---------------------------------------------------------------- Python


def few(name: str) -> dict:
    """An architecture with few blocks."""
    return dict(ARCHS[name], num_modules=(1, 1, 1), num_blocks=1)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder as the pages assume, small architectures, and a zoo without network."""
    monkeypatch.chdir(tmp_path)
    for name in list(ARCHS):
        monkeypatch.setitem(ARCHS, name, few(name))
    photo = crop(*CLASSES['rose'])
    for name in ('people.jpg', 'a.jpg', 'b.jpg', 'image.jpg', 'image.png',
                 'data/demo/scenes/img_dir/val/0000.jpg'):  # fmt: skip
        save(tmp_path / name, photo)

    def published(name: str, whole: bool) -> tuple[Path, str]:
        write_weights(tmp_path / f'{name}.pth', get_model(name))
        return tmp_path / f'{name}.pth', ''

    monkeypatch.setattr('mmhrformer.checkpoints.loading.find_file', published)
    return tmp_path


def write_weights(path: Path, model: torch.nn.Module, **more: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(dict(state_dict=model.state_dict(), meta={}, **more), path)


def for_readme(folder: Path) -> dict:
    write_weights(folder / 'hrt_base.pth', HRFormer('base', window_size=7))
    return {}


def for_checkpoints(folder: Path) -> dict:
    model = HRFormer('tiny')
    write_weights(folder / 'any_format.pth', model)
    write_weights(folder / 'trained.pth', model, state_dict_ema=model.state_dict())
    torch.save(model, folder / 'model.pth')
    return dict(model=model, torch=torch, FILE=folder / 'model.pth', NEW_FILE=folder / 'new.pth')


def for_export(folder: Path) -> dict:
    small = 'td-hm_hrformer-small_8xb32-210e_coco-256x192'
    write_weights(folder / 'hrt_small_coco_256x192.pth', get_model(small))
    streets = 'ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024'
    write_weights(folder / 'hrt_small_cityscapes.pth', get_model(streets))
    # The two other files that are read: exported from the models of the demo.
    for file, name, size, number in (
        ('hrformer-tiny_8xb128_in1k', 'hrformer-demo_1xb64-6e_digits', (224, 224), 10),
        (streets, 'ocrnet_hrformer-demo_1xb16-100_scenes-96x96', (96, 96), 8),
    ):
        names = [str(i) for i in range(number)]
        export_onnx(get_model(name), folder / f'{file}.onnx', size, names=names, simplify=False)
    return {}


def for_demo(folder: Path) -> dict:
    for task, name in (
        ('cls/train/epoch_6', 'hrformer-demo_1xb64-6e_digits'),
        ('seg/train/iter_100', 'ocrnet_hrformer-demo_1xb16-100_scenes-96x96'),
    ):
        write_weights(folder / f'demo_output/{task}.pth', get_model(name))
    return {}


def for_faq(folder: Path) -> dict:
    Image.fromarray(np.uint8([[[0, 0, 0], [200, 0, 0]]])).save(folder / 'mask.png')
    return dict(np=np, Image=Image)


# Names that the blocks of a page assume; the files are written.
SUPPOSED: dict[str, Callable[[Path], dict]] = {
    'README': for_readme,
    'checkpoints': for_checkpoints,
    'export': for_export,
    'faq': for_faq,
    'inference': for_demo,
    'install': for_demo,
}


def python_of(page: Path) -> list[tuple[int, str]]:
    return [(line, code) for line, code in blocks(page, 'python') if not is_config(code)]


WITH_PYTHON = [
    pytest.param(page, marks=pytest.mark.slow if page.stem == 'export' else [], id=name_of(page))
    for page in TEXTS
    if python_of(page)
]


@pytest.mark.parametrize('page', WITH_PYTHON)
def test_python(page, workplace):
    """Run the blocks of a page in order."""
    names = SUPPOSED.get(page.stem, lambda folder: {})(workplace)
    for line, code in python_of(page):
        if '_base_ =' in code:  # part of a config
            (workplace / 'part.py').write_text(re.sub(r"\['(\S+)\.py'\]", based, code))
            cfg = Config.fromfile(workplace / 'part.py')
            assert set(cfg) <= set(read_by_runners()) | set(Config.fromfile(cfg_base(code)))
            continue
        if any(text in code for text in NOT_RUN):
            continue
        for text, smaller in SMALLER.items():
            code = code.replace(text, smaller)
        exec(compile('\n' * line + code, name_of(page), 'exec'), names)


def based(match: re.Match) -> str:
    return repr([str(find_config(match[1]))])


def cfg_base(code: str) -> Path:
    return find_config(re.search(r"\['(\S+)\.py'\]", code)[1])


def read_by_runners() -> set[str]:
    """Top-level options of a config that are read."""
    return set(inspect.signature(Runner.__init__).parameters) | READ_ELSEWHERE


# ---------------------------------------------------------------- the shell

SHIM = """#!/bin/sh
{ printf '%s\\0' "${0##*/}" "$@"; printf '\\1'; } >> "$CALLS"
[ "$1" = -c ] && echo "$2" | sed -n 's/^import \\([a-z]*\\);.*/FOLDER_OF_\\1/p'
exit 0
"""
PROGRAMS = ('make', 'mim', 'pip', 'python', 'tensorboard', 'torchrun', *OTHERS)


def shell_of(page: Path) -> str:
    return ''.join(code for kind in ('bash', 'shell') for _, code in blocks(page, kind))


def inline(page: Path) -> list[str]:
    """Commands within sentences and tables, without the dots that stand for more arguments."""
    spans = INLINE.findall(FENCE.sub('', page.read_text()))
    return [' '.join(span.split()).removesuffix(' ...') for span in spans]


@pytest.fixture(scope='module')
def clone(tmp_path_factory) -> Path:
    """A clone with a user's own configs and the logs of some runs."""
    folder = tmp_path_factory.mktemp('clone')
    write_clone(folder)
    for name in ('requirements', 'tests'):
        (folder / name).symlink_to(ROOT / name)
    for run in ('RUN', 'A', 'B'):
        log = folder / f'work_dirs/{run}/1/vis_data/scalars.json'
        log.parent.mkdir(parents=True)
        log.write_text('{"loss": 1.0, "step": 1}\n{"coco/AP": 0.5, "step": 1}\n')
    return folder


@pytest.fixture(scope='module')
def shims(tmp_path_factory) -> Path:
    """Programs that only record their arguments."""
    folder = tmp_path_factory.mktemp('shims')
    for name in PROGRAMS:
        (folder / name).write_text(SHIM)
        (folder / name).chmod(0o755)
    (folder / 'sed').symlink_to(shutil.which('sed'))
    return folder


def calls_of(page: Path, shims: Path, folder: Path) -> list[list[str]]:
    """Calls made by the commands of a page, as a shell parses them."""
    activate = folder / '.venv/bin/activate'
    activate.parent.mkdir(parents=True)
    activate.touch()
    written = folder / 'calls'
    written.touch()
    env = dict(PATH=str(shims), CALLS=str(written))
    script = re.sub(r' \[arguments.*?\]', '', shell_of(page)).replace('...', 'randomness.seed=0')
    script = '\n'.join([*(word for word in inline(page) if word not in NOT_CALLED), script])
    done = subprocess.run(
        [shutil.which('bash'), '-eu'], input=script, cwd=folder, env=env, text=True,
        capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [call.split('\0')[:-1] for call in written.read_text().split('\1')[:-1]]
    return [
        [(FOR_TTA if '--tta' in call else STANDS_FOR).get(word, word) for word in call]
        for call in found
    ]


class Parsed(Exception):  # noqa: N818
    """Raised once the arguments of a tool are valid."""


@pytest.fixture
def stops(monkeypatch, clone) -> list:
    """Stop tools after parsing and runs before they start; list those that were reached."""
    reached: list = []
    parse = argparse.ArgumentParser.parse_args

    def stop(parser, args=None, namespace=None):
        found = parse(parser, args, namespace)
        if Path(sys.argv[0]).stem in ('train', 'test'):
            return found
        reached.append(found)
        raise Parsed

    runner = SimpleNamespace(train=lambda: None, test=lambda: None)
    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', stop)
    monkeypatch.setattr(Runner, 'from_cfg', lambda cfg: reached.append(cfg) or runner)
    monkeypatch.setattr('mmhrformer.cli.launch.read_config', lru_cache(read_config))
    # Checkpoints need not exist: what is done with them is tested elsewhere.
    monkeypatch.setattr(
        'mmhrformer.cli.launch.resolve_checkpoint', lambda name, other: reached.append(name) or name
    )
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setattr(sys, 'path', list(sys.path))
    monkeypatch.setattr('mmhrformer.configs.config_root', lambda: clone / 'configs')
    monkeypatch.chdir(clone)
    return reached


def check_words(words: list[str]) -> None:
    """Configs exist, and options begin with a name that is read."""
    for word in words:
        if re.fullmatch(r'(td-hm|ocrnet|hrformer|hrnet|retinanet)[\w-]*_[\w-]+', word):
            assert find_config(word)
    if '--cfg-options' in words:
        for word in words[words.index('--cfg-options') + 1 :]:
            assert word.split('.')[0].split('=')[0] in read_by_runners(), word


def run_module(name: str, args: list[str]) -> None:
    """Run ``python -m``; for pytest and sphinx, only check the options."""
    if name == 'mmhrformer':
        assert args[0] in (*COMMANDS, '--help')
        main(args)
    elif name == 'pytest':
        file, option, word = args
        assert option == '-k'
        assert word in Path(file).read_text()
    else:
        from sphinx.cmd.build import get_parser

        get_parser().parse_args(args)


def run_python(args: list[str], stops: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a Python call in this process."""
    if args[0] in ('-c', '-'):  # the name of a folder; a script for a real dataset
        return
    check_words(args)
    reached = len(stops)
    monkeypatch.setattr(sys, 'argv', args[1:] if args[0] == '-m' else args)
    try:
        if args[0] == '-m':
            run_module(args[1], args[2:])
            return
        script = find_script(args[0])
        if 'FOLDER_OF_' in args[0]:  # of a framework, for a real dataset
            options = [word for word in args if word.startswith('--')]
            assert all(f"'{option}'" in script.read_text() for option in options)
            return
        monkeypatch.syspath_prepend(script.parent)
        runpy.run_path(str(script), run_name='__main__')
    except Parsed:
        pass
    except SystemExit as end:
        if '--help' not in args or end.code:
            raise
        return
    assert len(stops) > reached, args


def find_script(name: str) -> Path:
    """Run a script of the checkout, or of a framework if the command names its folder."""
    if package := re.match(r'FOLDER_OF_(\w+)/(.*)', name):
        return Path(__import__(package[1]).__path__[0], package[2])
    return ROOT / name


def check_call(call: list[str], stops: list, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *args = call
    if program in ('mim', 'pip') and not find_spec(program):
        return  # in the environment of `make env` they are installed
    if program == 'python':
        run_python(args, stops, monkeypatch)
    elif program == 'torchrun':
        from torch.distributed.run import get_args_parser

        parsed, _ = get_args_parser().parse_known_args(args)
        script, rest = parsed.training_script, parsed.training_script_args
        if parsed.module:
            script, rest = '-m', [script, *rest]
        if script == 'env':
            assert rest[:3] == ['LOCAL_RANK=-1', 'python', 'STOCK/train.py']
            script, rest = 'tools/train.py', rest[3:]  # which runs that of the framework
        run_python([script, *rest], stops, monkeypatch)
    elif program == 'mim':
        parser = import_module(f'mim.commands.{args[0]}').cli
        options = SimpleNamespace(**parser.make_context('mim', args[1:]).params)
        check_words(args)
        if args[0] in ('train', 'test'):
            assert options.config.endswith('.py')  # what mim searches for
            launcher = ['--launcher', options.launcher] if options.launcher != 'none' else []
            rest = [*filter(None, [getattr(options, 'checkpoint', '')]), *launcher]
            rest += options.other_args
            run_python([f'tools/{args[0]}.py', options.config, *rest], stops, monkeypatch)
            scope = stops[-1].default_scope
            names = ('mmhrformer', {'mmseg': 'mmsegmentation'}.get(scope, scope))
            assert options.package in names
    elif program == 'make' and '-C' not in args:
        targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M)
        assert {word for word in args if '=' not in word} <= set(targets)
    elif program == 'pip':
        parser = import_module('pip._internal.commands').create_command(args[0])
        options, packages = parser.parse_args(args[1:])
        assert all('/' in name or Requirement(name) for name in packages)
        extras = re.findall(r'\[(.*?)\]', ' '.join(args))
        known = (ROOT / 'pyproject.toml').read_text()
        assert all(f'\n{name} = [' in known for extra in extras for name in extra.split(','))
        assert all(Path(word).is_file() for word in args if word.startswith('requirements/'))


def test_script_that_checks_a_data_set(clone, tmp_path, monkeypatch, capsys):
    """Run the script that the shell pipes to Python, on data laid out as COCO."""
    (script,) = re.findall(r"^python - CONFIG_PATH <<'EOF'\n(.*?)^EOF$",
                           shell_of(DOCS / 'datasets.md'), re.M | re.S)  # fmt: skip
    make('coco', tmp_path / 'data')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['-', str(ROOT / STANDS_FOR['CONFIG_PATH'])])
    exec(script, {})
    assert '(3, 256, 192)' in capsys.readouterr().out


WITH_COMMANDS = [page for page in TEXTS if shell_of(page) or inline(page)]


@pytest.mark.parametrize('page', WITH_COMMANDS, ids=name_of)
def test_commands(page, shims, stops, tmp_path, monkeypatch):
    for call in calls_of(page, shims, tmp_path):
        check_call(call, stops, monkeypatch)


def test_commands_are_found(shims, tmp_path):
    """Otherwise the test above would pass for the wrong reason."""
    pages = [DOCS / 'training.md', ROOT / 'README.md']
    for page in pages:
        (tmp_path / page.stem).mkdir()
    training, readme = (calls_of(page, shims, tmp_path / page.stem) for page in pages)
    assert len(training) >= 18
    assert ['make', 'demo'] in readme
    assert sum(len(inline(page)) for page in TEXTS) > 80
