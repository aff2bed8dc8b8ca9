"""Data sets: `load(name_or_path)` reads or makes one, checks it, and normalises it.

    swissroll      the paper's two-dimensional toy, endless, with its exact density; swissroll:0.002 has noise 0.002, not 0.04
    heartbeat      the paper's binary toy: 20 bits, a one in every fifth, at a random phase
    mnist          the 60,000 + 10,000 digits that lie beside this file, as gzipped IDX
    FOLDER         pictures, all of one size, or IDX images as below
    FOLDER | FILE  IDX images, gzipped or not: any folder with the file names of MNIST (Fashion-MNIST, say), or one file
    FILE.npy|.npz  your own array (N, D), (N, H, W) or (N, H, W, C), uint8 or floating point, or of zeros and ones (binary);
                   an .npz holds `train` and, if it has one, `test`, or a single array under any name

Every example is handed out flat, as x = (raw - shift) / scale with the same two numbers for all coordinates, measured
on the training part: the bound assumes data of mean 0 and average variance 1, and one scale keeps the likelihood of the
raw values one constant away. Bytes are dequantised: raw = byte + u with u uniform on [0, 1), fresh at every draw. Binary
data stays as it is.
"""
import gzip
import hashlib
import pathlib
import struct
import zipfile
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError
from scipy.special import logsumexp, softmax

from dpm import InputError, first_line, generator

