"""Reading files: pictures, IDX, .npy and .npz, CIFAR-10. Arrays come out as the files have them.

Nothing that is read is ever unpickled, and what cannot be used is an InputError of one line.
"""
import contextlib
import gzip
import hashlib
import math
import sys
import tarfile
import warnings

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from dpm import InputError, first_line

IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
TARS = (".tar.gz", ".tgz", ".tar")
CIFAR = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]


def printable(name):
    """`name` as text that may go to a terminal: what is not printable becomes '?'."""
    return "".join(c if c.isprintable() else "?" for c in str(name))


@contextlib.contextmanager
def one_line(subject):
    """Around all reading. Names from files stand in messages: no control character passes here."""
    try:
        yield
    except InputError as error:
        raise InputError(printable(error)) from None
    except MemoryError:
        raise InputError(f"{printable(subject)}: more than the memory holds; "
                         "give fewer or smaller examples") from None


@contextlib.contextmanager
def _reading(path, kind):
    """Around the reader of one file. Of damaged files readers raise almost anything."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputError(f"{path}: cannot be read as {kind} ({reason})") from None


def read(path, crop=None, resize=None):
    """(train, test or None, notes) of what lies at `path`.

    train is an array, or, with `crop`, a list of pictures that are at least so large. notes are
    sentences on what was changed in reading."""
    if path.is_dir():
        with _reading(path, "a folder"):
            inside = sorted(p for p in path.iterdir() if not p.name.startswith("."))
        names = {p.name for p in inside}
        if names & set(CIFAR):
            with _reading(path, "CIFAR-10"):
                files = {p.name: p.read_bytes() for p in inside if p.name in CIFAR}
            return *_cifar(files, path), ()
        if "data_batch_1" in names:
            raise InputError(f"{path}: {PICKLED}")
        for part in ("cifar-10-batches-bin", "cifar-10-batches-py"):        # one folder too high
            if part in names:
                return read(path / part, crop, resize)
        idx = {part: next((path / name for name in (stem, stem + ".gz") if name in names), None)
               for part, stem in IMAGES.items()}
        if idx["train"]:
            return read_idx(idx["train"]), idx["test"] and read_idx(idx["test"]), ()
        paths = [p for p in inside if p.suffix.lower() in PICTURES and p.is_file()]
        if not paths:
            raise InputError(f"{path}: a folder without pictures ({', '.join(PICTURES)}), without "
                             f"{IMAGES['train']} and without {CIFAR[0]}")
    elif not path.is_file():
        raise InputError(f"{path}: neither a file nor a folder")
    elif path.suffix.lower() in PICTURES:
        paths = [path]
    elif path.name.lower().endswith(TARS):
        return *_cifar_tar(path), ()
    else:
        numpy = path.suffix.lower() in (".npy", ".npz")
        return *(_numpy(path) if numpy else (read_idx(path), None)), ()
    pictures, notes = _pictures(paths, None, crop, resize)
    return pictures, None, notes


# -------------------------------------------------------------------------------------------------
# Arrays
# -------------------------------------------------------------------------------------------------

def read_idx(path, sha256=None):
    """The array of an IDX file, gzipped or not: two zero bytes, the type, the number of axes, each
    length as big-endian uint32, the values. sha256 is what the file must have when unpacked."""
    types = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
    with _reading(path, "an IDX file"):
        with open(path, "rb") as file:
            start = file.read(4)
        if start[:2] == b"\x1f\x8b":
            with gzip.open(path) as file:
                raw = np.frombuffer(bytearray(file.read()), np.uint8)
        elif start[:2] == b"\0\0":                  # only then: another file may be of any size
            raw = np.fromfile(path, np.uint8)
        else:
            raw = np.frombuffer(start, np.uint8)
    if sha256 and hashlib.sha256(raw).hexdigest() != sha256:
        raise InputError(f"{path}: damaged, its checksum is not that of the original; fetch the "
                         "file again")
    if len(raw) < 4 or raw[:2].any() or raw[2] not in types:
        raise InputError(f"{path}: not data that can be read; give an .npy, .npz or IDX file, "
                         "pictures, or CIFAR-10 in its binary version")
    kind, axes = np.dtype(types[int(raw[2])]), int(raw[3])
    if not 1 <= axes <= 4 or len(raw) < 4 + 4 * axes:
        raise InputError(f"{path}: an IDX header of {axes} axes; examples have 1 to 3, and one "
                         "counts them")
    shape, values = tuple(map(int, raw[4:4 + 4 * axes].view(">u4"))), raw[4 + 4 * axes:]
    if len(values) != math.prod(shape) * kind.itemsize:
        raise InputError(f"{path}: damaged, its header promises {shape} values of {kind.name} and "
                         f"{len(values)} bytes follow; fetch the file again")
    return values.view(kind).reshape(shape)


def _numpy(path):
    """(train, test or None) of an .npy or .npz file."""
    with _reading(path, "a NumPy file"), open(path, "rb") as file:
        single = file.read(6) == b"\x93NUMPY"
        file.seek(0)
        # A header may promise anything. Mapping the file compares it with the file's length.
        content = np.load(path, mmap_mode="r") if single else np.load(file)
        if single:
            return np.array(content), None
        with content:
            if "train" in content:
                return content["train"], content["test"] if "test" in content else None
            if len(content.files) == 1:
                return content[content.files[0]], None
            names = ", ".join(content.files) or "nothing"
    raise InputError(f"{path}: holds {names}; name one array 'train' (and one 'test')")


# -------------------------------------------------------------------------------------------------
# CIFAR-10
# -------------------------------------------------------------------------------------------------

PICKLED = ("the Python version of CIFAR-10, which is pickled and is not read; download "
           "cifar-10-binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html")


def _cifar(files, path):
    """(train, test), uint8 (N, 32, 32, 3), of the six files of the binary version, {name: content}.
    A record is a label and three planes of 32 x 32."""
    parts = []
    for name in CIFAR:
        if name not in files:
            raise InputError(f"{path}: {name} is missing; CIFAR-10 is {', '.join(CIFAR)}")
        raw = np.frombuffer(files[name], np.uint8)
        if not len(raw) or len(raw) % 3073 or raw[::3073].max() > 9:
            raise InputError(f"{path}: {name} does not consist of records of CIFAR-10, a label "
                             "from 0 to 9 and 3072 bytes; download it again")
        parts.append(raw.reshape(-1, 3073)[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return np.concatenate(parts[:5]), np.ascontiguousarray(parts[5])


def _cifar_tar(path):
    """The same from the archive as it was downloaded. Nothing is written to the disk."""
    with _reading(path, "an archive of CIFAR-10"):
        files = {}
        with tarfile.open(path) as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                if name == "data_batch_1":
                    raise InputError(f"{path}: {PICKLED}")
                if name in CIFAR and member.isfile():
                    if member.size > 3073 * 10_000:
                        raise InputError(f"{path}: {name} holds more than the 10,000 records of "
                                         "CIFAR-10; download it again")
                    files[name] = tar.extractfile(member).read()
    return _cifar(files, path)


# -------------------------------------------------------------------------------------------------
# Pictures
# -------------------------------------------------------------------------------------------------

def read_pictures(paths, shape=None, any_size=False):
    """The pictures of these files as uint8 (N, H, W, C): all of the size and with the colours of
    `shape` (H, W, C) if there is one, or else of the first's size, and gray if all of them are.

    With any_size they are a list, each (H, W, C) of its own size; C is shape[2] if there is one.
    A line on stderr says what was changed."""
    with one_line("the pictures"):
        pictures, notes = _pictures(list(paths), shape, 1 if any_size else None)
    for note in notes:
        print(note, file=sys.stderr)
    return pictures


def _pictures(paths, shape, crop, resize=None):
    """(pictures, notes). Each file is decoded once, into its place in one array: thousands of them
    are never there twice. With crop, the least side that they may have, they are a list."""
    pictures, size, see_through = [], shape and shape[:2], 0
    for i, path in enumerate(tqdm(paths, "reading pictures", unit="", leave=False, disable=None)):
        picture, transparent = _picture(path, shape and shape[2], resize)
        see_through += transparent
        if crop:
            if min(picture.shape[:2]) < crop:
                raise InputError(f"{path}: {_size(picture.shape)} pixels, smaller than crops of "
                                 f"{crop} x {crop}; take it out of the folder or crop less")
            pictures.append(picture)
            continue
        size = size or picture.shape[:2]
        if picture.shape[:2] != tuple(size):
            help = "give pictures of that size" if shape else "give --crop or --resize"
            raise InputError(f"{path}: {_size(picture.shape)} pixels, where {_size(size)} "
                             f"{'are needed' if shape else 'came before'}; {help}")
        if i == 0:
            pictures = np.empty((len(paths), *picture.shape), np.uint8)
        elif picture.shape[2] > pictures.shape[3]:              # the first colour after gray ones
            pictures = np.repeat(pictures, 3, 3)
        pictures[i] = picture                                   # gray fills three colours
    if crop and any(p.shape[2] == 3 for p in pictures):
        for i, picture in enumerate(pictures):
            pictures[i] = np.broadcast_to(picture, (*picture.shape[:2], 3))
    return pictures, [f"transparent parts of {see_through} pictures laid on white"] * (
        see_through > 0)


def _size(shape):
    return f"{shape[1]} x {shape[0]}"               # as people say it: width x height


def _picture(path, colours, resize):
    """One picture, uint8 (H, W, C), as one sees it, and whether parts of it were transparent.

    Turned upright as its EXIF data says. 16-bit gray becomes bytes by 257, rounded, so that white
    stays white (Pillow itself gives colours of 16 bits their upper byte). `resize` scales the
    shorter side and keeps the middle square."""
    with _reading(path, "a picture"), warnings.catch_warnings():
        warnings.simplefilter("ignore")             # of harmless defects: the picture is there
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            picture = Image.open(path)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise InputError(f"{path}: more than {Image.MAX_IMAGE_PIXELS // 10 ** 6} million "
                             "pixels; cut it into parts") from None
        with picture:
            # Photos of phones (MPO) carry a small copy as a second picture: that one may go.
            if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
                raise InputError(f"{path}: holds {picture.n_frames} pictures (animated, or of "
                                 "several pages); save each as a file of its own")
            if picture.mode == "F" or (picture.mode == "I" and picture.format != "PNG"):
                raise InputError(f"{path}: its pixels are not of 8 or 16 bits; save them as an "
                                 ".npy file of floats, or the picture as PNG")
            deep = picture.mode.startswith("I")     # 16 bits
            gray = deep or picture.mode in ("1", "L", "LA", "La")
            see_through = picture.has_transparency_data
            picture = ImageOps.exif_transpose(picture)
        if deep:
            levels = np.asarray(picture).astype(np.int64)
            picture = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
        elif see_through:
            picture = picture.convert("RGBA")
            see_through = picture.getextrema()[3][0] < 255
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        picture = picture.convert("L" if colours == 1 or (gray and not colours) else "RGB")
        if resize:
            picture = ImageOps.fit(picture, (resize, resize), Image.Resampling.LANCZOS)
        return np.array(picture).reshape(picture.height, picture.width, -1), bool(see_through)
