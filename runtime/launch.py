"""Runs several processes of one program on this machine, joined over loopback: for tests and for small boxes.

python -m runtime.launch --processes 2 train.py runtime.platform=cpu runtime.cpu_devices=4
python -m runtime.launch --processes 2 -m training.parity

Each process finds its place in ISOMESH_COORDINATOR, ISOMESH_PROCESSES and ISOMESH_PROCESS_ID (runtime.start reads
them) and, where there are GPUs, takes the one of its rank. Output comes line by line with the rank in front. When one
process fails the others are ended. Ctrl-C and SIGTERM are passed on to all.

Exit code: 0 when all end with 0; that of the first process to fail (128 + n for signal n); 75 when processes stopped
early after a clean checkpoint and none failed.
"""

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from argparse import REMAINDER, Namespace
from collections.abc import Sequence
from typing import BinaryIO

from runtime.arguments import Parser
from runtime.exit_codes import DONE, PREEMPTED
from runtime.ports import free_port

PR_SET_PDEATHSIG = 1  # prctl(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line, runs the processes, returns the exit code."""
    options = parse(arguments)
    command = [sys.executable, *(["-m"] if options.module else []), *options.program]
    port = options.port or free_port()
    group = ProcessGroup(options.grace)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, group.forward)
    try:
        for rank in range(options.processes):
            group.launch(command, rank, options.processes, port)
        return group.wait()
    finally:
        group.kill()


def parse(arguments: Sequence[str] | None) -> Namespace:
    """Options of the launcher come before the program; all that follows belongs to the program."""
    parser = Parser(prog="python -m runtime.launch", description=__doc__.split("\n")[0])
    parser.add_argument("--processes", type=int, required=True, help="how many processes to run")
    parser.add_argument("--port", type=int, default=0, help="of the coordinator (default: a free one)")
    parser.add_argument("--grace", type=float, default=10.0, help="seconds from SIGTERM to SIGKILL after a failure")
    parser.add_argument("-m", dest="module", action="store_true", help="the program is a module")
    parser.add_argument("program", nargs=REMAINDER, help="script or module, and its arguments")
    options = parser.parse_args(arguments)
    if options.processes < 1:
        parser.error(f"--processes {options.processes} is below 1")
    if not options.program:
        parser.error("no program given; for example: --processes 2 train.py runtime.platform=cpu")
    if not options.module and not os.path.isfile(options.program[0]):
        parser.error(f"no such file: {options.program[0]}")
    return options


def environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """The variables that tell a process its place."""
    variables = {"ISOMESH_PROCESSES": str(processes), "ISOMESH_PROCESS_ID": str(rank), "PYTHONUNBUFFERED": "1"}
    if processes > 1:
        address = f"127.0.0.1:{port}"
        variables |= {"ISOMESH_COORDINATOR": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
        variables["JAX_LOCAL_DEVICE_IDS"] = str(rank)  # of GPUs; simulated CPU devices are each process's own
    return variables


def words() -> list[str]:
    """What `python` was given to launch this process: the launcher and its options, or nothing where none was used."""
    processes = os.environ.get("ISOMESH_PROCESSES")
    return ["-m", "runtime.launch", "--processes", processes] if processes else []


class ProcessGroup:
    """The processes of one run: started together, ended together."""

    def __init__(self, grace: float):
        self.grace = grace
        self._processes: list[subprocess.Popen] = []
        self._readers: list[threading.Thread] = []
        self._ended: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()  # (rank, exit code) as they end
        self._print_lock = threading.Lock()

    def launch(self, command: Sequence[str], rank: int, processes: int, port: int) -> None:
        """Starts one process; its output is passed on by a thread for each stream."""
        output = subprocess.PIPE if processes > 1 else None
        process = subprocess.Popen(
            command,
            env=os.environ | environment(rank, processes, port),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # else a terminal's Ctrl-C would reach it twice, once through us
            preexec_fn=die_with_parent(os.getpid()),
        )
        self._processes.append(process)
        for source, target in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            if source is not None:
                self._spawn(self._pass_on, source, target.buffer, f"[{rank}] ".encode())
        threading.Thread(target=lambda: self._ended.put((rank, process.wait())), daemon=True).start()

    def wait(self) -> int:
        """Waits for all to end and returns the exit code of the whole; the first failure ends the others."""
        result, deadline = 0, None
        for _ in self._processes:
            rank, code = self._next_end(deadline)
            code = 128 - code if code < 0 else code
            if deadline is None and code not in (DONE, PREEMPTED):  # of a preempted run all stop at the same step
                result, deadline = code, time.monotonic() + self.grace
                if len(self._processes) > 1:
                    print(f"launch: process {rank} ended with exit code {code}; ending the others", file=sys.stderr)
                self._signal_all(signal.SIGTERM)
            elif deadline is None:
                result = max(result, code)
        return result

    def forward(self, number: int, frame: object) -> None:
        """Signal handler: passes the signal on to all processes."""
        self._signal_all(number)

    def kill(self) -> None:
        """Ends what is left of the processes, and waits for the last of the output."""
        self._kill_all()
        for reader in self._readers:
            reader.join(timeout=2)  # a process left behind may hold the pipe for ever

    def _next_end(self, deadline: float | None) -> tuple[int, int]:
        try:
            return self._ended.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            self._kill_all()
            return self._ended.get()

    def _signal_all(self, number: int) -> None:
        for process in self._processes:
            process.send_signal(number)  # does nothing for a process that has ended

    def _kill_all(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # it leads a session: its own children end with it

    def _spawn(self, function, *arguments) -> None:
        reader = threading.Thread(target=function, args=arguments, daemon=True)
        reader.start()
        self._readers.append(reader)

    def _pass_on(self, source: BinaryIO, target: BinaryIO, prefix: bytes) -> None:
        for line in source:
            with self._print_lock, contextlib.suppress(OSError):  # a closed terminal must not block the run
                target.write(prefix + line.rstrip(b"\n") + b"\n")
                target.flush()


def die_with_parent(parent: int):
    """For preexec_fn: the kernel ends the process when its parent, of this id, dies, even by kill -9. Linux only."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork

    def ask_kernel() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os._exit(1)

    return ask_kernel


if __name__ == "__main__":
    sys.exit(main())
