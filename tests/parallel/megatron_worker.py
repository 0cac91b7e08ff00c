"""Ranks of Megatron-core on a CPU, over gloo: engines of several layouts against our decoder on one process.

Run     python tests/parallel/megatron_worker.py NUM_RANKS CHECK...
Prints  one JSON object: what each check found, the worst of all ranks

The ranks are forked, so that torch and Megatron are imported once: seconds of the machine for each.
"""

import contextlib
import json
import sys
import tempfile
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

warnings.simplefilter("ignore")  # Megatron's own, on import: it misses Transformer Engine and apex
sys.path.insert(0, str(Path(__file__).parent))
import megatron_shims  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402

from warpline.kernels.attention import attention  # noqa: E402
from warpline.kernels.linear_logprob import linear_cross_entropy  # noqa: E402
from warpline.models.decoder import Decoder, DecoderConfig  # noqa: E402
from warpline.models.rope_scaling import LinearRopeScaling  # noqa: E402
from warpline.parallel import megatron, megatron_layer  # noqa: E402
from warpline.parallel.megatron import Adam, Layout, MegatronEngine  # noqa: E402

CPU = torch.device("cpu")
LLAMA = DecoderConfig(
    vocab_size=37, width=16, num_layers=4, num_heads=4, num_kv_heads=2, head_width=8, mlp_width=24, tie_embeddings=True,
    init_std=0.2,
)  # fmt: skip
CONFIGS = {
    "tied": LLAMA,
    "untied, biases, one key head": LLAMA.model_copy(
        update={"num_kv_heads": 1, "attention_bias": True, "mlp_bias": True, "tie_embeddings": False,
                "rope_scaling": LinearRopeScaling(factor=2.0)}
    ),
    "Gemma with sinks": LLAMA.model_copy(
        update={"windows": (7, 0), "attention_softcap": 3.0, "attention_sinks": True, "query_key_norm": True,
                "post_norms": True, "zero_centred_norms": True, "scale_embeddings": True, "activation": "gelu_tanh",
                "logit_softcap": 5.0, "query_scalar": 5, "local_rope_theta": 100.0}
    ),
}  # fmt: skip
LAYOUTS = {
    1: {"alone": Layout()},
    2: {
        "tensor": Layout(tensor=2),
        "sequence": Layout(tensor=2, sequence_parallel=True),
        "context": Layout(context=2),
        "pipeline": Layout(pipeline=2),
        "interleaved": Layout(pipeline=2, stages_per_rank=2),
        "data": Layout(),
    },
    4: {
        "sequence and context": Layout(tensor=2, context=2, sequence_parallel=True),
        "sequence and pipeline": Layout(tensor=2, pipeline=2, sequence_parallel=True),
        "context and pipeline": Layout(context=2, pipeline=2),
    },
}
# Lengths of documents; tokens of a row. Of one token, empty, past the last boundary, and rows of every length.
ROWS = [([20, 1, 16], 37), ([9, 0, 13], 24), ([41], 41), ([3, 5, 2, 7], 19)]


def build(config, dtype):
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(config).initialise(generator).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return decoder.to(dtype)


def batches_of(seed=1):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for lengths, num_tokens in ROWS:
        tokens_T, target_T = (torch.randint(0, 37, (num_tokens,), generator=generator) for _ in range(2))
        target_T[::5] = -100
        target_T[sum(lengths) :] = -100
        cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        found.append(SimpleNamespace(tokens_T=tokens_T, target_T=target_T, cu_seqlens=cu_seqlens))
    return found, sum(int((batch.target_T >= 0).sum()) for batch in found)


def expected_loss(decoder, batches, counted):
    softcap, total = decoder.config.logit_softcap, 0.0
    for batch in batches:

        def head(hidden_BSD, weight_VD, target_T=batch.target_T):
            return linear_cross_entropy(hidden_BSD[0], weight_VD, target_T, reduction="sum", softcap=softcap)

        loss = decoder(batch.tokens_T[None], cu_seqlens=batch.cu_seqlens, head=head) / counted
        if torch.is_grad_enabled():
            loss.backward()
        total += loss.detach()
    return total


@contextlib.contextmanager
def groups(layout, rank, num_ranks, file):
    """Megatron's, of one layout. A lone rank has no launcher: `start` makes its group."""
    if num_ranks > 1:
        dist.init_process_group("gloo", store=dist.FileStore(file, num_ranks), rank=rank, world_size=num_ranks)
    megatron.start(layout)
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def engine_of(config, layout, adam, dtype):
    """With the weights of `build`."""
    return MegatronEngine(config, build(config, dtype).state_dict(), layout, adam, device=CPU, dtype=dtype)


