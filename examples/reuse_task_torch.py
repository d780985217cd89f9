"""A task of Long Range Arena in a training loop of PyTorch: the batches are arrays of numpy, padded and masked.

Command:   python examples/reuse_task_torch.py
Needs:     `pip install '.[data,bench]'`; without torch it says so and stops
Duration:  ten seconds on 2 CPU cores
Expected:  test accuracy 0.57 on a ListOps of at most 23 tokens, one seed; the best constant answer has 0.13, the best
           guess from the root operator 0.30
"""

import sys

from efficient_tx.data.batching import evaluation_batches, train_batches
from lra import listops

try:
    import torch
except ImportError:
    sys.exit("PyTorch is not installed: pip install '.[bench]'")
from torch import nn

FEATURES, STEPS = 64, 400


class Classifier(nn.Module):
    def __init__(self, task):
        super().__init__()
        self.tokens = nn.Embedding(task.vocab_size, FEATURES)
        self.positions = nn.Embedding(task.max_len, FEATURES)
        self.encoder = nn.TransformerEncoderLayer(FEATURES, 4, 2 * FEATURES, dropout=0.0, batch_first=True)
        self.head = nn.Linear(FEATURES, task.num_classes)

    def forward(self, inputs, mask):
        x = self.tokens(inputs) + self.positions.weight
        x = self.encoder(
            x, src_key_padding_mask=~mask
        )  # torch's mask is True for what is left out, ours for what is real
        x = x.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True)
        return self.head(x)


def tensors(batch):
    """Inputs, mask, label and weight of a batch."""
    inputs, mask, label, weight = (torch.from_numpy(batch[name]) for name in ("inputs", "mask", "label", "weight"))
    return inputs.long(), mask, label.long(), weight


def main():
    # Generated on first use, under $EFFICIENT_TX_DATA; sizes as in the arena are the defaults.
    task = listops.get_task(train_size=20_000, val_size=500, test_size=1000, min_len=4, max_len=24)
    batches = train_batches(task, batch_size=64, seed=0)  # batch i is a function of the seed and i
    torch.manual_seed(0)
    model = Classifier(task)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    for number in range(STEPS):
        inputs, mask, label, _ = tensors(batches[number])
        loss = nn.functional.cross_entropy(model(inputs, mask), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if number in (0, STEPS - 1):
            print(f"step {number + 1}: loss {loss.item():.3f}")

    right = count = 0.0
    model.eval()
    with torch.no_grad():
        for batch in evaluation_batches(task.test, task, batch_size=250):
            inputs, mask, label, weight = tensors(batch)
            right += float(
                ((model(inputs, mask).argmax(-1) == label) * weight).sum()
            )  # weight 0 fills up the last batch
            count += float(weight.sum())
    to_beat = ", ".join(f"{name} {score:.3f}" for name, score in task.baselines.items())
    print(f"test accuracy {right / count:.3f}; to beat: {to_beat}")


if __name__ == "__main__":
    main()
