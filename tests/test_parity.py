"""The parity table: its quick rows have the outcomes that the results file has, and the page has exactly the rows."""

from __future__ import annotations

import re
import warnings

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from benchmarks.parity import __main__ as parity
from benchmarks.parity.rows import METHODS, NOT_RUN, REFUSED, ROWS, WORKS, WRONG, Method, Row, first_words, run

CELLS = parity.stored()


def test_the_page_is_the_table_of_the_results():
    assert CELLS.keys() == {(title, method) for title in ROWS for method in METHODS}
    assert parity.DOCUMENT.read_text(encoding="utf-8") == parity.table(CELLS)


def test_nothing_is_wrong():
    wrong = [f"{key}: {each['note']}" for key, each in CELLS.items() if each["outcome"] == WRONG and key[1] != "LoRA"]
    assert wrong == []
    cells = re.findall(r"\| ([a-z ]+?)(?: \[\d+\])?(?= \|)", parity.DOCUMENT.read_text(encoding="utf-8"))
    assert WRONG not in cells and WORKS in cells


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("title", [title for title, each in ROWS.items() if not each.slow])
def test_row(title: str) -> None:
    for name in METHODS:
        found = run(ROWS[title], METHODS[name])
        if found.status == NOT_RUN:
            pytest.skip(found.note)
        assert found.status == CELLS[title, name]["outcome"], f"{name}: {found.note}"


def test_cells_tell_refusals_from_accidents():
    def cell(check) -> str:
        return run(Row("", "", check), METHODS["NOLA"]).status

    def refusal(method: Method) -> None:
        method.config(seed=-1)

    def unknown(method: Method) -> None:
        method.config(use_dora=True)

    def accident(method: Method) -> None:
        raise ValueError("raised by the row")

    def missing(method: Method) -> None:
        method.config().no_such_thing  # noqa: B018

    assert [cell(each) for each in (refusal, unknown, accident, missing)] == [REFUSED, REFUSED, WRONG, WRONG]
    assert len(first_words("word " * 100)) < 200
