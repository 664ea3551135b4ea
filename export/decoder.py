"""A decoder of ours as an ONNX graph with a cache of keys and values: the equations of model/, operator by operator.

Inputs: input_ids (B, T), and for each layer past_key_values.I.key and .value (B, K, S, H) of the S tokens before, which
may be none. Outputs: logits (B, T, V), and present.I.key and .value (B, K, S + T, H). All rows of a batch are of one
length. The names are those that exports of transformers have; float32 throughout.
"""

import jax
import jax.numpy as jnp
import numpy as np
import onnx

from export.graph import FLOAT, INT64, Graph
from model import parametrization
from model.attention_rule import MASKED
from model.config import GATED, ModelConfig
from model.rotary import rope_angles


def decoder(config: ModelConfig, arrays: dict, length: int) -> onnx.ModelProto:
    """The graph. arrays: as export.weights.as_arrays; length: tokens of the longest sequence, past ones included."""
    return _Decoder(config, arrays, length).build()


def cache_names(layers: int) -> list[tuple[str, str]]:
    """Names of the graph's caches, what goes in with what comes out."""
    parts = [(layer, part) for layer in range(layers) for part in ("key", "value")]
    return [(f"past_key_values.{layer}.{part}", f"present.{layer}.{part}") for layer, part in parts]


