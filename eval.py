"""Evaluates runs: python eval.py --workdir=runs/a [--workdir=runs/b ...] (efficient_tx/eval.py)."""

from efficient_tx.eval import command

if __name__ == "__main__":
    command()
