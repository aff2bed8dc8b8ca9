"""The truths that dpm.py, data and the scripts are held to: closed forms, enumerations, difference
quotients, and real runs.

    python -m pytest -q

MAP says where each equation of the two papers stands in dpm.py, and which tests hold it. SD is
Sohl-Dickstein et al. 2015, DDPM is Ho et al. 2020, DDIM is Song et al. 2020.
"""
import dpm  # first: it keeps BLAS to one thread, before numpy starts it

import json
import math
import operator
import pathlib
import sys
import threading
import types
from decimal import Decimal, getcontext

import numpy as np
import pytest
from scipy.signal import correlate2d
from scipy.special import log_ndtr, ndtr, softmax

import data

HERE = pathlib.Path(__file__).parent
LN2 = math.log(2)

MAP = [  # equation, what it says, where it is in dpm.py, which tests hold it
    ("SD 1-3, Table App.1", "the forward diffusion q, and its jump from x_0; DDPM 2, 4",
     "schedule Gaussian.q_step Gaussian.q_jump Binomial.q_step Binomial.q_jump",
     "test_schedule test_q_jump_is_the_iterated_step test_binomial_q_by_enumeration"),
    ("SD 4, 5", "the reverse process p; DDPM 1",
     "Gaussian.p_back Binomial.p_back DPM.p_back DPM.sample",
     "test_what_v_and_u_mean test_samples_have_the_variance_of_their_kernels "
     "test_heartbeat_K_star"),
    ("SD 6-9", "the probability of the model, by Jarzynski's average",
     "log_weights log_likelihood",
     "test_log_likelihood_of_linear_kernels test_K_by_enumeration"),
    ("SD 10-14, 37-51", "the log likelihood and the bound K; DDPM 3, 5",
     "DPM.bound Gaussian.kl Binomial.kl Gaussian.H_q Gaussian.H_p Binomial.H_p Gaussian.from_pi",
     "test_kl_is_the_integral test_K_star_of_gaussian_data test_K_by_enumeration "
     "test_at_initialisation_K_is_L_null test_parts_sum_to_K test_entropies"),
    ("SD 15", "training: the gradient of K",
     "DPM.gradient stratified Adam.update",
     "test_gradient_of_every_objective test_stratified_estimate_is_the_sum_over_all_t test_adam"),
    ("SD section 2.4.1", "K ascended in beta_2..T, with frozen noise",
     "LearnedSchedule Gaussian.dkl_schedule Gaussian.dlogsnr",
     "test_learned_schedule test_learned_schedule_backward test_gradient_of_every_objective"),
    ("SD 16-22, 52-61", "p(x_0) r(x_0) and its perturbed kernels, for any r",
     "Posterior Observation Function Normal.times Normal.tilted Bernoulli.times Bernoulli.tilted",
     "test_normal test_bernoulli test_posterior_samples test_posteriors_against_the_truth"),
    ("SD 21 over 22", "the factor that eq. 22 drops, kept as a weight",
     "resampled pick", "test_particles_are_exact test_resampling test_posteriors_against_the_truth"),
    ("SD 23, section 2.5", "r along the trajectory",
     "Posterior.predicted Posterior.of_x0 Gaussian.dp_x0 Binomial.dp_x0 Gaussian.guided",
     "test_denoising_follows_its_recursion test_r_of_what_a_network_predicts "
     "test_guidance_is_the_posterior_mean"),
    ("SD 24, 25-36", "bounds on the entropy of a reverse step",
     "entropy_bounds", "test_entropy_bounds_of_gaussian_data test_entropy_bounds_of_bits"),
    ("SD 44", "the fixed first step", "DPM.p_back", "test_the_first_step"),
    ("SD 62-65, figure D.1", "the paper's network and its kernel",
     "paper Bumps Pooled Whole PaperKernel", "test_layers test_networks test_readouts"),
    ("DDPM 6, 7", "q turned around, q(x_{t-1} | x_t, x_0); SD appendix B",
     "Gaussian.q_back Binomial.q_back", "test_q_back_two_ways test_binomial_q_by_enumeration"),
    ("DDPM 8-12, 14", "mu~ or eps as the target, and L_simple: other weights of one error",
     "objective Gaussian.velocity", "test_objectives_are_their_definitions "
     "test_gradient_of_every_objective test_focused_weighs_what_decides_the_picture"),
    ("DDPM section 3.2", "the two fixed variances, ends of SD 24",
     "Gaussian.p_x0 Gaussian.p_back", "test_what_v_and_u_mean"),
    ("DDPM 13", "the discretised decoder",
     "Gaussian.decode", "test_a_decoder_of_few_grey_levels test_uniform_bytes_have_eight_bits"),
    ("DDIM 12, 16", "fewer steps, with less noise or none",
     "Diffusion.shortened DPM.shortened Gaussian.p_back",
     "test_a_shortened_chain_is_a_diffusion test_steps_with_less_noise"),
]


def test_the_map_names_what_exists():
    for _, _, functions, tests in MAP:
        for name in functions.split():
            assert callable(operator.attrgetter(name)(dpm)), name
        for name in tests.split():
            assert callable(globals()[name]), name


def rng(*seed):
    return np.random.default_rng(seed)


def gaussian(T=12, beta_1=1e-2, kind="logsnr", **options):
    return dpm.Gaussian(dpm.schedule(kind, T, beta_1), **options)


def binomial(T=12, beta_1=1e-2, kind="cosine", rate=0.3, **options):
    return dpm.Binomial(dpm.schedule(kind, T, beta_1), rate=rate, **options)


FEATURES = dict(scales=(0, 2), edges=(-1.0, 0.3))
SIZES = dict(mlp=dict(width=8, layers=2, time=8, **FEATURES),
             unet=dict(widths=(4, 6), head=5, time=8, **FEATURES),
             paper=dict(pools=(1, 2, 3), maps=2, hidden=5, width=6, bumps=3))
NETWORKS = [("mlp", (1, 1, 3)), ("unet", (5, 7, 2)), ("paper", (5, 4, 2))]


def small_model(q=None, shape=(1, 1, 3), network="mlp", stir=0.2, predict="v", learned=False, **options):
    """A model with random weights everywhere, the last layer included, unless stir is 0."""
    about = dict(network=network, sizes=SIZES[network], predict=predict, dataset="x")
    options = dict(shift=0.5, scale=2.0, about=about, threads=2, dtype="float64") | options
    model = dpm.build(q or gaussian(), shape, network, SIZES[network], predict, learned, **options)
    model.theta += (stir * rng(7).standard_normal(len(model.theta))).astype(model.dtype)
    model.follow_schedule()
    return model


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

    def standard_normal(self, shape, dtype=float):
        assert shape == self.signs.shape
        return self.signs.astype(dtype)


# ------------------------------------------------------------------------------------------------
# 1. The diffusions
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T", [2, 10, 1000])
@pytest.mark.parametrize("kind", ["logsnr", "paper", "linear", "cosine"])
def test_schedule(kind, T):
    a, t = dpm.schedule(kind, T, 1e-4), np.arange(2, T + 1)
    first = min(0.1 / T, 0.999) if kind == "linear" else 1e-4
    assert a.shape == (T + 1,) and a[0] == 1 and a[1] == pytest.approx(1 - first, rel=1e-12)
    assert (np.diff(a) < 0).all() and (a >= 0).all()
    if kind == "paper":  # 1 - 1 / (T - s + 1) = (T - s) / (T - s + 1) telescopes
        np.testing.assert_allclose(a[2:], (1 - 1e-4) * (T - t) / (T - 1), rtol=1e-12, atol=1e-16)
    elif kind == "logsnr":
        logit = np.log((1 - a[1:]) / a[1:])
        np.testing.assert_allclose(np.diff(logit, 2), 0, atol=1e-8)
        assert logit[-1] == pytest.approx(10)
    elif kind == "cosine":
        angle = 0.99 * np.pi / 2 * (np.arange(1, T + 1) - 1) / (T - 1)
        np.testing.assert_allclose(np.arccos(a[1:] / (1 - 1e-4)), angle, atol=1e-9)
    elif T > 2:
        beta = 1 - a[1:] / a[:-1]
        assert beta[-1] == pytest.approx(min(20 / T, 0.999)) and a[-1] < 1e-3
        assert T == 10 or abs(np.diff(beta, 2)).max() < 1e-12  # a line, where it is not cut


@pytest.mark.parametrize("kind", ["logsnr", "paper", "linear"])
def test_q_jump_is_the_iterated_step(kind):
    """x_t = sqrt(1 - beta_t) x_{t-1} + sqrt(beta_t) noise, t times."""
    q, mean, variance = gaussian(20, 1e-3, kind), np.array([[1.7]]), 0.0
    assert q.beta[1] == pytest.approx(1e-4 * 50 if kind == "linear" else 1e-3)
    for t in range(1, 21):
        step, jump = (f(x, np.array([t])) for f, x in ((q.q_step, mean), (q.q_jump, [[1.7]])))
        assert step.mean ** 2 == pytest.approx((1 - q.beta[t]) * mean ** 2)
        assert step.variance == pytest.approx(q.beta[t])
        mean, variance = step.mean, (1 - q.beta[t]) * variance + step.variance
        assert jump.mean == pytest.approx(mean, abs=1e-12) and jump.mean >= 0
        assert jump.variance == pytest.approx(variance, rel=1e-10)


def test_normal():
    """Entropy, density, products and draws, against integrals on a grid."""
    x, r = np.linspace(-15, 15, 30001)[:, None], np.trapezoid
    for mean, variance, y, s2, g in [(0.3, 0.5, 1.7, 0.64, 0.7), (-1, 2, 0.4, 0.64, -0.2),
                                     (0.5, 0.3, 1, 0.01, 1.0)]:
        p = dpm.Normal(np, np.array([[mean]]), np.array([[variance]]))
        log_p = p.log_density(x)
        assert r(np.exp(log_p), x[:, 0]) == pytest.approx(1)
        assert p.entropy() == pytest.approx(-r(np.exp(log_p) * log_p, x[:, 0]))
        for log_r, (product, log_Z) in [(-(x - y) ** 2 / 2 / s2 - 0.5 * math.log(s2),
                                         p.times(np.array([[y]]), np.array([[s2]]))),
                                        (g * x, p.tilted(np.array([[g]])))]:
            weights = np.exp(log_p + log_r[:, 0])
            Z = r(weights, x[:, 0])
            assert log_Z == pytest.approx(math.log(Z), abs=1e-8)
            assert product.mean == pytest.approx(r(weights * x[:, 0], x[:, 0]) / Z, rel=1e-8)
            spread = r(weights * (x - product.mean)[:, 0] ** 2, x[:, 0]) / Z
            assert product.variance == pytest.approx(spread, rel=1e-8)
    p = dpm.Normal(np, np.full((1, 3), 0.3), np.array([0.5]))
    product, log_Z = p.times(np.array([1.0, 2.0, 0.0]), np.array([0, 1e-18, np.inf]))
    np.testing.assert_allclose(product.mean, [[1, 2, 0.3]])  # known; nearly known; unknown
    np.testing.assert_allclose(product.variance, [0, 0, 0.5], atol=1e-12)
    assert log_Z == pytest.approx(sum(-(y - 0.3) ** 2 - 0.5 * math.log(0.5) for y in (1, 2)))
    np.testing.assert_allclose(p.draw(np.array([[1, -2, 0.0]])), 0.3 + math.sqrt(0.5) * np.array([[1, -2, 0]]))
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
    np.testing.assert_allclose(P, np.where(states == 1, one, 1 - one).prod(1))
    assert p.entropy() == pytest.approx(-(P * np.where(P > 0, log_p, 0)).sum(), rel=1e-12)
    np.testing.assert_allclose(p.variance, one * (1 - one))
    log_r0, log_r1, g = rng(3).standard_normal((3, 3))
    for log_r, (product, log_Z) in [(states @ log_r1 + (1 - states) @ log_r0, p.times(log_r0, log_r1)),
                                    (states @ g, p.tilted(g))]:
        weights = P * np.exp(log_r)
        assert log_Z == pytest.approx(np.log(weights.sum()))
        np.testing.assert_allclose(product.one[0], weights @ states / weights.sum())
        np.testing.assert_allclose(product.zero, 1 - product.one)
    u = np.linspace(0, 1, 1001)[:-1, None].repeat(3, 1)
    np.testing.assert_allclose(p.draw(u).mean(0), one[0], atol=1e-3)
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
    mean = (np.sqrt(1 - prior) * x0 / prior + np.sqrt(1 - beta) * xt / beta) / precision
    np.testing.assert_allclose(back.variance, 1 / precision, rtol=1e-9)
    np.testing.assert_allclose(back.mean, mean, rtol=1e-9)


