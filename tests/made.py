"""Results of runs that were never trained, a log of the 2019 release, and figures not drawn."""

from pathlib import Path

from matplotlib.figure import Figure

from mltools.results import RunFolder, RunResult


def made_run(
    name="fc", seed=0, test=(40.0, 41.0), *, cosines=None, loss=1.25, seconds=1.5,
    root="nowhere", environment=None, **settings,
):  # fmt: skip
    """Makes the result of a finished run.

    Args:
        test: the test accuracy of each epoch; the train accuracy is higher by 10.
        cosines: layer to its mean cosine in each epoch, or None in an epoch that lacks it.
        loss: the train loss of each epoch; None if the run diverged.
        root: the folder that holds the experiments.
        settings: take the place of those below; `epochs` above len(test) is an unfinished run.
    """
    common = {"dataset": "tiny", "epochs": len(test), "batch_size": 8}
    common |= {"experiment": {"name": name}, "feedback_placement": "release", "seed": seed}
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
    """Writes config.json and metrics.jsonl."""
    folder = RunFolder(run.path)
    folder.start(run.settings, run.environment)
    folder.write_metrics(run.epochs)
    return run


def release_log(epochs=4):
    """Makes a log of the 2019 release, of std-118 and seed 0."""
    lines = [
        "Seeding with \x1b[1m0\x1b[0m.",
        f"Training with a bottlenecking rate 0.8525 initialized by STD for {epochs} epochs "
        "on dataset CIFAR-10 with a batch size of 128:",
    ]
    layers = ["Linear", "Tanh", "Bottleneck", "Tanh", "Linear", "Tanh", "Linear"]
    for epoch in range(1, epochs + 1):
        lines.append(f"   EPOCH {epoch}/{epochs}:")
        lines += [
            f"{i}_{layer}(800) -- mean:0.{epoch}00{i}, std:0.00{i}1"
            for i, layer in enumerate(layers)
        ]
        lines.append(
            f"   Training loss: 0.01{epoch}5 (top-1:3{epoch}.5%) -- "
            f"Validation loss: 0.01{epoch}0 (top-1:2{epoch}.5%)."
        )
    return "".join(f"2019-06-01 16:56:17 -- {line}\n" for line in lines)


def record_figures(monkeypatch):
    """Returns a list that gets each figure when it is saved; its files stay empty."""
    saved = []

    def savefig(figure, file, format, **options):
        saved.extend([figure] * (format == "png"))

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved
