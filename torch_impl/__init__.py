"""The PyTorch adapter: operators (csrc/, ops.py), autograd (functional.py), the module (module.py), conversion (convert.py).

It owns tensors, threads, gradients and module conventions; every number comes from the core. ``hvd_syncbn.torch`` is its face.
"""
