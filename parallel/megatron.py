"""A decoder inside Megatron-core: its transformer block, schedules and distributed optimiser; our attention, norms and loss.

Axes: `tensor` (with `sequence_parallel`, tokens between the blocks), `context`, `pipeline`; what is left of the processes are
data ranks. Sharded by Megatron: matrices by heads, MLP width and vocabulary, layers over stages, moments and fp32 weights over
data and context ranks. By us: T over context ranks, zigzag (see `context`), and the loss over V (see `linear_logprob`).

| communication               | whose      | bytes a rank; s = T/context, n tensor ranks, b a number                     |
|-----------------------------|------------|-----------------------------------------------------------------------------|
| tensor, per layer           | Megatron's | 4·(n−1)/n·s·D·b forward, as much backward, half more with sequence_parallel |
| embedding                   | Megatron's | 2·(n−1)/n·s·D·b forward, with sequence_parallel half of it there and back   |
| context, per layer          | ours       | the ring's of `context`, with the heads of a tensor rank                    |
| loss, over tensor ranks     | ours       | 7·(n−1)·s·4 forward, 2·(n−1)/n·s·D·4 backward; with sequence_parallel       |
|                             |            | (n−1)/n·s·D·b more forward, and as much backward instead                    |
| gradients and weights, once | Megatron's | a reduce-scatter and an all-gather of a rank's parameters over data·context |

Losses divide by the count that the step is given: targets that count, of all microbatches and all data ranks. Megatron adds
gradients up and divides by nothing. In bf16 the output matrix's gradient is added to Megatron's fp32 buffer unrounded.

**Source** megatron-core 0.16.1, the last for Python 3.11. Only `TransformerLayer`, `TransformerBlock` and `LanguageModule` are
built upon, not the retiring `GPTModel`.
**Limits** Runs where Megatron does: on CUDA. Dense decoders; biases on all linears or none. A row is padded to a multiple of
what its ranks cut it into, with a pipeline to the step's longest. No dropout, fp16, recomputation or overlap of communication.
In bf16 the loss makes an fp32 copy of the output matrix a microbatch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, model_parallel_cuda_manual_seed
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..kernels.linear_logprob import linear_cross_entropy
from ..kernels.rope import rope_tables
from ..kernels.vocabulary_sweep import all_gather
from .checkpoint import Piece
from .context import ContextBatch
from .megatron_layer import Norm, PackedRow, layer_spec
from .megatron_optimizer import count_updates, kept
from .megatron_weights import Part, padded_vocabulary, parts, shard, unshard
from .model import Packed

IGNORED = -100


@dataclass(frozen=True)
class Layout:
    """Ranks of each axis; what is left of the processes are data ranks. `stages_per_rank` above 1 interleaves."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    stages_per_rank: int = 1
    sequence_parallel: bool = False

    def padded(self, num_tokens: int) -> int:
        """Tokens of a row that context ranks cut into chunks, and tensor ranks into shares, of one length."""
        multiple = (2 * self.context if self.context > 1 else 1) * (self.tensor if self.sequence_parallel else 1)
        return -(-num_tokens // multiple) * multiple


@dataclass(frozen=True)
class Adam:
    """AdamW as Megatron's distributed optimiser runs it; weights of one dim do not decay."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


def start(layout: Layout, seed: int = 0) -> None:
    """Divide the processes into Megatron's groups, joining those that torchrun started; a lone process needs no launcher."""
    if not dist.is_initialized():
        alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, **({} if dist.is_torchelastic_launched() else alone))
    size = layout.tensor * layout.context * layout.pipeline
    if dist.get_world_size() % size:
        received = f"tensor {layout.tensor}, context {layout.context} and pipeline {layout.pipeline}"
        raise ValueError(f"received {received} and {dist.get_world_size()} ranks; expected a multiple of {size}: start more")
    parallel_state.initialize_model_parallel(
        layout.tensor, layout.pipeline, layout.stages_per_rank if layout.stages_per_rank > 1 else None,
        context_parallel_size=layout.context, create_gloo_process_groups=False,
    )  # fmt: skip
    model_parallel_cuda_manual_seed(seed)


