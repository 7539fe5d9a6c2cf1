"""Teaches the two text encoders, before the transformer, to know what a sentence states.

CLIP's pooled vector, and every output token of T5 (padding too: FLUX does not mask it), must name
the five words of the fact through throw-away linear heads. A minute or two; afterwards the encoders
are frozen, so their outputs can be cached. Knows nothing about pictures.

    python -m training.text WORK --minutes 2
"""

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer, T5Tokenizer

from training import data, tokenizers
from training.optim import Muon, schedule
from training.shape import CLIP, T5, Parts, build

ATTRIBUTES = {
    "colour": list(data.COLOURS),
    "shape": list(data.SHAPES),
    "background": list(data.COLOURS),
    "size": list(data.SIZES),
    "position": list(data.POSITIONS),
}
LENGTHS = (16, 24, 24, 24, 32)  # T5's tokens of most batches, by how often
BATCH = 64
ADAM_LR, MUON_LR = 3e-3, 0.01


class Encoders:
    """Both tokenizers and encoders of a work folder."""

    def __init__(self, work: Path, parts: Parts) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.tokenizer_2 = T5Tokenizer.from_pretrained(work / "tokenizer_2")
        self.clip = parts.text_encoder
        self.t5 = parts.text_encoder_2

    def __call__(self, prompts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(pooled (B, 96), tokens (B, length, 128)) of B prompts.

        CLIP is causal, so the padding behind its end token may be cut.
        """
        ids = self.tokenizer(
            prompts,
            max_length=tokenizers.CLIP_LENGTH,
            padding="longest",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        ids_2 = self.tokenizer_2(
            prompts,
            max_length=length,
            padding="max_length",
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.clip(input_ids=ids).pooler_output, self.t5(input_ids=ids_2).last_hidden_state


def batch(
    rng: random.Random, count: int, *, held_out: bool = False
) -> tuple[list[data.Fact | None], list[str]]:
    """Facts and sentences; one in twenty is empty, its fact None."""
    pool = data.held_out_facts() if held_out else []
    drawn = [rng.choice(pool) if held_out else data.training_fact(rng) for _ in range(count)]
    facts = [None if rng.random() < 0.05 else fact for fact in drawn]
    return facts, ["" if fact is None else data.any_prompt(fact, rng) for fact in facts]


def labels(facts: list[data.Fact | None]) -> torch.Tensor:
    """(5, B) class numbers; the last class of each attribute means an empty sentence."""
    rows = []
    for attribute, names in ATTRIBUTES.items():
        row = []
        for fact in facts:
            row.append(len(names) if fact is None else names.index(getattr(fact, attribute)))
        rows.append(row)
    return torch.tensor(rows)


def heads_loss(
    heads: torch.nn.ModuleList, features: torch.Tensor, target: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """(summed cross entropy, share of facts with all five words right) of features (B, width)."""
    loss = torch.zeros(())
    right = torch.ones(len(features), dtype=torch.bool)
    for head, classes in zip(heads, target, strict=True):
        logits = head(features)
        loss = loss + F.cross_entropy(logits, classes, label_smoothing=0.02)
        right &= logits.argmax(-1) == classes
    return loss, right.float().mean().item()


def make_heads(width: int) -> torch.nn.ModuleList:
    """A linear layer an attribute, on features of that width."""
    return torch.nn.ModuleList(
        torch.nn.Linear(width, len(names) + 1) for names in ATTRIBUTES.values()
    )


def is_hidden(name: str, parameter: torch.Tensor) -> bool:
    """Whether Muon steps it: the matrices of the layers. AdamW steps everything else."""
    return parameter.ndim == 2 and not any(word in name for word in ("embed", "shared", "bias"))


def choose_length(step: int, rng: random.Random) -> int:
    """T5's tokens in a step: mostly short, now and then 64, rarely all 512."""
    if step % 20 == 19:
        return 64
    if step % 150 == 149:
        return 512
    return rng.choice(LENGTHS)


def train(work: Path, minutes: float) -> None:
    """Train for `minutes`, then save text.pt in `work`."""
    torch.manual_seed(2)
    rng = random.Random(2)
    tokenizers.write_clip(work / "tokenizer")
    tokenizers.write_t5(work / "tokenizer_2")
    parts = build(work)
    encoders = Encoders(work, parts)
    torch.nn.init.normal_(parts.text_encoder_2.shared.weight, std=0.5)
    clip_heads = make_heads(CLIP["hidden_size"])
    t5_heads = make_heads(T5["d_model"])

    hidden, weights = [], []
    for module in (encoders.clip, encoders.t5):
        for name, parameter in module.named_parameters():
            weights.append(parameter)
            if is_hidden(name, parameter):
                hidden.append(parameter)
    for heads in (clip_heads, t5_heads):
        weights += heads.parameters()
    by_muon = {id(parameter) for parameter in hidden}
    rest = [parameter for parameter in weights if id(parameter) not in by_muon]
    muon = Muon(hidden, MUON_LR)
    adam = torch.optim.AdamW(rest, lr=ADAM_LR, betas=(0.9, 0.98), weight_decay=0.01, fused=True)

    start = time.time()
    step = 0
    while (spent := (time.time() - start) / (minutes * 60)) < 1:
        facts, prompts = batch(rng, BATCH)
        pooled, tokens = encoders(prompts, choose_length(step, rng))
        target = labels(facts)
        any_token = tokens[torch.arange(BATCH), torch.randint(tokens.shape[1], (BATCH,))]
        clip_loss, clip_right = heads_loss(clip_heads, pooled, target)
        t5_loss, t5_right = heads_loss(t5_heads, any_token, target)
        mean_loss, _ = heads_loss(t5_heads, tokens.mean(1), target)
        (clip_loss + t5_loss + 0.5 * mean_loss).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        factor = schedule(spent, warm=0.03)
        adam.param_groups[0]["lr"] = ADAM_LR * factor
        adam.step()
        muon.step(factor)
        for parameter in weights:
            parameter.grad = None
        step += 1
        if step % 50 == 0:
            clip_line = f"clip {clip_loss.item():.3f} {clip_right:.2f}"
            t5_line = f"t5 {t5_loss.item():.3f} {t5_right:.2f}"
            print(f"{time.time() - start:5.0f} s  step {step}  {clip_line}  {t5_line}", flush=True)
    report(encoders, clip_heads, t5_heads)
    state = {
        "text_encoder": encoders.clip.state_dict(),
        "text_encoder_2": encoders.t5.state_dict(),
    }
    torch.save(state, work / "text.pt")


@torch.no_grad()
def report(
    encoders: Encoders, clip_heads: torch.nn.ModuleList, t5_heads: torch.nn.ModuleList
) -> None:
    """Print the shares of held-out facts that the heads read off the encoders' features."""
    facts, prompts = batch(random.Random(3), 400, held_out=True)
    target = labels(facts)
    for length in (24, 64):
        pooled, tokens = encoders(prompts, length)
        _, clip = heads_loss(clip_heads, pooled, target)
        _, first = heads_loss(t5_heads, tokens[:, 0], target)
        _, last = heads_loss(t5_heads, tokens[:, -1], target)
        print(length, "held out: clip", clip, "t5 first, last", [first, last], flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train the text encoders")
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    train(options.work, options.minutes)