def test_what_v_and_u_mean():
    """They are x_0's mean and spread; p(x_{t-1} | x_t) is q_back averaged over this x_0. u = 0 and 1 are
    beta~_t and beta_t, DDPM's two fixed variances."""
    q, t = gaussian(15), np.arange(2, 16)
    x0, eps, u = rng(2).standard_normal((3, 14, 3))
    u, cos, sin = u ** 2, np.sqrt(q.alpha_bar[t])[:, None], np.sqrt(1 - q.alpha_bar[t])[:, None]
    xt, v = cos * x0 + sin * eps, cos * eps - sin * x0
    np.testing.assert_allclose(q.velocity(x0, xt, t), v, rtol=1e-9)
    z = np.stack([v, u], 2)
    p0, p, mu = q.p_x0(xt, t, z), q.p_back(xt, t, z), q.q_back(x0, xt, t)
    np.testing.assert_allclose(p0.mean, x0, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(p0.variance, sin ** 2 * u)
    np.testing.assert_allclose(p.mean, mu.mean, rtol=1e-9, atol=1e-12)
    from_x0 = (q.q_back(x0 + 1, xt, t).mean - mu.mean) ** 2
    np.testing.assert_allclose(p.variance, mu.variance + from_x0 * p0.variance, rtol=1e-9)
    equilibrium = q.p_back(xt, t, np.stack([0 * v, 1 + 0 * v], 2))
    np.testing.assert_allclose(equilibrium.mean, q.q_step(xt, t).mean, rtol=1e-12)
    np.testing.assert_allclose(equilibrium.variance, q.beta[t][:, None] + 0 * v, rtol=1e-9)
    for variance, f_sigma in [("beta", q.beta[t][:, None] + 0 * v), ("posterior", mu.variance + 0 * v)]:
        fixed = gaussian(15, variance=variance)
        np.testing.assert_allclose(fixed.p_back(xt, t, z).variance, f_sigma, rtol=1e-9)
        np.testing.assert_allclose(fixed.p_back(xt, t, z).mean, p.mean, rtol=1e-12)
        first = fixed.p_x0(xt, np.ones(14, int), z).variance  # DDPM's, where t = 1
        np.testing.assert_allclose(first, q.beta_tilde[2] + 0 * v)


@pytest.mark.parametrize("variance", ["learned", "beta", "posterior"])
def test_kl_is_the_integral(variance):
    q, t = gaussian(9, variance=variance), np.array([2, 4, 6])
    x0, xt = rng(3).standard_normal((2, 3, 1))
    z = abs(rng(4).standard_normal((3, 1, 2)))
    kl, back, p = q.kl(x0, xt, t, z)[0], q.q_back(x0, xt, t), q.p_back(xt, t, z)
    for i in range(3):
        x = back.mean[i] + np.sqrt(back.variance[i]) * np.linspace(-9, 9, 3001)[:, None]
        log_q, log_p = (d.take([i] * len(x)).log_density(x) for d in (back, p))
        integral = np.trapezoid(np.exp(log_q) * (log_q - log_p), x[:, 0])
        assert integral == pytest.approx(kl[i], rel=1e-8)


def test_entropies():
    """The pieces of the bound that need no network, by integrals, sums, and two points of noise."""
    x, q, b = np.linspace(-30, 30, 30001)[:, None], gaussian(9, 0.1, "cosine"), binomial(4, 0.1)
    x0, x1 = np.array([[1.7], [0.4]]), np.array([[1.0], [0.0]])
    r = lambda y: np.trapezoid(y, x[:, 0])
    assert r(np.exp(q.log_pi(x))) == pytest.approx(1)
    states = np.array([[0.0], [1.0]])
    for t in (1, 3, 4):
        for diffusion, given, all_x, total in ((q, x0, x, r), (b, x1, states, np.sum)):
            log_pi = diffusion.log_pi(all_x)
            for i in (0, 1):
                rows = np.full(len(all_x), t)
                log_q = diffusion.q_jump(given[[i]].repeat(len(all_x), 0), rows).log_density(all_x)
                p = np.exp(log_q)
                assert -total(p * log_q) == pytest.approx(diffusion.H_q(t, given)[i], rel=1e-6)
                kl = total(p * (log_q - log_pi))
                assert kl == pytest.approx(diffusion.from_pi(t, given)[i], rel=1e-6)
                before = diffusion.q_jump(given[[i]], np.array([t - 1]))
                step = [diffusion.q_step(a.reshape(1, 1), np.array([t])).entropy()[0] for a in (0.0, 1.0) for a in [np.array(a)]]
                one = before.mean[0, 0] if diffusion is b else 0
                H = (1 - one) * step[0] + one * step[1]
                assert diffusion.H_step(t, given)[i] == pytest.approx(H, rel=1e-9)
    for diffusion, given in ((q, x0), (b, x1)):
        T = diffusion.T
        def mean_log_pi(t):  # log pi is a quadratic, or linear in the bits
            p = diffusion.q_jump(given, np.full(2, t))
            if diffusion is b:
                return p.one[:, 0] * b.log_pi(states)[1] + p.zero[:, 0] * b.log_pi(states)[0]
            return sum(q.log_pi(p.draw(np.full((2, 1), e))) for e in (-1.0, 1.0)) / 2
        expected = -mean_log_pi(T) + mean_log_pi(1) - diffusion.log_pi(given)
        np.testing.assert_allclose(diffusion.H_p(given), expected, rtol=1e-9)
    wide = np.full((1, 5), 1.3)
    for f in (lambda x: q.H_q(3, x), lambda x: q.H_step(3, x), q.H_p, lambda x: q.from_pi(3, x)):
        assert f(wide) == pytest.approx(5 * f(wide[:, :1]))


def test_the_chain_forgets():
    """The distance to pi falls in every step, at the end as alpha_bar, and as its square for bits."""
    for q, x0, power in ((gaussian(40), np.array([[1.5]]), 1), (binomial(40, kind="logsnr"), np.array([[1.0]]), 2)):
        kl = np.array([q.from_pi(t, x0)[0] for t in range(1, 41)])
        assert (np.diff(kl) < 0).all()
        a = q.alpha_bar[35:41] ** power
        limit = 1.5 ** 2 / 2 if power == 1 else 0.7 ** 2 / (2 * 0.3 * 0.7)  # chi-square / 2
        np.testing.assert_allclose(kl[34:] / a, limit, rtol=0.02)


def test_the_first_step():
    """Eq. 44: T_pi(x_0 | x_1; beta_1), the forward kernel run backwards; or the decoder's p(x_0 | x_1)."""
    x = np.array([[2.0, -1.0, 0.0]])
    p = small_model(gaussian(5, 0.3)).p_back(x, 1)
    np.testing.assert_allclose(p.mean, math.sqrt(0.7) * x)
    assert p.variance == pytest.approx(0.3)
    model = small_model(gaussian(5, 0.3, half=0.1, ends=(-1, 1)))
    at, p = np.array([1]), model.p_back(x, 1)
    said = model.diffusion.p_x0(x, at, model.forward(x, at))
    assert (p.mean == said.mean).all() and (p.variance == said.variance).all()
    assert (abs(p.mean - math.sqrt(0.7) * x) > 1e-3).all()


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
        x, t = tape.saved
        turned = [[np.where(np.arange(x.shape[1]) == i, bit, x) for bit in (1.0, 0.0)] for i in range(x.shape[1])]
        change = np.stack([self._at(on, t) - self._at(off, t) for on, off in turned])
        return np.einsum("no,ino->ni", dz.reshape(x.shape), change)


def bits(n=3, T=4, rate=0.3, size=1.0, p0=None):
    """A binomial model over n bits, its 2^n states, and the probabilities of all that can happen, as
    matrices [to, from]: data p0 (states,), forward [t][x_t, x_{t-1}] and reverse [t][x_{t-1}, x_t],
    the forward ones built bit by bit from Table App.1 alone."""
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
        np.testing.assert_allclose(q.q_jump(states, at).one, until.T @ states)
        np.testing.assert_allclose(q.q_step(states, at).one, forward[t].T @ states)
        for x0 in range(4 if t > 1 else 0):
            joint = forward[t] * before[:, x0]  # [x_t, x_{t-1}]
            back = q.q_back(states[x0][None], states, at)
            np.testing.assert_allclose(back.one, joint @ states / joint.sum(1)[:, None])
            np.testing.assert_allclose(back.zero, 1 - back.one)


def test_binomial_belief():
    """z is the log odds beyond Bayes from x_t alone; p(x_{t-1} | x_t) is q_back averaged over it."""
    q, xt, t = binomial(9), states_of(2), np.full(4, 5)
    z, a = rng(47).standard_normal((4, 2, 1)), q.alpha_bar[5]
    like = lambda x0: np.where(xt == 1, a * x0 + 0.3 * (1 - a), a * (1 - x0) + 0.7 * (1 - a))
    odds = 0.3 / 0.7 * like(1) / like(0) * np.exp(z[..., 0])
    m, p = odds / (1 + odds), q.p_back(xt, t, z)
    np.testing.assert_allclose(q.p_x0(xt, t, z).one, m)
    one = m * q.q_back(1 + 0 * xt, xt, t).one + (1 - m) * q.q_back(0 * xt, xt, t).one
    np.testing.assert_allclose(p.one, one)
    np.testing.assert_allclose(q.q_step(xt, t).one, q.p_back(xt, t, 0 * z).one)  # equilibrium
    np.testing.assert_allclose(q.ideal(xt, t, m), z, rtol=1e-9)


@pytest.mark.parametrize("kind, T", [("logsnr", 4000), ("logsnr", 10_000), ("cosine", 10_000)])
def test_binomial_kl_of_rare_ones(kind, T):
    """Finite at every t for the smallest rate, and what 50 digits say."""
    q, getcontext().prec = binomial(T, 1e-5, kind, rate=1e-4), 50
    x0, xt, z = np.array([0, 0, 1, 1.0]), np.array([0, 1, 0, 1.0]), np.array([3, -4, 1, 8.0])
    t = np.arange(2, T + 1).repeat(4)
    case = [np.tile(a, T - 1)[:, None] for a in (x0, xt, z)]
    kl, dz = q.kl(case[0], case[1], t, case[2][..., None])
    assert np.isfinite(kl).all() and np.isfinite(dz).all() and kl.min() > -1e-12

    def exact(t, x0, xt, z):
        one = Decimal(1)
        a, before, beta, rate = map(Decimal, (q.alpha_bar[t], q.before[t], q.beta[t], q.rate))
        kept = lambda to, x, a: a * (1 if to == x else 0) + (rate if to else one - rate) * (one - a)
        def back(x0):
            w = [kept(x, x0, before) * kept(xt, x, one - beta) for x in (0, 1)]
            return [v / (w[0] + w[1]) for v in w]
        odds = rate / (one - rate) * kept(xt, 1, a) / kept(xt, 0, a) * Decimal(z).exp()
        m, b, f = odds / (one + odds), back(x0), [back(0), back(1)]
        return float(sum(b[x] * (b[x] / (m * f[1][x] + (one - m) * f[0][x])).ln() for x in (0, 1)))

    some = np.unique(np.concatenate([np.geomspace(2, T, 25), T + 1 - np.geomspace(1, T - 1, 25)]).astype(int))
    for s in some:
        expected = [exact(int(s), *c) for c in zip(x0, xt, z)]
        np.testing.assert_allclose(kl[t == s], expected, rtol=1e-6, atol=1e-14)


# ------------------------------------------------------------------------------------------------
# 2. The network language: every backward against difference quotients, float64
# ------------------------------------------------------------------------------------------------

softsign = lambda z: z / (1 + abs(z))
side = lambda parts: np.concatenate(list(parts), -1)


def convolved(x, W):
    """By SciPy's correlation, one picture and one pair of channels at a time."""
    filters = W.reshape(3, 3, x.shape[-1], -1)
    return np.stack([np.stack([sum(correlate2d(picture[..., i], filters[..., i, o], mode="same")
                                   for i in range(x.shape[-1])) for o in range(filters.shape[-1])], -1)
                     for picture in x])


def celled(x, s, f):
    """f of every s x s cell (n, s, s, C), zeros beyond the border, and back."""
    n, H, W, _ = x.shape
    x = np.pad(x, ((0, 0), (0, -H % s), (0, -W % s), (0, 0)))
    return np.concatenate([np.concatenate([f(x[:, i:i + s, j:j + s]) for j in range(0, W, s)], 2)
                           for i in range(0, H, s)], 1)[:, :H, :W]


def angle(level):
    """cos phi and sin phi, (n, 1, 1, 1), of the noise level, log tan^2 phi."""
    phi = np.arctan(np.exp(level / 2))[:, None, None, None]
    return np.cos(phi), np.sin(phi)


def bumps(level, centres, width):
    g = np.exp(-0.5 * ((level[:, None] - centres) / width) ** 2)
    return (g / g.sum(1, keepdims=True))[:, None, None, :, None]


LAYERS = dict(  # name: how it is made for (H, W, 2), and y by the weights w of its layers, e and level
    Dense=(lambda *_: dpm.Dense(2, 3), lambda x, e, a, w: x @ w[0]["W"] + w[0]["b"]),
    Conv3x3=(lambda *_: dpm.Conv3x3(2, 3), lambda x, e, a, w: convolved(x, w[0]["W"])),
    Time=(lambda *_: dpm.Time(3, 2), lambda x, e, a, w: x + (e @ w[0]["V"] + w[0]["b"])[:, None, None]),
    Rectifier=(lambda *_: dpm.Rectifier(), lambda x, e, a, w: (x + np.sqrt(x ** 2 + 1)) / 2),
    Softsign=(lambda *_: dpm.Softsign(), lambda x, e, a, w: softsign(x)),
    Waves=(lambda *_: dpm.Waves((0, 2)), lambda x, e, a, w: side(f(2 ** k * np.pi * x) for f in (np.sin, np.cos) for k in (0, 2))),
    Edges=(lambda *_: dpm.Edges((-1.0, 0.3)), lambda x, e, a, w: side(
        softsign((x - angle(a)[0] * c) / angle(a)[1] / s) for s in (1, 4) for c in (-1.0, 0.3))),
    Bumps=(lambda *_: dpm.Bumps(2, -3.0, 5.0), lambda x, e, a, w: (
        x[..., None] * bumps(a, np.array([-3, 5]), 4)).sum(3)),
    Cells=(lambda *_: dpm.Cells(dpm.Dense(8, 4)), lambda x, e, a, w: celled(
        x, 2, lambda c: (c.reshape(len(c), -1) @ w[0]["W"] + w[0]["b"]).reshape(-1, 2, 2, 1))),
    Pooled=(lambda *_: dpm.Pooled(3, dpm.Dense(2, 3)), lambda x, e, a, w: celled(
        x, 3, lambda c: np.broadcast_to((c.mean((1, 2)) @ w[0]["W"] + w[0]["b"])[:, None, None], (len(c), 3, 3, 3)))),
    Whole=(lambda H, W: dpm.Whole(dpm.Dense(2 * H * W, H * W)), lambda x, e, a, w: (
        x.reshape(len(x), -1) @ w[0]["W"] + w[0]["b"]).reshape(*x.shape[:3], 1)),
    Residual=(lambda *_: dpm.Residual(dpm.Softsign(), dpm.Dense(2, 2)), lambda x, e, a, w: x + softsign(x) @ w[0]["W"] + w[0]["b"]),
    Beside=(lambda *_: dpm.Beside(dpm.Dense(2, 3), dpm.Softsign(), dpm.Identity()), lambda x, e, a, w: side(
        [x @ w[0]["W"] + w[0]["b"], softsign(x), x])),
    Sum=(lambda *_: dpm.Sum(dpm.Dense(2, 3), dpm.Conv3x3(2, 3), dpm.Waves((0,))) if False else dpm.Sum(dpm.Dense(2, 3), dpm.Sequential(dpm.Softsign(), dpm.Conv3x3(2, 3))),
         lambda x, e, a, w: x @ w[0]["W"] + w[0]["b"] + convolved(softsign(x), w[1]["W"])))


def hold_to_quotients(network, shape):
    """Weights, input and noise level of a network against difference quotients, along directions of
    their own; returns what the forward pass made of what."""
    layers, r = network.with_weights(), rng(11)
    theta = 0.3 * r.standard_normal(sum(math.prod(s) for l in layers for s in l.shapes.values()))
    grad = np.zeros_like(theta)
    W, dW = dpm.views(layers, theta), dpm.views(layers, grad)
    tape, x = dpm.Tape(np, W, dW), r.standard_normal((3, *shape))
    level, s = 3 * r.standard_normal(3), r.random(3) + 0.1
    y = network.forward(x, level, s, tape)
    e, dy = tape.e, r.standard_normal(y.shape)
    kept = [a.copy() for a in (x, y, dy)]
    loss = lambda: float((network.forward(x, level, s, tape) * dy).sum())
    network.backward(dy, tape)
    loss()
    dx = network.backward(dy, tape)  # gradients of weights are added to, those of x are not
    assert all((a == b).all() for a, b in zip((x, y, dy), kept)) and not tape.saved
    pairs = [(W[l][name], dW[l][name] / 2) for l in layers for name in l.shapes]
    pairs += [(x, dx), (level, tape.dlevel)]
    if isinstance(network.readout, dpm.PaperKernel):
        pairs.append((s, tape.ds))
    for a, da in pairs:
        d = steep(da, 12)
        assert (da * d).sum() == pytest.approx(quotient(loss, a, d), rel=1e-6, abs=1e-7)
    return x, e, level, y, [W[l] for l in layers]


@pytest.mark.parametrize("shape", [(5, 7, 2), (1, 1, 2)])
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, shape):
    """What the docstring says, and its backward."""
    make, formula = LAYERS[name]
    network = dpm.Network(make(*shape[:2]), dpm.LogOdds(), dpm.Dense(64, 3), dpm.Rectifier())
    x, e, level, y, weights = hold_to_quotients(network, shape)
    np.testing.assert_allclose(y, formula(x, e, level, weights[1:]), rtol=1e-9, atol=1e-12)
    z = level[:, None] * np.exp(np.linspace(0, 5, 32)) / 40                             # Phases
    e_again = side([np.sin(z), np.cos(z)]) @ weights[0]["W"] + weights[0]["b"]
    np.testing.assert_allclose(e, (e_again + np.sqrt(e_again ** 2 + 1)) / 2, rtol=1e-9)


