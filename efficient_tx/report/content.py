"""Content: the tables and the sentences of a report, before they have a form."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from efficient_tx.config import protocols
from efficient_tx.report.budgets import at_equal
from efficient_tx.report.flops import Costs
from efficient_tx.report.published import Published, published
from efficient_tx.report.runs import Method, Problem, Run, counts, differing, labels_of
from efficient_tx.report.statistics import holm, paired, spread
from efficient_tx.tables import Table
from efficient_tx.training import summary

NONE = "—"
UNITS = {
    "steps": "steps",
    "seconds": "seconds of training",
    "flops": "FLOPs of products and solves",
}


@dataclasses.dataclass(frozen=True)
class Section:
    """What a report says of one problem.

    Attributes:
      problem: the problem.
      tables: in order.
      notes: sentences below them.
      facts: label -> words, on data, devices and versions.
    """

    problem: Problem
    tables: Sequence[Table]
    notes: Sequence[str]
    facts: Mapping[str, str]


def score(problem: Problem, value: float) -> str:
    """In percent for an accuracy."""
    return (f"{100 * value:.2f}" if problem.metric == "accuracy" else f"{value:.4f}").replace("-", "−")


def mean_of(problem: Problem, scores: Sequence[float]) -> str:
    """ "48.31 ± 0.42": the mean, and the standard deviation of several seeds."""
    if not scores:
        return NONE
    of = spread(scores)
    return score(problem, of.mean) + (f" ± {score(problem, of.deviation)}" if of.deviation is not None else "")


def interval(problem: Problem, scores: Sequence[float]) -> str:
    if len(scores) < 2:
        return NONE
    of = spread(scores)
    return between(problem, of.low, of.high, least=0.0)


def between(problem: Problem, low: float, high: float, *, least: float) -> str:
    """An interval; of accuracies no lower than the least that there can be, nor above 1."""
    if problem.metric == "accuracy":
        low, high = max(least, low), min(1.0, high)
    return f"{score(problem, low)} to {score(problem, high)}"


def unit(problem: Problem) -> str:
    return f"{problem.metric}, %" if problem.metric == "accuracy" else problem.metric


def figures_of(problem: Problem) -> Published | None:
    """The published figures that may stand beside a problem's."""
    return published(problem.config["protocol"], problem.task) if problem.metric == "accuracy" else None


def overview(problems: Sequence[Problem]) -> Table:
    """Methods × problems: mean test score ± standard deviation, and how many seeds."""
    known = [{method.label: method for method in problem.methods} for problem in problems]

    def cell(problem: Problem, methods: Mapping[str, Method], label: str) -> str:
        scores = methods[label].scores("test") if label in methods else []
        return f"{mean_of(problem, scores)} ({len(scores)})" if scores else NONE

    rows = [[label, *(cell(p, methods, label) for p, methods in zip(problems, known))] for label in labels_of(problems)]
    title = "Test score, mean ± standard deviation (seeds), checkpoint selected on validation"
    return Table(title, ["method|", *(f"{problem.title}: {unit(problem)}" for problem in problems)], rows)


def results(problem: Problem) -> Table:
    """One row for each method, then the answers to beat."""
    figures = figures_of(problem)
    columns = ["method|", f"test {unit(problem)}", "95 % interval", "seeds", "steps", "test, last step", "validation"]
    columns += ["parameters", "steps/s", "peak memory, GB", "tuned over"]
    columns += ["published"] if figures else []
    rows = []
    for method in problem.methods:
        done, test = method.finished, method.scores("test")
        reached = sorted({run.step for run in method.runs})
        unfinished = len(method.runs) - len(done)
        rows.append(
            [
                method.label,
                mean_of(problem, test),
                interval(problem, test),
                str(len(done)) + (f" of {len(method.runs)}" if unfinished else ""),
                " to ".join(dict.fromkeys(f"{step:,}" for step in (reached[0], reached[-1])))
                + (f" of {method.config['steps']:,}" if unfinished else ""),
                mean_of(problem, method.scores("last_test")),
                mean_of(problem, method.scores("val")),
                f"{done[0].figure('parameters'):,}" if done and done[0].figure("parameters") else NONE,
                middle(run.figure("steps_per_second") for run in done),
                middle(gigabytes(run) for run in done),
                f"{method.tuning} runs" if method.tuning else NONE,
            ]
        )
        if figures:
            rows[-1].append(published_cell(figures, method))
    for name, value in problem.baselines.items():
        rows.append([f"{name} (to beat)", score(problem, value), *[NONE] * (len(columns) - 2)])
    return Table(f"Results: {problem.title}", columns, rows)


def published_cell(figures: Published, method: Method) -> str:
    value = figures.ours.get(method.trained)
    return NONE if value is None else f"{value:.2f} (published)"


def gigabytes(run: Run) -> float | None:
    """Peak memory of a run."""
    peak = run.figure("peak_memory_bytes")
    return None if peak is None else peak / 1e9


