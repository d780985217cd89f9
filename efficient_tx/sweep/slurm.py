"""SLURM: an array script with one task for each run, so that a cluster's own scheduler runs a sweep."""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from efficient_tx.checks import OptionError

# With several tasks a run, as by `sbatch --nodes=4`, these are the processes of one run, each on its host. Ports from
# 20000 up, so that two runs on one host have different ones.
TEMPLATE = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --array=0-{last}{at_once}
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --output={output}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
# Add what this cluster needs: --partition, --gpus-per-node, --cpus-per-task, --time. A run on several hosts:
# sbatch --nodes=4 {script}
# A run that its time limit stops has saved its state: submit the script again. Finished runs say so and end.
set -u
cd {here} || exit

runs=(
{runs}
)
run=${{runs[$SLURM_ARRAY_TASK_ID]}}
if [ "${{SLURM_NTASKS:-1}}" -gt 1 ]; then
    host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    run="$run --coordinator_address=$host:$((20000 + SLURM_JOB_ID % 20000)) --num_processes=$SLURM_NTASKS"
    run="$run --process_id=\\$SLURM_PROCID"
fi
exec srun bash -c "exec $run"
"""


def script(commands: Sequence[Sequence[str]], path: Path, logs: Path, here: Path, jobs: int | None) -> str:
    """The text of the script.

    Args:
      commands: the words of each run's command.
      path: where the script will lie.
      logs: the folder for what the runs print; it must exist when the script is submitted.
      here: the folder to run in.
      jobs: most runs at once; None is as many as the cluster has room for.

    Raises:
      OptionError: SLURM cannot write into the folder.
    """
    folder = str(logs.absolute())
    if "\\" in folder:
        rule = "SLURM names no output file below a folder with a backslash: use another"
        raise OptionError("out", str(path.parent), rule)
    # Quotes group characters in a line of #SBATCH, and a backslash is for a quote that does not. %% is one %.
    folder = folder.replace('"', '\\"').replace("%", "%%")
    return TEMPLATE.format(
        name=re.sub(r"[^\w.+=-]", "-", path.parent.absolute().name, flags=re.ASCII) or "sweep",
        last=len(commands) - 1,
        at_once=f"%{jobs}" if jobs else "",
        output=f'"{folder}/%a.txt"',
        script=shlex.quote(str(path)),
        here=shlex.quote(str(here)),
        runs="\n".join(f"    {shlex.quote(shlex.join(command))}" for command in commands),
    )
