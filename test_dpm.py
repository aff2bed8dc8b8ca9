"""The truths that dpm.py, data and the scripts are held to: closed forms, enumerations, difference
quotients, and real runs.

    python -m pytest -q

MAP says where each equation of the papers stands in dpm.py, and which tests hold it. SD is
Sohl-Dickstein et al. 2015, DDPM is Ho et al. 2020, DDIM is Song et al. 2020.
"""
import dpm  # first: it keeps BLAS to one thread, before numpy starts it

import contextlib
import io
import json
import math
import operator
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from decimal import Decimal, localcontext

import numpy as np
import pytest
from PIL import Image
from pytest import approx
from scipy.signal import correlate2d
from scipy.special import log_ndtr, logsumexp, ndtr, softmax

import data
import sample
import train
from data import evaluation, figures, observations, runs, sampling

HERE = pathlib.Path(__file__).parent
LN2 = math.log(2)

MAP = [  # equation, what it says, where it is in dpm.py, which tests hold it
    ("SD 1-3, Table App.1", "the forward diffusion q, and its jump from x_0; DDPM 2, 4",
     "schedule Diffusion.q_step Diffusion.q_jump Diffusion.pi Gaussian.kept Binomial.kept",
     "test_schedule test_q_jump_is_the_iterated_step test_binomial_q_by_enumeration "
     "test_the_chain_forgets"),
    ("SD 4, 5", "the reverse process p; DDPM 1",
     "Gaussian.p_back Binomial.p_back DPM.p_back DPM.sample",
     "test_what_v_and_u_mean test_binomial_belief test_heartbeat_K_star "
     "test_samples_have_the_variance_of_their_kernels"),
    ("SD 6-9", "the probability of the model, by Jarzynski's average",
     "log_weights",
     "test_log_likelihood_of_linear_kernels test_K_by_enumeration"),
    ("SD 10-14, 37-51", "the log likelihood and the bound K; DDPM 3, 5",
     "DPM.bound Gaussian.kl Binomial.kl Diffusion.H_q Diffusion.H_p Diffusion.kl_to_pi",
     "test_kl_is_the_integral test_K_star_of_gaussian_data test_K_by_enumeration test_entropies "
     "test_at_initialisation_K_is_L_null test_parts_sum_to_K test_swissroll_K_star"),
    ("SD 15", "training: the gradient of K", "DPM.gradient stratified Optimiser.momentum DPM.step",
     "test_gradient_of_every_objective test_stratified_estimate_is_the_sum_over_all_t "
     "test_orthogonal test_optimiser"),
    ("SD section 2.4.1", "K ascended in beta_2..T, with frozen noise",
     "LearnedSchedule LearnedSchedule.dlevel",
     "test_learned_schedule test_learned_schedule_backward test_gradient_of_every_objective"),
    ("SD 16-22, 52-61", "p(x_0) r(x_0) and its perturbed kernels, for any r",
     "Posterior Observation Function Normal.times Normal.tilted Function.averaged Bernoulli.times "
     "Bernoulli.tilted",
     "test_normal test_bernoulli test_posterior_samples test_posteriors_against_the_truth "
     "test_a_function_is_averaged_along_its_gradient"),
    ("SD 21 over 22", "the factor that eq. 22 drops, kept as a weight", "resampled stratified",
     "test_particles_are_exact test_resampling test_posteriors_against_the_truth"),
    ("SD 23, section 2.5", "r along the trajectory",
     "Posterior.predicted Posterior.of_x0 Gaussian.dp_x0 Binomial.dp_x0 Gaussian.guided",
     "test_denoising_follows_its_recursion test_r_of_what_a_network_predicts "
     "test_guidance_moves_the_mean test_guidance_by_a_function "
     "test_repeats_follow_their_recursion test_repeats_come_closer_to_the_truth"),
    ("SD section 2.5", "times (p / p_weak)^w", "Contrast.forward",
     "test_a_contrast_is_a_ratio_of_kernels test_a_contrast_follows_its_recursion"),
    ("SD 24, 25-36", "bounds on the entropy of a reverse step", "entropy_bounds",
     "test_entropy_bounds_of_gaussian_data test_entropy_bounds_of_bits"),
    ("SD 44", "the fixed last step", "DPM.p_back", "test_the_last_step"),
    ("SD 62-65, figure D.1", "the paper's network and its kernel",
     "paper Bumps Pooled Whole PaperKernel", "test_layers test_networks test_readouts"),
    ("DDPM 6, 7", "q turned around, q(x_{t-1} | x_t, x_0); SD appendix B",
     "Gaussian.q_back Binomial.q_back", "test_q_back_two_ways test_binomial_q_by_enumeration"),
    ("DDPM 8-12, 14", "mu~ or eps as the target, and L_simple: other weights of one error",
     "objective Gaussian.velocity Epsilon", "test_objectives_are_their_definitions test_readouts "
     "test_gradient_of_every_objective test_focused_weighs_what_decides_the_picture"),
    ("DDPM section 3.2", "the two fixed variances, ends of SD 24",
     "Gaussian.p_x0 Gaussian.p_back", "test_what_v_and_u_mean test_kl_is_the_integral"),
    ("DDPM 13", "the discretised decoder", "Gaussian.decode",
     "test_a_decoder_of_few_grey_levels test_uniform_bytes_have_eight_bits"),
    ("DDIM 12, 16", "fewer steps, with less noise or none",
     "Diffusion.shortened DPM.shortened Gaussian.p_back",
     "test_a_shortened_chain_is_a_diffusion test_steps_with_less_noise"),
    ("SD section 2.5", "denoising: the chain from where the noise is", "Gaussian.until DPM.until",
     "test_a_chain_that_begins_at_noisy_data"),
]


def test_the_map_names_what_exists():
    for _, _, functions, tests in MAP:
        for name in functions.split():
            assert callable(operator.attrgetter(name)(dpm)), name
        for name in tests.split():
            assert callable(globals()[name]), name


@pytest.mark.parametrize("first, threads, warns", [
    ("numpy", None, True), ("numpy", "1", False), ("math", None, False)])
def test_a_warning_where_blas_has_its_threads_already(first, threads, warns):
    environment = {n: value for n, value in os.environ.items() if not n.endswith("_NUM_THREADS")}
    environment |= {"OPENBLAS_NUM_THREADS": threads} if threads else {}
    done = subprocess.run([sys.executable, "-c", f"import {first}, dpm"], cwd=HERE, text=True,
                          env=environment, capture_output=True)
    assert done.returncode == 0 and ("import dpm before numpy" in done.stderr) == warns


def rng(*seed):
    return np.random.default_rng(seed)


def close(found, expected, rtol=1e-9, atol=1e-12):
    np.testing.assert_allclose(found, expected, rtol, atol)


def refused(says):
    return pytest.raises(dpm.InputError, match=says)


def gaussian(T=12, beta_1=1e-2, kind="logsnr", **options):
    return dpm.Gaussian(dpm.schedule(kind, T, beta_1), **options)


def binomial(T=12, beta_1=1e-2, kind="cosine", rate=0.3, **options):
    return dpm.Binomial(dpm.schedule(kind, T, beta_1), rate=rate, **options)


BYTES = dict(half=0.25, ends=[-0.75, 0.75])  # a decoder of four grey levels
FEATURES = dict(scales=(0, 2), edges=(-1.0, 0.3))
SIZES = dict(mlp=dict(width=16, layers=2, time=8, **FEATURES),
             unet=dict(widths=(4, 6), head=5, time=8, **FEATURES),
             paper=dict(pools=(1, 2, 3), maps=2, hidden=5, width=6, bumps=3))
NETWORKS = [("mlp", (1, 1, 3)), ("unet", (5, 7, 2)), ("paper", (5, 4, 2))]


def small_model(q=None, shape=(1, 1, 3), network="mlp", stir=0.2, predict="v", learned=False,
                **options):
    """A model with random weights everywhere, the last layer included, unless stir is 0."""
    about = dict(network=network, sizes=SIZES[network], predict=predict, dataset="x")
    options = dict(shift=0.5, scale=2.0, threads=2, dtype="float64") | options
    model = dpm.build(q or gaussian(), shape, about, learned, **options)
    model.theta += (stir * rng(7).standard_normal(len(model.theta))).astype(model.dtype)
    model.follow_schedule()
    return model


def data_for(q, n, D, *seed):
    """Numbers, bits, or grey levels, as q needs them."""
    x0 = rng(*seed).standard_normal((n, D))
    if isinstance(q, dpm.Binomial):
        return (x0 > 0.3) * 1.0
    return np.clip(np.floor(x0 * 2) / 2 + 0.25, -0.75, 0.75) if q.discretised else x0


def in_slices_of(size, pieces=dpm.pieces):
    """In place of dpm.pieces, which does not cut so few examples."""
    return lambda n, pixels, at_once, xp, *share: pieces(n, 1, size, np, *share)


def quotient(f, a, direction, h=1e-6):
    """(f(a + h d) - f(a - h d)) / 2h, by changing `a` in place."""
    saved, values = a.copy(), []
    for sign in (1, -1):
        a += sign * h * direction
        values.append(f())
        a[...] = saved
    return (values[0] - values[1]) / (2 * h)


def steep(gradient, *seed):
    """A random direction that is not all but level."""
    d = rng(*seed).standard_normal(gradient.shape)
    return d / np.linalg.norm(d) + gradient / max(np.linalg.norm(gradient), 1e-9)


class Signs:
    """In place of a random generator: noise whose first two moments over the examples are exactly
    those of N(0, 1). The mean of a quadratic is then its expectation."""

    def __init__(self, signs):
        self.signs = signs

    def random(self):
        return 0.5

    def permuted(self, t, axis):
        return t

    def spawn(self, number):
        return [self] * number

    def standard_normal(self, shape, dtype=float):
        assert shape == self.signs.shape
        return self.signs.astype(dtype)


# ------------------------------------------------------------------------------------------------
# 1. The diffusions
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [2, 10, 1000])
@pytest.mark.parametrize("kind", dpm.SCHEDULES)
def test_schedule(kind, T):
    a, t = dpm.schedule(kind, T, 1e-4), np.arange(2, T + 1)
    first = 0.1 / T if kind == "linear" else 1e-4
    assert a.shape == (T + 1,) and a[0] == 1 and a[1] == approx(1 - first, rel=1e-12)
    assert (np.diff(a) < 0).all() and (a >= 0).all()
    if kind == "paper":  # 1 - 1 / (T - s + 1) = (T - s) / (T - s + 1) telescopes
        close(a[2:], (1 - 1e-4) * (T - t) / (T - 1))
    elif kind == "logsnr":
        close(np.diff(np.log((1 - a[1:]) / a[1:]), 2), 0, atol=1e-8)
        assert a[-1] == approx(1 / (1 + math.exp(10)))
        close(gaussian(T, 1e-8).level[1:], np.linspace(math.log(1e-8), 10, T), rtol=1e-6)
    elif kind == "cosine":
        angle = 0.99 * np.pi / 2 * (np.arange(1, T + 1) - 1) / (T - 1)
        close(np.arccos(a[1:] / (1 - 1e-4)), angle, atol=1e-9)
    elif kind == "linear":
        beta = 1 - a[1:] / a[:-1]
        assert beta[-1] == approx(min(20 / T, 0.999)) and (a[-1] < 1e-3 or T == 2)
        assert T == 10 or abs(np.diff(beta, 2)).max(initial=0) < 1e-12  # a line, where uncut
    for says, *wrong in [("a schedule needs", kind, 1, 0.1), ("a schedule needs", kind, T, 0.0),
                         ("a schedule needs", kind, T, 0.9), ("no schedule", "x", T, 0.1)]:
        with refused(says):
            dpm.schedule(*wrong)


@pytest.mark.parametrize("kind", ["logsnr", "paper", "linear"])
def test_q_jump_is_the_iterated_step(kind):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, t times."""
    q, mean, variance = gaussian(20, 1e-3, kind), np.array([[1.7]]), 0.0
    for t in range(1, 21):
        step, jump = q.q_step(mean, np.array([t])), q.q_jump(1.7, np.array([t]))
        beta = 1 - q.alpha_bar[t] / q.alpha_bar[t - 1]
        close(step.mean, math.sqrt(1 - beta) * mean)
        close(step.variance, beta)
        mean, variance = step.mean, (1 - beta) * variance + beta
        close(jump.mean, mean)
        close(jump.variance, variance)


def test_normal():
    """Entropy, density, products and draws, against integrals on a grid."""
    x = np.linspace(-15, 15, 30001)[:, None]
    total = lambda y: np.trapezoid(y, x[:, 0])
    for mean, variance, y, s2, g in [(0.3, 0.5, 1.7, 0.64, 0.7), (-1, 2, 0.4, 0.64, -0.2),
                                     (0.5, 0.3, 1, 0.01, 1.0)]:
        p = dpm.Normal(np, np.array([[mean]]), np.array([[variance]]))
        log_p = p.log_density(x)
        assert total(np.exp(log_p)) == approx(1)
        assert p.entropy() == approx(-total(np.exp(log_p) * log_p))
        for log_r, (product, log_Z) in [
                (-(x - y) ** 2 / 2 / s2 - 0.5 * math.log(s2), p.times(y, np.array([[s2]]))),
                (g * x, p.tilted(np.array([[g]])))]:
            weights = np.exp(log_p + log_r[:, 0])
            Z = total(weights)
            assert log_Z == approx(math.log(Z), abs=1e-8)
            assert product.mean == approx(total(weights * x[:, 0]) / Z, rel=1e-8)
            spread = total(weights * (x - product.mean)[:, 0] ** 2) / Z
            assert product.variance == approx(spread, rel=1e-8)
    p = dpm.Normal(np, np.full((1, 3), 0.3), np.array([0.5]))
    product, log_Z = p.times(np.array([1.0, 2.0, 0.0]), np.array([0, 1e-18, np.inf]))
    close(product.mean, [[1, 2, 0.3]])  # known; nearly known; unknown
    close(product.variance, [0, 0, 0.5])
    assert log_Z == approx(sum(-(y - 0.3) ** 2 - 0.5 * math.log(0.5) for y in (1, 2)))
    close(p.entropy(), 1.5 * math.log(math.pi * math.e))  # one variance for three coordinates
    close(p.draw(np.array([[1, -2, 0.0]])), 0.3 + math.sqrt(0.5) * np.array([[1, -2, 0]]))
    assert p.noise((2, 3), rng(1), np.float32).dtype == np.float32
    few = dpm.Normal(np, rng(1).random((4, 2)), rng(2).random((4, 1))).take(np.array([2, 2, 0]))
    assert (few.mean == rng(1).random((4, 2))[[2, 2, 0]]).all()
    assert (few.variance == rng(2).random((4, 1))[[2, 2, 0]]).all()


def states_of(n):
    """All 2^n states of n bits, (2^n, n)."""
    return (np.arange(2 ** n)[:, None] >> np.arange(n) & 1).astype(float)


def test_bernoulli():
    """Entropy, density, products and draws, against sums over all states of three bits."""
    one, states = np.array([[0.3, 0.85, 1e-20]]), states_of(3)
    p = dpm.Bernoulli(np, one, 1 - one)
    log_p = p.log_density(states)
    P = np.exp(log_p)
    close(P, np.where(states == 1, one, 1 - one).prod(1))
    assert p.entropy() == approx(-(P * log_p).sum(), rel=1e-12)
    close(p.variance, one * (1 - one))
    log_r0, log_r1, g = rng(3).standard_normal((3, 3))
    for log_r, (product, log_Z) in [
            (states @ log_r1 + (1 - states) @ log_r0, p.times(log_r0, log_r1)),
            (states @ g, p.tilted(g))]:
        weights = P * np.exp(log_r)
        assert log_Z == approx(np.log(weights.sum()))
        close(product.one[0], weights @ states / weights.sum())
        close(product.zero, 1 - product.one)
    far, log_Z = p.tilted(np.full(3, 800.0))  # where exp overflows
    close(far.one, 1.0)
    close(log_Z, 2400 + np.log(one).sum())
    u = np.linspace(0, 1, 1001)[:-1, None].repeat(3, 1)
    close(p.draw(u).mean(0), one[0], atol=1e-3)
    sure = dpm.Bernoulli(np, np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]))
    assert sure.entropy() == 0 and (sure.draw(np.array([[0.999, 0.0]])) == [[1, 0]]).all()
    assert sure.log_density(np.array([[1, 1.0]])) == -np.inf
    few = dpm.Bernoulli(np, u, 1 - u).take(np.array([5, 5, 2]))
    assert (few.one == u[[5, 5, 2]]).all() and (few.zero == 1 - u[[5, 5, 2]]).all()


def test_q_back_two_ways():
    """By its formula, and by Bayes from q(x_{t-1} | x_0) q(x_t | x_{t-1}): precisions add."""
    q, t = gaussian(15), np.arange(2, 16)
    x0, xt = rng(1).standard_normal((2, 14, 3))
    back = q.q_back(x0, xt, t)
    prior, beta = 1 - q.alpha_bar[t - 1][:, None], q.beta[t][:, None]
    precision = 1 / prior + (1 - beta) / beta
    close(back.variance, 1 / precision)
    close(back.mean, (np.sqrt(1 - prior) * x0 / prior + np.sqrt(1 - beta) * xt / beta) / precision)


def test_what_v_and_u_mean():
    """They are x_0's mean and spread; p(x_{t-1} | x_t) is q_back averaged over this x_0. u = 0 and
    1 are beta~_t and beta_t, DDPM's two fixed variances."""
    q, t = gaussian(15), np.arange(2, 16)
    x0, eps, u = rng(2).standard_normal((3, 14, 3))
    u, cos, sin = u ** 2, np.sqrt(q.alpha_bar[t])[:, None], np.sqrt(1 - q.alpha_bar[t])[:, None]
    xt, v, beta = cos * x0 + sin * eps, cos * eps - sin * x0, q.beta[t][:, None] + 0 * x0
    close(q.velocity(x0, xt, t), v)
    z = np.stack([v, u], 2)
    p0, p, mu = q.p_x0(xt, t, z), q.p_back(xt, t, z), q.q_back(x0, xt, t)
    close(p0.mean, x0)
    close(p0.variance, sin ** 2 * u)
    close(p.mean, mu.mean)
    close(p.variance, mu.variance + (q.q_back(x0 + 1, xt, t).mean - mu.mean) ** 2 * p0.variance)
    equilibrium = q.p_back(xt, t, np.stack([0 * v, 1 + 0 * v], 2))
    close(equilibrium.mean, q.q_step(xt, t).mean)
    close(equilibrium.variance, beta)
    for variance, f_sigma in [("beta", beta), ("posterior", mu.variance + 0 * v)]:
        fixed = gaussian(15, variance=variance).p_back(xt, t, z)
        close(fixed.variance, f_sigma)
        close(fixed.mean, p.mean)


def test_a_sure_network():
    """A small u is believed: p_x0 has the variance sin^2 phi u down to u = 1e-12."""
    q, t, z = gaussian(15), np.arange(1, 16), np.full((15, 2, 2), 1e-10)
    close(q.p_x0(z[..., 0], t, z).variance / q.sin[t][:, None] ** 2, 1e-10, atol=0)


@pytest.mark.parametrize("variance", ["learned", "beta", "posterior"])
def test_kl_is_the_integral(variance):
    q, t = gaussian(9, variance=variance), np.array([2, 4, 6])
    x0, xt = rng(3).standard_normal((2, 3, 1))
    z = abs(rng(4).standard_normal((3, 1, 2)))
    kl, back, p = q.kl(x0, xt, t, z)[0], q.q_back(x0, xt, t), q.p_back(xt, t, z)
    for i in range(3):
        x = back.mean[i] + np.sqrt(back.variance[i]) * np.linspace(-9, 9, 3001)[:, None]
        log_q, log_p = (d.take([i] * len(x)).log_density(x) for d in (back, p))
        assert np.trapezoid(np.exp(log_q) * (log_q - log_p), x[:, 0]) == approx(kl[i], rel=1e-8)


def test_entropies():
    """The pieces of the bound that need no network, by integrals, sums, and two points of noise."""
    x, states = np.linspace(-30, 30, 30001)[:, None], np.array([[0.0], [1.0]])
    q, b, x0 = gaussian(9, 0.1, "cosine"), binomial(4, 0.1), np.array([[1.7], [0.4]])
    total = lambda y: np.trapezoid(y, x[:, 0])
    assert total(np.exp(q.log_pi(x))) == approx(1)
    for diffusion, given, all_x, total in ((q, x0, x, total), (b, states, states, np.sum)):
        log_pi = diffusion.log_pi(all_x)
        for t in (1, 3, 4):
            for i in (0, 1):
                jump = diffusion.q_jump(given[[i]], np.array([t]))
                log_q = jump.take([0] * len(all_x)).log_density(all_x)
                H, kl = (total(np.exp(log_q) * y) for y in (-log_q, log_q - log_pi))
                assert H == approx(diffusion.H_q(t, given)[i], rel=1e-6)
                assert kl == approx(diffusion.kl_to_pi(t, given)[i], rel=1e-6)
                one = diffusion.q_jump(given[[i]], np.array([t - 1])).mean[0, 0]
                step = diffusion.q_step(states, np.array([t, t])).entropy()
                step = step[0] if diffusion is q else one * step[1] + (1 - one) * step[0]
                assert diffusion.H_step(t, given)[i] == approx(step)

    def mean_log_pi(diffusion, given, t):  # log pi is a quadratic, or linear in the bits
        p = diffusion.q_jump(given, np.full(2, t))
        if diffusion is q:
            return sum(q.log_pi(p.draw(np.full((2, 1), e))) for e in (-1.0, 1.0)) / 2
        return p.one[:, 0] * b.log_pi(states)[1] + p.zero[:, 0] * b.log_pi(states)[0]

    for d, given in ((q, x0), (b, states)):
        H_p = -mean_log_pi(d, given, d.T) + mean_log_pi(d, given, 1) - d.log_pi(given)
        close(d.H_p(given), H_p)
    wide = np.full((1, 5), 1.3)
    for f in (lambda x: q.H_q(3, x), lambda x: q.H_step(3, x), q.H_p, lambda x: q.kl_to_pi(3, x)):
        close(f(wide), 5 * f(wide[:, :1]))


@pytest.mark.parametrize("q, x, power, limit", [
    (gaussian(40), 1.5, 1, 1.5 ** 2 / 2),
    (binomial(40, kind="logsnr"), 1.0, 2, 0.7 ** 2 / (2 * 0.3 * 0.7))])  # half the chi-square
def test_the_chain_forgets(q, x, power, limit):
    """The distance to pi falls in every step, in the end as alpha_bar, or its square for bits."""
    kl = np.array([q.kl_to_pi(t, np.array([[x]]))[0] for t in range(1, 41)])
    assert (np.diff(kl) < 0).all()
    close(kl[34:] / q.alpha_bar[35:] ** power, limit, rtol=0.02)


def test_the_last_step():
    """Eq. 44: T_pi(x_0 | x_1; beta_1), the forward kernel run backwards. Or with a decoder, what it
    integrates; where the variance is fixed this is beta~_2, as in DDPM."""
    x, y, at = np.array([[2.0, -1.0, 0.0]]), np.array([[1.9, -0.7, 0.1]]), np.array([1])
    p = small_model(gaussian(5, 0.3)).p_back(x, 1)
    close(p.mean, math.sqrt(0.7) * x)
    assert p.variance == approx(0.3)
    for variance in ("learned", "beta", "posterior"):
        model = small_model(gaussian(5, 0.3, half=1e-4, ends=(-9, 9), variance=variance))
        q, z, p = model.diffusion, model.forward(x, at), model.p_back(x, 1)
        loss = q.decode(y, x, z)[0]
        assert p.log_density(y) + 3 * math.log(2e-4) == approx(-loss, rel=1e-6)
        close(p.mean, math.sqrt(0.7) * x - math.sqrt(0.3) * z[..., 0])
        close(p.variance, 0.3 * z[..., 1] if variance == "learned" else q.beta_tilde[2] + 0 * x)


# The binomial diffusion, by enumeration of all 2^n states

class Table:
    """A network that is a table of random numbers: its z for every state of n bits and every t."""

    def __init__(self, q, n, size):
        self.level, self.z = q.level, size * rng(45).standard_normal((q.T + 1, 2 ** n, n))

    def with_weights(self):
        return []

    def _at(self, x, t):
        return self.z[t, (x @ 2 ** np.arange(x.shape[1])).astype(int)]

    def forward(self, x, level, s, tape):
        x, t = x.reshape(len(x), -1), abs(level[:, None] - self.level).argmin(1)
        tape.saved = (x, t)
        return self._at(x, t)

    def backward(self, dz, tape):
        """dx is what z changes by when a bit is turned on."""
        (x, t), n = tape.saved, self.z.shape[2]
        on, off = ([np.where(np.arange(n) == i, bit, x) for i in range(n)] for bit in (1.0, 0.0))
        change = np.stack([self._at(a, t) - self._at(b, t) for a, b in zip(on, off)])
        return np.einsum("no,ino->ni", dz.reshape(x.shape), change)


def bits(n=3, T=4, rate=0.3, size=1.0, p0=None):
    """A binomial model over n bits, its 2^n states, and the probabilities of all that can happen,
    as matrices [to, from]: data p0 (states,), forward [t][x_t, x_{t-1}] and reverse [t][x_{t-1},
    x_t], the forward ones built bit by bit from Table App.1 alone."""
    states, p0 = states_of(n), rng(46).random(2 ** n) if p0 is None else np.array(p0)
    p0 = p0 / p0.sum()
    q = binomial(T, 0.05, rate=rate, mean=p0 @ states.mean(1))
    model = dpm.DPM(q, Table(q, n, size), (1, 1, n), threads=1, dtype="float64")
    probability = lambda f: np.prod(np.where(states[:, None] == 1, f, 1 - f), -1)
    forward, reverse = [None], [None]
    for t in range(1, T + 1):
        forward.append(probability(states * (1 - q.beta[t]) + rate * q.beta[t]))
        reverse.append(probability(model.p_back(states, t).one))
    return model, states, p0, forward, reverse, probability(np.full((1, n), rate))[:, 0]


def test_binomial_q_by_enumeration():
    """q(x_t | x_0) is the product of the steps; q(x_{t-1} | x_t, x_0) is Bayes."""
    model, states, _, forward, _, _ = bits(n=2)
    q, until = model.diffusion, np.eye(4)
    for t in range(1, 5):
        before, until, at = until, forward[t] @ until, np.full(4, t)
        close(q.q_jump(states, at).one, until.T @ states)
        close(q.q_step(states, at).one, forward[t].T @ states)
        for x0 in range(4 if t > 1 else 0):
            joint = forward[t] * before[:, x0]  # [x_t, x_{t-1}]
            back = q.q_back(states[x0][None], states, at)
            close(back.one, joint @ states / joint.sum(1)[:, None])
            close(back.zero, 1 - back.one)


def test_binomial_belief():
    """z: the log odds beyond Bayes from x_t alone; p(x_{t-1} | x_t) is q_back averaged over it."""
    q, xt, t, z = binomial(9), states_of(2), np.full(4, 5), rng(47).standard_normal((4, 2, 1))
    a, ones = q.alpha_bar[5], np.ones((4, 2))
    like = lambda x0: np.where(xt == 1, a * x0 + 0.3 * (1 - a), a * (1 - x0) + 0.7 * (1 - a))
    odds = 0.3 / 0.7 * like(1) / like(0) * np.exp(z[..., 0])
    m = odds / (1 + odds)
    close(q.p_x0(xt, t, z).one, m)
    one = m * q.q_back(ones, xt, t).one + (1 - m) * q.q_back(0 * ones, xt, t).one
    close(q.p_back(xt, t, z).one, one)
    close(q.p_back(xt, t, 0 * z).one, q.q_step(xt, t).one)  # the equilibrium kernel
    close(q.ideal(xt, t, m), z)


@pytest.mark.parametrize("kind, T", [("logsnr", 4000), ("logsnr", 10_000), ("cosine", 10_000)])
def test_binomial_kl_of_rare_ones(kind, T):
    """Finite at every t for the smallest rate, and what 50 digits say."""
    q = binomial(T, 1e-5, kind, rate=1e-4)
    cases = np.array([[0, 0, 3], [0, 1, -4], [1, 0, 1], [1, 1, 8.0]])  # x_0, x_t, z
    t, (x0, xt, z) = np.arange(2, T + 1).repeat(4), np.tile(cases, (T - 1, 1)).T[..., None]
    kl, dz = q.kl(x0, xt, t, z[..., None])
    assert np.isfinite(kl).all() and np.isfinite(dz).all() and kl.min() > -1e-12

    def exact(t, x0, xt, z):
        one = Decimal(1)
        a, before, beta, rate = map(Decimal, (q.alpha_bar[t], q.before[t], q.beta[t], q.rate))

        def kept(to, x, a):
            return a * (to == x) + (rate if to else one - rate) * (one - a)

        def back(x0):
            w = [kept(x, x0, before) * kept(xt, x, one - beta) for x in (0, 1)]
            return [v / (w[0] + w[1]) for v in w]

        odds = rate / (one - rate) * kept(xt, 1, a) / kept(xt, 0, a) * Decimal(z).exp()
        m, b, (f0, f1) = odds / (one + odds), back(x0), (back(0), back(1))
        return float(sum(b[x] * (b[x] / (m * f1[x] + (one - m) * f0[x])).ln() for x in (0, 1)))

    far = np.geomspace(2, T, 25)
    with localcontext() as context:
        context.prec = 50
        for s in np.unique(np.concatenate([far, T + 2 - far]).astype(int)):
            close(kl[t == s], [exact(int(s), *case) for case in cases], rtol=1e-6, atol=1e-14)


