"""Prints the settings of the installed TensorFlow for CMake, separated by semicolons.

Version, whether it is a CUDA build, include folder, flags.
"""

import os

os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import tensorflow as tf

print(
    tf.__version__,
    int(tf.sysconfig.get_build_info()["is_cuda_build"]),
    tf.sysconfig.get_include(),
    *tf.sysconfig.get_compile_flags(),
    *tf.sysconfig.get_link_flags(),
    sep=";",
)
