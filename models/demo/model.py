"""The Llama architecture, lean enough to train on two CPU cores.

Same parameters under the same names as `LlamaForCausalLM` of transformers, so the export is a plain copy; but the
projections that share an input are one product, attention takes the form that is quickest for its length, and the
vocabulary is only scored where the loss looks. On CPUs with bf16 arithmetic the products are taken in bf16; the
parameters, the residual stream, the norms and the loss are f32 everywhere.
"""

import torch
from torch import nn
from torch.nn import functional as F

FAST_BF16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
SHORT = 640            # tokens up to which written-out attention in bf16 beats the fused kernel


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of q [rows, length, heads, head] to k and v [rows, length, kv heads, head]; the shape of q.

    For short rows the fused kernel is far slower in bf16 than two batched products and a softmax, in which the query
    heads that share a key/value head are simply more rows. Long rows and f32 take the fused kernel.
    """
    rows, length, heads, head = q.shape
    shared = k.size(2)
    group = heads // shared
    if q.dtype != torch.bfloat16 or length > SHORT:
        q, k, v = q.float(), k.float().repeat_interleave(group, 2), v.float().repeat_interleave(group, 2)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        return mixed.transpose(1, 2)
    q = q.view(rows, length, shared, group, head).permute(0, 2, 3, 1, 4).reshape(rows * shared, group * length, head)
    k = k.permute(0, 2, 3, 1).reshape(rows * shared, head, length)
    v = v.permute(0, 2, 1, 3).reshape(rows * shared, length, head)
    future = torch.full((length, length), -torch.inf, dtype=q.dtype).triu(1).repeat(group, 1)
    mixed = torch.baddbmm(future, q, k, alpha=head ** -0.5).softmax(-1) @ v
    return mixed.view(rows, shared, group, length, head).permute(0, 3, 1, 2, 4).reshape(rows, length, heads, head)


class Attention(nn.Module):
    """Grouped-query attention, causal, with rotary positions."""

    def __init__(self, config: dict):
        super().__init__()
        width, self.head = config["hidden_size"], config["head_dim"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.q_proj = nn.Linear(width, self.heads * self.head, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        rows, length, _ = x.shape
        qkv = F.linear(x, torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]))
        qkv = qkv.view(rows, length, -1, self.head)
        turned = self.heads + self.kv_heads
        left, right = qkv[:, :, :turned].chunk(2, dim=-1)
        qk = torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1).to(qkv.dtype)
        mixed = attention(qk[:, :, :self.heads], qk[:, :, self.heads:], qkv[:, :, turned:])
        return self.o_proj(mixed.reshape(rows, length, -1))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: dict):
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = F.linear(x, torch.cat([self.gate_proj.weight, self.up_proj.weight])).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """Attention and feed-forward, each on the normalised input and added back."""

    def __init__(self, config: dict):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        self.mlp = FeedForward(config)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers, final norm. `forward` returns the hidden states [rows, length, width]."""

    def __init__(self, config: dict):
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.RMSNorm(config["hidden_size"], config["rms_norm_eps"])
        steps = torch.arange(0, config["head_dim"], 2) / config["head_dim"]
        angles = torch.outer(torch.arange(config["max_position_embeddings"]), config["rope_theta"] ** -steps)
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, length = self.embed_tokens(ids), ids.size(1)
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        return self.norm(x)


class DemoModel(nn.Module):
    """The decoder with tied embeddings as the output."""

    def __init__(self, config: dict):
        super().__init__()
        self.model = Decoder(config)
        for key, parameter in self.named_parameters():
            if parameter.ndim == 2:
                small = (2 * config["num_hidden_layers"]) ** -0.5 if key.endswith(("o_proj.weight", "down_proj.weight")) else 1
                nn.init.normal_(parameter, std=config["initializer_range"] * small)

    def loss(self, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sum of the cross entropy of ids [rows, length]; `weights` has one per token, 0 is not scored."""
        scored = weights[:, 1:] > 0
        with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BF16):
            hidden = self.model(ids[:, :-1])[scored]
            logits = F.linear(hidden, self.model.embed_tokens.weight)
        each = F.cross_entropy(logits.float(), ids[:, 1:][scored], reduction="none")
        return (each * weights[:, 1:][scored]).sum()
