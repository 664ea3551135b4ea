"""Which kind of device a computation is for."""

import jax


def platform() -> str:
    """cpu, gpu or tpu: of the mesh in context, which need not be of this machine."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()
