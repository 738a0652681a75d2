"""The pages are true: their examples run, their configs train, their links lead somewhere."""

from __future__ import annotations

import doctest
import re
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope
from needs import may_need
from pages import DOCS, FENCE, OWN_DATA, PAGES, blocks, configs_of, name_of
from places import ROOT, run

from mmhrformer.utils.addresses import repository

pytestmark = may_need('mmpose', 'mmseg')

TEXTS = [*PAGES, *sorted(ROOT.glob('*.md')), *sorted(ROOT.glob('configs/*/README.md'))]


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
    """Otherwise the test above would pass for the wrong reason."""
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


def facts(readme: Path) -> tuple[set, set, set]:
    """Language-independent parts: links, numbers, lines of code without comments."""
    text = readme.read_text()
    prose = FENCE.sub('', text)
    links = {link for link in re.findall(r'\]\((.*?)\)', prose) if 'README' not in link}
    code = ''.join(match['code'] for match in FENCE.finditer(text))
    return links, set(re.findall(r'\d[\d.]*', text)), set(re.sub(' *#.*', '', code).splitlines())


def test_chinese_readme_says_what_the_english_one_says():
    """It is shorter: it leads to the English pages."""
    for chinese, english in zip(facts(ROOT / 'README_zh-CN.md'), facts(ROOT / 'README.md')):
        assert chinese
        assert chinese <= english


def test_every_page_is_in_the_contents():
    listed = {entry for _, code in blocks(DOCS / 'index.md', '{toctree}') for entry in code.split()}
    assert {page.stem for page in PAGES} - {'index'} <= listed


# ---------------------------------------------------------------- configs


WITH_BACKBONES = ('own_config', 'checkpoints', 'ablations')
IN_STOCK_CONFIGS = {
    f'{page.stem}/{name}': code
    for page in (ROOT / 'README.md', *(DOCS / f'{name}.md' for name in WITH_BACKBONES))
    for name, code in configs_of(page).items()
}
# own_config.md says that its classifier may start from another config, too.
RESNET, HRNET = 'resnet/resnet50_8xb32_in1k.py', 'hrnet/hrnet-w32_4xb32_in1k.py'
ON_HRNET = IN_STOCK_CONFIGS['own_config/own_classification.py'].replace(RESNET, HRNET)
BUILT = {**IN_STOCK_CONFIGS, 'own_config/own_classification_on_hrnet.py': ON_HRNET}


def labelled(scope: str) -> object:
    """Data samples that a framework needs, besides an image of 64x64 pixels, for its losses."""
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
    assert len(IN_STOCK_CONFIGS) == 7
    assert HRNET in ON_HRNET
    assert HRNET in (DOCS / 'own_config.md').read_text()
    for page in TEXTS:
        for _, code in blocks(page, 'python'):
            if 'backbone=dict(' in code and page != OWN_DATA and page.stem != 'CHANGELOG':
                assert code in IN_STOCK_CONFIGS.values(), code


@pytest.mark.parametrize('name', BUILT)
def test_backbone_in_a_stock_config(name, tmp_path):
    path = tmp_path / Path(name).name
    path.write_text(BUILT[name].replace("'../", f"'{ROOT}/configs/"))
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
    assert 'data:image/png' in (html / 'tutorial.html').read_text() or list(
        html.glob('_images/*.png')
    )
    walkthrough = (html / 'walkthrough.html').read_text()
    assert f'href="{repository()}/blob/main/mmhrformer/models/ffn.py"' in walkthrough
    assert 'class="reference download' not in walkthrough
