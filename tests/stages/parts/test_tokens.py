import itertools
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from warpline.data.packing import Sample, pack
from warpline.models.decoder import Decoder
from warpline.stages.parts.tokens import (
    completion_sample,
    completion_values,
    head_options,
    microbatches,
    num_targets,
    num_tokens,
    on_batch,
    place_values,
    sample_order,
    summed_cross_entropy,
    token_stats,
)


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


def test_a_capped_models_log_probabilities_are_of_its_capped_logits(tiny_decoder):
    decoder = Decoder(tiny_decoder.config.model_copy(update={"logit_softcap": 0.3})).double()
    decoder.load_state_dict({name: 5 * x for name, x in tiny_decoder.state_dict().items()})
    batch = pack([completion_sample([5, 6], [7, 8])])
    logits = F.linear(decoder(batch.tokens_T[None])[0], decoder.output_weight)
    expected = (0.3 * torch.tanh(logits / 0.3)).log_softmax(-1)[[1, 2], [7, 8]]
    torch.testing.assert_close(completion_values(batch, token_stats(decoder, batch).logprob_T), expected)
    loss = on_batch(decoder, batch, partial(summed_cross_entropy, **head_options(decoder)))
    torch.testing.assert_close(loss, -expected.sum())


def test_the_heads_products_are_those_of_autocast(tiny_decoder):
    assert head_options(tiny_decoder)["product_dtype"] is None
    with torch.autocast("cpu", torch.bfloat16):
        assert head_options(tiny_decoder)["product_dtype"] == torch.bfloat16


def test_token_stats_are_the_log_softmax_of_separate_forwards(tiny_decoder):
    decoder = tiny_decoder.double()
    samples = [completion_sample([5, 6, 7], [8, 9]), completion_sample([1], [2, 3, 4])]
    batch = pack(samples)
    got = completion_values(batch, token_stats(decoder, batch, temperature=0.5).logprob_T)
    expected = []
    for sample in samples:
        logits = F.linear(decoder(torch.tensor([sample.ids]))[0], decoder.output_weight) / 0.5
        for position in range(len(sample.ids) - 1):
            if sample.supervised[position + 1]:
                expected.append(logits[position].log_softmax(-1)[sample.ids[position + 1]].item())
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


def test_placed_values_come_back_and_are_zero_elsewhere():
    batch = pack([completion_sample([5, 6], [7, 8]), completion_sample([1], [2])])
    placed = place_values(batch, [0.1, 0.2, 0.3], torch.zeros(6, dtype=torch.float64))
    assert placed.tolist() == [0, 0.1, 0.2, 0, 0.3, 0]
    assert completion_values(batch, placed).tolist() == [0.1, 0.2, 0.3]
