"""tracelake beside what a user would pick instead: the same agent under each, one after the other.

Run: ``python -m benchmarks.peers``. Each peer has a virtual environment of its own under ``.venv-peers``,
made by the first run with the machine's pip.
"""
