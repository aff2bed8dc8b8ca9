"""Sample from a trained model, or complete and denoise with it.

  python sample.py                # the newest run, else the shipped MNIST model
  python sample.py --checkpoint runs/swissroll --trajectory --gif
  python sample.py --inpaint      # the left half of test images is missing
  python sample.py --denoise 1    # test images under noise as strong as the data
  python sample.py --inpaint center --hole 100 --input photo.png   # of any size

Writes NAME.png and NAME.npz, the arrays behind it in the data's units (bytes plus
their noise in [0, 1): round them down): samples; with --inpaint and --denoise also
given, truth (if known), and unknown (--inpaint) or mean (--denoise of numbers); for
images from files also nearest, the training images nearest to samples. Free samples
of the shipped digits are sharpened: --sharpen 0 draws from p itself.
"""
import signal

if __name__ == "__main__":  # Ctrl-C while modules are loaded ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import dpm  # before numpy: it keeps BLAS to one thread

import argparse
import itertools
import math
import pathlib

import numpy as np

import data
from data import evaluation, figures, observations, runs, sampling

NUMBER = dict(images=64, sequences=40, points=2000)             # of free samples
SIGMA = 1e-6, 1e6               # of --denoise, at least and at most


def arguments():
    p = runs.Parser("sample.py", __doc__)
    g = p.add_argument_group("what to draw")
    g.add_argument("--checkpoint", metavar="PATH", help="a checkpoint, or the directory of a run")
    g.add_argument("--number", metavar="N", type=int, help="how many samples ("
                   f"{', '.join(f'{kind} {n}' for kind, n in NUMBER.items())}), or test examples "
                   f"({observations.GIVEN})")
    g.add_argument("--seed", metavar="N", type=int, default=0,
                   help="sample k depends on this and on k, up to rounding, which may grow (0)")
    g.add_argument("--steps", metavar="S", type=int, help="use this many of the T steps "
                   f"(images: {evaluation.IMAGE_STEPS}; with repeats {sampling.STEPS // 2}; "
                   f"--inpaint with one repeat {sampling.STEPS}; --denoise {sampling.STEPS}, fewer "
                   "for less noise; points, sequences, and the paper's kernel: all)")
    g.add_argument("--eta", metavar="X", type=float, help="noise of the steps: 1 the model's, 0 "
                   "none, which with --sharpen 0 is DDIM (1; sharpened, but for bits, "
                   f"{sampling.ETA})")
    g.add_argument("--repeats", metavar="N", type=int, help="make each step that decides what a "
                   f"sample will be N times ({sampling.REPEATS} for images that are completed or "
                   "sharpened; else 1)")
    g.add_argument("--weak", metavar="PATH", help="a worse model of the same data: samples keep "
                   "away from its errors (for the shipped digits data/mnist/weak.npz)")
    g.add_argument("--sharpen", metavar="W", type=float,
                   help=f"how far away, w of dpm.Contrast; 0: samples of p ({sampling.SHARPEN})")
    g = p.add_argument_group("posterior samples, from p(x) r(x)")
    one = g.add_mutually_exclusive_group()
    one.add_argument("--inpaint", metavar="PART", nargs="?", const="left",
                     help=f"draw what is missing: {', '.join(observations.PARTS)}; a fraction of "
                     "the pixels; or a mask, a picture that is white there (left)")
    one.add_argument("--denoise", metavar="SIGMA", type=float, help="draw what is under noise of "
                     "this standard deviation (the data's is 1, but for bits)")
    g.add_argument("--hole", metavar="N", type=int,
                   help="--inpaint center: a hole of N x N pixels")
    g.add_argument("--input", metavar="FILE", nargs="+",
                   help="your own pictures, to complete, or noisy ones")
    g.add_argument("--particles", metavar="N", type=int, default=1,
                   help="weighted chains for each sample, without repeats (1)")
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
    return args


def check(args):
    """What is wrong with the flags, whatever the model is."""
    for name, least in dict(number=1, seed=0, hole=1, particles=1, repeats=1).items():
        value = getattr(args, name)
        if value is not None and value < least:
            raise dpm.InputError(f"--{name} must be {least} or more, not {value}")
    for flag in ("checkpoint", "weak", "out"):
        if getattr(args, flag) is not None and not getattr(args, flag).strip():
            raise dpm.InputError(f"--{flag}: give a name, or omit the flag")
    if args.mode == "denoise" and not SIGMA[0] <= args.denoise <= SIGMA[1]:
        raise dpm.InputError(f"--denoise takes a standard deviation from {SIGMA[0]:g} to "
                             f"{SIGMA[1]:g}, not {args.denoise:g}")
    if args.hole and args.inpaint != "center":
        raise dpm.InputError("--hole goes with --inpaint center")
    if args.mode == "samples" and (args.input or args.particles > 1 or args.r_schedule):
        raise dpm.InputError("--input, --particles and --r-schedule go with --inpaint or --denoise")
    if args.repeats not in (None, 1) and (args.mode == "denoise" or args.particles > 1):
        raise dpm.InputError("--repeats goes neither with --denoise nor with --particles")
    if args.sharpen is not None and not 0 <= args.sharpen < math.inf:
        raise dpm.InputError(f"--sharpen must be finite, and 0 or more, not {args.sharpen}")
    if (args.weak is not None or args.sharpen) and args.mode != "samples":
        raise dpm.InputError("--weak and --sharpen are for free samples")
    if args.eta is not None and not 0 <= args.eta <= 1:
        raise dpm.InputError(f"--eta lies between 0 and 1, not at {args.eta}")
    if args.mode != "samples" and args.eta not in (None, 1):
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


