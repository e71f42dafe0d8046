"""Signs of life and what is made of Ray's messages, without Ray's processes."""

import threading

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, GetTimeoutError

from dfactory.errors import RolloutError
from dfactory.rl import liveness
from dfactory.rl.liveness import Process, Pulse, Watch, beating, why

LEARNERS = {0: Process("a", "10.0.0.1", 11), 1: Process("b", "10.0.0.2", 12)}


def test_a_lost_actor_is_told_in_a_line():
    lost = ActorDiedErrorContext(
        actor_id=bytes(16),
        class_name="RolloutActor",
        pid=7,
        node_ip_address="10.0.0.3",
        error_message="The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit "
        "detail: Worker unexpectedly exits. Some common causes include: (1) the process was killed by the OOM killer",
    )
    told = "pid 7 on 10.0.0.3: The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"
    assert why(ActorDiedError(lost)) == told
    node = "The actor died because its node has died. Node Id: c0\n\tthe actor's node ended: no heartbeat"
    lost = ActorDiedErrorContext(actor_id=bytes(16), class_name="A", error_message=node)
    assert why(ActorDiedError(lost)) == node.replace("\n\t", " ")


def test_other_problems_are_told_too():
    assert why(GetTimeoutError()) == why(TimeoutError()) == "no answer in time"
    assert why(ValueError("what\nhappened")) == "happened"
    assert why(ValueError()) == "ValueError"


def test_beats_come_until_the_end(monkeypatch):
    monkeypatch.setattr(liveness, "BEAT_S", 0.01)
    beats, third = [], threading.Event()

    def beat():
        beats.append(1)
        if len(beats) == 3:
            third.set()

    with beating(beat):
        assert third.wait(30)
    count = len(beats)
    third.wait(0.05)
    assert len(beats) == count


def test_silence_counts_from_the_last_beat_or_the_first_question(monkeypatch):
    clock = iter([100.0, 100.0, 150.0, 160.0])
    monkeypatch.setattr(liveness.time, "monotonic", lambda: next(clock))
    pulse = Pulse(2)
    pulse.beat(0)
    assert pulse.silence() == {0: 0.0, 1: 0.0}
    pulse.beat(1)
    assert pulse.silence() == {0: 60.0, 1: 10.0}


def test_a_learner_is_lost_when_it_is_late_twice_in_a_row():
    watch = object.__new__(Watch)
    watch.learners, watch.limit_s, watch._late = LEARNERS, 60.0, set()
    watch._judge({0: 1.0, 1: 61.0}, {0, 1})  # a controller that was stopped itself has not read its letters yet
    watch._judge({0: 1.0, 1: 1.0}, {0, 1})
    watch._judge({0: 61.0, 1: 99.0}, {0})  # rank 1 has ended
    with pytest.raises(RolloutError, match=r"learner rank 0 \(pid 11 on 10.0.0.1\) has sent no heartbeat for 62 s"):
        watch._judge({0: 62.0, 1: 99.0}, {0})
