"""The language model's loss, without ever holding the logits of a whole batch.

The head makes V logits of each token's x, and the loss asks one thing of them: how probable was the
token that came next?

    logits = x W^T                              [N, V], W [V, D] is the head
    loss   = -log softmax(logits)[target]       summed over N tokens, then their mean

For 4,096 tokens and Mistral-7B's 32,000 words the logits take 500 MiB in float32, their softmax and
their gradient as much again: 1.5 GiB together. Yet nobody needs them for long,
as their gradient is simple, and known as soon as they are:

    d loss / d logits = softmax(logits) - one_hot(target)                   the error of each word
    d loss / d x      = error W             d loss / d W = error^T x

So a chunk of tokens at a time, the logits are made, the softmax taken in place, both products done,
and the logits forgotten. What stays until the backward pass is the size of x and of W. Doing this
on the way forward, instead of making the logits a second time on the way back (as checkpointing
would), saves one of four products with the head. Tokens that teach nothing (images, questions,
padding) are left out beforehand: most of a multimodal batch.

Letters: N tokens that count, D features, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.chat import IGNORE

LOGITS_AT_ONCE = 2**25  # entries of the largest [N, V] block: 128 MiB in float32


def mean_cross_entropy(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """x [tokens, D], head [V, D], targets [tokens] -> the mean over targets that are not IGNORE.

    If none is left the loss is 0 (CuMo: NaN), and so are its gradients.
    """
    if not torch.is_grad_enabled():  # else gradients would be made on the way
        x, head = x.detach(), head.detach()
    kept = (targets != IGNORE).nonzero()[:, 0]
    size = max(1, LOGITS_AT_ONCE // len(head))
    return ChunkedLoss.apply(x.index_select(0, kept), head, targets[kept], size) / max(1, len(kept))


class ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of x [N, D] times head [V, D], for `size` tokens at a time."""

    @staticmethod
    def forward(ctx, x, head, targets, size):
        grad_x, grad_head = (torch.zeros_like(y) if need else None
                             for y, need in zip((x, head), ctx.needs_input_grad))  # fmt: skip
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        for start in range(0, len(x), size):
            rows = slice(start, start + size)
            logits_NV = F.linear(x[rows], head)
            logs_NV = logits_NV.to(total.dtype).log_softmax(-1)
            target_N1 = targets[rows, None]
            total -= logs_NV.gather(1, target_N1).sum()
            error_NV = logs_NV.exp_()  # in place
            error_NV.scatter_add_(1, target_N1, -torch.ones_like(error_NV[:, :1]))
            error_NV = error_NV.to(logits_NV.dtype)
            if grad_x is not None:
                grad_x[rows] = error_NV @ head
            if grad_head is not None:
                grad_head += error_NV.T @ x[rows]
        ctx.save_for_backward(grad_x, grad_head)
        return total

    @staticmethod
    def backward(ctx, g):
        return *(grad if grad is None else g * grad for grad in ctx.saved_tensors), None, None
