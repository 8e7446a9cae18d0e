"""What a process that a fork server forked can tell of itself, and an end to it: see test_fork_server.py.

Arguments: how to end, as a Python statement.
"""

import json
import os
import sys
import threading

facts = {
    "pid": os.getpid(),
    "arguments": sys.argv[1:],
    "folder": os.getcwd(),
    "variable": os.environ.get("RANK_FACTS"),
    "imported": "torch" in sys.modules,
    "threads": threading.active_count(),
    "hash": hash("a text"),
}
print(json.dumps(facts), flush=True)
exec(sys.argv[1])
