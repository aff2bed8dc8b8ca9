"""The truths that dpm.py, data and the scripts are held to: closed forms, enumerations, difference quotients, and real runs.

    python -m pytest -q
"""
import dpm  # first: it keeps BLAS to one thread, before numpy starts it

import gzip
import json
import math
import os
import pathlib
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from scipy.signal import correlate2d

import data
import train

HERE = pathlib.Path(__file__).parent
LN2 = math.log(2)


def rng(*seed):
    return np.random.default_rng(seed)


def small_model(shape=(1, 1, 3), T=12, stir=0.3, threads=2, dtype="float64", **options):
    """A model with random weights everywhere, the readout included, unless stir is 0."""
    options = {"maps": 0, "upper": 16, "scales": (0, 2)} | options if shape[:2] == (1, 1) else \
        {"maps": 2, "width": 8, "layers": 2, "middle": 5, "middle_layers": 3, "upper": 6, "edges": (-1.0, 0.3), "patch": 3, "scales": (1,)} | options
    q = dpm.Gaussian(dpm.schedule("logsnr", T, 1e-3))
    kernel = dpm.Kernel(q, shape, dtype=dtype, **options)
    kernel.theta += stir * rng(7).standard_normal(kernel.theta.shape)
    return dpm.DPM(q, kernel, shift=0.5, scale=2.0, about=dict(dataset="x"), threads=threads)


class Signs:
    """In place of a random generator: noise whose first two moments over the examples are exactly those of N(0, 1)."""

    def __init__(self, signs):
        self.signs = signs

    def random(self):
        return 0.5

    def permuted(self, t, axis):
        return t

    def standard_normal(self, shape, dtype=float):
        assert shape == self.signs.shape
        return self.signs.astype(dtype)


# ---------------------------------------------------------------------------------------------------------------------------
# Room 1: schedules and the diffusion
# ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [2, 10, 40, 1000])
@pytest.mark.parametrize("kind", ["logsnr", "paper", "linear", "cosine"])
def test_schedule(kind, T):
    alpha_bar = dpm.schedule(kind, T, 1e-4)
    assert alpha_bar.shape == (T + 1,) and alpha_bar[0] == 1 and np.isclose(alpha_bar[1], 1 - 1e-4, rtol=1e-12)
    assert (np.diff(alpha_bar) < 0).all() and (alpha_bar >= 0).all()
    t = np.arange(2, T + 1)
    if kind == "paper":  # 1 - 1 / (T - s + 1) = (T - s) / (T - s + 1) telescopes
        np.testing.assert_allclose(alpha_bar[2:], (1 - 1e-4) * (T - t) / (T - 1), rtol=1e-12, atol=1e-16)
    elif kind == "logsnr":
        logit = np.log((1 - alpha_bar[1:]) / alpha_bar[1:])
        np.testing.assert_allclose(np.diff(logit, 2), 0, atol=1e-8)
        assert np.isclose(logit[-1], 10)
    elif kind == "cosine":
        np.testing.assert_allclose(np.arccos(alpha_bar[1:] / (1 - 1e-4)), 0.99 * np.pi / 2 * (np.arange(1, T + 1) - 1) / (T - 1), atol=1e-9)
    else:
        beta = 1 - alpha_bar[2:] / alpha_bar[1:-1]
        assert beta[-1] == pytest.approx(min(20 / T, 0.999))
        assert alpha_bar[-1] < 1e-3 or T == 2


@pytest.mark.parametrize("kind", ["logsnr", "paper", "linear"])
def test_closed_form_is_the_iterated_kernel(kind):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, t times, has the mean and the variance of q(x_t | x_0)."""
    q, x0 = dpm.Gaussian(dpm.schedule(kind, 20, 1e-3)), np.array([[1.7]])
    mean, variance = 1.7, 0.0
    for t in range(1, 21):
        mean, variance = mean * math.sqrt(1 - q.beta[t]), variance * (1 - q.beta[t]) + q.beta[t]
        at = np.array([t])
        assert q.diffuse(x0, at, np.zeros((1, 1))) == pytest.approx(mean, abs=1e-12)
        assert q.diffuse(np.zeros((1, 1)), at, np.ones((1, 1))) ** 2 == pytest.approx(variance, rel=1e-10)


def test_posterior_two_ways():
    """q(x_{t-1} | x_t, x_0) by its formula, and by Bayes from q(x_{t-1} | x_0) q(x_t | x_{t-1}): precisions add."""
    q = dpm.Gaussian(dpm.schedule("logsnr", 15, 1e-2))
    t = np.arange(2, 16)
    x0, xt = rng(1).standard_normal((2, 14, 3))
    mu, beta_tilde = q.posterior(x0, xt, t)
    prior, a = 1 - q.alpha_bar[t - 1][:, None], np.sqrt(1 - q.beta[t])[:, None]
    beta = q.beta[t][:, None]
    precision = 1 / prior + a ** 2 / beta
    np.testing.assert_allclose(beta_tilde, 1 / precision, rtol=1e-9)
    np.testing.assert_allclose(mu, (np.sqrt(1 - prior) * x0 / prior + a * xt / beta) / precision, rtol=1e-9)


def test_reverse_parameterisation():
    """The v and w that its docstring names give mu~, beta_t and beta~_t."""
    q = dpm.Gaussian(dpm.schedule("logsnr", 15, 1e-2))
    t = np.arange(2, 16)
    x0, eps = rng(2).standard_normal((2, 14, 3))
    xt, alpha_bar = q.diffuse(x0, t, eps), q.alpha_bar[t][:, None]
    v = np.sqrt(alpha_bar) * eps - np.sqrt(1 - alpha_bar) * x0
    f_mu, f_sigma = q.reverse(xt, t, np.stack([v, -np.ones_like(v)], 2))
    mu, beta_tilde = q.posterior(x0, xt, t)
    np.testing.assert_allclose(f_mu, mu, rtol=1e-9)
    np.testing.assert_allclose(f_sigma, np.broadcast_to(beta_tilde, v.shape), rtol=1e-9)
    f_mu, f_sigma = q.reverse(xt, t, np.zeros((14, 3, 2)))
    np.testing.assert_allclose(f_mu, np.sqrt(1 - q.beta[t])[:, None] * xt, rtol=1e-12)
    np.testing.assert_allclose(f_sigma, np.broadcast_to(q.beta[t][:, None], v.shape), rtol=1e-9)


def test_kl_is_the_integral_and_dout_its_derivative():
    q, t = dpm.Gaussian(dpm.schedule("logsnr", 9, 1e-2)), np.array([2, 4, 6])
    x0, xt = rng(3).standard_normal((2, 3, 1))
    out = rng(4).standard_normal((3, 1, 2))
    kl, dout = q.kl(x0, xt, t, out)
    mu, variance = q.posterior(x0, xt, t)
    f_mu, f_sigma = q.reverse(xt, t, out)
    for i in range(3):
        x = mu[i] + 3 * np.sqrt(variance[i]) * np.linspace(-12, 12, 60001)
        log_q = -0.5 * ((x - mu[i]) ** 2 / variance[i] + np.log(2 * np.pi * variance[i]))
        log_p = -0.5 * ((x - f_mu[i]) ** 2 / f_sigma[i] + np.log(2 * np.pi * f_sigma[i]))
        assert -np.trapezoid(np.exp(log_p) * log_p, x) == pytest.approx(q.entropy(f_mu, f_sigma)[i], rel=1e-6)
        assert q.log_density(x[:, None], f_mu[i], f_sigma[i]) == pytest.approx(log_p)
        assert np.trapezoid(np.exp(log_q) * (log_q - log_p), x) == pytest.approx(kl[i], rel=1e-8)
    for direction in np.eye(6).reshape(6, 3, 1, 2):
        difference = q.kl(x0, xt, t, out + 1e-5 * direction)[0] - q.kl(x0, xt, t, out - 1e-5 * direction)[0]
        np.testing.assert_allclose(difference / 2e-5, (dout * direction).sum((1, 2)), rtol=1e-6)


def test_entropies():
    q = dpm.Gaussian(dpm.schedule("logsnr", 9, 1e-2))
    x = 30 * np.linspace(-1, 1, 200001)
    for variance, H in [(1 - q.alpha_bar[3], q.H_q(3, np.zeros((1, 1)))[0]), (q.beta[3], q.H_step(3, np.zeros((1, 1)))[0]), (1.0, q.H_pi)]:
        p = np.exp(-0.5 * x ** 2 / variance) / np.sqrt(2 * np.pi * variance)
        assert -np.trapezoid(p * np.log(p + 1e-300), x) == pytest.approx(H, rel=1e-6)
    assert q.H_q(3, np.zeros((2, 5))) == pytest.approx(5 * q.H_q(3, np.zeros((1, 1)))[0])
    assert np.trapezoid(np.exp(q.log_pi(x[:, None])), x) == pytest.approx(1)


def test_the_first_step():
    """Eq. 44: T_pi(x_0 | x_1; beta_1), the forward kernel run backwards."""
    f_mu, f_sigma = dpm.Gaussian(dpm.schedule("logsnr", 5, 0.3)).kernel(np.array([[2.0, -1.0]]), np.array([1]))
    np.testing.assert_allclose(f_mu, [[2 * math.sqrt(0.7), -math.sqrt(0.7)]])
    assert f_sigma == pytest.approx(0.3)


def test_multiply_is_the_product_of_densities():
    q = dpm.Gaussian(dpm.schedule("logsnr", 9, 1e-2))
    x = np.linspace(-15, 15, 300001)
    excess = []
    for f_mu, f_sigma, y, variance in [(0.3, 0.5, 1.7, 0.64), (-1.0, 2.0, 0.4, 0.64), (0.5, 0.3, 1.0, 0.01)]:
        observed = np.array([[y]]), np.array([[variance]])
        log_r = q.log_observed(x[:, None], *observed)
        np.testing.assert_allclose(log_r, -0.5 * (x - y) ** 2 / variance)
        product = np.exp(-0.5 * (x - f_mu) ** 2 / f_sigma + log_r) / math.sqrt(2 * math.pi * f_sigma)
        Z = np.trapezoid(product, x)
        (mean, total), log_Z = q.multiply(np.array([[f_mu]]), np.array([[f_sigma]]), *observed)
        assert mean[0, 0] == pytest.approx(np.trapezoid(product * x, x) / Z, rel=1e-8)
        assert total[0, 0] == pytest.approx(np.trapezoid(product * (x - mean[0]) ** 2, x) / Z, rel=1e-8)
        excess.append(log_Z[0] - math.log(Z) + 0.5 * math.log(variance))
    np.testing.assert_allclose(excess, 0, atol=1e-8)  # Z, but for the constant that belongs to r
    (mean, variance), log_Z = q.multiply(np.full((1, 3), 0.3), 0.5, np.array([1.0, 2.0, 0.0]), np.array([0, 1e-18, np.inf]))
    np.testing.assert_allclose(mean, [[1, 2, 0.3]], rtol=1e-12)  # known; nearly known; unknown
    np.testing.assert_allclose(variance, [0, 0, 0.5], atol=1e-12)
    assert log_Z == pytest.approx(sum(-0.5 * (y - 0.3) ** 2 / 0.5 - 0.5 * math.log(0.5) for y in (1, 2)))  # N(y; f_mu, f_sigma)


@pytest.mark.parametrize("how", ["constant", "annealed", "diffused"])
def test_r_along_the_trajectory(how):
    """r_0 = r; constant: the same at every t; annealed: its power (T - t) / T; diffused: E[r(x_0) | x_t] where x_0 ~ pi. For both
    diffusions, an Observation and the same r as a Function, and the delta."""
    T, y, sigma = 9, 0.7, 0.8
    log_r = lambda x: -0.5 * (x - y) ** 2 / sigma ** 2
    x = np.linspace(-2, 2, 7)[:, None]
    level = lambda values: np.asarray(values) - values[0]  # but for a constant
    gaussian, binomial = dpm.Gaussian(dpm.schedule("logsnr", T, 1e-2)), dpm.Binomial(dpm.schedule("cosine", T, 1e-2), rate=0.3)
    for t in (0, 1, 4, 9):
        for q, states, expected_r in [
                (gaussian, x, lambda s, a: np.log(np.trapezoid(np.exp(log_r(np.linspace(-9, 9, 20001)) - 0.5 * (np.linspace(-9, 9, 20001) - math.sqrt(a) * s) ** 2 / (1 - a)), dx=1e-3))),
                (binomial, np.array([[0.0], [1.0]]), lambda s, a: np.log((a * s + 0.3 * (1 - a)) * np.exp(log_r(1)) + (1 - a * s - 0.3 * (1 - a)) * np.exp(log_r(0))))]:
            found = dpm.Posterior(q, [dpm.Observation([y], [sigma])], how).log_r(states, t)
            if how == "diffused" and t:
                expected = [expected_r(float(s), float(q.alpha_bar[t])) for s in states[:, 0]]
            else:
                expected = log_r(states[:, 0]) * ({"annealed": (T - t) / T}.get(how, 1))
            np.testing.assert_allclose(level(found), level(expected), atol=1e-6)
            function = dpm.Posterior(q, dpm.Function(lambda x: log_r(x)[:, 0], lambda x: -(x - y) / sigma ** 2), how)
            seen = states if how != "diffused" else q.expected(states, t)[0]
            np.testing.assert_allclose(function.log_r(states, t), log_r(seen[:, 0]) * ({"annealed": (T - t) / T}.get(how, 1)), rtol=1e-12)
        function = dpm.Posterior(gaussian, dpm.Function(lambda x: log_r(x)[:, 0], lambda x: -(x - y) / sigma ** 2), how)
        moved, _ = function.draw((np.array([[0.4]]), np.array([[0.3]])), t, np.zeros((1, 1)))  # eq. 61: by f_sigma times the slope of log r_t
        slope = (function.log_r(np.array([[0.4 + 1e-5]]), t) - function.log_r(np.array([[0.4 - 1e-5]]), t)) / 2e-5
        assert moved[0, 0] == pytest.approx(0.4 + 0.3 * slope[0])
    both = dpm.Observation([0.7, 1.0], [np.inf, 0])
    y_t, variance = gaussian.observed(both, 4, how)
    a = float(gaussian.alpha_bar[4])
    assert variance[0] == np.inf and variance[1] == (pytest.approx((1 - a) / a) if how == "diffused" else 0)
    assert y_t[1] == (pytest.approx(1 / math.sqrt(a)) if how == "diffused" else 1)
    zero, one = binomial.observed(both, 0, how)
    assert (zero[1], one[1], zero[0], one[0]) == (-np.inf, 0, 0, 0)
    assert (gaussian.observed(both, 9, "annealed")[1] == np.inf).all() and not np.any(binomial.observed(both, 9, "annealed"))  # r^0


def test_tilt():
    """Eq. 61, and its bits: the tilted kernel is the product with exp(g x), and log_untilted its ratio to the kernel that it came from."""
    q, r = dpm.Gaussian(dpm.schedule("logsnr", 9, 1e-2)), rng(61)
    f_mu, g, x = r.standard_normal((3, 5, 4))
    f_sigma = r.random((5, 4)) + 0.1
    mean, variance = q.tilt(f_mu, f_sigma, g)
    np.testing.assert_allclose(mean - f_mu, f_sigma * g)  # f_sigma is a variance
    np.testing.assert_allclose(q.log_untilted(x, f_mu, f_sigma, g), q.log_density(x, f_mu, f_sigma) - q.log_density(x, mean, variance))
    q, f, x = dpm.Binomial(dpm.schedule("cosine", 9, 1e-2)), r.random((5, 4)), (r.random((5, 4)) < 0.5) * 1.0
    tilted, = q.tilt(f, g)
    np.testing.assert_allclose(tilted / (1 - tilted), f / (1 - f) * np.exp(g))
    np.testing.assert_allclose(q.log_untilted(x, f, g), q.log_density(x, f) - q.log_density(x, tilted))
    (product,), log_Z = q.multiply(f, np.zeros((5, 4)), g)
    np.testing.assert_allclose(product, tilted)
    np.testing.assert_allclose(log_Z, np.log(f * np.exp(g) + 1 - f).sum(1))


def follows(model, x, posterior, log_r):
    """DPM.predicted: reverse's distribution, this log_r(x, t), its slope along any line by difference quotients, and no touch to the weights' gradients."""
    for kernel in model.kernels:
        kernel.grad[...] = 7
        kernel.slice = 2  # of the three examples that each has
    for t in (1, 2, 6, 12):
        p, found, g = model.predicted(x, t, posterior)
        for a, b in zip(p, model.reverse(x, t)):
            np.testing.assert_allclose(a, b, rtol=1e-12)
        np.testing.assert_allclose(found, log_r(x, t), rtol=1e-9)
        assert (g is None) == (t == 1)
        for direction in rng(68).standard_normal((3, *x.shape)) if t > 1 else ():
            slope = (log_r(x + 1e-5 * direction, t) - log_r(x - 1e-5 * direction, t)) / 2e-5
            np.testing.assert_allclose((g * direction).sum(1), slope, rtol=1e-5, atol=1e-5 * np.abs(slope).max())
    assert all((kernel.grad == 7).all() for kernel in model.kernels)


CURVE = dpm.Function(lambda x: np.sin(x) @ np.arange(x.shape[1]), lambda x: np.cos(x) * np.arange(x.shape[1]))


@pytest.mark.parametrize("shape, form", [((1, 1, 3), {}), ((5, 6, 2), dict(sights=2)), ((5, 6, 2), dict(sights=2, paper=True, bumps=3))])
def test_r_of_what_a_gaussian_kernel_predicts(shape, form):
    """log r_t(x_t) = log int N(x_0; cos phi x_t - sin phi v, sin^2 phi) r(x_0) dx_0 for an Observation, log r at the mean for a Function."""
    model = small_model(shape, stir=0.2, **form)
    q, D = model.diffusion, model.kernel.D
    x, y, sigma = rng(69).standard_normal((5, D)), rng(70).standard_normal((5, D)), np.array([0.0, 0.4, np.inf])[np.arange(D) % 3]

    def log_r(x, t):
        a, v = float(q.alpha_bar[t]), model.forward(x, t)[..., 0] if t > 1 else 0.0
        mean, variance = math.sqrt(a) * x - math.sqrt(1 - a) * v, sigma ** 2 + 1 - a
        integral = np.where(sigma < np.inf, -0.5 * (mean - y) ** 2 / variance - 0.5 * np.log(np.minimum(variance, 9)), 0).sum(1)
        return integral + np.sin(mean) @ np.arange(D)

    follows(model, x, dpm.Posterior(q, [dpm.Observation(y, sigma), CURVE], "predicted"), log_r)


def test_a_known_bit_against_all_belief():
    """A kernel that is certain of a bit (its odds beyond what 1 - m can hold) gives way to what is known, and the other bits stay what they are."""
    model = bits(rate=0.4)[0]
    model.kernel.out[...] = np.array([60.0, 0, 0])[:, None]
    x = model.sample(2000, r=dpm.Observation([0.0, 0, 0], [0, np.inf, np.inf]), how="predicted", particles=4, batch=8192)
    assert (x[:, 0] == 0).all()
    np.testing.assert_allclose(x[:, 1:].mean(0), 0.4, atol=0.05)


@pytest.mark.parametrize("shape", [(1, 1, 4), (5, 6, 1)])
def test_r_of_what_a_binomial_kernel_predicts(shape):
    """log r_t(x_t) = log [ m r(1) + (1 - m) r(0) ], the odds of m those of Bayes from x_t alone times e^out. Between the bits: its
    slope is that of the network, and of log odds that are linear in x_t."""
    q, D = dpm.Binomial(dpm.schedule("cosine", 12, 1e-3), rate=0.3), math.prod(shape)
    kernel = dpm.Kernel(q, shape, upper=6, scales=(), dtype="float64", **(dict(maps=0) if shape[0] == 1 else dict(maps=2, width=8, layers=2, middle=5, sights=2, patch=3)))
    kernel.theta += 0.2 * rng(7).standard_normal(kernel.theta.shape)
    model = dpm.DPM(q, kernel, threads=2)
    (x, y), sigma = np.round(rng(71).random((2, 5, D))), np.array([0.0, 0.6, np.inf])[np.arange(D) % 3]
    with np.errstate(divide="ignore", invalid="ignore"):
        r = [np.where(sigma == 0, y == bit, np.exp(-0.5 * (bit - y) ** 2 / sigma ** 2)) for bit in (0, 1)]

    def log_r(x, t):
        a = float(q.alpha_bar[t])
        one = [0.3 * (1 - a), 0.3 * (1 - a) + a]  # the probability that x_t is, for x_0 = 0 and 1
        prior = np.log(0.3 / 0.7) + x * np.log(one[1] / one[0]) + (1 - x) * np.log((1 - one[1]) / (1 - one[0]))
        m = 1 / (1 + np.exp(-prior - (model.forward(x, t)[..., 0] if t > 1 else 0)))
        return np.log(m * r[1] + (1 - m) * r[0]).sum(1) + np.sin(m) @ np.arange(D)

    follows(model, x, dpm.Posterior(q, [dpm.Observation(y, sigma), CURVE], "predicted"), log_r)


def test_pick_is_systematic():
    """The points (i + u) / N choose each particle floor or ceil of N w times, and N w times in the mean."""
    w = rng(62).dirichlet(np.ones(8), 3)
    counts = np.mean([[np.bincount(c, minlength=8) for c in dpm.pick(w, np.full((3, 1), u) / 8 + np.arange(8) / 8)] for u in (np.arange(999) + 0.5) / 999], 0)
    np.testing.assert_allclose(counts, 8 * w, atol=0.01)
    once = np.array([np.bincount(c, minlength=8) for c in dpm.pick(w, np.full((3, 1), 0.3) / 8 + np.arange(8) / 8)])
    assert (np.abs(once - 8 * w) < 1).all() and (once.sum(1) == 8).all()


# ---------------------------------------------------------------------------------------------------------------------------
# Room 2: every backward against difference quotients, float64
# ---------------------------------------------------------------------------------------------------------------------------

def quotient(f, a, direction, h=1e-6):
    """(f(a + h d) - f(a - h d)) / 2h, by changing `a` in place."""
    saved = a.copy()
    values = []
    for sign in (1, -1):
        a += sign * h * direction
        values.append(f())
        a[...] = saved
    return (values[0] - values[1]) / (2 * h)


NETWORKS = [("upper", 1), ("upper", 5), ("lower", 1), ("middle", 6)]  # the middle one's six rows are 3 x 2 cells


def network(name, rows):
    """One of the three networks of a kernel for 10 x 6 pixels of two colours, four examples for it, and its number of outputs."""
    kernel, r = small_model((10, 6, 2), maps=3, sights=2).kernel, rng(11)
    inputs, outputs = len(kernel.W[f"{name}.W1"]), kernel.W[f"{name}.W"].shape[1]
    return kernel, getattr(kernel, name), r.standard_normal((4 * rows, inputs)), r.standard_normal((4, 64)), outputs


@pytest.mark.parametrize("name, rows", NETWORKS)
def test_mlp_is_what_the_docstring_says(name, rows):
    """Layer by layer; the convolution by SciPy's correlation, one image and one pair of channels at a time."""
    kernel, mlp, x, e, _ = network(name, rows)
    W, h = {key.split(".")[1]: w for key, w in kernel.W.items() if key.startswith(name)}, x
    for l in range(1, mlp.layers + 1):
        if name == "middle" and l > 1:
            cells, filters = h.reshape(4, 3, 2, -1), W[f"W{l}"].reshape(3, 3, 5, 5)
            z = np.stack([[sum(correlate2d(image[..., i], filters[..., i, j], mode="same") for i in range(5)) for j in range(5)]
                          for image in cells]).transpose(0, 2, 3, 1).reshape(24, 5)
        else:
            z = h @ W[f"W{l}"]
        z = z + np.repeat(e @ W[f"V{l}"] + W[f"b{l}"], rows, axis=0)
        s = z / (1 + abs(z)) if name == "upper" else (z + np.sqrt(z ** 2 + 1) - 1) / 2
        h = s if l == 1 else h + s
    np.testing.assert_allclose(mlp.forward(x, e), h @ W["W"] + W["b"], rtol=1e-9)


