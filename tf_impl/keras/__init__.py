"""Keras 3: the layer, its conversion, freezing, folding, recalibration and state. ``training`` adds Horovod's Keras API.

``hvd_syncbn.keras`` is the public module. Only Keras's TensorFlow backend trains; evaluation runs on every backend.
"""
