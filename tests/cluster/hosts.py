"""Several hosts on one machine: a network namespace each, with a hostname and an sshd of its own, joined by a bridge.

    with Hosts(2) as hosts:
        process = hosts.start("h1", ["horovodrun", "-np", "4", "-H", "h1:2,h2:2", ...])

A program of its own (`python -m tests.cluster.hosts NUMBER`) makes them, keeps them for as long as its standard input is open,
and then takes everything down: all processes in them, namespaces, bridge, files. So nothing is left when a test fails, and
nothing when the test process is killed. Everything lies in namespaces named after that program's process id; even the bridge,
in one more. Should the program itself be killed, the next one clears up after it.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ETC = Path("/etc/netns")  # `ip netns exec NAME` lays what is in /etc/netns/NAME over /etc
RUN = Path("/run/netns")
PREFIX = "hvd-syncbn-"
NETWORK = "10.77.0"
START_SECONDS = 60
# Sends nothing it was not asked for, and reads no file of the user's.
SSH_CONFIG = """Host *
  BatchMode yes
  IdentitiesOnly yes
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
# A home without a .bashrc: bash reads it under sshd, too, and a test that kills a shell in the middle of it leaves what it left
# there, as pyenv's lock, for which every later shell of the user waits a minute.
SSHD_CONFIG = """ListenAddress {address}
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
PidFile none
SetEnv HOME={folder}
MaxStartups 100
"""


class Hosts:
    """Up to 9 hosts h1, h2, ... that live as long as the `with` block, or as this process.

    Raises:
        RuntimeError: this machine cannot have them; the message says what is missing.
    """

    def __init__(self, number: int) -> None:
        self.names = [f"h{i}" for i in range(1, number + 1)]
        # In a session of its own: Ctrl-C reaches the tests, and then, by the closed pipe, the keeper.
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.hosts", str(number)], cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self._keeper.stdout is not None
        line = self._keeper.stdout.readline()
        said = json.loads(line) if line else {"missing": "its keeper ended"}
        if "missing" in said:
            self.close()
            raise RuntimeError(f"hosts as network namespaces: {said['missing']}")
        self.prefix: str = said["prefix"]

    def __enter__(self) -> Hosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take them down; returns when nothing is left."""
        self._keeper.communicate(timeout=60)

    def address(self, host: str) -> str:
        """A host's IPv4 address."""
        return f"{NETWORK}.{host[1:]}"

    def command(self, host: str, command: Sequence[str]) -> list[str]:
        """The command that runs a command on a host."""
        return in_host(self.prefix, host, command)

    def start(self, host: str, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Start a command on a host."""
        return subprocess.Popen(self.command(host, command), stdin=subprocess.DEVNULL, text=True, **options)

    def pids(self, host: str) -> list[int]:
        """The processes on a host."""
        return pids(f"{self.prefix}{host}")


def in_host(prefix: str, host: str, command: Sequence[str]) -> list[str]:
    """The command that runs a command in a host's namespaces, under its name."""
    script = f'hostname {host}; exec "$@"'
    return ["ip", "netns", "exec", f"{prefix}{host}", "unshare", "--uts", "sh", "-c", script, "sh", *command]


def pids(namespace: str) -> list[int]:
    """The processes in a namespace; none if it is not there."""
    result = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    return [int(pid) for pid in result.stdout.split()]


def namespaces() -> list[str]:
    """Our namespaces on this machine."""
    return sorted(path.name for path in RUN.glob(f"{PREFIX}*")) if RUN.exists() else []


# --- The keeper -----------------------------------------------------------------------------------------------------


def missing() -> str | None:
    """What this machine lacks, and the command that gets it."""
    tools = {"ip": "iproute2", "sshd": "openssh-server", "ssh": "openssh-client", "ssh-keygen": "openssh-client"}
    packages = sorted({package for tool, package in tools.items() if shutil.which(tool) is None})
    if packages:
        return f"missing from the system: apt-get install {' '.join(packages)}"
    if os.getuid() != 0:
        return "only root may make network namespaces"
    return None


def ip(*arguments: str) -> None:
    """Run `ip`."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def set_up(prefix: str, number: int, folder: Path) -> None:
    """Make the switch, then the hosts, and wait until each answers."""
    for key in ("key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    hosts = [f"h{i}" for i in range(1, number + 1)]
    names = "".join(f"{NETWORK}.{host[1:]} {host}\n" for host in hosts)
    switch = f"{prefix}switch"
    ip("netns", "add", switch)
    ip("-n", switch, "link", "add", "br0", "type", "bridge")
    ip("-n", switch, "link", "set", "br0", "up")
    for host in hosts:
        namespace, address = f"{prefix}{host}", f"{NETWORK}.{host[1:]}"
        etc = ETC / namespace
        (etc / "ssh").mkdir(parents=True)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (etc / "ssh" / "ssh_config").write_text(SSH_CONFIG.format(folder=folder))
        ip("netns", "add", namespace)
        ip("-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", host, "netns", switch)
        ip("-n", switch, "link", "set", host, "master", "br0", "up")
        ip("-n", namespace, "addr", "add", f"{address}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            ip("-n", namespace, "link", "set", link, "up")
        config = folder / f"sshd_{host}"
        config.write_text(SSHD_CONFIG.format(folder=folder, address=address))
        sshd = [str(shutil.which("sshd")), "-D", "-f", str(config), "-E", str(folder / f"{host}.log")]
        subprocess.Popen(in_host(prefix, host, sshd), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + START_SECONDS
    for host in hosts:
        while True:
            result = subprocess.run(
                in_host(prefix, "h1", ["ssh", host, "hostname"]), capture_output=True, text=True, check=False
            )
            if result.stdout.strip() == host:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"{host} does not answer: {result.stderr}")
            time.sleep(0.1)


def take_down(prefix: str) -> None:
    """End all processes in the namespaces of this prefix, then delete those, and the files."""
    mine = [name for name in namespaces() if name.startswith(prefix)]
    deadline = time.monotonic() + 20
    while (left := [pid for name in mine for pid in pids(name)]) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)
    for name in mine:
        subprocess.run(["ip", "netns", "delete", name], check=False)
    for folder in (*ETC.glob(f"{prefix}*"), *Path(tempfile.gettempdir()).glob(f"{prefix}*")):
        shutil.rmtree(folder, ignore_errors=True)


def clear_up() -> None:
    """Take down what keepers left that are no more."""
    for prefix in {found[0] for name in namespaces() if (found := re.match(rf"{PREFIX}(\d+)-", name))}:
        try:
            commands = Path(f"/proc/{prefix.removeprefix(PREFIX)[:-1]}/cmdline").read_bytes()
        except FileNotFoundError:
            commands = b""
        if b"tests.cluster.hosts" not in commands:
            take_down(prefix)


def main() -> None:
    """Keep hosts until standard input ends."""
    prefix = f"{PREFIX}{os.getpid()}-"

    def say(**what: str) -> None:
        print(json.dumps(what), flush=True)

    reason = missing()
    if reason is not None:
        say(missing=reason)
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    clear_up()
    try:
        folder = Path(tempfile.gettempdir()) / prefix
        folder.mkdir(mode=0o700)
        try:
            set_up(prefix, int(sys.argv[1]), folder)
        except subprocess.CalledProcessError as error:
            say(missing=f"{shlex.join(map(str, error.cmd))}: {error.stderr}")
            return
        say(prefix=prefix)
        sys.stdin.read()
    finally:
        take_down(prefix)


if __name__ == "__main__":
    main()
