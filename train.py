"""Train a diffusion model and evaluate it: data -> model -> checkpoint, log, numbers and figures in runs/<dataset>.

    python train.py                                  # swiss roll, about a minute
    python train.py --schedule learned               # the same, and beta_t is learned with it
    python train.py --dataset heartbeat              # bits: the binomial diffusion
    python train.py --dataset mnist                  # 23 minutes on two cores
    python train.py --dataset mnist --gpu
    python train.py --dataset my_images.npy
    python train.py --resume runs/mnist              # go on where it was stopped, bit for bit
    python train.py --evaluate runs/mnist            # every number and figure of a trained model, anew
    python train.py --evaluate runs/a runs/b         # two or more: also how their K depend on T and on the schedule
    python train.py --benchmark                      # images/s and how near that is to the machine's limit
"""
import dpm  # first: it keeps BLAS to one thread, before numpy starts it

import argparse
import csv
import functools
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
from PIL import Image
from scipy.special import logsumexp
from tqdm import tqdm

import data

LN2 = math.log(2)
SAVE_EVERY = 30  # seconds between checkpoints
QUARTERS = [f"K_quarter_{i}_bits" for i in (1, 2, 3, 4)]
COLUMNS = ["step", "seconds", "K_minus_L_null_bits", *QUARTERS]

# What is right for vectors (H W = 1), for images, and for bits, where no flag says otherwise
DEFAULTS = {"vector": dict(steps=9500, batch_size=1024, lr=4e-3, timesteps=40, schedule="logsnr"),
            "image": dict(steps=6000, batch_size=128, lr=5e-3, timesteps=1000, schedule="logsnr")}
BITS = {"vector": dict(steps=12000, batch_size=512, lr=4e-3, timesteps=2000, schedule="cosine"),
        "image": dict(steps=6000, batch_size=128, lr=4e-3, timesteps=1000, schedule="cosine")}
KERNELS = {"vector": dict(maps=0, upper=128, upper_layers=3, scales=(0, 1, 2, 3, 4, 5)),
           "image": dict(width=256, layers=4, maps=4, middle=96, middle_layers=6, sights=8, upper=64, upper_layers=2, scales=(1, 3, 5), patch=3)}


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", metavar="NAME|PATH", help="swissroll, heartbeat, mnist, or the path of an .npy, .npz or IDX file or folder (default: swissroll)")
    p.add_argument("--gpu", action=argparse.BooleanOptionalAction, help="compute with CuPy on a GPU, or not (default: if there is one)")
    p.add_argument("--out", metavar="DIR", help="the run's directory (default: runs/<dataset>, with -2, -3, ... where taken)")
    p.add_argument("--resume", metavar="DIR", nargs="?", const="", help="go on with the run in DIR (default: --out, else runs/<dataset>)")
    p.add_argument("--evaluate", metavar="DIR", nargs="+", help="only evaluate the run in DIR, or a checkpoint file (then into runs/<its folder and name>); "
                   "of several runs, also compare their K in runs/comparison.png")
    p.add_argument("--parzen", action="store_true", help="with --evaluate, for images of bytes: the Parzen estimate of the paper's Table 2, from 10,000 samples")
    p.add_argument("--benchmark", action="store_true", help="only measure the speed of training and sampling (default data set here: mnist)")
    g = p.add_argument_group("training (defaults: vectors | images; binary vectors: "
                             + ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in BITS["vector"].items()) + ")")
    v, i = DEFAULTS["vector"], DEFAULTS["image"]
    g.add_argument("--steps", type=int, help=f"gradient steps ({v['steps']} | {i['steps']})")
    g.add_argument("--batch-size", type=int, help=f"examples in a step ({v['batch_size']} | {i['batch_size']})")
    g.add_argument("--lr", type=float, help=f"peak learning rate of Adam ({v['lr']} | {i['lr']})")
    g.add_argument("--focus", type=float, metavar="F", help="draw t at noise about as strong as the signal 1 + F times as often, which weighs the "
                   "KLs of K likewise: for samples rather than bits (0: train K itself)")
    g.add_argument("--timesteps", type=int, metavar="T", help=f"steps of the diffusion ({v['timesteps']} | {i['timesteps']})")
    g.add_argument("--schedule", choices=["logsnr", "paper", "linear", "cosine", "learned"], help="beta_t, see dpm.schedule and dpm.LearnedSchedule (logsnr)")
    g.add_argument("--rate", type=float, help="of ones in pi, for binary data (the data's mean)")
    g.add_argument("--form", choices=["correction", "paper"], help="the form of f_mu and f_sigma, and how the network hears t: a correction "
                   "to the equilibrium kernel, or eqs. 62-65 (correction)")
    g.add_argument("--seed", type=int, help="of weights, batches and noise (0)")
    g.add_argument("--dtype", choices=["float32", "float64"], help="of the network (float32)")
    return p.parse_args()


