"""The examples of docs/measures run, and print what the pages say."""

import doctest
import re
from pathlib import Path

import pytest
from torchmetrics import Metric

from lightning_iet import metrics

FOLDER = Path(__file__).parents[1] / "docs" / "measures"
PAGES = sorted(FOLDER.glob("*.md"))
MEASURES = [
    FOLDER / f"{stem}.md" for stem in re.findall(r"^\| \[.*\]\((\w+)\.md\)", (FOLDER / "README.md").read_text(), re.M)
]
HEADINGS = ("**Source.**", "**Range.**", "**Cost.**", "**How it misleads.**", "```python")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples_print_what_the_page_says(page):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        assert ">>>" in block, "an example that nothing checks"
        runner.run(doctest.DocTestParser().get_doctest(block, {}, page.name, str(page), 0))
    assert runner.failures == 0


@pytest.mark.parametrize("page", MEASURES, ids=lambda page: page.stem)
def test_every_page_says_source_range_cost_and_how_it_misleads(page):
    assert [heading for heading in HEADINGS if heading not in page.read_text()] == []


def test_every_measure_has_a_page():
    classes = [getattr(metrics, name) for name in metrics.__all__ if name[0].isupper()]
    names = {kind.__name__.lower() for kind in classes if issubclass(kind, Metric)}
    assert names == {page.stem.replace("_", "") for page in MEASURES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([\w./-]+\.md)\)", page.read_text())
    assert [target for target in targets if not (FOLDER / target).is_file()] == []
