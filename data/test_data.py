"""Tests of the package `data`: what is read, what is made, and what is refused in one line."""
import gzip
import hashlib
import io
import math
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
import zlib

import dpm                                          # before numpy: it sets BLAS's threads
import data
import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(dpm.__file__).parent
pytestmark = pytest.mark.filterwarnings("error")     # also those that NumPy would print


def rng(seed):
    return np.random.default_rng(seed)


def refused(*arguments, **options):
    """The one line with which `load` refuses."""
    with pytest.raises(dpm.InputError) as caught:
        data.load(*arguments, **options)
    line = str(caught.value)
    assert line.isprintable() and 20 < len(line) < 400, line
    return line


def idx(array, kind=8):
    return (bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            + array.tobytes())


def save(folder, **pictures):
    """Pictures as PNG in a new folder."""
    folder.mkdir(exist_ok=True)
    for name, picture in pictures.items():
        Image.fromarray(picture).save(folder / f"{name}.png")
    return folder


def noise(seed, *shape):
    return rng(seed).integers(0, 256, shape).astype(np.uint8)


# -------------------------------------------------------------------------------------------------
# Examples and their normalisation
# -------------------------------------------------------------------------------------------------

def test_mnist():
    mnist = data.load("mnist")                      # its checksums are verified on load
    assert mnist.describe() == ("mnist: 60,000 training and 10,000 held-out examples of "
                                "28 x 28 x 1, bytes 0..255, dequantised")
    x, y = mnist.draw(4000, rng(23)), mnist.held_out(50)
    assert x.shape == (4000, 784) and mnist.shape == (28, 28, 1) and mnist.bytes
    assert x.mean() == pytest.approx(0, abs=0.02) and x.var() == pytest.approx(1, abs=0.02)
    raw = y * mnist.scale + mnist.shift
    assert (np.floor(raw + 1e-9) == mnist.test[:50]).all()
    assert (mnist.held_out(50) == y).all() and (mnist.held_out(50, seed=1) != y).any()
    level = 1 / mnist.scale
    edges = np.array(mnist.edges) * mnist.scale + mnist.shift    # paper, and ink that is saturated
    assert edges == pytest.approx(np.array([0, 1, 252, 253, 254, 255, 256]), abs=1e-9)
    assert mnist.detail == pytest.approx(0.01 * level)


def test_a_damaged_mnist_is_noticed(tmp_path):
    with gzip.open(ROOT / "data" / "mnist" / "t10k-images-idx3-ubyte.gz") as file:
        raw = bytearray(file.read())
    raw[5000] ^= 1
    (tmp_path / "t").write_bytes(raw)
    with pytest.raises(dpm.InputError, match="checksum"):
        data.read_idx(tmp_path / "t", data.SHA256["test"])


def test_bytes_of_a_small_scale(tmp_path):
    """The half and the twelfth of the dequantisation count, most where bytes vary least."""
    np.save(tmp_path / "a.npy", rng(1).integers(7, 9, (4000, 2)).astype(np.uint8))
    a = data.load(tmp_path / "a.npy")
    p = (a.train == 8).mean()
    assert a.shift == pytest.approx(7.5 + p, abs=1e-12)
    assert a.scale ** 2 == pytest.approx(p * (1 - p) + 1 / 12, rel=1e-12)
    assert a.detail == pytest.approx(0.01 / a.scale) and "bytes 7..8" in a.describe()
    for dtype in (np.float32, np.float64):
        x = a.draw(200_000, rng(2), dtype)
        assert x.dtype == dtype and np.unique(x).size > 50_000
        assert x.mean(dtype=float) == pytest.approx(0, abs=0.01)
        assert x.var(dtype=float) == pytest.approx(1, abs=0.01)
        raw = x.astype(float) * a.scale + a.shift
        assert raw.min() > 7 - 1e-5 and raw.max() < 9 + 1e-5
        assert (raw % 1).mean() == pytest.approx(0.5, abs=0.005)


def test_draw_reaches_every_training_example(tmp_path):
    values = np.arange(400.0).reshape(400, 1)
    np.savez(tmp_path / "a.npz", train=values, test=values[:3] + 0.5)
    a = data.load(tmp_path / "a.npz")
    drawn = np.rint(a.draw(20_000, rng(3)) * a.scale + a.shift)
    found, times = np.unique(drawn, return_counts=True)
    assert found.tolist() == list(range(400)) and times.min() > 20 and times.max() < 90
    assert a.held_out(9)[:, 0] * a.scale + a.shift == pytest.approx([0.5, 1.5, 2.5])


@pytest.mark.parametrize("offset", [1e6, -1.7e9])
def test_a_large_offset_costs_no_precision(tmp_path, offset):
    """What is drawn in float32 is what is evaluated in float64, rounded."""
    values = rng(4).standard_normal((500, 3)) + offset
    np.savez(tmp_path / "a.npz", train=values, test=values)
    a = data.load(tmp_path / "a.npz")
    assert a.scale == pytest.approx(1, abs=0.1) and not a.bytes and a.edges == ()
    x32 = a.normalise(values, None, np.float32)
    assert x32.dtype == np.float32 and np.abs(x32 - a.held_out(500)).max() < 1e-6
    assert np.unique(a.draw(400, rng(5), np.float32)).size > 500


class OtherArrays:
    """What CuPy would do: arrays that are not NumPy's until they are brought back."""

    class array(np.ndarray):
        pass

    @classmethod
    def asarray(cls, a):
        return np.asarray(a).view(cls.array)

    where = staticmethod(np.where)


