"""Diffusion probabilistic models, the whole method, after Sohl-Dickstein, Weiss, Maheswaranathan & Ganguli, "Deep
Unsupervised Learning using Nonequilibrium Thermodynamics" (2015), arXiv 1503.03585. Equation numbers are the paper's.

The idea. A fixed diffusion q turns data x_0 into noise x_T in T small steps that anybody can sample:

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                                                 t = 1..T

Run backwards, a small enough step is again a Gaussian, so a network that learns T means and variances

    p(x_{t-1} | x_t) = N(f_mu(x_t, t), f_sigma(x_t, t))

is a generative model: draw x_T from pi = N(0, I), then step t = T..1. For data of zeros and ones a step forgets bits instead,
and the network learns their probabilities. The log likelihood of the model has a lower bound K, a sum of entropies and of KL
divergences, each in closed form (eq. 14). K is what is trained and what is reported.

    room 1   what q and p are                schedule, LearnedSchedule, Gaussian, Binomial
             what is known beside them       Observation, Function, Posterior
    room 2   how the reverse is learned      MLP, Kernel, Adam; IdealKernel, its limit
    room 3   the model                       DPM: the bound K and its gradient, p(x_0), samples, posterior samples

Conventions. t runs 1..T and arrays over t have T + 1 entries; entry 0 is the data without noise, alpha_bar[0] = 1. Data is a
matrix (n, D) of mean 0 and average variance 1, or of bits. The paper's symbols are the names; the gradient of `name` is `dname`;
its backward stands under each forward. Everything is in nats. Schedules, posteriors, KLs and entropies are float64, only the
network and the noise of its training are float32. `xp` is numpy or cupy, and every array of a model lives where its xp says.
"""
import os
import sys
import warnings

if "numpy" in sys.modules and os.environ.get("OPENBLAS_NUM_THREADS") != "1":
    warnings.warn("import dpm before numpy, or set OPENBLAS_NUM_THREADS=1: with BLAS on several threads it is several times slower", stacklevel=2)
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
from scipy.special import entr, expit, logit, logsumexp, softmax

FORMAT = 3  # of the checkpoint file
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class InputError(ValueError):
    """The user's mistake: its message is one line that says what is wrong and what to do."""


