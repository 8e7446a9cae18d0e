"""``BackupAndRestore`` for several ranks, and a check for Keras's own callback, which supports one process only."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import keras

from hvd_syncbn.tf_impl.keras import ranks
from hvd_syncbn.tf_impl.keras.training.functions import broadcast_state
from hvd_syncbn.tf_impl.keras.training.optimizer import forget_gradients, optimizers_of, require_built

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

if TYPE_CHECKING:
    from horovod.common.process_sets import ProcessSet


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` for several ranks: one rank writes and reads, and all ranks resume together.

    Use it on all ranks. Only `root_rank` needs the folder. When training starts, it broadcasts the model's weights and layer
    state and the state of all optimizers of the model to the other ranks. Random seeds (`Dropout`) and gradients that
    `backward_passes_per_step` has not applied yet are not restored on the other ranks.

    A backup is written to temporary files, which are then renamed. A job that is killed while it writes therefore leaves a
    complete backup. With `save_freq` in batches, training resumes at the beginning of the epoch of the backup, as in Keras: the
    batches of this epoch are repeated.

    Args:
        backup_dir: Folder for the backup. It must not contain other files.
        save_freq: `"epoch"`, or a number of batches.
        double_checkpoint: Whether to also keep the previous backup, and use it if the latest one cannot be read.
        delete_checkpoint: Whether to delete the backup when training ends.
        root_rank: The rank that writes and reads.
        process_set: The `hvd.ProcessSet` that trains. Defaults to all ranks.

    Raises:
        ValueError: When training starts, on every rank: the model, or an optimizer other than `model.optimizer`, is not built.
        RuntimeError: When training starts, on every rank: `root_rank` cannot read the backup.

    Example:

    ```python
    model.fit(data, epochs=90, callbacks=[BackupAndRestore("backup"), MetricAverageCallback()])  # again after an interruption
    ```
    """

    def __init__(
        self,
        backup_dir: Any,
        save_freq: str | int = "epoch",
        double_checkpoint: bool = False,
        delete_checkpoint: bool = True,
        *,
        root_rank: int = 0,
        process_set: ProcessSet | None = None,
    ) -> None:
        super().__init__(str(backup_dir), save_freq, delete_checkpoint=delete_checkpoint)
        self.double_checkpoint = double_checkpoint
        self.root_rank = root_rank
        self.process_set = process_set

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Restore the backup, if there is one, on all ranks."""
        model = self.model
        self._current_epoch = self._last_batch_seen = self._batches_seen_since_last_saving = 0
        model._initial_epoch = None  # Keras would use the epoch of an earlier backup in every later `fit()`
        error, found = None, False
        try:
            if not model.built:
                raise ValueError(
                    "BackupAndRestore needs a model that is built before `fit()`: call `model.build(input_shape)`. "
                    f"Received: {model.name!r}, not built"
                )
            require_built(model)
            if self._writes():
                found = tf.io.gfile.exists(self._weights_path)
                self._load()
        except Exception as failure:
            error = failure
        mine = (error and f"{type(error).__name__}: {error}", found, model._initial_epoch)
        everyone = ranks.find_horovod(self.process_set).gather(mine, "backup")
        errors = {rank: message for rank, (message, _, _) in enumerate(everyone) if message}
        if isinstance(error, ValueError):
            raise error
        if errors:
            raise RuntimeError(f"the backup in {self.backup_dir!r} was not restored. Received: by rank: {errors}") from error
        if any(found for _, found, _ in everyone):
            optimizers = optimizers_of(model)
            for optimizer in optimizers:
                forget_gradients(optimizer)
            variables = [*model.weights, *(v for optimizer in optimizers for v in optimizer.variables)]
            broadcast_state(variables, [model], self.root_rank, self.process_set)
            model._initial_epoch = next((epoch for _, found, epoch in everyone if found), None)
            if model.train_function is None:  # the traced step had different constants
                model.make_train_function()

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Store the epoch for backups within it."""
        self._current_epoch = epoch

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Delete the backup when all ranks have finished."""
        ranks.find_horovod(self.process_set).gather(None, "backup")
        self.model._initial_epoch = None
        if self._writes():
            super().on_train_end(logs)

    def _writes(self) -> bool:
        return bool(ranks.require().rank() == self.root_rank)

    def _load(self) -> None:
        before = f"{self._weights_path}.bkp", f"{self._training_metadata_path}.bkp"
        try:
            self._load_model()
        except OSError:
            if not all(map(tf.io.gfile.exists, before)):
                raise
            for path in before:
                tf.io.gfile.copy(path, path.removesuffix(".bkp"), overwrite=True)
            self._load_model()

    def _save_model(self) -> None:
        if not self._writes():
            return
        files = tf.io.gfile
        files.makedirs(self.backup_dir)
        part = files.join(self.backup_dir, "part.weights.h5")
        self.model.save_weights(part, overwrite=True)
        with files.GFile(f"{part}.json", "w") as file:
            file.write(json.dumps({"epoch": self._current_epoch, "batch": self._last_batch_seen}))
        if self.double_checkpoint and files.exists(self._weights_path):
            files.rename(self._weights_path, f"{self._weights_path}.bkp", overwrite=True)
            files.rename(self._training_metadata_path, f"{self._training_metadata_path}.bkp", overwrite=True)
        files.rename(part, self._weights_path, overwrite=True)
        files.rename(f"{part}.json", self._training_metadata_path, overwrite=True)


def check_plain(callbacks: Iterable[Any], process_set: ProcessSet | None = None) -> None:
    """Raise on every rank if Keras's own BackupAndRestore is among the callbacks and cannot resume several ranks.

    It can if every rank has one, each with a separate folder.
    """
    plain = [c for c in callbacks if isinstance(c, keras.callbacks.BackupAndRestore) and not isinstance(c, BackupAndRestore)]
    by_rank = ranks.find_horovod(process_set).gather([str(callback.backup_dir) for callback in plain], "plain_backup")
    folders = [folder for folders in by_rank for folder in folders]
    if len(by_rank) > 1 and folders and (not all(by_rank) or len(set(folders)) < len(folders)):
        raise ValueError(
            "keras.callbacks.BackupAndRestore cannot resume several ranks: used on one rank, it resumes only that rank, in a "
            "different epoch than the others; with one folder, ranks overwrite each other's files. Use "
            f"`hvd_syncbn.keras.callbacks.BackupAndRestore` on all ranks. Received: folders by rank: {by_rank}"
        )
