"""The PyTorch twin of one try of bench/gpu.py: python bench/torch_twin.py '{"model": {...}, "batch": 32, ...}'.

A plain decoder of the same shapes as isomesh's, as one would write it for speed: torch.compile, fused AdamW, PyTorch's
scaled_dot_product_attention (flash on a GPU), bfloat16 by autocast or, where memory is short, as the parameters
themselves. Experts go through grouped matmuls, without dropping tokens. Prints one JSON line. Needs PyTorch 2.10 only.
"""

import contextlib
import fcntl
import json
import math
import sys
import time
from collections import Counter

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class Norm(nn.Module):
    def __init__(self, m: dict):
        super().__init__()
        self.layer, self.eps, self.shape = m["norm"] == "layer", m["norm_eps"], (m["width"],)
        self.scale = nn.Parameter(torch.ones(self.shape))
        self.bias = nn.Parameter(torch.zeros(self.shape)) if self.layer else None

    def forward(self, x):
        if self.layer:
            return F.layer_norm(x, self.shape, self.scale, self.bias, self.eps)
        return F.rms_norm(x, self.shape, self.scale.to(x.dtype), self.eps)


def linear(m: dict, inputs: int, outputs: int, residual: bool = False) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=m["bias"] == "all")
    nn.init.normal_(layer.weight, std=0.02 / (math.sqrt(2 * m["layers"]) if residual else 1))
    return layer


class Attention(nn.Module):
    def __init__(self, m: dict):
        super().__init__()
        self.m = m
        self.into = linear(m, m["width"], (m["heads"] + 2 * m["kv_heads"]) * m["head_dim"])
        self.out = linear(m, m["heads"] * m["head_dim"], m["width"], residual=True)

    def forward(self, x, angles):
        m, (B, T, _) = self.m, x.shape
        sizes = [heads * m["head_dim"] for heads in (m["heads"], m["kv_heads"], m["kv_heads"])]
        q, k, v = (y.view(B, T, -1, m["head_dim"]).transpose(1, 2) for y in self.into(x).split(sizes, -1))
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=m["heads"] != m["kv_heads"])
        return self.out(y.transpose(1, 2).reshape(B, T, -1))


def rotate(x, angles):
    cos, sin = angles
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class FeedForward(nn.Module):
    def __init__(self, m: dict):
        super().__init__()
        self.gated = m["activation"] == "swiglu"
        self.into = linear(m, m["width"], m["ffn"] * (2 if self.gated else 1))
        self.out = linear(m, m["ffn"], m["width"], residual=True)

    def forward(self, x):
        h = self.into(x)
        return self.out(swiglu(h) if self.gated else F.gelu(h, approximate="tanh"))


def swiglu(h):
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


