"""Start or join a Ray cluster, place the processes, run the learners to their end, and clean up.

Inside a Ray job, or with RAY_ADDRESS set, the run joins the existing cluster. Otherwise it starts a local one without a
dashboard; access.py restricts who may connect to it.
"""

import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import grpc
import ray
import torch
from ray._common.utils import get_default_ray_temp_dir
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from dfactory import allocator
from dfactory.errors import DFactoryError, RolloutError
from dfactory.recipe import Recipe
from dfactory.rl.actors import LearnerActor, RolloutActor
from dfactory.rl.controller import Controller
from dfactory.rl.liveness import Process, Watch, why
from dfactory.rl.rollouts import RolloutBatch
from dfactory.rl.weights import put_weights
from dfactory.runs.folder import RunFolder
from dfactory.runs.precision import settled

SOCKET_PATH = 107  # bytes that the kernel allows
LONGEST_SOCKET = len("/session_2026-01-01_00-00-00_000000_1234567/sockets/plasma_store")
GRACE_S = 10.0  # for the other learners to end when one has failed

Learn = Callable[[Recipe, "ControllerClient"], int]
"""The training loop on one rank; its batches come from the controller's client. Returns the exit status."""

WORKERS = {"worker_process_setup_hook": "dfactory.redaction.guard_output"}  # their output goes to Ray's logs
# Ray records the last 100,000 calls, 3 kB each. A long run makes many calls of no interest, such as heartbeats.
NO_RECORD = {"enable_task_events": False}


def run(recipe: Recipe, learn: Learn) -> int:
    """Run a recipe of stage rl. Returns the exit status of its learners, or raises an error that names what failed."""
    with _cluster(recipe.cluster_timeout_s), _placed(recipe) as group:
        recipe = _with_precision(recipe)
        return _run_learners(recipe, learn, _start_controller(recipe, group), group)


def _with_precision(recipe: Recipe) -> Recipe:
    """One for all processes, before any starts: by the devices that they will have, not by this one's."""
    folder = RunFolder(recipe.output_dir)
    candidates = folder.resume_candidates(recipe.resume_from_checkpoint, recipe.overwrite_output_dir)
    precision = settled(recipe, "cuda" if "GPU" in _bundle() else "cpu", candidates)
    if precision.note is not None:
        print(precision.note, flush=True)
    return precision.recipe(recipe)


@contextlib.contextmanager
def _cluster(timeout_s: float):
    """A connection to Ray. On exit the connection is closed, and a cluster that was started here ends."""
    if ray.is_initialized():
        yield
        return
    if address := os.environ.get("RAY_ADDRESS"):
        _await_head(address, timeout_s)
        ray.init(address="auto", runtime_env=WORKERS)
    else:
        ray.init(
            address="local",  # without it Ray joins any cluster that it finds on this machine
            num_cpus=os.cpu_count(),
            include_dashboard=False,
            logging_level="warning",
            _node_ip_address="127.0.0.1",
            _temp_dir=_short_folder(),
            runtime_env=WORKERS,
        )
    try:
        yield
    finally:
        ray.shutdown()


def _await_head(address: str, timeout_s: float) -> None:
    """Wait until a gRPC server answers at host:port. Raises RolloutError; Ray itself would keep trying for 15 minutes."""
    if ":" not in (place := address.removeprefix("ray://")):
        return  # "auto": Ray looks for a cluster on this machine, and fails at once if there is none
    with grpc.insecure_channel(place) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout_s)
        except grpc.FutureTimeoutError:
            raise RolloutError(
                f"RAY_ADDRESS {address} did not answer within cluster_timeout_s {timeout_s:g} s: start Ray's head there, "
                "correct the address, or unset RAY_ADDRESS to start a cluster on this machine"
            ) from None


def _short_folder() -> str | None:
    """Where a local cluster keeps its sockets: None for Ray's default, or /tmp/ray if the paths would be too long there."""
    folder = get_default_ray_temp_dir()
    if len(os.path.abspath(folder)) + LONGEST_SOCKET <= SOCKET_PATH:
        return None
    print(f"socket paths in {folder} would be longer than {SOCKET_PATH} bytes: Ray uses /tmp/ray instead", flush=True)
    return "/tmp/ray"


@contextlib.contextmanager
def _placed(recipe: Recipe):
    group = _place(recipe)
    try:
        yield group
    finally:
        remove_placement_group(group)


def _bundle() -> dict[str, float]:
    """The resources of one process with a model: a core, and a GPU if the cluster has any."""
    return {"CPU": 1.0, "GPU": 1.0} if ray.cluster_resources().get("GPU") else {"CPU": 1.0}


