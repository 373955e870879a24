"""Runs the program under limits, and decides whether it behaved."""

import os
import resource
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

# The limits of one run.
SECONDS = 20.0
BYTES = 4 << 30
# Signals that end a run early, with the exit code the program gives for each. A process cannot handle SIGKILL.
ENDING = {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class Faults(list):
    """Descriptions of faults. Prints each as it is found."""

    def append(self, fault: str) -> None:
        super().append(fault)
        print(f"fault: {fault}", flush=True)


@dataclass
class Outcome:
    """How one run ended."""

    code: int  # negative: ended by this signal
    stderr: str
    seconds: float
    peak_bytes: int
    timed_out: bool
    sent: list[signal.Signals] = field(default_factory=list)

    def fault(self) -> str | None:
        """What is wrong with the run, or None. A refusal in words is right; a crash, a panic or a hang is not."""
        if self.timed_out:
            return f"ran longer than {SECONDS:g} s"
        if "panicked at" in self.stderr:
            return "panicked"
        if self.peak_bytes > BYTES:
            return f"used {self.peak_bytes / (1 << 30):.1f} GiB"
        allowed = {0, 1, 2} | {ENDING[s] for s in self.sent}
        if not self.stderr and self.seconds < 1:
            # A signal right after the start finds no handler yet.
            allowed |= {-s for s in self.sent}
        if self.code not in allowed:
            return f"ended by signal {-self.code}" if self.code < 0 else f"exit code {self.code}"
        if self.code in (1, 2) and "error: " not in self.stderr:
            return f"exit code {self.code} without a message"
        return None


class Run:
    """One running process, in its own session, so that its children end with it."""

    def __init__(self, program: Path, arguments: list[str], folder: Path, stdin: Path | None = None):
        self.stderr = tempfile.TemporaryFile()
        self.sent: list[signal.Signals] = []
        self.start = time.monotonic()
        with open(stdin or os.devnull, "rb") as given:
            self.process = subprocess.Popen(
                [program, *arguments], cwd=folder, stdin=given, stdout=subprocess.DEVNULL, stderr=self.stderr,
                start_new_session=True, preexec_fn=_no_core,
            )

    def send(self, which: signal.Signals) -> None:
        """Sends a signal, if the process is still there."""
        try:
            os.kill(self.process.pid, which)
            self.sent.append(which)
        except ProcessLookupError:
            pass

    def wait(self, seconds: float = SECONDS) -> Outcome:
        """Waits for the end, at most this long after the start. A run that has ended by now was not too long."""
        timed_out = threading.Event()
        pid, status, usage = os.wait4(self.process.pid, os.WNOHANG)
        if pid != 0:
            return self._outcome(status, usage, False)

        def stop():
            timed_out.set()
            os.killpg(self.process.pid, signal.SIGKILL)

        timer = threading.Timer(max(0.0, self.start + seconds - time.monotonic()), stop)
        timer.start()
        # wait4 gives this child's own peak memory.
        _, status, usage = os.wait4(self.process.pid, 0)
        timer.cancel()
        return self._outcome(status, usage, timed_out.is_set())

    def _outcome(self, status: int, usage: resource.struct_rusage, timed_out: bool) -> Outcome:
        self.process.returncode = os.waitstatus_to_exitcode(status)
        self.stderr.seek(0)
        text = self.stderr.read().decode(errors="replace")
        self.stderr.close()
        return Outcome(
            self.process.returncode, text, time.monotonic() - self.start, usage.ru_maxrss * 1024,
            timed_out, self.sent,
        )


def _no_core() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def run(program: Path, arguments: list[str], folder: Path, stdin: Path | None = None) -> Outcome:
    """Runs the program to its end."""
    return Run(program, arguments, folder, stdin).wait()
