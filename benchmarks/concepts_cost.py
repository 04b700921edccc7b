"""What concepts cost: predicting them from pictures, keeping words by them, a stage that predicts masked words.

    python benchmarks/concepts_cost.py [--concepts 10000] [--batch 32] [--rounds 9]

A step is forward, backward and fused AdamW in fp32, half of the patches masked in clusters, without and with a head for
so many concepts, of which a caption names five. Steps are interleaved; times are medians of ratios within a round.
`predict_share` and `keep_share` are of the step without: operations of the head (the optimiser's aside), and the time
that cutting a caption of 30 words to 16 tokens takes a loader's core beyond that of encoding it. `mlm_share` and
`mlm_time_ratio` are of a step that predicts masked words of the same captions, nothing else, over the step without:
operations, and time; `mlm_us_per_caption` is what a loader's core takes to encode a caption of 12 words and mask it.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from record import record
from torch import Tensor
from training_steps import make_batch

from formats.concepts import Concept, Concepts
from model.clip import CLIP
from model.flops import label_flops, masked_word_flops, step_flops
from model.heads import ConceptHead, Labels, NamedConcepts
from model.loss import contrastive_loss
from model.masked_words import MaskedWordCLIP, MaskedWords
from model.masking import MaskingConfig, PatchedImages, choose_patches
from model.packing import lengths_to_cu_seqlens, pack_tokens
from pipeline.data.captions import Tokenizer, TokenSpans
from pipeline.data.curriculum import Curriculum
from pipeline.data.masked_words import MASKED_SHARE, CaptionMasker
from pipeline.data.text_masking import TextMasker
from pipeline.recipe import OptimizerSection, TextMaskingSection
from pipeline.training.engines.optimizer import freeze_towers

NAMED, WORDS, MAX_TOKENS, SHORT = 5, 30, 16, 12


def make_steps(concepts: int, pairs: int) -> dict[str, Callable[[], None]]:
    """A step without and with the head, each of a model of its own."""
    batch = make_batch(pairs, 224)
    is_token_BT = torch.arange(batch.tokens_BT.shape[1]) < batch.lengths_B[:, None]
    text = pack_tokens(batch.tokens_BT[is_token_BT], lengths_to_cu_seqlens(batch.lengths_B), batch.tokens_BT.shape[1])
    generator = torch.Generator().manual_seed(0)
    numbers = torch.rand(pairs, concepts, generator=generator).topk(NAMED, dim=1).indices.flatten()
    labels = Labels(numbers, lengths_to_cu_seqlens(torch.full((pairs,), NAMED)))

    def make(named: NamedConcepts | None) -> Callable[[], None]:
        clip = CLIP.from_name("ViT-B-16")
        if named:
            clip.heads["concepts"] = ConceptHead(clip.config.embed_dim, [20] * concepts, 1_000_000)
        optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-5, fused=True)

        def step() -> None:
            optimizer.zero_grad()
            images = PatchedImages(batch.images_BCHW, 16)
            selection = choose_patches(images, MaskingConfig(strategy="cluster"), generator).selection
            output = clip(images.gather(selection.kept_K), selection, text, None, named)
            loss = contrastive_loss(*output.for_pairs)
            (loss + output.concepts.loss if output.concepts else loss).backward()
            optimizer.step()

        return step

    words = make_words(text.tokens_N)
    tower = MaskedWordCLIP(CLIP.from_name("ViT-B-16").config)
    freeze_towers(tower, OptimizerSection())
    optimizer = torch.optim.AdamW([p for p in tower.parameters() if p.requires_grad], lr=1e-5, fused=True)

    def predict_words() -> None:
        optimizer.zero_grad()
        tower(text, words).loss.backward()
        optimizer.step()

    return {"without": make(None), "predict": make(NamedConcepts(labels, concepts)), "mlm": predict_words}


def make_words(tokens_N: Tensor) -> MaskedWords:
    """The share of tokens that is masked."""
    count = round(MASKED_SHARE * len(tokens_N))
    return MaskedWords(torch.arange(count), Labels(tokens_N[:count], torch.arange(count + 1, dtype=torch.int32)))


class _OneTokenAWord:
    """The fastest of tokenizers: what it leaves is the cost of choosing."""

    vocab_size, start_token_id, end_token_id = 1 << 20, 0, 1

    def encode(self, text: str) -> list[int]:
        """A number for each word."""
        return [hash(word) & 0xFFFF for word in text.split()]

    def encode_with_spans(self, text: str) -> TokenSpans:
        """The same with their places."""
        return TokenSpans(text, self.encode(text), [match.span() for match in re.finditer(r"\S+", text)])


def make_cuts(concepts: int) -> dict[str, Callable[[], None]]:
    """Encoding a thousand captions, and cutting them."""
    names = [f"concept{number}" for number in range(concepts)]
    known = Concepts([Concept(name, 1 + number % 4, 20, 1) for number, name in enumerate(names)], 10**6, "")
    known = Concepts(sorted(known.concepts, key=lambda concept: concept.stage), 10**6, "")
    rng = Random(0)
    captions = [" ".join(rng.choices([*names, *["of", "the", "a"] * (concepts // 3)], k=WORDS)) for _ in range(1000)]
    tokenizer = Tokenizer(_OneTokenAWord(), b"", 77)
    word_masker = CaptionMasker(tokenizer, Curriculum(known, ()), "concepts", 77)
    short = [" ".join(caption.split()[:SHORT]) for caption in captions]
    masker = TextMasker(tokenizer, TextMaskingSection(max_tokens=MAX_TOKENS), Curriculum(known, ()))

    def cut() -> None:
        for number, caption in enumerate(captions):
            masker.encode(caption, Random(f"0/{number}/text"))

    def plain() -> None:
        for number, caption in enumerate(captions):
            Random(f"0/{number}/text")
            tokenizer.encode(caption)

    def mask() -> None:
        for number, caption in enumerate(short):
            word_masker.mask(caption, Random(f"0/{number}/text"), 0)

    return {"plain": plain, "keep": cut, "mask": mask}


def seconds(call: Callable[[], None]) -> float:
    """One call's time."""
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concepts", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    calls = make_steps(options.concepts, options.batch) | make_cuts(options.concepts)
    times_s: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, options.rounds):  # the first warms up
        for name in [*calls][number % len(calls) :] + [*calls][: number % len(calls)]:
            elapsed_s = seconds(calls[name])
            if number >= 0:
                times_s[name].append(elapsed_s)
    ratios = [a / b for a, b in zip(times_s["predict"], times_s["without"], strict=True)]
    pair_s = statistics.median(times_s["without"]) / options.batch
    cut_s = statistics.median(a - b for a, b in zip(times_s["keep"], times_s["plain"], strict=True)) / 1000
    config = CLIP.from_name("ViT-B-16").config
    lengths = make_batch(options.batch, 224).lengths_B.tolist()
    whole_flops = step_flops(config, [98] * options.batch, lengths)
    word_flops = masked_word_flops(config.text, lengths, round(MASKED_SHARE * sum(lengths)))
    word_ratios = [a / b for a, b in zip(times_s["mlm"], times_s["without"], strict=True)]
    figures = {
        "predict_share": round(label_flops(options.batch, config.embed_dim, options.concepts) / whole_flops, 6),
        "predict_time_ratio": round(statistics.median(ratios), 4),
        "predict_time_quartiles": [round(q, 4) for q in statistics.quantiles(ratios, n=4)[::2]],
        "keep_share": round(cut_s / pair_s, 6),
        "keep_us_per_caption": round(cut_s * 1e6, 1),
        "mlm_share": round(word_flops / whole_flops, 4),
        "mlm_time_ratio": round(statistics.median(word_ratios), 4),
        "mlm_time_quartiles": [round(q, 4) for q in statistics.quantiles(word_ratios, n=4)[::2]],
        "mlm_us_per_caption": round(statistics.median(times_s["mask"]) * 1000, 1),
        "concepts": options.concepts,
        "batch": options.batch,
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    command = f"python benchmarks/concepts_cost.py --concepts {options.concepts} --batch {options.batch}"
    print(record("concepts_cost", figures, command, options.rounds))


if __name__ == "__main__":
    main()
