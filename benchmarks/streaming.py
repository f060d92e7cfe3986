"""Experts held against experts streamed: memory and time of a pass forward and back through frozen experts.

    python benchmarks/streaming.py            under a minute; prints a table

Two layers of 16 gated experts of 512 x 1024, top-2, 384 tokens. "all held" has all in memory, "quarter held" a slice
of four per layer, "mapped" reads all from a memory-mapped safetensors file, "mapped, dropped" lets go of an expert's
pages (madvise) as soon as it has been used. Each way runs in a process of its own; the file is in the page cache.
"""

import ctypes
import os
import sys
import tempfile
import time
from pathlib import Path

WIDTH, HIDDEN, LAYERS, EXPERTS, TOKENS, STEPS = 512, 1024, 2, 16, 384, 2
WAYS = ("all held", "quarter held", "mapped", "mapped, dropped")
MADV_DONTNEED = 4


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _drop(tensor) -> None:
    page = os.sysconf("SC_PAGESIZE")
    start = -(-tensor.data_ptr() // page) * page
    size = tensor.data_ptr() + tensor.nbytes - start
    ctypes.CDLL("libc.so.6").madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_DONTNEED)


def _pass(get, experts: int, drop: bool, rng) -> None:
    """Forward through all layers, then back: gradients of the inputs alone."""
    import torch
    from torch.nn import functional as F

    x = torch.randn(TOKENS, WIDTH, generator=rng)
    slots = [
        torch.stack([torch.randperm(experts, generator=rng)[:2] for _ in range(TOKENS)]).flatten()
        for _ in range(LAYERS)
    ]
    inputs = []
    for layer in range(LAYERS):
        inputs.append(x)
        out = torch.zeros_like(x)
        for e in range(experts):
            tokens = (slots[layer] == e).nonzero().flatten() // 2
            up, down = get(layer, e)
            gate, value = (x[tokens] @ up.t()).chunk(2, -1)
            out.index_add_(0, tokens, (F.silu(gate) * value) @ down.t())
            if drop:
                _drop(up), _drop(down)
        x = x + out
    grad = torch.ones_like(x)
    for layer in reversed(range(LAYERS)):
        back = grad.clone()
        for e in range(experts):
            tokens = (slots[layer] == e).nonzero().flatten() // 2
            up, down = get(layer, e)
            gate, value = (inputs[layer][tokens] @ up.t()).chunk(2, -1)
            inner = grad[tokens] @ down
            both = torch.cat([inner * value * torch.sigmoid(gate), inner * F.silu(gate)], -1)
            back.index_add_(0, tokens, both @ up)
            if drop:
                _drop(up), _drop(down)
        grad = back


def _measure(way: str, file: Path) -> tuple[int, float]:
    """Peak of the resident set above what was there before, and CPU seconds of the fastest pass."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(1)
    rng, before = torch.Generator().manual_seed(0), _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    experts = EXPERTS // 4 if way == "quarter held" else EXPERTS
    with safe_open(file, "pt") as stored:
        keys = {(i, e): (f"{i}.{e}.up", f"{i}.{e}.down") for i in range(LAYERS) for e in range(experts)}
        mapped = {}
        for place, pair in keys.items():
            tensors = tuple(stored.get_tensor(key) for key in pair)
            if way.endswith("held"):
                mapped[place] = tuple(t.clone() for t in tensors)
                _drop(tensors[0]), _drop(tensors[1])
            else:
                mapped[place] = tensors
    seconds = []
    for _ in range(STEPS):
        start = time.process_time()
        _pass(lambda layer, e: mapped[layer, e], experts, way == "mapped, dropped", rng)
        seconds.append(time.process_time() - start)
    return _status("VmHWM") - before, min(seconds)


def main() -> None:
    """Print the table."""
    import torch
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "experts.safetensors"
        shapes = {"up": (2 * HIDDEN, WIDTH), "down": (WIDTH, HIDDEN)}
        names = [(i, e, part) for i in range(LAYERS) for e in range(EXPERTS) for part in shapes]
        save_file({f"{i}.{e}.{part}": torch.full(shapes[part], 0.01) for i, e, part in names}, file)
        print("| experts | peak MB | CPU s a pass |\n| --- | ---: | ---: |")
        for way in WAYS:
            child = os.fork()
            if not child:
                peak, seconds = _measure(way, file)
                print(f"| {way} | {peak / 1e6:.0f} | {seconds:.2f} |", flush=True)
                os._exit(0)
            if os.waitpid(child, 0)[1]:
                raise SystemExit(f"{way} failed")


if __name__ == "__main__":
    sys.exit(main())
