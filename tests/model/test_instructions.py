"""Instruction data: what is read and refused, which tokens carry the loss, and in what order they come."""

from __future__ import annotations

import gzip
import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plt_cases import build, quick, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from plt_benchmarks.protocols import Message, Prompt
from plt_eval.engines.hf import HFEngine
from plt_model import PLTConfig, PLTForCausalLM
from plt_model.tokenizer import byte_tokenizer
from plt_model.training.instruction_files import parse_instruction
from plt_model.training.instructions import (
    CHAT_TEMPLATE,
    IGNORE,
    Encoder,
    Example,
    InstructionDataset,
    InstructionError,
    answer_labels,
    collate,
    load_instructions,
    read_instructions,
    with_chat_template,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRIMMED = CHATML.replace("m.content", "m.content|trim")
PLAIN = (
    "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n### end\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
MARKED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{%- generation -%}{{ m.content }}{{ '<|im_end|>' }}{%- endgeneration -%}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED_CONTENT = MARKED.replace("{{ '<|im_end|>' }}{%- endgeneration -%}", "{%- endgeneration -%}{{ '<|im_end|>' }}")
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IN_A_MACRO = (
    "{% macro turn(m) %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endmacro %}"
    "{% for m in messages %}{{ turn(m) }}{% endfor %}"
)

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="<"), max_size=24)
ANSWERS = TEXTS.filter(str.strip)


