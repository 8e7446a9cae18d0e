"""``fold_batchnorm``: folds batch norms with stored statistics into the layer before or after them.

The data flow of the model is read from a ``torch.fx`` trace of a temporary copy that shares its tensors. The result is a deep
copy of the model with the same classes and names; only layers are replaced.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from hvd_syncbn.exchange import scale_and_shift
from hvd_syncbn.progress import launched_rank, track
from hvd_syncbn.torch_impl.convert import _is_plain
from hvd_syncbn.torch_impl.functional import ACTIVATIONS
from hvd_syncbn.torch_impl.module import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

_FOLDS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    nn.Linear,
)
_OURS = (SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d)
_Affine = tuple[Tensor, Tensor]  # float64 (scale, shift)


class Scale(nn.Module):
    r"""``weight * x + bias`` for each channel, plus a residual, then an activation, like Caffe's ``Scale`` layer.

    ``fold_batchnorm`` replaces a batch norm by it if there is no layer to fold the batch norm into.

    Args:
        num_features: number of channels ``C``.
        bias: whether to add an offset.
        activation: None, or ``"relu"``.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Shape:
        - input: ``(N, C, *)``
        - residual: as input, added before the activation
        - output: as input
    """

    def __init__(
        self,
        num_features: int,
        bias: bool = True,
        activation: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"expected activation to be one of {ACTIVATIONS}. Received: {activation!r}")
        self.num_features = num_features
        self.activation = activation
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.zeros_like(self.weight)) if bias else None)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Scale and shift each channel, add the residual, and apply the activation."""
        column = [1, -1, *[1] * (input.dim() - 2)]
        y = input * self.weight.view(column)
        if self.bias is not None:
            y = y + self.bias.view(column)
        return _rest(y, residual, self.activation)

    def extra_repr(self) -> str:
        """The arguments."""
        text = f"{self.num_features}, bias={self.bias is not None}"
        return text if self.activation is None else f"{text}, activation={self.activation}"


