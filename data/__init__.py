"""Data sets: `load(name_or_path)` reads or makes one, checks it, and normalises it.

    swissroll        the paper's two-dimensional toy, endless, with its exact density;
                     swissroll:0.002 has noise 0.002, not 0.04
    heartbeat        the paper's binary toy: 20 bits, a one in every fifth, at a random phase
    deadleaves       the paper's occluding discs, endless, 32 x 32 pixels; deadleaves:64 has 64
    mnist            the 60,000 + 10,000 digits that lie beside this file, as gzipped IDX
    gravel           a CC0 texture of 512 x 512 pixels beside this file, in crops
    FOLDER           pictures; all of one size, or any sizes with `crop` or `resize`
    FOLDER | FILE    IDX images, gzipped or not: a folder with the file names of MNIST
                     (Fashion-MNIST, say), or one file
    FOLDER | TAR.GZ  the binary version of CIFAR-10, unpacked or as it was downloaded
    FILE.npy|.npz    your own array (N, D), (N, H, W) or (N, H, W, C): uint8, floating point, or
                     zeros and ones; an .npz holds `train` and perhaps `test`, or one array

Every example is handed out flat, as x = (raw - shift) / scale with the same two numbers for all
coordinates, measured on the training part. The bound assumes data of mean 0 and average variance
1, and one scale keeps the likelihood of the raw values one constant away. Bytes are dequantised:
raw = byte + u with u uniform on [0, 1), fresh at every draw. Zeros and ones stay as they are.

`load` raises an InputError of one line where data cannot be used. Beside it: files.py reads,
arrays.py is data from files, endless.py is data made by a law.
"""
from dpm import InputError, generator  # before numpy: dpm keeps BLAS to one thread

import contextlib
import os
import pathlib

import numpy as np

from .arrays import Crops, Data, blocks_of
from .endless import DeadLeaves, Heartbeat, Mixture, SwissRoll
from .files import IMAGES, one_line, printable, read, read_idx, read_pictures

__all__ = ["load", "read_pictures", "printable", "SwissRoll", "DeadLeaves", "Mixture"]

