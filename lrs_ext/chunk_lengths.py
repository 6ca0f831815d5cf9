"""How many elements a thread or a block works on at once.

Chunks are the unit of work of a thread (CPU) or block (GPU): small enough that few large tensors
fill the machine, large enough that the work outweighs reading the table.
"""

from __future__ import annotations

_CPU_CHUNK = 8192
# Lengths for a GPU: the shortest, the longest, and the number of chunks from which on they grow.
_GPU_CHUNKS = (2048, 16384, 2048)
# Measured on an H100 and an H200 by benchmarks/bench_kernels.py. Short chunks leave less to wait
# for at the end; the more is computed for an element, and the faster the memory, the more elements
# it takes to outweigh the start of a block.
_CUDA_CHUNKS = {
    "float32": (1024, 2048, 1000),
    "bfloat16": (1024, 4096, 1000),
    "block8": (1024, 16384, 1000),
}
_LONGEST_CHUNK = 16384
_FAST_MEMORY = 4e12  # bytes/s by the data sheet, from which on chunks are twice as long


def chunk_elements(
    backend: str, algorithm: str, state_type: str, elements: int, memory_bandwidth: float
) -> int:
    """Returns the length of a chunk.

    Args:
        state_type: of the storage, by its native name.
        elements: of all tensors together.
        memory_bandwidth: of the device in bytes/s, read for "cuda" only.
    """
    if backend == "cpu":
        return _CPU_CHUNK
    is_one_pass = backend == "cuda" and algorithm != "lamb"
    chunk, longest, wanted = _CUDA_CHUNKS[state_type] if is_one_pass else _GPU_CHUNKS
    if is_one_pass and memory_bandwidth >= _FAST_MEMORY:
        longest = min(2 * longest, _LONGEST_CHUNK)
    while chunk < longest and elements // chunk > wanted:
        chunk *= 2
    return chunk
