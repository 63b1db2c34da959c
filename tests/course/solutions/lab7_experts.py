"""The reference solution of lab 7."""

import math

import torch

from dtron.distributed.collectives import all_to_all


def sort_by_expert(expert_S, experts):
    slot_R = expert_S.argsort(stable=True)
    place_S = slot_R.argsort()
    return slot_R, place_S, torch.bincount(expert_S, minlength=experts)


def permute(x_TD, slot_R, k):
    return x_TD[slot_R // k]


def unpermute(y_RD, weights_TK, place_S):
    y_TKD = y_RD[place_S].unflatten(0, weights_TK.shape)
    return (y_TKD * weights_TK[:, :, None]).sum(1)


def capacity(tokens, k, experts, factor):
    return min(tokens, math.ceil(factor * tokens * k / experts))


def kept(expert_S, weight_S, experts, room):
    mask = torch.zeros_like(expert_S, dtype=torch.bool)
    for e in range(experts):
        own = (expert_S == e).nonzero().flatten()
        order = weight_S[own].argsort(descending=True, stable=True)
        mask[own[order[:room]]] = True
    return mask


def balance_loss(scores_TE, index_TK, layout):
    experts = scores_TE.shape[1]
    counts_E = torch.bincount(index_TK.flatten(), minlength=experts)
    counts_E = layout.all_reduce(counts_E.to(scores_TE.dtype), "tokens_sp")
    f_E = counts_E / counts_E.sum()
    return experts * (scores_TE * f_E).sum()


def dispatch(x_TD, weights_TK, index_TK, run, experts, ranks):
    n = ranks.size()
    slot_R, place_S, counts_E = sort_by_expert(index_TK.flatten(), experts)
    counts_NE = counts_E.view(n, -1)
    received_NE = all_to_all(counts_NE, ranks)
    sent, received = counts_NE.sum(1).tolist(), received_NE.sum(1).tolist()
    rows = all_to_all(permute(x_TD, slot_R, index_TK.shape[1]), ranks, received, sent)
    own = torch.arange(experts // n).repeat(n).repeat_interleave(received_NE.flatten())
    order_R, back_R, own_E = sort_by_expert(own, experts // n)
    y = run(rows[order_R], own_E)[back_R]
    y = all_to_all(y, ranks, sent, received)
    return unpermute(y, weights_TK, place_S)


def by_token(x_TD, scores_TE, w_EDF, k, factor):
    tokens, experts = scores_TE.shape
    weights_TK, index_TK = scores_TE.topk(k)
    room = tokens if factor is None else capacity(tokens, k, experts, factor)
    mask = kept(index_TK.flatten(), weights_TK.flatten(), experts, room).view(tokens, k)
    rows = []
    for t in range(tokens):
        each = [
            weights_TK[t, j] * (x_TD[t] @ w_EDF[index_TK[t, j]]).tanh() * mask[t, j]
            for j in range(k)
        ]
        rows.append(sum(each))
    load_E = torch.bincount(index_TK.flatten(), minlength=experts) / (tokens * k)
    return torch.stack(rows), experts * (scores_TE * load_E).sum()


def check_experts(layer):
    generator = torch.Generator().manual_seed(0)
    for experts, k, factor in ((6, 2, None), (5, 2, 1.1), (5, 1, 0.7)):
        shapes = (12, 6), (12, experts), (experts, 6, 3)
        x, logits, w = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        liked = torch.zeros(experts, dtype=torch.float64)
        liked[0], liked[1] = -50, 3  # expert 0 has no token, and expert 1 has many
        inputs = [t.requires_grad_() for t in (x, (logits + liked).softmax(-1), w)]
        results = []
        for fn in (layer, by_token):
            y, loss = fn(*inputs, k, factor)
            results += [(y, loss, *torch.autograd.grad(y.sin().sum() + loss, inputs))]
        for got, want in zip(*results, strict=True):
            assert torch.allclose(got, want, atol=1e-9)
