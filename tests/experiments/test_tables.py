"""Tables: averages, spreads over seeds, and who is best."""

from __future__ import annotations

import pytest

from sensmerge.experiments.tables import Row, Table, averages, cells, markdown

ROWS = (
    Row("base", None, {"chat": [90.0], "math": [90.0]}, compared=False, notes=("",)),
    Row("plain", False, {"chat": [50.0], "math": [70.0]}, compared=True, notes=("1",)),
    Row("plain", True, {"chat": [60.0], "math": [60.0]}, compared=True, notes=("0.7",)),
)
TABLE = Table("scores", ("chat", "math"), ("λ",), ROWS)


def test_the_average_is_over_columns_for_each_seed() -> None:
    row = Row("m", True, {"chat": [10.0, 20.0], "math": [30.0, 50.0]}, compared=True)
    assert averages(row, ("chat", "math")) == [20.0, 35.0]


def test_cells_in_the_paper_s_layout() -> None:
    header, texts, bold = cells(TABLE)
    assert header == ["method", "Sens", "chat", "math", "average", "λ"]
    assert texts[1] == ["plain", "✗", "50.0", "70.0", "60.0", "1"]
    assert [row[1] for row in texts] == ["", "✗", "✓"]
    assert bold[0] == [False] * 6, "single models do not compete, however good"
    assert bold[1] == [False, False, False, True, True, False]
    assert bold[2] == [False, False, True, False, True, False], "equal averages share the first place"


def test_several_seeds_are_told_as_mean_and_sample_sd() -> None:
    table = Table("t", ("chat",), (), (Row("m", True, {"chat": [10.0, 20.0, 30.0]}, compared=True),))
    assert cells(table)[1][0][2] == "20.0 ± 10.0"


def test_markdown() -> None:
    lines = markdown(TABLE).splitlines()
    assert lines[0] == "**scores**"
    assert lines[2] == "| method | Sens | chat | math | average | λ |"
    assert lines[5] == "| plain | ✗ | 50.0 | **70.0** | **60.0** | 1 |"
    assert len(lines) == 7


@pytest.mark.parametrize("values", [[10.0], [1.0, 2.0]])
def test_a_table_without_compared_rows_has_no_best(values: list[float]) -> None:
    table = Table("t", ("chat",), (), (Row("base", None, {"chat": values}, compared=False),))
    assert not any(any(row) for row in cells(table)[2])
