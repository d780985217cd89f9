"""Which runs are compared: seeds of one method, methods of one problem, and nothing else together."""

import itertools
import json

import numpy as np
import pytest

from efficient_tx.report.budgets import at_equal
from efficient_tx.report.content import reference
from efficient_tx.report.published import published
from efficient_tx.report.runs import find, problems
from efficient_tx.training.disk import write_checked
from efficient_tx.training.history import checksum
from tests.support import ROOT
from tests.support.workdirs import config_of, write_run


@pytest.fixture
def grouped(tmp_path):
    """Writes runs below the folder, and returns its problems and the warnings."""

    def group(*runs, tuned=(), by_name=False):
        for index, (config, about) in enumerate(runs):
            write_run(tmp_path / f"run{index}", config, **about)
        if tuned:
            purposes = {f"run{index}": {"purpose": "tune" if index in tuned else "run"} for index in range(len(runs))}
            chosen = {"a cell": {"settings": {"optimizer.learning_rate": "0.5"}}}
            (tmp_path / "sweep.json").write_text(json.dumps({"runs": purposes, "chosen": chosen}))
        lines = []
        folders = sorted(tmp_path.glob("run*")) if by_name else [tmp_path]
        return problems(find(folders, lines.append), lines.append), lines

    return group


def test_seeds_are_runs_of_a_method(grouped):
    ((problem,), lines) = grouped(
        (config_of("softmax"), {"test": 0.25}),
        (config_of("gla", seed=1), {"test": 0.75}),
        (config_of("softmax", seed=1, log_every=7, grad_accum=2), {"test": 0.5}),
        (config_of("softmax+monarch"), {"test": None}),
    )
    assert lines == [] and problem.title == "listops, generated, seed 0, protocol default"
    # Best first, unfinished ones last.
    assert [(method.label, method.scores("test")) for method in problem.methods] == [
        ("gla", [0.75]),
        ("softmax", [0.25, 0.5]),
        ("softmax+monarch", []),
    ]
    assert problem.baselines == {"constant": 0.125} and problem.metric == "accuracy" and problem.higher_is_better


def test_methods_of_the_same_mixer_are_told_apart_by_what_differs(grouped):
    rates = [{"optimizer.learning_rate": rate} for rate in (1e-3, 1e-2)]
    ((problem,), _) = grouped(*((config_of("softmax", **rate), {}) for rate in rates), (config_of("gla"), {}))
    assert [m.label for m in problem.methods] == ["gla", "softmax, learning_rate=0.001", "softmax, learning_rate=0.01"]


def test_other_protocols_and_data_are_other_problems(grouped):
    found, _ = grouped(
        (config_of("softmax"), {}),
        (config_of("softmax") | {"protocol": "skyformer"}, {}),
        (config_of("softmax", **{"task.source": "/somewhere"}), {"source": "files in /somewhere"}),
        (config_of("softmax", **{"task.min_len": 9}), {}),
    )
    assert [problem.title for problem in found] == [
        "listops, generated, seed 0, protocol default (min_len 8, source generated)",
        "listops, generated, seed 0, protocol skyformer (min_len 8, source generated)",
        "listops, files in /somewhere, protocol default (min_len 8, source /somewhere)",
        "listops, generated, seed 0, protocol default (min_len 9, source generated)",
    ]


@pytest.mark.parametrize("by_name", [False, True], ids=["the sweep's folder", "its runs"])
def test_tuning_counts_as_a_budget_and_not_as_results(grouped, by_name):
    config = config_of("softmax")
    other = config_of("softmax", **{"optimizer.learning_rate": 0.5})
    ((problem,), _) = grouped(
        (config, {"test": 0.9}), (other, {"test": 0.9}), (config | {"seed": 1}, {"test": 0.5}), tuned=(0, 1),
        by_name=by_name,
    )  # fmt: skip
    ((method,), scores) = problem.methods, problem.methods[0].scores("test")
    assert (method.label, method.tuning, scores) == ("softmax", 2, [0.5])


def test_each_setting_has_the_tuning_of_its_own(grouped):
    """Two values of a key that is compared, two of one that is tuned: each method had two tries, not four."""
    settings = [{"model.dropout": drop, "optimizer.learning_rate": rate} for drop in (0.0, 0.1) for rate in (0.1, 0.5)]
    tried = [(config_of("softmax", **one), {}) for one in settings]
    final = [(config_of("softmax", seed=1, **one), {}) for one in settings[1::2]]
    ((problem,), _) = grouped(*tried, *final, tuned=range(4))
    assert [(m.label, m.tuning) for m in problem.methods] == [("softmax, dropout=0.0", 2), ("softmax, dropout=0.1", 2)]


