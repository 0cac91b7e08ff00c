"""One rank of each technique: what it sends, by line of the tables in the headers of `parallel/`, and the sizes that they name.

Run     torchrun --nproc-per-node N tests/parallel/bytes_worker.py      (N is 2 or 4)
Prints  on rank 0, one JSON object: measured, {line: {layout: [bytes, {symbol: size}]}}; and counts, for each layout the
        collectives by kind, as the wire saw them and as the dispatcher did, over all ranks
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug._comm_mode import c10d_collective_ops
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from model_worker import Row
from removals import REMOVALS
from wire import Wire

from warpline.kernels.linear_logprob import linear_cross_entropy
from warpline.models.decoder import Decoder, DecoderConfig
from warpline.parallel.gather import WholeDecoder
from warpline.parallel.mesh import Mesh, Sizes
from warpline.parallel.model import Loss, ParallelModel, Techniques

# Every size is a multiple of 4, so that nothing is padded.
CONFIG = DecoderConfig(
    vocab_size=40, width=16, num_layers=4, num_heads=4, num_kv_heads=2, head_width=8, mlp_width=24, tie_embeddings=True
)
NUM_TOKENS, NUM_ROWS, NUM_COUNTED, NUM_SEQUENCES = 32, 4, 24, 3


def layouts(size: int) -> dict[str, tuple[Sizes, Techniques]]:
    found = {
        "tensor": (Sizes(tensor=size), Techniques()),
        "ring": (Sizes(context=size), Techniques()),
        "Ulysses": (Sizes(context=size), Techniques(context="ulysses")),
        "data": (Sizes(replicate=size), Techniques()),
        "FSDP": (Sizes(shard=size), Techniques()),
        "FSDP, gathered in bf16": (Sizes(shard=size), Techniques(gather_dtype=torch.bfloat16)),
        "FSDP, recomputed": (Sizes(shard=size), Techniques(recompute="full")),
    }
    if size == 2:
        for name in ("gpipe", "interleaved", "zero_bubble", "zbv"):
            found[name] = Sizes(pipeline=2), Techniques(schedule=name, stages_per_rank=1 if name == "gpipe" else 2)
    else:
        found["HSDP"] = Sizes(replicate=2, shard=2), Techniques()
        found["pipeline and tensor"] = Sizes(pipeline=2, tensor=2), Techniques()
        found["FSDP and tensor"] = Sizes(shard=2, tensor=2), Techniques()
    # The last: of four ranks two alone make the group of the tied embedding, and torch names every later group by how many its
    # rank has.
    found["1f1b"] = Sizes(pipeline=size), Techniques()
    return found


class Dispatched(TorchDispatchMode):
    """Counts what CommDebugMode counts; that itself follows modules, and fails on one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._overloadpacket in c10d_collective_ops:
            self.counts[str(function).split(".")[1]] += 1
        return function(*args, **(kwargs or {}))


DISPATCHED = {
    "allreduce_": "all_reduce", "_allgather_base_": "all_gather", "allgather_": "all_gather", "broadcast_": "broadcast",
    "_reduce_scatter_base_": "reduce_scatter", "alltoall_base_": "all_to_all",
}  # fmt: skip


def rows() -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(NUM_ROWS):
        tokens, target = (torch.randint(0, 40, (NUM_TOKENS,), generator=generator) for _ in range(2))
        target[NUM_COUNTED:] = -100
        found.append(Row(tokens, target, torch.tensor([0, 10, 20, NUM_TOKENS], dtype=torch.int32)))
    return found


def head(view, hidden, weight):
    summed = linear_cross_entropy(hidden.float(), weight.float(), view.target_T, reduction="sum", **view.options)
    sequences = view.sequence_sum((view.target_T >= 0).float()).sum()
    return Loss(summed / 100, torch.stack([summed.detach(), sequences]))


def sent(sizes: Sizes, techniques: Techniques, config: DecoderConfig = CONFIG):
    """(calls of this rank's step and of two passes through the whole decoder, counts by kind of both witnesses, the model)"""
    mesh = Mesh(dist.get_rank(), sizes, torch.device("cpu"))
    with torch.device("meta"):
        decoder, template = Decoder(config), Decoder(config)
    model = ParallelModel(decoder, mesh, techniques)
    with torch.no_grad():
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter.to_local() if hasattr(parameter, "to_local") else parameter, std=0.1)
    wire = Wire()
    with Dispatched() as dispatched:
        model.accumulate(mesh.share(rows()), head, 2)
        model.reduce_gradients()
        with WholeDecoder(model, template) as whole, torch.no_grad():
            whole(torch.arange(8)[None])
            whole(torch.arange(4)[None])
    wire.cut()
    seen = Counter(call.kind for call in wire.calls if call.kind not in ("send", "receive"))
    other: Counter[str] = Counter()
    for name, count in dispatched.counts.items():
        other[DISPATCHED[name]] += count
    return wire.calls, (seen, other), model


