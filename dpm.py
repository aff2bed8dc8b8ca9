"""Diffusion probabilistic models, the whole method, after Sohl-Dickstein, Weiss, Maheswaranathan &
Ganguli, "Deep Unsupervised Learning using Nonequilibrium Thermodynamics" (2015), arXiv 1503.03585.
Equation numbers are that paper's; DDPM is Ho, Jain & Abbeel (2020), arXiv 2006.11239.

The idea. A fixed diffusion q turns data x_0 into noise x_T in T small steps that anybody can draw:

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                              t = 1..T

Run backwards, a small enough step is again a Gaussian. A network that learns its mean and variance,

    p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_sigma(x_t, t))

makes a generative model: draw x_T from pi = N(0, I), then step t = T..2; the last, to x_0, is fixed
(eq. 44). For data of zeros and ones a step forgets bits instead. The log likelihood of the model
has a lower bound K, a sum of entropies and of KL divergences, each in closed form (eq. 14). K is
what is reported, and its terms are what is trained.

    1  the diffusions           schedule, Normal, Bernoulli, Gaussian, Binomial
    2  the network language     Tape, layers, readouts, the networks mlp, unet, paper, Optimiser
    3  the model                DPM: the bound K, its gradient, objectives, samples; Contrast
    4  more theory              entropy bounds, Jarzynski's estimate, the learned schedule
    5  posteriors               p(x_0) r(x_0) for any r, particles
    6  checkpoints              a model and its training in one file

Conventions. t runs 1..T; arrays over t have T + 1 entries, and entry 0 is the data without noise:
alpha_bar[0] = 1. Data is a matrix (n, D) of bits or of numbers, which are real values of mean about
0 and average variance 1. The paper's symbols are the names; mu~_t and beta~_t, DDPM's, are the mean
and the variance of q(x_{t-1} | x_t, x_0). x^ is an estimate of x, x^2 a square, x' a transposed
matrix. f_sigma is a variance, sigma a standard deviation; pi is a distribution, but 3.14 in 2 pi or
pi/2. `dname` is the gradient of the loss in `name`; a fraction such as dx / dphi is an ordinary
derivative. Everything is in nats. Schedules, KLs and entropies are float64; only the network and
the noise of its training are float32. `xp` is numpy or cupy, and every array of a model is an array
of its xp.
"""
# 0. Tools: threads, memory, errors, backends, random generators, files. For a first reading it is
# enough to know that they are here.

import os
import sys
import warnings

if "numpy" in sys.modules and os.environ.get("OPENBLAS_NUM_THREADS") != "1":
    warnings.warn("import dpm before numpy, or set OPENBLAS_NUM_THREADS=1: with BLAS on several "
                  "threads it is several times slower", stacklevel=2)
for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
              "VECLIB_MAXIMUM_THREADS"):
    os.environ.setdefault(_name, "1")  # our threads share out a batch: BLAS must not start its own

import contextlib
import copy
import ctypes
import hashlib
import importlib
import json
import math
import pathlib
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
from scipy.special import expit, logit, softmax

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

if sys.platform == "linux":  # keep freed memory: new memory costs a page fault every 4 KiB
    with contextlib.suppress(OSError, AttributeError):  # malloc.h: M_MMAP_MAX, M_TRIM_THRESHOLD,
        for _option, _value in ((-4, 0), (-1, 2 ** 31 - 1), (-8, 1)):               # M_ARENA_MAX
            ctypes.CDLL(None).mallopt(_option, _value)


class InputError(ValueError):
    """The user's mistake: its message is one line that says what is wrong and what to do."""


def first_line(error):
    """What an exception says, or its name if it says nothing; of damaged files not every byte."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def backend(gpu=None):
    """The array module: cupy if gpu, numpy if not, and cupy where it works if gpu is None.
    InputError if gpu and it does not work."""
    if gpu is False:
        return np
    try:
        import cupy
        test = cupy.random.Generator(cupy.random.Philox4x3210((0,))).random(2)
        float((cupy.ones((2, 2)) @ cupy.ones((2, 2)) * test).sum())
        return cupy
    except ModuleNotFoundError:
        problem = 'CuPy is not installed: pip install "cupy-cuda12x[ctk]" (cuda13x: newer drivers)'
    except Exception as error:  # without a driver or device, errors come from several libraries
        problem = f"CuPy finds no usable GPU ({first_line(error)})"
    if gpu:
        raise InputError(f"--gpu: {problem}; or omit --gpu to compute on the CPU")
    return np


def generator(xp, purpose, *key):
    """A random generator that depends only on the word `purpose` and the integers `key`. So a run
    can go on from any step without saved state, and draws for two purposes are unrelated.
    Different kinds of GPU may draw different numbers."""
    key = (zlib.crc32(purpose.encode()), *key)
    if xp is np:
        return np.random.default_rng(key)
    return xp.random.Generator(xp.random.Philox4x3210(key))


def to_host(a):
    """A NumPy array of the same content, wherever `a` lives."""
    return a.get() if hasattr(a, "get") else np.asarray(a)


@contextlib.contextmanager
def written_whole(path):
    """A temporary path beside `path` to write to, which becomes `path` at the end. So nobody ever
    reads half a file, and a crash or a full disk leaves the old one."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; {path} cannot be written") from None
    finally:
        temporary.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------
# 1. The diffusions
# ------------------------------------------------------------------------------------------------
# Nothing in this chapter is learned. A diffusion says what noise does to data (q), how one step is
# undone when x_0 is known, and how the numbers of a network describe a reverse step (p).

SCHEDULES = "logsnr", "paper", "linear", "cosine"


def schedule(kind, T, beta_1):
    """alpha_bar_0..T, float64 (T + 1,): alpha_bar_t = prod_{s<=t} (1 - beta_s) is the part of the
    data's variance that is left at t.

    kind    logsnr   level_t = logit(1 - alpha_bar_t), minus the log of signal over noise, linear in
                     t, from logit(beta_1) to 10: alpha_bar is a sigmoid of t
            paper    beta_t = 1 / (T - t + 1) for t >= 2 (footnote 2, section 2.4.1): alpha_bar
                     falls linearly in t
            linear   beta_t on the line from 1e-4 to 0.02, times 1000 / T, at most 0.999 (DDPM)
            cosine   alpha_bar_t = (1 - beta_1) cos(0.99 pi/2 u), u from 0 (t = 1) to 1 (t = T):
                     ours, for bits; not Nichol & Dhariwal's, which has cos^2
    beta_1  the variance of the first step, fixed (section 2.4.1); `linear` has its own. It limits
            K of continuous data: no model gets above -D/2 ln(2 pi e beta_1).
    InputError for an unknown kind, T < 2, or beta_1 outside of 1e-14..0.8."""
    if T < 2 or not 1e-14 <= beta_1 <= 0.8:
        raise InputError("a schedule needs T >= 2 and a beta_1 from 1e-14 to 0.8, not "
                         f"{T} and {beta_1}")
    if kind == "logsnr":
        alpha_bar = expit(-np.linspace(logit(beta_1), 10, T))
    elif kind == "paper":
        alpha_bar = np.cumprod(1 - np.append(beta_1, 1 / np.arange(T - 1, 0, -1)))
    elif kind == "linear":
        alpha_bar = np.cumprod(1 - np.minimum(np.linspace(1e-4, 0.02, T) * 1000 / T, 0.999))
    elif kind == "cosine":
        alpha_bar = (1 - beta_1) * np.cos(0.99 * math.pi / 2 * np.linspace(0, 1, T))
    else:
        raise InputError(f"no schedule '{kind}': choose {', '.join(SCHEDULES)}")
    return np.append(1, alpha_bar)


class Normal:
    """N(mean, variance), independent coordinates: mean (n, D), variance (n, D) or (n, 1). A
    distribution of x offers what this one does; Bernoulli is the other."""

    def __init__(self, xp, mean, variance):
        self.xp, self.mean, self.variance = xp, mean, variance

    @staticmethod
    def noise(shape, rng, dtype=np.float64):
        """What is random in a draw: eps ~ N(0, I)."""
        return rng.standard_normal(shape, dtype=dtype)

    def draw(self, eps):
        """The x (n, D) that this noise makes."""
        return self.mean + self.xp.sqrt(self.variance) * eps

    def log_density(self, x):
        """log N(x; mean, variance), nats (n,)."""
        square = (x - self.mean) ** 2 / self.variance
        return -0.5 * (square + self.xp.log(2 * math.pi * self.variance)).sum(1)

    def entropy(self):
        """1/2 log(2 pi e variance), summed over the coordinates, nats (n,)."""
        variance = self.xp.broadcast_to(self.variance, self.mean.shape)
        return 0.5 * self.xp.log(2 * math.pi * math.e * variance).sum(1)

    def times(self, y, variance):
        """The product with r(x) = exp(-(x - y)^2 / (2 variance)), normalised (Table App.1, eq. 22),
        and log Z (n,): the log of its integral, up to a constant. (Eq. 22 drops Z.)

        With V the variance before, and the gain V / (V + variance), the mean becomes (1 - gain)
        mean + gain y, the variance (1 - gain) V. A coordinate with variance = 0 is known (gain 1);
        of one with inf, r says nothing (gain 0)."""
        xp, total = self.xp, self.variance + variance
        gain = self.variance / total
        log_Z = xp.where(xp.isinf(variance), 0.0, (self.mean - y) ** 2 / total + xp.log(total))
        product = Normal(xp, (1 - gain) * self.mean + gain * y, (1 - gain) * self.variance)
        return product, -0.5 * log_Z.sum(1)

    def tilted(self, g):
        """The product with exp(g x), normalised, and log Z (n,). With g the gradient of log r, this
        is the kernel perturbed by any r (eq. 61): its mean moves by variance times g."""
        product = Normal(self.xp, self.mean + self.variance * g, self.variance)
        return product, (g * (self.mean + product.mean) / 2).sum(1)

    def take(self, rows):
        """The distributions of these examples."""
        return Normal(self.xp, self.mean[rows], self.variance[rows])


class Bernoulli:
    """B(one), independent bits: one (n, D) is the probability of a one. zero = 1 - one is given as
    well, because computing 1 - one would lose small values to rounding."""

    def __init__(self, xp, one, zero):
        self.xp, self.one, self.zero, self.mean, self.variance = xp, one, zero, one, one * zero

    @staticmethod
    def noise(shape, rng, dtype=np.float64):
        """What is random in a draw: u uniform on [0, 1)."""
        return rng.random(shape, dtype=dtype)

    def draw(self, u):
        return (u < self.one).astype(np.float64)

    def probability(self, x):
        """Of each of the bits x, (n, D)."""
        return x * self.one + (1 - x) * self.zero

    def log_density(self, x):
        """The log probability of the bits x, nats (n,); -inf where one of them is impossible."""
        with np.errstate(divide="ignore"):
            return self.xp.log(self.probability(x)).sum(1)

    def entropy(self):
        """-one log one - zero log zero, summed over the bits, nats (n,)."""
        return -sum(p * self.xp.log(self.xp.maximum(p, 1e-300))  # 0 log 0 = 0
                    for p in (self.one, self.zero)).sum(1)

    def times(self, log_r0, log_r1):
        """The product with r, normalised: one r(1) / (one r(1) + zero r(0)), and log Z (n,), the
        log of the denominator (in which Table App.1 prints x for `one`)."""
        top = self.xp.maximum(log_r0, log_r1)  # so that nothing overflows
        one, zero = self.one * self.xp.exp(log_r1 - top), self.zero * self.xp.exp(log_r0 - top)
        Z = one + zero
        return Bernoulli(self.xp, one / Z, zero / Z), (self.xp.log(Z) + top).sum(1)

    def tilted(self, g):
        """The product with exp(g x), normalised, and log Z (n,): the log odds move by g."""
        return self.times(0 * self.one, g)

    def take(self, rows):
        """The distributions of these examples."""
        return Bernoulli(self.xp, self.one[rows], self.zero[rows])


