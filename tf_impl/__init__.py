"""The TensorFlow and Keras adapter.

Rules: what belongs to TensorFlow lives here (tensors, memory, threads, gradients, layer conventions); every
number comes from the core. Import ``hvd_syncbn.tensorflow`` or ``hvd_syncbn.keras``, not this.
"""
