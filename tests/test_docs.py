"""The pages are true: their examples run, their configs train, their links lead somewhere."""

from __future__ import annotations

import doctest
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS, DefaultScope
from mmengine.runner import load_checkpoint
from needs import may_need
from places import ROOT, run

from mmhrformer.engine.config_check import dead_options, late_variables

pytestmark = may_need('mmpose', 'mmseg')

DOCS = ROOT / 'docs'
PAGES = sorted(DOCS.glob('*.md'))
TEXTS = [*PAGES, *sorted(ROOT.glob('*.md')), *sorted(ROOT.glob('configs/*/README.md'))]
FENCE = re.compile(r'^(?P<fence>```+)(?P<kind>.*)\n(?P<code>(?:.*\n)*?)(?P=fence)$', re.M)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, kind: str) -> Iterator[tuple[int, str]]:
    """Code of a kind in a page, and the number of lines before each."""
    text = page.read_text()
    for match in FENCE.finditer(text):
        if match['kind'] == kind:
            yield text.count('\n', 0, match.start('code')), match['code']


# ---------------------------------------------------------------- examples


def examples(page: Path) -> doctest.DocTest:
    """All examples of a page as one test, so that later ones may use earlier ones."""
    found = []
    for line, code in blocks(page, 'pycon'):
        for example in doctest.DocTestParser().get_examples(code, name_of(page)):
            example.lineno += line
            found.append(example)
    return doctest.DocTest(found, {}, name_of(page), str(page), 0, None)


WITH_EXAMPLES = [page for page in PAGES if examples(page).examples]


@pytest.mark.parametrize('page', WITH_EXAMPLES, ids=name_of)
def test_examples_run(page):
    MMLogger.get_current_instance()  # else its messages are taken for the output of an example
    registered = dict(MODELS.children['mmhrformer'].module_dict)
    try:
        report = []
        runner = doctest.DocTestRunner(optionflags=doctest.REPORT_ONLY_FIRST_FAILURE)
        result = runner.run(examples(page), out=report.append)
    finally:
        torch.set_grad_enabled(True)
        own = MODELS.children['mmhrformer'].module_dict
        for name in set(own) - set(registered):
            del own[name]
    assert result.failed == 0, ''.join(report)


def test_examples_are_found():
    """Else the test above would pass for the wrong reason."""
    assert sum(len(examples(page).examples) for page in WITH_EXAMPLES) > 60
    for page in PAGES:
        stray = [line for line, code in blocks(page, 'python') if '>>> ' in code]
        assert not stray, f'{page.name}: write ```pycon, the lines {stray} are not run'


# ---------------------------------------------------------------- links


def slug(heading: str) -> str:
    """The anchor that GitHub and these pages give to a heading."""
    heading = re.sub(r'[^\w\- ]', '', re.sub(r'\[(.*?)\]\(.*?\)', r'\1', heading).lower())
    return heading.strip().replace(' ', '-')


def anchors(page: Path) -> set[str]:
    text = FENCE.sub('', page.read_text())
    return {slug(heading) for heading in re.findall(r'^#+ (.*)$', text, re.M)}


@pytest.mark.parametrize('page', TEXTS, ids=name_of)
def test_links_lead_somewhere(page):
    text = re.sub(r'`[^`\n]*`', '', FENCE.sub('', page.read_text()))
    wrong = []
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        if re.match(r'\w+:', link):
            continue
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


def facts(readme: Path) -> tuple[list, list, list]:
    """What does not depend on the language: links, numbers in tables, code without comments."""
    text = readme.read_text()
    prose = FENCE.sub('', text)
    links = [link for link in re.findall(r'\]\((.*?)\)', prose) if 'README' not in link]
    rows = [re.findall(r'\d[\d.]*', line) for line in prose.splitlines() if line.startswith('|')]
    code = [re.sub(r' *#.*', '', match['code']) for match in FENCE.finditer(text)]
    return sorted(links), rows, code


def test_readmes_say_the_same():
    assert facts(ROOT / 'README_zh-CN.md') == facts(ROOT / 'README.md')


def test_every_page_is_in_the_contents():
    listed = {entry for _, code in blocks(DOCS / 'index.md', '{toctree}') for entry in code.split()}
    assert {page.stem for page in PAGES} - {'index'} <= listed


# ---------------------------------------------------------------- configs


def configs_of(page: Path) -> dict[str, str]:
    """The complete configs of a page, by the path that their first line names."""
    found = {}
    for _, code in blocks(page, 'python'):
        if first := re.match(r'# (\S+\.py)\n', code):
            found[first[1]] = code
    return found


WITH_BACKBONES = ('own_config', 'migration', 'ablations')
IN_STOCK_CONFIGS = {
    f'{page.stem}/{name}': code
    for page in (ROOT / 'README.md', *(DOCS / f'{name}.md' for name in WITH_BACKBONES))
    for name, code in configs_of(page).items()
}
FOR_OWN_DATA = configs_of(DOCS / 'own_data.md')


