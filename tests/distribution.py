"""How pytest-xdist shares tests out: by function, but by file where a start takes long.

Its own groups, `--dist loadgroup`, have no effect under pytest 9.2.
"""

# Files whose tests share builds, processes or whole runs. They come first, the longest before all.
WHOLE_FILES = [
    "tests/test_packaging.py",
    "tests/test_host_cuda.py",
    "tests/test_distributed.py",
    "tests/test_autolrs_ranks.py",
    "tests/test_autolrs_shards.py",
    "tests/test_triton_compile.py",
    "tests/test_cuda_build.py",
    "tests/test_autolrs_kill.py",
    "tests/test_cpu_builds.py",
    "tests/test_bench_rex.py",
    "tests/test_cuda_on_host.py",
    "tests/test_zero.py",
    "tests/test_framework_ranks.py",
]


def place_of(nodeid):
    """Returns the place of a test's file among `WHOLE_FILES`, after them for others."""
    file = nodeid.partition("::")[0]
    return WHOLE_FILES.index(file) if file in WHOLE_FILES else len(WHOLE_FILES)


def scheduling(config, log):
    """Returns the scheduler of pytest-xdist, for which the tests have come in their order."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            return file if file in WHOLE_FILES else f"{file}::{test.partition('[')[0]}"

    config.option.loadscopereorder = False
    return Scheduling(config, log)