class Diffusion:
    """What both diffusions offer, Gaussian and Binomial, which give the formulas. (`objective` and
    LearnedSchedule use more of Gaussian.) t is an integer array (n,), one entry for each example,
    or one integer where so said. z (n, D, outputs) is what the network says of x_t, `outputs`
    numbers for each coordinate.

    kept(x, a)           x of which a part a (n, 1) is kept, the rest drawn from pi
    q_back(x0, xt, t)    q(x_{t-1} | x_t, x_0), t >= 2: of numbers N(mu~, beta~_t I)
    p_x0(xt, t, z)       p(x_0 | x_t), what z says of x_0
    p_back(xt, t, z, eta=1)   p(x_{t-1} | x_t), t >= 2: q_back averaged over p_x0
    kl(x0, xt, t, z, v_weight=None)   KL[q_back || p_back], t >= 2, nats (n,), and dz, its
                         derivative; v_weight: see `objective`
    ideal(xt, t, ...)    the z of the best possible kernel, from moments of x_0 given x_t
    mean_log_pi(t, x0)   E[log pi(x_t) | x_0], nats (n,), t an integer >= 0
    log_null(x)          log likelihood under pi, for bits under B(mean of the data), nats (n,)

    And for chapter 5 only, where an r(x_0) is to steer the reverse steps:

    x0_for_r(xt, t, z)   the distribution of x_0 by which r(x_0) is averaged
    dp_x0(xt, t, z, g)   dx and dz of a function of the mean of p_x0, whose gradient there is g
    guided(p, t, g, prior, given)   what to tilt p = p_back by, (n, D), where g (n, D) is the
                         gradient of log r_t at x_t. prior: x0_for_r; given: the same times the
                         Observations in r

    Of t a network is told level = log((1 - alpha_bar_t) / alpha_bar_t), the log of the variance of
    noise over that of signal, cut to +-20.7, and s = log(beta_t / beta~_t), 0 at t = 0 and 1; both
    (T + 1,)."""

    discretised = False

    def __init__(self, alpha_bar, xp=np):
        self.xp, self.T = xp, len(alpha_bar) - 1
        self.alpha_bar = xp.asarray(alpha_bar, np.float64)
        self.before = xp.concatenate([xp.ones(1), self.alpha_bar[:-1]])  # alpha_bar_{t-1}
        self.beta = 1 - self.alpha_bar / self.before
        a = xp.clip(self.alpha_bar, 1e-9, 1 - 1e-9)  # it is 1 at t = 0, and may be 0 at T
        self.level, self.s = xp.log((1 - a) / a), xp.zeros(self.T + 1)
        self.s[2:] = xp.log1p(-self.alpha_bar[2:]) - xp.log1p(-self.before[2:])

    def q_step(self, x, t):
        """q(x_t | x_{t-1} = x), the kernel T_pi of eq. 2. It leaves pi unchanged and is its own
        reverse under pi: at t = 1 it is also p(x_0 | x_1), eq. 44."""
        return self.kept(x, 1 - self.beta[t][:, None])

    def q_jump(self, x0, t):
        """q(x_t | x_0): DDPM eq. 4."""
        return self.kept(x0, self.alpha_bar[t][:, None])

    def pi(self, shape):
        """The distribution pi: nothing is kept."""
        return self.kept(self.xp.zeros(shape), self.xp.zeros((shape[0], 1)))

    def _H(self, kernel, t, x):
        """Entropy of kernel(x, t), nats (n,). For bits it is linear in x, so x may be a mean; for
        numbers it does not depend on x."""
        h = kernel(self.xp.asarray([[0.0], [1.0]]), self.xp.full(2, t)).entropy()
        return (x * h[1] + (1 - x) * h[0]).sum(1)

    def H_q(self, t, x0):
        """Entropy of q(x_t | x_0), nats (n,), t an integer >= 1; of numbers D/2 ln(2 pi e (1 -
        alpha_bar_t)). It is linear in x_0, so the mean of the data gives the mean entropy."""
        return self._H(self.q_jump, t, x0)

    def H_step(self, t, x0):
        """Entropy of q(x_t | x_{t-1}), averaged over x_{t-1} given x_0; of numbers D/2 ln(2 pi e
        beta_t)."""
        return self._H(self.q_step, t, self.q_jump(x0, self.xp.full(len(x0), t - 1)).mean)

    def log_pi(self, x):
        return self.mean_log_pi(0, x)

    def H_p(self, x0):
        """E[-log pi(x_T) + log pi(x_1) - log pi(x_0) | x_0], nats (n,), see DPM.bound. This is the
        paper's constant (eqs. 42-46) for numbers whose second moment is 1, and for bits whose mean
        is the rate."""
        return self.mean_log_pi(1, x0) - self.mean_log_pi(self.T, x0) - self.log_pi(x0)

    def kl_to_pi(self, t, x0):
        """KL[q(x_t | x_0) || pi], nats (n,), t an integer >= 1; DDPM's L_T at t = T."""
        return -self.H_q(t, x0) - self.mean_log_pi(t, x0)

    def shortened(self, S):
        """The diffusion of S steps through S + 1 of these times, 0, 1 and T among them: a part of
        alpha_bar is again a schedule. InputError unless 2 <= S <= T. (Not for PaperKernel, in
        chapter 2: its output is for the beta_t of its training.)"""
        if not 2 <= S <= self.T:
            raise InputError(f"{S} steps: a chain of {self.T} can be cut to 2..{self.T} steps")
        times = np.concatenate([[0], np.round(np.linspace(1, self.T, S)).astype(int)])
        return type(self)(self.alpha_bar[self.xp.asarray(times)], self.xp, **self.config)


class Gaussian(Diffusion):
    """The Gaussian diffusion, left column of Table App.1.

    x_t = cos phi_t x_0 + sin phi_t eps turns from data to noise, with cos^2 phi_t = alpha_bar_t.
    v is the network's guess of the velocity v* = dx_t / dphi = cos phi eps - sin phi x_0, which has
    unit size at every t, and u its guess of its own error (v* - v)^2. z = (v, u) says

        x_0 ~ N(cos phi x_t - sin phi v, sin^2 phi u)

    and averaging q(x_{t-1} | x_t, x_0) over it gives, with c_t = beta_t / beta~_t - 1,

        f_mu = mu~(x_0 = cos phi x_t - sin phi v)        f_sigma = beta~_t (1 + c_t u)

    u = 1 is f_sigma = beta_t, right for data that is N(0, I); u = 0 is beta~_t, right for data of
    one point. These are the upper and the lower bound of eq. 24, and DDPM's two fixed variances.

    variance    learned: u is the network's; beta: u = 1; posterior: u = 0
    half, ends  of a discretised decoder, see `decode`: half a grey level, and the centres of the
                first and the last one, normalised; None without it"""

    outputs, distribution = 2, Normal

    def __init__(self, alpha_bar, xp=np, variance="learned", half=None, ends=None):
        super().__init__(alpha_bar, xp)
        self.config = dict(variance=variance, half=half, ends=ends)
        self.variance, self.half, self.ends = variance, half, ends
        self._learned = float(variance == "learned")
        if variance not in ("learned", "beta", "posterior"):
            raise InputError(f"no variance '{variance}': choose learned, beta or posterior")
        self.discretised = half is not None
        self.cos, self.sin = xp.sqrt(self.alpha_bar), xp.sqrt(1 - self.alpha_bar)
        with np.errstate(divide="ignore", invalid="ignore"):             # q_back begins at t = 2
            self.beta_tilde = self.beta * (1 - self.before) / (1 - self.alpha_bar)
            self.c = (self.before - self.alpha_bar) / (1 - self.before)  # beta_t / beta~_t - 1
            self.from_x0 = xp.sqrt(self.before) * self.beta / (1 - self.alpha_bar)
            self.from_xt = xp.sqrt(1 - self.beta) * (1 - self.before) / (1 - self.alpha_bar)
        self.fixed_u = xp.full(self.T + 1, float(variance == "beta"))
        self.fixed_u[1] = self.beta_tilde[2] / self.beta[1]

    @staticmethod
    def _at(t, *tables):
        """The entries of tables (T + 1,) at t, as columns (n, 1)."""
        return [table[t][:, None] for table in tables]

    def kept(self, x, a):
        """N(sqrt(a) x, (1 - a) I)."""
        return Normal(self.xp, self.xp.sqrt(a) * x, 1 - a)

    def q_back(self, x0, xt, t):
        """N(mu~, beta~_t I), DDPM eqs. 6 and 7:

        (1 - alpha_bar_t) mu~ = sqrt(alpha_bar_{t-1}) beta_t x_0
                                + sqrt(1 - beta_t) (1 - alpha_bar_{t-1}) x_t
        (1 - alpha_bar_t) beta~_t = beta_t (1 - alpha_bar_{t-1})"""
        from_x0, from_xt, beta_tilde = self._at(t, self.from_x0, self.from_xt, self.beta_tilde)
        return Normal(self.xp, from_x0 * x0 + from_xt * xt, beta_tilde)

    def _v_u(self, t, z):
        """v and u (n, D), u as `variance` says; at t = 1 a fixed variance is beta~_2 (DDPM)."""
        v, u = z[..., 0].astype(np.float64), z[..., 1].astype(np.float64)
        return v, u if self._learned else 0 * u + self._at(t, self.fixed_u)[0]

    def p_x0(self, xt, t, z):
        """N(cos phi x_t - sin phi v, sin^2 phi u); at t = 1 also what the decoder integrates."""
        (cos, sin), (v, u) = self._at(t, self.cos, self.sin), self._v_u(t, z)
        return Normal(self.xp, cos * xt - sin * v, sin ** 2 * self.xp.maximum(u, 1e-12))

    def x0_for_r(self, xt, t, z):
        """p_x0 with u = 1. r is averaged as if the coordinates of x_0 were independent: with the
        smaller u of the network, an error that many of them share would count once for each, and
        push x_t away from all data."""
        return Normal(self.xp, self.p_x0(xt, t, z).mean, self._at(t, self.sin)[0] ** 2)

    def dp_x0(self, xt, t, z, g):
        cos, sin = self._at(t, self.cos, self.sin)
        return cos * g, self.xp.stack([-sin * g, 0 * g], 2)

    def p_back(self, xt, t, z, eta=1.0):
        """N(f_mu, f_sigma). eta < 1 takes noise away (DDIM, arXiv 2010.02502, eqs. 12 and 16), and
        eta = 0 all of it. With x_0^ and eps^ predicted, the variance is eta^2 f_sigma and the mean

            sqrt(alpha_bar_{t-1}) x_0^ + sqrt(1 - alpha_bar_{t-1} - eta^2 beta~_t) eps^"""
        xp = self.xp
        v, u = self._v_u(t, z)
        cos, sin, before, beta_tilde, c = self._at(
            t, self.cos, self.sin, self.before, self.beta_tilde, self.c)
        x0, eps = cos * xt - sin * v, sin * xt + cos * v
        of_eps = xp.sqrt(xp.maximum(1 - before - eta ** 2 * beta_tilde, 0))
        return Normal(xp, xp.sqrt(before) * x0 + of_eps * eps, eta ** 2 * beta_tilde * (1 + c * u))

    def guided(self, p, t, g, prior, given):
        """Given r, the mean of x_0 moves by g sin^2 phi / cos phi, since E[x_0 | x_t] is (x_t +
        sin^2 phi grad log q(x_t)) / cos phi (Tweedie), and f_mu with it, by g beta_t / sqrt(1 -
        beta_t); for small steps that is eq. 61, g f_sigma. Given x_t, the standard deviation of x_0
        is about sin phi or less; a move beyond five of them is an error of the network, and is cut.
        A known coordinate, with no variance in `given`, moves to its value, f_mu to mu~ of it."""
        xp, (cos, sin, from_x0) = self.xp, self._at(t, self.cos, self.sin, self.from_x0)
        gain = sin ** 2 / xp.where(cos > 0, cos, math.inf)  # alpha_bar_T = 0: x_T says nothing
        move = xp.clip(gain * g, -5 * sin, 5 * sin)
        move = xp.where(given.variance > 0, move, given.mean - prior.mean)
        return from_x0 * move / p.variance

    def kl(self, x0, xt, t, z, v_weight=None):
        """The KL of a step, nats (n,), and dz. Per dimension, with e = v - v* and g = c u,

            1/2 [ log(f_sigma / beta~) + (beta~ + (f_mu - mu~)^2) / f_sigma - 1 ]
            = 1/2 [ log(1 + g) + (c e^2 - g) / (1 + g) ]
            dv = c e / (1 + g)        du = c^2 (u - e^2) / (2 (1 + g)^2)

        v_weight (T + 1,), see objective: v descends v_weight_t e^2 instead."""
        u, e, c = self.u_e_c(x0, xt, t, z)
        g = c * u
        kl = 0.5 * (self.xp.log1p(g) + (c * e ** 2 - g) / (1 + g)).sum(1)
        dv = c * e / (1 + g) if v_weight is None else 2 * self._at(t, v_weight)[0] * e
        du = self._learned * 0.5 * c ** 2 * (u - e ** 2) / (1 + g) ** 2
        return kl, self.xp.stack([dv, du], 2)

    def u_e_c(self, x0, xt, t, z):
        """u and e = v - v* (n, D), and c (n, 1)."""
        v, u = self._v_u(t, z)
        return u, v - self.velocity(x0, xt, t), self._at(t, self.c)[0]

    def velocity(self, x0, xt, t):
        """v* = dx_t / dphi = (cos phi x_t - x_0) / sin phi."""
        cos, sin = self._at(t, self.cos, self.sin)
        return (cos * xt - x0) / sin

    def decode(self, x0, x1, z):
        """-log P of bytes x0 that were not dequantised (DDPM eq. 13), nats (n,), and dz. P is
        p_x0, integrated over the grey level of x_0; the first and the last level are open
        outwards. With a, b = (x_0 -+ half - mu) / sigma, the normal density N and its integral Phi

            P = Phi(b) - Phi(a)
            d(-log P) / dmu = (N(b) - N(a)) / (P sigma)
            d(-log P) / dsigma^2 = (b N(b) - a N(a)) / (2 P sigma^2)"""
        xp, p = self.xp, self.p_x0(x1, self.xp.ones(len(x1), int), z)
        special = importlib.import_module("scipy.special" if xp is np else "cupyx.scipy.special")
        sin, sigma = self.sin[1], xp.sqrt(p.variance)
        a, b = (x0 - self.half - p.mean) / sigma, (x0 + self.half - p.mean) / sigma
        a = xp.where(x0 < self.ends[0] + self.half, -1e30, a)
        b = xp.where(x0 > self.ends[1] - self.half, 1e30, b)
        flip = a + b > 0                         # the left tail of log Phi has all its digits
        low, high = xp.where(flip, -b, a), xp.where(flip, -a, b)
        log_high = special.log_ndtr(high)
        log_P = log_high + xp.log(-xp.expm1(special.log_ndtr(low) - log_high))
        slope_a, slope_b = (xp.exp(-0.5 * y * y - 0.5 * math.log(2 * math.pi) - log_P)
                            for y in (a, b))
        dmu = (slope_b - slope_a) / sigma
        dvariance = 0.5 * (b * slope_b - a * slope_a) / sigma ** 2
        return -log_P.sum(1), xp.stack([-sin * dmu, self._learned * sin ** 2 * dvariance], 2)

    def ideal(self, xt, t, mean, variance):
        """From E[x_0 | x_t] and Var[x_0 | x_t], (n, D)."""
        sin, = self._at(t, self.sin)
        return self.xp.stack([self.velocity(mean, xt, t), variance / sin ** 2], 2)

    def mean_log_pi(self, t, x0):
        """x_t^2 is alpha_bar_t x_0^2 + 1 - alpha_bar_t in the mean."""
        a = float(self.alpha_bar[t])
        return -0.5 * (a * x0 ** 2 + 1 - a + math.log(2 * math.pi)).sum(1)

    def log_null(self, x):
        """log pi; with a decoder, of bytes, times the width of a grey level."""
        width = 2 * self.half if self.discretised else 1.0
        return self.log_pi(x) + x.shape[1] * math.log(width)

    def until(self, sigma):
        """The diffusion that ends where noise is sigma times as strong as the data: its x_T is (x_0
        + sigma eps) / sqrt(1 + sigma^2). A sigma below the noise at t = 2, or above that at T, is
        replaced by that noise. It lies between two of the T steps; levels are interpolated, so that
        all steps are about as long as in training. InputError unless sigma > 0."""
        if not sigma > 0:
            raise InputError(f"noise has a deviation above 0, not {sigma}")
        a = np.maximum(to_host(self.alpha_bar)[1:], 1e-9)
        t, level = np.arange(1, self.T + 1), np.log((1 - a) / a)  # not cut where there is no noise
        last = max(2.0, np.interp(2 * math.log(sigma), level, t))
        levels = np.interp(np.linspace(1, last, round(last)), t, level)
        return type(self)(np.append(1, expit(-levels)), self.xp, **self.config)


