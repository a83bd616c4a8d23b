"""Several processes of one script on this machine: what torchrun does, without its agents.

    if __name__ == "__main__":
        launch(main, processes=2)

Run without ``RANK`` the script starts itself once per rank and waits; the first rank that fails ends the others, and its
output is what is shown. Only the ranks import torch.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def launch(main, processes: int = 2) -> None:
    """Calls ``main()`` in every rank."""
    if "RANK" in os.environ:
        main()
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    if sys.platform == "linux":
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as logs:
        ranks = []
        for rank in range(processes):
            log = open(Path(logs) / str(rank), "w+")  # noqa: SIM115 (closed with the process)
            environment = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, *sys.argv]
            ranks.append((subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT), log))
        while (codes := [process.poll() for process, _ in ranks]).count(None) and not any(codes):
            time.sleep(0.05)
        if any(codes):
            time.sleep(1)  # the others may be about to say the same
        for process, _ in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
        for rank, (process, log) in enumerate(ranks):
            log.seek(0)
            if process.returncode or rank == 0:
                print(f"-- rank {rank} ended with {process.returncode}\n{log.read()}")
            log.close()
        sys.exit(1 if any(codes) else 0)


def tiny_model(family: str, **overrides):
    """The fixture of the same name."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("fixtures", ROOT / "tests" / "conftest.py")
    fixtures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    return fixtures.build_tiny_model(family, **overrides)