@pytest.mark.parametrize("readout", ["v", "eps", "paper"])
@pytest.mark.parametrize("name, shape", NETWORKS + [
    ("unet", (4, 4, 1)), ("unet", (1, 1, 1)), ("mlp", (1, 1, 1)), ("paper", (1, 1, 3)), ("paper", (1, 7, 1))])
def test_networks(name, shape, readout):
    """The backward of three networks and three readouts, for odd sides, one pixel and two colours."""
    sizes = SIZES[name] | (dict(pixels=math.prod(shape[:2])) if name == "paper" else {})
    network = dpm.NETWORKS[name](shape[2], dpm.READOUTS[readout](), 2, **sizes)
    assert hold_to_quotients(network, shape)[3].shape == (3, *shape[:2], 2 * shape[2])


def test_readouts():
    """v; eps, of which v = (eps - sin phi x_t) / cos phi; and the paper's kernel, eqs. 64 and 65: for the
    same function the same p. Channel by channel: two colours, one pixel."""
    q, t = gaussian(15), np.arange(2, 16)
    x0, eps, log_u, z_mu = rng(2).standard_normal((4, 14, 2))
    xt = q.q_jump(x0, t).draw(eps)
    tape = dpm.Tape(np, {}, {})
    tape.level, tape.s = q.level[t], q.s[t]
    said = lambda readout, *z: q.p_back(xt, t, readout.forward(
        np.stack(z, 2).reshape(14, 1, 1, 4), xt.reshape(14, 1, 1, 2), tape).reshape(14, 2, 2))
    p = said(dpm.Velocity(), q.velocity(x0, xt, t), log_u)
    np.testing.assert_allclose(p.mean, q.q_back(x0, xt, t).mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(p.variance, (q.beta_tilde * (1 + q.c * np.exp(log_u).T[..., None])).T[0].T if False else
                               q.beta_tilde[t][:, None] * (1 + q.c[t][:, None] * np.exp(log_u)))
    same = said(dpm.Epsilon(), eps, log_u)
    np.testing.assert_allclose(same.mean, p.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(same.variance, p.variance, rtol=1e-12)
    f = said(dpm.PaperKernel(), z_mu, log_u)
    sigma = 1 / (1 + np.exp(-log_u) * (1 - q.beta[t][:, None]) / q.beta[t][:, None])
    np.testing.assert_allclose(f.variance, sigma, rtol=1e-8)
    np.testing.assert_allclose(f.mean, (xt - z_mu) * (1 - sigma) + z_mu, rtol=1e-7, atol=1e-12)


def test_unet_is_the_same_everywhere():
    """A picture moved by a cell gives the same, moved; a pixel is heard beyond its neighbours; noise
    is heard. The network of one size of picture serves another."""
    model = small_model(shape=(7, 9, 1), network="unet").resized(40, 40)
    x, t = np.zeros((2, 40, 40)), np.array([5, 5])
    x[0, 18:22, 18:22] = rng(8).standard_normal((4, 4))
    x[1] = np.roll(x[0], (2, -2), (0, 1))
    z = model.forward(x.reshape(2, -1), t).reshape(2, 40, 40, 2)
    inside = np.s_[14:-14, 14:-14]
    np.testing.assert_allclose(z[1][inside], np.roll(z[0], (2, -2), (0, 1))[inside], rtol=1e-9)
    far = z[0] - model.forward(0 * x.reshape(2, -1), t).reshape(2, 40, 40, 2)[0]
    assert (abs(far[12, 20]) > 1e-9).all() and not far[2, 20].any()
    assert (abs(z - model.forward(x.reshape(2, -1), t + 1).reshape(z.shape)) > 1e-6).all()
    with pytest.raises(dpm.InputError, match="4 x 5 pixels only"):
        small_model(shape=(5, 4, 2), network="paper").resized(40, 40)


def test_products_are_counted():
    model = small_model(gaussian(), (5, 7, 2), "unet", threads=1, stir=0)
    layer, tape = dpm.Dense(6, 3), model.tapes[0]
    tape.theta[layer], tape.flop = dict(W=np.ones((6, 3)), b=np.zeros(3)), 0
    layer.forward(np.ones((4, 5, 7, 6)), tape)
    assert tape.flop == 2 * 4 * 35 * 6 * 3


def test_initial_weights():
    """Normal with variance gain^2 / inputs; gain 0 and b are zero; the seed decides."""
    layers = [dpm.Dense(400, 300), dpm.Conv3x3(20, 50), dpm.Dense(30, 40, gain=0)]
    make = lambda seed: dpm.initial_weights(layers, np, "float64", seed)
    W = dpm.views(layers, make(0))
    assert W[layers[0]]["W"].var() * 400 == pytest.approx(1, rel=0.02)
    assert W[layers[1]]["W"].var() * 180 == pytest.approx(1, rel=0.05)
    assert not W[layers[2]]["W"].any() and not W[layers[0]]["b"].any()
    assert (make(0) == make(0)).all() and not np.intersect1d(make(0), make(1)).any()


def test_adam():
    """The published update, over several chunks, with a gradient that changes and is shortened; then
    a constant gradient, for which every step is rate * sign(g); warm-up, decay and average."""
    size, r = 80_000, rng(31)
    theta = r.standard_normal(size)
    adam, m, v, expected = dpm.Adam(theta, lr=0.01, steps=10 ** 9, warmup=1), 0, 0, theta.copy()
    for step in range(1, 4):
        g = r.standard_normal(size) * step
        assert adam.update(g) == pytest.approx(np.linalg.norm(g))
        g /= np.linalg.norm(g)
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g ** 2
        expected -= 0.01 * (m / (1 - 0.9 ** step)) / (np.sqrt(v / (1 - 0.99 ** step)) + 1e-8)
    np.testing.assert_allclose(theta, expected, rtol=1e-9)
    theta, average, expected = np.zeros(3), np.zeros(3), 0.0
    adam = dpm.Adam(theta, lr=0.1, steps=10 ** 9, warmup=4)
    for step in range(1, 8):
        expected -= 0.1 * min(1, step / 4)
        adam.update(np.array([0.5, -0.25, 0.0]))
        np.testing.assert_allclose(theta, [expected, -expected, 0], rtol=1e-6)
        average += 1 / (10 + step / 10) * (theta - average)
        np.testing.assert_allclose(adam.average, average, rtol=1e-9)
    adam = dpm.Adam(theta, lr=0.1, steps=100, warmup=10)
    for adam.step, rate in [(5, 0.05), (10, 0.1), (50, 0.1), (75, 0.05), (100, 0)]:
        assert adam.rate() == pytest.approx(rate, abs=1e-12)
    adam.step, adam.average[...] = 10 ** 6, 0
    adam.update(np.zeros(3))
    np.testing.assert_allclose(adam.average, 1e-3 * theta, rtol=1e-9)  # never further back than 1000


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
    np.testing.assert_allclose(scale, scale[0, 0], rtol=1e-6)
    assert error.sum() == pytest.approx(q.c[2:].sum() / 2)  # K's own weight of e^2, where u is small
    dz = q.kl(x0, xt, t, z, error)[1]
    for noise in (0.0, 1.0):  # both signs of the noise have the mean of all noise
        slope = sum(quotient(lambda: definition(s * noise), z[..., 0], direction) for s in (-1, 1)) / 2
        np.testing.assert_allclose(scale * slope, dz[..., 0] * direction, rtol=1e-5, atol=1e-6)
    c, exact = q.c[t][:, None], np.stack([z[..., 0] - e, z[..., 1]], 2)  # and K's weight of e^2
    found = q.kl(x0, xt, t, z)[0] - q.kl(x0, xt, t, exact)[0]
    np.testing.assert_allclose(found, (c / (1 + c * z[..., 1]) / 2 * e ** 2).sum(1), rtol=1e-7)


def test_focused_weighs_what_decides_the_picture():
    """11 times as much where log noise over signal is 1, e^-0.5 of this a deviation of 2 away."""
    q = gaussian(1000)
    share, weight, error = dpm.objective("focused", q)
    K = dpm.objective("K", q)
    assert error is None and K[2] is None and (K[0] == (np.arange(1001) > 1)).all() and (K[1] == K[0]).all()
    assert weight.mean() * 1001 == pytest.approx(999) and np.allclose(weight[2:] / share[2:], weight[2] / share[2])
    at = lambda level: share[abs(q.level - level).argmin()]
    assert (at(1), at(-1), at(3)) == pytest.approx((11, 1 + 10 * math.exp(-0.5), 1 + 10 * math.exp(-0.5)), rel=1e-2)
    assert share[2] == pytest.approx(1, rel=0.3) and share[:2].max() == 0
    share, weight, _ = dpm.objective("K", gaussian(20, half=0.1, ends=(-1, 1)))
    assert share[1] == pytest.approx(0.05 * share[2:].sum()) and weight[1] == 1  # the decoder's t = 1


def written(q, x0, xt, t, z, error, v=None):
    """An example's loss, (n,), from the distributions; with an error, (v - v*)^2 weighed by it, and the
    KL of u alone, with v as it was."""
    if isinstance(q, dpm.Binomial):
        b, f = q.q_back(x0, xt, t).one, q.p_back(xt, t, z).one
        return (b * np.log(b / f) + (1 - b) * np.log((1 - b) / (1 - f))).sum(1)
    first, t, v_z = t == 1, np.maximum(t, 2), z[..., 0]
    u = {"learned": z[..., 1], "beta": 1.0, "posterior": 0.0}[q.variance]
    at = lambda a: a[t][:, None]
    x0_z = at(q.cos) * xt - at(q.sin) * (v_z if v is None else v)
    f_mu, f_sigma, mu = q.q_back(x0_z, xt, t).mean, at(q.beta_tilde) * (1 + at(q.c) * u), q.q_back(x0, xt, t)
    kl = np.log(f_sigma / mu.variance) + (mu.variance + (f_mu - mu.mean) ** 2) / f_sigma - 1
    loss = kl.sum(1) / 2
    if error is not None:
        loss = loss + error[t] * ((v_z - q.velocity(x0, xt, t)) ** 2).sum(1)
    if q.discretised:
        p, open_ = q.p_x0(xt, np.ones(len(t), int), z), np.where(abs(x0) > 0.7, np.inf, q.half)
        b, a = (ndtr((x0 + s * np.where(s * x0 > 0, open_, q.half) - p.mean) / np.sqrt(p.variance)) for s in (1, -1))
        loss = np.where(first, -np.log(b - a).sum(1), loss)
    return loss


BYTES = dict(half=0.25, ends=[-0.75, 0.75])


@pytest.mark.parametrize("network, shape", NETWORKS)
@pytest.mark.parametrize("kind, options", [
    ("K", dict(predict="v")), ("K", dict(predict="eps")), ("K", dict(predict="paper")), ("K", dict(variance="beta")),
    ("K", dict(variance="posterior")), ("focused", {}), ("simple", {}), ("simple", dict(predict="eps", variance="beta")),
    ("mean", {}), ("mean", dict(predict="paper")), ("K", BYTES), ("simple", dict(predict="eps", **BYTES)), ("K", None), ("focused", None),
    ("K", dict(learned=True)), ("K", dict(learned=True, predict="eps")), ("K", dict(learned=True, predict="paper")),
    ("K", dict(learned=True, variance="beta"))])
def test_gradient_of_every_objective(network, shape, kind, options):
    """DPM.gradient against difference quotients of what it estimates, written out for the t and the
    noise that it drew; options None are bits; of a learned schedule every psi."""
    predict, learned = ((options or {}).get(name, missing) for name, missing in (("predict", "v"), ("learned", False)))
    q = binomial() if options is None else gaussian(**{n: o for n, o in options.items() if n not in ("predict", "learned")})
    model = small_model(q, shape, network, predict=predict, learned=learned)
    x0, seen, loss_of = rng(5).standard_normal((23, model.D)), [], model._loss
    if isinstance(q, dpm.Binomial):
        x0 = (x0 > 0.3) * 1.0
    elif q.discretised:
        x0 = np.clip(np.round(x0 * 2 - 0.5) / 2 + 0.25, -0.75, 0.75)
    model._loss = lambda *a: (seen.append(a[:4]), loss_of(*a))[1]
    model._slices = lambda n: [slice(i, min(i + 5, n)) for i in range(0, n, 5)]  # the last one short

    def loss(v=None):
        seen.clear()
        model.follow_schedule()
        q = model.diffusion
        share, weight, error = dpm.objective(kind, q)
        t, _ = model.gradient(x0, 3, 4, tables=(share, weight, error))
        assert (t == 1).any() == q.discretised
        parts = [np.concatenate(a) for a in zip(*sorted(seen, key=lambda s: float(s[1][0, 0])))]
        each = written(q, *parts, error, v) * (weight / share)[parts[2]] * share.sum() / model.D
        total = each.mean() if not learned else each.mean() - (q.H_q(q.T, x0) - q.H_p(x0)).mean() / model.D
        return total, parts

    parts = loss()[1]
    grad = model.grad.copy()
    v = None if kind in ("K", "focused") else parts[3][..., 0]
    directions = [steep(grad, 6, i) for i in range(2)]
    if learned:
        psi = dpm.views(model.layers, grad)[model.learned]["psi"]
        assert len(psi) == 12 and (abs(psi) > 1e-7).all()
        begin = len(grad) - 12
        directions += list(np.eye(len(grad))[begin:])
    for d in directions:
        assert grad @ d == pytest.approx(quotient(lambda: loss(v)[0], model.theta, d, 1e-5), rel=1e-6, abs=1e-8)


def test_stratified_is_even_and_never_leaves_its_range():
    for number, T in [(7, 40), (256, 1000), (1000, 3), (5, 2)]:
        for u in (0.0, 0.3, 1 - 2 ** -53):
            t = dpm.stratified(number, np.arange(T + 1) > 1, u)
            assert t.min() >= 2 and t.max() <= T and len(t) == number
            if number >= T - 1:
                counts = np.bincount(t, minlength=T + 1)[2:]
                assert np.ptp(counts) <= (1 if u < 0.9 else 2)  # i + u rounds to i + 1
    share = np.concatenate([[0, 0], np.linspace(3, 1, 39)])
    many = np.concatenate([dpm.stratified(5, share, u) for u in (np.arange(4000) + 0.5) / 4000])
    np.testing.assert_allclose(np.bincount(many) / len(many), share / share.sum(), atol=3e-4)


@pytest.mark.parametrize("kind", ["K", "focused", "simple"])
def test_stratified_estimate_is_the_sum_over_all_t(kind):
    """gradient() and bound(draws=...) estimate the sum of the KLs, however t is drawn; closely enough
    to tell T - 1 terms from T."""
    model = small_model(stir=0.1)
    x0, tables = np.repeat(rng(15).standard_normal((1, 3)), 2000, 0), dpm.objective(kind, model.diffusion)
    se = lambda values: np.std(values, ddof=1) / math.sqrt(len(values))
    exact = [model.bound(x0, rng(16, i))["kl"].sum() for i in range(3)]
    for estimates in ([model.gradient(x0, 17, i, tables=tables)[1].mean() for i in range(16)],
                      [model.bound(x0, rng(18, i), draws=2)["kl"].sum() for i in range(16)]):
        tolerance = 4 * math.hypot(se(estimates), se(exact))
        assert abs(np.mean(estimates) - np.mean(exact)) < tolerance < np.mean(exact) / 11 / 2


# The bound

def linear(x, a, variance):
    """E[x_0 | x_t] and Var[x_0 | x_t] of N(0, variance I)."""
    total = a * variance + 1 - a
    return np.sqrt(a) * variance / total * x, np.broadcast_to(variance * (1 - a) / total, x.shape)


def gaussian_model(variance=4.0, T=50, D=1):
    q = dpm.Gaussian(np.concatenate([[1], np.cumprod(1 - np.linspace(1e-3, 0.2, T))]))
    return dpm.DPM(q, dpm.IdealNetwork(lambda x, a: linear(x, a, variance)), (1, 1, D), threads=1)


@pytest.mark.parametrize("variance, known", [(1.0, -1.41893853), (0.3, -0.81969703), (4.0, -2.10499687)])
def test_K_star_of_gaussian_data(variance, known):
    """K* = -H_q(X_1) + H_q(X_T) - H_p(X_T) for exact kernels, by the function that evaluates trained
    models; below L whatever the second moment is (`known` is with the paper's constant H_p, which
    holds for 1). Every KL is a quadratic of (x_0, eps): four points give its expectation."""
    model, s = gaussian_model(variance), math.sqrt(variance)
    q = model.diffusion
    four = np.array([[-s], [-s], [s], [s]]), Signs(np.array([[-1.0], [1.0], [-1.0], [1.0]]))
    found = model.bound(*four)
    H, at = lambda v: 0.5 * math.log(2 * math.pi * math.e * v), lambda t: q.alpha_bar[t] * variance + 1 - q.alpha_bar[t]
    over = (variance - 1) / 2 * (q.alpha_bar[50] + q.beta[1])
    assert -H(at(1)) + H(at(50)) - H(1) == pytest.approx(known, abs=1e-8)
    assert found["K"] == pytest.approx(known - over, abs=1e-8)
    assert found["K"] < -H(variance) - (1e-12 if variance != 1 else -1e-6)
    t = np.arange(2, 51)
    distortion = variance * (1 - q.alpha_bar[t]) / at(t)
    np.testing.assert_allclose(found["distortion"][2:], distortion, rtol=1e-9)
    exact = H(at(t - 1) - (1 - q.beta[t]) * at(t - 1) ** 2 / at(t)) if False else [H(at(s - 1) - (1 - q.beta[s]) * at(s - 1) ** 2 / at(s)) for s in t]
    np.testing.assert_allclose(found["entropy"][2:], exact, rtol=1e-9)
    cosine = dpm.DPM(gaussian(50, 1e-3, "cosine"), model.network, (1, 1, 1))  # still remembers at T
    assert cosine.bound(*four)["K"] < -H(variance) - (1e-12 if variance != 1 else -1e-6)


@pytest.mark.parametrize("network, shape", NETWORKS)
@pytest.mark.parametrize("kind", ["logsnr", "paper", "linear", "cosine"])
def test_at_initialisation_K_is_L_null(kind, network, shape):
    """With z = 0, p is the equilibrium kernel, whose trajectories are reversible: K of every example is
    its log likelihood under pi, whatever its size."""
    model = small_model(gaussian(25, 1e-3, kind), shape, network, stir=0)
    x0 = rng(9).standard_normal((6, model.D)) * np.array([0.5, 0.5, 1, 1, 2, 2])[:, None]
    signs = np.sign(rng(10).standard_normal(x0.shape))
    found = model.bound(np.concatenate([x0, x0]), Signs(np.concatenate([signs, -signs])))
    each = (found["K_each"][:6] + found["K_each"][6:]) / 2
    np.testing.assert_allclose(each, -0.5 * (x0 ** 2 + math.log(2 * math.pi)).sum(1), rtol=1e-9)
    assert found["K_minus_L_null"] == pytest.approx(0, abs=1e-8)
    assert found["L_null"] == pytest.approx(each.mean())


@pytest.mark.parametrize("q", [gaussian(9), gaussian(9, variance="beta"), gaussian(9, variance="posterior"), binomial(9), gaussian(9, **BYTES)])
def test_parts_sum_to_K(q):
    """One KL for each of t = 2..T, the three entropies once each, or L_T and L_0; K_each and K are
    the same numbers summed in two orders."""
    model, x0 = small_model(q), (rng(12).random((40, 3)) < 0.4) * (0.5 if q.discretised else 1.0) + (0.25 if q.discretised else 0)
    for draws in (None, 3):
        found = model.bound(x0, rng(13), draws, batch=7)
        if q.discretised:
            K = -found["kl"].sum() - found["L_T"]
            assert found["L_T"] == pytest.approx(q.from_pi(9, x0).mean())
        else:
            K = -found["kl"].sum() + found["H_q_T"] - found["H_q_1"] - found["H_p_T"]
            assert (found["H_q_T"], found["H_q_1"], found["H_p_T"]) == pytest.approx(
                tuple(f.mean() for f in (q.H_q(9, x0), q.H_q(1, x0), q.H_p(x0))))
        assert found["K"] == pytest.approx(K, rel=1e-12)
        assert found["K"] == pytest.approx(found["K_each"].mean(), rel=1e-12)
        assert found["K_se"] == pytest.approx(found["K_each"].std(ddof=1) / math.sqrt(40))
        assert (found["kl"][:2] == 0).sum() == 2 - q.discretised and (found["kl"][2:] > 0).all()
        seen = np.isfinite(found["entropy"])
        assert (seen == np.isfinite(found["distortion"])).all() if not q.discretised else True
        assert (seen == (np.arange(10) > 1)).all()


def test_bound_does_not_depend_on_the_order_of_the_examples():
    """No example may be tied to one part of the t: small x_0 first, or large ones, K is the same."""
    model = small_model(gaussian(40), stir=0.1)
    x0 = rng(32).standard_normal((600, 3)) * np.linspace(0.1, 3, 600)[:, None]
    up, down = (np.array([model.bound(x, rng(33, i), draws=2)["K"] for i in range(12)]) for x in (x0, x0[::-1]))
    assert abs(up.mean() - down.mean()) < 4 * math.hypot(up.std(), down.std()) / math.sqrt(12)
    each = model.bound(x0, rng(34))
    assert up.mean() == pytest.approx(each["K"], abs=4 * (up.std() / math.sqrt(12) + each["K_se"] / 4))


def exact_parts(model, states, p0, forward):
    """Sum of the KLs and the entropies of the bound, each by enumeration of x_0 and x_t."""
    q, until, kls, H_q = model.diffusion, np.eye(len(states)), 0.0, [0.0]
    pairs = np.repeat(states, len(states), 0), np.tile(states, (len(states), 1))  # x_0, x_t
    for t in range(1, q.T + 1):
        until, at = forward[t] @ until, np.full(len(pairs[0]), t)
        joint = (until * p0).T.ravel()
        H_q.append(-(joint * np.log(until.T.ravel())).sum())
        assert q.H_q(t, states) @ p0 == pytest.approx(H_q[-1])
        kls += joint @ q.kl(*pairs, at, model.forward(pairs[1], at))[0] if t > 1 else 0
    return kls, H_q


@pytest.mark.parametrize("n, rate", [(1, 0.5), (3, 0.5), (4, 0.8), (3, None)])
def test_K_by_enumeration(n, rate):
    """K from KLs and entropies (eq. 14) is K over all trajectories, E_q of log p(x_T) + sum log
    p(x_{t-1} | x_t) - log q(x_t | x_{t-1}) (eq. 12), below the log likelihood whatever the rate of pi;
    where this is the mean of the data, H_p(X_T) is its entropy."""
    p0 = [0.25, 0.15, 0.05, 0.15, 0.2, 0.0, 0.1, 0.1] if rate is None else None
    model, states, p0, forward, reverse, pi = bits(n, rate=rate or 0.4, p0=p0)
    q, T = model.diffusion, model.T
    h = -3 * (0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    assert rate or q.H_p(states) @ p0 == pytest.approx(h)
    kls, H_q = exact_parts(model, states, p0, forward)
    K = -kls + H_q[-1] - H_q[1] - q.H_p(states) @ p0
    p_t, direct, likelihood = p0, 0.0, pi
    for t in range(1, T + 1):
        joint = forward[t] * p_t  # [x_t, x_{t-1}]
        direct += (joint * (np.log(reverse[t].T) - np.log(forward[t]))).sum()
        p_t = joint.sum(1)
        likelihood = reverse[T + 1 - t] @ likelihood
    direct += p_t @ np.log(pi)
    assert likelihood.sum() == pytest.approx(1) and K == pytest.approx(direct, rel=1e-10)
    assert K < p0 @ np.log(likelihood) < p0 @ np.log(p0 + 1e-300)
    x0 = states[np.repeat(np.arange(2 ** n), np.round(6000 * p0).astype(int))]
    found = model.bound(x0, rng(49))  # the function itself, by sampling
    assert found["K"] == pytest.approx(K, abs=4 * found["K_se"] + 1e-3) and found["K_se"] < 0.04
    m = q.mean
    assert found["L_null"] == pytest.approx(n * (m * math.log(m) + (1 - m) * math.log(1 - m)), abs=0.01)
    log_w = dpm.log_weights(model, states, 5000, rng(50))  # and log p(x_0) of every state
    estimate, few = dpm.log_likelihood(model, states, 5000, rng(50)), math.sqrt(5000)
    error = 5 * np.exp(log_w - estimate[:, None]).std() / few
    np.testing.assert_allclose(estimate, np.log(likelihood), atol=error)
    assert p0 @ log_w.mean(1) == pytest.approx(direct, abs=5 * log_w.std() / few) and error < 0.2


def test_binomial_at_initialisation_K_is_L_null():
    """With z = 0 trajectories are reversible: K is the log likelihood under pi, of any data."""
    for rate in (1 / 3, 0.2):
        model, states, p0, forward, _, pi = bits(rate=rate, size=0.0, p0=[0, 1, 1, 0, 1, 0, 0, 0])
        kls, H_q = exact_parts(model, states, p0, forward)
        K = -kls + H_q[-1] - H_q[1] - model.diffusion.H_p(states) @ p0
        assert K == pytest.approx(p0 @ np.log(pi), rel=1e-10)


def test_swissroll_K_star_and_truth():
    """L = -1.08 bits; K* at T = 40 is -1.31 with logsnr, -1.93 with the paper's schedule."""
    roll = data.load("swissroll")
    x0 = roll.held_out(500)
    truth = roll.truth.log_density(np.concatenate([x0, roll.held_out(2000, 1)])) / LN2
    assert truth.mean() == pytest.approx(-1.08, abs=4 * truth.std() / 50)
    for kind, K_star in [("logsnr", -1.31), ("paper", -1.93)]:
        q = gaussian(40, 0.004 ** 2, kind)
        found = dpm.DPM(q, dpm.IdealNetwork(roll.truth.moments), roll.shape).bound(x0, rng(19))
        # the same with far less noise: the best kernels' KLs are H(p_back) - H(q_back) in the mean
        kls = (found["entropy"] - dpm.entropy_bounds(q, x0)[0])[2:].sum()
        K = (q.H_q(40, x0) - q.H_q(1, x0) - q.H_p(x0)).mean() - kls
        assert K / LN2 == pytest.approx(K_star, abs=0.04)
        assert found["K"] == pytest.approx(K, abs=4 * found["K_se"])


@pytest.mark.parametrize("kind, rate, K_star", [("cosine", 0.5, -2.34), ("paper", 0.5, -2.84), ("paper", 0.2, -2.683)])
def test_heartbeat_K_star(kind, rate, K_star):
    """At T = 200; L = log2(1/5) = -2.322 bits. And its ideal model draws heartbeats, all phases alike."""
    beat = data.load("heartbeat")
    q = binomial(200, 1 / 200 if kind == "paper" else 1e-5, kind, rate, mean=0.2)
    model = dpm.DPM(q, dpm.IdealNetwork(lambda x, a: beat.truth.moments(x, a, rate)), beat.shape)
    x0 = beat.held_out(500)
    assert beat.truth.log_density(x0) / LN2 == pytest.approx(math.log2(1 / 5))
    found = model.bound(x0, rng(52))
    se = found["K_se"] / LN2
    assert found["K"] / LN2 == pytest.approx(K_star, abs=0.015 + 4 * se) and se < 0.025
    xt, at = q.q_jump(x0[:7], np.full(7, 90)).draw(rng(51).random((7, 20))), np.full(7, 90)
    phases = beat.truth.patterns  # the best kernel is q_back, averaged over the phases
    like = np.array([[dpm.Bernoulli(np, q.q_jump(p[None], at[:1]).one, q.q_jump(p[None], at[:1]).zero).log_density(x[None])[0] for p in phases] for x in xt])
    expected = sum(w[:, None] * q.q_back(p[None], xt, at).one for w, p in zip(softmax(like, 1).T, phases))
    np.testing.assert_allclose(model.p_back(xt, 90).one, expected, rtol=1e-7)
    if kind == "cosine":
        valid = (model.sample(300, seed=2, batch=300)[:, None] == phases).all(2)
        assert valid.any(1).mean() > 0.98 and np.abs(valid.mean(0) - 0.2).max() < 4 * math.sqrt(0.16 / 300)


# The discretised decoder

def test_a_decoder_of_few_grey_levels():
    """One pixel of four levels, all integrals on a grid: p(x_0 | x_1) sums to one, K is E_q of log p(x_T)
    + sum log p(x_{t-1} | x_t) / q(x_t | x_{t-1}), and below log p(x_0) for every level."""
    levels = np.array([-1.5, -0.5, 0.5, 1.5])
    model = small_model(gaussian(4, 0.1, half=0.5, ends=(-1.5, 1.5)), (1, 1, 1))
    q, x = model.diffusion, np.linspace(-8, 8, 501)[:, None]
    dx, rows = x[1, 0] - x[0, 0], np.arange(501)
    at = lambda t: np.full(501, t)
    decoded = -np.array([q.decode(np.full_like(x, l), x, model.forward(x, at(1)))[0] for l in levels])
    np.testing.assert_allclose(np.exp(decoded).sum(0), 1, rtol=1e-9)
    far = q.decode(levels[:, None], np.array([[60.0], [-60], [60], [-60]]), np.ones((4, 1, 2)))
    assert np.isfinite(far[0]).all() and np.isfinite(far[1]).all()
    density = lambda p: np.exp(-0.5 * (x[:, 0] - p.mean) ** 2 / p.variance) / np.sqrt(2 * np.pi * p.variance)
    P, log_ratio = np.exp(q.log_pi(x)), [None, None]
    for t in range(2, 5):
        log_ratio.append(np.log(density(model.p_back(x, t)) + 1e-300) - np.log(density(q.q_step(x, at(t))).T + 1e-300))
    for t in (4, 3, 2):
        P = P @ density(model.p_back(x, t)) * dx  # [x_t, x_{t-1}]
    P = np.exp(decoded) @ P * dx
    assert P.sum() == pytest.approx(1, rel=1e-4)
    found = model.bound(np.tile(levels, 1500)[:, None], rng(82))["K_each"].reshape(-1, 4)
    for i, l in enumerate(levels):
        jump = [None] + [density(q.q_jump(np.array([[l]]), np.array([t])))[0] for t in range(1, 5)]
        K = (jump[1] * (decoded[i] - np.log(jump[1]))).sum() * dx + (jump[4] * q.log_pi(x)).sum() * dx
        for t in range(2, 5):
            K += (density(q.q_step(x, at(t))).T * jump[t - 1] * log_ratio[t]).sum() * dx ** 2
        assert K < math.log(P[i])
        assert found[:, i].mean() == pytest.approx(K, abs=4 * found[:, i].std() / math.sqrt(1500))
        assert found[:, i].std() / math.sqrt(1500) < 0.05


def test_uniform_bytes_have_eight_bits():
    """No K of independent uniform bytes is above -log 256; that of the best kernels comes to it."""
    scale = math.sqrt((256 ** 2 - 1) / 12)
    levels = (np.arange(256) - 127.5) / scale
    best = dpm.IdealNetwork(data.Mixture(levels[:, None], 1e-9).moments)
    q = gaussian(60, 1e-3, half=0.5 / scale, ends=(levels[0], levels[-1]))
    for network, most in ((best, 8.1), (small_model(q, (1, 1, 1), stir=0).network, 20)):
        model = dpm.DPM(q, network, (1, 1, 1), dtype="float64")
        found = model.bound(np.repeat(levels, 8)[:, None], rng(83))
        bits_per_dim, se = -found["K"] / LN2, found["K_se"] / LN2
        assert 8 - 4 * se < bits_per_dim < most + 4 * se and se < 0.06
    assert bits_per_dim > 8.15  # the equilibrium kernel's


# Samples

def test_samples_have_the_variance_of_their_kernels():
    """Linear kernels make every x_t Gaussian; its variance follows from a recursion, down to the fixed
    last step. Twenty independent coordinates are as many samples."""
    model, variance, one = gaussian_model(D=20), 1.0, np.ones((1, 20))
    for t in range(50, 0, -1):
        p = model.p_back(one, t)
        variance = float(p.mean[0, 0] ** 2 * variance + p.variance[0, 0])
    x, kept = model.sample(1000, seed=1, batch=600, keep=(1, 50))
    assert x.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / 20_000))
    assert variance == pytest.approx(4, rel=0.01)
    assert abs(x.mean()) < 5 * math.sqrt(variance / 20_000)
    assert (x ** 4).mean() / x.var() ** 2 == pytest.approx(3, abs=5 * math.sqrt(96 / 20_000))  # normal noise
    assert kept[50].var() == pytest.approx(1, rel=0.05)
    beta = model.diffusion.beta[1]  # x_0 is x_1 with the noise of the fixed step
    assert ((x - np.sqrt(1 - beta) * kept[1]) / np.sqrt(beta)).var() == pytest.approx(1, rel=0.05)


def test_sample_k_is_the_same_in_any_batch():
    model = small_model(stir=0.05)
    x = model.sample(7, seed=3)
    np.testing.assert_allclose(model.sample(3, seed=3), x[:3], rtol=1e-9)
    np.testing.assert_allclose(model.sample(7, seed=3, batch=2), x, rtol=1e-9)
    single = small_model(stir=0.05, dtype="float32")
    np.testing.assert_allclose(single.sample(7, seed=3, batch=2), single.sample(7, seed=3), rtol=1e-3)
    assert np.abs(model.sample(7, seed=4) - x).min() > 1e-6 and len(np.unique(x.round(6))) == 21
    np.testing.assert_allclose(model.normal(model.raw(x)), x)
    np.testing.assert_allclose(model.raw(x), 2 * x + 0.5)
    a, b = (dpm.generator(np, *key).random(4) for key in (("noise", 1, 2), ("sample", 1, 2)))
    assert (a != b).all() and (a == dpm.generator(np, "noise", 1, 2).random(4)).all()


@pytest.mark.parametrize("make", [gaussian, binomial])
def test_a_shortened_chain_is_a_diffusion(make):
    """S of T steps, through T and 1: K, samples and options are those of a diffusion built from that
    part of alpha_bar; T of T steps are the same chain."""
    q = make(40, kind="logsnr")
    model = small_model(q)
    times = [0, 1, 11, 20, 30, 40]
    direct = type(q)(q.alpha_bar[times], **({} if make is gaussian else dict(rate=0.3)))
    other = dpm.DPM(direct, model.network, model.shape, dtype="float64", theta=model.theta, threads=2)
    x0 = (rng(84).standard_normal((9, 3)) > 0) * 1.0
    short = model.shortened(5)
    assert short.T == 5 and short.bound(x0, rng(85))["K"] == other.bound(x0, rng(85))["K"]
    assert (model.sample(4, steps=5) == other.sample(4)).all()
    assert (model.sample(4, steps=40) == model.sample(4)).all() and model.T == 40
    assert make(40, rate=0.25).shortened(9).rate == 0.25 if make is binomial else \
        make(40, variance="beta").shortened(9).variance == "beta"
    for S in (1, 41):
        with pytest.raises(dpm.InputError, match="2..40 steps"):
            model.shortened(S)


def test_steps_with_less_noise():
    """DDIM eqs. 12 and 16: eta = 1 is p(x_{t-1} | x_t), eta = 0 is deterministic, and with exact kernels
    and many steps it turns x_T into x_0 as their distributions demand."""
    q, t = gaussian(15, variance="posterior"), np.arange(2, 16)
    xt, z = rng(86).standard_normal((14, 3)), abs(rng(87).standard_normal((14, 3, 2)))
    a, s = q.alpha_bar[t][:, None], q.alpha_bar[t - 1][:, None]
    x0 = q.p_x0(xt, t, z).mean
    eps = (xt - np.sqrt(a) * x0) / np.sqrt(1 - a)
    for eta in (0.0, 0.4, 1.0):
        sigma = eta * np.sqrt((1 - s) / (1 - a)) * np.sqrt(1 - a / s)  # eq. 16
        p = q.p_back(xt, t, z, eta)
        np.testing.assert_allclose(p.mean, np.sqrt(s) * x0 + np.sqrt(1 - s - sigma ** 2) * eps, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(p.variance, np.broadcast_to(sigma ** 2, x0.shape), rtol=1e-9)
    np.testing.assert_allclose(p.mean, q.q_back(x0, xt, t).mean, rtol=1e-9, atol=1e-12)
    learned = gaussian(15)
    np.testing.assert_allclose(learned.p_back(xt, t, z, 0.4).variance, 0.16 * learned.p_back(xt, t, z).variance)
    model = dpm.DPM(gaussian(400, 1e-4), gaussian_model().network, (1, 1, 1))  # data of variance 4
    x, kept = model.sample(5, eta=0.0, keep=(400,))
    np.testing.assert_allclose(x, 2 * kept[400], rtol=0.02)
    with pytest.raises(dpm.InputError, match="eta lies"):
        model.sample(2, eta=1.5)
    with pytest.raises(dpm.InputError, match="bits has no path"):
        bits()[0].sample(2, eta=0.0)


class Rank:
    """One of two processes, in a thread: what dpm.Ranks is by MPI."""

    size, parts, barrier = 2, [None, None], threading.Barrier(2)

    def __init__(self, rank):
        self.rank = rank

    def sum(self, a):
        self.parts[self.rank] = a.copy()
        self.barrier.wait()
        total = self.parts[0] + self.parts[1]
        self.barrier.wait()
        return total


def test_two_ranks_are_two_threads():
    """The same gradient and the same samples, to the last bit: shares are shares, wherever they are."""
    x0 = rng(88).standard_normal((9, 3))
    one, two = small_model(threads=2), [small_model(threads=1, comm=Rank(rank)) for rank in (0, 1)]
    t, parts = one.gradient(x0, 5)
    with dpm.ThreadPoolExecutor(2) as pool:
        for model, (t_r, parts_r) in zip(two, pool.map(lambda model: model.gradient(x0, 5), two)):
            assert (model.grad == one.grad).all() and (t_r == t).all() and (parts_r == parts).all()
        for x in pool.map(lambda model: model.sample(5, batch=2), two):
            np.testing.assert_allclose(x, one.sample(5), rtol=1e-9)


def test_frechet():
    """The closed form for Gaussians of these means and covariances; 0 for the same; only the leading
    components of x are compared."""
    x = rng(91).standard_normal((500, 6)) * [5, 4, 3, 0.02, 0.02, 0.01]
    A, m = rng(92).standard_normal((3, 3)), np.array([1.0, -2, 3])
    y = np.concatenate([x[:, :3] @ A + m, 50 * x[:, 3:]], 1)
    C_x, C_y = np.cov(x[:, :3].T), np.cov(y[:, :3].T)
    w, V = np.linalg.eigh(C_x)
    root = V * np.sqrt(w) @ V.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ C_y @ root)).sum()
    gap = ((y.mean(0) - x.mean(0))[:3] ** 2).sum()
    assert dpm.frechet(x, y, 3) == pytest.approx(gap + np.trace(C_x) + np.trace(C_y) - 2 * cross, rel=1e-3)
    assert dpm.frechet(x, x[::-1]) == pytest.approx(0, abs=1e-9)


