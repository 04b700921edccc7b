"""Memory of one rank by part, at each moment of a step that can be its peak; docs/plan.md.

W ranks, B pairs of a micro-batch or sequences of a tower, G = B * W, E embed_dim
N tokens, D width, M width within the MLP, H heads, K kept patches, P values of a patch
"""

from __future__ import annotations

from dataclasses import dataclass

from model.heads import TILE_ELEMENTS
from pipeline.planning.workload import Tower, Workload

_FP32, _FP64, _INDEX = 4, 8, 8
_MIB = 1 << 20
# Of a GPU and outside of what tensors occupy: the CUDA context, NCCL's buffers, libraries' workspaces.
RESERVED_BYTES = 1536 * _MIB
# Share of the tensors' bytes that the allocator cannot use between them.
FRAGMENTATION = 0.03
# Without ZeRO gradients are copied together, so many elements at a time.
_ENGINE_BUCKET = 500_000_000
# What cuBLAS keeps as a tensor, for one stream.
_WORKSPACE_BYTES = 32 * _MIB
# Mean and deviation of a norm's input
_NORM_STATISTICS = 2 * _FP32
_FLASH_BLOCK = 128


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak: `parts` by name, and the moment; `host_bytes` is what is offloaded to the CPU."""

    moment: str
    parts: dict[str, int]
    host_bytes: int

    @property
    def tensor_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def device_bytes(self) -> int:
        """With what lies beside the tensors on a GPU."""
        return round(self.tensor_bytes * (1 + FRAGMENTATION)) + RESERVED_BYTES


def estimate_memory(load: Workload, on_gpu: bool = True) -> Memory:
    """The largest of the moments that can be the peak: backward begins, in the image tower, ends; update."""
    states = _states(load)
    host_bytes = _move_to_host(load, states)
    always = {**states, "batch": _batch(load), "workspace": _WORKSPACE_BYTES if on_gpu else 0}
    buckets = {"communication buckets": _buckets(load)}
    vision, text = vision_memory(load), text_memory(load)
    width, sizes = load.weight_bytes, load.parameters
    moments = {
        "the backward pass begins": {
            **always,
            **buckets,
            "loss": _loss(load),
            "activations": vision.saved + text.saved,
            "backward pass": text.transient,
            "gradients": _gradients(load, 0),
        },
        "the backward pass is in the image tower": {
            **always,
            **buckets,
            "activations": vision.saved,
            "backward pass": max(vision.transient, _last_of_text(load)),
            "gradients": _gradients(load, width * sizes.text),
        },
        "the backward pass ends": {
            **always,
            **buckets,
            "gradients": _gradients(load, width * sizes.trained) + _on_the_way(load),
        },
        "the weights are updated": {
            **always,
            **_update(load),
            "gradients": _gradients(load, width * sizes.trained),
        },
    }
    moment, parts = max(moments.items(), key=lambda item: sum(item[1].values()))
    return Memory(moment, {name: size for name, size in parts.items() if size}, host_bytes)


def _states(load: Workload) -> dict[str, int]:
    """What is there between steps."""
    sizes, W, width = load.parameters, load.world_size, load.weight_bytes
    # matrices in bf16, kept from the forward pass to the backward pass
    is_cast = load.precision == "autocast" and not load.checkpoint_blocks
    extra = {
        "cast weights": 2 * (sizes.total - sizes.embeddings) if is_cast else 0,
        "attentive copy": _FP32 * sizes.vision if load.attentive else 0,
        # DeepSpeed's optimizer for stage 1 then adds up all of them on every rank
        "sums of gradients": _FP32 * sizes.trained if load.zero_stage == 1 and load.sums_in_fp32 else 0,
    }
    average = _FP32 * sizes.trained * load.averages_weights
    master, moments = _FP32 * sizes.trained, _FP32 * (2 * sizes.trained - sizes.with_muon)
    if load.zero_stage == 0:
        parts = {"weights": width * sizes.total, "master weights": master * (width == 2), "optimizer states": moments}
        return parts | extra | {"averaged weights": average}
    # DeepSpeed keeps a master copy of a share that is in fp32 already
    shares = {"master weights": master // W, "optimizer states": moments // W, "averaged weights": average // W}
    if load.zero_stage < 3:
        return {"weights": width * sizes.total} | shares | extra
    whole = width * sizes.persistent if W > 1 else 0
    parts = {
        "weights": width * sizes.total // W + whole,
        "gathered weights": width * min(sizes.total - sizes.persistent, load.max_live) if W > 1 else 0,
    }
    return parts | shares | extra


def _move_to_host(load: Workload, states: dict[str, int]) -> int:
    """Take what is offloaded out of `states`; returns its bytes."""
    moved = 0
    if load.offload_optimizer:
        moved += states.pop("master weights") + states.pop("optimizer states") + states.pop("averaged weights")
        moved += _FP32 * load.parameters.trained // load.world_size  # the gradients that the CPU updates from
    if load.offload_parameters:
        moved += states.pop("weights")
    return moved


def _buckets(load: Workload) -> int:
    """Where gradients wait to be averaged; DeepSpeed allocates them whole, however small the model."""
    if load.zero_stage == 0 or (load.zero_stage == 1 and load.sums_in_fp32):
        return 0
    copies = 2 if load.overlaps_reduction and load.zero_stage < 3 else 1
    if load.precision == "autocast":
        copies *= 2  # gradients in bf16 have buckets of their own
    width = load.weight_bytes
    if load.reduces_in_fp32:  # sums are in fp32 already, in stage 2 at least; else a copy of the bucket is
        width = _FP32 if load.sums_in_fp32 and load.zero_stage < 3 else width + _FP32
    return copies * width * load.reduce_bucket


def _gradients(load: Workload, so_far: int) -> int:
    """What a rank keeps outside of buckets, of `so_far` bytes of the last micro-batch and all of those before it."""
    if load.zero_stage == 3:
        return load.sum_bytes * load.parameters.trained // load.world_size  # a buffer that is always there
    whole = (load.sum_bytes if load.zero_stage == 2 else load.weight_bytes) * load.parameters.trained
    computed = whole if load.accumulation_steps > 1 else so_far
    if load.zero_stage == 0 or (load.zero_stage == 1 and load.accumulation_steps > 1) or load.world_size == 1:
        return computed
    # a tensor across the border of two shares is held whole by both
    return min(computed, computed // load.world_size + load.weight_bytes * load.parameters.largest)


def _last_of_text(load: Workload) -> int:
    """In stage 3 the gradient of the token embedding, the text tower's last, before it is copied into a bucket."""
    is_beside = load.zero_stage == 3 and load.parameters.text > 0
    return load.weight_bytes * load.parameters.embeddings if is_beside else 0


