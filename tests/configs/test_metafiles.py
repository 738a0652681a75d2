"""The metafiles: one true entry for each config, readable by mim, and tables that follow them."""

from __future__ import annotations

import re
import shutil

import golden
import model_zoo as zoo
import pytest
import yaml
from needs import may_need

from mmhrformer.configs import config_root

pytestmark = may_need('mmpose', 'mmseg')

ROOT = config_root()
METAFILES = zoo.metafiles(ROOT)
MODELS = {model['Name']: model for path in METAFILES for model in zoo.read_models(path)}
OUTSIDE = ('demo', 'hrformer_det')  # nobody published weights or results of such models
CONFIGS = {path.stem: path for path in ROOT.glob('[!_]*/*.py') if path.parent.name not in OUTSIDE}
every_model = pytest.mark.parametrize('model', MODELS.values(), ids=MODELS)


# ------------------------------------------------------------------ entries


def test_every_config_has_one_entry():
    names = [model['Name'] for path in METAFILES for model in zoo.read_models(path)]
    assert sorted(names) == sorted(CONFIGS)


@every_model
def test_entry_belongs_to_its_config(model):
    config = CONFIGS[model['Name']]
    assert ROOT.parent / model['Config'] == config
    collections = yaml.safe_load((config.parent / 'metafile.yml').read_text())['Collections']
    assert model['In Collection'] in [collection['Name'] for collection in collections]
    assert all((ROOT.parent / collection['README']).is_file() for collection in collections)


@every_model
def test_input_size_is_that_of_the_config(model):
    cfg = golden.read_config(CONFIGS[model['Name']])
    size = cfg.get('crop_size', (224, 224))
    if 'codec' in cfg:
        size = cfg.codec.input_size[::-1]  # mmpose writes the width first
    assert model['Metadata']['Input Size'] == '{}x{}'.format(*size)


@every_model
def test_results_say_who_reports_them(model):
    tasks = {'Image Classification', 'Body 2D Keypoint', 'Semantic Segmentation'}
    reported = []
    for result in model.get('Results', []):
        assert set(result) == {'Task', 'Dataset', 'Metrics', 'Reported By'}
        assert result['Task'] in tasks
        assert result['Dataset'].startswith(model['Metadata']['Training Data'])
        assert result['Reported By'] in ('paper', 'official repository', 'mmpose')
        for name, value in result['Metrics'].items():
            assert 35 < value * zoo.METRICS.get(name, ('', 100))[1] < 100, name
        reported.append((result['Dataset'], result['Reported By']))
    assert len(reported) == len(set(reported))


@every_model
def test_sources_are_whole_links(model):
    sources = model.get('Sources', [])
    assert model.get('Weights') == (sources[0]['Link'] if sources else None)
    for source in sources:
        assert set(source) <= {'From', 'Link', 'Kind', 'Holds', 'Options', 'SHA256'}
        assert re.fullmatch('([0-9a-f]{64})?', source.get('SHA256', ''))
        assert source['Holds'] in ('whole model', 'backbone')
        pattern = {
            (
                'mmpose',
                'file',
            ): r'https://download\.openmmlab\.com/mmpose/\S+-[0-9a-f]{8}_\d{8}\.pth',
            ('official', 'share page'): r'https://1drv\.ms/u/s![\w!-]{20,}\?e=\w{6}',
        }[source['From'], source['Kind']]
        assert re.fullmatch(pattern, source['Link'])
    official = [source['Link'] for source in sources if source['From'] == 'official']
    if 'Converted From' in model:
        assert model['Converted From']['Weights'] in official


def test_different_models_have_different_links():
    """Configs share a checkpoint only where they differ in the test set or in the GPUs."""
    owners: dict[str, set[str]] = {}
    for name, model in MODELS.items():
        for source in model.get('Sources', []):
            architecture = re.sub('-test-dev|_(8xb128|32xb32)', '', name)
            owners.setdefault(source['Link'], set()).add(architecture)
    assert all(len(names) == 1 for names in owners.values())
    assert len(owners) == 3 + 2 + 4 + 4 + 12  # ImageNet, COCO, segmentation


# ------------------------------------------------------------------ numbers