# ------------------------------------------------------------------------------------------------
# 4. More theory
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("variance", [1e-12, 0.3, 1.0])
def test_entropy_bounds_of_gaussian_data(variance):
    """Eq. 24 for N(0, variance I) in three dimensions, whose H_q(X_{t-1} | X_t) is in closed form; tight
    at 0 below, at 1 above."""
    q, t = gaussian_model(D=3).diffusion, np.arange(2, 51)
    lower, upper = (bound[2:] for bound in dpm.entropy_bounds(q, np.zeros((4, 3))))
    at = lambda t: q.alpha_bar[t] * variance + 1 - q.alpha_bar[t]
    exact = 1.5 * np.log(2 * np.pi * np.e * (at(t - 1) - (1 - q.beta[t]) * at(t - 1) ** 2 / at(t)))
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
        H = model.diffusion.H_step(t, states) @ p0
        assert H == pytest.approx(-(joint * np.log(forward[t])).sum())
        if t > 1:
            assert lower[t] - 1e-3 <= exact <= upper[t] + 1e-3
            assert (abs(exact - lower[t]) < 1e-9) == (p0.max() == 1)
            assert (abs(exact - upper[t]) < 1e-9) == (p0.max() == 1 / 8)


def test_log_likelihood_of_linear_kernels():
    """With linear Gaussian kernels p(x_0) is a Gaussian in closed form. The estimate rises to it from
    below, its weights average to it without bias, and one trajectory gives K in the mean."""
    model, variance, one = gaussian_model(0.3, T=10), 1.0, np.ones((1, 1))
    for t in range(10, 0, -1):
        p = model.p_back(one, t)
        variance = float(p.mean[0, 0] ** 2 * variance + p.variance[0, 0])
    x0 = math.sqrt(0.3) * np.array([[0.1], [-1.0], [2.0]])
    exact = -0.5 * (x0[:, 0] ** 2 / variance + math.log(2 * math.pi * variance))
    log_w = dpm.log_weights(model, x0, 40_000, rng(55), batch=77_777)
    w = np.exp(log_w - exact[:, None])
    np.testing.assert_allclose(w.mean(1), 1, atol=5 * (w.std(1) / 200).max())
    assert (w.std(1) / 200).max() < 0.02
    few = dpm.log_weights(model, x0, 50, rng(55))
    np.testing.assert_allclose(dpm.log_likelihood(model, x0, 50, rng(55)), np.log(np.exp(few).mean(1)))
    means = [np.log(np.exp(log_w.reshape(3, -1, S)).mean(2)).mean(1) for S in (1, 4, 16, 400)]
    assert all((fewer < more).all() for fewer, more in zip(means, means[1:]))
    assert (means[-1] < exact + 0.01).all()
    model.network.moments = data.Mixture([[0.5]], 0.7).moments  # not the exact kernel: K is not L
    x0 = np.tile([[-1.0], [1.0]], (10_000, 1))
    log_w, found = dpm.log_weights(model, x0, 1, rng(57)), model.bound(x0, rng(58))
    error = log_w.std() / math.sqrt(20_000) + found["K_se"]
    assert log_w.mean() == pytest.approx(found["K"], abs=4 * error)
    assert found["K"] < found["L_null"] - 10 * error


