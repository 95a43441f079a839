"""How much memory there is, and what a model and its activations take of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

# Of the memory that is free, what weights may take: the rest is for activations.
SHARE = 0.7


def available_bytes(device: str) -> int:
    """Bytes that can be allocated on `device` now; for a CPU the smallest of what the machine and its control group leave."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        # What the page cache holds can be had as well.
        found = [int(lines["MemAvailable"].split()[0]) * 1024] if "MemAvailable" in lines else found
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text(encoding="utf-8").strip().isdigit():
        found.append(max(0, int(limit.read_text(encoding="utf-8")) - int(used.read_text(encoding="utf-8"))))
    return min(found)


def weight_bytes(model: Any, dtype: torch.dtype) -> int:
    """What the parameters take in `dtype`."""
    return int(sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize)


def fits_in_memory(model: Any, dtype: torch.dtype, device: str) -> bool:
    """Whether the weights leave room for activations."""
    return weight_bytes(model, dtype) <= SHARE * available_bytes(device)


def bytes_per_token(config: Any, *, streamed: bool) -> int:
    """About what one token of a batch takes: activations in every block (in one, streamed), and logits with their gradient."""
    text = config.get_text_config()
    hidden = int(getattr(text, "hidden_size", 1024))
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    blocks = 1 if streamed else int(getattr(text, "num_hidden_layers", 1))
    logits = 0 if streamed else 3 * int(text.vocab_size)
    return 4 * (blocks * (16 * hidden + 4 * inner) + logits)