# ------------------------------------------------------------------------------------------------
# 2. The network language: every backward against difference quotients, float64
# ------------------------------------------------------------------------------------------------

rectified = lambda x: (x + np.sqrt(x ** 2 + 1)) / 2
softsign = lambda z: z / (1 + abs(z))
side = lambda parts: np.concatenate(list(parts), -1)
dense = lambda x, w: x @ w["W"] + w["b"]


def convolved(x, w):
    """By SciPy's correlation, one picture and one pair of channels at a time."""
    W = w["W"].reshape(3, 3, x.shape[-1], -1)
    y = np.zeros((*x.shape[:3], W.shape[-1]))
    for n, i, o in np.ndindex(len(x), *W.shape[2:]):
        y[n, ..., o] += correlate2d(x[n, ..., i], W[..., i, o], mode="same")
    return y


def celled(x, s, f):
    """f of every s x s cell (n, s, s, C), zeros beyond the border, and back."""
    n, H, W, _ = x.shape
    x = np.pad(x, ((0, 0), (0, -H % s), (0, -W % s), (0, 0)))
    return np.concatenate([np.concatenate([f(x[:, i:i + s, j:j + s]) for j in range(0, W, s)], 2)
                           for i in range(0, H, s)], 1)[:, :H, :W]


def angle(level):
    """cos phi and sin phi, (n, 1, 1, 1), of level = log tan^2 phi."""
    phi = np.arctan(np.exp(level / 2))[:, None, None, None]
    return np.cos(phi), np.sin(phi)


def distances(x, level):
    cos, sin = angle(level)
    return side(softsign((x - cos * c) / sin / s) for s in (1, 4) for c in (-1.0, 0.3))


def bumps(level):
    g = np.exp(-0.5 * ((level[:, None] - [-3, 5]) / 4) ** 2)  # one distance is two widths
    return (g / g.sum(1, keepdims=True))[:, None, None]


LAYERS = dict(  # how it is made for (H, W, 2), and y by x, e, level and the weights of its layers
    Dense=(lambda *_: dpm.Dense(2, 3), lambda x, e, level, w: dense(x, w)),
    Conv3x3=(lambda *_: dpm.Conv3x3(2, 3), lambda x, e, level, w: convolved(x, w)),
    Time=(lambda *_: dpm.Time(3, 2),
          lambda x, e, level, w: x + dense(e, w)[:, None, None]),
    Rectifier=(lambda *_: dpm.Rectifier(), lambda x, e, level: rectified(x)),
    Waves=(lambda *_: dpm.Waves((math.pi, 4 * math.pi)), lambda x, e, level: side(
        f(2 ** k * np.pi * x) for f in (np.sin, np.cos) for k in (0, 2))),
    Edges=(lambda *_: dpm.Edges((-1.0, 0.3)), lambda x, e, level: distances(x, level)),
    Bumps=(lambda *_: dpm.Bumps(2, -3.0, 5.0),
           lambda x, e, level: (x * bumps(level)).sum(-1, keepdims=True)),
    Cells=(lambda *_: dpm.Cells(dpm.Dense(8, 4)), lambda x, e, level, w: celled(
        x, 2, lambda c: dense(c.reshape(-1, 8), w).reshape(-1, 2, 2, 1))),
    Pooled=(lambda *_: dpm.Pooled(3, dpm.Dense(2, 3)), lambda x, e, level, w: celled(
        x, 3, lambda c: dense(c.mean((1, 2)), w)[:, None, None].repeat(3, 1).repeat(3, 2))),
    Whole=(lambda H, W: dpm.Whole(dpm.Dense(2 * H * W, H * W)),
           lambda x, e, level, w: dense(x.reshape(len(x), -1), w).reshape(*x.shape[:3], 1)),
    Residual=(lambda *_: dpm.Residual(dpm.Rectifier(), dpm.Dense(2, 2)),
              lambda x, e, level, w: x + dense(rectified(x), w)),
    Beside=(lambda *_: dpm.Beside(dpm.Dense(2, 3), dpm.Rectifier(), dpm.Sequential()),
            lambda x, e, level, w: side([dense(x, w), rectified(x), x])),
    Sum=(lambda *_: dpm.Sum(dpm.Dense(2, 3), dpm.Sequential(dpm.Rectifier(), dpm.Conv3x3(2, 3))),
         lambda x, e, level, w, w_2: dense(x, w) + convolved(rectified(x), w_2)))


def hold_to_quotients(network, shape):
    """Weights, input, noise level and s of a network against difference quotients, along directions
    of their own; returns what its forward made of what."""
    layers, r = network.with_weights(), rng(11)
    theta = 0.2 * r.standard_normal(sum(math.prod(s) for l in layers for s in l.shapes.values()))
    grad = np.zeros_like(theta)
    W, dW = dpm.views(layers, theta), dpm.views(layers, grad)
    tape, x = dpm.Tape(np, W, dW), r.standard_normal((3, *shape))
    level, s = 3 * r.standard_normal(3), r.random(3) + 0.1
    y = network.forward(x, level, s, tape)
    e, dy = tape.e[:, 0, 0], r.standard_normal(y.shape)
    kept = [a.copy() for a in (x, y, dy)]
    loss = lambda: float((network.forward(x, level, s, tape) * dy).sum())
    network.backward(dy, tape)
    loss()
    dx = network.backward(dy, tape)  # gradients of weights are added to, those of x are not
    assert all((a == b).all() for a, b in zip((x, y, dy), kept)) and not tape.saved
    alone = dpm.Tape(np, W)  # a forward without a backward
    assert (network.forward(x, level, s, alone) == y).all() and not alone.saved
    pairs = [(W[l][name], dW[l][name] / 2) for l in layers for name in l.shapes]
    for a, da in [*pairs, (x, dx), (level, tape.dlevel), (s, tape.ds)]:
        d = steep(da, 12)
        assert (da * d).sum() == approx(quotient(loss, a, d, 1e-5), rel=1e-6, abs=1e-7)
    return x, e, level, y, [W[l] for l in layers]


@pytest.mark.parametrize("shape", [(5, 7, 2), (1, 1, 2)])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, shape, monkeypatch):
    """What the docstring says, and its backward."""
    monkeypatch.setattr(dpm, "pieces", in_slices_of(2))  # as large ones are
    make, formula = LAYERS[name]
    network = dpm.Network(make(*shape[:2]), dpm.LogOdds(), *dpm.time_layers(3)[:3])
    x, e, level, y, (of_time, *weights) = hold_to_quotients(network, shape)
    close(y, formula(x, e, level, *weights))
    z = level[:, None] * np.exp(np.linspace(0, 5, 32)) / 40
    close(e, rectified(dense(side([np.sin(z), np.cos(z)]), of_time)))


@pytest.mark.parametrize("readout", ["v", "eps", "paper"])
@pytest.mark.parametrize("name, shape", NETWORKS + [
    ("unet", (4, 4, 1)), ("unet", (1, 1, 1)), ("mlp", (1, 1, 1)), ("paper", (1, 7, 1))])
def test_networks(name, shape, readout):
    """The backward of three networks and three readouts: odd sides, one pixel, two colours."""
    sizes = SIZES[name] | (dict(pixels=math.prod(shape[:2])) if name == "paper" else {})
    network = dpm.NETWORKS[name](shape[2], dpm.READOUTS[readout](), 2, **sizes)
    assert hold_to_quotients(network, shape)[3].shape == (3, *shape[:2], 2 * shape[2])


def test_readouts():
    """v; eps, of which v = (eps - sin phi x_t) / cos phi; and the paper's kernel, eqs. 64 and 65:
    for the same function the same p. Channel by channel: two colours, one pixel."""
    q, t, tape = gaussian(15), np.arange(2, 16), dpm.Tape(np, {}, {})
    x0, eps, log_u, z_mu = rng(2).standard_normal((4, 14, 2))
    xt, beta = q.q_jump(x0, t).draw(eps), q.beta[t][:, None]
    tape.level, tape.s = q.level[t], q.s[t]

    def said(readout, *z):
        z = readout.forward(np.stack(z, 2).reshape(14, 1, 1, 4), xt.reshape(14, 1, 1, 2), tape)
        return q.p_back(xt, t, z.reshape(14, 2, 2))

    p = said(dpm.Velocity(), q.velocity(x0, xt, t), log_u)
    close(p.mean, q.q_back(x0, xt, t).mean)
    close(p.variance, q.beta_tilde[t][:, None] * (1 + q.c[t][:, None] * np.exp(log_u)))
    assert np.isfinite(said(dpm.Velocity(), eps, 1e4 * log_u).variance).all()
    same = said(dpm.Epsilon(), eps, log_u)
    close(same.mean, p.mean)
    close(same.variance, p.variance)
    paper = said(dpm.PaperKernel(), z_mu, log_u)
    sigma = 1 / (1 + np.exp(-log_u) * (1 - beta) / beta)
    close(paper.variance, sigma, 1e-7)
    close(paper.mean, (xt - z_mu) * (1 - sigma) + z_mu, 1e-7)
    q, one = gaussian(10, 1e-3, "paper"), np.ones((1, 1, 1, 2), "float32")
    tape.level, tape.s = (a[[10]].astype("float32") for a in (q.level, q.s))  # nothing of x_0 left
    tape.dlevel, tape.ds, kernel = 0 * tape.level, 0 * tape.s, dpm.PaperKernel()
    found = kernel.forward(one, one[..., :1], tape), *kernel.backward(one, tape)
    assert all(np.isfinite(a).all() for a in (*found, tape.dlevel, tape.ds))


def test_u_is_free_up_to_e_20():
    """Untrained networks may say any log u; up to 20 it is taken as it is."""
    h = np.array([0.0, 19.0, 0.0, 21.0]).reshape(1, 1, 1, 4)
    close(dpm.Velocity().forward(h, h, dpm.Tape(np, {}))[..., 1::2].ravel(), np.exp([19, 20]))


def test_unet_is_the_same_everywhere():
    """A picture moved by a cell gives the same, moved; a pixel is heard beyond its neighbours; so
    is the noise level. The network of one size of picture serves another."""
    model = small_model(shape=(7, 9, 1), network="unet").resized(44, 44)
    x, t = np.zeros((3, 44, 44)), np.array([5, 5, 5])
    x[0, 20:24, 20:24] = rng(8).standard_normal((4, 4))
    x[1] = np.roll(x[0], (2, -2), (0, 1))
    z = model.forward(x.reshape(3, -1), t).reshape(3, 44, 44, 2)
    inside = np.s_[16:-16, 16:-16]
    close(z[1][inside], np.roll(z[0], (2, -2), (0, 1))[inside])
    heard = abs(z[0] - z[2]).max(2)
    assert heard[14, 22] > 1e-12 and heard[22, 30] > 1e-12 and not heard[2, 22]
    assert (z != model.forward(x.reshape(3, -1), t + 1).reshape(z.shape)).all()
    with refused("4 x 5 pixels only"):
        small_model(shape=(5, 4, 2), network="paper").resized(40, 40)


def test_a_fresh_unet_begins_with_its_first_layers():
    """Blocks and coarser grids are the identity at first: their last matrices are zero."""
    model = small_model(shape=(5, 7, 2), network="unet", stir=0)
    context, tape = model.network.body.layers[1].layers[0], dpm.Tape(np, model.weights)
    h, tape.e = rng(47).standard_normal((3, 5, 7, 4)), rng(48).standard_normal((3, 1, 1, 8))
    assert len(context.layers) == 5  # a convolution, Time, and block, grid, block
    for layer in context.layers[2:]:
        assert (layer.forward(h, tape) == h).all()


@pytest.mark.parametrize("q, options, says", [
    (gaussian(**BYTES), dict(learned=True), "fixed last step"),
    (binomial(), dict(learned=True), "for numbers"),
    (gaussian(kind="paper"), dict(predict="eps"), "predict v"),
    (gaussian(variance="beta"), dict(predict="paper"), "eq. 64"),
    (gaussian(**BYTES), dict(predict="paper"), "no decoder"),
    (binomial(), dict(predict="x0"), "no network or output 'x0'")])
def test_what_does_not_go_together(q, options, says):
    with refused(says):
        small_model(q, **options)


def test_what_networks_are_told():
    """sin and cos of 2^k pi x; and the bumps of the paper's network span the levels of its q."""
    told, channels = dpm.features(2, (0, 2), (0.5,))
    assert told.layers[1].rates == [math.pi, 4 * math.pi] and channels == 2 * (1 + 4 + 2)
    model = small_model(network="paper")
    bumps, level = model.network.body.layers[-1], model.diffusion.level
    close(bumps.centres[[0, -1]], level[[1, -1]])
    close(2 * bumps.width, np.diff(bumps.centres))


def test_bumps_of_a_learned_schedule():
    """They reach the highest level that any psi can have, wherever the schedule begins."""
    model = small_model(gaussian(kind="cosine"), network="paper", learned=True)
    assert model.network.body.layers[-1].centres[-1] == 10 > model.diffusion.level[-1]


def test_the_papers_network():
    """Figure D.1 and appendix D.2, written out."""
    of = lambda pixels: dpm.paper(2, dpm.LogOdds(), 1, pixels, maps=2, hidden=5, width=6, bumps=2,
                                  lowest=-3.0, highest=5.0)
    x, _, level, z, w = hold_to_quotients(of(20), (5, 4, 2))
    coarse = [celled(x, s, lambda c: c.mean((1, 2))[:, None, None]) for s in (1, 2, 4)]
    local = sum(convolved(c, w.pop(0)).repeat(s, 1).repeat(s, 2)[:, :5, :4]
                for c, s in zip(coarse, (1, 2, 4)))
    whole = dense(rectified(dense(x.reshape(3, -1), w.pop(0))), w.pop(0)).reshape(3, 5, 4, 2)
    h = side([rectified(local), whole, x])
    for layer in w[:-1]:
        h = rectified(dense(h, layer))
    y = dense(h, w[-1]).reshape(3, 5, 4, 2, 2)
    assert len(w) == 3 and len(of(4).with_weights()) == 8 and len(of(1).with_weights()) == 6
    close(z, (y * bumps(level)[..., None]).sum(3))


@pytest.mark.parametrize("kind, T", [("linear", 8), ("paper", 5)])
def test_the_papers_kernel_where_nothing_is_left_of_the_data(kind, T):
    """In float32 as in float64, though alpha_bar falls to 1e-16, or to 0."""
    in_32, in_64 = (small_model(gaussian(T, 1e-3, kind), network="paper", predict="paper",
                                dtype=dtype) for dtype in ("float32", "float64"))
    x0, q = data_for(in_64.diffusion, 20, 3, 35), in_64.diffusion
    close(np.expm1(q.s[2:]), q.c[2:], rtol=1e-6, atol=0)
    close(in_32.bound(x0, rng(36))["K"], in_64.bound(x0, rng(36))["K"], rtol=1e-4)


def test_products_are_counted():
    layer, tape = dpm.Dense(6, 3), dpm.Tape(np, {}, {})
    tape.theta[layer] = dict(W=np.ones((6, 3)), b=np.zeros(3))
    layer.forward(np.ones((4, 5, 7, 6)), tape)
    assert tape.flop == 2 * 4 * 35 * 6 * 3
    layer, x = dpm.Conv3x3(2, 3), np.ones((4, 5, 7, 2))
    W, tape.flop = {layer: dict(W=np.ones((18, 3)))}, 0
    tape.theta = tape.dtheta = W
    layer.backward(layer.forward(x, tape), tape)  # y, dx and dW
    assert tape.flop == 3 * 2 * 4 * 35 * 18 * 3


def test_initial_weights():
    """Normal with variance gain^2 / inputs; gain 0 and b are zero; the seed decides."""
    layers = [dpm.Dense(400, 300), dpm.Conv3x3(20, 50), dpm.Dense(30, 40, gain=0)]
    make = lambda seed: dpm.initial_weights(layers, np, "float64", seed)
    W = dpm.views(layers, make(0))
    assert W[layers[0]]["W"].var() * 400 == approx(1, rel=0.02)
    assert W[layers[1]]["W"].var() * 180 == approx(1, rel=0.05)
    assert not W[layers[2]]["W"].any() and not W[layers[0]]["b"].any()
    assert (make(0) == make(0)).all() and not (set(make(0)) & set(make(1)) - {0.0})


def test_orthogonal():
    """The singular vectors stay; the singular values go through the published polynomial, five
    times; those above a hundredth of the largest end in 0.65..1.25."""
    matrices, expected = [], []
    for shape in ((40, 16), (16, 40), (20, 20), (16, 16)):
        m = rng(31, *shape).standard_normal(shape)
        U, S, V = np.linalg.svd(m, full_matrices=False)
        S[-1] = S[0] / 100
        s = S / np.linalg.norm(S)
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
        assert s.min() > 0.65 and s.max() < 1.25
        matrices, expected = [*matrices, (U * S) @ V], [*expected, (U * s) @ V]
    for found, m in zip(dpm.orthogonal(matrices), expected):
        close(found, m, 1e-8, 1e-10)
    zero, found = dpm.orthogonal([np.zeros((18, 16)), matrices[0]])
    assert not zero.any() and (found == dpm.orthogonal(matrices[:1])[0]).all()


def test_optimiser():
    """The published updates, over several chunks, with a gradient that changes and is shortened:
    Muon's for a matrix, Adam's for biases and for a matrix with a short side, both with Nesterov's
    momentum; then a constant gradient, for which every step is rate * sign(g); warm-up, decay and
    average."""
    layers, r = [dpm.Dense(900, 60), dpm.Dense(15, 300), dpm.Dense(16, 16)], rng(31)
    size = sum(math.prod(s) for layer in layers for s in layer.shapes.values())
    theta, m, v = r.standard_normal(size), np.zeros(size), np.zeros(size)
    optimiser = dpm.Optimiser(layers, theta, lr=0.01, steps=10 ** 9, warmup=1)
    expected = theta.copy()
    for step in range(1, 4):
        g = r.standard_normal(size) * step
        assert optimiser.momentum(g) == approx(np.linalg.norm(g))
        for share in (slice(1, None, 2), slice(0, None, 2)):
            optimiser.orthogonalise(share)
        optimiser.move(optimiser.moves)
        g /= np.linalg.norm(g)
        m, v = 0.95 * m + 0.05 * g, 0.99 * v + 0.01 * g ** 2
        n = 0.95 * m + 0.05 * g
        move = n / (1 - 0.95 ** (step + 1)) / (np.sqrt(v / (1 - 0.99 ** step)) + 1e-8)
        for layer, longer in ((layers[0], 900), (layers[2], 16)):
            W = dpm.views(layers, n)[layer]["W"]
            dpm.views(layers, move)[layer]["W"][...] = 0.2 * longer ** 0.5 * dpm.orthogonal([W])[0]
        expected -= 0.01 * move
    close(theta, expected)
    bias, theta, average, expected = [dpm.Dense(1, 1)], np.zeros(2), np.zeros(2), 0.0
    optimiser = dpm.Optimiser(bias, theta, lr=0.1, steps=10 ** 9, warmup=4)
    for step in range(1, 8):
        expected -= 0.1 * min(1, step / 4)
        optimiser.momentum(np.array([0.5, -0.25]))
        optimiser.move(optimiser.moves)
        close(theta, [expected, -expected], rtol=1e-6)
        average += 1 / (10 + step / 10) * (theta - average)
        close(optimiser.average, average)
    close(optimiser.m, (1 - 0.95 ** 7) * np.array([0.5, -0.25]))  # a short gradient stays as it is
    optimiser = dpm.Optimiser(bias, theta, lr=0.1, steps=100, warmup=10)
    for optimiser.step, rate in [(5, 0.05), (10, 0.1), (50, 0.1), (75, 0.05), (100, 0)]:
        assert optimiser.rate() == approx(rate, abs=1e-12)
    optimiser.step, optimiser.average[...] = 10 ** 6, 0
    optimiser.momentum(np.zeros(2))
    optimiser.move(optimiser.moves)
    close(optimiser.average, 1e-3 * theta)  # reaches back over 1000 steps at most


def test_no_warmup():
    """warmup = 0 begins with the full rate."""
    optimiser = dpm.Optimiser([dpm.Dense(1, 1)], np.zeros(2), lr=0.1, steps=100, warmup=0)
    optimiser.momentum(np.ones(2))
    assert optimiser.rate() == approx(0.1)


# ------------------------------------------------------------------------------------------------
# 3. The model: objectives and their gradients
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["simple", "mean"])
def test_objectives_are_their_definitions(kind):
    """simple is the mean square of eps - eps^, mean that of x_{t-1} - f_mu with mu~ or a sampled
    x_{t-1} as the target, both times the documented scale; in value, and in gradient."""
    q, t = gaussian(15), np.arange(2, 16)
    x0, eps, direction = rng(5).standard_normal((3, 14, 4))
    z, xt = abs(rng(6).standard_normal((14, 4, 2))), q.q_jump(x0, t).draw(eps)
    share, weight, error = dpm.objective(kind, q)
    assert (share == (np.arange(16) > 1)).all() and (weight == share).all()

    def definition(noise=0.0):
        if kind == "simple":
            a = q.alpha_bar[t][:, None]
            return (eps - (xt - np.sqrt(a) * q.p_x0(xt, t, z).mean) / np.sqrt(1 - a)) ** 2
        return (q.q_back(x0, xt, t).draw(noise) - q.p_back(xt, t, z).mean) ** 2

    e = z[..., 0] - q.velocity(x0, xt, t)
    scale = error[t][:, None] * e ** 2 / definition()
    close(scale, scale[0, 0], rtol=1e-6)
    assert error.sum() == approx(q.c[2:].sum() / 2)  # K's own weight of e^2, where u is small
    dz = q.kl(x0, xt, t, z, error)[1]
    for noise in (0.0, 1.0):  # both signs of the noise have the mean of all noise
        slopes = [quotient(lambda: definition(s * noise), z[..., 0], direction) for s in (-1, 1)]
        close(scale * sum(slopes) / 2, dz[..., 0] * direction, rtol=1e-5, atol=1e-6)
    c, exact = q.c[t][:, None], np.stack([z[..., 0] - e, z[..., 1]], 2)  # and K's weight of e^2
    found = q.kl(x0, xt, t, z)[0] - q.kl(x0, xt, t, exact)[0]
    close(found, (c / (1 + c * z[..., 1]) / 2 * e ** 2).sum(1), rtol=1e-7)


def test_focused_weighs_what_decides_the_picture():
    """K's weight of e^2 over alpha_bar, and t drawn most where log noise over signal is -1. K draws
    every t alike, and a decoder's t = 1 in one draw of 21."""
    q = gaussian(1000)
    share, weight, error = dpm.objective("focused", q)
    assert error is None and share[:2].max() == 0
    close(share[2:], 1 + 8 * np.exp(-(q.level[2:] + 1) ** 2 / 25))
    scale = weight[2:] / share[2:] * (q.alpha_bar[2:] + 1e-3)
    close(scale, scale[0])
    assert (weight[2:] * q.c[2:]).sum() == approx(q.c[2:].sum())
    assert dpm.objective("focused", binomial())[1].sum() == approx(11)  # as K's, in the mean
    with refused("no objective 'simple' here"):
        dpm.objective("simple", binomial())
    for q, first in (q, 0), (gaussian(20, **BYTES), 0.05 * 19):
        share, weight, error = dpm.objective("K", q)
        assert error is None and (share[2:] == 1).all() and (weight[2:] == 1).all()
        assert share[1] == approx(first) and weight[1] == (first > 0) and share[0] == 0


def written(q, x0, xt, t, z, error, v=None):
    """An example's loss, (n,), from the distributions; with an error, (v - v*)^2 weighed by it, and
    the KL of u alone, with v as it was."""
    if isinstance(q, dpm.Binomial):
        b, f = q.q_back(x0, xt, t).one, q.p_back(xt, t, z).one
        return (b * np.log(b / f) + (1 - b) * np.log((1 - b) / (1 - f))).sum(1)
    first, t = t == 1, np.maximum(t, 2)
    u = {"learned": z[..., 1], "beta": 1.0, "posterior": 0.0}[q.variance]
    at, mu = lambda a: a[t][:, None], q.q_back(x0, xt, t)
    f_mu = q.q_back(at(q.cos) * xt - at(q.sin) * (z[..., 0] if v is None else v), xt, t).mean
    f_sigma = at(q.beta_tilde) * (1 + at(q.c) * u)
    kl = np.log(f_sigma / mu.variance) + (mu.variance + (f_mu - mu.mean) ** 2) / f_sigma - 1
    loss = kl.sum(1) / 2
    if error is not None:
        loss = loss + error[t] * ((z[..., 0] - q.velocity(x0, xt, t)) ** 2).sum(1)
    if first.any():
        p = q.p_x0(xt[first], np.ones(first.sum(), int), z[first])
        ends = [x0[first] + s * np.where(s * x0[first] > 0.7, np.inf, 0.25) for s in (1, -1)]
        b, a = (ndtr((end - p.mean) / np.sqrt(p.variance)) for end in ends)
        loss[first] = -np.log(b - a).sum(1)
    return loss


@pytest.mark.parametrize("network, shape", NETWORKS)
@pytest.mark.parametrize("kind, of_q, options", [
    ("K", {}, {}), ("K", {}, dict(predict="eps")), ("K", {}, dict(predict="paper")),
    ("K", dict(variance="beta"), {}), ("K", dict(variance="posterior"), {}), ("K", BYTES, {}),
    ("K", "bits", {}), ("K", {}, dict(learned=True)), ("K", {}, dict(learned=True, predict="eps")),
    ("K", {}, dict(learned=True, predict="paper")),
    ("K", dict(variance="beta"), dict(learned=True)),
    ("focused", {}, {}), ("focused", "bits", {}), ("simple", {}, {}), ("mean", {}, {}),
    ("simple", dict(variance="beta"), dict(predict="eps")), ("mean", {}, dict(predict="paper")),
    ("simple", BYTES, dict(predict="eps"))])
def test_gradient_of_every_objective(network, shape, kind, of_q, options, monkeypatch):
    """DPM.gradient against difference quotients of what it estimates, written out for the t and the
    noise that it drew; of a learned schedule every psi."""
    q, learned = binomial() if of_q == "bits" else gaussian(**of_q), "learned" in options
    model = small_model(q, shape, network, **options)
    x0, seen, loss_of = data_for(q, 23, model.D, 5), [], model._loss
    model._loss = lambda *a: (seen.append(a[:4]), loss_of(*a))[1]
    monkeypatch.setattr(dpm, "pieces", in_slices_of(5))  # the last is short

    def loss(v=None):
        seen.clear()
        model.follow_schedule()
        q, tables = model.diffusion, dpm.objective(kind, model.diffusion)
        t, _ = model.gradient(x0, 3, 4, tables=tables)
        assert (t == 1).any() == q.discretised
        drawn = [np.concatenate(a) for a in zip(*sorted(seen, key=lambda s: s[1][0, 0]))]
        each = written(q, *drawn, tables[2], v) * tables[1][drawn[2]] / tables[0][drawn[2]]
        total = each.mean() * tables[0].sum() / model.D
        return total - (q.H_q(q.T, x0) - q.H_p(x0)).mean() / model.D * learned, drawn

    z, grad = loss()[1][3], model.grad.copy()
    v = None if kind in ("K", "focused") else z[..., 0]
    directions = [steep(grad, 6, i) for i in range(2)]
    if learned:
        assert (abs(dpm.views(model.layers, grad)[model.learned]["psi"]) > 1e-7).all()
        directions += list(np.eye(len(grad))[-model.T:])
    for d in directions:
        slope = quotient(lambda: loss(v)[0], model.theta, d, 1e-5)
        assert grad @ d == approx(slope, rel=1e-6, abs=1e-8)


def test_stratified_is_even_and_never_leaves_its_range():
    for number, T in [(7, 40), (256, 1000), (1000, 3), (5, 2)]:
        for u in (0.0, 0.3, 1 - 2 ** -53):
            t = dpm.stratified(number, np.arange(T + 1) > 1, u)
            assert t.min() >= 2 and t.max() <= T and len(t) == number
            if number >= T - 1:
                counts = np.bincount(t, minlength=T + 1)[2:]
                assert np.ptp(counts) <= (1 if u < 0.9 else 2)  # i + u rounds to i + 1
    share = np.concatenate([[0, 0], np.linspace(3, 1, 39)])
    many = np.concatenate([dpm.stratified(5, share, (i + 0.5) / 4000) for i in range(4000)])
    close(np.bincount(many) / len(many), share / share.sum(), atol=3e-4)


@pytest.mark.parametrize("kind", ["K", "focused", "simple"])
def test_stratified_estimate_is_the_sum_over_all_t(kind):
    """gradient() and bound(draws=...) estimate the sum of the KLs, however t is drawn; closely
    enough to tell T - 1 terms from T."""
    model, x0 = small_model(stir=0.1), np.repeat(rng(15).standard_normal((1, 3)), 1000, 0)
    tables = dpm.objective(kind, model.diffusion)
    exact = [model.bound(x0, rng(16, i))["kl"].sum() for i in range(3)]
    se = lambda values: np.std(values, ddof=1) / math.sqrt(len(values))
    for estimates in ([model.gradient(x0, 17, i, tables=tables)[1].mean() for i in range(20)],
                      [model.bound(x0, rng(18, i), draws=2)["kl"].sum() for i in range(20)]):
        tolerance = 4 * math.hypot(se(estimates), se(exact))
        assert abs(np.mean(estimates) - np.mean(exact)) < tolerance < np.mean(exact) / 11 / 1.5
    for alone in ([model.gradient(x0[:1], 19, i, tables=tables)[0][0] for i in range(30)],
                  [model.bound(x0[:1], rng(19, i), draws=1)["kl"].argmax() for i in range(30)]):
        assert min(alone) < 5 and max(alone) > 9  # the t of a single example is any of 2..12