def transformer_config(shape: Any, layout: Layout, dtype: torch.dtype, device: torch.device) -> TransformerConfig:
    """Megatron's config of a decoder's shape (`DecoderConfig`)."""
    _check_shape(shape, layout, dtype)
    interleaves = layout.stages_per_rank > 1

    def leave(weight: Tensor) -> Tensor:
        return weight  # weights are loaded; Megatron marks the shards of a matrix only where it initialises it

    return TransformerConfig(
        num_layers=shape.num_layers, hidden_size=shape.width, num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads, kv_channels=shape.head_width, ffn_hidden_size=shape.mlp_width,
        normalization="RMSNorm", layernorm_epsilon=shape.norm_eps, layernorm_zero_centered_gamma=shape.zero_centred_norms,
        qk_layernorm=shape.query_key_norm, softmax_scale=(shape.query_scalar or shape.head_width) ** -0.5,
        gated_linear_unit=True, activation_func=F.silu if shape.activation == "silu" else F.gelu,
        use_te_activation_func=True,  # the hook that takes our gate; not Transformer Engine's
        add_bias_linear=shape.mlp_bias, hidden_dropout=0.0, attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor, sequence_parallel=layout.sequence_parallel,
        context_parallel_size=layout.context, pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.stages_per_rank if interleaves else None,
        # Batched, the two directions between two ranks that are each other's next and previous are mistaken for one another.
        overlap_p2p_comm=interleaves, batch_p2p_comm=not interleaves,
        pipeline_dtype=dtype, params_dtype=dtype, bf16=dtype == torch.bfloat16, use_cpu_initialization=device.type == "cpu",
        init_method=leave, output_layer_init_method=leave, embedding_init_method=leave,
        calculate_per_token_loss=True,  # gradients are summed over ranks, not averaged
        finalize_model_grads_func=lambda model, _, **groups: finalize_model_grads(model, None, **groups),
    )  # fmt: skip


def _check_shape(shape: Any, layout: Layout, dtype: torch.dtype) -> None:
    ranks = layout.tensor
    if shape.num_heads % ranks or shape.mlp_width % ranks or (shape.num_kv_heads % ranks and ranks % shape.num_kv_heads):
        received = f"{shape.num_heads} and {shape.num_kv_heads} heads, an MLP of {shape.mlp_width} over {ranks} tensor ranks"
        raise ValueError(f"received {received}; expected multiples (or divisors, of key heads): choose another tensor axis")
    if shape.attention_bias != shape.mlp_bias:
        received = f"attention_bias {shape.attention_bias} and mlp_bias {shape.mlp_bias}"
        raise ValueError(f"received {received}; Megatron has one switch for both: set them alike, or train without Megatron")
    num_stages = layout.pipeline * layout.stages_per_rank
    if shape.num_layers % num_stages or (layout.stages_per_rank > 1 and layout.pipeline == 1):
        received = f"{shape.num_layers} layers over {layout.pipeline} ranks of {layout.stages_per_rank} stages"
        raise ValueError(f"received {received}; expected equal stages, several a rank only with a pipeline: change them")
    if layout.sequence_parallel and ranks == 1:
        raise ValueError("received sequence_parallel over 1 tensor rank; expected at least 2: set sequence_parallel=false")
    if dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"received {dtype}; expected bf16, fp32 or fp64: choose bf16 to train")


class _ToFloat(torch.autograd.Function):
    """A 16-bit weight in fp32, whose gradient goes to Megatron's `main_grad` unrounded, by the protocol of its fused
    accumulation: autograd gets a gradient that is not read, or zeros where another of the weight's is added to it."""

    @staticmethod
    def forward(ctx, weight):
        ctx.weight = weight
        return weight.float()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_weight):
        weight = ctx.weight
        weight.main_grad.add_(d_weight)
        weight.grad_added_to_main_grad = True
        return torch.zeros_like(weight) if getattr(weight, "zero_out_wgrad", False) else torch.empty_like(weight)


class _Row(NamedTuple):
    """A microbatch on this rank: its own tokens, and how the row lies over context ranks."""

    tokens_T: Tensor
    target_T: Tensor
    shared: ContextBatch