def settings(args, dataset):
    """The run's settings: what the flags say, and the defaults for this kind of data."""
    kind = "vector" if dataset.shape[:2] == (1, 1) else "image"
    chosen = dict((BITS if dataset.binary else DEFAULTS)[kind], seed=0, dtype="float32", form="correction", rate=None, focus=0.0)
    chosen |= {name: getattr(args, name) for name in chosen if getattr(args, name) is not None}
    check_positive(chosen)
    check_focus(chosen)
    if chosen["timesteps"] < 2 or chosen["seed"] < 0:
        raise dpm.InputError("--timesteps must be 2 or more" if chosen["timesteps"] < 2 else "--seed must not be negative")
    if dataset.binary and (chosen["schedule"] == "learned" or chosen["form"] == "paper"):
        raise dpm.InputError(f"--schedule learned and --form paper are for continuous data; {dataset.name} is binary")
    if chosen["schedule"] == "learned" and chosen["form"] == "paper":
        raise dpm.InputError("--schedule learned needs --form correction")
    if chosen["rate"] is not None and not dataset.binary:
        raise dpm.InputError(f"--rate is for binary data; {dataset.name} is not")
    options = dict(KERNELS[kind], learned=chosen["schedule"] == "learned")
    if dataset.binary:
        options |= dict(scales=())
    if chosen["form"] == "paper":
        options |= dict(paper=True, bumps=10, time=0)
    return dict(dataset=dataset.name, **chosen), options


def new_model(dataset, chosen, kernel_options, xp):
    """beta_1 is the variance of the smallest detail there is to model; a bit, which has none, is forgotten once in 1e5, or as often
    as the paper's schedule says for t = 1."""
    T, kind = chosen["timesteps"], chosen["schedule"]
    if dataset.binary:
        alpha_bar = dpm.schedule(kind, T, 1 / T if kind == "paper" else 1e-5)
        q = dpm.Binomial(alpha_bar, xp, dataset.mean if chosen["rate"] is None else chosen["rate"], dataset.mean)
    else:
        q = dpm.Gaussian(dpm.schedule("logsnr" if kind == "learned" else kind, T, dataset.detail ** 2), xp)
    kernel = dpm.Kernel(q, dataset.shape, **kernel_options, edges=dataset.edges, dtype=chosen["dtype"], seed=chosen["seed"])
    return dpm.DPM(q, kernel, dataset.shift, dataset.scale, chosen)


def check_positive(chosen):
    for name in ("steps", "batch_size", "lr"):
        if not chosen[name] > 0:
            raise dpm.InputError(f"--{name.replace('_', '-')} must be positive, not {chosen[name]}")


def check_focus(chosen):
    if not 0 <= chosen["focus"] < math.inf:
        raise dpm.InputError(f"--focus must be 0 or more, not {chosen['focus']}")
    if chosen["focus"] and chosen["schedule"] == "learned":
        raise dpm.InputError("--focus changes what is trained, and --schedule learned must be trained on K; leave one of them away")


