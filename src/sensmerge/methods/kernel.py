"""Kernels: plain Python functions over tiles that Numba compiles on first use and keeps in a cache on disk.

Numba is imported when the first kernel is needed, never to read a recipe. Compiled code is cached beside the function's own file
(or, where that cannot be written, in the user's cache folder), so it is compiled once a machine; no compiler needs to be
installed.
A kernel must not call another file's compiled function: Numba would then compile it anew in every process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any


class Kernel:
    """One function to be compiled. Calling it runs the compiled code; it does not hold Python's global lock."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.python = function
        self.__doc__ = function.__doc__
        self.__name__ = function.__name__

    @cached_property
    def compiled(self) -> Callable[..., Any]:
        """The compiled function: loaded from the cache, else compiled at its first call with each set of dtypes."""
        import numba

        try:
            compiled: Callable[..., Any] = numba.njit(cache=True, nogil=True)(self.python)
        except RuntimeError:
            # No folder that could hold a cache can be written: compile in every process.
            compiled = numba.njit(nogil=True)(self.python)
        return compiled

    def __call__(self, *arguments: Any) -> Any:
        """Run the compiled function."""
        return self.compiled(*arguments)


def kernel(function: Callable[..., Any]) -> Kernel:
    """Decorator: `function` is compiled on first use."""
    return Kernel(function)
