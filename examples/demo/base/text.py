"""A CLIP tokenizer trained on the demo's words, and the small CLIP text encoder."""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CONTEXT = 32  # tokens the U-Net is given, start and end included
WIDTH = 96
START, END = "<|startoftext|>", "<|endoftext|>"
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def _byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order of OpenAI's CLIP vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [chr(256 + n) for n in range(256 - len(printable))]
    return [chr(b) for b in printable] + moved


def train_tokenizer(texts: Iterable[str], size: int = 1500) -> CLIPTokenizer:
    """Byte-level BPE in CLIP's file format; bytes outside the training text still encode."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD), "removed", invert=True),
            pre_tokenizers.ByteLevel(False),
        ]
    )
    alphabet = _byte_alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2 - 256,
        end_of_word_suffix="</w>",
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    merges = [
        m.split(" ") if isinstance(m, str) else list(m)
        for m in json.loads(bpe.to_str())["model"]["merges"]
    ]
    # The trainer only knows the word-final bytes that it saw; CLIP's vocabulary has all of them.
    words = alphabet + [byte + "</w>" for byte in alphabet] + ["".join(m) for m in merges]
    words = [*dict.fromkeys(words), START, END]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[(left, right) for left, right in merges],
        unk_token=END,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
    )


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            hidden_act="quick_gelu",
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