# The bound

def linear(x, a, variance):
    """E[x_0 | x_t] and Var[x_0 | x_t] of N(0, variance I)."""
    total = a * variance + 1 - a
    return np.sqrt(a) * variance / total * x, np.broadcast_to(variance * (1 - a) / total, x.shape)


def gaussian_model(variance=4.0, T=50, D=1):
    """The best kernels for N(0, variance I)."""
    q = dpm.Gaussian(np.concatenate([[1], np.cumprod(1 - np.linspace(1e-3, 0.2, T))]))
    network = dpm.IdealNetwork(lambda x, a: linear(x, a, variance))
    return dpm.DPM(q, network, (1, 1, D), threads=1)


@pytest.mark.parametrize("variance, known", [
    (1.0, -1.41893853), (0.3, -0.81969703), (4.0, -2.10499687)])
def test_K_star_of_gaussian_data(variance, known):
    """K* = -H_q(X_1) + H_q(X_T) - H_p(X_T) for exact kernels, by the function that evaluates
    trained models; below L whatever the second moment is (`known` has the paper's constant H_p,
    right for 1). Every KL is a quadratic of (x_0, eps): four points give its expectation."""
    model, s = gaussian_model(variance), math.sqrt(variance)
    four = np.array([[-s], [-s], [s], [s]]), Signs(np.array([[-1.0], [1.0], [-1.0], [1.0]]))
    q, found, t = model.diffusion, model.bound(*four), np.arange(2, 51)
    H = lambda v: 0.5 * np.log(2 * math.pi * math.e * v)
    at = lambda t: q.alpha_bar[t] * variance + 1 - q.alpha_bar[t]
    assert -H(at(1)) + H(at(50)) - H(1) == approx(known, abs=1e-8)
    over = (variance - 1) / 2 * (q.alpha_bar[50] + q.beta[1])
    assert found["K"] == approx(known - over, abs=1e-8)
    close(found["distortion"][2:], variance * (1 - q.alpha_bar[t]) / at(t))
    close(found["entropy"][2:], H(at(t - 1) - (1 - q.beta[t]) * at(t - 1) ** 2 / at(t)))
    cosine = dpm.DPM(gaussian(50, 1e-3, "cosine"), model.network, (1, 1, 1))  # T still remembers
    for K in (found["K"], cosine.bound(*four)["K"]):
        assert K < -H(variance) - 1e-6 if variance != 1 else K == approx(-H(1))


@pytest.mark.parametrize("network, shape", NETWORKS)
@pytest.mark.parametrize("kind", dpm.SCHEDULES)
def test_at_initialisation_K_is_L_null(kind, network, shape):
    """The last layer begins with zeros, p is the equilibrium kernel, whose trajectories are
    reversible: K of every example is its log likelihood under pi, whatever its size."""
    model = small_model(gaussian(25, 1e-3, kind), shape, network, stir=0)
    x0 = rng(9).standard_normal((6, model.D)) * np.array([[0.5, 0.5, 1, 1, 2, 2]]).T
    signs = np.sign(rng(10).standard_normal(x0.shape))
    found = model.bound(np.concatenate([x0, x0]), Signs(np.concatenate([signs, -signs])))
    a, each = model.diffusion.alpha_bar[2:], found["K_each"].reshape(2, 6).mean(0)
    close(found["distortion"][2:], (1 - a) ** 2 * (x0 ** 2).mean() + a * (1 - a))  # x_0^ = cos x_t
    close(each, -0.5 * (x0 ** 2 + math.log(2 * math.pi)).sum(1))
    assert found["K_minus_L_null"] == approx(0, abs=1e-8)
    assert found["L_null"] == approx(each.mean())


@pytest.mark.parametrize("q", [
    gaussian(9), gaussian(9, variance="beta"), gaussian(9, variance="posterior"), binomial(9),
    gaussian(9, **BYTES)])
def test_parts_sum_to_K(q):
    """One KL for each of t = 2..T, the three entropies once each, or L_T and L_0; K_each and K are
    the same numbers summed in two orders."""
    model, x0 = small_model(q), data_for(q, 40, 3, 12)
    for draws in (None, 3):
        found = model.bound(x0, rng(13), draws, batch=7)
        if q.discretised:
            assert found["L_T"] == approx(q.kl_to_pi(9, x0).mean())
            K = -found["kl"].sum() - found["L_T"]
        else:
            names, entropies = ("H_q_T", "H_q_1", "H_p_T"), (q.H_q(9, x0), q.H_q(1, x0), q.H_p(x0))
            assert [found[name] for name in names] == approx([H.mean() for H in entropies])
            K = -found["kl"].sum() + found["H_q_T"] - found["H_q_1"] - found["H_p_T"]
        assert found["K"] == approx(K, rel=1e-12)
        assert found["K"] == approx(found["K_each"].mean(), rel=1e-12)
        assert found["K_se"] == approx(found["K_each"].std(ddof=1) / math.sqrt(40))
        over = found["K_each"] - q.log_null(x0)
        assert found["K_minus_L_null"] == approx(over.mean())
        assert found["K_minus_L_null_se"] == approx(over.std(ddof=1) / math.sqrt(40))
        assert (found["kl"] > 0).sum() == 8 + q.discretised
        assert (np.isfinite(found["entropy"]) == (np.arange(10) > 1)).all()
        seen = np.isfinite(found["distortion"])
        assert seen[2:].all() and seen[1] == q.discretised
    x = x0 if q.outputs == 1 else np.sign(x0)  # of second moment 1: what the log adds to the KLs
    parts = -q.kl_to_pi(9, x) if q.discretised else q.H_q(9, x) - q.H_q(1, x) - q.H_p(x)
    mean = x.mean(0, keepdims=True) * (q.outputs == 1)  # that of numbers is 0
    assert evaluation.gain(q, mean) == approx((parts - q.log_null(x)).mean(), abs=1e-9)
    one, many, every = (model.bound(x0, rng(14), draws) for draws in (1, 99, None))
    assert math.isnan(model.bound(x0[:1], rng(14))["K_se"])      # of one example nobody knows it
    assert many["K"] == every["K"]                               # 8 draws are all there are
    assert one["kl"][1] == approx(every["kl"][1], rel=0.5)       # and L_0 needs none of them


def test_bound_does_not_depend_on_the_order_of_the_examples():
    """No example may be tied to one part of the t: small x_0 first, or large ones, the same K."""
    model = small_model(gaussian(40), stir=0.1)
    x0 = rng(32).standard_normal((600, 3)) * np.linspace(0.1, 3, 600)[:, None]
    up, down = ([model.bound(x, rng(33, i), 2)["K"] for i in range(12)] for x in (x0, x0[::-1]))
    error = 4 * math.hypot(np.std(up), np.std(down)) / math.sqrt(12)
    assert np.mean(up) == approx(np.mean(down), abs=error)
    each = model.bound(x0, rng(34))
    assert np.mean(up) == approx(each["K"], abs=error + each["K_se"])


def test_every_example_has_noise_of_its_own(monkeypatch):
    """Whatever block of the bound, share of the gradient, or step of the training it is in; that of
    the training is of the network's type."""
    model, x0 = small_model(gaussian(2)), np.ones((6, 3))  # t is 2 for all
    found = [model.bound(x0, rng(35), batch=2)["K_each"]]
    found += [model.gradient(x0, 1, step)[1] for step in (0, 1)]
    assert len(np.unique(np.concatenate(found))) == 18
    noise, types_ = dpm.Normal.noise, []
    monkeypatch.setattr(dpm.Normal, "noise", staticmethod(
        lambda *of: types_.append(of[2:]) or noise(*of)))
    small_model(threads=1, dtype="float32").gradient(x0, 1)
    assert types_ == [(np.float32,)]


def test_no_two_generators_begin_alike(monkeypatch):
    """The t of a step, the noise of its shares, samples. The word alone tells t from noise:
    to NumPy a key with a 0 more is the same."""
    make, begun, model = dpm.generator, [], small_model()
    monkeypatch.setattr(dpm, "generator", lambda *of: begun.append(make(*of).random()) or make(*of))
    for step in (0, 1):
        model.gradient(np.ones((6, 3)), 1, step)
    model.sample(2, seed=1)
    assert len(begun) == len(set(begun)) == 8


def exact_parts(model, states, p0, forward):
    """Sum of the KLs and the entropies of the bound, each by enumeration of x_0 and x_t."""
    q, until, kls, H_q = model.diffusion, np.eye(len(states)), 0.0, [0.0]
    pairs = np.repeat(states, len(states), 0), np.tile(states, (len(states), 1))  # x_0, x_t
    for t in range(1, q.T + 1):
        until, at = forward[t] @ until, np.full(len(pairs[0]), t)
        joint = (until * p0).T.ravel()
        H_q.append(-(joint * np.log(until.T.ravel())).sum())
        assert q.H_q(t, states) @ p0 == approx(H_q[-1])
        kls += joint @ q.kl(*pairs, at, model.forward(pairs[1], at))[0] if t > 1 else 0
    return -kls + H_q[-1] - H_q[1] - q.H_p(states) @ p0


@pytest.mark.parametrize("n, rate", [(1, 0.5), (3, 0.5), (4, 0.8), (3, None)])
def test_K_by_enumeration(n, rate):
    """K from KLs and entropies (eq. 14) is K over all trajectories, E_q of log p(x_T) + sum log
    p(x_{t-1} | x_t) - log q(x_t | x_{t-1}) (eq. 12), below the log likelihood whatever the rate of
    pi; where this is the mean of the data, H_p(X_T) is its entropy."""
    p0 = [0.25, 0.15, 0.05, 0.15, 0.2, 0.0, 0.1, 0.1] if rate is None else None
    model, states, p0, forward, reverse, pi = bits(n, rate=rate or 0.4, p0=p0)
    q, T, h = model.diffusion, model.T, -3 * (0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    assert rate or q.H_p(states) @ p0 == approx(h)
    p_t, K, likelihood = p0, 0.0, pi
    for t in range(1, T + 1):
        joint = forward[t] * p_t  # [x_t, x_{t-1}]
        K += (joint * (np.log(reverse[t].T) - np.log(forward[t]))).sum()
        p_t, likelihood = joint.sum(1), reverse[T + 1 - t] @ likelihood
    K += p_t @ np.log(pi)
    assert likelihood.sum() == approx(1)
    assert exact_parts(model, states, p0, forward) == approx(K, rel=1e-10)
    assert K < p0 @ np.log(likelihood) < p0 @ np.log(p0 + 1e-300)
    x0 = states[np.repeat(np.arange(2 ** n), np.round(6000 * p0).astype(int))]
    found, m = model.bound(x0, rng(49)), q.mean  # the function itself, by sampling
    assert found["K"] == approx(K, abs=4 * found["K_se"] + 1e-3) and found["K_se"] < 0.04
    L_null = n * (m * math.log(m) + (1 - m) * math.log(1 - m))
    assert found["L_null"] == approx(L_null, abs=0.01)
    log_w = dpm.log_weights(model, states, 5000, rng(50))  # and log p(x_0) of every state
    estimate = logsumexp(log_w, axis=1) - math.log(5000)
    error = 5 * np.exp(log_w - estimate[:, None]).std() / math.sqrt(5000)
    close(estimate, np.log(likelihood), atol=error)
    assert p0 @ log_w.mean(1) == approx(K, abs=5 * log_w.std() / math.sqrt(5000)) and error < 0.2


@pytest.mark.parametrize("rate", [1 / 3, 0.2])
def test_binomial_at_initialisation_K_is_L_null(rate):
    """With z = 0 trajectories are reversible: K is the log likelihood under pi, of any data."""
    p0 = [0, 1, 1, 0, 1, 0, 0, 0]
    model, states, p0, forward, _, pi = bits(rate=rate, size=0.0, p0=p0)
    assert exact_parts(model, states, p0, forward) == approx(p0 @ np.log(pi), rel=1e-10)


def test_swissroll_K_star():
    """L = -1.08 bits; K* at T = 40 is -1.31 with logsnr, -1.93 with the paper's schedule."""
    roll = data.load("swissroll")
    even = types.SimpleNamespace(random=lambda n: (np.arange(n) + 0.5) / n,
                                 standard_normal=rng(18).standard_normal)
    x0 = roll.draw(1000, even)  # evenly along the roll: less noise
    L = roll.truth.log_density(x0) / LN2
    assert L.mean() == approx(-1.08, abs=4 * L.std() / math.sqrt(1000))
    for kind, K_star in [("logsnr", -1.31), ("paper", -1.93)]:
        q = gaussian(40, 0.004 ** 2, kind)
        model = dpm.DPM(q, dpm.IdealNetwork(roll.truth.moments), roll.shape)
        found = model.bound(x0, rng(19), draws=13)
        # the same with far less noise: the best KLs are H(p_back) - H(q_back) in the mean
        kls = (found["entropy"] - dpm.entropy_bounds(q, x0)[0])[2:].sum()
        K = (q.H_q(40, x0) - q.H_q(1, x0) - q.H_p(x0)).mean() - kls
        assert K / LN2 == approx(K_star, abs=0.06)
        assert found["K"] == approx(K, abs=4 * found["K_se"])


@pytest.mark.parametrize("kind, rate, K_star", [
    ("cosine", 0.5, -2.34), ("paper", 0.5, -2.84), ("paper", 0.2, -2.683)])
def test_heartbeat_K_star(kind, rate, K_star):
    """At T = 200; L = log2(1/5) = -2.322 bits. The best kernel is q_back, averaged over the phases;
    it draws heartbeats, all phases alike."""
    beat, at = data.load("heartbeat"), np.full(7, 90)
    q = binomial(200, 1 / 200 if kind == "paper" else 1e-5, kind, rate, mean=0.2)
    best = dpm.IdealNetwork(lambda x, a: beat.truth.moments(x, a, rate))
    model, x0 = dpm.DPM(q, best, beat.shape, threads=1), beat.held_out(300)
    assert beat.truth.log_density(x0) / LN2 == approx(math.log2(1 / 5))
    found = model.bound(x0, rng(52), 150)
    se = found["K_se"] / LN2
    assert found["K"] / LN2 == approx(K_star, abs=0.015 + 4 * se) and se < 0.035
    xt, phases = q.q_jump(x0[:7], at).draw(rng(51).random((7, 20))), beat.truth.patterns
    like = [q.q_jump(p[None].repeat(7, 0), at).log_density(xt) for p in phases]
    one = sum(w[:, None] * q.q_back(p, xt, at).one for w, p in zip(softmax(like, 0), phases))
    close(model.p_back(xt, 90).one, one, rtol=1e-7)
    if kind == "cosine":
        valid = (model.sample(300, seed=2, batch=300)[:, None] == phases).all(2)
        assert valid.any(1).mean() > 0.98
        assert abs(valid.mean(0) - 0.2).max() < 4 * math.sqrt(0.16 / 300)


# The discretised decoder

def test_a_decoder_of_few_grey_levels():
    """One pixel of four levels, all integrals on a grid: p(x_0 | x_1) sums to one; K is E_q of log
    p(x_T) + sum log p(x_{t-1} | x_t) / q(x_t | x_{t-1}), and below log p(x_0) for every level."""
    levels, x = np.array([-1.5, -0.5, 0.5, 1.5]), np.linspace(-8, 8, 501)[:, None]
    model = small_model(gaussian(4, 0.1, half=0.5, ends=(-1.5, 1.5)), (1, 1, 1))
    q, dx, at = model.diffusion, x[1, 0] - x[0, 0], lambda t: np.full(501, t)
    z = model.forward(x, at(1))
    decoded = np.array([-q.decode(np.full_like(x, l), x, z)[0] for l in levels])
    close(np.exp(decoded).sum(0), 1)
    far = q.decode(levels[:, None], np.array([[60.0], [-60], [60], [-60]]), np.ones((4, 1, 2)))
    sure = q.decode(levels[:, None], np.array([[60.0], [-60], [60], [-60]]),
                    np.full((4, 1, 2), [1.0, 0.0]))
    assert all(np.isfinite(a).all() for a in (*far, *sure))

    def density(p):  # of every x, (rows of p, x)
        p = dpm.Normal(np, p.mean[:, :, None], np.broadcast_to(p.variance, p.mean.shape)[..., None])
        return np.exp([dpm.Normal(np, m, v).log_density(x) for m, v in zip(p.mean, p.variance)])

    back, step = ([None, None, *(density(f(t)) + 1e-300 for t in (2, 3, 4))]
                  for f in (lambda t: model.p_back(x, t), lambda t: q.q_step(x, at(t))))
    P = np.exp(q.log_pi(x))
    for t in (4, 3, 2):
        P = P @ back[t] * dx  # [x_t, x_{t-1}]
    P = np.exp(decoded) @ P * dx
    assert P.sum() == approx(1, rel=1e-4)
    found = model.bound(np.tile(levels, 1500)[:, None], rng(82), batch=6000)["K_each"]
    found = found.reshape(1500, 4)
    for i, level in enumerate(levels):
        jump = [None] + [density(q.q_jump(np.array([[level]]), [t]))[0] for t in range(1, 5)]
        K = jump[1] @ (decoded[i] - np.log(jump[1])) * dx + jump[4] @ q.log_pi(x) * dx
        for t in (2, 3, 4):  # step is [x_{t-1}, x_t]
            K += (jump[t - 1][:, None] * step[t] * np.log(back[t].T / step[t])).sum() * dx ** 2
        se = found[:, i].std() / math.sqrt(1500)
        assert K < math.log(P[i]) and found[:, i].mean() == approx(K, abs=4 * se) and se < 0.05


@pytest.mark.parametrize("kind", ["K", "focused", "simple", "mean"])
def test_a_decoder_is_drawn_once_in_21(kind):
    share, weight, _ = dpm.objective(kind, gaussian(20, **BYTES))
    assert share[1] / share.sum() == approx(1 / 21) and weight[1] == 1


def test_uniform_bytes_have_eight_bits():
    """No K of independent uniform bytes is above -log 256; that of the best kernels comes to it."""
    scale = math.sqrt((256 ** 2 - 1) / 12)
    levels = (np.arange(256) - 127.5) / scale
    best = dpm.IdealNetwork(data.Mixture(levels[:, None], 1e-9).moments)
    q = gaussian(60, 1e-3, half=0.5 / scale, ends=(levels[0], levels[-1]))
    ends, z = levels[[0, -1], None], np.ones((2, 1, 2))  # open ends, also in float32
    for s in (scale, 0.9 * scale, 1.1 * scale):
        of = gaussian(60, 1e-3, half=0.5 / s, ends=ends[:, 0] * scale / s)
        loss = lambda a, d: of.decode((a * scale / s).astype(d), a, z)[0]
        close(loss(ends, "float32"), loss(ends, "float64"), rtol=1e-3)
    for network, bits_per_dim in ((best, 8.01), (small_model(q, (1, 1, 1), stir=0).network, 8.21)):
        model = dpm.DPM(q, network, (1, 1, 1), dtype="float64", threads=1)
        found = model.bound(np.repeat(levels, 6)[:, None], rng(83))
        K, se = -found["K"] / LN2, found["K_se"] / LN2
        assert 8 - 4 * se < K == approx(bits_per_dim, abs=4 * se) and se < 0.06


def test_bytes_of_a_model_of_dequantised_bytes():
    """The best model of dequantised uniform bytes, with a decoder for its first steps, comes near 8
    bits, never below; the decoder is at the first noise of a third of a grey level."""
    scale, parts = 256 / math.sqrt(12), 4
    values = ((np.arange(256 * parts) + 0.5) / parts - 128) / scale
    best = dpm.IdealNetwork(data.Mixture(values[:, None], 1e-9).moments)
    alpha_bar = dpm.schedule("logsnr", 120, (0.01 / scale) ** 2)
    raw, models = np.repeat(np.arange(256), 6)[:, None], []

    def bound(model, x0, _):
        models.append(model)
        close(model.raw(x0), raw + 0.5)  # the centre of a grey level stands for it
        return model.bound(x0, rng(84), draws=30)

    for variance, bits_per_dim in (("learned", 8.12), ("beta", 8.15)):
        model = dpm.DPM(dpm.Gaussian(alpha_bar, variance=variance), best, (1, 1, 1), 128, scale,
                        dtype="float64", threads=1)
        found = evaluation.bits_of_bytes(model, raw, bound)
        K, se = found["discretised_bits_per_dim"], found["discretised_bits_per_dim_se"]
        assert 8 - 4 * se < K == approx(bits_per_dim, abs=4 * se) and se < 0.08
        q = models[-1].diffusion
        assert q.discretised and 1 / 3 < q.sin[1] * scale < 0.4
        close(q.alpha_bar[1:], alpha_bar[-q.T:])
    assert runs.decoder(128, 64)["ends"] == ((0.5 - 128) / 64, (255.5 - 128) / 64)  # centres
    short = model.with_diffusion(dpm.Gaussian(alpha_bar[[0, 1, -1]]))
    assert evaluation.bits_of_bytes(short, raw, bound)["discretised_bits_per_dim"] > 8
    assert models[-1].T == 2  # of so few steps none can be left out


def test_an_error_in_one_share_waits_for_the_others():
    """Else the next call would find their tapes in use."""
    ended = []

    def work(tape, share, cuts):
        if share.start == 0:
            raise ZeroDivisionError
        time.sleep(0.2)
        ended.append(share)

    with pytest.raises(ZeroDivisionError):
        small_model(threads=3).deal(work, 7)
    assert {share.start for share in ended} == {1, 2}


# Samples

def test_samples_have_the_variance_of_their_kernels():
    """Linear kernels make every x_t Gaussian; its variance follows from a recursion, down to the
    fixed last step. Twenty independent coordinates are as many samples."""
    model, variance, one = gaussian_model(D=20), 1.0, np.ones((1, 20))
    for t in range(50, 0, -1):
        p = model.p_back(one, t)
        variance = float(p.mean[0, 0] ** 2 * variance + p.variance[0, 0])
    x, kept = model.sample(1000, seed=1, batch=600, keep=np.array([1, 50, 51]))
    assert set(kept) == {1, 50}  # there is no t = 51
    assert model.sample(2, keep=(51,))[1] == {}
    assert variance == approx(4, rel=0.01)
    assert x.var() == approx(variance, rel=5 * math.sqrt(2 / 20_000))
    assert abs(x.mean()) < 5 * math.sqrt(variance / 20_000)
    kurtosis = (x ** 4).mean() / x.var() ** 2  # of normal noise
    assert kurtosis == approx(3, abs=5 * math.sqrt(96 / 20_000))
    assert kept[50].var() == approx(1, rel=0.05)
    beta = model.diffusion.beta[1]  # x_0 is x_1 with the noise of the fixed step
    assert ((x - np.sqrt(1 - beta) * kept[1]) / np.sqrt(beta)).var() == approx(1, rel=0.05)


def test_sample_k_is_the_same_in_any_batch():
    """Noise depends on the purpose and the key alone; raw values are normalised ones, scaled."""
    model, single = (small_model(stir=0.05, dtype=dtype) for dtype in ("float64", "float32"))
    x = model.sample(7, seed=3)
    ended = []

    def shown(ticks):                               # as a bar, which closes when they end
        yield from ticks
        ended.append(len(ticks))

    close(model.sample(3, seed=3, progress=shown), x[:3])
    model.bound(x, rng(2), batch=3, progress=shown)
    dpm.Posterior(model, CURVE).sample(3, progress=shown)
    close(model.sample(7, seed=3, batch=2, progress=shown), x)
    assert ended == [12, 3, 12, 4 * 12]
    large = dpm.DPM(gaussian(2), gaussian_model().network, (1, 1, 70_000), threads=2)
    large.sample(2, progress=shown)                 # a chain for every thread, at least
    assert ended[-1] == 2
    close(model.sample(3, seed=3, first=4), x[4:])
    close(single.sample(7, seed=3, batch=2), single.sample(7, seed=3), rtol=1e-3)
    assert abs(model.sample(7, seed=4) - x).min() > 1e-6 and len(np.unique(x.round(6))) == 21
    close(model.raw(x), 2 * x + 0.5)
    close(model.normal(model.raw(x)), x)
    draw = lambda *key: dpm.generator(np, *key).random(4)
    assert (draw("noise", 1) != draw("sample", 1)).all()
    assert (draw("noise", 1) == draw("noise", 1)).all()


@pytest.mark.parametrize("make, options", [
    (gaussian, dict(variance="beta")), (binomial, dict(rate=0.2))])
def test_a_shortened_chain_is_a_diffusion(make, options):
    """S of T steps, through T and 1: K, samples and options are those of a diffusion built from
    that part of alpha_bar; T of T steps are the same chain."""
    q = make(40, kind="logsnr", **options)
    model, x0 = small_model(q), data_for(q, 9, 3, 84)
    short = model.shortened(5)
    direct = type(q)(q.alpha_bar[[0, 1, 11, 20, 30, 40]], **options)
    other = dpm.DPM(direct, model.network, model.shape, dtype="float64", theta=model.theta,
                    threads=2)
    assert short.T == 5 and short.bound(x0, rng(85))["K"] == other.bound(x0, rng(85))["K"]
    assert (short.sample(4) == other.sample(4)).all()
    assert (model.shortened(40).sample(4) == model.sample(4)).all() and model.T == 40
    assert model.shortened(None) is model
    for S in (0, 1, 41):
        with refused("2..40 steps"):
            model.shortened(S)


def test_steps_with_less_noise():
    """DDIM eqs. 12 and 16: eta = 1 is p(x_{t-1} | x_t), eta = 0 is deterministic, and with exact
    kernels and many steps turns x_T into x_0 as their distributions demand."""
    q, t = gaussian(15, variance="posterior"), np.arange(2, 16)
    xt, z = rng(86).standard_normal((14, 3)), abs(rng(87).standard_normal((14, 3, 2)))
    a, s, x0 = q.alpha_bar[t][:, None], q.alpha_bar[t - 1][:, None], q.p_x0(xt, t, z).mean
    eps = (xt - np.sqrt(a) * x0) / np.sqrt(1 - a)
    for eta in (0.0, 0.4, 1.0):
        sigma = eta * np.sqrt((1 - s) / (1 - a)) * np.sqrt(1 - a / s)  # eq. 16
        p = q.p_back(xt, t, z, eta)
        close(p.mean, np.sqrt(s) * x0 + np.sqrt(1 - s - sigma ** 2) * eps)
        close(p.variance, sigma ** 2 + 0 * xt)
    close(p.mean, q.q_back(x0, xt, t).mean)
    learned = gaussian(15)
    close(learned.p_back(xt, t, z, 0.4).variance, 0.16 * learned.p_back(xt, t, z).variance)
    model = dpm.DPM(gaussian(400, 1e-4), gaussian_model().network, (1, 1, 1))  # variance 4
    x, kept = model.sample(5, eta=0.0, keep=(400,))
    close(x, 2 * kept[400], rtol=0.02)
    last, less = model.p_back(x, 1), model.p_back(x, 1, 0.4)  # the fixed step too
    close(less.mean, last.mean)
    close(less.variance, 0.16 * last.variance)
    for eta in (-0.5, 1.5):
        with refused("eta lies"):
            model.sample(2, eta=eta)
    of_bits, states, *_ = bits()
    for t in (1, 2):
        with refused("bits have no path"):
            of_bits.p_back(states, t, eta=0.5)


class Rank:
    """One of two processes, in a thread: what runs.Ranks is by MPI."""

    size, here, parts, barrier = 2, 2, [None, None], threading.Barrier(2)

    def __init__(self, rank):
        self.rank = rank

    def sum(self, a):
        self.parts[self.rank] = a.copy()
        self.barrier.wait()
        total = self.parts[0] + self.parts[1]
        self.barrier.wait()
        return total


def test_two_ranks_are_two_threads():
    """The same gradient, to the last bit, bound and samples: shares are shares, wherever."""
    x0, one = rng(88).standard_normal((9, 3)), small_model()
    assert small_model(threads=None, comm=Rank(0)).threads == max(1, dpm.CORES // 2)  # its part
    two = [small_model(threads=1, comm=Rank(rank)) for rank in (0, 1)]
    t, parts = one.gradient(x0, 5)
    with dpm.ThreadPoolExecutor(2) as pool:
        for model, (t_r, parts_r) in zip(two, pool.map(lambda model: model.gradient(x0, 5), two)):
            assert (model.grad == one.grad).all() and (t_r == t).all() and (parts_r == parts).all()
        one.step(one.optimiser())
        list(pool.map(lambda model: model.step(model.optimiser()), two))
        assert all((model.theta == one.theta).all() for model in two)
        found = one.bound(x0, rng(89), batch=2)
        for found_r in pool.map(lambda model: model.bound(x0, rng(89), batch=2), two):
            close(found_r["K_each"], found["K_each"])
            close(found_r["kl"], found["kl"])
        for x in pool.map(lambda model: model.sample(5, batch=2), two):
            close(x, one.sample(5))


def test_frechet():
    """The closed form for Gaussians of these means and covariances, in the leading components of x
    only; 0 for the same."""
    x = rng(91).standard_normal((500, 6)) * [5, 4, 3, 0.02, 0.02, 0.01]
    A, m = rng(92).standard_normal((3, 3)), np.array([1.0, -2, 3])
    y = np.concatenate([x[:, :3] @ A + m, 50 * x[:, 3:]], 1)
    C_x, C_y = np.cov(x[:, :3].T), np.cov(y[:, :3].T)
    w, V = np.linalg.eigh(C_x)
    root = V * np.sqrt(w) @ V.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ C_y @ root)).sum()
    gap = ((y.mean(0) - x.mean(0))[:3] ** 2).sum()
    expected = gap + np.trace(C_x) + np.trace(C_y) - 2 * cross
    leading = evaluation.in_components(x, y, components=3)
    assert evaluation.frechet(*leading) == approx(expected, rel=1e-3)
    assert evaluation.frechet(*evaluation.in_components(x, x[::-1])) == approx(0, abs=1e-9)
    found = evaluation.distances(types.SimpleNamespace(draw=lambda *_: x), y, x)
    assert found["frechet"] > 1 and found["frechet_test"] == approx(0, abs=1e-9)