HERE = pathlib.Path(__file__).parent
SHA256 = {"train": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
          "test": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"}
TEXTURES = {"gravel": 64}                           # and the usual size of their crops


def load(name_or_path, crop=None, resize=None, flips=False):
    """The data set of that name, or the one in that file or folder.

    crop    pictures may be larger than this: examples are squares cut from them (see Crops)
    resize  pictures are scaled until their shorter side is this, and the middle square is kept
    flips   pictures are mirrored left to right, at random, when they are drawn

    Raises InputError, one line, where there is none, where it is damaged, or where no model could
    be trained on it."""
    with one_line(name_or_path):
        name, flips = str(name_or_path), bool(flips)
        if crop is not None and resize is not None:
            raise InputError(f"{name}: pictures are either cropped or resized; give only "
                             "one of the two")
        for size in (crop, resize):
            if size is not None and not 4 <= size <= 4096:
                raise InputError(f"{name}: pictures of {size} x {size}; give a size of 4 to 4096")
        dataset = _made(name)
        if dataset and (crop or resize or flips):
            raise InputError(f"{name}: is not made of files of pictures; omit --crop, --resize and "
                             "--flips")
        return dataset or _from_files(name, crop, resize, flips)


# Class, type of the option, its default, least and most value, what the error says
MADE = {"swissroll": (SwissRoll, float, 0.04, 1e-3, 1, "the noise of the roll is a number from "
                      "0.001 to 1, as in swissroll:0.002"),
        "deadleaves": (DeadLeaves, int, 32, 4, 256, "the side of the pictures is a whole number of "
                       "pixels from 4 to 256, as in deadleaves:64")}


def _made(name):
    """The endless data of that name, or None."""
    kind, _, option = name.partition(":")
    if name == "heartbeat":
        return Heartbeat()
    if kind in MADE:
        make, number, usual, least, most, says = MADE[kind]
        with contextlib.suppress(ValueError):
            if least <= (value := number(option or usual)) <= most:
                return make(value)
        raise InputError(f"data set '{name}': {says}")


def _from_files(name, crop, resize, flips):
    if name == "mnist":
        train, test = (read_idx(HERE / "mnist" / f"{IMAGES[part]}.gz", SHA256[part])
                       for part in ("train", "test"))
        notes = ()
    elif name in TEXTURES:
        crop = crop or (None if resize else TEXTURES[name])
        train, test, notes = read(HERE / "textures" / f"{name}.png", crop, resize)
    else:
        if not os.path.exists(name):
            raise InputError(f"no data set or file '{name}': give swissroll, heartbeat, "
                             f"deadleaves, mnist, {', '.join(TEXTURES)}, or the path of an .npy, "
                             ".npz or IDX file, of CIFAR-10, or of a folder of pictures")
        path = pathlib.Path(name).resolve()
        train, test, notes = read(path, crop, resize)
        name = str(path)
    if not isinstance(train, list):
        train, test = _checked(name, train, test)
    if crop:
        shape = train[0].shape
        if len(shape) != 3 or min(shape[:2]) < crop:
            raise InputError(f"{name}: examples of shape {shape}; crops of {crop} x {crop} need "
                             "pictures of that size or larger")
        return Crops(name, list(train), test if test is None else list(test), crop, flips, notes)
    if resize and train.shape[1:3] != (resize, resize):
        raise InputError(f"{name}: an array; only files of pictures can be resized")
    if flips and train.ndim == 2:
        raise InputError(f"{name}: flips are for pictures, and these are vectors")
    if test is None:
        train, test = _split(name, train)
    shape = train.shape[1:] if train.ndim == 4 else (1, 1, train.shape[1])
    train, test = (part.reshape(len(part), -1) for part in (train, test))
    return Data(name, train, test, shape, flips, notes)


def _checked(name, train, test):
    """The arrays as (N, D) or (N, H, W, C), and zeros and ones as bool, if they can be used."""
    parts = [train] if test is None else [train, test]
    for part in parts:
        if part.ndim not in (2, 3, 4) or 0 in part.shape:
            raise InputError(f"{name}: an array of shape {part.shape}; it must be (N, D), "
                             "(N, H, W) or (N, H, W, C)")
        if part.ndim == 4 and part.shape[3] not in (1, 3):
            raise InputError(f"{name}: an array of shape {part.shape}; pictures have 1 or 3 "
                             f"colours, not {part.shape[3]}")
    if all(part.dtype.kind in "biuf" and part.min() >= 0 and part.max() <= 1
           and all(((b == 0) | (b == 1)).all() for b in blocks_of([part])) for part in parts):
        parts = [part.astype(bool) for part in parts]
    for i, part in enumerate(parts):
        if part.dtype not in (np.uint8, bool) and part.dtype.kind != "f":
            raise InputError(f"{name}: values of type {part.dtype}; they must be uint8 (bytes, to "
                             "be dequantised), floating point, or zeros and ones")
        if part.dtype.kind == "f":
            low, high = float(part.min()), float(part.max())
            if not (np.isfinite(low) and np.isfinite(high)):
                raise InputError(f"{name}: holds NaN or infinite values; remove or replace them")
            if max(-low, high) > 1e100:
                raise InputError(f"{name}: values up to {max(-low, high):.3g}, whose squares are "
                                 "too large to compute with; divide them by a constant")
            if part.dtype.itemsize > 8 or not part.dtype.isnative:
                part = part.astype(f"f{min(8, part.dtype.itemsize)}")
        parts[i] = part[..., None] if part.ndim == 3 else part
        if parts[i].shape[1:] != parts[0].shape[1:] or part.dtype != parts[0].dtype:
            raise InputError(f"{name}: test examples of shape {part.shape[1:]} and type "
                             f"{part.dtype}, training examples of {train.shape[1:]} and "
                             f"{train.dtype}; they must agree")
    return parts[0], parts[1] if len(parts) > 1 else None


def _split(name, train):
    """(train, test): a tenth is set aside, seeded. The last rows fill the gaps, in place, so that
    large data is not there twice."""
    number = len(train) // 10
    if len(train) < 20:
        raise InputError(f"{name}: at least 20 examples are needed to set a tenth aside, not "
                         f"{len(train)}; or larger pictures and a size to --crop")
    chosen = generator(np, "split").permutation(len(train))[:number]
    test, rest = train[chosen], len(train) - number
    last = np.setdiff1d(np.arange(rest, len(train)), chosen)
    train[chosen[chosen < rest]] = train[last]
    return train[:rest], test