def _place(recipe: Recipe) -> PlacementGroup:
    """One bundle for each learner, then one for each rollout actor. Raises RolloutError with demand and supply."""
    count = recipe.num_learners + recipe.num_rollout_workers
    group = placement_group([_bundle()] * count, strategy="PACK")
    try:
        ray.get(group.ready(), timeout=recipe.cluster_timeout_s)
    except GetTimeoutError:
        remove_placement_group(group)
        demand = Counter()
        for _ in range(count):
            demand.update(_bundle())
        kinds = ("CPU", "GPU")
        supply = {kind: ray.cluster_resources().get(kind, 0.0) for kind in kinds}
        free = {kind: ray.available_resources().get(kind, 0.0) for kind in kinds}
        raise RolloutError(
            f"the cluster could not place num_learners {recipe.num_learners} + num_rollout_workers "
            f"{recipe.num_rollout_workers} within {recipe.cluster_timeout_s:.0f} s: they need {dict(demand)}, the cluster "
            f"has {supply}, free now {free}: lower their number, add nodes, or raise cluster_timeout_s"
        ) from None
    return group


def _options(group: PlacementGroup, index: int, threads: int) -> dict:
    bundle = _bundle()
    return {
        "num_cpus": bundle["CPU"],
        "num_gpus": bundle.get("GPU", 0),
        "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)} | _malloc()},
    }


def _malloc() -> dict[str, str]:
    """The user's choice, which processes on other nodes do not inherit."""
    return {name: os.environ[name] for name in (allocator.VARIABLE,) if name in os.environ}


