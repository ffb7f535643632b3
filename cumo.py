"""The whole model: images through CLIP and the connector into the language model's sentence.

    image [3, S, S] --CLIP(-MoE)--> [P, D_clip] --MLP(-MoE)--> [P, D_llm]
                                                                  |  replaces the embeddings
    "[INST] <image>\\nWhat is this? [/INST]" --embed--> [T, D_llm]  v  of the IMAGE_TOKENs
                                                  e e e I I I I I e e e --LLM--> "a cat"

To the language model an image is P more tokens, embedded by the connector (LLaVA, arXiv
2304.08485). CuMo (arXiv 2405.05949) makes the MLPs of the two parts before the language model
sparse. Two more losses keep the routers balanced (section 3.3):

    loss = LM cross-entropy + 0.1 * sum of balance losses + 0.01 * sum of z losses

The sums are over the sparse parts: "clip", "mlp" and, in a Mixtral, "llm". CLIP's loss is the mean
over its layers, then over its scales.

A checkpoint is a directory with the names of the released CuMo models: `config.json` and
safetensors (`model.vision_tower...`, `model.mm_projector...`, the LLM's own), dense or sparse.

Where we differ from the original: no blank image is encoded for a row without one, padding is never
routed, and CLIP's unused last layer is not computed. With `model.parity = True` the last two are as
in the original. The README lists the differences in training.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clip_moe import CLIPVision, CLIPVisionConfig
from data import configs, weights
from data.chat import IGNORE, IMAGE_TOKEN
from data.hub import local_folder
from data.layouts import read_cumo
from llm import LLM, LLMConfig
from mlp_moe import Connector

__all__ = ["CuMo", "CuMoConfig", "Output", "IMAGE_TOKEN", "IGNORE"]


@dataclass
class CuMoConfig:
    vision: CLIPVisionConfig
    llm: LLMConfig
    mlp_experts: int = 0  # experts of the connector; 0: a dense connector
    mlp_top_k: int = 2
    balance_coef: float = 0.1  # weight of the balance losses
    z_coef: float = 0.01  # weight of the router z-losses
    template: str = "mistral_instruct_system"  # how conversations are written (data/chat.py)
    image_mode: str = "pad"  # how pictures are made square (data/images.py)

    def __post_init__(self):
        configs.check_fields(self)

    @classmethod
    def from_original(cls, config, path):
        """From a config.json, ours or the original's. ValueError if it names no vision tower."""
        vision, llm, rest = configs.cumo_fields(config, path)
        return cls(configs.make(CLIPVisionConfig, vision), configs.make(LLMConfig, llm), **rest)

    def to_original(self):
        """The original's config.json, completed by `vision_config`."""
        return configs.to_public_cumo(asdict(self))


class Output(NamedTuple):
    logits: Tensor | None  # [B, T, V]; None in training, where the loss is computed in chunks
    loss: Tensor | None  # lm_loss and the weighted auxiliary losses; None without labels
    lm_loss: Tensor | None
    aux: dict  # {"clip" | "mlp" | "llm": (balance, z), or None where that part is dense}
    load: dict  # {"clip": [L, E], "mlp": [E], "llm": [L, E]} share of the assignments, or None
    entropy: dict  # {"clip": [L], "mlp": scalar, "llm": [L]} of the routers, in nats

    def metrics(self):
        """What a training logs, as tensors (data.packing.step_metrics reads them once a step)."""
        found = {"loss": self.loss, "lm_loss": self.lm_loss}
        for part, losses in self.aux.items():
            if losses:
                found |= {f"{part}_balance": losses[0], f"{part}_z": losses[1]}
                found |= {f"{part}_load": self.load[part], f"{part}_entropy": self.entropy[part]}
        return {name: tensor.detach() for name, tensor in found.items()}


