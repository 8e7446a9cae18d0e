"""Training Keras 3 models under Horovod: optimizer, gradient tape, callbacks, elastic state, saving."""
