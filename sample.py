"""Sample from a trained model, or complete and denoise with it.

  python sample.py                # the newest run, else the shipped MNIST model
  python sample.py --checkpoint runs/swissroll --trajectory --gif
  python sample.py --inpaint      # the left half of test images is missing
  python sample.py --denoise 1    # test images under noise as strong as the data
  python sample.py --inpaint center --hole 100 --input photo.png   # of any size

Writes NAME.png and NAME.npz, the arrays behind it in the data's units: samples,
and for posterior samples truth, given, unknown; for images also nearest, the
training images nearest to them. The shipped digits are sharpened: --sharpen 0
draws from p itself.
"""
import signal

if __name__ == "__main__":  # Ctrl-C while modules are loaded ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dpm  # before numpy: it keeps BLAS to one thread

import argparse
import itertools
import math
import os
import pathlib
import shutil

import numpy as np

import data
from data import evaluation, figures, observations, runs

SHIPPED = pathlib.Path(__file__).parent / "data" / "mnist" / "model.npz"
WEAK = SHIPPED.with_name("weak.npz")                            # the --weak of SHIPPED
SHARPEN = 2                     # --sharpen where there is a weak model: see dpm.Contrast
REPEATS = 5                     # --repeats of completed images: see dpm.Posterior
MOST_D = 1024                   # dimensions of samples whose distance is measured, at most
DEFAULT_STEPS = dict(images=70, sequences=None, points=None)    # of posteriors; None: all T
DEFAULT_FREE_STEPS = DEFAULT_STEPS | dict(images=evaluation.IMAGE_STEPS)  # of free samples
NUMBER = dict(images=64, sequences=40, points=2000)             # of free samples
PART = 4096                     # free samples are drawn and written so many at a time, at most
SHOWN = 1024                    # images or sequences in a picture, at most
MOVED = dict(images=64, sequences=64, points=2000)              # in a GIF or a strip, at most
SIGMA = 1e-6, 1e6               # of --denoise, at least and at most
PIXEL = 10_000                  # bytes that a network takes for a pixel, about


# -------------------------------------------------------------------------------------------------
# The flags
# -------------------------------------------------------------------------------------------------

def arguments():
    p = runs.Parser("sample.py", __doc__)
    g = p.add_argument_group("what to draw")
    g.add_argument("--checkpoint", metavar="PATH", help="a checkpoint, or the directory of a run")
    g.add_argument("--number", metavar="N", type=int, help="how many samples, or test examples")
    g.add_argument("--seed", metavar="N", type=int, default=0,
                   help="sample k depends on this and on k alone (0)")
    g.add_argument("--steps", metavar="S", type=int, help="use this many of the T steps "
                   f"(posteriors of images: {DEFAULT_STEPS['images']}, with --repeats "
                   f"{DEFAULT_STEPS['images'] // 2}; free images: "
                   f"{DEFAULT_FREE_STEPS['images']}; else all)")
    g.add_argument("--eta", metavar="X", type=float,
                   help="noise of the steps: 1 the model's, 0 none, which is DDIM (1); below 1 "
                   "nothing is sharpened")
    g.add_argument("--weak", metavar="PATH", help="a worse model of the same data: samples keep "
                   "away from its errors (for the shipped digits data/mnist/weak.npz)")
    g.add_argument("--sharpen", metavar="W", type=float,
                   help=f"the power w of dpm.Contrast; 0: samples of p itself ({SHARPEN})")
    g = p.add_argument_group("posterior samples, from p(x) r(x)")
    one = g.add_mutually_exclusive_group()
    one.add_argument("--inpaint", metavar="PART", nargs="?", const="left",
                     help=f"draw what is missing: {', '.join(observations.PARTS)}; a fraction of "
                     "the pixels; or a mask, a picture that is white there (left)")
    one.add_argument("--denoise", metavar="SIGMA", type=float, help="draw what is under noise of "
                     "this standard deviation; the data's is 1")
    g.add_argument("--hole", metavar="N", type=int,
                   help="--inpaint center: a hole of N x N pixels")
    g.add_argument("--input", metavar="FILE", nargs="+",
                   help="your own pictures, to complete, or noisy ones")
    g.add_argument("--particles", metavar="N", type=int, help="weighted chains for each sample, "
                   "which are neither sharpened nor repeated (1)")
    g.add_argument("--repeats", metavar="N", type=int, help="make each decisive step N times "
                   f"(--inpaint of images: {REPEATS}; else 1)")
    g.add_argument("--r-schedule", metavar="NAME", choices=dpm.R_SCHEDULES,
                   help=f"r on the way, see dpm.Posterior: {', '.join(dpm.R_SCHEDULES)}")
    g = p.add_argument_group("how, and where to")
    g.add_argument("--out", metavar="NAME", help="(runs/samples, runs/inpaint or runs/denoise)")
    g.add_argument("--trajectory", action="store_true",
                   help="also NAME-trajectory.png, x_t from t = T to 0")
    g.add_argument("--gif", action="store_true", help="also NAME.gif, from noise to samples")
    g.add_argument("--gpu", action=argparse.BooleanOptionalAction,
                   help="use CuPy, or not (where there is a GPU)")
    g.add_argument("--help", "-h", action="help", help="this page")
    args = p.parse_args()
    args.mode = "samples" if args.inpaint is None else "inpaint"
    args.mode = args.mode if args.denoise is None else "denoise"
    args.eta, args.particles = (None if a == 1 else a for a in (args.eta, args.particles))
    return args


