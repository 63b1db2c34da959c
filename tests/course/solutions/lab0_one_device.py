"""The reference solution of lab 0."""


def matmuls(tokens, embed, heads, kv_heads, head_dim, mlp):
    query, key = heads * head_dim, kv_heads * head_dim
    attention = [(tokens, embed, query), (tokens, embed, key), (tokens, embed, key)]
    up = [(tokens, embed, mlp)] * 2
    return [*attention, (tokens, query, embed), *up, (tokens, mlp, embed)]


def block(embed, heads, kv_heads, head_dim, mlp):
    """The weights of the matmuls of a block."""
    return sum(i * o for _, i, o in matmuls(1, embed, heads, kv_heads, head_dim, mlp))


def parameters(layers, embed, heads, kv_heads, head_dim, mlp, vocab, tied):
    each = block(embed, heads, kv_heads, head_dim, mlp) + 2 * embed
    heads_and_embeddings = 1 if tied else 2
    return layers * each + embed + heads_and_embeddings * vocab * embed


def flops_per_token(layers, embed, heads, kv_heads, head_dim, mlp, vocab, tied, seq_len):
    weights = layers * (block(embed, heads, kv_heads, head_dim, mlp) + 2 * embed) + embed
    attention = 6 * layers * heads * head_dim * seq_len
    return 6 * (weights + vocab * embed) + attention
