"""The Keras 3 layer and its conversion, freezing, folding, recalibration and state. ``training`` adds Horovod's Keras API.

``hvd_syncbn.keras`` is the public module. Training needs Keras's TensorFlow backend; evaluation runs on every backend.
"""
