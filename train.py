"""Train a diffusion model and evaluate it: data -> model -> checkpoint, log, numbers and figures in runs/<dataset>.

    python train.py                                  # swiss roll, about a minute
    python train.py --dataset mnist                  # 20 minutes on two cores
    python train.py --dataset mnist --gpu
    python train.py --dataset my_images.npy
    python train.py --resume runs/mnist              # go on where it was stopped, bit for bit
    python train.py --evaluate runs/mnist            # every number and figure of a trained model, anew
    python train.py --benchmark                      # images/s and how near that is to the machine's limit
"""
import dpm  # first: it keeps BLAS to one thread, before numpy starts it

import argparse
import csv
import json
import math
import pathlib
import platform
import signal
import statistics
import sys
import time

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import data

LN2 = math.log(2)
SAVE_EVERY = 30  # seconds between checkpoints
QUARTERS = [f"K_quarter_{i}_bits" for i in (1, 2, 3, 4)]
COLUMNS = ["step", "seconds", "K_minus_L_null_bits", *QUARTERS]

# What is right for vectors (H W = 1) and for images, where no flag says otherwise
DEFAULTS = {"vector": dict(steps=9500, batch_size=1024, lr=4e-3, timesteps=40),
            "image": dict(steps=11000, batch_size=128, lr=6e-3, timesteps=1000)}
KERNELS = {"vector": dict(maps=0, upper=128, upper_layers=3, scales=(0, 1, 2, 3, 4, 5)),
           "image": dict(width=256, layers=4, maps=4, sights=8, upper=64, upper_layers=2, scales=(1, 3, 5), patch=3)}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", metavar="NAME|PATH", help="swissroll, mnist, or the path of an .npy, .npz or IDX file or folder (default: swissroll)")
    p.add_argument("--gpu", action=argparse.BooleanOptionalAction, help="compute with CuPy on a GPU, or not (default: if there is one)")
    p.add_argument("--out", metavar="DIR", help="the run's directory (default: runs/<dataset>, with -2, -3, ... where taken)")
    p.add_argument("--resume", metavar="DIR", nargs="?", const="", help="go on with the run in DIR (default: --out, else runs/<dataset>)")
    p.add_argument("--evaluate", metavar="DIR", help="only evaluate the run in DIR, or a checkpoint file (then into runs/<its name>)")
    p.add_argument("--benchmark", action="store_true", help="only measure the speed of training and sampling (default data set here: mnist)")
    g = p.add_argument_group("training (defaults: vectors | images)")
    v, i = DEFAULTS["vector"], DEFAULTS["image"]
    g.add_argument("--steps", type=int, help=f"gradient steps ({v['steps']} | {i['steps']})")
    g.add_argument("--batch-size", type=int, help=f"examples in a step ({v['batch_size']} | {i['batch_size']})")
    g.add_argument("--lr", type=float, help=f"peak learning rate of Adam ({v['lr']} | {i['lr']})")
    g.add_argument("--timesteps", type=int, metavar="T", help=f"steps of the diffusion ({v['timesteps']} | {i['timesteps']})")
    g.add_argument("--schedule", choices=["logsnr", "paper", "linear"], help="beta_t, see dpm.schedule (logsnr)")
    g.add_argument("--seed", type=int, help="of weights, batches and noise (0)")
    g.add_argument("--dtype", choices=["float32", "float64"], help="of the network (float32)")
    return p.parse_args()


def settings(args, dataset):
    """The run's settings: what the flags say, and the defaults for this kind of data."""
    kind = "vector" if dataset.shape[:2] == (1, 1) else "image"
    chosen = dict(DEFAULTS[kind], schedule="logsnr", seed=0, dtype="float32")
    chosen |= {name: getattr(args, name) for name in chosen if getattr(args, name) is not None}
    check_positive(chosen)
    if chosen["timesteps"] < 2 or chosen["seed"] < 0:
        raise dpm.InputError("--timesteps must be 2 or more" if chosen["timesteps"] < 2 else "--seed must not be negative")
    options = KERNELS[kind]
    if kind == "image" and (dataset.shape[0] % 2 or dataset.shape[1] % 2):
        options = options | dict(sights=0)  # the middle network wants an image that can be halved
    return dict(dataset=dataset.name, **chosen), options


