"""Data sets and batches agree with independent formulas; a bad file is reported in one line."""

import io
import os
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from mltools import data
from mltools.data import DATASETS, Info, Loader, Split, TrainingLoader, load_dataset
from mltools.errors import UserError

CIFAR = Info((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 10, "CIFAR10")  # as in 2019


def arrays(train=23, test=7, shape=(4, 5, 3), **replaced):
    """Draws the arrays of an npz file; `replaced` overrides some of them."""
    rng = np.random.default_rng(0)
    result = {}
    for split, count in (("train", train), ("test", test)):
        result[f"x_{split}"] = rng.integers(0, 256, (count, *shape), dtype=np.uint8)
        result[f"y_{split}"] = rng.integers(0, 10, count, dtype=np.uint8)
    return result | replaced


def npz(**replaced):
    file = io.BytesIO()
    np.savez(file, **arrays(**replaced))
    return file.getvalue()


def normalised(x, info=CIFAR):
    """Normalises images [N, H, W, C] to [N, C, H, W], in float64."""
    return ((x / 255.0 - np.array(info.mean)) / np.array(info.std)).transpose(0, 3, 1, 2)


def numbered(count=23):
    """Makes a split whose i-th image has the label i, and i as its pixel (0, 0, 0)."""
    x = torch.zeros(count, 3, 4, 5, dtype=torch.uint8)
    x[:, 0, 0, 0] = torch.arange(count)
    return Split(TensorDataset(x, torch.arange(count)), CIFAR.mean, CIFAR.std)


def numbers(batches):
    """Returns the numbers of the samples in `numbered` batches; images and labels must agree."""
    x, y = (torch.cat(tensors).cpu() for tensors in zip(*batches))
    assert x.shape[1:] == (3, 4, 5) and (x.dtype, y.dtype) == (torch.float32, torch.int64)
    pixel = (x[:, 0, 0, 0] * CIFAR.std[0] + CIFAR.mean[0]) * 255
    assert torch.equal(pixel.round().long(), y)
    return y.tolist()


def error_line(name, folder):
    """Returns the one-line message of the UserError that loading a data set raises."""
    with pytest.raises(UserError) as caught:
        load_dataset(name, folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["resident", "streamed"])
def resident(request, monkeypatch):
    monkeypatch.setattr(data, "fits", lambda size, device: request.param)
    monkeypatch.setattr(data, "cores", lambda: 1)  # one worker process
    return request.param


@pytest.mark.parametrize(
    "shape, label_type, label_shape",
    [((4, 5, 3), "u1", (-1,)), ((28, 28), ">i4", (-1, 1)), ((6, 7, 1), "i8", (-1,))],
    ids=["colour", "grey", "one-channel"],
)
def test_an_npz_file_is_normalised(tmp_path, shape, label_type, label_shape):
    name, info = ("CIFAR-10", CIFAR) if shape[-1] == 3 else ("MNIST", DATASETS["MNIST"])
    content = arrays(shape=shape)
    labels = {
        key: content[key].astype(label_type).reshape(label_shape) for key in ("y_train", "y_test")
    }
    file = tmp_path / f"{name.lower().replace('-', '')}.npz"
    file.write_bytes(npz(shape=shape, **labels))
    loaded = load_dataset(name, str(tmp_path))
    channels = len(info.mean)
    assert (loaded.name, loaded.classes, loaded.input_shape) == (name, 10, (channels, *shape[:2]))
    for split in ("train", "test"):
        ((x, y),) = Loader(getattr(loaded, split), 100, "cpu")
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64) and x.is_contiguous()
        images = content[f"x_{split}"].reshape(len(x), *shape[:2], channels)
        np.testing.assert_allclose(x, normalised(images, info), rtol=0, atol=2e-6)
        np.testing.assert_array_equal(y, content[f"y_{split}"])
    joined = b"".join(content[key].tobytes() for key in ("x_train", "y_train", "x_test", "y_test"))
    assert loaded.crc32 == f"{zlib.crc32(joined):08x}"  # the same for all label types