@pytest.mark.parametrize("T", [2, 7, 1000])
def test_learned_schedule(T):
    """Whatever psi is, 0 < beta < 1 and alpha_bar falls from 1 - beta_1; at 0 it is linear in logit;
    smooth in t; and a model trained on K moves it up K."""
    schedule = dpm.LearnedSchedule(T, 1e-8)
    size, = schedule.shapes["psi"]
    logit = lambda a: np.log((1 - a[1:]) / a[1:])
    line = np.linspace(np.log(1e-8 / (1 - 1e-8)), 6, T)
    np.testing.assert_allclose(logit(schedule.forward(np.zeros(size))), line, rtol=1e-7)
    for spread in (1, 100, 1e30):
        for i in range(5):
            a = schedule.forward(spread * rng(40, i).standard_normal(size))
            beta = 1 - a[1:] / a[:-1]
            assert beta[0] == pytest.approx(1e-8) and (beta > 0).all() and (beta < 1).all() and a[0] == 1
            if T == 1000:  # 999 steps between 40 knots within 12 of one another
                rise = np.log(schedule._parts(spread * rng(40, i).standard_normal(size))[0])
                assert np.abs(np.diff(rise)).max() < 12 / (998 / 39) + 1e-9


@pytest.mark.parametrize("T", [2, 7, 60])
def test_learned_schedule_backward(T):
    schedule = dpm.LearnedSchedule(T, 1e-3)
    psi, r = rng(41).standard_normal(schedule.shapes["psi"]), rng(42).standard_normal(T + 1)
    loss = lambda: float(r[2:] @ np.log(1 / schedule.forward(psi)[2:] - 1))
    for i, d in enumerate(np.eye(len(psi))):
        expected = quotient(loss, psi, d, h=1e-5)
        assert schedule.backward(psi, r)[i] == pytest.approx(expected, rel=1e-6, abs=1e-7)


