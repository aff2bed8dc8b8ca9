"""Data sets that are arrays: examples as they were given, or crops of larger pictures."""
import hashlib
import math
import pathlib

import numpy as np

from dpm import InputError, generator

from .files import printable


def blocks_of(arrays):
    """The arrays in parts of some million values: float64 of it all would cost too much."""
    for array in arrays:
        yield from np.array_split(array, min(len(array), 1 + (array.size >> 20)))


def fingerprint(*things):
    """sha256 of arrays, with their types and shapes, and of anything else by its repr."""
    total = hashlib.sha256()
    for thing in things:
        if not isinstance(thing, np.ndarray):
            total.update(repr(thing).encode())
            continue
        total.update(f"{thing.dtype.str}{thing.shape}".encode())
        for block in blocks_of([thing]):
            total.update(np.ascontiguousarray(block))
    return total.hexdigest()


class Data:
    """A data set.

    name         what `load` finds it by from any directory: of a file, the absolute path
    shape        (H, W, C) of an example; a vector is one pixel of D channels
    shift, scale x = (raw - shift) / scale
    train, test  (N, D) as they were given; None where examples are made when they are drawn
    bytes        are the values bytes, to be dequantised?
    dequantise   may be set to False: then a byte stands for the middle of its grey level
    binary       are they zeros and ones?
    mean         of the normalised values
    edges        the normalised values at which the density of bytes jumps most, at most eight:
                 ends of grey levels, such as that of paper or of saturated ink
    detail       the size of the smallest thing there is to model, in normalised units
    truth        a Mixture or Patterns of the normalised values where their density is known
    digest       sha256 of what the data is: its values, or the law of endless data
    xp           the module of arrays that `draw` computes with, and whose generator it wants"""

    edges, truth, xp, bytes, binary, mean, detail = (), None, np, False, False, 0.0, 0.004
    train = test = None
    dequantise = True
    shift, scale = 0.0, 1.0

    def __init__(self, name, train, test, shape, flips=False, notes=()):
        self.name, self.train, self.test, self.shape = name, train, test, tuple(shape)
        self.flips, self.notes = flips, notes
        self._measure([train])
        self.digest = fingerprint(train, test, self.shape, flips)

    def _measure(self, parts):
        """Everything that follows from the values of the training part, in `parts`."""
        size, self.bytes = sum(part.size for part in parts), parts[0].dtype == np.uint8
        self.binary = parts[0].dtype == bool
        if self.bytes or self.binary:               # counts say all, exactly
            counts = sum(np.bincount(block.ravel().view(np.uint8), minlength=256)
                         for block in blocks_of(parts))
            levels, seen = np.arange(256), np.flatnonzero(counts)
            self.range = int(seen[0]), int(seen[-1])
            mean = float(counts @ levels / size)
            variance = float(counts @ (levels - mean) ** 2 / size)
        else:
            self.range = (min(float(block.min()) for block in blocks_of(parts)),
                          max(float(block.max()) for block in blocks_of(parts)))
            mean = sum(float(block.sum(dtype=np.float64)) for block in blocks_of(parts)) / size
            variance = sum(float(((block.astype(np.float64) - mean) ** 2).sum())
                           for block in blocks_of(parts)) / size
        low, high = self.range
        if low == high:
            raise InputError(f"{self.name}: every value is {low}; constant data has no scale")
        if not self.binary and not 1e-100 < math.sqrt(variance):
            raise InputError(f"{self.name}: values from {low:.3g} to {high:.3g}, whose squares "
                             "are too small to compute with; multiply them by a constant")
        if self.binary:
            self.mean = mean
            return
        if not self.bytes and low >= 0 and high <= 256:
            some = np.asarray(parts[0][:1000], np.float64)
            if (high > 128 and self.shape[0] > 1) or any(
                    np.abs(some * k - np.rint(some * k)).max() < 1e-4 for k in (1, 255, 256)):
                self.notes = *self.notes, "they look like bytes: to have them as such, save uint8"
        self.shift = mean + 0.5 * self.bytes        # u is 1/2 on average, and 1/12 its variance
        self.scale = math.sqrt(variance + self.bytes / 12)
        if self.bytes:
            shares = counts / size                  # the density jumps where these differ
            jumps = np.abs(np.diff(shares, prepend=0, append=0))
            edges = np.sort(np.argsort(jumps, kind="stable")[-8:])
            self.edges = tuple(float((level - self.shift) / self.scale)
                               for level in edges if jumps[level] > 0.002)
            self.detail = 0.01 / self.scale         # a hundredth of a grey level

    def describe(self):
        """One line: what was assumed of this data."""
        H, W, C = self.shape
        of = f"{H} x {W} x {C}" if H * W > 1 else f"{C} numbers"
        return self._line(f"{len(self.train):,} training and {len(self.test):,} held-out examples "
                          f"of {of}")

    def _line(self, examples):
        low, high = self.range
        if self.binary:
            values = "zeros and ones"
        elif self.bytes:
            values = f"bytes {low}..{high}" + ", dequantised" * self.dequantise
        else:
            values = f"floating point {low:.4g} to {high:.4g}, taken as continuous"
        name = pathlib.Path(self.name).name or self.name
        return printable("; ".join([f"{name}: {examples}, {values}", *self.notes]))

    def to(self, xp):
        """Moves the training part, if there is one, to where xp computes; from then on `draw` makes
        its batches there, and wants a generator of xp. Other data is made, or cut, on the host."""
        if self.train is not None:
            self.xp, self.train = xp, xp.asarray(self.train)

    def draw(self, number, rng, dtype=np.float64):
        """`number` training examples drawn with replacement, normalised, (number, D)."""
        raw = self.train[rng.integers(0, len(self.train), number)]
        return self.normalise(self._mirrored(raw, rng), rng, dtype)

    def _mirrored(self, raw, rng):
        """With `flips`, every other picture, at random, with left and right exchanged."""
        if not self.flips:
            return raw
        pictures, turn = raw.reshape(-1, *self.shape), rng.random(len(raw)) < 0.5
        turned = self.xp.where(turn[:, None, None, None], pictures[:, :, ::-1], pictures)
        return turned.reshape(raw.shape)

    def held_out(self, number, seed=0):
        """The first `number` test examples, normalised, float64; the same dequantisation for the
        same seed. Of endless data so many fresh ones."""
        rng = generator(np, "held out", seed)
        if self.test is None:
            return self.draw(number, rng)
        return self.normalise(self.test[:number], rng)

    def normalise(self, raw, rng, dtype=np.float64):
        """raw -> x. Bytes get their uniform noise here, from rng.

        Bytes are exact in float32. Other values may be large beside their scale: what is left
        after the shift is rounded to dtype, not before."""
        if self.binary:
            return raw.astype(dtype)
        if self.bytes:
            u = rng.random(raw.shape, dtype=dtype) if self.dequantise else 0.5
            return ((raw + u - self.shift) / self.scale).astype(dtype)
        return ((raw.astype(np.float64) - self.shift) / self.scale).astype(dtype)


