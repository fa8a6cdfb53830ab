from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

CHOICES: dict[str, tuple[str | None, ...]]

def fira_update(
    W: Tensor,
    G: Tensor,
    P: Tensor | None,
    R: Tensor,
    N: Tensor,
    prev_norm: Tensor,
    step_size: Tensor,
    scaling: str | None,
    gamma: float,
    alpha: float,
    b: float,
    k: float,
) -> dict[str, Tensor]: ...

class Fira(Optimizer):
    seen: dict[Tensor, dict[str, Tensor]]
    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        rank: int | None = None,
        update_proj_gap: int = 200,
        alpha: float = 0.25,
        proj_type: Literal["std", "reverse_std", "left", "right"] = "std",
        proj_method: Literal["svd", "subspace", "random"] = "subspace",
        scaling: Literal["column", "matrix", "unit"] | None = "column",
        only_scaling: bool = False,
        gamma: float | None = 1.01,
        alpha_mode: Literal["unscaled", "paper", "released"] = "unscaled",
    ) -> None: ...
    def step(self, closure: Callable[[], Any] | None = None) -> Any: ...
    def update(self) -> None: ...
    def update_matrix(self, p: Tensor, group: dict[str, Any]) -> None: ...
    def update_adamw(self, p: Tensor, group: dict[str, Any]) -> None: ...
    def inner(self, R: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, float]: ...
    def new_moments(self, R: Tensor) -> dict[str, Any]: ...
    def new_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Any]: ...
    def find_projection(self, G: Tensor, P: Tensor | None, step: int, group: dict[str, Any]) -> Tensor: ...
    def change_subspace(self, state: dict[str, Any], P: Tensor, group: dict[str, Any]) -> None: ...

def param_groups(model: nn.Module, rank: int | None, **options: Any) -> list[dict[str, Any]]: ...
