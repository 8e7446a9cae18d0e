"""Before any test module."""

# Inductor imports setuptools, which refuses where the standard library's distutils, that Horovod imports, came first.
import setuptools  # noqa: F401
