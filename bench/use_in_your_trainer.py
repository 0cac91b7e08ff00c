"""Other trainers with the examples of docs/use-in-your-trainer.md, beside the same trainers untouched.

Run     warpline bench use_in_your_trainer [--quick] [--out DIR]; by name only
Needs   the extra `trainers` (transformers, trl, datasets, accelerate) and the checkout's docs/examples
Expect  a row per trainer and candidate: the median step (GRPO's includes sampling), the most memory that training held beyond
        what was held before its first step, and for ours the largest difference of a loss from the untouched trainer's, of
        the largest loss. Every run is a fresh process, and models have random weights. Untouched transformers makes the
        logits; TRL does not, but walks tiles of 4,096 tokens and 32,768 entries of the vocabulary. Ours has our attention too.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..models.transformers_attention import register
from .measure import LeftOut, Report, peak_mib, self_spread
from .rows import Row

ALLOWED = 1e-4  # relative, over the steps of a training in fp32
EXAMPLES = Path(__file__).resolve().parents[1] / "docs" / "examples"


class Sizes(NamedTuple):
    """A model and a step: B rows (pairs, completions) of about S tokens."""

    vocab: int
    width: int
    layers: int
    rows: int
    tokens: int
    steps: int


@dataclass
class Trained:
    """What training left: a loss per step, milliseconds per step, the most memory beyond what was held before."""

    losses: list[float] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def example(name: str) -> Any:
    """docs/examples/<name>.py as a module; ImportError where its library is absent."""
    specification = importlib.util.spec_from_file_location(f"warpline_example_{name}", EXAMPLES / f"{name}.py")
    if specification is None or specification.loader is None:
        raise FileNotFoundError(f"{EXAMPLES / name}.py is not there; expected a checkout: run the bench from one")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# ---- What is trained, on what ----


def words_tokenizer(vocab: int) -> Any:
    """Words w3, w4 … of one token each, without a download."""
    tokenizers: Any = importlib.import_module("tokenizers")
    transformers: Any = importlib.import_module("transformers")
    ids = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, vocab)}}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **names)


def model_config(sizes: Sizes) -> Any:
    return importlib.import_module("transformers").LlamaConfig(
        vocab_size=sizes.vocab, hidden_size=sizes.width, intermediate_size=2 * sizes.width, num_hidden_layers=sizes.layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4 * sizes.tokens, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip


def texts(sizes: Sizes, count: int, seed: int) -> list[str]:
    """Random words, half to all of S of them."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(sizes.tokens // 2, sizes.tokens + 1, (count,), generator=generator).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(3, sizes.vocab, (n,), generator=generator).tolist()) for n in lengths]


def options(folder: str, sizes: Sizes) -> dict[str, Any]:
    return {
        "output_dir": folder, "max_steps": sizes.steps, "per_device_train_batch_size": sizes.rows, "learning_rate": 1e-3,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": 0, "bf16": False,
        "lr_scheduler_type": "constant", "use_cpu": not torch.cuda.is_available(),
    }  # fmt: skip


def half_even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """A reward: the share of even tokens."""
    return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]


def transformers_trainer(is_ours: bool, folder: str, sizes: Sizes) -> Any:
    transformers: Any = importlib.import_module("transformers")
    if is_ours:
        ours = example("transformers_model")
        model = ours.LinearLossLlamaForCausalLM._from_config(model_config(sizes), attn_implementation=ours.register())
    else:
        model = transformers.LlamaForCausalLM._from_config(model_config(sizes), attn_implementation="sdpa")
    tokenizer = words_tokenizer(sizes.vocab)
    rows = [{"input_ids": tokenizer(text)["input_ids"]} for text in texts(sizes, sizes.rows * sizes.steps, 1)]
    collator = transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)
    arguments = transformers.TrainingArguments(**options(folder, sizes))
    return transformers.Trainer(model, arguments, train_dataset=rows, data_collator=collator)


