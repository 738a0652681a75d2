"""What configs tell about the classes or keypoints of a model."""

from __future__ import annotations

import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from needs import needs

from mmhrformer.datasets.meta import meta_of_dataset

pytestmark = needs('mmpretrain')
DATASET = dict(type='CIFAR10', metainfo=dict(classes=('a', 'b')))


@pytest.mark.parametrize(
    'dataset',
    [
        DATASET,
        dict(type='RepeatDataset', times=2, dataset=DATASET),
        dict(type='ConcatDataset', datasets=[DATASET, dict(type='CIFAR10')]),
        dict(type='RepeatDataset', dataset=dict(type='ConcatDataset', datasets=[DATASET])),
    ],
    ids=lambda dataset: dataset['type'],
)
def test_data_sets_in_wrappers_tell_too(dataset):
    cfg = Config(dict(default_scope='mmpretrain', test_dataloader=dict(dataset=dataset)))
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        assert meta_of_dataset(cfg)['classes'] == ('a', 'b')


def test_without_data_nothing_is_told():
    assert meta_of_dataset(Config(dict(default_scope='mmpretrain'))) == {}
