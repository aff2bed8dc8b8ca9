"""Diffusion probabilistic models, the whole method, after Sohl-Dickstein, Weiss, Maheswaranathan & Ganguli, "Deep
Unsupervised Learning using Nonequilibrium Thermodynamics" (2015), arXiv 1503.03585. Equation numbers are the paper's.

The idea. A fixed diffusion q turns data x_0 into noise x_T in T small steps that anybody can sample:

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                                                 t = 1..T

Run backwards, a small enough step is again a Gaussian, so a network that learns T means and variances

    p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_sigma(x_t, t))

is a generative model: draw x_T from pi = N(0, I), then step t = T..1. Its log likelihood has a lower bound K, a sum of
entropies and of KL divergences between Gaussians, each in closed form (eq. 14). K is what is trained and what is reported.

    room 1   schedules and the diffusion     schedule, Gaussian             what q and p are
    room 2   the reverse kernel              MLP, Kernel, Adam              how f_mu and f_sigma are learned
    room 3   the model                       DPM                            the bound K, its gradient, sampling, p(x_0) r(x_0)

Conventions. t runs 1..T and arrays over t have T + 1 entries; entry 0 is the data without noise, alpha_bar[0] = 1. Data is a
matrix (n, D) of mean 0 and average variance 1. The paper's symbols are the names; the gradient of `name` is `dname`; its
backward stands under each forward. Everything is in nats. Schedules, posteriors, KLs and entropies are float64, only the
network is float32. `xp` is numpy or cupy, and every array of a model lives where its xp says.
"""
import os

for _library in ("OPENBLAS", "MKL", "OMP", "VECLIB_MAXIMUM"):  # our threads run whole slices of a batch, see DPM; BLAS must not
    os.environ.setdefault(_library + "_NUM_THREADS", "1")      # split its products among threads as well

import contextlib
import copy
import json
import math
import pathlib
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy.special import expit, logit

FORMAT = 1  # of the checkpoint file
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class InputError(ValueError):
    """The user's mistake: its message is one line that says what is wrong and what to do."""


def backend(gpu=None):
    """The array module: cupy if gpu, numpy if not, and cupy where it works if gpu is None. InputError if gpu and it does not."""
    if gpu is False:
        return np
    try:
        import cupy
        cupy.zeros(1)
        return cupy
    except ImportError:
        problem = "CuPy is not installed: pip install cupy-cuda12x (or -cuda13x, to match the driver)"
    except Exception as error:  # without a usable driver or device CuPy raises several types, none of them its own
        problem = f"CuPy finds no usable GPU ({first_line(error)})"
    if gpu:
        raise InputError(f"--gpu: {problem}; or leave --gpu away to compute on the CPU")
    return np


def generator(xp, purpose, *key):
    """A random generator that depends on the word `purpose` and the integers `key` alone: nothing has to be saved to go on from
    a step, and draws for different purposes are unrelated, whatever their keys."""
    key = (zlib.crc32(purpose.encode()), *key)
    return np.random.default_rng(key) if xp is np else xp.random.Generator(xp.random.Philox4x3210(key))


