"""Programs on top of csm.py, each `python -m csm_tools.NAME`, and what they share."""

import importlib.util
import sys
from pathlib import Path


def problem():
    """Why no program can start, in one line; None if nothing is wrong."""
    other = "`import csm` finds another project; this one is csm-speech. Run: pip uninstall csm"
    if "csm" not in sys.modules:
        spec = importlib.util.find_spec("csm")
        if spec and spec.submodule_search_locations is not None:  # a package; ours is one file
            return other
    try:
        import csm
    except ImportError as error:
        if "libmlx" not in str(error):
            raise
        return "MLX has no backend here. Run: pip install mlx-cpu, or for an NVIDIA GPU: pip install mlx-cuda-13"
    return None if hasattr(csm, "Generator") else other


if wrong := problem():
    called = Path(sys.argv[0]).name
    if not called.startswith("csm") and called != "-m":  # no program: somebody's import
        raise ImportError(wrong)
    print(f"{called}: error: {wrong}", file=sys.stderr)
    sys.exit(2)
