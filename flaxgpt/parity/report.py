"""What the ladder found, for people: lines for the terminal, JSON, a plot and a page."""

from __future__ import annotations

import base64
import dataclasses
import html
import json
import math
from collections.abc import Sequence
from pathlib import Path

from flaxgpt.parity.bounds import BOUNDS
from flaxgpt.parity.compare import Measurement, Result, first_divergence, share
from flaxgpt.parity.ladder import RUNGS
from flaxgpt.parity.plots import save_parity_plot

_WIDTHS = (27, 7, 10, 8, 8, 12, 8, 8, 6, 0)


def header(reference: str, port: str = "flaxgpt") -> str:
    """The first line of the table; `reference` is what flaxgpt, or another port, is compared with, here and below."""
    return _line(_titles(reference, port))


def lines(result: Result, rungs: Sequence[str] = RUNGS) -> list[str]:
    """The lines of the table for a rung, one for each kind of tensor that has bounds of its own; `rungs` are numbered, here and below."""
    return [_line(row) for row in _table(result, rungs)]


def verdict(results: Sequence[Result]) -> list[str]:
    """What it comes to, and where the two sides first diverge."""
    failed = [result for result in results if not result.passed]
    if not failed:
        return [f"passed: {sum(len(result.rows) for result in results)} comparisons on {len(results)} rungs, all within their bounds"]
    count = sum(len(result.failures) for result in failed)
    text = [f"failed: {count} comparisons on {', '.join(result.rung for result in failed)}"]
    for direction, name in first_divergence(results).items():
        if name:
            text.append(f"{direction + ':':<10}the two sides first diverge at {name}")
    for result in failed:
        if result.rung not in ("activations", "loss", "gradients"):
            text.append(f"{result.rung + ':':<14}first {_describe(result.failures[0])}")
    return text


def to_json(results: Sequence[Result], about: dict[str, object]) -> str:
    """Everything: what was run, every row, the verdict. What is not finite is written as a string."""
    rungs = [
        {"rung": result.rung, "passed": result.passed, "seconds": round(result.seconds, 2), "rows": [_plain(row) for row in result.rows]}
        for result in results
    ]
    whole = {**about, "passed": all(result.passed for result in results), "first_divergence": first_divergence(results), "rungs": rungs}
    return json.dumps(whole, indent=1, allow_nan=False) + "\n"


def to_html(
    results: Sequence[Result],
    about: dict[str, object],
    plot: Path | None,
    reference: str,
    port: str = "flaxgpt",
    diagnosis: Sequence[str] = (),
    rungs: Sequence[str] = RUNGS,
) -> str:
    """One page that needs nothing else: the verdict, what explains it, what was run, the table, the plot."""
    passed = all(result.passed for result in results)
    image = f'<img alt="difference by layer" src="data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}">' if plot else ""
    rows = "\n".join(
        f'<tr class="{row[8]}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for r in results
        for row in _table(r, rungs)
    )
    facts = "\n".join(f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(_fact(value))}</td></tr>" for name, value in about.items())
    titles = "".join(f"<th>{title}</th>" for title in _titles(reference, port))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{port} against {reference}: parity report</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
