"""Train a diffusion model and evaluate it: data -> model -> checkpoint, log, numbers, pictures.

    python train.py                                  # swiss roll, about a minute
    python train.py --schedule learned               # the same, and beta_t is learned with it
    python train.py --dataset heartbeat              # bits: the binomial diffusion
    python train.py --dataset mnist                  # 20 minutes on two cores
    python train.py --dataset mnist --gpu
    python train.py --dataset my_pictures --crop 64  # your own: a folder, .npy, .npz, IDX, CIFAR-10
    python train.py --resume runs/mnist              # go on where it was stopped, bit for bit
    python train.py --evaluate runs/mnist            # every number and picture of a trained model
    python train.py --evaluate runs/a runs/b         # of several: also K against T and schedule
    python train.py --benchmark                      # images/s, and how near the machine's limit
    mpirun -n 2 python train.py --dataset mnist      # on more than one machine, with mpi4py
"""
import signal

if __name__ == "__main__":  # Ctrl-C while modules are loaded ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dpm  # before numpy: it keeps BLAS to one thread

import argparse
import contextlib
import csv
import functools
import json
import math
import os
import pathlib
import platform
import statistics
import sys
import time
import traceback
import warnings

import numpy as np
from scipy.special import logsumexp
from tqdm import tqdm

import data
from data import figures

LN2 = math.log(2)
SAVE_EVERY = 30  # seconds between checkpoints
IMAGE_STEPS = 250  # of the T steps, for free samples of images: nobody sees a difference to all
QUARTERS = [f"K_quarter_{i}_bits" for i in (1, 2, 3, 4)]
COLUMNS = ["step", "seconds", "K_minus_L_null_bits", *QUARTERS]

# What is right for vectors (H W = 1), for images, and for bits, where no flag says otherwise
DEFAULTS = {"vector": dict(steps=9500, batch_size=1024, lr=4e-3, timesteps=40, schedule="logsnr"),
            "image": dict(steps=10000, batch_size=16, lr=3e-3, timesteps=1000, schedule="logsnr",
                       objective="focused")}
BITS = {"vector": dict(steps=12000, batch_size=512, lr=4e-3, timesteps=2000, schedule="cosine"),
        "image": dict(steps=10000, batch_size=16, lr=3e-3, timesteps=1000, schedule="cosine")}
ALWAYS = dict(rate=None, objective="K", variance="learned", predict="v", decoder="dequantised",
              network=None, widths=None, seed=0, dtype="float32", crop=None, resize=None,
              flips=False)
SIZES = {"mlp": dict(width=128, layers=3, scales=(0, 1, 2, 3, 4, 5), time=64),
         "unet": dict(widths=(32, 64, 128), blocks=1, head=64, scales=(1, 3, 5)),
         "paper": dict(maps=8, hidden=256, width=64, bumps=10)}
# What a checkpoint says of its run, by type
TOLD = {str: "dataset digest device network schedule objective variance predict decoder",
        bool: "bytes binary", int: "seed steps batch_size timesteps trained_steps",
        (int, float): "lr seconds", (int, float, type(None)): "rate crop resize flips",
        (list, type(None)): "widths"}
FIXED = ("dataset", "batch_size", "lr", "timesteps", "schedule", *ALWAYS)  # for a run's life


class Parser(argparse.ArgumentParser):
    """A page of help that fits a screen, and errors of one line."""

    def __init__(self, script, page):
        super().__init__(usage=f"python {script} [flags]", description=page, add_help=False,
                         formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                             prog, max_help_position=23, width=100))

    def error(self, message):
        raise dpm.InputError(f"{message}; see --help")


