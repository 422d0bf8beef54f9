"""MLX's wheels for Linux compute float32 products with the reference BLAS, 15 times slower than a real one.

On a Mac they use Accelerate. So that MLX programs are compared at the speed their machines give them, they run
here with the OpenBLAS of scipy's wheel put before the reference one: two functions passed on, compiled here.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

_TYPES = {"s": "float", "d": "double"}
_FORWARD = """
void scipy_cblas_{p}gemm(int, int, int, int, int, int, {t}, const {t} *, int, const {t} *, int, {t}, {t} *, int);
void cblas_{p}gemm(int order, int ta, int tb, int m, int n, int k, {t} alpha, const {t} *a, int lda,
                   const {t} *b, int ldb, {t} beta, {t} *c, int ldc)
{{ scipy_cblas_{p}gemm(order, ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc); }}
"""


def preload(folder: Path) -> Path | None:
    """A library for LD_PRELOAD, made in `folder`; None where it is not needed (macOS) or cannot be made."""
    compiler, scipy = shutil.which("cc"), find_spec("scipy")
    if not sys.platform.startswith("linux") or compiler is None or scipy is None or scipy.origin is None:
        return None
    found = sorted(Path(scipy.origin).parents[1].glob("scipy.libs/libscipy_openblas-*.so"))
    if not found:
        return None
    source, library = folder / "openblas.c", folder / "openblas.so"
    source.write_text("".join(_FORWARD.format(p=prefix, t=kind) for prefix, kind in _TYPES.items()))
    link = [str(found[0]), f"-Wl,-rpath,{found[0].parent}"]
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(source), *link], check=True)
    return library