class CuMo(nn.Module):
    """CLIP(-MoE) + connector(-MoE) + LLM, trained and asked as one model."""

    def __init__(self, cfg: CuMoConfig):
        super().__init__()
        self.cfg = cfg
        self.vision = CLIPVision(cfg.vision)
        features = cfg.vision.dim * len(cfg.vision.scales)
        self.connector = Connector(features, cfg.llm.dim, cfg.mlp_experts, cfg.mlp_top_k)
        self.llm = LLM(cfg.llm)
        # visual tokens of an image in the text, at any number of scales
        self.image_tokens = (cfg.vision.image_size // cfg.vision.patch_size) ** 2
        self.reduce_losses = None  # set by engine/fsdp.py: averages the losses over all ranks

    @property
    def device(self):
        return next(self.parameters()).device

    @property
    def parity(self):
        """True: as in the original, CLIP's last layer enters the losses, and a Mixtral's routers
        see padding."""
        return self.vision.parity

    @parity.setter
    def parity(self, value):
        self.vision.parity = self.llm.parity = value

    def encode_images(self, images, with_aux=False):
        """images [n, 3, S, S] -> [n, image_tokens, D_llm]; `with_aux` adds the routers' Aux."""
        features, clip_aux = self.vision(images)
        x, mlp_aux = self.connector(features)
        return (x, {"clip": clip_aux, "mlp": mlp_aux}) if with_aux else x

    def splice(self, tokens, images):
        """Embed `tokens` [B, T] -> (x [B, T, D], aux). The features of image i replace the i-th run
        of IMAGE_TOKENs in reading order."""
        is_image = tokens == IMAGE_TOKEN
        n_images = 0 if images is None else len(images)
        if int(is_image.sum()) != n_images * self.image_tokens:
            raise ValueError(f"{int(is_image.sum())} IMAGE_TOKENs for {n_images} images; each "
                             f"takes a run of {self.image_tokens}")  # fmt: skip
        x = self.llm.embed(tokens.masked_fill(is_image, 0))
        if images is None or not n_images and not self.reduce_losses:
            return x, {"clip": None, "mlp": None}
        if not n_images:  # other ranks have images: encode a blank one, so that all communicate
            images = images.new_zeros(1, *images.shape[1:])
        features, aux = self.encode_images(images, with_aux=True)
        return x.masked_scatter(is_image[..., None], features.to(x.dtype)), aux

    def forward(self, tokens, images=None, labels=None, segments=None, shares=None):
        """tokens, labels, segments [B, T]; images [n, 3, S, S] -> Output. Labels are shifted
        inside; segments: 0 is padding, 1..n the documents in a row (None: one document a row).

        shares: this batch's weight in each loss of its step (data.packing.step_shares).
        """
        x, aux = self.splice(tokens, images)
        x, aux["llm"] = self.llm.hidden(x, segments)
        logits = None if self.training and labels is not None else self.llm.logits(x)
        loss = lm_loss = None
        if labels is not None:
            lm_loss = self.llm.loss(x, labels)
            if self.reduce_losses:
                n_images = 0 if images is None else len(images)
                lm_loss, aux = self.reduce_losses(lm_loss, aux, n_images, labels, segments)
            shares = shares or {}
            loss = shares.get("lm", 1) * lm_loss
            for part, a in aux.items():
                if a:
                    share = shares.get(part, 1)
                    loss = loss + share * self.cfg.balance_coef * a.balance
                    loss = loss + share * self.cfg.z_coef * a.z
        losses, load, entropy = (
            {part: get(a) if a else None for part, a in aux.items()}
            for get in (lambda a: (a.balance, a.z), lambda a: a.load, lambda a: a.entropy)
        )
        return Output(logits, loss, lm_loss, losses, load, entropy)

    @torch.no_grad()
    def generate(self, tokens, images=None, segments=None, **options):
        """New token ids [B, <= max_new_tokens] after the prompts `tokens` [B, T]; options as in
        `LLM.generate`. Prompts of unequal length are padded on the left, with segments 0 there."""
        x, _ = self.splice(tokens, images)
        return self.llm.generate(embeds=x, segments=segments, **options)

    # ------------------------------------------------------------------------- checkpoints

    def public_state_dict(self, keep_vars=False):
        """Views of all parameters under the names of the released checkpoints; `keep_vars`: see
        CLIPVision."""
        views = dict(self.llm.public_state_dict(keep_vars))
        vision = self.vision.public_state_dict(keep_vars)
        views |= {"model.vision_tower." + k: v for k, v in vision.items()}
        return views | {
            "model.mm_projector." + k: v for k, v in self.connector.public_state_dict().items()
        }

    def save_pretrained(self, path, dtype=None):
        """Write safetensors under the original's names, cast to `dtype`, and the config files."""
        views = self.public_state_dict()
        weights.write_tensors(path, {k: v.to(dtype) for k, v in views.items()} if dtype else views)
        for name, content in configs.public_files(asdict(self.cfg)).items():
            weights.write_json(Path(path) / name, content)

    @classmethod
    def from_pretrained(cls, path, device=None, dtype=None):
        """Load a checkpoint, ours, the original's or LLaVA's, from a folder or the hub.

        mm_projector.bin and clip.bin, written by the original's stages, override the shards. One
        ValueError names every missing, unexpected or wrongly shaped weight.
        """
        path = local_folder(path)
        config = weights.read_config(path)
        cfg = CuMoConfig.from_original(config, path)
        with weights.on_meta():
            model = cls(cfg).to(dtype or torch.float32)
        read = partial(read_cumo, path, config)
        model = weights.fill(model, read, device, model.llm.is_unused, str(path))
        tower = "vision_config" not in config and config["mm_vision_tower"]
        model.vision.take_pixels_of(local_folder(tower, "config") if tower else path)
        return model


if __name__ == "__main__":  # a worked example: an image in the middle of a sentence
    model = CuMo(CuMoConfig(CLIPVisionConfig(24, 8, 24, 40, 3, 2), LLMConfig(97, 32, 56, 2, 4, 2)))
    tokens = torch.tensor([[5, *[IMAGE_TOKEN] * model.image_tokens, 7]])
    out = model(tokens, torch.randn(1, 3, 24, 24))
    print(f"tokens {tokens.tolist()} -> logits {[*out.logits.shape]}")