@pytest.mark.parametrize("name", ["pictures", "gravel", "swissroll", "heartbeat", "deadleaves:8"])
def test_to_a_device(tmp_path, name):
    """The training part moves if there is one; what is drawn, and by which generator, is told by
    xp; the description is the same."""
    np.save(tmp_path / "pictures.npy", noise(6, 40, 4, 4, 3))
    a = data.load(tmp_path / "pictures.npy" if name == "pictures" else name)
    before = a.draw(5, rng(7), np.float32), a.describe(), a.digest
    a.to(OtherArrays)
    assert (a.xp is OtherArrays) == (name == "pictures") == isinstance(a.train, OtherArrays.array)
    x = a.draw(5, rng(7), np.float32)
    assert isinstance(x, OtherArrays.array) == (name == "pictures") and x.dtype == np.float32
    assert (np.asarray(x) == before[0]).all() and (a.describe(), a.digest) == before[1:]
    assert x.shape == (5, math.prod(a.shape)) and a.held_out(3).dtype == np.float64


# -------------------------------------------------------------------------------------------------
# Endless data
# -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("noise", [0.04, 0.5, 1])
def test_swiss_roll_has_variance_one_with_its_noise(noise):
    roll = data.load(f"swissroll:{noise}")
    x = roll.draw(400_000, rng(8))
    assert x.mean(0) == pytest.approx([0, 0], abs=0.01)
    assert x.var() == pytest.approx(1, abs=0.005)
    assert roll.scale == pytest.approx(math.sqrt(1 + noise ** 2)) and roll.shift == 0
    assert roll.detail == pytest.approx(noise / roll.scale / 10)
    # the density is that of the normalised values: it integrates to 1, and its mean is -entropy
    truth, h = roll.truth, 0.8 * noise / roll.scale              # steps below the noise: exact
    line = np.arange(-2.2 - 5 * noise, 2.2 + 5 * noise, h)
    grid = np.stack(np.meshgrid(line, line), 2).reshape(-1, 2)
    assert h ** 2 * np.exp(truth.log_density(grid)).sum() == pytest.approx(1, rel=1e-5)
    second = (truth.centres ** 2).mean() + truth.sigma ** 2
    assert second == pytest.approx(1, abs=1e-4)
    assert truth.sigma == pytest.approx(noise / roll.scale)
    assert data.load(roll.name).noise == noise      # a run finds it by its name
    if noise == 0.04:
        assert roll.name == "swissroll" and data.load("swissroll").digest == roll.digest
        finer = data.SwissRoll(points=8000).truth.log_density(x[:800])
        assert np.abs((finer - truth.log_density(x[:800])).mean()) < 1e-5


def test_heartbeat():
    beat = data.load("heartbeat")
    assert beat.binary and beat.mean == 0.2 and beat.shape == (1, 1, 20)
    found, times = np.unique(beat.draw(5000, rng(10)), axis=0, return_counts=True)
    assert len(found) == 5 and times.min() > 850 and (found.sum(1) == 4).all()
    assert beat.truth.log_density(beat.held_out(7)) == pytest.approx(np.full(7, -math.log(5)))


@pytest.fixture(scope="module")
def leaves():
    dead = data.load("deadleaves")
    return dead, dead.pictures(400, rng(11)).reshape(400, 32, 32)


def test_dead_leaves_follow_their_law(leaves):
    """Radii have p(r) ~ r^-3 between 1 and 32 where the edge of the picture doesn't weigh them:
    among centres inside it. Centres are uniform, and those that matter reach beyond the picture."""
    dead, _ = leaves
    r, x, y = dead.leaves(400_000, rng(12))
    inside = (0 < x) & (x < 32) & (0 < y) & (y < 32)
    radii = np.sort(r[inside])
    cdf = (1 - radii ** -2.0) / (1 - 32.0 ** -2)
    step = np.arange(1, len(radii) + 1) / len(radii)
    assert np.abs(cdf - step).max() < 2 / math.sqrt(len(radii))     # Kolmogorov and Smirnov
    assert (r >= 1).all() and (r <= 32).all() and r.max() > 31
    for c in (x, y):                                # as many per area outside as inside
        assert (np.abs(c - 16) <= 16 + r).all()
        big = r > 20
        assert ((c[big] < 0).mean() / (c[big] > 32).mean()) == pytest.approx(1, abs=0.1)
    density = inside.sum() / 32 ** 2                # discs of r > 16 lie in all of [-16, 48]
    wide = ((r > 16) & (np.abs(x - 16) < 32) & (np.abs(y - 16) < 32)).sum() / 64 ** 2
    assert wide / density == pytest.approx((16 ** -2 - 32 ** -2) / (1 - 32 ** -2), rel=0.1)


def test_dead_leaves_cover_and_are_bytes(leaves):
    """No gap is left, greys are uniform, pixels on edges are averages, and x has variance 1."""
    dead, pictures = leaves
    assert pictures.dtype == np.uint8 and dead.bytes and dead.shape == (32, 32, 1)
    gaps = []

    class Watched(data.DeadLeaves):
        def _paint(self, canvas, *rest):
            super()._paint(canvas, *rest)
            gaps.append((canvas < 0).reshape(-1, 96 ** 2).any(1).sum())
            assert canvas.max() < 256

    Watched().pictures(20, rng(13))
    assert len(gaps) > 2 and gaps[0] == 20 and gaps[-1] == 0
    flat = pictures[:, :-1] == pictures[:, 1:]      # equal neighbours: the same leaf, mostly
    assert np.histogram(pictures[:, 1:][flat], 4, (0, 256))[0] / flat.sum() == pytest.approx(
        np.full(4, 0.25), abs=0.05)
    x = dead.draw(1500, rng(14))
    assert x.mean() == pytest.approx(0, abs=0.03) and x.var() == pytest.approx(1, abs=0.03)
    raw = x * dead.scale + dead.shift
    assert raw.min() >= 0 and raw.max() < 256 and (raw % 1).mean() == pytest.approx(0.5, abs=0.01)
    assert np.diff(dead.edges) * dead.scale == pytest.approx([1, 254, 1])
    assert dead.detail == pytest.approx(0.01 / dead.scale)


