"""MLX, fast on a Linux CPU: `import mlx_cpu`. On other systems and on a GPU nothing changes.

What is slow in MLX 0.32 there, on two cores of an AMD EPYC (Zen 5, 80 GB/s), float32:

- Products. The wheel's BLAS is the reference one, on one core. Milliseconds of (rows, k) x (k, n), the matrices read
  from memory in turn, of the wheel's, MKL 2026.2, OpenBLAS 0.3.34 with its own threads, and ours over OpenBLAS:

                                                              wheel    MKL  OpenBLAS   ours
      a frame of CSM-1B, MLP        (1, 2048) x (2048, 8192)    7.9    2.7       2.8    0.9
      the same, depth decoder       (1, 1024) x (1024, 1024)    0.49   0.16      0.18   0.07
      16 at once                   (16, 2048) x (2048, 8192)    125    6.5       3.7    2.0
      a prompt of 256             (256, 2048) x (2048, 8192)   2030     51        23     21
      a prompt of 1024           (1024, 8192) x (8192, 2048)      -    173        83     88
      Mimi's transformer, 1 s        (24, 512) x (512, 2048)     11   0.41      0.30   0.24
      a convolution of Mimi, 1 s    (5760, 256) x (256, 256)    118    3.4       1.6    1.6
      the same, one frame         (16, 1024) x (1024, 1536)     6.5   0.66      0.38   0.42
      a narrow one, 1 s             (23040, 32) x (32, 64)       12   0.46      0.25   0.24

  Beside processes that keep the cores busy OpenBLAS's threads, which wait for each other, take 10 to 100 times as long.
- exp, sigmoid, erf and softmax take 9.5, 9.5, 17 and 10 ns an element; here exp takes 0.12.
- Products with quantized matrices run on one core, without the wide instructions. Here (1, 2048) x (2048, 8192) takes
  0.65 ms with 8 bits and 0.5 with 4, in float32 2.1 (two cores of a Zen 4, which read 33 GB/s at most).
- Normalization, RoPE, attention and dequantizing are a dozen operations each, and every operation costs some
  microseconds; here they are one. A frame of CSM-1B has 5 800 operations in place of 16 900.

So this module does three things.

1. mlx_cpu.c computes MLX's products, unless CSM_FAST_BLAS=0: x @ w.T itself, slices of the others by a BLAS library, on
   OMP_NUM_THREADS or all cores. It is compiled once, in half a second, into ~/.cache/csm. Without a C compiler the BLAS
   library alone takes the place of MLX's, if mlx_cpu is imported before MLX and the library has the plain names (MKL, a
   system's OpenBLAS; scipy-openblas32 has not).
2. primitives.cpp computes exp, sigmoid, erf, softmax, quantizing, products with quantized matrices and dequantizing
   (affine, 8 and 4 bits), and mx.fast's rms_norm, rope and scaled_dot_product_attention, unless CSM_PLAIN=1. MLX's
   operations and functions stay and call it, so that graphs, gradients, mx.compile and mx.vmap are MLX's. A C++
   compiler needs ten seconds for it, so that happens once and in the background, unless MLX_CPU_BACKGROUND=0; until
   then MLX computes as it always did. `python -c 'import mlx_cpu; mlx_cpu.wait()'` waits for it, for an image.
3. mx.compile no longer fuses operations: for that MLX has g++ compile scalar loops, which are slower than ours and need
   a /tmp in which files can be written and executed.
"""

import ctypes
import glob
import hashlib
import importlib.util
import logging
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path

log = logging.getLogger("mlx_cpu")
HERE = Path(__file__).parent


# ---------------------------------------------------------------------------------------------------- this machine


