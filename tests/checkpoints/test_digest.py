"""The journal of an unfinished merge, and the hash of a file whose pieces come in any order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import xxhash

from sensmerge.checkpoints.digest import WAITING_BYTES, Journal, OrderedDigest


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path: Path) -> None:
    """Not the one before it, nor the first that is written after it."""
    path = tmp_path / "journal"
    path.write_text("a.safetensors\t100\taa\na.safetensors\t20")
    journal = Journal(path)
    assert journal.claims == {"a.safetensors": {100: "aa"}}
    journal.note("b.safetensors", 300, "bb")
    journal.close()
    again = Journal(path)
    again.close()
    assert again.claims == {"a.safetensors": {100: "aa"}, "b.safetensors": {300: "bb"}}


@pytest.mark.parametrize("shorter", [False, True])
def test_a_piece_that_is_read_again_is_there_or_an_error(tmp_path: Path, shorter: bool) -> None:
    """What waits beyond the memory for it is in the file, unless somebody cut that off."""
    first, second = b"x" * 10, os.urandom(WAITING_BYTES + 1)
    descriptor = os.open(tmp_path / "file", os.O_CREAT | os.O_RDWR)
    try:
        os.pwrite(descriptor, first + second, 0)
        digest = OrderedDigest(descriptor)
        digest.add(len(first), memoryview(second))
        if shorter:
            os.ftruncate(descriptor, 1000)
            with pytest.raises(OSError, match="became shorter"):
                digest.add(0, memoryview(first))
        else:
            digest.add(0, memoryview(first))
            assert digest.hexdigest() == xxhash.xxh3_128_hexdigest(first + second)
    finally:
        os.close(descriptor)
