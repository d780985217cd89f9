"""The plan: which runs there are, their names, and what is refused before any starts."""

import fnmatch
import re
import shlex
from pathlib import Path

import pytest

from efficient_tx.commands import listed
from efficient_tx.sweep.plan import Grid, Method, check_runs, combinations, methods_of, run_name
from efficient_tx.sweep.tuning import final_runs, tuning_runs

pytestmark = pytest.mark.quick

SMALL = ("--config.model.layers=1", "--config.task.max_len=32", "--config.model.features=16")


def grid(*methods, settings=None, tuned=None, constants=SMALL):
    methods = [Method(*method.split("+", 1)) if "+" in method else Method(method, "dense") for method in methods]
    return Grid("quickstart", methods, settings or {}, tuned or {}, constants, Path("out"))


def runs_of(made, seeds=1):
    return [run for cell in made.cells() for run in final_runs(made, cell, cell.points[0], seeds, 0)]


def test_lists_split_at_semicolons_if_there_are_any():
    assert listed("softmax,gla") == ["softmax", "gla"]
    assert listed("softmax; gla*3,softmax") == ["softmax", "gla*3,softmax"]
    assert listed("gla*3,softmax;") == ["gla*3,softmax"] and listed(",") == []


def test_combinations_are_a_product():
    assert combinations({}) == [{}]
    assert combinations({"a": "12", "b": "3"}) == [{"a": "1", "b": "3"}, {"a": "2", "b": "3"}]


def test_every_method_setting_and_seed_is_a_run():
    made = grid("softmax", "gla*3,softmax", "softmax+monarch", settings={"optimizer.learning_rate": ["1e-4", "3e-4"]})
    runs = runs_of(made, seeds=2)
    assert len(runs) == len({run.name for run in runs}) == 3 * 2 * 2
    seen = {
        (run.config.mixers, run.config.linear.mlp.name, run.config.optimizer.learning_rate, run.config.seed)
        for run in runs
    }
    assert ("gla*3,softmax", "dense", 3e-4, 1) in seen and ("softmax", "monarch", 1e-4, 0) in seen and len(seen) == 12
    assert {run.config.model.layers for run in runs} == {1}
    check_runs(runs)


def test_the_arguments_are_those_of_a_run():
    (run,) = runs_of(grid("gla*3,softmax+monarch+low_rank", settings={"optimizer.weight_decay": ["0.1"]}))
    assert run.arguments == [
        "--config=quickstart:gla*3,softmax+monarch+low_rank",
        f"--workdir=out/{run.name}",
        *SMALL,
        "--config.optimizer.weight_decay=0.1",
        "--config.seed=0",
    ]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("gla*3,softmax", {}),
        ("my_module:Mixer", {"init_from": "runs/a b/*"}),
        ("softmax", {"task.source": "-x$(rm)'\"\\;~!#&|<>[]{}?é"}),
        ("softmax", {"a.b": "x" * 300}),
    ],
)
def test_names_mean_nothing_to_a_shell_or_a_pattern(method, settings):
    name = run_name(Method(method, "dense"), settings, 3, "run")
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]*", name) and len(name) <= 200
    assert shlex.quote(name).strip("'") == name and fnmatch.fnmatchcase(name, name) and name.endswith("_seed3")


def test_names_use_the_last_part_of_a_key_unless_two_share_it():
    one = run_name(Method("softmax", "dense"), {"optimizer.learning_rate": "1e-4"}, 0, "tune")
    assert one == "softmax_learning_rate=1e-4_tune_seed0"
    two = run_name(Method("a", "monarch"), {"x.rank": "1", "y.rank": "2"}, 0, "run")
    assert two == "a+monarch_x.rank=1_y.rank=2_seed0"


def test_a_key_of_one_mixer_is_set_for_that_mixer_alone():
    made = grid("softmax", "skyformer", settings={"attention.skyformer.landmarks": ["8", "16"]})
    assert [(str(cell.method), dict(cell.settings)) for cell in made.cells()] == [
        ("softmax", {}),
        ("skyformer", {"attention.skyformer.landmarks": "8"}),
        ("skyformer", {"attention.skyformer.landmarks": "16"}),
    ]
    assert [run.config.attention.get("skyformer", {}).get("landmarks") for run in runs_of(made)] == [None, 8, 16]


def test_a_constant_of_one_mixer_is_set_for_that_mixer_alone():
    constants = (*SMALL, "--config.attention.skyformer.landmarks=8", "--config.linear.mlp.blocks=4")
    made = runs_of(grid("softmax", "skyformer", "skyformer+monarch", constants=constants))
    assert [run.config.attention.get("skyformer", {}).get("landmarks") for run in made] == [None, 8, 8]
    assert [run.config.linear.mlp.get("blocks") for run in made] == [None, None, 4]
    assert {run.name for run in made} == {"softmax_seed0", "skyformer_seed0", "skyformer+monarch_seed0"}


