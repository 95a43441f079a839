"""Models of the Hugging Face hub: `org/name`, `name` or `org/name@revision`, through huggingface_hub and its cache.

Its environment variables (HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE) mean what they mean there.
What is fetched is what a merge reads, and what was fetched is compared with the hashes that the hub tells.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import progress
from ..errors import InputFileError, ResourceError, SensmergeError
from .containment import CONFIG_FILES
from .hub_errors import Asked, told, unreachable
from .source import TOKENIZER_FILES

SMALL_FILES = frozenset({*CONFIG_FILES, *TOKENIZER_FILES})
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
ADAPTER = "adapter_model.safetensors"

_PART = r"\w(?:[\w.-]{0,94}\w)?"
_REPO = re.compile(rf"(?:{_PART}/)?{_PART}", re.ASCII)
_REVISION = re.compile(r"\w[\w./+-]*", re.ASCII)
SECONDS_TO_ANSWER = 30.0


@dataclass(frozen=True)
class HubName:
    """A `model:` string as the hub understands it: the repository, and the branch, tag or commit (None: `main`)."""

    repo: str
    revision: str | None

    @property
    def branch(self) -> str:
        """What to ask the hub for."""
        return self.revision or "main"


def hub_name(name: str) -> HubName | None:
    """The repository and revision in `name`; None where it can be none, such as a path of three parts."""
    repo, at, revision = name.partition("@")
    if not _REPO.fullmatch(repo) or "--" in repo or ".." in repo or repo.endswith(".git"):
        return None
    if at and (not _REVISION.fullmatch(revision) or ".." in revision):
        return None
    return HubName(repo, revision or None)


def fetch(name: HubName, *, where: str, tried: str, weights: bool, allow_pickle: bool) -> Path:
    """The folder of a hub model's snapshot, its last part the commit; downloads what is not in the cache yet.

    Without `weights` only config and tokenizer files. Where the hub cannot be asked, the cached snapshot is taken if it is whole.
    `where` and `tried` (the folders looked for first) are for messages. Raises InputFileError for what is absent, forbidden or
    damaged, ResourceError for a full disk. Cost: one request, and a hash of each file that is downloaded.
    """
    from huggingface_hub import HfApi, constants

    asked = Asked(name.repo, name.revision, where, tried, constants.ENDPOINT, str(constants.HF_HUB_CACHE))
    try:
        info = HfApi().model_info(name.repo, revision=name.branch, files_metadata=True, timeout=SECONDS_TO_ANSWER)
    except Exception as error:
        if not unreachable(error):
            raise told(asked, error) from error
        return _from_cache(name, asked, error, weights, allow_pickle)
    try:
        return _Download(name, asked, info).all(weights, allow_pickle)
    except SensmergeError:
        raise
    except Exception as error:
        raise told(asked, error) from error


def _from_cache(name: HubName, asked: Asked, cause: Exception, weights: bool, allow_pickle: bool) -> Path:
    """The cached snapshot; raises InputFileError if there is none or a part of it is missing."""
    from huggingface_hub import constants, snapshot_download

    try:
        small = sorted(SMALL_FILES)
        folder = Path(snapshot_download(name.repo, revision=name.branch, local_files_only=True, allow_patterns=small))
    except (OSError, ValueError) as error:
        raise told(asked, cause) from error
    if weights and (missing := _missing_weights(folder, allow_pickle)):
        raise told(asked, cause, f"its copy in {folder} is not whole: {missing} is missing") from cause
    if not constants.HF_HUB_OFFLINE:
        progress.warning(f"the hub at {asked.endpoint} cannot be reached: '{name.repo}' is what was cached of it")
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        progress.warning(
            f"the cached copy of '{name.repo}' has no tokenizer files, and the hub cannot be asked for them"
        )
    return folder


def _missing_weights(folder: Path, allow_pickle: bool) -> str | None:
    """The first weight file that a snapshot lacks; None if it is whole (or holds pickles that nobody allowed)."""
    kinds = (SAFETENSORS, PICKLES)
    for single, index in kinds:
        if (folder / single).is_file():
            return None
        if (folder / index).is_file():
            return next((file for file in _shards(folder / index) if not (folder / file).is_file()), None)
    return None if (folder / ADAPTER).is_file() else SAFETENSORS[0] if not allow_pickle else PICKLES[0]


def _shards(index: Path) -> list[str]:
    """The files that an index names; none if it cannot be read, which the reader of the folder tells."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({file for file in weight_map.values() if isinstance(file, str)})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def weight_files(names: Collection[str], allow_pickle: bool) -> list[str]:
    """The weight files to fetch of a repository's `names`, an index in place of its shards; pickles only where they are all."""
    kinds = [SAFETENSORS, PICKLES] if allow_pickle else [SAFETENSORS]
    full = next((file for kind in kinds for file in kind if file in names), None)
    return [file for file in (ADAPTER if ADAPTER in names else None, full) if file is not None]


