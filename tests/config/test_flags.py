"""The command line: one resolved config, help on every key, and one line and exit 2 for every mistake."""

import re

import pytest
from absl.testing import flagsaver

import efficient_tx.train  # noqa: F401 (whose flags these are)
from efficient_tx.checks import OptionError
from efficient_tx.config import flags, keys, load
from efficient_tx.config.errors import ConfigError

pytestmark = pytest.mark.quick

LISTOPS = "--config=lra_listops:skyformer"
OWN = ("workdir", "coordinator_address", "num_processes", "process_id")


@pytest.fixture
def parsed(capsys):
    """parsed(*arguments) -> (what they ask for or the exit status, standard output, standard error)."""

    def parse(*arguments, workdir="--workdir=runs/a"):
        argv = ["train.py", *filter(None, [workdir]), *arguments]
        try:
            with flagsaver.flagsaver():
                asked = flags.parse(argv, usage="Trains a model.", own=OWN)
        except SystemExit as stop:
            asked = stop.code
        return (asked, *capsys.readouterr())

    return parse


def test_flags_may_stand_in_any_order_and_with_one_dash(parsed):
    protocol, layers, steps = "--config.protocol=lra", "--config.model.layers=1", "-config.steps=9"
    listops = "--config=lra_listops:softmax"
    orders = [
        (listops, protocol, layers, steps),
        (layers, steps, protocol, listops),
        (protocol, "--config", "lra_listops:softmax", steps, layers),
    ]
    first, *others = (parsed(*order)[0] for order in orders)
    assert [other.config.to_json() for other in others] == [first.config.to_json()] * 2
    assert (first.config.model.layers, first.config.steps, first.config.protocol) == (1, 9, "lra")
    assert first.departures == others[0].departures == ["model.layers", "steps", "task.source"]


def test_typed_names_bring_their_sections(parsed):
    asked, out, error = parsed(
        "--config.linear.mlp.blocks=2", "--config.linear.mlp.name=monarch", "--config.attention.linformer.rank=8",
        "--config.mixers=linformer", "--config.model.causal=false", "--noconfig.remat", "--config", "quickstart",
    )  # fmt: skip
    assert (out, error) == ("", "")
    assert asked.config.attention.to_dict() == {"linformer": {"rank": 8, "conv": 0}}
    assert asked.config.linear.mlp.to_dict() == {"name": "monarch", "blocks": 2, "init": "variance"}
    assert asked.config.model.causal is asked.config.remat is False


def test_a_config_is_executed_once(parsed, tmp_path):
    """With typed names, a protocol's departures and the help, which all ask it again."""
    path, log = tmp_path / "mine.py", tmp_path / "log"
    path.write_text(
        f"with open({str(log)!r}, 'a') as log:\n    log.write('executed ')\n"
        "from efficient_tx.config import make_config\n"
        "def get_config(argument='gla'):\n    return make_config('lra.listops', argument)\n"
    )
    asked, _, _ = parsed(f"--config={path}", "--config.mixers=softmax", "--config.protocol=lra", "--config.seed=3")
    assert (asked.config.mixers, asked.config.seed) == ("softmax", 3) and log.read_text() == "executed "
    assert parsed(f"--config={path}", "--help")[0] == 0 and log.read_text() == "executed executed "


