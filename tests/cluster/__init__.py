"""Jobs on several hosts that are network namespaces of this machine: see hosts.py."""
