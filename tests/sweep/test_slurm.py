"""The script for SLURM, run by bash with stand-ins for SLURM's commands."""

import os
import re
import shlex
import subprocess

import pytest

from efficient_tx.checks import OptionError
from efficient_tx.sweep import slurm

SRUN = """#!/bin/bash
for id in $(seq 0 $((SLURM_NTASKS - 1))); do SLURM_PROCID=$id "$@"; done
"""
COMMANDS = [["printf", "%s\\n", "--config=gla*3,softmax", "a b", "--seed=0"], ["printf", "%s\\n", "--seed=1"]]


@pytest.fixture
def submit(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", '#!/bin/bash\nprintf "%s\\n" first second\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    here = tmp_path / "it's here"
    here.mkdir()
    script = tmp_path / "sweep.slurm"
    script.write_text(slurm.script(COMMANDS, script, tmp_path / "logs", here, 4))

    def run(task, tasks):
        given = {"SLURM_ARRAY_TASK_ID": task, "SLURM_NTASKS": tasks, "SLURM_JOB_ID": 41000, "SLURM_JOB_NODELIST": "x"}
        settings = os.environ | {key: str(value) for key, value in given.items()}
        settings["PATH"] = f"{tools}:{settings['PATH']}"
        done = subprocess.run(["bash", script], env=settings, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.splitlines()

    return script.read_text(), run


def test_a_task_of_the_array_is_a_run(submit):
    text, run = submit
    assert "#SBATCH --array=0-1%4\n" in text
    assert run(0, 1) == ["--config=gla*3,softmax", "a b", "--seed=0"] and run(1, 1) == ["--seed=1"]


def test_several_tasks_are_the_processes_of_one_run(submit):
    _, run = submit
    together = ["--coordinator_address=first:21000", "--num_processes=2"]
    assert run(1, 2) == ["--seed=1", *together, "--process_id=0", "--seed=1", *together, "--process_id=1"]


@pytest.mark.parametrize("name", ["sweep1", "my sweep", '100% "sure", it\'s #1', "größer"])
def test_a_folder_may_have_any_name_but_one_with_a_backslash(tmp_path, name):
    """SLURM groups words as a shell does (`get_argument` in its sbatch/opt.c), then fills in what follows a %."""
    folder = tmp_path / name
    text = slurm.script(COMMANDS, folder / "sweep.slurm", folder / "logs", tmp_path, None)
    lines = [shlex.split(line.removeprefix("#SBATCH ")) for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {len(line) for line in lines} == {1}
    given = dict(line[0].removeprefix("--").partition("=")[::2] for line in lines)
    assert re.sub("%(.)", lambda found: {"%": "%", "a": "7"}[found[1]], given["output"]) == f"{folder}/logs/7.txt"
    assert re.fullmatch(r"[\w.+=-]+", given["job-name"], re.ASCII)
    with pytest.raises(OptionError, match="SLURM names no output file below a folder with a backslash"):
        slurm.script(COMMANDS, tmp_path / "a\\b" / "sweep.slurm", tmp_path / "a\\b" / "logs", tmp_path, None)


def test_the_script_is_quoted(tmp_path):
    text = slurm.script([["python", "it's"]], tmp_path / "s.slurm", tmp_path, tmp_path, None)
    assert "#SBATCH --array=0-0\n" in text and shlex.quote("python 'it'\"'\"'s'") in text