def arguments():
    p = Parser("train.py", __doc__)
    v, i, b = DEFAULTS["vector"], DEFAULTS["image"], BITS["vector"]
    show = lambda name: f"[{v[name]} | {i[name]} | {b[name]}]"
    g = p.add_argument_group("what to do")
    g.add_argument("--dataset", metavar="NAME|PATH", help="swissroll, heartbeat, mnist, "
                   "deadleaves, gravel, or a file or folder [swissroll]")
    g.add_argument("--gpu", action=argparse.BooleanOptionalAction, help="use CuPy [if it works]")
    g.add_argument("--out", metavar="DIR", help="the run's directory [runs/<dataset>, -2, -3, ...]")
    g.add_argument("--resume", metavar="DIR", nargs="?", const="",
                   help="go on with a run; of the training flags only --steps may differ")
    g.add_argument("--no-evaluate", action="store_true", help="only train")
    g.add_argument("--evaluate", metavar="DIR", nargs="+", help="only evaluate runs or checkpoint "
                   "files; with --steps S ... also chains of S steps")
    g.add_argument("--parzen", action="store_true", help="with --evaluate: the paper's Table 2")
    g.add_argument("--benchmark", action="store_true", help="only measure the speed [mnist]")
    g = p.add_argument_group("training; defaults in brackets: vectors | images | binary vectors")
    g.add_argument("--steps", metavar="N", type=int, nargs="+",
                   help=f"gradient steps {show('steps')}")
    g.add_argument("--batch-size", metavar="N", type=int,
                   help=f"examples in a step {show('batch_size')}")
    g.add_argument("--lr", metavar="X", type=float,
                   help=f"peak learning rate of Adam {show('lr')}")
    g.add_argument("--seed", metavar="N", type=int, help="of weights, batches and noise [0]")
    g.add_argument("--threads", metavar="N", type=int, help="of a process [its part of the cores]")
    g.add_argument("--dtype", metavar="TYPE", choices=["float32", "float64"],
                   help="of the network: float32, float64 [float32]")
    g.add_argument("--crop", metavar="S", type=int, help="random S x S crops of larger pictures")
    g.add_argument("--resize", metavar="S", type=int, help="resize pictures to S x S")
    g.add_argument("--flips", action="store_true", default=None, help="mirror pictures at random")
    g = p.add_argument_group("the model")
    g.add_argument("--network", metavar="NAME", choices=dpm.NETWORKS,
                   help="mlp for vectors, unet for images, or the paper's: paper")
    g.add_argument("--widths", metavar="N", type=int, nargs="+",
                   help="channels of the U-Net, from fine to coarse [32 64 128]")
    g.add_argument("--timesteps", metavar="T", type=int,
                   help=f"steps of the diffusion {show('timesteps')}")
    schedules = "logsnr", "paper", "linear", "cosine", "learned"
    g.add_argument("--schedule", metavar="NAME", choices=schedules,
                   help=f"of beta_t: {', '.join(schedules)} [logsnr; bits: cosine]")
    g.add_argument("--objective", metavar="NAME", choices=["K", "focused", "simple", "mean"],
                   help="what training descends: K, focused, simple, mean [K | focused | K]")
    g.add_argument("--variance", metavar="NAME", choices=["learned", "beta", "posterior"],
                   help="f_sigma: learned, beta, posterior [learned]")
    g.add_argument("--predict", metavar="NAME", choices=["v", "eps"],
                   help="what the network prints: v, eps [v]")
    g.add_argument("--decoder", metavar="NAME", choices=["dequantised", "discretised"],
                   help="of bytes: dequantised, discretised [dequantised]")
    g.add_argument("--rate", metavar="X", type=float, help="of ones in pi, for bits [the data's]")
    g.add_argument("--help", "-h", action="help", help="this page")
    return p.parse_args()


def settings(args, dataset):
    """The run's settings: what the flags say, and the defaults for this kind of data."""
    kind = "vector" if dataset.shape[:2] == (1, 1) else "image"
    chosen = ALWAYS | (BITS if dataset.binary else DEFAULTS)[kind]
    given = {name: value for name, value in vars(args).items()
             if name in chosen and value is not None}
    chosen |= given | dict(steps=args.steps[0] if args.steps else chosen["steps"])
    if chosen["network"] is None:
        chosen["network"] = "mlp" if kind == "vector" else "unet"
    if chosen["schedule"] == "learned" and "objective" not in given:
        chosen["objective"] = "K"
    if chosen["network"] == "paper" and "predict" not in given:
        chosen["predict"] = "paper"
    check(args, chosen, dataset)
    sizes = SIZES[chosen["network"]] | (dict(widths=chosen["widths"]) if chosen["widths"] else {})
    if dataset.binary:
        sizes.pop("scales", None)
    elif chosen["network"] != "paper":
        sizes["edges"] = dataset.edges
    return dict(dataset=dataset.name, bytes=dataset.bytes, binary=dataset.binary,
                digest=dataset.digest, sizes=sizes, **chosen)


def check(args, chosen, dataset):
    """InputError for the first rule that the settings of a run break."""
    c, name, threads = chosen, dataset.name, args.threads
    paper, learned = c["network"] == "paper", c["schedule"] == "learned"
    usual = dict(objective="K", variance="learned", predict="v", decoder="dequantised")
    numbers_only = [flag for flag in usual if c[flag] not in (usual[flag], "paper")]
    numbers_only += ["schedule"] * learned + [""]
    rules = [
        (args.steps and len(args.steps) > 1,
         "several --steps go with --evaluate; a training has one number of steps"),
        (not 0 < c["steps"] <= 10 ** 9, f"--steps must be 1 to a billion, not {c['steps']}"),
        (not 0 < c["batch_size"] <= 10 ** 6,
         f"--batch-size must be 1 to a million, not {c['batch_size']}"),
        (not 0 < c["lr"] < math.inf, f"--lr must be a positive number, not {c['lr']}"),
        (not 2 <= c["timesteps"] <= 10 ** 6,
         f"--timesteps must be 2 to a million, not {c['timesteps']}"),
        (threads is not None and not 1 <= threads <= 1024,
         f"--threads must be 1 to 1024, not {threads}"),
        (c["seed"] < 0, f"--seed must not be negative, as {c['seed']} is"),
        (dataset.binary and numbers_only[0],
         f"--{numbers_only[0]} is for numbers; {name} is made of bits"),
        (not dataset.binary and c["rate"] is not None,
         f"--rate is for bits; {name} is made of numbers"),
        (learned and c["objective"] != "K", "--schedule learned ascends K: omit --objective"),
        (learned and c["decoder"] != "dequantised",
         "--schedule learned needs the fixed first step: omit --decoder"),
        (c["decoder"] == "discretised" and not dataset.bytes,
         f"--decoder discretised is for bytes; {name} has none"),
        (paper and c["predict"] == "eps",
         "--network paper prints what eqs. 64 and 65 say: omit --predict"),
        (paper and c["objective"] in ("simple", "mean"),
         "--network paper can't weigh its mean alone: omit --objective"),
        (paper and c["variance"] != "learned",
         "--network paper has its own variance, eq. 64: omit --variance"),
        (c["widths"] and c["network"] != "unet",
         f"--widths are those of a U-Net, and the network is {c['network']}"),
        (c["widths"] and not all(0 < width <= 4096 for width in c["widths"]),
         f"--widths must be 1 to 4096, not {c['widths']}"),
        (c["network"] == "mlp" and dataset.shape[:2] != (1, 1),
         f"--network mlp is for vectors; {name} holds images"),
    ]
    for broken, message in rules:
        if broken:
            raise dpm.InputError(message)


