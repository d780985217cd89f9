"""The report: what stands in its tables, its pictures and its page, and how a browser shows it."""

import csv
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest

from efficient_tx.report.__main__ import command
from efficient_tx.report.plots import pareto
from efficient_tx.training.disk import write_checked
from tests.support.command import here
from tests.support.workdirs import config_of, write_run


def report(*arguments):
    return here(command, *arguments)


@pytest.fixture
def folder(tmp_path):
    """Three methods: two seeds, one seed, and one that is not finished; predictions of two of them."""
    generator = np.random.default_rng(0)
    for seed, test in enumerate((0.5, 0.6)):
        right = generator.random(200) < test
        curve = [(10, 0.2 + 0.1 * seed), (20, 0.5)]
        config = config_of("softmax", seed=seed)
        write_run(tmp_path / f"softmax_seed{seed}", config, test=test, validation=curve, right=right)
    right = generator.random(200) < 0.9
    write_run(tmp_path / "gla_seed0", config_of("gla"), test=0.9, speed=40.0, right=right)
    write_run(tmp_path / "vmean_seed0", config_of("vmean"), test=None, validation=[(10, 0.1)])
    return tmp_path


def rows(out, title):
    """Method -> cells by head, of a table in the output as CSV."""
    tables, head = {}, None
    for row in csv.reader(io.StringIO(out)):
        if row[:1] == ["table"]:
            head = row
        elif row and row[0].startswith(title):
            tables[row[1]] = dict(zip(head[2:], row[2:]))
    return tables


def test_the_tables(folder):
    status, out, error = report(folder, "--format=csv")
    assert (status, error) == (0, "")
    results = rows(out, "Results")
    assert list(results) == ["gla", "softmax", "vmean", "constant (to beat)"]
    assert results["softmax"]["test accuracy, %"] == "55.00 ± 7.07" and results["softmax"]["seeds"] == "2"
    assert results["gla"]["test accuracy, %"] == "90.00" and results["gla"]["95 % interval"] == "—"
    assert results["vmean"]["seeds"] == "0 of 1" and results["vmean"]["steps"] == "10 of 1,500"
    assert results["constant (to beat)"]["test accuracy, %"] == "12.50" and "published" not in results["gla"]
    # Half of the seeds' t interval is 12.706 · 7.071 / √2: more than there is.
    assert results["softmax"]["95 % interval"] == "0.00 to 100.00"
    steps = rows(out, "Validation accuracy, % (seeds) after equal steps")
    assert steps["softmax"]["10 steps"] == "25.00 ± 7.07 (2)" and steps["gla"]["10 steps"] == "25.00 (1)"
    times = rows(out, "Validation accuracy, % (seeds) after equal seconds")
    assert times["gla"]["0.25 seconds of training"] == "25.00 (1)"
    assert rows(out, "Validation accuracy, % (seeds) after equal FLOPs").keys() >= {"gla", "softmax"}
    (difference,) = rows(out, "Test accuracy, % minus that of softmax, on the same 200 items").values()
    saved = [np.load(folder / name / "predictions_test_best.npz")["accuracy"].mean() for name in
             ("gla_seed0", "softmax_seed0", "softmax_seed1")]  # fmt: skip
    assert difference["difference"] == f"+{100 * (saved[0] - np.mean(saved[1:])):.2f}"
    # Seeds of 0.5 and 0.6 leave more open than 200 items: one degree of freedom, and some from the items.
    assert difference["seeds"] == "1 and 2" and 0.01 < float(difference["p"]) < 0.2


def test_the_sentences(folder):
    status, out, error = report(folder, "--format=md", "--baseline=gla")
    assert (status, error) == (0, "")
    assert "A method with one seed has no ±" in out and "Not finished, or not in all seeds: vmean." in out
    assert "| softmax | −" in out and "minus that of gla" in out
    assert "- commit: abc" in out and "- device: 1 × cpu (cpu)" in out and "- versions: jax 1.2.3" in out


def test_published_figures_stand_beside_runs_of_their_protocol_alone(folder):
    config = config_of("skyformer", **{"task.max_len": 512}) | {"protocol": "skyformer"}
    write_run(folder / "published", config, protocol="skyformer", protocol_departures=["steps"])
    # One that is not finished has no answers to beat, until it is evaluated.
    path = write_run(folder / "second", config | {"seed": 1}, test=None)
    (path / "eval_test_best.json").write_text(json.dumps({"baselines": {"root operator": 0.358}}))
    status, out, _ = report(folder, "--format=md")
    assert status == 0
    first, second = re.split(r"\n## ", out)[1:]
    default, other = (first, second) if "protocol default" in first.splitlines()[0] else (second, first)
    assert "published" not in default.lower() and "38.69 (published)" in other
    assert "Published figures: Chen et al. 2021, arXiv 2111.00035, table 1" in other
    assert "| root operator (to beat) | 35.80 |" in other and "root operator" not in default
    assert re.search(r"runs here depart from the protocol in .*model\.features.*, steps", other)
    assert "Informer 32.53" in other