def backend(gpu=None):
    """The array module: cupy if gpu, numpy if not, and cupy where it works if gpu is None. InputError if gpu and it does not."""
    if gpu is False:
        return np
    try:
        import cupy
        float((cupy.ones((2, 2)) @ cupy.ones((2, 2)) * cupy.random.Generator(cupy.random.Philox4x3210((0,))).random(2)).sum())
        return cupy
    except ModuleNotFoundError:
        problem = 'CuPy is not installed: pip install "cupy-cuda12x[ctk]" (or cuda13x, to match the driver)'
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
            cosine   alpha_bar_t = (1 - beta_1) cos(0.99 pi/2 u), u from 0 at t = 1 to 1 at T: a good one for bits
    beta_1  the variance of the first step, fixed (section 2.4.1). It limits K: no model gets above -D/2 ln(2 pi e beta_1).

    The schedule that ascends K is LearnedSchedule.
    """
    if T < 2 or not 0 < beta_1 < 1:
        raise InputError(f"a schedule needs T >= 2 and 0 < beta_1 < 1, not T = {T}, beta_1 = {beta_1}")
    t = np.arange(2, T + 1)
    if kind == "logsnr":
        return np.concatenate([[1], expit(-np.linspace(logit(beta_1), 10, T))])
    if kind == "cosine":
        return np.concatenate([[1], (1 - beta_1) * np.cos(0.99 * math.pi / 2 * np.linspace(0, 1, T))])
    if kind == "paper":
        beta = 1 / (T - t + 1)
    elif kind == "linear":
        beta = np.minimum(np.linspace(1e-4, 0.02, T)[1:] * 1000 / T, 0.999)
    else:
        raise InputError(f"no schedule '{kind}': choose logsnr, paper, linear or cosine")
    return np.concatenate([[1], np.cumprod(np.concatenate([[1 - beta_1], 1 - beta]))])


class LearnedSchedule:
    """beta_2..T as parameters that ascend K, section 2.4.1; beta_1 stays fixed. Its parameters psi are weights like any other.

    With logsnr_t = logit(1 - alpha_bar_t), whose rise at t is the log of what the step multiplies noise to signal by,

        logsnr_t = logsnr_1 + (end - logsnr_1) c_t / c_T,    c_t = sum_{s=2..t} exp(a_s),    end = 6 + 4 s(psi_end),    s(z) = z / (1 + |z|)

    where a_2..T runs in straight lines between at most 40 knots 6 s(psi / 6), so that a long trajectory is smooth in t. Whatever psi
    is, |a| < 6 and 2 < end < 10, so every step rises and 0 < beta_t < 1. psi = 0 is logsnr linear in t.
    """

    def __init__(self, T, beta_1, xp=np):
        self.xp, self.first, knots = xp, float(logit(beta_1)), self.parameters(T) - 1
        place = np.linspace(0, knots - 1, T - 1)
        self.between = xp.asarray(np.maximum(0, 1 - np.abs(place[:, None] - np.arange(knots))))  # a = between @ knots

    @staticmethod
    def parameters(T):
        """How many: the knots and the end."""
        return min(T - 1, 40) + 1

    def forward(self, psi):
        """alpha_bar_0..T of psi."""
        xp = self.xp
        psi = psi.astype(np.float64)
        self.slope = 1 / (1 + xp.abs(psi / 6)) ** 2                     # of 6 s(psi / 6)
        self.rise = xp.exp(self.between @ (psi / (1 + xp.abs(psi / 6)))[:-1])
        self.c, self.end_slope = xp.cumsum(self.rise), 4 / (1 + xp.abs(psi[-1:])) ** 2
        self.span = 6 + 4 * psi[-1:] / (1 + xp.abs(psi[-1:])) - self.first
        logsnr = xp.concatenate([xp.zeros(1), self.span * self.c / self.c[-1:]]) + self.first
        return xp.concatenate([xp.ones(1), 1 / (1 + xp.exp(logsnr))])

    def backward(self, dlogsnr):
        """dpsi from dlogsnr (T + 1,), of which entries 0 and 1 do not count.

        logsnr_t = first + span c_t / c_T      dspan = sum dlogsnr_t c_t / c_T      dc_t = span / c_T (dlogsnr_t - [t = T] dspan)
        c_t = sum_{s<=t} exp(a_s)              da_s = exp(a_s) sum_{t>=s} dc_t
        """
        xp, share = self.xp, self.c / self.c[-1:]
        dspan = (dlogsnr[2:] * share).sum(keepdims=True)
        later = xp.cumsum(dlogsnr[2:][::-1])[::-1] - dspan
        da = self.rise * later * self.span / self.c[-1:]
        return xp.concatenate([self.between.T @ da * self.slope[:-1], dspan * self.end_slope])


class Gaussian:
    """The Gaussian diffusion, left column of Table App.1, for one schedule alpha_bar_0..T.

    A kernel for it gives two numbers per dimension, out (n, D, 2), v = out[..., 0] and w = out[..., 1]; see `reverse`.
    Methods take t as an integer array (n,), one per example. A distribution over x is its parameters, here (mean, variance).
    """

    outputs, pi, mean = 2, (0.0, 1.0), 0.0  # mean: of the data
    config = {}

    def __init__(self, alpha_bar, xp=np):
        self.xp, self.T = xp, len(alpha_bar) - 1
        self.set(xp.asarray(alpha_bar, np.float64))

    def set(self, alpha_bar):
        """Takes another schedule (T + 1,) of the same length."""
        xp = self.xp
        before = xp.concatenate([xp.ones(1), alpha_bar[:-1]])           # alpha_bar_{t-1}
        beta, noise = 1 - alpha_bar / before, 1 - alpha_bar
        with np.errstate(divide="ignore", invalid="ignore"):            # at t < 2 there is no posterior
            self._tables = dict(
                angle=xp.stack([xp.sqrt(alpha_bar), xp.sqrt(noise)]),
                kernel=xp.stack([xp.sqrt(1 - beta), beta]),
                posterior=xp.stack([xp.sqrt(before) * beta / noise, xp.sqrt(1 - beta) * (1 - before) / noise, beta * (1 - before) / noise]),
                reverse=xp.stack([-beta * xp.sqrt(before / noise), xp.log(noise / (1 - before))]))
        self.alpha_bar, self.beta = alpha_bar, beta

    def _at(self, name, t):
        """The coefficients in that table at t (n,), as columns (n, 1)."""
        return self._tables[name][:, t][:, :, None]

    def signal_and_noise(self, t):
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), (n, 1): what is left of x_0 in x_t, and the deviation of what was added.
        They are the cosine and the sine of an angle phi_t, and x_t = cos phi_t x_0 + sin phi_t eps turns from data to noise."""
        return self._at("angle", t)

    def noise(self, shape, rng, dtype=np.float64):
        """The randomness of one draw, frozen: eps ~ N(0, I)."""
        return rng.standard_normal(shape, dtype=dtype)

    def kernel(self, x, t):
        """T_pi(. | x; beta_t) = N(sqrt(1 - beta_t) x, beta_t I), eq. 2: q(x_t | x_{t-1}) of x = x_{t-1}; and, at t = 1, the fixed first
        reverse step p(x_0 | x_1) of x = x_1 (eq. 44), since pi does not change under a step and its step back. Mean and variance."""
        shrink, beta = self._at("kernel", t)
        return shrink * x, beta

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
        """p(x_{t-1} | x_t) = N(f_mu, f_sigma), t >= 2: the mean f_mu and the variance f_sigma, (n, D).

        f_mu = sqrt(1 - beta_t) x_t - v beta_t sqrt(alpha_bar_{t-1} / (1 - alpha_bar_t))
        f_sigma = beta_t exp(w s_t),    s_t = log beta_t / beta~_t = log (1 - alpha_bar_t) / (1 - alpha_bar_{t-1})

        At v = w = 0 this is the equilibrium kernel, exact for white data. The v that makes f_mu equal mu~ is
        v* = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 = dx_t / dphi, of unit size at every t. w = 0 and w = -1 stand at
        the upper and the lower bound that eq. 24 puts on the entropy of this step.
        """
        shrink, beta = self._at("kernel", t)
        shift, s = self._at("reverse", t)
        return shrink * xt + shift * out[..., 0], beta * self.xp.exp(s * out[..., 1])

    def _error(self, x0, xt, t, out):
        """s_t and e^{-s_t} (n, 1), w, e^{-w s_t} and v - v* (n, D): all that the KL is made of."""
        signal, deviation = self.signal_and_noise(t)
        s, w = self._at("reverse", t)[1], out[..., 1]
        return s, self.xp.exp(-s), w, self.xp.exp(-s * w), out[..., 0] - (signal * xt - x0) / deviation

    def kl(self, x0, xt, t, out):
        """KL[ q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ], t >= 2, in nats (n,), and its derivative dout, shaped as out.

        per dimension, 1/2 [ log(f_sigma / beta~) - 1 + (beta~ + (f_mu - mu~)^2) / f_sigma ], where of the schedule only s is left:
        1/2 [ (1 + w) s - 1 + e^{-(1 + w) s} + (1 - e^{-s}) e^{-w s} (v - v*)^2 ]
        """
        s, less, w, e, error = self._error(x0, xt, t, out)
        dv = (1 - less) * e * error
        excess = less * e + dv * error - 1                              # 0 where p has just the right variance
        dout = self.xp.empty(out.shape, out.dtype)
        dout[..., 0] = dv
        dout[..., 1] = -0.5 * s * excess
        return 0.5 * ((1 + w) * s + excess).sum(1), dout

    def ds(self, x0, xt, t, out):
        """The derivative of kl in s_t, v* held, (n,): 1/2 [ (1 + w) (1 - e^{-(1 + w) s}) + (e^{-s} - w (1 - e^{-s})) e^{-w s} (v - v*)^2 ]."""
        s, less, w, e, error = self._error(x0, xt, t, out)
        return 0.5 * ((1 + w) * (1 - less * e) + (less - w * (1 - less)) * e * error ** 2).sum(1)

    def dlogsnr(self, t, dphi, ds):
        """dlogsnr (T + 1,), logsnr_t = log (1 - alpha_bar_t) / alpha_bar_t, from dphi and ds of examples at t (n,).

        logsnr = 2 log tan phi                           dphi_t / dlogsnr_t = 1/2 sin phi_t cos phi_t
        s_t = log sin^2 phi_t - log sin^2 phi_{t-1}      dlog sin^2 phi_t / dlogsnr_t = cos^2 phi_t = alpha_bar_t
        """
        xp = self.xp
        signal, deviation = self._tables["angle"]
        at = (t == xp.arange(self.T + 1)[:, None]).astype(np.float64)   # sums as a product: on a GPU too they have one order
        dphi, ds = at @ dphi, at @ ds
        ds[:-1] -= ds[1:]                                               # s_t and s_{t+1} both have phi_t
        return 0.5 * signal * deviation * dphi + self.alpha_bar * ds

    def paper_form(self, xt, t, z):
        """The paper's own readout, eqs. 64 and 65: the out (n, D, 2) that stands for z = (z_mu, z_sigma), (n, D, 2).

        f_sigma = sigmoid(z_sigma + logit beta_t)      f_mu = (x_t - z_mu) (1 - f_sigma) + z_mu
        With rho = f_sigma / beta_t = 1 / (beta_t + (1 - beta_t) e^-z_sigma) and c = (1 - sqrt(1 - beta_t)) / beta_t,
        v = sqrt((1 - alpha_bar_t) / alpha_bar_{t-1}) (rho (x_t - z_mu) - c x_t)      w = log rho / s
        """
        xp = self.xp
        shrink, beta = self._at("kernel", t)
        shift, s = self._at("reverse", t)
        rho = self._rho(beta, z)
        v = (rho * (xt - z[..., 0]) - xt / (1 + shrink)) * (-beta / shift)
        return xp.stack([v, xp.log(rho) / s], 2).astype(z.dtype)

    def _rho(self, beta, z):
        return 1 / (beta + (1 - beta) * self.xp.exp(-z[..., 1].astype(np.float64)))

    def dpaper_form(self, xt, t, z, dout):
        """dz and dx from dout: drho = rho (1 - f_sigma) dz_sigma, since f_sigma is a sigmoid."""
        xp = self.xp
        shrink, beta = self._at("kernel", t)
        shift, s = self._at("reverse", t)
        rho, dv = self._rho(beta, z), dout[..., 0] * (-beta / shift)
        dz = xp.stack([-dv * rho, (dv * rho * (xt - z[..., 0]) + dout[..., 1] / s) * (1 - beta * rho)], 2)
        return dz.astype(dout.dtype), dv * (rho - 1 / (1 + shrink))

    def ideal(self, xt, t, mean, variance):
        """The out (n, D, 2) for which p is the best diagonal Gaussian there is, from E[x_0 | x_t] and Var[x_0 | x_t], (n, D).

        x_{t-1} has, given x_t, the mean mu~(E x_0, x_t) and the variance beta~_t + (d mu~ / d x_0)^2 Var x_0.
        """
        xp = self.xp
        from_x0, _, beta_tilde = self._at("posterior", t)
        _, beta = self._at("kernel", t)
        signal, deviation = self.signal_and_noise(t)
        v = (signal * xt - mean) / deviation
        return xp.stack([v, xp.log((beta_tilde + from_x0 ** 2 * variance) / beta) / self._at("reverse", t)[1]], 2)

    def step(self, mean, variance, eps):
        """A draw from N(mean, variance) with noise eps."""
        return mean + self.xp.sqrt(variance) * eps

    def log_density(self, x, mean, variance):
        """log N(x; mean, variance), (n,)."""
        return -0.5 * ((x - mean) ** 2 / variance + self.xp.log(2 * math.pi * variance)).sum(1)

    def entropy(self, mean, variance):
        """Of N(mean, variance), (n,)."""
        return (0.5 * self.xp.log(2 * math.pi * math.e * self.xp.broadcast_to(variance, mean.shape))).sum(1)

    def observed(self, r, t, how):
        """The Observation r as it stands at t, a Gaussian in x_t: its mean and its variance, 0 where known, inf where not. See Posterior.

        diffused: r carried by the diffusion, r_t(x_t) = E[r(x_0) | x_t] under pi, where x_0 ~ N(sqrt(alpha_bar_t) x_t, 1 - alpha_bar_t)
        """
        y, variance = r.y, r.sigma ** 2
        if how == "annealed":
            variance = variance * (self.T / (self.T - t)) if t < self.T else self.xp.full(variance.shape, math.inf)
        elif how == "diffused":
            a = max(float(self.alpha_bar[t]), 1e-300)
            y, variance = y / math.sqrt(a), (variance + 1 - a) / a
        return y, variance

    def multiply(self, f_mu, f_sigma, y, variance):
        """The product of N(f_mu, f_sigma) and exp(-(x - y)^2 / 2 variance), eq. 22, Table App.1: its mean and variance, and the log of
        what it integrates to, which eq. 22 divides by, (n,), but for a constant.

        With the gain g = f_sigma / (f_sigma + variance): mean (1 - g) f_mu + g y, variance (1 - g) f_sigma. variance = 0 says
        that a coordinate is known (g = 1, the product is a delta at y), inf that nothing is (g = 0).
        """
        xp, total = self.xp, f_sigma + variance
        g = f_sigma / total
        log_Z = xp.where(xp.isinf(variance), 0.0, (f_mu - y) ** 2 / total + xp.log(total))
        return ((1 - g) * f_mu + g * y, (1 - g) * f_sigma), -0.5 * log_Z.sum(1)

    def log_observed(self, x, y, variance):
        """log r_t(x), (n,), of what multiply multiplied with; 0 for a delta, where x is y."""
        return -0.5 * self.xp.where(variance > 0, (x - y) ** 2 / self.xp.where(variance > 0, variance, 1.0), 0.0).sum(1)

    def tilt(self, f_mu, f_sigma, g):
        """The perturbed kernel for any r, eq. 61: N(f_mu + f_sigma g, f_sigma), with g the gradient of log r at f_mu."""
        return f_mu + f_sigma * g, f_sigma

    def log_untilted(self, x, f_mu, f_sigma, g):
        """log N(x; f_mu, f_sigma) - log N(x; f_mu + f_sigma g, f_sigma), (n,)."""
        return (0.5 * f_sigma * g ** 2 - (x - f_mu) * g).sum(1)

    def expected(self, x, t):
        """E[x_0 | x_t = x] under pi, sqrt(alpha_bar_t) x, and its slope."""
        slope = math.sqrt(float(self.alpha_bar[t]))
        return slope * x, slope

    def predict(self, xt, t, out):
        """x_0 as the kernel predicts it from x_t, N(cos phi x_t - sin phi v, sin^2 phi): mean and variance. The mean is the kernel's, the
        variance that of white data, for which v = 0 is exact."""
        signal, deviation = self.signal_and_noise(t)
        return signal * xt - deviation * out[..., 0], deviation ** 2

    def dpredict(self, xt, t, out, moved):
        """dx and dout, where log Z has the gradient moved / variance in the predicted mean: what `multiply` moves the mean by is
        variance times the gradient of its log Z."""
        signal, deviation = self.signal_and_noise(t)
        dout = self.xp.zeros_like(out)
        dout[..., 0] = -moved / deviation
        return signal / deviation ** 2 * moved, dout

    def variance(self, mean, variance):
        """Of every dimension of a distribution."""
        return variance

    def _H(self, variance, x0):
        return self.xp.full(len(x0), x0.shape[1] * 0.5 * math.log(2 * math.pi * math.e * variance))

    def H_q(self, t, x0):
        """The entropy of q(x_t | x_0), one t >= 1, (n,): D/2 ln(2 pi e (1 - alpha_bar_t)), whatever x_0 is. The mean over data is H_q(X_t | X_0)."""
        return self._H(1 - float(self.alpha_bar[t]), x0)

    def H_step(self, t, x0):
        """The part of x_0 in H_q(X_t | X_{t-1}), one t >= 1, (n,): D/2 ln(2 pi e beta_t)."""
        return self._H(float(self.beta[t]), x0)

    def H_p(self, x0):
        """H_p(X_T), which stands for -E log pi(x_T), (n,): D/2 ln(2 pi e). The same for data of mean 0 and average variance 1 (eqs. 42-46)."""
        return self.xp.full(len(x0), x0.shape[1] * self.H_pi)

    def log_pi(self, x):
        """log pi(x) (n,), pi = N(0, I), mean and variance in self.pi."""
        return -0.5 * (x ** 2 + math.log(2 * math.pi)).sum(1)

    log_null = log_pi  # its mean over the data is L_null
    H_pi = H_null = 0.5 * math.log(2 * math.pi * math.e)  # the entropy of pi and -L_null, per dimension