class _Download:
    """One model's files, fetched one after the other and compared with what the hub says of them."""

    def __init__(self, name: HubName, asked: Asked, info: Any) -> None:
        self.name, self.asked, self.commit = name, asked, str(info.sha)
        self.files = {file.rfilename: file for file in info.siblings or ()}

    def all(self, weights: bool, allow_pickle: bool) -> Path:
        """The folder with config and tokenizer files first, so that a snapshot with weights is a whole one."""
        small = [file for file in self.files if file in SMALL_FILES or ("/" not in file and file.endswith(".jinja"))]
        chosen = weight_files(self.files, allow_pickle) if weights else []
        if weights and not chosen:
            self._refuse_pickles()
        if not small + chosen:
            raise InputFileError(
                f"'{self.name.repo}' on the hub holds no model",
                where=self.asked.where,
                why=f"{self.asked.endpoint}/{self.name.repo} has neither config.json nor safetensors weights",
                fix="name a repository with config.json and model.safetensors (GGUF and ONNX files cannot be merged)",
            )
        folder = self._fetch([*sorted(small), *chosen])
        # What an index names is known once it is here.
        indices = [file for file in chosen if file.endswith(".index.json")]
        shards = [file for index in indices for file in _shards(folder / index) if file in self.files]
        return self._fetch(shards) if shards else folder

    def _refuse_pickles(self) -> None:
        if any(re.fullmatch(r"pytorch_model[^/]*\.bin", file) for file in self.files):
            raise InputFileError(
                f"'{self.name.repo}' has no safetensors weights",
                where=self.asked.where,
                why="the hub has only pickle files of it (pytorch_model*.bin), which can run code when they are read",
                fix="add `--allow-pickle` to the command (they are read without running what is in them),"
                " or name a revision with safetensors",
            )

    def _fetch(self, names: Sequence[str]) -> Path:
        from huggingface_hub import constants, try_to_load_from_cache

        repo, revision = self.name.repo, self.commit
        absent = {n for n in names if not isinstance(try_to_load_from_cache(repo, n, revision=revision), str)}
        needed = sum(self.files[file].size or 0 for file in absent)
        _check_space(Path(constants.HF_HUB_CACHE), needed, self.asked)
        paths: list[Path] = []
        if not absent:
            paths = [self._one(file, lambda steps: None) for file in names]
            return self._folder(paths, names)
        with progress.task(f"downloading {repo}", needed) as advance:
            for file in names:
                paths.append(self._one(file, advance))
                if file in absent:
                    self._verify(paths[-1], file)
        return self._folder(paths, names)

    def _one(self, file: str, advance: Callable[[int], None]) -> Path:
        from huggingface_hub import hf_hub_download

        # Configs are asked for by the branch's own name, so that the cache knows the branch when there is no network.
        revision = self.name.branch if file in ("config.json", "adapter_config.json") else self.commit
        return Path(hf_hub_download(self.name.repo, file, revision=revision, tqdm_class=_bar(advance)))

    def _folder(self, paths: Sequence[Path], names: Sequence[str]) -> Path:
        """The one folder that holds all files."""
        folders = {Path(*path.parts[: -len(Path(name).parts)]): None for path, name in zip(paths, names, strict=True)}
        if len(folders) > 1 or next(iter(folders)).name != self.commit:
            raise InputFileError(
                f"'{self.name.repo}' was changed on the hub while it was downloaded",
                where=self.asked.where,
                why=f"its files are of several commits: {', '.join(folder.name for folder in folders)}",
                fix="run the same command again",
            )
        return next(iter(folders))

    def _verify(self, path: Path, file: str) -> None:
        """Refuse, and take out of the cache, a file that is not what the hub says it is."""
        said = self.files[file]
        sha256 = None if said.lfs is None else said.lfs.sha256
        size = said.size if said.lfs is None else said.lfs.size
        if size is not None and path.stat().st_size != size:
            why = f"{path.stat().st_size} bytes came, the hub says {size}"
        elif sha256 is not None and _hash(path, hashlib.sha256()) != sha256:
            why = f"its SHA-256 is not {sha256}, which the hub says"
        elif sha256 is None and said.blob_id is not None and _git_hash(path) != said.blob_id:
            why = f"its git hash is not {said.blob_id}, which the hub says"
        else:
            return
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise InputFileError(
            f"'{file}' of '{self.name.repo}' came damaged from the hub",
            where=f"{self.asked.endpoint}/{self.name.repo}, commit {self.commit}",
            why=why,
            fix="run the same command again: the file is downloaded anew",
        )


def _hash(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return str(digest.hexdigest())


def _git_hash(path: Path) -> str:
    """Git's name of a file: SHA-1 over its kind, its size and its bytes."""
    return _hash(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False))


def _check_space(cache: Path, needed: int, asked: Asked) -> None:
    place = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ResourceError(
            f"the disk has no room for '{asked.repo}'",
            where=str(cache),
            why=f"{needed} bytes must be downloaded, {free} are free",
            fix=f"free some space there, or keep the hub's cache elsewhere: {asked.elsewhere}",
        )


def _bar(advance: Callable[[int], None]) -> Any:
    """A progress bar as huggingface_hub wants one, that shows nothing and tells `advance` the bytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            advance(int(n or 0))

    return Bar
