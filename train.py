"""Train a diffusion model and evaluate it: data -> model -> checkpoint, log, numbers, pictures.

    python train.py                                  # swiss roll, two to four minutes
    python train.py --schedule learned               # the same, and beta_t is learned with it
    python train.py --dataset heartbeat              # bits: the binomial diffusion
    python train.py --dataset mnist                  # 25 minutes on two cores
    python train.py --dataset mnist --gpu
    python train.py --dataset my_pictures --crop 64  # your own: a folder, .npy, .npz, IDX, CIFAR-10
    python train.py --resume runs/mnist              # go on where it was stopped, bit for bit
    python train.py --evaluate runs/mnist            # every number and picture of a trained model
    python train.py --evaluate runs/a runs/b         # of several: also K against T and schedule
    python train.py --benchmark                      # images/s, and how near the machine's limit
    mpirun -n 2 python train.py --dataset mnist      # two processes, on one machine or several
"""
import signal

if __name__ == "__main__":  # Ctrl-C while modules are loaded ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dpm  # before numpy: it keeps BLAS to one thread

import argparse
import contextlib
import math
import pathlib
import sys
import time

import numpy as np

import data
from data import evaluation, figures, runs, speed

LN2 = math.log(2)
SAVE_EVERY = 30  # seconds between checkpoints, at least: they go with the lines of the log
COLUMNS = ["step", "seconds", "K_minus_L_null_bits"]

# What is right for vectors (H W = 1), for images, and for bits, where no flag says otherwise
DEFAULTS = {"vector": dict(steps=9500, batch_size=1024, lr=4e-3, timesteps=40, schedule="logsnr"),
            "image": dict(steps=10000, batch_size=32, lr=2e-3, timesteps=1000, schedule="logsnr",
                       objective="focused")}
BITS = {"vector": dict(steps=12000, batch_size=512, lr=4e-3, timesteps=2000, schedule="cosine"),
        "image": dict(steps=10000, batch_size=32, lr=2e-3, timesteps=1000, schedule="cosine")}
ALWAYS = dict(rate=None, objective="K", variance="learned", predict="v",
              decoder="dequantised", network=None, widths=None, seed=0, dtype="float32",
              crop=None, resize=None, flips=False)
SIZES = {"mlp": dict(width=128, layers=3, scales=(0, 1, 2, 3, 4, 5), time=64),
         "unet": dict(widths=(24, 48, 96), head=64, scales=(1, 3, 5)),
         "paper": dict(maps=8, hidden=256, width=64, bumps=10)}
FIXED = ("dataset", "batch_size", "lr", "timesteps", "schedule", *ALWAYS)  # for a run's life


def arguments():
    p = runs.Parser("train.py", __doc__)
    v, i, b = DEFAULTS["vector"], DEFAULTS["image"], BITS["vector"]
    show = lambda name: f"[{v[name]} | {i[name]} | {b[name]}]"
    g = p.add_argument_group("what to do")
    g.add_argument("--dataset", metavar="NAME|PATH", help="swissroll, heartbeat, mnist, "
                   "deadleaves, gravel, or a file or folder [swissroll]")
    g.add_argument("--gpu", action=argparse.BooleanOptionalAction, help="use CuPy [if it works]")
    g.add_argument("--out", metavar="DIR", help="the run's directory [runs/<dataset>, -2, -3, ...]")
    g.add_argument("--resume", metavar="DIR", nargs="?", const="",
                   help="go on with a run [the newest]; of the training flags only --steps may "
                   "differ")
    g.add_argument("--no-evaluate", action="store_true", help="only train")
    g.add_argument("--evaluate", metavar="DIR", nargs="+", help="only evaluate runs or checkpoint "
                   "files; --steps S ...: also shorter chains")
    g.add_argument("--parzen", action="store_true", help="with --evaluate: also the Parzen "
                   "estimate of the paper's Table 2")
    g.add_argument("--benchmark", action="store_true", help="only measure the speed [mnist]")
    g = p.add_argument_group("training; defaults in brackets: vectors | images | binary vectors")
    g.add_argument("--steps", metavar="N", type=int, nargs="+",
                   help=f"gradient steps {show('steps')}")
    g.add_argument("--batch-size", metavar="N", type=int,
                   help=f"examples in a step {show('batch_size')}")
    g.add_argument("--lr", metavar="X", type=float,
                   help=f"peak learning rate, see dpm.Optimiser {show('lr')}")
    g.add_argument("--seed", metavar="N", type=int, help="of weights, batches and noise [0]")
    g.add_argument("--threads", metavar="N", type=int, help="of a process, for training [its part "
                   "of the cores]")
    g.add_argument("--dtype", metavar="TYPE", choices=["float32", "float64"],
                   help="of the network: float32, float64 [float32]")
    g.add_argument("--crop", metavar="S", type=int, help="random S x S crops of larger pictures")
    g.add_argument("--resize", metavar="S", type=int, help="resize pictures to S x S")
    g.add_argument("--flips", action="store_true", default=None, help="mirror pictures at random")
    g = p.add_argument_group("the model")
    g.add_argument("--network", metavar="NAME", choices=dpm.NETWORKS,
                   help="mlp for vectors, unet for images, or the paper's: paper")
    g.add_argument("--widths", metavar="N", type=int, nargs="+",
                   help="channels of the U-Net, from fine to coarse [24 48 96]")
    g.add_argument("--timesteps", metavar="T", type=int,
                   help=f"steps of the diffusion {show('timesteps')}")
    schedules = *dpm.SCHEDULES, "learned"
    g.add_argument("--schedule", metavar="NAME", choices=schedules,
                   help=f"of beta_t: {', '.join(schedules)} [logsnr; bits: cosine]")
    g.add_argument("--objective", metavar="NAME", choices=dpm.OBJECTIVES,
                   help=f"of training: {', '.join(dpm.OBJECTIVES)} [K; images of numbers: focused]")
    g.add_argument("--variance", metavar="NAME", choices=["learned", "beta", "posterior"],
                   help="f_sigma: learned, beta, posterior [learned]")
    g.add_argument("--predict", metavar="NAME", choices=["v", "eps"],
                   help="what the network outputs: v, eps [v]")
    g.add_argument("--decoder", metavar="NAME", choices=["dequantised", "discretised"],
                   help="of bytes: dequantised, discretised [dequantised]")
    g.add_argument("--rate", metavar="X", type=float, help="share of ones in pi, for bits "
                   "[the data's]")
    g.add_argument("--help", "-h", action="help", help="this page")
    return p.parse_args()