def test_later_rounds_lie_behind():
    """A leaf hides those to its left in its round, and a round hides those after it."""
    dead, order = data.DeadLeaves(8), []

    class Fixed(data.DeadLeaves):
        def leaves(self, number, rng):
            return np.full((3, number), 4.0)        # discs of radius 4 in the middle

    class Greys:
        def random(self, number, dtype):
            order.append(number)
            return np.linspace(0.25, 0.75, number, dtype=np.float32) / len(order)

    fixed, canvas, greys = Fixed(8), np.full(24 ** 2, -1, np.float32), Greys()
    fixed._paint(canvas, np.zeros(3, int), 24, greys)
    assert canvas.reshape(24, 24)[12, 12] == 192 and canvas[0] == -1
    disc = (canvas >= 0).sum()
    assert disc == pytest.approx(math.pi * 12 ** 2, rel=0.02)
    fixed._paint(canvas, np.zeros(3, int), 24, greys)
    assert (canvas == 192).sum() == disc and dead.name == "deadleaves:8"


def test_dead_leaves_are_alike_at_all_scales(leaves):
    """The correlation is the one that the law implies, and the power spectrum about 1/f^2."""
    dead, pictures = leaves
    more = np.concatenate([pictures, dead.pictures(1100, rng(15)).reshape(-1, 32, 32)]) - 128.0
    variance = 256 ** 2 / 12
    for d in (2, 4, 8, 16):
        along = (more[:, :, d:] * more[:, :, :-d]).mean() + (more[:, d:] * more[:, :-d]).mean()
        assert along / 2 / variance == pytest.approx(float(dead.same_leaf(d)), abs=0.03), d
    assert float(dead.same_leaf(0)) == pytest.approx(1) and float(dead.same_leaf(64)) == 0
    window = np.hanning(34)[1:-1]
    power = (np.abs(np.fft.fft2(more * window * window[:, None])) ** 2).mean(0)
    f = np.hypot(np.fft.fftfreq(32), np.fft.fftfreq(32)[:, None])
    ends = np.geomspace(2 / 32, 0.2, 7)             # smaller things the smallest disc makes steeper
    rings = [(f > low) & (f <= high) for low, high in zip(ends, ends[1:])]
    slope = np.polyfit([np.log(f[r]).mean() for r in rings],
                       [np.log(power[r].mean()) for r in rings], 1)[0]
    assert -2.3 < slope < -1.8, slope


def test_dead_leaves_are_seeded(leaves):
    dead, _ = leaves
    assert (dead.draw(20, rng(16)) == dead.draw(20, rng(16))).all()
    assert (dead.held_out(20) == dead.held_out(20)).all()
    assert (dead.held_out(3) != dead.held_out(3, seed=1)).any()
    drawn = dead.draw(20, dpm.generator(np, "batch", 0, 0))
    assert np.unique(np.concatenate([drawn, dead.held_out(20)]), axis=0).shape[0] == 40
    assert data.load("deadleaves:48").shape == (48, 48, 1)


# -------------------------------------------------------------------------------------------------
# Files: arrays
# -------------------------------------------------------------------------------------------------

def test_arrays_are_read_as_they_were_written(tmp_path):
    """IDX folders (gzipped or not), IDX files, .npy and .npz; a tenth is set aside, seeded."""
    images = noise(24, 30, 4, 5)
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "idx" / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:7])))
    folder = data.load(tmp_path / "idx")
    assert (folder.train.reshape(images.shape) == images).all() and folder.shape == (4, 5, 1)
    assert (folder.test == images[:7].reshape(7, -1)).all()
    np.save(tmp_path / "a.npy", images)
    one = data.load(tmp_path / "a.npy")
    two = data.load(tmp_path / "idx" / "train-images-idx3-ubyte")
    assert one.describe() == ("a.npy: 27 training and 3 held-out examples of 4 x 5 x 1, bytes "
                              f"{one.train.min()}..{one.train.max()}, dequantised")
    assert (one.test == two.test).all() and (one.train == two.train).all()
    assert (one.test != images[-3:].reshape(3, -1)).any(1).all()        # not just the last
    assert sorted(map(bytes, np.concatenate([one.train, one.test]))) == sorted(
        map(bytes, images.reshape(30, -1)))
    vectors = rng(25).standard_normal((20, 6)).astype(">f4")
    np.savez(tmp_path / "b.npz", train=vectors, test=vectors[:5])
    b = data.load(tmp_path / "b.npz")
    assert b.shape == (1, 1, 6) and not b.bytes and b.edges == () and (b.test == vectors[:5]).all()
    assert b.train.dtype == np.float32 and b.train.dtype.isnative       # CuPy takes no other order
    x = b.normalise(b.train, None)
    assert x.mean() == pytest.approx(0, abs=1e-6) and x.var() == pytest.approx(1, abs=1e-6)
    assert "floating point" in b.describe() and "continuous" in b.describe()
    for kind, of in (13, vectors), (14, vectors.astype(">f8")):
        (tmp_path / "f.idx").write_bytes(idx(of, kind))
        f = data.load(tmp_path / "f.idx")
        assert all((vectors == row).all(1).sum() == 1 for row in np.concatenate([f.train, f.test]))


def test_zeros_and_ones_are_binary(tmp_path):
    bits = noise(26, 30, 4, 5) > 100
    for array in (bits, bits.astype(int), bits * 1.0, bits.astype(np.uint8)):
        np.save(tmp_path / "c.npy", array)
        c = data.load(tmp_path / "c.npy")
        assert c.binary and not c.bytes and (c.shift, c.scale) == (0, 1)
        assert c.mean == pytest.approx(c.train.mean()) and "zeros and ones" in c.describe()
        assert set(np.unique(c.draw(50, rng(60), np.float32))) == {0, 1}
    np.savez(tmp_path / "d.npz", train=bits.astype(np.uint8), test=noise(27, 3, 4, 5))
    assert data.load(tmp_path / "d.npz").bytes      # zeros and ones in one part alone say nothing


