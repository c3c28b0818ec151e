"""MLX, fast on a Linux CPU: `import mlx_cpu` before mlx. On other systems and on a GPU nothing changes.

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
- exp, sigmoid and erf take 9.5, 9.5 and 17 ns an element; here 0.12. Attention of a prompt of 1024 rows (32 heads of
  64, 8 of keys) takes 450 ms, of which most is exp; here 55.

So this module does two things.

1. It puts a BLAS beneath MLX, unless CSM_FAST_BLAS=0. MLX calls plain `cblas_sgemm`, and one that is in the process
   already takes the place of the wheel's. Ours is mlx_cpu.c, compiled once into ~/.cache/csm: it does the products with
   few rows itself and gives slices of the others to a library, on OMP_NUM_THREADS or all cores. Without a C compiler
   the library is put there alone, if it has the plain names (MKL, a system's OpenBLAS; scipy-openblas32 has not).
2. It puts quick functions of the same name, signature, result and gradients in the place of mx.exp, mx.sigmoid, mx.erf
   (by mlx_cpu.c: with a compiler only) and mx.fast.scaled_dot_product_attention, unless CSM_PLAIN=1. They are for large
   float32 arrays; for all else, on a GPU, and while a `shapeless` function is compiled, they call MLX's own.
"""

import ctypes
import glob
import hashlib
import importlib.util
import logging
import math
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path

log = logging.getLogger("mlx_cpu")


# ---------------------------------------------------------------------------------------------------- products


@contextmanager
def environment(**variables):
    """These variables for a while, for what reads them when it is loaded."""
    before = {k: os.environ.get(k) for k in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for k, value in before.items():
            os.environ.pop(k) if value is None else os.environ.update({k: value})


def cpu_info():
    """What the first processor says of itself: its name and the instructions that it has."""
    with suppress(OSError):
        return Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    return ""


def n_threads():
    """OMP_NUM_THREADS, or as many as there are cores for this process."""
    with suppress(KeyError, ValueError):
        return max(1, int(os.environ["OMP_NUM_THREADS"]))
    return len(os.sched_getaffinity(0))


def libraries(info):
    """Paths or names of BLAS libraries, the best for this CPU first."""
    spec = importlib.util.find_spec("scipy_openblas32")  # whose names begin with scipy_
    openblas = glob.glob(f"{spec.submodule_search_locations[0]}/lib/*openblas.so") if spec else []
    roots = [sys.prefix, *(f"{p}/../../.." for p in sys.path if p.endswith("site-packages"))]
    mkl = [f for root in roots for f in sorted(glob.glob(f"{root}/lib/libmkl_rt.so*"))]
    first, second = (mkl, openblas) if "GenuineIntel" in info else (openblas, mkl)
    return [*first, *second, "libopenblas.so.0", "libmkl_rt.so"]


def compiled(info):
    """mlx_cpu.c as a shared library, from the cache or compiled now. None: no compiler, or it would not."""
    source = Path(__file__).with_name("mlx_cpu.c")
    cc = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not cc or not source.is_file():
        return None
    flags = ["-O3", "-pthread", "-shared", "-fPIC", *(["-march=native"] if os.uname().machine == "x86_64" else [])]
    key = "\n".join([source.read_text(), *flags, os.path.realpath(cc), str(os.stat(cc).st_mtime), info])
    name = f"mlx_cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "csm"

    def build(folder):
        with tempfile.TemporaryDirectory(dir=folder) as work, environment(TMPDIR=work):
            subprocess.run([cc, *flags, "-o", f"{work}/{name}", source], check=True, capture_output=True, timeout=60)
            os.replace(f"{work}/{name}", folder / name)  # whole, however many processes do the same
        return ctypes.CDLL(str(folder / name))

    failures = OSError, subprocess.SubprocessError
    with suppress(OSError):
        return ctypes.CDLL(str(cache / name))
    with suppress(*failures):
        cache.mkdir(parents=True, exist_ok=True)
        return build(cache)
    with suppress(*failures), tempfile.TemporaryDirectory() as private:  # what is loaded may lose its file
        return build(Path(private))
    return None


def load_blas():
    """Put the fastest `cblas_sgemm` there is in the place of MLX's. Returns the paths of what now does the products."""
    info = cpu_info()
    avx512 = all(f" avx512{kind}" in info for kind in ("f", "cd", "bw", "dq", "vl"))
    ours = compiled(info)
    # Slices of a product come from our threads, so the library has none. OpenBLAS takes no AMD for one with AVX-512 by
    # itself; whatever type of core is set for others, this copy of it is ours alone.
    variables = ({"OPENBLAS_NUM_THREADS": "1"} if ours else {}) | ({"OPENBLAS_CORETYPE": "SkylakeX"} if avx512 else {})
    with environment(**variables):
        for path in libraries(info):
            with suppress(OSError, AttributeError):
                library = ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL if ours else ctypes.RTLD_GLOBAL)
                if ours is None:
                    library.cblas_sgemm  # noqa: B018  an AttributeError where it has no plain names
                    return (path,)
                sgemm = getattr(library, "scipy_cblas_sgemm" if "scipy" in path else "cblas_sgemm")
                ctypes.c_void_p.in_dll(ours, "rest").value = ctypes.cast(sgemm, ctypes.c_void_p).value
                ctypes.c_int.in_dll(ours, "threads").value = n_threads()
                ctypes.CDLL(ours._name, mode=ctypes.RTLD_GLOBAL)  # only now are its names for all to see
                if "mkl" in path:
                    library.MKL_Set_Num_Threads(1)  # MKL's first call, which puts its own names there, behind ours
                return ours._name, path
    return ()