class Threads(NamedTuple):
    """Of each process with a model."""

    learner: int
    rollout: int

    @classmethod
    def of(cls, recipe: Recipe, cores: int, given: str | None) -> "Threads":
        """The node's cores, divided by the processes that compute at the same time: learners and rollout actors take turns
        where no group is decoded ahead. `given`: OMP_NUM_THREADS, which has precedence."""
        if given:
            return cls(int(given), int(given))
        learners, actors = recipe.num_learners, recipe.num_rollout_workers
        if recipe.decodes_ahead:
            learners = actors = learners + actors
        return cls(max(1, cores // learners), max(1, cores // actors))


def _threads(recipe: Recipe) -> Threads:
    return Threads.of(recipe, torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS"))


def _start_controller(recipe: Recipe, group: PlacementGroup):
    first, threads, folder = recipe.num_learners, _threads(recipe), os.getcwd()

    def make_rollout_actor(index: int):
        options = _options(group, first + index, threads.rollout) | NO_RECORD
        return ray.remote(RolloutActor).options(**options).remote(recipe, folder)

    # On the driver's node, whose rewards and datasets it reads. By default Ray puts an actor without cores anywhere.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_concurrency": 1000, "scheduling_strategy": here} | NO_RECORD
    return ray.remote(Controller).options(**options).remote(recipe, make_rollout_actor, folder)


def _run_learners(recipe: Recipe, learn: Learn, controller, group: PlacementGroup) -> int:
    threads, size = _threads(recipe).learner, recipe.num_learners
    learners = [
        ray.remote(LearnerActor).options(**_options(group, rank, threads)).remote(rank, size, os.getcwd())
        for rank in range(size)
    ]
    try:
        processes = {rank: _started(learner.process.remote(), rank, recipe) for rank, learner in enumerate(learners)}
        address = _started(learners[0].address.remote(), 0, recipe)
        client = ControllerClient(controller, recipe)
        waiting = {learner.run.remote(recipe, learn, address, client): rank for rank, learner in enumerate(learners)}
        watch = Watch(controller, processes, recipe.heartbeat_timeout_s)
        return _wait(waiting, processes, watch, recipe)
    finally:
        for actor in (*learners, controller):
            ray.kill(actor)


def _started(reference, rank: int, recipe: Recipe):
    """The first answer of a learner."""
    try:
        return ray.get(reference, timeout=recipe.cluster_timeout_s)
    except (RayActorError, GetTimeoutError) as problem:
        raise RolloutError(
            f"learner rank {rank} did not start within cluster_timeout_s {recipe.cluster_timeout_s:.0f} s: {why(problem)}"
        ) from problem


def _wait(waiting: dict, processes: dict[int, Process], watch: Watch, recipe: Recipe) -> int:
    """The largest exit status of the learners, once all have ended."""
    statuses, looked = [], time.monotonic()
    with _preemption_signals() as signals:
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=1.0)
            while signals:
                _send(signals.pop(), processes[0])  # one rank is enough: see distributed.any_rank
            for reference in done:
                try:
                    statuses.append(ray.get(reference))
                except RayError as problem:
                    raise _failure(problem, reference, waiting, processes, recipe) from problem
                del waiting[reference]
            looked, before = time.monotonic(), looked
            try:
                watch.look(looked - before, set(waiting.values()))
            except RolloutError as problem:
                _kill([*(processes[rank] for rank in waiting.values()), *watch.processes])
                raise RolloutError(f"{problem}; {_last_checkpoint(recipe)}") from problem
    return max(statuses)


@contextlib.contextmanager
def _preemption_signals():
    """A list that collects the signals which engine.preemption handles in a run without Ray. A second one ends this
    process."""
    came: list[int] = []

    def remember(number, frame) -> None:
        came.append(number)
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _send(number: int, process: Process):
    """Send a signal to a process on any node. Returns a reference that is ready when the signal was sent."""

    def send() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)

    there = NodeAffinitySchedulingStrategy(process.node_id, soft=False)
    return ray.remote(send).options(num_cpus=0, scheduling_strategy=there).remote()


def _kill(processes: list[Process]) -> None:
    """Kill processes that may be stopped: they do not react to Ray, and would outlive it."""
    sent = [_send(signal.SIGKILL, process) for process in processes]
    ray.wait(sent, num_returns=len(sent), timeout=GRACE_S)


def _failure(
    problem: RayError, reference, waiting: dict, processes: dict[int, Process], recipe: Recipe
) -> DFactoryError:
    """The error to raise for a learner that ended with `problem`; it names the last checkpoint.

    When one rank is lost the others soon fail in a collective operation. Their errors are collected for a moment, so that
    the error names the rank that was lost.
    """
    problems = {waiting.pop(reference): problem}
    others, _ = ray.wait(list(waiting), num_returns=len(waiting), timeout=GRACE_S) if waiting else ([], [])
    for other in others:
        try:
            ray.get(other)
        except RayError as its_problem:
            problems[waiting[other]] = its_problem
    rank = min(problems, key=lambda rank: (_blame(problems[rank]), rank))
    problem, name = problems[rank], f"learner rank {rank}"
    if not isinstance(problem, RayTaskError):
        process = str(processes[rank])  # Ray names it in some of its errors only
        message = f"{name} ({process}) was lost: {why(problem).removeprefix(f'{process}: ')}"
        if "its owner has died" in message:  # the owner is this process, which is alive
            message = f"the raylet of the driver's node has ended, and with it all processes of this run ({message})"
        return RolloutError(f"{message}; {_last_checkpoint(recipe)}")
    kind = type(problem.cause) if isinstance(problem.cause, DFactoryError) else RolloutError
    message = problem.cause if isinstance(problem.cause, DFactoryError) else f"failed: {problem}"
    return kind(f"{name}: {message}; {_last_checkpoint(recipe)}")


def _blame(problem: RayError) -> int:
    """A sort key for the problems of several ranks: lost processes first, then expected errors, then all others."""
    if not isinstance(problem, RayTaskError):
        return 0
    return 1 if isinstance(problem.cause, DFactoryError) else 2


def _last_checkpoint(recipe: Recipe) -> str:
    latest = Path(recipe.output_dir) / "LATEST"
    if not latest.is_file():
        return "no checkpoint had been saved"
    return (
        f"the last checkpoint is {latest.parent / latest.read_text().strip()}: resume with resume_from_checkpoint=true"
    )


class ControllerClient:
    """A learner's client of the controller: plain calls that block; an error names what they waited for."""

    def __init__(self, controller, recipe: Recipe):
        self.controller = controller
        attempts = recipe.max_rollout_attempts + 1
        self.timeout_s = attempts * (recipe.rollout_timeout_s + recipe.reward_timeout_s) * 4 + recipe.cluster_timeout_s

    def beat(self, rank: int) -> None:
        """Send a learner's heartbeat without waiting for it."""
        self.controller.beat.remote(rank)

    def publish(self, version: int, groups: Iterable[dict[str, torch.Tensor]]) -> dict[str, float]:
        started = time.perf_counter()
        weights = put_weights(version, groups)
        self._wait(self.controller.publish.remote(weights), f"the controller to take weights of version {version}")
        return {"seconds/sync": time.perf_counter() - started, "sync_bytes": float(weights.nbytes)}

    def next_batch(self, version: int, next_group: int) -> RolloutBatch:
        return self._wait(self.controller.next_batch.remote(version, next_group), f"the rollouts of step {version + 1}")

    def _wait(self, reference, what: str):
        try:
            return ray.get(reference, timeout=self.timeout_s)
        except GetTimeoutError:
            raise RolloutError(f"waited {self.timeout_s:.0f} s for {what}: see the log of the controller") from None
        except RayTaskError as problem:
            if isinstance(problem.cause, DFactoryError):
                raise problem.cause from problem
            raise
        except RayActorError as problem:
            raise RolloutError(f"the controller was lost while waiting for {what}: {why(problem)}") from problem