class Binomial:
    """The binomial diffusion, right column of Table App.1, for data of zeros and ones: a bit is forgotten with probability beta_t and
    drawn anew from pi = B(rate). The paper's table has rate 1/2, its experiment the data's mean.

    A kernel for it gives one number per dimension, out (n, D, 1); see `reverse`. A distribution over x is (f,), the probabilities
    of a one; the interface is that of Gaussian. mean: of the data, for L_null.
    """

    outputs = 1

    def __init__(self, alpha_bar, xp=np, rate=0.5, mean=None):
        self.xp, self.T, self.rate, self.mean = xp, len(alpha_bar) - 1, float(rate), float(rate if mean is None else mean)
        if not (1e-4 <= self.rate <= 1 - 1e-4 and 0 < self.mean < 1):  # rarer bits than that round to certain ones at the first t
            raise InputError(f"the rate of the binomial pi and the mean of its data must lie between 0.0001 and 0.9999, not {self.rate:g}, {self.mean:g}")
        self.alpha_bar, self.pi = xp.asarray(alpha_bar, np.float64), (self.rate,)
        self.beta = 1 - self.alpha_bar / xp.concatenate([xp.ones(1), self.alpha_bar[:-1]])
        self.H_null = self._h(self.mean)
        self.config = dict(rate=self.rate, mean=self.mean)

    @staticmethod
    def _h(f):
        """The entropy of B(f) in nats, a float."""
        return float(entr(f) + entr(1 - f))

    def _keep(self, x, a):
        """The probability of a one where x is kept with probability a."""
        return a * x + self.rate * (1 - a)

    def noise(self, shape, rng, dtype=np.float64):
        """The randomness of one draw, frozen: u uniform on [0, 1)."""
        return rng.random(shape, dtype=dtype)

    def kernel(self, x, t):
        """T_pi(. | x; beta_t) = B(x (1 - beta_t) + rate beta_t), eq. 2; at t = 1 also the fixed first reverse step, eq. 44."""
        return (self._keep(x, 1 - self.beta[t][:, None]),)

    def diffuse(self, x0, t, u):
        """x_t ~ q(x_t | x_0) = B(alpha_bar_t x_0 + rate (1 - alpha_bar_t)), from frozen noise u (n, D)."""
        return self.step(self._keep(x0, self.alpha_bar[t][:, None]), u)

    def posterior(self, x0, xt, t):
        """q(x_{t-1} = 1 | x_t, x_0), t >= 2, bit by bit: Bayes, from q(x_{t-1} | x_0) and q(x_t | x_{t-1}). (n, D)"""
        one, keep = self._keep(x0, self.alpha_bar[t - 1][:, None]), 1 - self.beta[t][:, None]
        like = [self._likelihood(xt, x, keep) for x in (0, 1)]
        one, zero = one * like[1], (1 - one) * like[0]
        return (one / (one + zero),)

    def _likelihood(self, xt, x, a):
        """The probability of xt where x, 0 or 1, was kept with probability a."""
        f = self._keep(x, a)
        return xt * f + (1 - xt) * (1 - f)

    def _prior(self, xt, t):
        """The log odds of x_0 = 1 given its own x_t alone, if x_0 ~ B(rate)."""
        a = self.alpha_bar[t][:, None]
        return math.log(self.rate / (1 - self.rate)) + self.xp.log(self._likelihood(xt, 1, a) / self._likelihood(xt, 0, a))

    def _mixed(self, xt, t, out):
        """m = p(x_0 = 1 | x_t) and q(x_{t-1} = 1 | x_t, x_0) for x_0 = 1 and 0, of which p is the mixture."""
        return *self.predict(xt, t, out), *self.posterior(1, xt, t), *self.posterior(0, xt, t)

    def reverse(self, xt, t, out):
        """p(x_{t-1} | x_t) = B(f_b), t >= 2, (n, D):   f_b = m q(x_{t-1} = 1 | x_t, x_0 = 1) + (1 - m) q(x_{t-1} = 1 | x_t, x_0 = 0)

        where m, what the kernel believes of x_0, has the log odds out + log odds of pi(x_0) q(x_t | x_0). At out = 0 this is the
        equilibrium kernel, exact for independent bits; for the true m it is the best of all f_b.
        """
        m, q1, q0 = self._mixed(xt, t, out)
        return (m * q1 + (1 - m) * q0,)

    def kl(self, x0, xt, t, out):
        """KL[ q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ], t >= 2, in nats (n,), and its derivative dout, shaped as out.

        per bit, b log(b / f) + (1 - b) log((1 - b) / (1 - f)), df = (f - b) / (f (1 - f)), f - b = (m - x_0) (q1 - q0)
        """
        xp = self.xp
        m, q1, q0 = self._mixed(xt, t, out)
        b, f = x0 * q1 + (1 - x0) * q0, m * q1 + (1 - m) * q0
        dout = (m - x0) * (q1 - q0) ** 2 * m * (1 - m) / (f * (1 - f))
        return (b * xp.log(b / f) + (1 - b) * xp.log((1 - b) / (1 - f))).sum(1), dout[..., None].astype(out.dtype)

    def ideal(self, xt, t, mean):
        """The out (n, D, 1) of the best kernel there is, from E[x_0 | x_t] (n, D)."""
        with np.errstate(divide="ignore"):  # certain bits have infinite log odds
            return (self.xp.log(mean) - self.xp.log(1 - mean) - self._prior(xt, t))[..., None]

    def step(self, f, u):
        """A draw from B(f) with noise u."""
        return (u < f).astype(np.float64)

    def log_density(self, x, f):
        """The log probability of x under B(f), (n,)."""
        return self.xp.log(x * f + (1 - x) * (1 - f)).sum(1)

    def entropy(self, f):
        """Of B(f), (n,)."""
        return -(f * self.xp.log(f) + (1 - f) * self.xp.log(1 - f)).sum(1)

    def _H(self, x, a):
        """The entropy of bits that are kept with probability a, from how often they are 1, x (n, D): (n,), linear in x."""
        ones = x.sum(1)
        return ones * self._h(self._keep(1, a)) + (x.shape[1] - ones) * self._h(self._keep(0, a))

    def H_q(self, t, x0):
        """The entropy of q(x_t | x_0), one t >= 1, (n,). Linear in x_0, so that the mean of the data serves for the data."""
        return self._H(x0, float(self.alpha_bar[t]))

    def H_step(self, t, x0):
        """The part of x_0 in H_q(X_t | X_{t-1}), one t >= 1, (n,)."""
        return self._H(self._keep(x0, float(self.alpha_bar[t - 1])), 1 - float(self.beta[t]))

    def observed(self, r, t, how):
        """The Observation r as it stands at t, as log r_t(0) and log r_t(1) for every bit, but for a constant. See Posterior.

        diffused: r_t(x_t) = E[r(x_0) | x_t] under pi, where x_0 = 1 with probability alpha_bar_t x_t + rate (1 - alpha_bar_t)
        """
        xp = self.xp
        known = r.sigma == 0
        if bool((known & (r.y != 0) & (r.y != 1)).any()):
            raise InputError("a known bit must be 0 or 1")
        log_r = [-xp.where(known, xp.where(r.y == x, 0.0, math.inf), 0.5 * ((x - r.y) / xp.where(known, 1.0, r.sigma)) ** 2) for x in (0, 1)]
        top = xp.maximum(*log_r)
        log_r = [l - top for l in log_r]
        if how == "annealed":
            log_r = [l * ((self.T - t) / self.T) for l in log_r] if t < self.T else [xp.zeros(r.y.shape)] * 2
        elif how == "diffused" and t > 0:
            a = float(self.alpha_bar[t])
            log_r = [xp.log(xp.exp(log_r[1]) * self._keep(x, a) + xp.exp(log_r[0]) * (1 - self._keep(x, a))) for x in (0, 1)]
        return tuple(log_r)

    def multiply(self, f, log_r0, log_r1):
        """The product of B(f) and r, Table App.1 with what normalises it: f r(1) / (f r(1) + (1 - f) r(0)), and the log of the denominator."""
        one, zero = f * self.xp.exp(log_r1), (1 - f) * self.xp.exp(log_r0)
        return (one / (one + zero),), self.xp.log(one + zero).sum(1)

    def log_observed(self, x, log_r0, log_r1):
        """log r_t(x), (n,), of what multiply multiplied with."""
        return self.xp.where(x == 1, log_r1, log_r0).sum(1)

    def tilt(self, f, g):
        """The perturbed kernel for any r: log odds moved by g, the gradient of log r at f; exact where log r is linear in x."""
        return (f / (f + (1 - f) * self.xp.exp(-g)),)

    def log_untilted(self, x, f, g):
        """log B(x; f) - log B(x; tilted f), (n,)."""
        return (self.xp.log(f * self.xp.exp(g) + 1 - f) - x * g).sum(1)

    def expected(self, x, t):
        """E[x_0 | x_t = x] under pi, alpha_bar_t x + rate (1 - alpha_bar_t), and its slope."""
        slope = float(self.alpha_bar[t])
        return self._keep(x, slope), slope

    def predict(self, xt, t, out):
        """x_0 as the kernel predicts it from x_t, B(m), see `reverse`. Never quite certain, whatever the log odds, since what is known must be possible."""
        return (1 / (1 + self.xp.exp(-self.xp.clip(out[..., 0] + self._prior(xt, t), -700, 36))),)  # from 37 on, 1 - m is 0

    def dpredict(self, xt, t, out, moved):
        """dx and dout, where log Z has the gradient `moved` in the log odds of m: what `multiply` moves m by is that gradient.
        In x the log odds are linear, as far as bits go."""
        return moved * (self._prior(1, t) - self._prior(0, t)), moved[..., None].astype(out.dtype)

    def variance(self, f):
        """Of every bit of a distribution."""
        return f * (1 - f)

    def H_p(self, x0):
        """H_p(X_T), (n,), linear in x0; with what log pi changes by on the way: E[-log pi(x_T) + log pi(x_1) - log pi(x_0)], so that K is
        a bound for any rate. Nothing changes where the rate is the mean of the data, or 1/2."""
        T, first = self._keep(x0, float(self.alpha_bar[self.T])), self._keep(x0, float(self.alpha_bar[1]))
        return -self._log_independent(T - first + x0, self.rate)

    def _log_independent(self, x, rate):
        ones = x.sum(1)
        return ones * math.log(rate) + (x.shape[1] - ones) * math.log(1 - rate)

    def log_pi(self, x):
        """log pi(x), (n,)."""
        return self._log_independent(x, self.rate)

    def log_null(self, x):
        """log likelihood of independent bits with the data's mean, (n,); its mean over the data is L_null."""
        return self._log_independent(x, self.mean)


