"""Makes results and logs without training, and records figures without drawing them."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from mltools.results import RunFolder, RunResult


def made_run(
    name="fc", seed=0, test=(40.0, 41.0), *, cosines=None, loss=1.25, seconds=1.5,
    root="nowhere", environment=None, **settings,
):  # fmt: skip
    """Makes the result of a finished run.

    Args:
        test: the test accuracy of each epoch; the train accuracy is 10 points higher.
        cosines: {layer: its mean cosine in each epoch}; None omits the layer in that epoch.
        loss: the train loss of each epoch; None makes the run diverged.
        root: the folder of the experiments.
        settings: override the defaults below; `epochs` above `len(test)` makes the run unfinished.
    """
    common = {"dataset": "tiny", "epochs": len(test), "batch_size": 8}
    common |= {"experiment": {"name": name}, "protocol": "release", "seed": seed}
    epochs = [
        {
            "epoch": i + 1,
            "train_loss": loss,
            "train_accuracy": accuracy + 10,
            "test_loss": 1.5,
            "test_accuracy": accuracy,
            "alignment": {
                layer: {"mean": means[i], "std": 0.125}
                for layer, means in (cosines or {}).items()
                if means[i] is not None
            },
            "seconds": seconds,
        }
        for i, accuracy in enumerate(test)
    ]
    path = Path(root, name, f"seed-{seed}")
    environment = {"torch": "2"} if environment is None else environment
    return RunResult(path, common | settings, environment, epochs)


def save_run(run):
    """Writes config.json and metrics.jsonl of a run; returns the run."""
    folder = RunFolder(run.path)
    folder.start(run.settings, run.environment)
    folder.write_metrics(run.epochs)
    return run


STAMP = "2026-11-23 16:56:17"


def metrics(epoch, shift=0.0):
    """Returns the metrics of one epoch of `own_log`."""
    return {
        "epoch": epoch,
        "train_loss": round(2.0 - epoch / 10 + shift, 4), "train_accuracy": 30.125 + epoch,
        "test_loss": round(2.1 - epoch / 10 + shift, 4), "test_accuracy": 29.5 + epoch,
        "alignment": {
            "lin1": {"mean": round(0.08 * epoch, 4), "std": 0.0123},
            "act1": {"mean": round(0.08 * epoch - 0.05, 4), "std": 0.0456},
        },
        "seconds": 1.5,
    }  # fmt: skip


def settings_of(experiment="fc-tanh", seed=0, epochs=5, batch_size=128, dataset="CIFAR-10"):
    return {
        "experiment": {"name": experiment}, "seed": seed, "dataset": dataset, "epochs": epochs,
        "batch_size": batch_size, "protocol": "release" if batch_size else None,
    }  # fmt: skip


def own_log(experiment="fc-tanh", seed=0, epochs=5, shift=0.0):
    """Makes a complete log in our format, without the code under test."""
    lines = [
        f"{epochs} epochs of CIFAR-10 on cpu",
        f"settings {json.dumps(settings_of(experiment, seed, epochs))}",
    ]
    for m in (metrics(epoch, shift) for epoch in range(1, epochs + 1)):
        lines += [
            f"alignment {layer}, epoch {m['epoch']}: mean {c['mean']:.4f} std {c['std']:.4f}"
            for layer, c in m["alignment"].items()
        ]
        train = f"train loss {m['train_loss']:.4f} accuracy {m['train_accuracy']:.4f}%"
        test = f"test loss {m['test_loss']:.4f} accuracy {m['test_accuracy']:.4f}%"
        lines.append(f"epoch {m['epoch']}/{epochs}: {train}, {test}, 1.500 s")
    return "".join(f"{STAMP}  {experiment} seed {seed}: {line}\n" for line in lines).encode()


FC = ("0_Linear(in=3072)", "1_Tanh()", "2_Bottleneck(in=800)", "3_Tanh()", "4_Linear(out=10)")


def release_log(rate="0.8525", init="STD", epochs=4, layers=FC, seed=0):
    """Makes a log in the 2019 release's format, with colours and progress; std-118 by default."""
    lines = [
        "\x1b[33m\x1b[1mEstablishing Baselines\x1b[0m\x1b[33m",
        f"Seeding with \x1b[1m{seed}\x1b[0m.",
        f"Training with a bottlenecking rate {rate} initialized by {init} for {epochs} epochs "
        "on dataset CIFAR-10 with a batch size of 128:",
    ]
    for epoch in range(1, epochs + 1):
        before = f", last epoch processed in {epoch - 1}.250048400879s" if epoch > 1 else ""
        lines.append(f"   EPOCH {epoch}/{epochs}{before}:")
        lines.append("       Batch 1/390 (loaded in 0.0004s, last batch forward in 0.0045s)")
        lines += [f"{x} -- mean:0.{epoch}0{i:02}, std:0.0{i:02}1" for i, x in enumerate(layers)]
        lines.append(
            f"   Training loss: 0.01{epoch}5 (top-1:3{epoch}.5%) -- "
            f"Validation loss: 0.01{epoch}0 (top-1:2{epoch}.5%)."
        )
    return "".join(f"{STAMP} -- {line}\n" for line in lines).encode()


def record_figures(monkeypatch):
    """Returns a list to which each saved figure is appended; the figures' files stay empty."""
    saved = []

    def savefig(figure, file, format, **options):
        saved.extend([figure] * (format == "png"))

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved
