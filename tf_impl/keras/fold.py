"""``fold_batchnorm``: fold batch norms with moving statistics into the layers before or after them.

The order of layers is read from the graph of a functional or Sequential model. The result is a new model, built from the
configs of the original layers.
"""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from hvd_syncbn.exchange import scale_and_shift
from hvd_syncbn.progress import launched_rank, track
from hvd_syncbn.tf_impl.keras.convert import _walk
from hvd_syncbn.tf_impl.keras.layer import BatchNormalization, SyncBatchNormalization

_layers = keras.layers
_CONVOLUTIONS = (_layers.Conv1D, _layers.Conv2D, _layers.Conv3D)
_TRANSPOSED = (_layers.Conv1DTranspose, _layers.Conv2DTranspose, _layers.Conv3DTranspose)
_DEPTHWISE = (_layers.DepthwiseConv1D, _layers.DepthwiseConv2D)
_SEPARABLE = (_layers.SeparableConv1D, _layers.SeparableConv2D)
_FOLDS = (*_CONVOLUTIONS, *_TRANSPOSED, *_DEPTHWISE, *_SEPARABLE, _layers.Dense)

Array = NDArray[np.float64]
_Affine = tuple[Array, Array]  # (scale, shift)


@keras.saving.register_keras_serializable("hvd_syncbn")
class Scale(keras.layers.Layer):
    """Layer that computes `gamma * inputs + beta` per channel, like Caffe's `Scale`.

    `fold_batchnorm` replaces a batch normalization with this layer if it cannot be folded into another one.

    Args:
        axis: Integer, the axis of the channels.
        center: If `True`, add an offset `beta`.
        **kwargs: The arguments of `keras.layers.Layer`.

    Call arguments:
        inputs: Tensor with at least 2 dimensions.
    """

    def __init__(self, axis: int = -1, center: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.axis = axis
        self.center = center
        self.supports_masking = True

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Create the weights."""
        shape = (input_shape[self.axis],)
        self.gamma = self.add_weight(shape=shape, name="gamma", initializer="ones")
        self.beta = self.add_weight(shape=shape, name="beta", initializer="zeros") if self.center else None

    def call(self, inputs: Any) -> Any:
        """Scale and shift `inputs`."""
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        outputs = inputs * keras.ops.reshape(self.gamma, shape)
        return outputs if self.beta is None else outputs + keras.ops.reshape(self.beta, shape)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Return the shape of the inputs."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Return the arguments."""
        return {**super().get_config(), "axis": self.axis, "center": self.center}


def fold_batchnorm(model: keras.Model) -> keras.Model:
    """Return a copy of a model for inference, with its batch normalizations folded into other layers.

    With moving statistics, a batch normalization is a multiplication and an addition. It is folded into the layer whose output
    it reads, if nothing else reads this output (`Conv1D` to `3D`, `Conv1DTranspose` to `3D`, `DepthwiseConv1D`, `2D`,
    `SeparableConv1D`, `2D`, `Dense`). Otherwise it is folded into the only layer that reads its own output, if that is exact:
    with zero padding it is not. Two adjacent norms, or a norm and a `Scale`, are combined. A norm without such a neighbor
    becomes a `Scale`. A fused activation or residual becomes a separate layer. A norm that cannot be folded stays a batch
    normalization, and a warning says why.

    Outputs are equal up to float rounding: weights are folded in float64 and rounded once. An output differs by about as much
    as between two summation orders of the same convolution (about 1e-6 of its magnitude in float32).

    A folded norm uses the moving statistics also if the copy is called with `training=True`. Therefore train the copy only if
    the norms were frozen (`freeze_batchnorm`, `trainable = False`). `trainable` of the layers is kept. The copy is not
    compiled.

    Args:
        model: Functional or Sequential model, possibly nested, built. It is not changed.

    Returns:
        The copy: a `keras.Sequential` or a `keras.Model`.

    Raises:
        TypeError: `model` is not a Keras model.
        ValueError: The model is subclassed, so that only its code knows the order of its layers; or it is not built.

    Example:

    >>> import keras
    >>> from hvd_syncbn.keras import fold_batchnorm
    >>> layers = [keras.layers.Conv2D(8, 3, use_bias=False), keras.layers.BatchNormalization(), keras.layers.ReLU()]
    >>> model = keras.Sequential([keras.Input((9, 9, 3)), *layers])
    >>> [type(layer).__name__ for layer in fold_batchnorm(model).layers]
    ['Conv2D', 'ReLU']
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a keras.Model. Received: {type(model).__name__} of {type(model).__module__}")
    if not _is_graph(model):
        raise ValueError(
            "The order of layers is known for built functional and Sequential models only. "
            f"Received: {type(model).__name__}, built={model.built}"
        )
    norms = {id(layer): path for path, layer in _walk(model, "", set()) if isinstance(layer, keras.layers.BatchNormalization)}
    if not norms:
        warnings.warn(f"found no batch normalization to fold. Received: model {model.name!r}", stacklevel=2)
    folder = _Folder(model)
    for graph in list(folder.graphs):
        folder.fold(graph)
    for number, path in norms.items():
        if number not in folder.folded | folder.scales:
            reason = folder.reasons.get(number, "it is in a layer for which the order of calls is not known")
            warnings.warn(f"{path!r} is not folded: {reason}", stacklevel=2)
    try:
        return folder.build(model)
    finally:
        folder.bar.close()


def _is_graph(model: Any) -> bool:
    return isinstance(model, keras.Model) and type(model).call.__module__.startswith("keras.") and _function(model) is not None


def _function(model: Any) -> Any:
    """Return the model as a graph of operations, or None if it has none."""
    if isinstance(model, keras.Sequential):
        return model._functional
    return model if isinstance(model, keras.Function) else None


class _Refused(Exception):
    """Raised with the reason why a norm cannot be folded."""


class _Graph:
    """The calls in one model. A Keras node is one call of an operation."""

    def __init__(self, model: keras.Model) -> None:
        function = _function(model)
        depths = sorted(function._nodes_by_depth, reverse=True)
        self.nodes = [node for depth in depths for node in function._nodes_by_depth[depth]]
        self._writer = {id(tensor): node for node in self.nodes for tensor in node.outputs}
        self._readers: dict[int, list[Any]] = {}
        for node in self.nodes:
            for tensor in node.input_tensors:
                self._readers.setdefault(id(tensor), []).append(node)
        for tensor in function.outputs:
            self._readers.setdefault(id(tensor), []).append(None)

    def source(self, node: Any) -> Any:
        """Return the call whose output is the first input of a call."""
        return None if node.is_input else self._writer.get(id(node.input_tensors[0]))

    def users(self, node: Any) -> list[Any]:
        """Return the calls that read the output of a call, once per use; None stands for the model's output."""
        return [user for tensor in node.outputs for user in self._readers.get(id(tensor), [])]


class _Folder:
    def __init__(self, model: keras.Model) -> None:
        self.graphs = [_Graph(part) for _, part in _walk(model, "", set()) if _is_graph(part)]
        self.calls = Counter(id(node.operation) for graph in self.graphs for node in graph.nodes)
        self.reasons: dict[int, str] = {}
        self.affine: dict[int, _Affine] = {}
        self.folded: set[int] = set()  # norms and Scales that were folded into other layers
        self.scales: set[int] = set()  # those that become a Scale, or stay one with other weights
        self.weights: dict[int, tuple[list[Array], Array]] = {}  # kernels and bias of layers with a folded norm
        self.copies: dict[int, Any] = {}
        # Most of the time is spent building the copy. The launcher's rank is used because folding does not need Horovod.
        total = len(self.calls)
        self.bar = track(range(total), "Folding batch norms", launched_rank() == 0, total)

    # --- Folding

    def fold(self, graph: _Graph) -> None:
        """Fold the norms of one model, in the order of its calls."""
        self.graph = graph
        found = []
        for node in graph.nodes:
            layer = node.operation
            if not isinstance(layer, keras.layers.BatchNormalization | Scale):
                continue
            try:
                self._check_norm(layer)
            except _Refused as reason:
                self.reasons[id(layer)] = str(reason)
            else:
                self.affine[id(layer)] = _affine(layer)
                found.append(node)
        for node in found:
            self._fold(node)

    def _fold(self, node: Any) -> None:
        layer, number = node.operation, id(node.operation)
        reason = None
        for way in (self._into_source, self._into_user):
            try:
                if way(node):
                    self.folded.add(number)
                    return
            except _Refused as refused:
                reason = reason or str(refused)
        if number in self.scales or (reason is None and not isinstance(layer, Scale)):
            self.scales.add(number)
        elif reason is not None:
            self.reasons[number] = reason

    def _into_source(self, node: Any) -> bool:
        """Fold a norm into the layer whose output it reads. Return whether it was folded."""
        source = self._behind(node)
        if source is None or not isinstance(source.operation, _FOLDS):
            between = self._between(source)
            if between is not None:
                raise _Refused(between)
            return False
        layer, here = source.operation, node
        while here is not source:
            here = self.graph.source(here)
            if len(self.graph.users(here)) != 1:
                raise _Refused(f"the output of {layer.name!r} is used elsewhere, too")
        self._check_layer(layer)
        if layer.activation is not keras.activations.linear:
            raise _Refused(f"the activation of {layer.name!r} is between them")
        self._check_axis(node.operation, layer, len(source.outputs[0].shape))
        scale, shift = self.affine[id(node.operation)]
        kernels, bias = self._weights(layer)
        self._write(layer, _after(layer, kernels, scale), bias * scale + shift)
        return True

    def _into_user(self, node: Any) -> bool:
        """Fold a norm into the layer, norm or `Scale` that reads its output. Return whether it was folded."""
        norm, dims = node.operation, len(node.outputs[0].shape)
        if getattr(norm, "activation", None) is not None or len(node.input_tensors) > 1:
            return False  # the fused activation or residual is between them
        users = self.graph.users(node)
        while len(users) == 1 and users[0] is not None and self._is_identity(users[0]):
            users = self.graph.users(users[0])
        if len(users) != 1 or users[0] is None or self._behind(users[0]) is not node:
            return False
        layer = users[0].operation
        scale, shift = self.affine[id(norm)]
        if id(layer) in self.affine and _axis(norm, dims) == _axis(layer, dims):
            scale2, shift2 = self.affine[id(layer)]
            self.affine[id(layer)] = scale2 * scale, scale2 * shift + shift2
            self.scales.add(id(layer))
            return True
        if not isinstance(layer, _FOLDS):
            return False
        self._check_layer(layer)
        self._check_axis(norm, layer, dims)
        if isinstance(layer, _TRANSPOSED):
            raise _Refused(f"{layer.name!r}, a transposed convolution, does not apply the whole shift at its borders")
        if _pads_with_zeros(layer) and shift.any():
            raise _Refused(
                f"{layer.name!r} after it pads with zeros, which the norm does not shift: the borders would be wrong"
            )
        kernels, bias = self._weights(layer)
        kernels, added = _before(layer, kernels, scale, shift)
        self._write(layer, kernels, bias + added)
        return True

    # --- Neighboring layers

    def _is_identity(self, node: Any) -> bool:
        layer = node.operation
        if id(layer) in self.folded:
            return getattr(layer, "activation", None) is None and len(node.input_tensors) == 1
        return type(layer) is _layers.Identity

    def _behind(self, node: Any) -> Any:
        source = self.graph.source(node)
        while source is not None and self._is_identity(source):
            source = self.graph.source(source)
        return source

    def _between(self, node: Any) -> str | None:
        """Say which layers separate a norm from the layer that it could be folded into; None if there is no such layer."""
        between: list[str] = []
        while node is not None and len(node.input_tensors) == 1:
            if isinstance(node.operation, _FOLDS):
                return f"between {node.operation.name!r} and it there are other layers: {', '.join(reversed(between))}"
            if not self._is_identity(node):
                between.append(repr(node.operation.name))
            node = self.graph.source(node)
        return None

    # --- Checks and weights

    def _check_norm(self, layer: Any) -> None:
        if type(layer) not in (keras.layers.BatchNormalization, BatchNormalization, SyncBatchNormalization, Scale):
            raise _Refused(f"a {type(layer).__name__} may do more than its base class")
        if self.calls[id(layer)] > 1:
            raise _Refused("it is shared: it is called more than once")

    def _check_layer(self, layer: Any) -> None:
        if type(layer) not in _FOLDS:
            raise _Refused(f"{layer.name!r} is a {type(layer).__name__}, which may do more than its base class")
        if self.calls[id(layer)] > 1:
            raise _Refused(f"{layer.name!r} is shared: it is called more than once")
        if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
            raise _Refused(f"{layer.name!r} is quantized or has LoRA weights")

    def _check_axis(self, norm: Any, layer: Any, dims: int) -> None:
        first = not isinstance(layer, _layers.Dense) and layer.data_format == "channels_first"
        channels = 1 if first else dims - 1
        if _axis(norm, dims) != channels:
            raise _Refused(f"it normalizes axis {norm.axis}, and the channels of {layer.name!r} are axis {channels}")

    def _weights(self, layer: Any) -> tuple[list[Array], Array]:
        """Return the current kernels and bias of a layer."""
        if id(layer) in self.weights:
            return self.weights[id(layer)]
        variables = [layer.depthwise_kernel, layer.pointwise_kernel] if isinstance(layer, _SEPARABLE) else [layer.kernel]
        kernels = [_numpy(v) for v in variables]
        if layer.bias is not None:
            return kernels, _numpy(layer.bias)
        channels = kernels[0].shape[-2] * kernels[0].shape[-1] if isinstance(layer, _DEPTHWISE) else kernels[-1].shape[-1]
        return kernels, np.zeros(kernels[0].shape[-2] if isinstance(layer, _TRANSPOSED) else channels)

    def _write(self, layer: Any, kernels: list[Array], bias: Array) -> None:
        for array in (*kernels, bias):
            with np.errstate(over="ignore"):
                narrow = keras.ops.convert_to_numpy(keras.ops.cast(array, layer.variable_dtype))
            if np.isfinite(array).all() and not np.isfinite(narrow.astype(np.float64)).all():
                raise _Refused(f"the weights of {layer.name!r} would be too large for {layer.variable_dtype}")
        self.weights[id(layer)] = kernels, bias

    # --- The new model

    def build(self, model: Any) -> Any:
        """Return a copy of a model, including nested models."""
        if isinstance(model, keras.Sequential):
            pieces = [piece for layer in model.layers for piece in self._pieces(layer)]
            new = keras.Sequential([_input(model.inputs[0]), *pieces], name=model.name)
        else:
            inputs = keras.tree.map_structure(_input, model._inputs_struct)
            # `operation_fn` has no default in Keras 3.12 and older.
            outputs = model._run_through_graph(inputs, operation_fn=lambda operation: operation, call_fn=self._call)
            new = keras.Model(inputs, outputs, name=model.name)
        for layer in model.operations if isinstance(model, keras.Function) else model.layers:
            copy = self.copies.get(id(layer))
            if isinstance(copy, keras.layers.Layer):
                self._fill(copy, layer)
        return new

    def _call(self, operation: Any, *args: Any, residual: Any = None, **kwargs: Any) -> Any:
        if id(operation) not in self.folded | self.scales:
            next(self.bar, None)
            kwargs = kwargs if residual is None else {**kwargs, "residual": residual}
            return self._copy(operation)(*args, **kwargs)
        outputs, pieces = args[0], self._pieces(operation)
        if residual is not None:
            if id(operation) in self.scales:
                outputs = pieces.pop(0)(outputs)
            outputs = _layers.Add(name=f"{operation.name}_add")([outputs, residual])
        for piece in pieces:
            outputs = piece(outputs)
        return outputs

    def _pieces(self, layer: Any) -> list[Any]:
        """Return the layers that replace a layer."""
        next(self.bar, None)
        if id(layer) not in self.folded | self.scales:
            return [self._copy(layer)]
        pieces: list[Any] = []
        if id(layer) in self.scales and id(layer) not in self.folded:
            dtype = layer.dtype_policy
            pieces.append(Scale(axis=layer.axis, name=layer.name, dtype=dtype, trainable=layer.trainable))
            self.copies[id(layer)] = pieces[0]
        if getattr(layer, "activation", None) == "relu":
            pieces.append(_layers.ReLU(name=f"{layer.name}_relu", dtype=layer.dtype_policy))
        return pieces

    def _copy(self, operation: Any) -> Any:
        if id(operation) not in self.copies:
            if _is_graph(operation):
                self.copies[id(operation)] = self.build(operation)
            else:
                config = operation.get_config() | ({"use_bias": True} if id(operation) in self.weights else {})
                self.copies[id(operation)] = type(operation).from_config(config)
        return self.copies[id(operation)]

    def _fill(self, new: Any, old: Any) -> None:
        """Set the weights of a copy that is built."""
        if _is_graph(old):
            return
        if id(old) in self.weights:
            kernels, bias = self.weights[id(old)]
            new.set_weights([*kernels, bias])
        elif id(old) in self.scales:
            new.set_weights(list(self.affine[id(old)]))
        else:
            for variable, value in zip(new.variables, old.variables, strict=True):
                variable.assign(value)
                if variable.trainable != value.trainable:
                    variable.trainable = value.trainable


def _input(tensor: Any) -> Any:
    layer = tensor._keras_history.operation
    return keras.Input(
        batch_shape=tensor.shape, dtype=tensor.dtype, name=layer.name, sparse=tensor.sparse, optional=layer.optional
    )


def _numpy(variable: Any) -> Array:
    return np.asarray(keras.ops.convert_to_numpy(variable.value)).astype(np.float64)


def _axis(norm: Any, dims: int) -> int:
    axis = norm.axis[0] if isinstance(norm.axis, list | tuple) else norm.axis
    return int(axis) % dims


def _affine(layer: Any) -> _Affine:
    if isinstance(layer, Scale):
        scale = _numpy(layer.gamma)
        return scale, np.zeros_like(scale) if layer.beta is None else _numpy(layer.beta)
    gamma, beta = (None if v is None else _numpy(v) for v in (layer.gamma, layer.beta))
    return scale_and_shift(gamma, beta, _numpy(layer.moving_mean), _numpy(layer.moving_variance), layer.epsilon)


def _after(layer: Any, kernels: list[Array], scale: Array) -> list[Array]:
    """Return the kernels of a layer with the scale of its output folded in."""
    *before, last = kernels
    if isinstance(layer, _TRANSPOSED):  # (..., out, in)
        return [last * scale[:, None]]
    if isinstance(layer, _DEPTHWISE):  # (..., in, multiplier)
        return [last * scale.reshape(last.shape[-2:])]
    return [*before, last * scale]


def _before(layer: Any, kernels: list[Array], scale: Array, shift: Array) -> tuple[list[Array], Array]:
    """Return the kernels of a layer with the scale of its input folded in, and what the input's shift adds to its output."""
    kernel, *pointwise = kernels
    spatial = tuple(range(kernel.ndim - 2))
    if isinstance(layer, _DEPTHWISE + _SEPARABLE):  # (..., in, multiplier)
        added = (kernel * shift[:, None]).sum(spatial).reshape(-1)
        for point in pointwise:
            added = added @ point.reshape(point.shape[-2:])
        return [kernel * scale[:, None], *pointwise], added
    groups = getattr(layer, "groups", 1)
    shape = (*kernel.shape[:-1], groups, kernel.shape[-1] // groups)  # (..., in / groups, groups, out / groups)
    columns = [vector.reshape(groups, -1).T[:, :, None] for vector in (scale, shift)]
    grouped = kernel.reshape(shape)
    added = (grouped * columns[1]).sum((*spatial, kernel.ndim - 2)).reshape(-1)
    return [(grouped * columns[0]).reshape(kernel.shape)], added


def _pads_with_zeros(layer: Any) -> bool:
    return getattr(layer, "padding", "valid") != "valid" and any(size > 1 for size in layer.kernel_size)