def is_first(path):
    """Whether the `cblas_sgemm` that the process finds is that of the library `path`."""
    found, own = (ctypes.cast(ctypes.CDLL(p).cblas_sgemm, ctypes.c_void_p).value for p in (None, path))
    return found == own


FIRST = "mlx.core" not in sys.modules  # else nothing can be put beneath it, nor in its place in functions made already
WANTED = FIRST and sys.platform == "linux" and os.environ.get("CSM_FAST_BLAS", "1") != "0"
BLAS = load_blas() if WANTED else ()
OURS = len(BLAS) == 2 and is_first(BLAS[0])  # whether what MLX finds is mlx_cpu.c
with suppress(AttributeError, OSError, TypeError):  # glibc alone: keep what is freed, since new pages are slow
    for setting, size in ((-3, 2**25), (-1, 2**28)):  # M_MMAP_THRESHOLD, the most it takes, and M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(setting, size)

import mlx.core as mx

if WANTED and not BLAS and mx.default_device() == mx.cpu:
    log.warning("MLX will be slow on this CPU: install a C compiler and scipy-openblas32, or mkl")

# ---------------------------------------------------------------------------------------------------- functions

LARGE = 2**10  # elements from which on the functions here are quicker
MARKS = {  # (1, 1), NaN, as in mlx_cpu.c
    name: mx.array([struct.unpack("f", struct.pack("I", 0x7FCA5E00 + i))])
    for i, name in enumerate(("exp", "sigmoid", "erf"))
}
FLOOR = mx.finfo(mx.float32).min  # the score of what is masked: as in MLX, no infinity, so that a row of them is no NaN
BLOCK = 2**17  # scores of attention at a time
tracing = threading.local()  # .shapeless: a function that is to serve all shapes is being compiled


def quick(size, *arrays):
    """Whether work on so many elements, which come from these arrays, is for the functions here."""
    if size < LARGE or getattr(tracing, "shapeless", False) or mx.default_device() != mx.cpu:
        return False
    return all(isinstance(x, mx.array) and x.dtype == mx.float32 for x in arrays)


def in_place(module, name):
    """A decorator that puts a function, made from MLX's own, in the place of module.name unless CSM_PLAIN=1."""

    def replace(make):
        plain = getattr(module, name)
        function = wraps(plain)(make(plain))
        if FIRST and sys.platform == "linux" and os.environ.get("CSM_PLAIN", "0") != "1":
            setattr(module, name, function)
        return function

    return replace