class Binomial(Diffusion):
    """The binomial diffusion, right column of Table App.1, for zeros and ones: a bit is forgotten
    with probability beta_t and drawn anew from pi = B(rate). rate is 1/2 in the table, the data's
    mean in the paper's experiment; `mean` is the data's, for log_null.

    z, one number a bit, is what the network adds to the log odds of x_0 = 1 that x_t alone gives if
    x_0 ~ B(rate). p(x_{t-1} | x_t) mixes q_back of x_0 = 1 and of x_0 = 0 by these odds."""

    outputs, distribution = 1, Bernoulli

    def __init__(self, alpha_bar, xp=np, rate=0.5, mean=None):
        super().__init__(alpha_bar, xp)
        self.rate, self.mean = float(rate), float(rate if mean is None else mean)
        self.config = dict(rate=self.rate, mean=self.mean)
        if not (1e-4 <= self.rate <= 1 - 1e-4 and 0 < self.mean < 1):
            raise InputError("the rate of pi must lie between 0.0001 and 0.9999, the mean of the "
                             f"data between 0 and 1, not {self.rate:g}, {self.mean:g}")

    def kept(self, x, a):
        """B(a x + rate (1 - a))."""
        one, zero = a * x + self.rate * (1 - a), a * (1 - x) + (1 - self.rate) * (1 - a)
        return Bernoulli(self.xp, one, zero)

    def q_back(self, x0, xt, t):
        """Bayes' rule, bit by bit: q(x_{t-1} | x_0) times q(x_t | x_{t-1}), normalised."""
        prior = self.kept(x0, self.before[t][:, None])
        r_0, r_1 = (self.q_step(x, t).probability(xt) for x in (0, 1))
        one, zero = prior.one * r_1, prior.zero * r_0
        return Bernoulli(self.xp, one / (one + zero), zero / (one + zero))

    def _log_odds(self, xt, t):
        """Those of x_0 = 1 given x_t, if x_0 ~ B(rate)."""
        like_0, like_1 = (self.q_jump(x, t).probability(xt) for x in (0, 1))
        return math.log(self.rate / (1 - self.rate)) + self.xp.log(like_1 / like_0)

    def p_x0(self, xt, t, z):
        """B(m), m = sigmoid(z + log odds of x_t alone), cut to +-100: never quite certain."""
        odds = self.xp.clip(z[..., 0] + self._log_odds(xt, t), -100, 100)
        return Bernoulli(self.xp, 1 / (1 + self.xp.exp(-odds)), 1 / (1 + self.xp.exp(odds)))

    x0_for_r = p_x0

    def dp_x0(self, xt, t, z, g):
        """m (1 - m) g is the gradient in the log odds; those of x_t alone are linear in the bit."""
        dodds = self.p_x0(xt, t, z).variance * g
        slope = self._log_odds(1, t) - self._log_odds(0, t)
        return dodds * slope, dodds[..., None]

    def guided(self, p, t, g, prior, given):
        """g itself, eq. 61: a bit has no way to go too far."""
        return g

    def _mixture(self, one, zero, q1, q0):
        """one q_1 + zero q_0."""
        return Bernoulli(self.xp, one * q1.one + zero * q0.one, one * q1.zero + zero * q0.zero)

    def p_back(self, xt, t, z, eta=1.0):
        """B(m q_1 + (1 - m) q_0), q_x = q(x_{t-1} = 1 | x_t, x_0 = x)."""
        m, (q1, q0) = self.p_x0(xt, t, z), (self.q_back(x, xt, t) for x in (1, 0))
        return self._mixture(m.one, m.zero, q1, q0)

    def kl(self, x0, xt, t, z, v_weight=None):
        """Per bit, with b of q_back and f of p_back,

            b log(b / f) + (1 - b) log((1 - b) / (1 - f))        df = (f - b) / (f (1 - f))
            f - b = (m - x_0) (q_1 - q_0)                        dm / dz = m (1 - m)"""
        xp, m = self.xp, self.p_x0(xt, t, z)
        q1, q0 = (self.q_back(x, xt, t) for x in (1, 0))
        b, f = self._mixture(x0, 1 - x0, q1, q0), self._mixture(m.one, m.zero, q1, q0)
        kl = sum(b_x * xp.log(xp.maximum(b_x, 1e-300) / xp.maximum(f_x, 1e-300))
                 for b_x, f_x in ((b.one, f.one), (b.zero, f.zero)))
        top = (m.one - x0) * (q1.one - q0.one) ** 2 * m.variance
        dz = top / xp.where(f.variance > 0, f.variance, 1.0)  # where that is 0, q_1 = q_0
        return kl.sum(1), dz[..., None]

    def ideal(self, xt, t, mean):
        """From E[x_0 | x_t], (n, D); certain bits have infinite log odds, which p_x0 clips."""
        with np.errstate(divide="ignore"):
            odds = self.xp.log(mean) - self.xp.log(1 - mean)
            return (odds - self._log_odds(xt, t))[..., None]

    def mean_log_pi(self, t, x0):
        """log pi is linear in the bits."""
        return self._log_independent(self.kept(x0, float(self.alpha_bar[t])).one, self.rate)

    @staticmethod
    def _log_independent(x, rate):
        return (x * math.log(rate) + (1 - x) * math.log(1 - rate)).sum(1)

    def log_null(self, x):
        return self._log_independent(x, self.mean)


# ------------------------------------------------------------------------------------------------
# 2. The network language
# ------------------------------------------------------------------------------------------------
# A network is a tree of layers, and every layer has its backward under its forward. A layer knows
# the shapes of its weights, but no values: weights, gradients and saved arrays are on a Tape, one
# for each thread. Arrays are (n, H, W, C): examples, rows, columns, channels; a vector is an image
# of one pixel. No layer writes into an array that it was given.

class Tape:
    """What one thread carries through a forward and its backward.

    theta, dtheta   {layer: {name: array}}: the weights, and their gradients, to which backward
                    adds. dtheta is None for a forward alone, and then nothing is saved
    level, s        (n,), what is told of each example's t, see Diffusion; dlevel, ds: gradients
    e, de           (n, 1, 1, time), what the network makes of level for all its layers, see Network
    saved           a stack: what forward leaves for backward
    flop            floating-point operations in matrix products so far, for the benchmark"""

    def __init__(self, xp, theta, dtheta=None):
        self.xp, self.theta, self.dtheta, self.saved, self.flop = xp, theta, dtheta, [], 0

    def save(self, a):
        """Keeps a for backward. Where none follows, a is free at once and the next layer finds its
        memory in the cache: that saves a fifth of the time."""
        if self.dtheta is not None:
            self.saved.append(a)

    def product(self, a, b):
        self.flop += 2 * a.size * b.shape[-1]
        return a @ b


class Layer:
    """forward(x, tape) gives y; backward(dy, tape), called in reverse order, gives dx and adds to
    the gradients of the layer's weights. shapes {name: shape}: its weights. Matrices start at
    random, with variance gain^2 / inputs; with gain = 0, and all vectors, at zero."""

    shapes, gain, layers = {}, 1.0, ()

    def with_weights(self):
        """This layer and the layers in it, as far as they have weights, in a fixed order."""
        return sum((layer.with_weights() for layer in self.layers), [self] if self.shapes else [])


def flatten(x):
    """(n H W, C): every pixel is a row."""
    return x.reshape(-1, x.shape[-1])


