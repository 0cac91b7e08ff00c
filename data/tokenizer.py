"""Tokenizers: training a byte-level BPE, and `ChatTokenizer`, any Hugging Face tokenizer folder with its chat template.

Text is encoded as text: a "<|end|>" in somebody's message becomes ordinary tokens, never the special one. Only the
template writes special tokens. Ids equal transformers' `apply_chat_template` wherever no message spells a special token.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .record import BadData

SPECIAL_TOKENS = ("<|document|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>")
DEFAULT_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|document|>",
    "eos_token": "<|end|>",
    "pad_token": "<|pad|>",
    "clean_up_tokenization_spaces": False,
}
# No white space of its own: special tokens on both sides of every content make encode(prompt) + encode(completion) equal
# encode(whole).
DEFAULT_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('this chat template has no role ' ~ message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- message['content'] ~ '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}{{- message['content'] ~ '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
# Unicode noncharacters, which no text may interchange: they travel through the template and never reach the tokenizer.
OPEN, CLOSE, BREAK, PROBE = "\ufdd0", "\ufdd1", "\ufdd2", "\ufdd3"
HAS_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
ROLE_OF_TOKEN = {"bos": "bos_token", "eos": "eos_token", "pad": "pad_token"}
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with every digit its own token. Round-trips any text; equal texts give an equal tokenizer."""
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise BadData(f"vocab_size is {vocab_size}, expected at least {smallest}: the bytes and the special tokens; raise it")
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation; `marked` still holds a BREAK inside every special token that a message spelled."""

    marked: str
    spans: list[tuple[int, int]]  # characters of `text` that the template marks as the assistant's

    @property
    def text(self) -> str:
        return self.marked.replace(BREAK, "")


@dataclass(frozen=True)
class ChatTokenizer:
    tokenizer: Tokenizer = field(repr=False)
    chat_template: str | None = DEFAULT_CHAT_TEMPLATE
    settings: dict = field(default_factory=lambda: dict(DEFAULT_SETTINGS))  # tokenizer_config.json
    extra_end_ids: tuple[int, ...] = ()  # what generation_config.json ends at, beside the eos token

    def __post_init__(self):
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        for role in ROLE_OF_TOKEN.values():
            token = self.settings.get(role)
            if token is not None and self.tokenizer.token_to_id(_token_text(token)) is None:
                raise BadData(f"{role} is {_token_text(token)!r}, which tokenizer.json lacks; correct tokenizer_config.json")

    @classmethod
    def load(cls, folder: str | Path) -> "ChatTokenizer":
        """Read a Hugging Face folder: tokenizer.json, and what its other files say about special tokens and template."""
        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise BadData(f"{folder}: no tokenizer.json, expected a Hugging Face fast tokenizer; save one there")
        if "model" not in _read_json(folder / "tokenizer.json"):
            raise BadData(f"{folder / 'tokenizer.json'}: no 'model' in it, expected a tokenizer; save it again")
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        settings = {**_read_json(folder / "special_tokens_map.json"), **_read_json(folder / "tokenizer_config.json")}
        configs = [_read_json(folder / name) for name in ("generation_config.json", "config.json")]
        for name, key in ROLE_OF_TOKEN.items():
            if settings.get(key) is None:
                ids = next((found for one in configs if (found := _as_ids(one.get(f"{name}_token_id")))), ())
                settings[key] = tokenizer.id_to_token(ids[0]) if ids else None
        extra = next((ids for one in configs if (ids := _as_ids(one.get("eos_token_id")))), ())
        return cls(tokenizer, _read_template(folder, settings), settings, extra)

    def save(self, folder: str | Path) -> None:
        """tokenizer.json, tokenizer_config.json and chat_template.jinja, as transformers' AutoTokenizer loads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.encode_special_tokens = False
        self.tokenizer.save(str(folder / "tokenizer.json"))
        dropped = ("chat_template", "auto_map")  # the template has its own file, and remote code is not exported
        settings = {key: value for key, value in self.settings.items() if key not in dropped and value is not None}
        settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: nothing added, and no special token however the text spells one."""
        self.tokenizer.encode_special_tokens = True
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        self.tokenizer.encode_special_tokens = True
        return [one.ids for one in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id: the fewest rows an embedding may have."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @cached_property
    def end_id(self) -> int:
        """The token that ends an assistant's turn: what the template writes after the content, else the eos token."""
        if self.chat_template is not None:
            turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": PROBE}]
            whole = self._render(turns, False).marked
            ids, starts = self._encode_rendered(whole)
            content_end = whole.rindex(PROBE) + 1 if PROBE in whole else len(whole)
            after = [i for i, start in zip(ids, starts, strict=True) if start >= content_end and i in self._special_ids]
            if after:
                return after[0]
        return self._named_id("eos_token") if self.settings.get("eos_token") else self._named_id("bos_token")

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Every token generation stops at: the turn's end first, then eos and what generation_config.json lists."""
        eos = (self._named_id("eos_token"),) if self.settings.get("eos_token") else ()
        return tuple(dict.fromkeys((self.end_id, *eos, *self.extra_end_ids)))

    @property
    def document_id(self) -> int:
        """The separator of documents in token shards: bos, or eos where there is no bos."""
        return self._named_id("bos_token") if self.settings.get("bos_token") else self._named_id("eos_token")

    @property
    def pad_id(self) -> int:
        """The pad token, or the document separator where there is none (padding is always masked)."""
        return self._named_id("pad_token") if self.settings.get("pad_token") else self.document_id

    def encode_prompt(self, messages: Sequence[dict]) -> list[int]:
        """The conversation so far, and the opening of the assistant's turn."""
        return self._encode_rendered(self._render(messages, True).marked)[0]

    def encode_conversation(self, messages: Sequence[dict]) -> tuple[list[int], list[bool]]:
        """(ids, supervised): supervised are exactly the assistant's tokens, the end of its turn included."""
        messages = list(messages)
        rendered = self._render(messages, False)
        is_marked = HAS_GENERATION.search(self.chat_template or "") is not None
        spans = rendered.spans if is_marked else self._spans_by_prefix(messages, rendered.text)
        ids, starts = self._encode_rendered(rendered.marked)
        supervised = [False] * len(ids)
        for begin, end in spans:
            inside = [place for place, start in enumerate(starts) if begin <= start < end]
            for place in inside if is_marked else self._without_trailing_space(ids, inside):
                supervised[place] = True
        return ids, supervised

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self.tokenizer.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _special_text(self) -> re.Pattern:
        tokens = self.tokenizer.get_added_tokens_decoder().values()
        texts = [one.content for one in tokens if one.special and len(one.content) > 1]  # one character cannot be broken
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")

    @cached_property
    def _template(self) -> jinja2.Template:
        if self.chat_template is None:
            raise BadData(
                "the tokenizer has no chat template, expected one for messages; put chat_template.jinja in its folder"
            )
        try:
            return _environment().from_string(self.chat_template)
        except jinja2.TemplateError as error:
            raise BadData(f"the chat template does not compile: {_one_line(error)}; correct chat_template.jinja") from None

    def _named_id(self, role: str) -> int:
        found = self.tokenizer.token_to_id(_token_text(self.settings.get(role)))
        if found is None:
            raise BadData(f"the tokenizer has neither bos nor eos token, expected one; set {role} in tokenizer_config.json")
        return found

    def _render(self, messages: Sequence[dict], add_generation_prompt: bool) -> Rendered:
        template = self._template
        tokens = {
            key: value for key, value in self.settings.items() if key.endswith("_token") and isinstance(value, str | dict)
        }
        named = {key: _token_text(value) for key, value in tokens.items()}
        safe = [self._defuse(message) for message in messages]
        try:
            raw = template.render(
                **named, messages=safe, tools=None, documents=None, add_generation_prompt=add_generation_prompt
            )
        except TEMPLATE_ERRORS as error:
            raise BadData(f"the chat template refuses the messages: {_one_line(error)}; change them or the template") from None
        return _without_marks(raw)

    def _defuse(self, value):
        """A copy with a BREAK after the first character of every special token that a string spells."""
        if isinstance(value, dict):
            return {key: self._defuse(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._defuse(one) for one in value]
        if not isinstance(value, str):
            return value
        if any(mark in value for mark in (OPEN, CLOSE, BREAK)):
            raise BadData("a message holds one of U+FDD0 to U+FDD2, which are not characters; remove them")
        while self._special_text.search(value):  # again, for special tokens that overlap
            value = self._special_text.sub(lambda found: found[0][0] + BREAK + found[0][1:], value)
        return value

    def _encode_rendered(self, marked: str) -> tuple[list[int], list[int]]:
        """(ids, first character of each token in the text without BREAKs)."""
        self.tokenizer.encode_special_tokens = False
        encoding = self.tokenizer.encode(marked, add_special_tokens=False)
        if BREAK not in marked:
            return encoding.ids, _starts(encoding.offsets)
        ids, starts, place, cursor = [], [], 0, 0
        specials = [(i, span) for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i in self._special_ids]
        self.tokenizer.encode_special_tokens = True
        for special, (begin, end) in [*specials, (None, (len(marked), len(marked)))]:
            piece = marked[cursor:begin].replace(BREAK, "")
            encoded = self.tokenizer.encode(piece, add_special_tokens=False)
            ids += encoded.ids
            starts += [place + start for start in _starts(encoded.offsets)]
            place += len(piece)
            if special is not None:
                ids.append(special)
                starts.append(place)
            place, cursor = place + end - begin, end
        return ids, starts

    def _spans_by_prefix(self, messages: list[dict], text: str) -> list[tuple[int, int]]:
        """Where the assistant speaks, from renderings of growing prefixes: for templates without generation marks."""
        spans = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = self._render(messages[:i], True).text
                whole = self._render(messages[: i + 1], False).text
                if not (text.startswith(whole) and whole.startswith(prompt)):
                    remedy = "put {% generation %} marks in the template, or let this message end the conversation"
                    raise BadData(f"message {i + 1}: the chat template changes earlier text as messages follow; {remedy}")
                spans.append((len(prompt), len(whole)))
        return spans

    def _without_trailing_space(self, ids: list[int], places: list[int]) -> list[int]:
        """Without the white space some templates write after the turn's end token, which the model never generates."""
        last = max((n for n, place in enumerate(places) if ids[place] in self._special_ids), default=len(places))
        after = [ids[place] for place in places[last + 1 :]]
        return places[: last + 1] if not self.decode(after, skip_special=False).strip() else places


class _GenerationMarks(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`: renders its body between OPEN and CLOSE."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return OPEN + caller() + CLOSE


def _environment() -> ImmutableSandboxedEnvironment:
    """jinja2 as transformers sets it up for chat templates."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationMarks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _without_marks(raw: str) -> Rendered:
    kept, spans, place, opened = [], [], 0, 0
    for piece in re.split(f"([{OPEN}{CLOSE}])", raw):
        if piece == OPEN:
            opened = place
        elif piece == CLOSE:
            spans.append((opened, place))
        else:
            kept.append(piece)
            place += len(piece) - piece.count(BREAK)
    return Rendered("".join(kept), spans)


def _starts(offsets: Sequence[tuple[int, int]]) -> list[int]:
    """First characters. Some tokenizers trim white space off the offsets; the end of the token before tells more."""
    ends = [0, *(end for _, end in offsets[:-1])]
    return [min(start, end) for (start, _), end in zip(offsets, ends, strict=False)]


def _token_text(token: str | dict | None) -> str:
    return token["content"] if isinstance(token, dict) else token or ""


def _as_ids(value: int | list[int] | None) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _read_json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadData(f"{path}: {error}, expected JSON; save the tokenizer again") from None
    if not isinstance(value, dict):
        raise BadData(f"{path}: expected a JSON object; save the tokenizer again")
    return value


def _read_template(folder: Path, settings: dict) -> str | None:
    """chat_template.jinja, else the template of tokenizer_config.json; of several, the one named `default`."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadData(f"{path}: not text ({error.reason} at byte {error.start}); save the template as UTF-8") from None
    template = settings.get("chat_template")
    if not isinstance(template, list):
        return template
    named = {one["name"]: one["template"] for one in template}
    if "default" not in named:
        remedy = "put the one you want in chat_template.jinja"
        raise BadData(f"{folder}: chat templates named {', '.join(named)}, expected one named default; {remedy}")
    return named["default"]
