"""A training script to start from: Keras 3 under Horovod with synchronized batch normalization. See docs/templates.md.

    python train_keras.py                                    # one rank
    horovodrun -np 2 python train_keras.py                   # two ranks; -H h1:2,h2:2 for other hosts
    horovodrun -np 2 python train_keras.py --resume          # resumes from the last checkpoint
    horovodrun -np 2 --min-np 1 -H localhost:1,127.0.0.1:1 --network-interfaces lo python train_keras.py --elastic

Replace `data`, `network` and the numbers below.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

import hvd_syncbn.keras as hvd

SEED = 1
RATE = 0.02  # learning rate of one rank; multiplied by the number of ranks
WARMUP = 2  # epochs until the learning rate reaches its maximum
COMMIT = 10  # steps between two commits of an elastic job


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16, help="samples per rank and step")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of checkpoint.weights.h5 and model.keras")
    parser.add_argument("--resume", action="store_true", help="resume from checkpoint.weights.h5, if it exists")
    parser.add_argument("--amp", action="store_true", help="mixed precision: compute in bfloat16")
    parser.add_argument("--elastic", action="store_true", help="continue when ranks die, leave or join")
    parser.add_argument("--recalibrate", action="store_true", help="at the end use the statistics of all training data")
    return parser.parse_args()


def data() -> list[Any]:
    """Return the training and test samples, the same on every rank; the code below splits them."""
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(SEED).permutation(len(x))
    x, y = x[order].reshape(-1, 8, 8, 1).astype("float32") / 16, y[order]
    return [(x[:1440], y[:1440]), (x[1440:], y[1440:])]


def network() -> keras.Model:
    model = keras.Sequential([keras.Input((8, 8, 1))])
    for channels, strides in ((16, 1), (32, 2), (32, 2)):
        model.add(keras.layers.Conv2D(channels, 3, strides, padding="same", use_bias=False))
        model.add(keras.layers.BatchNormalization(momentum=0.9))
        model.add(keras.layers.ReLU())
    model.add(keras.layers.Flatten())
    model.add(keras.layers.Dense(10, dtype="float32"))  # float32 also with --amp
    return model


def share(samples: Any) -> Any:
    """Return this rank's share of x and y."""
    return tuple(array[hvd.rank() :: hvd.size()] for array in samples)


def batches(training: Any, epochs: range, batch_size: int) -> tuple[tf.data.Dataset, int]:
    """Return this rank's batches of these epochs, each shuffled alike on all ranks, and the steps per epoch."""
    x, y = training
    steps = len(x) // (batch_size * hvd.size())
    orders = [np.random.default_rng((SEED, epoch)).permutation(len(x)) for epoch in epochs]
    taken = [order[: steps * batch_size * hvd.size()].reshape(steps, -1)[:, hvd.rank() :: hvd.size()] for order in orders]
    stream = tf.data.Dataset.from_tensor_slices(np.concatenate(taken))
    return stream.map(lambda samples: (tf.gather(x, samples), tf.gather(y, samples))).prefetch(tf.data.AUTOTUNE), steps


def train(state: Any, training: Any, test: Any, args: argparse.Namespace) -> None:
    """Train from the position of `state`. An elastic job calls this again whenever its ranks have changed."""
    if state.epoch >= args.epochs:
        return
    # The position in the epoch, in steps of the current number of ranks.
    state.batch, state.ranks = state.batch * state.ranks // hvd.size(), hvd.size()
    stream, steps = batches(training, range(state.epoch, args.epochs), args.batch_size)
    rate = RATE * hvd.size()

    def on_epoch_end(epoch: int, logs: Any) -> None:
        say(f"epoch {epoch + 1}/{args.epochs}: loss {logs['val_loss']:.6f}, accuracy {logs['val_accuracy']:.6f}")
        write(args.out / "checkpoint.weights.h5", partial(save, state.model, epoch + 1))

    callbacks = [
        hvd.callbacks.MetricAverageCallback(weighted=True),  # weighted by samples: the ranks' shares may be uneven
        hvd.callbacks.LearningRateWarmupCallback(rate, warmup_epochs=WARMUP),
        hvd.callbacks.LearningRateScheduleCallback(
            rate, lambda epoch: (1 + math.cos(math.pi * epoch / args.epochs)) / 2, start_epoch=WARMUP, staircase=False
        ),
        hvd.elastic.UpdateEpochStateCallback(state),
        hvd.elastic.UpdateBatchStateCallback(state),
        keras.callbacks.LambdaCallback(on_epoch_end=on_epoch_end),
    ]
    if args.elastic:
        callbacks.append(hvd.elastic.CommitStateCallback(state, COMMIT))  # survivors continue from here
    state.model.fit(
        stream.skip(state.batch),
        steps_per_epoch=steps,
        initial_epoch=state.epoch,
        epochs=args.epochs,
        validation_data=share(test),
        validation_batch_size=256,
        callbacks=callbacks,
        shuffle=False,  # already shuffled
        verbose=0,
    )


def save(model: keras.Model, epochs: int, path: Path) -> None:
    """Save weights, optimizer, and the number of finished epochs."""
    model.save_weights(path)
    with h5py.File(path, "a") as file:
        file.attrs["epochs"] = epochs


def evaluate(model: keras.Model, test: Any) -> str:
    """Evaluate this rank's share; return the result of all ranks. The ranks add sums, so shares may be uneven."""
    x, y = share(test)
    loss, accuracy = model.evaluate(x, y, batch_size=256, verbose=0)
    sums = hvd.allreduce(np.array([loss * len(x), accuracy * len(x), len(x)]), op=hvd.Sum, name="evaluation").numpy()
    return f"loss {sums[0] / sums[2]:.6f}, accuracy {sums[1] / sums[2]:.6f}"


def say(line: str) -> None:
    if hvd.rank() == 0:
        print(line, flush=True)


def write(path: Path, to: Callable[[Path], None]) -> None:
    """Write a file on rank 0. The file at `path` is always complete, even if the job is killed."""
    if hvd.rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        to(part := path.with_name(f"part-{path.name}"))
        os.replace(part, path)


def main() -> None:
    args = arguments()
    hvd.init()
    if gpus := tf.config.list_physical_devices("GPU"):
        tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")
    keras.utils.set_random_seed(SEED + hvd.rank())
    keras.config.set_dtype_policy("mixed_bfloat16" if args.amp else "float32")  # bfloat16 needs no loss scaling
    training, test = data()
    model = hvd.convert_sync_batchnorm(network())
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE, momentum=0.9))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    state = hvd.elastic.KerasState(model, epoch=0, batch=0, ranks=hvd.size())

    checkpoint = args.out / "checkpoint.weights.h5"
    if args.resume and checkpoint.exists() and hvd.rank() == 0:  # broadcast to the other ranks below
        model.load_weights(checkpoint)
        with h5py.File(checkpoint) as file:
            state.epoch = int(file.attrs["epochs"])
    if args.resume:
        say(f"resuming after epoch {state.epoch}" if state.epoch else f"starting: there is no {checkpoint}")
    state.save()
    if args.elastic:
        hvd.elastic.run(train)(state, training, test, args)
    else:
        state.sync()
        train(state, training, test, args)

    if args.recalibrate:
        hvd.recalibrate(model, batches(training, range(1), args.batch_size)[0])
    say(f"final result: {evaluate(model, test)}")
    write(args.out / "model.keras", hvd.revert_sync_batchnorm(model).save)  # can be loaded without hvd_syncbn
    hvd.allgather_object(None)  # the first rank that ends shuts Horovod down for all


if __name__ == "__main__":
    main()
