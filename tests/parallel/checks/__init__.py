"""Modules that ranks run: groups of checks (see ../job.py), and the programs of jobs that end early or are elastic."""