def new_model(dataset, chosen, xp, comm=None, threads=None):
    """beta_1 is the variance of the smallest detail there is to model. A bit has none: it is
    forgotten once in 1e5, or as often as the paper's schedule says for t = 1."""
    T, kind, shift, scale = chosen["timesteps"], chosen["schedule"], dataset.shift, dataset.scale
    if dataset.binary:
        alpha_bar = dpm.schedule(kind, T, 1 / T if kind == "paper" else 1e-5)
        rate = dataset.mean if chosen["rate"] is None else chosen["rate"]
        q = dpm.Binomial(alpha_bar, xp, rate, dataset.mean)
    else:
        options, detail = dict(variance=chosen["variance"]), dataset.detail
        if chosen["decoder"] == "discretised":  # a third of a grey level: the decoder does the rest
            ends = tuple((level - shift) / scale for level in (0.5, 255.5))
            options, detail = options | dict(half=0.5 / scale, ends=ends), 1 / 3 / scale
        alpha_bar = dpm.schedule("logsnr" if kind == "learned" else kind, T, detail ** 2)
        q = dpm.Gaussian(alpha_bar, xp, **options)
    return dpm.build(q, dataset.shape, chosen["network"], chosen["sizes"], chosen["predict"],
                     kind == "learned", shift=shift, scale=scale, about=chosen, comm=comm,
                     threads=threads, dtype=chosen["dtype"], seed=chosen["seed"])


