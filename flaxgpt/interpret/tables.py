"""The parts of a report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest

from rich.console import Console
from rich.table import Table

from flaxgpt.interpret.report import RAISE, Candidate, Draws, LayerPrediction, Place, Promotion, Report, Step, Words


def show(report: Report, *, every_position: bool) -> None:
    """Print a report, its predictions at every position or only at its own."""
    console = _console()
    place = report.places[report.position]
    at = f"after token {report.position} ({place.token})"
    console.print(f"{report.model}: logits {report.shape} of tokens and vocabulary; surprise and entropy in nats\n")
    console.print(text_table(report.places))
    console.print("\nlikeliest next tokens")
    console.print(prediction_table(report.places if every_position else [place]))
    if report.tokens:
        console.print(f"tokens asked for, {at}", candidate_table(report.tokens), "", sep="\n")
    if report.lens:
        console.print(f"what each layer predicts {at}", lens_table(report.lens[report.position]), "", sep="\n")
    if report.draws:
        console.print(f"draws {at}", draws_table(report.draws), "", sep="\n")
    if report.steps:
        console.print("token by token, from the end of the text", step_table(report.steps), sep="\n")
    if report.promotion:
        same = "bit for bit" if report.promotion.identical else "NOT bit for bit"
        raised = f"{report.promotion.token.token}, rank {report.promotion.token.rank:,}, raised to the largest logit + {RAISE}"
        console.print(f"{raised}, {at}", promotion_table(report.promotion), f"taken away, all logits are {same} what they were", sep="\n")


def show_words(words: Words) -> None:
    """Print a vocabulary given by hand."""
    _console().print(words_table(words), f"\nargmax: {words.argmax}", sep="\n")


def text_table(places: Iterable[Place]) -> Table:
    """A line for each token of the text."""
    table = _table("position", "token", "surprise", "entropy", "next", "rank", "probability", left=("token", "next"))
    for place in places:
        surprise = "-" if place.surprise is None else f"{place.surprise:.3f}"
        following = (place.next.token, f"{place.next.rank:,}", probability(place.next.probability)) if place.next else ("", "-", "-")
        table.add_row(f"{place.position}", place.token, surprise, f"{place.entropy:.3f}", *following)
    return table


def prediction_table(places: Iterable[Place]) -> Table:
    """The likeliest next tokens at each of these places."""
    table = _table("position", "after", "rank", "token", "logit", "probability", "", left=("after", "token", ""))
    for place in places:
        heading = f"{place.position}", place.token
        for row in place.top:
            true = "comes next" if place.next and row.id == place.next.id else ""
            cells = f"{row.rank:,}", row.token, logit(row.logit), probability(row.probability), true
            table.add_row(*heading, *cells, style="bold" if true else None)
            heading = "", ""
        table.add_row()
    return table


def candidate_table(rows: Iterable[Candidate]) -> Table:
    """A line for each token."""
    table = _table("token", "id", "logit", "rank", "probability", left=("token",))
    for row in rows:
        table.add_row(row.token, f"{row.id}", logit(row.logit), f"{row.rank:,}", probability(row.probability))
    return table


def draws_table(draws: Draws) -> Table:
    """Tokens in the order in which they were drawn, in two ways."""
    table = _table(
        "draw", "without replacement", "probability", "with replacement", "probability", left=("without replacement", "with replacement")
    )
    for i, pair in enumerate(zip_longest(draws.without_replacement, draws.with_replacement), start=1):
        table.add_row(f"{i}", *(cell for row in pair for cell in ((row.token, probability(row.probability)) if row else ("", ""))))
    return table


def step_table(steps: Iterable[Step]) -> Table:
    """The likeliest tokens of each step, and which was chosen."""
    table = _table("step", "token", "probability", "", left=("token", ""))
    for i, step in enumerate(steps, start=1):
        heading = f"{i}"
        outside = [] if any(row.id == step.chosen.id for row in step.top) else [step.chosen]
        for row in [*step.top, *outside]:
            mark = "chosen" if row.id == step.chosen.id else ""
            table.add_row(heading, row.token, probability(row.probability), mark, style="bold" if mark else None)
            heading = ""
        table.add_row()
    return table


def lens_table(layers: Iterable[LayerPrediction]) -> Table:
    """A line for each layer, at one position; rank and probability are those of the true next token."""
    table = _table("blocks", "likeliest next tokens", "rank", "probability", left=("likeliest next tokens",))
    for layer in layers:
        top = "  ".join(f"{choice.token} {probability(choice.probability)}" for choice in layer.top)
        truth = ("-", "-") if layer.next_rank is None else (f"{layer.next_rank:,}", probability(layer.next_probability))
        table.add_row(f"{layer.layer}", top, *truth)
    return table


def promotion_table(promotion: Promotion) -> Table:
    """The likeliest tokens before, with and after the intervention, side by side."""
    names = "before", "promoted", "taken away"
    table = _table(*(heading for name in names for heading in (name, "probability")), left=names)
    for row in zip(promotion.before, promotion.promoted, promotion.after, strict=True):
        table.add_row(*(cell for candidate in row for cell in (candidate.token, probability(candidate.probability))))
    return table


def words_table(words: Words) -> Table:
    """A line for each word of a vocabulary."""
    at = [f"at {temperature:g}" for temperature in words.temperatures]
    table = _table("id", "word", "logit", *at, "left", "probability", f"of {words.count:,} draws", left=("word",))
    for word in words.words:
        left = logit(word.left_logit), probability(word.left_probability), f"{word.draws:,}"
        table.add_row(f"{word.id}", word.word, logit(word.logit), *map(probability, word.probabilities), *left)
    return table


def logit(value: float | None) -> str:
    """To two places; None is -inf."""
    return "-inf" if value is None else f"{value:.2f}"


def probability(value: float) -> str:
    """To four places, or two digits where that would be 0."""
    return f"{value:.4f}" if value >= 5e-5 or value == 0 else f"{value:.1e}"


def _console() -> Console:
    """Prints labels as they are, whatever brackets and colons are in them."""
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def _table(*headings: str, left: Iterable[str]) -> Table:
    """Without lines; columns are right-justified but for those of these headings."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", overflow="fold")
    return table
