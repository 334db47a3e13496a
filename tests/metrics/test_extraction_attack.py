import pytest
import torch
import torch.distributed as dist

from lightning_iet.metrics import ExtractionAttack


def planted():
    """Forty images: 12 copies of training image 3, 10 of a thing that is none, 9 (too few) of training image 5."""
    train, generated = torch.rand(30, 1, 8, 8), torch.rand(40, 1, 8, 8)
    generated[4:16] = train[3]
    generated[16:26] = 0.5
    generated[26:35] = train[5]
    return train, generated


def test_planted_cliques_are_found_and_only_those():
    train, generated = planted()
    metric = ExtractionAttack(train)
    for batch in generated.split(7):
        metric.update(batch)
    assert metric.compute() == {"cliques": 2, "images": 22, "extracted": 1, "training_images": 1}
    first, second = metric.cliques()
    assert (first.members.tolist(), first.train.tolist()) == (list(range(4, 16)), [3])
    assert (second.members.tolist(), second.train.tolist()) == (list(range(16, 26)), [])


def test_held_out_images_give_no_false_alarm():
    train, _ = planted()
    metric = ExtractionAttack(train, min_size=2)
    metric.update(torch.rand(100, 1, 8, 8))
    assert metric.compute() == {"cliques": 0, "images": 0, "extracted": 0, "training_images": 0}


def test_uint8_images_are_kept_as_uint8():
    train, generated = ((images * 255).byte() for images in planted())
    metric = ExtractionAttack(train)
    metric.update(generated[:20])
    assert {part.dtype for part in metric.generated} == {torch.uint8}
    metric.update(generated[20:] / 255)
    assert metric.compute() == {"cliques": 2, "images": 22, "extracted": 1, "training_images": 1}


def dtypes_on_ranks(train, shares):
    """A rank with uint8, one with float32, one with nothing."""
    dist.init_process_group("gloo")
    metric = ExtractionAttack(train)
    for batch in shares[dist.get_rank()]:
        metric.update(batch)
    found = metric.compute()
    return found, {str(part.dtype) for part in metric.generated}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_processes_may_have_images_of_several_kinds(order, processes):
    train, generated = ((images * 255).byte() for images in planted())
    for others in ([generated[20:] / 255], []):
        shares = [[generated[:20]] if others else [generated], others]
        results = processes(2).run(dtypes_on_ranks, train, [shares[rank] for rank in order])
        assert [found for found, _ in results] == [
            {"cliques": 2, "images": 22, "extracted": 1, "training_images": 1}
        ] * 2
        assert results[order.index(0)][1] == {"torch.uint8"}, "after compute they are what they were"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eps": 0}, r"Argument `eps` expected a number in \(0, 1\], but got 0"),
        ({"eps": float("nan")}, r"Argument `eps` expected a number in \(0, 1\], but got nan"),
        ({"min_size": 1}, "Argument `min_size` expected at least 2, but got 1"),
        ({"grid": 9}, "Argument `grid` expected a number from 1 to .* 8, but got 9"),
    ],
)
def test_bad_settings_are_refused_in_one_line(kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        ExtractionAttack(planted()[0], **kwargs)
    assert "\n" not in str(caught.value)
