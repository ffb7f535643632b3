"""Public model families: is each read as by the reference library, or refused in one line?

    python bench/families.py     # a minute; prints a table, writes families.json

Each model has the fields of a public config.json that decide what is computed, with tiny random
weights made by transformers, which also says what is right. Tokenizers and chat templates are
compared with `tokenizers`, sentencepiece and `mistral-common`. Needs the packages of the extra
`test`, and nothing from the network.
"""

import argparse
import itertools
import json
import pathlib
import random
import shutil
import sys
import tempfile
from functools import partial

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import sentencepiece
import tokenizers
import torch
import transformers

from bench import public_models as public
from clip_moe import CLIPVision, CLIPVisionConfig
from cumo import CuMo, CuMoConfig
from data.chat import render
from data.chat_template import native_template
from data.tokenizer import Tokenizer
from data.weights import read_config, write_json
from llm import LLM, LLMConfig

SMALL = dict(vocab_size=61, hidden_size=48, intermediate_size=72, num_hidden_layers=3,
             num_attention_heads=6, num_key_value_heads=2, initializer_range=0.15)  # fmt: skip
LLAMA31 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0,
               high_freq_factor=4.0, original_max_position_embeddings=8192)  # fmt: skip
ROPE = lambda theta: {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
MIXED = ["full_attention", "sliding_attention", "sliding_attention"]
LANGUAGE = {  # model -> (transformers' class, fields for it, fields only in config.json)
    "Mistral-7B v0.1": ("Mistral", dict(sliding_window=9) | ROPE(1e4), {}),
    "Mistral-7B-Instruct v0.2, v0.3": ("Mistral", dict(sliding_window=None) | ROPE(1e6), {}),
    "Mistral-Nemo": ("Mistral", dict(head_dim=16, sliding_window=None) | ROPE(1e6), {}),
    "Ministral-8B": ("Mistral", dict(sliding_window=9), dict(layer_types=MIXED)),
    "the same, every layer full": ("Mistral", dict(sliding_window=None),
                                   dict(sliding_window=9, layer_types=MIXED[:1] * 3)),
    "Mixtral-8x7B, 8x22B": ("Mixtral", dict(num_local_experts=4, sliding_window=None), {}),
    "Llama-2": ("Llama", dict(num_key_value_heads=6), {}),
    "Llama-3": ("Llama", ROPE(5e5), {}),
    "Llama-3.1": ("Llama", dict(rope_parameters=LLAMA31), {}),
    "Llama-3.2": ("Llama", dict(rope_parameters=LLAMA31 | {"factor": 32.0},
                                tie_word_embeddings=True), {}),
    "Llama, linear RoPE (Vicuna 16k)": ("Llama", dict(rope_parameters=dict(
        rope_type="linear", rope_theta=1e4, factor=4.0)), {}),
    "Llama, dynamic RoPE": ("Llama", {}, dict(rope_scaling=dict(type="dynamic", factor=2.0))),
    "Llama, a left-over window": ("Llama", {}, dict(sliding_window=4)),
    "TinyLlama, SmolLM2": ("Llama", dict(tie_word_embeddings=True), {}),
    "AWQ, GPTQ, bitsandbytes, FP8": ("Llama", {}, dict(quantization_config=dict(
        quant_method="awq", bits=4))),
    "Qwen2": ("Llama", {}, dict(model_type="qwen2")),
}  # fmt: skip
VISION = {
    "CLIP ViT-B/32 (a config without defaults)": ({}, {}, {}),
    "CLIP ViT-L/14-336": (dict(image_size=28, patch_size=7), {}, {}),
    "LAION CLIP-H (gelu)": (dict(hidden_act="gelu"), {}, {}),
    "LAION CLIP-L (mean and std 0.5)": ({}, {}, dict(image_mean=[0.5] * 3, image_std=[0.5] * 3)),
    "SigLIP-SO400M": ({}, dict(model_type="siglip_vision_model"), {}),
}
MULTIMODAL = {
    "CuMo-mistral-7b": {},
    "LLaVA, select_feature cls_patch": dict(mm_vision_select_feature="cls_patch"),
    "LLaVA, mm_use_im_start_end": dict(mm_use_im_start_end=True),
}
LLAVA = {  # model -> (language model, where its CLIP is, or llava-hf's layout, changed fields)
    "LLaVA-1.5": ("Llama", "without CLIP", {}),
    "LLaVA-1.6-Mistral": ("Mistral", "whole", dict(image_aspect_ratio="anyres")),
    "the same, one tile: pad, flat": ("Mistral", "whole", {}),
    "llava-hf, LLaVA-1.5": ("Llama", "llava-hf", {}),
    "llava-hf, bakLlava": ("Mistral", "llava-hf", {}),
    "llava-hf, LLaVA-1.6": ("Mistral", "llava-hf", dict(model_type="llava_next")),
}


@torch.no_grad()
def verdict(compare):
    """ "equal", or by how much not, or the error's one line."""
    try:
        ours, theirs = compare()
    except ValueError as error:
        return "refused: " + str(error).split(": ", 1)[-1]
    worst = float((ours - theirs).abs().max() / theirs.abs().max())
    return "equal" if worst < 1e-5 else f"differs by {worst:.2g}"


@torch.no_grad()
def language(folder, family, options, written):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL | options)
    config._attn_implementation = "eager"
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    theirs.save_pretrained(folder)
    write_json(folder / "config.json", read_config(folder) | written)
    tokens = torch.randint(61, (2, 40))
    return lambda: (LLM.from_pretrained(folder)(tokens), theirs(tokens).logits)