def settings(args, dataset):
    """The run's settings: what the flags say, and the defaults for this kind of data."""
    kind = "vector" if dataset.shape[:2] == (1, 1) else "image"
    chosen = ALWAYS | (BITS if dataset.binary else DEFAULTS)[kind]
    given = {name: value for name, value in vars(args).items()
             if name in chosen and value is not None}
    chosen |= given | dict(steps=args.steps[0] if args.steps else chosen["steps"])
    chosen["network"] = chosen["network"] or ("mlp" if kind == "vector" else "unet")
    sizes = dict(SIZES[chosen["network"]])
    if chosen["network"] == "unet":
        chosen["widths"] = sizes["widths"] = chosen["widths"] or list(sizes["widths"])
    if chosen["schedule"] == "learned" and "objective" not in given:
        chosen["objective"] = "K"
    if chosen["network"] == "paper" and "predict" not in given:
        chosen["predict"] = "paper"
    check(args, chosen, dataset)
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
    numbers_only = [flag for flag in ("objective", "variance", "predict", "decoder")
                    if c[flag] not in (ALWAYS[flag], "focused", "paper")] + ["schedule"] * learned
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
        (c["seed"] < 0, f"--seed must be 0 or more, not {c['seed']}"),
        (dataset.binary and numbers_only,
         f"--{', --'.join(numbers_only)}: for numbers only; {name} is made of bits"),
        (not dataset.binary and c["rate"] is not None,
         f"--rate is for bits; {name} is made of numbers"),
        (learned and c["objective"] != "K", "--schedule learned ascends K: omit --objective"),
        (learned and c["decoder"] != "dequantised",
         "--schedule learned needs the fixed last step: omit --decoder"),
        (c["decoder"] == "discretised" and not dataset.bytes,
         f"--decoder discretised is for bytes; {name} has none"),
        (paper and c["predict"] == "eps",
         "--network paper outputs what eqs. 64 and 65 say: omit --predict"),
        (paper and c["objective"] in ("simple", "mean"),
         "--network paper can't weigh its mean alone: omit --objective"),
        (paper and c["variance"] != "learned",
         "--network paper has its own variance, eq. 64: omit --variance"),
        (c["widths"] and c["network"] != "unet",
         f"--widths are those of a U-Net, and the network is {c['network']}"),
        (c["widths"] and not (len(c["widths"]) <= 10 and all(0 < w <= 1024 for w in c["widths"])),
         f"--widths must be at most ten numbers of 1 to 1024, not {str(c['widths']):.50}"),
        (c["network"] == "mlp" and dataset.shape[:2] != (1, 1),
         f"--network mlp is for vectors; {name} holds images"),
    ]
    for broken, message in rules:
        if broken:
            raise dpm.InputError(message)