def cpu_info():
    """The kind and the instructions of the first processor; its clock, which varies, is left out."""
    text = ""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    kept = ("vendor_id", "model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(line for line in text.splitlines() if line.split("\t")[0].strip() in kept)


def cpu_quota(root="/"):
    """How many CPUs the control groups of this process allow it; infinity without a limit."""
    quota, root = float("inf"), Path(root)
    with suppress(OSError, StopIteration):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        group = Path(next(line[3:] for line in lines if line.startswith("0::")))
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # "max" is no number
                limit, period = (root / "sys/fs/cgroup" / str(folder).strip("/") / "cpu.max").read_text().split()
                quota = min(quota, int(limit) / int(period))
    with suppress(OSError, ValueError):  # version 1 of control groups, where -1 means no limit
        limit, period = (int((root / f"sys/fs/cgroup/cpu/cpu.cfs_{x}_us").read_text()) for x in ("quota", "period"))
        quota = min(quota, limit / period) if limit > 0 else quota
    return quota


def n_threads():
    """OMP_NUM_THREADS, or the number of cores that this process may use."""
    cores = len(os.sched_getaffinity(0))
    with suppress(KeyError, ValueError):
        return min(max(1, int(os.environ["OMP_NUM_THREADS"])), max(64, cores))
    return max(1, round(min(cores, cpu_quota())))


@contextmanager
def environment(**variables):
    """Set environment variables while a library is loaded that reads them then."""
    before = {k: os.environ.get(k) for k in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for k, value in before.items():
            os.environ.pop(k) if value is None else os.environ.update({k: value})


# ---------------------------------------------------------------------------------------------------- compiling

UNUSED = 30 * 86400  # remove a compiled library that nobody has loaded for so many seconds
RETRY = 86400  # try again so many seconds after a failure


def folders():
    """Where compiled libraries are kept, in order of preference: the user's cache, then a private folder in /tmp."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    at_home = [Path(cache, "csm")] if os.path.isabs(cache) else []  # without a home "~" stays as it is
    return [*at_home, Path(tempfile.gettempdir(), f"csm-{os.getuid()}")]


def check_owner(path):
    """Raise an OSError if anybody but this user and root may have written the file or folder."""
    info = path.lstat()
    if info.st_uid not in (0, os.getuid()) or info.st_mode & stat.S_IWOTH or stat.S_ISLNK(info.st_mode):
        raise PermissionError(f"{path} may be another user's")


def first_line(error):
    """What a failed compiler or system call says, in one line."""
    lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if "error" in line), lines[0])


class Source:
    """A file of this folder that is compiled to a shared library, once for each machine, compiler and version of it."""

    def __init__(self, file, compilers, flags, depends_on=()):
        compiler = next(filter(None, map(shutil.which, compilers)), None)
        self.path, self.flags = HERE / file, flags
        self.compiler = compiler and os.path.realpath(compiler)
        self.failure = None if compiler else "there is no compiler"
        if compiler:
            key = [self.path.read_text(), self.compiler, str(os.stat(compiler).st_mtime), *flags, *depends_on]
            self.name = f"{self.path.stem}-{hashlib.sha256(chr(10).join(key).encode()).hexdigest()[:16]}.so"

    def load(self, folder):
        path = folder / self.name
        check_owner(folder)
        check_owner(path)
        library = ctypes.CDLL(str(path))
        with suppress(OSError):
            os.utime(path)  # see UNUSED
        return library

    def find(self):
        """The library as it was compiled before, or None."""
        for folder in folders() if self.compiler else ():
            with suppress(OSError):
                return self.load(folder)
        return None

    def compile(self, check=None):
        """The library, compiled into the first folder that it can be loaded from; or None, and self.failure says why.

        check(path) raises a ValueError if the new library is no good.
        """
        for folder in folders() if self.compiler else ():
            try:
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                check_owner(folder)
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    made, env = Path(work, self.name), os.environ | {"TMPDIR": work}
                    command = [self.compiler, self.path, *self.flags, "-o", made]
                    subprocess.run(command, env=env, check=True, capture_output=True, text=True, timeout=3600)
                    if check:
                        check(made)
                    os.replace(made, folder / self.name)  # atomically: other processes may do the same
                library = self.load(folder)
                for old in folder.glob(f"{self.path.stem}-*"):
                    with suppress(OSError):
                        if time.time() - old.stat().st_mtime > UNUSED:
                            old.unlink()
                return library
            except OSError as e:  # another folder may do
                self.failure = first_line(e)
            except (ValueError, subprocess.SubprocessError) as e:
                self.failure = first_line(e)
                break
        return None


# ---------------------------------------------------------------------------------------------------- products


def blas_libraries():
    """Paths or names of BLAS libraries, the best for this CPU first."""
    spec = importlib.util.find_spec("scipy_openblas32")  # whose names begin with scipy_
    openblas = glob.glob(f"{spec.submodule_search_locations[0]}/lib/*openblas.so") if spec else []
    roots = [sys.prefix, *(f"{p}/../../.." for p in sys.path if p.endswith("site-packages"))]
    mkl = [f for root in roots for f in sorted(glob.glob(f"{root}/lib/libmkl_rt.so*"))]
    first, second = (mkl, openblas) if "GenuineIntel" in INFO else (openblas, mkl)
    return [*first, *second, "libopenblas.so.0", "libmkl_rt.so"]


def load_blas(alone):
    """The fastest BLAS library there is, as its name and its `cblas_sgemm`.

    alone: it is to take MLX's place by itself, so it has threads, and its names are put before MLX's.
    """
    # Slices come from threads of ours, so otherwise the library has none. OpenBLAS does not know that an AMD CPU can
    # have AVX-512. Whatever is set for other copies of it, this one serves nobody else. (On Zen 4 the kernels without
    # take 6 to 9 % less time for long prompts, but sum the rows of a small batch differently from a row alone.)
    avx512 = all(f" avx512{kind}" in INFO for kind in ("f", "cd", "bw", "dq", "vl"))
    variables = ({} if alone else {"OPENBLAS_NUM_THREADS": "1"}) | ({"OPENBLAS_CORETYPE": "SkylakeX"} if avx512 else {})
    with environment(**variables):
        for name in blas_libraries():
            with suppress(OSError, AttributeError):  # it is not there, or has no plain names
                library = ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL if alone else ctypes.RTLD_LOCAL)
                sgemm = library.cblas_sgemm if alone or "scipy" not in name else library.scipy_cblas_sgemm
                if not alone and "mkl" in name:
                    library.MKL_Set_Num_Threads(1)
                return name, sgemm
    return None, None


def pointer(function):
    return ctypes.cast(function, ctypes.c_void_p)


LATE = "mlx.core" in sys.modules
LINUX = sys.platform == "linux"
WANTED = LINUX and os.environ.get("CSM_FAST_BLAS", "1") != "0"
PLAIN = not LINUX or os.environ.get("CSM_PLAIN", "0") == "1"
INFO = cpu_info() if LINUX else ""
SHARED = ["-O3", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-Bsymbolic", "-pthread"]
# On Zen 3 GCC fuses x * y + z in loops with many sums, but not with one: a row alone would round differently.
SHARED += ["--param=avoid-fma-max-bits=0"]
SHARED += ["-march=native"] if LINUX and os.uname().machine == "x86_64" else []
BLAS = ()  # what computes MLX's products: mlx_cpu.c and a BLAS library, or that library alone
products = sgemm = None

if WANTED:
    source = Source("mlx_cpu.c", ("cc", "gcc", "clang"), SHARED, [INFO])
    products = source.find() or source.compile()
    if products or not LATE:
        name, sgemm = load_blas(alone=not products)
        BLAS = (name,) if name else ()

import mlx.core as mx

MLX = Path(mx.__file__).parent  # the package's folder, with its library and headers
ON_CPU = mx.default_device() == mx.cpu
if products:
    if not sgemm:  # MLX's own, on one core, for slices
        name = str(MLX / "lib/libmlx.so")
        with suppress(OSError, AttributeError):
            sgemm = ctypes.CDLL(name).cblas_sgemm
    if sgemm and products.mlx_cpu_start(pointer(sgemm), n_threads()):
        BLAS = products._name, name
    else:
        products, BLAS = None, ()
        source.failure = "this build of MLX has no libmlx.so that calls cblas_sgemm"
if WANTED and ON_CPU:
    if not products and LATE:
        log.warning("MLX stays slow on this CPU (%s): import mlx_cpu, or csm, before mlx", source.failure)
    elif not products and not BLAS:
        cure = "let XDG_CACHE_HOME be a folder to load libraries from" if source.compiler else "install a C compiler"
        log.warning("MLX stays slow on this CPU (%s): %s, or install mkl", source.failure, cure)
    elif "libmlx" in BLAS[-1]:
        log.warning("MLX stays slow with many rows on this CPU: install scipy-openblas32 or mkl")

with suppress(AttributeError, OSError, TypeError):  # glibc alone: keep freed memory, since new pages are slow
    for setting, size in ((-3, 2**25), (-1, 2**28)):  # M_MMAP_THRESHOLD, the most it takes, and M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(setting, size)


# ---------------------------------------------------------------------------------------------------- primitives

installed = False  # whether MLX's operations call primitives.cpp
operations = None  # that library, then
background = None  # the thread that waits for the compiler, while it is at work


def primitives():
    """primitives.cpp as a Source: it is compiled with MLX's headers, for one version of MLX."""
    library = MLX / "lib/libmlx.so"
    flags = [*SHARED, "-std=c++20", f"-I{MLX}/include", f"-L{library.parent}", "-lmlx"]
    return Source(
        "primitives.cpp", ("c++", "g++", "clang++"), flags, [INFO, mx.__version__, str(library.stat().st_size)]
    )


def install(library):
    """Make MLX's operations call this library from now on."""
    global installed, operations
    c = products
    parts = c.mlx_cpu_run, c.mlx_cpu_multiply, sgemm
    functions = *map(pointer, parts), n_threads(), pointer(c.mlx_cpu_redirect)
    # What nanobind holds has the addresses of MLX's functions in it.
    held = mx.fast.rms_norm, mx.dequantize, mx.quantized_matmul
    kind = type(held[0])
    size = kind.__basicsize__ + kind.__itemsize__ if all(type(f).__name__ == "nb_func" for f in held) else 0
    bound = *(ctypes.c_void_p(id(f)) for f in held), ctypes.c_size_t(size)
    installed = bool(library.mlx_cpu_install(*functions, *bound))
    operations = library if installed else None
    return installed


def check(path):
    """Raise a ValueError if MLX with the primitives of this library computes other results than without."""

    def results():
        x = mx.linspace(-9, 9, 5000)
        yield from (function(x, stream=mx.cpu) for function in (mx.exp, mx.sigmoid, mx.erf))
        w = mx.random.normal((70, 256), key=mx.random.key(0))
        for bits in (4, 8):
            packed = mx.quantize(w, 64, bits, stream=mx.cpu)
            yield from packed
            for rows in (1, 7, 50):
                yield mx.quantized_matmul(w[:rows] * 0.1, *packed, group_size=64, bits=bits, stream=mx.cpu)
            yield mx.dequantize(*packed, group_size=64, bits=bits, stream=mx.cpu)
        yield mx.softmax(w, axis=-1, stream=mx.cpu)
        yield mx.fast.rms_norm(w, w[0], 1e-5, stream=mx.cpu)
        heads = w[:64].reshape(2, 4, 8, 256)
        options = {"traditional": True, "base": 10000.0, "scale": 1.0, "offset": 7, "stream": mx.cpu}
        yield mx.fast.rope(heads, 256, **options)
        for x in (heads, heads[:, :, :1]):
            yield mx.fast.scaled_dot_product_attention(
                x, heads[:, :2], heads[:, 2:], scale=0.1, mask="causal", stream=mx.cpu
            )

    expected = list(results())
    mx.eval(expected)
    if not install(ctypes.CDLL(str(path))):
        raise ValueError("MLX's tables of functions cannot be written")
    for ours, own in zip(results(), expected):
        if not mx.allclose(ours, own, rtol=1e-4, atol=1e-3):
            raise ValueError("the results are not MLX's")


def compile_primitives():
    """Compile primitives.cpp, or wait for another process that does. Returns "", or in a line what failed."""
    import fcntl

    source, failure = primitives(), "no folder can be written"
    for folder in folders():
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(folder / "lock", "w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if source.find():
                    return ""
                record = folder / f"{source.name}.failed"

                def careful(path, record=record):
                    record.write_text("it crashed")  # stays if the check kills this process
                    check(path)

                failure = "" if source.compile(careful) else source.failure
                if failure:
                    record.write_text(failure)
                else:
                    record.unlink(missing_ok=True)
                break
    return failure


def recorded_failure(source):
    """Why compiling failed, if it did so lately."""
    import fcntl

    for folder in folders():
        with suppress(OSError):
            record = folder / f"{source.name}.failed"
            if time.time() - record.stat().st_mtime < RETRY:
                with open(folder / "lock") as lock:  # held: another process is checking right now
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return record.read_text()
    return ""


def compile_in_background(source):
    """Start a process that compiles when nothing else wants the CPU, and a thread that installs what it made."""
    code = f"import os, sys; sys.path[:] = {sys.path!r}; os.nice(10); import mlx_cpu; mlx_cpu.compile_primitives()"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"MLX_CPU_BACKGROUND": "0"}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def finish():
        process.wait()
        library = source.find()
        if library:
            install(library)

    thread = threading.Thread(target=finish, daemon=True)
    thread.start()
    return thread


def wait():
    """Wait for primitives.cpp if it is being compiled. Returns whether MLX's operations call it now."""
    if background:
        background.join()
    return installed


if products and ON_CPU and not PLAIN:
    source = primitives()
    library = source.find()
    if library:
        install(library)
    else:
        source.failure = source.failure or recorded_failure(source)
        if source.failure:
            log.warning(
                "quantized models, exp and attention stay slow on this CPU (%s): install g++ 10 or newer",
                source.failure,
            )
        elif os.environ.get("MLX_CPU_BACKGROUND", "1") != "0" and sys.executable:
            with suppress(OSError):
                background = compile_in_background(source)


# ---------------------------------------------------------------------------------------------------- functions

if ON_CPU and not PLAIN and "MLX_DISABLE_COMPILE" not in os.environ:
    with suppress(OSError, AttributeError):  # set_compile_mode(no_fuse), which has no name in Python
        ctypes.CDLL(str(MLX / "lib/libmlx.so"))._ZN3mlx4core16set_compile_modeENS0_11CompileModeE(2)


def plain_when_exported(fun):
    """`fun` of MLX's own operations: MLX writes no others to a file."""

    @wraps(fun)
    def traced(*args, **kwargs):
        library = operations
        if library:
            library.mlx_cpu_plain(1)
        try:
            return fun(*args, **kwargs)
        finally:
            if library:
                library.mlx_cpu_plain(0)

    return traced


def replace_export(name):
    plain = getattr(mx, name)

    @wraps(plain)
    def export(file, fun, *args, **kwargs):
        return plain(file, plain_when_exported(fun), *args, **kwargs)

    setattr(mx, name, export)


if LINUX and not PLAIN:
    replace_export("export_function")
    replace_export("exporter")
