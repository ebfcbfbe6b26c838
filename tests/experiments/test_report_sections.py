"""Tables of the report: which figure stands where."""

from typing import Any

import pytest

from experiments.report_sections import environment, run_table, stages


@pytest.fixture
def figures() -> dict[str, Any]:
    def stage(hybrid: float) -> dict[str, Any]:
        return {"steps": 40, "figures": {"psnr_hybrid": hybrid, "heldout_psnr_hybrid": hybrid - 1}}

    return {
        "tokenizer": {"psnr_hybrid": 31.0, "heldout_psnr_hybrid": 30.0},
        "runs": {
            "stage1": stage(30.0),
            "stage2": stage(31.0),
            "generator_64": {"steps": 1234, "figures": {"token": 2.0}},
        },
        "splits": ["val", "heldout"],
        "parameters": {"tokenizer": 1_234_567},
        "versions": {"torch": "2.11.0"},
    }


def cells(markup: str, name: str) -> list[str]:
    """The row of a table whose first cell is `name`."""
    rows = [row.split("</tr>")[0] for row in markup.split("<tr>")[1:]]
    split = [
        [cell.split("</t")[0] for cell in row.replace("th>", "td>").split("<td>")[1:]]
        for row in rows
    ]
    (found,) = [row[1:] for row in split if row[0] == name]
    return found


def test_stages_stand_side_by_side_without_the_generators(figures) -> None:
    markup = stages(figures)
    assert cells(markup, "after") == ["stage1", "stage2"]
    assert cells(markup, "PSNR, dB, val") == ["30.00 | –", "31.00 | –"]
    assert cells(markup, "PSNR, dB, heldout") == ["29.00 | –", "30.00 | –"]


def test_a_split_that_the_tokenizer_is_not_validated_on_has_no_rows(figures) -> None:
    del figures["tokenizer"]["heldout_psnr_hybrid"]
    assert "heldout" not in stages(figures) and "PSNR, dB, val" in stages(figures)


def test_every_run_has_a_row_and_unknown_figures_a_dash(figures) -> None:
    assert cells(run_table(figures), "generator_64")[:2] == ["1,234", "–"]


def test_parameters_and_versions_are_told(figures) -> None:
    markup = environment(figures)
    assert cells(markup, "parameters, tokenizer") == ["1,234,567"]
    assert cells(markup, "torch") == ["2.11.0"]
