"""Tiny language models in GGUF files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quants
from tokenizers.pre_tokenizers import ByteLevel

LAYERS, WIDTH, FFN, HEADS, KV_HEADS = 2, 32, 64, 4, 2
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), "he"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = (
    f"model.layers={LAYERS}",
    f"model.width={WIDTH}",
    f"model.heads={HEADS}",
    f"model.kv_heads={KV_HEADS}",
    f"model.head_width={WIDTH // HEADS}",
    f"model.ffn_width={FFN}",
    f"model.vocabulary={len(TOKENS)}",
)
"""What a configuration says of its shape."""


def write_gguf(
    path: Path,
    *,
    blocks: str = "Q4_1",
    architecture: str = "llama",
    template: str | None = TEMPLATE,
) -> dict[str, np.ndarray]:
    """Write a model of random weights.

    Args:
        path: of the file.
        blocks: the type of its matrices; the embedding is Q8_0, norms are F32.
        architecture: what its metadata say that it is; tensors are a Llama's.
        template: its chat template.

    Returns:
        {tensor: its values, as the blocks hold them}.
    """
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    kinds = [TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(TOKENS) - len(SPECIAL))
    writer.add_token_types(kinds)
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    if template is not None:
        writer.add_chat_template(template)
    random, held = np.random.default_rng(0), {}
    for name, shape in _shapes().items():
        values = random.normal(1.0 if "norm" in name else 0.0, 0.2, shape).astype(np.float32)
        kind = "F32" if "norm" in name else "Q8_0" if name.startswith("token") else blocks
        kind = GGMLQuantizationType[kind]
        stored = quants.quantize(values, kind)
        writer.add_tensor(name, stored, raw_dtype=kind)
        held[name] = quants.dequantize(stored, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _shapes() -> dict[str, tuple[int, ...]]:
    key = WIDTH // HEADS * KV_HEADS
    layer = {
        "attn_norm": (WIDTH,),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (key, WIDTH),
        "attn_v": (key, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_norm": (WIDTH,),
        "ffn_gate": (FFN, WIDTH),
        "ffn_up": (FFN, WIDTH),
        "ffn_down": (WIDTH, FFN),
    }
    shapes = {"token_embd.weight": (len(TOKENS), WIDTH), "output_norm.weight": (WIDTH,)}
    return shapes | {
        f"blk.{number}.{name}.weight": shape
        for number in range(LAYERS)
        for name, shape in layer.items()
    }