td, th {{ padding: .15rem .7rem; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }}
tr.FAILED td {{ background: #fdd }} img {{ max-width: 100% }} .verdict {{ white-space: pre-line; font-weight: 600 }}
.verdict.passed {{ color: #170 }} .verdict.failed {{ color: #b00 }}
</style></head><body>
<h1>{port} against {reference}</h1>
<p class="verdict {"passed" if passed else "failed"}">{html.escape(chr(10).join([*verdict(results), *diagnosis]))}</p>
<table><tr>{titles}</tr>
{rows}
</table>
<p>{html.escape(_legend(reference, port))}</p>
{image}
<h2>What was run</h2>
<table>
{facts}
</table>
</body></html>
"""


def save_plot(results: Sequence[Result], path: Path, reference: str, port: str = "flaxgpt") -> bool:
    """Differences by layer, forward and backward, as a PNG; False, and no file, if neither rung was climbed."""
    wanted = {result.rung: result.rows for result in results}
    panels = {
        "forward: activations": [(row.name, row) for row in wanted.get("activations", ())],
        "backward: gradients of the loss with respect to them": [
            (row.name.removeprefix("backward/"), row) for row in wanted.get("gradients", ()) if row.kind == "backward"
        ],
    }
    panels = {title: rows for title, rows in panels.items() if rows}
    if panels:
        save_parity_plot(panels, path, reference, port)
    return bool(panels)


def _titles(reference: str, port: str) -> tuple[str, ...]:
    return "rung", "tensors", "difference", "bound", port, reference, "float64", "bound", "", "worst tensor"


def _legend(reference: str, port: str) -> str:
    return (
        "Differences are ||a - b|| / ||b|| of a tensor; those of parameters after updates are relative to how far they moved. "
        f"difference: {port} against {reference}. {port}, {reference}: each side's own error against {reference} in float64. "
        "float64: both sides in float64. "
        "Of the tensors of a line, each difference is the one closest to its bound, or furthest beyond it, and each error the largest; "
        "the worst tensor is closest of all."
    )


def _table(result: Result, rungs: Sequence[str]) -> list[tuple[str, ...]]:
    number = f"{rungs.index(result.rung) + 1} " if result.rung in rungs else ""
    table = []
    groups = _by_kind(result)
    for rows in groups:
        worst = max(rows, key=lambda row: row.share_of_bound)
        kind = f": {rows[0].kind}" if len(groups) > 1 else ""
        own = [_largest(rows, column) for column in ("error_flaxgpt", "error_reference")]
        columns = (*_closest(rows, "difference", "bound"), *own, *_closest(rows, "exact", "exact_bound"))
        passed = "passed" if all(row.passed for row in rows) else "FAILED"
        table.append((f"{number}{result.rung}{kind}", str(len(rows)), *columns, passed, worst.name))
    return table


def _by_kind(result: Result) -> list[list[Measurement]]:
    """The rows in groups that share their bounds, where the rung has bounds for more than one kind."""
    if f"{result.rung}/{result.rows[0].kind}" not in BOUNDS:
        return [list(result.rows)]
    kinds = dict.fromkeys(row.kind for row in result.rows)
    return [[row for row in result.rows if row.kind == kind] for kind in kinds]


def _closest(rows: Sequence[Measurement], column: str, bounds: str) -> tuple[str, str]:
    """The value that is closest to its bound, or furthest beyond it, and that bound."""
    pairs = [(value, getattr(row, bounds)) for row in rows if (value := getattr(row, column)) is not None]
    if not pairs:
        return "-", "-"
    value, bound = max(pairs, key=lambda pair: (share(*pair), pair[0]))
    return f"{value:.1e}", f"{bound:.0e}"


def _largest(rows: Sequence[Measurement], column: str) -> str:
    values = [value for row in rows if (value := getattr(row, column)) is not None]
    return f"{max(values, key=lambda value: math.inf if math.isnan(value) else value):.1e}" if values else "-"


def _line(cells: Sequence[str]) -> str:
    return " ".join(
        f"{cell:<{width}}" if i in (0, 8, 9) else f"{cell:>{width}}" for i, (cell, width) in enumerate(zip(cells, _WIDTHS, strict=True))
    )


def _describe(row: Measurement) -> str:
    parts = [f"{value:.1e} (bound {bound:.0e}){note}" for value, bound, note in _over(row)]
    return f"{row.name}: {', '.join(parts)}"


def _over(row: Measurement) -> list[tuple[float, float, str]]:
    pairs = ((row.difference, row.bound, ""), (row.exact, row.exact_bound, " in float64"))
    return [(value, bound, note) for value, bound, note in pairs if value is not None and not value <= bound]


def _plain(row: Measurement) -> dict[str, object]:
    values = dataclasses.asdict(row) | {"passed": row.passed}
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _fact(value: object) -> str:
    return ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
