"""Promised against measured memory: what `MemoryModel` says a client needs, and what a client process really took.

    python benchmarks/memory.py               measure every point (10 to 20 minutes), write results/memory.{json,md}
    python benchmarks/memory.py --promise     new promises beside the measured numbers in results/memory.json

Every point runs in a process of its own, forked off one that has imported the libraries: a warm-up step on a tiny
model, products with matrices of the model's shapes, for which oneDNN compiles kernels that it keeps ("libraries"), then
the resident set is noted, the model is built from parameters as a client builds it and trained with `training.fit` on
batches of the greatest length; measured is the peak of the resident set (VmHWM, reset after the warm-up) above that
note. A client with adapters reads its experts from a checkpoint, whose pages the kernel may take back at any time:
there it is the peak of anonymous memory (RssAnon), looked at every millisecond. Linux only.

MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ make glibc give freed tensors back at once; without them it keeps
them for later, up to its own dynamic threshold, and the peak says as much about glibc as about the model.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Point:
    """One measurement.

    Args:
        family: "switch" or the model type of a decoder. form: see `ModelSource`.
        width, hidden, layers, experts, vocabulary: of the model; layers per stack.
        share: of the experts kept in every block. trained: share of all the model's experts that a batch trains, chosen
            at random each time; None: all that are kept, without a choice.
        dropout: rate in Switch; decoders have none.
    """

    family: str
    form: str = "classification"
    mode: str = "full"
    width: int = 128
    hidden: int = 256
    layers: int = 4
    experts: int = 16
    vocabulary: int = 6000
    share: float = 1.0
    batch_size: int = 16
    max_length: int = 96
    target_length: int = 16
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False
    top_k: int = 2
    dtype: str = "float32"
    dropout: float = 0.1
    trained: float | None = None

    @property
    def name(self) -> str:
        """Family, form, D/F x layers, experts, batch and length."""
        shape = f"{self.width}/{self.hidden} x{self.layers} E{self.experts} B{self.batch_size} S{self.max_length}"
        return f"{self.family} {'t2t ' if self.form == 'text-to-text' else ''}{shape}"

    @property
    def how(self) -> str:
        """Mode, and what differs from AdamW in float32."""
        odd = [] if self.optimizer == "adamw" else [self.optimizer]
        odd += [] if self.dtype == "float32" else [self.dtype]
        odd += ["checkpointing"] if self.gradient_checkpointing else []
        odd += [] if self.trained is None else [f"{self.trained:.3g} trained"]
        odd += [] if self.dropout or self.family != "switch" else ["no dropout"]
        return " ".join([self.mode, *odd])


WARM_UP = {"width": 32, "hidden": 64, "layers": 2, "experts": 4, "batch_size": 2, "max_length": 8, "target_length": 4}

SWITCH = (
    Point("switch", width=96, hidden=192, layers=2),
    Point("switch", width=160, hidden=320),
    Point("switch", width=320, hidden=1280),
)
OLMOE = (
    Point("olmoe", width=128, hidden=64, batch_size=8),
    Point("olmoe", width=256, hidden=128),
    Point("olmoe", width=512, hidden=512),
)
POINTS = tuple(
    point
    for small, middle, large in (SWITCH, OLMOE)
    for point in (
        small,
        middle,
        large,
        replace(small, share=0.25, batch_size=32),
        replace(middle, share=0.25),
        replace(middle, share=0.25, batch_size=8, max_length=256),
        replace(large, share=0.25, batch_size=4),
        replace(middle, form="text-to-text"),
        replace(middle, form="text-to-text", vocabulary=16000, share=0.25, target_length=48),
        replace(middle, optimizer="sgd"),
        replace(middle, gradient_checkpointing=True),
        replace(middle, dtype="bfloat16", share=0.25),
        replace(middle, mode="peft"),
        replace(middle, mode="peft", share=0.25, batch_size=8, max_length=256),
        replace(large, mode="peft"),
        replace(middle, mode="forward"),
    )
)
GROUPED = dict(first_k_dense_replace=1, n_group=2, topk_group=1)
LATENT = dict(kv_lora_rank=64, q_lora_rank=96, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32)
DECODERS = {
    "olmoe": {},
    "mixtral": {},
    "qwen2_moe": dict(shared_expert_intermediate_size=256, mlp_only_layers=[0]),
    "qwen3_moe": dict(head_dim=64, mlp_only_layers=[0]),
    "granitemoe": {},
    "phimoe": dict(router_jitter_noise=0.01),
    "deepseek_v2": GROUPED | LATENT | dict(n_shared_experts=2, topk_method="group_limited_greedy"),
    "deepseek_v3": GROUPED | LATENT | dict(n_shared_experts=1),
    "gpt_oss": dict(head_dim=32, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "ernie4_5_moe": dict(moe_num_shared_experts=2, moe_layer_start_index=1),
    "glm4_moe": GROUPED | dict(n_shared_experts=1, head_dim=32),
}
"""What makes a small model of each family like its large ones."""
ALIKE = ("olmoe", "qwen2_moe", "deepseek_v2", "deepseek_v3")
"""Families in which every query head has its own key and value; in the others four share one."""
WHOLE = ("olmoe", "mixtral", "granitemoe", "phimoe", "gpt_oss")
"""Families without dense layers: `intermediate_size` is the experts' width."""
FAMILIES = tuple(
    point
    for name in list(DECODERS)[1:]
    for middle in (Point(name, width=256, hidden=128, layers=3, batch_size=8),)
    for point in (
        middle,
        replace(middle, share=0.25, batch_size=4, max_length=256),
        *([replace(middle, mode="lora")] if name in ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss") else []),
    )
)
"""The families whose costs were derived from shapes alone, none fitted."""
BUDGETS = tuple(
    replace(point, **budget)
    for point in (
        Point("switch", width=256, hidden=512, layers=3, batch_size=8),
        Point("olmoe", width=256, hidden=256, layers=3, batch_size=8),
    )
    for budget in (
        *({"share": share} for share in (1.0, 0.5, 0.25, 0.125)),
        *({"trained": share} for share in (1.0, 0.5, 0.25, 0.125)),
        {"share": 0.5, "trained": 0.125},
        *({"share": share, "mode": "lora"} for share in (1.0, 0.5, 0.25, 0.125)),
        *({"trained": share, "mode": "lora"} for share in (0.25, 0.125)),
    )
)
"""Budgets of experts: held (slices), trained in a batch of all held (a leaf per expert), both; and adapters."""
DEMO = Point("switch", width=160, hidden=288, vocabulary=10000, max_length=64, dropout=0.0)
HELD_OUT = (*(replace(DEMO, share=n / 16) for n in (1, 3, 9, 16)), replace(DEMO, mode="peft"))
"""The demo's model and devices: the memory model's coefficients were fitted without them."""
ALL = (*POINTS, *FAMILIES, *BUDGETS, *HELD_OUT)


def config(point: Point):
    """The transformers configuration of a point."""
    from transformers import AutoConfig, SwitchTransformersConfig

    if point.family == "switch":
        return SwitchTransformersConfig(
            vocab_size=point.vocabulary,
            d_model=point.width,
            d_ff=point.hidden,
            d_kv=32,
            num_heads=point.width // 32,
            num_layers=point.layers,
            num_decoder_layers=point.layers,
            num_sparse_encoder_layers=point.layers,
            num_sparse_decoder_layers=point.layers,
            num_experts=point.experts,
            expert_capacity=4096,
            dropout_rate=point.dropout,
            decoder_start_token_id=0,
        )
    settings = dict(
        vocab_size=point.vocabulary,
        hidden_size=point.width,
        intermediate_size=point.hidden,
        num_hidden_layers=point.layers,
        num_attention_heads=point.width // 32,
        num_key_value_heads=max(point.width // 32 // (1 if point.family in ALIKE else 4), 1),
        num_experts=point.experts,
        num_local_experts=point.experts,
        num_experts_per_tok=point.top_k,
        pad_token_id=0,
        eos_token_id=1,
    )
    if point.family not in WHOLE:
        settings |= dict(moe_intermediate_size=point.hidden, intermediate_size=3 * point.hidden)
    return AutoConfig.for_model(point.family, **settings | DECODERS[point.family])


def source(point: Point, folder: Path):
    """A model source of the point's configuration, written below `folder`; no weights."""
    from consilium.moe.build import ModelSource

    config(point).save_pretrained(folder)
    return ModelSource(str(folder), point.form, point.dtype)


def held(point: Point, counts: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The experts kept."""
    least = 2 if point.family in ("phimoe", "deepseek_v3", "glm4_moe") else 1
    return {block: tuple(range(max(least, round(n * point.share)))) for block, n in counts.items()}


def backward(point: Point, counts: Mapping[str, int]) -> int | None:
    """How many experts a batch trains, in all blocks together; `counts`: of the full model."""
    return None if point.trained is None else max(round(sum(counts.values()) * point.trained), len(counts))


def promise(point: Point):
    """What the memory model says."""
    from consilium.moe.budget import MemoryModel

    with tempfile.TemporaryDirectory() as folder:
        memory = MemoryModel.of(source(point, Path(folder)))
    return memory.footprint(
        {block: len(ids) for block, ids in held(point, memory.counts).items()},
        mode=point.mode,
        batch_size=point.batch_size,
        max_length=point.max_length,
        target_length=point.target_length,
        optimizer=point.optimizer,
        gradient_checkpointing=point.gradient_checkpointing,
        trained=backward(point, memory.counts),
    )


def measure(points: Sequence[Point], malloc: Mapping[str, str] = MALLOC) -> Iterator[tuple[int, int]]:
    """Of each point, measured in a process of its own, forked off one that has done the imports: the peak in bytes, and
    what the libraries keep besides."""
    environment = os.environ | dict(malloc) | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", __file__, json.dumps([asdict(point) for point in points])]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as work:
        for point in points:
            line = work.stdout.readline()
            if not line:
                raise RuntimeError(f"{point.name} {point.how} failed: {work.stderr.read()[-2000:]}")
            yield tuple(map(int, line.split()))


def _params(model_source, keep) -> dict:
    """Small random parameters, flat; norms and the like ones."""
    import torch

    from consilium.moe.addressing import table, tensors, unpack
    from consilium.moe.surgery import slice_experts

    model = slice_experts(model_source.skeleton("task", LABELS if model_source.form == "classification" else ()), keep)
    found = {path: t.detach() for path, t in tensors(model).items()}
    flat = unpack(table(model, keep), found)
    made = {}
    for key, t in flat.items():
        value = torch.empty(t.shape, dtype=t.dtype)
        made[key] = value.normal_(0, 0.05) if t.dim() > 1 or ".router." in key or "head." in key else value.fill_(1)
    return made


def _head(model_source) -> dict:
    """The head alone."""
    import torch

    width = model_source.config.hidden_size
    shapes = {"weight": (width,), "bias": ()}
    labels = LABELS if model_source.form == "classification" else ()
    return {f"head.task.{label}.{leaf}": torch.zeros(shape) for label in labels for leaf, shape in shapes.items()}


def _saved(point: Point, folder: Path) -> None:
    """The whole model as a checkpoint, written by a process that is gone when the client begins."""
    import transformers

    child = os.fork()
    if not child:
        model_source = source(point, folder)
        getattr(transformers, model_source.family.classes[model_source.form])(model_source.config).save_pretrained(
            folder
        )
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(1)


LABELS = ("a", "b", "c", "d")


def _data(point: Point):
    """Two batches' worth of random examples, half of them of the greatest length, the others one shorter."""
    import torch

    from consilium.data.encode import Encoded

    rows = 2 * point.batch_size
    ids = torch.randint(2, min(point.vocabulary, 2000), (rows, point.max_length)).tolist()
    ids = [row if i % 2 else row[:-1] for i, row in enumerate(ids)]
    if point.form == "classification":
        return Encoded(ids, [i % len(LABELS) for i in range(rows)], [""] * rows, "classification", 0)
    targets = torch.randint(2, min(point.vocabulary, 2000), (rows, point.target_length)).tolist()
    return Encoded(ids, targets, [""] * rows, "seq2seq" if point.family == "switch" else "causal", 0)


def _train(point: Point, folder: Path) -> None:
    import torch

    from consilium.core import ClientContext, ClientInfo, ClientState
    from consilium.fit import Fit
    from consilium.moe.lora import Lora, add_expert_lora, add_lora
    from consilium.moe.routing import Tap
    from consilium.training import fit

    model_source = source(point, folder)
    keep = held(point, model_source.counts)
    labels = LABELS if point.form == "classification" else ()
    # a client with adapters has the base on its own disk; any other is sent its parameters
    params = _params(model_source, keep) if point.mode != "lora" else model_source.load(keep) | _head(model_source)
    model = model_source.build(params, "task", labels, keep)
    del params
    setting = Fit(
        batch_size=point.batch_size,
        max_length=point.max_length,
        target_length=point.target_length,
        optimizer=point.optimizer,
        gradient_checkpointing=point.gradient_checkpointing,
        lr=1e-6,
    )
    context = ClientContext(ClientInfo("client", 1, "task"), None, torch.device("cpu"), 0, ClientState())
    data = _data(point)
    if point.mode == "forward":
        model.eval()
        with torch.inference_mode(), Tap(model, keep) as tap:
            for start in range(0, len(data), point.batch_size):
                batch = data.batch(range(start, start + point.batch_size), context.device)
                with tap.batch(batch, count=True):
                    model(batch)
        return
    if point.mode == "peft":
        add_expert_lora(model, 8)
    if point.mode == "lora":
        add_lora(model, Lora(8))
    fit(model, data, setting, context, choose=_choice(keep, backward(point, model_source.counts)))


def _choice(keep: Mapping[str, tuple[int, ...]], experts: int | None):
    """A choice of so many experts for every batch: one of each block, the others at random."""
    import torch

    rng = torch.Generator().manual_seed(0)
    places = [(block, place) for block, ids in keep.items() for place in range(len(ids))]

    def choose(tap) -> dict[str, list[int]]:
        order = [places[i] for i in torch.randperm(len(places), generator=rng).tolist()]
        first = {block: (block, place) for block, place in order}.values()
        chosen = {block: [place] for block, place in first}
        for block, place in [pair for pair in order if pair not in first][: experts - len(chosen)]:
            chosen[block].append(place)
        return chosen

    return None if experts is None else choose


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _work(points: Sequence[Point]) -> None:
    """Print the peak of every point, one after the other."""
    import torch

    for module in ("peft", "consilium.moe.lora", "consilium.training"):  # what all points need, once
        importlib.import_module(module)

    torch.set_num_threads(1)
    for point in points:
        child = os.fork()
        if not child:
            _peak(point)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(1)


def _peak(point: Point) -> None:
    import torch

    torch.manual_seed(0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            warm = replace(point, **WARM_UP)
            for each, name in ((warm, "warm"), (point, "model")) if point.mode == "lora" else ():
                _saved(each, Path(folder) / name)
            _train(warm, Path(folder) / "warm")
            kept = -_settled()
            _compile(source(point, Path(folder) / "model"))
            kept += _settled()
            if point.mode == "lora":
                peak = _anonymous(lambda: _train(point, Path(folder) / "model"))
            else:
                Path("/proc/self/clear_refs").write_text("5")
                before = _status("VmRSS")
                _train(point, Path(folder) / "model")
                peak = _status("VmHWM") - before
            print(peak, max(kept, 0), flush=True)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def _settled() -> int:
    """The resident set without what nobody uses."""
    import ctypes
    import gc

    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return _status("VmRSS")


def _compile(model_source) -> None:
    """Have oneDNN compile what it will for the products of training, in all the numbers of rows that they come in."""
    import torch

    from consilium.moe.addressing import tensors
    from consilium.products import SIZES, inner, rows

    model = model_source.skeleton("task", LABELS if model_source.form == "classification" else ())
    matrices = {
        p: t for p, t in tensors(model).items() if t.dim() > 1 and "embed" not in p and "shared.weight" not in p
    }
    for y, x in {tuple(t.shape[-2:]) for t in matrices.values()}:
        weight = torch.zeros(y, x)
        for n in (sum(SIZES), *SIZES):
            left, right = torch.zeros(n, y), torch.zeros(n, x)
            rows(right, weight.t(), torch.zeros(n, y))
            rows(left, weight, torch.zeros(n, x))
            inner(left, right)
            inner(right, left)


def _anonymous(work) -> int:
    """The greatest growth of anonymous memory, looked at every millisecond."""
    import threading

    before, most, done = _status("RssAnon"), 0, threading.Event()

    def look() -> None:
        nonlocal most
        while not done.wait(0.001):
            most = max(most, _status("RssAnon") - before)

    watch = threading.Thread(target=look)
    watch.start()
    work()
    done.set()
    watch.join()
    return most


RESULTS = Path(__file__).parent / "results"


def _measured(again: bool) -> dict[str, tuple[int, int]]:
    """Bytes of every point by its fields as JSON, kept in results/memory.json: its peak, what the libraries keep."""
    file = RESULTS / "memory.json"
    peaks = json.loads(file.read_text()) if file.exists() and not again else {}
    missing = [point for point in ALL if json.dumps(asdict(point)) not in peaks]
    for point, (peak, kept) in zip(missing, measure(missing), strict=True):
        peaks[json.dumps(asdict(point))] = peak, kept
        print(f"{point.name} {point.how}: {peak / 1e6:.1f} MB, libraries {kept / 1e6:.1f}", flush=True)
        file.write_text(json.dumps(peaks, indent=1) + "\n")
    return peaks


def main(again: bool) -> None:
    """Print the table and write it to results/memory.md."""
    from rich.console import Console
    from rich.table import Table

    titles = ("model", "kept", "how", "promised MB", "measured MB", "ratio", "libraries MB")
    peaks, rows = _measured(again), []
    for point in ALL:
        promised, (measured, own) = promise(point).total, peaks[json.dumps(asdict(point))]
        cells = (f"{promised / 1e6:.1f}", f"{measured / 1e6:.1f}", f"{promised / measured:.2f}", f"{own / 1e6:.1f}")
        name = f"demo: {point.name}" if point in HELD_OUT else point.name
        rows.append((name, f"{point.share:.0%}", point.how, *cells))
    table = Table(*titles, title="Peak memory of a client")
    for row in rows:
        table.add_row(*row)
    Console(width=120).print(table)
    lines = ["| " + " | ".join(row) + " |" for row in (titles, ["---"] * 3 + ["---:"] * 4, *rows)]
    settings = " ".join(f"{key}={value}" for key, value in MALLOC.items())
    head = f"""# Peak memory of a client: promised and measured

Measured by `python benchmarks/memory.py` (`--promise`: new promises beside the measured numbers in memory.json), each
point in a process of its own with `{settings}` and one thread.

kept: share of the experts in every layer. trained: share of the model's experts that a batch trains, chosen anew each
time (`fit(choose=...)`). lora: adapters of our own, rank 8; peft: PEFT's. ratio: promised to measured; above 1 the
promise is on the safe side. libraries: what they keep of the first step, oneDNN's kernels above all; it is no part of
the promise, as the libraries themselves, 250 MB, are not. bfloat16 on a CPU is not covered: there PyTorch works with
float32 copies, and the promise is far too low.

No float32 row is over its promise. Switch and OLMoE: four batches, none padded; the few coefficients of Switch were
fitted on these points. All later rows: two batches, half of the examples one token shorter; `moe/parts.py` counts what
autograd saves. Three terms were added when a row had come out below 1: the other layers' gradients beside the first
layer's backward pass (a choice), half a layer of gradients beside half a layer of what was saved (all trained), and one
input more per layer of the demo's model with PEFT. lora: the client reads the experts it holds from a checkpoint on its
disk, which is measured too, as anonymous memory: pages mapped from that file are the kernel's to take back.
With a choice, and with adapters, the promise assumes that all tokens of a batch want the same expert, which these
random routers do not: it is up to a fifth above what was measured.

Slices against a leaf per expert: a slice also saves the weights of whom it leaves out, a leaf per expert only their
gradients and moments, so a device holds a slice and chooses among it. With adapters a choice saves next to nothing:
the weights stay, and the adapters' gradients and moments are small. Streaming (`python benchmarks/streaming.py`, 201 MB
of frozen experts, peak and CPU seconds of a pass forward and back): all held 234 MB, 0.33 s; a quarter held 87 MB,
0.26 s; all mapped from a file 233 MB, 0.36 s; mapped, and each expert's pages dropped after use, 39 MB, 0.38 s. It
would hold less than any slice, but those pages lay in the page cache of a machine with memory to spare: where they do
not fit, every pass reads the file twice from the disk, and a client would first have to be sent all experts. It is not
built.

"""
    (RESULTS / "memory.md").write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] in ([], ["--promise"]):
        main(again=not sys.argv[1:])
    else:
        _work([Point(**point) for point in json.loads(sys.argv[1])])