def test_numbers_beside_the_truth():
    """K* - K where every other example has two bits less than the ideal kernel; and, of that
    kernel, log p(x_0) from S trajectories, which rises from K to L."""
    heartbeat, q = data.load("heartbeat"), dpm.Binomial(dpm.schedule("cosine", 60, 0.01), rate=0.2)
    moments = lambda x, alpha_bar: heartbeat.truth.moments(x, alpha_bar, rate=0.2)
    model, x0 = dpm.DPM(q, dpm.IdealNetwork(moments), (1, 1, 20)), heartbeat.held_out(8)
    bound = lambda of, x, _: of.bound(np.repeat(x, 500, 0), rng(96), 20)
    found = bound(model, x0, "")
    worse = found | dict(K_each=found["K_each"] - 2 * LN2 * (np.arange(4000) % 2))
    r, kl = evaluation.beside_the_truth(model, heartbeat, x0, worse, bound)
    assert r["K_star_minus_K_bits"] == approx(1)
    assert r["K_star_minus_K_bits_se"] == approx(4000 ** -0.5)
    close(kl, found["kl"])
    assert r["L_true_bits"] == r["estimate_L_bits"] == approx(-math.log2(5))
    gaps = [r[f"L_minus_estimate_{S}_bits"] for S in (1, 10, 100, 1000)]
    assert gaps[0] > gaps[1] > gaps[2] > gaps[3] > 0 and gaps[3] < 0.3
    assert gaps[0] == approx(-math.log2(5) - found["K"] / math.log(2), rel=0.1)
    close(gaps, [-math.log2(5) - r[f"estimate_{S}_bits"] for S in (1, 10, 100, 1000)])


def test_rate_and_distortion(tmp_path):
    """Whoever has x_t has paid for steps t + 1..T. Ten rows at most, of all steps made so far."""
    kl, distortion = np.arange(11.0) * LN2 * 5, np.arange(11.0) ** 2
    for first in (1, 2):  # t = 1 is seen with a decoder only
        distortion[:first] = math.nan
        rows = figures.rate_distortion(dict(kl=kl, distortion=distortion), 5, 40.0,
                                       tmp_path / "rate.png")
        ts = range(10, first - 1, -1)
        close(rows, [(t, sum(range(t + 1, 11)), 40 * t) for t in ts])


def test_the_report_of_posterior_samples():
    """Its numbers by their definitions; errors count only what was missing."""
    model, unknown = small_model(shape=(2, 2, 1)), np.array([True, False, True, False])
    model.scale, model.about = 40.0, dict(binary=False, bytes=True)
    truth, samples = rng(97).standard_normal((3, 4)), rng(98).standard_normal((3, 5, 4))
    samples[:, :, ~unknown] = truth[:, None, ~unknown]
    samples[1, 2, 3] += 0.25
    given, args = np.where(unknown, np.nan, truth), types.SimpleNamespace(input=None)
    told = " ".join(observations.report(model, args, truth, given, unknown, samples, None))
    apart = np.mean([[samples[i, :, j].std() for j in (0, 2)] for i in range(3)])
    assert f"changed by 0.25; missing ones: deviation {apart:.3f} between samples" in told
    for name, x in (("mean of 5 samples", samples.mean(1)), ("one sample", samples[:, 0])):
        mse = np.mean([(x[i, j] - truth[i, j]) ** 2 for i in range(3) for j in (0, 2)])
        dB = 10 * math.log10(255 ** 2 / (mse * 40 ** 2))
        assert f"{name} {math.sqrt(mse):.3f}, PSNR {dB:.1f} dB" in told
    told = observations.report(model, args, truth, truth + 0.5, None, samples, truth + 0.25)[0]
    assert "data's deviation: E[x_0 | given] 0.250" in told and "; given 0.500" in told


def test_how_samples_are_drawn_without_flags():
    image, points = (small_model(gaussian(300), shape, name) for name, shape in (
        ("unet", (2, 2, 1)), ("mlp", (1, 1, 3))))
    kernel = small_model(gaussian(300), (2, 2, 1), "paper", predict="paper")
    usual = dict(mode="samples", steps=None, particles=1, repeats=None, eta=None)
    inpaint, sharp = dict(mode="inpaint"), dpm.Contrast(image, 1)
    for model, change, contrast, T, repeats, eta in [
            (image, {}, None, 250, 1, 1), (image, dict(steps=9), None, 9, 1, 1),
            (image, dict(repeats=2), None, 35, 2, 1), (image, dict(eta=0.3), None, 250, 1, 0.3),
            (image, {}, sharp, 35, 5, 0.5), (image, dict(repeats=1, eta=1.0), sharp, 250, 1, 1),
            (image, inpaint, None, 35, 5, 1), (image, inpaint | dict(repeats=1), None, 70, 1, 1),
            (image, inpaint | dict(particles=2), None, 70, 1, 1),
            (image, dict(mode="denoise"), None, 70, 1, 1),
            (points, {}, None, None, 1, 1), (points, {}, sharp, None, 1, 0.5),
            (points, inpaint, None, None, 1, 1), (kernel, {}, None, 300, 1, 1),
            (kernel, inpaint, None, 300, 5, 1)]:
        for binary in (False, True):
            model.about["binary"], flags = binary, types.SimpleNamespace(**usual | change)
            sampling.settle(model, flags, contrast)
            assert (flags.steps, flags.repeats) == (T, repeats)
            assert flags.eta == (1 if binary and "eta" not in change else eta)
    draws = lambda *shape: observations.draws_of(types.SimpleNamespace(shape=shape))
    assert [draws(8, 8, 3), draws(128, 256, 1), draws(999, 999, 1)] == [6, 2, 1]


def test_the_room_for_a_large_picture(tmp_path, monkeypatch):
    """Of a picture of 4 million pixels the network takes most."""
    monkeypatch.setattr(os, "sysconf", lambda _: 2 ** 17)           # 17 GB
    flags = types.SimpleNamespace(mode="denoise", particles=1, gif=False, trajectory=False)
    model = types.SimpleNamespace(shape=(2000, 2000, 1), D=4_000_000, threads=1, comm=dpm.Alone())
    with refused("about 4[0-9.]* GB of memory"):
        sampling.check_room(model, flags, 1, tmp_path / "a.npz")


def test_what_is_missing(tmp_path):
    """Of 4 x 7 pixels in two colours; of a mask what is lighter than the middle grey."""
    row, column = np.divmod(np.arange(28).repeat(2), 7)
    parts = dict(left=column < 3, right=column > 3, top=row < 2, bottom=row > 1,
                 center=(row > 0) & (row < 3) & (column > 0) & (column < 5))
    for part, unknown in parts.items():
        assert (observations.missing(part, (4, 7, 2)) == unknown).all(), part
    a, b, c = (observations.missing("0.5", (4, 7, 2), seed) for seed in (0, 0, 1))
    assert a.sum() == 28 and (a == b).all() and (a != c).any()
    Image.fromarray(np.uint8([[0, 100, 127, 128, 255]])).save(tmp_path / "mask.png")
    assert observations.missing(str(tmp_path / "mask.png"), (1, 5, 1)).tolist() == [0, 0, 0, 1, 1]


def test_own_pictures_of_a_decoder(tmp_path):
    """They stand for the middle of their grey levels, as in its training."""
    model = small_model(gaussian(**BYTES), (2, 2, 1), "unet")
    model.about |= dict(binary=False, bytes=True)
    Image.fromarray(np.uint8([[0, 1, 2], [3, 4, 255]])).save(path := tmp_path / "a.png")
    args = types.SimpleNamespace(input=[path], number=None, seed=0)
    close(model.raw(observations.own_pictures(model, args)[1]), [[0.5, 1.5, 2.5, 3.5, 4.5, 255.5]])


def test_the_nearest_of_many():
    train = rng(99).standard_normal((5000, 3))
    dataset = types.SimpleNamespace(train=train, normalise=lambda raw, *_: raw.astype(np.float32))
    near, distance = observations.nearest(dataset, train[[1, 4500, 4999]] + 1e-3)
    close(near, train[[1, 4500, 4999]], 1e-6)
    close(distance, 1e-3, atol=3e-4)


def test_the_note_on_the_bar():
    model = types.SimpleNamespace(scale=40.0, D=4, about=dict(bytes=True))
    expected = math.log2(40) + math.log2(2 * math.pi * math.e) / 2 - 1.5  # L_null, less the gain
    assert evaluation.progress_note(model, 6 * LN2) == (
        f"K - L_null 6 bits, {expected:.3f} bits/dim")


def test_one_scale_of_grey_for_several_sheets():
    model = small_model(shape=(2, 2, 1))
    model.about |= dict(binary=False, bytes=False)
    x = np.array([[-1.0, 0.0, 1.0, np.nan]])
    assert figures.to_bytes(model, x).ravel().tolist() == [0, 127, 255, 128]
    assert figures.to_bytes(model, x, like=3 * x).ravel().tolist() == [85, 127, 170, 128]


def test_where_pictures_lie_on_a_page():
    """Row by row; times and columns from left to right, one row for each input. A one is white, in
    a sequence black."""
    model = small_model(shape=(2, 3, 1))
    model.shift, model.scale, model.about = 0.0, 1.0, dict(binary=False, bytes=True)
    of = lambda *values: np.array(values, float)[..., None].repeat(6, -1)
    read = lambda picture, zoom=3: np.asarray(picture)[2 * zoom::4 * zoom, 2 * zoom::5 * zoom]
    assert read(figures.sheet(model, of(1, 2, 3, 4, 5, 6), 3, 1), 1).tolist() == [
        [1, 2, 3], [4, 5, 6]]
    ts = figures.times(12, 10)
    kept = {t: of(*range(10 * t, 10 * t + 6)) for t in ts}
    assert read(figures.strip(model, kept, 2)).tolist() == [[10 * t + i for t in ts]
                                                            for i in (0, 2, 4)]
    sets = dict(truth=of([1], [2]), given=of([3], [4]), samples=of([5, 6], [7, 8]))
    picture, says = figures.sheet_of(model, sets, dict(mean=of([9], [10])), 99)
    assert read(picture).tolist() == [[1, 3, 5, 6, 9], [2, 4, 7, 8, 10]]
    assert says == "columns truth, what is given, 2 posterior samples, mean"
    for shape, bits in ((2, 3, 1), [0, 255]), ((1, 1, 6), [255, 0]):
        model.shape, model.about = shape, dict(binary=True, bytes=False)
        assert figures.to_bytes(model, of(0, 1)).reshape(2, 6)[:, 0].tolist() == bits


def test_points_are_drawn_in_their_units(monkeypatch):
    """The first coordinate to the right; where the other is missing, the line on which they lie."""
    model, made, axes = small_model(shape=(1, 1, 2)), [], figures._axes
    monkeypatch.setattr(figures, "_axes", lambda *a, **o: made.append(axes(*a, **o)) or made[-1])
    x = np.array([[0.0, 1.0], [2.0, 5.0], [0.25, np.nan], [np.nan, 0.75]])
    figures.points_picture(model, dict(x=x))
    axis = made[0][1][0, 0]
    close(np.concatenate([c.get_offsets() for c in axis.collections[:2]]), model.raw(x[:2]))
    (right, _), (_, up) = (line.get_data() for line in axis.lines)
    assert set(right) == {model.raw(0.25)} and set(up) == {model.raw(0.75)}


def test_what_the_figures_draw(tmp_path, monkeypatch):
    """Each curve under its name, in the unit on its axis; each panel in its place."""
    made = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, _: made.append(figure.axes))
    y = lambda panel, line=0: made[-1][panel].lines[line].get_ydata()
    figures.curve([",".join(train.COLUMNS), "3,60,1.5", "9,120,2.5"], None)
    assert made[-1][0].lines[0].get_xydata().tolist() == [[3, 1.5], [9, 2.5]]
    figures.by_t(3, dict(a=LN2 * np.arange(4)), "bits", "", None)
    close(made[-1][0].lines[0].get_xydata(), [[2, 2], [3, 3]])
    figures.schedule(small_model(gaussian(6), learned=True), None)
    a = small_model(gaussian(6), learned=True).diffusion.alpha_bar
    assert [line.get_label() for line in made[-1][0].lines] == ["before", "learned"]
    close(y(0, 1), (1 - a[1:]) / a[1:])
    close(y(1, 1), 1 - a[1:] / a[:-1])
    figures.against_steps([dict(steps=S, K_bits=5.0, bits_per_dim=3.0, frechet=8.0,
                                frechet_test=1.0) for S in (2, 4)], None)
    assert (y(0) == 3).all() and (y(1) == 8).all() and (np.array(y(1, 1)) == 1).all()
    told = dict(dataset="a", timesteps=4, schedule="b", objective="c", network="d", pixels=16)
    figures.comparison([told | dict(K_bits=64.0)], None)
    assert y(0).tolist() == [4]
    q, x = gaussian(9), rng(90).standard_normal((5, 4))
    figures.forgetting(q, x, None)
    close(y(0), [q.kl_to_pi(t, x).mean() / 4 / LN2 for t in range(1, 10)])
    model = gaussian_model(0.5, D=2)
    figures.figure_1(model, data.load("swissroll"), None, 50)
    for t, axis in zip((2, None, 50), made[-1][6:]):
        arrows = axis.collections[0]
        drift = model.p_back(arrows.XY, t).mean - arrows.XY if t else None
        if t:
            length = np.linalg.norm(drift, axis=1)
            shown = np.minimum(length, np.quantile(length, 0.15))   # longer arrows are cut
            close(np.stack([arrows.U, arrows.V], 1) * length[:, None], drift * shown[:, None])
    model = bits()[0]
    figures.figure_2(model, None)
    x, kept = model.sample(40, keep=(model.T,))
    assert (made[-1][0].images[0].get_array() == x).all()           # data left, noise right
    assert (made[-1][-1].images[0].get_array() == kept[model.T]).all()
    Image.new("L", (80, 40)).save(tmp_path / "samples.png")
    told |= dict(variance="e", predict="v", widths=None, decoder="f", frechet=1.0)
    figures.beside_each_other([(tmp_path, told)], None)
    assert made[-1][0].images[0].get_array().shape[:2] == (5, 80)   # the first of eight rows


def test_the_page_of_an_evaluation(capsys):
    """Every number beside its name, of a pixel, with its standard error."""
    names = {"K": "K", "L_null": "L_null", "K - L_null": "K_minus_L_null", "K*": "K_star",
             "K* - K": "K_star_minus_K", "L": "L_true", "learned": "K_learned", "beta": "K_beta",
             "posterior": "K_posterior", "upper bound": "entropy_upper", "lower bound":
             "entropy_lower", "the model's": "entropy_model", "L of these": "estimate_L"}
    names |= {f"S = {S}": f"estimate_{S}" for S in (1, 10, 100, 1000)}
    parts = {"- L_T": "L_T"}, {"+ H_q(X_T|X_0)": "H_q_T", "- H_q(X_1|X_0)": "H_q_1",
                               "- H_p(X_T)": "H_p_T"}
    alone = {"bits/dim": "bits_per_dim", "the same, discrete": "discretised_bits_per_dim",
             "Parzen, bits": "parzen_bits", "samples": "frechet", "test images": "frechet_test"}
    for part in parts:
        r = dict(pixels=5, timesteps=4, kl_bits=[0.0, 7.0, 1.0, 2.0, 3.0], estimate_examples=3,
                 frechet_steps=2, chains=[dict(steps=2, K_bits=50.0, bits_per_dim=3.25)],
                 **dict.fromkeys("dataset schedule network objective examples".split(), "a"))
        keys = [f"{key}_bits" for key in (names | part).values()] + list(alone.values())
        keys += [f"L_minus_estimate_{S}_bits" for S in (1, 10, 100, 1000)]
        for i, key in enumerate(keys):
            r |= {key: 10.0 * i + 5, f"{key}_se": 0.1 * i + 0.1}
        evaluation.print_page(r, [(3, 0.5, 20.0)], True, False)
        out = capsys.readouterr().out
        found = {name.strip(): (float(value), float(se or "nan")) for name, value, se in re.findall(
            r"^  (.{22}) *(-?[0-9.]+)(?: \+- ([0-9.]+))?", out, re.M)}
        for name, key in (names | part).items():
            sign = -1 if name[:2] == "- " else 1
            assert found[name] == approx((sign * r[f"{key}_bits"] / 5, r[f"{key}_bits_se"] / 5))
        for name, key in alone.items():
            assert found[name][0] == approx(r[key])
        sums = {"- sum L_t-1": -6, "- L_0": -7} if "- L_T" in part else {"- sum of KLs": -13}
        assert all(found[name][0] == approx(value / 5) for name, value in sums.items())
        gap, se = (r[f"L_minus_estimate_10_bits{end}"] for end in ("", "_se"))
        assert f"below L by {gap:.4f} +- {se:.4f}" in out
        assert "2     steps: K 10.0000, bits/dim 3.250" in out


def test_figure_3_denoises_from_where_the_noise_is(tmp_path, monkeypatch):
    model, begun = small_model(shape=(4, 4, 1), network="unet"), []
    x = rng(94).standard_normal((8, 16))
    model.about |= dict(binary=False, bytes=True)
    monkeypatch.setattr(dpm.DPM, "sample", lambda _, n, x_T=None: begun.append(x_T) or x[:n])
    figures.figure_3(model, types.SimpleNamespace(held_out=lambda n: x[:n]), tmp_path / "a.png")
    noise = dpm.generator(np, "figure 3").standard_normal(x.shape)
    close(begun[0], (x + noise) / math.sqrt(2))


def test_parzen_estimate():
    """Gaussians around the bytes of samples, of the width that suits held-out training images best;
    the log density of test images, in bits of pixels in [0, 1]."""
    bytes_ = lambda seed, n: rng(seed).normal(100, 40, (n, 4)).clip(0, 255).astype(np.uint8)
    model, samples = small_model(shape=(2, 2, 1)), bytes_(93, 30)
    dataset = types.SimpleNamespace(test=bytes_(95, 50), train=np.concatenate([
        np.resize(samples, (1000, 4)), bytes_(94, 1000)]))  # the last 1,000 are held out
    model.shift, model.scale, model.about = 7.0, 31.0, dict(binary=False, bytes=True, predict="v")
    model.sample = lambda *_, **__: model.normal(samples + 0.6)

    def density(x, sigma):
        square = (((x[:, None] - samples[None].astype(float)) / 255) ** 2).sum(2)
        log_p = np.log(np.exp(-square / 2 / sigma ** 2).mean(1))
        return (log_p - 2 * math.log(2 * math.pi * sigma ** 2)) / math.log(2)

    late = dataset.train[-1000:]
    best = max(np.logspace(-1, 0, 10), key=lambda sigma: density(late, sigma).mean())
    found = evaluation.parzen_estimate(model, dataset)
    assert found["parzen_sigma"] == approx(best) and 0.1 < best < 1
    assert found["parzen_bits"] == approx(density(dataset.test, best).mean())
    se = density(dataset.test, best).std() / math.sqrt(50)
    assert found["parzen_bits_se"] == approx(se)


# ------------------------------------------------------------------------------------------------
# 4. More theory
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variance", [1e-12, 0.3, 1.0])
def test_entropy_bounds_of_gaussian_data(variance):
    """Eq. 24 for N(0, variance I) in three dimensions, whose H_q(X_{t-1} | X_t) is in closed form;
    tight at 0 below, at 1 above."""
    q, t = gaussian_model(D=3).diffusion, np.arange(2, 51)
    lower, upper = (bound[2:] for bound in dpm.entropy_bounds(q, np.zeros((4, 3))))
    at = lambda t: q.alpha_bar[t] * variance + 1 - q.alpha_bar[t]
    spread = at(t - 1) - (1 - q.beta[t]) * at(t - 1) ** 2 / at(t)
    exact = 1.5 * np.log(2 * np.pi * np.e * spread)
    assert (lower <= exact + 1e-9).all() and (exact <= upper + 1e-9).all()
    tight = np.allclose(lower, exact, atol=1e-6), np.allclose(exact, upper, atol=1e-6)
    assert tight == (variance < 0.1, variance == 1)


@pytest.mark.parametrize("p0, rate", [(None, 0.5), ([0, 0, 0, 0, 0, 1, 0, 0], 0.5), ([1] * 8, 0.5),
                                      ([0, 1, 1, 0, 1, 0, 0, 0], 1 / 3)])
def test_entropy_bounds_of_bits(p0, rate):
    """Eq. 24 over all states; one state is tight below, independent bits above."""
    model, states, p0, forward, _, _ = bits(rate=rate, p0=p0)
    many = states[np.repeat(np.arange(8), np.round(12_000 * p0).astype(int))]
    (lower, upper), p_t = dpm.entropy_bounds(model.diffusion, many), p0
    for t in range(1, 5):
        joint = forward[t] * p_t
        p_t = joint.sum(1)
        exact = -(joint * np.log(joint / p_t[:, None] + 1e-300)).sum()
        assert model.diffusion.H_step(t, states) @ p0 == approx(-(joint * np.log(forward[t])).sum())
        if t > 1:
            assert lower[t] - 1e-3 <= exact <= upper[t] + 1e-3
            assert (abs(exact - lower[t]) < 1e-9) == (p0.max() == 1)
            assert (abs(exact - upper[t]) < 1e-9) == (p0.max() == 1 / 8)


def test_log_likelihood_of_linear_kernels():
    """With linear Gaussian kernels p(x_0) is a Gaussian in closed form. The estimate rises to it
    from below, its weights average to it without bias, and one trajectory gives K in the mean."""
    model, variance, one = gaussian_model(0.3, T=10), 1.0, np.ones((1, 1))
    for t in range(10, 0, -1):
        p = model.p_back(one, t)
        variance = float(p.mean[0, 0] ** 2 * variance + p.variance[0, 0])
    x0 = math.sqrt(0.3) * np.array([[0.1], [-1.0], [2.0]])
    exact = -0.5 * (x0[:, 0] ** 2 / variance + math.log(2 * math.pi * variance))
    log_w = dpm.log_weights(model, x0, 40_000, rng(55), batch=77_777)
    w = np.exp(log_w - exact[:, None])
    close(w.mean(1), 1, atol=5 * (w.std(1) / 200).max())
    assert (w.std(1) / 200).max() < 0.02
    means = [np.log(np.exp(log_w.reshape(3, -1, S)).mean(2)).mean(1) for S in (1, 4, 16, 400)]
    assert all((fewer < more).all() for fewer, more in zip(means, means[1:]))
    assert (means[-1] < exact + 0.01).all()
    model.network.moments = data.Mixture([[0.5]], 0.7).moments  # not the exact kernel: K is not L
    x0 = np.tile([[-1.0], [1.0]], (10_000, 1))
    log_w, found = dpm.log_weights(model, x0, 1, rng(57)), model.bound(x0, rng(58))
    error = log_w.std() / math.sqrt(20_000) + found["K_se"]
    assert log_w.mean() == approx(found["K"], abs=4 * error)
    assert found["K"] < found["L_null"] - 10 * error
    with refused("decoder has none"):
        dpm.log_weights(small_model(gaussian(**BYTES)), np.zeros((1, 3)), 1, rng(1))


@pytest.mark.parametrize("T", [2, 7, 1000])
def test_learned_schedule(T):
    """Whatever psi is, 0 < beta < 1 and alpha_bar falls from 1 - beta_1; at 0 it is linear in
    logit; smooth in t."""
    schedule = dpm.LearnedSchedule(T, 1e-8)
    size, = schedule.shapes["psi"]
    assert size == min(T - 1, 40) + 1
    a = schedule.forward(np.zeros(size))
    close(np.log(1 / a[1:] - 1), np.linspace(np.log(1e-8 / (1 - 1e-8)), 6, T), rtol=1e-7)
    for spread in (1, 100, 1e30):
        for i in range(5):
            psi = spread * rng(40, i).standard_normal(size)
            a = schedule.forward(psi)
            beta = 1 - a[1:] / a[:-1]
            assert a[0] == 1 and beta[0] == approx(1e-8) and (beta > 0).all() and (beta < 1).all()
            assert 2 - 1e-6 < np.log(1 / a[-1] - 1) < 10 + 1e-6
            if T == 1000:  # 999 steps between 40 knots within 12 of one another
                assert abs(np.diff(np.log(schedule._parts(psi)[0]))).max() < 12 / (998 / 39) + 1e-9


