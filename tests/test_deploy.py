"""The images and the Kubernetes job are consistent with the project; nothing is built here."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import cagsr
from cagsr.commands.main import COMMANDS, part_of
from cagsr.config import TrainConfig
from cagsr.parse import parse_command

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


class Stage(NamedTuple):
    """What a FROM begins: where it comes from, and its instructions, those of the stage it is based on first."""

    base: str
    instructions: list[tuple[str, str]]


def _stages() -> dict[str, Stage]:
    lines = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M).replace("\\\n", " ").splitlines()
    found: dict[str, Stage] = {}
    given = re.search(r"^ARG PYTHON=(.+)$", DOCKERFILE, re.M)
    assert given is not None
    name = ""
    for word, rest in (line.split(maxsplit=1) for line in lines if line.strip()):
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            base = base.replace("${PYTHON}", given[1])
            before = found[base].instructions if base in found else []
            found[name] = Stage(found[base].base if base in found else base, list(before))
        elif name:
            found[name].instructions.append((word, rest))
    return found


STAGES = _stages()
IMAGES = ("train", "serve")


def _installed(image: str) -> str:
    """The instructions of what an image is copied from."""
    copied = [rest for word, rest in STAGES[image].instructions if word == "COPY"]
    stage = re.search(r"--from=([\w-]+) (\S+) \2$", copied[-1])
    assert stage is not None
    return "\n".join(f"{word} {rest}" for word, rest in STAGES[stage[1]].instructions)


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_is_pinned_and_runs_as_nobody_special(image: str) -> None:
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", STAGES[image].base)
    assert f"Programming Language :: Python :: {STAGES[image].base[7:11]}" in (ROOT / "pyproject.toml").read_text()
    users = [rest for word, rest in STAGES[image].instructions if word == "USER"]
    assert users[-1].isdigit()  # Kubernetes can't tell of a name that it isn't root
    assert int(users[-1]) > 0
    pip = re.findall(r"pip install (.*)", _installed(image))
    assert len(pip) == 2
    assert all(one.startswith("--constraint constraints.txt ") for one in pip)
    assert "torch" in pip[0].split()


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_runs_a_command_whose_extras_it_has(image: str) -> None:
    entry, command = (
        json.loads([rest for word, rest in STAGES[image].instructions if word == kind][-1])
        for kind in ("ENTRYPOINT", "CMD")
    )
    assert entry == ["cagsr"]
    assert command == [image, "--help"]
    if image not in COMMANDS:
        pytest.skip(f"there is no cagsr {image} yet")
    extras = re.findall(r'"\.\[([\w,]+)\]"', _installed(image))[-1].split(",")
    assert set(COMMANDS[image].extras) <= set(extras) <= set(EXTRAS)


def test_what_is_copied_is_there_and_sent_to_the_builder() -> None:
    rules = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert rules[1] == "*"
    sent = {one[1:] for one in rules if one.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.M)
    sources = {source for one in copied for source in one.split()}
    assert sources == sent
    assert all((ROOT / source).exists() for source in sources)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert {project["readme"], *project["license-files"]} <= sources  # the build reads them


def test_no_address_is_named() -> None:
    for path in (ROOT / "Dockerfile", *(ROOT / "deploy").rglob("*.yaml")):
        assert "://" not in path.read_text(encoding="utf-8"), path


def test_the_dockerfile_is_linted() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    linter = str(beside) if beside.is_file() else shutil.which("hadolint")
    if linter is None:
        pytest.skip("hadolint is not installed")
    found = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_the_document_builds_the_targets_that_there_are() -> None:
    text = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
    built = re.findall(r"docker build --target (\w+) --tag cagsr-(\w+):(\S+)", text)
    assert {target for target, *_ in built} == set(IMAGES)
    assert all(target == name and version.startswith(cagsr.__version__) for target, name, version in built)


def _kubernetes() -> dict[str, Any]:
    text = (ROOT / "deploy" / "kubernetes" / "train.yaml").read_text(encoding="utf-8")
    return {one["kind"]: one for one in yaml.safe_load_all(text)}


def test_the_job_trains_with_accelerate_as_the_command_line_does() -> None:
    found = _kubernetes()
    [container] = found["Job"]["spec"]["template"]["spec"]["containers"]
    launch = container["command"]
    assert launch[:3] == ["accelerate", "launch", "--config_file"]
    assert launch[4:] == ["-m", "cagsr.commands.main"]
    name, *flags = container["args"]
    config = parse_command(part_of(name, "config"), flags, prog="cagsr")
    assert isinstance(config, TrainConfig)
    assert config.run.resume  # a pod that is started again must go on
    settings = yaml.safe_load(found["ConfigMap"]["data"]["ddp.yaml"])
    assert settings == yaml.safe_load((ROOT / "examples" / "accelerate" / "ddp.yaml").read_text(encoding="utf-8"))
    assert int(container["resources"]["limits"]["nvidia.com/gpu"]) == settings["num_processes"]
    assert config.run.batch_size % settings["num_processes"] == 0
    assert container["image"] == f"cagsr-train:{cagsr.__version__}"


def test_the_jobs_volumes_are_those_that_are_mounted_and_its_user_is_the_images() -> None:
    found = _kubernetes()
    pod = found["Job"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    volumes = {one["name"]: one for one in pod["volumes"]}
    mounts = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    assert sorted(mounts.values()) == sorted(volumes)
    assert (
        volumes[mounts["/data"]]["persistentVolumeClaim"]["claimName"]
        == found["PersistentVolumeClaim"]["metadata"]["name"]
    )
    config = Path(container["command"][3])
    assert volumes[mounts[str(config.parent)]]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    assert config.name in found["ConfigMap"]["data"]
    written = [value for one in container["args"] for value in one.split("=")[1:] if value.startswith("/")]
    assert written
    assert all(value.startswith("/data/") for value in written)
    # All that is not on a volume can't be written.
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {"name": "HOME", "value": "/tmp"} in container["env"]
    assert "/tmp" in mounts
    user = [rest for word, rest in STAGES["train"].instructions if word == "USER"][-1]
    assert pod["securityContext"]["runAsUser"] == pod["securityContext"]["fsGroup"] == int(user)
    assert pod["securityContext"]["runAsNonRoot"]


def test_the_document_applies_the_job() -> None:
    text = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
    files = [shlex.split(line)[-1] for line in re.findall(r"^kubectl apply .*$", text, re.M)]
    assert files == ["deploy/kubernetes/train.yaml"]
    assert (ROOT / files[0]).is_file()