RATE = "optimizer.learning_rate"


def swept(folder, rates, *, chosen):
    """(folder name, config, purpose, cell) of runs and of what tuning chose, as a sweep records them."""
    runs = {}
    for name, rate, seed, purpose, cell in rates:
        write_run(folder / name, config_of("vmean", seed=seed, **{RATE: float(rate)}), test=0.1 * seed)
        runs[name] = {"settings": {RATE: rate}, "seed": seed, "purpose": purpose, "cell": cell}
    (folder / "sweep.json").write_text(json.dumps({"runs": runs, "chosen": {"vmean": {"settings": {RATE: chosen}}}}))
    lines = []
    return problems(find([folder], lines.append), lines.append), lines


def test_a_setting_that_was_compared_is_no_setting_that_was_tuned(tmp_path):
    tried = [(f"t{rate}", rate, 0, "tune", "vmean") for rate in ("0.1", "0.2", "0.3")]
    final = [("a", "0.1", 1, "run", "vmean"), ("b", "0.5", 1, "run", f"vmean, {RATE}=0.5")]
    ((problem,), lines) = swept(tmp_path, [*tried, *final], chosen="0.1")
    assert {method.label: method.tuning for method in problem.methods} == {
        "vmean, learning_rate=0.1": 3,
        "vmean, learning_rate=0.5": 0,
    }
    assert lines == []


def test_what_tuning_has_given_up_is_no_result(tmp_path):
    """Tried over more values it chose another one: the results of the first must not stand beside, sorted by score."""
    tried = [(f"t{rate}", rate, 0, "tune", "vmean") for rate in ("0.1", "0.2")]
    final = [("old", "0.1", 5, "run", "vmean"), ("new", "0.2", 1, "run", "vmean")]
    ((problem,), lines) = swept(tmp_path, [*tried, *final], chosen="0.2")
    ((method,), (line,)) = problem.methods, lines
    assert (method.label, method.tuning, method.scores("test")) == ("vmean", 2, [0.1])
    assert line == f"{tmp_path}/old: tuning over more values has chosen {RATE}=0.2 since: it is left out"


def test_data_of_other_sources_are_other_problems_wherever_they_lie(grouped):
    config = config_of("softmax", **{"task.source": "/somewhere"})
    found, _ = grouped(
        (config, {"source": "files in /a/listops, 90 rows"}),
        (config | {"seed": 1}, {"source": "files in ~/b/listops, 90 rows"}),
        (config | {"seed": 2}, {"source": "files in /a/listops, 80 rows"}),
        (config | {"seed": 3}, {"test": None}),
    )
    assert [len(method.runs) for problem in found for method in problem.methods] == [3, 1]


def test_a_copy_of_a_run_is_no_further_seed(grouped):
    ((problem,), lines) = grouped((config_of("softmax"), {}), (config_of("softmax"), {}))
    assert len(problem.methods[0].runs) == 1 and "run1 has the config and the seed of" in lines[0]


def test_what_is_damaged_is_named_and_left_out(grouped, tmp_path):
    write_run(tmp_path / "a", config_of("softmax"))
    (tmp_path / "a" / "config.json").write_text("{}")
    write_run(tmp_path / "b", config_of("softmax"))
    (tmp_path / "b" / "summary.json").write_text("{}")
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write("nonsense\n")
    ((problem,), lines) = grouped((config_of("softmax", seed=1), {}))
    assert len(problem.methods[0].runs) == 2 and len(problem.methods[0].finished) == 1
    assert [line.replace(str(tmp_path), "") for line in sorted(lines)] == [
        "/a/config.json is damaged (its CRC-32 differs from that in crc32.json): restore it, or use a new folder; "
        "it is left out",
        "/b/metrics.jsonl: line 5 is damaged (no metric line), and left out",
        "/b/summary.json is damaged (its CRC-32 differs from that in crc32.json): the run counts as unfinished",
    ]