def labelled(scope: str) -> object:
    """What a framework wants beside an image of 64x64 pixels to compute its losses."""
    if scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        return DataSample().set_gt_label(1)
    if scope == 'mmseg':
        from mmengine.structures import PixelData
        from mmseg.structures import SegDataSample

        return SegDataSample(gt_sem_seg=PixelData(data=torch.ones(1, 64, 64, dtype=torch.long)))
    from mmengine.structures import InstanceData, PixelData
    from mmpose.structures import PoseDataSample

    weights = InstanceData(keypoint_weights=torch.ones(1, 17))
    fields = PixelData(heatmaps=torch.rand(17, 16, 16))
    return PoseDataSample(gt_instance_labels=weights, gt_fields=fields)


def test_stock_configs_are_found():
    """Whatever has a backbone in it is complete, and run below."""
    assert len(IN_STOCK_CONFIGS) == 8
    for page in TEXTS:
        for _, code in blocks(page, 'python'):
            if 'backbone=dict(' in code and page.stem not in ('own_data', 'CHANGELOG'):
                assert code in IN_STOCK_CONFIGS.values() or 'README_zh' in page.stem, code


@pytest.mark.parametrize('name', IN_STOCK_CONFIGS)
def test_backbone_in_a_stock_config(name, tmp_path):
    path = tmp_path / Path(name).name
    path.write_text(IN_STOCK_CONFIGS[name].replace("'../", f"'{ROOT}/configs/"))
    cfg = Config.fromfile(path)
    if cfg.get('data_preprocessor'):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
        on_cpu = dict(cfg.optim_wrapper, type='OptimWrapper')  # AMP needs a GPU
        wrapper = build_optim_wrapper(model, on_cpu)
        schedules = list(np.atleast_1d(cfg.param_scheduler))
        length = cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters
        assert schedules[0]['type'].endswith(('LinearLR', 'WarmupCosineLR'))  # a warm-up
        assert schedules[-1]['end'] == length
        for schedule in schedules:
            schedule = dict(schedule)
            schedule.pop('convert_to_iter_based', None)
            PARAM_SCHEDULERS.build(dict(schedule, optimizer=wrapper.optimizer))
        samples = [labelled(cfg.default_scope) for _ in range(2)]
        losses, _ = model.parse_losses(model(torch.rand(2, 3, 64, 64), samples, mode='loss'))
    assert type(model.backbone).__module__.startswith('mmhrformer.')
    assert type(wrapper.optimizer).__name__ in ('Adam', 'AdamW')  # with SGD it does not learn
    losses.backward()
    assert torch.isfinite(losses)


def noise(rng: np.random.Generator, path: Path, *shape: int, high: int = 256) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), rng.integers(0, high, shape).astype(np.uint8))


def make_flowers(rng: np.random.Generator, root: Path) -> None:
    for split in ('train', 'val'):
        for kind in ('daisy', 'rose', 'tulip'):
            noise(rng, root / split / kind / '001.jpg', 90, 120, 3)


def make_cats(rng: np.random.Generator, root: Path) -> None:
    (root / 'annotations').mkdir(parents=True)
    for split in ('train', 'val'):
        images, annotations = [], []
        for i in (1, 2):
            noise(rng, root / split / f'000{i}.jpg', 200, 160, 3)
            images.append(dict(id=i, file_name=f'000{i}.jpg', height=200, width=160))
            points = np.c_[rng.integers(40, 100, (5, 2)), np.full(5, 2)]
            annotations.append(
                dict(
                    id=i,
                    image_id=i,
                    category_id=1,
                    bbox=[20, 30, 100, 120],
                    area=12000,
                    iscrowd=0,
                    num_keypoints=5,
                    keypoints=points.ravel().tolist(),
                )
            )
        content = dict(images=images, annotations=annotations, categories=[dict(id=1, name='cat')])
        (root / f'annotations/{split}.json').write_text(json.dumps(content))


def make_leaves(rng: np.random.Generator, root: Path) -> None:
    for split in ('train', 'val'):
        for i in (1, 2):
            noise(rng, root / f'img_dir/{split}/00{i}.jpg', 120, 160, 3)
            noise(rng, root / f'ann_dir/{split}/00{i}.png', 120, 160, high=3)


OWN_DATA = {'my_flowers': make_flowers, 'my_cats': make_cats, 'my_leaves': make_leaves}
# Configs that only change the size of the input -> what they start from, and the new size.
SIZES = {
    'my_wide_flowers': ('my_flowers', (192, 192)),
    'my_square_cats': ('my_cats', (256, 256)),
    'my_small_leaves': ('my_leaves', (256, 256)),
}


