"""Sample from a trained model, or from its product with any r that says what is known: posterior samples, by one mechanism.

    python sample.py                                 # the newest run, else the MNIST model that ships with the program
    python sample.py --checkpoint runs/mnist --number 100
    python sample.py --inpaint                       # the left half of test images is missing; also right, top, bottom, center
    python sample.py --inpaint 0.8                   # 80 % of the pixels are, at random
    python sample.py --inpaint mask.png              # your own mask, white where a pixel is missing
    python sample.py --inpaint --input photo.png     # your own picture in place of test images
    python sample.py --denoise 1.0                   # test images under noise of the data's own standard deviation
    python sample.py --inpaint --r-schedule constant # the paper's sampler, in half the time
    python sample.py --inpaint --particles 4         # weighed samples: slower, and exact in the limit
    python sample.py --trajectory --gif              # how they came about

Writes a picture and an .npz with the arrays behind it, in the data's units: samples, and for a posterior truth, given, unknown.
"""
import dpm  # first: it keeps BLAS to one thread, before numpy starts it

import argparse
import math
import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

import data
import train

SHIPPED = pathlib.Path(__file__).parent / "data" / "mnist" / "model.npz"
DRAWS = 6  # posterior samples for each input


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", metavar="FILE|DIR", help="a checkpoint or a run's directory (default: the newest run, else the shipped MNIST model)")
    p.add_argument("--number", type=int, help="how many samples (default: 64), or how many test images to inpaint or denoise (8)")
    p.add_argument("--seed", type=int, default=0, help="sample k depends on the seed and on k alone (default: %(default)s)")
    p.add_argument("--out", metavar="NAME", help="writes NAME.png and NAME.npz (default: runs/samples, runs/inpaint or runs/denoise, overwritten)")
    p.add_argument("--gpu", action=argparse.BooleanOptionalAction, help="compute with CuPy on a GPU, or not (default: if there is one)")
    p.add_argument("--trajectory", action="store_true", help="also a strip of x_t from t = T to 0, NAME-trajectory.png")
    p.add_argument("--gif", action="store_true", help="also the way from noise to samples, NAME.gif")
    g = p.add_argument_group("posterior samples, from p(x) r(x)")
    what = g.add_mutually_exclusive_group()
    what.add_argument("--inpaint", metavar="PART|FRACTION|MASK", nargs="?", const="left",
                      help="draw what is missing: left (default), right, top, bottom, center, a fraction of the pixels at random, "
                           "or a picture that is white where pixels are missing")
    what.add_argument("--denoise", metavar="SIGMA", type=float, help="draw what is under noise of this standard deviation, in units of the data's")
    g.add_argument("--input", metavar="FILE", nargs="+", help="pictures to complete, or, already noisy, to denoise, in place of test images")
    g.add_argument("--particles", metavar="N", type=int, default=1, help="weighed particles for each sample (default: %(default)s)")
    g.add_argument("--r-schedule", choices=dpm.HOW, help="what r is at time t, see dpm.Posterior: constant is the paper's sampler, in half "
                   "the time; predicted asks for a trained network, and for more than a few steps (default: predicted)")
    return p.parse_args()


def find_checkpoint(given):
    if given:
        return train.checkpoint_in(given)
    runs = sorted(pathlib.Path("runs").glob("*/checkpoint.npz"), key=lambda p: p.stat().st_mtime)
    return runs[-1] if runs else SHIPPED


def missing(part, shape, seed=0):
    """What is to be drawn anew, (D,) bool, for examples of shape (H, W, C). A vector counts as one row of D pixels."""
    H, W, C = shape if shape[:2] != (1, 1) else (1, shape[2], 1)
    row, column = np.arange(H)[:, None], np.arange(W)[None, :]
    parts = dict(left=column < W // 2, right=column >= W - W // 2, top=row < H // 2, bottom=row >= H - H // 2,
                 center=(np.abs(2 * row - H + 1) < H / 2) & (np.abs(2 * column - W + 1) < W / 2))
    try:
        fraction = float(part)
    except ValueError:
        fraction = None
    if part in parts:
        unknown = np.broadcast_to(parts[part], (H, W))
    elif fraction is not None:
        if not 0 < fraction < 1:
            raise dpm.InputError(f"--inpaint {part}: a fraction of the pixels lies between 0 and 1")
        unknown = dpm.generator(np, "mask", seed).permutation(H * W).reshape(H, W) < round(fraction * H * W)
    else:
        try:
            with Image.open(part) as picture:
                unknown = np.asarray(picture.convert("L")) > 127
        except (FileNotFoundError, IsADirectoryError):
            raise dpm.InputError(f"--inpaint {part}: neither {', '.join(parts)}, nor a fraction, nor a mask picture") from None
        except (UnidentifiedImageError, OSError):
            raise dpm.InputError(f"--inpaint {part}: not a picture that can be read") from None
        if unknown.shape != (H, W):
            raise dpm.InputError(f"--inpaint {part}: the mask is {unknown.shape[1]} x {unknown.shape[0]} pixels, the data {W} x {H}")
    if unknown.all() or not unknown.any():
        raise dpm.InputError(f"--inpaint {part}: {'nothing is known' if unknown.all() else 'nothing is missing'} in this mask")
    return np.repeat(unknown.ravel(), C)