@pytest.mark.parametrize("name, rows", NETWORKS)
def test_mlp_backward(name, rows):
    """Every weight, the time and the input of an MLP, along random directions, from a random cotangent."""
    kernel, mlp, x, e, outputs = network(name, rows)
    r = rng(12)
    dy = r.standard_normal((4 * rows, outputs))
    loss = lambda: float((mlp.forward(x, e) * dy).sum())
    for add in (False, True):  # added to itself, every gradient doubles
        loss()
        de, dx = mlp.backward(dy, add=add, columns=slice(None))
    for weight in [n for n in kernel.W if n.startswith(name)]:
        d = r.standard_normal(kernel.W[weight].shape)
        assert (kernel.dW[weight] * d).sum() == pytest.approx(2 * quotient(loss, kernel.W[weight], d), rel=1e-6), weight
    for a, da in [(x, dx.T), (e, de)]:
        d = r.standard_normal(a.shape)
        assert (da * d).sum() == pytest.approx(quotient(loss, a, d), rel=1e-6)


@pytest.mark.parametrize("shape, options", [((1, 1, 3), dict(upper_layers=3)), ((4, 5, 2), {}), ((5, 7, 2), dict(maps=3, sights=2, patch=1)), ((4, 4, 1), dict(maps=0, sights=3)),
                                            ((4, 4, 1), dict(sights=2, paper=True, bumps=3, time=0)), ((1, 1, 3), dict(paper=True))])
def test_gradient_of_K_in_every_weight(shape, options):
    model = small_model(shape, stir=0.2, **options)
    model.kernel.slice = model.kernels[1].slice = 3  # several slices, the last one short
    x0 = rng(5).standard_normal((23, model.kernel.D))
    loss = lambda: float(model.gradient(x0, 3, 4)[1].mean()) / model.kernel.D
    loss()
    grad = sum(k.grad for k in model.kernels)
    for name, dW in model.kernel._views(grad).items():
        d = rng(6).standard_normal(dW.shape)
        d = d / np.linalg.norm(d) + dW / np.linalg.norm(dW)  # not a direction that is all but level
        assert (dW * d).sum() == pytest.approx(quotient(loss, model.kernel.W[name], d), rel=1e-6), name


def test_gradient_with_weights_is_that_of_weighted_KLs():
    model = small_model(T=12, stir=0.2)
    w, x0 = np.linspace(1, 4, 11), rng(5).standard_normal((23, 3))

    def loss():
        t, kl = model.gradient(x0, 3, 4, w=w)  # kl is KL_t / share_t, and share_t (T - 1) = w_t / mean(w)
        return float((kl * w[t - 2]).mean() / w.mean()) / 3

    loss()
    grad, theta = sum(k.grad for k in model.kernels), model.kernel.theta
    d = rng(6).standard_normal(theta.shape) + grad / np.linalg.norm(grad) * math.sqrt(theta.size)
    assert (grad * d).sum() == pytest.approx(quotient(loss, theta, d), rel=1e-6)


def test_focus_is_where_noise_is_about_as_strong_as_signal():
    model = small_model(T=100)
    assert (model.focused(0) == 1).all()
    w, alpha_bar = model.focused(10), model.diffusion.alpha_bar[2:]
    most = w.argmax()
    assert w[most] == pytest.approx(11, rel=1e-2) and (1 - alpha_bar[most]) / alpha_bar[most] == pytest.approx(math.e, rel=0.15)
    below = np.abs(np.log(1 - alpha_bar) - np.log(alpha_bar) + 1).argmin()  # a standard deviation below the middle
    assert w[below] == pytest.approx(1 + 10 * math.exp(-0.5), rel=0.05)
    assert w[0] == pytest.approx(1, rel=1e-2) and w[-1] < 2
    model.diffusion.set(np.array([1, 0.5, 0.2, 0.0]))  # as some schedules end
    assert model.focused(10)[-1] == 1


def test_features_are_what_the_docstring_says():
    """Row by row, with colours: the patch around a pixel, sines and cosines, distances from the edges in units of the noise."""
    model = small_model((5, 4, 2), scales=(0, 2))
    kernel, x, t, maps = model.kernel, rng(8).standard_normal((3, 40)), np.array([2, 5, 11]), rng(9).standard_normal((3, 40))
    u = kernel._features(x, t, None, maps).reshape(3, 5, 4, -1)
    image, alpha_bar = x.reshape(3, 5, 4, 2), model.diffusion.alpha_bar[t][:, None, None]
    around = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    expected = [around[:, dy:dy + 5, dx:dx + 4, c] for c in range(2) for dy in range(3) for dx in range(3)]
    for c in range(2):
        for k in (0, 2):
            expected += [np.sin(2 ** k * np.pi * image[..., c]), np.cos(2 ** k * np.pi * image[..., c])]
        for edge in (-1.0, 0.3):
            z = (image[..., c] - np.sqrt(alpha_bar) * edge) / np.sqrt(1 - alpha_bar)
            expected += [z / s / (1 + np.abs(z / s)) for s in (1, 4)]
    expected += [maps.reshape(3, 2, 5, 4)[:, m] for m in range(2)]
    np.testing.assert_allclose(u, np.stack(expected, 3), rtol=1e-9)


