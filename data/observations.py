"""What posterior samples are drawn from, and how good they are: pictures that are given in part or
under noise, their Observation, and the distance of samples from the truth and from training images.
"""
import dpm  # before numpy, see there

import math
import os

import numpy as np

import data
from data import figures

PARTS = "left", "right", "top", "bottom", "center"
GIVEN = 6                       # how many test examples are completed or denoised


def missing(part, shape, seed=0, hole=None):
    """What is to be drawn, (D,) bool, for examples of shape (H, W, C); part and hole: see --inpaint
    and --hole. A vector counts as one row of D pixels."""
    H, W, C = shape if shape[:2] != (1, 1) else (1, shape[2], 1)
    if hole and hole >= min(H, W):
        raise dpm.InputError(f"--hole {hole}: examples are {W} x {H} pixels; give a smaller one")
    row, column = np.arange(H)[:, None], np.arange(W)[None, :]
    tall, wide = hole or (H + 1) // 2, hole or (W + 1) // 2
    y, x = row - (H - tall) // 2, column - (W - wide) // 2
    center = (0 <= y) & (y < tall) & (0 <= x) & (x < wide)
    parts = dict(zip(PARTS, (column < W // 2, column >= W - W // 2, row < H // 2,
                             row >= H - H // 2, center)))
    if part in parts:
        unknown = np.broadcast_to(parts[part], (H, W))
    elif os.path.isfile(part):
        unknown = data.read_pictures([part], (H, W, 1))[0, :, :, 0] > 127
    else:
        try:
            fraction = float(part)
        except ValueError:
            raise dpm.InputError(f"--inpaint {part}: neither {', '.join(PARTS)}, nor a fraction, "
                                 "nor the file of a mask") from None
        if not 0 < fraction < 1:
            raise dpm.InputError(f"--inpaint {part}: a fraction of the pixels lies between 0 and 1")
        order = dpm.generator(np, "mask", seed).permutation(H * W)
        unknown = order.reshape(H, W) < round(fraction * H * W)
    if unknown.all() or not unknown.any():
        what = "known" if unknown.all() else "missing"
        raise dpm.InputError(f"--inpaint {part}: nothing is {what}; give another part, or fraction")
    return np.repeat(unknown.ravel(), C)


def own_pictures(model, args):
    """(the model for pictures of their size, the pictures, normalised (n, D))."""
    if not model.about["bytes"] or figures.kind_of(model) != "images":
        raise dpm.InputError("--input takes pictures, and this model knows no pictures of bytes")
    pictures = data.read_pictures(args.input[:args.number], model.shape, any_size=True)
    sizes = sorted({f"{p.shape[1]} x {p.shape[0]}" for p in pictures})
    if len(sizes) > 1:
        raise dpm.InputError(f"--input: pictures of {sizes[0]} and of {sizes[1]} pixels; give "
                             "those of one size at a time")
    model, raw = model.resized(*pictures[0].shape[:2]), np.stack(pictures)
    u = dpm.generator(np, "input", args.seed).random(raw.shape)
    x = model.normal(raw + (0.5 if model.diffusion.discretised else u))
    return model, x.reshape(len(x), -1)


def test_examples(dataset, args):
    """The first test examples, normalised (n, D)."""
    truth = dataset.held_out(args.number or GIVEN, seed=args.seed)
    if len(truth) < (args.number or 1):
        raise dpm.InputError(f"--number {args.number}: there are {len(truth)} test examples")
    return truth


def draws_of(model):
    """Posterior samples for each input: 6; more of points, which cost little, and fewer of large
    pictures."""
    if figures.kind_of(model) == "points":
        return 50
    return max(1, min(6, 2 ** 16 // (model.shape[0] * model.shape[1])))


def observed(model, args, truth, draws):
    """given (n, D), what was done to the truth, NaN where it is missing; unknown (D,) or None; and
    the Observation that says so, for `draws` samples of each. Normalised units."""
    unknown, given, sigma = None, truth, args.denoise
    if args.mode == "inpaint":
        unknown = missing(args.inpaint, model.shape, args.seed, args.hole)
        given, sigma = np.where(unknown, np.nan, truth), np.where(unknown, np.inf, 0)
    elif not args.input:
        noise = dpm.generator(np, "observation", args.seed).standard_normal(truth.shape)
        given = truth + sigma * noise
    return given, unknown, dpm.Observation(np.repeat(given, draws, 0), sigma, model.xp)


def begun(model, given, sigma):
    """given = x_0 + sigma eps, normalised numbers (n, D), is an x_t but for a factor. The model
    whose chain begins there, and its x_T (n, D)."""
    return model.until(sigma), given / math.sqrt(1 + sigma ** 2)


def denoised(model, given, sigma):
    """E[x_0 | given] of the same: one call of the network says the mean of p_x0."""
    there, x_T = begun(model, given, sigma)
    x_T, t = model.xp.asarray(x_T), model.xp.full(len(given), there.T)
    return dpm.to_host(there.diffusion.p_x0(x_T, t, there.forward(x_T, t)).mean)


def nearest(dataset, x):
    """The training examples nearest to x (n, D), and their root mean square distance (n,),
    normalised units."""
    x = x.astype(np.float32)
    best, found = np.full(len(x), np.inf), np.zeros_like(x)
    for i in range(0, len(dataset.train), 4096):
        rng = dpm.generator(np, "nearest", i)
        block = dataset.normalise(dataset.train[i:i + 4096], rng, np.float32)
        square = (x ** 2).sum(1)[:, None] - 2 * x @ block.T + (block ** 2).sum(1)
        j, least = square.argmin(1), square.min(1)
        closer = least < best
        best[closer], found[closer] = least[closer], block[j[closer]]
    return found, np.sqrt(np.maximum(best, 0) / x.shape[1])


def unit_of(model):
    """What errors and distances are measured in."""
    return "of zeros and ones" if model.about["binary"] else "in units of the data's deviation"


def report(model, args, truth, given, unknown, samples, mean):
    """Lines on what can be measured of posterior samples (n, draws, D); mean: see denoised, or
    None."""
    lines, draws, where = [], samples.shape[1], slice(None)
    if unknown is not None:
        where = unknown
        change = np.abs(samples[:, :, ~unknown] - truth[:, None, ~unknown]).max()
        apart = samples[:, :, unknown].std(1).mean()
        lines.append(f"known values: changed by {change:g}" + (
            f"; missing ones: deviation {apart:.3f} between samples, {unit_of(model)}"
            if draws > 1 else ""))
    elif args.input:
        return lines                                # they came noisy: nobody knows the truth

    def error(x):
        rms = math.sqrt(((x - truth)[:, where] ** 2).mean())
        if not model.about["bytes"]:
            return f"{rms:.3f}"
        return f"{rms:.3f}, PSNR {20 * math.log10(255 / max(rms * model.scale, 1e-9)):.1f} dB"

    if mean is not None:
        found = [f"E[x_0 | given] {error(mean)}"]
    else:
        found = [f"mean of {draws} samples {error(samples.mean(1))}"] if draws > 1 else []
    found += [f"one sample {error(samples[:, 0])}"]
    found += [f"given {error(given)}"] if unknown is None else []
    return [*lines, f"root mean square error, {unit_of(model)}: {'; '.join(found)}"]
