"""Everything on a machine with an NVIDIA GPU, in one command and without a network: `python -m benchmarks.gpu --out FOLDER`."""