def test_kernel_sees_time_place_and_neighbours():
    """Without a lower network a value of x moves the outputs of its square of neighbours, its own channel's and the other's, no more."""
    model = small_model((7, 7, 2), maps=0)
    x = rng(8).standard_normal((1, 98))
    out = model.forward(x, 5)
    x[0, 2 * 24] += 1  # the first channel of the pixel in the middle
    changed = (model.forward(x, 5) != out).all(2).reshape(7, 7, 2)
    assert changed[2:5, 2:5].all() and changed.sum() == 18
    assert (model.forward(x, 6) != model.forward(x, 5)).all()


def test_cells_are_squares_of_4_by_4_pixels():
    """Of an image whose sides are no multiples of 4, too: what is beyond the border is 0, and the way back is exact."""
    kernel, image = small_model((5, 7, 2), sights=2).kernel, rng(8).standard_normal((3, 5, 7, 2))
    cells = kernel._cells(image)
    beyond = np.pad(image, ((0, 0), (0, 3), (0, 1), (0, 0)))
    assert (cells == np.concatenate([beyond[n, y:y + 4, x:x + 4].reshape(1, 32) for n in range(3) for y in (0, 4) for x in (0, 4)])).all()
    assert (kernel._image(cells) == image).all()


def test_middle_network_sees_the_cells_around():
    """With three layers, two of them convolutions, a value moves the 5 x 5 cells around its own; what is moved in the image by a
    cell is moved in the output."""
    model = small_model((40, 40, 1), maps=0, sights=3)
    x = np.zeros((1, 40, 40))
    out = model.forward(x.reshape(1, -1), 5)
    x[0, 20, 13] = 1
    changed = (model.forward(x.reshape(1, -1), 5) != out).any(2).reshape(40, 40)
    assert changed[12:32, 4:24].all() and changed.sum() == 20 * 20
    x[0, 16:24, 16:24] = rng(8).standard_normal((8, 8))
    out = model.forward(x.reshape(1, -1), 5).reshape(40, 40, 2)
    moved = model.forward(np.roll(x, (4, -4), (1, 2)).reshape(1, -1), 5).reshape(40, 40, 2)
    np.testing.assert_allclose(moved[12:32, 8:28], np.roll(out, (4, -4), (0, 1))[12:32, 8:28], rtol=1e-9)  # two cells from the border


def test_adam_on_a_constant_gradient():
    """m^ = g and v^ = g^2 from the first step on, so every step is rate * sign(g); the average is what its decay says."""
    theta = np.zeros(3)
    adam = dpm.Adam(theta, lr=0.1, steps=10 ** 9, warmup=4)
    average = np.zeros(3)
    expected = 0.0
    for step in range(1, 8):
        expected -= 0.1 * min(1, step / 4)
        adam.update([np.array([0.25, -0.125, 0.0]), np.array([0.25, -0.125, 0.0])])  # the sum of two threads
        np.testing.assert_allclose(theta, [expected, -expected, 0], rtol=1e-6)
        average += 1 / (10 + step / 10) * (theta - average)
        np.testing.assert_allclose(adam.average, average, rtol=1e-9)
    adam = dpm.Adam(theta, lr=0.1, steps=100, warmup=1)
    norm = adam.update([np.array([30.0, -40.0, 0.0])])
    assert norm == pytest.approx(50)
    np.testing.assert_allclose(adam.m, [0.06, -0.08, 0], rtol=1e-9)  # (1 - b1) times the gradient shortened to 1
    adam.step = 100
    assert adam.rate() == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------------
# Room 3: the bound
# ---------------------------------------------------------------------------------------------------------------------------

def test_adam_is_adam():
    """Against the published update, over several chunks, dealt out to two threads, with a gradient that changes."""
    size, r = 150_000, rng(31)
    theta = r.standard_normal(size)
    adam, m, v, expected = dpm.Adam(theta, lr=0.01, steps=10 ** 9, warmup=1), 0, 0, theta.copy()
    with ThreadPoolExecutor(2) as pool:
        for step in range(1, 4):
            parts = r.standard_normal((2, size)) * step
            g = parts.sum(0)
            norm = adam.update(list(parts), pool)
            assert norm == pytest.approx(np.linalg.norm(g))
            g /= np.linalg.norm(g)
            m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g ** 2
            expected -= 0.01 * (m / (1 - 0.9 ** step)) / (np.sqrt(v / (1 - 0.99 ** step)) + 1e-8)
    np.testing.assert_allclose(theta, expected, rtol=1e-9)


@pytest.mark.parametrize("variance, K_star", [(1.0, -1.41893853), (0.3, -0.81969703), (4.0, -2.10499687)])
def test_K_star_of_gaussian_data(variance, K_star):
    """K* = -H_q(X_1) + H_q(X_T) - H_p(X_T) for exact kernels, by the function that evaluates trained models. Exact kernels
    are linear, every KL is a quadratic of (x_0, eps), so four points with the right second moments give its expectation."""
    q = dpm.Gaussian(np.concatenate([[1], np.cumprod(1 - np.linspace(1e-3, 0.2, 50))]))
    s = math.sqrt(variance)
    model = dpm.DPM(q, dpm.IdealKernel(q, data.Mixture([[0.0]], s).moments, 1))
    found = model.bound(np.array([[-s], [-s], [s], [s]]), Signs(np.array([[-1.0], [1.0], [-1.0], [1.0]])))
    H = lambda v: 0.5 * math.log(2 * math.pi * math.e * v)
    at = lambda t: q.alpha_bar[t] * variance + 1 - q.alpha_bar[t]
    assert found["K"] == pytest.approx(-H(at(1)) + H(at(50)) - H(1), rel=1e-10)
    assert found["K"] == pytest.approx(K_star, abs=1e-8)


@pytest.mark.parametrize("shape", [(1, 1, 2), (4, 4, 1)])
@pytest.mark.parametrize("kind", ["logsnr", "paper", "linear"])
def test_at_initialisation_K_is_L_null(kind, shape):
    """With a zero readout p is the equilibrium kernel, whose trajectories are reversible: K is exactly the log likelihood under pi."""
    q = dpm.Gaussian(dpm.schedule(kind, 25, 1e-3))
    model = dpm.DPM(q, dpm.Kernel(q, shape, width=8, layers=1, maps=shape[0] - 1, upper=8, dtype="float64"))
    x0 = rng(9).standard_normal((6, model.kernel.D))
    x0 = (x0 - x0.mean()) / x0.std()
    signs = np.sign(rng(10).standard_normal(x0.shape))
    found = model.bound(np.concatenate([x0, x0]), Signs(np.concatenate([signs, -signs])))
    assert found["K"] == pytest.approx(found["L_null"], rel=1e-10)
    assert found["K_minus_L_null"] == pytest.approx(0, abs=1e-9)


def test_parts_sum_to_K():
    """One KL for each of t = 2..T, the three entropies once each; K_each and K are the same numbers summed in two orders."""
    model = small_model(T=9)
    x0 = rng(12).standard_normal((40, 3))
    for steps in (None, 3):
        found = model.bound(x0, rng(13), steps, batch=7)
        assert found["K"] == pytest.approx(-found["kl"].sum() + found["H_q_T"] - found["H_q_1"] - found["H_p_T"], rel=1e-12)
        assert found["K"] == pytest.approx(found["K_each"].mean(), rel=1e-12)
        assert (found["kl"][:2] == 0).all() and (found["kl"][2:] > 0).all()
        assert found["H_p_T"] == pytest.approx(3 * 0.5 * math.log(2 * math.pi * math.e))
        assert found["H_q_1"] == pytest.approx(3 * 0.5 * math.log(2 * math.pi * math.e * 1e-3))


def test_stratified_is_even_and_never_leaves_2_to_T():
    for number, T in [(7, 40), (256, 1000), (1000, 3), (5, 2)]:
        for u in (0.0, 0.3, 1 - 2 ** -53):
            t = dpm.stratified(number, np.ones(T - 1), u)
            assert t.min() >= 2 and t.max() <= T
            if number >= T - 1:
                counts = np.bincount(t, minlength=T + 1)[2:]
                assert counts.max() - counts.min() <= (1 if u < 0.9 else 2)  # at u = 1 - 2^-53, i + u rounds to i + 1
    for w in np.ones(39), np.linspace(3, 1, 39):  # the last t as often as its w says
        many = np.concatenate([dpm.stratified(5, w, u) for u in rng(14).random(4000)])
        np.testing.assert_allclose(np.bincount(many, minlength=41)[2:] / len(many), w / w.sum(), rtol=0.2)


@pytest.mark.parametrize("w", [None, np.linspace(1, 4, 11)])
def test_stratified_estimate_agrees_with_the_sum_over_all_t(w):
    """gradient() and bound(steps=...) estimate the same sum, however t is drawn; closely enough to tell T - 1 terms from T."""
    model = small_model(T=12, stir=0.1)
    x0 = np.repeat(rng(15).standard_normal((1, 3)), 4000, 0)
    exact = [model.bound(x0, rng(16, i))["kl"].sum() for i in range(4)]
    estimates = [model.gradient(x0, 17, i, w=w)[1].mean() for i in range(16)]
    few = [model.bound(x0, rng(18, i), steps=2)["kl"].sum() for i in range(16)]
    se = lambda values: np.std(values, ddof=1) / math.sqrt(len(values))
    for estimate in (estimates, few):
        tolerance = 4 * math.hypot(se(estimate), se(exact))
        assert abs(np.mean(estimate) - np.mean(exact)) < tolerance < np.mean(exact) / 11 / 3


def test_bound_does_not_depend_on_the_order_of_the_examples():
    """No example may be tied to one part of the t: with small x0 first and large x0 last, either way round, K is the same."""
    model = small_model(T=40, stir=0.1)
    x0 = rng(32).standard_normal((2000, 3)) * np.linspace(0.1, 3, 2000)[:, None]
    up, down = (np.array([model.bound(x, rng(33, i), steps=2)["K"] for i in range(12)]) for x in (x0, x0[::-1]))
    assert abs(up.mean() - down.mean()) < 4 * math.hypot(up.std(), down.std()) / math.sqrt(12)
    each = model.bound(x0, rng(34))
    assert up.mean() == pytest.approx(each["K"], abs=4 * (up.std() / math.sqrt(12) + each["K_se"] / 4))


def test_swissroll_K_star_and_truth():
    """The table of known numbers: L = -1.08 bits; K* at T = 40 is -1.31 with logsnr, -1.93 with the paper's schedule."""
    roll = data.load("swissroll")
    x0 = roll.held_out(3000)
    truth = roll.truth.log_density(x0) / LN2
    assert truth.mean() == pytest.approx(-1.08, abs=4 * truth.std() / math.sqrt(len(x0)))
    finer = data.SwissRoll(points=8000).truth.log_density(x0) - truth * LN2
    assert abs(finer.mean()) < 1e-5 and np.abs(finer).max() < 0.02
    for kind, K_star in [("logsnr", -1.31), ("paper", -1.93)]:
        q = dpm.Gaussian(dpm.schedule(kind, 40, 0.004 ** 2))
        best = dpm.DPM(q, dpm.IdealKernel(q, roll.truth.moments, 2)).bound(x0, rng(19), steps=13)["K_each"] / LN2
        gap = truth - best  # paired: the points' own luck cancels
        assert gap.mean() == pytest.approx(-1.08 - K_star, abs=0.03 + 4 * gap.std() / math.sqrt(len(x0)))


@pytest.mark.parametrize("T", [2, 7, 1000])
def test_learned_schedule(T):
    """Whatever its parameters are, 0 < beta < 1 and alpha_bar falls from 1 - beta_1; at 0 it is linear in logit; smooth in t."""
    schedule = dpm.LearnedSchedule(T, 1e-8)
    logit = lambda alpha_bar: np.log((1 - alpha_bar[1:]) / alpha_bar[1:])
    at_zero = schedule.forward(np.zeros(schedule.parameters(T)))
    np.testing.assert_allclose(logit(at_zero), np.linspace(np.log(1e-8 / (1 - 1e-8)), 6, T), rtol=1e-7)
    for size in (1, 100, 1e30):
        for i in range(5):
            alpha_bar = schedule.forward(size * rng(40, i).standard_normal(schedule.parameters(T)))
            beta = 1 - alpha_bar[1:] / alpha_bar[:-1]
            assert beta[0] == pytest.approx(1e-8) and (beta > 0).all() and (beta < 1).all() and alpha_bar[0] == 1
            if T == 1000:  # 999 steps between 40 knots within 12 of one another
                assert np.abs(np.diff(np.log(schedule.rise))).max() < 12 / (998 / 39) + 1e-9


@pytest.mark.parametrize("T", [2, 7, 60])
def test_learned_schedule_backward(T):
    schedule = dpm.LearnedSchedule(T, 1e-3)
    psi, r = rng(41).standard_normal(schedule.parameters(T)), rng(42).standard_normal(T + 1)
    logsnr = lambda: np.log(1 / schedule.forward(psi)[2:] - 1)
    dpsi = schedule.backward(r) if logsnr() is not None else None
    for i, d in enumerate(np.eye(len(psi))):
        assert dpsi[i] == pytest.approx(quotient(lambda: float(r[2:] @ logsnr()), psi, d, h=1e-5), rel=1e-6, abs=1e-7)


def test_paper_form():
    """Its out gives eqs. 64 and 65, and its bumps are eq. 63: shares of one, each highest at its own centre."""
    q, t = dpm.Gaussian(dpm.schedule("logsnr", 15, 1e-2)), np.arange(2, 16)
    xt, z = rng(43).standard_normal((14, 3)), rng(44).standard_normal((14, 3, 2))
    f_mu, f_sigma = q.reverse(xt, t, q.paper_form(xt, t, z))
    beta = q.beta[t][:, None]
    sigma = 1 / (1 + np.exp(-(z[..., 1] + np.log(beta / (1 - beta)))))
    np.testing.assert_allclose(f_sigma, sigma, rtol=1e-9)
    np.testing.assert_allclose(f_mu, (xt - z[..., 0]) * (1 - sigma) + z[..., 0], rtol=1e-8)
    bumps = small_model(T=40, bumps=4).kernel._bumps
    np.testing.assert_allclose(bumps.sum(1), 1)
    assert (bumps[[1, 14, 27, 40]].argmax(1) == [0, 1, 2, 3]).all()
    np.testing.assert_allclose(np.log(bumps[14, 1] / bumps[14, 2]), 2)  # one spacing is two widths: exp(-(2^2) / 2)


# ---------------------------------------------------------------------------------------------------------------------------
# Room 1: the binomial diffusion, by enumeration of all 2^n states
# ---------------------------------------------------------------------------------------------------------------------------

