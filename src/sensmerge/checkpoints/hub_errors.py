"""What huggingface_hub raises, told in our four lines with a fix that works."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from ..errors import InputFileError, ResourceError, SensmergeError


@dataclass(frozen=True)
class Asked:
    """What was asked of the hub, for messages: the model, who asked, which folders were tried before, which hub and cache."""

    repo: str
    revision: str | None
    where: str
    tried: str
    endpoint: str
    cache: str

    @property
    def elsewhere(self) -> str:
        """How to keep the cache on another disk."""
        return "`export HF_HOME=/path/on/a/larger/disk`, then run the same command again"

    @property
    def name(self) -> str:
        """The model as the recipe names it."""
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def unreachable(error: Exception) -> bool:
    """Whether the hub could not be asked at all: offline mode, no network, or a failure of the hub's own."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500 or error.response.status_code in (408, 429)
    # Its HTTP library is httpx or a successor, by version.
    return isinstance(error, OfflineModeIsEnabled) or type(error).__module__.startswith("httpx")


def told(asked: Asked, error: Exception, cached: str | None = None) -> SensmergeError:
    """The error for what went wrong with the hub; `cached` says what is wrong with the copy in the cache, if there is one."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if unreachable(error):
        return _unreachable(asked, error, cached)
    page = f"{asked.endpoint}/{asked.repo}"
    log_in = "log in with `hf auth login` (or set HF_TOKEN)"
    if isinstance(error, GatedRepoError):
        return InputFileError(
            f"'{asked.name}' is gated: the hub gives it only to those who accepted its terms",
            where=asked.where,
            why=f"{page} answered {error.response.status_code}",
            fix=f"accept the terms at {page}, {log_in} with a token of that account, and run the command again",
        )
    if isinstance(error, RevisionNotFoundError):
        return InputFileError(
            f"'{asked.repo}' on the hub has no revision '{asked.revision or 'main'}'",
            where=asked.where,
            why=f"{page} has no branch, tag or commit of that name",
            fix=f"write `{asked.repo}` for its main branch, or a revision listed at {page}/commits/main",
        )
    if isinstance(error, RepositoryNotFoundError):
        return InputFileError(
            f"there is no model folder '{asked.name}', and the hub has no such model",
            where=asked.where,
            why=f"tried {asked.tried}, then {page}, which answered {error.response.status_code}",
            fix=f"correct the path or the hub id; if the model is private, {log_in}",
        )
    if isinstance(error, HfHubHTTPError):
        denied = error.response.status_code in (401, 403)
        return InputFileError(
            f"the hub refused to give '{asked.name}'",
            where=asked.where,
            why=f"{page} answered {error.response.status_code}: {_first_line(error)}",
            fix=f"{log_in} with a token that may read it, and run the command again"
            if denied
            else f"check that {page} opens in a browser, and run the command again",
        )
    return _failed_to_keep(asked, error)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _unreachable(asked: Asked, error: Exception, cached: str | None) -> InputFileError:
    from huggingface_hub import constants

    state = cached or f"it is not in the cache {asked.cache}"
    at = f" --revision {asked.revision}" if asked.revision else ""
    local = asked.repo.rpartition("/")[2]
    download = f"`hf download {asked.repo}{at} --local-dir {local}`"
    if constants.HF_HUB_OFFLINE:
        # transformers' older variable means the same to huggingface_hub.
        named = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if name in os.environ] or [
            "HF_HUB_OFFLINE"
        ]
        return InputFileError(
            f"there is no model folder '{asked.name}', and {named[0]} forbids to ask the hub for it",
            where=asked.where,
            why=f"tried {asked.tried}; {state}",
            fix=f"if it is a hub id: `unset {' '.join(named)}` and run the command again; else correct the path",
        )
    return InputFileError(
        f"there is no model folder '{asked.name}', and the hub cannot be reached",
        where=asked.where,
        why=f"tried {asked.tried}; {state}; {asked.endpoint}: {_first_line(error)}",
        fix="correct the path; if it is a hub id, run the command again with a network, or fetch it on a machine that has one"
        f" ({download}) and write the path of that folder",
    )


def _failed_to_keep(asked: Asked, error: Exception) -> SensmergeError:
    """A failure on this side: the disk, or a download that was cut."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ResourceError(
            f"the disk is full: '{asked.name}' could not be downloaded",
            where=asked.cache,
            why=str(error),
            fix=f"free some space there, or keep the hub's cache elsewhere: {asked.elsewhere}",
        )
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
        return ResourceError(
            f"the hub's cache cannot be written: '{asked.name}' could not be downloaded",
            where=asked.cache,
            why=str(error),
            fix=f"make that folder writable, or keep the hub's cache elsewhere: {asked.elsewhere}",
        )
    return InputFileError(
        f"'{asked.name}' could not be downloaded from the hub",
        where=asked.where,
        why=f"{asked.endpoint}: {_first_line(error)}",
        fix="run the same command again: what is complete is not downloaded twice",
    )