def test_unfinished_runs_stand_beside_published_figures_too(tmp_path):
    """With what they depart in, and what must be beaten, at equal steps."""
    config = config_of("skyformer", **{"task.max_len": 512}) | {"protocol": "skyformer"}
    path = write_run(tmp_path / "one", config, test=None, validation=[(10, 0.2), (20, 0.3)])
    (path / "eval_test_best.json").write_text(json.dumps({"baselines": {"root operator": 0.358}}))
    status, out, error = report(tmp_path, "--format=csv")
    assert (status, error) == (0, "")
    steps = rows(out, "Validation accuracy, % (seeds) after equal steps")
    assert steps["skyformer"]["20 steps"] == "30.00 (1)"
    assert steps["skyformer"]["published, test, after 50,000 steps"] == "38.69 (published)"
    assert list(steps["root operator (to beat, test)"].values()) == ["35.80", "35.80", "—"]
    _, words, _ = report(tmp_path, "--format=md")
    assert "- departures from it: " in words and ", steps, task.drop_brackets" in words
    assert "- runs: 1, none of them finished" in words


def test_that_cut_examples_cost_less_is_told(folder):
    write_run(folder / "cut", config_of("pool", lengths=4))
    _, out, _ = report(folder, "--format=md")
    assert "- FLOPs are of full-length examples; these were cut, and used fewer: pool." in out


def test_seeds_that_diverged_are_told(folder):
    """A mean of those that did not is a better score than the method has."""
    path = write_run(folder / "lost", config_of("gla", seed=7), test=None)
    write_checked(path / "diverged.json", {"reason": "the loss of step 21 is nan"})
    _, out, _ = report(folder, "--format=md")
    assert re.search(r"- Ended in numbers that are not finite: gla \(1 of \d seeds\); scores are of other seeds", out)


def test_departures_from_the_configs_own_settings_are_told(folder):
    write_run(folder / "other", config_of("pool"), protocol_departures=["steps", "batch_size"])
    _, out, _ = report(folder, "--format=md")
    assert "departures from it: batch_size, steps" in out and "depart from the protocol" not in out


def test_a_method_whose_operations_are_unknown_is_named(folder, monkeypatch):
    monkeypatch.setattr("efficient_tx.report.__main__.of_steps", lambda config: None)
    status, out, error = report(folder, "--format=md")
    assert status == 0 and "after equal FLOPs" not in out
    assert "gla: operations are not counted: its program has loops of unknown length" in error


def test_predictions_on_other_items_are_not_compared(folder):
    file = folder / "gla_seed0" / "predictions_test_best.npz"
    with np.load(file) as saved:
        other = dict(saved) | {"label": saved["label"][::-1]}
    np.savez(file, **other)
    status, out, _ = report(folder, "--format=md")
    assert status == 0 and "minus that of" not in out
    assert "Saved predictions are of other test items than those of softmax: gla." in out


def test_predictions_of_a_checkpoint_that_is_no_longer_the_best_are_not_compared(folder):
    file = folder / "gla_seed0" / "predictions_test_best.npz"
    with np.load(file) as saved:
        other = dict(saved) | {"step": 10}
    np.savez(file, **other)
    status, out, _ = report(folder, "--format=md")
    assert status == 0 and "minus that of" not in out
    assert "No saved predictions of the best checkpoint, or not of all seeds: gla" in out


def test_without_the_named_baseline_it_is_softmax_whatever_is_set(tmp_path):
    """Of a problem that does not have it, and where a setting is in every label."""
    right = np.arange(50) % 2 == 0
    write_run(tmp_path / "pool", config_of("pool"), test=0.9, right=right)
    for dropout, test in ((0.0, 0.5), (0.3, 0.4)):
        config = config_of("softmax", **{"model.dropout": dropout})
        write_run(tmp_path / f"softmax{dropout}", config, test=test, right=right)
    write_run(tmp_path / "gla", config_of("gla", **{"task.min_len": 9}), right=right)
    for arguments in ((), ("--baseline=gla",)):
        status, out, error = report(tmp_path, "--format=md", *arguments)
        assert status == 0 and "minus that of softmax, dropout=0.0," in out, error