class Table:
    """A kernel that is a table of random numbers: its out for every state and time."""

    dtype = np.dtype("float64")

    def __init__(self, n, T, size=1.0):
        self.D, self.out = n, size * rng(45).standard_normal((T + 1, 2 ** n, n, 1))

    def replica(self):
        return self

    def forward(self, x, t):
        return self.out[t, (x @ 2 ** np.arange(self.D)).astype(int)]

    def gradient(self, x, t, loss, inputs, weights):
        """dx by what out changes by when a bit is turned on."""
        dout = loss(slice(0, len(x)), self.forward(x, t))
        on, off = (np.where(np.eye(self.D) == 1, bit, x[:, None]) for bit in (1.0, 0.0))  # [example, bit turned, bit]
        change = np.stack([self.forward(on[:, i], t) - self.forward(off[:, i], t) for i in range(self.D)])
        return np.einsum("nko,inko->ni", dout, change), None


class LinearKernel(dpm.IdealKernel):
    """The ideal kernel of Gaussian data of mean 0: out[..., 0] is linear in x, and its backward the matrix, transposed."""

    def gradient(self, x, t, loss, inputs, weights):
        dout = loss(slice(0, len(x)), self.forward(x, t))
        return dout[..., 0] @ self.forward(np.eye(self.D), t[:1].repeat(self.D))[..., 0].T, None


class KernelOfOne(dpm.IdealKernel):
    """An ideal kernel in one dimension; there dE[x_0 | x_t] / dx_t = cos phi / sin^2 phi Var[x_0 | x_t]."""

    def gradient(self, x, t, loss, inputs, weights):
        signal, deviation = self.diffusion.signal_and_noise(t)
        mean, variance = self.moments(x, signal ** 2)
        dout = loss(slice(0, len(x)), self.diffusion.ideal(x, t, mean, variance))
        return dout[..., 0] * signal / deviation * (1 - variance / deviation ** 2), None


def bits(n=3, T=4, rate=0.3, size=1.0, p0=None):
    """A binomial model over n bits, its 2^n states, and the probabilities of all that can happen, as matrices [to, from]:
    data p0 (states,), forward [t][x_t, x_{t-1}] and reverse [t][x_{t-1}, x_t] built bit by bit from Table App.1 alone."""
    states = (np.arange(2 ** n)[:, None] >> np.arange(n) & 1).astype(float)
    if p0 is None:
        p0 = rng(46).random(2 ** n)
        p0 /= p0.sum()
    q = dpm.Binomial(dpm.schedule("cosine", T, 0.05), rate=rate, mean=p0 @ states.mean(1))
    model = dpm.DPM(q, Table(n, T, size))
    probability = lambda f, x: np.prod(np.where(x == 1, f, 1 - f), -1)
    forward, reverse = [None], [None]
    for t in range(1, T + 1):
        forward.append(probability((states * (1 - q.beta[t]) + rate * q.beta[t])[None], states[:, None]))
        at = np.full(2 ** n, t)
        f = q.reverse(states, at, model.kernel.forward(states, at))[0] if t > 1 else states * (1 - q.beta[1]) + rate * q.beta[1]
        reverse.append(probability(f[None], states[:, None]))
    return model, states, p0, forward, reverse, probability(np.full(n, rate), states)


def test_binomial_forward_and_posterior():
    """q(x_t | x_0) is the product of the steps; q(x_{t-1} | x_t, x_0) is Bayes; draws have their frequencies."""
    model, states, _, forward, _, _ = bits(n=2)
    q, until = model.diffusion, np.eye(4)
    for t in range(1, 5):
        before, until = until, forward[t] @ until
        at = np.full(4, t)
        f = 1 - np.array([(q.diffuse(states, at, np.full((4, 2), u)) == 0) for u in (np.arange(4000) + 0.5) / 4000]).mean(0)
        np.testing.assert_allclose(f, until.T @ states, atol=2e-4)
        if t > 1:
            for x0 in range(4):
                joint = forward[t] * before[:, x0]  # [x_t, x_{t-1}]
                expected = joint @ states / joint.sum(1)[:, None]
                np.testing.assert_allclose(q.posterior(states[x0][None], states, at)[0], expected, rtol=1e-9)


def test_binomial_dout():
    q, t = dpm.Binomial(dpm.schedule("cosine", 9, 1e-2), rate=0.3), np.array([2, 4, 9])
    x0, xt = (rng(47).random((2, 3, 4)) < 0.5).astype(float)
    out = rng(48).standard_normal((3, 4, 1))
    kl, dout = q.kl(x0, xt, t, out)
    assert (kl > 0).all()
    for direction in np.eye(12).reshape(12, 3, 4, 1):
        difference = q.kl(x0, xt, t, out + 1e-5 * direction)[0] - q.kl(x0, xt, t, out - 1e-5 * direction)[0]
        np.testing.assert_allclose(difference / 2e-5, (dout * direction).sum((1, 2)), rtol=1e-6, atol=1e-12)


def exact_parts(model, states, p0, forward):
    """Sum of the KLs and the entropies of the bound, each by enumeration of x_0 and x_t."""
    q, until, kls, H_q = model.diffusion, np.eye(len(states)), 0.0, [0.0]
    pairs = np.repeat(states, len(states), 0), np.tile(states, (len(states), 1))  # x_0, x_t
    for t in range(1, q.T + 1):
        until = forward[t] @ until
        joint = (until * p0).T.ravel()
        H_q.append(-(joint * np.log(until.T.ravel())).sum())
        assert q.H_q(t, states) @ p0 == pytest.approx(H_q[-1])
        if t > 1:
            at = np.full(len(joint), t)
            kls += joint @ q.kl(*pairs, at, model.kernel.forward(pairs[1], at))[0]
    return kls, H_q


@pytest.mark.parametrize("n, rate", [(1, 0.5), (3, 0.5), (4, 0.8), (3, None)])
def test_K_by_enumeration(n, rate):
    """K from KLs and entropies (eq. 14) is K over all trajectories: E_q of log p(x_T) + sum log p(x_{t-1}|x_t) - log q(x_t|x_{t-1})
    (eq. 12), which is below the log likelihood, whatever the rate of pi; where the mean of the data is, H_p(X_T) is its entropy."""
    p0 = np.array([0.25, 0.15, 0.05, 0.15, 0.2, 0.0, 0.1, 0.1]) if rate is None else None
    model, states, p0, forward, reverse, pi = bits(n, rate=rate or 0.4, p0=p0)
    assert rate or model.diffusion.H_p(states) @ p0 == pytest.approx(-3 * (0.4 * math.log(0.4) + 0.6 * math.log(0.6)))
    q = model.diffusion
    kls, H_q = exact_parts(model, states, p0, forward)
    K = -kls + H_q[-1] - H_q[1] - q.H_p(states) @ p0
    p_t, direct, likelihood = p0, 0.0, pi
    for t in range(1, q.T + 1):
        joint = forward[t] * p_t  # [x_t, x_{t-1}]
        direct += (joint * (np.log(reverse[t].T) - np.log(forward[t]))).sum()
        p_t = joint.sum(1)
    direct += p_t @ np.log(pi)
    for t in range(q.T, 0, -1):
        likelihood = reverse[t] @ likelihood
    assert likelihood.sum() == pytest.approx(1)
    assert K == pytest.approx(direct, rel=1e-10)
    assert K < p0 @ np.log(likelihood) < p0 @ np.log(p0 + 1e-300)
    x0 = states[np.repeat(np.arange(2 ** n), np.round(20_000 * p0).astype(int))]
    found = model.bound(x0, rng(49))  # the function itself, by sampling
    assert found["K"] == pytest.approx(K, abs=4 * found["K_se"] + 1e-3) and found["K_se"] < 0.02
    assert found["L_null"] == pytest.approx(n * (q.mean * math.log(q.mean) + (1 - q.mean) * math.log(1 - q.mean)), abs=0.01)
    log_w = model.log_weights(states, 20_000, rng(50))  # and the estimate of log p(x_0), for every state
    estimate = model.log_likelihood(states, 20_000, rng(50))
    np.testing.assert_allclose(estimate, np.log(likelihood), atol=5 * (np.exp(log_w - estimate[:, None]).std() / math.sqrt(20_000)))
    assert p0 @ log_w.mean(1) == pytest.approx(direct, abs=5 * log_w.std() / math.sqrt(20_000))


def test_binomial_at_initialisation_K_is_L_null():
    """With out = 0 and pi of the data's own mean, trajectories are reversible: K is the log likelihood of independent bits."""
    p0 = np.zeros(8)
    p0[[1, 2, 4]] = 1 / 3
    model, states, p0, forward, _, pi = bits(rate=1 / 3, size=0.0, p0=p0)
    kls, H_q = exact_parts(model, states, p0, forward)
    assert -kls + H_q[-1] - H_q[1] - model.diffusion.H_p(states) @ p0 == pytest.approx(p0 @ np.log(pi), rel=1e-10)


def test_ideal_binomial_kernel_over_the_five_phases():
    """Heartbeats: m is Bayes over the phases, and f_b is then q(x_{t-1} = 1 | x_t) of every bit, summed over the phases."""
    beat = data.load("heartbeat")
    q = dpm.Binomial(dpm.schedule("cosine", 30, 1e-5), rate=0.2)
    patterns = beat.truth.patterns
    assert patterns.shape == (5, 20) and (patterns.sum(1) == 4).all() and (np.diff(np.flatnonzero(patterns[3])) == 5).all()
    for t in (2, 11, 30):
        at = np.full(7, t)
        xt = q.diffuse(beat.held_out(7), at, rng(51).random((7, 20)))
        like = np.array([[np.prod(np.where(x == 1, f, 1 - f)) for f in q.alpha_bar[t] * patterns + 0.2 * (1 - q.alpha_bar[t])] for x in xt])
        like /= like.sum(1, keepdims=True)
        out = dpm.IdealKernel(q, lambda x, a: beat.truth.moments(x, a, 0.2), 20).forward(xt, at)
        expected = sum(like[:, [i]] * q.posterior(patterns[[i]], xt, at)[0] for i in range(5))
        np.testing.assert_allclose(q.reverse(xt, at, out)[0], expected, rtol=1e-7)


@pytest.mark.parametrize("kind, rate, K_star", [("cosine", 0.5, -2.34), ("paper", 0.5, -2.84), ("paper", 0.2, -2.683)])
def test_heartbeat_K_star(kind, rate, K_star):
    """The table of known numbers at T = 200; L = log2(1/5) = -2.322 bits. And its ideal model draws heartbeats, all phases alike."""
    beat = data.load("heartbeat")
    q = dpm.Binomial(dpm.schedule(kind, 200, 1 / 200 if kind == "paper" else 1e-5), rate=rate, mean=0.2)
    kernel = dpm.IdealKernel(q, lambda x, a: beat.truth.moments(x, a, rate), 20)
    model = dpm.DPM(q, kernel)
    x0 = beat.held_out(1000)
    assert beat.truth.log_density(x0) / LN2 == pytest.approx(math.log2(1 / 5))
    assert beat.truth.log_density(1 - x0).max() == -np.inf
    found = model.bound(x0, rng(52), steps=50)
    assert found["K"] / LN2 == pytest.approx(K_star, abs=0.015 + 4 * found["K_se"] / LN2) and found["K_se"] / LN2 < 0.03
    if kind == "cosine":
        samples = model.sample(500, seed=2, batch=500)
        valid = (samples[:, None] == beat.truth.patterns).all(2)
        assert valid.any(1).mean() > 0.985
        assert np.abs(valid.sum(0) / 500 - 0.2).max() < 4 * math.sqrt(0.16 / 500)


# ---------------------------------------------------------------------------------------------------------------------------
# Room 3: entropy bounds, and the probability of the model
# ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variance", [1e-12, 0.3, 1.0])
def test_entropy_bounds_of_gaussian_data(variance):
    """Eq. 24 for N(0, variance I) in three dimensions, whose H_q(X_{t-1} | X_t) is in closed form; tight at 0 below, at 1 above."""
    model = gaussian_model(variance, D=3)
    q = model.diffusion
    lower, upper = model.entropy_bounds(np.zeros((4, 3)))
    t = np.arange(2, 51)
    at = lambda t: q.alpha_bar[t] * variance + 1 - q.alpha_bar[t]
    exact = 1.5 * np.log(2 * np.pi * np.e * (at(t - 1) - (1 - q.beta[t]) * at(t - 1) ** 2 / at(t)))
    assert (lower[2:] <= exact + 1e-9).all() and (exact <= upper[2:] + 1e-9).all()
    tight_below, tight_above = np.allclose(lower[2:], exact, atol=1e-6), np.allclose(exact, upper[2:], atol=1e-6)
    assert (tight_below, tight_above) == (variance < 0.1, variance == 1)
    found = model.bound(math.sqrt(variance) * rng(53).standard_normal((50, 3)), rng(54))
    np.testing.assert_allclose(found["H_p"][2:], exact, rtol=1e-9)  # the exact kernel has the exact entropy


@pytest.mark.parametrize("p0, rate", [(None, 0.5), ([0, 0, 0, 0, 0, 1, 0, 0], 0.5), ([1 / 8] * 8, 0.5), ([0, 1 / 3, 1 / 3, 0, 1 / 3, 0, 0, 0], 1 / 3)])
def test_entropy_bounds_of_bits(p0, rate):
    """Eq. 24 for enumerated bits: H_q(X_{t-1} | X_t) over all states lies between; one state is tight below, independent bits above."""
    model, states, p0, forward, _, _ = bits(rate=rate, p0=None if p0 is None else np.array(p0))
    lower, upper = model.entropy_bounds(states[np.repeat(np.arange(8), np.round(12_000 * p0).astype(int))])
    p_t = p0
    for t in range(1, 5):
        joint = forward[t] * p_t
        p_t = joint.sum(1)
        exact = -(joint * np.log(joint / p_t[:, None] + 1e-300)).sum()
        assert model.diffusion.H_step(t, states) @ p0 == pytest.approx(-(joint * np.log(forward[t])).sum())
        if t > 1:
            assert lower[t] - 1e-3 <= exact <= upper[t] + 1e-3
            assert (abs(exact - lower[t]) < 1e-9) == (p0.max() == 1) and (abs(exact - upper[t]) < 1e-9) == (p0.max() == 1 / 8)


