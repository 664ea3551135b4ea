"""The least time of a training step by kernel: python -m performance [key=value ...] --hardware h200 [--text FILE].

The step is compiled as train.py would, for an H200 ahead of time (in an environment with jax[cuda13]; no GPU need be
there) or, with --hardware here, for the devices of this machine. With --text a program's text is read from a file
instead (`compiled.as_text()`). Nothing is run. Exit code 2 for a mistake.
"""

import sys
from argparse import Namespace
from pathlib import Path

from config.command_line import command_line
from config.layout import mesh_sizes
from config.schema import Config
from performance.roofline import MACHINES, kernels, table
from runtime import leave
from runtime.arguments import Parser
from runtime.exit_codes import DONE, MISTAKE

TARGETS = ("h200", "here")


def arguments(words: list[str]) -> tuple[Namespace, list[str]]:
    """The program's own options, and the settings."""
    parser = Parser(
        "python -m performance",
        description="The least time of a training step by kernel.",
        usage="%(prog)s [--hardware h200|here] [--price DEVICE] [--text FILE] [--dearest N] [key=value ...]",
    )
    parser.add_argument("--hardware", default="h200", choices=TARGETS, help="what the step is compiled for")
    parser.add_argument("--price", choices=MACHINES, default="h200", help="the device whose rates are counted with")
    parser.add_argument("--text", type=Path, help="a program's text, instead of compiling one")
    parser.add_argument("--dearest", type=int, default=10, help="how many kernels are listed")
    return parser.parse_known_args(words)


def compiled(config: Config, hardware: str) -> str:
    """The text of the training step."""
    import jax

    from finetune.adapters.adaptation import adapted
    from parallel.mesh import make_mesh
    from performance.targets import gpus
    from runtime import compiler_flags
    from runtime.start import start
    from training.job import abstract_batch, make_job

    if hardware == "here":
        start(config.runtime)
        devices = jax.devices()
    else:
        compiler_flags.add("gpu", devices=False)
        jax.config.update("jax_platforms", "cpu")
        devices = gpus(hardware)
    mesh = make_mesh(mesh_sizes(config, len(devices)), devices)
    with jax.set_mesh(mesh):
        job = make_job(config, mesh, **adapted(config))
        traced = job.step.trace(job.abstract, abstract_batch(config.train, mesh, segments=config.data.segments))
        target = "cuda" if hardware == "h200" else mesh.devices.flat[0].platform
        return traced.lower(lowering_platforms=(target,)).compile().as_text()


def program_text(file: Path) -> str:
    """The text of a compiled program. Raises ValueError where the file holds none."""
    text = file.read_text() if file.is_file() else ""
    if "ENTRY" not in text:
        raise ValueError(f"--text {file}: this is no file with a compiled program's text (compiled.as_text())")
    return text


def main(words: list[str]) -> int:
    """Prints the tables; returns the exit code."""
    options, settings = arguments(words)
    try:
        text = program_text(options.text) if options.text else compiled(command_line(settings)[0], options.hardware)
        print(table(kernels(text), MACHINES[options.price], options.dearest))
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return MISTAKE
    return DONE


if __name__ == "__main__":
    leave.answer_signals()
    sys.exit(main(sys.argv[1:]))
