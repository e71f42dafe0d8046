"""The engine on its own: jobs and what they hear, the queue's bound, and a decoder that fails."""

import queue

import pytest

from dfactory.serving.engine import Engine, Job, QueueFull, Stopped

WAIT_S = 60


@pytest.fixture
def make_job(pipeline):
    def make(heard: queue.Queue, length: int = 5) -> Job:
        return Job([7] * length, pipeline.rules, 0, heard.put)

    return make


@pytest.fixture
def engine(pipeline):
    engine = Engine(pipeline.policy, pipeline.over({"batch_size": 1}).rules, capacity=64, max_queue=2)
    yield engine
    engine.close()


def test_jobs_wait_for_a_slot_and_are_all_answered(engine, make_job):
    heard = [queue.Queue() for _ in range(3)]
    jobs = [make_job(out) for out in heard]
    engine.submit(jobs)  # one for the slot that is free, two that wait
    with pytest.raises(QueueFull, match="3 requests are waiting already") as refused:
        engine.submit([make_job(queue.Queue())])
    assert refused.value.retry_after >= 1
    engine.cancel([jobs[1]])
    engine.start()
    for out in (heard[0], heard[2]):
        while out.get(timeout=WAIT_S).rollout is None:
            pass
    engine.close()
    assert engine.join(WAIT_S)
    assert heard[1].empty()
    assert (engine.counts.answers, engine.counts.given_up, engine.failed) == (2, 1, False)
    with pytest.raises(Stopped, match="shutting down"):
        engine.submit([make_job(queue.Queue())])


def test_a_running_job_is_given_up(engine, make_job):
    first, second = queue.Queue(), queue.Queue()
    job = make_job(first)
    engine.start()
    engine.submit([job])
    assert first.get(timeout=WAIT_S).rollout is None
    engine.cancel([job])
    engine.cancel([job])  # again: nothing happens
    engine.submit([make_job(second)])
    while second.get(timeout=WAIT_S).rollout is None:
        pass
    assert engine.counts.given_up + engine.counts.answers == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_a_decoder_that_failed(engine, make_job, monkeypatch):
    def fail():
        raise MemoryError("no more")

    monkeypatch.setattr(engine.decoder, "step", fail)
    running, waiting = queue.Queue(), queue.Queue()
    engine.submit([make_job(running), make_job(waiting)])
    engine.start()
    assert running.get(timeout=WAIT_S) is None
    assert waiting.get(timeout=WAIT_S) is None
    assert engine.join(WAIT_S)
    assert engine.failed
    with pytest.raises(Stopped, match="the decoder has failed"):
        engine.submit([make_job(queue.Queue())])
