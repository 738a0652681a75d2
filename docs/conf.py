"""How Sphinx builds these pages: ``python -m sphinx -W -b html docs docs/_build/html``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'dev')]

from model_zoo import markdown, metafiles, read_models  # noqa: E402

from mmhrformer.configs import config_root  # noqa: E402
from mmhrformer.utils.addresses import repository  # noqa: E402
from mmhrformer.version import __version__  # noqa: E402

project = 'mmhrformer'
author = 'the contributors of mmhrformer'
copyright = author
version = release = __version__

extensions = [
    'myst_nb',
    'sphinx.ext.autodoc',
    'sphinx.ext.napoleon',
    'sphinx.ext.viewcode',
    'sphinx_copybutton',
]
exclude_patterns = ['_build']
suppress_warnings = ['misc.highlighting_failure']  # an apostrophe in "the framework's train.py"
highlight_language = 'none'  # of blocks without a language, such as outputs and folder trees
html_theme = 'sphinx_rtd_theme'
html_static_path = ['_static']
html_css_files = ['custom.css']
html_show_sourcelink = False
html_copy_source = False

# Links between pages are written as on GitHub: page.md#heading.
myst_heading_anchors = 3
myst_enable_extensions = ['colon_fence']
nb_execution_mode = 'off'  # the tutorial is stored with its outputs

# Code for a framework is documented without importing it, so the pages can be built without it.
autodoc_mock_imports = ['mmdet', 'mmpose', 'mmpretrain', 'mmseg']
autodoc_member_order = 'bysource'
autodoc_typehints = 'none'  # types are in the docstrings
autodoc_inherit_docstrings = False
napoleon_numpy_docstring = False
napoleon_use_rtype = False
copybutton_prompt_text = r'>>> |\.\.\. '
copybutton_prompt_is_regexp = True


class ModelZoo(SphinxDirective):
    """``{model-zoo} FOLDER``: the table of ``configs/FOLDER/metafile.yml``, made in the build."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the table as Markdown."""
        folder = self.arguments[0]
        (metafile,) = (path for path in metafiles(config_root()) if path.parent.name == folder)
        self.env.note_dependency(str(metafile))
        # The table links to the configs as the README beside them does.
        table = re.sub(
            r'\]\((?!https?:)', f'](../configs/{folder}/', markdown(read_models(metafile))
        )
        container = nodes.container(classes=['wide-table'])
        self.state.nested_parse(StringList(table.splitlines(), str(metafile)), 0, container)
        return [container]


class SourceLinks(SphinxTransform):
    """Links to files and folders that are no pages: on the site they open the repository."""

    default_priority = 10

    def apply(self) -> None:
        """Replace downloads, and what Sphinx could not resolve."""
        for link in list(self.document.findall(addnodes.pending_xref)):
            self.replace(link, self.source(link['reftarget']))
        for link in list(self.document.findall(addnodes.download_reference)):
            self.replace(link, (DOCS / link['reftarget']).resolve())

    def source(self, target: str) -> Path | None:
        """The file or folder outside of ``docs`` that an unresolved link names."""
        path = (DOCS / target).resolve()
        page = path.with_name(f'{path.name}.md')
        outside = not path.is_relative_to(DOCS)
        return next((one for one in (path, page) if outside and one.exists()), None)

    def replace(self, link: nodes.Element, path: Path | None) -> None:
        """Let a link lead to a path in the repository."""
        if link.get('reftype') == 'myst' and path:
            kind = 'tree' if path.is_dir() else 'blob'
            address = f'{repository()}/{kind}/main/{path.relative_to(ROOT)}'
            link.replace_self(nodes.reference('', '', *link.children, refuri=address))


def setup(app: Sphinx) -> None:
    """Register what these pages need."""
    app.add_directive('model-zoo', ModelZoo)
    app.add_transform(SourceLinks)