class Rest(nn.Module):
    """The residual and activation of a batch norm that was folded into another layer.

    Args:
        activation: None, or ``"relu"``.
        two_dimensions: whether the other layer is linear. A linear layer writes the last dimension and a batch norm normalizes
            the second, so the fold is valid only for inputs of 2 dimensions; others raise a ``ValueError``.
    """

    def __init__(self, activation: str | None = None, two_dimensions: bool = False) -> None:
        super().__init__()
        self.activation = activation
        self.two_dimensions = two_dimensions

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Add the residual, which has the shape of the input, and apply the activation."""
        if self.two_dimensions and input.dim() != 2:
            raise ValueError(
                "a batch norm was folded into the linear layer beside it, which is valid for inputs of 2 dimensions only. Use "
                f"the model that was not folded. Received: shape {tuple(input.shape)}"
            )
        return _rest(input, residual, self.activation)

    def extra_repr(self) -> str:
        """The arguments."""
        return f"activation={self.activation}, two_dimensions={self.two_dimensions}"


def _rest(y: Tensor, residual: Tensor | None, activation: str | None) -> Tensor:
    y = y if residual is None else y + residual
    return torch.relu(y) if activation == "relu" else y


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Return a copy of a model for inference with its batch norms folded into other layers.

    A batch norm with stored statistics is a scale and a shift. It is folded into the layer before it (``nn.Conv1d`` to ``3d``,
    ``nn.ConvTranspose1d`` to ``3d``, ``nn.Linear``) if nothing else reads that layer's output, or else into the layer after it
    if nothing else reads the batch norm's output and the fold is exact (it is not with zero padding). Two batch norms, or a
    batch norm and a ``Scale``, become one. A batch norm without such a layer becomes a ``Scale``. A fused activation or
    residual remains as a separate layer. A batch norm that cannot be folded is kept, and a warning gives its name and the
    reason.

    Outputs are equal up to rounding: weights are folded in float64 and rounded once, so outputs differ by about as much as two
    summation orders of the same convolution (about 1e-6 of their size in float32).

    Batch norms must be in evaluation mode (``model.eval()``) or frozen (``freeze_batchnorm``). In a model in training mode, a
    frozen batch norm is folded into a layer that does not learn either (``requires_grad`` of both is False), so that the rest
    can be trained.

    The order of layers is traced from ``forward`` with its required arguments and with all arguments; both traces must agree.
    If a model cannot be traced because its code depends on values, its traceable parts are folded, assuming that the model
    calls each part as a whole and only there. A warning says so.

    Args:
        model: model, left unchanged.

    Returns:
        The copy, with the classes and names of the model.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``, or is compiled by ``torch.jit``.
        ValueError: a lazy layer has not seen its first batch.

    Warns:
        UserWarning: a batch norm is not folded, or the model cannot be traced as a whole.

    Example:
        >>> from torch import nn
        >>> from hvd_syncbn.torch import SyncBatchNorm, fold_batchnorm
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), SyncBatchNorm(8, activation="relu")).eval()
        >>> fold_batchnorm(model)
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
        )
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"expected a torch.nn.Module. Received: {type(model).__name__}")
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if not norms:
        warnings.warn(f"found no batch norm to fold. Received: {type(model).__name__}", stacklevel=2)
        return copy.deepcopy(model)
    for name, module in model.named_modules():
        if isinstance(module, LazyModuleMixin):
            raise ValueError(
                f"the lazy layer {name!r} has no channel count yet. First run a batch through the model, then fold it. "
                f"Received: {module}"
            )
    folder = _Folder(copy.deepcopy(model))
    untraced: list[str] = []
    if isinstance(model, _BatchNorm):  # a trace does not contain the call of the root module
        folder.alone()
    else:
        for flow in list(_flows(_skeleton(model), "", untraced)):
            folder.fold(flow, in_parts=bool(untraced))
    for message in untraced:
        warnings.warn(message, stacklevel=2)
    for name, reason in folder.refused(norms).items():
        warnings.warn(f"{name or type(model).__name__!r} is not folded: {reason}", stacklevel=2)
    return folder.model


# --- Data flow --------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm | Scale | _ConvNd | nn.Linear) or super().is_leaf_module(m, module_qualified_name)


class _Flow:
    """The calls of one ``forward``, traced with its required and with all arguments; module names are those in the model."""

    def __init__(self, graphs: list[fx.Graph], prefix: str) -> None:
        self.graphs = graphs
        for node in self.nodes():
            if node.op in ("call_module", "get_attr"):
                node.target = f"{prefix}{node.target}"

    def nodes(self) -> Iterator[fx.Node]:
        for graph in self.graphs:
            yield from graph.nodes

    def calls(self, name: str) -> list[list[fx.Node]]:
        """Return the calls of a module in each graph that has any."""
        found = [[node for node in graph.nodes if (node.op, node.target) == ("call_module", name)] for graph in self.graphs]
        return [nodes for nodes in found if nodes]

    def order(self) -> list[str]:
        return list(dict.fromkeys(str(node.target) for node in self.nodes() if node.op == "call_module"))

    def reads(self, name: str) -> bool:
        """Return whether a parameter of the module is read outside it."""
        return any(node.op == "get_attr" and str(node.target).startswith(f"{name}.") for node in self.nodes())


def _skeleton(model: nn.Module) -> nn.Module:
    """Return a copy that shares the tensors, because tracing a forward may set attributes of the model."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, dict(shared))


def _flows(module: nn.Module, path: str, untraced: list[str]) -> Iterator[_Flow]:
    """Yield the data flow of a model, or of its largest parts that can be traced."""
    if not any(isinstance(part, _BatchNorm) for part in module.modules()) or isinstance(module, _BatchNorm):
        return
    if type(module).forward is not nn.Module.forward:  # lists and dicts of modules have none
        try:
            yield _Flow(_trace(module, path or type(module).__name__, untraced), f"{path}." if path else "")
            return
        except Exception as error:
            untraced.append(
                f"{path or type(module).__name__!r} cannot be traced, so its parts are folded one by one, assuming that each "
                f"is called as a whole and only there. Compare the outputs of the folded model. Received: {_short(error)}"
            )
    for name, child in module.named_children():
        yield from _flows(child, f"{path}.{name}" if path else name, untraced)


