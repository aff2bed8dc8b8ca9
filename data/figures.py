"""Everything that is drawn: examples as pictures, and the figures of train.py and sample.py.

Data is drawn in its own units, numbers of the model in bits, which come in as nats. `model` is a
dpm.DPM. Every file is written whole or not at all.
"""
import dpm  # before numpy, see there

import csv
import io
import math
import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

LN2 = math.log(2)


def kind_of(model):
    """What examples are called and drawn as: images, sequences (vectors of bits) or points."""
    if model.shape[0] * model.shape[1] > 1:
        return "images"
    return "sequences" if model.about["binary"] else "points"


# -------------------------------------------------------------------------------------------------
# Examples
# -------------------------------------------------------------------------------------------------

def to_bytes(model, x, shape=None, like=None):
    """Normalised images (n, D) as uint8 pictures (n, H, W, C), gray where x is NaN, not known.

    Bytes lose the fraction that dequantised them; of bits a one is white, but black in sequences,
    as in the paper's figure 2; other data is stretched so that the least value of `like` (of x, if
    None) is black and the greatest white."""
    raw = model.raw(x)
    if model.about["binary"]:
        raw = (1 - raw if kind_of(model) == "sequences" else raw) * 255
    elif not model.about["bytes"]:
        among = raw if like is None else model.raw(like)
        low, high = float(np.nanmin(among)), float(np.nanmax(among))
        raw = (raw - low) / ((high - low) or 1.0) * 255
    raw = np.where(np.isnan(raw), 128, np.clip(np.floor(raw), 0, 255))
    return raw.astype(np.uint8).reshape(len(x), *(shape or model.shape))


def zoomed(picture, zoom):
    """The picture `zoom` times as large: whole pixels if larger, averages of pixels if smaller."""
    size = [max(1, round(side * zoom)) for side in picture.size]
    return picture.resize(size, Image.Resampling.NEAREST if zoom >= 1 else Image.Resampling.BOX)