def first_line(error):
    """What an exception says, or its name if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def to_host(a):
    """A NumPy array of the same content, wherever `a` lives."""
    return a.get() if hasattr(a, "get") else np.asarray(a)


@contextlib.contextmanager
def written_whole(path):
    """A temporary path beside `path` to write to, which becomes `path` at the end: no reader, crash or full disk meets half a file."""
    path = pathlib.Path(path)
    temporary = path.with_name(".part-" + path.name)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------------
# Room 1. What q and p are
# ---------------------------------------------------------------------------------------------------------------------------

def schedule(kind, T, beta_1):
    """alpha_bar_0..T, float64 (T + 1,), where alpha_bar_t = prod_{s<=t} (1 - beta_s) is the part of the data's variance left.

    kind    logsnr   logit(1 - alpha_bar_t) linear in t, from logit(beta_1) to 10
            paper    beta_t = 1 / (T - t + 1) for t >= 2, footnote 2 and section 2.4.1: a fixed fraction of the signal goes at each step
            linear   beta_t on the line from 1e-4 at t = 1 to 0.02 at T, times 1000 / T so that any T ends in noise (Ho et al. 2020)
    beta_1  the variance of the first step, fixed (section 2.4.1). It limits K: no model gets above -D/2 ln(2 pi e beta_1).
    """
    if T < 2 or not 0 < beta_1 < 1:
        raise InputError(f"a schedule needs T >= 2 and 0 < beta_1 < 1, not T = {T}, beta_1 = {beta_1}")
    t = np.arange(2, T + 1)
    if kind == "logsnr":
        return np.concatenate([[1], expit(-np.linspace(logit(beta_1), 10, T))])
    if kind == "paper":
        beta = 1 / (T - t + 1)
    elif kind == "linear":
        beta = np.minimum(np.linspace(1e-4, 0.02, T)[1:] * 1000 / T, 0.999)
    else:
        raise InputError(f"no schedule '{kind}': choose logsnr, paper or linear")
    return np.concatenate([[1], np.cumprod(np.concatenate([[1 - beta_1], 1 - beta]))])


class Gaussian:
    """The Gaussian diffusion, left column of Table App.1, for one schedule alpha_bar_0..T.

    A kernel for it gives two numbers per dimension, out (n, D, 2), v = out[..., 0] and w = out[..., 1]; see `reverse`.
    Methods take t as an integer array (n,), one per example.
    """

    outputs = 2

    def __init__(self, alpha_bar, xp=np):
        alpha_bar = np.asarray(alpha_bar, np.float64)
        before = np.concatenate([[1], alpha_bar[:-1]])                  # alpha_bar_{t-1}
        beta, noise = 1 - alpha_bar / before, 1 - alpha_bar
        with np.errstate(divide="ignore", invalid="ignore"):            # at t < 2 there is no posterior
            beta_tilde = beta * (1 - before) / noise
            tables = dict(forward=(np.sqrt(alpha_bar), np.sqrt(noise)),
                          posterior=(np.sqrt(before) * beta / noise, np.sqrt(1 - beta) * (1 - before) / noise, beta_tilde),
                          reverse=(np.sqrt(1 - beta), -beta * np.sqrt(before / noise), np.log(beta), np.log(noise / (1 - before))))
        self.xp, self.T = xp, len(alpha_bar) - 1
        self.alpha_bar, self.beta = xp.asarray(alpha_bar), xp.asarray(beta)
        self._tables = {name: xp.asarray(np.stack(rows)) for name, rows in tables.items()}

    def _at(self, name, t):
        """The coefficients in that table at t (n,), as columns (n, 1)."""
        return self._tables[name][:, t][:, :, None]

    def signal_and_noise(self, t):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), (n, 1): what is left of x_0 in x_t, and the deviation of what was added."""
        return self._at("forward", t)

    def noise(self, shape, rng, dtype=np.float64):
        """The randomness of one draw, frozen: eps ~ N(0, I)."""
        return rng.standard_normal(shape, dtype=dtype)

    def diffuse(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I), from frozen noise eps (n, D)."""
        signal, deviation = self.signal_and_noise(t)
        return signal * x0 + deviation * eps

    def posterior(self, x0, xt, t):
        """q(x_{t-1} | x_t, x_0) = N(mu~, beta~_t I), t >= 2, what appendix B turns q around with: mu~ (n, D) and beta~_t (n, 1).

        beta~_t = beta_t (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t)
        mu~ = [ sqrt(alpha_bar_{t-1}) beta_t x_0 + sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) x_t ] / (1 - alpha_bar_t)
        """
        from_x0, from_xt, beta_tilde = self._at("posterior", t)
        return from_x0 * x0 + from_xt * xt, beta_tilde

    def reverse(self, xt, t, out):
        """p(x_{t-1} | x_t) = N(f_mu, f_sigma), t >= 2: f_mu and log f_sigma (n, D).

        f_mu = sqrt(1 - beta_t) x_t - v beta_t sqrt(alpha_bar_{t-1} / (1 - alpha_bar_t))
        log f_sigma = log beta_t + w (log beta_t - log beta~_t)

        At v = w = 0 this is the equilibrium kernel, exact for white data. The v that makes f_mu equal mu~ is
        sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0, of unit size at every t. w = 0 and w = -1 stand at the upper and the
        lower bound that eq. 24 puts on the entropy of this step.
        """
        shrink, shift, log_beta, spread = self._at("reverse", t)
        return shrink * xt + shift * out[..., 0], log_beta + spread * out[..., 1]

    def kl(self, x0, xt, t, out):
        """KL[ q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ], t >= 2, in nats (n,), and its derivative dout, shaped as out.

        per dimension, 1/2 [ log(f_sigma / beta~) - 1 + (beta~ + (f_mu - mu~)^2) / f_sigma ]
        """
        xp = self.xp
        mu, beta_tilde = self.posterior(x0, xt, t)
        f_mu, log_f_sigma = self.reverse(xt, t, out)
        precision, error = xp.exp(-log_f_sigma), f_mu - mu
        df_mu = error * precision
        excess = beta_tilde * precision + df_mu * error                 # 1 where p has just the right variance
        _, shift, log_beta, spread = self._at("reverse", t)             # log beta~ = log beta - spread
        dout = xp.empty(out.shape, out.dtype)
        dout[..., 0] = df_mu * shift
        dout[..., 1] = 0.5 * (1 - excess) * spread
        return 0.5 * (log_f_sigma + excess + (spread - log_beta - 1)).sum(1), dout

    def ideal(self, xt, t, mean, variance):
        """The out (n, D, 2) for which p is the best diagonal Gaussian there is, from E[x_0 | x_t] and Var[x_0 | x_t], (n, D).

        x_{t-1} has, given x_t, the mean mu~(E x_0, x_t) and the variance beta~_t + (d mu~ / d x_0)^2 Var x_0.
        """
        xp = self.xp
        from_x0, _, beta_tilde = self._at("posterior", t)
        signal, deviation = self.signal_and_noise(t)
        _, _, log_beta, spread = self._at("reverse", t)
        eps = (xt - signal * mean) / deviation
        return xp.stack([signal * eps - deviation * mean, (xp.log(beta_tilde + from_x0 ** 2 * variance) - log_beta) / spread], 2)

    def step(self, f_mu, f_sigma, eps):
        """A draw from N(f_mu, f_sigma) with noise eps; f_sigma is a variance."""
        return f_mu + self.xp.sqrt(f_sigma) * eps

    def first(self, x1):
        """The fixed first reverse step, eq. 44: p(x_0 | x_1) = N(sqrt(1 - beta_1) x_1, beta_1 I), as f_mu, f_sigma."""
        return self.xp.sqrt(1 - self.beta[1]) * x1, self.beta[1]

    def multiply(self, f_mu, f_sigma, r):
        """The normalised product of N(f_mu, f_sigma) and r, eq. 22, Table App.1: its mean and variance.

        r is an Observation, a Gaussian in x with mean y and standard deviation sigma for every coordinate. With the gain
        g = f_sigma / (f_sigma + sigma^2): mean (1 - g) f_mu + g y, variance (1 - g) f_sigma. sigma = 0 says that a
        coordinate is known (g = 1, the product is a delta at y), sigma = inf that nothing is (g = 0).
        """
        g = f_sigma / (f_sigma + r.sigma ** 2)
        return (1 - g) * f_mu + g * r.y, (1 - g) * f_sigma

    def H_q(self, t):
        """H_q(X_t | X_0) per dimension, nats: 1/2 ln(2 pi e (1 - alpha_bar_t)). A float, for one t >= 1."""
        return 0.5 * math.log(2 * math.pi * math.e * (1 - float(self.alpha_bar[t])))

    def log_pi(self, x):
        """log pi(x) (n,), pi = N(0, I). Its mean over the data is L_null, over x_T of unit variance -H_p(X_T)."""
        return -0.5 * (x ** 2 + math.log(2 * math.pi)).sum(1)

    H_pi = 0.5 * math.log(2 * math.pi * math.e)  # H_p(X_T) per dimension


class Observation:
    """r(x) = N(x; y, sigma^2) for the posterior p(x_0) r(x_0): y (n, D) or (D,), sigma >= 0 of the same or a smaller shape, in
    units of the normalised data. sigma = 0 clamps a coordinate (inpainting), sigma = inf leaves it free, in between it denoises.

    InputError where y or sigma is NaN, sigma is negative, y is not finite where it counts, or the shapes do not fit."""

    def __init__(self, y, sigma, xp=np):
        y, sigma = np.asarray(y, np.float64), np.asarray(sigma, np.float64)
        try:
            sigma = np.broadcast_to(sigma, y.shape)
        except ValueError:
            raise InputError(f"the noise of an observation has shape {sigma.shape}, the observation {y.shape}") from None
        if np.isnan(sigma).any() or (sigma < 0).any():
            raise InputError("the noise of an observation must be 0 (known), positive, or inf (unknown)")
        if not np.isfinite(y[np.isfinite(sigma)]).all():
            raise InputError("an observation is NaN or infinite where it is said to be known")
        self.y, self.sigma = xp.asarray(np.where(np.isfinite(sigma), y, 0)), xp.asarray(sigma)

    def rows(self, s):
        """The same observation of the examples in slice s only."""
        part = copy.copy(self)
        if self.y.ndim == 2:
            part.y, part.sigma = self.y[s], self.sigma[s]
        return part


# ---------------------------------------------------------------------------------------------------------------------------
# Room 2. The reverse kernel: a network from (x_t, t) to the two numbers per dimension, backward written by hand
# ---------------------------------------------------------------------------------------------------------------------------

class MLP:
    """A residual multilayer perceptron whose every layer hears the time e:

        h_1 = s(x W_1 + e V_1 + b_1)      h_l = h_{l-1} + s(h_{l-1} W_l + e V_l + b_l)      y = h_L W + b

    with the softsign s(z) = z / (1 + |z|), a tanh at a fifth of its cost. x is (N, inputs), e is (n, time): an example has
    N / n rows, the pixels of an image, which share its time. It reads its weights from kernel.W and puts their gradients
    into kernel.dW, under "name.W1", ...; its large arrays are buffers of the kernel, allocated once.
    """

    def __init__(self, kernel, name, layers):
        self.kernel, self.name, self.layers = kernel, name, layers

    @staticmethod
    def shapes(name, inputs, width, layers, outputs, time):
        shapes = {}
        for l in range(1, layers + 1):
            shapes |= {f"{name}.W{l}": (inputs if l == 1 else width, width), f"{name}.V{l}": (time, width), f"{name}.b{l}": (width,)}
        return shapes | {f"{name}.W": (width, outputs), f"{name}.b": (outputs,)}

    def _buffer(self, name, *shape):
        return self.kernel.buffer(f"{self.name}.{name}", shape)

    def forward(self, x, e):
        """y (N, outputs), valid until the next call; keeps what backward needs."""
        xp, W, name = self.kernel.xp, self.kernel.W, self.name
        n, N = len(e), len(x)
        self.e, self.h, self.d = e, [x], []
        for l in range(1, self.layers + 1):
            W_l = W[f"{name}.W{l}"]
            z = xp.matmul(self.h[-1], W_l, out=self._buffer(f"h{l}", N, W_l.shape[1]))
            rows = z.reshape(n, N // n, -1)
            rows += (e @ W[f"{name}.V{l}"] + W[f"{name}.b{l}"])[:, None]
            d = xp.abs(z, out=self._buffer(f"d{l}", *z.shape))
            d += 1
            z /= d                                                      # z is now s(z), and soon h_l
            if l > 1:
                z += self.h[-1]
            self.h.append(z)
            self.d.append(d)
        y = xp.matmul(self.h[-1], W[f"{name}.W"], out=self._buffer("y", N, W[f"{name}.W"].shape[1]))
        y += W[f"{name}.b"]
        return y

    def backward(self, dy, add, columns=None):
        """From dy (N, outputs), once after each forward: the gradients of the weights, written (add=False) or added to what is
        there; returns de (n, time) and, if columns (a slice) is given, the gradient of those columns of x, transposed.

        y = h_L W + b                         dW = h_L' dy      db = sum dy      dh = dy W'
        h_l = h_{l-1} + s(z_l)                dz_l = dh / d_l^2                  since s'(z) = 1 / (1 + |z|)^2 and d = 1 + |z|
        z_l = h_{l-1} W_l + e V_l + b_l       dW_l = h_{l-1}' dz_l               dh += dz_l W_l'
                                              dc = dz_l, summed over the rows of an example: dV_l = e' dc, db_l = sum dc, de += dc V_l'
        """
        kernel, xp, W, name = self.kernel, self.kernel.xp, self.kernel.W, self.name
        n, N, width = len(self.e), len(dy), self.h[-1].shape[1]

        def put(weight, a, b):
            dW = kernel.dW[f"{name}.{weight}"]
            if add:
                dW += a @ b
            else:
                xp.matmul(a, b, out=dW)

        put("W", self.h[-1].T, dy)
        put("b", kernel.ones(N), dy)
        dh = xp.matmul(dy, W[f"{name}.W"].T, out=self._buffer("dh", N, width))
        de = xp.zeros_like(self.e)
        for l in range(self.layers, 0, -1):
            dz = self.d[l - 1]
            dz *= dz
            xp.divide(dh, dz, out=dz)
            dc = kernel.ones(N // n) @ dz.reshape(n, N // n, width)     # the sum over rows as a product: three times as fast
            put(f"W{l}", self.h[l - 1].T, dz)
            put(f"V{l}", self.e.T, dc)
            put(f"b{l}", kernel.ones(n), dc)
            de += dc @ W[f"{name}.V{l}"].T
            if l > 1:
                dh += xp.matmul(dz, W[f"{name}.W{l}"].T, out=self._buffer("scratch", N, width))
        if columns is None:
            return de, None
        W_1 = W[f"{name}.W1"][columns]
        return de, xp.matmul(W_1, dz.T, out=self._buffer("dx", len(W_1), N))


class Kernel:
    """The network of the reverse kernel for examples of shape (H, W, C), flattened to D = H W C; a vector is one pixel of D channels.

        e = tanh(phases of t Q + q)                                        the time
        maps = lower(x, e)                                                 `maps` numbers per pixel, from the whole image
        sights = middle(patches of x at half its size, e)                  `sights` numbers per 2 x 2 pixels, from 14 x 14 around them
        out = upper([features, maps, sights], e)                           the same small MLP at every pixel, 2 outputs per channel

    This is the paper's lower and upper network (appendix D.2, figure D.1), the lower one with its dense and its coarse
    convolutional path. The dense one knows what the image is about, the middle one where strokes go on, the upper one treats
    its pixel finely. Vectors need no lower network: maps = sights = 0. The features of a value x are x and
    its neighbours in a square of `patch` pixels, sin and cos of 2^k pi x for k in `scales`, and for every c in `edges`, values
    where the density of the data jumps, the softsign of (x - sqrt(alpha_bar_t) c) / s for s = 1 and 4 standard deviations of
    the noise: at each noise level the distance that matters. The readout starts at zero: the equilibrium kernel, K = L_null.

    Its one array theta holds all weights, W names views of it; grad and dW are the same for their gradient.
    """

    view = 7  # the side of the middle network's patches, in pixels of half the size

    def __init__(self, diffusion, shape, width=256, layers=4, maps=8, sights=0, upper=64, upper_layers=2, time=64,
                 scales=(1, 3, 5), edges=(), patch=1, dtype="float32", seed=0, theta=None):
        self.config = dict(shape=list(shape), width=width, layers=layers, maps=maps, sights=sights, upper=upper,
                           upper_layers=upper_layers, time=time, scales=list(scales), edges=list(edges), patch=patch, dtype=dtype, seed=seed)
        self.diffusion, self.xp, self.dtype = diffusion, diffusion.xp, np.dtype(dtype)
        self.shape, self.pixels, self.channels, self.maps = tuple(shape), shape[0] * shape[1], shape[2], maps
        self.D, self.scales, self.edges, self.patch = self.pixels * self.channels, scales, edges, patch
        self.sights = sights
        self.features_per_pixel = self.channels * (patch ** 2 + 2 * len(scales) + 2 * len(edges)) + maps + sights
        self.shapes = {"time.Q": (64, time), "time.q": (time,)}
        if maps:
            self.shapes |= MLP.shapes("lower", self.D, width, layers, self.pixels * maps, time)
        if sights:
            self.shapes |= MLP.shapes("middle", self.channels * self.view ** 2, upper, upper_layers, sights, time)
        self.shapes |= MLP.shapes("upper", self.features_per_pixel, upper, upper_layers, diffusion.outputs * self.channels, time)
        # A slice of images goes through the upper network while its activations are in cache; a GPU takes the whole batch
        self.slice = max(1, 6400 // self.pixels) if self.xp is np else 1 << 30
        self._buffers = {}
        phase = np.arange(diffusion.T + 1)[:, None] / diffusion.T * np.exp(np.linspace(0, 5, 32))
        self._phases = self.xp.asarray(np.concatenate([np.sin(phase), np.cos(phase)], 1).astype(self.dtype))
        size = sum(map(math.prod, self.shapes.values()))
        if theta is None:
            rng, theta = generator(np, "weights", seed), np.zeros(size, self.dtype)
            for name, w in self._views(theta).items():
                if w.ndim == 2 and name != "upper.W":
                    w[:] = rng.standard_normal(w.shape) / math.sqrt(len(w))
            theta = self.xp.asarray(theta)
        self.theta, self.grad = theta, self.xp.zeros(size, self.dtype)
        self.W, self.dW = self._views(self.theta), self._views(self.grad)
        self.lower, self.middle, self.upper = MLP(self, "lower", layers), MLP(self, "middle", upper_layers), MLP(self, "upper", upper_layers)

    def replica(self):
        """A kernel with the same weights (the same memory), and gradients and buffers of its own: one for each thread."""
        return Kernel(self.diffusion, **self.config, theta=self.theta)

    def _views(self, flat):
        ends = np.cumsum([math.prod(s) for s in self.shapes.values()])
        return {name: flat[end - math.prod(s):end].reshape(s) for (name, s), end in zip(self.shapes.items(), ends.tolist())}

    def buffer(self, name, shape):
        """Memory that is allocated once and reused: a fresh large array costs a page fault every 4 KiB."""
        size = math.prod(shape)
        if name not in self._buffers or self._buffers[name].size < size:
            self._buffers[name] = self.xp.empty(size, self.dtype)
        return self._buffers[name][:size].reshape(shape)

    def ones(self, n):
        if "ones" not in self._buffers or len(self._buffers["ones"]) < n:
            self._buffers["ones"] = self.xp.ones(n, self.dtype)
        return self._buffers["ones"][:n]

    def flop(self, n):
        """Floating-point operations in the matrix products of one gradient() over n examples: 2 for each weight and row forward,
        2 for dW, 2 for the gradient passed on, which the features, the phases and the image do without."""
        total = 0
        for name, w in self.W.items():
            if w.ndim == 2:
                rows = n * {"upper.W": self.pixels, "middle.W": self.pixels // 4}.get(name[:name.find(".") + 2], 1)
                passed_on = {"time.Q": 0, "lower.W1": 0, "middle.W1": 0, "upper.W1": (self.maps + self.sights) / len(w)}.get(name, 1)
                total += rows * w.size * (4 + 2 * passed_on)
        return total

    def _time(self, t):
        """The phases of t / T at 32 frequencies from 1 to e^5, (n, 64), and e (n, time)."""
        phases = self._phases[t]
        return phases, self.xp.tanh(phases @ self.W["time.Q"] + self.W["time.q"])

    def _patches(self, name, x, size, u):
        """Fills u (C size^2, n, H W) with the squares of size x size around every pixel of x (n, H, W, C), 0 beyond the border."""
        n, H, W, C = x.shape
        margin = size // 2
        padded = self.buffer(name, (n, H + 2 * margin, W + 2 * margin, C))
        padded[...] = 0
        padded[:, margin:margin + H, margin:margin + W] = x
        for i in range(C * size ** 2):
            c, dy, dx = i // size ** 2, i // size % size, i % size
            u[i].reshape(n, H, W)[...] = padded[:, dy:dy + H, dx:dx + W, c]

    def _features(self, x, t, e, maps):
        """The upper network's input for a slice, (n pixels, features); feature after feature in memory, each written as one run."""
        xp, n, (H, W, C) = self.xp, len(x), self.shape
        u = self.buffer("u", (self.features_per_pixel, n, self.pixels))
        signal, deviation = self.diffusion.signal_and_noise(t)
        deviation, ratio = deviation.astype(self.dtype), (signal / deviation).astype(self.dtype)
        image = x.reshape(n, H, W, C)
        self._patches("padded", image, self.patch, u)
        i = C * self.patch ** 2
        for c in range(C):
            value = x[:, c::C]
            for k in self.scales:
                xp.multiply(value, 2.0 ** k * math.pi, out=u[i])
                xp.cos(u[i], out=u[i + 1])
                xp.sin(u[i], out=u[i])
                i += 2
            scaled = value / deviation
            for edge in self.edges:
                distance = scaled - edge * ratio
                size = xp.abs(distance)
                for s in (1, 4):
                    xp.divide(distance, size + s, out=u[i])
                    i += 1
        if self.maps:
            u[i:i + self.maps] = maps.reshape(n, self.maps, self.pixels).transpose(1, 0, 2)
        if self.sights:
            half = image.reshape(n, H // 2, 2, W // 2, 2, C).sum((2, 4)) / 2
            v = self.buffer("v", (C * self.view ** 2, n, self.pixels // 4))
            self._patches("padded half", half, self.view, v)
            y = self.middle.forward(v.reshape(len(v), -1).T, e).T.reshape(self.sights, n, H // 2, 1, W // 2, 1)
            u[i + self.maps:].reshape(self.sights, n, H // 2, 2, W // 2, 2)[...] = y
        return u.reshape(self.features_per_pixel, -1).T

    def forward(self, x, t):
        """out (n, D, 2) for x (n, D) of the network's dtype and t (n,)."""
        _, e = self._time(t)
        out = self.xp.empty((len(x), self.D, self.diffusion.outputs), self.dtype)
        maps = self.lower.forward(x, e) if self.maps else x
        for i in range(0, len(x), self.slice):
            s = slice(i, min(i + self.slice, len(x)))
            out[s] = self.upper.forward(self._features(x[s], t[s], e[s], maps[s]), e[s]).reshape(out[s].shape)
        return out

    def gradient(self, x, t, loss):
        """Forward and backward: dtheta in self.grad, where loss(s, out) returns dout for the examples in slice s.

        Slice by slice through the upper network, so loss and backward meet its activations while they are in cache; the
        lower network, whose cost is in reading its weights, goes over all examples at once.
        out = upper([features, maps, sights], e)      de, dmaps, dsights, which go back through lower and middle; in the end
        e = tanh(phases Q + q)                        dz = de (1 - e^2), dQ = phases' dz, dq = sum dz
        """
        xp, n = self.xp, len(x)
        phases, e = self._time(t)
        de = xp.empty_like(e)
        maps = self.lower.forward(x, e) if self.maps else x
        H, W, C = self.shape
        inputs = self.maps + self.sights
        columns = slice(self.features_per_pixel - inputs, None) if inputs else None
        for i in range(0, n, self.slice):
            s = slice(i, min(i + self.slice, n))
            out = self.upper.forward(self._features(x[s], t[s], e[s], maps[s]), e[s])
            dout = loss(s, out.reshape(-1, self.D, self.diffusion.outputs)).reshape(out.shape)
            de[s], du = self.upper.backward(dout, add=i > 0, columns=columns)
            if self.maps:  # what was maps is now dmaps
                dmaps = du[:self.maps].reshape(self.maps, -1, self.pixels)
                maps[s] = dmaps.transpose(1, 0, 2).reshape(-1, self.maps * self.pixels)
            if self.sights:  # each was shown to 2 x 2 pixels
                dsights = du[self.maps:].reshape(self.sights, -1, H // 2, 2, W // 2, 2).sum((3, 5))
                de[s] += self.middle.backward(dsights.reshape(self.sights, -1).T, add=i > 0)[0]
        if self.maps:
            de += self.lower.backward(maps, add=False)[0]
        dz = de * (1 - e * e)
        xp.matmul(phases.T, dz, out=self.dW["time.Q"])
        xp.matmul(self.ones(n), dz, out=self.dW["time.q"])


class IdealKernel:
    """The best kernel there is for data whose moments E[x_0 | x_t] and Var[x_0 | x_t] are known: its K is K*, the limit for every network.

    moments(x, alpha_bar) gives both for x (n, D) at one noise level."""

    dtype = np.dtype("float64")

    def __init__(self, diffusion, moments):
        self.diffusion, self.moments = diffusion, moments

    def replica(self):
        return self

    def forward(self, x, t):
        out = np.empty((*x.shape, 2))
        for level in np.unique(t):
            rows = t == level
            out[rows] = self.diffusion.ideal(x[rows], t[rows], *self.moments(x[rows], float(self.diffusion.alpha_bar[level])))
        return out


class Adam:
    """Adam (Kingma & Ba 2014) with clipping, warm-up, decay to zero, and a running average of the weights.

        m += (1 - b1) (g - m)     v += (1 - b2) (g^2 - v)     theta -= rate m^ / (sqrt(v^) + 1e-8)     average += c (theta - average)

    g is the gradient, shortened to norm `clip` where it is longer; rate climbs to lr over `warmup` steps, stays, and falls
    along a half cosine over the second half of `steps`; the average reaches back over a tenth of the steps so far, at most
    1000. theta and its companions are updated in place, in chunks that fit the cache, dealt out to the threads.
    """

    b1, b2, clip, chunk = 0.9, 0.99, 1.0, 1 << 16

    def __init__(self, theta, xp=np, lr=1e-3, steps=1000, warmup=200):
        self.theta, self.xp, self.lr, self.steps, self.warmup = theta, xp, lr, steps, warmup
        self.m, self.v, self.average, self.step = xp.zeros_like(theta), xp.zeros_like(theta), theta.copy(), 0

    def rate(self):
        """The learning rate of the step now being made."""
        left = 2 * max(0.0, self.step / self.steps - 0.5)
        return self.lr * min(1, self.step / self.warmup) * 0.5 * (1 + math.cos(math.pi * min(left, 1)))

    def update(self, grads, pool=None):
        """One step along the sum of `grads`, one flat array for each thread; the first of them is overwritten."""
        xp, g, share = self.xp, grads[0], len(grads)
        self.step += 1
        chunk = self.chunk if xp is np else g.size
        chunks = [slice(i, i + chunk) for i in range(0, g.size, chunk)]

        def add(thread):
            square = 0
            for c in chunks[thread::share]:
                for other in grads[1:]:
                    g[c] += other[c]
                square = square + g[c] @ g[c]
            return square

        over = pool.map if pool else map
        norm = xp.sqrt(sum(over(add, range(share))))
        shorten = xp.minimum(self.clip / (norm + 1e-30), 1).astype(g.dtype)
        rate = self.rate() / (1 - self.b1 ** self.step)
        scale = 1 / (1 - self.b2 ** self.step)
        follow = max(1e-3, 1 / (10 + self.step / 10))

        def update(thread):
            work = xp.empty(min(chunk, g.size), g.dtype)
            for c in chunks[thread::share]:
                g_c, m, v, theta, average = g[c], self.m[c], self.v[c], self.theta[c], self.average[c]
                w = work[:len(g_c)]
                g_c *= shorten
                xp.subtract(g_c, m, out=w)
                w *= 1 - self.b1
                m += w
                xp.multiply(g_c, g_c, out=w)
                w -= v
                w *= 1 - self.b2
                v += w
                xp.multiply(v, scale, out=w)
                xp.sqrt(w, out=w)
                w += 1e-8
                xp.divide(m, w, out=w)
                w *= rate
                theta -= w
                xp.subtract(theta, average, out=w)
                w *= follow
                average += w

        list(over(update, range(share)))
        return norm


# ---------------------------------------------------------------------------------------------------------------------------
# Room 3. The model: the bound, its gradient, samples
# ---------------------------------------------------------------------------------------------------------------------------

def stratified(number, T, u):
    """`number` times spread evenly over 2..T by one offset u in [0, 1): every t is drawn equally often, to within one."""
    t = 2 + ((np.arange(number) + u) / number * (T - 1)).astype(np.int64)
    return np.minimum(t, T)  # (i + u) / n (T - 1) can round up to T - 1, which would be step T + 1


class DPM:
    """A diffusion and a kernel; with them the data's shift and scale, so that samples can be given in the data's units.

    On a CPU the work of a batch is dealt out to `threads` replicas of the kernel, example i to thread i mod threads; the draws
    and the order of the sums depend on `threads`, so the same number gives the same bits.
    """

    def __init__(self, diffusion, kernel, shift=0.0, scale=1.0, about=None, threads=None):
        self.diffusion, self.kernel, self.xp, self.T = diffusion, kernel, diffusion.xp, diffusion.T
        self.shift, self.scale, self.about = float(shift), float(scale), about or {}
        self.threads = (threads or CORES) if self.xp is np else 1
        self.kernels = [kernel] + [kernel.replica() for _ in range(self.threads - 1)]
        self.pool = ThreadPoolExecutor(self.threads)

    def _deal(self, work, n):
        """work(kernel, rows, thread) in every thread for its share of n examples."""
        shares = [(k, slice(j, n, self.threads), j) for j, k in enumerate(self.kernels) if j < n]
        if len(shares) == 1:
            work(*shares[0])
        else:
            list(self.pool.map(lambda share: work(*share), shares))

    def forward(self, x, t):
        """The kernel's out (n, D, outputs) for x (n, D), one t for all or one for each."""
        xp = self.xp
        t = xp.broadcast_to(xp.asarray(t), (len(x),))
        out = xp.empty((*x.shape, self.diffusion.outputs), self.kernel.dtype)

        def work(kernel, rows, _):
            out[rows] = kernel.forward(x[rows].astype(kernel.dtype), t[rows])

        self._deal(work, len(x))
        return out

    def bound(self, x0, rng, steps=None, batch=512, progress=lambda blocks: blocks):
        """The lower bound K on the mean log likelihood of x0 (n, D), in nats, and its parts (eq. 14 with 44, appendix B):

            K = - sum_{t=2..T} E_q KL[ q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ] + H_q(X_T|X_0) - H_q(X_1|X_0) - H_p(X_T)

        steps   how many of the T - 1 KLs to draw for each example, spread over all t and all examples; None computes every one.
        Returns a dict: K, K_se (standard error of the mean over examples), L_null = mean log pi(x_0), K_minus_L_null and its
        _se, kl (T + 1,), entry t the part of step t (0 for t < 2), H_q_T, H_q_1, H_p_T, the entropies of all D dimensions,
        and K_each (n,). K is exactly -kl.sum() + H_q_T - H_q_1 - H_p_T.
        """
        xp, q, (n, D), T = self.xp, self.diffusion, x0.shape, self.T
        steps = min(steps or T - 1, T - 1)
        t = stratified(n * steps, T, rng.random()).reshape(steps, n)   # steps = T - 1: row j is t = 2 + j for every example,
        t = rng.permuted(t, axis=1)                                    # else no example may be tied to one part of each row
        kl, each = np.zeros(T + 1), np.zeros(n)
        for i in progress(range(0, n, batch)):
            x = xp.asarray(x0[i:i + batch])
            for row in t[:, i:i + batch]:
                t_row = xp.asarray(row)
                xt = q.diffuse(x, t_row, xp.asarray(q.noise(x.shape, rng)))
                part = to_host(q.kl(x, xt, t_row, self.forward(xt, t_row))[0]) * ((T - 1) / steps)
                each[i:i + batch] += part
                kl += np.bincount(row, part, T + 1) / n
        H_q_T, H_q_1, H_p_T = D * q.H_q(T), D * q.H_q(1), D * q.H_pi
        each = -each + H_q_T - H_q_1 - H_p_T
        null = to_host(q.log_pi(xp.asarray(x0)))

        def se(values):
            return float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan

        return dict(K=float(-kl.sum() + H_q_T - H_q_1 - H_p_T), K_se=se(each), L_null=float(null.mean()),
                    K_minus_L_null=float(each.mean() - null.mean()), K_minus_L_null_se=se(each - null),
                    kl=kl, H_q_T=H_q_T, H_q_1=H_q_1, H_p_T=H_p_T, K_each=each)

    def gradient(self, x0, *key):
        """The gradient of -K / D in all weights, estimated from x0 (n, D) with one t for each example, stratified over 2..T.

        Leaves it in kernel.grad of self.kernels, to be added up (Adam.update does), and returns t (n,) and (T - 1) KL_t (n,) in
        nats, whose mean estimates the sum of the KLs. `key`: the integers that seed its draws, such as seed and step.
        """
        xp, q, (n, D) = self.xp, self.diffusion, x0.shape
        t = xp.asarray(stratified(n, self.T, generator(np, "times", *key).random()))
        parts = xp.empty(n)

        def work(kernel, rows, thread):
            x, t_x = x0[rows], t[rows]
            xt = q.diffuse(x, t_x, q.noise(x.shape, generator(xp, "noise", *key, thread), kernel.dtype))
            kl = xp.empty(len(x))

            def loss(s, out):
                kl[s], dout = q.kl(x[s], xt[s], t_x[s], out)
                dout *= (self.T - 1) / (n * D)
                return dout

            kernel.gradient(xt.astype(kernel.dtype), t_x, loss)
            parts[rows] = kl

        self._deal(work, n)
        for idle in self.kernels[n:]:
            idle.grad[...] = 0
        return t, (self.T - 1) * parts

    def sample(self, number, seed=0, r=None, batch=64, keep=(), progress=lambda steps: steps):
        """Samples (number, D) from p(x_0), or, for an Observation r of (number, D) or (D,), from p(x_0) r(x_0) (eqs. 4, 5 and 22).

        x_T ~ pi, then x_{t-1} ~ p(x_{t-1} | x_t) for t = T..2 and the fixed first step (eq. 44): true draws, not means. r, constant
        along the trajectory (eq. 23), multiplies every one of these distributions; like the paper, this drops what each product
        integrates to, so that posterior samples are approximate. Sample k has its own noise, from (seed, k), on every device and
        in every batch: it is the same to within rounding. keep: times whose x_t are wanted too; then the result is
        (samples, {t: x_t}).
        """
        xp, q, D = self.xp, self.diffusion, self.kernel.D
        if r is not None and (r.y.shape[-1] != D or r.y.ndim > 2 or r.y.ndim == 2 and len(r.y) != number):
            raise InputError(f"an observation of shape {r.y.shape} does not fit {number} samples of {D} dimensions")
        parts, kept = [], {t: [] for t in keep}
        steps = iter(progress(range(self.T * -(-number // batch))))
        for start in range(0, number, batch):
            rngs = [generator(np, "sample", seed, k) for k in range(start, min(start + batch, number))]
            r_part = r and r.rows(slice(start, start + batch))

            def draw(f_mu, f_sigma):
                if r_part is not None:
                    f_mu, f_sigma = q.multiply(f_mu, f_sigma, r_part)
                return q.step(f_mu, f_sigma, xp.asarray(np.stack([q.noise(D, rng) for rng in rngs])))

            x = draw(xp.zeros((len(rngs), D)), xp.ones((len(rngs), D)))
            for t in range(self.T, 0, -1):
                if t in kept:
                    kept[t].append(x)
                next(steps)
                if t > 1:
                    t_x = xp.full(len(x), t)
                    f_mu, log_f_sigma = q.reverse(x, t_x, self.forward(x, t_x))
                    x = draw(f_mu, xp.exp(log_f_sigma))
                else:
                    x = draw(*q.first(x))
            parts.append(x)
        next(steps, None)  # lets a progress bar close
        samples = xp.concatenate(parts)
        return (samples, {t: xp.concatenate(xs) for t, xs in kept.items()}) if keep else samples

    def save(self, path, adam=None, half=False):
        """The model, and the state of its training if adam is given, as an .npz without pickles; half: weights in half precision, to be shipped."""
        config = dict(diffusion=type(self.diffusion).__name__, kernel=self.kernel.config, threads=self.threads, **self.about)
        content = dict(format=FORMAT, config=json.dumps(config), alpha_bar=to_host(self.diffusion.alpha_bar), shift=self.shift, scale=self.scale)
        theta = to_host(self.kernel.theta)
        if adam:
            content |= dict(theta=theta, average=to_host(adam.average), m=to_host(adam.m), v=to_host(adam.v), step=adam.step)
        else:
            content["average"] = theta.astype(np.float16) if half else theta
        with written_whole(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **content)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path, xp=np, threads=None):
        """The model in a checkpoint, with its averaged weights. InputError if the file is missing, damaged or of another version."""
        return cls._read(path, xp, threads, "average")[0]

    @classmethod
    def resume(cls, path, xp=np, **options):
        """The model in a checkpoint as its training left it, and the Adam to go on with; options are Adam's lr, steps, ..."""
        model, content = cls._read(path, xp, None, "theta")
        adam = Adam(model.kernel.theta, xp, **options)
        for name in ("average", "m", "v"):
            setattr(adam, name, xp.asarray(content[name]))
        adam.step = int(content["step"])
        return model, adam

    @classmethod
    def _read(cls, path, xp, threads, weights):
        try:
            with np.load(path, allow_pickle=False) as file:
                content = {name: file[name] for name in file.files}
            if int(content["format"]) != FORMAT:
                raise InputError(f"{path}: a checkpoint of format {content['format']}, this program reads {FORMAT}; train it anew")
            if weights not in content:
                raise InputError(f"{path}: holds a finished model without the state of its training; it cannot be resumed")
            config = json.loads(str(content["config"]))
            trained_threads, kernel_config = config.pop("threads"), config.pop("kernel")
            diffusion = {"Gaussian": Gaussian}[config.pop("diffusion")](content["alpha_bar"], xp)
            kernel = Kernel(diffusion, **kernel_config, theta=xp.asarray(content[weights].astype(kernel_config["dtype"])))
        except FileNotFoundError:
            raise InputError(f"{path}: no such checkpoint") from None
        except InputError:
            raise
        except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{path}: not a checkpoint, or a damaged one ({first_line(error)})") from None
        if weights == "theta":  # its steps depend on the number of threads
            threads = trained_threads
        return cls(diffusion, kernel, content["shift"], content["scale"], config, threads), content
