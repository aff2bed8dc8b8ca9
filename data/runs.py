"""What train.py and sample.py share as programs: flags, bars, runs and their checkpoints, several
processes, and an end of one line for whatever goes wrong.
"""
import dpm  # before numpy, see there

import argparse
import contextlib
import csv
import os
import pathlib
import platform
import signal
import sys
import time
import traceback
import warnings
import zipfile

import numpy as np
from tqdm import tqdm

import data

class Parser(argparse.ArgumentParser):
    """A page of help that fits a screen, and errors of one line."""

    def __init__(self, script, page):
        super().__init__(usage=f"python {script} [flags]", description=page, add_help=False,
                         formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                             prog, max_help_position=23, width=100))

    def error(self, message):
        raise dpm.InputError(f"{message}; see --help")


class Lines:
    """A file for tqdm where the output is not a terminal: every state of the bar is a line."""

    def write(self, text):
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self):
        sys.stderr.flush()


def bar(iterable, desc, **options):
    """A progress bar; in a file, one line a minute. With several ranks only the first shows it."""
    if not sys.stderr.isatty():
        options |= dict(delay=60, mininterval=60, maxinterval=60, miniters=1, file=Lines(),
                        ncols=100)
    return tqdm(iterable, desc=desc, dynamic_ncols=sys.stderr.isatty(), disable=mpi_rank() > 0,
                **options)


def progress(desc):
    """A function that shows a bar for what it is given, for dpm's `progress`."""
    return lambda steps: bar(steps, desc, leave=False)


def mpi_rank():
    """Which process of an MPI run this is; 0 where there is only this one."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi.COMM_WORLD.Get_rank() if mpi else 0


class Ranks:
    """The processes of an MPI run, see dpm.Alone."""

    def __init__(self, xp):
        from mpi4py import MPI
        self.xp, self.comm = xp, MPI.COMM_WORLD
        self.rank, self.size = self.comm.Get_rank(), self.comm.Get_size()
        here = self.comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.here = here.Get_size()
        if xp is not np:  # each rank of a machine takes a GPU of its own, if there are as many
            xp.cuda.Device(here.Get_rank() % xp.cuda.runtime.getDeviceCount()).use()

    def sum(self, a):
        total = np.empty(a.shape, a.dtype)
        self.comm.Allreduce(np.ascontiguousarray(dpm.to_host(a)), total)
        return self.xp.asarray(total) if type(a) is not np.ndarray else total


def ranks(xp):
    """The processes of an MPI run, or None where there is only this one."""
    if not {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"} & set(os.environ):  # what mpirun sets
        return None
    try:
        return Ranks(xp)
    except ImportError as error:
        raise dpm.InputError("mpirun: several processes need mpi4py: pip install mpi4py "
                             f"({dpm.first_line(error)})") from None


def checkpoint_in(path):
    """The checkpoint of the run in a directory, or the shipped model there; any other path is that
    of a checkpoint itself."""
    path = pathlib.Path(path)
    shipped, checkpoint = path / "model.npz", path / "checkpoint.npz"
    if path.is_dir():
        return shipped if shipped.exists() and not checkpoint.exists() else checkpoint
    return path


def newest_run():
    """The checkpoint in runs/ that was written last, or None."""
    found = pathlib.Path("runs").glob("*/checkpoint.npz")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def load(path, xp, comm=None):
    """The model in a checkpoint of train.py."""
    model = dpm.load(path, xp, comm=comm)
    check_about(model.about, path)
    return model


def check_about(about, path):
    """InputError if it isn't train.py that wrote this of its run."""
    if "trained_steps" not in about:
        raise dpm.InputError(f"{path}: a model, but not one that train.py has written")


def fewer_steps(model, most):
    """`most` of the T steps, or all; always all of the paper's kernel, see Diffusion.shortened."""
    return model.T if model.about["predict"] == "paper" else min(most, model.T)


def load_for(model):
    """The data set that a model was trained on. InputError if it is gone or not what it was."""
    about = model.about
    try:
        dataset = data.load(about["dataset"], about["crop"], about["resize"], about["flips"])
    except dpm.InputError as error:
        raise dpm.InputError(f"the data that the checkpoint was trained on: {error}") from None
    if (dataset.shape, dataset.digest) != (model.shape, about["digest"]):
        raise dpm.InputError(f"{about['dataset']} has changed since the checkpoint was trained on "
                             "it: restore it, or train anew")
    dataset.shift, dataset.scale = model.shift, model.scale
    dataset.dequantise = about["decoder"] == "dequantised"
    return dataset


