"""Evaluates runs: python eval.py --workdir=runs/a [--workdir=runs/b ...] (efficient_tx/eval.py)."""

from efficient_tx.commands import leave_quietly

if __name__ == "__main__":
    leave_quietly()
    from efficient_tx.eval import command

    command()