MISTAKES = {
    "no config": ([], ["--config is missing: give a config, as --config=quickstart"]),
    "two configs": ([LISTOPS, LISTOPS], ["--config is given twice"]),
    "a wrong name": (
        ["--config=lra_listops:skyfromer"],
        ["--config=lra_listops:skyfromer: ", "'skyfromer'", "nearest: 'skyformer'"],
    ),
    "a wrong file": (["--config=lra_listop"], ["--config=lra_listop: there is no such config file; the nearest is"]),
    "a wrong key": (
        [LISTOPS, "--config.optimizer.learning_rat=1"],
        ["--config.optimizer.learning_rat=1: config.optimizer.learning_rat is no key: the nearest is optimizer."],
    ),
    "a wrong type": (
        [LISTOPS, "--config.steps=abc"],
        ["--config.steps=abc: config.steps takes a value of type int, not 'abc'"],
    ),
    "an unset key's type": (
        [LISTOPS, "--config.model.head_dim=abc"],
        ["--config.model.head_dim=abc: config.model.head_dim takes a value of type int, not 'abc'"],
    ),
    "a wrong value": (
        [LISTOPS, "--config.model.heads=3"],
        ["--config.model.heads=3: config.model.heads is 3", "64 features"],
    ),
    "a wrong combination": ([LISTOPS, "--config.model.causal=true"], ["config.attention.skyformer", "causal"]),
    "a wrong protocol": (
        [LISTOPS, "--config.protocol=lar"],
        ["--config.protocol=lar: config.protocol is 'lar': choose one of default, lra, skyformer"],
    ),
    "quickstart's protocol": (
        ["--config=quickstart", "--config.protocol=lra"],
        ["--config.protocol=lra: config.protocol is 'lra', but quickstart is a run of its own: use default"],
    ),
    "an unknown flag": ([LISTOPS, "--confg.steps=1"], ["confg.steps"]),
    "an empty workdir": ([LISTOPS, "--workdir="], ["--workdir is empty: name a folder"]),
    "no dashes": ([LISTOPS, "steps=100"], ["'steps=100' is no flag: flags begin with two dashes"]),
    "no dashes and a key's full name": (
        [LISTOPS, "config.optimizer.learning_rate=123"],
        ["'config.optimizer.learning_rate=123' is no flag", "as --config.optimizer.learning_rate=123"],
    ),
    "no dashes and the wrong name": ([LISTOPS, "optimizer.lr=1"], ["as --config.optimizer.learning_rate=1"]),
    "no dashes before a flag of the command": ([LISTOPS, "workdir=runs/b"], ["as --workdir=runs/b"]),
    "no dashes at first": (["seed=3", LISTOPS], ["'seed=3' is no flag", "as --config.seed=3"]),
    "a module of Python's own": (
        [LISTOPS, "--config.task.name=this"],
        ["--config.task.name=this: config.task.name is 'this': it is in ", "--trust=this allows it"],
    ),
    "an installed module": (
        ["--config=lra_listops:flax.nnx:Linear+flax.nnx:Linear"],
        ["config.mixers is 'flax.nnx:Linear': it is in ", "--trust=flax.nnx allows it"],
    ),
    "a trusted module without a mixer": (
        ["--config=lra_listops:flax.nnx:Linear", "--trust=other", "--trust", "flax"],
        ["config.mixers is 'flax.nnx:Linear': that is no subclass of efficient_tx.attention.Mixer"],
    ),
    "no dashes at the end": ([LISTOPS, "--", "abc"], ["'abc' is no flag"]),
    "a key of another mixer": (
        ["--config=recall:fourier", "--config.attention.fourier.conv=4"],
        ["config.attention.fourier.conv is no key", "the mixers here are fourier"],
    ),
    "an option of another kind": (
        ["--config=recall", "--config.task.kind=copy", "--config.task.pairs=4"],
        ["config.task cannot be used: pairs is 4, an option of kind 'mqar': 'copy' has max_len, vocab_size, tokens"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_exit_code_2(parsed, mistake):
    arguments, words = MISTAKES[mistake]
    status, out, error = parsed(*arguments)
    assert (status, out, error.count("\n")) == (2, "", 1), error
    for word in words:
        assert word in error


def test_a_workdir_is_required(parsed):
    status, out, error = parsed(LISTOPS, workdir=None)
    assert (status, out, error.count("\n")) == (2, "", 1) and "workdir" in error


def test_an_error_without_a_typed_key_names_the_config(parsed):
    """What the config file itself has wrong is no flag's fault."""
    status, _, error = parsed("--config=lra_listops:softmax", "--config.grad_accum=5")
    assert status == 2 and error.startswith("--config.grad_accum=5: config.grad_accum is 5: it must divide batch_size")
    status, _, error = parsed("--config=lra_listops:softmax", "--config.batch_size=33", "--config.grad_accum=1")
    assert status != 2


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OptionError("config", "x.py", "it is no file"), "--config=x.py: it is no file\n"),
        (ConfigError("steps", "is 0: it must be\nat least 1"), "config.steps is 0: it must be at least 1\n"),
        ("plain", "plain\n"),
    ],
)
def test_refusing_is_one_line_of_any_error(capsys, error, line):
    with pytest.raises(SystemExit) as stopped:
        flags.refuse(error)
    assert (stopped.value.code, capsys.readouterr().err) == (2, line)


def test_help_names_what_there_is_to_choose(parsed):
    for arguments in (["--help"], ["-h"], ["--helpshort"]):
        status, out, error = parsed(*arguments, workdir=None)
        assert (status, error) == (0, "")
        for words in (
            "Trains a model.", "--workdir: folder of the run", "--coordinator_address", "quickstart", "lra_listops",
            "kernelized, sigmoid", "skyformer", "monarch", "module:Class", "Protocols: default, lra, skyformer",
        ):  # fmt: skip
            assert words in out


@pytest.mark.parametrize("name", [*load.shipped(), "lra_listops:gla,hyper+monarch+low_rank"])
def test_help_shows_every_key_as_it_is_resolved_with_its_meaning(parsed, name):
    """Protocol and overrides included."""
    published = "lra" in load.ConfigFile(name).protocols and name.startswith("lra_")
    protocol = "lra" if published else "default"
    status, out, error = parsed(
        f"--config={name}", f"--config.protocol={protocol}", "--config.seed=17", "--help", workdir=None
    )
    assert (status, error) == (0, "")
    lines = out.partition("Keys of ")[2].splitlines()[1:]
    shown = {
        re.match(r"  ([\w.]+) = ", line)[1]: (line, meaning.strip()) for line, meaning in zip(lines[::2], lines[1::2])
    }
    flat = keys.flatten(load.ConfigFile(name).resolve({"protocol": protocol, "seed": 17}))
    assert {key: line for key, (line, _) in shown.items()} == {
        key: f"  {key} = {value!r}" for key, value in flat.items()
    }
    assert [key for key, (_, meaning) in shown.items() if not meaning] == []


def test_help_has_the_mistakes_that_a_run_has(parsed):
    status, out, error = parsed("--help", "--config=lra_listops:skyfromer", workdir=None)
    assert (status, out, error.count("\n")) == (2, "", 1) and "nearest: 'skyformer'" in error
