"""The campaign on a real SLURM: a cluster of one node, started here and stopped again.

It needs what Debian's packages `slurm-wlm` and `munge` install, and no configuration of theirs.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.test_campaign import ROOT, numbers

SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # where Debian puts daemons, off a user's path
MISSING = [name for name in ("munged", "slurmctld", "slurmd") if not shutil.which(name, path=SBIN)]
PLUGIN = "snakemake_executor_plugin_slurm"
CONFIGURATION = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
MailProg=/bin/true
MinJobAge=86400
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000
PartitionName=book Nodes=ALL Default=YES
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {MISSING}: apt-get install slurm-wlm munge"),
    pytest.mark.skipif(not find_spec(PLUGIN), reason=f"no {PLUGIN}: pip install it"),
]


def write(folder: Path) -> list[list[str]]:
    """Write what a cluster in `folder` is configured by; return the commands of its daemons."""
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    text = CONFIGURATION.format(host=host, user=user, folder=folder, ports=ports)
    (folder / "slurm.conf").write_text(text)
    for name in ("state", "spool", "bin"):
        (folder / name).mkdir()
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    # Within a job, Snakemake's plugin calls srun without any variable that begins with SLURM.
    srun = folder / "bin" / "srun"
    srun.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which("srun")} "$@"\n')
    srun.chmod(0o700)
    files = [f"--{name}-file={folder}/munged.{name}" for name in ("pid", "seed", "log")]
    munged = ["munged", "-F", "--force", f"--socket={folder}/munge", f"--key-file={folder}/key"]
    return [[*munged, *files], ["slurmctld", "-D"], ["slurmd", "-D"]]


def processes(folder: Path) -> list[int]:
    """Those of the cluster in `folder`, its jobs too: their command or environment names it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:  # it has ended, or is another user's
            continue
        if str(folder).encode() in text and int(process.name) != os.getpid():
            found.append(int(process.name))
    return found


def jobs(states: str = "all") -> list[str]:
    """The states of the cluster's jobs, of those in the given states."""
    command = ["squeue", "--noheader", "--format=%T", f"--states={states}"]
    return subprocess.check_output(command, text=True).split()


def until(happens: Callable[[], object], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.2)


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen]:
    """A campaign of this checkout; it has ended afterwards, whatever happens."""
    campaign = subprocess.Popen(command, cwd=ROOT)
    try:
        yield campaign
    finally:
        campaign.terminate()
        campaign.wait()


def idle() -> bool:
    command = ["sinfo", "--noheader", "--format=%T"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() == "idle"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a running cluster; of which nothing is left in the end."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:  # sockets want a short path
        folder = Path(name)
        commands = write(folder)
        monkeypatch.setenv("SLURM_CONF", f"{folder}/slurm.conf")
        monkeypatch.setenv("PATH", f"{folder}/bin:{SBIN}")
        daemons = []
        try:
            for command in commands:
                daemons.append(subprocess.Popen(command))
                until((folder / "munge").is_socket)
            until(idle)
            yield folder
            subprocess.run(["scancel", f"--user={getpass.getuser()}"], check=True)
            until(lambda: not jobs("pending,running,completing"))
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
                daemon.wait(30)
            for process in processes(folder):  # of a job that could not be canceled
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        until(lambda: not processes(folder), 10)


def test_a_campaign_on_slurm_is_stopped_and_ends_with_the_rows_of_a_local_one(
    cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "book.campaign", "results", "--chapters", "attacks"]
    command += ["--protocol", "quick", "--seeds", "0", "--allow-changes"]
    on_slurm = [*command, f"--results={tmp_path / 'slurm'}", "--executor", "slurm", "--jobs", "2"]
    on_slurm += ["--slurm-status-command", "squeue", "--slurm-logdir", str(cluster / "logs")]
    on_slurm += ["--slurm-init-seconds-before-status-checks", "5", "--max-threads", "1"]
    on_slurm += ["--default-resources", "slurm_partition=book", "runtime=60"]

    with running(on_slurm) as campaign:
        until(lambda: "RUNNING" in jobs() or campaign.poll() is not None, 300)
        campaign.send_signal(signal.SIGINT)
        assert campaign.wait(60) != 0
    until(lambda: not jobs("pending,running,completing"), 30)
    assert "CANCELLED" in jobs()

    with running([*command, f"--results={tmp_path / 'local'}", "--loop"]) as local:
        run = subprocess.run(on_slurm, cwd=ROOT, capture_output=True, text=True)
        logs = "".join(file.read_text()[-2000:] for file in cluster.rglob("logs/**/*.log"))
        assert run.returncode == 0, run.stdout + run.stderr[-4000:] + logs
        assert local.wait() == 0

    ours, theirs = tmp_path / "slurm" / "rows", tmp_path / "local" / "rows"
    units = {file.relative_to(theirs) for file in theirs.rglob("*.done")}
    assert units == {file.relative_to(ours) for file in ours.rglob("*.done")}
    assert jobs().count("COMPLETED") == len(units) > 1
    files = sorted(file.relative_to(theirs) for file in theirs.rglob("*.jsonl"))
    assert [numbers(ours / file) for file in files] == [numbers(theirs / file) for file in files]
    assert sum(len(numbers(ours / file)) for file in files) > len(units)