class _Windows:
    """All squares of size x size in `pieces` (h, w, C), their corners `step` pixels apart."""

    def __init__(self, pieces, size, step):
        self.pieces, self.size, self.step = pieces, size, step
        self.counts = np.array([[(n - size) // step + 1 for n in p.shape[:2]] for p in pieces])
        self.ends = np.cumsum(self.counts.prod(1))

    def __getitem__(self, which):
        """The squares of these numbers, (n, size * size * C)."""
        piece = np.searchsorted(self.ends, which, side="right")
        y, x = np.divmod(which - self.ends[piece], self.counts[piece, 1])   # from the end: y < 0
        y, size = (y + self.counts[piece, 0]) * self.step, self.size
        return np.stack([self.pieces[k][i:i + size, j:j + size].ravel()
                         for k, i, j in zip(piece, y, x * self.step)])


class Crops(Data):
    """Pictures of any sizes, of which every draw cuts fresh squares: all places are equally likely.

    Held out by region: of each picture with room for both, a strip at the end of its longer side, a
    tenth of it or one crop wide, is the only source of test crops, and no training crop reaches
    into it. Of pictures without that room a tenth is held out whole. Test crops lie half a crop
    apart, so neighbours share half of their pixels; at most 10,000, and 2 10^8 values, in random
    order."""

    def __init__(self, name, pictures, held, size, flips, notes):
        self.name, self.flips, self.notes, self.number = name, flips, notes, len(pictures)
        self.shape = (size, size, pictures[0].shape[2])
        if held is None:
            pictures, held = self._set_aside(pictures, size)
        self.windows, tests = _Windows(pictures, size, 1), _Windows(held, size, max(1, size // 2))
        order = generator(np, "test crops").permutation(int(tests.ends[-1]))
        self.test = tests[order[:max(1, min(10_000, 2 * 10 ** 8 // math.prod(self.shape)))]]
        self._measure(pictures)
        self.digest = fingerprint(*pictures, self.test, self.shape, flips)

    def _set_aside(self, pictures, size):
        """(training pieces, test pieces): views of the pictures."""
        pieces, held, small = [], [], []
        for picture in pictures:
            axis = int(picture.shape[1] > picture.shape[0])
            rest = picture.shape[axis] - max(size, picture.shape[axis] // 10)
            if rest < size:
                small.append(picture)
            else:
                piece, strip = np.split(picture, [rest], axis)
                pieces.append(piece)
                held.append(strip)
        order = generator(np, "split").permutation(len(small))
        held += [small[i] for i in order[:len(small) // 10]]
        pieces += [small[i] for i in order[len(small) // 10:]]
        if not held:
            raise InputError(f"{self.name}: no picture has room for a training and a test region "
                             f"of {size} x {size}; crop less, or give more pictures")
        return pieces, held

    def describe(self):
        size = " x ".join(map(str, self.shape))
        pictures = f"{self.number:,} picture{'s' * (self.number > 1)}"
        return self._line(f"{self.windows.ends[-1]:,} places for crops of {size} in {pictures}, "
                          f"{len(self.test):,} held-out crops")

    def draw(self, number, rng, dtype=np.float64):
        raw = self.windows[rng.integers(0, self.windows.ends[-1], number)]
        return self.normalise(self._mirrored(raw, rng), rng, dtype)