class MegatronDecoder(LanguageModule):
    """Some consecutive layers of a decoder on Megatron's modules: `forward(row)` gives the hidden states [T, 1, D] of this
    rank's tokens, or on the last stage the sum of their losses."""

    def __init__(self, shape: Any, config: TransformerConfig, groups: Any, *, stage: int | None, linears: str):
        super().__init__(config, groups)
        self.shape, self.vp_stage, self.model_type = shape, stage, ModelType.encoder_or_decoder
        rank, size = groups.pp.rank(), groups.pp.size()
        self.pre_process = rank == 0 and not stage
        self.post_process = rank == size - 1 and stage in (None, (self.vp_size or 1) - 1)
        self.share_embeddings_and_output_weights = shape.tie_embeddings
        num_rows = padded_vocabulary(shape, groups.tp.size())
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config, num_rows, shape.max_positions, position_embedding_type="rope", tp_group=groups.tp
            )
        layers = [layer_spec(shape, config, linears)] * get_num_layers_to_build(config, stage, rank)
        self.decoder = TransformerBlock(
            config, TransformerBlockSubmodules(layer_specs=layers, layer_norm=Norm), pre_process=self.pre_process,
            post_process=self.post_process, pg_collection=groups, vp_stage=stage,
        )  # fmt: skip
        if self.post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size, num_rows, config=config, init_method=config.init_method, bias=False,
                skip_weight_param_allocation=self.pre_process and shape.tie_embeddings, tp_group=groups.tp,
            )  # fmt: skip
        if self.pre_process or self.post_process:
            self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: list[Tensor]) -> None:
        """The schedules' way of giving a stage its input."""
        self.decoder.set_input_tensor(input_tensor[0])

    def forward(self, row: _Row) -> Tensor:
        hidden = None
        if self.pre_process:
            hidden = self.embedding(row.tokens_T[None], None)
            if self.shape.scale_embeddings:
                hidden = hidden * torch.tensor(self.shape.width**0.5, dtype=hidden.dtype)
        longest = max((stop - start for start, stop in pairwise(row.shared.layout.bounds)), default=0)
        packed = PackedRow(
            qkv_format="thd", max_seqlen_q=longest, max_seqlen_kv=longest, shared=row.shared, rotary=self._rotary(row.shared)
        )
        hidden = self.decoder(hidden, attention_mask=None, packed_seq_params=packed)
        return self._loss(hidden, row.target_T) if self.post_process else hidden

    def _rotary(self, shared: ContextBatch) -> dict[bool, tuple[Tensor, Tensor]]:
        shape, position_T = self.shape, shared.position_T()
        dtype = torch.float64 if self.config.params_dtype == torch.float64 else torch.float32
        if shape.rope_scaling is None:
            tables = rope_tables(position_T, shape.head_width, shape.rope_theta, dtype=dtype)
        else:
            tables = shape.rope_scaling.tables(position_T, shape.head_width, shape.rope_theta, dtype)
        if shape.local_rope_theta is None:
            return {False: tables, True: tables}
        return {False: tables, True: rope_tables(position_T, shape.head_width, shape.local_rope_theta, dtype=dtype)}

    def _loss(self, hidden: Tensor, target_T: Tensor) -> Tensor:
        """Summed over this rank's tokens that count; every tensor rank has it."""
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.tp_group)
        is_tied_here = self.share_embeddings_and_output_weights and self.pre_process
        weight = (self.embedding.word_embeddings if is_tied_here else self.output_layer).weight
        rank, size, num_rows = self.tp_group.rank(), self.tp_group.size(), len(weight)
        sharded = {
            "group": self.tp_group, "vocab_start": rank * num_rows, "vocab_size": self.shape.vocab_size,
            "reduce_d_hidden": not self.config.sequence_parallel,
        }  # fmt: skip
        return linear_cross_entropy(
            hidden[:, 0], _ToFloat.apply(weight) if weight.dtype == torch.bfloat16 else weight, target_T, reduction="sum",
            softcap=self.shape.logit_softcap, ignore_index=IGNORED, **(sharded if size > 1 else {}),
        )  # fmt: skip


