"""A small GAN: a Keras model with two optimizers, one in an attribute and one in a dictionary of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf


class Sides(keras.layers.Layer):
    """Generator and discriminator."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.generator, self.discriminator = keras.layers.Dense(3), keras.layers.Dense(1)
        self.optimizers: dict[str, Any] = {}

    def build(self, shape: Any) -> None:
        self.generator.build((None, 3))
        self.discriminator.build((None, 3))

    def call(self, x: Any) -> Any:
        return self.discriminator(self.generator(x))


class Gan(keras.Model):
    """`model.optimizer` is Keras's default, which nobody applies."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sides = Sides()

    def call(self, x: Any) -> Any:
        return self.sides(x)

    def compile(self, d_optimizer: Any, g_optimizer: Any) -> None:  # type: ignore[override]
        super().compile()
        self.d_optimizer = d_optimizer
        self.sides.optimizers = {"g": g_optimizer}

    def get_compile_config(self) -> dict[str, Any]:
        chosen = {"d_optimizer": self.d_optimizer, "g_optimizer": self.sides.optimizers["g"]}
        return {name: keras.optimizers.serialize(optimizer) for name, optimizer in chosen.items()}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        self.compile(**{name: keras.optimizers.deserialize(one) for name, one in config.items()})

    def train_step(self, x: Any) -> dict[str, Any]:
        sides = self.sides
        with tf.GradientTape(persistent=True) as tape:
            fake = sides.generator(x)
            d_loss = tf.reduce_mean(sides.discriminator(x) - sides.discriminator(fake)) ** 2
            g_loss = tf.reduce_mean(sides.discriminator(fake)) ** 2
        for optimizer, loss, layer in (
            (self.d_optimizer, d_loss, sides.discriminator),
            (sides.optimizers["g"], g_loss, sides.generator),
        ):
            optimizer.apply(tape.gradient(loss, layer.trainable_variables), layer.trainable_variables)
        return {"loss": d_loss}


def built_gan(seed: int, wrap: Callable[[Any], Any], build: bool = True) -> Gan:
    """A compiled GAN, its weights drawn by a seed, its optimizers built or not."""
    gan = Gan()
    gan(np.zeros((1, 3), "float32"))
    rng = np.random.default_rng(seed)
    gan.set_weights([rng.normal(size=w.shape) for w in gan.get_weights()])
    gan.compile(*(wrap(keras.optimizers.SGD(0.01, momentum=0.9)) for _ in range(2)))
    if build:
        gan.d_optimizer.build(gan.sides.discriminator.trainable_variables)
        gan.sides.optimizers["g"].build(gan.sides.generator.trainable_variables)
    return gan