def main():
    args = arguments()
    check(args)
    free = args.mode == "samples"
    checkpoint = runs.checkpoint_in(args.checkpoint or runs.newest_run() or sampling.SHIPPED)
    model = runs.load(checkpoint, xp := dpm.backend(args.gpu), runs.ranks(xp))
    say = print if model.comm.rank == 0 else lambda *_, **__: None
    whole, kind, dataset = model, figures.kind_of(model), None
    binary, sharpen = model.about["binary"], sampling.contrast(model, args, checkpoint)
    try:
        dataset = runs.load_for(model)
    except dpm.InputError:
        if not free and not args.input:
            raise                                   # free samples and own pictures do without
    if args.eta not in (None, 1) and binary:
        raise dpm.InputError("--eta is for numbers: bits have no path without noise")
    sampling.settle(model, args, sharpen)
    model = model.shortened(args.steps)
    number = args.number or (NUMBER[kind] if free else observations.GIVEN)
    if args.input:
        model, truth = observations.own_pictures(model, args)
        number = len(truth)
    draws, paths = 1 if free else observations.draws_of(model), files(args)
    sampling.check_room(model, args, number * draws, paths[".npz"])
    if not free and not args.input:
        truth = observations.test_examples(dataset, args)
        number = len(truth)                         # there may be fewer than the default
    r, x_T, unknown, sets, extra, arrays = None, None, None, {}, {}, {}
    if not free:
        given, unknown, r = observations.observed(model, args, truth, draws)
        if args.mode == "denoise" and not (binary or args.particles > 1 or args.r_schedule):
            model, x_T = observations.begun(model, np.repeat(given, draws, 0), args.denoise)
            r = None                                # noise under data is what the chain undoes
        noisy = args.input and args.mode == "denoise"
        sets = ({} if noisy else {"truth": truth[:, None]}) | {"given": given[:, None]}
        arrays = {name: model.raw(x[:, 0]) for name, x in sets.items()}
        arrays |= {} if unknown is None else dict(unknown=unknown)

    how = [f"sharpened by {sharpen.w:g}"] if sharpen else []
    how += [f"eta {args.eta:g}"] * (args.eta != 1)
    how += [f"{args.repeats} repeats"] * (args.repeats > 1)
    say(f"{checkpoint} on {runs.device_name(model.xp)}: {number} "
        f"{kind if number > 1 else kind[:-1]} of {data.printable(model.about['dataset'])}, "
        + ", ".join([f"{model.T} of T = {whole.T} steps", *how]), flush=True)

    for path in paths.values() if model.comm.rank == 0 else ():
        runs.writable(path)                         # an error now, and not at the end
    sample, chains = sampling.sampler(model, args, r, x_T, sharpen), number * draws
    kept = sampling.on_the_way(sample, chains, args, kind, model.T)
    if kept and chains <= sampling.MOVED[kind]:
        parts = iter([kept[0]])                     # these are all of them
    else:
        parts = sampling.parts_of(sample, chains, sampling.part_of(model.D) if free else chains)
    first = next(parts)                             # these are shown and measured
    sets["samples"] = first.reshape(-1, draws, model.D)
    mean = None
    if args.mode == "denoise" and not binary:
        mean = observations.denoised(whole.resized(*model.shape[:2]), given, args.denoise)
        arrays["mean"], extra["E[x_0 | given]"] = model.raw(mean), mean[:, None]
    if not free:
        shown = sets["samples"]
        for line in observations.report(model, args, truth, given, unknown, shown, mean):
            say(line)
    if kind == "images" and dataset and dataset.train is not None and model.shape == whole.shape:
        near, distance = observations.nearest(dataset, sets["samples"][:sampling.SHOWN, 0])
        usual = observations.nearest(dataset, dataset.held_out(len(distance)))[1]
        say(f"nearest training image: {distance.mean():.3f} away (a copy: 0), root mean square "
            f"{observations.unit_of(model)}; for test images it is {usual.mean():.3f}")
        arrays["nearest"] = model.raw(near)
        if args.mode == "inpaint":
            extra["the training image nearest to the first of them"] = near[:, None]
    parts = itertools.chain([first], parts)
    if model.comm.rank > 0:
        for _ in parts:                             # all ranks draw, and the first writes
            pass
        return

    shape = (number, *[draws] * (not free), model.D)
    runs.write_arrays(paths[".npz"], shape, map(model.raw, parts), arrays)
    test = dataset.held_out(evaluation.MEASURED) if free and "nearest" in arrays else ()
    if 40 <= len(test) <= len(first) and model.D <= evaluation.MOST_D:
        found = evaluation.distances(dataset, first[:len(test)], test)
        say(f"Frechet distance of {len(test)} samples from training images: {found['frechet']:.1f};"
            f" of as many test images it is {found['frechet_test']:.1f}")
    picture, layout = figures.sheet_of(model, sets, extra, sampling.SHOWN)
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
