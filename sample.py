"""Sample from a trained model, or from its product with what is known: posterior samples, by one mechanism.

    python sample.py                                 # the newest run, else the MNIST model that ships with the program
    python sample.py --checkpoint runs/mnist --number 100
    python sample.py --inpaint                       # the left half of test images is missing; also right, top, bottom, center
    python sample.py --inpaint mask.png              # your own mask, white where a pixel is missing
    python sample.py --denoise 1.0                   # test images under noise of the data's own standard deviation

Writes a picture and an .npz with the arrays behind it, in the data's units: samples, and for a posterior truth, given, unknown.
"""
import dpm  # first: it keeps BLAS to one thread, before numpy starts it

import argparse
import pathlib

import numpy as np
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

import train

SHIPPED = pathlib.Path(__file__).parent / "data" / "mnist" / "model.npz"
DRAWS = 6  # posterior samples for each input


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", metavar="FILE|DIR", help="a checkpoint or a run's directory (default: the newest run, else the shipped MNIST model)")
    p.add_argument("--number", type=int, help="how many samples (default: 64), or how many test images to inpaint or denoise (8)")
    what = p.add_mutually_exclusive_group()
    what.add_argument("--inpaint", metavar="PART|MASK", nargs="?", const="left",
                      help="draw what is missing: left (default), right, top, bottom, center, or a picture that is white where pixels are missing")
    what.add_argument("--denoise", metavar="SIGMA", type=float, help="draw what is under noise of this standard deviation, in units of the data's")
    p.add_argument("--seed", type=int, default=0, help="sample k depends on the seed and on k alone (default: %(default)s)")
    p.add_argument("--out", metavar="NAME", help="writes NAME.png and NAME.npz (default: runs/samples, runs/inpaint or runs/denoise)")
    p.add_argument("--gpu", action=argparse.BooleanOptionalAction, help="compute with CuPy on a GPU, or not (default: if there is one)")
    return p.parse_args()


def find_checkpoint(given):
    if given:
        return train.checkpoint_in(given)
    runs = sorted(pathlib.Path("runs").glob("*/checkpoint.npz"), key=lambda p: p.stat().st_mtime)
    return runs[-1] if runs else SHIPPED


def missing(part, shape):
    """What is to be drawn anew, (D,) bool, for examples of shape (H, W, C). A vector counts as one row of D pixels."""
    H, W, C = shape if shape[:2] != (1, 1) else (1, shape[2], 1)
    row, column = np.arange(H)[:, None], np.arange(W)[None, :]
    parts = dict(left=column < W // 2, right=column >= W - W // 2, top=row < H // 2, bottom=row >= H - H // 2,
                 center=(np.abs(2 * row - H + 1) < H / 2) & (np.abs(2 * column - W + 1) < W / 2))
    if part in parts:
        unknown = np.broadcast_to(parts[part], (H, W))
    else:
        try:
            with Image.open(part) as picture:
                unknown = np.asarray(picture.convert("L")) > 127
        except (FileNotFoundError, IsADirectoryError):
            raise dpm.InputError(f"--inpaint {part}: neither {', '.join(parts)} nor a mask picture") from None
        except (UnidentifiedImageError, OSError):
            raise dpm.InputError(f"--inpaint {part}: not a picture that can be read") from None
        if unknown.shape != (H, W):
            raise dpm.InputError(f"--inpaint {part}: the mask is {unknown.shape[1]} x {unknown.shape[0]} pixels, the data {W} x {H}")
    if unknown.all() or not unknown.any():
        raise dpm.InputError(f"--inpaint {part}: {'nothing is known' if unknown.all() else 'nothing is missing'} in this mask")
    return np.repeat(unknown.ravel(), C)


def posterior(model, args, number):
    """truth (number, D), given, what was done to it, unknown (D,) or None, and samples (number, DRAWS, D); normalised units."""
    dataset = train.load_for(model)
    truth = dataset.held_out(number, seed=args.seed)
    if len(truth) < number:
        raise dpm.InputError(f"--number {number}: {dataset.name} has only {len(truth)} test examples")
    if args.inpaint:
        unknown = missing(args.inpaint, dataset.shape)
        given, sigma = np.where(unknown, np.nan, truth), np.where(unknown, np.inf, 0)
    else:
        unknown, sigma = None, args.denoise
        given = truth + sigma * dpm.generator(np, "observation", args.seed).standard_normal(truth.shape)
    r = dpm.Observation(np.repeat(given, DRAWS, 0), sigma, model.xp)
    samples = dpm.to_host(model.sample(number * DRAWS, args.seed, r, progress=lambda s: tqdm(s, desc="reverse steps")))
    return truth, given, unknown, samples.reshape(number, DRAWS, -1)


def main():
    args = arguments()
    number = args.number if args.number is not None else 8 if args.inpaint or args.denoise is not None else 64
    if number < 1 or args.seed < 0 or args.denoise is not None and not 0 < args.denoise < np.inf:
        raise dpm.InputError("--number and --denoise must be positive, --seed must not be negative")
    checkpoint = find_checkpoint(args.checkpoint)
    model = dpm.DPM.load(checkpoint, dpm.backend(args.gpu))
    print(f"{checkpoint} on {train.device_name(model.xp)}: {model.about['dataset']}, T = {model.T}", flush=True)
    image, mode = model.kernel.pixels > 1, "inpaint" if args.inpaint else "samples" if args.denoise is None else "denoise"
    units = lambda x: x * model.scale + model.shift
    if mode == "samples":
        samples = dpm.to_host(model.sample(number, args.seed, progress=lambda s: tqdm(s, desc="reverse steps")))
        arrays, sets = dict(samples=units(samples)), dict(samples=samples)
        rows = samples
    else:
        truth, given, unknown, samples = posterior(model, args, number)
        arrays = dict(truth=units(truth), given=units(given), samples=units(samples))
        sets = dict(truth=truth, given=given, samples=samples)
        rows = np.concatenate([truth[:, None], given[:, None], samples], 1)
        if unknown is not None:
            arrays["unknown"] = unknown
            change = np.abs(samples[:, :, ~unknown] - truth[:, None, ~unknown]).max()
            print(f"known values: changed by {change:g}; missing ones: {samples[:, :, unknown].std(1).mean():.3f} apart between samples, in units of the data's deviation")
        else:
            rows = np.concatenate([rows, samples.mean(1)[:, None]], 1)
            error = lambda x: np.sqrt(((x - truth) ** 2).mean())
            print(f"root mean square error, in units of the data's deviation: given {error(given):.3f}, mean of {DRAWS} samples {error(samples.mean(1)):.3f}")
        rows = rows.reshape(-1, rows.shape[-1])
    out = pathlib.Path(args.out or f"runs/{mode}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with dpm.written_whole(out.with_name(out.name + ".npz")) as part:
        np.savez(part, **arrays)
    picture = out.with_name(out.name + ".png")
    if image:
        pictures = train.to_bytes(model, np.nan_to_num(rows))
        if mode == "inpaint":
            pictures.reshape(number, -1, rows.shape[-1])[:, 1, unknown] = 128
        train.save_grid(pictures, picture, columns=8 if mode == "samples" else len(rows) // number)
        layout = {"samples": "", "inpaint": f": truth, what is given (gray: missing), {DRAWS} posterior samples",
                  "denoise": f": truth, what is given, {DRAWS} posterior samples, their mean"}[mode]
    else:
        train.draw_points(sets, picture)
        layout = ""
    print(f"{picture}{layout}; {out.with_name(out.name + '.npz')}")


if __name__ == "__main__":
    train.run(main)
