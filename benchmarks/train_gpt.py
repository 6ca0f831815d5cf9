"""The main job: train a small transformer with a learning-rate schedule inside the optimizer.

    python benchmarks/train_gpt.py                               # AdamW with REX
    python benchmarks/train_gpt.py --compare rex,linear,cosine   # one picture and a table
    python benchmarks/train_gpt.py --resume runs/NAME.pt         # go on after Ctrl-C

The text is the source of the interpreter's own standard library; whole files are held out for
validation. Writes a picture, a CSV and a checkpoint to ``runs/`` and prints their paths.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Sequence

# Read when torch is imported: a waiting thread sleeps soon instead of spinning. On 2 quiet cores
# that costs a tenth of the speed; beside other programs, spinning made steps several times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from gpt_config import JobError, parse_args

INSTALL = {
    "lrs_ext": "pip install -e .[train] in the root of the repository",
    "matplotlib": "pip install lrs_ext[plot]",
    "tqdm": "pip install lrs_ext[train]",
}


def check_installed() -> None:
    """Name what is missing before training starts, not after."""
    for package, command in INSTALL.items():
        if importlib.util.find_spec(package) is None:
            raise JobError(f"{package} is not installed: {command}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 after an error, 128 + the signal's number when stopped."""
    request = parse_args(argv)
    try:
        check_installed()
        from gpt_job import Interrupted, Job  # imports what check_installed has looked for

        try:
            Job(request).run()
        except Interrupted as stopped:
            return 128 + stopped.signum
    except JobError as error:
        print(f"train_gpt.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntrain_gpt.py: stopped at once, without saving", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