def test_digits_are_embedded_and_enlarged_bilinearly(tmp_path):
    digits = load_dataset("Digits", tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    assert (digits.classes, digits.input_shape) == (10, (1, 32, 32))
    assert (len(digits.train), len(digits.test)) == (1500, 297)
    assert digits.crc32 == "280cb963"  # recorded in earlier results
    ((x, _),) = Loader(digits.train, 1500, "cpu")
    assert abs(x.mean()) < 1e-3 and abs(x.std() - 1) < 1e-3
    with np.load(Path(data.__file__).with_name("digits.npz")) as archive:
        small = archive["x_train"].astype(float)
    # Weights of an axis: output pixel i is interpolated at (i + 1/2) / 4 - 1/2, clamped.
    at = np.clip((np.arange(32) + 0.5) / 4 - 0.5, 0, 7)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(8)))
    pixels = digits.train.dataset.tensors[0][:, 0].numpy()
    assert np.abs(pixels - weights @ small @ weights.T).max() <= 0.5001


def test_the_error_of_an_unknown_name_lists_the_known_names(tmp_path):
    line = error_line("cifar10", tmp_path)
    assert "'cifar10'; choose one of Digits, MNIST, " in line and line.endswith(", ImageNet")


EXPECTED = (
    "it must contain uint8 images x_train, x_test [N, H, W, 3] and integer labels y_train, y_test "
    "[N] from 0 to 9; correct it, or move it away to have it restored"
)
ZEROS = np.zeros(23, np.uint8)
BAD_FILES = {
    "x_train is float64 [23, 4, 5, 3]": npz(x_train=np.zeros((23, 4, 5, 3))),
    "x_train is uint8 [23, 3, 4, 5]": npz(shape=(3, 4, 5)),
    "x_test is uint8 [0, 4, 5, 3]": npz(test=0),
    "y_train is float64 [23] for 23 images": npz(y_train=np.zeros(23)),
    "y_train is uint8 [23, 10] for": npz(y_train=np.eye(10, dtype=np.uint8)[ZEROS]),
    "y_train is uint8 [22] for 23": npz(y_train=ZEROS[:22]),
    "y_test has labels from 256 to 256": npz(y_test=np.full(7, 256)),
    "y_train has labels from -1 to 9": npz(y_train=np.arange(23) % 11 - 1),
    "y_train has labels from 0 to 10": npz(y_train=np.arange(23) % 11),
    "x_train and x_test differ": npz(x_test=np.zeros((7, 5, 5, 3), np.uint8)),
    "y_test is not a file": npz().replace(b"y_test", b"t_test"),
    "File is not a zip file": npz()[:1000],
    "allow_pickle=False": npz(x_train=np.array([print], dtype=object)),
}


@pytest.mark.parametrize("problem, content", BAD_FILES.items(), ids=BAD_FILES)
def test_a_bad_file_is_reported_with_its_path_problem_and_remedy(tmp_path, problem, content):
    (tmp_path / "cifar10.npz").write_bytes(content)
    line = error_line("CIFAR-10", tmp_path)
    assert line.startswith(f"{tmp_path / 'cifar10.npz'} cannot be read (") and problem in line
    assert line.endswith(EXPECTED)


def test_a_dangling_link_is_not_replaced(tmp_path):
    (tmp_path / "cifar10.npz").symlink_to("nowhere.npz")
    assert "cifar10.npz cannot be read (No such file" in error_line("CIFAR-10", tmp_path)


class Fetched:
    """Replaces a data set class of torchvision, and counts the downloads."""

    downloads, error = 0, None

    def __init__(self, root, train, download):
        assert download and Path(root).is_dir()
        type(self).downloads += 1
        time.sleep(0.1)
        if self.error:
            raise self.error
        content, split = arrays(), "train" if train else "test"
        self.data, self.targets = content[f"x_{split}"], content[f"y_{split}"].tolist()

    def __len__(self):
        return len(self.data)


@pytest.fixture
def fetched(monkeypatch):
    monkeypatch.setattr(Fetched, "downloads", 0)
    monkeypatch.setattr(data.import_torchvision().datasets, "CIFAR10", Fetched)
    return Fetched


def test_threads_that_load_a_missing_data_set_together_fetch_it_once(tmp_path, fetched):
    barrier = threading.Barrier(4)

    def load_at_once(_):
        barrier.wait()
        return load_dataset("CIFAR-10", tmp_path / "a" / "b")

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(load_at_once, range(4))
    assert fetched.downloads == 2  # one for each split
    assert {dataset.crc32 for dataset in others} == {first.crc32}
    assert first.train.dataset.tensors[1].tolist() == arrays()["y_train"].tolist()


def test_an_existing_file_is_read_without_a_lock(tmp_path):
    (tmp_path / "cifar10.npz").write_bytes(npz())
    load_dataset("CIFAR-10", tmp_path)
    assert os.listdir(tmp_path) == ["cifar10.npz"]


