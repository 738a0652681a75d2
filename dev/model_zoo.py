"""Check and update the counts in the metafiles and the tables in the READMEs.

python dev/model_zoo.py --check                           # check all counts and tables
python dev/model_zoo.py --update                          # count, write metafiles and tables
python dev/model_zoo.py --markdown configs/hrformer_pose  # only update the table of this README.md

Counting all models takes about a minute on one CPU core.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import warnings
from pathlib import Path

import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmhrformer.analysis.complexity import complexity
from mmhrformer.configs import config_root

# Field of a metafile -> key in the result of `complexity`.
COUNTS = {'FLOPs': 'macs', 'FLOPs (official count)': 'flops_official', 'Parameters': 'parameters'}

# Metric of a metafile -> its title in a table, and the factor to percent.
METRICS = {
    'Top 1 Accuracy': ('top-1', 1),
    'Top 5 Accuracy': ('top-5', 1),
    'AP': ('AP', 100),
    'AP@0.5': ('AP50', 100),
    'AP@0.75': ('AP75', 100),
    'AR': ('AR', 100),
    'mIoU': ('mIoU', 1),
    'mIoU(ms+flip)': ('mIoU, multi-scale', 1),
}

# Source of a result -> publisher of its checkpoint. Where the paper's numbers differ from those of
# the official repository, their checkpoint is unknown.
CHECKPOINTS = {'official repository': 'official', 'mmpose': 'mmpose'}

BEGIN = '<!-- model zoo: written by dev/model_zoo.py --markdown, do not edit -->'
END = '<!-- end of model zoo -->'
NOTHING = '–'  # noqa: RUF001


def metafiles(root: Path) -> list[Path]:
    """The metafiles listed in ``model-index.yml`` in the folder of the configs."""
    index = yaml.safe_load((root / 'model-index.yml').read_text())
    return [root.parent / path for path in index['Import']]


def read_models(metafile: Path) -> list[dict]:
    """The entries of a metafile, one per config."""
    return yaml.safe_load(metafile.read_text())['Models']


def count(model: dict, root: Path) -> dict[str, int]:
    """Count parameters and operations of an entry's config at its input size.

    Args:
        model (dict): An entry of a metafile.
        root (Path): The folder of the configs.

    Returns:
        dict[str, int]: One number per key of ``COUNTS``.
    """
    cfg = Config.fromfile(root.parent / model['Config'])
    shape = (1, 3, *map(int, model['Metadata']['Input Size'].split('x')))
    # Swin Transformers of mmpretrain read values of tensors while they are built.
    device = 'cpu' if 'Swin' in cfg.model.backbone.type else 'meta'
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device(device):
        network = MODELS.build(cfg.model).to('meta')
    # Counting needs only shapes: without data it takes seconds instead of minutes.
    with torch.device('meta'):
        counts = complexity(network, shape)
    return {field: counts[key] for field, key in COUNTS.items()}


def write_counts(text: str, name: str, counts: dict[str, int]) -> str:
    """Insert counts into the text of a metafile, keeping its order and comments.

    Args:
        text (str): Text of the metafile.
        name (str): Name of the entry.
        counts (dict[str, int]): Its numbers.

    Returns:
        str: The new text.

    Raises:
        ValueError: If the entry lacks the line for a number.
    """
    entry = re.search(rf'^- Name: {re.escape(name)}$.*?(?=^- Name: |\Z)', text, re.M | re.S)
    if entry is None:
        raise ValueError(f'there is no line "- Name: {name}"')
    lines = entry[0]
    for field, number in counts.items():
        line = re.compile(rf'^( +{re.escape(field)}: )\d+', re.M)
        lines, found = line.subn(rf'\g<1>{number}', lines)
        if found != 1:
            raise ValueError(f'{name}: write one line "    {field}: 0" into its Metadata')
    return text[: entry.start()] + lines + text[entry.end() :]


def weights_of(model: dict, result: dict) -> list[dict]:
    """The checkpoints for a result: its own, and those of the backbone only."""
    owner = CHECKPOINTS.get(result.get('Reported By'))
    sources = model.get('Sources', []) if owner else []
    return [s for s in sources if s['From'] == owner or s['Holds'] == 'backbone']


def markdown(models: list[dict]) -> str:
    """The table of a README: one row per result of a model, or one if it has none.

    Args:
        models (list[dict]): Entries of a metafile.

    Returns:
        str: The table, in Markdown.
    """
    rows = [(model, result) for model in models for result in model.get('Results') or [{}]]
    used = [name for name in METRICS if any(name in r.get('Metrics', {}) for _, r in rows)]
    titles = ['config', 'data set', 'input', 'parameters', 'FLOPs (MACs)']
    titles += [METRICS[name][0] for name in used] + ['reported by', 'weights']
    lines = [titles, [':--', ':--', ':-:', '--:', '--:', *['--:'] * len(used), ':--', ':--']]
    for model, result in rows:
        meta, metrics = model['Metadata'], result.get('Metrics', {})
        weights = [
            f'[{s["From"]}: {s["Holds"]}, {s["Kind"]}]({s["Link"]})'
            for s in weights_of(model, result)
        ]
        lines.append(
            [
                f'[{model["Name"]}]({Path(model["Config"]).name})',
                result.get('Dataset', meta['Training Data']),
                meta['Input Size'],
                f'{meta["Parameters"] / 1e6:.1f} M',
                f'{meta["FLOPs (official count)"] / 1e9:.2f} G ({meta["FLOPs"] / 1e9:.2f} G)',
                *(f'{metrics[n] * METRICS[n][1]:.1f}' if n in metrics else NOTHING for n in used),
                result.get('Reported By', NOTHING),
                '<br>'.join(weights) or NOTHING,
            ]
        )
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def with_table(readme: str, table: str) -> str:
    """The text of a README with the table between its two markers."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1:
        raise ValueError(f'add two lines, between which the table goes:\n{BEGIN}\n{END}')
    head, rest = readme.split(BEGIN)
    return f'{head}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}'


