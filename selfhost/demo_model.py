"""A tiny but real model directory: everything a frontend needs to tokenise and template, no weights.

`selfhost demo` serves it, and the tests let a real frontend build its chat pipeline from it. The
tokenizer knows single bytes only (a byte-level BPE without merges), so every text can be encoded.
Standard library only; the same directory is written every time, byte for byte.
"""

from __future__ import annotations

import json
import os
from typing import Any

CONTEXT_LENGTH = 512  # tokens
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TURN = SPECIAL_TOKENS[2]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def write_demo_model(directory: str) -> None:
    """Write the files of the demo model into `directory`, which is made when it is missing.

    Files of the same names are overwritten. Raises OSError.
    """
    os.makedirs(directory, exist_ok=True)
    for name, text in sorted(_files().items()):
        with open(os.path.join(directory, name), "w", encoding="utf-8", newline="\n") as file:
            file.write(text)


def _files() -> dict[str, str]:
    vocabulary = _vocabulary()
    return {
        "config.json": _json(_config(vocabulary)),
        "generation_config.json": _json(_generation_config(vocabulary)),
        "tokenizer.json": _json(_tokenizer(vocabulary)),
        "tokenizer_config.json": _json(_tokenizer_config(vocabulary)),
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _vocabulary() -> dict[str, int]:
    """Give every special token and every byte's letter its number."""
    return {token: number for number, token in enumerate((*SPECIAL_TOKENS, *_byte_letters()))}


def _byte_letters() -> list[str]:
    """Return one visible character for each of the 256 bytes, as byte-level BPE has them since GPT-2."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    invisible = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(256 + invisible.index(byte)) for byte in range(256)]


def _config(vocabulary: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "max_position_embeddings": CONTEXT_LENGTH,
        "vocab_size": len(vocabulary),
        "bos_token_id": vocabulary["<|endoftext|>"],
        "eos_token_id": vocabulary[END_OF_TURN],
    }


def _generation_config(vocabulary: dict[str, int]) -> dict[str, Any]:
    return {
        "bos_token_id": vocabulary["<|endoftext|>"],
        "eos_token_id": [vocabulary[END_OF_TURN], vocabulary["<|endoftext|>"]],
        "max_new_tokens": 64,
    }


def _added_token(content: str) -> dict[str, Any]:
    return {
        "content": content,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "single_word": False,
        "special": True,
    }


def _tokenizer(vocabulary: dict[str, int]) -> dict[str, Any]:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocabulary[token], **_added_token(token)} for token in SPECIAL_TOKENS],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def _tokenizer_config(vocabulary: dict[str, int]) -> dict[str, Any]:
    return {
        "added_tokens_decoder": {str(vocabulary[token]): _added_token(token) for token in SPECIAL_TOKENS},
        "bos_token": None,
        "eos_token": END_OF_TURN,
        "pad_token": "<|endoftext|>",
        "model_max_length": CONTEXT_LENGTH,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