class MegatronEngine:
    """A decoder's training inside Megatron, on the groups that `start` made.

    `weights` are the decoder's, whole, by its own names. A step is `accumulate(batches, counted)`, then `update(rate)`. All
    ranks of one data rank (`data_rank` of `num_data_ranks`) are given the same batches. Without `adam` there is no optimiser,
    and gradients are whole on every data and context rank.
    """

    def __init__(
        self,
        shape: Any,
        weights: Mapping[str, Tensor],
        layout: Layout,
        adam: Adam | None,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
        linears: str = "megatron",
    ):
        if adam is not None and dtype == torch.float64:
            raise ValueError("received Adam with fp64; Megatron's optimiser has none: choose bf16 or fp32, or pass adam=None")
        self.shape, self.layout, self.adam, self.device = shape, layout, adam, device
        self.config = transformer_config(shape, layout, dtype, device)
        self.groups = ProcessGroupCollection.use_mpu_process_groups()
        self.data_rank, self.num_data_ranks = self.groups.dp.rank(), self.groups.dp.size()
        self.parts = parts(shape)
        is_narrow = dtype == torch.bfloat16
        buffers = DistributedDataParallelConfig(grad_reduce_in_fp32=is_narrow, use_distributed_optimizer=adam is not None)
        self.chunks = []
        for stage in range(layout.stages_per_rank):
            number = stage if layout.stages_per_rank > 1 else None
            model = MegatronDecoder(shape, self.config, self.groups, stage=number, linears=linears)
            self._load(model, weights)
            self.chunks.append(DistributedDataParallel(self.config, buffers, model, disable_bucketing=stage > 0))
        if adam is not None:
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam", lr=0.0, weight_decay=adam.weight_decay, adam_beta1=adam.beta1, adam_beta2=adam.beta2,
                    adam_eps=adam.eps, clip_grad=adam.max_grad_norm, use_distributed_optimizer=True, bf16=is_narrow,
                    params_dtype=dtype,
                ),
                self.chunks, use_gloo_process_groups=False,
            )  # fmt: skip

    # ---- A step ----

    def accumulate(self, batches: Sequence[Packed], counted: float) -> Tensor:
        """Leaves the gradient of the loss, and gives the loss: the negative log-likelihood, in nats, of all batches of all
        data ranks, divided by `counted`; the same number [] on every rank."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        if self.adam is not None:
            self.optimizer.zero_grad()
        return self._run(batches, counted, forward_only=False)

    def evaluate(self, batches: Sequence[Packed], counted: float) -> Tensor:
        """The loss as `accumulate` gives it, without gradients."""
        with torch.no_grad():
            return self._run(batches, counted, forward_only=True)

    def update(self, learning_rate: float) -> float:
        """One clipped AdamW step; gives the gradient's norm before. Where that is not finite, nothing is changed."""
        assert self.adam is not None, "an engine without Adam makes gradients alone"
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())  # the one sync of an update: whether to step is decided on the host
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"], group["weight_decay"] = learning_rate, self.adam.weight_decay * group["wd_mult"]
            self.optimizer.step()
        return norm

    def _run(self, batches: Sequence[Packed], counted: float, forward_only: bool) -> Tensor:
        if not batches:
            raise ValueError("received no batches; expected at least one a data rank: give one whose targets are all -100")
        if self.layout.stages_per_rank > 1 and len(batches) % self.layout.pipeline:
            received = f"{len(batches)} batches for {self.layout.pipeline} interleaved pipeline ranks"
            raise ValueError(f"received {received}; expected a multiple: add batches whose targets are all -100")
        rows = self._rows(batches)
        zero = torch.zeros((), dtype=torch.int, device=self.device)

        def forward_step(iterator: Iterator[_Row], model: Any) -> tuple[Tensor, Callable]:
            def divided(summed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
                loss = summed / counted
                return loss, zero, loss.detach()

            return model(next(iterator)), divided

        losses = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=[iter(rows) for _ in self.chunks], model=self.chunks,
            num_microbatches=len(rows), seq_length=len(rows[0].tokens_T) * self.layout.context, micro_batch_size=1,
            forward_only=forward_only,
        )  # fmt: skip
        dtype = torch.float64 if self.config.params_dtype == torch.float64 else torch.float32
        total = torch.stack(losses).sum() if losses else torch.zeros((), dtype=dtype, device=self.device)
        dist.all_reduce(total, group=self.groups.dp_cp)
        dist.all_reduce(total, group=self.groups.pp)  # the last stage has it, the others 0
        return total

    def _rows(self, batches: Sequence[Packed]) -> list[_Row]:
        group = self.groups.cp if self.layout.context > 1 else None
        lengths = [self.layout.padded(len(batch.tokens_T)) for batch in batches]
        if self.layout.pipeline > 1:
            lengths = [max(lengths)] * len(lengths)
        rows = []
        for batch, length in zip(batches, lengths, strict=True):
            shared = ContextBatch.of(batch.cu_seqlens.tolist(), length, group, self.device)
            missing = length - len(batch.tokens_T)
            tokens_T, target_T = F.pad(batch.tokens_T, (0, missing)), F.pad(batch.target_T, (0, missing), value=IGNORED)
            rows.append(_Row(shared.local(tokens_T).to(self.device), shared.local(target_T).to(self.device), shared))
        return rows

    # ---- Weights ----

    def weights(self) -> dict[str, Tensor]:
        """The decoder's state dict, whole, in host memory, on every rank."""
        return self._whole(lambda parameter: parameter.detach())

    def gradients(self) -> dict[str, Tensor]:
        """The gradients that `accumulate` left, as `weights`; for comparisons, in an engine without Adam."""
        if self.adam is not None:
            raise ValueError("received an engine with Adam, whose gradients are cut over ranks; expected none: pass adam=None")
        return self._whole(lambda parameter: parameter.main_grad)

    # ---- Checkpoints ----

    @torch.no_grad()
    def pieces(self, of: str = "param") -> dict[str, Piece]:
        """The decoder's parameters in fp32, as the optimiser keeps them, or a moment of theirs ("exp_avg", "exp_avg_sq"): a
        stage's are whole in the host memory of one of its ranks; the others have nothing to write."""
        writes = self.groups.tp.rank() == self.groups.dp_cp.rank() == 0
        found = {}
        for _, part, parameter in self._own_parameters():
            x = torch.zeros(parameter.numel(), dtype=torch.float32, device=self.device)
            if (mine := kept(self.optimizer, parameter)) is not None:
                x[mine.place] = mine.weights if of == "param" else mine.state.get(of, 0.0)
            dist.all_reduce(x, group=self.groups.dp_cp)
            shards = all_gather(x.view_as(parameter), self.groups.tp).unbind()
            for key, whole in unshard(part, shards, self.shape).items():
                host = whole.cpu() if writes else torch.zeros(()).expand(whole.shape)
                found[key] = Piece.of(host)._replace(writes=writes)
        return found

    @torch.no_grad()
    def restore(self, weights: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], num_updates: int) -> None:
        """The optimiser as it was after that many updates: whole fp32 `weights`, and `moments` by kind, by the decoder's names.
        The model itself was made with these weights."""
        rank, size = self.groups.tp.rank(), self.groups.tp.size()
        for chunk in self.chunks:
            for _, part, parameter in self._named_parameters(chunk.module):
                if (mine := kept(self.optimizer, parameter)) is not None:
                    mine.weights.copy_(shard(part, weights, self.shape, rank, size).flatten()[mine.place])
                    for kind, wholes in moments.items():
                        moment = shard(part, wholes, self.shape, rank, size).flatten()[mine.place]
                        mine.state[kind] = moment.to(mine.weights, copy=True)
        count_updates(self.optimizer, num_updates)

    # ---- Parameters ----

    def _own_parameters(self) -> Iterator[tuple[str, Part, Any]]:
        """This rank's, a tied one once over all stages."""
        for chunk in self.chunks:
            for name, part, parameter in self._named_parameters(chunk.module):
                if not (self.shape.tie_embeddings and name == "output_layer.weight"):
                    yield name, part, parameter

    def _named_parameters(self, model: MegatronDecoder) -> Iterator[tuple[str, Part, Any]]:
        """(name with layers counted from the model's first, its part, parameter)."""
        for name, parameter in model.named_parameters():
            pieces = name.split(".")
            if pieces[:2] == ["decoder", "layers"]:
                pieces[2] = str(model.decoder.layers[int(pieces[2])].layer_number - 1)
            name = ".".join(pieces)
            yield name, self.parts[name], parameter

    @torch.no_grad()
    def _load(self, model: MegatronDecoder, weights: Mapping[str, Tensor]) -> None:
        rank, size = self.groups.tp.rank(), self.groups.tp.size()
        for _, part, parameter in self._named_parameters(model):
            parameter.copy_(shard(part, weights, self.shape, rank, size))

    def _whole(self, value: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Stage after stage, tensor after tensor: over stages by broadcast, over tensor ranks by all-gather."""
        own = {name: value(parameter) for name, _, parameter in self._own_parameters()}
        inventories: list[Any] = [None] * self.groups.pp.size()
        dist.all_gather_object(inventories, {name: list(x.shape) for name, x in own.items()}, group=self.groups.pp)
        found: dict[str, Tensor] = {}
        for stage, inventory in enumerate(inventories):
            for name, sizes in inventory.items():
                is_here = stage == self.groups.pp.rank()
                x = own[name] if is_here else next(iter(own.values())).new_empty(sizes)
                dist.broadcast(x, group_src=stage, group=self.groups.pp)
                shards = all_gather(x, self.groups.tp).unbind()
                found |= {key: part.cpu() for key, part in unshard(self.parts[name], shards, self.shape).items()}
        return found
