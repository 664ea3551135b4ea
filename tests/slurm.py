"""A SLURM of one machine for tests: sbatch, srun, squeue, sacct, scontrol and scancel that keep their books in files.

`install` puts the commands on a PATH. Jobs run at once, unless the file `hold` is there: then they wait, PENDING.
`signal_step` sends a signal to each process of a job's step, as SLURM does before a job's time is up.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "squeue", "sacct", "scontrol", "scancel")


class Slurm:
    """The books of one fake: `jobs/ID.json` for each job or element of an array."""

    def __init__(self, folder: Path):
        self.folder = folder

    def install(self, monkeypatch) -> "Slurm":
        (self.folder / "bin").mkdir(parents=True)
        (self.folder / "jobs").mkdir()
        for name in COMMANDS:
            program = self.folder / "bin" / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {self.folder} {name} "$@"\n')
            program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{self.folder / 'bin'}:{os.environ['PATH']}")
        return self

    @property
    def hold(self) -> Path:
        return self.folder / "hold"

    def submitted(self) -> list[dict]:
        """What sbatch was given: the script's text, and the size of the array."""
        path = self.folder / "sbatch.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def jobs(self) -> dict[str, dict]:
        return {path.stem: json.loads(path.read_text()) for path in (self.folder / "jobs").glob("*.json")}

    def note(self, job: str, **changes) -> None:
        path = self.folder / "jobs" / f"{job}.json"
        values = json.loads(path.read_text()) if path.exists() else {}
        path.with_suffix(".tmp").write_text(json.dumps(values | changes))
        path.with_suffix(".tmp").rename(path)

    def signal_step(self, job: str, number: int) -> None:
        os.killpg(self.jobs()[job]["step"], number)

    def end_all(self) -> None:
        """Kills what still runs."""
        for job in self.jobs().values():
            for group in (job.get("step"), job["daemon"]):
                if group and job["state"] in ("PENDING", "RUNNING"):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(group, signal.SIGKILL)

    # ------------------------------------------------------------------------------------------------------- commands

    def sbatch(self, script: str) -> None:
        text = Path(script).read_text()
        options = dict(line[10:].split("=", 1) for line in text.splitlines() if line.startswith("#SBATCH --"))
        if options.get("partition") == "nowhere":
            sys.exit("sbatch: error: invalid partition specified: nowhere")
        size = int(options["array"].split("-")[1].split("%")[0]) + 1 if "array" in options else 0
        number = str(100 + len(self.submitted()))
        copy = self.folder / f"{number}.sh"
        copy.write_text(text)
        with (self.folder / "sbatch.jsonl").open("a") as file:
            file.write(json.dumps({"text": text, **options, "array": size}) + "\n")
        for index in range(size) if size else [None]:
            job = number if index is None else f"{number}_{index}"
            here = [sys.executable, __file__, str(self.folder), "daemon", job, str(copy)]
            daemon = subprocess.Popen(
                here, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            self.note(job, state="PENDING", name=options["job-name"], daemon=daemon.pid)
        print(f"Submitted batch job {number}")

    def daemon(self, job: str, script: str) -> None:
        number, _, index = job.partition("_")
        environment = os.environ | {"SLURM_JOB_ID": number, "SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "1"}
        environment |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
        if index:
            environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": index}
        while True:
            while self.hold.exists() or job not in self.jobs():
                time.sleep(0.02)
            self.note(job, state="RUNNING", requeue=False)
            code = subprocess.run(["bash", script], env=environment | {"FAKE_JOB": job}).returncode
            if not self.jobs()[job]["requeue"]:
                self.note(job, state="FAILED" if code else "COMPLETED")
                return
            self.note(job, state="PENDING")

    def srun(self, *words: str) -> None:
        words, output = list(words), ""
        while words[0].startswith("--"):
            option = words.pop(0)
            if option in ("--output", "--error"):
                output = words.pop(0)
        number, _, index = os.environ["FAKE_JOB"].partition("_")
        output = output.replace("%j", number).replace("%A", number).replace("%a", index).replace("%t", "0")
        os.setsid()
        self.note(os.environ["FAKE_JOB"], step=os.getpid())
        with open(output, "ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.execvp(words[0], words)

    def squeue(self, *_: str) -> None:
        if (self.folder / "deaf").exists():
            sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
        for job, values in self.jobs().items():
            if values["state"] in ("PENDING", "RUNNING"):
                print(f"{job}|{job.partition('_')[2] or 'N/A'}|{values['state']}|{values['name']}")

    def sacct(self, *_: str) -> None:
        print("JobID|State|NodeList")
        for job, values in self.jobs().items():
            print(f"{job}|{values['state']}|here")

    def scontrol(self, verb: str, job: str) -> None:
        assert verb == "requeue"
        self.note(job, requeue=True)

    def scancel(self, job: str) -> None:
        self.note(job, state="CANCELLED")


if __name__ == "__main__":
    getattr(Slurm(Path(sys.argv[1])), sys.argv[2])(*sys.argv[3:])