def test_log_likelihood_of_linear_kernels():
    """With linear Gaussian kernels p(x_0) is a Gaussian in closed form. The estimate converges to it from below, its weights average
    to it without bias, and one trajectory gives K in the mean."""
    model = gaussian_model(0.3, T=10)
    q, variance = model.diffusion, 1.0
    for t in range(10, 0, -1):
        one, at = np.ones((1, 1)), np.array([t])
        f_mu, f_sigma = (float(a.ravel()[0]) for a in (q.reverse(one, at, model.kernel.forward(one, at)) if t > 1 else q.kernel(one, at)))
        variance = f_mu ** 2 * variance + f_sigma
    x0 = math.sqrt(0.3) * np.array([[0.1], [-1.0], [2.0]])
    exact = -0.5 * (x0[:, 0] ** 2 / variance + math.log(2 * math.pi * variance))
    log_w = model.log_weights(x0, 40_000, rng(55), batch=7777)
    w = np.exp(log_w - exact[:, None])
    np.testing.assert_allclose(w.mean(1), 1, atol=5 * (w.std(1) / 200).max())
    assert (w.std(1) / 200).max() < 0.02
    np.testing.assert_allclose(model.log_likelihood(x0, 40_000, rng(55)), exact, atol=0.1)
    means = [np.log(np.exp(log_w.reshape(3, -1, S)).mean(2)).mean(1) for S in (1, 4, 16, 400)]
    assert all((fewer < more).all() for fewer, more in zip(means, means[1:])) and (means[-1] < exact + 0.01).all()
    # the mean over data of unit variance is K
    model = gaussian_model(1.0, T=10)
    model.kernel.moments = data.Mixture([[0.5]], 0.7).moments  # not the exact kernel, so that K is not L
    x0 = np.tile([[-1.0], [1.0]], (20_000, 1))
    log_w = model.log_weights(x0, 1, rng(57))
    found = model.bound(x0, rng(58))
    assert log_w.mean() == pytest.approx(found["K"], abs=4 * (log_w.std() / 200 + found["K_se"]))
    assert found["K"] < found["L_null"] - 10 * (log_w.std() / 200 + found["K_se"])


@pytest.mark.parametrize("shape, options", [((1, 1, 3), {}), ((4, 6, 2), dict(maps=2, sights=2)), ((4, 4, 1), dict(maps=0, patch=1))])
def test_gradient_of_K_in_every_beta(shape, options):
    """The frozen-noise gradient of -K / D against central differences in every beta_t, t = 2..T, the rest of them held."""
    model = small_model(shape, T=6, stir=0.2, learned=True, **options)
    q, D = model.diffusion, model.kernel.D
    model.kernel.slice = model.kernels[1].slice = 3
    x0 = rng(59).standard_normal((23, D))

    class Given:
        """In place of the learned schedule: beta itself."""

        beta, of_threads = np.array(q.beta), []

        def forward(self, _):
            return np.concatenate([[1], np.cumprod(1 - self.beta[1:])])

        def backward(self, dlogsnr):
            self.of_threads.append(dlogsnr)
            return 0

    model.learned = given = Given()

    def loss():
        given.of_threads.clear()
        kl = model.gradient(x0, 3, 4)[1].mean()
        return float(kl - q.H_q(6, x0)[0]) / D  # H_q(X_1|X_0) and H_p(X_T) do not depend on beta_2..T

    loss()
    dlogsnr = sum(given.of_threads)
    # back through the cumulative product: logsnr_t = log(1 / alpha_bar_t - 1), and alpha_bar_t holds (1 - beta_s) for every s <= t
    dbeta = np.array([(dlogsnr[s:] / (1 - q.alpha_bar[s:])).sum() / (1 - q.beta[s]) for s in range(2, 7)])
    for s in range(2, 7):
        assert dbeta[s - 2] == pytest.approx(quotient(loss, given.beta, np.eye(7)[s], h=1e-5 * given.beta[s]), rel=1e-6), s


def test_mixture():
    """Its density integrates to 1, and its moments of x_0 given x_t are those of the joint density, summed on a grid."""
    mixture = data.Mixture([[-1.0], [0.2], [1.5]], 0.3)
    x0 = np.linspace(-6, 6, 6001)[:, None]
    density = np.exp(mixture.log_density(x0))
    assert np.trapezoid(density, x0[:, 0]) == pytest.approx(1)
    xt, alpha_bar = np.array([[0.4], [-1.1]]), 0.6
    joint = density * np.exp(-0.5 * (xt - math.sqrt(alpha_bar) * x0.T) ** 2 / (1 - alpha_bar))
    joint /= joint.sum(1, keepdims=True)
    mean, variance = mixture.moments(xt, alpha_bar)
    np.testing.assert_allclose(mean, joint @ x0, rtol=1e-6)
    np.testing.assert_allclose(variance, joint @ x0 ** 2 - mean ** 2, rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------------
# Room 3: samples and posteriors
# ---------------------------------------------------------------------------------------------------------------------------

def gaussian_model(variance=4.0, T=50, D=1):
    q = dpm.Gaussian(np.concatenate([[1], np.cumprod(1 - np.linspace(1e-3, 0.2, T))]))
    kernel = dpm.IdealKernel(q, data.Mixture(np.zeros((1, D)), math.sqrt(variance)).moments, D)
    return dpm.DPM(q, kernel)


def test_samples_have_the_variance_that_the_kernels_imply():
    """Linear kernels make every x_t Gaussian; its variance follows from a recursion, down to the fixed last step."""
    model = gaussian_model()
    q, variance = model.diffusion, 1.0
    for t in range(50, 1, -1):
        one, at = np.ones((1, 1)), np.array([t])
        f_mu, f_sigma = q.reverse(one, at, model.kernel.forward(one, at))
        variance = f_mu[0, 0] ** 2 * variance + f_sigma[0, 0]
    variance = (1 - q.beta[1]) * variance + q.beta[1]
    x, kept = model.sample(20_000, seed=1, batch=20_000, keep=(1, 50))
    assert x.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / 20_000))
    assert variance == pytest.approx(4, rel=0.01)
    assert abs(x.mean()) < 5 * math.sqrt(variance / 20_000)
    assert (x ** 4).mean() / x.var() ** 2 == pytest.approx(3, abs=5 * math.sqrt(96 / 20_000))  # normal noise, not uniform (1.8)
    assert kept[50].var() == pytest.approx(1, rel=0.05)
    last = (x - np.sqrt(1 - q.beta[1]) * kept[1]) / np.sqrt(q.beta[1])  # x_0 is x_1 with the noise of the fixed step
    assert last.var() == pytest.approx(1, rel=0.05)


def test_sample_k_is_the_same_in_any_batch():
    model = small_model(stir=0.05)
    x = model.sample(7, seed=3)
    np.testing.assert_allclose(model.sample(3, seed=3), x[:3], rtol=1e-9)
    np.testing.assert_allclose(model.sample(7, seed=3, batch=2), x, rtol=1e-9)
    single = small_model(stir=0.05, dtype="float32")
    np.testing.assert_allclose(single.sample(7, seed=3, batch=2), single.sample(7, seed=3), rtol=1e-3)
    assert np.abs(model.sample(7, seed=4) - x).min() > 1e-6
    assert len(np.unique(x[:, 0].round(6))) == 7


def test_posterior_samples():
    """Inpainting keeps the known exactly and changes the rest; a vanishing noise is the same as knowing; a weak observation pulls."""
    model = gaussian_model(1.0, D=2)
    y = np.array([1.5, 0.0])
    plain = model.sample(500, seed=5, batch=500)
    clamped = model.sample(500, seed=5, r=dpm.Observation(y, [0, np.inf]), batch=500)
    assert (clamped[:, 0] == 1.5).all()
    np.testing.assert_allclose(clamped[:, 1], plain[:, 1], rtol=1e-9)  # independent coordinates: nothing else may change
    assert clamped[:, 1].std() > 0.8
    near = model.sample(500, seed=5, r=dpm.Observation(y, [1e-7, np.inf]), batch=500)
    np.testing.assert_allclose(near, clamped, atol=1e-5)
    one = model.sample(4, seed=5, r=dpm.Observation(np.repeat(y[None], 4, 0), np.array([0, np.inf])), batch=3)
    np.testing.assert_allclose(one, clamped[:4], rtol=1e-9)  # an observation for each sample, in several batches


def test_denoising_follows_its_recursion():
    """With linear kernels and a Gaussian r at every step, the mean and the variance of x_t follow from those of x_{t+1}."""
    model, y, s = gaussian_model(), 1.5, 2.0
    q = model.diffusion

    def product(mean, variance):  # of N(mean, variance) and N(y, s^2): precisions add
        total = 1 / (1 / variance + 1 / s ** 2)
        return total * (mean / variance + y / s ** 2), total

    mean, variance = product(0.0, 1.0)
    for t in range(50, 0, -1):
        one, at = np.ones((1, 1)), np.array([t])
        if t > 1:
            f_mu, f_sigma = (float(a[0, 0]) for a in q.reverse(one, at, model.kernel.forward(one, at)))
        else:
            f_mu, f_sigma = math.sqrt(1 - q.beta[1]), float(q.beta[1])
        pulled, total = product(f_mu * mean, f_sigma)
        mean, variance = pulled, total + (f_mu * total / f_sigma) ** 2 * variance
    x = model.sample(20_000, seed=6, r=dpm.Observation(np.array([y]), s), batch=20_000)
    assert x.mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / 20_000))
    assert x.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / 20_000))


@pytest.mark.parametrize("y, sigma, says", [
    ([1.0, np.nan], [0, 0.5], "NaN"), ([1.0, 2.0], [-1, 0], "must be 0"), ([1.0, 2.0], [np.nan, 0], "must be 0"),
    ([1.0, 2.0], [0, 0], "nothing is unknown"), ([1.0, 2.0], np.inf, "nothing is known"),
    ([1.0, 2.0], [0, 0, 0], "shape"), (np.zeros((3, 2)), [0, np.inf], "does not fit"), (np.zeros(3), 1.0, "does not fit")])
def test_bad_observations(y, sigma, says):
    with pytest.raises(dpm.InputError, match=says):
        gaussian_model(D=2).sample(4, r=dpm.Observation(y, sigma))


@pytest.mark.parametrize("r, options, says", [
    ("ink", {}, "r must be"), ([], {}, "r must be"), (None, dict(particles=3), "need one"), (None, dict(particles=0), "1 particle"),
    (dpm.Function(lambda x: x, lambda x: x), dict(particles=2), "log_r of your r returns"), (dpm.Function(lambda x: x[:, 0], lambda x: 1.0), {}, "returns float"),
    (dpm.Function(lambda x: x[:, 0], lambda x: x * np.nan), {}, "NaN"), (dpm.Function(lambda x: x[:, 0], lambda x: x), dict(how="linear"), "no r-schedule")])
def test_bad_r(r, options, says):
    with pytest.raises(dpm.InputError, match=says):
        gaussian_model(D=2).sample(4, r=r, **options)
    with pytest.raises(dpm.InputError, match="0 or 1"):
        bits()[0].sample(4, r=dpm.Observation([0.5, 1, 0], [0, np.inf, np.inf]))


# ---------------------------------------------------------------------------------------------------------------------------
# Room 3: posteriors against the truth. Run with -s to see the table
# ---------------------------------------------------------------------------------------------------------------------------

def shipped(name):
    return dpm.DPM.load(HERE / "data" / name / "model.npz")


def ar1_case(denoise):
    """AR(1) of correlation 0.8 in 8 dimensions, its best diagonal kernels, half of the coordinates known or all under noise:
    the KL from the Gaussian fitted to the samples to the exact posterior, nats."""
    S, r = 0.8 ** np.abs(np.arange(8)[:, None] - np.arange(8)), rng(63)

    def moments(x, alpha_bar):
        a = float(alpha_bar[0, 0])  # the same in every row
        gain = math.sqrt(a) * S @ np.linalg.inv(a * S + (1 - a) * np.eye(8))
        return x @ gain.T, np.broadcast_to(np.diag(S - math.sqrt(a) * gain @ S), x.shape)

    q = dpm.Gaussian(dpm.schedule("logsnr", 50 if denoise else 100, 1e-3))
    kernel = LinearKernel(q, moments, 8)
    y = np.linalg.cholesky(S) @ r.standard_normal(8)
    known = np.arange(8) < 8 if denoise else np.arange(8) % 2 == 0
    sigma = np.where(known, 0.5 if denoise else 0, np.inf)
    unknown = ~known | denoise
    inverse = np.linalg.inv(S[np.ix_(known, known)] + 0.25 * np.eye(known.sum()) * denoise)
    mean = S[np.ix_(unknown, known)] @ inverse @ y[known]
    C = S[np.ix_(unknown, unknown)] - S[np.ix_(unknown, known)] @ inverse @ S[np.ix_(known, unknown)]

    def distance(x):
        assert denoise or (x[:, known] == y[known]).all()
        m, c, inverse = x[:, unknown].mean(0) - mean, np.cov(x[:, unknown].T), np.linalg.inv(C)
        return 0.5 * (np.trace(inverse @ c) - len(m) + m @ inverse @ m + np.linalg.slogdet(C)[1] - np.linalg.slogdet(c)[1])

    return dpm.DPM(q, kernel), dpm.Observation(y, sigma), 3000 if denoise else 1500, distance


def roll_case():
    """The trained swiss roll, one coordinate given: total variation over 60 bins to the density on that line."""
    model, roll = shipped("swissroll"), data.load("swissroll")
    fine = (np.arange(60 * 50) + 0.5) / 500 - 3
    truth = np.exp(roll.truth.log_density(np.stack([np.full(len(fine), 0.5), fine], 1))).reshape(60, 50).sum(1)
    distance = lambda x: 0.5 * np.abs(np.histogram(x[:, 1], np.linspace(-3, 3, 61))[0] / len(x) - truth / truth.sum()).sum()
    return model, dpm.Observation([0.5, 0], [0, np.inf]), 1500, distance


def modes_case():
    """Two modes of weights 3/4 and 1/4 under a product of an Observation and a Function: how far the weights of the modes are off."""
    q = dpm.Gaussian(dpm.schedule("logsnr", 100, 1e-3))
    kernel = KernelOfOne(q, data.Mixture([[-1.2], [-1.2], [-1.2], [1.2]], 0.3).moments, 1)
    x = np.linspace(-6, 6, 60001)
    posterior = (0.75 * np.exp(-0.5 * (x + 1.2) ** 2 / 0.09) + 0.25 * np.exp(-0.5 * (x - 1.2) ** 2 / 0.09)) * np.exp(-0.5 * (x - 0.2) ** 2 / 0.64 + 0.3 * np.sin(x))
    weight = posterior[x > 0].sum() / posterior.sum()
    assert 0.4 < weight < 0.6  # the data's own is 1/4
    r = [dpm.Observation([0.2], [0.8]), dpm.Function(lambda x: 0.3 * np.sin(x[:, 0]), lambda x: 0.3 * np.cos(x))]
    return dpm.DPM(q, kernel), r, 5000, lambda samples: abs((samples > 0).mean() - weight)


def heartbeat_case():
    """The trained heartbeat, three zeros given that leave two phases open: the share of samples that are not a heartbeat of these phases."""
    patterns, y, sigma = data.load("heartbeat").truth.patterns, np.zeros(20), np.full(20, np.inf)
    sigma[[5, 6, 12]] = 0

    def distance(x):
        phases = (x[:, None] == patterns).all(2).mean(0)
        assert phases[:3].max() == 0
        if phases.sum() > 0.9:
            assert abs(phases[3] - phases[4]) < 4 / math.sqrt(len(x))
        return 1 - phases.sum()

    return shipped("heartbeat"), dpm.Observation(y, sigma), 500, distance


