import itertools

import pytest
import torch
from torch.nn import functional as F

from warpline.data.packing import Sample, pack
from warpline.models.decoder import Decoder
from warpline.parallel.mesh import start_mesh
from warpline.stages.parts.config import OptimizerConfig, ParallelConfig, TrainingConfig
from warpline.stages.parts.run import RunFolder
from warpline.stages.parts.session import Session
from warpline.stages.parts.tokens import (
    backward_cross_entropy,
    completion_sample,
    microbatches,
    num_targets,
    num_tokens,
    place_values,
    sample_order,
    summed_cross_entropy,
    token_stats,
)


def supervised(batch, values_T: torch.Tensor) -> torch.Tensor:
    return values_T[batch.target_T >= 0]


def samples_of(*lengths: int) -> list[Sample]:
    return [Sample(list(range(1, length + 1)), [False] + [True] * (length - 1), "test") for length in lengths]


def test_microbatches_never_split_a_group_and_keep_order():
    groups = [samples_of(3, 4), samples_of(5), samples_of(6, 6), samples_of(2)]
    batches = microbatches(groups, tokens_per_microbatch=12)
    assert [batch.cu_seqlens.diff().tolist() for batch in batches] == [[3, 4, 5], [6, 6], [2]]
    assert num_tokens(batches) == 26 and num_targets(batches) == 20
    assert microbatches([], 5) == []


def test_sample_order_visits_every_sample_once_per_epoch_and_can_start_anywhere():
    lengths = [3, 5, 2, 7, 4, 6, 1]
    order = list(itertools.islice(sample_order(lengths, 10, seed=1, first_step=0), 12))
    seen = [index for step in order for index in step]
    assert sorted(seen[:7]) == list(range(7)) and seen[:7] != seen[7:14]
    assert list(itertools.islice(sample_order(lengths, 10, seed=1, first_step=5), 7)) == order[5:]


def test_a_capped_models_log_probabilities_are_of_its_capped_logits(tiny_decoder, model_of):
    decoder = Decoder(tiny_decoder.config.model_copy(update={"logit_softcap": 0.3})).double()
    decoder.load_state_dict({name: 5 * x for name, x in tiny_decoder.state_dict().items()})
    batch = pack([completion_sample([5, 6], [7, 8])])
    logits = F.linear(decoder(batch.tokens_T[None])[0], decoder.output_weight)
    expected = (0.3 * torch.tanh(logits / 0.3)).log_softmax(-1)[[1, 2], [7, 8]]
    model = model_of(decoder, "fp64")
    (logprob_T,) = model.evaluate([batch], lambda *seen: token_stats(*seen).logprob_T)
    torch.testing.assert_close(supervised(batch, logprob_T), expected)
    (loss,) = model.evaluate([batch], summed_cross_entropy)
    torch.testing.assert_close(loss, -expected.sum())


def test_token_stats_are_the_log_softmax_of_separate_forwards(tiny_decoder, model_of):
    decoder = tiny_decoder.double()
    samples = [completion_sample([5, 6, 7], [8, 9]), completion_sample([1], [2, 3, 4])]
    batch = pack(samples)
    (logprob_T,) = model_of(decoder, "fp64").evaluate([batch], lambda *seen: token_stats(*seen, temperature=0.5).logprob_T)
    got = supervised(batch, logprob_T)
    assert not logprob_T[batch.target_T < 0].any()
    expected = []
    for sample in samples:
        logits = F.linear(decoder(torch.tensor([sample.ids]))[0], decoder.output_weight) / 0.5
        for position in range(len(sample.ids) - 1):
            if sample.supervised[position + 1]:
                expected.append(logits[position].log_softmax(-1)[sample.ids[position + 1]].item())
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


def test_placed_values_stand_at_the_supervised_tokens_and_are_zero_elsewhere():
    batch = pack([completion_sample([5, 6], [7, 8]), completion_sample([1], [2])])
    placed = place_values(batch, [0.1, 0.2, 0.3])
    assert placed.dtype == torch.float64 and placed.tolist() == [0, 0.1, 0.2, 0, 0.3, 0]
    assert supervised(batch, placed).tolist() == [0.1, 0.2, 0.3]
    with pytest.raises(RuntimeError, match="shape mismatch"):
        place_values(batch, [0.1, 0.2])


def test_the_gradient_of_the_mean_over_all_rows_is_left(tiny_decoder, start_of, tmp_path):
    """Two rows of different lengths: one mean over both, not a mean of means; a step without a supervised token has loss 0."""
    config = TrainingConfig(steps=1, optimizer=OptimizerConfig(learning_rate=1.0), precision="fp64")
    decoder = tiny_decoder.double()
    session = Session("test", config, RunFolder(tmp_path), start_mesh(), ParallelConfig(), lambda: start_of(decoder))
    samples = [completion_sample([5, 6, 7], [8, 9]), completion_sample([1], [2, 3, 4, 5, 6])]
    loss, read = backward_cross_entropy(session, [pack([sample]) for sample in samples])
    expected = (
        sum(
            F.cross_entropy(F.linear(decoder(row.tokens_T[None])[0], decoder.output_weight), row.target_T, reduction="sum")
            for row in map(pack, [[sample] for sample in samples])
        )
        / 7
    )
    expected.backward()
    assert read == 11 and loss == pytest.approx(expected.item(), rel=1e-12)
    for (name, parameter), whole in zip(session.model.named_parameters(), decoder.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, whole.grad, msg=name)
    unsupervised = Sample([5, 6, 7], [False] * 3, "test")
    assert backward_cross_entropy(session, [pack([unsupervised])]) == (0.0, 3)
    assert backward_cross_entropy(session, []) == (0.0, 0)