@torch.no_grad()
def vision(folder, options, written, processor):
    torch.manual_seed(0)
    size = dict(image_size=224, patch_size=32) | options
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    config = transformers.CLIPVisionConfig(**size | small)
    theirs = transformers.CLIPVisionModel(config).eval()
    theirs.save_pretrained(folder)
    kept = {
        k: v for k, v in read_config(folder).items() if k not in size or size[k] not in (224, 32)
    }
    write_json(folder / "config.json", kept | written)
    write_json(folder / "preprocessor_config.json", processor)
    pixels = torch.rand(2, 3, size["image_size"], size["image_size"])
    from data.images import MEAN, STD

    def normal(mean, std):
        mean, std = (torch.tensor(list(x)).view(3, 1, 1).float() for x in (mean, std))
        return (pixels - mean) / std

    usual = {"image_mean": MEAN, "image_std": STD} | processor
    wanted = theirs(normal(usual["image_mean"], usual["image_std"]), output_hidden_states=True)
    return lambda: (CLIPVision.from_pretrained(folder)(normal(MEAN, STD))[0],
                    wanted.hidden_states[-2][:, 1:])  # fmt: skip


@torch.no_grad()
def multimodal(folder, change):
    torch.manual_seed(0)
    vision = CLIPVisionConfig(image_size=24, patch_size=8, dim=24, hidden_dim=40, n_layers=3,
                              n_heads=2, scales=(1, 3), num_experts=4)  # fmt: skip
    llm = LLMConfig(97, dim=32, hidden_dim=56, n_layers=2, n_heads=4, n_kv_heads=2)
    model = CuMo(CuMoConfig(vision, llm, mlp_experts=4)).eval()
    model.save_pretrained(folder)
    write_json(folder / "config.json", read_config(folder) | change)
    images = torch.randn(1, 3, 24, 24)
    return lambda: (CuMo.from_pretrained(folder).encode_images(images), model.encode_images(images))


@torch.no_grad()
def llava(folder, family, layout, change):
    theirs = public.llava_hf(folder, family)
    if layout != "llava-hf":
        public.in_original_layout(folder, family, whole=layout == "whole")
    write_json(folder / "config.json", read_config(folder) | change)
    return lambda: (
        CuMo.from_pretrained(folder)(public.TOKENS, public.IMAGES).logits,
        theirs(**public.ASKED).logits,
    )


def models(only):
    """Yields a row for each model, or for those of one kind."""
    for kind, cases, make in (("language model", LANGUAGE, language), ("vision", VISION, vision),
                              ("multimodal", MULTIMODAL, multimodal),
                              ("multimodal", LLAVA, llava)):  # fmt: skip
        for name, case in cases.items() if only in ("", kind) else ():
            with tempfile.TemporaryDirectory() as folder:
                case = case if isinstance(case, tuple) else (case,)
                yield {"kind": kind, "name": name,
                       "found": verdict(make(pathlib.Path(folder), *case))}  # fmt: skip


def texts_that_differ(ours, theirs, texts):
    bad = sum(ours(text) != theirs(text) for text in texts)
    return f"{bad} of {len(texts):,} differ"


def with_added_tokens(encode, text):
    return encode(text, add_special_tokens=False).ids


