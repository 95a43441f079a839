"""Run as a process of its own: where the tensors of `pytorch_model*.bin` files lie, one line of JSON a file on standard output.

Nothing in a file is run (`weights_only=True`, no `pickle_module`), no weight is read (fake tensors record their places), and
limits hold should that promise ever break: no file can be written, processor time and memory are bounded, no core is dumped.
"""

from __future__ import annotations

import json
import resource
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

CPU_SECONDS = 120
EXTRA_BYTES = 4 << 30


def limit() -> None:
    """Set the limits: once torch is imported, so that its own size does not count."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + CPU_SECONDS)
    _lower(resource.RLIMIT_FSIZE, 0)
    _lower(resource.RLIMIT_CORE, 0)
    sizes = Path("/proc/self/statm")
    if sizes.exists():
        _lower(resource.RLIMIT_AS, int(sizes.read_text().split()[0]) * resource.getpagesize() + EXTRA_BYTES)


def _lower(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def listed(file: str) -> dict[str, Any]:
    """`tensors`: [name, dtype, shape, stride, storage offset, place of the storage in the file, its bytes] each; or `error`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        with FakeTensorMode():
            found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        return {"error": f"torch cannot read it with weights_only=True: {' '.join(str(error).split())[:300]}"}
    if not isinstance(found, dict):
        return {"error": f"it holds a {type(found).__name__}, not a mapping of names to tensors"}
    odd = [
        f"{name!r} is a {type(value).__name__}"
        for name, value in found.items()
        if not isinstance(name, str) or not isinstance(value, torch.Tensor)
    ]
    if odd:
        more = f" and {len(odd) - 5} more" if len(odd) > 5 else ""
        return {"error": f"not everything in it is a tensor with a name: {', '.join(odd[:5])}{more}"}
    try:
        return {"tensors": [[name, *_place(tensor)] for name, tensor in found.items()]}
    except Exception as error:
        return {"error": f"it holds a tensor without plain storage: {error}"}


def _place(tensor: Any) -> list[Any]:
    import torch

    if tensor.layout != torch.strided:
        raise TypeError(f"layout {tensor.layout}")
    storage = tensor.untyped_storage()
    start = getattr(storage, "_checkpoint_offset", None)
    dtype = str(tensor.dtype).removeprefix("torch.")
    return [dtype, list(tensor.shape), list(tensor.stride()), tensor.storage_offset(), start, storage.nbytes()]


def main() -> None:
    """One line for each file named on the command line, as soon as it is known."""
    warnings.simplefilter("ignore")
    # The first of its kind imports a large part of torch, which looks for a place to write to: not under the limits.
    import_module("torch._subclasses.fake_tensor").FakeTensorMode()
    limit()
    for file in sys.argv[1:]:
        print(json.dumps(listed(file)), flush=True)


if __name__ == "__main__":
    main()
