"""Bytes that autograd keeps for the backward pass of packed towers, and what that pass needs on top; docs/plan.md.

N tokens, B sequences, D width, M width within the MLP, H heads, K kept patches, P values of a patch, E embed_dim
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.planning.workload import Tower, Workload

_FP32, _INDEX = 4, 8
# mean and deviation of a norm's input
_NORM_STATISTICS = 2 * _FP32
_FLASH_BLOCK = 128


@dataclass(frozen=True)
class TowerMemory:
    """Of one tower, in bytes.

    saved: what the forward pass leaves
    transient: the most that its own backward pass has alive beside that
    """

    saved: int
    transient: int


def vision_memory(load: Workload) -> TowerMemory:
    """The image tower with its patch embedding and its pooling; a frozen one keeps nothing."""
    if not load.parameters.vision:
        return TowerMemory(0, 0)
    tower, compute, between = load.vision, load.compute_bytes, load.weight_bytes
    P = 3 * load.model.vision.patch_size**2
    saved = compute * load.patches * P + _INDEX * (load.patches + tower.tokens)
    # before and after class tokens are put in their places, which is what the first norm reads
    saved += 2 * between * tower.tokens * tower.width + _NORM_STATISTICS * tower.tokens
    if load.model.vision.pool == "class":
        return _tower_memory(tower, load, saved, tower.layers - 1, _pooled_block(tower, load))
    # a norm over all tokens, and of SigLIP's head key and value
    pooling = between * tower.tokens * tower.width
    pooling += 2 * compute * tower.tokens * tower.width if load.model.vision.pool == "attention" else 0
    return _tower_memory(tower, load, saved, tower.layers, pooling)


def text_memory(load: Workload) -> TowerMemory:
    """The text tower; its ids are part of the batch."""
    if not load.parameters.text:
        return TowerMemory(0, 0)
    tower = load.text
    return _tower_memory(tower, load, _INDEX * tower.tokens, tower.layers - 1, _pooled_block(tower, load))


def _tower_memory(tower: Tower, load: Workload, embedding: int, whole_blocks: int, pooling: int) -> TowerMemory:
    compute, between = load.compute_bytes, load.weight_bytes
    ND = tower.tokens * tower.width
    block, block_input = block_saved(tower, load), between * ND
    kept_of_block = block_input if load.checkpoint_blocks else block
    # the backward pass begins at the pooled tokens: their gradient among all tokens, those of all keys and values
    at_pooling = block_input + 2 * compute * ND + _flash_workspace(tower, load)
    # then, what pooling kept being gone, a block: recomputed, the gradients of its output and within its MLP
    in_block = block - kept_of_block - pooling + block_input + compute * tower.tokens * tower.hidden
    in_block += compute * ND if compute != between else 0  # cast
    return TowerMemory(
        saved=embedding + whole_blocks * kept_of_block + pooling + _features(tower, load),
        transient=max(at_pooling, in_block),
    )


def block_saved(tower: Tower, load: Workload) -> int:
    """Of one block over all tokens: inputs of two norms, of four products (one has three outputs), of GELU."""
    compute, between = load.compute_bytes, load.weight_bytes
    per_token = 2 * between * tower.width + compute * (6 * tower.width + 2 * tower.hidden) + 2 * _NORM_STATISTICS
    return tower.tokens * per_token + _attention_saved(tower, load)


def _attention_saved(tower: Tower, load: Workload) -> int:
    """Beside query, key, value and output: the log-sum-exp of each query, or all probabilities."""
    if load.attention == "products":
        return load.compute_bytes * tower.heads * tower.square_lengths
    return _FP32 * tower.heads * tower.tokens


def _flash_workspace(tower: Tower, load: Workload) -> int:
    """Flash attention adds up the gradients of queries, one a sequence, in fp32 and in blocks of 128."""
    if load.attention != "varlen":
        return 0
    head_width = -(-tower.width // tower.heads // 32) * 32
    return _FP32 * (1 + _FLASH_BLOCK) * tower.sequences * tower.heads * head_width


def _pooled_block(tower: Tower, load: Workload) -> int:
    """The last block, computed for one token of each sequence: key and value of all, the rest of B."""
    compute, between = load.compute_bytes, load.weight_bytes
    N, B, D = tower.tokens, tower.sequences, tower.width
    per_token = between * D + 3 * compute * D + _NORM_STATISTICS
    per_sequence = between * D + compute * (4 * D + 2 * tower.hidden) + 2 * _INDEX
    return N * per_token + B * per_sequence


def _features(tower: Tower, load: Workload) -> int:
    """The last norm, the projection, and unit length in fp32."""
    B, D, E = tower.sequences, tower.width, load.model.embed_dim
    return B * (2 * load.weight_bytes * D + 2 * _FP32 * E)