KNOWN = {
    'hrformer-tiny_8xb128_in1k': [78.5, 78.6],  # paper, official repository
    'hrformer-small_8xb128_in1k': [81.2],
    'hrformer-base_8xb128_in1k': [82.8],
    'td-hm_hrformer-small_8xb32-210e_coco-256x192': [0.740, 0.738],  # official, mmpose
    'td-hm_hrformer-small_8xb32-210e_coco-384x288': [0.756, 0.757],
    'td-hm_hrformer-small_8xb32-210e_coco-test-dev-384x288': [0.745],
    'td-hm_hrformer-base_8xb32-210e_coco-256x192': [0.756, 0.754],
    'td-hm_hrformer-base_8xb8-210e_coco-384x288': [0.772, 0.774],
    'td-hm_hrformer-base_8xb8-210e_coco-test-dev-384x288': [0.762],
    'ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024': [(80.0, 81.0)],
    'ocrnet_hrformer-base_8xb1-80k_cityscapes-512x1024': [(81.4, 82.0)],
    'ocrnet_hrformer-base-w15_8xb1-80k_cityscapes-512x1024': [(81.9, 82.6)],
    'ocrnet_hrformer-small_8xb2-60k_pascal-context-59-520x520': [(53.8, 54.6)],
    'ocrnet_hrformer-base_8xb2-60k_pascal-context-59-520x520': [(56.3, 57.1)],
    'ocrnet_hrformer-base-w15_8xb2-60k_pascal-context-59-520x520': [(57.6, 58.5)],
    'ocrnet_hrformer-small_8xb2-60k_coco-stuff10k-520x520': [(37.9, 38.9)],
    'ocrnet_hrformer-base_8xb2-60k_coco-stuff10k-520x520': [(41.6, 42.5)],
    'ocrnet_hrformer-base-w15_8xb2-60k_coco-stuff10k-520x520': [(42.4, 43.3)],
    'ocrnet_hrformer-small_8xb2-150k_ade20k-520x520': [(44.0, 45.1)],
    'ocrnet_hrformer-base_8xb2-150k_ade20k-520x520': [(46.3, 47.6)],
    'ocrnet_hrformer-base-w13_8xb2-150k_ade20k-520x520': [(48.7, 50.0)],
}
UNKNOWN = [
    'td-hm_hrformer-tiny_8xb32-210e_coco-256x192',
    'td-hm_hrformer-tiny_8xb32-210e_coco-384x288',
    'ocrnet_hrformer-base-w15_8xb2-150k_ade20k-520x520',
]


@pytest.mark.parametrize('name', KNOWN)
def test_results_are_the_reported_ones(name):
    results = [result['Metrics'] for result in MODELS[name]['Results']]
    if name.startswith('ocrnet'):
        found = [(metrics['mIoU'], metrics['mIoU(ms+flip)']) for metrics in results]
    else:
        found = [metrics.get('AP', metrics.get('Top 1 Accuracy')) for metrics in results]
    assert found == KNOWN[name]


def test_what_nobody_reports_is_left_out():
    ours = {n: model for n, model in MODELS.items() if '/ablations/' not in model['Config']}
    assert [name for name, model in ours.items() if 'Results' not in model] == UNKNOWN
    assert [name for name, model in ours.items() if 'Weights' not in model] == UNKNOWN
    base, same = MODELS['hrformer-base_8xb128_in1k'], MODELS['hrformer-base_32xb32_in1k']
    assert (same['Results'], same['Sources']) == (base['Results'], base['Sources'])


@pytest.mark.parametrize(
    'name',
    [
        'hrformer-tiny_8xb128_in1k',
        'hrformer-small_8xb128_in1k',
        'hrformer-base_8xb128_in1k',
        'td-hm_hrformer-small_8xb32-210e_coco-256x192',
        'ocrnet_hrformer-small_8xb1-80k_cityscapes-512x1024',
    ],
)
def test_counts_are_true(name):
    """The other configs: ``python dev/model_zoo.py --check``."""
    assert zoo.wrong_counts(MODELS[name], ROOT) == []


# ------------------------------------------------------------------ READMEs and the tool


@pytest.mark.parametrize('metafile', METAFILES, ids=lambda path: path.parent.name)
def test_table_of_the_readme_is_new(metafile):
    readme = metafile.with_name('README.md').read_text()
    assert readme == zoo.with_table(readme, zoo.markdown(zoo.read_models(metafile)))
    assert 'nobody has reproduced them with this code yet' in readme


@pytest.mark.parametrize('readme', sorted(ROOT.glob('*/README.md')), ids=lambda p: p.parent.name)
def test_links_of_the_readme_lead_somewhere(readme):
    for target in re.findall(r'\]\(([^)#]+)', readme.read_text()):
        assert target.startswith('https://') or (readme.parent / target).is_file(), target


