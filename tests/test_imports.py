"""Imports run one way: which folder may import which."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What the modules of a folder, or one module of it, may import of the project, besides their own folder.
ALLOWED = {
    "runtime": set(),  # the ground: how a process starts and ends
    "parallel": {"runtime"},
    "data": {"runtime"},  # locks of what is prepared once
    "model": {"parallel", "runtime"},
    "performance": {"model", "parallel", "runtime", "training.config"},  # what a program costs; settings of a step
    "training": {"performance", "model", "parallel", "runtime", "data"},
    # what models are tuned for: tasks that read rows, minimise and judge with the steps of training
    "finetune": {
        "checkpoint.config",
        "checkpoint.digests",  # of what a teacher said
        "config.build",
        "config.layout",  # whether a teacher suits the mesh
        "config.schema",
        "data",
        "inference",
        "model",
        "parallel",
        "runtime",
        "training",
    },
    "checkpoint": {"model", "parallel", "runtime"},
    # models made small, of what lies below them: what opens a model reads its forms, and so lies above
    "compress": {"checkpoint", "data", "model", "parallel", "runtime"},
    # a run that has a task is calibrated with its rows and judged by its metrics
    "compress/own_task.py": {"finetune.measure", "finetune.opening", "inference.opening"},
    # adapters wrap matrices, quantised ones too, and say what of a job is trained; above it stands what opens a run
    "finetune/adapters": {
        *("checkpoint.config", "checkpoint.huggingface", "compress.forms", "compress.layers", "model", "parallel"),
        "compress.rehearsal",
        *("runtime", "training.trainable"),
    },
    "tracking": {"performance", "training.config", "model", "parallel", "runtime"},  # what a person sees of a run
    "inference": {"checkpoint.config", "data.tokenizer", "model", "parallel", "runtime"},  # text comes in and goes out
    # a run's model for the programs that use it: it reads what training wrote
    "inference/opening.py": {
        *("checkpoint", "compress.folder", "config", "data.tokenizer", "model", "parallel", "runtime"),
        *("data.chat", "tracking.run_directory", "training.job", "training.state", "training.trainable"),
        *("finetune.adapters.adaptation", "finetune.adapters.base"),  # of a run that trained these alone
    },
    # adapters beside a model that answers requests, as a run or a folder of peft holds them
    "inference/adapters.py": {
        *("checkpoint.huggingface", "config.schema", "finetune.adapter_config", "finetune.adapters"),
        *("tracking.run_directory", "training.trainable"),
    },
    "inference/step.py": {"finetune.adapters.switched"},  # each row of a step has an adapter of its own
    # models behind an address: it opens one, gives it to the engine and guards the way there
    "serving": {
        *("inference", "data.chat", "data.tokenizer", "model.config", "runtime", "tracking.run_directory"),
        "checkpoint.config",  # which checkpoint of a run
    },
    # a model for other programs: it opens one, as inference does, and writes it as the tables of checkpoint say
    "export": {
        *("checkpoint", "compress.folder", "compress.forms", "data.tokenizer", "data.tokenizers"),
        *("finetune.adapters.merging", "inference", "model", "parallel", "runtime", "tracking.run_directory"),
    },
    "edge": set(),  # one file that runs without the project
    # measures models of runs and of training jobs with text, tasks and programs
    "evaluation": {"config.schema", "data", "inference", "model", "parallel", "runtime", "tracking", "training"},
    # nests the settings of every room, each from a module without JAX
    "config": {
        *(
            "checkpoint.config",
            "checkpoint.digests",
            "checkpoint.huggingface.opened",
            "data.corpus",
            "data.prepared",
            "data.tokenizer",
            "inference.config",
            "model.config",
            "runtime",
        ),
        *("evaluation.config", "finetune.adapter_config", "finetune.config", "model.counts", "model.specs"),
        *("parallel.axes", "parallel.config", "parallel.mesh", "parallel.pipeline.schedules"),
        *("tracking.sinks", "training.config", "training.recipes"),
    },
    # weighs layouts of a run by arithmetic, on machines that are not there: no JAX
    "planner": {
        *("config", "model.config", "model.counts", "model.specs", "performance.hardware", "runtime"),
        *("parallel.axes", "parallel.config", "parallel.mesh", "parallel.pipeline.schedules"),
    },
    "scaling/transfer": {"training", "model", "parallel"},  # a coordinate check looks into steps
    # reads what runs wrote, and starts them as processes of their own: no JAX
    "scaling": {
        *("config.build", "model.config", "model.counts"),
        *("runtime.exit_codes", "runtime.locks", "runtime.arguments", "runtime.overrides", "tracking.metrics_file"),
    },
}
# Programs put the folders together, and are imported by nobody.
ENTRY_POINTS = {
    "train.py",
    "training/parity.py",
    "data/__main__.py",
    "performance/__main__.py",
    "performance/memory.py",
    "parallel/pipeline/__main__.py",
    "inference/__main__.py",
    "checkpoint/huggingface/__main__.py",
    "compress/__main__.py",
    "export/__main__.py",
    "edge/run.py",
    "finetune/__main__.py",
    "evaluation/__main__.py",
    "tracking/__main__.py",
    "serving/__main__.py",
    "scaling/__main__.py",
    "planner/__main__.py",
    "planner/compiled_step.py",
}
PARTS = (
    "scaling/commands/",
    "data/commands/",
    "serving/commands/",
)  # of the entry points beside, which look them up by name
MODULES = {"train"}  # that stand beside the folders

ROOMS = {place.partition("/")[0] for place in ALLOWED}
NOT_OURS = {"tests", "bench", "experiments", "conf", "docs", "runs"}


def sources() -> list[str]:
    """The project's own Python files, without tests."""
    files = (path.relative_to(ROOT) for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")])
    return sorted(file.as_posix() for file in files if file.parts[0] not in NOT_OURS)


def imported(file: str) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: imports are spelled from the root of the checkout"
            # `from training import parity` imports a module, too
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_there_is_something_to_check():
    assert {file.partition("/")[0] for file in sources()} == {*ROOMS, "train.py"}
    assert set(sources()) >= ENTRY_POINTS


@pytest.mark.parametrize("file", sources())
def test_imports_run_one_way(file):
    folder = file.partition("/")[0]
    modules = imported(file)
    tops = {module.partition(".")[0] for module in modules} & (ROOMS | MODULES | NOT_OURS)
    assert not tops & {"tests", "bench", "experiments"}
    entries = {entry.removesuffix(".py").replace("/", ".") for entry in ENTRY_POINTS} | {
        part.rstrip("/").replace("/", ".") for part in PARTS
    }
    assert not modules & entries, "an entry point is imported by nobody"
    if file not in ENTRY_POINTS and not file.startswith(PARTS):
        row = set().union(*(names for place, names in ALLOWED.items() if f"{file}/".startswith(f"{place}/")))
        allowed = {name for name in row if "." not in name}
        modules -= {name for name in modules for whole in row if f"{name}.".startswith(f"{whole}.")}
        tops = {module.partition(".")[0] for module in modules} & (ROOMS | MODULES | NOT_OURS)
        assert tops - {folder} <= allowed, f"{file} imports {tops - {folder} - allowed}"


def test_nothing_outside_parallel_spells_a_sharding():
    """It may hold a NamedSharding, but makes none, and knows no PartitionSpec and no sharding constraint."""
    for file in sources():
        if file.startswith("parallel/"):
            continue
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "attr", getattr(called, "id", None))
            assert name not in ("NamedSharding", "PartitionSpec", "with_sharding_constraint"), f"{file}:{node.lineno}"


@pytest.mark.parametrize("file", [file for file in sources() if file.endswith("__init__.py")])
def test_packages_hold_no_code(file):
    assert not (ROOT / file).read_text()
