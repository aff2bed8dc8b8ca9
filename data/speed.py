"""How fast training and sampling are: what `train.py --benchmark` prints."""
import dpm  # before numpy, see there

import contextlib
import platform
import statistics
import time

import numpy as np

from data import figures, runs


def benchmark(model, optimiser, dataset, number):
    """Prints the time of a training step with `number` examples and of a reverse step, beside that
    of a plain matrix product, which is the limit of this machine."""
    xp = model.xp
    sync = xp.cuda.Device().synchronize if xp is not np else lambda: None
    size = 1536 if xp is np else 8192
    tables = dpm.objective(model.about["objective"], model.diffusion)

    def clock(work, repeats):
        times = []
        for i in range(repeats + 2):
            sync()
            start = time.perf_counter()
            work(i)
            sync()
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def step(i):
        x0 = dataset.draw(number, dpm.generator(dataset.xp, "batch", 0, i), model.dtype)
        model.gradient(xp.asarray(x0), 0, i, tables=tables)
        model.step(optimiser)

    rng = np.random.default_rng(0)
    a = [xp.asarray(rng.standard_normal((size, size), dtype=model.dtype)) for _ in model.tapes]
    b = [xp.empty_like(x) for x in a]
    product = lambda _: list(model.pool.map(lambda x, y: xp.matmul(x, x, out=y), a, b))
    # The machine's speed drifts: rate and step are measured in turn
    rounds = [(2 * len(a) * size ** 3 / clock(product, 3) / 1e9, clock(step, 5)) for _ in range(5)]
    for tape in model.tapes:
        tape.flop = 0
    step(0)
    gflop = sum(tape.flop for tape in model.tapes) / 1e9
    rate, seconds = (statistics.median(column) for column in zip(*rounds))
    share = statistics.median(gflop / s / r for r, s in rounds)
    x = xp.asarray(dataset.held_out(64))
    reverse = clock(lambda i: model.p_back(x, 2), 15)
    print(f"{dataset.name} on {runs.device_name(xp)}, {model.dtype}\n"
          f"  weights                  {model.theta.size:,}\n"
          f"  a step of {number:<5}          {seconds * 1e3:.1f} ms, {number / seconds:,.0f} "
          f"{figures.kind_of(model)}/s\n"
          f"  its matrix products      {gflop:.2f} GFLOP, {gflop / seconds:,.0f} GFLOP/s\n"
          f"  a plain product          {rate:,.0f} GFLOP/s ({len(a)} x {size}^3 at once); the step "
          f"runs at {share:.0%} of it\n"
          f"  a reverse step of {len(x):<6} {reverse * 1e3:.2f} ms")
    if xp is not np:
        gib = xp.get_default_memory_pool().total_bytes() / 2 ** 30
        print(f"  memory taken of the GPU  {gib:.2f} GiB")
    with contextlib.suppress(ImportError):  # not on Windows
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        gib = peak / 2 ** (20 if platform.system() == "Linux" else 30)
        print(f"  peak memory              {gib:.2f} GiB")
