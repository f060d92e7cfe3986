"""The site: `scripts/docs`. Its source is the repository, so that pages stay where a reader of the code looks for them
(SECURITY.md, benchmarks/results), links between files are links between pages, and none has a copy.

A page per algorithm is made at build time from the docstrings of its module and its class, into docs/algorithms/.
"""

import inspect
import re
import sys
from pathlib import Path

from consilium.core import Algorithm
from consilium.experiment import WORLDS
from consilium.recipes import RECIPES, find

ROOT = Path(__file__).parent.parent
project = "Consilium"
author = copyright = "The Consilium authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["docs/**.md", "benchmarks/results/*.md", "SECURITY.md", "CHANGELOG.md"]
exclude_patterns = [p.name for p in ROOT.iterdir() if p.is_dir() and p.name not in ("docs", "benchmarks")]
myst_heading_anchors = 3
highlight_language = "none"
default_role = "code"  # docstrings are written as Markdown
smartquotes = False
autodoc_member_order = "bysource"
maximum_signature_line_length = 60
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "Consilium"
html_static_path = ["site.css"]
html_css_files = ["site.css"]
html_extra_path = ["redirect"]  # index.html, which leads to docs/index.html
html_show_sphinx = html_show_copyright = html_copy_source = False

COMPARED = {
    "moe": ("fedmoe-docstrings", "FedMoE"),
    "cohort": ("pfedmoe-digits --name one-cnn --model.architectures mnist-5", "pFedMoE"),
    "mixed": ("pfedmoe-digits", "pFedMoE"),
}
"""Where a method is shown: world -> a recipe that needs no file, and whose method it is."""
PAGE = """\
# {name}

**{title}**

{text}

## Run it

It is for {worlds}.

```bash
{commands}
```

## Options

Set by `--algorithm.NAME VALUE`, in a recipe of the method's own or with a saved experiment of it
(`consilium run runs/.../config.json`).

```{{eval-rst}}
.. autoclass:: {place}.{name}
```
"""


def algorithm_page(algorithm: type[Algorithm]) -> str:
    """Markdown: what the docstring of its module says, how it is run, and its options."""
    name, module = algorithm.__name__, sys.modules[algorithm.__module__]
    title, text = inspect.getdoc(module).split("\n", 1)
    commands = [f"consilium run {r.name}" for r in RECIPES.values() if type(r.make().algorithm) is algorithm][:1]
    for recipe, rival in map(COMPARED.get, algorithm.worlds):
        commands.append(
            f"consilium compare {recipe} --algorithms {','.join(dict.fromkeys([name, rival, 'Standalone']))}"
        )
    return PAGE.format(
        name=name,
        place=algorithm.__module__,
        title=title,
        text=re.sub(r"https?://[^\s,;)]*[^\s,;).]", r"<\g<0>>", text),
        worlds="; or ".join(WORLDS[world] for world in algorithm.worlds),
        commands="\n".join(commands),
    )


def write_algorithm_pages(app) -> None:
    find("fedmoe-docstrings")  # imports all recipes
    folder = ROOT / "docs/algorithms"
    folder.mkdir(exist_ok=True)
    pages = {f"{name}.md": algorithm_page(algorithm) for name, algorithm in Algorithm.registry.items()}
    for path in folder.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for name, page in pages.items():
        path = folder / name
        if not path.is_file() or path.read_text() != page:
            path.write_text(page)


def setup(app) -> None:
    app.connect("builder-inited", write_algorithm_pages)
