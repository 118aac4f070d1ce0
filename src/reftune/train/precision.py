"""Is bf16 autocast worth asking for on this machine? Not on a CPU without instructions for it."""

import torch


def slow_bf16(device: str) -> str | None:
    """What to say of bf16 autocast on a device type ("cpu", "cuda" ...); None where nothing speaks against it.

    How much slower a CPU is that has no instructions for it: `python benchmarks/bf16.py`.
    """
    if device != "cpu" or _has_bf16():
        return None
    capability = torch.backends.cpu.get_cpu_capability()
    return (
        f"bf16: this CPU ({capability}) has no instructions for it, which makes training many times slower than in "
        "fp32. Set bf16 to false here; the numbers learned are float32 either way."
    )


def _has_bf16() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # absent: a build that cannot tell
    return supported is None or bool(supported())