HOW = ("constant", "annealed", "diffused", "predicted")


class Observation:
    """r(x) = exp(-(x - y)^2 / 2 sigma^2) for the posterior p(x_0) r(x_0): y (n, D) or (D,), sigma >= 0 of the same or a smaller shape,
    in units of the normalised data. sigma = 0 clamps a coordinate (a delta: inpainting), sigma = inf leaves it free, in between it denoises.

    InputError where y or sigma is NaN, sigma is negative, y is not finite where it counts, the shapes do not fit, or there is nothing
    to know or nothing to draw."""

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
        if np.isinf(sigma).all() or not sigma.any():
            raise InputError(f"nothing is {'unknown' if sigma.size and not sigma.any() else 'known'} in an observation: its noise is the same everywhere")
        self.y, self.sigma = xp.asarray(np.where(np.isfinite(sigma), y, 0)), xp.asarray(sigma)


class Function:
    """Any r of your own: log_r(x) gives log r (n,) and gradient(x) its gradient (n, D), for x (n, D) in units of the normalised data
    (data = x * scale + shift), float64 on the model's device. x are some of the samples at a time, in several threads if r is predicted."""

    def __init__(self, log_r, gradient):
        self._log_r, self._gradient = log_r, gradient

    def _checked(self, value, shape, what):
        if getattr(value, "shape", None) != shape:
            raise InputError(f"{what} of your r returns {getattr(value, 'shape', type(value).__name__)} where an array of shape {shape} is needed")
        if not bool((value * 0 == 0).all()):
            raise InputError(f"{what} of your r returns NaN or infinite values")
        return value

    def log_r(self, x):
        return self._checked(self._log_r(x), x.shape[:1], "log_r")

    def gradient(self, x):
        return self._checked(self._gradient(x), x.shape, "gradient")


class Posterior:
    """p(x_0) r(x_0) as a reverse process (eqs. 16-23): each of its distributions p(x_{t-1} | x_t) times r_{t-1}(x_{t-1}), normalised.

    r is an Observation, a Function, or a list of them, which stands for their product. What r_t is along the way, with r_0 = r:

        constant   r_t = r                                                eq. 23
        annealed   r_t = r^((T - t) / T)                                  section 2.5
        diffused   r_t(x_t) = E[r(x_0) | x_t] under pi                    r as it looks through the noise of t; of a Function, r(E[x_0 | x_t])
        predicted  r_t(x_t) = E[r(x_0) | x_t], x_0 as the kernel predicts it, the coordinates independent; of a Function, r of the mean

    The first three multiply an Observation in closed form, coordinate by coordinate. The last takes the gradient of log r_t through the
    network, so that what is known of one coordinate moves all the others (Ho et al. 2022, Song et al. 2023; with particles Wu et al.
    2023). It moves the kernel of the step from x_t by eq. 61, with the gradient at x_t, which is too little where steps are few
    and large, and only as good as the network; the last step is the product with r. A step costs two and a half.

    Eq. 22 divides each product by Z_{t-1}(x_t) = int p(x_{t-1} | x_t) r_{t-1}(x_{t-1}) and goes on as if that were r_t(x_t). What is left,
    Z_{t-1}(x_t) / r_t(x_t), is the weight of this step: with it, a crowd of particles is exact, whatever the r_t are in between, if they rule
    out nothing that r allows. A known value rules out all other x_t if it is constant or annealed; it needs diffused or predicted.
    """

    def __init__(self, diffusion, r, how):
        if how not in HOW:
            raise InputError(f"no r-schedule '{how}': choose {', '.join(HOW[:-1])} or {HOW[-1]}")
        r = list(r) if isinstance(r, (list, tuple)) else [r]
        self.q, self.how = diffusion, how
        self.observations = [o for o in r if isinstance(o, Observation)]
        self.functions = [f for f in r if isinstance(f, Function)]
        if len(self.observations) + len(self.functions) < max(1, len(r)):
            raise InputError("r must be an Observation, a Function, or a list of them")

    def check(self, number, D):
        for o in self.observations:
            if o.y.ndim not in (1, 2) or o.y.shape[-1] != D or o.y.ndim == 2 and len(o.y) != number:
                raise InputError(f"an observation of shape {o.y.shape} does not fit {number} samples of {D} dimensions")

    def rows(self, s, particles=1):
        """The same for the samples in slice s only, each of them `particles` times."""
        part = copy.copy(self)
        part.observations = [copy.copy(o) for o in self.observations]
        for o in part.observations:
            if o.y.ndim == 2:
                o.y, o.sigma = (a[s].repeat(particles, axis=0) for a in (o.y, o.sigma))
        return part

    def _seen(self, x, t):
        """Where the Functions look for x_t, and what multiplies their logs and, on top of that, their gradients."""
        if self.how == "diffused":
            x, slope = self.q.expected(x, t)
            return x, 1.0, slope
        return x, (1 - t / self.q.T if self.how == "annealed" else 1.0), 1.0

    def log_r(self, x, t):
        """log r_t(x), (n,), but for a constant."""
        total = self.q.xp.zeros(len(x))
        for o in self.observations:
            total += self.q.log_observed(x, *self.q.observed(o, t, self.how))
        seen, power, _ = self._seen(x, t)
        for f in self.functions:
            total += power * f.log_r(seen)
        return total

    def predicted(self, p):
        """log r_t (n,) where x_0 is predicted to have the distribution p, and what it moves p's mean by, see dpredict."""
        q, mean, log_r = self.q, p[0], self.q.xp.zeros(len(p[0]))
        moved = q.variance(*p) * sum(f.gradient(mean) for f in self.functions)
        for f in self.functions:
            log_r += f.log_r(mean)
        for o in self.observations:
            p, log_Z = q.multiply(*p, *q.observed(o, 0, self.how))
            log_r += log_Z
        return log_r, moved + (p[0] - mean)

    def draw(self, p, t, noise, g=None):
        """x_t (n, D) from p(x_t | .) times the Observations' r_t, moved by the gradient of the Functions' log r_t; or from p moved by g,
        the gradient of all that is predicted. And log p(x_t | .) less the log density that x_t was drawn from, (n,), but for a constant."""
        q, log_p, observed = self.q, self.q.xp.zeros(len(noise)), []
        if g is None:
            observed = [q.observed(o, t, self.how) for o in self.observations]
            for o in observed:
                p, log_Z = q.multiply(*p, *o)
                log_p += log_Z
            if self.functions:
                seen, power, slope = self._seen(p[0], t)
                g = power * slope * sum(f.gradient(seen) for f in self.functions)
        if g is None:
            x = q.step(*p, noise)
        else:
            x = q.step(*q.tilt(*p, g), noise)
            log_p += q.log_untilted(x, *p, g)
        return x, log_p - sum(q.log_observed(x, *o) for o in observed)


