"""Where a merge is written until it is complete, how an interrupted one is found again, and how the complete one takes its place.

For an output `out` there are, beside it:

    .out.sensmerge.lock         who writes it now
    .out.sensmerge/state.json   what the merge's bytes depend on
    .out.sensmerge/journal      how far the hash of each file has come
    .out.sensmerge/model/       the model that is written
    .out.sensmerge/complete/    that model, with all its bytes on the disk: the next step puts it in place
    .out.sensmerge/old/         the model that was replaced, until it is deleted

`out` itself is touched by one rename: an exchange with `complete/` where there is a model to replace. A file system without one
takes two renames, `out` to `old/` and `complete/` to `out`; whoever comes next finishes them.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import progress
from ..errors import OutputError
from ..records import hash_of
from . import files
from .digest import Journal
from .files import write_failure
from .lock import locked

RECORD = Path("sensmerge") / "merge.json"
_PARTS = {"state.json", "state.json.partial", "journal", "model", "complete", "old"}


def work_folder(out: Path) -> Path:
    """Where the work on an output is kept, beside it."""
    out = out.resolve()
    return out.with_name(f".{out.name}.sensmerge")


def lock_file(out: Path) -> Path:
    """The file that says who writes an output, beside it."""
    work = work_folder(out)
    return work.with_name(f"{work.name}.lock")


def has_entries(folder: Path) -> bool:
    """Is there anything in the folder?"""
    return folder.is_dir() and any(folder.iterdir())


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None if there is none, or what is there is none."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


class Staging:
    """The work on one output, held by this process alone: see `staging`."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.work = work_folder(out)
        self.model = self.work / "model"
        self.journal: Journal | None = None
        self._complete, self._old, self._state = (self.work / name for name in ("complete", "old", "state.json"))

    def recover(self) -> None:
        """Finish, or undo, what was broken off between two renames; raises OutputError where somebody else came between."""
        if self._old.exists():
            if not self.out.exists() or (self._complete.exists() and not has_entries(self.out)):
                files.rename(self._complete if self._complete.exists() else self._old, self.out)
                files.sync_path(self.out.parent)
            elif self._complete.exists():
                raise OutputError(
                    "this folder came into being while the model in its place was being replaced",
                    where=str(self.out),
                    why=f"the model that was there is in {self._old}, the merged one in {self._complete}",
                    fix="move this folder away, then run the same command again",
                )
            files.remove_tree(self.work)
        elif self._complete.exists() and not self._is_ours(self._complete):
            # They were exchanged: this is the old model.
            files.remove_tree(self.work)

    def holds(self, identity: Mapping[str, Any]) -> bool:
        """Is the output the complete merge of this identity, with every file that it had, the card aside?

        What an interrupted run left to clean up is cleaned up. Files are known by name and size.
        """
        record = read_json(self.out / RECORD)
        if record is None or record.get("identity") != hash_of(identity):
            return False
        sizes = record.get("files")
        if not isinstance(sizes, dict) or not sizes:
            return False
        for name, size in sizes.items():
            path = self.out / name
            if name != "README.md" and not (path.is_file() and path.stat().st_size == size):
                return False
        if self.interrupted() in (None, identity):
            with suppress(OutputError):
                self.discard()
        return True

    def interrupted(self) -> dict[str, Any] | None:
        """What the merge that lies here unfinished depends on; None if there is none, or one that cannot be gone on with."""
        found = read_json(self._state)
        identity = None if found is None else found.get("identity")
        return identity if isinstance(identity, dict) else None

    def begin(self, identity: Mapping[str, Any], files_kept: frozenset[str]) -> Journal:
        """Open the model's folder: that of the interrupted merge if it has this identity, else a new one.

        Of an interrupted one `files_kept` are what is gone on with; the rest is written again. Raises OSError, OutputError.
        """
        if self.interrupted() != identity:
            self.discard()
        if not self.work.exists():
            files.make_folder(self.work)
            files.write_text(self._state, json.dumps({"schema": 1, "identity": identity}, indent=1) + "\n")
            files.make_folder(self.model)
        if self._complete.exists():
            files.rename(self._complete, self.model)
        if not self.model.exists():
            files.make_folder(self.model)
        for entry in list(self.model.iterdir()):
            # A link or a pipe in the place of a file was put there by somebody else: nothing is written through it.
            if entry.name not in files_kept or entry.is_symlink() or not entry.is_file():
                files.remove_tree(entry)
        self.journal = Journal(self.work / "journal")
        return self.journal

    def discard(self) -> None:
        """Throw away what was written. Raises OutputError if the folder holds what no merge has put there."""
        if self._old.exists():
            # Not before it is decided which model is in its place.
            self.recover()
        if not self.work.exists():
            return
        if not self.work.is_dir():
            raise self._in_the_way("it is a file")
        strange = sorted(entry.name for entry in self.work.iterdir() if entry.name not in _PARTS)
        if strange:
            raise self._in_the_way(f"it holds '{strange[0]}', which no merge has put there")
        files.remove_tree(self.work)

    def seal(self, identity: Mapping[str, Any]) -> None:
        """Write into the model's record which merge it is and which files it has, by size. Raises OSError."""
        path = self.model / RECORD
        sizes = {
            file.relative_to(self.model).as_posix(): file.stat().st_size
            for file in sorted(self.model.rglob("*"))
            if file.is_file() and file != path
        }
        record = {**(read_json(path) or {}), "identity": hash_of(identity), "files": sizes}
        files.write_text(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def commit(self, *, overwrite: bool) -> None:
        """Put the model in its place: at every instant `out` is what it was or the complete model. Raises OSError, OutputError.

        All bytes are on the disk before, and the folder's new name after.
        """
        if has_entries(self.out) and not overwrite:
            raise self._filled()
        files.sync_tree(self.model)
        files.rename(self.model, self._complete)
        files.sync_path(self.work)
        if not has_entries(self.out):
            try:
                files.rename(self._complete, self.out)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise self._filled() from error
                raise
        elif not files.exchange(self._complete, self.out):
            files.rename(self.out, self._old)
            try:
                files.rename(self._complete, self.out)
            except BaseException:
                files.rename(self._old, self.out)
                raise
        files.sync_path(self.out.parent)
        try:
            files.remove_tree(self.work)
        except OSError as error:
            progress.warning(f"the model that was replaced could not be deleted: {error}; it lies in {self.work}")

    def close(self) -> None:
        """Close the journal."""
        if self.journal is not None:
            self.journal.close()

    def _is_ours(self, folder: Path) -> bool:
        """Is this the model that the state tells of?"""
        record, identity = read_json(folder / RECORD), self.interrupted()
        return record is not None and identity is not None and record.get("identity") == hash_of(identity)

    def _in_the_way(self, why: str) -> OutputError:
        return OutputError(
            "something is in the way of this merge's work",
            where=str(self.work),
            why=why,
            fix="move it away, or choose another output folder",
        )

    def _filled(self) -> OutputError:
        return OutputError(
            "the output folder is not empty any more",
            where=str(self.out),
            why="something was put there while the models were merged; nothing of it was overwritten",
            fix="move it away and run the same command again, or add --overwrite: what was merged is kept",
        )


@contextmanager
def staging(out: Path) -> Iterator[Staging]:
    """Hold the output `out`, which need not exist, and finish what a killed process left half done between two renames.

    Only the lock file is made, and the folders above `out`, which are removed again if they stay empty. Raises OutputError if
    another process holds it, ResourceError where nothing can be written.
    """
    out = out.resolve()
    missing = [folder for folder in out.parents if not folder.exists()]
    held = Staging(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(out, error) from error
    try:
        with locked(lock_file(out), out):
            try:
                held.recover()
            except OSError as error:
                raise write_failure(out, error) from error
            try:
                yield held
            finally:
                held.close()
    finally:
        for folder in missing:
            try:
                folder.rmdir()
            except OSError:
                break