@pytest.mark.parametrize("T", [2, 7, 60])
def test_learned_schedule_backward(T):
    schedule = dpm.LearnedSchedule(T, 1e-3)
    psi, r = rng(41).standard_normal(schedule.shapes["psi"]), rng(42).standard_normal(T + 1)
    loss = lambda: float(r[2:] @ np.log(1 / schedule.forward(psi)[2:] - 1))
    expected = [quotient(loss, psi, d, h=1e-5) for d in np.eye(len(psi))]
    close(schedule.backward(psi, r), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("T", [7, 60, 1000])
def test_knots_of_a_learned_schedule(T):
    """Between the knots, first at t = 2 and last at T, the log of the step of level is a line."""
    schedule = dpm.LearnedSchedule(T, 1e-3)
    psi = rng(44).standard_normal(schedule.shapes["psi"])
    a = psi[:-1] / (1 + abs(psi[:-1]) / 6)
    a = np.interp(np.linspace(2, T, T - 1), np.linspace(2, T, len(a)), a)
    level = np.log(1 / schedule.forward(psi)[1:] - 1)
    close(np.diff(np.log(np.diff(level))), np.diff(a), atol=1e-6)


def test_a_schedule_is_learned():
    """Some steps on data near one point: K rises, and the diffusion is that of the weights."""
    model = small_model(gaussian(6, 1e-3), stir=0, learned=True)
    draw = lambda i: 0.3 * rng(93, i).standard_normal((64, 3)) + 1
    before, optimiser = model.diffusion.alpha_bar, model.optimiser(lr=0.01, steps=200, warmup=20)
    K = model.bound(draw(-1 % 1000), rng(94))["K"]
    for i in range(200):
        model.gradient(draw(i), 1, i)
        model.step(optimiser)
    learned = model.learned.forward(model.weights[model.learned]["psi"])
    assert (model.diffusion.alpha_bar == learned).all() and learned[1] == before[1]
    assert abs(np.log(learned / before)).max() > 0.1
    assert model.bound(draw(-1 % 1000), rng(94))["K"] > K + 1


# ------------------------------------------------------------------------------------------------
# 5. Posteriors
# ------------------------------------------------------------------------------------------------

def test_observation():
    """log r and its powers; the same for bits, where a known bit rules the other out."""
    o, q, b = dpm.Observation([0.7, 1.0, 5.0], [0.8, 0.0, np.inf]), gaussian(), binomial()
    x = np.array([[0.2, 1.0, 3.0], [1.0, 1.0, -1.0]])
    expected = -(x[:, 0] - 0.7) ** 2 / 2 / 0.64
    for power in (1.0, 0.4, 0.0):
        close(o.log_r(q, x, power), power * expected)
        bit = o.log_r(b, np.array([[0, 1, 0], [1, 1, 1.0]]), power)
        close(np.diff(bit), power * (0.7 ** 2 - 0.3 ** 2) / 2 / 0.64)
    assert o.log_r(b, np.array([[0, 0, 0.0]])) == -np.inf and (o.factors(q, 0.0)[1] == np.inf).all()
    assert (o.log_r(b, 0 * x, 0.0) == 0).all()  # r^0 rules nothing out
    for schedule, power in (("annealed", 0.75), ("constant", 1)):  # r^((T - t) / T), T = 12
        close(dpm.Posterior(small_model(), o, schedule)._log_r(x, 3), power * expected)


def axis_of(x):
    """The one direction in which CURVE changes."""
    return 0.3 * np.cos(np.arange(x.shape[1]))


CURVE = dpm.Function(lambda x: np.sin(x @ axis_of(x)),
                     lambda x: np.cos(x @ axis_of(x))[:, None] * axis_of(x))


@pytest.mark.parametrize("q, network, shape, predict", [
    (gaussian(), *NETWORKS[0], "v"), (gaussian(), *NETWORKS[1], "eps"),
    (gaussian(), *NETWORKS[2], "paper"), (gaussian(variance="beta"), *NETWORKS[1], "v"),
    (gaussian(variance="posterior"), *NETWORKS[0], "v"), (binomial(), "mlp", (1, 1, 4), "v"),
    (binomial(), "unet", (5, 6, 1), "v"), (binomial(), "paper", (5, 4, 1), "v")])
def test_r_of_what_a_network_predicts(q, network, shape, predict, monkeypatch):
    """log r_t(x_t) = log E r(x_0), x_0 as p_x0 has it, coordinates independent, for an Observation;
    for a Function a sum over 25 points, or r at the mean of bits. g, before `guided` gets it, is
    its slope along any line, in the mean of p_x0, through the network. Between the bits log odds
    are linear in x_t."""
    model, bit = small_model(q, shape, network, predict=predict), q.outputs == 1
    monkeypatch.setattr(dpm, "pieces", in_slices_of(2))
    (x, y), sigma = rng(69).random((2, 5, model.D)), np.resize([0.0, 0.4, np.inf], model.D)
    x, y = (np.round(x), np.round(y)) if bit else (4 * x - 2, 4 * y - 2)
    halves = (np.where(np.arange(model.D) % 2 == i, sigma, np.inf) for i in (0, 1))
    posterior = dpm.Posterior(model, [*(dpm.Observation(y, s) for s in halves), CURVE])
    model.gradient(y, 1)
    grad = model.grad.copy()
    dpm.Posterior(model, CURVE).predicted(x, 6)
    assert (model.grad == grad).all()  # it stays what a step goes against
    monkeypatch.setattr(q, "guided", lambda p, t, g, *_: g)
    with np.errstate(divide="ignore", invalid="ignore"):
        r = [np.where(sigma == 0, y == b, np.exp(-0.5 * (b - y) ** 2 / sigma ** 2)) for b in (0, 1)]

    def log_r(at, variance):
        z = model.forward(x, at)
        if bit:
            odds = [q._log_odds(b + 0 * x, at) for b in (0, 1)]
            mean = 1 / (1 + np.exp(-odds[0] - x * (odds[1] - odds[0]) - z[..., 0]))
            integral, curve = np.log(mean * r[1] + (1 - mean) * r[0]), CURVE.log_r(mean)
        else:
            mean, total = q.p_x0(x, at, z).mean, np.where(sigma < np.inf, variance + sigma ** 2, 1)
            far = np.where(sigma < np.inf, (mean - y) ** 2, 0)
            integral = -0.5 * far / total - 0.5 * np.log(total)
            h, a = np.linspace(-6, 6, 25)[:, None], axis_of(x)
            line = mean @ a + h * np.sqrt((variance * a ** 2).sum(1))
            curve = np.log((np.exp(np.sin(line) - h * h / 2)).sum(0) / np.exp(-h * h / 2).sum())
        return integral.sum(1) + curve

    for t in (2, 6, 12):
        at, expected, (p, found, g) = np.full(5, t), model.p_back(x, t), posterior.predicted(x, t)
        close(p.mean, expected.mean)
        close(p.variance, expected.variance)
        variance = q.x0_for_r(x, at, model.forward(x, at)).variance
        assert np.isfinite(found).all()
        close(found, log_r(at, variance))
        for direction in rng(68).standard_normal((3, *x.shape)):
            slope = quotient(lambda: log_r(at, variance), x, direction, 1e-5)
            close((g * direction).sum(1), slope, rtol=1e-5, atol=1e-5 * abs(slope).max())


def test_r_t_of_a_function():
    """constant and annealed: power times log r. At t = 1 of predicted x_0 has the law of the fixed
    last step, N(sqrt(1 - beta_1) x_1, beta_1 I)."""
    model, x, y = small_model(), rng(45).standard_normal((5, 3)), 0.3
    for schedule, power in (("constant", 1.0), ("annealed", 7 / 12)):
        close(dpm.Posterior(model, CURVE, schedule)._step(x, 5)[1], power * CURVE.log_r(x))
    beta = model.diffusion.beta[1]
    found = dpm.Posterior(model, dpm.Observation(np.full(3, y), 0.1))._step(x, 1)[1]
    far, total = math.sqrt(1 - beta) * x - y, beta + 0.01
    close(found, -0.5 * (far ** 2 / total + math.log(total)).sum(1))


@pytest.mark.parametrize("s", [0.7, 1.5, 4.0])
@pytest.mark.parametrize("power", [1.0, 0.3])
def test_a_function_is_averaged_along_its_gradient(s, power):
    """r = exp(-(a x - y)^2 / 2 s^2) for x ~ N(m, V): log E r = -1/2 (a m - y)^2 / (s^2 + a V a) -
    1/2 log(1 + a V a / s^2). For r = exp(-|x - y|^2 / 2 s^2) and V = v I the gradient is (y - m) /
    (s^2 + v) in every coordinate. A power of r divides s^2."""
    (m, V, y), a, s2 = rng(41).random((3, 5, 4)), np.array([0.5, -1.0, 0.8, 0.0]), s ** 2 * power
    one = dpm.Function(lambda x: -0.5 * (x @ a - 1) ** 2 / s2,
                       lambda x: -(x @ a - 1)[:, None] * a / s2)
    log_r, g = one.averaged(dpm.Normal(np, m, V), power)
    total = s ** 2 + V @ a ** 2
    close(log_r, -0.5 * (m @ a - 1) ** 2 / total - 0.5 * np.log(total / s ** 2), rtol=1e-6)
    close(g, -((m @ a - 1) / total)[:, None] * a, rtol=1e-6)
    every = dpm.Function(lambda x: -0.5 * ((x - y) ** 2).sum(1) / s2, lambda x: (y - x) / s2)
    y = y[:1]
    _, g = every.averaged(dpm.Normal(np, m, V[:, :1]), power)
    close(g, (y - m) / (s ** 2 + V[:, :1]), rtol=1e-6)
    assert all(np.isfinite(a).all() for a in one.averaged(dpm.Normal(np, 300 * m, V)))
    log_r, g = one.averaged(dpm.Bernoulli(np, m, 1 - m), power)  # of bits at the mean
    close(log_r, power * one.log_r(m))
    close(g, power * one.gradient(m))


@pytest.mark.parametrize("s", [0.1, 1e-2, 1e-4])
def test_a_narrow_function_does_not_throw_the_mean_too_far(s):
    """The mean of p r lies where r does, to half the distance of two points of the sum, a quarter
    of a deviation; the gradient at the mean of p would send it 1 / s^2 as far."""
    y, p = 1.3, dpm.Normal(np, rng(43).standard_normal((20, 1)), np.full((20, 1), 0.7))
    r = dpm.Function(lambda x: -0.5 * ((x - y) ** 2).sum(1) / s ** 2, lambda x: (y - x) / s ** 2)
    mean = p.tilted(r.averaged(p)[1])[0].mean
    assert (abs(mean - y) < 0.3 * math.sqrt(0.7)).all() and abs(mean - y).max() > s


@pytest.mark.parametrize("t", [2, 10, 30, 50])
@pytest.mark.parametrize("seen, y, sigma", [
    ([0], [1.1], 0.0), ([0], [1.1], 0.7), ([0, 1, 2], [-1.0] * 3, 0.7), ([1, 2], [9e3] * 2, 0.0),
    ([2], [-9e3], 0.0)])
def test_guidance_moves_the_mean(t, seen, y, sigma):
    """With the exact kernels of Gaussian data, x_0 of covariance C given x_t, the mean of x_0 moves
    by C d, d_i = (y_i - mean_i) / (sin^2 phi + sigma^2), but by at most 5 sin phi; what is known
    moves to its value. x_{t-1} follows as q_back has it."""
    S, x, sees = 0.1 * np.eye(3) + 0.9, np.full((1, 3), 0.2), np.full(3, np.inf)
    q, at, full = gaussian(50, 1e-3), np.array([t]), np.zeros(3)
    sees[seen], full[seen] = sigma, y
    law = correlated(S)
    mean, _, cov = law(x, q.alpha_bar[t])
    rest = 1 - q.alpha_bar[t]
    d, most = np.zeros((1, 3)), 5 * math.sqrt(rest)
    d[:, seen] = (y - mean[:, seen]) / (rest + sigma ** 2)
    move = np.clip(cov(d), -most, most)
    if sigma == 0:
        move[:, seen] = y - mean[:, seen]
    r = dpm.Observation(full, sees)
    p, _, g = dpm.Posterior(exact_model(q, law, 3), r).predicted(x, t)
    close(p.tilted(g)[0].mean, q.q_back(mean + move, x, at).mean, rtol=1e-8)


@pytest.mark.parametrize("t", [2, 10, 30, 50])
def test_guidance_by_a_function(t):
    """log r = b x moves the mean of Gaussian x_0 by C b, however far that is."""
    b, x, q = np.array([0.3, -0.1, 0.4]), np.full((1, 3), 0.2), gaussian(50, 1e-3)
    law = correlated(0.8 ** abs(np.arange(3)[:, None] - np.arange(3)))
    mean, _, cov = law(x, q.alpha_bar[t])
    r = dpm.Function(lambda x: x @ b, lambda x: b + 0 * x)
    p, _, g = dpm.Posterior(exact_model(q, law, 3), r).predicted(x, t)
    close(p.tilted(g)[0].mean, q.q_back(mean + cov(b), x, np.array([t])).mean, rtol=1e-8)
    twice = dpm.Posterior(None, [r, r]).of_x0(p := dpm.Normal(np, x, 0.3 + 0 * x))
    close(twice[1], 2 * b + 0 * x, rtol=1e-6)
    close(twice[0], 2 * x @ b + 2 * 0.3 * b @ b, rtol=1e-3)  # not 2 log E exp(b x)


def test_a_tilt_where_nothing_is_left_of_x0():
    """alpha_bar_T = 0: x_T says nothing of x_0, and r nothing of x_{T-1}."""
    q, x, t = dpm.Gaussian(dpm.schedule("paper", 8, 1e-3)), np.array([[0.4]]), np.array([8])
    p = q.q_step(x, t)
    assert q.guided(p, t, 1 + 0 * x, p, p) == 0


def test_posterior_samples():
    """Inpainting keeps the known exactly and changes the rest; a vanishing noise is the same as
    knowing; an observation for each sample; fewer steps; belief gives way to what is known."""
    model, y = gaussian_model(1.0, D=2), np.array([1.5, np.nan])  # nan: sigma says it is free

    def draw(sigma, number=200, y=y, model=model, **options):
        r = dpm.Observation(y, [sigma, np.inf])
        return dpm.Posterior(model, r, "constant").sample(number, 5, **options)

    plain, clamped = model.sample(200, seed=5), draw(0)
    assert (clamped[:, 0] == 1.5).all() and clamped[:, 1].std() > 0.8
    close(clamped[:, 1], plain[:, 1])  # independent coordinates: nothing else may change
    close(draw(1e-7), clamped, atol=1e-5)
    close(draw(0, 4, np.repeat(y[None], 4, 0), batch=3), clamped[:4])
    assert (draw(0, 4, model=model.shortened(9))[:, 0] == 1.5).all()
    model, r = small_model(), dpm.Observation([1.0, 0, 0], [0, 1, np.inf])
    x_T, of_r = (m.sample(3, keep=(12,))[1][12] for m in (model, dpm.Posterior(model, r)))
    close(of_r, x_T)  # a predicted r leaves pi alone
    model = bits(rate=0.4)[0]
    model.network.z[...] = [60.0, 0, 0]
    r = dpm.Observation([0.0, 0, 0], [0, np.inf, np.inf])
    x = dpm.Posterior(model, r, particles=4).sample(1000, batch=4000)
    assert (x[:, 0] == 0).all()
    close(x[:, 1:].mean(0), 0.4, atol=0.06)


def test_the_denoised_mean_is_the_exact_one():
    """Of x_0 ~ N(0, 4) and y = x_0 + sigma eps it is 4 y / (4 + sigma^2), also between the levels
    of the T steps; below and above them it comes to y and to 0. The paper's kernel says at a level
    of its own what it says there."""
    model, y = gaussian_model(4.0), rng(71).standard_normal((6, 1))
    for sigma in (0.1, 0.37, 1.0, 5.0, 9.9):
        close(observations.denoised(model, y, sigma), 4 * y / (4 + sigma ** 2))
    close(observations.denoised(model, y, 1e-6), y, rtol=3e-3)
    assert np.abs(observations.denoised(model, 1e6 * y, 1e6)).max() < 0.2
    model = small_model(shape=(5, 4, 2), network="paper", predict="paper")
    q, t, y = model.diffusion, np.full(3, 8), rng(72).standard_normal((3, 40))
    mean = q.p_x0(q.cos[8] * y, t, model.forward(q.cos[8] * y, t)).mean
    close(observations.denoised(model, y, float(q.sin[8] / q.cos[8])), mean, 1e-6)


@pytest.mark.parametrize("sigma", [0.3, 1.0, 40.0])
def test_a_chain_that_begins_at_noisy_data(sigma):
    """For data N(0, S) and y = x_0 + sigma eps its samples have the posterior N(K y, S - K S),
    K = S (S + sigma^2)^-1, up to the length of a step; it ends at the noise of y, which lies
    between two of the T steps."""
    S, y = np.array([[1.0, 0.8], [0.8, 1.0]]), np.array([[1.5, -0.5]])
    whole = exact_model(gaussian(500, 1e-3), correlated(S), 2)
    model = whole.until(sigma)
    q, known = model.diffusion, whole.diffusion
    assert q.alpha_bar[-1] == approx(1 / (1 + sigma ** 2))
    assert (np.diff(q.alpha_bar) < 0).all() and q.alpha_bar[0] == 1
    close(q.s[2:], np.interp(q.level[2:], known.level[2:], known.s[2:]), rtol=0.01)  # usual steps
    x_T = y / math.sqrt(1 + sigma ** 2)
    apart = x_T + np.arange(5)[:, None]
    x, rngs = apart, [dpm.generator(np, "sample", 4, k) for k in range(5)]
    mean, cov = x_T[0], np.zeros((2, 2))
    for t in range(model.T, 0, -1):                 # its steps are linear in x_t
        p = model.p_back(np.eye(2), t)
        mean, cov = mean @ p.mean, p.mean.T @ cov @ p.mean + np.diag(p.variance[0] + np.zeros(2))
        x = model.p_back(x, t).draw(model.noise(rngs))
    K = S @ np.linalg.inv(S + sigma ** 2 * np.eye(2))
    close(mean, K @ y[0], atol=0.004)
    close(cov, S - K @ S, atol=0.01 * (S - K @ S)[0, 0])
    for batch in (2, 5):                            # each from its own
        close(model.sample(5, 4, x_T=apart, batch=batch), x)


@pytest.mark.parametrize("kind", dpm.SCHEDULES)
def test_a_chain_until_one_of_its_times_is_its_beginning(kind):
    q = dpm.Gaussian(dpm.schedule(kind, 60, 1e-3))
    for t in (2, 17, 59):
        close(q.until(float(q.sin[t] / q.cos[t])).alpha_bar, q.alpha_bar[:t + 1])
        assert q.until(0.999 * float(q.sin[t] / q.cos[t])).T == t  # steps no longer than usual
    close(q.until(1e-6).alpha_bar, q.alpha_bar[:3])
    q = gaussian(60, 1e-3, kind, variance="beta")
    assert q.until(1.0).config == q.config
    q = gaussian(40, 1e-12, kind)                   # where level is cut, but sigma is not
    for sigma in (1e-5, 1e-4):
        last = q.until(sigma).alpha_bar[-1]
        close((1 - last) / last, max(sigma, float(q.sin[2] / q.cos[2])) ** 2, rtol=1e-3)
    for wrong in (0, -1.0, math.nan):
        with refused("above 0"):
            q.until(wrong)


@pytest.mark.parametrize("s2", [4.0, 0.05])
@pytest.mark.parametrize("schedule", ["constant", "annealed"])
def test_denoising_follows_its_recursion(schedule, s2):
    """With linear kernels and a Gaussian r at every step, the mean and the variance of x_t follow
    from those of x_{t+1}: as an Observation, whose product is exact, and as a Function, which moves
    the mean as far, even if r is narrower than a step, and leaves the variance as it is."""
    model, y, one = gaussian_model(D=20), 1.5, np.ones((1, 20))
    function = dpm.Function(lambda x: -0.5 * ((x - y) ** 2).sum(1) / s2, lambda x: (y - x) / s2)
    twice = [dpm.Observation(np.full(20, y), math.sqrt(2 * s2))] * 2
    for r in (twice, function):
        mean, variance = 0.0, 0.0
        for t in range(50, -1, -1):  # x_t from p(x_t | x_{t+1}), at T from pi
            p = model.p_back(one, t + 1) if t < 50 else model.diffusion.pi((1, 20))
            slope, f_sigma = float(p.mean[0, 0]), float(p.variance.ravel()[0])
            power = 1 - t / 50 if schedule == "annealed" else 1.0
            gain = power / s2 / (1 / f_sigma + power / s2)
            mean = (1 - gain) * slope * mean + gain * y
            left = f_sigma * (1 if r is function else 1 - gain)
            variance = ((1 - gain) * slope) ** 2 * variance + left
        x = dpm.Posterior(model, r, schedule).sample(500, 6, batch=500)
        assert x.mean() == approx(mean, abs=5 * math.sqrt(variance / 10_000))
        assert x.var() == approx(variance, rel=5 * math.sqrt(2 / 10_000))


@pytest.mark.parametrize("y, sigma, says", [
    ([1.0, np.nan], [0, 0.5], "NaN"), ([1.0, 2.0], [-1, 0], "must be 0"),
    ([1.0, 2.0], [np.nan, 0], "must be 0"), ([1.0, 2.0], [0, 0, 0], "shape"),
    (np.zeros((3, 2)), [0, np.inf], "does not fit"), (np.zeros(3), 1.0, "does not fit")])
def test_bad_observations(y, sigma, says):
    with refused(says):
        dpm.Posterior(gaussian_model(D=2), dpm.Observation(y, sigma)).sample(4)


@pytest.mark.parametrize("schedule", dpm.R_SCHEDULES)
def test_observations_of_all_and_of_nothing(schedule):
    """All known: that is the sample. All free: samples of p(x_0)."""
    model, y = small_model(stir=0.1), np.array([0.5, -1.0, 2.0])
    known, free = (dpm.Posterior(model, dpm.Observation(y, sigma), schedule).sample(3, 5)
                   for sigma in (0.0, np.inf))
    assert (known == y).all()
    close(free, model.sample(3, 5))


@pytest.mark.parametrize("r, options, says", [
    ("ink", {}, "r must be"), ([], {}, "r must be"), ([CURVE, "ink"], {}, "r must be"),
    ([dpm.Observation([1.0, 0], [0, np.inf])] * 2, {}, "two observations know"),
    (CURVE, dict(particles=2, repeats=2), "go with particles"),
    (CURVE, dict(repeats=0), "1 or more"), (CURVE, dict(particles=0), "1 or more"),
    (CURVE, dict(r_schedule="linear"), "no r-schedule"),
    (CURVE, dict(r_schedule="predicted"), "a network with a backward"),
    (dpm.Function(lambda x: x, lambda x: x), dict(particles=2), "log_r of your r returns"),
    (dpm.Function(lambda x: x[:, 0], lambda x: 1.0), {}, "returns float"),
    (dpm.Function(lambda x: x[:, 0] - np.inf, lambda x: x), {}, "returns NaN or infinite"),
    (dpm.Function(lambda x: x[:, 0], lambda x: x * np.nan), {}, r"\|x\| is [0-9]")])
def test_bad_r(r, options, says):
    with refused(says):
        options = dict(r_schedule="constant") | options
        dpm.Posterior(gaussian_model(D=2), r, **options).sample(4)
    with refused("0 or 1"):
        dpm.Posterior(bits()[0], dpm.Observation([0.5, 1, 0], [0, np.inf, np.inf])).sample(4)
    for w in (-1, math.nan, math.inf):
        with refused("0 or more"):
            dpm.Contrast(gaussian_model(), w)


def test_a_contrast_is_a_ratio_of_kernels():
    """Numbers: p^(1 + w) / p_weak^w, normalised, p_weak with the variance of p, so that their logs
    differ by the same constant at every x. Bits: the same of what z says of x_0."""
    for make, eta in ((gaussian, 1.0), (gaussian, 0.6), (binomial, 1.0)):
        q = make()
        model, weak = (small_model(q, stir=stir) for stir in (0.2, 0.15))
        contrast, t = dpm.Contrast(weak, 1.7), np.full(5, 6)
        x, a, b = data_for(q, 15, 3, 82).reshape(3, 5, 3)
        if make is gaussian:
            p, p_weak, found = (m.p_back(x, 6, eta, c) for m, c in (
                (model, None), (weak, None), (model, contrast)))
            close(found.variance, p.variance)
            p_weak.variance = p.variance
        else:
            zs = model.forward(x, t), weak.forward(x, t), contrast.forward(model, x, t)
            p, p_weak, found = (q.p_x0(x, t, z) for z in zs)
            close(model.p_back(x, 6, 1.0, contrast).one, q.p_back(x, t, zs[2]).one)
        ratio = lambda d: d.log_density(a) - d.log_density(b)
        close(ratio(found), 2.7 * ratio(p) - 1.7 * ratio(p_weak))
        assert abs(ratio(p) - ratio(p_weak)).max() > 1e-3


def chain_variance(model, mean, again=0, eta=1.0):
    """Of the chain of Gaussian data, where a step has the mean mean(p, t, decides) x_t: it goes
    back step by step, and at those that decide `again` times up by q_step and back; and how often
    it went up."""
    q, variance, extra, one = model.diffusion, 1.0, 0, np.ones((1, 2))
    for t in range(model.T, 0, -1):
        p, decides = model.p_back(one, t, eta), -2 <= q.level[t] <= 4
        slope = mean(p, t, decides)[0, 0]
        step = lambda v: slope ** 2 * v + np.broadcast_to(p.variance, (1, 2))[0, 0]
        variance = step(variance)
        for _ in range(again * decides):
            variance, extra = step((1 - q.beta[t]) * variance + q.beta[t]), extra + 1
    return variance, extra


def test_repeats_follow_their_recursion():
    model = gaussian_model(0.5, D=2).shortened(10)
    variance, extra = chain_variance(model, lambda p, *_: p.mean, again=2)
    assert variance == approx(0.5, rel=0.1) and 4 < extra < 2 * model.T  # p has about 0.5
    nothing = dpm.Function(lambda x: 0 * x[:, 0], lambda x: 0 * x)
    posterior = dpm.Posterior(model, nothing, "constant", repeats=3)
    x = posterior.sample(6000, 4, batch=6000)
    assert x.var() == approx(variance, rel=0.02) and abs(x.mean()) < 0.01
    close(posterior.sample(2, 4, first=7), x[7:9])
    close(model.sample(2, 4, first=7, repeats=3), x[7:9])
    for x_T, repeats in ((None, 0), (np.ones((2, 2)), 3)):
        with refused("repeats must be 1"):
            model.sample(2, repeats=repeats, x_T=x_T)


@pytest.mark.parametrize("eta, again", [(1.0, 0), (0.5, 2)])
def test_a_contrast_follows_its_recursion(eta, again):
    """Kernels of Gaussian data are linear in x_t, and so is their contrast at the steps that decide
    what x_0 will be. Of a model and itself there is none. The worse one may have more steps."""
    (model, weak), w, one = (gaussian_model(v, D=2) for v in (0.5, 1.5)), 1.0, np.ones((1, 2))
    model, contrast = model.shortened(20), dpm.Contrast(weak, w)
    T, level, weak = 20, model.diffusion.level, weak.shortened(20)
    variance, extra = chain_variance(model, lambda p, t, decides: (
        p.mean + decides * w * (p.mean - weak.p_back(one, t, eta).mean)), again, eta)
    assert 0.1 < variance < 0.3 and level[T] > 4 and extra >= 3 * again
    sample = lambda n, *seed, **more: model.sample(
        n, *seed, **dict(eta=eta, repeats=1 + again, contrast=contrast) | more)
    x = sample(6000, 4, batch=6000)
    assert x.var() == approx(variance, rel=0.02) and abs(x.mean()) < 0.01
    close(sample(2, 4, first=7), x[7:9])
    plain, sharp = (sample(2, keep=range(1, T + 1), contrast=c)[1] for c in (None, contrast))
    begins = np.flatnonzero(level <= 4).max()  # the first step that decides
    assert all((sharp[t] != plain[t]).all() == (t < begins) for t in range(1, T + 1))
    close(sample(9, 4, contrast=dpm.Contrast(model, w)), sample(9, 4, contrast=None))
    pictures, small = (small_model(gaussian(T), (side, 5, 1), "unet") for T, side in (
        (12, 6), (20, 4)))
    small.theta *= 0.9  # a U-Net of another size is one of this size
    x = rng(83).standard_normal((2, 30))
    p, p_small = (m.with_diffusion(pictures.diffusion).resized(6, 5).p_back(x, 5)
                  for m in (pictures, small))
    close(pictures.p_back(x, 5, contrast=dpm.Contrast(small, w)).mean,
          p.mean + w * (p.mean - p_small.mean))


def test_resampling():
    """Systematic: the points (i + u) / N choose each particle floor or ceil of N w times, N w times
    in the mean. Only where the effective number is below N / 2; at the last step one of each."""
    w, count = rng(62).dirichlet(np.ones(8), 3), lambda rows: np.bincount(rows, minlength=8)
    us = (np.arange(999) + 0.5) / 999
    chosen = [[dpm.stratified(8, each, u) for each in w] for u in us]
    counts = np.array([[count(rows) for rows in c] for c in chosen])
    close(counts.mean(0), 8 * w, atol=0.01)
    assert (abs(counts - 8 * w) < 1).all() and (counts.sum(2) == 8).all()
    alike = np.array([[7], [9], [5], [1]])  # so many of 16 particles have the same weight
    log_w = np.where(np.arange(16) < alike, 0.0, -np.inf)
    rows, drawn = dpm.resampled(log_w, [rng(i) for i in range(4)])
    rows = rows.reshape(4, 16) - 16 * np.arange(4)[:, None]
    assert (drawn == [True, False, True, True]).all() and (rows[1] == np.arange(16)).all()
    assert (rows[3] == 0).all() and set(rows[0]) == set(range(7))
    last = [dpm.resampled(log_w, [rng(i, j) for i in range(4)], last=True)[0] for j in range(300)]
    assert np.shape(last) == (300, 4) and (np.array(last)[:, 3] == 48).all()
    assert np.bincount(np.array(last)[:, 0], minlength=7).min() > 20 and np.max(last, 0)[0] == 6


# Posteriors against the truth, with the best kernels there are. Run with -s to see the table

class Exact(dpm.IdealNetwork):
    """An IdealNetwork with a backward, for one thread: law(x, alpha_bar) gives E[x_0 | x_t],
    Var[x_0 | x_t], and what multiplies by Cov[x_0 | x_t]: E rises by cos / sin^2 Cov dx_t, for
    bits by their log odds Cov."""

    def __init__(self, law, rate=None):
        self.law, self.rate = law, rate

    def moments(self, x, a):
        self.a, (self.mean, variance, self.cov) = a, self.law(x, float(a[0, 0]))
        return (self.mean, variance) if self.rate is None else (self.mean,)

    def backward(self, dz, tape):
        d, a = dz.reshape(*self.mean.shape, -1)[..., 0], self.a
        if self.rate is None:  # v = (cos x_t - E) / sin
            return (np.sqrt(a) * d - np.sqrt(a) / (1 - a) * self.cov(d)) / np.sqrt(1 - a)
        spread, zero = self.mean * (1 - self.mean), self.rate * (1 - a)
        slope = np.log((a + zero) / zero * (1 - zero) / (1 - a - zero))
        d_mean = np.where(spread > 0, d / np.maximum(spread, 1e-300), 0)
        return slope * (self.cov(d_mean) - d)  # z = the log odds of E less those of x_t alone


def exact_model(q, law, D, rate=None):
    return dpm.DPM(q, Exact(law, rate), (1, 1, D), threads=1, dtype="float64")


def correlated(S):
    """The law of N(0, S)."""
    def law(x, a):
        gain = math.sqrt(a) * S @ np.linalg.inv(a * S + (1 - a) * np.eye(len(S)))
        C = S - math.sqrt(a) * gain @ S
        return x @ gain.T, np.broadcast_to(np.diag(C), x.shape), lambda d: d @ C
    return law


def covariance_of(points, w):
    """Multiplies by the covariance of points (M, D) of weights w (n, M)."""
    mean = w @ points
    return lambda d: (w * (d @ points.T)) @ points - mean * (mean * d).sum(1, keepdims=True)


def mixed(centres, sigma):
    """The law of equally many points around each centre, see data.Mixture."""
    moments = data.Mixture(centres, sigma).moments

    def law(x, a):
        v = a * sigma ** 2 + 1 - a
        square = a * (centres ** 2).sum(1) - 2 * math.sqrt(a) * x @ centres.T
        between = covariance_of(centres, softmax(-square / (2 * v), 1))
        shrink, left = 1 - a * sigma ** 2 / v, sigma ** 2 * (1 - a) / v
        return *moments(x, a), lambda d: shrink ** 2 * between(d) + left * d
    return law


def ar1_case(denoise):
    """AR(1) of correlation 0.8 in 6 dimensions, half of the coordinates known or all under noise:
    the KL from the Gaussian fitted to the samples to the exact posterior, nats."""
    i = np.arange(6)
    S, known, unknown = 0.8 ** abs(i[:, None] - i), (i % 2 == 0) | denoise, (i % 2 == 1) | denoise
    y = np.linalg.cholesky(S) @ rng(63).standard_normal(6)
    seen = S[np.ix_(known, known)] + 0.25 * np.eye(known.sum()) * denoise
    gain = S[np.ix_(unknown, known)] @ np.linalg.inv(seen)
    mean, C = gain @ y[known], S[np.ix_(unknown, unknown)] - gain @ S[np.ix_(known, unknown)]

    def distance(x):
        assert denoise or (x[:, known] == y[known]).all()
        m, c = x[:, unknown].mean(0) - mean, np.linalg.solve(C, np.cov(x[:, unknown].T))
        return 0.5 * (np.trace(c) - len(m) + m @ np.linalg.solve(C, m) - np.linalg.slogdet(c)[1])

    model = exact_model(gaussian(50 if denoise else 80, 1e-3), correlated(S), 6)
    return model, dpm.Observation(y, np.where(known, 0.5 * denoise, np.inf)), 1000, distance


def roll_case():
    """A roll of 80 points under noise, one coordinate given: total variation to the density on
    that line."""
    phi = 1.5 * np.pi * (1 + 2 * (np.arange(80) + 0.5) / 80)
    centres = np.stack([phi * np.cos(phi), phi * np.sin(phi)], 1) / 7.5
    fine = np.stack([np.full(1500, 1.0), (np.arange(1500) + 0.5) / 250 - 3], 1)
    truth = np.exp(data.Mixture(centres, 0.1).log_density(fine)).reshape(20, 75).sum(1)

    def distance(x):
        found = np.histogram(x[:, 1], np.linspace(-3, 3, 21))[0] / len(x)
        return 0.5 * abs(found - truth / truth.sum()).sum()

    model = exact_model(gaussian(60, 1e-4), mixed(centres, 0.1), 2)
    return model, dpm.Observation([1.0, 0], [0, np.inf]), 1000, distance


def modes_case():
    """Two modes of weights 3/4 and 1/4 under an Observation and a Function: error of a weight."""
    x, centres = np.linspace(-6, 6, 6001), np.array([[-1.2], [-1.2], [-1.2], [1.2]])
    log_r = lambda x: -0.5 * (x - 0.2) ** 2 / 0.64 + 0.3 * np.sin(x)
    posterior = np.exp(data.Mixture(centres, 0.3).log_density(x[:, None]) + log_r(x))
    weight = posterior[x > 0].sum() / posterior.sum()
    assert 0.4 < weight < 0.6  # the data's own is 1/4
    sine = dpm.Function(lambda x: 0.3 * np.sin(x[:, 0]), lambda x: 0.3 * np.cos(x))
    model = exact_model(gaussian(50, 1e-3), mixed(centres, 0.3), 1)
    distance = lambda x: abs((x > 0).mean() - weight)
    return model, [dpm.Observation([0.2], [0.8]), sine], 2000, distance


def heartbeat_case():
    """Three zeros given that leave two phases open: the share of samples that are no heartbeat of
    these."""
    patterns, y, sigma = data.load("heartbeat").truth.patterns, np.zeros(20), np.full(20, np.inf)
    sigma[[5, 6, 12]] = 0

    def law(x, a):
        one, zero = a + 0.2 * (1 - a), 0.2 * (1 - a)
        w = softmax(x @ patterns.T * np.log(one / zero * (1 - zero) / (1 - one)), 1)
        return w @ patterns, None, covariance_of(patterns, w)

    def distance(x):
        phases = (x[:, None] == patterns).all(2).mean(0)
        assert phases[:3].max() == 0
        assert phases.sum() < 0.9 or abs(phases[3] - phases[4]) < 4 / math.sqrt(len(x))
        return 1 - phases.sum()

    model = exact_model(binomial(50, 1e-5, rate=0.2), law, 20, 0.2)
    return model, dpm.Observation(y, sigma), 300, distance


def bits_case():
    """Three bits and a table of random kernels, by enumeration: a noisy bit, and a Function that is
    linear in the bits; total variation."""
    model, states, _, _, reverse, p = bits(rate=0.4)
    for t in range(model.T, 0, -1):
        p = reverse[t] @ p
    tilt = np.array([0.0, 1.5, -1.0])
    p = p * np.exp(states @ tilt - 0.5 * (states[:, 0] - 0.9) ** 2 / 0.36)

    def distance(x):
        found = np.bincount((x @ [1, 2, 4]).astype(int), minlength=8) / len(x)
        return 0.5 * abs(found - p / p.sum()).sum()

    function = dpm.Function(lambda x: x @ tilt, lambda x: x * 0 + tilt)
    return model, [dpm.Observation([0.9, 0, 0], [0.6, np.inf, np.inf]), function], 4000, distance


@pytest.mark.parametrize("name, case, limit, crowd, alone", [
    ("AR(1), half known: KL, nats", lambda: ar1_case(False), 0.02, 16, True),
    ("AR(1), denoised: KL, nats", lambda: ar1_case(True), 0.03, 64, True),
    ("roll, one coordinate: TV", roll_case, 0.08, 16, False),
    ("two modes: error of a weight", modes_case, 0.03, 16, False),
    ("heartbeat, three bits: share invalid", heartbeat_case, 0.015, 16, True),
    ("three bits: TV", bits_case, 0.03, 32, False)])
def test_posteriors_against_the_truth(name, case, limit, crowd, alone):
    """With that many particles samples have the exact posterior's distribution, with the paper's
    sampler they do not. Where steps are small and the answer is no choice between modes, a
    predicted r comes halfway and more with one particle `alone`."""
    (model, r, number, distance), found = case(), {}
    for schedule, N in ("constant", 1), ("predicted", 1), ("predicted", crowd):
        x = dpm.Posterior(model, r, schedule, N).sample(number, 3, batch=20_000)
        found[schedule, N] = distance(x)
    assert found["predicted", crowd] < limit, f"{name}: {found}"
    assert found["constant", 1] > 2 * found["predicted", crowd], f"{name}: {found}"
    assert not alone or found["constant", 1] > 2 * found["predicted", 1], f"{name}: {found}"


@pytest.mark.parametrize("case", [lambda: ar1_case(True), heartbeat_case])
def test_repeats_come_closer_to_the_truth(case):
    """Of one particle, and with exact kernels: what is left of the error is below a half."""
    model, r, number, distance = case()
    once, often = (distance(dpm.Posterior(model, r, repeats=n).sample(number, 3, batch=20_000))
                   for n in (1, 10))
    assert often < 0.5 * once


@pytest.mark.parametrize("kind", ["Function", "Observation"])
@pytest.mark.parametrize("schedule", dpm.R_SCHEDULES)
def test_particles_are_exact(schedule, kind):
    """For every r_t, also at x_T, whose weight matters where r tilts a pi that still remembers: few
    steps, alpha_bar_T = 0.13. White data has exact kernels; under the Gaussian r its posterior is
    N(2 / 2.44, 1.44 / 2.44)."""
    model = exact_model(dpm.Gaussian(np.array([1, 0.95, 0.6, 0.13])), correlated(np.eye(1)), 1)
    two = [dpm.Observation([y], 1.2 * math.sqrt(2)) for y in (1.0, 3.0)]  # their product is one
    r = two if kind == "Observation" else dpm.Function(
        lambda x: -0.5 * (x[:, 0] - 2) ** 2 / 1.44, lambda x: (2 - x) / 1.44)
    x, kept = dpm.Posterior(model, r, schedule, 100).sample(1500, 7, batch=150_000, keep=(1,))
    v = 1.44 / 2.44
    assert x.mean() == approx(2 / 2.44, abs=4 * math.sqrt(v / 1500))
    assert x.var() == approx(v, rel=4 * math.sqrt(2 / 1500))
    correlation = math.sqrt(0.95 * v / (0.95 * v + 0.05))  # x_1 is of the particle that was chosen
    assert np.corrcoef(x[:, 0], kept[1][:, 0])[0, 1] == approx(correlation, abs=0.02)


def test_particles_do_not_depend_on_the_batch():
    model = exact_model(gaussian(20), correlated(np.eye(2) + 0.5), 2)
    y = np.array([[0.3, 1.0], [0.5, -1], [2, 0], [1, 1], [0, 0]])
    posterior = dpm.Posterior(model, dpm.Observation(y, [0.5, np.inf]), particles=8)
    made, ended = [], lambda ticks: made.append(len(ticks)) or ticks
    close(posterior.sample(5, 4, batch=9, progress=ended), posterior.sample(5, 4, batch=1000))
    assert made == [5 * 20]                         # 8 chains of 9 at a time: one sample


# ------------------------------------------------------------------------------------------------
# 6. Determinism and checkpoints
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("network, shape, options", [
    (*NETWORKS[0], dict(learned=True)), (*NETWORKS[1], dict(predict="eps")),
    (*NETWORKS[2], dict(predict="paper", learned=True))])
def test_training_is_deterministic_and_resumes_bit_for_bit(tmp_path, network, shape, options):
    def train(model, optimiser, first, last):
        for i in range(first, last):
            x0 = rng(1, i).standard_normal((16, model.D)).astype(model.dtype)
            model.gradient(x0, 0, i)
            model.step(optimiser)

    def fresh():
        model = small_model(shape=shape, network=network, dtype="float32", **options)
        return model, model.optimiser(steps=12, warmup=3)

    (model, optimiser), (again, optimiser_again) = fresh(), fresh()
    train(model, optimiser, 0, 12)
    train(again, optimiser_again, 0, 5)
    dpm.save(again, tmp_path / "c.npz", optimiser_again)
    resumed, optimiser_resumed = dpm.resume(tmp_path / "c.npz", steps=12, warmup=3)
    assert optimiser_resumed.step == 5
    assert (resumed.diffusion.alpha_bar == again.diffusion.alpha_bar).all()
    train(resumed, optimiser_resumed, 5, 12)
    assert (resumed.theta == model.theta).all() and not (again.theta == model.theta).all()
    for name in ("average", "m", "v"):
        assert (getattr(optimiser_resumed, name) == getattr(optimiser, name)).all()
    dpm.save(model, tmp_path / "c.npz", optimiser)  # what is sampled is the average
    assert (dpm.load(tmp_path / "c.npz").theta == optimiser.average).all()


@pytest.mark.parametrize("q, options", [
    (gaussian(), dict(learned=True)), (gaussian(variance="beta"), dict(predict="eps")),
    (gaussian(**BYTES), {}), (binomial(mean=0.45), {}),
    (gaussian(), dict(network="paper", predict="paper"))])
def test_checkpoint_round_trip(tmp_path, q, options):
    """The same model, to the last bit, or in half precision if asked; all that it was told."""
    options = dict(network="unet", dtype="float32", stir=0.1) | options
    model, x0 = small_model(q, (4, 4, 1), **options), data_for(q, 5, 16, 20)
    dpm.save(model, tmp_path / "full.npz")
    dpm.save(model, tmp_path / "half.npz", half=True)
    loaded, half = (dpm.load(tmp_path / f"{name}.npz", threads=2) for name in ("full", "half"))
    assert (loaded.shift, loaded.scale, loaded.shape) == (0.5, 2.0, (4, 4, 1))
    assert [dpm.load(tmp_path / "full.npz", threads=n).threads for n in (1, 3)] == [1, 3]
    assert loaded.diffusion.config == model.diffusion.config and loaded.about["dataset"] == "x"
    ours, theirs = model.bound(x0, rng(21)), loaded.bound(x0, rng(21))
    assert (theirs["K"], theirs["L_null"]) == (ours["K"], ours["L_null"])
    assert (loaded.sample(2) == model.sample(2)).all() and loaded.dtype == model.dtype
    assert (half.theta == model.theta.astype(np.float16)).all()
    assert (half.theta != model.theta).any()
    assert half.bound(x0, rng(21))["K"] == approx(ours["K"], rel=1e-2)
    assert np.load(tmp_path / "half.npz")["average"].dtype == np.float16
    assert {p.name for p in tmp_path.iterdir()} == {"full.npz", "half.npz"}  # no temporary file
    with refused("cannot be resumed"):
        dpm.resume(tmp_path / "full.npz")
    if isinstance(q, dpm.Gaussian):                 # a part of its schedule
        model = model.until(1.5)
        if model.learned:
            with refused("with all steps"):
                dpm.save(model, tmp_path / "part.npz")
        else:
            dpm.save(model, tmp_path / "part.npz")
            loaded = dpm.load(tmp_path / "part.npz", threads=2)
            assert loaded.T == model.T < q.T
            assert (loaded.sample(2) == model.sample(2)).all()
    with refused("as `build` has made it"):
        dpm.save(dpm.DPM(q, model.network, model.shape), tmp_path / "by_hand.npz")


def test_which_checkpoint_is_in_a_directory(tmp_path):
    """That of the run; where there is none, a shipped model; a file is what it says."""
    shipped, path = HERE / "data" / "swissroll", tmp_path / "checkpoint.npz"
    assert runs.checkpoint_in(shipped) == shipped / "model.npz"
    assert runs.checkpoint_in(tmp_path) == path     # which is then missed by its name
    for name in ("model.npz", "checkpoint.npz"):
        (tmp_path / name).write_bytes(b"")
    assert runs.checkpoint_in(tmp_path) == runs.checkpoint_in(path) == path


def test_shares_of_a_checkpoint(tmp_path):
    """Two ranks of a thread are two shares, which one rank goes on with in two threads."""
    two, path = small_model(threads=1, comm=Rank(0)), tmp_path / "c.npz"
    dpm.save(two, path, two.optimiser())
    assert dpm.resume(path)[0].threads == 2
    resumed, _ = dpm.resume(path, comm=two.comm)
    assert resumed.threads == 1 and resumed.comm is two.comm is dpm.load(path, comm=two.comm).comm


def test_bad_checkpoints(tmp_path):
    """Damaged, of another version, changed, or with a byte changed: one line, or the same."""
    model, bad = small_model(), tmp_path / "bad.npz"
    dpm.save(model, tmp_path / "good.npz", model.optimiser())
    raw, content = (tmp_path / "good.npz").read_bytes(), dict(np.load(tmp_path / "good.npz"))

    def is_refused(says, **change):
        if change:
            np.savez(bad, **(content | change))
        for read in (dpm.load, dpm.resume):
            with refused(says) as caught:
                read(bad)
            assert "\n" not in str(caught.value)

    is_refused("no such checkpoint")
    dpm.save(four := small_model(threads=4), tmp_path / "four.npz", four.optimiser())
    assert dpm.resume(tmp_path / "four.npz")[0].threads == 4
    with refused("3 ranks cannot divide"):
        dpm.resume(tmp_path / "four.npz", comm=types.SimpleNamespace(size=3, here=3))
    for wrong in (b"", raw[:len(raw) // 2], b"PK" + bytes(99)):
        bad.write_bytes(wrong)
        is_refused("not a checkpoint")
    for version in (dpm.FORMAT - 1, dpm.FORMAT + 1):
        is_refused(f"of format {version}, this program reads {dpm.FORMAT}", format=version)
    average, a = content["average"], content["alpha_bar"]
    is_refused("damaged", format="x")
    del (short := dict(content))["digest"]
    short |= dict(average=average[:-1], theta=average[:-1])
    is_refused(f"of {len(average) - 1} weights", **short, digest=dpm.digest_of(short))
    for change in (dict(average=average + 1e-6), dict(average=average[:, None]), dict(scale=0.0),
                   dict(average=average.astype(np.float32)), dict(alpha_bar=a[::-1]),
                   dict(config=str(content["config"]).replace("16", "17")), dict(more=a),
                   dict(x=np.array([{}, {}], dtype=object)), dict(digest="")):
        is_refused("damaged", **change)
    for i in range(100):
        r, wrong = rng(95, i), bytearray(raw)
        wrong[r.integers(len(raw))] ^= int(r.integers(1, 256))
        bad.write_bytes(bytes(wrong))
        try:
            assert (dpm.load(bad).theta == model.theta).all()  # a byte that nobody reads
        except dpm.InputError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name, examples, K", [
    ("swissroll/model", 2000, -1.1208), ("heartbeat/model", 2000, -2.4210),
    ("mnist/model", 100, 5.3332), ("mnist/bits", 100, 5.3382), ("mnist/weak", 100, 5.0292)])
def test_shipped_models(name, examples, K):
    """Their own config and weights: K, bits per point, sequence or pixel, of some held-out
    examples and noise. (The README has it of more examples.)"""
    model, dataset = dpm.load(HERE / "data" / f"{name}.npz"), data.load(name.split("/")[0])
    found = model.bound(dataset.held_out(examples), rng(65), draws=5)
    assert found["K"] / LN2 / math.prod(model.shape[:2]) == approx(K, abs=0.002)


# ------------------------------------------------------------------------------------------------
# The CuPy path: with a stand-in that is stricter than CuPy, and with CuPy where there is a device
# ------------------------------------------------------------------------------------------------

class DeviceArray:
    """An array that behaves as if it lay on a device: it meets only its like and scalars, and NumPy
    cannot get at it."""

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
    if isinstance(x, (tuple, list)):
        return type(x)(map(device, x))
    return DeviceArray(np.asarray(x)) if isinstance(x, (np.ndarray, np.generic)) else x


def on_device(f):
    return lambda *args, **named: device(f(*host(args), **{k: host(v) for k, v in named.items()}))


def method_of(name):
    def method(self, *others):
        value = on_device(getattr(self.a, name))(*others)
        return self if name.startswith("__i") else value
    return method


for _name in ("add", "sub", "mul", "truediv", "pow", "matmul", "and", "or"):
    for _prefix in ("", "r", "i"):
        setattr(DeviceArray, f"__{_prefix}{_name}__", method_of(f"__{_prefix}{_name}__"))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "abs", "floordiv", "mod"):
    setattr(DeviceArray, f"__{_name}__", method_of(f"__{_name}__"))


