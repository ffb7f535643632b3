"""CLIP's image encoder, with dense or sparse MLPs, at one or several scales of the image.

A vision transformer turns an image into tokens. A convolution with stride = patch size makes each
14 x 14 square a vector, a class token is put in front, learned positions are added, and a pre-norm
transformer does the rest, every token attending to every other:

    image [3, 336, 336] -> 24 x 24 patches + class token -> x [577, D]
    x += attention(LN1(x))
    x += MLP(LN2(x))  or, in CuMo,  x += MoE(LN2(x))        (paper section 3.2, "CLIP-MoE")

Only the MLPs become sparse (upcycle.py). The features are the patch tokens of the last but one
layer, without the class token and without a final norm. The last layer's output is not used, so it
is not computed.

S2, several scales (arXiv 2403.13043). CLIP's positions fix its input at 336 pixels, so more detail
takes more passes. At scale 3 the image is enlarged to 1008 pixels and cut into 3 x 3 tiles:

    |0 1 2|       nine passes of 24 x 24,         average 3 x 3 blocks
    |3 4 5|  -->  side by side again: 72 x 72 --> to 24 x 24       --> concatenate with scale 1
    |6 7 8|                                                            [576, 2 D]

There are still 576 visual tokens, but wider. In routing each tile is a sample of its own.

Letters as in mlp_moe.py, and: n images, S their side, P patches, H query heads, G key/value heads,
A head size, U tokens that are attended to.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import configs
from data.hub import local_folder
from data.images import MEAN, STD
from data.weights import fill, load_into, on_meta, read_config, read_tensors
from mlp_moe import ACTIVATIONS, Aux, SparseMoE, checkpointed

# cuDNN plans every shape it meets, and gives NaN gradients with some masks (pytorch #196678)
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass
class CLIPVisionConfig:
    image_size: int = 336  # CLIP ViT-L/14-336, the paper's encoder
    patch_size: int = 14
    dim: int = 1024
    hidden_dim: int = 4096
    n_layers: int = 24
    n_heads: int = 16
    act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    scales: tuple[int, ...] = (1,)  # S2; the paper's is (1, 3)
    num_experts: int = 0  # 0: dense MLPs; the paper's CLIP-MoE has 4
    top_k: int = 2  # experts a token

    def __post_init__(self):
        configs.check_fields(self)
        self.scales = tuple(self.scales) if isinstance(self.scales, list | tuple) else ()
        if not self.scales or any(type(scale) is not int or scale < 1 for scale in self.scales):
            raise ValueError(f"scales={self.scales}: choose integers from 1 up, such as "
                             f"(1, 3); every tile is {self.image_size} pixels wide")  # fmt: skip
        if str(self.act) not in ACTIVATIONS:
            raise ValueError(f"hidden_act {self.act!r}: choose from {', '.join(ACTIVATIONS)}")
        if self.dim % self.n_heads:
            raise ValueError(f"dim={self.dim} cannot be split among n_heads={self.n_heads}")

    @classmethod
    def from_hf(cls, config: dict) -> "CLIPVisionConfig":
        """From the config.json of a whole CLIP or of its vision tower."""
        return configs.make(cls, configs.clip_fields(config))

    def to_hf(self) -> dict:
        """The config.json that transformers reads."""
        return configs.to_public_clip(asdict(self))


def attend(q_BHTA: Tensor, k_BGUA: Tensor, v_BGUA: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k / sqrt(A) + mask) v; each key/value head serves H / G query heads.

    For one query, and in bf16 on a CPU, two plain products are faster than fused attention
    (bench/attention.py; its runs in bf16 are in docs/LOG.md).
    """
    (B, H, T, A), G = q_BHTA.shape, k_BGUA.shape[1]
    if T > 1 and not (v_BGUA.dtype == torch.bfloat16 and v_BGUA.device.type == "cpu"):
        k, v = (y.repeat_interleave(H // G, 1) if H > G else y for y in (k_BGUA, v_BGUA))
        return F.scaled_dot_product_attention(q_BHTA, k, v, attn_mask=mask)
    q = (q_BHTA * A**-0.5).reshape(B, G, H // G * T, A)
    scores_BHTU = (q @ k_BGUA.mT).view(B, H, T, -1)
    scores_BHTU = scores_BHTU if mask is None else scores_BHTU + mask
    probs_BHTU = scores_BHTU.softmax(-1).to(v_BGUA.dtype)
    return (probs_BHTU.view(B, G, H // G * T, -1) @ v_BGUA).view(B, H, T, A)


class Attention(nn.Module):
    def __init__(self, cfg: CLIPVisionConfig):
        super().__init__()
        self.n_heads = cfg.n_heads
        self.q_proj = nn.Linear(cfg.dim, cfg.dim)
        self.k_proj = nn.Linear(cfg.dim, cfg.dim)
        self.v_proj = nn.Linear(cfg.dim, cfg.dim)
        self.out_proj = nn.Linear(cfg.dim, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        projections = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for y in projections)
        return self.out_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, cfg: CLIPVisionConfig):
        super().__init__()
        self.act = ACTIVATIONS[cfg.act]
        self.fc1 = nn.Linear(cfg.dim, cfg.hidden_dim)
        self.fc2 = nn.Linear(cfg.hidden_dim, cfg.dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """One layer: x [B, T, D] -> (x, Aux of its router, or None when dense)."""

    def __init__(self, cfg: CLIPVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(cfg.dim, cfg.layer_norm_eps)
        self.self_attn = Attention(cfg)
        self.layer_norm2 = nn.LayerNorm(cfg.dim, cfg.layer_norm_eps)
        self.sparse = cfg.num_experts > 0
        if self.sparse:
            self.moe = SparseMoE(cfg.dim, cfg.hidden_dim, cfg.num_experts, cfg.top_k, act=cfg.act)
        else:
            self.mlp = MLP(cfg)

    def forward(self, x: Tensor) -> tuple[Tensor, Aux | None]:
        x = x + self.self_attn(self.layer_norm1(x))
        h = self.layer_norm2(x)
        y, aux = self.moe(h) if self.sparse else (self.mlp(h), None)
        return x + y, aux


class Embeddings(nn.Module):
    """images [n, 3, S, S] -> tokens [n, 1 + P, D]: the class token, then the patches row by row."""

    def __init__(self, cfg: CLIPVisionConfig):
        super().__init__()
        patches = (cfg.image_size // cfg.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.empty(cfg.dim))
        nn.init.normal_(self.class_embedding, std=cfg.dim**-0.5)
        self.patch_embedding = nn.Conv2d(3, cfg.dim, cfg.patch_size, cfg.patch_size, bias=False)
        self.position_embedding = nn.Embedding(1 + patches, cfg.dim)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embedding(images.to(self.patch_embedding.weight.dtype))
        patches = patches.flatten(2).transpose(1, 2)
        class_token = self.class_embedding.expand(len(images), 1, -1)
        return torch.cat([class_token, patches], dim=1) + self.position_embedding.weight


def cut_tiles(images: Tensor, scale: int) -> Tensor:
    """Enlarge images [n, 3, S, S] and cut them into tiles: [scale * scale * n, 3, S, S]."""
    if scale == 1:
        return images
    size = images.shape[-1]
    big = F.interpolate(images.float(), size=size * scale, mode="bicubic", align_corners=False)
    tiles = big.to(images.dtype).unflatten(3, (scale, size)).unflatten(2, (scale, size))
    return tiles.permute(2, 4, 0, 1, 3, 5).flatten(0, 2)  # n 3 r S c S -> (r c n) 3 S S


def merge_tiles(x: Tensor, scale: int) -> Tensor:
    """Arrange the patches of all tiles in one grid and average scale x scale blocks: [n, P, D]."""
    if scale == 1:
        return x
    grid = int(x.shape[1] ** 0.5)
    patches = x.unflatten(1, (grid, grid)).unflatten(0, (scale, scale, -1))  # r c n g g D
    rows = patches.permute(2, 0, 3, 1, 4, 5)  # n (r g) (c g) D: rows and columns of the grid
    blocks = rows.reshape(-1, grid, scale, grid, scale, x.shape[-1])
    return blocks.float().mean((2, 4)).to(x.dtype).flatten(1, 2)


class CLIPVision(nn.Module):
    """images [n, 3, S, S] -> (features [n, P, D * number of scales], Aux, or None when dense).

    In this Aux, balance and z are means over layers, then scales; load is [layers, E], the mean
    over scales; choice is [layers, n, 1 + P, K], of the whole images only.
    """

    def __init__(self, cfg: CLIPVisionConfig):
        super().__init__()
        self.cfg = cfg
        self.parity = False  # True: as in the original, losses include the unused last layer
        self.recompute = 0  # so many layers, the first ones, are recomputed in the backward pass
        self.embeddings = Embeddings(cfg)
        self.pre_layrnorm = nn.LayerNorm(cfg.dim, cfg.layer_norm_eps)  # the public name's own typo
        self.layers = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layers))

    def hidden(self, images: Tensor, layers: int | None = None) -> tuple[Tensor, list[Aux]]:
        """Tokens [n, 1 + P, D] of one scale after `layers` layers (None: all but the last)."""
        x, auxes = self.pre_layrnorm(self.embeddings(images)), []
        layers = self.cfg.n_layers - 1 if layers is None else layers
        for i, layer in enumerate(self.layers[:layers]):
            x, aux = checkpointed(layer, x) if i < self.recompute and self.training else layer(x)
            auxes += [aux] if aux else []
        return x, auxes

    def forward(self, images: Tensor) -> tuple[Tensor, Aux | None]:
        size = self.cfg.image_size
        if images.shape[1:] != (3, size, size):
            raise ValueError(f"images are {list(images.shape)}, this CLIP takes [n, 3, {size}, "
                             f"{size}]: resize them (data.images.preprocess)")  # fmt: skip
        features, auxes = [], []
        for i, scale in enumerate(self.cfg.scales):
            # As in the original, the first scale is the image itself, whatever its number says.
            scale = scale if i else 1
            x, layer_auxes = self.hidden(cut_tiles(images, scale))
            if self.parity and self.cfg.num_experts:
                # As in the original: the last layer's losses count, but its output is not used.
                layer_auxes.append(self.layers[-1](x)[1])
            features.append(merge_tiles(x[:, 1:], scale))
            auxes.append(layer_auxes)
        return torch.cat(features, dim=-1), mean_aux(auxes)

    @torch.no_grad()
    def take_pixels_of(self, folder: str | Path) -> None:
        """Make pixels with OpenAI's mean m and std s right for a CLIP whose
        preprocessor_config.json has others, m' and s', as LAION's: fold the change into the weights

            W (u - m') / s' with u = x s + m   =   (W s / s') x + W (m - m') / s'
        """
        other = configs.pixel_statistics(folder, self.cfg.image_size)
        (mean, std), (own_mean, own_std) = torch.tensor(other), torch.tensor([*zip(MEAN, STD)]).T
        if torch.equal(mean, own_mean) and torch.equal(std, own_std):
            return
        weight = self.embeddings.patch_embedding.weight
        per_channel = lambda x: x.view(3, 1, 1).to(weight.device)
        W_D3ss = weight.float() / per_channel(std)
        bias_D = (W_D3ss * per_channel(own_mean - mean)).sum((1, 2, 3))
        weight.copy_(W_D3ss * per_channel(own_std))
        self.embeddings.position_embedding.weight[1:] += bias_D

    def public_state_dict(self, keep_vars: bool = False) -> dict[str, Tensor]:
        """Views of all weights under the names of public checkpoints; with `keep_vars`, as in
        `state_dict`, dense weights are the parameters themselves."""
        views = {}
        for name, tensor in self.state_dict(keep_vars=keep_vars).items():
            if ".moe." not in name:
                views["vision_model." + name.replace("layers.", "encoder.layers.")] = tensor
        for i, layer in enumerate(self.layers):
            if layer.sparse:
                prefix = f"vision_model.encoder.layers.{i}."
                views |= layer.moe.public_state_dict(("fc1", "fc2"), prefix)
        return views

    def load_original(self, tensors: dict[str, Tensor]) -> None:
        """Fill in public weights, strictly; ignores the parts that only a whole CLIP has."""
        pairs = public_names(tensors.items())
        load_into(self.public_state_dict(), pairs, is_unused, "the state dict")

    @classmethod
    def from_pretrained(cls, path: str | Path, scales: tuple[int, ...] | None = None,
                        dtype: torch.dtype | None = None) -> "CLIPVision":  # fmt: skip
        """From a directory, or a name on the hub such as openai/clip-vit-large-patch14-336, with or
        without CLIP's text half.

        `scales` None: as in the config, (1,) in public ones. `dtype` None: float32.
        """
        path = local_folder(path)
        cfg = CLIPVisionConfig.from_hf(read_config(path))
        cfg = replace(cfg, scales=scales or cfg.scales)
        with on_meta():
            model = cls(cfg).to(dtype or torch.float32)
        read = lambda headers: public_names(read_tensors(path, headers))
        model = fill(model, read, skip=is_unused, source=str(path))
        model.take_pixels_of(path)
        return model


def mean_aux(auxes: list[list[Aux]]) -> Aux | None:
    """balance and z: means over layers, then scales. load and entropy: means over scales."""
    if not auxes[0]:
        return None
    balance, z, load, entropy = (
        torch.stack([torch.stack([getattr(aux, name) for aux in layers]) for layers in auxes])
        for name in ("balance", "z", "load", "entropy")
    )
    choice = torch.stack([aux.choice for aux in auxes[0]])
    return Aux(balance.mean(), z.mean(), load.mean(0), choice, entropy=entropy.mean(0))


def public_names(pairs: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """transformers 5 saves a vision tower without the prefix "vision_model.": add it."""
    bare = ("embeddings.", "pre_layrnorm.", "encoder.", "post_layernorm.")
    return (("vision_model." * name.startswith(bare) + name, tensor) for name, tensor in pairs)


def is_unused(name: str) -> bool:
    """Is it a weight that no feature depends on: text half, final norm, projections?"""
    heads = ("text_model.", "text_projection.", "visual_projection.", "logit_scale",
             "vision_model.post_layernorm.")  # fmt: skip
    return name.startswith(heads) or name.endswith("position_ids")


if __name__ == "__main__":  # a worked example: one image of noise through a small sparse CLIP
    cfg = CLIPVisionConfig(56, 14, 64, 256, 3, 4, scales=(1, 3), num_experts=4)
    vision, images = CLIPVision(cfg), torch.randn(1, 3, 56, 56)
    features, aux = vision(images)
    print(f"images {[*images.shape]} -> features {[*features.shape]}: 4 x 4 patches at scales 1, 3")
    print(f"first layer, best expert of each patch:\n{aux.choice[0, 0, 1:, 0].view(4, 4)}")
