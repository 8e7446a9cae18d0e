"""The PyTorch adapter: operators and autograd (csrc/), checks (functional.py), the module (module.py), conversion (convert.py).

It owns tensors, threads, gradients and module conventions; every number comes from the core. Import ``hvd_syncbn.torch``, not
this.
"""