class Draws:
    """A generator on the device, with the signatures of CuPy's."""

    def __init__(self, bits, put=device):
        self.rng, self.put = np.random.Generator(bits), put

    def standard_normal(self, size=None, dtype=np.float64, out=None):
        return self.put(self.rng.standard_normal(size, dtype, out))

    def random(self, size=None, dtype=np.float64, out=None):
        return self.put(self.rng.random(size, dtype, out))

    def integers(self, low, high=None, size=None, dtype=np.int64, endpoint=False):
        return self.put(self.rng.integers(low, high, size, dtype, endpoint))


class StandIn:
    """In place of the module cupy; remembers which of its names were used."""

    Generator = Draws
    runtime = types.SimpleNamespace(getDeviceProperties=lambda _: {"name": b"stand-in"})

    def __init__(self):
        self.used = set()
        self.random = self.cuda = self.lib = self.stride_tricks = self
        self.as_strided = on_device(np.lib.stride_tricks.as_strided)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        self.used.add(name)
        return on_device(getattr(np, name))

    def asarray(self, a, dtype=None):
        return DeviceArray(np.asarray(a.a if isinstance(a, DeviceArray) else a, dtype))

    def Philox4x3210(self, seed):
        return np.random.Philox(np.random.SeedSequence(seed))

    def Device(self):
        return types.SimpleNamespace(id=0)


@pytest.fixture
def cupy(monkeypatch):
    """The stand-in, where `import cupy` and `import cupyx.scipy.special` find it."""
    cupyx, scipy, special = (types.ModuleType(name) for name in ("cupyx", "scipy", "special"))
    cupyx.scipy, scipy.special, special.log_ndtr = scipy, special, on_device(log_ndtr)
    stand_in, names = StandIn(), ("cupy", "cupyx", "cupyx.scipy", "cupyx.scipy.special")
    for name, module in zip(names, (stand_in, cupyx, scipy, special)):
        monkeypatch.setitem(sys.modules, name, module)
    return stand_in


def test_the_stand_in_refuses_what_cupy_refuses(cupy):
    a, one = cupy.asarray(np.arange(3.0)), np.ones(3)
    for mix in (lambda: a + one, lambda: one + a, lambda: np.sqrt(a), lambda: np.asarray(a),
                lambda: cupy.exp(one), lambda: a.__setitem__(slice(None), one),
                lambda: a[np.array([0])], lambda: cupy.concatenate([a, one])):
        with pytest.raises(TypeError):
            mix()
    a *= 2
    assert isinstance(a, DeviceArray) and isinstance(a.sum(), DeviceArray) and a.sum().get() == 6
    assert all(isinstance(part, DeviceArray) for part in cupy.split(a, 3))
    assert dpm.backend(True) is cupy


def device_module(where, request):
    """The stand-in or CuPy, whose tests are skipped where there is no GPU."""
    xp = request.getfixturevalue("cupy") if where == "stand-in" else dpm.backend()
    if xp is np:
        pytest.skip("no GPU here")
    return xp


@pytest.mark.parametrize("where", ["stand-in", "cupy"])
@pytest.mark.parametrize("network, shape, q, options", [
    ("mlp", (1, 1, 3), gaussian(), dict(learned=True)), ("unet", (4, 4, 1), binomial(), {}),
    ("unet", (5, 4, 2), gaussian(kind="cosine", **BYTES), dict(predict="eps")),
    ("paper", (5, 4, 2), gaussian(), dict(predict="paper", learned=True)),
    ("mlp", (1, 1, 4), binomial(), {}), ("unet", (4, 4, 1), gaussian(variance="beta"), {})])
def test_gpu_agrees_with_cpu(where, network, shape, q, options, tmp_path, monkeypatch, request):
    """The same weights, data and noise on both: bound, entropies, estimates, samples, posterior
    samples with one particle and with several, gradients of every objective, and a step."""
    xp = device_module(where, request)
    cpu = small_model(q, shape, network, stir=0.1, threads=1, **options)
    dpm.save(small_model(q, shape, network, stir=0.15, threads=1, **options), tmp_path / "w.npz")
    dpm.save(cpu, tmp_path / "c.npz", cpu.optimiser())
    x0, (gpu, optimiser) = data_for(q, 9, cpu.D, 27), dpm.resume(tmp_path / "c.npz", xp)

    def same(run, rtol=1e-6):
        close(dpm.to_host(run(gpu)), run(cpu), rtol, 1e-10)

    ours, theirs = cpu.bound(x0, rng(28)), gpu.bound(x0, rng(28))
    for name in ours:
        close(theirs[name], ours[name], 1e-8)
    same(lambda model: np.stack(dpm.entropy_bounds(model.diffusion, x0)))
    same(lambda model: model.sample(5))
    if not q.discretised:
        same(lambda model: dpm.log_weights(model, x0, 3, rng(67)))
    known = np.resize([0, 0.3], cpu.D)
    rise = dpm.Function(lambda x: 0.1 * x.sum(1), lambda x: 0 * x + 0.1)
    for schedule, particles in (("predicted", 1), ("predicted", 3), ("annealed", 3)):
        same(lambda model: dpm.Posterior(
            model.shortened(5), [dpm.Observation(model.xp.asarray(x0), known, model.xp), rise],
            schedule, particles).sample(9, 1))
    same(lambda model: dpm.Posterior(
        model.shortened(5), dpm.Observation(x0, known, model.xp), repeats=2).sample(9, 1))
    weak = lambda xp: dpm.Contrast(dpm.load(tmp_path / "w.npz", xp), 1)
    same(lambda model: model.shortened(5).sample(9, 1, contrast=weak(model.xp)))
    draws = lambda a, *key: Draws(np.random.PCG64(len(key)), a.asarray)  # the host's, on both
    every_t = lambda n, share, u: np.flatnonzero(share)[np.arange(n) % np.count_nonzero(share)]
    monkeypatch.setattr(dpm, "generator", draws)
    monkeypatch.setattr(dpm, "stratified", every_t)
    for kind in ["K", "focused"] + ["simple", "mean"] * (q.outputs == 2):
        def gradient(model):
            model.gradient(model.xp.asarray(x0), 3, tables=dpm.objective(kind, model.diffusion))
            return model.grad
        same(gradient)
    assert float(gpu.step(optimiser)) == approx(float(cpu.step(cpu.optimiser())))
    same(lambda model: model.theta)
    assert where == "cupy" or xp.used <= IN_CUPY


@pytest.mark.parametrize("where", ["stand-in", "cupy"])
@pytest.mark.parametrize("dataset, flags", [
    ("swissroll", "--schedule learned"), ("heartbeat", "--no-evaluate"), ("digits.npy", ""),
    ("digits.npy", "--network paper --no-evaluate"),
    ("digits.npy", "--decoder discretised --objective simple --variance beta --no-evaluate")])
def test_the_scripts_on_a_gpu(where, dataset, flags, tmp_path, request):
    """train.py --gpu from data to figures, and sample.py --gpu from its checkpoint to pictures: no
    step of it mixes host and device."""
    xp = device_module(where, request)
    np.save(tmp_path / "digits.npy", rng(30).integers(0, 256, (40, 6, 6)).astype(np.uint8))
    done("train", "--gpu", "--dataset", dataset, "--steps", 4, "--timesteps", 6, "--batch-size", 8,
         "--out", "run", *flags.split(), cwd=tmp_path)
    for wanted in ("--number 4", "--inpaint --number 2", "--denoise 0.5 --number 2"):
        done("sample", "--gpu", "--checkpoint", "run", *wanted.split(), cwd=tmp_path)
    assert where == "cupy" or xp.used <= IN_CUPY
    if "--no-evaluate" not in flags:
        assert result_of(tmp_path / "run")["device"] == runs.device_name(xp)


def test_a_rank_takes_a_gpu_of_its_own(cupy, monkeypatch):
    """Process 6 of 0..7 on a machine with the GPUs 0..3 takes number 2."""
    def group(rank, size, **more):
        return types.SimpleNamespace(Get_rank=lambda: rank, Get_size=lambda: size, **more)

    taken, here = [], group(6, 8)
    world = group(13, 16, Split_type=lambda kind: {"shared": here}[kind])
    mpi = types.SimpleNamespace(COMM_WORLD=world, COMM_TYPE_SHARED="shared")
    monkeypatch.setitem(sys.modules, "mpi4py", types.SimpleNamespace(MPI=mpi))
    cupy.runtime = types.SimpleNamespace(getDeviceCount=lambda: 4)
    cupy.Device = lambda number: types.SimpleNamespace(use=lambda: taken.append(number))
    for xp in (cupy, np):
        ranks = runs.Ranks(xp)
        assert (ranks.rank, ranks.size, ranks.here, taken) == (13, 16, 8, [2])


# Looked up in CuPy 14, in cupy, cupy.random, cupy.cuda and cupy.lib.stride_tricks
IN_CUPY = set(
    "arange asarray broadcast_to clip concatenate cos cumsum empty empty_like exp expm1 eye full "
    "isinf linspace log log1p matmul maximum minimum ones pad sin split sqrt stack trace where "
    "zeros zeros_like".split())


def test_the_list_of_cupys_names():
    cupy = pytest.importorskip("cupy")
    assert all(hasattr(cupy, name) for name in IN_CUPY)
    for name in ("lib.stride_tricks.as_strided", "random.Philox4x3210", "random.Generator",
                 "cuda.Device", "cuda.runtime.getDeviceProperties", "cuda.runtime.getDeviceCount",
                 "get_default_memory_pool"):
        assert callable(operator.attrgetter(name)(cupy)), name


# -------------------------------------------------------------------------------------------------
# The scripts, as their users run them
# -------------------------------------------------------------------------------------------------

scripts = pytest.mark.xdist_group("scripts")  # they share runs: one worker makes them
stops = pytest.mark.xdist_group("stops")  # and another makes these


def on_the_cpu(arguments):
    """Words for a script. Its numbers are compared with those of NumPy here, GPU or not."""
    return [*map(str, arguments), *["--no-gpu"] * ("--gpu" not in arguments)]


