"""PyTorch with a "GPU" that is the CPU: tensors for "cuda" are made there, streams and events do nothing."""

from __future__ import annotations

import contextlib
import itertools
import time
import types
from collections.abc import Iterator
from typing import Any


class Event:
    """A CUDA event that is over, but for the eighth question of each kind, so that callers see both answers."""

    _asked = itertools.count()

    def __init__(self, **_: Any) -> None:
        self._time = 0.0

    def record(self, *_: Any) -> None:
        """Take the time."""
        self._time = time.perf_counter()

    def query(self) -> bool:
        """Seldom true."""
        return next(Event._asked) % 8 == 7

    def synchronize(self) -> None:
        """Do nothing."""

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return 1000 * (end._time - self._time)


class Stream:
    """A CUDA stream."""

    def wait_stream(self, *_: Any) -> None:
        """Do nothing."""

    def synchronize(self) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Return that it is busy, as after a sleep."""
        return False


@contextlib.contextmanager
def _on_stream(_: Any) -> Iterator[None]:
    yield


def install(torch: Any) -> None:
    """Change a PyTorch that was just imported."""
    from torch.overrides import TorchFunctionMode

    def on_cpu(value: Any) -> Any:
        is_gpu = (isinstance(value, str) and value.startswith("cuda")) or (
            isinstance(value, torch.device) and value.type == "cuda"
        )
        return "cpu" if is_gpu else value

    class OnTheCpu(TorchFunctionMode):
        def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.cuda:
                return args[0].clone()
            named = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
            return function(*map(on_cpu, args), **named)

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__(on_cpu(device_type), *args, **kwargs)

    stream = Stream()
    device = types.SimpleNamespace(total_memory=1 << 40, multi_processor_count=4)
    nothing = {name: lambda *_: None for name in ("synchronize", "_sleep", "set_device")}
    constants = {
        "is_available": True,
        "is_current_stream_capturing": False,
        "device_count": 2,
        "get_device_name": "stand-in",
        "get_device_capability": (9, 0),
        "get_device_properties": device,
        "current_stream": stream,
    }
    for name, value in constants.items():
        setattr(torch.cuda, name, lambda *_, value=value: value)
    for name, function in (nothing | {"Event": Event, "Stream": Stream, "stream": _on_stream}).items():
        setattr(torch.cuda, name, function)
    torch.autocast = Autocast
    torch.compile = lambda model, **_: model
    for name, function in _peers(torch).items():
        setattr(torch, name, function)
    if torch.distributed.is_available():
        begin = torch.distributed.init_process_group
        torch.distributed.init_process_group = lambda _, **options: begin("gloo", **options)
    OnTheCpu().__enter__()


def _peers(torch: Any) -> dict[str, Any]:
    """PyTorch's functions for CUDA tensors alone, roughly."""

    def along(x: Any, vector: Any) -> Any:
        return vector.to(x.dtype).reshape(1, -1, *[1] * (x.dim() - 2))

    def dims(x: Any) -> list[int]:
        return [0, *range(2, x.dim())]

    def stats(x: Any, eps: float) -> Any:
        x = x.float()
        return x.mean(dims(x)), (x.var(dims(x), unbiased=False) + eps).rsqrt()

    def gather(x: Any, mean: Any, invstd: Any, *_: Any) -> Any:
        return mean[0], invstd[0]

    def elemt(x: Any, weight: Any, bias: Any, mean: Any, invstd: Any, eps: float) -> Any:
        return (x - along(x, mean)) * along(x, invstd * weight) + along(x, bias)

    def reduce(dy: Any, x: Any, mean: Any, invstd: Any, weight: Any, *_: Any) -> Any:
        sums = dy.float().sum(dims(x)), (dy * (x - along(x, mean))).float().sum(dims(x))
        return *sums, sums[1] * invstd, sums[0]

    def backward(dy: Any, x: Any, mean: Any, invstd: Any, weight: Any, *_: Any) -> Any:
        return dy * along(x, invstd * weight)

    return {
        "batch_norm_stats": stats,
        "batch_norm_gather_stats_with_counts": gather,
        "batch_norm_elemt": elemt,
        "batch_norm_backward_reduce": reduce,
        "batch_norm_backward_elemt": backward,
    }
