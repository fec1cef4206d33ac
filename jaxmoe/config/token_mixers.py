"""`TokenMixerConfig`: what the configs of all layers have through which a token sees the ones before it."""


class TokenMixerConfig:
    """A layer through which a token sees the ones before it; see `jaxmoe.layers.mixers`."""

    @property
    def chooses_positions(self) -> bool:
        """Whether it attends to chosen positions, which layers hand on to the ones after them."""
        return False

    def tp_faults(self, tp: int) -> list[str]:
        """List the sizes that do not split over `tp` ranks, as "name=value"."""
        raise NotImplementedError
