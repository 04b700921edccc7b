"""Masked words of captions, predicted by the text tower alone: a head, and the model whose training pass is that.

N tokens of a batch of captions, R of them to be predicted, B captions, D width of the text tower, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.clip import CLIP
from model.config import CLIPConfig
from model.heads import LabelLoss, Labels, label_loss
from model.packing import PackedTokens
from model.towers import mean_of_tokens

HEAD = "mlm"


class MaskedWords(NamedTuple):
    """What is to be predicted: token_R, places among the packed tokens, and the true tokens there as their labels.

    A place without a label costs nothing: a batch in which nothing is masked has one.
    """

    token_R: Tensor
    labels: Labels

    @property
    def num_masked(self) -> int:
        """Tokens to be predicted."""
        return self.labels.class_M.numel()

    def among_first(self, tokens: int) -> MaskedWords:
        """Those of the first so many packed tokens."""
        count = int((self.token_R[: self.num_masked] < tokens).sum())
        ends_R1 = self.labels.cu_labels_B1[: max(1, count) + 1].clamp(max=count)
        return MaskedWords(
            self.token_R[: max(1, count)].clamp(max=tokens - 1), Labels(self.labels.class_M[:count], ends_R1)
        )


class WordLoss(NamedTuple):
    """Mean cross-entropy over places, to be differentiated; share of places predicted; whether captions are finite."""

    loss: Tensor
    hits: Tensor
    finite_B: Tensor


class MaskEmbedding(nn.Module):
    """What stands where a token is masked: a vector of the head's, no entry of the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, tokens_N: Tensor, embedding: nn.Embedding) -> Tensor:
        """Embeddings [N, D]; the id after the vocabulary's last is a mask."""
        mask_id = embedding.num_embeddings
        x_ND = embedding(tokens_N.clamp(max=mask_id - 1))
        return torch.where((tokens_N == mask_id)[:, None], self.weight.to(x_ND.dtype), x_ND)


class MaskedWordHead(nn.Module):
    """BERT's head (Devlin et al. 2019): a layer, GELU, a norm, then the embedding of tokens again, and a bias."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.mask = MaskEmbedding(width)
        self.transform = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        nn.init.normal_(self.transform.weight, std=width**-0.5)
        nn.init.zeros_(self.transform.bias)

    def forward(self, x_RD: Tensor, embedding_VD: Tensor, labels: Labels) -> LabelLoss:
        """Loss and hits of the places; the logits [R, V] are never there as a whole."""
        x_RD = self.norm(F.gelu(self.transform(x_RD)))
        vocab_size = len(self.bias)
        all_alike_V = torch.ones(vocab_size, device=x_RD.device)
        return label_loss(x_RD, embedding_VD, self.bias, labels, all_alike_V, vocab_size)


class MaskedWordCLIP(CLIP):
    """A CLIP whose training pass predicts masked words: no pictures, and nothing learns but text tower and head."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config)
        self.heads[HEAD] = MaskedWordHead(config.text.width, config.text.vocab_size)

    def forward(self, text: PackedTokens, words: MaskedWords) -> WordLoss:  # type: ignore[override]
        """The training pass."""
        return self.predict(text, words)

    def predict(self, text: PackedTokens, words: MaskedWords) -> WordLoss:
        """Masked tokens of captions, in which the id after the vocabulary's last stands for them."""
        head = cast(MaskedWordHead, self.heads[HEAD])
        x_ND = self.text(text, head.mask)
        # looked up: under ZeRO stage 3 the embedding is whole only while its module runs
        everything_V = torch.arange(self.config.text.vocab_size, device=x_ND.device)
        found = cast(LabelLoss, head(x_ND[words.token_R], self.text.token_embedding(everything_V), words.labels))
        finite_B = mean_of_tokens(x_ND.detach(), text.layout).sum(1).isfinite()
        return WordLoss(found.loss, found.hits, finite_B)

    def idle_parameters(self) -> Iterator[nn.Parameter]:
        """The image tower, the projection of captions, and what is between the towers."""
        yield from self.visual.parameters()
        yield self.text.text_projection
        yield self.logit_scale
        if self.logit_bias is not None:
            yield self.logit_bias
