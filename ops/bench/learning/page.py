"""The study as one HTML file. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from statistics import median
from string import Template

from ops.bench.learning.charts import base_chart, domains_chart, question_chart, shifts_chart
from ops.bench.learning.learning_figures import LEVELS, SeedInterval, median_reached
from ops.bench.learning.study import Study, VariantComparison, VariantRuns
from ops.report.page import STYLE
from schemas.build_info import code_revision
from trainer.replay.learning_curve import CURVE_WINDOW

_TEMPLATE = Path(__file__).with_name("page.html")


def render_page(study: Study) -> str:
    """The whole page."""
    mixed, ordered = study.find("base", "mixed"), study.find("base", "ordered")
    assert mixed is not None, "every plan holds the base"
    comparisons = [found for runs in study.runs if (found := study.compare(runs)) is not None]
    machine = "{processor}, {threads} thread, torch {torch}.".format_map(study.session.machine)
    return Template(_TEMPLATE.read_text()).substitute(
        style=STYLE,
        subtitle=escape(_subtitle(study, mixed)),
        headline="".join(_figure(value, name) for value, name in _headline(mixed, ordered)),
        over=f"{CURVE_WINDOW:,}",
        base=base_chart(mixed),
        domains=domains_chart(mixed),
        shifts=shifts_chart(ordered.seeds[0] if ordered else None),
        shift_rows=_shift_rows(ordered) or '<tr><td colspan="7">no ordered stream was run</td></tr>',
        verdict=escape(verdict(comparisons)),
        variants="".join(_variant_row(r, study.compare(r)) for r in study.runs),
        questions="".join(_question(name, runs) for name, runs in questions(study).items()),
        machine=escape(machine),
    )


def verdict(comparisons: Sequence[VariantComparison]) -> str:
    """Which variants differ from what they are compared with by more than chance, in words."""
    if not comparisons:
        return "Nothing was compared."
    if all(comparison.overall.low is None for comparison in comparisons):
        return "One seed cannot tell a difference from chance; take two or more."
    better = [c for c in comparisons if c.overall.is_clear and c.overall.mean > 0]
    worse = [c for c in comparisons if c.overall.is_clear and c.overall.mean < 0]
    unclear = len(comparisons) - len(better) - len(worse)
    sentences = []
    for word, found in (("higher", better), ("lower", worse)):
        if found:
            names = ", ".join(_versus(comparison) for comparison in found)
            sentences.append(f"Over the whole stream the accepted tokens per step is clearly {word} with {names}.")
    if unclear == 1:
        sentences.append("One comparison could be chance: its interval holds zero.")
    elif unclear:
        sentences.append(f"{unclear} comparisons could be chance: their intervals hold zero.")
    return " ".join(sentences)


def questions(study: Study) -> dict[str, list[VariantRuns]]:
    """Variants on the mixed stream by what they help to decide, below the base where that is their measure."""
    mixed = [r for r in study.runs if r.order == "mixed"]
    found: dict[str, list[VariantRuns]] = {}
    for r in mixed:
        if r.variant.name == "base":
            continue
        beside = [study.find("base", "mixed")] if r.variant.against == "base" else []
        found.setdefault(r.variant.question, [b for b in beside if b is not None]).append(r)
    return found


def _subtitle(study: Study, mixed: VariantRuns) -> str:
    seeds = "one seed" if len(mixed.seeds) == 1 else f"{len(mixed.seeds)} seeds"
    return (
        f"{len(study.traffic.requests):,} recorded requests of four domains, {study.traffic.tokens:,} tokens, "
        f"replayed offline; {seeds}; code {code_revision()[:12]}."
    )


def _headline(mixed: VariantRuns, ordered: VariantRuns | None) -> list[tuple[str, str]]:
    found = [
        (
            _tokens(median_reached(mixed.tokens_to(level))),
            f"tokens of mixed traffic to accepted tokens per step {level:g}",
        )
        for level in LEVELS
    ]
    found.append((f"{median(mixed.final):.2f}", "accepted tokens per step at the end of the mixed stream"))
    if ordered:
        ratio = f"{median(ordered.over_static):.2f} : 1"
        found.append((ratio, "tokens a verify step, against a draft that was frozen after the first domain"))
    return found


def _shift_rows(ordered: VariantRuns | None) -> str:
    rows = []
    for learned, shifts in zip(ordered.seeds, ordered.shifts, strict=True) if ordered else ():
        for shift in shifts:
            cells = (
                *(f"{shift.before:.2f}", f"{shift.after:.2f}"),
                *(_tokens(shift.recovered_after), _tokens(shift.settled_after), f"{shift.over_static:.2f}"),
            )
            rows.append(f"<tr><td>{learned.seed}</td><td>{escape(shift.domain)}</td>{_numbers(cells)}</tr>")
    return "".join(rows)


def _variant_row(runs: VariantRuns, comparison: VariantComparison | None) -> str:
    variant = runs.variant
    reached = _tokens(median_reached(runs.tokens_to(1.0)))
    cells = f"{median(runs.overall):.3f}", f"{median(runs.final):.3f}", reached
    differences = [comparison.overall, comparison.final] if comparison else []
    told = "".join(_difference(difference) for difference in differences) or '<td class="number">-</td>' * 2
    return (
        f"<tr><td>{escape(variant.name)}</td><td>{runs.order}</td>{_numbers(cells)}"
        f"<td>{escape(variant.against) if comparison else '-'}</td>{told}"
        f"{_numbers([f'{median(result.training_tokens_per_s for result in runs.seeds):.0f}'])}</tr>"
    )


def _difference(difference: SeedInterval) -> str:
    text = f"{difference.mean:+.3f}"
    if difference.low is not None and difference.high is not None:
        text += f" [{difference.low:+.3f}, {difference.high:+.3f}]"
    text = text.replace("-", "\N{MINUS SIGN}")
    return f'<td class="number" style="white-space:nowrap">{f"<b>{text}</b>" if difference.is_clear else text}</td>'


def _question(name: str, runs: Sequence[VariantRuns]) -> str:
    return f"<h2>{escape(name[0].upper() + name[1:])}</h2>{question_chart(name, runs)}"


def _versus(comparison: VariantComparison) -> str:
    variant, mean = comparison.runs.variant, comparison.overall.mean
    beside = "" if variant.against == "base" else f" against {variant.against}"
    return f"{variant.name}{beside} ({mean:+.2f}, {comparison.runs.order})"


def _figure(value: str, name: str) -> str:
    return f'<div class="figure"><b>{escape(value)}</b><span>{escape(name)}</span></div>'


def _numbers(cells: Iterable[str]) -> str:
    return "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)


def _tokens(value: float | None) -> str:
    return "not reached" if value is None else f"{value:,.0f}"
