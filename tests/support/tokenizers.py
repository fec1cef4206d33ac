"""Tokenizers small enough to build on the spot, of the two kinds that checkpoints have."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ["<|start|>", "<|end|>"]


def byte_level(*, bos: bool = False) -> Tokenizer:
    """Byte-level BPE (GPT-2, Qwen): every byte is a token, and a few pairs are merged."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "a"), ("ä", "¸"), ("ð", "Ł"), ("ðŁ", "Ļ")]
    tokens = [*letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _with_special_tokens(tokenizer, bos)


def byte_fallback(*, bos: bool = False) -> Tokenizer:
    """SentencePiece-style BPE (Mixtral): words with ▁, and bytes for what has no token."""
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "▁b"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", "a"), ("▁", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_special_tokens(tokenizer, bos)


def _with_special_tokens(tokenizer: Tokenizer, bos: bool) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.token_to_id("<|start|>"))]
        )
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path, **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<|start|>", "special": True},
        "eos_token": "<|end|>",
        **config,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
