"""The script for SLURM, run by bash with stand-ins for SLURM's commands."""

import os
import shlex
import subprocess

import pytest

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


def test_the_script_is_quoted(tmp_path):
    text = slurm.script([["python", "it's"]], tmp_path / "s.slurm", tmp_path, tmp_path, None)
    assert "#SBATCH --array=0-0\n" in text and shlex.quote("python 'it'\"'\"'s'") in text