def zoom_for(model):
    """How much an image, or a sequence, which is a row of pixels, is magnified."""
    W = model.shape[1]
    return max(1, min(3, 100 // W)) if W > 1 else max(1, min(8, 800 // model.D))


def sheet(model, x, columns=8, zoom=None, like=None):
    """Normalised images or sequences (n, D) in rows of `columns`, two pixels apart; NaN is gray."""
    shape = (1, model.D, 1) if kind_of(model) == "sequences" else None
    pictures, rows = to_bytes(model, x, shape, like), -(-len(x) // columns)
    _, H, W, C = pictures.shape
    page = np.full((rows * (H + 2) + 2, columns * (W + 2) + 2, C), 128, np.uint8)
    for i, picture in enumerate(pictures):
        top, left = 2 + i // columns * (H + 2), 2 + i % columns * (W + 2)
        page[top:top + H, left:left + W] = picture
    return zoomed(Image.fromarray(page[..., 0] if C == 1 else page), zoom or zoom_for(model))


def sheet_of(model, sets, extra, most):
    """One picture of samples, and what is to be seen in it. sets {name: (n, k, D)}: the samples
    alone, or columns for n inputs; extra: more columns; most: so many examples at most."""
    kind, k = kind_of(model), sets["samples"].shape[1]
    if kind == "points":
        number = f"{len(sets['samples'])} samples"
        return points_picture(model, sets), f"panels {', '.join(sets)}" if len(sets) > 1 else number
    if len(sets) == 1:
        x = sets["samples"][:most, 0]
        columns = max(8, math.isqrt(len(x))) if kind == "images" else -(-len(x) // 64)
        return sheet(model, x, columns), f"{len(x)} samples"
    parts = sets | extra
    columns = sum(x.shape[1] for x in parts.values())
    rows = np.concatenate([x[:most // columns] for x in parts.values()], 1).reshape(-1, model.D)
    names = dict(given="what is given", samples=f"{k} posterior sample" + "s" * (k > 1))
    layout = ", ".join(names.get(name, name) for name in parts)
    return sheet(model, rows, columns), f"columns {layout}"


def times(T, number):
    """About so many times from T down to 0, evenly spread."""
    return np.unique(np.linspace(0, T, number).round().astype(int))[::-1].tolist()


def strip(model, kept, draws):
    """How samples came about, from left to right, in ten of the times of kept = {t: x_t (n, D)}: of
    the first eight inputs, which have `draws` samples each, or of eight samples."""
    ts = times(model.T, 10)
    if kind_of(model) == "points":
        return points_picture(model, {f"t = {t}": kept[t] for t in ts}, 2)
    ways = np.stack([kept[t][::draws][:8] for t in ts], 1).reshape(-1, model.D)
    return sheet(model, ways, len(ts), like=kept[0])


def frames(model, kept, columns):
    """The same as pictures of all samples in 60 times, and how much to magnify them."""
    ts = times(model.T, 60)
    if kind_of(model) == "points":
        both = np.concatenate([kept[model.T], kept[0]])
        return [points_picture(model, {f"t = {t}": kept[t]}, like=both) for t in ts], 1
    return [sheet(model, kept[t], columns, 1, like=kept[0]) for t in ts], zoom_for(model)


def points_picture(model, sets, size=4, like=None):
    """The first two coordinates of vectors, in the data's units, a panel for each set (..., D).

    A point with one coordinate missing (NaN) is the line on which it lies. Up to ten examples have
    a colour each, the same in every panel. Both axes have one scale, and show all of the sets, or
    of `like`, but for points far off. Vectors of one coordinate are drawn as histograms."""
    D, sets = model.D, {name: model.raw(x).reshape(len(x), -1, model.D) for name, x in sets.items()}
    shown = sets.values() if like is None else [model.raw(like)]
    low, high = _limits(np.concatenate([x.reshape(-1, D)[:, :2] for x in shown]))
    figure, axes = _axes(1, len(sets), (size * len(sets), size), sharex=True, sharey=True)
    of = f" of {D}" * (D > 2)
    for axis, (name, x) in zip(axes[0], sets.items()):
        far = int(((x[..., :2] < low) | (x[..., :2] > high)).any(2).sum())
        axis.set(title=name + f", {far} far off" * (far > 0), xlabel="first coordinate" + of,
                 xlim=(low[0], high[0]))
        if D == 1:
            axis.hist(x.ravel(), np.linspace(low[0], high[0], 61), density=True)
            continue
        axis.set(aspect="equal", ylim=(low[1], high[1]))
        for i, group in enumerate(x if len(x) <= 10 else x.reshape(1, -1, D)):
            a, b = group[:, :2].T
            colour, whole = f"C{i}", ~np.isnan(a + b)
            axis.scatter(a[whole], b[whole], s=3 if len(a) > 50 else 12, color=colour)
            for value in np.unique(a[np.isnan(b) & ~np.isnan(a)])[:200]:
                axis.axvline(value, color=colour, lw=1)
            for value in np.unique(b[np.isnan(a) & ~np.isnan(b)])[:200]:
                axis.axhline(value, color=colour, lw=1)
        if np.isnan(x[..., :2]).all():
            axis.text(0.5, 0.5, "these two are missing", transform=axis.transAxes, ha="center")
    axes[0, 0].set_ylabel("density" if D == 1 else "second coordinate" + of)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _limits(x):
    """The lower and the upper ends of axes (d,), all of one length, for points x (n, d): they hold
    all points but those further out than half the width of the middle 98 %."""
    inner = np.nanquantile(x, (0.01, 0.99), axis=0)
    reach = (inner[1] - inner[0]) / 2
    low = np.maximum(np.nanmin(x, 0), inner[0] - reach)
    high = np.minimum(np.nanmax(x, 0), inner[1] + reach)
    half = 0.55 * float((high - low).max()) or 1.0
    return (low + high) / 2 - half, (low + high) / 2 + half


# -------------------------------------------------------------------------------------------------
# Files
# -------------------------------------------------------------------------------------------------

def save_picture(picture, path):
    with dpm.written_whole(path) as part:
        picture.save(part, format="PNG")


def save_figure(figure, path):
    with dpm.written_whole(path) as part:
        figure.savefig(part, dpi=110, format="png", bbox_inches="tight")


def save_gif(frames, zoom, path, limit=3_000_000):
    """Pictures, `zoom` times as large, as an animation of 4 s, whose last stays for two more.

    Noise hardly compresses. So there are at most 60 frames, and while the file is above `limit`
    bytes it is made smaller, with fewer frames and fewer colours."""
    smaller = [(z, 60, 64) for z in range(zoom, 1, -1)] + [
        (min(2, zoom), 30, 32), (1, 60, 64), (1, 30, 32), (0.5, 30, 32), (0.5, 15, 16),
        (0.25, 15, 16), (0.1, 10, 8)]
    for zoom, number, colours in smaller:
        chosen = times(len(frames) - 1, number)[::-1]
        made = [zoomed(frames[i], zoom).quantize(colours, dither=Image.Dither.NONE) for i in chosen]
        duration = [round(4000 / len(made))] * (len(made) - 1) + [2000]
        content = io.BytesIO()
        made[0].save(content, "GIF", save_all=True, append_images=made[1:], duration=duration,
                     loop=0)
        if content.tell() <= limit:
            break
    with dpm.written_whole(path) as part:
        part.write_bytes(content.getvalue())


def _axes(rows=1, columns=1, size=(6, 3.5), **options):
    """A figure and its axes (rows, columns). No pyplot: nothing global, and no screen needed."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


# -------------------------------------------------------------------------------------------------
# Training, the bound, the schedule
# -------------------------------------------------------------------------------------------------

def curve(lines, path):
    """K - L_null during training, from the lines of a run's log; nothing if there are none."""
    rows = list(csv.DictReader(lines))
    if not rows:
        return
    step, seconds, K = (np.array([float(row[name]) for row in rows])
                        for name in ("step", "seconds", "K_minus_L_null_bits"))
    figure, axes = _axes()
    axes[0, 0].plot(step, K)
    axes[0, 0].axhline(0, color="gray", lw=0.8)
    axes[0, 0].set(xlabel=f"step ({seconds[-1] / 60:.1f} minutes)", ylabel="K - L_null, bits",
                   title="training batches; at 0 the model is plain noise")
    save_figure(figure, path)


def by_t(T, curves, ylabel, title, path, yscale="linear"):
    """Named curves (T + 1,) in nats, drawn in bits over t = 2..T."""
    figure, axes = _axes()
    for style, (name, values) in zip(("-", "--", "-.", ":"), curves.items()):
        axes[0, 0].plot(np.arange(2, T + 1), values[2:] / LN2, style, label=name)
    axes[0, 0].legend()
    axes[0, 0].set(xlabel="t", ylabel=ylabel, title=title, yscale=yscale)
    save_figure(figure, path)


def schedule(model, path):
    """The schedule that training began with and the one it learned: noise to signal, and beta."""
    T, learned = model.T, dpm.to_host(model.diffusion.alpha_bar)
    layer = dpm.LearnedSchedule(T, 1 - float(learned[1]))
    begun = layer.forward(np.zeros(layer.shapes["psi"]))
    figure, axes = _axes(1, 2, (8, 3.5))
    for name, a in (("before", begun), ("learned", learned)):
        axes[0, 0].plot(np.arange(1, T + 1), (1 - a[1:]) / a[1:], label=name)
        axes[0, 1].plot(np.arange(1, T + 1), 1 - a[1:] / a[:-1], label=name)
    axes[0, 0].set(xlabel="t", yscale="log", title="(1 - alpha_bar_t) / alpha_bar_t")
    axes[0, 1].set(xlabel="t", yscale="log", title="beta_t")
    axes[0, 0].legend()
    save_figure(figure, path)


def rate_distortion(bound, D, scale, path):
    """How a picture could be sent step by step (DDPM section 4.3), from what DPM.bound returns.
    Whoever has x_t has paid for the KLs of steps t+1..T, the rate, and sees x_0^(x_t), which is off
    by the distortion. scale: the data's, which turns normalised units into grey levels 0..255.

    Returns at most ten rows (t, rate in bits/dim, root mean square error), DDPM's Table 4."""
    T = len(bound["kl"]) - 1
    seen = np.flatnonzero(~np.isnan(bound["distortion"]))[::-1]    # t = 1 only with a decoder
    paid = np.cumsum(np.append(0, bound["kl"][::-1]))[::-1] / LN2 / D    # for steps t..T
    made, rate, error = T - seen + 1, paid[seen + 1], np.sqrt(bound["distortion"][seen]) * scale
    figure, axes = _axes(1, 3, (11, 3.3))
    names = ("reverse steps made", "rate, bits/dim", "error of predicted x_0, levels of 0..255")
    values = made, rate, error
    for axis, (x, y) in zip(axes[0], ((0, 2), (0, 1), (1, 2))):
        axis.plot(values[x], values[y])
        axis.set(xlabel=names[x], ylabel=names[y], ylim=(0, None))
    save_figure(figure, path)
    rows = sorted({int(np.abs(made - T * k / 10).argmin()) for k in range(1, 11)})
    return [(int(seen[i]), float(rate[i]), float(error[i])) for i in rows]


def against_steps(rows, path):
    """What a shorter chain costs, from dicts: steps, K_bits, and for images bits_per_dim and
    frechet, which is the distance of samples, and frechet_test, that of test images."""
    rows = sorted(rows, key=lambda row: row["steps"])
    panels = dict(bits_per_dim="bits/dim") if "bits_per_dim" in rows[0] else dict(K_bits="K, bits")
    panels |= dict(frechet="Frechet distance of samples") if "frechet" in rows[0] else {}
    figure, axes = _axes(1, len(panels), (4.5 * len(panels), 3.5))
    steps = [row["steps"] for row in rows]
    for axis, (name, label) in zip(axes[0], panels.items()):
        axis.plot(steps, [row[name] for row in rows], "o-")
        axis.set(xlabel="steps S", ylabel=label, xscale="log")
        axis.set_xticks(steps, steps)
        axis.minorticks_off()
    if "frechet" in panels:
        axes[0, 1].axhline(rows[0]["frechet_test"], color="gray", ls="--", label="test images")
        axes[0, 1].set_ylim(bottom=0)
        axes[0, 1].legend()
    save_figure(figure, path)


def comparison(results, path):
    """K of several runs, the dicts of their result.json, against T: a panel for each data set, a
    curve for every way of training."""
    names = sorted({r["dataset"] for r in results})
    figure, axes = _axes(1, len(names), (6 * len(names), 4))
    for axis, name in zip(axes[0], names):
        here, curves = [r for r in results if r["dataset"] == name], {}
        for r in sorted(here, key=lambda r: r["timesteps"]):
            curves.setdefault(f"{r['schedule']}, {r['objective']}, {r['network']}", []).append(r)
        for label, runs in curves.items():
            T = [r["timesteps"] for r in runs]
            line, = axis.plot(T, [r["K_bits"] / r["pixels"] for r in runs], "o-",
                              label=f"K, {label}")
            if "K_star_bits" in runs[0]:
                axis.plot(T, [r["K_star_bits"] for r in runs], "_:", ms=12, color=line.get_color(),
                          label="K*, the best there is")
        if "L_true_bits" in here[0]:
            axis.axhline(here[0]["L_true_bits"], color="k", lw=0.8, label="L, the data's own")
        axis.set(xlabel="T", ylabel="bits a pixel" if here[0]["pixels"] > 1 else "bits",
                 xscale="log", title=pathlib.Path(name).name)
        every = sorted({r["timesteps"] for r in here})
        axis.set_xticks(every, every)
        axis.minorticks_off()
        axis.legend(fontsize="small")
    save_figure(figure, path)


def beside_each_other(evaluated, path):
    """A row for each run of images, pairs of its directory and its result.json: the first row of
    its samples, how it was trained, and what came of it."""
    figure, axes = _axes(len(evaluated), 1, (9, 1.1 * len(evaluated)))
    for axis, (out, r) in zip(axes[:, 0], evaluated):
        with Image.open(out / "samples.png") as sheet:
            axis.imshow(sheet.crop((0, 0, sheet.width, sheet.height // 8)), cmap="gray")
        how = [f"{r['objective']}, {r['schedule']}", f"variance {r['variance']}, {r['predict']}",
               " ".join(map(str, [r["network"], *(r["widths"] or ())])), r["decoder"]]
        how += [f"{r['bits_per_dim']:.3f} bits/dim"] if "bits_per_dim" in r else []
        axis.set_ylabel("\n".join([*how, f"Frechet {r['frechet']:.1f}"]), rotation=0, ha="right",
                        va="center", fontsize="x-small")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    save_figure(figure, path)


# -------------------------------------------------------------------------------------------------
# What diffusion does
# -------------------------------------------------------------------------------------------------

def forgetting(q, x, path):
    """The chain forgets where it came from: KL[q(x_t | x_0) || pi], the mean over x_0, falls as
    alpha_bar_t does, or its square, whether x_0 is data (n, D) or one point. Of numbers in one or
    two dimensions, also how the first coordinate is distributed on the way."""
    D, gaussian = x.shape[1], isinstance(q, dpm.Gaussian)
    x = q.xp.asarray(x)
    points = {"all zeros": 0.0, "all ones": 1.0}
    if gaussian:
        points = {"the origin": 0.0, "a point far away": 10.0}
    number = len(x) if D <= 2 else 1
    starts = {"data": x} | {name: q.xp.full((number, D), at) for name, at in points.items()}
    ts = times(q.T, 200)[-2::-1]  # without 0
    small = gaussian and D <= 2
    figure = Figure(figsize=(7, 5.5 if small else 3.8), layout="constrained")
    above, *below = figure.subfigures(1 + small, 1, height_ratios=[2, 1][:1 + small],
                                      squeeze=False)[:, 0]
    axis = above.subplots()
    for name, x0 in starts.items():
        kl = [float(q.kl_to_pi(t, x0).mean()) / LN2 / D for t in ts]
        axis.plot(ts, kl, label=f"from {name}")
    alpha_bar = dpm.to_host(q.alpha_bar)
    axis.plot(ts, alpha_bar[ts], "k--", lw=1, label="alpha_bar_t")
    axis.plot(ts, alpha_bar[ts] ** 2, "k:", lw=1, label="alpha_bar_t squared")
    axis.set(xlabel="t", ylabel="KL from pi, bits per dimension", yscale="log",
             title="steps of q bring any start to pi")
    axis.legend()
    if small:
        rng = dpm.generator(np, "forgetting")
        chosen = [int(np.abs(alpha_bar - a).argmin()) for a in (1, 0.9, 0.3, 0)]
        bins = np.linspace(-4, 12, 81)
        pi = np.exp(-bins ** 2 / 2) / math.sqrt(2 * math.pi)
        for axis, t in zip(below[0].subplots(1, 4, sharex=True, sharey=True), chosen):
            for x0 in starts.values():
                noise = q.xp.asarray(rng.standard_normal(x0.shape))
                xt = q.q_jump(x0, q.xp.full(len(x0), t)).draw(noise)
                axis.hist(dpm.to_host(xt)[:, 0], bins, density=True, histtype="step")
            axis.plot(bins, pi, "k--", lw=1)
            axis.set(title=f"t = {t}", xlabel="first coordinate", yticks=[], ylim=(0, 0.8))
    save_figure(figure, path)


def figure_1(model, dataset, path, number=2000):
    """Figure 1 of the paper, for data of two numbers: the data diffusing, the model running
    backwards, and the drift f_mu(x, t) - x, its longer arrows cut, at three times: the data, a
    quarter of its variance gone, noise."""
    T, xp, q = model.T, model.xp, model.diffusion
    ts = (1, max(2, int(np.abs(dpm.to_host(q.alpha_bar) - 0.75).argmin())), T)
    x0 = xp.asarray(dataset.draw(number, dpm.generator(dataset.xp, "figure")))
    rng = dpm.generator(np, "noise of figure")
    samples, kept = model.sample(number, keep=ts[1:])
    kept[1] = samples
    size = max(3.0, 1.1 * float(abs(x0).max()))
    lines = np.linspace(-size, size, 23)
    places = xp.asarray(np.stack(np.meshgrid(lines, lines), 2).reshape(-1, 2))
    figure, axes = _axes(3, 3, (7.5, 7.8), sharex=True, sharey=True)
    for column, t in enumerate(ts):
        noise = xp.asarray(rng.standard_normal((number, 2)))
        xt = x0 if t == 1 else q.q_jump(x0, xp.full(number, t)).draw(noise)
        drift = dpm.to_host(model.p_back(places, max(t, 2)).mean - places)
        length = np.linalg.norm(drift, axis=1, keepdims=True)
        longest = np.quantile(length, 0.15)         # far from data it is a hundred times longer
        drift *= longest / np.maximum(length, longest)
        axes[0, column].scatter(*dpm.to_host(xt).T, s=1)
        axes[1, column].scatter(*dpm.to_host(kept[t]).T, s=1, color="C1")
        axes[2, column].quiver(*dpm.to_host(places).T, *drift.T, color="C2", angles="xy",
                               scale_units="xy", scale=longest / (lines[1] - lines[0]),
                               width=0.005)
        axes[0, column].set_title(f"t = {t}" if t > 1 else "t = 0; drift: t = 2")
        axes[2, column].set_xlabel("first coordinate")
    labels = "forward, q(x_t)", "reverse, p(x_t)", "drift, f_mu(x, t) - x"
    for axis, label in zip(axes[:, 0], labels):
        axis.set(ylabel=f"{label}\nsecond coordinate", xlim=(-size, size), ylim=(-size, size))
    for axis in axes.ravel():
        axis.set_aspect("equal")
    figure.suptitle("normalised units")
    save_figure(figure, path)


def figure_2(model, path):
    """Figure 2 of the paper: from independent bits, right, to data, left; a row is a sequence."""
    chosen = times(model.T, 5)[::-1]
    samples, kept = model.sample(40, keep=chosen[1:])
    kept[0] = samples
    figure, axes = _axes(1, len(chosen), (9, 3.6), sharey=True)
    for axis, t in zip(axes[0], chosen):
        axis.imshow(dpm.to_host(kept[t]), cmap="gray_r", vmin=0, vmax=1, aspect="auto",
                    interpolation="nearest")
        axis.set(title=f"t = {t}", xlabel="bin")
    axes[0, 0].set_ylabel("sequence")
    save_figure(figure, path)


def figure_3(model, dataset, path):
    """Figure 3 of the paper, for images: held-out data, the same under noise of variance 1, the
    same denoised (a sample of the posterior), and free samples."""
    x = dataset.held_out(8)
    noisy = x + dpm.generator(np, "figure 3").standard_normal(x.shape)
    rows = {"data": x, "under noise of\nvariance 1": noisy,
            "denoised": model.until(1.0).sample(len(x), x_T=noisy / math.sqrt(2)),
            "samples": model.sample(len(x))}
    figure, axes = _axes(len(rows), 1, (8.5, 4.1))
    for axis, (name, row) in zip(axes[:, 0], rows.items()):
        axis.imshow(sheet(model, row, len(x), like=x), cmap="gray", vmin=0, vmax=255,
                    interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    save_figure(figure, path)
