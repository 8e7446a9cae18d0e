"""``groups`` in TensorFlow and Keras on four ranks: what it makes, and two groups that train at once."""

from __future__ import annotations

import horovod.tensorflow as hvd
import numpy as np

import hvd_syncbn.keras
from hvd_syncbn import vectors
from hvd_syncbn.tensorflow import groups
from tests.parallel.shared.groups import check_groups_are_agreed as _agreed
from tests.parallel.shared.groups import check_groups_of_a_job as _made
from tests.tensorflow_tools import assert_same_bits, in_graph, step, train

assert hvd_syncbn.keras.groups is groups


def check_groups_of_a_job() -> None:
    _made(hvd, groups)


def check_groups_are_agreed() -> None:
    _agreed(hvd, groups)


def check_two_groups_train() -> None:
    """Each on a batch of its own, eager and in a graph; equal bytes to one process that has the group's batch."""
    group, place = divmod(hvd.rank(), 2)
    alone, mine = groups(1).mine, groups(2).mine
    whole = step((vectors.SAMPLES, 4, 3, 5), seed=group)
    samples = vectors.split(2, "uneven")[place]
    y, mean, variance, dx, _, _, dresidual = (np.asarray(values) for values in train(whole, process_set=alone))
    for how in (lambda function: function, in_graph):
        got = how(lambda: train(whole.part(samples), process_set=mine, name="groups"))()
        assert_same_bits([*got[:4], got[6]], [y[samples], mean, variance, dx[samples], dresidual[samples]])


def check_keras_layer_in_a_group() -> None:
    """Its config keeps the ranks, and a model of that config trains in the set that there is."""
    group, place = divmod(hvd.rank(), 2)
    mine = groups(2).mine
    layer = hvd_syncbn.keras.SyncBatchNormalization(process_set=mine, name="grouped")
    again = hvd_syncbn.keras.SyncBatchNormalization.from_config(layer.get_config())
    alone = hvd_syncbn.keras.SyncBatchNormalization(process_set=groups(1).mine, name="alone")
    x = np.random.default_rng(group).standard_normal((12, 5)).astype(np.float32)
    want = np.asarray(alone(x, training=True))
    for each in (layer, again):
        got = np.asarray(each(x[6 * place : 6 * place + 6], training=True))
        assert_same_bits([got, each.moving_variance], [want[6 * place : 6 * place + 6], alone.moving_variance])
