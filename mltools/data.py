"""Image classification data sets, normalised once and kept on the device.

    data = load("CIFAR-10", "data")
    batches = TrainingLoader(data.train, 128, "cuda", seed=0)
    for epoch in range(50):
        for x, y in batches.epoch(epoch):  # float32 [N, C, H, W] and int64 [N], on the device
            ...
    for x, y in Loader(data.test, 1000, "cuda"):
        ...

`<data_dir>/<name>.npz`, the name in lower case without dashes (`cifar10.npz`), is the data set,
wherever it came from: arrays `x_train`, `y_train`, `x_test`, `y_test`, images uint8 [N, H, W, C],
or [N, H, W] for grey, labels of any integer type, [N] or [N, 1]. Where it is absent torchvision
fetches and verifies the original, and the file is written for the next time.

`Digits` comes with the code (`digits.npz` beside this file) and needs neither network nor
`data_dir`. It is the "Optical Recognition of Handwritten Digits" data set of E. Alpaydin and
C. Kaynak (UCI Machine Learning Repository, CC BY 4.0), in the version that scikit-learn ships:
1,797 images of 8x8 pixels. Changed here: grey levels 0..16 are scaled to 0..255, and a seeded
permutation stratified by class makes 1,500 training and 297 test images of them. `load` enlarges
them to 32x32.
"""

import http.client
import os
import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Subset, TensorDataset

from mltools.archives import read_arrays
from mltools.errors import UserError, one_line
from mltools.files import reading, write_atomically
from mltools.processes import cores

if TYPE_CHECKING:  # its import may fail, see import_torchvision
    from torchvision.datasets import VisionDataset

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