@pytest.mark.parametrize("kind", [ConnectionResetError, RuntimeError])
def test_a_failed_download_is_reported_with_the_file_to_make(tmp_path, fetched, monkeypatch, kind):
    monkeypatch.setattr(fetched, "error", kind("no route\nto host"))
    line = error_line("CIFAR-10", tmp_path)
    assert line.startswith("CIFAR-10 cannot be fetched (no route to host): try again")
    assert f"make {tmp_path / 'cifar10.npz'} with uint8 images" in line
    assert not (tmp_path / "cifar10.npz").exists()


def test_a_folder_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / ".cifar10.npz.lock").mkdir()
    for folder in (tmp_path, tmp_path / "file"):
        line = error_line("CIFAR-10", folder)
        assert line.startswith(f"{folder / 'cifar10.npz'} cannot be written (")


def test_a_full_disk_leaves_no_file(tmp_path, fetched, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    line = error_line("CIFAR-10", tmp_path)
    assert "cifar10.npz cannot be written (No space left on device): make room" in line
    assert {path.name for path in tmp_path.iterdir()} <= {".cifar10.npz.lock"}


@pytest.fixture
def image_folder(tmp_path, monkeypatch):
    """Returns a function that makes image folders of two classes, for data sets of 8x8 images."""
    for name in ("ImageWoof", "ImageNet", "ImageNette"):
        monkeypatch.setitem(DATASETS, name, replace(DATASETS[name], classes=2, size=8))

    def make(name):
        for split, count in (("train", 3), ("val", 2)):
            for label in range(2):
                (tmp_path / name / split / "ab"[label]).mkdir(parents=True)
                for number in range(count):
                    image = Image.new("RGB", (32, 16))  # black outside the central square
                    image.paste((10 + label, 20 * number, 255), (8, 0, 24, 16))
                    image.save(tmp_path / name / split / "ab"[label] / f"{number}.png")
        return tmp_path / name

    return make


COLOURS = [[10 + label, 20 * number, 255] for label in range(2) for number in range(3)]


def test_imagewoof_is_scaled_cropped_and_saved(tmp_path, image_folder):
    root = image_folder("imagewoof")
    woof = load_dataset("ImageWoof", tmp_path)
    assert (woof.input_shape, len(woof.train), len(woof.test)) == ((3, 8, 8), 6, 4)
    x, y = woof.train.dataset.tensors
    assert y.tolist() == [0, 0, 0, 1, 1, 1] and x[:, :, 3, 3].tolist() == COLOURS
    assert (x[:, 2, :, 1:-1] == 255).all() and (x[:, 2] > 100).all()  # the black sides are cropped
    root.rename(tmp_path / "gone")
    assert load_dataset("ImageWoof", tmp_path).crc32 == woof.crc32


def test_imagenet_is_streamed_and_never_saved(tmp_path, image_folder):
    image_folder("imagenet")
    net = load_dataset("ImageNet", tmp_path)
    assert (net.input_shape, len(net.train), len(net.test), net.crc32) == ((3, 8, 8), 6, 4, None)
    ((x, y),) = Loader(net.train, 6, "cpu")
    assert y.tolist() == [0, 0, 0, 1, 1, 1] and not TrainingLoader(net.train, 2, "cpu").resident
    expected = normalised(np.array(COLOURS)[:, None, None], DATASETS["ImageNet"])
    np.testing.assert_allclose(x[:, :, 3:4, 3:4], expected, atol=2e-6)
    assert os.listdir(tmp_path) == ["imagenet"]


def test_imagenette_is_fetched_and_must_be_complete(tmp_path, image_folder, monkeypatch):
    datasets = data.import_torchvision().datasets

    def fake(root, split, size, transform, loader, download):
        assert download and size == "160px"
        return datasets.ImageFolder(root / "images" / split, transform, loader=loader)

    image_folder("images")
    monkeypatch.setattr(datasets, "Imagenette", fake)
    assert "holds [6, 4] images, not [9469, 3925]: move" in error_line("ImageNette", tmp_path)
    monkeypatch.setattr(data, "IMAGENETTE_LENGTHS", [6, 4])
    assert load_dataset("ImageNette", tmp_path).test.dataset.tensors[1].tolist() == [0, 0, 1, 1]
    assert (tmp_path / "imagenette.npz").exists()


@pytest.mark.parametrize("name", ["ImageWoof", "ImageNet"])
def test_a_damaged_image_is_reported_in_one_line(tmp_path, image_folder, name):
    path = image_folder(name.lower()) / "val" / "b" / "1.png"
    path.write_bytes(b"text")
    with pytest.raises(UserError) as caught:
        list(Loader(load_dataset(name, tmp_path).test, 2, "cpu"))
    line = str(caught.value)
    assert line.startswith(f"{path} cannot be read (") and "\n" not in line
    assert line.endswith("): replace it, or move it away")


@pytest.mark.parametrize("name", ["ImageWoof", "ImageNet"])
def test_bad_image_folders_are_refused(tmp_path, image_folder, name):
    line = error_line(name, tmp_path)
    remedy = f"put {name} there as train/<class>/* and val/<class>/*"
    assert line.startswith(f"{tmp_path / name.lower()} cannot be") and line.endswith(remedy)
    root = image_folder(name.lower())
    (root / "val" / "b").rename(root / "val" / "c")
    assert "have 2 and 2 class folders, not the same 2" in error_line(name, tmp_path)


def test_a_loader_gives_all_samples_in_order(device, resident):
    loader = Loader(numbered(), 10, device)
    assert [len(y) for _, y in loader] == [10, 10, 3]
    assert numbers(loader) == list(range(23))
    assert {tensor.device.type for batch in loader for tensor in batch} == {device}


@pytest.mark.parametrize("batch_size, count", [(10, 2), (12, 1), (23, 1)])
def test_training_batches_are_full_and_in_seeded_order(device, resident, batch_size, count):
    loader = TrainingLoader(numbered(), batch_size, device, seed=5)
    before = torch.get_rng_state()
    batches = list(loader.epoch(7))
    assert torch.equal(torch.get_rng_state(), before)  # the global random state is unchanged
    assert [len(y) for _, y in batches] == [batch_size] * count and len(loader) == count
    mixed = int(np.random.SeedSequence([5, 7]).generate_state(1)[0])
    order = torch.randperm(23, generator=torch.Generator().manual_seed(mixed)).tolist()
    assert numbers(batches) == order[: batch_size * count]
    assert {tensor.device.type for batch in batches for tensor in batch} == {device}


@pytest.mark.parametrize("position", range(6))
def test_an_epoch_resumes_at_any_batch(device, resident, position):
    loader = TrainingLoader(numbered(), 4, device, 3)
    assert (len(loader), loader.left, loader.resident) == (5, 0, resident)
    whole = numbers(loader.epoch(6))
    loader.begin(6, position)
    rest = []
    while loader.left:
        assert (loader.position, loader.left) == (position + len(rest), 5 - loader.position)
        rest.append(loader.take())
    assert [y.tolist() for _, y in rest] == [whole[i : i + 4] for i in range(4 * position, 20, 4)]
    with pytest.raises(ValueError, match="1 batches asked for, 0 left"):
        loader.take()


def test_more_batches_than_are_left_are_refused(resident):
    loader = TrainingLoader(numbered(), 4, "cpu")
    loader.begin(0, 3)
    with pytest.raises(ValueError, match="3 batches asked for, 2 left"):
        loader.take_order(3)
    assert loader.position == 3


def test_a_split_is_on_a_device_once(device):
    split = numbered()
    names = [device, device, torch.empty(0, device=device).device]  # "cuda", and "cuda:0"
    images = [split.resident(torch.device(name))[0] for name in names]
    assert len({each.data_ptr() for each in images}) == 1
    assert (images[0].device.type, images[0].dtype) == (device, torch.uint8)


def test_an_image_needs_a_byte_for_each_number(monkeypatch):
    sizes, split = [], numbered()
    monkeypatch.setattr(data, "fits", lambda size, device: sizes.append(size))
    split.resident(torch.device("cpu"))
    assert sizes == [split.dataset.tensors[0].nbytes]


@pytest.mark.parametrize("size", [0, 24])
def test_bad_batch_sizes_are_refused(size):
    with pytest.raises(UserError, match=f"a batch size of {size} .* choose one of 1 to 23"):
        TrainingLoader(numbered(), size, "cpu")


def test_data_fits_if_it_needs_under_half_of_the_free_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (200, 1000))
    assert data.fits(99, torch.device("cuda")) and not data.fits(100, torch.device("cuda"))
    assert data.fits(2**50, torch.device("cpu"))  # loaded already
