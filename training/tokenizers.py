"""Builds the two tokenizers: a byte-level BPE as CLIP's, a unigram as T5's, over the words of
`data`.

The BPE has all 256 bytes and their end-of-word forms, so no character is ever unknown (an unknown
one would become the end token and cut the pooled prompt). The unigram is case-sensitive: it knows
each word in lower case and capitalized. Knows nothing about models.
"""

import json
import random
import sys
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from training import data

CLIP_LENGTH = 77
T5_LENGTH = 512
EXTRA_WORDS = (
    "the one two big little tiny huge colored coloured solid plain simple flat shape figure image "
    "picture photo of drawing painting color colour side upper lower corner edge centered "
    "background disc ball box round pointed five to style bright dark light and or not no is are "
    "that this it its with in by for from as at a an"
)


def corpus() -> list[str]:
    """A few thousand sentences, in a fixed order."""
    rng = random.Random(0)
    facts = data.all_facts()
    return [data.any_prompt(rng.choice(facts), rng) for _ in range(6000)] + [EXTRA_WORDS] * 40


def _words() -> list[str]:
    text = " ".join(corpus()).replace(",", " ").replace(".", " ").lower()
    return sorted(set(text.split()))


def write_clip(folder: Path) -> None:
    """vocab.json, merges.txt and the two configs, as the published tokenizer/ has them."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=20,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    merges = []
    for pair in json.loads(tokenizer.to_str())["model"]["merges"]:
        # by the library's version
        merges.append(pair if isinstance(pair, list) else pair.split(" "))
    names = dict.fromkeys(alphabet)  # a dict for its order
    names |= dict.fromkeys(character + "</w>" for character in alphabet)
    names |= dict.fromkeys("".join(pair) for pair in merges)
    names |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    vocabulary = {name: i for i, name in enumerate(names)}
    lines = ["#version: 0.2", *(f"{first} {second}" for first, second in merges)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    _write(folder / "special_tokens_map.json", special)
    _write(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            **special,
            "clean_up_tokenization_spaces": True,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": CLIP_LENGTH,
            "tokenizer_class": "CLIPTokenizer",
        },
    )


def write_t5(folder: Path) -> None:
    """tokenizer.json and the two configs, as the published tokenizer_2/ has them."""
    tokenizer = Tokenizer(models.Unigram(_pieces(), unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    _write(folder / "special_tokens_map.json", special)
    _write(
        folder / "tokenizer_config.json",
        {
            **special,
            "clean_up_tokenization_spaces": True,
            "extra_ids": 0,
            "model_max_length": T5_LENGTH,
            "tokenizer_class": "T5Tokenizer",
        },
    )


def _pieces() -> list[tuple[str, float]]:
    """(piece, log-likelihood) of the unigram; "▁" stands for the space in front of a word.

    Whole words at a word's beginning are the likeliest, single characters the last resort.
    """
    characters = [chr(code) for code in range(33, 127)]
    forms = []
    for word in _words():
        if len(word) > 1:
            forms += [word, word.capitalize()]
    scores = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0}
    for form in forms:
        scores.setdefault("▁" + form, -6.0)
    for form in forms:
        scores.setdefault(form, -8.0)
    scores.setdefault("▁", -8.0)
    for character in characters:
        scores.setdefault("▁" + character, -11.0)
    for character in characters:
        scores.setdefault(character, -12.0)
    return list(scores.items())


def _write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_clip(Path(sys.argv[1]) / "tokenizer")
    write_t5(Path(sys.argv[1]) / "tokenizer_2")