def to_complete(model, dataset, args, number):
    """Normalised examples (number, D): test examples, or the user's pictures."""
    if not args.input:
        truth = dataset.held_out(number, seed=args.seed)
        if len(truth) < (args.number or 1):
            raise dpm.InputError(f"--number {number}: {dataset.name} has only {len(truth)} test examples")
        return truth
    if not dataset.bytes or model.kernel.pixels == 1:
        raise dpm.InputError(f"--input takes pictures, and {dataset.name} is not made of 8-bit pictures")
    pictures = data.read_pictures(args.input, dataset.shape)[:args.number]
    return dataset.normalise(pictures.reshape(len(pictures), -1), dpm.generator(np, "input", args.seed))


def posterior(model, dataset, args, truth):
    """given, what was done to the truth (number, D), unknown (D,) or None, and the r that says so, for DRAWS samples of each; normalised units."""
    if args.inpaint:
        unknown = missing(args.inpaint, dataset.shape, args.seed)
        given, sigma = np.where(unknown, np.nan, truth), np.where(unknown, np.inf, 0)
    else:
        unknown, sigma = None, args.denoise
        noise = 0 if args.input else sigma * dpm.generator(np, "observation", args.seed).standard_normal(truth.shape)
        given = truth + noise
    return given, unknown, dpm.Observation(np.repeat(given, DRAWS, 0), sigma, model.xp)


def nearest(dataset, x):
    """The training examples nearest to x (n, D), and their root mean square distance (n,), normalised units."""
    best, found = np.full(len(x), np.inf), np.zeros_like(x)
    for i in range(0, len(dataset.train), 4096):
        block = dataset.normalise(dataset.train[i:i + 4096], dpm.generator(np, "nearest", i), np.float32)
        square = (x ** 2).sum(1)[:, None] - 2 * x @ block.T + (block ** 2).sum(1)
        j = square.argmin(1)
        closer = square[np.arange(len(x)), j] < best
        best[closer], found[closer] = square[np.arange(len(x)), j][closer], block[j[closer]]
    return found, np.sqrt(np.maximum(best, 0) / x.shape[1])


def report(model, args, truth, given, unknown, samples):
    """What can be measured of posterior samples (number, DRAWS, D)."""
    mean, deviation = samples.mean(1), "bits" if model.about["binary"] else "in units of the data's deviation"
    if unknown is not None:
        change = np.abs(samples[:, :, ~unknown] - truth[:, None, ~unknown]).max()
        print(f"known values: changed by {change:g}; missing ones: {samples[:, :, unknown].std(1).mean():.3f} apart between samples, {deviation}")
    if args.input and unknown is None:
        return  # the pictures came noisy, and nobody knows the truth
    where = slice(None) if unknown is None else unknown
    error = lambda x: math.sqrt(((x - truth)[:, where] ** 2).mean())
    psnr = lambda x: f", PSNR {20 * math.log10(255 / (error(x) * model.scale)):.1f} dB" if model.about["bytes"] else ""
    print(f"root mean square error, {deviation}: mean of {DRAWS} samples {error(mean):.3f}{psnr(mean)}; one sample {error(samples[:, 0]):.3f}{psnr(samples[:, 0])}"
          + (f"; given {error(given):.3f}{psnr(given)}" if unknown is None else ""))


def picture_of(model, columns):
    """A function from normalised examples (n, D), NaN where missing, to a picture in rows of `columns`; a vector of bits is a row of pixels."""
    bits = model.kernel.pixels == 1 and model.about["binary"]

    def draw(x):
        if model.kernel.pixels == 1 and not bits:
            return train.points_picture({"": x})
        pictures = train.to_bytes(model, np.nan_to_num(x), (1, -1, 1) if bits else None)
        pictures[np.isnan(x).reshape(pictures.shape)] = 128
        return train.grid(pictures, columns, zoom=8 if bits else 3)

    return draw