def test_a_schedule_is_learned():
    """A few hundred steps on data near one point: K rises, and the diffusion is that of the weights."""
    model = small_model(gaussian(6, 1e-3), stir=0, learned=True)
    before, draw = model.diffusion.alpha_bar, lambda i: 0.3 * rng(93, i).standard_normal((64, 3)) + 1
    adam, x0 = dpm.Adam(model.theta, lr=0.01, steps=300, warmup=20), draw(10 ** 6)
    K = model.bound(x0, rng(94))["K"]
    for i in range(300):
        model.gradient(draw(i), 1, i)
        model.step(adam)
    learned = model.learned.forward(model.weights[model.learned]["psi"])
    assert (model.diffusion.alpha_bar == learned).all() and learned[1] == before[1]
    assert abs(np.log(learned / before)).max() > 0.1 and model.bound(x0, rng(94))["K"] > K + 1


# ------------------------------------------------------------------------------------------------
# 5. Posteriors
# ------------------------------------------------------------------------------------------------

def test_observation():
    """log r and its powers, the same for bits, where a known bit rules the other out."""
    o, q, b = dpm.Observation([0.7, 1.0, 5.0], [0.8, 0.0, np.inf]), gaussian(), binomial()
    x = np.array([[0.2, 1.0, 3.0], [1.0, 1.0, -1.0]])
    expected = -(x[:, 0] - 0.7) ** 2 / 2 / 0.64
    for power in (1.0, 0.4, 0.0):
        np.testing.assert_allclose(o.log_r(q, x, power), power * expected)
        bit = o.log_r(b, np.array([[0, 1, 0], [1, 1, 1.0]]), power)
        np.testing.assert_allclose(np.diff(bit), power * (0.7 ** 2 - 0.3 ** 2) / 2 / 0.64)
    assert o.log_r(b, np.array([[0, 0, 0.0]])) == -np.inf
    assert (o.factors(q, 0.0)[1] == np.inf).all() and o.factors(q, 0.5)[1][:2] == pytest.approx([1.28, 0])
    r = dpm.Posterior(small_model(), o, "annealed")
    np.testing.assert_allclose(r._log_r(x, 3), 0.75 * expected)  # r^((T - t) / T), T = 12
    np.testing.assert_allclose(dpm.Posterior(small_model(), o, "constant")._log_r(x, 3), expected)


CURVE = dpm.Function(lambda x: np.sin(x) @ np.arange(x.shape[1]), lambda x: np.cos(x) * np.arange(x.shape[1]))


@pytest.mark.parametrize("make, network, shape, predict", [
    (gaussian, *NETWORKS[0], "v"), (gaussian, *NETWORKS[1], "eps"), (gaussian, *NETWORKS[2], "paper"),
    (lambda: gaussian(variance="beta"), *NETWORKS[1], "v"), (lambda: gaussian(variance="posterior"), *NETWORKS[0], "v"),
    (binomial, "mlp", (1, 1, 4), "v"), (binomial, "unet", (5, 6, 1), "v"), (binomial, "paper", (5, 4, 1), "v")])
def test_r_of_what_a_network_predicts(make, network, shape, predict):
    """log r_t(x_t) = log E r(x_0), x_0 as p_x0 has it, coordinates independent, for an Observation; log r at
    the mean for a Function; and g is its slope along any line, in the mean, through the network, times
    what `guided` says. Between the bits the log odds are linear in x_t."""
    model = small_model(make(), shape, network, predict=predict)
    q, D, bit = model.diffusion, model.D, isinstance(model.diffusion, dpm.Binomial)
    model._slices = lambda n: [slice(i, min(i + 2, n)) for i in range(0, n, 2)]
    (x, y), sigma = rng(69).random((2, 5, D)), np.array([0.0, 0.4, np.inf])[np.arange(D) % 3]
    x, y = (np.round(x), np.round(y)) if bit else (4 * x - 2, 4 * y - 2)
    posterior = dpm.Posterior(model, [dpm.Observation(y, sigma), CURVE])

    def log_r(x, t, variance=None):
        z, rows = model.forward(x, np.full(5, t)), np.full(5, t)
        if bit:
            odds = [q._log_odds(b + 0 * x, rows) for b in (0, 1)]
            mean = 1 / (1 + np.exp(-odds[0] - x * (odds[1] - odds[0]) - z[..., 0]))
            with np.errstate(divide="ignore", invalid="ignore"):
                r = [np.where(sigma == 0, y == b, np.exp(-0.5 * (b - y) ** 2 / sigma ** 2)) for b in (0, 1)]
            integral = np.log(mean * r[1] + (1 - mean) * r[0])
        else:
            p = q.p_x0(x, rows, z)
            mean, total = p.mean, np.where(sigma < np.inf, (p.variance if variance is None else variance) + sigma ** 2, 1)
            integral = np.where(sigma < np.inf, -0.5 * (mean - y) ** 2 / total - 0.5 * np.log(total), 0)
        return integral.sum(1) + np.sin(mean) @ np.arange(D)

    for t in (2, 6, 12):
        p, found, g = posterior.predicted(x, t)
        np.testing.assert_allclose(p.mean, model.p_back(x, t).mean, rtol=1e-12)
        np.testing.assert_allclose(p.variance, model.p_back(x, t).variance, rtol=1e-12)
        np.testing.assert_allclose(found, log_r(x, t), rtol=1e-9)
        variance = q.p_x0(x, np.full(5, t), model.forward(x, np.full(5, t))).variance
        if not bit:
            g = g * p.variance * math.sqrt(1 - q.beta[t]) / q.beta[t]
        for direction in rng(68).standard_normal((3, *x.shape)):
            slope = quotient(lambda: log_r(x, t, variance), x, direction, 1e-5)
            np.testing.assert_allclose((g * direction).sum(1), slope, rtol=1e-5, atol=1e-5 * abs(slope).max())


def test_guidance_is_the_posterior_mean():
    """With the exact gradient of log r_t, for Gaussian data under noise, a guided step has exactly the mean
    of x_{t-1} given x_t and y, from the covariances of x_0, x_{t-1}, x_t and y."""
    model, s2, y, x = gaussian_model(0.3), 0.5, 1.1, np.array([[0.4]])
    q = model.diffusion
    for t in (2, 10, 50):
        a, b, keep = q.alpha_bar[t], q.alpha_bar[t - 1], 1 - q.beta[t]
        C = np.array([[0.3, math.sqrt(b) * 0.3, math.sqrt(a) * 0.3], [0, b * 0.3 + 1 - b, 0], [0, 0, a * 0.3 + 1 - a]])
        C[1, 2] = math.sqrt(keep) * C[1, 1]
        given = np.array([[C[2, 2], C[0, 2]], [C[0, 2], 0.3 + s2]])  # x_t and y
        expected = np.array([C[1, 2], C[0, 1]]) @ np.linalg.solve(given, [x[0, 0], y])
        mean, variance = linear(x, a, 0.3)
        g = (y - mean) / (variance + s2) * math.sqrt(a) * 0.3 / (a * 0.3 + 1 - a)
        p = model.p_back(x, t)
        tilted, _ = p.tilted(q.guided(p, np.array([t]), g))
        assert tilted.mean[0, 0] == pytest.approx(expected, rel=1e-10)
        assert tilted.variance == pytest.approx(p.variance)


def test_posterior_samples():
    """Inpainting keeps the known exactly and changes the rest; a vanishing noise is the same as
    knowing; an observation for each sample; fewer steps; certain bits give way to what is known."""
    model, y = gaussian_model(1.0, D=2), np.array([1.5, 0.0])
    draw = lambda sigma, number=200, y=y, **o: dpm.Posterior(model, dpm.Observation(y, sigma), "constant").sample(number, 5, **o)
    plain, clamped = model.sample(200, seed=5), draw([0, np.inf])
    assert (clamped[:, 0] == 1.5).all() and clamped[:, 1].std() > 0.8
    np.testing.assert_allclose(clamped[:, 1], plain[:, 1], rtol=1e-9)  # independent coordinates
    np.testing.assert_allclose(draw([1e-7, np.inf]), clamped, atol=1e-5)
    np.testing.assert_allclose(draw([0, np.inf], 4, np.repeat(y[None], 4, 0), batch=3), clamped[:4], rtol=1e-9)
    short = dpm.Posterior(model.shortened(9), dpm.Observation(y, [0, np.inf]), "constant").sample(4, 5)
    assert (draw([0, np.inf], 4, steps=9) == short).all() and (short[:, 0] == 1.5).all()
    model = bits(rate=0.4)[0]
    model.network.z[...] = [60.0, 0, 0]
    x = dpm.Posterior(model, dpm.Observation([0.0, 0, 0], [0, np.inf, np.inf]), particles=4).sample(1000, batch=4000)
    assert (x[:, 0] == 0).all()
    np.testing.assert_allclose(x[:, 1:].mean(0), 0.4, atol=0.06)


@pytest.mark.parametrize("schedule", ["constant", "annealed"])
def test_denoising_follows_its_recursion(schedule):
    """With linear kernels and a Gaussian r at every step, the mean and the variance of x_t follow from those
    of x_{t+1}: as an Observation, whose product is exact, and as a Function, which moves the mean by
    f_sigma times the slope (eq. 61)."""
    model, y, s2, one = gaussian_model(D=20), 1.5, 4.0, np.ones((1, 20))
    observation = dpm.Observation(np.full(20, y), 2.0)
    function = dpm.Function(lambda x: -0.5 * ((x - y) ** 2).sum(1) / s2, lambda x: (y - x) / s2)
    for r in (observation, function):
        mean, variance = 0.0, 0.0
        for t in range(50, -1, -1):  # x_t from p(x_t | x_{t+1}), at T from pi
            p = model.p_back(one, t + 1) if t < 50 else model.diffusion.pi((1, 20))
            slope, f_sigma = float(p.mean[0, 0]), float(p.variance.ravel()[0])
            power = 1 - t / 50 if schedule == "annealed" else 1.0
            gain = power / s2 * (f_sigma if r is function else 1 / (1 / f_sigma + power / s2))
            mean = (1 - gain) * slope * mean + gain * y
            variance = ((1 - gain) * slope) ** 2 * variance + f_sigma * (1 if r is function else 1 - gain)
        x = dpm.Posterior(model, r, schedule).sample(500, 6, batch=500)
        assert x.mean() == pytest.approx(mean, abs=5 * math.sqrt(variance / 10_000))
        assert x.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / 10_000))