def test_floats_that_look_like_bytes_are_told(tmp_path):
    images, told = noise(28, 40, 4, 4), []
    for i, array in enumerate([images * 1.0, images / np.float32(255), images / 256,
                               images + rng(29).random(images.shape),
                               rng(30).standard_normal((40, 4, 4)), rng(31).random((40, 4, 4)),
                               rng(31).random((40, 4, 4)) * (np.arange(40) > 9)[:, None, None]]):
        np.save(tmp_path / f"{i}.npy", array)
        line = data.load(tmp_path / f"{i}.npy").describe()
        assert "taken as continuous" in line and "\n" not in line
        told.append("look like bytes" in line)
    assert told == [True, True, True, True, False, False, False]  # whatever the first rows are


def test_values_that_cannot_be_computed_with(tmp_path):
    def line(array):
        np.save(tmp_path / "a.npy", array)
        return refused(tmp_path / "a.npy")

    normal = rng(32).standard_normal((40, 3))
    assert "too large" in line(normal * 1e200) and "constant" in line(np.zeros((40, 3)) + 5)
    assert "too large" in line(normal * 1e160) and "too small" in line(normal * 1e-200)
    assert "constant" in line(np.full((40, 3), 7, np.uint8)) and "constant" in line(normal * 0)
    assert "NaN" in line(normal / [1, 1, np.nan])
    assert "type int64" in line(np.arange(120).reshape(40, 3))
    normal[3, 1] = np.inf
    assert "NaN or infinite" in line(normal)
    assert "shape" in line(normal[0]) and "shape" in line(np.zeros((40, 2, 2, 2)))
    assert "shape" in line(np.zeros((40, 0))) and "at least 20" in line(normal[4:20])
    assert "type complex" in line(np.ones((40, 2), complex))
    assert "1 or 3 colours, not 4" in line(np.zeros((40, 2, 2, 4)))
    assert "type" in line(np.full((40, 2), "a"))
    np.savez(tmp_path / "b.npz", train=np.ones((9, 2)) * [1, 2], test=np.ones((3, 3)))
    assert "agree" in refused(tmp_path / "b.npz")
    np.savez(tmp_path / "b.npz", train=rng(1).random((9, 2)), test=np.full((3, 2), 1e200))
    assert "too large" in refused(tmp_path / "b.npz")
    for scale in (1e90, 1e-90):                     # far, but not too far
        np.save(tmp_path / "a.npy", rng(2).standard_normal((40, 3)) * scale)
        assert data.load(tmp_path / "a.npy").held_out(4).std() < 4


def test_headers_that_promise_too_much(tmp_path):
    """One line, at once, and without taking the memory."""
    npy = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        npy, {"descr": "<f8", "fortran_order": False, "shape": (10 ** 6, 10 ** 6)})
    (tmp_path / "a.npy").write_bytes(npy.getvalue() + bytes(80))
    np.savez(tmp_path / "c.npz", train=np.zeros((20, 2)))
    short = npy.getvalue().replace(b"(1000000, 1000000)", b"(10000000, 10000) ")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("train.npy", short + bytes(80))
    (tmp_path / "axes").write_bytes(bytes([0, 0, 8, 255]) + struct.pack(">255I", *[2] * 255))
    (tmp_path / "long").write_bytes(bytes([0, 0, 8, 3]) + struct.pack(">3I", *[2 ** 32 - 1] * 3))
    (tmp_path / "wrap").write_bytes(bytes([0, 0, 8, 4]) + struct.pack(">4I", *[2 ** 16] * 4))
    (tmp_path / "cut").write_bytes(bytes([0, 0, 8, 3, 0]))
    tracemalloc.start()
    for name in ("a.npy", "axes", "long", "wrap", "cut"):
        refused(tmp_path / name)
    assert tracemalloc.get_traced_memory()[1] < 10 ** 7
    tracemalloc.stop()
    refused(tmp_path / "c.npz")
    assert "255 axes" in refused(tmp_path / "axes") and "promises" in refused(tmp_path / "long")
    assert "promises" in refused(tmp_path / "wrap")             # 2^64 values are not 0


def test_damaged_arrays_are_one_line_or_data(tmp_path):
    """Fuzz: files with a few bytes changed, or cut, load or are refused; nothing else happens."""
    bits, draw, names = noise(36, 30, 3, 4), rng(37), ("a.npy", "b.npz", "c.idx", "d.idx")
    np.save(tmp_path / "a.npy", bits)
    np.savez(tmp_path / "b.npz", train=bits * 1.0, test=bits[:4] * 1.0)
    (tmp_path / "c.idx").write_bytes(idx(bits))
    (tmp_path / "d.idx").write_bytes(gzip.compress(idx(bits), mtime=0))
    for name in names * 60:
        raw = bytearray((tmp_path / name).read_bytes())
        for place in draw.integers(0, min(len(raw), 300), draw.integers(1, 5)):
            raw[place] = draw.integers(0, 256)
        if draw.random() < 0.2:
            del raw[draw.integers(0, len(raw)):]
        (tmp_path / ("x" + name)).write_bytes(raw)
        try:
            assert np.isfinite(data.load(tmp_path / ("x" + name)).held_out(5)).all()
        except dpm.InputError as error:
            assert str(error).isprintable()