def can_sharpen(args):
    """Denoising needs the model's own steps; particles and other noise don't go with a Contrast."""
    return args.mode != "denoise" and not args.particles and args.eta is None


def check(args):
    """What is wrong with the flags, whatever the model is."""
    for name, least in dict(number=1, seed=0, hole=1, particles=1, repeats=1).items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise dpm.InputError(f"--{name} must be {least} or more, not {value}")
    if args.out is not None and not args.out.strip():
        raise dpm.InputError("--out: give a name, such as runs/samples, or omit the flag")
    if args.mode == "denoise" and not SIGMA[0] <= args.denoise <= SIGMA[1]:
        raise dpm.InputError(f"--denoise takes a standard deviation from {SIGMA[0]:g} to "
                             f"{SIGMA[1]:g}, not {args.denoise:g}")
    if args.hole and args.inpaint != "center":
        raise dpm.InputError("--hole goes with --inpaint center")
    if args.mode == "samples" and (args.input or args.particles or args.r_schedule):
        raise dpm.InputError("--input, --particles and --r-schedule go with --inpaint or --denoise")
    if args.repeats and (args.mode != "inpaint" or args.particles):
        raise dpm.InputError("--repeats goes with --inpaint, without --particles")
    if args.sharpen is not None and not 0 <= args.sharpen < math.inf:
        raise dpm.InputError(f"--sharpen must be finite, and 0 or more, not {args.sharpen}")
    if (args.weak is not None or args.sharpen) and not can_sharpen(args):
        raise dpm.InputError("--weak and --sharpen are for free samples and --inpaint, without "
                             "--particles and --eta")
    if args.eta is not None and not 0 <= args.eta <= 1:
        raise dpm.InputError(f"--eta lies between 0 and 1, not at {args.eta}")
    if args.mode != "samples" and args.eta is not None:
        raise dpm.InputError("--eta is for free samples: omit it with --inpaint and --denoise")


def files(args):
    """{ending: path} of what will be written."""
    out = pathlib.Path(args.out or f"runs/{args.mode}")
    out = out.with_suffix("") if out.suffix in (".png", ".npz", ".gif") else out
    if out.name in ("", ".."):
        raise dpm.InputError(f"--out {args.out}: give a name, such as {out / 'samples'}")
    ends = [".png", ".npz"] + ["-trajectory.png"] * args.trajectory + [".gif"] * args.gif
    paths = {end: out.with_name(out.name + end) for end in ends}
    for path in paths.values():
        if path.is_dir():
            raise dpm.InputError(f"--out: {path} is a directory; give another name")
    return paths


def find_checkpoint(given):
    return runs.checkpoint_in(given) if given is not None else runs.newest_run() or SHIPPED


def check_room(model, args, chains, path):
    """InputError if this machine cannot hold the chains of a part, or one batch in the network, or
    its disk not the samples."""
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):   # Windows does not say
        have = 16
    free, way = args.mode == "samples", 60 * args.gif + 10 * args.trajectory
    stored = (min(chains, part_of(model.D)) * 32 if free else chains * 40) * model.D
    network = model.threads * max(6400, model.shape[0] * model.shape[1]) * PIXEL
    crowd = 100 * model.D * (args.particles or 1)
    crowd += way * min(chains, MOVED[figures.kind_of(model)]) * model.D * 8
    path = next(place for place in path.absolute().parents if place.is_dir())
    rooms = [("memory, and the machine", stored + network + crowd, have)]
    if model.comm.rank == 0:                        # which writes
        rooms.append(("disk, which", chains * model.D * 8, shutil.disk_usage(path).free / 1e9))
    for what, need, have in rooms:
        need = min(need, 10 ** 18) / 1e9
        if need > have:
            raise dpm.InputError(f"this takes about {need:.3g} GB of {what} has {have:.3g}: fewer "
                                 "samples or particles, or smaller pictures")


