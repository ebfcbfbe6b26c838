import torch

from dcar.models.noise import ImageNoise


def test_the_noise_of_an_image_does_not_depend_on_its_batch() -> None:
    together, alone = ImageNoise([3, 5, 8]), ImageNoise([5])
    for draw in ("rand", "randn", "rand"):
        both = getattr(together, draw)(2, 7), getattr(alone, draw)(2, 7)
        assert both[0].shape == (3, 2, 7)
        assert torch.equal(both[0][1:2], both[1])


def test_equal_seeds_give_equal_noise_and_other_seeds_other_noise() -> None:
    drawn = ImageNoise([1, 1, 2]).randn(100)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_noise_is_drawn_on_the_cpu_whatever_the_default_device() -> None:
    expected = ImageNoise([4]).rand(6)
    with torch.device("meta"):
        assert torch.equal(ImageNoise([4]).rand(6), expected)
