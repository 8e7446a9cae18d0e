"""State of Keras layers outside their variables: constants, vocabularies, bins, and what a custom class writes to a file.

Assigning variables does not change this state. `Normalization` computes with constants derived from its variables, and a
lookup layer has a table and no variables.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias
from weakref import WeakKeyDictionary

import keras
import numpy as np

from hvd_syncbn.tf_impl.keras.convert import _walk

if TYPE_CHECKING or keras.backend.backend() == "tensorflow":
    import tensorflow as tf

State: TypeAlias = list[tuple[str, dict[str, Any]]]

# `TextVectorization` holds a `StringLookup`.
_LOOKUPS = (keras.layers.StringLookup, keras.layers.IntegerLookup)
NEVER_BUILT = (*_LOOKUPS, keras.layers.TextVectorization, keras.layers.Discretization)
"""Layers that have state before they are built."""
_exported: WeakKeyDictionary[keras.layers.Layer, tuple[Any, list[Any]]] = WeakKeyDictionary()


def all_layers(roots: Iterable[keras.layers.Layer]) -> list[tuple[str, keras.layers.Layer]]:
    """Return each model or layer and all layers in it, each once, with its path."""
    seen: set[int] = set()
    return [(path or layer.name, layer) for root in roots for path, layer in _walk(root, "", seen)]


def is_stateful(layer: keras.layers.Layer) -> bool:
    """Return whether a layer keeps state outside its variables."""
    return bool(_readers(layer))


def capture(layers: Sequence[tuple[str, keras.layers.Layer]]) -> State:
    """Return the state of layers, in a form that can be pickled."""
    return [(path, {name: read() for name, read in _readers(layer).items()}) for path, layer in layers]


def restore(layers: Sequence[tuple[str, keras.layers.Layer]], state: State) -> None:
    """Restore a state from `capture`, and recompute the constants that layers derive from their variables.

    Raises:
        ValueError: A layer cannot be given the state; the message names the layer.
    """
    for (path, layer), (_, values) in zip(layers, state, strict=True):
        try:
            _write(layer, values)
        except Exception as error:
            raise ValueError(f"layer {path!r} cannot be given the state of another rank: {error}") from error


def constants(layers: Sequence[tuple[str, keras.layers.Layer]]) -> dict[tuple[int, str], str]:
    """Return the digest of each tensor, array and table in the layers' attributes, by layer index and attribute name."""
    found = {}
    for i, (_, layer) in enumerate(layers):
        if isinstance(layer, _LOOKUPS):  # compared as vocabularies
            continue
        for name, value in vars(layer).items():
            content = _content(value)
            if content is not None:
                found[i, name] = hashlib.sha256(content).hexdigest()
    return found


def _readers(layer: Any) -> dict[str, Callable[[], Any]]:
    """Return a function for each part of one layer's state that reads it; empty if the layer only has variables."""
    state: dict[str, Callable[[], Any]] = {}
    if isinstance(layer, _LOOKUPS):
        state["vocabulary"] = lambda: _vocabulary(layer)
        state["idf_weights"] = lambda: _idf_weights(layer)
        state["attributes"] = lambda: _attributes(layer, "input_vocabulary", "input_idf_weights")
    elif isinstance(layer, keras.layers.Discretization):
        state["attributes"] = lambda: _attributes(layer, "bin_boundaries", "summary")
    elif isinstance(layer, keras.layers.CategoryEncoding):  # a FeatureSpace sets it when it is adapted
        state["attributes"] = lambda: _attributes(layer, "num_tokens")
    elif callable(getattr(layer, "finalize_state", None)) and not isinstance(layer, keras.layers.TextVectorization):
        state["finalized"] = lambda: True
    if not _is_ours(type(layer)):
        raw = {name: value for name, value in vars(layer).items() if isinstance(value, tf.Variable)}
        if raw:
            state["raw_variables"] = lambda: {name: value.numpy() for name, value in raw.items()}
        if _custom_method(layer, "save_own_variables") and _custom_method(layer, "load_own_variables"):
            state["store"] = lambda: _saved(layer)
        if _custom_method(layer, "save_assets") and _custom_method(layer, "load_assets"):
            state["assets"] = lambda: _saved_assets(layer)
    return state


def _write(layer: Any, state: Mapping[str, Any]) -> None:
    if "vocabulary" in state:
        _set_vocabulary(layer, state["vocabulary"], state["idf_weights"])
    for name, value in state.get("attributes", {}).items():
        setattr(layer, name, value)
    for name, value in state.get("raw_variables", {}).items():
        getattr(layer, name).assign(value)
    if "store" in state:
        layer.load_own_variables(state["store"])
    if "assets" in state:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in state["assets"].items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            layer.load_assets(folder)
    if "finalized" in state:
        layer.finalize_state()


def _attributes(layer: Any, *names: str) -> dict[str, Any]:
    """Return attributes, lists as copies that Keras does not track."""
    return {name: list(value) if isinstance(value := getattr(layer, name), list) else value for name in names}


def _vocabulary(layer: Any) -> list[Any] | None:
    """Return the vocabulary of a lookup layer, or None if it has none yet. Tables never change, so each is exported once."""
    table = layer.lookup_table
    known = _exported.get(layer)
    if known is None or known[0] is not table:
        known = _exported[layer] = table, [] if int(table.size()) == 0 else list(layer.get_vocabulary())
    return known[1] or None


def _idf_weights(layer: Any) -> np.ndarray | None:
    """Return the inverse document frequencies of the vocabulary, without padding."""
    vocabulary = _vocabulary(layer)
    if layer.output_mode != "tf_idf" or vocabulary is None:
        return None
    return np.array(layer.idf_weights_const.numpy()[: len(vocabulary)])


def _set_vocabulary(layer: Any, vocabulary: list[Any] | None, idf_weights: np.ndarray | None) -> None:
    own = _vocabulary(layer)
    if vocabulary is None and own is not None:
        raise ValueError(
            "it was adapted on this rank, but not on the rank whose state is broadcast: adapt it there, too. "
            f"Received: {len(own)} tokens on this rank"
        )
    own_weights = _idf_weights(layer)
    same = idf_weights is None or (own_weights is not None and np.array_equal(idf_weights, own_weights))
    if vocabulary is not None and (vocabulary != own or not same):
        layer.set_vocabulary(vocabulary, idf_weights)


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("keras", "hvd_syncbn")


def _custom_method(layer: Any, name: str) -> bool:
    """Return whether a class outside Keras and this package defines a method of a layer."""
    owner = next((cls for cls in type(layer).__mro__ if name in vars(cls)), None)
    return owner is not None and not _is_ours(owner)


def _saved(layer: Any) -> dict[str, Any]:
    store: dict[str, Any] = {}
    layer.save_own_variables(store)
    return {name: np.array(value) for name, value in store.items()}


def _saved_assets(layer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        layer.save_assets(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _content(value: Any) -> bytes | None:
    """Return the content of a tensor, an array or a table; None for anything else and for symbolic tensors."""
    if isinstance(value, np.ndarray):
        array = value
    elif isinstance(value, tf.Tensor) and hasattr(value, "numpy"):
        array = np.asarray(value.numpy())
    elif isinstance(value, tf.lookup.StaticHashTable | tf.lookup.experimental.MutableHashTable):
        keys, values = (part.numpy().tolist() for part in value.export())
        return repr(sorted(zip(keys, values, strict=True), key=repr)).encode()
    else:
        return None
    content = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
    return repr((array.dtype.str, array.shape)).encode() + content