def main():
    args = arguments()
    mode = "inpaint" if args.inpaint else "samples" if args.denoise is None else "denoise"
    number = args.number if args.number is not None else 64 if mode == "samples" else 8
    if number < 1 or args.seed < 0 or args.particles < 1 or args.denoise is not None and not 0 < args.denoise < np.inf:
        raise dpm.InputError("--number, --particles and --denoise must be positive, --seed must not be negative")
    if mode == "samples" and (args.input or args.r_schedule or args.particles > 1):
        raise dpm.InputError("--input, --particles and --r-schedule go with --inpaint or --denoise")
    checkpoint = find_checkpoint(args.checkpoint)
    model = dpm.DPM.load(checkpoint, dpm.backend(args.gpu))
    print(f"{checkpoint} on {train.device_name(model.xp)}: {model.about['dataset']}, T = {model.T}", flush=True)
    T, image = model.T, model.kernel.pixels > 1
    drawn_in_rows = image or model.about["binary"]
    try:
        dataset = train.load_for(model)
    except dpm.InputError:
        if mode != "samples":
            raise
        dataset = None  # sampling does without; only the nearest training images are not looked for
    bar = lambda name: lambda s: tqdm(s, desc=name)
    times = lambda n: sorted({round(T * i / n) for i in range(n + 1)}, reverse=True)  # T..0
    frames, strip = times(60) if args.gif else [], times(9) if args.trajectory else []
    keep = {*frames, *strip} - {0}
    truth = given = unknown = r = None
    if mode != "samples":
        truth = to_complete(model, dataset, args, number)
        number = len(truth)
        given, unknown, r = posterior(model, dataset, args, truth)
    draws = DRAWS if r else 1
    samples = model.sample(number * draws, args.seed, r, args.r_schedule or "predicted", args.particles, keep=keep, progress=bar("reverse steps"))
    samples, kept = samples if keep else (samples, {})
    samples, kept = dpm.to_host(samples), {t: dpm.to_host(x) for t, x in kept.items()} | {0: dpm.to_host(samples)}
    arrays, layout = dict(samples=model.raw(samples)), ""
    rows, columns = samples, 8 if image else 1
    if r:
        sets = dict(truth=truth, given=given, samples=samples.reshape(number, DRAWS, -1))
        if args.input and mode == "denoise":  # nobody knows what is under this noise
            del sets["truth"]
        arrays = {name: model.raw(x) for name, x in sets.items()} | ({} if unknown is None else {"unknown": unknown})
        report(model, args, truth, given, unknown, sets["samples"])
        rows = [sets[name].reshape(number, -1, samples.shape[1]) for name in sets]
        layout = f": {'truth, ' if 'truth' in sets else ''}what is given, {DRAWS} posterior samples"
        if mode == "denoise" and drawn_in_rows:
            rows.append(sets["samples"].mean(1, keepdims=True))
            layout += ", their mean"
            if image:
                rows.append(dpm.to_host(model.sample(number, args.seed + 1, progress=bar("free samples")))[:, None])
                layout += ", and a sample that was given nothing"
    if image and dataset:
        first = samples[::draws]
        close, distance = nearest(dataset, first)
        _, usual = nearest(dataset, dataset.held_out(len(first)))
        print(f"nearest training image: {distance.mean():.3f} away, root mean square in units of the data's deviation; for test images it is {usual.mean():.3f}")
        arrays["nearest"] = model.raw(close)
        if mode == "inpaint":
            rows.append(close[:, None])
            layout += ", and the training image nearest to the first of them"
    if r:
        rows = np.concatenate(rows, 1)
        columns = rows.shape[1]
        rows = rows.reshape(-1, rows.shape[2])
    out = pathlib.Path(args.out or f"runs/{mode}")
    out.parent.mkdir(parents=True, exist_ok=True)
    written = [out.with_name(out.name + end) for end in (".png", ".npz")]
    with dpm.written_whole(written[1]) as part:
        np.savez(part, **arrays)
    if drawn_in_rows:
        train.save_picture(picture_of(model, columns)(rows), written[0])
    else:
        train.save_picture(train.points_picture(sets if r else dict(samples=samples)), written[0])
    if args.trajectory:
        written.append(out.with_name(out.name + "-trajectory.png"))
        ways = {t: kept[t][::draws][:8] if drawn_in_rows else kept[t] for t in strip}
        if drawn_in_rows:
            train.save_picture(picture_of(model, len(ways))(np.stack(list(ways.values()), 1).reshape(-1, samples.shape[1])), written[-1])
        else:
            train.save_picture(train.points_picture({f"t = {t}": x for t, x in ways.items()}, size=2), written[-1])
    if args.gif:
        written.append(out.with_name(out.name + ".gif"))
        draw = picture_of(model, DRAWS if r else columns)
        pictures = [draw(kept[t]).convert("P") for t in frames]
        with dpm.written_whole(written[-1]) as part:
            pictures[0].save(part, format="GIF", save_all=True, append_images=pictures[1:], duration=[60] * (len(pictures) - 1) + [2000], loop=0)
    print(f"{written[0]}{layout}; {', '.join(map(str, written[1:]))}")


if __name__ == "__main__":
    train.run(main)
