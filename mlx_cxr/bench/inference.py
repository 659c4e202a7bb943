"""Milliseconds per image of the ResNet-18's forward pass: MLX as it comes and as we run it, against PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_cxr.bench.contenders import PRECISIONS, Contender, Row, Work, compare, largest_difference, stock_operations
from mlx_cxr.bench.torch_side import import_torch, synchronize, torch_dtype, torch_resnet18
from mlx_cxr.bench.work import forward_work
from mlx_cxr.core import device
from mlx_cxr.models.folded import FoldedResNet18, evaluated
from mlx_cxr.models.resnet import ResNet18

SECTION = "inference"
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1.5e-1}
"""Largest difference of logits from MLX's plain float32 network on stock operations, as a share of the largest logit
or of 1. On CUDA, float32 is rounded to TF32, which has float16's ten bits."""
STOCK, PLAIN, FOLDED, COMPILED = "MLX, stock", "MLX, plain", "MLX, folded", "MLX, folded, compiled"
IN_PARTS = ", in parts"
"""After the name of what works on parts of its batch at the same time, as this package does on the CPU backend."""
EAGER, CHANNELS_LAST, INDUCTOR = "PyTorch, eager", "PyTorch, eager, channels last", "PyTorch, torch.compile"


class TorchCompiler:
    """`torch.compile` for fixed shapes: after `limit` seconds spent on it no further shape is compiled."""

    def __init__(self, limit: float) -> None:
        self.limit, self.spent = limit, 0.0

    def first_run(self, call: Callable[[], Any]) -> Any:
        """Run what compiles when it is first called.

        Raises:
            RuntimeError: the time for compiling is used up.
        """
        if self.spent >= self.limit:
            raise RuntimeError(f"compiling has taken {self.spent:.0f} s, of {self.limit:.0f} allowed")
        began = perf_counter()
        try:
            return call()
        finally:
            self.spent += perf_counter() - began


def measure(
    model: ResNet18,
    size: int,
    batch_sizes: tuple[int, ...],
    torch_device: str | None,
    peaks: dict[tuple[str, str], float],
    bandwidth: float,
    budget: float,
    compile_seconds: float = 60.0,
    seed: int = 0,
) -> list[Row]:
    """Compare and time the forward pass.

    Args:
        model: in evaluation mode.
        size: side of the images in pixels.
        torch_device: None leaves PyTorch out.
        peaks: as `machine.matrix_product_peaks`.
        bandwidth: GB/s.
        budget: seconds for all of it, compiling aside.
        compile_seconds: for `torch.compile`; one that has begun is let finish.

    Returns:
        Rows by batch size.
    """
    counted, known, rows = forward_work(model, size), {}, []
    mlx_calls = dict(_mlx_networks(model))
    torch_calls = {} if torch_device is None else dict(_torch_networks(model, torch_device, compile_seconds > 0))
    compiler, kind = TorchCompiler(compile_seconds), device.device_kind()
    for images in sorted(batch_sizes):
        host = np.random.default_rng([seed, images]).normal(size=(images, size, size, model.config.in_channels))
        host = host.astype(np.float32)
        reference = np.array(_with_stock_operations(model, mx.array(host)))

        def bound(framework: str, precision: str, images: int = images) -> float | None:
            peak = peaks.get((framework, precision))
            return counted.bound(images, precision, peak, bandwidth) if peak else None

        contenders = [
            _mlx_contender(name, precision, network, host, reference, kind)
            for (name, precision), network in mlx_calls.items()
        ]
        contenders += [
            _torch_contender(name, precision, network, host, reference, str(torch_device), compiler)
            for (name, precision), network in torch_calls.items()
        ]
        work = Work(images * counted.flops, peaks, bound)
        rows += compare(SECTION, contenders, budget / len(batch_sizes), work, known, seed)
    return rows


def full_name(name: str, precision: str) -> str:
    """A contender's name with its precision, unless that is float32."""
    return name if precision == "float32" else f"{name}, {precision}"


def _mlx_networks(model: ResNet18) -> Iterator[tuple[tuple[str, str], Callable[[mx.array], mx.array]]]:
    on_cpu = device.device_kind() == "cpu"
    yield (STOCK, "float32"), partial(_with_stock_operations, model)
    yield (PLAIN, "float32"), model
    if on_cpu:
        yield (PLAIN + IN_PARTS, "float32"), evaluated(model)
    for precision in PRECISIONS:
        folded = FoldedResNet18.of(model, getattr(mx, precision))
        if precision != "float32" and not on_cpu:
            cast = ResNet18(model.config)
            cast.update(model.parameters())
            cast.set_dtype(folded.dtype)
            cast.eval()
            mx.eval(cast.parameters())
            yield (PLAIN, precision), cast
        if precision == "float32" or on_cpu:
            yield (FOLDED, precision), folded
        if precision == "float32" or not on_cpu:
            yield (COMPILED, precision), mx.compile(folded)
        if precision == "float32" and on_cpu:
            yield (FOLDED + IN_PARTS, precision), evaluated(folded)


def _with_stock_operations(model: ResNet18, x: mx.array) -> mx.array:
    with stock_operations():
        return model(x)


def _tolerance(precision: str) -> float:
    tf32 = precision == "float32" and device.device_kind() == "cuda"
    return TOLERANCE["float16" if tf32 else precision]


def _mlx_contender(
    name: str,
    precision: str,
    network: Callable[[mx.array], mx.array],
    host: np.ndarray,
    reference: np.ndarray,
    device: str,
) -> Contender:
    x = mx.array(host).astype(getattr(mx, precision))
    mx.eval(x)
    return Contender(
        name=full_name(name, precision),
        framework="mlx",
        device=device,
        precision=precision,
        call=lambda: mx.eval(network(x)),
        difference=lambda: largest_difference(np.array(network(x).astype(mx.float32)), reference),
        tolerance=_tolerance(precision),
        samples=len(host),
    )


def _torch_networks(model: ResNet18, device: str, inductor: bool) -> Iterator[tuple[tuple[str, str], Any]]:
    torch = import_torch()
    for precision in PRECISIONS:
        network = torch_resnet18(model).to(device, torch_dtype(precision))
        if precision == "float32":
            yield (EAGER, precision), network
        last = torch_resnet18(model).to(device, torch_dtype(precision), memory_format=torch.channels_last)
        yield (CHANNELS_LAST, precision), last
        if inductor and (precision == "float32" or device != "cpu"):
            yield (INDUCTOR, precision), torch.compile(last, dynamic=False)


def _torch_contender(
    name: str,
    precision: str,
    network: Any,
    host: np.ndarray,
    reference: np.ndarray,
    device: str,
    compiler: TorchCompiler,
) -> Contender:
    torch = import_torch()
    images = torch.from_numpy(np.ascontiguousarray(host.transpose(0, 3, 1, 2))).to(device, torch_dtype(precision))
    if name != EAGER:
        images = images.contiguous(memory_format=torch.channels_last)

    def call() -> Any:
        with torch.inference_mode():
            logits = network(images)
            synchronize(device)
        return logits

    def difference() -> float:
        logits = compiler.first_run(call) if name == INDUCTOR else call()
        return largest_difference(logits.float().cpu().numpy(), reference)

    return Contender(
        full_name(name, precision), "torch", device, precision, call, difference, _tolerance(precision), len(host)
    )