def tokens(folder):
    """Yields a row for each kind of tokenizer."""
    texts = [" x", "▁x", *public.some_texts(3045, seed=11)]
    sp = sentencepiece.SentencePieceProcessor(model_file=str(public.MISTRAL / "tokenizer.model.v1"))
    shutil.copy(public.MISTRAL / "tokenizer.model.v1", folder / "tokenizer.model")
    yield "tokenizer.model", texts_that_differ(Tokenizer.from_pretrained(folder).encode,
                                               sp.encode, texts)  # fmt: skip
    (folder / "tokenizer.model").unlink()
    rng = random.Random(0)
    for scheme in ("Prepend", "always", "first", "never"):
        spec = public.spaces_by(sp, scheme)
        ours = Tokenizer.from_pretrained(public.write(folder, spec)).encode
        yield (
            f"tokenizer.json, spaces by {scheme}",
            texts_that_differ(ours, public.reference_of(spec), texts),
        )
        spec, words = public.with_words(spec)
        encode = tokenizers.Tokenizer.from_str(json.dumps(spec)).encode
        theirs = partial(with_added_tokens, encode)
        names = [{"id": i, "content": name, "special": True} for i, name in
                 enumerate(("<unk>", "<s>", "</s>"))]  # fmt: skip
        spec["added_tokens"] = names + spec["added_tokens"]
        mixed = ["".join(rng.choices([*words, " ", "a", "b "], k=9)) for _ in range(500)]
        ours = Tokenizer.from_pretrained(public.write(folder, spec)).encode
        yield f"the same, with {words[0]} added", texts_that_differ(ours, theirs, mixed)
    ours = Tokenizer.from_pretrained(public.write(folder, public.MINI_JSON)).encode
    yield (
        "tokenizer.json, bytes",
        texts_that_differ(ours, public.reference_of(public.MINI_JSON), texts),
    )


def templates(folder):
    """Yields a row for each chat template: what it is taken for, and the ids of a conversation."""
    said = ["What is a cat?", "A cat.", "And\nthen?"]
    talk = [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]
    v3 = "mistral_instruct_tokenizer_240323.model.v3"
    known = {"Mistral v0.1, v0.2, Mixtral-8x7B": ("tokenizer.model.v1", public.V1),
             "Mistral v0.3, Mixtral-8x22B": (v3, public.V3),
             "Nemo (tekken)": ("tekken_240911.json", public.TEKKEN)}  # fmt: skip
    refused = dict(itertools.islice(public.UNKNOWN.items(), 3))
    others = {"Llama-2": public.LLAMA2} | public.CHATML | refused
    for name, (file, text) in itertools.chain(
        known.items(), ((name, ("tokenizer.model.v1", text)) for name, text in others.items())
    ):
        for old in ("tokenizer.model", "tekken.json", "tokenizer.json", "added_tokens.json"):
            (folder / old).unlink(missing_ok=True)
        own = "tekken.json" if file.startswith("tekken") else "tokenizer.model"
        shutil.copy(public.MISTRAL / file, folder / own)
        marks = {"<|im_start|>": 32000, "<|im_end|>": 32001} if name in public.CHATML else {}
        (folder / "added_tokens.json").write_text(json.dumps(marks))
        (folder / "chat_template.jinja").write_text(text)
        tokenizer = Tokenizer.from_pretrained(folder)
        try:
            found = native_template(tokenizer)
        except ValueError as error:
            yield name, "refused: " + str(error).split(": ", 1)[-1]
            continue
        if name in known:
            equal = render(talk, tokenizer, found)[0] == public.from_common(file, said)
            found += ", equal to mistral-common" if equal else ", differs from mistral-common"
        yield name, found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a kind of row; the others stay as they are")
    only, file = parser.parse_args().only, ROOT / "bench" / "families.json"
    rows = list(models(only))
    for kind, measure in (("tokenizer", tokens), ("chat template", templates)):
        if only not in ("", kind):
            continue
        with tempfile.TemporaryDirectory() as folder:
            rows += [{"kind": kind, "name": name, "found": found}
                     for name, found in measure(pathlib.Path(folder))]  # fmt: skip
    for row in rows:
        print(f"{row['kind']:15} {row['name']:45} {row['found']}")
    versions = {m.__name__: m.__version__ for m in (transformers, tokenizers, sentencepiece)}
    if only:
        before = json.loads(file.read_text())["rows"]
        place = [row["kind"] for row in before].index(only)
        kept = [row for row in before if row["kind"] != only]
        rows = kept[:place] + rows + kept[place:]
    write_json(file, {"command": "python bench/families.py", "versions": versions, "rows": rows})


if __name__ == "__main__":
    main()