# -------------------------------------------------------------------------------------------------
# What comes out
# -------------------------------------------------------------------------------------------------

def contrast(model, args, checkpoint):
    """The Contrast that sharpens the samples, in a list; or an empty list."""
    w, path = SHARPEN if args.sharpen is None else args.sharpen, args.weak
    shipped = WEAK.exists() and SHIPPED.exists() and os.path.samefile(checkpoint, SHIPPED)
    if path is None and shipped and w and can_sharpen(args):
        path = WEAK
    if args.sharpen and path is None:
        raise dpm.InputError("--sharpen needs a worse model of the same data: --weak PATH")
    if path is None:
        return []
    weak = runs.load(path := runs.checkpoint_in(path), model.xp, model.comm)
    if os.path.samefile(path, checkpoint):
        raise dpm.InputError(f"--weak {path}: this is the model itself; give a worse one")
    if weak.about["digest"] != model.about["digest"] or weak.shape != model.shape or (
            getattr(weak.diffusion, "rate", None) != getattr(model.diffusion, "rate", None)):
        raise dpm.InputError(f"--weak {path}: a model of other data, or of another pi")
    if weak.about["predict"] not in ("v", model.about["predict"]):
        raise dpm.InputError(f"--weak {path}: predicts {weak.about['predict']}; give one with v")
    return [dpm.Contrast(weak, w)] if w else []


def repeats_of(args, kind):
    several = args.mode == "inpaint" and kind == "images" and not args.particles
    return args.repeats or (REPEATS if several else 1)


def sampler(model, args, r, x_T):
    """A function that draws n samples: posterior where there is an r, a list, or else free, from
    x_T where that is given."""
    batch = (2 ** 16 if model.xp is np else 2 ** 20) // model.D
    options = dict(seed=args.seed, batch=max(model.threads, min(1024, batch)),
                   progress=lambda ticks: runs.bar(ticks, "reverse steps"))
    if not r:
        options |= dict(eta=1.0 if args.eta is None else args.eta)
        return lambda n, **more: model.sample(
            n, x_T=None if x_T is None else x_T[:n], **options, **more)
    posterior = dpm.Posterior(model, r, args.r_schedule or "predicted", args.particles or 1,
                              repeats_of(args, figures.kind_of(model)))
    return lambda n, **more: posterior.rows(slice(n)).sample(n, **options, **more)