def optimiser_options(chosen):
    return dict(lr=chosen["lr"], steps=chosen["steps"], warmup=min(200, chosen["steps"] // 10 + 1))


def train(model, adam, dataset, out, seconds=0.0):
    """The loop. Everything random in step s depends on (seed, s) alone, so that a resumed run makes the same steps."""
    xp, chosen, T, D = model.xp, model.about, model.T, model.kernel.D
    number, steps, seed, dtype = chosen["batch_size"], chosen["steps"], chosen["seed"], model.kernel.dtype
    log_every = max(1, steps // 200)
    q, mean, w = model.diffusion, xp.full((1, D), model.diffusion.mean), model.focused(chosen["focus"])
    checkpoint, stopped, norm = out / "checkpoint.npz", [], 0.0
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
            recent.append(model.gradient(x0, seed, adam.step, w=w))
            norm = adam.update([k.grad for k in model.kernels], model.pool)
            bar.update(number)
            line_is_due = adam.step % log_every == 0 or adam.step == steps
            if xp is np or line_is_due:  # so as not to wait for a GPU at every step
                check(norm)
            if line_is_due:
                t, kl = (dpm.to_host(xp.concatenate(parts)) for parts in zip(*recent))
                # L_null = -D H_null for the training data, so K - L_null is the KLs against the entropies
                climbed = float(q.H_q(T, mean)[0] - q.H_q(1, mean)[0]) + D * q.H_null - float(q.H_p(mean)[0]) - kl.mean()
                quarter = np.minimum((t - 2) * 4 // (T - 1), 3)
                log.writerow([adam.step, f"{time.perf_counter() - begun:.1f}", f"{climbed / LN2:.5g}",
                              *(f"{-np.sum(kl[quarter == i]) / len(kl) / LN2:.5g}" for i in range(4))])
                file.flush()
                shown = f"K - L_null {climbed / LN2:.4g} bits"
                if dataset.bytes:
                    shown += f", {math.log2(model.scale) + (q.H_null - climbed / D) / LN2:.3f} bits/dim"
                bar.set_postfix_str(shown)
                recent = []
                if time.perf_counter() - saved_at > SAVE_EVERY:
                    save()
                    saved_at, saved_step = time.perf_counter(), adam.step
    check(norm)
    save()
    signal.signal(signal.SIGINT, handler)
    if stopped:
        print(f"stopped at step {adam.step}; go on with: python train.py --resume {out}")
        sys.exit(130)


def evaluate(path, gpu, parzen=False):
    """Every number and figure of a trained model: result.json and pictures beside its checkpoint, a page on the terminal."""
    checkpoint = checkpoint_in(path)
    model = dpm.DPM.load(checkpoint, dpm.backend(gpu))
    dataset = load_for(model)
    print(f"evaluating {checkpoint} on {device_name(model.xp)}", flush=True)
    q, T, D, image, about, truth = model.diffusion, model.T, model.kernel.D, model.kernel.pixels > 1, model.about, dataset.truth
    # Enough for a standard error of about 0.005 bits/dim; every t is used for as many examples as every other
    x0 = dataset.held_out(10_000 if image else 16_000)
    steps = min(T - 1, max(10 if image else 40, -(-2 * T // len(x0))))
    started = time.perf_counter()

    def bound(of, x0):
        return of.bound(x0, dpm.generator(np, "bound"), steps, progress=lambda blocks: tqdm(blocks, desc="bound", leave=False))

    def mean_and_se(name, values):
        return {f"{name}_bits": float(values.mean()) / LN2, f"{name}_bits_se": float(values.std()) / math.sqrt(len(values)) / LN2}

    found = bound(model, x0)
    lower, upper = model.entropy_bounds(x0)
    result = dict(dataset=dataset.name, examples=len(x0), timesteps=T, steps=about["trained_steps"],
                  seconds=about["seconds"], device=about["device"], dimension=D, pixels=model.kernel.pixels, shift=model.shift, scale=model.scale,
                  schedule=about["schedule"], form=about["form"], K_bits=found["K"] / LN2, K_bits_se=found["K_se"] / LN2,
                  L_null_bits=found["L_null"] / LN2, K_minus_L_null_bits=found["K_minus_L_null"] / LN2,
                  K_minus_L_null_bits_se=found["K_minus_L_null_se"] / LN2, kl_bits=(found["kl"] / LN2).tolist(),
                  **{f"{name}_bits": found[name] / LN2 for name in ("H_q_T", "H_q_1", "H_p_T")},
                  **{f"entropy_{name}_bits": float(H[2:].sum()) / LN2 for name, H in (("lower", lower), ("model", found["H_p"]), ("upper", upper))})
    if dataset.bytes:
        result["bits_per_dim"] = -result["K_bits"] / D + math.log2(model.scale)
        result["bits_per_dim_se"] = result["K_bits_se"] / D
    if truth:
        if dataset.binary:
            moments, some = functools.partial(truth.moments, rate=q.rate), len(x0)
        else:
            moments, some = truth.moments, max(500, 4000 * 2000 // len(truth.centres))  # a sum over the centres for each row
        on_host = type(q)(dpm.to_host(q.alpha_bar), **q.config)
        ideal = dpm.DPM(on_host, dpm.IdealKernel(on_host, moments, D))
        # With the same noise, so that points and noise cancel in the difference
        best, ours = bound(ideal, x0[:some]), found if some == len(x0) else bound(model, x0[:some])
        L = truth.log_density(x0)
        result |= mean_and_se("K_star_minus_K", best["K_each"] - ours["K_each"]) | mean_and_se("L_true", L)
        result |= dict(K_star_bits=result["K_bits"] + result["K_star_minus_K_bits"], K_star_bits_se=result["K_bits_se"])
        log_w = model.log_weights(x0[:max(5, min(100, 8000 // T))], 1000, dpm.generator(np, "estimates"))
        L = L[:len(log_w)]
        result |= dict(estimate_examples=len(log_w), estimate_L_bits=float(L.mean()) / LN2)
        for S in (1, 10, 100, 1000):
            groups = log_w.reshape(len(log_w), -1, S)
            each = (logsumexp(groups, axis=2) - math.log(S)).mean(1)
            result |= mean_and_se(f"estimate_{S}", each) | mean_and_se(f"L_minus_estimate_{S}", L - each)
    if parzen:
        result |= parzen_estimate(model, dataset)
    out = checkpoint.parent if checkpoint.name == "checkpoint.npz" else pathlib.Path("runs") / f"{checkpoint.absolute().parent.name}-{checkpoint.stem}"
    out.mkdir(parents=True, exist_ok=True)
    draw_curve(out)
    draw_by_t(T, {"the model": found["kl"]} | ({"the ideal kernel": best["kl"]} if truth else {}),
              "KL, bits", "where the bound is lost: KL[q || p] of every step", out / "kl.png", yscale="log")
    draw_by_t(T, {"upper bound": upper / D, "the model's": found["H_p"] / D, "lower bound": lower / D},
              "bits per dimension", "entropy of the reverse steps, eq. 24", out / "entropy.png")
    if about["schedule"] == "learned":
        draw_schedule(model, out / "schedule.png")
    if image:
        samples = model.sample(64, seed=about["seed"], progress=lambda s: tqdm(s, desc="samples", leave=False))
        save_picture(grid(to_bytes(model, dpm.to_host(samples))), out / "samples.png")
    elif dataset.binary:
        draw_figure_2(model, out / "figure2.png")
    elif truth:
        draw_figure_1(model, dataset, out / "figure1.png")
    else:
        samples = dpm.to_host(model.sample(2000, about["seed"], batch=1000))
        save_picture(points_picture({"held out": x0[:2000], "samples": samples}), out / "samples.png")
    result["evaluation_seconds"] = round(time.perf_counter() - started, 1)
    with dpm.written_whole(out / "result.json") as part:
        part.write_text(json.dumps(result, indent=1))
    print_page(result, image, dataset.binary)
    print(f"{out}: result.json, {', '.join(sorted(p.name for p in out.glob('*.png')))}")
    return result


def parzen_estimate(model, dataset, number=10_000, valid=1000):
    """The paper's Table 2 for MNIST: the log density, in bits of pixels in [0, 1], of the test images under Gaussians around
    `number` samples, whose width is chosen out of ten by the last 1,000 training images. Standard error std / sqrt(tests)."""
    samples = dpm.to_host(model.sample(number, seed=1, batch=200, progress=lambda s: tqdm(s, desc="Parzen samples")))
    centres = to_bytes(model, samples).reshape(number, -1) / 255
    by_width = {}
    for sigma in tqdm(np.logspace(-1, 0, 10), desc="Parzen widths", leave=False):
        by_width[sigma] = data.Mixture(centres, sigma).log_density(dataset.train[-valid:] / 255).mean()
    sigma = max(by_width, key=by_width.get)
    each = data.Mixture(centres, sigma).log_density(dataset.test / 255) / LN2
    return dict(parzen_bits=float(each.mean()), parzen_bits_se=float(each.std()) / math.sqrt(len(each)), parzen_sigma=float(sigma))


def print_page(r, image, binary):
    unit = "bits/pixel of data with unit variance" if image else "bits of data with unit variance"
    if binary:
        unit = "bits/pixel" if image else "bits/sequence"
    per = r["pixels"] if image else 1

    def row(name, key, note="", sign=1):
        value, se = (r[key] if isinstance(r[key], float) else sum(r[key])), r.get(f"{key}_se")
        print(f"  {name:<22}{sign * value / per:12.4f}" + (f" +- {se / per:.4f}" if se is not None else " " * 10) + f"  {note}")

    form = "" if r["form"] == "correction" else ", the paper's kernel"
    print(f"\n{r['dataset']}, T = {r['timesteps']}, {r['schedule']} schedule{form}, {r['examples']} held-out examples; {unit}")
    row("K", "K_bits", "lower bound on the mean log likelihood (eq. 14)")
    row("  - sum of KLs", "kl_bits", f"t = 2..{r['timesteps']}", -1)
    row("  + H_q(X_T|X_0)", "H_q_T_bits")
    row("  - H_q(X_1|X_0)", "H_q_1_bits", sign=-1)
    row("  - H_p(X_T)", "H_p_T_bits", sign=-1)
    row("L_null", "L_null_bits", "log likelihood of independent bits" if binary else "log likelihood under an isotropic Gaussian")
    row("K - L_null", "K_minus_L_null_bits")
    if "K_star_bits" in r:
        print("K <= K* <= L")
        row("K*", "K_star_bits", "the best that any kernel of this form can do")
        row("  K* - K", "K_star_minus_K_bits", "with the same points and noise")
        row("L", "L_true_bits", "the data's own mean log likelihood")
    print(f"entropy of the reverse steps, sum over t = 2..{r['timesteps']} (eq. 24)")
    row("upper bound", "entropy_upper_bits")
    row("the model's", "entropy_model_bits")
    row("lower bound", "entropy_lower_bits")
    if "estimate_1_bits" in r:
        print(f"log p(x_0) of {r['estimate_examples']} of the examples from S trajectories each (eqs. 6-9): L_1 is K in the mean, and L_S rises to the model's log likelihood")
        for S in (1, 10, 100, 1000):
            row(f"L_{S}", f"estimate_{S}_bits", f"L - L_{S} = {r[f'L_minus_estimate_{S}_bits']:.4f} +- {r[f'L_minus_estimate_{S}_bits_se']:.4f}")
        row("L of these", "estimate_L_bits")
    if "bits_per_dim" in r:
        print(f"in the units of later papers\n  {'bits/dim':<22}{r['bits_per_dim']:12.4f} +- {r['bits_per_dim_se']:.4f}  of the 8-bit values, dequantised: "
              "an upper bound on code length")
    if "parzen_bits" in r:
        print(f"in the units of the paper's Table 2\n  {'Parzen, bits':<22}{r['parzen_bits']:12.1f} +- {r['parzen_bits_se']:.1f}     "
              f"10,000 samples, width {r['parzen_sigma']:.3f}")


def compare(results):
    """K of several runs: a line for each, and a figure of K against T, a panel for each data set, a curve for every schedule and form."""
    names = sorted({r["dataset"] for r in results})
    figure, axes = plt.subplots(1, len(names), figsize=(6 * len(names), 4), layout="constrained", squeeze=False)
    panels, curves = dict(zip(names, axes[0])), {}
    for r in sorted(results, key=lambda r: r["timesteps"]):
        curves.setdefault((r["dataset"], r["schedule"], r["form"]), []).append(r)
    print(f"\n{'data':<16}{'schedule':<10}{'form':<12}{'T':>5}{'K':>12}{'+-':>8}{'K*':>10}{'K - L_null':>12}{'bits/dim':>10}{'seconds':>9}")
    for (name, schedule, form), rs in curves.items():
        for r in rs:
            K_star, bits_per_dim = (f"{r[key]:.4f}" if key in r else "-" for key in ("K_star_bits", "bits_per_dim"))
            print(f"{name:<16}{schedule:<10}{form:<12}{r['timesteps']:>5}{r['K_bits']:>12.4f}{r['K_bits_se']:>8.4f}"
                  f"{K_star:>10}{r['K_minus_L_null_bits']:>12.4f}{bits_per_dim:>10}{r['seconds']:>9.0f}")
        label = schedule + (", the paper's kernel" if form == "paper" else "")
        panels[name].errorbar([r["timesteps"] for r in rs], [r["K_bits"] for r in rs], [r["K_bits_se"] for r in rs], marker="o", capsize=3, label=label)
    for name, axis in panels.items():
        axis.set(xlabel="T", ylabel="K, bits", xscale="log", title=name)
        T = sorted({r["timesteps"] for r in results if r["dataset"] == name})
        axis.set_xticks(T, T)
        axis.minorticks_off()
        axis.legend()
    pathlib.Path("runs").mkdir(exist_ok=True)
    save_figure(figure, pathlib.Path("runs") / "comparison.png")
    print("runs/comparison.png")


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
    x = xp.asarray(dataset.held_out(64))
    reverse = clock(lambda i: model.reverse(x, 2), 25)
    gflop = model.kernel.flop(number) / 1e9
    print(f"{dataset.name} on {device_name(xp)}, {chosen['dtype']}")
    print(f"  parameters               {model.kernel.theta.size:,}")
    print(f"  a step of {number:<5}          {seconds * 1e3:.1f} ms, {number / seconds:,.0f} images/s")
    print(f"  its matrix products      {gflop:.2f} GFLOP, {gflop / seconds:,.0f} GFLOP/s")
    print(f"  a plain product          {rate:,.0f} GFLOP/s ({model.threads} x {size}^3 at once); the step runs at {share:.0%} of it")
    print(f"  a reverse step of {len(x):<6} {reverse * 1e3:.2f} ms")
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
    kind = lambda bytes, binary: "bytes" if bytes else "zeros and ones" if binary else "floating point"
    own, trained_on = ((shape, kind(*flags)) for shape, flags in (
        (dataset.shape, (dataset.bytes, dataset.binary)), (model.kernel.shape, (model.about["bytes"], model.about["binary"]))))
    if own != trained_on:
        raise dpm.InputError(f"{dataset.name} has examples of shape {own[0]}, {own[1]}; the checkpoint was trained on {trained_on[0]}, {trained_on[1]}")
    dataset.shift, dataset.scale = model.shift, model.scale
    return dataset


def device_name(xp):
    if xp is not np:
        return xp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    return f"{platform.machine()} CPU, {dpm.CORES} cores"


def to_bytes(model, x, shape=None):
    """Normalised images (n, D) as uint8 pictures (n, H, W, C): back to the data's units; data that is not bytes is stretched."""
    raw = model.raw(x)
    if model.about["binary"]:
        raw = raw * 255
    elif not model.about["bytes"]:
        raw = (raw - raw.min()) / max(float(np.ptp(raw)), 1e-12) * 255
    return np.clip(np.floor(raw), 0, 255).astype(np.uint8).reshape(len(x), *(shape or model.kernel.shape))


def grid(pictures, columns=8, zoom=3, gap=2):
    """Pictures (n, H, W, 1 or 3) in rows of `columns`, as one picture."""
    n, H, W, C = pictures.shape
    sheet = np.full((-(-n // columns) * (H + gap) + gap, columns * (W + gap) + gap, C), 128, np.uint8)
    for i, picture in enumerate(pictures):
        y, x = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        sheet[y:y + H, x:x + W] = picture
    image = Image.fromarray(sheet[..., 0] if C == 1 else sheet[..., :3])
    return image.resize((image.width * zoom, image.height * zoom), Image.NEAREST)


def save_picture(picture, path):
    with dpm.written_whole(path) as part:
        picture.save(part, format="PNG")


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


def draw_by_t(T, curves, label, title, path, yscale="linear"):
    """Named curves (T + 1,) in nats, drawn in bits over t = 2..T."""
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for style, (name, values) in zip(("-", "--", "-."), curves.items()):
        axis.plot(np.arange(2, T + 1), values[2:] / LN2, style, label=name)
    axis.legend()
    axis.set(xlabel="t", ylabel=label, title=title, yscale=yscale)
    save_figure(figure, path)


def draw_schedule(model, path):
    """The schedule that training began with and the one it learned: what is left of the data, and beta."""
    T, learned = model.T, dpm.to_host(model.diffusion.alpha_bar)
    schedule = dpm.LearnedSchedule(T, 1 - learned[1])
    begun = schedule.forward(np.zeros(schedule.parameters(T)))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained")
    for name, alpha_bar in (("before", begun), ("learned", learned)):
        axes[0].plot(np.arange(1, T + 1), (1 - alpha_bar[1:]) / alpha_bar[1:], label=name)
        axes[1].plot(np.arange(1, T + 1), 1 - alpha_bar[1:] / alpha_bar[:-1], label=name)
    axes[0].set(xlabel="t", yscale="log", title="noise to signal, (1 - alpha_bar_t) / alpha_bar_t")
    axes[1].set(xlabel="t", yscale="log", title="beta_t")
    axes[0].legend()
    save_figure(figure, path)


def points_picture(sets, size=4):
    """The first two coordinates of vectors as a picture, one panel for each named set (..., D)."""
    figure, axes = plt.subplots(1, len(sets), figsize=(size * len(sets), size), layout="constrained", sharex=True, sharey=True)
    for axis, (name, x) in zip(np.atleast_1d(axes), sets.items()):
        axis.scatter(x[..., 0].ravel(), x[..., min(1, x.shape[-1] - 1)].ravel(), s=3)
        axis.set(title=name, aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    figure.canvas.draw()
    picture = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    plt.close(figure)
    return picture


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
        f_mu, _ = model.reverse(grid, max(t, 2))
        axes[2, column].quiver(*dpm.to_host(grid).T, *dpm.to_host(f_mu - grid).T, color="C2", angles="xy")
        axes[0, column].set_title(f"t = {0 if t == 1 else t}")
    for axis, label in zip(axes[:, 0], ("forward, q(x_t)", "reverse, p(x_t)", "drift, f_mu(x, t) - x")):
        axis.set(ylabel=label, xlim=(-3, 3), ylim=(-3, 3))
        axis.set_aspect("equal")
    save_figure(figure, path)


def draw_figure_2(model, path, number=40, times=5):
    """Figure 2 of the paper: from independent bits, right, to heartbeats, left; a row is a sequence."""
    kept_at = [t for t in np.unique(np.linspace(0, model.T, times).round().astype(int)) if t > 0]
    samples, kept = model.sample(number, keep=kept_at)
    panels = {0: samples} | {t: kept[t] for t in kept_at}
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, (t, x) in zip(axes, panels.items()):
        axis.imshow(dpm.to_host(x), cmap="gray_r", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        axis.set(title=f"t = {t}", xlabel="bin")
    axes[0].set_ylabel("sequence")
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------------

def run_name(dataset):
    """The name of a data set's run: that of a file without its ending, that of a data set itself."""
    path = pathlib.Path(dataset)
    return path.stem if path.exists() else path.name.replace(":", "-")


def free_directory(name):
    """runs/<name>, or runs/<name>-2, -3, ... where that is taken."""
    stem = run_name(name)
    return next(d for d in (pathlib.Path("runs") / (stem + (f"-{i}" if i > 1 else "")) for i in range(1, 10 ** 6)) if not d.exists())


def start(args):
    """A new run: its directory, its model, its optimiser."""
    xp = dpm.backend(args.gpu)
    if args.out and (pathlib.Path(args.out) / "checkpoint.npz").exists():
        raise dpm.InputError(f"--out {args.out} holds another run; choose a new directory, or go on with that run: --resume {args.out}")
    dataset = data.load(args.dataset or "swissroll")
    chosen, options = settings(args, dataset)
    model = new_model(dataset, dict(chosen, bytes=dataset.bytes, binary=dataset.binary), options, xp)
    out = pathlib.Path(args.out) if args.out else free_directory(dataset.name)
    out.mkdir(parents=True, exist_ok=True)
    (out / "log.csv").unlink(missing_ok=True)  # of a run that ended before its first checkpoint
    return model, dpm.Adam(model.kernel.theta, xp, **optimiser_options(chosen)), dataset, out


def resume(args):
    """A stopped run, as its last checkpoint has it; of the flags only --steps and --focus may differ from what it was started with."""
    if args.dataset is not None:
        args.dataset = data.load(args.dataset).name  # as the run has it
    out = pathlib.Path(args.resume or args.out or f"runs/{run_name(args.dataset or 'swissroll')}")
    model, adam = dpm.DPM.resume(out / "checkpoint.npz", dpm.backend(args.gpu))
    for name in ("dataset", "batch_size", "lr", "timesteps", "schedule", "rate", "form", "seed", "dtype"):
        if getattr(args, name) not in (None, model.about[name]):
            raise dpm.InputError(f"{out} was started with --{name.replace('_', '-')} {model.about[name]}, not {getattr(args, name)}; leave the flag away")
    model.about["focus"] = model.about.get("focus", 0.0) if args.focus is None else args.focus
    check_focus(model.about)
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
    if args.parzen and not args.evaluate:
        raise dpm.InputError("--parzen goes with --evaluate DIR")
    if args.evaluate:
        given = [name for name in ("dataset", "out", "resume", "steps", "batch_size", "lr", "focus", "timesteps", "schedule", "rate", "form", "seed", "dtype")
                 if getattr(args, name) is not None]
        if given:
            raise dpm.InputError(f"--evaluate takes a run as it is; leave --{given[0].replace('_', '-')} away")
        for path in args.evaluate if args.parzen else ():
            model = dpm.DPM.load(checkpoint_in(path))
            if model.kernel.pixels == 1 or not model.about["bytes"]:
                raise dpm.InputError(f"--parzen is for images of bytes; {path} is not a model of them")
        results = [evaluate(path, args.gpu, args.parzen) for path in args.evaluate]
        return compare(results) if len(results) > 1 else None
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
