"""Images that are hard on nearest-neighbour searches, and what a search must have found."""

import torch

FAMILIES = ["noise", "one colour", "near copies", "duplicates", "zeros", "denormals", "near white", "mixed", "lines"]


def family(kind, n, dimension, *, seed):
    """Images that are hard on arithmetic, the same for the same seed, and some of them for any seed."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, dimension, generator=generator)
    if kind == "one colour":
        return noise[:, :1].expand(-1, dimension).contiguous()
    if kind == "near copies":  # of one image, one pixel of which is a few levels off
        rows = torch.rand(1, dimension, generator=torch.Generator().manual_seed(0)).repeat(n, 1)
        pixel = torch.randint(dimension, (n,), generator=generator)
        rows[torch.arange(n), pixel] += torch.randint(-3, 4, (n,), generator=generator) / 255
        return rows.clamp(0, 1)
    if kind == "duplicates":
        originals = torch.rand(3, dimension, generator=torch.Generator().manual_seed(0))
        return originals[torch.randint(3, (n,), generator=generator)]
    if kind == "mixed":
        parts = [family(part, 1 + n // 8, dimension, seed=seed + 1) for part in FAMILIES if part != "mixed"]
        return torch.cat(parts)[torch.randperm(len(parts) * (1 + n // 8), generator=generator)[:n]]
    factors = {"noise": 1.0, "zeros": 0.0, "denormals": 1e-40}
    if kind in factors:
        return noise * factors[kind]
    if kind == "lines":  # of rank one: nothing is left of them beside their first component
        return noise[:, :1] * torch.linspace(0, 1, dimension)
    return 1 - noise / 10000


def on_the_way(seed=0, num_train=70, num_generated=20):
    """Random images; the first half of the generated ones lie on the way from a training image to a random one."""
    generator = torch.Generator().manual_seed(seed)
    train = torch.rand(num_train, 1, 4, 4, generator=generator)
    generated = torch.rand(num_generated, 1, 4, 4, generator=generator)
    half = num_generated // 2
    generated[:half].lerp_(train[:half], torch.rand(half, 1, 1, 1, generator=generator))
    return generated, train


def assert_found(queries, references, distances, indices, *, ties=True):
    """Compare with all distances in float64: values, ranks, and no index twice."""
    expected = torch.stack([(row.double() - references.double()).square().sum(dim=1) for row in queries])
    k = distances.shape[1]
    nearest = expected.sort(dim=1).values[:, :k]
    torch.testing.assert_close(distances.double(), nearest, rtol=1e-4, atol=1e-36)
    # What stands at a rank is as near as what belongs there.
    torch.testing.assert_close(expected.gather(1, indices), nearest, rtol=1e-6 if ties else 2e-4, atol=1e-36)
    assert all(len(set(row)) == k for row in indices.tolist())
    for values, row in zip(distances.tolist(), indices.tolist(), strict=True):
        assert sorted(zip(values, row, strict=True)) == list(zip(values, row, strict=True))
