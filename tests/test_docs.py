"""The code blocks of the pages in docs/ run: those on several ranks, on two."""

import re
from pathlib import Path

from ranks import ranks

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


def test_autolrs_on_several_ranks():
    first, *others = blocks("autolrs_ranks.md")
    assert len(others) == 2
    whole = "\n".join((first, *others))
    for best in ranks(2, "autolrs_rank_jobs:start").call("autolrs_rank_jobs:run_code", whole):
        assert 1e-5 <= best <= 1e-1


def test_links_exist():
    for page in DOCS.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (DOCS / target).exists(), (page.name, target)