# ---------------------------------------------------------------------------------------------------------------------------
# Room 2. The reverse kernel: a network from (x_t, t) to the two numbers per dimension, backward written by hand
# ---------------------------------------------------------------------------------------------------------------------------

class MLP:
    """A residual multilayer perceptron whose every layer hears the time e:

        h_1 = s(x W_1 + e V_1 + b_1)      h_l = h_{l-1} + s(h_{l-1} W_l + e V_l + b_l)      y = h_L W + b

    with the softsign s(z) = z / (1 + |z|), a tanh at a fifth of its cost, or the smooth rectifier s(z) = (z + r - 1) / 2,
    r = sqrt(z^2 + 1), which is about z for large z and -1/2 for large -z. x is (N, inputs), e is (n, time): an example has
    N / n rows, the pixels of an image, which share its time. Where the rows are the cells of a grid (H, W), W_2 .. W_L are
    convolutions: for h_{l-1} they are given the 3 x 3 cells around each cell, side by side, 0 beyond the border. It reads
    its weights from kernel.W and puts their gradients into kernel.dW, under "name.W1" and so on; its large arrays are
    buffers of the kernel, allocated once.
    """

    def __init__(self, kernel, name, layers, rectifies=False, grid=None):
        self.kernel, self.name, self.layers, self.rectifies, self.grid = kernel, name, layers, rectifies, grid

    @staticmethod
    def shapes(name, inputs, width, layers, outputs, time, grid=None):
        shapes, around = {}, 9 if grid else 1
        for l in range(1, layers + 1):
            shapes |= {f"{name}.W{l}": (inputs if l == 1 else around * width, width), f"{name}.V{l}": (time, width), f"{name}.b{l}": (width,)}
        return shapes | {f"{name}.W": (width, outputs), f"{name}.b": (outputs,)}

    def _buffer(self, name, *shape):
        return self.kernel.buffer(f"{self.name}.{name}", shape)

    def _around(self, h):
        """(N, 9 width) from h (N, width) on a grid: the 3 x 3 cells around every cell. Elsewhere h itself."""
        if not self.grid:
            return h
        (H, W), width = self.grid, h.shape[1]
        n = len(h) // (H * W)
        padded = self._buffer("padded", n, H + 2, W + 2, width)
        padded[...] = 0
        padded[:, 1:-1, 1:-1] = h.reshape(n, H, W, width)
        around = self._buffer("around", n, H, W, 9, width)
        for k in range(9):
            around[:, :, :, k] = padded[:, k // 3:k // 3 + H, k % 3:k % 3 + W]
        return around.reshape(len(h), -1)

    def forward(self, x, e):
        """y (N, outputs), valid until the next call; keeps what backward needs."""
        xp, W, name = self.kernel.xp, self.kernel.W, self.name
        n, N = len(e), len(x)
        self.e, self.h, self.d = e, [x], []
        for l in range(1, self.layers + 1):
            W_l = W[f"{name}.W{l}"]
            z = xp.matmul(self._around(self.h[-1]) if l > 1 else x, W_l, out=self._buffer(f"h{l}", N, W_l.shape[1]))
            rows = z.reshape(n, N // n, -1)
            rows += (e @ W[f"{name}.V{l}"] + W[f"{name}.b{l}"])[:, None]
            d = self._buffer(f"d{l}", *z.shape)
            if self.rectifies:
                xp.multiply(z, z, out=d)
                d += 1
                xp.sqrt(d, out=d)
                z += d
                z *= 0.5
                xp.divide(z, d, out=d)                                  # s'(z) = (z + r) / 2r
                z -= 0.5
            else:
                xp.abs(z, out=d)
                d += 1
                z /= d                                                  # z is now s(z), and soon h_l
            if l > 1:
                z += self.h[-1]
            self.h.append(z)
            self.d.append(d)
        y = xp.matmul(self.h[-1], W[f"{name}.W"], out=self._buffer("y", N, W[f"{name}.W"].shape[1]))
        y += W[f"{name}.b"]
        return y

    def backward(self, dy, add, columns=None):
        """From dy (N, outputs), once after each forward: the gradients of the weights, written (add=False), added to what is there,
        or left out (add=None); returns de (n, time) and, if columns (a slice) is given, the gradient of those columns of x, transposed.

        y = h_L W + b                         dW = h_L' dy      db = sum dy      dh = dy W'
        h_l = h_{l-1} + s(z_l)                dz_l = dh / d_l^2                  since s'(z) = 1 / (1 + |z|)^2 and d = 1 + |z|,
                                              dz_l = dh d_l                      for the rectifier, d = s'(z)
        z_l = h_{l-1} W_l + e V_l + b_l       dW_l = h_{l-1}' dz_l               dh += dz_l W_l'
                                              dc = dz_l, summed over the rows of an example: dV_l = e' dc, db_l = sum dc, de += dc V_l'

        On a grid dW_l has the cells around h_{l-1}, and dh gets the cells around dz_l times W_l turned: what a cell hears from
        its k-th neighbour, that neighbour gets back from its own (8-k)-th.
        """
        kernel, xp, W, name = self.kernel, self.kernel.xp, self.kernel.W, self.name
        n, N, width = len(self.e), len(dy), self.h[-1].shape[1]

        def put(weight, a, b):
            dW = kernel.dW[f"{name}.{weight}"]
            if add:
                dW += a @ b
            else:
                xp.matmul(a, b, out=dW)

        if add is not None:
            put("W", self.h[-1].T, dy)
            put("b", kernel.ones(N), dy)
        dh = xp.matmul(dy, W[f"{name}.W"].T, out=self._buffer("dh", N, width))
        de = xp.zeros_like(self.e)
        for l in range(self.layers, 0, -1):
            dz = self.d[l - 1]
            if self.rectifies:
                dz *= dh
            else:
                dz *= dz
                xp.divide(dh, dz, out=dz)
            dc = kernel.ones(N // n) @ dz.reshape(n, N // n, width)     # the sum over rows as a product: three times as fast
            if add is not None:
                put(f"W{l}", (self._around(self.h[l - 1]) if l > 1 else self.h[0]).T, dz)
                put(f"V{l}", self.e.T, dc)
                put(f"b{l}", kernel.ones(n), dc)
            de += dc @ W[f"{name}.V{l}"].T
            if l > 1:  # turned is a view, W_l', where there is no grid
                turned = W[f"{name}.W{l}"].reshape(-1, width, width)[::-1].transpose(0, 2, 1).reshape(-1, width)
                dh += xp.matmul(self._around(dz), turned, out=self._buffer("scratch", N, width))
        if columns is None:
            return de, None
        W_1 = W[f"{name}.W1"][columns]
        return de, xp.matmul(W_1, dz.T, out=self._buffer("dx", len(W_1), N))


class Kernel:
    """The network of the reverse kernel for examples of shape (H, W, C), flattened to D = H W C; a vector is one pixel of D channels.

        e = tanh(phases of t Q + q)                                        the time
        maps = lower(x, e)                                                 `maps` numbers per pixel, from the whole image
        sights = middle(cells of 4 x 4 pixels of x, e)                     `sights` numbers per pixel, by convolutions over the cells
        out = upper([features, maps, sights], e)                           the same small MLP at every pixel, 2 outputs per channel

    This is the paper's lower and upper network (appendix D.2, figure D.1), the lower one with its dense and its coarse
    convolutional path. The dense one sees the whole image at once, the middle one how strokes go on, the upper one treats its
    pixel finely. Vectors need no lower network: maps = sights = 0. The features of a value x are x and its
    neighbours in a square of `patch` pixels, sin and cos of 2^k pi x for k in `scales`, and for every c in `edges`, values
    where the density of the data jumps, the softsign of (x - sqrt(alpha_bar_t) c) / s for s = 1 and 4 standard deviations of
    the noise: at each noise level the distance that matters. The readout starts at zero: the equilibrium kernel, K = L_null.

    The paper's forms: with `bumps` > 0 the upper network ends in that many readouts, mixed by bump functions of t (eqs. 62, 63); with
    time = 0 beside it they, and the distances from the edges, alone know t. paper: the outputs are z_mu and z_sigma of Gaussian.paper_form (eqs. 64, 65). learned: the
    parameters of a LearnedSchedule are among the weights, since they are trained with them.

    Its one array theta holds all weights, W names views of it; grad and dW are the same for their gradient.
    """

    cell = 4  # the side of the middle network's cells, in pixels

    def __init__(self, diffusion, shape, width=256, layers=4, maps=8, middle=96, middle_layers=6, sights=0, upper=64,
                 upper_layers=2, time=64, scales=(1, 3, 5), edges=(), patch=1, bumps=0, paper=False, learned=False,
                 dtype="float32", seed=0, theta=None):
        self.config = dict(shape=list(shape), width=width, layers=layers, maps=maps, middle=middle, middle_layers=middle_layers,
                           sights=sights, upper=upper, upper_layers=upper_layers, time=time, scales=list(scales), edges=list(edges),
                           patch=patch, bumps=bumps, paper=paper, learned=learned, dtype=dtype, seed=seed)
        if (paper or learned) and not isinstance(diffusion, Gaussian) or paper and learned:
            raise InputError("the paper's form and a learned schedule are for Gaussian diffusions, and one at a time")
        self.diffusion, self.xp, self.dtype = diffusion, diffusion.xp, np.dtype(dtype)
        self.shape, self.pixels, self.channels, self.maps = tuple(shape), shape[0] * shape[1], shape[2], maps
        self.D, self.scales, self.edges, self.patch = self.pixels * self.channels, scales, edges, patch
        self.sights, self.paper, self.grid = sights, paper, (-(-shape[0] // self.cell), -(-shape[1] // self.cell))
        self.features_per_pixel = self.channels * (patch ** 2 + 2 * len(scales) + 2 * len(edges)) + maps + sights
        self.shapes = {"time.Q": (64, time), "time.q": (time,)}
        if learned:
            self.shapes["schedule.psi"] = (LearnedSchedule.parameters(diffusion.T),)
        if maps:
            self.shapes |= MLP.shapes("lower", self.D, width, layers, self.pixels * maps, time)
        if sights:
            self.shapes |= MLP.shapes("middle", self.channels * self.cell ** 2, middle, middle_layers, sights * self.cell ** 2, time, self.grid)
        self.shapes |= MLP.shapes("upper", self.features_per_pixel, upper, upper_layers, diffusion.outputs * self.channels * max(1, bumps), time)
        # A slice of images goes through the upper network while its activations are in cache; a GPU takes the whole batch
        self.slice = max(1, 6400 // self.pixels) if self.xp is np else 1 << 30
        self._buffers = {}
        phase = np.arange(diffusion.T + 1)[:, None] / diffusion.T * np.exp(np.linspace(0, 5, 32))
        self._phases = self.xp.asarray(np.concatenate([np.sin(phase), np.cos(phase)], 1).astype(self.dtype))
        if bumps:  # eq. 63: g_j(t), Gaussians in t evenly spaced over 1..T, half their distance wide, shares of their sum
            spacing = (diffusion.T - 1) / max(bumps - 1, 1)
            height = np.exp(-2 * ((np.arange(diffusion.T + 1)[:, None] - 1 - spacing * np.arange(bumps)) / spacing) ** 2)
            self._bumps = self.xp.asarray((height / height.sum(1, keepdims=True)).astype(self.dtype))
        self.bumps = bumps
        size = sum(map(math.prod, self.shapes.values()))
        if theta is None:
            rng, theta = generator(np, "weights", seed), np.zeros(size, self.dtype)
            for name, w in self._views(theta).items():
                if w.size and w.ndim == 2 and name != "upper.W":
                    w[:] = rng.standard_normal(w.shape) / math.sqrt(len(w))
            theta = self.xp.asarray(theta)
        self.theta, self.grad = theta, self.xp.zeros(size, self.dtype)
        self.W, self.dW = self._views(self.theta), self._views(self.grad)
        self.lower, self.upper = MLP(self, "lower", layers, rectifies=True), MLP(self, "upper", upper_layers)
        self.middle = MLP(self, "middle", middle_layers, rectifies=True, grid=self.grid)

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
            if w.size and w.ndim == 2:
                rows = n * {"upper.W": self.pixels, "middle.W": math.prod(self.grid)}.get(name[:name.find(".") + 2], 1)
                passed_on = {"time.Q": 0, "lower.W1": 0, "middle.W1": 0, "upper.W1": (self.maps + self.sights) / len(w)}.get(name, 1)
                total += rows * w.size * (4 + 2 * passed_on)
        return total

    def _time(self, t):
        """The phases of t / T at 32 frequencies from 1 to e^5, (n, 64), and e (n, time)."""
        phases = self._phases[t]
        return phases, self.xp.tanh(phases @ self.W["time.Q"] + self.W["time.q"])

    def _patches(self, x, u):
        """Fills u (C patch^2, n, H W) with the squares of `patch` x `patch` around every pixel of x (n, H, W, C), 0 beyond the border."""
        n, H, W, C = x.shape
        margin = self.patch // 2
        padded = self.buffer("padded", (n, H + 2 * margin, W + 2 * margin, C))
        padded[...] = 0
        padded[:, margin:margin + H, margin:margin + W] = x
        for i in range(C * self.patch ** 2):
            c, dy, dx = i // self.patch ** 2, i // self.patch % self.patch, i % self.patch
            u[i].reshape(n, H, W)[...] = padded[:, dy:dy + H, dx:dx + W, c]

    def _cells(self, image):
        """An image (n, H, W, k) cell by cell, (n cells, cell^2 k), 0 beyond the border; _image is its inverse, and each is the other's backward."""
        (n, H, W, k), (rows, columns), side = image.shape, self.grid, self.cell
        padded = self.xp.zeros((n, rows * side, columns * side, k), self.dtype)
        padded[:, :H, :W] = image
        return padded.reshape(n, rows, side, columns, side, k).transpose(0, 1, 3, 2, 4, 5).reshape(-1, side ** 2 * k)

    def _image(self, cells):
        (H, W, _), (rows, columns), side = self.shape, self.grid, self.cell
        image = cells.reshape(-1, rows, columns, side, side, cells.shape[1] // side ** 2).transpose(0, 1, 3, 2, 4, 5)
        return image.reshape(len(image), rows * side, columns * side, -1)[:, :H, :W]

    def _features(self, x, t, e, maps):
        """The upper network's input for a slice, (n pixels, features); feature after feature in memory, each written as one run."""
        xp, n, (H, W, C) = self.xp, len(x), self.shape
        u = self.buffer("u", (self.features_per_pixel, n, self.pixels))
        if self.edges:
            signal, deviation = self.diffusion.signal_and_noise(t)
            deviation, ratio = deviation.astype(self.dtype), (signal / deviation).astype(self.dtype)
        image = x.reshape(n, H, W, C)
        self._patches(image, u)
        i = C * self.patch ** 2
        for c in range(C):
            value = x[:, c::C]
            for k in self.scales:
                xp.multiply(value, 2.0 ** k * math.pi, out=u[i])
                xp.cos(u[i], out=u[i + 1])
                xp.sin(u[i], out=u[i])
                i += 2
            if self.edges:
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
            sights = self._image(self.middle.forward(self._cells(image), e))
            u[i + self.maps:].reshape(self.sights, n, H, W)[...] = sights.transpose(3, 0, 1, 2)
        return u.reshape(self.features_per_pixel, -1).T

    def _dpatches(self, du):
        """dx (n, D) from du as _patches fills u: what went out from a pixel comes back to it."""
        n, (H, W, C), margin = du.shape[1], self.shape, self.patch // 2
        padded = self.xp.zeros((n, H + 2 * margin, W + 2 * margin, C), self.dtype)
        for i in range(C * self.patch ** 2):
            c, dy, dx = i // self.patch ** 2, i // self.patch % self.patch, i % self.patch
            padded[:, dy:dy + H, dx:dx + W, c] += du[i].reshape(n, H, W)
        return padded[:, margin:margin + H, margin:margin + W].reshape(n, self.D)

    def _dfeatures(self, x, t, du):
        """dx (n, D) and dphi (n,), of the angle phi_t, from du (features, n, pixels), all that does not go through maps and sights.

        u = sin(a x)                                     du = a cos(a x), and the cosine stands beside it; likewise the cosine
        u = z / (s + |z|)                                du = (1 - |u|)^2 / s
        z = (x - cos phi edge) / sin phi                 dz = 1 / sin phi in x, (edge - cos phi x) / sin^2 phi in phi
        """
        xp, n, C = self.xp, len(x), self.channels
        u = self.buffer("u", du.shape)
        if self.edges:
            signal, deviation = (a.astype(self.dtype) for a in self.diffusion.signal_and_noise(t))
        dx, dphi, i = self._dpatches(du), xp.zeros(n, self.dtype), C * self.patch ** 2
        for c in range(C):
            for k in self.scales:
                dx[:, c::C] += 2.0 ** k * math.pi * (u[i + 1] * du[i] - u[i] * du[i + 1])
                i += 2
            for edge in self.edges:
                for s in (1, 4):
                    dz = (1 - xp.abs(u[i])) ** 2 * du[i] / s
                    dx[:, c::C] += dz / deviation
                    dphi += (dz * (edge - signal * x[:, c::C])).sum(1) / deviation[:, 0] ** 2
                    i += 1
        return dx, dphi

    def _readout(self, x, t, y):
        """out (n, D, outputs) from the upper network's y (n pixels, ...): sum over bumps y_j g_j(t) (eq. 62), then the paper's form."""
        z = y.reshape(len(x), self.D, self.diffusion.outputs, -1)
        z = (z * self._bumps[t][:, None, None]).sum(3) if self.bumps else z[..., 0]
        self._z = z
        return self.diffusion.paper_form(x, t, z) if self.paper else z

    def _dreadout(self, x, t, dout):
        """dy from dout, and what of dx does not come through y."""
        dz, dx = self.diffusion.dpaper_form(x, t, self._z, dout) if self.paper else (dout, 0)
        return dz[..., None] * self._bumps[t][:, None, None] if self.bumps else dz, dx

    def forward(self, x, t):
        """out (n, D, outputs) for x (n, D) of the network's dtype and t (n,)."""
        _, e = self._time(t)
        out = self.xp.empty((len(x), self.D, self.diffusion.outputs), self.dtype)
        maps = self.lower.forward(x, e) if self.maps else x
        for i in range(0, len(x), self.slice):
            s = slice(i, min(i + self.slice, len(x)))
            out[s] = self._readout(x[s], t[s], self.upper.forward(self._features(x[s], t[s], e[s], maps[s]), e[s]))
        return out

    def gradient(self, x, t, loss, inputs=False, weights=True):
        """Forward and backward: dtheta in self.grad, unless `weights` are left out, where loss(s, out) returns dout for the examples in
        slice s. Returns, if `inputs` are asked for, dx (n, D) and dphi (n,), the angle's own way into the features; costs about a tenth more.

        Slice by slice through the upper network, so loss and backward meet its activations while they are in cache; the
        lower network, whose cost is in reading its weights, goes over all examples at once.
        out = upper([features, maps, sights], e)      de, dmaps, dsights, which go back through lower and middle; in the end
        e = tanh(phases Q + q)                        dz = de (1 - e^2), dQ = phases' dz, dq = sum dz
        """
        xp, n = self.xp, len(x)
        phases, e = self._time(t)
        de = xp.empty_like(e)
        maps = self.lower.forward(x, e) if self.maps else x
        H, W, _ = self.shape
        own = self.features_per_pixel - self.maps - self.sights
        columns = slice(0 if inputs else own, None) if inputs or self.maps or self.sights else None
        add = lambda i: i > 0 if weights else None
        if inputs:
            dx, dphi = xp.empty_like(x), xp.empty(n, self.dtype)
        for i in range(0, n, self.slice):
            s = slice(i, min(i + self.slice, n))
            y = self.upper.forward(self._features(x[s], t[s], e[s], maps[s]), e[s])
            dy, dx_y = self._dreadout(x[s], t[s], loss(s, self._readout(x[s], t[s], y)))
            de[s], du = self.upper.backward(dy.reshape(y.shape), add=add(i), columns=columns)
            if inputs:
                dx[s], dphi[s] = self._dfeatures(x[s], t[s], du.reshape(len(du), len(dy), -1))
                dx[s] += dx_y
                du = du[own:]
            if self.maps:  # what was maps is now dmaps
                dmaps = du[:self.maps].reshape(self.maps, -1, self.pixels)
                maps[s] = dmaps.transpose(1, 0, 2).reshape(-1, self.maps * self.pixels)
            if self.sights:
                dsights = self._cells(du[self.maps:].reshape(self.sights, -1, H, W).transpose(1, 2, 3, 0))
                de_s, dcells = self.middle.backward(dsights, add=add(i), columns=slice(None) if inputs else None)
                de[s] += de_s
                if inputs:
                    dx[s] += self._image(dcells.T).reshape(-1, self.D)
        if self.maps:
            de_lower, dimage = self.lower.backward(maps, add=add(0), columns=slice(None) if inputs else None)
            de += de_lower
            if inputs:
                dx += dimage.T
        if weights:
            dz = de * (1 - e * e)
            xp.matmul(phases.T, dz, out=self.dW["time.Q"])
            xp.matmul(self.ones(n), dz, out=self.dW["time.q"])
        return (dx, dphi) if inputs else None


class IdealKernel:
    """The best kernel there is for data whose moments given x_t are known: its K is K*, the limit for every network. It has no backward.

    moments(x, alpha_bar) gives E[x_0 | x_t] and, for a Gaussian diffusion, Var[x_0 | x_t], for x (n, D) and alpha_bar (n, 1)."""

    dtype = np.dtype("float64")

    def __init__(self, diffusion, moments, D):
        self.diffusion, self.moments, self.D = diffusion, moments, D

    def replica(self):
        return self

    def forward(self, x, t):
        return self.diffusion.ideal(x, t, *self.moments(x, self.diffusion.alpha_bar[t][:, None]))


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

def stratified(number, w, u):
    """`number` times t in 2..T, spread by one offset u in [0, 1): each is drawn in proportion to its w (T - 1,), to within one."""
    ends = np.cumsum(w)
    t = 2 + np.searchsorted(ends, (np.arange(number) + u) / number * ends[-1], side="right")
    return np.minimum(t, len(w) + 1)  # (i + u) / n can round up to 1, which would be step T + 1


def pick(w, points):
    """Which particle's share of [0, 1) each of the points (n, P) lies in, for particles with weights w (n, N) that sum to one: (n, P)."""
    return np.stack([np.minimum(np.searchsorted(np.cumsum(w_n), points_n, side="right"), w.shape[1] - 1) for w_n, points_n in zip(w, points)])


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
        self.learned = None
        if "schedule.psi" in getattr(kernel, "W", ()):
            self.learned = LearnedSchedule(self.T, 1 - float(diffusion.alpha_bar[1]), self.xp)
            diffusion.set(self.learned.forward(kernel.W["schedule.psi"]))

    def raw(self, x):
        """Normalised values in the data's units."""
        return x * self.scale + self.shift

    def normal(self, raw):
        """Values in the data's units, normalised."""
        return (raw - self.shift) / self.scale

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

    def reverse(self, x, t):
        """p(x_{t-1} | x_t = x) for x (n, D) and one t >= 1, its parameters: the kernel's, and at t = 1 the fixed first step (eq. 44)."""
        t_x = self.xp.full(len(x), t)
        return self.diffusion.reverse(x, t_x, self.forward(x, t_x)) if t > 1 else self.diffusion.kernel(x, t_x)

    def predicted(self, x, t, posterior):
        """p(x_{t-1} | x_t = x) as reverse gives it; log r_t(x) (n,), predicted; and the gradient of log r_t, (n, D), but None at t = 1, from
        where r itself multiplies. log r_t is a function of x_t and the network's out; its backward takes its gradient on to x_t."""
        xp, q = self.xp, self.diffusion
        t_x, out = xp.full(len(x), t), xp.zeros((*x.shape, q.outputs), self.kernel.dtype)
        if t == 1:  # the fixed first step knows of x_0 what pi knows
            return q.kernel(x, t_x), posterior.predicted(q.predict(x, t_x, out))[0], None
        log_r, g = xp.empty(len(x)), xp.empty(x.shape)

        def work(kernel, rows, _):
            part, x_r, t_r = posterior.rows(rows), x[rows], t_x[rows]

            def loss(s, out_s):
                out[rows][s] = out_s
                log_r[rows][s], moved = part.rows(s).predicted(q.predict(x_r[s], t_r[s], out_s))
                g[rows][s], dout = q.dpredict(x_r[s], t_r[s], out_s, moved)
                return dout

            g[rows] += kernel.gradient(x_r.astype(kernel.dtype), t_r, loss, inputs=True, weights=False)[0]

        self._deal(work, len(x))
        return q.reverse(x, t_x, out), log_r, g

    def bound(self, x0, rng, steps=None, batch=512, progress=lambda blocks: blocks):
        """The lower bound K on the mean log likelihood of x0 (n, D), in nats, and its parts (eq. 14 with 44, appendix B):

            K = - sum_{t=2..T} E_q KL[ q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) ] + H_q(X_T|X_0) - H_q(X_1|X_0) - H_p(X_T)

        steps   how many of the T - 1 KLs to draw for each example, spread over all t and all examples; None computes every one.
        Returns a dict: K, K_se (standard error of the mean over examples), L_null = mean log null(x_0), K_minus_L_null and its
        _se, kl (T + 1,), entry t the part of step t (0 for t < 2), H_q_T, H_q_1, H_p_T, the entropies of all D dimensions,
        K_each (n,), and H_p (T + 1,), the mean entropy of p(x_{t-1} | x_t), nan where no t was drawn. rng: of NumPy. K is exactly -kl.sum() + H_q_T - H_q_1 - H_p_T.
        """
        xp, q, n, T = self.xp, self.diffusion, len(x0), self.T
        steps = min(steps or T - 1, T - 1)
        t = stratified(n * steps, np.ones(T - 1), rng.random()).reshape(steps, n)  # steps = T - 1: row j is t = 2 + j for every example,
        t = rng.permuted(t, axis=1)                                                # else no example may be tied to one part of each row
        kl, H_p, each, count = np.zeros(T + 1), np.zeros(T + 1), np.zeros(n), np.bincount(t.ravel(), minlength=T + 1)
        for i in progress(range(0, n, batch)):
            x = xp.asarray(x0[i:i + batch])
            for row in t[:, i:i + batch]:
                t_row = xp.asarray(row)
                xt = q.diffuse(x, t_row, xp.asarray(q.noise(x.shape, rng)))
                out = self.forward(xt, t_row)
                part = to_host(q.kl(x, xt, t_row, out)[0]) * ((T - 1) / steps)
                each[i:i + batch] += part
                kl += np.bincount(row, part, T + 1) / n
                H_p += np.bincount(row, to_host(q.entropy(*q.reverse(xt, t_row, out))), T + 1)
        x0 = xp.asarray(x0)
        H_q_T, H_q_1, H_p_T, null = (to_host(a) for a in (q.H_q(T, x0), q.H_q(1, x0), q.H_p(x0), q.log_null(x0)))
        each = -each + H_q_T - H_q_1 - H_p_T
        H_q_T, H_q_1, H_p_T = (float(a.mean()) for a in (H_q_T, H_q_1, H_p_T))

        def se(values):
            return float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan

        return dict(K=float(-kl.sum() + H_q_T - H_q_1 - H_p_T), K_se=se(each), L_null=float(null.mean()),
                    K_minus_L_null=float(each.mean() - null.mean()), K_minus_L_null_se=se(each - null),
                    kl=kl, H_q_T=H_q_T, H_q_1=H_q_1, H_p_T=H_p_T, K_each=each, H_p=np.where(count, H_p, math.nan) / np.maximum(count, 1))

    def entropy_bounds(self, x0):
        """The bounds of eq. 24 (appendix A) on the entropy of every reverse step, for data x0 (n, D): lower and upper (T + 1,), nats,
        entries 0 and 1 nan.

            H_q(X_t|X_{t-1}) + H_q(X_{t-1}|X_0) - H_q(X_t|X_0)  <=  H_q(X_{t-1}|X_t)  <=  H_q(X_t|X_{t-1})

        The lower one is tight where x_t tells all that x_0 has to tell of x_{t-1}, as for one point; the upper where H_q(X_t) no
        longer grows, as for data that is pi already. The upper one needs data whose mean log pi does not change as it diffuses:
        unit variance, or bits whose mean is the rate (any bits, for rate 1/2).
        """
        q, mean = self.diffusion, self.xp.asarray(x0).mean(0, keepdims=True)  # every entropy is linear in x_0
        H_q = np.array([math.nan] + [float(q.H_q(t, mean)[0]) for t in range(1, self.T + 1)])
        upper = np.array([math.nan] * 2 + [float(q.H_step(t, mean)[0]) for t in range(2, self.T + 1)])
        return upper - np.diff(H_q, prepend=math.nan), upper

    def log_weights(self, x0, trajectories, rng, batch=8192):
        """log w (n, trajectories), nats, of forward trajectories of each x0 (n, D) under the model (eqs. 6-9), annealed importance
        sampling by the diffusion, Jarzynski's average of the work; rng is NumPy's:

            w = p(x_T) prod_{t=1..T} p(x_{t-1} | x_t) / q(x_t | x_{t-1})        E_q w = p(x_0)        E_q log w = K

        where K is that of data whose mean log pi(x_T) is -H_p(X_T). Follows `batch` trajectories at a time, step by step, and keeps none.
        """
        xp, q = self.xp, self.diffusion
        starts = np.repeat(np.arange(len(x0)), trajectories)
        log_w = np.empty(len(starts))
        for i in range(0, len(starts), batch):
            x = xp.asarray(x0[starts[i:i + batch]])
            total = xp.zeros(len(x))
            for t in range(1, self.T + 1):
                forward = q.kernel(x, xp.full(len(x), t))
                xt = q.step(*forward, xp.asarray(q.noise(x.shape, rng)))
                total += q.log_density(x, *self.reverse(xt, t)) - q.log_density(xt, *forward)
                x = xt
            log_w[i:i + batch] = to_host(total + q.log_pi(x))
        return log_w.reshape(len(x0), trajectories)

    def log_likelihood(self, x0, trajectories, rng):
        """The estimate of log p(x_0), nats (n,): log mean w over the trajectories of each x0. In the mean it is below log p(x_0), K for
        one trajectory, and rises to it with their number."""
        return logsumexp(self.log_weights(x0, trajectories, rng), axis=1) - math.log(trajectories)

    def focused(self, focus):
        """w (T - 1,) for gradient(): w_t = 1 + focus exp(-(logsnr_t - 1)^2 / 8), logsnr_t = logit(1 - alpha_bar_t), t = 2..T:
        most of it where noise is about as strong as the signal, and it is decided what the data will be (as in Karras et al. 2022)."""
        logsnr = logit(1 - to_host(self.diffusion.alpha_bar)[2:])
        return 1 + focus * np.exp(-(logsnr - 1) ** 2 / 8)

    def gradient(self, x0, *key, w=None):
        """The gradient of -K / D in all weights, estimated from x0 (n, D) with one t for each example, stratified over 2..T,
        in proportion to w_t (T - 1,) if given: then it is that of w_t / mean(w) KL_t / D, summed over t = 2..T.

        Leaves it in kernel.grad of self.kernels, to be added up (Adam.update does), and returns t (n,) and KL_t / share_t (n,) in
        nats, whose mean estimates the sum of the KLs. `key`: the integers that seed its draws, such as seed and step.

        A learned schedule ascends K with frozen noise: with eps held, K depends on it through x_t (and so needs the network's
        input gradient), through the network's own use of it, through q(x_{t-1} | x_t, x_0) and p, and through H_q(X_T|X_0):

            dx_t / dphi_t = v*      dv* / dphi_t = -x_t      dKL / dv* = -dv      dH_q(X_T|X_0) / dlogsnr_T = D/2 alpha_bar_T
        """
        xp, q, (n, D) = self.xp, self.diffusion, x0.shape
        if self.learned:
            q.set(self.learned.forward(self.kernel.W["schedule.psi"]))
        w = np.ones(self.T - 1) if w is None else w
        t = stratified(n, w, generator(np, "times", *key).random())
        share, t = xp.asarray(w[t - 2] / w.sum()), xp.asarray(t)
        parts, weight = xp.empty(n), (self.T - 1) / (n * D)

        def work(kernel, rows, thread):
            x, t_x = x0[rows], t[rows]
            xt = q.diffuse(x, t_x, q.noise(x.shape, generator(xp, "noise", *key, thread), kernel.dtype))
            kl, dphi, ds = xp.empty(len(x)), xp.empty(len(x)), xp.empty(len(x))

            def loss(s, out):
                kl[s], dout = q.kl(x[s], xt[s], t_x[s], out)
                dout *= weight
                if self.learned:
                    ds[s] = weight * q.ds(x[s], xt[s], t_x[s], out)
                    dphi[s] = (dout[..., 0] * xt[s]).sum(1)
                return dout

            inputs = kernel.gradient(xt.astype(kernel.dtype), t_x, loss, inputs=self.learned is not None)
            if self.learned:
                dx, dphi_features = inputs
                signal, deviation = q.signal_and_noise(t_x)
                dphi += dphi_features + (dx * (signal * xt - x) / deviation).sum(1)
                dlogsnr = q.dlogsnr(t_x, dphi, ds)
                if thread == 0:
                    dlogsnr[-1] -= 0.5 * q.alpha_bar[-1]
                kernel.dW["schedule.psi"][...] = self.learned.backward(dlogsnr)
            parts[rows] = kl

        self._deal(work, n)
        for idle in self.kernels[n:]:
            idle.grad[...] = 0
        return t, parts / share

    def sample(self, number, seed=0, r=None, how="constant", particles=1, batch=64, keep=(), progress=lambda steps: steps):
        """Samples (number, D) from p(x_0), or from p(x_0) r(x_0) for an r as Posterior takes it, an Observation's y (number, D) or (D,).

        x_T ~ pi, then x_{t-1} ~ p(x_{t-1} | x_t) for t = T..2 and the fixed first step (eqs. 4, 5 and 44): true draws, not means. r
        multiplies or moves every one of these distributions by r_t, see Posterior; one particle drops what each product integrates to,
        as the paper does. More of them for every sample carry it as a weight, are drawn anew by their weights where the effective number
        falls below N / 2 (systematic resampling), and the sample is one of them: exact in the limit of many, see Posterior, each at the cost of a sample.

        Sample k has its own noise, from (seed, k), on every device and in every batch of `batch` chains: it is the same to within
        rounding, which a predicted r magnifies where its gradient is steep. keep: times whose x_t are wanted too; then the result is
        (samples, {t: x_t}), of the particles that led to them.
        """
        xp, q, D, N = self.xp, self.diffusion, self.kernel.D, particles
        posterior = None if r is None else Posterior(q, r, how)
        if posterior:
            posterior.check(number, D)
        if N < 1 or N > 1 and not posterior:
            raise InputError(f"particles weigh an r: {N} of them need one" if N > 1 else f"there must be 1 particle or more, not {N}")
        batch = max(1, batch // N)
        parts, kept = [], {t: [] for t in keep}
        steps = iter(progress(range(self.T * -(-number // batch))))
        for start in range(0, number, batch):
            rngs = [generator(np, "sample", seed, k) for k in range(start, min(start + batch, number))]
            part = posterior and posterior.rows(slice(start, start + batch), N)
            log_w, past = np.zeros((len(rngs), N)), {}

            def draw(p, t, g=None):
                noise = xp.asarray(np.concatenate([q.noise((N, D), rng) for rng in rngs]))
                return part.draw(p, t, noise, g) if part else (q.step(*p, noise), 0.0)

            def look(x, t):  # p(x_{t-1} | x_t = x), log r_t(x), and its gradient if it is that which moves p
                if part and how == "predicted" and t > 0:
                    return self.predicted(x, t, part)
                return self.reverse(x, t) if t > 0 else None, part.log_r(x, t) if N > 1 else 0.0, None

            pi = tuple(xp.full((len(rngs) * N, D), parameter) for parameter in q.pi)
            x, log_p = draw(pi, self.T, 0.0 if how == "predicted" else None)  # 0: nothing is predicted yet, and x_T is left as it comes
            for t in range(self.T, -1, -1):
                if t in kept:
                    past[t] = x
                p, log_r, g = look(x, t)
                if N > 1:
                    log_w += to_host(log_p + log_r).reshape(log_w.shape)
                    w, u = softmax(log_w, axis=1), np.array([[rng.random()] for rng in rngs])
                    low = 1 / (w ** 2).sum(1) < N / 2
                    if t == 0 or low.any():
                        chosen = pick(w, u) if t == 0 else np.where(low[:, None], pick(w, (np.arange(N) + u) / N), np.arange(N))
                        log_w[low] = 0
                        rows = xp.asarray((chosen + N * np.arange(len(rngs))[:, None]).ravel())
                        x, past = x[rows], {s: xs[rows] for s, xs in past.items()}
                        p, log_r, g = [a[rows] for a in p or ()], log_r[rows], g if g is None else g[rows]
                if t > 0:
                    next(steps)
                    x, log_p = draw(p, t - 1, g)
                    log_p = log_p - log_r
            parts.append(x)
            for s, xs in past.items():
                kept[s].append(xs)
        next(steps, None)  # lets a progress bar close
        samples = xp.concatenate(parts)
        return (samples, {t: xp.concatenate(xs) for t, xs in kept.items()}) if keep else samples

    def save(self, path, adam=None, half=False):
        """The model, and the state of its training if adam is given, as an .npz without pickles; half: weights in half precision, to be shipped."""
        config = dict(diffusion=dict(kind=type(self.diffusion).__name__, **self.diffusion.config), kernel=self.kernel.config, threads=self.threads, **self.about)
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
            diffusion_config = config.pop("diffusion")
            diffusion = {"Gaussian": Gaussian, "Binomial": Binomial}[diffusion_config.pop("kind")](content["alpha_bar"], xp, **diffusion_config)
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
