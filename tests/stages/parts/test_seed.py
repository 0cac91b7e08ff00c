import torch

from warpline.stages.parts.seed import generator_of, seed_of


def test_seeds_depend_on_every_part():
    seeds = {seed_of(*parts) for parts in [(0, "rl", 1), (1, "rl", 1), (0, "sft", 1), (0, "rl", 2), (0, "rl", "1")]}
    assert len(seeds) == 5 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(0, "rl", 1) == 8426205741267864125, "what a seed means has changed: no old run can be repeated"


def test_equal_parts_give_equal_numbers():
    first, second, other = (torch.rand(3, generator=generator_of(*parts)) for parts in [(1, "x"), (1, "x"), (1, "y")])
    assert torch.equal(first, second) and not torch.equal(first, other)