DECODED = 1 / 3  # of a grey level: the decoder of bytes does what is below noise of this deviation


def decoder(shift, scale):
    """Options of dpm.Gaussian for a discretised decoder of normalised bytes."""
    return dict(half=0.5 / scale, ends=tuple((level - shift) / scale for level in (0.5, 255.5)))


def device_name(xp):
    if xp is not np:
        return xp.cuda.runtime.getDeviceProperties(xp.cuda.Device().id)["name"].decode()
    return f"{platform.machine()} CPU, {dpm.CORES} core{'s' * (dpm.CORES > 1)}"


def make_directory(path):
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise dpm.InputError(f"{path}: a file is in the way; give another name") from None


def writable(path):
    """OSError now, and not after the computing, if there is no room for a megabyte."""
    path = pathlib.Path(path)
    make_directory(path.parent)
    with contextlib.suppress(LookupError), dpm.written_whole(path) as part:
        part.write_bytes(bytes(1 << 20))
        raise LookupError("enough: nothing is put in its place")


def write_arrays(path, shape, parts, others):
    """An .npz with `samples` of this shape, which come in parts, and the other arrays."""
    with dpm.written_whole(path) as part, zipfile.ZipFile(part, "w") as archive:
        with archive.open("samples.npy", "w", force_zip64=True) as file:
            np.lib.format.write_array_header_1_0(
                file, dict(descr="<f8", fortran_order=False, shape=shape))
            for x in parts:
                file.write(memoryview(np.ascontiguousarray(x, "<f8")).cast("B"))
        for name, x in others.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, x)


def log(path, row):
    try:
        with open(path, "a", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; {path} cannot be written") from None


def logged(path):
    """The whole lines of a log, its head first; a full disk may have cut the last."""
    return path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []


def cut_log(path, columns, step):
    """What was logged after the checkpoint will be computed, and logged, again."""
    rows = logged(path)[1:]
    kept = [row for row in rows if row.split(",")[0].isdigit() and int(row.split(",")[0]) <= step]
    with dpm.written_whole(path) as part:
        part.write_text("\n".join([",".join(columns), *kept, ""]))


@contextlib.contextmanager
def locked(out):
    """Keeps a second process out of a run's directory. The lock ends with the process."""
    make_directory(out)
    with open(out / ".lock", "w") as file:
        with contextlib.suppress(ImportError):  # not on Windows
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise dpm.InputError(f"{out} is in use by another process; wait for it, or choose "
                                     "another --out") from None
        yield


def free_directory(name):
    """runs/<name>, or runs/<name>-2, -3, ... where that is taken."""
    path = pathlib.Path(name)
    last = path.name if path.is_dir() else path.stem
    stem = last if os.sep in name else name.replace(":", "-")
    places = (pathlib.Path("runs") / (stem + (f"-{i}" if i > 1 else "")) for i in range(1, 10 ** 6))
    return next(place for place in places if not place.exists())


def finite(values, name):
    """InputError if the model has run to infinity, as it does with weights that are of no use."""
    if not np.isfinite(values).all():
        raise dpm.InputError(f"{name} of this model: not finite; train it longer, or anew with a "
                             "smaller --lr")


def run(main):
    """The end of a script: what the user got wrong, or the disk, is one line and exit status 2."""
    def stop(*_):
        for number in (signal.SIGINT, signal.SIGTERM):  # once is enough
            signal.signal(number, signal.SIG_IGN)
        sys.unraisablehook = lambda _: None  # of objects that were being made, such as a bar
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's: what isn't finite, we say once
    status, message = 2, None
    try:
        return main()
    except (dpm.InputError, OSError) as error:
        message = f"error: {data.printable(error)}"
    except MemoryError:
        message = "error: not enough memory for this; choose smaller numbers"
    except KeyboardInterrupt:
        status, message = 130, "stopped"
    except Exception:
        if "mpi4py.MPI" not in sys.modules:
            raise
        status, message = 1, traceback.format_exc()
    time.sleep(mpi_rank() > 0)  # what all ranks find is said by the first
    print(message, file=sys.stderr, flush=True)
    if "mpi4py.MPI" in sys.modules:  # the other ranks would wait for this one for ever
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(status)
    sys.exit(status)
