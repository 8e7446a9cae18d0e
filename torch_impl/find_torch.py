"""Prints the settings of the installed PyTorch for CMake, separated by semicolons.

Version, whether it is a CUDA build, library folder, ABI, include folders.
"""

import os

import torch
from torch.utils import cpp_extension

folder = os.path.dirname(torch.__file__)
print(
    torch.__version__,
    int(torch.version.cuda is not None),
    os.path.join(folder, "lib"),
    int(torch._C._GLIBCXX_USE_CXX11_ABI),
    *cpp_extension.include_paths(),
    sep=";",
)