@pytest.mark.parametrize("y, sigma, says", [
    ([1.0, np.nan], [0, 0.5], "NaN"), ([1.0, 2.0], [-1, 0], "must be 0"), ([1.0, 2.0], [np.nan, 0], "must be 0"),
    ([1.0, 2.0], [0, 0], "leave something unknown"), ([1.0, 2.0], np.inf, "leave something unknown"),
    ([1.0, 2.0], [0, 0, 0], "shape"), (np.zeros((3, 2)), [0, np.inf], "does not fit"), (np.zeros(3), 1.0, "does not fit")])
def test_bad_observations(y, sigma, says):
    with pytest.raises(dpm.InputError, match=says):
        dpm.Posterior(gaussian_model(D=2), dpm.Observation(y, sigma)).sample(4)


@pytest.mark.parametrize("r, options, says", [
    ("ink", {}, "r must be"), ([], {}, "r must be"), ([CURVE, "ink"], {}, "r must be"), (CURVE, dict(particles=0), "1 particle"),
    (CURVE, dict(schedule="linear"), "no r-schedule"), (dpm.Function(lambda x: x, lambda x: x), dict(particles=2), "log_r of your r returns"),
    (dpm.Function(lambda x: x[:, 0], lambda x: 1.0), {}, "returns float"), (dpm.Function(lambda x: x[:, 0], lambda x: x * np.nan), {}, "NaN")])
def test_bad_r(r, options, says):
    with pytest.raises(dpm.InputError, match=says):
        dpm.Posterior(gaussian_model(D=2), r, **(dict(schedule="constant") | options)).sample(4)
    with pytest.raises(dpm.InputError, match="0 or 1"):
        dpm.Posterior(bits()[0], dpm.Observation([0.5, 1, 0], [0, np.inf, np.inf])).sample(4)


def test_resampling():
    """Systematic: the points (i + u) / N choose each particle floor or ceil of N w times, N w times in the
    mean. Where the effective number is below N / 2, not above; at the last step one of each sample."""
    w, us = rng(62).dirichlet(np.ones(8), 3), (np.arange(999) + 0.5) / 999
    counts = np.array([[np.bincount(c, minlength=8) for c in dpm.pick(w, (np.arange(8) + np.full((3, 1), u)) / 8)] for u in us])
    np.testing.assert_allclose(counts.mean(0), 8 * w, atol=0.01)
    assert (abs(counts - 8 * w) < 1).all() and (counts.sum(2) == 8).all()
    effective = lambda k: np.where(np.arange(16) < k, 0.0, -np.inf)  # k of 16 particles alike
    log_w = np.stack([effective(7), effective(9), effective(5), effective(1)])
    rows, drawn = dpm.resampled(log_w, [rng(i) for i in range(4)])
    assert (drawn == [True, False, True, True]).all()
    rows = rows.reshape(4, 16) - 16 * np.arange(4)[:, None]
    assert (rows[1] == np.arange(16)).all() and (rows[3] == 0).all() and set(rows[0]) == set(range(7))
    last = np.array([dpm.resampled(log_w, [rng(i, j) for i in range(4)], last=True)[0] for j in range(300)])
    assert last.shape == (300, 4) and (last[:, 3] == 48).all()
    assert np.bincount(last[:, 0], minlength=7).min() > 20 and last[:, 0].max() == 6


# Posteriors against the truth, with the best kernels there are. Run with -s to see the table

class Exact(dpm.IdealNetwork):
    """An IdealNetwork with a backward, for one thread: law(x, a) gives E[x_0 | x_t], Var[x_0 | x_t], and
    what multiplies by Cov[x_0 | x_t], for E rises by cos / sin^2 Cov dx_t, or for bits by log odds Cov."""

    def __init__(self, law, rate=None):
        self.law, self.rate = law, rate

    def moments(self, x, a):
        self.a, (self.mean, variance, self.cov) = a, self.law(x, a)
        return (self.mean, variance) if self.rate is None else (self.mean,)

    def backward(self, dz, tape):
        d, a = dz.reshape(*self.mean.shape, -1)[..., 0], self.a
        if self.rate is None:  # v = (cos x_t - E) / sin
            return (np.sqrt(a) * d - np.sqrt(a) / (1 - a) * self.cov(d)) / np.sqrt(1 - a)
        one, zero, spread = a + self.rate * (1 - a), self.rate * (1 - a), self.mean * (1 - self.mean)
        slope = np.log(one / zero * (1 - zero) / (1 - one))  # z = log odds of E - those of x_t alone
        return slope * (self.cov(np.where(spread > 0, d / np.maximum(spread, 1e-300), 0)) - d)


def exact_model(q, law, D, rate=None):
    return dpm.DPM(q, Exact(law, rate), (1, 1, D), threads=1, dtype="float64")


def correlated(S):
    """The law of N(0, S)."""
    def law(x, a):
        gain = math.sqrt(a[0, 0]) * S @ np.linalg.inv(a[0, 0] * S + (1 - a[0, 0]) * np.eye(len(S)))
        C = S - math.sqrt(a[0, 0]) * gain @ S
        return x @ gain.T, np.broadcast_to(np.diag(C), x.shape), lambda d: d @ C
    return law


def mixed(centres, sigma):
    """The law of equally many points around each centre, see data.Mixture."""
    moments = data.Mixture(centres, sigma).moments

    def law(x, a):
        a = a[0, 0]
        v = a * sigma ** 2 + 1 - a
        w = softmax(-((x ** 2).sum(1)[:, None] - 2 * math.sqrt(a) * x @ centres.T + a * (centres ** 2).sum(1)) / (2 * v), 1)
        m, shrink = w @ centres, 1 - a * sigma ** 2 / v
        between = lambda d: (w * (d @ centres.T)) @ centres - m * (m * d).sum(1, keepdims=True)
        return *moments(x, a), lambda d: shrink ** 2 * between(d) + sigma ** 2 * (1 - a) / v * d
    return law


def ar1_case(denoise):
    """AR(1) of correlation 0.8 in 8 dimensions, half of the coordinates known or all under noise: the KL
    from the Gaussian fitted to the samples to the exact posterior, nats."""
    S, known = 0.8 ** np.abs(np.arange(8)[:, None] - np.arange(8)), np.arange(8) % 2 == 0
    model = exact_model(gaussian(50 if denoise else 100, 1e-3), correlated(S), 8)
    y, known = np.linalg.cholesky(S) @ rng(63).standard_normal(8), known | denoise
    unknown = ~known | denoise
    inverse = np.linalg.inv(S[np.ix_(known, known)] + 0.25 * np.eye(known.sum()) * denoise)
    gain = S[np.ix_(unknown, known)] @ inverse
    mean, C = gain @ y[known], S[np.ix_(unknown, unknown)] - gain @ S[np.ix_(known, unknown)]

    def distance(x):
        assert denoise or (x[:, known] == y[known]).all()
        m, c, inverse = x[:, unknown].mean(0) - mean, np.cov(x[:, unknown].T), np.linalg.inv(C)
        return 0.5 * (np.trace(inverse @ c) - len(m) + m @ inverse @ m + np.linalg.slogdet(C)[1] - np.linalg.slogdet(c)[1])

    return model, dpm.Observation(y, np.where(known, 0.5 * denoise, np.inf)), 1200, distance


def roll_case():
    """A roll of 80 points under noise, one coordinate given: total variation to the density on that line."""
    phi = 1.5 * np.pi * (1 + 2 * (np.arange(80) + 0.5) / 80)
    centres = np.stack([phi * np.cos(phi), phi * np.sin(phi)], 1) / 7.5
    fine = (np.arange(30 * 50) + 0.5) / 250 - 3
    truth = data.Mixture(centres, 0.12).log_density(np.stack([np.full(1500, 0.5), fine], 1))
    truth = np.exp(truth).reshape(30, 50).sum(1)
    distance = lambda x: 0.5 * abs(np.histogram(x[:, 1], np.linspace(-3, 3, 31))[0] / len(x) - truth / truth.sum()).sum()
    return exact_model(gaussian(60, 1e-4), mixed(centres, 0.12), 2), dpm.Observation([0.5, 0], [0, np.inf]), 1500, distance


def modes_case():
    """Two modes of weights 3/4 and 1/4 under an Observation and a Function: the error of a mode's weight."""
    x, centres = np.linspace(-6, 6, 60001), np.array([[-1.2], [-1.2], [-1.2], [1.2]])
    prior = 0.75 * np.exp(-0.5 * (x + 1.2) ** 2 / 0.09) + 0.25 * np.exp(-0.5 * (x - 1.2) ** 2 / 0.09)
    posterior = prior * np.exp(-0.5 * (x - 0.2) ** 2 / 0.64 + 0.3 * np.sin(x))
    weight = posterior[x > 0].sum() / posterior.sum()
    assert 0.4 < weight < 0.6  # the data's own is 1/4
    r = [dpm.Observation([0.2], [0.8]), dpm.Function(lambda x: 0.3 * np.sin(x[:, 0]), lambda x: 0.3 * np.cos(x))]
    return exact_model(gaussian(60, 1e-3), mixed(centres, 0.3), 1), r, 3000, lambda x: abs((x > 0).mean() - weight)


def heartbeat_case():
    """Three zeros given that leave two phases open: the share of samples that are no heartbeat of these."""
    patterns, y, sigma = data.load("heartbeat").truth.patterns, np.zeros(20), np.full(20, np.inf)
    sigma[[5, 6, 12]] = 0

    def law(x, a):
        one, zero = a[0, 0] + 0.2 * (1 - a[0, 0]), 0.2 * (1 - a[0, 0])
        w = softmax(x @ patterns.T * np.log(one / zero) + (1 - x) @ patterns.T * np.log((1 - one) / (1 - zero)), 1)
        m = w @ patterns
        return m, None, lambda d: (w * (d @ patterns.T)) @ patterns - m * (m * d).sum(1, keepdims=True)

    def distance(x):
        phases = (x[:, None] == patterns).all(2).mean(0)
        assert phases[:3].max() == 0
        assert phases.sum() < 0.9 or abs(phases[3] - phases[4]) < 4 / math.sqrt(len(x))
        return 1 - phases.sum()

    return exact_model(binomial(60, 1e-5, rate=0.2), law, 20, 0.2), dpm.Observation(y, sigma), 400, distance


def bits_case():
    """Three bits and a table of random kernels, by enumeration: a noisy bit, and a Function that is linear
    in the bits; total variation."""
    model, states, _, _, reverse, p = bits(rate=0.4)
    for t in range(model.T, 0, -1):
        p = reverse[t] @ p
    tilt = np.array([0.0, 1.5, -1.0])
    p = p * np.exp(states @ tilt - 0.5 * (states[:, 0] - 0.9) ** 2 / 0.36)
    distance = lambda x: 0.5 * np.abs(np.bincount((x @ [1, 2, 4]).astype(int), minlength=8) / len(x) - p / p.sum()).sum()
    r = [dpm.Observation([0.9, 0, 0], [0.6, np.inf, np.inf]), dpm.Function(lambda x: x @ tilt, lambda x: x * 0 + tilt)]
    return model, r, 5000, distance


@pytest.mark.parametrize("name, case, limit, crowd, alone", [
    ("AR(1), half known: KL, nats", lambda: ar1_case(False), 0.02, 16, True),
    ("AR(1), denoised: KL, nats", lambda: ar1_case(True), 0.03, 64, True),
    ("roll, one coordinate: TV", roll_case, 0.08, 16, False), ("two modes: error of a weight", modes_case, 0.025, 16, False),
    ("heartbeat, three bits: share invalid", heartbeat_case, 0.015, 16, True), ("three bits: TV", bits_case, 0.025, 32, False)])
def test_posteriors_against_the_truth(name, case, limit, crowd, alone):
    """With that many particles samples have the exact posterior's distribution, with the paper's sampler
    they do not. Where steps are small and the answer is no choice between modes, a predicted r comes
    halfway and more with one particle `alone`."""
    model, r, number, distance = case()
    found = {(schedule, N): distance(dpm.Posterior(model, r, schedule, N).sample(number, 3, batch=20_000))
             for schedule, N in [*((schedule, 1) for schedule in dpm.R_SCHEDULES), ("predicted", crowd)]}
    print(f"\n| {name} | " + " | ".join(f"{d:.3f}" for d in found.values()) + f" | {crowd} | {model.T} |")
    assert found["predicted", crowd] < limit
    assert found["constant", 1] > 2 * found["predicted", crowd]
    assert not alone or found["constant", 1] > 2 * found["predicted", 1]


@pytest.mark.parametrize("kind", ["Function", "Observation"])
@pytest.mark.parametrize("schedule", dpm.R_SCHEDULES)
def test_particles_are_exact(schedule, kind):
    """For every r_t, also at x_T, whose weight matters where r tilts a pi that still remembers: few steps,
    alpha_bar_T = 0.13. White data has exact kernels; under the Gaussian r its posterior is N(2 / 2.44,
    1.44 / 2.44)."""
    q = dpm.Gaussian(np.array([1, 0.95, 0.6, 0.13]))
    model = exact_model(q, correlated(np.eye(1)), 1)
    r = dpm.Observation([2.0], [1.2]) if kind == "Observation" else dpm.Function(
        lambda x: -0.5 * (x[:, 0] - 2) ** 2 / 1.44, lambda x: (2 - x) / 1.44)
    x, kept = dpm.Posterior(model, r, schedule, 100).sample(1500, 7, batch=150_000, keep=(1,))
    assert x.mean() == pytest.approx(2 / 2.44, abs=4 * math.sqrt(1.44 / 2.44 / 1500))
    assert x.var() == pytest.approx(1.44 / 2.44, rel=4 * math.sqrt(2 / 1500))
    a = math.sqrt(0.95)  # x_1 is that of the particle which became the sample
    assert np.corrcoef(x[:, 0], kept[1][:, 0])[0, 1] == pytest.approx(
        a * 1.44 / 2.44 / math.sqrt(1.44 / 2.44 * (0.95 * 1.44 / 2.44 + 0.05)), abs=0.03)


