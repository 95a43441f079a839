"""The exception tree: every failure a user can cause or meet has a class, an exit code and a four-line message.

Exit codes (the promise made to scripts): 0 done; 1 a bug of ours; 2 usage or recipe; 3 bad input file; 4 models that do not
fit together; 5 calibration data; 6 disk, RAM or GPU; 7 output busy or not empty; 8 non-finite numbers; 9 evaluation;
130/143 interrupted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

# What a terminal would obey, or would show in another order, in place of showing it.
_UNSEEN = [*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_ESCAPES = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _UNSEEN}
_ESCAPES_BUT_LINES = {code: escape for code, escape in _ESCAPES.items() if chr(code) not in "\n\t"}


def escaped(text: str, *, lines: bool = False) -> str:
    """`text` with control characters written out (`\\x1b`), so that no name out of a file commands a terminal.

    Ends of lines and tabs stay unless `lines` asks to write them out too, as for a name, which must not end its line.
    """
    return text.translate(_ESCAPES if lines else _ESCAPES_BUT_LINES)


# What a fix says that names a check of the recipe's `allow:`.
_ALLOW = re.compile(r"`allow: \[([^\]]*)\]`")


def allowed_by(error: SensmergeError) -> list[str]:
    """The names that the fix of an error offers to write into the recipe's `allow:`."""
    return [name.strip() for names in _ALLOW.findall(error.fix) for name in names.split(",")]


class SensmergeError(Exception):
    """A failure told in four lines: what happened, where, why, and a fix that works when pasted.

    `what` is one sentence; `where` names the model, tensor, file or line; `why` is the rule that was broken; `fix` is what to
    type or change. `str(error)` is the four-line message.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str, why: str, fix: str) -> None:
        what, where, why, fix = escaped(what, lines=True), escaped(where, lines=True), escaped(why), escaped(fix)
        self.what, self.where, self.why, self.fix = what, where, why, fix
        super().__init__(f"{what}\n  where: {where}\n  why:   {why}\n  fix:   {fix}")


class RecipeError(SensmergeError):
    """Wrong usage of a command, or a recipe that cannot be read as one."""

    exit_code = 2


class InputFileError(SensmergeError):
    """A model, profile or record file that is missing, damaged or not what it claims to be."""

    exit_code = 3


class IncompatibleModelsError(SensmergeError):
    """Models that do not fit together: other tensors, other shapes, another base."""

    exit_code = 4


class CalibrationDataError(SensmergeError):
    """Calibration samples that are missing, malformed or hold nothing to learn from."""

    exit_code = 5


class ResourceError(SensmergeError):
    """Not enough disk, memory or GPU."""

    exit_code = 6


class OutputError(SensmergeError):
    """An output folder that is not empty, or that would overwrite an input."""

    exit_code = 7


class NonFiniteError(SensmergeError):
    """NaN or infinity in a weight, a gradient or a result."""

    exit_code = 8


class EvaluationError(SensmergeError):
    """An evaluation that cannot run."""

    exit_code = 9


class SeveralErrors(SensmergeError):
    """More than one failure, all told at once; the exit code is that of the first.

    A recipe has one `allow:`, so where several fixes ask for it, each tells the line with all names.
    """

    def __init__(self, errors: Sequence[SensmergeError]) -> None:
        self.errors = tuple(errors)
        first = self.errors[0]
        self.exit_code = first.exit_code  # type: ignore[misc]  # a failure of several kinds has the code of its first
        super().__init__(first.what, where=first.where, why=first.why, fix=first.fix)
        line = f"`allow: [{', '.join(sorted({name for error in self.errors for name in allowed_by(error)}))}]`"
        together = [
            SensmergeError(each.what, where=each.where, why=each.why, fix=_ALLOW.sub(lambda _: line, each.fix))
            for each in self.errors
        ]
        told = (f"{number}. {error}" for number, error in enumerate(together, 1))
        self.args = ("\n".join([f"{len(self.errors)} faults were found", *told]),)


class Faults:
    """Gathers the failures of checks that do not depend on each other, so that all can be told at once."""

    def __init__(self) -> None:
        self.found: list[SensmergeError] = []

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """A block whose SensmergeError is kept instead of raised."""
        try:
            yield
        except SeveralErrors as several:
            self.found += several.errors
        except SensmergeError as error:
            self.found.append(error)

    def raise_all(self) -> None:
        """Raise what was gathered: the failure itself if there is one, SeveralErrors for more."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise SeveralErrors(self.found)
