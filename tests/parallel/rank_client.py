"""Stand in for a rank that a fork server forks: see fork_server.py. Imports little, as each rank of a job starts one.

python rank_client.py SOCKETS MODULE ARGUMENTS...
"""

import json
import os
import signal
import socket
import sys


def main() -> None:
    """Ask for the rank, wait for its end, and end the same way."""
    sockets, *arguments = sys.argv[1:]
    number = int(os.environ.get("HOROVOD_RANK", "0")) % 2
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(f"{sockets}{number}")
        request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
        status = server.recv(16)
    if not status:
        sys.exit(f"the fork server of {sockets} has ended. Received: no exit status. See the server's errors.")
    code = int(status)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


main()