def chat(*contents: str, system: str | None = None) -> dict[str, Any]:
    """A conversation: the user's and the assistant's turns in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return {"messages": turns if system is None else [{"role": "system", "content": system}, *turns]}


def pair(prompt: str, completion: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion}


def written(folder: Path, *records: Any, name: str = "train.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@cache
def bpe_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that merges across spaces and newlines, with ChatML's tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    corpus = ["### user:\nadd one and two\n### assistant:\nthe sum is three\n### end\n\n  return x\n"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


@cache
def bytes_with(template: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer: PreTrainedTokenizerFast = with_chat_template(byte_tokenizer(), template)
    return tokenizer


def encode(tokenizer: Any, record: dict[str, Any], **options: Any) -> Example:
    example = Encoder(tokenizer, **{"max_length": 4096, **options}).encode(parse_instruction(record, "f:1"))
    assert example is not None
    return example


def learnt(tokenizer: Any, example: Example) -> list[str]:
    """The text of each run of labels. Where there is a label, it is the token."""
    runs: list[list[int]] = [[]]
    for token, label in zip(example.input_ids.tolist(), example.labels.tolist(), strict=True):
        assert label in (token, IGNORE)
        if label == IGNORE:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


# --- files --------------------------------------------------------------------------------------------


def test_every_kind_of_file_and_record_is_read(tmp_path: Path) -> None:
    records = [
        chat("q", "a"),
        pair("p", "c"),
        {"prompt": chat("q")["messages"], "completion": chat("q", "a")["messages"][1:]},
    ]
    plain = tmp_path / "a.jsonl"
    plain.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(map(json.dumps, records)).encode())
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    found = list(read_instructions([plain, packed]))
    assert [record.id for record in found] == [f"{path}:{n}" for path in (plain, packed) for n in (1, 3, 5)]
    assert [type(record).__name__ for record in found[:3]] == ["Conversation", "PromptCompletion", "Conversation"]


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    arrow, parquet = (pytest.importorskip(name) for name in ("pyarrow", "pyarrow.parquet"))
    # A column of the one kind is null where a row is of the other.
    rows = [{"messages": None, **pair(f"p{i}", "c")} for i in range(1030)] + [chat("q", "a")]
    path = tmp_path / "train.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    found = list(read_instructions([path]))
    assert [record.id for record in found] == [f"{path}:{n}" for n in range(1, 1032)]
    assert found[-1] == parse_instruction(chat("q", "a"), f"{path}:1031")
    assert found[1029] == parse_instruction(pair("p1029", "c"), f"{path}:1030")


def test_missing_pyarrow_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    path = written(tmp_path, name="x.parquet")
    with pytest.raises(InstructionError, match=r"x\.parquet: needs pyarrow.*pip install pyarrow"):
        list(read_instructions([path]))


BROKEN_OFF = gzip.compress(b'{"prompt": "p", "completion": "c"}\n' * 9, mtime=0)[:-9]
"""Without the time, which would give the test another name each second, and in each process that collects it."""


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"prompt": "p", "completion": "c"}\n{"prompt": ', r"a\.jsonl:2: .*broken JSON"),
        ("a.jsonl", b'{"prompt": "\xff"}', r"a\.jsonl:1: .*broken JSON"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: .*broken JSON"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: cannot be read after line 0"),
        ("a.jsonl.gz", BROKEN_OFF, "cannot be read after line"),
        ("a.parquet", b"no parquet", r"a\.parquet: expected a parquet file"),
        ("a.txt", b"", r"a\.txt: expected a file whose name ends in \.jsonl"),
        (".", None, "expected a file .* found a folder"),
        ("gone.jsonl", None, r"gone\.jsonl: expected a file .* found nothing"),
    ],
)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InstructionError, match=message) as caught:
        list(read_instructions([tmp_path / name]))
    assert "\n" not in str(caught.value)


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "expected an object.*found an empty list"),
        ({}, "found no field"),
        (
            {"instruction": "a", "output": "b"},
            'expected "messages", or "prompt" and "completion", found "instruction", "output"',
        ),
        ({"prompt": "p"}, 'found "prompt"'),
        ({"prompt": "p", "completion": None}, 'found "prompt"'),
        ({**chat("q", "a"), "completion": "c"}, 'found both "messages" and "completion"'),
        ({"prompt": "p", "completion": [USER]}, 'two strings or two lists.*found a string "p" and a list of 1'),
        ({"prompt": 3, "completion": "c"}, "found a number 3"),
        ({"prompt": [USER], "completion": [USER]}, "completion: expected an assistant's message"),
        ({"messages": "hello"}, 'messages: expected a list of messages, found a string "hello"'),
        ({"messages": []}, "messages: expected a list of messages, found an empty list"),
        ({"messages": [USER, "a"]}, r'messages\[1\]: expected an object with "role"'),
        ({"messages": [USER]}, "expected an assistant's message, found none among 1"),
        (
            {"messages": [{"role": "tool", "content": ""}]},
            r'messages\[0\]\.role: expected one of "system".*found a string "tool"',
        ),
        ({"messages": [{"content": "a"}]}, r"messages\[0\]\.role: .*found null"),
        ({"messages": [{"role": "user", "content": None}]}, r"messages\[0\]\.content: expected a string, found null"),
        ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "found a list of 1"),
        ({"messages": [USER, {**USER, "tool_calls": [{}]}]}, r'messages\[1\]: "tool_calls" is not supported'),
        ({"messages": [{**USER, "weight": 0.5}]}, r"messages\[0\]\.weight: expected 0 or 1, found a number 0\.5"),
        ({**chat("q", "a"), "tools": [{}]}, '"tools" is not supported'),
        (
            pair("p", "half \ud83d"),
            r"completion: expected Unicode text, found half a surrogate pair \(\\ud83d\) at character 5",
        ),
        ({"messages": "x" * 999}, r"x\.\.\.$"),
    ],
)
def test_a_bad_record_is_one_line(tmp_path: Path, record: Any, message: str) -> None:
    path = written(tmp_path, pair("p", "c"), record, "worse")
    with pytest.raises(InstructionError, match=message) as caught:
        load_instructions([path], byte_tokenizer(), max_length=99)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


def test_other_fields_and_nulls_are_passed_over() -> None:
    record = chat("q", "a")
    noise = {"messages": [{**turn, "name": None, "tool_calls": None} for turn in record["messages"]], "tools": []}
    more = {"prompt": "q", "prompt_id": "7", "source": {"a": 1}, "completion": None}
    assert parse_instruction({**noise, **more}, "x") == parse_instruction(record, "x")


def test_no_records_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InstructionError, match=r"train\.jsonl: expected records, found none"):
        load_instructions([written(tmp_path)], byte_tokenizer(), max_length=9)


# --- the loss is on the answers -----------------------------------------------------------------------


@quick(60)
@given(st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=3), st.none() | TEXTS, st.booleans())
def test_labels_are_the_assistants_contents(turns: list[tuple[str, str]], system: str | None, last: bool) -> None:
    tokenizer = bytes_with()
    record = chat(*(content for turn in turns for content in turn), system=system)
    example = encode(tokenizer, record, last_turn_only=last)
    answers = [answer + "</s>" for _, answer in turns]
    assert learnt(tokenizer, example) == (answers[-1:] if last else answers)
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(record["messages"], tokenize=False)


@quick(60)
@given(TEXTS, ANSWERS)
def test_a_completion_ends_with_one_eos(prompt: str, completion: str) -> None:
    tokenizer = byte_tokenizer()
    example = encode(tokenizer, pair(prompt, completion))
    assert learnt(tokenizer, example) == [completion + "</s>"]
    assert example.input_ids.tolist() == [*tokenizer(prompt + completion)["input_ids"], 2]
    again = encode(tokenizer, pair(prompt, completion + "</s>"))
    assert again.input_ids.tolist() == example.input_ids.tolist()
    assert again.labels.tolist() == example.labels.tolist()


@pytest.mark.parametrize("template", [CHATML, MARKED, MARKED_CONTENT], ids=["chatml", "marked", "content-marked"])
@quick(40)
@given(turns=st.lists(st.tuples(TEXTS, ANSWERS), min_size=1, max_size=3), system=st.none() | TEXTS)
def test_any_template_gives_the_same_labels(template: str, turns: list[tuple[str, str]], system: str | None) -> None:
    tokenizer = bpe_tokenizer(template)
    record = chat(*(content for turn in turns for content in turn), system=system)
    encoder = Encoder(tokenizer, max_length=4096)
    example = encoder.encode(parse_instruction(record, "f:1"))
    assert example is not None
    whole = tokenizer.apply_chat_template(record["messages"])["input_ids"]
    assert example.input_ids.tolist() == whole
    if any("one token holds" in note for note in encoder.notes()):
        return  # a merge across the boundary has its own test
    assert learnt(tokenizer, example) == [answer + "<|im_end|>" for _, answer in turns]


@pytest.mark.parametrize("template", [None, CHATML, TRIMMED, PLAIN, MARKED])
@pytest.mark.parametrize("content", [">", "|>", "end", "im", "a</s>", "</s>", "</s></s>", " padded ", "l1\n\nl2", "é"])
def test_an_answer_that_looks_like_the_template(template: str | None, content: str) -> None:
    tokenizer = bytes_with(template)
    end = {None: "</s>", PLAIN: "\n### end"}.get(template, "<|im_end|>")
    answer = content.strip() if template == TRIMMED else content
    example = encode(tokenizer, chat(content, content, content, content))
    assert learnt(tokenizer, example) == [answer + end] * 2


def test_what_a_template_puts_before_the_answer_is_learnt() -> None:
    tokenizer = bpe_tokenizer(THINKING)
    assert learnt(tokenizer, encode(tokenizer, chat("q", "a"))) == ["<think>\n\n</think>\n\na<|im_end|>"]
    last = encode(tokenizer, chat("q", "a", "r", "b"), last_turn_only=True)
    assert learnt(tokenizer, last) == ["<think>\n\n</think>\n\nb<|im_end|>"]


def test_a_tokens_mask_of_transformers_agrees() -> None:
    tokenizer = bytes_with()
    record = chat("one", "two", "three", "four", system="s")
    out = tokenizer.apply_chat_template(record["messages"], return_assistant_tokens_mask=True, return_dict=True)
    example = encode(tokenizer, record)
    assert example.input_ids.tolist() == out["input_ids"]
    assert (example.labels != IGNORE).astype(int).tolist() == out["assistant_masks"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (THINKING, "beginning is not rendered as the whole"),
        (CHATML.replace("in messages", "in messages|reverse"), "not rendered as the whole"),
        (CHATML.replace("m.content", "(m.content|upper)"), "drops or changes the assistant's turn"),
        (CHATML.replace("m.content", "(m.content if m.role == 'user' else '')"), "drops or changes"),
        (CHATML.replace("<|im_end|>", ""), "no token ends an assistant's turn"),
        (MARKED.replace("<|im_end|>", ""), "no token ends an assistant's turn"),
        (MARKED.replace("== 'assistant'", "== 'nobody'"), "marks 0 answers of 2"),
        (IN_A_MACRO, "markers are not around the answer"),
    ],
)
def test_a_template_that_cannot_be_masked_is_refused(tmp_path: Path, template: str, message: str) -> None:
    tokenizer = bpe_tokenizer(template)
    path = written(tmp_path, chat("question one", "answer one", "question two", "answer two"))
    with pytest.raises(InstructionError, match=message) as caught:
        load_instructions([path], tokenizer, max_length=99)
    assert str(caught.value).startswith(f"{path}:1: the chat template is unusable for masking: ")


def test_a_template_that_refuses_a_conversation_is_named(tmp_path: Path) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + CHATML
    path = written(tmp_path, chat("q", "a"), chat("q", "a", system="s"))
    with pytest.raises(
        InstructionError, match=r":2: the chat template cannot render this conversation \(user first\)$"
    ):
        load_instructions([path], bpe_tokenizer(strict), max_length=99)


def test_conversations_need_a_template(tmp_path: Path) -> None:
    path = written(tmp_path, chat("q", "a"))
    with pytest.raises(InstructionError, match=r":1: the tokenizer has no chat template"):
        load_instructions([path], byte_tokenizer(), max_length=99)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": chat("q", "a", "r")["messages"], "completion": [{"role": "assistant", "content": "b"}]}, ["b"]),
        ({"messages": [USER, {"role": "assistant", "content": "a", "weight": 0}, *chat("r", "b")["messages"]]}, ["b"]),
        (chat("q", "  ", "r", "b"), ["b"]),
        (chat("q", "a", "afterthought"), ["a"]),
        ({"messages": [{"role": "assistant", "content": "hello"}, *chat("q", "a")["messages"]]}, ["hello", "a"]),
        ({"messages": [*chat("q", "a")["messages"], {"role": "assistant", "content": "more"}]}, ["a", "more"]),
    ],
    ids=["completion", "weight", "blank", "open-end", "assistant-first", "twice"],
)
@pytest.mark.parametrize("template", [None, CHATML], ids=["ours", "chatml"])
def test_which_turns_are_learnt(template: str | None, record: dict[str, Any], expected: list[str]) -> None:
    end = "</s>" if template is None else "<|im_end|>"
    tokenizer = bytes_with(template)
    assert learnt(tokenizer, encode(tokenizer, record)) == [answer + end for answer in expected]


# --- tokens at the boundary ---------------------------------------------------------------------------


def test_a_merge_across_the_boundary_belongs_to_the_answer_and_is_said() -> None:
    tokenizer = bpe_tokenizer(None)
    encoder = Encoder(tokenizer, max_length=99)
    example = encoder.encode(parse_instruction(pair("the sum", " is three"), "f:1"))
    assert example is not None
    # The corpus made one token of more than either side.
    assert example.input_ids.tolist() == [*tokenizer("the sum is three")["input_ids"], tokenizer.eos_token_id]
    (text,) = learnt(tokenizer, example)
    assert text.endswith(" is three<|endoftext|>")
    assert len(text) > len(" is three<|endoftext|>")
    assert encoder.notes() == [
        "records where one token holds the prompt's end and the answer's beginning: 1 (first: f:1)"
    ]


@quick(60)
@given(
    st.lists(st.sampled_from(["the sum", " is", " three", "\n", "\n\n", "é", "add ", "### end"]), min_size=1), st.data()
)
def test_no_character_of_an_answer_is_left_out(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    cut = data.draw(st.integers(0, len(text)))
    if not text[cut:].strip():
        return
    tokenizer = bpe_tokenizer(None)
    example = encode(tokenizer, pair("x" + text[:cut], text[cut:]))
    assert example.input_ids.tolist() == [*tokenizer("x" + text)["input_ids"], tokenizer.eos_token_id]
    begins = [begin for begin, _ in tokenizer("x" + text, return_offsets_mapping=True)["offset_mapping"]]
    labelled = [begin for begin, label in zip(begins, example.labels[:-1], strict=True) if label != IGNORE]
    first = max((begin for begin in begins if begin <= 1 + cut), default=0)
    assert labelled == [begin for begin in begins if begin >= max(first, begins[1] if len(begins) > 1 else 1)]


def test_a_token_across_the_end_belongs_to_the_answer() -> None:
    offsets = np.array([(0, 2), (2, 4), (4, 6), (6, 7), (7, 9)])
    labels = answer_labels(np.arange(5), offsets, [(2, 5), (7, 8)])
    assert labels.tolist() == [IGNORE, 1, 2, IGNORE, 4]


def test_blanks_that_offsets_leave_out_are_learnt() -> None:
    """Many tokenizers trim offsets: a space before a word, and a token of spaces, then have no characters."""
    raw = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abĠĊ")} | {"</s>": 4}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>")
    example = encode(tokenizer, pair("ab", " \n a \n"))
    assert example.labels.tolist() == [IGNORE, IGNORE, 2, 3, 2, 0, 2, 3, 4]


@pytest.mark.parametrize("ending", ["", "</s>"], ids=["bos", "bos-eos"])
def test_beginning_and_end_are_never_doubled(ending: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"<s> $A {ending}".strip(), special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    for record in (pair("a", "b"), pair("<s>a", "b"), pair("<s>a", "b</s>")):
        example = encode(tokenizer, record)
        assert tokenizer.decode(example.input_ids) == "<s>ab</s>"
        assert learnt(tokenizer, example) == ["b</s>"]
    doubled = bytes_with("{{ bos_token }}" + CHAT_TEMPLATE)
    assert tokenizer.decode(encode(doubled, chat("q", "a")).input_ids).count("<s>") == 1


def test_a_token_that_is_never_predicted_has_no_label() -> None:
    tokenizer = bpe_tokenizer(None)
    example = encode(tokenizer, pair("", "é"))
    assert example.labels.tolist() == [IGNORE, *example.input_ids[1:]]


# --- what cannot be learnt from -----------------------------------------------------------------------


def noted(tmp_path: Path, *records: Any, **options: Any) -> tuple[list[str], list[str]]:
    """-> the lines of the file that were kept, and the notes without the folder."""
    notes: list[str] = []
    path = written(tmp_path, *records)
    kept = load_instructions([path], bytes_with(), **{"max_length": 20, **options}, notify=notes.append)
    return [example.id.rpartition(":")[2] for example in kept], [note.replace(f"{path}", "f") for note in notes]


FITS = pair("p", "c")


def test_long_and_empty_records_are_left_out_and_counted(tmp_path: Path) -> None:
    # 20 tokens hold <s>, 18 characters and </s>.
    records = [
        FITS,
        pair("p", " \n"),
        pair("p" * 10, "c" * 8),
        pair("p" * 10, "c" * 9),
        pair("p", ""),
        pair("p", "</s>"),
    ]
    kept, notes = noted(tmp_path, *records, chat("q", " "))
    assert kept == ["1", "3"]
    assert notes == [
        "records without an answer, left out: 4 (first: f:2)",
        "records of more than 20 tokens, left out: 1 (first: f:4)",
    ]


def test_truncation_is_asked_for_and_counted(tmp_path: Path) -> None:
    records = [pair("p" * 10, "c" * 50), pair("p" * 50, "c"), pair("p" * 19, "c"), pair("p" * 18, "c")]
    kept, notes = noted(tmp_path, *records, truncate=True)
    assert kept == ["1", "4"]
    assert notes == [
        "records of more than 20 tokens, cut there: 2 (first: f:1)",
        "records without an answer within 20 tokens, left out: 2 (first: f:2)",
    ]
    example = encode(bytes_with(), records[0], max_length=20, truncate=True)
    assert len(example.input_ids) == len(example.labels) == 20
    assert learnt(bytes_with(), example) == ["c" * 9]


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(
        InstructionError, match=r"no record of 2 can be used: records without an answer.*: 1 .*; records of more"
    ):
        noted(tmp_path, pair("p", ""), pair("p", "c" * 99))


def test_text_that_becomes_other_tokens_is_said(tmp_path: Path) -> None:
    _, notes = noted(tmp_path, FITS, pair("a <s>b</s> c", "d"))
    assert notes == [
        "records that spell out special tokens, which stand in their text as in any prompt: 1 (first: f:2)"
    ]
    path = written(tmp_path, FITS, pair("é", "c"), pair("p", "é"))
    with pytest.warns(
        UserWarning, match=r"^records whose answer has text that the tokenizer has no token for: 1 .*:3\)"
    ):
        load_instructions([path], byte_tokenizer(131), max_length=9)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"eos_token": None}, {}, "no end-of-text token"),
        ({}, {"max_length": 1}, "max_length: expected at least 2 tokens, found 1"),
    ],
)
def test_an_unfit_tokenizer_or_length_is_refused(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    tokenizer = byte_tokenizer()
    for name, value in change.items():
        setattr(tokenizer, name, value)
    with pytest.raises(InstructionError, match=message):
        Encoder(tokenizer, **{"max_length": 9, **options})
    if change:
        with pytest.raises(InstructionError, match=message):
            with_chat_template(tokenizer, None)


# --- the chat template --------------------------------------------------------------------------------


def test_the_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    for template, expected in ((None, CHAT_TEMPLATE), (CHATML, CHATML)):
        with_chat_template(byte_tokenizer(), template).save_pretrained(tmp_path)
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded.chat_template == expected
        record = chat("q é", "a", system="s")
        assert encode(loaded, record).labels.tolist() == encode(bytes_with(template), record).labels.tolist()
        assert with_chat_template(loaded, None).chat_template == expected


def test_a_template_that_fails_leaves_the_tokenizer_alone() -> None:
    tokenizer = with_chat_template(byte_tokenizer(), CHATML)
    for template, message in (("{% for %}", "cannot render"), ("hello", "unusable for masking"), ("", "chat template")):
        with pytest.raises(InstructionError, match=message):
            with_chat_template(tokenizer, template)
        assert tokenizer.chat_template == CHATML


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> HFEngine:
    folder = tmp_path_factory.mktemp("model")
    PLTForCausalLM(PLTConfig(**tiny(vocab_size=259))).save_pretrained(folder)
    bytes_with().save_pretrained(folder)
    return HFEngine(str(folder), device="cpu")


@quick(40)
@given(st.lists(TEXTS, min_size=2, max_size=4).filter(lambda texts: texts[-1].strip()), st.none() | TEXTS)
def test_the_engine_asks_with_the_training_prefix(engine: HFEngine, texts: list[str], system: str | None) -> None:
    turns = chat(*texts, system=system)["messages"]
    turns = [*turns, {"role": "assistant", "content": texts[-1]}]
    asked = engine.prompts.encode(Prompt("", messages=tuple(Message(**turn) for turn in turns[:-1])))
    example = encode(bytes_with(), {"messages": turns}, last_turn_only=True)
    assert example.input_ids[: len(asked)].tolist() == asked
    assert (example.labels != IGNORE).tolist() == [i >= len(asked) for i in range(len(example.labels))]


# --- the dataset and its batches ----------------------------------------------------------------------


def examples(tokenizer: Any, *records: dict[str, Any]) -> list[Example]:
    encoder = Encoder(tokenizer, max_length=4096)
    encoded = [encoder.encode(parse_instruction(record, f"f:{n}")) for n, record in enumerate(records, 1)]
    return [example for example in encoded if example is not None]


RECORDS = [chat("2+2", "4"), chat("say é", "é\n", "again", "é"), pair("def f(x):\n", "    return x\n")]
FIVE = [pair(f"p{i}", f"c{i}") for i in range(5)]


@quick(40)
@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 2**40))
def test_every_epoch_has_every_example_once(count: int, size: int, seed: int) -> None:
    dataset = InstructionDataset(
        examples(bytes_with(), *(pair("p", f"c{i}") for i in range(count))), size=size, seed=seed
    )
    assert len(dataset) == size
    ids = [dataset[i]["id"] for i in range(size)]
    assert ids == [dataset.id(i) for i in range(size)]
    for begin in range(0, size - count + 1, count):
        assert sorted(ids[begin : begin + count]) == [f"f:{n}" for n in range(1, count + 1)]
    assert [dataset[i]["id"] for i in reversed(range(size))] == ids[::-1]


def test_the_order_is_the_seeds_alone() -> None:
    def order(seed: int, size: int) -> list[str]:
        dataset = InstructionDataset(examples(bytes_with(), *FIVE), size=size, seed=seed)
        return [dataset.id(i).removeprefix("f:") for i in range(size)]

    # Pinned: another order would make a resumed run see other data.
    assert "".join(order(0, 15)) == "432155231415423"
    assert order(0, 15)[:7] == order(0, 7)
    assert order(0, 15) != order(1, 15)


def test_items_end_with_the_size() -> None:
    dataset = InstructionDataset(examples(bytes_with(), *RECORDS), size=7, seed=0)
    assert len([*dataset]) == 7
    for index in (7, -1):
        with pytest.raises(IndexError):
            dataset[index]
    with pytest.raises(InstructionError, match="at least one example"):
        InstructionDataset([], size=1, seed=0)
    with pytest.raises(InstructionError, match="found -1 and 0"):
        InstructionDataset(examples(bytes_with(), *RECORDS), size=-1, seed=0)


@pytest.mark.parametrize("multiple", [1, 16])
def test_batches_are_padded_on_the_right(multiple: int) -> None:
    dataset = InstructionDataset(examples(bytes_with(), *RECORDS), size=3, seed=0)
    items = [dataset[i] for i in range(3)]
    batch = collate(items, pad_id=7, multiple=multiple)
    longest = max(len(item["input_ids"]) for item in items)
    width = longest if multiple == 1 else (longest + 15) // 16 * 16
    assert width % multiple == 0
    for name, fill in (("input_ids", 7), ("labels", IGNORE), ("attention_mask", 0)):
        assert batch[name].shape == (3, width)
        assert batch[name].dtype == torch.int64
        for row, item in zip(batch[name].tolist(), items, strict=True):
            assert row == item[name].tolist() + [fill] * (width - len(item[name]))
    assert set(batch) == {"input_ids", "labels", "attention_mask"}


@pytest.fixture(scope="module")
def model() -> PLTForCausalLM:
    return build(tiny(vocab_size=259, plt_num_loops=2)).train()


def answer_losses(model: PLTForCausalLM, item: dict[str, Any]) -> torch.Tensor:
    """The cross-entropy of each token of the answers, the item alone in its batch."""
    logits = model(item["input_ids"][None]).logits[0, :-1]
    targets = item["labels"][1:]
    learns = targets != IGNORE
    return cross_entropy(logits[learns].float(), targets[learns], reduction="none")


def test_the_loss_is_the_mean_over_answer_tokens_padded_or_not(model: PLTForCausalLM) -> None:
    dataset = InstructionDataset(examples(bytes_with(), *RECORDS), size=3, seed=0)
    items = [dataset[i] for i in range(3)]
    expected = torch.cat([answer_losses(model, item) for item in items])
    assert len(expected) == sum(len(answer.encode()) + 1 for answer in ("4", "é\n", "é", "    return x\n"))
    batch = collate(items, pad_id=0, multiple=32)
    assert model(**batch).loss.item() == pytest.approx(expected.mean().item(), abs=2e-6)
    # As the Trainer sums micro-batches: each divided by the global batch's number of answer tokens.
    count = (batch["labels"] != IGNORE).sum()
    parts = [model(**collate(part, pad_id=0), num_items_in_batch=count).loss for part in (items[:1], items[1:])]
    assert sum(part.item() for part in parts) == pytest.approx(expected.mean().item(), abs=2e-6)


def test_the_answers_gradient_comes_from_the_answers_alone(model: PLTForCausalLM) -> None:
    """What the model would predict within the prompt has no part in the loss."""
    dataset = InstructionDataset(examples(bytes_with(), *RECORDS), size=3, seed=0)
    batch = collate([dataset[i] for i in range(3)], pad_id=0)
    labels = batch.pop("labels")
    logits = model(**batch).logits.detach().requires_grad_()
    model.loss_function(logits=logits, labels=labels, vocab_size=259).backward()
    assert logits.grad is not None
    moved = logits.grad.abs().sum(-1) > 0
    learns = torch.nn.functional.pad(labels != IGNORE, (0, 1))[:, 1:]
    assert torch.equal(moved, learns)
