"""demo/demo_data.py: formats, determinism, restart behavior and error messages."""

import hashlib
import importlib.util
import json
from pathlib import Path

import cv2
import demo_data as tool
import numpy as np
import pytest
from demo_figures import KEYPOINT_NAMES, sample_look
from demo_scenes import SCENE_CLASSES, SCENE_IGNORE, void_border
from golden import read_config


@pytest.fixture(scope='module')
def sets(tmp_path_factory):
    """One small copy of the drawn sets that the format tests only read."""
    root = tmp_path_factory.mktemp('demo')
    return tool.make_figures(root, train=24, val=6), tool.make_scenes(root, train=12, val=4)


def digest(folder):
    """Map every file of a folder to a hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def annotations(folder, split='train'):
    return json.loads((folder / 'annotations' / f'person_keypoints_{split}.json').read_text())


# ------------------------------------------------------------------ formats


def test_digits_are_an_imagenet_folder(tmp_path):
    pytest.importorskip('sklearn')
    folder = tool.make_digits(tmp_path)
    counts = {split: len(list((folder / split).glob('*/*.png'))) for split in ('train', 'val')}
    assert counts == {'train': 1397, 'val': 400}
    for split in counts:
        assert {path.name for path in (folder / split).iterdir()} == set('0123456789')
    names = [path.name for path in folder.rglob('*.png')]
    assert len(set(names)) == 1797, 'a digit is in both splits'
    image = cv2.imread(str(next((folder / 'val' / '3').iterdir())), cv2.IMREAD_UNCHANGED)
    assert image.shape == (32, 32, 3)
    assert image.min() < 30
    assert image.max() > 220


def test_figures_load_as_coco(sets):
    coco_api = pytest.importorskip('xtcocotools.coco')
    for split, count in (('train', 24), ('val', 6)):
        coco = coco_api.COCO(str(sets[0] / 'annotations' / f'person_keypoints_{split}.json'))
        assert len(coco.getImgIds()) == count
        assert coco.getCatIds(catNms=['person']) == [1]
        for info in coco.loadImgs(coco.getImgIds()):
            image = cv2.imread(str(sets[0] / split / info['file_name']))
            assert image.shape == (info['height'], info['width'], 3)
            assert 1 <= len(coco.getAnnIds(imgIds=info['id'])) <= 2


def test_category_is_cocos(sets):
    config = pytest.importorskip('mmengine').Config
    path = importlib.util.find_spec('mmpose')
    if path is None:
        pytest.skip('needs the COCO metainfo of mmpose')
    path = Path(path.origin).parent / '.mim/configs/_base_/datasets/coco.py'
    coco = config.fromfile(str(path)).dataset_info
    (category,) = annotations(sets[0])['categories']
    names = [coco.keypoint_info[i].name for i in range(17)]
    assert category['keypoints'] == names == list(KEYPOINT_NAMES)
    links = {tuple(coco.skeleton_info[i].link) for i in range(19)}
    assert {(names[a - 1], names[b - 1]) for a, b in category['skeleton']} == links


def test_figures_are_consistent(sets):
    for split in ('train', 'val'):
        data = annotations(sets[0], split)
        images = {image['id']: image for image in data['images']}
        assert len({person['id'] for person in data['annotations']}) == len(data['annotations'])
        assert {person['image_id'] for person in data['annotations']} == set(images)
        for person in data['annotations']:
            image = images[person['image_id']]
            x, y, w, h = person['bbox']
            points = np.reshape(person['keypoints'], (17, 3))
            seen = points[:, 2] > 0
            assert 0 < person['area'] <= w * h
            assert 0 <= x <= x + w <= image['width']
            assert 0 <= y <= y + h <= image['height']
            assert np.isin(points[:, 2], (0, 2)).all()
            assert person['num_keypoints'] == seen.sum() > 0
            assert not points[~seen].any()
            assert (points[seen, :2] >= (x, y)).all()
            assert (points[seen, :2] <= (x + w, y + h)).all()


def test_persons_left_is_on_the_right_of_the_image(sets):
    names, sides = KEYPOINT_NAMES, []
    for person in annotations(sets[0])['annotations']:
        points = np.reshape(person['keypoints'], (17, 3))
        for part in ('eye', 'ear', 'shoulder', 'hip'):
            left, right = (points[names.index(f'{side}_{part}')] for side in ('left', 'right'))
            if left[2] and right[2]:
                sides.append(left[0] > right[0])
    assert len(sides) > 80
    assert all(sides)


def test_left_side_is_not_always_the_lighter_one():
    """A fixed tint would turn horizontal flips into wrong labels."""
    sleeves = [sample_look(np.random.default_rng(i))['sleeves'] for i in range(20)]
    assert {sum(left) > sum(right) for left, right in sleeves} == {True, False}


def test_joint_outside_the_image_is_unlabelled():
    rngs = (np.random.default_rng([0, 0, i]) for i in range(80))
    people = [person for rng in rngs for person in tool.draw_figures(rng)[1]]
    cut = [person for person in people if person['num_keypoints'] < 17]
    assert 0 < len(cut) < 0.3 * len(people)
    assert min(person['num_keypoints'] for person in people) >= 11


def test_scenes_match_their_label_maps(sets):
    seen = set()
    for split, count in (('train', 12), ('val', 4)):
        images, maps = (
            sorted((sets[1] / kind / split).iterdir()) for kind in ('img_dir', 'ann_dir')
        )
        assert [path.stem for path in images] == [path.stem for path in maps]
        assert len(images) == count
        for image, labels in zip(images, maps):
            labels = cv2.imread(str(labels), cv2.IMREAD_UNCHANGED)
            assert labels.dtype == np.uint8
            assert labels.shape == cv2.imread(str(image)).shape[:2] == (128, 128)
            seen |= set(np.unique(labels).tolist())
    assert seen == {*range(len(SCENE_CLASSES)), SCENE_IGNORE}
    metainfo = read_config('demo/ocrnet_hrformer-demo_1xb16-100_scenes-96x96.py').metainfo
    assert metainfo.classes == SCENE_CLASSES
    assert len(set(map(tuple, metainfo.palette))) == len(SCENE_CLASSES) == 8


def test_every_class_is_frequent_enough_to_learn():
    maps = [tool.draw_scene(np.random.default_rng([0, 0, i]))[1] for i in range(30)]
    share = np.bincount(np.ravel(maps), minlength=256) / np.size(maps)
    assert share[: len(SCENE_CLASSES)].min() > 0.02
    assert share[SCENE_IGNORE] < 0.2


def test_void_border_lies_between_classes():
    labels = np.zeros((6, 8), np.uint8)
    labels[:, 4:] = 3
    assert void_border(labels).tolist() == [[0, 0, 0, 255, 255, 3, 3, 3]] * 6


# ------------------------------------------------------------------ determinism, restart


def test_same_seed_same_bytes(tmp_path):
    for make in (tool.make_figures, tool.make_scenes):
        first, second = (digest(make(tmp_path / name, train=3, val=2)) for name in 'ab')
        assert first == second
        assert digest(make(tmp_path / 'c', train=3, val=2, seed=1)) != first


def test_image_does_not_depend_on_the_counts(tmp_path, sets):
    for make, large in zip((tool.make_figures, tool.make_scenes), sets):
        small = digest(make(tmp_path, train=2, val=1))
        images = {name: value for name, value in small.items() if not name.endswith('.json')}
        assert len(set(images.values())) == len(images) > 0
        assert images.items() <= digest(large).items()


def test_complete_set_is_kept(tmp_path, monkeypatch, capsys):
    folder = tool.make_scenes(tmp_path, train=2, val=1)
    monkeypatch.setattr(tool, 'draw_scene', None)  # drawing again would fail
    assert tool.make_scenes(tmp_path, train=2, val=1) == folder
    assert capsys.readouterr().out.splitlines()[-1].endswith('kept')


@pytest.mark.parametrize('change', [{'seed': 7}, {'train': 3}, {}])
def test_other_set_is_replaced(tmp_path, monkeypatch, change):
    before = digest(tool.make_scenes(tmp_path, train=2, val=1))
    if not change:
        monkeypatch.setattr(tool, 'GENERATOR_VERSION', 99)
    folder = tool.make_scenes(tmp_path, **{'train': 2, 'val': 1, **change})
    assert digest(folder) != before
    assert [path.name for path in tmp_path.iterdir()] == ['scenes']


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_failure_keeps_the_older_set_and_leaves_nothing(tmp_path, monkeypatch, error):
    before = digest(tool.make_figures(tmp_path, train=1, val=1))

    def fail(rng):
        raise error

    monkeypatch.setattr(tool, 'draw_figures', fail)
    with pytest.raises(error):
        tool.make_figures(tmp_path, train=2, val=1)
    assert digest(tmp_path / 'figures') == before
    assert [path.name for path in tmp_path.iterdir()] == ['figures']


# ------------------------------------------------------------------ bad input


def test_folder_of_somebody_else_is_never_replaced(tmp_path):
    mine = tmp_path / 'figures' / 'notes.txt'
    mine.parent.mkdir()
    mine.write_text('keep me')
    with pytest.raises(ValueError, match=r'was not written by .* another folder with --out'):
        tool.make_figures(tmp_path, train=1, val=1)
    assert mine.read_text() == 'keep me'


def test_command_line(tmp_path, monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr('sys.argv', ['demo_data.py', *args])
        tool.main()

    monkeypatch.setitem(tool.TASKS, 'pose', lambda out, seed: print('pose', out, seed))
    call('--task', 'pose', '--out', str(tmp_path), '--seed', '5')
    assert capsys.readouterr().out == f'pose {tmp_path} 5\n'
    (tmp_path / 'file').write_text('')
    wrong = {
        '--seed=-5': '--seed -5: expected a non-negative integer',
        f'--out={tmp_path / "file"}': f'cannot write to --out {tmp_path / "file"}',
    }
    for arg, message in wrong.items():
        with pytest.raises(SystemExit, match='2'):
            call('--task', 'seg', arg)
        assert message in capsys.readouterr().err
