"""Every code block of the README runs, and what it promises exists."""

import re
from pathlib import Path

import pytest

import lrs_ext

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
COMMANDS = re.findall(r"^```sh\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def test_there_are_blocks():
    assert len(BLOCKS) >= 3
    assert len(COMMANDS) == 1


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number):
    names = {}
    for block in BLOCKS[: number + 1]:  # a block may use what stands above it
        exec(compile(block, f"README.md block {number}", "exec"), names)
    if "current_lr" in BLOCKS[number]:
        assert names["optimizer"].current_lr() == pytest.approx([1e-2, 5e-4])


def test_the_example_trains():
    names = {}
    exec(compile(BLOCKS[0], "README.md example", "exec"), names)
    assert names["loss"].item() < 0.2
    assert names["optimizer"].current_lr() == [0.0]
    assert len(BLOCKS[0].splitlines()) <= 12


def test_commands_are_targets_of_the_makefile():
    makefile = README.with_name("Makefile").read_text()
    for command in re.findall(r"make ([a-z-]+)", TEXT):
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command


def test_tables_name_what_exists():
    for name in re.findall(r"^\| `(\w+)\(", TEXT, re.MULTILINE):
        assert callable(getattr(lrs_ext, name))
    for name in ("SGD", "Adam", "AdamW", "Lion", "LAMB"):
        assert f"`{name}`" in TEXT


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert target.startswith("https://") or (README.parent / target).exists(), target
