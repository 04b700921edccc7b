"""Causal text transformer on captions at their true lengths.

B captions, N tokens in all, D width
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from model.config import TextConfig
from model.packing import PackedTokens
from model.transformer import Transformer


class TextTransformer(nn.Module):
    """Text tower whose feature is the last token, end-of-text. Packed and padded text give the same feature."""

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(
            config.width, config.layers, config.heads, config.mlp_ratio, causal=True, activation=config.activation
        )
        self.ln_final = nn.LayerNorm(config.width)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))
        self._init_parameters()

    def _init_parameters(self) -> None:
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.transformer.width**-0.5)
        self.transformer.init_parameters()

    def forward(self, text: PackedTokens) -> Tensor:
        """Features of the captions, [N] tokens -> [B, embed_dim]. No caption may exceed the context length."""
        layout = text.layout
        num_tokens = text.tokens_N.numel()
        first_N = layout.first_token_B[layout.sequence_N(num_tokens)]
        position_N = torch.arange(num_tokens, device=first_N.device) - first_N
        x_ND = cast(Tensor, self.token_embedding(text.tokens_N))
        x_ND = x_ND + self.positional_embedding.index_select(0, position_N)
        pooled_BD = self.transformer.forward_pooled(x_ND, layout.last_token_B, layout)
        return cast(Tensor, self.ln_final(pooled_BD)) @ self.text_projection
