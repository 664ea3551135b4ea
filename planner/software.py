"""How training programs behave, as far as time depends on it: this project's, and those that published tables."""

from dataclasses import dataclass, replace

SCHEDULES = ("zero_bubble", "zero_bubble_v", "interleaved", "1f1b", "gpipe")


@dataclass(frozen=True)
class Software:
    """One program. Shares say how much of an exchange runs beside computation, if there is enough of it."""

    name: str
    lockstep: bool  # stages exchange in every tick of a pipeline's table, and wait for each other
    ends_on_all_stages: bool  # embedding and loss are split over the stages, instead of lying on the first and last
    gathers_every_microbatch: bool  # fsdp inside a pipeline; else once a step (ZeRO-2)
    reduces_every_microbatch: bool  # gradients over fsdp, of each microbatch
    schedules: tuple[str, ...] = SCHEDULES  # of pipelines, that it has
    narrow_moments: bool = True  # optimizer moments may be kept in 16 bits
    moments_over_data: bool = False  # optimizer state and its update split over data and context (ZeRO-1)
    gradients_over_data: bool = False  # gradients too (ZeRO-2)
    weights_over_context: bool = False  # fsdp splits parameters over the ranks of context as well as its own
    in_place: bool = False  # gradients are summed over devices and microbatches where they lie, in memory kept for them
    keeps_gathered: bool = True  # what tensor shards have gathered for a matmul is kept for its backward pass
    sequence_parallel: bool = True  # norms and residuals are split over tensor
    fused_attention: bool = True
    attention: float = 1.0  # of the rate of a kernel made for the machine: FlashAttention-2 leaves a Hopper half idle
    selective: bool = False  # remat=attention: as in arXiv 2205.05198, attention's inside alone is computed again
    dots_again: float = 0.0  # remat=dots: share of a layer's matmuls that is computed again all the same
    gradient_bytes: int = 2  # that travel, an element
    state_bytes: int = 0  # of a parameter, with a master copy that is not split; 0: as train.param_dtype says
    master_bytes: int = 0  # of a parameter's master copy that is split as moments are
    held_gradient_bytes: int = 0  # in memory, a parameter; 0: as parameters
    logit_bytes: int = 0  # of a logit with all that a loss makes of it; 0: by platform
    passes: float = 1.0  # over memory in elementwise work, relative to a compiler that fuses it
    kernel_us: float = 2.0  # lost between two kernels
    overlap_tensor: float = 0.0
    overlap_fsdp: float = 0.9
    overlap_data: float = 0.5
    overlap_context: float = 0.5
    overlap_expert: float = 0.0
    overlap_pipe: float = 0.5


ISOMESH = Software(
    "isomesh", lockstep=True, ends_on_all_stages=True, gathers_every_microbatch=True, reduces_every_microbatch=True
)
# Compilers for TPUs run collectives as asynchronous kernels beside the matmuls, tensor's in windowed einsums
ISOMESH_TPU = replace(ISOMESH, kernel_us=0.5, overlap_tensor=0.6, overlap_fsdp=0.97, overlap_data=0.9)
# On PyTorch stages drift, two hold the ends of the model, and weights and gradients stay whole between microbatches
PYTORCH = Software(
    "",
    lockstep=False,
    ends_on_all_stages=False,
    gathers_every_microbatch=False,
    reduces_every_microbatch=False,
    keeps_gathered=False,
    schedules=("interleaved", "1f1b", "gpipe"),
    narrow_moments=False,
    in_place=True,
    gradient_bytes=4,
    passes=1.3,
    kernel_us=4.0,
    attention=0.65,  # FlashAttention-2
)
# At the end of 2024: FSDP over its own ranks and context's (torchtitan/parallelisms/parallel_dims.py, `dp_shard_cp`);
# the model gives logits in float32, of which a compiled loss has one gradient in float32 and one in bfloat16, and an
# eager one has its softmax, the gradient of that and its own
TORCHTITAN = replace(PYTORCH, name="torchtitan", dots_again=0.5, weights_over_context=True, logit_bytes=10)
# Megatron-Core: distributed optimizer, collectives beside matmuls; no schedule that splits backward
MEGATRON = replace(
    PYTORCH,
    name="megatron",
    moments_over_data=True,
    selective=True,
    attention=0.8,  # of Transformer Engine
    state_bytes=2,
    master_bytes=4,
    held_gradient_bytes=4,
    overlap_tensor=0.7,
    overlap_data=0.9,
    overlap_pipe=0.8,
)
PROGRAMS = {
    "isomesh": ISOMESH,
    # arXiv 2104.04473: 16-bit gradients reduced over data at the end, all activations recomputed, unfused attention
    "megatron2021": replace(
        PYTORCH,
        name="megatron2021",
        sequence_parallel=False,
        fused_attention=False,
        gradient_bytes=2,
        state_bytes=6,
        held_gradient_bytes=6,  # the optimizer copies 16-bit gradients into 32 bits (megatron/optimizer/optimizer.py)
        passes=1.4,
        overlap_data=0.0,
        overlap_pipe=0.0,
    ),
    "megatron": MEGATRON,
    # The Llama 3 Herd of Models, arXiv 2407.21783, section 3.3.2: the same, with gradients split over data as well
    "llama3": replace(MEGATRON, name="llama3", gradients_over_data=True),
    # pytorch/torchtitan: FSDP2, remat by operation, torch.compile or not, asynchronous tensor parallelism or not
    "torchtitan": TORCHTITAN,
    "torchtitan-eager": replace(TORCHTITAN, name="torchtitan-eager", passes=2.6, kernel_us=5.0, logit_bytes=14),
    "torchtitan-async": replace(TORCHTITAN, name="torchtitan-async", overlap_tensor=0.5),
    # AI-Hypercomputer/maxtext on TPUs: the same compiler
    "maxtext": replace(ISOMESH_TPU, name="maxtext"),
}


def program(name: str, platform: str) -> Software:
    """The program of that name on a platform. Raises ValueError."""
    if name not in PROGRAMS:
        raise ValueError(f"--program {name} is unknown; use one of {', '.join(PROGRAMS)}")
    return ISOMESH_TPU if (name, platform) == ("isomesh", "tpu") else PROGRAMS[name]