def numbers_of(shapes, names=None) -> int:
    return sum(torch.Size(shape).numel() for name, shape in shapes.items() if names is None or name in names)


class Measured:
    """What one layout sent, by line."""

    def __init__(self, name: str, sizes: Sizes, techniques: Techniques):
        self.name, self.sizes, self.techniques = name, sizes, techniques
        self.calls, self.counts, self.model = sent(sizes, techniques)
        self.found: dict[str, tuple[float, dict[str, float]]] = {}

    def bytes_of(self, *removals: str, calls=None) -> float:
        entries = [REMOVALS[removal] for removal in removals]
        chosen = self.calls if calls is None else calls
        return sum(call.sent for call in chosen if any(entry.is_of(call.kind, call.chain) for entry in entries))

    def add(self, line: str, sent: float, **symbols: float) -> None:
        self.found[line] = sent, symbols

    def tensor(self) -> None:
        n = self.sizes.tensor
        sizes = {"n": n, "s": NUM_TOKENS / n, "D": CONFIG.width, "b": 4}
        layers = CONFIG.num_layers * NUM_ROWS
        inward, outward = "tokens are not gathered before a block", "a block's parts are not summed"
        self.add("tensor: forward: 2 all-gathers", self.bytes_of(inward) / layers, **sizes)
        self.add("tensor: forward: 2 reduce-scatters", self.bytes_of(outward) / layers, **sizes)
        # Backward, blocks and what stands around them are told apart by a decoder of half the layers.
        back = "gradients are not gathered behind a block", "gradients are not summed before a block"
        half = CONFIG.model_copy(update={"num_layers": CONFIG.num_layers // 2})
        fewer = self.bytes_of(*back, calls=sent(self.sizes, self.techniques, half)[0])
        per_layer = (self.bytes_of(*back) - fewer) / (layers / 2)
        self.add("tensor: backward: their conjugates", per_layer, **sizes)
        around = self.bytes_of("embeddings are not summed", "tokens are not gathered before the output matrix")
        around += self.bytes_of(*back) - per_layer * layers
        self.add("tensor: once a row", around / NUM_ROWS, **sizes)
        statistics = self.bytes_of("statistics are not gathered") / NUM_ROWS
        self.add("tensor: the losses' own", statistics, n=n, X=NUM_COUNTED)
        self.replicated()

    def replicated(self) -> None:
        symbols = {"n": self.sizes.tensor, "R": numbers_of(self.model.whole_shapes, self.uncut()), "b": 4}
        for line in ("tensor: once an update", "model: tensor"):
            self.add(line, self.bytes_of("replicated gradients are not summed"), **symbols)

    def uncut(self) -> set[str]:
        return {name for name in self.model.whole_shapes if self.model.tensor_shards and not self.model.is_cut(name)}

    def context(self) -> None:
        n, kind = self.sizes.context, self.name
        key_heads = max(CONFIG.num_kv_heads, n)  # 2 over 2 or 4
        symbols = {"n": n, "t": NUM_TOKENS / n, "K": CONFIG.num_kv_heads, "K_": key_heads, "N": CONFIG.num_heads}
        symbols |= {"H": CONFIG.head_width, "H_": CONFIG.head_width}
        layers = CONFIG.num_layers * NUM_ROWS
        forward = {"ring": ["keys do not travel"]}.get(
            kind, ["tokens are not exchanged for heads", "heads are not exchanged for tokens"]
        )
        backward = {"ring": ["keys do not travel backwards", "gradients of keys do not travel"]}.get(
            kind, ["gradients of tokens are not exchanged", "gradients of heads are not exchanged"]
        )
        self.add("context: forward", self.bytes_of(*forward) / layers, b=4, **symbols)
        self.add("context: backward", self.bytes_of(*backward) / layers, b=4, **symbols)
        self.add(
            "context: sums over sequences", self.bytes_of("a sequence's tokens are not summed") / NUM_ROWS, n=n, B=NUM_SEQUENCES
        )

    def data(self) -> None:
        sent = self.bytes_of("data ranks' gradients are not summed")
        self.add("model: shard = 1", sent, n=self.sizes.replicate, P=numbers_of(self.model.whole_shapes), b=4)

    def shard(self) -> None:
        shapes = self.model.whole_shapes
        width = 2 if self.techniques.gather_dtype is torch.bfloat16 else 4
        layers = {name for name in shapes if name.startswith("layers.")}
        symbols = {"n": self.sizes.shard, "r": self.sizes.replicate, "P": numbers_of(shapes), "L": numbers_of(shapes, layers)}
        passes = NUM_ROWS // (self.sizes.shard * self.sizes.replicate)  # each rank's rows
        lines = {
            "shard: forward": "parameters are not gathered", "shard: backward: all-gather": "parameters are not gathered again",
            "shard: backward: reduce-scatter": "gradients are not scattered",
            "shard: HSDP": "replicas' gradients are not summed",
        }  # fmt: skip
        for line, removal in lines.items():
            if self.sizes.replicate > 1 or "HSDP" not in line:
                self.add(line, self.bytes_of(removal) / passes, b=width, **symbols)

    def pipeline(self) -> None:
        """Over all ranks, a border between stages of two ranks."""
        num_stages = len(self.model.stages) * self.sizes.pipeline
        borders = num_stages - 1 - (self.techniques.schedule == "zbv")  # the bottom of the V is on one rank
        for line, removal in (
            ("forward", "hidden states do not travel"), ("backward", "hidden gradients do not travel"),
        ):  # fmt: skip
            total = torch.tensor(self.bytes_of(removal), dtype=torch.float64)
            dist.all_reduce(total)
            self.add(f"pipeline: {line}", total.item() / borders, M=NUM_ROWS, T=NUM_TOKENS, D=CONFIG.width, b=4)
        if self.techniques.schedule != "zbv":
            tied = self.bytes_of("a tied embedding's gradients are not summed")
            for line in ("pipeline: tied", "model: pipeline, tied"):
                self.add(line, tied, V=CONFIG.vocab_size, D=CONFIG.width, b=4)

    def gather(self) -> None:
        shapes, passes = self.model.whole_shapes, 2
        size, parts = self.sizes.product, self.sizes.tensor * self.model.num_shards
        someone = sum(call.sent for call in self.calls if call.has("WholeDecoder._someone_goes_on"))
        self.add("gather: who is still", someone / (passes + 1), n=size)  # once more to leave
        layer = {name for name in shapes if name.startswith("layers.")}
        in_layer = [call for call in self.calls if call.has("WholeDecoder._layer")]
        times = passes * CONFIG.num_layers / self.sizes.pipeline  # a rank has this many layers
        each = numbers_of(shapes, layer) / CONFIG.num_layers
        width = 2 if self.techniques.gather_dtype is torch.bfloat16 else 4
        if parts > 1:
            own = numbers_of(shapes, layer & self.uncut()) / CONFIG.num_layers if self.sizes.tensor > 1 else 0.0
            sent = self.bytes_of("a layer's parts are not gathered", calls=in_layer)
            # Of numbers that are whole on every rank of `tensor`, those that are not sharded either.
            self.add("gather: a layer", sent / times, n=parts, P=each, R=own, m=self.sizes.tensor, b=width)
        if self.sizes.pipeline > 1:
            sent = self.bytes_of("a layer is not sent to the other stages", calls=in_layer)
            self.add("gather: the same, to the other", sent / passes / CONFIG.num_layers, P=each, b=width)
            owners = sum(call.sent for call in self.calls if call.has("WholeDecoder._owners"))
            self.add("gather: once: who has", owners, n=self.sizes.pipeline, W=len(shapes))

    def lines(self) -> dict[str, tuple[float, dict[str, float]]]:
        if self.sizes.tensor == self.sizes.product:
            self.tensor()
        if self.sizes.context > 1:
            self.context()
        if self.sizes.pipeline > 1 and self.sizes.tensor == 1:
            self.pipeline()
        if self.sizes.shard > 1 and self.sizes.tensor == 1:
            self.shard()
        elif self.sizes.replicate > 1:
            self.data()
        self.gather()
        return self.found


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    measured: dict[str, dict[str, tuple[float, dict[str, float]]]] = {}
    counts = {}
    for name, (sizes, techniques) in layouts(dist.get_world_size()).items():
        if len(sys.argv) > 1 and name not in sys.argv[1:]:
            continue
        layout = Measured(name, sizes, techniques)
        for line, found in layout.lines().items():
            measured.setdefault(line, {})[name] = found
        everywhere: list = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, layout.counts)
        counts[name] = [sum((pair[side] for pair in everywhere), Counter()) for side in (0, 1)]
    if dist.get_rank() == 0:
        json.dump({"measured": measured, "counts": counts}, sys.stdout)
        sys.stdout.flush()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
