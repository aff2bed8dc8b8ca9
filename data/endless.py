"""Data sets without end: every draw is fresh. The toys' densities are known."""
import math

import numpy as np
from scipy.special import logsumexp, softmax

from .arrays import Data, fingerprint


class Mixture:
    """Equally many points around each of `centres` (M, D), with Gaussian noise of standard
    deviation sigma: data whose every density is known. Since x_t is again such a mixture, all that
    the best possible kernel needs is a sum over the centres."""

    def __init__(self, centres, sigma):
        self.centres, self.sigma = np.asarray(centres, np.float64), float(sigma)

    def _log_weights(self, x, shrink, variance):
        """log N(x; shrink centre, variance I) for every centre, (n, M); shrink and variance are
        numbers or columns (n, 1)."""
        square = ((x ** 2).sum(1)[:, None] - 2 * shrink * (x @ self.centres.T)
                  + shrink ** 2 * (self.centres ** 2).sum(1))
        return -square / (2 * variance) - 0.5 * x.shape[1] * np.log(2 * np.pi * variance)

    def log_density(self, x):
        """log p(x) in nats, (n,). In blocks: there is a number for each pair of row and centre."""
        block = max(1, 10 ** 7 // len(self.centres))
        parts = [logsumexp(self._log_weights(x[i:i + block], 1.0, self.sigma ** 2), axis=1)
                 for i in range(0, len(x), block)]
        return np.concatenate(parts) - np.log(len(self.centres))

    def moments(self, x, alpha_bar):
        """E and Var of x_0 given x_t = x (n, D); alpha_bar_t is a number or (n, 1)."""
        variance = alpha_bar * self.sigma ** 2 + 1 - alpha_bar
        gain = np.sqrt(alpha_bar) * self.sigma ** 2 / variance
        weights = softmax(self._log_weights(x, np.sqrt(alpha_bar), variance), axis=1)
        shrunk, mean = 1 - gain * np.sqrt(alpha_bar), weights @ self.centres
        spread = np.maximum(weights @ self.centres ** 2 - mean ** 2, 0)
        left = self.sigma ** 2 * (1 - alpha_bar) / variance
        return shrunk * mean + gain * x, shrunk ** 2 * spread + left


class Patterns:
    """Bits that are one of `patterns` (M, D), each as likely as any other."""

    def __init__(self, patterns):
        self.patterns = patterns

    def log_density(self, x):
        """log p(x) in nats, (n,); -inf where x is none of them."""
        with np.errstate(divide="ignore"):
            return np.log((x[:, None] == self.patterns).all(2).mean(1))

    def moments(self, x, alpha_bar, rate):
        """(E[x_0 | x_t = x],), (n, D), where each bit was kept with probability alpha_bar, a
        number or (n, 1), or else drawn from B(rate)."""
        zero = rate * (1 - alpha_bar)               # the probability that a zero of x_0 is a one
        one = alpha_bar + rate * (1 - alpha_bar)    # in x_t, and that a one of x_0 is
        log_weights = (np.log(one / zero) * (x @ self.patterns.T)
                       + np.log((1 - one) / (1 - zero)) * ((1 - x) @ self.patterns.T))
        return (softmax(log_weights, axis=1) @ self.patterns,)


class SwissRoll(Data):
    """phi = 1.5 pi (1 + 2u), u uniform: (phi cos phi, phi sin phi), centred and scaled to average
    variance 1, and then noise. raw = roll + noise has variance 1 + noise^2: hence the scale.

    Its density is a line integral, here a midpoint sum of points a sixth of the noise apart:
    exact to 1e-5 nats in the mean. (The paper does not give its noise.)"""

    def __init__(self, noise=0.04, points=None):
        self.name = "swissroll" if noise == 0.04 else f"swissroll:{noise}"
        self.shape, self.noise, self.scale = (1, 1, 2), noise, math.sqrt(1 + noise ** 2)
        fine, points = self._curve(200_000), points or round(80 / noise)
        self._mean, self._size = fine.mean(0), np.sqrt(fine.var(0).mean())
        centres = (self._curve(points) - self._mean) / self._size
        self.truth = Mixture(centres / self.scale, noise / self.scale)
        self.detail = 0.1 * noise / self.scale
        self.digest = fingerprint("swiss roll", noise)

    @staticmethod
    def _curve(u):
        """The points at u, or at so many u in the middles of equal intervals."""
        u = (np.arange(u) + 0.5) / u if isinstance(u, int) else u
        phi = 1.5 * np.pi * (1 + 2 * u)
        return np.stack([phi * np.cos(phi), phi * np.sin(phi)], 1)

    def describe(self):
        return (f"{self.name}: endless points of 2 numbers, noise {self.noise} in a roll of "
                "variance 1, floating point, of known density")

    def draw(self, number, rng, dtype=np.float64):
        roll = (self._curve(rng.random(number)) - self._mean) / self._size
        return self.normalise(roll + self.noise * rng.standard_normal(roll.shape), rng, dtype)


class Heartbeat(Data):
    """20 bits with a one in every fifth, the phase uniform over five: a true log likelihood of
    log 1/5 (section 3.1.2)."""

    def __init__(self):
        self.name, self.shape, self.binary, self.mean = "heartbeat", (1, 1, 20), True, 0.2
        self.truth = Patterns((np.arange(20) % 5 == np.arange(5)[:, None]).astype(np.float64))
        self.digest = fingerprint("heartbeat", self.truth.patterns)

    def describe(self):
        return "heartbeat: endless sequences of 20 zeros and ones, a one in every fifth"

    def draw(self, number, rng, dtype=np.float64):
        return self.truth.patterns[rng.integers(0, 5, number)].astype(dtype)

    def held_out(self, number, seed=0):
        """The five phases in turn, since there is nothing else to hold out."""
        return self.truth.patterns[np.arange(number) % 5]


def _spans(first, count):
    """The whole numbers first[i], first[i] + 1, ..., count[i] of them, for all i in turn: which i
    each belongs to, and the numbers."""
    which = np.repeat(np.arange(len(count)), count)
    offset = np.cumsum(count) - count
    return which, np.arange(len(which)) + (first - offset)[which]


def _between(low, high, end):
    """The points p + 1/2, p = 0..end - 1, from low[i] to high[i]: the first p, and how many."""
    first = np.ceil(np.clip(low, 0, end) - 0.5).astype(int)
    return first, np.floor(np.clip(high, 0, end) + 0.5).astype(int) - first


class DeadLeaves(Data):
    """Occluding discs, the paper's dead leaves (figure 4), side x side bytes, every one fresh.

    The law: discs fall one behind the other until no gap is left. Their centres are uniform over
    the plane and their radii have p(r) proportional to r^-3 from 1 pixel to `side` pixels, so that
    no size of disc covers more of the picture than another and the pictures look alike at all
    scales: the power spectrum is about 1/f^2, down to waves of 5 pixels. Each disc has one grey,
    uniform on [0, 256). A pixel is the average over its 3 x 3 points (anti-aliasing), rounded down
    to a byte. (The paper does not give its generator, so its bits cannot be compared with bits on
    these pictures.)

    Two points at a distance d show the same disc with probability g / (2 - g), where g is the mean
    area in which a disc overlaps itself moved by d, over its mean area: the disc in front, of all
    that cover one point or both, must cover both. This is the correlation of the pictures before
    anti-aliasing, and their variance after it follows. The mean is 128."""

    grain = 3                                       # points along a pixel

    def __init__(self, side=32):
        self.name = "deadleaves" if side == 32 else f"deadleaves:{side}"
        self.side, self.shape, self.bytes = side, (side, side, 1), True
        self.radii = 1.0, 1.0 * side
        step = np.arange(self.grain) / self.grain
        apart = np.abs(step - step[:, None]).ravel()            # of two points of a pixel, along x
        same = self.same_leaf(np.hypot(apart, apart[:, None])).mean()
        self.shift, self.scale = 128.0, math.sqrt(256 ** 2 / 12 * same)
        self.edges = tuple((level - self.shift) / self.scale for level in (0, 1, 255, 256))
        self.detail = 0.01 / self.scale
        self.digest = fingerprint("dead leaves", side, self.radii, self.grain)

    def describe(self):
        return (f"{self.name}: endless pictures of {self.side} x {self.side} x 1, discs of radius "
                f"{self.radii[0]:.0f} to {self.radii[1]:.0f}, bytes 0..255"
                + ", dequantised" * self.dequantise)

    def same_leaf(self, d):
        """The probability that points at a distance of d pixels (any array) show the same disc."""
        d = np.asarray(d, np.float64)[..., None]
        low, high = np.log(self.radii)
        r = np.exp(low + (high - low) * (np.arange(2000) + 0.5) / 2000)     # dr = r d(log r)
        half = np.minimum(d / (2 * r), 1)
        lens = 2 * r ** 2 * (np.arccos(half) - half * np.sqrt(1 - half ** 2))
        g = (lens / r ** 2).mean(-1) / np.pi
        return g / (2 - g)

    def _mass(self):
        """Of the radii of discs whose bounding square touches the picture. Their number goes with
        r^-3 (side + 2r)^2 = side^2 r^-3 + 4 side r^-2 + 4 r^-1: the integrals of the three."""
        low, high = self.radii
        return np.array([self.side ** 2 * (low ** -2 - high ** -2) / 2,
                         4 * self.side * (1 / low - 1 / high), 4 * np.log(high / low)])

    def leaves(self, number, rng):
        """Radius and centre x, y, in pixels, of discs that may touch the picture, (number,)."""
        (low, high), mass, u = self.radii, self._mass(), rng.random(number)
        which = np.searchsorted(np.cumsum(mass[:2] / mass.sum()), rng.random(number))
        r = np.where(which == 0, (low ** -2 - u * (low ** -2 - high ** -2)) ** -0.5,
                     np.where(which == 1, 1 / (1 / low - u * (1 / low - 1 / high)),
                              low * (high / low) ** u))
        return r, *((self.side + 2 * r) * rng.random((2, number)) - r)

    def pictures(self, number, rng):
        """(number, side^2) bytes. In rounds of discs, each round behind those before; pictures
        that have gaps go on to the next round."""
        fine = self.side * self.grain
        canvas = np.full((number, fine * fine), -1, np.float32)
        covers = np.pi * np.log(self.radii[1] / self.radii[0]) / self._mass().sum()
        leaves = math.ceil(1.5 / covers)            # so many cover a point 1.5 times in the mean
        rows = np.arange(number)
        while len(rows):
            part = canvas[rows]
            self._paint(part.reshape(-1), np.repeat(np.arange(len(rows)), leaves), fine, rng)
            canvas[rows] = part
            rows = rows[(part < 0).any(1)]
        points = canvas.reshape(number, self.side, self.grain, self.side, self.grain)
        levels = np.minimum(points.mean((2, 4)), 255)           # float32 may round up to 256
        return levels.astype(np.uint8).reshape(number, -1)

    def _paint(self, canvas, picture, fine, rng):
        """One disc for every entry of `picture`, each before those to its left, in what is still
        bare (negative) of the flat canvas. A disc is a stack of chords, a chord a run of points."""
        r, x, y = (self.grain * value for value in self.leaves(len(picture), rng))
        grey = 256 * rng.random(len(picture), dtype=np.float32)
        leaf, line = _spans(*_between(y - r, y + r, fine))
        half = np.sqrt(np.maximum(r[leaf] ** 2 - (line + 0.5 - y[leaf]) ** 2, 0))
        left, length = _between(x[leaf] - half, x[leaf] + half, fine)
        start, bare = (picture[leaf] * fine + line) * fine + left, canvas < 0
        before = np.concatenate([[0], np.cumsum(bare)])
        shows = before[start + length] > before[start]          # most chords of a late round don't
        chord, point = _spans(start[shows], length[shows])
        grey, shows = grey[leaf[shows]][chord], bare[point]
        canvas[point[shows]] = grey[shows]          # of several values for a point the last stays

    def draw(self, number, rng, dtype=np.float64):
        block = max(1, 2 ** 14 // self.side ** 2)               # so much stays in the cache
        parts = [self.pictures(min(block, number - i), rng) for i in range(0, number, block)]
        return self.normalise(np.concatenate(parts), rng, dtype)