def test_memory_is_not_enough(tmp_path, monkeypatch):
    def no_memory(*arguments, **options):
        raise MemoryError("Unable to allocate 8 TiB")
    np.save(tmp_path / "a.npy", np.zeros((30, 2)))
    monkeypatch.setattr(np, "load", no_memory)
    assert "memory" in refused(tmp_path / "a.npy")


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)
    (tmp_path / "a.npy").write_bytes(pickle.dumps(Bomb()))
    np.save(tmp_path / "b.npy", np.array([Bomb()] * 30), allow_pickle=True)
    np.savez(tmp_path / "c.npz", train=np.array([Bomb()] * 30))
    for name in ("a.npy", "b.npy", "c.npz"):
        refused(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_names(tmp_path, monkeypatch):
    """The name of a path is absolute; '' is no data set; messages hold no control characters."""
    (tmp_path / "größe 日本").mkdir()
    np.save(tmp_path / "größe 日本" / "ä.npy", noise(33, 30, 3))
    monkeypatch.chdir(tmp_path / "größe 日本")
    a = data.load("ä.npy")
    assert a.name == str(tmp_path / "größe 日本" / "ä.npy")
    assert a.describe().startswith("ä.npy: 27")
    monkeypatch.chdir("/")
    assert data.load(a.name).digest == a.digest
    for name in ("", "nowhere", "a\0b", "heartbeat:2", "mnist:3", "x" * 5000):
        with pytest.raises(dpm.InputError, match="give swissroll"):
            data.load(name)
    for name in ("swissroll:0", "swissroll:nan", "swissroll:x", "swissroll:2", "deadleaves:2",
                 "deadleaves:1e9", "deadleaves:3.5", "deadleaves:99999999999"):
        assert "as in" in refused(name)
    evil = tmp_path / "\x1b[31mred\n.npy"
    evil.write_bytes(b"nothing")
    assert "?[31mred?.npy" in refused(evil)
    np.save(evil, noise(34, 30, 3))
    assert data.load(evil).describe().startswith("?[31mred?.npy: ")
    with pytest.raises(dpm.InputError) as caught:
        data.read_pictures([tmp_path / "\x1b[2Jx.png"])
    assert str(caught.value).isprintable()
    assert data.printable("a\tb\x9b\ud800é ") == "a?b??é "
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe.png")
    assert "neither" in refused(tmp_path / "pipe") and "neither" in refused(tmp_path / "pipe.png")
    assert refused("/dev/zero") and "without pictures" in refused(tmp_path / "größe 日本")


def test_digest_is_of_what_the_data_is(tmp_path):
    images = noise(35, 40, 4, 4)
    np.savez(tmp_path / "a.npz", train=images, test=images[:5])
    first = data.load(tmp_path / "a.npz")
    assert len(first.digest) == 64 and int(first.digest, 16)
    assert first.digest != data.load(tmp_path / "a.npz", flips=True).digest
    np.savez(tmp_path / "b.npz", train=images, test=images[:5])
    assert data.load(tmp_path / "b.npz").digest == first.digest
    for part in ("train", "test"):
        other = {"train": images.copy(), "test": images[:5].copy()}
        other[part][-1, -1, -1] ^= 1
        np.savez(tmp_path / "b.npz", **other)
        assert data.load(tmp_path / "b.npz").digest != first.digest
    names = ["swissroll", "swissroll:0.1", "heartbeat", "deadleaves", "deadleaves:16", "gravel"]
    digests = [data.load(name).digest for name in names] + [data.load("gravel", crop=32).digest]
    assert len(set(digests)) == 7 and digests[:6] == [data.load(name).digest for name in names]


# -------------------------------------------------------------------------------------------------
# CIFAR-10
# -------------------------------------------------------------------------------------------------

@pytest.fixture
def cifar(tmp_path):
    """A folder like CIFAR-10's with few records, and its pictures."""
    folder, pictures = tmp_path / "cifar-10-batches-bin", {}
    folder.mkdir()
    for i, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        pictures[name] = noise(40 + i, 4 + i, 32, 32, 3)
        labels = rng(50 + i).integers(0, 10, (4 + i, 1)).astype(np.uint8)
        planes = pictures[name].transpose(0, 3, 1, 2).reshape(4 + i, -1)
        (folder / f"{name}.bin").write_bytes(np.concatenate([labels, planes], 1).tobytes())
    (folder / "batches.meta.txt").write_text("airplane\n")
    return folder, pictures


def test_cifar(cifar, tmp_path):
    folder, pictures = cifar
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-bin")
    sets = [data.load(path) for path in (folder, tmp_path, tmp_path / "cifar-10-binary.tar.gz")]
    for name in ("c.tgz", "c.tar"):
        (path := (tmp_path / "cifar-10-binary.tar.gz").with_name(name)).write_bytes(
            (tmp_path / "cifar-10-binary.tar.gz").read_bytes())
        sets.append(data.load(path))
        path.unlink()
    train = np.concatenate([pictures[f"data_batch_{k}"] for k in range(1, 6)])
    for a in sets:
        assert a.shape == (32, 32, 3) and a.bytes
        assert (a.train.reshape(-1, 32, 32, 3) == train).all()
        assert (a.test.reshape(-1, 32, 32, 3) == pictures["test_batch"]).all()
        assert a.digest == sets[0].digest
    assert data.load(folder, crop=16).test.shape[1] == 16 * 16 * 3
    assert {p.name for p in tmp_path.iterdir()} == {folder.name, "cifar-10-binary.tar.gz"}


def test_cifar_refused(cifar, tmp_path):
    folder, _ = cifar
    whole = (folder / "data_batch_3.bin").read_bytes()
    for content in (whole[:-1], b"", b"\x0a" + whole[1:]):
        (folder / "data_batch_3.bin").write_bytes(content)
        assert "data_batch_3.bin does not consist" in refused(folder)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "cifar-10-batches-bin")
    assert "data_batch_3.bin does not consist" in refused(archive)
    archive.write_bytes(archive.read_bytes()[:9000])
    assert "cannot be read" in refused(archive)
    (folder / "data_batch_3.bin").unlink()
    assert "data_batch_3.bin is missing" in refused(folder)
    with tarfile.open(archive, "w:gz") as tar:
        big = tarfile.TarInfo("data_batch_1.bin")
        big.size = 3073 * 10_001
        tar.addfile(big, io.BytesIO(bytes(big.size)))
    assert "more than the 10,000" in refused(archive)
    pickled = tmp_path / "py" / "cifar-10-batches-py"
    pickled.mkdir(parents=True)
    (pickled / "data_batch_1").write_bytes(pickle.dumps({}))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(pickled, "cifar-10-batches-py")
    for path in (pickled, pickled.parent, tmp_path / "cifar-10-python.tar.gz"):
        assert "download cifar-10-binary.tar.gz" in refused(path)


# -------------------------------------------------------------------------------------------------
# Pictures
# -------------------------------------------------------------------------------------------------

