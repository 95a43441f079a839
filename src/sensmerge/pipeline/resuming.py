"""When a merge is complete already, when an interrupted one is gone on with, and what a failure leaves for the next run."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import progress
from ..checkpoints.digest import Journal
from ..checkpoints.files import write_failure
from ..checkpoints.staging import RECORD, Staging, read_json
from ..errors import OutputError, ResourceError, SensmergeError, SeveralErrors
from ..records import Recipe
from .checking import check_empty
from .identity import changes, meaning_of


def check_not_taken(recipe: Recipe, out: Path) -> None:
    """Raise OutputError for an output that is not empty, unless it may be what this very recipe has made."""
    record = read_json(out / RECORD)
    try:
        made_from = (out / "sensmerge.yml").read_text("utf-8")
        same = record is not None and "identity" in record and meaning_of(made_from) == meaning_of(recipe.text)
    except (OSError, ValueError):
        same = False
    if not same:
        check_empty(recipe, out)


def finished(stage: Staging, identity: Mapping[str, Any], *, restart: bool) -> dict[str, str] | None:
    """The hashes of the output's files if it is this merge and complete, after saying so; None if it is to be written.

    `restart` throws away what an interrupted merge has left. Raises ResourceError.
    """
    try:
        if restart:
            stage.discard()
        if not stage.holds(identity):
            return None
    except OSError as error:
        raise write_failure(stage.work, error) from error
    progress.message(f"{stage.out} is this merge already, and complete: nothing is written")
    record = read_json(stage.out / RECORD) or {}
    return dict(record.get("outputs", {}))


def check_resumable(stage: Staging, identity: Mapping[str, Any], command: str) -> None:
    """Raise OutputError, naming what changed, if the merge that lies unfinished beside the output is another one."""
    before = stage.interrupted()
    if before is None or before == identity:
        return
    raise OutputError(
        "an interrupted merge into this folder was another one",
        where=str(stage.work),
        why=f"what changed since: {'; '.join(changes(before, identity))}",
        fix=f"undo the change to go on with it, or throw its work away: {command} --restart",
    )


@contextmanager
def writing(stage: Staging, identity: Mapping[str, Any], command: str, kept: Sequence[str]) -> Iterator[Journal]:
    """Write the model in `stage`; a failure keeps the work if the same command, run again, can go on with it.

    That is so for a full disk or a failing one, an interrupt and a crash, once something was finished. What is wrong with the
    models or the recipe needs another input: those failures leave nothing. `kept` are the files whose contents are gone on with.
    """
    try:
        yield stage.begin(identity, frozenset(kept))
    except OSError as error:
        _leave(stage, keep=True)
        raise _told(write_failure(stage.work, error), stage, command) from error
    except SensmergeError as error:
        # An input that cannot be read for the moment is no fault of the input.
        _leave(stage, keep=isinstance(error, (ResourceError, OutputError)) or isinstance(error.__cause__, OSError))
        raise _told(error, stage, command) from error.__cause__
    except BaseException:
        _leave(stage, keep=True)
        raise


def _leave(stage: Staging, *, keep: bool) -> None:
    """Keep the work, or throw it away; where that fails too, the next run does it."""
    stage.close()
    if not keep or stage.journal is None or not stage.journal.holds_work:
        with suppress(OSError, OutputError):
            stage.discard()


def _told(error: SensmergeError, stage: Staging, command: str) -> SensmergeError:
    """The failure, with the command that goes on from here where there is work to go on with."""
    again = "run the same command again"
    if not stage.work.exists() or not error.fix.endswith(again) or isinstance(error, SeveralErrors):
        return error
    return type(error)(
        error.what, where=error.where, why=error.why, fix=f"{error.fix}, which goes on from here: {command}"
    )


def command_of(
    recipe: Recipe,
    out: Path,
    *,
    profiles: str | Path | None,
    device: str,
    overwrite: bool,
    shard_bytes: int | None,
    seed: int | None,
    allow_pickle: bool = False,
) -> str:
    """The command line of a merge; what is None, or as it is without an option, is left out."""
    options: dict[str, object] = {"--profiles": profiles, "--device": None if device == "auto" else device}
    options |= {"--shard-size": shard_bytes, "--random-seed": seed}
    parts = ["sensmerge", "merge", str(recipe.path), str(out), *(["--overwrite"] if overwrite else [])]
    parts += ["--allow-pickle"] if allow_pickle else []
    for option, value in options.items():
        parts += [] if value is None else [option, str(value)]
    return shlex.join(parts)
