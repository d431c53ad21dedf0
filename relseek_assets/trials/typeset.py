"""Tables of a trial as they stand in a paper: CSV, and LaTeX that needs `article` and `booktabs` and nothing else.

Here belong rounding, order and escaping; studies stand side by side. No number is computed here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from relseek_assets.trial import Trial

INTERVAL = "95% interval"
LINES = 44  # of a table on one page
METHODS = {
    "Kenward-Roger": ("KR", "mixed model by REML, Kenward-Roger degrees of freedom"),
    "Wald t, residual df": ("t", "t with residual degrees of freedom"),
    "t": ("t", "t with residual degrees of freedom"),
    "Wald z": ("z", "Wald z on the log-odds scale"),
    "Wald z, profile interval": ("zp", "Wald z on the log-odds scale, profile-likelihood interval"),
    "lmm": ("LMM", "mixed model by REML"),
    "ols": ("OLS", "least squares"),
    "logit": ("logit", "logistic regression, log-odds scale"),
}
GREEK = (
    "Γ Gamma Δ Delta Θ Theta Λ Lambda Ξ Xi Π Pi Σ Sigma Φ Phi Ψ Psi Ω Omega α alpha β beta γ gamma δ delta ε varepsilon ζ zeta η eta θ theta ι iota "
    "κ kappa λ lambda μ mu ν nu ξ xi π pi ρ rho σ sigma τ tau υ upsilon φ varphi χ chi ψ psi ω omega"
)
MATHEMATICS = "< < > > | | − - ± \\pm × \\times ² ^2 ³ ^3 ≤ \\leq ≥ \\geq"


def _pairs(text: str, form: str) -> dict[str, str]:
    words = text.split()
    return {sign: form.format(name) for sign, name in zip(words[::2], words[1::2], strict=True)}


#: Signs that LaTeX reads as commands, and those that pdflatex does not know.
ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    **{sign: f"\\{sign}" for sign in "{}&%$#_"},
    **_pairs(MATHEMATICS, "${}$"),
    **_pairs(GREEK, "$\\{}$"),
}
MINUS = re.compile(r"(?:(?<=\s)|(?<=\[)|^)-(?=\s|\d)")  # a hyphen that stands for minus, and none inside a word
SPECIAL = re.compile("[" + re.escape("".join(ESCAPES)) + "]")


@dataclass(frozen=True)
class Typeset:
    """A table of texts. `stub` are its first columns, `blocks` study -> columns; rows of one `section` stand under its heading."""

    name: str  # of the file, without an ending
    title: str
    stub: pd.DataFrame
    blocks: Mapping[str, pd.DataFrame]
    sections: Sequence[str]
    note: str = ""

    def csv(self) -> str:
        """One row a table row, columns of a study after its name."""
        beside = [block.add_prefix(f"{study}: " if study else "") for study, block in self.blocks.items()]
        section = pd.DataFrame({"section": list(self.sections)}) if any(self.sections) else pd.DataFrame(index=self.stub.index)
        return str(pd.concat([section, self.stub, *beside], axis=1).to_csv(index=False, lineterminator="\n"))

    def latex(self) -> str:
        """`table` environments to be included with `\\input`, one a page."""
        pages = range(0, max(1, len(self.stub)), LINES)
        return "".join(self._page(start, f"{self.title}{' (continued)' if start else ''}") for start in pages)

    def _page(self, start: int, title: str) -> str:
        widths = [len(self.stub.columns), *(len(block.columns) for block in self.blocks.values())]
        columns = "l" * widths[0] + "".join("@{\\quad}" + "r" * width for width in widths[1:])
        lines = [
            r"\begin{table}[p]",
            r"\centering\scriptsize\setlength{\tabcolsep}{2.5pt}",
            f"\\caption{{{escaped(title)}}}",
            *([] if start else [f"\\label{{tab:{re.sub('[^A-Za-z0-9]+', '-', self.name)}}}"]),
            f"\\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            *self._heads(widths),
            r"\midrule",
            *self._body(start, sum(widths)),
            r"\bottomrule",
            r"\end{tabular}",
        ]
        if self.note:
            lines.append(f"\\par\\smallskip {escaped(self.note)}")
        return "\n".join([*lines, r"\end{table}", ""])

    def _heads(self, widths: Sequence[int]) -> Iterator[str]:
        if any(self.blocks):
            spans = [f"\\multicolumn{{{width}}}{{c}}{{{escaped(_words(study))}}}" for study, width in zip(self.blocks, widths[1:], strict=True)]
            yield " & ".join(["" for _ in range(widths[0])] + spans) + r" \\"
            starts = [1 + sum(widths[: place + 1]) for place in range(len(self.blocks))]
            yield "".join(f"\\cmidrule(lr){{{start}-{start + width - 1}}}" for start, width in zip(starts, widths[1:], strict=True))
        names = [*self.stub.columns, *(name for block in self.blocks.values() for name in block.columns)]
        yield " & ".join(map(escaped, names)) + r" \\"

    def _body(self, start: int, width: int) -> Iterator[str]:
        table = pd.concat([self.stub, *self.blocks.values()], axis=1).iloc[start : start + LINES]
        before = None
        for section, row in zip(self.sections[start : start + LINES], table.itertuples(index=False, name=None), strict=True):
            if section and section != before:
                if before is not None:
                    yield r"\addlinespace"
                yield f"\\multicolumn{{{width}}}{{l}}{{\\textit{{{escaped(section)}}}}} \\\\"
            before = section
            yield " & ".join(escaped(str(cell)) for cell in row) + r" \\"


def document(tables: Sequence[Typeset]) -> str:
    """A LaTeX document that includes the files of all tables, one a page, on landscape A4."""
    head = [
        r"\documentclass[a4paper]{article}",
        r"\usepackage{booktabs}",
        r"\pagestyle{empty}",
        r"\special{papersize=297mm,210mm}\ifdefined\pdfpagewidth\pdfpagewidth=297mm\pdfpageheight=210mm\fi",
        r"\setlength{\hoffset}{-1in}\setlength{\oddsidemargin}{12mm}\setlength{\textwidth}{273mm}",
        r"\setlength{\voffset}{-1in}\setlength{\topmargin}{10mm}\setlength{\headheight}{0pt}\setlength{\headsep}{0pt}\setlength{\textheight}{190mm}",
        r"\begin{document}",
    ]
    return "\n".join([*head, *(f"\\input{{{table.name}}}\\clearpage" for table in tables), r"\end{document}", ""])


def escaped(text: str) -> str:
    """A text in which LaTeX reads no command; signs that pdflatex does not know become its own."""
    return SPECIAL.sub(lambda found: ESCAPES[found[0]], MINUS.sub("−", text))


# --- the tables -------------------------------------------------------------------------------------------------------


def typeset(trial: Trial, tables: Mapping[str, pd.DataFrame]) -> list[Typeset]:
    """Every table that has rows.

    Args:
        tables: rows over all partitions of `trial_contrasts`, `trial_fdr`, `trial_forms`, `trial_equivalence` and `trial_robustness`; those
            that are not there are left out.
    """
    found = []
    fdr = tables.get("trial_fdr", pd.DataFrame())
    for family in dict.fromkeys(fdr["family"]) if len(fdr) else ():
        found.append(family_table(trial, fdr[fdr["family"] == family], f"family_{family}", f"Measure family {_words(str(family))}"))
    contrasts = tables.get("trial_contrasts", pd.DataFrame())
    if len(contrasts):
        alone = [outcome.name for outcome in trial.outcomes if not outcome.family]
        rows = contrasts[contrasts["outcome"].isin(alone) & contrasts["variant"].eq("primary")]
        if len(rows):
            found.append(family_table(trial, rows, "no_family", "Outcomes of no family, p-values not adjusted"))
    makers: tuple[tuple[str, Callable[[Trial, pd.DataFrame], Typeset]], ...] = (
        ("trial_forms", forms_table),
        ("trial_equivalence", equivalence_table),
        ("trial_robustness", robustness_table),
    )
    found += [make(trial, tables[name]) for name, make in makers if len(tables.get(name, ()))]
    return found


def family_table(trial: Trial, rows: pd.DataFrame, name: str, title: str) -> Typeset:
    """The primary tests of a family: estimate, interval, p raw, local and global, n and method, by kind of test."""
    cells = pd.DataFrame(
        {
            **_estimates(rows, INTERVAL),
            "p": rows["p_raw"].map(p_text),
            "p local": rows["p_local"].map(p_text),
            "p global": rows["p_global"].map(p_text),
            "n": rows["n"].map(str),
            "method": rows["method"].map(_method),
        }
    )
    stub = pd.DataFrame({"outcome": rows["outcome"].map(_words), "contrast": rows["contrast"], "unit": rows["outcome"].map(_units(trial))})
    note = "p local and p global: Benjamini-Hochberg within the local and the measure family. n: rows analysed. " + _methods(rows["method"])
    return _side_by_side(trial, rows["study"], rows["test_type"].map(_kind), stub, cells, name, title, note)


def forms_table(trial: Trial, rows: pd.DataFrame) -> Typeset:
    """The polynomial of each outcome with what it was chosen by, and the heterogeneity test of pooled items."""
    chosen = rows[rows["selected"].astype(bool)]
    by_aic = rows[rows["selected_by_aic"].astype(bool)].set_index(["study", "outcome"])["form"]
    declared = chosen["outcome"].map(lambda outcome: bool(trial.outcome(outcome).form))
    tests = [
        "–" if pd.isna(row.heterogeneity_p) else f"χ²({int(row.heterogeneity_df)}) = {row.heterogeneity_chi2:.2f}, p {_relation(row.heterogeneity_p)}"
        for row in chosen.itertuples()
    ]
    cells = pd.DataFrame(
        {
            "form": chosen["form"] + declared.map({True: " (declared)", False: ""}),
            "by AIC": by_aic.reindex(pd.MultiIndex.from_frame(chosen[["study", "outcome"]])).to_numpy(),
            "items differ": tests,
            "n": chosen["n"].map(str),
        }
    )
    cells.index = chosen.index
    stub = pd.DataFrame({"outcome": chosen["outcome"].map(_words)})
    note = "Polynomial of the dose in all models of the outcome. Items differ: likelihood-ratio test of pooled items with effects of their own."
    return _side_by_side(trial, chosen["study"], None, stub, cells, "forms", "Form of the dose-response", note)


def equivalence_table(trial: Trial, rows: pd.DataFrame) -> Typeset:
    """Main effects against the declared margins."""
    cells = pd.DataFrame(
        {
            **_estimates(rows, "90% interval"),
            "p": rows["p"].map(p_text),
            "equivalent": rows["equivalent"].map({True: "yes", False: "no"}),
            "n": rows["n"].map(str),
        }
    )
    stub = pd.DataFrame(
        {
            "outcome": rows["outcome"].map(_words),
            "contrast": rows["contrast"],
            "margin": rows["margin"].map(lambda margin: f"±{margin:g}"),
            "unit": rows["outcome"].map(_units(trial)),
        }
    )
    note = "p: the larger of two one-sided tests; below 0.05 the effect is smaller than the margin, whatever its sign."
    return _side_by_side(trial, rows["study"], None, stub, cells, "equivalence", "Equivalence", note)


def robustness_table(trial: Trial, rows: pd.DataFrame) -> Typeset:
    """The primary contrast in every specification, by the chosen polynomial and by category of the dose."""
    rows = rows[rows["term"].str.contains(" - ", regex=False)]
    resampled = _estimates(rows.assign(lower=rows["bootstrap_lower"], upper=rows["bootstrap_upper"]), "bootstrap")["bootstrap"]
    cells = pd.DataFrame(
        {
            **_estimates(rows, INTERVAL),
            "bootstrap": resampled,
            "p": rows["p_raw"].map(p_text),
            "change": rows["change_percent"].map(lambda change: "–" if pd.isna(change) else f"{_fixed(change, 1)}%"),
            "n": rows["n"].map(str),
            "method": rows["method"].map(_method),
        },
        index=rows.index,
    )
    stub = pd.DataFrame({"outcome": rows["outcome"].map(_words), "specification": rows["specification"], "dose": _dose_as(rows)})
    note = "bootstrap: 95% of a Bayesian bootstrap over participants. change: against the full model. p-values are not adjusted. " + _methods(
        rows["method"]
    )
    title = f"The primary contrast in every specification: {trial.dose.contrast}"
    return _side_by_side(trial, rows["study"], None, stub, cells, "robustness", title, note)


def _dose_as(rows: pd.DataFrame) -> pd.Series:
    """A polynomial differs between studies, so that rows that belong side by side say only that it is one."""
    return rows["form"].map(lambda form: "by category" if form == "coarsened" else "polynomial")


def _side_by_side(
    trial: Trial, study: pd.Series, section: pd.Series | None, stub: pd.DataFrame, cells: pd.DataFrame, name: str, title: str, note: str
) -> Typeset:
    """Rows with the same section and stub on one line, studies in the order of the declaration; what a study lacks is left blank."""
    keys = stub.assign(section="" if section is None else section)
    kinds = list(dict.fromkeys(keys["section"]))
    lines = keys.drop_duplicates().sort_values("section", key=lambda values: values.map(kinds.index), kind="stable").reset_index(drop=True)
    order = pd.MultiIndex.from_frame(lines)
    blocks = {}
    for which in trial.study.values:
        mine = study == which
        if mine.any():
            block = cells[mine].set_index(pd.MultiIndex.from_frame(keys[mine])).reindex(order)
            blocks[which if len(trial.study.values) > 1 else ""] = block.fillna("").reset_index(drop=True)
    return Typeset(name, title, lines.drop(columns="section"), blocks, list(lines["section"]), note)


# --- cells ------------------------------------------------------------------------------------------------------------


def _estimates(rows: pd.DataFrame, heading: str) -> pd.DataFrame:
    """Estimates and intervals, in each row with as many decimals as its interval is wide: two significant digits of it, two decimals at least."""
    texts = []
    for estimate, lower, upper in rows[["estimate", "lower", "upper"]].itertuples(index=False):
        decimals = _decimals(upper - lower)
        interval = "–" if pd.isna(lower) else f"[{_fixed(lower, decimals)}, {_fixed(upper, decimals)}]"
        texts.append((_fixed(estimate, decimals), interval))
    return pd.DataFrame(texts, columns=["estimate", heading], index=rows.index)


def _decimals(width: float) -> int:
    return min(6, max(2, 1 - math.floor(math.log10(width)))) if width > 0 else 2


def _fixed(value: float, decimals: int) -> str:
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text


def p_text(value: float) -> str:
    """Three decimals, small ones as a bound."""
    return "–" if pd.isna(value) else "<0.001" if value < 0.001 else f"{value:.3f}"


def _relation(p: float) -> str:
    text = p_text(p)
    return text if text.startswith("<") else f"= {text}"


def _method(method: str) -> str:
    return METHODS[method][0] if method in METHODS else method


def _methods(methods: pd.Series) -> str:
    """What the abbreviations in a table mean."""
    used = dict.fromkeys(METHODS[method] for method in methods if method in METHODS)
    return "; ".join(f"{short}: {long}" for short, long in used) + "." if used else ""


def _units(trial: Trial) -> Callable[[str], str]:
    return lambda outcome: trial.outcome(outcome).unit


def _kind(test_type: str) -> str:
    """A test type as a heading: every main effect under one."""
    return "main effects" if test_type.startswith("main_effect") else _words(test_type)


def _words(name: str) -> str:
    return name.replace("_", " ")
