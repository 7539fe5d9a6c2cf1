"""Teaches the two text encoders, before the transformer, to know what a sentence states.

CLIP's pooled vector, and every output token of T5 (padding too: FLUX does not mask it), must name the five words of the
fact through throw-away linear heads. A minute or two; afterwards the encoders are frozen, so their outputs can be
cached. Knows nothing about pictures.

    python -m training.text WORK --minutes 2
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from training import data, tokenizers
from training.optim import Muon, schedule

ATTRIBUTES = {
    "colour": list(data.COLOURS),
    "shape": list(data.SHAPES),
    "background": list(data.COLOURS),
    "size": list(data.SIZES),
    "position": list(data.POSITIONS),
}
LENGTHS = (16, 24, 24, 24, 32)


class Encoders:
    """Both tokenizers and encoders of a work folder."""

    def __init__(self, work: Path, parts: object) -> None:
        from transformers import CLIPTokenizer, T5Tokenizer

        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.tokenizer_2 = T5Tokenizer.from_pretrained(work / "tokenizer_2")
        self.clip, self.t5 = parts.text_encoder, parts.text_encoder_2

    def __call__(self, prompts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(pooled (B, 96), tokens (B, length, 128)); CLIP is causal, so padding after its end token may be cut."""
        pad = {"padding": "longest", "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer(prompts, max_length=tokenizers.CLIP_LENGTH, **pad).input_ids
        pad["padding"] = "max_length"
        ids_2 = self.tokenizer_2(prompts, max_length=length, **pad).input_ids
        return self.clip(input_ids=ids).pooler_output, self.t5(input_ids=ids_2).last_hidden_state


def labels(facts: list[data.Fact | None]) -> torch.Tensor:
    """(5, B) class numbers; the last class of each attribute means an empty sentence."""
    return torch.tensor(
        [[len(names) if f is None else names.index(getattr(f, a)) for f in facts] for a, names in ATTRIBUTES.items()]
    )


def heads_loss(heads: torch.nn.ModuleList, features: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(summed cross entropy, share of facts with all five words right) of features (B, width)."""
    logits = [head(features) for head in heads]
    right = torch.stack([o.argmax(-1) == t for o, t in zip(logits, target, strict=False)]).all(0).float().mean().item()
    return sum(F.cross_entropy(o, t, label_smoothing=0.02) for o, t in zip(logits, target, strict=False)), right


def batch(rng: random.Random, count: int, held_out: bool = False) -> tuple[list[data.Fact | None], list[str]]:
    """Facts and sentences; one in twenty is empty."""
    pool = data.held_out_facts() if held_out else None
    facts = [rng.choice(pool) if pool else data.training_fact(rng) for _ in range(count)]
    facts = [None if rng.random() < 0.05 else f for f in facts]
    return facts, ["" if f is None else data.any_prompt(f, rng) for f in facts]


def train(work: Path, minutes: float) -> None:
    """Trains for `minutes`, then saves text.pt in `work`."""
    from training.export import build

    torch.manual_seed(2)
    rng = random.Random(2)
    tokenizers.write_clip(work / "tokenizer")
    tokenizers.write_t5(work / "tokenizer_2")
    parts = build(work)
    encoders = Encoders(work, parts)
    torch.nn.init.normal_(parts.text_encoder_2.shared.weight, std=0.5)
    heads = [
        torch.nn.ModuleList(torch.nn.Linear(width, len(n) + 1) for n in ATTRIBUTES.values()) for width in (96, 128)
    ]
    weights = [p for m in (encoders.clip, encoders.t5, *heads) for p in m.parameters()]
    hidden = [
        p
        for m in (encoders.clip, encoders.t5)
        for n, p in m.named_parameters()
        if p.ndim == 2 and not any(word in n for word in ("embed", "shared", "bias"))
    ]
    chosen, muon = {id(p) for p in hidden}, Muon(hidden, 0.01)
    adam = torch.optim.AdamW(
        [p for p in weights if id(p) not in chosen], lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    start, step = time.time(), 0
    while (spent := (time.time() - start) / (minutes * 60)) < 1:
        facts, prompts = batch(rng, 64)
        pooled, tokens = encoders(prompts, 64 if step % 20 == 19 else 512 if step % 150 == 149 else rng.choice(LENGTHS))
        target = labels(facts)
        any_token = tokens[torch.arange(64), torch.randint(tokens.shape[1], (64,))]
        loss, right = heads_loss(heads[0], pooled, target)
        loss_2, right_2 = heads_loss(heads[1], any_token, target)
        loss_3, _ = heads_loss(heads[1], tokens.mean(1), target)
        (loss + loss_2 + 0.5 * loss_3).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        factor = schedule(spent, warm=0.03)
        adam.param_groups[0]["lr"] = 3e-3 * factor
        adam.step()
        muon.step(factor)
        for parameter in weights:
            parameter.grad = None
        step += 1
        if step % 50 == 0:
            print(
                f"{time.time() - start:5.0f} s  step {step}  clip {loss.item():.3f} {right:.2f}  "
                f"t5 {loss_2.item():.3f} {right_2:.2f}",
                flush=True,
            )
    report(encoders, heads)
    torch.save(
        {"text_encoder": encoders.clip.state_dict(), "text_encoder_2": encoders.t5.state_dict()}, work / "text.pt"
    )


@torch.no_grad()
def report(encoders: Encoders, heads: list[torch.nn.ModuleList]) -> None:
    """Prints the shares of held-out facts that the heads read off the encoders' features."""
    facts, prompts = batch(random.Random(3), 400, held_out=True)
    for length in (24, 64):
        pooled, tokens = encoders(prompts, length)
        print(
            length,
            "held out: clip",
            heads_loss(heads[0], pooled, labels(facts))[1],
            "t5 first, last",
            [heads_loss(heads[1], tokens[:, i], labels(facts))[1] for i in (0, -1)],
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="train the text encoders")
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_flush_denormal(True)
    train(options.work, options.minutes)
