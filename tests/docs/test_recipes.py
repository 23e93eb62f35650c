"""The recipes for clusters, as far as they can be tried without one: their scripts run with stand-ins for Slurm."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from shoal import GRPOConfig
from shoal.cli import serve

ROOT = Path(__file__).resolve().parents[2]
SLURM, KUBERNETES = ROOT / "docs" / "slurm.md", ROOT / "docs" / "kubernetes.md"
NODES = ("node1", "node2", "node3")

# A node's task: what `srun` would run there runs here, once for each local task number that it asks for.
STAND_INS = {
    "scontrol": "#!/bin/bash\nprintf '%s\\n' " + " ".join(NODES) + "\n",
    "hostname": "#!/bin/bash\necho 10.0.0.7 fd00::7\n",
    "sleep": "#!/bin/bash\n",
    "srun": """#!/bin/bash
tasks=1
while [[ $1 == --* ]]; do
    [[ $1 == --ntasks-per-node=* ]] && tasks=${1#*=}
    echo "$1" >>"$RECORDS/srun"
    shift
done
for ((i = 0; i < tasks; i++)); do SLURM_LOCALID=$i "$@"; done
""",
    **{
        name: f'#!{sys.executable}\nimport json, os, sys\nwith open(os.environ["RECORDS"] + "/{name}", "a") as file:\n'
        '    file.write(json.dumps({"argv": sys.argv[1:], "env": dict(os.environ)}) + "\\n")\n'
        for name in ("shoal", "torchrun", "ray")
    },
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def run_with_stand_ins(script: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Run a batch script; return what each program was called with."""
    bin_folder, records = folder / "bin", folder / "records"
    bin_folder.mkdir()
    records.mkdir()
    for name, text in STAND_INS.items():
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)
    environment = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "RECORDS": str(records),
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NODELIST": "node[1-3]",
    }
    # What runs in the background is waited for, since the stand-ins end by themselves.
    done = subprocess.run(
        ["bash", "-c", f"{script}\nwait"], env=environment, capture_output=True, text=True, timeout=60, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return {
        name: [json.loads(line) for line in (records / name).read_text().splitlines()]
        for name in ("shoal", "torchrun", "ray")
        if (records / name).exists()
    }


def parsed(argv: list[str]) -> argparse.Namespace:
    assert argv[0] == "serve"
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return parser.parse_args(argv[1:])


def test_the_slurm_recipe_starts_engines_where_its_trainer_looks_for_them(tmp_path: Path) -> None:
    called = run_with_stand_ins(blocks(SLURM, "bash")[0], tmp_path)
    engines = [parsed(call["argv"]) for call in called["shoal"]]
    assert [engine.port for engine in engines] == [8000, 8001, 8002, 8003]
    assert {(engine.host, engine.tp, engine.model) for engine in engines} == {("10.0.0.7", 2, "Qwen/Qwen3-8B")}
    (trainer,) = called["torchrun"]
    urls = trainer["env"]["ENGINES"].split()
    assert urls == [f"http://{node}:{port}" for node in NODES[1:] for port in range(8000, 8004)]
    assert trainer["env"]["KEY_FILE"] == engines[0].key_file == str(tmp_path / "shoal.key")
    assert trainer["argv"][-1] == "train.py"
    asked = (tmp_path / "records" / "srun").read_text().split()
    assert "--nodelist=node2,node3" in asked and "--nodelist=node1" in asked and "--nodes=2" in asked


def test_the_ray_recipe_gives_the_trainers_gpus_to_nobody_else(tmp_path: Path) -> None:
    called = run_with_stand_ins(blocks(SLURM, "bash")[1], tmp_path)
    starts = {call["argv"][1].partition("=")[0]: call["argv"] for call in called["ray"]}
    assert "--num-gpus=0" in starts["--head"] and "--port=6379" in starts["--head"]
    assert "--node-ip-address=10.0.0.7" in starts["--head"]
    assert starts["--address"][1] == "--address=10.0.0.7:6379"
    (trainer,) = called["torchrun"]
    assert trainer["env"]["RAY_ADDRESS"] == "10.0.0.7:6379"
    (settings,) = re.findall(r"`(vllm_launcher=.*?)`, `(vllm_num.*?)`, `(vllm_tensor.*?)`", SLURM.read_text())
    args = eval(f"GRPOConfig(output_dir={str(tmp_path)!r}, use_cpu=True, bf16=False, {', '.join(settings)})")
    assert isinstance(args, GRPOConfig) and args.vllm_launcher == "ray"


def test_the_training_script_of_the_recipes_attaches_to_what_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (script,) = blocks(SLURM, "python")
    made: list[Any] = []

    class Trainer:
        def __init__(self, *arguments: Any) -> None:
            made.extend(arguments)

        def train(self) -> None:
            made.append("trained")

    monkeypatch.setattr("shoal.trainer.grpo_trainer.GRPOTrainer", Trainer)
    monkeypatch.setenv("ENGINES", "http://node2:8000 http://node3:8000")
    monkeypatch.setenv("KEY_FILE", "shoal.key")
    monkeypatch.setenv("MODEL", "some/model")
    exec(compile(script.replace('"run",', f"{str(tmp_path)!r}, use_cpu=True, bf16=False,"), "train.py", "exec"), {})
    model, reward, args, dataset, trained = made
    assert (model, trained, len(dataset)) == ("some/model", "trained", 64)
    assert args.vllm_server_base_urls == ["http://node2:8000", "http://node3:8000"]
    assert args.vllm_api_key_file == "shoal.key"
    assert reward(["ab", "abcd"]) == [-0.02, -0.04]


def test_the_kubernetes_recipe_is_of_one_piece() -> None:
    (text,) = blocks(KUBERNETES, "yaml")
    service, engines, job = yaml.safe_load_all(text)
    assert (service["kind"], engines["kind"], job["kind"]) == ("Service", "StatefulSet", "Job")
    pod, trainer = engines["spec"]["template"], job["spec"]["template"]["spec"]["containers"][0]
    (engine,) = pod["spec"]["containers"]
    arguments = parsed(engine["command"][1:])
    variables = {entry["name"]: entry for entry in engine["env"]}
    assert arguments.host == "$(POD_IP)" and "POD_IP" in variables  # Kubernetes puts it in
    assert arguments.tp == engine["resources"]["limits"]["nvidia.com/gpu"]
    labels = pod["metadata"]["labels"]
    assert service["spec"]["selector"] == engines["spec"]["selector"]["matchLabels"] == labels
    assert engines["spec"]["serviceName"] == service["metadata"]["name"]
    env = {entry["name"]: entry for entry in trainer["env"]}
    assert env["ENGINES"]["value"].split() == [
        f"http://{engines['metadata']['name']}-{index}.{service['metadata']['name']}:{arguments.port}"
        for index in range(engines["spec"]["replicas"])
    ]
    assert arguments.model == env["MODEL"]["value"]
    secret = env["SHOAL_ENGINE_API_KEY"]["valueFrom"]
    assert secret == variables["SHOAL_ENGINE_API_KEY"]["valueFrom"]
    (command,) = re.findall(r"^    (kubectl create secret .*)$", KUBERNETES.read_text(), flags=re.MULTILINE)
    assert f"generic {secret['secretKeyRef']['name']} --from-literal={secret['secretKeyRef']['key']}=" in command
    assert {mount["mountPath"] for mount in engine["volumeMounts"]} == {"/dev/shm"}
    for spec in (pod["spec"], job["spec"]["template"]["spec"]):
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {mount["name"] for container in spec["containers"] for mount in container["volumeMounts"]} == volumes


def test_the_key_command_makes_a_file_that_nobody_else_can_read(tmp_path: Path) -> None:
    (command,) = re.findall(r"^    (\(umask .*\))$", SLURM.read_text(), flags=re.MULTILINE)
    subprocess.run(["bash", "-c", command], check=True, cwd=tmp_path, timeout=60)
    key = tmp_path / "shoal.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(key.read_text().strip()) == 64
