"""Every number and picture of a trained model: what `train.py --evaluate` computes and prints.

Numbers of the model come in nats and leave in bits; result.json has them all.
"""
import dpm  # before numpy, see there

import functools
import json
import math
import pathlib
import time

import numpy as np
from scipy.special import logsumexp

import data
from data import figures, runs

LN2 = math.log(2)
MEASURED = 500     # samples of images for their distance from training images, see distances
MOST_D = 4096      # dimensions of such images, at most: the time goes with D^3
IMAGE_STEPS = 250  # of T, for free samples of images: nobody sees a difference from using all


def evaluate(path, xp, chains=(), parzen=False, comm=None):
    """Every number and picture of a trained model: result.json and pictures beside its checkpoint,
    and a page on the terminal. Returns their directory and the numbers."""
    checkpoint = runs.checkpoint_in(path)
    model = runs.load(checkpoint, xp, comm)
    dataset, about, T, D, q = runs.load_for(model), model.about, model.T, model.D, model.diffusion
    shorter, leads = [model.shortened(S) for S in chains], model.comm.rank == 0
    out = checkpoint.parent
    if checkpoint.name != "checkpoint.npz":
        out = pathlib.Path("runs") / f"{checkpoint.absolute().parent.name}-{checkpoint.stem}"
    image, started = model.shape[:2] != (1, 1), time.perf_counter()
    if parzen and not (image and dataset.bytes and dataset.train is not None):
        raise dpm.InputError("--parzen is for images of bytes, whole and from a file, and "
                             f"{about['dataset']} has none")
    # Many examples, for a small standard error, but of large images no more than 2^24 numbers; of
    # few examples so many draws that every t comes twice
    x0 = dataset.held_out(min(10_000, 2 + 2 ** 24 // D) if image else 16_000)
    draws = min(T - 1, max(5 if image else 40, -(-2 * T // len(x0))))
    if leads:
        runs.writable(out / "result.json")
        print(f"evaluating {checkpoint} on {runs.device_name(model.xp)}", flush=True)

    def bound(of, x0, desc="bound"):
        return of.bound(x0, dpm.generator(np, "bound"), draws, progress=runs.progress(desc))

    found, (lower, upper) = bound(model, x0), dpm.entropy_bounds(q, x0)
    runs.finite(found["K"], "the bound")
    told = "dataset network widths objective variance predict decoder schedule seconds device"
    result = {name: about[name] for name in told.split()}
    result |= dict(dataset=data.printable(about["dataset"]), examples=len(x0), timesteps=T,
                   steps=about["trained_steps"], dimension=D, pixels=D // model.shape[2],
                   shift=model.shift, scale=model.scale)
    for name in "K L_null K_minus_L_null H_q_T H_q_1 H_p_T L_T".split():
        result |= {f"{name}_bits{end}": found[name + end] / LN2
                   for end in ("", "_se") if name + end in found}
    result["kl_bits"] = (found["kl"] / LN2).tolist()
    for name, H in (("lower", lower), ("model", found["entropy"]), ("upper", upper)):
        result[f"entropy_{name}_bits"] = float(np.nansum(H[2:])) / LN2
    if dataset.bytes:
        result |= dict(bits_per_dim=bits_per_dim(result["K_bits"], model),
                       bits_per_dim_se=result["K_bits_se"] / D)
    if dataset.test is not None and dataset.bytes and not q.discretised and (
            about["predict"] != "paper"):
        result |= bits_of_bytes(model, dataset.test[:len(x0)], bound)
    some, curves = x0[:1000 if image else 4000], {"the model": found["kl"]}
    if not dataset.binary:
        for variance in ("learned", "beta", "posterior"):
            other = dpm.Gaussian(q.alpha_bar, model.xp, **dict(q.config, variance=variance))
            K = bound(model.with_diffusion(other), some, f"bound, variance {variance}")["K"]
            result[f"K_{variance}_bits"] = K / LN2
    if dataset.truth:
        truth, curves["the ideal kernel"] = beside_the_truth(model, dataset, x0, found, bound)
        result |= truth
        result |= dict(K_star_bits=result["K_bits"] + truth["K_star_minus_K_bits"],
                       K_star_bits_se=math.hypot(result["K_bits_se"],
                                                 truth["K_star_minus_K_bits_se"]))
    if image:
        result |= sample_measure(model.shortened(runs.fewer_steps(model, 50)), dataset)
    for short in shorter:
        row = dict(steps=short.T, K_bits=bound(short, some, f"bound, {short.T} steps")["K"] / LN2)
        if image:
            row |= dict(bits_per_dim=bits_per_dim(row["K_bits"], model)) if dataset.bytes else {}
            row |= sample_measure(short, dataset)
        result.setdefault("chains", []).append(row)
    if parzen:
        result |= parzen_estimate(model, dataset)
    result["evaluation_seconds"] = round(time.perf_counter() - started, 1)
    # The error of a single example is NaN, which JSON does not have
    result = {name: None if value != value else value for name, value in result.items()}
    if leads:
        alone = model.with_diffusion(q)
        alone.comm = dpm.Alone()  # the other ranks don't draw
        table = draw(alone, dataset, found, curves, (lower, upper), result, out)
        with dpm.written_whole(out / "result.json") as part:
            part.write_text(json.dumps(result, indent=1))
        print_page(result, table, image, dataset.binary)
        print(f"{out}: result.json, {', '.join(sorted(p.name for p in out.glob('*.png')))}")
    return out, result


def gain(q, mean):
    """What K - L_null would be if every KL were 0, for bits of this mean (1, D), or for numbers of
    mean 0 and variance 1."""
    x0 = mean if isinstance(q, dpm.Binomial) else mean + 1  # numbers whose square is 1
    if q.discretised:
        return -float((q.kl_to_pi(q.T, x0) + q.log_null(x0))[0])
    return float((q.H_q(q.T, x0) - q.H_q(1, x0) - q.H_p(x0) - q.log_null(x0))[0])


def progress_note(model, climbed):
    note = f"K - L_null {climbed / LN2:.4g} bits"
    if model.about["bytes"]:
        null = 0.5 * math.log2(2 * math.pi * math.e)
        note += f", {math.log2(model.scale) + null - climbed / LN2 / model.D:.3f} bits/dim"
    return note


def beside_the_truth(model, dataset, x0, found, bound):
    """What is known of data whose density is known: L, K* - K, and estimates of log p(x_0) by S
    trajectories (bits); and the KLs of the ideal kernel (nats)."""
    q, moments, few = model.diffusion, dataset.truth.moments, len(x0)
    if dataset.binary:
        moments = functools.partial(moments, rate=q.rate)
    else:
        few = min(few, max(500, 4000 * 2000 // len(dataset.truth.centres)))  # of so many terms each
    host = type(q)(dpm.to_host(q.alpha_bar), **q.config)
    best = bound(dpm.DPM(host, dpm.IdealNetwork(moments), model.shape), x0[:few], "bound K*")
    # With the same noise, so that points and noise cancel in the difference
    ours = found if few == len(x0) else bound(model, x0[:few])

    def note(name, values):
        return {f"{name}_bits": float(values.mean()) / LN2,
                f"{name}_bits_se": float(values.std()) / math.sqrt(len(values)) / LN2}

    L, rng = dataset.truth.log_density(x0), dpm.generator(np, "estimates")
    result = note("K_star_minus_K", best["K_each"] - ours["K_each"]) | note("L_true", L)
    log_w = dpm.log_weights(model, x0[:max(5, min(50, 8000 // model.T))], 1000, rng)
    L = L[:len(log_w)]
    result |= dict(estimate_examples=len(log_w), estimate_L_bits=float(L.mean()) / LN2)
    for S in (1, 10, 100, 1000):
        each = (logsumexp(log_w.reshape(len(log_w), -1, S), axis=2) - math.log(S)).mean(1)
        result |= note(f"estimate_{S}", each) | note(f"L_minus_estimate_{S}", L - each)
    return result, best["kl"]


def bits_per_dim(K, model):
    """Of the bytes, from K in bits: a density of normalised values, or a discretised decoder."""
    return (0.0 if model.diffusion.discretised else math.log2(model.scale)) - K / model.D


def bits_of_bytes(model, bytes_, bound):
    """bits/dim of the bytes (n, D) themselves, by the network of a model that was trained on
    dequantised ones: with a discretised decoder (DDPM eq. 13), and from the first t on whose noise
    is at least a third of a grey level, since the decoder does the rest."""
    q = model.diffusion
    first = np.searchsorted(dpm.to_host(q.sin[1:]), runs.DECODED / model.scale) + 1
    alpha_bar = np.append(1, dpm.to_host(q.alpha_bar[min(first, q.T - 1):]))  # two steps at least
    decoder = runs.decoder(model.shift, model.scale)
    of_bytes = model.with_diffusion(dpm.Gaussian(alpha_bar, model.xp, q.variance, **decoder))
    found = bound(of_bytes, model.normal(bytes_ + 0.5), "bound, discretised")
    return dict(discretised_bits_per_dim=bits_per_dim(found["K"] / LN2, of_bytes),
                discretised_bits_per_dim_se=found["K_se"] / LN2 / model.D)


def sample_measure(model, dataset):
    """How far samples are from training images, and as many test images, see distances; nothing
    where fewer than 40 are held out, or images are large."""
    test = dataset.held_out(MEASURED)
    if len(test) < 40 or model.D > MOST_D:
        return {}
    samples = model.sample(len(test), 1, progress=runs.progress(f"{len(test)} samples"))
    runs.finite(samples, "samples")
    return distances(dataset, samples, test) | dict(frechet_steps=model.T)


def distances(dataset, samples, test):
    """Of samples (n, D), at least 40, and of as many test images, see frechet."""
    train = dataset.draw(5000, dpm.generator(np, "frechet"))
    train, samples, test = in_components(train, samples, test)
    return dict(frechet=frechet(train, samples), frechet_test=frechet(train, test))


def in_components(x, *others, components=40):
    """x and others (n, D) in the leading principal components of x, (n, components) each."""
    x, mean = np.asarray(x, np.float64), np.mean(x, 0, np.float64)
    basis = np.linalg.eigh(np.cov(x.T))[1][:, -components:]
    return [(np.asarray(a, np.float64) - mean) @ basis for a in (x, *others)]


def frechet(x, y):
    """The Frechet distance |m_x - m_y|^2 + tr(C_x + C_y - 2 sqrt(C_x C_y)) of Gaussians fitted to
    x and y (n, D). It needs no other network and is 0 for equal means and covariances, which are
    all that it sees; few examples make it larger."""
    C_x, C_y = np.cov(x.T), np.cov(y.T)
    roots = np.sqrt(np.maximum(np.linalg.eigvals(C_x @ C_y).real, 0)).sum()
    gap = ((y.mean(0) - x.mean(0)) ** 2).sum()
    return float(gap + np.trace(C_x) + np.trace(C_y) - 2 * roots)


def parzen_estimate(model, dataset):
    """The paper's Table 2 for MNIST: the log density, in bits of pixels in [0, 1], of the test
    images under Gaussians around 10,000 samples. Their width is the best of ten for the last 1,000
    training images."""
    short = model.shortened(runs.fewer_steps(model, 100))
    samples = short.sample(10_000, 1, progress=runs.progress("Parzen samples"))
    centres, by_width = figures.to_bytes(model, samples).reshape(len(samples), -1) / 255, {}
    for sigma in runs.bar(np.logspace(-1, 0, 10), "Parzen widths", leave=False):
        mixture = data.Mixture(centres, sigma)
        by_width[sigma] = mixture.log_density(dataset.train[-1000:] / 255).mean()
    sigma = max(by_width, key=by_width.get)
    each = data.Mixture(centres, sigma).log_density(dataset.test / 255) / LN2
    return dict(parzen_bits=float(each.mean()), parzen_sigma=float(sigma),
                parzen_bits_se=float(each.std()) / math.sqrt(len(each)))


def draw(model, dataset, found, curves, entropies, result, out):
    """All pictures of an evaluation; returns the table of rate and distortion of bytes."""
    T, D, table = model.T, model.D, []
    figures.curve(runs.logged(out / "log.csv"), out / "training.png")
    figures.by_t(T, curves, "KL, bits", "where the bound is lost: KL[q || p] of every step",
                 out / "kl.png", yscale="log")
    by_name = {"upper bound": entropies[1] / D, "the model's": found["entropy"] / D,
               "lower bound": entropies[0] / D}
    figures.by_t(T, by_name, "bits per dimension", "entropy of the reverse steps, eq. 24",
                 out / "entropy.png")
    if model.learned:
        figures.schedule(model, out / "schedule.png")
    if model.shape[:2] != (1, 1):
        short = model.shortened(runs.fewer_steps(model, IMAGE_STEPS))
        samples = short.sample(64, model.about["seed"], progress=runs.progress("samples"))
        figures.save_picture(figures.sheet(model, samples), out / "samples.png")
        if dataset.bytes:
            table = figures.rate_distortion(found, D, model.scale, out / "rate.png")
        if not dataset.binary:
            short = model.shortened(runs.fewer_steps(model, 100))
            figures.figure_3(short, dataset, out / "figure3.png")
    elif dataset.binary:
        figures.figure_2(model, out / "figure2.png")
    elif dataset.truth:
        figures.figure_1(model, dataset, out / "figure1.png")
    else:
        sets = {"held out": dataset.held_out(2000),
                "samples": model.sample(2000, model.about["seed"])}
        figures.save_picture(figures.points_picture(model, sets), out / "samples.png")
    if dataset.truth:
        figures.forgetting(model.diffusion, dataset.held_out(500), out / "forgetting.png")
    if result.get("chains"):
        figures.against_steps(result["chains"], out / "steps.png")
    return table


def print_page(r, table, image, binary):
    """The numbers of result.json for people."""
    unit = "bits/pixel" if image else "bits/sequence" if binary else "bits/point"
    if not binary and "L_T_bits" not in r:
        unit += " of normalised data (variance 1)"
    per, steps = r["pixels"], f"t = 2..{r['timesteps']}"

    def line(name, value, se=None, note="", digits=4):
        error = " " * 10 if se is None else f" +- {se:.{digits}f}"
        print(f"  {name:<22}{value:12.{digits}f}{error}  {note}")

    def row(name, key, note="", sign=1):
        se = r.get(f"{key}_se")
        line(name, sign * r[key] / per, None if se is None else se / per, note)

    print(f"\n{r['dataset']}, T = {r['timesteps']}, {r['schedule']} schedule, network "
          f"{r['network']}, trained on {r['objective']}; {r['examples']} held-out examples; {unit}")
    row("K", "K_bits", "lower bound on the mean log likelihood (eq. 14), the sum of:")
    if "L_T_bits" in r:
        row("  - L_T", "L_T_bits", "KL[q(x_T|x_0) || pi] (DDPM eq. 5)", -1)
        line("  - sum L_t-1", -sum(r["kl_bits"][2:]) / per, note=steps)
        line("  - L_0", -r["kl_bits"][1] / per, note="the discretised decoder")
    else:
        line("  - sum of KLs", -sum(r["kl_bits"]) / per, note=steps)
        row("  + H_q(X_T|X_0)", "H_q_T_bits")
        row("  - H_q(X_1|X_0)", "H_q_1_bits", sign=-1)
        row("  - H_p(X_T)", "H_p_T_bits", sign=-1)
    null = "independent bits" if binary else "an isotropic Gaussian"
    row("L_null", "L_null_bits", f"log likelihood under {null}")
    row("K - L_null", "K_minus_L_null_bits")
    if "K_star_bits" in r:
        print("K <= K* <= L")
        row("K*", "K_star_bits", "the best that any kernel of this form can do")
        row("  K* - K", "K_star_minus_K_bits", "with the same points and noise")
        row("L", "L_true_bits", "the data's own mean log likelihood")
    if "K_beta_bits" in r:
        print("K of the first of these examples only, by f_sigma, from the same network")
        for variance in ("learned", "beta", "posterior"):
            row(variance, f"K_{variance}_bits")
    print(f"entropy of the reverse steps, sum over {steps} (eq. 24)")
    for name in ("upper", "model", "lower"):
        row("the model's" if name == "model" else f"{name} bound", f"entropy_{name}_bits")
    if "estimate_1_bits" in r:
        print(f"log p(x_0) of {r['estimate_examples']} examples from S trajectories each "
              "(eqs. 6-9); S = 1 is K in the mean")
        for S in (1, 10, 100, 1000):
            gap, se = (r[f"L_minus_estimate_{S}_bits{end}"] for end in ("", "_se"))
            row(f"  S = {S}", f"estimate_{S}_bits", f"below L by {gap:.4f} +- {se:.4f}")
        row("L of these", "estimate_L_bits")
    if "bits_per_dim" in r:
        kind = "discrete" if "L_T_bits" in r else "dequantised"
        print("in the units of later papers")
        line("bits/dim", r["bits_per_dim"], r["bits_per_dim_se"],
             f"of the 8-bit values, {kind}: a bound on code length")
    if "discretised_bits_per_dim" in r:
        line("  the same, discrete", r["discretised_bits_per_dim"],
             r["discretised_bits_per_dim_se"], "from noise of a third of a grey level or more")
    if table:
        print("rate and distortion (DDPM, Table 4): bits/dim of the steps from T down, error of "
              "x_0 in 0..255")
        for t, rate, distortion in table:
            print(f"  down to t = {t:<10}{rate:12.4f}{distortion:10.2f}")
    if "frechet" in r:
        print("samples against training images (Frechet distance of 40 principal components; 0 is "
              "the same, and it is\nblind to what Gaussians don't show)")
        line("samples", r["frechet"], note=f"by {r['frechet_steps']} steps", digits=3)
        line("test images", r["frechet_test"], digits=3)
    for chain in r.get("chains", ()):
        names = {"bits/dim": "bits_per_dim", "Frechet": "frechet"}
        print(f"  chain of {chain['steps']:<5} steps: K {chain['K_bits'] / per:.4f}", *(
            f"{name} {chain[key]:.3f}" for name, key in names.items() if key in chain), sep=", ")
    if "parzen_bits" in r:
        print("in the units of the paper's Table 2")
        line("Parzen, bits", r["parzen_bits"], r["parzen_bits_se"], digits=1)


def compare(evaluated):
    """Several runs, pairs of a directory and its result: a line for each, of a pixel where it is
    images; K against T; and of images also samples."""
    how = dict(data=16, schedule=10, objective=11, variance=11, predict=9, decoder=13)
    print("\n" + "".join(f"{name:<{width}}" for name, width in how.items()) +
          f"{'T':>5}{'K':>12}{'+-':>8}{'K*':>10}{'K - L_null':>12}{'bits/dim':>10}{'discrete':>10}"
          f"{'Frechet':>9}{'seconds':>9}")
    evaluated = sorted(evaluated, key=lambda pair: [
        pair[1][name] for name in ("dataset", "schedule", "objective", "timesteps")])
    for _, r in evaluated:
        r = r | dict(data=pathlib.Path(r["dataset"]).name[:15])
        if "L_T_bits" in r:
            r["discretised_bits_per_dim"] = r.pop("bits_per_dim")
        K, gained = (r[f"K{end}"] / r["pixels"] for end in ("_bits", "_minus_L_null_bits"))
        se = math.nan if r["K_bits_se"] is None else r["K_bits_se"] / r["pixels"]
        K_star, bits, discrete, frechet = (f"{r[key]:.4f}" if key in r else "-" for key in (
            "K_star_bits", "bits_per_dim", "discretised_bits_per_dim", "frechet"))
        print("".join(f"{r[name]:<{width}}" for name, width in how.items()) +
              f"{r['timesteps']:>5}{K:>12.4f}{se:>8.4f}{K_star:>10}{gained:>12.4f}{bits:>10}"
              f"{discrete:>10}{frechet:>9}{r['seconds']:>9.0f}")
    folder = pathlib.Path("runs")
    folder.mkdir(exist_ok=True)
    figures.comparison([r for _, r in evaluated], folder / "comparison.png")
    images = [(out, r) for out, r in evaluated if "frechet" in r]
    if images:
        figures.beside_each_other(images, folder / "comparison-samples.png")
    print(folder / "comparison.png", *[folder / "comparison-samples.png"] * bool(images), sep=", ")
