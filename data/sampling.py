"""How sample.py draws: chains and their Contrast, part by part, as far as the machine has room."""
import dpm  # before numpy, see there

import os
import pathlib
import shutil

from data import evaluation, figures, runs

SHIPPED = pathlib.Path(__file__).parent / "mnist" / "model.npz"
WEAK = SHIPPED.with_name("weak.npz")                # the --weak of SHIPPED
SHARPEN = 1                     # --sharpen where there is a weak model: see dpm.Contrast
ETA = 0.5                       # --eta of sharpened samples, which vary more for it
REPEATS = 5                     # --repeats of completed images, and of sharpened ones
STEPS = 70                      # of T, for posteriors of images; with repeats half as many
PART = 4096                     # free samples are drawn and written so many at a time, at most
SHOWN = 1024                    # images or sequences in a picture, at most
MOVED = dict(images=64, sequences=64, points=2000)  # in a GIF or a strip, at most
PIXEL = 10_000                  # bytes that a network takes for a pixel, about


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
    crowd = 100 * model.D * args.particles
    crowd += way * min(chains, MOVED[figures.kind_of(model)]) * model.D * 8
    path = next(place for place in path.absolute().parents if place.is_dir())
    rooms = [("memory, and the machine", stored + network + crowd, have)]
    if model.comm.rank == 0:                        # which writes
        rooms.append(("disk, which", chains * model.D * 8, shutil.disk_usage(path).free / 1e9))
    for what, need, room in rooms:
        need = min(need, 10 ** 18) / 1e9
        if need > room:
            raise dpm.InputError(f"this takes about {need:.3g} GB of {what} has {room:.3g}: fewer "
                                 "samples or particles, or smaller pictures")


def contrast(model, args, checkpoint):
    """The Contrast that sharpens the samples, or None."""
    w, path = SHARPEN if args.sharpen is None else args.sharpen, args.weak
    if path is None and SHIPPED.exists() and os.path.samefile(checkpoint, SHIPPED):
        path = WEAK
    if args.sharpen and path is None:
        raise dpm.InputError("--sharpen needs a worse model of the same data: --weak PATH")
    if path is None or args.mode != "samples" or (args.weak is None and not w):
        return None
    weak = runs.load(path := runs.checkpoint_in(path), model.xp, model.comm)
    if os.path.samefile(path, checkpoint):
        raise dpm.InputError(f"--weak {path}: this is the model itself; give a worse one")
    if weak.about["digest"] != model.about["digest"] or weak.shape != model.shape or (
            getattr(weak.diffusion, "rate", None) != getattr(model.diffusion, "rate", None)):
        raise dpm.InputError(f"--weak {path}: a model of other data, or of another pi")
    if weak.about["predict"] not in ("v", model.about["predict"]):
        raise dpm.InputError(f"--weak {path}: predicts {weak.about['predict']}; give one with v")
    return dpm.Contrast(weak, w) if w else None


def settle(model, args, sharpen):
    """Sets args.eta, args.repeats and args.steps where no flag does. Steps are as many as nobody
    sees a difference from; of points, of sequences and of the paper's kernel all T."""
    images, free = figures.kind_of(model) == "images", args.mode == "samples"
    if args.eta is None:
        args.eta = ETA if sharpen and not model.about["binary"] else 1.0
    if args.repeats is None:
        several = sharpen if free else args.mode == "inpaint" and args.particles == 1
        args.repeats = REPEATS if images and several else 1
    if args.steps is None and images:
        most = evaluation.IMAGE_STEPS if free else STEPS
        args.steps = runs.fewer_steps(model, STEPS // 2 if args.repeats > 1 else most)


def sampler(model, args, r, x_T, sharpen):
    """A function that draws n samples: posterior where there is an r, or else free, from x_T where
    that is given."""
    options = dict(seed=args.seed, progress=lambda ticks: runs.bar(ticks, "reverse steps"))
    if r is None:
        return lambda n, **more: model.sample(
            n, eta=args.eta, x_T=None if x_T is None else x_T[:n], contrast=sharpen,
            repeats=args.repeats, **options, **more)
    posterior = dpm.Posterior(model, r, args.r_schedule or "predicted", args.particles,
                              args.repeats)
    return lambda n, **more: posterior.rows(slice(n)).sample(n, **options, **more)


def part_of(D):
    """How many samples are drawn and written at a time: all that a picture shows, or more."""
    return max(min(PART, 2 ** 26 // D), min(SHOWN, PART))


def parts_of(sample, number, part):
    """Samples (n, D), part by part, so that memory does not grow with their number."""
    for first in range(0, number, part):
        x = sample(min(part, number - first), first=first)
        runs.finite(x, "samples")
        yield x


def on_the_way(sample, chains, args, kind, T):
    """{t: x_t} of the first of the samples, at the times of a GIF or a strip. Sample k is the same
    however many there are."""
    if not args.gif and not args.trajectory:
        return {}
    times = figures.times(T, 60) * args.gif + figures.times(T, 10) * args.trajectory
    samples, kept = sample(min(chains, MOVED[kind]), keep=set(times) - {0})
    runs.finite(samples, "samples")
    return kept | {0: samples}
