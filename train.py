"""Trains a model: python train.py --config=configs/quickstart.py --workdir=FOLDER (efficient_tx/train.py)."""

from efficient_tx.train import command

if __name__ == "__main__":
    command()
