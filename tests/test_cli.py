"""The command line: mistakes are told in one line, at once; help and sweeps."""

import subprocess
import sys
import time

import pytest
import runs

import train
from config import build, command_line, compose
from config.schema import Config
from runtime import launch

DONE, MISTAKE = 0, 2
AT_ONCE_S = 4.0  # two, on a machine that is not busy with tests


def call(*arguments: str) -> tuple[subprocess.CompletedProcess, float]:
    """`python train.py ARGUMENTS` to its end, and the seconds that it took."""
    began = time.perf_counter()
    command = [sys.executable, "train.py", *arguments]
    ended = subprocess.run(command, cwd=runs.ROOT, env=runs.environment(), capture_output=True, text=True, timeout=120)
    return ended, time.perf_counter() - began


def assert_one_line(said: str, *words: str) -> None:
    """A single line that begins with `error:` and holds all the words."""
    assert said.startswith("error: "), said
    assert said.count("\n") == 1, said
    assert all(word in said for word in words), said


BEFORE_ANYTHING_SLOW = {
    "unknown key": (["model.widht=64"], ["model.widht", "did you mean model.width?"]),
    "unknown group": (["modell.width=64"], ["modell.width", "model.width"]),
    "wrong type": (["train.steps=many"], ["train.steps='many'", "should be int"]),
    "out of range": (["optimizer.lr=-1"], ["optimizer.lr=-1", "0 or more"]),
    "unknown preset": (["model=nanoo"], ["model=nanoo", "did you mean model=nano?"]),
    "no override": (["faster"], ["faster is no override", "key=value"]),
    "bad syntax": (["seed=1", "run.name=a=b"], ["cannot read run.name=a=b", """as a text write 'run.name="a=b"'"""]),
    "sweep without -m": (["seed=1,2"], ["seed", "--multirun"]),
    "fields that do not fit": (["train.batch_size=6", "train.grad_accumulation=4"], ["train.batch_size=6"]),
    "missing tokenizer": (["tokenizer=file", "tokenizer.path=no/tokenizer.json"], ["no/tokenizer.json"]),
    "bad tokenizer": (["tokenizer=file", "tokenizer.path=README.md"], ["README.md", "not a tokenizer.json"]),
}


@pytest.mark.parametrize("case", BEFORE_ANYTHING_SLOW)
def test_mistake_is_told_at_once(case, tmp_path):
    (tmp_path / "README.md").write_text("# no tokenizer\n")
    arguments, words = BEFORE_ANYTHING_SLOW[case]
    ended, seconds = call(*(argument.replace("README.md", str(tmp_path / "README.md")) for argument in arguments))
    assert (ended.returncode, ended.stdout) == (MISTAKE, "")
    assert_one_line(ended.stderr, *words)
    assert seconds < AT_ONCE_S


def test_impossible_mesh_and_missing_data(tmp_path):
    common = runs.overrides(tmp_path / "text", tmp_path / "run", "runtime.cpu_devices=8")
    mesh, _ = call(*common, "mesh.tensor=3")
    assert (mesh.returncode, mesh.stdout) == (MISTAKE, "")
    assert_one_line(mesh.stderr, "3 does not divide 8 devices", "nearest legal: ", "mesh.tensor=4")
    assert not (tmp_path / "run").exists()
    data, _ = call(*common)
    assert data.returncode == MISTAKE
    assert "Traceback" not in data.stdout
    assert_one_line(data.stderr, f"data.path={tmp_path / 'text'}/*.txt matches no file")


def test_mesh_that_the_model_does_not_fit_names_the_dims(tmp_path, capsys):
    arguments = runs.overrides(
        tmp_path / "text", tmp_path / "run", "mesh.tensor=8", "model.heads=6", "model.kv_heads=3"
    )
    assert runs.run(arguments) == MISTAKE
    assert_one_line(capsys.readouterr().err, "model.heads=6 does not divide by mesh.tensor=8", "nearest legal: ")


def test_mistakes_across_folders(capsys):
    for arguments, words in [
        (["train.seq_len=4096", "model.positions=learned"], ["train.seq_len=4096", "model.max_positions=4096"]),
        (["model.vocab_size=100"], ["model.vocab_size=100", "256"]),
        (["mesh.data=-1"], ["only one mesh axis can be -1"]),
        (["mesh.pipe=0"], ["mesh.pipe=0", "use 1 or more"]),
        (["pipeline.schedule=pipedream"], ["pipeline.schedule=pipedream", "1f1b", "zero_bubble"]),
        (["pipeline.microbatches=-1"], ["pipeline.microbatches=-1"]),
        (["pipeline.schedule=1f1b", "pipeline.chunks=2"], ["pipeline.chunks=2", "use 1"]),
        (["-m", "pipeline.schedule=gpipe,1f1b"], ["are one run in runs/", "pipeline.schedule", "sweep run.dir too"]),
        (["context.style=spiral"], ["context.style=spiral", "ring, ulysses, gather"]),
        (["model=5"], ["model=5", "model=nano"]),
        (["model.rope_scaling=3"], ["model.rope_scaling", "should be a group of keys"]),
        (["sample.prompts=null"], ["sample.prompts=None", "should be a list"]),
        (["data=text"], ["data.path"]),
    ]:
        with pytest.raises(SystemExit) as ended:
            command_line.command_line(arguments)
        assert ended.value.code == MISTAKE
        assert_one_line(capsys.readouterr().err, *words)


