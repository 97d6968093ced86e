"""What the machine multiplies fast."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer


def has_fast_bf16() -> bool:
    """Whether this machine multiplies bfloat16 matrices in hardware."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    abilities = torch.cpu.get_capabilities()
    return bool(abilities.get("amx_bf16") or abilities.get("avx512_bf16"))


def matmul_rate(device: torch.device, dtype: torch.dtype, clock: Callable[[], float] | None = None) -> float:
    """Floating-point operations a second of a large matrix product, as measured here and now: best of five."""
    side = 8192 if device.type == "cuda" else 1024
    factors = {name: torch.randn(side, side, device=device, dtype=dtype) for name in "ab"}
    options: dict[str, Any] = {} if clock is None else {"timer": clock}
    timer = Timer("a @ b", globals=factors, num_threads=torch.get_num_threads(), **options)
    return 2 * side**3 / min(timer.timeit(1).mean for _ in range(5))
