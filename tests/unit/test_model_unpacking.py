"""4-bit weights come back right on every CPU: each case runs in a process of its own, since a decoder may be replaced."""

import subprocess
import sys

import pytest

# argv: inputs of the layer, type, double quantization, dtype, whether the library is made to be wrong.
_CHECK = """
import sys
import bitsandbytes, torch
import numpy as np
from fastft.convert.four_bit import code_book
from fastft.model import quantization, unpacking

width, kind, double, dtype, broken = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "double", sys.argv[4], sys.argv[5]
dtype = getattr(torch, dtype)
torch.manual_seed(0)
layer = bitsandbytes.nn.Linear4bit(width, 24, bias=False, compress_statistics=double, quant_type=kind)
weight = torch.randn(24, width).to(dtype)
layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, compress_statistics=double, quant_type=kind)
model = torch.nn.Sequential(layer.to("cpu"))
state = layer.weight.quant_state
if broken == "broken":  # plays the fault on a CPU without it
    library = torch.library.Library("bitsandbytes", "IMPL")
    library.impl("dequantize_4bit", lambda a, m, b, q, shape, d: torch.zeros(shape, dtype=d), "CPU")
quantization.make_safe(model)
back = bitsandbytes.functional.dequantize_4bit(layer.weight.data, state)

# By the formula: code book times scale, rounded once.
scales = state.absmax
if double:
    scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
codes = layer.weight.data.flatten().numpy()
nibbles = np.stack([codes >> 4, codes & 15], axis=1).flatten()[: 24 * width]
wanted = code_book(kind)[nibbles] * np.repeat(scales.float().numpy(), 64)[: 24 * width]
assert torch.equal(back.flatten(), torch.from_numpy(wanted).to(dtype)), (back.flatten()[:4], wanted[:4])
assert layer.support_avx512bf16_for_cpu is False
x = torch.randn(3, width, dtype=dtype, requires_grad=True)
y = layer(x)
y.sum().backward()
assert torch.allclose(y.float(), x.detach().float() @ back.float().T, atol=0.2 if dtype != torch.float32 else 1e-4)
assert torch.allclose(x.grad.float(), back.float().sum(0).expand(3, -1), atol=0.2 if dtype != torch.float32 else 1e-4)
print("replaced" if unpacking._install.cache_info().currsize else "as it was")
"""


@pytest.mark.parametrize(
    ("width", "kind", "scales", "dtype", "broken"),
    [
        ("96", "nf4", "double", "float32", "broken"),
        ("96", "nf4", "plain", "bfloat16", "broken"),
        ("48", "fp4", "plain", "float32", "broken"),
        ("96", "nf4", "double", "float32", "as it is"),
        ("32", "nf4", "plain", "bfloat16", "as it is"),
        ("128", "nf4", "double", "float32", "as it is"),
    ],
)
def test_a_weight_comes_back_by_the_formula(width: str, kind: str, scales: str, dtype: str, broken: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CHECK, width, kind, scales, dtype, broken],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "unpacks rows of" in done.stderr or "as it was" in done.stdout
    if broken == "broken":
        assert f"unpacks rows of {width} numbers (0) wrongly on this CPU; fastft's own decoder" in done.stderr
        assert done.stdout.strip().endswith("replaced")
    if width == "128":  # no multiple is in doubt, so nothing is touched
        assert done.stdout.strip().endswith("as it was")