def renew_table(metafile: Path) -> None:
    """Update the table of the README next to a metafile."""
    readme = metafile.with_name('README.md')
    try:
        readme.write_text(with_table(readme.read_text(), markdown(read_models(metafile))))
    except (FileNotFoundError, ValueError) as err:
        sys.exit(f'model_zoo.py: {readme}: {err}')
    print(f'table written to {readme}')


def update(root: Path) -> None:
    """Count all models, and write metafiles and tables."""
    for metafile in metafiles(root):
        for model in read_models(metafile):
            counts = count(model, root)
            print(f'{model["Name"]}: {counts["Parameters"]:,} parameters, {counts["FLOPs"]:,} MACs')
            # After each model, to keep the counts of an interrupted run.
            try:
                text = write_counts(metafile.read_text(), model['Name'], counts)
            except ValueError as err:
                sys.exit(f'model_zoo.py: {metafile}: {err}')
            metafile.write_text(text)
        renew_table(metafile)


def wrong_counts(model: dict, root: Path) -> list[str]:
    """Messages about the numbers of an entry that do not match its config."""
    return [
        f'{model["Name"]}: {field} is {number:,}, the metafile says {model["Metadata"][field]:,}'
        for field, number in count(model, root).items()
        if number != model['Metadata'][field]
    ]


def check(root: Path) -> list[str]:
    """A message for each wrong number, and for each table that is not that of its metafile."""
    messages = []
    for metafile in metafiles(root):
        models = read_models(metafile)
        for model in models:
            messages += wrong_counts(model, root)
        readme = metafile.with_name('README.md')
        if markdown(models) not in readme.read_text():
            messages.append(f'{readme}: the table is old')
    return messages


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument('--check', action='store_true', help='exit with 1 if anything is wrong')
    action.add_argument('--update', action='store_true', help='write the metafiles and tables')
    action.add_argument('--markdown', type=Path, metavar='FOLDER', help='write one table')
    args = parser.parse_args()
    # Silence irrelevant messages of the frameworks.
    warnings.simplefilter('ignore')
    logging.disable(logging.WARNING)
    if args.check:
        messages = check(config_root())
        print('\n'.join(messages) or 'all numbers and tables are correct')
        sys.exit(1 if messages else 0)
    elif args.update:
        update(config_root())
    else:
        renew_table(args.markdown / 'metafile.yml')


if __name__ == '__main__':
    main()