HERE = pathlib.Path(__file__).parent
IMAGES = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
SHA256 = {"train": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
          "test": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"}


class Mixture:
    """Equally many points around each of `centres`, with Gaussian noise of standard deviation sigma: data whose every
    density is known. centres (M, D).

    Since x_t is again such a mixture, everything that the best possible kernel needs is a sum over the centres.
    """

    def __init__(self, centres, sigma):
        self.centres, self.sigma = np.asarray(centres, np.float64), float(sigma)

    def _log_weights(self, x, shrink, variance):
        """log N(x; shrink centre, variance I) for every centre, (n, M); shrink and variance are numbers or columns (n, 1)."""
        square = (x ** 2).sum(1)[:, None] - 2 * shrink * (x @ self.centres.T) + shrink ** 2 * (self.centres ** 2).sum(1)
        return -square / (2 * variance) - 0.5 * x.shape[1] * np.log(2 * np.pi * variance)

    def log_density(self, x):
        """log p(x) in nats, (n,). In blocks: there is a number for each pair of a row and a centre."""
        block = max(1, 10 ** 7 // len(self.centres))
        parts = [logsumexp(self._log_weights(x[i:i + block], 1.0, self.sigma ** 2), axis=1) for i in range(0, len(x), block)]
        return np.concatenate(parts) - np.log(len(self.centres))

    def moments(self, x, alpha_bar):
        """Mean and variance of every coordinate of x_0 given x_t = x (n, D), at the noise level alpha_bar, a number or (n, 1)."""
        variance = alpha_bar * self.sigma ** 2 + 1 - alpha_bar
        gain = np.sqrt(alpha_bar) * self.sigma ** 2 / variance
        weights = softmax(self._log_weights(x, np.sqrt(alpha_bar), variance), axis=1)
        shrunk, mean = 1 - gain * np.sqrt(alpha_bar), weights @ self.centres
        spread = np.maximum(weights @ self.centres ** 2 - mean ** 2, 0)
        return shrunk * mean + gain * x, shrunk ** 2 * spread + self.sigma ** 2 * (1 - alpha_bar) / variance


class Patterns:
    """Bits that are one of `patterns` (M, D), each as likely as any other."""

    def __init__(self, patterns):
        self.patterns = patterns

    def log_density(self, x):
        """log p(x) in nats, (n,); -inf where x is none of them."""
        with np.errstate(divide="ignore"):
            return np.log((x[:, None] == self.patterns).all(2).mean(1))

    def moments(self, x, alpha_bar, rate):
        """(E[x_0 | x_t = x],), (n, D), where each bit was kept with probability alpha_bar, a number or (n, 1), or else drawn from B(rate)."""
        zero, one = rate * (1 - alpha_bar), alpha_bar + rate * (1 - alpha_bar)  # the probabilities of a one in x_t
        log_weights = np.log(one / zero) * (x @ self.patterns.T) + np.log((1 - one) / (1 - zero)) * ((1 - x) @ self.patterns.T)
        return (softmax(log_weights, axis=1) @ self.patterns,)


class Data:
    """A data set: name, shape (H, W, C) of an example (a vector is one pixel of D channels), shift, scale, `train` and
    `test` (N, D) as they were given, `bytes` (dequantise?), `binary`, `mean` of the normalised values, `edges`, the normalised
    values at which the density of bytes jumps most, the ends of the first and the last grey level, `detail`, the size of the
    smallest there is to model, and `truth`, a Mixture or Patterns where the density is known."""

    edges, truth, xp, binary, mean, detail = (), None, np, False, 0.0, 0.004

    def __init__(self, name, train, test, shape):
        self.name, self.train, self.test, self.shape = name, train, test, tuple(shape)
        self.bytes, self.binary = train.dtype == np.uint8, train.dtype == bool
        if self.binary:
            self.shift, self.scale, self.mean = 0.0, 1.0, float(train.mean())
            return
        blocks = np.array_split(train, max(1, len(train) // 4096))      # in blocks: float64 of it all would cost 400 MB
        self.shift = float(sum(block.sum(dtype=np.float64) for block in blocks) / train.size + 0.5 * self.bytes)
        squares = sum(((block + 0.5 * self.bytes - self.shift) ** 2).sum() for block in (b.astype(np.float64) for b in blocks))
        self.scale = float(np.sqrt(squares / train.size + self.bytes / 12))
        if self.bytes:
            self.edges = tuple((level - self.shift) / self.scale for level in (0, 1, 255, 256))
            self.detail = 0.01 / self.scale                             # a hundredth of a grey level

    def to(self, xp):
        """Moves the training part to where xp computes; from then on `draw` makes its batches there, and wants a generator of xp."""
        self.xp, self.train = xp, xp.asarray(self.train)

    def draw(self, number, rng, dtype=np.float64):
        """`number` training examples drawn with replacement, normalised, (number, D). On the device where `train` is."""
        return self.normalise(self.train[rng.integers(0, len(self.train), number)], rng, dtype)

    def held_out(self, number, seed=0):
        """The first `number` test examples, normalised, float64; the same dequantisation for the same seed."""
        return self.normalise(self.test[:number], generator(np, "held out", seed))

    def normalise(self, raw, rng, dtype=np.float64):
        """raw -> x; bytes get their uniform noise here."""
        if self.bytes:
            raw = raw + rng.random(raw.shape, dtype=dtype)
        return ((raw.astype(dtype) - self.shift) / self.scale).astype(dtype)


class SwissRoll(Data):
    """phi = 1.5 pi (1 + 2u), u uniform: (phi cos phi, phi sin phi), centred and scaled to average variance 1, then noise.

    Endless: every draw is fresh. Its density is a line integral, here a midpoint sum of points a sixth of the
    noise apart: exact to 1e-5 nats in the mean. (The paper does not give its noise.)
    """

    def __init__(self, noise=0.04, points=None):
        self.name, self.shape, self.bytes, self.shift, self.scale = f"swissroll:{noise}", (1, 1, 2), False, 0.0, 1.0
        if noise == 0.04:
            self.name = "swissroll"
        points, self.detail = points or round(80 / noise), noise / 10
        fine = self._curve((np.arange(200_000) + 0.5) / 200_000)
        self._mean, self._size = fine.mean(0), np.sqrt(fine.var(0).mean())
        self.noise, self.truth = noise, Mixture(self._roll((np.arange(points) + 0.5) / points), noise)

    @staticmethod
    def _curve(u):
        phi = 1.5 * np.pi * (1 + 2 * u)
        return np.stack([phi * np.cos(phi), phi * np.sin(phi)], 1)

    def _roll(self, u):
        return (self._curve(u) - self._mean) / self._size

    def to(self, xp):
        """Does nothing: two numbers a point are made on the host as fast as they are used."""

    def draw(self, number, rng, dtype=np.float64):
        x = self._roll(rng.random(number))
        return (x + self.noise * rng.standard_normal(x.shape)).astype(dtype)

    def held_out(self, number, seed=0):
        return self.draw(number, generator(np, "held out", seed))


class Heartbeat(Data):
    """20 bits with a one in every fifth, the phase uniform over five: a true log likelihood of log 1/5 (section 3.1.2)."""

    def __init__(self):
        self.name, self.shape, self.bytes, self.binary, self.shift, self.scale, self.mean = "heartbeat", (1, 1, 20), False, True, 0.0, 1.0, 0.2
        self.truth = Patterns((np.arange(20) % 5 == np.arange(5)[:, None]).astype(np.float64))

    to = SwissRoll.to

    def draw(self, number, rng, dtype=np.float64):
        return self.truth.patterns[rng.integers(0, 5, number)].astype(dtype)

    def held_out(self, number, seed=0):
        """The five phases in turn, since there is nothing else to hold out."""
        return self.truth.patterns[np.arange(number) % 5]


def load(name_or_path):
    """The data set of that name, or the one in that file or folder.

    Raises InputError, one line, where there is none, where it is damaged, or where no model could be trained on it."""
    name, _, noise = str(name_or_path).partition(":")
    if name == "swissroll":
        try:
            noise = float(noise or 0.04)
        except ValueError:
            noise = 0
        if not 1e-3 <= noise <= 1:
            raise InputError(f"data set '{name_or_path}': the noise of the roll is a number from 0.001 to 1, as in swissroll:0.002")
        return SwissRoll(noise)
    if name_or_path == "heartbeat":
        return Heartbeat()
    if name_or_path == "mnist":
        train, test = (_read_idx(HERE / "mnist" / f"{IMAGES[part]}.gz", SHA256[part]) for part in ("train", "test"))
        return _checked("mnist", train, test)
    path = pathlib.Path(name_or_path)
    if not path.exists():
        raise InputError(f"no data set or file '{name_or_path}': give swissroll, heartbeat, mnist, or the path of an .npy, .npz or IDX file or folder")
    if path.is_dir():
        found = {part: next((path / (stem + end) for end in ("", ".gz") if (path / (stem + end)).exists()), None)
                 for part, stem in IMAGES.items()}
        if found["train"] is None:
            train, test = read_pictures(sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES) or [path]), None
        else:
            train, test = _read_idx(found["train"]), found["test"] and _read_idx(found["test"])
    elif path.suffix in (".npy", ".npz"):
        train, test = _read_numpy(path)
    else:
        train, test = _read_idx(path), None
    return _checked(str(name_or_path), train, test)


def _read_idx(path, sha256=None):
    """An IDX file, gzipped or not: two zero bytes, the type, the number of axes, each length as big-endian uint32, data."""
    types = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch the file again") from None
    if sha256 and hashlib.sha256(raw).hexdigest() != sha256:
        raise InputError(f"{path}: damaged, its checksum is not that of the original; fetch the file again")
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in types or len(raw) < 4 + 4 * raw[3]:
        raise InputError(f"{path}: not an IDX file; data can be .npy, .npz or IDX")
    shape = struct.unpack(f">{raw[3]}I", raw[4:4 + 4 * raw[3]])
    dtype, start = np.dtype(types[raw[2]]), 4 + 4 * raw[3]
    if len(raw) - start != np.prod(shape, dtype=np.int64) * dtype.itemsize:
        raise InputError(f"{path}: damaged, its header promises {shape} values of {dtype.name} and {len(raw) - start} bytes follow")
    return np.frombuffer(raw, dtype, offset=start).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def read_pictures(paths, shape=None):
    """Pictures as uint8 (N, H, W, C), gray if all of them are, or as the shape (H, W, C) that they must have says."""
    pictures = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                gray = shape[2] == 1 if shape else picture.mode in ("1", "L")
                pictures.append(np.asarray(picture.convert("L" if gray else "RGB")))
        except FileNotFoundError:
            raise InputError(f"{path}: no such picture") from None
        except IsADirectoryError:
            raise InputError(f"{path}: a folder without pictures ({', '.join(PICTURES)}) and without {IMAGES['train']}") from None
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(f"{path}: not a picture that can be read ({first_line(error)})") from None
        expected = shape[:2] if shape else pictures[0].shape[:2]
        if pictures[-1].shape[:2] != tuple(expected):
            raise InputError(f"{path}: {pictures[-1].shape[1]} x {pictures[-1].shape[0]} pixels, where {expected[1]} x {expected[0]} are needed")
    if any(p.ndim == 3 for p in pictures):  # gray ones among colours
        pictures = [p if p.ndim == 3 else np.repeat(p[:, :, None], 3, 2) for p in pictures]
    return np.stack([p.reshape(*p.shape[:2], -1) for p in pictures])


def _read_numpy(path):
    """(train, test or None) of an .npy or .npz file; nothing in it is ever unpickled."""
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return content, None
        with content:
            if "train" in content:
                return content["train"], content["test"] if "test" in content else None
            if len(content.files) == 1:
                return content[content.files[0]], None
            names = ", ".join(content.files)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: cannot be read as a NumPy file ({first_line(error)})") from None
    raise InputError(f"{path}: holds {names}; name one of them 'train' (and one 'test')")


def _checked(name, train, test):
    """Data of these arrays, if a model can be trained on them; without a test part a tenth is split off, seeded."""
    if all(part.dtype.kind in "iuf" and ((part == 0) | (part == 1)).all() for part in (train, test) if part is not None):
        train, test = train.astype(bool), None if test is None else test.astype(bool)
    for part in (train,) if test is None else (train, test):
        if part.ndim not in (2, 3, 4) or 0 in part.shape:
            raise InputError(f"{name}: an array of shape {part.shape}; it must be (N, D), (N, H, W) or (N, H, W, C)")
        if part.ndim == 4 and part.shape[3] not in (1, 3):
            raise InputError(f"{name}: an array of shape {part.shape}; pictures have 1 or 3 colours, not {part.shape[3]}")
        if part.dtype not in (np.uint8, bool) and part.dtype.kind != "f":
            raise InputError(f"{name}: values of type {part.dtype}; they must be uint8 (bytes, to be dequantised), floating point, or zeros and ones")
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            raise InputError(f"{name}: holds NaN or infinite values; remove or replace them")
        if part.shape[1:] != train.shape[1:] or part.dtype != train.dtype:
            raise InputError(f"{name}: test examples of shape {part.shape[1:]} and type {part.dtype}, training examples of "
                             f"{train.shape[1:]} and {train.dtype}; they must agree")
    if test is None:
        if len(train) < 20:
            raise InputError(f"{name}: {len(train)} examples; at least 20 are needed to set a tenth aside")
        order = generator(np, "split").permutation(len(train))
        train, test = train[order[len(train) // 10:]], train[order[:len(train) // 10]]
    shape = (1, 1, train.shape[1]) if train.ndim == 2 else (*train.shape[1:], 1)[:3]
    dataset = Data(name, train.reshape(len(train), -1), test.reshape(len(test), -1), shape)
    if train.min() == train.max() or not 0 < dataset.scale < np.inf:
        raise InputError(f"{name}: every value is {train.flat[0]}, or all but; constant data has no scale")
    return dataset
