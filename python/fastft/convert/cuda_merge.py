# ruff: noqa: ANN001, ANN202, PLR0917  the compiler of the kernel reads annotations its own way
"""The arithmetic of merges on a GPU, in the bits of the CPU: what `--device cuda` hands to the native stream.

The stream reads, writes and checks as ever; only the products and sums of low-rank merges run here. Bits are equal
because the order is: each element is summed over the rank in order with fused multiply-adds, multiplied by the scale,
added to what came before, then to the base, and rounded once (rust/kernels/src/merge/scalar.rs). A library's matrix
product sums in its own order, so the product is a kernel of its own, with the compiler's fusing switched off.

Imported for `--device cuda` only.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
import triton
import triton.language as tl

from fastft.errors import PlanError

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ROWS = 32
_COLUMNS = 128


@contextmanager
def _named() -> Iterator[None]:
    """Turn what the GPU complains about (no memory, above all) into one line with the way out."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise PlanError(
            f"--device cuda: the GPU failed: {reason}; --device cpu (the default) needs no GPU and gives the same bits"
        ) from error


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    left,
    right,
    sums,
    num_rows,
    num_columns,
    rank,
    row_stride,
    column_stride,
    scale,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Put scale * (left right) into `sums` (rows, columns), or add it; a tile for each program."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row_mask = rows < num_rows
    column_mask = columns < num_columns
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(rank):
        a = tl.load(left + rows * rank + k, row_mask, 0.0)
        b = tl.load(right + k * row_stride + columns * column_stride, column_mask, 0.0)
        total = tl.fma(a[:, None] + tl.zeros_like(total), b[None, :] + tl.zeros_like(total), total)
    places = sums + rows[:, None] * num_columns + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    scaled = total * scale
    if ADD:
        scaled = tl.load(places, mask, 0.0) + scaled
    tl.store(places, scaled, mask)


@dataclass
class CudaMerge:
    """See `_native.pyi`, `_Device`. Workers call it at the same time; the GPU does one call after the other."""

    place: str = "cuda"
    _rights: dict[str, list[tuple[Any, int, bool]]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def prepare(self, tensor: str, rights: list[tuple[bytes, int, bool]]) -> None:
        """Take the right factors of a tensor to the GPU."""
        with _named():
            self._rights[tensor] = [(self._floats(values), rank, transposed) for values, rank, transposed in rights]

    def merge(
        self,
        tensor: str,
        shape: tuple[int, int],
        dtypes: tuple[str, str],
        base: bytes,
        products: list[tuple[int, bytes, int, float]],
        round_delta: bool,
    ) -> tuple[bytes, bool]:
        """Merge rows of a weight; whether every finite base value stayed finite."""
        rows, columns = shape
        wanted = _DTYPES[dtypes[1]]
        with self._lock, torch.no_grad(), _named():
            sums = torch.zeros(rows, columns, device=self.place)
            for number, (index, left, rank, scale) in enumerate(products):
                right, _, transposed = self._rights[tensor][index]
                strides = (1, rank) if transposed else (columns, 1)
                grid = (triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))
                _product[grid](
                    self._floats(left),
                    right,
                    sums,
                    rows,
                    columns,
                    rank,
                    *strides,
                    scale,
                    ADD=number > 0,
                    ROWS=_ROWS,
                    COLUMNS=_COLUMNS,
                    enable_fp_fusion=False,
                )
            weight = torch.frombuffer(bytearray(base), dtype=_DTYPES[dtypes[0]]).to(self.place).reshape(rows, columns)
            kept = torch.ones((), dtype=torch.bool, device=self.place)
            if round_delta:
                sums = sums.to(wanted)
                kept = torch.isfinite(sums).all()
            finite = torch.isfinite(weight)
            merged = torch.where(finite, (weight.float() + sums.float()).to(wanted), weight.to(wanted))
            kept = kept & (torch.isfinite(merged) | ~finite).all()
            return merged.cpu().view(torch.uint8).numpy().tobytes(), bool(kept)

    def finish(self, tensor: str) -> None:
        """Give the memory of a tensor's factors back."""
        self._rights.pop(tensor, None)

    def _floats(self, values: bytes) -> Any:
        return torch.frombuffer(bytearray(values), dtype=torch.float32).to(self.place)