def call(script, *arguments, cwd):
    """A script in this process, which saves its start: its status, stdout and stderr."""
    main = dict(train=train, sample=sample)[script].main
    out, err, before, argv = io.StringIO(), io.StringIO(), os.getcwd(), sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    os.chdir(cwd)
    sys.argv = [f"{script}.py", *on_the_cpu(arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
                warnings.catch_warnings():
            runs.run(main)
        status = 0
    except SystemExit as end:
        status = end.code
    finally:
        os.chdir(before)
        sys.argv = argv
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return types.SimpleNamespace(status=status, out=out.getvalue(), err=err.getvalue())


def done(*arguments, cwd):
    result = call(*arguments, cwd=cwd)
    assert result.status == 0, (arguments, result.err)
    return result


def refuses(says, *arguments, cwd, script="train"):
    """The script ends with one line on stderr that has the phrase `says`, and with status 2."""
    result = call(script, *arguments, cwd=cwd)
    lines = result.err.splitlines()
    assert result.status == 2 and len(lines) == 1 and lines[0].startswith("error: ") and \
        says in lines[0] and lines[0].isprintable() and len(lines[0]) < 500, (arguments, result)


def process(*arguments, cwd, **options):
    script = [sys.executable, HERE / "train.py"]
    return subprocess.Popen([*map(str, script), *on_the_cpu(arguments)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def ended(running):
    out, err = running.communicate(timeout=200)
    return types.SimpleNamespace(status=running.returncode, out=out, err=err)


def wait_for(condition, running):
    while not condition():
        assert running.poll() is None, ended(running)
        time.sleep(0.005)


def small_digits():
    """The middle of 400 digits, every other pixel: images of 8 x 8."""
    return data.load("mnist").train[:400].reshape(-1, 28, 28)[:, 6:22:2, 6:22:2]


TINY = "--timesteps", 8, "--threads", 2


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with small data and four trained runs: of images, points with a learned schedule,
    bits, and crops of colour pictures by DDPM's recipe. Its `said` is what they printed."""
    place = tmp_path_factory.mktemp("place")
    np.save(place / "digits.npy", small_digits())
    (place / "colours").mkdir()
    for i in range(24):
        picture = rng(i).integers(0, 256, (3, 3, 3)).astype(np.uint8)
        Image.fromarray(picture).resize((12, 12)).save(place / "colours" / f"{i}.png")
    runs = [("--dataset", "digits.npy", "--steps", 60, "--batch-size", 8),
            ("--schedule", "learned", "--steps", 20, "--batch-size", 64, "--out", "runs/roll"),
            ("--dataset", "heartbeat", "--steps", 20, "--batch-size", 64),
            ("--dataset", "colours", "--crop", 8, "--flips", "--steps", 4, "--batch-size", 4,
             "--objective", "simple", "--variance", "beta", "--predict", "eps",
             "--schedule", "linear", "--no-evaluate")]
    said = [done("train", *run, *TINY, cwd=place) for run in runs]
    return types.SimpleNamespace(path=place, runs=place / "runs", said=said)


def result_of(run):
    return json.loads((run / "result.json").read_text())


@scripts
def test_one_held_out_example_has_no_error(tmp_path):
    """No number, instead of NaN, which JSON does not have."""
    r = rng(97)
    np.savez(tmp_path / "one.npz", train=r.integers(0, 256, (3, 5, 4), np.uint8),
             test=r.integers(0, 256, (1, 5, 4), np.uint8))
    done("train", "--dataset", "one.npz", *TINY, "--widths", 8, "--steps", 2, "--out", "r",
         cwd=tmp_path)
    said = done("train", "--evaluate", "r", "r", cwd=tmp_path)
    assert "NaN" not in (tmp_path / "r" / "result.json").read_text()
    assert result_of(tmp_path / "r")["bits_per_dim_se"] is None
    assert "+-" not in said.out.split("data  ")[0]  # but in the head of the table of several runs


@scripts
def test_train_leaves_everything(place):
    figures_of = dict(digits={"samples.png", "rate.png", "figure3.png"},
                      roll={"figure1.png", "schedule.png", "forgetting.png"},
                      heartbeat={"figure2.png", "forgetting.png"})
    for name, special in figures_of.items():
        run = place.runs / name
        assert {p.name for p in run.iterdir()} == special | {
            ".lock", "checkpoint.npz", "log.csv", "result.json", "training.png", "kl.png",
            "entropy.png"}
        r = result_of(run)
        assert r["K_bits"] == pytest.approx(
            -sum(r["kl_bits"]) + r["H_q_T_bits"] - r["H_q_1_bits"] - r["H_p_T_bits"])
        assert r["K_minus_L_null_bits"] == pytest.approx(r["K_bits"] - r["L_null_bits"])
        assert r["entropy_lower_bits"] < r["entropy_upper_bits"] and r["K_bits_se"] > 0
        assert r["seconds"] > 0
        log = np.genfromtxt(run / "log.csv", delimiter=",", names=True)
        assert log.dtype.names == tuple(train.COLUMNS)
        assert log["step"].tolist() == list(range(1, r["steps"] + 1)) and np.isfinite(
            log["K_minus_L_null_bits"]).all()
        for picture in run.glob("*.png"):
            with Image.open(picture) as opened:
                assert np.asarray(opened.convert("L")).std() > 1
    assert {p.name for p in (place.runs / "colours").iterdir()} == {
        ".lock", "checkpoint.npz", "log.csv"}
    for name in ("roll", "heartbeat"):
        r = result_of(place.runs / name)
        assert r["K_star_bits_se"] == pytest.approx(
            math.hypot(r["K_bits_se"], r["K_star_minus_K_bits_se"]))
        assert r["K_bits"] < r["K_star_bits"] < r["L_true_bits"] + 3 * r["K_star_bits_se"]
        estimates = [r[f"estimate_{S}_bits"] for S in (1, 10, 100, 1000)]
        assert estimates == sorted(estimates)
    r = result_of(place.runs / "digits")
    assert r["bits_per_dim"] == pytest.approx(math.log2(r["scale"]) - r["K_bits"] / 64)
    assert r["dataset"] == str(place.path / "digits.npy")
    psi = np.load(place.runs / "roll" / "checkpoint.npz")["alpha_bar"]
    assert np.abs(psi / dpm.LearnedSchedule(8, 1 - psi[1]).forward(np.zeros(8)) - 1).max() > 1e-4


@scripts
def test_numbers_of_an_evaluation(place):
    """From the checkpoint and all 40 held-out digits: K, entropies, K of the other variances, and
    how far samples and test images are from training images."""
    r, model = result_of(place.runs / "digits"), dpm.load(place.runs / "digits" / "checkpoint.npz")
    digits = data.load(place.path / "digits.npy")
    x0, train_x = digits.held_out(99), digits.draw(5000, dpm.generator(np, "frechet"))
    found = model.bound(x0, dpm.generator(np, "bound"), 5)
    assert r["K_bits"] == approx(found["K"] / LN2, rel=1e-6) and r["examples"] == 40
    assert r["K_bits_se"] == approx(found["K_se"] / LN2, rel=1e-6) == approx(
        64 * r["bits_per_dim_se"], rel=1e-6)
    assert r["entropy_model_bits"] == approx(found["entropy"][2:].sum() / LN2, rel=1e-6)
    upper = 32 * np.log2(2 * np.pi * np.e * model.diffusion.beta[2:]).sum()
    assert r["entropy_upper_bits"] == approx(upper)
    made = []
    bound = lambda of, x0, _: made.append(of.bound(x0, dpm.generator(np, "bound"), 5)) or made[0]
    of_bytes = evaluation.bits_of_bytes(model, digits.test, bound)
    assert r["discretised_bits_per_dim_se"] == approx(made[0]["K_se"] / LN2 / 64, rel=1e-6)
    assert r["discretised_bits_per_dim"] == approx(of_bytes["discretised_bits_per_dim"], rel=1e-6)
    for variance in ("learned", "beta", "posterior"):
        other = model.with_diffusion(dpm.Gaussian(model.diffusion.alpha_bar, variance=variance))
        K = other.bound(x0, dpm.generator(np, "bound"), 5)["K"] / LN2
        assert r[f"K_{variance}_bits"] == approx(K, rel=1e-6)
    train_x, samples, test = evaluation.in_components(train_x, model.sample(40, 1), x0)
    assert r["frechet"] == approx(evaluation.frechet(train_x, samples), rel=1e-4)
    assert r["frechet_test"] == approx(evaluation.frechet(train_x, test), rel=1e-4)


@pytest.mark.parametrize("name", ["digits", "roll", "heartbeat", "colours"])
@scripts
def test_a_run_is_its_data_and_its_steps(place, name):
    """Every step has training examples and noise by its number; its line in the log has K - L_null
    of these examples, as it would be if their variance were exactly 1."""
    about = dpm.load(place.runs / name / "checkpoint.npz").about
    dataset = data.load(about["dataset"], about["crop"], None, about["flips"])
    model = train.new_model(dataset, about, np, threads=2)
    steps, seed, tables = about["steps"], about["seed"], dpm.objective(
        about["objective"], model.diffusion)
    optimiser = model.optimiser(lr=about["lr"], steps=steps, warmup=steps // 10 + 1)
    log = np.genfromtxt(place.runs / name / "log.csv", delimiter=",", names=True)
    usual = np.full((1, model.D), 0.2 if about["binary"] else 1.0)
    for step in range(steps):
        x0 = dataset.draw(about["batch_size"], dpm.generator(np, "batch", seed, step), "float32")
        kl = model.gradient(x0, seed, step, tables=tables)[1].mean()
        model.step(optimiser)
        q = model.diffusion
        parts = q.H_q(q.T, usual) - q.H_q(1, usual) - q.H_p(usual) - q.log_null(usual)
        climbed = log["K_minus_L_null_bits"][step] * LN2
        assert climbed == approx(float(parts[0] - kl), rel=1e-4, abs=1e-3)
    assert (arrays_of(place.runs / name)["theta"] == model.theta).all()


@scripts
def test_beta_1_is_the_variance_of_the_smallest_detail(place):
    """A hundredth of a grey level, with a decoder a third; a tenth of the noise of the roll. A bit
    is forgotten once in 1e5, or on the paper's schedule once in T; --rate is that of pi."""
    for dataset, flags, detail in [
            ("digits.npy", (), 0.01), ("digits.npy", ("--decoder", "discretised"), 1 / 3),
            ("swissroll", (), 0.004), ("heartbeat", (), 1e-5 ** 0.5),
            ("heartbeat", ("--schedule", "paper", "--rate", 0.4), 8 ** -0.5)]:
        done("train", "--dataset", dataset, *flags, *TINY, "--steps", 1, "--batch-size", 8,
             "--no-evaluate", "--out", "runs/detail", cwd=place.path)
        model = dpm.load(place.runs / "detail" / "checkpoint.npz")
        shutil.rmtree(place.runs / "detail")
        assert 1 - model.diffusion.alpha_bar[1] == approx((detail / model.scale) ** 2, rel=1e-6)
    assert (model.diffusion.rate, model.diffusion.mean) == (0.4, 0.2)


@scripts
def test_the_objective_is_what_is_trained(tmp_path):
    """Each weighs the steps in its own way: after three steps no two have the same weights."""
    for dataset, schedule, kinds in [("swissroll", "linear", dpm.OBJECTIVES),
                                     ("heartbeat", "cosine", ["K", "focused"])]:
        found = []
        for kind in kinds:
            out = tmp_path / f"{dataset}-{kind}"
            done("train", "--dataset", dataset, "--objective", kind, "--schedule", schedule,
                 *TINY, "--steps", 3, "--batch-size", 64, "--no-evaluate", "--out", out,
                 cwd=tmp_path)
            theta = arrays_of(out)["theta"]
            assert all(np.abs(theta - other).max() > 1e-5 for other in found)
            found.append(theta)


@scripts
def test_what_a_run_begins_with(place, monkeypatch):
    """What is usual for its data, or what a flag says."""
    monkeypatch.chdir(place.path)

    def begun(*flags):
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        return train.start(train.arguments(), np, None)

    model, optimiser, digits, _ = begun("--dataset", "digits.npy")
    about = model.about
    assert about["objective"] == "focused" and optimiser.warmup == 200
    assert len(digits.edges) > 2 and about["sizes"]["edges"] == digits.edges
    of = lambda *flags: begun("--dataset", "digits.npy", *flags)
    assert of("--schedule", "learned")[0].about["objective"] == "K"
    assert of("--network", "paper")[0].about["predict"] == "paper"
    assert of("--widths", "4", "6")[0].about["sizes"]["widths"] == [4, 6]
    digits = of("--decoder", "discretised")[2]
    assert (digits.draw(9, rng(0)) * digits.scale + digits.shift) % 1 == approx(0.5)
    model, optimiser, *_ = begun("--steps", "50", "--threads", "3", "--dtype", "float64",
                                 "--variance", "beta")
    assert optimiser.warmup == 6 and model.threads == 3
    assert model.dtype == np.float64 and model.diffusion.variance == "beta"
    assert (begun("--seed", "1")[0].theta != begun()[0].theta).any()
    for name, steps in ("swissroll", ()), ("heartbeat", ()), ("mnist", ("--steps", "50000")):
        told = json.loads(json.dumps(begun("--dataset", name, *steps)[0].about))
        shipped = dpm.load(HERE / "data" / name / "model.npz").about  # made by what is usual
        assert {key: shipped[key] for key in told} == told
    assert begun("--benchmark")[2].name == "mnist"
    smaller = begun("--dataset", "colours", "--resize", "8")[0]
    smaller.scale = 9.0                             # the model's units are those of its training
    assert runs.load_for(smaller).shape == (8, 8, 3) and runs.load_for(smaller).scale == 9
    for run, name in ("roll", "swissroll:0.04"), ("digits", "digits.npy"):
        flags = ["--resume", f"runs/{run}", "--dataset", name]
        monkeypatch.setattr(sys, "argv", ["train.py", *flags])
        assert train.resume(train.arguments(), np, None)[1].step > 0
    monkeypatch.setattr(sys, "argv", ["train.py", "--resume"])
    assert train.resume(train.arguments(), np, None)[3] == runs.newest_run().parent


@scripts
def test_a_line_of_the_log_is_of_the_steps_since_the_last(tmp_path, monkeypatch):
    """Two of 400. While the network stays as it began, K is L_null in the mean. It is saved every
    30 seconds and at the end, the bar counts examples, and Ctrl-C ends an evaluation again."""
    bar, save, bars, saved, handlers = runs.bar, dpm.save, [], [], []
    monkeypatch.setattr(runs, "bar", lambda *a, **o: bars.append(bar(*a, **o)) or bars[-1])
    monkeypatch.setattr(dpm, "save", lambda *a: saved.append(a) or save(*a))
    monkeypatch.setattr(evaluation, "evaluate", lambda *_, **__: handlers.extend(
        signal.getsignal(number).__name__ for number in (signal.SIGINT, signal.SIGTERM)))
    begun = time.perf_counter()
    done("train", "--dataset", "heartbeat", "--steps", 400, *TINY, "--batch-size", 64, "--lr",
         1e-12, "--out", "run", cwd=tmp_path)
    assert len(saved) <= 2 + (time.perf_counter() - begun) // 30 and handlers == ["stop"] * 2
    done("train", "--resume", "run", "--steps", 401, "--no-evaluate", cwd=tmp_path)
    assert [(b.initial, b.n, b.total) for b in bars] == [
        (0, 25_600, 25_600), (25_600, 25_664, 25_664)]
    log = np.genfromtxt(tmp_path / "run" / "log.csv", delimiter=",", names=True)
    K = log["K_minus_L_null_bits"][:200]
    assert len(K) == 200 and K.mean() == approx(0, abs=4 * K.std() / math.sqrt(200))
    assert K[100:].std() > 0.5 * K[:100].std()


@scripts
def test_what_is_printed(place):
    """First what was assumed of the data, at the end what to try next; no long line and no bar
    where nobody watches."""
    digits, roll, heartbeat, colours = (said.out.splitlines() for said in place.said)
    assert digits[0] == ("digits.npy: 360 training and 40 held-out examples of 8 x 8 x 1, bytes "
                         "0..255, dequantised")
    assert "next: python sample.py --checkpoint runs/digits --inpaint" == digits[-1]
    assert any("bits/dim" in line for line in digits) and any("K*" in line for line in roll)
    assert not any("evaluating" in line for line in colours)
    r, value = result_of(place.runs / "digits"), {
        line[:24].strip(): float(line[24:36]) for line in digits
        if re.match("  .{22} *-?[0-9]", line)}
    parts = ("- sum of KLs", "+ H_q(X_T|X_0)", "- H_q(X_1|X_0)", "- H_p(X_T)")
    assert value["K"] == approx(r["K_bits"] / 64, abs=1e-4) == approx(
        sum(value[part] for part in parts), abs=3e-4)
    for said in place.said:
        text = said.out + said.err
        assert max(map(len, text.splitlines())) < 200 and "\r" not in text
        assert len(said.err.splitlines()) < 4


@scripts
def test_a_bar_in_a_file_is_a_line_a_minute(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    now = [0.0]
    shown = runs.bar(range(600), "steps")
    shown._time = lambda: now[0]
    shown.start_t = shown.last_print_t = 0.0
    for _ in shown:
        now[0] += 1                                 # ten minutes
    lines = sys.stderr.getvalue().splitlines()
    assert 8 <= len(lines) <= 11 and "\r" not in sys.stderr.getvalue()
    assert all(line.startswith("steps: ") and len(line) <= 100 for line in lines)


@scripts
def test_help_is_one_screen():
    for script in ("train", "sample"):
        text = done(script, "--help", cwd=HERE).out
        assert len(text.splitlines()) <= 52 and max(map(len, text.splitlines())) <= 100


@scripts
def test_what_the_readme_says(monkeypatch):
    """Every command on its page is one that the script takes, every file it names is there, and its
    code does what the text says."""
    text = (HERE / "README.md").read_text()
    commands = re.findall(r"(train|sample)\.py((?: +[^\s`|#)]+)*)", text)
    assert len(commands) > 12
    for script, flags in commands:
        monkeypatch.setattr(sys, "argv", [script, *flags.replace("...", "").split()])
        dict(train=train, sample=sample)[script].arguments()
    for path in re.findall(r"\]\(([a-z_]+[./][\w./]+)\)", text):
        assert (HERE / path).exists(), path
    code, names = re.search(r"```python\n(.*?)```", text, re.S)[1].replace("1000", "50"), {}
    monkeypatch.chdir(HERE)
    exec(code, names)
    x = names["x"]
    assert x.shape == (50, 2) and (x[:, 0] == 0.5).all() and x[:, 1].std() > 0.3


@scripts
def test_evaluate_again_and_compare(place, monkeypatch):
    """Evaluated again, a run has the same numbers; with --steps also those of shorter chains; with
    a discretised decoder they are L_T, the L_t and L_0; of several runs there is a table."""
    before = result_of(place.runs / "digits")
    done("train", "--dataset", "digits.npy", "--decoder", "discretised", "--steps", 3, *TINY,
         "--batch-size", 8, "--out", "runs/decoder", "--no-evaluate", cwd=place.path)
    drawn, by_t, rate = {}, figures.by_t, figures.rate_distortion
    monkeypatch.setattr(figures, "by_t", lambda T, curves, ylabel, title, path, **how: (
        drawn.setdefault(path.parent.name + path.name, curves), by_t(
            T, curves, ylabel, title, path, **how)))
    monkeypatch.setattr(figures, "rate_distortion", lambda *of: drawn.setdefault(
        "scale", of[2]) and rate(*of))
    said = done("train", "--evaluate", "runs/digits", "runs/decoder", "--steps", 4, 8,
                cwd=place.path)
    done("train", "--evaluate", "runs/colours", cwd=place.path)
    assert [result_of(place.runs / "colours")[key] for key in ("pixels", "dimension")] == [64, 192]
    after, decoder = (result_of(place.runs / name) for name in ("digits", "decoder"))
    assert after["K_bits"] == pytest.approx(before["K_bits"], rel=1e-6)
    assert after["kl_bits"] == pytest.approx(before["kl_bits"], rel=1e-6)
    assert [chain["steps"] for chain in after["chains"]] == [4, 8]
    assert after["chains"][0]["K_bits"] != after["chains"][1]["K_bits"]
    assert after["chains"][1]["K_bits"] == pytest.approx(after["K_bits"])
    short, scale = after["chains"][0], after["scale"]
    assert short["bits_per_dim"] == approx(math.log2(scale) - short["K_bits"] / 64)
    assert drawn["scale"] == scale
    for name, curve in drawn["digitsentropy.png"].items():
        key = dict(zip(("upper bound", "the model's", "lower bound"), ("upper", "model", "lower")))
        bits_ = 64 * np.nansum(curve[2:]) / LN2
        assert bits_ == approx(after[f"entropy_{key[name]}_bits"])
    assert set(after["chains"][0]) == {"steps", "K_bits", "bits_per_dim", "frechet",
                                       "frechet_test", "frechet_steps"}
    assert (place.runs / "digits" / "steps.png").exists()
    assert decoder["K_bits"] == pytest.approx(-decoder["L_T_bits"] - sum(decoder["kl_bits"]))
    assert decoder["bits_per_dim"] == pytest.approx(-decoder["K_bits"] / 64)
    model, digits = dpm.load(place.runs / "decoder" / "checkpoint.npz"), data.load(
        place.path / "digits.npy")
    levels = model.normal(digits.test + 0.5)  # not dequantised: the middle of each
    K = model.bound(levels, dpm.generator(np, "bound"), 5)["K"] / LN2
    assert decoder["K_bits"] == approx(K, rel=1e-6)
    p, step = model.diffusion.pi((1, 64)), 1 / model.scale  # L_null is of levels, not a density
    L_null = (p.log_density(levels).mean() + 64 * math.log(step)) / LN2
    assert decoder["L_null_bits"] == approx(L_null)
    assert "- L_0" in said.out and "discrete" in said.out
    of_bytes = runs.load_for(runs.load(place.runs / "decoder" / "checkpoint.npz", np))
    assert (of_bytes.held_out(9) * of_bytes.scale + of_bytes.shift) % 1 == approx(0.5)
    rows = [line.split() for line in said.out.splitlines() if line.startswith("digits.npy  ")]
    assert len(rows) == 2 and (place.runs / "comparison.png").exists()
    assert (place.runs / "comparison-samples.png").exists()
    assert {row[7] for row in rows} == {f"{r['K_bits'] / 64:.4f}" for r in (after, decoder)}
    assert {(*row[8:11:2], *row[13:]) for row in rows} == {
        (f"{r['K_bits_se'] / 64:.4f}", f"{r['K_minus_L_null_bits'] / 64:.4f}",
         f"{r['frechet']:.4f}", f"{r['seconds']:.0f}") for r in (after, decoder)}
    assert {(row[5], *row[11:13]) for row in rows} == {
        ("dequantised", *(f"{after[name]:.4f}" for name in (
            "bits_per_dim", "discretised_bits_per_dim"))),
        ("discretised", "-", f"{decoder['bits_per_dim']:.4f}")}


# Stopped, and resumed

STRAIGHT = ("--schedule", "learned", "--steps", 400, "--timesteps", 8, "--batch-size", 64,
            "--seed", 5, "--no-evaluate")


def arrays_of(run):
    with np.load(run / "checkpoint.npz") as file:
        return {name: file[name] for name in ("theta", "average", "m", "v", "step", "alpha_bar")}


def numbers_of(run):
    """The log, but for the seconds."""
    rows = [line.split(",") for line in (run / "log.csv").read_text().splitlines()]
    return [row[:1] + row[2:] for row in rows]


def logged(run):
    return (run / "log.csv").read_text().count("\n") - 1 if (run / "log.csv").exists() else 0


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that was never stopped, of two threads."""
    path = tmp_path_factory.mktemp("straight")
    done("train", *STRAIGHT, "--threads", 2, "--out", "run", cwd=path)
    return path / "run"


def same(run, straight):
    ours, theirs = arrays_of(run), arrays_of(straight)
    for name in theirs:
        assert (ours[name] == theirs[name]).all(), name
    assert numbers_of(run) == numbers_of(straight)


@stops
def test_stopped_in_the_middle_and_resumed_bit_for_bit(straight, tmp_path):
    """Killed, interrupted (twice at once), and terminated: then the same bits as if never stopped.
    While it runs, a second process is refused."""
    run, steps = tmp_path / "run", []
    flags = [*STRAIGHT, "--threads", 2, "--out", "run"]
    for how in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        running = process(*flags, cwd=tmp_path)
        for _ in range(2):                          # lines that come when the log has been cut
            running.stdout.readline()
        rows = logged(run)
        wait_for(lambda: logged(run) > rows + 8 and (run / "checkpoint.npz").exists(), running)
        if how == signal.SIGKILL:
            refuses("in use by another process", "--resume", "run", cwd=tmp_path)
        running.send_signal(how)
        if how == signal.SIGINT:
            running.send_signal(how)
        end, step = ended(running), int(arrays_of(run)["step"])
        assert 0 < step < 400 and end.err == ""
        if how != signal.SIGKILL:
            assert end.status == 130 and step > steps[-1]
            assert f"stopped at step {step}; go on with: python train.py --resume run" in end.out
        steps.append(step)
        flags = ["--resume", "run", "--no-evaluate"]
    done("train", *flags, cwd=tmp_path)
    same(run, straight)
    seconds = np.genfromtxt(run / "log.csv", delimiter=",", names=True)["seconds"]
    assert (np.diff(seconds) >= 0).all()            # the clock goes on as well


@scripts
def test_a_stop_while_evaluating(place):
    running = process("--evaluate", "runs/digits", cwd=place.path)
    assert "evaluating" in running.stdout.readline()
    for _ in range(2):
        running.send_signal(signal.SIGINT)
    end = ended(running)
    assert (end.status, end.err) == (130, "stopped\n")


@stops
def test_a_stop_while_modules_are_loaded(tmp_path):
    running = process(cwd=tmp_path)
    time.sleep(0.4)
    running.send_signal(signal.SIGINT)
    end = ended(running)
    assert end.status in (130, -signal.SIGINT) and "Traceback" not in end.err


@stops
def test_a_loss_that_turns_nan(tmp_path, monkeypatch):
    """One line, without NumPy's warnings, and the last good checkpoint is kept."""
    end = ended(process("--lr", "1e30", "--steps", 200, "--timesteps", 8, cwd=tmp_path))
    assert end.status == 2 and end.err.count("\n") == 1, end.err
    assert "the gradient of the loss is" in end.err and "smaller --lr" in end.err
    assert "runs/swissroll/checkpoint.npz keeps step 1;" in end.err
    kept = arrays_of(tmp_path / "runs" / "swissroll")
    assert kept["step"] == 1 and all(np.isfinite(a).all() for a in kept.values())
    refuses("--lr must be a positive number", "--lr", "inf", cwd=tmp_path)
    monkeypatch.setattr(dpm.DPM, "step", lambda *_: math.nan)
    refuses("nothing was saved yet", *TINY, "--batch-size", 8, "--out", "a", cwd=tmp_path)


@pytest.mark.parametrize("room, names", [(30_000, "checkpoint.npz"), (10, "log.csv")])
@stops
def test_a_full_disk_loses_no_checkpoint(straight, tmp_path, room, names):
    """No file may grow beyond so many bytes (those of the log, and `room`)."""
    resource = pytest.importorskip("resource")
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    before, most = (run / "checkpoint.npz").read_bytes(), (run / "log.csv").stat().st_size + room
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    end = ended(process("--resume", "run", "--steps", 405, cwd=tmp_path, preexec_fn=limit))
    assert end.status == 2 and end.err.count("\n") == 1 and names in end.err, end.err
    assert (run / "checkpoint.npz").read_bytes() == before and not list(run.glob(".part-*"))


def test_half_a_row_of_a_log_is_no_row(tmp_path):
    whole = ",".join(train.COLUMNS) + "\n9,0.1,4.5\n"
    (log := tmp_path / "log.csv").write_text(whole + "10")  # of 100, where the disk was full
    figures.curve(runs.logged(log), tmp_path / "curve.png")
    runs.cut_log(log, train.COLUMNS, 50)
    assert log.read_text() == whole


@stops
def test_no_room_is_found_before_the_computing(straight, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_text("old")
    runs.writable(tmp_path / "a")                   # which changes nothing
    assert (tmp_path / "a").read_text() == "old"
    (tmp_path / "a").unlink()
    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    shutil.copytree(straight, tmp_path / "run")
    for script, flags, names in [("train", ("--evaluate", "run"), "run/result.json"),
                                 ("sample", ("--checkpoint", "run", "--out", "a"), "a.png")]:
        refuses(f"No space left on device; {names} cannot be written", *flags, script=script,
                cwd=tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def ranks_of(out):
    """The processes that train into `out`, without mpiexec and its helpers."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if b"python" in words[0] and str(out).encode() in words:
                found.append(int(path.parent.name))
    return found


@scripts
def test_two_ranks_of_a_script_are_two_threads(straight, place, tmp_path):
    """mpiexec -n 2 with a thread each makes the bits of two threads; a rank that dies ends the run
    and leaves its checkpoint; so does a resume; the bound is the same."""
    pytest.importorskip("mpi4py")
    mpiexec = shutil.which("mpiexec") or shutil.which("mpiexec", path=pathlib.Path(
        sys.executable).parent)
    if not mpiexec or not os.path.isdir("/proc/self"):
        pytest.skip("no mpiexec here")
    run = tmp_path / "run"
    environment = os.environ | dict(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
                                    OMPI_MCA_rmaps_base_oversubscribe="1")

    def several(number, *flags, cwd=tmp_path):
        return subprocess.Popen([mpiexec, "-n", str(number), sys.executable, HERE / "train.py",
                                 *on_the_cpu(flags)], cwd=cwd, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    running = several(2, *STRAIGHT, "--threads", 1, "--out", run)
    wait_for(lambda: logged(run) > 8 and (run / "checkpoint.npz").exists(), running)
    os.kill(ranks_of(run)[1], signal.SIGKILL)
    assert ended(running).status != 0 and 0 < arrays_of(run)["step"] < 400
    end = ended(several(3, "--resume", run))
    assert end.status != 0 and end.err.count("which 3 ranks cannot divide") == 1
    end = ended(several(2, "--resume", run, "--threads", 1, "--no-evaluate"))
    assert end.status == 0 and end.out.count("next:") == 1, end.err
    same(run, straight)
    before = result_of(place.runs / "digits")
    end = ended(several(2, "--evaluate", "runs/digits", cwd=place.path))
    after = result_of(place.runs / "digits")
    assert end.status == 0 and end.out.count("evaluating") == 1, end.err
    assert after["kl_bits"] == pytest.approx(before["kl_bits"], rel=1e-6)
    assert after["frechet"] == pytest.approx(before["frechet"], rel=1e-4)


# sample.py

def drawn(place, *flags, run="digits", out="a", cwd=None):
    """The arrays that sample.py leaves."""
    cwd = cwd or place.path
    said = done("sample", "--checkpoint", place.runs / run, "--out", out, *flags, cwd=cwd)
    with np.load(cwd / f"{out}.npz") as file, Image.open(cwd / f"{out}.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 1
        return types.SimpleNamespace(said=said.out, **file)


@scripts
def test_free_samples(place):
    a, b, c = (drawn(place, "--number", 3, "--seed", seed) for seed in (0, 0, 1))
    assert a.samples.shape == a.nearest.shape == (3, 64) and (a.samples == b.samples).all()
    assert (a.samples != c.samples).all() and "nearest training image" in a.said
    digits = data.load(place.path / "digits.npy")
    is_it = (np.floor(a.nearest[:, None] + 1e-6) == digits.train).all(2)
    far = np.sqrt(((a.samples[:, None] - digits.train - 0.5) ** 2).mean(2))
    assert is_it.any(1).all() and (far[is_it] < far.min(1) + 0.6).all()  # up to what dequantises
    model = dpm.load(place.runs / "digits" / "checkpoint.npz")
    x = model.normal(a.samples)
    rms = np.sqrt(((x - model.normal(a.nearest)) ** 2).mean(1)).mean()
    usual = observations.nearest(digits, digits.held_out(3))[1].mean()
    assert f"nearest training image: {rms:.3f} away" in a.said and (
        f"for test images it is {usual:.3f}" in a.said)
    many = drawn(place, "--number", 40)
    r = evaluation.distances(digits, model.normal(many.samples), digits.held_out(40))
    assert f"{r['frechet']:.1f}; of as many test images it is {r['frechet_test']:.1f}" in many.said
    still, again = (drawn(place, "--number", 3, "--eta", 0).samples for _ in range(2))
    assert (still == again).all() and (still != a.samples).all()
    assert (drawn(place, "--number", 3, "--steps", 4).samples != a.samples).all()
    assert (drawn(place, "--number", 3, "--steps", 8).samples == a.samples).all()
    done("train", "--dataset", "digits.npy", "--steps", 1, *TINY, "--no-evaluate", "--out",
         "runs/weak", cwd=place.path)
    for w, equal in ((0, True), (0.5, False)):
        sharp = drawn(place, "--number", 3, "--weak", "runs/weak", "--sharpen", w)
        assert (sharp.samples == a.samples).all() == equal == ("sharpened" not in sharp.said)
    contrast = dpm.Contrast(dpm.load(place.runs / "weak" / "checkpoint.npz"), 0.5)
    again = drawn(place, "--number", 3, "--repeats", 2)
    assert "8 of T = 8 steps, 2 repeats\n" in again.said
    assert "8 of T = 8 steps, sharpened by 0.5, eta 0.5, 5 repeats\n" in sharp.said
    for found, options in ((again, dict(repeats=2)),
                           (sharp, dict(eta=0.5, repeats=5, contrast=contrast))):
        close(found.samples, model.raw(model.sample(3, **options)), 1e-4)
    assert drawn(place, "--number", 50, run="roll").samples.shape == (50, 2)
    assert drawn(place, run="roll").samples.shape == (2000, 2)      # as many as --help says
    newest = done("sample", "--number", 1, "--out", "b", cwd=place.path).out
    assert newest.startswith("runs/weak/")          # the run that was written last
    assert set(np.unique(drawn(place, "--number", 4, run="heartbeat").samples)) <= {0, 1}
    assert drawn(place, "--number", 2, run="colours").samples.shape == (2, 192)


def test_which_run_is_meant(tmp_path, monkeypatch):
    """The newest run is the one whose checkpoint was written last; a new one has a free name."""
    monkeypatch.chdir(tmp_path)
    assert runs.newest_run() is None
    for name, when in ("a", 5), ("b", 9), ("c", 7):
        (path := pathlib.Path("runs") / name / "checkpoint.npz").parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (when, when))
    assert runs.newest_run().parent.name == "b"
    for name in ("one", "one-2", "one-3"):
        assert runs.free_directory("/data/one.npy") == pathlib.Path("runs") / name
        (pathlib.Path("runs") / name).mkdir()
    assert runs.free_directory("swissroll:0.5").name == "swissroll-0.5"
    (tmp_path / "pictures.v2").mkdir()
    assert runs.free_directory(str(tmp_path / "pictures.v2")).name == "pictures.v2"
    flags = types.SimpleNamespace(mode="samples", out="a.png", trajectory=False, gif=False)
    assert [path.name for path in sample.files(flags).values()] == ["a.png", "a.npz"]


def test_how_the_shipped_digits_are_sharpened():
    """By the weak model beside them; but only free samples."""
    model, weak = dpm.load(sampling.SHIPPED), dpm.load(HERE / "data" / "mnist" / "weak.npz")
    usual = dict(weak=None, sharpen=None, mode="samples")
    for change, w in [({}, 1), (dict(sharpen=0.5), 0.5), (dict(sharpen=0.0), None),
                      (dict(mode="inpaint"), None), (dict(mode="denoise"), None)]:
        flags = types.SimpleNamespace(**usual | change)
        found = sampling.contrast(model, flags, sampling.SHIPPED)
        assert (found and found.w) == w
        assert found is None or (found.weak.theta == weak.theta).all()


@scripts
def test_the_benchmark_counts(tmp_path):
    """A dense layer of W takes 6 |W| operations an example: y, dW, dx. Rates are these by time."""
    said = done("train", "--benchmark", "--dataset", "swissroll", "--batch-size", 8000, "--threads",
                2, cwd=tmp_path).out
    about = dict(train.ALWAYS, **train.DEFAULTS["vector"], bytes=False, binary=False,
                 network="mlp", sizes=train.SIZES["mlp"] | dict(edges=()))
    model = train.new_model(data.load("swissroll"), about, np)
    of = lambda pattern: [float(x.replace(",", "")) for x in re.search(pattern, said).groups()]
    (weights,), (ms, speed) = of(r"weights +(\S+)"), of(r"a step of 8000 +(\S+) ms, (\S+) points/s")
    (gflop, rate), (limit, share) = of(r"(\S+) GFLOP, (\S+) GFLOP/s"), of(
        r"plain product +(\S+) GFLOP/s .* at (\d+)%")
    assert weights == len(model.theta) and list(tmp_path.iterdir()) == []
    matrices = sum(math.prod(s) for layer in model.layers for s in layer.shapes.values() if s[1:])
    assert gflop == approx(6 * 8000 * matrices / 1e9, abs=0.006)
    assert speed == approx(8000 / ms * 1e3, rel=0.01)
    assert rate == approx(gflop / ms * 1e3, rel=0.01, abs=0.6)      # printed without decimals
    assert share / 100 == approx(rate / limit, rel=0.5) and share < 150
    assert 0 < of(r"reverse step of 64 +(\S+) ms")[0] < ms
    assert 0.05 < of(r"peak memory +(\S+) GiB")[0] < 20


@scripts
def test_samples_are_written_part_by_part(place, monkeypatch):
    whole = drawn(place, "--number", 5)
    monkeypatch.setattr(sampling, "PART", 2)
    parts = drawn(place, "--number", 5)
    assert "the first 2 samples of 5" in parts.said
    assert (np.floor(parts.samples) == np.floor(whole.samples)).mean() > 0.99
    assert parts.samples == pytest.approx(whole.samples, rel=1e-3)
    monkeypatch.setitem(sampling.MOVED, "images", 2)    # of six posterior samples two are shown
    assert drawn(place, "--inpaint", "--number", 1, "--gif").samples.shape == (1, 6, 64)


@scripts
def test_completions_and_denoised(place, tmp_path):
    """What is known stays, what is missing changes; from any directory."""
    mask, cells = np.zeros((8, 8), np.uint8), np.arange(64).reshape(8, 8)
    mask[:3] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    hole = np.abs(cells // 8 - 3) + np.abs(cells % 8 - 3) * 1j
    for flags, unknown in [((), cells % 8 < 4), (("bottom",), cells // 8 >= 4),
                           (("center", "--hole", 3), np.maximum(hole.real, hole.imag) <= 1),
                           (("0.25", "--particles", 3), None), (("mask.png",), mask > 0)]:
        a = drawn(place, "--inpaint", *flags, "--number", 2, cwd=tmp_path)
        assert set(vars(a)) == {"said", "truth", "given", "samples", "nearest", "unknown"}
        assert a.samples.shape == (2, 6, 64) and a.truth.shape == (2, 64)
        assert a.unknown.sum() == 16 if unknown is None else (a.unknown == unknown.ravel()).all()
        change = np.abs(a.samples - a.truth[:, None])
        assert change[..., ~a.unknown].max() == 0 and change[..., a.unknown].mean() > 1
        assert (np.isnan(a.given) == a.unknown).all() and a.samples[..., a.unknown].std(1).min() > 0
        assert "known values: changed by 0;" in a.said
        assert "columns truth, what is given, 6 posterior samples, the training image" in a.said
    a = drawn(place, "--denoise", 0.5, "--r-schedule", "constant", "--number", 4)
    scale = result_of(place.runs / "digits")["scale"]
    assert (a.given - a.truth).std() / scale == pytest.approx(0.5, rel=0.2)
    assert set(vars(a)) == {"said", "truth", "given", "samples", "mean", "nearest"}
    assert "E[x_0 | given]" in a.said and "PSNR" in a.said
    assert "mean" not in vars(drawn(place, "--denoise", 0.5, "--number", 2, run="heartbeat"))
    b = drawn(place, "--denoise", 0.5, "--r-schedule", "annealed", "--number", 4)
    assert (b.given == a.given).all() and (b.samples != a.samples).all()
    beat, other = (drawn(place, "--inpaint", "right", "--number", 2, "--seed", seed,
                         run="heartbeat") for seed in (0, 1))
    assert (beat.truth == other.truth).all() and (beat.samples != other.samples).any()
    roll, other = (drawn(place, "--denoise", 1, "--number", 2, "--seed", seed, run="roll")
                   for seed in (0, 1))
    assert (roll.truth != other.truth).all()
    assert (abs(roll.given - roll.truth - other.given + other.truth) > 1e-9).all()
    once, twice, three = (drawn(place, "--inpaint", "--number", 1, *flags).samples for flags in (
        ("--repeats", 1), ("--repeats", 2), ("--particles", 3)))
    assert all((x != y).any() for x, y in ((once, twice), (once, three), (twice, three)))
    a = drawn(place, "--denoise", 0.1, "--number", 3)
    far = np.abs(a.samples[:, None] - a.given[None, :, None]).mean((2, 3))  # samples i from given j
    assert (far.argmin(1) == range(3)).all() and far.diagonal().max() < 0.2 * scale
    assert np.abs(a.mean - a.given).mean() < 0.2 * scale
    for run in ("roll", "heartbeat"):
        a = drawn(place, "--inpaint", "right", "--number", 2, run=run)
        assert (a.samples[..., ~a.unknown] == a.truth[:, None, ~a.unknown]).all()
        assert a.samples.shape[:2] == (2, 50 if run == "roll" else 6)
    np.save(place.path / "few.npy", small_digits()[:30])  # 3 to test with, fewer than are usual
    done("train", "--dataset", "few.npy", "--steps", 1, *TINY, "--timesteps", 40, "--out",
         "runs/few", cwd=place.path)
    assert min(result_of(place.runs / "few")["kl_bits"][2:]) > 0    # every t was drawn
    assert drawn(place, "--inpaint", run="few").truth.shape == (3, 64)


@scripts
def test_the_users_own_pictures(place):
    """They are completed and denoised as they are, of any size, also in colour."""
    for run, shape in [("digits", (2, 12, 10)), ("colours", (2, 9, 16, 3))]:
        mine, names = rng(64).integers(0, 256, shape).astype(np.uint8), ["mine0.png", "mine1.png"]
        for name, picture in zip(names, mine):
            Image.fromarray(picture).save(place.path / name)
        a = drawn(place, "--input", *names, "--inpaint", "center", "--hole", 3, run=run)
        D = mine[0].size
        assert a.samples.shape == (2, 6, D) and a.unknown.sum() == 9 * D // math.prod(shape[1:3])
        assert (np.floor(a.samples[..., ~a.unknown] + 1e-6) ==
                mine.reshape(2, 1, D)[..., ~a.unknown]).all()
        a = drawn(place, "--input", *names, "--denoise", "0.5", run=run)
        assert set(vars(a)) == {"said", "given", "samples", "mean"} and "PSNR" not in a.said
        assert (np.floor(a.given + 1e-6) == mine.reshape(2, D)).all()      # no noise was added
        assert (a.given % 1).std() == approx(12 ** -0.5, rel=0.2)          # but what dequantises
        b = drawn(place, "--input", *names, "--denoise", "0.5", "--seed", 1, run=run)
        assert (a.given != b.given).all()
        a = drawn(place, "--input", *names, "--denoise", "0.5", "--number", 1, run=run)
        assert len(a.samples) == 1


@pytest.mark.parametrize("run", ["roll", "digits", "heartbeat", "colours"])
@scripts
def test_the_way_is_shown(place, run):
    """A strip and a GIF from noise to samples, free and posterior, which end at the samples."""
    for flags in ((), ("--inpaint", "right")):
        drawn(place, "--number", 3, *flags, "--trajectory", "--gif", run=run, out="way")
        with Image.open(place.path / "way.gif") as gif:
            assert 2 < gif.n_frames <= 9            # frames that are the same become one
            first = np.asarray(gif.convert("L")).astype(float)
            gif.seek(gif.n_frames - 1)
            last = np.asarray(gif.convert("L")).astype(float)
        assert (first != last).mean() > 0.002
        with Image.open(place.path / "way-trajectory.png") as strip:
            assert np.asarray(strip).std() > 1
            assert run != "digits" or strip.height == 3 * (2 + 10 * 3)  # a row for each input
        if run == "digits":                         # of each input its draws side by side
            assert gif.width == 3 * (2 + 10 * (6 if flags else 8))
        if run == "digits" and not flags:
            with Image.open(place.path / "way.png") as picture:
                assert np.abs(np.asarray(picture.convert("L")) - last).mean() < 4


@scripts
def test_a_gif_of_noise_in_colour_keeps_its_limit(tmp_path):
    frames = [Image.fromarray(rng(i).integers(0, 256, (60, 80, 3)).astype(np.uint8))
              for i in range(12)]
    figures.save_gif(frames, 2, tmp_path / "a.gif", limit=60_000)
    with Image.open(tmp_path / "a.gif") as gif:
        last = [gif.seek(i) or gif.info["duration"] for i in (0, gif.n_frames - 1)]
        assert last[1] == 2000 > last[0]
        assert gif.n_frames >= 10 and 20_000 < (tmp_path / "a.gif").stat().st_size < 60_000
    assert figures.save_gif.__defaults__[-1] == 3_000_000


# Mistakes

def tampered(run, target, sealed=False, **changes):
    """A copy of a run's checkpoint; changes are of its arrays, or of what it says of the run.
    sealed: with a digest that fits them."""
    with np.load(run / "checkpoint.npz") as file:
        content = dict(file)
    config = json.loads(str(content["config"]))
    for name, value in changes.items():
        if name in content:
            content[name] = value
        else:
            (config["about"] if name in config["about"] else config)[name] = value
    target.parent.mkdir(exist_ok=True)
    if "config" not in changes:
        content["config"] = np.asarray(json.dumps(config))
    if sealed:
        del content["digest"]
        content["digest"] = dpm.digest_of(content)
    np.savez(target, **content)


@scripts
def test_bad_input_gets_one_line_and_status_2(place, tmp_path, monkeypatch):
    """Every mistake of a user: one line that names it, and nothing is written."""
    digits, roll = place.runs / "digits", place.runs / "roll"
    Image.fromarray(np.eye(5, dtype=np.uint8) * 255).save(tmp_path / "five.png")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    (tmp_path / "text.npz").write_text("not a checkpoint\n")
    (tmp_path / "folder").mkdir()
    np.save(tmp_path / "floats.npy", rng(0).standard_normal((30, 6, 6)))
    shutil.copy(place.path / "digits.npy", tmp_path / "changed.npy")
    tampered(digits, tmp_path / "changed" / "checkpoint.npz", True,
             dataset=str(tmp_path / "changed.npy"))
    pixels = small_digits().copy()
    pixels[7, 4, 4] ^= 1
    np.save(tmp_path / "changed.npy", pixels)       # the shape is as it was
    tampered(digits, tmp_path / "gone.npz", True, dataset="/gone.npy")
    tampered(digits, tmp_path / "eps.npz", True, predict="eps")
    tampered(place.runs / "heartbeat", tmp_path / "pi.npz", True,
             of_diffusion=dict(rate=0.4, mean=0.2))
    dpm.save(small_model(), tmp_path / "untold.npz")
    theta = arrays_of(roll)["theta"]
    tampered(digits, tmp_path / "lost.npz", True, average=arrays_of(digits)["average"] * math.nan)
    for name, change in dict(
            newer=dict(format=99), nan=dict(average=np.full(theta.shape, math.nan)),
            scale=dict(scale=0.0), short=dict(average=theta[:-1]), rises=dict(
                alpha_bar=np.linspace(1, 2, 9)), config=dict(config="[" * 10_000), rounded=dict(
                dataset=3), unsaid=dict(objective=None), shares=dict(shares=0)).items():
        tampered(roll, tmp_path / f"{name}.npz", **change)
    tampered(roll, tmp_path / "torn" / "checkpoint.npz", shares=0)
    tampered(roll, tmp_path / "flat" / "checkpoint.npz", m=theta[:, None])
    files = sorted(tmp_path.rglob("*"))
    heartbeat, bytes_of = ("--dataset", "heartbeat"), ("--dataset", "changed.npy")
    for says, *flags in [
            ("no data set or file ''", "--dataset", ""), ("no data set or file", "--dataset", "x"),
            ("folder without pictures", "--dataset", "folder"),
            ("expected one argument", "--dataset"), ("invalid int value", "--steps", "x"),
            ("invalid choice", "--objective", "L"), ("unrecognized", "--focal", "3"),
            ("--schedule: for numbers only", *heartbeat, "--schedule", "learned"),
            ("--objective: for numbers only", *heartbeat, "--objective", "simple"),
            ("--variance: for numbers only", *heartbeat, "--variance", "beta"),
            ("--predict: for numbers only", *heartbeat, "--predict", "eps"),
            ("--decoder: for numbers only", *heartbeat, "--decoder", "discretised"),
            ("rate", *heartbeat, "--rate", "1"), ("rate", *heartbeat, "--rate", "nan"),
            ("--rate is for bits", "--rate", "0.5"),
            ("is for bytes", "--dataset", "floats.npy", "--decoder", "discretised"),
            ("ascends K", "--schedule", "learned", "--objective", "simple"),
            ("omit --decoder", "--dataset", "changed.npy", "--schedule", "learned", "--decoder",
             "discretised"),
            ("is for vectors", "--dataset", "changed.npy", "--network", "mlp"),
            ("can't weigh", "--network", "paper", "--objective", "mean"),
            ("can't weigh", "--network", "paper", "--objective", "simple"),
            ("eq. 64", "--network", "paper", "--variance", "beta"),
            ("omit --predict", "--network", "paper", "--predict", "eps"),
            ("--steps must be", "--steps", 0), ("--steps must be", "--steps", 10 ** 400),
            ("one number of steps", "--steps", 3, 4), ("--batch-size must be", "--batch-size", -1),
            ("--batch-size must be", "--batch-size", 10 ** 11),
            ("those of a U-Net", "--widths", 8), ("--widths must be", *bytes_of, "--widths", 8, 0),
            ("at most ten numbers", *bytes_of, "--widths", *[4] * 11),
            ("--timesteps must be", "--timesteps", 1), ("--timesteps", "--timesteps", 10 ** 11),
            ("--threads must be", "--threads", 0), ("--seed must be", "--seed", -1),
            ("--lr must be", "--lr", "nan"), ("--lr must be", "--lr", 0),
            ("crops of 40 x 40", "--dataset", place.path / "colours", "--crop", 40),
            ("12 x 12", "--dataset", place.path / "colours", "--crop", 13),
            ("either cropped or resized", "--dataset", "gravel", "--crop", 8, "--resize", 8),
            ("files of pictures", "--crop", 8),
            ("give a size of", "--dataset", "gravel", "--crop", 0),
            ("--parzen goes with", "--parzen"), ("images of bytes", "--parzen", "--evaluate", roll),
            ("a chain of 8", "--evaluate", roll, "--steps", 9),
            ("omit --lr", "--evaluate", roll, "--lr", "1"),
            ("omit --threads", "--evaluate", roll, "--threads", 2),
            ("no such checkpoint", "--evaluate", "nowhere"),
            ("format 99", "--evaluate", "newer.npz"),
            ("not an .npz file", "--evaluate", "text.npz"),
            ("not an .npz file", "--evaluate", place.path / "digits.npy"),
            ("gone.npy", "--evaluate", "gone.npz"), ("has changed", "--evaluate", "changed"),
            ("has changed", "--resume", "changed"), ("directory of a run", "--resume", "nowhere"),
            ("directory of a run", "--resume", digits / "checkpoint.npz"),
            ("there is no run", "--resume"),
            ("was started with --lr", "--resume", digits, "--lr", 1),
            ("was started with --timesteps 8", "--resume", digits, "--timesteps", 9),
            ("was started with --widths", "--resume", digits, "--widths", 8),
            ("was started with --batch-size 8", "--resume", digits, "--batch-size", 16),
            ("was started with --objective", "--resume", digits, "--objective", "simple"),
            ("2 shares", "--resume", digits, "--threads", 3),
            ("60 steps already", "--resume", digits, "--steps", 1),
            ("--steps must be", "--resume", digits, "--steps", 0),
            ("damaged", "--resume", "torn"), ("damaged", "--resume", "flat"),
            ("holds another run", "--out", digits), ("--out", "--out", ""),
            ("text.npz/run: a file is in the way", "--out", "text.npz/run"),
            *[("damaged", "--evaluate", f"{name}.npz") for name in
              ("nan", "scale", "short", "rises", "config", "rounded", "unsaid")],
            *[("--gpu:", "--gpu")] * (dpm.backend() is np)]:
        refuses(says, *flags, cwd=tmp_path)
    known = "--checkpoint", digits
    for says, *flags in [
            ("no such checkpoint", "--checkpoint", "nowhere"),
            ("not an .npz file", "--checkpoint", "text.npz"),
            ("damaged", "--checkpoint", "nan.npz"),
            ("has changed", "--checkpoint", "changed", "--inpaint"),
            ("gone.npy", "--checkpoint", "gone.npz", "--denoise", 1),
            ("not one that train.py has written", "--checkpoint", "untold.npz"),
            ("--number must be", *known, "--number", 0), ("--seed must", *known, "--seed", -1),
            ("--particles must", *known, "--particles", 0),
            ("go with --inpaint", *known, "--input", "five.png"),
            ("not finite", "--checkpoint", "lost.npz", "--number", 1, "--out", "a"),
            ("GB of disk", *known, "--number", 10 ** 11), ("GB of", *known, "--number", 10 ** 400),
            ("GB of memory", *known, "--denoise", 1, "--particles", 10 ** 400),
            ("a chain of 8", *known, "--steps", 9), ("2..8", *known, "--steps", 0),
            ("--eta lies", *known, "--eta", 1.5), ("--eta lies", *known, "--eta", "nan"),
            ("--eta is for free", *known, "--denoise", 1, "--eta", 0.5),
            ("--eta is for numbers", "--checkpoint", place.runs / "heartbeat", "--eta", 0.5),
            ("--denoise takes", *known, "--denoise", "1e300"),
            ("--denoise takes", *known, "--denoise", "1e-300"),
            ("--denoise takes", *known, "--denoise", "nan"),
            ("--sharpen must", *known, "--sharpen", -1), ("needs a worse", *known, "--sharpen", 1),
            ("--sharpen must", *known, "--sharpen", "nan"),
            ("are for free samples", *known, "--denoise", 1, "--weak", digits),
            ("are for free samples", *known, "--inpaint", "--sharpen", 1),
            ("of other data", *known, "--weak", roll), ("of another pi", "--checkpoint",
             place.runs / "heartbeat", "--weak", "pi.npz"), ("itself", *known, "--weak", digits),
            ("no such", *known, "--weak", "nowhere"),
            ("predicts eps; give one with v", *known, "--weak", "eps.npz"),
            ("--repeats goes", *known, "--repeats", 2, "--denoise", 1),
            ("--repeats must", *known, "--repeats", 0),
            ("with --particles", *known, "--inpaint", "--repeats", 2, "--particles", 2),
            ("--hole goes with", *known, "--hole", 3), ("go with", *known, "--particles", 4),
            ("8 x 8 pixels", *known, "--inpaint", "center", "--hole", 8),
            ("40 test examples", *known, "--inpaint", "--number", 41),
            ("between 0 and 1", *known, "--inpaint", "1.5"),
            ("nothing is missing", *known, "--inpaint", "0.001"),
            ("nothing is missing", *known, "--inpaint", "black.png"),
            ("5 x 5", *known, "--inpaint", "five.png"),
            ("neither", *known, "--inpaint", "gone.png"),
            ("a picture", *known, "--inpaint", "text.npz"),
            ("a picture", *known, "--denoise", 1, "--input", "text.npz"),
            ("5 x 5", *known, "--denoise", 1, "--input", "five.png", "black.png"),
            ("gone.png", *known, "--inpaint", "--input", "gone.png"),
            ("no pictures of bytes", "--checkpoint", roll, "--inpaint", "--input", "five.png"),
            ("not allowed with", *known, "--inpaint", "--denoise", 1),
            ("--out", *known, "--out", ""), ("give a name", *known, "--out", ".."),
            ("--checkpoint", "--checkpoint", ""),
            ("text.npz: a file is in the way", *known, "--number", 1, "--out",
             "text.npz/a")]:
        refuses(says, *flags, script="sample", cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == files
    with refused("of this model: not finite"):
        runs.finite(np.array([1, math.inf]), "samples")
    monkeypatch.setattr(data, "load", lambda *_: bytearray(2 ** 60))
    refuses("not enough memory", cwd=tmp_path)


@scripts
def test_fuzz(place, tmp_path, capfd):
    """Files of which bytes were changed, checkpoints that say something else, and flags by chance:
    each ends in success or in one line and status 2."""
    dice, mine = random.Random(7), {}
    pixels = small_digits()[:30]
    np.save(tmp_path / "a.npy", pixels)
    np.savez(tmp_path / "a.npz", train=pixels, test=pixels[:5])
    (tmp_path / "a.idx").write_bytes(bytes([0, 0, 8, 3, 0, 0, 0, 30, 0, 0, 0, 8, 0, 0, 0, 8])
                                     + pixels.tobytes())
    Image.fromarray(pixels[0]).save(tmp_path / "a.png")
    shutil.copy(place.runs / "roll" / "checkpoint.npz", tmp_path / "run.npz")
    for path in sorted(tmp_path.iterdir()):
        mine[path.name] = path.read_bytes()

    def fine(script, *flags):
        end = call(script, *flags, cwd=tmp_path)
        lines = end.err.splitlines()
        assert end.status == 0 or end.status == 2 and len(lines) == 1 and lines[0].startswith(
            "error: ") and lines[0].isprintable(), (flags, end)
        return end.status

    def changed(content):
        content = bytearray(content)
        for _ in range(dice.choice([1, 1, 3, 20])):
            near = dice.choice([130, 300, len(content)])       # headers more often than the rest
            place = dice.randrange(min(near, len(content)))
            content[place] = dice.choice([0, 255, dice.randrange(256), content[place] ^ 1])
        return bytes(content[:dice.choice([len(content)] * 4 + [dice.randrange(len(content))])])

    for _ in range(200):
        name = dice.choice(["a.npy", "a.npz", "a.idx", "a.png"])
        (tmp_path / name).write_bytes(changed(mine[name]))
        try:
            if name == "a.png":
                data.read_pictures([tmp_path / name], (8, 8, 1))
            else:
                data.load(tmp_path / name)
        except dpm.InputError as error:
            assert str(error).isprintable() and len(str(error)) < 500
    ends, roll = [], place.runs / "roll"
    two = "--number", 1, "--steps", 2
    for _ in range(60):
        (tmp_path / "run.npz").write_bytes(changed(mine["run.npz"]))
        ends.append(fine("sample", "--checkpoint", "run.npz", *two))
    values = [None, True, 0, -1, 3, 10 ** 12, 0.5, -math.inf, math.nan, "", "mlp", [], [1, 1, 2]]
    config = json.loads(str(np.load(roll / "checkpoint.npz")["config"]))
    for _ in range(60):
        wrong = json.loads(json.dumps(config))
        part = dice.choice([wrong, wrong["about"], wrong["about"]["sizes"], wrong["of_diffusion"]])
        name = dice.choice(sorted(part))
        part[name] = dice.choice(values)
        if dice.random() < 0.2:
            del part[name]
        (tmp_path / "torn").mkdir(exist_ok=True)
        tampered(roll, tmp_path / "torn" / "checkpoint.npz", config=json.dumps(wrong))
        ends.append(fine("sample", "--checkpoint", "torn", *two))
        ends.append(fine("train", "--resume", "torn", "--steps", 21, "--no-evaluate"))
    flags = {
        "--dataset": ["swissroll:1", "swissroll:x", "heartbeat", "", ".", "a.idx", "deadleaves:4"],
        "--network": ["mlp", "paper", "unet"], "--schedule": [*dpm.SCHEDULES, "learned"],
        "--objective": dpm.OBJECTIVES, "--predict": ["v", "eps"],
        "--variance": ["learned", "beta", "posterior"], "--decoder": ["discretised"],
        "--timesteps": [-1, 0, 1, 2, 3, 5, 10 ** 12, "x"], "--batch-size": [-1, 0, 1, 3, 10 ** 12],
        "--lr": [0, -1, 1e-300, 1e300, "inf", "nan"], "--seed": [-1, 10 ** 30, 1.5],
        "--threads": [-1, 0, 1, 3, 10 ** 9], "--rate": [0, 0.5, 2, "nan"],
        "--crop": [-1, 4, 10 ** 9], "--resize": [0, 4], "--out": ["", "a.npy", "new"],
        "--dtype": ["float64", "int"]}
    (tmp_path / "a.idx").write_bytes(mine["a.idx"])
    for _ in range(80):
        chosen = dice.sample(sorted(flags), dice.choice([1, 2, 3, 4]))
        usual = {"--timesteps": 3, "--batch-size": 4}
        given = usual | {flag: dice.choice(flags[flag]) for flag in chosen}
        ends.append(fine("train", "--steps", 2, "--no-evaluate", *[
            word for pair in given.items() for word in pair]))
        shutil.rmtree(tmp_path / "new", ignore_errors=True)
    assert 20 < ends.count(0) < len(ends) - 60      # both ends are met
    assert capfd.readouterr().err == ""             # nothing printed past Python