def new_model(dataset, chosen, kernel_options, xp):
    """beta_1 is the variance of the smallest detail there is to model: a hundredth of a grey level for bytes, else 0.004."""
    detail = 0.01 / dataset.scale if dataset.bytes else 0.004
    q = dpm.Gaussian(dpm.schedule(chosen["schedule"], chosen["timesteps"], detail ** 2), xp)
    kernel = dpm.Kernel(q, dataset.shape, **kernel_options, edges=dataset.edges, dtype=chosen["dtype"], seed=chosen["seed"])
    return dpm.DPM(q, kernel, dataset.shift, dataset.scale, chosen)


def check_positive(chosen):
    for name in ("steps", "batch_size", "lr"):
        if not chosen[name] > 0:
            raise dpm.InputError(f"--{name.replace('_', '-')} must be positive, not {chosen[name]}")


def optimiser_options(chosen):
    return dict(lr=chosen["lr"], steps=chosen["steps"], warmup=min(200, chosen["steps"] // 10 + 1))


def train(model, adam, dataset, out, seconds=0.0):
    """The loop. Everything random in step s depends on (seed, s) alone, so that a resumed run makes the same steps."""
    xp, chosen, T, D = model.xp, model.about, model.T, model.kernel.D
    number, steps, seed, dtype = chosen["batch_size"], chosen["steps"], chosen["seed"], model.kernel.dtype
    log_every = max(1, steps // 200)
    H_q_T, H_q_1 = model.diffusion.H_q(T), model.diffusion.H_q(1)
    checkpoint, stopped = out / "checkpoint.npz", []
    begun, saved_at, saved_step, recent = time.perf_counter() - seconds, -math.inf, adam.step, []

    def stop(*_):  # the step at hand is finished first; a second Ctrl-C does not wait for it
        stopped.append(True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def save():
        model.about |= dict(trained_steps=adam.step, seconds=round(time.perf_counter() - begun, 1), device=device_name(xp))
        model.save(checkpoint, adam)

    def check(norm):
        if not math.isfinite(norm):
            kept = f"{checkpoint} keeps step {saved_step}" if checkpoint.exists() else "nothing was saved yet"
            raise dpm.InputError(f"step {adam.step}: the gradient of the loss is {float(norm)}; {kept}; try a smaller --lr than {chosen['lr']}")

    handler = signal.signal(signal.SIGINT, stop)
    with open(out / "log.csv", "a", newline="") as file, \
            tqdm(total=steps * number, initial=adam.step * number, unit="img", unit_scale=True, desc="train", dynamic_ncols=True) as bar:
        log = csv.writer(file)
        if file.tell() == 0:
            log.writerow(COLUMNS)
        while adam.step < steps and not stopped:
            x0 = xp.asarray(dataset.draw(number, dpm.generator(dataset.xp, "batch", seed, adam.step), dtype))
            recent.append(model.gradient(x0, seed, adam.step))
            norm = adam.update([k.grad for k in model.kernels], model.pool)
            bar.update(number)
            line_is_due = adam.step % log_every == 0 or adam.step == steps
            if xp is np or line_is_due:  # so as not to wait for a GPU at every step
                check(norm)
            if line_is_due:
                t, kl = (dpm.to_host(xp.concatenate(parts)) for parts in zip(*recent))
                # with data of unit variance L_null = -H_p(X_T), so K - L_null is the KLs against the entropies
                climbed = D * (H_q_T - H_q_1) - kl.mean()
                quarter = np.minimum((t - 2) * 4 // (T - 1), 3)
                log.writerow([adam.step, f"{time.perf_counter() - begun:.1f}", f"{climbed / LN2:.5g}",
                              *(f"{-np.sum(kl[quarter == i]) / len(kl) / LN2:.5g}" for i in range(4))])
                file.flush()
                shown = f"K - L_null {climbed / LN2:.4g} bits"
                if dataset.bytes:
                    shown += f", {math.log2(model.scale) + (model.diffusion.H_pi - climbed / D) / LN2:.3f} bits/dim"
                bar.set_postfix_str(shown)
                recent = []
                if time.perf_counter() - saved_at > SAVE_EVERY:
                    save()
                    saved_at, saved_step = time.perf_counter(), adam.step
    save()
    signal.signal(signal.SIGINT, handler)
    if stopped:
        print(f"stopped at step {adam.step}; go on with: python train.py --resume {out}")
        sys.exit(130)


def evaluate(path, gpu):
    """Every number and figure of a trained model: result.json and pictures beside its checkpoint, a table on the terminal."""
    checkpoint = checkpoint_in(path)
    model = dpm.DPM.load(checkpoint, dpm.backend(gpu))
    dataset = load_for(model)
    print(f"evaluating {checkpoint} on {device_name(model.xp)}", flush=True)
    T, D, image, about = model.T, model.kernel.D, model.kernel.pixels > 1, model.about
    # Enough for a standard error of about 0.005 bits/dim; every t is used for as many examples as every other
    x0 = dataset.held_out(10_000 if image else 4_000)
    steps = min(T - 1, 10 if image else 40)
    started = time.perf_counter()

    def bound(of):
        return of.bound(x0, dpm.generator(np, "bound"), steps, progress=lambda blocks: tqdm(blocks, desc="bound", leave=False))

    found = bound(model)
    result = dict(dataset=dataset.name, examples=len(x0), timesteps=T, steps=about["trained_steps"],
                  seconds=about["seconds"], device=about["device"], dimension=D, shift=model.shift, scale=model.scale,
                  schedule=about["schedule"], K_bits=found["K"] / LN2, K_bits_se=found["K_se"] / LN2,
                  L_null_bits=found["L_null"] / LN2, K_minus_L_null_bits=found["K_minus_L_null"] / LN2,
                  K_minus_L_null_bits_se=found["K_minus_L_null_se"] / LN2, kl_bits=(found["kl"] / LN2).tolist(),
                  **{f"{name}_bits": found[name] / LN2 for name in ("H_q_T", "H_q_1", "H_p_T")})
    if dataset.bytes:
        result["bits_per_dim"] = -result["K_bits"] / D + math.log2(model.scale)
        result["bits_per_dim_se"] = result["K_bits_se"] / D
    if dataset.truth:
        q = dpm.Gaussian(dpm.to_host(model.diffusion.alpha_bar))
        best = bound(dpm.DPM(q, dpm.IdealKernel(q, dataset.truth.moments)))
        truth = dataset.truth.log_density(x0)
        gap = best["K_each"] - found["K_each"]
        result |= dict(K_star_bits=best["K"] / LN2, K_star_bits_se=best["K_se"] / LN2, K_star_minus_K_bits=gap.mean() / LN2,
                       K_star_minus_K_bits_se=gap.std() / math.sqrt(len(gap)) / LN2,
                       L_true_bits=truth.mean() / LN2, L_true_bits_se=truth.std() / math.sqrt(len(truth)) / LN2)
    out = checkpoint.parent if checkpoint.name == "checkpoint.npz" else pathlib.Path("runs") / checkpoint.stem
    out.mkdir(parents=True, exist_ok=True)
    draw_curve(out)
    draw_kl(model, found, best if dataset.truth else None, out / "kl.png")
    if image:
        samples = model.sample(64, seed=about["seed"], progress=lambda s: tqdm(s, desc="samples", leave=False))
        save_grid(to_bytes(model, dpm.to_host(samples)), out / "samples.png")
    elif dataset.truth:
        draw_figure_1(model, dataset, out / "figure1.png")
    else:
        draw_points({"held out": x0, "samples": dpm.to_host(model.sample(len(x0), about["seed"], batch=1000))}, out / "samples.png")
    result["evaluation_seconds"] = round(time.perf_counter() - started, 1)
    with dpm.written_whole(out / "result.json") as part:
        part.write_text(json.dumps(result, indent=1))
    print_table(result, image)
    print(f"{out}: result.json, {', '.join(sorted(p.name for p in out.glob('*.png')))}")


def print_table(r, image):
    D, unit = r["dimension"], "bits/pixel" if image else "bits"
    per = D if image else 1

    def row(name, value, se=None, note=""):
        print(f"  {name:<22}{value / per:10.4f}" + (f" +- {se / per:.4f}" if se is not None else " " * 10) + f"  {note}")

    print(f"\n{r['dataset']}, T = {r['timesteps']}, {r['schedule']} schedule, {r['examples']} held-out examples; {unit} of data with unit variance")
    row("K", r["K_bits"], r["K_bits_se"], "lower bound on the mean log likelihood (eq. 14)")
    row("  - sum of KLs", -sum(r["kl_bits"]), note=f"t = 2..{r['timesteps']}")
    row("  + H_q(X_T|X_0)", r["H_q_T_bits"])
    row("  - H_q(X_1|X_0)", -r["H_q_1_bits"])
    row("  - H_p(X_T)", -r["H_p_T_bits"])
    row("L_null", r["L_null_bits"], note="log likelihood under pi, an isotropic Gaussian")
    row("K - L_null", r["K_minus_L_null_bits"], r["K_minus_L_null_bits_se"])
    if "K_star_bits" in r:
        print("  K <= K* <= L:")
        row("K", r["K_bits"], r["K_bits_se"], "this model")
        row("K*", r["K_star_bits"], r["K_star_bits_se"], "the best that any kernel of this form can do")
        row("  K* - K", r["K_star_minus_K_bits"], r["K_star_minus_K_bits_se"])
        row("L", r["L_true_bits"], r["L_true_bits_se"], "the data's own mean log likelihood")
    if "bits_per_dim" in r:
        print(f"  {'bits/dim':<22}{r['bits_per_dim']:10.4f} +- {r['bits_per_dim_se']:.4f}  of the 8-bit values, dequantised: an upper bound on code length")


def benchmark(args):
    """Training and sampling speed of the model that --dataset would train, beside the rate of a plain matrix product."""
    import resource
    xp = dpm.backend(args.gpu)
    dataset = data.load(args.dataset or "mnist")
    chosen, options = settings(args, dataset)
    model = new_model(dataset, chosen, options, xp)
    dataset.to(xp)
    adam = dpm.Adam(model.kernel.theta, xp, **optimiser_options(chosen))
    sync = xp.cuda.Device().synchronize if xp is not np else lambda: None
    number, dtype = chosen["batch_size"], model.kernel.dtype

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
        model.gradient(xp.asarray(dataset.draw(number, dpm.generator(dataset.xp, "batch", 0, i), dtype)), 0, i)
        adam.update([k.grad for k in model.kernels], model.pool)

    size = 1536
    a = [xp.asarray(dpm.generator(np, "benchmark").standard_normal((size, size)).astype(dtype)) for _ in range(model.threads)]
    b = [xp.empty_like(a[0]) for _ in a]
    products = lambda _: list(model.pool.map(lambda i: xp.matmul(a[i], a[i], out=b[i]), range(model.threads)))
    # The machine's speed drifts: rate and step are measured in turn
    rounds = [(clock(products, 5), clock(step, 7)) for _ in range(5)]
    rate = statistics.median(2 * model.threads * size ** 3 / r / 1e9 for r, _ in rounds)
    seconds = statistics.median(s for _, s in rounds)
    share = statistics.median(model.kernel.flop(number) / s / (2 * model.threads * size ** 3 / r) for r, s in rounds)
    x, t = xp.asarray(dataset.held_out(64)), xp.full(64, 2)
    reverse = clock(lambda i: model.diffusion.reverse(x, t, model.forward(x, t)), 25)
    gflop = model.kernel.flop(number) / 1e9
    print(f"{dataset.name} on {device_name(xp)}, {chosen['dtype']}")
    print(f"  parameters               {model.kernel.theta.size:,}")
    print(f"  a step of {number:<5}          {seconds * 1e3:.1f} ms, {number / seconds:,.0f} images/s")
    print(f"  its matrix products      {gflop:.2f} GFLOP, {gflop / seconds:,.0f} GFLOP/s")
    print(f"  a plain product          {rate:,.0f} GFLOP/s ({model.threads} x {size}^3 at once); the step runs at {share:.0%} of it")
    print(f"  a reverse step of 64     {reverse * 1e3:.2f} ms")
    print(f"  peak memory              {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (20 if platform.system() == 'Linux' else 30):.2f} GiB")


# ---------------------------------------------------------------------------------------------------------------------------
# Files and figures
# ---------------------------------------------------------------------------------------------------------------------------

def checkpoint_in(path):
    """The checkpoint of the run in a directory; a path of anything else is that of a checkpoint itself."""
    path = pathlib.Path(path)
    return path / "checkpoint.npz" if path.is_dir() else path


def load_for(model):
    """The data set that a model was trained on. InputError if it is gone or has another shape."""
    dataset = data.load(model.about["dataset"])
    if dataset.shape != model.kernel.shape or dataset.bytes != model.about["bytes"]:
        kind = {True: "bytes", False: "floating point"}
        raise dpm.InputError(f"{dataset.name} has examples of shape {dataset.shape}, {kind[dataset.bytes]}; the checkpoint was trained on "
                             f"{model.kernel.shape}, {kind[model.about['bytes']]}")
    dataset.shift, dataset.scale = model.shift, model.scale
    return dataset


def device_name(xp):
    if xp is not np:
        return xp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return f"{platform.machine()} CPU, {dpm.CORES} cores"


def to_bytes(model, x):
    """Normalised images (n, D) as uint8 pictures (n, H, W, C): back to the data's units; data that is not bytes is stretched."""
    raw = x * model.scale + model.shift
    if not model.about["bytes"]:
        raw = (raw - raw.min()) / max(float(np.ptp(raw)), 1e-12) * 255
    return np.clip(np.floor(raw), 0, 255).astype(np.uint8).reshape(-1, *model.kernel.shape)


def save_grid(pictures, path, columns=8, zoom=3, gap=2):
    """Pictures (n, H, W, 1 or 3) in rows of `columns`, as one PNG."""
    from PIL import Image
    n, H, W, C = pictures.shape
    sheet = np.full((-(-n // columns) * (H + gap) + gap, columns * (W + gap) + gap, C), 128, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[y:y + H, x:x + W] = picture
    image = Image.fromarray(sheet[..., 0] if C == 1 else sheet[..., :3])
    with dpm.written_whole(path) as part:
        image.resize((image.width * zoom, image.height * zoom), Image.NEAREST).save(part)


def save_figure(figure, path):
    with dpm.written_whole(path) as part:
        figure.savefig(part, dpi=110)
    plt.close(figure)


def draw_curve(out):
    if not (out / "log.csv").exists():
        return
    rows = np.atleast_1d(np.genfromtxt(out / "log.csv", delimiter=",", names=True))
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axis.plot(rows["step"], rows["K_minus_L_null_bits"])
    axis.set(xlabel="step", ylabel="K - L_null, bits", title="training batches; at 0 the model is plain noise")
    axis.axhline(0, color="gray", lw=0.8)
    save_figure(figure, out / "training.png")


def draw_kl(model, found, best, path):
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    t = np.arange(2, model.T + 1)
    axis.plot(t, found["kl"][2:] / LN2, label="the model")
    if best:
        axis.plot(t, best["kl"][2:] / LN2, "--", label="the ideal kernel")
        axis.legend()
    axis.set(xlabel="t", ylabel="KL, bits", title="where the bound is lost: KL[q || p] of every step", yscale="log")
    save_figure(figure, path)


def draw_points(sets, path):
    """The first two coordinates of vectors, one panel for each named set (..., D)."""
    figure, axes = plt.subplots(1, len(sets), figsize=(4 * len(sets), 4), layout="constrained", sharex=True, sharey=True)
    for axis, (name, x) in zip(np.atleast_1d(axes), sets.items()):
        axis.scatter(x[..., 0].ravel(), x[..., min(1, x.shape[-1] - 1)].ravel(), s=3)
        axis.set(title=name, aspect="equal")
    save_figure(figure, path)


def draw_figure_1(model, dataset, path, number=2000):
    """Figure 1 of the paper: the data diffusing, the model running backwards, and the drift f_mu(x, t) - x, at three times:
    the data, a quarter of its variance gone, noise."""
    T = model.T
    times = (1, max(2, int(np.argmin(np.abs(dpm.to_host(model.diffusion.alpha_bar) - 0.75)))), T)
    rng = dpm.generator(np, "figure")
    x0 = model.xp.asarray(dataset.draw(number, rng))
    samples, kept = model.sample(number, batch=number, keep=times[1:])
    kept[1] = samples
    lines = np.linspace(-3, 3, 19)
    grid = model.xp.asarray(np.stack(np.meshgrid(lines, lines), 2).reshape(-1, 2))
    figure, axes = plt.subplots(3, 3, figsize=(7.5, 7.8), layout="constrained", sharex=True, sharey=True)
    for column, t in enumerate(times):
        steps = model.xp.full(number, t)
        xt = x0 if t == 1 else model.diffusion.diffuse(x0, steps, model.xp.asarray(rng.standard_normal((number, 2))))
        axes[0, column].scatter(*dpm.to_host(xt).T, s=1)
        axes[1, column].scatter(*dpm.to_host(kept[t]).T, s=1, color="C1")
        t_drift = model.xp.full(len(grid), max(t, 2))
        f_mu, _ = model.diffusion.reverse(grid, t_drift, model.forward(grid, t_drift))
        axes[2, column].quiver(*dpm.to_host(grid).T, *dpm.to_host(f_mu - grid).T, color="C2", angles="xy")
        axes[0, column].set_title(f"t = {0 if t == 1 else t}")
    for axis, label in zip(axes[:, 0], ("forward, q(x_t)", "reverse, p(x_t)", "drift, f_mu(x, t) - x")):
        axis.set(ylabel=label, xlim=(-3, 3), ylim=(-3, 3))
        axis.set_aspect("equal")
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------------

def free_directory(name):
    """runs/<name>, or runs/<name>-2, -3, ... where that is taken."""
    stem = pathlib.Path(name).stem or "data"
    return next(d for d in (pathlib.Path("runs") / (stem + (f"-{i}" if i > 1 else "")) for i in range(1, 10 ** 6)) if not d.exists())


def start(args):
    """A new run: its directory, its model, its optimiser."""
    xp = dpm.backend(args.gpu)
    if args.out and (pathlib.Path(args.out) / "checkpoint.npz").exists():
        raise dpm.InputError(f"--out {args.out} holds another run; choose a new directory, or go on with that run: --resume {args.out}")
    dataset = data.load(args.dataset or "swissroll")
    chosen, options = settings(args, dataset)
    model = new_model(dataset, dict(chosen, bytes=dataset.bytes), options, xp)
    out = pathlib.Path(args.out) if args.out else free_directory(dataset.name)
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.csv").unlink(missing_ok=True)  # of a run that ended before its first checkpoint
    return model, dpm.Adam(model.kernel.theta, xp, **optimiser_options(chosen)), dataset, out


def resume(args):
    """A stopped run, as its last checkpoint has it; of the flags only --steps may differ from what it was started with."""
    out = pathlib.Path(args.resume or args.out or f"runs/{pathlib.Path(args.dataset or 'swissroll').stem}")
    model, adam = dpm.DPM.resume(out / "checkpoint.npz", dpm.backend(args.gpu))
    for name in ("dataset", "batch_size", "lr", "timesteps", "schedule", "seed", "dtype"):
        if getattr(args, name) not in (None, model.about[name]):
            raise dpm.InputError(f"{out} was started with --{name.replace('_', '-')} {model.about[name]}, not {getattr(args, name)}; leave the flag away")
    if args.steps is not None:
        model.about["steps"] = args.steps
        check_positive(model.about)
        if args.steps < adam.step:
            raise dpm.InputError(f"{out} has made {adam.step} steps already; --steps {args.steps} would be less")
    for name, value in optimiser_options(model.about).items():
        setattr(adam, name, value)
    # What was logged after the checkpoint will be computed, and logged, again
    log = out / "log.csv"
    if log.exists():
        head, *rows = log.read_text().splitlines()
        kept = [row for row in rows if row.split(",")[0].isdigit() and int(row.split(",")[0]) <= adam.step]
        with dpm.written_whole(log) as part:
            part.write_text("\n".join([head, *kept]) + "\n")
    return model, adam, load_for(model), out


def main():
    args = arguments()
    if args.benchmark:
        return benchmark(args)
    if args.evaluate:
        return evaluate(args.evaluate, args.gpu)
    model, adam, dataset, out = start(args) if args.resume is None else resume(args)
    about = model.about
    print(f"{dataset.name} on {device_name(model.xp)}: {model.kernel.theta.size:,} weights, T = {model.T}, steps {adam.step}..{about['steps']}, into {out}", flush=True)
    dataset.to(model.xp)
    train(model, adam, dataset, out, about.get("seconds", 0.0))
    evaluate(out, args.gpu)


def run(main):
    """The end of a script: what the user got wrong, or the disk, is one line and exit status 2."""
    try:
        main()
    except (dpm.InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
