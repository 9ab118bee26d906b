"""A byte-level tokenizer that needs no download: one token per byte of UTF-8, and three specials.

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)      # AutoTokenizer.from_pretrained(folder) loads it anywhere

Ids: 0 <pad>, 1 <s>, 2 </s>, and 3 + b for byte b.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<s>", "</s>")


def byte_tokenizer(vocab_size: int | None = None) -> PreTrainedTokenizerFast:
    """The tokenizer, `<s>` put in front of every text. At a `vocab_size` below 259 the bytes that have no id become
    `<pad>` (text beyond ASCII is then lost, code is not). Raises ValueError when not even ASCII fits."""
    size = len(SPECIALS) + 256 if vocab_size is None else min(vocab_size, len(SPECIALS) + 256)
    if size < len(SPECIALS) + 128:
        raise ValueError(f"a byte tokenizer needs a vocabulary of at least {len(SPECIALS) + 128}, found {vocab_size}")
    symbols = [_symbol(byte) for byte in range(size - len(SPECIALS))]
    vocab = {token: i for i, token in enumerate([*SPECIALS, *symbols])}
    raw = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=SPECIALS[0]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


def _symbol(byte: int) -> str:
    """The printable character by which byte-level BPE files spell a byte: itself if printable, else 256 upwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))
