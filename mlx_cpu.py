"""MLX, fast on a Linux CPU: `import mlx_cpu` before mlx. On other systems and on a GPU nothing changes.

TABLE

Two things are done about it.

1. A BLAS beneath MLX, unless CSM_FAST_BLAS=0. MLX calls plain `cblas_sgemm`, so one that is in the process already
   takes the place of the wheel's. Ours is mlx_cpu.c, compiled once into ~/.cache/csm: it reads the matrix of a product
   with few rows at the speed of the memory, and hands slices of the larger ones to a library, one slice a core. Without
   a C compiler the library goes there by itself, if it is one that has the plain names (MKL, a system's OpenBLAS).
2. Quick functions of the same name, signature, result and gradients in place of mx.exp, mx.erf, mx.sigmoid and
   mx.fast.scaled_dot_product_attention, unless CSM_PLAIN=1. They are for large float32 arrays; for all else, on a GPU,
   and in functions compiled `shapeless`, they call MLX's own.
"""

import ctypes
import glob
import hashlib
import importlib.util
import logging
import math
import os
import shutil
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
    """These variables for a while, for libraries that read them when they are loaded; what the user has set stays."""
    added = {k: v for k, v in variables.items() if k not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for k in added:
            del os.environ[k]


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
    cc = os.path.realpath(cc)
    key = "\n".join([source.read_text(), *flags, cc, str(os.stat(cc).st_mtime), info])
    name = f"mlx_cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "csm"
    with suppress(OSError):
        return ctypes.CDLL(str(cache / name))
    with tempfile.TemporaryDirectory() as private:  # from where a library may be loaded though its file goes
        for folder in (cache, Path(private)):
            with suppress(OSError, subprocess.SubprocessError):
                folder.mkdir(parents=True, exist_ok=True)
                part = folder / f"{name}.{os.getpid()}"
                try:
                    subprocess.run([cc, *flags, "-o", part, source], check=True, capture_output=True, timeout=60)
                    os.replace(part, folder / name)  # whole, however many processes do the same
                finally:
                    part.unlink(missing_ok=True)
                return ctypes.CDLL(str(folder / name))
    return None


def load_blas():
    """Put the fastest `cblas_sgemm` there is in the place of MLX's. Returns the paths of what now does the products."""
    info = cpu_info()
    avx512 = all(f" avx512{kind}" in info for kind in ("f", "cd", "bw", "dq", "vl"))
    ours = compiled(info)
    # Slices of a product come from our threads, so the library has none. OpenBLAS takes no AMD for one with AVX-512.
    once = {"OPENBLAS_NUM_THREADS": "1"} if ours else {}
    with environment(**once, **({"OPENBLAS_CORETYPE": "SkylakeX"} if avx512 else {})):
        for path in libraries(info):
            with suppress(OSError, AttributeError):
                library = ctypes.CDLL(path, mode=ctypes.RTLD_LOCAL if ours else ctypes.RTLD_GLOBAL)
                if ours is None:
                    library.cblas_sgemm  # noqa: B018  an AttributeError where it has no plain names
                    return (path,)
                sgemm = getattr(library, "scipy_cblas_sgemm" if "scipy" in path else "cblas_sgemm")
                if "mkl" in path:
                    library.MKL_Set_Num_Threads(1)
                ctypes.c_void_p.in_dll(ours, "rest").value = ctypes.cast(sgemm, ctypes.c_void_p).value
                ctypes.c_int.in_dll(ours, "threads").value = n_threads()
                ctypes.CDLL(ours._name, mode=ctypes.RTLD_GLOBAL)  # only now are its names for all to see
                return ours._name, path
    log.warning("MLX is slow on this CPU: pip install scipy-openblas32 and a C compiler, or pip install mkl")
    return ()


FIRST = "mlx.core" not in sys.modules  # else nothing can be put beneath it, nor in its place in functions made already
BLAS = load_blas() if FIRST and sys.platform == "linux" and os.environ.get("CSM_FAST_BLAS", "1") != "0" else ()
with suppress(AttributeError, OSError, TypeError):  # glibc alone: keep what is freed, since new pages are slow
    for setting, size in ((-3, 2**25), (-1, 2**28)):  # M_MMAP_THRESHOLD, the most it takes, and M_TRIM_THRESHOLD
        ctypes.CDLL(None).mallopt(setting, size)

import mlx.core as mx

# ---------------------------------------------------------------------------------------------------- functions

LARGE = 2**12  # elements from which on the functions here are quicker
LOG2E = math.log2(math.e)
SHIFT = 1.5 * 2**23 + 127  # a float so large has its integer, 127 more than what it was added to, in the lowest bits
# 2^x for |x| <= 1/2, exact at 0, and erf(x) / x as P(x^2) / Q(x^2) for |x| <= 4: fitted to within 1e-7 and 3e-8
EXP2 = (1.0, 0.693146978, 0.240222421, 0.0555073374, 0.0096715128, 0.00132647273)
ERF_P = (1.12837898, 0.196248343, 0.0534673904, 0.0040036168, 0.00028804043, 1.97483075e-06)
ERF_Q = (1.0, 0.507251725, 0.11647616, 0.0154443651, 0.00121635217, 3.74808171e-05)
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


def elementwise(function):
    """function(array) for large arrays, MLX's own of the same name for all else; in its place."""

    def make(plain):
        def either(a, /, *, stream=None):
            large = stream is None and isinstance(a, mx.array) and quick(a.size, a)
            return function(a) if large else plain(a, stream=stream)

        return either

    return in_place(mx, function.__name__)(make)


def polynomial(coefficients, x):
    y = coefficients[-1] * x
    for c in coefficients[-2:0:-1]:
        y = (y + c) * x
    return y + coefficients[0]


@mx.custom_function  # so that for its gradient nothing is kept but the result
def exp2(x):
    """2^x for -127 <= x <= 128, where it is 0 and infinite."""
    whole = x + SHIFT
    return polynomial(EXP2, x - (whole - SHIFT)) * (whole.view(mx.int32) << 23).view(mx.float32)


@exp2.vjp
def exp2_vjp(x, cotangent, y):
    return cotangent * y * math.log(2)


@elementwise
def exp(x):
    return exp2(mx.clip(x * LOG2E, -127, 128))


@elementwise
def sigmoid(x):
    return 1 / (1 + exp2(mx.clip(x * -LOG2E, -127, 128)))


@elementwise
def erf(x):
    return rational_erf(x)


@mx.custom_function
def rational_erf(x):
    x = mx.clip(x, -4, 4)
    square = x * x
    return x * polynomial(ERF_P, square) / polynomial(ERF_Q, square)


@rational_erf.vjp
def rational_erf_vjp(x, cotangent, y):
    return cotangent * exp(-x * x) * (2 / math.sqrt(math.pi))


def attend(q, k, v, scale, mask):
    """softmax(q k' scale) v where mask is true: q (B, H, T, d), k (B, n, S, d), v (B, n, S, e) -> (B, H, T, e).

    Done for some rows and heads at a time, so that what they need stays in the cache of the CPU, and causally for no
    more keys than the rows may see.
    """
    (B, H, T, d), (_, n, S, e), causal = q.shape, v.shape, isinstance(mask, str)
    q = (q * (scale * LOG2E)).reshape(B, n, H // n, T, d)
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
            x = exp2(mx.maximum(x - mx.stop_gradient(x.max(axis=-1, keepdims=True)), -127))
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
