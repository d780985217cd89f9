"""The report as one HTML file, with its pictures inside: it needs no network."""

import html
import re
from collections.abc import Mapping, Sequence

from efficient_tx.report.content import Section
from efficient_tx.tables import Table, to_html

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 88rem; margin: 0 auto;
  padding: 1rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 1rem 0 .5rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .5rem; border-top: 2px solid #1a1a1a; padding-top: .75rem; }
nav ul, ul.notes { padding-left: 1.2rem; }
ul.notes { color: #333; max-width: 52rem; }
h3 { font-size: .95rem; margin: 1.75rem 0 .25rem; }
.wide { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: .875rem; }
th, td { padding: .3rem .65rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #1a1a1a; vertical-align: bottom; white-space: normal; min-width: 5.5rem; }
th.left, td.left { text-align: left; }
td:first-child, th:first-child { position: sticky; left: 0; background: #fff; white-space: normal; min-width: 9.5rem;
  max-width: 16rem; overflow-wrap: break-word; }
td:last-child.left { white-space: normal; min-width: 16rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; overflow-x: auto; }
figure svg { width: 100%; max-width: 46rem; height: auto; display: block; }
figcaption { font-size: .875rem; color: #333; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .875rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .4rem; } }
@media print { .wide, figure { overflow: visible; } }
"""


def page(title: str, overview: Table, sections: Sequence[Section], pictures: Sequence[Mapping[str, str]]) -> str:
    """The whole page. `pictures` has for each section caption -> SVG."""
    links = "".join(
        f'<li><a href="#problem-{i}">{html.escape(section.problem.title)}</a></li>'
        for i, section in enumerate(sections)
    )  # fmt: skip
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{html.escape(title)}</h1>",
        f"<nav><ul>{links}</ul></nav>" if len(sections) > 1 else "",
        to_html(overview),
        *(one(i, section, drawn) for i, (section, drawn) in enumerate(zip(sections, pictures))),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def coded(text: str) -> str:
    """HTML of a sentence, with what stands between backticks as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", html.escape(text))


def one(index: int, section: Section, pictures: Mapping[str, str]) -> str:
    """The part of a section."""
    # The heading above them names the problem.
    first, *others = [
        table._replace(title=table.title.removesuffix(f": {section.problem.title}")) for table in section.tables
    ]
    figures = "\n".join(
        f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>" for caption, svg in pictures.items()
    )
    notes = "".join(f"<li>{coded(note)}</li>" for note in section.notes)
    facts = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in section.facts.items())
    return "\n".join(
        [
            f'<h2 id="problem-{index}">{html.escape(section.problem.title)}</h2>',
            to_html(first),
            f'<ul class="notes">{notes}</ul>' if notes else "",
            f'<div class="pictures">{figures}</div>',
            *map(to_html, others),
            f"<dl>{facts}</dl>",
        ]
    )
