"""YAML with line numbers: a mapping whose every key remembers where it stands, so that each fault can be shown to the user.

Duplicate keys are refused, and `allow()` refuses keys that are not known, with the nearest known one.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import RecipeError
from .registry import suggestion

# Of many keys that cannot be used, so many are told.
SHOWN_KEYS = 8
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxlong = _REPR.maxother = 200


def shown(value: object) -> str:
    """A value for a message, cut where it is long: a few lines of YAML can stand for more values than memory holds."""
    return _REPR.repr(value)


class Section:
    """One mapping of a YAML file; the typed readers take a key and raise RecipeError with its line."""

    def __init__(self, path: Path, name: str, node: yaml.Node, construct: Callable[[yaml.Node], Any]) -> None:
        self.path, self.name, self.line = path, name, node.start_mark.line + 1
        self._construct = construct
        self._nodes: dict[str, yaml.Node] = {}
        self._lines: dict[str, int] = {}
        if not isinstance(node, yaml.MappingNode):
            raise self.error(
                f"{name or 'the recipe'} must be a mapping of keys to values", self.line, "use `key: value` lines"
            )
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.error(
                    "a key must be a word", line, "write `key: value`", "found a list or a mapping in its place"
                )
            key = str(construct(key_node))
            if key in self._nodes:
                raise self.error(
                    f"'{key}' stands twice", line, "keep one of the two", f"first in line {self._lines[key]}"
                )
            self._nodes[key], self._lines[key] = value_node, line

    def error(self, what: str, line: int, fix: str, why: str | None = None) -> RecipeError:
        """A RecipeError at a line of this file."""
        return RecipeError(what, where=f"{self.path}:{line}", why=why or "the recipe cannot be read otherwise", fix=fix)

    def line_of(self, key: str) -> int:
        """The line of a key, or of the section if it has no such key."""
        return self._lines.get(key, self.line)

    def __contains__(self, key: str) -> bool:
        return key in self._nodes

    def __iter__(self) -> Iterator[str]:
        """The keys, in the order of the file."""
        return iter(self._nodes)

    def value(self, key: str) -> Any:
        """The plain value of a key, None if it is absent."""
        return self._construct(self._nodes[key]) if key in self._nodes else None

    def text(self, key: str, default: str | None = None) -> str | None:
        """A text value."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise self._wrong(key, value, "text")
        return str(value)

    def number(self, key: str, default: float) -> float:
        """A finite number; YAML 1.1 reads `1e-3` as text, so text that is a number is taken as one."""
        value = self.value(key)
        return default if value is None else self.to_number(key, value)

    def to_number(self, key: str, value: Any) -> float:
        """`value` as a finite number, or the error that belongs to `key`."""
        try:
            if isinstance(value, bool) or not isinstance(value, (int, float, str)):
                raise ValueError
            number = float(value)
        except (ValueError, OverflowError):
            raise self._wrong(key, value, "a number") from None
        if not math.isfinite(number):
            raise self._wrong(key, value, "a finite number")
        return number

    def truth(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def section(self, key: str) -> Section | None:
        """A mapping inside this one, None if it is absent or empty."""
        node = self._nodes.get(key)
        if node is None or (isinstance(node, yaml.ScalarNode) and self._construct(node) is None):
            return None
        return Section(self.path, f"{self.name}.{key}" if self.name else key, node, self._construct)

    def sections(self, key: str) -> list[Section]:
        """A list of mappings inside this one."""
        node = self._nodes.get(key)
        if node is None:
            return []
        if not isinstance(node, yaml.SequenceNode):
            raise self._wrong(key, self._construct(node), "a list, one `- ` a line")
        return [Section(self.path, f"{key}[{at}]", item, self._construct) for at, item in enumerate(node.value)]

    def is_section(self, key: str) -> bool:
        """Whether the key holds a mapping."""
        return isinstance(self._nodes.get(key), yaml.MappingNode)

    def allow(self, known: Iterable[str], unsupported: Sequence[str] = ()) -> None:
        """Refuse every key that is not `known`: `unsupported` ones by name, others with the nearest known one; all at once."""
        known = list(known)
        errors = [self._unknown(key, known, unsupported) for key in self._lines if key not in known]
        if len(errors) == 1:
            raise errors[0]
        if errors:
            more = [f"and {len(errors) - SHOWN_KEYS} more"] if len(errors) > SHOWN_KEYS else []
            told = [f"line {each.where.rpartition(':')[2]}: {each.what}" for each in errors[:SHOWN_KEYS]]
            fixes = dict.fromkeys(each.fix for each in errors[:SHOWN_KEYS])
            raise RecipeError(
                f"{len(errors)} keys cannot be used",
                where=errors[0].where,
                why="; ".join([*told, *more]),
                fix=" ".join(fixes),
            )

    def _unknown(self, key: str, known: Sequence[str], unsupported: Sequence[str]) -> RecipeError:
        if key in unsupported:
            return self.error(
                f"'{key}' is not supported yet",
                self._lines[key],
                f"remove `{key}:` if the merge does not need it",
                "it would change the result, so it is not ignored",
            )
        near = suggestion(key, known)
        place = f"in `{self.name}:`" if self.name else "at the top of a recipe"
        return self.error(
            f"unknown key '{key}' {place}",
            self._lines[key],
            f"did you mean '{near}'?" if near else "remove it",
            f"known here: {', '.join(sorted(known))}",
        )

    def _wrong(self, key: str, value: Any, needed: str) -> RecipeError:
        return self.error(
            f"'{key}' must be {needed}",
            self.line_of(key),
            f"write `{key}:` followed by {needed}",
            f"found {shown(value)}",
        )


def read_yaml(path: Path) -> tuple[str, Section]:
    """The text of a YAML file and its top-level mapping. Raises RecipeError for a missing, malformed or empty file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            "cannot read the recipe", where=str(path), why=str(error), fix="check the path; a recipe is UTF-8 text"
        ) from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise RecipeError(
            "the recipe is not valid YAML",
            where=f"{path}{place}",
            why=f"{error.problem or error.context}",
            fix="mend this line; indent with blanks, never with tabs",
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RecipeError(
            "the recipe is not valid YAML",
            where=str(path),
            why=str(error),
            fix="mend the file; a recipe is plain text, a few levels deep",
        ) from error
    if node is None:
        raise RecipeError(
            "the recipe is empty",
            where=str(path),
            why="it holds no keys",
            fix="start with `merge_method: task_arithmetic`",
        )

    def construct(part: yaml.Node) -> Any:
        try:
            return loader.construct_object(part, deep=True)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise RecipeError(
                "the recipe holds a value that cannot be read",
                where=f"{path}:{part.start_mark.line + 1}",
                why=str(error).split("\n")[0],
                fix="write plain text, numbers, lists or mappings",
            ) from error

    return text, Section(path, "", node, construct)
