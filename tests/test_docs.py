"""Every example of the pages in docs/ runs, from its first block to its last."""

import importlib
import importlib.util
import logging
import os
import re
import warnings
from pathlib import Path

import pytest
from ranks import call_with_page

DOCS = Path(__file__).parents[1] / "docs"
# What each page's examples import, besides torch.
PAGES = {
    "accelerate": ["accelerate"],
    "lightning": ["lightning"],
    "loops": [],
    "timm": [],
    "torchtitan": None,  # its example needs what cannot be installed beside every torch
    "transformers": ["accelerate", "transformers"],
}


def blocks(page):
    text = (DOCS / f"{page}.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page, needed in PAGES.items() if needed is not None])
def test_examples_run(page, tmp_path, monkeypatch):
    for library in PAGES[page]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed: lrs_ext[{page}]")
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
    monkeypatch.setitem(os.environ, "ACCELERATE_USE_CPU", "true")
    monkeypatch.chdir(tmp_path)
    if "accelerate" in PAGES[page]:
        state = importlib.import_module("accelerate.state")
        state.AcceleratorState._reset_state(reset_partial_state=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    names = {"__name__": "example"}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        for number, block in enumerate(blocks(page)):
            exec(compile(block, f"docs/{page}.md block {number}", "exec"), names)
    checks = {
        "accelerate": lambda: names["auto"].done,
        "lightning": lambda: names["search"].auto.done,
        "loops": lambda: names["auto"].done and len(names["numbers"]) == 7,
        "timm": lambda: names["optimizer"].current_lr() == [0.0, 0.0],
        "transformers": lambda: names["search"].auto.done,
    }
    assert checks[page]()


def test_autolrs_on_several_ranks(engine, tmp_path):
    page = DOCS / "autolrs_ranks.md"
    for best in call_with_page("rank_page:search", page, tmp_path, engine):
        assert 1e-5 <= best <= 1e-1


def test_every_page_is_tested_and_its_links_exist():
    readme = (DOCS.parent / "README.md").read_text()
    elsewhere = {"autolrs_ranks", "distributed"}  # run on several ranks
    assert {page.stem for page in DOCS.glob("*.md")} == PAGES.keys() | elsewhere
    for page in DOCS.glob("*.md"):
        assert f"docs/{page.name}" in readme
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert target.startswith("https://") or (DOCS / target).exists(), (page.name, target)
