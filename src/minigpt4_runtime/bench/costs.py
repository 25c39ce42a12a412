"""The least that a model must compute and read, derived from its shape.

Owns   the counts of operations and bytes that are compared with the machine's ceilings.
Takes  a ModelConfig. A multiplication and an addition count as two operations.
Never  counts norms, softmax or activations: nearly all the work is matrix products.
"""

from minigpt4_runtime.config import ModelConfig, QFormerConfig, VisionConfig


def vision_gigaflops(config: ModelConfig) -> float:
    """The operations for one image: tower, Q-Former and projection."""
    rows = config.vision.num_patches + 1
    flops = _tower_flops(config.vision, rows)
    if config.qformer is not None:
        flops += _qformer_flops(config.qformer, config.vision.hidden_size, rows)
    flops += 2 * config.rows_per_image * config.projection_width * config.language.hidden_size
    return flops / 1e9


def _tower_flops(vision: VisionConfig, rows: int) -> int:
    width = vision.hidden_size
    patches = 2 * vision.num_patches * 3 * vision.patch_size**2 * width
    products = 2 * rows * (4 * width**2 + 2 * width * vision.intermediate_size)
    return patches + vision.num_hidden_layers * (products + _attention_flops(rows, rows, width))


def _qformer_flops(qformer: QFormerConfig, vision_width: int, rows: int) -> int:
    queries, width = qformer.num_query_tokens, qformer.hidden_size
    each = 2 * queries * (4 * width**2 + 2 * width * qformer.intermediate_size)
    each += _attention_flops(queries, queries, width)
    crossing = 2 * queries * 2 * width**2 + 2 * rows * 2 * vision_width * width
    crossing += _attention_flops(queries, rows, width)
    num_crossing = -(-qformer.num_hidden_layers // qformer.cross_attention_frequency)
    return qformer.num_hidden_layers * each + num_crossing * crossing


def _attention_flops(queries: int, keys: int, width: int) -> int:
    return 2 * 2 * queries * keys * width


def step_bytes(config: ModelConfig, *, num_tokens: int, num_answers: int) -> int:
    """An upper estimate of a step's memory beside weights and cache.

    It counts a layer's widest rows in float32, and the logits of the answers that are sampled.
    """
    language = config.language
    rows = num_tokens * (6 * language.hidden_size + 3 * language.intermediate_size)
    return 4 * (rows + 2 * num_answers * language.vocab_size)
