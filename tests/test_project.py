"""The files around the package: workflows, templates, citation, hub, example, archives."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile

import pytest
import torch
import yaml
from places import ENV, ROOT, run

import mmhrformer

WORKFLOWS = sorted((ROOT / '.github/workflows').glob('*.yml'))
TARGETS = set(re.findall(r'^([a-z0-9-]+):.*##', (ROOT / 'Makefile').read_text(), re.M))


@pytest.mark.parametrize('path', WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_the_makefile(path):
    """Valid YAML with permissions to read only, whose commands are those of everybody."""
    workflow = yaml.safe_load(path.read_text())
    assert workflow['permissions'] == dict(contents='read')
    assert workflow[True]  # `on`, which YAML 1.1 reads as a truth
    called = set()
    for name, job in workflow['jobs'].items():
        if 'uses' in job:
            assert (ROOT / job['uses']).is_file()
            continue
        assert job['runs-on'], name
        for step in job['steps']:
            assert len({'uses', 'run'} & set(step)) == 1
            assert 'secrets' not in str(step)
            words = step.get('run', '').split()
            if words[:1] == ['make']:
                called |= {word for word in words[1:] if '=' not in word}
    assert called
    assert called <= TARGETS


def test_workflows_cover_the_checks():
    text = ''.join(path.read_text() for path in WORKFLOWS)
    for target in ('lint', 'test-fast', 'test-modern', 'test-e2e', 'docs', 'dist'):
        assert re.search(rf'make [a-z -]*\b{target}\b', text), target
    release = yaml.safe_load((ROOT / '.github/workflows/release.yml').read_text())
    assert release['jobs']['publish']['permissions'] == {'id-token': 'write'}  # no password
    assert release['jobs']['publish']['needs'] == ['tests', 'build']


def test_an_issue_comes_with_the_report_of_the_installation():
    bug = yaml.safe_load((ROOT / '.github/ISSUE_TEMPLATE/bug.yml').read_text())
    (env,) = [part for part in bug['body'] if part['id'] == 'env']
    assert 'python -m mmhrformer env' in env['attributes']['label']
    assert env['validations']['required']
    for path in (ROOT / '.github/ISSUE_TEMPLATE').glob('*.yml'):
        content = yaml.safe_load(path.read_text())
        assert content.get('body') or 'blank_issues_enabled' in content


def test_the_citation_is_that_of_this_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == mmhrformer.__version__
    assert {'cff-version', 'message', 'title', 'authors'} <= set(citation)
    paper = citation['preferred-citation']
    assert paper['title'] == 'HRFormer: High-Resolution Transformer for Dense Prediction'
    assert paper['authors'][0] == {'family-names': 'Yuan', 'given-names': 'Yuhui'}
    assert '](CITATION.cff)' in (ROOT / 'README.md').read_text()


def load(name: str, **kwargs) -> torch.nn.Module:
    return torch.hub.load(str(ROOT), name, source='local', **kwargs)


def test_hub(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    import hubconf

    public = {name for name, it in vars(hubconf).items() if callable(it) and name[0] != '_'}
    assert public == {'get_model', 'hrformer_base', 'hrformer_small', 'hrformer_tiny'}
    model = load('hrformer_tiny', out_indices=(3,))
    assert [tuple(x.shape) for x in model(torch.rand(1, 3, 64, 64))] == [(1, 144, 2, 2)]
    loaded = []
    monkeypatch.setattr('mmhrformer.load_checkpoint', lambda *args: loaded.append(args))
    model = load('hrformer_small', pretrained=True)
    assert loaded == [(model, 'hrformer-small_8xb128_in1k')]
    assert loaded[0][1] in mmhrformer.list_models()
    load('hrformer_tiny', pretrained='own.pth')
    assert loaded[1][1] == 'own.pth'


def test_the_example_runs():
    said = run([sys.executable, str(ROOT / 'examples/minimal.py')], ROOT)
    assert said.splitlines()[0] == '(2, 18, 64, 48)'
    assert 'parameters with grad' in said


def test_a_tag_has_to_be_the_version():
    command = ['make', 'dist', f'PY={sys.executable}', 'TAG=v0.0.0']
    done = subprocess.run(command, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'TAG=v0.0.0 is not the version' in done.stdout + done.stderr
    quiet = ['make', '-n', 'dist', f'TAG=v{mmhrformer.__version__}']
    check = run(quiet, ROOT).split('hatchling')[0].rsplit('\n', 1)[0]
    subprocess.run(['sh', '-c', check], cwd=ROOT, check=True)


def test_archives(tmp_path):
    """The wheel has the package alone; the source archive all that its tests need."""
    build = [sys.executable, '-m', 'hatchling', 'build', '-t', 'sdist', '-t', 'wheel']
    run([*build, '-d', str(tmp_path)], ROOT)
    (wheel,), (source,) = tmp_path.glob('*.whl'), tmp_path.glob('*.tar.gz')
    stem = f'mmhrformer-{mmhrformer.__version__}'
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split('/')[0] for name in names} == {'mmhrformer', f'{stem}.dist-info'}
    with tarfile.open(source) as archive:
        names = {name.removeprefix(f'{stem}/') for name in archive.getnames()}
    for name in ('hubconf.py', 'examples/minimal.py', 'CITATION.cff', 'SECURITY.md', 'Makefile',
                 '.github/workflows/tests.yml'):  # fmt: skip
        assert name in names
    assert not any('demo_output' in name or '.venv' in name for name in names)
    shown = zipfile.ZipFile(wheel).read(f'{stem}.dist-info/METADATA').decode()
    links = re.findall(r'\]\(([^)]+)\)', shown)
    assert all(link.startswith(('https://', '#')) for link in links)
    ours = [re.sub(r'.*/(blob|raw)/main/|#.*', '', link) for link in links if '/main/' in link]
    assert {'docs/images/demo.jpg', 'docs/install.md', 'README_zh-CN.md'} <= set(ours)
    assert all((ROOT / name).exists() for name in ours)


def test_no_merge_is_unfinished():
    found = subprocess.run(
        ['git', 'grep', '-nE', '^(<<<<<<<|>>>>>>>) '], cwd=ROOT, capture_output=True, text=True
    )
    assert not found.stdout + found.stderr


def test_temporary_files_lie_below_the_folder_of_pytest(shared_folder):
    """Also those of processes, which may be killed; ``--skips`` looks at the checkout itself."""
    code = 'import tempfile; print(tempfile.gettempdir())'
    folder = str(shared_folder / 't')
    assert tempfile.gettempdir() == folder
    assert run([sys.executable, '-c', code], ROOT) == f'{folder}\n'