def test_tuning_has_the_same_runs_for_every_method_and_seeds_of_its_own():
    made = grid("softmax", "vmean", tuned={"optimizer.learning_rate": ["1e-4", "1e-3"]})
    cells = made.cells()
    tuning = tuning_runs(made, cells, 2)
    assert [(str(r.cell.method), r.settings["optimizer.learning_rate"], r.seed) for r in tuning] == [
        (method, rate, seed) for method in ("softmax", "vmean") for rate in ("1e-4", "1e-3") for seed in (0, 1)
    ]
    final = final_runs(made, cells[0], cells[0].points[1], 3, 2)
    assert [run.seed for run in final] == [2, 3, 4] and not {r.name for r in tuning} & {r.name for r in final}
    assert {run.config.optimizer.learning_rate for run in final} == {1e-3}


def test_patterns_are_compared_by_the_layers_that_they_make():
    """On two layers, what a longer pattern says of a third one counts no more than the options of its mixer."""
    small = (*SMALL[1:], "--config.model.layers=2")
    for pattern in ("gla*2", "gla,gla", "gla, gla", "gla*2,softmax"):
        with pytest.raises(ValueError, match="have equal configs"):
            check_runs(runs_of(grid("gla", pattern, constants=small)))
    different = ("gla", "gla,softmax", "softmax,gla", "gla*2,softmax", "gla*2,vmean")
    check_runs(runs_of(grid(*different, constants=(*SMALL[1:], "--config.model.layers=3"))))


def test_patterns_of_a_model_with_stages_are_compared_by_stage():
    def made(*patterns):
        return runs_of(Grid("soft_fashion", [Method(one, "dense") for one in patterns], {}, {}, (), Path("out")))

    with pytest.raises(ValueError, match="have equal configs"):
        check_runs(made("softmax,vmean", "softmax,vmean,softmax"))
    check_runs(made("softmax,vmean", "softmax,vmean,vmean"))


def test_structures_are_named_once():
    """By --linears for all methods, or by a pattern for itself; both were three parts of an argument."""
    assert [str(method) for method in methods_of("quickstart", ["softmax+monarch"], None)[1]] == ["softmax+monarch"]
    with pytest.raises(ValueError, match=r"softmax.monarch.*it names structures, which linears does for all"):
        methods_of("quickstart", ["vmean", "softmax+monarch"], ["low_rank"])


@pytest.mark.parametrize(
    ("made", "line"),
    [
        (grid("softmax", "softmax"), "softmax+dense and softmax+dense have equal configs"),
        (grid("softmax", settings={"steps": ["10", "010"]}), "softmax+dense, steps=10 and softmax+dense, steps=010"),
        (grid("softmax", settings={"log_every": ["1", "2"]}), "have equal configs"),
        (grid("softmax", settings={"init_from": ["a/b", "a-b"]}), "would share the folder"),
        (grid("softmax", settings={"optimiser.lr": ["1"]}), "optimiser.lr=1: config.optimiser.lr is no key: the near"),
        (grid("softmax", settings={"attention.gla.conv": ["1"]}), "config.attention.gla.conv is no key: the nearest"),
        (grid("softmax", constants=(*SMALL, "--config.attention.gla.conv=1")), "config.attention.gla.conv is no key"),
        (grid("softmax", constants=(*SMALL, "--config.optimiser.lr=1")), "config.optimiser.lr is no key: the nearest"),
        (grid("softmax", settings={"steps": ["ten"]}), "steps=ten: config.steps takes a value of type int"),
        (grid("softmax", settings={"model.heads": ["3"]}), "model.heads=3: config.model.heads is 3"),
        (grid("softmax", settings={"seed": ["3"]}), "config.seed is set by --seeds"),
        (grid("softmax", settings={"mixers": ["gla"]}), "config.mixers is set by --mixers"),
        (grid("softmax", tuned={"linear.mlp.name": ["monarch"]}), "config.linear.mlp.name is set by --linears"),
        (grid("softmax", constants=(*SMALL, "--config.seed=7")), "config.seed is set by --seeds"),
        (grid("softmax", constants=(*SMALL, "--config.mixers=vmean")), "config.mixers is set by --mixers"),
        (
            grid("softmax", constants=(*SMALL, "--config.linear.projections.name=monarch")),
            "config.linear.projections.name is set by --linears",
        ),
        (grid("softmax", "gla", constants=(*SMALL[1:], "--config.model.layers=0")), "config.model.layers is 0"),
        (grid("softmax", settings={"steps": ["3"]}, tuned={"steps": ["3"]}), "config.steps is set by both --set and"),
        (grid("softmax", settings={"task.max_len": ["64"]}), "config.task.max_len is given one value for all runs"),
        (grid("softmx"), "choose one of"),
        (grid("linformer", constants=(*SMALL, "--config.model.causal=True")), "linformer"),
    ],
)
def test_what_cannot_be_is_refused(made, line):
    with pytest.raises(ValueError) as error:
        check_runs(runs_of(made))
    # As the command prints an option's error.
    assert line in str(error.value)