def bits_case():
    """Three bits and a table of random kernels, by enumeration: a noisy bit, and a Function that is linear in the bits; total variation."""
    model, states, _, _, reverse, p = bits(rate=0.4)
    for t in range(model.T, 0, -1):
        p = reverse[t] @ p
    tilt = np.array([0.0, 1.5, -1.0])
    p = p * np.exp(states @ tilt - 0.5 * (states[:, 0] - 0.9) ** 2 / 0.36)
    distance = lambda x: 0.5 * np.abs(np.bincount((x @ [1, 2, 4]).astype(int), minlength=8) / len(x) - p / p.sum()).sum()
    r = [dpm.Observation([0.9, 0, 0], [0.6, np.inf, np.inf]), dpm.Function(lambda x: x @ tilt, lambda x: x * 0 + tilt)]
    return model, r, 10_000, distance


@pytest.mark.parametrize("name, case, limit, crowds, alone", [
    ("AR(1), half known: KL, nats", lambda: ar1_case(False), 0.02, (64, 16), True), ("AR(1), denoised: KL, nats", lambda: ar1_case(True), 0.02, (64, 64), True),
    ("swiss roll, one coordinate: TV", roll_case, 0.08, (64, 16), False), ("two modes: error of a weight", modes_case, 0.02, (64, 16), False),
    ("heartbeat, three bits: share invalid", heartbeat_case, 0.01, (16, 16), True), ("three bits: TV", bits_case, 0.02, (64, 64), False)])
def test_posteriors_against_the_truth(name, case, limit, crowds, alone):
    """With that many particles samples have the exact posterior's distribution, with the paper's sampler they do not. Where steps are small
    and the answer is not a choice between modes, a predicted r comes halfway and more with one particle `alone`."""
    model, r, number, distance = case()
    found = {}
    crowds = list(zip(("diffused", "predicted"), crowds))
    for how, N in [*((how, 1) for how in dpm.HOW), *crowds]:
        found[how, N] = distance(model.sample(number, 3, r, how, N, batch=8192))
    print(f"\n| {name} | " + " | ".join(f"{d:.3f}" for d in found.values()) + f" | {crowds[0][1]}, {crowds[1][1]} | {model.T - 1} |")
    for crowd in crowds:
        assert found[crowd] < limit
        assert found["constant", 1] > 2 * found[crowd]
    assert not alone or found["constant", 1] > 2 * found["predicted", 1]


@pytest.mark.parametrize("how", dpm.HOW)
def test_particles_are_exact_for_a_function_at_every_t(how):
    """Also x_T has a weight, which matters where a Function tilts a pi that still remembers: few steps, alpha_bar_T = 0.13. White data
    has exact kernels; under the Gaussian r its posterior is N(2 / 2.44, 1.44 / 2.44)."""
    q = dpm.Gaussian(np.array([1, 0.95, 0.6, 0.13]))
    model = dpm.DPM(q, LinearKernel(q, data.Mixture([[0.0]], 1.0).moments, 1))
    r = dpm.Function(lambda x: -0.5 * (x[:, 0] - 2) ** 2 / 1.44, lambda x: (2 - x) / 1.44)
    x = model.sample(4000, 7, r, how, 200, batch=100_000)
    assert x.mean() == pytest.approx(2 / 2.44, abs=4 * math.sqrt(1.44 / 2.44 / 4000))
    assert x.var() == pytest.approx(1.44 / 2.44, rel=5 * math.sqrt(2 / 4000))


def test_particles_do_not_depend_on_the_batch():
    model = gaussian_model(D=2)
    r = dpm.Observation(np.array([[0.3, 1.0], [0.5, -1], [2, 0], [1, 1], [0, 0]]), [0.5, np.inf])
    x, kept = model.sample(5, 4, r, "diffused", 8, batch=1000, keep=(1, 50))
    np.testing.assert_allclose(model.sample(5, 4, r, "diffused", 8, batch=9), x, rtol=1e-9)
    last = (x - np.sqrt(1 - model.diffusion.beta[1]) * kept[1]) / np.sqrt(model.diffusion.beta[1])
    assert np.abs(last).max() < 6 and kept[50].shape == x.shape  # x_1 is that of the particle which became the sample


# ---------------------------------------------------------------------------------------------------------------------------
# Determinism and checkpoints
# ---------------------------------------------------------------------------------------------------------------------------

def steps(model, adam, first, last, D):
    for i in range(first, last):
        model.gradient(rng(1, i).standard_normal((16, D)).astype(model.kernel.dtype), 0, i)
        adam.update([k.grad for k in model.kernels], model.pool)


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 5, 1)])
def test_training_is_deterministic_and_resumes_bit_for_bit(tmp_path, shape):
    def fresh():
        model = small_model(shape, dtype="float32")
        return model, dpm.Adam(model.kernel.theta, steps=12, warmup=3)

    model, adam = fresh()
    steps(model, adam, 0, 12, model.kernel.D)
    again, adam_again = fresh()
    steps(again, adam_again, 0, 5, again.kernel.D)
    again.save(tmp_path / "c.npz", adam_again)
    resumed, adam_resumed = dpm.DPM.resume(tmp_path / "c.npz", steps=12, warmup=3)
    steps(resumed, adam_resumed, 5, 12, resumed.kernel.D)
    assert (resumed.kernel.theta == model.kernel.theta).all() and (adam_resumed.average == adam.average).all()
    assert not (again.kernel.theta == model.kernel.theta).all()