def test_a_metrics_file_that_was_cut_shortens_no_table(grouped, tmp_path):
    """Its lines come from the checkpoints; without any the run has no curve, and says so."""
    config = config_of("softmax") | {"steps": 20}
    for name in ("a", "b"):
        path = write_run(tmp_path / name, config | {"seed": 1 + (name == "b")})
        texts = (path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        for folder in [path] + [path / "checkpoints" / "20"] * (name == "a"):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "metrics.jsonl").write_bytes(b"".join(texts))
            (folder / "metrics.crc32").write_bytes(b"".join(map(checksum, texts)))
        (path / "metrics.jsonl").write_bytes(b"".join(texts[:2]))
    ((problem,), lines) = grouped((config, {}))
    assert [line.replace(str(tmp_path), "") for line in sorted(lines)] == [
        "/a/metrics.jsonl: 2 at its end are missing; 2 come from the copies in its checkpoints",
        "/b/metrics.jsonl ends before step 20: the run is in no curve and in no table at equal amounts",
    ]
    marks, found = at_equal(problem.methods, "steps", "accuracy", {})
    assert marks == [5, 10, 20] and found == {"softmax": [[], [0.25] * 2, [0.5] * 2]}
    assert len(problem.methods[0].scores("test")) == 3


def test_compressed_runs_are_named_by_what_made_them(tmp_path):
    """Not by the dozens of keys of their layers; results of one method that differ are told apart by their folders."""
    write_run(tmp_path / "dense", config_of("softmax"), test=0.3)
    for name, rank, method in (("x", 2, "svd"), ("y", 3, "svd"), ("z", 1, None)):
        layer = {"name": "low_rank", "rank": rank}
        config = config_of("softmax") | {"steps": 0, "structure": {"encoder.blocks.0.mlp.up": layer}}
        path = write_run(tmp_path / name, config, validation=[(0, 0.4)], test=0.4)
        if method:
            asked = {"method": method, "budget": 0.5, "unit": "bytes"}
            write_checked(path / "compression.json", {"asked": asked})
    lines = []
    (problem,) = problems(find([tmp_path], lines.append), lines.append)
    assert lines == [] and sorted(method.label for method in problem.methods) == [
        "softmax, compressed, steps=0",
        "softmax, steps=1500",
        f"softmax, svd to 0.5 of bytes, steps=0 ({tmp_path}/x)",
        f"softmax, svd to 0.5 of bytes, steps=0 ({tmp_path}/y)",
    ]
    # Whatever the scores, others are compared with the dense one, and published figures are of such models.
    assert reference(problem, None).label == "softmax, steps=1500"
    assert {method.label for method in problem.methods if method.trained} == {"softmax, steps=1500"}
    # One that was not trained leaves the amounts of the others as they are.
    marks, found = at_equal(problem.methods, "steps", "accuracy", {})
    assert marks == [5, 10, 20] and found["softmax, steps=1500"] == [[], [0.25], [0.5]]


@pytest.mark.quick
def test_no_damage_of_saved_predictions_is_an_error(tmp_path):
    """At every byte that is not their content, and at some of that."""
    path = write_run(tmp_path / "a", config_of("vmean"), right=np.arange(40) % 2 == 0)
    file, lines = path / "predictions_test_best.npz", []
    (run,) = find([path], lines.append)
    whole = file.read_bytes()
    assert run.predictions() is not None
    read = 0
    for place, bit in itertools.product(range(0, len(whole), 3), (0, 3, 6)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        file.write_bytes(flipped)
        read += run.predictions() is not None
    assert 0 < read < len(whole)  # some bits are of no account, such as times in the archive


def tables():
    """protocol -> {model: {task: accuracy}} of the tables in lra/README.md."""
    text = (ROOT / "lra/README.md").read_text().partition("## Published accuracy")[2]
    names = {"ListOps": "lra.listops", "Text": "lra.text", "Retrieval": "lra.retrieval", "Image": "lra.image"}
    names |= {"Pathfinder": "lra.pathfinder 32"}
    found = {}
    for protocol in ("lra", "skyformer"):
        part = text.partition(f"Protocol `{protocol}`")[2].partition("\n|")[2].partition("\n\n")[0]
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]
        found[protocol] = {
            row[0]: {names[task]: float(x) for task, x in zip(head, row) if task in names} for row in rows
        }
    return found


@pytest.mark.quick
@pytest.mark.parametrize("protocol", ["lra", "skyformer"])
def test_published_figures_are_those_of_the_readme(protocol):
    read = tables()[protocol]
    assert len(read) > 8
    for task in next(iter(read.values())):
        figures = published(protocol, task)
        stored = sorted([*figures.ours.values(), *figures.others.values()])
        assert stored == sorted(row[task] for row in read.values())
    first = next(iter(read.values()))
    assert published(protocol, "lra.listops").ours["softmax"] == first["lra.listops"]
    assert published(protocol, "lra.pathfinder 128") is None and published("default", "lra.listops") is None