def middle(values: Any) -> str:
    known = [value for value in values if value is not None]
    return f"{np.median(known):.3g}" if known else NONE


def equal(problem: Problem, flops: Costs) -> list[Table]:
    """Validation scores at equal steps, training time and operations; at equal steps what else is known of the task."""
    made = []
    for what, words in UNITS.items():
        marks, found = at_equal(problem.methods, what, problem.metric, flops)
        # An amount before the first evaluation of every method says nothing.
        known = [i for i in range(len(marks)) if any(cells[i] for cells in found.values())]
        if known:
            rows = [
                [label, *(f"{mean_of(problem, cells[i])} ({len(cells[i])})" if cells[i] else NONE for i in known)]
                for label, cells in found.items()
            ]
            heads = [f"{amount(marks[i], what)} {words}" for i in known]
            title = f"Validation {unit(problem)} (seeds) after equal {words}: {problem.title}"
            table = Table(title, ["method|", *heads], rows)
            made.append(with_what_is_known(problem, table) if what == "steps" else table)
    return made


def with_what_is_known(problem: Problem, scores: Table) -> Table:
    """A table of validation scores, with the published figures in a column, and the answers to beat in rows."""
    columns, rows, count = [*scores.columns], [[*row] for row in scores.rows], len(scores.columns) - 1
    if figures := figures_of(problem):
        steps = protocols.published(problem.config["protocol"], problem.task).get("steps")
        columns.append(f"published, test, after {f'{steps:,}' if steps else 'its own'} steps")
        cells = {method.label: published_cell(figures, method) for method in problem.methods}
        for row in rows:
            row.append(cells[row[0]])
    for name, value in problem.baselines.items():
        beaten = [f"{name} (to beat, test)", *[score(problem, value)] * count]
        rows.append([*beaten, *[NONE] * (len(columns) - len(beaten))])
    return Table(scores.title, columns, rows)


def amount(value: float, what: str) -> str:
    return f"{value:.3g}" if what == "flops" else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def reference(problem: Problem, named: str | None) -> Method:
    """The method that others are compared with: the one that is named, else softmax, else the first."""
    chosen = [method for method in problem.methods if method.label == named]
    plain = [method for method in problem.methods if method.trained == "softmax"]
    return [*chosen, *plain, *problem.methods][0]


def differences(problem: Problem, baseline: str | None) -> tuple[Table | None, list[str]]:
    """Differences of the test scores to those of the baseline, and sentences on what they are or lack."""
    other = reference(problem, baseline)
    answers, lacking = {}, []
    for method in problem.methods:
        saved = [run.predictions() for run in method.finished]
        answers[method.label] = [one for one in saved if usable(one, problem.metric)]
        if len(answers[method.label]) < len(saved):
            lacking.append(method.label)
    notes = []
    if lacking:
        notes.append(
            f"No saved predictions of the best checkpoint, or not of all seeds: {'; '.join(lacking)}. "
            "`python -m efficient_tx.eval --workdir RUNS --save_predictions` writes them; methods "
            "without any are not in the paired comparison."
        )
    mine = answers[other.label]
    compared = [m for m in problem.methods if m is not other and answers[m.label] and mine]
    apart = [m.label for m in compared if not same_items([*answers[m.label], *mine])]
    if apart:
        notes.append(f"Saved predictions are of other test items than those of {other.label}: {'; '.join(apart)}.")
    compared = [method for method in compared if method.label not in apart]
    if not compared:
        return None, notes
    pairs = [[(one[problem.metric], one[f"{problem.metric}_count"]) for one in answers[m.label]] for m in compared]
    against = [(one[problem.metric], one[f"{problem.metric}_count"]) for one in mine]
    found = paired(pairs, against)
    adjusted = holm([difference.p for difference in found])
    rows = []
    for method, pair, difference, p in zip(compared, pairs, found, adjusted):
        apart = between(problem, difference.low, difference.high, least=-1.0)
        seeds = f"{len(pair)} and {len(against)}"
        signed = ("+" if difference.mean >= 0 else "−") + score(problem, abs(difference.mean))
        rows.append([method.label, signed, apart, probability(difference.p), probability(p), seeds])
    title = f"Test {unit(problem)} minus that of {other.label}, on the same {len(against[0][0]):,} items"
    columns = ["method|", "difference", "95 % interval", "p", "p, Holm", "seeds"]
    if min(len(pair) for pair in [*pairs, against]) == 1:
        notes.append(
            "Where a method has one seed, the interval of the difference is that of these runs on other items: it says "
            "nothing of other seeds."
        )
    return Table(f"{title}: {problem.title}", columns, rows), notes


def usable(saved: Mapping[str, np.ndarray] | None, metric: str) -> bool:
    return saved is not None and {metric, f"{metric}_count", "label"} <= saved.keys()


