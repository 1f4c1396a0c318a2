"""GGUF file -> Hugging Face folder in fp32. A program of its own: its memory is gone when it ends.

    python -m triton_models.convert_gguf MODEL.gguf OUT_DIR --name NAME --eos-token-id ID [--eos-token-id ID ...]

transformers dequantizes the weights; what it saves then is a plain checkpoint: `model.safetensors` (fp32),
`config.json`, `generation_config.json`, `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def convert(gguf: Path, out_dir: Path, name: str, eos_token_ids: list[int]) -> None:
    """Write `gguf` as a Hugging Face folder; every token id in `eos_token_ids` ends a generation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    model: Any = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # save_pretrained would write the GGUF quantization again and refuse; the weights are dequantized already
    model.hf_quantizer = None
    del model.config.quantization_config
    model.config._name_or_path = name
    eos = eos_token_ids if len(eos_token_ids) > 1 else eos_token_ids[0]
    model.config.eos_token_id = eos
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=tokenizer.pad_token_id
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    for key in ("is_local", "local_files_only"):  # how it was loaded, not what it is
        tokenizer.init_kwargs.pop(key, None)
    model.save_pretrained(out_dir)
    tokenizer.save_pretrained(out_dir)


def main(argv: list[str] | None = None) -> int:
    """Command line of the conversion."""
    parser = argparse.ArgumentParser(prog="python -m triton_models.convert_gguf", description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--eos-token-id", type=int, action="append", required=True)
    args = parser.parse_args(argv)
    convert(args.gguf, args.out_dir, args.name, args.eos_token_id)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