class Experts(nn.Module):
    """Tokens sorted by expert, one grouped matmul into and one out of the hidden vectors."""

    def __init__(self, m: dict):
        super().__init__()
        self.m = m
        self.router = nn.Linear(m["width"], m["experts"], bias=False)
        self.into = nn.Parameter(torch.randn(m["experts"], m["width"], 2 * m["ffn"]) * 0.02)
        self.out = nn.Parameter(torch.randn(m["experts"], m["ffn"], m["width"]) * 0.02)

    def forward(self, x):
        J, flat = self.m["experts_per_token"], x.flatten(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            scores = F.linear(flat.float(), self.router.weight.float()).softmax(-1)
        weights, experts = scores.topk(J, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort()
        ends = torch.histc(experts.flatten().float(), self.m["experts"], 0, self.m["experts"] - 1).cumsum(0).int()
        rows = flat[order // J].bfloat16()
        h = swiglu(F.grouped_mm(rows, self.into.bfloat16(), offs=ends))
        y = F.grouped_mm(h, self.out.bfloat16(), offs=ends) * weights.flatten()[order, None]
        return torch.zeros_like(flat).index_add(0, order // J, y.to(flat.dtype)).view_as(x)


class Block(nn.Module):
    def __init__(self, m: dict):
        super().__init__()
        self.attention_norm, self.attention = Norm(m), Attention(m)
        self.ffn_norm, self.ffn = Norm(m), Experts(m) if m["experts"] else FeedForward(m)

    def forward(self, x, angles):
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.ffn(self.ffn_norm(x))


class Transformer(nn.Module):
    def __init__(self, m: dict, remat: bool):
        super().__init__()
        self.m, self.remat = m, remat
        self.tokens = nn.Embedding(padded(m), m["width"])
        learned = m["positions"] == "learned"
        self.positions = nn.Embedding(m["max_positions"], m["width"]) if learned else None
        self.blocks = nn.ModuleList(Block(m) for _ in range(m["layers"]))
        self.norm = Norm(m)
        self.head = nn.Linear(m["width"], padded(m), bias=False)
        for table in (self.tokens, self.positions, self.head):
            if table is not None:
                nn.init.normal_(table.weight, std=0.02)
        if m["tied_embeddings"]:
            self.head.weight = self.tokens.weight

    def forward(self, tokens, targets):
        """The mean loss; positions and vocabulary padding as isomesh has them."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        x, angles = self.tokens(tokens), None
        if self.positions is None:
            half = self.m["head_dim"] // 2
            frequency = self.m["rope_theta"] ** (-torch.arange(half, device=tokens.device) / half)
            turns = place[:, None] * frequency
            angles = turns.cos(), turns.sin()
        else:
            x = x + self.positions(place)
        for block in self.blocks:
            x = checkpoint(block, x, angles, use_reentrant=False) if self.remat else block(x, angles)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def padded(m: dict) -> int:
    return -(-m["vocab_size"] // m["vocab_multiple"]) * m["vocab_multiple"]


@contextlib.contextmanager
def alone(given: dict):
    """Times and profiles while no other process of the bench compiles or runs on the device."""
    if not given.get("lock"):
        yield
        return
    with open(given["lock"], "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def profiled(step, steps: int = 3) -> dict[str, float]:
    """Milliseconds a step of each kernel, by its name."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    kernels = Counter()
    for event in found.events():
        if "CUDA" in str(event.device_type):
            kernels[event.name] += event.device_time_total / 1e3 / steps
    return dict(kernels)


def main(given: dict) -> None:
    cuda = torch.cuda.is_available() and given["platform"] != "cpu"
    device, narrow = "cuda" if cuda else "cpu", given["param_dtype"] == "bfloat16"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    with torch.device(device):
        model = Transformer(given["model"], given["remat"] != "none")
    model = model.bfloat16() if narrow else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, (0.9, 0.95), 1e-8, 0.1, fused=True)
    shape = given["batch"], given["seq_len"] + 1
    tokens = torch.randint(given["model"]["vocab_size"], shape, device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    compiled = torch.compile(model)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=not narrow):
            loss = compiled(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    began, losses, seconds = time.perf_counter(), [], []
    losses.append(step().item())
    first = time.perf_counter() - began
    with alone(given):
        for _ in range(2):  # the first may have left something to allocate
            step()
        while len(seconds) < 3 or sum(seconds) * given["window"] < given["seconds"]:
            start = time.perf_counter()
            for _ in range(given["window"]):
                loss = step()
            losses.append(loss.item())  # waits for the device
            seconds.append((time.perf_counter() - start) / given["window"])
        peak = torch.cuda.max_memory_allocated() if cuda else None
        kernels = {}
        if given.get("profile") and cuda:
            with contextlib.suppress(Exception):  # the figures are worth more than the profile
                kernels = profiled(step)
    line = {
        "step_s": seconds,
        "first_step_s": first,
        "losses": [losses[0], losses[-1]],
        "memory_bytes": peak,
        "kernels": kernels,
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "devices": 1,
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda},
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