def new_model(dataset, chosen, xp, comm=None, threads=None):
    """The model of a new run. Its beta_1 is the variance of the smallest detail in the data. Bits
    have none: theirs is 1e-5, or 1 / T with the schedule `paper`, whose formula says so."""
    T, kind, shift, scale = chosen["timesteps"], chosen["schedule"], dataset.shift, dataset.scale
    if dataset.binary:
        alpha_bar = dpm.schedule(kind, T, 1 / T if kind == "paper" else 1e-5)
        rate = dataset.mean if chosen["rate"] is None else chosen["rate"]
        q = dpm.Binomial(alpha_bar, xp, rate, dataset.mean)
    else:
        options, detail = dict(variance=chosen["variance"]), dataset.detail
        if chosen["decoder"] == "discretised":
            options, detail = options | runs.decoder(shift, scale), runs.DECODED / scale
        alpha_bar = dpm.schedule("logsnr" if kind == "learned" else kind, T, detail ** 2)
        q = dpm.Gaussian(alpha_bar, xp, **options)
    return dpm.build(q, dataset.shape, chosen, kind == "learned", shift=shift, scale=scale,
                     comm=comm, threads=threads, dtype=chosen["dtype"], seed=chosen["seed"])


def optimiser_options(chosen):
    return dict(lr=chosen["lr"], steps=chosen["steps"], warmup=min(200, chosen["steps"] // 10 + 1))


def train(model, optimiser, dataset, out):
    """The loop. Everything random in step s depends on (seed, s) alone, so that a resumed run makes
    the same steps."""
    xp, about = model.xp, model.about
    number, steps, seed = about["batch_size"], about["steps"], about["seed"]
    log_every, leads = max(1, steps // 200), model.comm.rank == 0
    tables = dpm.objective(about["objective"], model.diffusion)
    mean = xp.full((1, model.D), dataset.mean)
    checkpoint, stopped, saved_step, norm = out / "checkpoint.npz", [], optimiser.step, 0.0
    examples, kl = about.get("unlogged", (0, 0.0))  # not logged yet, and the sum of their KLs
    begun, saved_at = time.perf_counter() - about.get("seconds", 0.0), -math.inf

    def save():
        about.update(trained_steps=optimiser.step, seconds=round(time.perf_counter() - begun, 1),
                     device=runs.device_name(xp), unlogged=[examples, float(kl)])
        if leads:
            dpm.save(model, checkpoint, optimiser)

    def check_finite(norm):
        if not math.isfinite(norm):
            kept = f"{checkpoint} keeps step {saved_step}"
            kept = kept if saved_step else "nothing was saved yet"
            raise dpm.InputError(f"step {optimiser.step}: the gradient of the loss is "
                                 f"{float(norm)}; {kept}; try a smaller --lr than {about['lr']}")

    handlers = {s: signal.signal(s, lambda *_: stopped.append(True))
                for s in (signal.SIGINT, signal.SIGTERM)}
    with runs.bar(None, "train", total=steps * number, initial=optimiser.step * number,
             unit=figures.kind_of(model)[:-1], unit_scale=True) as shown:
        while optimiser.step < steps and not model.comm.sum(np.array([len(stopped)]))[0]:
            rng = dpm.generator(dataset.xp, "batch", seed, optimiser.step)
            x0 = xp.asarray(dataset.draw(number, rng, model.dtype))
            kl = kl + model.gradient(x0, seed, optimiser.step, tables=tables)[1].sum()
            examples += number
            norm = model.step(optimiser)
            shown.update(number)
            line_is_due = optimiser.step % log_every == 0 or optimiser.step == steps
            if xp is np or line_is_due:  # so as not to wait for a GPU at every step
                check_finite(norm)
            if line_is_due:
                climbed = evaluation.gain(model.diffusion, mean) - float(kl) / examples
                row = [optimiser.step, f"{time.perf_counter() - begun:.1f}", f"{climbed / LN2:.5g}"]
                if leads:
                    runs.log(out / "log.csv", row)
                shown.set_postfix_str(evaluation.progress_note(model, climbed), refresh=False)
                examples, kl = 0, 0.0
                if time.perf_counter() - saved_at > SAVE_EVERY:
                    save()
                    saved_at, saved_step = time.perf_counter(), optimiser.step
    check_finite(norm)
    save()
    stop = model.comm.sum(np.array([len(stopped)]))[0]  # no rank goes on before the checkpoint is
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    if stop:
        if leads:
            print(f"stopped at step {optimiser.step}; go on with: python train.py --resume {out}")
        sys.exit(130)


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


def start(args, xp, comm):
    """A new run: its model, its optimiser, its data, its directory."""
    if args.out is not None and not args.out.strip():
        raise dpm.InputError("--out: give the name of a directory, or omit the flag")
    if args.out and (pathlib.Path(args.out) / "checkpoint.npz").exists():
        raise dpm.InputError(f"--out {args.out} holds another run; choose a new directory, or go "
                             f"on with that run: --resume {args.out}")
    usual = "mnist" if args.benchmark else "swissroll"
    name = usual if args.dataset is None else args.dataset
    dataset = data.load(name, args.crop, args.resize, args.flips)
    chosen = settings(args, dataset)
    dataset.dequantise = chosen["decoder"] == "dequantised"
    model = new_model(dataset, chosen, xp, comm, args.threads)
    out = pathlib.Path(args.out) if args.out else runs.free_directory(dataset.name)
    return model, model.optimiser(**optimiser_options(chosen)), dataset, out


def resume(args, xp, comm):
    """A stopped run as its last checkpoint has it. Of training flags only --steps may differ."""
    newest = runs.newest_run()
    if args.out:
        raise dpm.InputError("--resume DIR goes on in DIR; omit --out")
    if not (args.resume or newest):
        raise dpm.InputError("--resume: there is no run in runs/; give a run's directory")
    out = pathlib.Path(args.resume or newest.parent)
    if not out.is_dir():
        raise dpm.InputError(f"--resume {out}: give the directory of a run")
    model, optimiser = dpm.resume(out / "checkpoint.npz", xp, comm)
    runs.check_about(model.about, out / "checkpoint.npz")
    dataset = runs.load_for(model)
    shares = model.threads * model.comm.size
    if args.threads and args.threads * model.comm.size != shares and model.xp is np:
        raise dpm.InputError(f"{out} was started with {shares} shares of a batch, which are "
                             f"threads times ranks, not {args.threads * model.comm.size}; omit "
                             "--threads")
    if args.dataset and args.dataset.partition(":")[0] in data.MADE:
        args.dataset = data.load(args.dataset).name
    elif args.dataset and str(pathlib.Path(args.dataset).resolve()) == dataset.name:
        args.dataset = dataset.name
    for name in FIXED:
        value, flag = model.about[name], f"--{name.replace('_', '-')}"
        if getattr(args, name) not in (None, value):
            was = f"without {flag}" if value is None else f"with {flag} {value}"
            raise dpm.InputError(f"{out} was started {was}, not {getattr(args, name)}; omit the "
                                 "flag")
    if args.steps:
        model.about["steps"] = args.steps[0]
    check(args, model.about, dataset)
    if args.steps and args.steps[0] < max(1, optimiser.step):
        raise dpm.InputError(f"{out} has made {optimiser.step} steps already; --steps "
                             f"{args.steps[0]} would be less")
    for name, value in optimiser_options(model.about).items():
        setattr(optimiser, name, value)
    return model, optimiser, dataset, out


def main():
    args = arguments()
    xp = dpm.backend(args.gpu)
    comm = None if args.benchmark else runs.ranks(xp)
    if args.parzen and not args.evaluate:
        raise dpm.InputError("--parzen goes with --evaluate DIR")
    if args.evaluate:
        given = [name for name in (*FIXED, "out", "resume", "threads", "no_evaluate", "benchmark")
                 if getattr(args, name) is not None and getattr(args, name) is not False]
        if given:
            flag = given[0].replace("_", "-")
            raise dpm.InputError(f"--evaluate takes a run as it is; omit --{flag}")
        evaluated = [evaluation.evaluate(path, xp, args.steps or (), args.parzen, comm)
                     for path in args.evaluate]
        several = len(evaluated) > 1 and runs.mpi_rank() == 0
        return evaluation.compare(evaluated) if several else None
    model, optimiser, dataset, out = (start if args.resume is None else resume)(args, xp, comm)
    if args.benchmark:
        dataset.to(xp)
        return speed.benchmark(model, optimiser, dataset, model.about["batch_size"])
    leads = model.comm.rank == 0
    model.comm.sum(np.zeros(1))  # all ranks have chosen the same free directory before one makes it
    with runs.locked(out) if leads else contextlib.nullcontext():
        if leads:
            runs.cut_log(out / "log.csv", COLUMNS, optimiser.step)
            print(dataset.describe())
            print(f"{out}: {model.theta.size:,} weights, T = {model.T}, on "
                  f"{runs.device_name(model.xp)}", flush=True)
        dataset.to(model.xp)
        if optimiser.step < model.about["steps"]:
            train(model, optimiser, dataset, out)
        elif leads:
            print(f"all {optimiser.step} steps are made already")
        if not args.no_evaluate:
            evaluation.evaluate(out, xp, comm=comm)
    if leads:
        image = figures.kind_of(model) == "images"
        print(f"next: python sample.py --checkpoint {out}" + (" --inpaint" if image else ""))


if __name__ == "__main__":
    runs.run(main)
