"""The linear map that replaces removed attention.

An X layer computes y = W x + c in place of its attention, where x is the block's normed input. Over
the tokens of a text, W and c minimise the mean of |W x + c - y|^2, so that (with C_xx, C_yx the
covariances)

    c = E[y] - W E[x]        W = C_yx (C_xx + lambda I)^-1

(Neural Block Linearization, arXiv 2505.21077, section 3; lambda keeps W small in directions that
hardly occur in the text). A map sees one token at a time and keeps no cache; its d^2 weights are
fewer than those of the attention that it replaces.

The maps are fitted from front to back, on the stream that they will see: x comes from the altered
model, in which all earlier layers are altered already, and y leads back to the original's stream,
so a map also corrects the error that earlier layers have left.
"""

import torch
from torch import Tensor

from model import Block, Model
from terminal import progress

RIDGE = 1e-2  # lambda, as a share of the mean variance of an input
BATCH = 4  # sequences that run together


def least_squares(pairs, ridge: float = RIDGE, products=torch.float64) -> tuple[Tensor, Tensor]:
    """W [d, d] and c [d] from pairs of x and y [..., d]; products: their dtype.

    The covariances are small differences of large sums, so x and y are counted from the means of
    the first pair, and summed in float64.
    """
    count, sums = 0, None
    for x, y in pairs:
        x, y = x.flatten(0, -2).to(products), y.flatten(0, -2).to(products)
        if sums is None:
            origin_x, origin_y = x.mean(0), y.mean(0)
        x, y = x - origin_x, y - origin_y
        count += len(x)
        more = [total.double() for total in (x.sum(0), y.sum(0), x.T @ x, y.T @ x)]
        sums = more if sums is None else [a + b for a, b in zip(sums, more)]

    mean_x, mean_y, xx, yx = (total / count for total in sums)
    xx = xx - mean_x[:, None] * mean_x
    yx = yx - mean_y[:, None] * mean_x
    xx.diagonal().add_(ridge * xx.diagonal().mean())
    weight = torch.linalg.solve(xx, yx, left=False)
    return weight, mean_y + origin_y - weight @ (mean_x + origin_x)


def fit_map(theirs: Block, ours: Block, their_stream, our_stream, rotary) -> None:
    """Fits the map of an X layer, in place. theirs: the original's layer; the streams are those
    that enter both layers, a list of [B, T, d] each."""

    def pairs():
        for x, y in zip(their_stream, our_stream, strict=True):
            attended = x + theirs.self_attn(theirs.input_layernorm(x), rotary)
            yield ours.input_layernorm(y), attended - y

    # A GPU has few float64 units; a CPU gets the same weights wherever its memory is aligned.
    products = torch.float32 if their_stream[0].is_cuda else torch.float64
    weight, bias = least_squares(pairs(), products=products)
    ours.self_attn.map.weight.copy_(weight)
    ours.self_attn.map.bias.copy_(bias)


def copy_maps(source: Model, target: Model) -> None:
    """Gives a model of the same plan its own copy of the maps."""
    for name, parameter in source.named_parameters():
        if ".self_attn.map." in name:
            target.get_parameter(name).data.copy_(parameter)


@torch.inference_mode()
def fit_maps(original: Model, altered: Model, ids: Tensor) -> None:
    """Fits the maps of all X layers, in place, on text ids [N, T]."""
    their_stream = [original.embed_tokens(part) for part in ids.to(original.device).split(BATCH)]
    our_stream = their_stream
    rotary = original.rotary(ids.shape[1])
    last = altered.plan.rindex("X")
    for i in progress(range(last + 1), desc="fitting maps"):
        if altered.plan[i] == "X":
            fit_map(original.layers[i], altered.layers[i], their_stream, our_stream, rotary)
        our_stream = [altered.run_layers(x, i, i + 1) for x in our_stream]
        their_stream = [original.run_layers(x, i, i + 1) for x in their_stream]