def _on_the_way(load: Workload) -> int:
    """Gradients that are copied to be averaged: without ZeRO many together, in stage 3 a bucket's.

    In stages 1 and 2 what joins the largest tensor, which a rank holds whole.
    """
    sizes, width = load.parameters, load.weight_bytes
    if load.zero_stage == 0:
        return width * min(sizes.trained, _ENGINE_BUCKET)
    if load.zero_stage == 3:
        return width * min(sizes.trained, max(load.reduce_bucket, sizes.largest))
    return width * min(sizes.largest, sizes.trained - sizes.largest)


def _update(load: Workload) -> dict[str, int]:
    """The gradients in fp32 of the group that is updated, or the copy in fp64 for the norm of the largest tensor."""
    W, width, sizes = load.world_size, load.weight_bytes, load.parameters
    if load.zero_stage == 0:
        return {"update": _FP32 * sizes.trained if width == 2 else 0}
    share = sizes.largest_group // W
    largest = sizes.largest // W if load.zero_stage == 3 else min(sizes.largest, share)
    norm = _FP64 * largest if load.norm_in_fp64 else 0
    group = share * (width + (_FP32 if width == 2 else 0))
    # Muon: the directions of all in bf16, and of a share its gradients, direction, momentum as moved, and update
    muon = load.parameters.with_muon * (2 + 4 * _FP32 // W) if W > 1 else 0
    parts = {"update": max(group, norm, muon)}
    if load.zero_stage == 3:
        parts |= {"gathered weights": 0, "communication buckets": _buckets(load)}
    return parts


def _batch(load: Workload) -> int:
    """Images in bytes, indices and ids; the kept patches are among what the image tower keeps."""
    return load.vision.sequences * 3 * load.model.vision.image_size**2 + _INDEX * (load.patches + load.text.tokens)


def _loss(load: Workload) -> int:
    """Features of all ranks and the gradients at them, both sides' own gradients, three tiles of logits.

    Of masked words the embedding of tokens, looked up, and two gradients at it; a tile of logits, and its exponentials.
    """
    if load.masked_words:
        vocabulary, width = load.model.text.vocab_size, load.text.width
        tile = min(TILE_ELEMENTS, load.masked_words * vocabulary)
        return (2 * _FP32 + load.weight_bytes) * vocabulary * width + 2 * _FP32 * tile
    B, G, E = load.micro_batch_size, load.global_micro_batch, load.model.embed_dim
    columns = G if load.exchange == "gather" else min(G, 4 * B)
    tile = min(load.tile_size, B) * min(load.tile_size, columns)
    return _FP32 * (2 * columns * E + 2 * B * E + 3 * tile)


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
    tower, ids = load.text, _INDEX * load.text.tokens
    if load.model.text.pool == "last" and not load.masked_words:
        return _tower_memory(tower, load, ids, tower.layers - 1, _pooled_block(tower, load))
    norm = load.weight_bytes * tower.tokens * tower.width  # over all tokens
    return _tower_memory(tower, load, ids, tower.layers, norm)


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