def optimiser_options(chosen):
    return dict(lr=chosen["lr"], steps=chosen["steps"], warmup=min(200, chosen["steps"] // 10 + 1))


def train(model, adam, dataset, out):
    """The loop. Everything random in step s depends on (seed, s) alone, so that a resumed run makes
    the same steps."""
    xp, about, T, D, q = model.xp, model.about, model.T, model.D, model.diffusion
    number, steps, seed = about["batch_size"], about["steps"], about["seed"]
    log_every, leads = max(1, steps // 200), model.comm.rank == 0
    tables, mean = dpm.objective(about["objective"], q), xp.full((1, D), dataset.mean)
    checkpoint, stopped, saved_step, recent, norm = out / "checkpoint.npz", [], 0, [], 0.0
    unlogged = np.array(about.get("unlogged", [0.0] * 6))  # sums since the last line of the log
    begun, saved_at = time.perf_counter() - about.get("seconds", 0.0), -math.inf

    def add_up():
        for t, kl in recent:
            t, kl = dpm.to_host(t), dpm.to_host(kl)
            quarter = np.clip((t - 2) * 4 // (T - 1), 0, 3)
            unlogged[:] += [len(kl), kl.sum(), *(kl[quarter == i].sum() for i in range(4))]
        recent.clear()

    def save():
        add_up()
        about.update(trained_steps=adam.step, seconds=round(time.perf_counter() - begun, 1),
                     device=device_name(xp), unlogged=unlogged.tolist())
        if leads:
            dpm.save(model, checkpoint, adam)

    def check_finite(norm):
        if not math.isfinite(norm):
            kept = f"{checkpoint} keeps step {saved_step}"
            kept = kept if saved_step else "nothing was saved yet"
            raise dpm.InputError(f"step {adam.step}: the gradient of the loss is {float(norm)}; "
                                 f"{kept}; try a smaller --lr than {about['lr']}")

    handlers = {s: signal.signal(s, lambda *_: stopped.append(True))
                for s in (signal.SIGINT, signal.SIGTERM)}
    with bar(None, "train", total=steps * number, initial=adam.step * number,
             unit=noun(dataset)[:-1], unit_scale=True) as shown:
        while adam.step < steps and not model.comm.sum(np.array([len(stopped)]))[0]:
            rng = dpm.generator(dataset.xp, "batch", seed, adam.step)
            x0 = xp.asarray(dataset.draw(number, rng, model.dtype))
            recent.append(model.gradient(x0, seed, adam.step, tables=tables))
            norm = model.step(adam)
            shown.update(number)
            line_is_due = adam.step % log_every == 0 or adam.step == steps
            if xp is np or line_is_due:  # so as not to wait for a GPU at every step
                check_finite(norm)
            if line_is_due:
                add_up()
                examples, kl, *quarters = unlogged
                climbed = gain(model.diffusion, mean, D) - kl / examples
                row = [adam.step, f"{time.perf_counter() - begun:.1f}", f"{climbed / LN2:.5g}",
                       *(f"{-quarter / examples / LN2:.5g}" for quarter in quarters)]
                if leads:
                    log(out / "log.csv", row)
                shown.set_postfix_str(progress_note(model, climbed), refresh=False)
                unlogged[:] = 0
                if time.perf_counter() - saved_at > SAVE_EVERY:
                    save()
                    saved_at, saved_step = time.perf_counter(), adam.step
    check_finite(norm)
    save()
    stop = model.comm.sum(np.array([len(stopped)]))[0]  # no rank goes on before the checkpoint is
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop:
        if leads:
            print(f"stopped at step {adam.step}; go on with: python train.py --resume {out}")
        sys.exit(130)


def log(path, row):
    try:
        with open(path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; {path} cannot be written") from None


def gain(q, mean, D):
    """What K - L_null would be if every KL were 0, for data of this mean (1, D) and variance 1."""
    null = float(q.log_null(mean)[0]) - (0 if isinstance(q, dpm.Binomial) else 0.5 * D)
    if q.discretised:
        return -float(q.from_pi(q.T, mean + 1)[0]) - null
    ones = mean if isinstance(q, dpm.Binomial) else mean + 1  # second moment 1
    return float((q.H_q(q.T, mean) - q.H_q(1, mean) - q.H_p(ones))[0]) - null


def progress_note(model, climbed):
    note = f"K - L_null {climbed / LN2:.4g} bits"
    if model.about["bytes"]:
        null = 0.5 * math.log2(2 * math.pi * math.e)
        note += f", {math.log2(model.scale) + null - climbed / LN2 / model.D:.3f} bits/dim"
    return note


# ------------------------------------------------------------------------------------------------
# Evaluation
# ------------------------------------------------------------------------------------------------

def evaluate(path, gpu, chains=(), parzen=False, comm=None):
    """Every number and picture of a trained model: result.json and pictures beside its checkpoint,
    and a page on the terminal. Returns their directory and the numbers."""
    checkpoint = checkpoint_in(path)
    model = load(checkpoint, dpm.backend(gpu), comm)
    dataset, about, T, D, q = load_for(model), model.about, model.T, model.D, model.diffusion
    shorter, leads = [model.shortened(S) for S in chains], model.comm.rank == 0
    out = checkpoint.parent
    if checkpoint.name != "checkpoint.npz":
        out = pathlib.Path("runs") / f"{checkpoint.absolute().parent.name}-{checkpoint.stem}"
    image, started = model.shape[:2] != (1, 1), time.perf_counter()
    if parzen and not (image and dataset.bytes and dataset.train is not None):
        raise dpm.InputError("--parzen is for images of bytes, whole and from a file, and "
                             f"{about['dataset']} has none")
    # Enough for a standard error below 0.01 bits/dim, and every t is drawn equally often
    x0 = dataset.held_out(10_000 if image else 16_000)
    draws = min(T - 1, max(5 if image else 40, -(-2 * T // len(x0))))
    if leads:
        writable(out / "result.json")
        print(f"evaluating {checkpoint} on {device_name(model.xp)}", flush=True)

    def bound(of, x0, desc="bound"):
        return of.bound(x0, dpm.generator(np, "bound"), draws, progress=progress(desc))

    found, (lower, upper) = bound(model, x0), dpm.entropy_bounds(q, x0)
    finite(found["K"], "the bound")
    told = "dataset network objective variance predict decoder schedule seconds device"
    result = {name: about[name] for name in told.split()}
    result |= dict(examples=len(x0), timesteps=T, steps=about["trained_steps"], dimension=D,
                   pixels=D // model.shape[2], shift=model.shift, scale=model.scale)
    result |= {f"{name.replace('_se', '')}_bits{'_se' * name.endswith('_se')}": found[name] / LN2
               for name in ("K", "K_se", "L_null", "K_minus_L_null", "K_minus_L_null_se", "H_q_T",
                            "H_q_1", "H_p_T", "L_T") if name in found}
    result["kl_bits"] = (found["kl"] / LN2).tolist()
    for name, H in (("lower", lower), ("model", found["entropy"]), ("upper", upper)):
        result[f"entropy_{name}_bits"] = float(np.nansum(H[2:])) / LN2
    if dataset.bytes:
        result |= bits_per_dim(result, D, model)
    some, curves = x0[:1000 if image else 4000], {"the model": found["kl"]}
    if not dataset.binary:
        for variance in ("learned", "beta", "posterior"):
            other = dpm.Gaussian(q.alpha_bar, model.xp, **dict(q.config, variance=variance))
            K = bound(model._with(other), some, f"bound, variance {variance}")["K"]
            result[f"K_{variance}_bits"] = K / LN2
    if dataset.truth:
        truth, curves["the ideal kernel"] = beside_the_truth(model, dataset, x0, found, bound)
        result |= truth
        result |= dict(K_star_bits=result["K_bits"] + truth["K_star_minus_K_bits"],
                       K_star_bits_se=math.hypot(result["K_bits_se"],
                                                 truth["K_star_minus_K_bits_se"]))
    if image:
        result |= sample_measure(model, dataset)
    for short in shorter:
        row = dict(steps=short.T, K_bits=bound(short, some, f"bound, {short.T} steps")["K"] / LN2)
        if image:
            row |= bits_per_dim(row, D, model) if dataset.bytes else {}
            row |= sample_measure(model, dataset, short.T)
        result.setdefault("chains", []).append(row)
    if parzen:
        result |= parzen_estimate(model, dataset)
    result["evaluation_seconds"] = round(time.perf_counter() - started, 1)
    if leads:
        alone = model._with(q)
        alone.comm = dpm.Alone()  # the other ranks don't draw
        table = draw(alone, dataset, found, curves, (lower, upper), result, out)
        with dpm.written_whole(out / "result.json") as part:
            part.write_text(json.dumps(result, indent=1))
        print_page(result, table, image, dataset.binary)
        print(f"{out}: result.json, {', '.join(sorted(p.name for p in out.glob('*.png')))}")
    return out, result


def beside_the_truth(model, dataset, x0, found, bound):
    """What is known of data whose density is known: L, K* - K, and estimates of log p(x_0) by S
    trajectories (bits); and the KLs of the ideal kernel (nats)."""
    q, moments, few = model.diffusion, dataset.truth.moments, len(x0)
    if dataset.binary:
        moments = functools.partial(moments, rate=q.rate)
    else:
        few = max(500, 4000 * 2000 // len(dataset.truth.centres))  # each is a sum over the centres
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


def finite(values, name):
    """InputError if the model has run to infinity, as it does with weights that are of no use."""
    if not np.isfinite(values).all():
        raise dpm.InputError(f"{name} of this model: not finite; train it longer, or anew with a "
                             "smaller --lr")


def bits_per_dim(r, D, model):
    """Of the bytes: K of the normalised density, or of a discretised decoder's probabilities."""
    unit = 0.0 if model.diffusion.discretised else math.log2(model.scale)
    return {"bits_per_dim" + end: abs(shift - r["K_bits" + end] / D)
            for end, shift in (("", unit), ("_se", 0.0)) if "K_bits" + end in r}


def sample_measure(model, dataset, steps=50, number=500):
    """How far samples are from training images, and test images as many, see dpm.frechet."""
    steps = min(steps, model.T)
    samples = model.sample(number, 1, steps, progress=progress(f"{number} samples"))
    finite(samples, "samples")
    train, test = dataset.draw(5000, dpm.generator(np, "frechet")), dataset.held_out(number)
    return dict(frechet=dpm.frechet(train, samples), frechet_test=dpm.frechet(train, test),
                frechet_steps=steps)


def parzen_estimate(model, dataset, number=10_000, valid=1000):
    """The paper's Table 2 for MNIST: the log density, in bits of pixels in [0, 1], of the test
    images under Gaussians around `number` samples. Their width is the best of ten for the last
    1,000 training images."""
    samples = model.sample(number, 1, min(100, model.T), batch=200,
                           progress=progress("Parzen samples", leave=True))
    centres, by_width = figures.to_bytes(model, samples).reshape(number, -1) / 255, {}
    for sigma in bar(np.logspace(-1, 0, 10), "Parzen widths", leave=False):
        mixture = data.Mixture(centres, sigma)
        by_width[sigma] = mixture.log_density(dataset.train[-valid:] / 255).mean()
    sigma = max(by_width, key=by_width.get)
    each = data.Mixture(centres, sigma).log_density(dataset.test / 255) / LN2
    return dict(parzen_bits=float(each.mean()), parzen_sigma=float(sigma),
                parzen_bits_se=float(each.std()) / math.sqrt(len(each)))


def draw(model, dataset, found, curves, entropies, result, out):
    """All pictures of an evaluation; returns the table of rate and distortion of bytes."""
    T, D, table = model.T, model.D, []
    figures.curve(out / "log.csv", out / "training.png")
    figures.by_t(T, curves, "KL, bits", "where the bound is lost: KL[q || p] of every step",
                 out / "kl.png", yscale="log")
    by_name = {"upper bound": entropies[1] / D, "the model's": found["entropy"] / D,
               "lower bound": entropies[0] / D}
    figures.by_t(T, by_name, "bits per dimension", "entropy of the reverse steps, eq. 24",
                 out / "entropy.png")
    if model.learned:
        figures.schedule(model, out / "schedule.png")
    if model.shape[:2] != (1, 1):
        samples = model.sample(64, model.about["seed"], min(T, IMAGE_STEPS),
                               progress=progress("samples"))
        figures.save_picture(figures.grid(figures.to_bytes(model, samples)), out / "samples.png")
        if dataset.bytes:
            table = figures.rate_distortion(found, D, model.scale, out / "rate.png")
        if not dataset.binary:
            figures.figure_3(model, dataset, out / "figure3.png")
    elif dataset.binary:
        figures.figure_2(model, out / "figure2.png")
    elif dataset.truth:
        figures.figure_1(model, dataset, out / "figure1.png")
    else:
        sets = {"held out": dataset.held_out(2000),
                "samples": model.sample(2000, model.about["seed"], batch=1000)}
        figures.save_picture(figures.points_picture(model, sets), out / "samples.png")
    if dataset.truth:
        x0 = model.xp.asarray(dataset.held_out(500))
        figures.forgetting(model.diffusion, x0, out / "forgetting.png")
    if result.get("chains"):
        figures.against_steps(result["chains"], out / "steps.png")
    return table


def print_page(r, table, image, binary):
    """The numbers of result.json for people."""
    unit = "bits/pixel" if image else "bits/sequence" if binary else "bits/point"
    if not binary and "L_T_bits" not in r:
        unit += " of normalised data (variance 1)"
    per, steps = r["pixels"] if image else 1, f"t = 2..{r['timesteps']}"

    def line(name, value, se=None, note="", digits=4):
        error = " " * 10 if se is None else f" +- {se:.{digits}f}"
        print(f"  {name:<22}{value:12.{digits}f}{error}  {note}")

    def row(name, key, note="", sign=1):
        se = r.get(f"{key}_se")
        line(name, sign * r[key] / per, None if se is None else se / per, note)

    print(f"\n{r['dataset']}, T = {r['timesteps']}, {r['schedule']} schedule, network "
          f"{r['network']}, trained on {r['objective']}; {r['examples']} held-out examples; {unit}")
    row("K", "K_bits", "lower bound on the mean log likelihood (eq. 14)")
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
        print("K of some of the examples, by f_sigma, from the same network")
        for variance in ("learned", "beta", "posterior"):
            row(variance, f"K_{variance}_bits")
    print(f"entropy of the reverse steps, sum over {steps} (eq. 24)")
    for name in ("upper", "model", "lower"):
        row("the model's" if name == "model" else f"{name} bound", f"entropy_{name}_bits")
    if "estimate_1_bits" in r:
        print(f"log p(x_0) of {r['estimate_examples']} examples from S trajectories each "
              "(eqs. 6-9): L_1 is K in the mean")
        for S in (1, 10, 100, 1000):
            gap, se = (r[f"L_minus_estimate_{S}_bits{end}"] for end in ("", "_se"))
            row(f"L_{S}", f"estimate_{S}_bits", f"L - L_{S} = {gap:.4f} +- {se:.4f}")
        row("L of these", "estimate_L_bits")
    if "bits_per_dim" in r:
        kind = "discrete" if "L_T_bits" in r else "dequantised"
        print("in the units of later papers")
        line("bits/dim", r["bits_per_dim"], r["bits_per_dim_se"],
             f"of the 8-bit values, {kind}: a bound on code length")
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
    """Several runs, pairs of a directory and its result: a line for each; K against T; and of
    images also samples."""
    how = dict(data=16, schedule=10, objective=11, variance=11, predict=9, decoder=13)
    print("\n" + "".join(f"{name:<{width}}" for name, width in how.items()) +
          f"{'T':>5}{'K':>12}{'+-':>8}{'K*':>10}{'K - L_null':>12}{'bits/dim':>10}{'Frechet':>9}"
          f"{'seconds':>9}")
    evaluated = sorted(evaluated, key=lambda pair: [
        pair[1][name] for name in ("dataset", "schedule", "objective", "timesteps")])
    for _, r in evaluated:
        K_star, bits, frechet = (f"{r[key]:.4f}" if key in r else "-"
                                 for key in ("K_star_bits", "bits_per_dim", "frechet"))
        words = r | dict(data=pathlib.Path(r["dataset"]).name)
        print("".join(f"{words[name]:<{width}}" for name, width in how.items()) +
              f"{r['timesteps']:>5}{r['K_bits']:>12.4f}{r['K_bits_se']:>8.4f}{K_star:>10}"
              f"{r['K_minus_L_null_bits']:>12.4f}{bits:>10}{frechet:>9}{r['seconds']:>9.0f}")
    runs = pathlib.Path("runs")
    figures.comparison([r for _, r in evaluated], runs / "comparison.png")
    figures.beside_each_other([(out, r) for out, r in evaluated if "frechet" in r],
                              runs / "comparison-samples.png")
    print(f"{runs / 'comparison.png'}, and of images {runs / 'comparison-samples.png'}")


def benchmark(args):
    """Training and sampling speed of the model that --dataset would train, beside a plain matrix
    product."""
    xp, dataset = dpm.backend(args.gpu), data.load(args.dataset or "mnist", args.crop, args.resize)
    chosen = settings(args, dataset)
    model = new_model(dataset, chosen, xp)
    dataset.to(xp)
    adam = model.adam(**optimiser_options(chosen))
    sync = xp.cuda.Device().synchronize if xp is not np else lambda: None
    number, size = chosen["batch_size"], 1536 if xp is np else 8192

    def clock(work, runs):
        times = []
        for i in range(runs + 2):
            sync()
            start = time.perf_counter()
            work(i)
            sync()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def step(i):
        x0 = dataset.draw(number, dpm.generator(dataset.xp, "batch", 0, i), model.dtype)
        model.gradient(xp.asarray(x0), 0, i)
        model.step(adam)

    rng = np.random.default_rng(0)
    a = [xp.asarray(rng.standard_normal((size, size), dtype=model.dtype)) for _ in model.tapes]
    b = [xp.empty_like(x) for x in a]
    product = lambda _: list(model.pool.map(lambda x, y: xp.matmul(x, x, out=y), a, b))
    # The machine's speed drifts: rate and step are measured in turn
    rounds = [(2 * len(a) * size ** 3 / clock(product, 3) / 1e9, clock(step, 5)) for _ in range(5)]
    for tape in model.tapes:
        tape.flop = 0
    step(0)
    gflop = sum(tape.flop for tape in model.tapes) / 1e9
    rate, seconds = (statistics.median(column) for column in zip(*rounds))
    share = statistics.median(gflop / s / r for r, s in rounds)
    x = xp.asarray(dataset.held_out(64))
    reverse = clock(lambda i: model.p_back(x, 2), 15)
    print(f"{dataset.name} on {device_name(xp)}, {chosen['dtype']}\n"
          f"  weights                  {model.theta.size:,}\n"
          f"  a step of {number:<5}          {seconds * 1e3:.1f} ms, {number / seconds:,.0f} "
          f"{noun(dataset)}/s\n"
          f"  its matrix products      {gflop:.2f} GFLOP, {gflop / seconds:,.0f} GFLOP/s\n"
          f"  a plain product          {rate:,.0f} GFLOP/s ({len(a)} x {size}^3 at once); the step "
          f"runs at {share:.0%} of it\n"
          f"  a reverse step of {len(x):<6} {reverse * 1e3:.2f} ms")
    with contextlib.suppress(ImportError):  # not on Windows
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        gib = peak / 2 ** (20 if platform.system() == "Linux" else 30)
        print(f"  peak memory              {gib:.2f} GiB")


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------

class Lines:
    """A file for tqdm where the output is not a terminal: every state of the bar is a line."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def bar(iterable, desc, **options):
    """A progress bar; in a file a line a minute. Of several ranks the first has one."""
    if not sys.stderr.isatty():
        options |= dict(delay=60, mininterval=60, maxinterval=60, miniters=1, file=Lines(),
                        ncols=100)
    return tqdm(iterable, desc=desc, dynamic_ncols=sys.stderr.isatty(), disable=mpi_rank() > 0,
                **options)


def progress(desc, leave=False):
    """A function that shows a bar for what it is given, for dpm's `progress`."""
    return lambda steps: bar(steps, desc, leave=leave)


def mpi_rank():
    """Which process of an MPI run this is; 0 where there is only this one."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi.COMM_WORLD.Get_rank() if mpi else 0


def ranks(xp):
    """The processes of an MPI run, or None where there is only this one."""
    if not {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & set(os.environ):  # what mpirun sets
        return None
    try:
        return dpm.Ranks(xp)
    except ImportError as error:
        raise dpm.InputError("mpirun: several processes need mpi4py: pip install mpi4py "
                             f"({dpm.first_line(error)})") from None


def noun(dataset):
    return "images" if dataset.shape[:2] != (1, 1) else "sequences" if dataset.binary else "points"


def checkpoint_in(path):
    """The checkpoint of the run in a directory; any other path is that of a checkpoint itself."""
    path = pathlib.Path(path)
    return path / "checkpoint.npz" if path.is_dir() else path


def newest_run():
    """The checkpoint in runs/ that was written last, or None."""
    found = pathlib.Path("runs").glob("*/checkpoint.npz")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def load(path, xp, comm=None):
    """The model in a checkpoint of this program."""
    model = dpm.load(path, xp, comm=comm)
    check_about(model.about, path)
    return model


def check_about(about, path):
    """InputError if a checkpoint doesn't say of its run what `train` writes."""
    for kind, names in TOLD.items():
        for name in names.split():
            if name not in about or not isinstance(about[name], kind):
                raise dpm.InputError(f"{path}: a damaged checkpoint, its {name} is "
                                     f"{str(about.get(name)):.50}")
    sums = about.get("unlogged", [0.0] * 6)
    if not (isinstance(sums, list) and len(sums) == 6 and all(isinstance(s, float) for s in sums)):
        raise dpm.InputError(f"{path}: a damaged checkpoint, its unlogged sums are {str(sums):.50}")


def load_for(model):
    """The data set that a model was trained on. InputError if it is gone or not what it was."""
    about = model.about
    dataset = data.load(about["dataset"], about["crop"], about["resize"], about["flips"])
    if (dataset.shape, dataset.digest) != (model.shape, about["digest"]):
        raise dpm.InputError(f"{about['dataset']} is not the data that the checkpoint was trained "
                             "on: it has changed")
    dataset.shift, dataset.scale = model.shift, model.scale
    dataset.dequantise = about["decoder"] == "dequantised"
    return dataset


def device_name(xp):
    if xp is not np:
        return xp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return f"{platform.machine()} CPU, {dpm.CORES} cores"


def writable(path):
    """OSError now, and not after the computing, if there is no room for a megabyte."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(LookupError), dpm.written_whole(path) as part:
        part.write_bytes(bytes(1 << 20))
        raise LookupError("enough: nothing is put in its place")


@contextlib.contextmanager
def locked(out):
    """Keeps a second process out of a run's directory. The lock ends with the process."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as file:
        with contextlib.suppress(ImportError):  # not on Windows
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise dpm.InputError(f"{out} is in use by another process; wait for it, or choose "
                                     "another --out") from None
        yield


def free_directory(name):
    """runs/<name>, or runs/<name>-2, -3, ... where that is taken."""
    stem = pathlib.Path(name).stem if os.sep in name else name.replace(":", "-")
    places = (pathlib.Path("runs") / (stem + (f"-{i}" if i > 1 else "")) for i in range(1, 10 ** 6))
    return next(place for place in places if not place.exists())


def start(args, comm):
    """A new run: its model, its optimiser, its data, its directory."""
    xp = dpm.backend(args.gpu)
    if args.out is not None and not args.out.strip():
        raise dpm.InputError("--out: give the name of a directory, or omit the flag")
    if args.out and (pathlib.Path(args.out) / "checkpoint.npz").exists():
        raise dpm.InputError(f"--out {args.out} holds another run; choose a new directory, or go "
                             f"on with that run: --resume {args.out}")
    name = "swissroll" if args.dataset is None else args.dataset
    dataset = data.load(name, args.crop, args.resize, bool(args.flips))
    chosen = settings(args, dataset)
    dataset.dequantise = chosen["decoder"] == "dequantised"
    model = new_model(dataset, chosen, xp, comm, args.threads)
    out = pathlib.Path(args.out) if args.out else free_directory(dataset.name)
    return model, model.adam(**optimiser_options(chosen)), dataset, out


def resume(args, comm):
    """A stopped run, as its last checkpoint has it. Of the training flags only --steps may differ.
    """
    newest = newest_run()
    if not (args.resume or args.out or newest):
        raise dpm.InputError("--resume: there is no run in runs/; give a run's directory")
    out = pathlib.Path(args.resume or args.out or newest.parent)
    model, adam = dpm.resume(out / "checkpoint.npz", dpm.backend(args.gpu), comm)
    check_about(model.about, out / "checkpoint.npz")
    dataset = load_for(model)
    shares = model.threads * model.comm.size
    if args.threads and args.threads * model.comm.size != shares and model.xp is np:
        raise dpm.InputError(f"{out} was started with {shares} shares of a batch, which are "
                             f"threads times ranks, not {args.threads * model.comm.size}; omit "
                             "--threads")
    if args.dataset is not None:
        args.dataset = data.load(args.dataset, args.crop, args.resize, bool(args.flips)).name
    for name in FIXED:
        if getattr(args, name, None) not in (None, model.about[name]):
            raise dpm.InputError(f"{out} was started with --{name.replace('_', '-')} "
                                 f"{model.about[name]}, not {getattr(args, name)}; omit the flag")
    if args.steps:
        model.about["steps"] = args.steps[0]
    check(args, model.about, dataset)
    if args.steps and args.steps[0] < max(1, adam.step):
        raise dpm.InputError(f"{out} has made {adam.step} steps already; --steps {args.steps[0]} "
                             "would be less")
    for name, value in optimiser_options(model.about).items():
        setattr(adam, name, value)
    return model, adam, dataset, out


def cut_log(path, step):
    """What was logged after the checkpoint will be computed, and logged, again."""
    rows = path.read_text().splitlines()[1:] if path.exists() else []
    kept = [row for row in rows if row.split(",")[0].isdigit() and int(row.split(",")[0]) <= step]
    with dpm.written_whole(path) as part:
        part.write_text("\n".join([",".join(COLUMNS), *kept, ""]))


def main():
    args = arguments()
    comm = ranks(dpm.backend(args.gpu))
    if args.parzen and not args.evaluate:
        raise dpm.InputError("--parzen goes with --evaluate DIR")
    if args.benchmark:
        return benchmark(args)
    if args.evaluate:
        given = [name for name in (*FIXED, "out", "resume", "threads", "no_evaluate")
                 if getattr(args, name, None) not in (None, False)]
        if given:
            flag = given[0].replace("_", "-")
            raise dpm.InputError(f"--evaluate takes a run as it is; omit --{flag}")
        evaluated = [evaluate(path, args.gpu, args.steps or (), args.parzen, comm)
                     for path in args.evaluate]
        return compare(evaluated) if len(evaluated) > 1 and mpi_rank() == 0 else None
    model, adam, dataset, out = (start if args.resume is None else resume)(args, comm)
    leads = model.comm.rank == 0
    model.comm.sum(np.zeros(1))  # all ranks have chosen the same free directory before one makes it
    with locked(out) if leads else contextlib.nullcontext():
        if leads:
            cut_log(out / "log.csv", adam.step)
            print(dataset.describe())
            print(f"{out}: {model.theta.size:,} weights, T = {model.T}, on "
                  f"{device_name(model.xp)}", flush=True)
        dataset.to(model.xp)
        if adam.step < model.about["steps"]:
            train(model, adam, dataset, out)
        if not args.no_evaluate:
            evaluate(out, args.gpu, comm=comm)
    if leads:
        image = noun(dataset) == "images"
        print(f"next: python sample.py --checkpoint {out}" + (" --inpaint" if image else ""))


def run(main):
    """The end of a script: what the user got wrong, or the disk, is one line and exit status 2."""
    def stop(*_):
        for number in (signal.SIGINT, signal.SIGTERM):  # once is enough
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's: what isn't finite, we say once
    status, message = 2, None
    try:
        return main()
    except (dpm.InputError, OSError) as error:
        message = f"error: {data.printable(str(error))}"
    except MemoryError:
        message = "error: not enough memory for this; choose smaller numbers"
    except KeyboardInterrupt:
        status, message = 130, "stopped"
    except Exception:
        if "mpi4py.MPI" not in sys.modules:
            raise
        status, message = 1, traceback.format_exc()
    time.sleep(mpi_rank() > 0)  # what all ranks find is said by the first
    print(message, file=sys.stderr, flush=True)
    if "mpi4py.MPI" in sys.modules:  # the other ranks would wait for this one for ever
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(status)
    sys.exit(status)


if __name__ == "__main__":
    run(main)
