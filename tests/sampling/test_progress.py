"""A step counts when it has finished, not when it was launched; and the GPU always has more to do."""

import pytest
import torch

from ddt_fast.sampling.progress import IN_FLIGHT, FinishedSteps


@pytest.fixture
def events(monkeypatch):
    """What happens on a GPU: launches, and waits for them."""
    happened = []

    class Event:
        def __init__(self, blocking):
            assert blocking, "the host must not spin"

        def record(self):
            self.number = sum(what == "launched" for what, _ in happened)
            happened.append(("launched", self.number))

        def synchronize(self):
            happened.append(("waited for", self.number))

    monkeypatch.setattr(torch.cuda, "Event", Event)
    return happened


def test_on_a_gpu_steps_count_when_they_have_finished_and_some_stay_in_flight(events):
    done = []
    with FinishedSteps(torch.device("cuda"), done.append) as steps:
        for number in range(20):
            steps.launched(number / 2)
            assert len(done) == max(number + 1 - IN_FLIGHT, 0)
    assert done == [number / 2 for number in range(20)]
    assert [number for what, number in events if what == "waited for"] == list(range(20))


def test_a_run_that_failed_is_not_waited_for(events):
    def fail():
        with FinishedSteps(torch.device("cuda"), lambda amount: None) as steps:
            steps.launched()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert events == [("launched", 0)]


def test_on_a_cpu_they_count_at_once(events):
    done = []
    with FinishedSteps(torch.device("cpu"), done.append) as steps:
        steps.launched()
        assert done == [1]
    assert events == []
