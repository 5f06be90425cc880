"""The examples of docs/multi-gpu.md, unchanged, on loopback: two machines of one process each."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "multi-gpu.md").read_text()
SHORT = [
    *("--trainer.max_steps", "2", "--trainer.val_check_interval", "2"),
    *("--trainer.enable_progress_bar", "false", "--model.init_args.ahead_steps", "1"),
    *("--data.init_args.forgetting_prompts", "9", "--data.init_args.eval_examples", "5"),
]
# Stands in for srun: as many tasks as the job has nodes, each with the variables of its own.
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit=1
for id in $(seq 0 $((SLURM_NTASKS - 1))); do
    SLURM_PROCID=$id SLURM_NODEID=$id SLURM_LOCALID=0 "$@" &
done
wait -n && wait -n
"""


def example(name: str) -> str:
    (block,) = re.findall(rf"```bash {name}\n(.*?)```", PAGE, flags=re.DOTALL)
    return str(block)


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """That of a machine of its own, whose ``python`` and ``torchrun`` are those of this test."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("python", ""), ("torchrun", "-m torch.distributed.run ")):
        (programs / name).write_text(f'#!/bin/bash\nexec {sys.executable} {module}"$@"\n')
    (programs / "srun").write_text(SRUN)
    for program in programs.iterdir():
        program.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_"))}
    return kept | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "LWF_CACHE": str(tmp_path / "cache"),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }


def run(script: str, folder: Path, *environments: dict[str, str]) -> None:
    """Runs the script once in each environment, side by side, and checks what they leave."""
    options = [*SHORT, "--trainer.default_root_dir", str(folder / "runs")]
    command = ["bash", "-e", "-c", script, "script", *options]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for environment in environments
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=120)
            assert process.returncode == 0, output[-5000:]
    finally:
        for process in started:
            process.kill()
    (version,) = (folder / "runs").iterdir()
    (scores,) = (version / "scores").iterdir()
    rows = [json.loads(line) for line in scores.read_text().splitlines()]
    assert len(rows) == 9
    assert [path.name for path in (version / "checkpoints").iterdir()] == ["step-000002.ckpt"]
    assert "forget/accuracy_world_forgetting" in (version / "metrics.csv").read_text()
    assert (version / "config.yaml").is_file()


def test_the_second_process_is_started_by_the_first(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (command,) = re.findall(r"^    (python cli\.py fit .* ddp --trainer\.devices 2)$", PAGE, re.M)
    run(f'{command} "$@"', tmp_path, environment)


def test_torchrun(environment: dict[str, str], tmp_path: Path) -> None:
    nodes = [environment | {"NNODES": "2", "GPUS": "1", "NODE_RANK": str(rank)} for rank in (0, 1)]
    run(example("torchrun"), tmp_path, *nodes)


def test_slurm(environment: dict[str, str], tmp_path: Path) -> None:
    script = example("slurm")
    directives = dict(re.findall(r"#SBATCH --([\w-]+)=(\S+)", script))
    job = {
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NAME": "lwf",
        "SLURM_NNODES": directives["nodes"],
        "SLURM_NTASKS_PER_NODE": directives["ntasks-per-node"],
        "SLURM_NTASKS": "2",
        "SLURM_NODELIST": "localhost",
    }
    run(script, tmp_path, environment | job)
