"""A Slurm cluster of two emulated nodes for the time of a test: munged, slurmctld and two slurmd, run by root."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "sinfo", "scontrol", "scancel")
NODES = ("node1", "node2")
START_SECONDS = 30
SBIN = "/usr/sbin"


def missing() -> str | None:
    """Why the cluster can't be started here, or None."""
    if os.geteuid() != 0:
        return "starting slurmd needs root"
    absent = [name for name in PROGRAMS if not shutil.which(name, path=os.environ.get("PATH", "") + ":" + SBIN)]
    return f"not installed: {', '.join(absent)} (Debian: slurm-wlm, munge)" if absent else None


class Cluster:
    """The cluster's folder, its daemons and the commands that talk to it."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.conf = base / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        self.environment["PATH"] = self.environment.get("PATH", "") + ":" + SBIN
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._configure()
            self._start("munged", *self._munge_options())
            self._until(lambda: (self.base / "munge.socket").exists(), "munged opened its socket")
            self._start("slurmctld", "-D", "-c", "-f", str(self.conf))
            for node in NODES:
                (self.base / f"spool.{node}").mkdir()
                self._start("slurmd", "-D", "-N", node, "-f", str(self.conf))
            self._until(self._idle, "both nodes are idle")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.run("scancel", "--user=root", check=False)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command against this cluster."""
        return subprocess.run(command, env=self.environment, cwd=cwd, capture_output=True, text=True, check=check)

    def _configure(self) -> None:
        self.base.chmod(0o755)
        (self.base / "state").mkdir()
        key = self.base / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        template = (Path(__file__).parent / "slurm.conf.in").read_text(encoding="utf-8")
        values = {"HOST": socket.gethostname().split(".")[0], "BASE": str(self.base)}
        values |= {f"PORT{index}": str(port) for index, port in enumerate(_free_ports(3))}
        for name, value in values.items():
            template = template.replace(f"@{name}@", value)
        self.conf.write_text(template, encoding="utf-8")
        (self.base / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n", encoding="utf-8")

    def _munge_options(self) -> list[str]:
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        # --force: the folders above may be writable by others, which munged refuses by default.
        return ["--foreground", "--force", *(f"--{name}={self.base}/munge.{end}" for name, end in files.items())]

    def _start(self, program: str, *options: str) -> None:
        with (self.base / f"{program}.{len(self.daemons)}.out").open("wb") as log:
            command = [f"{SBIN}/{program}", *options]
            self.daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _idle(self) -> bool:
        return self.run("sinfo", "-h", "-t", "idle", "-o", "%D", check=False).stdout.split() == [str(len(NODES))]

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"gave up waiting until {what}; the logs are in {self.base}")
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()
