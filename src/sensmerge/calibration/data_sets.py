"""The files of a data set's split: in a local folder, or on the hub, by its card or by how their names are usually built."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from ..errors import CalibrationDataError
from .rows import ENDINGS

# Files by (configuration, split).
Splits = Mapping[tuple[str, str], tuple[str, ...]]

ANY = "default"
_SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
_SHARD = re.compile(r"(?P<split>.+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]+)?")
_CONVERTED = re.compile(r"(?P<name>[^/]+)/(?P<split>[^/]+)/(?P<number>\d{4})\.parquet")


def is_data_file(name: str) -> bool:
    """Whether samples can be read from a file of this name."""
    return name.lower().endswith(ENDINGS)


def splits_of(files: Iterable[str], card: str | None = None) -> Splits:
    """Which files make which split of which configuration, from their paths and the data set's README.md.

    A card that lists them decides. Otherwise `name/split/0000.parquet`, `[name/]split-00000-of-00001.parquet` and names or folders
    with a usual word for a split; files that say nothing are `train`, and those in no folder but `data/` have the name `default`.
    """
    usable = sorted(file for file in files if is_data_file(file))
    listed = _listed_by_card(usable, card) if card else {}
    if listed:
        return listed
    found: dict[tuple[str, str], list[str]] = {}
    silent: dict[str, list[str]] = {}
    for file in usable:
        name, split = _by_name(file)
        if split is None:
            silent.setdefault(name, []).append(file)
        else:
            found.setdefault((name, split), []).append(file)
    named = {name for name, _ in found}
    for name, members in silent.items():
        if name not in named:
            found[name, "train"] = members
    return {key: tuple(members) for key, members in found.items()}


def _by_name(file: str) -> tuple[str, str | None]:
    converted = _CONVERTED.fullmatch(file)
    if converted is not None:
        return converted["name"], converted["split"]
    *folders, last = file.split("/")
    stem = last.split(".")[0]
    words = [_SPLIT_WORDS[word] for word in re.split(r"[^a-z]+", stem.lower()) if word in _SPLIT_WORDS]
    shard = _SHARD.fullmatch(last.rpartition(".")[0])
    inside = [_SPLIT_WORDS.get(folder.lower()) for folder in folders]
    outer = [folder for folder, word in zip(folders, inside, strict=True) if word is None and folder != "data"]
    name = outer[0] if outer else ANY
    if shard is not None:
        split = shard["split"].lower()
        return name, _SPLIT_WORDS.get(split, split)
    return name, next(iter(words), None) or next((word for word in inside if word), None)


def _listed_by_card(files: Collection[str], card: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """What the card's `configs:` say; nothing if it says nothing that can be followed."""
    import yaml

    parts = re.split(r"^---\s*$", card, maxsplit=2, flags=re.MULTILINE)
    try:
        head = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return {}
    configs = head.get("configs") if isinstance(head, dict) else None
    found: dict[tuple[str, str], tuple[str, ...]] = {}
    for config in configs if isinstance(configs, list) else []:
        if not isinstance(config, dict):
            continue
        name, listed = str(config.get("config_name", ANY)), config.get("data_files")
        entries = listed if isinstance(listed, list) else [listed]
        bare = [entry for entry in entries if isinstance(entry, str)]
        splits = [(str(e.get("split", "train")), e.get("path")) for e in entries if isinstance(e, dict)]
        for split, patterns in [*splits, *([("train", bare)] if bare else [])]:
            wanted = [str(each) for each in (patterns if isinstance(patterns, list) else [patterns])]
            members = tuple(file for file in files if any(_pattern(each).fullmatch(file) for each in wanted))
            if members:
                found[name, split] = members
    return found


def _pattern(glob: str) -> re.Pattern[str]:
    """A hub pattern: `*` stays inside a folder, `**` does not."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    written = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(written.get(part, re.escape(part)) for part in parts))


def chosen(splits: Splits, name: str | None, split: str | None, *, label: str, where: str) -> tuple[str, ...]:
    """The files of one split; `name` and `split` may be left out where there is no choice.

    Raises CalibrationDataError with what there is, and for a split of which files are missing.
    """
    names = sorted({each for each, _ in splits})
    if not names:
        raise CalibrationDataError(
            f"'{label}' holds no files of samples",
            where=where,
            why=f"files that end in {', '.join(ENDINGS)} are read, and it has none",
            fix="write the path of a file of samples, or a data set that has some",
        )
    if name is None:
        name = names[0] if len(names) == 1 else ANY
    if name not in names:
        raise CalibrationDataError(
            f"which configuration of '{label}' is meant?" if name == ANY else f"'{label}' has no '{name}'",
            where=where,
            why=f"its configurations are {_list(names)}",
            fix=f"write `data: {{path: {label}, name: {names[0]}, …}}`, or another of them",
        )
    known = sorted(each for other, each in splits if other == name)
    if split is None and len(known) == 1:
        split = known[0]
    if split not in known:
        raise CalibrationDataError(
            f"which split of '{label}' is meant?" if split is None else f"'{label}' has no split '{split}'",
            where=where,
            why=f"the splits of '{name}' are {_list(known)}",
            fix=f"write `data: {{path: {label}, name: {name}, split: {known[0]}, …}}`, or another of them",
        )
    files = splits[name, split]
    missing = _missing(files)
    if missing:
        raise CalibrationDataError(
            f"the split '{split}' of '{label}' is not complete",
            where=where,
            why=f"missing: {', '.join(missing[:5])}",
            fix="download it again, with a network: `unset HF_HUB_OFFLINE`",
        )
    return files


def _list(names: Collection[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "")


def _missing(files: Collection[str]) -> list[str]:
    """What is missing of files that are numbered: one of so many, or `0000` and on."""
    missing: list[str] = []
    for file in sorted(files):
        stem, _, ending = file.rpartition(".")
        folder, _, last = stem.rpartition("/")
        shard = _SHARD.fullmatch(last)
        if shard is not None and stem.endswith(f"-of-{shard['count']}"):
            parts = (
                f"{shard['split']}-{number:05d}-of-{shard['count']}.{ending}" for number in range(int(shard["count"]))
            )
            missing += [whole for part in parts if (whole := f"{folder}/{part}" if folder else part) not in files]
        converted = _CONVERTED.fullmatch(file)
        if converted is not None:
            earlier = (f"{folder}/{number:04d}.parquet" for number in range(int(converted["number"])))
            missing += [each for each in earlier if each not in files]
    return sorted(set(missing))


def folder_files(folder: Path, name: str | None, split: str | None, *, label: str, where: str) -> tuple[Path, ...]:
    """The files of a split in a local folder, laid out as on the hub. Raises CalibrationDataError."""
    files = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    return tuple(folder / file for file in chosen(splits_of(files, text), name, split, label=label, where=where))
