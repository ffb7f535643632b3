"""A training step of CuMo at half the size, in a process of its own; bench/speed.py races two.

    python bench/half_size.py ours           # or: transformers

Each line on standard input runs one step and prints its seconds and the peak memory so far in GB.
The model has the shapes of CLIP-B/16 with sparse MLPs, a sparse connector and SmolLM2-135M. A step
is forward, backward and AdamW, with float32 weights under bf16 autocast where the hardware has it.
"transformers" is the same model made of its CLIP and Mistral, with its fastest attention and the
original's loop over experts. Both are compiled block by block, get rows without padding, so that
packing makes no difference, and skip CLIP's last layer, whose output is not used.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # not this folder, whose tokenizers.py transformers would import

from bench.peers import DEVICE, DTYPE, LoopMoE
from clip_moe import CLIPVisionConfig
from cumo import IMAGE_TOKEN, CuMo, CuMoConfig
from engine import memory
from llm import LLMConfig

VISION = CLIPVisionConfig(224, 16, 768, 3072, 12, 12, num_experts=4)
LANGUAGE = LLMConfig(49152, 576, 1536, 30, 9, 3, tie_embeddings=True)
ROWS, TEXT, PATCHES = 4, 316, (224 // 16) ** 2  # a row is one image and 316 tokens of text


class TransformersCuMo(nn.Module):
    """The same model made of transformers' parts and the original's loop over experts."""

    def __init__(self):
        super().__init__()
        import transformers as hf

        clip = hf.CLIPVisionConfig(  # CLIP-B/16 is the default otherwise
            hidden_size=768, intermediate_size=3072, image_size=224, patch_size=16,
            num_hidden_layers=11)  # fmt: skip
        self.clip = hf.CLIPVisionModel._from_config(clip, attn_implementation="sdpa")
        self.layers = [m for m in self.clip.modules() if type(m).__name__ == "CLIPEncoderLayer"]
        self.auxes = []
        for layer in self.layers:
            layer.mlp = RoutedLoop(self.auxes, 768, 3072, 768, "quick_gelu")
        self.connector = RoutedLoop(self.auxes, 768, 576, 576, "gelu")
        llama = hf.MistralConfig(**LANGUAGE.to_hf() | {"sliding_window": None})
        self.llm = hf.MistralForCausalLM._from_config(llama, attn_implementation="sdpa")

    def forward(self, tokens, images, labels):
        self.auxes.clear()
        x = self.connector(self.clip(images).last_hidden_state[:, 1:])
        is_image = tokens == IMAGE_TOKEN
        text = self.llm.get_input_embeddings()(tokens.masked_fill(is_image, 0))
        x = text.masked_scatter(is_image[..., None], x.to(text.dtype))
        loss = self.llm(inputs_embeds=x, labels=labels, use_cache=False).loss
        *clip, connector = (0.1 * balance + 0.01 * z for balance, z in self.auxes)
        return loss + sum(clip) / len(clip) + connector


class RoutedLoop(LoopMoE):
    """LoopMoE that also appends the router's two losses to `auxes`."""

    def __init__(self, auxes, *sizes):
        super().__init__(*sizes)
        self.auxes = auxes

    def forward(self, x):
        logits = self.gate(x).float()
        probs = logits.softmax(-1)
        share = F.one_hot(probs.argmax(-1), probs.shape[-1]).float().mean(1)
        balance = probs.shape[-1] ** 2 * (probs.mean(1) * share).mean()
        self.auxes.append((balance, logits.logsumexp(-1).square().mean()))
        return super().forward(x)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", choices=("ours", "transformers"))
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.model == "ours":
        model = CuMo(CuMoConfig(VISION, LANGUAGE, mlp_experts=4))
        blocks = [*model.vision.layers, *model.llm.model.layers]
        loss = lambda: model(tokens, images, labels).loss
    else:
        model = TransformersCuMo()
        blocks = [*model.layers, *model.llm.model.layers]
        loss = lambda: model(tokens, images, labels)
    model.to(DEVICE).train()
    for block in blocks:
        block.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(LANGUAGE.vocab_size, (ROWS, PATCHES + TEXT), device=DEVICE)
    labels = tokens.clone()
    tokens[:, 4 : 4 + PATCHES], labels[:, : 4 + PATCHES] = IMAGE_TOKEN, -100
    images = torch.randn(ROWS, 3, 224, 224, device=DEVICE)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DTYPE == torch.bfloat16):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value.item()
        print(time.perf_counter() - start, memory.peak_memory(DEVICE) / memory.GB, flush=True)


if __name__ == "__main__":
    main()