class Page(HTMLParser):
    """What a page would load, and whether its tags are closed in order."""

    def __init__(self):
        super().__init__()
        self.loaded, self.open, self.ids = [], [], []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "src" or (name.endswith("href") and not value.startswith("#")):
                self.loaded.append(value)
            if name == "id":
                self.ids.append(value)
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(folder):
    status, out, error = report(folder, f"--out={folder / 'page.html'}")
    assert (status, error) == (0, "") and out == f"wrote {folder}/page.csv\nwrote {folder}/page.html\n"
    text = (folder / "page.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and page.loaded == [] and "@import" not in text and "<script" not in text
    assert len(page.ids) == len(set(page.ids)), "pictures share ids"
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 4
    for picture in pictures:
        words = " ".join(ElementTree.fromstring(picture).itertext())
        assert "softmax" in words and "gla" in words
    before = text
    report(folder, f"--out={folder / 'page.html'}")
    assert (folder / "page.html").read_text() == before


def test_tex(folder):
    status, _, _ = report(folder, f"--out={folder / 'page.tex'}")
    text = (folder / "page.tex").read_text()
    assert status == 0 and text.count("\\begin{tabular}") == text.count("\\end{tabular}") > 4
    assert "test accuracy, \\%" in text and "55.00 $\\pm$ 7.07" in text and "_" not in re.sub(r"\\_", "", text)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["FOLDER/none"], "FOLDER/none is no folder: name one that holds runs"),
        (["FOLDER/empty"], "FOLDER/empty: there are no runs to compare"),
        (
            ["FOLDER", "--baseline=softmx"],
            "--baseline=softmx: the methods are gla; softmax; vmean (nearest: 'softmax')",
        ),
        (["FOLDER", "--format=pdf"], "argument --format: invalid choice: 'pdf'"),
        (["FOLDER", "--base=x"], "--base=x is no flag: the nearest is --baseline"),
        (["FOLDER", "--out=FOLDER/page.pdf"], "--out=FOLDER/page.pdf: end it in .html, .md, .csv, .tex"),
        (["FOLDER", "--out=FOLDER/x.csv", "--format=html"], "--out=FOLDER/x.csv and --format=html: leave out one of"),
        (["FOLDER/damaged"], "FOLDER/damaged/sweep.json is damaged, and which of its runs only chose settings is not"),
        (["FOLDER", "--out=FOLDER/none/page.html"], "--out=FOLDER/none/page.html: there is no folder FOLDER/none"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, line):
    (folder / "empty").mkdir()
    write_run(folder / "damaged" / "tuned", config_of("softmax"))
    (folder / "damaged" / "sweep.json").write_text("broken")
    status, out, error = report(*(argument.replace("FOLDER", str(folder)) for argument in arguments))
    assert (status, out, error.count("\n")) == (2, "", 1) and line.replace("FOLDER", str(folder)) in error


@pytest.mark.quick
def test_the_pareto_front():
    points = [(1, 1), (2, 0.5), (0.5, 0.9), (2, 0.4), (1, 1)]
    assert pareto(points) == [True, True, False, False, True]


def test_runs_of_older_versions_have_less_to_say(folder):
    """And a run of another metric, a folder without evaluations, and a file where a folder would be, do no harm."""
    lacking = dict.fromkeys(("steps_per_second", "peak_memory_bytes", "parameters", "device", "versions"))
    path = write_run(folder / "old", config_of("vmean", seed=1), test=0.25)
    about = {key: x for key, x in json.loads((path / "summary.json").read_text()).items() if key not in lacking}
    (path / "crc32.json").unlink()
    (path / "summary.json").write_text(json.dumps({**about, "steps_per_second": None}))
    write_run(folder / "empty", config_of("pool"), test=None, validation=[])
    (folder / "stray").write_text("x")
    (folder / "gla_seed0" / "predictions_test_best.npz").write_bytes(b"PK\x03\x04 nonsense")
    status, _, error = report(folder, f"--out={folder / 'page.html'}")
    assert (status, error) == (0, "")
    found = rows((folder / "page.csv").read_text(), "Results")
    assert found["vmean"]["test accuracy, %"] == "25.00" and found["vmean"]["parameters"] == "—"
    assert found["pool"]["seeds"] == "0 of 1" and found["pool"]["steps"] == "0 of 1,500"


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Asks the page, when it is laid out, for its width and that of the window.
ASK = "<script>onload = () => document.title = [document.documentElement.scrollWidth, innerWidth].join(' ')</script>"


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium")
@pytest.mark.parametrize("width", [1400, 400])
def test_a_browser_shows_it_without_sideways_scrolling(folder, width):
    report(folder, f"--out={folder / 'page.html'}")
    page, picture = folder / "asked.html", folder / "page.png"
    page.write_text((folder / "page.html").read_text().replace("</body>", ASK + "</body>"))
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'browser'}",
    ]
    run = [BROWSER, *flags, f"--window-size={width},3000"]
    asked = subprocess.run([*run, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    whole, window = map(int, re.search(r"<title>(\d+) (\d+)</title>", asked.stdout).groups())
    assert whole <= window
    subprocess.run([*run, f"--screenshot={picture}", page.as_uri()], capture_output=True, timeout=120, check=True)
    import matplotlib.image

    pixels = matplotlib.image.imread(picture)
    assert pixels.shape[1] == width and 0.01 < (pixels[..., :3].min(-1) < 0.5).mean() < 0.3  # neither blank nor black


SWEEP = {
    "runs": {"tuned": {"purpose": "tune"}},
    "chosen": {"softmax": {"settings": {"optimizer.learning_rate": "0.001"}}},
}


def test_a_sweeps_tuning_is_told(folder):
    write_run(folder / "tuned", config_of("softmax", **{"optimizer.learning_rate": 0.1}))
    (folder / "sweep.json").write_text(json.dumps(SWEEP))
    status, out, _ = report(folder, "--format=csv")
    assert status == 0 and rows(out, "Results")["softmax"]["tuned over"] == "1 runs"
