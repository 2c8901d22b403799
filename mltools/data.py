"""Image classification data sets, kept on the device and normalised batch by batch.

    data = load_dataset("CIFAR-10", "data")
    batches = TrainingLoader(data.train, 128, "cuda", seed=0)
    for epoch in range(50):
        for x, y in batches.epoch(epoch):  # float32 [N, C, H, W] and int64 [N], on the device
            ...
    for x, y in Loader(data.test, 1000, "cuda"):
        ...

Each data set but ImageNet is one file, `<data_dir>/<name>.npz`, its name in lower case without
dashes (`cifar10.npz`), with the arrays `x_train`, `y_train`, `x_test`, `y_test`. Images are uint8
[N, H, W, C], or [N, H, W] for grey; labels have any integer type, [N] or [N, 1]. If the file is
missing, torchvision fetches and verifies the original, and the file is written for later runs.

`Digits` comes with the code (`digits.npz` in this folder) and needs neither network nor
`data_dir`. It is the "Optical Recognition of Handwritten Digits" data set of E. Alpaydin and
C. Kaynak (UCI Machine Learning Repository, CC BY 4.0), in the version that scikit-learn ships:
1,797 images of 8x8 pixels. Changed here: grey levels 0..16 are scaled to 0..255, and a seeded
permutation, stratified by class, splits the images into 1,500 for training and 297 for test.
`load_dataset` enlarges them to 32x32.
"""

import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from mltools.errors import UserError, one_line, user_errors
from mltools.results import write_atomically

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Info:
    """Metadata of a data set, known before it is loaded."""

    mean: tuple[float, ...]
    """Per-channel mean of pixels scaled to 0..1; `std` is the standard deviation."""
    std: tuple[float, ...]
    classes: int
    source: str
    """`"embedded"`, `"folder"` (image files, converted once), `"stream"` (image files, read during
    training), or the name of the torchvision class that fetches the data set."""
    size: int = 0
    """Side in pixels of the square to which images of varying size are scaled and cropped."""


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