def pieces(n, pixels, at_once, xp, first=0, every=1):
    """Every `every`-th of n examples of so many pixels each, from `first` on, in slices of about
    `at_once` pixels, which fit the cache of a CPU, or of 2^20, which fit the memory of a GPU."""
    size = every * max(1, (at_once if xp is np else 1 << 20) // pixels)
    return [slice(i, min(i + size, n), every) for i in range(first, n, size)]


class Dense(Layer):
    """y = x W + b at every pixel.        dW = x' dy    db = sum dy    dx = dy W'"""

    def __init__(self, inputs, outputs, gain=1.0):
        self.shapes, self.gain = dict(W=(inputs, outputs), b=(outputs,)), gain

    def forward(self, x, tape):
        tape.save(x)
        y = tape.product(flatten(x), tape.theta[self]["W"])
        y += tape.theta[self]["b"]
        return y.reshape(*x.shape[:-1], -1)

    def backward(self, dy, tape):
        x, d, rows = tape.saved.pop(), tape.dtheta[self], flatten(dy)
        d["W"] += tape.product(flatten(x).T, rows)
        d["b"] += tape.xp.ones(len(rows), rows.dtype) @ rows  # a sum, in a tenth of its time
        return tape.product(rows, tape.theta[self]["W"].T).reshape(x.shape)


class Conv3x3(Layer):
    """y_i = sum_k x_{i+k} W_k, where i + k, k = 0..8, is the k-th of the nine pixels around i, zero
    beyond the border. Where j = i + k, i = j + (8 - k), so that

    dx_i = sum_k dy_{i+k} W_{8-k}'        dW_{8-k}' = sum_i dy_{i+k}' x_i

    With the nine pixels side by side (im2col) each of the three is one matrix product."""

    def __init__(self, inputs, outputs, gain=1.0):
        self.shapes, self.gain = dict(W=(9 * inputs, outputs)), gain

    @staticmethod
    def _nine(x, xp):
        """The nine pixels around every pixel, (pixels, 9 C), for a few examples at a time: which
        they are, and their array. All at once they would not fit the cache."""
        n, H, W, C = x.shape
        padded = xp.zeros((n, H + 2, W + 2, C), x.dtype)
        padded[:, 1:-1, 1:-1] = x
        example, row, column, channel = padded.strides  # around is a view, and not yet a copy
        around = xp.lib.stride_tricks.as_strided(
            padded, (n, H, W, 3, 3, C), (example, row, column, row, column, channel))
        for i in pieces(n, H * W, 1600, xp):
            yield i, around[i].reshape(-1, 9 * C)

    @staticmethod
    def _turned(W):
        """The W_{8-k}', stacked to (9 outputs, inputs); of these it makes W again."""
        return W.reshape(9, -1, W.shape[1])[::-1].transpose(0, 2, 1).reshape(-1, len(W) // 9)

    def forward(self, x, tape):
        tape.save(x)  # not the nine: a ninth of the memory
        W = tape.theta[self]["W"]
        y = tape.xp.empty((*x.shape[:3], W.shape[1]), x.dtype)
        for i, nine in self._nine(x, tape.xp):
            y[i] = tape.product(nine, W).reshape(y[i].shape)
        return y

    def backward(self, dy, tape):
        x, turned = tape.saved.pop(), self._turned(tape.theta[self]["W"])
        dx, dturned = tape.xp.empty_like(x), tape.xp.zeros_like(turned)
        for i, nine in self._nine(dy, tape.xp):
            dx[i] = tape.product(nine, turned).reshape(dx[i].shape)
            dturned += tape.product(nine.T, flatten(x[i]))
        tape.dtheta[self]["W"] += self._turned(dturned)
        return dx


class Time(Layer):
    """y = x + c, c = f(e) with f dense: the same for all pixels of an example.

    dc = dy summed over the pixels        de += f'(dc), f' the backward of f        dx = dy"""

    def __init__(self, time, width):
        self.layers = (Dense(time, width),)

    def forward(self, x, tape):
        return x + self.layers[0].forward(tape.e, tape)

    def backward(self, dy, tape):
        n, H, W, C = dy.shape
        dc = tape.xp.ones((1, H * W), dy.dtype) @ dy.reshape(n, H * W, C)  # as in Dense
        tape.de += self.layers[0].backward(dc[:, None], tape)
        return dy


class Rectifier(Layer):
    """y = (x + r) / 2, r = sqrt(x^2 + 1), a max(x, 0) without a corner (squareplus).

    dx = dy y / r"""

    def forward(self, x, tape):
        r = tape.xp.sqrt(x * x + 1)
        y = 0.5 * (x + r)
        tape.save((y, r))
        return y

    def backward(self, dy, tape):
        y, r = tape.saved.pop()
        return y / r * dy


# Layers made of layers

class Sequential(Layer):
    """y = f_k(... f_2(f_1(x)))        the gradient goes back in reverse order.

    Without layers, y = x."""

    def __init__(self, *layers):
        self.layers = layers

    def forward(self, x, tape):
        for layer in self.layers:
            x = layer.forward(x, tape)
        return x

    def backward(self, dy, tape):
        for layer in reversed(self.layers):
            dy = layer.backward(dy, tape)
        return dy


class Residual(Sequential):
    """y = x + f(x)        dx = dy + f'(dy), f' the backward of f"""

    def forward(self, x, tape):
        return x + super().forward(x, tape)

    def backward(self, dy, tape):
        return dy + super().backward(dy, tape)


class Beside(Sequential):
    """y = [f_1(x), f_2(x), ...], channels side by side        dx = sum f_i'(channels i of dy)"""

    def forward(self, x, tape):
        ys = [layer.forward(x, tape) for layer in self.layers]
        tape.save(np.cumsum([y.shape[-1] for y in ys])[:-1].tolist())
        return tape.xp.concatenate(ys, -1)

    def backward(self, dy, tape):
        dys = tape.xp.split(dy, tape.saved.pop(), -1)
        return sum(layer.backward(d, tape) for layer, d in zip(self.layers[::-1], dys[::-1]))


class Sum(Sequential):
    """y = f_1(x) + f_2(x) + ...        dx = sum f_i'(dy)"""

    def forward(self, x, tape):
        return sum(layer.forward(x, tape) for layer in self.layers)

    def backward(self, dy, tape):
        return sum(layer.backward(dy, tape) for layer in reversed(self.layers))


class Cells(Sequential):
    """f on a grid half as fine: 2 x 2 pixels become one cell with four times the channels, and back
    again (space to depth). An odd side is padded with a line of zeros.

    y = up(f(down(x)))        dx = up(f'(down(dy))), since up and down are each other's backward"""

    side = 2

    def _down(self, x, xp):
        n, H, W, C = x.shape
        k, h, w = self.side, -(-H // self.side), -(-W // self.side)
        if (h * k, w * k) != (H, W):
            x = xp.pad(x, ((0, 0), (0, h * k - H), (0, w * k - W), (0, 0)))
        return x.reshape(n, h, k, w, k, C).transpose(0, 1, 3, 2, 4, 5).reshape(n, h, w, k * k * C)

    def _up(self, cells, H, W):
        (n, h, w, _), k = cells.shape, self.side
        x = cells.reshape(n, h, w, k, k, -1).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(n, h * k, w * k, -1)[:, :H, :W]

    def forward(self, x, tape):
        return self._up(super().forward(self._down(x, tape.xp), tape), *x.shape[1:3])

    def backward(self, dy, tape):
        return self._up(super().backward(self._down(dy, tape.xp), tape), *dy.shape[1:3])


class Pooled(Cells):
    """f on a grid `side` times as coarse: a cell has the mean of its pixels (zeros beyond the
    border), a pixel the value of its cell. Backward, a pixel gets dcell / side^2, and a cell the
    sum of the dpixels: the same two, but for a factor."""

    def __init__(self, side, *layers):
        super().__init__(*layers)
        self.side = side

    def _down(self, x, xp):
        cells = super()._down(x, xp)
        return cells.reshape(*cells.shape[:3], self.side ** 2, -1).mean(3)

    def _up(self, cells, H, W):
        return cells.repeat(self.side, 1).repeat(self.side, 2)[:, :H, :W]

    def backward(self, dy, tape):
        return super().backward(dy * self.side ** 2, tape) / self.side ** 2


class Whole(Cells):
    """f of the whole picture as one cell, a pixel of H W C channels. So H and W are fixed."""

    def _down(self, x, xp):
        return x.reshape(len(x), 1, 1, -1)

    def _up(self, cells, H, W):
        return cells.reshape(len(cells), H, W, -1)


# Features: what a network is told of each value x besides x itself

class Waves(Layer):
    """Fourier features: sin and cos of rate x, for each of the rates.

    dx = sum rate (cos dsin - sin dcos)"""

    def __init__(self, rates):
        self.rates = [float(rate) for rate in rates]

    def forward(self, x, tape):
        z = tape.xp.concatenate([x * rate for rate in self.rates], -1)
        waves = tape.xp.sin(z), tape.xp.cos(z)
        tape.save(waves)
        return tape.xp.concatenate(waves, -1)

    def backward(self, dy, tape):
        (sin, cos), (dsin, dcos) = tape.saved.pop(), tape.xp.split(dy, 2, -1)
        dzs = tape.xp.split(cos * dsin - sin * dcos, len(self.rates), -1)
        return sum(rate * dz for rate, dz in zip(self.rates, dzs))


def angle(tape):
    """cos phi and sin phi, (n, 1, 1, 1), of level = 2 log tan phi, see Gaussian."""
    level = tape.level[:, None, None, None]
    return 1 / tape.xp.sqrt(1 + tape.xp.exp(level)), 1 / tape.xp.sqrt(1 + tape.xp.exp(-level))


class Edges(Layer):
    """How far x is from every c in edges, the values where the density of the data jumps, compared
    with the noise: z / (k + |z|) for k = 1 and 4, with z = (x - cos phi c) / sin phi.

    dx = dz / sin        dphi = dz (c - x cos) / sin^2        dlevel = 1/2 sin cos dphi"""

    def __init__(self, edges):
        self.edges = edges

    def forward(self, x, tape):
        cos, sin = angle(tape)
        z = tape.xp.concatenate([(x - cos * c) / sin for c in self.edges], -1)
        y = tape.xp.concatenate([z / (k + abs(z)) for k in (1, 4)], -1)
        tape.save((x, y))
        return y

    def backward(self, dy, tape):
        (x, y), (cos, sin) = tape.saved.pop(), angle(tape)
        near, far = tape.xp.split((1 - abs(y)) ** 2 * dy, 2, -1)
        dzs = tape.xp.split(near + far / 4, len(self.edges), -1)
        dphi = sum(dz * (c - cos * x) for c, dz in zip(self.edges, dzs)) / sin ** 2
        tape.dlevel += (0.5 * sin * cos * dphi).sum((1, 2, 3))
        return sum(dzs) / sin


class Bumps(Layer):
    """y = sum_j x_j g_j(level), eqs. 62 and 63: the channels of x are `number` vectors x_j, mixed
    by Gaussian bumps g_j of the noise level, which sum to 1. Their centres c_j are evenly spaced
    between `lowest` and `highest`, their width w is half of the spacing. (The paper has bumps in t,
    which is the same for the schedule logsnr.)

    dx_j = dy g_j        dg_j / dlevel = g_j (a_j - sum_i g_i a_i),  a_j = (c_j - level) / w^2"""

    def __init__(self, number, lowest, highest):
        self.centres = np.linspace(lowest, highest, number)
        self.width = (highest - lowest) / (number - 1) / 2

    def forward(self, x, tape):
        centres = tape.xp.asarray(self.centres.astype(tape.level.dtype))
        a = (centres - tape.level[:, None]) / self.width ** 2
        g = tape.xp.exp(-0.5 * (a * self.width) ** 2)
        g = g / g.sum(1, keepdims=True)
        x = x.reshape(*x.shape[:3], len(self.centres), -1)
        tape.save((x, g, a))
        return (x * g[:, None, None, :, None]).sum(3)

    def backward(self, dy, tape):
        x, g, a = tape.saved.pop()
        dg = (x * dy[:, :, :, None]).sum((1, 2, 4))
        tape.dlevel += (dg * g * (a - (g * a).sum(1, keepdims=True))).sum(1)
        return (dy[:, :, :, None] * g[:, None, None, :, None]).reshape(*dy.shape[:3], -1)


# Readouts: from what the last layer gives, h, to the z of chapter 1. forward(h, x, tape) gives z;
# backward(dz, tape) gives dh, and the dx of what z takes from x directly

class LogOdds:
    """Bits: z = h."""

    def forward(self, h, x, tape):
        return h

    def backward(self, dz, tape):
        return dz, 0.0


class Velocity:
    """Numbers: h = (v, log u) for every channel, z = (v, u).        dlog u = u du"""

    def forward(self, h, x, tape):
        z = h.copy()
        z[..., 1::2] = tape.xp.exp(tape.xp.minimum(h[..., 1::2], 20))  # 20: finite, if untrained
        tape.save(z)
        return z

    def backward(self, dz, tape):
        z, dh = tape.saved.pop(), dz.copy()
        dh[..., 1::2] *= z[..., 1::2]
        return dh, 0.0


class Epsilon(Velocity):
    """The same with eps^ in place of v, as in DDPM: v = (eps^ - sin phi x) / cos phi.

    deps = dv / cos     dx = -tan dv     dphi = (tan v - x) dv     dlevel = 1/2 sin cos dphi"""

    def forward(self, h, x, tape):
        (cos, sin), z = angle(tape), super().forward(h, x, tape)
        z[..., ::2] = v = (h[..., ::2] - sin * x) / cos
        tape.save((x, v))
        return z

    def backward(self, dz, tape):
        (cos, sin), (x, v), dv = angle(tape), tape.saved.pop(), dz[..., ::2]
        dh, _ = super().backward(dz, tape)
        tape.dlevel += 0.5 * (sin * cos * (sin / cos * v - x) * dv).sum((1, 2, 3))
        dh[..., ::2] /= cos
        return dh, -sin / cos * dv


class PaperKernel:
    """The paper's own, eqs. 64 and 65, with h = (h_mu, h_sigma):

        f_sigma = sigmoid(h_sigma + logit beta)        f_mu = (x - h_mu) (1 - f_sigma) + h_mu

    With rho = f_sigma / beta, A = alpha_bar_{t-1} = 1 - sin^2 phi e^-s, beta = 1 - cos^2 phi / A,
    k = sin phi / sqrt(A) and c = e^s - 1, so that the schedule comes in by phi and s alone, this is

        v = k (rho (x - h_mu) - x / (1 + sqrt(1 - beta)))        u = (rho e^s - 1) / c
        drho / dh_sigma = rho (1 - beta rho)        drho / dbeta = -rho^2 (1 - e^-h_sigma)"""

    def forward(self, h, x, tape):
        xp, (cos, sin), s = tape.xp, angle(tape), tape.s[:, None, None, None]
        A = cos ** 2 - sin ** 2 * xp.expm1(-s)  # 1 - sin^2 e^-s, without its loss of digits
        beta, e_h, k = 1 - cos ** 2 / A, xp.exp(-h[..., 1::2]), sin / xp.sqrt(A)
        rho = 1 / (beta + (1 - beta) * e_h)
        tape.save((h, x, cos, sin, s, A, beta, e_h, k, rho))
        z = xp.empty_like(h)
        z[..., ::2] = k * (rho * (x - h[..., ::2]) - x / (1 + cos / xp.sqrt(A)))
        z[..., 1::2] = (rho * xp.exp(s) - 1) / xp.expm1(s)
        return z

    def backward(self, dz, tape):
        xp, (h, x, cos, sin, s, A, beta, e_h, k, rho) = tape.xp, tape.saved.pop()
        (dv, du), shrink, c = (dz[..., ::2], dz[..., 1::2]), cos / xp.sqrt(A), xp.expm1(s)
        far = x - h[..., ::2]
        drho = dv * k * far + du * (1 + c) / c
        dh = xp.empty_like(h)
        dh[..., ::2], dh[..., 1::2] = -dv * k * rho, drho * rho * (1 - beta * rho)
        dbeta = -drho * rho ** 2 * (1 - e_h) - dv * k * x / (2 * shrink * (1 + shrink) ** 2)
        dk = dv * (rho * far - x / (1 + shrink))
        dA = dbeta * cos ** 2 / A ** 2 - dk * k / (2 * A)
        dphi = dbeta * 2 * sin * cos / A + dk * cos / xp.sqrt(A) - dA * 2 * sin * cos * xp.exp(-s)
        ds = dA * sin ** 2 * xp.exp(-s) + du * (1 + c) * (1 - rho) / c ** 2
        tape.dlevel += 0.5 * (sin * cos * dphi).sum((1, 2, 3))
        tape.ds += ds.sum((1, 2, 3))
        return dh, dv * k * (rho - 1 / (1 + shrink))


# Networks

class Network(Layer):
    """z = readout(body(x)); the Time layers of the body get e = time(level).

    It is not told t, only the noise level (and s, for PaperKernel). So it works for any part of the
    T steps, and for a learned schedule."""

    def __init__(self, body, readout, *time):
        self.body, self.readout, self.time = body, readout, Sequential(*time)
        self.layers = self.time, body

    def forward(self, x, level, s, tape):
        """z (n, H, W, C outputs) for x (n, H, W, C), and level and s (n,)."""
        tape.saved.clear()
        tape.level, tape.s = level.astype(x.dtype), s.astype(x.dtype)
        tape.e = self.time.forward(tape.level[:, None, None, None], tape)
        return self.readout.forward(self.body.forward(x, tape), x, tape)

    def backward(self, dz, tape):
        """dx of the last forward; dlevel and ds are on the tape. Adds to the weights' gradients."""
        tape.de, tape.dlevel, tape.ds = map(tape.xp.zeros_like, (tape.e, tape.level, tape.s))
        dh, dx = self.readout.backward(dz, tape)
        dx = dx + self.body.backward(dh, tape)
        tape.dlevel += self.time.backward(tape.de, tape).reshape(-1)
        return dx


def time_layers(time):
    """The layers that make e (n, 1, 1, time) of the level."""
    rates = np.exp(np.linspace(0, 5, 32)) / 40  # from a turn in 250 levels to one in 1.7
    return Waves(rates), Dense(64, time), Rectifier(), Dense(time, time), Rectifier()


def features(channels, scales, edges):
    """(layer, channels): x, sin and cos of 2^k pi x for k in scales, and Edges, side by side."""
    layers = [Sequential()]
    if scales:
        layers.append(Waves([2.0 ** k * math.pi for k in scales]))
    if edges:
        layers.append(Edges(edges))
    return Beside(*layers), channels * (1 + 2 * len(scales) + 2 * len(edges))


def mlp(channels, readout, outputs, width=128, layers=3, scales=(), edges=(), time=64):
    """For vectors: dense residual layers over all coordinates."""
    told, inputs = features(channels, scales, edges)
    deep = [Residual(Dense(width, width), Time(time, width), Rectifier()) for _ in range(1, layers)]
    body = Sequential(told, Dense(inputs, width), Time(time, width), Rectifier(), *deep,
                      Dense(width, outputs * channels, gain=0))
    return Network(body, readout, *time_layers(time))


def unet(channels, readout, outputs, widths=(24, 48, 96), head=64, scales=(), edges=(), time=128):
    """For images: two residual blocks on the grid of pixels and, between them, the same on a grid
    half as fine, and so on through `widths`; then a small network at every pixel, the head. Every
    layer sees a neighbourhood only, so that one set of weights serves pictures of any size."""

    def block(width):
        return Residual(Rectifier(), Conv3x3(width, width), Time(time, width),
                        Rectifier(), Conv3x3(width, width, gain=0))

    def grid(width, *deeper):
        if not deeper:
            return [block(width), block(width)]
        inner = Cells(Dense(4 * width, deeper[0]), *grid(*deeper),
                      Dense(deeper[0], 4 * width, gain=0))
        return [block(width), Residual(inner), block(width)]

    told, inputs = features(channels, scales, edges)
    context = Sequential(Conv3x3(inputs, widths[0]), Time(time, widths[0]), *grid(*widths))
    body = Sequential(told, Beside(context, Sequential()),
                      Dense(widths[0] + inputs, head), Time(time, head), Rectifier(),
                      Residual(Dense(head, head), Time(time, head), Rectifier()),
                      Dense(head, outputs * channels, gain=0))
    return Network(body, readout, *time_layers(time))


def paper(channels, readout, outputs, pixels=1, pools=(1, 2, 4), maps=8, hidden=256, width=64,
          bumps=10, lowest=-10.0, highest=10.0):
    """The paper's own (figure D.1, appendix D.2): a multi-scale convolution (mean-pool, convolve,
    upsample, sum) beside a dense path over all pixels; then the same small network at every pixel,
    whose readouts are mixed by bumps of the noise level, from `lowest` to `highest`."""
    scales = Dense(channels, maps)
    if pixels > 1:
        scales = Sum(*[Pooled(side, Conv3x3(channels, maps)) for side in pools])
    dense = Whole(Dense(pixels * channels, hidden), Rectifier(), Dense(hidden, pixels * maps))
    body = Sequential(Beside(Sequential(scales, Rectifier()), dense, Sequential()),
                      Dense(2 * maps + channels, width), Rectifier(),
                      Dense(width, width), Rectifier(),
                      Dense(width, bumps * outputs * channels, gain=0),
                      Bumps(bumps, lowest, highest))
    return Network(body, readout)


# A checkpoint holds weights in the order of these layers, and `sizes`, the arguments. To change a
# network and still read old checkpoints, add an argument whose default is the old way
NETWORKS = dict(mlp=mlp, unet=unet, paper=paper)
READOUTS = dict(v=Velocity, eps=Epsilon, paper=PaperKernel)  # of numbers


def views(layers, flat):
    """{layer: {name: its part of a flat array}}, for the weights or for their gradient."""
    found, start = {}, 0
    for layer in layers:
        found[layer] = {}
        for name, shape in layer.shapes.items():
            stop = start + math.prod(shape)
            found[layer][name] = flat[start:stop].reshape(shape)
            start = stop
    return found


def initial_weights(layers, xp, dtype, seed):
    """One flat array: matrices normal with variance gain^2 / inputs, all else zero."""
    number = sum(math.prod(shape) for layer in layers for shape in layer.shapes.values())
    flat = np.zeros(number, dtype)
    rng = generator(np, "weights", seed)
    for layer, weights in views(layers, flat).items():
        for w in weights.values():
            if w.ndim == 2:
                w[:] = rng.standard_normal(w.shape) * (layer.gain / math.sqrt(len(w)))
    return xp.asarray(flat)


def orthogonal(matrices, xp=np):
    """U V' of each of the matrices m = U S V', nearly: five steps of Newton and Schulz bring its
    singular values to 0.7..1.2, but for those below |m| / 500, and need only products (Jordan et
    al. 2024). With |m| the root of the sum of squares,

        m <- m / |m|, and five times m <- m P, P = 3.4445 - 4.7750 A + 2.0315 A^2, A = m'm

    The A of one size are a stack (number, n, n): many small products cost a GPU as much as one."""
    tall = [m if len(m) >= m.shape[1] else m.T for m in matrices]
    found = [None] * len(tall)
    for n in sorted({m.shape[1] for m in tall}):
        chosen = [i for i, m in enumerate(tall) if m.shape[1] == n]
        A, one = xp.stack([tall[i].T @ tall[i] for i in chosen]), xp.eye(n, dtype=tall[0].dtype)
        square = xp.trace(A, axis1=1, axis2=2)[:, None, None] + 1e-30  # |m|^2; m may be zero
        A, product = A / square, one / xp.sqrt(square)
        for _ in range(5):  # on the small A alone: m, with its many rows, is multiplied once
            P = 3.4445 * one - 4.7750 * A + 2.0315 * (A @ A)
            product, A = product @ P, P @ A @ P
        for i, p in zip(chosen, product):
            found[i] = tall[i] @ p
    return [a if a.shape == m.shape else a.T for a, m in zip(found, matrices)]


class Optimiser:
    """Muon (Jordan et al. 2024) for matrices, Adam (Kingma & Ba 2014) for the other weights, with
    clipping, warm-up, decay to zero and averaged weights:

        m += (1 - b1) (g - m)        v += (1 - b2) (g^2 - v)        n = m + (1 - b1) (g - m)
        theta -= rate 0.2 sqrt(longer side) orthogonal(n)        for a matrix
        theta -= rate n^ / (sqrt(v^) + 1e-8)                     for another weight

    g is the gradient, shortened to norm `clip` where it is longer; n is Nesterov's momentum; n^ =
    n / (1 - b1^(step + 1)) and v^ = v / (1 - b2^step) make up for starting at 0. A matrix is one
    with at least 16 rows and columns; the factor makes its entries move about as far as Adam would
    move them (Liu et al. 2025). rate climbs to lr over `warmup` steps, and falls to 0 along half a
    cosine over the second half of `steps`. average is the mean of theta over about the last tenth
    of the steps, at most 1000. theta is updated in place. There is no weight decay, and matrices
    grow: a U-Net of 80,000 steps on MNIST had a huge v for one input in 50,000, one of 50,000 none.

    DPM.step calls `momentum`, `orthogonalise` for every share of the matrices, and `move`."""

    b1, b2, clip = 0.95, 0.99, 1.0

    def __init__(self, layers, theta, xp=np, lr=1e-3, steps=1000, warmup=200):
        self.theta, self.average, self.xp, self.step = theta, theta.copy(), xp, 0
        self.lr, self.steps, self.warmup = lr, steps, max(1, warmup)
        self.m, self.v, self.n, self.moves = (xp.zeros_like(theta) for _ in range(4))
        self.by_adam, self.matrices = xp.ones(theta.shape, bool), []
        n, moves, by_adam = (views(layers, a) for a in (self.n, self.moves, self.by_adam))
        for layer in layers:
            for name, shape in layer.shapes.items():
                if len(shape) == 2 and min(shape) >= 16:
                    self.matrices.append((n[layer][name], moves[layer][name]))
                    by_adam[layer][name][...] = False

    def rate(self):
        """The learning rate of the step now being made."""
        late = min(1, 2 * max(0.0, self.step / self.steps - 0.5))
        return self.lr * min(1, self.step / self.warmup) * 0.5 * (1 + math.cos(math.pi * late))

    def chunks(self, *arrays):
        """The arrays cut into parts that fit the cache."""
        return ([a[i] for a in arrays] for i in pieces(len(self.theta), 1, 1 << 15, self.xp))

    def momentum(self, grad):
        """Begins a step; returns the norm of the gradient."""
        self.step += 1
        norm = self.xp.sqrt(grad @ grad)
        shorten = self.xp.minimum(self.clip / (norm + 1e-30), 1).astype(grad.dtype)
        for g, m, v, n in self.chunks(grad, self.m, self.v, self.n):
            g = g * shorten
            m += (1 - self.b1) * (g - m)
            v += (1 - self.b2) * (g * g - v)
            n[...] = m + (1 - self.b1) * (g - m)
        return norm

    def orthogonalise(self, share):
        """Makes the moves of the matrices in a slice of all."""
        chosen = self.matrices[share]
        for (n, move), a in zip(chosen, orthogonal([n for n, _ in chosen], self.xp)):
            move[...] = 0.2 * math.sqrt(max(n.shape)) * a

    def move(self, moves):
        """Ends a step. moves: those of all matrices."""
        unbias, scale = 1 / (1 - self.b1 ** (self.step + 1)), 1 / (1 - self.b2 ** self.step)
        rate, follow = self.rate(), max(1e-3, 1 / (10 + self.step / 10))
        for theta, average, n, v, by_adam, muon in self.chunks(
                self.theta, self.average, self.n, self.v, self.by_adam, moves):
            adam = unbias * n / (self.xp.sqrt(scale * v) + 1e-8)
            theta -= rate * self.xp.where(by_adam, adam, muon)
            average += follow * (theta - average)


# ------------------------------------------------------------------------------------------------
# 3. The model
# ------------------------------------------------------------------------------------------------
# A diffusion and a network are a model, DPM. Its lower bound K on the log likelihood is a sum over
# t, so that one t for each example estimates it and its gradient.

OBJECTIVES = "K", "focused", "simple", "mean"


def objective(kind, q):
    """What training descends, as tables over t (T + 1,): frequency, t is drawn in proportion to it,
    on the host; weight, of the loss of a drawn t; v_weight, of (v - v*)^2 in this loss, or None for
    the KL's own. All weigh one error, (v - v*)^2, so they have the same best v. The weights:

    K        1/2 c_t / (1 + c_t u), and the terms in u: eq. 14
    focused  K's, times b_t / (alpha_bar_t + 0.001); t is drawn in proportion to b_t = 1 + 8
             exp(-(level_t + 1)^2 / 25). Steps below a grey level, whose noise nobody can predict,
             count less; those that decide what a picture shows, more (as in Karras et al. 2022)
    simple   alpha_bar_t, the mean square of eps - eps^: DDPM eq. 14
    mean     beta_t^2 alpha_bar_{t-1} / (1 - alpha_bar_t), that of mu~ - f_mu: DDPM eq. 8 without
             its factor 1 / (2 sigma_t^2)

    All are scaled so that their sum over t is that of K's for u = 0. u always descends the KL.
    InputError for an unknown kind."""
    xp = q.xp
    t = xp.arange(q.T + 1)
    frequency = xp.where(t > 1, 1.0, 0.0)
    weight, v_weight = frequency.copy(), None
    c = xp.where(t > 1, q.c, 0.0) if isinstance(q, Gaussian) else frequency
    if kind == "focused":
        frequency = frequency * (1 + 8 * xp.exp(-(q.level + 1) ** 2 / 25))
        weight = frequency / (q.alpha_bar + 1e-3)
        weight = weight * (c.sum() / (weight * c).sum())
    elif kind in ("simple", "mean") and isinstance(q, Gaussian):
        v_weight = q.alpha_bar if kind == "simple" else (q.from_x0 * q.sin) ** 2
        v_weight = xp.where(t > 1, v_weight, 0.0)
        v_weight = v_weight * (c.sum() / 2 / (v_weight.sum() + 1e-30))
    elif kind != "K":
        raise InputError(f"no objective '{kind}' here: choose {', '.join(OBJECTIVES)}; the last "
                         "two are for numbers")
    if q.discretised:  # the decoder's gradient is the noisiest: 1 in 21 draws
        frequency[1], weight[1] = 0.05 * frequency.sum(), 1.0
    return to_host(frequency), weight, v_weight


def stratified(number, frequency, u):
    """`number` draws of t, from one offset u in [0, 1), in proportion to frequency (T + 1,)."""
    ends = np.cumsum(frequency)
    t = np.searchsorted(ends, (np.arange(number) + u) / number * ends[-1], side="right")
    return np.minimum(t, len(frequency) - 1)  # (i + u) / number can round up to 1


class IdealNetwork(Layer):
    """In place of a network: the best possible kernel, from known moments of the data. Its K is K*,
    which no network can exceed. moments(x, alpha_bar) gives E[x_0 | x_t] and, for a Gaussian
    diffusion, Var[x_0 | x_t], for x (n, D) and alpha_bar (n, 1)."""

    def __init__(self, moments):
        self.moments = moments


class Alone:
    """One process; data.runs.Ranks is the same for several, of which `here` are on this machine."""

    rank, size, here = 0, 1, 1

    def sum(self, a):
        """The sum of the arrays a of all ranks."""
        return a


class DPM:
    """A diffusion and a network. With them are kept the shape (H, W, C) of the data, shift and
    scale, by which samples get the data's units (raw = x scale + shift), and `about`, a dict of
    what else is to be known of the run. learned: a LearnedSchedule (chapter 4), or None.

    A batch is dealt out in S shares, one for each thread of each rank of `comm` (MPI): example i
    goes to share i mod S. For one S, an example has the same noise however S is made of ranks and
    threads; sums may differ by rounding, but 2 ranks of 1 thread give the bits of 1 rank of 2."""

    def __init__(self, diffusion, network, shape, shift=0.0, scale=1.0, about=None, threads=None,
                 dtype="float32", seed=0, theta=None, learned=None, comm=None):
        self.diffusion, self.xp, self.T = diffusion, diffusion.xp, diffusion.T
        self.network, self.learned, self.comm = network, learned, comm or Alone()
        self.shape, self.D, self.dtype = tuple(shape), math.prod(shape), np.dtype(dtype)
        self.shift, self.scale, self.about = float(shift), float(scale), about or {}
        self.layers = network.with_weights() + ([learned] if learned else [])
        fresh = initial_weights(self.layers, self.xp, dtype, seed)
        self.theta = fresh if theta is None else theta
        if self.theta.shape != fresh.shape:
            raise InputError(f"a checkpoint of {self.theta.size} weights, where its network, as "
                             f"dpm.py makes it now, has {fresh.size}")
        self.threads = (threads or max(1, CORES // self.comm.here)) if self.xp is np else 1
        self.pool = ThreadPoolExecutor(self.threads)
        self.grads = [self.xp.zeros_like(self.theta) for _ in range(self.threads)]
        self.weights = views(self.layers, self.theta)
        self.tapes = [Tape(self.xp, self.weights, views(self.layers, grad)) for grad in self.grads]
        self.follow_schedule()

    def raw(self, x):
        """Normalised values in the data's units."""
        return x * self.scale + self.shift

    def normal(self, raw):
        """Values in the data's units, normalised."""
        return (raw - self.shift) / self.scale

    def with_diffusion(self, diffusion, shape=None):
        """The same network and weights with another diffusion, or for another shape."""
        model = copy.copy(self)
        model.diffusion, model.T, model.shape = diffusion, diffusion.T, shape or self.shape
        model.D = math.prod(model.shape)
        return model

    def shortened(self, S):
        """The same model with a chain of S steps, see Diffusion.shortened; None: all of them."""
        return self if S is None else self.with_diffusion(self.diffusion.shortened(S))

    def until(self, sigma):
        """Of numbers: the same model with a chain that begins at data under noise sigma, see
        Gaussian.until. For noisy y (n, D), normalised, sample(n, x_T=y / sqrt(1 + sigma^2)) draws
        from p(x_0 | y), with no need of an r."""
        return self.with_diffusion(self.diffusion.until(sigma))

    def resized(self, H, W):
        """The same model for pictures of another size; InputError if the network has only one."""
        if self.about.get("network") == "paper" and (H, W) != self.shape[:2]:
            H, W, _ = self.shape
            raise InputError(f"the paper's network has a dense path for {W} x {H} pixels only")
        return self.with_diffusion(self.diffusion, (H, W, self.shape[2]))

    def follow_schedule(self):
        """Makes the diffusion that the weights of a learned schedule stand for now."""
        if self.learned:
            alpha_bar = self.learned.forward(self.weights[self.learned]["psi"])
            self.diffusion = type(self.diffusion)(alpha_bar, self.xp, **self.diffusion.config)

    # Shares of a batch, one for each thread, and their slices

    def deal(self, work, n, all_ranks=False):
        """Calls work(tape, share, cuts) in every thread: share is slice(i, n, shares), every
        shares-th of n examples; cuts are slices of the same, each small enough that its forward,
        loss and backward fit the cache of a CPU, or the memory of a GPU."""
        first = self.comm.rank * self.threads if all_ranks else 0
        shares = self.comm.size * self.threads if all_ranks else self.threads
        pixels = self.shape[0] * self.shape[1]
        jobs = [(tape, slice(i, n, shares), pieces(n, pixels, 6400, self.xp, i, shares))
                for i, tape in enumerate(self.tapes, first) if i < n]
        if len(jobs) == 1:  # one thread, or a GPU: no detour through the pool
            return work(*jobs[0])
        jobs = [self.pool.submit(work, *job) for job in jobs]
        wait(jobs)  # for all, even if one fails: the next call needs their tapes
        for job in jobs:
            job.result()

    def forward_here(self, x, t, tape):
        """The network's z (n, D, outputs) for x (n, D) and t (n,), in one thread."""
        q = self.diffusion
        if isinstance(self.network, IdealNetwork):
            return q.ideal(x, t, *self.network.moments(x, q.alpha_bar[t][:, None]))
        image = x.astype(self.dtype).reshape(len(x), *self.shape)
        return self.network.forward(image, q.level[t], q.s[t], tape).reshape(*x.shape, q.outputs)

    def backward_here(self, dz, tape):
        """dx (n, D) of the last forward_here; the gradients in level and s are on the tape."""
        dz = dz.astype(self.dtype).reshape(len(dz), *self.shape[:2], -1)
        return self.network.backward(dz, tape).reshape(len(dz), -1)

    # The reverse process

    def forward(self, x, t):
        """The network's z (n, D, outputs) for x (n, D) and t (n,)."""
        z = self.xp.empty((*x.shape, self.diffusion.outputs))

        def work(_, share, cuts):
            tape = Tape(self.xp, self.weights)  # no backward follows
            for i in cuts:
                z[i] = self.forward_here(x[i], t[i], tape)

        self.deal(work, len(x))
        return z

    def p_back(self, x, t, eta=1.0, contrast=None):
        """p(x_{t-1} | x_t = x) for x (n, D) and an integer t >= 1: the network's, or a Contrast's.
        At t = 1 it is the fixed last step (eq. 44), or a discretised decoder's p_x0. eta: see
        Gaussian.p_back; InputError for bits, unless it is 1."""
        q, t_x = self.diffusion, self.xp.full(len(x), t)
        if eta != 1 and q.distribution is Bernoulli:
            raise InputError("bits have no path without noise: eta is 1 for them")
        if t > 1:
            z = contrast.forward(self, x, t_x) if contrast else self.forward(x, t_x)
            return q.p_back(x, t_x, z, eta)
        p = q.p_x0(x, t_x, self.forward(x, t_x)) if q.discretised else q.q_step(x, t_x)
        return p if eta == 1 else Normal(self.xp, p.mean, eta ** 2 * p.variance)

    # The bound

    def bound(self, x0, rng, draws=None, batch=512, progress=iter):
        """The lower bound K on the mean log likelihood of x0 (n, D), nats (eqs. 14, 44, App. B):

            K = - sum_{t=2..T} E_q KL[ q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ]
                + H_q(X_T|X_0) - H_q(X_1|X_0) - H_p(X_T)

        For t >= 2 Bayes' rule says q(x_t | x_{t-1}) = q(x_{t-1} | x_t, x_0) q(x_t | x_0) /
        q(x_{t-1} | x_0). In the sum of log p / q the first factor gives the KLs; the rest
        telescopes to the two H_q. p(x_0 | x_1) is not learned: it is q_step with its ends
        exchanged, and log p(x_0 | x_1) - log q(x_1 | x_0) = log pi(x_0) - log pi(x_1), since q_step
        is its own reverse under pi. With log pi(x_T) this is -H_p(X_T), the paper's name: its
        constant where E log pi(x_0) over the data is E log pi(x) under pi (eqs. 42-46).
        With a discretised decoder K is minus DDPM's eq. 5, for the probability of the bytes:
        - L_T - sum of KLs - L_0, with L_0 = E[-log p(x_0 | x_1)].

        draws   how many of the T - 1 KLs to draw for each example, spread over all t, 1 or more;
                None: all
        rng     a generator of NumPy; every block of `batch` examples gets its own from it

        Returns a dict: K, K_se (its standard error over the examples), L_null, K_minus_L_null and
        K_minus_L_null_se, K_each (n,); H_q_T, H_q_1, H_p_T (or L_T); and over t (T + 1,): kl, what
        each step takes from K (kl[1] is L_0), and, nan where nothing was drawn, entropy of
        p(x_{t-1} | x_t) and distortion, the mean square of x_0 - x_0^ per dimension."""
        xp, q, n, T = self.xp, self.diffusion, len(x0), self.T
        draws = T - 1 if draws is None else min(draws, T - 1)
        t = stratified(n * draws, np.arange(T + 1) > 1, rng.random()).reshape(draws, n)
        t = rng.permuted(t, axis=1)  # no example may always have small t, or large ones
        if q.discretised:
            t = np.concatenate([t, np.ones((1, n), int)])
        factor = np.where(np.arange(T + 1) > 1, (T - 1) / draws, 1.0)
        kl_each, sums = np.zeros(n), np.zeros((3, T + 1))
        blocks = range(0, n, batch)
        own = list(zip(blocks, rng.spawn(len(blocks))))[self.comm.rank::self.comm.size]
        for i, block_rng in progress(own):
            x = xp.asarray(x0[i:i + batch])
            for row in t[:, i:i + batch]:
                t_x = xp.asarray(row)
                noise = q.distribution.noise(x.shape, block_rng)
                xt = q.q_jump(x, t_x).draw(xp.asarray(noise))
                z = self.forward(xt, t_x)
                loss = to_host(self._loss(x, xt, t_x, z)[0]) * factor[row]
                kl_each[i:i + batch] += loss
                H = q.p_back(xt, xp.maximum(t_x, 2), z).entropy()
                square = ((q.p_x0(xt, t_x, z).mean - x) ** 2).mean(1)
                sums += [np.bincount(row, to_host(a), T + 1) for a in (loss, H, square)]
        kl_each, sums = self.comm.sum(kl_each), self.comm.sum(sums)
        count = np.bincount(t.ravel(), minlength=T + 1)
        kl, (entropy, distortion) = sums[0] / n, sums[1:] / np.where(count, count, math.nan)
        entropy[1] = math.nan  # p(x_0 | x_1) is not one of the T - 1 steps
        x0 = xp.asarray(x0)
        parts = dict(L_T=q.kl_to_pi(T, x0)) if q.discretised else dict(
            H_q_T=q.H_q(T, x0), H_q_1=q.H_q(1, x0), H_p_T=q.H_p(x0))
        parts, null = {name: to_host(a) for name, a in parts.items()}, to_host(q.log_null(x0))
        each = sum(a if name == "H_q_T" else -a for name, a in parts.items()) - kl_each

        def se(values):
            return float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan

        return dict(K=float(each.mean()), K_se=se(each), K_each=each, L_null=float(null.mean()),
                    K_minus_L_null=float(each.mean() - null.mean()),
                    K_minus_L_null_se=se(each - null), kl=kl, entropy=entropy,
                    distortion=distortion, **{name: float(a.mean()) for name, a in parts.items()})

    # Training

    def _loss(self, x0, xt, t, z, v_weight=None):
        """The KL of each step, nats (n,), or a decoder's -log p(x_0 | x_1) where t = 1; and dz."""
        q = self.diffusion
        loss, dz = q.kl(x0, xt, self.xp.maximum(t, 2), z, v_weight)
        decoded = t == 1
        if q.discretised and bool(decoded.any()):
            loss[decoded], dz[decoded] = q.decode(x0[decoded], xt[decoded], z[decoded])
        return loss, dz

    def gradient(self, x0, *key, tables=None):
        """The gradient of an objective, estimated from x0 (n, D) with one t for each example, goes
        to self.grad. tables: those of objective(), K's if None, with the gradient of -K / D. key:
        integers that seed the draws, such as seed and step. Returns t (n,) and loss_t / chance_t
        (n,), nats, whose mean estimates the sum of the KLs whatever the objective is."""
        xp, q, (n, D) = self.xp, self.diffusion, x0.shape
        frequency, weight, v_weight = tables or objective("K", q)
        t = stratified(n, frequency, generator(np, "times", *key).random())
        chance, t = xp.asarray(frequency[t] / frequency.sum()), xp.asarray(t)
        factor, loss = weight[t] / (n * D * chance), xp.zeros(n)

        def work(tape, share, cuts):
            rng = generator(xp, "noise", *key, share.start)
            for i in cuts:
                noise = q.distribution.noise(x0[i].shape, rng, self.dtype)
                xt = q.q_jump(x0[i], t[i]).draw(noise)
                z = self.forward_here(xt, t[i], tape)
                loss[i], dz = self._loss(x0[i], xt, t[i], z, v_weight)
                dx = self.backward_here(dz * factor[i, None, None], tape)
                if self.learned:
                    dlevel = self.learned.dlevel(q, x0[i], xt, t[i], z, dx, tape, factor[i], n)
                    psi = self.weights[self.learned]["psi"]
                    tape.dtheta[self.learned]["psi"] += self.learned.backward(psi, dlevel)

        for grad in self.grads:
            grad[...] = 0
        self.deal(work, n, all_ranks=True)
        self.grad, loss = self.comm.sum(sum(self.grads)), self.comm.sum(loss)
        return t, loss / chance

    def optimiser(self, **options):
        """An Optimiser of the weights; options are Optimiser's."""
        return Optimiser(self.layers, self.theta, self.xp, **options)

    def step(self, optimiser):
        """One step against self.grad; returns its norm. Shares take the matrices in turn."""
        norm = optimiser.momentum(self.grad)
        self.deal(lambda tape, share, cuts: optimiser.orthogonalise(share), len(optimiser.matrices),
                  all_ranks=True)
        optimiser.move(self.comm.sum(optimiser.moves))
        self.follow_schedule()
        return norm

    # Samples

    def sample(self, number, seed=0, eta=1.0, batch=None, keep=(), progress=iter, first=0,
               x_T=None, contrast=None, repeats=1):
        """Samples (number, D) of p(x_0): x_T ~ pi, then x_{t-1} ~ p(x_{t-1} | x_t) for t = T..1
        (eqs. 4, 5 and 44). By default they are true draws, not means.

        eta       from 0, no noise, to 1, the model's, see Gaussian.p_back
        batch     chains at a time; None: as many as have 2^16 numbers, on a GPU 2^20
        keep      times t in 1..T whose x_t are wanted too: the result is (samples, {t: x_t})
        first     begin with sample number `first`, so that many can be drawn part by part
        x_T       (number, D) to start from, where they are not drawn from pi
        contrast  a Contrast, for clearer samples
        repeats   make the step from t so many times where decides(q)[t]; in between, q_step draws a
                  new x_t from x_{t-1}. With exact steps and eta = 1 this is Gibbs sampling of
                  (x_{t-1}, x_t), and removes errors of earlier steps from x_t (as in Lugmayr et al.
                  2022, arXiv 2201.09865)

        Sample k has its own noise, from (seed, k): it is the same on every device and for every
        size of `batch`, up to rounding, which a chain may enlarge. InputError unless 0 <= eta <= 1
        and repeats >= 1, or for more repeats where x_T is given: they would forget it."""
        if not 0 <= eta <= 1:
            raise InputError(f"eta lies between 0 (no noise) and 1 (the model's), not {eta}")
        if not 1 <= repeats <= (1 if x_T is not None else math.inf):
            raise InputError(f"repeats must be 1 or more, and 1 where x_T is given, not {repeats}")
        xp, q = self.xp, self.diffusion

        def draw_batch(rngs, rows, tick):
            kept, n = {}, len(rngs)
            x = q.pi((n, self.D)).draw(self.noise(rngs)) if x_T is None else xp.asarray(x_T[rows])
            decisive = decides(q)
            for t in range(self.T, 0, -1):
                if t in keep:
                    kept[t] = x
                for repeat in range(repeats if decisive[t] else 1):
                    if repeat:
                        x = q.q_step(x, xp.full(n, t)).draw(self.noise(rngs))
                    p = self.p_back(x, t, eta, contrast if decisive[t] else None)
                    x = p.draw(self.noise(rngs))
                tick()
            return kept | {0: x}

        return self.chains(draw_batch, number, seed, batch, keep, progress, first)

    def noise(self, rngs, rows=1):
        """What is random in one step, `rows` rows by each generator: (len(rngs) rows, D)."""
        drawn = [self.diffusion.distribution.noise((rows, self.D), rng) for rng in rngs]
        return self.xp.asarray(np.concatenate(drawn))

    def chains(self, draw_batch, number, seed, batch, keep, progress, first=0, particles=1):
        """All samples, `batch` chains at a time, dealt out to the ranks; a sample has `particles`
        chains. draw_batch(rngs, rows, tick) gives {t: x_t} of the samples in the slice rows, for
        t = 0 and those in keep; rngs are their generators, one each; it calls tick() at every t."""
        usual = max(self.threads, (2 ** 16 if self.xp is np else 2 ** 20) // self.D)
        batch = max(1, (batch or usual) // particles)
        starts = list(range(0, number, batch))[self.comm.rank::self.comm.size]
        kept = {t: np.zeros((number, self.D)) for t in {0, *keep} if t <= self.T}
        ticks = iter(progress(range(self.T * len(starts))))
        for start in starts:
            rows = slice(start, min(start + batch, number))
            rngs = [generator(np, "sample", seed, first + k) for k in range(start, rows.stop)]
            for t, x in draw_batch(rngs, rows, lambda: next(ticks)).items():
                kept[t][rows] = to_host(x)
        next(ticks, None)  # lets a progress bar close
        kept = {t: self.comm.sum(x) for t, x in kept.items()}
        samples = kept.pop(0)
        return (samples, kept) if len(keep) else samples


def decides(q):
    """Which steps decide what x_0, an image, will be, (T + 1,) on the host: where noise is far
    above the signal (level > 4), x_t says little of x_0, and where it is far below, only details
    are left open."""
    level = to_host(q.level)
    return (-2 <= level) & (level <= 4)


class Contrast:
    """For clearer samples: away from what a worse model says (autoguidance, Karras et al. 2024,
    arXiv 2406.02507). weak: a DPM of the same data with fewer weights and less training, which
    makes the errors of the model, only larger. v, or of bits the log odds z, becomes

        v + w (v - v_weak)

    Of numbers, a step p becomes p^(1 + w) / p_weak^w, normalised, p_weak with the variance of p.
    DPM.sample does so where decides(q)[t]. The samples vary less, and their distribution is not
    known. InputError unless w is finite and 0 or more."""

    def __init__(self, weak, w):
        if not 0 <= w < math.inf:
            raise InputError(f"the w of a contrast is finite, and 0 or more, not {w}")
        self.weak, self.w = weak, w

    def forward(self, model, x, t):
        """The z (n, D, outputs) of the model for x (n, D) and t (n,), moved so."""
        weak = self.weak.resized(*model.shape[:2]).with_diffusion(model.diffusion)
        z = model.forward(x, t)
        z[..., 0] += self.w * (z[..., 0] - weak.forward(x, t)[..., 0])
        return z


# ------------------------------------------------------------------------------------------------
# 4. More theory
# ------------------------------------------------------------------------------------------------
# Nothing here is needed to train or to sample. entropy_bounds says, without a network, how random
# a reverse step must be; log_weights, what probability the model itself gives to an example. With
# the learned schedule, beta_t are weights as well.

def entropy_bounds(q, x0):
    """The bounds of eq. 24 (appendix A) on the entropy of every reverse step, for data x0 (n, D):
    lower and upper (T + 1,), nats, nan at t = 0 and 1.

        H_q(X_t|X_{t-1}) + H_q(X_{t-1}|X_0) - H_q(X_t|X_0) <= H_q(X_{t-1}|X_t) <= H_q(X_t|X_{t-1})

    The lower one holds for all data, and is tight where x_0 adds nothing to what x_t tells of
    x_{t-1}, as for one point. The upper one holds where the second moment of the data is at most 1,
    or the mean of bits is the rate; it is tight where H_q(X_t) no longer grows, as for data that is
    pi already."""
    mean = q.xp.asarray(x0).mean(0, keepdims=True)
    H_q = np.array([math.nan] + [float(q.H_q(t, mean)[0]) for t in range(1, q.T + 1)])
    upper = np.array([math.nan] * 2 + [float(q.H_step(t, mean)[0]) for t in range(2, q.T + 1)])
    return upper - np.diff(H_q, prepend=math.nan), upper


def log_weights(model, x0, trajectories, rng, batch=8192):
    """log w (n, trajectories), nats, of forward trajectories from each x0 (n, D) (eqs. 6-9):

        w = p(x_T) prod_{t=1..T} p(x_{t-1} | x_t) / q(x_t | x_{t-1})   E_q w = p(x_0), E_q log w = K

    log mean w estimates log p(x_0): on average it is K for one trajectory, and rises to log p(x_0)
    with their number. This is annealed importance sampling, or Jarzynski's average of the work.
    rng is a generator of NumPy; `batch` trajectories are followed at a time. InputError for a
    discretised decoder."""
    xp, q = model.xp, model.diffusion
    if q.discretised:
        raise InputError("trajectories weigh densities: a discretised decoder has none")
    starts = np.repeat(np.arange(len(x0)), trajectories)
    log_w = np.empty(len(starts))
    for i in range(0, len(starts), batch):
        x = xp.asarray(x0[starts[i:i + batch]])
        total = xp.zeros(len(x))
        for t in range(1, model.T + 1):
            step = q.q_step(x, xp.full(len(x), t))
            xt = step.draw(xp.asarray(step.noise(x.shape, rng)))
            total += model.p_back(xt, t).log_density(x) - step.log_density(xt)
            x = xt
        log_w[i:i + batch] = to_host(total + q.log_pi(x))
    return log_w.reshape(len(x0), trajectories)


class LearnedSchedule:
    """beta_2..T as weights psi that ascend K (section 2.4.1); beta_1 stays fixed. The level,
    level_t = logit(1 - alpha_bar_t), climbs by positive steps exp(a_t):

        level_t = level_1 + (end - level_1) h_t / h_T        h_t = sum_{i=2..t} exp(a_i)

    a is piecewise linear in t, with the values psi / (1 + |psi / 6|) at its knots, at most 40, and
    end = 6 + 4 psi_end / (1 + |psi_end|). So |a| < 6, 2 < end < 10 and 0 < beta_t < 1 whatever psi
    is; psi = 0 makes level linear in t."""

    def __init__(self, T, beta_1, xp=np):
        self.xp, self.T, self.level_1, knots = xp, T, float(logit(beta_1)), min(T - 1, 40)
        self.shapes = dict(psi=(knots + 1,))
        place = np.linspace(0, knots - 1, T - 1)
        self.between = xp.asarray(np.maximum(0, 1 - np.abs(place[:, None] - np.arange(knots))))

    def _parts(self, psi):
        """exp(a), with a = between @ knots, and h, (T - 1,); and span = end - level_1 (1,)."""
        xp, psi = self.xp, psi.astype(np.float64)
        rise = xp.exp(self.between @ (psi / (1 + abs(psi / 6)))[:-1])
        return rise, xp.cumsum(rise), 6 + 4 * psi[-1:] / (1 + abs(psi[-1:])) - self.level_1

    def forward(self, psi):
        """alpha_bar_0..T of psi."""
        xp, (_, h, span) = self.xp, self._parts(psi)
        level = self.level_1 + xp.concatenate([xp.zeros(1), span * h / h[-1:]])
        return xp.concatenate([xp.ones(1), 1 / (1 + xp.exp(level))])

    @staticmethod
    def dlevel(q, x0, xt, t, z, dx, tape, factor, n):
        """The gradient (T + 1,) of -K / D in level, from some of the n examples of DPM.gradient:
        each KL counts `factor` (n,), and the network's backward has left dx (n, D) and, on the
        tape, dlevel and ds. eps is held fixed, so that x_t, v*, what the network is told, the KL
        and two entropies depend on the schedule. Per dimension, with g = c u as in Gaussian.kl:

            level_t = 2 log tan phi_t                  dphi_t / dlevel_t = 1/2 sin phi_t cos phi_t
            dx_t / dphi_t = v*                         dv* / dphi_t = -x_t
            s_t = log sin^2 phi_t - log sin^2 phi_t-1  dlog sin^2 phi_t / dlevel_t = alpha_bar_t
            dc / ds = 1 + c                            dKL / dc = 1/2 (e^2 + g u) / (1 + g)^2
            dH_q(X_T|X_0) / dlevel_T = 1/2 alpha_bar_T
            dH_p(X_T) / dlevel_T = 1/2 (1 - x_0^2) alpha_bar_T (1 - alpha_bar_T)"""
        u, e, c = q.u_e_c(x0, xt, t, z)
        g = c * u
        dphi = factor * (c * e / (1 + g) * xt).sum(1) + (dx * q.velocity(x0, xt, t)).sum(1)
        ds = factor * (0.5 * (1 + c) * (e ** 2 + g * u) / (1 + g) ** 2).sum(1) + tape.ds
        at = (t == q.xp.arange(q.T + 1)[:, None]).astype(np.float64)
        dphi, ds, told = at @ dphi, at @ ds, at @ tape.dlevel.astype(np.float64)
        ds[:-1] -= ds[1:]  # phi_t is in s_t and in s_{t+1}
        dlevel, a_T = 0.5 * q.sin * q.cos * dphi + q.alpha_bar * ds + told, q.alpha_bar[-1]
        dlevel[-1] -= 0.5 * a_T * (1 - (1 - a_T) * (1 - x0 ** 2)).sum() / x0.shape[1] / n
        return dlevel

    def backward(self, psi, dlevel):
        """dpsi from dlevel (T + 1,), whose entries 0 and 1 are not used.

        dspan = sum_t dlevel_t h_t / h_T               dh_t = span / h_T (dlevel_t - [t = T] dspan)
        da_i = exp(a_i) sum_{t>=i} dh_t"""
        xp, (rise, h, span) = self.xp, self._parts(psi)
        psi = psi.astype(np.float64)
        dspan = (dlevel[2:] * h / h[-1:]).sum(keepdims=True)
        da = rise * (xp.cumsum(dlevel[2:][::-1])[::-1] - dspan) * span / h[-1:]
        slope = 1 / (1 + abs(psi[:-1] / 6)) ** 2
        return xp.concatenate([self.between.T @ da * slope, dspan * 4 / (1 + abs(psi[-1:])) ** 2])


# ------------------------------------------------------------------------------------------------
# 5. Posteriors
# ------------------------------------------------------------------------------------------------
# A trained model times any r(x_0): inpainting, denoising, or what you like. The reverse process
# stays, but every step is multiplied by an r_t that says what r will want (eqs. 16-23).

class Observation:
    """r(x) = exp(-(x - y)^2 / (2 sigma^2)), x normalised: y (n, D) or (D,), and sigma >= 0 that
    broadcasts to it. sigma = 0 says that a coordinate is known (inpainting), inf that it is free;
    values in between denoise. InputError where this makes no sense."""

    def __init__(self, y, sigma, xp=np):
        y, sigma = (np.asarray(to_host(a), np.float64) for a in (y, sigma))
        try:
            sigma = np.broadcast_to(sigma, y.shape)
        except ValueError:
            raise InputError(f"the noise of an observation has shape {sigma.shape}, the "
                             f"observation {y.shape}") from None
        if not (sigma >= 0).all():
            raise InputError("the noise of an observation must be 0 (known), positive, or inf "
                             "(unknown)")
        if not np.isfinite(y[np.isfinite(sigma)]).all():
            raise InputError("an observation is NaN or infinite where it is said to be known")
        
        self.y, self.sigma = xp.asarray(np.where(np.isfinite(sigma), y, 0)), xp.asarray(sigma)

    def rows(self, index, particles=1):
        """The Observation of some of the samples only, each of them `particles` times."""
        chosen = copy.copy(self)
        if self.y.ndim == 2:
            chosen.y, chosen.sigma = (a[index].repeat(particles, 0) for a in (self.y, self.sigma))
        return chosen

    def factors(self, q, power=1.0):
        """The arguments of `times` for r^power: of numbers y and the variance, of bits log r(0) and
        log r(1), up to a constant. InputError for a known bit that is neither 0 nor 1."""
        xp = q.xp
        sigma = self.sigma if power > 0 else xp.full(self.sigma.shape, math.inf)  # r^0 = 1
        if q.distribution is Normal:
            return self.y, sigma ** 2 / power
        if bool(((self.sigma == 0) & (self.y != 0) & (self.y != 1)).any()):
            raise InputError("a known bit must be 0 or 1")
        with np.errstate(divide="ignore", invalid="ignore"):  # sigma = 0: log r is 0 or -inf
            log_r = [-xp.where(self.y == x, 0.0, 0.5 * ((x - self.y) / sigma) ** 2)
                     for x in (0, 1)]
        top = xp.maximum(*log_r)
        return [power * (a - top) for a in log_r]

    def log_r(self, q, x, power=1.0):
        """log r(x)^power, nats (n,), up to a constant; a known number counts 0, wherever x is."""
        a, b = self.factors(q, power)
        if q.distribution is Normal:
            return -0.5 * ((x - a) ** 2 / q.xp.where(b > 0, b, math.inf)).sum(1)
        return q.xp.where(x == 1, b, a).sum(1)


class Function:
    """Any r of your own: log_r(x) gives log r (n,), gradient(x) its gradient (n, D), for normalised
    x (n, D) (raw = x scale + shift), float64 arrays of xp. They are called from several threads,
    for some of the samples and several points of each. InputError for another shape, or numbers
    that are not finite."""

    def __init__(self, log_r, gradient):
        self._log_r, self._gradient = log_r, gradient

    @staticmethod
    def _checked(value, shape, what, x):
        found = getattr(value, "shape", type(value).__name__)
        if found != shape:
            raise InputError(f"{what} of your r returns {found} where an array of shape {shape} "
                             "is needed")
        if not bool((abs(value) < math.inf).all()):
            raise InputError(f"{what} of your r returns NaN or infinite values, where the largest "
                             f"|x| is {float(abs(x).max()):.3g}")
        return value

    @classmethod
    def product(cls, functions):
        return cls(lambda x: sum(f.log_r(x) for f in functions),
                   lambda x: sum(f.gradient(x) for f in functions))

    def log_r(self, x):
        return self._checked(self._log_r(x), x.shape[:1], "log_r", x)

    def gradient(self, x):
        return self._checked(self._gradient(x), x.shape, "gradient", x)

    def averaged(self, p, power=1.0):
        """log E[r(x)^power] (n,) for x with distribution p, and its gradient in the mean of p,
        (n, D), as if r changed only along its gradient g at the mean. Where p is Normal, r then
        depends on h alone, h = g'(x - mean) / size ~ N(0, 1), with size the deviation of g'x. With
        E_r, the mean weighted by r^power,

            d log E[r^power] / dmean = E_r[h] g / size

        This needs r at other points, but not its gradient there, and so works where r is narrower
        than p. Both means are sums over 25 points h, |h| <= 6. Of bits, for which only r(0) and
        r(1) have a meaning, it is simply log r and g at the mean."""
        xp, g = p.xp, self.gradient(p.mean)
        if not isinstance(p, Normal):
            return power * self.log_r(p.mean), power * g
        line, h = p.variance * g, xp.linspace(-6, 6, 25)[:, None]
        size = xp.sqrt((line * g).sum(1, keepdims=True))
        size = xp.where(size > 0, size, 1.0)  # where g = 0, which moves nothing
        points = (p.mean + h[:, None] * line / size).reshape(-1, g.shape[1])
        log_w = power * self.log_r(points).reshape(len(h), -1) - 0.5 * h ** 2
        top = log_w.max(0)
        w = xp.exp(log_w - top)
        log_r = top + xp.log(w.sum(0) / xp.exp(-0.5 * h ** 2).sum())
        return log_r, g / size * ((w * h).sum(0) / w.sum(0))[:, None]


R_SCHEDULES = ("predicted", "constant", "annealed")


class Posterior:
    """p(x_0) r(x_0): each p(x_{t-1} | x_t) of a model times r_{t-1}(x_{t-1}), normalised. r is an
    Observation, a Function, or a list of them: their product. r_0 = r, and r_t is by r_schedule

        constant   r                    eq. 23
        annealed   r^((T - t) / T)      section 2.5
        predicted  E[r(x_0) | x_t], x_0 as x0_for_r has it, with coordinates independent

    constant and annealed multiply by an Observation in closed form, and tilt by the gradient of a
    Function averaged over the step (of which eq. 61 is the limit for small steps). predicted tilts
    each step by the gradient of log r_t through the network, so that a known coordinate moves all
    others (reconstruction guidance, Ho et al. 2022, Song et al. 2023), and multiplies only the last
    step by r. This takes almost 3 times as long.

    Eq. 22 divides each product by its integral Z(x_t) = int p(x_{t-1} | x_t) r_{t-1}(x_{t-1})
    dx_{t-1}. That is right only if Z = r_t; otherwise the step has the weight Z / r_t. With
    `particles` > 1 a sample is chosen from so many weighted chains, which are resampled where the
    weights become uneven. In the limit of many this is exact, unless r_t is 0 where r is not (a
    known value with constant or annealed).

    repeats: see DPM.sample. InputError for another schedule, fewer than one particle or repeat, an
    r of another type, or particles together with repeats."""

    def __init__(self, model, r, r_schedule="predicted", particles=1, repeats=1):
        if r_schedule not in R_SCHEDULES:
            raise InputError(f"no r-schedule '{r_schedule}': choose {', '.join(R_SCHEDULES)}")
        if min(particles, repeats) < 1:
            raise InputError(f"particles and repeats must be 1 or more, not {particles}, {repeats}")
        r = list(r) if isinstance(r, (list, tuple)) else [r]
        self.model, self.r_schedule = model, r_schedule
        self.particles, self.repeats = particles, repeats
        self.observations = [o for o in r if isinstance(o, Observation)]
        functions = [f for f in r if isinstance(f, Function)]
        if len(self.observations + functions) < max(1, len(r)):
            raise InputError("r must be an Observation, a Function, or a list of them")
        self.functions = [Function.product(functions)] if functions else []  # averaged together
        if particles > 1 and repeats > 1:
            raise InputError("repeats do not go with particles: omit one of them")

    def rows(self, index, particles=1):
        """The Posterior of some of the samples only, each of them `particles` times."""
        chosen = copy.copy(self)
        chosen.observations = [o.rows(index, particles) for o in self.observations]
        return chosen

    def given(self, p, power=1.0):
        """p times all Observations^power, normalised, and log Z (n,) up to a constant."""
        log_Z = 0.0
        for o in self.observations:
            p, log_Z_o = p.times(*o.factors(self.model.diffusion, power))
            log_Z = log_Z + log_Z_o
        return p, log_Z

    def of_x0(self, p):
        """log E[r(x_0)] (n,), up to a constant, where x_0 has the distribution p; and its gradient
        in the mean of p, (n, D). For a Function see Function.averaged."""
        product, log_r = self.given(p)
        g = (product.mean - p.mean) / p.variance
        for f in self.functions:
            log_r_f, g_f = f.averaged(p)
            log_r, g = log_r + log_r_f, g + g_f
        return log_r, g

    def predicted(self, x, t):
        """For an integer t >= 2: p(x_{t-1} | x_t = x), log r_t(x) (n,), and the g (n, D) to tilt p
        by, from the gradient of log r_t in x_t, through the mean of p_x0 and so the network."""
        model, xp, q = self.model, self.model.xp, self.model.diffusion
        t_x, z = xp.full(len(x), t), xp.zeros((*x.shape, q.outputs))
        log_r, g = xp.zeros(len(x)), xp.zeros(x.shape)

        def work(tape, share, cuts):
            for i in cuts:
                z[i] = model.forward_here(x[i], t_x[i], tape)
                log_r[i], dmean = self.rows(i).of_x0(q.x0_for_r(x[i], t_x[i], z[i]))
                dx, dz = q.dp_x0(x[i], t_x[i], z[i], dmean)
                g[i] = dx + model.backward_here(dz, tape)

        model.deal(work, len(x))
        p, prior = q.p_back(x, t_x, z), q.x0_for_r(x, t_x, z)
        return p, log_r, q.guided(p, t_x, g, prior, self.given(prior)[0])

    def sample(self, number, seed=0, batch=None, keep=(), progress=iter, first=0):
        """Samples (number, D); the arguments are those of DPM.sample. The y of an Observation is
        (D,) or (number, D), and no two know the same coordinate; else InputError, as for predicted
        with an IdealNetwork, which has no backward."""
        model = self.model
        times_known = model.xp.zeros(model.D, int)
        for o in self.observations:
            if o.y.shape not in ((model.D,), (number, model.D)):
                raise InputError(f"an observation of shape {o.y.shape} does not fit {number} "
                                 f"samples of {model.D} dimensions")
            times_known = times_known + (o.sigma == 0)
        if bool((times_known > 1).any()):
            raise InputError("two observations know the same coordinate: leave it to one of them")
        if self.r_schedule == "predicted" and not hasattr(model.network, "backward"):
            raise InputError("predicted needs a network with a backward: choose another r-schedule")

        def draw_batch(rngs, rows, tick):
            return self.rows(rows, self.particles)._draw_batch(rngs, tick, keep)

        return model.chains(draw_batch, number, seed, batch, keep, progress, first, self.particles)

    def _step(self, x, t):
        """The model's p(x_{t-1} | x_t = x), t >= 1; log r_t(x) (n,); and the g to tilt p by, or
        None where p is to be multiplied by r_{t-1}."""
        model, q = self.model, self.model.diffusion
        if self.r_schedule != "predicted":
            return model.p_back(x, t), self._log_r(x, t), None
        if t > 1:
            return self.predicted(x, t)
        z = model.xp.zeros((*x.shape, q.outputs))  # the fixed last step: x_0 as if drawn from pi
        log_r, _ = self.of_x0(q.x0_for_r(x, model.xp.full(len(x), 1), z))
        return model.p_back(x, 1), log_r, None

    def _power(self, t):
        return 1 - t / self.model.T if self.r_schedule == "annealed" else 1.0

    def _log_r(self, x, t):
        """log r_t(x) (n,), up to a constant, of constant and annealed; and of any at t = 0."""
        q, power = self.model.diffusion, self._power(t)
        return (sum(o.log_r(q, x, power) for o in self.observations)
                + sum(power * f.log_r(x) for f in self.functions))

    def _draw(self, p, t, g, rngs):
        """Draws x_t: from p r_t if g is None, else from p tilted by g. Returns x_t and log p(x_t) -
        log d(x_t), up to a constant, where d is what x_t was drawn from."""
        q, power = self.model.diffusion, self._power(t) if g is None else 0.0  # r^0 = 1
        p, log_Z = self.given(p, power)
        if g is None:
            g = sum((f.averaged(p, power)[1] for f in self.functions), 0 * p.mean)
        p, log_Z_g = p.tilted(g)
        x = p.draw(self.model.noise(rngs, self.particles))
        log_r = sum(o.log_r(q, x, power) for o in self.observations)
        return x, log_Z + log_Z_g - log_r - (g * x).sum(1)

    def _draw_batch(self, rngs, tick, keep):
        """{t: x_t} of a batch, see DPM.chains; every sample is `particles` rows."""
        model, xp, n, N = self.model, self.model.xp, len(rngs), self.particles
        past, log_w = {}, np.zeros((n, N))

        def choose(log_step, last=False):
            """The rows that go on, once log_step (n N,) is added to the log weights."""
            log_w[...] += to_host(log_step).reshape(n, N)
            rows, drawn = resampled(log_w, rngs, last)
            log_w[drawn] = 0
            return xp.asarray(rows)

        pi, decisive = model.diffusion.pi((n * N, model.D)), decides(model.diffusion)
        g = 0 * pi.mean if self.r_schedule == "predicted" else None  # which leaves pi as it is
        x, log_p = self._draw(pi, model.T, g, rngs)
        for t in range(model.T, 0, -1):
            if t in keep:
                past[t] = x
            for repeat in range(self.repeats if decisive[t] else 1):
                if repeat:  # up to another x_t, and down again
                    x = model.diffusion.q_step(x, xp.full(n, t)).draw(model.noise(rngs))
                p, log_r, g = self._step(x, t)
                if N > 1:
                    rows = choose(log_p + log_r)
                    past = {s: a[rows] for s, a in past.items()}
                    p, log_r, g = p.take(rows), log_r[rows], None if g is None else g[rows]
                x, log_p = self._draw(p, t - 1, g, rngs)
                log_p = log_p - log_r
            tick()
        past[0] = x
        if N > 1:
            rows = choose(log_p + self._log_r(x, 0), last=True)
            past = {s: a[rows] for s, a in past.items()}
        return past


def resampled(log_w, rngs, last=False):
    """Systematic resampling, for weights log_w (n, N), of those of n samples whose effective number
    of particles, 1 / sum w^2, is below N / 2. Returns the rows (of n N) that go on, and which
    samples were resampled (n,). last: draws one particle of each sample; the rows are (n,)."""
    (n, N), w = log_w.shape, softmax(log_w, axis=1)
    drawn = (1 / (w ** 2).sum(1) < N / 2) | last
    rows = [np.arange(N)] * n
    for k in np.flatnonzero(drawn):
        rows[k] = stratified(1 if last else N, w[k], rngs[k].random())
    return np.concatenate([k * N + r for k, r in enumerate(rows)]), drawn


# ------------------------------------------------------------------------------------------------
# 6. Checkpoints
# ------------------------------------------------------------------------------------------------
# A model, or a model and the state of its training, is one .npz file without pickles. It holds its
# configuration, so that nothing has to be said again to sample from it or to go on with it.

FORMAT = 7


def digest_of(content):
    """sha256 of {name: array}: no other content has the same."""
    total = hashlib.sha256()
    for name, a in sorted(content.items()):
        total.update(f"{name} {a.dtype.str} {a.shape} ".encode() + a.tobytes())
    return total.hexdigest()


def save(model, path, optimiser=None, half=False):
    """Writes the model, and the state of its training if optimiser is given. half: weights in half
    precision, for a model to be shipped. OSError if it cannot be written; InputError for a model
    that `load` could not make again: one that is not of `build`, or a part of a learned schedule,
    which is no longer that of its weights."""
    q, theta = model.diffusion, to_host(model.theta)
    if "network" not in model.about or (model.learned and model.learned.T != model.T):
        raise InputError("save a model as `build` has made it, with all steps of its schedule")
    config = dict(diffusion=type(q).__name__, of_diffusion=q.config, shape=model.shape,
                  dtype=str(model.dtype), shares=model.threads * model.comm.size,
                  learned=model.learned is not None, about=model.about)
    content = dict(format=FORMAT, config=json.dumps(config), alpha_bar=to_host(q.alpha_bar),
                   shift=model.shift, scale=model.scale)
    if optimiser:
        content |= dict(theta=theta, average=to_host(optimiser.average), m=to_host(optimiser.m),
                        v=to_host(optimiser.v), step=optimiser.step)
    else:
        content["average"] = theta.astype(np.float16) if half else theta
    content = {name: np.asarray(a) for name, a in content.items()}
    with written_whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, digest=digest_of(content), **content)
        file.flush()
        os.fsync(file.fileno())


def build(diffusion, shape, about, learned=False, **options):
    """A DPM of a diffusion and data of shape (H, W, C). about: `network`, its name; `sizes`, its
    arguments; `predict`, what it outputs for numbers, v, eps or paper; and what else is to be known
    of the run. learned: beta_t is trained too, see LearnedSchedule. options are DPM's. InputError
    for what does not go together."""
    (H, W, C), network, sizes, predict = shape, about["network"], about["sizes"], about["predict"]
    if learned and (not isinstance(diffusion, Gaussian) or diffusion.discretised):
        raise InputError("a learned schedule is for numbers, with the fixed last step")
    for name, known in ((network, NETWORKS), (predict, READOUTS)):
        if name not in known:
            raise InputError(f"no network or output '{name}': choose {', '.join(known)}")
    variance = getattr(diffusion, "variance", "learned")
    if predict == "paper" and (diffusion.discretised or variance != "learned"):
        raise InputError("the paper's kernel has its own variance (eq. 64) and no decoder")
    if predict == "eps" and float(diffusion.alpha_bar[-1]) == 0:
        raise InputError("eps^ says nothing of x_0 where alpha_bar_T = 0: predict v")
    if network == "paper":  # kept with the model, since a part of its schedule has other ends
        lowest, highest = (float(diffusion.level[t]) for t in (1, -1))
        sizes = dict(pixels=H * W, lowest=lowest, highest=10.0 if learned else highest) | sizes
        about = dict(about, sizes=sizes)
    readout = LogOdds() if isinstance(diffusion, Binomial) else READOUTS[predict]()
    made = NETWORKS[network](C, readout, diffusion.outputs, **sizes)
    beta_1 = 1 - float(diffusion.alpha_bar[1])
    schedule = LearnedSchedule(diffusion.T, beta_1, diffusion.xp) if learned else None
    return DPM(diffusion, made, shape, learned=schedule, about=about, **options)


def load(path, xp=np, threads=None, comm=None):
    """The model in a checkpoint, with averaged weights. InputError if it is missing or damaged."""
    return _model_of(_read(path), "average", xp, threads, comm)


def resume(path, xp=np, comm=None, **options):
    """The model in a checkpoint as its training left it, and the Optimiser to go on with; options
    are Optimiser's. InputError as for load, for a model without the state of its training, and for
    a number of ranks that does not fit."""
    content, ranks = _read(path), comm.size if comm else 1
    if "theta" not in content:
        raise InputError(f"{path}: holds a finished model without the state of its training; it "
                         "cannot be resumed")
    shares = content["config"]["shares"]  # the steps of its training depend on their number
    if shares % ranks:
        raise InputError(f"{path}: was trained in {shares} shares, which {ranks} ranks cannot "
                         "divide")
    model = _model_of(content, "theta", xp, shares // ranks, comm)
    optimiser = model.optimiser(**options)
    for name in ("average", "m", "v"):
        setattr(optimiser, name, xp.asarray(content[name]))
    optimiser.step = int(content["step"])
    return model, optimiser


def _read(path):
    """What `save` has written, with config as a dict. InputError if the file is not just that."""
    if not os.path.exists(path):
        raise InputError(f"{path}: no such checkpoint")
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("not an .npz file")
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        if int(content["format"]) == FORMAT:
            if str(content.pop("digest")) != digest_of(content):
                raise ValueError("its content has changed since it was written")
            return content | dict(config=json.loads(str(content["config"])))
    except Exception as error:  # of damaged files readers raise almost anything
        problem = f"not a checkpoint, or a damaged one ({first_line(error)})"
        raise InputError(f"{path}: {problem}") from None
    raise InputError(f"{path}: a checkpoint of format {int(content['format'])}, this program reads "
                     f"{FORMAT}; train it anew")


def _model_of(content, weights, xp, threads, comm):
    """The model in what `_read` returns, with the weights of this name."""
    config, dtype = content["config"], content["config"]["dtype"]
    kind = dict(Gaussian=Gaussian, Binomial=Binomial)[config["diffusion"]]
    q = kind(content["alpha_bar"], xp, **config["of_diffusion"])
    return build(q, config["shape"], config["about"], config["learned"],
                 shift=float(content["shift"]), scale=float(content["scale"]), threads=threads,
                 dtype=dtype, comm=comm, theta=xp.asarray(content[weights].astype(dtype)))