def trl_trainer(method: str) -> Callable[[bool, str, Sizes], Any]:
    """A maker of TRL's trainer of that method, or of the example's subclass."""

    def make(is_ours: bool, folder: str, sizes: Sizes) -> Any:
        trl: Any = importlib.import_module("trl")
        datasets: Any = importlib.import_module("datasets")
        kind = f"{method}Trainer"
        trainer = getattr(example(f"trl_{method.lower()}"), f"Linear{kind}") if is_ours else getattr(trl, kind)
        name = register() if is_ours else "sdpa"
        llama: Any = importlib.import_module("transformers").LlamaForCausalLM
        model = llama._from_config(model_config(sizes), attn_implementation=name)
        count, half = sizes.rows * sizes.steps, sizes._replace(tokens=sizes.tokens // 2)
        more: dict[str, Any] = {}
        if method == "SFT":
            columns = {"text": texts(sizes, count, 1)}
            settings: dict[str, Any] = {"max_length": sizes.tokens}
        elif method == "DPO":
            columns = {name: texts(half, count, seed) for seed, name in enumerate(("prompt", "chosen", "rejected"))}
            columns["prompt"] = [f"{text} " for text in columns["prompt"]]
            settings, more["ref_model"] = {}, importlib.import_module("copy").deepcopy(model)
        else:
            columns = {"prompt": texts(half, count, 1)}
            settings = {"num_generations": sizes.rows, "max_completion_length": sizes.tokens // 2, "temperature": 0.9}
            more["reward_funcs"] = half_even
        arguments = getattr(trl, f"{method}Config")(**options(folder, sizes), **settings)
        tokenizer = words_tokenizer(sizes.vocab)
        return trainer(
            model, args=arguments, train_dataset=datasets.Dataset.from_dict(columns), processing_class=tokenizer, **more
        )

    return make


TRAINERS: dict[str, Callable[[bool, str, Sizes], Any]] = {
    "transformers": transformers_trainer,
    "trl sft": trl_trainer("SFT"),
    "trl dpo": trl_trainer("DPO"),
    "trl grpo": trl_trainer("GRPO"),
}


# ---- One training ----


def train(name: str, is_ours: bool, sizes: Sizes) -> Trained:
    """Steps of the trainer `name` from the same start on the same rows, with or without the example."""
    transformers: Any = importlib.import_module("transformers")
    transformers.set_seed(0)
    found = Trained()
    started = 0.0

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            nonlocal started
            started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            found.milliseconds.append(1e3 * (time.perf_counter() - started))

    with tempfile.TemporaryDirectory() as folder:
        trainer = TRAINERS[name](is_ours, folder, sizes)
        trainer.add_callback(Watch())
        found.peak_mib = peak_mib(trainer.train, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found.losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    found.weights = {key: x.detach().cpu().clone() for key, x in trainer.model.state_dict().items()}
    return found


def train_in_fresh_process(name: str, is_ours: bool, sizes: Sizes, num_threads: int) -> Trained:
    """As `train`, without the weights."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, torch.set_num_threads, (num_threads,)) as pool:
        return pool.submit(_train_without_weights, name, is_ours, sizes).result()


def _train_without_weights(name: str, is_ours: bool, sizes: Sizes) -> Trained:
    found = train(name, is_ours, sizes)
    found.weights = {}
    return found


def fill(report: Report, is_quick: bool) -> None:
    """Every trainer's rows. LeftOut without the examples, ModuleNotFoundError without the libraries."""
    if not EXAMPLES.is_dir():
        raise LeftOut(f"{EXAMPLES} is not there: run it from a checkout")
    if report.device.type == "cuda":
        sizes = Sizes(32768 if is_quick else 131072, 1024, 4, 8, 1024, 4 if is_quick else 10)
    else:
        sizes = Sizes(8192 if is_quick else 32768, 64, 2, 4, 128, 4 if is_quick else 6)
    shape = {"V": sizes.vocab, "D": sizes.width, "B": sizes.rows, "S": sizes.tokens}
    for name in TRAINERS:
        plain, ours = (train_in_fresh_process(name, is_ours, sizes, torch.get_num_threads()) for is_ours in (False, True))
        error = max(abs(a - b) for a, b in zip(plain.losses, ours.losses, strict=True)) / max(map(abs, plain.losses))
        check = "passed" if error <= ALLOWED else f"failed: losses {error:.1e} apart, allowed {ALLOWED:.0e}"
        for candidate, found in (("warpline", ours), ("untouched", plain)):
            taken = found.milliseconds[1:]  # the first step allocates and, on a GPU, compiles
            low, _, high = statistics.quantiles(taken, n=4)
            row = Row(
                f"{name} step", candidate, shape, "float32", statistics.median(taken), high - low, num_runs=len(taken),
                peak_mib=found.peak_mib, self_spread=self_spread(taken),
            )  # fmt: skip
            if found is ours:
                row.error, row.check = error, check
                if plain.peak_mib is not None and ours.peak_mib is not None:
                    row.note = f"{plain.peak_mib - ours.peak_mib:.0f} MiB of {plain.peak_mib:.0f} MiB saved"
            report.add(row)