def test_a_folder_of_pictures(tmp_path):
    images = noise(24, 30, 4, 5)
    folder = save(tmp_path / "bilder é", **{f"p{i:02}": images[i] for i in range(30)})
    (folder / "._p01.png").write_bytes(b"what macOS leaves")
    (folder / "Thumbs.db").write_bytes(b"what Windows leaves")
    gray = data.load(folder)
    np.save(tmp_path / "a.npy", images)
    same = data.load(tmp_path / "a.npy")
    assert gray.shape == (4, 5, 1) and gray.digest == same.digest
    colour = noise(60, 4, 5, 3)
    save(folder, p30=colour)
    mixed = data.load(folder)
    assert mixed.shape == (4, 5, 3) and len(mixed.train) == 28
    found = {bytes(p) for p in np.concatenate([mixed.train, mixed.test])}
    assert found == {bytes(np.repeat(p[:, :, None], 3, 2)) for p in images} | {bytes(colour)}
    (folder / "p00.png").rename(folder / "p00.PNG")
    assert data.load(folder).digest == mixed.digest
    save(folder, p31=noise(61, 6, 5))
    assert "5 x 6 pixels, where 5 x 4 came before; give --crop or --resize" in refused(folder)
    assert data.load(folder, resize=4).shape == (4, 4, 3)


def one(picture, path, **options):
    picture.save(path, **options)
    return data.read_pictures([path])[0]


def test_sixteen_bits(tmp_path):
    """White stays white and 128 * 257 is 128; rounded to the nearest; still gray."""
    levels = np.array([[0, 128, 129, 128 * 257], [385, 386, 65406, 65535]], np.uint16)
    for name in ("a.png", "a.tif"):
        found = one(Image.fromarray(levels), tmp_path / name)
        assert found.shape == (2, 4, 1)
        assert found[..., 0].tolist() == [[0, 0, 1, 128], [1, 2, 254, 255]], name
    assert one(Image.fromarray(noise(62, 3, 3) > 99), tmp_path / "b.png").shape == (3, 3, 1)


def test_pixels_that_are_no_bytes(tmp_path):
    for i, array in enumerate([rng(63).random((4, 4), np.float32), np.eye(4, dtype=np.int32)]):
        Image.fromarray(array).save(tmp_path / f"{i}.tif")
        with pytest.raises(dpm.InputError, match="8 or 16 bits"):
            data.read_pictures([tmp_path / f"{i}.tif"])


def test_transparent_parts_are_laid_on_white_and_told(tmp_path, capsys):
    clear = np.dstack([noise(64, 4, 4, 3), np.full((4, 4), 255, np.uint8)])
    opaque = one(Image.fromarray(clear), tmp_path / "opaque.png")
    assert (opaque == clear[..., :3]).all() and capsys.readouterr().err == ""
    clear[0, 0, 3], clear[1, 1] = 0, (0, 0, 0, 51)
    found = one(Image.fromarray(clear), tmp_path / "clear.png")
    assert found[0, 0].tolist() == [255] * 3 and found[1, 1].tolist() == [204] * 3
    assert (found[2:] == clear[2:, :, :3]).all()
    assert capsys.readouterr().err == "transparent parts of 1 pictures laid on white\n"
    veil = Image.merge("LA", [Image.fromarray(noise(65, 4, 4)), Image.new("L", (4, 4), 0)])
    assert one(veil, tmp_path / "veil.png").tolist() == [[[255]] * 4] * 4
    palette = Image.fromarray(noise(66, 4, 4, 3)).quantize(4)
    assert one(palette, tmp_path / "palette.png").shape == (4, 4, 3)
    hole = int(np.asarray(palette)[0, 0])
    assert (one(palette, tmp_path / "hole.png", transparency=hole)[np.asarray(palette) == hole]
            == 255).all()
    folder = save(tmp_path / "many", **{f"p{i}": clear for i in range(20)})
    Image.fromarray(noise(67, 4, 4, 3)).save(folder / "p21.png")
    assert "transparent parts of 20 pictures laid on white" in data.load(folder).describe()


