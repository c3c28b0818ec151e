"""Programs on top of csm.py, each `python -m csm_tools.NAME`, and their shared modules."""

import importlib.util
import sys
from pathlib import Path


def problem():
    """One line that says why no program can start, or None. Imports nothing."""
    spec = None if "csm" in sys.modules else importlib.util.find_spec("csm")
    if spec and not (spec.origin and Path(spec.origin).with_name("csm_layouts.py").is_file()):
        return "`import csm` finds another project; this one is csm-speech. Run: pip uninstall csm"
    mlx = importlib.util.find_spec("mlx")
    folders = mlx.submodule_search_locations if mlx else []
    if folders and not any(file for folder in folders for file in Path(folder).glob("lib/libmlx.*")):
        extras = "csm-speech with its extra [cpu], or for an NVIDIA GPU [cuda13]"
        return f"MLX has no backend here. Install {extras}, or run: pip install mlx-cpu (mlx-cuda-13)"
    return None


if wrong := problem():
    called = Path(sys.argv[0]).name
    if not called.startswith("csm") and called != "-m":  # an import, not a program
        raise ImportError(wrong)
    print(f"{called}: error: {wrong}", file=sys.stderr)
    sys.exit(2)