class _Decoder:
    def __init__(self, config: ModelConfig, arrays: dict, length: int):
        self.config, self.arrays, self.length, self.graph = config, arrays, length, Graph()

    def build(self) -> onnx.ModelProto:
        c, g = self.config, self.graph
        table = g.weight("tokens", self.arrays["tokens"]["weight"])
        T = g.add("Shape", "input_ids", start=1, end=2)
        before = g.add("Shape", "past_key_values.0.key", start=2, end=3)
        end, one = g.add("Squeeze", g.add("Add", before, T)), g.index(1)
        self.positions_T = g.add("Range", g.add("Squeeze", before), end, one)
        self.keys_S = g.add("Range", g.index(0), end, one)
        self.masks = {window: self.mask(window) for window in sorted(set(c.windows()))}
        self.angles = self.rotary_angles()
        x = self.times(g.add("Gather", table, "input_ids"), parametrization.embedding_multiplier(c))
        if c.positions == "learned":
            places = g.add("Add", self.positions_T, g.index(c.first_position))
            x = g.add("Add", x, g.add("Gather", g.weight("positions", self.arrays["positions"]), places))
        if c.embedding_norm:
            x = self.norm(x, "embedding_norm", self.arrays["embedding_norm"])
        for layer in range(c.layers):
            x = self.block(x, layer)
        if c.norm_position != "post":
            x = self.norm(x, "final_norm", self.arrays["final_norm"])
        self.logits(x, table)
        cache = {}, {}
        for names in cache_names(c.layers):
            for side, name, tokens in zip(cache, names, ("past", "past + length"), strict=True):
                side[name] = (FLOAT, ("batch", c.kv_heads, tokens, c.head_dim))
        inputs = {"input_ids": (INT64, ("batch", "length"))} | cache[0]
        return g.model(inputs, {"logits": (FLOAT, ("batch", "length", c.vocab_size))} | cache[1])

    def logits(self, x: str, table: str) -> None:
        """The graph's output of this name."""
        c, g = self.config, self.graph
        if not c.tied_embeddings:
            table = g.weight("head", self.arrays["head"]["weight"])
        x = g.reshape(self.times(x, parametrization.logit_multiplier(c)), -1, c.width)
        shape = g.add("Concat", g.add("Shape", "input_ids"), g.ints(c.vocab_size), axis=0)
        y = self.capped(g.add("Gemm", x, table, transB=1), c.logit_softcap)
        g.add("Reshape", y, shape, name="logits")

    # ------------------------------------------------------------------------------------------------------- a block

    def block(self, x: str, layer: int) -> str:
        """As model.transformer.Block."""
        c = self.config
        part = {name: _of_layer(branch, layer) for name, branch in self.arrays["layers"].items()}
        at = f"layers.{layer}"
        norm = lambda x, name: self.norm(x, f"{at}.{name}", part[name]) if name in part else x
        add = lambda x, h, name: (
            norm(self.graph.add("Add", x, h), name)
            if c.norm_position == "post"
            else self.graph.add("Add", x, self.times(norm(h, name), parametrization.residual_multiplier(c)))
        )
        entered = x
        x = add(x, self.attention(norm(x, "attention_norm"), layer, part["attention"]), "attention_post_norm")
        h = norm(entered if c.parallel_block else x, "ffn_norm")
        return add(x, self.feed_forward(h, f"{at}.ffn", part["ffn"]), "ffn_post_norm")

    def attention(self, x: str, layer: int, part: dict) -> str:
        """As model.layers.Attention, with the layer's cache."""
        c, g, at = self.config, self.graph, f"layers.{layer}.attention"
        K, G, H = c.kv_heads, c.heads // c.kv_heads, c.head_dim
        q, k, v = (self.project(x, f"{at}.{name}", part[name]) for name in ("query", "key", "value"))
        if c.qk_norm and c.qk_norm_dims == "all":
            q, k = (self.norm(y, f"{at}.{n}_norm", part[f"{n}_norm"], "rms") for y, n in ((q, "query"), (k, "key")))
        q, k, v = (g.reshape(y, 0, 0, heads, H) for y, heads in ((q, c.heads), (k, K), (v, K)))
        if c.qk_norm and c.qk_norm_dims == "head":
            q, k = (self.norm(y, f"{at}.{n}_norm", part[f"{n}_norm"], "rms") for y, n in ((q, "query"), (k, "key")))
        q, k = self.rotate(q, c.windows()[layer]), self.rotate(k, c.windows()[layer])
        q_BKGTH = g.transpose(g.reshape(q, 0, 0, K, G, H), 0, 2, 3, 1, 4)
        names = cache_names(c.layers)[2 * layer : 2 * layer + 2]
        k_BKSH, v_BKSH = (
            g.add("Concat", past, g.transpose(new, 0, 2, 1, 3), axis=2, name=present)
            for (past, present), new in zip(names, (k, v), strict=True)
        )
        one_group = g.ints(2)
        k_BK1HS = g.transpose(g.add("Unsqueeze", k_BKSH, one_group), 0, 1, 2, 4, 3)
        scores = g.add("MatMul", self.times(q_BKGTH, parametrization.attention_scale(c)), k_BK1HS)
        scores = g.add(
            "Where", self.masks[c.windows()[layer]], self.capped(scores, c.attention_softcap), g.number(MASKED)
        )
        out_BKGTH = g.add("MatMul", g.add("Softmax", scores, axis=-1), g.add("Unsqueeze", v_BKSH, one_group))
        out = g.reshape(g.transpose(out_BKGTH, 0, 3, 1, 2, 4), 0, 0, c.heads * H)
        return self.project(out, f"{at}.out", part["out"])

    def feed_forward(self, x: str, at: str, part: dict) -> str:
        """As model.layers.FeedForward."""
        up = self.project(x, f"{at}.up", part["up"])
        if self.config.activation in GATED:
            gate = self.project(x, f"{at}.gate", part["gate"])
            y = self.graph.add("Mul", up, self.nonlinear(gate))
        else:
            y = self.nonlinear(up)
        return self.project(y, f"{at}.down", part["down"])

    def nonlinear(self, x: str) -> str:
        """As model.layers.NONLINEARITIES."""
        g, kind = self.graph, self.config.activation
        if kind in ("swiglu", "silu"):
            return g.add("Mul", x, g.add("Sigmoid", x))
        if kind in ("reglu", "relu", "relu2"):
            y = g.add("Relu", x)
            return g.add("Mul", y, y) if kind == "relu2" else y
        return g.add("Gelu", x, approximate="none" if kind.endswith("_exact") else "tanh")

    # ------------------------------------------------------------------------------------------------- what they share

    def project(self, x: str, at: str, part: dict) -> str:
        """x (B, T, inputs) times a matrix, plus a bias if there is one."""
        bias, weight = part.get("bias"), part["weight"]
        c, name = self.config, at.rpartition(".")[2]
        inputs = {"out": c.heads * c.head_dim, "down": c.ffn}.get(name, c.width)
        y = self.graph.add("MatMul", x, self.graph.weight(f"{at}.weight", weight.reshape(inputs, -1)))
        return y if bias is None else self.graph.add("Add", y, self.graph.weight(f"{at}.bias", bias.reshape(-1)))

    def norm(self, x: str, at: str, part: dict, kind: str | None = None) -> str:
        """As model.layers.Norm."""
        c, g = self.config, self.graph
        scale = part["scale"].reshape(-1) + (1 if c.norm_plus_one else 0)
        scale = g.weight(f"{at}.scale", scale.astype(np.float32))
        bias = [g.weight(f"{at}.bias", part["bias"].reshape(-1))] if "bias" in part else []
        if (kind or c.norm) == "layer":
            return g.add("LayerNormalization", x, scale, *bias, axis=-1, epsilon=c.norm_eps)
        square = g.add("ReduceMean", g.add("Mul", x, x), g.ints(-1))
        deviation = g.add("Sqrt", g.add("Add", square, g.number(c.norm_eps)))
        y = g.add("Mul", g.add("Div", x, deviation), scale)
        return g.add("Add", y, *bias) if bias else y

    def rotary_angles(self) -> dict[bool, tuple[str, str]]:
        """Cosines and sines (T, 1, R/2) of the new tokens, of global layers and of local ones (True)."""
        c, g = self.config, self.graph
        if c.positions != "rotary":
            return {}
        found = {}
        for local in {False, c.rope_theta_local is not None and any(c.windows())}:
            tables = rope_angles(c, jnp.arange(self.length, dtype=jnp.int32)[None], local=local)
            parts = zip(("cos", "sin"), (np.asarray(jax.device_get(x))[0] for x in tables), strict=True)
            weights = [g.weight(f"rotary.{'local.' if local else ''}{name}", table) for name, table in parts]
            found[local] = tuple(g.add("Gather", weight, self.positions_T) for weight in weights)
        return found

    def rotate(self, x: str, window: int) -> str:
        """As model.rotary.rotate: x (B, T, heads, H)."""
        if not self.angles:
            return x
        g, R = self.graph, self.config.rotary_dims
        cos, sin = self.angles.get(bool(window), self.angles[False])
        left = [self.config.head_dim - R] if self.config.head_dim > R else []
        a, b, *rest = g.split(x, [R // 2, R // 2, *left])
        product = lambda x, y: g.add("Mul", x, y)
        turned = g.add("Sub", product(a, cos), product(b, sin)), g.add("Add", product(b, cos), product(a, sin))
        return g.add("Concat", *turned, *rest, axis=-1)

    def mask(self, window: int) -> str:
        """Which key each query sees, bool (T, S)."""
        g = self.graph
        distance = g.add("Sub", g.add("Unsqueeze", self.positions_T, g.ints(1)), self.keys_S)
        seen = g.add("GreaterOrEqual", distance, g.index(0))
        return g.add("And", seen, g.add("Less", distance, g.index(window))) if window else seen

    def capped(self, x: str, cap: float) -> str:
        """cap * tanh(x / cap), if there is a cap."""
        if not cap:
            return x
        return self.times(self.graph.add("Tanh", self.times(x, 1 / cap)), cap)

    def times(self, x: str, factor: float) -> str:
        """x times a constant."""
        return x if factor == 1 else self.graph.add("Mul", x, self.graph.number(factor))


def _of_layer(branch: dict, layer: int) -> dict:
    """The arrays of one layer."""
    return jax.tree.map(lambda array: array[layer], branch)