def _trace(module: nn.Module, name: str, untraced: list[str]) -> list[fx.Graph]:
    parameters = inspect.signature(module.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.fx warns about defaults; the second trace covers these
        graphs = [_Tracer().trace(module, concrete_args=defaults or None)]
        if defaults:
            try:
                graphs.append(_Tracer().trace(module))
            except Exception as error:
                untraced.append(
                    f"{name!r} can be traced only with the defaults of {', '.join(defaults)}, so the folded model may be wrong "
                    f"for other values. Call it with the defaults. Received: {_short(error)}"
                )
    return graphs


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _reads(node: fx.Node, what: fx.Node | None = None) -> int:
    """Return how often a call reads a value, by default its first argument."""
    what = what or _source(node)
    return sum(value is what for value in (*node.args, *node.kwargs.values()))


def _source(node: fx.Node) -> fx.Node | None:
    """Return the node of a call's first argument."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


# --- Folding ----------------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """A batch norm cannot be folded; the message is the reason."""


class _Folder:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        everything = list(model.named_modules(remove_duplicate=False))
        first = {id(module): name for name, module in reversed(everything)}
        self.names = {name: first[id(module)] for name, module in everything}  # a shared module has its first name
        self.modules = dict(model.named_modules())
        self.reasons: dict[str, str] = {}
        self.done: set[str] = set()

    def refused(self, norms: list[str]) -> dict[str, str]:
        """Return the norms that were not folded, and the reasons."""
        return {name: self.reasons.get(name, "forward does not call it") for name in norms if name not in self.done}

    def alone(self) -> None:
        """Replace a model that is itself a batch norm by a ``Scale``."""
        try:
            self._check_norm("")
        except _Refused as reason:
            self.reasons[""] = str(reason)
        else:
            self.done.add("")
            self.model = self._scale(self.model, self._affine(self.model))

    def fold(self, flow: _Flow, in_parts: bool) -> None:
        """Fold all possible norms of one flow, in the order of its calls."""
        self.flow, self.in_parts = flow, in_parts
        self.affine: dict[str, _Affine] = {}
        self.joined: set[str] = set()  # norms that another norm was merged into
        for node in flow.nodes():
            if node.op == "call_module":
                node.target = self.names[str(node.target)]
        for name in flow.order():
            module = self.modules[name]
            if not isinstance(module, _BatchNorm | Scale):
                continue
            try:
                self._check_norm(name)
                self.affine[name] = self._affine(module)
            except _Refused as reason:
                self.reasons[name] = str(reason)
        # Folding works without Horovod, so the rank comes from the launcher.
        for name in track(list(self.affine), "Folding batch norms", launched_rank() == 0, len(self.affine)):
            self._fold(name)

    def _fold(self, name: str) -> None:
        module = self.modules[name]
        reason = None
        for way in (self._into_source, self._into_user):
            try:
                if way(name):
                    self.done.add(name)
                    return
            except _Refused as refused:
                reason = reason or str(refused)
        if name not in self.joined and (reason is not None or isinstance(module, Scale)):
            self.reasons[name] = reason or ""
            return
        self._replace(name, self._scale(module, self.affine[name]))
        self.done.add(name)

    def _into_source(self, name: str) -> bool:
        """Fold a norm into the layer whose output it reads; return False if there is none."""
        calls = [nodes[0] for nodes in self.flow.calls(name)]
        layers = {self._layer(self._behind(_source(node))) for node in calls}
        if layers == {None}:
            between = {self._between(_source(node)) for node in calls} - {None}
            if between:
                raise _Refused(" and ".join(sorted(filter(None, between))))
            return False
        layer = self._one(layers)
        for node in calls:
            self._alone_with(node, layer)
        self._check_layer(layer)
        self._write(layer, *_after(self.modules[layer], *self.affine[name], layer))
        self._remove(name, isinstance(self.modules[layer], nn.Linear))
        return True

    def _into_user(self, name: str) -> bool:
        """Fold a norm into the layer, norm or ``Scale`` that reads its output; return False if there is none."""
        if _activation(self.modules[name]) is not None or self._residual(name):
            return False  # the fused activation or residual lies between them
        layers: set[str | None] = set()
        for (node,) in self.flow.calls(name):
            readers = [self._ahead(user) for user in node.users]
            if len(readers) != 1 or self._behind(_source(readers[0])) is not node or _reads(readers[0]) != 1:
                return False
            layers.add(self._layer(readers[0], affine=True))
        if layers == {None} or len(layers) != 1:
            return False
        layer = self._one(layers)
        if layer in self.affine:
            (scale, shift), (scale2, shift2) = self.affine[name], self.affine[layer]
            self.affine[layer] = scale2 * scale, scale2 * shift + shift2
            self.joined.add(layer)
        elif isinstance(self.modules[layer], _BatchNorm | Scale):
            return False  # a norm that cannot be folded
        else:
            self._check_layer(layer)
            self._write(layer, *_before(self.modules[layer], *self.affine[name], layer))
        self._remove(name, isinstance(self.modules[layer], nn.Linear))
        return True

    # --- Neighbors in the data flow

    def _behind(self, node: fx.Node | None) -> fx.Node | None:
        while node is not None and self._is_identity(node):
            node = _source(node)
        return node

    def _ahead(self, node: fx.Node) -> fx.Node:
        while self._is_identity(node) and len(node.users) == 1:
            node = next(iter(node.users))
        return node

    def _is_identity(self, node: fx.Node) -> bool:
        module = self.modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Module) and _hooked(module):
            return False
        return isinstance(module, nn.Identity) or (isinstance(module, _DropoutNd) and not module.training)

    def _layer(self, node: fx.Node | None, affine: bool = False) -> str | None:
        """Return the layer that a node calls if norms can be folded into it, or, with `affine`, if it is a norm."""
        kinds = (_ConvNd, nn.Linear, _BatchNorm, Scale) if affine else (_ConvNd, nn.Linear)
        if node is None or node.op != "call_module" or not isinstance(self.modules[str(node.target)], kinds):
            return None
        return str(node.target)

    def _between(self, node: fx.Node | None) -> str | None:
        """Return why a norm cannot be folded into the layer before it: the operations between them."""
        between: list[str] = []
        while node is not None and node.op.startswith("call") and len(node.all_input_nodes) == 1:
            layer = self._layer(node)
            if layer is not None:
                return f"{', '.join(reversed(between))} lies between {layer!r} and it"
            if not self._is_identity(node):
                target = node.target
                between.append(repr(target) if isinstance(target, str) else repr(getattr(target, "__name__", str(target))))
            node = _source(node)
        return None

    def _one(self, layers: set[str | None]) -> str:
        if len(layers) > 1 or None in layers:
            raise _Refused("the layer before or after it depends on the arguments of forward")
        (layer,) = layers
        assert layer is not None
        return layer

    def _alone_with(self, node: fx.Node, layer: str) -> None:
        """Check that each node from here back to the layer is the only reader of the node before it."""
        while (node.op, node.target) != ("call_module", layer):
            source = _source(node)
            assert source is not None
            if len(source.users) != 1 or _reads(node, source) != 1:
                raise _Refused(f"the output of {layer!r} is used elsewhere, too")
            node = source

    def _residual(self, name: str) -> bool:
        return any(len(node.args) + len(node.kwargs) > 1 for nodes in self.flow.calls(name) for node in nodes)

    def _shared(self, name: str) -> bool:
        several = list(self.names.values()).count(name) > 1 and self.in_parts  # a part that was not traced may call it
        return several or any(len(nodes) > 1 for nodes in self.flow.calls(name))

    # --- The layers

    def _check_norm(self, name: str) -> None:
        module = self.modules[name]
        if isinstance(module, Scale):
            if type(module) is not Scale:
                raise _Refused(f"a {type(module).__name__} may do more than a Scale")
        elif isinstance(module, _BatchNorm):
            if not _is_plain(type(module)) and type(module) not in _OURS:
                raise _Refused(f"a {type(module).__name__} may do more than a batch norm")
            if module.training:
                raise _Refused("it is in training mode. Call model.eval() or freeze_batchnorm(model) first")
            if module.running_mean is None:
                raise _Refused("it keeps no running statistics (track_running_stats=False)")
        self._check(name)

    def _check_layer(self, name: str) -> None:
        module = self.modules[name]
        if type(module) not in _FOLDS:
            raise _Refused(f"{name!r} is a {type(module).__name__}, which may do more than its base class")
        if self.flow.reads(name):
            raise _Refused(f"the weight of {name!r} is used elsewhere, too")
        self._check(name, f"{name!r} ")

    def _check(self, name: str, who: str = "it ") -> None:
        """Check the conditions that apply to norms and layers."""
        module = self.modules[name]
        if name and self._shared(name):
            raise _Refused(f"{who}is shared (called more than once)")
        if is_parametrized(module):
            raise _Refused(f"{who}is parametrized")
        if _hooked(module):
            raise _Refused(f"{who}has hooks")
        if self.model.training and any(p.requires_grad for p in module.parameters(recurse=False)):
            raise _Refused(
                f"{who}is being trained (call model.eval() first, or freeze it with requires_grad_(False) or freeze_batchnorm)"
            )

    def _affine(self, module: Any) -> _Affine:
        def numbers(tensor: Tensor | None) -> Any:
            return None if tensor is None else tensor.detach().cpu().double().numpy()

        if isinstance(module, Scale):
            weight = module.weight.detach().double()
            return weight, torch.zeros_like(weight) if module.bias is None else module.bias.detach().double()
        gamma, beta, mean, var = map(numbers, (module.weight, module.bias, module.running_mean, module.running_var))
        scale, shift = (
            torch.from_numpy(v).to(module.running_mean.device) for v in scale_and_shift(gamma, beta, mean, var, module.eps)
        )
        return scale, shift

    def _write(self, name: str, weight: Tensor, bias: Tensor) -> None:
        layer: Any = self.modules[name]
        old = layer.weight
        new = torch.empty_like(old).copy_(weight)  # in its dtype and memory format
        offset = torch.empty_like(bias, dtype=old.dtype).copy_(bias)
        if weight.isfinite().all() and bias.isfinite().all() and not (new.isfinite().all() and offset.isfinite().all()):
            raise _Refused(f"the weights of {name!r} would be too large for {old.dtype}")
        layer.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        layer.bias = nn.Parameter(offset, requires_grad=old.requires_grad)

    def _scale(self, old: Any, affine: _Affine) -> Scale:
        like = old.weight if old.weight is not None else old.running_mean
        new = Scale(len(affine[0]), True, _activation(old), like.device, like.dtype).train(self.model.training)
        learns = old.weight is not None and old.weight.requires_grad
        with torch.no_grad():
            for parameter, value in zip(new.parameters(), affine, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(learns)
        return new

    def _remove(self, name: str, linear: bool) -> None:
        """Replace a folded norm by its residual and activation, and remove its calls from the flow if it has neither."""
        activation, residual = _activation(self.modules[name]), self._residual(name)
        plain = nn.ReLU() if activation == "relu" else nn.Identity()
        new = Rest(activation, linear) if residual or linear else plain
        self._replace(name, new.train(self.model.training))
        if activation is None and not residual:
            for (node,) in self.flow.calls(name):
                source = _source(node)
                assert source is not None
                node.replace_all_uses_with(source)
                node.graph.erase_node(node)

    def _replace(self, name: str, new: nn.Module) -> None:
        old = self.modules[name]
        for parent in list(self.model.modules()):
            for child, module in parent._modules.items():
                if module is old:
                    parent._modules[child] = new
        self.modules[name] = new


def _activation(module: Any) -> str | None:
    return getattr(module, "activation", None) if isinstance(module, Scale) else getattr(module, "_fused", None)


def _hooked(module: nn.Module) -> bool:
    return any(vars(module)[name] for name in _HOOKS)


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def _after(layer: Any, scale: Tensor, shift: Tensor, name: str) -> _Affine:
    """Return the float64 weight and bias of a layer whose output is scaled and shifted."""
    weight = layer.weight.detach().double()
    if isinstance(layer, _ConvTransposeNd):  # (in, out / groups, ...)
        channels, scaled = layer.out_channels, weight.unflatten(0, (layer.groups, -1))
        if channels == len(scale):
            scaled = scaled * scale.reshape(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        weight = scaled.flatten(0, 1)
    else:
        channels = len(weight)
        if channels == len(scale):
            weight = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
    if channels != len(scale):
        raise _Refused(f"it normalizes {len(scale)} channels, but {name!r} writes {channels} in another dimension")
    return weight, shift if layer.bias is None else layer.bias.detach().double() * scale + shift


def _before(layer: Any, scale: Tensor, shift: Tensor, name: str) -> _Affine:
    """Return the float64 weight and bias of a layer whose input is scaled and shifted."""
    if isinstance(layer, _ConvTransposeNd):
        raise _Refused(f"{name!r} after it is a transposed convolution, whose borders would be wrong")
    if isinstance(layer, _ConvNd) and _pads_with_zeros(layer) and shift.any():
        raise _Refused(f"{name!r} after it pads with zeros, which are not normalized, so its borders would be wrong")
    groups = getattr(layer, "groups", 1)
    weight = layer.weight.detach().double().unflatten(0, (groups, -1))  # (groups, out / groups, in / groups, ...)
    if weight.shape[0] * weight.shape[2] != len(scale):
        raise _Refused(f"it normalizes {len(scale)} channels, but {name!r} reads another dimension")
    ones = [1] * (weight.dim() - 3)
    added = (weight * shift.reshape(groups, 1, -1, *ones)).flatten(2).sum(2).flatten()
    weight = (weight * scale.reshape(groups, 1, -1, *ones)).flatten(0, 1)
    return weight, added if layer.bias is None else layer.bias.detach().double() + added


def _pads_with_zeros(layer: Any) -> bool:
    if layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    if layer.padding == "same":
        return any(k > 1 for k in layer.kernel_size)
    return any(layer.padding)