def test_particles_do_not_depend_on_the_batch():
    model = exact_model(gaussian(20), correlated(np.eye(2) + 0.5), 2)
    y = np.array([[0.3, 1.0], [0.5, -1], [2, 0], [1, 1], [0, 0]])
    draw = lambda batch: dpm.Posterior(model, dpm.Observation(y, [0.5, np.inf]), particles=8).sample(5, 4, batch=batch)
    np.testing.assert_allclose(draw(9), draw(1000), rtol=1e-9)


# ------------------------------------------------------------------------------------------------
# 6. Determinism and checkpoints
# ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("network, shape, options", [
    (*NETWORKS[0], dict(learned=True)), (*NETWORKS[1], dict(predict="eps")), (*NETWORKS[2], dict(predict="paper", learned=True))])
def test_training_is_deterministic_and_resumes_bit_for_bit(tmp_path, network, shape, options):
    def train(model, adam, first, last):
        for i in range(first, last):
            model.gradient(rng(1, i).standard_normal((16, model.D)).astype(model.dtype), 0, i)
            model.step(adam)

    def fresh():
        model = small_model(shape=shape, network=network, dtype="float32", **options)
        return model, dpm.Adam(model.theta, steps=12, warmup=3)

    (model, adam), (again, adam_again) = fresh(), fresh()
    train(model, adam, 0, 12)
    train(again, adam_again, 0, 5)
    dpm.save(again, tmp_path / "c.npz", adam_again)
    resumed, adam_resumed = dpm.resume(tmp_path / "c.npz", steps=12, warmup=3)
    assert adam_resumed.step == 5 and (resumed.diffusion.alpha_bar == again.diffusion.alpha_bar).all()
    train(resumed, adam_resumed, 5, 12)
    for a, b in ((resumed.theta, model.theta), (adam_resumed.average, adam.average), (adam_resumed.v, adam.v)):
        assert (a == b).all()
    assert not (again.theta == model.theta).all()
    dpm.save(model, tmp_path / "c.npz", adam)  # a model in training is sampled by its averaged weights
    assert (dpm.load(tmp_path / "c.npz").theta == adam.average).all()


@pytest.mark.parametrize("q, options", [
    (gaussian(), {}), (gaussian(variance="beta"), dict(predict="eps")), (gaussian(**BYTES), {}), (gaussian(), dict(learned=True)),
    (binomial(mean=0.45), {}), (gaussian(), dict(network="paper", predict="paper"))])
def test_checkpoint_round_trip(tmp_path, q, options):
    """The same model, to the last bit, or in half precision if asked; all that it was told comes back."""
    model, x0 = small_model(q, (4, 4, 1), dtype="float32", stir=0.1, **({"network": "unet"} | options)), np.full((5, 16), 0.25)
    if isinstance(q, dpm.Binomial):
        x0 = np.round(rng(20).random((5, 16)))
    dpm.save(model, tmp_path / "full.npz")
    dpm.save(model, tmp_path / "half.npz", half=True)
    loaded, half = (dpm.load(tmp_path / f"{name}.npz", threads=2) for name in ("full", "half"))
    assert (loaded.shift, loaded.scale, loaded.shape) == (0.5, 2.0, (4, 4, 1)) and loaded.about["dataset"] == "x"
    assert loaded.diffusion.config == model.diffusion.config and loaded.threads == 2 and loaded.dtype == model.dtype
    ours, theirs = model.bound(x0, rng(21)), loaded.bound(x0, rng(21))
    assert (theirs["K"], theirs["L_null"]) == (ours["K"], ours["L_null"])
    assert (loaded.sample(2) == model.sample(2)).all()
    assert (half.theta == model.theta.astype(np.float16)).all() and (half.theta != model.theta).any()
    assert half.bound(x0, rng(21))["K"] == pytest.approx(ours["K"], rel=1e-2)
    assert np.load(tmp_path / "half.npz")["average"].dtype == np.float16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full.npz", "half.npz"]  # no temporary file stays
    with pytest.raises(dpm.InputError, match="cannot be resumed"):
        dpm.resume(tmp_path / "full.npz")


def test_bad_checkpoints(tmp_path):
    """Damaged, of another version, tampered with, or with a byte changed: one line, or the same model."""
    model, bad = small_model(), tmp_path / "bad.npz"
    dpm.save(model, tmp_path / "good.npz", dpm.Adam(model.theta))
    raw, content = (tmp_path / "good.npz").read_bytes(), dict(np.load(tmp_path / "good.npz"))
    config = json.loads(str(content["config"]))

    def refused(says="not a checkpoint", read=dpm.load):
        with pytest.raises(dpm.InputError, match=says) as caught:
            read(bad)
        assert "\n" not in str(caught.value)

    refused("no such checkpoint")
    for wrong in (b"", raw[:len(raw) // 2], b"PK" + bytes(99)):
        bad.write_bytes(wrong)
        refused()
    a, average = content["alpha_bar"], content["average"]
    about = lambda **k: dict(config=json.dumps(config | dict(about=config["about"] | k)))
    other = lambda **k: dict(config=json.dumps(config | k))
    for change, says in [
            (dict(format=dpm.FORMAT + 1), "format"), (dict(format="x"), ""), (dict(config="{"), ""), (dict(config="[]"), ""),
            (dict(average=average[:-1]), ""), (dict(average=np.append(average, 0)), ""), (dict(average=average * np.nan), ""),
            (dict(average=average.astype(int)), ""), (dict(alpha_bar=a[::-1]), ""), (dict(alpha_bar=a * np.nan), ""),
            (dict(alpha_bar=a[:2]), ""), (dict(scale=0.0), ""), (dict(scale=np.nan), ""), (dict(shift=np.inf), ""),
            (dict(shift=np.zeros(3)), ""), (about(network="x"), "no network"), (about(sizes=dict(width=-1)), ""),
            (about(sizes=dict(width=10 ** 12)), ""), (about(sizes=[]), ""), (about(predict="x"), ""), (other(shape=[0, 1, 3]), ""),
            (other(shape=[1, 1, 4]), ""), (other(dtype="int8"), ""), (other(diffusion="x"), ""), (other(learned=True), ""),
            (other(of_diffusion=dict(x=1)), ""), (other(of_diffusion=dict(rate=0.3)), "")]:
        np.savez(bad, **(content | change))
        refused(says)
    for change in (dict(m=content["m"][:-1]), dict(m=content["m"] * np.inf), dict(v=content["v"][:, None]), dict(v=content["v"] - 1),
                   dict(step=-1), dict(step=np.nan), other(shares=0), other(shares=-1), other(shares="2")):
        np.savez(bad, **(content | change))
        refused("", dpm.resume)
    np.savez(bad, **{name: a for name, a in content.items() if name != "m"})
    refused("", dpm.resume)
    np.savez(bad, x=np.array([{}, {}], dtype=object))
    refused()
    for i in range(150):
        r = rng(95, i)
        wrong = bytearray(raw)
        wrong[r.integers(len(raw))] ^= int(r.integers(1, 256))
        bad.write_bytes(bytes(wrong))
        try:
            assert (dpm.load(bad).theta == model.theta).all()  # a byte that nobody reads
        except dpm.InputError as error:
            assert "\n" not in str(error)


SHIPPED = dict(swissroll=-1.25, heartbeat=-2.37)  # K, bits, as the README gives it
SHIPPED_BITS_PER_DIM = 1.150


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_toys(name):
    model = dpm.load(HERE / "data" / name / "model.npz")
    found = model.bound(data.load(name).held_out(2000), rng(65), draws=40)
    assert found["K"] / LN2 == pytest.approx(SHIPPED[name], abs=0.01 + 4 * found["K_se"] / LN2)


def test_shipped_model():
    """The MNIST model beside the data: from its own config, on test images, at the README's figure."""
    model = dpm.load(HERE / "data" / "mnist" / "model.npz")
    found = model.bound(data.load("mnist").held_out(100), rng(22), draws=5)
    bits_per_dim = -found["K"] / 784 / LN2 + math.log2(model.scale)
    assert bits_per_dim < SHIPPED_BITS_PER_DIM + 0.02 + 4 * found["K_se"] / 784 / LN2


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
    return lambda *args, **options: device(f(*host(args), **{k: host(v) for k, v in options.items()}))


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


@pytest.fixture
def cupy(monkeypatch):
    """The stand-in, where `import cupy` and `import cupyx.scipy.special` find it."""
    stand_in, special = StandIn(), types.ModuleType("cupyx.scipy.special")
    special.log_ndtr = on_device(log_ndtr)
    modules = {"cupyx": types.ModuleType("cupyx"), "cupyx.scipy": types.ModuleType("cupyx.scipy"), "cupyx.scipy.special": special}
    modules["cupyx"].scipy, modules["cupyx.scipy"].special = modules["cupyx.scipy"], special
    for name, module in (modules | {"cupy": stand_in}).items():
        monkeypatch.setitem(sys.modules, name, module)
    return stand_in


def test_the_stand_in_refuses_what_cupy_refuses(cupy):
    a = cupy.asarray(np.arange(3.0))
    for mix in (lambda: a + np.ones(3), lambda: np.ones(3) + a, lambda: np.sqrt(a), lambda: np.asarray(a), lambda: cupy.exp(np.ones(3)),
                lambda: a.__setitem__(slice(None), np.ones(3)), lambda: a[np.array([0])], lambda: cupy.concatenate([a, np.ones(3)])):
        with pytest.raises(TypeError):
            mix()
    a *= 2
    assert isinstance(a, DeviceArray) and (to := a.sum()).get() == 6 and isinstance(to, DeviceArray)
    assert all(isinstance(part, DeviceArray) for part in cupy.split(a, 3)) and dpm.backend(True) is cupy


GPU_CASES = [("mlp", (1, 1, 3), gaussian(), dict(learned=True)), ("unet", (5, 4, 2), gaussian(kind="cosine", **BYTES), dict(predict="eps")),
             ("paper", (5, 4, 2), gaussian(), dict(predict="paper", learned=True)), ("mlp", (1, 1, 4), binomial(), {}),
             ("unet", (4, 4, 1), binomial(), {}), ("unet", (4, 4, 1), gaussian(variance="beta"), {})]


@pytest.mark.parametrize("where", ["stand-in", "cupy"])
@pytest.mark.parametrize("network, shape, q, options", GPU_CASES)
def test_gpu_agrees_with_cpu(where, network, shape, q, options, tmp_path, monkeypatch, request):
    """The same weights, data and noise on both: bound, entropies, estimates, samples, gradients of every
    objective, a step of Adam, and posterior samples, with one particle and with several."""
    xp = request.getfixturevalue("cupy") if where == "stand-in" else dpm.backend()
    if xp is np:
        pytest.skip("no GPU here")
    cpu = small_model(q, shape, network, stir=0.1, threads=1, **options)
    dpm.save(cpu, tmp_path / "c.npz", dpm.Adam(cpu.theta))
    x0, (gpu, adam) = rng(27).standard_normal((9, cpu.D)), dpm.resume(tmp_path / "c.npz", xp)
    x0 = (x0 > 0) * 1.0 if isinstance(q, dpm.Binomial) else np.clip(np.round(x0 * 2 - 0.5) / 2 + 0.25, -0.75, 0.75)
    same = lambda a, b, rtol=1e-6: np.testing.assert_allclose(dpm.to_host(a), b, rtol=rtol, atol=1e-10)
    ours, theirs = cpu.bound(x0, rng(28)), gpu.bound(x0, rng(28))
    for name in ours:
        same(theirs[name], ours[name], 1e-8)
    for a, b in zip(dpm.entropy_bounds(cpu.diffusion, x0), dpm.entropy_bounds(gpu.diffusion, x0)):
        same(b, a, 1e-8)
    same(dpm.log_weights(gpu, x0, 3, rng(67)), dpm.log_weights(cpu, x0, 3, rng(67)))
    same(gpu.sample(5), cpu.sample(5))
    for schedule, particles in (("predicted", 1), ("predicted", 3), ("annealed", 3)):
        r = [[dpm.Observation(x0, np.where(np.arange(cpu.D) % 2, 0.3, 0), a),
              dpm.Function(lambda x: 0.1 * x.sum(1), lambda x: 0 * x + 0.1)] for a in (np, xp)]
        same(*[dpm.Posterior(m, r_m, schedule, particles).sample(9, 1, steps=5) for m, r_m in zip((gpu, cpu), r[::-1])])

    class Draws:  # the host's noise, wherever it is needed
        def __init__(self, xp, *key):
            self.put, self.host = xp.asarray, np.random.default_rng(len(key))

        def __getattr__(self, name):
            return lambda *args, **options: self.put(getattr(self.host, name)(*args, **options))

    first = dpm.generator
    monkeypatch.setattr(dpm, "generator", lambda a, *key: first(np, *key) if a is np and key[0] != "noise" else Draws(a, *key))
    for kind in ["K", "focused"] + ["simple", "mean"] * (not isinstance(q, dpm.Binomial)):
        for model in (cpu, gpu):
            model.gradient(model.xp.asarray(x0), 3, tables=dpm.objective(kind, model.diffusion))
        same(gpu.grad, cpu.grad)
    assert float(gpu.step(adam)) == pytest.approx(float(cpu.step(dpm.Adam(cpu.theta))))
    same(gpu.theta, cpu.theta)
    assert where == "cupy" or xp.used <= IN_CUPY


# Looked up in CuPy 14, in cupy, cupy.random and cupy.cuda
IN_CUPY = set("abs add arange asarray broadcast_to clip concatenate cos cumsum divide empty empty_like exp expm1 full isinf linspace log "
              "log1p matmul maximum minimum multiply ones pad sin split sqrt stack subtract tanh where zeros zeros_like".split())


def test_the_list_of_cupys_names():
    cupy = pytest.importorskip("cupy")
    assert all(hasattr(cupy, name) for name in IN_CUPY) and hasattr(cupy.random, "Philox4x3210") and hasattr(cupy.random, "Generator")
