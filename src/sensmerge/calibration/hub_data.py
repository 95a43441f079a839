"""Data sets of the Hugging Face hub: the files of a split, downloaded into the hub's own cache, or found there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from .. import progress
from ..errors import CalibrationDataError, SensmergeError
from .data_sets import Splits, chosen, folder_files, is_data_file, splits_of

# Where the hub keeps its own conversion of a data set to Parquet.
CONVERTED = "refs/convert/parquet"


@dataclass(frozen=True)
class Asked:
    """A split of a data set, as the recipe names it: `where` it does, and which local places were `tried` before."""

    repo: str
    name: str | None
    split: str | None
    revision: str | None
    where: str
    tried: str


def is_hub_id(path: str, named: bool) -> bool:
    """Whether `path` may be a data set of the hub: `owner/name`, or a bare name where a split or so is `named` with it."""
    owner = r"" if named else r"[\w-][\w.-]*/"
    optional = r"(?:[\w-][\w.-]*/)?" if named else owner
    return re.fullmatch(optional + r"[\w-][\w.-]*", path) is not None and not is_data_file(path)


def hub_files(asked: Asked) -> tuple[Path, ...]:
    """The files of a split, downloaded if they are not in the hub's cache. Raises CalibrationDataError.

    Its own files count first, then the hub's conversion to Parquet. Without a network what the cache holds is used.
    """
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    try:
        return _from_hub(asked)
    except SensmergeError:
        raise
    except Exception as error:
        if not _unreachable(error):
            if isinstance(error, (OSError, HFValidationError)):
                raise _told(asked, error) from error
            raise
        found = _from_cache(asked, error)
        if not isinstance(error, OfflineModeIsEnabled):
            progress.warning(f"the hub cannot be reached: '{asked.repo}' is read from its cache as it was")
        return found


def _from_hub(asked: Asked) -> tuple[Path, ...]:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import RevisionNotFoundError

    def fetch(file: str, revision: str | None) -> Path:
        return Path(hf_hub_download(asked.repo, file, repo_type="dataset", revision=revision))

    def listing(revision: str | None) -> list[str]:
        siblings = HfApi().dataset_info(asked.repo, revision=revision).siblings or []
        return [sibling.rfilename for sibling in siblings]

    names = listing(asked.revision)
    card = fetch("README.md", asked.revision).read_text("utf-8", "replace") if "README.md" in names else None
    splits, revision = splits_of(names, card), asked.revision
    if asked.revision is None and not _offers(splits, asked):
        try:
            converted = splits_of(listing(CONVERTED))
        except RevisionNotFoundError:
            converted = {}
        if converted and (not splits or _offers(converted, asked)):
            splits, revision = converted, CONVERTED
    files = chosen(splits, asked.name, asked.split, label=asked.repo, where=asked.where)
    # The last first: of numbered files that were not all fetched, the first are then missing, which can be seen offline.
    paths = {file: fetch(file, revision) for file in reversed(files)}
    return tuple(paths[file] for file in files)


def _offers(splits: Splits, asked: Asked) -> bool:
    return any(asked.name in (None, name) and asked.split in (None, split) for name, split in splits)


def _from_cache(asked: Asked, error: Exception) -> tuple[Path, ...]:
    """The same from the hub's cache alone."""
    from huggingface_hub import constants

    refused: CalibrationDataError | None = None
    for revision in [asked.revision] if asked.revision is not None else ["main", CONVERTED]:
        snapshot = _snapshot(Path(constants.HF_HUB_CACHE), asked.repo, revision)
        if snapshot is None:
            continue
        try:
            return folder_files(snapshot, asked.name, asked.split, label=asked.repo, where=asked.where)
        except CalibrationDataError as found:
            refused = found
    why = f"tried {asked.tried}; " + (
        "its cache does not hold it" if refused is None else f"in its cache: {refused.what} ({refused.why})"
    )
    raise CalibrationDataError(
        f"'{asked.repo}' is no local file or folder, and the hub cannot be asked for it",
        where=asked.where,
        why=f"{why}; {_first_line(error)}",
        fix="correct the path; if it is a data set of the hub, run the command once with a network (`unset HF_HUB_OFFLINE`)",
    ) from error


def _snapshot(cache: Path, repo: str, revision: str) -> Path | None:
    """The folder of a revision in the hub's cache, by its documented layout."""
    home = cache / f"datasets--{repo.replace('/', '--')}"
    pointer = home / "refs" / revision
    commit = pointer.read_text().strip() if pointer.is_file() else revision
    folder = home / "snapshots" / commit
    return folder if re.fullmatch(r"[0-9a-f]{40}", commit) and folder.is_dir() else None


def _unreachable(error: Exception) -> bool:
    """Whether the hub could not be asked: offline, no network, or a failure of its own."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    # The client's HTTP library is httpx or a successor, by version; its errors are of no common kind.
    known = (OfflineModeIsEnabled, LocalEntryNotFoundError, ConnectionError, TimeoutError)
    return isinstance(error, known) or type(error).__module__.startswith("httpx")


def _told(asked: Asked, error: Exception) -> CalibrationDataError:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    page = f"{constants.ENDPOINT}/datasets/{asked.repo}"
    log_in = "log in with `hf auth login` (or set HF_TOKEN)"
    if isinstance(error, GatedRepoError):
        what, fix = (
            "is gated: the hub gives it only to those who accepted its terms",
            f"accept them at {page}, and {log_in}",
        )
    elif isinstance(error, RevisionNotFoundError):
        what, fix = (
            f"has no revision '{asked.revision}'",
            "remove `revision:`, or write a branch, tag or commit that exists",
        )
    elif isinstance(error, RepositoryNotFoundError):
        what = "is no local file or folder, and the hub has no such data set"
        fix = f"correct the path or the id; if the data set is private, {log_in}"
    elif isinstance(error, HFValidationError):
        what, fix = "is no local file or folder, and no id of the hub", "correct the path or the id"
    else:
        what, fix = (
            "could not be downloaded from the hub",
            "run the same command again: what is complete is not downloaded twice",
        )
    return CalibrationDataError(
        f"'{asked.repo}' {what}",
        where=asked.where,
        why=f"tried {asked.tried}, then {page}: {_first_line(error)}",
        fix=fix,
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