def same_items(saved: Sequence[Mapping[str, np.ndarray]]) -> bool:
    """Whether all have the same labels in the same order."""
    return all(np.array_equal(one["label"], saved[0]["label"]) for one in saved)


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def settings(problem: Problem) -> Table | None:
    """The keys in which the methods differ, and the options of the mixers and structures that each alone has."""
    configs = [method.config for method in problem.methods]
    names = ("mixers", "linear.mlp.name", "linear.projections.name")
    apart = differing(configs, lambda key: counts(key) and key not in names)
    shared = [key for key in apart if all(key in config for config in configs)]
    own = [key for key in apart if key not in shared]
    if not apart:
        return None
    rows = []
    for method in problem.methods:
        mine = [f"{key.split('.', 1)[1]}={method.config[key]}" for key in own if key in method.config]
        rows.append([method.label, *(str(method.config[key]) for key in shared), ", ".join(mine) or NONE])
    columns = ["method|", *(f"{key}|" for key in shared), "options|"]
    return Table(f"In what the configs differ: {problem.title}", columns, rows)


def section(problem: Problem, flops: Costs, baseline: str | None) -> Section:
    """Everything on one problem."""
    paired_table, notes = differences(problem, baseline)
    tables = [results(problem), *equal(problem, flops), paired_table, settings(problem)]
    return Section(problem, [table for table in tables if table], [*reading(problem), *notes], facts(problem))


def reading(problem: Problem) -> list[str]:
    """How to read the tables of a problem."""
    notes = []
    finished = [len(method.finished) for method in problem.methods]
    if 1 in finished:
        notes.append("A method with one seed has no ±: what another seed would give is not known.")
    if max(finished) > 1:
        notes.append("± is the standard deviation over seeds; the interval is that of their mean, by Student's t.")
    if unfinished := [method.label for method in problem.methods if len(method.finished) < len(method.runs)]:
        notes.append(f"Not finished, or not in all seeds: {'; '.join(unfinished)}.")
    if diverged := [
        f"{method.label} ({lost} of {len(method.runs)} seeds)"
        for method in problem.methods
        if (lost := sum(run.diverged for run in method.runs))
    ]:
        notes.append(f"Ended in numbers that are not finite: {'; '.join(diverged)}; scores are of other seeds alone.")
    if longer := [m.label for m in problem.methods if any(run.figure("extended_from") for run in m.finished)]:
        notes.append(f"Extended after their end, so that the learning rate rose again: {'; '.join(longer)}.")
    if shorter := [method.label for method in problem.methods if any(run.shortened for run in method.runs)]:
        notes.append(f"FLOPs are of full-length examples; these were cut, and used fewer: {'; '.join(shorter)}.")
    figures, departures = figures_of(problem), departed(problem)
    if figures:
        notes.append(f"Published figures: {figures.source}" + f" ({figures.note})" * bool(figures.note) + ".")
        if figures.others:
            others = ", ".join(f"{name} {value:.2f}" for name, value in figures.others.items())
            notes.append(f"Published there, and not here: {others}.")
        if departures:
            notes.append(f"They do not compare directly: runs here depart from the protocol in {departures}.")
    if len(said_of(problem, device)) > 1:
        notes.append(f"Speeds and memory are of several devices, {device_list(problem)}: they do not compare.")
    return notes


def device(result: Mapping[str, Any]) -> str:
    of = result.get("device", {})
    return f"{of.get('count', '?')} × {of.get('kind', 'unknown')} ({of.get('platform', 'unknown')})"


def device_list(problem: Problem) -> str:
    return ", ".join(said_of(problem, device))


def said_of(problem: Problem, words: Any) -> list[str]:
    """What `words` says of the summaries of finished runs, each once."""
    return list(dict.fromkeys(words(run.summary) for run in problem.finished))


def departed(problem: Problem) -> str:
    """The keys in which runs depart from their protocol."""
    return ", ".join(sorted({key for method in problem.methods for run in method.runs for key in run.departures}))


def facts(problem: Problem) -> dict[str, str]:
    """What the numbers depend on besides the methods."""
    done = problem.finished
    known = {
        "runs": f"{sum(len(method.runs) for method in problem.methods)}, {len(done) or 'none'} of them finished",
        "protocol": problem.config["protocol"],
        "departures from it": departed(problem) or NONE,
    }
    if not done:
        return known
    return known | {
        "data": "; ".join(said_of(problem, lambda result: str(result.get("source", "unknown")))),
        "device": device_list(problem),
        "memory of": "; ".join(said_of(problem, lambda result: str(result.get("peak_memory_of", NONE)))),
        "versions": "; ".join(
            said_of(problem, lambda r: ", ".join(f"{k} {v}" for k, v in r.get("versions", {}).items()))
        ),
        "commit": "; ".join(said_of(problem, lambda result: str(result.get("commit") or "unknown"))),
        "checkpoints": f"best {problem.metric} on validation, "
        + ("higher" if all(map(summary.higher_is_better, (run.summary for run in done))) else "lower")
        + " is better",
    }