def share(engine, batches):
    return batches[engine.data_rank :: engine.num_data_ranks]


def error(actual, truth, least=0.0):
    return ((actual - truth).norm() / truth.norm().clamp(min=max(least, 1e-300))).item()


def gradients(config, layout):
    """Errors in fp64 of the loss, the held-out loss, the gradients by parameter, and the weights that come back."""
    batches, counted = batches_of()
    truth = build(config, torch.float64)
    loss = expected_loss(truth, batches, counted)
    norm = torch.stack([p.grad.norm() for p in truth.parameters()]).norm().item()
    engine = engine_of(config, layout, None, torch.float64)
    mine = share(engine, batches)
    received, again = engine.accumulate(mine, counted), engine.evaluate(mine, counted)
    back, found = engine.weights(), engine.gradients()
    names = [name for name, _ in truth.named_parameters()]
    assert sorted(back) == sorted(found) == sorted(names)
    return {
        "loss": max(error(received, loss), error(again, loss)),
        "gradients": max(error(found[name], p.grad, 1e-6 * norm) for name, p in truth.named_parameters()),
        "weights": max(error(back[name], p.detach()) for name, p in truth.named_parameters()),
    }


def adamw(decoder):
    groups = [
        {"params": [p for p in decoder.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in decoder.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


def steps(config, layout, dtype=torch.float32):
    """Largest errors over three clipped steps: of the losses, of the gradients' norms, of the weights' change."""
    decoder, adam = build(config, dtype), Adam(weight_decay=0.1, max_grad_norm=0.5)
    before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
    optimizer = adamw(decoder)
    errors = {"loss": 0.0, "norm": 0.0}
    engine = engine_of(config, layout, adam, dtype)
    for step, rate in enumerate((1e-2, 2e-2, 1e-2)):
        batches, counted = batches_of(step)
        loss = expected_loss(decoder, batches, counted)
        norm = torch.nn.utils.clip_grad_norm_(decoder.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        errors["loss"] = max(errors["loss"], error(engine.accumulate(share(engine, batches), counted), loss))
        errors["norm"] = max(errors["norm"], error(torch.tensor(engine.update(rate)), norm))
    back = engine.weights()
    moved = {name: p.detach() - before[name] for name, p in decoder.named_parameters()}
    errors["weights"] = max(error(back[name] - before[name], moved[name]) for name in moved)
    return errors


def bf16(config, layout):
    """Three steps; the share of each matrix's gradient entries, of one microbatch, that bf16 cannot hold; what a step with
    a gradient that is not finite leaves."""
    batches, counted = batches_of()
    decoder = build(config, torch.bfloat16).float()
    with torch.no_grad():
        truth = expected_loss(decoder, batches, counted)
    engine = engine_of(config, layout, Adam(), torch.bfloat16)
    losses = []
    for _ in range(3):
        losses.append(engine.accumulate(share(engine, batches), counted).item())
        engine.update(1e-2)
    engine.accumulate(batches[:1], counted)
    shares = {}
    for name, _, parameter in engine._named_parameters(engine.chunks[0].module):
        kept = parameter.main_grad
        assert kept.dtype == torch.float32
        shares[name] = (kept != kept.bfloat16().float()).double().mean().item()
    kept = engine.weights()
    engine.chunks[0].module.decoder.layers[0].mlp.linear_fc1.weight.main_grad.fill_(torch.inf)
    norm = engine.update(1e-2)
    unmoved = all(torch.equal(x, kept[name]) for name, x in engine.weights().items())
    first = error(torch.tensor(losses[0]), truth)
    return {"loss": first, "losses": losses, "shares": shares, "norm": str(norm), "unmoved": unmoved}


def kept(engine):
    """What a checkpoint would hold, whole, on every rank."""
    found = {}
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        mine = {f"{kind}.{name}": piece.tensor for name, piece in engine.pieces(kind).items() if piece.writes}
        rows = [None] * dist.get_world_size()
        dist.all_gather_object(rows, mine)
        assert sum(map(len, rows)) == len(set().union(*rows)), "a tensor is written twice"
        for row in rows:
            found |= row
    return found


def of_kind(tensors, kind):
    return {name.removeprefix(f"{kind}."): x for name, x in tensors.items() if name.startswith(f"{kind}.")}


def save(config, layout, file):
    """Two steps of an engine, and what it keeps then, into a file."""
    engine = engine_of(config, layout, Adam(weight_decay=0.1, max_grad_norm=0.5), torch.float32)
    before = max(x.abs().max().item() for name, x in kept(engine).items() if not name.startswith("param."))
    for step, rate in enumerate((1e-2, 2e-2)):
        engine.accumulate(share(engine, batches_of(step)[0]), batches_of(step)[1])
        engine.update(rate)
    tensors = kept(engine)
    if dist.get_rank() == 0:
        save_file({name: x.contiguous() for name, x in tensors.items()}, file)
    dist.barrier()
    return {"moments before a step": before}


def go_on(config, layout, file):
    """An engine of any layout from that file: whether it keeps the same bits, and the errors of a third step against three of
    our decoder's."""
    tensors = load_file(file)
    weights, moments = of_kind(tensors, "param"), {kind: of_kind(tensors, kind) for kind in ("exp_avg", "exp_avg_sq")}
    adam = Adam(weight_decay=0.1, max_grad_norm=0.5)
    engine = MegatronEngine(config, weights, layout, adam, device=CPU, dtype=torch.float32)
    engine.restore(weights, moments, 2)
    same = all(torch.equal(x, tensors[name]) for name, x in kept(engine).items())
    decoder = build(config, torch.float32)
    optimizer = adamw(decoder)
    for step, rate in enumerate((1e-2, 2e-2, 1e-2)):
        batches, counted = batches_of(step)
        before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
        loss = expected_loss(decoder, batches, counted)
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    found = error(engine.accumulate(share(engine, batches), counted), loss)
    engine.update(rate)
    back = engine.weights()
    moved = max(error(back[n] - weights[n], p.detach() - before[n]) for n, p in decoder.named_parameters())
    return {"same bits": same, "loss": found, "weights": moved}


def bf16_resumed(config, layout):
    """Whether an engine made from what another keeps in fp32 goes on with its bits."""
    engine = engine_of(config, layout, Adam(), torch.bfloat16)
    batches, counted = batches_of()
    for _ in range(2):
        engine.accumulate(share(engine, batches), counted)
        engine.update(1e-2)
    tensors = kept(engine)
    weights, moments = of_kind(tensors, "param"), {kind: of_kind(tensors, kind) for kind in ("exp_avg", "exp_avg_sq")}
    again = MegatronEngine(config, weights, layout, Adam(), device=CPU, dtype=torch.bfloat16)
    again.restore(weights, moments, 2)
    fine = max((x != x.bfloat16().float()).double().mean().item() for x in weights.values())
    pairs = []
    for one in (engine, again):
        losses = one.accumulate(share(one, batches), counted)
        one.update(1e-2)
        pairs.append({"loss": losses, **kept(one)})
    return {"same": all(torch.equal(pairs[0][name], x) for name, x in pairs[1].items()), "finer than bf16": fine}


class Collectives(TorchDispatchMode):
    """Counts what this rank sends and receives, by name."""

    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.namespace == "c10d":
            self.counted[function._opname.rstrip("_")] += 1
        return function(*arguments, **(options or {}))


def calls(config, layout):
    """How often a step of four rows calls each function of ours, on this rank; and the modules of its first stage."""
    counted, plain = Counter(), {}
    places = [(megatron_layer, name) for name in ("attention", "ring_attention", "rms_norm", "rope", "swiglu")]
    for module, name in [*places, (megatron, "linear_cross_entropy")]:
        plain[module, name] = getattr(module, name)

        def count(*arguments, name=name, function=plain[module, name], **options):
            counted[name] += 1
            return function(*arguments, **options)

        setattr(module, name, count)
    batches, number = batches_of()
    engine = engine_of(config, layout, None, torch.float64)
    with Collectives() as collectives:
        engine.accumulate(share(engine, batches), number)
    kinds = Counter(type(module).__name__ for module in engine.chunks[0].module.modules())
    for (module, name), function in plain.items():
        setattr(module, name, function)
    own = ("CoreAttention", "Norm", "Gate", "DotProductAttention", "WrappedTorchNorm")
    return {"calls": dict(counted), "modules": {name: kinds[name] for name in own}, "collectives": dict(collectives.counted)}


# Each takes one thing away that ranks owe each other, and must be noticed.
REMOVALS = {
    "keys and values of other ranks": (
        "context", megatron_layer, "ring_attention", lambda q, k, v, batch, **rule: attention(q, k, v, **_local(batch), **rule),
    ),
    "the sum of the norms' gradients": ("sequence", megatron_layer, "Norm", None),
    "the sum of d_hidden": (
        "tensor", megatron, "linear_cross_entropy",
        lambda *arguments, **options: linear_cross_entropy(*arguments, **{**options, "reduce_d_hidden": False}),
    ),
    "the gather before the loss": (
        "sequence", megatron, "gather_from_sequence_parallel_region", lambda hidden, group: hidden.repeat(group.size(), 1, 1),
    ),
    "positions": ("context", megatron_layer, "rope", lambda query, key, cos, sin: (query, key)),
}  # fmt: skip


def _local(batch):
    return {"cu_seqlens": torch.tensor([0, batch.layout.tokens(batch.rank)], dtype=torch.int32)}


class _LonelyNorm(megatron_layer.Norm):
    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.weight.sequence_parallel = False


def removed(name, layout):
    """The largest error of a gradient without it."""
    _, module, attribute, replacement = REMOVALS[name]
    plain = getattr(module, attribute)
    setattr(module, attribute, _LonelyNorm if attribute == "Norm" else replacement)
    found = gradients(LLAMA, layout)["gradients"]
    setattr(module, attribute, plain)
    return found


def dense():
    """`CoreAttention` over two context ranks, on Megatron's dense sequences: the largest error of its output and gradients."""
    generator, size = torch.Generator().manual_seed(3), 2
    query, key, value = (torch.randn(24, 2, n, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2))
    config = SimpleNamespace(
        attention_dropout=0.0, num_attention_heads=4, params_dtype=torch.float64, use_cpu_initialization=True
    )  # fmt: skip
    core = megatron_layer.CoreAttention(
        config, 1, AttnMaskType.causal, "self", softmax_scale=0.3, windows=(9,), has_sinks=True,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(["cp", "tp"]),
    )  # fmt: skip
    here = torch.cat([torch.arange(24).chunk(2 * size)[i] for i in (core.group.rank(), 2 * size - 1 - core.group.rank())])
    mine, whole = ([x[index].requires_grad_() for x in (query, key, value)] for index in (here, torch.arange(24)))
    out = core(*mine, None).unflatten(-1, (4, 8))
    rule = {"window": 9, "scale": 0.3, "sinks_N": core.sinks.detach()}
    truth = attention(*(x.transpose(0, 1) for x in whole), **rule).transpose(0, 1)
    d_truth = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    expected = [truth[here], *(x[here] for x in torch.autograd.grad(truth, whole, d_truth))]
    received = [out, *torch.autograd.grad(out, mine, d_truth[here])]
    return max(error(a, b) for a, b in zip(received, expected, strict=True))


def cases(check, num_ranks, folder):
    """(name, layout, what to call) of each case of a check."""
    here, few = LAYOUTS[num_ranks], ("sequence", "context", "pipeline")
    untied, gemma = "untied, biases, one key head", "Gemma with sinks"

    def over(function, names, kinds=tuple(here)):
        for name, kind in ((name, kind) for name in names for kind in kinds):
            yield f"{name}, {kind}", here[kind], lambda name=name, kind=kind: function(CONFIGS[name], here[kind])

    if check == "resume":
        file, names = f"{folder}/kept.safetensors", ("sequence", "interleaved", "data", "context")
        first = [("saved", here["sequence"], partial(save, CONFIGS[gemma], here["sequence"], file))]
        return first + [(name, here[name], partial(go_on, CONFIGS[gemma], here[name], file)) for name in names]
    if check == "removals":
        return [(name, here[kind], partial(removed, name, here[kind])) for name, (kind, *_) in REMOVALS.items()]
    return {
        "gradients": lambda: over(gradients, CONFIGS if num_ranks < 4 else [gemma]),
        "gradients of few": lambda: over(gradients, [gemma], few),
        "steps": lambda: over(steps, [untied]),
        "bf16": lambda: over(bf16, ["tied", untied]),
        "bf16 resumed": lambda: over(bf16_resumed, ["tied"]),
        "calls": lambda: over(calls, ["tied"]),
        "dense": lambda: [("dense", here["context"], dense)],
    }[check]()


def worst(found):
    """Numbers over ranks, by maximum; what is not a number is rank 0's."""
    if isinstance(found, dict):
        return {name: worst(value) for name, value in found.items()}
    if not isinstance(found, float):
        return found
    value = torch.tensor(found, dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def rank_of(rank, num_ranks, folder, checks) -> None:
    torch.set_num_threads(1)
    megatron_shims.install()
    planned = [(check, *case) for check in checks for case in cases(check, num_ranks, folder)]
    results = {check: {} for check in checks}
    for number, layout in enumerate(dict.fromkeys(layout for _, _, layout, _ in planned)):
        with groups(layout, rank, num_ranks, f"{folder}/{number}"):
            for check, name, needed, call in planned:
                if needed == layout:
                    results[check][name] = worst(call())
    if rank == 0:
        json.dump(results, sys.stdout)
        sys.stdout.flush()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        arguments = (int(sys.argv[1]), folder, sys.argv[2:])
        torch.multiprocessing.start_processes(rank_of, arguments, nprocs=int(sys.argv[1]), start_method="fork")
