"""Spam or not, with a pretrained text encoder: all-MiniLM-L6-v2 (6 layers of 384 features), all of its weights tuned.

Command:   python -m efficient_tx.data.fetch minilm && python -m efficient_tx.data.fetch spam
           python train.py --config=configs/minilm_spam.py --workdir=runs/minilm
Hardware:  2 CPU cores, 2.5 GB, 7 minutes of processor time, most of it for the evaluations
Expected:  96.7 % test accuracy (measured here, one seed); the best constant answer scores 71.6 %. A linear model of
           byte n-grams, of the first 4,000 bytes of all 4,074 training e-mails, scores 98.8 % (configs/lra_text.py);
           here are the first 128 tokens of 1,600.
"""

from efficient_tx.config import make_config
from efficient_tx.task import data_directory


def get_config(argument=""):
    return make_config(
        "efficient_tx.data.spam",
        argument,
        steps=100,
        batch_size=16,
        eval_every=50,
        checkpoint_every=50,
        log_every=10,
        init_from=str(data_directory() / "minilm"),
        model={"name": "bert"},
        optimizer={"learning_rate": 5e-5, "warmup": 10},
    )
