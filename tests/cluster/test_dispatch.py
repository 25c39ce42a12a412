"""No image is lost and none is done twice, whichever workers die and whenever."""

import random

import pytest

from minigpt4_runtime.cluster.dispatch import TASKS_AT_ONCE, Dispatch, Task


class Cluster:
    """Workers that die by chance, or for certain by an image that is `deadly`."""

    def __init__(self, tasks, seed, *, num_workers, deadly=(), share_of_deaths=0.0):
        self.dispatch = Dispatch(tasks)
        self.random = random.Random(seed)
        self.deadly = set(deadly)
        self.share_of_deaths = share_of_deaths
        self.holds = {number: [] for number in range(num_workers)}
        self.next_number = num_workers
        self.done, self.given_up = [], []

    def run(self):
        while not self.dispatch.is_done:
            for worker, tasks in self.holds.items():
                while task := self.dispatch.next_for(worker):
                    tasks.append(task)
                assert len(tasks) <= TASKS_AT_ONCE
            worker = self.random.choice([w for w, tasks in self.holds.items() if tasks])
            task = self.random.choice(self.holds[worker])
            if self.random.random() < self.share_of_deaths or self.deadly & set(task.positions):
                del self.holds[worker]
                self.given_up += self.dispatch.bury(worker)
                self.holds[self.next_number] = []
                self.next_number += 1
            else:
                self.holds[worker].remove(task)
                self.dispatch.finish(worker, task)
                self.done += task.positions
        return self


def cut(num_images, size):
    return [Task(range(i, min(i + size, num_images))) for i in range(0, num_images, size)]


@pytest.mark.parametrize("seed", range(20))
def test_every_image_is_done_once_or_given_up(seed):
    cluster = Cluster(cut(300, 16), seed, num_workers=3, share_of_deaths=0.3).run()
    assert sorted(cluster.done + cluster.given_up) == list(range(300))


@pytest.mark.parametrize("seed", range(20))
def test_what_ends_every_process_is_given_up_alone(seed):
    deadly = random.Random(seed).sample(range(300), 3)
    cluster = Cluster(cut(300, 16), seed, num_workers=4, deadly=deadly).run()
    assert sorted(cluster.given_up) == sorted(deadly)
    assert sorted(cluster.done) == sorted(set(range(300)) - set(deadly))
    # Each costs a worker a halving, and two more.
    assert cluster.next_number - 4 <= 3 * (4 + 3)


def test_a_suspect_runs_alone():
    dispatch = Dispatch(cut(8, 1))
    first, second = dispatch.next_for(0), dispatch.next_for(0)
    assert dispatch.next_for(0) is None
    assert dispatch.bury(0) == []
    again = dispatch.next_for(1)
    assert (again.positions, again.deaths) == (first.positions, 1)
    assert dispatch.next_for(1) is None  # Though six others wait.
    fresh = Dispatch(cut(1, 1))
    fresh.next_for(0)
    assert not fresh.is_done
    assert fresh.num_waiting == 0
    assert second.positions == range(1, 2)


def test_an_unknown_worker_leaves_nothing():
    assert Dispatch([]).bury(7) == []