DATASETS = {
    # Mean and standard deviation of the 1,500 training images at 32x32.
    "Digits": Info((0.3056,), (0.3234,), 10, "embedded"),
    "MNIST": Info((0.1307,), (0.3081,), 10, "MNIST"),
    "FashionMNIST": Info((0.2860,), (0.3530,), 10, "FashionMNIST"),
    "CIFAR-10": Info((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 10, "CIFAR10"),
    "CIFAR-100": Info((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 100, "CIFAR100"),
    "ImageNette": Info(*_IMAGENET, 10, "Imagenette", 128),
    "ImageWoof": Info(*_IMAGENET, 10, "folder", 128),
    "ImageNet": Info(*_IMAGENET, 1000, "stream", 224),
}

# Images per split: torchvision verifies the archive, but not that all of it was extracted.
IMAGENETTE_LENGTHS = [9469, 3925]


@dataclass(eq=False)
class Split:
    """The training or the test split of a data set."""

    dataset: Any
    """Yields (image, label), the image uint8 [C, H, W]. `resident` needs a `TensorDataset`."""
    mean: tuple[float, ...]
    """Per-channel mean of pixels scaled to 0..1; `std` is the standard deviation."""
    std: tuple[float, ...]
    _resident: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.dataset)

    def normalizer(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Returns a function that normalises uint8 images [N, C, H, W] to float32 on `device`."""
        mean, std = torch.tensor([self.mean, self.std], device=device).view(2, -1, 1, 1)
        return lambda x: x.to(device, non_blocking=True).float().div_(255).sub_(mean).div_(std)

    def resident(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Returns the images, uint8 [N, C, H, W], and labels, int64 [N], on `device`.

        All calls return the same tensors: do not write to them. Returns None if the images are read
        from files, or do not fit on the device.
        """
        device = torch.empty(0, device=device).device  # "cuda" gets its index: one key per device
        if device not in self._resident and isinstance(self.dataset, TensorDataset):
            x, y = self.dataset.tensors
            if fits(x.numel(), device):
                self._resident[device] = x.to(device), y.to(device)
        return self._resident.get(device)


@dataclass(frozen=True)
class DataSet:
    """A data set; `input_shape` is (C, H, W)."""

    name: str
    classes: int
    input_shape: tuple[int, int, int]
    train: Split
    test: Split
    crc32: str | None = None
    """The checksum of the arrays in the npz file; None for image files read during training."""


class Loader:
    """Batches of a split in its own order, on one device; the last batch may be smaller.

    Iterating yields normalised images, float32 [N, C, H, W], and labels, int64 [N]. If the split
    does not fit on the device, worker processes stream it. Do not write to the labels.
    """

    def __init__(self, split: Split, batch_size: int, device: torch.device | str) -> None:
        self.split = split
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._normalize = split.normalizer(self.device)
        self._samples = split.resident(self.device)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._samples is None:
            return _stream(self.split, self.batch_size, self.device)
        x, y = (tensor.split(self.batch_size) for tensor in self._samples)
        return zip(map(self._normalize, x), y)


class TrainingLoader:
    """Shuffled full batches of a split on one device; an incomplete last batch is dropped.

    Like `Loader`, it streams a split that does not fit on the device. The order depends only on
    `seed` (0 or more) and the epoch, so a resumed run gets the same batches, on any device. The
    global random state is not used. Raises UserError if `batch_size` is not in 1..len(split).

    Attributes:
        resident: True if the split is kept on the device.
        position: index of the next batch in the epoch.
    """

    def __init__(self, split: Split, batch_size: int, device: torch.device | str, seed: int = 0):
        if not 1 <= batch_size <= len(split):
            raise UserError(
                f"a batch size of {batch_size} gives no full batch: choose one of 1 to {len(split)}"
            )
        self.split = split
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.seed = seed
        self.position = len(self)
        self._normalize = split.normalizer(self.device)
        self._samples = split.resident(self.device)
        self.resident = self._samples is not None

    def __len__(self) -> int:
        return len(self.split) // self.batch_size

    @property
    def left(self) -> int:
        """Number of batches left in the epoch; 0 before the first `begin`."""
        return len(self) - self.position

    def begin(self, epoch: int, position: int = 0) -> None:
        """Shuffles the samples for an epoch (0 or more), and starts at batch `position`."""
        self.position = position
        # SeedSequence hashes its numbers, so (0, 1) and (1, 0) give unrelated orders. The order is
        # drawn on the CPU, so it is the same for all devices.
        seed = int(np.random.SeedSequence((self.seed, epoch)).generate_state(1)[0])
        order = torch.randperm(len(self.split), generator=torch.Generator().manual_seed(seed))
        if not self.resident:
            rest = order[position * self.batch_size : len(self) * self.batch_size]
            self._streamed = _stream(self.split, self.batch_size, self.device, rest)
        self._order = order.to(self.device)

    def take(self) -> tuple[Tensor, Tensor]:
        """Returns the next batch. Raises ValueError if no batch is left in the epoch."""
        index = self.take_order(1)
        return self.at(index) if self.resident else next(self._streamed)

    def take_order(self, count: int) -> Tensor:
        """Returns the sample indices of the next `count` batches, int64 [count * batch_size].

        They count as returned. A caller with a CUDA graph of `at`, which requires a resident split,
        copies them into the graph's index tensor. Raises ValueError if fewer batches are left.
        """
        if count > self.left:
            raise ValueError(f"{count} batches asked for, {self.left} left: begin an epoch")
        start, self.position = self.position, self.position + count
        return self._order[start * self.batch_size : self.position * self.batch_size]

    def at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the samples at `index`, int64 [N] on the device. Requires a resident split."""
        assert self._samples is not None
        x, y = self._samples
        return self._normalize(x[index]), y[index]

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields all batches of an epoch (0 or more)."""
        self.begin(epoch)
        while self.left:
            yield self.take()


def load_dataset(name: str, data_dir: str | os.PathLike) -> DataSet:
    """Loads a data set. A missing one is fetched once, while other processes wait for it.

    ImageWoof and ImageNet are not fetched: their image files must be in `data_dir`, as
    `imagewoof/{train,val}/<class>/*` and `imagenet/{train,val}/<class>/*`. ImageWoof is converted
    to an npz file once; ImageNet is read image by image during training. Images of these two and of
    ImageNette are scaled and cropped around the centre to `Info.size`.

    Raises UserError for a name missing from `DATASETS`, a file or folder with wrong contents, a
    failed download, or a folder that cannot be written.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    info = DATASETS[name]
    folder = Path(data_dir).expanduser() / name.lower().replace("-", "")
    if info.source == "stream":
        train, test = (Split(d, info.mean, info.std) for d in _image_folders(name, folder))
        return DataSet(name, info.classes, (3, info.size, info.size), train, test)

    path = folder.with_suffix(".npz")
    if info.source == "embedded":
        path = Path(__file__).with_name("digits.npz")
    elif not os.path.lexists(path):  # keeps a link to an unmounted disk
        _make(name, path)
    arrays = _read(path, info)

    splits = []
    for split in ("train", "test"):
        x, y = torch.from_numpy(arrays[f"x_{split}"]), torch.from_numpy(arrays[f"y_{split}"])
        x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
        if info.source == "embedded":  # 8x8 is too small for the CNN's three poolings
            x = F.interpolate(x.float(), size=(32, 32), mode="bilinear").round().to(torch.uint8)
        splits.append(Split(TensorDataset(x, y.long()), info.mean, info.std))
    crc32 = 0
    for key in ARRAYS:
        crc32 = zlib.crc32(np.ascontiguousarray(arrays[key]).data, crc32)
    (train, test), (_, channels, height, width) = splits, x.shape
    return DataSet(name, info.classes, (channels, height, width), train, test, f"{crc32:08x}")


def cores() -> int:
    """Returns the number of CPU cores available to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def fits(size: int, device: torch.device) -> bool:
    """Returns whether `size` bytes take less than half of a GPU's free memory; True for a CPU."""
    return device.type == "cpu" or size < torch.cuda.mem_get_info(device)[0] / 2


def import_torchvision() -> ModuleType:
    """Imports torchvision, even if its compiled operators cannot be loaded.

    With a CPU-only PyTorch, importing PyPI's torchvision fails: "operator torchvision::nms does not
    exist". No data set uses the operators, so it is enough to declare them.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        # Declared after a failure only: an intact torchvision could not define them again.
        boxes = "Tensor dets, Tensor scores"
        torch.library.define("torchvision::nms", f"({boxes}, float iou_threshold) -> Tensor")
        torch.library.define("torchvision::qnms", f"({boxes}, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


def _stream(
    split: Split, batch_size: int, device: torch.device, order: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields batches of the samples at `order` (all samples if None), read by worker processes."""
    normalize = split.normalizer(device)
    batches = DataLoader(
        split.dataset,
        batch_size,
        sampler=None if order is None else order.tolist(),
        num_workers=min(8, cores()),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # leaves the global random state unchanged
    )
    try:
        for x, y in batches:
            yield normalize(x), y.to(device, non_blocking=True)
    except UserError as error:  # PyTorch prepends the worker's traceback to the message
        message = str(error).strip().rpartition("UserError: ")[2]
        raise UserError(message) from error.with_traceback(None)  # a traceback keeps workers alive


def _read(path: Path, info: Info) -> dict[str, np.ndarray]:
    """Loads the four arrays of an npz file; the labels become uint8 [N].

    Raises UserError if the file is damaged, or its arrays do not fit the data set's `info`.
    """
    remedy = f"it must contain {_form(info)}; correct it, or move it away to have it restored"
    with user_errors(path, remedy), np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in ARRAYS}
        for split in ("train", "test"):
            x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
            channels = {3: 1, 4: x.shape[-1]}.get(x.ndim)
            if x.dtype != np.uint8 or x.size == 0 or channels != len(info.mean):
                raise ValueError(f"x_{split} is {x.dtype} {list(x.shape)}")
            if y.dtype.kind not in "iu" or y.shape not in ((len(x),), (len(x), 1)):
                raise ValueError(f"y_{split} is {y.dtype} {list(y.shape)} for {len(x)} images")
            if y.min() < 0 or y.max() >= info.classes:
                raise ValueError(f"y_{split} has labels from {y.min()} to {y.max()}")
            arrays[f"y_{split}"] = y.reshape(-1).astype(np.uint8)  # one crc32 for all label types
        if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
            raise ValueError("the images of x_train and x_test differ in shape")
    return arrays


def _form(info: Info) -> str:
    """Describes the arrays that a data set's npz file must contain."""
    images = "[N, H, W]" if len(info.mean) == 1 else f"[N, H, W, {len(info.mean)}]"
    labels = f"integer labels y_train, y_test [N] from 0 to {info.classes - 1}"
    return f"uint8 images x_train, x_test {images} and {labels}"


def _make(name: str, path: Path) -> None:
    """Fetches a data set and writes its npz file, unless another process has just written it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            if not os.path.lexists(path):
                arrays = _fetch(name, path)
                write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
    except OSError as error:
        remedy = "make room, or choose another data folder"
        raise UserError(f"{path} cannot be written ({one_line(error)}): {remedy}") from error


def _fetch(name: str, path: Path) -> dict[str, np.ndarray]:
    """Returns the arrays of a data set, from torchvision or an image folder next to `path`."""
    info = DATASETS[name]
    if info.source == "folder":
        return _arrays(_image_folders(name, path.with_suffix("")))
    options: list[dict] = [{"train": True}, {"train": False}]
    if info.source == "Imagenette":
        common = _images(info.size) | {"size": "160px"}
        options = [{"split": "train", **common}, {"split": "val", **common}]
    with user_errors(name, f"try again, or make {path} with {_form(info)}", "fetched"):
        source = getattr(import_torchvision().datasets, info.source)
        datasets = [source(path.parent, download=True, **option) for option in options]
    lengths = [len(dataset) for dataset in datasets]
    if info.source == "Imagenette" and lengths != IMAGENETTE_LENGTHS:
        found = f"holds {lengths} images, not {IMAGENETTE_LENGTHS}"
        raise UserError(f"{path.parent}/imagenette2-160 {found}: move it away to fetch it again")
    return _arrays(datasets)


def _arrays(datasets: list) -> dict[str, np.ndarray]:
    """Converts torchvision's training and test data sets to the four arrays of an npz file."""
    arrays: list[np.ndarray] = []
    for dataset in datasets:
        if hasattr(dataset, "data"):
            arrays += [np.asarray(dataset.data), np.asarray(dataset.targets, np.uint8)]
        else:
            with ThreadPoolExecutor() as pool:  # PIL decodes without the GIL
                images, labels = zip(*pool.map(dataset.__getitem__, range(len(dataset))))
            x = torch.stack(images).permute(0, 2, 3, 1).contiguous()
            arrays += [x.numpy(), np.array(labels, np.uint8)]
    return dict(zip(ARRAYS, arrays))


def _image_folders(name: str, root: Path) -> list:
    """Returns the train and val folders as data sets of (uint8 [3, size, size], label)."""
    info = DATASETS[name]
    image_folder = import_torchvision().datasets.ImageFolder
    with user_errors(root, f"put {name} there as train/<class>/* and val/<class>/*"):
        folders = [image_folder(root / split, **_images(info.size)) for split in ("train", "val")]
        train, val = (folder.classes for folder in folders)
        if train != val or len(train) != info.classes:
            counts = f"{len(train)} and {len(val)} class folders"
            raise ValueError(f"train and val have {counts}, not the same {info.classes}")
    return folders


def _images(size: int) -> dict:
    """Returns arguments for torchvision to scale and crop images to uint8 [3, size, size]."""
    transforms = import_torchvision().transforms
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    return {"transform": transforms.Compose(steps), "loader": _open_image}


def _open_image(path: str | os.PathLike) -> object:
    """Loads an image file as an RGB PIL image. Raises UserError if the file is damaged."""
    with user_errors(path, "replace it, or move it away"):
        return import_torchvision().datasets.folder.default_loader(path)
