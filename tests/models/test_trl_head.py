"""Every answer of the head that TRL's trainers ask for, against TRL's own head and formulas in fp64."""

import warnings

import pytest
import torch

from warpline.models.trl_head import ANSWERS, use_linear_logprob

with warnings.catch_warnings():
    # transformers' dependencies announce their own deprecations while they are imported.
    warnings.simplefilter("ignore")
    from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM
    from trl.trainer.utils import add_fused_lm_head

SIZES = {
    "vocab_size": 53, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
IDS_BS = torch.randint(3, 53, (3, 9), generator=torch.Generator().manual_seed(1))
LABELS_BS = IDS_BS.clone()
LABELS_BS[0, :4] = LABELS_BS[2, 6:] = -100


@pytest.fixture
def model():
    """Softcapped logits, so that their order of cap and temperature is seen."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM._from_config(Gemma2Config(**SIZES, final_logit_softcapping=3.0), attn_implementation="eager")


def gradients_of(model, answer):
    model.zero_grad()
    (answer.loss + 0.1 * answer.entropy.sum() + answer.log_probs.square().mean()).backward()
    return {name: x.grad.clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize("inputs", [{"labels": LABELS_BS}, {"shift_labels": LABELS_BS, "num_items_in_batch": 7}])
def test_every_answer_and_gradient_is_that_of_trls_own_head(model, inputs):
    add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", *ANSWERS))
    theirs = model(IDS_BS, fused_lm_head=True, **inputs)
    their_gradients = gradients_of(model, theirs)
    use_linear_logprob(model, temperature=0.7)
    ours = model(IDS_BS, fused_lm_head=True, **inputs)
    for name in ("loss", "log_probs", "entropy", "mean_logits", "log_sum_sq_probs", "is_top1", "label_mask"):
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    for name, gradient in gradients_of(model, ours).items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-4, atol=1e-6)
    assert ours.is_top1.any()


def test_log_probabilities_are_those_of_the_whole_logits_in_fp64(model):
    model.double()
    logits = model(IDS_BS).logits[:, :-1] / 0.7
    expected = logits.log_softmax(-1).gather(-1, IDS_BS[:, 1:, None])[..., 0]
    use_linear_logprob(model, temperature=0.7, answers=())
    answer = model(IDS_BS, labels=IDS_BS, fused_lm_head=True)
    torch.testing.assert_close(answer.log_probs, expected, rtol=1e-10, atol=1e-12)
    assert answer.entropy is None and answer.is_top1 is None


def test_undo_gives_back_what_was_there_and_other_calls_are_left_alone(model):
    logits, inherited = model(IDS_BS).logits, type(model).forward
    undo = use_linear_logprob(model)
    assert torch.equal(model(IDS_BS).logits, logits)
    assert model(IDS_BS, labels=IDS_BS).logits is not None
    for _ in range(2):
        undo()
        assert "forward" not in vars(model) and type(model).forward is inherited
    add_fused_lm_head(model)
    theirs = model.forward
    use_linear_logprob(model)()
    assert model.forward is theirs


def test_undo_takes_back_its_own_use_alone_in_any_order_and_once(model):
    def answered():
        answer = model(IDS_BS, labels=IDS_BS, fused_lm_head=True)
        return [name for name in ("log_probs", *ANSWERS) if answer.get(name) is not None]

    add_fused_lm_head(model)  # TRL's own answers log_probs alone
    first, second = use_linear_logprob(model, answers=("entropy",)), use_linear_logprob(model, answers=("is_top1",))
    first()
    assert answered() == ["log_probs", "is_top1"]
    second()
    assert answered() == ["log_probs"]
    third = use_linear_logprob(model, answers=("entropy",))
    for undo in (first, second):
        undo()
    assert answered() == ["log_probs", "entropy"]
    covered = model.forward
    model.forward = over = lambda *args, **kwargs: covered(*args, **kwargs)  # as accelerate's autocast does
    third()
    assert answered() == ["log_probs"] and model.forward is over


def test_a_batch_without_labels_gives_zeros_and_zero_gradients(model):
    use_linear_logprob(model)
    answer = model(IDS_BS, labels=torch.full_like(IDS_BS, -100), fused_lm_head=True)
    assert answer.loss == 0 and not answer.log_probs.any() and not answer.log_sum_sq_probs.any() and not answer.is_top1.any()
    answer.loss.backward()
    assert not any(x.grad.any() for x in model.parameters() if x.grad is not None)


def test_under_autocast_the_products_are_in_its_dtype(model):
    def log_probs():
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model(IDS_BS, labels=IDS_BS, fused_lm_head=True).log_probs

    use_linear_logprob(model, product_dtype=torch.float32)
    exact = log_probs()
    use_linear_logprob(model)
    rounded = log_probs()
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.05


def test_what_the_head_cannot_do_is_refused_in_one_line(model):
    with pytest.raises(ValueError, match=r"answers \['logits'\]; expected some of entropy"):
        use_linear_logprob(model, answers=("logits",))
    cohere = CohereForCausalLM(CohereConfig(**SIZES, eos_token_id=2, logit_scale=0.25))
    with pytest.raises(ValueError, match="config has logit_scale; expected logits without a scale"):
        use_linear_logprob(cohere)
    use_linear_logprob(model)
    with pytest.raises(ValueError, match="output_router_logits"):
        model(IDS_BS, labels=IDS_BS, fused_lm_head=True, output_router_logits=True)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(ValueError, match=r"an output head of Sequential; expected torch\.nn\.Linear"):
        model(IDS_BS, labels=IDS_BS, fused_lm_head=True)
