"""Tables of a paper: every number of the estimates in its place, studies side by side, LaTeX that has no open end and no raw sign."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from relseek_assets.trial import Trial
from relseek_assets.trials.typeset import ESCAPES, LINES, Typeset, document, escaped, typeset

SPANNED = re.compile(r"\\multicolumn\{(\d+)\}")
SIGN = re.compile(r"(?<!\\)[&%#_^~<>|]|[^\x00-\x7f]")  # not escaped, or not ASCII


def declared(**changes: Any) -> Trial:
    def outcome(name: str, family: str = "", **more: Any) -> dict[str, Any]:
        unit = {"unit": "points & more_%"}
        return {
            "name": name,
            "table": "t",
            "items": [name],
            "family": family,
            "local_family": family,
            **unit,
            "designs": {"A_1": {}, "B": {}},
            **more,
        }

    return Trial.model_validate(
        {
            "study": {"column": "s", "values": {"A_1": "a", "B": "b"}},
            "dose": {"column": "arm", "values": [-1.0, 1.0], "label": "RS"},
            "tables": {"t": {"file": "t.csv", "columns": [{"names": ["trust", "ease", "alone"]}]}},
            "outcomes": [outcome("trust", "views"), outcome("ease", "views", form="linear"), outcome("alone")],
            **changes,
        }
    )


def stated(**changes: Any) -> dict[str, Any]:
    row = {"study": "A_1", "outcome": "trust", "test_type": "main_effect_RS", "contrast": "RS: Avg(Pos) - Avg(Neg)", "variant": "primary"}
    numbers = {"estimate": -1.2345, "lower": -2.5, "upper": 0.031, "p_raw": 0.0562, "p_local": 0.0843, "p_global": 0.1124, "n": 1820}
    return {"family": "views", **row, **numbers, "method": "Kenward-Roger", **changes}


def tables(*rows: dict[str, Any], **more: pd.DataFrame) -> dict[str, Typeset]:
    found = typeset(declared(), {"trial_fdr": pd.DataFrame(list(rows)), **more})
    return {table.name: table for table in found}


def sound(text: str) -> None:
    """Braces and environments close, every line of a tabular has as many columns as it declares, and no sign is left that LaTeX misreads."""
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text):
        depth += 1 if brace == "{" else -1
        assert depth >= 0
    assert depth == 0
    opened: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{([a-z]+)\}", text):
        if kind == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert opened == []
    assert text.count("$") % 2 == 0
    for columns, body in re.findall(r"\\begin\{tabular\}\{((?:[lr]|@\{\\quad\})+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL):
        width = len(columns.replace("@{\\quad}", ""))
        lines = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert len(lines) > 1
        for line in lines:
            cells = re.split(r"(?<!\\)&", line)
            spans = [SPANNED.search(cell) for cell in cells]
            assert sum(int(span[1]) if span else 1 for span in spans) == width, line
            for cell in cells:
                mathematics = re.sub(r"\$[^$]*\$", "", cell)
                assert SIGN.search(mathematics.replace(r"\textasciitilde{}", "")) is None, cell


def test_a_family_shows_every_number_of_a_test() -> None:
    table = tables(stated())["family_views"]
    row = pd.read_csv(io.StringIO(table.csv())).iloc[0]
    assert row.to_dict() == {
        "section": "main effects",
        "outcome": "trust",
        "contrast": "RS: Avg(Pos) - Avg(Neg)",
        "unit": "points & more_%",
        "A_1: estimate": -1.23,
        "A_1: 95% interval": "[-2.50, 0.03]",
        "A_1: p": 0.056,
        "A_1: p local": 0.084,
        "A_1: p global": 0.112,
        "A_1: n": 1820,
        "A_1: method": "KR",
    }
    assert "KR: mixed model by REML, Kenward-Roger degrees of freedom" in table.note


def test_studies_stand_side_by_side_and_what_one_lacks_is_blank() -> None:
    table = tables(stated(), stated(outcome="ease"), stated(study="B", estimate=0.5, method="t"))["family_views"]
    assert list(table.blocks) == ["A_1", "B"]
    assert table.stub["outcome"].tolist() == ["trust", "ease"]
    assert table.blocks["A_1"]["estimate"].tolist() == ["-1.23", "-1.23"]
    assert table.blocks["B"]["estimate"].tolist() == ["0.50", ""]
    assert table.blocks["B"]["method"].tolist() == ["t", ""]
    head = table.latex().splitlines()[6]
    assert head == r" &  &  & \multicolumn{7}{c}{A 1} & \multicolumn{7}{c}{B} \\"
    sound(table.latex())


def test_tests_stand_under_the_heading_of_their_kind() -> None:
    domain = stated(test_type="main_effect_Domain", contrast="Domain: b - a")
    table = tables(stated(test_type="moderation"), stated(), stated(test_type="moderation", outcome="ease"), domain)["family_views"]
    assert list(table.sections) == ["moderation", "moderation", "main effects", "main effects"]
    assert table.latex().count(r"\textit{moderation}") == table.latex().count(r"\textit{main effects}") == 1
    sound(table.latex())


@pytest.mark.parametrize(
    ("estimate", "lower", "upper", "shown"),
    [
        (12.3456, 8.0, 16.0, ("12.35", "[8.00, 16.00]")),
        (0.012345, 0.0051, 0.0199, ("0.012", "[0.005, 0.020]")),
        (0.0004, -0.0003, 0.0011, ("0.0004", "[-0.0003, 0.0011]")),
        (-0.001, -1.0, 1.0, ("0.00", "[-1.00, 1.00]")),
        (250.0, 100.0, 400.0, ("250.00", "[100.00, 400.00]")),
    ],
)
def test_numbers_have_as_many_decimals_as_their_interval_warrants(estimate: float, lower: float, upper: float, shown: tuple[str, str]) -> None:
    block = tables(stated(estimate=estimate, lower=lower, upper=upper))["family_views"].blocks["A_1"]
    assert (block["estimate"].item(), block["95% interval"].item()) == shown


def test_small_p_values_are_bounds() -> None:
    block = tables(stated(p_raw=0.0009, p_local=0.001, p_global=1.0))["family_views"].blocks["A_1"]
    assert block[["p", "p local", "p global"]].iloc[0].tolist() == ["<0.001", "0.001", "1.000"]


def test_forms_say_what_was_declared_chosen_and_tested() -> None:
    head = {"study": "A_1", "n": 1820, "heterogeneity_chi2": 59.934, "heterogeneity_df": 8, "heterogeneity_p": 4.8e-10}
    one = {**head, "outcome": "ease", "heterogeneity_chi2": float("nan"), "heterogeneity_df": float("nan"), "heterogeneity_p": float("nan")}
    rows = pd.DataFrame(
        [
            {**head, "outcome": "trust", "form": "quadratic", "selected": True, "selected_by_aic": False},
            {**head, "outcome": "trust", "form": "cubic", "selected": False, "selected_by_aic": True},
            {**one, "form": "linear", "selected": True, "selected_by_aic": True},
        ]
    )
    table = tables(trial_forms=rows)["forms"]
    block = table.blocks["A_1"].assign(outcome=table.stub["outcome"]).set_index("outcome")
    assert block.loc["trust"].tolist() == ["quadratic", "cubic", "χ²(8) = 59.93, p <0.001", "1820"]
    assert block.loc["ease"].tolist() == ["linear (declared)", "linear", "–", "1820"]
    sound(table.latex())


def test_equivalence_shows_the_margin_and_the_verdict() -> None:
    row = {"study": "B", "outcome": "trust", "contrast": "RS: Avg(Pos) - Avg(Neg)", "margin": 5.0, "estimate": 1.0, "lower": -0.5, "upper": 2.5}
    table = tables(trial_equivalence=pd.DataFrame([{**row, "p": 0.0004, "equivalent": True, "n": 900}]))["equivalence"]
    assert table.stub.iloc[0].tolist() == ["trust", "RS: Avg(Pos) - Avg(Neg)", "±5", "points & more_%"]
    assert table.blocks["B"].iloc[0].tolist() == ["1.00", "[-0.50, 2.50]", "<0.001", "yes", "900"]
    sound(table.latex())


def test_robustness_shows_the_contrast_by_specification_and_no_coefficient() -> None:
    row = {"study": "A_1", "outcome": "trust", "specification": "full", "form": "cubic", "term": "RS: Avg(Pos) - Avg(Neg)", "estimate": 2.0}
    more = {
        "lower": 1.0,
        "upper": 3.0,
        "bootstrap_lower": 1.1,
        "bootstrap_upper": 2.9,
        "p_raw": 0.02,
        "change_percent": 0.0,
        "n": 70,
        "method": "lmm",
    }
    additive = {**row, **more, "specification": "additive", "form": "coarsened", "bootstrap_lower": float("nan"), "change_percent": -3.14}
    table = tables(trial_robustness=pd.DataFrame([{**row, **more}, {**row, **more, "term": "dose"}, additive]))["robustness"]
    assert table.stub.to_numpy().tolist() == [["trust", "full", "polynomial"], ["trust", "additive", "by category"]]
    assert table.blocks["A_1"].iloc[0].tolist() == ["2.00", "[1.00, 3.00]", "[1.10, 2.90]", "0.020", "0.0%", "70", "LMM"]
    assert table.blocks["A_1"][["bootstrap", "change"]].iloc[1].tolist() == ["–", "-3.1%"]
    assert "RS: Avg(Pos) - Avg(Neg)" in table.title
    sound(table.latex())


# --- LaTeX ------------------------------------------------------------------------------------------------------------


def test_names_are_read_as_text() -> None:
    assert escaped("50% of R&D_costs #1 {x} ~ a^b $5 \\cmd") == (
        r"50\% of R\&D\_costs \#1 \{x\} \textasciitilde{} a\textasciicircum{}b \$5 \textbackslash{}cmd"
    )
    assert escaped("λ² × Δ ± p < 0.05") == r"$\lambda$$^2$ $\times$ $\Delta$ $\pm$ p $<$ 0.05"
    assert escaped("[-1.5, -0.2] S4 - S1, non-personalised, 2025-26") == r"[$-$1.5, $-$0.2] S4 $-$ S1, non-personalised, 2025-26"
    assert all(SIGN.search(re.sub(r"\$[^$]*\$", "", value)) is None for value in ESCAPES.values())


def test_signs_of_names_do_not_break_a_table() -> None:
    awkward = "100%_of & all {braces} \\input{x} λ² < ±1 ~ ^ # $"
    for table in tables(stated(contrast=awkward), stated(study="B", contrast=awkward, outcome="ease")).values():
        sound(table.latex())


def test_long_tables_are_continued_on_the_next_page() -> None:
    rows = [stated(contrast=f"contrast {number}") for number in range(2 * LINES + 3)]
    text = tables(*rows)["family_views"].latex()
    assert text.count(r"\begin{table}") == 3
    assert text.count("(continued)") == 2
    assert text.count(r"\label") == 1
    assert [int(number) for number in re.findall(r"contrast (\d+) &", text)] == list(range(2 * LINES + 3)), "every row once, in order"
    sound(text)


def test_nothing_to_show_makes_no_table() -> None:
    assert typeset(declared(), {}) == []
    assert typeset(declared(), {"trial_fdr": pd.DataFrame(), "trial_forms": pd.DataFrame()}) == []


def test_the_document_compiles(tmp_path: Path) -> None:
    """With pdflatex where it is installed; where it is not, the same files pass the syntax of `sound`."""
    rows = [stated(contrast=f"RS × Domain λ² {number} & 5% [−1]", study=study) for number in range(LINES + 5) for study in ("A_1", "B")]
    found = list(tables(*rows).values())
    for table in found:
        (tmp_path / f"{table.name}.tex").write_text(table.latex(), encoding="utf-8")
        sound(table.latex())
    text = document(found)
    sound(text)
    assert re.findall(r"\\usepackage\{(.*?)\}", text) == ["booktabs"]
    assert r"\input{family_views}" in text
    if shutil.which("pdflatex"):
        (tmp_path / "tables.tex").write_text(text, encoding="utf-8")
        done = subprocess.run(["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "tables.tex"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
        assert (tmp_path / "tables.pdf").stat().st_size > 1000
