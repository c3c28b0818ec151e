"""Programs on top of csm.py, each run as `python -m csm_tools.NAME`."""
