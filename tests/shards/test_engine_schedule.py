from hypothesis import given
from hypothesis import strategies as st

from lightning_iet.data import ShardPlan, ShardSampler
from lightning_iet.functional.sharding import partition
from lightning_iet.shards.engine import ShardSchedule


def sampler(num_shards, *, epoch=0, done=(), processes=1, rank=0, round_steps=None):
    plan = ShardPlan(num_shards, processes, rank, round_steps=round_steps, epoch=epoch, done=tuple(done))
    return ShardSampler(partition(12 * num_shards, num_shards), 4, plan=plan)


@given(st.integers(1, 4), st.sampled_from([None, 1, 2]), st.data())
def test_a_cut_course_goes_on_where_it_was(num_shards, round_steps, data):
    """Whose step each batch is, in an epoch that is cut after some batches, equals the uncut epoch."""
    whole = ShardSchedule(sampler(num_shards, round_steps=round_steps), resumed={})
    batches = len(whole.sampler)
    cut = data.draw(st.integers(0, batches - 1))
    expected = [whole.at(0, index) for index in range(batches)]
    before = ShardSchedule(sampler(num_shards, round_steps=round_steps), resumed={})
    for index in range(cut):
        before.count(before.at(0, index))
    record = before.record(world_size=1)
    after = ShardSchedule(sampler(num_shards, round_steps=round_steps, **record), resumed=record)
    position = after.batches_before()
    assert position == cut
    assert [after.at(0, index) for index in range(position, batches)] == expected[cut:]
    for index in range(position, batches):
        after.count(after.at(0, index))
    assert after.record(world_size=1) == {"epoch": 1, "done": []}


def test_a_course_that_has_not_gone_on_yet_is_where_it_was():
    """A checkpoint may be written between the start and the first batch: by Ctrl-C, or when the data cannot be read."""
    record = {"epoch": 1, "done": [3, 1]}
    assert ShardSchedule(sampler(2, **record), resumed=record).record(world_size=1) == record


def test_a_record_stands_at_the_start_of_a_window_of_accumulated_gradients():
    plan = ShardPlan(2, multiple_of=2)
    course = ShardSchedule(ShardSampler(partition(32, 2), 4, plan=plan), resumed={})
    for index in range(3):
        course.count(course.at(0, index))
    assert course.record(world_size=1) == {"epoch": 0, "done": [2, 0]}


def test_a_shard_has_finished_with_its_last_step():
    course = ShardSchedule(sampler(2), resumed={})
    finished = [course.count(course.at(0, index)) for index in range(6)]
    assert finished == [False, False, True, False, False, True]
    assert [course.is_last(index) for index in range(6)] == [False] * 5 + [True]
