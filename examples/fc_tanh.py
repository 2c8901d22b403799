"""The paper's first experiment, whole: DFA trains three hidden layers of 800 Tanh units.

    python examples/fc_tanh.py                                  # CIFAR-10, 50 epochs
    python examples/fc_tanh.py --dataset Digits                 # embedded images: no download

On 2 CPU cores, in 6.5 minutes, seed 0, one run on CIFAR-10:

    epoch  2    test accuracy 36.3 %, mean cosines 0.406, 0.228, 0.122
    epoch 50    test accuracy 46.0 %, mean cosines 0.808, 0.886, 0.643

`best_practices.py --experiments fc-tanh` is the same experiment with ten seeds, files on disk and
resumption. (Its cosines are a little lower: the 2019 release's cosine has a floor.)
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from dfatools import dfa_from_bp, measure_alignment
from mltools.data import Loader, load_dataset
from mltools.errors import UserError

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--dataset", default="CIFAR-10", help="default: %(default)s")
parser.add_argument("--data-dir", default="data", help="folder of cifar10.npz; fetched if absent")
parser.add_argument("--epochs", type=int, default=50, help="default: %(default)s")
options = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
try:
    data = load_dataset(options.dataset, options.data_dir)
except UserError as error:
    parser.error(str(error))
# All images on the device, normalised: float32 (N, C, H, W), and their labels, int64 (N,).
x_train, y_train = next(iter(Loader(data.train, len(data.train), device)))
x_test, y_test = next(iter(Loader(data.test, len(data.test), device)))

bp = nn.Sequential(
    nn.Flatten(),
    nn.Linear(x_train[0].numel(), 800), nn.Tanh(),
    nn.Linear(800, 800), nn.Tanh(),
    nn.Linear(800, 800), nn.Tanh(),
    nn.Linear(800, data.classes),
)  # fmt: skip
# A feedback point after each Tanh. As in 2019, hidden layers get the error summed over the batch of
# 128, and the output layer gets the gradient of the mean loss. The learning rate suits this scale.
model = dfa_from_bp(bp, reduction="sum").to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=5e-4)
tanhs = [name for name, module in model.named_modules() if isinstance(module, nn.Tanh)]

for epoch in range(1, options.epochs + 1):
    model.train()
    for batch in torch.randperm(len(x_train), device=device).split(128):
        if len(batch) == 128:  # an incomplete last batch is dropped
            optimizer.zero_grad()
            F.cross_entropy(model(x_train[batch]), y_train[batch]).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        accuracy = 100 * (model(x_test).argmax(1) == y_test).float().mean().item()
    cosines = measure_alignment(model, x_test[:128], y_test[:128], F.cross_entropy)
    means = " ".join(f"{cosines[name].mean():.3f}" for name in tanhs)
    print(f"epoch {epoch}: test accuracy {accuracy:.2f} %, mean cosine at each Tanh {means}")
