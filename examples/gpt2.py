"""Trains an unmodified GPT-2 of Hugging Face transformers by Direct Feedback Alignment (DFA).

    pip install transformers
    python examples/gpt2.py
    python examples/gpt2.py --steps 5

A small GPT-2 with random initial weights learns to predict the bytes of PyTorch's module.py.
Results after 300 steps, seed 0, one run each, a minute on 2 CPU cores with PyTorch 2.13:

    cross-entropy    backpropagation 1.94 nats a byte, output layer only 2.71, DFA 2.81
    mean cosine      embeddings 0.00, blocks 0.22, 0.19 and 0.20

The cross-entropy is the mean training loss of the last 50 steps. One line converts GPT-2 to a DFA
network, but DFA does not beat training the output layer alone. As in the pre-activation ResNet that
performs badly in docs/own-network.md, each block has a norm right after the feedback point.

Feedback points follow the embeddings, the first two blocks, and the last norm. Each token has
its own error, so there are two batch dimensions, (batch, token).
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfatools import dfa_from_bp, measure_alignment
from mltools.data import import_torchvision
from mltools.errors import show

TEXT = Path(str(nn.modules.module.__file__))
METHODS = ("dfa", "shallow", "bp")
BATCH, LENGTH = 16, 64
POINTS = ["transformer.drop", "transformer.h.0", "transformer.h.1", "transformer.ln_f"]


def gpt2() -> nn.Module:
    import_torchvision()  # first, as transformers' own import of it fails with a CPU-only PyTorch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256, n_positions=LENGTH, n_embd=128, n_layer=3, n_head=4, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def loss_of(output, tokens: Tensor) -> Tensor:
    """Returns the mean cross-entropy of the next byte, in nats."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300, help="default: %(default)s")
    steps = parser.parse_args().steps
    text = torch.tensor([*TEXT.read_bytes()])
    for method in METHODS:
        torch.manual_seed(0)
        model = dfa_from_bp(gpt2(), POINTS, batch_dims=2, training_method=method)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses: list[float] = []
        for _ in range(steps):
            starts = torch.randint(len(text) - LENGTH, (BATCH, 1))
            tokens = text[starts + torch.arange(LENGTH)]
            optimizer.zero_grad()
            loss = loss_of(model(tokens), tokens)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        last = losses[-50:]
        show(f"{method}: {sum(last) / len(last):.2f} nats a byte, of log 256 = 5.55")
        if method == "dfa":
            cosines = measure_alignment(model, tokens, tokens, loss_of)
            names = ["transformer.drop", *(f"transformer.h.{i}.mlp.dropout" for i in range(3))]
            show("mean cosine " + ", ".join(f"{name} {cosines[name].mean():.2f}" for name in names))


if __name__ == "__main__":
    main()