def elementwise(slope):
    """mx.NAME by mlx_cpu.c for large arrays, in the place of MLX's own; slope(x, y) is its derivative."""
    name = slope.__name__

    @mx.custom_function
    def function(x):
        return (x.reshape(-1, 1) @ MARKS[name]).reshape(x.shape)

    @function.vjp
    def vjp(x, cotangent, y):
        return cotangent * slope(x, y)

    @function.jvp
    def jvp(x, tangent):
        return tangent * slope(x, function(x))

    @function.vmap
    def vmap(x, axis):  # else a gradient of it is the product's
        return function(x), axis

    def make(plain):
        def either(a, /, *, stream=None):
            ours = OURS and stream is None and isinstance(a, mx.array) and quick(a.size, a)
            return function(a) if ours else plain(a, stream=stream)

        return either

    return in_place(mx, name)(make)


@elementwise
def exp(x, y):
    return y


@elementwise
def sigmoid(x, y):
    return y * (1 - y)


@elementwise
def erf(x, y):
    return exp(-x * x) * (2 / math.sqrt(math.pi))


def attend(q, k, v, scale, mask):
    """softmax(q k' scale) v where mask is true: q (B, H, T, d), k (B, n, S, d), v (B, n, S, e) -> (B, H, T, e).

    Done for some rows and heads at a time, so that what they need stays in the cache of the CPU, and causally for no
    more keys than the rows may see.
    """
    (B, H, T, d), (_, n, S, e), causal = q.shape, v.shape, isinstance(mask, str)
    q = (q * scale).reshape(B, n, H // n, T, d)
    bias = None
    if mask is not None and not causal:
        mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
        bias = mx.broadcast_to(mx.where(mask, 0, FLOOR), (*mask.shape[:2], T, S))
        bias = bias[:, :, None] if mask.shape[1] == 1 else bias.reshape(-1, n, H // n, T, S)
    rows = min(T, -(-BLOCK // S))
    heads = min(n, -(-BLOCK // (B * (H // n) * rows * S)))
    blocks = []
    for t in range(0, T, rows):
        end = min(t + rows, T)
        seen = S - T + end if causal else S
        if causal:
            bias = mx.where(mx.arange(S - T + t, seen)[:, None] >= mx.arange(seen), 0, FLOOR)
        groups = []
        for i in range(0, n, heads):
            part = slice(i, min(i + heads, n))
            x = q[:, part, :, t:end].reshape(B, -1, H // n * (end - t), d) @ k[:, part, :seen].swapaxes(-1, -2)
            x = x.reshape(B, -1, H // n, end - t, seen)
            if bias is not None:
                x = x + (bias if causal else bias[:, part if bias.shape[1] > 1 else slice(None), :, t:end])
            x = exp(x - mx.stop_gradient(x.max(axis=-1, keepdims=True)))
            y = x.reshape(B, -1, H // n * (end - t), seen) @ v[:, part, :seen]
            groups.append(y.reshape(B, -1, H // n, end - t, e) / x.sum(axis=-1, keepdims=True))
        blocks.append(mx.concatenate(groups, axis=1))
    return mx.concatenate(blocks, axis=3).reshape(B, H, T, e)


@in_place(mx.fast, "scaled_dot_product_attention")
def scaled_dot_product_attention(plain):
    def either(q, k, v, *, scale, mask=None, **others):
        (B, H, T, _), S = q.shape, k.shape[2]
        ours = mask is None or (mask.dtype == mx.bool_ if isinstance(mask, mx.array) else S >= T)
        if ours and not others and quick(B * H * T * S, q, k, v):
            return attend(q, k, v, scale, mask)
        return plain(q, k, v, scale=scale, mask=mask, **others)

    return either


@in_place(mx, "compile")
def compile(plain):
    def either(fun, inputs=None, outputs=None, shapeless=False):
        @wraps(fun)
        def traced(*args, **kwargs):  # our functions choose by the shape, and MLX cannot tell their result's
            before, tracing.shapeless = getattr(tracing, "shapeless", False), True
            try:
                return fun(*args, **kwargs)
            finally:
                tracing.shapeless = before

        return plain(traced if shapeless else fun, inputs, outputs, shapeless)

    return either