def test_checkpoint_round_trip(tmp_path):
    model = small_model((4, 4, 1), dtype="float32")
    model.save(tmp_path / "full.npz")
    model.save(tmp_path / "half.npz", half=True)
    x0 = rng(20).standard_normal((5, 16))
    loaded = dpm.DPM.load(tmp_path / "full.npz", threads=2)
    assert (loaded.shift, loaded.scale, loaded.about) == (0.5, 2.0, {"dataset": "x"})
    assert loaded.bound(x0, rng(21))["K"] == model.bound(x0, rng(21))["K"]
    assert dpm.DPM.load(tmp_path / "half.npz").bound(x0, rng(21))["K"] == pytest.approx(model.bound(x0, rng(21))["K"], rel=1e-2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full.npz", "half.npz"]  # no temporary file stays


def test_bad_checkpoints(tmp_path):
    small_model().save(tmp_path / "good.npz")
    raw = (tmp_path / "good.npz").read_bytes()
    with np.load(tmp_path / "good.npz") as file:
        content = dict(file)
    (tmp_path / "short.npz").write_bytes(raw[:len(raw) // 2])
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "flipped.npz").write_bytes(raw[:1500] + bytes([raw[1500] ^ 255]) + raw[1501:])
    np.savez(tmp_path / "garbled.npz", **(content | {"config": "{"}))
    np.savez(tmp_path / "fewer.npz", **(content | {"average": content["average"][:-1]}))
    np.savez(tmp_path / "newer.npz", **(content | {"format": dpm.FORMAT + 1}))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name, says in [("none", "no such checkpoint"), ("short", "damaged"), ("empty", "damaged"), ("flipped", "damaged"),
                       ("garbled", "damaged"), ("fewer", "damaged"), ("newer", "format"), ("other", "not a checkpoint")]:
        with pytest.raises(dpm.InputError, match=says):
            dpm.DPM.load(tmp_path / f"{name}.npz")
    with pytest.raises(dpm.InputError, match="cannot be resumed"):
        dpm.DPM.resume(tmp_path / "good.npz")


@pytest.mark.parametrize("name, K", [("swissroll", -1.25), ("heartbeat", -2.37)])
def test_shipped_toys(name, K):
    """At the K that the README gives, in bits."""
    model, toy = shipped(name), data.load(name)
    found = model.bound(toy.held_out(4000), rng(65), steps=40)
    assert found["K"] / LN2 == pytest.approx(K, abs=0.01 + 4 * found["K_se"] / LN2)


def test_shipped_model():
    """The MNIST model beside the data: from its own config, on test images, at the figure the README gives."""
    model = shipped("mnist")
    mnist = train.load_for(model)
    found = model.bound(mnist.held_out(300), rng(22), steps=5)
    bits_per_dim = -found["K"] / 784 / LN2 + math.log2(model.scale)
    assert bits_per_dim < SHIPPED_BITS_PER_DIM + 0.02 + 4 * found["K_se"] / 784 / LN2


SHIPPED_BITS_PER_DIM = 1.150


# ---------------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------------

def test_mnist_is_the_original_dequantised_and_normalised():
    mnist = data.load("mnist")  # its checksums are verified on load
    assert len(mnist.train) == 60_000 and len(mnist.test) == 10_000 and mnist.shape == (28, 28, 1)
    assert mnist.scale == pytest.approx(78.6, abs=0.05)
    x, y = mnist.draw(4000, rng(23)), mnist.held_out(50)
    assert x.mean() == pytest.approx(0, abs=0.02) and x.var() == pytest.approx(1, abs=0.02)
    raw = y * mnist.scale + mnist.shift
    assert (np.floor(raw + 1e-9) == mnist.test[:50]).all()
    fraction = raw - mnist.test[:50]
    assert fraction.min() >= -1e-9 and fraction.max() < 1 and fraction.mean() == pytest.approx(0.5, abs=0.01)
    assert (mnist.held_out(50, seed=1) != y).any()
    assert mnist.edges == pytest.approx([(level - mnist.shift) / mnist.scale for level in (0, 1, 255, 256)])


def idx(array, kind=8):
    return bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def test_other_data(tmp_path):
    """IDX folders (gzipped or not), IDX files, .npy and .npz: what is read is what was written; without a test part 9:1, seeded."""
    images = rng(24).integers(0, 256, (30, 4, 5)).astype(np.uint8)
    (tmp_path / "idx").mkdir()
    (tmp_path / "idx" / "train-images-idx3-ubyte").write_bytes(idx(images))
    (tmp_path / "idx" / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:7])))
    folder = data.load(tmp_path / "idx")
    assert (folder.train.reshape(images.shape) == images).all() and len(folder.test) == 7 and folder.shape == (4, 5, 1)
    np.save(tmp_path / "a.npy", images)
    one, two = data.load(tmp_path / "a.npy"), data.load(tmp_path / "idx" / "train-images-idx3-ubyte")
    assert len(one.train) == 27 and len(one.test) == 3 and (one.test == two.test).all()
    assert sorted(map(bytes, np.concatenate([one.train, one.test]))) == sorted(map(bytes, images.reshape(30, -1)))
    vectors = rng(25).standard_normal((20, 6)).astype(np.float32)
    np.savez(tmp_path / "b.npz", train=vectors, test=vectors[:5])
    b = data.load(tmp_path / "b.npz")
    assert b.shape == (1, 1, 6) and not b.bytes and b.edges == () and (b.test == vectors[:5]).all()
    for binary in (images > 100, (images > 100).astype(int), (images > 100) * 1.0):
        np.save(tmp_path / "c.npy", binary)
        c = data.load(tmp_path / "c.npy")
        assert c.binary and not c.bytes and (c.shift, c.scale, c.mean) == (0, 1, c.train.mean())
        assert set(np.unique(c.draw(50, rng(60)))) == {0, 1}
    assert data.load("swissroll:0.01").noise == 0.01
    (tmp_path / "pictures").mkdir()
    for i in range(30):
        Image.fromarray(images[i]).save(tmp_path / "pictures" / f"{i:02}.png")
    pictures = data.load(tmp_path / "pictures")
    assert (pictures.train == one.train).all() and (pictures.test == one.test).all() and pictures.shape == (4, 5, 1)
    Image.fromarray(np.stack([images[0]] * 3, 2)).save(tmp_path / "pictures" / "30.png")
    assert data.load(tmp_path / "pictures").shape == (4, 5, 3)
    x = b.normalise(b.train, None)
    assert x.mean() == pytest.approx(0, abs=1e-6) and x.var() == pytest.approx(1, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------------------
# The scripts, as their users run them
# ---------------------------------------------------------------------------------------------------------------------------

def script(*arguments, cwd, **options):
    return subprocess.run([sys.executable, HERE / arguments[0], *map(str, arguments[1:])], cwd=cwd, text=True,
                          capture_output=True, timeout=300, **options)


def small_digits():
    """The middle of 400 digits, every other pixel: images of 8 x 8."""
    return data.load("mnist").train[:400].reshape(-1, 28, 28)[:, 6:22:2, 6:22:2]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small data in it and trained runs: of vectors with a fixed and a learned schedule, of images, of bits."""
    place = tmp_path_factory.mktemp("place")
    np.save(place / "digits.npy", small_digits())
    for arguments in (("--steps", 300, "--timesteps", 10), ("--steps", 300, "--schedule", "learned", "--timesteps", 10, "--out", "runs/learned"),
                      ("--dataset", "digits.npy", "--steps", 30, "--timesteps", 20, "--batch-size", 16),
                      ("--dataset", "heartbeat", "--steps", 400, "--timesteps", 30)):
        done = script("train.py", *arguments, cwd=place)
        assert done.returncode == 0, done.stderr
    return place


def test_train_leaves_everything(place):
    for name, figures in [("swissroll", {"figure1.png"}), ("learned", {"figure1.png", "schedule.png"}), ("digits", {"samples.png"}), ("heartbeat", {"figure2.png"})]:
        run = place / "runs" / name
        assert {p.name for p in run.iterdir()} == {"checkpoint.npz", "log.csv", "result.json", "training.png", "kl.png", "entropy.png"} | figures
        result = json.loads((run / "result.json").read_text())
        assert result["K_bits"] == pytest.approx(-sum(result["kl_bits"]) + result["H_q_T_bits"] - result["H_q_1_bits"] - result["H_p_T_bits"])
        assert result["entropy_lower_bits"] < result["entropy_upper_bits"], name
        log = np.genfromtxt(run / "log.csv", delimiter=",", names=True)
        assert log["step"][-1] == result["steps"], name
        assert log["K_minus_L_null_bits"][-15:].mean() > log["K_minus_L_null_bits"][:15].mean(), name
    roll = json.loads((place / "runs" / "swissroll" / "result.json").read_text())
    assert 0 < roll["K_minus_L_null_bits"] and roll["K_bits"] < roll["K_star_bits"] < roll["L_true_bits"] + 0.05
    for name in ("swissroll", "heartbeat"):
        r = json.loads((place / "runs" / name / "result.json").read_text())
        estimates = [r[f"estimate_{S}_bits"] for S in (1, 10, 100, 1000)]
        assert estimates == sorted(estimates) and estimates[-1] < r["estimate_L_bits"] + 3 * r["L_minus_estimate_1000_bits_se"], name
        assert estimates[0] == pytest.approx(r["K_bits"], abs=5 * r["estimate_1_bits_se"]), name
    beat = json.loads((place / "runs" / "heartbeat" / "result.json").read_text())
    assert beat["L_null_bits"] == pytest.approx(-14.4386, abs=1e-3) and -6 < beat["K_bits"] < beat["K_star_bits"] < -2.33
    with np.load(place / "runs" / "learned" / "checkpoint.npz") as file:  # what the weights say was learned is what is evaluated
        model = dpm.DPM.load(place / "runs" / "learned" / "checkpoint.npz")
        learned = dpm.LearnedSchedule(10, 1 - file["alpha_bar"][1]).forward(model.kernel.W["schedule.psi"])
    np.testing.assert_allclose(model.diffusion.alpha_bar, learned, rtol=1e-12)
    begun = dpm.LearnedSchedule(10, 1 - learned[1]).forward(np.zeros(10))
    assert np.abs(np.log(learned / begun)).max() > 0.1
    digits = json.loads((place / "runs" / "digits" / "result.json").read_text())
    assert digits["bits_per_dim"] == pytest.approx(-digits["K_bits"] / 64 + math.log2(digits["scale"]))
    assert digits["bits_per_dim"] < math.log2(digits["scale"]) - digits["L_null_bits"] / 64  # better than a Gaussian


def test_evaluate_again_is_the_same(place):
    before = json.loads((place / "runs" / "digits" / "result.json").read_text())
    done = script("train.py", "--evaluate", "runs/digits", cwd=place)
    assert done.returncode == 0 and "bits/dim" in done.stdout, done.stderr
    after = json.loads((place / "runs" / "digits" / "result.json").read_text())
    assert after["K_bits"] == before["K_bits"] and after["kl_bits"] == before["kl_bits"]


def test_several_runs_are_compared(place):
    done = script("train.py", "--evaluate", "runs/swissroll", "runs/learned", cwd=place)
    lines = [line.split() for line in done.stdout.splitlines()]
    rows = {line[1]: line for line in lines if len(line) == 10 and line[0] == "swissroll"}
    assert done.returncode == 0 and set(rows) == {"logsnr", "learned"} and (place / "runs" / "comparison.png").exists(), done.stderr
    r = json.loads((place / "runs" / "learned" / "result.json").read_text())
    assert float(rows["learned"][4]) == pytest.approx(r["K_bits"], abs=1e-3) and rows["learned"][3] == "10"


def test_parzen(place):
    """The estimate of Table 2 is log mean exp of Gaussians around the samples, at the best width, in bits of pixels in [0, 1]."""
    model = dpm.DPM.load(place / "runs" / "digits" / "checkpoint.npz")
    digits = data.load(place / "digits.npy")
    found = train.parzen_estimate(model, digits, number=30, valid=40)
    centres = train.to_bytes(model, model.sample(30, seed=1)).reshape(30, 64) / 255

    def by_hand(x, sigma):
        square = ((x[:, None] / 255 - centres) ** 2).sum(2)
        density = np.exp(-square / (2 * sigma ** 2)).mean(1) / (2 * np.pi * sigma ** 2) ** 32
        return np.log2(np.maximum(density, 1e-300))

    widths = np.logspace(-1, 0, 10)
    sigma = widths[np.argmax([by_hand(digits.train[-40:], s).mean() for s in widths])]
    expected = by_hand(digits.test, sigma)
    assert found["parzen_sigma"] == pytest.approx(sigma) and found["parzen_bits"] == pytest.approx(expected.mean(), rel=1e-9)
    assert found["parzen_bits_se"] == pytest.approx(expected.std() / math.sqrt(len(expected)))


def test_sample_script(place):
    """Samples, inpainting by part and by mask, denoising; the arrays keep what was given and change what was not."""
    mask = np.zeros((8, 8), np.uint8)
    mask[:3] = 255
    Image.fromarray(mask).save(place / "mask.png")
    for arguments in ((), ("--inpaint",), ("--inpaint", "mask.png", "--out", "masked"), ("--denoise", 0.5, "--r-schedule", "constant"), ("--checkpoint", "runs/swissroll", "--out", "roll")):
        done = script("sample.py", *arguments, *(() if "roll" in arguments else ("--checkpoint", "runs/digits")), "--number", 3, cwd=place)
        assert done.returncode == 0, done.stderr
    assert np.load(place / "runs" / "samples.npz")["samples"].shape == (3, 64) and np.load(place / "roll.npz")["samples"].shape == (3, 2)
    for name, unknown in [("runs/inpaint.npz", np.arange(8) < 4), ("masked.npz", (np.arange(8) < 3)[:, None])]:
        arrays = np.load(place / name)
        unknown = np.broadcast_to(unknown, (8, 8)).ravel()
        assert (arrays["unknown"] == unknown).all()
        kept = np.abs(arrays["samples"] - arrays["truth"][:, None])
        assert kept[..., ~unknown].max() == 0 and np.median(kept[..., unknown]) > 0.1
        assert arrays["samples"][..., unknown].std(1).min() > 0
    arrays, scale = np.load(place / "runs" / "denoise.npz"), float(np.load(place / "runs" / "digits" / "checkpoint.npz")["scale"])
    assert (arrays["given"] - arrays["truth"]).std() / scale == pytest.approx(0.5, rel=0.2)
    near = np.abs(arrays["samples"] - arrays["given"][:, None]).mean()
    assert near < 0.8 * np.abs(np.load(place / "runs" / "samples.npz")["samples"] - arrays["given"]).mean()  # pulled to what was given
    for name in ("runs/samples.png", "runs/inpaint.png", "masked.png", "runs/denoise.png", "roll.png"):
        with Image.open(place / name) as picture:
            assert np.asarray(picture).std() > 1


def test_sample_script_on_the_users_pictures(place):
    """Own pictures are completed and denoised as they are; a fraction of the pixels; particles; what the report says is what the arrays hold."""
    mine = rng(64).integers(0, 256, (2, 8, 8)).astype(np.uint8)
    for i in range(2):
        Image.fromarray(mine[i]).save(place / f"mine{i}.png")
    digits = ["--checkpoint", "runs/digits", "--input", "mine0.png", "mine1.png"]
    done = script("sample.py", *digits, "--inpaint", "0.25", "--particles", 3, "--out", "filled", cwd=place)
    assert done.returncode == 0, done.stderr
    arrays = np.load(place / "filled.npz")
    assert arrays["unknown"].sum() == 16 and arrays["samples"].shape == (2, 6, 64)
    assert (np.floor(arrays["samples"][..., ~arrays["unknown"]] + 1e-9) == mine.reshape(2, 1, 64)[..., ~arrays["unknown"]]).all()
    error = np.sqrt(((arrays["samples"].mean(1) - arrays["truth"])[:, arrays["unknown"]] ** 2).mean())
    psnr = float(done.stdout.split("mean of 6 samples")[1].split("PSNR")[1].split()[0])
    assert psnr == pytest.approx(20 * math.log10(255 / error), abs=0.06)
    train_images = np.load(place / "digits.npy").reshape(400, 64)
    distance = np.abs(arrays["nearest"][:, None] - train_images - 0.5).max(2).min(1)
    assert (distance <= 0.5 + 1e-3).all()  # a training image, but for its dequantisation
    square = lambda x: ((x[:, None] - train_images - 0.5) ** 2).sum(2)
    first = arrays["samples"][:, 0]
    assert (((arrays["nearest"] - first) ** 2).sum(1) < square(first).min(1) * 1.02 + 64).all()
    done = script("sample.py", *digits, "--denoise", "0.5", "--out", "cleaned", cwd=place)
    assert done.returncode == 0 and "PSNR" not in done.stdout, done.stderr  # nobody knows the truth
    assert (np.floor(np.load(place / "cleaned.npz")["given"] + 1e-9) == mine.reshape(2, 64)).all()  # and no noise was added


@pytest.mark.parametrize("run, number", [("swissroll", 50), ("digits", 3), ("heartbeat", 3)])
def test_sample_script_shows_trajectories(place, run, number):
    """A strip and a GIF of the way, for points, images and bits, samples and posteriors; the way ends where the samples are."""
    for flags in ((), ("--inpaint", "right")):
        done = script("sample.py", "--checkpoint", f"runs/{run}", "--number", number, *flags, "--trajectory", "--gif", "--out", f"way{run}", cwd=place)
        assert done.returncode == 0, done.stderr
        with Image.open(place / f"way{run}.gif") as gif:
            T = {"swissroll": 10, "digits": 20, "heartbeat": 30}[run]
            assert T / 4 < gif.n_frames <= T + 1  # frames that are the same become one
            first = np.asarray(gif.convert("L")).astype(float)
            gif.seek(gif.n_frames - 1)
            last = np.asarray(gif.convert("L")).astype(float)
        assert (first != last).mean() > 0.01
        with Image.open(place / f"way{run}-trajectory.png") as strip:
            assert np.asarray(strip).std() > 1
        if run == "digits" and not flags:
            with Image.open(place / "waydigits.png") as picture:
                assert np.abs(np.asarray(picture.convert("L")) - last).mean() < 3


@pytest.mark.parametrize("first, threads, warns", [("numpy", None, True), ("numpy", "1", False), ("math", None, False)])
def test_a_warning_where_blas_has_its_threads_already(first, threads, warns):
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")} | ({"OPENBLAS_NUM_THREADS": threads} if threads else {})
    done = subprocess.run([sys.executable, "-c", f"import {first}, dpm"], cwd=HERE, env=environment, text=True, capture_output=True)
    assert done.returncode == 0 and ("import dpm before numpy" in done.stderr) == warns


def test_readme_examples(tmp_path, monkeypatch):
    """The Python of the README runs as it stands, one block after the other, and leaves its pictures; its samples are what it says."""
    blocks = (HERE / "README.md").read_text().split("```python\n")[1:]
    code = "\n".join(block.split("```")[0] for block in blocks).replace('"data/', f'"{HERE}/data/')
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert (names["x"][:, 0] == 0.5).all() and {p.name for p in tmp_path.iterdir()} >= {"particles.png", "bright.png"}
    plain, bright, ink = names["rows"][:8].mean(), names["rows"][8:].mean(), names["ink"]
    assert bright == pytest.approx(ink, abs=0.1 * (ink - plain))


def arrays_of(run):
    with np.load(run / "checkpoint.npz") as file:
        return {name: file[name] for name in ("theta", "average", "m", "v", "step")}


@pytest.mark.parametrize("dataset, how", [("swissroll", signal.SIGKILL), ("digits.npy", signal.SIGKILL), ("digits.npy", signal.SIGINT)])
def test_stopped_in_the_middle_and_resumed_bit_for_bit(tmp_path, dataset, how):
    """Killed or interrupted after its first checkpoint, then resumed: the same bits as a run that was never stopped."""
    np.save(tmp_path / "digits.npy", small_digits())
    flags = ["--dataset", dataset, "--steps", "800", "--timesteps", "20", "--batch-size", "64", "--seed", "5"]

    def begin(out):
        return subprocess.Popen([sys.executable, HERE / "train.py", *flags, "--out", out], cwd=tmp_path, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

    straight, process = begin("straight"), begin("run")
    log = tmp_path / "run" / "log.csv"
    while not (log.exists() and log.read_text().count("\n") > 4):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(how)
    output, _ = process.communicate()
    stopped_at = int(arrays_of(tmp_path / "run")["step"])
    assert 0 < stopped_at < 800
    if how == signal.SIGINT:
        assert process.returncode == 130 and "--resume" in output
    done = script("train.py", "--resume", "run", cwd=tmp_path)
    assert done.returncode == 0 and f"steps {stopped_at}..800" in done.stdout, done.stderr
    straight.communicate()
    assert straight.returncode == 0
    resumed, never_stopped = arrays_of(tmp_path / "run"), arrays_of(tmp_path / "straight")
    for name in resumed:
        assert (resumed[name] == never_stopped[name]).all(), name
    numbers = [row.split(",")[0] for row in log.read_text().splitlines()[1:]]
    assert len(numbers) == len(set(numbers)) and numbers[-1] == "800"  # every step logged once


def test_a_loss_that_turns_nan_stops_and_keeps_the_last_checkpoint(tmp_path):
    done = script("train.py", "--lr", "1e30", "--steps", 400, cwd=tmp_path)
    assert done.returncode == 2 and "gradient of the loss is" in done.stderr and "smaller --lr" in done.stderr and "Traceback" not in done.stderr
    checkpoint = tmp_path / "runs" / "swissroll" / "checkpoint.npz"
    assert not checkpoint.exists() or np.isfinite(np.load(checkpoint)["theta"]).all()


def test_a_full_disk_loses_no_earlier_checkpoint(place, tmp_path):
    """No file may grow beyond 30 kB: the new checkpoint cannot be written, the old one is still whole."""
    shutil.copytree(place / "runs" / "swissroll", tmp_path / "run")
    before = (tmp_path / "run" / "checkpoint.npz").read_bytes()
    done = script("train.py", "--resume", "run", "--steps", 400, cwd=tmp_path,
                  preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)))
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error:"), done.stderr
    assert (tmp_path / "run" / "checkpoint.npz").read_bytes() == before
    assert not list((tmp_path / "run").glob(".part-*"))


def test_bad_input_gets_one_line_and_status_2(place, tmp_path):
    """Every mistake of a user, through the real scripts: one line that names it, and nothing written."""
    digits = np.load(place / "digits.npy")
    wrong = {"nan": np.where(rng(26).random((20, 3)) < 0.1, np.nan, 1.0), "constant": np.ones((20, 3)), "flat": np.ones(20),
             "ints": np.arange(60).reshape(20, 3), "text": np.array([["a", "b"]] * 20), "few": np.ones((3, 2)), "none": np.ones((0, 2))}
    for name, array in wrong.items():
        np.save(tmp_path / f"{name}.npy", array)
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    np.savez(tmp_path / "unnamed.npz", a=digits, b=digits)
    np.savez(tmp_path / "unlike.npz", train=digits, test=digits[:, :5])
    (tmp_path / "cut.npy").write_bytes((place / "digits.npy").read_bytes()[:5000])
    (tmp_path / "cut.idx").write_bytes(idx(digits)[:-10])
    (tmp_path / "cut.gz").write_bytes(gzip.compress(idx(digits))[:-50])
    (tmp_path / "noise.idx").write_bytes(b"something else entirely")
    (tmp_path / "folder").mkdir()
    Image.fromarray(np.eye(5, dtype=np.uint8) * 255).save(tmp_path / "mask5.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    shutil.copytree(place / "runs" / "digits", tmp_path / "digits")
    with np.load(tmp_path / "digits" / "checkpoint.npz") as file:
        content = dict(file)
    np.savez(tmp_path / "newer.npz", **(content | {"format": 99}))
    config = json.loads(str(content["config"]))
    np.save(tmp_path / "digits.npy", digits[:, :6])  # the data of the checkpoint, changed since
    np.savez(tmp_path / "gone.npz", **(content | {"config": json.dumps(config | {"dataset": "gone.npy"})}))
    broken = tmp_path / "broken"  # a copy of the program whose MNIST is damaged
    shutil.copytree(HERE, broken, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__", "model.npz"))
    raw = bytearray(gzip.decompress((broken / "data" / "mnist" / "t10k-images-idx3-ubyte.gz").read_bytes()))
    raw[5000] ^= 1
    (broken / "data" / "mnist" / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(raw), 1))
    known = ["--checkpoint", str(place / "runs" / "digits")]
    cases = [(["train.py", "--dataset", name], says) for name, says in [
        ("nonsense", "no data set or file"), ("nan.npy", "NaN"), ("constant.npy", "constant"), ("flat.npy", "must be (N, D)"),
        ("ints.npy", "uint8"), ("text.npy", "uint8"), ("few.npy", "at least 20"), ("none.npy", "must be (N, D)"), ("objects.npy", "cannot be read"),
        ("unnamed.npz", "name one of them"), ("unlike.npz", "must agree"), ("cut.npy", "cannot be read"), ("cut.idx", "damaged"),
        ("cut.gz", "cannot be read"), ("noise.idx", "not an IDX"), ("folder", "without pictures"), ("swissroll:x", "noise of the roll")]]
    cases += [(["train.py", "--dataset", "heartbeat", *flags], says) for flags, says in [
        (("--schedule", "learned"), "is binary"), (("--form", "paper"), "is binary"), (("--rate", "1"), "between 0.0001 and")]]
    cases += [(["train.py", "--rate", "0.5"], "--rate is for binary data"), (["train.py", "--schedule", "learned", "--form", "paper"], "needs --form correction"),
              (["train.py", "--parzen"], "--evaluate DIR"), (["train.py", "--evaluate", place / "runs" / "swissroll", "--parzen"], "images of bytes"),
              (["train.py", "--evaluate", place / "runs" / "swissroll", "--steps", "5"], "leave --steps away")]
    cases += [([broken / "train.py", "--dataset", "mnist"], "checksum"),
              (["train.py", "--out", "digits"], "another run"), (["train.py", "--steps", "0"], "must be positive"),
              (["train.py", "--timesteps", "1"], "2 or more"), (["train.py", "--resume", "nowhere"], "no such checkpoint"),
              (["train.py", "--resume", place / "runs" / "digits", "--lr", "1"], "was started with"),
              (["train.py", "--resume", place / "runs" / "digits", "--focus", "-1"], "--focus must be 0 or more"),
              (["train.py", "--focus", "3", "--schedule", "learned"], "--focus changes what is trained"),
              (["train.py", "--resume", place / "runs" / "digits", "--steps", "0"], "must be positive"),
              (["train.py", "--resume", place / "runs" / "digits", "--steps", "1"], "steps already"),
              (["train.py", "--evaluate", "newer.npz"], "format 99"), (["train.py", "--evaluate", "cut.npy"], "not a checkpoint"),
              (["train.py", "--evaluate", "gone.npz"], "gone.npy"), (["train.py", "--evaluate", "digits"], "was trained on"),
              (["sample.py", "--checkpoint", "nowhere"], "no such checkpoint"), (["sample.py", "--checkpoint", "digits", "--inpaint"], "was trained on"),
              (["sample.py", "--checkpoint", "mnist-like", "--denoise", "-1"], "positive"), (["sample.py", *known, "--number", "0"], "positive"),
              (["sample.py", *known, "--particles", "4"], "go with"), (["sample.py", *known, "--input", "mask5.png"], "go with"),
              (["sample.py", "--checkpoint", place / "runs" / "heartbeat", "--inpaint", "--input", "mask5.png"], "not made of 8-bit pictures")]
    if dpm.backend() is np:
        cases += [(["train.py", "--gpu"], "--gpu:"), (["sample.py", *known, "--gpu"], "--gpu:")]
    files = sorted(tmp_path.rglob("*"))

    def check(case):
        arguments, says = case
        done = script(*arguments, cwd=tmp_path)
        lines = done.stderr.strip().splitlines()
        return None if done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0] else (arguments, done)

    with ThreadPoolExecutor(4) as pool:
        assert not list(filter(None, pool.map(check, cases)))
    assert [p for p in sorted(tmp_path.rglob("*")) if "__pycache__" not in str(p)] == [p for p in files if "__pycache__" not in str(p)]
    for mask, says in [("mask5.png", "the mask is 5 x 5"), ("black.png", "nothing is missing"), ("nowhere.png", "nor a mask"), ("cut.idx", "not a picture")]:
        done = script("sample.py", *known, "--inpaint", tmp_path / mask, cwd=place)
        assert done.returncode == 2 and says in done.stderr
    for flags, says in [(("--inpaint", "1.5"), "between 0 and 1"), (("--inpaint", "0.001"), "nothing is missing"), (("--inpaint", "--input", tmp_path / "mask5.png"), "8 x 8 are needed"),
                        (("--denoise", "1", "--input", tmp_path / "cut.idx"), "not a picture"), (("--inpaint", "--input", "gone.png"), "no such picture")]:
        done = script("sample.py", *known, *flags, cwd=place)
        assert done.returncode == 2 and says in done.stderr


# ---------------------------------------------------------------------------------------------------------------------------
# The CuPy path: with a stand-in that is stricter than CuPy, and with CuPy where there is a device
# ---------------------------------------------------------------------------------------------------------------------------

class DeviceArray:
    """An array that behaves as if it lay on a device: it meets only its like and scalars, and NumPy cannot get at it."""

    __array_ufunc__ = None  # NumPy's functions refuse it

    def __init__(self, a):
        self.a = a

    def __array__(self, *_, **__):
        raise TypeError("implicit conversion of a device array to NumPy")

    def get(self):
        return np.array(self.a)

    def __len__(self):
        return len(self.a)

    def __float__(self):
        return float(self.a)

    def __bool__(self):
        return bool(self.a)

    def __getattr__(self, name):
        if name.startswith("__"):  # such as NumPy's ways to the memory
            raise AttributeError(name)
        value = getattr(self.a, name)
        return value if name in ("shape", "dtype", "ndim", "size") else device(value)

    def __getitem__(self, index):
        return on_device(self.a.__getitem__)(index)

    def __setitem__(self, index, value):
        on_device(self.a.__setitem__)(index, value)


def host(x):
    """The NumPy array inside, of a thing that may be on the device."""
    if isinstance(x, np.ndarray):
        raise TypeError("a NumPy array where a device array is needed")
    if isinstance(x, (tuple, list)):
        return type(x)(map(host, x))
    return x.a if isinstance(x, DeviceArray) else x


def device(x):
    if callable(x):
        return on_device(x)
    return DeviceArray(x if isinstance(x, np.ndarray) else np.asarray(x)) if isinstance(x, (np.ndarray, np.generic)) else x


def on_device(f):
    return lambda *args, **options: device(f(*host(args), **{k: host(v) for k, v in options.items()}))


def operator(name):
    def method(self, *others):
        value = on_device(getattr(self.a, name))(*others)
        return self if name.startswith("__i") and name != "__invert__" else value
    return method


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul", "and", "or"):
    for _prefix in ("", "r", "i"):
        setattr(DeviceArray, f"__{_prefix}{_name}__", operator(f"__{_prefix}{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "floordiv", "mod"):
    setattr(DeviceArray, f"__{_name}__", operator(f"__{_name}__"))


class StandIn:
    """In place of the module cupy; remembers which of its names were used."""

    def __init__(self):
        self.used = set()
        self.random = self.cuda = self

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        self.used.add(name)
        return on_device(getattr(np, name))

    def asarray(self, a, dtype=None):
        return DeviceArray(np.asarray(a.a if isinstance(a, DeviceArray) else a, dtype))

    def Philox4x3210(self, seed):
        return np.random.Philox(np.random.SeedSequence(seed))

    def Generator(self, bits):
        generator = np.random.Generator(bits)

        class Draws:  # the signatures of CuPy's generator
            standard_normal = staticmethod(lambda size=None, dtype=np.float64, out=None: device(generator.standard_normal(size, dtype, out)))
            random = staticmethod(lambda size=None, dtype=np.float64, out=None: device(generator.random(size, dtype, out)))
            integers = staticmethod(lambda low, high=None, size=None, dtype=np.int64, endpoint=False: device(generator.integers(low, high, size, dtype, endpoint)))
        return Draws

    @property
    def runtime(self):
        return type("runtime", (), {"getDeviceProperties": lambda _: {"name": b"stand-in"}})


def test_the_stand_in_refuses_what_cupy_refuses():
    xp, a = StandIn(), StandIn().asarray(np.arange(3.0))
    for mix in (lambda: a + np.ones(3), lambda: np.ones(3) + a, lambda: np.sqrt(a), lambda: np.asarray(a), lambda: xp.exp(np.ones(3)),
                lambda: a.__setitem__(slice(None), np.ones(3)), lambda: a[np.array([0])], lambda: xp.matmul(a, a, out=np.ones(1))):
        with pytest.raises(TypeError):
            mix()
    a *= 2
    assert isinstance(a, DeviceArray) and (to := a.sum()).get() == 6 and isinstance(to, DeviceArray)


@pytest.mark.parametrize("xp", [StandIn(), "cupy"])
@pytest.mark.parametrize("shape, binary", [((1, 1, 3), False), ((5, 4, 2), False), ((1, 1, 4), True), ((4, 4, 1), True)])
def test_gpu_agrees_with_cpu(xp, shape, binary, tmp_path):
    """The same weights, data and noise on both: bound, entropies, estimates, samples and posterior samples, with one particle and with
    several, agree; gradients agree in float64, also that of the input and of the schedule."""
    if xp == "cupy":
        xp = dpm.backend()
        if xp is np:
            pytest.skip("no GPU here")
    lower = {} if shape[0] == 1 else dict(sights=2)
    cpu = small_model(shape, stir=0.1, learned=not binary, **lower)
    x0 = rng(27).standard_normal((9, cpu.kernel.D))
    if binary:
        q, x0 = dpm.Binomial(dpm.schedule("cosine", 12, 1e-3), rate=0.3), (x0 > 0) * 1.0
        kernel = dpm.Kernel(q, shape, maps=0, middle=5, upper=6, scales=(), patch=1 if shape[0] == 1 else 3, dtype="float64", **lower)
        kernel.theta += 0.1 * rng(66).standard_normal(kernel.theta.shape)
        cpu = dpm.DPM(q, kernel, threads=2)
    cpu.save(tmp_path / "c.npz")
    gpu = dpm.DPM.load(tmp_path / "c.npz", xp)
    ours, theirs = cpu.bound(x0, rng(28)), gpu.bound(x0, rng(28))
    np.testing.assert_allclose(theirs["kl"], ours["kl"], rtol=1e-8)
    np.testing.assert_allclose(theirs["K_each"], ours["K_each"], rtol=1e-8)
    for a, b in zip(cpu.entropy_bounds(x0), gpu.entropy_bounds(x0)):
        np.testing.assert_allclose(b, a, rtol=1e-8)
    np.testing.assert_allclose(gpu.log_weights(x0, 3, rng(67)), cpu.log_weights(x0, 3, rng(67)), rtol=1e-6)
    r = [dpm.Observation(x0, np.where(np.arange(x0.shape[1]) % 2, 0.3, 0), a) for a in (np, xp)]
    for how in dpm.HOW:
        crowd = [model.sample(9, 1, [r_x, dpm.Function(lambda x: 0.1 * x.sum(1), lambda x: 0 * x + 0.1)], how, 3) for model, r_x in zip((cpu, gpu), r)]
        np.testing.assert_allclose(dpm.to_host(crowd[1]), crowd[0], rtol=1e-6)
    np.testing.assert_allclose(dpm.to_host(gpu.sample(9)), cpu.sample(9), rtol=1e-6)
    np.testing.assert_allclose(dpm.to_host(gpu.sample(9, r=r[1])), cpu.sample(9, r=r[0]), rtol=1e-6)
    t = np.arange(9) % 11 + 2
    dout, inputs = rng(29).standard_normal((9, cpu.kernel.D, cpu.diffusion.outputs)), []
    for model in (cpu, gpu):
        a = model.xp.asarray
        inputs.append(model.kernel.gradient(a(x0), a(t), lambda s, out: a(dout)[s], inputs=not binary))
    if not binary:
        for ours, theirs in zip(*inputs):
            np.testing.assert_allclose(dpm.to_host(theirs), ours, rtol=1e-6, atol=1e-10)
        dlogsnr = [model.diffusion.dlogsnr(model.xp.asarray(t), model.xp.asarray(x0[:, 0]), model.xp.asarray(x0[:, 1])) for model in (cpu, gpu)]
        psi = [dpm.to_host(model.learned.backward(d)) for model, d in zip((cpu, gpu), dlogsnr)]
        np.testing.assert_allclose(psi[1], psi[0], rtol=1e-8)
    np.testing.assert_allclose(dpm.to_host(gpu.kernel.grad), cpu.kernel.grad, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("dataset, flags", [("swissroll", []), ("digits.npy", []), ("heartbeat", []), ("digits.npy", ["--form", "paper"]),
                                            ("digits.npy", ["--schedule", "learned"])])
def test_scripts_on_the_stand_in(dataset, flags, tmp_path, monkeypatch):
    """train.py --gpu from data to figures, with the stand-in as cupy: no step of it mixes host and device."""
    cupy = StandIn()
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.chdir(tmp_path)
    np.save("digits.npy", rng(30).integers(0, 256, (40, 6, 6)).astype(np.uint8))
    monkeypatch.setattr(sys, "argv", ["train.py", "--gpu", "--dataset", dataset, "--steps", "4", "--timesteps", "6", "--batch-size", "8", *flags])
    handler = signal.getsignal(signal.SIGINT)
    try:
        train.main()
    finally:
        signal.signal(signal.SIGINT, handler)
    run = next(pathlib.Path("runs").iterdir())
    assert json.loads((run / "result.json").read_text())["device"] == "stand-in"
    assert cupy.used <= IN_CUPY


# Looked up in CuPy 14.2, in cupy, cupy.random and cupy.cuda
IN_CUPY = set("abs add arange asarray broadcast_to clip concatenate cos cumsum divide empty empty_like exp full isinf linspace log "
              "matmul maximum minimum multiply ones sin sqrt stack subtract tanh where zeros zeros_like".split())


def test_the_list_of_cupys_names():
    cupy = pytest.importorskip("cupy")
    assert all(hasattr(cupy, name) for name in IN_CUPY) and hasattr(cupy.random, "Philox4x3210") and hasattr(cupy.random, "Generator")
