"""Warnings of what the device has found, given once the host knows of it, without a wait."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from torch import Tensor

from lrs_ext.host_copy import HostCopy


class Notices:
    """Warnings on their way.

    Args:
        are_given: whether this rank is the one that gives them.
    """

    def __init__(self, are_given: bool) -> None:
        self._are_given = are_given
        self._on_their_way: list[tuple[HostCopy, Sequence[str]]] = []

    def expect(self, found: Tensor, texts: Sequence[str]) -> None:
        """Warns with one of `texts`, or not at all.

        Args:
            found: 0-d: 0, nothing to warn of, or k, the k-th text.
        """
        if self._are_given:
            self._on_their_way.append((HostCopy(found.double()), texts))

    def give(self) -> None:
        """Gives the warnings that have arrived, to the caller of the caller."""
        while self._on_their_way and self._on_their_way[0][0].is_here:
            found, texts = self._on_their_way.pop(0)
            index = int(found.read())
            if index:
                warnings.warn(f"AutoLRS: {texts[index - 1]}", stacklevel=3)
