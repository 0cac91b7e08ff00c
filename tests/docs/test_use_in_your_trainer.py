"""docs/use-in-your-trainer.md says what docs/examples hold, and each example trains as the untouched trainer does."""

import functools
import importlib.metadata
import inspect
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    # The imports of transformers' and TRL's dependencies announce their own deprecations.
    warnings.simplefilter("ignore")
    import transformers
    import trl.trainer.utils
    from datasets import Dataset
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearJSDLoss
    from transformers.utils import logging

    from warpline.bench.use_in_your_trainer import (
        EXAMPLES,
        TRAINERS,
        Sizes,
        example,
        half_even,
        model_config,
        options,
        train,
        words_tokenizer,
    )
from warpline.kernels.linear_divergence import linear_divergence

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "use-in-your-trainer.md").read_text()
SIZES = Sizes(vocab=64, width=32, layers=2, rows=4, tokens=24, steps=10)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def refuse(*_, **__):
    raise AssertionError("the logits were made, or TRL's own head was called")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_the_document_shows_every_example_as_it_is(path):
    assert f"```python\n{path.read_text()}```" in DOCUMENT


def test_every_link_of_the_document_leads_somewhere():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", DOCUMENT)
    assert links and not [link for link in links if not (ROOT / "docs" / link).exists()]


def test_every_function_that_the_document_names_exists():
    names = set(re.findall(r"warpline\.((?:kernels|models)\.\w+) import (\w+)", DOCUMENT))
    names |= {(f"kernels.{file}", function) for file, function in re.findall(r"`kernels\.(\w+)\.(\w+)`", DOCUMENT)}
    assert len(names) > 8
    for module, function in names:
        assert re.search(rf"^def {function}\(", (ROOT / f"{module.replace('.', '/')}.py").read_text(), re.MULTILINE), function


SLOW = {"trl grpo"}  # its imports alone take 6 s


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TRAINERS])
def test_ten_steps_have_the_losses_and_the_weights_of_the_untouched_trainer(name, monkeypatch):
    logging.set_verbosity_error()
    untouched = train(name, False, SIZES)
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", type("Refused", (), {"apply": refuse}))
    if name == "transformers":
        llama = transformers.LlamaForCausalLM
        monkeypatch.setattr(llama, "forward", functools.wraps(llama.forward)(lambda *_, **__: refuse()))
    ours = train(name, True, SIZES)
    assert len(ours.losses) == SIZES.steps
    assert max(abs(loss) for loss in untouched.losses) > 0.05
    torch.testing.assert_close(ours.losses, untouched.losses, rtol=1e-5, atol=1e-5)
    for key, expected in untouched.weights.items():
        torch.testing.assert_close(ours.weights[key], expected, rtol=1e-4, atol=2e-5)  # a step moves a weight by up to 1e-3


@pytest.fixture
def llamas():
    """transformers' Llama and the example's, of equal weights."""
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM._from_config(model_config(SIZES), attn_implementation="sdpa")
    module = example("transformers_model")
    ours = module.LinearLossLlamaForCausalLM._from_config(model_config(SIZES), attn_implementation=module.register())
    ours.load_state_dict(plain.state_dict())
    return plain, ours


IDS_BS = torch.randint(3, SIZES.vocab, (2, 9), generator=torch.Generator().manual_seed(1))
CALLS = {
    "use_cache": {"use_cache": True},
    "tuple": {"return_dict": False},
    "shifted": {"shift_labels": IDS_BS.roll(2, 1)},
    "num_items": {"num_items_in_batch": 5},
}


@pytest.mark.parametrize("asked", CALLS.values(), ids=CALLS)
def test_the_llama_takes_the_arguments_that_transformers_llama_takes(llamas, asked):
    expected, received = (model(IDS_BS, labels=IDS_BS, **asked) for model in llamas)
    assert isinstance(received, tuple) == isinstance(expected, tuple)
    torch.testing.assert_close(received[0], expected[0], rtol=1e-5, atol=1e-5)
    assert len(received) == 1  # the logits were not made


def test_the_llama_keeps_no_cache_in_training_with_which_transformers_does_not_see_packed_documents(llamas):
    position_BS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(2, 9)
    expected = llamas[0](IDS_BS, labels=IDS_BS, position_ids=position_BS, use_cache=False).loss
    received = llamas[1](IDS_BS, labels=IDS_BS, position_ids=position_BS).loss
    torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-5)


def test_the_llama_has_the_signature_by_which_columns_are_kept_and_prompts_make_one_row_of_logits(llamas):
    assert inspect.signature(llamas[1].forward) == inspect.signature(llamas[0].forward)
    assert llamas[1]._supports_logits_to_keep()