def part_of(D):
    """How many samples are drawn and written at a time: all that a picture shows, or more."""
    return max(min(PART, 2 ** 26 // D), min(SHOWN, PART))


def parts_of(sample, number, part):
    """Free samples (n, D), part by part, so that memory does not grow with their number."""
    for first in range(0, number, part):
        yield sample(min(part, number - first), first=first)


def checked(samples):
    runs.finite(samples, "samples")
    return samples


def on_the_way(sample, chains, args, kind, T):
    """{t: x_t} of the first of the samples, at the times of a GIF or a strip. Sample k is the same
    however many there are."""
    if not args.gif and not args.trajectory:
        return {}
    times = figures.times(T, 60) * args.gif + figures.times(T, 10) * args.trajectory
    samples, kept = sample(min(chains, MOVED[kind]), keep=set(times) - {0})
    return kept | {0: samples}


def main():
    args = arguments()
    check(args)
    free, checkpoint = args.mode == "samples", find_checkpoint(args.checkpoint)
    model = runs.load(checkpoint, xp := dpm.backend(args.gpu), runs.ranks(xp))
    say = print if model.comm.rank == 0 else lambda *_, **__: None
    whole, kind, shape, dataset = model, figures.kind_of(model), model.shape, None
    binary, sharpen = model.about["binary"], contrast(model, args, checkpoint)
    try:
        dataset = runs.load_for(model)
    except dpm.InputError:
        if not free and not args.input:
            raise                                   # free samples and own pictures do without
    if args.eta is not None and binary:
        raise dpm.InputError("--eta is for numbers: bits have no path without noise")
    if args.steps is not None:
        model = model.shortened(args.steps)
    elif S := (DEFAULT_FREE_STEPS if free else DEFAULT_STEPS)[kind]:
        model = model.shortened(min(S // 2 if repeats_of(args, kind) > 1 else S, whole.T))

    number = args.number or (NUMBER[kind] if free else observations.GIVEN)
    if args.input:
        model, truth = observations.own_pictures(model, args)
        number = len(truth)
    draws, paths = 1 if free else observations.draws_of(model), files(args)
    check_room(model, args, number * draws, paths[".npz"])
    if not free and not args.input:
        truth = observations.test_examples(dataset, args)
        number = len(truth)                         # there may be fewer than the default
    r, x_T, unknown, sets, extra, arrays = sharpen, None, None, {}, {}, {}
    if not free:
        given, unknown, observation = observations.observed(model, args, truth, draws)
        r = [observation, *sharpen]
        if args.mode == "denoise" and not (binary or args.particles or args.r_schedule):
            model, x_T = observations.begun(model, np.repeat(given, draws, 0), args.denoise)
            r = []                                  # noise under data is what the chain undoes
        noisy = args.input and args.mode == "denoise"
        sets = ({} if noisy else {"truth": truth[:, None]}) | {"given": given[:, None]}
        arrays = {name: model.raw(x[:, 0]) for name, x in sets.items()}
        arrays |= {} if unknown is None else dict(unknown=unknown)

    say(f"{checkpoint} on {runs.device_name(model.xp)}: {number} "
        f"{kind if number > 1 else kind[:-1]} of {data.printable(model.about['dataset'])}, "
        f"{model.T} of T = {whole.T} steps"
        f"{f', sharpened by {sharpen[0].w:g}' if sharpen else ''}", flush=True)

    for path in paths.values() if model.comm.rank == 0 else ():
        runs.writable(path)                         # an error now, and not at the end
    sample = sampler(model, args, r, x_T)
    kept = on_the_way(sample, number * draws, args, kind, model.T)
    if kept and number * draws <= MOVED[kind]:
        parts = iter([kept[0]])                     # these are all of them
    elif free:
        parts = parts_of(sample, number, part_of(model.D))
    else:
        parts = iter([sample(number * draws)])
    first = checked(next(parts))                    # these are shown and measured
    sets["samples"] = first.reshape(-1, draws, model.D)
    mean = None
    if args.mode == "denoise" and not binary:
        mean = observations.denoised(whole.resized(*model.shape[:2]), given, args.denoise)
        arrays["mean"], extra["E[x_0 | given]"] = model.raw(mean), mean[:, None]
    if not free:
        for line in observations.report(
                model, args, truth, given, unknown, sets["samples"], mean):
            say(line)
    if kind == "images" and dataset and dataset.train is not None and model.shape == shape:
        near, distance = observations.nearest(dataset, sets["samples"][:SHOWN, 0])
        usual = observations.nearest(dataset, dataset.held_out(len(distance)))[1]
        say(f"nearest training image: {distance.mean():.3f} away, root mean square in units of the "
            f"data's deviation; for test images it is {usual.mean():.3f}")
        arrays["nearest"] = model.raw(near)
        if args.mode == "inpaint":
            extra["the training image nearest to the first of them"] = near[:, None]
    parts = itertools.chain([first], map(checked, parts))
    if model.comm.rank > 0:
        return list(map(len, parts))                # the first rank writes

    shape = (number, *[draws] * (not free), model.D)
    runs.write_arrays(paths[".npz"], shape, map(model.raw, parts), arrays)
    n = evaluation.MEASURED
    if free and "nearest" in arrays and len(first) >= n and model.D <= MOST_D:
        found = evaluation.distances(dataset, first[:n], dataset.held_out(n))
        say(f"Frechet distance of {n} samples from training images: {found['frechet']:.1f}; of "
            f"test images it is {found['frechet_test']:.1f}")
    picture, layout = figures.sheet_of(model, sets, extra, SHOWN)
    if free and not layout.startswith(f"{number} "):
        layout = f"the first {layout} of {number}"
    figures.save_picture(picture, paths[".png"])
    if args.trajectory:
        figures.save_picture(figures.strip(model, kept, draws), paths["-trajectory.png"])
    if args.gif:
        columns = draws if not free else 1 if kind == "sequences" else 8
        figures.save_gif(*figures.frames(model, kept, columns), paths[".gif"])
    say(f"{paths['.png']}: {layout}; {', '.join(str(path) for path in list(paths.values())[1:])}")


if __name__ == "__main__":
    runs.run(main)
