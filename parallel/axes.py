"""The axes of a mesh, and the two tables that say which of them split which dim: to reshard the model, change a row.

No JAX here: what a mesh must divide is told before anything slow is imported.
"""

# Outermost first: neighbours along the last axis sit closest, so the chattiest axis (tensor) comes last.
AXES = ("pipe", "data", "fsdp", "expert", "context", "tensor")

# Where stored parameters, their gradients and their optimizer moments live.
PARAMETER_AXES = {
    "width": ("fsdp",),  # every matrix has one width dim: shard it, gather it just before use
    "heads": ("tensor",),  # a device computes whole heads
    "kv_heads": ("tensor",),  # as heads; replicated when there are fewer than tensor shards
    "head_dim": (),  # never split: rotary positions and norms need whole heads
    "ffn": ("tensor",),  # first matrix by column, second by row: one exchange a block
    "experts": ("expert",),  # whole experts: tokens travel to them
    "routes": (),  # a router's outputs: every device chooses among all experts
    "vocab": ("pipe", "tensor"),  # the two largest tables; logits come out split by vocabulary
    "positions": (),  # learned positions: looked up by a contiguous slice
    "types": (),  # kinds of tokens: two rows
    "features": (),  # the outputs of a head's own matrix, which a norm or a token's vector needs whole
    "norm": (),  # vectors: too small to be worth a gather
    "rank": (),  # between the two thin matrices of an adapter
    "thin": ("fsdp",),  # the same dim of the one of them that has no width dim to split
    "width_groups": ("fsdp",),  # of a quantised matrix: groups of inputs, or codes that share a byte, as the inputs
    "ffn_groups": ("tensor",),
    "layers": ("pipe",),  # the stacking dim: rows in the order of parallel.pipeline.run.slots
}

# Where activations live between operations.
ACTIVATION_AXES = {
    "batch": ("data", "fsdp", "expert"),  # sequences go to every axis that holds a copy of the weights' work
    "tokens": ("context",),  # inside a block: whole sequences, or context shards of them
    "residual": ("context", "tensor"),  # between blocks: sequence parallelism, so no token is stored twice
    "width": (),
    "sequences": ("data", "expert"),  # of rows that are looked up where they lie, with the next one:
    "stored_width": ("fsdp",),  # each device its part of the width, for the sequences of all of fsdp
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "ffn": ("tensor",),
    "rank": (),
    "thin": (),
    "width_groups": (),
    "ffn_groups": ("tensor",),
    "experts": ("expert",),  # of the matrices that a dispatch is handed
    "vocab": ("tensor",),
}

# Dims that stay whole, instead of being refused, when the mesh does not divide them.
REPLICATED_IF_UNDIVIDED = frozenset({"kv_heads", "layers", "thin", "width_groups", "ffn_groups"})