def test_trainer_smooths_the_labels_of_the_llama_as_those_of_transformers_llama(llamas, tmp_path):
    rows = [{"input_ids": ids, "labels": [-100] * 3 + ids[3:]} for ids in IDS_BS.tolist() * 8]
    losses = []
    for model in llamas:
        arguments = transformers.TrainingArguments(**options(str(tmp_path), SIZES), label_smoothing_factor=0.3)
        trainer = transformers.Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(losses[0]) == SIZES.steps
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


def test_evaluation_of_the_llama_has_the_loss_and_the_logits_that_metrics_read(llamas, tmp_path):
    rows = [{"input_ids": ids, "labels": ids} for ids in IDS_BS.tolist()]
    arguments = transformers.TrainingArguments(tmp_path, report_to="none", use_cpu=True, disable_tqdm=True)
    expected, received = (transformers.Trainer(model, arguments).predict(rows) for model in llamas)
    assert received.predictions.shape == (2, 9, SIZES.vocab)
    torch.testing.assert_close(received.predictions, expected.predictions, rtol=1e-4, atol=1e-5)
    assert received.metrics["test_loss"] == pytest.approx(expected.metrics["test_loss"], rel=1e-5)


def test_a_saved_llama_is_transformers_own_to_whoever_loads_it(llamas, tmp_path):
    llamas[1].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.slow
def test_grpo_has_trls_fp32_head_under_autocast_where_that_is_asked(tmp_path):
    model = transformers.LlamaForCausalLM(model_config(SIZES))
    torch.nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path)  # the reference model is loaded from there
    arguments = trl.GRPOConfig(**options(str(tmp_path), SIZES), num_generations=4, beta=0.1, cast_lm_head_to_fp32=True)
    log_probs = []
    for trainer_class in (trl.GRPOTrainer, example("trl_grpo").LinearGRPOTrainer):
        rows, tokenizer = Dataset.from_dict({"prompt": ["w3"]}), words_tokenizer(SIZES.vocab)
        trainer = trainer_class(str(tmp_path), half_even, arguments, rows, processing_class=tokenizer)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            answers = [m(IDS_BS, labels=IDS_BS, fused_lm_head=True) for m in (trainer.model, trainer.ref_model)]
        log_probs.append([answer.log_probs for answer in answers])
    torch.testing.assert_close(log_probs[1], log_probs[0], rtol=1e-5, atol=1e-4)  # 4e-2 with a head in bf16


def snippet(words):
    """The names that the document's code block with these words defines."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL) if words in block)
    names = {}
    exec(code, names)
    return names


def test_the_snippet_for_liger_users_is_ligers_dpo():
    generator = torch.Generator().manual_seed(0)
    hidden_BSD, reference_BSD = (torch.randn(6, 7, 16, generator=generator) for _ in range(2))
    weight_VD, reference_VD = (torch.randn(40, 16, generator=generator) for _ in range(2))
    target_BS = torch.randint(0, 40, (6, 7), generator=generator)
    target_BS[1, :3] = target_BS[4, 5:] = -100
    hidden_BSD.requires_grad_()
    theirs = LigerFusedLinearDPOLoss(beta=0.1, compiled=False)
    expected = theirs(weight_VD, hidden_BSD, target_BS, ref_input=reference_BSD, ref_weight=reference_VD)[0]
    received = snippet("def dpo_loss")["dpo_loss"](hidden_BSD, weight_VD, target_BS, reference_BSD, reference_VD)
    torch.testing.assert_close(received, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(loss, hidden_BSD)[0] for loss in (received, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("beta", "kind"), [(0.0, "forward_kl"), (0.3, "jsd"), (1.0, "reverse_kl")])
def test_beta_means_what_it_means_to_liger(beta, kind):
    generator = torch.Generator().manual_seed(0)
    hidden_TD, teacher_TU = torch.randn(9, 16, generator=generator), torch.randn(9, 24, generator=generator)
    weight_VD, teacher_VU = torch.randn(40, 16, generator=generator), torch.randn(40, 24, generator=generator)
    target_T = torch.randint(0, 40, (9,), generator=generator)
    theirs = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    expected = theirs(hidden_TD, weight_VD, teacher_TU, teacher_VU, target_T)
    options = {"beta": beta} if kind == "jsd" else {}
    received = linear_divergence(hidden_TD, weight_VD, teacher_TU, teacher_VU, kind=kind, **options).mean()
    torch.testing.assert_close(received, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--nproc-per-node", "2"]], ids=["alone", "fsdp2"])
def test_ten_steps_of_torchtitan_have_the_losses_and_the_weights_of_its_own(launcher):
    try:
        importlib.metadata.version("torchtitan")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("torchtitan is not installed: it asks for datasets below the pinned ones")
    worker = Path(__file__).with_name("torchtitan_worker.py")
    result = subprocess.run([sys.executable, *launcher, str(worker)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["loss"] < 1e-5 and found["weight"] < 3e-5  # a step moves a weight by up to 1e-3
    assert found["last"] < found["first"]