def test_missing_conf_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compose, "CONF", tmp_path / "conf")
    with pytest.raises(SystemExit) as ended:
        command_line.command_line(["seed=1"])
    assert ended.value.code == MISTAKE
    assert_one_line(capsys.readouterr().err, str(tmp_path / "conf"))


def test_help_lists_every_key_and_preset():
    ended, seconds = call("--help")
    assert (ended.returncode, ended.stderr) == (DONE, "")
    listed = {line.strip().partition("=")[0] for line in ended.stdout.splitlines()}
    assert set(build.keys(Config)) <= listed
    assert "gpt2_124m|" in ended.stdout
    assert seconds < AT_ONCE_S


def test_sweep_is_every_combination():
    jobs = command_line.command_line(
        ["-m", "seed=1,2", "model=nano,gpt2_124m", "sample.prompts=[a,b]", "train.steps=70"]
    )
    assert [(job.seed, job.model.layers) for job in jobs] == [(1, 4), (1, 12), (2, 4), (2, 12)]
    assert {(job.sample.prompts, job.train.steps) for job in jobs} == {(("a", "b"), 70)}
    assert len({job.run.dir for job in jobs}) == 4


def test_sweep_runs_each_job_until_one_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = runs.overrides(runs.corpus(tmp_path / "text"), tmp_path / "nowhere", "runtime.cpu_devices=8")
    arguments.remove(f"run.dir={tmp_path / 'nowhere'}")
    assert train.main(command_line.command_line(["--multirun", *arguments, "seed=0,1", "train.steps=4"])) == DONE
    first, second = sorted((tmp_path / "runs").iterdir())
    assert {runs.saved_config(run)["seed"] for run in (first, second)} == {0, 1}
    assert runs.losses(first).keys() == runs.losses(second).keys()
    assert runs.losses(first) != runs.losses(second)
    capsys.readouterr()
    failing = command_line.command_line(["-m", *arguments, "checkpoint.resume=require", "seed=2,3", "train.steps=4"])
    assert train.main(failing) == MISTAKE
    assert_one_line(capsys.readouterr().err, "checkpoint.resume=require")


def test_commands_to_go_on_with_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "data.path=my notes/*.txt", "run.dir=a b", "train.steps=5"])
    done = command_line.next_commands(compose.load(["run.dir=a b", "train.steps=100"]), launch.words(), done=True)
    assert done["extend"] == "python train.py 'data.path=my notes/*.txt' 'run.dir=\"a b\"' train.steps=200"
    assert done["generate"] == "python -m inference 'a b' 'def '"
    assert done["see"] == "python -m tracking 'a b'"
    assert command_line.next_commands(compose.load(["run.dir=a b"]), launch.words(), done=False) == {
        "go on": "python train.py 'data.path=my notes/*.txt' 'run.dir=a b' train.steps=5",
        "see": "python -m tracking 'a b'",
    }


def test_commands_of_several_processes_start_them_as_they_were_started(monkeypatch):
    """The launcher only where it was used; a process that was started by hand has its rank in its command."""
    asked = compose.load(["run.dir=a", "train.steps=100"])
    by_hand = ["train.py", "runtime.coordinator=h:1", "runtime.processes=2", "runtime.process_id=0"]
    monkeypatch.setattr(sys, "argv", by_hand)
    own = ", in each process with its own runtime.process_id"
    command = " ".join(["python", *by_hand])
    assert (
        command_line.next_commands(asked, launch.words(), done=True)[f"extend{own}"]
        == f"{command} run.dir=a train.steps=200"
    )
    assert command_line.next_commands(asked, launch.words(), done=False)[f"go on{own}"] == command
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=1"])
    assert (
        command_line.next_commands(asked, launch.words(), done=False)["go on"] == "python train.py seed=1"
    )  # by srun, on each node
    monkeypatch.setenv("ISOMESH_PROCESSES", "2")
    assert (
        command_line.next_commands(asked, launch.words(), done=False)["go on"]
        == "python -m runtime.launch --processes 2 train.py seed=1"
    )


def test_an_experiment_is_a_sweep(monkeypatch, capsys):
    became = []
    monkeypatch.setattr(command_line, "_become", lambda *words: became.append(list(words)) or sys.exit(0))
    sweep = "experiments/isoflop_cpu/sweep.yaml"
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=gpu"]
    for words in ([], slurm):
        with pytest.raises(SystemExit):
            command_line.command_line(["-m", "experiment=isoflop_cpu", *words])
    assert became == [["run", sweep], ["run", sweep, "--launcher", "submitit_slurm", "hydra.launcher.partition=gpu"]]
    for words, told in (
        (["experiment=nowhere"], "there is no experiments/nowhere/sweep.yaml; experiments with a sweep: isoflop_cpu,"),
        (["experiment=isoflop_cpu", "seed=1"], "is a whole sweep: seed=1 belongs into the overrides"),
    ):
        with pytest.raises(SystemExit) as ended:
            command_line.command_line(["-m", *words])
        assert (ended.value.code, told in capsys.readouterr().err) == (2, True)