def test_several_pictures_in_a_file(tmp_path):
    frames = [Image.fromarray(noise(i, 8, 8, 3)) for i in range(3)]
    for name in ("a.gif", "a.tif", "a.png", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(dpm.InputError, match="holds 3 pictures"):
            data.read_pictures([tmp_path / name])
    frames[0].save(tmp_path / "still.gif")
    assert data.read_pictures([tmp_path / "still.gif"]).shape == (1, 8, 8, 3)


def test_formats_and_exif(tmp_path):
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[:10, :15] = 200, 100, 50                # upper left
    for name in ("a.png", "a.bmp", "a.tif", "a.jpg", "a.JPEG", "a.webp"):
        found = one(Image.fromarray(picture), tmp_path / name)
        assert found.shape == (20, 30, 3) and np.abs(found - picture.astype(int)).mean() < 5, name
    exif = Image.Exif()
    exif[0x0112] = 6                                # turn it by 90 degrees clockwise
    turned = one(Image.fromarray(picture), tmp_path / "t.jpg", exif=exif)
    assert turned.shape == (30, 20, 3)
    assert np.abs(turned - np.rot90(picture, -1).astype(int)).mean() < 5
    assert data.load(tmp_path / "t.jpg", crop=4).number == 1
    photo, copy = Image.fromarray(picture), Image.fromarray(picture[::2, ::2])
    found = one(photo, tmp_path / "m.jpg", format="MPO", save_all=True, append_images=[copy])
    assert found.shape == (20, 30, 3)               # a phone's, with a small copy inside


def test_damaged_pictures_are_one_line(tmp_path):
    Image.fromarray(noise(68, 40, 40, 3)).save(tmp_path / "a.png")
    Image.fromarray(noise(68, 40, 40, 3)).save(tmp_path / "a.jpg")
    draw = rng(69)
    for name in ("a.png", "a.jpg"):
        whole = (tmp_path / name).read_bytes()
        for trial in range(60):
            raw = bytearray(whole[:draw.integers(0, len(whole))] if trial % 2 else whole)
            for place in draw.integers(0, max(1, min(len(raw), 200)), 4):
                raw[place:place + 1] = bytes([draw.integers(0, 256)])
            (tmp_path / ("b" + name)).write_bytes(raw)
            try:
                data.read_pictures([tmp_path / ("b" + name)])
            except dpm.InputError as error:
                assert str(error).isprintable()
    (tmp_path / "d.png").mkdir()
    for path in ("missing.png", "d.png"):
        with pytest.raises(dpm.InputError, match=path):
            data.read_pictures([tmp_path / path])


@pytest.mark.parametrize("side", [10_000, 30_000])
def test_absurdly_large_pictures(tmp_path, side):
    header = b"IHDR" + struct.pack(">2I5B", side, side, 8, 0, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header
                                     + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\x0aIDAT")
    with pytest.raises(dpm.InputError, match="million pixels"):
        data.read_pictures([tmp_path / "a.png"])


def test_read_pictures_for_a_model(tmp_path):
    """All as the shape says, in its colours; or each of its own size in these colours."""
    save(tmp_path, gray=noise(70, 6, 8), colour=noise(71, 6, 8, 3), other=noise(72, 9, 5, 3))
    paths = [tmp_path / f"{name}.png" for name in ("gray", "colour", "other")]
    assert data.read_pictures(paths[:2], (6, 8, 1)).shape == (2, 6, 8, 1)
    assert data.read_pictures(paths[:2], (6, 8, 3)).shape == (2, 6, 8, 3)
    assert data.read_pictures(paths[:1]).shape == (1, 6, 8, 1)
    with pytest.raises(dpm.InputError, match="other.png: 5 x 9 pixels, where 8 x 6 are needed"):
        data.read_pictures(paths, (6, 8, 3))
    with pytest.raises(dpm.InputError, match="8 x 6 pixels, where 4 x 4 are needed"):
        data.read_pictures(paths[:1], (4, 4, 1))
    for colours in (1, 3):
        found = data.read_pictures(paths, (4, 4, colours), any_size=True)
        assert [p.shape for p in found] == [(6, 8, colours), (6, 8, colours), (9, 5, colours)]
        assert all(p.dtype == np.uint8 for p in found)
    assert (found[0] == noise(70, 6, 8)[..., None]).all() and (found[2] == noise(72, 9, 5, 3)).all()


def test_resize_keeps_the_middle_square(tmp_path):
    """The shorter side becomes the size; of a wide picture both ends go."""
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40], wide[:, :20], wide[:, 40:] = (0, 250, 0), (250, 0, 0), (0, 0, 250)
    folder = save(tmp_path / "a", **{f"w{i}": wide for i in range(20)},
                  **{f"t{i}": wide.transpose(1, 0, 2) for i in range(20)})
    a = data.load(folder, resize=10)
    middle = a.train.reshape(-1, 10, 10, 3)[:, 2:8, 2:8]
    assert a.shape == (10, 10, 3) and np.abs(middle - [0.0, 250, 0]).max() < 15
    fine = save(tmp_path / "b", **{f"p{i}": noise(i, 40, 40) for i in range(20)})
    assert data.load(fine, resize=4).train.std() < 20           # averages of many pixels
    assert "either" in refused(folder, crop=10, resize=10)
    assert "4 to 4096" in refused(folder, resize=0)


# -------------------------------------------------------------------------------------------------
# Crops
# -------------------------------------------------------------------------------------------------

def positions(shape, seed):
    """A picture in which no two pixels are alike: their three colours count them."""
    number = (rng(seed).permutation(2 ** 13)[:math.prod(shape)] * 2 ** 11 + seed).reshape(shape)
    return np.stack([number >> 16, number >> 8 & 255, number & 255], 2).astype(np.uint8)


def pixels(crops):
    values = crops.reshape(-1, 3).astype(int)
    return set((values[:, 0] << 16 | values[:, 1] << 8 | values[:, 2]).tolist())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Pictures of several sizes, tall, wide and hardly larger than a crop of 8."""
    pictures = {f"p{i}": positions(shape, i) for i, shape in
                enumerate([(40, 30), (20, 100), (9, 8), (50, 50)])}
    return save(tmp_path_factory.mktemp("mixed") / "mixed", **pictures), pictures


def raw_of(dataset, x):
    """The bytes of normalised values."""
    return np.floor(x * dataset.scale + dataset.shift + 1e-9).astype(np.uint8)


def test_crops_are_held_out_by_region(mixed):
    folder, pictures = mixed
    a = data.load(folder, crop=8)
    assert a.shape == (8, 8, 3) and a.bytes and a.train is None and "held-out crops" in a.describe()
    drawn, known = raw_of(a, a.draw(6000, rng(80))), [pixels(p) for p in pictures.values()]
    trained, tested = pixels(drawn), pixels(a.test)
    assert not trained & tested
    for shape, inside in zip([(40, 30), (20, 100), (9, 8), (50, 50)], known):
        strip = max(8, max(shape) // 10) * min(shape) if max(shape) >= 16 else 0
        assert len(inside & tested) <= strip and len(inside & trained) <= len(inside) - strip
        assert len(inside & trained) > 0.95 * (len(inside) - strip)     # the rest is used
        if strip:
            assert len(inside & tested) > 0.7 * strip
    assert sum(bool(pixels(a.test[:5]) & inside) for inside in known) > 1       # in random order
    assert (a.held_out(5) == a.held_out(5)).all()
    assert (raw_of(a, a.held_out(5)) == a.test[:5]).all()


def test_crops_are_squares_of_the_pictures(mixed):
    """Every crop is found in a picture, at a place as likely as any other; flips mirror half."""
    folder, pictures = mixed
    a, b = data.load(folder, crop=8), data.load(folder, crop=8, flips=True)
    place = {(int(p[y, x, 0]) << 16 | int(p[y, x, 1]) << 8 | int(p[y, x, 2])): (k, y, x)
             for k, p in pictures.items() for y in range(p.shape[0]) for x in range(p.shape[1])}

    def found(dataset, seed):
        crops, turned, where = raw_of(dataset, dataset.draw(3000, rng(seed))), 0, []
        for crop in crops.reshape(-1, 8, 8, 3):
            first = [place[int(c[0]) << 16 | int(c[1]) << 8 | int(c[2])] for c in crop[0, [0, -1]]]
            mirrored = first[0][2] > first[1][2]
            k, y, x = first[1] if mirrored else first[0]
            assert (pictures[k][y:y + 8, x:x + 8] == (crop[:, ::-1] if mirrored else crop)).all()
            turned += mirrored
            where.append((k, y, x))
        return turned, where

    turned, where = found(a, 81)
    assert turned == 0
    share = {k: sum(w[0] == k for w in where) / 3000 for k in pictures}
    room = {"p0": (32 - 7) * 23, "p1": (90 - 7) * 13, "p2": 2 * 1, "p3": (42 - 7) * 43}
    for k in pictures:
        assert share[k] == pytest.approx(room[k] / sum(room.values()), abs=0.04)
    rows = [y for k, y, x in where if k == "p3"]
    assert min(rows) == 0 and max(rows) == 42 - 8 and np.mean(rows) == pytest.approx(17, abs=1.5)
    assert 1350 < found(b, 82)[0] < 1650 and a.digest != b.digest


def test_shift_and_scale_of_crops_are_of_the_training_regions(tmp_path):
    """The strip that is held out, black, doesn't count."""
    picture = noise(83, 60, 30)
    picture[52:] = 0
    a = data.load(save(tmp_path / "a", p=picture), crop=8)
    assert a.shift == pytest.approx(picture[:52].mean() + 0.5)
    assert a.scale == pytest.approx(math.sqrt(picture[:52].var() + 1 / 12)) and not a.test.any()
    assert a.detail == pytest.approx(0.01 / a.scale)


def test_crops_refused(tmp_path):
    folder = save(tmp_path / "a", big=noise(84, 40, 40), small=noise(85, 7, 40))
    assert "small.png: 40 x 7 pixels, smaller than crops of 8 x 8" in refused(folder, crop=8)
    alone = save(tmp_path / "b", p=noise(86, 15, 15))
    assert "no picture has room" in refused(alone, crop=8) and "--crop" in refused(alone)
    np.save(tmp_path / "v.npy", noise(87, 40, 9))
    assert "need pictures" in refused(tmp_path / "v.npy", crop=8)
    assert "resized" in refused(tmp_path / "v.npy", resize=8)
    assert "vectors" in refused(tmp_path / "v.npy", flips=True)
    for options in ({"crop": 8}, {"resize": 8}, {"flips": True}):
        assert "files of pictures" in refused("swissroll", **options)
    for crop in (0, -3, 10 ** 9):
        assert "4 to 4096" in refused(folder, crop=crop)


def test_small_pictures_are_held_out_whole(tmp_path):
    """Pictures without room for two regions, here without any to spare: a tenth of them, whole."""
    images = noise(88, 40, 8, 8)
    np.save(tmp_path / "a.npy", images)
    a = data.load(tmp_path / "a.npy", crop=8)
    drawn = {bytes(p) for p in raw_of(a, a.draw(2000, rng(89)))}
    assert len(a.test) == 4 and len(drawn) == 36 and not drawn & {bytes(p) for p in a.test}
    assert {bytes(p) for p in a.test} != {bytes(p) for p in images[:4]}         # at random
    large = save(tmp_path / "large", p=noise(88, 900, 1000))
    assert len(data.load(large, crop=4).test) == 10_000
    np.savez(tmp_path / "b.npz", train=images, test=noise(90, 5, 8, 8))
    b = data.load(tmp_path / "b.npz", crop=8)       # a test part that is given is the test part
    assert {bytes(p) for p in b.test} == {bytes(p) for p in noise(90, 5, 8, 8)}
    assert len({bytes(p) for p in raw_of(b, b.draw(2000, rng(91)))}) == 40
    np.savez(tmp_path / "c.npz", train=images, test=noise(91, 5, 8, 8))
    assert data.load(tmp_path / "c.npz", crop=8).digest != b.digest


def test_gravel():
    """The texture that is shipped: its licence lies beside it and it is what it was."""
    folder = ROOT / "data" / "textures"
    digest = hashlib.sha256((folder / "gravel.png").read_bytes()).hexdigest()
    readme = (folder / "README.md").read_text()
    assert digest in readme and "CC0" in readme
    a = data.load("gravel")
    assert a.name == "gravel" and a.shape == (64, 64, 1) and len(a.test) == 15
    x = a.draw(200, rng(92), np.float32)
    assert x.dtype == np.float32 and x.var() == pytest.approx(1, abs=0.1)
    assert data.load("gravel", crop=32).shape == (32, 32, 1)


def test_mirrored_pictures_without_crops(tmp_path):
    images = noise(93, 20, 4, 6, 3)
    np.savez(tmp_path / "a.npz", train=images, test=images)
    a = data.load(tmp_path / "a.npz", flips=True)
    drawn = {bytes(p) for p in raw_of(a, a.draw(1000, rng(94)))}
    assert drawn == {bytes(p) for p in images} | {bytes(p) for p in images[:, :, ::-1].copy()}
    assert (raw_of(a, a.held_out(20)).reshape(images.shape) == images).all()


def test_thousands_of_pictures_are_not_held_twice(tmp_path):
    """Reading and setting a tenth aside takes little beside the pictures themselves."""
    folder = save(tmp_path / "a", **{f"p{i:03}": noise(i, 200, 200, 3) for i in range(200)})
    whole = 200 * 200 * 200 * 3
    tracemalloc.start()
    a = data.load(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(a.train) == 180 and peak < 1.6 * whole + 10 ** 7, peak / whole


def test_no_progress_bar_where_no_one_looks(tmp_path):
    folder = save(tmp_path / "a", **{f"p{i}": noise(i, 8, 8) for i in range(30)})
    command = "import dpm, data, sys; data.load(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", command, folder], cwd=ROOT, text=True,
                          capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
