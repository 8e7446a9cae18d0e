"""Keras 3: the layer, conversion of models, and what it takes to train them under Horovod.

Keras may run on PyTorch, where the layer and the conversion serve without the rest: TensorFlow is not imported there.
``hvd_syncbn.keras`` is the face of this room.
"""
