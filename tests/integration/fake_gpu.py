"""A device that is not the host, for machines without a GPU: it holds real data, and is as strict as CUDA or stricter.

It refuses operators on tensors of two devices, copies that the host would wait for, and kernels that are handed
tensors of the host. What runs within `capture` is replayed as a CUDA graph would be: the same operators and kernels,
on the same tensors with what these hold by then, every number as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from triton.runtime.interpreter import GridExecutor  # what `kernel[grid]` is under TRITON_INTERPRET; triton 3.9

_setup_privateuseone_for_python_backend("fakegpu")  # torch 2.13
DEVICE = torch.device("fakegpu:0")
COPIES = (torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default)


class DeviceError(Exception):
    """What a GPU would refuse, or let the host wait for."""


class FakeTensor(torch.Tensor):
    """A tensor of the fake device, over its data on the host."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> FakeTensor:
        made: FakeTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside the device's mode")


def held(value: Any) -> Any:
    """What a tensor of the device is on the host."""
    return value.held if isinstance(value, FakeTensor) else value


def on_host(value: Any) -> bool:
    """A tensor that a kernel could not read; a number in a tensor is as good as a number."""
    return isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and value.dim() > 0


def within(code: CodeType) -> bool:
    """Whether a function is being run by this thread."""
    frame = sys._getframe()
    while frame.f_back is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False


class FakeGPU(TorchDispatchMode):
    """The device, while it is `running`.

    `operators`: other libraries' custom operators, by name, as Python functions. `copying`: the function within
    which alone the host may copy to the device; `waiting`: the one within which it may wait for it.
    """

    def __init__(self, operators: dict[str, Callable[..., None]], copying: CodeType, waiting: CodeType) -> None:
        super().__init__()
        self.operators, self.copying, self.waiting = operators, copying, waiting
        self.launches: list[str] = []  # names of the kernels launched
        self._tape: list[Callable[[], object]] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = self.operators.get(func.name().removesuffix(".default"))
        if operator is not None:
            with self:
                return operator(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # comes whole in inference mode
                return func.decompose(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        ours = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        target = kwargs.get("device")
        made_here = target is not None and torch.device(target).type == DEVICE.type
        if not ours and not made_here:
            return func(*args, **kwargs)
        to_host = func in COPIES and (not isinstance(args[0], FakeTensor) if target is None else not made_here)
        self._check(func, to_host, any(on_host(leaf) for leaf in leaves))
        kwargs = {key: torch.device("cpu") if key == "device" else value for key, value in kwargs.items()}
        host_args, host_kwargs = tree_map(held, (args, kwargs))
        result = func(*host_args, **host_kwargs)
        if to_host:
            return args[0] if func._schema.is_mutable else result.clone()
        self._record(func, host_args, host_kwargs, result)
        known = {id(tensor.held): tensor for tensor in ours}

        def wrapped(leaf: Any) -> Any:
            return known.get(id(leaf), FakeTensor(leaf)) if isinstance(leaf, torch.Tensor) else leaf

        return tree_map(wrapped, result)

    def _check(self, func: Any, to_host: bool, mixed: bool) -> None:
        if to_host or func in READS:
            if not within(self.waiting):
                raise DeviceError(f"{func}: the host waits for the device")
        elif mixed:
            if func not in COPIES:
                raise DeviceError(f"{func} on tensors of two devices")
            if not within(self.copying):
                raise DeviceError(f"{func} from memory that is not pinned")
            if self._tape is not None:
                raise DeviceError(f"{func} in a graph, which would copy the same values for ever")

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if self._tape is None:
            return
        if func._schema.is_mutable:
            self._tape.append(lambda: func(*args, **kwargs))
        elif not any(value.alias_info for value in func._schema.returns):  # a view stays where it is
            self._tape.append(lambda: result.copy_(func(*args, **kwargs)))

    def _launch(self, executor: GridExecutor, run: Callable[..., None], args: Any, kwargs: Any) -> None:
        name = executor.fn.__name__
        if any(on_host(value) for value in tree_leaves((args, kwargs))):
            raise DeviceError(f"{name} was handed a tensor of the host")
        host_args, host_kwargs = tree_map(held, (args, kwargs))
        self.launches.append(name)
        run(executor, *host_args, **host_kwargs)
        if self._tape is not None:
            self._tape.append(lambda: run(executor, *host_args, **host_kwargs))

    @contextmanager
    def running(self) -> Iterator[None]:
        """The device in place, its kernels included."""
        run = GridExecutor.__call__

        def launch(executor: GridExecutor, *args: Any, **kwargs: Any) -> None:
            with _disable_current_modes():
                self._launch(executor, run, args, kwargs)

        GridExecutor.__call__ = launch  # type: ignore[method-assign]
        try:
            with self:
                yield
        finally:
            GridExecutor.__call__ = run  # type: ignore[method-assign]

    @contextmanager
    def capture(self) -> Iterator[Callable[[], None]]:
        """Record what runs within; what is yielded replays it."""
        tape: list[Callable[[], object]] = []

        def replay() -> None:
            with _disable_current_modes():
                for step in tape:
                    step()

        self._tape = tape
        try:
            yield replay
        finally:
            self._tape = None