@dataclass(frozen=True)
class Info:
    """What has to be known of a data set before it is read.

    Attributes:
        mean, std: per channel, of pixels in 0..1.
        classes: number of classes.
        source: "embedded", "folder" (an image folder, cached), "stream" (an image folder read
            while training), or the torchvision class that fetches it.
        size: images of varying size are scaled to this shorter side and cropped to its square; 0
            where all have one size.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int
    source: str
    size: int = 0


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

# torchvision verifies the archive, but not that all of it was extracted.
IMAGENETTE_LENGTHS = (9469, 3925)


class Part:
    """The training, validation or test part of a data set.

    Args:
        dataset: yields (uint8 image [C, H, W], label). A `TensorDataset` can be kept on a device.
        mean, std: per channel, of pixels in 0..1.
    """

    def __init__(
        self,
        dataset: "TensorDataset | Subset | VisionDataset",
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        self.dataset = dataset
        self.mean, self.std = mean, std
        self._resident: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def subset(self, index: Tensor) -> "Part":
        """The samples at `index` (int64 [M]), in that order."""
        dataset: TensorDataset | Subset
        if isinstance(self.dataset, TensorDataset):
            dataset = TensorDataset(*(tensor[index] for tensor in self.dataset.tensors))
        else:
            dataset = Subset(self.dataset, index.tolist())
        return Part(dataset, self.mean, self.std)

    def constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation on `device`, float32 [C, 1, 1] each."""
        mean, std = torch.tensor([self.mean, self.std], device=device).view(2, -1, 1, 1)
        return mean, std

    def resident(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """All of the part on `device`: normalised float32 [N, C, H, W] and int64 [N].

        Made at the first call and shared by all later ones, so not to be written to. None where
        the images lie in files, or would not fit.
        """
        device = torch.empty(0, device=device).device  # "cuda" is cuda:0, or whichever is current
        if device not in self._resident:
            if not isinstance(self.dataset, TensorDataset):
                return None
            x, y = self.dataset.tensors
            if not fits(4 * x.numel(), device):
                return None
            x = _normalise(x.to(device), *self.constants(device))
            self._resident[device] = x, y.to(device)
        return self._resident[device]


@dataclass(frozen=True)
class DataSet:
    """A data set; `input_shape` is (C, H, W), `crc32` that of its arrays, if it has an npz file."""

    name: str
    classes: int
    input_shape: tuple[int, int, int]
    train: Part
    test: Part
    validation: Part | None = None
    crc32: str | None = None

    def split(self, fraction: float = 0.85, seed: int = 0) -> "DataSet":
        """Keeps a random `fraction` of `train` and makes the rest the `validation` part.

        Same seed, same split; `test` is untouched.

        Raises:
            UserError: if one of the two would be empty.
        """
        total = len(self.train)
        count = round(fraction * total)
        if not 0 < count < total:
            raise UserError(
                f"a fraction of {fraction} of {total} training images leaves the training or the "
                "validation part empty; choose one between 0 and 1"
            )
        order = _permutation(total, seed)
        train, validation = self.train.subset(order[:count]), self.train.subset(order[count:])
        return replace(self, train=train, validation=validation)


class Loader:
    """The samples of a part in order, in batches on one device, the last one maybe smaller.

    Iterating gives float32 [N, C, H, W] and int64 [N]. The part is kept whole on the device where
    it fits (batches are views of it: do not write to them), and streamed through worker processes
    where not. Both give the same batches.

    Raises:
        UserError: if `batch_size` is below 1.
    """

    def __init__(self, part: Part, batch_size: int, device: torch.device | str):
        _check_batch_size(batch_size)
        self.part = part
        self.batch_size = batch_size
        self.device = torch.device(device)
        self._resident = part.resident(self.device)

    def __len__(self) -> int:
        return -(-len(self.part) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._resident is None:
            return _stream(self.part, self.batch_size, self.device)
        return zip(*(tensor.split(self.batch_size) for tensor in self._resident))


class TrainingLoader:
    """Shuffled full batches of a part on one device; what does not fill a batch is left out.

    As `Loader`, it streams what does not fit on the device. The order depends on `seed` and the
    epoch alone, on every device, so that a resumed run sees what the first would have seen. The
    global random state is neither read nor changed.

    Where the part is kept on the device, so are the order and the position in it: `take` then asks
    nothing of the host, and can be recorded in a CUDA graph.

    Args:
        seed: zero or more.

    Attributes:
        resident: whether the part is kept on the device.

    Raises:
        UserError: if `batch_size` is below 1, or leaves no batch at all.
    """

    def __init__(self, part: Part, batch_size: int, device: torch.device | str, seed: int = 0):
        _check_batch_size(batch_size)
        if batch_size > len(part):
            raise UserError(
                f"a batch size of {batch_size} leaves no full batch of {len(part)} images; "
                "choose a smaller one"
            )
        self.part = part
        self.batch_size = batch_size
        self.device = torch.device(device)
        self.seed = seed
        self._resident = part.resident(self.device)
        self._streamed: Iterator[tuple[Tensor, Tensor]] = iter(())
        self._order = torch.zeros(len(self), batch_size, dtype=torch.int64, device=self.device)
        self._next = torch.zeros(1, dtype=torch.int64, device=self.device)  # batch, in the order

    @property
    def resident(self) -> bool:
        return self._resident is not None

    def __len__(self) -> int:
        return len(self.part) // self.batch_size

    def begin(self, epoch: int, batch: int = 0) -> None:
        """Makes `take` give the batches of an epoch (from 0 up), from the given one on."""
        order = _permutation(len(self.part), self.seed, epoch)[: self._order.numel()]
        if self.resident:
            self._order.copy_(order.view_as(self._order))
            self._next.fill_(batch)
        else:
            order = order[batch * self.batch_size :]
            self._streamed = _stream(self.part, self.batch_size, self.device, order)

    def take(self, count: int = 1) -> tuple[Tensor, Tensor]:
        """The next batch of the epoch, or the next few, one behind the other in both tensors."""
        if self._resident is None:
            images, labels = zip(*(next(self._streamed) for _ in range(count)))
            return torch.cat(images), torch.cat(labels)
        index = self._order[self._next + torch.arange(count, device=self.device)].flatten()
        self._next += count
        x, y = self._resident
        return x[index], y[index]

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches of an epoch."""
        self.begin(epoch)
        for _ in range(len(self)):
            yield self.take()

    def state(self) -> list[Tensor]:
        """The tensors that `take` changes."""
        return [self._next]


def load(name: str, data_dir: str | os.PathLike) -> DataSet:
    """Reads a data set, after fetching it where it is not on disk yet.

    Args:
        name: a key of `DATASETS`, to the letter.
        data_dir: folder of `<name>.npz`; what is fetched is kept there too. ImageWoof (unless
            its npz is there) and ImageNet must lie in it as image folders,
            `imagewoof/{train,val}/<class>/*` and `imagenet/{train,val}/<class>/*`. ImageNet is
            read image by image while training. Images of these two and of ImageNette are scaled
            and cropped around the centre, to `Info.size`.

    Raises:
        UserError: for an unknown name, a file or folder that is not what it should be, or a
            download that failed.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}; choose one of {', '.join(DATASETS)}")
    info = DATASETS[name]
    data_dir = Path(data_dir).expanduser()
    if info.source == "stream":
        train, test = (
            Part(folder, info.mean, info.std) for folder in _image_folders(name, data_dir)
        )
        return DataSet(name, info.classes, (3, info.size, info.size), train, test)

    if info.source == "embedded":
        path = Path(__file__).with_name("digits.npz")
    else:
        path = data_dir / f"{_stem(name)}.npz"
        if _absent(path):
            _save(path, _fetch(name, path))
    arrays = _read(path, info)

    parts = []
    for half in ("train", "test"):
        x, y = torch.from_numpy(arrays[f"x_{half}"]), torch.from_numpy(arrays[f"y_{half}"])
        x = x.unsqueeze(1) if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous()
        if info.source == "embedded":  # 8x8 is too small for three poolings
            x = F.interpolate(x.float(), size=(32, 32), mode="bilinear").round().to(torch.uint8)
        parts.append(Part(TensorDataset(x, y.long()), info.mean, info.std))
    _, channels, height, width = x.shape
    crc32 = 0
    for key in ARRAYS:
        crc32 = zlib.crc32(np.ascontiguousarray(arrays[key]).data, crc32)
    train, test = parts
    shape = channels, height, width
    return DataSet(name, info.classes, shape, train, test, crc32=f"{crc32:08x}")


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes are under half of what is free on `device`."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        try:
            meminfo = Path("/proc/meminfo").read_text()
        except FileNotFoundError:  # not Linux
            meminfo = ""
        available = re.search(r"MemAvailable:\s*(\d+) kB", meminfo)
        free = 1024 * int(available[1]) if available else 8 * 2**30  # a guess
    return size < free / 2


def import_torchvision() -> ModuleType:
    """Imports torchvision, also where its compiled operators cannot be loaded.

    The torchvision of the package index is compiled for CUDA, and beside a CPU-only PyTorch its
    import ends with "operator torchvision::nms does not exist". No data set needs these
    operators, so it is enough to declare the two that the import asks for.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
        # Not before the first attempt: a torchvision that can load its own would then fail.
        # torch.library.define keeps them alive as long as the process.
        boxes = "Tensor dets, Tensor scores"
        torch.library.define("torchvision::nms", f"({boxes}, float iou_threshold) -> Tensor")
        torch.library.define("torchvision::qnms", f"({boxes}, float iou_threshold) -> Tensor")
        import torchvision
    return torchvision


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"the batch size is {batch_size}; it must be 1 or more")


def _stream(
    part: Part, batch_size: int, device: torch.device, order: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of the samples at `order` (all of them if None), read by worker processes."""
    mean, std = part.constants(device)
    batches = DataLoader(
        part.dataset,
        batch_size,
        sampler=None if order is None else order.tolist(),
        num_workers=min(8, cores()),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # else it draws from the global random state
    )
    for x, y in batches:
        x = x.to(device, non_blocking=True)
        yield _normalise(x, mean, std), y.to(device, non_blocking=True)


def _stem(name: str) -> str:
    return name.lower().replace("-", "")


def _absent(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:  # say a folder without permission: no reason to fetch, and `_read` tells
        pass
    return False


def _permutation(length: int, *key: int) -> Tensor:
    """A permutation that depends on `key` alone; drawn on the CPU, so the same on all devices."""
    # SeedSequence mixes its numbers: (0, 1) and (1, 0) have nothing in common.
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def _normalise(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(x / 255 - mean) / std, from uint8 to float32 [N, C, H, W], with one copy."""
    return x.float().div_(255).sub_(mean).div_(std)


def _read(path: Path, info: Info) -> dict[str, np.ndarray]:
    """Reads the four arrays of an npz file, and makes the labels uint8 [N].

    Raises:
        UserError: if they are not a data set of `info`'s channels and classes.
    """
    if info.source == "embedded":
        remedy = "restore it from the repository"
    else:
        remedy = f"it must hold {_form(info)}; correct it, or move it away to have it made again"
    with reading(path, remedy):
        arrays = read_arrays(path, ARRAYS)
        problem = _problem(arrays, info)
        if problem:
            raise ValueError(problem)
    for key in ("y_train", "y_test"):  # the checksum of the data shall not depend on the type
        arrays[key] = arrays[key].reshape(-1).astype(np.uint8)
    return arrays


def _form(info: Info) -> str:
    """Describes the arrays that the npz file of a data set must hold."""
    grey = len(info.mean) == 1
    images = "[N, H, W] or [N, H, W, 1]" if grey else f"[N, H, W, {len(info.mean)}]"
    labels = f"integer labels y_train, y_test [N] from 0 to {info.classes - 1}"
    return f"uint8 images x_train, x_test {images} and {labels}"


def _problem(arrays: dict[str, np.ndarray], info: Info) -> str | None:
    """Describes the first fault of the arrays of a data set; None if they have none."""
    for key in ARRAYS:
        if key not in arrays:
            return f"{key} is missing"
        if arrays[key].size == 0:
            return f"{key} is empty"
    channels = len(info.mean)
    for half in ("train", "test"):
        x, y = arrays[f"x_{half}"], arrays[f"y_{half}"]
        if x.dtype != np.uint8:
            return f"x_{half} is {x.dtype}, not uint8"
        if x.ndim not in (3, 4) or (x.shape[3] if x.ndim == 4 else 1) != channels:
            return f"x_{half} has the shape {list(x.shape)}"
        if y.dtype.kind not in "iu":
            return f"y_{half} is {y.dtype}, not an integer type"
        if y.shape not in ((len(x),), (len(x), 1)):
            return f"y_{half} has the shape {list(y.shape)}, not [{len(x)}], one label per image"
        for label in (y.min(), y.max()):
            if not 0 <= label < info.classes:
                return f"y_{half} has the label {label}"
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        return "the images of x_train and x_test differ in shape"
    return None


def _save(path: Path, arrays: dict[str, np.ndarray]) -> None:
    try:
        write_atomically(path, lambda file: np.savez(file, allow_pickle=False, **arrays))
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}); make room, or choose another data "
            "folder"
        ) from error


def _fetch(name: str, path: Path) -> dict[str, np.ndarray]:
    """The arrays of `path`, from torchvision or from an image folder beside it."""
    info = DATASETS[name]
    if info.source == "folder":
        pairs = [_decode(folder) for folder in _image_folders(name, path.parent)]
        return dict(zip(ARRAYS, (array for pair in pairs for array in pair)))

    source = getattr(import_torchvision().datasets, info.source)
    if info.source == "Imagenette":
        common = {"size": "160px", "transform": _crop(info.size), "loader": _open_image}
        options = [{"split": half, **common} for half in ("train", "val")]
    else:
        options = [{"train": True}, {"train": False}]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        halves = [source(path.parent, download=True, **option) for option in options]
    # RuntimeError is torchvision's, for a wrong checksum or when all mirrors have failed; the last
    # three are what it raises for damaged files that it fetched before.
    except (
        *(OSError, RuntimeError, http.client.HTTPException),
        *(ValueError, KeyError, AssertionError),
    ) as error:
        raise UserError(
            f"cannot fetch {name} ({one_line(error)}): try again, or make {path}, with "
            f"{_form(info)}"
        ) from error

    if info.source != "Imagenette":
        pairs = [(np.asarray(half.data), np.asarray(half.targets, np.uint8)) for half in halves]
    elif tuple(map(len, halves)) == IMAGENETTE_LENGTHS:
        pairs = [_decode(half) for half in halves]
    else:
        raise UserError(
            f"{path.parent / 'imagenette2-160'} holds {len(halves[0])} and {len(halves[1])} "
            f"images, not {' and '.join(map(str, IMAGENETTE_LENGTHS))}; move it away to have it "
            "fetched again"
        )
    return dict(zip(ARRAYS, (array for pair in pairs for array in pair)))


def _image_folders(name: str, data_dir: Path) -> "list[VisionDataset]":
    """The train and val folders as data sets of (uint8 [3, size, size], label)."""
    info = DATASETS[name]
    root = data_dir / _stem(name)
    datasets = import_torchvision().datasets
    try:
        folders = [
            datasets.ImageFolder(root / half, _crop(info.size), loader=_open_image)
            for half in ("train", "val")
        ]
    except OSError as error:
        raise UserError(
            f"cannot read {name} from {root} ({one_line(error)}); put its images there as "
            "train/<class>/* and val/<class>/*"
        ) from error
    train, val = (folder.classes for folder in folders)
    if train != val or len(train) != info.classes:
        raise UserError(
            f"{root}: train has {len(train)} class folders and val {len(val)}; both must have the "
            f"same {info.classes}"
        )
    return folders


def _crop(size: int) -> Callable:
    """From a PIL image to uint8 [C, size, size]: shorter side scaled to `size`, centre cropped."""
    transforms = import_torchvision().transforms
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    return transforms.Compose(steps)


def _open_image(path: str | os.PathLike) -> Image:
    """Reads an image file, as RGB. Raises UserError if it is damaged."""
    with reading(path, "replace it, or take it away"):
        return import_torchvision().datasets.folder.default_loader(path)


def _decode(dataset: "VisionDataset") -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of a data set of files: uint8 [N, H, W, C] and [N]."""
    with ThreadPoolExecutor() as pool:  # PIL decodes outside the interpreter's lock
        images, labels = zip(*pool.map(dataset.__getitem__, range(len(dataset))))
    x = torch.stack(images).permute(0, 2, 3, 1).contiguous()
    return x.numpy(), np.array(labels, np.uint8)
