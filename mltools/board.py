"""Epochs for TensorBoard, where its package is installed."""

from pathlib import Path

from mltools.errors import UserError


class Board:
    """Writes a run's epochs as scalars below a folder; to be used in a `with` statement.

    To be made where `check_installed` has nothing to say.

    Args:
        folder: where to.
        done: epochs that are finished; what TensorBoard has of later ones is discarded.
    """

    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=done + 1)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *exception: object) -> None:
        self._writer.close()

    def epoch_ended(self, metrics: dict) -> None:
        """An epoch as in `metrics.jsonl`."""
        values = {
            "loss/train": metrics["train_loss"],
            "loss/test": metrics["test_loss"],
            "accuracy/train": metrics["train_accuracy"],
            "accuracy/test": metrics["test_accuracy"],
            **{f"alignment/{layer}": c["mean"] for layer, c in metrics["alignment"].items()},
        }
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, metrics["epoch"])
        self._writer.flush()


def check_installed() -> None:
    """Raises UserError if the package is missing."""
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        raise UserError("--tensorboard needs a package: pip install tensorboard") from None
