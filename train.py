"""Trains a model: python train.py --config=configs/quickstart.py --workdir=FOLDER (efficient_tx/train.py)."""

from efficient_tx.commands import leave_quietly

if __name__ == "__main__":
    leave_quietly()
    from efficient_tx.train import command

    command()