def own_config(name: str, folder: Path) -> Config:
    """Save a config where the page says, write its data, and read it."""
    shutil.copytree(ROOT / 'configs', folder / 'configs')
    (folder / 'configs/my').mkdir()
    for path, text in FOR_OWN_DATA.items():
        (folder / path).write_text(text)
    cfg = Config.fromfile(folder / f'configs/my/{name}.py')
    base = SIZES[name][0] if name in SIZES else name
    OWN_DATA[base](np.random.default_rng(0), folder / cfg.data_root)
    return cfg


@pytest.mark.parametrize('name', OWN_DATA)
def test_own_data_without_a_clone(name, tmp_path, monkeypatch):
    """The same config comes of a base that print_config wrote beside it."""
    monkeypatch.chdir(tmp_path)
    text = FOR_OWN_DATA[f'configs/my/{name}.py']
    base = re.search(r"_base_ = \['\.\./\w+/(.*)\.py'\]", text)
    run([sys.executable, '-m', 'mmhrformer', 'print_config', base[1], '--out', f'{base[1]}.py'],
        tmp_path)  # fmt: skip
    (tmp_path / f'{name}.py').write_text(text.replace(base[0], f"_base_ = ['{base[1]}.py']"))
    flat, cfg = Config.fromfile(f'{name}.py'), own_config(name, tmp_path / 'clone')
    assert flat.to_dict() == cfg.to_dict()
    assert dead_options(flat) == late_variables(flat) == {}


def test_own_classes_keep_backbone_and_neck(tmp_path, monkeypatch):
    """Of the published classifier, all but the last layer."""
    pytest.importorskip('mmpretrain')
    cfg = own_config('my_flowers', tmp_path)
    assert cfg.load_from == 'mmhrformer://hrformer-small_8xb128_in1k'
    published = ROOT / 'configs/hrformer_cls/hrformer-small_8xb128_in1k.py'
    few = dict(num_modules=(1, 1, 1), num_blocks=1, channels=(32, 64, 128, 256))
    models = []
    for one in (Config.fromfile(published), cfg):
        one.model.backbone.arch = dict(few, num_heads=(1, 2, 4, 8))
        with DefaultScope.overwrite_default_scope('mmpretrain'):
            models.append(MODELS.build(one.model))
    theirs, mine = models
    torch.save(dict(state_dict=theirs.state_dict(), meta={}), tmp_path / 'published.pth')
    mine.init_weights()
    load_checkpoint(mine, f'mmhrformer://{tmp_path}/published.pth')  # as the runner does
    weights, expected = mine.state_dict(), theirs.state_dict()
    for name in expected:
        if not name.startswith('head.'):
            assert torch.equal(weights[name], expected[name]), name
    assert mine.head.fc.out_features == 3


@pytest.mark.parametrize('name', [*OWN_DATA, *SIZES])
def test_own_data_trains(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = own_config(name, tmp_path)
    assert dead_options(cfg) == late_variables(cfg) == {}
    # Streams as the heads want them, but fewer blocks and narrower heads, for the sake of time.
    channels = (32, 64, 128, 256)
    cfg.model.backbone.arch = dict(
        channels=channels, num_heads=(1, 2, 4, 8), num_modules=(1, 1, 1), num_blocks=1
    )
    cfg.model.backbone.init_cfg = None
    for head in cfg.model.get('decode_head', []):
        head.channels = 32
    if cfg.get('data_preprocessor'):
        cfg.model.data_preprocessor = cfg.data_preprocessor
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        train, val = (DATASETS.build(cfg[f'{s}_dataloader'].dataset) for s in ('train', 'val'))
        data = model.data_preprocessor(pseudo_collate([train[0], train[1]]), training=True)
        losses, _ = model.parse_losses(model(**data, mode='loss'))
    losses.backward()
    assert torch.isfinite(losses)
    assert any(p.grad.abs().sum() > 0 for p in model.backbone.stage4.parameters())
    assert len(train) == len(val)
    assert val[0]['inputs'].shape[0] == 3
    if name in SIZES:
        assert data['inputs'].shape[2:] == SIZES[name][1]
        short = min(val[0]['inputs'].shape[1:])
        assert short == SIZES[name][1][0]


# ---------------------------------------------------------------- pages


def test_figure_is_drawn(tmp_path):
    run([sys.executable, str(DOCS / 'draw_architecture.py'), str(tmp_path / 'figure.png')], ROOT)
    assert cv2.imread(str(tmp_path / 'figure.png')).std() > 10  # not empty


@pytest.mark.e2e
@pytest.mark.slow
def test_pages_are_built_without_a_warning(tmp_path):
    command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q', '-b', 'html']
    run([*command, '-d', str(tmp_path / 'trees'), str(DOCS), str(tmp_path / 'html')], ROOT)
    html = tmp_path / 'html'
    for page in PAGES:
        assert (html / f'{page.stem}.html').is_file()
    zoo = (html / 'model_zoo.html').read_text()
    assert 'td-hm_hrformer-small_8xb32-210e_coco-256x192' in zoo
    assert 'official repository' in zoo
    assert 'class="sig-name descname"' in (html / 'api.html').read_text()
