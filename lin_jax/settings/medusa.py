"""Settings of Medusa heads."""

import dataclasses

from lin_jax.settings.base import require, require_at_least_zero, require_positive, setting
from lin_jax.settings.typed import Settings


@dataclasses.dataclass(frozen=True, kw_only=True)
class MedusaConfig(Settings):
    """Medusa heads (Cai et al., 2024), which guess the tokens after the next one."""

    heads: int = setting(4, "heads; head i, counted from 1, guesses the token i places after the next one", most=64)
    layers: int = setting(1, "residual blocks in a head", most=64)
    weight: float = setting(
        0.2, "weight of the heads' loss beside that of the next token, where the model trains with the heads"
    )
    tree_nodes: int = setting(
        64,
        "nodes, the root included, of the tree that is chosen from the heads' accuracies, WORKDIR/tree.json",
        most=4096,
    )

    def _check(self) -> None:
        require_positive(self, "heads", "weight")
        require_at_least_zero(self, "layers")
        require(self.tree_nodes >= 2, f"tree_nodes must be 2 or more (the root and a guess), but is {self.tree_nodes}")
