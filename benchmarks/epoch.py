"""Times one epoch of the scripts against one epoch of a plain PyTorch training loop.

    python benchmarks/epoch.py                            the paper's two networks, random images
    python benchmarks/epoch.py --networks fc --epochs 5
    python benchmarks/epoch.py --device cuda

An epoch consists of 390 training steps on 50,000 images, the evaluation on 10,000, the alignment of
128, and the files of the run. The plain loop takes the very same steps, but its `DataLoader` (with
`--workers` processes) converts and normalises images one by one, as torchvision's data sets do, and
the loop calls `.item()` after every batch. It writes no files. The epochs of both loops alternate.

    epoch      seconds, and the ratio to an epoch of the plain loop
    outside    the share of the epoch outside the steps' arithmetic (forward pass, backward pass and
               update); on CUDA, the share outside the steps, which are timed separately
    step       milliseconds, and two ratios: to the step's bare matrix products and convolutions
               (same shapes, same calls, on CUDA in a graph as well), and to the time of their
               multiply-adds at the rate of one large matrix product
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from harness import (
    in_turns,
    launched,
    machine,
    median_ratio,
    products,
    rate_of_a_large_product,
    seconds,
    write_random_images,
)
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mltools.data import DATASETS, DataSet, import_torchvision, load_dataset
from mltools.gpu import own_stream
from mltools.networks import Network
from mltools.results import Metrics, RunFolder
from mltools.training import Experiment, Run, Trainer, train_run

BATCH = 128
STEPS = 100  # timed separately after each epoch, on a CPU


class Images(Dataset):
    """Images of a uint8 array, each converted to a PIL image first, as in torchvision's CIFAR10."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        import_torchvision()
        from torchvision import transforms

        info = DATASETS["CIFAR-10"]
        self.images, self.labels = images.permute(0, 2, 3, 1).numpy(), labels.tolist()
        self.transform = transforms.Compose(
            [transforms.ToTensor(), transforms.Normalize(info.mean, info.std)]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


class TimedTrainer(Trainer):
    """Trainer that adds up the seconds of its steps' arithmetic."""

    arithmetic = 0.0

    def learn(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        result = super().learn(x, y)
        self.arithmetic += time.perf_counter() - start
        return result


def plain_epoch(trainer: Trainer, data: DataSet, workers: int) -> None:
    device = trainer.device
    loader = partial(
        DataLoader, batch_size=BATCH, num_workers=workers, pin_memory=device.type == "cuda"
    )
    train_set, test_set = (Images(*split.dataset[:]) for split in (data.train, data.test))
    loss_sum, correct = 0.0, 0
    trainer.model.train()
    for x, y in loader(train_set, shuffle=True, drop_last=True):
        x, y = x.to(device), y.to(device)
        output, loss = trainer.learn(x, y)
        loss_sum += loss.item() * len(y)
        correct += (output.argmax(1) == y).sum().item()
    trainer.model.eval()
    with torch.no_grad():
        for x, y in loader(test_set):
            x, y = x.to(device), y.to(device)
            output = trainer.model(x)
            loss_sum += torch.nn.functional.cross_entropy(output, y).item() * len(y)
            correct += (output.argmax(1) == y).sum().item()
    trainer.alignment()


def graphs_in_turns(
    run: Run, data: DataSet, bare: Callable[[], None], device: torch.device
) -> tuple[list[float], list[float]]:
    """Times CUDA graphs of a step and of its bare products; returns the seconds in each epoch."""
    replay = launched(bare, device)
    with own_stream(device):
        trainer = Trainer(run, data, device)
        trainer.capture()
        batches = len(trainer.batches)

        def steps() -> None:
            while trainer.batches.left:
                trainer.step()

        def products_alone() -> None:
            for _ in range(batches):
                replay()

        times = []
        for epoch in range(5):
            trainer.begin(1 + epoch)
            times.append([seconds(work, device) / batches for work in (steps, products_alone)])
    step, alone = (list(column) for column in zip(*times[1:]))
    return step, alone


def measure(name: str, data: DataSet, device: torch.device, epochs: int, workers: int) -> str:
    experiment = Experiment(name, Network(name), reduction="sum", learning_rate=5e-4)
    run = Run(
        experiment=experiment, seed=0, dataset=data.name, epochs=1 + epochs, batch_size=BATCH,
        protocol="release",
    )  # fmt: skip
    plain = Trainer(run, data, device)
    plain.batches.begin(0)
    x, y = plain.batches.take()
    count, works = products(plain.model, x)

    def bare() -> None:
        for work in works:
            work()

    ours: list[float] = []
    theirs: list[float] = []
    steps: list[float] = []
    bares: list[float] = []
    shares: list[float] = []
    since, peak = time.perf_counter(), 0

    def epoch_ended(metrics: Metrics) -> None:
        nonlocal since, peak
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        own = time.perf_counter() - since
        if device.type == "cuda" and metrics["epoch"] == 1:
            peak = torch.cuda.max_memory_allocated(device)
        if metrics["epoch"] > 1:  # the first epoch sets up
            ours.append(own)
            shares.append(1 - timed.arithmetic / own)
            theirs.append(seconds(lambda: plain_epoch(plain, data, workers), device))
            plain.model.train()
            if device.type == "cpu":
                step, products_alone = in_turns([lambda: plain.learn(x, y), bare], STEPS, device)
                steps.extend(step)
                bares.extend(products_alone)
        timed.arithmetic = 0.0
        since = time.perf_counter()

    with tempfile.TemporaryDirectory() as folder, own_stream(device):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        timed = TimedTrainer(run, data, device)
        train_run(timed, RunFolder(Path(folder) / "run"), epoch_ended=epoch_ended)
    if device.type == "cuda":
        steps, bares = graphs_in_turns(run, data, bare, device)
    epoch, step = statistics.median(ours), statistics.median(steps)
    batches = len(data.train) // BATCH
    outside = statistics.median(shares)
    bound = count / rate_of_a_large_product(device)
    if device.type == "cuda":
        outside = 1 - batches * step / epoch
        memory = f"{peak / 1e6:.0f} MB of GPU memory"
    else:
        memory = f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB (the process)"
    return (
        f"{name}: epoch {epoch:.2f} s, {median_ratio(ours, theirs):.2f} of the plain loop's "
        f"{statistics.median(theirs):.2f} s; {batches * BATCH / epoch:.0f} images/s; "
        f"outside {100 * outside:.0f} %\n"
        f"{'':{len(name) + 1}} step {1000 * step:.2f} ms, {median_ratio(steps, bares):.2f} of its "
        f"bare products, {step / bound:.2f} of their number at the rate of a large one; {memory}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--threads", type=int, help="threads of the CPU; default: PyTorch's choice")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs of each loop")
    parser.add_argument("--workers", type=int, default=0, help="workers of the plain DataLoader")
    parser.add_argument("--networks", nargs="+", choices=("fc", "cnn"), default=("fc", "cnn"))
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    print(machine(args.device))
    with tempfile.TemporaryDirectory() as folder:
        write_random_images(Path(folder) / "cifar10.npz")
        data = load_dataset("CIFAR-10", folder)
    for name in args.networks:
        print(measure(name, data, args.device, args.epochs, args.workers), flush=True)


if __name__ == "__main__":
    main()
