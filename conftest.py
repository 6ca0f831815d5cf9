"""Leaves out the doctests of modules whose framework is not installed; all others must import."""

from importlib.util import find_spec

FRAMEWORKS = {
    "lrs_ext/integrations/lightning.py": ("lightning", "pytorch_lightning"),
    "lrs_ext/integrations/transformers.py": ("transformers",),
    "lrs_ext/triton_*.py": ("triton",),
}
collect_ignore_glob = [path for path, names in FRAMEWORKS.items() if not any(map(find_spec, names))]
# It has no test of its own and imports two frameworks.
collect_ignore = ["tests/rank_checks_frameworks.py"]