@pytest.fixture
def copy(tmp_path):
    """A copy of the metafiles and READMEs, which a test may write into."""
    for path in ('model-index.yml', *(f'{m.parent.name}/{m.name}' for m in METAFILES)):
        (tmp_path / 'configs' / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / 'configs' / path)
    for path in METAFILES:
        shutil.copy(path.with_name('README.md'), tmp_path / 'configs' / path.parent.name)
    return tmp_path / 'configs'


@pytest.fixture
def _counted(monkeypatch):
    """Pretend that counting each config gave 7, 8, 9."""
    monkeypatch.setattr(zoo, 'count', lambda model, root: dict(zip(zoo.COUNTS, (7, 8, 9))))


@pytest.mark.usefixtures('_counted')
def test_update_changes_nothing_but_numbers(copy, capsys):
    zoo.update(copy)
    for metafile in zoo.metafiles(copy):
        before = (ROOT / metafile.parent.name / 'metafile.yml').read_text().splitlines()
        after = metafile.read_text().splitlines()
        changed = {(a.split(':')[0].strip(), b) for a, b in zip(before, after) if a != b}
        assert changed == {
            ('FLOPs', '    FLOPs: 7'),
            ('FLOPs (official count)', '    FLOPs (official count): 8'),
            ('Parameters', '    Parameters: 9'),
        }
        assert len(before) == len(after)
        readme = metafile.with_name('README.md').read_text()
        assert zoo.markdown(zoo.read_models(metafile)) in readme
    assert zoo.check(copy) == []
    assert 'hrformer-tiny_8xb128_in1k: 9 parameters, 7 MACs' in capsys.readouterr().out


@pytest.mark.usefixtures('_counted')
def test_check_names_what_is_wrong(copy, monkeypatch, capsys):
    zoo.update(copy)
    metafile, readme = copy / 'hrformer_cls/metafile.yml', copy / 'hrformer_pose/README.md'
    metafile.write_text(metafile.read_text().replace('Parameters: 9', 'Parameters: 1234567', 1))
    readme.write_text(readme.read_text().replace('74.0', '75.0'))
    capsys.readouterr()
    monkeypatch.setattr(zoo, 'config_root', lambda: copy)
    monkeypatch.setattr(zoo.logging, 'disable', lambda level: None)
    monkeypatch.setattr('sys.argv', ['model_zoo.py', '--check'])
    with pytest.raises(SystemExit, match='1'):
        zoo.main()
    assert capsys.readouterr().out.splitlines() == [
        'hrformer-tiny_8xb128_in1k: Parameters is 9, the metafile says 1,234,567',
        # The table has the number of the metafile, so it is old as well.
        f'{copy}/hrformer_cls/README.md: the table is old',
        f'{readme}: the table is old',
    ]


def test_missing_lines_are_named(copy):
    with pytest.raises(ValueError, match=r'a: write one line "    FLOPs: 0"'):
        zoo.write_counts('- Name: a\n  Metadata:\n- Name: b\n    FLOPs: 1\n', 'a', {'FLOPs': 2})
    with pytest.raises(ValueError, match='no line "- Name: c"'):
        zoo.write_counts('- Name: a\n', 'c', {'FLOPs': 2})
    readme = copy / 'hrformer_seg/README.md'
    readme.write_text(readme.read_text().replace(zoo.END, ''))
    with pytest.raises(SystemExit, match=f'{readme}: add two lines'):
        zoo.renew_table(readme.with_name('metafile.yml'))
    with pytest.raises(SystemExit, match=r'No such file.*README\.md'):
        zoo.renew_table(copy / 'demo/metafile.yml')


# ------------------------------------------------------------------ mim


def test_mim_reads_the_metafiles(tmp_path):
    """The layout of the installed package, with ``model-index.yml`` next to ``configs``."""
    modelindex = pytest.importorskip('modelindex.load_model_index')
    search = pytest.importorskip('mim.commands.search')
    shutil.copytree(ROOT, tmp_path / 'configs')
    shutil.copy(ROOT / 'model-index.yml', tmp_path)
    index = modelindex.load(str(tmp_path / 'model-index.yml'))
    assert not index.check_errors
    assert not any(model.check_errors for model in index.models)
    table = search.convert2df(index)
    assert sorted(table.index) == sorted(MODELS)
    small = table.loc['td-hm_hrformer-small_8xb32-210e_coco-256x192']
    # The result of the checkpoint that mim downloads.
    assert (small['coco/ap'], small['weight'].split('/')[2]) == (0.738, 'download.openmmlab.com')
    assert small['parameters'] == 7746779
