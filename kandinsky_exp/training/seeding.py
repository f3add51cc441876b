"""Random seeds as a function of seed, step, micro-step and rank, so that a resumed run draws the same numbers."""

import hashlib

import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from any coordinates; neighbours share nothing."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class NoiseSource:
    """The generator of each micro-step, a function of (seed, step, micro-step, rank) alone.

    Args:
        device: where the noise is needed; it is drawn there, so nothing is copied or waited for.
    """

    def __init__(self, seed: int, rank: int, device: torch.device | str) -> None:
        self.seed, self.rank = seed, rank
        self._generator = torch.Generator(device)
        # What a network draws by itself, as dropout does, comes from torch's global generators. `torch.manual_seed`
        # would seed them too, but costs milliseconds, and on a machine without CUDA remembers every call.
        self._global = [torch.default_generator]
        if self._generator.device.type == "cuda":
            self._global.append(torch.cuda.default_generators[self._generator.device.index or 0])

    def at(self, step: int, micro: int) -> torch.Generator:
        for generator in self._global:
            generator.manual_seed(derive_seed("global", self.seed, step, micro, self.rank))
        return self._generator.manual_seed(derive_seed("train", self.seed, step, micro, self.rank))


def validation_generator(seed: int, index: int, draw: int) -> torch.Generator:
    """The noise of one held-out image's draw: the same in every run, on every device and number of processes."""
    return torch.Generator().manual_seed(derive_seed("validation", seed, index, draw))
